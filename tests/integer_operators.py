"""Single integer operators for tests: quantised tensors, constant weights, clamps in stored values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from netship.compile.ir.graph import Array, Graph, Operator, Quantisation, Tensor
from netship.compile.ir.kinds import make
from netship.compile.ir.operators import Addition, Convolution, Limited

_Limited = TypeVar("_Limited", bound=Limited)


def per_tensor(scale: float = 1.0, zero: int = 0) -> Quantisation:
    return Quantisation((scale,), (zero,))


def quantised_tensor(
    name: str,
    shape: tuple[int, ...],
    quantisation: Quantisation | None = None,
    dtype: str = "int8",
) -> Tensor:
    """An activation; without a quantisation its scale is 1 and its zero point 0."""
    return Tensor(name, shape, dtype, quantisation or per_tensor())


def constant(
    name: str, value: Array, quantisation: Quantisation | None = None
) -> Tensor:
    return Tensor(name, value.shape, str(value.dtype), quantisation, value=value)


def convolution(
    name: str,
    source: Tensor,
    weights: NDArray[np.int8],
    bias: Sequence[int] | NDArray[np.int64],
    scales: NDArray[np.float64] | None = None,
    output: Quantisation | None = None,
    **attributes: Any,
) -> Convolution:
    """An integer convolution whose output has its name, and its input's type.

    Args:
        weights: [out, in / group, kernel height, kernel width].
        bias: [out], in units of input scale × weight scale.
        scales: [out], of the weights; 1 by default.
        output: the output's quantisation; by default its scale is 1 and its zero point 0.
        attributes: ONNX's of Conv.
    """
    if scales is None:
        scales = np.ones(len(weights))
    per_channel = Quantisation(tuple(scales.tolist()), axis=0)
    inputs = (
        source,
        constant(f"{name}.weight", weights, per_channel),
        constant(f"{name}.bias", np.asarray(bias, np.int64)),
    )
    shapeless = quantised_tensor(name, (), output, source.dtype)
    made = make("Conv", name, inputs, (shapeless,), attributes)
    assert isinstance(made, Convolution)
    return replace(made, outputs=(replace(shapeless, shape=made.shape()),))


def addition(first: Tensor, second: Tensor, output: Tensor) -> Addition:
    made = make("Add", "sum", (first, second), (output,))
    assert isinstance(made, Addition)
    return made


def clamped(operator: _Limited, low: int, high: int) -> _Limited:
    """The operator with an output of the stored values from ``low`` to ``high``."""
    output = operator.output
    limits = tuple((end - output.zero) * output.scale for end in (low, high))
    limited = operator.with_attributes(limits=limits)
    assert limited.stored_limits == (low, high)
    return limited


def only(operator: Operator) -> Graph:
    """The network of one operator."""
    return Graph(operator.activations, operator.outputs, (operator,))
