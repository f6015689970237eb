"""The rule of DFT."""

from __future__ import annotations

from math import prod

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from netship.compile.frontend.canonical.graph import (
    Chain,
    Graph,
    attributes_of,
    refusal,
)
from netship.compile.frontend.names import node_label
from netship.targets.onnx_runtime import Session

_LARGEST_MATRIX = 1 << 22


def dft(node: onnx.NodeProto, graph: Graph) -> list[onnx.NodeProto]:
    """LLVM's verifier refuses it, and the importer ignores an axis that is an input: a product with a matrix."""
    before, after = graph.shape(node.input[0]), graph.shape(node.output[0])
    axis, last = _axis(node, graph) % len(before), len(before) - 1
    rows, columns = (shape[axis] * shape[last] for shape in (before, after))
    if rows * columns > _LARGEST_MATRIX:
        raise refusal(
            node, f"{before[axis]} points are too many; transform before the network"
        )
    order = [each for each in range(last) if each != axis] + [axis, last]
    others = [before[each] for each in order[:-2]]
    chain = Chain(node, graph)
    ordered = chain.add("Transpose", node.input[0], perm=order)
    flat = chain.add("Reshape", ordered, (prod(others), rows))
    product = chain.add(
        "MatMul", flat, _matrix(node, graph, before[axis], before[last])
    )
    whole = chain.add("Reshape", product, (*others, after[axis], after[last]))
    return chain.end("Transpose", whole, perm=np.argsort(order).tolist())


def _axis(node: onnx.NodeProto, graph: Graph) -> int:
    if graph.opset < 20:
        return int(attributes_of(node).get("axis", 1))
    given = graph.constant(node, 2)
    return -2 if given is None else int(given.item())


def _matrix(
    node: onnx.NodeProto, graph: Graph, points: int, parts: int
) -> NDArray[np.float32]:
    """[points x parts before, after]: the transform by ONNX Runtime of each point's real, and imaginary, unit."""
    attributes, units = attributes_of(node), points * parts
    attributes.pop("axis", None)
    length = graph.constant(node, 1)
    constants = {} if length is None else {"length": length}
    inputs = ["x", "" if length is None else "length"]
    if graph.opset < 20:
        attributes["axis"] = 1
    else:
        inputs, constants["axis"] = [*inputs, "axis"], np.array(1)
    source, result = (
        helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape)
        for name, shape in (("x", (units, points, parts)), ("y", None))
    )
    model = helper.make_model(
        helper.make_graph(
            [helper.make_node("DFT", inputs, ["y"], **attributes)],
            "units",
            [source],
            [result],
            [numpy_helper.from_array(each, name) for name, each in constants.items()],
        ),
        opset_imports=[helper.make_opsetid("", graph.opset)],
        ir_version=8,
    )
    session = Session(model.SerializeToString(), node_label(node))
    identity = np.eye(units, dtype=np.float32).reshape(units, points, parts)
    return np.asarray(session.run(["y"], {"x": identity})[0]).reshape(units, -1)
