"""``python -m bench``: comparisons with other runtimes, and of the meter with published times."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module

from netship.targets.commands import as_called
from netship.targets.errors import UserError, run_command

_COMMANDS = {
    "compare": "our bundle and other runtimes with one network, by the same meter",
    "microcontrollers": "the meter's estimates of CMSIS-NN and published times on microcontrollers",
    "validate": "the meter's estimates and published measurements on real boards",
}


def main(argv: Sequence[str] | None = None) -> int:
    name, *words = [*(sys.argv[1:] if argv is None else argv), ""]
    words = [word for word in words if word]
    if name in ("-h", "--help"):
        print(_help())
        return 0
    if name not in _COMMANDS:
        raise UserError(
            f"python -m bench {name}".rstrip()
            + f": needs one of {', '.join(_COMMANDS)}; see python -m bench --help"
        )
    return int(import_module(f"netship.bench.{name}").main(words))


def _help() -> str:
    lines = [f"  python -m bench {name:16} {what}" for name, what in _COMMANDS.items()]
    usage = "usage: python -m bench COMMAND …, each with --help"
    return as_called("\n".join([usage, "", *lines]))


if __name__ == "__main__":
    run_command(main)
