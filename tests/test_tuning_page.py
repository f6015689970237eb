"""What a person sees of a search: the table, the lines of a log, the page with its curve."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from netship.records import lookup
from netship.tuning import page
from netship.tuning.gain import Gain
from netship.tuning.page import curve, write_search
from netship.tuning.table import SearchTable, tasks_table

LIMITS: Any = SimpleNamespace(trials=100, hours=None, peak=1e9)


def _record(key: str, seconds: float, error: int = 0) -> str:
    return (
        f'{{"i": [["[\\"{key}\\", [1]]", "llvm", [], "", 2, []], [[], []]], '
        f'"r": [[{seconds}], {error}, 0, 1], "v": "v0.6"}}\n'
    )


def _state(operator: str, best: float, weight: int = 1) -> Any:
    task = SimpleNamespace(
        operator=operator,
        weight=weight,
        flops=1e6,
        intensity=2.0,
        key=f'["{operator}", [1]]',
    )
    return SimpleNamespace(task=task, best=best, trials=7, errors=1)


@pytest.fixture
def log(tmp_path: Path) -> lookup.RecordLog:
    path = tmp_path / "log.json"
    path.write_text(
        '# {"target": "llvm", "preset": "<b>", "measured": "by a test", "tvm": "0", "network": "n"}\n'
        + _record("a", 4e-3)
        + _record("b", 1e-3, error=4)
        + _record("b", 5e-3)
        + _record("other", 1e-9)
        + _record("a", 9e-3)
        + _record("a", 1e-3)
        + _record("b", 9e-3)
    )
    return lookup.read(path)


def test_the_curve_begins_at_the_first_time_though_tasks_have_none_yet(
    log: lookup.RecordLog,
) -> None:
    found = curve(log, {'["a", [1]]': 2, '["b", [1]]': 1})
    assert found is not None
    trials, seconds = zip(*found.points, strict=True)
    assert trials == (1, 5, 6)
    assert seconds == pytest.approx((13e-3, 7e-3, 7e-3))
    partial = curve(log, {'["a", [1]]': 2, '["c", [1]]': 1})
    assert partial is not None and [x for x, _ in partial.points] == [1, 3, 3]
    assert curve(log, {'["c", [1]]': 1}) is None


def test_the_table_orders_tasks_by_their_share() -> None:
    states = [_state("quick", 1e-3), _state("often", 1e-3, 3), _state("none", math.inf)]
    console = Console(width=110)
    with console.capture() as captured:
        console.print(tasks_table(states, 1e9, ""))
    rows = captured.get().splitlines()[1:]
    assert [row.split()[0] for row in rows] == ["often", "quick", "none"]
    assert "75.0%" in rows[0] and "100%" in rows[0] and "1000.0" in rows[0]


def test_a_log_has_a_line_a_round_and_no_escape_codes(
    capsys: pytest.CaptureFixture[str],
) -> None:
    states = [_state("conv", 1e-3)]
    with SearchTable(LIMITS) as table:
        table.update(states, states[0])
        states[0].trials = 9
        table.update(states, states[0])
    out = capsys.readouterr().out
    assert "\x1b" not in out
    first, second, heading, row = out.splitlines()
    assert "7 trials, 1 error, total 1.000 ms" in first
    with SearchTable(LIMITS) as table:
        table.update([*states, _state("none", math.inf)], states[0])
    assert "total 1.000 ms of 1 of 2 tasks" in capsys.readouterr().out
    assert "9 trials" in second and "left" in second and "conv: 1000.0 µs" in second
    assert "GFLOP/s" in heading and row.startswith("conv")


def test_the_page_is_whole_and_escapes_names(
    log: lookup.RecordLog, tmp_path: Path
) -> None:
    states = [_state("a", 1e-3), _state("b", 5e-3), _state("<i>", math.inf)]
    write_search(tmp_path / "page.html", log, states, 1e9)
    text = (tmp_path / "page.html").read_text()
    assert "<b>" not in text and "<i>" not in text and "&lt;i&gt;" in text
    assert "without the tasks that have no time yet" in text
    gain = Gain(12e-3, 6e-3, used=True)
    write_search(tmp_path / "page.html", log, states[:2], None, gain)
    text = (tmp_path / "page.html").read_text()
    assert "untuned 12.000 ms, tuned 6.000 ms, 2.00 × as quick" in text
    assert "<polyline" in text and "6.000 ms" in text and "://" not in text
    assert page.__file__ not in text
