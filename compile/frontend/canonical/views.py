"""Chains of views, and of transpositions, as one: TVM joins them link by link, and gives up on a long chain."""

from __future__ import annotations

from typing import NamedTuple

import onnx

from netship.compile.frontend.canonical.graph import Chain, Graph, attributes_of
from netship.compile.frontend.fold import infer, with_nodes

_VIEWS = ("Flatten", "Identity", "Reshape", "Squeeze", "Unsqueeze")


class _Link(NamedTuple):
    """What a node makes of the tensor that its chain begins with; ``order`` is None of a view."""

    source: str
    order: tuple[int, ...] | None
    joined: bool


def join(proto: onnx.ModelProto) -> onnx.ModelProto:
    """The same function; of views of views, and of transpositions of transpositions, each reads what the first one does.

    Args:
        proto: folded: every shape is known. It is returned as it is where there are no such chains.
    """
    graph = Graph(proto)
    links: dict[str, _Link] = {}
    for node in proto.graph.node:
        if node.op_type in (*_VIEWS, "Transpose"):
            links[node.output[0]] = _link(node, graph, links)
    if not any(link.joined for link in links.values()):
        return proto
    live = {each.name for each in proto.graph.output}
    kept: list[onnx.NodeProto] = []
    for node in reversed(proto.graph.node):
        link = links.get(node.output[0])
        if link and node.output[0] not in live:
            continue
        made = _joined(node, link, graph) if link and link.joined else node
        live.update(made.input)
        kept.append(made)
    return infer(with_nodes(proto, kept[::-1], graph.constants))


def _link(node: onnx.NodeProto, graph: Graph, links: dict[str, _Link]) -> _Link:
    name = node.input[0]
    before = links.get(name)
    if node.op_type in _VIEWS:
        if before and before.order is None:
            return _Link(before.source, None, True)
        return _Link(name, None, False)
    rank = len(graph.shape(name))
    order = tuple(attributes_of(node).get("perm", range(rank)[::-1]))
    if before and before.order is not None:
        order = tuple(before.order[axis] for axis in order)
    elif not before or graph.shape(name) != graph.shape(before.source):
        return _Link(name, order, False)
    if order != tuple(range(rank)):
        return _Link(before.source, order, True)
    # No change at all: a view, perhaps of another view.
    source = links.get(before.source)
    first = source.source if source and source.order is None else before.source
    return _Link(first, None, True)


def _joined(node: onnx.NodeProto, link: _Link, graph: Graph) -> onnx.NodeProto:
    shape = graph.shape(node.output[0])
    chain = Chain(node, graph)
    if link.order is not None:
        (made,) = chain.end("Transpose", link.source, perm=link.order)
    elif shape == graph.shape(link.source):
        (made,) = chain.end("Identity", link.source)
    else:
        (made,) = chain.end("Reshape", link.source, shape)
    return made
