"""A bundle on this machine, in this process."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from netship.bundle.store import Bundle
from netship.devices.sessions.graph import GraphSession
from netship.devices.sessions.session import Origin, Session
from netship.targets import engine
from netship.targets.errors import UserError, last_line
from netship.targets.presets import this_cpu

T = TypeVar("T")


def open_local(bundle: Bundle, threads: int | None = None) -> Session:
    """Load a bundle here, on ``threads`` threads (the manifest's where None).

    Raises:
        UserError: built for another architecture or CPU, it cannot be loaded, or this process already runs TVM with
            another number of threads.
    """
    check_runs_here(bundle)
    threads = threads or bundle.manifest.threads
    tvm = engine.runtime(threads)
    try:
        library = tvm.runtime.load_module(str(bundle.library))
    except tvm.TVMError as error:
        raise UserError(
            f"{bundle.library}: cannot be loaded: {last_line(str(error))}; build it for this machine"
        ) from None
    return GraphSession(
        bundle,
        library,
        tvm.cpu(),
        origin=Origin.HOST,
        threads=threads,
        call=_directly,
        on_close=lambda: None,
        remote=False,
    )


def check_runs_here(bundle: Bundle) -> None:
    """Refuse a bundle whose instructions this machine does not have."""
    cpu, target, library = this_cpu(), bundle.manifest.target, bundle.manifest.library
    if target.machine != cpu.machine:
        instead = f"run it on a {target.machine} machine"
        if target.qemu_cpu:
            instead = "try --board emulated"
        raise UserError(
            f"{bundle.path}: {library} is for {target.machine} ({target.name}), "
            f"this machine is {cpu.machine}; {instead}"
        )
    missing = sorted(set(target.features) - cpu.features)
    if missing:
        raise UserError(
            f"{bundle.path}: {library} is for {target.name}, this CPU ({cpu.model}) lacks "
            f"{', '.join(missing)}; build it with --target native"
        )


def _directly(action: Callable[[], T]) -> T:
    return action()
