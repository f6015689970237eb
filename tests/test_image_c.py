"""The generated C makes the same input of an image's bytes as Pillow and numpy do, bit by bit."""

from __future__ import annotations

from collections.abc import Iterator
from ctypes import CDLL, Structure, c_float, c_size_t
from itertools import product
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image as Pictures

from netship.bundle.manifest import Preprocessing, Quantised, Tensor
from netship.bundle.photos import Photo, to_tensor
from netship.compile.backends.image import emit
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
    target = ("-target", native().linker, "-shared", "-fPIC", "-fsanitize=undefined")
    sources = sorted(folder.glob("*.c"))
    assert run_zig("cc", output, *target, *options, "-Werror", *sources) == ""
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
