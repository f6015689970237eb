"""The validation page: estimates against published times, as HTML with one plot."""

from __future__ import annotations

from math import ceil, floor, log10
from pathlib import Path
from typing import NamedTuple

from netship.bench.baselines import runtimes
from netship.bench.validation import CLOSE, HALVES, Validation, summary
from netship.targets import templates

_WIDTH, _HEIGHT = 640, 420
_LEFT, _RIGHT, _TOP, _BOTTOM = 60, 624, 12, 372
_STEPS = (1, 2, 5)
# Of the base page's colours.
_CLASSES = "abcde"


class Dot(NamedTuple):
    """A pair in the plot; ``css`` is its core's class."""

    x: float
    y: float
    css: str
    title: str


class Tick(NamedTuple):
    """A place on an axis."""

    at: float
    label: str


class Plot(NamedTuple):
    """Published times to the right, estimates upwards, both logarithmic; the line is where they agree."""

    width: int
    height: int
    dots: list[Dot]
    across: list[Tick]
    upwards: list[Tick]
    line: tuple[float, float, float, float]


def write_validation(validation: Validation, path: Path) -> None:
    """Write the page whole or not at all; one that is there is replaced."""
    cpus = sorted({pair.source.cpu for pair in validation.pairs})
    templates.write_page(
        path,
        "--report",
        Path(__file__).with_name("validation.html.jinja"),
        validation=validation,
        summaries=[summary(name, pairs) for name, pairs in validation.groups()],
        sources=list(dict.fromkeys(pair.source for pair in validation.pairs)),
        titles={name: baseline.title for name, baseline in runtimes.BASELINES.items()},
        plot=_plot(validation, cpus),
        colours=list(zip(cpus, _CLASSES, strict=False)),
        close=CLOSE,
        halves=HALVES,
    )


def _plot(validation: Validation, cpus: list[str]) -> Plot | None:
    known = [(p, p.estimate) for p in validation.pairs if p.estimate]
    if not known:
        return None
    times = [t for pair, estimate in known for t in (pair.published, estimate)]
    low, high = log10(min(times)), log10(max(times))
    margin = 0.08 * (high - low) or 0.1
    low, high = low - margin, high + margin

    def place(value: float, start: float, end: float) -> float:
        share = (log10(value) - low) / (high - low)
        return round(start + share * (end - start), 1)

    dots = [
        Dot(
            place(pair.published, _LEFT, _RIGHT),
            place(estimate, _BOTTOM, _TOP),
            _CLASSES[cpus.index(pair.source.cpu) % len(_CLASSES)],
            f"{pair.network} on {pair.source.board}: {pair.published:.1f} ms published, "
            f"{estimate:.1f} ms estimated",
        )
        for pair, estimate in known
    ]
    decades = range(floor(low), ceil(high) + 1)
    marks = [
        step * 10.0**decade
        for decade in decades
        for step in _STEPS
        if low <= log10(step * 10.0**decade) <= high
    ]
    return Plot(
        _WIDTH,
        _HEIGHT,
        dots,
        [Tick(place(m, _LEFT, _RIGHT), f"{m:g}") for m in marks],
        [Tick(place(m, _BOTTOM, _TOP), f"{m:g}") for m in marks],
        (_LEFT, _BOTTOM, _RIGHT, _TOP),
    )
