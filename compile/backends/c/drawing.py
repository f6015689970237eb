"""The memory plan as a drawing: steps to the right, addresses upwards."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from netship.compile.program.planner import Plan
from netship.targets.escapes import ending

_COLUMN = 40
_HEIGHT = 360
_LEFT, _RIGHT, _TOP, _BOTTOM = 70, 20, 50, 130
_LETTER, _LINE = 6, 16
_TENSOR, _SCRATCH = "#7aa6d6", "#e8c07d"
_TICKS = 4
# Of a step's name, the letters that have room below.
_LETTERS = 24


def geometry(arena: Plan, steps: Sequence[str]) -> dict[str, Any]:
    """What memory.svg.jinja draws, in pixels: one box for each tensor and each scratch memory.

    Args:
        steps: their names.
    """
    scale = _HEIGHT / arena.nbytes
    floor = _TOP + _HEIGHT
    boxes = [
        {
            "x": _LEFT + b.first * _COLUMN,
            "y": round(floor - b.offset * scale - b.nbytes * scale, 1),
            "width": (b.last - b.first + 1) * _COLUMN,
            "height": round(b.nbytes * scale, 1),
            "fill": _SCRATCH if b.tensor is None else _TENSOR,
            "title": f"{b.name}: {b.nbytes:,} bytes at {b.offset:,}, steps {b.first} to {b.last}",
            "label": b.name,
        }
        for b in arena.buffers
    ]
    for box in boxes:
        if not _fits(box, boxes):
            box["label"] = ""
    return {
        "left": _LEFT,
        "right": _RIGHT,
        "bottom": _BOTTOM,
        "column": _COLUMN,
        "width": _LEFT + len(steps) * _COLUMN + _RIGHT,
        "height": floor + _BOTTOM,
        "bound_y": round(floor - arena.lower_bound * scale, 1),
        "borders": [
            (round(floor - each.begin * scale, 1), each.name) for each in arena.arenas
        ],
        "ticks": [
            {"bytes": arena.nbytes * i // _TICKS, "y": floor - _HEIGHT * i / _TICKS}
            for i in range(_TICKS + 1)
        ],
        "below": [(ending(name, _LETTERS), name) for name in steps],
        "boxes": boxes,
        "legend": [
            (_LEFT, _TENSOR, 0.7, "tensor"),
            (_LEFT + 80, _SCRATCH, 0.7, "scratch memory of a step"),
            (_LEFT + 250, _TENSOR, 1, "output that takes its input's place"),
        ],
    }


def _fits(box: dict[str, Any], boxes: Sequence[dict[str, Any]]) -> bool:
    """Whether the label has room inside and lies under no edge of another box."""
    width = _LETTER * len(box["label"]) + 8
    if box["height"] < _LINE or box["width"] < width:
        return False
    return not any(
        other is not box
        and other["x"] < box["x"] + width
        and box["x"] < other["x"] + other["width"]
        and other["y"] < box["y"] + _LINE
        and box["y"] < other["y"] + other["height"]
        for other in boxes
    )
