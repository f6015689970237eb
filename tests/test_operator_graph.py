"""The operator graph: what ONNX Runtime answers on the same model, before and after every pass."""

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
from integers import Graph as Writer
from integers import blocks, chain, graph_of, oddities, patterns, quantised, residuals
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from relay_worker import relay_worker

from bundle.manifest import ModelIdentity
from compile import passes
from compile.backends.c import support
from compile.backends.c.build import PASSES as C_PASSES
from compile.backends.dump import Dump, text_of
from compile.frontend import gate
from compile.ir import evaluate, onnx_form
from compile.ir.graph import Graph, Tensor, check
from compile.ir.kinds import KINDS, make
from compile.ir.operators import Convolution, Known, View
from compile.ir.pointwise import FUNCTIONS
from compile.passes import simplify
from compile.passes.channels import fill_blocks
from compile.passes.layout import channels_last
from compile.passes.storage import store_as_int8, store_as_uint8
from compile.passes.views import dequantise_before_views
from targets.errors import UserError
from targets.onnx_runtime import Session
from targets.presets import resolve

Floats = NDArray[np.float32]


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


def reference(proto: onnx.ModelProto, image: Floats) -> Floats:
    session = Session(proto.SerializeToString(), "reference")
    found: Floats = session.run([proto.graph.output[0].name], {"image": image})[0]
    return found


def seeded(shape: tuple[int, ...], seed: int = 0) -> Floats:
    return np.random.default_rng(seed).normal(0, 2, shape).astype(np.float32)


# Operators


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


SMALL: dict[str, Callable[[], onnx.ModelProto]] = {
    "residuals": residuals,
    "oddities": oddities,
    "blocks": blocks,
    "chain": chain,
}


@pytest.mark.parametrize("name", SMALL)
def test_every_operator_s_shape_rule_is_onnx_s_inference(name: str) -> None:
    graph = onnx_form.read(SMALL[name]())
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


# Passes


def _passes_of(graph: Graph) -> tuple[passes.Pass, ...]:
    if not graph.quantised and not any(
        each.kind == "QuantizeLinear" for each in graph.operators
    ):
        return (*passes.FLOATS, channels_last)
    return (
        *passes.INTEGERS,
        store_as_uint8,
        fill_blocks,
        store_as_int8,
        channels_last,
        dequantise_before_views,
    )


@pytest.mark.parametrize("kind", ["float32", "uint8", "int8"])
@pytest.mark.parametrize("name", SMALL)
def test_no_pass_changes_an_answer(name: str, kind: str, tmp_path: Path) -> None:
    proto = SMALL[name]()
    if kind != "float32":
        proto = quantised(proto, tmp_path, unsigned=kind == "uint8")
    graph = onnx_form.read(proto)
    seen: dict[str, Graph] = {}
    passes.run(_passes_of(graph), graph, lambda name, made: seen.update({name: made}))
    for image in patterns(proto, 2):
        expected = reference(proto, image)
        for pass_name, made in seen.items():
            ours = evaluate.run(made, image)[0]
            if any(each.macs and each.output.quantisation for each in made.operators):
                assert (ours == expected).all(), pass_name
            # The float operators of a QDQ graph round otherwise, until they are integers.
            most = 1e-4 if kind == "float32" else 0.1 * float(np.ptp(expected))
            assert np.abs(ours - expected).max() <= most, pass_name


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


def _edited(proto: onnx.ModelProto, name: str, value: Any) -> None:
    (tensor,) = (t for t in proto.graph.initializer if t.name == name)
    tensor.CopyFrom(numpy_helper.from_array(value, name))


def test_a_convolution_with_scales_per_input_channel_computes_in_float32(
    tmp_path: Path,
) -> None:
    proto = quantised(residuals(), tmp_path)
    reader = next(
        n
        for n in proto.graph.node
        if n.op_type == "DequantizeLinear" and n.input[0].startswith("a.project.weight")
    )
    (shape,) = (t.dims for t in proto.graph.initializer if t.name == reader.input[0])
    scales = np.linspace(0.002, 0.01, shape[1]).astype(np.float32)
    _edited(proto, reader.input[1], scales)
    _edited(proto, reader.input[2], np.zeros(shape[1], np.int8))
    (attribute,) = reader.attribute
    attribute.i = 1
    graph = graph_of(proto)
    floats = [
        each.label
        for each in graph.operators
        if each.macs and not each.output.quantisation
    ]
    assert floats == ["a.project"]
    (image,) = patterns(proto, 1)
    step = graph.operators[-1].input.scale
    ours = evaluate.run(graph, image)[0]
    assert np.abs(ours - _without_optimisations(proto, image)).max() <= 2 * step


def _without_optimisations(proto: onnx.ModelProto, image: Floats) -> Floats:
    """ONNX Runtime takes such a convolution's bias for one of integers otherwise."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = (
        onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    )
    session = onnxruntime.InferenceSession(proto.SerializeToString(), options)
    found: Floats = session.run(None, {"image": image})[0]
    return found


def test_a_dense_layer_behind_a_depthwise_one_is_no_projection() -> None:
    """Depthwise, Flatten, Gemm: the rows of a block were once projected as if the Gemm were a 1×1 convolution."""
    from compile.backends.c.arrange import arrange

    w = Writer(4, 6)
    x = w.convolution("dw", "image", 4, 4, 3, 1, depthwise=True)
    flat = w.node("Flatten", "flat", [x])
    weights = w.constant("w", seeded((3, 64)))
    w.node("Gemm", "scores", [flat, weights], transB=1)
    proto = w.finish((1, 3))
    graph = passes.run(C_PASSES, graph_of(proto))
    support.check(graph)
    assert [step.name for step in arrange(graph).steps] == ["dw", "scores"]
    (image,) = patterns(proto, 1)
    np.testing.assert_allclose(
        evaluate.run(graph, image)[0], reference(proto, image), atol=1e-4
    )


def test_a_view_that_would_have_to_move_values_is_refused_for_c() -> None:
    w = Writer(4, 6)
    x = w.convolution("stem", "image", 4, 8, 1)
    shape = w.constant("shape", np.array([1, 32, 3, 3], np.int64))
    x = w.node("Reshape", "midway", [x, shape])
    w.convolution("last", x, 32, 2, 1)
    graph = passes.run(C_PASSES, graph_of(w.finish((1, 2, 3, 3))))
    with pytest.raises(UserError, match="'midway' .*mixes channels with rows"):
        support.check(graph)


def test_a_flattened_image_as_output_is_not_taken_for_its_memory() -> None:
    w = Writer(4, 6)
    x = w.convolution("stem", "image", 4, 8, 1)
    w.node("Flatten", "flat", [x])
    graph = passes.run(C_PASSES, graph_of(w.finish((1, 288))))
    assert isinstance(graph.operators[-1], View) and not graph.operators[-1].in_place
    with pytest.raises(UserError, match="'flat' .*mixes channels with rows"):
        support.check(graph)


def _softmax_island(folder: Path) -> onnx.ModelProto:
    w = Writer(3, 8)
    x = w.convolution("stem", "image", 3, 8, 3)
    x = w.node("Softmax", "soft", [x], axis=1)
    x = w.convolution("last", x, 8, 4, 1, clip=False)
    w.classifier(x, 4, 3)
    return quantised(w.finish((1, 3)), folder)


def test_what_has_no_integer_form_stays_float_between_its_quantisers(
    tmp_path: Path,
) -> None:
    proto = _softmax_island(tmp_path)
    graph = graph_of(proto)
    kinds = [each.kind for each in graph.operators]
    at = kinds.index("Softmax")
    assert kinds[at - 1 : at + 2] == ["DequantizeLinear", "Softmax", "QuantizeLinear"]
    for image in patterns(proto, 2):
        step = 2 * graph.operators[-1].input.scale
        assert (
            np.abs(evaluate.run(graph, image)[0] - reference(proto, image)).max()
            <= step
        )


def test_functions_of_one_int8_value_are_tables_of_onnx_runtime(tmp_path: Path) -> None:
    """One operator, and products of a value with a function of it (SiLU, a gate of HardSigmoid)."""
    w = Writer(3, 9)
    x = w.convolution("a", "image", 3, 4, 3, clip=False)
    x = w.node("Mul", "silu", [x, w.node("Sigmoid", "gate", [x])])
    x = w.convolution("b", x, 4, 4, 1, clip=False)
    x = w.node("Tanh", "tanh", [x])
    x = w.convolution("c", x, 4, 4, 1, clip=False)
    gate = w.node("HardSigmoid", "hard gate", [x], alpha=-0.4, beta=0.3)
    x = w.node("Mul", "product", [x, gate])
    x = w.convolution("d", x, 4, 4, 1, clip=False)
    w.classifier(x, 4, 3)
    proto = quantised(w.finish((1, 3)), tmp_path)
    graph = graph_of(proto)
    kinds = [each.kind for each in graph.operators]
    assert kinds.count("table") == 3
    assert not {"Sigmoid", "HardSigmoid", "Mul"} & set(kinds)
    for image in patterns(proto, 3):
        expected = reference(proto, image)
        for each in (graph, store_as_int8(graph), store_as_uint8(graph)):
            assert (evaluate.run(each, image)[0] == expected).all()


# What a build says of it


def layers_of(model: bytes, target: str) -> list[tuple[str, int]]:
    """In a process that may compile: of each kernel with multiply-adds its layer, and how many those are."""
    from compile.relay.convert import to_relay
    from compile.relay.lower import lower

    graph = graph_of(onnx.load_model_from_string(model))
    preset = resolve(target)
    groups = lower(to_relay(graph, preset), preset, []).description.groups
    return [(group.layer, group.macs) for group in groups if group.macs]


@pytest.mark.parametrize(
    ("target", "unsigned"),
    [
        ("x86-64-v2", True),
        ("x86-64-v4", True),
        ("sapphirerapids", True),
        ("arm-cortex-a76", False),
    ],
)
def test_every_kernel_of_an_int8_build_names_its_layer(
    target: str, unsigned: bool, tmp_path: Path
) -> None:
    """On AVX-512 depthwise convolutions are an operator of ours, which once took all names away."""
    proto = quantised(blocks(), tmp_path, unsigned=unsigned)
    with relay_worker() as worker:
        found = worker.submit(layers_of, proto.SerializeToString(), target).result()
    heavy = [each for each in graph_of(proto).operators if each.macs]
    assert [layer for layer, _ in found] == [each.label for each in heavy]
    # Channels that fill up blocks count as what they cost.
    assert all(macs >= each.macs for (_, macs), each in zip(found, heavy, strict=True))


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


def test_a_dump_shows_every_pass_in_order(tmp_path: Path) -> None:
    dump = Dump(tmp_path / "dump")
    passes.read(residuals(), passes.FLOATS, dump.graph)
    files = sorted(path.name for path in (tmp_path / "dump").iterdir())
    assert files[:2] == ["00-graph-read.txt", "01-graph-drop-identities.txt"]
    assert len(files) == 1 + len(passes.FLOATS)
    last = (tmp_path / "dump" / files[-1]).read_text()
    assert last == text_of(passes.run(passes.FLOATS, onnx_form.read(residuals())))
    assert "'scores': float32[1×5] = Reshape(" in last
