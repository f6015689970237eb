"""Networks that take uint8 or int8: pixels as they are, or stored values of a quantised network."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from conftest import run, succeed
from onnx import TensorProto, helper
from PIL import Image
from ports import check, network, seeded, verified

from netship.bundle import inputs
from netship.bundle.golden import normalise, read_golden
from netship.bundle.manifest import ModelIdentity, Preprocessing, Quantised
from netship.bundle.store import open_bundle
from netship.compile.frontend import gate
from netship.devices.sessions.opening import open_here
from netship.devices.sessions.standalone import StandaloneSession
from netship.targets.toolchain import run_zig

pytestmark = pytest.mark.slow

FORMATS = pytest.mark.parametrize("format", ["bundle", "standalone"])


def of_bytes(kind: int, *shape: int) -> onnx.ModelProto:
    """A network that scales the bytes of its input itself."""
    nodes = [
        helper.make_node("Cast", ["x"], ["a"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["a", "scale"], ["b"]),
        helper.make_node("Flatten", ["b"], ["c"]),
        helper.make_node("Gemm", ["c", "w"], ["y"], transB=1),
    ]
    weights = {"scale": np.float32(1 / 255), "w": seeded(5, int(np.prod(shape)))}
    y = {"y": (TensorProto.FLOAT, [1, 5])}
    return network(nodes, {"x": (kind, list(shape))}, y, weights)


@FORMATS
@pytest.mark.parametrize("kind", ["uint8", "int8"])
def test_an_image_of_bytes_stays_one(tmp_path: Path, format: str, kind: str) -> None:
    onnx.save(
        of_bytes(getattr(TensorProto, kind.upper()), 1, 3, 8, 6), tmp_path / "m.onnx"
    )
    built, model = tmp_path / "built", ("--model", tmp_path / "m.onnx")
    said = run(
        "compile.build", *model, "--format", format, "--name", "net", "--output", built
    )
    assert said.returncode == 0, said.stderr
    assert ("--name net: a bundle has no C" in said.stderr) == (format == "bundle")
    formula = {"uint8": "v", "int8": "v − 128"}[kind]
    assert f"preprocessing: {formula}; the input is {kind}" in said.stderr
    bundle = open_bundle(built)
    assert bundle.manifest.inputs[0].dtype == kind
    Image.effect_noise((32, 40), 90).save(tmp_path / "a.png")
    array = np.arange(144).astype(kind).reshape(1, 3, 8, 6)
    np.save(tmp_path / "b.npy", array)
    images = (tmp_path / "a.png", tmp_path / "b.npy")
    assert check(built, *model, "--images", *images)["images"] == 2
    assert "PASS" in verified(built)
    assert "class" in succeed("runtime_demo.run", built, "--image", *images)
    golden = read_golden(bundle)
    assert all(each.inputs[0].dtype == kind for each in golden)
    assert np.ptp(golden[0].inputs[0].astype(int)) > 200
    # The pixels themselves: a photograph of one colour.
    Image.new("RGB", (32, 40), (255, 130, 0)).save(tmp_path / "a.png")
    manifest = bundle.manifest
    photo = inputs.read(images[0], manifest.inputs, manifest.preprocessing).tensors[0]
    middle = 0 if kind == "uint8" else 128
    assert photo.dtype == kind and photo.shape == (1, 3, 8, 6)
    assert [set(each.ravel()) for each in photo[0].astype(int)] == [
        {value - middle} for value in (255, 130, 0)
    ]
    with open_here(bundle) as session:
        with pytest.raises(ValueError, match=f"float32, not {kind}"):
            session.run(np.zeros((1, 3, 8, 6), np.float32))
        if isinstance(session, StandaloneSession):
            session.self_test()
            header = (built / "net.h").read_text()
            assert (
                f"int net_run(net_t *, const {kind}_t *input, float *output);" in header
            )
    if format == "standalone":
        words = (
            built / "example.c",
            f"-I{built}",
            built / "libnet.a",
            "-lpthread",
            "-lm",
        )
        run_zig("cc", built / "example", "-Wall", "-Wextra", "-Werror", *words)
        subprocess.run([built / "example", built / "golden/0.input.bin"], check=True)
        program = (
            "from pathlib import Path; from net import Network\n"
            "print(len(Network().run(Path('golden/1.input.bin').read_bytes())))"
        )
        subprocess.run([sys.executable, "-c", program], cwd=built, check=True)


@pytest.mark.parametrize("kind", ["uint8", "int8"])
def test_c_takes_an_image_of_bytes(tmp_path: Path, kind: str) -> None:
    proto = of_bytes(getattr(TensorProto, kind.upper()), 1, 3, 8, 6)
    onnx.save(proto, tmp_path / "m.onnx")
    options = ("--model", tmp_path / "m.onnx", "--target", "cortex-m7")
    succeed("compile.build", *options, "--output", tmp_path / "built")
    manifest = open_bundle(tmp_path / "built").manifest
    assert manifest.measured["verification"]["relative_error"] < 1e-6
    assert manifest.firmware is not None and manifest.firmware.inputs[0].dtype == kind
    measured = manifest.measured
    assert measured["weight_bytes"] == manifest.firmware.weights_bytes
    assert "library_bytes" not in measured


def test_an_input_of_bytes_is_quantised_as_the_network_reads_it() -> None:
    nodes = [
        helper.make_node("Transpose", ["x"], ["t"], perm=[0, 3, 1, 2]),
        helper.make_node("DequantizeLinear", ["t", "s", "z"], ["y"]),
    ]
    kind, weights = (
        (TensorProto.UINT8, [1, 4, 6, 3]),
        {"s": np.float32(0.5), "z": np.uint8(130)},
    )
    y = {"y": (TensorProto.FLOAT, [1, 3, 4, 6])}
    proto = network(nodes, {"x": kind}, y, weights)
    found = gate.check(proto, ModelIdentity(name="m", sha256="0" * 64)).inputs[0]
    assert found.quantised == Quantised(scale=0.5, zero=130)
    settings = Preprocessing(resize=6, crop=(4, 6), scale=1, mean=(10,), std=(2,))
    pixels = np.full((3, 4, 6), 21.0)
    assert set(normalise(pixels, settings, found).ravel()) == {141}
    assert set(normalise(pixels * 12, settings, found).ravel()) == {255}


def quantised(kind: str, ends_in_floats: bool) -> onnx.ModelProto:
    """A QDQ network whose input is stored values, and whose output is, too, unless it ends in floats."""
    random, stored = np.random.default_rng(5), np.dtype(kind)
    middle = 128 if kind == "uint8" else 0
    weights: dict[str, Any] = {
        "s": np.float32(0.02),
        "z": np.array(middle - 3, stored),
        "w": random.integers(-100, 100, (8, 3, 3, 3)).astype(np.int8),
        "ws": np.float32(0.01),
        "wz": np.int8(0),
        "b": random.integers(-50, 50, 8).astype(np.int32),
        "bs": np.float32(0.0002),
        "as": np.float32(0.05),
        "az": np.array(middle + 4, stored),
        "fw": random.integers(-100, 100, (10, 8)).astype(np.int8),
    }

    def as_float(name: str, *facts: str) -> onnx.NodeProto:
        return helper.make_node("DequantizeLinear", [name, *facts], [f"{name}/real"])

    def as_stored(name: str, made: str = "") -> onnx.NodeProto:
        return helper.make_node(
            "QuantizeLinear", [name, "as", "az"], [made or f"{name}/q"]
        )

    nodes = [
        as_float("x", "s", "z"),
        as_float("w", "ws", "wz"),
        as_float("b", "bs"),
        helper.make_node("Conv", ["x/real", "w/real", "b/real"], ["c"], strides=[2, 2]),
        as_stored("c"),
        as_float("c/q", "as", "az"),
        helper.make_node("GlobalAveragePool", ["c/q/real"], ["p"]),
        as_stored("p"),
        as_float("p/q", "as", "az"),
        helper.make_node("Flatten", ["p/q/real"], ["f"]),
        as_float("fw", "ws", "wz"),
        helper.make_node("Gemm", ["f", "fw/real"], ["g"], transB=1),
        as_stored("g", "" if ends_in_floats else "y"),
    ]
    if ends_in_floats:
        end = helper.make_node("DequantizeLinear", ["g/q", "as", "az"], ["y"])
        nodes.append(end)
    type_of = helper.np_dtype_to_tensor_dtype(stored)
    y = {"y": (TensorProto.FLOAT if ends_in_floats else type_of, [1, 10])}
    return network(nodes, {"x": (type_of, [1, 3, 16, 12])}, y, weights)


@pytest.mark.parametrize("kind", ["int8", "uint8"])
@pytest.mark.parametrize(
    ("target", "format", "ends_in_floats"),
    [
        ("native", "bundle", True),
        ("native", "standalone", False),
        ("arm-cortex-a72", "bundle", False),
        ("cortex-m7", "c", True),
        ("cortex-m7", "c", False),
    ],
)
def test_a_quantised_network_takes_and_gives_stored_values(
    tmp_path: Path, kind: str, target: str, format: str, ends_in_floats: bool
) -> None:
    onnx.save(quantised(kind, ends_in_floats), tmp_path / "m.onnx")
    built = tmp_path / "built"
    options = ("--model", tmp_path / "m.onnx", "--target", target, "--format", format)
    succeed("compile.build", *options, "--output", built)
    manifest = open_bundle(built).manifest
    assert manifest.measured["verification"]["max_abs_error"] == 0
    outputs = "float32" if ends_in_floats else kind
    assert (manifest.inputs[0].dtype, manifest.outputs[0].dtype) == (kind, outputs)
    zero = {"int8": -3, "uint8": 125}[kind]
    assert manifest.inputs[0].quantised is not None
    assert manifest.inputs[0].quantised.zero == zero
    if target == "native":
        Image.effect_noise((32, 40), 90).save(tmp_path / "a.png")
        images = ("--images", tmp_path / "a.png")
        assert check(built, *options[:2], *images)["images"] == 1
        assert "PASS" in verified(built)
