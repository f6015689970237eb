"""Scales folded into integers: what the kernels multiply, add and shift by."""

from __future__ import annotations

from dataclasses import dataclass
from math import frexp

import numpy as np
from numpy.typing import NDArray

from compile.c.graph import Add, AveragePool, Convolution
from targets.errors import UserError

_INT32 = 2**31


@dataclass(frozen=True)
class Requantisation:
    """output = saturate(zero + round((sum << shift) × multiplier / 2³²)), for each channel.

    Attributes:
        bias: int32, what a sum begins with: the bias, less what the input's zero point adds.
        multiplier: int32, below 2³¹.
    """

    bias: NDArray[np.int32]
    multiplier: NDArray[np.int32]
    shift: int

    @property
    def interleaved(self) -> NDArray[np.int32]:
        return np.stack([self.bias, self.multiplier], axis=1).ravel()


def of_convolution(convolution: Convolution) -> Requantisation:
    """Raises: UserError when a sum does not fit 32 bits."""
    axes = (0, 1) if convolution.depthwise else (1, 2, 3)
    weights = convolution.weights.astype(np.int64)
    source, output = convolution.input.quantisation, convolution.output.quantisation
    bias = convolution.bias - source.zero * weights.sum(axis=axes)
    largest = np.abs(bias) + 128 * np.abs(weights).sum(axis=axes)
    # In float32, as ONNX Runtime computes it: both then round near a half to the same side.
    scales = np.float32(source.scale) * convolution.scales.astype(np.float32)
    ratio = (scales / np.float32(output.scale)).astype(np.float64)
    return _fold(convolution.name, bias, ratio, largest)


def of_average(pool: AveragePool) -> Requantisation:
    """The division by the number of pixels is part of the multiplier."""
    pixels = pool.input.shape[0] * pool.input.shape[1]
    source, output = pool.input.quantisation, pool.output.quantisation
    ratio = np.array([source.scale / (output.scale * pixels)])
    bias = np.array([-source.zero * pixels])
    return _fold(pool.name, bias, ratio, np.abs(bias) + 128 * pixels)


def _fold(
    name: str,
    bias: NDArray[np.int64],
    ratio: NDArray[np.float64],
    largest: NDArray[np.int64],
) -> Requantisation:
    # A multiplier is below 2³¹ of 2³²: the ratio below a half.
    shift = max(0, frexp(float(ratio.max()) * (1 + 2**-30))[1] + 1)
    if shift > 30 or int(largest.max()) << shift >= _INT32:
        raise UserError(
            f"node {name!r}: its sums reach {int(largest.max()):,} and its output's scale is "
            f"{float(ratio.max()):.3g} × finer; 32 bits do not hold that: calibrate again"
        )
    multiplier = np.rint(ratio * 2.0 ** (32 - shift))
    return Requantisation(
        bias.astype(np.int32), multiplier.astype(np.int64).astype(np.int32), shift
    )


@dataclass(frozen=True)
class Addition:
    """output = saturate((a × multiplier_a + b × multiplier_b + offset) >> shift)."""

    multiplier_a: int
    multiplier_b: int
    offset: int
    shift: int


def of_addition(add: Add, first: str) -> Addition:
    """Args: first: which of the two inputs, by name, is ``a``."""
    a, b = add.input.quantisation, add.other.quantisation
    if add.input.name != first:
        a, b = b, a
    output = add.output.quantisation
    ratios = a.scale / output.scale, b.scale / output.scale
    shift = 24
    while True:
        ma, mb = (round(ratio * 2**shift) for ratio in ratios)
        real = output.zero - a.zero * ratios[0] - b.zero * ratios[1]
        offset = round(real * 2**shift) + (1 << shift >> 1)
        if 128 * (ma + mb) + abs(offset) < _INT32:
            return Addition(ma, mb, offset, shift)
        shift -= 1
        if shift < 8:
            raise UserError(
                f"node {add.name!r}: its inputs' scales are {ratios[0]:.3g} and {ratios[1]:.3g} × its "
                "output's; 32 bits do not hold that: calibrate again"
            )
