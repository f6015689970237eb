"""Ctrl-C and SIGTERM: what a command does about them from its first import to its end.

`targets` imports this before it refuses a wrong Python, so its syntax is that of Python 3.6.
"""

import os
import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import TypeVar

T = TypeVar("T")
ENDING = (signal.SIGINT, signal.SIGTERM)
_SAID = "interrupted: nothing half-made was left behind"
_received: "list[int]" = []


class Interrupted(KeyboardInterrupt):
    """Ctrl-C or SIGTERM: the command cleans up, prints what this says, and ends."""

    def __init__(self, said: str = _SAID) -> None:
        super().__init__(said)


def exit_code() -> int:
    """128 + the signal, as a shell has it: 130 or 143; 0 while there was none."""
    return 128 + _received[0] if _received else 0


def end_at_once() -> None:
    """Until `raise_them`: end without a traceback, as nothing has begun."""
    _handle(_end)


def raise_them() -> None:
    """From now on raise `Interrupted` in the main thread."""
    _handle(_raise)


def ignore() -> None:
    """What is left to do takes no time and must not be cut short."""
    _handle(signal.SIG_IGN)


def restore() -> None:
    """In a process that is not a command: end by the signal."""
    _handle(signal.SIG_DFL)


def in_thread(work: "Callable[[], T]") -> T:
    """``work()`` in a thread, so that a signal is heard at once although the engine's C++ is busy.

    The thread goes on after an interrupt; `run_command` does not wait for it.
    """
    done: list[T] = []
    failed: list[BaseException] = []

    def do() -> None:
        try:
            done.append(work())
        except BaseException as error:  # noqa: BLE001 - raised below
            failed.append(error)
        finished.set()

    finished = threading.Event()
    threading.Thread(target=do, daemon=True).start()
    # Another thread may receive the signal, which does not end this thread's wait.
    while not finished.wait(0.1):
        pass
    if failed:
        raise failed[0]
    return done[0]


def _handle(
    handler: "Callable[[int, FrameType | None], object] | signal.Handlers",
) -> None:
    for number in ENDING:
        # A shell has background jobs ignore Ctrl-C.
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, handler)


def _end(number: int, _frame: object) -> None:
    os.write(2, (_SAID + "\n").encode())
    os._exit(128 + number)


def _raise(number: int, _frame: object) -> None:
    _received.append(number)
    # A second one must not interrupt the cleaning up.
    ignore()
    raise Interrupted
