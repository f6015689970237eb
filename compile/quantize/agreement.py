"""How near an int8 network's answers are to float32's on the calibration images, and whether a build accepts that."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from netship.bundle import boxes
from netship.bundle.accuracy import INT8_COSINE, cosine
from netship.bundle.decode import decode
from netship.bundle.task import Task
from netship.compile.frontend.model import Model
from netship.targets.escapes import counted, shown

Answer = Sequence[NDArray[Any]]

LEAST_IOU = 0.8
"""Intersection ÷ union from which on int8 has float32's box."""
SCORE_DIFFERENCE = 0.1
"""How far apart the scores of one box may be in int8 and float32."""


class Boxes(NamedTuple):
    """Boxes in int8 and in float32, on all images.

    Attributes:
        judged: boxes of both together.
        wrong: of these, how many have no partner with `LEAST_IOU` and `SCORE_DIFFERENCE`. A partner may have a score
            below the detector's threshold, by `SCORE_DIFFERENCE` at most.
        matched: by the detector's own threshold.
    """

    judged: int
    wrong: int
    matched: boxes.Match

    def text(self) -> str:
        return (
            f"{self.judged - self.wrong} of {counted(self.judged, 'box')} of int8 and float32 agree (IoU at least {LEAST_IOU}, "
            f"scores at most {SCORE_DIFFERENCE} apart): {self.matched.text()}"
        )


class Agreement(NamedTuple):
    """Answers in int8 against those in float32.

    Attributes:
        cosine, output: the smallest cosine of an output, and the output's name. Of a classifier it is that of each
            inference. An output of another network is compared over all inferences at once: a detector's scores where
            nothing is to be seen are near 0, and their direction means nothing.
        same: on how many images the best class is float32's; None where the network is no classifier.
        boxes: of a detector whose decoding is known.
    """

    images: int
    cosine: float
    output: str
    same: int | None
    boxes: Boxes | None

    @property
    def enough(self) -> bool:
        """Whether a build accepts the loss: by boxes where there are such, else by cosine and class."""
        if self.boxes and self.boxes.judged:
            return self.boxes.wrong <= self.boxes.judged // 16
        wrong = 0 if self.same is None else self.images - self.same
        return self.cosine >= INT8_COSINE and wrong <= max(1, self.images // 16)

    @property
    def rank(self) -> tuple[bool, int, float]:
        """Larger is better."""
        return self.enough, -(self.boxes.wrong if self.boxes else 0), self.cosine

    def text(self, outputs: int) -> str:
        """What is lost, for a person.

        Args:
            outputs: how many the network has.
        """
        words = f"cosine {self.cosine:.4f}"
        if outputs > 1:
            words += f" of output {shown(self.output)!r}"
        if self.boxes and self.boxes.judged:
            return f"{self.boxes.text()}; {words}"
        words += f" (at least {INT8_COSINE})"
        if self.same is None:
            return words
        return f"top-1 as float32's on {self.same} of {counted(self.images, 'image')}, {words}"


def agreement(
    model: Model, ours: Sequence[Answer], theirs: Sequence[Answer], task: Task | None
) -> Agreement:
    """Compare the outputs of each inference.

    Args:
        ours, theirs: in int8, and in float32.
        task: what the outputs are for, where that is known.
    """
    least, output = _least_cosine(model, ours, theirs)
    same = None
    if classifies(model):
        pairs = zip(ours, theirs, strict=True)
        same = sum(int(a[0].argmax()) == int(b[0].argmax()) for a, b in pairs)
    found = None
    if task and task.detector and model.image:
        found = _boxes(task, ours, theirs, model.image.size)
    return Agreement(len(ours), least, output, same, found)


def classifies(model: Model) -> bool:
    """Whether the only output is one score a class."""
    shape = model.outputs[0].shape
    return len(model.outputs) == 1 and prod(shape) == max(shape, default=1)


def _least_cosine(
    model: Model, ours: Sequence[Answer], theirs: Sequence[Answer]
) -> tuple[float, str]:
    one_each = classifies(model)
    found = []
    for number, output in enumerate(model.outputs):
        pairs = [
            (a[number].ravel(), b[number].ravel())
            for a, b in zip(ours, theirs, strict=True)
        ]
        if not one_each:
            first, second = zip(*pairs, strict=True)
            pairs = [(np.concatenate(first), np.concatenate(second))]
        found += [(cosine(a, b), output.name) for a, b in pairs]
    return min(found)


def _boxes(
    task: Task,
    ours: Sequence[Answer],
    theirs: Sequence[Answer],
    size: tuple[int, int],
) -> Boxes:
    assert task.detector
    low = max(task.detector.score_threshold - SCORE_DIFFERENCE, 0.0)
    detector = task.detector.model_copy(update={"score_threshold": low})
    lower = task.model_copy(update={"detector": detector})
    judged = wrong = 0
    matches = []
    for pair in zip(ours, theirs, strict=True):
        int8, exact = (decode(task, each, size) for each in pair)
        matches.append(boxes.match(int8, exact))
        int8_low, exact_low = (decode(lower, each, size) for each in pair)
        for some, others in ((int8_low, exact), (exact_low, int8)):
            found = boxes.match(some, others)
            near = found.ious >= LEAST_IOU
            near &= found.score_differences <= SCORE_DIFFERENCE
            judged += len(others.scores)
            wrong += len(others.scores) - int(near.sum())
    return Boxes(judged, wrong, boxes.total(matches))
