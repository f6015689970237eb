"""A bundle on a TVM RPC server: on a board, or one that is started on 127.0.0.1.

TVM's RPC has no encryption and no login: whoever reaches a server can run anything there.
Use it only in a network that you trust. Servers started here listen on 127.0.0.1 only, and a
client needs a random key.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from netship.bundle.store import LIBRARY, Bundle
from netship.devices.board import board_state
from netship.devices.board.board_state import BoardState, check_fits
from netship.devices.sessions.graph import GraphSession
from netship.devices.sessions.local import check_runs_here
from netship.devices.sessions.session import Origin, Session
from netship.devices.transport.link import (
    PROBE_SECONDS,
    Address,
    Link,
    Note,
    RefusedError,
    client,
    limit_threads,
)
from netship.devices.transport.server import Server, start_server, this_python
from netship.targets.errors import UserError
from netship.targets.escapes import counted
from netship.targets.presets import this_cpu

_CALL_SECONDS = 60.0
_START_SECONDS = 30.0


def open_rpc(
    bundle: Bundle,
    address: Address,
    *,
    threads: int | None = None,
    wait: float = 60.0,
    call_timeout: float = _CALL_SECONDS,
    probe_timeout: float = PROBE_SECONDS,
    cleanup: ExitStack | None = None,
    on_note: Note = lambda line: None,
) -> Session:
    """Load a bundle on the board whose RPC server is at ``address``.

    Args:
        threads: at most the manifest's where None.
        wait: seconds for another client to leave.
        call_timeout: seconds for one call: an upload, an inference.
        probe_timeout: seconds for the server's first answer.
        cleanup: closed with the session, and where it cannot be opened.
        on_note: called with a line when another client is waited for.

    Raises:
        LostError: the connection is lost, or a call took too long.
        UserError: nobody or something else listens there, the bundle does not fit the board, its disk is full.
    """
    with cleanup or ExitStack() as stack:
        link = Link(address, call_timeout, probe_timeout)
        return _open(bundle, link, threads, Origin.BOARD, stack, wait, on_note)


def describe(address: Address, seconds: float = PROBE_SECONDS) -> BoardState | None:
    """What the board at an address says of itself; None where the server is not ours.

    Args:
        seconds: for another client to leave, and for the answer.
    """
    link = Link(address, seconds)
    try:
        return _state(link, link.connect())
    finally:
        link.close()


def _state(link: Link, remote: Any) -> BoardState | None:
    return link(lambda: board_state.ask(remote, link.where), "what the board is")


def open_rpc_local(bundle: Bundle, threads: int | None = None) -> Session:
    """Load a bundle in a stock RPC server that is started on this machine and ends with the session."""
    check_runs_here(bundle)
    threads = threads or bundle.manifest.threads
    environment = {"TVM_NUM_THREADS": str(threads)}
    return open_served(
        bundle,
        lambda: start_server(this_python(), environment, _START_SECONDS),
        cpu=this_cpu().model,
        threads=threads,
        origin=Origin.HOST,
        call_timeout=_CALL_SECONDS,
    )


def open_served(
    bundle: Bundle,
    start: Callable[[], Server],
    *,
    cpu: str,
    threads: int,
    origin: Origin,
    call_timeout: float,
) -> Session:
    """Start a server and load the bundle there; the server ends with the session.

    Args:
        cpu: what the server runs on, for a message.
    """
    with ExitStack() as cleanup:
        server = start()
        cleanup.callback(server.close)
        target = bundle.manifest.target

        def why_ended() -> str:
            reason = server.why_ended()
            if reason == "SIGILL":
                return (
                    f"model.so, built for {target.name}, needs an instruction that "
                    f"{cpu} does not have; build it for that CPU"
                )
            return reason and f"the RPC server ended ({reason}); run the command again"

        address = Address("127.0.0.1", server.port, server.key)
        link = Link(address, call_timeout, why_ended=why_ended)
        return _open(bundle, link, threads, origin, cleanup)


def _open(
    bundle: Bundle,
    link: Link,
    threads: int | None,
    origin: Origin,
    cleanup: ExitStack,
    wait: float = _CALL_SECONDS,
    on_note: Note = lambda line: None,
) -> Session:
    cleanup.callback(link.close)
    remote = link.connect(wait, on_note)
    # A server that ends with the session need not keep the library for the next one.
    lasting = origin is Origin.BOARD
    found = _state(link, remote)
    if found is not None:
        check_fits(found, bundle, link.where, str(client().__version__))
        if found.emulated:
            origin = Origin.EMULATED
    elif origin is Origin.BOARD:
        _check_architecture(bundle, link, remote)
    actual = _set_threads(link, remote, threads, bundle.manifest.threads)
    _send(bundle, link, remote, keeps=lasting and found is not None)
    try:
        library = link(lambda: remote.load_module(LIBRARY), f"loading {LIBRARY}")
    except RefusedError as error:
        raise UserError(
            f"{error}: model.so could not be loaded there: it wants {bundle.manifest.target.name} "
            f"and glibc 2.28 or newer, and the server says: {error.reason}"
        ) from None
    finally:
        with contextlib.suppress(UserError):
            link(lambda: remote.remove(LIBRARY), f"the removal of {LIBRARY}")
    return GraphSession(
        bundle,
        library,
        remote.cpu(),
        origin=origin,
        threads=actual,
        call=link,
        on_close=cleanup.pop_all().close,
        remote=True,
        state=lambda: _state(link, remote),
    )


def _send(bundle: Bundle, link: Link, remote: Any, *, keeps: bool) -> None:
    """Upload model.so, unless the board has kept the same bytes from before."""
    digest = bundle.manifest.files[LIBRARY]
    kept = "what it has kept"
    if keeps and link(
        lambda: remote.get_function("netship.have")(digest, LIBRARY), kept
    ):
        return
    try:
        link(lambda: remote.upload(str(bundle.library)), f"the upload of {LIBRARY}")
        if keeps:
            link(lambda: remote.get_function("netship.keep")(LIBRARY), kept)
    except RefusedError as error:
        raise UserError(
            f"{error}: {LIBRARY} could not be written there: {error.reason}; make room on the board's disk"
        ) from None


def _check_architecture(bundle: Bundle, link: Link, remote: Any) -> None:
    """Compare architectures by a program that every Linux board has; TVM's own server cannot tell its own."""
    try:
        header = bytes(
            link(lambda: remote.download("/bin/true"), "what the board is")[:20]
        )
    except UserError:  # a server that gives files of its own folder only
        return
    with bundle.library.open("rb") as file:
        expected = file.read(20)
    if header[:4] == b"\x7fELF" and (header[4], header[18:]) != (
        expected[4],
        expected[18:],
    ):
        raise UserError(
            f"{link.where}: the board is not {bundle.manifest.target.machine}, which model.so "
            "is for; build for the board's CPU (`python -m targets` lists the targets)"
        )


def _set_threads(link: Link, remote: Any, wanted: int | None, usual: int) -> int:
    """Limit the server's pool; it cannot grow beyond what the server was started with."""

    def configure() -> int:
        limit_threads(remote, wanted or usual)
        return int(remote.get_function("runtime.NumThreads")())

    actual = link(configure, "its number of threads")
    if wanted and actual != wanted:
        raise UserError(
            f"{link.where}: the board's server has {counted(actual, 'thread')}, not {wanted}; start it "
            f"with TVM_NUM_THREADS={wanted} in its environment, or leave --threads out"
        )
    return actual
