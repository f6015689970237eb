"""The comparison as one self-contained HTML page: no script, no network, nothing beside the file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from meter.compare_counts import meter_version
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
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    text = environment.get_template(template).render(**values)
    write_whole(path, text.encode("utf-8", errors="replace"), "--report")
