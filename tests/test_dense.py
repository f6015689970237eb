"""SSDLite and DeepLabv3 on MobileNetV2: the paper's figures, names, anchors, and builds of small ones."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from conftest import run, succeed

from netship.bundle.store import open_bundle
from netship.compile import mobilenet
from netship.compile.frontend.dense import Network, anchors, parse, ssdlite
from netship.compile.mobilenet import TASKS, count
from netship.targets.errors import UserError

SSDLITE, DEEPLABV3, STRIDE_8 = TASKS
#: Of ``compile.mobilenet``: multiply-adds, parameters, and both as the paper prints them.
COUNTED = {
    SSDLITE: (788_830_144, 4_337_013, "0.8 B", "4.3 M"),
    DEEPLABV3: (2_746_235_605, 2_113_557, "2.75 B", "2.11 M"),
    STRIDE_8: (8_831_380_181, 2_113_557, None, "2.11 M"),
}


def test_the_papers_figures_are_counted(capsys: pytest.CaptureFixture[str]) -> None:
    assert mobilenet.main(["--json"]) == 0
    reports = json.loads(capsys.readouterr().out)["networks"]
    found = {x["name"]: x for x in reports if x["name"] in TASKS}
    assert list(found) == list(COUNTED)
    for name, (macs, parameters, paper_macs, paper_parameters) in COUNTED.items():
        assert (found[name]["macs"], found[name]["parameters"]) == (macs, parameters)
        assert found[name]["paper"] == {
            "macs": paper_macs,
            "parameters": paper_parameters,
        }
        for value, unit, printed in (
            (macs, 1e9, paper_macs),
            (parameters, 1e6, paper_parameters),
        ):
            if printed:
                number = printed.split()[0]
                digits = len(number.partition(".")[2])
                assert f"{value / unit:.{digits}f}" == number


def test_the_table_and_the_layers_are_printed(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert mobilenet.main([]) == 0
    out = capsys.readouterr().out
    rows = [line.split() for line in out.splitlines() if line]
    assert [STRIDE_8, "2,113,557", "2.11", "M", "8,831,380,181"] in rows
    assert mobilenet.main(["--model", "ssdlite-mobilenetv2-0.35-96", "--layers"]) == 0
    out = capsys.readouterr().out
    assert "map1.scores.predict" in out
    assert "released" not in out


def test_the_command_takes_one_way_to_name_a_network() -> None:
    with pytest.raises(UserError, match="--model: has its own width"):
        mobilenet.main(["--model", SSDLITE, "--width", "0.5"])


def test_the_convolutions_are_the_papers() -> None:
    layers = {x.name: x for x in count(parse(SSDLITE).build())}
    # Layer 15 of the paper's count, the stem being layer 1: block 14, before its stride of 2.
    assert layers["map1.boxes.depthwise"].input == layers["block14.expand"].output
    assert layers["map1.boxes.depthwise"].input == (1, 576, 20, 20)
    sides = [layers[f"map{i}.scores.predict"].output[2] for i in range(1, 7)]
    assert sides == [20, 10, 5, 3, 2, 1]
    for stride, side in ((16, 33), (8, 65)):
        last = count(Network("deeplabv3", 1.0, 513, stride).build())
        assert {x.name: x.output for x in last}["block17.project"] == (
            1,
            320,
            side,
            side,
        )


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (DEEPLABV3, {"block14": 1, "block15": 2, "block17": 2}),
        (STRIDE_8, {"block7": 1, "block8": 2, "block14": 2, "block15": 4}),
    ],
)
def test_where_strides_end_the_depthwise_convolutions_are_dilated(
    name: str, expected: dict[str, int]
) -> None:
    found = {}
    for node in parse(name).build().graph.node:
        attributes = {x.name: list(x.ints) for x in node.attribute}
        if node.name.endswith(".depthwise"):
            found[node.name.split(".")[0]] = attributes.get("dilations", [1])[0]
    assert {block: found[block] for block in expected} == expected


@pytest.mark.parametrize(
    ("name", "digest"),
    [
        (SSDLITE, "e75d992439d65339"),
        (DEEPLABV3, "31854158792d4267"),
        (STRIDE_8, "f6d599b88479b7ac"),
    ],
)
def test_the_bytes_are_the_same_on_every_machine(name: str, digest: str) -> None:
    data = parse(name).build().SerializeToString(deterministic=True)
    assert hashlib.sha256(data).hexdigest()[:16] == digest


@pytest.mark.parametrize(
    "name",
    [
        "ssdlite-mobilenetv2-0.35-96",
        "ssdlite-mobilenetv2-1.4-33",
        "deeplabv3-mobilenetv2-0.1-65",
        "deeplabv3-mobilenetv2-0.35-97-os8",
    ],
)
def test_any_width_and_resolution_is_a_valid_network(name: str) -> None:
    network = parse(name)
    assert network.name == name
    model = network.build()
    onnx.checker.check_model(model, full_check=True)
    session = ort.InferenceSession(model.SerializeToString())
    side = network.resolution
    image = np.random.default_rng(0).normal(0, 0.5, (1, 3, side, side))
    answers = session.run(None, {"input": image.astype(np.float32)})
    if network.head == "ssdlite":
        boxes, scores = answers
        rows = len(anchors(side))
        assert (boxes.shape, scores.shape) == ((1, rows, 4), (1, rows, 81))
    else:
        assert [x.shape for x in answers] == [(1, 21, side, side)]
    for answer in answers:
        assert 0.3 < answer.std() < 3


def test_rows_are_in_the_order_of_the_anchors() -> None:
    """A bias of the third anchor of the first map's cells changes the rows of those anchors."""
    model = ssdlite(0.35, 96)
    weights = {x.name: x for x in model.graph.initializer}
    first = weights["map1.boxes.predict.bias"]
    values = np.frombuffer(first.raw_data, np.float32).copy()
    values[4 * 2] += 100  # ty of the third of three anchors of each cell
    first.raw_data = values.tobytes()
    image = np.zeros((1, 3, 96, 96), np.float32)
    session = ort.InferenceSession(model.SerializeToString())
    moved = session.run(["boxes"], {"input": image})[0][0, :, 0] > 50
    side = math.ceil(96 / 16)
    assert set(np.flatnonzero(moved)) == {3 * cell + 2 for cell in range(side * side)}


def test_anchors_are_those_of_tensorflows_configuration() -> None:
    found = anchors(320)
    assert found.shape == (2034, 4)
    assert found.dtype == np.float32
    root = math.sqrt(2)
    expected = [
        [0.025, 0.025, 0.1, 0.1],
        [0.025, 0.025, 0.2 / root, 0.2 * root],
        [0.025, 0.025, 0.2 * root, 0.2 / root],
        [0.025, 0.075, 0.1, 0.1],
    ]
    assert found[:4] == pytest.approx(np.array(expected))
    # The last map has one cell: scale 0.95, ratios 1, 2, 1/2, 3, 1/3, and one of √0.95.
    assert found[-6:, :2] == pytest.approx(np.full((6, 2), 0.5))
    assert found[-6] == pytest.approx([0.5, 0.5, 0.95, 0.95])
    assert found[-1, 2:] == pytest.approx([math.sqrt(0.95)] * 2)
    # The second map's scale is 0.2 + 0.75 / 5.
    assert found[1200, 2:] == pytest.approx([0.35, 0.35])


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("ssdlite-mobilenetv2-1.0-320-os8", "is none of"),
        ("deeplabv3-mobilenetv2-1.0-513-os4", "WIDTH-RESOLUTION"),
        ("deeplabv3-mobilenetv2-9-513", "width 9.0: choose 0.1 to 4.0"),
        ("ssdlite-mobilenetv3-1.0-320", "is none of"),
        ("deeplabv3-mobilenetv2-1.0-2000-os8", "resolution 2000: choose 32 to 1024"),
    ],
)
def test_a_wrong_name_says_the_form_or_the_range(name: str, says: str) -> None:
    with pytest.raises(UserError, match=says):
        parse(name)


@pytest.mark.slow
def test_a_detector_builds_checks_and_keeps_its_labels(
    built: Callable[..., Path], tmp_path: Path
) -> None:
    labels = tmp_path / "labels.txt"
    labels.write_text("\n".join(f"class {i}" for i in range(81)))
    name = "ssdlite-mobilenetv2-0.1-32"
    bundle = built(name, "native", "--labels", labels)
    manifest = open_bundle(bundle).manifest
    assert [(x.name, x.shape) for x in manifest.outputs] == [
        ("boxes", (1, 42, 4)),
        ("scores", (1, 42, 81)),
    ]
    assert manifest.preprocessing is not None
    assert (manifest.preprocessing.resize, manifest.labels) == (32, "labels.txt")
    said = succeed("runtime_demo.check", bundle, "--model", name)
    assert "agreement" not in said
    assert "max-abs" in said
    photo = tmp_path / "photo.png"
    refused = run("runtime_demo.run", bundle, "--image", photo)
    assert refused.returncode == 2
    assert "output 'boxes' is 1×42×4, not one score a class" in refused.stderr


@pytest.mark.slow
def test_a_segmentation_network_builds(
    built: Callable[..., Path], tmp_path: Path
) -> None:
    name = "deeplabv3-mobilenetv2-0.1-33-os8"
    labels = tmp_path / "labels.txt"
    labels.write_text("\n" * 20 + "tv\n")
    bundle = built(name, "native", "--labels", labels)
    manifest = open_bundle(bundle).manifest
    assert [x.shape for x in manifest.outputs] == [(1, 21, 33, 33)]
    assert manifest.measured["verification"]["relative_error"] <= 1e-4
    labels.write_text("one\ntwo\n")
    refused = run(
        "compile.build",
        *("--model", name, "--labels", labels),
        *("--output", tmp_path / "refused"),
    )
    assert "2 labels, but the model has 21 classes" in refused.stderr
