"""What boards were measured to draw, and the energy that an inference takes by it.

The sources measured whole boards, idle and with all four cores busy. During an inference one core is busy at least, and
four at most. One draws more than idle by at least a quarter of what four do: the first core to wake takes the clock and
the shared caches with it. The load was a stress test; code that keeps the vector units busier may draw more. The range is
the power's alone: how far the estimated time is off comes on top.
"""

from __future__ import annotations

from typing import NamedTuple

from netship.meter.memory import boards
from netship.meter.operators import Metered

_CORES = 4


class Power(NamedTuple):
    """Watts of a board, as one source measured them: idle, and with all cores busy."""

    source: str
    idle: float
    load: float


_DRAMBLE = (
    "J. Geerling, pidramble.com/wiki/benchmarks/power-consumption, stress --cpu 4"
)
_TWO_GB = "J. Geerling, jeffgeerling.com/blog/2024/new-2gb-pi-5-has-33-smaller-die-30-idle-power-savings"
POWERS = {
    "rpi3": (
        Power(f"{_DRAMBLE}, Raspberry Pi 3 B", 1.4, 3.7),
        Power(
            "F. Guerraz, medium.com/@fguerraz/raspberry-pi-3-model-b-power-consumption-925eeb43cd77, sysbench",
            *(1.22, 3.95),
        ),
    ),
    "rpi4": (
        Power(f"{_DRAMBLE}, Raspberry Pi 4 B", 2.7, 6.4),
        Power(
            "G. Halfacree, The MagPi 88, stress-ng with glxgears, firmware of November 2019",
            *(2.1, 6.41),
        ),
    ),
    "rpi5": (
        Power(f"{_TWO_GB}, 2 GB", 2.4, 8.9),
        Power(f"{_TWO_GB}, 4 GB", 3.3, 9.8),
    ),
}


class Energy(NamedTuple):
    """Joules of an inference, least and most: of the whole board, and of what it draws more than idle."""

    board: tuple[float, float]
    above_idle: tuple[float, float]


def powers(metered: Metered) -> tuple[Power, ...]:
    """What is known of the board; nothing for most."""
    return POWERS.get(metered.board or boards(metered.cpu)[0], ())


def energy(metered: Metered) -> Energy | None:
    """The energy of an inference in the estimated time; None for a board whose power no source here has."""
    found = powers(metered)
    if not found:
        return None
    seconds = metered.milliseconds(metered.hierarchy.clock)[1] / 1e3
    above = [each.load - each.idle for each in found]
    least = min(each.idle + (each.load - each.idle) / _CORES for each in found)
    most = max(each.load for each in found)
    return Energy(
        (seconds * least, seconds * most),
        (seconds * min(above) / _CORES, seconds * max(above)),
    )


def words(metered: Metered) -> str:
    """The energy for people, or that it is not known."""
    found = energy(metered)
    if found is None:
        return f"not estimated: no published power of {metered.hierarchy.board} is known here"
    board, above = (
        f"{least:.3g} to {most:.3g} J"
        for least, most in (found.board, found.above_idle)
    )
    return f"{board} of the whole board, {above} of it above idle, estimated (published power, idle and under load)"
