"""The validation page: published times with their sources, against the meter's own stored estimates."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from netship.bench import published_networks, validate, validation
from netship.bench.baselines import runtimes
from netship.bench.measurement import Row
from netship.compile.mobilenet import count
from netship.meter import board_files, memory
from netship.meter.counts import Counts, meter_version
from netship.targets.errors import UserError
from netship.targets.progress import Progress

SOURCE = validation.Source(
    title="Somebody's table",
    url="https://example.org/table",
    date="2024-01-02",
    board="Raspberry Pi 4",
    cpu="cortex-a72",
    clock=1.5,
    os="not stated",
    runtime="ncnn",
    version="1",
    threads=1,
    method="average of ten",
    memory="rpi4",
    half="judge",
)


def pair(published: float, cycles: float | None, board: str = "") -> validation.Pair:
    counts = None if cycles is None else Counts(1_000_000, cycles - 1e6, 1e6)
    source = SOURCE._replace(board=board or SOURCE.board)
    return validation.Pair(source, "mobilenet_v2", published, counts)


def page_of(*pairs: validation.Pair, meter: str = "") -> validation.Validation:
    versions = {"ncnn": runtimes.version(runtimes.find("ncnn"))}
    return validation.Validation(pairs, (), meter or meter_version(), versions)


def test_every_published_figure_has_a_source_a_board_and_a_network_that_can_be_run() -> (
    None
):
    read = validation.read()
    assert len(read.pairs) >= 60
    assert len({each.source.board for each in read.pairs}) >= 8
    # No core is judged by the boards alone that its figures were chosen by, but for one with a single board.
    cores = {each.source.cpu for each in read.pairs} - {"cortex-a78"}
    for half in validation.HALVES:
        assert cores <= {p.source.cpu for p in read.pairs if p.source.half == half}
    for each in read.pairs:
        source = each.source
        assert source.url.startswith("https://") and source.method
        assert re.fullmatch(r"20\d\d-\d\d-\d\d", source.date)
        assert source.threads in (1, 2, 4)
        assert source.cpu in board_files.BOARDS
        assert source.memory in memory.boards(source.cpu)
        assert source.half in validation.HALVES
        assert source.runtime in runtimes.BASELINES
        assert each.network in published_networks.NETWORKS
        assert 1 < each.published < 2000
        assert 0.5 < source.clock < 3
    assert all(each.why and each.url for each in read.left_out)


def test_every_published_figure_has_a_stored_estimate() -> None:
    read = validation.read()
    assert all(each.counts and each.counts.memory_cycles > 0 for each in read.pairs)
    assert read.meter and set(read.versions) == {p.source.runtime for p in read.pairs}


def test_no_figure_stands_twice() -> None:
    pairs = [(p.source, p.network) for p in validation.read().pairs]
    assert len(pairs) == len(set(pairs))


def test_a_source_is_taken_whole() -> None:
    found: dict[validation.Source, set[str]] = {}
    for each in validation.read().pairs:
        found.setdefault(each.source, set()).add(each.network)
    for source, networks in found.items():
        # Its table has no ResNet-18.
        absent = {"resnet18"} if source.board == "AX630C" else set()
        assert networks == published_networks.NETWORKS.keys() - absent, source.title


@pytest.mark.parametrize(
    ("network", "macs"),
    # By hand from the layers and the shapes in benchncnn's files, benchmark/models/*.param.
    [
        ("mobilenet_v1", 568_740_352),
        ("mobilenet_v2", 313_619_328),
        ("resnet18", 1_826_918_400),
        ("squeezenet_v1.1", 418_467_520),
    ],
)
def test_the_networks_are_the_ones_that_were_timed(network: str, macs: int) -> None:
    layers = count(published_networks.build(network))
    assert sum(layer.macs for layer in layers) == macs


def test_an_unknown_network_is_refused() -> None:
    with pytest.raises(UserError, match="'vgg': unknown; known: mobilenet_v1"):
        published_networks.build("vgg")


def test_the_cores_share_shrinks_with_the_boards_clock_and_the_memorys_does_not() -> (
    None
):
    source = SOURCE._replace(clock=3.0)
    each = validation.Pair(source, "resnet18", 100.0, Counts(1, 120e6, 15e6))
    assert each.estimate == pytest.approx(40.0 + 10.0)
    assert each.overlapped == pytest.approx(40.0)
    assert each.ratio == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("cycles", "verdict"),
    [
        (150e6, ""),
        (123e6, ""),
        (75e6, "wrong: 2.0 × too fast"),
        (450e6, "wrong: 3.0 × too slow"),
        (None, "not estimated"),
    ],
)
def test_a_wrong_estimate_says_so(cycles: float | None, verdict: str) -> None:
    assert pair(100.0, cycles).verdict == verdict


@pytest.mark.parametrize(
    ("x", "y", "rank"),
    [
        ([1, 2, 3], [10, 20, 30], 1.0),
        ([1, 2, 3], [30, 20, 10], -1.0),
        ([1, 2, 3, 4], [1, 3, 2, 4], 0.8),
        ([1, 1, 2], [1, 1, 2], 1.0),
        ([1, 1, 2, 3], [1, 2, 3, 4], 0.9**0.5),
        ([1, 2], [1, 2], None),
        ([1, 1, 1], [1, 2, 3], None),
    ],
)
def test_rank_correlation(x: list[float], y: list[float], rank: float | None) -> None:
    found = validation.spearman(x, y)
    assert found == (rank if rank is None else pytest.approx(rank))


def test_the_summary_counts_what_is_wrong() -> None:
    of = validation.summary("all", [pair(100, 150e6), pair(100, 75e6), pair(100, None)])
    assert (of.pairs, of.wrong) == (2, 1)
    assert of.ratio == pytest.approx(0.5**0.5)
    assert [of.low, of.high] == pytest.approx([0.5, 1.0])


def test_the_table_has_a_row_for_each_pair_and_a_line_for_each_board() -> None:
    shown = validate.markdown(
        page_of(pair(100, 150e6), pair(50, 150e6, "Raspberry Pi 5"), pair(10, None))
    )
    assert (
        "| Raspberry Pi 4, 1.5 GHz | 1 | ncnn | mobilenet_v2 | 100.0 | 100.0 | 99.3 | 1.00 |  |"
        in shown
    )
    assert "| 50.0 | 100.0 | 99.3 | 2.00 | wrong: 2.0 × too slow |" in shown
    assert "| 10.0 |  |  |  | not estimated |" in shown
    assert "- Raspberry Pi 5: estimated ÷ published 2.00" in shown
    assert "- all: estimated ÷ published 1.41" in shown
    assert "--measure" not in shown


def test_estimates_of_another_meter_are_called_so() -> None:
    shown = validate.markdown(page_of(pair(100, 150e6), meter="of old"))
    assert "of meter of old" in shown and "validate --measure" in shown


def test_estimates_of_another_version_of_a_runtime_are_called_so() -> None:
    old = replace(page_of(pair(100, 150e6)), versions={"ncnn": "1.0.1"})
    shown = validate.markdown(old)
    assert "of ncnn 1.0.1, this is 1.0.2" in shown and "validate --measure" in shown
    assert validation.read().stale == ""


def test_measuring_estimates_every_pair_once_and_stores_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[tuple[str, ...]] = []

    def measure_row(
        case: str,
        runtime: runtimes.Baseline,
        cpu: str,
        _progress: object,
        board: str,
        threads: int,
    ) -> Row:
        asked.append((case, runtime.name, cpu, board, str(threads)))
        counts = Counts(5, 80e6, 10e6)
        return Row(runtime.name, runtime.title, "1", counts)

    monkeypatch.setattr(validation, "RESULTS", tmp_path / "results.json")
    monkeypatch.setattr("netship.bench.measurement.case_of", lambda proto, name: name)
    monkeypatch.setattr("netship.bench.measurement.measure", measure_row)
    monkeypatch.setattr(published_networks, "build", lambda name: None)
    assert validate.main(["--measure", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert len(asked) == len(set(asked)) > 8
    assert shown["meter"] == meter_version()
    assert shown["versions"]["ncnn-default"] == runtimes.version(
        runtimes.BASELINES["ncnn"]
    )
    assert all(each["estimated_origin"] == "estimated" for each in shown["pairs"])
    assert all(
        each["published_origin"] == "measured on board" for each in shown["pairs"]
    )
    assert all(each["ratio"] > 0 for each in shown["pairs"])


def test_only_what_is_missing_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, str]] = []

    def measure_row(
        case: str, runtime: runtimes.Baseline, cpu: str, *_: object, **_more: object
    ) -> Row:
        asked.append((case, cpu))
        return Row(runtime.name, runtime.title, "1", Counts(5, 80e6, 10e6))

    monkeypatch.setattr(validation, "RESULTS", tmp_path / "results.json")
    monkeypatch.setattr("netship.bench.measurement.case_of", lambda proto, name: name)
    monkeypatch.setattr("netship.bench.measurement.measure", measure_row)
    monkeypatch.setattr(published_networks, "build", lambda name: None)
    known, missing = pair(100, 150e6), pair(50, None, "Raspberry Pi 5")
    missing = replace(
        missing, source=missing.source._replace(cpu="cortex-a76", memory="rpi5")
    )
    with pytest.raises(UserError, match="--measure missing: the stored estimates are"):
        validation.measure(page_of(known, meter="old"), Progress(quiet=True), True)
    assert not asked and not validation.RESULTS.exists()
    validation.measure(page_of(known, missing), Progress(quiet=True), True)
    assert asked == [("mobilenet_v2", "cortex-a76")]
    stored = json.loads(validation.RESULTS.read_text())
    figures = [tuple(each.values()) for _, each in sorted(stored["estimates"].items())]
    assert figures == [known.counts, Counts(5, 80e6, 10e6)]
    assert stored["meter"] == meter_version()


def test_a_network_that_cannot_be_run_stops_the_measuring(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(
        _case: object, runtime: runtimes.Baseline, *_rest: object, **_more: object
    ) -> Row:
        return Row(runtime.name, runtime.title, "1", None, refused="no QEMU")

    monkeypatch.setattr(validation, "RESULTS", tmp_path / "results.json")
    monkeypatch.setattr("netship.bench.measurement.case_of", lambda proto, name: name)
    monkeypatch.setattr("netship.bench.measurement.measure", refuse)
    monkeypatch.setattr(published_networks, "build", lambda name: None)
    with pytest.raises(UserError, match="mobilenet_v1 in ncnn.*: no QEMU"):
        validate.main(["--measure", "--json"])
    assert not validation.RESULTS.exists()


@pytest.mark.parametrize(
    "damage",
    [
        "",
        "{}",
        '{"meter": 1}',
        '{"meter": "", "versions": {}, "estimates": {"a": {}}}',
        '{"meter": "", "versions": 1, "estimates": {}}',
        '{"meter": "", "versions": {}, "estimates": 0}',
        *(
            f'{{"meter": "", "versions": {{}}, "estimates": {{"a": [1, {damaged}]}}}}'
            for damaged in ("0, 0", "-1, 5", '"x", 5', "NaN, 5", "1e308, 5")
        ),
    ],
)
def test_damaged_results_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    path = tmp_path / "results.json"
    path.write_text(damage)
    monkeypatch.setattr(validation, "RESULTS", path)
    with pytest.raises(UserError, match=r"validation_results\.json is damaged"):
        validation.read()


@pytest.mark.parametrize(
    ("part", "name", "value"),
    [
        ("sources", "clock", 0),
        ("sources", "clock", "fast"),
        ("sources", "threads", 3),
        ("sources", "half", "best"),
        ("sources", "board", []),
        ("measurements", "ms", 0),
        ("measurements", "ms", float("inf")),
        ("measurements", "source", "nobody"),
    ],
)
def test_damaged_published_figures_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: str, name: str, value: Any
) -> None:
    found = json.loads(validation.PUBLISHED.read_text())
    (next(iter(found[part].values())) if part == "sources" else found[part][0])[
        name
    ] = value
    path = tmp_path / "published.json"
    path.write_text(json.dumps(found))
    monkeypatch.setattr(validation, "PUBLISHED", path)
    with pytest.raises(UserError, match=r"published\.json or .* is damaged"):
        validation.read()


def test_the_page_names_sources_and_what_is_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from netship.bench.validation_page import write_validation

    pairs = (pair(100, 150e6), pair(100, 30e6), pair(100, None))
    left_out = (
        validation.LeftOut("A <b>bold</b> table", "https://example.org", "4 threads"),
    )
    path = tmp_path / "validation.html"
    write_validation(
        validation.Validation(pairs, left_out, meter_version(), {"ncnn": "1"}), path
    )
    page = path.read_text()
    assert "wrong: 5.0 × too fast" in page and SOURCE.url in page
    assert "measured on board" in page and "estimated" in page
    assert page.count("<circle") == 2 + 1
    assert "<script" not in page and "<b>bold" not in page


def test_the_page_without_estimates(tmp_path: Path) -> None:
    from netship.bench.validation_page import write_validation

    path = tmp_path / "validation.html"
    write_validation(page_of(pair(100, None)), path)
    assert "nothing estimated yet" in path.read_text()


def test_a_report_that_cannot_be_written_is_refused_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: Any) -> None:
        raise AssertionError("measured before the refusal")

    monkeypatch.setattr(validation, "measure", never)
    with pytest.raises(UserError, match="--report"):
        validate.main(["--measure", "--report", str(tmp_path)])
