"""A segmentation from its build to its classes: the C library with its example and Python module, and the Cortex-M project."""

from __future__ import annotations

import ctypes
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from conftest import succeed
from gated import small
from onnx import helper
from PIL import Image

from netship.bundle.decode import NO_CLASS, segment
from netship.bundle.golden import read_golden
from netship.bundle.store import Bundle, open_bundle
from netship.targets.presets import native
from netship.targets.toolchain import run_zig

STRICT = ("-std=c99", "-O2", "-Wall", "-Wextra", "-Wconversion", "-Wpedantic", "-Werror")  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A network of 3 classes, whose logarithms of negative numbers are NaN."""
    folder = tmp_path_factory.mktemp("segmenter")
    weights = np.array([[1, -0.3, -0.3], [-0.3, 1, 0.3], [0.2, 0.3, 1]], np.float32)
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"]),
        helper.make_node("Log", ["c"], ["y"]),
    ]
    onnx.save(small(nodes, {"w": weights[:, :, None, None]}), folder / "m.onnx")
    (folder / "labels.txt").write_text("nothing\nblack cat\ndog\n")
    return folder


def build(folder: Path, *options: str) -> Bundle:
    words = ("--model", folder / "m.onnx", "--task", "segment", "--name", "net", "--scale", "1/255")  # fmt: skip
    files = ("--labels", folder / "labels.txt", "--output", folder / options[1])
    succeed("compile.build", *words, *files, *options)
    return open_bundle(folder / options[1])


def classes_of(bundle: Bundle) -> np.ndarray:
    assert bundle.manifest.task
    found = segment(bundle.manifest.task, read_golden(bundle)[0].outputs)
    assert 0 < (found == NO_CLASS).sum() < found.size
    return found


def test_a_library_its_example_and_its_python_module_give_numpys_classes(
    folder: Path,
) -> None:
    bundle = build(folder, "--format", "standalone")
    library = bundle.path
    assert '#include "net_segment.h"' in (library / "net.h").read_text()
    golden = library / "golden/0.input.bin"
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import net\n"
        "with net.Network() as network:\n"
        "    print(list(network.segment(open(sys.argv[2], 'rb').read())))\n"
    )
    words = [sys.executable, "-c", code, str(library), str(golden)]
    text = subprocess.run(words, capture_output=True, check=True, text=True).stdout
    assert json.loads(text) == classes_of(bundle).ravel().tolist()

    linked = (f"-I{library}", library / "libnet.a", "-lpthread", "-lm")
    source = library / "example.c"
    assert run_zig("cc", folder / "example", *STRICT, source, *map(str, linked)) == ""
    pixels = np.random.default_rng(3).integers(0, 256, (50, 30, 3), np.uint8)
    pixels[:20] = 0, 255, 0
    Image.fromarray(pixels).save(folder / "a.ppm")
    command = ("runtime_demo.run", library, "--image", folder / "a.ppm", "--json")
    answer = json.loads(succeed(*command))["images"][0]
    done = subprocess.run([folder / "example", folder / "a.ppm"], capture_output=True, check=True, text=True)  # fmt: skip
    shares = [f"{x['label']} {100 * x['probability']:.1f}%" for x in answer["top"]]
    without = round(answer["without_class"] * classes_of(bundle).size)
    assert without > 1
    assert done.stdout.splitlines()[2:] == [*shares, f"{without} pixels have no class"]


MAIN = """
#include "net.h"
#include "net_segment.h"
static union { float values[NET_ARENA_BYTES / sizeof(float)]; uint64_t aligned; } arena;
static float input[NET_INPUT_SIZE];
static float output[NET_OUTPUT_SIZE];
int segment_all(const float *pixels, int16_t *classes) {
  for (int i = 0; i < NET_INPUT_SIZE; i++) input[i] = pixels[i];
  if (net_run(input, output, &arena) != NET_OK) return -2;
  return net_segment(output, classes);
}
"""


def test_a_cortex_m_project_gives_numpys_classes(folder: Path) -> None:
    """Its output has its channels last."""
    bundle = build(folder, "--target", "cortex-m7")
    assert "net_segment.c" in (bundle.path / "Makefile").read_text()
    (folder / "main.c").write_text(MAIN)
    sources = [bundle.path / f"net{part}.c" for part in ("", "_weights", "_segment")]
    options = ["-target", native().linker, "-lm", f"-I{bundle.path}", "-shared", "-fPIC"]  # fmt: skip
    run_zig("cc", folder / "net.so", *STRICT, *options, *sources, folder / "main.c")
    golden = read_golden(bundle)[0].inputs[0]
    pixels = np.ascontiguousarray(golden.transpose(0, 2, 3, 1))
    expected = classes_of(bundle)
    found = np.zeros(expected.shape, np.int16)
    run = ctypes.CDLL(str(folder / "net.so")).segment_all
    assert run(pixels.ctypes, found.ctypes) == (expected == NO_CLASS).sum()
    assert np.array_equal(found, expected)
