"""The display of a search: a live table in a terminal, a line for each round elsewhere, and the table at the end."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Self

from rich.console import Console
from rich.live import Live
from rich.table import Table

from netship.targets.escapes import counted

if TYPE_CHECKING:
    from netship.tuning.search import Limits, State

# Characters; wide enough for the table without a terminal.
_WIDTH = 110


class SearchTable:
    """Shows a search; give `update` to it as its report, and use it in ``with``."""

    def __init__(self, limits: Limits, quiet: bool = False) -> None:
        self._limits = limits
        live = sys.stdout.isatty() and not quiet
        self._console = Console(
            highlight=False, width=None if live else _WIDTH, quiet=quiet
        )
        self._live = Live(console=self._console, auto_refresh=False) if live else None
        self._started = time.monotonic()
        self._before: int | None = None
        self._states: Sequence[State] = ()

    def __enter__(self) -> Self:
        if self._live:
            self._live.start()
        return self

    def update(self, states: Sequence[State], current: State) -> None:
        trials = sum(state.trials for state in states)
        if self._before is None:
            # The trials before this run, except for those of this first round.
            self._before, self._started = trials, time.monotonic()
        self._states = states
        if self._live:
            self._live.update(
                tasks_table(states, self._limits.peak, self._title(trials), current),
                refresh=True,
            )
        else:
            where = f"{current.task.operator}: {_microseconds(current.best)} µs"
            self._console.print(f"{self._title(trials)}  {where}", soft_wrap=True)

    def _title(self, trials: int) -> str:
        errors = sum(state.errors for state in self._states)
        known = [each for each in self._states if math.isfinite(each.best)]
        total = f"total {estimated_seconds(known) * 1e3:.3f} ms"
        if len(known) < len(self._states):
            total += f" of {len(known)} of {counted(len(self._states), 'task')}"
        words = [counted(trials, "trial"), counted(errors, "error"), total]
        seconds = time.monotonic() - self._started
        new = trials - (self._before or 0)
        if new > 0 and seconds > 0:
            words.append(f"{new / seconds * 60:.0f} trials/min")
            left = max(0.0, (self._limits.trials - trials) * seconds / new)
            if self._limits.hours is not None:
                left = min(left, max(0.0, self._limits.hours * 3600 - seconds))
            words.append(f"{_duration(left)} left")
        return ", ".join([_duration(seconds), *words])

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._live:
            self._live.stop()
        elif self._states:
            self._console.print(tasks_table(self._states, self._limits.peak, ""))


def estimated_seconds(states: Sequence[State]) -> float:
    """Seconds of an inference as the sum of its tasks; infinite before each has a correct candidate."""
    return sum(state.best * state.task.weight for state in states)


def by_share(states: Sequence[State]) -> list[State]:
    """Those that take most of an inference first; those without a correct candidate yet last."""
    return sorted(
        states,
        key=lambda each: (math.isinf(each.best), -each.best * each.task.weight),
    )


def tasks_table(
    states: Sequence[State],
    peak: float | None,
    title: str,
    current: State | None = None,
) -> Table:
    """A row for each task, in the order of `by_share`.

    Args:
        peak: operations a second; None leaves the column out.
        current: this one is marked.
    """
    table = Table(title=title or None, title_justify="left", box=None, pad_edge=False)
    table.add_column("task")
    headings = ["×", "best µs", "GFLOP/s", "of peak", "FLOP/B", "trials", "errors"]
    for heading in [*headings, "share"]:
        if heading != "of peak" or peak:
            table.add_column(heading, justify="right", no_wrap=True)
    known = [state for state in states if math.isfinite(state.best)]
    total = estimated_seconds(known)
    for state in by_share(states):
        task, measured = state.task, math.isfinite(state.best)
        rate = task.flops / state.best
        cells = [
            str(task.weight),
            _microseconds(state.best),
            f"{rate / 1e9:.1f}" if measured else "",
            *([f"{rate / peak:.0%}" if measured else ""] if peak else []),
            f"{task.intensity:.1f}",
            str(state.trials),
            str(state.errors or ""),
            f"{state.best * task.weight / total:.1%}" if measured else "",
        ]
        style = "bold" if state is current else None
        table.add_row(task.operator, *cells, style=style)
    return table


def _microseconds(seconds: float) -> str:
    return f"{seconds * 1e6:.1f}" if math.isfinite(seconds) else "—"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
