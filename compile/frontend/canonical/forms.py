"""Rules that give an operator the one form that the importer reads right: named axes and sizes, both bounds, no training."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx

from netship.compile.frontend.canonical.graph import (
    Chain,
    Graph,
    attributes_of,
    refusal,
)

_FLOAT32_MAX = float(np.finfo(np.float32).max)
# Without axes these still square, take magnitudes or logarithms, each element for itself.
_NOT_IDENTITY_WITHOUT_AXES = ("ReduceL1", "ReduceL2", "ReduceLogSum", "ReduceSumSquare")


def reduction(node: onnx.NodeProto, graph: Graph) -> list[onnx.NodeProto]:
    """Every axis named, in order: some of TVM's ignore noop_with_empty_axes."""
    attributes = attributes_of(node)
    noop = attributes.pop("noop_with_empty_axes", 0)
    axes = attributes.pop("axes", None)
    given = graph.constant(node, 1)
    if given is not None:
        axes = given.tolist()
    rank = len(graph.shape(node.input[0]))
    if not axes and noop and node.op_type in _NOT_IDENTITY_WITHOUT_AXES:
        raise refusal(node, "noop_with_empty_axes is not built; reduce over named axes")
    if not axes and noop:
        return Chain(node, graph).end("Identity", node.input[0])
    axes = sorted(axis % rank for axis in axes) if axes else range(rank)
    inputs, named = axes_form(node.op_type, axes, graph)
    chain, sources = Chain(node, graph), [node.input[0], *inputs]
    limit = {"ReduceMax": -_FLOAT32_MAX, "ReduceMin": _FLOAT32_MAX}.get(node.op_type)
    real = graph.dtype(node.input[0]) == onnx.TensorProto.FLOAT
    if not limit or not real or graph.opset < 11 or not graph.has_infinity():
        return chain.end(node.op_type, *sources, **named, **attributes)
    # TVM's extreme of infinities is the largest finite number: it starts from there.
    extreme = chain.add(node.op_type, *sources, **named, **attributes)
    infinite = chain.add("Equal", extreme, limit)
    return chain.end("Where", infinite, math.copysign(math.inf, limit), extreme)


def extreme_place(node: onnx.NodeProto, graph: Graph) -> list[onnx.NodeProto]:
    """Of infinities alone TVM's place is -1: they become the last finite number that it tells from its start."""
    real = graph.dtype(node.input[0]) == onnx.TensorProto.FLOAT
    if not real or graph.opset < 8 or not graph.has_infinity():
        return [node]
    chain, largest = Chain(node, graph), node.op_type == "ArgMax"
    bound = np.nextafter(np.float32(_FLOAT32_MAX), np.float32(0))
    kind, limit = ("Max", -bound) if largest else ("Min", bound)
    finite = chain.add(kind, node.input[0], limit)
    return chain.end(node.op_type, finite, **attributes_of(node))


def axes_form(
    op_type: str, axes: Sequence[int], graph: Graph
) -> tuple[list[Any], dict[str, Any]]:
    """A reduction's axes as its opset has them: inputs, or attributes."""
    if graph.opset < (13 if op_type == "ReduceSum" else 18):
        return [], {"axes": axes}
    return [axes], {}


def unsqueeze(node: onnx.NodeProto, graph: Graph) -> list[onnx.NodeProto]:
    """Negative axes are counted from the wrong end: a Reshape says the same."""
    shape = graph.shape(node.output[0])
    return Chain(node, graph).end("Reshape", node.input[0], shape)


def split(node: onnx.NodeProto, graph: Graph) -> list[onnx.NodeProto]:
    """num_outputs (opset 18) that does not divide the axis: sizes from the shapes instead."""
    chain, source, count = Chain(node, graph), node.input[0], len(node.output)
    axis = attributes_of(node).get("axis", 0) % len(graph.shape(source))
    if count == 1:
        return chain.end("Identity", source)
    sizes = [graph.shape(name)[axis] for name in node.output]
    if graph.opset < 13:
        return chain.end("Split", source, outputs=count, axis=axis, split=sizes)
    return chain.end("Split", source, sizes, outputs=count, axis=axis)


def slice_axes(node: onnx.NodeProto, graph: Graph) -> list[onnx.NodeProto]:
    """Negative axes as an attribute (before opset 10) are an index error."""
    attributes = attributes_of(node)
    if "axes" in attributes:
        rank = len(graph.shape(node.input[0]))
        attributes["axes"] = [axis % rank for axis in attributes["axes"]]
    return Chain(node, graph).end("Slice", *node.input, **attributes)


def cast(node: onnx.NodeProto, graph: Graph) -> list[onnx.NodeProto]:
    """saturate (opset 19), which is for 8-bit floats alone, is a type error."""
    attributes = attributes_of(node)
    attributes.pop("saturate", None)
    return Chain(node, graph).end("Cast", node.input[0], **attributes)


def clip(node: onnx.NodeProto, graph: Graph) -> list[onnx.NodeProto]:
    """From opset 11 on the importer drops a Clip with one bound; the other bound is added.

    Where min is above max, every value is max. Compilers differ there, so both bounds become max.
    """
    low, high = (graph.constant(node, index) for index in (1, 2))
    if graph.opset < 11:
        limits = attributes_of(node)
        if limits.get("min", -_FLOAT32_MAX) <= limits.get("max", _FLOAT32_MAX):
            return [node]
        return Chain(node, graph).end(
            "Clip", node.input[0], **limits | {"min": limits["max"]}
        )
    if low is None and high is None:
        return [node]
    least, most = (
        default if bound is None else float(bound.item())
        for bound, default in ((low, -_FLOAT32_MAX), (high, _FLOAT32_MAX))
    )
    if low is not None and high is not None and least <= most:
        return [node]
    return Chain(node, graph).end("Clip", node.input[0], min(least, most), most)


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
