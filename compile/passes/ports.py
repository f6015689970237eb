"""What a network takes and gives."""

from __future__ import annotations

from dataclasses import replace

from compile.ir.graph import Graph, Tensor
from compile.ir.operators import Dequantise, Quantise


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
