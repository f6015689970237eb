"""One self-contained HTML page of a check: no script, no network, no other file."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Sequence
from datetime import datetime
from functools import partial
from math import ceil, floor, isfinite, isnan, log10
from pathlib import Path
from typing import NamedTuple

import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray
from PIL import Image

from netship.bundle import photos
from netship.bundle.store import Bundle
from netship.devices.sessions.session import Origin
from netship.runtime_demo import drawing, microcontroller
from netship.runtime_demo.result import CheckResult, InputResult
from netship.targets import templates
from netship.targets.errors import UserError
from netship.targets.escapes import counted, megabytes, milliseconds
from netship.targets.presets import this_cpu

GALLERY_LIMIT = 48
"""Inputs shown one by one; of more, those that disagree or fail come first."""

_MEMORY = "memory.svg"
_THUMBNAIL_PIXELS = 240
_MARKED_PIXELS = 640
_DECADES, _BINS_A_DECADE = 8, 5
_LATENCY_BINS = 40


def write_report(result: CheckResult, path: Path) -> None:
    """Write the page whole or not at all; a report that is there is replaced."""
    manifest = result.bundle.manifest
    shown = _worth_showing(result.inputs)
    kernels = _kernels(result)
    templates.write_page(
        path,
        "--report",
        Path(__file__).with_name("report.html.jinja"),
        filters={
            "scientific": _scientific,
            "megabytes": _megabytes,
            "shape": _shape,
            "threads": partial(counted, noun="thread"),
            "milliseconds": milliseconds,
        },
        result=result,
        manifest=manifest,
        labels=result.bundle.labels(),
        written=datetime.now().astimezone(),
        place=_place(result.origin),
        shown=[(item, _pictures(item, result.bundle.labels())) for item in shown],
        left_out=len(result.inputs) - len(shown),
        kernels=kernels,
        macs=sum(_number(g.macs) or 0.0 for g in manifest.lowering.groups),
        errors=histogram(
            np.concatenate([item.errors for item in result.inputs]),
            _absolute_tolerance(result),
        ),
        latencies=distribution(_series(result)) if result.latency else None,
        memory=_drawing(result.bundle),
        misfits=microcontroller.misfits(result.figures) if result.figures else [],
        estimate=microcontroller.estimate(result.figures) if result.figures else None,
        bars=bars([(k.operators or k.name, k.microseconds) for k in kernels])
        if kernels
        else None,
    )


def _place(origin: Origin) -> str:
    """The origin, on this machine with its CPU."""
    return f"{origin}: {this_cpu().model}" if origin is Origin.HOST else str(origin)


def _worth_showing(inputs: Sequence[InputResult]) -> list[InputResult]:
    """At most ``GALLERY_LIMIT`` inputs: other answers first, then too large errors, then the rest."""
    by_worth = sorted(inputs, key=lambda r: (r.same_answer, r.accuracy.passed))
    return by_worth[:GALLERY_LIMIT]


def _pictures(item: InputResult, labels: Sequence[str]) -> list[str]:
    """Small JPEGs as data URIs: the photograph, or both answers drawn into it; none where it is no more, or is data."""
    if item.path is None:
        return []
    try:
        image = photos.read(item.path).image
    except (UserError, OSError):
        return []
    if item.found is None:
        image.thumbnail((_THUMBNAIL_PIXELS, _THUMBNAIL_PIXELS))
        return [_data_uri(image)]
    small = drawing.fitted(image, _MARKED_PIXELS)
    return [_data_uri(each) for each in item.found.draw(small, labels)]


def _data_uri(image: Image.Image) -> str:
    jpeg = io.BytesIO()
    image.save(jpeg, "JPEG", quality=82)
    return "data:image/jpeg;base64," + base64.b64encode(jpeg.getvalue()).decode()


def _drawing(bundle: Bundle) -> tuple[str, int] | None:
    """The arena's plan as a data URI, for an image: there no script runs; and its width. None where there is none."""
    if not bundle.manifest.is_source or _MEMORY not in bundle.manifest.files:
        return None
    drawing = (bundle.path / _MEMORY).read_bytes()
    size = re.search(rb'viewBox="0 0 ([0-9]{1,4}) ', drawing[:500])
    uri = "data:image/svg+xml;base64," + base64.b64encode(drawing).decode()
    return uri, int(size[1]) if size else 0


class _Kernel(NamedTuple):
    """One row of the table of kernels; None where the manifest or the clock does not say."""

    name: str
    layer: str
    operators: str
    output_shape: tuple[int, ...]
    microseconds: float
    share: float
    macs: float | None
    gigamacs_per_second: float | None


def _kernels(result: CheckResult) -> list[_Kernel]:
    """The measured kernels, in order, with what the manifest says of each."""
    lowering = result.bundle.manifest.lowering
    groups = lowering.groups_of(operator.name for operator in result.operators)
    total = sum(operator.seconds for operator in result.operators)
    rows = []
    for operator, group in zip(result.operators, groups, strict=True):
        name = operator.name.removeprefix("tvmgen_default_")
        macs = _number(group.macs) if group else None
        rate = macs / operator.seconds / 1e9 if macs and operator.seconds else None
        rows.append(
            _Kernel(
                name,
                group.layer if group else "",
                " + ".join(_plain(each) for each in group.operators) if group else "",
                operator.output_shape,
                operator.seconds * 1e6,
                operator.seconds / total if total else 0.0,
                macs,
                rate,
            )
        )
    return rows


def _plain(operator: str) -> str:
    return operator.removeprefix("nn.").removeprefix("contrib_")


def _number(value: object) -> float | None:
    """A number from a manifest, None for anything else and for a uselessly large one."""
    if isinstance(value, int | float) and abs(value) < 1e18:
        return float(value)
    return None


def _megabytes(value: object) -> str:
    number = _number(value)
    if number is None:
        return "not recorded"
    return megabytes(number).replace(" ", "\N{NO-BREAK SPACE}")


def _shape(sizes: Sequence[int]) -> str:
    return " × ".join(map(str, sizes))


def _scientific(value: object) -> str:
    """1.2e-06 as 1.2 × 10⁻⁶."""
    number = _number(value) if isinstance(value, int) else value
    if not isinstance(number, float):
        return "not recorded"
    if not isfinite(number):
        return "not a number" if isnan(number) else "infinite"
    mantissa, exponent = f"{number:.1e}".split("e")
    # No-break spaces: a number stays on one line.
    return (
        f"{mantissa}\N{NO-BREAK SPACE}×\N{NO-BREAK SPACE}{_power(int(exponent))}"
        if number
        else "0"
    )


def _power(exponent: int) -> str:
    return "10" + str(exponent).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))


def _absolute_tolerance(result: CheckResult) -> float | None:
    """Of int8 the tolerance in the first output's own unit; None where each element has its own."""
    if result.steps is None or result.step is None:
        return None
    return (result.steps.accepted + 0.5) * result.step


def _series(result: CheckResult) -> list[Series]:
    both = [
        ("this bundle", "ours", result.latency),
        (result.reference, "theirs", result.reference_latency),
    ]
    return [Series(name, css, times.samples) for name, css, times in both if times]


# Charts. Lengths are in the SVG's own unit, about a pixel; colours are the page's classes.

_WIDTH, _HEIGHT = 480, 270
_LEFT, _RIGHT, _TOP, _BOTTOM = 70, 466, 14, 222


class Chart(NamedTuple):
    """A drawing, and what a reader must know that is not in it (may be empty)."""

    svg: Markup
    notes: str


class Series(NamedTuple):
    """Times of one runtime in milliseconds, under its name and its CSS class."""

    name: str
    css: str
    samples: Sequence[float]


class _Scale(NamedTuple):
    """Values from ``low`` to ``high`` onto positions from ``start`` to ``end``."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        share = (value - self.low) / (self.high - self.low)
        return round(self.start + share * (self.end - self.start), 2)


def histogram(errors: NDArray[np.float64], tolerance: float | None) -> Chart | None:
    """How many errors there are of each size, on a logarithmic axis; None where all are 0.

    Args:
        errors: absolute errors [n] in the output's own unit; what is not finite is only counted.
        tolerance: where to draw the line that no error may cross, in the same unit.
    """
    drawn = errors[np.isfinite(errors) & (errors > 0)]
    if not drawn.size:
        return None
    high = ceil(log10(1.01 * max(float(drawn.max()), tolerance or 0.0)))
    low = max(floor(log10(float(drawn.min()))), high - _DECADES)
    edges = np.linspace(low, high, _BINS_A_DECADE * (high - low) + 1)
    counts = np.histogram(np.log10(drawn), edges)[0].tolist()
    x = _Scale(low, high, _LEFT, _RIGHT)
    y, parts = _vertical_axis(max(counts), "outputs", least_step=1)
    for left, right, count in zip(edges, edges[1:], counts, strict=False):
        size = f"{_scientific(10**left)} to {_scientific(10**right)}"
        parts.append(
            _bar("ours", x(left), x(right), y(count), _BOTTOM, f"{size}: {count:,}")
        )
    parts += _horizontal_axis(
        [(x(tick), _power(tick)) for tick in range(low, high + 1)],
        "|ours − reference|, in the output’s own unit",
    )
    if tolerance is not None and log10(tolerance) > low:
        at = x(log10(tolerance))
        parts.append(_line("bad", at, _TOP, at, _BOTTOM))
        parts.append(_text("bad", at - 6, _TOP + 12, "tolerance", "end"))
    under = int((errors < 10.0**low).sum())
    notes = f"{counted(errors.size, 'output')} in all"
    if under:
        notes += (
            f"; {under:,} of them, equal or nearer than {_power(low)}, are not drawn"
        )
    if strange := int((~np.isfinite(errors)).sum()):
        notes += f"; {strange:,} are infinite or not a number"
    return Chart(_svg("Error histogram", notes, parts), notes + ".")


def distribution(series: Sequence[Series]) -> Chart:
    """How long single inferences took, a histogram for each runtime on one axis.

    A few far slower ones would press the rest flat: those beyond twice the slowest 90th
    percentile are counted in words.
    """
    everything = np.concatenate([each.samples for each in series])
    limit = 2 * max(float(np.percentile(each.samples, 90)) for each in series)
    inside = everything[everything <= limit]
    ticks = _ticks(float(inside.min()), float(inside.max()))
    x = _Scale(ticks[0], ticks[-1], _LEFT, _RIGHT)
    edges = np.linspace(ticks[0], ticks[-1], _LATENCY_BINS + 1)
    rows = [np.histogram(each.samples, edges)[0].tolist() for each in series]
    most = max(max(counts) for counts in rows)
    height = (_BOTTOM - _TOP) / len(series)
    parts = [_sideways("inferences")]
    for number, (each, counts) in enumerate(zip(series, rows, strict=True), 1):
        base = _TOP + number * height
        y = _Scale(0, most, base, base - height + 40)
        middle = float(np.median(each.samples))
        for left, right, count in zip(edges, edges[1:], counts, strict=False):
            hint = (
                f"{each.name}, {milliseconds(left)} to {milliseconds(right)}: {count}"
            )
            parts.append(_bar(each.css, x(left), x(right), y(count), base, hint))
        title = f"{each.name}, median {milliseconds(middle)}"
        parts += [
            _line("axis", _LEFT, base, _RIGHT, base),
            _line("median", x(middle), base - height + 30, x(middle), base),
            _text("strong", _LEFT, base - height + 22, title, "start"),
            _text("", _LEFT - 8, y(most) + 5, f"{most}", "end"),
            _text("", _LEFT - 8, base, "0", "end"),
        ]
    parts += _horizontal_axis(
        [(x(tick), f"{tick:.6g}") for tick in ticks], "time of one inference, in ms"
    )
    slow = everything[everything > limit]
    notes = ""
    if slow.size:
        notes = f"Off the axis: {counted(slow.size, 'slower one')}, up to {slow.max():.1f} ms."
    return Chart(_svg("Latency distribution", notes, parts), notes)


def bars(values: Sequence[tuple[str, float]]) -> Chart:
    """One bar a kernel, in the order they run: what it does, and its microseconds."""
    y, parts = _vertical_axis(max(value for _, value in values) or 1.0, "time, in µs")
    x = _Scale(0.5, len(values) + 0.5, _LEFT, _RIGHT)
    for number, (what, value) in enumerate(values, 1):
        hint = f"{number}, {what}: {value:,.1f} µs"
        left, right = x(number - 0.4), x(number + 0.4)
        parts.append(_bar("ours", left, right, y(value), _BOTTOM, hint))
    ticks = {1, *map(int, _ticks(0, len(values), least_step=1))}
    parts += _horizontal_axis(
        [(x(tick), str(tick)) for tick in sorted(ticks) if 0 < tick <= len(values)],
        "kernel, in the order they run",
    )
    return Chart(_svg("Time of each kernel", "", parts), "")


def _ticks(low: float, high: float, least_step: float = 0.0) -> list[float]:
    """Three to eight round values, evenly spaced, with ``low`` and ``high`` between the outer two."""
    span = max(high - low, abs(high) * 0.05, 1e-9)
    magnitude = 10.0 ** floor(log10(span))
    step = next(s * magnitude for s in (0.2, 0.5, 1, 2) if span <= 5.5 * s * magnitude)
    step = max(step, least_step)
    first, last = floor(low / step), max(ceil(high / step), floor(low / step) + 1)
    return [number * step for number in range(first, last + 1)]


def _vertical_axis(
    top: float, unit: str, least_step: float = 0.0
) -> tuple[_Scale, list[Markup]]:
    ticks = _ticks(0, top, least_step)
    y = _Scale(0, ticks[-1], _BOTTOM, _TOP)
    parts = [_sideways(unit)]
    for tick in ticks:
        parts.append(_line("grid", _LEFT, y(tick), _RIGHT, y(tick)))
        parts.append(_text("", _LEFT - 8, y(tick) + 4, f"{tick:,.6g}", "end"))
    return y, parts


def _horizontal_axis(ticks: Sequence[tuple[float, str]], unit: str) -> list[Markup]:
    parts = [_line("axis", _LEFT, _BOTTOM, _RIGHT, _BOTTOM)]
    for at, label in ticks:
        parts.append(_line("axis", at, _BOTTOM, at, _BOTTOM + 4))
        parts.append(_text("", at, _BOTTOM + 19, label, "middle"))
    middle = (_LEFT + _RIGHT) / 2
    return [*parts, _text("unit", middle, _HEIGHT - 8, unit, "middle")]


def _svg(title: str, description: str, parts: Sequence[Markup]) -> Markup:
    return Markup(
        '<svg viewBox="0 0 {} {}" role="img"><title>{}</title><desc>{}</desc>{}</svg>'
    ).format(_WIDTH, _HEIGHT, title, description, Markup("").join(parts))


def _bar(
    css: str, left: float, right: float, top: float, bottom: float, hint: str
) -> Markup:
    if top >= bottom:
        return Markup("")
    return Markup(
        '<rect class="{}" x="{}" y="{}" width="{:.2f}" height="{:.2f}"><title>{}</title></rect>'
    ).format(css, left, top, right - left, bottom - top, hint)


def _line(css: str, x1: float, y1: float, x2: float, y2: float) -> Markup:
    return Markup('<line class="{}" x1="{}" y1="{}" x2="{}" y2="{}"/>').format(
        css, x1, y1, x2, y2
    )


def _text(css: str, x: float, y: float, text: str, anchor: str) -> Markup:
    return Markup(
        '<text class="{}" x="{}" y="{:.1f}" text-anchor="{}">{}</text>'
    ).format(css, x, y, anchor, text)


def _sideways(text: str) -> Markup:
    middle = (_TOP + _BOTTOM) / 2
    return Markup(
        '<text class="unit" transform="translate(12 {}) rotate(-90)" text-anchor="middle">{}</text>'
    ).format(middle, text)
