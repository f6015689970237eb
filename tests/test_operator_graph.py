"""The operator graph: its shapes, its numbers against ONNX Runtime's, its checks, its dump."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from integers import blocks, chain, graph_of, oddities, patterns, quantised, residuals
from onnx import TensorProto, helper, numpy_helper
from reference_answers import reference, seeded

from netship.bundle.manifest import ModelIdentity
from netship.compile import passes
from netship.compile.backends.dump import Dump, text_of
from netship.compile.frontend import gate
from netship.compile.ir import evaluate, onnx_form
from netship.compile.ir.graph import Graph, Tensor, check
from netship.compile.ir.kinds import KINDS, make
from netship.compile.ir.operators import Convolution, Known
from netship.compile.ir.pointwise import FUNCTIONS
from netship.compile.passes import simplify
from netship.targets.errors import UserError
from netship.targets.onnx_runtime import Session


def model_of(
    nodes: list[onnx.NodeProto],
    shape: tuple[int, ...],
    output: tuple[int, ...],
    constants: dict[str, Any] | None = None,
    opset: int = 17,
) -> onnx.ModelProto:
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes,
        "g",
        [value("image", TensorProto.FLOAT, shape)],
        [value(nodes[-1].output[0], TensorProto.FLOAT, output)],
        [
            numpy_helper.from_array(np.asarray(v), k)
            for k, v in (constants or {}).items()
        ],
    )
    return helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8
    )


# Operators and passes


@st.composite
def convolutions(draw: st.DrawFn) -> onnx.ModelProto:
    group = draw(st.sampled_from([1, 1, 2, 3]))
    into, out = (group * draw(st.integers(1, 3)) for _ in range(2))
    kernel = [draw(st.integers(1, 3)) for _ in range(2)]
    sizes = [draw(st.integers(6, 9)) for _ in range(2)]
    random = np.random.default_rng(draw(st.integers(0, 99)))
    weights = random.normal(size=(out, into // group, *kernel)).astype(np.float32)
    names = ["image", "w", *(["b"] if draw(st.booleans()) else [])]
    node = helper.make_node(
        "Conv",
        names,
        ["y"],
        group=group,
        strides=[draw(st.integers(1, 3)) for _ in range(2)],
        **draw(  # type: ignore[arg-type]
            st.sampled_from(
                [
                    {
                        "pads": [draw(st.integers(0, 2)) for _ in range(4)],
                        "dilations": [draw(st.integers(1, 2)) for _ in range(2)],
                    },
                    {"auto_pad": "SAME_UPPER"},
                    {"auto_pad": "SAME_LOWER"},
                    {"auto_pad": "VALID"},
                ]
            )
        ),
    )
    bias = random.normal(size=out).astype(np.float32)
    proto = model_of(
        [node], (1, into, *sizes), (1, out, 1, 1), {"w": weights, "b": bias}
    )
    del proto.graph.output[0].type.tensor_type.shape.dim[:]
    proto.graph.output[0].type.tensor_type.ClearField("shape")
    return proto


@settings(deadline=None, max_examples=60)
@given(convolutions())
def test_convolutions_are_those_of_onnx_runtime(proto: onnx.ModelProto) -> None:
    graph = onnx_form.read(proto)
    (operator,) = graph.operators
    assert isinstance(operator, Convolution)
    assert operator.shape() == operator.output.shape
    image = seeded(graph.inputs[0].shape)
    np.testing.assert_allclose(
        evaluate.run(graph, image)[0], reference(proto, image), rtol=0, atol=1e-4
    )


@pytest.mark.parametrize("network", [residuals, oddities, blocks, chain])
def test_every_operator_s_shape_rule_is_onnx_s_inference(
    network: Callable[[], onnx.ModelProto],
) -> None:
    graph = onnx_form.read(network())
    known = [each for each in graph.operators if isinstance(each, Known)]
    assert len(known) == len(graph.operators)
    for operator in known:
        assert operator.shape() == operator.output.shape, operator.label


@pytest.mark.parametrize("kind", FUNCTIONS)
def test_functions_of_one_value_are_those_of_onnx_runtime(kind: str) -> None:
    names, constants = ["image"], {}
    attributes: dict[str, Any] = {}
    if kind == "Clip":
        names, constants = (
            ["image", "low", "high"],
            {"low": np.float32(-0.5), "high": np.float32(1.5)},
        )
    elif FUNCTIONS[kind].parameters:
        attributes = {
            name: each * 1.5 for name, each in FUNCTIONS[kind].parameters.items()
        }
    proto = model_of(
        [helper.make_node(kind, names, ["y"], "f", **attributes)],
        (1, 1, 30, 30),
        (1, 1, 30, 30),
        constants,
    )
    graph = onnx_form.read(proto)
    image = seeded((1, 1, 30, 30))
    image[0, 0, 0, :4] = 0, 1, -1, 100
    if kind == "Sqrt":
        image = np.abs(image)
    np.testing.assert_allclose(
        evaluate.run(graph, image)[0], reference(proto, image), rtol=2e-6, atol=1e-6
    )


def test_what_has_no_class_has_onnx_s_numbers() -> None:
    proto = model_of(
        [helper.make_node("Softmax", ["image"], ["y"], axis=1)],
        (1, 5, 2, 2),
        (1, 5, 2, 2),
    )
    graph = onnx_form.read(proto)
    assert "Softmax" not in KINDS
    image = seeded((1, 5, 2, 2))
    np.testing.assert_allclose(
        evaluate.run(graph, image)[0], reference(proto, image), atol=1e-6
    )


def test_batch_normalisation_is_folded_to_onnx_runtime_s_bits(tmp_path: Path) -> None:
    random = np.random.default_rng(3)
    for bias in (True, False):
        constants = {
            "w": random.normal(size=(8, 3, 3, 3)),
            **({"b": random.normal(size=8)} if bias else {}),
            **{name: random.normal(size=8) for name in ("scale", "shift", "mean")},
            "variance": random.uniform(0.1, 2, 8),
        }
        proto = model_of(
            [
                helper.make_node(
                    "Conv", ["image", "w", *(["b"] if bias else [])], ["c"], "conv"
                ),
                helper.make_node(
                    "BatchNormalization",
                    ["c", "scale", "shift", "mean", "variance"],
                    ["y"],
                    "norm",
                    epsilon=1e-3,
                ),
            ],
            (1, 3, 8, 8),
            (1, 8, 6, 6),
            {name: value.astype(np.float32) for name, value in constants.items()},
        )
        file = tmp_path / f"folded{bias}.onnx"
        Session(proto.SerializeToString(), "m", optimisation="basic", optimised=file)
        (node,) = onnx.load(file).graph.node
        folded = {
            i.name: numpy_helper.to_array(i) for i in onnx.load(file).graph.initializer
        }
        (ours,) = simplify.fold_normalisation(onnx_form.read(proto)).operators
        assert isinstance(ours, Convolution) and ours.label == "conv"
        assert np.array_equal(ours.weights.transpose(0, 3, 1, 2), folded[node.input[1]])
        assert np.array_equal(ours.bias, folded[node.input[2]])


def test_two_nodes_of_one_name_are_two_operators(tmp_path: Path) -> None:
    """A node's name need not be the only one; tensors are known by theirs."""
    proto = quantised(residuals(), tmp_path)
    (image,) = patterns(proto, 1)
    expected = reference(proto, image)
    for node in proto.graph.node:
        node.name = "same"
    assert (evaluate.run(graph_of(proto), image)[0] == expected).all()
    # ONNX Runtime refuses such a model, so that the gate tells them apart.
    gated = gate.check(proto, ModelIdentity(name="m.onnx", sha256="0" * 64)).proto
    assert (reference(gated, image) == expected).all()
    assert [node.name for node in gated.graph.node][:3] == [
        "same",
        "same (2)",
        "same (3)",
    ]


# The graph itself


def test_a_pass_that_goes_wrong_is_noticed() -> None:
    graph = onnx_form.read(residuals())
    first, second, *rest = graph.operators
    with pytest.raises(ValueError, match="reads"):
        check(replace(graph, operators=(second, first, *rest)))
    with pytest.raises(ValueError, match="makes .* again"):
        check(replace(graph, operators=(first, first, second, *rest)))
    other = replace(first.output, shape=(1, 1))
    with pytest.raises(ValueError, match="made is"):
        check(replace(graph, outputs=(replace(graph.outputs[0], dtype="int8"),)))
    changed = first.with_tensors({first.output.name: other})
    with pytest.raises(ValueError, match="reads"):
        check(replace(graph, operators=(changed, second, *rest)))


def test_names_of_new_tensors_are_nobody_s() -> None:
    tensor = Tensor("x", (1, 2, 3, 4))
    made = make("Relu", "", [tensor], [replace(tensor, name="x/new")])
    fresh = Graph((tensor,), made.outputs, (made,)).fresh_names()
    assert [fresh("x/new"), fresh("x/new"), fresh("y")] == ["x/new/2", "x/new/3", "y"]


def test_a_dump_removes_its_own_files_only(tmp_path: Path) -> None:
    for name in ("12-notes.txt", "12-graph-old.txt", "13-relay-old.txt"):
        (tmp_path / name).write_text("x")
    Dump(tmp_path, fresh=True)
    assert [path.name for path in tmp_path.iterdir()] == ["12-notes.txt"]
    for name in ("tir.txt", "library.c"):
        (tmp_path / name).write_text("a user's")
    Dump(tmp_path, fresh=True)
    assert len(list(tmp_path.iterdir())) == 3
    for name in ("00-graph-read.txt", "model.s", "kernels.txt"):
        (tmp_path / name).write_text("of an earlier build")
    Dump(tmp_path, fresh=True)
    assert [path.name for path in tmp_path.iterdir()] == ["12-notes.txt"]
    with pytest.raises(UserError, match="--dump .*12-notes.txt: File exists; give a"):
        Dump(tmp_path / "12-notes.txt")


def test_a_dump_shows_every_pass_in_order(tmp_path: Path) -> None:
    dump = Dump(tmp_path / "dump")
    passes.read(residuals(), passes.FLOATS, dump.graph)
    files = sorted(path.name for path in (tmp_path / "dump").iterdir())
    assert files[:2] == ["00-graph-read.txt", "01-graph-drop-identities.txt"]
    assert len(files) == 1 + len(passes.FLOATS)
    last = (tmp_path / "dump" / files[-1]).read_text()
    assert last == text_of(passes.run(passes.FLOATS, onnx_form.read(residuals())))
    assert "'scores': float32[1×5] = Reshape(" in last
