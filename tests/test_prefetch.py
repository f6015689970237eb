"""Weights fetched ahead: each line of the next block, spread over the loops of the present one, and the same answers."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from typing import Any, NamedTuple

import numpy as np
import pytest
from relay_worker import relay_worker

LANES, BLOCKS, SUMMED, PIXELS = 32, 8, 64, 28
HERE = "llvm -keys=cpu -mtriple=x86_64-linux-gnu -mcpu=x86-64-v3"


@pytest.fixture(scope="module")
def worker() -> Iterator[ProcessPoolExecutor]:
    with relay_worker() as pool:
        yield pool


class Fetched(NamedTuple):
    """What a kernel fetches.

    Attributes:
        lines: while it uses each block of its weights, counted from the first value of the next.
        first: how many of those lines there are in the steps of the block's own loop, the first step's first.
        difference: of the answers from those of the kernel as it was.
    """

    lines: dict[int, list[int]]
    first: list[int]
    difference: float


def fetched(
    target: str = HERE, *, together: bool = False, memory: bool = False, rows: int = 4
) -> Fetched:
    """A 1×1 convolution block by block of its outputs.

    Args:
        together: the loops over blocks and over rows of pixels are one.
        memory: sums that are kept at places that a loop moves.
        rows: of 7 pixels each.
    """
    from netship.targets.engine import compiler

    tvm = compiler()
    from tvm import te, tir

    from netship.compile.relay import prefetch

    pixels = rows * 7
    data = te.placeholder((pixels, SUMMED), name="data")
    weights = te.placeholder((BLOCKS, SUMMED, LANES), name="weights")
    k = te.reduce_axis((0, SUMMED), "k")
    result = te.compute(
        (pixels, BLOCKS * LANES),
        lambda p, c: te.sum(data[p, k] * weights[c // LANES, k, c % LANES], axis=k),
    )
    schedule = te.create_schedule(result.op)
    sums = schedule.cache_write(result, "global")
    pixel, channel = schedule[result].op.axis
    block, lane = schedule[result].split(channel, LANES)
    row, pixel = schedule[result].split(pixel, 7)
    schedule[result].reorder(block, row, pixel, lane)
    schedule[result].vectorize(lane)
    if not memory:
        schedule[result].unroll(pixel)
    if together:
        row = block = schedule[result].fuse(block, row)
    schedule[result].parallel(block)
    schedule[sums].compute_at(schedule[result], block if memory else row)
    pixel, channel = schedule[sums].op.axis
    if memory:
        row, pixel = schedule[sums].split(pixel, 7)
        schedule[sums].reorder(row, schedule[sums].op.reduce_axis[0], pixel, channel)
    else:
        schedule[sums].reorder(schedule[sums].op.reduce_axis[0], pixel, channel)
    schedule[sums].unroll(pixel)
    schedule[sums].vectorize(channel)

    random = np.random.default_rng(0)
    arrays = [
        tvm.nd.array(random.normal(size=shape).astype(np.float32))
        for shape in ((pixels, SUMMED), (BLOCKS, SUMMED, LANES))
    ]
    answers = []
    arguments = [data, weights, result]
    for config in ({}, prefetch.passes(tvm.target.Target(target))):
        with tvm.transform.PassContext(config=config):
            function = tvm.build(schedule, arguments, target=HERE)
            lowered = tvm.lower(schedule, arguments)["main"]
        answer = tvm.nd.empty((pixels, BLOCKS * LANES))
        function(*arrays, answer)
        answers.append(answer.numpy())

    loops: list[Any] = []
    lines: dict[int, list[int]] = {}
    first: list[int] = []

    def enter(node: Any) -> None:
        if isinstance(node, tir.For):
            loops.append(node)
        elif isinstance(node.value, tir.Call) and node.value.op.name == "tir.prefetch":
            (load,) = node.value.args[0].args
            for values in product(*(range(int(loop.extent)) for loop in loops)):
                at = {loop.loop_var: v for loop, v in zip(loops, values, strict=True)}
                here = values[0] // rows if together else values[0]
                start = (here + 1) * SUMMED * LANES
                away = prefetch._value(load.indices[0], at) - start
                assert away % prefetch.LINE == 0
                lines.setdefault(here, []).append(away // prefetch.LINE)
                if here == 0 and values[0] == 0:
                    first.append(away // prefetch.LINE)

    def leave(node: Any) -> None:
        if isinstance(node, tir.For):
            loops.pop()

    tir.stmt_functor.ir_transform(
        lowered.body, enter, leave, ["tir.For", "tir.Evaluate"]
    )
    return Fetched(lines, first, float(np.abs(answers[1] - answers[0]).max()))


def test_each_block_fetches_all_lines_of_the_next(worker: ProcessPoolExecutor) -> None:
    found = worker.submit(fetched).result()
    assert sorted(found.lines) == list(range(BLOCKS))
    next_block = set(range(SUMMED * LANES // 16))
    assert all(set(lines) == next_block for lines in found.lines.values())
    assert found.difference == 0


def test_steps_that_share_a_block_share_the_work(worker: ProcessPoolExecutor) -> None:
    found = worker.submit(fetched, together=True).result()
    next_block = set(range(SUMMED * LANES // 16))
    assert all(set(lines) == next_block for lines in found.lines.values())
    assert set(found.first) == set(range(len(next_block) // 4))
    assert found.difference == 0


@pytest.mark.parametrize(
    "variant",
    [
        {"target": HERE.replace("x86_64", "aarch64")},
        {"memory": True},
        {"rows": 1},
    ],
    ids=["no gain measured", "sums in memory", "weights used once"],
)
def test_nothing_is_fetched_where_nothing_is_gained(
    worker: ProcessPoolExecutor, variant: dict[str, Any]
) -> None:
    assert not worker.submit(fetched, **variant).result().lines
