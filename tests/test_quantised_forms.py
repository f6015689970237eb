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
from onnx import compose

from bundle.manifest import ModelIdentity
from compile import passes
from compile.frontend.gate import check
from compile.frontend.model import Model
from compile.frontend.quantised.operators import quantises
from compile.frontend.reference import with_outputs
from compile.ir import evaluate
from targets.onnx_runtime import Session


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
# Convolutions and matrix products of these ONNX Runtime computes in float32.
IN_FLOAT32 = ("weights of 4 bits", "weights of 4 bits without sign")


# From the average pool on, which computes in float32 here.
FROM_THE_MEAN = ("mean", "pool", "flat", "scores")
BUILT = (
    *("QOperator QUInt8 QUInt8 per tensor", "QOperator QInt8 QInt8 per channel"),
    *("weights around another number, QDQ", "weights of 4 bits without sign"),
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
    return quantise(network(), *FORMS[name])


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


def together(names: list[str]) -> onnx.ModelProto:
    """A network of these forms, of one image, with an output for each."""
    whole = onnx.ModelProto()
    whole.CopyFrom(written(names[0]))
    for index, name in enumerate(names[1:]):
        part = compose.add_prefix(written(name), f"{index}/", rename_inputs=False)
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


def built(proto: onnx.ModelProto, target: str, folder: Path) -> dict[str, Any]:
    onnx.save(proto, folder / "network.onnx")
    options = ("--model", folder / "network.onnx", "--target", target, "--json")
    said = succeed("compile.build", *options, "--output", folder / "built")
    checked: dict[str, Any] = json.loads(said)["verification"]
    return checked


@pytest.mark.slow
def test_every_form_is_built(tmp_path: Path) -> None:
    assert built(together(list(BUILT)), "native", tmp_path)["relative_error"] < 1e-6


@pytest.mark.slow
def test_operators_on_integers_become_c(tmp_path: Path) -> None:
    proto = quantise(residuals(), *FORMS["QOperator QInt8 QInt8 per channel"])
    assert built(proto, "cortex-m7", tmp_path)["relative_error"] < 1e-6
