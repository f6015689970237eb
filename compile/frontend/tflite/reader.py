"""The flatbuffer of an untrusted .tflite file as plain data, within limits."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from netship.compile.frontend.limits import (
    MAX_ARGUMENTS,
    MAX_NODES,
    MAX_RANK,
    MAX_WEIGHTS,
)
from netship.compile.frontend.names import Unfit
from netship.targets.escapes import shown

_IDENTIFIER = b"TFL3"
_VERSION = 3
_MAX_NAME = 1000
_DTYPES = {
    "FLOAT32": np.float32,
    "FLOAT16": np.float16,
    "BOOL": np.bool_,
    "INT8": np.int8,
    "UINT8": np.uint8,
    "INT32": np.int32,
    "INT64": np.int64,
}
# One byte each, as stored by a quantised network.
_STORED = (np.dtype(np.int8), np.dtype(np.uint8))

Array = NDArray[Any]


@dataclass(frozen=True)
class Quantisation:
    """real = (stored − zero) × scale; one number of each, or one for each element of ``axis``."""

    scale: NDArray[np.float32]
    zero: NDArray[np.int64]
    axis: int = 0


@dataclass(frozen=True)
class Tensor:
    """A tensor of the file, its axes in the file's order.

    Attributes:
        value: of a constant.
        quantisation: of int8, uint8 and int32 values that stand for real ones.
    """

    index: int
    name: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    value: Array | None
    quantisation: Quantisation | None

    @property
    def label(self) -> str:
        return f"tensor {self.index} {shown(self.name, 100)!r}"

    @property
    def quantised(self) -> bool:
        """Whether its values are bytes that stand for real ones."""
        return self.quantisation is not None and self.dtype in _STORED

    @property
    def real(self) -> Array:
        """A constant's values: float32 where they stand for real ones."""
        assert self.value is not None
        if self.quantisation is None:
            floats = self.dtype.kind == "f"
            return self.value.astype(np.float32) if floats else self.value
        facts = self.quantisation
        sizes = [1] * len(self.shape)
        if facts.scale.size > 1:
            sizes[facts.axis] = -1
        # Of bytes float32 has the steps exactly.
        wide = np.float32 if self.dtype in _STORED else np.float64
        steps: Array = self.value - facts.zero.astype(wide).reshape(sizes)
        real: Array = steps * facts.scale.reshape(sizes)
        return real.astype(np.float32, copy=False)


@dataclass(frozen=True)
class Operator:
    """An operator of the file.

    Attributes:
        inputs: indices of tensors; −1 for one that is left out.
        options: the fields of its table by their names in the schema, where it has one.
    """

    index: int
    kind: str
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    table: Any

    @property
    def label(self) -> str:
        return f"operator {self.index} ({self.kind})"

    def option(self, name: str, default: Any = 0) -> Any:
        """A field of the operator's table; ``default`` where it has no table."""
        return default if self.table is None else getattr(self.table, name)()


@dataclass(frozen=True)
class File:
    """What a .tflite file says."""

    tensors: tuple[Tensor, ...]
    operators: tuple[Operator, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]


def is_tflite(data: bytes) -> bool:
    return data[4:8] == _IDENTIFIER


def read(data: bytes) -> File:
    """Read a file with one subgraph.

    Raises:
        Unfit: what is wrong with it. A broken flatbuffer raises exceptions of other classes too.
    """
    import tflite as schema

    model = schema.Model.GetRootAs(data)
    if model.Version() != _VERSION:
        raise Unfit(
            f"is a TFLite model of version {model.Version()}, need {_VERSION}; convert it again"
        )
    if model.SubgraphsLength() != 1:
        raise Unfit(
            f"{model.SubgraphsLength()} subgraphs, need 1; convert it with one signature and without control flow"
        )
    graph = model.Subgraphs(0)
    counts = (
        ("tensors", graph.TensorsLength(), MAX_WEIGHTS),
        ("operators", graph.OperatorsLength(), MAX_NODES),
        ("kinds of operators", model.OperatorCodesLength(), MAX_NODES),
        ("buffers", model.BuffersLength(), 4 * MAX_WEIGHTS),
    )
    for what, count, most in counts:
        if count > most:
            raise Unfit(f"{count} {what}, more than the {most} allowed")
    if not graph.OperatorsLength():
        raise Unfit("the graph has no operators; convert a network")
    inputs, outputs = _numbers(graph, "Inputs"), _numbers(graph, "Outputs")
    tensors = tuple(_tensors(model, graph, inputs))
    operators = tuple(_operators(model, graph))
    used = [*inputs, *outputs]
    used += [each for operator in operators for each in operator.outputs]
    given = [each for operator in operators for each in operator.inputs if each != -1]
    for index in (*used, *given):
        if not 0 <= index < len(tensors):
            raise Unfit(f"there is no tensor {index}; convert it again")
    return File(tensors, operators, inputs, outputs)


def _numbers(table: Any, field: str, most: int = MAX_ARGUMENTS) -> tuple[int, ...]:
    """A vector of integers of a table; none where the field is left out."""
    count = getattr(table, f"{field}Length")()
    if count > most:
        raise Unfit(f"{count} elements of {field}, more than the {most} allowed")
    return tuple(
        map(int, getattr(table, f"{field}AsNumpy")().tolist()) if count else ()
    )


def _tensors(model: Any, graph: Any, inputs: tuple[int, ...]) -> Iterator[Tensor]:
    types = {number: name for name, number in _constants("TensorType").items()}
    for index in range(graph.TensorsLength()):
        table = graph.Tensors(index)
        raw = table.Name() or b""
        if len(raw) > _MAX_NAME:
            raise Unfit(
                f"tensor {index}: a name of {len(raw)} bytes, more than the {_MAX_NAME} allowed"
            )
        name = raw.decode(errors="replace")
        label = f"tensor {index} {shown(name, 100)!r}"
        kind = types.get(table.Type(), str(table.Type()))
        if kind not in _DTYPES:
            raise Unfit(
                f"{label}: is {shown(kind)}; float32, int8 and uint8 networks are read: convert to one of these"
            )
        if table.IsVariable():
            raise Unfit(
                f"{label}: is a variable; convert a network without state between inferences"
            )
        if table.Sparsity() is not None:
            raise Unfit(f"{label}: is sparse; convert without sparsity")
        shape = _numbers(table, "Shape", MAX_RANK)
        signature = _numbers(table, "ShapeSignature", MAX_RANK)
        if any(size < 1 for size in shape) or -1 in signature[1:]:
            sizes = list(signature or shape)
            raise Unfit(
                f"{label}: has the sizes {sizes}; convert with fixed sizes, only the batch may be open"
            )
        dtype = np.dtype(_DTYPES[kind])
        facts = _quantisation(table.Quantization(), shape, dtype, label)
        if facts is None and index in inputs and dtype in _STORED:
            # Of an image as it is: stored values are the real ones.
            facts = Quantisation(np.ones(1, np.float32), np.zeros(1, np.int64))
        value = _value(model, table.Buffer(), shape, dtype, label)
        yield Tensor(index, name, shape, dtype, value, facts)


def _quantisation(
    table: Any, shape: tuple[int, ...], dtype: np.dtype[Any], label: str
) -> Quantisation | None:
    if table is None or not table.ScaleLength() or dtype.kind not in "iu":
        return None
    scale = table.ScaleAsNumpy().astype(np.float32)
    count = table.ZeroPointLength()
    zero = table.ZeroPointAsNumpy().astype(np.int64) if count else np.zeros(1, np.int64)
    axis = table.QuantizedDimension() if scale.size > 1 else 0
    fits = scale.size == 1 or 0 <= axis < len(shape) and shape[axis] == scale.size
    limits = np.iinfo(dtype)
    if (
        not fits
        or zero.size not in (1, scale.size)
        or not np.all(np.isfinite(scale) & (scale > 0))
        or zero.min() < limits.min
        or zero.max() > limits.max
    ):
        raise Unfit(
            f"{label}: its scales and zero points contradict its shape or type; convert it again"
        )
    return Quantisation(scale, zero, axis)


def _value(
    model: Any, buffer: int, shape: tuple[int, ...], dtype: np.dtype[Any], label: str
) -> Array | None:
    """The values of a constant; None where the buffer is empty."""
    if buffer >= model.BuffersLength():
        raise Unfit(f"{label}: there is no buffer {buffer}; convert it again")
    table = model.Buffers(buffer)
    if table.Offset() > 1 or table.Size() > 1:
        raise Unfit(f"{label}: lies outside the flatbuffer; convert without that")
    if not table.DataLength():
        return None
    data = table.DataAsNumpy()
    size = math.prod(shape) * dtype.itemsize
    if data.size != size:
        raise Unfit(
            f"{label}: {data.size} bytes for a tensor of {size}; convert it again"
        )
    value: Array = np.frombuffer(data, dtype).reshape(shape)
    return value


def _operators(model: Any, graph: Any) -> Iterator[Operator]:
    kinds = {number: name for name, number in _constants("BuiltinOperator").items()}
    codes = [model.OperatorCodes(index) for index in range(model.OperatorCodesLength())]
    for index in range(graph.OperatorsLength()):
        table = graph.Operators(index)
        if table.OpcodeIndex() >= len(codes):
            raise Unfit(f"operator {index}: has no code; convert it again")
        code = codes[table.OpcodeIndex()]
        number = max(code.BuiltinCode(), code.DeprecatedBuiltinCode())
        kind = kinds.get(number, str(number))
        if kind == "CUSTOM":
            custom = (code.CustomCode() or b"").decode(errors="replace")
            kind = f"CUSTOM {shown(custom, 60)}"
        yield Operator(
            index,
            kind,
            _numbers(table, "Inputs"),
            _numbers(table, "Outputs"),
            _options(table),
        )


def _options(table: Any) -> Any:
    """The operator's own table, of the class that it says."""
    import tflite as schema

    names = {number: name for name, number in _constants("BuiltinOptions").items()}
    found = names.get(table.BuiltinOptionsType(), "NONE")
    raw = table.BuiltinOptions()
    if raw is None or found == "NONE":
        return None
    options = getattr(schema, found)()
    options.Init(raw.Bytes, raw.Pos)
    return options


@cache
def _constants(enumeration: str) -> Mapping[str, int]:
    """The names of an enumeration of the schema and their numbers."""
    import tflite as schema

    found = vars(getattr(schema, enumeration))
    return {name: n for name, n in found.items() if not name.startswith("_")}
