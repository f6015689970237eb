"""Networks whose inputs are no images, or whose outputs are no float32, from the build to the check, in each format."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from conftest import run, succeed
from onnx import TensorProto, helper
from ports import check, network, seeded, verified

from netship.bundle.golden import read_golden
from netship.bundle.store import MANIFEST, open_bundle, sha256_of
from netship.devices.sessions.opening import open_here
from netship.devices.sessions.session import Origin
from netship.devices.sessions.standalone import open_standalone
from netship.targets.errors import UserError
from netship.targets.toolchain import run_zig

Built = Callable[..., Path]

pytestmark = pytest.mark.slow

FORMATS = pytest.mark.parametrize("format", ["bundle", "standalone"])


def autoencoder() -> onnx.ModelProto:
    nodes = [
        helper.make_node("Gemm", ["x", "w1"], ["a"], transB=1),
        helper.make_node("Relu", ["a"], ["b"]),
        helper.make_node("Gemm", ["b", "w2"], ["y"], transB=1),
    ]
    weights = {"w1": seeded(32, 640), "w2": seeded(640, 32)}
    row = (TensorProto.FLOAT, ["batch", 640])
    return network(nodes, {"x": row}, {"y": row}, weights)


def keywords() -> onnx.ModelProto:
    """A spectrogram's words: one channel, and no photograph."""
    nodes = [
        helper.make_node("Conv", ["x", "w1"], ["a"], strides=[2, 2], pads=[4, 1, 5, 1]),
        helper.make_node("Relu", ["a"], ["b"]),
        helper.make_node("GlobalAveragePool", ["b"], ["c"]),
        helper.make_node("Flatten", ["c"], ["d"]),
        helper.make_node("Gemm", ["d", "w2"], ["y"], transB=1),
    ]
    weights = {"w1": seeded(8, 1, 10, 4), "w2": seeded(12, 8)}
    spectrogram = (TensorProto.FLOAT, [1, 1, 49, 10])
    return network(
        nodes, {"x": spectrogram}, {"y": (TensorProto.FLOAT, [1, 12])}, weights
    )


def of_shape(*shape: int) -> onnx.ModelProto:
    """A network without weights for an input of any shape."""
    kind = (TensorProto.FLOAT, list(shape))
    nodes = [
        helper.make_node("Mul", ["x", "x"], ["a"]),
        helper.make_node("Sigmoid", ["a"], ["b"]),
        helper.make_node("Sub", ["x", "b"], ["y"]),
    ]
    return network(nodes, {"x": kind}, {"y": kind}, {})


MODELS = {
    "autoencoder": (autoencoder(), ""),
    "keywords": (keywords(), 'layout = "data"'),
    "rank1": (of_shape(40), ""),
    "rank3": (of_shape(1, 9, 128), ""),
    "channels8": (of_shape(1, 8, 16, 4), ""),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for name, (proto, sidecar) in MODELS.items():
        onnx.save(proto, folder / f"{name}.onnx")
        (folder / f"{name}.toml").write_text(sidecar)
    return folder


def made(built: Built, models: Path, name: str, format: str) -> Path:
    options = ("--format", format, "--name", name)
    return built(models / f"{name}.onnx", "native", *options)


@FORMATS
@pytest.mark.parametrize("name", ["autoencoder", "keywords"])
def test_data_in_npy_files_is_run_and_checked(
    built: Built, models: Path, tmp_path: Path, format: str, name: str
) -> None:
    bundle, model = made(built, models, name, format), models / f"{name}.onnx"
    manifest = open_bundle(bundle).manifest
    assert manifest.preprocessing is None and not manifest.inputs[0].layout
    for index in range(2):
        data = 5 * seeded(*manifest.inputs[0].shape)
        np.save(tmp_path / f"{index}.npy", data[0] if index else data)
    found = check(bundle, "--model", model, "--images", tmp_path)
    assert (found["compared"], found["images"]) == ("images", 2)
    report = tmp_path / "report.html"
    assert check(bundle, "--report", report)["compared"] == "golden inputs"
    assert "none: the input is data" in report.read_text()
    assert "PASS" in verified(bundle)
    said = succeed("runtime_demo.run", bundle, "--image", tmp_path / "0.npy")
    assert "0.npy\n" in said and "latency: median" in said
    with open_here(open_bundle(bundle)) as session:
        assert session.origin is Origin.HOST
        with pytest.raises(UserError, match="input 'x': has NaN or infinity"):
            session.run(np.full(manifest.inputs[0].shape, np.nan, np.float32))


@FORMATS
@pytest.mark.parametrize("name", ["rank1", "rank3", "channels8"])
def test_data_of_any_rank_answers_as_onnx_runtime(
    built: Built, models: Path, format: str, name: str
) -> None:
    bundle = made(built, models, name, format)
    verification = open_bundle(bundle).manifest.measured["verification"]
    assert verification["relative_error"] < 1e-6
    assert "PASS" in verified(bundle)


def test_data_of_rank_4_is_read_by_a_microcontroller(
    models: Path, tmp_path: Path
) -> None:
    """Its channels lie last in memory, whether they are said to be channels or not."""
    model, data = models / "channels8.onnx", seeded(1, 8, 16, 4)
    options = ("--model", model, "--target", "cortex-m7", "--layout", "data")
    succeed("compile.build", *options, "--output", tmp_path / "built")
    with open_here(open_bundle(tmp_path / "built")) as session:
        (found,) = session.run(data)
    wanted = data - 1 / (1 + np.exp(-data * data))
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5)


def answers(*outputs: str) -> onnx.ModelProto:
    """Places, truths and bytes of an image's three channels."""
    nodes = [
        helper.make_node("ArgMax", ["x"], ["place"], axis=1, keepdims=0),
        helper.make_node("TopK", ["x", "two"], ["best", "places"], axis=1),
        helper.make_node("Cast", ["places"], ["small"], to=TensorProto.INT32),
        helper.make_node("Greater", ["x", "half"], ["truth"]),
        helper.make_node("Cast", ["truth"], ["mask"], to=TensorProto.UINT8),
        helper.make_node("Cast", ["place"], ["first"], to=TensorProto.INT32),
        helper.make_node("Neg", ["first"], ["less"]),
        helper.make_node("Cast", ["less"], ["signed"], to=TensorProto.INT8),
    ]
    kinds = {
        "place": (TensorProto.INT64, [1, 5, 3]),
        "best": (TensorProto.FLOAT, [1, 2, 5, 3]),
        "places": (TensorProto.INT64, [1, 2, 5, 3]),
        "small": (TensorProto.INT32, [1, 2, 5, 3]),
        "truth": (TensorProto.BOOL, [1, 3, 5, 3]),
        "mask": (TensorProto.UINT8, [1, 3, 5, 3]),
        "signed": (TensorProto.INT8, [1, 5, 3]),
    }
    return network(
        nodes,
        {"x": (TensorProto.FLOAT, [1, 3, 5, 3])},
        {name: kinds[name] for name in outputs},
        {"two": np.array([2]), "half": np.float32(0.25)},
    )


def test_outputs_of_every_type_are_exact_in_a_bundle(tmp_path: Path) -> None:
    names = ("place", "best", "places", "small", "truth", "mask", "signed")
    onnx.save(answers(*names), tmp_path / "answers.onnx")
    options = ("--model", tmp_path / "answers.onnx")
    bundle = tmp_path / "built"
    succeed("compile.build", *options, "--output", bundle)
    manifest = open_bundle(bundle).manifest
    kinds = ["int64", "float32", "int64", "int32", "bool", "uint8", "int8"]
    assert [each.dtype for each in manifest.outputs] == kinds
    image = seeded(1, 3, 5, 3)
    np.save(tmp_path / "image.npy", image)
    found = check(bundle, *options, "--images", tmp_path / "image.npy")
    assert found["max_abs_error"] == 0 and found["top1_agreement"] is None
    check(bundle, "--report", tmp_path / "report.html")
    assert "PASS" in verified(bundle)
    result = run("runtime_demo.run", bundle, "--image", tmp_path / "image.npy")
    assert result.returncode == 2
    assert "output 'place' is 1×5×3 of int64, not one score a class" in result.stderr
    with open_here(open_bundle(bundle)) as session:
        outputs = session.run(image)
    assert [each.dtype.name for each in outputs] == kinds
    assert np.array_equal(outputs[0], image.argmax(1))
    assert np.array_equal(outputs[4], image > 0.25)
    spoil_an_integer(bundle)
    result = run("runtime_demo.check", bundle, "--repeat", "1")
    assert result.returncode == 1, result.stderr


def spoil_an_integer(bundle: Path) -> None:
    """One golden place off by one."""
    path = bundle / "golden/0.output0.bin"
    places = np.frombuffer(path.read_bytes(), "<i8").copy()
    places[3] ^= 1
    path.write_bytes(places.tobytes())
    manifest = json.loads((bundle / MANIFEST).read_text())
    manifest["files"]["golden/0.output0.bin"] = sha256_of(path)
    (bundle / MANIFEST).write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("output", "kind"),
    [("place", "int64_t"), ("truth", "uint8_t"), ("signed", "int8_t")],
)
def test_an_output_of_another_type_is_exact_in_a_library(
    tmp_path: Path, output: str, kind: str
) -> None:
    onnx.save(answers(output), tmp_path / "answers.onnx")
    built = tmp_path / "built"
    options = ("--format", "standalone", "--name", "net", "--output", built)
    succeed("compile.build", "--model", tmp_path / "answers.onnx", *options)
    header = (built / "net.h").read_text()
    assert f"int net_run(net_t *, const float *input, {kind} *output);" in header
    assert check(built)["max_abs_error"] == 0
    assert "PASS" in verified(built)
    bundle = open_bundle(built)
    golden = read_golden(bundle)[1]
    with open_standalone(bundle) as session:
        session.self_test()
        assert np.array_equal(session.run(golden.inputs[0])[0], golden.outputs[0])
    program = (
        "import sys; from pathlib import Path; from net import Network\n"
        "output = Network().run(Path('golden/1.input.bin').read_bytes())\n"
        "sys.exit(output.tobytes() != Path('golden/1.output0.bin').read_bytes())"
    )
    subprocess.run([sys.executable, "-c", program], cwd=built, check=True)
    words = (built / "example.c", f"-I{built}", built / "libnet.a", "-lpthread", "-lm")
    run_zig("cc", built / "example", "-Wall", "-Wextra", "-Werror", *words)
    said = subprocess.run(
        [built / "example", built / "golden/1.input.bin"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    first = golden.outputs[0].ravel()[:16].astype(int)
    assert said.splitlines()[2].split() == [str(each) for each in first]


def test_a_library_cannot_sort(tmp_path: Path) -> None:
    onnx.save(answers("places"), tmp_path / "m.onnx")
    options = ("--model", tmp_path / "m.onnx", "--output", tmp_path / "built")
    result = run("compile.build", *options, "--format", "standalone")
    assert result.returncode == 2
    assert "TopK" in result.stderr and "use --format bundle, or end" in result.stderr


def test_arrays_make_the_golden_data(models: Path, tmp_path: Path) -> None:
    data = seeded(1, 640)
    np.save(tmp_path / "data.npy", data)
    options = ("--model", models / "autoencoder.onnx", "--output", tmp_path / "built")
    succeed("compile.build", *options, "--golden", tmp_path / "data.npy")
    golden = (tmp_path / "built/golden/0.input.bin").read_bytes()
    assert golden == data.tobytes()
    result = run("compile.build", *options, "--scale", "1/255")
    assert (result.returncode, result.stdout) == (2, "")
    words = "error: --scale: the input [1, 640] is data, not an image; leave it out"
    assert words in result.stderr
