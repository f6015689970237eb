"""Where views stand among the operators around them."""

from __future__ import annotations

from dataclasses import replace

from netship.compile.ir.graph import Graph, Operator
from netship.compile.ir.operators import Dequantise, View


def dequantise_before_views(graph: Graph) -> Graph:
    """A view of integers that are dequantised behind it, and read by nothing else, becomes one of float32."""
    fresh = graph.fresh_names()

    def rule(operator: Operator) -> list[Operator] | None:
        if not isinstance(operator, Dequantise):
            return None
        view = graph.makers.get(operator.input.name)
        if not isinstance(view, View) or graph.only_reader(view.output) is not operator:
            return None
        between = replace(
            operator.output,
            name=fresh(f"{operator.output.name}/whole"),
            shape=view.input.shape,
        )
        rest = view.inputs[1:]
        return [
            replace(operator, inputs=view.inputs[:1], outputs=(between,)),
            replace(view, inputs=(between, *rest), outputs=operator.outputs),
        ]

    return graph.rewritten(rule)
