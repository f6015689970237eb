"""The generated example.c: a photograph as PPM becomes boxes or classes, and a broken file one line."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import numpy as np
import onnx
import pytest
from conftest import succeed
from gated import small
from onnx import helper
from PIL import Image
from test_detect_builds import DECODING, model

from netship.bundle import photos
from netship.bundle.decode import decode
from netship.bundle.detections import on_photograph
from netship.bundle.golden import read_golden
from netship.bundle.store import Bundle, open_bundle
from netship.devices.sessions.standalone import open_standalone
from netship.targets.toolchain import run_zig

STRICT = ("-std=c99", "-O2", "-Wall", "-Wextra", "-Wconversion", "-Wpedantic")


def built(folder: Path, proto: onnx.ModelProto, labels: str, *options: str) -> Bundle:
    """A library, with its example compiled into ``example`` in the folder above."""
    onnx.save(proto, folder / "m.onnx")
    (folder / "labels.txt").write_text(labels)
    words = ("--format", "standalone", "--name", "net", "--scale", "1/255", *options)
    files = ("--labels", folder / "labels.txt", "--output", folder / "out")
    succeed("compile.build", "--model", folder / "m.onnx", *words, *files)
    library = folder / "out"
    linked = (f"-I{library}", library / "libnet.a", "-lpthread", "-lm", "-Werror")
    made = run_zig(
        "cc", folder / "example", *STRICT, library / "example.c", *map(str, linked)
    )
    assert made == ""
    return open_bundle(library)


@pytest.fixture(scope="module")
def detector(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder = tmp_path_factory.mktemp("boxes")
    (folder / "mine.toml").write_text(DECODING)
    options = ("--task", "detect", "--decode", str(folder / "mine.toml"))
    labels = "nothing\nblack cat\ndog \x1b[1m\n"
    return built(folder, model(), labels, *options, "--fit", "letterbox")


def said(bundle: Bundle, path: Path) -> list[str]:
    """What the example prints after its self-test."""
    words = [bundle.path.parent / "example", path]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    _, tested, *lines = done.stdout.splitlines()
    assert tested == "self-test: no error"
    return lines


def test_the_example_prints_the_decoders_boxes(
    detector: Bundle, tmp_path: Path
) -> None:
    paths = []
    for size in ((60, 40), (33, 100), (1, 1), (2000, 25)):
        pixels = np.random.default_rng(1).integers(0, 256, (*size[::-1], 3), np.uint8)
        paths.append(tmp_path / f"{size[0]}.ppm")
        Image.fromarray(pixels).save(paths[-1])
    options = (detector.path, "--image", *paths, "--json")
    answers = json.loads(succeed("runtime_demo.run", *options))["images"]
    for path, answer in zip(paths, answers, strict=True):
        found = [line.rsplit(" ", 5) for line in said(detector, path)]
        assert len(found) == len(answer["boxes"]) > 0
        for line, box in zip(found, answer["boxes"], strict=True):
            assert line[0] == box["label"].replace("\x1b", "?")
            x1, y1, x2, y2 = box["box"]
            score, *place = np.array(line[1:], float)
            np.testing.assert_allclose(score, box["score"], atol=1e-4)
            np.testing.assert_allclose(place, [x1, y1, x2 - x1, y2 - y1], atol=0.06)


def test_the_example_prints_boxes_of_a_tensor_in_its_pixels(detector: Bundle) -> None:
    manifest, golden = detector.manifest, read_golden(detector)[0]
    assert manifest.task is not None
    with open_standalone(detector) as session:
        outputs = session.run(*golden.inputs)
    size = (32, 32)
    whole = photos.Placement(1, 1, 0, 0)
    boxes = on_photograph(decode(manifest.task, outputs, size), whole, size).boxes
    lines = said(detector, detector.path / "golden/0.input.bin")
    found = np.array([line.split()[-4:] for line in lines], float)
    found[:, 2:] += found[:, :2]
    np.testing.assert_allclose(found, boxes, atol=0.11)


PIXELS = bytes(range(24))


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"", "is no binary PPM: it does not begin with P6"),
        (b"P5\n4 2\n255\n" + PIXELS, "does not begin with P6"),
        (b"P6\n4 x\n255\n" + PIXELS, "no width, height and highest value"),
        (b"P6\n-4 2\n255\n" + PIXELS, "no width, height and highest value"),
        (b"P6 4 2 255", "no width, height and highest value"),
        (b"P6\n99999999999999999999 2\n255\n", "no width, height and highest value"),
        (b"P6\n# only a comment", "no width, height and highest value"),
        (b"P6\n4 2\n65535\n" + 2 * PIXELS, "its highest value is not 255"),
        (b"P6\n4 2\n7\n" + PIXELS, "its highest value is not 255"),
        (b"P6\n0 2\n255\n", "its sides are not from 1 to 65535"),
        (b"P6\n65536 1\n255\n", "its sides are not from 1 to 65535"),
        (b"P6\n60000 60000\n255\n", "more than 100,000,000 pixels"),
        (b"P6\n4 2\n255\n" + PIXELS[:-1], "it is cut short"),
    ],
)
def test_a_broken_photograph_is_one_line(
    detector: Bundle, tmp_path: Path, data: bytes, why: str
) -> None:
    (tmp_path / "a.ppm").write_bytes(data)
    words = [detector.path.parent / "example", tmp_path / "a.ppm"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and why in done.stderr
    assert done.stderr.startswith(f"{tmp_path / 'a.ppm'}: ")
    assert len(done.stderr.splitlines()) == 1


def test_comments_and_spaces_in_a_header_are_read(
    detector: Bundle, tmp_path: Path
) -> None:
    for name, header in (("a", b"P6 4 2 255\n"), ("b", b"P6\n#1 2\n\t4\r#\n 2\n255 ")):
        (tmp_path / f"{name}.ppm").write_bytes(header + PIXELS)
    found = [said(detector, tmp_path / f"{name}.ppm") for name in "ab"]
    assert found[0] == found[1]
    for path in (tmp_path / "none.ppm", tmp_path / "none.bin"):
        words = [detector.path.parent / "example", path]
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        assert done.returncode == 2 and "cannot be" in done.stderr


def test_a_file_that_is_longer_than_the_input_is_no_input(
    detector: Bundle, tmp_path: Path
) -> None:
    """Such as a photograph whose name does not end with .ppm: its first bytes are no numbers."""
    golden = (detector.path / "golden/0.input.bin").read_bytes()
    for name, data in (("a.jpg", golden + b"x"), ("b.PPM", b"P6" + golden)):
        (tmp_path / name).write_bytes(data)
        words = [detector.path.parent / "example", tmp_path / name]
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        assert done.returncode == 2
        assert done.stderr == (
            f"{tmp_path / name}: cannot be read as 3072 float32 and nothing more; of a photograph give a .ppm file\n"
        )


def test_a_classifiers_example_prints_the_best_five(tmp_path: Path) -> None:
    weights = np.random.default_rng(2).normal(size=(7, 3, 6, 4)).astype(np.float32)
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"]),
        helper.make_node("Flatten", ["c"], ["y"]),
    ]
    labels = "".join(f"class name {number}\n" for number in range(7))
    bundle = built(tmp_path, small(nodes, {"w": weights}), labels)
    pixels = np.random.default_rng(3).integers(0, 256, (50, 30, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.ppm")
    command = ("runtime_demo.run", bundle.path, "--image", tmp_path / "a.ppm")
    best = json.loads(succeed(*command, "--json"))["images"][0]["top"]
    found = [line.rsplit(" ", 1) for line in said(bundle, tmp_path / "a.ppm")]
    assert [label for label, _ in found] == [each["label"] for each in best]
    golden = said(bundle, bundle.path / "golden/0.input.bin")
    number = read_golden(bundle)[0].outputs[0].argmax()
    assert len(golden) == 1 and golden[0].startswith(f"class {number}, output ")
