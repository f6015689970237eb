"""Run engine work in a child process: an abort inside LLVM becomes one line, Ctrl-C is immediate."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from signal import Signals
from typing import Any, TypeVar

from targets.errors import UserError

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
        UserError: raised by ``work``, or the child died (the engine aborted, was killed, …).
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    with tempfile.TemporaryDirectory(prefix="netship-") as scratch:
        noise = Path(scratch) / "stderr"
        process = context.Process(
            target=_child, args=(sender, noise, scratch, work, arguments), daemon=True
        )
        process.start()
        sender.close()
        try:
            result: T = _follow(receiver, noise, process, stage, tick)
            return result
        finally:
            if process.is_alive():
                process.kill()
            process.join()
            receiver.close()


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
            raise UserError(_last_words(process.exitcode, noise)) from None
        if kind == "stage":
            stage(value)
        elif kind == "refused":
            raise UserError(value)
        elif kind == "failed":
            raise RuntimeError(f"in the engine's process:\n{value}")
        else:
            return value


def _last_words(exitcode: int | None, noise: Path) -> str:
    how = (
        Signals(-exitcode).name
        if exitcode and exitcode < 0
        else f"exit code {exitcode}"
    )
    text = noise.read_text(errors="replace") if noise.exists() else ""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    said = f": {lines[-1][:300]}" if lines else ""
    return (
        f"the engine's process ended abruptly ({how}){said}; "
        "--target another CPU, or report the model that does it"
    )


def _child(
    sender: Connection,
    noise: Path,
    scratch: str,
    work: Callable[..., Any],
    arguments: tuple[object, ...],
) -> None:
    # What LLVM and TVM print belongs into the error line, not between the user's own lines.
    # TVM's temporary files go where the parent cleans up, however the child ends.
    descriptor = os.open(noise, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.environ["TMPDIR"] = tempfile.tempdir = scratch
    try:
        message: tuple[str, Any] = (
            "done",
            work(*arguments, lambda name: sender.send(("stage", name))),
        )
    except UserError as error:
        message = ("refused", str(error))
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        message = ("refused", f"{where}{error.strerror or error}")
    except KeyboardInterrupt:
        return
    except Exception:  # noqa: BLE001  (whatever it is, the parent must hear of it)
        message = ("failed", traceback.format_exc())
    sender.send(message)
    sender.close()
    # TVM's thread pool may hang at exit (seen under emulation); all results are sent.
    os._exit(0)
