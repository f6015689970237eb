"""``import netship``: the page's example as a user's script, typed results, errors, and what it must not print."""

from __future__ import annotations

import inspect
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import graphs
import numpy as np
import onnx
import pytest
from conftest import ROOT, hostile
from integers import project, residuals
from PIL import Image
from test_detect_builds import DECODING
from test_detect_builds import model as detector
from tiny import tiny_bundle

import netship
from netship import api
from netship.compile import driver
from netship.compile.backends.request import BuildRequest
from netship.meter.__main__ import parser as meter_options
from netship.meter.firmware import Inference
from netship.runtime_demo import check as check_command
from netship.targets.errors import UserError
from netship.targets.presets import native
from netship.tuning import apart
from netship.tuning import tune as tune_command

EXAMPLES = re.findall(
    r"^```python\n(.*?)^```",
    (ROOT / "docs" / "api.md").read_text(),
    re.DOTALL | re.MULTILINE,
)


def test_the_example_of_the_page_runs_as_a_script_in_any_folder(tmp_path: Path) -> None:
    here = hostile(tmp_path)
    onnx.save(graphs.torchscript_cnn(17), here / "model.onnx")
    Image.new("RGB", (40, 40), "red").save(here / "photo.png")
    # It has no `if __name__ == "__main__"`, and the main thread is not the only one that may build.
    (here / "example.py").write_text(EXAMPLES[0])
    threaded = "import runpy, threading\n" + (
        "t = threading.Thread(target=runpy.run_path, args=['example.py'])\nt.start()\nt.join()\n"
    )
    (here / "threaded.py").write_text(threaded)
    result = subprocess.run(
        [sys.executable, "threaded.py"],
        cwd=here,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (result.returncode, result.stderr) == (0, "")
    lines = result.stdout.splitlines()
    assert "reading the model" in lines
    assert lines[-2].startswith("True ")
    assert lines[-1].startswith("absent.onnx: cannot be read")


def test_the_other_examples_name_what_there_is() -> None:
    for example in EXAMPLES:
        compile(example, "api.md", "exec")
        for name in re.findall(r"netship\.(\w+)", example):
            assert hasattr(netship, name)


def test_a_build_is_opened_and_checked_without_a_word(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    bundle = tiny_bundle(tmp_path, native())
    said: list[str] = []
    with netship.open(bundle.path, on_progress=said.append) as network:
        shape = network.bundle.manifest.inputs[0].shape
        (output,) = network.run(np.zeros(shape, np.float32))
        assert output.shape == network.bundle.manifest.outputs[0].shape
        with pytest.raises(ValueError, match="input is"):
            network.run(np.zeros((1, 2), np.float32))
    assert said == ["loading the bundle"]
    result = netship.check(bundle, repeat=2)
    assert result.passed and result.latency and len(result.latency.samples) == 2
    assert capfd.readouterr() == ("", "")


def test_what_a_user_can_correct_raises_one_error(tmp_path: Path) -> None:
    assert netship.Error is UserError
    with pytest.raises(netship.Error, match="not a bundle"):
        netship.open(tmp_path)
    with pytest.raises(netship.Error, match="--images needs --model"):
        netship.check(tmp_path, images=[tmp_path])
    with pytest.raises(
        netship.Error, match="preprocessing 'scale': .* is not a number"
    ):
        netship.build("m.onnx", preprocessing={"scale": "white"})
    with pytest.raises(netship.Error, match="nothing to tune"):
        netship.tune("m.onnx", "cortex-m7")
    with pytest.raises(netship.Error, match="not a bundle"):
        netship.estimate(tmp_path, "cortex-a72")
    with pytest.raises(netship.Error, match="no option thread; did you mean threads"):
        netship.check(tmp_path, thread=2)  # type: ignore[call-arg]


def test_paths_are_text_or_paths_one_or_several(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(driver, "build", lambda asked, _: seen.append(asked))
    monkeypatch.setattr(check_command, "check", lambda asked, _: seen.append(asked))
    monkeypatch.setattr(apart, "run", lambda _, asked, __: seen.append(asked))
    netship.build(
        "m.onnx",
        calibration=["a.jpg", Path("b.jpg")],
        golden="g.jpg",
        dump="dump",
        records=Path("r.json"),
        keep_float="Conv_1",
        input_shapes={"x": [1, 3, 8, 8]},
        flash_limit="512KB",
        arena_limit=4096,
        preprocessing="torchvision",
    )
    [asked] = seen
    assert asked.calibration == (Path("a.jpg"), Path("b.jpg"))
    assert (asked.golden, asked.dump) == ((Path("g.jpg"),), Path("dump"))
    assert (asked.records, asked.keep_float) == ((Path("r.json"),), ("Conv_1",))
    assert asked.input_shapes == {"x": (1, 3, 8, 8)}
    assert (asked.flash_limit, asked.arena_limit) == (512_000, 4096)
    assert asked.overrides.preprocessing == "torchvision"
    files = {"x": "a=b.npy"}
    netship.check(tmp_path, images="photo.png", model=Path("m"), input=files)
    assert (seen[1].images, seen[1].model) == ([Path("photo.png")], "m")
    assert seen[1].input == [("x", Path("a=b.npy"))]
    netship.tune("m.onnx", warm="w.json", ssh="pi@board", hours=0.5, threads=2)
    assert (seen[2].warm, seen[2].ssh) == ([Path("w.json")], ["pi@board"])
    assert (seen[2].hours, seen[2].threads, seen[2].trials) == (0.5, 2, 4000)


@pytest.mark.parametrize(
    ("function", "options", "said"),
    [
        ("build", {"quantize": "int4"}, "quantize='int4': takes 'int8'"),
        ("build", {"precision": "float64"}, "precision='float64': takes 'float32' or"),
        ("build", {"format": "zip"}, "format='zip': takes 'bundle' or"),
        ("build", {"threads": 0}, "threads=0: '0' is not a whole number"),
        ("build", {"flash_limit": "1 KB"}, "flash_limit='1 KB': '1 KB' is not a size"),
        ("build", {"golden": [7j]}, "golden=7j: takes text, a number or a path"),
        ("build", {"output": ""}, "output='': an empty name"),
        ("build", {"accept_loss": "no"}, "accept_loss='no': takes True or False"),
        ("build", {"name": "a b"}, "name='a b': 'a b' is not a C identifier"),
        ("build", {"model": None}, "model=None: takes a path"),
        ("build", {"target": "armv99"}, "armv99"),
        ("build", {"input_shapes": {"x": 0}}, "input_shape='x:0': '0' is not a whole"),
        ("build", {"input_shapes": [1]}, r"input_shapes=\[1\]: takes a dictionary"),
        ("build", {"scale": "1/255"}, r"give it in preprocessing=\{'scale': …\}"),
        ("build", {"calibrate": []}, "no option calibrate; did you mean calibration"),
        ("build", {"xyz": 1}, "no option xyz; its options are accept_loss, "),
        ("build", {"preprocessing": "vgg"}, "preprocessing 'preprocessing': 'vgg'"),
        ("build", {"preprocessing": {"scal": 1}}, "scal; did you mean scale"),
        ("build", {"preprocessing": 3}, "preprocessing=3: takes a dictionary"),
        ("open", {"board": "bogus"}, "board='bogus': takes 'emulated'"),
        ("open", {"ssh": "pi@x", "rpc": "local"}, "ssh and rpc: exclude each other"),
        ("open", {"treads": 1}, "did you mean threads"),
        ("check", {"repeat": -1}, "repeat=-1: '-1' is not a whole number"),
        ("check", {"threads": True}, "threads=True: takes text, a number or a path"),
        ("check", {"input": {"x": ""}}, "input 'x'='': takes a path"),
        ("tune", {"measure": "moon"}, "measure='moon': takes 'here' or 'meter'"),
        ("tune", {"trials": "many"}, "trials='many': 'many' is not a whole number"),
        ("estimate", {"cpu": "cortex-m4", "code": "ram"}, "code='ram': takes 'flash'"),
        ("estimate", {"cpu": "cortex-a72", "part": "x"}, "is for microcontrollers"),
        ("estimate", {"cpu": None}, "cpu=None: is needed"),
        ("estimate", {"bundle": None, "cpu": "cortex-m4"}, "bundle=None: is needed"),
        ("estimate", {"cpu": "cortex-m4", "parts": "x"}, "did you mean part"),
    ],
)
def test_a_wrong_option_is_refused_in_one_line(
    function: str, options: dict[str, Any], said: str, tmp_path: Path
) -> None:
    with pytest.raises(netship.Error, match=said) as refused:
        first = "model" if function in ("build", "tune") else "bundle"
        getattr(netship, function)(**{first: tmp_path, **options})
    assert "\n" not in str(refused.value)
    assert not any(tmp_path.iterdir())


def test_a_network_takes_only_its_own_arrays_while_it_is_open(tmp_path: Path) -> None:
    bundle = tiny_bundle(tmp_path, native())
    image = np.zeros(bundle.manifest.inputs[0].shape, np.float32)
    Image.new("RGB", (40, 40), "red").save(tmp_path / "photo.png")
    with netship.open(str(bundle.path)) as network:
        for wrong, said in (
            ([1, 2], "input is list, not float32 .*make it a numpy array"),
            (image.astype(np.uint8), "input is uint8 .* convert it with astype"),
            (image.astype(np.float64), "input is float64 .* convert it with astype"),
            (image[0], r"input is float32 \[3, 16, 16\], .* 'image'; reshape it"),
        ):
            with pytest.raises(netship.Error, match=said):
                network.run(wrong)  # type: ignore[arg-type]
        with pytest.raises(netship.Error, match="0 arrays, not 1"):
            network.run()
        with pytest.raises(netship.Error, match="photo=3: takes a path"):
            network.read(3)  # type: ignore[arg-type]
        assert len(network.classify(str(tmp_path / "photo.png"))) == 5
        with pytest.raises(netship.Error, match="cannot detect, .* use classify"):
            network.detect("photo.png")
        with pytest.raises(netship.Error, match="cannot segment, .* use classify"):
            network.segment("photo.png")
    with pytest.raises(netship.Error, match="is closed; open it again"):
        network.run(image)
    with pytest.raises(netship.Error, match="TVM already has .* threads"):
        netship.open(bundle, threads=7)
    # A process that runs builds cannot compile, but the search has one of its own.
    with pytest.raises(netship.Error, match="no such task of"):
        netship.tune(
            "mobilenetv2-0.35-96", output=tmp_path / "log.json", tasks="no such task"
        )


def test_a_fault_of_the_system_is_an_error_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise PermissionError(13, "Permission denied", "out")

    monkeypatch.setattr(driver, "build", fail)
    with pytest.raises(netship.Error, match="out: Permission denied"):
        netship.build("m.onnx")


def test_a_detector_and_a_segmenting_network_answer_in_the_photograph_s_pixels(
    tmp_path: Path,
) -> None:
    onnx.save(detector(), tmp_path / "boxes.onnx")
    (tmp_path / "mine.toml").write_text(DECODING)
    kernel = np.eye(3, dtype=np.float32).reshape(3, 3, 1, 1)
    value = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Conv", ["image", "w"], ["map"])],
        "g",
        [value("image", 1, [1, 3, 16, 16])],
        [value("map", 1, [1, 3, 16, 16])],
        [onnx.numpy_helper.from_array(kernel, "w")],
    )
    opset = onnx.helper.make_opsetid("", 17)
    map_model = onnx.helper.make_model(graph, opset_imports=[opset], ir_version=8)
    onnx.save(map_model, tmp_path / "map.onnx")
    pixels = np.random.default_rng(1).integers(0, 256, (40, 60, 3), np.uint8)
    Image.fromarray(pixels).resize((600, 400)).save(tmp_path / "photo.png")
    stated = {"scale": "1/255", "task": "detect", "decode": tmp_path / "mine.toml"}
    boxes = netship.build(
        tmp_path / "boxes.onnx", output=tmp_path / "b", preprocessing=stated
    )
    with netship.open(boxes) as network:
        found = network.detect(tmp_path / "photo.png")
        with pytest.raises(netship.Error, match="cannot classify, .* use detect"):
            network.classify(tmp_path / "photo.png")
    assert len(found.boxes) and found.boxes[:, 2].max() > 100
    assert (found.boxes <= [600, 400, 600, 400]).all()

    # Its classes are the channels: the left half is red, the right half blue.
    halves = Image.new("RGB", (64, 32), "red")
    halves.paste("blue", (32, 0, 64, 32))
    halves.save(tmp_path / "halves.png")
    built = netship.build(
        tmp_path / "map.onnx",
        output=tmp_path / "m",
        preprocessing={"scale": "1/255", "task": "segment", "fit": "stretch"},
    )
    with netship.open(built) as network:
        seen = network.segment(tmp_path / "halves.png")
        with pytest.raises(netship.Error, match="cannot classify, .* use segment"):
            network.classify(tmp_path / "halves.png")
    assert (seen.shape, seen.dtype.name) == ((32, 64), "int32")
    assert (seen[:, :28] == 0).all() and (seen[:, 36:] == 2).all()


def test_a_c_project_is_estimated(tmp_path: Path) -> None:
    bundle = project(residuals(), tmp_path / "c", "cortex-m4")
    found = netship.estimate(bundle, "cortex-m4", part="stm32l4r5", code="flash")
    assert isinstance(found, Inference)
    assert (found.part, found.places.weights) == ("stm32l4r5", "flash")
    assert found.cycles == sum(step.cycles for step in found.steps) > 0
    assert found.instructions == found.total.instructions > 0


def test_every_option_of_the_commands_is_an_option_here() -> None:
    def options(function: object, more: type) -> set[str]:
        named = inspect.signature(function).parameters  # type: ignore[arg-type]
        return {*named, *more.__annotations__} - {"options", "device", "on_progress"}

    fields = set(BuildRequest.__dataclass_fields__) - {"overrides"}
    assert options(api.build, api.BuildOptions) == fields | {"preprocessing"}
    # Pages and JSON are for people and for machines that read no Python.
    check = set(vars(check_command.parser().parse_args(["x"]))) - {"report", "json"}
    assert options(api.check, api.DeviceOptions) == check
    tune = set(vars(tune_command.parser().parse_args(["--model", "x"]))) - {"json"}
    assert options(api.tune, api.TuneOptions) == tune
    meter = set(vars(meter_options().parse_args(["x", "--cpu", "x"])))
    # Of several builds `estimate` is called for each.
    meter -= {"report", "json", "against"}
    assert options(api.estimate, api.EstimateOptions) == meter
