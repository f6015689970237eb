"""The model of a comparison is read and refused as in a build, and its reference has a build's settings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import networks
import numpy as np
import onnx
import pytest
from compared import OPTIONS, Runs, replace_runtimes, tiny_model
from gated import node, small
from onnx import TensorProto, helper, numpy_helper

from netship.bench import compare, measurement
from netship.compile.frontend import gate
from netship.compile.frontend.reference import Reference
from netship.targets import onnx_runtime
from netship.targets.errors import UserError


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return tiny_model(tmp_path)


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch, model: Path) -> Runs:
    return replace_runtimes(monkeypatch, model, {})


def test_a_file_that_is_no_model_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "bad.onnx"
    path.write_bytes(b"\xff" * 100)
    with pytest.raises(UserError, match=r"bad\.onnx: not an ONNX model"):
        measurement.read_case(path)


@pytest.mark.parametrize(
    ("shape", "said"),
    [
        ([2, 3, 4, 4], "has batch 2, need 1"),
        ([1, 3, "h", 4], "has symbolic dimensions"),
    ],
)
def test_an_input_that_is_no_single_image_is_refused(
    model: Path, shape: list[Any], said: str
) -> None:
    proto = onnx.load(model)
    value = helper.make_tensor_value_info("image", TensorProto.FLOAT, shape)
    proto.graph.input[0].CopyFrom(value)
    with pytest.raises(UserError, match=said):
        measurement.case_of(proto, "tiny.onnx")


def test_data_is_not_compared() -> None:
    row = small([node("Relu", ["x"], ["y"])], shape=[1, 12])
    with pytest.raises(
        UserError, match=r"tiny.onnx: its input \[1, 12\] is no image of float32"
    ):
        measurement.case_of(row, "tiny.onnx")


def _damage(proto: onnx.ModelProto, how: str) -> None:
    if how == "old":
        proto.opset_import[0].version = 6
    elif how == "new":
        proto.opset_import[0].version = 29
    elif how == "infinite":
        weight = np.full((3, 3, 1, 1), np.inf, np.float32)
        proto.graph.initializer[0].CopyFrom(numpy_helper.from_array(weight, "weight"))
    elif how == "domain":
        proto.graph.node[0].domain = "com.example"
    else:
        outside = proto.graph.initializer[0]
        outside.ClearField("raw_data")
        outside.data_location = TensorProto.EXTERNAL
        entry = outside.external_data.add()
        entry.key, entry.value = "location", "../weights.bin"


@pytest.mark.parametrize(
    "how", ["old", "new", "infinite", "domain", "outside its folder"]
)
def test_a_model_is_refused_as_in_a_build(
    model: Path, runs: Runs, tmp_path: Path, how: str
) -> None:
    proto = onnx.load(model)
    _damage(proto, how)
    path = tmp_path / "hostile" / "tiny.onnx"
    path.parent.mkdir()
    (tmp_path / "weights.bin").write_bytes(bytes(36))
    path.write_bytes(proto.SerializeToString())
    with pytest.raises(UserError) as built:
        gate.load(path)
    with pytest.raises(UserError) as compared:
        compare.main(["--model", str(path), *OPTIONS])
    assert str(compared.value) == str(built.value)
    assert runs == []


def test_the_reference_has_a_builds_settings(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For a QDQ graph they are not ONNX Runtime's own: see targets/onnx_runtime.py."""
    made: list[tuple[object, ...]] = []
    ask = onnx_runtime._Server.ask

    def spy(server: onnx_runtime._Server, *question: object) -> object:
        if question[0] == "open":
            made.append(question[2:])
        return ask(server, *question)

    path = tmp_path / "int8.onnx"
    onnx.save(networks.quantised(onnx.load(model), tmp_path), path)
    monkeypatch.setattr(onnx_runtime._Server, "ask", spy)
    case = measurement.read_case(path)
    (built,) = Reference(gate.load(path)).run(case.tensor)
    assert case.quantised and made == [(1, "all", None, [])] * 2
    np.testing.assert_array_equal(case.expected, built)
