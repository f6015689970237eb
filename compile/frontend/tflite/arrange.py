"""Operators that rearrange, cut, join or reduce axes."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from onnx import TensorProto

from netship.compile.frontend.names import Unfit
from netship.compile.frontend.tflite.elements import activated, axis_of, common_order
from netship.compile.frontend.tflite.graph import TO_NCHW, TO_NHWC, Builder, Order
from netship.compile.frontend.tflite.reader import Operator

_REDUCTIONS = {
    "MEAN": "ReduceMean",
    "SUM": "ReduceSum",
    "REDUCE_MAX": "ReduceMax",
    "REDUCE_MIN": "ReduceMin",
    "REDUCE_PROD": "ReduceProd",
}


def _numbers(graph: Builder, index: int) -> list[int]:
    """A constant of whole numbers."""
    value = graph.value(index)
    if value.dtype.kind != "i":
        raise Unfit(
            f"{graph.tensors[index].label}: need whole numbers; convert it again"
        )
    return [int(each) for each in value.ravel()]


def view(graph: Builder, operator: Operator) -> None:
    """RESHAPE, SQUEEZE and EXPAND_DIMS: the same values in the output's shape."""
    source, output = operator.inputs[0], operator.outputs[0]
    shape = graph.shape(output)
    if math.prod(shape) != math.prod(graph.shape(source)):
        raise Unfit(
            f"{operator.label}: makes {list(shape)} of {list(graph.shape(source))}; convert with fixed sizes"
        )
    made = graph.in_memory(source)
    graph.define(output, graph.node("Reshape", made, graph.integers(*shape)))


def transpose(graph: Builder, operator: Operator) -> None:
    """An image stays as it is where only the order of its axes in the file changes."""
    source, output = operator.inputs[0], operator.outputs[0]
    perm = _numbers(graph, operator.inputs[1])
    made, order = graph.either(source)
    if order == "file" and tuple(perm) == TO_NHWC:
        graph.define(output, made, "NCHW")
        return
    if order == "NCHW":
        perm = [TO_NHWC[axis] for axis in perm]
    if perm != sorted(perm):
        made = graph.node("Transpose", made, perm=perm)
    graph.define(output, made)


def concatenation(graph: Builder, operator: Operator) -> None:
    order, output = common_order(graph, operator), operator.outputs[0]
    axis = axis_of(graph, output, operator.option("Axis"), order)
    inputs = [graph.broadcast(index, order) for index in operator.inputs]
    made = graph.node("Concat", *inputs, axis=axis)
    graph.define(output, activated(graph, operator, made), order)


def pack(graph: Builder, operator: Operator) -> None:
    output, parts = operator.outputs[0], []
    axis = axis_of(graph, output, operator.option("Axis"), "file")
    sizes = [*graph.shape(output)]
    sizes[axis] = 1
    for index in operator.inputs:
        shape = graph.integers(*sizes)
        parts.append(graph.moved(index, "Reshape", graph.plain(index), shape))
    graph.define(output, graph.node("Concat", *parts, axis=axis))


def unpack(graph: Builder, operator: Operator) -> None:
    source, outputs = operator.inputs[0], operator.outputs
    axis = axis_of(graph, source, operator.option("Axis"), "file")
    ones = graph.integers(*[1] * len(outputs))
    parts = graph.split(
        "Split", graph.plain(source), ones, outputs=[""] * len(outputs), axis=axis
    )
    for index, part in zip(outputs, parts, strict=True):
        shape = graph.integers(*graph.shape(index))
        part = graph.requantised(index, part)
        graph.define(index, graph.node("Reshape", part, shape))


def split(graph: Builder, operator: Operator) -> None:
    """SPLIT into equal parts and SPLIT_V into parts of given sizes: those of the outputs."""
    given = [*operator.inputs[:2]]
    if operator.kind == "SPLIT":
        axis_index, source = given
    else:
        source, axis_index = given[0], operator.inputs[2]
    (number,) = _numbers(graph, axis_index)
    made, order = graph.either(source)
    outputs = operator.outputs
    sizes = [graph.shape(each)[number] for each in outputs]
    parts = graph.split(
        "Split",
        *(made, graph.integers(*sizes)),
        outputs=[""] * len(outputs),
        axis=axis_of(graph, source, number, order),
    )
    for index, part in zip(outputs, parts, strict=True):
        graph.define(index, part, order)


def _sliced(graph: Builder, source: int, slices: Sequence[slice]) -> tuple[str, Order]:
    """The elements of every axis that the slices name, with all axes."""
    made, order = graph.either(source)
    axes = [axis_of(graph, source, axis, order) for axis in range(len(slices))]
    fields = zip(*((each.start, each.stop, each.step) for each in slices), strict=True)
    starts, ends, steps = (graph.integers(*each) for each in fields)
    return graph.node("Slice", made, starts, ends, graph.integers(*axes), steps), order


def slice_(graph: Builder, operator: Operator) -> None:
    source, output = operator.inputs[0], operator.outputs[0]
    begins = _numbers(graph, operator.inputs[1])
    slices = [
        slice(begin, begin + size, 1)
        for begin, size in zip(begins, graph.shape(output), strict=True)
    ]
    graph.define(output, *_sliced(graph, source, slices))


def strided_slice(graph: Builder, operator: Operator) -> None:
    source, output = operator.inputs[0], operator.outputs[0]
    if operator.option("EllipsisMask") or operator.option("NewAxisMask"):
        raise Unfit(
            f"{operator.label}: with an ellipsis or a new axis is not read; name every axis"
        )
    begins, ends, steps = (_numbers(graph, each) for each in operator.inputs[1:4])
    slices = []
    for axis, size in enumerate(graph.shape(source)):
        if axis >= len(begins):
            slices.append(slice(0, size, 1))
            continue
        begin, end, step = begins[axis], ends[axis], steps[axis]
        bit = 1 << axis
        if operator.option("ShrinkAxisMask") & bit:
            begin += size if begin < 0 else 0
            slices.append(slice(begin, begin + 1, 1))
            continue
        if operator.option("Offset", False):
            end += begin
        named = slice(
            None if operator.option("BeginMask") & bit else begin,
            None if operator.option("EndMask") & bit else end,
            step,
        )
        start, stop, step = named.indices(size)
        # ONNX counts an end of −1 from behind.
        slices.append(slice(start, stop if stop >= 0 else -size - 1, step))
    made, order = _sliced(graph, source, slices)
    if len(graph.shape(output)) == len(graph.shape(source)):
        graph.define(output, made, order)
        return
    made = graph.requantised(source, made)
    if order == "NCHW":
        made = graph.moved(source, "Transpose", made, perm=TO_NHWC)
    shape = graph.integers(*graph.shape(output))
    graph.define(output, graph.node("Reshape", made, shape))


def gather(graph: Builder, operator: Operator) -> None:
    source, indices = operator.inputs
    output = operator.outputs[0]
    if operator.option("BatchDims"):
        raise Unfit(f"{operator.label}: with batches is not read; gather from one")
    axis = axis_of(graph, source, operator.option("Axis"), "file")
    if graph.is_constant(indices):
        size, found = graph.shape(source)[axis], _numbers(graph, indices)
        if not all(0 <= each < size for each in found):
            raise Unfit(f"{operator.label}: an index outside its axis of {size}")
    made = graph.node("Gather", graph.plain(source), graph.plain(indices), axis=axis)
    graph.define(output, made)


def pad(graph: Builder, operator: Operator) -> None:
    """PAD, PADV2 and MIRROR_PAD that reflects."""
    source, output = operator.inputs[0], operator.outputs[0]
    made, order = graph.either(source)
    widths = np.asarray(graph.value(operator.inputs[1]), np.int64)
    if widths.shape != (len(graph.shape(source)), 2) or widths.min() < 0:
        raise Unfit(
            f"{operator.label}: paddings {widths.tolist()[:8]}; convert it again"
        )
    if order == "NCHW":
        widths = widths[list(TO_NCHW)]
    inputs = [made, graph.integers(*widths.T.ravel().tolist())]
    mode = "constant"
    if operator.kind == "MIRROR_PAD":
        if operator.option("Mode"):
            raise Unfit(
                f"{operator.label}: mirrors the edge too (SYMMETRIC), which ONNX does not; use REFLECT"
            )
        mode = "reflect"
    elif operator.kind == "PADV2":
        index = operator.inputs[2]
        graph.value(index)
        inputs.append(graph.constant(graph.tensors[index].real.reshape(())))
    graph.define(output, graph.node("Pad", *inputs, mode=mode), order)


def _keeps_order(axes: Sequence[int]) -> bool:
    """Whether the axes of an image that are left without ``axes`` of the file lie in the graph as in the file."""
    left = [axis for axis in TO_NCHW if axis not in axes]
    return left == sorted(left)


def reduction(graph: Builder, operator: Operator) -> None:
    source, output = operator.inputs[0], operator.outputs[0]
    rank = len(graph.shape(source))
    axes = sorted({axis % rank for axis in _numbers(graph, operator.inputs[1])})
    keeps = bool(operator.option("KeepDims", False))
    made, order = graph.either(source)
    if order == "NCHW" and not keeps and not _keeps_order(axes):
        made, order = graph.plain(source), "file"
    if operator.kind == "MEAN" and order == "NCHW" and axes == [1, 2]:
        made = graph.node("GlobalAveragePool", made)
        if not keeps:
            made = graph.requantised(output, made)
            shape = graph.integers(*graph.shape(output))
            made = graph.node("Reshape", made, shape)
    else:
        named = [axis_of(graph, source, axis, order) for axis in axes]
        axes_input = graph.integers(*sorted(named))
        kind = _REDUCTIONS[operator.kind]
        made = graph.node(kind, made, axes_input, keepdims=int(keeps))
    graph.define(output, made, order if keeps else "file")


def extreme_place(graph: Builder, operator: Operator) -> None:
    """ARG_MAX and ARG_MIN, the first of equals."""
    source, output = operator.inputs[0], operator.outputs[0]
    (number,) = _numbers(graph, operator.inputs[1])
    made, order = graph.either(source)
    if order == "NCHW" and not _keeps_order([number % 4]):
        made, order = graph.plain(source), "file"
    kind = "ArgMax" if operator.kind == "ARG_MAX" else "ArgMin"
    axis = axis_of(graph, source, number, order)
    made = graph.node(kind, made, axis=axis, keepdims=0)
    if graph.tensors[output].dtype == np.int32:
        made = graph.node("Cast", made, to=TensorProto.INT32)
    graph.define(output, made)


def shape_of(graph: Builder, operator: Operator) -> None:
    """SHAPE: a constant, as every size is fixed."""
    graph.fold(operator.outputs[0], np.array(graph.shape(operator.inputs[0])))


def repetition(graph: Builder, operator: Operator) -> None:
    """TILE and BROADCAST_TO."""
    kind = "Tile" if operator.kind == "TILE" else "Expand"
    numbers = graph.integers(*_numbers(graph, operator.inputs[1]))
    made = graph.node(kind, graph.plain(operator.inputs[0]), numbers)
    graph.define(operator.outputs[0], made)


REDUCTIONS = tuple(_REDUCTIONS)
