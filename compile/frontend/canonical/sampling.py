"""Rules of operators that read an image between its pixels: GridSample, RoiAlign, DeformConv.

TVM's GridSample and RoiAlign differ from ONNX Runtime in ties, reflections and the maximum; it has no DeformConv
with a mask. Each becomes a Gather for every neighbour, times its weight.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import reduce
from itertools import product
from math import prod
from typing import Any

import numpy as np
import onnx

from netship.compile.frontend.canonical.forms import axes_form
from netship.compile.frontend.canonical.graph import (
    Chain,
    Graph,
    attributes_of,
    refusal,
    text_of,
)

_CUBIC = -0.75
# Places of an axis that RoiAlign's weights, which are constants, hold.
_MOST_SAMPLES = 1 << 20
# The neighbours of one coordinate: each an index, as a float, and its weight.
Taps = list[tuple[str, str]]


def grid_sample(node: onnx.NodeProto, graph: Graph) -> list[onnx.NodeProto]:
    """Each coordinate of the grid, from -1 to 1, is scaled to pixels; the grid may be computed."""
    attributes = attributes_of(node)
    batch, channels, *sizes = graph.shape(node.input[0])
    mode = text_of(attributes.get("mode", "linear"))
    padding = text_of(attributes.get("padding_mode", "zeros"))
    align = bool(attributes.get("align_corners", 0))
    if padding == "reflection" and align and 1 in sizes:
        raise refusal(
            node, "reflects an axis of one pixel with align_corners; pad with border"
        )
    chain, points = Chain(node, graph), prod(graph.shape(node.output[0])[2:])
    grid = chain.add("Reshape", node.input[1], (batch, points, len(sizes)))
    axes = []
    for axis, size in enumerate(sizes):
        # The last axis of the image is the first of the grid.
        place = len(sizes) - 1 - axis
        ratio = chain.add("Add", part(chain, graph, grid, 2, place, place + 1), 1.0)
        if align:
            pixel = chain.add("Mul", chain.add("Div", ratio, 2.0), size - 1.0)
        else:
            scaled = chain.add("Mul", ratio, float(size))
            pixel = chain.add("Div", chain.add("Sub", scaled, 1.0), 2.0)
        axes.append(
            [
                _padded(chain, place, weight, size, padding, align)
                for place, weight in _neighbours(chain, pixel, mode)
            ]
        )
    image = _pixels(chain, node.input[0], batch, channels, sizes)
    first = np.arange(batch).reshape(-1, 1, 1) * prod(sizes)
    values = _sampled(chain, image, axes, sizes, (batch, points), first)
    back = chain.add("Transpose", values, perm=[0, 2, 1])
    return chain.end("Reshape", back, graph.shape(node.output[0]))


def roi_align(node: onnx.NodeProto, graph: Graph) -> list[onnx.NodeProto]:
    """Samples in each cell of each region; sampling_ratio 0 takes as many as the region's size asks for."""
    attributes = attributes_of(node)
    batch, channels, *sizes = graph.shape(node.input[0])
    default = "half_pixel" if graph.opset >= 16 else "output_half_pixel"
    half = (
        text_of(attributes.get("coordinate_transformation_mode", default))
        == "half_pixel"
    )
    maximum = text_of(attributes.get("mode", "avg")) == "max"
    ratio = attributes.get("sampling_ratio", 0)
    if ratio == 0 and node.input[1] not in graph.constants:
        raise refusal(
            node,
            "with sampling_ratio 0 its regions, which are computed while the model runs, say how many "
            "samples it takes; export with sampling_ratio=2",
        )
    regions = graph.shape(node.input[1])[0]
    chain, scale = Chain(node, graph), attributes.get("spatial_scale", 1.0)
    offset = 0.5 if half else 0.0
    scaled = chain.add("Sub", chain.add("Mul", node.input[1], scale), offset)
    axes, grid = [], []
    for axis, size in enumerate(sizes):
        cells = attributes.get(("output_height", "output_width")[axis], 1)
        start, end = (
            part(chain, graph, scaled, 1, k, k + 1) for k in (1 - axis, 3 - axis)
        )
        extent = chain.add("Sub", end, start)
        if not half:
            extent = chain.add("Max", extent, 1.0)
        cell = chain.add("Div", extent, float(cells))
        counts = np.full((1, 1, 1), ratio)
        if ratio == 0:
            rois = graph.constant(node, 1)
            assert rois is not None
            bounds = rois * np.float32(scale) - np.float32(offset)
            extents = bounds[:, 3 - axis] - bounds[:, 1 - axis]
            if not half:
                extents = np.maximum(extents, 1)
            needed = np.ceil(extents / np.float32(cells)).astype(np.int64)
            counts = np.maximum(needed, 0).reshape(-1, 1, 1)
        most = max(1, int(counts.max()))
        if regions * cells * most > _MOST_SAMPLES:
            raise refusal(
                node,
                f"takes {most} samples a cell and axis, too many to compute; export with sampling_ratio=2",
            )
        sample, shape = np.arange(most), (len(counts), cells * most)
        inside = np.minimum(sample, np.maximum(counts - 1, 0)) + 0.5
        places = np.arange(cells).reshape(1, -1, 1) + inside / np.maximum(counts, 1)
        share = 1 / np.maximum(counts, 1)
        used = np.where(sample < counts, share, 0) if not maximum else counts > 0
        weights = np.broadcast_to(used, places.shape).reshape(shape)
        offsets = chain.add("Mul", cell, places.reshape(shape).astype(np.float32))
        pixel = chain.add("Add", start, offsets)
        form = [regions, 1, 1, 1]
        form[1 + axis] = cells * most
        taps = _clamped(chain, pixel, weights.astype(np.float32), size)
        axes.append(
            [
                (chain.add("Reshape", i, form), chain.add("Reshape", w, form))
                for i, w in taps
            ]
        )
        grid += [cells, most]
    image = _pixels(chain, node.input[0], batch, channels, sizes)
    first: Any = chain.add("Mul", node.input[2], prod(sizes)) if batch > 1 else 0
    if batch > 1:
        first = chain.add("Reshape", first, (regions, 1, 1, 1))
    points = (regions, grid[0] * grid[1], grid[2] * grid[3])
    joined = "Max" if maximum else "Add"
    values = _sampled(chain, image, axes, sizes, points, first, joined)
    apart = chain.add("Reshape", values, (regions, *grid, channels))
    operator = "ReduceMax" if maximum else "ReduceSum"
    inputs, named = axes_form(operator, [2, 4], graph)
    pooled = chain.add(operator, apart, *inputs, keepdims=0, **named)
    return chain.end("Transpose", pooled, perm=[0, 3, 1, 2])


def deformable_convolution(node: onnx.NodeProto, graph: Graph) -> list[onnx.NodeProto]:
    """Each element of the kernel reads its own image, sampled at the offsets; a 1×1 convolution follows."""
    attributes = attributes_of(node)
    batch, channels, *sizes = graph.shape(node.input[0])
    if len(sizes) != 2:
        raise refusal(node, "is not of two dimensions; only images are supported")
    filters, depth, *kernel = graph.shape(node.input[1])
    output = graph.shape(node.output[0])[2:]
    groups, taps, points = attributes.get("offset_group", 1), prod(kernel), prod(output)
    strides = attributes.get("strides") or [1, 1]
    pads = attributes.get("pads") or [0] * 4
    dilations = attributes.get("dilations") or [1, 1]
    chain, images = Chain(node, graph), batch * groups
    offsets = chain.add("Reshape", node.input[2], (images, taps, 2, points))
    axes = []
    for axis, size in enumerate(sizes):
        grid = np.indices((*kernel, *output))
        place = (
            grid[axis] * dilations[axis] + grid[2 + axis] * strides[axis] - pads[axis]
        ).reshape(1, -1, 1)
        shift = part(chain, graph, offsets, 2, axis, axis + 1)
        shift = chain.add("Reshape", shift, (images, taps * points, 1))
        pixel = chain.add("Add", shift, place.astype(np.float32))
        axes.append(
            [
                _padded(chain, index, weight, size, "zeros", False)
                for index, weight in _neighbours(chain, pixel, "linear")
            ]
        )
    image = _pixels(chain, node.input[0], images, channels // groups, sizes)
    first = np.arange(images).reshape(-1, 1, 1) * prod(sizes)
    values = _sampled(chain, image, axes, sizes, (images, taps * points), first)
    if len(node.input) > 4 and node.input[4]:
        mask = chain.add("Reshape", node.input[4], (images, taps * points, 1))
        values = chain.add("Mul", values, mask)
    columns = chain.add("Transpose", values, perm=[0, 2, 1])
    columns = chain.add("Reshape", columns, (batch, channels * taps, *output))
    weights = chain.add("Reshape", node.input[1], (filters, depth * taps, 1, 1))
    bias = node.input[3:4] if len(node.input) > 3 and node.input[3] else []
    return chain.end("Conv", columns, weights, *bias, group=attributes.get("group", 1))


def part(
    chain: Chain, graph: Graph, source: str, axis: int, start: int, end: int
) -> str:
    """Elements ``start`` to ``end`` of one axis."""
    if graph.opset < 10:
        return chain.add("Slice", source, axes=[axis], starts=[start], ends=[end])
    return chain.add("Slice", source, [start], [end], [axis])


def _pixels(
    chain: Chain, source: str, batch: int, channels: int, sizes: Sequence[int]
) -> str:
    """[batch × pixels, channels]"""
    flat = chain.add("Reshape", source, (batch, channels, prod(sizes)))
    last = chain.add("Transpose", flat, perm=[0, 2, 1])
    return chain.add("Reshape", last, (-1, channels))


def _sampled(
    chain: Chain,
    image: str,
    axes: Sequence[Taps],
    sizes: Sequence[int],
    shape: tuple[int, ...],
    first: Any,
    joined: str = "Add",
) -> str:
    """[*shape, channels]: the weighted pixels of every combination of neighbours, joined.

    Args:
        axes: each axis's neighbours, of shapes that broadcast to [*shape, 1].
        first: the index of each image's first pixel, of such a shape.
    """
    whole = [
        [
            (chain.add("Cast", index, to=onnx.TensorProto.INT64), weight)
            for index, weight in taps
        ]
        for taps in axes
    ]
    values = []
    for taps in product(*whole):
        index = taps[0][0]
        for size, (place, _) in zip(sizes[1:], taps[1:], strict=True):
            index = chain.add("Add", chain.add("Mul", index, size), place)
        index = chain.add("Reshape", chain.add("Add", index, first), shape)
        weight = reduce(_binary(chain, "Mul"), (weight for _, weight in taps))
        pixels = chain.add("Gather", image, index, axis=0)
        values.append(chain.add("Mul", pixels, weight))
    return reduce(_binary(chain, joined), values)


def _binary(chain: Chain, operator: str) -> Callable[[str, str], str]:
    return lambda left, right: chain.add(operator, left, right)


def _neighbours(chain: Chain, pixel: str, mode: str) -> Taps:
    low = chain.add("Floor", pixel)
    fraction = chain.add("Sub", pixel, low)
    if mode == "nearest":
        # Halves go to the even neighbour: an odd one's threshold is the largest number below a half.
        halved = chain.add("Floor", chain.add("Mul", low, 0.5))
        odd = chain.add("Sub", low, chain.add("Mul", halved, 2.0))
        limit = chain.add("Sub", 0.5, chain.add("Mul", odd, 2.0**-25))
        up = chain.add("Cast", chain.add("Greater", fraction, limit), to=1)
        nearest = chain.add("Add", low, up)
        return [(nearest, chain.add("Add", chain.add("Mul", up, 0.0), 1.0))]
    high = chain.add("Add", low, 1.0)
    rest = chain.add("Sub", 1.0, fraction)
    if mode in ("linear", "bilinear"):
        return [(low, rest), (high, fraction)]
    a = _CUBIC

    def near(t: str) -> str:
        """((a + 2) t - (a + 3)) t² + 1"""
        inner = chain.add("Sub", chain.add("Mul", t, a + 2), a + 3)
        square = chain.add("Mul", t, t)
        return chain.add("Add", chain.add("Mul", inner, square), 1.0)

    def far(t: str) -> str:
        """((a t - 5a) t + 8a) t - 4a, where t is a distance from 1 to 2"""
        inner = chain.add("Sub", chain.add("Mul", t, a), 5 * a)
        inner = chain.add("Add", chain.add("Mul", inner, t), 8 * a)
        return chain.add("Sub", chain.add("Mul", inner, t), 4 * a)

    return [
        (chain.add("Sub", low, 1.0), far(chain.add("Add", fraction, 1.0))),
        (low, near(fraction)),
        (high, near(rest)),
        (chain.add("Add", low, 2.0), far(chain.add("Add", rest, 1.0))),
    ]


def _padded(
    chain: Chain, index: str, weight: str, size: int, padding: str, align: bool
) -> tuple[str, str]:
    """A neighbour within the image; outside it, with zeros, its weight is 0."""
    if padding == "reflection":
        # Between the centres of the outermost pixels, or between their outer edges.
        edge, period = (0.0, 2.0 * (size - 1)) if align else (-0.5, 2.0 * size)
        distance = chain.add("Abs", chain.add("Sub", index, edge))
        turns = chain.add("Floor", chain.add("Div", distance, period))
        rest = chain.add("Sub", distance, chain.add("Mul", turns, period))
        folded = chain.add("Min", rest, chain.add("Sub", period, rest))
        return chain.add("Add", folded, edge), weight
    bounded = _bounded(chain, index, 0.0, size - 1.0)
    if padding == "zeros":
        far = chain.add("Abs", chain.add("Sub", index, bounded))
        inside = chain.add("Max", chain.add("Sub", 1.0, far), 0.0)
        weight = chain.add("Mul", weight, inside)
    return bounded, weight


def _clamped(chain: Chain, pixel: str, weights: Any, size: int) -> Taps:
    """RoiAlign's two neighbours: the outermost pixels reach one pixel further, and nothing lies beyond."""
    beyond = chain.add(
        "Or",
        chain.add("Less", pixel, -1.0),
        chain.add("Greater", pixel, float(size)),
    )
    inside = chain.add("Cast", chain.add("Not", beyond), to=1)
    inside = chain.add("Mul", inside, weights)
    place = _bounded(chain, pixel, 0.0, size - 1.0)
    low = chain.add("Floor", place)
    fraction = chain.add("Sub", place, low)
    high = chain.add("Min", chain.add("Add", low, 1.0), size - 1.0)
    rest = chain.add("Mul", chain.add("Sub", 1.0, fraction), inside)
    return [(low, rest), (high, chain.add("Mul", fraction, inside))]


def _bounded(chain: Chain, value: str, low: float, high: float) -> str:
    return chain.add("Min", chain.add("Max", value, low), high)
