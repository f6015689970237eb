"""The memories of a microcontroller: what ``--memory`` names, what a part has, and what an access costs."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

from netship.devices.microcontroller.parts import (
    EXTERNAL_BYTE,
    EXTERNAL_FIRST,
    LINE,
    SDRAM_BYTE,
    SDRAM_FIRST,
    SRAM_FIRST,
    part,
)
from netship.targets.cores import CORES
from netship.targets.errors import UserError

# Cycles for a line that the core's cache lacks, over its bytes, by how names of memories begin.
_DATA = {
    **dict.fromkeys(("dtcm", "tcm", "ccm"), 0.0),
    **dict.fromkeys(("sram", "ram", "axi"), SRAM_FIRST / LINE),
    "sdram": SDRAM_FIRST / LINE + SDRAM_BYTE,
    "psram": EXTERNAL_FIRST / LINE + EXTERNAL_BYTE,
}
_INTERNAL, _EXTERNAL = ("flash",), ("qspi", "ospi")
_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20}


class Region(NamedTuple):
    """A memory.

    Attributes:
        name: as ``--memory`` names it.
        size: in bytes.
        address: None where only a linker script knows it.
    """

    name: str
    size: int
    address: int | None = None

    @property
    def kind(self) -> str:
        """How its name begins, of the kinds that are known; empty where it is none."""
        kinds = (*_DATA, *_INTERNAL, *_EXTERNAL)
        return max((x for x in kinds if self.name.startswith(x)), key=len, default="")

    @property
    def is_data(self) -> bool:
        return self.kind in _DATA

    @property
    def is_external_flash(self) -> bool:
        return self.kind in _EXTERNAL

    def cycles(self, cpu: str) -> float:
        """Cycles that a byte of a stream makes a target's core wait; a core without caches never waits for its SRAM."""
        cached = cpu in ("cortex-m7", "cortex-m55", "cortex-m85")
        if self.kind in ("sram", "ram", "axi") and not cached:
            return 0.0
        return _DATA[self.kind]


def parse(text: str) -> tuple[Region, ...]:
    """Such as ``dtcm=128K,sram=512K,sdram=8M``; K is 1024 bytes, M 1024 K.

    Raises:
        ValueError: another text, an unknown kind of memory, a name twice, or no memory for activations.
    """
    regions: list[Region] = []
    for word in text.split(","):
        match = re.fullmatch(
            r"([a-z][a-z0-9_]{0,23})=([0-9]{1,9})(?:([KM])(?:iB)?)?", word
        )
        if not match or not int(match[2]):
            raise ValueError(f"{word!r} is not a memory such as sram=512K")
        region = Region(match[1], int(match[2]) * _UNITS[match[3] or ""])
        if not region.kind:
            known = ", ".join((*_DATA, *_INTERNAL, *_EXTERNAL))
            raise ValueError(f"{match[1]!r}: a memory's name begins with {known}")
        if region.name in {each.name for each in regions}:
            raise ValueError(f"{region.name!r} is given twice")
        regions.append(region)
    if not any(each.is_data for each in regions):
        raise ValueError(f"{text!r} has no memory for activations, such as sram=512K")
    return tuple(regions)


def of_part(name: str, cpu: str) -> tuple[Region, ...]:
    """The memories of a part.

    Raises:
        UserError: it is not known, or has another core than the target ``cpu``.
    """
    found = part(name)
    if CORES[cpu].cpu != found.cpu:
        raise UserError(
            f"--part {name}: has a {found.cpu}; build with --target {found.cpu}"
        )
    return tuple(Region(*each) for each in found.regions)


def listed(regions: Sequence[Region]) -> str:
    """As ``--memory`` takes them, sizes in bytes."""
    return ", ".join(f"{each.name} {each.size:,}" for each in regions)
