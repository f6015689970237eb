"""Models in float16, bfloat16 and double: what the gate makes of them answers as ONNX Runtime does on the file itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import graphs
import ml_dtypes
import numpy as np
import onnx
import pytest
from gated import IDENTITY, node, small
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from netship.compile.frontend.gate import check, load
from netship.compile.frontend.reference import Reference
from netship.targets.errors import UserError
from netship.targets.onnx_runtime import Session

TYPES = {
    "float16": (TensorProto.FLOAT16, np.float16),
    "bfloat16": (TensorProto.BFLOAT16, ml_dtypes.bfloat16),
    "double": (TensorProto.DOUBLE, np.float64),
}


def converted(proto: onnx.ModelProto, dtype: int, keep_ports: bool) -> onnx.ModelProto:
    """As converters write it: every float32 tensor in another type, with casts at both ends or ports of that type."""
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    graph = copy.graph
    for tensor in graph.initializer:
        if tensor.data_type == TensorProto.FLOAT:
            value = numpy_helper.to_array(tensor)
            narrow = value.astype(helper.tensor_dtype_to_np_dtype(dtype))
            tensor.CopyFrom(numpy_helper.from_array(narrow, tensor.name))
    for each in graph.node:
        for attribute in each.attribute:
            if attribute.HasField("t") and attribute.t.data_type == TensorProto.FLOAT:
                value = numpy_helper.to_array(attribute.t)
                narrow = value.astype(helper.tensor_dtype_to_np_dtype(dtype))
                attribute.t.CopyFrom(numpy_helper.from_array(narrow))
    if not keep_ports:
        for info in (*graph.input, *graph.output):
            info.type.tensor_type.elem_type = dtype
        return copy
    source, output = graph.input[0].name, graph.output[0].name
    for each in graph.node:
        each.input[:] = ["narrow" if n == source else n for n in each.input]
        each.output[:] = ["answer" if n == output else n for n in each.output]
    graph.node.insert(0, node("Cast", [source], ["narrow"], "in", to=dtype))
    graph.node.append(node("Cast", ["answer"], [output], "out", to=TensorProto.FLOAT))
    return copy


def answers(proto: onnx.ModelProto, kind: str, x: NDArray[Any]) -> tuple[Any, Any]:
    """Of the model that the gate makes, and of the file itself, in ONNX Runtime."""
    model = check(proto, IDENTITY)
    assert model.inputs[0].dtype == model.outputs[0].dtype == "float32"
    assert kind in model.notes[-1]
    port = proto.graph.input[0].type.tensor_type.elem_type
    given = x.astype(helper.tensor_dtype_to_np_dtype(port))
    written = onnx.ModelProto()
    written.CopyFrom(proto)
    written.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 1
    names = [model.outputs[0].name]
    (theirs,) = Session(written.SerializeToString(), "file").run(
        names, {model.inputs[0].name: given}
    )
    return Reference(model).run(x)[0], theirs


@pytest.mark.parametrize("keep_ports", [False, True])
@pytest.mark.parametrize("exporter", [graphs.torchscript_cnn, graphs.dynamo_cnn])
def test_a_float16_export_answers_as_the_file_does(
    exporter: Any, keep_ports: bool
) -> None:
    proto = converted(exporter(18), TensorProto.FLOAT16, keep_ports)
    x = np.random.default_rng(0).standard_normal((1, *graphs.IMAGE))
    x = x.astype(np.float16).astype(np.float32)
    ours, theirs = answers(proto, "float16", x)
    np.testing.assert_allclose(ours, theirs.astype(np.float32), rtol=0, atol=2e-3)
    types = {each.data_type for each in check(proto, IDENTITY).proto.graph.initializer}
    assert types <= {TensorProto.FLOAT, TensorProto.INT64}


@pytest.mark.parametrize("kind", ["bfloat16", "double"])
def test_weights_of_other_types_are_the_same_numbers(kind: str) -> None:
    """Of operators that ONNX Runtime has in the type: a cast of the weights, then arithmetic in float32."""
    dtype, numpy_type = TYPES[kind]
    weights = np.random.default_rng(1).standard_normal((2, 3, 1, 1)).astype(numpy_type)
    cast = node("Cast", ["w"], ["wide"], "cast", to=TensorProto.FLOAT)
    proto = small([cast, node("Conv", ["x", "wide"], ["y"], "stem")], {"w": weights})
    assert proto.graph.initializer[0].data_type == dtype
    x = np.random.default_rng(0).standard_normal((1, 3, 6, 4)).astype(np.float32)
    ours, theirs = answers(proto, kind, x)
    np.testing.assert_array_equal(ours, theirs)
    (conv,) = check(proto, IDENTITY).proto.graph.node
    assert conv.op_type == "Conv"


def test_a_double_network_is_rounded_and_sizes_are_computed_in_double() -> None:
    """In float32 100 · 0.29 is 29 and not 28.999…, whose floor is one less."""
    nodes = [
        node("Shape", ["x"], ["shape"], "shape", start=3),
        node("Cast", ["shape"], ["wide"], "wide", to=TensorProto.DOUBLE),
        node("Mul", ["wide", "part"], ["size"], "size"),
        node("Floor", ["size"], ["whole"], "whole"),
        node("Cast", ["whole"], ["end"], "end", to=TensorProto.INT64),
        node("Slice", ["x", "zero", "end", "axis"], ["cut"], "cut"),
        node("Clip", ["cut", "least", "most"], ["y"], "limits"),
    ]
    constants = {
        "part": np.array([0.29]),
        "zero": np.array([0]),
        "axis": np.array([3]),
        "least": np.array(np.finfo(np.float64).min),
        "most": np.array(1 / 3),
    }
    shape = [1, 1, 2, 100]
    wide = TensorProto.DOUBLE
    proto = small(nodes, constants, shape, wide, output=wide, opset=17)
    x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    ours, theirs = answers(proto, "double, rounded", x)
    assert ours.shape == (1, 1, 2, 28)
    np.testing.assert_array_equal(ours, theirs.astype(np.float32))


def test_what_makes_no_sense_in_any_type_is_still_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    weights = np.full((2, 3, 1, 1), np.nan, np.float16)
    half = TensorProto.FLOAT16
    conv = [node("Conv", ["x", "w"], ["y"], "stem")]
    onnx.save(small(conv, {"w": weights}, dtype=half, output=half), path)
    with pytest.raises(UserError, match="weights 'w' hold NaN"):
        load(path)
    onnx.save(small([node("Cast", ["x"], ["y"], to=TensorProto.FLOAT8E5M2)]), path)
    with pytest.raises(UserError, match="not a valid ONNX model|float8"):
        load(path)
