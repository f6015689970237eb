"""What a network is for, as data: how its outputs become classes, boxes or a map of classes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import prod
from typing import Annotated, Literal

from pydantic import Field, FiniteFloat, model_validator

from netship.bundle.fields import Dimension, FileName, Section
from netship.targets.escapes import counted

Size = Annotated[FiniteFloat, Field(gt=0, le=1 << 16)]
Share = Annotated[FiniteFloat, Field(ge=0, le=1)]
Index = Annotated[int, Field(ge=0, lt=1 << 29)]
Kind = Literal["classify", "detect", "segment", "raw"]
MAX_ROWS = 1 << 20
"""Boxes that a network proposes, before any is left out."""


class Values(Section):
    """Where values lie in an output, whatever the order of its axes.

    Value k of anchor a of cell c is element ``first + c * cell + a * anchor + k * step`` of the output
    number ``output``, counted in its memory.
    """

    output: Annotated[int, Field(ge=0, lt=1024)]
    first: Index = 0
    cell: Index
    anchor: Index = 0
    step: Index = 1


class Level(Section):
    """A grid of cells, each with the same anchors; without a grid, ``columns`` counts the rows of a list.

    Attributes:
        stride: of a cell, width and height, in pixels of the input.
        offset: where in its cell an anchor's centre lies: 0 top left, 0.5 in the middle.
        anchors: width and height of each, in pixels of the input.
        boxes, scores: of each anchor, and where there are such, objectness and points (x, y each).
    """

    columns: Dimension
    lines: Dimension = 1
    stride: tuple[Size, Size] = (1.0, 1.0)
    offset: Share = 0.5
    anchors: Annotated[
        tuple[tuple[Size, Size], ...], Field(min_length=1, max_length=64)
    ] = ((1.0, 1.0),)
    boxes: Values
    scores: Values
    objectness: Values | None = None
    points: Values | None = None

    @property
    def cells(self) -> int:
        return self.columns * self.lines

    @property
    def rows(self) -> int:
        return self.cells * len(self.anchors)


class Detector(Section):
    """How outputs become boxes.

    Attributes:
        decoder: the preset, or the file, that this came from; for a person.
        box: what the four values of a box are. "corners": x1, y1, x2, y2; "centre": x, y, width, height.
            "offsets" of SSD: the anchor's centre + v0 d anchor, its size × exp(v1 d), v being ``variances``.
            "distances": from the anchor's centre to left, top, right and bottom, in anchors; "dfl": likewise,
            each distance the mean of ``bins`` numbers 0, 1, … weighted by the softmax of as many values.
            "yolov5": the sigmoid s of each, centre + (2 s − 1) stride, anchor × (2 s)².
        normalised: corners and centre are shares of the input's size, not pixels.
        transposed: y lies before x, and height before width.
        classes: scores of each box; the best is taken.
        activation: what makes a share of a score; of objectness sigmoid, unless this is "none".
        product: score × objectness; its square root where "root".
        background: the class that is no object.
        per_class: boxes of different classes do not suppress each other.
        candidates: how many boxes, the best ones, are compared with each other.
        most: how many boxes are found at most.
        points: of each box.
    """

    decoder: FileName
    levels: Annotated[tuple[Level, ...], Field(min_length=1, max_length=64)]
    box: Literal["corners", "centre", "offsets", "distances", "dfl", "yolov5"]
    normalised: bool = False
    transposed: bool = False
    variances: tuple[Size, Size] = (1.0, 1.0)
    bins: Annotated[int, Field(ge=2, le=64)] = 16
    classes: Annotated[int, Field(ge=1, le=1 << 16)]
    activation: Literal["none", "sigmoid", "softmax"] = "none"
    product: Literal["plain", "root"] = "plain"
    background: Annotated[int, Field(ge=0)] | None = None
    score_threshold: Share = 0.5
    iou_threshold: Share = 0.45
    per_class: bool = True
    candidates: Annotated[int, Field(ge=1, le=1 << 16)] = 1000
    most: Annotated[int, Field(ge=1, le=1 << 12)] = 100
    points: Annotated[int, Field(ge=0, le=256)] = 0

    @property
    def rows(self) -> int:
        return sum(level.rows for level in self.levels)

    @property
    def box_values(self) -> int:
        return 4 * self.bins if self.box == "dfl" else 4

    def parts(self) -> Iterator[tuple[str, Level, Values, int]]:
        """Everything that is read: what, its level, where, and how many values a row has."""
        for level in self.levels:
            for name, values, count in (
                ("boxes", level.boxes, self.box_values),
                ("scores", level.scores, self.classes),
                ("objectness", level.objectness, 1),
                ("points", level.points, 2 * self.points),
            ):
                if values is not None and count:
                    yield name, level, values, count

    @model_validator(mode="after")
    def _sensible(self) -> Detector:
        if self.rows > MAX_ROWS:
            raise ValueError(f"{self.rows} boxes are more than {MAX_ROWS}")
        if self.background is not None and self.background >= self.classes:
            raise ValueError(
                f"background {self.background} is beyond the last of {counted(self.classes, 'class')}"
            )
        if self.points and any(level.points is None for level in self.levels):
            raise ValueError("a level does not say where its points lie")
        return self


class Task(Section):
    """What a network is for.

    Attributes:
        detector: where the kind is "detect".
        class_axis: of a segmentation's first output; None where it is a map of classes already.
    """

    kind: Kind
    detector: Detector | None = None
    class_axis: Annotated[int, Field(ge=0, lt=8)] | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Task:
        if (self.kind == "detect") != (self.detector is not None):
            raise ValueError("detect needs a detector, and nothing else has one")
        return self

    def check(self, shapes: Sequence[tuple[int, ...]]) -> None:
        """Compare with the shapes of the network's outputs.

        Raises:
            ValueError: it would read what is not there.
        """
        if self.class_axis is not None and self.class_axis >= len(shapes[0]):
            raise ValueError(f"output 0 has no axis {self.class_axis}")
        sides = [n for axis, n in enumerate(shapes[0]) if axis != self.class_axis]
        if self.kind == "segment" and sum(side != 1 for side in sides) > 2:
            raise ValueError(f"output 0 {list(shapes[0])} is no map of classes")
        read = [0] * len(shapes)
        for name, level, values, count in (
            self.detector.parts() if self.detector else ()
        ):
            last = (
                values.first
                + (level.cells - 1) * values.cell
                + (len(level.anchors) - 1) * values.anchor
                + (count - 1) * values.step
            )
            if values.output >= len(shapes) or last >= prod(shapes[values.output]):
                raise ValueError(f"{name} do not lie in output {values.output}")
            # Memory for what is read is bounded by what there is.
            read[values.output] += level.rows * count
            if read[values.output] > prod(shapes[values.output]):
                raise ValueError(f"{name} are read twice of output {values.output}")


def scores_classes(shape: tuple[int, ...], dtype: object, outputs: int) -> bool:
    """Whether a network's first output is one score a class: float32 [1, classes], or with trailing 1s.

    Of several ``outputs`` [1, n, 1] is none: a detector has such, for the n boxes of a stride.
    """
    listed = outputs > 1 and len(shape) == 3
    one_each = len(shape) >= 2 and prod(shape) == shape[1]
    return str(dtype).startswith("float") and one_each and not listed
