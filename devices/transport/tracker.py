"""TVM's trackers: asking one for boards, and running one on 127.0.0.1 in a thread of this process."""

from __future__ import annotations

import asyncio
import json
import logging
import secrets
import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Thread
from typing import Any, NamedTuple

from netship.devices.transport.link import (
    PROBE_SECONDS,
    Address,
    Note,
    connect,
    receive,
)
from netship.targets import engine
from netship.targets.errors import UserError
from netship.targets.escapes import all_counted, counted

# tvm/rpc/base.py
_TRACKER_MAGIC = 0x2F271
_TRACKER_SUCCESS, _TRACKER_REQUEST, _TRACKER_SUMMARY = 0, 4, 6
_MAX_ANSWER = 1 << 20


class Queue(NamedTuple):
    """The boards that a tracker has under a key: all of them, and those that wait for a client."""

    boards: int
    free: int


def request_board(
    tracker: Address,
    wait: float,
    *,
    timeout: float = PROBE_SECONDS,
    priority: int = 1,
    on_note: Note = lambda line: None,
) -> Address:
    """Ask a tracker for a free board; the key of its address is for one connection.

    Args:
        wait: seconds for a free board.
        timeout: seconds for the tracker's other answers.
        priority: where several clients wait, the one with the larger number goes first.
        on_note: called with a line where no board is free.

    Raises:
        UserError: no tracker there, no board with that key, none free within ``wait`` seconds.
    """
    where, key = f"tracker {tracker}", tracker.key
    with _connection(tracker, timeout) as connection:
        boards, free = _queue(connection, tracker)
        if not free:
            on_note(
                f"waiting up to {wait:g} s for one of {counted(boards, 'board')} with key {key!r}, all busy"
            )
        connection.settimeout(wait)
        try:
            status, board = _ask(connection, [_TRACKER_REQUEST, key, "", priority])
            host, port, match = board
            if status != _TRACKER_SUCCESS:
                raise ValueError("status")
            return Address(str(host), int(port), str(match))
        except TimeoutError:
            raise UserError(
                f"{where}: {all_counted(boards, 'board')} with key {key!r} stayed busy for "
                f"{wait:g} s; try again later, or with a higher --priority"
            ) from None
        except (OSError, ValueError, TypeError):
            raise UserError(
                f"{where}: gave no board; start the tracker again"
            ) from None


def boards_of(tracker: Address) -> Queue:
    """How many boards a tracker has under the address's key.

    Raises:
        UserError: no tracker there, or no board with that key.
    """
    with _connection(tracker, PROBE_SECONDS) as connection:
        return _queue(connection, tracker)


def _connection(tracker: Address, timeout: float) -> socket.socket:
    hint = "start one with `python -m tvm.exec.rpc_tracker`"
    connection = connect(tracker, timeout, hint, "tracker ")
    try:
        connection.sendall(struct.pack("<i", _TRACKER_MAGIC))
        (magic,) = struct.unpack("<i", receive(connection, 4))
        if magic != _TRACKER_MAGIC:
            raise ValueError("magic")
    except (OSError, ValueError):
        connection.close()
        raise _no_tracker(tracker) from None
    return connection


def _no_tracker(tracker: Address) -> UserError:
    return UserError(
        f"tracker {tracker}: what listens there is no TVM RPC tracker; check host and port"
    )


def _queue(connection: socket.socket, tracker: Address) -> Queue:
    key = tracker.key
    try:
        _, summary = _ask(connection, [_TRACKER_SUMMARY])
        names = [info["key"] for info in summary["server_info"] if "key" in info]
        keys = [str(name).removeprefix("server:") for name in names]
        free = int(summary["queue_info"].get(key, {}).get("free", 0))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise _no_tracker(tracker) from None
    if key not in keys:
        known = ", ".join(sorted(set(keys))) or "none"
        raise UserError(
            f"tracker {tracker}: no board with key {key!r} (registered: {known}); on the board run "
            f"`./serve --tracker {tracker} --key {key}` of its kit"
        )
    return Queue(keys.count(key), free)


def _ask(connection: socket.socket, request: list[object]) -> tuple[int, Any]:
    data = json.dumps(request).encode()
    connection.sendall(struct.pack("<i", len(data)) + data)
    (size,) = struct.unpack("<i", receive(connection, 4))
    if not 0 < size <= _MAX_ANSWER:
        raise ValueError("size")
    status, value = json.loads(receive(connection, size))
    return status, value


@contextmanager
def open_tracker(port: int) -> Iterator[int]:
    """Run a tracker for as long as the context lasts; its port.

    Args:
        port: 0 for any that is free.
    """
    engine.runtime(1)
    # The tracker logs a warning for every client that hangs up.
    logging.getLogger("RPCTracker").setLevel(logging.CRITICAL)
    from tvm.rpc.tracker import TrackerServerHandler

    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(("127.0.0.1", port))
        except OSError as error:
            raise UserError(
                f"127.0.0.1:{port}: {error.strerror}; choose another --port"
            ) from None
        listener.listen()
        started: list[asyncio.AbstractEventLoop] = []

        def serve() -> None:
            loop = asyncio.new_event_loop()
            asyncio.set_event_loop(loop)
            handler = TrackerServerHandler(listener, secrets.token_hex())
            started.append(loop)
            handler.run()

        thread = Thread(target=serve, daemon=True)
        thread.start()
        try:
            yield int(listener.getsockname()[1])
        finally:
            for loop in started:
                loop.call_soon_threadsafe(loop.stop)
            thread.join(2)
