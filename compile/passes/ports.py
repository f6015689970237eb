"""What a network takes and gives."""

from __future__ import annotations

from dataclasses import replace

from onnx import TensorProto

from netship.compile.ir.graph import Graph, Operator, Tensor
from netship.compile.ir.kinds import make
from netship.compile.ir.operators import Dequantise, Quantise, Table, View
from netship.compile.passes.movement import behind_moves


def integer_ports(graph: Graph) -> Graph:
    """A quantised network that takes and gives stored values, where it begins by quantising and ends by dequantising."""
    changed: dict[str, Tensor] = {}
    inputs = []
    for tensor in graph.inputs:
        reader = graph.only_reader(tensor)
        if isinstance(reader, Quantise):
            tensor = replace(reader.output, name=tensor.name)
            changed[reader.output.name] = tensor
        inputs.append(tensor)
    outputs = []
    for tensor in graph.outputs:
        maker = graph.makers.get(tensor.name)
        if isinstance(maker, Dequantise):
            tensor = maker.input
        outputs.append(changed.get(tensor.name, tensor))
    bare = replace(graph, inputs=tuple(inputs), outputs=tuple(outputs))
    kept = (each for each in graph.operators if each.output.name not in changed)
    return bare.with_operators(each.with_tensors(changed) for each in kept)


def bytes_as_given(graph: Graph, name: str) -> Graph:
    """A quantised network whose input ``name`` is bytes that stand for themselves, for kernels whose values are int8.

    Only tables, dequantising and what moves values read it.
    """
    (given,) = (each for each in graph.inputs if each.name == name)
    tensors, readers = behind_moves(graph, given)
    if not all(isinstance(each, Table | Dequantise) for each in readers):
        return graph

    def rule(operator: Operator) -> list[Operator] | None:
        if not isinstance(operator, Dequantise) or operator.input.name not in tensors:
            return None
        inputs, to = [operator.input], {"to": TensorProto.FLOAT}
        return [make("Cast", operator.name, inputs, [operator.output], to)]

    plain = {key: replace(each, quantisation=None) for key, each in tensors.items()}
    return graph.rewritten(rule).with_tensors(plain)


def own_outputs(graph: Graph) -> Graph:
    """Each output in memory of its own: a copy of one that is an input or another output, or a view of these."""
    fresh = graph.fresh_names()
    taken = {tensor.name for tensor in graph.inputs}
    copies: list[Operator] = []
    outputs = []
    for tensor in graph.outputs:
        source = tensor
        while isinstance(view := graph.makers.get(source.name), View):
            source = view.input
        if source.name in taken or source.value is not None:
            copy = replace(tensor, name=fresh(f"{tensor.name}/copy"), value=None)
            copies.append(make("Identity", tensor.name, [tensor], [copy]))
            tensor = copy
        taken.add(source.name)
        outputs.append(tensor)
    own = replace(graph, outputs=tuple(outputs))
    return own.with_operators([*graph.operators, *copies])


def dequantise_for_each(graph: Graph) -> Graph:
    """A DequantizeLinear of its own for each operator that reads what one gives."""
    fresh = graph.fresh_names()

    def rule(operator: Operator) -> list[Operator]:
        made = []
        for tensor in dict.fromkeys(operator.activations):
            before = graph.makers.get(tensor.name)
            if isinstance(before, Dequantise) and not graph.only_reader(tensor):
                own = replace(tensor, name=fresh(f"{tensor.name}/own"))
                made.append(replace(before, outputs=(own,)))
                operator = operator.with_tensors({tensor.name: own})
        return [*made, operator]

    return graph.rewritten(rule)
