"""Activations of 16 bits, which compute in float32 (compile/frontend/quantised/scaling.py)."""

from __future__ import annotations

from netship.compile.ir.graph import Graph, Tensor
from netship.compile.ir.operators import View

# Float32 sums of another order round to other steps, layer after layer: a MobileNetV2 in numpy was 15 steps from ONNX
# Runtime. So outputs are judged in steps of 12 bits, which still are 16 to one of int8.
_STEPS = 16


def wide_step(graph: Graph, output: Tensor) -> float | None:
    """What a step of 12 bits means of an output that is dequantised from 16; None of another output.

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
    return _STEPS * float(factor.item())
