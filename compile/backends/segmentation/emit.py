"""Write the classes of pixels of a segmenting network as C99, with the shape of its output as constants."""

from __future__ import annotations

from math import prod
from pathlib import Path

from netship.bundle.decode import MOST_CLASSES, NO_CLASS, NOT_SEEN
from netship.bundle.task import Task
from netship.compile.backends import companions
from netship.compile.backends.companions import Port
from netship.targets.escapes import c_float

_HERE = Path(__file__).parent


def write(
    folder: Path,
    name: str,
    version: str,
    task: Task,
    input_size: tuple[int, int],
    port: Port,
) -> None:
    """Write ``NAME_segment.h`` and ``NAME_segment.c`` into ``folder``.

    Args:
        name: the prefix of what they declare.
        version: what the code says of itself.
        input_size: height and width.
        port: the first output.
    """
    axis, strides = task.class_axis, _strides(port)
    (lines, down), (columns, across) = map_sides(task, port)
    values = {
        "version": version,
        "height": input_size[0],
        "width": input_size[1],
        "port": port,
        "quantised": (port.scale, port.zero) != (1.0, 0),
        "scores": axis is not None,
        "lines": lines,
        "columns": columns,
        "classes": MOST_CLASSES if axis is None else port.shape[axis],
        "strides": (down, across, 0 if axis is None else strides[axis]),
        "no_class": NO_CLASS,
        "not_seen": NOT_SEEN,
    }
    companions.write(folder, name, "segment", _HERE, values, c_float=c_float)


def map_sides(task: Task, port: Port) -> list[tuple[int, int]]:
    """Lines and columns of the map of classes, each with the distance of neighbours in the output's memory.

    A map with a side of 1 is one line, as `bundle.decode.segment` has it.
    """
    sides = zip(port.shape, _strides(port), strict=True)
    long = [
        pair for k, pair in enumerate(sides) if k != task.class_axis and pair[0] != 1
    ]
    return [(1, 0), (1, 0), *long][-2:]


def _strides(port: Port) -> list[int]:
    """How far apart neighbours along each axis lie in memory."""
    order = [*range(len(port.shape))]
    if port.channels_last and len(order) == 4:
        order = [0, 2, 3, 1]
    found = [0] * len(order)
    for place, axis in enumerate(order):
        found[axis] = prod(port.shape[each] for each in order[place + 1 :])
    return found
