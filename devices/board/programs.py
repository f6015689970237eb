"""The programs for boards, built on this machine with zig: the RPC server and ``verify``.

Their sources are this folder and the runtime's sources in the engine's wheel. They need no
Python and run on any Linux with glibc 2.28 or newer. The same sources and versions give the
same bytes. A build takes half a minute (two minutes the first time, when zig builds its C++
library) and is kept in the user's cache folder.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from netship.targets.errors import UserError
from netship.targets.files import cached_path, make_once
from netship.targets.toolchain import run_zig

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

# The source files of this folder: the engine's runtime, and those of each program.
_ENGINE = ("engine_core", "engine_rpc")
_PROGRAMS = {
    SERVER: (
        *("serve", "callers", "options", "client_files", "tracker"),
        *("board_info", "folders", "sha256"),
    ),
    VERIFIER: ("verify", "bundle_check", "board_info", "sha256"),
}
_FLAGS = (
    *("-std=c++17", "-O2", "-g0", "-fPIC", "-ffunction-sections", "-fdata-sections"),
    # Warnings in the wheel's sources are not for this project.
    *("-w", "-DDMLC_USE_LOGGING_LIBRARY=<tvm/runtime/logging.h>"),
    # Without it a 32-bit program cannot list folders of large file systems.
    *("-D_FILE_OFFSET_BITS=64", "-DTVM_LOG_STACK_TRACE=0", "-DTVM_USE_LIBBACKTRACE=0"),
)
_LINK = ("-s", "-rdynamic", "-Wl,--build-id=none", "-ldl", "-lpthread")
# Below the engine's package.
_INCLUDES = (
    *("include", "src/runtime", "3rdparty/dlpack/include"),
    *("3rdparty/dmlc-core/include", "3rdparty/compiler-rt", "3rdparty/picojson"),
)


def native_server(machine: Machine, on_progress: Progress = lambda stage: None) -> Path:
    """The RPC server's executable for ``machine``, built if it is not in the cache.

    Args:
        on_progress: called with each stage of a build.
    """
    return _built(machine, on_progress) / SERVER


def native_verifier(
    machine: Machine, on_progress: Progress = lambda stage: None
) -> Path:
    """``verify``'s executable for ``machine``, as `native_server`."""
    return _built(machine, on_progress) / VERIFIER


def _built(machine: Machine, on_progress: Progress) -> Path:
    return make_once(
        _folder(machine),
        lambda folder: _build(machine, folder, on_progress),
        lambda: on_progress(f"waiting for another process that builds for {machine}"),
    )


def _folder(machine: Machine) -> Path:
    return cached_path(
        f"board-{machine}",
        (_TRIPLES[machine], _FLAGS, _LINK, _INCLUDES, _ENGINE, _PROGRAMS),
        packages=("ziglang", "xtc-tvm-python-bindings"),
        files=sorted(SOURCES.rglob("*.[ch]*")),
    )


def _build(machine: Machine, done: Path, on_progress: Progress) -> None:
    done.mkdir()
    work = done.parent
    engine = engine_sources()
    folders = [SOURCES / "shim", *(engine / path for path in _INCLUDES)]
    includes = [f"-I{folder}" for folder in folders]
    # Messages hold the names of source files; their folder must not change the bytes.
    maps = [f"-ffile-prefix-map={engine}=tvm", f"-ffile-prefix-map={SOURCES}=board"]
    target = ("-target", _TRIPLES[machine])

    def compile_one(name: str) -> Path:
        output, source = work / f"{name}.o", SOURCES / f"{name}.cc"
        run_zig("c++", output, *target, *_FLAGS, *includes, *maps, "-c", source)
        return output

    def link_nothing() -> None:
        source = work / "nothing.cc"
        source.write_text("int main() { return 0; }")
        run_zig("c++", work / "nothing", *target, source, *_LINK)

    on_progress(f"compiling the board's programs for {machine}")
    own = sorted({name for names in _PROGRAMS.values() for name in names})
    names = [*_ENGINE, *own]
    with ThreadPoolExecutor(2) as pool:
        # The first link for a machine builds zig's C++ library; that can go on while sources are compiled.
        library = pool.submit(link_nothing)
        objects = dict(zip(names, pool.map(compile_one, names), strict=True))
        library.result()
    for program, parts in _PROGRAMS.items():
        on_progress(f"linking {program} for {machine}")
        linked = [objects[name] for name in (*parts, *_ENGINE)]
        run_zig("c++", done / program, *target, *linked, *_LINK)


def engine_sources() -> Path:
    """The folder of the engine's package, without importing it."""
    package = find_spec("tvm")
    if package is None or not package.submodule_search_locations:
        raise UserError(
            "the package xtc-tvm-python-bindings is missing; run make setup"
        )
    return Path(package.submodule_search_locations[0])
