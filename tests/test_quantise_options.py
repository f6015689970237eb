"""What a network is quantised with, and networks of several outputs or with float operators at their ends."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from integers import Graph as Writer
from integers import patterns, residuals
from onnx import helper, numpy_helper
from test_quantise import given, write_images

from netship.bundle.accuracy import compare
from netship.compile.frontend.reference import Reference
from netship.compile.ir.operators import float_shares, islands
from netship.compile.quantize import agreement, answer, judge
from netship.targets.errors import UserError


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    write_images(folder)
    return folder


def headed() -> onnx.ModelProto:
    """A class's probability, and a map of another size that a float operator makes of stored values."""
    w = Writer(3, 8)
    x = w.convolution("stem", "image", 3, 8, 3, 1, (1, 1, 1, 1))
    w.classifier(x, 8, 5)
    w.node("Softmax", "probabilities", ["scores"], axis=1)
    w.node("ReduceSum", "map", [x, w.constant("axes", np.array([1]))], keepdims=1)
    proto = w.finish((1, 1, 8, 8))
    first = helper.make_tensor_value_info("probabilities", 1, (1, 5))
    proto.graph.output.insert(0, first)
    return proto


def test_several_outputs_and_such_in_float32_are_taken(images: Path) -> None:
    options = (True, (images,))
    int8 = given(headed(), *options, trained=False, keep_float=["probabilities"])
    assert int8.measured["top1_agreement"] is None
    assert {each.label for each in islands(int8.graph)} == {"probabilities", "map"}
    reference = Reference(int8.model)
    for image in patterns(headed(), 2):
        check = answer.check(int8.graph, int8.model, reference, image)
        found = compare(reference.run(image), check.outputs, check.tolerances)
        assert found.cosine > 0.999
        # What rounding moves is far less than what a step moves.
        for near, step in zip(check.tolerances, int8.facts.output_steps, strict=True):
            assert 0 < near.max() < step / 10


def test_nodes_are_left_in_float32_on_request(images: Path) -> None:
    int8 = given(residuals(), True, (images,), keep_float=["head"], trained=False)
    assert [each.label for each in islands(int8.graph) if each.macs] == ["head"]
    assert int8.facts.keep_float == ("head",)
    assert 0 < float_shares(int8.graph)[0] < 0.5
    with pytest.raises(UserError, match="'stemm': there is no such node.*'stem'"):
        given(residuals(), True, (images,), keep_float=["stemm"])
    with pytest.raises(UserError, match="--strict-int8: small.onnx .*'head'"):
        given(residuals(), True, (images,), keep_float=["head"], strict=True)
    assert given(residuals(), True, (images,), trained=False, strict=True)


def test_a_loss_is_accepted_on_request_and_recorded(
    monkeypatch: pytest.MonkeyPatch, images: Path
) -> None:
    for module in (agreement, judge):
        monkeypatch.setattr(module, "INT8_COSINE", 1.1)
    int8 = given(residuals(), True, (images,), accept_loss=True)
    assert int8.facts.accepted_loss.startswith("int8 loses too much: ")


@pytest.mark.parametrize("shape", [(), (1, 12), (12,)])
def test_the_quantiser_takes_every_bias_of_a_gemm(
    shape: tuple[int, ...], images: Path
) -> None:
    w = Writer(3, 8)
    x = w.convolution("stem", "image", 3, 8, 3)
    flat = w.node("Flatten", "flat", [w.node("GlobalAveragePool", "pool", [x])])
    weights = w.random.normal(size=(8, 12)).astype(np.float32)
    bias = w.random.normal(size=shape).astype(np.float32)
    names = [w.constant("w", weights), w.constant("b", np.asarray(bias))]
    w.node("Gemm", "scores", [flat, *names])
    int8 = given(w.finish((1, 12)), True, (images,), trained=False)
    assert islands(int8.graph) == []


def test_a_layer_left_in_float32_is_so_in_the_reference(images: Path) -> None:
    """ONNX Runtime by default gives its weights one int8 scale, too coarse where the channels differ."""
    proto = residuals()
    (weights,) = (x for x in proto.graph.initializer if x.name == "b.depthwise.weight")
    values = numpy_helper.to_array(weights).copy()
    values[0] *= 100
    weights.CopyFrom(numpy_helper.from_array(values, weights.name))
    int8 = given(proto, True, (images,), keep_float=["b.depthwise"], trained=False)
    assert "b.depthwise" in {each.label for each in islands(int8.graph)}
    reference = Reference(int8.model)
    for image in patterns(proto, 2):
        answer.check(int8.graph, int8.model, reference, image)
