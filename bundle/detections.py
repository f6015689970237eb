"""What a detector found in one picture."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from netship.bundle.photos import Placement

Floats = NDArray[np.float32]


class Detections(NamedTuple):
    """Boxes, the best first; equal scores stay in the order of the network's outputs.

    Attributes:
        boxes: float32 [N, 4]: x1, y1, x2, y2, in pixels of the input tensor, or of the photograph after
            `on_photograph`; they may reach beyond the picture before it.
        scores: float32 [N].
        classes: int32 [N]: the index of the score; the background counts, where there is one.
        points: float32 [N, K, 2]: x and y of the K points of each box, K being 0 for most detectors.
    """

    boxes: Floats
    scores: Floats
    classes: NDArray[np.int32]
    points: Floats


def on_photograph(
    found: Detections, placement: Placement, size: tuple[int, int]
) -> Detections:
    """From the input tensor's pixels to those of a photograph of this (width, height); boxes end at its borders."""
    offset = np.array([placement.left, placement.top])
    scale = np.array([placement.scale_x, placement.scale_y])
    points = ((found.points - offset) / scale).astype(np.float32)
    return found._replace(
        boxes=placement.to_photograph(found.boxes, size), points=points
    )
