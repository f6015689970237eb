"""int8 convolutions on x86: exact for the largest products, by the instructions that the CPU has."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from relay_worker import relay_worker

from targets.presets import Target, resolve, this_cpu

# Instructions of each CPU that must be seen, and that must not.
CPUS = {
    "x86-64-v2": (["pmaddwd"], ["maddubs", "ymm"]),
    "x86-64-v3": (["vpmaddubsw", "vpmaddwd"], ["vpdpbusd", "zmm"]),
    "x86-64-v4": (["vpmaddubsw", "vpmaddwd", "zmm"], ["vpdpbusd"]),
    "znver4": (["vpdpbusd", "zmm"], ["vpmaddubsw"]),
}


@pytest.fixture(scope="module")
def worker() -> Iterator[ProcessPoolExecutor]:
    with relay_worker() as pool:
        yield pool


def convolved(
    target: Target, data: NDArray[np.uint8], weights: NDArray[np.int8], run: bool
) -> tuple[str, Any, str]:
    """In the worker: a 1×1 convolution's assembly, its sums if to be run, and what a build says of it."""
    from targets.engine import compiler

    tvm = compiler()
    from tvm.contrib import graph_executor

    from compile import dot_product

    dot_product.mend()
    image = tvm.relay.var("image", shape=data.shape, dtype="uint8")
    sums = tvm.relay.nn.conv2d(
        image,
        tvm.relay.const(weights),
        channels=weights.shape[0],
        kernel_size=weights.shape[2:],
        out_dtype="int32",
    )
    config = {"tir.disable_cse_tir": True}
    with tvm.transform.PassContext(opt_level=3, config=config):
        module = tvm.IRModule.from_expr(sums)
        built = tvm.relay.build(module, tvm.target.Target(target.tvm))
    assembly = built.lib.get_source("asm")
    told = dot_product.instruction(target)
    if not run:
        return assembly, None, told
    executor = graph_executor.GraphModule(built["default"](tvm.cpu()))
    executor.run(image=data)
    return assembly, executor.get_output(0).numpy(), told


@pytest.mark.parametrize("cpu", CPUS)
@pytest.mark.parametrize("size", [7, 16])
def test_no_sum_of_products_saturates(
    worker: ProcessPoolExecutor, cpu: str, size: int
) -> None:
    random = np.random.default_rng(size)
    # The ends of both types, next to each other more often than not.
    data = random.choice([0, 1, 254, 255], (1, 24, size, size)).astype(np.uint8)
    weights = random.choice([-128, -127, -1, 1, 126, 127], (32, 24, 1, 1))
    weights[0], weights[1] = 127, -128
    target = resolve(cpu)
    runs_here = target.features <= this_cpu().features
    assembly, sums, told = worker.submit(
        convolved, target, data, weights.astype(np.int8), runs_here
    ).result()
    seen, unseen = CPUS[cpu]
    assert all(word in assembly for word in seen)
    assert not any(word in assembly for word in unseen)
    for word in ("vpdpbusd", "vpmaddubsw"):
        assert (word in told.lower()) == (word in seen)
    if runs_here:
        expected = np.einsum("nihw,oi->nohw", data.astype(int), weights[:, :, 0, 0])
        assert (sums == expected).all()
