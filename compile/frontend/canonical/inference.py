"""Rules of operators whose form the importer misreads or whose training mode it ignores."""

from __future__ import annotations

import numpy as np
import onnx

from compile.frontend.canonical.graph import Chain, Graph, attributes_of, refusal

_FLOAT32_MAX = float(np.finfo(np.float32).max)


def clip(node: onnx.NodeProto, graph: Graph) -> list[onnx.NodeProto]:
    """From opset 11 on the importer drops a Clip with one bound; the other bound is added."""
    if graph.opset < 11:
        return [node]
    low, high = (graph.constant(node, index) for index in (1, 2))
    if (low is None) == (high is None):
        return [node]
    bounds = (
        default if bound is None else float(bound.item())
        for bound, default in ((low, -_FLOAT32_MAX), (high, _FLOAT32_MAX))
    )
    return Chain(node, graph).end("Clip", node.input[0], *bounds)


def dropout(node: onnx.NodeProto, graph: Graph) -> list[onnx.NodeProto]:
    """The ratio as an input (opset 12) is a type error; for inference Dropout is the identity."""
    training = graph.constant(node, 2)
    if training is not None and training.item():
        raise refusal(node, "is in training mode; export with model.eval()")
    if graph.read.intersection(node.output[1:]):
        raise refusal(
            node,
            "its mask output is used, which only training does; export for inference",
        )
    return Chain(node, graph).end("Identity", node.input[0])


def batch_normalisation(node: onnx.NodeProto, graph: Graph) -> list[onnx.NodeProto]:
    """The importer ignores training mode, which is refused; the statistics' outputs are dropped."""
    attributes = attributes_of(node)
    if attributes.pop("training_mode", 0) or graph.read.intersection(node.output[1:]):
        raise refusal(node, "is in training mode; export with model.eval()")
    return Chain(node, graph).end(node.op_type, *node.input, **attributes)
