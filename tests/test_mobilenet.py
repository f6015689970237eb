"""The MobileNetV2 family: the released figures, and weights that make agreement mean something."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import subprocess
import sys
from functools import cache
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper
from PIL import Image

from netship.compile import mobilenet
from netship.compile.frontend import family
from netship.compile.frontend.family import (
    DEFAULT,
    build,
    divisible,
    parse_name,
    preprocessing,
    same_padding,
)
from netship.compile.mobilenet import PAPER, RELEASED, count
from netship.targets.errors import UserError

Array = NDArray[np.float32]

TOLERANCE = 5e-5  # what a bundle's logits may differ by from ONNX Runtime's
NETWORKS = list(itertools.product((0.35, 1.0, 1.4), (96, 224)))
PHOTOGRAPHS = [
    "astronaut.png",
    "chelsea.png",
    "coffee.png",
    "rocket.jpg",
    "hubble_deep_field.jpg",
    "motorcycle_left.png",
]


@cache
def photographs(resolution: int) -> list[Array]:
    """scikit-image's photographs as the family takes them: x/127.5 - 1, [1, 3, R, R]."""
    import skimage

    settings = preprocessing(resolution)
    tensors = []
    for name in PHOTOGRAPHS:
        image = Image.open(Path(skimage.__file__).parent / "data" / name).convert("RGB")
        assert isinstance(settings.resize, int)
        ratio = settings.resize / min(image.size)
        size = round(image.width * ratio), round(image.height * ratio)
        image = image.resize(size, Image.Resampling.BILINEAR)
        left = (image.width - resolution) // 2
        top = (image.height - resolution) // 2
        crop = image.crop((left, top, left + resolution, top + resolution))
        pixels = np.asarray(crop, np.float32).transpose(2, 0, 1)
        scaled = pixels * settings.scale - settings.mean[0]
        tensors.append((scaled / settings.std[0]).astype(np.float32)[np.newaxis])
    return tensors


def run(model: onnx.ModelProto, image: Array) -> list[Array]:
    session = ort.InferenceSession(model.SerializeToString())
    return list(session.run(None, {"input": image}))


@pytest.mark.parametrize(("width", "resolution"), RELEASED)
def test_counted_from_the_graph_are_the_released_figures(
    width: float, resolution: int
) -> None:
    layers = count(build(width, resolution))
    macs = sum(layer.macs for layer in layers)
    parameters = sum(layer.parameters for layer in layers)
    assert len(layers) == 53
    assert (macs // 10**6, round(parameters / 1e6, 2)) == RELEASED[width, resolution]


def test_the_table_holds_all_22_released_networks_and_where_the_paper_differs() -> None:
    assert len(RELEASED) == 22
    differs = {key: PAPER[key] for key in PAPER if PAPER[key] != RELEASED[key]}
    assert differs == {(1.0, 224): (300, 3.4), (1.4, 224): (585, 6.9)}


@pytest.mark.parametrize(
    ("width", "stem", "last_bottleneck", "head"),
    [
        (0.35, 16, 112, 1280),
        (0.5, 16, 160, 1280),
        (0.75, 24, 240, 1280),
        (1.0, 32, 320, 1280),
        (1.3, 40, 416, 1664),
        (1.4, 48, 448, 1792),
    ],
)
def test_channels_are_rounded_as_in_the_released_networks(
    width: float, stem: int, last_bottleneck: int, head: int
) -> None:
    channels = {layer.name: layer.output[1] for layer in count(build(width, 96))}
    found = channels["stem"], channels["block17.project"], channels["head"]
    assert found == (stem, last_bottleneck, head)


def test_rounding_channels_never_loses_more_than_a_tenth() -> None:
    assert [divisible(x) for x in (1, 8, 11.2, 12, 33.6, 44.8)] == [
        8,
        8,
        16,
        16,
        32,
        48,
    ]
    assert all(divisible(x / 10) >= 0.09 * x for x in range(1, 5000))


def test_strided_convolutions_pad_as_tensorflow_does() -> None:
    def pads(resolution: int) -> list[list[int]]:
        nodes = (n for n in build(1.0, resolution).graph.node if n.op_type == "Conv")
        attributes = [
            {a.name: helper.get_attribute_value(a) for a in node.attribute}
            for node in nodes
        ]
        return [list(a["pads"]) for a in attributes if a["strides"] == [2, 2]]

    assert pads(224) == [[0, 0, 1, 1]] * 5
    # 97 → 49 → 25 → 13 → 7 → 4: odd sides pad evenly.
    assert pads(97) == [[1, 1, 1, 1]] * 5
    assert same_padding(7, 3, 1) == (1, 1)


@pytest.mark.parametrize("resolution", [32, 97, 130, 255])
def test_any_resolution_halves_five_times_rounding_up(resolution: int) -> None:
    model = build(0.35, resolution)
    sides = [layer.output[2] for layer in count(model) if 2 in layer.stride]
    expected, side = [], resolution
    for _ in range(5):
        side = math.ceil(side / 2)
        expected.append(side)
    assert sides == expected
    image = np.zeros((1, 3, resolution, resolution), np.float32)
    assert run(model, image)[0].shape == (1, 1000)


def test_the_graph_is_a_valid_float32_network_with_the_promised_interface() -> None:
    model = build(1.0, 224, classes=7)
    onnx.checker.check_model(model, full_check=True)
    kinds = {tensor.data_type for tensor in model.graph.initializer}
    assert kinds == {TensorProto.FLOAT}
    (image,), (logits,) = model.graph.input, model.graph.output
    shapes = [
        [d.dim_value for d in v.type.tensor_type.shape.dim] for v in (image, logits)
    ]
    assert (image.name, logits.name) == ("input", "logits")
    assert shapes == [[1, 3, 224, 224], [1, 7]]
    operators = [node.op_type for node in model.graph.node]
    found = {name: operators.count(name) for name in ("Conv", "Clip", "Add", "Gemm")}
    assert found == {"Conv": 52, "Clip": 35, "Add": 10, "Gemm": 1}


def test_the_weights_are_the_same_on_every_machine() -> None:
    model = build(1.0, 224)
    assert model.SerializeToString() == build(1.0, 224).SerializeToString()
    digest = hashlib.sha256(b"".join(t.raw_data for t in model.graph.initializer))
    assert (
        digest.hexdigest()
        == "e9cf914eec1c7df40a4aa1786d35558042a707b4133a8cba0c6e1c53a7f61309"
    )


@pytest.mark.parametrize(("width", "resolution"), NETWORKS)
def test_different_photographs_get_different_answers(
    width: float, resolution: int
) -> None:
    model = build(width, resolution)
    logits = np.concatenate([run(model, x)[0] for x in photographs(resolution)])
    answers = set(logits.argmax(axis=1).tolist())
    assert len(answers) > len(logits) / 2
    spread = logits.std(axis=1)
    assert spread.min() > 0.4
    assert spread.max() < 1.5
    for one, other in itertools.combinations(logits, 2):
        assert np.abs(one - other).max() >= 1000 * TOLERANCE
    # What differs between photographs is no trifle beside what all have in common.
    assert logits.var(axis=0).mean() > 0.1 * logits.var()


@pytest.mark.parametrize(("width", "resolution"), NETWORKS)
def test_every_layer_keeps_its_spread_and_relu6_neither_kills_nor_saturates(
    width: float, resolution: int
) -> None:
    model = build(width, resolution)
    names = [n.output[0] for n in model.graph.node if n.op_type == "Clip"]
    for name in names:
        model.graph.output.append(helper.make_empty_tensor_value_info(name))
    maps = [run(model, image)[1:] for image in photographs(resolution)]
    for name, *of_images in zip(names, *maps, strict=True):
        values = np.concatenate(of_images)
        assert 0.1 < (values <= 0).mean() < 0.6, name
        assert (values >= 6).mean() < 0.05, name
        assert 0.5 < values.std() < 2, name
        dead = values.max(axis=(0, 2, 3)) <= 0
        assert dead.mean() < 0.05, name


@pytest.mark.parametrize(("width", "resolution"), NETWORKS)
def test_rounding_errors_stay_far_below_the_tolerance(
    width: float, resolution: int
) -> None:
    """ONNX Runtime with and without its optimisations adds up in different orders."""
    model = build(width, resolution)
    plain = ort.SessionOptions()
    plain.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    other = ort.InferenceSession(model.SerializeToString(), plain)
    for image in photographs(resolution):
        (expected,) = run(model, image)
        (found,) = other.run(None, {"input": image})
        assert np.abs(found - expected).max() < TOLERANCE / 1.5


def test_the_constants_of_relu6_are_those_of_the_normal_distribution() -> None:
    x = np.linspace(-8, 8, 100_001)
    density = np.exp(-(x**2) / 2)
    density /= density.sum()
    y = np.clip(family._MEAN + family._SPREAD * x, 0, 6)
    mean = float((y * density).sum())
    assert mean == pytest.approx(family._RELU6_MEAN, abs=1e-4)
    variance = float((y * y * density).sum()) - mean**2
    assert variance == pytest.approx(family._RELU6_VARIANCE, abs=1e-4)


def test_a_name_means_a_width_and_a_resolution() -> None:
    assert parse_name(DEFAULT) == (1.0, 224)
    assert parse_name("mobilenetv2-0.35-96") == (0.35, 96)
    assert parse_name(family.network_name(1.4, 160)) == (1.4, 160)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("mobilenetv2", "mobilenetv2-WIDTH-RESOLUTION"),
        ("mobilenetv2-1.0", "mobilenetv2-WIDTH-RESOLUTION"),
        ("mobilenetv2-1.0-224x", "mobilenetv2-WIDTH-RESOLUTION"),
        ("mobilenetv2--1-224", "mobilenetv2-WIDTH-RESOLUTION"),
        ("mobilenetv2-nan-224", "mobilenetv2-WIDTH-RESOLUTION"),
        ("mobilenetv2-1.0-" + "9" * 5000, "mobilenetv2-WIDTH-RESOLUTION"),
        ("mobilenetv2-9-224", "width 9.0: choose 0.1 to 4.0"),
        ("mobilenetv2-0.0-224", "width 0.0: choose 0.1 to 4.0"),
        ("mobilenetv2-1.0-31", "resolution 31: choose 32 to 1024"),
        ("mobilenetv2-1.0-1025", "resolution 1025: choose 32 to 1024"),
    ],
)
def test_a_wrong_name_says_the_form_or_the_range(name: str, says: str) -> None:
    with pytest.raises(UserError, match=says):
        parse_name(name)


def test_preprocessing_is_the_familys() -> None:
    settings = preprocessing(224)
    assert (settings.resize, settings.crop) == (256, (224, 224))
    pixels = np.array([0, 127.5, 255]) * settings.scale
    values = (pixels - settings.mean[0]) / settings.std[0]
    assert values == pytest.approx([-1, 0, 1])
    assert preprocessing(96).resize == 110


def test_any_static_graph_of_conv_and_gemm_can_be_counted() -> None:
    def weight(name: str, *shape: int) -> TensorProto:
        return helper.make_tensor(
            name, TensorProto.FLOAT, shape, np.ones(math.prod(shape), np.float32)
        )

    nodes = [
        helper.make_node("Conv", ["x", "a"], ["y"], "grouped", group=2, strides=[2, 1]),
        helper.make_node("Flatten", ["y"], ["z"]),
        helper.make_node("Gemm", ["z", "b", "c"], ["out"], "dense"),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, 4, 9, 7])],
        [helper.make_tensor_value_info("out", TensorProto.FLOAT, [2, 5])],
        [weight("a", 6, 2, 3, 1), weight("b", 168, 5), weight("c", 5)],
    )
    grouped, dense = count(helper.make_model(graph))
    assert grouped.output == (2, 6, 4, 7)
    assert (grouped.macs, grouped.parameters) == (2 * 6 * 4 * 7 * 6, 36)
    assert (dense.macs, dense.parameters) == (2 * 5 * 168, 168 * 5 + 5)


def test_counting_names_the_node_whose_shape_is_not_static() -> None:
    model = build(0.35, 96)
    model.graph.input[0].type.tensor_type.shape.dim[2].dim_param = "height"
    with pytest.raises(UserError, match="'stem'.*not static"):
        count(model)


def command(
    *arguments: str, folder: Path | None = None
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "compile.mobilenet", *arguments],
        check=False,
        capture_output=True,
        text=True,
        cwd=folder or Path(__file__).parents[1],
        env={"PYTHONPATH": str(Path(__file__).parents[1]), "PATH": "/usr/bin:/bin"},
    )


def test_the_command_prints_the_family_beside_the_released_figures(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert mobilenet.main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("mobilenetv2-") for line in lines) == len(RELEASED)
    (row,) = (line.split() for line in lines if line.startswith("mobilenetv2-1.4-224"))
    figures = "6,060,840 6.06 M 6.9 M 582,195,824 582 M 585 M"
    assert " ".join(row) == f"mobilenetv2-1.4-224 {figures}"


def test_the_command_shows_each_layers_shape(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert mobilenet.main(["--layers"]) == 0
    out = capsys.readouterr().out
    rows = {line.split()[0]: line.split()[1:] for line in out.splitlines() if line}
    assert rows["stem"] == ["3×3", "3×224×224", "32×112×112", "2", "10,838,016", "864"]
    assert rows["block17.project"][1:4] == ["960×7×7", "320×7×7", "1"]
    # The paper's Table 3: 400K at 112×112, 16 channels.
    assert "401,408 bytes" in out


def test_the_command_speaks_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert mobilenet.main(["--width", "0.6", "--resolution", "64", "--json"]) == 0
    (network,) = json.loads(capsys.readouterr().out)["networks"]
    assert network["name"] == "mobilenetv2-0.6-64"
    assert network["released"] is network["paper"] is None
    assert network["macs"] == sum(layer.macs for layer in count(build(0.6, 64)))


def test_the_command_writes_the_model_whole(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "small.onnx"
    assert mobilenet.main(["--width", "0.35", "--output", str(path)]) == 0
    assert onnx.load(path) == build(0.35, 224)
    assert list(tmp_path.iterdir()) == [path]
    assert f"written: {path}, with seeded random weights" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--width", "0"], "width 0.0: choose 0.1 to 4.0"),
        (["--width", "nan"], "width nan: choose 0.1 to 4.0"),
        (["--resolution", "5000"], "resolution 5000: choose 32 to 1024"),
        (["--output", "."], ".: is not a file; give --output a file name"),
        (["--output", "no/x.onnx"], "no: no such folder; make it"),
    ],
)
def test_the_command_refuses_in_one_line(
    arguments: list[str], says: str, tmp_path: Path
) -> None:
    done = command(*arguments, folder=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {says}")
    assert done.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_full_disk_leaves_nothing_and_spares_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_text("the old file")
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(path)],
        check=False,
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[1],
    )
    assert done.returncode == 2
    assert f"error: {path}: File too large; choose another --output" in done.stderr
    assert path.read_text() == "the old file"
    assert list(tmp_path.iterdir()) == [path]


# No file may grow beyond 100 kB in that process: to the program, a disk that is full.
FULL_DISK = """
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
from netship.compile.mobilenet import main
from netship.targets.errors import run_command
path = sys.argv[1]
run_command(lambda _: main(["--width", "0.35", "--output", path]))
"""


def test_help_needs_neither_onnx_nor_tvm() -> None:
    program = (
        "import sys; from netship.compile import mobilenet\n"
        "try: mobilenet.main(['--help'])\n"
        "except SystemExit: print(sorted({'onnx', 'tvm'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[1],
    )
    assert "multiply-adds" in done.stdout
    assert done.stdout.splitlines()[-1] == "[]"
