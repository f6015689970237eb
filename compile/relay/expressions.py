"""Relay expressions: what they consist of."""

from __future__ import annotations

from typing import Any

from netship.targets import engine

tvm = engine.compiler()
from tvm import relay


def nodes(function: Any) -> list[Any]:
    """Every node of a Relay function, each after those that it takes its arguments from."""
    found: list[Any] = []
    relay.analysis.post_order_visit(function, found.append)
    return found


def operands(node: Any) -> list[Any]:
    """What a node takes its values from."""
    match node:
        case relay.Call():
            return list(node.args)
        case relay.Tuple():
            return list(node.fields)
        case relay.TupleGetItem():
            return [node.tuple_value]
    return []


def readers(order: list[Any]) -> dict[Any, list[Any]]:
    """What takes its values from each node, of nodes as `nodes` orders them; a node that nothing reads is not there."""
    found: dict[Any, list[Any]] = {}
    for node in order:
        for each in operands(node):
            found.setdefault(each, []).append(node)
    return found


def is_call(node: Any, *names: str) -> bool:
    """Whether it is a call of an operator; where ``names`` are given, of one of these."""
    return (
        isinstance(node, relay.Call)
        and isinstance(node.op, tvm.ir.Op)
        and (not names or node.op.name in names)
    )


def calls(function: Any) -> list[Any]:
    """The operator calls of a Relay function, as `nodes` orders them."""
    return list(filter(is_call, nodes(function)))


def shape(tensor_type: Any) -> tuple[int, ...]:
    """Of a tensor, or of the first of a tuple."""
    if isinstance(tensor_type, tvm.ir.TupleType):
        return shape(tensor_type.fields[0])
    return tuple(int(size) for size in tensor_type.shape)
