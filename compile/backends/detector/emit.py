"""Write a detector's decoder as C99, with everything that the manifest says of it as constants."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from math import prod
from pathlib import Path

import numpy as np

from netship.bundle.task import Detector, Values
from netship.compile.backends import companions
from netship.compile.backends.companions import Port
from netship.targets.escapes import c_float

_HERE = Path(__file__).parent


def write(
    folder: Path,
    name: str,
    version: str,
    detector: Detector,
    input_size: tuple[int, int],
    ports: Sequence[Port],
) -> None:
    """Write ``NAME_detect.h`` and ``NAME_detect.c`` into ``folder``.

    Args:
        name: the prefix of what they declare.
        version: what the code says of itself.
        input_size: height and width.
        ports: the outputs, in the manifest's order.
    """
    used = sorted({values.output for _, _, values, _ in detector.parts()})
    rows = [0, *accumulate(level.rows for level in detector.levels)]
    values = {
        "version": version,
        "detector": detector,
        "height": input_size[0],
        "width": input_size[1],
        "ports": ports,
        "used": used,
        "rows": rows,
        "candidates": min(detector.candidates, rows[-1]),
        "most": min(detector.most, detector.candidates, rows[-1]),
        "uniform": {(p.dtype, p.scale, p.zero) for p in ports} == {("float32", 1.0, 0)},
        "objectness": detector.levels[0].objectness is not None,
        "anchored": detector.box not in ("corners", "centre") or detector.points,
        "parts": {
            (index, part): _place(values, ports)
            for index, level in enumerate(detector.levels)
            for part in ("boxes", "scores", "objectness", "points")
            if (values := getattr(level, part)) is not None
        },
    }
    filters = {"c_float": c_float, "c_decimal": lambda value: f"{np.float32(value)}f"}
    companions.write(folder, name, "detect", _HERE, values, **filters)


def _place(values: Values, ports: Sequence[Port]) -> list[int]:
    """Output, first, cell, anchor, step as the C has them in memory."""
    port = ports[values.output]
    distances = [values.first, values.cell, values.anchor, values.step]
    if port.channels_last and len(port.shape) == 4:
        channels, pixels = port.shape[1], prod(port.shape[2:])
        distances = [x // pixels + x % pixels * channels for x in distances]
    return [values.output, *distances]
