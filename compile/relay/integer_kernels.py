"""Integer operators in Relay for x86 and 32-bit ARM: no float operator between quantising and dequantising.

Activations are uint8: what ReLU6 leaves then has the zero point 0, and a convolution's padding costs nothing.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from netship.compile import passes
from netship.compile.ir.graph import Operator
from netship.compile.ir.operators import (
    Addition,
    Convolution,
    FirstChannels,
    GlobalAverage,
    Quantise,
)
from netship.compile.passes.channels import fill_blocks
from netship.compile.passes.storage import store_as_uint8
from netship.compile.relay import generic
from netship.compile.relay.ops import depthwise, dot_product, registration, requantise
from netship.targets import engine
from netship.targets.presets import Target

tvm = engine.compiler()
from tvm import relay

# An image's channels, fewer than these, are interleaved by a kernel of their own: LLVM would not vectorise one that quantises too.
_FEW = 4


class IntegerKernels:
    """TOPI's schedules and two operators of ours that requantise.

    Attributes:
        passes: what brings the graph into the form that the kernels take.
        instruction: what they multiply by, for a person.
        source: the C that the operators lowered so far call.
    """

    source = None

    def __init__(self, target: Target) -> None:
        dot_product.patch_topi()
        self._target = tvm.target.Target(target.tvm)
        self.instruction = dot_product.instruction(target)
        self.passes: tuple[passes.Pass, ...] = (store_as_uint8,)
        if dot_product.serves(self._target):
            self.passes += (fill_blocks,)

    def lower(self, operator: Operator, inputs: list[Any]) -> Any | None:
        """uint8 NCHW of uint8 NCHW; None where there is no kernel for the operator."""
        if isinstance(operator, Quantise):
            return generic.lower(operator, inputs, 0)[0]
        if operator.output.quantisation is None:
            return None
        if isinstance(operator, Convolution):
            return self._convolution(operator, inputs[0])
        if isinstance(operator, Addition) and operator.elementwise:
            a, b, fixed, offset = operator.requantisation
            first, second = inputs
            low, high = operator.stored_limits
            return requantise.add(first, second, (a, b), fixed, -offset, low, high)
        if isinstance(operator, GlobalAverage):
            return _average(operator, inputs[0])
        if isinstance(operator, FirstChannels):
            channels = operator.output.shape[1]
            return relay.strided_slice(inputs[0], [0], [channels], axes=[1])
        return None

    def _convolution(self, operator: Convolution, source: Any) -> Any:
        channels = operator.output.shape[1]
        if (
            operator.depthwise
            and operator.dilations == (1, 1)
            and depthwise.serves(self._target, operator.kernel, channels)
        ):
            sums = depthwise.depthwise(source, operator)
        else:
            sums = _plain_convolution(source, operator)
        sums = registration.named(sums, operator.label)
        return _requantised(sums, operator, operator.stored_limits)


def _plain_convolution(source: Any, operator: Convolution) -> Any:
    channels, zero = operator.output.shape[1], operator.input.zero
    top, left, bottom, right = operator.pads
    padding = operator.pads
    if any(padding) and zero:
        widths = ((0, 0), (0, 0), (top, bottom), (left, right))
        source = relay.nn.pad(source, widths, relay.const(np.uint8(zero)))
        padding = (0, 0, 0, 0)
    if operator.input.shape[1] < _FEW:
        source = relay.annotation.stop_fusion(source)
    weights = operator.constant(1)
    assert weights is not None
    # TOPI's schedules want channels in groups of four, and fill up only fewer than these where nothing is dilated; zeros
    # change no sum.
    own = operator.input.shape[1]
    missing = -own % _FEW if own > _FEW or operator.dilations != (1, 1) else 0
    if missing and operator.group == 1:
        source = relay.nn.pad(source, ((0, 0), (0, missing), (0, 0), (0, 0)))
        weights = np.pad(weights, ((0, 0), (0, missing), (0, 0), (0, 0)))
    return relay.nn.conv2d(
        source,
        relay.const(np.ascontiguousarray(weights)),
        strides=operator.strides,
        padding=padding,
        dilation=operator.dilations,
        groups=operator.group,
        channels=channels,
        kernel_size=operator.kernel,
        out_dtype="int32",
    )


def _average(operator: GlobalAverage, source: Any) -> Any:
    sums = relay.sum(relay.cast(source, "int32"), axis=[2, 3], keepdims=True)
    return _requantised(sums, operator, operator.output.limits)


def _requantised(
    sums: Any, operator: Convolution | GlobalAverage, limits: tuple[int, int]
) -> Any:
    scales, channels = operator.requantisation, operator.output.shape[1]
    return requantise.requantise(
        sums,
        np.broadcast_to(scales.bias, (channels,)).astype(np.int32),
        np.broadcast_to(scales.ratio, (channels,)),
        operator.output.zero,
        *limits,
    )
