"""The memory planner: buffers with lifetimes into one arena, in which an output may take its input's place."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from netship.bundle.manifest import MemoryPlan, PlannedBuffer
from netship.compile.program.program import Program


@dataclass(frozen=True)
class Buffer:
    """Memory that lives from call ``first`` to call ``last``, both included.

    Attributes:
        tensor: of the program; None of a call's scratch memory.
        inplace_of: the tensor whose memory it may share, at least ``inplace_distance`` bytes below it.
        room: ``nbytes``, rounded up to the alignment.
    """

    name: str
    nbytes: int
    first: int
    last: int
    tensor: int | None = None
    inplace_of: int | None = None
    inplace_distance: int = 0
    room: int = 0
    offset: int = 0

    @property
    def end(self) -> int:
        return self.offset + self.room


class Arena(NamedTuple):
    """The part of a plan that lies in one memory.

    Attributes:
        name: the memory's.
        begin: of the plan's addresses.
        nbytes: that the plan takes of it.
        size: that there are.
    """

    name: str
    begin: int
    nbytes: int
    size: int


@dataclass(frozen=True)
class Plan:
    """Where each buffer lies.

    Attributes:
        arenas: where it is split over several memories: each, one after the other.
        offsets: by a tensor that owns memory: where it begins.
        scratch: of each call: where its scratch memory begins.
        lower_bound: bytes that are live at once in the worst call: no plan can need less.
        peak: that call.
    """

    buffers: tuple[Buffer, ...]
    nbytes: int
    lower_bound: int
    peak: int
    offsets: Mapping[int, int]
    scratch: tuple[int, ...]
    arenas: tuple[Arena, ...] = ()

    def describe(self, program: Program) -> MemoryPlan:
        """As the manifest has it."""
        return MemoryPlan(
            arena_bytes=self.nbytes,
            lower_bound=self.lower_bound,
            outer_workspace_bytes=program.outer_bytes,
            inner_workspace_bytes=program.inner_bytes,
            buffers=tuple(
                PlannedBuffer.model_validate(each, from_attributes=True)
                for each in self.buffers
            ),
        )


_Order = Callable[[Buffer, Sequence[int]], tuple[int, ...]]
# Orders in which buffers are placed, by a buffer and the bytes that are live at once in each call. The first is the
# greedy-by-size strategy of Pisarchyk and Lee (arXiv 2001.03288, section 5.2); then those of the fullest calls first; then
# as they are made.
_ORDERS: tuple[_Order, ...] = (
    lambda b, needs: (-b.room, b.first),
    lambda b, needs: (-max(needs[b.first : b.last + 1]), -b.room, b.first),
    lambda b, needs: (b.first, -b.room),
)


def plan(program: Program, alignment: int, outside: Collection[int] = ()) -> Plan:
    """Place every tensor that is no constant, and the calls' scratch memory.

    Each buffer goes to the lowest place that its neighbours in time leave. The smallest of the arenas that the orders give
    is taken, the first of several.

    Args:
        outside: tensors whose memory is the caller's.
    """
    wanted = buffers(program, alignment, outside)
    needs = live_bytes(program, wanted)
    return planned(program, packed(wanted, needs), needs)


def live_bytes(program: Program, wanted: Sequence[Buffer]) -> list[int]:
    """Of each call the bytes that are live at once."""
    return [_need(index, wanted) for index in range(len(program.calls))]


def packed(wanted: Sequence[Buffer], needs: Sequence[int]) -> list[Buffer]:
    """``wanted`` with their places in one arena, by the best of the orders."""
    return min((_placed(wanted, order, needs) for order in _ORDERS), key=end_of)


def planned(
    program: Program,
    placed: Sequence[Buffer],
    needs: Sequence[int],
    arenas: tuple[Arena, ...] = (),
) -> Plan:
    """A plan of buffers that have their places."""
    offsets = {each.tensor: each.offset for each in placed if each.tensor is not None}
    scratch = {each.first: each.offset for each in placed if each.tensor is None}
    return Plan(
        buffers=tuple(placed),
        nbytes=end_of(placed),
        lower_bound=max(needs, default=0),
        peak=needs.index(max(needs)) if needs else 0,
        offsets=offsets,
        scratch=tuple(scratch.get(index, 0) for index in range(len(program.calls))),
        arenas=arenas,
    )


def buffers(
    program: Program, alignment: int, outside: Collection[int] = ()
) -> list[Buffer]:
    """The network's inputs, then of each call its scratch memory and what it makes."""
    spans = _spans(program)
    kept = {program.storage(tensor) for tensor in outside}
    found: list[Buffer] = []
    done = {i for i, each in enumerate(program.tensors) if each.weights is not None}
    done |= kept

    def add(tensor: int, source: int | None = None, distance: int = 0) -> None:
        owner = program.storage(tensor)
        if owner in done:
            return
        done.add(owner)
        what, first, last = program.tensors[owner], min(spans[owner]), max(spans[owner])
        found.append(
            Buffer(what.name, what.nbytes, first, last, owner, source, distance)
        )

    for tensor in program.inputs:
        add(tensor)
    for index, call in enumerate(program.calls):
        if call.scratch:
            name = f"scratch of {call.layer}"
            found.append(Buffer(name, call.scratch, index, index))
        if call.inplace is not None:
            source = program.storage(call.inputs[0])
            if source not in kept and max(spans[source]) == index:
                distance = aligned(inplace_distance(call.inplace), alignment)
                add(call.outputs[0], source, distance)
        for tensor in call.outputs:
            add(tensor)
    return [replace(each, room=aligned(each.nbytes, alignment)) for each in found]


def _spans(program: Program) -> dict[int, list[int]]:
    """By a tensor that owns memory: the calls that use it; of an input the first too, of an output the last."""
    last = len(program.calls) - 1
    uses = [
        *((tensor, 0) for tensor in program.inputs),
        *((each, i) for i, call in enumerate(program.calls) for each in call.arguments),
        *((tensor, last) for tensor in program.outputs),
    ]
    spans: dict[int, list[int]] = {}
    for tensor, call in uses:
        spans.setdefault(program.storage(tensor), []).append(call)
    return spans


def inplace_distance(pairs: Iterable[tuple[int, int]]) -> int:
    """How far below its input an output must begin, by `Call.inplace`."""
    return max(0, *(written - needed for written, needed in pairs))


def _placed(
    wanted: Sequence[Buffer], order: _Order, needs: Sequence[int]
) -> list[Buffer]:
    """``wanted`` with their places."""
    placed: dict[int, Buffer] = {}
    for index in sorted(range(len(wanted)), key=lambda i: order(wanted[i], needs)):
        placed[index] = place(wanted[index], placed.values())
    return [placed[index] for index in range(len(wanted))]


def end_of(placed: Iterable[Buffer]) -> int:
    """Bytes of the arena that holds buffers."""
    return max((each.end for each in placed), default=0)


def place(buffer: Buffer, placed: Iterable[Buffer]) -> Buffer:
    """At the lowest offset where it disturbs none of ``placed``."""
    near = [p for p in placed if p.first <= buffer.last and buffer.first <= p.last]
    candidates = {0} | {p.end for p in near}
    for other in near:
        if _is_inplace(buffer, other):
            candidates.add(other.offset - buffer.inplace_distance)
        if _is_inplace(other, buffer):
            candidates.add(other.offset + other.inplace_distance)
    for offset in sorted(c for c in candidates if c >= 0):
        at = replace(buffer, offset=offset)
        if all(_agree(at, other) for other in near):
            return at
    raise AssertionError("the end of all others always fits")


def _is_inplace(output: Buffer, source: Buffer) -> bool:
    return output.inplace_of is not None and output.inplace_of == source.tensor


def _agree(one: Buffer, other: Buffer) -> bool:
    if one.end <= other.offset or other.end <= one.offset:
        return True
    if _is_inplace(one, other):
        return one.offset + one.inplace_distance <= other.offset
    if _is_inplace(other, one):
        return other.offset + other.inplace_distance <= one.offset
    return False


def _need(call: int, wanted: Sequence[Buffer]) -> int:
    """Bytes live at once in a call; an output in its input's place counts only as far as it leads it."""
    live = [each for each in wanted if each.first <= call <= each.last]
    tensors = {each.tensor: each for each in live if each.tensor is not None}
    need = sum(each.room for each in live)
    for each in tensors.values():
        if each.inplace_of in tensors and each.first == call:
            source = tensors[each.inplace_of]
            need -= source.room + each.room
            behind = min(each.inplace_distance, each.room)
            need += max(source.room + behind, each.room)
    return need


def aligned(nbytes: int, alignment: int) -> int:
    return -(-nbytes // alignment) * alignment
