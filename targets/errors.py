"""The one exception for what a user can cause, and how a command line ends."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from targets.escapes import one_line


class UserError(Exception):
    """Something the user can mend: the message says what, where and what to do.

    Anything else that escapes a command is a bug and shows its traceback.
    """


class Interrupted(KeyboardInterrupt):
    """Ctrl-C or SIGTERM: clean up, then leave."""


def _interrupt(_signum: int, _frame: object) -> NoReturn:
    # An impatient second one must not cut the cleaning up short.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    raise Interrupted


def run_command(main: Callable[[Sequence[str] | None], int]) -> NoReturn:
    """Run a command line's ``main(argv)`` and exit with its code.

    Exit codes: 0 success; 1 the verdict of a check was negative; 2 the user's input
    was refused, in one line on stderr; 130 Ctrl-C or SIGTERM.
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
    except KeyboardInterrupt:
        print("interrupted: nothing half-made was left behind", file=sys.stderr)
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
