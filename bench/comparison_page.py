"""The comparison as one self-contained HTML page: no script, no network, no other file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from meter.counts import meter_version
from targets import templates

if TYPE_CHECKING:
    from bench.comparison import Comparison


def write_comparison(result: Comparison, path: Path) -> None:
    """Write the page whole or not at all; one that is there is replaced."""
    sums = [row.counts.cycles for row in result.rows if row.counts]
    templates.write_page(
        path,
        "--report",
        Path(__file__).with_name("comparison.html.jinja"),
        result=result,
        worst=max(sums, default=1),
        meter=meter_version(),
    )
