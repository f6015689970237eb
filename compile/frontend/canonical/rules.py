"""The table of rules, and their application to a graph.

The docstring of each rule says what the importer gets wrong. tests/test_rewrite.py compares every rule with ONNX Runtime, and fails
when TVM gets the original right after all.
"""

from __future__ import annotations

import onnx

from compile.frontend.canonical import axes, decompositions, inference, resize, windows
from compile.frontend.canonical.graph import Graph, Rule
from compile.frontend.fold import fold, with_nodes

_RULES: dict[str, Rule] = {
    "AveragePool": windows.pool,
    "BatchNormalization": inference.batch_normalisation,
    "Clip": inference.clip,
    "Conv": windows.convolution,
    "ConvTranspose": windows.transposed_convolution,
    "Dropout": inference.dropout,
    "Gelu": decompositions.gelu,
    "GroupNormalization": decompositions.group_normalisation,
    "LogSoftmax": decompositions.log_softmax,
    "MatMul": decompositions.matrix_vector,
    "MaxPool": windows.pool,
    "Mean": decompositions.mean,
    "Pad": windows.pad,
    "Resize": resize.resize,
    "Slice": axes.slice_axes,
    "Softplus": decompositions.softplus,
    "Split": axes.split,
    "Unsqueeze": axes.unsqueeze,
    "Upsample": resize.resize,
    **dict.fromkeys(axes.REDUCTIONS, axes.reduction),
}


def for_relay(proto: onnx.ModelProto) -> onnx.ModelProto:
    """The same function in ONNX forms that TVM's importer reads correctly.

    Args:
        proto: a static model (every shape known or inferable), one opset of ai.onnx.

    Returns:
        A new model, folded and shape-inferred, for the importer only: it is not always valid ONNX
        (reduction axes are attributes in every opset).

    Raises:
        UserError: a form that cannot be rewritten correctly, named with its node.
    """
    folded = fold(proto)
    graph = Graph(folded)
    nodes = [new for node in folded.graph.node for new in _rewritten(node, graph)]
    return with_nodes(folded, nodes, graph.constants)


def _rewritten(node: onnx.NodeProto, graph: Graph) -> list[onnx.NodeProto]:
    rule = _RULES.get(node.op_type)
    return [node] if rule is None else rule(node, graph)
