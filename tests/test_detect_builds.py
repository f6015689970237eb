"""A detector from its build to its boxes: the C library, the Cortex-M project and run."""

from __future__ import annotations

import ctypes
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from conftest import succeed
from onnx import helper, numpy_helper
from PIL import Image

from netship.bundle.decode import decode
from netship.bundle.golden import read_golden
from netship.bundle.store import Bundle, open_bundle
from netship.targets.presets import native
from netship.targets.toolchain import run_zig

SIDE = 32
DECODING = """
box = "offsets"
boxes = "where"
scores = "what"
strides = [8]
anchors = [[[12, 8], [9, 16]]]
variances = [0.1, 0.2]
activation = "softmax"
background = 0
score_threshold = 0.3
"""


def model() -> onnx.ModelProto:
    """Two heads on a grid of 4×4 cells: boxes and 3 scores of 2 anchors."""
    random = np.random.default_rng(5)
    nodes, weights = [], []
    for name, channels in (("where", 8), ("what", 6)):
        kernel = random.normal(0, 0.1, (channels, 3, 8, 8)).astype(np.float32)
        weights.append(numpy_helper.from_array(kernel, f"{name}.w"))
        inputs = ["image", f"{name}.w"]
        nodes.append(helper.make_node("Conv", inputs, [name], strides=[8, 8]))
    value = helper.make_tensor_value_info
    shapes = {"where": [1, 8, 4, 4], "what": [1, 6, 4, 4]}
    graph = helper.make_graph(
        nodes,
        "g",
        [value("image", 1, [1, 3, SIDE, SIDE])],
        [value(name, 1, shape) for name, shape in shapes.items()],
        weights,
    )
    opset = helper.make_opsetid("", 17)
    return helper.make_model(graph, opset_imports=[opset], ir_version=8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("detector")
    onnx.save(model(), folder / "m.onnx")
    (folder / "mine.toml").write_text(DECODING)
    (folder / "m.toml").write_text('task = "detect"\ndecode = "mine.toml"\n')
    (folder / "labels.txt").write_text("nothing\ncat\ndog\n")
    pixels = np.random.default_rng(1).integers(0, 256, (40, 60, 3), np.uint8)
    Image.fromarray(pixels).resize((600, 400)).save(folder / "photo.png")
    return folder


def build(folder: Path, *options: str) -> Bundle:
    output = folder / options[1]
    words = ("--model", folder / "m.onnx", "--name", "net", "--output", output)
    succeed("compile.build", *words, "--scale", "1/255", *options)
    return open_bundle(output)


def test_a_library_and_its_python_module_find_what_the_decoder_finds(
    folder: Path,
) -> None:
    bundle = build(folder, "--format", "standalone")
    header = (bundle.path / "net.h").read_text()
    assert '#include "net_detect.h"' in header
    golden = read_golden(bundle)[0].inputs[0]
    code = (
        "import json, sys; sys.path.insert(0, sys.argv[1]); import net\n"
        "tensor = open(sys.argv[2], 'rb').read()\n"
        "with net.Network() as network:\n"
        "    boxes = network.detect(tensor)\n"
        "    outputs = [list(each) for each in network.run(tensor)]\n"
        "print(json.dumps([[[b.x1, b.y1, b.x2, b.y2, b.score, b.class_index] for b in boxes], outputs]))\n"
        "print(boxes[0])\n"
    )
    (folder / "input.bin").write_bytes(golden.tobytes())
    words = [sys.executable, "-c", code, str(bundle.path), str(folder / "input.bin")]
    text = subprocess.run(words, capture_output=True, check=True, text=True).stdout
    numbers, shown = text.splitlines()
    boxes, outputs = json.loads(numbers)
    _compare(bundle, boxes, outputs)
    names = ("x1", "y1", "x2", "y2", "score", "class_index")
    pairs = zip(names, boxes[0], strict=True)
    values = ", ".join(f"{name}={value:.6g}" for name, value in pairs)
    assert re.fullmatch(rf"Detection\({re.escape(values)}(, points=.*)?\)", shown)

    command = ("runtime_demo.run", bundle.path, "--image", folder / "photo.png")
    answer = json.loads(succeed(*command, "--json"))["images"][0]
    assert answer["pixels_of"] == "photograph"
    # The centre crop, 400 pixels wide, is what the network sees.
    corners = np.array([each["box"] for each in answer["boxes"]])
    assert corners[:, 2].max() > 100 and (corners >= 0).all()
    assert (corners <= [600, 400, 600, 400]).all()
    table = succeed(*command)
    first = answer["boxes"][0]
    left, top, right, bottom = first["box"]
    where = f"x {left:.0f} to {right:.0f}, y {top:.0f} to {bottom:.0f}"
    assert f"photo.png: {len(corners)} objects, pixels of the photograph" in table
    assert f"{first['score']:.1%}  class {first['class_index']}: {where}" in table


def _compare(
    bundle: Bundle, boxes: list[list[float]], outputs: list[list[float]]
) -> None:
    manifest = bundle.manifest
    assert manifest.task and manifest.task.detector
    assert manifest.task.detector.decoder == "mine.toml"
    arrays = [
        np.array(values, np.float32).reshape(port.shape)
        for values, port in zip(outputs, manifest.outputs, strict=True)
    ]
    found = decode(manifest.task, arrays, (SIDE, SIDE))
    assert len(boxes) == len(found.boxes) > 3
    given = np.array(boxes, np.float32)
    assert np.array_equal(given[:, :4], found.boxes)
    assert np.array_equal(given[:, 4], found.scores)
    assert given[:, 5].tolist() == found.classes.tolist()


MAIN = """
#include "net.h"
#include "net_detect.h"
static union { float values[NET_ARENA_BYTES / sizeof(float)]; uint64_t aligned; } arena;
static float input[NET_INPUT_SIZE];
static net_detect_memory memory;
int detect_all(const float *pixels, float *output0, float *output1, net_detection *found) {
  for (int i = 0; i < NET_INPUT_SIZE; i++) input[i] = pixels[i];
  if (net_run(input, output0, output1, &arena) != NET_OK) return -2;
  return net_detect(output0, output1, found, &memory);
}
"""


def test_a_cortex_m_project_finds_what_the_decoder_finds(folder: Path) -> None:
    """Its outputs have their channels last."""
    bundle = build(folder, "--target", "cortex-m7")
    (folder / "main.c").write_text(MAIN)
    names = ("net.c", "net_weights.c", "net_detect.c", "example/main.c")
    sources = [bundle.path / name for name in names]
    options = ("-std=c99", "-O2", "-Wall", "-Wextra", "-Wconversion", "-Werror")
    target = ["-target", native().linker, "-lm", f"-I{bundle.path}"]
    assert run_zig("cc", folder / "example", *target, *options, *sources) == ""
    assert subprocess.run([folder / "example"], check=False).returncode == 0
    assert "net_detect.c" in (bundle.path / "Makefile").read_text()
    shared = [*target, "-shared", "-fPIC", *map(str, sources[:3])]
    run_zig("cc", folder / "net.so", *options, *shared, folder / "main.c")
    golden = read_golden(bundle)[0].inputs[0]
    pixels = np.ascontiguousarray(golden.transpose(0, 2, 3, 1))
    outputs = [np.zeros((4, 4, n), np.float32) for n in (8, 6)]
    found = np.zeros(100, [("box", "f4", 4), ("score", "f4"), ("class", "i4")])
    arrays = (pixels, *outputs, found)
    count = ctypes.CDLL(str(folder / "net.so")).detect_all(*(a.ctypes for a in arrays))
    boxes = [[*row["box"], row["score"], row["class"]] for row in found[:count]]
    _compare(bundle, boxes, [list(x.transpose(2, 0, 1).ravel()) for x in outputs])
