"""Our boxes of a photograph against the reference's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from netship.bundle.detections import Detections
from netship.targets.escapes import counted

LEAST_IOU = 0.5
"""Intersection ÷ union from which on two boxes of one class show the same object."""


class Match(NamedTuple):
    """Which of our boxes are the reference's.

    Attributes:
        ious: of each pair of boxes, intersection ÷ union [matched].
        score_differences: of each pair, absolute [matched].
        missing: boxes of the reference that have no partner among ours.
        extra: boxes of ours that have none among the reference's.
        invalid: of ours, how many have a score or a side that is not finite; they are extra too.
    """

    ious: NDArray[np.float64]
    score_differences: NDArray[np.float64]
    missing: int
    extra: int
    invalid: int

    @property
    def matched(self) -> int:
        return len(self.ious)

    @property
    def same(self) -> bool:
        return not self.missing and not self.extra

    def to_json(self) -> dict[str, Any]:
        some = self.matched > 0
        return {
            "matched": self.matched,
            "missing": self.missing,
            "extra": self.extra,
            "invalid": self.invalid,
            "mean_iou": float(self.ious.mean()) if some else None,
            "least_iou": float(self.ious.min()) if some else None,
            "max_score_difference": float(self.score_differences.max())
            if some
            else None,
        }

    def text(self) -> str:
        """Such as ``3 of 3 boxes matched, 0 missing, 0 extra; IoU mean 1.0000, least 1.0000; scores to 1.2e-07``."""
        if not self.matched + self.missing + self.extra:
            return "no box in either answer"
        text = f"{self.matched} of {counted(self.matched + self.missing, 'box')} matched, {self.missing} missing, {self.extra} extra"
        if self.matched:
            text += (
                f"; IoU mean {self.ious.mean():.4f}, least {self.ious.min():.4f}; "
                f"scores at most {self.score_differences.max():.1e} apart"
            )
        return text + (f"; {self.invalid} not finite" if self.invalid else "")


def match(ours: Detections, reference: Detections) -> Match:
    """Pair boxes greedily: each of ours, the best score first, with the free box of its class that it overlaps most.

    A pair has an IoU of at least `LEAST_IOU`. Boxes that are not finite find no partner.
    """
    usable, free = _finite(ours), _finite(reference)
    ious: list[float] = []
    differences: list[float] = []
    for index in np.argsort(-ours.scores, kind="stable"):
        candidates = free & (reference.classes == ours.classes[index])
        if not usable[index] or not candidates.any():
            continue
        places = np.flatnonzero(candidates)
        overlaps = _iou(ours.boxes[index], reference.boxes[places])
        best = int(overlaps.argmax())
        if overlaps[best] < LEAST_IOU:
            continue
        partner = places[best]
        free[partner] = False
        ious.append(float(overlaps[best]))
        difference = float(ours.scores[index]) - float(reference.scores[partner])
        differences.append(abs(difference))
    return Match(
        np.array(ious),
        np.array(differences),
        missing=len(reference.scores) - len(ious),
        extra=len(ours.scores) - len(ious),
        invalid=int((~usable).sum()),
    )


def total(matches: Sequence[Match]) -> Match:
    """All photographs as one."""
    return Match(
        np.concatenate([each.ious for each in matches]),
        np.concatenate([each.score_differences for each in matches]),
        missing=sum(each.missing for each in matches),
        extra=sum(each.extra for each in matches),
        invalid=sum(each.invalid for each in matches),
    )


def _finite(detections: Detections) -> NDArray[np.bool_]:
    finite: NDArray[np.bool_] = np.isfinite(detections.scores)
    return finite & np.isfinite(detections.boxes).all(axis=1)


def _iou(box: NDArray[np.float32], boxes: NDArray[np.float32]) -> NDArray[np.float64]:
    """Intersection ÷ union of one box with each of ``boxes`` [N, 4].

    Of two with less than a pixel together, such as boxes that end at the photograph's border, it is rounding: it is 1
    where no side is off by half a pixel.
    """
    one, many = box.astype(np.float64), boxes.astype(np.float64)
    low, high = np.maximum(one[:2], many[:, :2]), np.minimum(one[2:], many[:, 2:])
    common = np.clip(high - low, 0, None).prod(axis=1)
    areas = np.clip(many[:, 2:] - many[:, :2], 0, None).prod(axis=1)
    union = areas + np.clip(one[2:] - one[:2], 0, None).prod() - common
    near: NDArray[np.float64] = (np.abs(one - many).max(axis=1) < 0.5).astype(float)
    np.divide(common, union, out=near, where=union >= 1)
    return near
