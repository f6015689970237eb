"""Rules that write one operator as several that the importer gets right."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import onnx

from netship.compile.frontend.canonical.forms import axes_form
from netship.compile.frontend.canonical.graph import (
    Chain,
    Graph,
    attributes_of,
    text_of,
)

_LEAST = float(np.finfo(np.float32).tiny)


def mean(node: onnx.NodeProto, graph: Graph) -> list[onnx.NodeProto]:
    """Inputs of different ranks are concatenated without broadcasting."""
    chain = Chain(node, graph)
    return chain.end("Div", chain.add("Sum", *node.input), float(len(node.input)))


def softplus(node: onnx.NodeProto, graph: Graph) -> list[onnx.NodeProto]:
    """log(1 + exp(x)) overflows from 89 on: max(x, 0) + log(1 + exp(-|x|)) does not."""
    chain, x = Chain(node, graph), node.input[0]
    small = chain.add("Exp", chain.add("Neg", chain.add("Abs", x)))
    log = chain.add("Log", chain.add("Add", small, 1.0))
    return chain.end("Add", chain.add("Relu", x), log)


def gelu(node: onnx.NodeProto, graph: Graph) -> list[onnx.NodeProto]:
    """approximate="tanh" is ignored: 0.5 x (1 + tanh(√(2/π) (x + 0.044715 x³)))."""
    if text_of(attributes_of(node).get("approximate", "none")) != "tanh":
        return [node]
    chain, x = Chain(node, graph), node.input[0]
    scaled = chain.add("Mul", chain.add("Mul", x, x), 0.044715)
    cubic = chain.add("Mul", x, chain.add("Add", scaled, 1.0))
    tanh = chain.add("Tanh", chain.add("Mul", cubic, math.sqrt(2 / math.pi)))
    twice = chain.add("Mul", x, chain.add("Add", tanh, 1.0))
    return chain.end("Mul", twice, 0.5)


def lp_normalisation(node: onnx.NodeProto, graph: Graph) -> list[onnx.NodeProto]:
    """Unknown to the importer: x over its norm, and zeros where the norm is zero."""
    attributes, x = attributes_of(node), node.input[0]
    kind = "ReduceL1" if attributes.get("p", 2) == 1 else "ReduceL2"
    axis = attributes.get("axis", -1) % len(graph.shape(x))
    chain = Chain(node, graph)
    inputs, named = axes_form(kind, [axis], graph)
    norm = chain.add(kind, x, *inputs, **named)
    return chain.end("Div", x, chain.add("Max", norm, _LEAST))


def softmax(node: onnx.NodeProto, graph: Graph) -> list[onnx.NodeProto]:
    """Of one class it is 1, which no kernel rounds: x - max of x as it is used and of x as it is stored may differ."""
    if _classes(node, graph)[1] > 1:
        return [node]
    chain = Chain(node, graph)
    # NaN and infinity are NaN here, too.
    return chain.end("Add", chain.add("Mul", node.input[0], 0.0), 1.0)


def _classes(node: onnx.NodeProto, graph: Graph) -> tuple[Sequence[int], int]:
    """The axes of a softmax, and how many elements they have."""
    shape = graph.shape(node.input[0])
    axis = attributes_of(node).get("axis", -1 if graph.opset >= 13 else 1)
    axis %= len(shape) or 1
    axes = [axis] if graph.opset >= 13 else range(axis, len(shape))
    return axes, math.prod(shape[each] for each in axes)


def log_softmax(node: onnx.NodeProto, graph: Graph) -> list[onnx.NodeProto]:
    """log(softmax(x)) is -inf where the softmax underflows: x - max - log(sum(exp(x - max))) is not. 0 of one class."""
    chain, x = Chain(node, graph), node.input[0]
    axes, classes = _classes(node, graph)
    if classes == 1:
        return chain.end("Mul", x, 0.0)

    def reduced(op_type: str, source: str) -> str:
        inputs, attributes = axes_form(op_type, axes, graph)
        return chain.add(op_type, source, *inputs, **attributes)

    less = chain.add("Sub", x, reduced("ReduceMax", x))
    total = reduced("ReduceSum", chain.add("Exp", less))
    return chain.end("Sub", less, chain.add("Log", total))


def trilu(node: onnx.NodeProto, graph: Graph) -> list[onnx.NodeProto]:
    """TVM cannot compile two in one kernel: x where a constant says so, 0 elsewhere."""
    x = node.input[0]
    if graph.dtype(x) != onnx.TensorProto.FLOAT:
        return [node]
    given = graph.constant(node, 1)
    diagonal = 0 if given is None else int(given)
    ones = np.ones(graph.shape(x)[-2:])
    part = np.triu if attributes_of(node).get("upper", 1) else np.tril
    chain = Chain(node, graph)
    return chain.end("Where", chain.add("Greater", part(ones, diagonal), 0.5), x, 0.0)


def matrix_vector(node: onnx.NodeProto, graph: Graph) -> list[onnx.NodeProto]:
    """A vector on the right of more than two dimensions is a type error: a one-column matrix instead."""
    left, vector = node.input
    shape = graph.shape(vector)
    if len(shape) != 1 or len(graph.shape(left)) < 3:
        return [node]
    chain = Chain(node, graph)
    product = chain.add("MatMul", left, chain.add("Reshape", vector, (*shape, 1)))
    return chain.end("Reshape", product, graph.shape(node.output[0]))


def space_to_depth(node: onnx.NodeProto, graph: Graph) -> list[onnx.NodeProto]:
    """mode="CRD" (opset 28) is ignored: channels before the places in a block, as a Reshape and a Transpose."""
    attributes = attributes_of(node)
    if text_of(attributes.get("mode", "DCR")) != "CRD":
        return [node]
    chain, block = Chain(node, graph), attributes["blocksize"]
    batch, channels, height, width = graph.shape(node.input[0])
    split = (batch, channels, height // block, block, width // block, block)
    blocks = chain.add("Reshape", node.input[0], split)
    order = chain.add("Transpose", blocks, perm=[0, 1, 3, 5, 2, 4])
    return chain.end("Reshape", order, graph.shape(node.output[0]))
