"""``netship COMMAND …``: every command under one name, from any folder."""

from netship.targets import interrupts

interrupts.end_at_once()

import os
import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec

from netship.targets import VERSION
from netship.targets.commands import COMMANDS
from netship.targets.errors import UserError, run_command


def main(argv: Sequence[str] | None = None) -> int:
    name, *words = [*(sys.argv[1:] if argv is None else argv)] or ["--help"]
    if name in ("-h", "--help"):
        print(_help())
        return 0
    if name == "--version":
        print(f"netship {VERSION}")
        return 0
    if name == "--licenses":
        name, words = "build", ["--licenses"]
    if name not in COMMANDS:
        raise UserError(f"netship {name}: no such command; see netship --help")
    command = COMMANDS[name]
    module = f"netship.{command.module}"
    spec = find_spec(module)
    is_package = spec is not None and spec.submodule_search_locations is not None
    found = import_module(f"{module}.__main__" if is_package else module)
    return int(found.main([*command.words, *words]))


def _help() -> str:
    lines = [f"  netship {name:10} {each.summary}" for name, each in COMMANDS.items()]
    usage = "usage: netship COMMAND …, each with --help; netship --version | --licenses"
    return "\n".join([usage, "", *lines])


def command() -> None:
    """The console command."""
    # Python processes that are started here must not import files of the user's working folder.
    os.environ["PYTHONSAFEPATH"] = "1"
    run_command(main)


if __name__ == "__main__":
    command()
