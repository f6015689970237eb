"""What the conversion to .tflite reads of an ONNX graph: shapes, constants, readers of values, quantisation."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from targets.errors import UserError

if TYPE_CHECKING:
    import onnx

Array = NDArray[Any]


class Quantised(NamedTuple):
    """Constant integers that stand for (value - zero) * scale; one scale, or one for each index of ``axis``."""

    values: Array
    scale: NDArray[np.float32]
    zero: NDArray[np.int64]
    axis: int


class Range(NamedTuple):
    """An int8 activation stands for (value - zero) * scale."""

    scale: float
    zero: int


class Graph:
    """A static ONNX graph.

    Attributes:
        inputs, results: names of the graph's inputs and outputs.
        constants: by name; a quantised one dequantised, as float32.
        shapes: of all values, as ONNX has them.
        readers: of a value, the nodes that take it.
        quantised: the integers of a dequantised constant.
        ranges: of int8 activations; uint8 is the same, shifted by 128.
    """

    def __init__(self, proto: onnx.ModelProto) -> None:
        """Raises: UserError for a quantisation that LiteRT's int8 does not have."""
        from onnx import numpy_helper, shape_inference

        graph = shape_inference.infer_shapes(proto).graph
        self.nodes = list(graph.node)
        self.constants: dict[str, Array] = {
            i.name: numpy_helper.to_array(i) for i in graph.initializer
        }
        for node in self.nodes:
            if node.op_type == "Constant" and node.attribute[0].name == "value":
                value = numpy_helper.to_array(node.attribute[0].t)
                self.constants[node.output[0]] = value
        self.inputs = [v.name for v in graph.input if v.name not in self.constants]
        self.results = [v.name for v in graph.output]
        self.shapes = {
            v.name: tuple(d.dim_value for d in v.type.tensor_type.shape.dim)
            for v in (*graph.input, *graph.value_info, *graph.output)
        }
        self.readers: dict[str, list[onnx.NodeProto]] = {}
        for node in self.nodes:
            for name in node.input:
                self.readers.setdefault(name, []).append(node)
        self.quantised: dict[str, Quantised] = {}
        self.ranges: dict[str, Range] = {}
        self._same: dict[str, str] = {}
        for node in self.nodes:
            self._read_quantisation(node)

    def resolve(self, name: str) -> str:
        """The value that a value is, once Q and DQ between int8 operators are left out."""
        while name in self._same:
            name = self._same[name]
        return name

    def activation(self, node: onnx.NodeProto) -> str | None:
        """The name of the activation function that a node is to LiteRT: RELU or RELU6."""
        if node.op_type == "Relu":
            return "RELU"
        if node.op_type != "Clip":
            return None
        limits = [self.constants[i].item() for i in node.input[1:] if i]
        limits = limits or [a.f for a in node.attribute]
        return "RELU6" if sorted(limits) == [0.0, 6.0] else None

    def is_rectified(self, name: str) -> bool:
        """Whether no element of a value is negative."""
        maker = next((n for n in self.nodes if name in n.output), None)
        if maker is None:
            return False
        if maker.op_type in ("Concat", "MaxPool"):
            return all(self.is_rectified(i) for i in maker.input)
        return self.activation(maker) is not None

    def _read_quantisation(self, node: onnx.NodeProto) -> None:
        name, made = node.input[0], node.output[0]
        if node.op_type == "DequantizeLinear" and name in self.constants:
            axis = next((a.i for a in node.attribute if a.name == "axis"), 1)
            values = self.constants[name]
            scale, zero = self._scale_and_zero(node)
            given = Quantised(values, scale.ravel(), zero.ravel(), axis)
            self.quantised[made] = given
            along = [1] * values.ndim
            if scale.size > 1:
                along[axis] = -1
            shifted = values.astype(np.int64) - zero.reshape(along)
            self.constants[made] = shifted.astype(np.float32) * scale.reshape(along)
        elif node.op_type == "QuantizeLinear":
            scale, zero = self._scale_and_zero(node)
            dtype = self.constants[node.input[2]].dtype if len(node.input) > 2 else None
            if scale.size != 1 or dtype not in (np.int8, np.uint8):
                raise unknown(node, "anything but int8 and uint8 with one scale")
            shift = 128 if dtype == np.uint8 else 0
            found = Range(scale.item(), zero.item() - shift)
            if name in self.inputs:
                self.ranges[made] = found
            else:
                self.ranges[name] = found
                self._same[made] = name
        elif node.op_type == "DequantizeLinear" and made not in self.results:
            self._same[made] = name

    def _scale_and_zero(
        self, node: onnx.NodeProto
    ) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        scale = self.constants[node.input[1]].astype(np.float32)
        zero = np.zeros(scale.shape, np.int64)
        if len(node.input) > 2:
            zero = self.constants[node.input[2]].astype(np.int64)
        return scale, zero


def unknown(node: onnx.NodeProto, what: str) -> UserError:
    return UserError(
        f"node {node.name or node.output[0]!r} ({node.op_type}): the conversion to .tflite does not "
        f"know {what}; give LiteRT's file with --tflite, or leave litert out of --runtimes"
    )
