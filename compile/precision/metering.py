"""What the meter says of a build, kernel by kernel and layer by layer."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from netship.targets.errors import UserError, last_line

CPUS = (
    *("cortex-a53", "cortex-a55", "cortex-a72", "cortex-a76", "cortex-a78"),
    "neoverse-n1",
)
"""The cores that it estimates for 64-bit ARM."""


def layer_cycles(
    layers: Sequence[frozenset[str]], operators: Sequence[Mapping[str, Any]]
) -> list[float]:
    """Cycles of each layer, by the meter's kernels.

    A kernel of several layers is shared out evenly. What belongs to none, such as a conversion, is shared out by what
    the layers have.

    Args:
        layers: the names by which a kernel may name each.
        operators: of the meter's JSON.
    """
    own = [0.0] * len(layers)
    shared = 0.0
    for each in operators:
        cycles = each["core_cycles"] + each["memory_cycles"]
        named = [
            number
            for name in each["layer"].split(", ")
            for number, names in enumerate(layers)
            if name in names
        ]
        for number in named:
            own[number] += cycles / len(named)
        if not named:
            shared += cycles
    total = sum(own)
    if not total:
        return [shared / len(layers)] * len(layers)
    return [each * (1 + shared / total) for each in own]


def meter(folder: Path, cpu: str, _stage: object) -> list[dict[str, Any]]:
    """The meter is above the compiler: it is called as a user calls it."""
    command = [sys.executable, "-m", "netship.meter", str(folder), "--cpu", cpu]
    done = subprocess.run(
        [*command, "--json"], capture_output=True, text=True, check=False
    )
    if done.returncode:
        said = last_line(done.stderr).removeprefix("error: ")
        raise UserError(f"--precision auto needs the meter: {said}")
    operators: list[dict[str, Any]] = json.loads(done.stdout)["operators"]
    return operators


def cycles(operators: Sequence[Mapping[str, Any]]) -> float:
    """Of an inference."""
    found: float = sum(x["core_cycles"] + x["memory_cycles"] for x in operators)
    return found
