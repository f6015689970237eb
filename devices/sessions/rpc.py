"""A bundle on a board over TVM RPC: an address, a tracker, or a server of our own on 127.0.0.1.

TVM's RPC has no encryption and no login: whoever reaches a server can run anything there.
Use it in a network you trust. Servers started here listen on 127.0.0.1 only and want a
random key.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import struct
import sys
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import wait as wait_for
from contextlib import ExitStack
from pathlib import Path
from threading import Thread
from typing import Any, NamedTuple, TypeVar

from bundle.store import LIBRARY, Bundle
from devices.board import board_state
from devices.board.board_state import BoardState, check_fits
from devices.sessions.graph import GraphSession
from devices.sessions.local import check_runs_here, last_line
from devices.sessions.session import Origin, Session
from devices.transport.server import Server, start_server, this_python
from targets import engine
from targets.errors import UserError
from targets.presets import this_cpu

T = TypeVar("T")
Note = Callable[[str], None]

# tvm/rpc/base.py
_MAGIC, _MISMATCH = 0xFF271, 0xFF273
_TRACKER_MAGIC = 0x2F271
_TRACKER_SUCCESS, _TRACKER_REQUEST, _TRACKER_SUMMARY = 0, 4, 6

_PROBE_SECONDS = 5.0
_CALL_SECONDS = 60.0
_START_SECONDS = 30.0
# After which a wait for another client is shown.
_SHOW_SECONDS = 1.0
_MAX_TRACKER_ANSWER = 1 << 20
# threading::ThreadGroup::kBig (tvm/runtime/threading_backend.h)
_BIG_CORES = 1


def open_rpc(
    bundle: Bundle,
    host: str,
    port: int,
    *,
    key: str = "",
    threads: int | None = None,
    wait: float = 60.0,
    call_timeout: float = _CALL_SECONDS,
    probe_timeout: float = _PROBE_SECONDS,
    name: str = "",
    cleanup: ExitStack | None = None,
    on_note: Note = lambda line: None,
) -> Session:
    """Load a bundle on the board whose RPC server is at ``host:port``.

    Args:
        key: what the server was started with (``--key``).
        threads: at most the manifest's where None.
        wait: seconds for another client to go.
        call_timeout: seconds for one call: an upload, an inference.
        probe_timeout: seconds for the server's first answer.
        name: of the board, for messages, where the address says little.
        cleanup: what ends with the session, and where it cannot be opened.
        on_note: called with a line when another client is waited for.

    Raises:
        LostError: the connection is lost, or a call took too long.
        UserError: nobody or something else listens there, the bundle does not fit the board, its disk is full.
    """
    with cleanup or ExitStack() as stack:
        link = Link(host, port, call_timeout, probe_timeout, name=name)
        return _open(bundle, link, key, threads, Origin.BOARD, stack, wait, on_note)


def describe(host: str, port: int, key: str, name: str = "") -> BoardState | None:
    """What the board at an address says of itself; None of a server that is not ours.

    Raises:
        UserError: nobody or something else listens there, or it is lost.
    """
    link = Link(host, port, _PROBE_SECONDS, _PROBE_SECONDS, name=name)
    try:
        remote = link.connect(key)
        said = link(lambda: board_state.ask(remote), "what the board is")
        return None if said is None else board_state.parse(said, link.where)
    finally:
        link.close()


def open_tracker(
    bundle: Bundle,
    host: str,
    port: int,
    key: str,
    *,
    threads: int | None = None,
    wait: float = 60.0,
    priority: int = 1,
    call_timeout: float = _CALL_SECONDS,
    probe_timeout: float = _PROBE_SECONDS,
) -> Session:
    """Load a bundle on a board that a tracker has under ``key``, waiting ``wait`` seconds for a free one.

    Raises:
        UserError: no tracker there, no board with that key, all are busy; and as `open_rpc`.
    """
    board_host, board_port, match = request_board(
        host, port, key, wait, probe_timeout, priority
    )
    return open_rpc(
        bundle,
        board_host,
        board_port,
        key=match,
        threads=threads,
        call_timeout=call_timeout,
        probe_timeout=probe_timeout,
    )


def open_rpc_local(bundle: Bundle, threads: int | None = None) -> Session:
    """Load a bundle in a stock RPC server that is started on this machine and ends with the session.

    Raises:
        UserError: built for another architecture or CPU, or the server did not start.
    """
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
    """Start a server, load the bundle there, end the server with the session.

    Args:
        cpu: what it runs on, for a message.
    """
    with ExitStack() as cleanup:
        server = start()
        cleanup.callback(server.close)
        target = bundle.manifest.target

        def death() -> str:
            reason = server.death()
            if reason == "SIGILL":
                return (
                    f"model.so, built for {target.name}, needs an instruction that "
                    f"{cpu} does not have; build it for that CPU"
                )
            return reason and f"the RPC server ended ({reason}); run the command again"

        link = Link("127.0.0.1", server.port, call_timeout, _PROBE_SECONDS, death)
        return _open(bundle, link, server.key, threads, origin, cleanup)


def _open(
    bundle: Bundle,
    link: Link,
    key: str,
    threads: int | None,
    origin: Origin,
    cleanup: ExitStack,
    wait: float = _CALL_SECONDS,
    on_note: Note = lambda line: None,
) -> Session:
    cleanup.callback(link.close)
    remote = link.connect(key, wait, on_note)

    def state() -> BoardState | None:
        said = link(lambda: board_state.ask(remote), "what the board is")
        return None if said is None else board_state.parse(said, link.where)

    # One that was started for this session alone keeps nothing for a next one.
    lasting = origin is Origin.BOARD
    found = state()
    if found is not None:
        check_fits(found, bundle, link.where, str(_tvm().__version__))
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
        state=state,
    )


def _send(bundle: Bundle, link: Link, remote: Any, *, keeps: bool) -> None:
    """Upload model.so, unless the board has kept those very bytes from before."""
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
    """Compare architectures by a program that every Linux board has; the runtime itself cannot tell."""
    try:
        header = bytes(
            link(lambda: remote.download("/bin/true"), "what the board is")[:20]
        )
    except UserError:  # a server that keeps to its own folder
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
        remote.get_function("runtime.config_threadpool")(_BIG_CORES, wanted or usual)
        return int(remote.get_function("runtime.NumThreads")())

    actual = link(configure, "its number of threads")
    if wanted and actual != wanted:
        raise UserError(
            f"{link.where}: the board's server has {actual} thread(s), not {wanted}; start it "
            f"with TVM_NUM_THREADS={wanted} in its environment, or leave --threads out"
        )
    return actual


class RefusedError(UserError):
    """The server lives and answers, but what it was told to do failed there; ``reason`` is what it says of it."""

    reason = ""


class LostError(UserError):
    """The board went away, or answers no more; it may come back."""


class Link:
    """A connection to an RPC server on which nothing waits for ever.

    Calling it runs an action in a thread and waits for a limited time, so that a dead
    board ends in an error and Ctrl-C is heard at once.

    Args:
        death: says, after a failure, why the server ended, in words for the user; empty
            where it cannot tell.
    """

    def __init__(
        self,
        host: str,
        port: int,
        call_timeout: float,
        probe_timeout: float,
        death: Callable[[], str] = lambda: "",
        name: str = "",
    ) -> None:
        self.where = name or f"{host}:{port}"
        self._address = (_probe(host, port, probe_timeout), port)
        self._timeout = call_timeout
        self._death = death
        self._broken = False

    def connect(
        self,
        key: str,
        wait: float | None = None,
        on_note: Note = lambda line: None,
    ) -> Any:
        """TVM's session object.

        Args:
            wait: seconds for another client to go; a call's where None.
            on_note: called with a line where one is waited for.
        """
        tvm, wait = _tvm(), self._timeout if wait is None else wait

        def busy() -> None:
            on_note(
                f"waiting up to {wait:g} s for {self.where}, which another client has"
            )

        try:
            return self._within(
                lambda: tvm.rpc.connect(*self._address, key),
                wait,
                "the handshake, as another client may have the board; try again later",
                busy,
            )
        except UserError as error:
            if "matches key" not in str(error):
                raise
            raise UserError(
                f"{self.where}: the server wants another key; give --key as it was started with"
            ) from None

    def __call__(self, action: Callable[[], T], step: str = "an inference") -> T:
        return self._within(
            action,
            self._timeout,
            f"{step}; check the board and its network, then start its RPC server again",
        )

    def _within(
        self,
        action: Callable[[], T],
        seconds: float,
        late: str,
        on_wait: Callable[[], None] = lambda: None,
    ) -> T:
        if self._broken:
            raise LostError(f"{self.where}: the connection is lost; open it again")
        future: Future[T] = Future()

        def work() -> None:
            try:
                future.set_result(action())
            except BaseException as error:  # noqa: BLE001 - handed over, not handled
                future.set_exception(error)

        Thread(target=work, daemon=True).start()
        try:
            if not wait_for([future], min(seconds, _SHOW_SECONDS)).done:
                on_wait()
            return future.result(max(0.0, seconds - _SHOW_SECONDS))
        except TimeoutError:
            self.close()
            raise LostError(
                f"{self.where}: no answer within {seconds:g} s to {late}"
            ) from None
        except KeyboardInterrupt:
            self.close()
            raise
        except _tvm().TVMError as error:
            raise self._explain(error) from None

    def _explain(self, error: Exception) -> UserError:
        text = str(error)
        if "Error caught from RPC call" in text and "Timeout" not in text:
            refused = RefusedError(f"{self.where}: the server refused a call")
            refused.reason = last_line(error)
            return refused
        self.close()
        reason = self._death() or (
            f"the connection was lost ({last_line(error)}); check the board, whose server also "
            "ends if model.so needs an instruction that its CPU lacks, and start it again"
        )
        return LostError(f"{self.where}: {reason}")

    def close(self) -> None:
        """Hang up, which also ends a call that is waiting."""
        self._broken = True
        for descriptor in Path("/proc/self/fd").iterdir():
            # Gone in between, or a socket that is not connected.
            with contextlib.suppress(OSError):
                if os.readlink(descriptor).startswith("socket:"):
                    _shut_down(int(descriptor.name), self._address)


def _shut_down(descriptor: int, address: tuple[str, int]) -> None:
    """Shut a socket of TVM's, which does not give it to us, if it leads to ``address``."""
    connection = socket.socket(fileno=descriptor)
    try:
        if connection.getpeername()[:2] == address:
            connection.shutdown(socket.SHUT_RDWR)
    finally:
        connection.detach()


def _tvm() -> Any:
    """TVM's client half: no inference runs in this process, so its threads do not matter."""
    if "tvm" not in sys.modules:
        engine.runtime(1)
    import tvm.rpc

    if sys.unraisablehook is not _forgive:
        sys.unraisablehook = _forgive
    return tvm


def _forgive(unraisable: Any) -> None:
    """Say nothing of an array that cannot be freed on a board which is gone: ``__del__`` has nobody to tell."""
    if not isinstance(unraisable.exc_value, sys.modules["tvm"].TVMError):
        sys.__unraisablehook__(unraisable)


def _probe(host: str, port: int, timeout: float) -> str:
    """Make sure that a TVM RPC server listens, without taking it from anybody; its IP address.

    TVM's own client waits for ever for an answer. The key sent here is no server's, so a
    server says "mismatch" and goes on waiting for a client.
    """
    where = f"{host}:{port}"
    greeting = b"client:netship-probe"
    with _connect(host, port, timeout, _start_server_hint(port)) as connection:
        try:
            connection.sendall(struct.pack("<ii", _MAGIC, len(greeting)) + greeting)
            (code,) = struct.unpack("<i", _receive(connection, 4))
        except TimeoutError:
            raise UserError(
                f"{where}: accepts connections but did not answer as a TVM RPC server within "
                f"{timeout:g} s; it is something else, or busy with another client"
            ) from None
        except OSError:
            code = 0
        if code not in (_MAGIC, _MISMATCH):
            raise UserError(
                f"{where}: what listens there is no TVM RPC server; "
                "if it is a tracker, use --tracker and --key"
            )
        return str(connection.getpeername()[0])


class Queue(NamedTuple):
    """What a tracker has under a key: boards in all, and how many wait for a client."""

    boards: int
    free: int


def request_board(
    host: str,
    port: int,
    key: str,
    wait: float,
    timeout: float,
    priority: int = 1,
    on_note: Note = lambda line: None,
) -> tuple[str, int, str]:
    """Ask a tracker for a free board: its host, its port, and the key for this one connection.

    Args:
        priority: the larger goes first where several wait.
        on_note: called with a line where none is free.

    Raises:
        UserError: no tracker there, no board with that key, none free within ``wait`` seconds.
    """
    where = f"tracker {host}:{port}"
    with _tracker(host, port, timeout) as connection:
        boards, free = _queue(connection, host, port, key)
        if not free:
            on_note(
                f"waiting up to {wait:g} s for one of {boards} board(s) with key {key!r}, all busy"
            )
        connection.settimeout(wait)
        try:
            status, board = _ask(connection, [_TRACKER_REQUEST, key, "", priority])
            board_host, board_port, match = board
            if status != _TRACKER_SUCCESS:
                raise ValueError("status")
            return str(board_host), int(board_port), str(match)
        except TimeoutError:
            raise UserError(
                f"{where}: all {boards} board(s) with key {key!r} stayed busy for "
                f"{wait:g} s; try again later, or with a higher --priority"
            ) from None
        except (OSError, ValueError, TypeError):
            raise UserError(
                f"{where}: gave no board; start the tracker again"
            ) from None


def boards_of(host: str, port: int, key: str, timeout: float = _PROBE_SECONDS) -> Queue:
    """How many boards a tracker has under ``key``.

    Raises:
        UserError: no tracker there, or no board with that key.
    """
    with _tracker(host, port, timeout) as connection:
        return _queue(connection, host, port, key)


def _tracker(host: str, port: int, timeout: float) -> socket.socket:
    hint = "start one with `python -m tvm.exec.rpc_tracker`"
    connection = _connect(host, port, timeout, hint, "tracker ")
    try:
        connection.sendall(struct.pack("<i", _TRACKER_MAGIC))
        (magic,) = struct.unpack("<i", _receive(connection, 4))
        if magic != _TRACKER_MAGIC:
            raise ValueError("magic")
    except (OSError, ValueError):
        connection.close()
        raise _no_tracker(host, port) from None
    return connection


def _no_tracker(host: str, port: int) -> UserError:
    return UserError(
        f"tracker {host}:{port}: what listens there is no TVM RPC tracker; check host and port"
    )


def _queue(connection: socket.socket, host: str, port: int, key: str) -> Queue:
    try:
        _, summary = _ask(connection, [_TRACKER_SUMMARY])
        names = [info["key"] for info in summary["server_info"] if "key" in info]
        keys = [str(name).removeprefix("server:") for name in names]
        free = int(summary["queue_info"].get(key, {}).get("free", 0))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise _no_tracker(host, port) from None
    if key not in keys:
        known = ", ".join(sorted(set(keys))) or "none"
        raise UserError(
            f"tracker {host}:{port}: no board with key {key!r} (registered: {known}); on the board run "
            f"`./serve --tracker {host}:{port} --key {key}` of its kit"
        )
    return Queue(keys.count(key), free)


def _ask(connection: socket.socket, request: list[object]) -> tuple[int, Any]:
    data = json.dumps(request).encode()
    connection.sendall(struct.pack("<i", len(data)) + data)
    (size,) = struct.unpack("<i", _receive(connection, 4))
    if not 0 < size <= _MAX_TRACKER_ANSWER:
        raise ValueError("size")
    status, value = json.loads(_receive(connection, size))
    return status, value


def _connect(
    host: str, port: int, timeout: float, hint: str, what: str = ""
) -> socket.socket:
    try:
        return socket.create_connection((host, port), timeout)
    except socket.gaierror:
        raise UserError(f"{what}{host}: unknown host; check its name") from None
    except (ConnectionRefusedError, TimeoutError):
        problem = "nobody listens"
    except OSError as error:
        problem = str(error.strerror or error)
    raise UserError(f"{what}{host}:{port}: {problem}; {hint}")


def _start_server_hint(port: int) -> str:
    return (
        f"on the board run `./serve --port {port}` of its kit (`python -m runtime_demo.board kit` makes one), "
        f"or `python -m tvm.exec.rpc_server --port {port} --port-end {port + 1}`"
    )


def _receive(connection: socket.socket, size: int) -> bytes:
    received = b""
    while len(received) < size:
        part = connection.recv(size - len(received))
        if not part:
            raise ConnectionResetError("closed")
        received += part
    return received
