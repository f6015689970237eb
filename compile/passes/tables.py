"""Functions of one int8 value as tables of 256 values, which ONNX Runtime computes: exact by construction."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from netship.compile.ir import onnx_form
from netship.compile.ir.graph import Array, Graph, Operator, Tensor, constant
from netship.compile.ir.kinds import make
from netship.compile.ir.operators import Quantise, Scaled
from netship.compile.ir.pointwise import is_pointwise
from netship.compile.passes.simplify import unfold_limits
from netship.targets.onnx_runtime import Session


def as_tables(graph: Graph) -> Graph:
    """A table in the place of float operators from one quantised value to another, each of which is pointwise."""

    def rule(operator: Operator) -> list[Operator] | None:
        found = _function(graph, operator) if isinstance(operator, Quantise) else None
        if found is None:
            return None
        source, function = found
        table = constant(f"{operator.output.name}/table", _values(source, function))
        name = " + ".join(x.label for x in function if not isinstance(x, Scaled))
        return [make("table", name, [source, table], [operator.output])]

    return graph.rewritten(rule)


def _function(graph: Graph, last: Quantise) -> tuple[Tensor, list[Operator]] | None:
    """A quantised value and the operators from it to ``last``; None where that is a function of several."""
    order = {each.output.name: index for index, each in enumerate(graph.operators)}
    inside: list[Operator] = []
    needed = {last.output.name: last.output}
    while not inside or len(needed) > 1 or not next(iter(needed.values())).quantisation:
        # Of several values the one that is made last may be a function of the others.
        name = max(needed, key=lambda each: order.get(each, -1))
        operator = graph.makers.get(name)
        if operator is None:
            return None
        if not isinstance(operator, Scaled) and not is_pointwise(operator):
            return None
        del needed[name]
        inside.insert(0, operator)
        needed |= {each.name: each for each in operator.activations}
    (source,) = needed.values()
    same = all(isinstance(each, Scaled) for each in inside)
    same &= replace(source, name="") == replace(last.output, name="")
    return None if same else (source, inside)


def _values(source: Tensor, function: list[Operator]) -> Array:
    """The output for every stored value, the lowest first."""
    low, high = source.limits
    names = {
        tensor.name for each in function for tensor in (*each.activations, each.output)
    }
    # Names of nodes need not be unique in a model that ONNX Runtime inlined functions of, but must be in what it reads.
    nameless = tuple(replace(each, name="") for each in function)
    alone = Graph((source,), (function[-1].output,), nameless)
    every = alone.with_tensors(
        {name: replace(alone.tensors[name], shape=(high - low + 1,)) for name in names}
        | {
            tensor.name: tensor.as_float()
            for tensor in alone.tensors.values()
            if tensor.value is not None and tensor.quantisation
        }
    )
    every = unfold_limits(every)
    proto = onnx_form.write(every)
    session = Session(proto.SerializeToString(), function[-1].label)
    stored = np.arange(low, high + 1).astype(source.dtype)
    # A constant of several axes gives them to the answer.
    return session.run([every.outputs[0].name], {source.name: stored})[0].ravel()
