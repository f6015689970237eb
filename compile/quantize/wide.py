"""Activations of 16 bits, which compute in float32 (compile/frontend/quantised/scaling.py)."""

from __future__ import annotations

from compile.ir.graph import Graph, Tensor
from compile.ir.operators import View


def wide_step(graph: Graph, output: Tensor) -> float | None:
    """What a step of an output means that is dequantised from 16 bits; None of another output.

    Its operators round, limit, and multiply by the step.
    """
    makers = graph.makers
    maker = makers.get(output.name)
    while isinstance(maker, View):
        maker = makers.get(maker.input.name)
    if maker is None or maker.kind != "Mul":
        return None
    factor, rounded = maker.constant(1), makers.get(maker.input.name)
    while rounded and rounded.kind in ("Add", "Clip", "Sub"):
        rounded = makers.get(rounded.input.name)
    if factor is None or factor.size != 1 or not rounded or rounded.kind != "Round":
        return None
    return float(factor.item())
