"""A convolution and the depthwise one after it, fused, answer as the two do; what must not be fused is not."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
from relay_worker import relay_worker

LARGE = (1, 52, 60, 8)


@pytest.fixture(scope="module")
def worker() -> Iterator[ProcessPoolExecutor]:
    with relay_worker() as pool:
        yield pool


# With instructions that convert float16.
HALF = {
    "dtype": "float16",
    "target": "llvm -keys=cpu -mtriple=x86_64-linux-gnu -mcpu=x86-64-v3",
}


def compare(target: str = "llvm -keys=cpu", **variant: Any) -> tuple[int, int, float]:
    """How many pairs were fused, their multiply-adds, the largest difference of the answers."""
    os.environ["TVM_NUM_THREADS"] = "3"
    from netship.targets.engine import compiler

    tvm = compiler()
    from tvm import relay
    from tvm.contrib import graph_executor

    from netship.compile.relay import describe, prefetch
    from netship.compile.relay.ops import conv2d_depthwise

    random = np.random.default_rng(0)

    dtype = variant.get("dtype", "float32")
    depthwise = variant.get("depthwise_dtype", dtype)

    def weight(*shape: int, dtype: str = dtype) -> Any:
        return relay.const(random.normal(size=shape).astype(dtype))

    shape = variant.get("shape", LARGE)
    kernel, expanded = variant.get("kernel", 1), variant.get("expanded", 96)
    lies = tuple(shape[i] for i in (0, 3, 1, 2)) if variant.get("nchw") else shape
    data = x = relay.var("x", shape=lies, dtype=dtype)
    if variant.get("nchw"):
        data = relay.layout_transform(x, "NCHW", "NHWC")
    first = relay.nn.conv2d(
        data,
        weight(kernel, kernel, shape[3], expanded),
        kernel_size=(kernel, kernel),
        channels=expanded,
        strides=variant.get("strides", (1, 1)),
        padding=variant.get("padding", (0, 0, 0, 0)),
        data_layout="NHWC",
        kernel_layout="HWIO",
    )
    middle = relay.add(first, weight(1, 1, 1, expanded))
    if variant.get("clip", True):
        middle = relay.clip(middle, *variant.get("limits", (-0.5, 6.0)))
    if depthwise != dtype:
        middle = relay.cast(middle, depthwise)
    second = relay.nn.conv2d(
        middle,
        weight(3, 3, expanded, 1, dtype=depthwise),
        kernel_size=(3, 3),
        channels=expanded,
        groups=expanded,
        strides=variant.get("depthwise_strides", (1, 1)),
        padding=variant.get("depthwise_padding", (1, 1, 1, 1)),
        dilation=variant.get("dilation", (1, 1)),
        data_layout="NHWC",
        kernel_layout="HWOI",
    )
    if variant.get("epilogue", True):
        second = relay.add(second, weight(1, 1, 1, expanded, dtype=depthwise))
        second = relay.clip(relay.cast(second, dtype), 0.0, 6.0)
    if variant.get("twice"):
        second = relay.Tuple([second, relay.exp(middle)])
    plain = relay.transform.InferType()(tvm.IRModule.from_expr(second))
    fused = relay.transform.InferType()(conv2d_depthwise.fuse(plain))

    count = macs = 0

    def visit(node: Any) -> None:
        nonlocal count, macs
        if not isinstance(node, relay.Call):
            return
        assert node.op.name != "layout_transform"
        if node.op.name == conv2d_depthwise.OPERATOR:
            count, macs = count + 1, macs + describe.macs(node)

    relay.analysis.post_order_visit(fused["main"], visit)
    chosen = conv2d_depthwise._tile
    integers = variant.get("as_integers", False)

    def tile(target: Any, dtype: str) -> Any:
        return dataclasses.replace(chosen(target, dtype), as_integers=integers)

    answers = []
    image = random.normal(size=lies).astype(dtype)
    config = prefetch.passes(tvm.target.Target(target))
    for module in (plain, fused):
        with (
            mock.patch.object(conv2d_depthwise, "_tile", tile),
            tvm.transform.PassContext(opt_level=3, config=config),
        ):
            built = relay.build(module, tvm.target.Target(target))
        executor = graph_executor.GraphModule(built["default"](tvm.cpu()))
        executor.set_input(x.name_hint, image)
        for threads in (1, 2, 3):
            tvm.get_global_func("runtime.config_threadpool")(0, threads)
            executor.run()
            answers.append(executor.get_output(0).numpy().astype(np.float32))
    difference = max(np.abs(answers[0] - other).max() for other in answers[1:])
    return count, macs, float(difference)


@pytest.mark.parametrize(
    "variant",
    [
        {},
        {"epilogue": False},
        {"depthwise_strides": (2, 2), "depthwise_padding": (0, 0, 1, 1)},
        {"depthwise_strides": (2, 1), "depthwise_padding": (1, 0, 2, 1)},
        {
            "shape": (1, 101, 119, 3),
            "kernel": 3,
            "strides": (2, 2),
            "padding": (0, 1, 1, 0),
        },
        {
            "shape": (1, 101, 119, 3),
            "kernel": 3,
            "strides": (2, 2),
            "padding": (0, 1, 1, 0),
            "nchw": True,
        },
        {"shape": (1, 37, 83, 5), "expanded": 90},
        {"shape": (2, 52, 60, 8), "limits": (0.0, 6.0), "as_integers": True},
        # As wide as compile/relay/prefetch.py looks at, on its target.
        {
            "shape": (1, 30, 30, 48),
            "expanded": 288,
            "target": "llvm -keys=cpu -mtriple=x86_64-linux-gnu -mcpu=x86-64-v3",
        },
        {"depthwise_strides": (4, 5), "depthwise_padding": (0, 3, 2, 4)},
        {"shape": (1, 61, 71, 5), "expanded": 90, **HALF},
        {"nchw": True, "limits": (0.0, 6.0), "as_integers": True, **HALF},
        {"limits": (0.0, 6.0), "depthwise_dtype": "float32", **HALF},
    ],
    ids=[
        "plain",
        "alone",
        "stride",
        "uneven",
        "stem",
        "image",
        "odd",
        "integers",
        "wide",
        "leaps",
        "half",
        "half integers",
        "half, depthwise in float32",
    ],
)
def test_a_fused_pair_answers_as_the_two_do(
    worker: ProcessPoolExecutor, variant: dict[str, Any]
) -> None:
    count, _, difference = worker.submit(compare, **variant).result()
    assert count == 1
    # The operators of float16 are clipped to 6, and off by some of its roundings of sums as large.
    assert difference < (6e-2 if "dtype" in variant else 1e-4)


@pytest.mark.parametrize(
    "variant",
    [
        {"shape": (1, 20, 20, 8)},
        {"twice": True},
        {"clip": False},
        {"dilation": (2, 2)},
        {"shape": (1, 45, 50, 8), **HALF},
    ],
    ids=["fits the cache", "used twice", "no clip", "dilated", "fits in float16"],
)
def test_other_pairs_stay_two_operators(
    worker: ProcessPoolExecutor, variant: dict[str, Any]
) -> None:
    count, _, difference = worker.submit(compare, **variant).result()
    assert (count, difference) == (0, 0)


def test_the_multiply_adds_are_those_of_the_two(worker: ProcessPoolExecutor) -> None:
    _, macs, _ = worker.submit(compare).result()
    assert macs == 52 * 60 * 96 * (8 + 9)


def code_in_float16(depthwise_dtype: str) -> str:
    """The loops of a small pair, as TVM is given them."""
    from netship.targets.engine import compiler

    compiler()
    from tvm import te

    from netship.compile.relay.ops import rows

    pair = rows.FusedConvDepthwise(
        (1, 2, 4, 4),
        "NHWC",
        (1, 1, 4, 8),
        (3, 3, 8),
        (1, 1),
        (0, 0, 0, 0),
        (0.0, 6.0),
        (1, 1),
        (1, 1, 1, 1),
        (0.0, 6.0),
        "float16",
        depthwise_dtype,
    )
    tile = rows.Tile(8, 2, 1, 2, 8, as_integers=True)
    first, second = pair.dtype, pair.depthwise_dtype
    inputs = [
        te.placeholder(shape, dtype, name)
        for name, shape, dtype in (
            ("data", pair.data, first),
            ("weight", pair.weight, first),
            ("bias", (8,), first),
            ("filters", pair.filters, second),
            ("shift", (8,), second),
        )
    ]

    def body(buffers: Any, outputs: Any) -> Any:
        return rows.Kernel(pair, tile, buffers, outputs[0]).statement()

    made = te.extern(pair.output, inputs, body, name="pair", dtype=first)
    function = te.create_prim_func([*inputs, made])
    return str(function.script())


@pytest.mark.parametrize(
    ("depthwise_dtype", "name"),
    [("float16", "pair_float16"), ("float32", "pair_float16_float32")],
)
def test_the_code_of_a_pair_in_float16(
    worker: ProcessPoolExecutor, depthwise_dtype: str, name: str
) -> None:
    """After a change, write what is made into the file, and look at the difference."""
    golden = Path(__file__).with_name("golden") / f"{name}.tir"
    made = worker.submit(code_in_float16, depthwise_dtype).result()
    assert made == golden.read_text()
