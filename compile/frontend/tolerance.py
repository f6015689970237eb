"""How far from the reference an answer may be: as far as rounding moves the reference itself, element by element.

A sum that is rounded differently is the exact sum of weights and inputs that differ in their last bits (backward
error analysis: Higham, Accuracy and Stability of Numerical Algorithms, 2nd ed., section 3.1). So the reference is run
with weights and inputs that are disturbed by a little more than that, and what an output element moves by is its
tolerance. Nothing is compared with the range of a whole tensor: boxes do not hide the scores beside them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, numpy_helper

from netship.compile.frontend.fold import infer, values
from netship.compile.frontend.normalisations import written_out

Array = NDArray[np.float32]

# Relative; float32 rounds to 2^-24.
_DISTURBANCE = 2.0**-21
# Of a weight's disturbance, in that.
_SIZES = 0.25, 1.75
# Of 400 answers of 106 right bundles (x86) the farthest from the reference was at 9.5 times what the disturbance moved
# it by; of those with a wrong operator the nearest was at 30,000 times.
_FACTOR = 64
# Units in the last place that any value may differ by.
_UNITS = 2
# Of the largest value of a slice, and of 1.
_FLOOR = 2.0**-23
# A slice of fewer elements says too little of one of them.
_LEAST = 16
# What a real number among an operator's inputs scales or adds; a size or a place must stay as it is.
_SUMS = frozenset(
    [
        "Add",
        "BatchNormalization",
        "Conv",
        "ConvTranspose",
        "Div",
        "Gemm",
    ]
    + ["InstanceNormalization", "LayerNormalization", "MatMul", "Mul", "PRelu", "Sub"]
)


# Functions that kernels compute by way of 1, or cut off: near 0 they are off by what 1 is rounded by, whatever their
# size. ONNX Runtime's Sigmoid is 0 below -18. Added to the answer; near 1 it vanishes, but for Erf, which meets a 1 next.
_ABSOLUTE = {
    **dict.fromkeys(("Celu", "Elu", "Mish", "Selu"), 2.0**-28),
    **dict.fromkeys(("Sigmoid", "Softplus", "Tanh"), 2.0**-28),
    **dict.fromkeys(("Log", "ReduceLogSum", "ReduceLogSumExp"), 2.0**-28),
    "Erf": 2.0**-24,
    "Gelu": 2.0**-26,
}
# Where operands cancel, what is left is off by what their rounding is: a fused multiply-add reads the product unrounded,
# though another operator reads it rounded, and another order of a sum rounds it otherwise. Of the first operand, or of the
# sum of the operands' magnitudes, added to the answer; LogSoftmax subtracts the largest.
_CANCELLED = 2.0**-28
_SUM_ONE_INPUT = ("AveragePool", "GlobalAveragePool", "ReduceMean", "ReduceSum")


def disturbed(proto: onnx.ModelProto, random: np.random.Generator) -> onnx.ModelProto:
    """The model with its weights moved up or down by about `_DISTURBANCE`, at random, and functions by `_ABSOLUTE`."""
    readers: dict[str, set[str]] = {}
    for node in proto.graph.node:
        for name in node.input:
            readers.setdefault(name, set()).add(node.op_type)
    proto = written_out(proto, _CANCELLED)
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    for tensor in copy.graph.initializer:
        kinds = readers.get(tensor.name, set())
        if tensor.data_type == TensorProto.FLOAT and kinds and kinds <= _SUMS:
            weights = numpy_helper.to_array(tensor)
            # Of one size, half of the moves of w and -w would cancel as these do.
            sizes = random.uniform(*_SIZES, weights.shape).astype(np.float32)
            moves = np.abs(weights) * _signs(weights.shape, random) * sizes
            moved = weights + np.where(np.isfinite(weights), moves, 0)
            tensor.CopyFrom(
                numpy_helper.from_array(moved.astype(np.float32), tensor.name)
            )
    nodes = list(copy.graph.node)
    cancelling = _cancelling(proto)
    del copy.graph.node[:]
    for index, node in enumerate(nodes):
        copy.graph.node.append(node)
        operand = node.input[0] if node.input else ""
        if node.op_type not in _ABSOLUTE and node.output[0] not in cancelling:
            continue
        answer, exact = node.output[0], f"answer {index} before its disturbance"
        move = np.float32(_ABSOLUTE.get(node.op_type, _CANCELLED))
        size = numpy_helper.from_array(np.array(move), f"disturbance {index}")
        copy.graph.initializer.append(size)
        copy.graph.node[-1].output[0] = exact
        moves = size.name
        if answer in cancelling:
            moves = f"{size.name} of the operand"
            if node.op_type in _SUM_ONE_INPUT:
                magnitudes, sums = f"{moves}: magnitudes", f"{moves}: their sums"
                make = onnx.helper.make_node
                copy.graph.node.append(make("Abs", [operand], [magnitudes]))
                copy.graph.node.append(node)
                copy.graph.node[-1].input[0] = magnitudes
                copy.graph.node[-1].output[0] = sums
                copy.graph.node[-1].name = sums
                operand = sums
            inputs = [operand, size.name]
            copy.graph.node.append(onnx.helper.make_node("Mul", inputs, [moves]))
        moved_answer = onnx.helper.make_node("Add", [exact, moves], [answer])
        copy.graph.node.append(moved_answer)
    return copy


def _cancelling(proto: onnx.ModelProto) -> set[str]:
    """The float32 tensors that a difference makes: Sub, LogSoftmax, or the sum of values that the network computes."""
    constant = {each.name for each in proto.graph.initializer}
    found = {
        node.output[0]
        for node in proto.graph.node
        if node.op_type in ("LogSoftmax", "Sub", *_SUM_ONE_INPUT)
        or (node.op_type == "Add" and constant.isdisjoint(node.input))
    }
    types = values(infer(proto).graph) if found else {}
    return {
        name
        for name in found
        if name in types and types[name].dtype == TensorProto.FLOAT
    }


def rounded(
    kind: str,
    operands: Sequence[NDArray[Any]],
    answer: NDArray[Any],
    random: np.random.Generator,
) -> NDArray[Any]:
    """The answer of an operator, moved up or down as its rounding may, where that does not vanish in it."""
    if answer.dtype != np.float32:
        return answer
    move: Any = _ABSOLUTE.get(kind)
    if kind in ("Add", "Sub"):
        move = _CANCELLED * operands[0]
    if move is None:
        return answer
    signs = np.sign(_signs(answer.shape, random))
    moved: Array = (answer + move * signs).astype(np.float32)
    return moved


def disturbed_input(tensor: NDArray[Any], random: np.random.Generator) -> NDArray[Any]:
    """The input moved likewise; a small value by as much as the rounding of a larger one next to it. Integers stay."""
    if tensor.dtype.kind != "f":
        return tensor
    size = np.abs(tensor) + (float(np.abs(tensor).max()) or 1.0) / 4
    moved: Array = (tensor + size * _signs(tensor.shape, random)).astype(np.float32)
    return moved


def disturbed_result(
    tensor: Array, random: np.random.Generator, direction: int
) -> Array:
    """A result moved up (1), down (−1) or at random (0), by as much as an element of a right answer may be off."""
    size = np.abs(tensor) + (float(np.abs(tensor).max(initial=0)) or 1.0) / 4
    signs = (
        np.float32(direction * _DISTURBANCE)
        if direction
        else _signs(tensor.shape, random)
    )
    moved: Array = (tensor + size * signs * _FACTOR).astype(np.float32)
    return moved


def makes_indices(kind: str, outputs: Sequence[str], name: str) -> bool:
    """Whether an operator's output ``name`` has the places of the largest or smallest values."""
    return kind in ("ArgMax", "ArgMin") or (kind == "TopK" and outputs[1] == name)


def index_axis(kind: str, attributes: Mapping[str, Any]) -> tuple[int, bool]:
    """The axis along which places are looked for, and whether they are those of the largest values."""
    if kind == "TopK":
        return attributes.get("axis", -1), bool(attributes.get("largest", 1))
    return attributes.get("axis", 0), kind == "ArgMax"


def _signs(shape: tuple[int, ...], random: np.random.Generator) -> Array:
    signs = random.integers(0, 2, shape, dtype=np.int8) * 2 - 1
    return signs.astype(np.float32) * np.float32(_DISTURBANCE)


def tolerance(
    answer: NDArray[Any], moved: Sequence[NDArray[Any]], factor: float = _FACTOR
) -> Array:
    """Of each element of an output how far from ``answer`` it may be; 0 where that is infinite or NaN.

    An integer or a truth must be the reference's own, but where the disturbance changes it: there it may be as far off.

    Args:
        answer: the reference's.
        moved: the reference's with disturbed weights and inputs.
        factor: how many times what the disturbance moves it by is accepted.
    """
    if answer.dtype.kind != "f":
        changes = [np.abs(each.astype(np.float64) - answer) for each in moved]
        farthest: Array = np.max(changes, axis=0).astype(np.float32)
        return farthest
    # numpy makes numbers, to which nothing can be assigned, of arrays without axes.
    size = np.abs(np.atleast_1d(answer).astype(np.float64))
    finite = np.isfinite(size)
    size[~finite] = 0
    noise = np.zeros_like(size)
    with np.errstate(invalid="ignore"):
        for other in moved:
            change = np.abs(other.astype(np.float64) - answer)
            noise = np.fmax(noise, np.where(np.isfinite(change), change, 0))
    with np.errstate(over="ignore"):
        units = np.spacing(size.astype(np.float32)).astype(np.float64)
    allowed = factor * (noise + of_slices(noise, np.median) + _UNITS * units)
    allowed += _FLOOR * np.minimum(1, of_slices(size, np.max))
    allowed[~finite] = 0
    allowed = np.minimum(allowed, np.finfo(np.float32).max)
    return allowed.astype(np.float32).reshape(answer.shape)


def index_tolerance(
    answer: NDArray[Any], low: Array, high: Array, axis: int, largest: bool = True
) -> Array:
    """Of each index that an ArgMax or TopK gives how far away the farthest is that rounding may put in its place.

    It is 0 where rounding cannot change the index; so it is for equal values that rounding does not move.

    Args:
        answer: the indices, in the shape of ``low`` but for as many as are asked for along ``axis``, or of another shape
            with as many elements; the result has its shape.
        low, high: the least and the largest value that rounding may make of each that is compared.
        largest: False where the smallest are asked for.
    """
    if not largest:
        low, high = -high, -low
    low, high = (np.moveaxis(each, axis, -1) for each in (low, high))
    shape = list(low.shape)
    count = answer.size * shape[-1] // max(low.size, 1)
    kept = [*shape[:-1], count]
    kept.insert(axis % len(kept), kept.pop())
    indices = np.moveaxis(answer.reshape(kept), axis, -1).astype(np.int64)
    found = np.zeros(indices.shape, np.float32)
    lowest, highest = (np.flip(np.sort(x, axis=-1), -1) for x in (low, high))
    moves = high > low
    for place in range(count):
        here = indices[..., place : place + 1]
        fits = (high >= lowest[..., place : place + 1]) & (
            low <= highest[..., place : place + 1]
        )
        fits &= moves | np.take_along_axis(moves, here, -1)
        away = np.abs(np.arange(shape[-1]) - here)
        found[..., place] = np.where(fits, away, 0).max(axis=-1)
    return np.moveaxis(found, -1, axis).reshape(answer.shape)


def of_slices(values: NDArray[np.float64], statistic: Any) -> NDArray[np.float64]:
    """For each element the smallest statistic of the slices that it is in, which may be channels, rows or boxes."""
    smallest = np.full(values.shape, float(statistic(values)))
    for axis, length in enumerate(values.shape):
        if length > 1 and values.size // length >= _LEAST:
            others = tuple(each for each in range(values.ndim) if each != axis)
            of_each = statistic(values, axis=others, keepdims=True)
            smallest = np.minimum(smallest, of_each)
    return smallest
