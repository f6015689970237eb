"""The memory planner: no two live tensors share a byte, and it stays near the lower bound."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from compile.program.memory import Buffer, plan


@st.composite
def buffers(draw: st.DrawFn) -> list[Buffer]:
    count = draw(st.integers(1, 24))
    made = []
    for index in range(count):
        first = draw(st.integers(0, 30))
        last = draw(st.integers(first, 31))
        made.append(Buffer(f"t{index}", draw(st.integers(1, 5000)), first, last))
    return made


@given(buffers(), st.sampled_from([1, 8, 64]))
def test_live_tensors_never_overlap(wanted: list[Buffer], alignment: int) -> None:
    planned = plan(wanted, alignment)
    placed = list(zip(wanted, planned.offsets, strict=True))
    for buffer, offset in placed:
        assert offset % alignment == 0
        assert 0 <= offset
        assert offset + buffer.nbytes <= planned.nbytes
    for index, (one, at) in enumerate(placed):
        for other, there in placed[index + 1 :]:
            if one.overlaps(other):
                assert at + one.nbytes <= there or there + other.nbytes <= at
    assert planned.lower_bound <= planned.nbytes


def test_a_chain_needs_its_two_largest_neighbours() -> None:
    sizes = [100, 400, 300, 50]
    chain = [Buffer(str(i), size, i, i + 1) for i, size in enumerate(sizes)]
    planned = plan(chain, 1)
    assert planned.lower_bound == 700
    assert planned.nbytes == 700


def test_nothing_needs_nothing() -> None:
    assert plan([], 64).nbytes == 0
