"""Opens a session for a build: what each format runs on, in one table."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from netship.bundle.store import Bundle
from netship.devices.microcontroller.portable import open_c
from netship.devices.sessions.emulated import open_emulated
from netship.devices.sessions.local import open_local
from netship.devices.sessions.session import Session
from netship.devices.sessions.standalone import (
    open_standalone,
    open_standalone_emulated,
)
from netship.targets.errors import UserError

Progress = Callable[[str], None]


def open_here(bundle: Bundle, threads: int | None = None) -> Session:
    """Load a build on this machine; C source on its emulated board.

    Raises:
        UserError: as `open_local`, `open_standalone` and `open_c`.
    """
    return _FORMATS[bundle.manifest.format].here(bundle, threads)


def open_on_emulated(
    bundle: Bundle,
    threads: int | None = None,
    on_progress: Progress = lambda stage: None,
    cpu: str | None = None,
) -> Session:
    """Load a build on an emulated board.

    Args:
        cpu: QEMU's name of it; the target's where None.

    Raises:
        UserError: as `open_emulated`, `open_standalone_emulated` and `open_c`.
    """
    emulated = _FORMATS[bundle.manifest.format].emulated
    return emulated(bundle, cpu, on_progress, threads)


def check_served(bundle: Bundle) -> None:
    """Refuse to send a build to a TVM RPC server that cannot run it."""
    if instead := _FORMATS[bundle.manifest.format].not_served:
        raise UserError(f"{bundle.path}: {instead.format(name=bundle.manifest.name)}")


class _Format(NamedTuple):
    """What opens a build of one format, and why a server cannot run it; empty where one can."""

    here: Callable[[Bundle, int | None], Session]
    emulated: Callable[[Bundle, str | None, Progress, int | None], Session]
    not_served: str


_FORMATS = {
    "bundle": _Format(open_local, open_emulated, ""),
    "standalone": _Format(
        open_standalone,
        open_standalone_emulated,
        "a standalone library needs no RPC server; leave --ssh, --rpc and --tracker "
        "out, copy the folder to the board and run ./verify FOLDER of the kit (python -m runtime_demo.board kit) "
        "or {name}_self_test() there",
    ),
    "c": _Format(
        lambda bundle, threads: open_c(bundle, threads=threads),
        open_c,
        "is C source for a microcontroller; leave --ssh, --rpc and --tracker out",
    ),
}
