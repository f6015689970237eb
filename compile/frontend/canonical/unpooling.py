"""Rules of MaxPool with Indices, and of MaxUnpool, which reads them."""

from __future__ import annotations

from math import prod

import numpy as np
import onnx

from netship.compile.frontend.canonical import windows
from netship.compile.frontend.canonical.forms import within
from netship.compile.frontend.canonical.graph import (
    Chain,
    Graph,
    attributes_of,
    refusal,
)
from netship.compile.frontend.limits import MAX_ARGUMENTS


def max_pool(node: onnx.NodeProto, graph: Graph) -> list[onnx.NodeProto]:
    """TVM makes no Indices: the place of each window's maximum is an ArgMax over the window's elements."""
    plain = onnx.ModelProto().graph.node.add()
    plain.CopyFrom(node)
    del plain.output[1:]
    pooled = windows.pool(plain, graph)
    if not graph.read.intersection(node.output[1:]):
        return pooled
    if graph.opset < 11:
        raise refusal(
            node, "its Indices are built from opset 11 on; export with opset 17"
        )
    if attributes_of(node).get("storage_order", 0):
        raise refusal(
            node, "storage_order 1 is not built; export its Indices row by row"
        )
    attributes = attributes_of(next(e for e in pooled if e.op_type == "MaxPool"))
    kernel = attributes["kernel_shape"]
    if prod(kernel) > MAX_ARGUMENTS:
        raise refusal(
            node,
            f"its Indices are built for windows of at most {MAX_ARGUMENTS} elements; pool by less",
        )
    rank, shape = len(kernel), graph.shape(node.input[0])
    sizes, output = shape[2:], graph.shape(node.output[0])[2:]
    strides = attributes.get("strides") or [1] * rank
    dilations = attributes.get("dilations") or [1] * rank
    pads = attributes.get("pads") or [0] * 2 * rank
    chain = Chain(node, graph)
    source = within(chain, graph, node.input[0], largest=True)
    if any(pads):
        amounts = [0, 0, *pads[:rank], 0, 0, *pads[rank:]]
        lowest = float(np.finfo(np.float32).min)
        source = chain.add("Pad", source, amounts, lowest)
    axes = list(range(2, 2 + rank))
    # How far apart neighbours of each axis are in the flat tensor.
    steps = np.array([prod(sizes[axis + 1 :]) for axis in range(rank)])
    elements, offsets = [], []
    for place in np.ndindex(*kernel):
        starts = np.multiply(place, dilations)
        ends = starts + (np.array(output) - 1) * strides + 1
        one = chain.add("Slice", source, starts, ends, axes, strides)
        elements.append(chain.add("Reshape", one, (1, *shape[:2], *output)))
        offsets.append(int(starts @ steps))
    every = elements[0]
    if len(elements) > 1:
        every = chain.add("Concat", *elements, axis=0)
    largest = chain.add("ArgMax", every, axis=0, keepdims=0)
    places = chain.add("Gather", np.array(offsets), largest, axis=0)
    grid = np.indices(output).reshape(rank, -1).T
    first = (grid * strides - pads[:rank]) @ steps
    planes = np.arange(prod(shape[:2])) * prod(sizes)
    inside = chain.add("Add", places, first.reshape(output))
    chain.make(1, "Add", inside, planes.reshape(*shape[:2], *[1] * rank))
    return pooled + chain.made


def max_unpool(node: onnx.NodeProto, graph: Graph) -> list[onnx.NodeProto]:
    """The importer takes strides as the padding's, and has no output of three dimensions: zeros, then a scatter."""
    if graph.opset < 11:
        raise refusal(node, "is built from opset 11 on; export with opset 17")
    chain, x = Chain(node, graph), node.input[0]
    shape = graph.shape(node.output[0])
    before, after = prod(graph.shape(x)), prod(shape)
    if after < before:
        raise refusal(
            node, "its output is smaller than its input; give its output_shape"
        )
    flat = chain.add("Reshape", x, (-1,))
    # Zeros that no constant in the model holds, whatever x is.
    zeros = chain.add("Cast", chain.add("Less", flat, flat), to=onnx.TensorProto.FLOAT)
    zeros = chain.add("Pad", zeros, [0, after - before], 0.0)
    places = chain.add("Reshape", node.input[1], (-1,))
    placed = chain.add("ScatterElements", zeros, places, flat, axis=0)
    return chain.end("Reshape", placed, shape)
