"""A .tflite file as the ONNX model that is made of it: every operator against numpy, hostile files, and builds.

Longer than 450 lines: operators, hostile files and builds share the models that it makes.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from conftest import NOT_RUN, SHARED
from gated import IDENTITY
from onnx import numpy_helper
from tflite_cases import CASES, Case, float_file, quantised_file
from tflite_models import SAME, VALID, Array, TfliteFile, convolution, network

from netship.bundle.store import open_bundle
from netship.compile import build, passes
from netship.compile.backends.engine import named_once
from netship.compile.frontend import gate, sources
from netship.compile.frontend.names import Unfit
from netship.compile.frontend.preprocessing import Overrides, resolve_preprocessing
from netship.compile.frontend.tflite.convert import convert
from netship.compile.passes.ports import integer_ports
from netship.targets.errors import UserError
from netship.targets.onnx_runtime import Session

KINDS = sorted({case.kind for case in CASES})


def _answers(proto: onnx.ModelProto, inputs: list[Array]) -> list[Array]:
    onnx.checker.check_model(proto, full_check=True)
    session = Session(proto.SerializeToString(), "tflite")
    names = [each.name for each in proto.graph.input]
    outputs = [each.name for each in proto.graph.output]
    return session.run(outputs, dict(zip(names, inputs, strict=True)))


def _of_kind(kind: str) -> list[Case]:
    return [case for case in CASES if case.kind == kind]


@pytest.mark.parametrize("kind", KINDS)
def test_an_operator_of_float32(kind: str) -> None:
    for case in _of_kind(kind):
        inputs = case.inputs()
        expected = case.answers(inputs, case.constants)
        got = _answers(convert(float_file(case)), inputs)
        for right, y in zip(expected, got, strict=True):
            assert y.shape == right.shape
            np.testing.assert_allclose(
                y, right, rtol=2e-5, atol=2e-5, err_msg=str(case)
            )


@pytest.mark.parametrize("dtype", ["int8", "uint8"])
@pytest.mark.parametrize("kind", KINDS)
def test_an_operator_of_bytes_is_right_within_half_a_step(
    kind: str, dtype: str
) -> None:
    for case in _of_kind(kind):
        if not case.quantised:
            continue
        file = quantised_file(case, dtype)
        got = _answers(convert(file.data), file.inputs)
        for right, y, scale in zip(file.answers, got, file.scales, strict=True):
            assert y.shape == right.shape
            assert np.abs(y - right.astype(np.float64)).max() <= 0.51 * scale, case


# Networks.


@pytest.mark.parametrize("pooled", [True, False])
def test_a_quantised_network_becomes_integers_without_moving_images(
    pooled: bool,
) -> None:
    proto = convert(network(pooled))
    kinds = Counter(node.op_type for node in proto.graph.node)
    # The input's alone: behind an image that is flattened the weights are in another order.
    assert kinds["Transpose"] == 1
    assert kinds["Relu"] == 1 and kinds["Clip"] == 0
    assert [each.name for each in proto.graph.input] == ["image"]
    assert [each.name for each in proto.graph.output] == ["scores"]
    names = [node.name for node in proto.graph.node]
    assert {"first", "second", "total", "scores"} <= set(names)
    assert len(set(names)) == len(names)
    graph = passes.read(proto, passes.INTEGERS)
    floats = [each.kind for each in graph.operators if not each.output.quantisation]
    assert floats == ["DequantizeLinear"]


@pytest.mark.parametrize("float_ports", [True, False])
def test_a_quantised_network_takes_and_gives_stored_values(float_ports: bool) -> None:
    proto = convert(network(float_ports=float_ports))
    graph = passes.run([integer_ports], passes.read(proto, passes.INTEGERS))
    assert [each.dtype for each in (*graph.inputs, *graph.outputs)] == ["int8"] * 2
    assert all(each.output.quantisation for each in graph.operators)
    x = np.random.default_rng(0).uniform(0, 1, (1, 8, 8, 3)).astype(np.float32)
    (plain,) = _answers(convert(network()), [x])
    np.testing.assert_array_equal(_answers(proto, [x])[0], plain)


def test_weights_of_uint8_keep_their_real_values() -> None:
    """As int8 without a zero point where they fit; else as they are."""
    for values, dtype in (([[12, 140, 255]], np.int8), ([[0, 140, 255]], np.uint8)):
        file = TfliteFile()
        x = file.tensor((1, 3), "uint8", scale=0.5, zero=7)
        w = file.tensor((1, 3), "uint8", np.array(values), scale=0.25, zero=140)
        y = file.tensor((1, 1), "uint8", scale=0.5, zero=128)
        file.operator("FULLY_CONNECTED", [x, w], [y], "FullyConnectedOptions")
        proto = convert(file.serialised([x], [y]))
        made = {
            each.name: numpy_helper.to_array(each) for each in proto.graph.initializer
        }
        stored = made["t1/stored"]
        zero = int(made["t1/zero"])
        assert stored.dtype == dtype
        assert (stored.astype(int) - zero).tolist() == (np.array(values) - 140).tolist()


def _dilated(batches: bool) -> tuple[bytes, bytes]:
    """A dilated convolution by SPACE_TO_BATCH_ND and BATCH_TO_SPACE_ND, and as itself; or by PAD."""
    random, files = np.random.default_rng(2), []
    weights = random.integers(-127, 128, (1, 3, 3, 4))
    for plain in (False, True):
        file = TfliteFile()
        x = file.tensor((1, 6, 6, 4), "int8", scale=0.02, zero=3)
        y = file.tensor((1, 6, 6, 4), "int8", scale=0.1, zero=-9)
        kind = "DEPTHWISE_CONV_2D"
        if plain:
            factors = {"DilationHFactor": 2, "DilationWFactor": 2} if batches else {}
            convolution(file, x, weights, y, kind, Padding=SAME, **factors)
        elif batches:
            block, widths = file.constant([2, 2]), file.constant([[2, 2], [2, 2]])
            parts = file.tensor((4, 5, 5, 4), "int8", scale=0.02, zero=3)
            file.operator("SPACE_TO_BATCH_ND", [x, block, widths], [parts])
            made = file.tensor((4, 3, 3, 4), "int8", scale=0.1, zero=-9)
            convolution(file, parts, weights, made, kind, Padding=VALID)
            crops = file.constant([[0, 0], [0, 0]])
            file.operator("BATCH_TO_SPACE_ND", [made, block, crops], [y])
        else:
            widths = file.constant([[0, 0], [1, 1], [1, 1], [0, 0]])
            padded = file.tensor((1, 8, 8, 4), "int8", scale=0.02, zero=3)
            file.operator("PAD", [x, widths], [padded])
            convolution(file, padded, weights, y, kind, Padding=VALID)
        files.append(file.serialised([x], [y]))
    return files[0], files[1]


@pytest.mark.parametrize("batches", [True, False])
def test_what_pads_a_convolution_is_part_of_it(batches: bool) -> None:
    protos = [convert(data) for data in _dilated(batches)]
    kinds, plain = (Counter(n.op_type for n in proto.graph.node) for proto in protos)
    assert kinds == plain
    x = np.random.default_rng(1).uniform(-2, 2, (1, 6, 6, 4)).astype(np.float32)
    (first,), (second,) = (_answers(proto, [x]) for proto in protos)
    np.testing.assert_array_equal(first, second)


def test_a_pair_of_transpositions_moves_nothing() -> None:
    file = TfliteFile()
    x = file.tensor((1, 6, 5, 4))
    w = file.tensor((3, 1, 1, 4), value=np.ones((3, 1, 1, 4)))
    made = file.tensor((1, 6, 5, 3))
    fields: dict[str, Any] = {
        "StrideH": 1,
        "StrideW": 1,
        "DilationHFactor": 1,
        "DilationWFactor": 1,
    }
    file.operator("CONV_2D", [x, w, -1], [made], "Conv2DOptions", **fields)
    first = file.tensor((1, 3, 6, 5))
    file.operator("TRANSPOSE", [made, file.constant([0, 3, 1, 2])], [first])
    absolute = file.tensor((1, 3, 6, 5))
    file.operator("ABS", [first], [absolute])
    last = file.tensor((1, 6, 5, 3))
    file.operator("TRANSPOSE", [absolute, file.constant([0, 2, 3, 1])], [last])
    y = file.tensor((1, 3, 3, 3))
    pool: dict[str, Any] = {
        "FilterHeight": 2,
        "FilterWidth": 1,
        "StrideH": 2,
        "StrideW": 2,
    }
    file.operator("MAX_POOL_2D", [last], [y], "Pool2DOptions", **pool)
    proto = convert(file.serialised([x], [y]))
    kinds = Counter(node.op_type for node in proto.graph.node)
    # Of the input and of the output.
    assert kinds["Transpose"] == 2


def test_an_output_that_an_operator_reads_in_the_file_s_order() -> None:
    file = TfliteFile()
    x = file.tensor((1, 2, 3, 4), "int8", scale=0.1)
    image = file.tensor((1, 2, 3, 4), "int8", scale=0.1)
    file.operator("RELU", [x], [image])
    row = file.tensor((1, 24), "int8", scale=0.1)
    file.operator("RESHAPE", [image, file.constant([1, 24])], [row])
    given = np.linspace(-3, 3, 24, dtype=np.float32).reshape(1, 2, 3, 4)
    first, second = _answers(convert(file.serialised([x], [image, row])), [given])
    np.testing.assert_allclose(first, np.maximum(given, 0), atol=0.051)
    np.testing.assert_array_equal(second, first.reshape(1, 24))


def test_weights_of_float16_and_an_open_batch() -> None:
    file = TfliteFile()
    matrix = np.random.default_rng(0).normal(size=(3, 4)).astype(np.float16)
    x = file.tensor((1, 4), ShapeSignature=file.signature((-1, 4)))
    half = file.tensor((3, 4), "float16", matrix)
    w = file.tensor((3, 4))
    file.operator("DEQUANTIZE", [half], [w])
    y = file.tensor((1, 3), ShapeSignature=file.signature((-1, 3)))
    file.operator("FULLY_CONNECTED", [x, w], [y], "FullyConnectedOptions")
    given = np.ones((1, 4), np.float32)
    (got,) = _answers(convert(file.serialised([x], [y])), [given])
    np.testing.assert_allclose(got, given @ matrix.astype(np.float32).T, rtol=1e-6)


def test_sizes_that_the_file_computes_from_its_own_shapes() -> None:
    """As TensorFlow writes a flattening with an open batch: SHAPE, STRIDED_SLICE, PACK, RESHAPE."""
    file = TfliteFile()
    x = file.tensor((1, 2, 3, 4))
    shape, batch, sizes = (file.tensor(s, "int32") for s in ((4,), (), (2,)))
    file.operator("SHAPE", [x], [shape], "ShapeOptions", OutType=2)
    bounds = [file.constant([each]) for each in (0, 1, 1)]
    file.operator(
        "STRIDED_SLICE",
        [shape, *bounds],
        [batch],
        "StridedSliceOptions",
        ShrinkAxisMask=1,
    )
    count = file.constant(24)
    file.operator("PACK", [batch, count], [sizes], "PackOptions", ValuesCount=2)
    y = file.tensor((1, 24))
    file.operator("RESHAPE", [x, sizes], [y])
    given = np.arange(24, dtype=np.float32).reshape(1, 2, 3, 4)
    (got,) = _answers(convert(file.serialised([x], [y])), [given])
    np.testing.assert_array_equal(got, given.reshape(1, 24))


# What is refused.


def _row(change: Callable[[TfliteFile, int, int], Any]) -> bytes:
    """A file from [1, 4] to [1, 4] whose operators ``change`` adds."""
    file = TfliteFile()
    x, y = file.tensor((1, 4), name="in"), file.tensor((1, 4), name="out")
    change(file, x, y)
    return file.serialised([x], [y])


def _bad_type(file: TfliteFile, x: int, y: int) -> None:
    file.tensor((2,), "int16", scale=0.1)
    file.operator("ABS", [x], [y])


def _bad_half(file: TfliteFile, x: int, y: int) -> None:
    half = file.tensor((1, 4), "float16", name="half")
    file.operator("CAST", [x], [half], "CastOptions")
    file.operator("DEQUANTIZE", [half], [y])


def _bad_channels(file: TfliteFile, x: int, y: int) -> None:
    q = file.tensor((1, 4), "int8", scale=[0.1] * 4, axis=1, name="q")
    file.operator("QUANTIZE", [x], [q])
    file.operator("DEQUANTIZE", [q], [y])


def _bad_bytes(file: TfliteFile, x: int, y: int) -> None:
    w = file.tensor((1, 4), value=np.ones((1, 4)), Shape=file.signature((1, 5)))
    file.operator("ADD", [x, w], [y], "AddOptions")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda f, x, y: f.operator("CUSTOM", [x], [y], custom="Flex\nOp"), r"operator 0 \(CUSTOM Flex.Op\): is not read"),
        (lambda f, x, y: f.operator("WHILE", [x], [y]), r"operator 0 \(WHILE\): is not read; convert"),
        (lambda f, x, y: f.operator("ABS", [y], [y]), "tensor 1 'out': is read before"),
        (lambda f, x, y: f.operator("ABS", [x], [x]), "tensor 0 'in': is made twice"),
        (lambda f, x, y: f.operator("ABS", [9], [y]), "there is no tensor 9"),
        (lambda f, x, y: f.operator("ABS", [x], []), "has no output"),
        (lambda f, x, y: f.operator("ADD", [x, f.tensor((1, 3), value=np.ones((1, 3)))], [y], "AddOptions"), "contradict"),
        (lambda f, x, y: f.operator("CONCATENATION", [x, x], [y], "ConcatenationOptions", Axis=1), r"contradict its shapes"),
        (lambda f, x, y: f.operator("ADD", [x, x], [y], "AddOptions", FusedActivationFunction=5), "activation function 5"),
        (lambda f, x, y: f.operator("RESHAPE", [f.tensor((-1, 4)), x], [y]), r"\[-1, 4\]; convert with fixed sizes"),
        (lambda f, x, y: f.operator("ABS", [f.tensor((1, 4), IsVariable=True)], [y]), "is a variable"),
        (lambda f, x, y: f.operator("ABS", [f.tensor((1, 4), Buffer=77)], [y]), "no buffer 77"),
        (lambda f, x, y: f.operator("ABS", [f.tensor((1, 4), name="n" * 2000)], [y]), "a name of 2000 bytes"),
        (lambda f, x, y: f.operator("ABS", [f.tensor((1,) * 9)], [y]), "9 elements of Shape"),
        (lambda f, x, y: f.operator("ABS", [x] * 600, [y]), "600 elements of Inputs"),
        (_bad_half, "'half': has no stored values"),
        (_bad_type, "is INT16; float32, int8 and uint8"),
        (_bad_channels, "'q': has a scale for each channel"),
        (_bad_bytes, "16 bytes for a tensor of 20"),
    ],
)  # fmt: skip
def test_what_is_not_read_is_refused_in_one_line(
    tmp_path: Path, change: Callable[[TfliteFile, int, int], Any], words: str
) -> None:
    path = tmp_path / "net.tflite"
    path.write_bytes(_row(change))
    with pytest.raises(UserError, match=words) as refused:
        gate.load(path)
    assert str(refused.value).startswith(str(path))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("fields", "words"),
    [({"version": 2}, "version 2"), ({"subgraphs": 2}, "2 subgraphs")],
)
def test_another_version_and_several_subgraphs(
    fields: dict[str, int], words: str
) -> None:
    file = TfliteFile()
    x, y = file.tensor((1, 4)), file.tensor((1, 4))
    file.operator("ABS", [x], [y])
    with pytest.raises(Unfit, match=words):
        convert(file.serialised([x], [y], **fields))


def test_hostile_files_are_read_or_refused_in_one_line() -> None:
    whole = [network(), network(False, "uint8"), float_file(CASES[0])]
    dice, outcomes = random.Random(4), Counter[str]()
    for number in range(1200):
        data = bytearray(dice.choice(whole))
        if number % 4 == 0:
            del data[dice.randrange(len(data)) :]
        for _ in range(dice.choice((0, 1, 2, 8)) if data else 0):
            at = dice.randrange(len(data))
            data[at] = dice.choice((0, 1, 127, 128, 255, dice.randrange(256)))
        try:
            gate.check(convert(bytes(data)), IDENTITY)
            outcomes["read"] += 1
        except (Unfit, UserError) as error:
            assert "\n" not in str(error)
            outcomes["refused"] += 1
    assert min(outcomes["read"], outcomes["refused"]) > 100


# The whole way.


def test_the_gate_goes_by_the_identifier_and_keeps_the_file_s_identity(
    tmp_path: Path,
) -> None:
    path = tmp_path / "net.bin"
    path.write_bytes(network())
    model = gate.load(path)
    assert (model.identity.name, model.inputs[0].layout) == ("net.bin", "NHWC")
    assert model.inputs[0].shape == (1, 8, 8, 3)
    assert model.outputs[0].name == "scores"


def test_an_input_of_another_type_is_refused_by_the_gate(tmp_path: Path) -> None:
    file = TfliteFile()
    x, y = file.tensor((1, 2, 2, 3), "int32"), file.tensor((1, 2, 2, 3))
    file.operator("CAST", [x], [y], "CastOptions")
    path = tmp_path / "net.tflite"
    path.write_bytes(file.serialised([x], [y]))
    with pytest.raises(UserError, match="input 't0' is int32, need float32"):
        gate.load(path)


def pooled_image(scale: float, zero: int) -> bytes:
    file = TfliteFile()
    x = file.tensor((1, 6, 4, 3), "int8", scale=scale, zero=zero)
    y = file.tensor((1, 3, 2, 3), "int8", scale=scale, zero=zero)
    fields: dict[str, Any] = {
        "FilterHeight": 2,
        "FilterWidth": 2,
        "StrideH": 2,
        "StrideW": 2,
    }
    file.operator("MAX_POOL_2D", [x], [y], "Pool2DOptions", **fields)
    return file.serialised([x], [y])


@pytest.mark.parametrize(
    ("scale", "zero"), [(1 / 255, -128), (1 / 127.5, -1), (1.0, -128)]
)
def test_pixels_are_the_stored_values_of_a_quantised_image(
    tmp_path: Path, scale: float, zero: int
) -> None:
    path = tmp_path / "net.tflite"
    path.write_bytes(pooled_image(scale, zero))
    source = sources.find(str(path), {}, None, lambda line: None)
    resolved, _ = resolve_preprocessing(
        Overrides(), source.preprocessing, source.model.inputs
    )
    assert resolved is not None and resolved.crop == (6, 4)
    for pixel in (0, 1, 128, 255):
        real = (pixel - 128 - zero) * np.float32(scale)
        assert resolved.normalised(pixel)[0] == pytest.approx(real, abs=1e-6)
    assert resolved.formula() in source.note
    given = Overrides(scale=1.0, mean=(0.0,), std=(2.0,))
    resolved, _ = resolve_preprocessing(
        given, source.preprocessing, source.model.inputs
    )
    assert resolved is not None and set(resolved.normalised(8)) == {4.0}


@pytest.mark.parametrize("task", [(), ("--task", "segment"), ("--fit", "crop")])
def test_how_an_image_becomes_the_input_is_said_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], task: tuple[str, ...]
) -> None:
    path, out = tmp_path / "net.tflite", tmp_path / "out"
    path.write_bytes(pooled_image(1 / 255, -128))
    c = ("--model", str(path), "--target", "c99", "--output", str(out))
    assert build.main([*c, *task]) == 0
    fit = open_bundle(out).manifest.preprocessing
    said = capsys.readouterr().err
    assert fit and said.count(fit.geometry()) == 1


def test_operators_of_one_name_are_named_once_with_their_number() -> None:
    named = named_once(["resize", "softmax", "resize", "resize"])
    assert named == ["'resize' (3 operators)", "'softmax'"]


@pytest.mark.parametrize("target", ["native", "cortex-m7"])
def test_a_build_of_a_small_network(
    tmp_path: Path, built: Callable[..., Path], target: str
) -> None:
    path = tmp_path / "net.tflite"
    path.write_bytes(network(pooled=False))
    manifest = open_bundle(built(path, target)).manifest
    assert manifest.model.name == "net.tflite"
    assert manifest.inputs[0].layout == "NHWC"
    assert manifest.measured["verification"]["max_abs_error"] == 0
    assert "in float32" not in manifest.lowering.reason


@pytest.mark.parametrize(
    "name",
    [
        *("tiny/ic_resnet8", "tiny/kws_dscnn", "tiny/vww_96", "models/mobilenetv2"),
        "detect/deeplabv3_mnv2_dm05_pascal_uint8",
    ],
)
def test_a_real_network_becomes_integers(name: str) -> None:
    paths = [SHARED / f"{name}{end}.tflite" for end in ("_int8", "")]
    found = [path for path in paths if path.exists()]
    if not found:
        pytest.skip(f"{NOT_RUN}: no {name}.tflite below NETSHIP_SHARED")
    proto = convert(found[0].read_bytes())
    kinds = Counter(node.op_type for node in proto.graph.node)
    assert kinds["Transpose"] == 1
    graph = passes.read(proto, passes.INTEGERS)
    islands = {each.kind for each in graph.operators if not each.output.quantisation}
    if "_int8" in found[0].name:
        assert islands == {"DequantizeLinear", "Softmax"}
