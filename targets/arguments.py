"""Types of command-line arguments that several commands share."""

from __future__ import annotations

import argparse
from collections.abc import Callable


def count_up_to(most: int) -> Callable[[str], int]:
    """For argparse's ``type``: a whole number from 1 to ``most``."""

    def count(text: str) -> int:
        if not text.isdecimal() or not 0 < int(text) <= most:
            raise argparse.ArgumentTypeError(
                f"{text!r} is not a whole number from 1 on"
            )
        return int(text)

    return count
