"""Run TVM or ONNX Runtime in a child process, so that its abort becomes one line and Ctrl-C acts at once."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import re
import signal
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Iterator
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

from netship.targets.disk import DISK_FULL, why_full
from netship.targets.errors import UserError, ended_from_outside, last_line
from netship.targets.interrupts import ENDING


class EndedAbruptly(UserError):
    """The child process died: what it ran aborted or crashed it, or the system ended it."""


T = TypeVar("T")
Stage = Callable[[str], None]


def run_in_child(
    work: Callable[..., T], *arguments: object, stage: Stage, tick: Callable[[], None]
) -> T:
    """``work(*arguments, stage)`` in a fresh Python process.

    Args:
        work: a module-level function; its last argument is called with each stage's name.
        stage: called here with the names the child reports.
        tick: called here a few times a second while the child works.

    Raises:
        EndedAbruptly: the child died (the engine aborted, was killed, …).
        UserError: raised by ``work``.
        OSError: raised by ``work``.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    with tempfile.TemporaryDirectory(prefix="netship-") as scratch:
        noise = Path(scratch) / "stderr"
        process = context.Process(
            target=_child, args=(sender, noise, scratch, work, arguments), daemon=True
        )
        # Starting the tracker unblocks signals; it must not happen below, where they are blocked.
        resource_tracker.ensure_running()
        signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)
        # Another thread, such as a library's, may still receive a signal: it is raised again once there is a child to end.
        received: list[int] = []
        # Python handles signals in the main thread only, and lets no other thread say how.
        in_main = threading.current_thread() is threading.main_thread()
        handlers = {
            number: signal.signal(number, lambda now, _: received.append(now))
            for number in (ENDING if in_main else ())
        }
        with _without_main(work):
            process.start()
        try:
            for number, handler in handlers.items():
                signal.signal(number, handler)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, ENDING)
            for each in received:
                signal.raise_signal(each)
            sender.close()
            result: T = _follow(receiver, noise, process, stage, tick)
            return result
        finally:
            _end(process)
            receiver.close()


@contextlib.contextmanager
def _without_main(work: Callable[..., object]) -> Iterator[None]:
    """The child does not import the script that runs here: a user's may lack ``if __name__ == "__main__"``."""
    main = sys.modules["__main__"]
    if work.__module__ != "__main__":
        sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


def _follow(
    receiver: Connection,
    noise: Path,
    process: multiprocessing.process.BaseProcess,
    stage: Stage,
    tick: Callable[[], None],
) -> Any:
    while True:
        try:
            while not receiver.poll(0.2):
                tick()
            kind, value = receiver.recv()
        except EOFError:
            process.join()
            raise _why_it_ended(process.exitcode, noise) from None
        if kind == "stage":
            stage(value)
        elif kind == "refused":
            raise value
        elif kind == "failed":
            raise RuntimeError(f"in the engine's process:\n{value}")
        else:
            return value


def _end(process: multiprocessing.process.BaseProcess) -> None:
    """End the child, if it still runs, and all that it started."""
    assert process.pid
    # There is no such group where the child has not made it yet, or where all of it has ended.
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.kill()
    process.join()


def _why_it_ended(exitcode: int | None, noise: Path) -> UserError:
    how = signal.Signals(-exitcode).name if exitcode and exitcode < 0 else ""
    last = last_line(noise.read_text(errors="replace") if noise.exists() else "")[:300]
    folder = Path(tempfile.gettempdir())
    failed_to_write = "IO failure on output stream" in last
    # LLVM and the linker end so where a file that they map cannot grow.
    looks_full = failed_to_write or how in ("SIGABRT", "SIGBUS")
    full = why_full(folder) if looks_full else ""
    if full or failed_to_write:
        return _no_room(folder, full or last)
    if outside := ended_from_outside(how):
        return UserError(f"the engine's process {outside}")
    return EndedAbruptly(
        f"the engine's process ended abruptly ({how or f'exit code {exitcode}'}: {last}); "
        "--target another CPU, or report the model that does it"
    )


def _no_room(folder: Path, why: str) -> UserError:
    return UserError(f"{folder}: {why}; make room, or set TMPDIR to another folder")


def _child(
    sender: Connection,
    noise: Path,
    scratch: str,
    work: Callable[..., Any],
    arguments: tuple[object, ...],
) -> None:
    # Only the parent ends this process, together with the linker that it started. So it has a process
    # group of its own; signals that reached the terminal's group before were meant for the parent.
    os.setpgid(0, 0)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, ENDING)
    # What LLVM and TVM print goes into the error line, not between the user's own lines.
    # TVM's temporary files go where the parent removes them, however the child ends.
    descriptor = os.open(noise, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    # A blank line reserves a block of the disk, so that an error message has room on a full one.
    os.write(descriptor, b"\n")
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.environ["TMPDIR"] = tempfile.tempdir = scratch
    try:
        message: tuple[str, Any] = (
            "done",
            work(*arguments, lambda name: sender.send(("stage", name))),
        )
    except (UserError, OSError) as error:
        # The parent finds no full disk where only the files of `scratch` filled it.
        lacks_room = isinstance(error, OSError) and error.errno in DISK_FULL
        full = why_full(Path(scratch)) if lacks_room else ""
        if full:
            error = _no_room(Path(scratch).parent, full)
        # `scratch` is removed.
        elif scratch in str(error) and isinstance(error, UserError):
            inside = rf"{re.escape(scratch)}[^\s:;]*"
            error = UserError(re.sub(inside, str(Path(scratch).parent), str(error)))
        message = ("refused", error)
    except Exception:  # noqa: BLE001 - the parent raises it
        message = ("failed", traceback.format_exc())
    sender.send(message)
    sender.close()
    # TVM's thread pool may hang at exit (seen under emulation); all results are sent.
    os._exit(0)
