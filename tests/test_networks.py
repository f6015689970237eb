"""The networks that other tests build: agreement on them means something."""

from __future__ import annotations

from collections.abc import Callable

import networks
import onnx
import pytest

TOLERANCE = 1e-4  # of the outputs' range
OURS = [networks.mobilenet_v1, networks.resnet18_like, networks.squeezenet_like]


@pytest.mark.parametrize("network", OURS)
@pytest.mark.parametrize("resolution", [64, 97])
def test_ours_answer_differently_for_different_inputs(
    network: Callable[..., onnx.ModelProto], resolution: int
) -> None:
    model = network(resolution=resolution)
    onnx.checker.check_model(model, full_check=True)
    assert networks.distinct(model) > 100 * TOLERANCE
    assert model == network(resolution=resolution)


@pytest.mark.parametrize("name", ["squeezenet", "shufflenet", "inception_v1"])
def test_light_models_answer_differently_once_their_weights_are_random(
    name: str,
) -> None:
    path = networks.light_models()[name]
    assert networks.distinct(onnx.load(path)) < TOLERANCE
    model = networks.with_random_weights(path)
    onnx.checker.check_model(model)
    assert networks.distinct(model) > 100 * TOLERANCE
    left = {node.op_type for node in model.graph.node}
    assert "ConstantOfShape" not in left
