"""Which class an input is known to show: by a table, or by the folder that it lies in."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from netship.runtime_demo import file_names
from netship.targets.errors import UserError
from netship.targets.escapes import counted, shown
from netship.targets.files import read_text

TABLE = "labels.csv"


class Known(NamedTuple):
    """Class numbers of inputs.

    Attributes:
        classes: by the file, of those that are known.
        source: where they are from, such as ``labels.csv``; empty where nothing is known.
        notes: why a table or folders were not used.
    """

    classes: Mapping[Path, int]
    source: str = ""
    notes: tuple[str, ...] = ()


class _Row(NamedTuple):
    name: str
    number: int
    label: str


def find(
    files: Sequence[Path],
    given: Sequence[Path],
    table: Path | None,
    names: Sequence[str],
    count: int,
) -> Known:
    """What is known of the files.

    Args:
        files: the inputs.
        given: what the user named: files, folders of them, or a folder of one folder a class.
        table: a CSV for all of them; else a labels.csv next to them counts, else the folders' names.
        names: of the network's classes, where they are known; ``count`` is their number.

    Raises:
        UserError: a table is broken, or the one that was given is of other classes.
    """
    if table is not None:
        rows = _read(table)
        if wrong := _other_classes(rows, names, count):
            raise UserError(f"{table}: {wrong}; give labels of the network's classes")
        by_name = {row.name: row.number for row in rows}
        named = file_names.entries(files, by_name, str(table))
        known = {path: by_name[name] for path, name in named.items()}
        if not known:
            raise UserError(
                f"{table}: names none of the {counted(len(files), 'image')}; its column file has their names"
            )
        return Known(known, table.name)
    tables = sorted({path.parent / TABLE for path in files})
    classes: dict[Path, int] = {}
    notes = []
    for place in filter(Path.is_file, tables):
        rows = _read(place)
        if wrong := _other_classes(rows, names, count):
            notes.append(f"{place} is not used: {wrong}")
            continue
        by_name = {row.name: row.number for row in rows}
        classes |= {
            path: by_name[path.name]
            for path in files
            if path.parent == place.parent and path.name in by_name
        }
    if classes or notes:
        return Known(classes, TABLE if classes else "", tuple(notes))
    return _by_folders(files, given, names, count)


def _by_folders(
    files: Sequence[Path], given: Sequence[Path], names: Sequence[str], count: int
) -> Known:
    """A folder that was named has one folder a class: by the classes' names or numbers, or all of them in order."""
    inside = [path for path in files if path.parent.parent in given]
    if not inside:
        return Known({})
    folders = sorted({path.parent for path in inside})
    numbers = {name.strip().casefold(): index for index, name in enumerate(names)}
    titles = [folder.name.strip().casefold() for folder in folders]
    if all(title in numbers for title in titles):
        indices = [numbers[title] for title in titles]
    elif all(title.isdecimal() and int(title) < count for title in titles):
        indices = list(map(int, titles))
    elif len(folders) == count and not names:
        indices = list(range(count))
    else:
        return Known({}, notes=(_not_classes(folders, titles, numbers, count),))
    by_folder = dict(zip(folders, indices, strict=True))
    return Known({path: by_folder[path.parent] for path in inside}, "the folders")


def _not_classes(
    folders: Sequence[Path],
    titles: Sequence[str],
    numbers: Mapping[str, int],
    count: int,
) -> str:
    where = folders[0].parent
    if not numbers:
        return (
            f"{where}: {counted(len(folders), 'folder')}, but the network has {counted(count, 'class')} without names: not counted; "
            "name the folders by class numbers, or build with --labels"
        )
    unknown = next(
        folder.name
        for folder, title in zip(folders, titles, strict=True)
        if title not in numbers
    )
    return f"{where}: {shown(unknown, 40)!r} is no class of the network; its folders are not counted"


def _other_classes(rows: Sequence[_Row], names: Sequence[str], count: int) -> str:
    """Why the classes of a table are not the network's; empty where they can be."""
    for row in rows:
        if not 0 <= row.number < count:
            return (
                f"it has class {row.number}, the network has {counted(count, 'class')}"
            )
    labelled = [row for row in rows if row.label and names]
    other = [row for row in labelled if not _alike(row.label, names[row.number])]
    if 2 * len(other) > len(labelled):
        row = other[0]
        own = shown(names[row.number], 40)
        return f"its class {row.number} is {shown(row.label, 40)!r}, the network's is {own!r}"
    return ""


def _alike(label: str, name: str) -> bool:
    """Whether two names can mean one class: one has a word, between commas, of the other in it."""
    one, other = label.casefold(), name.casefold()
    return any(
        part.strip() in whole
        for text, whole in ((one, other), (other, one))
        for part in text.split(",")
        if part.strip()
    )


def _read(path: Path) -> list[_Row]:
    """The rows that have a class: ``file``, ``class_index`` and, where there is one, ``label``."""
    try:
        rows = list(csv.DictReader(io.StringIO(read_text(path), newline="")))
        return [
            _Row(row["file"] or "", int(row["class_index"]), row.get("label") or "")
            for row in rows
            if row["class_index"]
        ]
    except OSError as error:
        raise UserError(
            f"{path}: {error.strerror}; give a CSV file with the columns file and class_index"
        ) from None
    except KeyError as error:
        raise UserError(
            f"{path}: no column {error}; it needs file and class_index"
        ) from None
    except (ValueError, csv.Error) as error:
        raise UserError(
            f"{path}: {error}; class_index must be a whole number or empty"
        ) from None
