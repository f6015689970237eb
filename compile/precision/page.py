"""The page of a build that chose what each layer computes in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from netship.bundle.manifest import Precision
from netship.bundle.store import Bundle
from netship.compile.quantize.tradeoff import PRECISIONS
from netship.targets import templates

PAGE = Path("reference", "precision.html")
"""In the folder of the build."""


def write_page(bundle: Bundle, path: Path) -> None:
    """The curve and the choice of each layer as one self-contained HTML page."""
    facts = bundle.manifest.precision
    assert facts is not None
    templates.write_page(
        path,
        "--output",
        Path(__file__).with_name("page.html.jinja"),
        facts=facts,
        manifest=bundle.manifest,
        measured=bundle.manifest.measured["precision"],
        drawn=_drawn(facts),
        kinds=[x for x in PRECISIONS if any(x in y.costs for y in facts.layers)],
    )


def _drawn(facts: Precision) -> dict[str, Any]:
    """The curve in pixels: costs to the right from nothing, losses upwards in decades.

    float32's rounding lies at the lower border.
    """
    losses = [each.loss for each in facts.curve if each.loss > 1e-5]
    low, high = (
        np.log10(choose([*losses, facts.max_loss], default=1e-6))
        for choose in (min, max)
    )
    most = max(each.cost for each in facts.curve)
    low = max(float(np.floor(low)), -6.0)
    high = max(float(np.ceil(high)), low + 1)

    def place(cost: float, loss: float) -> tuple[float, float]:
        decades = np.log10(max(loss, 10**low)) - low
        return 70 + 550 * cost / most, 300 - 280 * float(decades) / (high - low)

    return {
        "points": [(*place(each.cost, each.loss), each) for each in facts.curve],
        "line": [place(each.cost, each.loss) for each in facts.pareto],
        "limit": place(0, facts.max_loss)[1],
        "decades": [
            (place(0, 10.0**k)[1], f"{10.0**k:g}")
            for k in range(int(low), int(high) + 1)
        ],
        "costs": [(place(most * k / 4, 1)[0], most * k / 4 / 1e6) for k in range(5)],
    }
