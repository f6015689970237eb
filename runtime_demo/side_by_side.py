"""Columns side by side: what can be put in a ratio and in one drawing, and how far each two builds agree."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from string import ascii_uppercase
from typing import Any, NamedTuple

from netship.bundle.accuracy import compare
from netship.bundle.boxes import Match, match, total
from netship.runtime_demo.columns import KINDS, Column, Fact, Kind
from netship.runtime_demo.findings import Boxes, Masks
from netship.runtime_demo.masks import Agreement, agree
from netship.runtime_demo.masks import total as all_masks
from netship.runtime_demo.result import CheckResult, InputResult
from netship.targets.errors import UserError
from netship.targets.escapes import magnitude

MOST_COLUMNS = len(ascii_uppercase)


class Cell(NamedTuple):
    """``ratio`` to the least of the same origin and place; None where no other is comparable."""

    fact: Fact
    ratio: float | None


class Row(NamedTuple):
    """``cells`` has one a column, None where it has no such figure."""

    name: str
    kind: Kind
    cells: tuple[Cell | None, ...]


class Bars(NamedTuple):
    """Figures of one kind, one origin and one place, with the letters of their columns."""

    title: str
    origin: str
    where: str
    bars: tuple[tuple[str, Fact], ...]

    @property
    def most(self) -> float:
        return max(fact.value for _, fact in self.bars)


class Pair(NamedTuple):
    """Two builds on the inputs that both had; None where their outputs cannot be compared so.

    Attributes:
        boxes: the second's against the first's.
        masks: likewise.
    """

    letters: tuple[str, str]
    inputs: int
    max_abs_error: float | None
    cosine: float | None
    same_top1: int | None
    same_top5: int | None
    origin: str
    note: str
    boxes: Match | None = None
    masks: Agreement | None = None

    def found(self) -> str:
        """What the two found in photographs, in words; empty of other tasks."""
        if self.masks:
            return f"same class in {self.masks.text()}"
        if not self.boxes:
            return ""
        text = f"boxes: {self.boxes.matched} in both"
        if self.boxes.matched:
            text += f" (mean IoU {self.boxes.ious.mean():.4f})"
        first, second = self.letters
        return f"{text}, {self.boxes.missing} only in {first}, {self.boxes.extra} only in {second}"

    def to_json(self) -> dict[str, Any]:
        judged = {"boxes": self.boxes, "masks": self.masks}
        said = {name: each and each.to_json() for name, each in judged.items()}
        return self._asdict() | said

    def text(self) -> str:
        parts = []
        if self.max_abs_error is not None and self.cosine is not None:
            parts.append(
                f"largest difference {magnitude(self.max_abs_error)}, least cosine {self.cosine:.6f}"
            )
        if self.same_top1 is not None:
            parts.append(f"same best class {self.same_top1}/{self.inputs}")
            parts.append(f"same best five {self.same_top5}/{self.inputs}")
        parts = parts or ["outputs of other shapes"]
        return ", ".join([*parts, *filter(None, [self.found()])])


@dataclass(frozen=True)
class Comparison:
    """All columns, at most `MOST_COLUMNS`."""

    columns: Sequence[Column]

    @property
    def letters(self) -> str:
        """A, B, C …, one a column."""
        return ascii_uppercase[: len(self.columns)]

    @property
    def passed(self) -> bool:
        """Whether every build ran, within its tolerance."""
        return not any(
            column.refused or (column.result and not column.result.passed)
            for column in self.columns
            if column.path
        )

    @property
    def rows(self) -> list[Row]:
        """Those that a column has a figure for."""
        found = []
        for name, kind in KINDS.items():
            facts = [column.facts.get(name) for column in self.columns]
            if any(facts):
                cells = (
                    fact and Cell(fact, _ratio(fact, facts, kind)) for fact in facts
                )
                found.append(Row(name, kind, tuple(cells)))
        return found

    @property
    def bars(self) -> list[Bars]:
        groups: dict[tuple[str, str, str], list[tuple[str, Fact]]] = {}
        for row in self.rows:
            for letter, cell in zip(self.letters, row.cells, strict=True):
                if row.kind.drawn and cell:
                    key = (row.kind.title, cell.fact.origin, cell.fact.where)
                    groups.setdefault(key, []).append((letter, cell.fact))
        return [Bars(*k, tuple(bars)) for k, bars in groups.items() if len(bars) > 1]

    @property
    def pairs(self) -> list[Pair]:
        ran = [
            (letter, column.result)
            for letter, column in zip(self.letters, self.columns, strict=True)
            if column.result
        ]
        found = (_pair(one, other) for one, other in combinations(ran, 2))
        return [pair for pair in found if pair]

    def to_json(self) -> dict[str, Any]:
        return {
            "passed": self.passed,
            "columns": [
                {
                    "letter": letter,
                    "name": column.name,
                    "bundle": column.path and str(column.path),
                    "about": column.about,
                    "refused": column.refused or None,
                    "figures": {
                        row.name: {**cell.fact._asdict(), "ratio": cell.ratio}
                        for row in self.rows
                        if (cell := row.cells[index])
                    },
                    "layers": column.layers
                    and {
                        **column.layers._asdict(),
                        "rows": [row._asdict() for row in column.layers.rows],
                    },
                    "check": column.result and column.result.to_json(),
                }
                for index, (letter, column) in enumerate(
                    zip(self.letters, self.columns, strict=True)
                )
            ],
            "pairs": [pair.to_json() for pair in self.pairs],
        }


def _ratio(fact: Fact, facts: Sequence[Fact | None], kind: Kind) -> float | None:
    place = (fact.origin, fact.where)
    same = [each.value for each in facts if each and (each.origin, each.where) == place]
    comparable = kind.drawn and len(same) > 1 and min(same) > 0
    return fact.value / min(same) if comparable else None


def _pair(one: tuple[str, CheckResult], other: tuple[str, CheckResult]) -> Pair | None:
    (letter, a), (second, b) = one, other
    ours, theirs = _by_input(a), _by_input(b)
    both = [(ours[key], theirs[key]) for key in ours if key in theirs]
    if not both:
        return None
    accuracies = [
        compare([x.output], [y.output])
        for x, y in both
        if x.output is not None
        and y.output is not None
        and x.output.shape == y.output.shape
    ]
    compared = len(accuracies) == len(both)
    tops = [
        ([each.class_index for each in x.ours], [each.class_index for each in y.ours])
        for x, y in both
    ]
    classify = compared and all(mine and yours for mine, yours in tops)
    first, last = a.bundle.manifest, b.bundle.manifest
    notes = [
        "of different models" if first.model.sha256 != last.model.sha256 else "",
        "preprocessed differently" if first.preprocessing != last.preprocessing else "",
    ]
    return Pair(
        (letter, second),
        len(both),
        max(each.max_abs_error for each in accuracies) if compared else None,
        min(each.cosine for each in accuracies) if compared else None,
        sum(mine[:1] == yours[:1] for mine, yours in tops) if classify else None,
        sum(set(mine) == set(yours) for mine, yours in tops) if classify else None,
        " and ".join(dict.fromkeys([str(a.origin), str(b.origin)])),
        ", ".join(note for note in notes if note),
        *_found(both),
    )


def _found(
    both: Sequence[tuple[InputResult, InputResult]],
) -> tuple[Match | None, Agreement | None]:
    """Boxes and masks of the second build against those of the first; of photographs of one size."""
    found = [(x.found, y.found) for x, y in both]
    boxes = [
        match(y.ours, x.ours)
        for x, y in found
        if isinstance(x, Boxes) and isinstance(y, Boxes) and x.size == y.size
    ]
    masks = [
        agree(y.ours, x.ours)
        for x, y in found
        if isinstance(x, Masks) and isinstance(y, Masks)
        if x.geometry == y.geometry and x.ours.shape == y.ours.shape
    ]
    return (
        total(boxes) if len(boxes) == len(found) else None,
        all_masks(masks) if len(masks) == len(found) else None,
    )


def _by_input(result: CheckResult) -> dict[object, InputResult]:
    """By the image's path; of golden data by the SHA-256 of the input."""
    manifest = result.bundle.manifest
    return {
        item.path or manifest.files[manifest.golden[index].inputs[0]]: item
        for index, item in enumerate(result.inputs)
    }


def check_number(columns: int) -> None:
    """Refuse more columns than there are letters."""
    if columns > MOST_COLUMNS:
        raise UserError(
            f"{columns} columns: more than {MOST_COLUMNS} fit on no page; give fewer builds and files"
        )
