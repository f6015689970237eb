"""The base class of errors that a user can cause, and how a command line ends."""

from __future__ import annotations

import atexit
import os
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from netship.targets import interrupts
from netship.targets.commands import as_called
from netship.targets.disk import full_folder
from netship.targets.escapes import one_line
from netship.targets.interrupts import Interrupted


class UserError(Exception):
    """Something that the user can correct: the message says what, where and what to do.

    Any other exception that leaves a command is a bug, and shows its traceback.
    """

    def __str__(self) -> str:
        return as_called(super().__str__())


# The signals of a program that failed by itself; others come from outside.
_CRASHES = ("SIGSEGV", "SIGABRT", "SIGBUS", "SIGILL", "SIGFPE", "SIGTRAP")


def ended_from_outside(signal_name: str) -> str:
    """Why a process was ended, and what to do; empty where the signal is that of a crash."""
    if signal_name == "SIGKILL":
        return (
            "was killed (SIGKILL), as Linux does when memory is short; "
            "end other programs, then try again"
        )
    if not signal_name or signal_name in _CRASHES:
        return ""
    return f"was ended by another program ({signal_name}); run the command again"


def last_line(text: str, otherwise: str = "it said nothing") -> str:
    """The last line that is not blank: of what a tool says, and of TVM's errors, it is the reason."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else otherwise


def first_line(error: BaseException) -> str:
    """What an exception says first; where it says nothing, as `reason`."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else reason(error)


def reason(error: BaseException) -> str:
    """An exception in one line: its class and what it says last; where it says nothing, the code that raised it.

    Of TVM's errors, which begin with frames of C++, it is what follows the last name of an error's class.
    """
    kind = type(error).__name__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        places = traceback.extract_tb(error.__traceback__)[-1:]
        code = (f" at {Path(p.filename).name}:{p.lineno}: {p.line}" for p in places)
        return kind + "".join(code)
    named = [i for i, line in enumerate(lines) if re.match(r"\w+Error: ", line)]
    said = " ".join(lines[(named or [-1])[-1] :])
    return said if named else f"{kind}: {said}"


def run_command(main: Callable[[Sequence[str] | None], int]) -> NoReturn:
    """Run a command line's ``main(argv)`` and exit with its code.

    Exit codes: 0 success; 1 a check did not pass; 2 the user's input was refused, in one
    line on stderr; 3 a build was not compared; 130 Ctrl-C; 143 SIGTERM.
    """
    try:
        interrupts.raise_them()
        code = main(None)
        sys.stdout.flush()
        interrupts.ignore()
    except (Exception, KeyboardInterrupt) as error:  # noqa: BLE001 - bugs are raised again
        interrupts.ignore()
        # An import that is interrupted may fail in another way.
        if interrupts.exit_code() or isinstance(error, KeyboardInterrupt):
            _end_interrupted(error)
        code = _refused(error)
    sys.exit(code)


def _end_interrupted(error: BaseException) -> NoReturn:
    said = error if isinstance(error, Interrupted) else Interrupted()
    print(said, file=sys.stderr, flush=True)
    # Temporary folders go; threads, which may be busy in the engine, are not waited for.
    atexit._run_exitfuncs()
    os._exit(interrupts.exit_code() or 130)


def _refused(error: BaseException) -> int:
    """The exit code; raises ``error`` where it is a bug."""
    if isinstance(error, BrokenPipeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    message = refusal(error)
    if message is None:
        raise error
    print("error: " + message, file=sys.stderr)
    return 2


def refusal(error: BaseException) -> str | None:
    """What the user can correct, in one line; None where the error is a bug."""
    if isinstance(error, UserError):
        return one_line(str(error))
    if isinstance(error, MemoryError):
        return "out of memory; end other programs, or take a smaller model"
    if full := full_folder(error, [Path()]):
        return one_line(f"{full}; make room there")
    if isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename else ""
        return one_line(f"{where}{error.strerror or error}")
    return None
