"""A C project compiled for Linux: for this machine, for comparison with a board, or for another CPU under QEMU."""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from netship.bundle.manifest import Firmware
from netship.devices.microcontroller.firmware import definitions, split_outputs
from netship.targets.errors import UserError
from netship.targets.presets import native
from netship.targets.toolchain import run_zig

_SOURCE = Path(__file__).with_name("host.c")
_SECONDS = 600.0


def run_on_host(
    project: Path, name: str, interface: Firmware, inputs: Sequence[bytes]
) -> list[list[NDArray[Any]]]:
    """The inputs of inferences, as they are stored, through the C project ``name`` → of each the outputs, flat."""
    with tempfile.TemporaryDirectory(prefix="netship-") as scratch:
        program = Path(scratch) / "host"
        compile_for_host(project, name, interface, program)
        return run_program([str(program)], name, interface, inputs)


def compile_for_host(
    project: Path, name: str, interface: Firmware, program: Path
) -> None:
    """Compile the C project ``name`` into a program for this machine."""
    target = native()
    # Cortex-M's FPU has fused multiply-add, so sums must be rounded in the same way here.
    fused = ["-mfma"] if "fma" in target.features else []
    compile_program(project, name, interface, program, target.linker, *fused)


def compile_program(
    project: Path, name: str, interface: Firmware, program: Path, *options: str
) -> None:
    """Compile the C project ``name`` into a program for Linux.

    Args:
        options: zig's triple of the target, then more of the compiler's.
    """
    run_zig(
        "cc",
        program,
        *("-target", *options, "-O2"),
        *("-std=c99", "-Wall", "-Wextra", "-Wconversion", "-Werror"),
        # Of a window that lies in the padding alone, no condition on its places holds.
        "-Wno-tautological-overlap-compare",
        "-lm",
        *definitions(project, name, interface),
        *(project / f"{name}.c", project / f"{name}_weights.c", _SOURCE),
    )


def run_program(
    command: Sequence[str], name: str, interface: Firmware, inputs: Sequence[bytes]
) -> list[list[NDArray[Any]]]:
    """As `run_on_host`, with a program that `compile_program` made; ``command`` starts it."""
    try:
        result = subprocess.run(
            command,
            input=b"".join(inputs),
            capture_output=True,
            timeout=_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise UserError(
            f"{name}: the C project gave no answer on this machine in {_SECONDS:.0f} s"
        ) from None
    if result.returncode:
        raise UserError(
            f"{name}_run on this machine returned {result.returncode}; please report the model"
        )
    return split_outputs(result.stdout, interface)
