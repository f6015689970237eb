"""Write a detector's decoder as C99, with everything that the manifest says of it as constants."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import prod
from pathlib import Path

import numpy as np

from netship.bundle.task import Detector, Values
from netship.targets import templates
from netship.targets.escapes import C_TYPES, c_float

_HERE = Path(__file__).parent


@dataclass(frozen=True)
class Port:
    """An output as the network's C function writes it.

    Attributes:
        shape: the manifest's.
        channels_last: [1, channels, height, width] lies as height, width, channels.
        scale, zero: what stored integers mean: (q − zero) × scale.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str = "float32"
    channels_last: bool = False
    scale: float = 1.0
    zero: int = 0

    @property
    def c_type(self) -> str:
        return C_TYPES[self.dtype]


def files(name: str) -> tuple[str, str]:
    """The header and the source."""
    return f"{name}_detect.h", f"{name}_detect.c"


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
        "name": name,
        "NAME": name.upper(),
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
    environment = templates.code_environment(_HERE)
    environment.filters["c_float"] = c_float
    environment.filters["c_decimal"] = lambda value: f"{np.float32(value)}f"
    for file, template in zip(files(name), ("detect.h", "detect.c"), strict=True):
        text = environment.get_template(f"{template}.jinja").render(values)
        (folder / file).write_text(text, encoding="utf-8")


def _place(values: Values, ports: Sequence[Port]) -> list[int]:
    """Output, first, cell, anchor, step as the C has them in memory."""
    port = ports[values.output]
    distances = [values.first, values.cell, values.anchor, values.step]
    if port.channels_last and len(port.shape) == 4:
        channels, pixels = port.shape[1], prod(port.shape[2:])
        distances = [x // pixels + x % pixels * channels for x in distances]
    return [values.output, *distances]
