"""A roofline as a drawing: kernels as points under what a core and its memory allow."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import ceil, floor, log2
from typing import NamedTuple

from netship.meter.builds import Build
from netship.meter.roofline import Roof, roof

# The drawing, in units of its viewBox.
WIDTH, HEIGHT = 460.0, 300.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 38.0, 14.0, 12.0, 36.0


class Point(NamedTuple):
    """A kernel in the drawing: its place, its radius by its share, the letter of its build, and what it is."""

    x: float
    y: float
    radius: float
    series: int
    title: str


class Line(NamedTuple):
    """A roof's corners, as a polyline's points; ``words`` stand above its flat part."""

    points: str
    x: float
    y: float
    words: str


class Drawing(NamedTuple):
    """Multiply-adds a cycle against multiply-adds for a byte from memory, both in powers of two.

    Attributes:
        across: x and text of each mark of the axis, up: y and text.
    """

    points: tuple[Point, ...]
    roofs: tuple[Line, ...]
    across: tuple[tuple[float, str], ...]
    up: tuple[tuple[float, str], ...]


def drawing(builds: Sequence[Build]) -> Drawing | None:
    """The kernels of builds on one core under its roofs; None on several threads, or without multiply-adds."""
    roofs = [found for build in builds if (found := roof(build.metered))]
    heavy = [
        (index, build.metered, each)
        for index, build in enumerate(builds)
        for each in build.metered.operators
        if each.macs and each.cycles
    ]
    if len(roofs) < len(builds) or not heavy:
        return None
    peaks = sorted({each.macs for each in roofs})
    ridges = [each.macs / each.bytes for each in roofs]
    dense = [m.macs / m.memory_bytes for _, _, m in heavy if m.memory_bytes]
    rates = [each.macs / each.cycles for _, _, each in heavy]
    across = [*dense, *ridges]
    x = _Axis(min(across) / 2, max(across) * 2, _LEFT, WIDTH - _RIGHT)
    low = max(min(rates), peaks[-1] / 1024)
    y = _Axis(low, peaks[-1] * 1.2, HEIGHT - _BOTTOM, _TOP)
    points = [
        Point(
            # Without a byte from memory it has no place: the right edge.
            x.at(each.macs / each.memory_bytes if each.memory_bytes else x.high),
            y.at(each.macs / each.cycles),
            3 + 14 * (each.cycles / metered.cycles) ** 0.5,
            index,
            f"{builds[index].name}: {each.title}",
        )
        for index, metered, each in heavy
    ]
    points.sort(key=lambda point: -point.radius)
    lines = [_line(Roof(peak, roofs[0].bytes), builds, x, y) for peak in peaks]
    return Drawing(tuple(points), tuple(lines), tuple(x.marks()), tuple(y.marks()))


def _line(over: Roof, builds: Sequence[Build], x: _Axis, y: _Axis) -> Line:
    ridge = over.macs / over.bytes
    left = max(x.low, y.low / over.bytes)
    corners = [(left, left * over.bytes), (ridge, over.macs), (x.high, over.macs)]
    numbers = dict.fromkeys(
        build.metered.numbers for build in builds if build.metered.peak == over.macs
    )
    words = f"{' and '.join(numbers)}: {over.macs:g} a cycle"
    points = " ".join(f"{x.at(a):.1f},{y.at(b):.1f}" for a, b in corners)
    return Line(points, x.at(x.high), y.at(over.macs) - 4, words)


class _Axis:
    """From a power of two to another one."""

    def __init__(self, low: float, high: float, start: float, end: float) -> None:
        self._first, self._last = floor(log2(low)), ceil(log2(high))
        self._start, self._end = start, end

    @property
    def low(self) -> float:
        return 2.0**self._first

    @property
    def high(self) -> float:
        return 2.0**self._last

    def at(self, value: float) -> float:
        share = (log2(value) - self._first) / (self._last - self._first)
        return self._start + (self._end - self._start) * min(max(share, 0.0), 1.0)

    def marks(self) -> Iterator[tuple[float, str]]:
        step = ceil((self._last - self._first) / 6)
        for power in range(self._first, self._last + 1, step):
            text = f"{2**power:,}" if power >= 0 else f"1/{2**-power}"
            yield self.at(2.0**power), text
