"""QuantizeLinear and DequantizeLinear of every type and form, as those of 8 bits and one scale that the compiler knows."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper

from netship.compile.frontend.fold import opset
from netship.compile.frontend.names import Unfit, node_label
from netship.compile.frontend.quantised.writer import (
    Array,
    Writer,
    attributes_of,
    input_of,
)

_WIDE = ("int16", "uint16")
# Types of constants that are kept as integers, each with the type that holds it here.
_KEPT = {
    **dict.fromkeys(("int2", "int4", "int8"), "int8"),
    **dict.fromkeys(("uint2", "uint4", "uint8"), "uint8"),
    "int32": "int32",
}


class Scaling(Writer):
    """Writes QuantizeLinear and DequantizeLinear.

    Attributes:
        activations: whether the model's activations are quantised.
        wide: tensors of 16 bits, which are float32 in the new model.
        scales: of tensors with one scale the names of scale and zero point.
    """

    def __init__(self, proto: onnx.ModelProto, activations: bool) -> None:
        super().__init__(proto)
        self.activations = activations
        self.wide: set[str] = set()
        self.scales: dict[str, tuple[str, str]] = {}

    def quantise(self, node: onnx.NodeProto) -> None:
        attributes, dtype = attributes_of(node), self._type(node)
        source, scale, zero = (input_of(node, place) for place in range(3))
        if dtype not in (*_WIDE, "int8", "uint8"):
            raise Unfit(
                f"{node_label(node)}: quantises to {dtype}; 8 and 16 bits are taken: quantise activations to one "
                "of them"
            )
        if dtype in _WIDE:
            self._wide_steps(node, dtype, source)
            return
        if attributes.get("block_size"):
            raise Unfit(_per_block(node))
        if not zero:
            zero = self.constant(np.zeros((), dtype), node)
        axis = {k: v for k, v in attributes.items() if k == "axis"}
        if source in self.constants and scale in self.constants:
            shape, sizes = (self.constants[each].dims for each in (source, scale))
            _axis_of(node, shape, prod(sizes), axis)
        self.add_quantise(source, scale, zero, node.output[0], axis, node.name)

    def add_quantise(
        self,
        source: str,
        scale: str,
        zero: str,
        output: str,
        axis: dict[str, Any],
        name: str = "",
    ) -> None:
        if not axis:
            self.scales[output] = scale, zero
        self.add("QuantizeLinear", [source, scale, zero], output, name, **axis)

    def _wide_steps(self, node: onnx.NodeProto, dtype: str, source: str) -> None:
        """Stored values of 16 bits, which float32 has exactly."""
        scale, zero = self._wide_scale(node)
        limits = np.iinfo(dtype)
        if source in self.constants:
            steps = (
                np.rint(self.array_of(source, node).astype(np.float32) / scale) + zero
            )
            stored = np.clip(steps, limits.min, limits.max).astype(dtype)
            self.fold(node, stored)
            return
        # A divisor of one axis: by a number TVM multiplies with its inverse, which rounds to other steps.
        steps = self.step(node, "Div", source, scale.reshape(1))
        steps = self.step(node, "Round", steps)
        if zero:
            steps = self.step(node, "Add", steps, zero)
        ends = (float(limits.min), float(limits.max))
        if opset(self.proto) < 11:
            low, high = ends
            clip = {"min": low, "max": high}
            self.add("Clip", [steps], node.output[0], node.name, **clip)
        else:
            bounds = [self.constant(np.array(x, np.float32), node) for x in ends]
            self.add("Clip", [steps, *bounds], node.output[0], node.name)
        self.wide.add(node.output[0])

    def dequantise(self, node: onnx.NodeProto) -> None:
        attributes, source = attributes_of(node), node.input[0]
        if source in self.constants:
            self._constant_operand(node, self.array_of(source, node))
            return
        if attributes.get("block_size"):
            raise Unfit(_per_block(node))
        if source in self.wide or self._type(node) in _WIDE:
            scale, zero = self._wide_scale(node)
            steps = self.step(node, "Sub", source, zero) if zero else source
            factor = self.constant(scale, node)
            self.add("Mul", [steps, factor], node.output[0], node.name)
            return
        axis = {k: v for k, v in attributes.items() if k == "axis"}
        self.add_dequantise(node, node.input, node.output[0], axis, node.name)

    def add_dequantise(
        self,
        node: onnx.NodeProto,
        inputs: Sequence[str],
        output: str,
        axis: dict[str, Any],
        name: str = "",
    ) -> None:
        """Add a DequantizeLinear, of which scale and zero point of a constant have the size of its axis."""
        source, *facts = filter(None, inputs)
        like = (
            source if source in self.constants else self.scales.get(source, ("", ""))[1]
        )
        if len(facts) == 1 and like in self.constants:
            # TVM's importer needs a zero point.
            dtype = self.array_of(like, node).dtype
            facts.append(self.constant(np.zeros((), dtype), node))
        if source in self.constants:
            sizes = (self.constants[each] for each in facts if each in self.constants)
            for each in sizes:
                _axis_of(node, self.constants[source].dims, prod(each.dims), axis)
        self.add("DequantizeLinear", [source, *facts], output, name, **axis)

    def _constant_operand(self, node: onnx.NodeProto, stored: Array) -> None:
        """Of a constant: its integers in 8 or 32 bits, or its real numbers."""
        attributes = attributes_of(node)
        scale, *rest = (
            self.array(node, k) for k in range(1, len(node.input)) if node.input[k]
        )
        kept = _KEPT.get(stored.dtype.name)
        if not self.activations or attributes.get("block_size") or not kept:
            self.fold(node, _real(stored, scale, rest, attributes, node))
            return
        inputs = list(node.input)
        if stored.dtype.name != kept:
            values = [stored, *rest]
            names = [self.constant(each.astype(kept), node) for each in values]
            inputs = [names[0], inputs[1], *names[1:]]
        axis = {k: v for k, v in attributes.items() if k == "axis"}
        self.add_dequantise(node, inputs, node.output[0], axis, node.name)

    def _wide_scale(self, node: onnx.NodeProto) -> tuple[NDArray[np.float32], float]:
        """Scale and zero point of an activation of 16 bits."""
        scale = self.array(node, 1).astype(np.float32)
        zero = self.array(node, 2) if input_of(node, 2) else np.zeros(1)
        if scale.size != 1 or zero.size != 1:
            raise Unfit(
                f"{node_label(node)}: has a scale for each channel of an activation; quantise per tensor"
            )
        return scale.reshape(()), float(zero.astype(np.float64).item())

    def _type(self, node: onnx.NodeProto) -> str:
        """Of the stored values; that of ONNX's default where nothing says it."""
        zero = self.constants.get(input_of(node, 2))
        dtype = attributes_of(node).get("output_dtype", 0)
        if zero is not None:
            dtype = zero.data_type
        elif node.op_type == "DequantizeLinear":
            dtype = 0
        if not dtype:
            return "uint8"
        return helper.tensor_dtype_to_np_dtype(dtype).name


def _per_block(node: onnx.NodeProto) -> str:
    return f"{node_label(node)}: has a scale for each block of an activation; quantise per tensor"


def _real(
    stored: Array,
    scale: Array,
    zero: list[Array],
    attributes: dict[str, Any],
    node: onnx.NodeProto,
) -> NDArray[np.float32]:
    """What a constant stands for: (stored − zero) × scale in float32, as ONNX Runtime computes it."""
    block = attributes.get("block_size", 0)

    def spread(facts: Array) -> Array:
        if not block:
            axis = _axis_of(node, stored.shape, facts.size, attributes)
            sizes = [1] * stored.ndim
            if facts.size > 1:
                sizes[axis] = -1
            return facts.reshape(sizes)
        axis = _axis_of(node, stored.shape, 0, attributes)
        shape = list(stored.shape)
        shape[axis] = -(-shape[axis] // block)
        if block < 1 or list(facts.shape) != shape:
            raise _unfit(node, stored.shape)
        repeated = np.repeat(facts, min(block, stored.shape[axis]), axis)
        return np.take(repeated, range(stored.shape[axis]), axis)

    whole = (
        stored.dtype.name.endswith(tuple("0123456789")) and "int" in stored.dtype.name
    )
    steps = stored.astype(np.int64 if whole else np.float32)
    for each in zero:
        steps = steps - spread(each.astype(steps.dtype))
    real = steps.astype(np.float32) * spread(scale.astype(np.float32))
    return np.asarray(real, np.float32)


def _axis_of(
    node: onnx.NodeProto, shape: Sequence[int], size: int, attributes: dict[str, Any]
) -> int:
    """The axis that ``size`` numbers are for, from the start; 0 where one serves all.

    Raises:
        Unfit: the axis has another size, or is none of the shape's.
    """
    if size == 1:
        return 0
    axis, rank = attributes.get("axis", 1), len(shape)
    if not -rank <= axis < rank or (size and shape[axis] != size):
        raise _unfit(node, shape)
    return int(axis % rank)


def _unfit(node: onnx.NodeProto, shape: Sequence[int]) -> Unfit:
    return Unfit(
        f"{node_label(node)}: its scales do not fit the shape {list(shape)[:8]}; quantise it again"
    )
