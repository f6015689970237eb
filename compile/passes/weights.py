"""Weights that kernels of ours take: int8."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from netship.compile.ir.graph import Graph, Operator, constant
from netship.compile.ir.kinds import make
from netship.compile.ir.operators import Convolution

Integers = NDArray[np.int64]


def split_wide_weights(graph: Graph) -> Graph:
    """Weights that are more than 8 bits from their zero point, as sums of int8: their channels are read several times.

    Then x · w is x · a + x · b, of w = a + b. So the sums stay those of ONNX Runtime, and one rounding follows.
    """
    fresh = graph.fresh_names()

    def rule(operator: Operator) -> list[Operator] | None:
        if not isinstance(operator, Convolution) or not operator.output.quantisation:
            return None
        weights = operator.inputs[1]
        if weights is None or weights.value is None or weights.dtype != "int16":
            return None
        source = operator.input
        parts = _parts(weights.value.astype(np.int64))
        # Of each part the channels of a group that it has weights for.
        taken = [np.arange(weights.shape[1])]
        taken += [np.flatnonzero(part.any(axis=(0, 2, 3))) for part in parts[1:]]
        value = np.concatenate(
            [part[:, each] for part, each in zip(parts, taken, strict=True)], axis=1
        )
        first = np.arange(operator.group)[:, None] * weights.shape[1]
        places = (first + np.concatenate(taken)).ravel()
        repeated = replace(
            source,
            name=fresh(f"{source.name}/repeated"),
            shape=(source.shape[0], places.size, *source.shape[2:]),
        )
        indices = constant(fresh(f"{repeated.name}/places"), places)
        split = constant(weights.name, value.astype(np.int8), weights.quantisation)
        inputs = (repeated, split, *operator.inputs[2:])
        return [
            make("Gather", operator.name, [source, indices], [repeated], {"axis": 1}),
            replace(operator, inputs=inputs),
        ]

    return graph.rewritten(rule)


def _parts(whole: Integers) -> list[Integers]:
    """Arrays of int8's range whose sum is ``whole``."""
    parts = []
    while whole.any():
        parts.append(np.clip(whole, -128, 127))
        whole = whole - parts[-1]
    return parts
