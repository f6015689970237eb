"""Small files that would be costly to read: each is refused by a count, before the cost; long valid chains are read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from gated import node, refused, small
from onnx import helper

from netship.compile.frontend import fold, gate
from netship.compile.frontend.limits import (
    MAX_ARGUMENTS,
    MAX_NODES,
    MAX_OUTPUTS,
    MAX_RANK,
    MAX_WEIGHTS,
)
from netship.compile.frontend.model import Model

LONG = 100_000


def _chain(operator: str, length: int, *more: str) -> list[onnx.NodeProto]:
    names = ["x", *(f"r{i}" for i in range(1, length)), "y"]
    return [
        node(operator, [names[i], *more], [names[i + 1]], f"n{i}")
        for i in range(length)
    ]


def many_weights() -> onnx.ModelProto:
    model = small()
    for index in range(MAX_WEIGHTS):
        model.graph.initializer.add(name=str(index), data_type=1, dims=[0])
    return model


def many_outputs() -> onnx.ModelProto:
    names = [f"o{i}" for i in range(MAX_OUTPUTS + 1)]
    model = small([node("Relu", ["x"], [name], name) for name in names])
    del model.graph.output[:]
    for name in names:
        model.graph.output.append(helper.make_tensor_value_info(name, 1, None))
    return model


def rank_of_a_reshape(operator: str = "Reshape") -> onnx.ModelProto:
    shape = np.r_[np.ones(LONG, np.int64), 72]
    nodes = [node(operator, ["x", "s"], ["a"]), *_chain("Relu", 300)[:-1]]
    nodes[1].input[0] = "a"
    return small([*nodes, node("Flatten", ["r299"], ["y"])], {"s": shape})


def rank_of_constants() -> onnx.ModelProto:
    doubled = [
        node("Concat", [name, name], [f"c{i + 1}"], f"c{i + 1}", axis=0)
        for i, name in enumerate(["k", *(f"c{i}" for i in range(1, 17))])
    ]
    return small([*doubled, node("Reshape", ["x", "c17"], ["y"])], {"k": np.array([1])})


def rank_of_an_attribute() -> onnx.ModelProto:
    shape = helper.make_node("Constant", [], ["s"], value_ints=[1] * LONG)
    return small([shape, node("Expand", ["x", "s"], ["y"])])


def rank_of_an_input() -> onnx.ModelProto:
    return small(shape=[1] * LONG)


def rank_of_weights() -> onnx.ModelProto:
    model = small([node("Add", ["x", "w"], ["y"])])
    model.graph.initializer.add(name="w", data_type=1, dims=[1] * 9, raw_data=bytes(4))
    return model


def equation() -> onnx.ModelProto:
    letters = "abcdefghijklmnop"
    return small(
        [node("Einsum", ["x", "w"], ["y"], equation=f"abcd,efgh->{letters[:9]}")],
        {"w": np.ones((1, 1, 1, 1), np.float32)},
    )


def work_of_a_pool() -> onnx.ModelProto:
    size, pad = [1 << 30] * 2, [1 << 29] * 4
    return small([node("AveragePool", ["x"], ["y"], kernel_shape=size, pads=pad)])


CASES: dict[str, tuple[Callable[[], onnx.ModelProto], str]] = {
    "weights": (many_weights, f"weights, more than the {MAX_WEIGHTS} allowed"),
    "outputs": (many_outputs, f"outputs, more than the {MAX_OUTPUTS} allowed"),
    "nodes": (
        lambda: small(_chain("Relu", MAX_NODES + 1)),
        f"nodes, more than the {MAX_NODES} allowed",
    ),
    "inputs of a node": (
        lambda: small([node("Sum", ["x"] * LONG, ["y"])]),
        f"'n' .*{LONG + 1} inputs and outputs, more than the {MAX_ARGUMENTS}",
    ),
    "outputs of a node": (
        lambda: small(
            [node("Split", ["x"], [*(f"o{i}" for i in range(LONG)), "y"], axis=3)]
        ),
        "inputs and outputs, more than",
    ),
    "rank of a Reshape": (rank_of_a_reshape, f"more than the {MAX_RANK} allowed"),
    "rank of an Expand": (
        lambda: rank_of_a_reshape("Expand"),
        f"{LONG + 1} dimensions, more than the {MAX_RANK} allowed",
    ),
    "rank that folding finds": (
        rank_of_constants,
        f"{1 << 17} dimensions, more than the {MAX_RANK} allowed",
    ),
    "rank of a Constant": (rank_of_an_attribute, f"{LONG} dimensions"),
    "rank of the input": (rank_of_an_input, f"'x'.*{LONG}"),
    "rank of weights": (rank_of_weights, "'w': 9 dimensions"),
    "rank of Unsqueezes": (
        lambda: small(_chain("Unsqueeze", 10_000, "a"), {"a": np.array([0])}),
        "'n4' .*9 dimensions",
    ),
    "rank of Gathers": (
        lambda: small(
            _chain("Gather", 10_000, "i"), {"i": np.zeros((1, 1, 1), np.int64)}
        ),
        "'n2' .*10 dimensions",
    ),
    "rank of an Einsum": (equation, "9 dimensions"),
    "work of a pool": (work_of_a_pool, "multiply-adds, more than the 1e\\+12 allowed"),
    "work of an Einsum": (
        lambda: small(
            [node("Einsum", ["x", "w", "w"], ["y"], equation="abcd,...ef,...gh->a")],
            {"w": np.ones((3000, 3000), np.float32)},
        ),
        "multiply-adds, more than",
    ),
    "work of an LRN": (
        lambda: small([node("LRN", ["x"], ["y"], size=1 << 40)]),
        "multiply-adds, more than",
    ),
    "work of a convolution": (
        lambda: small(
            [node("Conv", ["x", "w"], ["y"], pads=[5000] * 4)],
            {"w": np.ones((1, 3, 1000, 1000), np.float32)},
        ),
        "multiply-adds, more than",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_costly_file_is_refused_by_a_count(tmp_path: Path, case: str) -> None:
    make, words = CASES[case]
    path = tmp_path / "model.onnx"
    path.write_bytes(make().SerializeToString())
    refused(path, words)


def test_a_long_chain_of_shapes_is_folded_in_few_inferences(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each shape is known only when the one before is folded."""
    nodes, at = [], "x"
    for i in range(200):
        nodes += [
            node("Shape", [at], [f"s{i}"], f"s{i}"),
            node("ReduceProd", [f"s{i}"], [f"p{i}"], f"p{i}", keepdims=1),
            node("Concat", ["one", f"p{i}"], [f"c{i}"], f"c{i}", axis=0),
            node("Reshape", [at, f"c{i}"], [f"r{i}"], f"r{i}"),
        ]
        at = f"r{i}"
    nodes.append(node("Relu", [at], ["y"], "relu"))
    path = tmp_path / "model.onnx"
    path.write_bytes(small(nodes, {"one": np.array([1])}).SerializeToString())
    inferences = []
    infer = fold.infer

    def counted(proto: onnx.ModelProto) -> onnx.ModelProto:
        inferences.append(1)
        return infer(proto)

    monkeypatch.setattr(fold, "infer", counted)
    model = gate.load(path)
    assert model.outputs[0].shape == (1, 72)
    assert len(inferences) <= 6
    left = [each.op_type for each in fold.fold(model.proto).graph.node]
    assert left == ["Reshape"] * 200 + ["Relu"]


def test_any_operator_may_compute_a_shape(tmp_path: Path) -> None:
    """As PyTorch exports padding SAME: of a size a Ceil, a Clip, and numbers that are turned round."""
    model = onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["": 17]>
        same (float[1,3,9,9] x) => (float[1,3,10,10] y)
        <float two = {2}, float zero = {0}, int64 first = {2}, int64[1] axis = {0}, int64[1] rest = {6},
         int64[2] pairs = {-1,2}, int64[1] last = {-1}, int64[1] end = {-9223372036854775807}, int64[1] all = {-1}> {
            sizes = Shape(x)
            size = Gather(sizes, first)
            number = Cast<to = 1>(size)
            half = Div(number, two)
            whole = Ceil(half)
            twice = Mul(whole, two)
            lacking = Sub(twice, number)
            clipped = Clip(lacking, zero)
            rounded = Round(clipped)
            pad = Cast<to = 7>(rounded)
            one = Unsqueeze(pad, axis)
            none = Sub(one, one)
            four = Concat<axis = 0>(none, one, none, one)
            lower = Shape(four)
            more = ConstantOfShape<value = int64[1] {0}>(lower)
            eight = Concat<axis = 0>(four, more)
            paired = Reshape(eight, pairs)
            turned = Slice(paired, last, end, axis, all)
            across = Transpose<perm = [1, 0]>(turned)
            pads = Reshape(across, all)
            y = Pad(x, pads)
        }"""
    )
    path = tmp_path / "model.onnx"
    path.write_bytes(model.SerializeToString())
    loaded = gate.load(path)
    assert [x.op_type for x in fold.fold(loaded.proto).graph.node] == ["Pad"]
    assert loaded.outputs[0].shape == (1, 3, 10, 10)


def test_weights_that_are_standardised_are_constants(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As PyTorch exports convolutions of NFNet: a BatchNormalization in training mode, of the weights."""
    # A large network's weights are more than the budget for everything else.
    monkeypatch.setattr(fold, "_BUDGET", 0)
    random = np.random.default_rng(0)
    weights = random.normal(3, 2, (1, 4, 27)).astype(np.float32)
    inputs = ["w", "ones", "zeros", "zeros", "ones"]
    made = node(
        "BatchNormalization", inputs, ["y", "m", "v"], "standard", training_mode=1
    )
    shape = node("Reshape", ["y", "shape"], ["kernel"], "shape")
    convolution = node("Conv", ["x", "kernel"], ["out"], "conv")
    constants = {"w": weights, "shape": np.array([4, 3, 3, 3])}
    constants |= {"ones": np.ones(4, np.float32), "zeros": np.zeros(4, np.float32)}
    proto = small([made, shape, convolution], constants, opset=15)
    proto.graph.output[0].name = "out"
    folded = fold.fold(proto).graph
    assert [each.op_type for each in folded.node] == ["Conv"]
    kernel = onnx.numpy_helper.to_array(folded.initializer[0]).reshape(4, -1)
    assert np.abs(kernel.mean(axis=1)).max() < 1e-6
    assert np.abs(kernel.std(axis=1) - 1).max() < 1e-5


@pytest.mark.parametrize("kind", ["DequantizeLinear", "RandomNormalLike"])
def test_weights_that_are_quantised_and_random_numbers_are_no_constants(
    kind: str,
) -> None:
    inputs = ["w", "s"] if kind == "DequantizeLinear" else ["s"]
    nodes = [node(kind, inputs, ["c"], "made"), node("Add", ["x", "c"], ["y"], "sum")]
    scale = np.array(0.5, np.float32)
    proto = small(nodes, {"w": np.array(3, np.int8), "s": scale})
    kinds = [each.op_type for each in fold.fold(proto).graph.node]
    assert kinds == [kind, "Add"]


def test_many_nodes_of_one_name_get_names_of_their_own(tmp_path: Path) -> None:
    nodes = _chain("Relu", 5000)
    for each in nodes:
        each.name = "relu"
    nodes[7].name = "relu (3)"
    path = tmp_path / "model.onnx"
    path.write_bytes(small(nodes).SerializeToString())
    names = [each.name for each in gate.load(path).proto.graph.node]
    assert len(set(names)) == 5000 and names[7] == "relu (3)"


def test_attention_s_changes_of_rank_are_within_the_limit(tmp_path: Path) -> None:
    """Dimensions that are added and taken away again do not add up."""
    nodes, at = [], "x"
    for i in range(12):
        nodes += [
            node("Unsqueeze", [at, "two"], [f"u{i}"], f"u{i}"),
            node("ReduceMean", [f"u{i}"], [f"m{i}"], f"m{i}", axes=[2], keepdims=0),
            node("Unsqueeze", [f"m{i}", "two"], [f"v{i}"], f"v{i}"),
            node("Squeeze", [f"v{i}", "two"], [f"q{i}"], f"q{i}"),
            node("Unsqueeze", [f"q{i}", "two"], [f"w{i}"], f"w{i}"),
            node("Gather", [f"w{i}", "zero"], [f"g{i}"], f"g{i}", axis=2),
        ]
        at = f"g{i}"
    nodes.append(node("Relu", [at], ["y"], "relu"))
    constants = {"two": np.array([2]), "zero": np.array(0)}
    path = tmp_path / "model.onnx"
    path.write_bytes(small(nodes, constants).SerializeToString())
    assert gate.load(path).outputs[0].shape == (1, 3, 6, 4)


def _taken(
    path: Path, nodes: list[onnx.NodeProto], opset: int = 17, **constants: Any
) -> Model:
    path.write_bytes(small(nodes, constants, opset=opset).SerializeToString())
    return gate.load(path)


@pytest.mark.parametrize(
    "equation",
    ["b c h w , w k -> b c h k", "bchw,wk", "...hw,wk->...hk", "a...w,wk->a...k"],
)
def test_an_equation_has_the_rank_of_its_letters(tmp_path: Path, equation: str) -> None:
    nodes, at = [], "x"
    for i in range(4):
        nodes.append(node("Einsum", [at, "w"], [f"e{i}"], f"e{i}", equation=equation))
        at = f"e{i}"
    nodes.append(node("Relu", [at], ["y"], "relu"))
    w = np.ones((4, 4), np.float32)
    assert _taken(tmp_path / "m.onnx", nodes, w=w).outputs[0].shape == (1, 3, 6, 4)


def test_gathering_of_places_adds_no_dimensions(tmp_path: Path) -> None:
    places = np.array(list(np.ndindex(1, 3, 6, 4))).reshape(1, 3, 6, 4, 4)
    nodes = [
        node("GatherND", ["x", "places"], ["a"], "a"),
        node("GatherND", ["a", "places"], ["b"], "b"),
        node("Conv", ["b", "w"], ["y"], "conv"),
    ]
    weights = np.ones((2, 3, 1, 1), np.float32)
    found = _taken(tmp_path / "m.onnx", nodes, places=places, w=weights)
    assert found.outputs[0].shape == (1, 2, 6, 4)


def test_a_convolution_has_the_rank_of_its_weights(tmp_path: Path) -> None:
    """Squeeze without axes takes away as many as have one element, which ranks do not say."""
    nodes, at = [], "x"
    for i in range(4):
        nodes += [
            node("GlobalAveragePool", [at], [f"g{i}"], f"g{i}"),
            node("Squeeze", [f"g{i}"], [f"s{i}"], f"s{i}"),
            node("Unsqueeze", [f"s{i}", "axes"], [f"u{i}"], f"u{i}"),
            node("Mul", [at, f"u{i}"], [f"m{i}"], f"m{i}"),
            node("Conv", [f"m{i}", "w"], [f"c{i}"], f"c{i}"),
        ]
        at = f"c{i}"
    nodes.append(node("Relu", [at], ["y"], "relu"))
    weights = np.ones((3, 3, 1, 1), np.float32)
    axes = np.array([0, 2, 3])
    found = _taken(tmp_path / "m.onnx", nodes, axes=axes, w=weights)
    assert found.outputs[0].shape == (1, 3, 6, 4)


def test_shapes_after_a_stand_in_are_folded_in_one_pass(tmp_path: Path) -> None:
    """onnx infers no shape of this operator, and each shape is known only when the one before is folded."""
    nodes = [
        node("GroupNormalization", ["x", "scale", "bias"], ["n"], "n", num_groups=3)
    ]
    at = "n"
    for i in range(12):
        nodes += [
            node("Shape", [at], [f"s{i}"], f"s{i}"),
            node("Reshape", [at, f"s{i}"], [f"r{i}"], f"r{i}"),
        ]
        if i == 5:
            nodes.append(
                node(
                    "GroupNormalization",
                    [f"r{i}", "scale", "bias"],
                    ["n2"],
                    "n2",
                    num_groups=3,
                )
            )
        at = "n2" if i == 5 else f"r{i}"
    nodes.append(node("Relu", [at], ["y"], "relu"))
    scale, bias = np.ones(3, np.float32), np.zeros(3, np.float32)
    found = _taken(tmp_path / "m.onnx", nodes, 21, scale=scale, bias=bias)
    assert found.outputs[0].shape == (1, 3, 6, 4)
