"""Biases take back what the rounding of weights to int8 moves outputs by."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from gated import small
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from netship.compile import passes
from netship.compile.frontend.gate import load
from netship.compile.frontend.model import Model
from netship.compile.frontend.reference import Reference
from netship.compile.ir.operators import Convolution
from netship.compile.quantize import bias, calibrate
from netship.targets.progress import Progress

Array = NDArray[np.float32]

RANDOM = np.random.default_rng(3)
SHAPE = (1, 4, 6, 6)


def heavy(*shape: int) -> Any:
    """Weights of which one is so large that the others of its channel round coarsely."""
    weights = RANDOM.uniform(0.05, 0.2, shape).astype(np.float32)
    weights.reshape(shape[0], -1)[:, 0] = 40
    return weights


def network(kind: str) -> onnx.ModelProto:
    node = helper.make_node
    constants = {"w": heavy(6, 4, 1, 1), "b": RANDOM.normal(size=6).astype(np.float32)}
    if kind == "grouped":
        constants["w"] = heavy(6, 2, 3, 3)
        nodes = [node("Conv", ["x", "w", "b"], ["y"], group=2, pads=[1] * 4)]
    elif kind == "no bias":
        nodes = [node("Conv", ["x", "w"], ["y"])]
    elif kind == "dense":
        constants["w"] = heavy(6, 144)
        nodes = [
            node("Flatten", ["x"], ["flat"]),
            node("Gemm", ["flat", "w", "b"], ["y"], transB=1, alpha=0.5),
        ]
    elif kind == "dense transposed":
        constants["w"] = np.ascontiguousarray(heavy(6, 144).T)
        nodes = [
            node("Flatten", ["x"], ["flat"]),
            node("Gemm", ["flat", "w"], ["y"]),
        ]
    else:
        nodes = [node("Conv", ["x", "w", "b"], ["y"])]
    return small(nodes, constants, shape=list(SHAPE))


def images() -> list[Any]:
    return [RANDOM.uniform(0, 1, SHAPE).astype(np.float32) for _ in range(8)]


KINDS = ["plain", "grouped", "no bias", "dense", "dense transposed"]


@pytest.fixture(params=KINDS)
def model(request: pytest.FixtureRequest, tmp_path: Path) -> Model:
    onnx.save(network(request.param), tmp_path / "m.onnx")
    return load(tmp_path / "m.onnx")


def quantised(model: Model, inputs: Sequence[Array]) -> Model:
    return calibrate.quantise(
        model, [[x] for x in inputs], True, Progress(quiet=True)
    ).model


def shifts(model: Model, int8: Model, inputs: Sequence[Array]) -> Array:
    """How far each output is off on average over the images; of a convolution each channel."""
    floating, ours = Reference(model), Reference(int8)
    off = np.mean([ours.run(x)[0] - floating.run(x)[0] for x in inputs], axis=0)
    means: Array = off.reshape(6, -1).mean(axis=1)
    return means


def test_channels_keep_their_means(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = [RANDOM.uniform(0, 1, SHAPE).astype(np.float32) for _ in range(8)]
    corrected = shifts(model, quantised(model, inputs), inputs)
    monkeypatch.setattr(bias, "corrected", lambda proto, *_: proto)
    plain = shifts(model, quantised(model, inputs), inputs)
    assert np.abs(corrected).mean() < np.abs(plain).mean() / 2


def test_the_rounding_is_the_quantisers(model: Model) -> None:
    inputs = [RANDOM.uniform(0, 1, SHAPE).astype(np.float32)]
    proto = quantised(model, inputs).proto
    constants = arrays(proto)
    (stored,) = (k for k, v in constants.items() if v.dtype == np.int8 and v.ndim > 1)
    (node,) = (n for n in proto.graph.node if n.input[0] == stored)
    (axis,) = (a.i for a in node.attribute if a.name == "axis")
    weights = np.moveaxis(constants[stored].astype(np.float32), axis, 0)
    scales = constants[node.input[1]].reshape(-1, *[1] * (weights.ndim - 1))
    (given,) = (v for v in arrays(model.proto).values() if v.ndim > 1)
    given = np.moveaxis(given, axis, 0)
    assert np.allclose(weights * scales - given, bias.rounding(given), atol=1e-6)


def arrays(proto: onnx.ModelProto) -> dict[str, Any]:
    return {each.name: numpy_helper.to_array(each) for each in proto.graph.initializer}


def test_a_layer_that_stays_in_float32_keeps_its_bias() -> None:
    proto = network("plain")
    proto.graph.node[0].name = "head"
    inputs = [RANDOM.uniform(0, 1, SHAPE).astype(np.float32)]
    feeds = [{proto.graph.input[0].name: x} for x in inputs]
    kept = bias.corrected(proto, feeds, ["head"])
    assert kept.SerializeToString() == proto.SerializeToString()
    assert bias.corrected(proto, feeds, []).graph.node[0].input[2] != "b"


def test_a_dense_layer_of_a_transposed_input_keeps_its_bias() -> None:
    nodes = [
        helper.make_node("Reshape", ["x", "column"], ["c"]),
        helper.make_node("Gemm", ["c", "w", "b"], ["y"], transA=1),
    ]
    constants = {"w": heavy(144, 6), "b": np.ones(6, np.float32)}
    constants["column"] = np.array([144, 1])
    proto = small(nodes, constants, shape=list(SHAPE))
    feeds = [{"x": RANDOM.uniform(0, 1, SHAPE).astype(np.float32)}]
    kept = bias.corrected(proto, feeds, [])
    assert kept.SerializeToString() == proto.SerializeToString()


def test_a_channel_that_is_nearly_dead_leaves_room_for_its_sums(
    tmp_path: Path,
) -> None:
    proto = network("grouped")
    weights, added = (numpy_helper.to_array(each) for each in proto.graph.initializer)
    dead = weights.copy()
    # The bias takes all of 32 bits; of these weights some 60 steps are left.
    dead[2] = 3.6e-5
    proto.graph.initializer[0].CopyFrom(numpy_helper.from_array(dead, "w"))
    proto.graph.initializer[1].CopyFrom(numpy_helper.from_array(added - 5, "b"))
    onnx.save(proto, tmp_path / "m.onnx")
    model = load(tmp_path / "m.onnx")
    inputs = [RANDOM.uniform(0, 1, SHAPE).astype(np.float32) for _ in range(4)]
    int8 = quantised(model, inputs)
    graph = passes.read(int8.proto, passes.INTEGERS)
    (convolution,) = (each for each in graph.operators if isinstance(each, Convolution))
    assert convolution.requantisation.largest.max() < 1 << 31
    step = np.ptp(Reference(model).run(inputs[0])[0]) / 100
    off = np.abs(Reference(int8).run(inputs[0])[0] - Reference(model).run(inputs[0])[0])
    assert off[0, 2].max() < step
