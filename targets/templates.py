"""The Jinja environments for templates of pages and of C."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from targets.files import write_whole

_HERE = Path(__file__).parent


def page_environment(folder: Path) -> Environment:
    """For the HTML templates in ``folder``, which may extend base.html.jinja; values are escaped, an unknown name is an error."""
    return _environment([folder, _HERE], escape=True)


def write_page(path: Path, option: str, template: Path, **values: object) -> None:
    """Fill in a page's template and write the page, whole or not at all; a page that is there is replaced.

    Args:
        option: the command-line option that names ``path``, for the message.

    Raises:
        UserError: ``path`` cannot be written.
    """
    text = (
        page_environment(template.parent).get_template(template.name).render(**values)
    )
    write_whole(path, text.encode("utf-8", errors="replace"), option)


def code_environment(folder: Path) -> Environment:
    """For templates of C. Values are not escaped, so whatever is not an identifier must pass an escaping filter."""
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
