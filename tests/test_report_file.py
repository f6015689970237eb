"""The report's file and its charts: written whole or not at all; every value is drawn once."""

from __future__ import annotations

import errno
import os
import re
from pathlib import Path

import numpy as np
import pytest
from check_results import a_result, an_input

from netship.runtime_demo.report import (
    Series,
    bars,
    distribution,
    histogram,
    write_report,
)
from netship.targets.errors import UserError


@pytest.mark.parametrize(
    ("where", "words"),
    [
        (".", "is not a file"),
        ("missing/report.html", "no such folder"),
        ("labels.txt/report.html", "no such folder"),
        ("n" * 300, "File name too long"),
    ],
)
def test_an_unwritable_place_is_refused_in_one_line(
    where: str, words: str, tmp_path: Path
) -> None:
    result = a_result(tmp_path, [an_input(None)])
    with pytest.raises(UserError, match=words) as caught:
        write_report(result, tmp_path / where)
    assert "--report" in str(caught.value) and "\n" not in str(caught.value)
    assert os.listdir(tmp_path) == ["labels.txt"]


def test_a_full_disk_leaves_the_old_report_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = a_result(tmp_path, [an_input(None)])
    (tmp_path / "report.html").write_text("the old one")

    def full(path: Path, content: bytes) -> int:
        path.write_text(content[:100].decode(errors="replace"))
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(UserError, match="No space left on device"):
        write_report(result, tmp_path / "report.html")
    assert (tmp_path / "report.html").read_text() == "the old one"
    assert sorted(os.listdir(tmp_path)) == ["labels.txt", "report.html"]


def test_who_reads_the_old_report_keeps_it_whole(tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    path.write_text("the old one")
    with path.open() as reader:
        write_report(a_result(tmp_path, [an_input(None)]), path)
        assert reader.read() == "the old one"
    assert "Passed" in path.read_text(encoding="utf-8")
    assert sorted(os.listdir(tmp_path)) == ["labels.txt", "report.html"]


def test_the_histogram_counts_every_error_once() -> None:
    errors = np.array([0.0, 1e-12, 2e-7, 3e-7, 5e-3, np.nan])
    chart = histogram(errors, 1e-2)
    assert chart is not None
    drawn = re.findall(r"<title>[^<]*: (\d+)</title>", chart.svg)
    assert sum(map(int, drawn)) == 3
    assert "6 outputs in all" in chart.notes
    assert "2 of them, equal or nearer than 10⁻⁹" in chart.notes
    assert "1 are infinite or not a number" in chart.notes
    assert "tolerance" in chart.svg
    assert histogram(np.zeros(4), 1e-2) is None


def test_the_distribution_counts_every_time_once_and_names_the_unit() -> None:
    chart = distribution(
        [Series("a & b", "ours", [7.0] * 19 + [90.0]), Series("c", "theirs", [8.0])]
    )
    drawn = re.findall(r"<title>[^<]* ms: (\d+)</title>", chart.svg)
    assert sum(map(int, drawn)) == 20
    assert "Off the axis: 1 slower one, up to 90.0 ms." in chart.notes
    assert "in ms" in chart.svg
    assert "a &amp; b, median 7.00 ms" in chart.svg


def test_bars_are_as_high_as_their_times() -> None:
    chart = bars([("conv2d", 50.0), ("add", 100.0), ("nothing", 0.0)])
    heights = [float(h) for h in re.findall(r'<rect[^>]* height="([\d.]+)"', chart.svg)]
    assert len(heights) == 2
    assert heights[1] == pytest.approx(2 * heights[0], abs=0.02)
    assert "time, in µs" in chart.svg
