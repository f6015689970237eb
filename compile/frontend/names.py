"""How errors about an untrusted model name its parts, and names for new parts."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import onnx

from netship.targets.escapes import shown


def node_label(node: onnx.NodeProto) -> str:
    """How an error names a node: by its name, or by its output where it has none; and by its operator."""
    made = next((name for name in node.output if name), "")
    called = f"{shown(node.name)!r}" if node.name else f"that makes {shown(made)!r}"
    return f"node {called} ({shown(node.op_type)})"


def fresh_names(taken: Iterable[str]) -> Callable[[str], str]:
    """A function that makes of a stem a name which is not taken, each time another."""
    known = set(taken)
    # What follows a stem next: names stay taken, so that lower numbers need not be tried again.
    numbers: dict[str, int] = {}

    def fresh(stem: str) -> str:
        name, number = stem, numbers.get(stem, 2)
        while name in known:
            name, number = f"{stem}/{number}", number + 1
        known.add(name)
        numbers[stem] = number
        return name

    return fresh


class Unfit(Exception):
    """What is wrong with the model and what to do, before the file is named."""
