"""Which pixels a nearest Resize takes: ONNX's ways to place them, and LiteRT's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

_Place = Callable[[Any, int, int], Any]

# ONNX, operator Resize: coordinate_transformation_mode and nearest_mode.
_ONNX: dict[str, _Place] = {
    "half_pixel": lambda i, old, new: (i + 0.5) * old / new - 0.5,
    "pytorch_half_pixel": lambda i, old, new: (i + 0.5) * old / new - 0.5,
    "asymmetric": lambda i, old, new: i * old / new,
    "align_corners": lambda i, old, new: i * (old - 1) / max(new - 1, 1),
}
_ROUNDED: dict[str, Callable[[Any], Any]] = {
    "floor": np.floor,
    "ceil": np.ceil,
    "round_prefer_floor": lambda x: np.ceil(x - 0.5),
    "round_prefer_ceil": lambda x: np.floor(x + 0.5),
}
# LiteRT's reference kernel, resize_nearest_neighbor.h.
_LITERT: dict[str, _Place] = {
    "asymmetric": lambda i, old, new: np.floor(i * old / new),
    "half_pixel": lambda i, old, new: np.floor((i + 0.5) * old / new),
    "align_corners": lambda i, old, new: np.floor(
        i * (old - 1) / max(new - 1, 1) + 0.5
    ),
}


def same_pixels(place: str, rounding: str, sizes: Sequence[tuple[int, int]]) -> str:
    """LiteRT's way that takes the same pixels as ONNX's; empty where none does.

    Args:
        place: ONNX's coordinate_transformation_mode; rounding: its nearest_mode.
        sizes: of each axis, before and after.
    """
    wanted = [
        _taken(_ROUNDED[rounding](_ONNX[place](np.arange(new), old, new)), old)
        for old, new in sizes
        if place in _ONNX
    ]
    for name, way in _LITERT.items():
        found = [_taken(way(np.arange(new), old, new), old) for old, new in sizes]
        if wanted == found:
            return name
    return ""


def _taken(positions: Any, size: int) -> list[int]:
    taken: list[int] = np.clip(positions, 0, size - 1).astype(int).tolist()
    return taken
