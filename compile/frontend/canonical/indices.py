"""Rules of whole numbers: indices that count from the end, and remainders."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper

from netship.compile.frontend.canonical.graph import (
    Chain,
    Graph,
    attributes_of,
    refusal,
    text_of,
)


def elements(node: onnx.NodeProto, graph: Graph) -> list[onnx.NodeProto]:
    """Negative indices read, or write, outside of the tensor; or of the first axis where the axis is negative too.

    TVM gathers from all of the other axes, where ONNX may take the first elements alone.
    """
    chain, (source, places) = Chain(node, graph), node.input[:2]
    shape, few = graph.shape(source), graph.shape(places)
    axis = attributes_of(node).get("axis", 0) % len(shape)
    others = [each for each in range(len(shape)) if each != axis]
    if node.op_type == "GatherElements" and any(few[k] < shape[k] for k in others):
        sizes = [few[each] for each in others]
        source = chain.add("Slice", source, [0] * len(others), sizes, others)
    return _from_the_start(chain, node, graph, source, shape[axis], axis=axis)


def slices(node: onnx.NodeProto, graph: Graph) -> list[onnx.NodeProto]:
    """As `elements`, of indices that name a place in several axes: their last dimension."""
    first = attributes_of(node).get("batch_dims", 0)
    count = graph.shape(node.input[1])[-1]
    sizes = graph.shape(node.input[0])[first : first + count]
    chain = Chain(node, graph)
    return _from_the_start(chain, node, graph, node.input[0], sizes)


def _from_the_start(
    chain: Chain,
    node: onnx.NodeProto,
    graph: Graph,
    source: str,
    sizes: int | Sequence[int],
    **attributes: int,
) -> list[onnx.NodeProto]:
    """``node`` with its indices in 0 to size - 1; those that are computed cannot leave that range."""
    given = graph.constants.get(node.input[1])
    if given is None:
        whole = chain.add("Cast", node.input[1], to=TensorProto.INT64)
        places: Any = _modulo(chain, whole, chain.constant(sizes))
    else:
        places = numpy_helper.to_array(given).astype(np.int64)
        places = np.where(places < 0, places + np.array(sizes), places)
    named = attributes_of(node) | attributes
    reduction = text_of(named.get("reduction", "none"))
    if reduction == "none":
        # The importer does not know the default by its name.
        named.pop("reduction", None)
    elif node.op_type == "ScatterND" and reduction in ("max", "min"):
        raise refusal(
            node,
            f"reduction {reduction} is not built; export it as ScatterElements",
        )
    return chain.end(node.op_type, source, places, *node.input[2:], **named)


def top(node: onnx.NodeProto, graph: Graph) -> list[onnx.NodeProto]:
    """Of the smallest the importer's end of a slice is no number of 32 bits: they are the largest of -x."""
    attributes = attributes_of(node)
    if attributes.pop("largest", 1):
        return [node]
    chain = Chain(node, graph)
    negative, count = chain.add("Neg", node.input[0]), node.input[1]
    made = chain.end("TopK", negative, count, outputs=2, **attributes)
    made[-1].output[0] = graph.fresh(f"{node.output[0]}/TopK")
    return chain.end("Neg", made[-1].output[0])


def modulo(node: onnx.NodeProto, graph: Graph) -> list[onnx.NodeProto]:
    """Of whole numbers it fails in LLVM's verifier; of real numbers (opset 28) it is A - floor(A / B) * B."""
    if attributes_of(node).get("fmod"):
        return [node]
    chain, (a, b) = Chain(node, graph), node.input
    dtype = graph.dtype(a)
    if dtype == TensorProto.FLOAT:
        times = chain.add("Floor", chain.add("Div", a, b))
        return chain.end("Sub", a, chain.add("Mul", times, b))
    a, b = (chain.add("Cast", each, to=TensorProto.INT64) for each in (a, b))
    return chain.end("Cast", _modulo(chain, a, b), to=dtype)


def _modulo(chain: Chain, a: str, b: str) -> str:
    """The remainder with the sign of ``b``: that of Div, which rounds towards zero, has the sign of ``a``."""
    return _remainder(chain, chain.add("Add", _remainder(chain, a, b), b), b)


def _remainder(chain: Chain, a: str, b: str) -> str:
    return chain.add("Sub", a, chain.add("Mul", chain.add("Div", a, b), b))
