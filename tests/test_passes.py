"""Passes of the operator graph change no answer, and leave in float32 what has no integer form."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from integers import Graph as Writer
from integers import (
    blocks,
    chain,
    graph_of,
    oddities,
    patterns,
    project,
    quantised,
    residuals,
    several_rows,
)
from onnx import numpy_helper
from reference_answers import Floats, reference, seeded
from relay_worker import relay_worker

from netship.bundle.manifest import ModelIdentity
from netship.compile import passes
from netship.compile.backends.c import support
from netship.compile.backends.c.build import PASSES as C_PASSES
from netship.compile.backends.c.steps import fuse
from netship.compile.frontend import gate
from netship.compile.ir import evaluate, onnx_form
from netship.compile.ir.graph import Graph
from netship.compile.ir.operators import View, islands
from netship.compile.passes.channels import fill_blocks
from netship.compile.passes.layout import channels_last
from netship.compile.passes.storage import store_as_int8, store_as_uint8
from netship.compile.passes.views import dequantise_before_views
from netship.targets.presets import resolve

SMALL: dict[str, Callable[[], onnx.ModelProto]] = {
    "residuals": residuals,
    "oddities": oddities,
    "blocks": blocks,
    "chain": chain,
    "several rows": several_rows,
}


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
    w = Writer(4, 6)
    x = w.convolution("dw", "image", 4, 4, 3, 1, depthwise=True)
    flat = w.node("Flatten", "flat", [x])
    weights = w.constant("w", seeded((3, 64)))
    w.node("Gemm", "scores", [flat, weights], transB=1)
    proto = w.finish((1, 3))
    graph = passes.run(C_PASSES, graph_of(proto))
    support.check(graph)
    assert [step.name for step in fuse(graph)] == ["dw", "scores"]
    (image,) = patterns(proto, 1)
    np.testing.assert_allclose(
        evaluate.run(graph, image)[0], reference(proto, image), atol=1e-4
    )


def test_a_view_that_has_to_move_values_is_a_step_for_c() -> None:
    w = Writer(4, 6)
    x = w.convolution("stem", "image", 4, 8, 1)
    shape = w.constant("shape", np.array([1, 32, 3, 3], np.int64))
    x = w.node("Reshape", "midway", [x, shape])
    w.convolution("last", x, 32, 2, 1)
    graph = passes.run(C_PASSES, graph_of(w.finish((1, 2, 3, 3))))
    assert [step.name for step in fuse(graph)] == ["stem", "midway", "last"]


def test_a_flattened_image_as_output_is_not_taken_for_its_memory() -> None:
    w = Writer(4, 6)
    x = w.convolution("stem", "image", 4, 8, 1)
    w.node("Flatten", "flat", [x])
    graph = passes.run(C_PASSES, graph_of(w.finish((1, 288))))
    assert isinstance(graph.operators[-1], View) and not graph.operators[-1].in_place
    assert [step.name for step in fuse(graph)] == ["stem", "flat"]


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


@pytest.mark.parametrize("unsigned", [False, True])
def test_rows_times_a_matrix_are_integers(unsigned: bool, tmp_path: Path) -> None:
    w = Writer(3, 8)
    x = w.convolution("stem", "image", 3, 8, 1, clip=False)
    x = w.node("Reshape", "tokens", [x, w.constant("s", np.array([1, 8, 64]))])
    x = w.node("Transpose", "turned", [x], perm=[0, 2, 1])
    x = w.node("MatMul", "a", [x, w.constant("aw", seeded((8, 12)))])
    x = w.node("Add", "b", [x, w.constant("bw", seeded((12,)))])
    x = w.node("Transpose", "back", [x], perm=[0, 2, 1])
    x = w.node("Reshape", "map", [x, w.constant("m", np.array([1, 12, 8, 8]))])
    w.classifier(x, 12, 3)
    proto = quantised(w.finish((1, 3)), tmp_path, unsigned=unsigned)
    graph = graph_of(proto)
    assert islands(graph) == []
    assert sum(each.macs for each in graph.operators if each.label == "a") == 64 * 96
    for image in patterns(proto, 3):
        expected = reference(proto, image)
        for each in (graph, store_as_int8(graph), fill_blocks(store_as_uint8(graph))):
            assert (evaluate.run(each, image)[0] == expected).all()


@pytest.mark.parametrize(
    "bounds",
    [
        [(-3, -1), (0, None)],
        [(-3, -1), (-0.5, None)],
        [(1, 2), (None, 0.5)],
        [(1, 0.3)],
    ],
)
def test_limits_behind_each_other_are_what_the_last_one_leaves(
    bounds: list[tuple[float | None, float | None]],
) -> None:
    """They need not overlap, and a min above the max is that max."""
    w = Writer(3, 6)
    x = w.convolution("stem", "image", 3, 4, 1, clip=False)
    for index, pair in enumerate(bounds):
        names = [
            "" if v is None else w.constant(f"{index}/{k}", np.array(v, np.float32))
            for k, v in zip(("low", "high"), pair, strict=True)
        ]
        x = w.node("Clip", f"clip{index}", [x, *names])
    proto = w.finish((1, 4, 6, 6))
    model = gate.check(proto, ModelIdentity(name="m", sha256="0" * 64))
    graph = passes.run(C_PASSES, graph_of(model.proto))
    assert [each.kind for each in graph.operators] == ["Conv"]
    (image,) = patterns(proto, 1)
    np.testing.assert_allclose(
        evaluate.run(graph, image)[0], reference(proto, image), atol=1e-5
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
    from netship.compile.relay.convert import to_relay
    from netship.compile.relay.lower import lower

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


def test_a_detection_head_moves_nothing_for_c(tmp_path: Path) -> None:
    """Transpose to [1, height, width, channels], then Reshape: pixels of channels are that in memory."""
    w = Writer(3, 6)
    x = w.convolution("stem", "image", 3, 8, 1)
    x = w.node("Transpose", "last", [x], perm=[0, 2, 3, 1])
    x = w.node("Sigmoid", "likely", [x])
    shape = w.constant("shape", np.array([1, 72, 4], np.int64))
    x = w.node("Reshape", "boxes", [x, shape])
    shape = w.constant("shape of rows", np.array([1, 36, 8], np.int64))
    w.node("Reshape", "rows", [x, shape])
    proto = w.finish((1, 36, 8))
    graph = passes.run(C_PASSES, graph_of(proto))
    assert [step.name for step in fuse(graph)] == ["stem", "likely"]
    # Compares the C with ONNX Runtime.
    project(proto, tmp_path / "c")
