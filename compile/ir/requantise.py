"""Integers as ONNX Runtime rounds them on x86: what a sum begins with, and what it is multiplied by.

Every int8 kernel gets its constants here, so that all give the same integers. The rounding is in float32, halves to even
(onnxruntime/core/mlas/lib: quantize.cpp, qlgavgpool.cpp, qladd_avx2.cpp). A sum is turned into float32, multiplied by the ratio of
scales and rounded. An addition is two fused multiply-adds, the second input's first, on a constant that holds the zero points.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from netship.compile.ir.graph import Operator, Tensor
from netship.targets.errors import UserError

Integers = NDArray[np.int64]


class Requantisation(NamedTuple):
    """output = clip(rint((sum + bias) × ratio) + zero), for each channel.

    Attributes:
        bias: int64 [channels], the input's zero point in it.
        ratio: float32 [channels].
        largest: int64 [channels], how far from 0 a sum can get.
    """

    bias: Integers
    ratio: NDArray[np.float32]
    largest: Integers


def of_sums(
    operator: Operator,
    weights: Integers,
    bias: Integers,
    ratio: NDArray[np.float32],
) -> Requantisation:
    """Of sums of products.

    Args:
        weights: [channels, products of one sum].
        bias: [channels], in units of input scale × weight scale.
        ratio: [channels], of these units and the output's scale.
    """
    source = operator.input
    begin = bias - source.zero * weights.sum(axis=1)
    most = max(abs(limit) for limit in source.limits)
    largest = np.abs(begin) + most * np.abs(weights).sum(axis=1)
    if largest.max() >= 1 << 31:
        raise UserError(
            f"node {operator.label!r}: its sums reach {int(largest.max()):,}, which 32 bits do not hold; "
            "quantise it again with a coarser scale for that channel's weights"
        )
    return Requantisation(begin, ratio, largest)


class Addition(NamedTuple):
    """output = rint(first × a + (second × b + fixed)), of values as the model stores them: ours and ``offset``."""

    a: np.float32
    b: np.float32
    fixed: np.float32
    offset: int


def of_addition(first: Tensor, second: Tensor, output: Tensor, offset: int) -> Addition:
    """Args: offset: what the model's stored values are above these tensors' (passes/storage.py)."""
    a = np.float32(first.scale) / np.float32(output.scale)
    b = np.float32(second.scale) / np.float32(output.scale)
    zeros = multiply_add(first.zero + offset, a, b * np.float32(second.zero + offset))
    fixed = np.float32(output.zero + offset) - np.float32(zeros)
    return Addition(a, b, fixed, offset)


def multiply_add(x: Any, factor: np.float32, summand: Any) -> NDArray[np.float32]:
    """x × factor + summand, rounded once to float32; x an integer of 9 bits."""
    exact = np.float64(x) * np.float64(factor) + np.float64(summand)
    return np.asarray(exact, np.float32)


def requantise(
    sums: Integers, ratio: Any, output: Tensor, limits: tuple[int, int]
) -> Integers:
    """Sums to stored values of ``output``, within ``limits``."""
    steps = np.rint(sums.astype(np.float32) * ratio).astype(np.int64)
    clipped: Integers = np.clip(steps + output.zero, *limits)
    return clipped


def with_zero(steps: Any, operator: Operator) -> Integers:
    """float32 steps of the output, without its zero point, to its stored values.

    The sum with the zero point is rounded to float32 before it is rounded to an integer: the zero point is the model's,
    whose values are the attribute ``offset`` above the output's (passes/storage.py).
    """
    output, offset = operator.output, int(operator.attributes.get("offset", 0))
    low, high = getattr(operator, "stored_limits", output.limits)
    sums = np.float32(steps) + np.float32(output.zero + offset)
    stored: Integers = np.clip(np.rint(sums).astype(np.int64) - offset, low, high)
    return stored
