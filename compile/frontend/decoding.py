"""From names of outputs, strides and anchors to the manifest's detector: where in memory each value lies."""

from __future__ import annotations

import os
from collections.abc import Sequence
from math import ceil, prod
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, FiniteFloat

from netship.bundle.manifest import Tensor
from netship.bundle.task import Detector, Level, Size, Values
from netship.compile.frontend.toml_file import read_toml
from netship.targets.errors import UserError
from netship.targets.escapes import counted, listed, shown


def _names(value: Any) -> Any:
    return (value,) if isinstance(value, str) else value


_PAGE = "docs/detection.md"
_TEXTS = frozenset({"preset", "box", "activation", "product"})
_NAMES = frozenset({"boxes", "scores", "objectness", "points"})
_BOOLEANS = frozenset({"normalised", "transposed", "per_class"})
_MADE = frozenset({"grids", "steps", "levels", "decoder"})
"""What presets state, and no file."""
_MOST_LEVELS = Field(max_length=64)
_Names = Annotated[tuple[str, ...], BeforeValidator(_names), _MOST_LEVELS]
_Stride = Annotated[FiniteFloat, Field(ge=1, le=1 << 16)]


class Decoding(BaseModel):
    """A detector as a TOML file has it: a preset, and what differs from it; or all of it.

    Everything that is not here is a field of `Detector`, of the same name and meaning.

    Attributes:
        boxes, scores, objectness, points: names of outputs: one, or one for each stride. Where one output has
            several of these, its columns are in this order: boxes, objectness, scores, points.
        strides: of the grids, in pixels; none where ``box`` is "corners" or "centre".
        anchors: for each stride a list of [width, height] in pixels; one of the stride's size if left out.
    """

    model_config = ConfigDict(frozen=True, extra="allow")

    preset: str = ""
    boxes: _Names = ()
    scores: _Names = ()
    objectness: _Names = ()
    points: _Names = ()
    strides: Annotated[tuple[_Stride, ...], _MOST_LEVELS] = ()
    offset: float = 0.5
    anchors: Annotated[tuple[tuple[tuple[Size, Size], ...], ...], _MOST_LEVELS] = ()
    bins: Annotated[int, Field(ge=2, le=64)] = 16


def read_decoding(path: Path, presets: str) -> dict[str, Any]:
    """What a TOML file states of a decoder, each value of its key's type.

    Args:
        presets: their names, to give in its place.

    Raises:
        UserError: it cannot be read, is not TOML, or has another key or value.
    """
    name = f"--decode {path}"
    if not os.path.exists(path):
        raise UserError(
            f"{name}: no such preset or file; give {presets}, or a TOML file"
        )
    given = read_toml(path, name, f"give {presets}, or a TOML file", _PAGE)
    known = (Decoding.model_fields.keys() | Detector.model_fields.keys()) - _MADE
    for key, value in given.items():
        if key not in known:
            raise UserError(f"{name}: there is no key {shown(key, 40)!r}; see {_PAGE}")
        if wrong := _of_another_type(key, value):
            raise UserError(f"{name}: {shown(key, 40)}: {wrong}; see {_PAGE}")
    return given


def _of_another_type(key: str, value: Any) -> str:
    """Why a value cannot be the key's; empty where it can."""
    kind: tuple[type, ...] = (int, float)
    wanted = "numbers, without quotes"
    if key in _BOOLEANS:
        kind, wanted = (bool,), "true or false"
    elif key in _TEXTS:
        kind, wanted = (str,), "text in quotes"
    elif key in _NAMES:
        kind, wanted = (str,), "names of outputs in quotes"
    values = [value]
    while values:
        each = values.pop()
        if isinstance(each, list) and key not in _TEXTS | _BOOLEANS:
            values += each
        elif not isinstance(each, kind) or (
            isinstance(each, bool) and bool not in kind
        ):
            text = str(each).lower() if isinstance(each, bool) else repr(each)
            return f"{shown(text, 40)} where it takes {wanted}"
    return ""


def grids_of(size: tuple[int, int], strides: Sequence[float]) -> list[tuple[int, int]]:
    """Lines and columns at each stride, of an input's height and width."""
    height, width = size
    return [(ceil(height / s), ceil(width / s)) for s in strides]


class _Geometry(NamedTuple):
    """A level's grid, and how many rows come before it where one output has all levels."""

    lines: int
    columns: int
    anchors: int
    before: int
    total: int


def assemble(
    decoder: str,
    facts: dict[str, Any],
    outputs: Sequence[Tensor],
    size: tuple[int, int],
) -> Detector:
    """The decoder of the manifest, from names and strides."""
    grids, steps = facts.pop("grids", None), facts.pop("steps", None)
    stated = Decoding.model_validate(facts)
    rest = dict(stated.model_extra or {})
    named = {x.name: (index, x.shape) for index, x in enumerate(outputs)}
    if not stated.boxes or not stated.scores:
        raise ValueError("boxes and scores must name outputs")
    if wrong := _contradiction(stated, rest, bool(grids)):
        raise ValueError(wrong)
    if stated.strides or not grids:
        grids, steps = grids_of(size, stated.strides), [(s, s) for s in stated.strides]
    if not grids:
        shape = _shape(named, stated.boxes[0])
        grids, steps = [(1, max(shape[1:], default=1))], [(1.0, 1.0)]
    anchors = stated.anchors or tuple(((float(w), float(h)),) for w, h in steps)
    if len(anchors) != len(grids):
        lists = counted(len(anchors), "list")
        raise ValueError(f"{lists} of anchors for {counted(len(grids), 'grid')}")
    roles = {
        role: getattr(stated, role)
        for role in ("boxes", "objectness", "scores", "points")
        if getattr(stated, role)
    }
    for role, names in roles.items():
        if len(names) not in (1, len(grids)):
            raise ValueError(
                f"{role}: {len(names)} outputs for {counted(len(grids), 'grid')}; name one for all, or one for each of strides"
            )
    total = sum(prod(g) * len(a) for g, a in zip(grids, anchors, strict=True))
    wide = 4 * stated.bins if rest.get("box") == "dfl" else 4
    widths = {"boxes": wide, "objectness": 1}
    levels: list[Level] = []
    before = 0
    for index, (grid, sizes) in enumerate(zip(grids, anchors, strict=True)):
        geometry = _Geometry(grid[0], grid[1], len(sizes), before, total)
        before += prod(grid) * len(sizes)
        places = {
            role: names[index] if len(names) == len(grids) else names[0]
            for role, names in roles.items()
        }
        counts = _columns(places, named, geometry, widths)
        for role in ("scores", "points"):
            key, count = (
                ("classes", counts.get(role))
                if role == "scores"
                else ("points", (counts.get(role) or 0) // 2)
            )
            if key == "classes" and rest.get(key, count) != count and not levels:
                raise ValueError(
                    f"classes: {rest[key]}, but scores have room for {count}; leave it out"
                )
            if rest.setdefault(key, count) != count:
                raise ValueError(
                    f"{role}: {count} at one level, {rest[key]} at another"
                )
        values = {
            role: _values(
                named, name, geometry, sum(counts[r] for r in _before(role, places))
            )
            for role, name in places.items()
        }
        lines, columns = grid
        levels.append(
            Level(
                lines=lines,
                columns=columns,
                stride=steps[index],
                offset=stated.offset,
                anchors=sizes,
                **values,
            )
        )
    if rest["classes"] == 1 and rest.get("activation") == "softmax":
        raise ValueError(
            "activation: softmax of one class is always 1; state sigmoid or none"
        )
    if rest["classes"] == 1 and rest.get("background") == 0:
        raise ValueError(
            "background: 0 is the only class, so nothing would be found; leave it out"
        )
    facts = {"decoder": decoder, "levels": levels, "bins": stated.bins}
    return Detector.model_validate(facts | rest)


def _contradiction(stated: Decoding, rest: dict[str, Any], gridded: bool) -> str:
    """Why two values exclude each other; empty where they do not.

    Args:
        gridded: a preset states the grids.
    """
    box = rest.get("box")
    # Of another box the manifest's reader says what there is.
    relative = box in ("offsets", "distances", "dfl", "yolov5")
    if rest.get("normalised") and relative:
        return f"normalised: is for boxes that are corners or centre, these are {box}; leave it out"
    if relative and not stated.strides and not gridded:
        return f"strides: boxes that are {box} need them; state one for each grid"
    if rest.get("product") == "root" and not stated.objectness:
        return "product: the root is of score × objectness; state objectness, or leave it out"
    return ""


def without_effect(given: dict[str, Any], detector: Detector) -> str:
    """Why a key that a file states changes nothing; empty where each does something."""
    box, points = detector.box, detector.points
    anchored = points or box not in ("corners", "centre")
    alone = all(len(level.anchors) == 1 for level in detector.levels)
    placed = "is for anchors, which boxes that are corners or centre have none of"
    for key, useless, why in (
        ("bins", box != "dfl", f"is for boxes that are dfl, these are {box}"),
        (
            "variances",
            box != "offsets" and not points,
            f"is for boxes that are offsets and for points, these boxes are {box}",
        ),
        ("offset", not anchored, placed),
        ("anchors", not anchored and alone, placed),
        (
            "most",
            detector.most > detector.candidates,
            f"{detector.most} boxes are not found of {detector.candidates} candidates",
        ),
    ):
        if useless and key in given:
            return f"{key}: {why}; leave it out"
    return ""


def _shape(named: dict[str, tuple[int, tuple[int, ...]]], name: str) -> tuple[int, ...]:
    if name not in named:
        there = listed([shown(each) for each in named], 12)
        raise ValueError(f"no output is called {shown(name)!r}, there are {there}")
    return named[name][1]


def _before(role: str, places: dict[str, str]) -> list[str]:
    """The parts that lie before one in the same output."""
    roles = [each for each in places if places[each] == places[role]]
    return roles[: roles.index(role)]


def _columns(
    places: dict[str, str],
    named: dict[str, tuple[int, tuple[int, ...]]],
    geometry: _Geometry,
    widths: dict[str, int],
) -> dict[str, int]:
    """How many values each part has: what is left of the output is the scores', or the points' where these lie apart."""
    counts = {role: widths[role] for role in places if role in widths}
    for role in ("scores", "points"):
        if role not in places:
            continue
        here = [each for each in places if places[each] == places[role]]
        columns = _arrange(_shape(named, places[role]), geometry, places[role])[0]
        counts[role] = columns - sum(
            counts.get(each, 0) for each in here if each != role
        )
        if counts[role] < 1 or (role == "points" and counts[role] % 2):
            raise ValueError(f"{shown(places[role])} has no room for {role}")
    return counts


def _values(
    named: dict[str, tuple[int, tuple[int, ...]]],
    name: str,
    geometry: _Geometry,
    column: int,
) -> Values:
    shape = _shape(named, name)
    _, first, cell, anchor, step = _arrange(shape, geometry, name)
    return Values(
        output=named[name][0],
        first=first + column * step,
        cell=cell,
        anchor=anchor,
        step=step,
    )


def _arrange(
    shape: tuple[int, ...], level: _Geometry, name: str
) -> tuple[int, int, int, int, int]:
    """Of an output: values in a row, the first row of a level, and the distances between cells, anchors and values."""
    sides, cells, a = shape[1:], level.lines * level.columns, level.anchors
    for rows, before in ((level.total, level.before), (cells * a, 0)):
        if sides[:1] == (rows,) and len(sides) <= 2:
            n = prod(sides[1:])
            return n, before * n, a * n, n, 1
        if sides[1:] == (rows,):
            return sides[0], before, a, 1, rows
    grid = (level.lines, level.columns)
    if len(sides) == 3 and sides[1:] == grid and sides[0] % a == 0:
        n = sides[0] // a
        return n, 0, 1, n * cells, cells
    if len(sides) == 3 and sides[:2] == grid and sides[2] % a == 0:
        n = sides[2] // a
        return n, 0, sides[2], n, 1
    if len(sides) == 4 and sides[:3] == (a, *grid):
        return sides[3], 0, sides[3], sides[3] * cells, 1
    raise ValueError(
        f"{shown(name)} {list(shape)} is not of {level.total} rows, nor of {a} anchors on a grid {level.lines}×{level.columns}"
    )
