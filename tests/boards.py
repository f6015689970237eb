"""Boards for tests: native servers on this machine that can die and come back, and a wire that notices what passes."""

from __future__ import annotations

import os
import re
import resource
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from netship.bundle.store import Bundle
from netship.devices.board.programs import native_server
from netship.devices.sessions.rpc import open_rpc
from netship.devices.sessions.session import Session
from netship.devices.transport.link import Address
from netship.devices.transport.tracker import boards_of, open_tracker, request_board
from netship.targets.errors import UserError
from netship.targets.presets import native

HOST = "127.0.0.1"
KEY = "pi"
WITHIN = 30.0


def until(condition: Callable[[], object], seconds: float = WITHIN) -> None:
    """Wait for what must come about."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come about"
        time.sleep(0.02)


def free_port() -> int:
    with socket.socket() as free:
        free.bind((HOST, 0))
        return int(free.getsockname()[1])


class Board:
    """A native server on a port that stays the same; the work folder too.

    Args:
        program: the server and what runs it; this machine's own where None.
        largest_file: bytes; a full disk.
    """

    def __init__(
        self,
        folder: Path,
        *options: str,
        program: Sequence[str] | None = None,
        port: int | None = None,
        largest_file: int | None = None,
    ) -> None:
        self.folder = folder
        folder.mkdir(exist_ok=True)
        self.port = port or free_port()
        self._options = options
        self._program = program or [str(native_server(native().machine))]  # type: ignore[arg-type]
        self._largest_file = largest_file
        self.start()

    def start(self) -> None:
        limit = self._largest_file
        end = ["--port", str(self.port), "--key", KEY, "--work-dir", str(self.folder)]
        self.process = subprocess.Popen(
            [*self._program, *end, "--end-with-stdin", *self._options],
            # However the tests end, it ends with them.
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        if limit:
            resource.prlimit(self.process.pid, resource.RLIMIT_FSIZE, (limit, limit))
        assert self.process.stdout
        line = self.process.stdout.readline()
        assert re.fullmatch(rb"listening on \S+:\d+\n", line), line

    def kill(self) -> None:
        """As a power cut: it and the process of its client."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        assert self.process.stdin and self.process.stdout
        self.process.stdin.close()
        self.process.stdout.close()

    def restart(self) -> None:
        self.kill()
        self.start()

    def files(self) -> list[Path]:
        """Of clients that have the board or had it."""
        return list(self.folder.glob("netship-serve-*/client/*"))

    def sessions(self) -> list[Path]:
        return list(self.folder.glob("netship-serve-*/client"))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.kill()


def open_from_tracker(
    bundle: Bundle, port: int, *, key: str = KEY, wait: float = 60, timeout: float = 5
) -> Session:
    """A bundle on a board that the tracker at a port of this machine gives."""
    tracker = Address(HOST, port, key)
    return open_rpc(bundle, request_board(tracker, wait, timeout=timeout))


class Wire:
    """A port that leads to another one, and acts once when ``word`` passes on its way there.

    Args:
        lie: in answers, what is said and what is heard.

    Attributes:
        carried: bytes that went there.
    """

    def __init__(
        self,
        to: int,
        word: bytes = b"",
        action: Callable[[], object] = lambda: None,
        lie: tuple[bytes, bytes] = (b"\0" * 999, b""),
    ) -> None:
        self._to, self._word, self._action, self._lie = to, word, action, lie
        self._listener = socket.create_server((HOST, 0))
        self.port = int(self._listener.getsockname()[1])
        self.carried = 0
        self.acted = not word
        self._open: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                here, _ = self._listener.accept()
                try:
                    there = socket.create_connection((HOST, self._to))
                except OSError:
                    here.close()
                    continue
                self._open += [here, there]
                for pair in ((here, there, True), (there, here, False)):
                    threading.Thread(target=self._pump, args=pair, daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket, forth: bool) -> None:
        seen = b""
        with suppress(OSError):
            while part := source.recv(65536):
                if forth and not self.acted:
                    seen = (seen + part)[-(65536 + len(self._word)) :]
                    if self._word in seen:
                        self.acted = True
                        self._action()
                sink.sendall(part if forth else part.replace(*self._lie))
                self.carried += len(part) if forth else 0
        for end in (source, sink):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for end in self._open:
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()


@contextmanager
def tracked(folder: Path, count: int) -> Iterator[tuple[int, list[Board]]]:
    """A tracker's port and boards that it knows under KEY."""
    with ExitStack() as stack:
        port = stack.enter_context(open_tracker(0))
        boards = [
            stack.enter_context(
                Board(folder / f"board{index}", "--tracker", f"{HOST}:{port}")
            )
            for index in range(count)
        ]

        def all_there() -> bool:
            try:
                return boards_of(Address(HOST, port, KEY)).free == count
            except UserError:
                return False

        until(all_there)
        yield port, boards
