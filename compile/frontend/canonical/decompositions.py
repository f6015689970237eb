"""Rules that write one operator as several that the importer gets right."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx

from compile.frontend.canonical.graph import Graph, attributes_of, make_node, text_of


def mean(node: onnx.NodeProto, graph: Graph) -> list[onnx.NodeProto]:
    """The importer concatenates inputs of different ranks without broadcasting; Sum and Div do broadcast."""
    total = graph.fresh(f"{node.output[0]}/sum")
    count = graph.add_constant(f"{node.output[0]}/count", len(node.input), np.float32)
    return [
        make_node(node, "Sum", node.input, [total]),
        make_node(node, "Div", [total, count], node.output),
    ]


def softplus(node: onnx.NodeProto, graph: Graph) -> list[onnx.NodeProto]:
    """TVM's log(1 + exp(x)) overflows from x = 89 on; max(x, 0) + log(1 + exp(-|x|)) does not."""
    return _chain(
        node,
        graph,
        ("Relu", ["x"], "positive"),
        ("Abs", ["x"], "magnitude"),
        ("Neg", ["magnitude"], "negative"),
        ("Exp", ["negative"], "small"),
        ("Add", ["small", 1.0], "more"),
        ("Log", ["more"], "log"),
        ("Add", ["positive", "log"], "y"),
    )


def gelu(node: onnx.NodeProto, graph: Graph) -> list[onnx.NodeProto]:
    """The importer ignores approximate="tanh"."""
    if text_of(attributes_of(node).get("approximate", "none")) != "tanh":
        return [node]
    return _chain(
        node,
        graph,
        ("Mul", ["x", "x"], "square"),
        ("Mul", ["square", 0.044715], "scaled"),
        ("Add", ["scaled", 1.0], "factor"),
        ("Mul", ["x", "factor"], "cubic"),
        ("Mul", ["cubic", float(np.sqrt(2 / np.pi))], "argument"),
        ("Tanh", ["argument"], "tanh"),
        ("Add", ["tanh", 1.0], "more"),
        ("Mul", ["x", "more"], "twice"),
        ("Mul", ["twice", 0.5], "y"),
    )


def log_softmax(node: onnx.NodeProto, graph: Graph) -> list[onnx.NodeProto]:
    """TVM's log(softmax(x)) is -inf where the softmax underflows; x - max - log(sum(exp(x - max))) is not."""
    shape = graph.shape(node.input[0])
    axis = attributes_of(node).get("axis", -1 if graph.opset >= 13 else 1) % len(shape)
    axes = [axis] if graph.opset >= 13 else list(range(axis, len(shape)))
    return _chain(
        node,
        graph,
        ("ReduceMax", ["x"], "max", {"axes": axes}),
        ("Sub", ["x", "max"], "less"),
        ("Exp", ["less"], "exp"),
        ("ReduceSum", ["exp"], "sum", {"axes": axes}),
        ("Log", ["sum"], "log"),
        ("Sub", ["less", "log"], "y"),
    )


def _chain(
    node: onnx.NodeProto, graph: Graph, *steps: tuple[Any, ...]
) -> list[onnx.NodeProto]:
    """The nodes that replace one: each step is (operator, inputs, result, attributes); numbers become constants."""
    names = {"x": node.input[0], "y": node.output[0]}
    nodes = []
    for op_type, inputs, result, *attributes in steps:
        if result != "y":
            names[result] = graph.fresh(f"{node.output[0]}/{result}")
        read = [
            names[each]
            if isinstance(each, str)
            else graph.add_constant(f"{node.output[0]}/{result}", each, np.float32)
            for each in inputs
        ]
        nodes.append(
            make_node(node, op_type, read, [names[result]], **(attributes or [{}])[0])
        )
    return nodes


def matrix_vector(node: onnx.NodeProto, graph: Graph) -> list[onnx.NodeProto]:
    """More than two dimensions times a vector is a type error; the vector becomes a matrix of one column."""
    right = graph.shape(node.input[1])
    if len(right) != 1 or len(graph.shape(node.input[0])) < 3:
        return [node]
    column, product = (
        graph.fresh(f"{node.output[0]}/{stem}") for stem in ("column", "product")
    )
    shapes = [
        graph.add_constant(f"{node.output[0]}/shape", shape, np.int64)
        for shape in ((*right, 1), graph.shape(node.output[0]))
    ]
    return [
        make_node(node, "Reshape", [node.input[1], shapes[0]], [column]),
        make_node(node, "MatMul", [node.input[0], column], [product]),
        make_node(node, "Reshape", [product, shapes[1]], node.output),
    ]


def group_normalisation(node: onnx.NodeProto, graph: Graph) -> list[onnx.NodeProto]:
    """Unknown to the importer; replaced by InstanceNormalization over groups, then scale and bias of each channel."""
    attributes = attributes_of(node)
    groups = attributes["num_groups"]
    shape = graph.shape(node.input[0])
    scale, bias = graph.constant(node, 1), graph.constant(node, 2)
    assert scale is not None and bias is not None
    if scale.size != shape[1]:  # One value for each group, before opset 21.
        scale, bias = (np.repeat(each, shape[1] // groups) for each in (scale, bias))
    stem = node.output[0]
    per_channel = (shape[1], *[1] * (len(shape) - 2))
    grouped, normal, back, scaled = (
        graph.fresh(f"{stem}/{each}")
        for each in ("grouped", "normal", "back", "scaled")
    )
    add = graph.add_constant
    return [
        make_node(
            node,
            "Reshape",
            [node.input[0], add(f"{stem}/shape", (shape[0], groups, -1), np.int64)],
            [grouped],
        ),
        make_node(
            node,
            "InstanceNormalization",
            [
                grouped,
                add(f"{stem}/one", np.ones(groups), np.float32),
                add(f"{stem}/zero", np.zeros(groups), np.float32),
            ],
            [normal],
            epsilon=attributes.get("epsilon", 1e-5),
        ),
        make_node(
            node, "Reshape", [normal, add(f"{stem}/shape", shape, np.int64)], [back]
        ),
        make_node(
            node,
            "Mul",
            [back, add(f"{stem}/scale", scale.reshape(per_channel), np.float32)],
            [scaled],
        ),
        make_node(
            node,
            "Add",
            [scaled, add(f"{stem}/bias", bias.reshape(per_channel), np.float32)],
            node.output,
        ),
    ]
