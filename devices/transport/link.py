"""A connection to a TVM RPC server on which no call waits for ever."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import sys
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import wait as wait_for
from contextlib import AbstractContextManager
from pathlib import Path
from threading import Thread
from typing import Any, NamedTuple, TypeVar

from netship.targets import engine
from netship.targets.errors import UserError, last_line

T = TypeVar("T")
Note = Callable[[str], None]

# Seconds for a server's first answer.
PROBE_SECONDS = 5.0
# tvm/rpc/base.py
_MAGIC, _MISMATCH = 0xFF271, 0xFF273
# After which a wait for another client is shown.
_SHOW_SECONDS = 1.0
# threading::ThreadGroup::kBig (tvm/runtime/threading_backend.h)
_BIG_CORES = 1


class Address(NamedTuple):
    """Where a server can be connected to.

    Attributes:
        key: what a client has to give; of a tracker, which of its boards.
        name: of the board, for messages, where host and port say little.
    """

    host: str
    port: int
    key: str = ""
    name: str = ""

    def __str__(self) -> str:
        return self.name or f"{self.host}:{self.port}"


Find = Callable[[], AbstractContextManager[Address]]
"""Gives a board's address anew for each connection; the context outlives the connection."""


class RefusedError(UserError):
    """The server answers, but a call failed there; ``reason`` is what the server says."""

    reason = ""


class LostError(UserError):
    """The board went away, or does not answer any more; it may come back."""


class Link:
    """A connection to an RPC server. Every call runs in a thread and is waited for a limited time.

    So a dead board ends in an error, and Ctrl-C ends a call at once.

    Args:
        call_timeout: seconds for one call.
        probe_timeout: seconds for the server's first answer.
        why_ended: says, after a failure, why the server ended, in words for the user; empty
            where it cannot tell.
    """

    def __init__(
        self,
        address: Address,
        call_timeout: float,
        probe_timeout: float = PROBE_SECONDS,
        why_ended: Callable[[], str] = lambda: "",
    ) -> None:
        self.where = str(address)
        self._key = address.key
        self._socket = (_probe(address, probe_timeout), address.port)
        self._timeout = call_timeout
        self._why_ended = why_ended
        self._broken = False

    def connect(
        self,
        wait: float | None = None,
        on_note: Note = lambda line: None,
    ) -> Any:
        """TVM's session object.

        Args:
            wait: seconds for another client to leave; a call's where None.
            on_note: called with a line where one is waited for.

        Raises:
            LostError: another client stays, or the server ended.
            UserError: the server wants another key.
        """
        tvm, wait = client(), self._timeout if wait is None else wait

        def busy() -> None:
            on_note(
                f"waiting up to {wait:g} s for {self.where}, which another client has"
            )

        try:
            return self._within(
                lambda: tvm.rpc.connect(*self._socket, self._key),
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
        """The result of ``action``, which talks to the server; ``step`` names it in messages.

        Raises:
            LostError: the connection is lost, or there was no answer in time.
            RefusedError: the server says that it failed.
        """
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
        except client().TVMError as error:
            raise self._explain(error) from None

    def _explain(self, error: Exception) -> UserError:
        text = str(error)
        if "Error caught from RPC call" in text and "Timeout" not in text:
            refused = RefusedError(f"{self.where}: the server refused a call")
            refused.reason = last_line(str(error))
            return refused
        self.close()
        reason = self._why_ended() or (
            f"the connection was lost ({last_line(str(error))}); check the board, whose server also "
            "ends if model.so needs an instruction that its CPU lacks, and start it again"
        )
        return LostError(f"{self.where}: {reason}")

    def close(self) -> None:
        """Hang up, which also ends a call that is waiting."""
        self._broken = True
        for descriptor in Path("/proc/self/fd").iterdir():
            # Closed in the meantime, or a socket that is not connected.
            with contextlib.suppress(OSError):
                if os.readlink(descriptor).startswith("socket:"):
                    _shut_down(int(descriptor.name), self._socket)


def connect(
    address: Address, timeout: float, hint: str, what: str = ""
) -> socket.socket:
    """Open a connection.

    Args:
        timeout: seconds for this and every later step.
        hint: what to do where nobody listens.
        what: goes before the host in messages, with a space.
    """
    host, port, *_ = address
    try:
        return socket.create_connection((host, port), timeout)
    except socket.gaierror:
        raise UserError(f"{what}{host}: unknown host; check its name") from None
    except (ConnectionRefusedError, TimeoutError):
        problem = "nobody listens"
    except OSError as error:
        problem = str(error.strerror or error)
    raise UserError(f"{what}{host}:{port}: {problem}; {hint}")


def receive(connection: socket.socket, size: int) -> bytes:
    """Exactly ``size`` bytes.

    Raises:
        OSError: the other side hung up, or was silent for the timeout.
    """
    received = b""
    while len(received) < size:
        part = connection.recv(size - len(received))
        if not part:
            raise ConnectionResetError("closed")
        received += part
    return received


def limit_threads(remote: Any, count: int) -> None:
    """Limit the thread pool of the server; it cannot grow beyond what the server was started with."""
    remote.get_function("runtime.config_threadpool")(_BIG_CORES, count)


def client() -> Any:
    """TVM as a client: no inference runs in this process, so its threads do not matter."""
    if "tvm" not in sys.modules:
        engine.runtime(1)
    import tvm.rpc

    if sys.unraisablehook is not _ignore_lost_arrays:
        sys.unraisablehook = _ignore_lost_arrays
    return tvm


def _ignore_lost_arrays(unraisable: Any) -> None:
    """Print nothing of an array's ``__del__`` that cannot free the array on a board which is gone."""
    if not isinstance(unraisable.exc_value, sys.modules["tvm"].TVMError):
        sys.__unraisablehook__(unraisable)


def _shut_down(descriptor: int, address: tuple[str, int]) -> None:
    """Shut a socket down if it leads to ``address``; TVM does not give its sockets to us."""
    connection = socket.socket(fileno=descriptor)
    try:
        if connection.getpeername()[:2] == address:
            connection.shutdown(socket.SHUT_RDWR)
    finally:
        connection.detach()


def _probe(address: Address, timeout: float) -> str:
    """Make sure that a TVM RPC server listens, without taking it from anybody; its IP address.

    TVM's own client waits for ever for an answer. No server has the key that is sent here, so a
    server says "mismatch" and goes on waiting for a client.
    """
    where = f"{address.host}:{address.port}"
    greeting = b"client:netship-probe"
    hint = _start_server_hint(address.port)
    with connect(address, timeout, hint) as connection:
        try:
            connection.sendall(struct.pack("<ii", _MAGIC, len(greeting)) + greeting)
            (code,) = struct.unpack("<i", receive(connection, 4))
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


def _start_server_hint(port: int) -> str:
    return (
        f"on the board run `./serve --port {port}` of its kit (`python -m runtime_demo.board kit` makes one), "
        f"or `python -m tvm.exec.rpc_server --port {port} --port-end {port + 1}`"
    )
