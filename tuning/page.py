"""A search as one self-contained HTML page: the tuning curve, and each task's share of an inference."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from netship.targets import templates
from netship.tuning.table import by_share, estimated_seconds

if TYPE_CHECKING:
    from netship.records.lookup import RecordLog
    from netship.tuning.gain import Gain
    from netship.tuning.search import State

_WIDTH, _HEIGHT, _MARGIN = 640.0, 220.0, 44.0


class Curve(NamedTuple):
    """The estimated total after each trial, from the first trial after which every task has a time.

    Attributes:
        points: (trial, seconds) where the total changed, and at the end.
    """

    points: tuple[tuple[int, float], ...]

    @property
    def svg(self) -> str:
        """The points of the page's polyline."""
        first, last = self.points[0][0], self.points[-1][0]
        low, high = self.range
        places = []
        before = None
        for trial, seconds in self.points:
            done = (trial - first) / max(last - first, 1)
            x = _MARGIN + (_WIDTH - _MARGIN - 8) * done
            share = (seconds - low) / (high - low) if high > low else 0.5
            y = 12 + (_HEIGHT - _MARGIN - 12) * (1 - share)
            if before is not None:
                places.append(f"{x:.1f},{before:.1f}")
            places.append(f"{x:.1f},{y:.1f}")
            before = y
        return " ".join(places)

    @property
    def range(self) -> tuple[float, float]:
        seconds = [each for _, each in self.points]
        return min(seconds), max(seconds)


def curve(log: RecordLog, weights: Mapping[str, int]) -> Curve | None:
    """The tuning curve of those tasks in ``weights``, by workload key, that have a time; None if none has.

    A task's first time counts before its first trial, too: a small budget has a curve.
    """
    records = [each for each in log.records if each.workload in weights]
    best: dict[str, float] = {}
    for record in records:
        if not record.error:
            best.setdefault(record.workload, record.seconds)
    points: list[tuple[int, float]] = []
    trials = 0
    for record in records:
        trials += 1
        key = record.workload
        if record.error or (points and record.seconds >= best[key]):
            continue
        best[key] = record.seconds
        total = sum(weights[each] * seconds for each, seconds in best.items())
        points.append((trials, total))
    if not points:
        return None
    return Curve((*points, (trials, points[-1][1])))


def write_search(
    path: Path,
    log: RecordLog,
    states: Sequence[State],
    peak: float | None,
    gain: Gain | None = None,
) -> None:
    """Write the page whole or not at all; one that is there is replaced.

    Args:
        peak: operations a second; None where it is not known.
        gain: None if it was not measured.
    """
    known = [state for state in states if math.isfinite(state.best)]
    templates.write_page(
        path,
        "--output",
        Path(__file__).with_name("page.html.jinja"),
        header=log.header,
        states=by_share(states),
        total=estimated_seconds(known),
        longest=max((each.best * each.task.weight for each in known), default=1.0),
        whole=len(known) == len(states),
        trials=sum(state.trials for state in states),
        errors=sum(state.errors for state in states),
        peak=peak,
        gain=gain,
        curve=curve(log, {state.task.key: state.task.weight for state in states}),
        isfinite=math.isfinite,
    )
