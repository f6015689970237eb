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
from integers import blocks, graph_of, oddities, patterns, quantised, residuals, tensors
from onnx import helper, numpy_helper
from PIL import Image

from netship.bundle.manifest import ModelIdentity
from netship.bundle.store import open_bundle
from netship.compile import passes
from netship.compile.frontend import gate
from netship.compile.ir import evaluate
from netship.compile.ir.graph import Array, Graph, Operator, Quantisation, Tensor
from netship.compile.ir.kinds import make
from netship.compile.ir.operators import Addition, Convolution, GlobalAverage
from netship.compile.passes.channels import BLOCK, fill_blocks
from netship.compile.passes.storage import store_as_uint8
from netship.compile.quantize import agreement, calibrate, judge, loss
from netship.compile.quantize import prepare as quantise
from netship.targets.errors import UserError
from netship.targets.progress import Progress

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


def write_images(folder: Path) -> None:
    """Eight smooth images and one that is broken."""
    for index, pattern in enumerate(patterns(residuals(), 8)):
        pixels = np.rint((pattern[0].transpose(1, 2, 0) + 1) * 127.5).astype(np.uint8)
        Image.fromarray(pixels).resize((40, 30)).save(folder / f"{index}.png")
    (folder / "broken.png").write_bytes(b"\x89PNG nothing more")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    write_images(folder)
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
    proto: onnx.ModelProto, graph: Graph, image: Any
) -> dict[str, Array]:
    """Every tensor that is an output of a QuantizeLinear as ONNX Runtime has it."""
    import onnxruntime

    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    names = [
        node.output[0]
        for node in proto.graph.node
        if node.op_type == "QuantizeLinear" and node.output[0] in graph.tensors
    ]
    copy.graph.output.extend(
        helper.make_tensor_value_info(
            name,
            helper.np_dtype_to_tensor_dtype(np.dtype(graph.tensors[name].dtype)),
            None,
        )
        for name in names
    )
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.qdqisint8allowed", "1")
    session = onnxruntime.InferenceSession(
        copy.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    found = session.run(names, {"image": image})
    return {"image": image, **dict(zip(names, found, strict=True))}


@pytest.mark.parametrize("kind", [Convolution, Addition, GlobalAverage])
@pytest.mark.parametrize("name", NETWORKS)
def test_every_operator_alone_is_onnx_runtimes(
    graphs: dict[str, onnx.ModelProto], name: str, kind: type
) -> None:
    graph = graph_of(graphs[name])
    operators = [each for each in graph.operators if isinstance(each, kind)]
    assert operators
    for image in patterns(graphs[name], 3):
        values = onnx_runtime_tensors(graphs[name], graph, image)
        first = graph.operators[0]
        assert (
            evaluate.apply(first, values)[first.output.name]
            == values[first.output.name]
        ).all()
        # What lies between two views has no name in the model.
        for operator in operators:
            source = _whole(graph, operator.input, values)
            ours = evaluate.apply(operator, values | {operator.input.name: source})
            theirs = _whole(graph, operator.output, values)
            assert (ours[operator.output.name] == theirs).all(), operator.label


def _whole(graph: Graph, tensor: Tensor, values: dict[str, Array]) -> Array:
    """A tensor's values as ONNX Runtime has them, or those of the tensor that it is a view of."""
    if tensor.name in values:
        return values[tensor.name]
    maker = graph.makers.get(tensor.name)
    if maker is not None and maker.input.name in values and maker.kind == "Reshape":
        return values[maker.input.name].reshape(tensor.shape)
    view = graph.only_reader(tensor)
    assert view is not None and view.kind == "Reshape"
    return _whole(graph, view.output, values).reshape(tensor.shape)


@pytest.mark.parametrize("name", NETWORKS)
def test_filled_blocks_change_no_answer(
    graphs: dict[str, onnx.ModelProto], name: str
) -> None:
    graph = store_as_uint8(graph_of(graphs[name]))
    filled = fill_blocks(graph)
    convolutions = [o for o in filled.operators if isinstance(o, Convolution)]
    assert all(o.output.shape[1] % BLOCK == 0 for o in convolutions if not o.depthwise)
    (image,) = patterns(graphs[name], 1)
    plain = evaluate.evaluate(graph, {"image": image})
    values = evaluate.evaluate(filled, {"image": image})
    for made, expected in plain.items():
        if expected.ndim == 4:
            assert (values[made][:, : expected.shape[1]] == expected).all(), made


def test_a_classifier_that_reads_pixels_is_filled_behind_its_channels() -> None:
    random = np.random.default_rng(0)
    facts = Quantisation((0.5,), (3,))

    def convolution(
        name: str, source: Tensor, channels: int, out: Quantisation
    ) -> Operator:
        shape = (channels, source.shape[1], 1, 1)
        weights = Tensor(
            f"{name}.weights",
            shape,
            "int8",
            Quantisation((0.1,) * channels, axis=0),
            value=random.integers(-128, 128, shape).astype(np.int8),
        )
        bias = random.integers(-99, 99, channels)
        output = Tensor(name, (1, channels, *source.shape[2:]), "uint8", out)
        constant = Tensor(f"{name}.bias", (channels,), "int64", value=bias)
        return make("Conv", name, [source, weights, constant], [output])

    image = Tensor("image", (1, 4, 2, 3), "uint8", facts)
    first = convolution("made", image, 5, facts)
    row = Tensor("row", (1, 30, 1, 1), "uint8", facts)
    last = convolution("scores", row, 7, Quantisation((9.0,), (123,)))
    view = make("Reshape", "", [first.output], [row])
    graph = Graph((image,), (last.output,), (first, view, last))
    values = random.integers(0, 256, image.shape).astype(np.uint8)
    plain = evaluate.evaluate(graph, {"image": values})["scores"]
    found = evaluate.evaluate(fill_blocks(graph), {"image": values})
    filled = found["scores/all channels"]
    assert len(np.unique(plain)) > 3
    assert filled.shape[1] == 16
    assert (filled[:, :7] == plain).all()
    assert np.array_equal(found["scores"], plain)


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


def given(
    proto: onnx.ModelProto, *options: Any, trained: bool = True, **more: Any
) -> Any:
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
        **{"progress": Progress(quiet=True), **more},
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


def test_a_constant_activation_is_refused_by_name(
    graphs: dict[str, onnx.ModelProto],
) -> None:
    with pytest.raises(UserError, match="scale 0") as refused:
        given(edited(graphs["residuals"], constant_activation))
    assert "\n" not in str(refused.value)


def test_weights_far_from_their_zero_point_give_the_integers_of_onnx_runtime(
    graphs: dict[str, onnx.ModelProto],
) -> None:
    proto = edited(graphs["residuals"], lambda g: unsigned_weights(g, 100))
    graph = given(proto).graph
    (image,) = patterns(proto, 1)
    values = onnx_runtime_tensors(proto, graph, image)
    ours = evaluate.evaluate(graph, {"image": image})
    (stem,) = (x for x in graph.operators if x.label == "stem" and x.macs)
    name = stem.output.name
    assert np.array_equal(ours[name], values[name])
    assert len(np.unique(ours[name])) > 50


def test_unsigned_weights_around_128_are_symmetric(
    graphs: dict[str, onnx.ModelProto],
) -> None:
    proto = edited(graphs["residuals"], lambda g: unsigned_weights(g, 128))
    graph = given(proto).graph
    (image,) = patterns(proto, 1)
    values = onnx_runtime_tensors(proto, graph, image)
    stem = graph.operators[1]
    assert stem.label == "stem"
    ours = evaluate.apply(stem, values)[stem.output.name]
    assert (ours == values[stem.output.name]).all()


def test_what_int8_loses_is_refused_unless_the_weights_mean_nothing(
    monkeypatch: pytest.MonkeyPatch, images: Path
) -> None:
    for module in (agreement, judge):
        monkeypatch.setattr(module, "INT8_COSINE", 1.1)
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
        (
            residuals(),
            (True, (tmp_path,)),
            "no image or .npy file that can be read among 1 file;",
        ),
    ):
        with pytest.raises(UserError, match=said):
            given(proto, *options)
    for more, name in (
        ({"keep_float": ["head"]}, "--keep-float"),
        ({"accept_loss": True}, "--accept-loss"),
        ({"strict": True}, "--strict-int8"),
    ):
        with pytest.raises(UserError, match=f"{name}: goes with --quantize int8"):
            given(residuals(), **more)
    with pytest.raises(
        UserError, match="already is quantised; leave --quantize and --"
    ):
        given(graphs["residuals"], keep_float=["head"])


def test_the_layer_that_lost_most_is_named() -> None:
    model = gate.check(residuals(), IDENTITY)
    images = patterns(residuals(), 2)
    calibrated = calibrate.quantise(
        model, [[x] for x in images], True, Progress(quiet=True)
    )
    scale = next(
        n.input[1]
        for n in calibrated.model.proto.graph.node
        if n.op_type == "QuantizeLinear" and n.input[0] == "b.expand.relu6"
    )
    for tensor in calibrated.model.proto.graph.initializer:
        if tensor.name == scale:
            tensor.CopyFrom(numpy_helper.from_array(np.asarray(3, np.float32), scale))
    layer, decibels = loss.worst_layer(calibrated, images[:1])
    assert "b.expand" in layer
    assert decibels < 15


def test_a_transposed_convolution_with_an_output_shape_is_read_quantised(
    tmp_path: Path,
) -> None:
    """ONNX's own inference gives it another rank, and its weights are dequantised."""
    proto = onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["": 13]>
        agraph (float[1,3,8,8] image) => (float[1,2,16,16] y)
        <float[3,2,2,2] w = {VALUES}> {
          y = ConvTranspose <strides = [2,2], output_shape = [16,16]> (image, w)
        }""".replace("VALUES", ",".join(map(str, range(24))))
    )
    graph = passes.read(quantised(proto, tmp_path), passes.INTEGERS)
    assert graph.outputs[0].shape == (1, 2, 16, 16)
