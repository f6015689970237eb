"""The Jinja environments of all that is written from templates: pages, code and the texts next to it."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Undefined
from markupsafe import Markup

from netship.targets import escapes
from netship.targets.commands import as_called
from netship.targets.files import write_whole

_HERE = Path(__file__).parent


def write_page(
    path: Path,
    option: str,
    template: Path,
    *,
    filters: Mapping[str, Callable[..., str]] | None = None,
    **values: object,
) -> None:
    """Fill in an HTML template and write it whole or not at all; a page that is there is replaced.

    The template may extend base.html.jinja. Values are escaped, an unknown name is an error.

    Args:
        option: the command-line option that names ``path``, for the message.
    """
    environment = _environment([template.parent, _HERE])
    environment.filters |= filters or {}
    page = as_called(environment.get_template(template.name).render(values))
    text = escapes.without_controls(page)
    write_whole(path, text.encode("utf-8", errors="replace"), option)


@cache
def code_environment(folder: Path) -> Environment:
    """For templates of C, Python, Markdown, Makefiles, CMake and SVG; one for a folder, as it keeps what it compiled.

    Only numbers and plain words go in as they are. Other text must pass the filter of its language
    (targets.escapes), or ``code`` where nothing in it is from outside; what passes none is an error.
    """
    environment = _environment(
        [folder], finalize=_require_filter, keep_trailing_newline=True
    )
    environment.filters |= escapes.FILTERS
    return environment


def _require_filter(value: object) -> object:
    escaped = isinstance(value, Markup | Undefined)
    if not escaped and not re.fullmatch(r"[\w.,+-]*", str(value), re.ASCII):
        raise TypeError(f"{value!r:.80} goes into generated text without a filter")
    return value


def _environment(folders: Sequence[Path], **more: Any) -> Environment:
    environment = Environment(
        loader=FileSystemLoader(folders),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        **more,
    )
    environment.filters |= {
        "counted": escapes.counted,
        "all_counted": escapes.all_counted,
        "megabytes": escapes.megabytes,
        "magnitude": escapes.magnitude,
        "millions": escapes.millions,
        "ending": escapes.ending,
    }
    return environment
