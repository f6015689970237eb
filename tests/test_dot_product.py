"""int8 convolutions on x86: exact for the largest products, by the instructions that the CPU has."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import numpy as np
import pytest
from integer_operators import convolution, per_tensor, quantised_tensor
from numpy.typing import NDArray
from relay_worker import relay_worker

from netship.compile.ir.operators import Convolution
from netship.targets.presets import Target, resolve, this_cpu

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
    from netship.targets.engine import compiler

    tvm = compiler()
    from tvm.contrib import graph_executor

    from netship.compile.relay.ops import dot_product

    dot_product.patch_topi()
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
    assembly = str(built.lib.get_source("asm"))
    instruction = dot_product.instruction(target)
    if not run:
        return assembly, None, instruction
    executor = graph_executor.GraphModule(built["default"](tvm.cpu()))
    executor.run(image=data)
    return assembly, executor.get_output(0).numpy(), instruction


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
    assembly, sums, instruction = worker.submit(
        convolved, target, data, weights.astype(np.int8), runs_here
    ).result()
    seen, unseen = CPUS[cpu]
    assert all(word in assembly for word in seen)
    assert not any(word in assembly for word in unseen)
    for word in ("vpdpbusd", "vpmaddubsw"):
        assert (word in instruction.lower()) == (word in seen)
    if runs_here:
        expected = np.einsum("nihw,oi->nohw", data.astype(int), weights[:, :, 0, 0])
        assert (sums == expected).all()


def filtered(
    target: Target, operator: Convolution, data: NDArray[np.uint8], run: bool
) -> tuple[str, Any]:
    """In the worker: a depthwise convolution's assembly and, if to be run, its sums."""
    from netship.targets.engine import compiler

    tvm = compiler()
    from tvm.contrib import graph_executor

    from netship.compile.relay.ops import depthwise

    image = tvm.relay.var("image", shape=data.shape, dtype="uint8")
    module = tvm.IRModule.from_expr(depthwise.depthwise(image, operator))
    config = {"tir.disable_cse_tir": True}
    with tvm.transform.PassContext(opt_level=3, config=config):
        built = tvm.relay.build(module, tvm.target.Target(target.tvm))
    assembly = str(built.lib.get_source("asm"))
    if not run:
        return assembly, None
    executor = graph_executor.GraphModule(built["default"](tvm.cpu()))
    executor.run(image=data)
    return assembly, executor.get_output(0).numpy()


SHAPES = {
    "3×3": ((16, 7, 7), (3, 3), (1, 1), (1, 1, 1, 1), 5),
    "strides and uneven pads": ((32, 9, 11), (3, 3), (2, 2), (0, 1, 1, 0), 0),
    "one pixel": ((48, 1, 1), (3, 3), (1, 1), (1, 1, 1, 1), 255),
    "2×4": ((16, 8, 8), (2, 4), (1, 2), (1, 1, 1, 1), 128),
    "5×1": ((16, 5, 5), (5, 1), (1, 1), (2, 0, 2, 0), 0),
}


@pytest.mark.parametrize("cpu", ["x86-64-v4", "znver4"])
@pytest.mark.parametrize("shape", SHAPES)
def test_depthwise_taps_are_one_dot_product(
    worker: ProcessPoolExecutor, cpu: str, shape: str
) -> None:
    (channels, height, width), kernel, strides, pads, zero = SHAPES[shape]
    random = np.random.default_rng(height)
    weights = random.choice([-128, -127, 0, 127], (channels, 1, *kernel)).astype(
        np.int8
    )
    data = random.choice([0, 1, 255], (1, channels, height, width)).astype(np.uint8)
    source = quantised_tensor("image", data.shape, per_tensor(zero=zero), "uint8")
    operator = convolution(
        "depthwise",
        source,
        weights,
        [0] * channels,
        group=channels,
        strides=strides,
        pads=pads,
    )
    target = resolve(cpu)
    runs_here = target.features <= this_cpu().features
    assembly, sums = worker.submit(filtered, target, operator, data, runs_here).result()
    assert ("vpdpbusd" if cpu == "znver4" else "vpmaddubsw") in assembly
    if runs_here:
        padded = np.full(
            (channels, height + pads[0] + pads[2], width + pads[1] + pads[3]), zero
        )
        padded[:, pads[0] : pads[0] + height, pads[1] : pads[1] + width] = data[0]
        windows = np.lib.stride_tricks.sliding_window_view(padded, kernel, (1, 2))
        taps = windows[:, :: strides[0], :: strides[1]].astype(int)
        filters = weights[:, 0].astype(int)
        assert (sums[0] == np.einsum("chwyx,cyx->chw", taps, filters)).all()
