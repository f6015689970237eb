"""The state of a board as its server reports it, and whether a bundle fits the board."""

from __future__ import annotations

import re
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from netship.bundle.store import Bundle
from netship.targets.errors import UserError

# VideoCore's get_throttled: bits 0 to 3 are the state now, 16 to 19 what has happened since the start
# (Raspberry Pi documentation, vcgencmd).
_THROTTLING = {
    0: "under-voltage",
    1: "frequency capped",
    2: "throttled",
    3: "soft temperature limit",
}


class BoardState(BaseModel):
    """What the native server's `netship.board` reports; None where the board cannot tell.

    Attributes:
        features: as /proc/cpuinfo names them.
        throttled: the firmware's flags, one a bit.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    server: str
    tvm: str
    machine: str
    emulated: bool = False
    board: str | None = None
    cpu_model: str | None = None
    features: tuple[str, ...] = ()
    cores: int = 0
    threads: int = 0
    glibc: str | None = None
    governor: str | None = None
    frequency_khz: float | None = None
    temperature_c: float | None = None
    throttled: int | None = None
    memory_kb: float | None = None
    disk_free_bytes: float | None = None

    def limits(self) -> list[str]:
        """What slows the board down now, in words."""
        flags = self.throttled or 0
        return [name for bit, name in _THROTTLING.items() if flags >> bit & 1]

    def condition(self) -> str:
        """Governor, clock, temperature and throttling in a line; empty where nothing is known."""
        parts = [f"governor {self.governor}"] if self.governor else []
        if self.frequency_khz:
            parts.append(f"{self.frequency_khz / 1e6:.2f} GHz")
        if self.temperature_c is not None:
            parts.append(f"{self.temperature_c:.0f} °C")
        if self.throttled is not None:
            parts.append(", ".join(self.limits()) or "not throttled")
        return ", ".join(parts)


def ask(remote: Any, where: str) -> BoardState | None:
    """Ask a server for the state of its board; None where it is not the kit's."""
    try:
        describe = remote.get_function("netship.board")
    except AttributeError:
        return None
    try:
        return BoardState.model_validate_json(str(describe()))
    except ValidationError:
        raise UserError(
            f"{where}: the server describes its board in a way that is not known here; put the kit of "
            "this version on the board (`python -m runtime_demo.board kit`)"
        ) from None


def check_fits(state: BoardState, bundle: Bundle, where: str, engine: str) -> None:
    """Refuse a bundle that the board cannot run, before anything is sent.

    Args:
        engine: the version of TVM here; the board must have the same one.
    """
    target = bundle.manifest.target
    if state.machine != target.machine:
        raise UserError(
            f"{where}: the board is {state.machine}, not {target.machine}, which model.so is for; "
            "build for the board's CPU (`python -m targets` lists the targets)"
        )
    if state.tvm != engine:
        raise UserError(
            f"{where}: the board's server is of TVM {state.tvm}, this is {engine}; put the kit of this "
            "version on the board (`python -m runtime_demo.board kit`)"
        )
    built = re.search(r"\d+\.\d+\.\d+", bundle.manifest.engine)
    if built and built[0] != state.tvm:
        raise UserError(
            f"{where}: the board's server is of TVM {state.tvm}, {bundle.path} was built by {built[0]}; "
            "build it again"
        )
    missing = sorted(set(target.features) - set(state.features))
    if missing and not state.emulated:
        raise UserError(
            f"{where}: the board's CPU lacks {', '.join(missing[:4])}, which {target.name} needs; "
            "build for the board's CPU (`python -m runtime_demo.board doctor` names targets that fit)"
        )
    size = bundle.library.stat().st_size
    if state.disk_free_bytes is not None and state.disk_free_bytes < size:
        raise UserError(
            f"{where}: {state.disk_free_bytes / 1e6:.0f} MB free on the board, model.so takes "
            f"{size / 1e6:.0f} MB; make room there"
        )
