"""Operators that move values, or choose one of several, on stored values in the place of real ones.

Quantising and dequantising are functions of each value that never fall. So they give the same bits before such an
operator and behind it, and what lies between a DequantizeLinear and a QuantizeLinear of one scale is the operator on the
stored values. Where the scales differ, a table remains (passes/tables.py).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from netship.compile.ir.graph import Graph, Operator, Quantisation, Tensor, constant
from netship.compile.ir.operators import Dequantise, Quantise, Scaled, View
from netship.compile.ir.pointwise import is_pointwise

# The first input's values are moved; of `_EVERY` those of every input.
_FIRST = frozenset(
    ["DepthToSpace", "Expand", "Gather", "GatherElements", "GatherND"]
    + ["GlobalMaxPool", "MaxPool", "Pad", "ReduceMax", "ReduceMin", "Slice"]
    + ["SpaceToDepth", "Split", "Tile", "Transpose"]
)
_EVERY = frozenset(["Concat", "Max", "Min"])

Naming = Callable[[str], str]


def moved(operator: Operator) -> tuple[Tensor, ...]:
    """The inputs whose values the operator moves or chooses from; none where it does something else."""
    tensors: tuple[Tensor | None, ...] = ()
    if operator.kind in _FIRST or isinstance(operator, View):
        tensors = operator.inputs[:1]
        # Before opset 11 what it pads with is an attribute.
        if operator.kind == "Pad" and len(operator.inputs) < 3:
            return ()
    elif operator.kind in _EVERY:
        # Of one value it is a function, which becomes a table.
        if len(operator.activations) == 1 and is_pointwise(operator):
            return ()
        tensors = operator.inputs
    elif operator.kind == "Where":
        tensors = operator.inputs[1:]
    found = tuple(filter(None, tensors))
    return found if any(each.value is None for each in found) else ()


def behind_moves(
    graph: Graph, tensor: Tensor
) -> tuple[dict[str, Tensor], list[Operator | None]]:
    """A tensor and what has its values moved, by name; and what reads them, None standing for an output of the network."""
    readers: list[Operator | None] = []
    tensors, left = {tensor.name: tensor}, [tensor]
    outputs = {each.name for each in graph.outputs}
    while left:
        each = left.pop()
        if each.name in outputs:
            readers.append(None)
        for reader in graph.readers.get(each.name, ()):
            if not moved(reader):
                readers.append(reader)
                continue
            new = [x for x in reader.outputs if x.name not in tensors]
            tensors |= {x.name: x for x in new}
            left += new
    return tensors, readers


def dequantise_later(graph: Graph) -> Graph:
    """Dequantising behind what moves values."""
    fresh = graph.fresh_names()
    makers: dict[str, Operator] = {}
    made: list[Operator] = []
    for operator in graph.operators:
        new = _on_stored(graph, operator, makers, fresh) or [operator]
        made += new
        makers |= {each.output.name: each for each in new}
    return graph.with_operators(made)


def _on_stored(
    graph: Graph, operator: Operator, makers: dict[str, Operator], fresh: Naming
) -> list[Operator] | None:
    """The operator on what its inputs were dequantised from, and dequantising behind it."""
    sources, reader = moved(operator), graph.only_reader(operator.output)
    grows = len(sources) == 1 and operator.output.size > operator.input.size
    if grows and isinstance(reader, Quantise):
        # Quantising takes place before it, where a table has fewer values to look up.
        return None
    found = [makers.get(each.name) for each in sources if each.value is None]
    before = [each for each in found if isinstance(each, Dequantise)]
    known = {facts(each) for each in before}
    if not before or len(before) != len(found) or len(known) != 1 or None in known:
        return None
    stored = {each.output.name: each.input for each in before}
    for tensor in _constants(operator, sources):
        value = _stored(tensor, before[0], fresh)
        # A maximum is not what lies below all values that there are.
        ignored = reader is not None and reader.kind == "MaxPool"
        ignored &= bool(np.all(value.value == value.limits[0]))
        if not ignored and np.any(_real(value) != _real(tensor)):
            return None
        stored[tensor.name] = value
    dtype = before[0].input.dtype
    outputs = [
        replace(each, name=fresh(f"{each.name}/stored"), dtype=dtype)
        for each in operator.outputs
    ]
    integer = replace(operator.with_tensors(stored), outputs=tuple(outputs))
    rest = before[0].inputs[1:]
    return [
        integer,
        *(
            replace(before[0], inputs=(between, *rest), outputs=(output,))
            for between, output in zip(outputs, operator.outputs, strict=True)
        ),
    ]


def quantise_earlier(graph: Graph) -> Graph:
    """Quantising before what moves values."""
    fresh = graph.fresh_names()

    def earlier(operator: Quantise) -> list[Operator]:
        mover = graph.makers.get(operator.input.name)
        if mover is None or not _is_swapped(graph, mover, operator):
            return [operator]
        sources, before = moved(mover), []
        stored: dict[str, Tensor] = {}
        for tensor in dict.fromkeys(each for each in sources if each.value is None):
            name = fresh(f"{tensor.name}/stored")
            stored[tensor.name] = replace(
                operator.output, name=name, shape=tensor.shape
            )
            inputs, outputs = (tensor, *operator.inputs[1:]), (stored[tensor.name],)
            before += earlier(replace(operator, inputs=inputs, outputs=outputs))
        for tensor in _constants(mover, sources):
            stored[tensor.name] = _stored(tensor, operator, fresh)
        integer = replace(mover.with_tensors(stored), outputs=operator.outputs)
        return [*before, integer]

    return graph.rewritten(lambda x: earlier(x) if isinstance(x, Quantise) else None)


def _is_swapped(graph: Graph, mover: Operator, operator: Quantise) -> bool:
    sources = moved(mover)
    if not sources or len(mover.outputs) > 1 or facts(operator) is None:
        return False
    # What else reads it keeps the float operator: two of them are fewer only where no sum is computed for it.
    return graph.only_reader(mover.output) is not None or all(
        each.value is not None or isinstance(graph.makers.get(each.name), Dequantise)
        for each in sources
    )


def facts(operator: Scaled) -> tuple[Quantisation, str] | None:
    """How an activation is stored, and its type; None where that is not one scale that is known."""
    scale, zero = operator.constant(1), operator.constant(2)
    if scale is None or scale.size != 1 or (zero is None and len(operator.inputs) > 2):
        return None
    if not scale.item() > 0:
        return None
    middle = 0 if zero is None else int(zero.item())
    return Quantisation((float(scale.item()),), (middle,)), operator.stored.dtype


def _constants(operator: Operator, sources: tuple[Tensor, ...]) -> list[Tensor]:
    """Real numbers among what the operator moves: constants, and what it pads with."""
    found = [each for each in sources if each.value is not None]
    if operator.kind == "Pad":
        found += filter(None, operator.inputs[2:3])
    return found


def _stored(tensor: Tensor, like: Scaled, fresh: Naming) -> Tensor:
    """A constant as ``like`` stores it."""
    known = facts(like)
    assert known is not None
    quantisation, dtype = known
    (zero,), limits = quantisation.zero, np.iinfo(dtype)
    steps = np.rint(_real(tensor) / np.float32(quantisation.scale[0]))
    value = np.clip(steps, limits.min - zero, limits.max - zero) + zero
    return constant(fresh(f"{tensor.name}/stored"), value.astype(dtype), quantisation)


def _real(tensor: Tensor) -> NDArray[np.float32]:
    return tensor.real.astype(np.float32)
