"""Proof, in every build, that a memory plan is right: no two tensors that live at once share a byte.

It reads the program's calls alone, and nothing of what the planner found out about them.
"""

from __future__ import annotations

from collections.abc import Collection
from itertools import combinations
from typing import NamedTuple

from netship.bundle.executor_graph import ExecutorGraph
from netship.compile.program.planner import Plan
from netship.compile.program.program import Call, Program


class _Range(NamedTuple):
    name: int | str
    begin: int
    end: int


def verify(program: Program, plan: Plan, outside: Collection[int] = ()) -> None:
    """Follow the program call by call.

    Args:
        outside: tensors whose memory is the caller's.

    Raises:
        AssertionError: two live tensors overlap, or one lies outside the arena.
    """
    kept = {program.storage(tensor) for tensor in outside}
    lives = _lives(program)
    for index, call in enumerate(program.calls):
        live = {
            owner: _range(program, plan, owner)
            for owner, (made, needed) in lives.items()
            if made <= index <= needed and owner not in kept
        }
        ranges = list(live.values())
        if call.scratch:
            begin = plan.scratch[index]
            ranges.append(
                _Range(f"scratch of {call.layer}", begin, begin + call.scratch)
            )
        inside = all(0 <= each.begin and each.end <= plan.nbytes for each in ranges)
        assert inside, f"{call.layer}: {ranges} in an arena of {plan.nbytes} bytes"
        source, output = (
            live.get(program.storage(each[0])) for each in (call.inputs, call.outputs)
        )
        for one, other in combinations(ranges, 2):
            if one.end <= other.begin or other.end <= one.begin:
                continue
            dies = lives[program.storage(call.inputs[0])][1] == index
            allowed = (
                call.inplace is not None and dies and {one, other} == {source, output}
            )
            assert allowed and source and output, (
                f"{call.layer}: {one} and {other} overlap"
            )
            _check_inplace(call, output, source)


def _range(program: Program, plan: Plan, owner: int) -> _Range:
    begin = plan.offsets[owner]
    return _Range(owner, begin, begin + program.tensors[owner].nbytes)


def _lives(program: Program) -> dict[int, tuple[int, int]]:
    """By a tensor that owns memory and is no constant: the call that makes it, and the last that needs it."""
    made = {program.storage(tensor): 0 for tensor in program.inputs}
    needed = dict.fromkeys(made, 0)
    for index, call in enumerate(program.calls):
        for tensor in call.outputs:
            made.setdefault(program.storage(tensor), index)
            needed[program.storage(tensor)] = index
        for tensor in call.inputs:
            needed[program.storage(tensor)] = index
    needed |= {
        program.storage(tensor): len(program.calls) for tensor in program.outputs
    }
    return {owner: (made[owner], needed[owner]) for owner in made}


def _check_inplace(call: Call, output: _Range, source: _Range) -> None:
    """What is written never reaches what of the input is still needed."""
    for written, needed in call.inplace or ():
        end = min(output.begin + written, output.end)
        assert needed >= source.end - source.begin or end <= source.begin + needed, (
            f"{call.layer}: byte {written} of {output} covers byte {needed} of {source}"
        )


def verify_storage(graph: ExecutorGraph) -> None:
    """The same for the plan of TVM's graph executor, in which tensors share whole pieces of memory.

    Raises:
        AssertionError: two tensors that live at once share one.
    """
    entries = graph.entries
    last = {index: len(graph.calls) for index in graph.outputs}
    for number, call in enumerate(graph.calls):
        for index in call.inputs:
            last[index] = max(last.get(index, 0), number)
    holders: dict[int, set[int]] = {}
    for index in (*graph.inputs, *graph.parameters):
        holders.setdefault(entries[index].storage, set()).add(index)
    fixed = set(graph.parameters)
    # Of what a reshape gives: what it is another name of.
    roots: dict[int, int] = {}
    for number, call in enumerate(graph.calls):
        for index in call.outputs:
            # A reshape, which has no kernel, is its input by another name.
            if not call.kernel:
                roots[index] = roots.get(call.inputs[0], call.inputs[0])
            own = roots.get(index, index)
            living = {
                each
                for each in holders.setdefault(entries[index].storage, set())
                if roots.get(each, each) != own
                and (each in fixed or last.get(each, -1) >= number)
            }
            assert not living, (
                f"{entries[index]} overwrites {[entries[each] for each in living]}"
            )
            holders[entries[index].storage].add(index)
