"""Runs the search in a process of its own, which AutoScheduler's C++ may end: an assertion of it costs one round."""

from __future__ import annotations

import ctypes
import mmap
import os
import signal
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from netship.targets import interrupts
from netship.targets.errors import UserError

# A task in whose rounds the process ended so often is left as it is.
_PATIENCE = 2
_CRASHES = ("SIGABRT", "SIGBUS", "SIGFPE", "SIGILL", "SIGSEGV")
PARENT_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of linux/prctl.h
_SIZE = 4096


class Rounds:
    """The task that the search is at, known to the process that waits for it.

    Args:
        folder: for files of the search; None where it makes one of its own.

    Attributes:
        lost: how many times the process ended in a round of each task, by what the task computes.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder
        self.lost: Counter[str] = Counter()
        self._shared = mmap.mmap(-1, _SIZE)

    @property
    def current(self) -> str:
        """The task; empty between rounds."""
        return self._shared[:].rstrip(b"\0").decode(errors="replace")

    def is_left(self, task: str) -> bool:
        return self.lost[task] >= _PATIENCE

    @contextmanager
    def at(self, task: str) -> Iterator[None]:
        self._write(task)
        try:
            yield
        finally:
            self.leave()

    def leave(self) -> None:
        self._write("")

    def _write(self, task: str) -> None:
        self._shared[:] = task.encode()[:_SIZE].ljust(_SIZE, b"\0")


def print_line(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def supervised(
    search: Callable[[Rounds], int], say: Callable[[str], None] = print_line
) -> int:
    """The exit code of ``search``, which runs in a child; where a round ends the child, another one goes on.

    Args:
        say: is called where a round ended the child.

    Raises:
        UserError: the child was ended outside a round, or by somebody.
    """
    # Both processes remove it in the end.
    with TemporaryDirectory(
        prefix="netship-tune-", ignore_cleanup_errors=True
    ) as folder:
        rounds = Rounds(Path(folder))
        while True:
            parent = os.getpid()
            rounds.leave()
            child = os.fork()
            if not child:
                ctypes.CDLL(None).prctl(PARENT_DEATH_SIGNAL, signal.SIGKILL)
                if os.getppid() != parent:
                    os._exit(1)
                return search(rounds)
            code = _wait(child)
            if code >= 0:
                return code
            say(_go_on(signal.Signals(-code).name, rounds))


def _go_on(name: str, rounds: Rounds) -> str:
    """What becomes of the search."""
    task = rounds.current
    if name not in _CRASHES or not task:
        raise UserError(
            f"the search's process was ended by {name}; what was measured is kept, and the same command goes on"
        )
    rounds.lost[task] += 1
    then = "the task is left" if rounds.is_left(task) else "the search goes on"
    return f"the search's process was ended by {name} in a round of {task}: what was measured is kept, {then}"


def _wait(child: int) -> int:
    """The child's exit code, negative of a signal; an interrupt is passed on."""
    while True:
        try:
            return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        except KeyboardInterrupt:
            # The child says what became of it.
            os.kill(child, interrupts.exit_code() - 128)
