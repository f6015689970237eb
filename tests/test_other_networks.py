"""CNNs that are not MobileNetV2 build and check with the same two commands."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import graphs
import networks
import onnx
import pytest
from conftest import succeed

# Of the range of the output.
NEAR = 2e-4


pytestmark = pytest.mark.slow


def _light(name: str) -> onnx.ModelProto:
    return networks.with_random_weights(networks.light_models()[name])


NETWORKS: dict[str, Callable[[], onnx.ModelProto]] = {
    "mobilenet_v1": networks.mobilenet_v1,
    "resnet18_like": networks.resnet18_like,
    "squeezenet_like": networks.squeezenet_like,
    **{f"light_{name}": partial(_light, name) for name in ("squeezenet", "shufflenet")},
}


@pytest.mark.parametrize("name", NETWORKS)
def test_another_network_builds_and_checks(
    name: str, tmp_path: Path, free_photos: list[Path]
) -> None:
    proto = NETWORKS[name]()
    # Two inputs must differ by far more than the tolerance, or agreement means nothing.
    assert networks.distinct(proto) > 100 * NEAR
    model, bundle = tmp_path / f"{name}.onnx", tmp_path / "bundle"
    onnx.save(proto, model)
    succeed("compile.build", "--model", model, "--output", bundle)
    options = ("--model", model, "--images", *free_photos, "--repeat", 1, "--json")
    result = json.loads(succeed("runtime_demo.check", bundle, *options))
    assert result["images"] == len(free_photos)
    assert result["relative_error"] <= NEAR
    assert result["top1_agreement"] == 1.0


@pytest.mark.parametrize(
    ("exporter", "opset"),
    [(graphs.torchscript_cnn, 11), (graphs.dynamo_cnn, 22), (graphs.tf2onnx_cnn, 18)],
)
def test_an_export_builds_and_runs_with_the_same_commands(
    exporter: Callable[[int], onnx.ModelProto],
    opset: int,
    tmp_path: Path,
    free_photos: list[Path],
) -> None:
    model, bundle = tmp_path / "mine.onnx", tmp_path / "bundle"
    external = exporter is graphs.dynamo_cnn
    onnx.save(exporter(opset), model, save_as_external_data=external, size_threshold=0)
    succeed("compile.build", "--model", model, "--output", bundle)
    options = ("--model", model, "--images", *free_photos, "--repeat", 1, "--json")
    result = json.loads(succeed("runtime_demo.check", bundle, *options))
    assert result["relative_error"] <= NEAR
    for image in result["results"]:
        # Softmax is in the graph: its probabilities are not softmaxed again.
        assert sum(answer["probability"] for answer in image["ours"]) == pytest.approx(
            1, abs=1e-5
        )
        assert [a["probability"] for a in image["ours"]] != [0.5, 0.5]
