"""The files in which a board's Linux describes its CPU, for runtimes that read them: /proc/cpuinfo and sysfs.

Emulated processes would otherwise read this machine's, and crash or choose kernels for it.
One core is described: the runtimes run on one thread.
"""

from __future__ import annotations

import hashlib
import tempfile
from pathlib import Path
from typing import NamedTuple

from netship.meter.memory import Hierarchy, hierarchy
from netship.targets.errors import UserError


class Board(NamedTuple):
    """A board's core as Linux describes it.

    Attributes:
        midr: MIDR_EL1.
        features: the line of /proc/cpuinfo.
    """

    midr: int
    features: str


_V8_0 = "fp asimd evtstrm crc32 cpuid"
_V8_2 = f"{_V8_0} atomics fphp asimdhp asimdrdm lrcpc dcpop asimddp"

# MIDR_EL1: Arm's technical reference manuals of the cores (DDI 0500, 100095, 100798, 100442, 101430, 100616), with the
# revision that the SoC has.
BOARDS = {
    "cortex-a53": Board(0x410FD034, _V8_0),
    "cortex-a72": Board(0x410FD083, _V8_0),
    "cortex-a76": Board(0x414FD0B1, _V8_2),
    "cortex-a55": Board(0x412FD050, _V8_2),
    "cortex-a78": Board(0x411FD410, _V8_2),
    "neoverse-n1": Board(0x413FD0C1, _V8_2),
}
_LINE = 64
# Cores of one kind, of boards that have fewer than the four threads of a core's other boards.
_FEWER = {("cortex-a72", "rk3399"): 2}


def check_threads(cpu: str, board: str, threads: int) -> None:
    """Raises: UserError for more threads than the board has cores of this kind."""
    cores = _FEWER.get((cpu, board), threads)
    if threads > cores:
        raise UserError(
            f"--threads {threads}: {board} has {cores} {cpu}; give {cores} at most"
        )


def board(cpu: str) -> Board:
    """Raises: UserError for a CPU without a description."""
    if cpu not in BOARDS:
        raise UserError(
            f"--cpu {cpu}: no board with it is described; known: {', '.join(BOARDS)}"
        )
    return BOARDS[cpu]


def root(sysroot: Path, cpu: str, folder: Path, board_name: str = "") -> Path:
    """A root for QEMU's ``-L``: links to the arm64 system, and the board's own proc and sys.

    Args:
        board_name: whose caches; the core's default board where empty.
        folder: where roots are kept; an existing one is used again.
    """
    described = board(cpu)
    files = _files(described, hierarchy(cpu, board_name))
    key = hashlib.sha256(repr((str(sysroot), files)).encode()).hexdigest()
    path = folder / f"{cpu}-{key[:16]}"
    if path.is_dir():
        return path
    folder.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=".board-", dir=folder))
    work.chmod(0o755)
    for entry in sysroot.iterdir():
        if entry.name not in ("proc", "sys"):
            (work / entry.name).symlink_to(entry)
    for name, text in files.items():
        file = work / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{text}\n")
    try:
        work.rename(path)
    except OSError:
        # Another process was first, with the same root.
        if not path.is_dir():
            raise
    return path


def _files(board: Board, memory: Hierarchy) -> dict[str, str]:
    midr = board.midr
    cpuinfo = {
        "processor": "0",
        "BogoMIPS": "108.00",
        "Features": board.features,
        "CPU implementer": f"{midr >> 24:#x}",
        "CPU architecture": "8",
        "CPU variant": f"{midr >> 20 & 0xF:#x}",
        "CPU part": f"{midr >> 4 & 0xFFF:#x}",
        "CPU revision": f"{midr & 0xF}",
    }
    lines = [f"{name}\t: {value}" for name, value in cpuinfo.items()]
    cpus, cpu = "sys/devices/system/cpu", "sys/devices/system/cpu/cpu0"
    files = {
        "proc/cpuinfo": "\n".join([*lines, ""]),
        f"{cpu}/regs/identification/midr_el1": f"{midr:#018x}",
        f"{cpu}/cpufreq/cpuinfo_max_freq": str(int(memory.clock * 1e6)),
        f"{cpu}/cpufreq/cpuinfo_min_freq": str(int(memory.clock * 1e6)),
    }
    cpu_names = ("possible", "present", "online", "kernel_max")
    files |= {f"{cpus}/{name}": "0" for name in cpu_names}
    lists = ("core_id", "physical_package_id", "core_cpus_list", "package_cpus_list")
    files |= {f"{cpu}/topology/{name}": "0" for name in lists}
    for name in ("core_siblings", "thread_siblings"):
        files |= {f"{cpu}/topology/{name}": "1", f"{cpu}/topology/{name}_list": "0"}
    for number, cache in enumerate(memory.caches):
        index = f"{cpu}/cache/index{number}"
        files |= {
            f"{index}/level": str(number + 1),
            f"{index}/type": "Unified" if number else "Data",
            f"{index}/size": f"{cache.bytes >> 10}K",
            f"{index}/ways_of_associativity": str(cache.ways),
            f"{index}/number_of_sets": str(cache.sets),
            f"{index}/coherency_line_size": str(_LINE),
            f"{index}/shared_cpu_list": "0",
            f"{index}/shared_cpu_map": "1",
        }
    return files
