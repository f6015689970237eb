"""Normalisations whose mean is subtracted before anything is squared, written for what ONNX Runtime gets wrong.

It takes GroupNormalization by its definition, E[x²] − E[x]², which rounding makes negative where the values of a group
are equal or far from 0: the answer is NaN, or has few right digits. Its MeanVarianceNormalization divides by 0 there,
where the definition adds 1e-9 first. The mean and the deviation that LayerNormalization may give are unknown to TVM.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx

from netship.compile.frontend.canonical.forms import axes_form
from netship.compile.frontend.canonical.graph import Chain, Graph, attributes_of
from netship.compile.frontend.fold import UNKNOWN, Value, fold, values, with_nodes
from netship.compile.frontend.names import Unfit, node_label
from netship.compile.frontend.quantised.operators import as_qdq
from netship.compile.frontend.shapes import named_apart

# Of ONNX's own definition; a float, as the model is float32.
_LEAST = float(np.float32(1e-9))


def centred(static: onnx.ModelProto) -> onnx.ModelProto:
    """The model with these normalisations in simpler operators; itself where it has none."""
    if not any(map(_is_meant, static.graph.node)):
        return static
    known, graph = values(fold(as_qdq(static)).graph), Graph(static)
    nodes = [
        made
        for node in static.graph.node
        for made in (_written(node, graph, known) if _is_meant(node) else [node])
    ]
    # ONNX Runtime refuses two nodes of one name.
    return with_nodes(static, named_apart(nodes), graph.constants)


def _is_meant(node: onnx.NodeProto) -> bool:
    if node.op_type == "LayerNormalization":
        return any(node.output[1:])
    return node.op_type in ("GroupNormalization", "MeanVarianceNormalization")


def _written(
    node: onnx.NodeProto, graph: Graph, known: Mapping[str, Value]
) -> list[onnx.NodeProto]:
    shape, *each = (known.get(name, UNKNOWN).sizes for name in node.input)
    if shape is None:
        raise Unfit(
            f"{node_label(node)}: its input has no static shape; export with fixed sizes"
        )
    if node.op_type == "GroupNormalization":
        return _of_groups(node, graph, shape, each)
    if node.op_type == "LayerNormalization":
        return _of_layers(node, graph, shape)
    axes = attributes_of(node).get("axes", [0, 2, 3])
    chain = Chain(node, graph)
    apart, variance = _apart(chain, graph, node.input[0], axes)[1:]
    deviation = chain.add("Add", chain.add("Sqrt", variance), _LEAST)
    return chain.end("Div", apart, deviation)


def _of_groups(
    node: onnx.NodeProto,
    graph: Graph,
    shape: tuple[int, ...],
    factors: Sequence[tuple[int, ...] | None],
) -> list[onnx.NodeProto]:
    """An InstanceNormalization over groups; scale and bias are of channels, before opset 21 of groups.

    Args:
        factors: their shapes.
    """
    attributes = attributes_of(node)
    groups, (batch, channels, *sizes) = attributes["num_groups"], shape
    if groups < 1 or channels % groups:
        raise Unfit(
            f"{node_label(node)}: num_groups {groups} does not divide {channels} channels; export again"
        )
    chain, epsilon = Chain(node, graph), attributes.get("epsilon", 1e-5)
    grouped = chain.add("Reshape", node.input[0], (batch, groups, -1))
    if factors not in ([(groups,)] * 2, [(channels,)] * 2):
        raise Unfit(
            f"{node_label(node)}: its scale and bias need one value a group or a channel; export again"
        )
    norm, given = "InstanceNormalization", node.input[1:3]
    if factors[0] == (groups,):
        whole = chain.add(norm, grouped, *given, epsilon=epsilon)
        return chain.end("Reshape", whole, shape)
    neutral = np.ones(groups), np.zeros(groups)
    whole = chain.add(norm, grouped, *neutral, epsilon=epsilon)
    by_channel = (channels, *(1 for _ in sizes))
    scale, bias = (chain.add("Reshape", x, by_channel) for x in given)
    back = chain.add("Reshape", whole, shape)
    return chain.end("Add", chain.add("Mul", back, scale), bias)


def _of_layers(
    node: onnx.NodeProto, graph: Graph, shape: tuple[int, ...]
) -> list[onnx.NodeProto]:
    """With its second and third output: mean, and 1 / √(variance + ε)."""
    attributes, chain = attributes_of(node), Chain(node, graph)
    axis = attributes.get("axis", -1)
    if axis not in range(-len(shape), len(shape)):
        raise Unfit(
            f"{node_label(node)}: it has no axis {axis} of {len(shape)}; export again"
        )
    first = axis % len(shape)
    axes = list(range(first, len(shape)))
    mean, apart, variance = _apart(chain, graph, node.input[0], axes)
    sum_ = chain.add("Add", variance, attributes.get("epsilon", 1e-5))
    inverse = chain.add("Reciprocal", chain.add("Sqrt", sum_))
    for index, value in ((1, mean), (2, inverse)):
        if node.output[index : index + 1] not in ([], [""]):
            chain.make(index, "Identity", value)
    answer = chain.add("Mul", apart, inverse)
    answer = chain.add("Mul", answer, node.input[1])
    if any(node.input[2:]):
        return chain.end("Add", answer, node.input[2])
    return chain.end("Identity", answer)


def _apart(
    chain: Chain, graph: Graph, source: str, axes: list[int]
) -> tuple[str, str, str]:
    """The mean, the difference from it, and the mean of its square."""
    inputs, named = axes_form("ReduceMean", axes, graph)
    mean = chain.add("ReduceMean", source, *inputs, keepdims=1, **named)
    apart = chain.add("Sub", source, mean)
    squares = chain.add("Mul", apart, apart)
    return mean, apart, chain.add("ReduceMean", squares, *inputs, keepdims=1, **named)
