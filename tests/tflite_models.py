"""Small .tflite files and networks for tests, written with the schema of the package tflite."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import flatbuffers
import numpy as np
import tflite
from numpy.typing import NDArray

Array = NDArray[Any]
SAME, VALID = tflite.Padding.SAME, tflite.Padding.VALID
RELU, RELU6 = (
    tflite.ActivationFunctionType.RELU,
    tflite.ActivationFunctionType.RELU6,
)


class TfliteFile:
    """One subgraph; tensors are known by their index."""

    def __init__(self) -> None:
        self.builder = flatbuffers.Builder(1024)
        self._tensors: list[int] = []
        self._buffers: list[Array] = [np.zeros(0, np.uint8)]
        self._operators: list[int] = []
        self._codes: list[tuple[int, str]] = []

    def tensor(
        self,
        shape: Sequence[int],
        dtype: str = "float32",
        value: Any = None,
        scale: Any = None,
        zero: Any = 0,
        axis: int = 0,
        name: str = "",
        **fields: Any,
    ) -> int:
        """Add a tensor; returns its index.

        Args:
            scale, zero: one number or one for each element of ``axis``; no scale is no quantisation.
            fields: of the schema's table Tensor, in place of what the other arguments make.
        """
        if value is not None:
            value = np.asarray(value, dtype)
            assert value.shape == tuple(shape)
            self._buffers.append(np.frombuffer(value.tobytes(), np.uint8))
        table = {
            "Name": self.builder.CreateString(name or f"t{len(self._tensors)}"),
            "Shape": self._vector(shape, np.int32),
            "Type": getattr(tflite.TensorType, dtype.upper()),
            "Buffer": len(self._buffers) - 1 if value is not None else 0,
        }
        if scale is not None:
            scales = np.atleast_1d(np.array(scale, np.float32))
            zeros = np.broadcast_to(np.array(zero, np.int64), scales.shape)
            table["Quantization"] = self._table(
                "QuantizationParameters",
                Scale=self._vector(scales, np.float32),
                ZeroPoint=self._vector(zeros, np.int64),
                QuantizedDimension=axis,
            )
        self._tensors.append(self._table("Tensor", **table | fields))
        return len(self._tensors) - 1

    def signature(self, shape: Sequence[int]) -> int:
        """The field ShapeSignature of a tensor."""
        return self._vector(shape, np.int32)

    def constant(self, value: Any, dtype: str = "int32") -> int:
        array = np.asarray(value, dtype)
        return self.tensor(array.shape, dtype, array)

    def operator(
        self,
        kind: str,
        inputs: Sequence[int],
        outputs: Sequence[int],
        options: str = "",
        custom: str = "",
        **fields: Any,
    ) -> None:
        """Add an operator; ``options`` names the schema's table, filled with ``fields``."""
        code = (getattr(tflite.BuiltinOperator, kind), custom)
        if code not in self._codes:
            self._codes.append(code)
        table = {
            "OpcodeIndex": self._codes.index(code),
            "Inputs": self._vector(inputs, np.int32),
            "Outputs": self._vector(outputs, np.int32),
        }
        if options:
            table["BuiltinOptions"] = self._table(options, **fields)
            table["BuiltinOptionsType"] = getattr(tflite.BuiltinOptions, options)
        self._operators.append(self._table("Operator", **table))

    def serialised(
        self,
        inputs: Sequence[int],
        outputs: Sequence[int],
        version: int = 3,
        subgraphs: int = 1,
    ) -> bytes:
        graph = self._table(
            "SubGraph",
            Tensors=self._offsets(self._tensors),
            Operators=self._offsets(self._operators),
            Inputs=self._vector(inputs, np.int32),
            Outputs=self._vector(outputs, np.int32),
        )
        codes = []
        for number, custom in self._codes:
            fields = {
                "BuiltinCode": number,
                "DeprecatedBuiltinCode": min(number, 127),
                "Version": 1,
            }
            if custom:
                fields["CustomCode"] = self.builder.CreateString(custom)
            codes.append(self._table("OperatorCode", **fields))
        buffers = []
        for data in self._buffers:
            held = {"Data": self.builder.CreateNumpyVector(data)} if data.size else {}
            buffers.append(self._table("Buffer", **held))
        model = self._table(
            "Model",
            Version=version,
            OperatorCodes=self._offsets(codes),
            Subgraphs=self._offsets([graph] * subgraphs),
            Buffers=self._offsets(buffers),
        )
        self.builder.Finish(model, file_identifier=b"TFL3")
        return bytes(self.builder.Output())

    def _vector(self, values: Any, dtype: Any) -> int:
        offset: int = self.builder.CreateNumpyVector(
            np.atleast_1d(np.array(values, dtype)).ravel()
        )
        return offset

    def _offsets(self, offsets: Sequence[int]) -> int:
        self.builder.StartVector(4, len(offsets), 4)
        for each in reversed(offsets):
            self.builder.PrependUOffsetTRelative(each)
        made: int = self.builder.EndVector()
        return made

    def _table(self, kind: str, **fields: Any) -> int:
        getattr(tflite, f"{kind}Start")(self.builder)
        for name, value in fields.items():
            getattr(tflite, f"{kind}Add{name}")(self.builder, value)
        made: int = getattr(tflite, f"{kind}End")(self.builder)
        return made


def convolution(
    file: TfliteFile,
    x: int,
    weights: Array,
    output: int,
    kind: str = "CONV_2D",
    **fields: Any,
) -> None:
    """A convolution of int8 with a scale for each channel and a bias."""
    random = np.random.default_rng(len(weights))
    axis = 0 if kind == "CONV_2D" else 3
    count = weights.shape[axis]
    scales = np.linspace(0.004, 0.01, count)
    w = file.tensor(weights.shape, "int8", weights, scale=scales, axis=axis)
    b = file.tensor((count,), "int32", random.integers(-300, 300, count), scale=scales)
    options = "Conv2DOptions" if kind == "CONV_2D" else "DepthwiseConv2DOptions"
    defaults = {
        "StrideH": 1,
        "StrideW": 1,
        "DilationHFactor": 1,
        "DilationWFactor": 1,
        **({} if kind == "CONV_2D" else {"DepthMultiplier": 1}),
    }
    file.operator(kind, [x, w, b], [output], options, **defaults | fields)


def network(
    pooled: bool = True, dtype: str = "int8", float_ports: bool = False
) -> bytes:
    """A convolution, a depthwise one, their sum, a fully connected layer.

    Args:
        pooled: an average pool before the fully connected layer.
        dtype: of the activations.
        float_ports: the input and the output are float32.
    """
    random, file = np.random.default_rng(3), TfliteFile()
    low = np.iinfo(dtype).min

    def activation(
        shape: tuple[int, ...], scale: float, zero: int, name: str = ""
    ) -> int:
        return file.tensor(shape, dtype, scale=scale, zero=low + zero, name=name)

    def weights(*shape: int) -> Array:
        return random.integers(-127, 128, shape)

    source = x = activation((1, 8, 8, 3), 1 / 255, 0, "" if float_ports else "image")
    if float_ports:
        source = file.tensor((1, 8, 8, 3), name="image")
        file.operator("QUANTIZE", [source], [x])
    first = activation((1, 4, 4, 8), 0.0235, 0, "first")
    strides: dict[str, Any] = {"StrideH": 2, "StrideW": 2}
    convolution(
        file,
        x,
        weights(8, 3, 3, 3),
        first,
        Padding=SAME,
        FusedActivationFunction=RELU6,
        **strides,
    )
    second = activation((1, 4, 4, 8), 0.03, 123, "second")
    convolution(
        file, first, weights(1, 3, 3, 8), second, "DEPTHWISE_CONV_2D", Padding=SAME
    )
    total = activation((1, 4, 4, 8), 0.05, 123, "total")
    file.operator(
        "ADD", [first, second], [total], "AddOptions", FusedActivationFunction=RELU
    )
    if pooled:
        pool = activation((1, 1, 1, 8), 0.05, 123)
        fields: dict[str, Any] = {
            "FilterHeight": 4,
            "FilterWidth": 4,
            "StrideH": 4,
            "StrideW": 4,
        }
        file.operator(
            "AVERAGE_POOL_2D", [total], [pool], "Pool2DOptions", Padding=VALID, **fields
        )
        total = pool
    size = 8 if pooled else 128
    row = activation((1, size), 0.05, 123)
    file.operator("RESHAPE", [total, file.constant([1, size])], [row])
    scores = activation((1, 5), 0.1, 131, "" if float_ports else "scores")
    matrix = file.tensor((5, size), "int8", weights(5, size), scale=0.02)
    file.operator("FULLY_CONNECTED", [row, matrix], [scores], "FullyConnectedOptions")
    if float_ports:
        stored, scores = scores, file.tensor((1, 5), name="scores")
        file.operator("DEQUANTIZE", [stored], [scores])
    return file.serialised([source], [scores])
