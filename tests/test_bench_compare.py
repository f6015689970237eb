"""This project and other runtimes in one table: what it shows, and whose figures count."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from compared import MILLIONS, OPTIONS, Answer, Runs, replace_runtimes, tiny_model

from netship.bench import compare, comparison, measurement
from netship.bench.baselines import converters, emulated, runtimes
from netship.bench.baselines.runtimes import Baseline
from netship.targets.errors import UserError
from netship.targets.progress import Progress


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return tiny_model(tmp_path)


@pytest.fixture
def answers() -> dict[str, Answer]:
    """What a runtime makes of the right answer; a test changes it to be wrong."""
    return {}


@pytest.fixture
def runs(
    monkeypatch: pytest.MonkeyPatch, model: Path, answers: dict[str, Answer]
) -> Runs:
    return replace_runtimes(monkeypatch, model, answers)


def test_the_table_has_the_best_first_and_the_ratio_to_it(
    model: Path, runs: Runs, capsys: pytest.CaptureFixture[str]
) -> None:
    assert compare.main(["--model", str(model), *OPTIONS]) == 0
    title, _, *lines = capsys.readouterr().out.splitlines()
    assert "tiny.onnx on cortex-a72, 1 thread" in title and "estimated" in title
    assert [line.split("  ")[0] for line in lines] == [
        "this project",
        "LiteRT (XNNPACK)",
        "ncnn",
        "ONNX Runtime",
    ]
    assert lines[0].split()[-6:] == ["90.0", "60.0", "10.0", "70.0", "1.00", "1.0e-06"]
    assert lines[3].split()[-6:-1] == ["180.0", "140.0", "10.0", "150.0", "2.14"]
    assert runs == [(name, "cortex-a72") for name in OPTIONS[3:]]


def test_the_json_labels_every_figure_estimated(
    model: Path, runs: Runs, capsys: pytest.CaptureFixture[str]
) -> None:
    assert compare.main(["--model", str(model), *OPTIONS, "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert (shown["cpu"], shown["threads"]) == ("cortex-a72", 1)
    assert shown["origin"] == "estimated" and shown["meter"]
    assert shown["origins"]["instructions"] == "emulated"
    assert shown["origins"]["core_cycles"] == "estimated"
    for row in shown["runtimes"]:
        assert row["origin"] == "estimated"
        instructions, core, memory = MILLIONS[row["runtime"]]
        assert row["instructions"] == instructions * 1_000_000
        assert (row["core_cycles"], row["memory_cycles"]) == (core * 1e6, memory * 1e6)
        assert row["ratio"] == pytest.approx((core + memory) / 70, abs=1e-4)


def test_threads_that_cannot_be_counted_apart_have_a_bound(
    model: Path, runs: Runs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "page.html"
    words = ["--model", str(model), *OPTIONS, "--report", str(page)]
    assert compare.main(words) == 0
    assert "≥" not in capsys.readouterr().out + page.read_text()
    assert compare.main([*words, "--threads", "4"]) == 0
    shown = capsys.readouterr().out
    assert "≥ its threads cannot be counted apart: what it takes at best" in shown
    assert re.search(r"LiteRT.* 30\.0 +17\.5 +5\.0 +≥ 22\.5 +≥ 0\.32", shown)
    assert re.search(r"\nncnn +1\S+ +\d+\.\d +\d+\.\d +\d+\.\d +\d+\.\d ", shown)
    assert "≥ its threads" in page.read_text()
    # The counts on one thread are those of the run before; ncnn is counted on four.
    assert [name for name, _ in runs] == [*OPTIONS[3:], "ncnn"]
    compare.main([*words, "--threads", "4", "--json"])
    found = json.loads(capsys.readouterr().out)
    bounds = {row["runtime"]: row["at_best"] for row in found["runtimes"]}
    assert bounds == {
        "netship": False,
        "litert": True,
        "ncnn": False,
        "onnxruntime": True,
    }
    counted = [row for row in found["runtimes"] if not row["at_best"]]
    assert min(row["ratio"] for row in counted) == 1, "a bound is not the best"


def _other_class(y: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return y[:, ::-1]


def test_figures_of_a_wrong_answer_do_not_count(
    model: Path,
    runs: Runs,
    answers: dict[str, Answer],
    capsys: pytest.CaptureFixture[str],
) -> None:
    answers["litert"] = lambda y: y * np.float32(1.01)
    answers["ncnn"] = lambda y: y[:, :2]
    answers["onnxruntime"] = lambda y: y * np.float32(np.nan)
    assert compare.main(["--model", str(model), *OPTIONS]) == 1
    shown = capsys.readouterr().out
    assert "LiteRT (XNNPACK) 2.3.0: its answer is" in shown
    assert "of the range: not counted" in shown
    assert "its output has 2 values, not 3 finite" in shown
    assert "ONNX Runtime 1.32.0: its output has 3 values, not 3 finite ones" in shown
    # Nor is a wrong answer kept.
    answers.clear()
    assert compare.main(["--model", str(model), *OPTIONS]) == 0


def test_a_runtime_that_cannot_be_converted_is_a_line_and_the_rest_goes_on(
    model: Path,
    runs: Runs,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def convert(_machine: object, runtime: Baseline, *_: object) -> Path:
        if runtime.name == "ncnn":
            raise UserError("its converter made no model.ncnn.param: unknown operator")
        return Path("model")

    monkeypatch.setattr(converters, "convert", convert)
    assert compare.main(["--model", str(model), *OPTIONS]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].startswith("ncnn 1.0.20261020: its converter made no")
    assert len(runs) == 2


def test_a_file_of_ones_own_for_litert_is_judged_by_its_best_class(
    model: Path,
    tmp_path: Path,
    runs: Runs,
    answers: dict[str, Answer],
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = tmp_path / "own.tflite"
    file.write_bytes(b"one")
    words = ["--model", str(model), *OPTIONS, "--tflite", str(file), "--json"]

    def with_background(y: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        return np.concatenate([np.full((1, 1), 99, np.float32), y * 3], axis=1)

    answers["litert"] = with_background
    assert compare.main(words) == 0
    rows = json.loads(capsys.readouterr().out)["runtimes"]
    [litert] = [row for row in rows if row["runtime"] == "litert"]
    assert litert["same_top1"] and litert["max_abs_error"] is None
    file.write_bytes(b"another")
    answers["litert"] = _other_class
    assert compare.main(words) == 1
    assert "another best class" in capsys.readouterr().out


def test_the_report_is_one_page_with_every_label(
    model: Path, runs: Runs, tmp_path: Path, answers: dict[str, Answer]
) -> None:
    answers["ncnn"] = lambda y: y[:, :2]
    path = tmp_path / "compare.html"
    compare.main(["--model", str(model), *OPTIONS, "--report", str(path), "--json"])
    page = path.read_text()
    assert "estimated" in page and "no time here was measured" in page
    assert "its output has 2 values" in page
    assert page.count('class="bar"') == 3 and "<script" not in page


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--cpu", "cortex-a9"], "cortex-a9"),
        (
            ["--cpu", "cortex-a72", "--runtimes", "tflite"],
            "tflite: unknown; known: litert",
        ),
        (
            ["--cpu", "cortex-a72", "--model", "none.onnx"],
            r"none\.onnx: cannot be read",
        ),
        (["--cpu", "cortex-a72", "--report", "/none/page.html"], "no such folder"),
    ],
)
def test_what_cannot_be_compared_is_refused_in_one_line(
    model: Path, options: list[str], said: str
) -> None:
    with pytest.raises(UserError, match=said):
        compare.main(["--model", str(model), *options])


def test_without_qemu_every_runtime_says_so(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(*_: object) -> None:
        raise UserError("no QEMU for aarch64; install it")

    monkeypatch.setattr(emulated, "prepare", missing)
    case = measurement.read_case(model)
    row = measurement.measure(
        case, runtimes.find("ncnn"), "cortex-a72", Progress(quiet=True)
    )
    assert row.counts is None and row.refused.startswith("no QEMU")


def test_nothing_of_ours_is_built_where_it_could_not_be_counted(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without QEMU a build cannot verify either, and its bundle would be kept."""

    def never(*_: object) -> None:
        raise AssertionError("built")

    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr("netship.compile.driver.build", never)
    words = ["--model", str(model), "--cpu", "cortex-a72", "--runtimes"]
    assert compare.main(words) == 1
    assert "this project: no qemu-aarch64" in capsys.readouterr().out


def test_a_small_network_has_more_than_a_tenth_of_a_million() -> None:
    assert [comparison.in_millions(x) for x in (28_304, 22_500_000)] == [
        "0.028",
        "22.5",
    ]
