"""How far an int8 network's answers are from float32's, on photographs that did not calibrate it, and whether that is too far."""

from __future__ import annotations

from collections.abc import Sequence
from math import comb, sqrt
from typing import Any, NamedTuple

import numpy as np
import onnx
from numpy.typing import NDArray

from netship.bundle.accuracy import INT8_COSINE, cosine
from netship.compile.frontend.model import Model
from netship.compile.frontend.reference import opened, with_outputs
from netship.compile.quantize.agreement import classifies
from netship.compile.quantize.calibrate import Sample
from netship.targets.escapes import counted

Array = NDArray[Any]

NEAR_TIE = 0.1
"""Two classes are a near tie where float32's scores differ by at most so many standard deviations of its scores."""
# Of the images on which the best class may differ; fewer than one in twenty samples of so good a network are refused.
_MAY_DIFFER = 1 / 16
_UNLIKELY = 0.05
# Before the scores' softmax or behind it: what moves or stores values.
_MOVES = (
    "DequantizeLinear",
    "Flatten",
    "Identity",
    "QuantizeLinear",
    "Reshape",
    "Squeeze",
    "Unsqueeze",
)


class Judged(NamedTuple):
    """An int8 network against float32.

    Attributes:
        cosine: the least of an output, over all images together.
        decibels: the least signal to noise of an output, over all images together.
        same: of a classifier, on how many images the best class is float32's, or a near tie of it; else None.
        ties: of these the near ties.
    """

    cosine: float
    decibels: float
    images: int
    same: int | None
    ties: int = 0

    @property
    def good(self) -> bool:
        """As near as a build aims at."""
        differ = 0 if self.same is None else self.images - self.same
        return self.cosine >= INT8_COSINE and differ <= max(1, self.images // 16)

    @property
    def refused(self) -> bool:
        """Too far, and not by the chance of these images: a good network would be as far on fewer than 5 % of such sets."""
        if self.cosine < INT8_COSINE:
            return True
        differ = 0 if self.same is None else self.images - self.same
        fewer = sum(
            comb(self.images, k)
            * _MAY_DIFFER**k
            * (1 - _MAY_DIFFER) ** (self.images - k)
            for k in range(differ)
        )
        return 1 - fewer < _UNLIKELY

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's 95 % interval of the share of images with the same best class."""
        n, z = self.images, 1.96
        share = (self.same or 0) / n
        middle = (share + z * z / (2 * n)) / (1 + z * z / n)
        half = z * sqrt(share * (1 - share) / n + (z / (2 * n)) ** 2) / (1 + z * z / n)
        return max(middle - half, 0.0), min(middle + half, 1.0)

    def text(self) -> str:
        found = f"cosine {self.cosine:.4f}, signal to noise {self.decibels:.1f} dB"
        if self.same is None:
            return found
        low, high = self.interval
        ties = f", {counted(self.ties, 'near tie')} counted in" if self.ties else ""
        return (
            f"best class as float32's on {self.same} of {self.images} (95 % interval {low:.0%} to {high:.0%}{ties}), "
            f"{found}"
        )


RULE = (
    f"cosine at least {INT8_COSINE}; best class float32's or a near tie of it, {NEAR_TIE} standard deviations of the "
    "scores, on all but 1 of 16 images and what chance explains at 5 %"
)


def answers(model: Model, samples: Sequence[Sample]) -> list[list[Array]]:
    """Every output of each inference; of a classifier's softmax the input less its mean, which a softmax does not see."""
    names = [each.name for each in model.outputs]
    scores = _scores(model.proto, names[0]) if classifies(model) else ""
    if scores:
        names = [scores]
    session = opened(with_outputs(model.proto, names), model.identity.name)
    found = [session.run(names, model.feeds(sample)) for sample in samples]
    if scores:
        found = [[each - each.mean() for each in outputs] for outputs in found]
    return found


def _scores(proto: onnx.ModelProto, output: str) -> str:
    """The tensor that the last softmax reads; "" where the network does not end in one."""
    makers = {name: node for node in proto.graph.node for name in node.output}
    node = makers.get(output)
    while node is not None and node.op_type in _MOVES:
        node = makers.get(node.input[0])
    ends = node is not None and node.op_type in ("LogSoftmax", "Softmax")
    return node.input[0] if node is not None and ends else ""


def judge(
    model: Model, ours: Sequence[Sequence[Array]], theirs: Sequence[Sequence[Array]]
) -> Judged:
    """int8's answers against float32's, as `answers` gives them."""
    cosines, ratios = [], []
    for k in range(len(theirs[0])):
        a, b = (
            np.concatenate([each[k].ravel() for each in side]).astype(np.float64)
            for side in (ours, theirs)
        )
        cosines.append(cosine(a, b))
        noise = float(((a - b) ** 2).sum()) or 1e-30
        ratios.append(10 * float(np.log10((float((b**2).sum()) or 1e-30) / noise)))
    least = Judged(float(np.min(cosines)), float(np.min(ratios)), len(theirs), None)
    if not classifies(model):
        return least
    scores = [each[0].ravel().astype(np.float64) for each in theirs]
    spread = float(np.std([each - each.mean() for each in scores]))
    same = ties = 0
    for mine, exact in zip(ours, scores, strict=True):
        gap = float(exact.max() - exact[int(mine[0].argmax())])
        same += gap <= NEAR_TIE * spread
        ties += 0 < gap <= NEAR_TIE * spread
    return least._replace(same=same, ties=ties)
