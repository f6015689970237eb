"""Where views stand among the operators around them."""

from __future__ import annotations

from dataclasses import replace

from compile.ir.graph import Graph, Operator
from compile.ir.operators import Dequantise, Quantise, Transpose, View

# They give the same values in other places.
Moving = View | Transpose


def move_views(graph: Graph) -> Graph:
    """Quantising before a view or transposition, dequantising after it: integers are a quarter of the bytes."""
    made: list[Operator] = []
    makers: dict[str, Operator] = {}
    fresh = graph.fresh_names()
    for operator in graph.operators:
        source = operator.activations[:1]
        before = makers.get(source[0].name) if source else None
        new = [operator]
        if isinstance(operator, Moving) and isinstance(before, Dequantise):
            new = _exchanged(before, operator, fresh(f"{operator.output.name}/stored"))
        elif isinstance(operator, Quantise) and isinstance(before, Moving):
            new = _exchanged(before, operator, fresh(f"{before.input.name}/stored"))
        made += new
        makers |= {tensor.name: each for each in new for tensor in each.outputs}
    return graph.with_operators(made)


def dequantise_before_views(graph: Graph) -> Graph:
    """A view of integers that are dequantised behind it, and read by nothing else, becomes one of float32."""
    fresh = graph.fresh_names()

    def rule(operator: Operator) -> list[Operator] | None:
        if not isinstance(operator, Dequantise):
            return None
        view = graph.makers.get(operator.input.name)
        if not isinstance(view, View) or graph.only_reader(view.output) is not operator:
            return None
        return _exchanged(view, operator, fresh(f"{operator.output.name}/whole"))

    return graph.rewritten(rule)


def _exchanged(first: Operator, second: Operator, name: str) -> list[Operator]:
    """``second``, which reads what ``first`` makes, before it; one of them only moves values. ``name`` is of the tensor between."""
    if isinstance(second, Moving):
        between = replace(first.input, name=name, shape=second.output.shape)
    else:
        between = replace(second.output, name=name, shape=first.input.shape)
    return [
        replace(second, inputs=(first.input, *second.inputs[1:]), outputs=(between,)),
        replace(first, inputs=(between, *first.inputs[1:]), outputs=second.outputs),
    ]
