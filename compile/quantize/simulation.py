"""A network of float16 or bfloat16 run by ONNX Runtime: its convolutions sum in float32, what is of 16 bits is rounded."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, numpy_helper

from netship.compile.frontend.model import Model
from netship.compile.frontend.reference import with_outputs
from netship.compile.ir import onnx_form
from netship.compile.ir.graph import Graph, Operator
from netship.compile.passes import bfloat16
from netship.compile.passes.half import LARGEST
from netship.targets.onnx_runtime import Session

Array = NDArray[Any]
Sample = Sequence[Array]

# Bytes of tensors that are read from one inference.
_AT_ONCE = 1 << 28
# 2^13 + 1 splits float32's 24 bits into 11 and the rest, 2^16 + 1 into 8; at 0.75 float32 has steps of 2^-24.
_ROUNDERS = {"split": 8193.0, "grid": 0.75, "halve": 65537.0}
# Operators of float16 whose results have more bits than their inputs.
_INEXACT = ("Add", "Conv", "LeakyRelu", "Mul", "PRelu", "Sub")
# An error, of the range of an output, that no operator is searched for.
_SMALL_ERROR = 0.005
# What an operator in float32 must leave of the error at most, so that it is worth its time.
_WORTH = 0.6
# How much more than the whole group's error a part of it may leave, to take its place.
_NEARLY = 1.5
_GROUPS = 8
_SMALLEST_GROUP = 4
_FEW_IMAGES = 4


def written(graph: Graph) -> onnx.ModelProto:
    """A network of float16 or bfloat16 in ONNX, in float32 with each tensor of 16 bits rounded by arithmetic.

    ONNX Runtime leaves out casts between operators that it computes in float32. Nodes have no names: a rule of
    compile.frontend.canonical gives those that it makes the name of one.
    """
    proto = onnx_form.write(graph)
    nodes = list(proto.graph.node)
    del proto.graph.node[:]
    for name, value in _ROUNDERS.items():
        proto.graph.initializer.append(
            numpy_helper.from_array(np.array(value, np.float32), name)
        )
    for tensor in proto.graph.initializer:
        if tensor.data_type == TensorProto.FLOAT16:
            exact = numpy_helper.to_array(tensor).astype(np.float32)
            tensor.CopyFrom(numpy_helper.from_array(exact, tensor.name))
    for info in proto.graph.value_info:
        if info.type.tensor_type.elem_type == TensorProto.FLOAT16:
            info.type.tensor_type.elem_type = TensorProto.FLOAT
    for node in nodes:
        node.ClearField("name")
        name = node.output[0]
        known = graph.tensors.get(name)
        half = known is not None and known.dtype == "float16"
        if node.op_type == "Cast":
            dtypes = {graph.tensors[each].dtype for each in (node.input[0], name)}
            if dtypes == {"float16", "float32"}:
                node.op_type = "Identity"
                del node.attribute[:]
        if node.op_type == bfloat16.KIND:
            node.op_type, short = "Conv", f"{name}/short"
            proto.graph.node.extend(_shortened(node.input[0], short))
            node.input[0] = short
        if half and node.op_type in (*_INEXACT, "Identity"):
            node.output[0] = f"{name}/exact"
            proto.graph.node.extend([node, *_rounding(node.output[0], name)])
        else:
            proto.graph.node.append(node)
    return proto


def _shortened(x: str, output: str) -> list[onnx.NodeProto]:
    """Nodes that round to bfloat16's 8 bits."""
    scaled, rest = f"{output}/a", f"{output}/b"
    return _nodes(
        ("Mul", [x, "halve"], scaled),
        ("Sub", [scaled, x], rest),
        ("Sub", [scaled, rest], output),
    )


def _rounding(x: str, output: str) -> list[onnx.NodeProto]:
    """Nodes that round to 11 bits (Dekker's splitting), and to multiples of 2^-24, float16's smallest number."""
    scaled, rest, short, moved = (f"{x}/{each}" for each in "abcd")
    return _nodes(
        ("Mul", [x, "split"], scaled),
        ("Sub", [scaled, x], rest),
        ("Sub", [scaled, rest], short),
        ("Add", [short, "grid"], moved),
        ("Sub", [moved, "grid"], output),
    )


def _nodes(*steps: tuple[str, list[str], str]) -> list[onnx.NodeProto]:
    """Of each: the kind of operator, its inputs, its output."""
    return [onnx.helper.make_node(kind, inputs, [made]) for kind, inputs, made in steps]


class Probe:
    """Tensors of a network by ONNX Runtime, from several inferences where they take much memory."""

    def __init__(self, graph: Graph, names: Sequence[str], model: Model) -> None:
        proto, self._feeds = written(graph), model.feeds
        self._halves = {
            name for name, each in graph.tensors.items() if each.dtype == "float16"
        }
        self._sessions: list[tuple[list[str], Session]] = []
        rest = list(names)
        while rest:
            taken, size = list[str](), 0
            while rest and (not taken or size < _AT_ONCE):
                size += graph.tensors[rest[0]].nbytes
                taken.append(rest.pop(0))
            data = with_outputs(proto, taken).SerializeToString()
            self._sessions.append((taken, Session(data, model.identity.name)))

    def run(self, sample: Sample) -> dict[str, Array]:
        """Every tensor; what float16 has no room for is infinite."""
        found = dict[str, Array]()
        for names, each in self._sessions:
            found |= zip(names, each.run(names, self._feeds(sample)), strict=True)
        for name in self._halves & found.keys():
            value = found[name]
            over = np.abs(value) > LARGEST
            found[name] = np.where(over, np.copysign(np.inf, value), value)
        return found


def costly(
    graph: Graph,
    model: Model,
    kept: Collection[str],
    samples: Sequence[Sample],
    reduce: Callable[[Graph, Collection[str]], Graph],
    is_reduced: Callable[[Operator, Collection[str]], bool],
) -> dict[str, str]:
    """The neighbours that cause most of the error at the outputs, where it is large, by the name of the first output.

    One group after the other, an eighth of the network each, is computed in float32; the one that leaves the least error is made smaller as
    long as a half of it, or all but its first or last operator, are nearly as good.

    Args:
        kept: the operators that stay in float32 in any case.
        reduce: the network with fewer bits but for these; ``is_reduced``: whether an operator then has fewer.

    Returns:
        the reason of each.
    """
    outputs = [each.name for each in graph.outputs if each.dtype == "float32"]
    few = samples[:_FEW_IMAGES]
    exact = [Probe(graph, outputs, model).run(each) for each in few]

    def error(group: Sequence[str]) -> float:
        probe = Probe(reduce(graph, {*kept, *group}), outputs, model)
        return max(
            (
                _error(probe.run(sample)[name], known[name])
                for sample, known in zip(few, exact, strict=True)
                for name in outputs
            ),
            default=0.0,
        )

    found = [x.outputs[0].name for x in graph.operators if is_reduced(x, kept)]
    before = error(())
    if before <= _SMALL_ERROR:
        return {}
    size = max(-(-len(found) // _GROUPS), _SMALLEST_GROUP)
    groups = [found[k : k + size] for k in range(0, len(found), size // 2)]
    least, best = min((error(each), each) for each in groups)
    if least > _WORTH * before:
        return {}
    while len(best) > 1:
        middle = len(best) // 2
        for parts in ((best[:middle], best[middle:]), (best[:-1], best[1:])):
            left, part = min((error(each), each) for each in parts)
            if left <= _NEARLY * least:
                best = part
                break
        else:
            break
    if len(best) == len(found):
        return {}
    why = f"error of {before:.1%} of the range without, {error(best):.1%} with it"
    return dict.fromkeys(best, why)


def _error(ours: Array, exact: Array) -> float:
    """The largest, of the range of the finite values; 0 where there is none."""
    finite = np.isfinite(exact) & np.isfinite(ours)
    if not finite.any():
        return 0.0
    values = exact[finite].astype(np.float64)
    span = float(values.max() - values.min())
    return float(np.abs(ours[finite] - values).max()) / span if span else 0.0
