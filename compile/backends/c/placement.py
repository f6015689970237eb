"""Activations over several memories: what is used most for its size lies where an access costs least.

A tensor or a step's scratch memory lies in one memory. A step reads its input once, and writes its output once; a
convolution that is no 1×1 reads what its outputs look at, and the ring of a depthwise convolution is read for each of
its rows. What is read again in between is in the cache. So a tensor costs the bytes that move, times the cycles that
its memory makes a byte of a stream wait (devices.microcontroller.regions). All this is a model: no part was measured.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from netship.bundle.manifest import FirmwareArena
from netship.compile.backends.c.arrange import Arranged
from netship.compile.backends.c.scratch import ALIGNMENT
from netship.compile.backends.c.steps import FusedBlock, FusedBlocks, Step, direct
from netship.compile.ir.operators import Convolution
from netship.compile.program import verifier
from netship.compile.program.planner import (
    Arena,
    Buffer,
    Plan,
    aligned,
    buffers,
    end_of,
    live_bytes,
    packed,
    place,
    planned,
)
from netship.devices.microcontroller.regions import Region, listed
from netship.targets.errors import UserError
from netship.targets.escapes import shown

_Key = tuple[int | None, int]
_Moved = Mapping[_Key, float]
_Split = list[list[Buffer]]


def split(arranged: Arranged, regions: Sequence[Region], cpu: str) -> Arranged:
    """The same steps with a plan whose buffers lie in ``regions``.

    Raises:
        UserError: they are too small; by how much, and for which step.
    """
    ranked = sorted((x for x in regions if x.is_data), key=lambda x: x.cycles(cpu))
    program = arranged.program
    wanted = buffers(program, ALIGNMENT, program.outputs)
    needs = live_bytes(program, wanted)
    moved = _moved(arranged)
    cost = [region.cycles(cpu) for region in ranked]
    tried = [_greedy(wanted, order, ranked) for order in _orders(moved, needs)]
    whole = packed(wanted, needs)
    tried += [
        [whole if each is region else [] for each in ranked]
        for region in ranked
        if end_of(whole) <= region.size
    ]
    found = [_improved(each, ranked, needs, moved) for each in tried if each]
    if not found:
        raise _too_small(arranged, ranked, wanted, needs)
    best = min(found, key=lambda each: _cost(each, cost, moved))
    plan = _joined(arranged, ranked, best, needs)
    verifier.verify(program, plan, program.outputs)
    return replace(arranged, plan=plan)


def arenas(
    arranged: Arranged, cpu: str, regions: Sequence[Region]
) -> tuple[FirmwareArena, ...]:
    """For the manifest: each memory's part of the plan, and what it makes the core wait."""
    moved, known = _moved(arranged), {each.name: each for each in regions}
    found = []
    for arena in arranged.plan.arenas:
        inside = [x for x in arranged.plan.buffers if _lies_in(x, arena)]
        total = sum(moved[_key(each)] for each in inside)
        cycles = round(total * known[arena.name].cycles(cpu))
        found.append(
            FirmwareArena(**arena._asdict(), moved=round(total), cycles=cycles)
        )
    return tuple(found)


def weights_in(
    nbytes: int, largest: tuple[str, int], regions: Sequence[Region], quantised: bool
) -> str:
    """The memory for the weights: internal flash, or external where they are more; empty where no flash is given.

    Args:
        largest: the layer with the most of them, and its bytes.
        quantised: int8 is no advice.

    Raises:
        UserError: they are more than each of them.
    """
    flashes = [each for each in regions if not each.is_data]
    for region in sorted(flashes, key=lambda each: each.is_external_flash):
        if nbytes <= region.size:
            return region.name
    if not flashes:
        return ""
    most = max(flashes, key=lambda each: each.size)
    name, its_bytes = largest
    int8 = "" if quantised else " --quantize int8,"
    raise UserError(
        f"memory of {listed(flashes)} bytes: the weights take {nbytes:,} bytes, {nbytes - most.size:,} more than {most.name} has; most are of "
        f"{shown(name)!r} ({its_bytes:,}): choose a smaller width,{int8} or add memory such as qspi=16M"
    )


def _key(buffer: Buffer) -> _Key:
    return buffer.tensor, buffer.first if buffer.tensor is None else -1


def _lies_in(buffer: Buffer, arena: Arena) -> bool:
    return arena.begin <= buffer.offset < arena.begin + arena.nbytes


def _moved(arranged: Arranged) -> _Moved:
    """By a buffer: the bytes that all steps read and write of it."""
    moved: dict[_Key, float] = {}
    for index, (step, call) in enumerate(
        zip(arranged.steps, arranged.program.calls, strict=True)
    ):
        for number, tensor in enumerate(call.arguments):
            is_first = number == 0
            key = (arranged.program.storage(tensor), -1)
            times = _reads(step) if is_first else 1.0
            nbytes = arranged.program.tensors[tensor].nbytes
            moved[key] = moved.get(key, 0.0) + times * nbytes
        moved[None, index] = _ring_bytes(step) or 2.0 * call.scratch
    return moved


def _reads(step: Step) -> float:
    """How often a step reads each byte of its first input."""
    if not isinstance(step, FusedBlock | FusedBlocks):
        return 1.0
    first = step.blocks[0]
    again = float(any(block.residual is not None for block in step.blocks))
    if first.expand is not None and not direct(first.expand):
        return _overlap(first.expand) + again
    return 1.0 + again


def _overlap(convolution: Convolution) -> float:
    (height, width), (down, across) = convolution.kernel, convolution.strides
    return max(1.0, height / down) * max(1.0, width / across)


def _ring_bytes(step: Step) -> float:
    """What moves through the scratch memory of blocks: each row of a ring is written once, and read for each row of the kernel."""
    if not isinstance(step, FusedBlock | FusedBlocks):
        return 0.0
    total = 0.0
    for block in step.blocks:
        depthwise = block.depthwise
        if depthwise is None:
            continue
        rows = max(1.0, depthwise.kernel[0] / depthwise.strides[0])
        total += depthwise.input.nbytes * (1.0 + rows)
        total += 2.0 * depthwise.output.nbytes * (block.project is not None)
    return total


def _orders(
    moved: _Moved, needs: Sequence[int]
) -> Sequence[Callable[[Buffer], tuple[float, ...]]]:
    """Orders in which buffers choose their memory, the most important first."""
    return (
        lambda b: (-moved[_key(b)] / b.room, b.first),
        lambda b: (-moved[_key(b)], b.first),
        lambda b: (-b.room, b.first),
        lambda b: (-max(needs[b.first : b.last + 1]), -b.room),
    )


def _greedy(
    wanted: Sequence[Buffer],
    order: Callable[[Buffer], tuple[float, ...]],
    ranked: Sequence[Region],
) -> _Split | None:
    """Each buffer into the first memory with room for it; None where one has none."""
    inside: _Split = [[] for _ in ranked]
    for buffer in sorted(wanted, key=order):
        for region, others in zip(ranked, inside, strict=True):
            at = place(buffer, others)
            if at.end <= region.size:
                others.append(at)
                break
        else:
            return None
    return inside


def _improved(
    inside: _Split, ranked: Sequence[Region], needs: Sequence[int], moved: _Moved
) -> _Split:
    """Buffers move to a faster memory where the best packing of what lies there leaves room, the most used first."""
    inside = [
        packed(each, needs) if end_of(packed(each, needs)) <= r.size else each
        for each, r in zip(inside, ranked, strict=True)
    ]
    for slow in range(1, len(ranked)):
        for buffer in sorted(inside[slow], key=lambda each: -moved[_key(each)]):
            for fast in range(slow):
                tried = packed([*inside[fast], buffer], needs)
                if end_of(tried) <= ranked[fast].size:
                    inside[fast] = tried
                    inside[slow] = [x for x in inside[slow] if _key(x) != _key(buffer)]
                    break
    return inside


def _cost(inside: _Split, cost: Sequence[float], moved: _Moved) -> tuple[float, int]:
    """Cycles of waiting; then bytes."""
    cycles = sum(
        each * moved[_key(buffer)]
        for each, some in zip(cost, inside, strict=True)
        for buffer in some
    )
    return cycles, sum(map(end_of, inside))


def _joined(
    arranged: Arranged, ranked: Sequence[Region], inside: _Split, needs: Sequence[int]
) -> Plan:
    """One plan whose addresses have the memories one after the other."""
    begin, placed, found = 0, [], []
    for region, some in zip(ranked, inside, strict=True):
        if not some:
            continue
        placed += [replace(each, offset=begin + each.offset) for each in some]
        found.append(Arena(region.name, begin, end_of(some), region.size))
        begin += aligned(end_of(some), ALIGNMENT)
    placed.sort(key=lambda each: (each.first, each.tensor is not None, each.offset))
    return planned(arranged.program, placed, needs, tuple(found))


def _too_small(
    arranged: Arranged,
    ranked: Sequence[Region],
    wanted: Sequence[Buffer],
    needs: Sequence[int],
) -> UserError:
    total, largest = (
        sum(each.size for each in ranked),
        max(ranked, key=lambda each: each.size),
    )
    peak = needs.index(max(needs))
    int8 = "" if arranged.quantised else " --quantize int8,"
    advice = (
        f"choose a smaller width or resolution,{int8} or add memory such as sdram=8M"
    )
    given = f"memory of {listed(ranked)} bytes"
    if needs[peak] > total:
        return UserError(
            f"{given}: step {shown(arranged.steps[peak].name)!r} has {needs[peak]:,} bytes live at once, "
            f"{needs[peak] - total:,} too many: {advice}"
        )
    most = max(wanted, key=lambda each: each.room)
    if most.room > largest.size:
        return UserError(
            f"{given}: {shown(most.name)!r} takes {most.room:,} bytes in one piece, {most.room - largest.size:,} more than "
            f"{largest.name} has: {advice}"
        )
    over = arranged.plan.nbytes - total
    more = f"one arena takes {arranged.plan.nbytes:,}" + (
        f", {over:,} too many" if over > 0 else ""
    )
    return UserError(
        f"{given}: no split was found; {more}; the peak is {shown(arranged.steps[peak].name)!r} with {needs[peak]:,}: {advice}"
    )
