"""The base class of errors that a user can cause, and how a command line ends."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from targets.escapes import one_line


class UserError(Exception):
    """Something that the user can correct: the message says what, where and what to do.

    Any other exception that leaves a command is a bug, and shows its traceback.
    """


class Interrupted(KeyboardInterrupt):
    """Ctrl-C or SIGTERM: the command cleans up, then ends; its text, if any, says what was kept."""


def last_line(text: str, otherwise: str = "it said nothing") -> str:
    """The last line that is not blank: of what a tool says, and of TVM's errors, it is the reason."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else otherwise


def first_line(error: BaseException) -> str:
    """What an exception says first; its class where it says nothing."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def _interrupt(_signum: int, _frame: object) -> NoReturn:
    # A second one must not interrupt the cleaning up.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    raise Interrupted


def run_command(main: Callable[[Sequence[str] | None], int]) -> NoReturn:
    """Run a command line's ``main(argv)`` and exit with its code.

    Exit codes: 0 success; 1 a check did not pass; 2 the user's input was refused, in one
    line on stderr; 130 Ctrl-C or SIGTERM.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        # A shell has background jobs ignore Ctrl-C.
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _interrupt)
    try:
        code = main(None)
        sys.stdout.flush()
    except UserError as error:
        code = _refuse(str(error))
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    except KeyboardInterrupt as error:
        kept = str(error) or "nothing half-made was left behind"
        print(f"interrupted: {one_line(kept)}", file=sys.stderr)
        code = 130
    except MemoryError:
        code = _refuse("out of memory; end other programs, or take a smaller model")
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        code = _refuse(f"{where}{error.strerror or error}")
    sys.exit(code)


def _refuse(message: str) -> int:
    print("error: " + one_line(message), file=sys.stderr)
    return 2
