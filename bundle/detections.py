"""What a detector found in one picture."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

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
    found: Detections,
    scale: tuple[float, float],
    offset: tuple[float, float],
    size: tuple[int, int],
) -> Detections:
    """From the input tensor's pixels to the photograph's, cut off at its borders.

    Args:
        scale, offset: of x and y: pixel of the input = pixel of the photograph × scale + offset.
        size: width and height of the photograph.
    """
    moved = np.asarray(offset, np.float32)
    factors = np.asarray(scale, np.float32)
    corners = (found.boxes.reshape(-1, 2, 2) - moved) / factors
    corners = corners.clip(0, np.asarray(size, np.float32))
    points = (found.points - moved) / factors
    return found._replace(boxes=corners.reshape(-1, 4), points=points)
