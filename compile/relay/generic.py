"""Any operator as plain Relay, its axes in ONNX's order: for targets whose kernels do not take it."""

from __future__ import annotations

from typing import Any

import numpy as np

from netship.compile.ir.graph import NHWC, Operator, Tensor
from netship.compile.ir.operators import (
    Addition,
    Convolution,
    Dequantise,
    GlobalAverage,
    Limited,
    Multiplication,
    Quantise,
    Table,
    View,
)
from netship.compile.ir.pooling import AveragePool
from netship.compile.relay import importer
from netship.targets import engine

tvm = engine.compiler()
from tvm import relay

# x + this − this is x rounded half to even in float32 (|x| < 2²²), as ONNX Runtime rounds.
_ROUNDING = np.float32(1.5 * 2**23)
# LLVM makes one operation of a product and a sum, which then is rounded once: a limit between them keeps it from that.
_MOST = 2.0**100
_FLOAT32 = np.finfo(np.float32).min, np.finfo(np.float32).max


def lower(operator: Operator, inputs: list[Any], opset: int) -> list[Any]:
    """The outputs of one operator as Relay expressions.

    Args:
        inputs: expressions, one for each of ``operator.activations``.

    Raises:
        UserError: an operator that TVM does not know.
    """
    x = inputs[0] if inputs else _constant(operator)
    match operator:
        case View():
            if operator.attributes.get("order") == NHWC:
                x = relay.transpose(x, (0, 2, 3, 1))
            return [relay.reshape(x, operator.output.shape)]
        case Quantise():
            scale = _divisor(operator.output.scale, len(operator.output.shape))
            return [_steps(relay.divide(x, scale), operator.output)]
        case Dequantise():
            zero = relay.const(operator.input.zero, "int32")
            steps = relay.cast(relay.cast(x, "int32") - zero, "float32")
            return [steps * relay.const(np.float32(operator.input.scale))]
        case Table():
            lowest = relay.const(operator.input.limits[0], "int32")
            index = relay.cast(x, "int32") - lowest
            return [relay.take(relay.const(operator.values), index, mode="fast")]
        case Convolution() if operator.output.quantisation:
            return [_convolution(operator, x)]
        case Addition() if operator.output.quantisation:
            return [_sum(operator, *_operands(operator, inputs))]
        case Multiplication() if operator.output.quantisation:
            return [_product(operator, *_operands(operator, inputs))]
        case AveragePool() if operator.output.quantisation:
            return [_means(operator, x)]
        case GlobalAverage() if operator.output.quantisation:
            return [_whole_means(operator, x)]
    if not isinstance(operator, Limited) or not operator.limited:
        return importer.operator(operator, inputs, opset)
    (made,) = importer.operator(operator.without_limits(), inputs, opset)
    low, high = np.clip(operator.limits, *_FLOAT32).tolist()
    return [relay.clip(made, low, high)]


def _convolution(operator: Convolution, x: Any) -> Any:
    top, left, bottom, right = operator.pads
    widths = ((0, 0), (0, 0), (top, bottom), (left, right))
    zero = np.array(operator.input.zero, operator.input.dtype)
    padded = relay.nn.pad(x, widths, relay.const(zero)) if any(operator.pads) else x
    weights = operator.constant(1)
    assert weights is not None
    sums = relay.nn.conv2d(
        padded,
        relay.const(np.ascontiguousarray(weights)),
        strides=operator.strides,
        dilation=operator.dilations,
        groups=operator.group,
        channels=operator.output.shape[1],
        kernel_size=operator.kernel,
        out_dtype="int32",
    )
    bias, ratio, _ = operator.requantisation
    channels = (1, operator.output.shape[1], 1, 1)
    sums = sums + relay.const(
        np.broadcast_to(bias.astype(np.int32), channels[1]).reshape(channels)
    )
    ratios = np.broadcast_to(ratio.astype(np.float32), channels[1]).reshape(channels)
    scaled = relay.cast(sums, "float32") * relay.const(ratios)
    return _steps(scaled, operator.output, operator.stored_limits)


def _whole_means(operator: GlobalAverage, x: Any) -> Any:
    begin, ratio, _ = operator.requantisation
    axes = list(range(2, len(operator.input.shape)))
    sums = relay.sum(relay.cast(x, "int32"), axis=axes, keepdims=True)
    sums = sums + relay.const(int(begin.item()), "int32")
    scaled = relay.cast(sums, "float32") * relay.const(np.float32(ratio.item()))
    return _steps(scaled, operator.output)


def _steps(x: Any, output: Tensor, limits: tuple[int, int] | None = None) -> Any:
    """Real numbers in steps of ``output``, rounded half to even, as its stored values."""
    low, high = (float(limit - output.zero) for limit in limits or output.limits)
    steps = _rounded(relay.clip(x, low, high))
    return relay.cast(steps + relay.const(output.zero, "int32"), output.dtype)


def _rounded(x: Any) -> Any:
    # Subtractions: a sum of constants would be simplified away.
    up = relay.subtract(x, relay.const(-_ROUNDING))
    return relay.cast(relay.subtract(up, relay.const(_ROUNDING)), "int32")


def _divisor(scale: float, rank: int) -> Any:
    """Division by a scalar would become multiplication by its inverse, which rounds to other steps."""
    return relay.const(np.full((1,) * rank, scale, np.float32))


def _constant(operator: Operator) -> Any:
    value = operator.constant(0) if operator.inputs else None
    return None if value is None else relay.const(value)


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
