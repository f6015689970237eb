"""``--input-type uint8``: an image's own bytes go in, in every format."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from conftest import run, succeed
from integers import graph_of, quantised, residuals
from onnx import TensorProto, helper
from PIL import Image
from ports import network, seeded

from netship.bundle.manifest import ModelIdentity, Preprocessing
from netship.bundle.photos import read, to_tensor
from netship.bundle.store import Bundle, open_bundle
from netship.compile.frontend import byte_input, gate
from netship.compile.frontend.model import Model
from netship.compile.frontend.reference import Reference
from netship.compile.ir.operators import islands

IMAGENET: dict[str, object] = {"scale": 1 / 255, "mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}  # fmt: skip
MANY = ("--scale", "1/255", "--mean", "0.485,0.456,0.406", "--std", "0.229,0.224,0.225")
BYTES = ("--input-type", "uint8")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A network in float32 and quantised, and a photograph."""
    folder = tmp_path_factory.mktemp("bytes")
    onnx.save(residuals(), folder / "float.onnx")
    onnx.save(quantised(residuals(), folder), folder / "int8.onnx")
    pixels = np.random.default_rng(1).integers(0, 256, (9, 12, 3), np.uint8)
    photo = Image.fromarray(pixels).resize((90, 70), Image.Resampling.BICUBIC)
    photo.save(folder / "photo.png")
    return folder


def gated(path: Path) -> Model:
    return gate.check(onnx.load(path), ModelIdentity(name="m", sha256="0" * 64))


def scaled(**values: object) -> Preprocessing:
    return Preprocessing.model_validate({"resize": 19, "crop": (17, 17), **values})


@pytest.mark.parametrize("name", ["float", "int8"])
@pytest.mark.parametrize(
    "values",
    [IMAGENET, {"scale": 1 / 127.5, "mean": (1.0,), "std": (1.0,)}],
    ids=["channels", "one"],
)
def test_the_answer_is_that_of_the_pixels_scaled_before(
    folder: Path, name: str, values: dict[str, object]
) -> None:
    model, how = gated(folder / f"{name}.onnx"), scaled(**values)
    outside = byte_input.outside(how, model)
    taking = byte_input.taking_bytes(model, outside.inside)
    (image,) = taking.inputs
    assert (image.dtype, image.shape, image.layout) == ("uint8", (1, 17, 17, 3), "NHWC")
    photo = read(folder / "photo.png")
    stored = to_tensor(photo, outside, image)
    expected = Reference(model).run(to_tensor(photo, how, model.inputs[0]))[0]
    assert Reference(taking).run(stored)[0] == pytest.approx(expected, abs=1e-5)
    if name == "int8":
        # The scaling is a table of each channel.
        graph = graph_of(taking.proto)
        assert not islands(graph)
        tables = [each for each in graph.operators if each.kind == "table"]
        assert len(tables) == (3 if values is IMAGENET else 1)


def build(folder: Path, name: str, output: str, *options: str) -> Bundle:
    model, place = folder / f"{name}.onnx", folder / output
    words = ("--model", model, "--name", "net", "--output", place, *BYTES, *options)
    said = run("compile.build", *words)
    assert said.returncode == 0, said.stderr
    assert "uint8 [1, 17, 17, 3], which the network scales itself" in said.stderr
    bundle = open_bundle(place)
    assert bundle.manifest.preprocessing and bundle.manifest.preprocessing.inside
    assert bundle.manifest.inputs[0].dtype == "uint8"
    succeed("runtime_demo.check", place, "--model", model, "--images", folder)
    return bundle


MODULE = """
import json, sys
sys.path.insert(0, sys.argv[1])
import net, numpy
frame, photo = (numpy.load(path) for path in sys.argv[2:])
grey, bgr = photo[:, :, 1], photo[:, :, ::-1]
refused = []
for pixels, options in (
    (photo.astype("int32"), {}), (grey, {}), (photo, {"format": "GREY"}), (photo, {"format": "YUV"}), (photo[:0], {}),
    (photo.tobytes(), {}), (photo.tobytes(), {"width": 90, "height": 71}), (frame.astype("float32"), {}),
):
    try:
        net.image(pixels, **options)
    except ValueError as error:
        refused.append(str(error))
with net.Network() as network:
    outputs = [network.run(frame), network.run(net.image(photo))]
images = [
    net.image(photo), net.image(bgr, "BGR"), net.image(photo.tobytes(), width=90, height=70),
    net.image(grey.tobytes(), "GREY", 90, 70), net.image(grey, "GREY"),
]
labels = [net.label(index) for index in range(net.LABELS)]
print(json.dumps([[list(each) for each in outputs], [list(each) for each in images], labels, refused]))
"""


def test_a_library_takes_a_camera_s_bytes(folder: Path) -> None:
    names = ["cat", "dog", "owl", 'a "bird"', "é"]
    (folder / "labels.txt").write_text("\n".join(names))
    words = ("--format", "standalone", "--labels", str(folder / "labels.txt"), *MANY)
    bundle = build(folder, "float", "library", *words)
    header = (bundle.path / "net.h").read_text()
    assert "net_run(net_t *, const uint8_t *input" in header
    assert '#include "net_image.h"' in header and '#include "net_labels.h"' in header
    photo = read(folder / "photo.png")
    frame = photo.image.resize((17, 17))
    np.save(folder / "frame.npy", np.asarray(frame))
    np.save(folder / "photo.npy", np.asarray(photo.image))
    arrays = [folder / "frame.npy", folder / "photo.npy"]
    command = [sys.executable, "-c", MODULE, *map(str, [bundle.path, *arrays])]
    text = subprocess.run(command, capture_output=True, check=True, text=True).stdout
    outputs, images, labels, refused = json.loads(text)
    assert labels == names
    assert len(refused) == 8
    assert refused[0] == "pixels are int32 70x90x3, not uint8 70x90x3"

    model, manifest = gated(folder / "float.onnx"), bundle.manifest
    how, outside = scaled(**IMAGENET), manifest.preprocessing
    assert outside is not None
    whole = how.model_copy(update={"fit": "stretch", "resize": (17, 17)})
    tensors = [
        to_tensor(photo._replace(image=frame), whole, model.inputs[0]),
        to_tensor(photo, how, model.inputs[0]),
    ]
    for output, tensor in zip(outputs, tensors, strict=True):
        answer = Reference(model).run(tensor)[0].ravel()
        assert output == pytest.approx(answer, abs=1e-4)
    expected = to_tensor(photo, outside, manifest.inputs[0]).ravel().tolist()
    assert images[:3] == [expected] * 3
    green = photo._replace(image=photo.image.getchannel("G").convert("RGB"))
    expected = to_tensor(green, outside, manifest.inputs[0]).ravel().tolist()
    assert images[3:] == [expected] * 2


def test_an_int8_bundle_takes_a_camera_s_bytes(folder: Path) -> None:
    bundle = build(folder, "int8", "bundle", *MANY)
    assert bundle.manifest.lowering.float_operators == 0


def test_a_cortex_m_project_takes_a_camera_s_bytes(folder: Path) -> None:
    (folder / "five.txt").write_text("a\nb\nc\nd\ne\n")
    words = ("--target", "cortex-m4", "--labels", str(folder / "five.txt"), *MANY)
    project = build(folder, "int8", "c", *words)
    assert "int net_run(const uint8_t *input" in (project.path / "net.h").read_text()
    assert project.manifest.firmware
    assert project.manifest.firmware.inputs[0].dtype == "uint8"
    command = ["make", "-s", "-C", str(project.path), "all", "host"]
    made = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (made.returncode, made.stderr) == (0, "")
    members = subprocess.run(
        ["ar", "t", project.path / "libnet.a"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert {"net_image.o", "net_labels.o"} < set(members.stdout.split())


def test_a_build_that_quantises_takes_them_too(folder: Path) -> None:
    words = ("--quantize", "int8", "--calibration", str(folder), "--accept-loss")
    bundle = build(folder, "float", "quantised", "--target", "cortex-m4", *words)
    assert bundle.manifest.quantisation
    reference = onnx.load(bundle.path / bundle.manifest.quantisation.model)
    assert reference.graph.input[0].type.tensor_type.elem_type == TensorProto.UINT8


def test_what_is_no_float_image_is_refused(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Flatten", ["x"], ["a"]),
        helper.make_node("Gemm", ["a", "w"], ["y"], transB=1),
    ]
    y = {"y": (TensorProto.FLOAT, [1, 5])}
    data = network(nodes, {"x": (TensorProto.FLOAT, [1, 8])}, y, {"w": seeded(5, 8)})
    nodes.insert(0, helper.make_node("Cast", ["b"], ["x"], to=TensorProto.FLOAT))
    w = {"w": seeded(5, 192)}
    stored = network(nodes, {"b": (TensorProto.UINT8, [1, 3, 8, 8])}, y, w)
    for model, why in ((data, "are data, not images"), (stored, "is uint8 already")):
        onnx.save(model, tmp_path / "m.onnx")
        said = run("compile.build", "--model", tmp_path / "m.onnx", *BYTES)
        assert said.returncode == 2
        assert "--input-type uint8: the input" in said.stderr and why in said.stderr
        assert not (tmp_path / "out").exists()
