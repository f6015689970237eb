"""Several builds of a network side by side, matched by the layers of their kernels."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from netship.meter.operators import Metered, Operator
from netship.targets.errors import UserError
from netship.targets.escapes import ending, listed

LETTERS = "ABCDE"
"""Of builds on a page: so many colours tell them apart."""


class Build(NamedTuple):
    """One of several builds; ``name`` is that of its folder."""

    name: str
    metered: Metered


def names(paths: Sequence[Path]) -> list[str]:
    """The folders' names, of those with one name the paths."""
    found = [path.resolve().name for path in paths]
    times = Counter(found)
    return [
        name if times[name] == 1 else str(path)
        for name, path in zip(found, paths, strict=True)
    ]


def check_number(others: int) -> None:
    """Refuse more builds beside the first than a page has colours for."""
    if others >= len(LETTERS):
        raise UserError(f"--against: {others} builds; give {len(LETTERS) - 1} at most")


def check(builds: Sequence[Build]) -> None:
    """Refuse builds that have no layer in common with the first."""
    first, *others = [
        {layer for each in build.metered.operators for layer in each.layers}
        for build in builds
    ]
    for build, layers in zip(builds[1:], others, strict=True):
        if not first & layers:
            raise UserError(
                f"--against {build.name}: has no layer of {builds[0].name}; give builds of one network"
            )


class Row(NamedTuple):
    """Layers that have kernels of their own in every build, and what each build takes for them.

    Attributes:
        operators: of each build; none where it has no such layer.
    """

    title: str
    operators: tuple[tuple[Operator, ...], ...]

    @property
    def cycles(self) -> list[float | None]:
        """Core and memory cycles of each build."""
        return [
            sum(each.cycles for each in found) if found else None
            for found in self.operators
        ]


def rows(builds: Sequence[Build]) -> list[Row]:
    """The builds side by side, in the order in which the first of them runs its kernels.

    A row has the fewest layers that no kernel of any build joins with others'. A kernel without a layer goes with those
    that do the same.
    """
    group: dict[str, str] = {}

    def find(name: str) -> str:
        while group.setdefault(name, name) != name:
            name = group[name]
        return name

    for build in builds:
        for operator in build.metered.operators:
            first, *others = _keys(operator)
            for other in others:
                group[find(other)] = find(first)
    found: dict[str, list[list[Operator]]] = {}
    for index, build in enumerate(builds):
        for operator in build.metered.operators:
            place = find(_keys(operator)[0])
            found.setdefault(place, [[] for _ in builds])[index].append(operator)
    return [Row(_title(each), tuple(map(tuple, each))) for each in found.values()]


def _keys(operator: Operator) -> list[str]:
    return list(operator.layers) or [f"\0{_kind(operator)}"]


def _kind(operator: Operator) -> str:
    """What a kernel without a layer does; TVM numbers those that do the same."""
    return re.sub(r" \d+$", "", operator.title)


def _title(found: Sequence[Sequence[Operator]]) -> str:
    every = [each for operators in found for each in operators]
    names = dict.fromkeys(layer for each in every for layer in each.layers)
    return listed([ending(name, 60) for name in names], 8) if names else _kind(every[0])
