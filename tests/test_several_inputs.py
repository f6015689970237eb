"""Networks of several inputs: in every format, from files, and what of these is refused."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from conftest import run, succeed
from onnx import TensorProto, helper
from PIL import Image
from ports import check, network, seeded, verified

from netship.bundle import inputs
from netship.bundle.golden import of_all, read_golden, seeded_inputs
from netship.bundle.manifest import ModelIdentity, Tensor
from netship.bundle.store import open_bundle
from netship.compile.backends.request import BuildRequest
from netship.compile.driver import build
from netship.compile.frontend import gate
from netship.devices.sessions.opening import open_here
from netship.targets.errors import UserError
from netship.targets.presets import resolve
from netship.targets.progress import Progress

FLOAT, INT32, INT64 = TensorProto.FLOAT, TensorProto.INT32, TensorProto.INT64
IDENTITY = ModelIdentity(name="several.onnx", sha256="0" * 64)
PORTS = (Tensor(name="a/b", shape=(1, 4)), Tensor(name="b", shape=(1, 2, 3)))
GOOD = {"a/b": np.ones((1, 4), np.float32), "b": np.ones((1, 2, 3), np.float32)}


def everything() -> onnx.ModelProto:
    """An image, a row, a map, two kinds of indices; one is an output too, one is not used, one is read twice."""
    n = helper.make_node
    nodes = [
        n("Conv", ["pixels", "w"], ["c"], "conv", pads=[1, 1, 1, 1]),
        n("Concat", ["c", "map"], ["both"], "join", axis=1),
        n("Relu", ["both"], ["r"], "relu"),
        n("GlobalAveragePool", ["r"], ["mean"], "mean"),
        n("Flatten", ["mean"], ["flat"], "flat"),
        n("Mul", ["age", "age"], ["square"], "square"),
        n("Add", ["flat", "square"], ["sum"], "sum"),
        n("Gather", ["table", "token ids"], ["words"], "words", axis=0),
        n("Gather", ["places", "row"], ["place"], "place", axis=0),
        n("Add", ["words", "place"], ["text"], "text"),
        n("Identity", ["age"], ["same age"], "copy"),
    ]
    given = {
        "pixels": (FLOAT, [1, 3, 6, 6]),
        "age": (FLOAT, [1, 4]),
        "map": (FLOAT, [1, 2, 6, 6]),
        "token ids": (INT64, [1, 5]),
        "row": (INT32, [1]),
        "spare": (FLOAT, [1, 7]),
    }
    made = {"sum": [1, 4], "text": [1, 5, 8], "same age": [1, 4]}
    weights = {
        "w": seeded(2, 3, 3, 3),
        "table": seeded(11, 8),
        "places": seeded(3, 8),
    }
    outputs = {name: (FLOAT, shape) for name, shape in made.items()}
    return network(nodes, given, outputs, weights)


def added() -> onnx.ModelProto:
    """Two rows of data, of which all is computed on integers where it is quantised."""
    n = helper.make_node
    nodes = [
        n("Gemm", ["a", "wa"], ["x"], "first"),
        n("Gemm", ["b", "wb"], ["y"], "second"),
        n("Add", ["x", "y"], ["z"], "sum"),
        n("Relu", ["z"], ["r"], "relu"),
        n("Gemm", ["r", "wc"], ["scores"], "last"),
    ]
    row = (FLOAT, [1, 16])
    weights = {"wa": seeded(16, 12), "wb": seeded(16, 12)[::-1], "wc": seeded(12, 5)}
    return network(nodes, {"a": row, "b": row}, {"scores": (FLOAT, [1, 5])}, weights)


LONG = "model/" + "a_step_of_a_converted_network/" * 7


def sequence() -> onnx.ModelProto:
    """Data of rank 3; names as long as converters make them."""
    n = helper.make_node
    nodes = [
        n("Flatten", ["values"], ["flat"], f"{LONG}flatten"),
        n("Gemm", ["flat", "w"], [f"{LONG}hidden"], f"{LONG}dense"),
        n("Relu", [f"{LONG}hidden"], [f"{LONG}relu"], f"{LONG}relu"),
        n("Gemm", [f"{LONG}relu", "v"], ["scores"], f"{LONG}last"),
    ]
    weights = {"w": seeded(288, 8), "v": seeded(8, 4)}
    given, made = {"values": (FLOAT, [1, 9, 32])}, {"scores": (FLOAT, [1, 4])}
    return network(nodes, given, made, weights)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The two models, and samples of the second."""
    made = tmp_path_factory.mktemp("several")
    onnx.save(everything(), made / "every.onnx")
    onnx.save(added(), made / "added.onnx")
    onnx.save(sequence(), made / "sequence.onnx")
    random = np.random.default_rng(0)
    (made / "samples").mkdir()
    for number in range(8):
        rows = {name: random.normal(size=(1, 16)).astype(np.float32) for name in "ab"}
        np.savez(made / f"samples/{number}.npz", **rows)  # type: ignore[arg-type]
    return made


def built(folder: Path, name: str, format: str, **more: Any) -> Path:
    output = folder / f"{name}-{format}"
    if not output.exists():
        target = resolve("cortex-m7" if format == "c" else "native")
        request = BuildRequest(
            str(folder / f"{name}.onnx"),
            target,
            output=output,
            format=format,  # type: ignore[arg-type]
            name=name,
            **more,
        )
        build(request, Progress(quiet=True))
    return output


@pytest.mark.slow
@pytest.mark.parametrize("format", ["bundle", "standalone", "c"])
def test_every_format_takes_inputs_of_every_kind(folder: Path, format: str) -> None:
    bundle = open_bundle(built(folder, "every", format))
    manifest = bundle.manifest
    model = gate.load(folder / "every.onnx")
    reference = onnxruntime.InferenceSession(folder / "every.onnx")
    assert [each.name for each in manifest.inputs][:2] == ["pixels", "age"]
    assert manifest.image == manifest.inputs[0]
    sample = of_all(seeded_inputs, manifest.inputs, manifest.preprocessing)[1]
    assert sample[3].max() > 3 and sample[4].max() < 3  # indices of their tables
    with open_here(bundle) as session:
        outputs = session.run(*sample)
        with pytest.raises(ValueError, match="5 inputs, not 6"):
            session.run(*sample[:-1])
    expected = reference.run(None, model.feeds(sample))
    for ours, theirs in zip(outputs, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-6)
    assert np.array_equal(outputs[2], sample[1])


@pytest.mark.slow
@pytest.mark.parametrize("format", ["standalone", "c"])
def test_int8_is_calibrated_on_samples_of_several_arrays(
    folder: Path, format: str
) -> None:
    samples = folder / "samples"
    options = {"quantize": True, "calibration": (samples,), "accept_loss": True}
    result = built(folder, "added", format, **options)
    bundle = open_bundle(result)
    for given, expected, _ in read_golden(bundle):
        with open_here(bundle) as session:
            assert np.array_equal(session.run(*given), expected)
    firmware = bundle.manifest.firmware
    if firmware is None:
        found = check(result, "--model", folder / "added.onnx", "--images", samples)
        assert found["max_abs_error"] == 0
        return
    assert firmware.exact
    assert [each.dtype for each in firmware.inputs] == ["int8", "int8"]


@pytest.mark.slow
def test_a_c_project_s_page_names_what_its_header_defines(folder: Path) -> None:
    options = {"calibration": (folder / "samples",), "accept_loss": True}
    project = built(folder, "added", "c", quantize=True, **options)
    page, header = ((project / name).read_text() for name in ("README.md", "added.h"))
    named = set(re.findall(r"\bADDED_\w+", page))
    assert named <= set(re.findall(r"\bADDED_\w+", header))
    assert {f"ADDED_INPUT{i}_ZERO_POINT" for i in range(2)} <= named
    assert "NHWC" not in page and "photograph" not in page
    assert "- Input 1, b: data, 1x16; the last index changes fastest,\n" in page


@pytest.mark.slow
def test_a_c_project_s_page_says_which_inputs_are_images(folder: Path) -> None:
    page = (built(folder, "every", "c") / "README.md").read_text()
    assert (
        "- Input 0, pixels: rows of pixels of channels (NHWC).\n  `every_image`" in page
    )
    assert page.count("NHWC") == page.count("makes it of an image") == 1
    moved = "data, 1x2x6x6, whose axis 1 (counted from 0) lies last in memory: 1x6x6x2;"
    assert f"- Input 2, map: {moved} the last index changes fastest.\n" in page
    assert "/* map, 1x6x6x2 */" in page
    library = (built(folder, "every", "standalone") / "README.md").read_text()
    assert "`every_image` makes input 0 of an image" in library


@pytest.mark.slow
def test_the_pages_of_a_network_of_data_speak_of_no_image(folder: Path) -> None:
    project = built(folder, "sequence", "c")
    page = (project / "README.md").read_text()
    assert "- Input: data, 1x9x32; the last index changes fastest.\n" in page
    assert "float *input = arena.values" in page and "/* your data, 1x9x32 */" in page
    library = (built(folder, "sequence", "standalone") / "README.md").read_text()
    main = (project / "example/main.c").read_text()
    header = (project / "sequence.h").read_text()
    for text in (page, library, main, header):
        assert not re.search("pixel|photograph|camera|image|preprocessing", text)
    # Long names: by their ends here, whole in the manifest.
    assert LONG not in page and "_network/dense" in page
    rows = [line for line in page.split("\n") if line.startswith("|")]
    assert max(map(len, rows)) < 200
    assert LONG in (project / "manifest.json").read_text()


@pytest.mark.slow
def test_the_boards_program_and_the_module_take_a_file_for_each_input(
    folder: Path,
) -> None:
    assert "PASS" in verified(built(folder, "every", "bundle"))
    library = built(folder, "every", "standalone")
    assert "PASS" in verified(library)
    script = (
        "from every import Network\n"
        "files = [open(f'golden/0.input{k}.bin', 'rb').read() for k in range(6)]\n"
        "named = {f'input{k}': each for k, each in enumerate(files)}\n"
        "network = Network()\n"
        "found = network.run(*files)\n"
        "assert found == network.run(**named)\n"
        "print(list(found[0]))\n"
    )
    said = subprocess.check_output([sys.executable, "-c", script], cwd=library)
    [expected, *_] = read_golden(open_bundle(library))[0].outputs
    np.testing.assert_allclose(json.loads(said), expected[0], atol=1e-6)


GIVEN = """
import json, sys
from array import array
import numpy as np
from every import Network

names = [f"input{k}" for k in range(6)]
good = dict(zip(names, map(np.load, sys.argv[1:])))
network = Network()
expected = network.run(**good)


def said(**more):
    try:
        return network.run(**good | more) == expected
    except ValueError as error:
        return str(error)


pixels, tokens, row = good["input0"], good["input3"], good["input4"]
backwards = pixels.transpose(2, 3, 1, 0).copy().transpose(3, 2, 0, 1)
wide = np.zeros((1, 3, 6, 12), np.float32)
wide[..., ::2] = pixels
print(json.dumps([
    said(input0=backwards), said(input0=wide[..., ::2]), said(input0=pixels[0]), said(input0=pixels.ravel()),
    said(input0=pixels.astype("<f4")), said(input0=pixels.tobytes()), said(input0=bytearray(pixels)),
    said(input0=memoryview(pixels.tobytes())), said(input0=array("f", pixels.ravel())),
    said(input3=array("q", tokens.ravel())), said(input3=tokens.astype(np.longlong)), said(input4=row.tobytes()),
    said(input0=pixels.astype(float)), said(input0=np.zeros(54)), said(input0=pixels.view(np.int32)),
    said(input0=np.zeros((3, 9), np.int64).ravel()), said(input0=pixels.transpose(0, 2, 3, 1)),
    said(input0=pixels.astype(">f4")), said(input0=pixels.tobytes()[1:]), said(input0=pixels.ravel()[1:]),
    said(input3=tokens.view(np.uint64)), said(input3=np.zeros(10, np.int32)), said(input4=np.zeros((1, 1), np.int32)),
]))
"""


@pytest.mark.slow
def test_the_module_takes_any_buffer_of_the_right_type_and_shape(folder: Path) -> None:
    library, files = built(folder, "every", "standalone"), []
    bundle = open_bundle(library)
    for port, values in zip(
        bundle.manifest.inputs, read_golden(bundle)[0].inputs, strict=True
    ):
        files.append(folder / f"given {port.name}.npy")
        np.save(files[-1], values)
    command = [sys.executable, "-c", GIVEN, *map(str, files)]
    found = json.loads(subprocess.check_output(command, cwd=library))
    assert found[:12] == [True] * 12
    image = "not float32 1x3x6x6 (432 bytes)"
    assert found[12:] == [
        f"input0 is float64 1x3x6x6, {image}",
        f"input0 is float64 54, {image}",
        f"input0 is int32 1x3x6x6, {image}",
        f"input0 is int64 27, {image}",
        f"input0 is float32 1x6x6x3, {image}",
        f"input0 is >f 1x3x6x6, {image}",
        f"input0 is 431 bytes, {image}",
        f"input0 is float32 107, {image}",
        "input3 is uint64 1x5, not int64 1x5 (40 bytes)",
        "input3 is int32 10, not int64 1x5 (40 bytes)",
        "input4 is int32 1x1, not int32 1 (4 bytes)",
    ]


@pytest.mark.slow
def test_one_image_and_fixed_inputs(folder: Path) -> None:
    library, fixed = built(folder, "every", "standalone"), []
    [first, *_] = read_golden(open_bundle(library))
    for port, values in zip(
        open_bundle(library).manifest.inputs[1:], first.inputs[1:], strict=True
    ):
        np.save(folder / f"{port.name}.npy", values)
        fixed += ["--input", f"{port.name}={folder / port.name}.npy"]
    Image.new("RGB", (9, 9), "red").save(folder / "photo.png")
    photo = folder / "photo.png"
    seen = json.loads(
        succeed("runtime_demo.run", library, "--image", photo, *fixed, "--json")
    )
    assert [each["name"] for each in seen["images"]] == ["photo.png"]
    model = ("--model", folder / "every.onnx")
    assert check(library, *model, "--images", photo, *fixed)["passed"]
    for options, words in (
        (fixed, "needs the input 'pixels'; give --image"),
        (
            ["--image", photo],
            "array for each, or, of run and check, --input age=FILE.npy, --input map=FILE.npy, ",
        ),
        (
            ["--input", "hue=x.npy"],
            "--input hue: there is no such input, only 'pixels'",
        ),
        ([*fixed, *fixed[:2]], "--input age: is given twice"),
    ):
        refused = run("runtime_demo.run", library, *options)
        assert refused.returncode == 2 and words in refused.stderr
        assert refused.stderr.count("error: ") == 1
        assert "Traceback" not in refused.stderr


def test_an_archive_has_an_array_for_each_input(tmp_path: Path) -> None:
    np.savez(tmp_path / "0.npz", **GOOD)  # type: ignore[arg-type]
    (tmp_path / "c.jpg").touch()
    [path] = inputs.find([tmp_path], PORTS)
    (first, second), notes, _ = inputs.read(path, PORTS, None)
    assert np.array_equal(first, GOOD["a/b"]) and np.array_equal(second, GOOD["b"])
    assert notes == ()
    fixed = {"b": GOOD["b"] * 2}
    np.save(tmp_path / "a.npy", GOOD["a/b"])
    (first, second), _, _ = inputs.read(tmp_path / "a.npy", PORTS, None, fixed)
    assert np.array_equal(first, GOOD["a/b"]) and np.array_equal(second, fixed["b"])


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"b": GOOD["b"]}, "has no array 'a/b'; it needs one for each of 'a/b', 'b'"),
        (GOOD | {"c": GOOD["b"]}, "has 'c', which is no input to give"),
        (GOOD | {"b": GOOD["a/b"]}, r"array 'b': has the shape \[1, 4\]"),
        (GOOD | {"b": GOOD["b"].astype(int)}, "array 'b': has int64"),
        (GOOD | {"b": GOOD["b"] * np.nan}, "array 'b': has NaN or infinity"),
        (GOOD | {"b": np.array([[{}]], object)}, "array 'b': not a .npy file of num"),
    ],
    ids=range(6),
)
def test_another_archive_is_one_line(
    tmp_path: Path, arrays: dict[str, Any], words: str
) -> None:
    np.savez(tmp_path / "0.npz", **arrays)
    refused(tmp_path / "0.npz", words)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 no zip", b"\x93NUMPY\x01\x00"])
def test_what_is_no_archive_is_one_line(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "0.npz").write_bytes(content)
    refused(tmp_path / "0.npz", "not a .npz file of arrays")
    refused(tmp_path / "0.npy", "the inputs to give are 'a/b', 'b'; give a .npz file")
    refused(tmp_path / "1.npz", "not a .npz file of arrays")


def refused(path: Path, words: str) -> None:
    with pytest.raises(UserError, match=words) as error:
        inputs.read(path, PORTS, None)
    text = str(error.value)
    assert text.startswith(f"{path}: ") and text.isprintable()


def test_what_is_missing_is_said_with_the_option_that_gives_it(tmp_path: Path) -> None:
    np.savez(tmp_path / "0.npz", **GOOD)  # type: ignore[arg-type]
    one = PORTS[0].model_copy(update={"name": "x"})
    with pytest.raises(
        UserError, match="no array 'x'; name the array so, or give a .n"
    ):
        inputs.read(tmp_path / "0.npz", [one], None)
    image = PORTS[0].model_copy(
        update={"name": "photo", "shape": (1, 3, 8, 8), "layout": "NCHW"}
    )
    age = PORTS[0].model_copy(update={"name": "age"})
    said = "each, or, of run and check, --input age=FILE.npy with the photograph$"
    with pytest.raises(UserError, match=said):
        inputs.read(tmp_path / "cat.jpg", [image, age], None)
    with pytest.raises(UserError, match="or --input NAME=FILE.npy$"):
        inputs.read(tmp_path / "cat.npy", [image, age], None)


def test_the_first_of_two_images_is_the_image() -> None:
    image = (FLOAT, [1, 3, 8, 8])
    add = [helper.make_node("Add", ["left", "right"], ["y"])]
    model = network(add, {"left": image, "right": image}, {"y": image}, {})
    left, right = gate.check(model, IDENTITY).inputs
    assert left.is_image and not right.is_image and right.layout == ""
    assert gate.check(model, IDENTITY, layout="data").image is None


def test_symbolic_sizes_of_each_input_are_filled_in() -> None:
    kinds = {"a": (FLOAT, ["N", 4]), "b": (FLOAT, [1, "width"])}
    add = [helper.make_node("Add", ["a", "b"], ["y"])]
    model = network(add, kinds, {"y": (FLOAT, [1, 4])}, {})
    found = gate.check(model, IDENTITY, {"b": (1, 4)})
    assert [each.shape for each in found.inputs] == [(1, 4), (1, 4)]
    assert found.notes == ("input 'a': symbolic batch N made 1",)
    with pytest.raises(UserError, match="names 'c', but the inputs are 'a' and 'b'"):
        gate.check(model, IDENTITY, {"c": (1, 4)})
    with pytest.raises(UserError, match="'b' has symbolic dimensions .*--input-shape"):
        gate.check(model, IDENTITY)
