"""Lengths of the splits of a convolution's loops: how they are chosen, and what a multiply-add costs with them.

AutoScheduler splits each axis of the output into four loops, each axis that is summed into two. The lengths of the
inner ones say how long a vector is, and how many sums are held in registers at a time. The cost is a model of the
innermost loops: how full the vectors are, loads, sums that wait, registers. Nothing is compiled or measured for it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from itertools import product
from typing import NamedTuple

from netship.targets.presets import Target

# Of the registers for vectors those that sums can have: others hold an input and the weights.
_SPARE = 4
# Sums at a time that keep a multiplier busy: its latency in cycles times the multiply-adds that begin in each.
_BUSY = 8
# How much a load costs of a multiply-add: there is room for one beside each, or for two beside three.
_LOAD = 0.6
# LLVM keeps an array of vectors in registers only where a vector's length is a power of two.
_ODD_VECTOR = 3.0
# What a factor e between two lengths adds to a cost where lengths are chosen: the record's own were measured.
_CHANGED = 0.1
# Statements of an innermost loop; more would fill the cache for instructions.
_MOST_UNROLLED = 128
# Between a length and the one that takes its place.
_MOST_RATIO = 2.0


class Vectors(NamedTuple):
    """Of a CPU: how many numbers of float32 a vector holds, and how many registers there are for them."""

    lanes: int
    registers: int

    def of(self, numbers: str) -> Vectors:
        """For numbers of another type: of float16 a vector holds twice as many."""
        return self._replace(lanes=2 * self.lanes) if numbers == "float16" else self


def vectors_of(target: Target) -> Vectors:
    """Of float32, by the instructions that a build for ``target`` may use."""
    if target.machine != "x86_64":
        return Vectors(4, 16 if target.machine == "arm" else 32)
    if "avx512f" in target.features:
        return Vectors(16, 32)
    return Vectors(8 if "avx2" in target.features else 4, 16)


def nearest(length: int, extent: int, unit: int = 1) -> int:
    """The divisor of an extent that is nearest to a length in ratio, the greater of two.

    Args:
        unit: it is a multiple of this, where the extent is.
    """
    divisors = _divisors(extent)
    if extent % unit == 0:
        divisors = [each for each in divisors if each % unit == 0]
    return min(divisors, key=lambda each: (abs(math.log(each / length)), -each))


def _divisors(number: int) -> list[int]:
    return [each for each in range(1, number + 1) if number % each == 0]


def _near(length: int, extent: int) -> list[int]:
    """The divisors of an extent that are near a length, at least one from above and one from below where there are."""
    divisors = _divisors(extent)
    near = [e for e in divisors if 1 / _MOST_RATIO <= e / length <= _MOST_RATIO]
    lower = [each for each in divisors if each < length][-1:]
    higher = [each for each in divisors if each > length][:1]
    powers = [each for each in divisors if each & (each - 1) == 0][-1:]
    return sorted({*near, *lower, *higher, *powers})


@lru_cache(maxsize=65536)
def fitted(
    old: tuple[tuple[int, ...], ...], extents: tuple[int, ...], vectors: Vectors
) -> tuple[float, list[list[int]]]:
    """The cheapest lengths of splits near others that divide the extents, and what a multiply-add costs with them."""
    depthwise = len(extents) == 6
    sums = [
        [nearest(length, extent) for length in lengths]
        for lengths, extent in zip(old[4:], extents[4:], strict=True)
    ]
    found: list[tuple[float, float, list[list[int]]]] = []
    axes = list(zip(old[:4], extents[:4], strict=True))
    for inner in product(*(_near(lengths[-1], extent) for lengths, extent in axes)):
        chosen = []
        for (lengths, extent), innermost in zip(axes, inner, strict=True):
            middle = nearest(lengths[-2], extent // innermost)
            outer = nearest(lengths[-3], extent // innermost // middle)
            chosen.append([outer, middle, innermost])
        changed = sum(
            abs(math.log(a / b))
            for (lengths, _), new in zip(axes, chosen, strict=True)
            for a, b in zip(lengths, new, strict=True)
        )
        whole = [*chosen, *sums]
        cost = cost_of(whole, depthwise, vectors)
        found.append((cost * (1 + _CHANGED * changed), cost, whole))
    _, cost, best = min(found, key=lambda each: each[0])
    return cost, best


def _innermost(lengths: Sequence[Sequence[int]]) -> tuple[list[int], int]:
    """How often each axis of the output is unrolled in the innermost loops, and the length of a vector."""
    inner = [each[-1] for each in lengths[:4]]
    vector = inner[3]
    if math.prod(each[-1] for each in lengths[4:]) == 1 or vector == 1:
        # No loop of a sum lies between: the loops around are unrolled with them.
        inner = [each[-1] * each[-2] for each in lengths[:4]]
        vector = vector if vector > 1 else inner[3]
    return inner, vector


def _operations(vector: int, vectors: Vectors) -> int:
    """Instructions for a vector of any length: shorter registers, each half as long as the one before, take the rest."""
    whole, rest = divmod(vector, vectors.lanes)
    return whole + rest.bit_count()


def lanes_taken(lengths: Sequence[Sequence[int]], vectors: Vectors) -> float:
    """Lanes of vectors for each that computes; three times as many where the vectors do not stay in registers."""
    _, vector = _innermost(lengths)
    taken = _operations(vector, vectors) * vectors.lanes / vector
    return taken * _ODD_VECTOR if vector & (vector - 1) else taken


def cost_of(
    lengths: Sequence[Sequence[int]], depthwise: bool, vectors: Vectors
) -> float:
    """What a multiply-add costs in the innermost loops, 1 where nothing but the multipliers limits it."""
    inner, vector = _innermost(lengths)
    operations = _operations(vector, vectors)
    cost = lanes_taken(lengths, vectors)
    channels, pixels = operations * inner[3] // vector, math.prod(inner[:3])
    sums, outer = channels * pixels, 1
    if inner[3] == lengths[3][-1]:
        outer = math.prod(each[-2] for each in lengths[:4])
    reads = 1.0 if depthwise else (channels + pixels) / sums
    room = vectors.registers - _SPARE
    if outer > 1 and sums * outer > room:
        # The sums go to memory and come back between the inner loops of what is summed.
        reads += 2 / math.prod(each[-1] for each in lengths[4:])
    elif outer > 1:
        sums *= outer
    cost *= 1 + _LOAD * reads
    if not depthwise:
        cost *= max(1.0, _BUSY / sums) ** 0.5
    return cost * max(1.0, sums / room)


def unrolled(lengths: Sequence[Sequence[int]]) -> int:
    """How many statements TVM is to unroll: so many that each sum of the innermost loops has a register of its own."""
    inner = math.prod(each[-1] for each in lengths[:3])
    whole = inner * math.prod(each[-2] for each in lengths[:4])
    whole *= math.prod(each[-1] for each in lengths[4:])
    return whole if whole <= _MOST_UNROLLED else inner
