"""Small ONNX models for tests of the gate, and what a refusal of it looks like."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import graphs
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from netship.bundle.manifest import ModelIdentity
from netship.compile.frontend.gate import load
from netship.targets.errors import UserError

IDENTITY = ModelIdentity(name="model", sha256="0" * 64)


def small(
    nodes: list[onnx.NodeProto] | None = None,
    constants: dict[str, Any] | None = None,
    shape: list[Any] | None = None,
    dtype: int = TensorProto.FLOAT,
    opset: int = 13,
    output: int = TensorProto.FLOAT,
) -> onnx.ModelProto:
    """A model from ``x`` to ``y``; a 1×1 convolution unless ``nodes`` says otherwise."""
    if nodes is None:
        nodes = [helper.make_node("Conv", ["x", "w"], ["y"], name="stem")]
        constants = {"w": graphs.image((2, 3, 1, 1)), **(constants or {})}
    graph = helper.make_graph(
        nodes,
        "small",
        [
            helper.make_tensor_value_info(
                "x", dtype, [1, 3, 6, 4] if shape is None else shape
            )
        ],
        [helper.make_tensor_value_info("y", output, None)],
        [
            numpy_helper.from_array(np.asarray(v), name)
            for name, v in (constants or {}).items()
        ],
    )
    return helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8
    )


def node(
    op: str, inputs: list[str], outputs: list[str], name: str = "n", **more: Any
) -> onnx.NodeProto:
    return helper.make_node(op, inputs, outputs, name=name, **more)


def constant(value: Any) -> onnx.NodeProto:
    return node(
        "Constant", [], ["c"], value=numpy_helper.from_array(np.asarray(value), "v")
    )


def refused(path: Path, message: str, **options: Any) -> None:
    """The gate refuses ``path`` in one short, printable line that starts with its name."""
    with pytest.raises(UserError, match=message) as error:
        load(path, **options)
    text = str(error.value)
    assert text.startswith(f"{path}: ")
    assert text.isprintable()
    assert len(text) < len(str(path)) + 500
