"""What several threads take: the slowest task of each parallel region, a barrier after it, and memory that all share.

The tasks were counted one after another (serial.c), each with the caches of its own core. A core's last level is shared:
what one task fetched, the next one finds. Tasks that run at the same time may also throw out each other's lines, which
is left out.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from netship.meter.counting import Block, Part, merged
from netship.meter.cycles import Costs, traces
from netship.meter.memory import Hierarchy

# Nanoseconds from the last task's end to the next code behind the region, and how many cores' streams a memory serves at
# the speed that one core was measured to get. Of the published times of several threads (bench/published.json) the half
# "fit" is nearest with 1.5 streams. It would choose 40 microseconds, by which the other half is further off than by 5.
BARRIER_NS = 5000.0
STREAMS = 1.5


class Critical(NamedTuple):
    """What an inference waits for.

    Attributes:
        blocks: outside of regions, and of each region's slowest task.
        regions: how many parallel regions there are.
        barriers: cycles of the core for them.
        saturated: further cycles in which the memory has not yet served all tasks of a region.
    """

    blocks: list[Block]
    regions: int
    barriers: float
    saturated: float


def critical(parts: Iterable[Part], costs: Costs, hierarchy: Hierarchy) -> Critical:
    """The slowest way through an inference."""
    chosen: list[Part] = []
    region: list[Part] = []
    regions, saturated = 0, 0.0
    for part in [*parts, Part(None, [])]:
        if part.thread is not None and not (region and part.thread == 0):
            region.append(part)
            continue
        if region:
            slowest, waits = _slowest(region, costs, hierarchy)
            chosen.append(slowest)
            regions += 1
            saturated += waits
        region = [part] if part.thread is not None else []
        if part.thread is None:
            chosen.append(part)
    barriers = regions * BARRIER_NS * hierarchy.clock
    return Critical(merged(chosen), regions, barriers, saturated)


def _slowest(
    region: list[Part], costs: Costs, hierarchy: Hierarchy
) -> tuple[Part, float]:
    """The task of a region that takes longest, and the cycles that it waits for a memory that serves the others too."""
    each = []
    for part in region:
        found = traces(part.blocks)
        core = sum(
            t.executions * c for t, c in zip(found, costs.of(found), strict=True)
        )
        each.append((core, hierarchy.cycles(part.blocks)))
    at = max(range(len(each)), key=lambda index: sum(each[index]))
    lines = sum(
        block.misses[-1] for part in region for block in part.blocks if block.misses
    )
    served = lines * sum(hierarchy.line_cycles) / STREAMS
    return region[at], max(0.0, served - each[at][1])
