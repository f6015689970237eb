"""The loops of a fused pair: rows of the expanded tensor in a ring that stays in the cache, and from them rows of the output.

For a block of channels, a row of the expanded tensor is computed, clipped and put into a ring with as many rows as
the depthwise kernel has; each row of the output is computed when the last row that it needs is there. Borders are
zeros in the ring. Rows of all blocks are shared out to the threads in runs; only at a run's beginning are
rows computed that another thread computes too.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from netship.targets import engine

tvm = engine.compiler()
from tvm import tir

# Runs of rows, which cores share evenly.
_RUNS = 4


@dataclass(frozen=True)
class FusedConvDepthwise:
    """A convolution and a depthwise one: shapes, strides of rows and columns, padding at top, left, bottom and right.

    Attributes:
        data: as NHWC; how it lies is ``data_layout``, NHWC or NCHW.
        limits: what the convolution's sums are clipped to.
        depthwise_limits: the same of the depthwise ones; empty where they are not clipped.
        dtype: of the data, the convolution and the output.
        depthwise_dtype: of the depthwise convolution, and of what it reads.
    """

    data: tuple[int, ...]
    data_layout: str
    weight: tuple[int, ...]
    filters: tuple[int, ...]
    strides: tuple[int, ...]
    padding: tuple[int, ...]
    limits: tuple[float, ...]
    depthwise_strides: tuple[int, ...]
    depthwise_padding: tuple[int, ...]
    depthwise_limits: tuple[float, ...]
    dtype: str = "float32"
    depthwise_dtype: str = "float32"

    @cached_property
    def expanded(self) -> tuple[int, ...]:
        size = _convolved(self.data, self.weight, self.strides, self.padding)
        return self.data[0], *size, self.weight[3]

    @cached_property
    def output(self) -> tuple[int, ...]:
        strides, padding = self.depthwise_strides, self.depthwise_padding
        size = _convolved(self.expanded, self.filters, strides, padding)
        return self.data[0], *size, self.weight[3]


def _convolved(
    image: Sequence[int],
    kernel: Sequence[int],
    strides: Sequence[int],
    padding: Sequence[int],
) -> list[int]:
    """Height and width of what a convolution makes of ``image``."""
    return [
        (image[1 + axis] + padding[axis] + padding[2 + axis] - kernel[axis])
        // strides[axis]
        + 1
        for axis in (0, 1)
    ]


@dataclass(frozen=True)
class Tile:
    """How the work fits a target.

    Attributes:
        lanes: numbers in a vector.
        columns, vectors: of the expanded tensor, whose sums are kept in registers.
        outputs: columns of the output, likewise.
        block: channels whose rows share a ring; whole cache lines, or threads write to the same ones.
        as_integers: clip the bits, where that is exact and integers are quicker than floating point.
    """

    lanes: int
    columns: int
    vectors: int
    outputs: int
    block: int
    as_integers: bool


class _Vector(NamedTuple):
    """A vector of channels: its number in the block, its first channel in the tensor, its lanes."""

    number: Any
    channel: Any
    lanes: int


@dataclass(frozen=True)
class _Register:
    """A vector in a few bytes of the stack, which LLVM keeps in a register."""

    _memory: Any
    _index: Any

    def get(self) -> Any:
        return self._memory[self._index]

    def set(self, value: Any) -> None:
        self._memory[self._index] = value


class _Row(NamedTuple):
    """A row of the expanded tensor: image, row, and slot in the ring."""

    image: Any
    number: Any
    slot: Any


class Kernel:
    """What computes a pair."""

    def __init__(
        self, pair: FusedConvDepthwise, tile: Tile, inputs: Sequence[Any], output: Any
    ) -> None:
        """Args: inputs: the data, weights (HWIO) and bias of the convolution, filters (height, width, channel) and bias."""
        self._pair = pair
        self._tile = tile
        self._data, self._weight, self._bias, self._filters, self._shift = inputs
        self._output = output
        self._builder = tir.ir_builder.create()
        self._slots = pair.filters[0]
        _, before, _, after = pair.depthwise_padding
        self._width = before + pair.expanded[2] + after
        self._vectors = -(-min(tile.block, pair.expanded[3]) // tile.lanes)

    def statement(self) -> Any:
        builder, pair = self._builder, self._pair
        batch, height, _, channels = pair.output
        blocks = -(-channels // self._tile.block)
        total = batch * blocks * height
        with builder.for_range(0, _RUNS, name="run", kind="parallel") as run:
            first = tir.floordiv(run * total, _RUNS)
            end = tir.floordiv((run + 1) * total, _RUNS)
            size = self._slots * self._vectors * self._width * self._tile.lanes
            self._ring = builder.allocate(
                pair.depthwise_dtype, size, "ring", scope="global"
            )
            self._zero_borders()
            with builder.for_range(0, end - first, name="index") as index:
                row = tir.floormod(first + index, height)
                block = tir.floordiv(first + index, height)
                image = tir.floordiv(block, blocks) if batch > 1 else 0
                self._row(image, tir.floormod(block, blocks), row, index)
        return builder.get()

    def _row(self, image: Any, block: Any, row: Any, index: Any) -> None:
        """A row of the output in a block of channels, the ``index``-th of a run, and the rows that it lacks in the ring."""
        builder, stride_h = self._builder, self._pair.depthwise_strides[0]
        kept = max(self._slots - stride_h, 0)
        there = tir.Select(tir.any(index == 0, row == 0), 0, kept)
        for condition, start, size in self._blocks(block):
            with builder.if_scope(condition):
                with builder.for_range(0, self._slots - there, name="lack") as lack:
                    self._fill(image, row * stride_h + there + lack, start, size)
                self._filter(image, row, start, size)

    def _blocks(self, block: Any) -> Iterator[tuple[Any, Any, int]]:
        """Of whole blocks and of a smaller last one: the condition for it, its first channel, its channels."""
        size, rest = self._tile.block, self._pair.output[3] % self._tile.block
        whole = self._pair.output[3] // size
        if whole:
            yield block < whole if rest else True, block * size, size
        if rest:
            yield block == whole, whole * size, rest

    def _at(self, slot: Any, vector: _Vector, column: Any) -> Any:
        line = slot * self._vectors + vector.number
        index = (line * self._width + column) * self._tile.lanes
        return _ramp(index, vector.lanes)

    def _zero_borders(self) -> None:
        _, before, _, after = self._pair.depthwise_padding
        columns = [*range(before), *range(self._width - after, self._width)]
        if columns:
            with self._builder.for_range(
                0, self._slots * self._vectors, name="line"
            ) as line:
                self._zero(line, columns)

    def _zero(self, line: Any, columns: Sequence[Any]) -> None:
        lanes = self._tile.lanes
        for column in columns:
            index = _ramp((line * self._width + column) * lanes, lanes)
            zero = tir.const(0.0, self._pair.depthwise_dtype)
            self._ring[index] = _splat(zero, lanes)

    def _fill(self, image: Any, h: Any, start: Any, size: int) -> None:
        """Row ``h`` of the expanded tensor with its borders."""
        above, before, below, _ = self._pair.depthwise_padding
        _, height, width, _ = self._pair.expanded
        row = _Row(image, h - above, tir.floormod(h, self._slots))
        if not (above or below):
            self._expand(row, start, size)
            return
        with self._builder.if_scope(tir.all(row.number >= 0, row.number < height)):
            self._expand(row, start, size)
        with self._builder.else_scope():
            for vector in self._loop("vector", self._vectors):
                line = row.slot * self._vectors + vector
                for column in self._loop("column", width):
                    self._zero(line, [before + column])

    def _expand(self, row: _Row, start: Any, size: int) -> None:
        for vectors in self._groups("group", start, size, self._tile.vectors):
            self._expand_row(row, vectors)

    def _expand_row(self, row: _Row, vectors: list[_Vector]) -> None:
        """Tiles that read the input's borders are written out, those between them are a loop."""
        width = self._pair.expanded[2]
        columns = fitting(width, self._tile.columns)
        starts = range(0, width, columns)
        inner = [
            first
            for first in starts
            if first + columns <= width
            and all(
                self._inside(first + c, j)
                for c in range(columns)
                for j in range(self._pair.weight[1])
            )
        ]
        for first in starts:
            if first not in inner:
                self._sum(row, vectors, first, min(columns, width - first))
            elif first == inner[0]:
                for tile in self._loop("tile", len(inner)):
                    self._sum(row, vectors, inner[0] + tile * columns, columns)

    def _inside(self, column: int, j: int) -> bool:
        at = column * self._pair.strides[1] + j - self._pair.padding[1]
        return 0 <= at < self._pair.data[2]

    def _sum(self, row: _Row, vectors: list[_Vector], first: Any, columns: int) -> None:
        """The convolution of a few columns, clipped, into the ring."""
        builder, pair = self._builder, self._pair
        height, width, depth, _ = pair.weight
        sums = [
            [self._register(vector.lanes, pair.dtype) for vector in vectors]
            for _ in range(columns)
        ]
        for column in sums:
            for total, vector in zip(column, vectors, strict=True):
                total.set(_load(self._bias, [vector.channel], vector.lanes))
        top = row.number * pair.strides[0] - pair.padding[0]

        def add(i: Any, j: int, k: Any) -> None:
            weights = [
                _load(self._weight, [i, j, k, vector.channel], vector.lanes)
                for vector in vectors
            ]
            for c, column in enumerate(sums):
                if isinstance(first, int) and not self._inside(first + c, j):
                    continue
                at = (first + c) * pair.strides[1] + j - pair.padding[1]
                place = [row.image, top + i, at, k]
                if pair.data_layout == "NCHW":
                    place = [row.image, k, top + i, at]
                value = _load(self._data, place, 1)
                for total, weight, vector in zip(column, weights, vectors, strict=True):
                    total.set(total.get() + _splat(value, vector.lanes) * weight)

        def taps(i: Any) -> None:
            for j in range(width):
                for k in self._loop("depth", depth // _DEPTH):
                    for more in range(_DEPTH):
                        add(i, j, k * _DEPTH + more)
                for k in range(depth // _DEPTH * _DEPTH, depth):
                    add(i, j, k)

        before, after = pair.padding[0], pair.padding[2]
        if before or after:
            begin = tir.max(0, -top)
            end = tir.min(height, pair.data[1] - top)
            with builder.for_range(0, end - begin, name="tap") as tap:
                taps(begin + tap)
        else:
            for i in range(height):
                taps(i)
        border = pair.depthwise_padding[1]
        for c, column in enumerate(sums):
            for total, vector in zip(column, vectors, strict=True):
                index = self._at(row.slot, vector, first + c + border)
                value = self._clip(total.get(), vector.lanes, pair.limits, pair.dtype)
                kind = _kind(pair.depthwise_dtype, vector.lanes)
                self._ring[index] = value.astype(kind)

    def _filter(self, image: Any, row: Any, start: Any, size: int) -> None:
        """A row of the output."""
        width = self._pair.output[2]
        columns = fitting(width, self._tile.outputs)
        for (vector,) in self._groups("vector", start, size, 1):
            for tile in self._loop("tile", width // columns):
                self._outputs(image, row, vector, tile * columns, columns)
            if width % columns:
                first = width // columns * columns
                self._outputs(image, row, vector, first, width % columns)

    def _outputs(
        self, image: Any, row: Any, vector: _Vector, first: Any, columns: int
    ) -> None:
        pair = self._pair
        dtype = pair.depthwise_dtype
        sums = [self._register(vector.lanes, dtype) for _ in range(columns)]
        for total in sums:
            total.set(_load(self._shift, [vector.channel], vector.lanes))
        stride_h, stride_w = pair.depthwise_strides
        for y in range(pair.filters[0]):
            slot = tir.floormod(row * stride_h + y, self._slots)
            for x in range(pair.filters[1]):
                tap = _load(self._filters, [y, x, vector.channel], vector.lanes)
                for c, total in enumerate(sums):
                    index = self._at(slot, vector, (first + c) * stride_w + x)
                    total.set(total.get() + self._ring[index] * tap)
        for c, total in enumerate(sums):
            value = total.get()
            if pair.depthwise_limits:
                value = self._clip(value, vector.lanes, pair.depthwise_limits, dtype)
            at = [image, row, first + c, vector.channel]
            value = value.astype(_kind(pair.dtype, vector.lanes))
            self._builder.emit(self._output.vstore(at, value))

    def _register(self, lanes: int, dtype: str) -> _Register:
        memory = self._builder.allocate(dtype, lanes, "sum", scope="global")
        return _Register(memory, _ramp(0, lanes))

    def _loop(self, name: str, count: int) -> Iterator[Any]:
        """The index of a loop, whose body is what is made of it; where it has one turn, that is written out."""
        if count == 1:
            yield 0
        elif count:
            with self._builder.for_range(0, count, name=name) as index:
                yield index

    def _groups(
        self, name: str, start: Any, size: int, together: int
    ) -> Iterator[list[_Vector]]:
        """The vectors of ``size`` channels from ``start``, ``together`` at a time in a loop, then what is left over."""
        lanes = self._tile.lanes
        whole = size // lanes

        def group(first: Any, count: int) -> list[_Vector]:
            return [
                _Vector(first + v, start + (first + v) * lanes, lanes)
                for v in range(count)
            ]

        for index in self._loop(name, whole // together):
            yield group(index * together, together)
        if whole % together:
            yield group(whole // together * together, whole % together)
        if size % lanes:
            yield [_Vector(whole, start + whole * lanes, size % lanes)]

    def _clip(self, value: Any, lanes: int, limits: Sequence[float], dtype: str) -> Any:
        low, high = limits
        if not (self._tile.as_integers and 0 <= low <= high):
            least, most = (
                _splat(tir.const(each, dtype), lanes) for each in (low, high)
            )
            return tir.Max(tir.Min(value, most), least)
        # Numbers from zero up are in the order of their bits, and all others are negative as integers too.
        integer = dtype.replace("float", "int")
        least, most = (
            _splat(tir.const(_bits(each, dtype), integer), lanes)
            for each in (low, high)
        )
        bits = tir.call_intrin(_kind(integer, lanes), "tir.reinterpret", value)
        clipped = tir.Min(tir.Max(bits, least), most)
        return tir.call_intrin(_kind(dtype, lanes), "tir.reinterpret", clipped)


# Rounds of the loop over input channels that are written out.
_DEPTH = 4


def fitting(width: int, most: int) -> int:
    """Columns of a tile: a divisor of ``width`` where one is near ``most``."""
    divisor = max(n for n in range(1, most + 1) if width % n == 0)
    return divisor if divisor == width or 3 * divisor >= 2 * most else most


def _kind(kind: str, lanes: int) -> str:
    return kind if lanes == 1 else f"{kind}x{lanes}"


def _ramp(index: Any, lanes: int) -> Any:
    return index if lanes == 1 else tir.Ramp(index, 1, lanes)


def _load(buffer: Any, at: list[Any], lanes: int) -> Any:
    return buffer.vload(at, _kind(buffer.dtype, lanes))


def _splat(value: Any, lanes: int) -> Any:
    return value if lanes == 1 else tir.Broadcast(value, lanes)


def _bits(value: float, dtype: str) -> int:
    # Minus zero as zero.
    number = np.array(value + 0.0, dtype)
    return int(number.view(dtype.replace("float", "int")))
