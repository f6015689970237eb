"""What the gate lets through: shapes, layout and outputs as it finds them, and bytes that nobody wrote by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import graphs
import numpy as np
import onnx
import pytest
from gated import IDENTITY, node, small
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from netship.compile.frontend.gate import check, load
from netship.targets.errors import UserError


def test_an_output_may_be_a_scalar(tmp_path: Path) -> None:
    onnx.save(small([node("ReduceMax", ["x"], ["y"], keepdims=0)]), tmp_path / "m.onnx")
    assert [each.shape for each in load(tmp_path / "m.onnx").outputs] == [()]


def test_a_symbolic_batch_becomes_1_and_is_said(tmp_path: Path) -> None:
    model = check(small(shape=["N", 3, 6, 4]), IDENTITY)
    assert model.inputs[0].shape == (1, 3, 6, 4)
    assert model.outputs[0].shape == (1, 2, 6, 4)
    assert model.notes == ("input 'x': symbolic batch N made 1",)
    assert check(small(), IDENTITY).notes == ()


def test_input_shape_fills_symbolic_dimensions_alone() -> None:
    model = check(small(shape=["N", 3, "h", "w"]), IDENTITY, {"x": (1, 3, 8, 6)})
    assert model.inputs[0].shape == (1, 3, 8, 6)
    assert model.notes == ()
    with pytest.raises(
        UserError, match=r"x:1,4,8,6 contradicts the input's \[N, 3, h, w\]"
    ):
        check(small(shape=["N", 3, "h", "w"]), IDENTITY, {"x": (1, 4, 8, 6)})
    with pytest.raises(UserError, match="x:1,3 contradicts"):
        check(small(shape=["N", 3, "h", "w"]), IDENTITY, {"x": (1, 3)})
    with pytest.raises(UserError, match="batch 2, need 1"):
        check(small(shape=["N", 3, "h", "w"]), IDENTITY, {"x": (2, 3, 8, 6)})
    with pytest.raises(UserError, match="names 'image', but the input is 'x'"):
        check(small(), IDENTITY, {"image": (1, 3, 6, 4)})


@pytest.mark.parametrize(
    ("shape", "layout"),
    [
        ([1, 3, 6, 4], "NCHW"),
        ([1, 6, 4, 3], "NHWC"),
        ([1, 1, 6, 6], "NCHW"),
        ([1, 6, 6, 1], "NHWC"),
        ([1, 3, 6, 3], "NCHW"),
        ([1, 4, 6, 6], "NCHW"),
    ],
)
def test_the_layout_is_where_1_or_3_channels_stand(
    shape: list[int], layout: str
) -> None:
    model = small([node("Relu", ["x"], ["y"])], shape=shape)
    assert check(model, IDENTITY).inputs[0].layout == layout
    assert check(model, IDENTITY, layout="NHWC").inputs[0].layout == "NHWC"


@pytest.mark.parametrize("shape", [[40], [1, 640], ["N", 640], [1, 9, 128]])
def test_an_input_of_another_rank_is_data(shape: list[Any]) -> None:
    model = small([node("Relu", ["x"], ["y"])], shape=shape)
    found = check(model, IDENTITY).inputs[0]
    assert found.shape == tuple(1 if size == "N" else size for size in shape)
    assert (found.layout, found.is_image) == ("", False)
    assert check(model, IDENTITY, layout="data").inputs[0] == found
    with pytest.raises(
        UserError, match=r"layout NHWC: input 'x' has rank \d, an image"
    ):
        check(model, IDENTITY, layout="NHWC")


def test_four_dimensions_are_an_image_where_they_may_be_and_nothing_else_is_said() -> (
    None
):
    relu = [node("Relu", ["x"], ["y"])]
    audio = small(relu, shape=[1, 1, 49, 10])
    assert check(audio, IDENTITY).inputs[0].is_image
    said = check(audio, IDENTITY, layout="data").inputs[0]
    assert (said.layout, said.is_image) == ("", False)
    assert not check(small(relu, shape=[1, 8, 16, 16]), IDENTITY).inputs[0].is_image


def test_initializers_among_the_inputs_are_weights() -> None:
    model = small()
    model.ir_version = 3
    model.graph.input.append(
        helper.make_tensor_value_info("w", TensorProto.FLOAT, [2, 3, 1, 1])
    )
    checked = check(model, IDENTITY)
    assert checked.inputs[0].name == "x"
    assert [each.name for each in checked.proto.graph.input] == ["x"]


def ending(*nodes: onnx.NodeProto, opset: int = 13, **constants: Any) -> bool:
    flat = node("Flatten", ["x"], ["f"])
    model = small([flat, *nodes], constants, shape=[1, 3, 1, 2], opset=opset)
    return check(model, IDENTITY).probabilities


def test_probabilities_are_what_a_softmax_over_the_classes_gives() -> None:
    softmax = node("Softmax", ["f"], ["s"], axis=1)
    assert ending(node("Softmax", ["f"], ["y"]))
    assert ending(node("Softmax", ["f"], ["y"]), opset=11)
    assert ending(softmax, node("Identity", ["s"], ["y"]))
    assert ending(
        softmax, node("Reshape", ["s", "to"], ["y"]), to=np.array([1, 6, 1], np.int64)
    )
    stored = node("QuantizeLinear", ["s", "scale", "zero"], ["q"])
    real = node("DequantizeLinear", ["q", "scale", "zero"], ["y"])
    facts: dict[str, Any] = {
        "scale": np.array(1 / 256, np.float32),
        "zero": np.array(-128, np.int8),
    }
    assert ending(softmax, stored, real, **facts)
    assert not ending(node("Relu", ["f"], ["y"]))
    assert not ending(softmax, node("Relu", ["s"], ["y"]))
    assert not ending(node("Softmax", ["f"], ["y"], axis=0))
    assert not ending(node("LogSoftmax", ["f"], ["y"]))


def test_a_model_in_memory_is_left_as_it_was() -> None:
    model = small(shape=["N", 3, 6, 4])
    before = model.SerializeToString(deterministic=True)
    check(model, IDENTITY)
    assert model.SerializeToString(deterministic=True) == before


VALID = small(
    [
        node("Conv", ["x", "w"], ["c"], "stem"),
        node("Shape", ["c"], ["s"]),
        node("Reshape", ["c", "s"], ["r"]),
        node("GlobalAveragePool", ["r"], ["g"]),
        node("Flatten", ["g"], ["f"]),
        node("Softmax", ["f"], ["y"]),
    ],
    {"w": graphs.image((2, 3, 1, 1))},
    shape=["N", 3, 6, 4],
).SerializeToString()
QUICK = settings(
    max_examples=300,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


def passes_or_is_refused(folder: Path, content: bytes) -> None:
    path = folder / "model.onnx"
    path.write_bytes(content)
    try:
        load(path)
    except UserError as error:
        assert str(error).isprintable()


@QUICK
@given(st.binary(max_size=300))
def test_random_bytes_are_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(content)
    with pytest.raises(UserError):
        load(path)


@QUICK
@given(st.integers(0, len(VALID) - 1), st.integers(0, 255))
@example(0, VALID[0])
def test_a_changed_byte_passes_or_is_refused(
    tmp_path: Path, at: int, byte: int
) -> None:
    passes_or_is_refused(tmp_path, VALID[:at] + bytes([byte]) + VALID[at + 1 :])


@QUICK
@given(st.integers(0, len(VALID) - 1))
def test_a_truncated_model_passes_or_is_refused(tmp_path: Path, length: int) -> None:
    passes_or_is_refused(tmp_path, VALID[:length])
