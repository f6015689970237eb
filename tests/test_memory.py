"""Memory: no two live tensors share a byte, arenas stay near the lower bound, and a wrong plan is noticed."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import combinations

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from netship.bundle.executor_graph import parse
from netship.compile.program.planner import Plan, plan
from netship.compile.program.program import Call, Program, Tensor
from netship.compile.program.verifier import verify, verify_storage


def tensor(name: str, nbytes: int) -> Tensor:
    return Tensor(name, (nbytes,), "uint8")


@st.composite
def programs(draw: st.DrawFn) -> Program:
    """Calls of one or two inputs, some with scratch memory, some that may write over their first input."""
    tensors = [tensor("input", draw(st.integers(1, 5000)))]
    calls = []
    aliases = {}
    for index in range(draw(st.integers(1, 12))):
        count = draw(st.integers(1, 2))
        numbers = st.integers(0, len(tensors) - 1)
        inputs = tuple(draw(numbers) for _ in range(count))
        tensors.append(tensor(f"t{index}", draw(st.integers(1, 5000))))
        source, made = tensors[inputs[0]].nbytes, tensors[-1].nbytes
        pairs = ((draw(st.integers(0, made)), 0), (made, draw(st.integers(0, source))))
        calls.append(
            Call(
                kernel="k",
                layer=f"layer{index}",
                operators=(),
                inputs=inputs,
                outputs=(len(tensors) - 1,),
                scratch=draw(st.sampled_from([0, 0, 100])),
                inplace=draw(st.sampled_from([None, pairs])),
            )
        )
        if draw(st.booleans()):
            aliases[len(tensors)] = len(tensors) - 1
            tensors.append(replace(tensors[-1], name=f"view{index}"))
    outputs = (len(tensors) - 1,)
    return Program(tuple(tensors), tuple(calls), (0,), outputs, aliases)


def owners_alive(program: Program, index: int) -> set[int]:
    """By hand: what is made by then, and read then or later."""
    made = {program.storage(0)}
    for call in program.calls[: index + 1]:
        made |= {program.storage(each) for each in call.outputs}
    read = {program.storage(each) for each in program.outputs}
    for call in program.calls[index:]:
        read |= {program.storage(each) for each in call.inputs}
    read |= {program.storage(each) for each in program.calls[index].outputs}
    return (made & read) | ({program.storage(0)} if index == 0 else set())


@given(programs(), st.sampled_from([1, 8, 64]))
def test_live_tensors_never_overlap(program: Program, alignment: int) -> None:
    planned = plan(program, alignment)
    assert all(each.offset % alignment == 0 for each in planned.buffers)
    assert planned.lower_bound <= planned.nbytes
    for index, call in enumerate(program.calls):
        ranges = {
            owner: (
                planned.offsets[owner],
                planned.offsets[owner] + program.tensors[owner].nbytes,
            )
            for owner in owners_alive(program, index)
        }
        assert all(end <= planned.nbytes for _, end in ranges.values())
        for one, other in combinations(ranges, 2):
            a, b = ranges[one], ranges[other]
            if a[1] > b[0] and b[1] > a[0]:
                source, output = (
                    program.storage(call.inputs[0]),
                    program.storage(call.outputs[0]),
                )
                assert {one, other} == {source, output} and call.inplace
                for written, needed in call.inplace:
                    begin = ranges[output][0]
                    assert begin + written <= ranges[source][0] + needed or written == 0
    verify(program, planned)


@given(programs(), st.data())
def test_a_plan_that_puts_a_live_tensor_on_another_is_noticed(
    program: Program, data: st.DataObject
) -> None:
    program = replace(
        program, calls=tuple(replace(each, inplace=None) for each in program.calls)
    )
    planned = plan(program, 8)
    index = data.draw(st.integers(0, len(program.calls) - 1))
    alive = sorted(owners_alive(program, index))
    assume(len(alive) > 1)
    moved, onto = data.draw(st.permutations(alive))[:2]
    offsets = {**planned.offsets, moved: planned.offsets[onto]}
    with pytest.raises(AssertionError, match="overlap"):
        verify(program, replace(planned, offsets=offsets, nbytes=planned.nbytes + 5000))


def test_what_is_written_in_place_must_not_cover_what_is_needed() -> None:
    calls = (
        Call("k", "first", (), (0,), (1,), inplace=((100, 40), (200, 100))),
        Call("k", "last", (), (1,), (2,)),
    )
    tensors = tuple(
        tensor(name, size) for name, size in (("x", 100), ("y", 200), ("z", 1))
    )
    program = Program(tensors, calls, (0,), (2,), {})
    planned = plan(program, 4)
    assert planned.offsets[0] - planned.offsets[1] >= 60
    verify(program, planned)
    offsets = {**planned.offsets, 1: planned.offsets[0] - 56}
    wrong = replace(planned, offsets=offsets, nbytes=planned.nbytes + 100)
    with pytest.raises(AssertionError, match="first: byte 100 of .* covers byte 40"):
        verify(program, wrong)


def test_an_arena_that_is_too_small_is_noticed() -> None:
    program = Program(
        (tensor("x", 8), tensor("y", 8)),
        (Call("k", "only", (), (0,), (1,)),),
        (0,),
        (1,),
        {},
    )
    planned = plan(program, 8)
    with pytest.raises(AssertionError, match="only: .* in an arena of 15 bytes"):
        verify(program, replace(planned, nbytes=15))


def test_a_chain_needs_its_two_largest_neighbours() -> None:
    sizes = [100, 400, 300, 50]
    tensors = tuple(tensor(str(i), size) for i, size in enumerate(sizes))
    calls = tuple(Call("k", str(i), (), (i,), (i + 1,)) for i in range(3))
    planned = plan(Program(tensors, calls, (0,), (3,), {}), 1)
    assert planned.lower_bound == planned.nbytes == 700
    assert planned.peak == 1


def test_nothing_needs_nothing() -> None:
    assert plan(Program((), (), (), (), {}), 64) == Plan((), 0, 0, 0, {}, ())


def executor_graph(storage: list[int]) -> str:
    """input → a → (view of a) → b, which also reads a parameter; each tensor's storage."""
    nodes = [
        {"op": "null", "name": "input", "inputs": []},
        {"op": "null", "name": "p0", "inputs": []},
        *(
            {
                "op": "tvm_op",
                "name": name,
                "attrs": {"func_name": kernel},
                "inputs": [[source, 0, 0] for source in sources],
            }
            for name, kernel, sources in (
                ("a", "fused_a", [0, 1]),
                ("view", "__nop", [2]),
                ("b", "fused_b", [3, 1]),
                ("c", "fused_c", [4]),
            )
        ),
    ]
    count = len(nodes)
    return json.dumps(
        {
            "nodes": nodes,
            "arg_nodes": [0, 1],
            "heads": [[5, 0, 0]],
            "node_row_ptr": list(range(count + 1)),
            "attrs": {
                "shape": ["list_shape", [[1]] * count],
                "dltype": ["list_str", ["float32"] * count],
                "storage_id": ["list_int", storage],
            },
        }
    )


@pytest.mark.parametrize(
    ("storage", "right"),
    [
        ([0, 1, 2, 2, 0, 2], True),
        ([0, 1, 0, 0, 2, 3], False),  # a over the input that it reads
        ([0, 1, 2, 2, 2, 3], False),  # b over a view that it reads
        ([0, 1, 2, 2, 1, 3], False),  # b over a parameter
        ([0, 1, 2, 2, 3, 3], False),  # c over b
        ([0, 1, 1, 1, 2, 3], False),  # a over a parameter that b reads
    ],
)
def test_the_executor_s_own_plan_is_proved_too(storage: list[int], right: bool) -> None:
    graph = parse(executor_graph(storage))
    assert graph.kernels == ["fused_a", "fused_b", "fused_c"]
    assert (graph.inputs, graph.parameters, graph.outputs) == ((0,), (1,), (5,))
    if right:
        verify_storage(graph)
    else:
        with pytest.raises(AssertionError, match="overwrites"):
            verify_storage(graph)
