"""Types of command-line arguments that several commands share."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable

from targets.errors import UserError


def count_up_to(most: int) -> Callable[[str], int]:
    """For argparse's ``type``: a whole number from 1 to ``most``."""

    def count(text: str) -> int:
        if not text.isdecimal() or not 0 < int(text) <= most:
            raise argparse.ArgumentTypeError(
                f"{text!r} is not a whole number from 1 on"
            )
        return int(text)

    return count


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
