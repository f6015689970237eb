"""A .tflite file in the making: tensors, buffers and operators of the flatbuffer."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import numpy as np

from netship.compile.ir.graph import Tensor

_SCHEMA_VERSION = 3
_IDENTIFIER = b"TFL3"


class TfliteFile:
    """One subgraph; tensors are known by their index.

    Args:
        schema: LiteRT's ``schema_py_generated``.
    """

    def __init__(self, schema: ModuleType) -> None:
        self.schema = schema
        self._tensors: list[Any] = []
        self._buffers: list[Any] = [schema.BufferT()]
        self._operators: list[Any] = []
        self._codes: list[int] = []

    def tensor(self, tensor: Tensor) -> int:
        """Add a tensor of float32, int8 or int32 values, its axes in the file's order."""
        made = self.schema.TensorT()
        made.name, made.shape = tensor.name.encode(), list(tensor.shape)
        made.type = getattr(self.schema.TensorType, tensor.dtype.upper())
        if tensor.value is not None:
            made.buffer = len(self._buffers)
            buffer = self.schema.BufferT()
            buffer.data = np.frombuffer(tensor.value.tobytes(), np.uint8)
            self._buffers.append(buffer)
        given = tensor.quantisation
        if given is not None:
            zeros = [*given.zero] * (len(given.scale) // len(given.zero))
            made.quantization = parameters = self.schema.QuantizationParametersT()
            parameters.scale, parameters.zeroPoint = list(given.scale), zeros
            parameters.quantizedDimension = given.axis or 0
        self._tensors.append(made)
        return len(self._tensors) - 1

    def operator(
        self,
        code: str,
        inputs: Sequence[int],
        output: int,
        options: str = "",
        **fields: object,
    ) -> None:
        """Add an operator.

        Args:
            code: its name in ``BuiltinOperator``; options: that of its table of options, filled with ``fields``.
        """
        number = getattr(self.schema.BuiltinOperator, code)
        if number not in self._codes:
            self._codes.append(number)
        operator = self.schema.OperatorT()
        operator.opcodeIndex = self._codes.index(number)
        operator.inputs, operator.outputs = list(inputs), [output]
        if options:
            operator.builtinOptionsType = getattr(self.schema.BuiltinOptions, options)
            operator.builtinOptions = getattr(self.schema, f"{options}T")()
            for name, value in fields.items():
                setattr(operator.builtinOptions, name, value)
        self._operators.append(operator)

    def serialised(self, inputs: Sequence[int], outputs: Sequence[int]) -> bytes:
        subgraph = self.schema.SubGraphT()
        subgraph.tensors, subgraph.operators = self._tensors, self._operators
        subgraph.inputs, subgraph.outputs = list(inputs), list(outputs)
        subgraph.name = b"main"
        model = self.schema.ModelT()
        model.version, model.description = _SCHEMA_VERSION, b"converted from ONNX"
        model.subgraphs, model.buffers = [subgraph], self._buffers
        model.operatorCodes = [self._code(code) for code in self._codes]
        builder = importlib.import_module("flatbuffers").Builder(1 << 24)
        builder.Finish(model.Pack(builder), file_identifier=_IDENTIFIER)
        return bytes(builder.Output())

    def _code(self, number: int) -> Any:
        code = self.schema.OperatorCodeT()
        code.builtinCode, code.version = number, 1
        code.deprecatedBuiltinCode = min(number, 127)
        return code
