"""A generated C project compiled into a bare program, run under QEMU, its instructions counted."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from netship.bundle.manifest import Firmware
from netship.devices.microcontroller.boards import Board
from netship.targets.errors import UserError
from netship.targets.escapes import C_TYPES
from netship.targets.toolchain import run_tool

_HERE = Path(__file__).parent
_GCC = "arm-none-eabi-gcc"
_QEMU = "qemu-system-arm"
_STACK = 16 << 10
_ADVICE = "`apt install gcc-arm-none-eabi libnewlib-arm-none-eabi`, or report it"


@dataclass(frozen=True)
class Image:
    """A linked program.

    Attributes:
        code: bytes of code and tables of the network, without its harness.
        weights: bytes of weights, biases and multipliers.
        static: bytes of data and zeroed memory that the network itself declares.
    """

    path: Path
    board: Board
    code: int
    weights: int
    static: int


@dataclass(frozen=True)
class Run:
    """The results of one start of the board.

    Attributes:
        outputs: of each input the outputs, flat, as they are stored.
        self_test: the code that NAME_self_test returned; 0 where it was not run.
        stack: the most bytes of stack that NAME_run took with all that it calls; 0 where it was not measured.
        instructions: of each inference.
        parts: instructions of one inference, [steps, 4]: expand, depthwise, project, everything else;
            None except in a traced run.
    """

    outputs: list[list[NDArray[Any]]]
    self_test: int
    stack: int
    instructions: tuple[float, ...]
    parts: NDArray[np.float64] | None


def _find_tools() -> None:
    for tool, package in (
        (_GCC, "gcc-arm-none-eabi libnewlib-arm-none-eabi"),
        (_QEMU, "qemu-system-arm"),
    ):
        if shutil.which(tool) is None:
            raise UserError(
                f"no {tool}; install it with `apt install {package}`, or compile the C project with "
                "your own tools and call its self-test"
            )


def definitions(project: Path, name: str, interface: Firmware) -> list[str]:
    """The compiler options that tell harness.h about the project ``name`` in ``project``."""
    outputs = (
        f"({C_TYPES[each.dtype]}*)(outputs.bytes+{offset})"
        for each, offset in zip(
            interface.outputs, interface.output_offsets, strict=False
        )
    )
    ports = list(zip(interface.inputs, interface.input_offsets, strict=True))
    inputs = (f"({C_TYPES[x.dtype]}*)(arena.bytes+{offset})" for x, offset in ports)
    places = (f"{{{offset},{x.nbytes}}}" for x, offset in ports)
    arenas = [f"arena.bytes+{x.begin}" for x in interface.arenas] or ["&arena"]
    values = {
        "NAME": name,
        "INPUTS": ",".join(inputs),
        "INPUT_PLACES": ",".join(places),
        "OUTPUTS": ",".join(outputs),
        "ARENAS": ",".join(arenas),
        "OUTPUT_BYTES": interface.output_bytes,
        "ARENA_BYTES": interface.arena_bytes,
        "STEPS": interface.steps,
    }
    if set('"\n') & set(str(project)):
        raise UserError(
            f"{project}: compilers include no file whose path has a double quote or a new line; take another folder"
        )
    header = ("-include", str(project / f"{name}.h"))
    return [*header, *(f"-D{macro}={value}" for macro, value in values.items())]


def split_outputs(data: bytes, interface: Firmware) -> list[list[NDArray[Any]]]:
    """Of each run the outputs, flat, as they are stored."""
    ends = zip(interface.outputs, interface.output_offsets, strict=False)
    places = [(each.dtype, begin, begin + each.nbytes) for each, begin in ends]
    return [
        [
            np.frombuffer(data[at + begin : at + end], dtype)
            for dtype, begin, end in places
        ]
        for at in range(0, len(data), interface.output_bytes)
    ]


def compile_firmware(
    project: Path,
    name: str,
    interface: Firmware,
    board: Board,
    folder: Path,
    *,
    traced: bool = False,
    flags: Sequence[str] = (),
) -> Image:
    """Compile the C project ``name`` in ``project`` with its harness into ``folder``.

    Args:
        traced: count instructions by step and part; the counting itself takes some.
        flags: more of the compiler's, for the network's source.
    """
    _find_tools()
    if too_large := misfit(interface, board):
        raise UserError(too_large)
    if board.older and not _knows(board.cpu):
        board = replace(board, cpu=board.older, unknown=board.cpu)
    options = [
        *(f"-mcpu={board.cpu}", "-mthumb", f"-mfloat-abi={board.float_abi}", "-O3"),
        *("-ffunction-sections", "-fdata-sections"),
    ]
    network = [*options, "-std=c99", "-Wall", "-Wextra", "-Wconversion", "-Werror"]
    if traced:
        network += ["-include", str(_HERE / "trace.h")]
    network += flags
    harness = [*options, "-std=gnu99", *definitions(project, name, interface)]
    sources = (
        (project / f"{name}.c", network),
        (project / f"{name}_weights.c", network),
        (_HERE / "firmware.c", [*harness, *(["-DTRACE"] if traced else [])]),
    )
    objects = [folder / source.with_suffix(".o").name for source, _ in sources]
    for (source, arguments), output in zip(sources, objects, strict=True):
        command = [_GCC, *arguments, "-c", str(source), "-o", str(output)]
        run_tool(command, output, _ADVICE)
    program = folder / f"{name}.elf"
    places = {
        "CODE": board.code,
        "WEIGHTS": board.weights.address,
        "DATA": board.data.address,
    }
    command = [
        *(_GCC, *options, "-nostartfiles", "-specs=nosys.specs", "-Wl,--gc-sections"),
        *(f"-Wl,--defsym={symbol}={address}" for symbol, address in places.items()),
        *("-T", str(_HERE / "board.ld"), *map(str, objects), "-lm"),
        *("-o", str(program)),
    ]
    run_tool(command, program, _ADVICE)
    return Image(
        program,
        board,
        code=_section_bytes(objects[0], ".text", ".rodata"),
        weights=_section_bytes(program, ".weights"),
        static=_section_bytes(objects[0], ".data", ".bss"),
    )


def _knows(cpu: str) -> bool:
    """Whether the compiler has code for a core; GCC has cortex-m85 from version 13 on."""
    command = [_GCC, f"-mcpu={cpu}", "-E", "-x", "c", "-"]
    tried = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, check=False
    )
    return tried.returncode == 0


def run_firmware(
    image: Image,
    interface: Firmware,
    inputs: Sequence[bytes],
    folder: Path,
    timeout: float,
    *,
    probe: bool = True,
    plugin: str = "",
) -> Run:
    """Start the board with ``inputs``, those of each inference as they are stored, and wait for its end.

    Args:
        probe: first run the self-test and measure the stack, which takes two more inferences.
        plugin: a plugin for QEMU, with its arguments.
    """
    (folder / "input.bin").write_bytes(b"".join(inputs))
    if probe:
        (folder / "probe.bin").touch()
    else:
        (folder / "probe.bin").unlink(missing_ok=True)
    command = [
        *(_QEMU, "-M", image.board.machine, "-nographic", "-monitor", "none"),
        *("-serial", "none", "-icount", "shift=0"),
        *("-semihosting-config", "enable=on,target=native"),
        *("-kernel", str(image.path)),
        *(["-plugin", plugin] if plugin else []),
    ]
    where = f"the emulated {image.board.machine}"
    try:
        result = subprocess.run(
            command,
            cwd=folder,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=timeout,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise UserError(
            f"{where}: no answer in {timeout:.0f} s; the firmware hangs, or the machine is slow"
        ) from None
    if result.returncode:
        said = (result.stderr.strip().splitlines() or [""])[-1]
        reasons = {
            101: "NAME_run returned an error",
            103: "the firmware faulted",
            104: "an inference takes more ticks than 31 bits count",
        }
        reason = reasons.get(
            result.returncode, said or f"exit code {result.returncode}"
        )
        raise UserError(
            f"{where}: {reason}; build it again, and report it if it stays so"
        )
    outputs = split_outputs((folder / "output.bin").read_bytes(), interface)
    figures = np.fromfile(folder / "figures.bin", "<i4")
    count = len(inputs)
    scale = image.board.instructions_per_tick
    each = figures[: 4 * count].reshape(count, 4)
    traced = figures.size > 4 * count
    return Run(
        outputs,
        int(each[0, 0]),
        int(each[0, 2]),
        tuple((each[:, 3] * scale).tolist()),
        figures[4 * count :].reshape(-1, 4)[:-1] * scale if traced else None,
    )


def misfit(interface: Firmware, board: Board) -> str:
    """What the emulated board has no room for, for a person; empty where it has room."""
    needs = interface.arena_bytes + interface.output_bytes + _STACK
    weights = interface.weights_bytes
    if needs > board.data.size:
        said = (
            f"arena, output and stack take {needs:,} bytes, {needs - board.data.size:,} more than its RAM; the peak is "
            f"{interface.peak!r}"
        )
    elif weights > board.weights.size:
        said = f"the weights take {weights:,} bytes, {weights - board.weights.size:,} more than its flash"
    else:
        return ""
    return (
        f"the emulated board {board.machine}: {said}: choose a smaller width or resolution, or run the project's "
        "example/main.c on your own board; the build compared the same C on this machine"
    )


def _section_bytes(file: Path, *prefixes: str) -> int:
    """Bytes of an object's sections whose names begin with one of ``prefixes``."""
    shown = run_tool(["arm-none-eabi-size", "-A", str(file)], file, _ADVICE).stdout
    found = re.findall(r"^(\S+) +(\d+) +\d+$", shown, re.MULTILINE)
    return sum(int(size) for name, size in found if name.startswith(prefixes))
