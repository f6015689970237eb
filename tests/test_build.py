"""What a build gives: the same bytes each time, the files, the options' effect."""

from __future__ import annotations

import json
import re
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import graphs
import numpy as np
import onnx
import pytest
from conftest import run, succeed

from netship.bundle.golden import read_golden
from netship.bundle.store import open_bundle, sha256_of
from netship.compile.build import _next, _table, main
from netship.compile.precision import search
from netship.targets.presets import this_cpu

Build = Callable[..., Path]
SMALL = "mobilenetv2-0.35-96"

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def small_cnn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "cnn.onnx"
    onnx.save(graphs.torchscript_cnn(17), path)
    return path


def test_the_same_inputs_give_the_same_library(built: Build, tmp_path: Path) -> None:
    again = tmp_path / "elsewhere" / "again"
    other = tmp_path / "temporary files"
    other.mkdir()
    options = ("--model", SMALL, "--output", again)
    succeed("compile.build", *options, TMPDIR=str(other), PYTHONHASHSEED="12345")
    assert sha256_of(again / "model.so") == sha256_of(built(SMALL) / "model.so")


def test_the_archive_holds_the_bundle(built: Build) -> None:
    bundle = built(SMALL)
    with tarfile.open(bundle.with_name(bundle.name + ".tar.gz")) as archive:
        names = set(archive.getnames())
    manifest = open_bundle(bundle).manifest
    assert names == {
        f"{bundle.name}/{path}" for path in ["manifest.json", *manifest.files]
    }


def test_a_build_needs_no_engine_in_its_own_process(
    small_cnn: Path, tmp_path: Path
) -> None:
    # The runtime alone cannot read the engine's objects: what comes back must be plain data.
    options = ("--model", small_cnn, "--output", tmp_path / "b")
    succeed("compile.build", *options, TVM_USE_RUNTIME_LIB="1")


def test_the_json_is_one_object(small_cnn: Path, tmp_path: Path) -> None:
    answer = json.loads(
        succeed(
            "compile.build", "--model", small_cnn, "--output", tmp_path / "b", "--json"
        )
    )
    assert answer["bundle"] == str(tmp_path / "b")
    assert answer["verification"]["origin"] == "measured on host"
    assert answer["verification"]["relative_error"] <= 1e-4


def test_what_cannot_run_here_is_built_and_ends_with_a_code_of_its_own(
    small_cnn: Path, tmp_path: Path
) -> None:
    target = "x86-64-v3" if this_cpu().machine == "aarch64" else "rpi4"
    output = tmp_path / "b"
    asked = ["--model", small_cnn, "--target", target, "--output", output]
    done = run("compile.build", *asked, PATH="/nowhere")
    assert done.returncode == 3
    why = "(no QEMU for aarch64; install it with `apt install|this machine lacks)"
    line = done.stderr.splitlines()[-1]
    assert re.match(f"NOT compared with ONNX Runtime: {why}", line)
    assert "--ssh USER@BOARD" in line and "--accept-uncompared" in line
    assert "checked  NOT compared with ONNX Runtime: " in done.stdout
    measured = open_bundle(output).manifest.measured
    assert measured["verification"] is None
    assert re.match(why, measured["not_verified_because"])


def test_without_a_comparison_the_code_is_0_only_where_that_is_accepted(
    built: Build, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = open_bundle(built(SMALL))
    facts = {"verification": None, "not_verified_because": "no QEMU"}
    manifest = bundle.manifest.model_copy(
        update={"measured": {**bundle.manifest.measured, **facts}}
    )
    made = [replace(bundle, manifest=manifest), bundle]
    monkeypatch.setattr(search, "build", lambda *_: made.pop(0))
    standalone = manifest.model_copy(update={"format": "standalone"})
    todo = _next(replace(bundle, manifest=standalone), SMALL)
    assert re.match(r"./verify FOLDER on its board, .*board kit --target", todo)
    assert main(["--json", "--accept-uncompared"]) == 0
    said = capsys.readouterr()
    assert json.loads(said.out)["compared"] is False and not said.err
    assert main(["--json"]) == 0
    assert json.loads(capsys.readouterr().out)["compared"] is True


def test_the_next_command_checks_where_the_build_was_verified(built: Build) -> None:
    bundle = open_bundle(built(SMALL))
    assert "emulated" not in _table(bundle, SMALL)
    measured = dict(bundle.manifest.measured)
    measured["verification"] = measured["verification"] | {"origin": "emulated"}
    manifest = bundle.manifest.model_copy(update={"measured": measured})
    last = _table(replace(bundle, manifest=manifest), SMALL).splitlines()[-1]
    assert f"check {bundle.path} --board emulated --model {SMALL}" in last


def test_a_bundle_is_replaced_only_by_a_whole_one(
    small_cnn: Path, tmp_path: Path
) -> None:
    output = tmp_path / "bundle"
    succeed("compile.build", "--model", small_cnn, "--output", output)
    before = (output / "manifest.json").read_bytes()
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(small_cnn.read_bytes()[:500])
    assert run("compile.build", "--model", broken, "--output", output).returncode == 2
    assert (output / "manifest.json").read_bytes() == before
    succeed("compile.build", "--model", small_cnn, "--output", output, "--threads", 2)
    assert open_bundle(output).manifest.threads == 2
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "broken.onnx",
        "bundle",
        "bundle.tar.gz",
    ]


def test_dump_shows_what_the_compiler_made(small_cnn: Path, tmp_path: Path) -> None:
    dump = tmp_path / "dump"
    options = ("--output", tmp_path / "b", "--dump", dump, "--target", "x86-64-v3")
    succeed("compile.build", "--model", small_cnn, *options)
    first, *_ = sorted(dump.glob("*-relay-*.txt"))
    assert "nn.conv2d" in first.read_text()
    assert "Primitive=1" in (dump / "kernels.txt").read_text()
    assert "T.prim_func" in (dump / "tir.txt").read_text()
    assert "vfmadd" in (dump / "model.s").read_text()


def test_the_toml_beside_the_model_and_the_options_are_obeyed(
    small_cnn: Path, tmp_path: Path, free_photos: list[Path]
) -> None:
    model = tmp_path / "mine.onnx"
    model.write_bytes(small_cnn.read_bytes())
    (tmp_path / "names.txt").write_text("cat\nnot a cat\n")
    (tmp_path / "mine.toml").write_text(
        'scale = 0.00392156862745098\nmean = [0.5, 0.4, 0.3]\nstd = [0.2, 0.2, 0.2]\nlabels = "names.txt"\n'
    )
    output = tmp_path / "b"
    options = ("--std", "0.1,0.2,0.4", "--golden", *free_photos[:2])
    succeed("compile.build", "--model", model, "--output", output, *options)
    bundle = open_bundle(output)
    assert bundle.labels() == ["cat", "not a cat"]
    preprocessing = bundle.manifest.preprocessing
    assert preprocessing is not None
    assert preprocessing.mean == (0.5, 0.4, 0.3)
    assert preprocessing.std == (0.1, 0.2, 0.4)
    golden = read_golden(bundle)
    assert len(golden) == 2
    assert all(np.isfinite(tensor).all() for tensor, _, _ in golden)
    shown = succeed("runtime_demo.run", output, "--image", free_photos[0])
    assert "not a cat" in shown  # two classes: both are shown, no five are demanded
    assert len(shown.splitlines()) == 4
