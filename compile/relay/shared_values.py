"""Values that are read several times, stored where TVM would write them into a kernel too often.

TVM writes a fused kernel of elementwise operators as one expression, and a value in it as often as it is read: n times
v = v * sigmoid(v) is an expression of 2**n leaves, n times tanh one of 5**n. It writes the indices of an element into
each other in the same way: n reshapes between images of three axes have 3**n of them.
"""

from __future__ import annotations

from typing import Any

from netship.compile.relay.expressions import is_call, nodes, operands, readers, shape
from netship.compile.relay.ops.stored import stored as keep
from netship.targets import engine

tvm = engine.compiler()
from tvm import relay

# Operators in one kernel's expression that come of one value: a second of compiling is 10,000.
_MOST = 1024
# The last of TVM's kinds of operators that it computes where they are read: TOpPattern kElemWise, kBroadcast, kInjective.
_INJECTIVE = 2
# How often the code of an operator has each of its operands, or the index of its result, where more than once.
_COPIES = {
    **dict.fromkeys(("sign", "sinh", "cosh", "tan", "floor_mod", "take"), 2),
    **dict.fromkeys(("nn.depth_to_space", "nn.space_to_depth"), 2),
    **dict.fromkeys(("nn.leaky_relu", "nn.prelu", "isfinite", "where"), 3),
    "isinf": 4,
    "tanh": 5,
    "image.resize1d": 4,
    "image.resize2d": 16,
    "image.resize3d": 64,
    "image.grid_sample": 16,
    "nn.upsampling": 16,
    "nn.upsampling3d": 64,
}
# Of a Pad that repeats or mirrors the edge. Its index is there but six times, but each Pad around another one takes TVM
# 16 times as long: it looks for bounds of choices within choices.
_EDGE_COPIES = 16


def store(module: Any) -> Any:
    """The module, with values in memory whose copies would be more than _MOST operators; itself without such.

    Args:
        module: of one function without control flow.
    """
    function = relay.transform.InferType()(module)["main"]
    order = nodes(function)
    after = readers(order)
    # The operators of each value's expression, as its readers have it.
    sizes: dict[Any, int] = {}
    stored = set()
    for node in order:
        sizes[node] = 1
        if not _is_inlined(node):
            continue
        size = 1 + _copies(node) * sum(sizes[each] for each in operands(node))
        read = after.get(node, [])
        if len(read) > 1 and not all(map(_is_inlined, read)):
            # TVM stores it for the others.
            continue
        reads = sum(map(_copies, read))
        if reads > 1 and size * reads > _MOST and _is_tensor(node, read):
            stored.add(node)
        else:
            sizes[node] = size
    return _stored(function, order, stored) if stored else module


def _is_inlined(node: Any) -> bool:
    if not is_call(node):
        return isinstance(node, relay.Tuple | relay.TupleGetItem)
    kind = node.op.get_attr("TOpPattern")
    return kind is not None and int(kind) <= _INJECTIVE


def _copies(node: Any) -> int:
    if not is_call(node):
        return 1
    if is_call(node, "reshape", "nn.batch_flatten"):
        # The index of each axis of the source is computed from those of all axes of the result.
        source, result = (
            [size for size in shape(each.checked_type) if size != 1]
            for each in (node.args[0], node)
        )
        return 1 if source == result else max(1, len(source))
    if is_call(node, "nn.mirror_pad") or (
        is_call(node, "nn.pad") and str(node.attrs.pad_mode) != "constant"
    ):
        return _EDGE_COPIES
    return _COPIES.get(node.op.name, 1)


def _is_tensor(node: Any, readers: list[Any]) -> bool:
    """Whether it is an operator's only output."""
    parts = any(isinstance(each, relay.TupleGetItem) for each in readers)
    return is_call(node) and not parts


def _stored(function: Any, order: list[Any], stored: set[Any]) -> Any:
    made: dict[Any, Any] = {}
    for node in order:
        arguments = [made[each] for each in operands(node)]
        match node:
            case relay.Call():
                kept = node.op, arguments, node.attrs, node.type_args, node.span
                new = relay.Call(*kept)
            case relay.Tuple():
                new = relay.Tuple(arguments, node.span)
            case relay.TupleGetItem():
                new = relay.TupleGetItem(*arguments, node.index)
            case _:
                new = node
        made[node] = keep(new) if node in stored else new
    whole = relay.Function(function.params, made[function.body])
    return relay.transform.InferType()(tvm.IRModule.from_expr(whole))
