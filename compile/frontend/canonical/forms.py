"""Rules that give an operator the one form that the importer reads right: named axes and sizes, both bounds, no training."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper

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
    if node.op_type == "ReduceLogSumExp" and graph.may_be_infinite(sources[0]):
        return _log_sum_exp(chain, graph, node, axes)
    return extreme(chain, graph, node.op_type, *sources, **named, **attributes)


def extreme(
    chain: Chain, graph: Graph, op_type: str, *inputs: Any, **attributes: Any
) -> list[onnx.NodeProto]:
    """TVM's extreme of infinities is the largest finite number: it starts from there."""
    sign = {"ReduceMax": -1, "MaxPool": -1, "ReduceMin": 1}
    limit = sign.get(op_type, 0) * _FLOAT32_MAX
    if not limit or graph.opset < 11 or not graph.may_be_infinite(inputs[0]):
        return chain.end(op_type, *inputs, **attributes)
    finite = chain.add(op_type, *inputs, **attributes)
    infinite = chain.add("Equal", finite, limit)
    return chain.end("Where", infinite, math.copysign(math.inf, limit), finite)


def _log_sum_exp(
    chain: Chain, graph: Graph, node: onnx.NodeProto, axes: Sequence[int]
) -> list[onnx.NodeProto]:
    """TVM subtracts the maximum, which is infinity from infinity where it is infinite."""
    inputs, named = axes_form("ReduceMax", axes, graph)
    largest = chain.add("ReduceMax", node.input[0], *inputs, **named)
    largest = chain.add("Min", largest, _FLOAT32_MAX)
    powers = chain.add("Exp", chain.add("Sub", node.input[0], largest))
    inputs, named = axes_form("ReduceSum", axes, graph)
    sums = chain.add("Log", chain.add("ReduceSum", powers, *inputs, **named))
    whole = chain.add("Add", sums, largest)
    return chain.end("Reshape", whole, graph.shape(node.output[0]))


def extreme_place(node: onnx.NodeProto, graph: Graph) -> list[onnx.NodeProto]:
    """Of infinities alone TVM's place is -1: they become the last finite number that it tells from its start."""
    chain, largest = Chain(node, graph), node.op_type == "ArgMax"
    finite = within(chain, graph, node.input[0], largest)
    return chain.end(node.op_type, finite, **attributes_of(node))


def within(chain: Chain, graph: Graph, name: str, largest: bool) -> str:
    """A tensor whose places of the largest, or smallest, elements TVM finds."""
    if graph.opset < 8 or not graph.may_be_infinite(name):
        return name
    bound = np.nextafter(np.float32(_FLOAT32_MAX), np.float32(0))
    kind, limit = ("Max", -bound) if largest else ("Min", bound)
    return chain.add(kind, name, limit)


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


def slices(node: onnx.NodeProto, graph: Graph) -> list[onnx.NodeProto]:
    """Negative axes as an attribute (before opset 10) are an index error; a start before the first element is no start."""
    attributes, shape = attributes_of(node), graph.shape(node.input[0])
    chain = Chain(node, graph)
    if "axes" in attributes:
        attributes["axes"] = [axis % len(shape) for axis in attributes["axes"]]
    bounds = [graph.constants.get(name) for name in node.input[1:] if name]
    if not bounds or any(each is None for each in bounds):
        return chain.end("Slice", *node.input, **attributes)
    starts, *rest = (graph.constant(node, k) for k in range(1, len(node.input)))
    axes = rest[1] if len(rest) > 1 and rest[1] is not None else range(len(shape))
    assert starts is not None
    least = np.array([-shape[int(axis)] for axis in axes][: starts.size])
    if (starts >= least).all():
        return chain.end("Slice", *node.input, **attributes)
    # Of one type, whatever that of the others is.
    wide = ["" if each is None else each.astype(np.int64) for each in rest]
    first = np.maximum(starts.astype(np.int64), least)
    return chain.end("Slice", node.input[0], first, *wide, **attributes)


def divide(node: onnx.NodeProto, graph: Graph) -> list[onnx.NodeProto]:
    """TVM computes with a number that it divides by, and stops at 0: 0 is an array."""
    a, b = node.input
    divisor = graph.constants.get(b)
    if divisor is None or divisor.dims or numpy_helper.to_array(divisor) != 0:
        return [node]
    rank = len(graph.shape(node.output[0]))
    array = numpy_helper.to_array(divisor).reshape([1] * rank)
    return Chain(node, graph).end("Div", a, array)


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
