"""The importer into Relay: its work for an operator does not grow with the network, and what is shared stays shared."""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from relay_worker import relay_worker


def network(links: int) -> bytes:
    """Convolutions and sums in a chain; all of them have the same weights."""
    body = " ".join(
        f"c{i} = Conv<pads = [1, 1, 1, 1]>(v{i}, w) v{i + 1} = Add(c{i}, v{i})"
        for i in range(links)
    )
    proto = onnx.parser.parse_model(
        f"""<ir_version: 8, opset_import: ["": 18]>
        agraph (float[1,3,4,4] v0) => (float[1,3,4,4] v{links}) <float[3,3,3,3] w> {{ {body} }}"""
    )
    weights = np.random.default_rng(2).normal(0, 0.1, (3, 3, 3, 3)).astype(np.float32)
    proto.graph.initializer.append(numpy_helper.from_array(weights, "w"))
    return bytes(proto.SerializeToString())


def imported(data: bytes) -> tuple[int, int, int]:
    """Nodes of the largest expression that is folded, constants of the module, and its calls."""
    from tvm import relay
    from tvm.relay.frontend import common

    from netship.compile.ir import onnx_form
    from netship.compile.relay import importer
    from netship.compile.relay.expressions import calls, nodes

    largest, fold = 0, common._transform.FoldConstantExpr

    def counted(expression: Any, module: Any) -> Any:
        nonlocal largest
        largest = max(largest, len(nodes(expression)))
        return fold(expression, module)

    common._transform.FoldConstantExpr = counted
    try:
        module = importer.to_relay(onnx_form.read(onnx.load_model_from_string(data)))
    finally:
        common._transform.FoldConstantExpr = fold
    found = nodes(module["main"])
    constants = [each for each in found if isinstance(each, relay.Constant)]
    return largest, len(constants), len(calls(module["main"]))


@pytest.fixture(scope="module")
def worker() -> Any:
    with relay_worker() as pool:
        yield pool


def test_an_operators_work_does_not_grow_with_what_lies_before(
    worker: ProcessPoolExecutor,
) -> None:
    few, many = (worker.submit(imported, network(n)).result() for n in (3, 60))
    assert 0 < few[0] == many[0] < 10
    assert (few[2], many[2]) == (6, 120)


def test_weights_of_several_operators_are_one_constant(
    worker: ProcessPoolExecutor,
) -> None:
    assert worker.submit(imported, network(5)).result()[1] == 1
