"""Pools, remainders, Fourier transforms and indices from the end answer in TVM as in ONNX Runtime."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from relay_worker import relay_worker, through_relay
from test_rewrite import (
    IMAGE,
    Array,
    answers_as_onnxruntime,
    chain,
    is_wrong_as_it_is,
    number,
    real,
    single,
    weights,
    whole,
)

from netship.compile.frontend.canonical.rules import canonical
from netship.targets.errors import UserError


def whole_numbers(
    operator: str, *divisor: int, opset: int = 13, **attributes: Any
) -> onnx.ModelProto:
    """``operator`` of the input times 9, rounded towards zero, and a row of divisors."""
    node = helper.make_node
    nodes = [
        node("Mul", ["x", "nine"], ["scaled"]),
        node("Cast", ["scaled"], ["whole"], to=TensorProto.INT32),
        node(operator, ["whole", "divisor"], ["result"], **attributes),
        node("Cast", ["result"], ["y"], to=TensorProto.FLOAT),
    ]
    constants = [
        numpy_helper.from_array(number(9), "nine"),
        numpy_helper.from_array(np.array(divisor, np.int32), "divisor"),
    ]
    return chain(nodes, constants, opset, IMAGE)


def padded_whole_numbers(*value: int, dtype: int) -> onnx.ModelProto:
    """Pad of whole numbers, with this value or without one."""
    node = helper.make_node
    nodes = [
        node("Cast", ["x"], ["whole"], to=dtype),
        node("Pad", ["whole", "pads", *["value"] * len(value)], ["wide"]),
        node("Cast", ["wide"], ["y"], to=TensorProto.FLOAT),
    ]
    constants = [numpy_helper.from_array(whole(0, 0, 1, 0, 0, 0, -1, 2), "pads")]
    if value:
        constants.append(helper.make_tensor("value", dtype, [], value))
    return chain(nodes, constants, 13, IMAGE)


def largest_of_whole_numbers() -> onnx.ModelProto:
    """ReduceMax of whole numbers in a model with infinite constants."""
    node = helper.make_node
    nodes = [
        node("Max", ["x", "lowest"], ["same"]),
        node("Cast", ["same"], ["whole"], to=TensorProto.INT32),
        node("ReduceMax", ["whole"], ["largest"], axes=[2]),
        node("Cast", ["largest"], ["y"], to=TensorProto.FLOAT),
    ]
    return chain(nodes, [numpy_helper.from_array(number(-np.inf), "lowest")], 13, IMAGE)


def place_among_infinities(operator: str, infinity: float) -> onnx.ModelProto:
    """Of rows in which one has nothing but infinities, and another some."""
    node = helper.make_node
    added = np.zeros((7, 5), np.float32)
    added[2], added[4, 1:] = infinity, infinity
    nodes = [
        node("Add", ["x", "added"], ["far"]),
        node(operator, ["far"], ["place"], axis=3),
        node("Cast", ["place"], ["y"], to=TensorProto.FLOAT),
    ]
    return chain(nodes, [numpy_helper.from_array(added, "added")], 13, IMAGE)


def from_the_end(
    operator: str,
    places: Sequence[int],
    updates: Array | None = None,
    **attributes: Any,
) -> onnx.ModelProto:
    """``operator`` on an array [7, 5, 3, 1] with computed indices of -5 to -1 in the shape ``places``."""
    node = helper.make_node
    names = ["array", "places"] + ["updates"] * (updates is not None)
    nodes = [
        node("Transpose", ["x"], ["array"], perm=[2, 3, 1, 0]),
        node("ArgMax", ["x"], ["largest"], axis=-1, keepdims=0),
        node("Sub", ["largest", "length"], ["negative"]),
        node("Slice", ["negative", "start", "end", "axes"], ["few"]),
        node("Reshape", ["few", "shape"], ["places"]),
        node(operator, names, ["y"], **attributes),
    ]
    constants = {
        "length": whole(5),
        "start": whole(0),
        "end": whole(int(np.prod(places)) // 3),
        "axes": whole(2),
        "shape": whole(*places),
    }
    if updates is not None:
        constants["updates"] = updates
    tensors = [numpy_helper.from_array(each, name) for name, each in constants.items()]
    return chain(nodes, tensors, 16, IMAGE)


def normalised_zeros() -> onnx.ModelProto:
    """LpNormalization where a row has nothing but zeros."""
    node = helper.make_node
    nodes = [
        node("Mul", ["x", "mask"], ["some"]),
        node("LpNormalization", ["some"], ["y"], axis=3),
    ]
    mask = np.ones((7, 5), np.float32)
    mask[3] = 0
    return chain(nodes, [numpy_helper.from_array(mask, "mask")], 17, IMAGE)


def rounded(*numbers: float) -> onnx.ModelProto:
    """Round of these numbers, which are made while the network runs."""
    node = helper.make_node
    nodes = [
        node("Mul", ["x", "nothing"], ["zeros"]),
        node("Add", ["zeros", "numbers"], ["sums"]),
        node("Round", ["sums"], ["y"]),
    ]
    constants = {"nothing": number(0), "numbers": real(*numbers)}
    tensors = [numpy_helper.from_array(each, name) for name, each in constants.items()]
    return chain(nodes, tensors, 13, (1, 1, 1, len(numbers)))


def smallest() -> onnx.ModelProto:
    model = single("TopK", whole(4), outputs=["y", "places"], largest=0)
    del model.graph.output[1:]
    return model


def sign_by_division() -> onnx.ModelProto:
    """x / 0 between -1 and 1."""
    nodes = [
        helper.make_node("Div", ["x", "nothing"], ["infinite"]),
        helper.make_node("Clip", ["infinite", "least", "most"], ["y"]),
    ]
    constants = {"nothing": 0, "least": -1, "most": 1}
    tensors = [
        numpy_helper.from_array(number(each), name) for name, each in constants.items()
    ]
    return chain(nodes, tensors, 13, IMAGE)


# What TVM's importer gets wrong as it is.
WRONG: dict[str, onnx.ModelProto] = {
    "arg-min-infinite": place_among_infinities("ArgMin", np.inf),
    "arg-max-infinite": place_among_infinities("ArgMax", -np.inf),
    "max-pool-same-ceil": single(
        "MaxPool",
        kernel_shape=[3, 3],
        strides=[2, 3],
        auto_pad="SAME_LOWER",
        ceil_mode=1,
    ),
    "lp-normalisation-zeros": normalised_zeros(),
    "lp-normalisation-1": single("LpNormalization", axis=1, p=1),
    "lp-normalisation-22": single("LpNormalization", opset=22, axis=-2),
    "lp-pool-odd": single("LpPool", kernel_shape=[3, 2], p=3),
    "lp-pool-1": single("LpPool", kernel_shape=[2, 2], strides=[2, 2], p=1),
    "lp-pool-same": single(
        "LpPool", kernel_shape=[3, 2], strides=[2, 2], auto_pad="SAME_LOWER", p=4
    ),
    "lp-pool-dilated": single(
        "LpPool",
        kernel_shape=[3, 2],
        dilations=[2, 3],
        pads=[1, 0, 0, 1],
        strides=[2, 1],
        ceil_mode=1,
        opset=18,
        p=1,
    ),
    "lp-pool-line": single(
        "LpPool", kernel_shape=[3], shape=(1, 3, 8), strides=[2], ceil_mode=1, opset=22
    ),
    "global-lp-pool-odd": single("GlobalLpPool", p=3),
    "global-lp-pool-1": single("GlobalLpPool", opset=7, p=1),
    "dft": single("DFT", opset=17, shape=(1, 4, 6, 2), axis=2),
    "dft-axis-input": single("DFT", None, np.array(1), opset=20, shape=(1, 4, 6, 2)),
    "dft-longer": single("DFT", np.array(9), shape=(1, 6, 3, 1), opset=17, onesided=1),
    "div-by-0": sign_by_division(),
    "mod": whole_numbers("Mod", 1, -2, 3, -4, 5),
    "round-near-half": rounded(-0.49999997, 0.49999997, -0.5, 0.5, 1.5, -1.5, -2.5),
    "top-smallest": smallest(),
    "scatter-nd-none": single(
        "ScatterND",
        whole(0, 2, 0, 1).reshape(1, 2, 2),
        weights(1, 2, 7, 5),
        opset=16,
        reduction="none",
    ),
    "scatter-elements-none": single(
        "ScatterElements",
        np.full((1, 1, 7, 5), 2),
        weights(1, 1, 7, 5),
        opset=18,
        axis=1,
        reduction="none",
    ),
    "slice-before-the-start": single(
        "Slice", whole(-9, 3), whole(-(2**31), -99), whole(3, -2), whole(-1, -2)
    ),
    "gather-negative-axis": single("Gather", whole(2, 0, -1), axis=-2),
    "gather-computed": from_the_end("Gather", (2, 3), axis=-3),
    "gather-elements-negative": single(
        "GatherElements", whole(-3, 2, -1, 0, -2).reshape(1, 1, 1, 5), axis=1
    ),
    "gather-nd-negative": single("GatherND", whole(-1, -2, 0, 1).reshape(2, 2)),
    "gather-nd-computed": from_the_end("GatherND", (2, 3, 2)),
}

# Forms that must go on working, with or without a rule.
RIGHT: dict[str, onnx.ModelProto] = {
    "average-same-ceil": single(
        "AveragePool",
        kernel_shape=[3, 2],
        strides=[2, 3],
        auto_pad="SAME_UPPER",
        ceil_mode=1,
    ),
    "average-same-ceil-counting": single(
        "AveragePool",
        kernel_shape=[3, 3],
        strides=[2, 2],
        auto_pad="SAME_LOWER",
        ceil_mode=1,
        count_include_pad=1,
    ),
    "average-dilated-padded": single(
        "AveragePool",
        kernel_shape=[3, 2],
        dilations=[2, 1],
        pads=[1, 0, 2, 1],
        strides=[2, 2],
        ceil_mode=1,
        opset=22,
    ),
    "average-dilated-counting": single(
        "AveragePool",
        kernel_shape=[3, 2],
        dilations=[2, 1],
        pads=[1, 0, 2, 1],
        count_include_pad=1,
        opset=22,
    ),
    "pad-whole": padded_whole_numbers(dtype=TensorProto.INT32),
    "pad-whole-value": padded_whole_numbers(7, dtype=TensorProto.INT64),
    "pad-bool": padded_whole_numbers(1, dtype=TensorProto.BOOL),
    "reduce-whole-beside-infinity": largest_of_whole_numbers(),
    "div-whole": whole_numbers("Div", 1, -2, 3, -4, 5),
    "mod-as-in-c": whole_numbers("Mod", 1, -2, 3, -4, 5, fmod=1),
    "lp-pool-padded": single("LpPool", kernel_shape=[3, 2], pads=[1, 1, 2, 0]),
    "mod-real": single("Mod", real(1, -2, 3, -4, 5), fmod=1),
    "lp-pool": single("LpPool", kernel_shape=[3, 2]),
    "gather-one": single("Gather", np.array(-1), axis=2),
    "gather-elements-computed": from_the_end("GatherElements", (2, 3, 3, 1), axis=1),
    "scatter-nd-computed": from_the_end(
        "ScatterND", (3, 1), weights(3, 5, 3, 1), reduction="add"
    ),
    "scatter-elements-few": single(
        "ScatterElements", whole(2, 0).reshape(1, 1, 1, 2), weights(1, 1, 1, 2), axis=2
    ),
    "scatter-elements-computed": from_the_end(
        "ScatterElements", (7, 1, 3, 1), weights(7, 1, 3, 1), axis=1
    ),
    "scatter-elements-negative": single(
        "ScatterElements",
        whole(-3, 2, -1, 0, -2).reshape(1, 1, 1, 5),
        weights(1, 1, 1, 5),
        axis=1,
    ),
    # As it is it writes outside of the tensor.
    "scatter-nd-negative": single(
        "ScatterND",
        whole(-1, -2, -1, 0).reshape(1, 2, 2),
        weights(1, 2, 7, 5),
        opset=16,
        reduction="add",
    ),
}


@pytest.fixture(scope="module")
def relay() -> Iterator[ProcessPoolExecutor]:
    with relay_worker() as worker:
        yield worker


@pytest.mark.parametrize("name", [*WRONG, *RIGHT])
def test_an_operator_answers_as_in_onnxruntime(
    name: str, relay: ProcessPoolExecutor
) -> None:
    answers_as_onnxruntime((WRONG | RIGHT)[name], relay)


@pytest.mark.parametrize("name", WRONG)
def test_a_rule_is_still_needed(name: str, relay: ProcessPoolExecutor) -> None:
    is_wrong_as_it_is(WRONG[name], relay)


@pytest.mark.parametrize(
    "operator, attributes",
    [
        ("MaxPool", {"kernel_shape": [2, 2], "dilations": [2, 1]}),
        ("AveragePool", {"kernel_shape": [1, 1], "strides": [4, 1]}),
        ("LpPool", {"kernel_shape": [1, 1], "strides": [4, 1]}),
    ],
)
def test_auto_pad_that_onnx_and_onnxruntime_take_otherwise_is_refused(
    operator: str, attributes: dict[str, Any]
) -> None:
    model = single(operator, opset=22, auto_pad="SAME_UPPER", **attributes)
    with pytest.raises(UserError, match=rf"\({operator}\).*export with pads"):
        canonical(model)


@pytest.mark.parametrize("operator", ["MaxPool", "AveragePool", "LpPool"])
def test_a_window_larger_than_the_tensor_is_refused(operator: str) -> None:
    """ONNX's inference and ONNX Runtime round its size up to 1, ONNX's text and TVM down to 0."""
    kernel, strides = [9, 2], [9, 1]
    model = single(operator, opset=22, kernel_shape=kernel, strides=strides)
    with pytest.raises(
        UserError, match=rf"\({operator}\): its window \[9, 2\] is larg"
    ):
        canonical(model)


def test_whole_numbers_are_rounded_to_themselves(relay: ProcessPoolExecutor) -> None:
    numbers = 2**23 + 1, -(2**23) - 1, 2**24 - 1, 1e30, np.inf, -np.inf
    model = rounded(*numbers).SerializeToString()
    x = np.zeros((1, 1, 1, len(numbers)), np.float32)
    ((got,),) = relay.submit(through_relay, model, [x]).result()
    assert got.ravel().tolist() == real(*numbers).tolist()
