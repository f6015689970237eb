"""TOML files that a user writes, read or refused in one line."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

from netship.targets.errors import UserError
from netship.targets.files import read_text

_MOST_BYTES = 1 << 20


def read_toml(path: Path, name: str, instead: str, page: str) -> dict[str, Any]:
    """What a TOML file states.

    Args:
        name: the file as errors call it; ``instead``: what to do where it cannot be read; ``page``: where it is explained.

    Raises:
        UserError: it cannot be read, or is not TOML.
    """
    try:
        text = read_text(path, _MOST_BYTES)
    except OSError as error:
        raise UserError(f"{name}: {error.strerror}; {instead}") from None
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise UserError(
            f"{name}: not TOML: line {line} is not UTF-8; save it as UTF-8"
        ) from None
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        last = max(1, len(text.splitlines()))
        what = str(error).replace("at end of document", f"at the end of line {last}")
        raise UserError(
            f"{name}: not TOML: {what}; correct this line, see {page}"
        ) from None
    except RecursionError:
        raise UserError(
            f"{name}: not TOML: brackets are nested too deeply; remove some, see {page}"
        ) from None
