"""A user's own export builds: what PyTorch's two exporters and tf2onnx write answers as in ONNX Runtime."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import graphs
import numpy as np
import onnx
import pytest
from relay_worker import (
    relay_worker,
    through_onnxruntime,
    through_relay,
    worst_difference,
)

from netship.compile.frontend.gate import load

EXPORTERS: dict[str, tuple[Callable[[int], onnx.ModelProto], range]] = {
    "torchscript": (graphs.torchscript_cnn, range(11, 21)),
    "dynamo": (graphs.dynamo_cnn, range(18, 23)),
    "dynamo-functions": (partial(graphs.dynamo_cnn, functions=True), range(18, 19)),
    "tf2onnx": (graphs.tf2onnx_cnn, range(11, 19)),
    "tf2onnx-auto_pad": (partial(graphs.tf2onnx_cnn, auto_pad=True), range(11, 19)),
}
# Each exporter's oldest and newest opset always; those between where there is time.
CASES = [
    pytest.param(
        name, opset, marks=[] if opset in (opsets[0], opsets[-1]) else pytest.mark.slow
    )
    for name, (_, opsets) in EXPORTERS.items()
    for opset in opsets
]


@pytest.fixture(scope="module")
def relay() -> Iterator[ProcessPoolExecutor]:
    with relay_worker() as worker:
        yield worker


@pytest.mark.parametrize(("exporter", "opset"), CASES)
def test_an_export_answers_as_in_onnxruntime(
    exporter: str, opset: int, tmp_path: Path, relay: ProcessPoolExecutor
) -> None:
    make, _ = EXPORTERS[exporter]
    path = tmp_path / "model.onnx"
    external = exporter == "dynamo"
    onnx.save(make(opset), path, save_as_external_data=external, size_threshold=0)

    model = load(path)

    assert model.inputs[0].layout == (
        "NHWC" if exporter.startswith("tf2onnx") else "NCHW"
    )
    assert model.inputs[0].shape[0] == 1
    assert model.outputs[0].shape == (1, 2)
    assert model.probabilities
    assert len(model.notes) == 1
    assert "batch" in model.notes[0]
    assert bool(model.identity.external_data) == external
    proto = model.proto.SerializeToString()
    inputs = [graphs.image(model.inputs[0].shape, seed) for seed in range(2)]
    expected = through_onnxruntime(proto, inputs)
    got = relay.submit(through_relay, proto, inputs, optimise=False).result()
    for ours, reference in zip(got, expected, strict=True):
        assert worst_difference(ours, reference) < 1e-5
    # Else the comparison would prove nothing.
    assert np.abs(expected[0][0] - expected[1][0]).max() > 100 * 1e-5
