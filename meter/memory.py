"""The caches of the boards' CPUs, and what their misses are reckoned to cost.

The model has the first two levels (three on the Raspberry Pi 5), least recently used, 64-byte lines, without
prefetching. Its cost is one of bandwidth: prefetchers hide the latency of the streams that CNNs read, so each line that
a level misses costs what the next level needs to deliver it, and nothing of that overlaps with the core's
own work. Read it as an upper bound for long streams, a lower one for scattered accesses.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from meter.counting import Block, Cache
from targets.errors import UserError


class Hierarchy(NamedTuple):
    """A core's caches and what a line costs that must come from beyond each of them.

    Attributes:
        board: whose they are.
        clock: GHz, at which the memory's share is reckoned in cycles.
        caches: from the first level outwards.
        line_cycles: cycles for a line that the level of that index missed and the next one has.
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


_HIERARCHIES = {
    # BCM2837: Cortex-A53 MPCore TRM (DDI 0500), 2.1: 32 KB, 4 ways; 512 KB of L2, 16 ways.
    "cortex-a53": Hierarchy(
        "Raspberry Pi 3",
        1.2,
        (Cache(32 << 10, 4), Cache(512 << 10, 16)),
        (8.0, 38.4),
    ),
    # BCM2711: Cortex-A72 MPCore TRM (100095), 2.1: 32 KB, 2 ways; 1 MB of L2, 16 ways.
    "cortex-a72": Hierarchy(
        "Raspberry Pi 4",
        1.5,
        (Cache(32 << 10, 2), Cache(1 << 20, 16)),
        (4.0, 24.0),
    ),
    # BCM2712: Cortex-A76 TRM (100798), A6.1 and A7.1: 64 KB, 4 ways; 512 KB of L2, 8 ways; 2 MB of shared L3.
    "cortex-a76": Hierarchy(
        "Raspberry Pi 5",
        2.4,
        (Cache(64 << 10, 4), Cache(512 << 10, 8), Cache(2 << 20, 16)),
        (2.0, 4.0, 17.0),
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
