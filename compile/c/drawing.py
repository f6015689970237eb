"""The memory plan as a drawing: steps to the right, addresses upwards."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from compile.c.plan import SCRATCH, Arena
from compile.c.steps import Step

_COLUMN = 40
_HEIGHT = 360
_LEFT, _RIGHT, _TOP, _BOTTOM = 70, 20, 20, 130
_TENSOR, _SCRATCH = "#7aa6d6", "#e8c07d"
_TICKS = 4


def geometry(arena: Arena, steps: Sequence[Step]) -> dict[str, Any]:
    """What memory.svg.jinja draws, in pixels: one box for each tensor and each scratch memory."""
    scale = _HEIGHT / arena.nbytes
    floor = _TOP + _HEIGHT

    def box(
        name: str, offset: int, nbytes: int, first: int, last: int
    ) -> dict[str, Any]:
        width, height = (last - first + 1) * _COLUMN, nbytes * scale
        roomy = height > 16 and width >= 6 * len(name)
        return {
            "x": _LEFT + first * _COLUMN,
            "y": round(floor - (offset + nbytes) * scale, 1),
            "width": width,
            "height": round(height, 1),
            "fill": _SCRATCH if name.startswith(SCRATCH) else _TENSOR,
            "title": f"{name}: {nbytes:,} bytes at {offset:,}, steps {first} to {last}",
            "label": name if roomy else "",
        }

    return {
        "left": _LEFT,
        "right": _RIGHT,
        "bottom": _BOTTOM,
        "column": _COLUMN,
        "width": _LEFT + len(steps) * _COLUMN + _RIGHT,
        "height": floor + _BOTTOM,
        "bound_y": round(floor - arena.lower_bound * scale, 1),
        "ticks": [
            {"bytes": arena.nbytes * i // _TICKS, "y": floor - _HEIGHT * i / _TICKS}
            for i in range(_TICKS + 1)
        ],
        "boxes": [
            box(b.name, b.offset, b.nbytes, b.first, b.last) for b in arena.buffers
        ],
    }
