"""The Jinja environments of all that is written from templates: pages and C."""

from __future__ import annotations

from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined


def of_pages(folder: Path) -> Environment:
    """For the HTML templates in ``folder``: values are escaped, an unknown name is an error."""
    return _environment(folder, escape=True)


def of_code(folder: Path) -> Environment:
    """For templates of C: values go in as they are, so all that is no identifier must pass a filter that escapes."""
    return _environment(folder, escape=False)


def _environment(folder: Path, *, escape: bool) -> Environment:
    return Environment(
        loader=FileSystemLoader(folder),
        autoescape=escape,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=not escape,
    )
