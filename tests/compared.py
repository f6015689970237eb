"""Runtimes that are none, for tests of the comparison: right answers, made-up counts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from netship.bench import comparison, measurement
from netship.bench.baselines import converters, emulated
from netship.bench.baselines.runtimes import Baseline
from netship.meter.counting import Block, Part
from netship.meter.counts import Command, Counts

MILLIONS = {
    "netship": (90, 60, 10),
    "litert": (120, 70, 20),
    "ncnn": (100, 60, 40),
    "onnxruntime": (180, 140, 10),
}


def tiny_model(folder: Path) -> Path:
    """A 1×1 convolution and a pooling as ``folder/tiny.onnx``: [1, 3, 4, 4] → [1, 3]."""
    weight = np.arange(9, dtype=np.float32).reshape(3, 3, 1, 1) - 4
    nodes = [
        helper.make_node("Conv", ["image", "weight"], ["y"]),
        helper.make_node("GlobalAveragePool", ["y"], ["pooled"]),
        helper.make_node("Flatten", ["pooled"], ["flat"]),
    ]
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes,
        "tiny",
        [value("image", TensorProto.FLOAT, [1, 3, 4, 4])],
        [value("flat", TensorProto.FLOAT, [1, 3])],
        [numpy_helper.from_array(weight, "weight")],
    )
    path = folder / "tiny.onnx"
    opset = [helper.make_opsetid("", 13)]
    onnx.save(helper.make_model(graph, ir_version=8, opset_imports=opset), path)
    return path


Runs = list[tuple[str, str]]
Answer = Callable[[np.ndarray[Any, Any]], np.ndarray[Any, Any]]


def replace_runtimes(
    monkeypatch: pytest.MonkeyPatch, model: Path, answers: dict[str, Answer]
) -> Runs:
    """No runtime runs: right answers, changed by ``answers``, and made-up counts. The runs that were asked for."""
    done: Runs = []
    wanted = measurement.read_case(model).expected

    def prepare(cpu: str, _on_progress: object, _board: str) -> SimpleNamespace:
        return SimpleNamespace(cpu=cpu)

    def inference(
        _machine: object,
        runtime: Baseline,
        file: Path,
        _tensor: Path,
        output: Path,
        _threads: int,
    ) -> Command:
        return Command(Path("/"), (runtime.name, str(file), str(output)), {})

    def count_program(command: Command, cpu: str, *_more: object) -> list[Part]:
        name, _, output = command.arguments
        done.append((name, cpu))
        change = answers.get(name)
        np.save(output, change(wanted) if change else wanted)
        return [Part(None, [Block(4096, name.encode(), 1)])]

    def cost(parts: list[Part], *_: str) -> Counts:
        instructions, core, memory = MILLIONS[parts[0].blocks[0].code.decode()]
        return Counts(instructions * 1_000_000, core * 1e6, memory * 1e6)

    def ours(*_: object) -> measurement.Row:
        counts = cost([Part(None, [Block(0, b"netship", 1)])], "")
        return measurement.Row("netship", "this project", "", counts, 1e-6, True)

    monkeypatch.setattr(emulated, "prepare", prepare)
    monkeypatch.setattr(converters, "convert", lambda *_: Path("model"))
    monkeypatch.setattr(emulated, "inference", inference)
    monkeypatch.setattr(measurement, "count_program", count_program)
    monkeypatch.setattr(measurement, "cost", cost)
    monkeypatch.setattr(comparison, "_ours", ours)
    return done


OPTIONS = ["--cpu", "cortex-a72", "--runtimes", "ncnn", "onnxruntime", "litert"]
