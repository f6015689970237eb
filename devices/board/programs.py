"""The programs for boards, built on this machine with zig: the RPC server and ``verify``.

They are made of the runtime sources that the engine's wheel ships and of ``board/``, need
no Python, and run on any Linux with glibc 2.28 or newer. The same sources and versions give
the same bytes. A build takes half a minute a machine (two minutes the first time, when zig builds
its C++ library) and is kept in the user's cache folder.
"""

from __future__ import annotations

import hashlib
import subprocess
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from bundle.accuracy import TOLERANCE
from targets.errors import UserError
from targets.files import cache_folder, made_once
from targets.toolchain import zig

Machine = Literal["aarch64", "arm", "x86_64"]
Progress = Callable[[str], None]

SOURCES = Path(__file__).parent
SERVER, VERIFIER = "netship-serve", "netship-verify"

_TRIPLES: dict[str, str] = {
    "aarch64": "aarch64-linux-gnu.2.28",
    # Hard-float.
    "arm": "arm-linux-gnueabihf.2.28",
    "x86_64": "x86_64-linux-gnu.2.28",
}

# Of board/: the engine's runtime, and each program's own.
_ENGINE = ("engine_core", "engine_rpc")
_PROGRAMS = {
    SERVER: (
        *("serve", "options", "client_files", "tracker"),
        *("board_info", "folders", "sha256"),
    ),
    VERIFIER: ("verify", "bundle_check", "board_info", "sha256"),
}
_FLAGS = (
    *("-std=c++17", "-O2", "-g0", "-fPIC", "-ffunction-sections", "-fdata-sections"),
    # The wheel's sources are not ours to warn about.
    *("-w", "-DDMLC_USE_LOGGING_LIBRARY=<tvm/runtime/logging.h>"),
    # A 32-bit program else fails to list folders of large file systems.
    *("-D_FILE_OFFSET_BITS=64", "-DTVM_LOG_STACK_TRACE=0", "-DTVM_USE_LIBBACKTRACE=0"),
    f"-DNETSHIP_TOLERANCE={TOLERANCE}",
)
_LINK = ("-s", "-rdynamic", "-Wl,--build-id=none", "-ldl", "-lpthread")


def native_server(machine: Machine, on_progress: Progress = lambda stage: None) -> Path:
    """The RPC server's executable for ``machine``, built if it is not in the cache.

    Args:
        on_progress: called with each stage of a build.

    Raises:
        UserError: zig failed (its words are quoted), or the cache cannot be written.
    """
    return _built(machine, on_progress) / SERVER


def native_verifier(
    machine: Machine, on_progress: Progress = lambda stage: None
) -> Path:
    """``verify``'s executable for ``machine``, as `native_server`.

    Raises:
        UserError: as `native_server`.
    """
    return _built(machine, on_progress) / VERIFIER


def is_built(machine: Machine) -> bool:
    return _folder(machine).is_dir()


def _built(machine: Machine, on_progress: Progress) -> Path:
    waiting = f"waiting for another process that builds for {machine}"
    return made_once(
        _folder(machine),
        f"board-{machine}",
        lambda done: _build(machine, done.parent, done, on_progress),
        lambda: on_progress(waiting),
    )


def _folder(machine: Machine) -> Path:
    return cache_folder() / f"board-{machine}-{_key(machine)}"


def _key(machine: Machine) -> str:
    """Of everything that the bytes depend on."""
    key = hashlib.sha256()
    packages = ("ziglang", "xtc-tvm-python-bindings")
    versions = [version(package) for package in packages]
    words = (_TRIPLES[machine], *_FLAGS, *_LINK, *versions)
    key.update("\0".join([*words, repr(_PROGRAMS)]).encode())
    for source in sorted(SOURCES.rglob("*.[ch]*")):
        key.update(source.name.encode() + b"\0" + source.read_bytes())
    return key.hexdigest()[:16]


def _build(machine: Machine, work: Path, done: Path, on_progress: Progress) -> None:
    engine = engine_sources()
    folders = [SOURCES / "shim", engine / "include", engine / "src/runtime"]
    folders += [
        engine / "3rdparty" / path
        for path in ("dlpack/include", "dmlc-core/include", "compiler-rt", "picojson")
    ]
    includes = [f"-I{folder}" for folder in folders]
    # Messages name a source file; which folder it lay in must not matter.
    maps = [f"-ffile-prefix-map={engine}=tvm", f"-ffile-prefix-map={SOURCES}=board"]
    compiler = [zig(), "c++", "-target", _TRIPLES[machine]]

    def compile_one(name: str) -> str:
        output = str(work / f"{name}.o")
        source = str(SOURCES / f"{name}.cc")
        _run([*compiler, *_FLAGS, *includes, *maps, "-c", source, "-o", output])
        return output

    def link_nothing() -> None:
        source = work / "nothing.cc"
        source.write_text("int main() { return 0; }")
        _run([*compiler, "-o", str(work / "nothing"), str(source), *_LINK])

    on_progress(f"compiling the board's programs for {machine}")
    own = sorted({name for names in _PROGRAMS.values() for name in names})
    names = [*_ENGINE, *own]
    with ThreadPoolExecutor(2) as pool:
        # The first time for a machine zig builds its C++ library to link anything; let it begin.
        library = pool.submit(link_nothing)
        objects = dict(zip(names, pool.map(compile_one, names), strict=True))
        library.result()
    for program, parts in _PROGRAMS.items():
        on_progress(f"linking {program} for {machine}")
        linked = [objects[name] for name in (*parts, *_ENGINE)]
        _run([*compiler, "-o", str(done / program), *linked, *_LINK])


def engine_sources() -> Path:
    """The folder of the engine's package, without importing it."""
    package = find_spec("tvm")
    if package is None or not package.submodule_search_locations:
        raise UserError(
            "the package xtc-tvm-python-bindings is missing; run make setup"
        )
    return Path(package.submodule_search_locations[0])


def _run(command: Sequence[str]) -> None:
    result = subprocess.run(
        command, capture_output=True, text=True, errors="replace", check=False
    )
    if result.returncode:
        said = result.stderr.strip().splitlines() or [f"exit code {result.returncode}"]
        wrong = next((line for line in said if "error:" in line), said[-1])
        raise UserError(f"building for a board: {wrong.strip()}; run make setup again")
