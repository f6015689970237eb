"""Which entry of a table or folder belongs to a photograph: by the end of its path, so that folders tell apart equal names."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path, PurePosixPath

from netship.targets.errors import UserError
from netship.targets.escapes import shown


def ends(path: Path) -> Iterator[str]:
    """The whole path, then without its first folder, and so on to the name alone."""
    parts = PurePosixPath(os.path.abspath(path)).parts
    yield str(PurePosixPath(*parts))
    for first in range(1, len(parts)):
        yield "/".join(parts[first:])


def titles(files: Sequence[Path]) -> dict[Path, str]:
    """For a person: the name of each file; where two have one name, with as many folders as tell them apart."""
    ways = {path: list(ends(path))[::-1] for path in files}
    each_once = {way[-1]: way for way in ways.values()}
    count = Counter(end for way in each_once.values() for end in way)
    return {
        path: next((end for end in way if count[end] == 1), way[-1])
        for path, way in ways.items()
    }


def entries(
    files: Sequence[Path], names: Collection[str], table: str
) -> dict[Path, str]:
    """The entry of each file that has one: the longest end of its path, else the only one with its name.

    Args:
        names: of the entries, such as ``a.jpg`` or ``street/a.jpg``; ``table``: what has them, for the error.

    Raises:
        UserError: two files have one entry.
    """
    by_name: dict[str, list[str]] = {}
    for name in names:
        by_name.setdefault(PurePosixPath(name).name, []).append(name)
    found: dict[Path, str] = {}
    owners: dict[str, Path] = {}
    for path in files:
        named = by_name.get(path.name, [])
        exact = next((end for end in ends(path) if end in named), None)
        if exact is None and len(named) == 1:
            exact = named[0]
        if exact is None:
            continue
        found[path] = exact
        other = owners.setdefault(exact, path)
        if os.path.abspath(other) != os.path.abspath(path):
            raise UserError(
                f"{table}: {shown(exact)!r} can be {other} or {path}; name it there with its folder, or give one of them"
            )
    return found
