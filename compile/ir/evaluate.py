"""Integer operators (compile.ir.graph) in numpy: what every device must answer, bit by bit.

They round as ONNX Runtime does on x86 (onnxruntime/core/mlas/lib: quantize.cpp, qlgavgpool.cpp, qladd_avx2.cpp), in float32 and
halves to even. A sum is turned into float32, multiplied by the ratio of scales and rounded. An addition is two fused
multiply-adds, the second input's first, on a constant that holds the zero points. The reference is ONNX Runtime as it runs by default:
without its graph optimisations it adds and pools in float32, and differs from itself.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from compile.ir.graph import Add, AveragePool, Convolution, Network, Operator
from targets.errors import UserError

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
        return _add(operator, x, values[operator.other.name])
    if isinstance(operator, AveragePool):
        zero = operator.input.quantisation.zero
        sums = (x - zero).sum(axis=(0, 1), keepdims=True)
        return _requantised(sums, operator, -128, 127)
    sums = _sums(operator, x.reshape(operator.input.shape)) + operator.bias
    return _requantised(sums, operator, operator.low, operator.high)


def _requantised(
    sums: Integers, operator: Convolution | AveragePool, low: int, high: int
) -> Integers:
    zero = operator.output.quantisation.zero
    steps = np.rint(sums.astype(np.float32) * ratios(operator)).astype(np.int64)
    clipped: Integers = np.clip(steps + zero, low, high)
    return clipped


def _add(operator: Add, first: Integers, second: Integers) -> Integers:
    a, b, fixed = addition(operator)
    sums = multiply_add(second + operator.other.quantisation.offset, b, fixed)
    sums = multiply_add(first + operator.input.quantisation.offset, a, sums)
    steps = np.rint(sums).astype(np.int64) - operator.output.quantisation.offset
    return np.clip(steps, operator.low, operator.high)


def addition(operator: Add) -> tuple[np.float32, np.float32, np.float32]:
    """a, b and c of output = rint(input × a + (other × b + c)), for the values as they are stored."""
    first, second, output = (
        tensor.quantisation
        for tensor in (operator.input, operator.other, operator.output)
    )
    a = np.float32(first.scale) / np.float32(output.scale)
    b = np.float32(second.scale) / np.float32(output.scale)
    zeros = multiply_add(
        first.zero + first.offset, a, b * np.float32(second.zero + second.offset)
    )
    return a, b, np.float32(output.zero + output.offset) - np.float32(zeros)


def multiply_add(x: Any, factor: np.float32, summand: Any) -> NDArray[np.float32]:
    """x × factor + summand, rounded once to float32; x an integer of 9 bits."""
    exact = np.float64(x) * np.float64(factor) + np.float64(summand)
    return np.asarray(exact, np.float32)


def ratios(operator: Convolution | AveragePool) -> NDArray[np.float32]:
    """What a sum is multiplied by, for each channel: in float32, as ONNX Runtime computes it."""
    source, output = operator.input.quantisation, operator.output.quantisation
    if isinstance(operator, AveragePool):
        pixels = operator.input.shape[0] * operator.input.shape[1]
        return np.array([np.float32(source.scale) / np.float32(output.scale * pixels)])
    scales = np.float32(source.scale) * operator.scales.astype(np.float32)
    return np.asarray(scales / np.float32(output.scale))


def biases(operator: Convolution, offset: int = 0) -> tuple[Integers, Integers]:
    """What each channel's sum begins with, the input's zero point in it, and how far from 0 the sum can get.

    Args:
        offset: what a stored input is above int8: 128 of uint8.

    Raises:
        UserError: a sum does not fit 32 bits.
    """
    axes = (0, 1) if operator.depthwise else (1, 2, 3)
    weights = operator.weights.astype(np.int64)
    zero = operator.input.quantisation.zero + offset
    bias = operator.bias - zero * weights.sum(axis=axes)
    most = max(128 - offset, 127 + offset)
    largest = np.abs(bias) + most * np.abs(weights).sum(axis=axes)
    check_sum(operator, int(largest.max()))
    return bias, largest


def check_sum(operator: Operator, largest: int) -> None:
    """Raises: UserError where a sum that can get as far from 0 as ``largest`` does not fit 32 bits."""
    if largest >= 1 << 31:
        raise UserError(
            f"node {operator.name!r}: its sums reach {largest:,}, which 32 bits do not hold; calibrate again"
        )


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
