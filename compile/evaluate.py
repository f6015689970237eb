"""Integer operators (compile.c.graph) in numpy: what every device must answer, bit by bit.

A sum × ratio is a 64-bit product with a multiplier of up to 31 bits, shifted right, halves upwards. ONNX Runtime
multiplies in float32 and rounds halves to even: where float32's 24 bits end on a half, about one value in
a hundred thousand, the two differ by 1.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from compile.c.graph import Add, AveragePool, Convolution, Network, Operator

Integers = NDArray[np.int64]


def run(network: Network, image: NDArray[np.float32]) -> NDArray[np.float32]:
    """One inference: float32 [1, C, H, W] → float32 [H, W, C] of the output."""
    values = evaluate(network, quantise(network, image))
    output = network.output
    steps = values[output.name] - output.quantisation.zero
    return steps.astype(np.float32) * np.float32(output.quantisation.scale)


def quantise(network: Network, image: NDArray[np.float32]) -> Integers:
    """float32 [1, C, H, W] → the network's input, [H, W, C]."""
    to = network.input.quantisation
    steps = np.rint(image[0].transpose(1, 2, 0) / np.float32(to.scale))
    clipped: Integers = np.clip(steps, -128 - to.zero, 127 - to.zero).astype(np.int64)
    return clipped + to.zero


def evaluate(network: Network, image: Integers) -> dict[str, Integers]:
    """Every tensor of the network, [H, W, C]."""
    values = {network.input.name: image}
    for operator in network.operators:
        values[operator.output.name] = apply(operator, values)
    return values


def apply(operator: Operator, values: dict[str, Integers]) -> Integers:
    """The output of one operator."""
    x = values[operator.input.name]
    if isinstance(operator, Add):
        (a, b), constant, shift = terms(operator)
        total = x * a + values[operator.other.name] * b + constant
        return np.clip(_rounded(total, shift), operator.low, operator.high)
    zero = operator.output.quantisation.zero
    multiplier, shift = fixed_point(ratios(operator))
    if isinstance(operator, AveragePool):
        source = operator.input.quantisation.zero
        sums = (x - source).sum(axis=(0, 1), keepdims=True)
        return np.clip(_rounded(sums * multiplier, shift) + zero, -128, 127)
    sums = _sums(operator, x.reshape(operator.input.shape)) + operator.bias
    steps = _rounded(sums * multiplier, shift) + zero
    return np.clip(steps, operator.low, operator.high)


def ratios(operator: Convolution | AveragePool) -> NDArray[np.float32]:
    """What a sum is multiplied by, for each channel: in float32, as ONNX Runtime computes it."""
    source, output = operator.input.quantisation, operator.output.quantisation
    if isinstance(operator, AveragePool):
        pixels = operator.input.shape[0] * operator.input.shape[1]
        return np.array([np.float32(source.scale) / np.float32(output.scale * pixels)])
    scales = np.float32(source.scale) * operator.scales.astype(np.float32)
    return np.asarray(scales / np.float32(output.scale))


def fixed_point(ratio: NDArray[np.float32]) -> tuple[NDArray[np.int32], int]:
    """ratio = multiplier ÷ 2^shift, with the largest multiplier of 31 bits."""
    shift = min(31 - int(np.frexp(ratio.max())[1]), 61)
    return np.rint(ratio.astype(np.float64) * 2.0**shift).astype(np.int32), shift


def terms(operator: Add) -> tuple[tuple[int, int], int, int]:
    """output = round((input × a + other × b + constant) ÷ 2^shift): → (a, b), constant, shift."""
    first, second, output = (
        tensor.quantisation
        for tensor in (operator.input, operator.other, operator.output)
    )
    ratio = np.array([first.scale, second.scale], np.float32) / np.float32(output.scale)
    multipliers, shift = fixed_point(ratio)
    a, b = (int(each) for each in multipliers)
    return (a, b), (output.zero << shift) - first.zero * a - second.zero * b, shift


def _rounded(product: Integers, shift: int) -> Integers:
    return (product + (1 << (shift - 1))) >> shift


def _sums(operator: Convolution, x: Integers) -> Integers:
    top, left, bottom, right = operator.pads
    # Sums stay below 2³¹: double precision is exact, and BLAS is fast.
    padded = np.pad(
        (x - operator.input.quantisation.zero).astype(np.float64),
        ((top, bottom), (left, right), (0, 0)),
    )
    height, width, _ = operator.output.shape
    sums = np.zeros(operator.output.shape)
    weights = operator.weights.astype(np.float64)
    for ky, kx in np.ndindex(operator.kernel):
        rows = slice(
            ky, ky + (height - 1) * operator.strides[0] + 1, operator.strides[0]
        )
        columns = slice(
            kx, kx + (width - 1) * operator.strides[1] + 1, operator.strides[1]
        )
        seen = padded[rows, columns]
        if operator.depthwise:
            sums += seen * weights[ky, kx]
        else:
            sums += seen @ weights[:, ky, kx].T
    return sums.astype(np.int64)
