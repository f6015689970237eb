"""The caches and the memory of boards, and what their misses are reckoned to cost.

A core's name does not say how fast its memory is: RK3588 reads 1.5 times what a Raspberry Pi 5 reads, with the same
Cortex-A76. So a hierarchy belongs to a core on a board; the first board named for a core is its default.

The model has the first two levels (three where the board has them), least recently used, 64-byte lines, without
prefetching; a store fetches its line as a load does, and writing back is free. Its cost is one of bandwidth: prefetchers
and several misses at once hide the latency of the streams that CNNs read, so each line that a level misses
costs what a board was measured to need for one in a stream of them, and nothing of that overlaps with the core's
own work. Read it as an upper bound for long streams, a lower one for scattered accesses, above all on Cortex-A53, whose
first level replaces at random and which waits for what it loads.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from netship.meter.counting import Block, Cache
from netship.targets.errors import UserError


class Hierarchy(NamedTuple):
    """A core's caches on a board, and what a line costs that must come from beyond each of them.

    Attributes:
        board: whose they are.
        clock: GHz, at which the memory's share is reckoned in cycles.
        caches: from the first level outwards.
        line_cycles: cycles for a line that the level of that index missed; one that comes from memory costs all of
            them.
    """

    board: str
    clock: float
    caches: tuple[Cache, ...]
    line_cycles: tuple[float, ...]

    @property
    def private(self) -> int:
        """How many levels a core has for itself; the last is all cores'."""
        return len(self.caches) - 1

    def cycles(self, blocks: Iterable[Block]) -> float:
        """Cycles that the misses of ``blocks`` cost."""
        return sum(
            misses * cycles
            for block in blocks
            for misses, cycles in zip(block.misses, self.line_cycles, strict=True)
        )


def _hierarchy(
    board: str,
    clock: float,
    caches: tuple[Cache, ...],
    nearer: tuple[float, ...],
    read: float,
) -> Hierarchy:
    """From what was measured with one core. No level is taken to be slower than a stream from memory.

    Args:
        nearer: nanoseconds for eight pointers at once, from each level beyond the first.
        read: GB a second from memory.
    """
    memory = 64 / read
    each = (*(min(nanoseconds / 8, memory) for nanoseconds in nearer), memory)
    steps = zip(each, (0.0, *each), strict=False)
    cycles = tuple(round(clock * (slower - faster), 2) for slower, faster in steps)
    return Hierarchy(board, clock, caches, cycles)


# What boards were measured to need, one core, is of T. Kaiser's sbc-bench (github.com/ThomasKaiser/sbc-bench, commit
# 53f7951; the files of results/ are named): from memory tinymembench's "NEON read" or "NEON LDP load"; from a cache ramlat's
# "8xPTR", eight chains of pointers at once, at a size that the level holds. Sizes of caches: the cores' manuals (A53
# MPCore TRM DDI 0500, A55 100442, A72 100095, A76 100798, A78 101430, each 2.1 or A6), and the makers' data sheets.
_A53 = (Cache(32 << 10, 4), Cache(512 << 10, 16))
_A72 = (Cache(32 << 10, 2), Cache(1 << 20, 16))
_A55_SHARED = (Cache(32 << 10, 4), Cache(512 << 10, 16))
_HIERARCHIES: dict[str, dict[str, Hierarchy]] = {
    "cortex-a53": {
        # BCM2837: 1isD.txt (3 B+), 4hOp.txt at 128 KB.
        "rpi3": _hierarchy("Raspberry Pi 3", 1.2, _A53, (72.54,), 2.0682),
        # 4Kau.txt (Orange Pi 4), 128 KB.
        "rk3399": _hierarchy("RK3399", 1.5, _A53, (50.39,), 2.6602),
        # 1Ga0KBn.txt (Rock64), 128 KB; its second level has 256 KB.
        "rk3328": _hierarchy(
            "RK3328", 1.3, (_A53[0], Cache(256 << 10, 16)), (50.42,), 3.7016
        ),
    },
    # RK3566 and RK3568 have a third level and no second, RK3588's small cores have both.
    "cortex-a55": {
        # 4KDv.txt (Orange Pi CM4), 256 KB.
        "rk3566": _hierarchy("RK3566", 1.8, _A55_SHARED, (63.10,), 6.2924),
        # 4L4u.txt (NanoPi R5S), 256 KB.
        "rk3568": _hierarchy("RK3568", 2.0, _A55_SHARED, (61.74,), 5.5393),
        # 4D0a.txt (Orange Pi 5), 64 KB and 1 MB.
        "rk3588": _hierarchy(
            "RK3588, small core",
            1.8,
            (Cache(32 << 10, 4), Cache(128 << 10, 4), Cache(3 << 20, 12)),
            (29.08, 53.10),
            7.1681,
        ),
    },
    "cortex-a72": {
        # BCM2711: 4pzj.txt, 128 KB.
        "rpi4": _hierarchy("Raspberry Pi 4", 1.5, _A72, (46.11,), 4.3716),
        # 4Kau.txt (Orange Pi 4), 128 KB.
        "rk3399": _hierarchy("RK3399", 1.8, _A72, (46.08,), 7.2862),
    },
    "cortex-a76": {
        # BCM2712: Au3jaA.txt, 128 KB and 1 MB. Half of the latter accesses the second level had: the third is not quicker.
        "rpi5": _hierarchy(
            "Raspberry Pi 5",
            2.4,
            (Cache(64 << 10, 4), Cache(512 << 10, 8), Cache(2 << 20, 16)),
            (12.84, 28.43),
            13.9762,
        ),
        # 4D0a.txt (Orange Pi 5), 128 KB and 1 MB.
        "rk3588": _hierarchy(
            "RK3588",
            2.4,
            (Cache(64 << 10, 4), Cache(512 << 10, 8), Cache(3 << 20, 12)),
            (12.71, 28.34),
            21.395,
        ),
    },
    # The second levels have 256 KB and the third 2 MB, by the sizes at which ramlat's times rise.
    "cortex-a78": {
        # 4Ebd.txt (Orin Nano), 128 KB and 1 MB; of AGX Orin there is no such figure.
        "orin": _hierarchy(
            "Jetson Orin Nano",
            1.5,
            (Cache(64 << 10, 4), Cache(256 << 10, 8), Cache(2 << 20, 16)),
            (20.05, 44.13),
            9.7829,
        ),
        # KBw_.txt (Radxa Dragon Q6A, the four middle cores), 128 KB and 1 MB.
        "qcs6490": _hierarchy(
            "QCS6490",
            2.4,
            (Cache(32 << 10, 4), Cache(256 << 10, 8), Cache(2 << 20, 16)),
            (12.80, 31.44),
            20.5244,
        ),
    },
    # 4zGI.txt (Ampere Altra, whose second level has 1 MB), 128 KB and 4 MB.
    "neoverse-n1": {
        "altra": _hierarchy(
            "Ampere Altra",
            2.8,
            (Cache(64 << 10, 4), Cache(1 << 20, 8), Cache(32 << 20, 16)),
            (10.85, 34.30),
            13.9085,
        )
    },
}


def boards(cpu: str) -> list[str]:
    """The boards whose memory is known with a core, its default first.

    Raises:
        UserError: there is none.
    """
    if cpu not in _HIERARCHIES:
        raise UserError(
            f"no cache model for {cpu!r}; there are models for {', '.join(_HIERARCHIES)}"
        )
    return list(_HIERARCHIES[cpu])


def hierarchy(cpu: str, board: str = "") -> Hierarchy:
    """The caches of a core on a board; without a board's name, on the default one.

    Raises:
        UserError: they are not known.
    """
    known = boards(cpu)
    if board and board not in known:
        raise UserError(
            f"--board {board}: no memory of it is known with a {cpu}; there are {', '.join(known)}"
        )
    return _HIERARCHIES[cpu][board or known[0]]
