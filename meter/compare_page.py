"""The comparison as one self-contained HTML page: no script, no network, nothing beside the file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from meter.compare_counts import meter_version
from targets import templates
from targets.files import write_whole

if TYPE_CHECKING:
    from meter.compare_rows import Comparison


def write_comparison(result: Comparison, path: Path) -> None:
    """Write the page whole or not at all; one that is there is replaced.

    Raises:
        UserError: ``path`` cannot be written.
    """
    sums = [row.counts.cycles for row in result.rows if row.counts]
    write_page(
        path,
        "compare.html.jinja",
        result=result,
        worst=max(sums, default=1),
        meter=meter_version(),
    )


def write_page(path: Path, template: str, **values: object) -> None:
    environment = templates.of_pages(Path(__file__).parent)
    text = environment.get_template(template).render(**values)
    write_whole(path, text.encode("utf-8", errors="replace"), "--report")
