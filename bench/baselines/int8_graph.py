"""A QDQ graph for runtimes with an int8 of their own: its activations are int8, and no operator quantises them."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from netship.compile.ir.graph import Graph, Operator, Quantisation, Tensor
from netship.compile.ir.operators import Dequantise, Quantise
from netship.targets.errors import UserError

if TYPE_CHECKING:
    import onnx

LOWEST, HIGHEST = -128, 127


def is_quantised(proto: onnx.ModelProto) -> bool:
    return any(node.op_type == "QuantizeLinear" for node in proto.graph.node)


def refusal(name: str) -> UserError:
    return UserError(
        f"{name}: quantised otherwise than in int8 or uint8 with one scale"
    )


def stored(quantiser: Operator) -> Tensor:
    """What a QuantizeLinear of an activation makes, as int8; uint8 is the same, shifted by 128."""
    output, scale, zero = quantiser.output, quantiser.constant(1), quantiser.constant(2)
    shift = {"int8": 0, "uint8": 128}.get(output.dtype)
    if scale is None or scale.size != 1 or shift is None:
        raise refusal(output.name)
    shifted = (0 if zero is None else zero.item()) - shift
    return replace(
        output, dtype="int8", quantisation=Quantisation((scale.item(),), (shifted,))
    )


def int8_activations(graph: Graph, float_ports: bool = True) -> Graph:
    """int8 tensors in the place of QuantizeLinear and DequantizeLinear.

    Args:
        float_ports: keep these operators at the network's inputs and outputs, which stay float32.
    """
    ports = (*graph.inputs, *graph.outputs) if float_ports else ()
    floats = {each.name for each in ports}
    # By the name of a tensor in the QDQ graph: the one that takes its place.
    typed: dict[str, Tensor] = {}
    kept: list[Operator] = []
    for operator in graph.operators:
        if not isinstance(operator, Quantise | Dequantise):
            kept.append(operator)
            continue
        source, output = typed.get(operator.input.name, operator.input), operator.output
        if isinstance(operator, Quantise):
            output = stored(operator)
            if source.name not in floats and source.quantisation is None:
                source = replace(output, name=source.name)
                typed[source.name] = source
        if {source.name, output.name} & floats:
            typed[output.name] = output
            kept.append(replace(operator, inputs=(source,), outputs=(output,)))
        else:
            typed[output.name] = source
    kept = [each.with_tensors(typed) for each in kept]
    return graph.with_tensors(typed).with_operators(kept)


def high(tensor: Tensor) -> float:
    """The largest real number that a quantised activation can be."""
    return (HIGHEST - tensor.zero) * tensor.scale


def magnitude(tensor: Tensor) -> float:
    """How far from 0 a quantised activation can be."""
    return max((tensor.zero - LOWEST) * tensor.scale, high(tensor))


def is_relu(tensor: Tensor) -> bool:
    """Whether a quantised activation's range begins at 0: QDQ graphs leave out a ReLU before such a QuantizeLinear."""
    return tensor.quantisation is not None and tensor.zero == LOWEST
