"""One arena for a network's steps, in which an output may follow its input through the same bytes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from compile.ir.graph import Network
from compile.passes.steps import Step, aligned, chained, lag, scratch
from targets.errors import UserError


@dataclass(frozen=True)
class Placed:
    """A buffer in the arena, live from step ``first`` to step ``last``, both included.

    Attributes:
        over: the tensor whose bytes it takes row by row, at least ``lag`` bytes below it.
    """

    name: str
    nbytes: int
    first: int
    last: int
    over: str = ""
    lag: int = 0
    offset: int = 0

    @property
    def end(self) -> int:
        return self.offset + self.nbytes


@dataclass(frozen=True)
class Arena:
    """Where everything lies. The network's output is the caller's and not here.

    Attributes:
        scratch: offset of each step's scratch memory.
        lower_bound: what is live at once at the worst step: no placement can need less.
        peak: that step's index.
    """

    buffers: tuple[Placed, ...]
    scratch: tuple[int, ...]
    nbytes: int
    lower_bound: int
    peak: int

    def offset(self, tensor: str) -> int:
        return next(b.offset for b in self.buffers if b.name == tensor)


SCRATCH = "scratch of "


def plan(network: Network, steps: Sequence[Step]) -> Arena:
    """Place the input, what the steps hand on and their scratch memory.

    Greedy, each at the lowest place that its neighbours in time leave, in three orders: the largest
    first, what lives in the fullest steps first, and as they are made. The best of them is taken.
    """
    wanted = _buffers(network, steps)
    needs = [_need(index, wanted) for index in range(len(steps))]
    orders: tuple[Callable[[Placed], tuple[int, ...]], ...] = (
        lambda b: (-b.nbytes, b.first),
        lambda b: (-max(needs[b.first : b.last + 1]), -b.nbytes, b.first),
        lambda b: (b.first, -b.nbytes),
    )
    placed = min(
        (_placed(sorted(wanted, key=order)) for order in orders),
        key=lambda buffers: max(buffer.end for buffer in buffers),
    )
    by_name = {buffer.name: buffer for buffer in placed}
    return Arena(
        buffers=tuple(by_name[buffer.name] for buffer in wanted),
        scratch=tuple(
            by_name[SCRATCH + step.name].offset if SCRATCH + step.name in by_name else 0
            for step in steps
        ),
        nbytes=max(buffer.end for buffer in placed),
        lower_bound=max(needs),
        peak=needs.index(max(needs)),
    )


def arrange(network: Network, steps: Sequence[Step]) -> tuple[tuple[Step, ...], Arena]:
    """Chain blocks around the peak as long as the arena gets smaller by it; → the steps and their plan."""
    best, arena = tuple(steps), plan(network, steps)
    while True:
        tried = (chained(best, index) for index in (arena.peak - 1, arena.peak))
        found = [(each, plan(network, each)) for each in tried if each is not None]
        smaller = [pair for pair in found if pair[1].nbytes < arena.nbytes]
        if not smaller:
            return best, arena
        best, arena = min(smaller, key=lambda pair: pair[1].nbytes)


def _buffers(network: Network, steps: Sequence[Step]) -> list[Placed]:
    last: dict[str, int] = {}
    for index, step in enumerate(steps):
        for tensor in step.inputs:
            last[tensor.name] = index
    source = network.input
    buffers = [Placed(source.name, aligned(source.nbytes), 0, last[source.name])]
    for index, step in enumerate(steps):
        need = scratch(step).nbytes
        if need:
            buffers.append(Placed(SCRATCH + step.name, need, index, index))
        output = step.output
        if output.name == network.output.name:
            continue
        below = lag(step)
        over = step.inputs[0].name
        in_place = below is not None and last[over] == index
        buffers.append(
            Placed(
                output.name,
                aligned(output.nbytes),
                index,
                last.get(output.name, index),
                over if in_place else "",
                below if in_place and below is not None else 0,
            )
        )
    return buffers


def _placed(ordered: Sequence[Placed]) -> list[Placed]:
    placed: list[Placed] = []
    for buffer in ordered:
        placed.append(_place(buffer, placed))
    return placed


def _place(buffer: Placed, placed: Sequence[Placed]) -> Placed:
    """At the lowest offset where it disturbs none of ``placed``."""
    near = [p for p in placed if p.first <= buffer.last and buffer.first <= p.last]
    candidates = {0} | {p.end for p in near}
    for other in near:
        if buffer.over == other.name:
            candidates.add(other.offset - buffer.lag)
        if other.over == buffer.name:
            candidates.add(other.offset + other.lag)
    for offset in sorted(c for c in candidates if c >= 0):
        at = _at(buffer, offset)
        if all(_agree(at, other) for other in near):
            return at
    raise AssertionError("the end of all others always fits")


def _at(buffer: Placed, offset: int) -> Placed:
    return Placed(
        buffer.name,
        buffer.nbytes,
        buffer.first,
        buffer.last,
        buffer.over,
        buffer.lag,
        offset,
    )


def _agree(one: Placed, other: Placed) -> bool:
    if one.end <= other.offset or other.end <= one.offset:
        return True
    if one.over == other.name:
        return one.offset + one.lag <= other.offset
    if other.over == one.name:
        return other.offset + other.lag <= one.offset
    return False


def _need(step: int, buffers: Sequence[Placed]) -> int:
    """Bytes live at once in ``step``; an output over its input counts only as far as it leads it."""
    live = {b.name: b for b in buffers if b.first <= step <= b.last}
    need = sum(b.nbytes for b in live.values())
    for b in live.values():
        if b.over in live and b.first == step:
            source = live[b.over]
            need -= source.nbytes + b.nbytes
            need += max(source.nbytes + b.lag, b.nbytes)
    return need


def check_limit(arena: Arena, steps: Sequence[Step], limit: int | None) -> None:
    """Refuse an arena larger than the user's ``--arena-limit``.

    Raises:
        UserError: it is larger: by how much, and which step is the peak.
    """
    if limit is None or arena.nbytes <= limit:
        return
    step = steps[arena.peak]
    raise UserError(
        f"--arena-limit {limit:,} bytes: the arena takes {arena.nbytes:,}, {arena.nbytes - limit:,} too "
        f"many; the peak is {step.name!r} ({arena.lower_bound:,} live at once): "
        "choose a smaller width or resolution"
    )
