"""JSON as a hand, a torn disk or somebody else may have left it: any part of it another value, or gone."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from hypothesis import strategies as st

Change = tuple[tuple[Any, ...], Any, bool]

VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(
        ["../x", "/etc/passwd", "a\0b", "NHWC", "0" * 64, "'", "\ud800", 2**70, 10**400]
    ),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner)
    ),
    max_leaves=5,
)


def changes(text: str) -> st.SearchStrategy[list[Change]]:
    """Up to three places of a JSON text, what stands there then, and whether they are removed instead."""
    place = st.sampled_from(_places(json.loads(text)))
    return st.lists(st.tuples(place, VALUES, st.booleans()), min_size=1, max_size=3)


def changed(text: str, to: Sequence[Change]) -> str:
    whole = json.loads(text)
    for path, value, remove in to:
        parent = whole
        try:
            for step in path[:-1]:
                parent = parent[step]
            if remove:
                del parent[path[-1]]
            else:
                parent[path[-1]] = value
        except (LookupError, TypeError):  # an earlier change took it away
            continue
    return json.dumps(whole)


def _places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    inside = value.items() if isinstance(value, dict) else enumerate(value)
    found = []
    for key, item in inside:
        found.append((*path, key))
        if isinstance(item, dict | list):
            found += _places(item, (*path, key))
    return found
