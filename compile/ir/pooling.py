"""Operators that make one value of each window of an image."""

from __future__ import annotations

import numpy as np

from netship.compile.ir import requantise
from netship.compile.ir.graph import Array
from netship.compile.ir.operators import Known


class Pool(Known):
    """What is made of each window of elements, in the order of their places; its attributes are explicit."""

    @property
    def kernel(self) -> tuple[int, ...]:
        return tuple(self.attributes["kernel_shape"])

    @property
    def strides(self) -> tuple[int, ...]:
        return tuple(self.attributes.get("strides") or [1] * len(self.kernel))

    @property
    def dilations(self) -> tuple[int, ...]:
        return tuple(self.attributes.get("dilations") or [1] * len(self.kernel))

    @property
    def pads(self) -> tuple[tuple[int, int], ...]:
        """Of each axis what is added before it and behind it."""
        pads = self.attributes.get("pads") or [0] * 2 * len(self.kernel)
        return tuple(zip(pads[: len(pads) // 2], pads[len(pads) // 2 :], strict=True))

    @property
    def places(self) -> list[tuple[tuple[int, int], ...]]:
        """Of each element of the kernel: on each axis of the padded image its first and its last place."""
        lasts = [
            (n - 1) * s for n, s in zip(self.shape()[2:], self.strides, strict=True)
        ]
        return [
            tuple(
                (k * dilation, k * dilation + last)
                for k, dilation, last in zip(place, self.dilations, lasts, strict=True)
            )
            for place in np.ndindex(*self.kernel)
        ]

    def shape(self) -> tuple[int, ...]:
        sizes = (
            (size + sum(pads) - (kernel - 1) * dilation - 1) // stride + 1
            for size, pads, kernel, dilation, stride in zip(
                *(self.input.shape[2:], self.pads, self.kernel),
                *(self.dilations, self.strides),
                strict=True,
            )
        )
        return *self.input.shape[:2], *sizes

    def windows(self, values: Array, fill: float) -> list[Array]:
        """Of each element of the kernel what lies there in every window; ``fill`` in the padding."""
        widths = ((0, 0), (0, 0), *self.pads)
        padded = np.pad(values, widths, constant_values=fill)

        def at(place: tuple[tuple[int, int], ...]) -> Array:
            of_axes = zip(place, self.strides, strict=True)
            slices = (slice(a, b + 1, stride) for (a, b), stride in of_axes)
            return padded[(slice(None), slice(None), *slices)]

        return [at(place) for place in self.places]


class MaxPool(Pool):
    """The largest value of each window."""

    def evaluate(self, *values: Array) -> Array:
        (x,) = values
        lowest = -np.inf if x.dtype.kind == "f" else self.input.limits[0]
        return np.asarray(np.maximum.reduce(self.windows(x, lowest)))


class AveragePool(Pool):
    """The mean of each window; what is padded counts where ``count_include_pad`` says so."""

    @property
    def counts(self) -> Array:
        """float32 [1, 1, height, width …]: how many elements the mean of each window is of."""
        alone = np.ones((1, 1, *self.input.shape[2:]), np.float32)
        pad = float(bool(self.attributes.get("count_include_pad", 0)))
        return np.asarray(sum(self.windows(alone, pad)))

    def evaluate(self, *values: Array) -> Array:
        if not self.output.quantisation:
            exact = self.windows(values[0].astype(np.float64), 0)
            return np.asarray(sum(exact) / self.counts)
        steps = values[0].astype(np.int64) - self.input.zero
        x = steps.astype(np.float32) * np.float32(self.input.scale)
        means = sum(self.windows(x, 0)) / self.counts
        return requantise.with_zero(means / np.float32(self.output.scale), self)
