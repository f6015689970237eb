"""``import netship``: the page's example as a user's script, typed results, errors, and what it must not print."""

from __future__ import annotations

import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import graphs
import numpy as np
import onnx
import pytest
from conftest import ROOT, hostile
from PIL import Image
from tiny import tiny_bundle

import netship
from netship import api
from netship.compile.backends.request import BuildRequest
from netship.runtime_demo.check import parser as check_options
from netship.targets.errors import UserError
from netship.targets.presets import native
from netship.tuning.tune import parser as tune_options

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
    with pytest.raises(TypeError, match="unknown options: thread"):
        netship.check(tmp_path, thread=2)  # type: ignore[call-arg]


def test_every_option_of_the_commands_is_an_option_here() -> None:
    def options(function: object, more: type) -> set[str]:
        named = inspect.signature(function).parameters  # type: ignore[arg-type]
        return {*named, *more.__annotations__} - {"options", "device", "on_progress"}

    fields = set(BuildRequest.__dataclass_fields__) - {"overrides", "float16"}
    assert options(api.build, api.BuildOptions) == fields | {
        "preprocessing",
        "precision",
    }
    # Pages and JSON are for people and for machines that read no Python.
    check = set(vars(check_options().parse_args(["x"]))) - {"report", "json"}
    assert options(api.check, api.DeviceOptions) == check
    tune = set(vars(tune_options().parse_args(["--model", "x"]))) - {"json"}
    assert options(api.tune, api.TuneOptions) == tune
