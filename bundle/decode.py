"""From a network's outputs to boxes, or to a map of classes; the reference of the C that does the same.

Everything is computed in float32 and in the same order as there: both give the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from netship.bundle.detections import Detections
from netship.bundle.photos import Placement
from netship.bundle.task import Detector, Level, Task, Values

Floats = NDArray[np.float32]
_ONE = np.float32(1)
NOT_SEEN = -1
"""In a map of classes on a photograph: outside what the network saw."""
NO_CLASS = -2
"""In a map of classes: a pixel with a score that is NaN, or of a map with a value that is no class."""
MOST_CLASSES = 1 << 15


def decode(
    task: Task, outputs: Sequence[NDArray[Any]], input_size: tuple[int, int]
) -> Detections:
    """The boxes that a detector found.

    A row whose score is NaN, or whose box is not finite or has no area, is no box.

    Args:
        outputs: real values, in the manifest's order.
        input_size: height and width of the input tensor.

    Raises:
        ValueError: the task is no detection, or does not fit the outputs.
    """
    detector = task.detector
    if detector is None:
        raise ValueError(f"the task is {task.kind}, not detect")
    task.check([output.shape for output in outputs])
    flat = [np.asarray(output, np.float32).ravel() for output in outputs]
    with np.errstate(all="ignore"):
        scored = [_scores(detector, level, flat) for level in detector.levels]
        scores = np.concatenate([each[0] for each in scored])
        classes = np.concatenate([each[1] for each in scored])
        passed = np.flatnonzero(scores >= np.float32(detector.score_threshold))
        order = passed[np.argsort(-scores[passed], kind="stable")]
        order = order[: detector.candidates]
        boxes = np.concatenate(
            [_boxes(detector, level, flat, input_size) for level in detector.levels]
        )[order]
        finite = np.isfinite(boxes).all(axis=1)
        sound = finite & (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])
        order, boxes = order[sound], boxes[sound]
        kept = _suppress(detector, boxes, classes[order])
        chosen = order[kept]
        points = np.concatenate(
            [_points(detector, level, flat) for level in detector.levels]
        )[chosen]
    return Detections(boxes[kept], scores[chosen], classes[chosen], points)


def segment(task: Task, outputs: Sequence[NDArray[Any]]) -> NDArray[np.int32]:
    """The class of each pixel, int32 [height, width], as the first output has them or scores them.

    Of equal scores the lower class. `NO_CLASS` where one of a pixel's scores is NaN, which numpy takes for the largest
    and C for none, or where a map has no whole number from 0 to 32,767.
    """
    first, axis = outputs[0], task.class_axis
    if axis is not None:
        known = ~np.isnan(first).any(axis=axis)
        first = first.argmax(axis=axis)
    else:
        known = (first >= 0) & (first < MOST_CLASSES) & (first == np.trunc(first))
    classes = np.where(known, first, NO_CLASS).astype(np.int32)
    return classes.reshape([side for side in classes.shape if side != 1] or [1])


def map_on_photograph(
    classes: NDArray[np.int32],
    input_size: tuple[int, int],
    placement: Placement,
    size: tuple[int, int],
) -> NDArray[np.int32]:
    """A map of classes at each pixel of the photograph: int32 [height, width], `NOT_SEEN` where the network did not see it.

    Args:
        classes: int32 [height, width], of all of the input.
        input_size: height and width of the input tensor.
        placement: of the photograph in the input.
        size: width and height of the photograph.
    """
    lines, columns = (
        np.floor(((np.arange(side) + 0.5) * scale + offset) * cells / pixels)
        for side, scale, offset, cells, pixels in (
            (
                size[1],
                placement.scale_y,
                placement.top,
                classes.shape[0],
                input_size[0],
            ),
            (
                size[0],
                placement.scale_x,
                placement.left,
                classes.shape[1],
                input_size[1],
            ),
        )
    )
    framed = np.pad(classes, 1, constant_values=NOT_SEEN)
    y = np.clip(lines, -1, classes.shape[0]).astype(np.intp) + 1
    x = np.clip(columns, -1, classes.shape[1]).astype(np.intp) + 1
    seen: NDArray[np.int32] = framed[np.ix_(y, x)]
    return seen


def exp(x: Floats) -> Floats:
    """e to the power of x, within 2 units in the last place; the same bits on every machine.

    Above 88 it is that of 88, below −87 that of −87; NaN stays NaN.
    """
    x = np.minimum(np.maximum(x, np.float32(-87)), np.float32(88))
    powers = x * np.float32(1.44269504)
    whole = np.trunc(powers + np.copysign(np.float32(0.5), powers))
    rest = x - whole * np.float32(0.693359375) - whole * np.float32(-2.12194440e-4)
    y = np.full_like(x, 1.9875691500e-4)
    # Cephes, expf.
    for factor in (
        1.3981999507e-3,
        8.3334519073e-3,
        4.1665795894e-2,
        1.6666665459e-1,
        5.0000001201e-1,
    ):
        y = y * rest + np.float32(factor)
    y = y * rest * rest + rest + _ONE
    bits = np.nan_to_num(whole).astype(np.int32) + 127 << 23
    raised: Floats = y * bits.view(np.float32)
    return raised


def sigmoid(x: Floats) -> Floats:
    share: Floats = _ONE / (_ONE + exp(-x))
    return share


def places(values: Values, level: Level, count: int) -> NDArray[np.intp]:
    """Where in an output's memory the values of each row lie: [cells, anchors, count]."""
    cell, anchor, value = np.ogrid[: level.cells, : len(level.anchors), :count]
    found: NDArray[np.intp] = (
        values.first + cell * values.cell + anchor * values.anchor + value * values.step
    )
    return found


def _taken(values: Values, level: Level, count: int, flat: list[Floats]) -> Floats:
    """The values of each row: [rows, count]."""
    taken: Floats = flat[values.output][places(values, level, count)]
    return taken.reshape(level.rows, count)


def _scores(
    detector: Detector, level: Level, flat: list[Floats]
) -> tuple[Floats, NDArray[np.int32]]:
    """The score and the class of each row."""
    values = _taken(level.scores, level, detector.classes, flat)
    objects = np.where(np.isnan(values), np.float32(-np.inf), values)
    if detector.background is not None:
        objects[:, detector.background] = -np.inf
    best = objects.argmax(axis=1).astype(np.int32)
    # Not the maximum: of 0 and −0, which are equal, that could be the other.
    score = objects[np.arange(len(best)), best]
    score[score == -np.inf] = np.nan
    if detector.activation == "sigmoid":
        score = sigmoid(score)
    elif detector.activation == "softmax":
        highest = np.maximum.reduce(values, axis=1, initial=-np.inf)
        total = np.zeros_like(score)
        for column in values.T:
            total = total + exp(column - highest)
        score = exp(score - highest) / total
    if level.objectness is not None:
        objectness = _taken(level.objectness, level, 1, flat)[:, 0]
        if detector.activation != "none":
            objectness = sigmoid(objectness)
        score = score * objectness
        if detector.product == "root":
            score = np.sqrt(score)
    return score, best


def _anchors(level: Level) -> tuple[Floats, Floats]:
    """Centre and size of each anchor: [rows, 2] each."""
    line, column, anchor = np.indices(
        (level.lines, level.columns, len(level.anchors))
    ).reshape(3, -1)
    places = np.stack([column, line], axis=1).astype(np.float32)
    offset, stride = np.float32(level.offset), np.asarray(level.stride, np.float32)
    sizes = np.asarray(level.anchors, np.float32)[anchor]
    return (places + offset) * stride, sizes


def _boxes(
    detector: Detector, level: Level, flat: list[Floats], input_size: tuple[int, int]
) -> Floats:
    """The corners of each row's box: [rows, 4]."""
    values = _taken(level.boxes, level, detector.box_values, flat)
    if detector.box == "dfl":
        values = _expected(values.reshape(-1, detector.bins)).reshape(-1, 4)
    if detector.transposed:
        values = values[:, [1, 0, 3, 2]]
    first, second = values[:, :2], values[:, 2:]
    if detector.box in ("corners", "centre"):
        if detector.normalised:
            size = np.asarray(input_size[::-1], np.float32)
            first, second = first * size, second * size
        if detector.box == "corners":
            return np.concatenate([first, second], axis=1)
        centre, extent = first, second
    else:
        middle, anchor = _anchors(level)
        if detector.box in ("distances", "dfl"):
            return np.concatenate(
                [middle - first * anchor, middle + second * anchor], axis=1
            )
        if detector.box == "offsets":
            moved, grown = np.asarray(detector.variances, np.float32)
            centre = middle + first * moved * anchor
            extent = exp(second * grown) * anchor
        else:
            two, stride = np.float32(2), np.asarray(level.stride, np.float32)
            centre = middle + (two * sigmoid(first) - _ONE) * stride
            doubled = two * sigmoid(second)
            extent = doubled * doubled * anchor
    half = extent * np.float32(0.5)
    return np.concatenate([centre - half, centre + half], axis=1)


def _expected(values: Floats) -> Floats:
    """The mean of 0, 1, … weighted by the softmax of each line."""
    highest = np.maximum.reduce(values, axis=1, initial=-np.finfo(np.float32).max)
    total = np.zeros_like(highest)
    weighted = np.zeros_like(highest)
    for number, column in enumerate(values.T):
        weight = exp(column - highest)
        total = total + weight
        weighted = weighted + weight * np.float32(number)
    mean: Floats = weighted / total
    return mean


def _points(detector: Detector, level: Level, flat: list[Floats]) -> Floats:
    """[rows, points, 2], from the anchor's centre in anchors."""
    if not level.points or not detector.points:
        return np.zeros((level.rows, 0, 2), np.float32)
    values = _taken(level.points, level, 2 * detector.points, flat)
    middle, anchor = (each[:, None] for each in _anchors(level))
    moved = np.float32(detector.variances[0])
    return middle + values.reshape(-1, detector.points, 2) * moved * anchor


def _suppress(
    detector: Detector, boxes: Floats, classes: NDArray[np.int32]
) -> NDArray[np.intp]:
    """Which boxes stay, the best first: each that no better one of them covers."""
    limit = np.float32(detector.iou_threshold)
    areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    places = np.empty(detector.most, np.intp)
    kept = places[:0]
    for index, box in enumerate(boxes):
        if len(kept) == detector.most:
            break
        others = boxes[kept]
        sides = np.minimum(box[2:], others[:, 2:]) - np.maximum(box[:2], others[:, :2])
        sides = np.maximum(sides, np.float32(0))
        shared = sides[:, 0] * sides[:, 1]
        covered = shared > limit * (areas[index] + areas[kept] - shared)
        if detector.per_class:
            covered &= classes[kept] == classes[index]
        if not covered.any():
            places[len(kept)] = index
            kept = places[: len(kept) + 1]
    return kept
