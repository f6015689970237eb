"""A network in which some layers compute on integers and the others in float, made of its float32 and its int8 form."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

import onnx

# Operators with weights; each begins a layer.
_HEADS = ("Conv", "ConvTranspose", "Gemm", "MatMul")


class Layer(NamedTuple):
    """An operator with weights, and the operators behind it up to the next ones.

    Attributes:
        name: of its first node.
        nodes: names of its nodes in the float32 network.
        tensors: what they make.
        inputs: what they read of other layers and of the network's inputs.
    """

    name: str
    nodes: tuple[str, ...]
    tensors: tuple[str, ...]
    inputs: tuple[str, ...]

    @property
    def names(self) -> frozenset[str]:
        """By which a build may name it."""
        return frozenset((*self.nodes, *self.tensors))


def layers(proto: onnx.ModelProto) -> list[Layer]:
    """The layers of a float32 network, in the order they run; what comes before the first one with weights is one, too.

    Args:
        proto: each node with a name of its own.
    """
    constants = {each.name for each in proto.graph.initializer}
    number = dict[str, int]()
    found: list[list[onnx.NodeProto]] = []
    for node in proto.graph.node:
        known = [number[name] for name in node.input if name in number]
        weighted = len(node.input) > 1 and node.input[1] in constants
        if not known or (node.op_type in _HEADS and weighted):
            found.append([])
            known = [len(found) - 1]
        found[max(known)].append(node)
        number |= dict.fromkeys(filter(None, node.output), max(known))
    made = []
    for nodes in found:
        own = [name for node in nodes for name in node.output if name]
        read = dict.fromkeys(name for node in nodes for name in node.input if name)
        outer = (name for name in read if name not in constants and name not in own)
        made.append(
            Layer(nodes[0].name, tuple(n.name for n in nodes), tuple(own), tuple(outer))
        )
    return made


def mix(
    floating: onnx.ModelProto,
    quantised: onnx.ModelProto,
    integers: Collection[str],
    rounded: str = "",
) -> onnx.ModelProto:
    """The QDQ graph in which the nodes ``integers`` alone are quantised.

    What an int8 node makes, and what one reads, is rounded to int8. Between float nodes a tensor stays as it is.

    Args:
        floating: the float32 network, batch normalisation folded.
        quantised: all of it quantised by ONNX Runtime, which leaves out limits that an output's type has anyway.
        integers: names of nodes, whole layers of them.
        rounded: a tensor that is rounded in any case.
    """
    outputs = {each.name for each in floating.graph.output}
    initial = {each.name for each in quantised.graph.initializer}
    ours = {node.name: node for node in quantised.graph.node}
    makers = {name: node.name for node in floating.graph.node for name in node.output}
    back = {node.input[0]: node for node in quantised.graph.node if node.input}
    touched = {rounded} | {
        name
        for node in floating.graph.node
        if node.name in integers
        for name in (*node.input, *node.output)
    }
    # How a tensor is rounded, and by which name it is read then.
    steps: dict[str, tuple[onnx.NodeProto, onnx.NodeProto]] = {}
    for node in quantised.graph.node:
        if node.op_type == "QuantizeLinear":
            after = back[node.output[0]]
            given = after.output[0] in outputs
            name = after.output[0] if given else node.input[0]
            if name in touched:
                steps[name] = node, after
    made = [
        node
        for node in quantised.graph.node
        if node.op_type == "DequantizeLinear" and node.input[0] in initial
    ]

    def add(node: onnx.NodeProto, inputs: Mapping[str, str], output: str = "") -> None:
        copy = onnx.NodeProto()
        copy.CopyFrom(node)
        copy.input[:] = [inputs.get(name, name) for name in node.input]
        if output:
            copy.output[:] = [output]
        made.append(copy)

    def round_off(name: str) -> None:
        if name not in steps:
            return
        first, second = steps[name]
        if name in outputs and makers[name] not in integers:
            # The output of the network itself is not rounded.
            add(first, {first.input[0]: name})
            add(second, {}, f"{name}/rounded")
        else:
            made.extend(steps[name])

    for each in floating.graph.input:
        round_off(each.name)
    for node in floating.graph.node:
        if node.name not in integers:
            read = {
                name: steps[name][1].output[0]
                for name in node.input
                if name in steps and (makers.get(name) in integers or name == rounded)
            }
            add(node, read)
        elif node.name in ours:
            read = {
                name: f"{name}/rounded"
                for name in node.input
                if name in steps and name in outputs and makers[name] not in integers
            }
            add(ours[node.name], read)
        for name in node.output:
            round_off(name)
    return _finished(floating, quantised, made)


def _finished(
    floating: onnx.ModelProto,
    quantised: onnx.ModelProto,
    nodes: Sequence[onnx.NodeProto],
) -> onnx.ModelProto:
    """The graph of these nodes, less those that nothing needs, with the constants of both."""
    needed = {each.name for each in floating.graph.output}
    live = []
    for node in reversed(nodes):
        if not needed.isdisjoint(node.output):
            live.append(node)
            needed.update(node.input)
    constants = {
        each.name: each
        for graph in (quantised.graph, floating.graph)
        for each in graph.initializer
        if each.name in needed
    }
    proto = onnx.ModelProto(
        ir_version=quantised.ir_version, opset_import=quantised.opset_import
    )
    proto.graph.name = floating.graph.name
    proto.graph.input.extend(floating.graph.input)
    proto.graph.output.extend(floating.graph.output)
    proto.graph.node.extend(reversed(live))
    proto.graph.initializer.extend(constants.values())
    return proto
