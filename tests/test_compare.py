"""Builds side by side: every figure with its origin, ratios of one origin only, and a refusal in one line.

Longer than 450 lines: all tests compare the same few results, which it makes.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from check_results import Page, a_result, an_input, manifest
from compared import tiny_model
from conftest import run
from PIL import Image
from whole_bundles import fill

from netship.bench.comparison import Comparison as BenchComparison
from netship.bench.measurement import Row as BenchRow
from netship.bundle.accuracy import Accuracy
from netship.bundle.accuracy import compare as accuracy
from netship.bundle.manifest import Firmware, FirmwareTensor, Float16, Quantisation
from netship.bundle.store import MANIFEST, Bundle
from netship.devices.microcontroller.figures import Figures, Part
from netship.devices.sessions.session import Origin
from netship.meter.__main__ import to_json as meter_json
from netship.meter.counts import Counts
from netship.meter.operators import Metered, Operator
from netship.runtime_demo import compare, result_files
from netship.runtime_demo.columns import Column, column
from netship.runtime_demo.result import (
    CheckResult,
    InputResult,
    Latency,
    Steps,
    answers,
)
from netship.runtime_demo.side_by_side import Comparison
from netship.targets.arguments import as_json, show_result
from netship.targets.errors import UserError
from netship.targets.progress import Progress

PATH = Path("/photos/oak.png")


def item(best: int = 0, output: Sequence[float] = (3, 2, 1, 0, 0)) -> InputResult:
    values = np.array([output], np.float32)
    return replace(an_input(PATH, best, expected=0), output=values)


@pytest.fixture
def result(tmp_path: Path) -> CheckResult:
    (tmp_path / "model.so").write_bytes(bytes(4000))
    return a_result(tmp_path, [item()])


def on_microcontroller(result: CheckResult, instructions: int) -> CheckResult:
    tensor = FirmwareTensor(dtype="float32", nbytes=768)
    firmware = Firmware(
        cpu="cortex-m7",
        inputs=(tensor,),
        outputs=(tensor.model_copy(update={"nbytes": 20}),),
        exact=True,
        arena_bytes=1_200,
        input_offsets=(0,),
        peak="stem",
        steps=1,
        weights_bytes=30_000,
    )
    part = Part("stem/conv", 2_000_000, float(instructions), 0.0, 0.0, 0.0)
    figures = Figures(
        "an500 (cortex-m7)", firmware, 300, 8, 4_000, 30_000, instructions, 0.0, (part,)
    )
    files = manifest().files | {"m.c": "0" * 64}
    known = manifest(format="c", library="m.c", files=files, firmware=firmware)
    return replace(
        result,
        bundle=Bundle(result.bundle.path, known),
        origin=Origin.EMULATED,
        latency=None,
        reference_latency=None,
        operators=(),
        figures=figures,
    )


def of(result: CheckResult, name: str = "one") -> Column:
    return column(name, result.bundle, result)


def page_of(result: Comparison, folder: Path) -> Page:
    compare.write_page(result, folder / "page.html")
    return Page((folder / "page.html").read_text(encoding="utf-8"))


def test_a_ratio_has_two_figures_of_one_origin_and_one_place(
    result: CheckResult,
) -> None:
    slower = replace(result, latency=Latency.of([0.0252]))
    metered = Metered(
        "cortex-a72", (Operator("k", "conv", 1, 9, 4e6, 1e6, 8, ()),), "float32", 4
    )
    comparison = Comparison(
        (
            of(result),
            of(slower),
            of(replace(slower, threads=4)),
            of(replace(slower, origin=Origin.BOARD)),
            of(on_microcontroller(result, 4_800_000)),
            of(on_microcontroller(result, 9_600_000)),
            column("estimated", result.bundle, None, "", metered, "m1"),
            column("another meter", result.bundle, None, "", metered, "m2"),
        )
    )
    ratios = {
        row.name: [cell and cell.ratio for cell in row.cells] for row in comparison.rows
    }
    no = [None] * 8
    assert ratios["latency"] == [1.0, 2.0, None, None, 1.0, 2.0, None, None]
    assert ratios["instructions"] == [*no[:4], 1.0, 2.0, None, None]
    assert ratios["cycles"] == ratios["error"] == no
    for bars in comparison.bars:
        facts = [fact for _, fact in bars.bars]
        assert {(f.origin, f.where) for f in facts} == {(bars.origin, bars.where)}
    places = [b.origin for b in comparison.bars if b.title == "latency, median"]
    assert places == [Origin.HOST, Origin.ESTIMATED]


def test_the_page_has_all_figures_with_their_origins(
    result: CheckResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "130")
    comparison = Comparison(
        (
            of(result, "float32"),
            of(on_microcontroller(result, 4_800_000), "n" * 150),
            column("<b>arm</b>", result.bundle, None, "no QEMU for <i>aarch64</i>"),
        )
    )
    page = page_of(comparison, tmp_path)
    for words in (
        "float32 trees.onnx, znver4, bundle, float32, passed on 1 image",
        "latency, median 12.60 ms measured on host 2 threads 10.00 ms estimated cortex-m7, 480 MHz",
        "0.50 × measured on host",
        "4.80 M emulated an500 (cortex-m7)",
        "34.0 kB emulated",
        "RAM of an inference – 1.5 kB emulated",
        "4.0 kB 1.00 × counted",
        "right by labels 1/1 measured on host",
        "could not run: no QEMU for <i>aarch64</i>",
        "A B 0 1.000000 1 of 1 1 of 1 measured on host and emulated",
        "2 kernels, µs measured on host",
        "1 step, instructions emulated",
        "stem/conv 2.00 4,800,000",
    ):
        assert words in page.text
    assert not {"script", "b", "i", "img"} & set(page.tags)
    assert not re.search(r"https?:|url\(|@import", (tmp_path / "page.html").read_text())
    text = compare.table(comparison)
    assert "could not run: no QEMU" in text and "measured on host, 2 threads" in text
    assert text.count("\nSpeed") == 1, "two of the three columns fit, one has no times"
    assert "A–B  largest difference 0" in text
    found = json.loads(json.dumps(comparison.to_json()))
    assert found["passed"] is False
    assert found["columns"][0]["figures"]["latency"]["origin"] == "measured on host"
    assert found["columns"][0]["check"]["images"] == 1
    assert found["columns"][2]["refused"] and found["columns"][2]["check"] is None
    # Its sizes are known all the same.
    assert found["columns"][2]["figures"]["library"]["value"] == 4000


def test_two_builds_are_compared_on_what_both_had(result: CheckResult) -> None:
    other = item(1, (2, 3, 1, 0, 0.5))
    different = replace(item(), path=Path("/other.png"))
    results = (
        result,
        replace(result, inputs=(other, different)),
        replace(result, inputs=(different,)),
        replace(result, inputs=(item(0, (1, 2)),)),
    )
    pairs = {p.letters: p for p in Comparison([of(r) for r in results]).pairs}
    assert set(pairs) == {("A", "B"), ("A", "D"), ("B", "C"), ("B", "D")}
    first = pairs["A", "B"]
    assert (first.inputs, first.max_abs_error) == (1, 1.0)
    assert (first.same_top1, first.same_top5, first.note) == (0, 1, "")
    assert pairs["A", "D"].max_abs_error is None
    assert pairs["A", "D"].text() == "outputs of other shapes"


def test_golden_inputs_are_the_same_where_their_bytes_are(result: CheckResult) -> None:
    golden = replace(result, inputs=(replace(item(), path=None),))
    files = manifest().files | {"golden/in": "1" * 64}
    sha256 = manifest().model.model_copy(update={"sha256": "c" * 64})
    same = Bundle(result.bundle.path, manifest(model=sha256))
    another = Bundle(result.bundle.path, manifest(files=files))
    columns = [of(replace(golden, bundle=b)) for b in (same, another, golden.bundle)]
    (pair,) = Comparison(columns).pairs
    assert (pair.letters, pair.note) == (("A", "C"), "of different models")


def test_int8_shows_its_loss_against_float32(result: CheckResult) -> None:
    facts = Quantisation(output_steps=(0.1,))
    bundle = Bundle(result.bundle.path, manifest(quantisation=facts))
    lossy = replace(item(), vs_float=Accuracy(0.3, 0.1, 0.01, 0.987), float_top1=0)
    found = of(replace(result, bundle=bundle, inputs=(lossy,)))
    assert ", int8, " in found.about
    assert found.facts["float_top1"].text == "100.0%"
    assert found.facts["float_cosine"].text == "0.987000"
    for steps, said in (
        (Steps(0, 0), "exact"),
        (Steps(0.3, 0), "0.005"),
        (Steps(1, 2), "1 of 2 steps"),
    ):
        column = of(
            replace(result, bundle=bundle, inputs=(replace(lossy, steps=steps),))
        )
        assert column.facts["of_tolerance"].text == said


def test_a_build_in_float16_says_so(result: CheckResult, tmp_path: Path) -> None:
    half = Float16(images=1, seeded=0, float32=(), float32_sums=())
    bundle = Bundle(result.bundle.path, manifest(float16=half))
    found = of(replace(result, bundle=bundle))
    assert ", float16, passed on 1 image" in found.about
    page = page_of(Comparison((found,)), tmp_path)
    assert ", float16, passed on 1 image" in page.text
    assert "1 build side by side" in page.text


def test_one_input_of_two_builds_is_no_plural(result: CheckResult) -> None:
    assert ", 1 input, " in compare.table(Comparison((of(result), of(result))))


def written(folder: Path, content: object) -> Path:
    path = folder / "board.json"
    path.write_text(json.dumps(content))
    return path


def test_results_that_other_commands_print_become_columns(
    result: CheckResult, tmp_path: Path
) -> None:
    rows = (
        BenchRow("ncnn", "ncnn", "1.0", Counts(10**8, 6e7, 4e7), 1e-5, True),
        BenchRow("mnn", "MNN", "3", None, refused="cannot be converted"),
    )
    bench = BenchComparison(
        *("m.onnx", "0" * 64, "cortex-a72", "Raspberry Pi 4", 1.5, rows)
    )
    ncnn, mnn = result_files.read(written(tmp_path, bench.to_json()))
    assert (ncnn.name, ncnn.facts["cycles"].text) == ("ncnn 1.0", "100.00 M")
    assert ncnn.facts["cycles"].origin == "estimated"
    assert ncnn.facts["instructions"].origin == "emulated", "QEMU counts them"
    assert (mnn.refused, dict(mnn.facts)) == ("cannot be converted", {})
    assert Comparison([of(result), mnn]).passed, "it is no build"
    operator = Operator("k", "conv", 1, 9, 4e6, 1e6, 8, ())
    metered = Metered("cortex-a72", (operator,), "float32", 4)
    (estimate,) = result_files.read(written(tmp_path, meter_json(metered)))
    assert meter_json(metered)["origins"] == {
        "instructions": "emulated",
        "core_cycles": "estimated",
        "memory_cycles": "estimated",
    }
    # The same meter on the same core: the one pair that has a ratio.
    assert estimate.facts["cycles"].where == ncnn.facts["cycles"].where
    boards = replace(result, origin=Origin.BOARD)
    (board,) = result_files.read(written(tmp_path, boards.to_json()))
    assert board.facts["latency"].origin == "measured on board"
    assert board.facts["latency"].text == "12.60 ms"
    assert board.facts["labelled"].text == "1/1"
    here = result_files.read(written(tmp_path, result.to_json()))
    rows_of_both = Comparison([of(result), *here]).rows
    (latency,) = (row for row in rows_of_both if row.name == "latency")
    assert [cell and cell.ratio for cell in latency.cells] == [None, None]
    chip = on_microcontroller(result, 4_800_000)
    (file,) = result_files.read(written(tmp_path, chip.to_json()))
    assert file.facts["instructions"] == of(chip).facts["instructions"]
    assert file.facts["ram"] == of(chip).facts["ram"]
    assert of(on_microcontroller(result, 980)).facts["instructions"].text == "980"


def test_an_answer_of_nan_is_json_and_a_column(
    result: CheckResult, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An infinite error is null in JSON, which has no infinity; a column shows it."""
    nan = np.array([[np.nan, 2, 1, 0, 0]], np.float32)
    fixed = item().output
    assert fixed is not None
    wrong = replace(
        item(),
        output=nan,
        accuracy=accuracy([nan], [fixed], [np.ones_like(nan)]),
        ours=answers(nan, False, []),
    )
    broken = replace(result, inputs=(wrong,))
    options = argparse.Namespace(report=None, json=True)
    show_result(options, broken.to_json(), "", lambda _: None)
    printed = capsys.readouterr().out
    found = json.loads(printed, parse_constant=pytest.fail)
    assert not found["passed"] and found["max_abs_error"] is None
    assert found["results"][0]["ours"][0]["probability"] is None
    (tmp_path / "board.json").write_text(printed)
    (board,) = result_files.read(tmp_path / "board.json")
    for name in ("error", "of_range"):
        assert board.facts[name].text == of(broken).facts[name].text == "inf"
    whole = Comparison([of(result), of(broken), board])
    assert "inf" in compare.table(whole) and page_of(whole, tmp_path).text
    as_json(whole.to_json())


def test_estimates_of_another_board_or_more_threads_are_in_no_ratio(
    tmp_path: Path,
) -> None:
    counts = Counts(10**8, 6e7, 4e7)
    rows = (
        BenchRow("ncnn", "ncnn", "1", counts, 1e-5, True),
        BenchRow("mnn", "MNN", "1", counts, 1e-5, True, at_best=True),
    )
    columns = []
    for board, threads in (("Raspberry Pi 5", 1), ("RK3588", 1), ("RK3588", 4)):
        bench = BenchComparison("m.onnx", "0", "cortex-a76", board, 2.4, rows)
        found = replace(bench, threads=threads).to_json()
        columns += result_files.read(written(tmp_path, found))
    operator = Operator("k", "conv", 1, 9, 4e6, 1e6, 8, ())
    metered = Metered("cortex-a76", (operator,), "float32", 32, "rk3588", 4)
    columns += result_files.read(written(tmp_path, meter_json(metered)))
    places = [column.facts["cycles"].where for column in columns]
    assert len(set(places)) == 6 and places[4] == places[6]
    assert "RK3588, 4 threads, at best" in places[5]
    (cycles,) = (row for row in Comparison(columns).rows if row.name == "cycles")
    ratios = [cell and cell.ratio for cell in cycles.cells]
    assert ratios == [None, None, None, None, 20.0, None, 1.0]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "not a result"),
        ("[1]", "not a result"),
        ("7", "not a result"),
        ("{}", "not a result"),
        ("[" * 100_000, "not a result"),
        ('{"runtimes": 1}', "Field required"),
        ('{"bundle": "x", "max_abs_error": NaN}', "Field required"),
        (None, "No such file"),
    ],
)
def test_a_file_that_is_no_result_is_refused_in_one_line(
    content: str | None, words: str, tmp_path: Path
) -> None:
    path = tmp_path / "x.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match=words) as caught:
        result_files.read(path)
    assert "--peers takes what" in str(caught.value) and "\n" not in str(caught.value)


def changed(folder: Path, **changes: Any) -> Path:
    """A whole build, without code, with another manifest."""
    folder.mkdir()
    found = fill(folder).model_copy(update=changes)
    (folder / MANIFEST).write_text(found.to_json())
    return folder


def compared(*words: object) -> Comparison:
    with Progress(quiet=True) as progress:
        arguments = compare._parser().parse_args(list(map(str, words)))
        return compare.compare_builds(arguments, progress)


def test_what_cannot_be_compared_is_refused_in_one_line(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "oak.png")
    np.save(tmp_path / "oak.npy", np.zeros((1, 3, 4, 6), np.float32))
    one = changed(tmp_path / "one")
    four = changed(tmp_path / "four", threads=4)
    larger = changed(tmp_path / "larger")
    text = (larger / MANIFEST).read_text().replace('"dtype": "float32"', '"dtype": "uint8"', 1)  # fmt: skip
    data = json.loads(text)
    data["inputs"][0] |= {"layout": "", "dtype": "float32"}
    data["preprocessing"] = None
    (larger / MANIFEST).write_text(json.dumps(data))
    photo = ("--model", "m.onnx", "--images", tmp_path / "oak.png")
    for words, message in (
        ((tmp_path,), "not a bundle"),
        ((one, four), "the builds have 2 and 4 threads; give --threads N"),
        ((one, larger, *photo), "they cannot share these; compare them without"),
        ((one, "--images", tmp_path / "oak.png"), "--images needs --model"),
        ((one, "--estimate", "cortex-a72"), "no build is for aarch64"),
        ((one, "--peers", one / MANIFEST), "not a result"),
        ([one] * 27, "27 columns: more than 26"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            compared(*words)
        assert "\n" not in str(caught.value)


def test_a_build_that_cannot_run_here_says_so_and_the_rest_goes_on(
    tmp_path: Path, result: CheckResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    def check(options: Any, _progress: Progress) -> CheckResult:
        asked.append((options.board, options.threads, options.model))
        if options.board:
            raise UserError("no QEMU for aarch64; install it")
        return result

    monkeypatch.setattr(compare, "check", check)
    monkeypatch.setattr("netship.targets.engine.runtime", asked.append)
    here = changed(tmp_path / "here")
    arm = changed(tmp_path / "arm")
    text = (arm / MANIFEST).read_text().replace("x86_64", "aarch64")
    (arm / MANIFEST).write_text(text)
    monkeypatch.setattr("netship.bundle.store.elf_machine", lambda f: "aarch64" if f.parent == arm else "x86_64")  # fmt: skip
    monkeypatch.setattr(compare, "_runs_here", lambda bundle: bundle.path == here)
    found = compared(here, arm, "--model", "m.onnx", "--threads", 3)
    assert asked == [3, (None, 3, "m.onnx"), ("emulated", None, "m.onnx")]
    assert [column.refused for column in found.columns] == [
        "",
        "no QEMU for aarch64; install it",
    ]
    assert not found.passed
    with pytest.raises(UserError, match="no QEMU"):
        compared(arm)
    others = tmp_path / "others.json"
    others.write_text(json.dumps(result.to_json()))
    assert [c.refused for c in compared(arm, "--peers", others).columns][1] == ""


def test_two_built_bundles_are_compared_and_a_page_is_written(
    built: Callable[..., Path], tmp_path: Path
) -> None:
    model = tiny_model(tmp_path)
    Image.new("RGB", (9, 9), "red").save(tmp_path / "red.png")
    (tmp_path / "labels.csv").write_text("file,class_index\nred.png,1\n")
    first = built(model)
    second = built(model, "native", "--format", "standalone")
    page = tmp_path / "page.html"
    done = run(
        "runtime_demo.compare",
        *(first, second, "--model", "mobilenetv2-0.35-32", model),
        *("--images", tmp_path, "--repeat", 2, "--report", page, "--json"),
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    for each in found["columns"]:
        assert each["figures"]["latency"]["ratio"] >= 1
        assert each["figures"]["labelled"]["text"] in ("0/1", "1/1")
        assert each["layers"]["unit"] in ("µs", "")
    (pair,) = found["pairs"]
    assert (pair["inputs"], pair["same_top1"]) == (1, 1)
    assert pair["max_abs_error"] < 1e-5 and not pair["note"]
    assert "Between two builds" in Page(page.read_text(encoding="utf-8")).text
