"""Small networks of several inputs, of every kind that a network may have."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

FLOAT, INT64, INT32 = TensorProto.FLOAT, TensorProto.INT64, TensorProto.INT32


def network(
    inputs: dict[str, tuple[int, Sequence[int]]],
    nodes: Sequence[onnx.NodeProto],
    outputs: dict[str, Sequence[int]],
    weights: dict[str, Any] | None = None,
    kinds: dict[str, int] | None = None,
) -> onnx.ModelProto:
    """A model of opset 17; outputs are float32 but for those in ``kinds``."""
    graph = helper.make_graph(
        list(nodes),
        "several",
        [helper.make_tensor_value_info(n, *each) for n, each in inputs.items()],
        [
            helper.make_tensor_value_info(name, (kinds or {}).get(name, FLOAT), shape)
            for name, shape in outputs.items()
        ],
        [numpy_helper.from_array(v, name) for name, v in (weights or {}).items()],
    )
    opset = [helper.make_opsetid("", 17)]
    return helper.make_model(graph, opset_imports=opset, ir_version=8)


def everything() -> onnx.ModelProto:
    """An image, a vector, a map, two kinds of indices, an input that is an output too, an unused one, and one read twice."""
    random = np.random.default_rng(0)
    n = helper.make_node
    return network(
        {
            "pixels": (FLOAT, [1, 3, 6, 6]),
            "age": (FLOAT, [1, 4]),
            "map": (FLOAT, [1, 2, 6, 6]),
            "token ids": (INT64, [1, 5]),
            "row": (INT32, [1]),
            "spare": (FLOAT, [1, 7]),
        },
        [
            n("Conv", ["pixels", "w"], ["c"], "conv", pads=[1, 1, 1, 1]),
            n("Concat", ["c", "map"], ["both"], "join", axis=1),
            n("Relu", ["both"], ["r"], "relu"),
            n("GlobalAveragePool", ["r"], ["mean"], "mean"),
            n("Reshape", ["mean", "four"], ["flat"], "flat"),
            n("Mul", ["age", "age"], ["square"], "square"),
            n("Add", ["flat", "square"], ["sum"], "sum"),
            n("Gather", ["table", "token ids"], ["words"], "words", axis=0),
            n("Gather", ["places", "row"], ["place"], "place", axis=0),
            n("Add", ["words", "place"], ["text"], "text"),
            n("Identity", ["age"], ["same age"], "copy"),
        ],
        {"sum": [1, 4], "text": [1, 5, 8], "same age": [1, 4]},
        {
            "w": random.normal(size=(2, 3, 3, 3)).astype(np.float32),
            "four": np.array([1, 4]),
            "table": random.normal(size=(11, 8)).astype(np.float32),
            "places": random.normal(size=(3, 8)).astype(np.float32),
        },
    )


def added() -> onnx.ModelProto:
    """Two rows of data; all of it is in int8 where it is quantised."""
    random = np.random.default_rng(1)
    n = helper.make_node
    return network(
        {"a": (FLOAT, [1, 16]), "b": (FLOAT, [1, 16])},
        [
            n("Gemm", ["a", "wa"], ["x"], "first"),
            n("Gemm", ["b", "wb"], ["y"], "second"),
            n("Add", ["x", "y"], ["z"], "sum"),
            n("Relu", ["z"], ["r"], "relu"),
            n("Gemm", ["r", "wc"], ["scores"], "last"),
        ],
        {"scores": [1, 5]},
        {
            name: random.normal(size=size).astype(np.float32)
            for name, size in (("wa", (16, 12)), ("wb", (16, 12)), ("wc", (12, 5)))
        },
    )
