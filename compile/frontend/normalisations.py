"""Normalisations written out in the operators that define them, which round otherwise than ONNX Runtime's own kernels.

Those compute x·a + (b − mean·a): of a group of equal values, such as one of a single element, the rounding of x·a is
left, and a may be 300. Written out it is the rounding of x − mean. Either may be the answer. A mean of n values is off
by about as many roundings as the square root of n, as they are summed one by one.
"""

from __future__ import annotations

from math import prod, sqrt
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from netship.compile.frontend.fold import UNKNOWN, infer, is_onnx, opset, values

_KINDS = ("InstanceNormalization", "LayerNormalization")


def written_out(proto: onnx.ModelProto, rounding: float) -> onnx.ModelProto:
    """The model without normalisations of known shapes; itself where it has none.

    Args:
        rounding: of a value by one operation, relative; means are moved by what their sums make of it.
    """
    if not any(map(_is_normalisation, proto.graph.node)):
        return proto
    types = values(infer(proto).graph)
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    del copy.graph.node[:]
    for index, node in enumerate(proto.graph.node):
        known = types.get(node.input[0], UNKNOWN) if node.input else UNKNOWN
        sizes = known.sizes if known.dtype == TensorProto.FLOAT else None
        if _is_normalisation(node) and sizes and all(sizes):
            writer = _Writer(copy.graph, f"normalisation {index}: ", opset(proto))
            writer.write(node, sizes, rounding)
        else:
            copy.graph.node.append(node)
    return copy


def _is_normalisation(node: onnx.NodeProto) -> bool:
    one_output = not any(node.output[1:])
    return node.op_type in _KINDS and is_onnx(node.domain) and one_output


class _Writer:
    """Appends to ``graph`` what computes one normalisation, with ``name`` before the name of each tensor."""

    def __init__(self, graph: onnx.GraphProto, name: str, version: int) -> None:
        self._graph, self._name, self._version = graph, name, version

    def write(
        self, node: onnx.NodeProto, shape: tuple[int, ...], rounding: float
    ) -> None:
        attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        # Scale and bias are of the last axes, or of channels.
        rows, factors = prod(shape[:2]), (1, -1, *(1 for _ in shape[2:]))
        if node.op_type == "LayerNormalization":
            rows, factors = prod(shape[: attributes.get("axis", -1)]), ()
        flat = self._shaped(node.input[0], (rows, -1), "rows")
        mean = self._mean(flat, "mean")
        off = self._constant(
            "rounding", np.float32(rounding * sqrt(prod(shape) / rows))
        )
        # Added to the difference: in the mean it would vanish.
        apart = self._add("Sub", "difference", flat, mean)
        move = self._add("Mul", "rounding of the mean", mean, off)
        apart = self._add("Add", "moved difference", apart, move)
        variance = self._mean(self._add("Mul", "squares", apart, apart), "variance")
        least = self._constant("epsilon", np.float32(attributes.get("epsilon", 1e-5)))
        sum_ = self._add("Add", "variance and epsilon", variance, least)
        unit = self._add("Div", "unit", apart, self._add("Sqrt", "deviation", sum_))
        answer = self._shaped(unit, shape, "unit as before")
        for kind, each in zip(("Mul", "Add"), filter(None, node.input[1:])):
            factor = self._shaped(each, factors, f"operand of {kind}")
            answer = self._add(kind, f"after {kind}", answer, factor)
        whole = self._constant("shape", np.array(shape, np.int64))
        self._graph.node.append(
            helper.make_node("Reshape", [answer, whole], node.output[:1])
        )

    def _constant(self, what: str, value: Any) -> str:
        tensor = numpy_helper.from_array(np.asarray(value), self._name + what)
        self._graph.initializer.append(tensor)
        return tensor.name

    def _add(self, kind: str, what: str, *inputs: str, **attributes: Any) -> str:
        made = self._name + what
        node = helper.make_node(kind, inputs, [made], **attributes)
        self._graph.node.append(node)
        return made

    def _shaped(self, source: str, sizes: tuple[int, ...], what: str) -> str:
        if not sizes:
            return source
        shape = self._constant(f"shape of {what}", np.array(sizes, np.int64))
        return self._add("Reshape", what, source, shape)

    def _mean(self, source: str, what: str) -> str:
        if self._version < 18:
            return self._add("ReduceMean", what, source, axes=[1], keepdims=1)
        axis = self._constant(f"axis of {what}", np.array([1]))
        return self._add("ReduceMean", what, source, axis, keepdims=1)
