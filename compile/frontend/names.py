"""How errors about an untrusted model name its parts."""

from __future__ import annotations

import onnx

from targets.escapes import shown


def node_label(node: onnx.NodeProto) -> str:
    """How an error names a node: by its name, or by its output where it has none; and by its operator."""
    made = next((name for name in node.output if name), "")
    called = f"{shown(node.name)!r}" if node.name else f"that makes {shown(made)!r}"
    return f"node {called} ({shown(node.op_type)})"


class Unfit(Exception):
    """What is wrong with the model and what to do, before the file is named."""
