"""The forms in which quantised models are written: operators on integers, QDQ of several types, zero points of weights."""

from __future__ import annotations

import json
from functools import cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
from conftest import succeed
from integers import SAME, patterns, residuals
from integers import Graph as Writer
from onnx import TensorProto, compose
from quantised_rows import FLOAT_OUTPUTS, ROWS, STEP, Row

from netship.bundle.manifest import ModelIdentity
from netship.compile import passes
from netship.compile.frontend.gate import check
from netship.compile.frontend.model import Model
from netship.compile.frontend.quantised.operators import quantises
from netship.compile.frontend.reference import Reference, with_outputs
from netship.compile.ir import evaluate
from netship.compile.quantize.answer import output_steps
from netship.targets.errors import UserError
from netship.targets.onnx_runtime import Session


def network() -> onnx.ModelProto:
    """What people quantise: convolutions, a depthwise one, a residual, pools, a gate, a concatenation, a classifier."""
    w = Writer(3, 12)
    stem = w.convolution("stem", "image", 3, 8, 3, 2, SAME)
    x = w.node("Add", "sum", [w.residual("block", stem, 8, 16, 8), stem])
    x = w.node("MaxPool", "largest", [x], kernel_shape=[2, 2], strides=[2, 2])
    gate = w.convolution("squeeze", x, 8, 8, clip=False)
    x = w.node("Mul", "gated", [x, w.node("Sigmoid", "gate", [gate])])
    y = w.convolution("left", x, 8, 6, clip=False)
    x = w.node("Concat", "joined", [x, w.node("LeakyRelu", "leaky", [y])], axis=1)
    x = w.node("AveragePool", "mean", [x], kernel_shape=[2, 2], strides=[1, 1])
    w.classifier(x, 14, 5)
    w.node("Softmax", "probabilities", ["scores"], axis=1)
    return w.finish((1, 5))


# Format, activations, weights, a scale for each channel; what else the quantiser is asked for.
FORMS: dict[str, tuple[tuple[str, str, str, bool], dict[str, bool]]] = {
    **{
        f"{form} {activations} {weights} {'per channel' if each else 'per tensor'}": (
            (form, activations, weights, each),
            {},
        )
        for form in ("QOperator", "QDQ")
        for activations, weights in (
            *(("QUInt8", "QUInt8"), ("QUInt8", "QInt8")),
            ("QInt8", "QInt8"),
        )
        for each in (False, True)
    },
    "weights around another number": (
        ("QOperator", "QUInt8", "QInt8", True),
        {"WeightSymmetric": False},
    ),
    "weights around another number, QDQ": (
        ("QDQ", "QUInt8", "QInt8", True),
        {"WeightSymmetric": False},
    ),
    "activations around 0": (
        ("QDQ", "QInt8", "QInt8", False),
        {"ActivationSymmetric": True},
    ),
    "weights of 4 bits": (("QDQ", "QUInt8", "QInt4", True), {}),
    "weights of 4 bits without sign": (("QDQ", "QUInt8", "QUInt4", True), {}),
    "ONNX Runtime's QDQ": (
        ("QDQ", "QUInt8", "QInt8", True),
        {"UseQDQContribOps": True},
    ),
}
WIDE: dict[str, tuple[tuple[str, str, str, bool], dict[str, bool]]] = {
    "activations of 16 bits": (("QDQ", "QInt16", "QInt8", True), {}),
    "activations of 16 bits without sign": (("QDQ", "QUInt16", "QUInt8", False), {}),
    "activations of 16 bits, ONNX Runtime's QDQ": (
        ("QDQ", "QInt16", "QInt8", True),
        {"UseQDQContribOps": True},
    ),
}
# Convolutions and matrix products of these ONNX Runtime computes in float32.
IN_FLOAT32 = ("weights of 4 bits", "weights of 4 bits without sign")


# From the average pool on, which computes in float32 here.
FROM_THE_MEAN = ("mean", "pool", "flat", "scores")
# What needs a kernel of its own, or a new order of values.
BUILT = (
    *("depthwise_weights_far_from_their_zero", "grouped_weights_far_from_their_zero"),
    *("a_matrix_far_from_its_zero", "stored_values_are_moved"),
    *("a_type_that_an_attribute_says", "weights_in_blocks_of_4_bits"),
)


def quantise(
    proto: onnx.ModelProto,
    form: tuple[str, str, str, bool],
    extra: dict[str, bool],
) -> onnx.ModelProto:
    """The network quantised by ONNX Runtime on seeded patterns."""
    from onnxruntime import quantization

    kind, activations, weights, per_channel = form
    proto = onnx.version_converter.convert_version(proto, 21)
    proto.ir_version = 10
    feeds = iter([{"image": each} for each in patterns(proto, 8)])
    with TemporaryDirectory() as scratch:
        source, result = Path(scratch) / "float.onnx", Path(scratch) / "integers.onnx"
        onnx.save(proto, source)
        quantization.quantize_static(
            source,
            result,
            SimpleNamespace(get_next=partial(next, feeds, None)),
            quant_format=quantization.QuantFormat[kind],
            per_channel=per_channel,
            activation_type=quantization.QuantType[activations],
            weight_type=quantization.QuantType[weights],
            extra_options=extra,
        )
        return onnx.load(result)


@cache
def written(name: str) -> onnx.ModelProto:
    return quantise(network(), *(FORMS | WIDE)[name])


def gated(proto: onnx.ModelProto) -> Model:
    return check(proto, ModelIdentity(name="small.onnx", sha256="0" * 64))


def stored(proto: onnx.ModelProto) -> list[str]:
    """The quantised tensors, but for what ONNX Runtime's Softmax makes of integers."""
    made = [
        *(node.output[0] for node in proto.graph.node if quantises(node)),
        *(
            each
            for node in proto.graph.node
            for each in node.output
            if each.endswith("_quantized")
        ),
    ]
    return [each for each in dict.fromkeys(made) if "probabilities" not in each]


@pytest.mark.parametrize("name", FORMS)
def test_every_quantised_tensor_is_that_of_onnx_runtime(name: str) -> None:
    model = gated(written(name))
    graph = passes.read(model.proto, passes.INTEGERS)
    names = stored(model.proto)
    data = with_outputs(model.proto, names).SerializeToString()
    session = Session(data, "small.onnx")
    for image in patterns(written(name), 3):
        found = evaluate.evaluate(graph, {"image": image})
        answers = session.run(names, {"image": image})
        compared = 0
        for each, answer in zip(names, answers, strict=True):
            if each in found and graph.tensors[each].quantisation:
                off = np.abs(found[each].astype(int) - answer.astype(int)).max()
                rounded = name in IN_FLOAT32 or each.startswith(FROM_THE_MEAN)
                assert off <= rounded, each
                compared += 1
        assert compared > 10


@pytest.mark.parametrize("name", WIDE)
def test_activations_of_16_bits_are_near_onnx_runtime(name: str) -> None:
    """Both compute in float32, and may round a value to another step."""
    model = gated(written(name))
    graph = passes.read(model.proto, passes.INTEGERS)
    (step,) = output_steps(graph, [patterns(written(name), 1)])
    assert 2**-13 < step < 2**-11
    for image in patterns(written(name), 3):
        (found,), (answer,) = evaluate.run(graph, image), Reference(model).run(image)
        assert np.abs(found - answer).max() < 2.5 * step


def off(proto: onnx.ModelProto) -> float:
    """How far the integers' answers are from ONNX Runtime's."""
    model = gated(proto)
    graph = passes.read(model.proto, passes.INTEGERS)
    reference, random, errors = Reference(model), np.random.default_rng(0), []
    for _ in range(4):
        image = random.uniform(-3, 3, model.inputs[0].shape).astype(np.float32)
        (found,), (answer,) = evaluate.run(graph, image), reference.run(image)
        assert np.ptp(answer) > 1
        errors.append(float(np.abs(found - answer).max()))
    return max(errors)


@pytest.mark.parametrize("name", ROWS)
def test_a_form_that_is_written_by_hand(name: str) -> None:
    allowed = {"constant_operands": 1.1 * STEP} | dict.fromkeys(FLOAT_OUTPUTS, 1e-4)
    assert off(ROWS[name]().model()) < allowed.get(name, 1e-6)


def test_scales_for_channels_before_opset_13() -> None:
    r = Row(opset=12)
    scales, zeros = r.scales(5), np.zeros(5, np.int8)
    r.convolution(r.integers(5, 4, 3, 3), scales, zeros)
    assert off(r.model()) < 1e-6


def test_weights_far_from_their_zero_are_integers() -> None:
    """Each channel is read as often as its weights need."""
    model = gated(ROWS["weights_of_255"]().model())
    graph = passes.read(model.proto, passes.INTEGERS)
    (operator,) = (each for each in graph.operators if each.kind == "Conv")
    assert operator.inputs[1] and operator.inputs[1].shape == (2, 12, 1, 1)


def refused(proto: onnx.ModelProto) -> str:
    with pytest.raises(UserError) as error:
        passes.read(gated(proto).proto, passes.INTEGERS)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_what_is_refused_says_what_to_do() -> None:
    r = Row()
    dynamic = r.node("MatMulInteger", r.flat(), r.integers(144, 7))
    r.node("Cast", dynamic, to=TensorProto.FLOAT)
    assert "MatMulInteger" in refused(r.model())
    assert "quantize_static" in refused(r.model())
    r = Row()
    r.own("QuantizeBFP", "image", bfp_type=0)
    assert "QuantizeBFP" in refused(r.model())
    r = Row()
    facts = (r.image, r.scale, r.zero, STEP, r.zero)
    r.dequantised(r.own("QLinearGlobalAveragePool", *facts, channels_last=1))
    assert "channels are last" in refused(r.model())
    r = Row()
    far: dict[str, Any] = {"axis": 0, "block_size": 1 << 40}
    weights = r.node("DequantizeLinear", r.integers(144, 7), r.scales(9, 7), **far)
    r.quantised(r.node("MatMul", r.flat_real(), weights))
    assert "do not fit" in refused(r.model())
    r = Row()
    r.convolution(r.integers(1, 4, 3, 3), r.scales(5), np.zeros(5, np.int8))
    assert "do not fit" in refused(r.model())
    r = Row()
    scale = r.node("ReduceMax", "image", keepdims=0)
    stored = r.integers(5, 4, 3, 3)
    r.convolution(stored, scale, np.int8(0))
    assert "computed" in refused(r.model())


def together(*networks: onnx.ModelProto) -> onnx.ModelProto:
    """One network of these, of one image, with an output for each."""
    whole = onnx.ModelProto()
    whole.CopyFrom(networks[0])
    for index, each in enumerate(networks[1:]):
        part = compose.add_prefix(each, f"{index}/", rename_inputs=False)
        for node in part.graph.node:
            node.input[:] = [
                "image" if each == f"{index}/image" else each for each in node.input
            ]
        whole.graph.node.extend(part.graph.node)
        whole.graph.initializer.extend(part.graph.initializer)
        whole.graph.output.extend(part.graph.output)
        known = {each.domain for each in whole.opset_import}
        whole.opset_import.extend(
            each for each in part.opset_import if each.domain not in known
        )
    del whole.graph.value_info[:]
    return whole


def built(proto: onnx.ModelProto, *target: str, folder: Path) -> dict[str, Any]:
    onnx.save(proto, folder / "network.onnx")
    options = ("--model", folder / "network.onnx", "--target", *target, "--json")
    said = succeed("compile.build", *options, "--output", folder / "built")
    checked: dict[str, Any] = json.loads(said)["verification"]
    return checked


@pytest.mark.slow
def test_forms_that_are_written_by_hand_are_built(tmp_path: Path) -> None:
    proto = together(*(ROWS[name]().model() for name in BUILT))
    assert built(proto, "native", folder=tmp_path)["relative_error"] < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", [("cortex-m7",), ("native", "--format", "standalone")]
)
def test_operators_on_integers_are_built(
    options: tuple[str, ...], tmp_path: Path
) -> None:
    proto = quantise(residuals(), *FORMS["QOperator QInt8 QInt8 per channel"])
    assert built(proto, *options, folder=tmp_path)["relative_error"] < 1e-6
