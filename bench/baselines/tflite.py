"""ONNX → .tflite, for LiteRT: CNNs with channels last, as LiteRT wants them.

It takes what a comparison needs: one image, float32 or the int8 of a QDQ graph. Batch normalisation and ReLU are
fused as LiteRT's own converter does. The schema's Python classes come with LiteRT's wheel.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np

from netship.bench.baselines.int8_graph import int8_activations
from netship.bench.baselines.tflite_file import TfliteFile
from netship.compile import passes
from netship.compile.ir import onnx_form
from netship.compile.ir.graph import Graph, Operator, Tensor
from netship.compile.ir.operators import Convolution, Dense, Limited
from netship.compile.passes.integers import absorb_constants
from netship.compile.passes.simplify import fold_limits, fold_normalisation, limits_of
from netship.targets.errors import UserError

if TYPE_CHECKING:
    import onnx

_PASSES = (fold_normalisation, absorb_constants, fold_limits, int8_activations)
# LiteRT's activation functions, by what they limit values to.
_ACTIVATIONS = {
    (-math.inf, math.inf): "NONE",
    (0.0, math.inf): "RELU",
    (0.0, 6.0): "RELU6",
}
_CHANNELS_LAST = (0, 2, 3, 1)


def convert(proto: onnx.ModelProto, schema: ModuleType) -> bytes:
    """The .tflite flatbuffer of a static ONNX graph; its input and 4-D tensors are NHWC.

    Inputs and outputs stay float32. Between QuantizeLinear and DequantizeLinear everything is int8.

    Args:
        schema: LiteRT's ``schema_py_generated``.

    Raises:
        UserError: an operator, or a form of one, that this conversion does not know.
    """
    graph = passes.run(_PASSES, onnx_form.read_as_written(proto))
    return _Converter(graph, TfliteFile(schema)).converted()


class _Converter:
    """One graph: its tensors to those of the file, operator by operator."""

    def __init__(self, graph: Graph, file: TfliteFile) -> None:
        self.graph, self.file = graph, file
        self.index: dict[str, int] = {}
        self.converters: dict[str, Callable[[Any], None]] = {
            "Conv": self._convolution,
            "Gemm": self._dense,
            "Add": lambda each: self._emit("ADD", each, options="AddOptions"),
            "Relu": self._limit,
            "Clip": self._limit,
            "MaxPool": self._pool,
            "AveragePool": self._pool,
            "GlobalAveragePool": self._global_pool,
            "Concat": self._concat,
            "Flatten": self._reshape,
            "Reshape": self._reshape,
            "Softmax": self._softmax,
            "QuantizeLinear": lambda each: self._emit("QUANTIZE", each),
            "DequantizeLinear": lambda each: self._emit("DEQUANTIZE", each),
            "Identity": self._skip,
            "Dropout": self._skip,
        }

    def converted(self) -> bytes:
        inputs = [self._tensor(each) for each in self.graph.inputs]
        for operator in self.graph.operators:
            if operator.kind not in self.converters:
                raise _unknown(operator, "this operator")
            layer = isinstance(operator, Convolution | Dense)
            if layer and len(operator.activations) > 1:
                raise _unknown(operator, "weights that are computed")
            self.converters[operator.kind](operator)
        outputs = [self.index[each.name] for each in self.graph.outputs]
        return self.file.serialised(inputs, outputs)

    def _emit(
        self,
        code: str,
        operator: Operator,
        inputs: Sequence[int] = (),
        options: str = "",
        **fields: object,
    ) -> None:
        """Add what makes the operator's output, by default of its own inputs."""
        if isinstance(operator, Limited):
            functions = self.file.schema.ActivationFunctionType
            kind = _activation(operator, operator.limits)
            fields["fusedActivationFunction"] = int(getattr(functions, kind))
        inputs = inputs or [self._tensor(each) for each in operator.inputs if each]
        output = self._tensor(operator.output)
        self.file.operator(code, inputs, output, options, **fields)

    def _tensor(self, tensor: Tensor) -> int:
        """The file's tensor of an activation, or of a constant among activations."""
        if tensor.name not in self.index:
            made = tensor if tensor.value is None else tensor.as_float()
            if len(tensor.shape) == 4:
                made = _ordered(made, _CHANNELS_LAST)
            self.index[tensor.name] = self.file.tensor(made)
        return self.index[tensor.name]

    def _integers(self, name: str, values: Sequence[Any]) -> int:
        value = np.array(values, np.int32)
        return self.file.tensor(Tensor(name, value.shape, "int32", value=value))

    def _skip(self, operator: Operator) -> None:
        self.index[operator.output.name] = self._tensor(operator.input)

    def _limit(self, operator: Operator) -> None:
        inputs = [self._tensor(operator.input)]
        self._emit(_activation(operator, limits_of(operator)), operator, inputs)

    def _convolution(self, operator: Convolution) -> None:
        if len(operator.output.shape) != 4:
            raise _unknown(operator, "a convolution that is not 2-D")
        x, fields = self._window(operator, operator.kernel, operator.dilations)
        fields["dilationHFactor"], fields["dilationWFactor"] = operator.dilations
        code, options, order = "CONV_2D", "Conv2DOptions", _CHANNELS_LAST
        if operator.group == operator.input.shape[1] > 1:
            code, options = "DEPTHWISE_CONV_2D", "DepthwiseConv2DOptions"
            order = (1, 2, 3, 0)
            fields["depthMultiplier"] = operator.output.shape[1] // operator.group
        inputs = [x, *self._weights(operator, order)]
        self._emit(code, operator, inputs, options, **fields)

    def _dense(self, operator: Dense) -> None:
        attributes = operator.attributes
        if attributes.get("alpha", 1.0) != 1.0 or attributes.get("beta", 1.0) != 1.0:
            raise _unknown(operator, "alpha or beta other than 1")
        order = (0, 1) if attributes.get("transB", 0) else (1, 0)
        inputs = [self._tensor(operator.input), *self._weights(operator, order)]
        self._emit("FULLY_CONNECTED", operator, inputs, "FullyConnectedOptions")

    def _weights(
        self, operator: Convolution | Dense, order: Sequence[int]
    ) -> Iterator[int]:
        """Constant weights, their axes in ``order``, and bias; integers in an int8 layer."""
        _, weights, *rest = operator.inputs
        bias = rest[0] if rest else None
        assert weights is not None
        if bias is None and isinstance(operator, Convolution):
            bias = Tensor("", weights.shape[:1], value=np.zeros(weights.shape[:1]))
        constants = {"weights": _ordered(weights, order)}
        if bias is not None:
            constants["bias"] = replace(bias, shape=(bias.size,))
        is_int8 = operator.input.quantisation is not None
        if is_int8 and [x.dtype for x in constants.values()] != ["int8", "int32"]:
            raise _unknown(operator, "weights and bias that are not int8 and int32")
        for what, each in constants.items():
            made = replace(each, name=f"{operator.output.name}/{what}")
            yield self.file.tensor(made if is_int8 else made.as_float())

    def _window(
        self, operator: Operator, kernel: Sequence[int], dilations: Sequence[int]
    ) -> tuple[int, dict[str, object]]:
        """A window's input, and its padding and strides: SAME or VALID, or VALID after a PAD operator where neither fits."""
        attributes, source = operator.attributes, operator.input
        automatic = attributes.get("auto_pad", b"NOTSET")
        if automatic == b"SAME_LOWER":
            raise _unknown(operator, "auto_pad=SAME_LOWER")
        strides = attributes.get("strides", [1, 1])
        pads = np.array(attributes.get("pads", [0, 0, 0, 0])).reshape(2, 2)
        size = np.array(source.shape[2:])
        spread = (np.array(kernel) - 1) * dilations + 1
        total = np.maximum((-(-size // strides) - 1) * strides + spread - size, 0)
        fits = pads.any() and np.array_equal(pads, [total // 2, total - total // 2])
        same = fits or automatic == b"SAME_UPPER"
        x = self._tensor(source)
        if pads.any() and not same:
            name, whole = operator.output.name, x
            rows = self._integers(f"{name}/pads", [[0, 0], *pads.T, [0, 0]])
            shape = (*source.shape[:2], *(size + pads.sum(axis=0)).tolist())
            x = self._tensor(replace(source, name=f"{name}/padded", shape=shape))
            self.file.operator("PAD", [whole, rows], x, "PadOptions")
        paddings = self.file.schema.Padding
        fields = {"padding": paddings.SAME if same else paddings.VALID}
        fields["strideH"], fields["strideW"] = strides
        return x, fields

    def _pool(self, operator: Operator) -> None:
        attributes, kernel = operator.attributes, operator.attributes["kernel_shape"]
        if attributes.get("ceil_mode", 0):
            raise _unknown(operator, "ceil_mode=1")
        biggest = operator.kind == "MaxPool"
        # A PAD operator adds zeros; they change no maximum where no value is negative.
        zeros = attributes.get("count_include_pad", 0) and not biggest
        zeros = zeros or (biggest and self._is_rectified(operator.input))
        if any(attributes.get("pads", [])) and not zeros:
            raise _unknown(operator, "padding")
        x, fields = self._window(operator, kernel, [1, 1])
        fields["filterHeight"], fields["filterWidth"] = kernel
        code = "MAX_POOL_2D" if biggest else "AVERAGE_POOL_2D"
        self._emit(code, operator, [x], "Pool2DOptions", **fields)

    def _is_rectified(self, tensor: Tensor | None) -> bool:
        """Whether no element of a tensor is negative."""
        if tensor is None or tensor.name not in self.graph.makers:
            return False
        maker = self.graph.makers[tensor.name]
        if maker.kind in ("Concat", "MaxPool"):
            return all(map(self._is_rectified, maker.inputs))
        limits = maker.limits if isinstance(maker, Limited) else limits_of(maker)
        return limits is not None and limits[0] >= 0

    def _global_pool(self, operator: Operator) -> None:
        axes = self._integers(f"{operator.output.name}/axes", [1, 2])
        inputs = [self._tensor(operator.input), axes]
        self._emit("MEAN", operator, inputs, "ReducerOptions", keepDims=True)

    def _concat(self, operator: Operator) -> None:
        axis = operator.attributes["axis"]
        if len(operator.output.shape) == 4:
            axis = _CHANNELS_LAST.index(axis % 4)
        self._emit("CONCATENATION", operator, (), "ConcatenationOptions", axis=axis)

    def _reshape(self, operator: Operator) -> None:
        shape, to = operator.input.shape, operator.output.shape
        if len(to) == 4 or (len(shape) == 4 and shape[2:] != (1, 1)):
            what = "a shape that mixes channels with rows and columns"
            raise _unknown(operator, what)
        sizes = self._integers(f"{operator.output.name}/shape", to)
        inputs = [self._tensor(operator.input), sizes]
        self._emit("RESHAPE", operator, inputs, "ReshapeOptions", newShape=list(to))

    def _softmax(self, operator: Operator) -> None:
        rank = len(operator.input.shape)
        if rank != 2 or operator.attributes.get("axis", -1) % rank != 1:
            raise _unknown(operator, "a softmax over another axis than the classes")
        self._emit("SOFTMAX", operator, (), "SoftmaxOptions", beta=1.0)


def _activation(operator: Operator, limits: tuple[float, float] | None) -> str:
    """LiteRT's name of what limits values so."""
    if limits not in _ACTIVATIONS:
        raise _unknown(operator, "bounds other than 0 and 6")
    return _ACTIVATIONS[limits]


def _ordered(tensor: Tensor, order: Sequence[int]) -> Tensor:
    """A tensor with its axes in another order."""
    shape = tuple(tensor.shape[axis] for axis in order)
    value = None if tensor.value is None else tensor.value.transpose(order)
    quantisation = tensor.quantisation
    if quantisation is not None:
        axis = order.index(quantisation.axis or 0)
        quantisation = replace(quantisation, axis=axis)
    return replace(tensor, shape=shape, value=value, quantisation=quantisation)


def _unknown(operator: Operator, what: str) -> UserError:
    return UserError(
        f"node {operator.label!r} ({operator.kind}): the conversion to .tflite does not "
        f"know {what}; give LiteRT's file with --tflite, or leave litert out of --runtimes"
    )
