"""TVM's own tracker on 127.0.0.1, in a thread of this process."""

from __future__ import annotations

import asyncio
import logging
import secrets
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Thread

from targets import engine
from targets.errors import UserError


@contextmanager
def open_tracker(port: int) -> Iterator[int]:
    """Its port, for as long as the context lasts.

    Args:
        port: 0 for any that is free.

    Raises:
        UserError: the port is taken.
    """
    engine.runtime(1)
    # It warns of every client that hangs up.
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
