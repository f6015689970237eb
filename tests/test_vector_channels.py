"""Heads of an odd number of channels: whole vectors, and ONNX Runtime's answers."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from relay_worker import relay_worker, through_product

_X = np.random.default_rng(5).normal(0, 1, (1, 6, 5, 7)).astype(np.float32)
_MOVED = "Transpose"


def head(channels: int, kind: str, bias: bool = True) -> bytes:
    """A 3×3 convolution of ``channels`` outputs and one operator of ``kind`` behind it, or none."""
    random = np.random.default_rng(channels)
    weights = {
        "w": random.normal(0, 0.2, (channels, 6, 3, 3)),
        "b": random.normal(0, 0.2, channels),
    }
    inputs = ["x", "w", "b"] if bias else ["x", "w"]
    behind = [helper.make_node(kind, ["c"], ["y"])] if kind else []
    if kind == _MOVED:
        behind[0].attribute.append(helper.make_attribute("perm", [0, 2, 3, 1]))
    shape = [1, 5, 7, channels] if kind == _MOVED else [1, channels, 5, 7]
    graph = helper.make_graph(
        [
            helper.make_node("Conv", inputs, ["c" if kind else "y"], pads=[1, 1, 1, 1]),
            *behind,
        ],
        "head",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, _X.shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, shape)],
        [
            numpy_helper.from_array(weights[name].astype(np.float32), name)
            for name in inputs[1:]
        ],
    )
    proto = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8
    )
    onnx.checker.check_model(proto)
    return bytes(proto.SerializeToString())


def convolved(network: bytes) -> tuple[int, int]:
    """Channels of the convolution that is compiled, and how often channels are cut off behind it."""
    from netship.compile.ir import onnx_form
    from netship.compile.relay import module_passes
    from netship.compile.relay.expressions import calls, shape
    from netship.compile.relay.importer import to_relay

    module = to_relay(onnx_form.read(onnx.load_model_from_string(network)))
    found = calls(module_passes.run(module_passes.FOLD, module)["main"])
    (width,) = (shape(c.checked_type)[1] for c in found if c.op.name == "nn.conv2d")
    return width, sum(c.op.name == "strided_slice" for c in found)


def filled(channels: int) -> int:
    from netship.compile.relay.vector_channels import whole

    return whole(channels)


@pytest.fixture(scope="module")
def worker() -> Iterator[ProcessPoolExecutor]:
    with relay_worker() as pool:
        yield pool


@pytest.mark.parametrize(
    "channels, kind, bias, compiled",
    [
        (243, _MOVED, True, 256),
        (255, "", True, 256),
        (21, _MOVED, False, 24),
        (18, _MOVED, True, 20),
        # Whole vectors of four already; few channels; read by an operator of the convolution's own kernel.
        (20, _MOVED, True, 20),
        (10, _MOVED, True, 10),
        (21, "Relu", True, 21),
    ],
)
def test_an_odd_head_computes_in_whole_vectors(
    worker: ProcessPoolExecutor, channels: int, kind: str, bias: bool, compiled: int
) -> None:
    network = head(channels, kind, bias)
    width, cuts = worker.submit(convolved, network).result()
    assert (width, cuts) == (compiled, int(compiled != channels))
    _, _, passed = worker.submit(through_product, network, _X).result()
    assert passed


def test_vectors_add_a_quarter_at_most(worker: ProcessPoolExecutor) -> None:
    for channels in range(16, 600):
        wide = worker.submit(filled, channels).result()
        assert wide % 4 == 0 and channels <= wide < channels * 1.25
