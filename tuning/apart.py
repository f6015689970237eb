"""A search for the Python API in a process of its own: what ends it, such as an abort of the engine, is an error for the caller."""

from __future__ import annotations

import argparse
import ctypes
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from multiprocessing.connection import Connection
from typing import IO, Any, TypeVar

from netship.targets.errors import UserError, ended_from_outside, last_line, run_command
from netship.targets.progress import Progress
from netship.tuning.supervision import PARENT_DEATH_SIGNAL, Rounds, supervised

T = TypeVar("T")


def run(
    work: Callable[[argparse.Namespace, Progress, bool, Rounds], T],
    arguments: argparse.Namespace,
    progress: Progress,
) -> T:
    """``work(arguments, progress, True, rounds)`` as the command runs it: supervised, see tuning/supervision.py.

    Args:
        work: a module-level function; its progress is said here.

    Raises:
        UserError: as ``work``, or its process was ended.
        OSError: as ``work``.
    """
    ours, theirs = socket.socketpair()
    paths = map(os.path.abspath, sys.path)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    # Of a caller that runs builds; its process may not compile, this one must.
    environment.pop("TVM_USE_RUNTIME_LIB", None)
    with tempfile.TemporaryFile() as noise:
        with theirs:
            process = subprocess.Popen(
                [sys.executable, "-P", "-m", __name__, str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=noise,
                stderr=noise,
                # Ctrl-C is passed on below.
                start_new_session=True,
            )
        connection = Connection(ours.detach())
        try:
            connection.send((work, arguments))
            found: T = _follow(connection, process, noise, progress)
            return found
        except KeyboardInterrupt:
            # It ends the measurement and writes its page.
            process.send_signal(signal.SIGINT)
            process.wait()
            raise
        finally:
            process.kill()
            process.wait()
            connection.close()


def _follow(
    connection: Connection,
    process: subprocess.Popen[bytes],
    noise: IO[bytes],
    progress: Progress,
) -> Any:
    while True:
        try:
            kind, value = connection.recv()
        except (EOFError, ConnectionResetError):
            raise _why_ended(process.wait(), noise) from None
        if kind == "done":
            return value
        if kind == "refused":
            raise value
        progress.note(value)


def _why_ended(code: int, noise: IO[bytes]) -> Exception:
    noise.seek(0)
    said = noise.read().decode(errors="replace")
    if code == 1:
        return RuntimeError(f"in the search's process:\n{said}")
    if code >= 0:
        return UserError(last_line(said).removeprefix("error: "))
    name = signal.Signals(-code).name
    how = ended_from_outside(name) or f"was ended by {name}"
    return UserError(
        f"the search's process {how}; what was measured is kept, and the same call goes on"
    )


class _Said(Progress):
    """Sends the stages and notes to the caller's process."""

    def __init__(self, connection: Connection) -> None:
        super().__init__(quiet=True)
        self._connection = connection

    def stage(self, text: str) -> None:
        self.note(text)

    def note(self, text: str) -> None:
        self._connection.send(("said", text))


def main(connection: Connection, _argv: object = None) -> int:
    """Answer the one question that comes; the exit code."""
    ctypes.CDLL(None).prctl(PARENT_DEATH_SIGNAL, signal.SIGKILL)
    said = _Said(connection)

    def search(rounds: Rounds) -> int:
        message: tuple[str, object]
        try:
            message = "done", work(arguments, said, True, rounds)
        except (UserError, OSError) as error:
            message = "refused", error
        connection.send(message)
        return 0

    work, arguments = connection.recv()
    return supervised(search, said.note)


if __name__ == "__main__":
    run_command(partial(main, Connection(int(sys.argv[1]))))
