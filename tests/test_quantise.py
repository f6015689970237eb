"""int8: quantised, integer-only, small, and what ONNX Runtime answers on the same QDQ graph."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from conftest import run, succeed
from integers import blocks, oddities, patterns, quantised, residuals, tensors
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from bundle.manifest import ModelIdentity
from bundle.store import open_bundle
from compile.frontend import gate
from compile.ir import evaluate, graph
from compile.ir.graph import Add, AveragePool, Convolution
from compile.passes import channels
from compile.quantize import quantise
from targets.errors import UserError
from targets.progress import Progress

IDENTITY = ModelIdentity(name="small.onnx", sha256="0" * 64)
NETWORKS = {
    "residuals": residuals,
    "oddities": oddities,
    "blocks": blocks,
    "signed residuals": residuals,
    "signed oddities": oddities,
}


@pytest.fixture(scope="module")
def graphs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, onnx.ModelProto]:
    """QDQ graphs of small networks, activations uint8 and (``signed``) int8."""
    folder = tmp_path_factory.mktemp("graphs")
    return {
        name: quantised(network(), folder, unsigned=not name.startswith("signed"))
        for name, network in NETWORKS.items()
    }


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight smooth images and one that is broken."""
    folder = tmp_path_factory.mktemp("images")
    for index, pattern in enumerate(patterns(residuals(), 8)):
        pixels = np.rint((pattern[0].transpose(1, 2, 0) + 1) * 127.5).astype(np.uint8)
        Image.fromarray(pixels).resize((40, 30)).save(folder / f"{index}.png")
    (folder / "broken.png").write_bytes(b"\x89PNG nothing more")
    return folder


@pytest.fixture(scope="module")
def bundle(
    tmp_path_factory: pytest.TempPathFactory, images: Path
) -> tuple[Path, Path, str]:
    """A network quantised and built: its ONNX, its bundle, and what the build printed."""
    folder = tmp_path_factory.mktemp("int8")
    onnx.save(residuals(), folder / "small.onnx")
    options = ("--model", folder / "small.onnx", "--output", folder / "bundle")
    result = run(
        "compile.build", *options, "--quantize", "int8", "--calibration", images
    )
    assert result.returncode == 0, result.stderr
    return folder / "small.onnx", folder / "bundle", result.stdout + result.stderr


def onnx_runtime_tensors(
    proto: onnx.ModelProto, network: graph.Network, image: Any
) -> dict[str, evaluate.Integers]:
    """Every integer tensor as ONNX Runtime has it, [H, W, C], uint8 128 lower."""
    import onnxruntime

    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    readers = {n.input[0]: n for n in proto.graph.node if n.op_type == "QuantizeLinear"}
    clamped = {n.input[0]: n.output[0] for n in proto.graph.node if n.op_type == "Relu"}
    made = {n.name: clamped.get(n.output[0], n.output[0]) for n in proto.graph.node}
    wanted = [network.input.name, *(o.output.name for o in network.operators)]
    names = [readers[made.get(name, name)].output[0] for name in wanted]
    offset = network.input.quantisation.offset
    dtype = TensorProto.UINT8 if offset else TensorProto.INT8
    copy.graph.output.extend(
        helper.make_tensor_value_info(n, dtype, None) for n in names
    )
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.qdqisint8allowed", "1")
    session = onnxruntime.InferenceSession(
        copy.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    found = session.run(names, {"image": image})
    return {
        name: (a[0].transpose(1, 2, 0) if a.ndim == 4 else a[np.newaxis]).astype(int)
        - offset
        for name, a in zip(wanted, found, strict=True)
    }


@pytest.mark.parametrize("kind", [Convolution, Add, AveragePool])
@pytest.mark.parametrize("name", NETWORKS)
def test_every_operator_alone_is_onnx_runtimes(
    graphs: dict[str, onnx.ModelProto], name: str, kind: type
) -> None:
    network = graph.read(graphs[name])
    operators = [o for o in network.operators if isinstance(o, kind)]
    assert operators
    for image in patterns(graphs[name], 3):
        values = onnx_runtime_tensors(graphs[name], network, image)
        assert (evaluate.quantise(network, image) == values["image"]).all()
        for operator in operators:
            ours = evaluate.apply(operator, values)
            theirs = values[operator.output.name].reshape(ours.shape)
            assert (ours == theirs).all(), operator.name


@pytest.mark.parametrize("name", NETWORKS)
def test_filled_blocks_change_no_answer(
    graphs: dict[str, onnx.ModelProto], name: str
) -> None:
    network = graph.read(graphs[name])
    filled = channels.fill_blocks(network, 16)
    convolutions = [o for o in filled.operators if isinstance(o, Convolution)]
    assert all(o.output.shape[2] % 16 == 0 for o in convolutions if not o.depthwise)
    (image,) = patterns(graphs[name], 1)
    plain = evaluate.evaluate(network, evaluate.quantise(network, image))
    values = evaluate.evaluate(filled, evaluate.quantise(filled, image))
    for made in plain:
        count = plain[made].shape[2]
        assert (values[made][..., :count] == plain[made]).all(), made


def test_a_classifier_that_reads_pixels_is_filled_pixel_by_pixel() -> None:
    random = np.random.default_rng(0)
    facts = graph.Quantisation(0.5, 3)
    image = graph.Tensor("image", (2, 3, 4), facts)
    made = graph.Tensor("made", (2, 3, 5), facts)
    row = graph.Tensor("made", (1, 1, 30), facts)
    scores = graph.Tensor("scores", (1, 1, 7), graph.Quantisation(9.0, -5))
    first, last = (
        Convolution(
            output.name,
            source,
            output,
            random.integers(-128, 128, (output.shape[2], 1, 1, source.shape[2])).astype(
                np.int8
            ),
            random.integers(-99, 99, output.shape[2]),
            np.full(output.shape[2], 0.1),
        )
        for source, output in ((image, made), (row, scores))
    )
    network = graph.Network(image, scores, (first, last))
    values = random.integers(-128, 128, image.shape)
    plain = evaluate.evaluate(network, values)
    filled = evaluate.evaluate(channels.fill_blocks(network, 16), values)
    assert len(np.unique(plain["scores"])) > 3
    assert (filled["scores"][..., :7] == plain["scores"]).all()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["oddities", "blocks", "signed residuals"])
def test_a_qdq_model_is_built_as_it_is_and_gives_its_integers(
    graphs: dict[str, onnx.ModelProto], name: str, tmp_path: Path
) -> None:
    onnx.save(graphs[name], tmp_path / "given.onnx")
    options = ("--model", tmp_path / "given.onnx", "--output", tmp_path / "bundle")
    built = json.loads(succeed("compile.build", *options, "--json"))
    assert built["verification"]["max_abs_error"] == 0
    manifest = open_bundle(tmp_path / "bundle").manifest
    assert manifest.lowering.float_operators == 0
    assert manifest.quantisation is not None
    assert manifest.quantisation.method == "given"


@pytest.mark.slow
def test_a_float_model_is_quantised_built_and_compared_with_both(
    bundle: tuple[Path, Path, str], images: Path
) -> None:
    model, path, said = bundle
    opened = open_bundle(path)
    facts = opened.manifest.quantisation
    assert facts is not None
    assert len(facts.images) == 8
    assert facts.skipped == 1
    assert "broken.png" in said
    assert "0 float operators inside" in said
    assert facts.model not in opened.manifest.files
    assert (path / facts.model).is_file()
    assert opened.manifest.measured["verification"]["max_abs_error"] == 0
    photos = [images / f"{index}.png" for index in range(3)]
    checked = json.loads(
        succeed(
            "runtime_demo.check",
            path,
            "--model",
            model,
            "--images",
            *photos,
            "--repeat",
            1,
            "--json",
        )
    )
    assert checked["passed"]
    assert (
        checked["vs_quantised"]["steps"] <= checked["vs_quantised"]["tolerance_steps"]
    )
    assert checked["vs_float"]["cosine"] > 0.99
    assert checked["reference_latency_ms"]


@pytest.mark.slow
def test_a_changed_reference_is_refused(
    bundle: tuple[Path, Path, str], images: Path, tmp_path: Path
) -> None:
    model, path, _ = bundle
    shutil.copytree(path, tmp_path / "bundle")
    (tmp_path / "bundle/reference/quantised.onnx").write_bytes(b"something else")
    result = run("runtime_demo.check", tmp_path / "bundle", "--model", model)
    assert result.returncode == 2
    assert "quantised.onnx: missing or changed" in result.stderr


def given(proto: onnx.ModelProto, *options: Any, trained: bool = True) -> Any:
    """What a build would make of a model in memory."""
    model = gate.check(proto, IDENTITY)
    _, preprocessing = tensors(proto)
    wanted, calibration = options or (False, ())
    return quantise.prepare(
        model,
        wanted,
        calibration,
        preprocessing,
        unsigned=True,
        trained=trained,
        progress=Progress(quiet=True),
    )


def edited(proto: onnx.ModelProto, edit: Callable[[onnx.GraphProto], None]) -> Any:
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    edit(copy.graph)
    return copy


def set_constant(found: onnx.GraphProto, name: str, value: Any) -> None:
    (tensor,) = (t for t in found.initializer if t.name == name)
    tensor.CopyFrom(numpy_helper.from_array(value, name))


def unsigned_weights(found: onnx.GraphProto, zero: int) -> None:
    """The stem's weights as uint8, one scale for all."""
    (reader,) = (n for n in found.node if "stem.weight" in n.output[0])
    shape = next(t.dims for t in found.initializer if t.name == reader.input[0])
    values = np.random.default_rng(0).integers(0, 256, tuple(shape), np.uint8)
    set_constant(found, reader.input[0], values)
    set_constant(found, reader.input[1], np.float32(0.01))
    set_constant(found, reader.input[2], np.uint8(zero))
    del reader.attribute[:]
    # As ONNX Runtime's operator takes it, the bias is in units of input scale × weight scale.
    (image,) = (t for t in found.initializer if t.name == "image_scale")
    unit = numpy_helper.to_array(image) * np.float32(0.01)
    set_constant(found, "stem.bias_quantized_scale", np.full(shape[0], unit))


def float_islands(found: onnx.GraphProto) -> None:
    """Two convolutions are given what the operator before makes, not quantised."""
    for maker, reader in (("b.add", "c.expand"), ("c.project", "head")):
        (node,) = (n for n in found.node if n.name == reader)
        node.input[0] = next(n.output[0] for n in found.node if n.name == maker)


def constant_activation(found: onnx.GraphProto) -> None:
    node = next(n for n in found.node if n.op_type == "QuantizeLinear")
    set_constant(found, node.input[1], np.float32(0))


def wide_activation(found: onnx.GraphProto) -> None:
    node = next(n for n in found.node if n.op_type == "QuantizeLinear")
    set_constant(found, node.input[2], np.int16(0))


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (lambda g: unsigned_weights(g, 100), "weights have a zero point"),
        (float_islands, "'c.expand' .*float32, and so do 'head';"),
        (constant_activation, "scale 0"),
        (wide_activation, "int16"),
    ],
    ids=["asymmetric weights", "float islands", "a constant activation", "int16"],
)
def test_a_qdq_graph_that_is_not_built_is_refused_by_name(
    graphs: dict[str, onnx.ModelProto], edit: Any, said: str
) -> None:
    with pytest.raises(UserError, match=said) as refused:
        given(edited(graphs["residuals"], edit))
    assert "\n" not in str(refused.value)


def test_unsigned_weights_around_128_are_symmetric(
    graphs: dict[str, onnx.ModelProto],
) -> None:
    proto = edited(graphs["residuals"], lambda g: unsigned_weights(g, 128))
    network = given(proto).network
    (image,) = patterns(proto, 1)
    values = onnx_runtime_tensors(proto, network, image)
    stem = network.operators[0]
    ours = evaluate.apply(stem, values)
    assert (ours == values[stem.output.name]).all()


def test_what_int8_loses_is_refused_unless_the_weights_mean_nothing(
    monkeypatch: pytest.MonkeyPatch, images: Path
) -> None:
    monkeypatch.setattr(quantise, "INT8_COSINE", 1.1)
    proto = residuals()
    with pytest.raises(UserError, match="int8 loses too much: .*most at .*dB.*: calib"):
        given(proto, True, (images,))
    assert given(proto, True, (images,), trained=False) is not None


def test_options_that_do_not_fit_are_refused_in_one_line(
    graphs: dict[str, onnx.ModelProto], tmp_path: Path
) -> None:
    (tmp_path / "broken.png").write_bytes(b"nothing")
    (tmp_path / "empty").mkdir()
    for proto, options, said in (
        (graphs["residuals"], (True, (tmp_path,)), "already is quantised"),
        (residuals(), (True, ()), "needs --calibration PHOTOS"),
        (residuals(), (False, (tmp_path,)), "goes with --quantize"),
        (residuals(), (True, (tmp_path / "absent",)), "no such file or folder"),
        (residuals(), (True, (tmp_path / "empty",)), "empty: no images in it"),
        (residuals(), (True, (tmp_path,)), "none of 1 files is an image"),
    ):
        with pytest.raises(UserError, match=said):
            given(proto, *options)


def test_the_layer_that_lost_most_is_named() -> None:
    model = gate.check(residuals(), IDENTITY)
    images = patterns(residuals(), 2)
    calibrated = quantise.quantise(model, images, True, lambda stage: None)
    scale = next(
        n.input[1]
        for n in calibrated.model.proto.graph.node
        if n.op_type == "QuantizeLinear" and n.input[0] == "b.expand.relu6"
    )
    for tensor in calibrated.model.proto.graph.initializer:
        if tensor.name == scale:
            tensor.CopyFrom(numpy_helper.from_array(np.asarray(3, np.float32), scale))
    layer, decibels = quantise.worst_layer(calibrated, images[0])
    assert "b.expand" in layer
    assert decibels < 15
