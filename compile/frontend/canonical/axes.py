"""Rules of operators that take axes or sizes: reductions, Unsqueeze, Split, Slice."""

from __future__ import annotations

import numpy as np
import onnx

from compile.frontend.canonical.graph import Graph, attributes_of, make_node, refusal

# Without axes these still square each element, or take its magnitude or logarithm.
_NOT_IDENTITY_WITHOUT_AXES = ("ReduceL1", "ReduceL2", "ReduceLogSum", "ReduceSumSquare")
_OTHERS = ("LogSumExp", "Max", "Mean", "Min", "Prod", "Sum")
REDUCTIONS = (*_NOT_IDENTITY_WITHOUT_AXES, *(f"Reduce{each}" for each in _OTHERS))


def reduction(node: onnx.NodeProto, graph: Graph) -> list[onnx.NodeProto]:
    """Axes as an input: the importer takes only the first, or aborts; some operators ignore noop_with_empty_axes."""
    attributes = attributes_of(node)
    noop = attributes.pop("noop_with_empty_axes", 0)
    axes = attributes.pop("axes", None)
    given = graph.constant(node, 1)
    if given is not None:
        axes = given.tolist()
    rank = len(graph.shape(node.input[0]))
    if not axes and noop and node.op_type in _NOT_IDENTITY_WITHOUT_AXES:
        raise refusal(
            node, "noop_with_empty_axes is not supported; reduce over named axes"
        )
    if not axes and noop:
        return [make_node(node, "Identity", node.input[:1], node.output)]
    axes = sorted(axis % rank for axis in axes) if axes else list(range(rank))
    return [
        make_node(
            node, node.op_type, node.input[:1], node.output, axes=axes, **attributes
        )
    ]


def unsqueeze(node: onnx.NodeProto, graph: Graph) -> list[onnx.NodeProto]:
    """The importer counts negative axes from the wrong end; a Reshape takes its place."""
    shape = graph.shape(node.output[0])
    sizes = graph.add_constant(f"{node.output[0]}/shape", shape, np.int64)
    return [make_node(node, "Reshape", [node.input[0], sizes], node.output)]


def split(node: onnx.NodeProto, graph: Graph) -> list[onnx.NodeProto]:
    """The importer divides the axis evenly by num_outputs (opset 18); the sizes are taken from the shapes."""
    axis = attributes_of(node).get("axis", 0) % len(graph.shape(node.input[0]))
    if len(node.output) == 1:
        return [make_node(node, "Identity", node.input[:1], node.output)]
    sizes = [graph.shape(name)[axis] for name in node.output]
    if graph.opset < 13:
        return [
            make_node(
                node, "Split", node.input[:1], node.output, axis=axis, split=sizes
            )
        ]
    given = graph.add_constant(f"{node.output[0]}/split", sizes, np.int64)
    return [make_node(node, "Split", [node.input[0], given], node.output, axis=axis)]


def slice_axes(node: onnx.NodeProto, graph: Graph) -> list[onnx.NodeProto]:
    """Negative axes as an attribute (before opset 10) end in an index error."""
    attributes = attributes_of(node)
    if "axes" in attributes:
        rank = len(graph.shape(node.input[0]))
        attributes["axes"] = [axis % rank for axis in attributes["axes"]]
    return [make_node(node, "Slice", node.input, node.output, **attributes)]
