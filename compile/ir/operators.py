"""What each kind of operator is: the shape of its output and the numbers that it must give, in numpy.

An operator that has no class here is ONNX's own in both: its shape by ONNX's inference, its numbers by ONNX Runtime, its
code by TVM. compile/ir/kinds.py has the whole table.

Of integers the reference is ONNX Runtime as it runs by default, bit by bit (compile/ir/requantise.py): without its graph
optimisations it adds and pools in float32, and differs from itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import prod
from typing import Self

import numpy as np
from numpy.typing import NDArray

from netship.compile.ir import requantise
from netship.compile.ir.graph import NHWC, Array, Graph, Operator, Tensor, along_axis


class Known(Operator):
    """An operator whose shape rule and numbers stand here."""

    def shape(self) -> tuple[int, ...]:
        """Of the output, from the inputs: the first one's where the class does not say otherwise."""
        return self.input.shape

    def evaluate(self, *values: Array) -> Array:
        """The output, of the stored values of the inputs that are there; float32 sums are exact within their rounding."""
        raise NotImplementedError


class Limited(Known):
    """What a ReLU or Clip behind the operator does is part of it: the attribute ``limits``, two real numbers."""

    @property
    def limits(self) -> tuple[float, float]:
        low, high = self.attributes.get("limits", (-np.inf, np.inf))
        return float(low), float(high)

    @property
    def limited(self) -> bool:
        return bool(np.isfinite(self.limits).any())

    def without_limits(self) -> Self:
        """As ONNX has it: ONNX's operators have no limits."""
        kept = {k: v for k, v in self.attributes.items() if k != "limits"}
        return replace(self, attributes=kept)

    @property
    def stored_limits(self) -> tuple[int, int]:
        """The lowest and the highest stored value of a quantised output."""
        steps = np.rint(np.array(self.limits) / self.output.scale) + self.output.zero
        low, high = np.clip(steps, *self.output.limits)
        return int(low), int(high)


class Convolution(Limited):
    """A convolution over two axes of images; weights as ONNX orders them."""

    @property
    def group(self) -> int:
        return int(self.attributes.get("group", 1))

    @property
    def depthwise(self) -> bool:
        """Each channel for itself."""
        outputs, per_group = self._weights.shape[:2]
        return bool(per_group == 1 and outputs == self.group > 1)

    @property
    def kernel(self) -> tuple[int, int]:
        height, width = self._weights.shape[2:]
        return height, width

    @property
    def strides(self) -> tuple[int, int]:
        down, across = self.attributes.get("strides") or (1, 1)
        return down, across

    @property
    def dilations(self) -> tuple[int, int]:
        down, across = self.attributes.get("dilations") or (1, 1)
        return down, across

    @property
    def pads(self) -> tuple[int, int, int, int]:
        """Rows above, columns left, rows below, columns right."""
        top, left, bottom, right = self.attributes.get("pads") or (0, 0, 0, 0)
        return top, left, bottom, right

    @property
    def _weights(self) -> Array:
        weights = self.constant(1)
        assert weights is not None
        return weights

    @property
    def weights(self) -> Array:
        """[out, kernel height, kernel width, in]; [kernel height, kernel width, channels] where ``depthwise``."""
        if self.depthwise:
            return self._weights[:, 0].transpose(1, 2, 0)
        return self._weights.transpose(0, 2, 3, 1)

    @property
    def bias(self) -> Array:
        """[out], zeros where there is none; of int8 in units of input scale × weight scale."""
        bias = self.constant(2)
        if bias is None:
            bias = np.zeros(self._weights.shape[0], self._weights.dtype)
        # A Gemm's may be one number, or a row of a matrix.
        bias = np.array(np.broadcast_to(bias.ravel(), self._weights.shape[:1]))
        return bias.astype(np.int64) if self.output.quantisation else bias

    @property
    def depth(self) -> int:
        """Products that one output sums; weights that a DequantizeLinear gives count too."""
        weights = self.inputs[1]
        assert weights is not None
        return prod(weights.shape[1:])

    @property
    def macs(self) -> int:
        return self.output.size * self.depth

    @property
    def pointwise(self) -> bool:
        return (
            self.group == 1
            and self.inputs[1] is not None
            and self.inputs[1].value is not None
            and self.kernel == self.strides == (1, 1)
            and not any(self.pads)
        )

    @property
    def requantisation(self) -> requantise.Requantisation:
        """What turns sums of int8 products into the output's stored values."""
        weights = self.inputs[1]
        assert weights is not None and weights.quantisation is not None
        flat = self._weights.reshape(self._weights.shape[0], -1).astype(np.int64)
        scales = np.array(weights.quantisation.scale, np.float32)
        ratio = np.float32(self.input.scale) * scales / np.float32(self.output.scale)
        ratio = np.broadcast_to(ratio, flat.shape[:1])
        return requantise.of_sums(self, flat, self.bias, ratio)

    def shape(self) -> tuple[int, ...]:
        image, (before, after) = self.input.shape[2:], np.reshape(self.pads, (2, 2))
        extent = (np.array(self.kernel) - 1) * self.dilations + 1
        size = (image + before + after - extent) // self.strides + 1
        return self.input.shape[0], self._weights.shape[0], *size.tolist()

    def evaluate(self, *values: Array) -> Array:
        integers = self.output.quantisation is not None
        # Sums of integers stay below 2³¹: double precision is exact, and BLAS is fast.
        x = values[0].astype(np.float64) - (self.input.zero if integers else 0)
        sums = np.stack([self._sums(each) for each in x]) + self.bias.reshape(-1, 1, 1)
        if not integers:
            return np.asarray(np.clip(sums, *self.limits))
        ratio = self.requantisation.ratio.reshape(-1, 1, 1)
        whole = sums.astype(np.int64)
        return requantise.requantise(whole, ratio, self.output, self.stored_limits)

    def _sums(self, x: NDArray[np.float64]) -> NDArray[np.float64]:
        """Of one image [channels, height, width]."""
        top, left, bottom, right = self.pads
        padded = np.pad(x, ((0, 0), (top, bottom), (left, right)))
        padded = padded.reshape(self.group, -1, *padded.shape[1:])
        _, outputs, height, width = self.shape()
        weights = self._weights.astype(np.float64)
        weights = weights.reshape(self.group, -1, *weights.shape[1:])
        sums = np.zeros((self.group, outputs // self.group, height * width))
        for ky, kx in np.ndindex(self.kernel):
            rows, columns = (
                slice(k * dilation, k * dilation + (count - 1) * stride + 1, stride)
                for k, dilation, count, stride in zip(
                    (ky, kx), self.dilations, (height, width), self.strides, strict=True
                )
            )
            seen = padded[:, :, rows, columns].reshape(*padded.shape[:2], -1)
            sums += weights[..., ky, kx] @ seen
        return sums.reshape(outputs, height, width)


class Dense(Limited):
    """A fully connected layer over one row: y = x · weightsᵀ + bias."""

    @property
    def weights(self) -> Array:
        """[out, in]."""
        weights = self.constant(1)
        assert weights is not None
        return weights if self.attributes.get("transB", 0) else weights.T

    @property
    def macs(self) -> int:
        return self.output.size * self.input.shape[-1]

    def shape(self) -> tuple[int, ...]:
        return self.input.shape[0], self.output.shape[-1]

    def evaluate(self, *values: Array) -> Array:
        x, weights, *bias = (each.astype(np.float64) for each in values)
        x = x.T if self.attributes.get("transA", 0) else x
        weights = weights.T if self.attributes.get("transB", 0) else weights
        sums = self.attributes.get("alpha", 1.0) * (x @ weights)
        for each in bias:
            sums = sums + self.attributes.get("beta", 1.0) * each
        return np.asarray(np.clip(sums, *self.limits))


class Addition(Limited):
    """A sum of two tensors."""

    @property
    def other(self) -> Tensor:
        assert self.inputs[1] is not None
        return self.inputs[1]

    @property
    def elementwise(self) -> bool:
        """Whether it is of two activations of the output's shape."""
        shapes = [each.shape for each in self.activations]
        return shapes == [self.output.shape] * 2

    @property
    def requantisation(self) -> requantise.Addition:
        offset = int(self.attributes.get("offset", 0))
        return requantise.of_addition(self.input, self.other, self.output, offset)

    def shape(self) -> tuple[int, ...]:
        return np.broadcast_shapes(self.input.shape, self.other.shape)

    def evaluate(self, *values: Array) -> Array:
        first, second = values
        if not self.output.quantisation:
            total = first + second
            return np.asarray(np.clip(total, *self.limits)) if self.limited else total
        a, b, fixed, offset = self.requantisation
        sums = requantise.multiply_add(second.astype(np.int64) + offset, b, fixed)
        sums = requantise.multiply_add(first.astype(np.int64) + offset, a, sums)
        steps = np.rint(sums).astype(np.int64) - offset
        return np.asarray(np.clip(steps, *self.stored_limits))


class Multiplication(Limited):
    """A product of two tensors."""

    @property
    def other(self) -> Tensor:
        assert self.inputs[1] is not None
        return self.inputs[1]

    @property
    def ratio(self) -> np.float32:
        """Of a product of two stored values, each less its zero point, and the output's steps."""
        product = np.float32(self.input.scale) * np.float32(self.other.scale)
        return np.float32(product / np.float32(self.output.scale))

    def shape(self) -> tuple[int, ...]:
        return np.broadcast_shapes(self.input.shape, self.other.shape)

    def evaluate(self, *values: Array) -> Array:
        first, second = values
        if not self.output.quantisation:
            product = first * second
            return np.clip(product, *self.limits) if self.limited else product
        a = first.astype(np.int64) - self.input.zero
        steps = (a * (second.astype(np.int64) - self.other.zero)).astype(np.float32)
        return requantise.with_zero(steps * self.ratio, self)


class GlobalAverage(Known):
    """The mean over height and width."""

    @property
    def pixels(self) -> int:
        return prod(self.input.shape[2:])

    @property
    def requantisation(self) -> requantise.Requantisation:
        """Of a sum over all pixels: one for all channels, the division part of the ratio."""
        ones, zero = np.ones((1, self.pixels), np.int64), np.zeros(1, np.int64)
        divisor = np.float32(self.output.scale * self.pixels)
        ratio = np.array([np.float32(self.input.scale) / divisor])
        return requantise.of_sums(self, ones, zero, ratio)

    def shape(self) -> tuple[int, ...]:
        return *self.input.shape[:2], *(1 for _ in self.input.shape[2:])

    def evaluate(self, *values: Array) -> Array:
        axes = tuple(range(2, len(self.input.shape)))
        if not self.output.quantisation:
            return np.asarray(
                values[0].mean(axis=axes, keepdims=True, dtype=np.float64)
            )
        begin, ratio, _ = self.requantisation
        sums = values[0].astype(np.int64).sum(axis=axes, keepdims=True) + begin
        return requantise.requantise(sums, ratio, self.output, self.output.limits)


class Scaled(Known):
    """An operator with scale and zero point: in ONNX two inputs, after a pass those of ``stored``."""

    @property
    def stored(self) -> Tensor:
        """The tensor of integers."""
        raise NotImplementedError

    def _facts(self, given: Sequence[Array]) -> tuple[Array, Array]:
        """Scale and zero point, which broadcast."""
        if not given:
            return np.array(self.stored.scale, np.float32), np.array(self.stored.zero)
        scale, *rest = given
        zero = rest[0] if rest else np.zeros(1, self.stored.dtype)
        axis, rank = int(self.attributes.get("axis", 1)), len(self.input.shape)
        return (
            along_axis(scale, axis, rank),
            along_axis(zero.astype(np.int64), axis, rank),
        )


class Quantise(Scaled):
    """float32 to the stored values of the output's type."""

    @property
    def stored(self) -> Tensor:
        return self.output

    def evaluate(self, *values: Array) -> Array:
        scale, zero = self._facts(values[1:])
        low, high = (limit - zero for limit in self.output.limits)
        # A division: the product with the reciprocal rounds to other steps.
        return np.asarray(np.clip(np.rint(values[0] / scale), low, high) + zero)


class Dequantise(Scaled):
    """Stored values to float32."""

    @property
    def stored(self) -> Tensor:
        return self.input

    def evaluate(self, *values: Array) -> Array:
        scale, zero = self._facts(values[1:])
        return (values[0].astype(np.int64) - zero).astype(np.float32) * scale


class View(Known):
    """The same values in another shape, in the order of their axes; an image's as in `NHWC` where ``order`` is that."""

    @property
    def in_place(self) -> bool:
        """Whether the output's memory is the input's as it lies."""
        if self.attributes.get("order") == NHWC:
            return self.input.layout == NHWC and self.output.in_order
        return self.input.in_order and self.output.in_order

    def shape(self) -> tuple[int, ...]:
        return self.output.shape if self.input.size == self.output.size else ()

    def evaluate(self, *values: Array) -> Array:
        whole = values[0]
        if self.attributes.get("order") == NHWC:
            whole = whole.transpose(0, 2, 3, 1)
        return whole.reshape(self.output.shape)


class Table(Known):
    """Another stored value for each: the second input has them, of the lowest first."""

    @property
    def values(self) -> Array:
        values = self.constant(1)
        assert values is not None
        return values

    def evaluate(self, *values: Array) -> Array:
        return self.values[values[0].astype(np.int64) - self.input.limits[0]]


class FirstChannels(Known):
    """The first of the input's channels."""

    def shape(self) -> tuple[int, ...]:
        return self.input.shape[0], self.output.shape[1], *self.input.shape[2:]

    def evaluate(self, *values: Array) -> Array:
        return values[0][:, : self.output.shape[1]]


class Identity(Known):
    """The same tensor by another name."""

    def evaluate(self, *values: Array) -> Array:
        return values[0]


class Transpose(Known):
    """The same values with their axes in another order."""

    @property
    def order(self) -> tuple[int, ...]:
        backwards = range(len(self.input.shape))[::-1]
        return tuple(self.attributes.get("perm") or backwards)

    def shape(self) -> tuple[int, ...]:
        return tuple(self.input.shape[axis] for axis in self.order)

    def evaluate(self, *values: Array) -> Array:
        return values[0].transpose(self.order)


def islands(graph: Graph) -> list[Operator]:
    """What computes in float32 among integers, of a quantised network."""
    return [
        each
        for each in graph.operators
        if each.output.dtype == "float32" and not isinstance(each, Dequantise | View)
    ]


def float_shares(graph: Graph) -> tuple[float, float]:
    """The share of a quantised network's multiply-adds, and of the elements that its operators make, in float32."""
    floats = islands(graph)
    made = [x for x in graph.operators if not isinstance(x, Dequantise | View)]
    macs = sum(map(_macs, floats)) / max(sum(map(_macs, made)), 1)
    return macs, sum(map(_size, floats)) / max(sum(map(_size, made)), 1)


def _macs(operator: Operator) -> int:
    if operator.kind == "MatMul":
        return operator.output.size * operator.input.shape[-1]
    if operator.kind in ("Conv", "ConvTranspose") and not operator.macs:
        wide = operator.output if operator.kind == "Conv" else operator.input
        weights = operator.inputs[1]
        return wide.size * (prod(weights.shape[1:]) if weights else 0)
    return operator.macs


def _size(operator: Operator) -> int:
    return sum(each.size for each in operator.outputs)
