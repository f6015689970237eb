"""The boxes that a network found in one photograph."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


class Detections(NamedTuple):
    """Boxes in pixels of the photograph.

    Attributes:
        boxes: float32 [N, 4], (x1, y1, x2, y2).
        scores: float32 [N].
        classes: int32 [N].
        points: float32 [N, K, 2], such as the eyes of a face.
    """

    boxes: NDArray[np.float32]
    scores: NDArray[np.float32]
    classes: NDArray[np.int32]
    points: NDArray[np.float32]
