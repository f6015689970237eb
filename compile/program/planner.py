"""The memory planner: buffers with lifetimes into one arena, in which an output may take its input's place."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from compile.program.program import Call, Program


@dataclass(frozen=True)
class Buffer:
    """Memory that lives from call ``first`` to call ``last``, both included.

    Attributes:
        nbytes: without what rounds them up to the alignment.
        tensor: of the program; None of a call's scratch memory.
        inplace_of: the tensor whose memory it may share, at least ``inplace_distance`` bytes below it.
    """

    name: str
    nbytes: int
    first: int
    last: int
    tensor: int | None = None
    inplace_of: int | None = None
    inplace_distance: int = 0
    offset: int = 0

    @property
    def end(self) -> int:
        return self.offset + self.nbytes


@dataclass(frozen=True)
class Plan:
    """Where each buffer lies.

    Attributes:
        offsets: by a tensor's index: where its memory begins.
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


# Each an order in which buffers are placed, of a buffer and the bytes that are live at once in each call. The first is the
# greedy-by-size strategy of Pisarchyk and Lee (arXiv 2001.03288, section 5.2).
ALGORITHMS: dict[str, Callable[[Buffer, Sequence[int]], tuple[int, ...]]] = {
    "largest first": lambda b, needs: (-b.nbytes, b.first),
    "fullest calls first": lambda b, needs: (
        -max(needs[b.first : b.last + 1]),
        -b.nbytes,
        b.first,
    ),
    "as they are made": lambda b, needs: (b.first, -b.nbytes),
}


def plan(
    program: Program,
    alignment: int,
    outside: Collection[int] = (),
    algorithms: Iterable[str] = ALGORITHMS,
) -> Plan:
    """Place every tensor that is no constant, and the calls' scratch memory.

    Each buffer goes to the lowest place that its neighbours in time leave. The smallest of the arenas that the algorithms
    give is taken, the first of several.

    Args:
        outside: tensors whose memory is the caller's.
    """
    exact = buffers(program, alignment, outside)
    wanted = [replace(each, nbytes=_aligned(each.nbytes, alignment)) for each in exact]
    needs = [_need(index, wanted) for index in range(len(program.calls))]
    placed = min(
        (
            _placed(sorted(wanted, key=lambda b: ALGORITHMS[name](b, needs)))
            for name in algorithms
        ),
        key=lambda found: max((buffer.end for buffer in found), default=0),
    )
    tensors = {each.tensor: each for each in placed if each.tensor is not None}
    scratch = {each.first: each for each in placed if each.tensor is None}
    places = {tensor: each.offset for tensor, each in tensors.items()}
    return Plan(
        buffers=tuple(
            replace(
                each,
                offset=(
                    scratch[each.first] if each.tensor is None else tensors[each.tensor]
                ).offset,
            )
            for each in exact
        ),
        nbytes=max((buffer.end for buffer in placed), default=0),
        lower_bound=max(needs, default=0),
        peak=needs.index(max(needs)) if needs else 0,
        offsets=places
        | {
            alias: places[program.storage(alias)]
            for alias in program.aliases
            if program.storage(alias) in places
        },
        scratch=tuple(
            scratch[index].offset if index in scratch else 0
            for index in range(len(program.calls))
        ),
    )


def buffers(
    program: Program, alignment: int, outside: Collection[int] = ()
) -> list[Buffer]:
    """The network's inputs, then of each call its scratch memory and what it makes."""
    spans = _spans(program)
    end = len(program.calls) - 1
    for tensor in program.outputs:
        spans.setdefault(program.storage(tensor), []).append(end)
    found: dict[int, Buffer] = {}
    kept = {program.storage(tensor) for tensor in outside}

    def add(tensor: int, call: Call | None = None) -> None:
        owner = program.storage(tensor)
        if (
            owner in found
            or owner in kept
            or program.tensors[owner].weights is not None
        ):
            return
        what = program.tensors[owner]
        first, last = min(spans[owner]), max(spans[owner])
        buffer = Buffer(what.name, what.nbytes, first, last, owner)
        if (
            call is not None
            and call.inplace is not None
            and owner == program.storage(call.outputs[0])
        ):
            source = program.storage(call.inputs[0])
            if max(spans[source]) == first and source not in kept:
                distance = _aligned(inplace_distance(call.inplace), alignment)
                buffer = replace(buffer, inplace_of=source, inplace_distance=distance)
        found[owner] = buffer

    ordered: list[Buffer] = []
    for tensor in program.inputs:
        spans.setdefault(program.storage(tensor), []).append(0)
        add(tensor)
    ordered += found.values()
    for index, call in enumerate(program.calls):
        before = len(found)
        if call.scratch:
            name = f"scratch of {call.layer}"
            ordered.append(Buffer(name, call.scratch, index, index))
        for tensor in call.outputs:
            add(tensor, call)
        ordered += list(found.values())[before:]
    return ordered


def _spans(program: Program) -> dict[int, list[int]]:
    """By a tensor that owns memory: the calls that use it."""
    spans: dict[int, list[int]] = {}
    for index, call in enumerate(program.calls):
        for tensor in call.arguments:
            spans.setdefault(program.storage(tensor), []).append(index)
    return spans


def inplace_distance(pairs: Iterable[tuple[int, int]]) -> int:
    """How far below its input an output must begin, by `Call.inplace`."""
    return max(0, *(written - needed for written, needed in pairs))


def _placed(ordered: Sequence[Buffer]) -> list[Buffer]:
    placed: list[Buffer] = []
    for buffer in ordered:
        placed.append(_place(buffer, placed))
    return placed


def _place(buffer: Buffer, placed: Sequence[Buffer]) -> Buffer:
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
    live = {
        b.tensor: b
        for b in wanted
        if b.first <= call <= b.last and b.tensor is not None
    }
    need = sum(b.nbytes for b in wanted if b.first <= call <= b.last)
    for b in live.values():
        if b.inplace_of in live and b.first == call:
            source = live[b.inplace_of]
            need -= source.nbytes + b.nbytes
            need += max(source.nbytes + b.inplace_distance, b.nbytes)
    return need


def _aligned(nbytes: int, alignment: int) -> int:
    return -(-nbytes // alignment) * alignment
