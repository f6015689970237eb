"""Counts of a comparison are kept, and counted again where anything that they depend on has changed."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import onnx
import pytest
from compared import OPTIONS, Runs, replace_runtimes, tiny_model

from netship.bench import compare, comparison, measurement
from netship.bench.baselines import runtimes
from netship.bundle.golden import seeded_inputs
from netship.bundle.manifest import ModelIdentity
from netship.bundle.store import sha256_of
from netship.compile.frontend.reference import Reference
from netship.meter.counts import Counts


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return tiny_model(tmp_path)


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch, model: Path) -> Runs:
    return replace_runtimes(monkeypatch, model, {})


def test_a_second_run_counts_nothing_again(model: Path, runs: Runs) -> None:
    words = ["--model", str(model), *OPTIONS, "--json"]
    compare.main(words)
    compare.main(words)
    assert len(runs) == 3
    compare.main([*words, "--cpu", "cortex-a76"])
    assert len(runs) == 6


@pytest.mark.parametrize("change", ["counter_version", "runtimes.version"])
def test_another_counter_or_runtime_counts_anew(
    model: Path, runs: Runs, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    words = ["--model", str(model), *OPTIONS, "--json"]
    compare.main(words)
    monkeypatch.setattr(f"netship.bench.measurement.{change}", lambda *_: "another")
    compare.main(words)
    assert len(runs) == 6


@pytest.mark.parametrize("what", ["run", "system", "input", "QEMU"])
def test_what_else_the_counts_depend_on_counts_anew(
    model: Path, runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    words = ["--model", str(model), *OPTIONS, "--json"]
    source = tmp_path / "run.py"
    source.write_text("")
    monkeypatch.setattr(runtimes, "SOURCES", (source,))
    compare.main(words)
    if what == "run":
        source.write_text("changed")
    elif what == "system":
        monkeypatch.setattr(
            "netship.devices.sysroot.sysroot_path", lambda: Path("other")
        )
    elif what == "input":
        other = seeded_inputs
        monkeypatch.setattr(
            measurement, "seeded_inputs", lambda *_: [2 * x for x in other(*_)]
        )
        monkeypatch.setattr(measurement, "_compare", lambda *_: (0.0, True))
    else:
        monkeypatch.setattr("netship.meter.counting.qemu_version", lambda: "QEMU 9")
    compare.main(words)
    assert len(runs) == 6


def test_a_file_of_ones_own_counts_anew_with_another_model(
    model: Path, runs: Runs, tmp_path: Path
) -> None:
    file = tmp_path / "own.tflite"
    file.write_bytes(b"one")
    options = ["--cpu", "cortex-a72", "--runtimes", "litert", "--tflite", str(file)]
    compare.main(["--model", str(model), *options])
    proto = onnx.load(model)
    proto.graph.node[1].op_type = "GlobalMaxPool"
    onnx.save(proto, tmp_path / "other.onnx")
    compare.main(["--model", str(tmp_path / "other.onnx"), *options])
    assert len(runs) == 2


def test_a_kept_answer_is_judged_anew(
    model: Path,
    runs: Runs,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """By another version of ONNX Runtime, say."""
    words = ["--model", str(model), *OPTIONS]
    assert compare.main(words) == 0
    run = Reference.run
    monkeypatch.setattr(Reference, "run", lambda *_: [2 * y for y in run(*_)])
    assert compare.main(words) == 1
    assert capsys.readouterr().out.count("of the range: not counted") == 3
    assert len(runs) == 3


def test_a_damaged_result_is_counted_anew(
    model: Path, runs: Runs, tmp_path: Path
) -> None:
    words = ["--model", str(model), *OPTIONS, "--json"]
    compare.main(words)
    kept = sorted((tmp_path / "cache" / "netship" / "compare").glob("*.gz"))
    assert len(kept) == 3
    kept[0].write_bytes(b"")
    kept[1].write_bytes(kept[1].read_bytes()[:40])
    assert compare.main(words) == 0
    assert len(runs) == 5


@pytest.fixture
def bundle(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> SimpleNamespace:
    """A bundle of the model that is none, and how often it was counted."""
    folder = tmp_path / "bundle"
    folder.mkdir()
    (folder / "manifest.json").write_text("{}")
    identity = ModelIdentity(name="tiny.onnx", sha256=sha256_of(model))
    verification = {"verification": {"max_abs_error": 2e-6}}
    manifest = SimpleNamespace(model=identity, measured=verification, quantisation=None)
    found = SimpleNamespace(path=folder, manifest=manifest, counted=0)

    def count_bundle(*_: object) -> Counts:
        found.counted += 1
        return Counts(90_000_000, 60_000_000, 10_000_000)

    monkeypatch.setattr(comparison, "open_bundle", lambda path: found)
    monkeypatch.setattr(comparison, "count_bundle", count_bundle)
    return found


def test_our_bundle_is_counted_once(
    model: Path, bundle: SimpleNamespace, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--model", str(model), "--bundle", str(bundle.path), "--json"]
    for _ in range(2):
        compare.main([*words, "--cpu", "cortex-a72", "--runtimes"])
        [row] = json.loads(capsys.readouterr().out)["runtimes"]
        assert (row["runtime"], row["core_cycles"]) == ("netship", 60_000_000)
        assert row["max_abs_error"] == 2e-6
    assert bundle.counted == 1
    (bundle.path / "manifest.json").write_text("{ }")
    compare.main([*words, "--cpu", "cortex-a72", "--runtimes"])
    assert bundle.counted == 2


def test_a_bundle_of_another_model_is_refused(
    model: Path, bundle: SimpleNamespace, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle.manifest.model = ModelIdentity(name="tiny.onnx", sha256="0" * 64)
    words = ["--model", str(model), "--bundle", str(bundle.path)]
    assert compare.main([*words, "--cpu", "cortex-a72", "--runtimes"]) == 1
    assert "is of another model, tiny.onnx" in capsys.readouterr().out


def test_our_bundle_is_counted_anew_by_another_verifier_or_system(
    model: Path,
    bundle: SimpleNamespace,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    words = ["--model", str(model), "--bundle", str(bundle.path), "--json"]

    def run() -> int:
        compare.main([*words, "--cpu", "cortex-a72", "--runtimes"])
        return int(bundle.counted)

    assert [run(), run()] == [1, 1]
    monkeypatch.setattr("netship.devices.board.programs.SOURCES", tmp_path / "none")
    assert [run(), run()] == [2, 2]
    monkeypatch.setattr("netship.devices.sysroot.sysroot_path", lambda: Path("other"))
    assert run() == 3
