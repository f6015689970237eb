"""The operator graph: typed tensors, known by their names, and operators in the order they run.

Plain data. A pass makes a new graph; nothing here is changed in place. Operators hold their tensors, so that a kernel's
packer needs the operator alone; in one graph a name stands for one tensor (`check`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import prod
from types import MappingProxyType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from netship.compile.frontend.names import fresh_names

Array = NDArray[Any]

NHWC = "NHWC"
"""The layout of an image whose channels lie last in memory; the axes of its shape stay [batch, channels, height, width]."""


@dataclass(frozen=True)
class Quantisation:
    """Real value = (stored value − zero) × scale.

    Attributes:
        scale: one number, or one for each index of ``axis``.
        zero: as ``scale``, of the tensor's own type.
        axis: of the tensor's shape; None where one scale serves the whole tensor.
    """

    scale: tuple[float, ...]
    zero: tuple[int, ...] = (0,)
    axis: int | None = None

    @property
    def per_tensor(self) -> bool:
        return len(self.scale) == len(self.zero) == 1


def along_axis(values: Array, axis: int | None, rank: int) -> Array:
    """A number for each index of ``axis``, or one, as an array that broadcasts over ``rank`` axes."""
    shape = [1] * rank
    if values.size > 1:
        shape[axis or 0] = -1
    return values.reshape(shape)


@dataclass(frozen=True)
class Tensor:
    """One value of the network.

    Attributes:
        shape: as ONNX orders the axes.
        dtype: numpy's name of the stored type.
        layout: `NHWC`, or empty where the axes lie in memory as in ``shape``.
        value: of a constant.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str = "float32"
    quantisation: Quantisation | None = None
    layout: str = ""
    value: Array | None = field(default=None, compare=False, repr=False)

    @property
    def size(self) -> int:
        return prod(self.shape)

    @property
    def itemsize(self) -> int:
        return np.dtype(self.dtype).itemsize

    @property
    def nbytes(self) -> int:
        return self.size * self.itemsize

    @property
    def image(self) -> tuple[int, int, int]:
        """[height, width, channels]; a vector is one pixel."""
        if len(self.shape) == 4:
            _, channels, height, width = self.shape
            return height, width, channels
        return 1, 1, self.size

    @property
    def row_bytes(self) -> int:
        """Bytes of one row of pixels."""
        return self.image[1] * self.image[2] * self.itemsize

    @property
    def scale(self) -> float:
        """Of a quantised activation."""
        assert self.quantisation and self.quantisation.per_tensor
        return self.quantisation.scale[0]

    @property
    def zero(self) -> int:
        """The stored value that means 0, of a quantised activation."""
        assert self.quantisation and self.quantisation.per_tensor
        return self.quantisation.zero[0]

    @property
    def real(self) -> NDArray[np.float64]:
        """The real numbers that a constant stands for."""
        assert self.value is not None
        values, facts = self.value.astype(np.float64), self.quantisation
        if facts is None:
            return values
        scale, zero = (
            along_axis(np.array(each), facts.axis, values.ndim)
            for each in (facts.scale, facts.zero)
        )
        return (values - zero) * scale

    @property
    def limits(self) -> tuple[int, int]:
        """The lowest and the highest value that the stored type has."""
        info = np.iinfo(self.dtype)
        return int(info.min), int(info.max)

    @property
    def in_order(self) -> bool:
        """Whether its values lie in memory in the order of the axes."""
        height, width, channels = self.image
        return self.layout != NHWC or channels == 1 or height * width == 1

    def as_float(self) -> Self:
        """The tensor in float32; of a constant the real numbers."""
        value = None if self.value is None else self.real.astype(np.float32)
        return replace(self, dtype="float32", quantisation=None, value=value)


def constant(
    name: str, value: Array, quantisation: Quantisation | None = None
) -> Tensor:
    """A tensor of that value, of its shape and type."""
    return Tensor(name, value.shape, value.dtype.name, quantisation, value=value)


@dataclass(frozen=True)
class Operator:
    """One operator.

    Attributes:
        kind: ONNX's name of it; in lower case, one of ours.
        name: the node's in the ONNX file, which need not be there, nor be the only one.
        inputs: None where an optional one is left out.
    """

    kind: str
    name: str
    inputs: tuple[Tensor | None, ...]
    outputs: tuple[Tensor, ...]
    attributes: Mapping[str, Any] = field(
        default_factory=lambda: MappingProxyType({}), compare=False
    )

    @property
    def label(self) -> str:
        """The operator for a person."""
        return self.name or (self.outputs[0].name if self.outputs else "")

    @property
    def activations(self) -> tuple[Tensor, ...]:
        """The inputs that are no constants."""
        return tuple(each for each in self.inputs if each and each.value is None)

    @property
    def input(self) -> Tensor:
        assert self.inputs[0] is not None
        return self.inputs[0]

    @property
    def output(self) -> Tensor:
        return self.outputs[0]

    @property
    def macs(self) -> int:
        """Multiply-adds."""
        return 0

    def constant(self, index: int) -> Array | None:
        """The value of input ``index``: as stored for an operator on integers, else the real numbers that it stands for.

        None where there is no such input, or it is computed.
        """
        tensor = self.inputs[index] if index < len(self.inputs) else None
        if tensor is None or tensor.value is None:
            return None
        if tensor.quantisation is None or self.output.quantisation is not None:
            return tensor.value
        return tensor.real.astype(np.float32)

    def with_tensors(self, changed: Mapping[str, Tensor]) -> Self:
        """The operator on the tensors that ``changed`` has for the names of its own."""
        return replace(
            self,
            inputs=tuple(each and changed.get(each.name, each) for each in self.inputs),
            outputs=tuple(changed.get(each.name, each) for each in self.outputs),
        )

    def with_attributes(self, **attributes: Any) -> Self:
        return replace(self, attributes={**self.attributes, **attributes})


@dataclass(frozen=True)
class Graph:
    """A network.

    Attributes:
        opset: of ai.onnx, which says what an operator's attributes mean.
    """

    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    operators: tuple[Operator, ...]
    opset: int = 22

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        """Every tensor by its name."""
        of_operators = (
            tensor
            for operator in self.operators
            for tensor in (*operator.inputs, *operator.outputs)
        )
        every = (*self.inputs, *of_operators, *self.outputs)
        return {tensor.name: tensor for tensor in every if tensor is not None}

    @cached_property
    def makers(self) -> dict[str, Operator]:
        """By a tensor's name: the operator that makes it."""
        return {
            tensor.name: operator
            for operator in self.operators
            for tensor in operator.outputs
        }

    @cached_property
    def readers(self) -> dict[str, tuple[Operator, ...]]:
        """By a tensor's name: the operators that read it, each once."""
        found: dict[str, dict[int, Operator]] = {}
        for operator in self.operators:
            for tensor in operator.inputs:
                if tensor is not None:
                    found.setdefault(tensor.name, {})[id(operator)] = operator
        return {name: tuple(each.values()) for name, each in found.items()}

    def only_reader(self, tensor: Tensor) -> Operator | None:
        """The operator that alone reads a tensor which is no output of the network."""
        readers = self.readers.get(tensor.name, ())
        is_output = any(tensor.name == output.name for output in self.outputs)
        return readers[0] if len(readers) == 1 and not is_output else None

    @cached_property
    def quantised(self) -> bool:
        """Whether it has integers that stand for real numbers."""
        return any(tensor.quantisation for tensor in self.tensors.values())

    @property
    def macs(self) -> int:
        return sum(operator.macs for operator in self.operators)

    def with_tensors(self, changed: Mapping[str, Tensor]) -> Graph:
        """The graph with other tensors in the place of those of the names in ``changed``."""
        return replace(
            self,
            inputs=tuple(changed.get(each.name, each) for each in self.inputs),
            outputs=tuple(changed.get(each.name, each) for each in self.outputs),
            operators=tuple(each.with_tensors(changed) for each in self.operators),
        )

    def with_operators(self, operators: Iterable[Operator]) -> Graph:
        """The graph of these operators, less those that no output needs."""
        needed = {tensor.name for tensor in self.outputs}
        live: list[Operator] = []
        for operator in reversed(list(operators)):
            if any(tensor.name in needed for tensor in operator.outputs):
                live.append(operator)
                needed.update(each.name for each in operator.inputs if each)
        return replace(self, operators=tuple(reversed(live)))

    def rewritten(self, rule: Callable[[Operator], Sequence[Operator] | None]) -> Graph:
        """The graph with what ``rule`` makes of each operator in its place; None keeps the operator."""
        made: list[Operator] = []
        for operator in self.operators:
            new = rule(operator)
            made += [operator] if new is None else new
        return self.with_operators(made)

    def fresh_names(self) -> Callable[[str], str]:
        """As `names.fresh_names`, of names that no tensor of the network has."""
        return fresh_names(self.tensors)


def check(graph: Graph) -> None:
    """A fault of a pass ends here, not in wrong numbers.

    Raises:
        ValueError: a name stands for two tensors, a tensor is read before it is made, or made twice.
    """
    made = {tensor.name: tensor for tensor in graph.inputs}
    for operator in graph.operators:
        for tensor in operator.inputs:
            if tensor is None or tensor.value is not None:
                continue
            if made.get(tensor.name) != tensor:
                raise ValueError(
                    f"{operator.label}: reads {tensor}, made is {made.get(tensor.name)}"
                )
        for tensor in operator.outputs:
            if tensor.name in made:
                raise ValueError(f"{operator.label}: makes {tensor.name!r} again")
            made[tensor.name] = tensor
    for tensor in graph.outputs:
        if tensor.value is None and made.get(tensor.name) != tensor:
            raise ValueError(f"output {tensor}: made is {made.get(tensor.name)}")
