"""`run` and `check` on C projects with sensor data: several inputs, .npz and .npy, on a board and as 32-bit RISC-V."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper
from ports import network, seeded

from netship.compile import build as build_command
from netship.runtime_demo import check, run

FLOAT = TensorProto.FLOAT
MOTION, STATE = (1, 3, 24), (1, 4)


def two() -> onnx.ModelProto:
    """A convolution over time, and a state that joins it."""
    nodes = [
        helper.make_node("Conv", ["motion", "k"], ["c"], "conv", kernel_shape=[3]),
        helper.make_node("Relu", ["c"], ["r"], "relu"),
        helper.make_node("GlobalAveragePool", ["r"], ["p"], "pool"),
        helper.make_node("Flatten", ["p"], ["f"], "flat"),
        helper.make_node("Concat", ["f", "state"], ["j"], "join", axis=1),
        helper.make_node("MatMul", ["j", "w"], ["scores"], "scores"),
    ]
    given = {"motion": (FLOAT, [*MOTION]), "state": (FLOAT, [*STATE])}
    weights = {"k": seeded(6, 3, 3), "w": seeded(10, 5)}
    return network(nodes, given, {"scores": (FLOAT, [1, 5])}, weights)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("sensor")
    onnx.save(two(), made / "two.onnx")
    random = np.random.default_rng(0)
    (made / "samples").mkdir()
    for number in range(2):
        rows = {
            name: random.normal(size=shape).astype(np.float32)
            for name, shape in (("motion", MOTION), ("state", STATE))
        }
        np.savez(made / f"samples/{number}.npz", **rows)  # type: ignore[arg-type]
        if not number:
            for name, row in rows.items():
                np.save(made / f"{name}.npy", row)
    return made


@pytest.mark.parametrize(
    "target",
    ["cortex-m4", "c99", "cortex-m7 --memory dtcm=300,sram=1K,sdram=1M"],
    ids=["board", "risc-v", "memories"],
)
def test_check_and_run_take_sensor_data(
    folder: Path, target: str, capsys: pytest.CaptureFixture[str]
) -> None:
    model, built = str(folder / "two.onnx"), str(folder / target.split()[0])
    options = ["--target", *target.split(), "--model", model, "--output", built]
    build_command.main([*options, "--name", "two"])
    files = [f"--input={name}={folder / name}.npy" for name in ("motion", "state")]
    capsys.readouterr()
    for given in (["--images", str(folder / "samples")], files):
        assert check.main([built, "--model", model, "--json", *given]) == 0
        found = json.loads(capsys.readouterr().out)
        assert found["passed"] and found["origin"] == "emulated"
        assert found["images"] == (1 if given is files else 2)
    assert run.main([built, "--json", *files]) == 0
    (seen,) = json.loads(capsys.readouterr().out)["images"]
    session = onnxruntime.InferenceSession(model)
    feeds = {name: np.load(folder / f"{name}.npy") for name in ("motion", "state")}
    assert seen["top"][0]["class_index"] == session.run(None, feeds)[0].argmax()
