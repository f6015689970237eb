"""Where views stand among the operators around them."""

from __future__ import annotations

from dataclasses import replace

from compile.ir.graph import Graph, Operator
from compile.ir.operators import Dequantise, View


def dequantise_before_views(graph: Graph) -> Graph:
    """A view of integers that are dequantised behind it, and read by nothing else, becomes one of float32."""
    fresh = graph.fresh_names()
    made: list[Operator] = []
    for operator in graph.operators:
        view = graph.makers.get(operator.input.name) if operator.activations else None
        if (
            isinstance(operator, Dequantise)
            and isinstance(view, View)
            and graph.only_reader(view.output) is operator
        ):
            whole = replace(
                operator.output,
                name=fresh(f"{operator.output.name}/whole"),
                shape=view.input.shape,
            )
            made += [
                replace(operator, inputs=view.inputs, outputs=(whole,)),
                replace(view, inputs=(whole,), outputs=operator.outputs),
            ]
        else:
            made.append(operator)
    return graph.with_operators(made)
