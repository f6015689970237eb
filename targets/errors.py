"""The one exception for what a user can cause, and how a command line ends."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn


class UserError(Exception):
    """Something the user can mend: the message says what, where and what to do.

    Anything else that escapes a command is a bug and shows its traceback.
    """


class Interrupted(KeyboardInterrupt):
    """SIGTERM, treated as Ctrl-C is: clean up, then leave."""


def _on_sigterm(_signum: int, _frame: object) -> NoReturn:
    raise Interrupted


def run_command(main: Callable[[Sequence[str] | None], int]) -> NoReturn:
    """Run a command line's ``main(argv)`` and exit with its code.

    Exit codes: 0 success; 1 the verdict of a check was negative; 2 the user's input
    was refused, in one line on stderr; 130 Ctrl-C or SIGTERM.
    """
    signal.signal(signal.SIGTERM, _on_sigterm)
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
    except (
        PermissionError,
        FileNotFoundError,
        IsADirectoryError,
        NotADirectoryError,
    ) as error:
        code = _refuse(f"{error.filename}: {error.strerror}")
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        code = _refuse(f"{where}{error.strerror or error}")
    sys.exit(code)


def _refuse(message: str) -> int:
    print("error: " + " ".join(message.split()), file=sys.stderr)
    return 2
