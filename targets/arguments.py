"""What several command lines share: their parsers, types of arguments, and how a result is shown."""

from __future__ import annotations

import argparse
import json
import math
import re
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import NoReturn

from netship.targets import VERSION
from netship.targets.commands import as_called
from netship.targets.errors import UserError
from netship.targets.files import check_writable


class _Parser(argparse.ArgumentParser):
    """Its help names the commands as `as_called` does; options that it does not take are a UserError of one line."""

    def format_help(self) -> str:
        return as_called(super().format_help())

    def error(self, message: str) -> NoReturn:
        said = message.removeprefix("argument ")
        raise UserError(f"{said}; {self._todo(said)}see {self.prog} --help")

    def _todo(self, message: str) -> str:
        """What the first word that was not taken stood for; empty where nothing is near."""
        _, _, words = message.partition("unrecognized arguments: ")
        option = words.partition(" ")[0].partition("=")[0]
        known = list(self._option_string_actions)
        if Path(option).suffix in (".onnx", ".tflite") and "--model" in known:
            return f"give it as --model {option}; "
        near = get_close_matches(option, known, 1) if option.startswith("--") else []
        return f"did you mean {near[0]}? " if near else ""


def command_parser(
    module: str, description: str, epilog: str = ""
) -> argparse.ArgumentParser:
    """The parser of ``python -m MODULE``; its epilog keeps its line ends."""
    raw = argparse.RawDescriptionHelpFormatter
    name = as_called(f"python -m {module}")
    parser = _Parser(name, None, description, epilog, formatter_class=raw)
    version = f"netship {VERSION}"
    parser.add_argument(
        "--version", action="version", version=version, help="print it and exit"
    )
    return parser


def add_result_options(parser: argparse.ArgumentParser) -> None:
    """``--report`` and ``--json``, which `show_result` obeys."""
    page = file_to_write("--report")
    parser.add_argument(
        "--report", type=page, metavar="FILE", help="write one self-contained HTML page"
    )
    add_json(parser)


def add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object, for machines"
    )


def add_precision(parser: argparse.ArgumentParser) -> None:
    """``--precision`` and ``--calibration`` of a build, for commands that are about its tuning tasks."""
    parser.add_argument(
        "--precision",
        choices=["float32", "float16"],
        default="float32",
        help="as of a build; each has records of its own (default: %(default)s)",
    )
    add_calibration(parser)


def add_calibration(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--calibration",
        type=named_path,
        nargs="+",
        default=[],
        metavar="IMAGE",
        help="of a build in float16: what stays in float32 depends on them",
    )


def show_result(
    arguments: argparse.Namespace,
    data: object,
    text: str,
    write_page: Callable[[Path], None],
) -> None:
    """Write a result's page where one is asked for, and print the result, as JSON or as text."""
    if arguments.report:
        write_page(arguments.report)
        text += f"\nreport     {arguments.report}"
    print(as_json(data) if arguments.json else as_called(text))


def as_json(data: object) -> str:
    """One JSON object; NaN and infinity, which JSON has not, are null."""
    return json.dumps(_finite(data), indent=2, allow_nan=False)


def _finite(data: object) -> object:
    if isinstance(data, float):
        return data if math.isfinite(data) else None
    if isinstance(data, Mapping):
        return {key: _finite(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [_finite(value) for value in data]
    return data


def file_to_write(option: str) -> Callable[[str], Path]:
    """For argparse's ``type``: a file that can be written; another one is a UserError before any work is done."""

    def writable(text: str) -> Path:
        check_writable(named_path(text), option)
        return Path(text)

    return writable


def named_path(text: str) -> Path:
    """For argparse's ``type``: a file or folder; an empty name would be the working folder."""
    if not text:
        raise argparse.ArgumentTypeError("an empty name is no file and no folder")
    return Path(text)


def count_up_to(most: int) -> Callable[[str], int]:
    """For argparse's ``type``: a whole number from 1 to ``most``."""

    def count(text: str) -> int:
        if not text.isdecimal() or not 0 < int(text) <= most:
            raise argparse.ArgumentTypeError(
                f"{text!r} is not a whole number from 1 on"
            )
        return int(text)

    return count


def number_between(low: float, high: float, what: str) -> Callable[[str], float]:
    """For argparse's ``type``: a number from ``low`` to ``high``; ``what`` it is goes into the error."""

    def number(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text!r} is not {what}")
        return value

    return number


def host_and_port(text: str) -> tuple[str, int]:
    """The host, as a name or an address, and the port of ``HOST:PORT``; an IPv6 address stands in brackets.

    Raises:
        UserError: it is something else, or the port is not from 1 to 65535.
    """
    match = re.fullmatch(r"(?:\[([^][\s]+)\]|([^][\s:]+)):([0-9]+)", text)
    if match is None or len(match[3]) > 5 or not 0 < int(match[3]) < 1 << 16:
        raise UserError(
            f"{text!r} is not HOST:PORT, such as 127.0.0.1:9090 or [::1]:9090"
        )
    return match[1] or match[2], int(match[3])


def check_key(arguments: argparse.Namespace) -> None:
    """Refuse a --tracker without a --key, and a --key that is for nothing."""
    if arguments.tracker and not arguments.key:
        raise UserError("--tracker needs --key KEY: which of its boards?")
    if arguments.key and not (arguments.tracker or arguments.rpc or arguments.ssh):
        raise UserError("--key goes with --tracker, --rpc or --ssh; leave it out")
