"""ONNX → .tflite, for LiteRT: CNNs with channels last, as LiteRT wants them.

It takes what a comparison needs: one image, float32 or the int8 of a QDQ graph. Batch normalisation and ReLU are
fused as LiteRT's own converter does. The schema's Python classes come with LiteRT's wheel.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from bench.baselines.tflite_file import TfliteFile
from bench.baselines.tflite_graph import Graph, unknown

if TYPE_CHECKING:
    import onnx

Array = NDArray[Any]

_SKIPPED = frozenset(["Identity", "Dropout"])


def convert(proto: onnx.ModelProto, schema: ModuleType) -> bytes:
    """The .tflite flatbuffer of a static ONNX graph; its input and 4-D tensors are NHWC.

    Inputs and outputs stay float32. Between QuantizeLinear and DequantizeLinear everything is int8.

    Args:
        schema: LiteRT's ``schema_py_generated``.

    Raises:
        UserError: an operator, or a form of one, that this conversion does not know.
    """
    return _Converter(Graph(proto), TfliteFile(schema)).converted()


class _Converter:
    """One graph: ONNX values to tensors of the file, node by node."""

    def __init__(self, graph: Graph, file: TfliteFile) -> None:
        self.graph, self.file, self.s = graph, file, file.schema
        self.index: dict[str, int] = {}
        self.done: set[str] = set()

    def converted(self) -> bytes:
        inputs = [self._value(name) for name in self.graph.inputs]
        for node in self.graph.nodes:
            if node.output[0] not in self.done and node.op_type != "Constant":
                self._node(node)
        outputs = [self.index[name] for name in self.graph.results]
        return self.file.serialised(inputs, outputs)

    def _quantise(self, node: onnx.NodeProto, _attributes: dict[str, Any]) -> None:
        if node.output[0] in self.graph.ranges:
            self._emit("QUANTIZE", node.input[:1], node.output[0])

    def _dequantise(self, node: onnx.NodeProto, _attributes: dict[str, Any]) -> None:
        if node.output[0] in self.graph.results:
            self._emit("DEQUANTIZE", node.input[:1], node.output[0])

    def _emit(
        self,
        code: str,
        inputs: Iterable[str | int],
        output: str,
        options: str = "",
        **fields: object,
    ) -> None:
        """Add an operator on ONNX values or tensors that gives an ONNX value."""
        tensors = [self._value(i) if isinstance(i, str) else i for i in inputs]
        self.file.operator(code, tensors, self._value(output), options, **fields)

    def _integers(self, name: str, of: str, kernel: Array, axis: int) -> int:
        """A constant tensor of the integers ``kernel``, quantised as the value ``of`` is."""
        given = self.graph.quantised[of]
        index = self.file.constant(name, kernel)
        self.file.quantise(index, given.scale, given.zero, axis)
        return index

    def _value(self, name: str) -> int:
        """The tensor of an ONNX value: a constant, or what a node computes."""
        name = self.graph.resolve(name)
        if name not in self.index:
            if name in self.graph.constants:
                value = _last(self.graph.constants[name]).astype(np.float32)
                self.index[name] = self.file.constant(name, value)
            else:
                shape = self.graph.shapes[name]
                shape = (shape[0], *shape[2:], shape[1]) if len(shape) == 4 else shape
                found = self.graph.ranges.get(name)
                types = self.s.TensorType
                dtype = types.FLOAT32 if found is None else types.INT8
                self.index[name] = self.file.tensor(name, shape, dtype, 0)
                if found is not None:
                    scale, zero = np.array([found.scale]), np.array([found.zero])
                    self.file.quantise(self.index[name], scale, zero)
        return self.index[name]

    def _node(self, node: onnx.NodeProto) -> None:
        converters: dict[str, Callable[[onnx.NodeProto, dict[str, Any]], None]] = {
            "Conv": self._convolution,
            "Gemm": self._dense,
            "Add": self._sum,
            "Relu": self._activation,
            "Clip": self._activation,
            "MaxPool": self._pool,
            "AveragePool": self._pool,
            "GlobalAveragePool": self._global_pool,
            "Concat": self._concat,
            "Flatten": self._reshape,
            "Reshape": self._reshape,
            "Softmax": self._softmax,
            "QuantizeLinear": self._quantise,
            "DequantizeLinear": self._dequantise,
        }
        if node.op_type in _SKIPPED:
            self.index[node.output[0]] = self._value(node.input[0])
        elif node.op_type in converters:
            from onnx import helper

            attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
            converters[node.op_type](node, attributes)
        else:
            raise unknown(node, "this operator")

    def _fused(self, name: str) -> tuple[str, int]:
        """What a following ReLU or ReLU6 gives, and its code; ``name`` and no activation where none follows."""
        readers = self.graph.readers.get(name, [])
        if len(readers) == 1 and name not in self.graph.results:
            kind = self.graph.activation(readers[0])
            if kind is not None:
                self.done.add(readers[0].output[0])
                return readers[0].output[0], self._activation_code(kind)
        return name, self._activation_code("NONE")

    def _activation_code(self, kind: str) -> int:
        return int(getattr(self.s.ActivationFunctionType, kind))

    def _activation(self, node: onnx.NodeProto, _attributes: dict[str, Any]) -> None:
        kind = self.graph.activation(node)
        if kind is None:
            raise unknown(node, "bounds other than 0 and 6")
        self._emit(kind, node.input[:1], node.output[0])

    def _folded(
        self, node: onnx.NodeProto
    ) -> tuple[NDArray[np.float32], NDArray[np.float32], str]:
        """A convolution's weights OIHW and bias, a following batch normalisation folded in."""
        weight = self.graph.constants[node.input[1]].astype(np.float64)
        bias = np.zeros(weight.shape[0])
        if len(node.input) > 2:
            bias = self.graph.constants[node.input[2]].astype(np.float64)
        name = node.output[0]
        users = self.graph.readers.get(name, [])
        if len(users) == 1 and users[0].op_type == "BatchNormalization":
            norm = users[0]
            scale, shift, mean, variance = (
                self.graph.constants[i].astype(np.float64) for i in norm.input[1:5]
            )
            epsilon = next((a.f for a in norm.attribute if a.name == "epsilon"), 1e-5)
            factor = scale / np.sqrt(variance + epsilon)
            weight = weight * factor.reshape(-1, 1, 1, 1)
            bias = (bias - mean) * factor + shift
            name = norm.output[0]
            self.done.add(name)
        return weight.astype(np.float32), bias.astype(np.float32), name

    def _convolution(self, node: onnx.NodeProto, attributes: dict[str, Any]) -> None:
        weight, bias, name = self._folded(node)
        if weight.ndim != 4:
            raise unknown(node, "a convolution that is not 2-D")
        groups = attributes.get("group", 1)
        strides, dilations = (
            attributes.get(key, [1, 1]) for key in ("strides", "dilations")
        )
        x, padding = self._padded(
            node, attributes, weight.shape[2:], strides, dilations
        )
        name, activation = self._fused(name)
        shared = {
            "padding": padding,
            "strideH": strides[0],
            "strideW": strides[1],
            "dilationHFactor": dilations[0],
            "dilationWFactor": dilations[1],
            "fusedActivationFunction": activation,
        }
        channels = self.graph.shapes[node.input[0]][1]
        depthwise = groups == channels and groups > 1
        order = (1, 2, 3, 0) if depthwise else (0, 2, 3, 1)
        if depthwise:
            shared["depthMultiplier"] = weight.shape[0] // groups
        inputs = [x, *self._weights_and_bias(node, name, weight, bias, order)]
        code, options = "CONV_2D", "Conv2DOptions"
        if depthwise:
            code, options = "DEPTHWISE_CONV_2D", "DepthwiseConv2DOptions"
        self._emit(code, inputs, name, options, **shared)

    def _weights_and_bias(
        self,
        node: onnx.NodeProto,
        name: str,
        weight: NDArray[np.float32],
        bias: NDArray[np.float32] | None,
        order: tuple[int, ...],
    ) -> list[int]:
        """Constant tensors, the weights' dimensions in ``order``; integers in an int8 layer."""
        if self.file.tensors[self._value(node.input[0])].type != self.s.TensorType.INT8:
            tensors = [self.file.constant(f"{name}/weights", weight.transpose(order))]
            if bias is not None:
                tensors.append(self.file.constant(f"{name}/bias", bias))
            return tensors
        of = [i for i in node.input[1:] if i in self.graph.quantised]
        values = [self.graph.quantised[i].values for i in of]
        if [v.dtype.name for v in values] != ["int8", "int32"]:
            raise unknown(node, "weights and bias that are not int8 and int32")
        axis = order.index(0)
        kernel = values[0]
        if kernel.shape != weight.shape:
            kernel = kernel.T
        return [
            self._integers(f"{name}/weights", of[0], kernel.transpose(order), axis),
            self._integers(f"{name}/bias", of[1], values[1].ravel(), 0),
        ]

    def _padded(
        self,
        node: onnx.NodeProto,
        attributes: dict[str, Any],
        kernel: Sequence[int],
        strides: Sequence[int],
        dilations: Sequence[int],
    ) -> tuple[int, int]:
        """A window's input and its padding: SAME or VALID, or VALID after a PAD operator where neither fits."""
        paddings = self.s.Padding
        x, name = self._value(node.input[0]), node.input[0]
        automatic = attributes.get("auto_pad", b"NOTSET")
        if automatic in (b"SAME_UPPER", b"SAME_LOWER"):
            if automatic == b"SAME_LOWER":
                raise unknown(node, "auto_pad=SAME_LOWER")
            return x, paddings.SAME
        pads = list(attributes.get("pads", [0, 0, 0, 0]))
        if not any(pads):
            return x, paddings.VALID
        size = self.graph.shapes[name][2:]
        same = []
        for length, k, stride, dilation in zip(
            size, kernel, strides, dilations, strict=True
        ):
            spread = (k - 1) * dilation + 1
            total = max((-(-length // stride) - 1) * stride + spread - length, 0)
            same.append((total // 2, total - total // 2))
        if pads == [same[0][0], same[1][0], same[0][1], same[1][1]]:
            return x, paddings.SAME
        rows = [[0, 0], [pads[0], pads[2]], [pads[1], pads[3]], [0, 0]]
        amounts = self.file.constant(f"{node.output[0]}/pads", np.array(rows, np.int32))
        n, c, h, w = self.graph.shapes[name]
        shape = (n, h + pads[0] + pads[2], w + pads[1] + pads[3], c)
        given = self.file.tensors[x]
        padded = self.file.tensor(f"{node.output[0]}/padded", shape, given.type, 0)
        self.file.tensors[padded].quantization = given.quantization
        self.file.operator("PAD", [x, amounts], padded, "PadOptions")
        return padded, paddings.VALID

    def _dense(self, node: onnx.NodeProto, attributes: dict[str, Any]) -> None:
        if attributes.get("alpha", 1.0) != 1.0 or attributes.get("beta", 1.0) != 1.0:
            raise unknown(node, "alpha or beta other than 1")
        weight = self.graph.constants[node.input[1]]
        weight = weight if attributes.get("transB", 0) else weight.T
        name, activation = self._fused(node.output[0])
        bias = None
        if len(node.input) > 2:
            bias = self.graph.constants[node.input[2]].astype(np.float32).ravel()
        tensors = self._weights_and_bias(
            node, name, weight.astype(np.float32), bias, (0, 1)
        )
        fused = {"fusedActivationFunction": activation}
        inputs, options = [node.input[0], *tensors], "FullyConnectedOptions"
        self._emit("FULLY_CONNECTED", inputs, name, options, **fused)

    def _sum(self, node: onnx.NodeProto, _attributes: dict[str, Any]) -> None:
        name, activation = self._fused(node.output[0])
        fused = {"fusedActivationFunction": activation}
        self._emit("ADD", node.input, name, "AddOptions", **fused)

    def _pool(self, node: onnx.NodeProto, attributes: dict[str, Any]) -> None:
        kernel = attributes["kernel_shape"]
        strides = attributes.get("strides", [1, 1])
        if attributes.get("ceil_mode", 0):
            raise unknown(node, "ceil_mode=1")
        biggest = node.op_type == "MaxPool"
        pads = attributes.get("pads", [0, 0, 0, 0])
        # A PAD operator adds zeros; they change no maximum where no value is negative.
        zeros = biggest and self.graph.is_rectified(node.input[0])
        if any(pads) and not zeros:
            counted = attributes.get("count_include_pad", 0)
            if not counted or biggest:
                raise unknown(node, "padding")
        x, padding = self._padded(node, attributes, kernel, strides, [1, 1])
        self._emit(
            "MAX_POOL_2D" if biggest else "AVERAGE_POOL_2D",
            [x],
            node.output[0],
            "Pool2DOptions",
            padding=padding,
            strideH=strides[0],
            strideW=strides[1],
            filterHeight=kernel[0],
            filterWidth=kernel[1],
        )

    def _global_pool(self, node: onnx.NodeProto, _attributes: dict[str, Any]) -> None:
        axes = self.file.constant(f"{node.output[0]}/axes", np.array([1, 2], np.int32))
        inputs = [node.input[0], axes]
        self._emit("MEAN", inputs, node.output[0], "ReducerOptions", keepDims=True)

    def _concat(self, node: onnx.NodeProto, attributes: dict[str, Any]) -> None:
        axis, output = attributes["axis"], node.output[0]
        if len(self.graph.shapes[output]) == 4:
            axis = (0, 3, 1, 2)[axis % 4]
        options = "ConcatenationOptions"
        self._emit("CONCATENATION", node.input, output, options, axis=axis)

    def _reshape(self, node: onnx.NodeProto, _attributes: dict[str, Any]) -> None:
        shape = self.graph.shapes[node.input[0]]
        to = self.graph.shapes[node.output[0]]
        if len(to) == 4 or (len(shape) == 4 and shape[2:] != (1, 1)):
            raise unknown(node, "a shape that mixes channels with rows and columns")
        sizes = np.array(to, np.int32)
        new_shape = self.file.constant(f"{node.output[0]}/shape", sizes)
        inputs = [node.input[0], new_shape]
        self._emit(
            "RESHAPE", inputs, node.output[0], "ReshapeOptions", newShape=list(to)
        )

    def _softmax(self, node: onnx.NodeProto, attributes: dict[str, Any]) -> None:
        rank = len(self.graph.shapes[node.input[0]])
        if rank != 2 or attributes.get("axis", -1) % rank != 1:
            raise unknown(node, "a softmax over another axis than the classes")
        self._emit("SOFTMAX", node.input, node.output[0], "SoftmaxOptions", beta=1.0)


def _last(value: Array) -> Array:
    """Channels last, of a 4-D constant."""
    return value.transpose(0, 2, 3, 1) if value.ndim == 4 else value
