"""The estimate of a bundle as one self-contained HTML page."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from meter import cycles, memory
from meter.counts import meter_version
from meter.operators import Metered
from targets import templates

if TYPE_CHECKING:
    from meter.calibrate import Calibration


def write_page(
    metered: Metered, bundle: Path, calibration: Calibration | None, path: Path
) -> None:
    """Write the page whole or not at all; one that is there is replaced."""
    hierarchy = memory.hierarchy(metered.cpu)
    operators = metered.operators
    templates.write_page(
        path,
        "--report",
        Path(__file__).with_name("operators.html.jinja"),
        metered=metered,
        bundle=bundle.name,
        calibration=calibration,
        core_model=cycles.model(metered.cpu),
        hierarchy=hierarchy,
        peak=metered.peak,
        worst=max(each.cycles for each in operators),
        total=metered.core_cycles + metered.memory_cycles,
        low=max(metered.core_cycles, metered.memory_cycles) / hierarchy.clock / 1e6,
        high=(metered.core_cycles + metered.memory_cycles) / hierarchy.clock / 1e6,
        meter=meter_version(),
    )
