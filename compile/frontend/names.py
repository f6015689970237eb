"""How errors about an untrusted model name its parts."""

from __future__ import annotations

import onnx


def shown(text: object, limit: int = 80) -> str:
    """``text`` on one line, without control characters, at most ``limit`` characters long.

    A name in a model can hold newlines, terminal escapes, or be a megabyte long.
    """
    given = str(text)
    clean = "".join(
        c if c.isprintable() else "\N{REPLACEMENT CHARACTER}"
        for c in given[: limit + 1]
    )
    clean = " ".join(clean.split())
    return clean if len(clean) <= limit else clean[: limit - 1] + "…"


def node_label(node: onnx.NodeProto) -> str:
    """How an error names a node: its name where it has one, else what it makes; and its operator."""
    made = next((name for name in node.output if name), "")
    called = f"{shown(node.name)!r}" if node.name else f"that makes {shown(made)!r}"
    return f"node {called} ({shown(node.op_type)})"


class Unfit(Exception):
    """What is wrong with the model and what to do, before the file is named."""
