"""Small networks of any inputs and outputs, and the checks of what is built of them."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from conftest import succeed
from kits import HERE
from onnx import helper, numpy_helper

from netship.devices.board.programs import native_verifier


def network(
    nodes: list[onnx.NodeProto],
    inputs: Mapping[str, tuple[int, list[Any]]],
    outputs: Mapping[str, tuple[int, list[Any]]],
    weights: dict[str, Any],
) -> onnx.ModelProto:
    """A model of opset 13; inputs and outputs are types and shapes, by name."""
    read, made = (
        [helper.make_tensor_value_info(name, *kind) for name, kind in each.items()]
        for each in (inputs, outputs)
    )
    constants = [numpy_helper.from_array(np.asarray(w), n) for n, w in weights.items()]
    graph = helper.make_graph(nodes, "ports", read, made, constants)
    opset = [helper.make_opsetid("", 13)]
    return helper.make_model(graph, opset_imports=opset, ir_version=8)


def seeded(*shape: int) -> Any:
    spread = float(np.prod(shape[1:])) ** -0.5
    values = np.random.default_rng(len(shape)).normal(0, spread, shape)
    return values.astype(np.float32)


def check(bundle: Path, *options: object) -> dict[str, Any]:
    """What a check says, which must pass."""
    said = succeed("runtime_demo.check", bundle, "--repeat", "2", "--json", *options)
    found: dict[str, Any] = json.loads(said)
    assert found["passed"]
    return found


def verified(bundle: Path) -> str:
    """What the board's own program says, which must pass."""
    program = native_verifier(HERE)  # type: ignore[arg-type]
    command = [str(program), "--repeat", "0", str(bundle)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout
