"""The C runtime of a standalone library, on this machine and on emulated ARM boards."""

from __future__ import annotations

import os
import platform
import random
import shutil
import subprocess
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from netship.devices.sessions.emulated import find_qemu
from netship.targets.errors import UserError
from netship.targets.presets import PRESETS, native, this_cpu
from netship.targets.toolchain import llvm_tool, run_tool, run_zig

ROOT = Path(__file__).parent.parent
RUNTIME = ROOT / "compile/backends/standalone/runtime.c"
SOURCES = (ROOT / "tests/c/runtime_check.c", RUNTIME)
FLAGS = (
    *("-std=gnu11", "-O2", "-fPIC", "-Wall", "-Wextra", "-Wconversion", "-Werror"),
    f"-I{RUNTIME.parent}",
)
SANITIZERS = {
    "address": ("-fsanitize=address,undefined", "-fno-sanitize-recover=all"),
    "thread": ("-fsanitize=thread",),
}
# What runtime_check.c checks; the names say what.
CHECKS = (
    *("results", "tasks", "pauses", "one_cpu", "alignment", "two_instances", "busy"),
    *(
        "contended",
        "handed_over",
        "forked",
        "forked_while_running",
        "signals",
        "destroyed",
    ),
    *("bad_buffers", "bad_threads", "caller_memory", "too_many", "workspaces"),
    *("workspace_limits", "failures", "rounds", "no_memory", "huge"),
    *("features", "weights_checksum", "comparison", "finite_input", "error_texts"),
)
# RLIMIT_AS would count the memory of QEMU and of the sanitizers themselves.
EMULATED = [check for check in CHECKS if check != "no_memory"]
SANITIZED = [check for check in EMULATED if check != "huge"]
SECONDS = 300


@dataclass(frozen=True)
class Build:
    """The check program, and the words that start it."""

    command: tuple[str, ...]

    def __call__(self, *arguments: str, stdin: bytes = b"") -> str:
        result = subprocess.run(
            [*self.command, *arguments],
            input=stdin,
            capture_output=True,
            check=False,
            timeout=SECONDS,
        )
        said = result.stdout.decode() + result.stderr.decode()
        assert result.returncode == 0, said
        return said


Make = Callable[[str], Build]


def missing(what: str) -> None:
    if os.environ.get("CI"):
        pytest.fail(what)
    pytest.skip(f"not run: {what}")


def gcc() -> str:
    found = shutil.which("gcc")
    if not found:
        missing("gcc is not installed")
    return str(found)


def qemu(machine: str, cpu: str) -> tuple[str, ...]:
    try:
        return find_qemu(machine), "-cpu", cpu
    except UserError as error:
        missing(str(error))
        raise


def compiled(folder: Path, *options: str, by_gcc: bool = False) -> str:
    """Compile the check program without one warning."""
    program = folder / "runtime_check"
    words = [*options, *FLAGS, *map(str, SOURCES), "-pthread"]
    if by_gcc:
        said = run_tool([gcc(), *words, "-o", str(program)], program).stderr
    else:
        said = run_zig("cc", program, *words)
    assert said == ""
    return str(program)


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """``make(kind)``: the check program of a compiler, compiled once."""
    builds: dict[str, Build] = {}

    def build(kind: str) -> Build:
        if kind not in builds:
            builds[kind] = _build(kind, tmp_path_factory.mktemp(kind))
        return builds[kind]

    return build


def _build(kind: str, folder: Path) -> Build:
    if kind in SANITIZERS:
        # Without randomised addresses: ThreadSanitizer needs its shadow where it expects it.
        program = compiled(folder, "-g", *SANITIZERS[kind], by_gcc=True)
        return Build(("setarch", "-R", program))
    if kind == "gcc":
        return Build((compiled(folder, by_gcc=True),))
    static = ("-static", "-target")
    if kind == "arm64":
        emulator = qemu("aarch64", "cortex-a72")
        return Build((*emulator, compiled(folder, *static, "aarch64-linux-musl")))
    if kind == "armv7":
        emulator = qemu("arm", "cortex-a7")
        return Build((*emulator, compiled(folder, *static, "arm-linux-musleabihf")))
    if kind == "nehalem":
        emulator = qemu("x86_64", "Nehalem")
        return Build((*emulator, compiled(folder, *static, "x86_64-linux-musl")))
    if kind == "musl":
        linker = f"{platform.machine()}-linux-musl"
        return Build((compiled(folder, *static, linker),))
    return Build((compiled(folder, "-target", native().linker),))


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("kind", ["zig", "musl", "gcc"])
def test_on_this_machine(make: Make, kind: str, check: str) -> None:
    make(kind)(check)


@pytest.mark.slow
@pytest.mark.parametrize("check", EMULATED)
@pytest.mark.parametrize("kind", ["arm64", "armv7"])
def test_on_an_emulated_board(make: Make, kind: str, check: str) -> None:
    make(kind)(check)


@pytest.mark.slow
@pytest.mark.parametrize("check", SANITIZED)
@pytest.mark.parametrize("kind", list(SANITIZERS))
def test_under_sanitizers(make: Make, kind: str, check: str) -> None:
    assert make(kind)(check) == ""


def test_every_check_of_the_program_is_run(make: Make) -> None:
    assert make("zig")().split() == list(CHECKS)


def test_the_checksum_is_zlibs(make: Make) -> None:
    for size in (0, 1, 7, 8, 9, 63, 1000, 100_003):
        data = random.Random(size).randbytes(size)
        expected = [zlib.crc32(data[start:]) for start in range(min(9, size + 1))]
        assert make("zig")("crc", stdin=data).split() == list(map(str, expected))


def has(build: Build, names: Sequence[str]) -> set[str]:
    return set(build("cpu", *names).split())


def test_this_cpu_has_what_linux_lists(make: Make) -> None:
    cpu = this_cpu()
    names = sorted({n for p in PRESETS if p.machine == cpu.machine for n in p.features})
    assert has(make("zig"), names) == set(names) & cpu.features


@pytest.mark.slow
def test_emulated_cpus_have_what_their_presets_need(make: Make) -> None:
    [a76] = [preset for preset in PRESETS if preset.name == "arm-cortex-a76"]
    names = [*sorted(a76.features), "asimd", "i8mm"]
    program = make("arm64").command[-1]
    on_a72 = Build((*qemu("aarch64", "cortex-a72"), program))
    on_a76 = Build((*qemu("aarch64", "cortex-a76"), program))
    assert has(on_a72, names) == {"asimd"}
    assert has(on_a76, names) == {"asimd", *a76.features}

    names = ["neon", "vfpv4", "idiva"]
    program = make("armv7").command[-1]
    on_a7 = Build((*qemu("arm", "cortex-a7"), program))
    on_a9 = Build((*qemu("arm", "cortex-a9"), program))
    assert has(on_a7, names) == {*names}
    assert has(on_a9, names) == {"neon"}


def test_an_old_x86_is_told_apart(make: Make) -> None:
    """QEMU's Nehalem: SSE4.2 and no AVX."""
    names = ["sse2", "sse4_2", "popcnt", "avx", "avx2", "fma", "avx512f"]
    assert has(make("nehalem"), names) == {"sse2", "sse4_2", "popcnt"}


def test_it_asks_for_libc_alone_and_runs_nothing_by_itself(tmp_path: Path) -> None:
    item = tmp_path / "runtime.o"
    run_zig("cc", item, "-target", native().linker, *FLAGS, "-c", RUNTIME)

    def tool(name: str, *options: str) -> str:
        return subprocess.run(
            [llvm_tool(name), *options, str(item)],
            capture_output=True,
            text=True,
            check=True,
        ).stdout

    undefined = set(
        tool("llvm-nm", "--undefined-only", "--format=just-symbols").split()
    )
    assert undefined <= {
        *("clock_gettime", "free", "getpid", "memcmp", "bcmp", "memcpy", "memset"),
        *("madvise", "sched_getcpu", "sched_setaffinity"),
        *("posix_memalign", "sched_getaffinity", "__sched_cpucount", "sigfillset"),
        *("strcspn", "strlen", "strspn", "getauxval", "pthread_sigmask"),
        *("pthread_attr_destroy", "pthread_attr_init", "pthread_attr_setstacksize"),
        *("pthread_cond_broadcast", "pthread_cond_destroy", "pthread_cond_init"),
        *("pthread_cond_wait", "pthread_create", "pthread_join"),
        *("pthread_mutex_destroy", "pthread_mutex_init", "pthread_mutex_lock"),
        *("pthread_mutex_unlock", "__tls_get_addr", "_GLOBAL_OFFSET_TABLE_"),
    }
    sections = tool("llvm-readelf", "--sections", "--wide")
    assert ".text" in sections
    assert ".init_array" not in sections and ".ctors" not in sections
