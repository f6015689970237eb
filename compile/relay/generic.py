"""Any operator as plain Relay, its axes in ONNX's order: for targets whose kernels do not take it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from compile.ir.graph import NHWC, Operator, Tensor
from compile.ir.operators import (
    Convolution,
    Dequantise,
    Limited,
    Quantise,
    Table,
    View,
)
from compile.relay import importer
from targets import engine

tvm = engine.compiler()
from tvm import relay

# x + this − this is x rounded half to even in float32 (|x| < 2²²), as ONNX Runtime rounds.
_ROUNDING = np.float32(1.5 * 2**23)
_FLOAT32 = np.finfo(np.float32).min, np.finfo(np.float32).max


def lower(operator: Operator, inputs: list[Any], opset: int) -> list[Any]:
    """The outputs of one operator as Relay expressions.

    Args:
        inputs: expressions, one for each of ``operator.activations``.

    Raises:
        UserError: an operator that TVM does not know.
    """
    match operator:
        case View():
            (x,) = inputs
            if operator.attributes.get("order") == NHWC:
                x = relay.transpose(x, (0, 2, 3, 1))
            return [relay.reshape(x, operator.output.shape)]
        case Quantise():
            # Division by a scalar would become multiplication by its inverse, which rounds to other steps.
            ones = (1,) * len(operator.output.shape)
            scale = relay.const(np.full(ones, operator.output.scale, np.float32))
            return [_steps(relay.divide(inputs[0], scale), operator.output)]
        case Dequantise():
            zero = relay.const(operator.input.zero, "int32")
            steps = relay.cast(relay.cast(inputs[0], "int32") - zero, "float32")
            return [steps * relay.const(np.float32(operator.input.scale))]
        case Table():
            lowest = relay.const(operator.input.limits[0], "int32")
            index = relay.cast(inputs[0], "int32") - lowest
            return [relay.take(relay.const(operator.values), index, mode="fast")]
        case Convolution() if operator.output.quantisation:
            return [_convolution(operator, inputs[0])]
    if not isinstance(operator, Limited) or not operator.limited:
        return importer.operator(operator, inputs, opset)
    free = {k: v for k, v in operator.attributes.items() if k != "limits"}
    (made,) = importer.operator(replace(operator, attributes=free), inputs, opset)
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


def _steps(x: Any, output: Tensor, limits: tuple[int, int] | None = None) -> Any:
    """Real numbers in steps of ``output``, rounded half to even, as its stored values."""
    low, high = (float(limit - output.zero) for limit in limits or output.limits)
    # Subtractions: a sum of constants would be simplified away.
    rounded = relay.subtract(
        relay.subtract(relay.clip(x, low, high), relay.const(-_ROUNDING)),
        relay.const(_ROUNDING),
    )
    steps = relay.cast(rounded, "int32") + relay.const(output.zero, "int32")
    return relay.cast(steps, output.dtype)
