"""The caches of the boards' CPUs, and what their misses are reckoned to cost.

The model has the first two levels (three on the Raspberry Pi 5), least recently used, 64-byte lines, without
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
    """A core's caches and what a line costs that must come from beyond each of them.

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

    def cycles(self, blocks: Iterable[Block]) -> float:
        """Cycles that the misses of ``blocks`` cost."""
        return sum(
            misses * cycles
            for block in blocks
            for misses, cycles in zip(block.misses, self.line_cycles, strict=True)
        )


# Nanoseconds a line, one core, of T. Kaiser's sbc-bench (github.com/ThomasKaiser/sbc-bench, commit 53f7951, file of
# results/ named below): from memory 64 bytes over tinymembench's "NEON read" or "NEON LDP load"; from a cache
# ramlat's "8xPTR", eight chains of pointers at once, over eight.
_PI3_MEMORY, _PI3_L2 = 64 / 2.0682, 72.54 / 8  # 1isD.txt (3 B+); 4hOp.txt, 128 KB
_PI4_MEMORY, _PI4_L2 = 64 / 4.3716, 46.11 / 8  # 4pzj.txt; 128 KB
_PI5_MEMORY, _PI5_L2 = 64 / 13.9762, 12.84 / 8  # Au3jaA.txt; 128 KB
# Half of these accesses the second level had: the third is not quicker.
_PI5_L3 = 28.43 / 8  # Au3jaA.txt, 1 MB


def _line_cycles(clock: float, *nanoseconds: float) -> tuple[float, ...]:
    """What each level adds to a line from the one before it, in cycles of a clock in GHz."""
    steps = zip(nanoseconds, (0.0, *nanoseconds), strict=False)
    return tuple(round(clock * (slower - faster), 2) for slower, faster in steps)


_HIERARCHIES = {
    # BCM2837: Cortex-A53 MPCore TRM (DDI 0500), 2.1: 32 KB, 4 ways; 512 KB of L2, 16 ways.
    "cortex-a53": Hierarchy(
        "Raspberry Pi 3",
        1.2,
        (Cache(32 << 10, 4), Cache(512 << 10, 16)),
        _line_cycles(1.2, _PI3_L2, _PI3_MEMORY),
    ),
    # BCM2711: Cortex-A72 MPCore TRM (100095), 2.1: 32 KB, 2 ways; 1 MB of L2, 16 ways.
    "cortex-a72": Hierarchy(
        "Raspberry Pi 4",
        1.5,
        (Cache(32 << 10, 2), Cache(1 << 20, 16)),
        _line_cycles(1.5, _PI4_L2, _PI4_MEMORY),
    ),
    # BCM2712: Cortex-A76 TRM (100798), A6.1 and A7.1: 64 KB, 4 ways; 512 KB of L2, 8 ways; 2 MB of shared L3.
    "cortex-a76": Hierarchy(
        "Raspberry Pi 5",
        2.4,
        (Cache(64 << 10, 4), Cache(512 << 10, 8), Cache(2 << 20, 16)),
        _line_cycles(2.4, _PI5_L2, _PI5_L3, _PI5_MEMORY),
    ),
}


def hierarchy(cpu: str) -> Hierarchy:
    """The caches of a CPU.

    Raises:
        UserError: they are not known.
    """
    if cpu not in _HIERARCHIES:
        raise UserError(
            f"no cache model for {cpu!r}; there are models for {', '.join(_HIERARCHIES)}"
        )
    return _HIERARCHIES[cpu]
