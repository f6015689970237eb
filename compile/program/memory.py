"""One memory planner: tensors with lifetimes into one arena."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Buffer:
    """A tensor that lives in the arena from step ``first`` to step ``last``, both included."""

    name: str
    nbytes: int
    first: int
    last: int

    def overlaps(self, other: Buffer) -> bool:
        return self.first <= other.last and other.first <= self.last


@dataclass(frozen=True)
class Plan:
    """Where each buffer lies.

    Attributes:
        offsets: byte offset of each buffer, in the order they were given.
        nbytes: size of the arena.
        lower_bound: what is live at once at the worst step: no plan can need less.
    """

    buffers: tuple[Buffer, ...]
    offsets: tuple[int, ...]
    nbytes: int
    lower_bound: int


def plan(buffers: Sequence[Buffer], alignment: int) -> Plan:
    """Place buffers greedily, the largest first, each at the lowest offset where it fits.

    The greedy-by-size strategy of Pisarchyk and Lee (arXiv 2001.03288, section 5.2).
    """
    sizes = [_aligned(buffer.nbytes, alignment) for buffer in buffers]
    order = sorted(range(len(buffers)), key=lambda i: (-sizes[i], buffers[i].first, i))
    offsets: dict[int, int] = {}
    for index in order:
        taken = sorted(
            (offsets[other], offsets[other] + sizes[other])
            for other in offsets
            if buffers[index].overlaps(buffers[other])
        )
        offset = 0
        for start, end in taken:
            if offset + sizes[index] <= start:
                break
            offset = max(offset, end)
        offsets[index] = offset
    steps = {buffer.first for buffer in buffers}
    live = (
        sum(
            size
            for buffer, size in zip(buffers, sizes, strict=True)
            if buffer.first <= step <= buffer.last
        )
        for step in steps
    )
    return Plan(
        buffers=tuple(buffers),
        offsets=tuple(offsets[index] for index in range(len(buffers))),
        nbytes=max((offsets[i] + sizes[i] for i in offsets), default=0),
        lower_bound=max(live, default=0),
    )


def _aligned(size: int, alignment: int) -> int:
    return -(-size // alignment) * alignment
