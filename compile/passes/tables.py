"""Functions of one int8 value as tables of 256 values, which ONNX Runtime computes: exact by construction."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from compile.ir import onnx_form
from compile.ir.graph import Array, Graph, Operator, Tensor
from compile.ir.kinds import make
from compile.ir.operators import Dequantise, Quantise
from compile.ir.pointwise import is_pointwise
from targets.onnx_runtime import Session


def as_tables(graph: Graph) -> Graph:
    """A table in the place of float operators between one DequantizeLinear and a QuantizeLinear, each of which is pointwise."""
    made: list[Operator] = []
    for operator in graph.operators:
        function = (
            _function(graph, operator) if isinstance(operator, Quantise) else None
        )
        if function is None:
            made.append(operator)
            continue
        source = function[0].input
        values = _values(function)
        table = Tensor(
            f"{operator.output.name}/table",
            values.shape,
            values.dtype.name,
            value=values,
        )
        names = " + ".join(each.label for each in function[1:-1])
        made.append(make("table", names, [source, table], [operator.output]))
    return graph.with_operators(made)


def _function(graph: Graph, last: Quantise) -> list[Operator] | None:
    """The operators from one DequantizeLinear to ``last``; None where they are no function of one stored value."""
    inside = {last.output.name}
    waiting = [last.input]
    sources = set()
    while waiting:
        operator = graph.makers.get(waiting.pop().name)
        if operator is None or operator.output.name in inside:
            if operator is None:
                return None
            continue
        if not (isinstance(operator, Dequantise) or is_pointwise(operator)):
            return None
        inside.add(operator.output.name)
        if isinstance(operator, Dequantise):
            sources.add(operator.input.name)
        else:
            waiting += operator.activations
    if len(sources) != 1:
        return None
    return [each for each in graph.operators if each.output.name in inside]


def _values(function: list[Operator]) -> Array:
    """The output for every stored value, the lowest first."""
    source = function[0].input
    low, high = source.limits
    names = {
        tensor.name for each in function for tensor in (*each.activations, each.output)
    }
    alone = Graph((source,), (function[-1].output,), tuple(function))
    every = alone.with_tensors(
        {name: replace(alone.tensors[name], shape=(high - low + 1,)) for name in names}
    )
    proto = onnx_form.write(every)
    session = Session(proto.SerializeToString(), function[-1].label)
    stored = np.arange(low, high + 1).astype(source.dtype)
    return session.run([every.outputs[0].name], {source.name: stored})[0]
