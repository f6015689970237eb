"""The generated C makes the same input of an image's bytes as Pillow and numpy do, bit by bit."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from ctypes import CDLL, Structure, c_char_p, c_float, c_int, c_size_t
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image as Pictures

from netship.bundle.manifest import Preprocessing, Quantised, Tensor
from netship.bundle.photos import Photo, placement, to_tensor
from netship.compile.backends.image import emit
from netship.devices.microcontroller import boards
from netship.devices.microcontroller.boards import BOARDS
from netship.targets.presets import native
from netship.targets.toolchain import run_zig

RGB, BGR, GREY = range(3)
FILTERS = ("nearest", "area", "bilinear", "bicubic", "lanczos")
# Height and width of the input by fit: the size that is resized to, and the crop.
FITS: dict[str, dict[str, Any]] = {
    "crop": {"resize": 29, "crop": (20, 24)},
    "stretch": {"fit": "stretch", "resize": (27, 24), "crop": (20, 24)},
    "letterbox": {"fit": "letterbox", "resize": (20, 24), "crop": (20, 24), "pad": 114},
}
SCALED: dict[str, Any] = {"scale": 1 / 255, "mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}  # fmt: skip
SIGNED: dict[str, Any] = {"scale": 1 / 127.5, "mean": (1.0,), "std": (1.0,)}
BYTES: dict[str, Any] = {"scale": 1.0, "mean": (0.0,), "std": (1.0,)}


def port(layout: str, channels: int, **facts: Any) -> Tensor:
    shape = (1, channels, 20, 24) if layout == "NCHW" else (1, 20, 24, channels)
    return Tensor.model_validate({"name": "x", "shape": shape, "layout": layout} | facts)  # fmt: skip


NHWC = port("NHWC", 3)
KINDS: dict[str, tuple[Preprocessing, Tensor]] = {
    f"{interpolation}_{fit}": (
        Preprocessing.model_validate(
            FITS[fit]
            | SCALED
            | {"interpolation": interpolation, "channel_order": order}
        ),
        port(layout, 3),
    )
    for (interpolation, fit), order, layout in zip(
        product(FILTERS, FITS),
        ("RGB", "BGR", "RGB") * 5,
        ("NCHW", "NHWC") * 8,
        strict=False,
    )
}
KINDS |= {
    "grey": (Preprocessing(**FITS["crop"], **SIGNED), port("NCHW", 1)),
    "int8": (
        Preprocessing(**FITS["letterbox"], **SIGNED),
        port("NHWC", 3, dtype="int8", quantised=Quantised(scale=0.0079, zero=-1)),
    ),
    "uint8": (
        Preprocessing(**FITS["stretch"], **BYTES),
        port("NHWC", 3, dtype="uint8"),
    ),
}


class Placement(Structure):
    _fields_ = [(name, c_float) for name in ("scale_x", "scale_y", "left", "top")]


def image(kind: str, memory_bytes: int) -> emit.Image:
    how, tensor = KINDS[kind]
    values = emit.byte_values(how, tensor)
    return emit.Image(how, tensor, "", values, tensor.layout, memory_bytes, True)


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Iterator[CDLL]:
    folder = tmp_path_factory.mktemp("image")
    for kind in KINDS:
        emit.write(folder, kind, "test", image(kind, 1 << 16))
        # Room for few columns at a time.
        emit.write(folder, f"{kind}_little", "test", image(kind, 1 << 12))
    emit.write_labels(folder, "t", "test", ["cat", 'a "dog"?', "naïve"])
    options = ("-std=c99", "-O1", "-Wall", "-Wextra", "-Wconversion", "-Wpedantic")
    output = folder / "image.so"
    target = ("-target", native().linker, "-shared", "-fPIC")
    whole = folder / "whole.c"
    lines = [f'#include "{path.name}"\n' for path in sorted(folder.glob("*.c"))]
    whole.write_text("".join(lines))
    assert run_zig("cc", output, *target, *options, "-Werror", whole) == ""
    yield CDLL(str(output))


def by_c(
    library: CDLL,
    kind: str,
    pixels: NDArray[np.uint8],
    order: int,
    name: str = "",
    padding: int = 0,
) -> NDArray[Any]:
    """The input that the C makes of [height, width] or [height, width, 3] pixels, whose rows have ``padding`` bytes after them."""
    height, width = pixels.shape[:2]
    rows = pixels.reshape(height, -1)
    rows = np.pad(rows, ((0, 0), (0, padding)), constant_values=77)
    tensor = KINDS[kind][1]
    found = np.full(tensor.elements + 16, 99, tensor.dtype)
    memory = np.full((1 << (12 if name else 16)) // 4 + 4, 123456, np.int32)
    function = getattr(library, f"{kind}{name}_image")
    code = function(
        rows.ctypes, width, height, c_size_t(rows.shape[1]), order, found.ctypes, memory.ctypes
    )  # fmt: skip
    assert code == 0
    assert (found[tensor.elements :] == 99).all()
    assert (memory[-4:] == 123456).all()
    made: NDArray[Any] = found[: tensor.elements].reshape(tensor.shape)
    return made


def by_python(kind: str, pixels: NDArray[np.uint8]) -> NDArray[Any]:
    how, tensor = KINDS[kind]
    picture = Pictures.fromarray(pixels).convert("RGB" if tensor.channels == 3 else "L")
    return to_tensor(Photo(picture, ()), how, tensor)


def seeded(height: int, width: int) -> NDArray[np.uint8]:
    """Pixels that C on a board can make, too."""
    state = np.arange(height * width * 3, dtype=np.uint32) * np.uint32(2654435761)
    return (state >> np.uint32(24)).astype(np.uint8).reshape(height, width, 3)


def sizes(count: int, seed: int) -> list[tuple[int, int]]:
    """Heights and widths: random ones of every magnitude, and special ones."""
    random = np.random.default_rng(seed)
    drawn = np.exp(random.uniform(0, np.log(400), (count, 2))).astype(int)
    special = [(1, 1), (20, 24), (27, 24), (29, 29), (2, 90), (90, 3), (40, 48)]
    return special + [(int(h), int(w)) for h, w in drawn]


@pytest.mark.parametrize("kind", KINDS)
def test_c_equals_pillow_and_numpy(library: CDLL, kind: str) -> None:
    random = np.random.default_rng(1)
    for number, (height, width) in enumerate(sizes(30, 2)):
        pixels = random.integers(0, 256, (height, width, 3), np.uint8)
        if number % 2:
            # Edges: the lobes of weights reach beyond black and white.
            pixels = np.where(pixels > 127, 255, 0).astype(np.uint8)
        expected = by_python(kind, pixels)
        for order, given in ((RGB, pixels), (BGR, pixels[:, :, ::-1])):
            found = by_c(library, kind, given, order, padding=number % 3)
            assert np.array_equal(found, expected), (height, width)
        little = by_c(library, kind, pixels, RGB, "_little")
        assert np.array_equal(little, expected)
        grey = np.ascontiguousarray(pixels[:, :, 0])
        found = by_c(library, kind, grey, GREY)
        assert np.array_equal(found, by_python(kind, grey))


def test_places_are_those_that_boxes_are_moved_back_by(library: CDLL) -> None:
    for kind, (how, _) in KINDS.items():
        place = getattr(library, f"{kind}_place")
        place.restype = Placement
        for height, width in sizes(10, 3):
            found = place(width, height)
            names = ("scale_x", "scale_y", "left", "top")
            values = [getattr(found, name) for name in names]
            expected = placement((width, height), how)
            assert values == [np.float32(value) for value in expected], kind


@pytest.mark.parametrize(
    ("code", "changed"),
    [
        (1, {"pixels": None}),
        (1, {"input": None}),
        (1, {"memory": None}),
        (2, {"width": 0}),
        (2, {"height": 0}),
        (2, {"width": -3}),
        (2, {"height": 65536}),
        (3, {"stride": 29}),
        (3, {"stride": 2**62}),
        (3, {"stride": 2**64 - 1}),
        (4, {"order": 3}),
        (4, {"order": -1}),
        (0, {"order": GREY, "stride": 10}),
        # 4096 bytes of memory have no room for the weights of one column.
        (5, {"width": 65535, "stride": 3 * 65535, "name": "lanczos_stretch_little"}),
    ],
)
def test_wrong_arguments_get_codes_and_nothing_is_written(
    library: CDLL, code: int, changed: dict[str, Any]
) -> None:
    pixels = np.zeros((10, 10, 3), np.uint8)
    found = np.full(20 * 24 * 3, 99, np.float32)
    memory = np.zeros(1 << 14, np.int32)
    given: dict[str, Any] = {"pixels": pixels.ctypes, "width": 10, "height": 10, "stride": 30, "order": RGB}  # fmt: skip
    given |= {"input": found.ctypes, "memory": memory.ctypes} | changed
    name = given.pop("name", "lanczos_stretch")
    given["stride"] = c_size_t(given["stride"])
    assert getattr(library, f"{name}_image")(*given.values()) == code
    assert (found == 99).all() == (code != 0)


def test_labels_are_given_by_index(library: CDLL) -> None:
    library.t_label.restype = c_char_p
    texts = [library.t_label(c_int(index)) for index in (-1, 0, 1, 2, 3)]
    assert texts == [None, b"cat", b'a "dog"?', "naïve".encode(), None]


PROBE = """
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
{includes}
int main(void) {{
  static const int32_t sizes[][2] = {{ {{1, 1}}, {{3, 200}}, {{90, 41}}, {{20, 24}}, {{131, 60}} }};
  for (size_t i = 0; i < sizeof sizes / sizeof sizes[0]; i++) {{
    int32_t height = sizes[i][0], width = sizes[i][1];
    size_t stride = (size_t)width * 3, bytes = stride * (size_t)height;
    uint8_t *pixels = malloc(bytes);
    memset(pixels, 200, bytes);
    {calls}
    free(pixels);
  }}
  return 0;
}}
"""
PROBED = """{{
      {c_type} *input = malloc(20 * 24 * {channels} * sizeof *input);
      {name}_image_memory *memory = malloc(sizeof *memory);
      if ({name}_image(pixels, width, height, stride, 1, input, memory)) return 1;
      free(memory);
      free(input);
    }}"""


def test_nothing_outside_of_the_caller_s_memory_is_touched(tmp_path: Path) -> None:
    calls = []
    for kind in (
        "bilinear_crop",
        "lanczos_letterbox",
        "nearest_stretch",
        "grey",
        "int8",
    ):
        made = image(kind, 1 << 12)
        emit.write(tmp_path, kind, "test", made)
        channels = made.tensor.channels
        calls.append(PROBED.format(name=kind, c_type=made.c_type, channels=channels))
    headers = [f'#include "{path.name}"' for path in sorted(tmp_path.glob("*.h"))]
    (tmp_path / "probe.c").write_text(
        PROBE.format(includes="\n".join(headers), calls="\n    ".join(calls))
    )
    options = ("-std=c99", "-O1", "-Wall", "-Wextra", "-Wconversion", "-Werror", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")  # fmt: skip
    program = tmp_path / "probe"
    sources = sorted(tmp_path.glob("*.c"))
    subprocess.run(["gcc", *options, "-o", program, *sources], check=True)
    subprocess.run([program], check=True)


FIRMWARE = """
#include <stddef.h>
#include <stdint.h>
{includes}
extern uint32_t stack_top[], data_start[], data_end[], data_load[], bss_start[], bss_end[];
static int32_t host(int32_t operation, const void *block) {{
  register int32_t r0 __asm__("r0") = operation;
  register const void *r1 __asm__("r1") = block;
  __asm__ volatile("bkpt 0xAB" : "+r"(r0) : "r"(r1) : "memory");
  return r0;
}}
static uint8_t pixels[61 * 83 * 3];
static union {{ float f[20 * 24 * 3]; uint8_t b[1]; int8_t i[1]; }} input;
void reset(void) {{
  *(volatile uint32_t *)0xE000ED88 |= 0xFu << 20; /* the FPU on */
  __asm__ volatile("dsb; isb" ::: "memory");
  for (uint32_t *to = data_start, *from = data_load; to < data_end;) *to++ = *from++;
  for (uint32_t *to = bss_start; to < bss_end;) *to++ = 0;
  for (uint32_t i = 0; i < sizeof pixels; i++) pixels[i] = (uint8_t)((i * 2654435761u) >> 24);
  static char text[16 * {count}];
  uint32_t hash, at = 0;
{calls}
  host(4, text); /* SYS_WRITE0 */
  const uintptr_t block[2] = {{0x20026, 0}};
  host(0x20, block); /* SYS_EXIT_EXTENDED */
  for (;;) {{
  }}
}}
__attribute__((used, section(".vectors"))) const uintptr_t vectors[2] = {{(uintptr_t)stack_top, (uintptr_t)reset}};
"""
HASHED = """
  {{
    static {name}_image_memory memory;
    hash = 2166136261u ^ (uint32_t){name}_image(pixels, 83, 61, 83 * 3, 0, (void *)&input, &memory);
    for (uint32_t i = 0; i < {bytes}; i++) hash = (hash ^ input.b[i]) * 16777619u;
    for (int i = 28; i >= 0; i -= 4) text[at++] = "0123456789abcdef"[hash >> i & 15];
    text[at++] = ' ';
  }}"""


@pytest.mark.parametrize("cpu", ["cortex-m4", "cortex-m7"])
def test_a_microcontroller_gives_the_same_bits(cpu: str, tmp_path: Path) -> None:
    """The M7 has a fused multiply-add of doubles, which its compiler would take; the M4 has no doubles."""
    calls, expected = [], []
    for kind, (_, tensor) in KINDS.items():
        emit.write(tmp_path, kind, "test", image(kind, 1 << 12))
        calls.append(HASHED.format(name=kind, bytes=tensor.nbytes))
        hashed = 2166136261
        for byte in by_python(kind, seeded(61, 83)).tobytes():
            hashed = (hashed ^ byte) * 16777619 % 2**32
        expected.append(f"{hashed:08x}")
    headers = [f'#include "{path.name}"' for path in sorted(tmp_path.glob("*.h"))]
    (tmp_path / "main.c").write_text(
        FIRMWARE.format(
            includes="\n".join(headers), calls="".join(calls), count=len(calls)
        )
    )
    board = BOARDS[cpu]
    program = tmp_path / "program.elf"
    script = Path(boards.__file__).with_name("board.ld")
    places = {"CODE": board.code, "WEIGHTS": board.weights.address, "DATA": board.data.address}  # fmt: skip
    subprocess.run(
        [
            *("arm-none-eabi-gcc", f"-mcpu={cpu}", "-mthumb", "-mfloat-abi=hard"),
            *("-O2", "-std=gnu11", "-ffp-contract=fast", "-Wall", "-Wextra", "-Werror"),
            *("-nostartfiles", "-specs=nosys.specs", "-T", str(script)),
            *(f"-Wl,--defsym={name}={place}" for name, place in places.items()),
            *("-o", str(program), *map(str, sorted(tmp_path.glob("*.c")))),
        ],
        check=True,
    )
    command = ["qemu-system-arm", "-M", board.machine, "-nographic", "-monitor", "none", "-serial", "none"]  # fmt: skip
    command += ["-semihosting-config", "enable=on,target=native", "-kernel", str(program)]  # fmt: skip
    ran = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60, check=True)  # fmt: skip
    assert (ran.stdout + ran.stderr).split() == expected
