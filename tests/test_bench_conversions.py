"""Graphs as Keras and PyTorch export them, in the files of LiteRT and ncnn: they answer as the originals."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import graphs
import integers
import networks
import numpy as np
import onnx
import pytest
import tflite
import tflite_models
from gated import small
from numpy.typing import NDArray
from onnx import helper
from relay_worker import through_onnxruntime, worst_difference

from netship.bench import measurement
from netship.bench.baselines import emulated, runtimes
from netship.bench.baselines.plain import plain
from netship.bench.baselines.tflite import _PASSES, _Converter
from netship.bench.baselines.tflite_file import TfliteFile
from netship.compile import passes
from netship.compile.frontend.tflite.convert import convert
from netship.compile.ir import onnx_form
from netship.compile.ir.graph import Tensor
from netship.compile.passes.simplify import fold_normalisation
from netship.meter.counting import Block
from netship.targets.errors import UserError
from netship.targets.progress import Progress

Array = NDArray[Any]
RANDOM = np.random.default_rng(4)
node = helper.make_node


class Written:
    """Stands for LiteRT's classes: the same file by the schema of the package tflite."""

    schema = tflite

    def __init__(self) -> None:
        self.file = tflite_models.TfliteFile()
        self.codes: list[str] = []

    def tensor(self, tensor: Tensor) -> int:
        facts = tensor.quantisation
        quantised: dict[str, Any] = {}
        if facts is not None:
            quantised = {"scale": facts.scale, "zero": facts.zero}
            quantised["axis"] = facts.axis or 0
        shape, value = tensor.shape, tensor.value
        return self.file.tensor(
            shape, tensor.dtype, value, name=tensor.name, **quantised
        )

    def operator(
        self,
        code: str,
        inputs: Sequence[int],
        output: int,
        options: str = "",
        **fields: Any,
    ) -> None:
        self.codes.append(code)
        if "newShape" in fields:
            shape = np.array(fields.pop("newShape"), np.int32)
            fields["NewShape"] = self.file.builder.CreateNumpyVector(shape)
        named = {name[0].upper() + name[1:]: value for name, value in fields.items()}
        self.file.operator(code, inputs, [output], options, **named)

    def serialised(self, inputs: Sequence[int], outputs: Sequence[int]) -> bytes:
        return self.file.serialised(inputs, outputs)


def written(proto: onnx.ModelProto) -> tuple[measurement.Case, Written, list[Array]]:
    """The case, the file's operators, and what the file answers to the case's tensor."""
    case = measurement.case_of(proto, "network")
    file = Written()
    last = case.model.inputs[0].layout == "NHWC"
    proto = plain(case.model.proto, [case.model.inputs[0].name] if last else [])
    graph = passes.run(_PASSES, onnx_form.read_as_written(proto))
    made = convert(_Converter(graph, cast(TfliteFile, file)).converted())
    given = case.tensor
    if not last:
        given = given.transpose(0, 2, 3, 1)
    given = np.ascontiguousarray(given)
    answers = through_onnxruntime(made.SerializeToString(), [given])[0]
    return case, file, answers


EXPORTED = {
    "keras": graphs.tf2onnx_cnn(13),
    "keras, opset 11": graphs.tf2onnx_cnn(11),
    "keras, auto_pad": graphs.tf2onnx_cnn(13, auto_pad=True),
    "pytorch": graphs.dynamo_cnn(18),
}


@pytest.mark.parametrize("name", EXPORTED)
def test_exporters_graphs_answer_the_same_in_litert(name: str) -> None:
    case, file, answers = written(EXPORTED[name])
    assert worst_difference(answers[:1], [case.expected]) < 1e-5
    assert "TRANSPOSE" not in file.codes
    if name != "pytorch":
        # Batch normalisation and the classifier's addition are parts of layers.
        assert file.codes.count("ADD") == 1 and "MUL" not in file.codes


def test_a_keras_graph_in_int8_answers_the_same_in_litert(tmp_path: Path) -> None:
    static = measurement.case_of(EXPORTED["keras"], "network").model.proto
    graph = fold_normalisation(onnx_form.read_as_written(static))
    case, file, answers = written(networks.quantised(onnx_form.write(graph), tmp_path))
    assert case.quantised
    assert {"CONV_2D", "DEPTHWISE_CONV_2D", "FULLY_CONNECTED"} <= {*file.codes}
    # LiteRT's softmax in int8 has a scale of its own.
    assert file.codes[-4:] == ["DEQUANTIZE", "SOFTMAX", "QUANTIZE", "DEQUANTIZE"]
    assert np.abs(answers[0] - case.expected).max() < 0.02


def test_what_litert_joins_has_one_scale(tmp_path: Path) -> None:
    g = integers.Graph(3, 12)
    parts = [
        g.convolution("limited", "image", 3, 8),
        g.convolution("free", "image", 3, 8, clip=False),
    ]
    g.classifier(g.node("Concat", "both", parts, axis=1), 16, 4)
    case, file, answers = written(integers.quantised(g.finish((1, 4)), tmp_path))
    end = file.codes.index("CONCATENATION")
    assert "QUANTIZE" in file.codes[end - 2 : end]
    assert np.abs(answers[0] - case.expected).max() < 0.05 * np.ptp(case.expected)


def numbers(*shape: int) -> Array:
    return RANDOM.normal(size=shape).astype(np.float32)


W = numbers(4, 3, 3, 3)
SMALL: dict[str, tuple[list[Any], dict[str, Any]]] = {
    "rows of the image": (
        [
            node("Transpose", ["x"], ["t"], perm=[0, 2, 3, 1]),
            node("Reshape", ["t", "s"], ["y"]),
        ],
        {"s": np.array([1, 72])},
    ),
    "channels of the image": ([node("Flatten", ["x"], ["y"])], {}),
    "back to an image": (
        [node("Reshape", ["x", "s"], ["r"]), node("Conv", ["r", "w"], ["y"])],
        {"s": np.array([1, 2, 6, 6]), "w": numbers(3, 2, 1, 1)},
    ),
    "numbers a channel": (
        [
            node("Mul", ["x", "a"], ["m"]),
            node("Sub", ["m", "b"], ["s"]),
            node("Div", ["s", "c"], ["y"]),
        ],
        {"a": numbers(3, 1, 1), "b": numbers(1, 3, 1, 1), "c": np.float32(3)},
    ),
    "numbers a column": ([node("Add", ["a", "x"], ["y"])], {"a": numbers(4)}),
    "functions": (
        [
            node("Sigmoid", ["x"], ["a"]),
            node("Tanh", ["a"], ["b"]),
            node("HardSigmoid", ["b"], ["c"], alpha=0.3, beta=0.1),
            node("Mul", ["c", "x"], ["d"]),
            node("HardSwish", ["d"], ["y"]),
        ],
        {},
    ),
    "other bounds": (
        [
            node("Conv", ["x", "w"], ["a"]),
            node("Clip", ["a", "low", "high"], ["b"]),
            node("Clip", ["b", "", "less"], ["y"]),
        ],
        {
            "w": W,
            "low": np.float32(-1),
            "high": np.float32(1),
            "less": np.float32(0.5),
        },
    ),
    "zeros around": (
        [node("Pad", ["x", "p"], ["a"]), node("Relu", ["a"], ["y"])],
        {"p": np.array([0, 1, 0, 2, 0, 0, 3, 1])},
    ),
    "zeros before a convolution": (
        [node("Pad", ["x", "p"], ["a"]), node("Conv", ["a", "w"], ["y"])],
        {"p": np.array([0, 0, 2, 0, 0, 0, 1, 1]), "w": W},
    ),
    "a mean without its axes": (
        [node("ReduceMean", ["x"], ["y"], axes=[-1, -2], keepdims=0)],
        {},
    ),
    "a mean of rows": (
        [node("ReduceMean", ["x"], ["y"], axes=[2], keepdims=0)],
        {},
    ),
    "a mean of channels": ([node("ReduceMean", ["x"], ["y"], axes=[1])], {}),
    "a product and a row": (
        [
            node("Flatten", ["x"], ["f"]),
            node("MatMul", ["f", "w"], ["m"]),
            node("Add", ["b", "m"], ["a"]),
            node("Relu", ["a"], ["y"]),
        ],
        {"w": numbers(72, 5), "b": numbers(5)},
    ),
    "a product and a number": (
        [
            node("Flatten", ["x"], ["f"]),
            node("MatMul", ["f", "w"], ["m"]),
            node("Add", ["m", "b"], ["y"]),
        ],
        {"w": numbers(72, 5), "b": numbers(1)},
    ),
    "a mean that counts the padding": (
        [
            node(
                "AveragePool",
                ["x"],
                ["y"],
                kernel_shape=[3, 3],
                pads=[1, 1, 1, 1],
                count_include_pad=1,
            )
        ],
        {},
    ),
    "a mean that does not": (
        [node("AveragePool", ["x"], ["y"], kernel_shape=[3, 3], pads=[1, 1, 1, 1])],
        {},
    ),
    "a maximum of negative numbers": (
        [
            node("MaxPool", ["x"], ["y"], kernel_shape=[3, 3], pads=[1, 1, 1, 1]),
        ],
        {},
    ),
    "the odd row first": (
        [node("Conv", ["x", "w"], ["y"], strides=[2, 2], auto_pad="SAME_LOWER")],
        {"w": W},
    ),
}


@pytest.mark.parametrize("name", SMALL)
def test_small_graphs_answer_the_same_in_litert(name: str) -> None:
    nodes, constants = SMALL[name]
    case, _, answers = written(small(nodes, constants, opset=14))
    found = answers[0]
    if found.ndim == 4:
        found = found.transpose(0, 3, 1, 2)
    assert worst_difference([found], [case.expected]) < 1e-5


def test_a_graph_for_which_conversions_are_made_stays_as_it_is() -> None:
    case = measurement.case_of(networks.resnet18_like(64), "network")
    assert plain(case.model.proto, []) is case.model.proto
    model = measurement.case_of(EXPORTED["keras, auto_pad"], "network").model
    changed = plain(model.proto, ["input_1"])
    kinds = {each.op_type for each in changed.graph.node}
    assert not kinds & {"Transpose", "Mul", "Pad"}
    named = {each.name for n in changed.graph.node for each in n.attribute}
    assert "auto_pad" not in named
    sizes = changed.graph.input[0].type.tensor_type.shape.dim
    assert [each.dim_value for each in sizes] == [1, 3, 20, 16]


@pytest.mark.slow
def test_runtimes_themselves_answer_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    try:
        machine = emulated.prepare("cortex-a72", lambda stage: None)
    except UserError as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(f"not run: {error}")

    def uncounted(command: Any, *_: object) -> list[Block]:
        machine.run(command, Path.cwd())
        return []

    monkeypatch.setattr(measurement, "count_program", uncounted)
    case = measurement.case_of(EXPORTED["keras, auto_pad"], "network")
    for runtime in ("litert", "ncnn"):
        found = runtimes.find(runtime)
        counted = measurement._count(
            case, found, "cortex-a72", "", 1, Progress(quiet=True), None
        )
        off, same = measurement._compare(case, found, counted.answer)
        assert same and off is not None and off < 1e-5
