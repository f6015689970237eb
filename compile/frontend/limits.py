"""Limits on an untrusted graph, counted before anything that costs more than reading it."""

from __future__ import annotations

import math
from collections.abc import Mapping

import onnx

from netship.compile.frontend.names import Unfit, node_label
from netship.targets.escapes import shown

MAX_NODES = 20_000
MAX_WEIGHTS = 50_000
MAX_INPUTS = 64
MAX_OUTPUTS = 64
# Inputs and outputs of one node.
MAX_ARGUMENTS = 512
MAX_RANK = 8

# Operators whose output has as many dimensions as a constant has elements, by that constant's place.
_RANK_FROM = {"Reshape": 1, "Expand": 1, "ConstantOfShape": 0}
_FIXED_RANK = {"Shape": 1, "Size": 0, "Range": 1, "NonZero": 2, "Flatten": 2}


def check_counts(graph: onnx.GraphProto) -> None:
    """Refuse more tensors or nodes than a network of this kind has."""
    counts = (
        ("weights", len(graph.initializer), MAX_WEIGHTS),
        ("inputs", len(graph.input), MAX_WEIGHTS),
        ("outputs", len(graph.output), MAX_OUTPUTS),
        ("nodes", len(graph.node), MAX_NODES),
    )
    for what, count, most in counts:
        if count > most:
            raise Unfit(f"{count} {what}, more than the {most} allowed")
    for node in graph.node:
        count = len(node.input) + len(node.output)
        if count > MAX_ARGUMENTS:
            raise Unfit(
                f"{node_label(node)}: {count} inputs and outputs, more than the {MAX_ARGUMENTS} allowed; "
                "split it before exporting"
            )


def check_ranks(graph: onnx.GraphProto) -> None:
    """Refuse a tensor of more than MAX_RANK dimensions, before ONNX's inference, whose cost grows with them, meets it."""
    constants = {tensor.name: list(tensor.dims) for tensor in graph.initializer}
    ranks = {name: len(dims) for name, dims in constants.items()}
    for info in (*graph.input, *graph.output):
        ranks[info.name] = len(info.type.tensor_type.shape.dim)
    for name, rank in ranks.items():
        if rank > MAX_RANK:
            raise _too_many(f"tensor {shown(name)!r}", rank)
    for node in graph.node:
        if node.op_type == "Constant":
            constants |= _constant(node)
            rank = len(constants.get(node.output[0], []))
        else:
            rank = _rank(node, ranks, constants)
        if rank > MAX_RANK:
            raise _too_many(node_label(node), rank)
        for name in node.output:
            ranks[name] = rank


def _too_many(label: str, rank: int) -> Unfit:
    return Unfit(
        f"{label}: {rank} dimensions, more than the {MAX_RANK} allowed; export again"
    )


def _constant(node: onnx.NodeProto) -> dict[str, list[int]]:
    """The shape of a Constant's output."""
    for each in node.attribute:
        if each.HasField("t"):
            return {node.output[0]: list(each.t.dims)}
        if each.ints or each.floats:
            return {node.output[0]: [len(each.ints) or len(each.floats)]}
    return {}


def _rank(
    node: onnx.NodeProto, ranks: Mapping[str, int], constants: Mapping[str, list[int]]
) -> int:
    """Dimensions of a node's outputs, as ONNX's inference would find them; 0 where it cannot know them yet."""
    inputs = [ranks.get(name, 0) for name in node.input] or [0]
    attributes = {each.name: each for each in node.attribute}
    kind = node.op_type

    def count(place: int, attribute: str) -> int:
        if attribute in attributes:
            return len(attributes[attribute].ints)
        dims = constants.get(node.input[place]) if place < len(node.input) else None
        return 0 if dims is None else math.prod(dims)

    if kind in _RANK_FROM:
        return count(_RANK_FROM[kind], "shape")
    if kind in _FIXED_RANK:
        return _FIXED_RANK[kind]
    if kind == "Unsqueeze":
        return inputs[0] + count(1, "axes")
    if kind == "Squeeze":
        return max(0, inputs[0] - count(1, "axes"))
    if kind in ("Conv", "ConvTranspose") and inputs[1:2]:
        return inputs[1] or inputs[0]
    if kind == "Gather":
        return max(0, sum(inputs[:2]) - 1)
    if kind == "GatherND":
        # The last dimension of the indices says how many axes they name.
        named = (constants.get(node.input[1]) or [1])[-1]
        batched = attributes["batch_dims"].i if "batch_dims" in attributes else 0
        return max(0, sum(inputs[:2]) - 1 - max(1, named) - max(0, batched))
    if kind == "OneHot":
        return inputs[0] + 1
    if kind == "Einsum":
        equation = attributes["equation"].s if "equation" in attributes else b""
        terms, arrow, result = bytes(equation).replace(b" ", b"").partition(b"->")
        letters = bytes(code for code in set(terms) if terms.count(code) == 1)
        left = (result if arrow else letters).replace(b".", b"").replace(b",", b"")
        if b"..." not in (result if arrow else terms):
            return len(left)
        lengths = [len(each.replace(b".", b"")) for each in terms.split(b",")]
        others = (rank - length for rank, length in zip(inputs, lengths, strict=False))
        return len(left) + max(0, *others)
    if kind.startswith(("Reduce", "Arg")):
        kept = "keepdims" not in attributes or attributes["keepdims"].i
        gone = 1 if kind.startswith("Arg") else count(1, "axes") or inputs[0]
        return inputs[0] if kept else max(0, inputs[0] - gone)
    return max(inputs)
