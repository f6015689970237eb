"""The Jinja environments of all that is written from templates: pages and C."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined


def of_pages(*folders: Path) -> Environment:
    """For the HTML templates in ``folders``, the first that has a name counting: values are escaped, an unknown name is an error."""
    return _environment(folders, escape=True)


def of_code(folder: Path) -> Environment:
    """For templates of C: values go in as they are, so all that is no identifier must pass a filter that escapes."""
    return _environment([folder], escape=False)


def _environment(folders: Sequence[Path], *, escape: bool) -> Environment:
    return Environment(
        loader=FileSystemLoader(folders),
        autoescape=escape,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=not escape,
    )
