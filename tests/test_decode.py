"""From outputs to boxes: the decoder against plain formulas, and what no network should ever give."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from pydantic import ValidationError

from netship.bundle.decode import NO_CLASS, decode, exp, map_on_photograph, segment
from netship.bundle.detections import Detections, on_photograph
from netship.bundle.photos import Placement
from netship.bundle.task import Detector, Level, Task, Values


def floats(values: object) -> NDArray[np.float32]:
    return np.array(values, np.float32)


def detect(**facts: Any) -> Task:
    return Task(kind="detect", detector=Detector(decoder="test", **facts))


def listed(rows: int, classes: int = 1, **changes: Any) -> Task:
    """A detector whose outputs are corners [1, rows, 4] and scores [1, rows, classes]."""
    level = Level(
        columns=rows,
        boxes=Values(output=0, cell=4),
        scores=Values(output=1, cell=classes),
    )
    facts = {"levels": (level,), "box": "corners", "classes": classes}
    return detect(**facts | changes)


def boxes_of(*corners: tuple[float, ...]) -> NDArray[np.float32]:
    return floats([corners])


def scores_of(*scores: float | tuple[float, ...]) -> NDArray[np.float32]:
    return floats(scores).reshape(1, len(scores), -1)


def test_exp_is_that_of_float64() -> None:
    x = np.linspace(-87, 88, 200_001, dtype=np.float32)
    exact = np.exp(x.astype(np.float64))
    assert (np.abs(exp(x) - exact) <= 2.0 * np.spacing(exact.astype(np.float32))).all()
    special = floats([np.nan, np.inf, -np.inf, 0])
    assert np.isnan(exp(special)[0])
    assert exp(special)[1:].tolist() == [*exp(floats([88, -87])), 1]


def test_the_best_boxes_suppress_those_that_they_cover() -> None:
    boxes = boxes_of((0, 0, 10, 10), (1, 0, 11, 10), (50, 50, 60, 60), (0, 0, 10, 4))
    found = decode(
        listed(4, iou_threshold=0.5), [boxes, scores_of(0.6, 0.9, 0.7, 0.8)], (64, 64)
    )
    assert found.boxes.tolist() == [
        boxes[0, 1].tolist(),
        [0, 0, 10, 4],
        [50, 50, 60, 60],
    ]
    assert found.scores.tolist() == floats([0.9, 0.8, 0.7]).tolist()
    assert found.boxes.dtype == found.scores.dtype == np.float32
    assert found.classes.dtype == np.int32
    assert found.points.shape == (3, 0, 2)


def test_classes_suppress_each_other_where_asked() -> None:
    outputs = [
        boxes_of((0, 0, 10, 10), (0, 0, 10, 10)),
        scores_of((0.9, 0.1), (0.2, 0.8)),
    ]
    assert decode(listed(2, 2), outputs, (64, 64)).classes.tolist() == [0, 1]
    assert decode(
        listed(2, 2, per_class=False), outputs, (64, 64)
    ).classes.tolist() == [0]
    without = decode(listed(2, 2, background=0), outputs, (64, 64))
    assert without.classes.tolist() == [1]


def test_equal_scores_keep_the_order_of_the_outputs() -> None:
    far = [(20.0 * i, 0.0, 20.0 * i + 5, 5.0) for i in range(50)]
    found = decode(
        listed(50, most=7), [boxes_of(*far), scores_of(*[0.75] * 50)], (64, 64)
    )
    assert found.boxes[:, 0].tolist() == [20 * i for i in range(7)]


@pytest.mark.parametrize("activation", ["none", "sigmoid", "softmax"])
def test_what_is_no_number_is_no_box(activation: str) -> None:
    boxes = boxes_of(
        *[(0, 0, 9, 9)] * 2, (0, 0, math.nan, 9), (0, 0, math.inf, 9), (5, 5, 5, 9)
    )
    scores = scores_of((math.nan, math.nan), (-math.inf, -math.inf), *[(0.9, -9.0)] * 3)
    found = decode(listed(5, 2, activation=activation), [boxes, scores], (64, 64))
    assert [len(part) for part in found] == [0, 0, 0, 0]


def test_anchors_move_and_grow() -> None:
    level = Level(
        columns=2,
        lines=1,
        stride=(16, 16),
        anchors=((8.0, 4.0), (2.0, 2.0)),
        boxes=Values(output=0, cell=1, anchor=8, step=2),
        scores=Values(output=1, cell=1, anchor=2),
    )
    task = detect(levels=(level,), box="offsets", variances=(0.1, 0.2), classes=1)
    # [anchors × 4, 1, 2]: the order of a convolution's channels.
    boxes = np.zeros((1, 8, 1, 2), np.float32)
    boxes[0, :4, 0, 1] = 1, 2, math.log(2) * 5, 0
    scores = floats([0, 0.9, 0.8, 0]).reshape(1, 2, 1, 2)
    found = decode(task, [boxes, scores], (16, 32))
    centre, size = (24 + 0.1 * 1 * 8, 8 + 0.1 * 2 * 4), (16, 4)
    expected = [
        c + s * h for s in (-0.5, 0.5) for c, h in zip(centre, size, strict=True)
    ]
    assert found.boxes[0] == pytest.approx(expected, rel=1e-6)
    assert found.boxes[1].tolist() == [7, 7, 9, 9]


def test_distances_are_means_of_bins() -> None:
    level = Level(
        columns=1,
        stride=(8, 8),
        anchors=((8.0, 8.0),),
        boxes=Values(output=0, cell=1),
        scores=Values(output=1, cell=1),
    )
    task = detect(
        levels=(level,),
        box="dfl",
        bins=4,
        classes=1,
        activation="sigmoid",
    )
    bins = floats([[0, 0, 0, 0], [90, 0, 0, 0], [0, 90, 0, 0], [0, 0, 90, 90]])
    found = decode(task, [bins, floats([2])], (8, 8))
    assert found.boxes[0] == pytest.approx([4 - 12, 4, 4 + 8, 4 + 20])
    assert found.scores[0] == pytest.approx(1 / (1 + math.exp(-2)))


def test_what_lies_outside_an_output_is_refused() -> None:
    with pytest.raises(ValueError, match="boxes do not lie in output 0"):
        decode(listed(5), [np.zeros((1, 4, 4)), np.zeros((1, 5, 1))], (64, 64))
    with pytest.raises(ValueError, match="scores do not lie in output 1"):
        decode(listed(5), [np.zeros((1, 5, 4))], (64, 64))
    with pytest.raises(
        ValidationError, match="background 1 is beyond the last of 1 class"
    ):
        listed(5, background=1)


def test_boxes_move_to_the_photograph() -> None:
    found = Detections(
        floats([[10, 20, 70, 40]]),
        floats([1]),
        np.array([0], np.int32),
        floats([[[10, 20]]]),
    )
    moved = on_photograph(found, Placement(0.5, 0.5, 0.0, 10.0), (100, 50))
    assert moved.boxes.tolist() == [[20, 20, 100, 50]]
    assert moved.points.tolist() == [[[20, 20]]]


def test_a_map_has_the_best_class_of_each_pixel() -> None:
    scores = np.random.default_rng(1).normal(size=(1, 5, 4, 3)).astype(np.float32)
    planes = Task(kind="segment", class_axis=1)
    assert segment(planes, [scores]).tolist() == scores[0].argmax(axis=0).tolist()
    ready = np.arange(12).reshape(1, 4, 3)
    assert segment(Task(kind="segment"), [ready]).tolist() == ready[0].tolist()


def test_a_pixel_whose_scores_hold_nan_has_no_class() -> None:
    scores = np.zeros((1, 3, 2, 3), np.float32)
    scores[0, 2, 0, 0] = 1
    scores[0, :, 0, 1] = math.nan
    scores[0, 1, 0, 2] = math.nan
    scores[0, :, 1, 0] = -math.inf
    scores[0, 1, 1, 1] = math.inf
    scores[0, 1:, 1, 2] = 5
    expected = [[2, NO_CLASS, NO_CLASS], [0, 1, 1]]
    assert segment(Task(kind="segment", class_axis=1), [scores]).tolist() == expected
    last = scores.transpose(0, 2, 3, 1)
    assert segment(Task(kind="segment", class_axis=3), [last]).tolist() == expected


Shaped = tuple[int | None, tuple[int, ...]]


def test_a_map_has_two_sides() -> None:
    """Also where a manifest says otherwise."""
    wrong: list[Shaped] = [(None, (1, 3, 8, 8)), (0, (1, 3, 8, 8)), (None, (2, 2, 2))]
    for axis, shape in wrong:
        with pytest.raises(ValueError, match=r"output 0 .* is no map of classes"):
            Task(kind="segment", class_axis=axis).check([shape])
    right: list[Shaped] = [(1, (1, 3, 8, 8)), (None, (8, 8)), (None, (1, 8, 1, 1))]
    for axis, shape in right:
        Task(kind="segment", class_axis=axis).check([shape])


@pytest.mark.parametrize("dtype", ["float32", "int64", "int8", "uint8"])
def test_a_map_has_whole_numbers_as_classes(dtype: str) -> None:
    """One score a pixel, such as a Sigmoid's, is no class; nor is what would wrap around in 32 bits."""
    given: list[float] = [0, 3, 100]
    odds: dict[str, list[float]] = {
        "float32": [0.7, math.nan, math.inf, -math.inf, -1, 65536, 1e30],
        "int64": [-1, 2**32 + 3, 65536],
        "int8": [-1, -128],
    }
    odd = odds.get(dtype, [])
    found = segment(Task(kind="segment"), [np.array([[given + odd]], dtype)])
    assert found.tolist() == [*given, *[NO_CLASS] * len(odd)]
    both = segment(Task(kind="segment"), [np.array([[[True, False]]])])
    assert both.tolist() == [1, 0]


def test_a_map_lies_on_the_photograph() -> None:
    """An input of 8×8 with a map of 2×2; the photograph is 12×4, its middle third was cut out."""
    classes = np.array([[0, 1], [2, 3]], np.int32)
    cut = map_on_photograph(classes, (8, 8), Placement(2, 2, -8, 0), (12, 4))
    assert cut[0].tolist() == [-1] * 4 + [0, 0, 1, 1] + [-1] * 4
    assert cut[3].tolist() == [-1] * 4 + [2, 2, 3, 3] + [-1] * 4
    whole = map_on_photograph(classes, (8, 8), Placement(2, 2, 0, 0), (4, 4))
    assert whole.tolist() == np.kron(classes, np.ones((2, 2))).tolist()
