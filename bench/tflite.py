"""ONNX → .tflite, for LiteRT under the meter: CNNs, channels last as LiteRT wants them.

Only what a peer needs: one image in, float32 or the int8 of a QDQ graph, BN and ReLU fused the way
LiteRT's own converter does. The schema's Python classes come with LiteRT's wheel.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from targets.errors import UserError

if TYPE_CHECKING:
    import onnx

Array = NDArray[Any]

_SCHEMA_VERSION = 3
_IDENTIFIER = b"TFL3"
_SKIPPED = frozenset(["Identity", "Dropout"])


def convert(proto: onnx.ModelProto, schema: ModuleType) -> bytes:
    """The .tflite flatbuffer of a static ONNX graph; its input and 4-D tensors are NHWC.

    Inputs and outputs stay float32. Between QuantizeLinear and DequantizeLinear all is int8:
    uint8 activations are the same, shifted by 128.

    Args:
        schema: LiteRT's ``schema_py_generated``.

    Raises:
        UserError: an operator, or a form of one, that this conversion does not know.
    """
    builder = importlib.import_module("flatbuffers").Builder(1 << 24)
    model = _Converter(proto, schema).model()
    builder.Finish(model.Pack(builder), file_identifier=_IDENTIFIER)
    return bytes(builder.Output())


class _Quantised(NamedTuple):
    """Integers and what they stand for: (value - zero) * scale, a scale for each of ``axis`` or one."""

    values: Array
    scale: NDArray[np.float32]
    zero: NDArray[np.int64]
    axis: int


class _Range(NamedTuple):
    """What an int8 activation stands for: (value - zero) * scale."""

    scale: float
    zero: int


class _Converter:
    """One graph on its way: ONNX values to indices of tensors in the flatbuffer."""

    def __init__(self, proto: onnx.ModelProto, schema: ModuleType) -> None:
        from onnx import numpy_helper, shape_inference

        proto = shape_inference.infer_shapes(proto)
        self.graph, self.s = proto.graph, schema
        self.constants: dict[str, Array] = {
            i.name: numpy_helper.to_array(i) for i in self.graph.initializer
        }
        for node in self.graph.node:
            if node.op_type == "Constant" and node.attribute[0].name == "value":
                self.constants[node.output[0]] = numpy_helper.to_array(
                    node.attribute[0].t
                )
        values = [*self.graph.input, *self.graph.value_info, *self.graph.output]
        self.shapes = {
            v.name: tuple(d.dim_value for d in v.type.tensor_type.shape.dim)
            for v in values
        }
        self.users: dict[str, list[onnx.NodeProto]] = {}
        for node in self.graph.node:
            for name in node.input:
                self.users.setdefault(name, []).append(node)
        self.results = {output.name for output in self.graph.output}
        self.quantised: dict[str, _Quantised] = {}
        self.ranges: dict[str, _Range] = {}
        self.same: dict[str, str] = {}
        for node in self.graph.node:
            self._note_quantisation(node)
        self.tensors: list[Any] = []
        self.buffers: list[Any] = [schema.BufferT()]
        self.operators: list[Any] = []
        self.codes: list[int] = []
        self.index: dict[str, int] = {}
        self.done: set[str] = set()

    def model(self) -> Any:
        s = self.s
        inputs = [v.name for v in self.graph.input if v.name not in self.constants]
        for name in inputs:
            self._value(name)
        for node in self.graph.node:
            if node.output[0] not in self.done and node.op_type != "Constant":
                self._node(node)
        subgraph = s.SubGraphT()
        subgraph.tensors, subgraph.operators = self.tensors, self.operators
        subgraph.inputs = [self.index[name] for name in inputs]
        subgraph.outputs = [self.index[v.name] for v in self.graph.output]
        subgraph.name = b"main"
        model = s.ModelT()
        model.version, model.description = _SCHEMA_VERSION, b"converted from ONNX"
        model.subgraphs, model.buffers = [subgraph], self.buffers
        model.operatorCodes = [self._code(code) for code in self.codes]
        return model

    def _code(self, number: int) -> Any:
        code = self.s.OperatorCodeT()
        code.builtinCode, code.version = number, 1
        code.deprecatedBuiltinCode = min(number, 127)
        return code

    # Quantisation.

    def _note_quantisation(self, node: onnx.NodeProto) -> None:
        """Learn what a QuantizeLinear or DequantizeLinear says of the values before and after it."""
        name, made = node.input[0], node.output[0]
        if node.op_type == "DequantizeLinear" and name in self.constants:
            axis = next((a.i for a in node.attribute if a.name == "axis"), 1)
            values = self.constants[name]
            scale, zero = self._scale_and_zero(node)
            given = _Quantised(values, scale.ravel(), zero.ravel(), axis)
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
                raise _unknown(node, "anything but int8 and uint8 with one scale")
            shift = 128 if dtype == np.uint8 else 0
            range_ = _Range(scale.item(), zero.item() - shift)
            is_input = any(name == value.name for value in self.graph.input)
            self.ranges[made if is_input else name] = range_
            if not is_input:
                self.same[made] = name
        elif node.op_type == "DequantizeLinear" and made not in self.results:
            self.same[made] = name

    def _scale_and_zero(
        self, node: onnx.NodeProto
    ) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        scale = self.constants[node.input[1]].astype(np.float32)
        zero = np.zeros(scale.shape, np.int64)
        if len(node.input) > 2:
            zero = self.constants[node.input[2]].astype(np.int64)
        return scale, zero

    def _quantise(self, node: onnx.NodeProto, _attributes: dict[str, Any]) -> None:
        if node.output[0] in self.ranges:
            self._operator(
                "QUANTIZE", [self._value(node.input[0])], self._value(node.output[0])
            )

    def _dequantise(self, node: onnx.NodeProto, _attributes: dict[str, Any]) -> None:
        if node.output[0] in self.results:
            self._operator(
                "DEQUANTIZE", [self._value(node.input[0])], self._value(node.output[0])
            )

    def _parameters(self, scale: Array, zero: Array, axis: int = 0) -> Any:
        parameters = self.s.QuantizationParametersT()
        parameters.scale, parameters.zeroPoint = scale.tolist(), zero.tolist()
        parameters.quantizedDimension = axis
        return parameters

    def _integers(self, name: str, of: str, kernel: Array, axis: int) -> int:
        """A constant tensor of the integers ``kernel``, quantised as the value ``of`` is."""
        given = self.quantised[of]
        index = self._constant(name, kernel)
        self.tensors[index].quantization = self._parameters(
            given.scale, given.zero, axis
        )
        return index

    # Tensors.

    def _tensor(self, name: str, shape: Sequence[int], dtype: int, buffer: int) -> int:
        tensor = self.s.TensorT()
        tensor.name, tensor.shape = name.encode(), list(shape)
        tensor.type, tensor.buffer = dtype, buffer
        self.tensors.append(tensor)
        return len(self.tensors) - 1

    def _constant(self, name: str, value: Array) -> int:
        types = self.s.TensorType
        dtype = {"int8": types.INT8, "int32": types.INT32}.get(
            value.dtype.name, types.FLOAT32
        )
        buffer = self.s.BufferT()
        buffer.data = np.frombuffer(np.ascontiguousarray(value).tobytes(), np.uint8)
        self.buffers.append(buffer)
        return self._tensor(name, value.shape, dtype, len(self.buffers) - 1)

    def _value(self, name: str) -> int:
        """The tensor of an ONNX value: of a constant, or of what a node computes."""
        while name in self.same:
            name = self.same[name]
        if name not in self.index:
            if name in self.constants:
                self.index[name] = self._constant(
                    name, _last(self.constants[name]).astype(np.float32)
                )
            else:
                shape = self.shapes[name]
                shape = (shape[0], *shape[2:], shape[1]) if len(shape) == 4 else shape
                self.index[name] = self._tensor(
                    name, shape, self.s.TensorType.FLOAT32, 0
                )
                if name in self.ranges:
                    tensor = self.tensors[self.index[name]]
                    tensor.type = self.s.TensorType.INT8
                    scale, zero = self.ranges[name]
                    tensor.quantization = self._parameters(
                        np.array([scale]), np.array([zero])
                    )
        return self.index[name]

    def _operator(
        self,
        code: str,
        inputs: Sequence[int],
        output: int,
        options: str = "",
        **fields: object,
    ) -> None:
        number = getattr(self.s.BuiltinOperator, code)
        if number not in self.codes:
            self.codes.append(number)
        operator = self.s.OperatorT()
        operator.opcodeIndex = self.codes.index(number)
        operator.inputs, operator.outputs = list(inputs), [output]
        if options:
            operator.builtinOptionsType = getattr(self.s.BuiltinOptions, options)
            operator.builtinOptions = getattr(self.s, f"{options}T")()
            for name, value in fields.items():
                setattr(operator.builtinOptions, name, value)
        self.operators.append(operator)

    # Nodes.

    def _node(self, node: onnx.NodeProto) -> None:
        converters: dict[str, Callable[[onnx.NodeProto, dict[str, Any]], None]] = {
            "Conv": self._convolution,
            "Gemm": self._dense,
            "Add": self._sum,
            "Relu": self._alone,
            "Clip": self._alone,
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
            raise _unknown(node, "this operator")

    def _fused(self, name: str) -> tuple[str, int]:
        """The value that a following ReLU or ReLU6 gives, and its code; ``name`` and none without one."""
        kinds = self.s.ActivationFunctionType
        users = self.users.get(name, [])
        if len(users) == 1 and name not in self.results:
            kind = self._activation(users[0])
            if kind is not None:
                self.done.add(users[0].output[0])
                return users[0].output[0], kind
        return name, kinds.NONE

    def _activation(self, node: onnx.NodeProto) -> int | None:
        kinds = self.s.ActivationFunctionType
        if node.op_type == "Relu":
            return int(kinds.RELU)
        if node.op_type != "Clip":
            return None
        limits = [self.constants[i].item() for i in node.input[1:] if i]
        limits = limits or [a.f for a in node.attribute]
        if sorted(limits) == [0.0, 6.0]:
            return int(kinds.RELU6)
        return None

    def _alone(self, node: onnx.NodeProto, _attributes: dict[str, Any]) -> None:
        kind = self._activation(node)
        if kind is None:
            raise _unknown(node, "bounds other than 0 and 6")
        code = "RELU" if node.op_type == "Relu" else "RELU6"
        self._operator(code, [self._value(node.input[0])], self._value(node.output[0]))

    def _folded(
        self, node: onnx.NodeProto
    ) -> tuple[NDArray[np.float32], NDArray[np.float32], str]:
        """A convolution's weights OIHW and bias, a following batch normalisation folded in."""
        weight = self.constants[node.input[1]].astype(np.float64)
        bias = np.zeros(weight.shape[0])
        if len(node.input) > 2:
            bias = self.constants[node.input[2]].astype(np.float64)
        name = node.output[0]
        users = self.users.get(name, [])
        if len(users) == 1 and users[0].op_type == "BatchNormalization":
            norm = users[0]
            scale, shift, mean, variance = (
                self.constants[i].astype(np.float64) for i in norm.input[1:5]
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
            raise _unknown(node, "a convolution that is not 2-D")
        groups = attributes.get("group", 1)
        strides, dilations = (
            attributes.get(key, [1, 1]) for key in ("strides", "dilations")
        )
        x, padding = self._padded(
            node, attributes, weight.shape[2:], strides, dilations, 0.0
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
        channels = self.shapes[node.input[0]][1]
        depthwise = groups == channels and groups > 1
        order = (1, 2, 3, 0) if depthwise else (0, 2, 3, 1)
        if depthwise:
            shared["depthMultiplier"] = weight.shape[0] // groups
        inputs = [x, *self._weights_and_bias(node, name, weight, bias, order)]
        kind = ("DEPTHWISE_CONV_2D", "DepthwiseConv2DOptions")
        if not depthwise:
            kind = ("CONV_2D", "Conv2DOptions")
        self._operator(kind[0], inputs, self._value(name), kind[1], **shared)

    def _weights_and_bias(
        self,
        node: onnx.NodeProto,
        name: str,
        weight: NDArray[np.float32],
        bias: NDArray[np.float32] | None,
        order: tuple[int, ...],
    ) -> list[int]:
        """Constant tensors, the weights' dimensions in ``order``; integers in an int8 layer."""
        if self.tensors[self._value(node.input[0])].type != self.s.TensorType.INT8:
            tensors = [self._constant(f"{name}/weights", weight.transpose(order))]
            if bias is not None:
                tensors.append(self._constant(f"{name}/bias", bias))
            return tensors
        of = [i for i in node.input[1:] if i in self.quantised]
        values = [self.quantised[i].values for i in of]
        if [v.dtype.name for v in values] != ["int8", "int32"]:
            raise _unknown(node, "weights and bias that are not int8 and int32")
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
        fill: float,
    ) -> tuple[int, int]:
        """A window's input and its padding: SAME or VALID, or VALID behind a PAD that says more."""
        paddings = self.s.Padding
        x, name = self._value(node.input[0]), node.input[0]
        automatic = attributes.get("auto_pad", b"NOTSET")
        if automatic in (b"SAME_UPPER", b"SAME_LOWER"):
            if automatic == b"SAME_LOWER":
                raise _unknown(node, "auto_pad=SAME_LOWER")
            return x, paddings.SAME
        pads = list(attributes.get("pads", [0, 0, 0, 0]))
        if not any(pads):
            return x, paddings.VALID
        size = self.shapes[name][2:]
        same = []
        for length, k, stride, dilation in zip(
            size, kernel, strides, dilations, strict=True
        ):
            spread = (k - 1) * dilation + 1
            total = max((-(-length // stride) - 1) * stride + spread - length, 0)
            same.append((total // 2, total - total // 2))
        if pads == [same[0][0], same[1][0], same[0][1], same[1][1]]:
            return x, paddings.SAME
        if fill:
            raise _unknown(node, "this padding")
        rows = [[0, 0], [pads[0], pads[2]], [pads[1], pads[3]], [0, 0]]
        amounts = self._constant(f"{node.output[0]}/pads", np.array(rows, np.int32))
        n, c, h, w = self.shapes[name]
        shape = (n, h + pads[0] + pads[2], w + pads[1] + pads[3], c)
        given = self.tensors[x]
        padded = self._tensor(f"{node.output[0]}/padded", shape, given.type, 0)
        self.tensors[padded].quantization = given.quantization
        self._operator("PAD", [x, amounts], padded, "PadOptions")
        return padded, paddings.VALID

    def _dense(self, node: onnx.NodeProto, attributes: dict[str, Any]) -> None:
        if attributes.get("alpha", 1.0) != 1.0 or attributes.get("beta", 1.0) != 1.0:
            raise _unknown(node, "alpha or beta other than 1")
        weight = self.constants[node.input[1]]
        weight = weight if attributes.get("transB", 0) else weight.T
        name, activation = self._fused(node.output[0])
        bias = None
        if len(node.input) > 2:
            bias = self.constants[node.input[2]].astype(np.float32).ravel()
        tensors = self._weights_and_bias(
            node, name, weight.astype(np.float32), bias, (0, 1)
        )
        inputs = [self._value(node.input[0]), *tensors]
        self._operator(
            "FULLY_CONNECTED",
            inputs,
            self._value(name),
            "FullyConnectedOptions",
            fusedActivationFunction=activation,
        )

    def _sum(self, node: onnx.NodeProto, _attributes: dict[str, Any]) -> None:
        name, activation = self._fused(node.output[0])
        self._operator(
            "ADD",
            [self._value(i) for i in node.input],
            self._value(name),
            "AddOptions",
            fusedActivationFunction=activation,
        )

    def _pool(self, node: onnx.NodeProto, attributes: dict[str, Any]) -> None:
        kernel = attributes["kernel_shape"]
        strides = attributes.get("strides", [1, 1])
        if attributes.get("ceil_mode", 0):
            raise _unknown(node, "ceil_mode=1")
        biggest = node.op_type == "MaxPool"
        pads = attributes.get("pads", [0, 0, 0, 0])
        # A maximum over values that a ReLU gave may take zeros in; nothing else may.
        zeros = biggest and self._is_rectified(node.input[0])
        if any(pads) and not zeros:
            counted = attributes.get("count_include_pad", 0)
            if not counted or biggest:
                raise _unknown(node, "padding")
        x, padding = self._padded(node, attributes, kernel, strides, [1, 1], 0.0)
        self._operator(
            "MAX_POOL_2D" if biggest else "AVERAGE_POOL_2D",
            [x],
            self._value(node.output[0]),
            "Pool2DOptions",
            padding=padding,
            strideH=strides[0],
            strideW=strides[1],
            filterHeight=kernel[0],
            filterWidth=kernel[1],
        )

    def _is_rectified(self, name: str) -> bool:
        maker = next((n for n in self.graph.node if name in n.output), None)
        if maker is None:
            return False
        if maker.op_type in ("Concat", "MaxPool"):
            return all(self._is_rectified(i) for i in maker.input)
        return self._activation(maker) is not None

    def _global_pool(self, node: onnx.NodeProto, _attributes: dict[str, Any]) -> None:
        axes = self._constant(f"{node.output[0]}/axes", np.array([1, 2], np.int32))
        self._operator(
            "MEAN",
            [self._value(node.input[0]), axes],
            self._value(node.output[0]),
            "ReducerOptions",
            keepDims=True,
        )

    def _concat(self, node: onnx.NodeProto, attributes: dict[str, Any]) -> None:
        axis = attributes["axis"]
        rank = len(self.shapes[node.output[0]])
        if rank == 4:
            axis = (0, 3, 1, 2)[axis % 4]
        self._operator(
            "CONCATENATION",
            [self._value(i) for i in node.input],
            self._value(node.output[0]),
            "ConcatenationOptions",
            axis=axis,
        )

    def _reshape(self, node: onnx.NodeProto, _attributes: dict[str, Any]) -> None:
        shape = self.shapes[node.input[0]]
        to = self.shapes[node.output[0]]
        if len(to) == 4 or (len(shape) == 4 and shape[2:] != (1, 1)):
            raise _unknown(node, "a shape that mixes channels with rows and columns")
        new_shape = self._constant(f"{node.output[0]}/shape", np.array(to, np.int32))
        self._operator(
            "RESHAPE",
            [self._value(node.input[0]), new_shape],
            self._value(node.output[0]),
            "ReshapeOptions",
            newShape=list(to),
        )

    def _softmax(self, node: onnx.NodeProto, attributes: dict[str, Any]) -> None:
        rank = len(self.shapes[node.input[0]])
        if rank != 2 or attributes.get("axis", -1) % rank != 1:
            raise _unknown(node, "a softmax over anything but classes")
        self._operator(
            "SOFTMAX",
            [self._value(node.input[0])],
            self._value(node.output[0]),
            "SoftmaxOptions",
            beta=1.0,
        )


def _last(value: Array) -> Array:
    """Channels last, of a 4-D constant."""
    return value.transpose(0, 2, 3, 1) if value.ndim == 4 else value


def _unknown(node: onnx.NodeProto, what: str) -> UserError:
    return UserError(
        f"node {node.name or node.output[0]!r} ({node.op_type}): the conversion to .tflite does not "
        f"know {what}; give LiteRT's file with --tflite, or leave litert out of --runtimes"
    )
