"""Heads that stay in float32, because one scale for all of their values would lose the small ones.

Boxes of 0 to 640 pixels and scores of 0 to 1 in one tensor have steps of 2.5 in int8: every score becomes 0. Such a
tensor is computed in float32, from the last convolutions before it to the network's outputs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import onnx
from numpy.typing import NDArray

from netship.bundle.decode import places
from netship.bundle.task import Task
from netship.compile.frontend.model import Model
from netship.compile.frontend.names import node_label
from netship.compile.frontend.reference import with_outputs
from netship.targets.escapes import shown
from netship.targets.onnx_runtime import Session

Array = NDArray[Any]

# Ranges that differ by more have less than 32 of 255 steps for the smaller values.
_FACTOR = 8.0
# Images whose tensors are looked at.
_IMAGES = 16
# Columns that are boxes in pixels: at least four, each larger than a share or a score's logit can be by chance.
_BOX_COLUMNS, _PIXELS = 4, 8.0
_SUMS = frozenset(["Conv", "ConvTranspose", "Gemm", "MatMul"])
_MOVES = frozenset(
    ["Concat", "Flatten", "Identity", "Reshape", "Squeeze", "Transpose", "Unsqueeze"]
)
# Operators that may give the columns of a tensor different units.
_BY_COLUMN = frozenset(
    ["Add", "Div", "Mul", "ScatterElements", "ScatterND", "Sub", "Where"]
)


class Head(NamedTuple):
    """Neighbouring nodes of a network that stay in float32.

    Attributes:
        nodes: their names.
        reason: which tensor it is for, and its ranges, for a person.
    """

    nodes: tuple[str, ...]
    reason: str


class _Tail:
    """The nodes behind the last convolutions, whose results no convolution reads."""

    def __init__(self, graph: onnx.GraphProto) -> None:
        self._graph = graph
        self.makers = {name: node for node in graph.node for name in node.output}
        self.nodes: list[onnx.NodeProto] = []
        read: set[str] = set()
        for node in reversed(graph.node):
            if self._is_sum(node) or not read.isdisjoint(node.output):
                read.update(node.input)
            else:
                self.nodes.append(node)
        self.nodes.reverse()
        self.names = {node.name for node in self.nodes}

    def _is_sum(self, node: onnx.NodeProto) -> bool:
        """Whether it is a convolution or the like, and not one that takes the mean of a distribution's bins."""
        if node.op_type not in _SUMS:
            return False
        source = self.origin(node.input[0])
        return source is None or source.op_type != "Softmax"

    def origin(self, name: str) -> onnx.NodeProto | None:
        """What makes a tensor's values, before they were moved."""
        node = self.makers.get(name)
        while node is not None and node.op_type in _MOVES:
            node = self.makers.get(node.input[0])
        return node

    def around(self, mixed: onnx.NodeProto, sums: bool) -> list[str]:
        """The node, all before it up to the convolutions, and all behind these to the outputs.

        Args:
            sums: with the convolutions whose values are only moved before ``mixed``: their own scale is the fault.
        """
        before, wanted = {mixed.name}, set(mixed.input)
        for node in reversed(self.nodes):
            if not wanted.isdisjoint(node.output):
                before.add(node.name)
                wanted.update(node.input)
        made, found = set[str](), self._moved_from(mixed) if sums else []
        for node in self.nodes:
            if node.name in before or not made.isdisjoint(node.input):
                made.update(node.output)
                found.append(node.name)
        return list(dict.fromkeys(found))

    def _moved_from(self, mixed: onnx.NodeProto) -> list[str]:
        wanted, found = set(mixed.output), []
        for node in reversed(self._graph.node):
            if wanted.isdisjoint(node.output):
                continue
            if node.op_type in _MOVES:
                wanted.update(node.input)
            elif self._is_sum(node):
                found.append(node.name)
        return found


class _Ranges:
    """The least and the largest value of each element of tensors, over all images; what is not finite is left out."""

    def __init__(
        self,
        proto: onnx.ModelProto,
        names: Sequence[str],
        model: Model,
        samples: Sequence[Sequence[Array]],
    ) -> None:
        data = with_outputs(proto, names).SerializeToString()
        session = Session(data, model.identity.name)
        self._ends: dict[str, tuple[Array, Array]] = {}
        for sample in samples:
            found = session.run(names, model.feeds(sample))
            for name, values in zip(names, found, strict=True):
                real = np.where(np.isfinite(values), values, 0)
                low, high = self._ends.get(name, (real, real))
                self._ends[name] = np.minimum(low, real), np.maximum(high, real)

    def of(self, name: str, axis: int | None = None) -> NDArray[np.float64]:
        """What int8 has steps for, 0 included: of each index of an axis, or else of each element."""
        low, high = self._ends[name]
        if axis is not None:
            others = tuple(each for each in range(low.ndim) if each != axis)
            low, high = low.min(axis=others), high.max(axis=others)
        sizes: NDArray[np.float64] = np.maximum(high, 0) - np.minimum(low, 0.0)
        return sizes


def find(
    folded: onnx.ModelProto,
    model: Model,
    samples: Sequence[Sequence[Array]],
    task: Task | None,
) -> list[Head]:
    """The heads of a float network that int8 would lose.

    Args:
        folded: the network, every node with a name.
        samples: the inputs of inferences.
        task: what the outputs are for, where that is known.
    """
    tail = _Tail(folded.graph)
    joined = {x for node in tail.nodes if node.op_type == "Concat" for x in node.input}
    columns = {x.name for x in model.outputs if x.dtype == "float32"}
    columns |= {n.output[0] for n in tail.nodes if n.op_type in _BY_COLUMN}
    if task and task.kind != "detect":
        columns.clear()
    asked = sorted((joined | columns) & tail.makers.keys())
    if not asked:
        return []
    ranges = _Ranges(folded, asked, model, samples[:_IMAGES])
    roles = _roles(ranges, model, task)
    heads: list[Head] = []
    kept: set[str] = set()
    for node in reversed(folded.graph.node):
        why, sums = "", False
        if node.name in kept:
            continue
        if node.op_type == "Concat" and node.name in tail.names:
            known = {
                repr(shown(x)): _largest(ranges.of(x)) for x in node.input if x in asked
            }
            why = _apart(known)
        for name in columns.intersection(node.output) if not why else ():
            why, sums = roles.get(name) or _columns(ranges, name), True
        if why:
            nodes = tail.around(node, sums)
            kept.update(nodes)
            heads.append(Head(tuple(nodes), f"{node_label(node)} joins {why}"))
    return heads


def _largest(sizes: NDArray[np.float64]) -> float:
    return float(sizes.max(initial=0))


def _apart(parts: Mapping[str, float]) -> str:
    """The smallest and the largest range, where they differ too much."""
    known = {name: size for name, size in parts.items() if size > 0}
    if not known:
        return ""
    small, large = (each(known, key=known.__getitem__) for each in (min, max))
    if known[large] <= _FACTOR * known[small]:
        return ""
    return (
        f"{large} of range {known[large]:.3g} and {small} of range {known[small]:.3g}"
    )


def _columns(ranges: _Ranges, name: str) -> str:
    """Whether some columns of a tensor are boxes in pixels, and the others much smaller."""
    shape = ranges.of(name).shape
    # A tensor of rank 4 is a map of channels, or a grid that `_roles` knows.
    if len(shape) not in (3, 5):
        return ""
    axis = 4 if len(shape) == 5 else 1 + int(np.argmin(shape[1:]))
    sizes = np.sort(ranges.of(name, axis))
    sizes = sizes[sizes > 0]
    for gap in np.flatnonzero(sizes[1:] > _FACTOR * sizes[:-1]) + 1:
        if len(sizes) - gap >= _BOX_COLUMNS and sizes[gap] > _PIXELS:
            large, small = sizes[-1], sizes[gap - 1]
            return f"columns of range {large:.3g} and of range {small:.3g}"
    return ""


def _roles(ranges: _Ranges, model: Model, task: Task | None) -> dict[str, str]:
    """The outputs that hold parts of a detector's answer whose ranges differ too much, and which these are."""
    sizes: dict[str, dict[str, float]] = {}
    parts = task.detector.parts() if task and task.detector else ()
    for role, level, values, count in parts:
        name = model.outputs[values.output].name
        taken = ranges.of(name).ravel()[places(values, level, count)]
        known = sizes.setdefault(name, {})
        known[role] = max(known.get(role, 0.0), _largest(taken))
    return {name: why for name, known in sizes.items() if (why := _apart(known))}
