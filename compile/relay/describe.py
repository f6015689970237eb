"""What a compiled module consists of: fused groups, their layers and multiply-adds, the workspace of their kernels."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from math import prod
from typing import Any

from netship.bundle.executor_graph import parse
from netship.bundle.manifest import Group
from netship.compile.program.planner import aligned
from netship.compile.relay.expressions import calls, shape
from netship.compile.relay.ops import registration
from netship.targets import engine

tvm = engine.compiler()

# TVM's kernels take their workspace in multiples of a cache line.
_WORKSPACE_ALIGNMENT = 64
_PREFIX = re.compile(r"^tvmgen_\w+?_(?=fused)")
_CONVOLUTIONS = {
    *("nn.conv2d", "nn.conv2d_transpose", "nn.contrib_conv2d_NCHWc"),
    "nn.contrib_depthwise_conv2d_NCHWc",
    "nn.contrib_conv2d_winograd_without_weight_transform",
}
_DENSE = {"nn.dense", "nn.contrib_dense_pack"}


def operators(module: Any) -> dict[str, int]:
    """How many there are of each kind of operator with multiply-adds."""
    return dict(Counter(call.op.name for call in calls(module["main"]) if macs(call)))


def has_int8(module: Any) -> bool:
    """Whether one of TVM's own operators multiplies int8."""
    return any(
        call.op.name in _CONVOLUTIONS | _DENSE
        and call.args[1].checked_type.dtype == "int8"
        for call in calls(module["main"])
    )


def has_float16(module: Any) -> bool:
    """Whether anything is computed in float16."""
    return any(
        getattr(call.checked_type, "dtype", "") == "float16"
        for call in calls(module["main"])
    )


def groups(factory: Any, module: Any, tasks: Mapping[str, str]) -> tuple[Group, ...]:
    """The fused groups of operators, in the order they run.

    Lowering keeps the order of operators but not their names, so the names are given back in
    order, and only if every output's size agrees.

    Args:
        module: as it was imported.
        tasks: of a kernel that a tuning record serves, by its name: the workload key.
    """
    found = [
        _group(name, factory.function_metadata, tasks.get(name, ""))
        for name in parse(factory.get_graph_json()).kernels
    ]
    layers = _layers(module)
    described = []
    for group, count in found:
        own = list(itertools.islice(layers, count))
        if own and own[-1][1] != prod(group.output_shape):
            return tuple(group for group, _ in found)
        layer = " + ".join(name for name, _ in own if name)
        described.append(group.model_copy(update={"layer": layer}))
    return tuple(described)


def _layers(module: Any) -> Iterator[tuple[str, int]]:
    """Of each operator with multiply-adds: its node's name in the ONNX graph, its output elements."""
    for call in calls(module["main"]):
        if macs(call):
            name = str(call.span.source_name.name) if call.span else ""
            yield name, prod(shape(call.checked_type))


def _group(name: str, metadata: Any, task: str) -> tuple[Group, int]:
    """A kernel's group, and how many of the network's layers with multiply-adds are in it."""
    (function,) = metadata[name].relay_primfuncs.values()
    inside = calls(function)
    symbols = (registration.described(call).symbol(call) for call in inside)
    group = Group(
        name=_PREFIX.sub("", name),
        operators=tuple(call.op.name for call in inside),
        output_shape=shape(function.ret_type),
        macs=sum(macs(call) for call in inside),
        task=task,
        symbol=next(filter(None, symbols), ""),
    )
    layers = (registration.described(call).layers for call in inside if macs(call))
    return group, sum(layers)


def workspaces(factory: Any) -> tuple[int, int]:
    """Bytes that a kernel allocates: (outside its parallel loops, in one task of them), the largest."""
    functions = [
        function
        for information in factory.function_metadata.values()
        for function in information.tir_primfuncs.values()
    ]
    found = [_workspace(function.body) for function in functions]
    return max(outer for outer, _ in found), max(inner for _, inner in found)


def _workspace(body: Any) -> tuple[int, int]:
    depth = 0
    totals = [0, 0]

    def enter(statement: Any) -> None:
        nonlocal depth
        if isinstance(statement, tvm.tir.For):
            depth += statement.kind == tvm.tir.ForKind.PARALLEL
        else:
            kind = tvm.DataType(statement.dtype)
            bits = prod(map(int, statement.extents)) * kind.bits * kind.lanes
            totals[depth > 0] += aligned(bits // 8, _WORKSPACE_ALIGNMENT)

    def leave(statement: Any) -> None:
        nonlocal depth
        if isinstance(statement, tvm.tir.For):
            depth -= statement.kind == tvm.tir.ForKind.PARALLEL

    tvm.tir.stmt_functor.ir_transform(body, enter, leave, ["tir.For", "tir.Allocate"])
    return totals[0], totals[1]


def macs(call: Any) -> int:
    """Multiply-adds of one operator: output elements × the inputs each one sums over."""
    name = call.op.name
    if name not in _CONVOLUTIONS | _DENSE:
        return registration.described(call).macs(call)
    data = shape(call.args[0].checked_type)
    output = prod(shape(call.checked_type))
    if name in _DENSE:
        return output * data[-1]
    attrs = call.attrs
    layout = [letter for letter in attrs.data_layout if letter.isalpha()]
    channels = prod(
        size for letter, size in zip(layout, data, strict=True) if letter in "Cc"
    )
    per_group = channels // int(attrs.groups)
    kernel = prod(int(size) for size in attrs.kernel_size)
    if name == "nn.conv2d_transpose":
        return prod(data) * kernel * int(attrs.channels) // int(attrs.groups)
    return output * per_group * kernel
