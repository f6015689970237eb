"""Any operator as Relay expressions of its stored values, for whatever compiles Relay."""

from __future__ import annotations

from typing import Any

import numpy as np

from compile.ir.graph import Operator
from compile.ir.operators import (
    Addition,
    Dequantise,
    Multiplication,
    Quantise,
    Table,
    View,
)
from compile.ir.pooling import AveragePool
from compile.relay import importer
from targets import engine

tvm = engine.compiler()
from tvm import relay

# x + this − this is x rounded half to even in float32 (|x| < 2²²), as ONNX Runtime rounds.
_ROUNDING = np.float32(1.5 * 2**23)
# LLVM makes one operation of a product and a sum, which then is rounded once: a limit between them keeps it from that.
_MOST = 2.0**100


def lower_generic(operator: Operator, inputs: list[Any], opset: int) -> list[Any]:
    """The outputs of one operator, with the axes in the order of their shapes.

    Args:
        inputs: expressions, one for each of ``operator.activations``, of its dtype and shape.

    Raises:
        UserError: TVM does not know the operator, or cannot import this form of it.
    """
    match operator:
        case Dequantise():
            return [_dequantised(operator, inputs[0])]
        case View():
            return [relay.reshape(inputs[0], operator.output.shape)]
        case Table():
            return [_looked_up(operator, inputs[0])]
        case Quantise():
            return [quantised(operator, inputs[0])]
        case _ if operator.output.quantisation is None:
            pass
        case Addition():
            return [_sum(operator, *_operands(operator, inputs))]
        case Multiplication():
            return [_product(operator, *_operands(operator, inputs))]
        case AveragePool():
            return [_means(operator, inputs[0])]
    return importer.operator(operator, inputs, opset)


def quantised(operator: Quantise, x: Any) -> Any:
    """Stored values of float32."""
    zero = operator.output.zero
    low, high = (float(limit - zero) for limit in operator.output.limits)
    steps = relay.divide(x, _divisor(operator.output.scale, len(operator.output.shape)))
    rounded = _rounded(relay.clip(steps, low, high))
    return relay.cast(rounded + relay.const(zero, "int32"), operator.output.dtype)


def _divisor(scale: float, rank: int) -> Any:
    """Division by a scalar would become multiplication by its inverse, which rounds to other steps."""
    return relay.const(np.full((1,) * rank, scale, np.float32))


def _rounded(x: Any) -> Any:
    # Subtractions: a sum of constants would be simplified away.
    up = relay.subtract(x, relay.const(-_ROUNDING))
    return relay.cast(relay.subtract(up, relay.const(_ROUNDING)), "int32")


def _operands(operator: Addition | Multiplication, inputs: list[Any]) -> list[Any]:
    """int32 of both inputs."""
    given = iter(inputs)
    values = (
        next(given) if each.value is None else relay.const(each.value)
        for each in (operator.input, operator.other)
    )
    return [relay.cast(each, "int32") for each in values]


def _sum(operator: Addition, first: Any, second: Any) -> Any:
    a, b, fixed, offset = operator.requantisation

    def multiply_add(x: Any, factor: np.float32, summand: Any) -> Any:
        # Exact in double precision, so rounded once.
        x = relay.cast(x + relay.const(offset, "int32"), "float64")
        exact = x * relay.const(float(factor), "float64") + summand
        return relay.cast(exact, "float32")

    part = multiply_add(second, b, relay.const(float(fixed), "float64"))
    return _stored(operator, multiply_add(first, a, relay.cast(part, "float64")))


def _product(operator: Multiplication, first: Any, second: Any) -> Any:
    a = first - relay.const(operator.input.zero, "int32")
    b = second - relay.const(operator.other.zero, "int32")
    steps = relay.cast(a * b, "float32") * relay.const(operator.ratio)
    return _stored(operator, _with_zero(operator, relay.clip(steps, -_MOST, _MOST)))


def _means(operator: AveragePool, x: Any) -> Any:
    source, rank = operator.input, len(operator.input.shape)
    steps = relay.cast(x, "int32") - relay.const(source.zero, "int32")
    real = relay.cast(steps, "float32") * relay.const(np.float32(source.scale))
    real = relay.clip(real, -_MOST, _MOST)
    if any(map(any, operator.pads)):
        real = relay.nn.pad(real, ((0, 0), (0, 0), *operator.pads))
    axes = list(range(2, rank))
    # In the order in which ONNX Runtime adds.
    first, *others = (
        relay.strided_slice(
            real,
            [begin for begin, _ in place],
            [last + 1 for _, last in place],
            strides=list(operator.strides),
            axes=axes,
        )
        for place in operator.places
    )
    sums = first
    for each in others:
        sums = relay.add(sums, each)
    means = relay.divide(sums, relay.const(np.ascontiguousarray(operator.counts)))
    ratio = relay.divide(means, _divisor(operator.output.scale, rank))
    return _stored(operator, _with_zero(operator, ratio))


def _with_zero(operator: Multiplication | AveragePool, steps: Any) -> Any:
    zero = operator.output.zero + operator.attributes.get("offset", 0)
    return relay.add(steps, relay.const(np.float32(zero)))


def _stored(operator: Addition | Multiplication | AveragePool, x: Any) -> Any:
    """float32 in steps of the model's own output, its zero point in it, to stored values."""
    offset = int(operator.attributes.get("offset", 0))
    limits = getattr(operator, "stored_limits", operator.output.limits)
    low, high = (float(limit + offset) for limit in limits)
    steps = _rounded(relay.clip(x, low, high)) - relay.const(offset, "int32")
    return relay.cast(steps, operator.output.dtype)


def _looked_up(operator: Table, x: Any) -> Any:
    lowest = relay.const(operator.input.limits[0], "int32")
    index = relay.cast(x, "int32") - lowest
    return relay.take(relay.const(operator.values), index, mode="fast")


def _dequantised(operator: Dequantise, x: Any) -> Any:
    zero = relay.const(operator.input.zero, "int32")
    steps = relay.cast(relay.cast(x, "int32") - zero, "float32")
    return steps * relay.const(np.float32(operator.input.scale))
