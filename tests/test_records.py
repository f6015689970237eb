"""Tuning records: equal targets match, logs of different worth never mix, whatever is wrong is named."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from changed_json import Change, changed, changes
from conftest import run, succeed
from hypothesis import given, settings

from netship.records import lookup
from netship.records.lookup import SHIPPED, canonical, find
from netship.targets.errors import UserError
from netship.targets.presets import resolve
from netship.tuning.records import distil, main, manifest, merge
from netship.tuning.transfer import distance

ZNVER4 = "llvm -keys=cpu -mcpu=znver4 -num-cores=1"


def record(task: str = "a", micros: float = 1.0, error: int = 0, step: int = 0) -> str:
    workload = json.dumps([task, [1, 2]])
    task_part = [workload, ZNVER4, [1, 64, 64, 0, 0, 0, 0, 0], "", 2, []]
    return json.dumps(
        {
            "i": [task_part, [[], [["CI", step]]]],
            "r": [[micros / 1e6], error, 0.1, 1_700_000_000],
            "v": "v0.6",
        }
    )


def log(
    path: Path,
    *lines: str,
    preset: str = "znver4",
    target: str = ZNVER4,
    origin: str = "measured on host",
    **more: object,
) -> Path:
    header = {
        "target": target,
        "preset": preset,
        "origin": origin,
        "measured": f"{origin}: a test",
        "threads": 1,
        "tvm": "0.19.0",
        **more,
    }
    path.parent.mkdir(exist_ok=True)
    path.write_text("\n".join([f"# {json.dumps(header)}", *lines]) + "\n")
    return path


def key(task: str) -> str:
    return json.dumps([task, [1, 2]])


def test_records_are_found_here_next_to_the_model_and_in_the_user_s_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    for folder in (".", "../models", "../data/netship"):
        (tmp_path / "here" / folder).mkdir(parents=True, exist_ok=True)
        log(tmp_path / "here" / folder / "tuned" / "mine.json", record())
    model = lookup.places("../models/model.onnx")
    found = [log.path for log in find(resolve("znver4"), (), model)[0]]
    mine = [path for path in found if path.name == "mine.json"]
    data = tmp_path / "data" / "netship" / "tuned" / "mine.json"
    assert mine == [Path("tuned/mine.json"), Path("../models/tuned/mine.json"), data]
    assert len(lookup.places("model.onnx")) == len(lookup.places()) == 3
    monkeypatch.setenv("XDG_DATA_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert lookup.places()[1] == tmp_path / ".local/share/netship/tuned"


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("llvm -mcpu=znver4", "llvm -keys=cpu -mcpu=znver4 -num-cores=4"),
        (
            "llvm -mcpu=znver4 -mtriple=x86_64-linux-gnu",
            "llvm  -mcpu=znver4 -keys=cpu",
        ),
        (
            resolve("arm-cortex-a72").tvm,
            "llvm -keys=cpu,arm_cpu -mcpu=cortex-a72 -mtriple=aarch64-linux-gnu -num-cores=1",
        ),
        (
            "llvm -mattr=+neon,+vfp4 -mcpu=x",
            "llvm -mcpu=x -mattr=+vfp4,+neon",
        ),
    ],
)
def test_equal_targets_match_however_they_are_worded(one: str, other: str) -> None:
    assert canonical(one) == canonical(other)


def test_schedules_of_another_key_or_cpu_are_another_target() -> None:
    arm = "llvm -mtriple=aarch64-linux-gnu -mcpu=cortex-a72"
    assert canonical(arm) != canonical(arm + " -keys=cpu")
    assert canonical(ZNVER4) != canonical("llvm -mcpu=x86-64-v4")


def test_a_task_takes_the_board_then_this_machine_then_an_estimate(
    tmp_path: Path,
) -> None:
    log(tmp_path / "1.json", record(), origin="estimated")
    log(tmp_path / "2.json", record(), origin="measured on host")
    log(tmp_path / "3.json", record(), origin="measured on board")
    logs, _ = find(resolve("znver4"), (), [tmp_path])
    assert [each.name for each in logs] == ["3.json", "2.json", "1.json"]


def test_the_records_of_an_emulated_board_serve_only_where_they_are_named(
    tmp_path: Path,
) -> None:
    emulated = log(tmp_path / "1.json", record(), origin="emulated")
    assert lookup.read(emulated).origin == "emulated"
    assert main(["check", str(emulated)]) == 0
    assert find(resolve("znver4"), (), [tmp_path]) == ([], [])
    (named,), _ = find(resolve("znver4"), [emulated], [])
    assert named.name == "1.json"
    board = log(tmp_path / "2.json", record(), origin="measured on board")
    with pytest.raises(UserError, match="its origin is"):
        merge([lookup.read(emulated), lookup.read(board)])


def test_records_of_every_target_whose_instructions_serve_are_found_nearest_first(
    tmp_path: Path,
) -> None:
    for name in ("x86-64-v2", "x86-64-v4", "znver4", "arm-cortex-a72"):
        log(
            tmp_path / f"{name}.json",
            record(),
            preset=name,
            target=resolve(name).tvm,
        )

    def names(target: str) -> list[str]:
        return [each.preset for each in find(resolve(target), (), [tmp_path])[0]]

    assert names("znver4") == ["znver4", "x86-64-v4", "x86-64-v2"]
    assert names("x86-64-v3") == ["x86-64-v2"]
    assert names("arm-cortex-a76") == ["arm-cortex-a72"]
    assert names("llvm -mcpu=znver4")[0] == "znver4"
    assert names("cortex-m7") == []


def test_records_for_as_many_threads_come_first_but_after_the_targets_distance(
    tmp_path: Path,
) -> None:
    for name, threads in (("znver4", 1), ("znver4", 2), ("x86-64-v4", 4)):
        path = tmp_path / f"{name}-{threads}.json"
        target = resolve(name).tvm
        log(path, record(), preset=name, target=target, threads=threads)

    def names(threads: int) -> list[str]:
        logs, _ = find(resolve("znver4"), (), [tmp_path], threads)
        return [each.name.removesuffix(".json") for each in logs]

    assert names(1) == ["znver4-1", "znver4-2", "x86-64-v4-4"]
    assert names(2) == ["znver4-2", "znver4-1", "x86-64-v4-4"]
    assert names(4) == ["znver4-2", "znver4-1", "x86-64-v4-4"]


def test_what_the_user_names_comes_first_and_what_cannot_be_read_is_named(
    tmp_path: Path,
) -> None:
    log(tmp_path / "found" / "good.json", record(), origin="measured on board")
    (tmp_path / "found" / "broken.json").write_text("no header\n")
    own = log(tmp_path / "own.json", record(), origin="estimated")
    logs, notes = find(resolve("znver4"), [own], [tmp_path / "found"])
    assert [each.name for each in logs] == ["own.json", "good.json"]
    assert len(notes) == 1 and "broken.json: line 1" in notes[0]
    with pytest.raises(UserError, match="absent.json"):
        find(resolve("znver4"), [tmp_path / "absent.json"], [])


def test_a_person_sees_the_path_of_an_own_log_and_the_shipped_ones_in_one_line() -> (
    None
):
    logs, _ = find(resolve("arm-cortex-a72"), (), [SHIPPED])
    own = replace(logs[0], path=Path("tuned/mine.json"))
    mine, ours = lookup.described([*logs[:3], own])
    assert mine == f"tuned/mine.json, {own.measured}"
    assert ours == (
        f"{logs[0].name}, {logs[1].name} and 1 more, of those that netship brings, estimated"
    )


def test_a_failed_trial_is_no_record_of_its_task(tmp_path: Path) -> None:
    path = log(tmp_path / "x.json", record("a", error=2), record("b"))
    assert lookup.read(path).best.keys() == {key("b")}


def test_distilling_keeps_the_quickest_each_schedule_once(tmp_path: Path) -> None:
    lines = [record("a", micros, step=step) for step, micros in enumerate([3, 1, 2])]
    again = record("a", 1.5, step=1)
    failed = record("a", 0.1, error=4, step=9)
    whole = lookup.read(log(tmp_path / "x.json", *lines, again, failed))
    kept = distil(whole, 2)
    assert kept.lines == (lines[1], lines[2])
    assert kept.header["trials"] == 5


def test_logs_of_different_worth_are_not_merged(tmp_path: Path) -> None:
    host = lookup.read(log(tmp_path / "h.json", record("a")))
    more = lookup.read(
        log(tmp_path / "m.json", record("a"), record("b"), target="llvm -mcpu=znver4")
    )
    assert len(merge([host, more]).lines) == 2
    for change in (
        {"origin": "estimated"},
        {"target": "llvm -mcpu=x86-64-v4"},
        {"tvm": "0.20.0"},
        {"threads": 2},
    ):
        other = lookup.read(log(tmp_path / "o.json", record("c"), **change))
        with pytest.raises(UserError, match=f"its {next(iter(change))} is"):
            merge([host, other])


def test_check_names_each_line_and_says_why(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = log(
        tmp_path / "x.json",
        record(),
        record()[:40],
        '{"some": "thing"}',
        record().replace("v0.6", "v0.5"),
        record().replace("znver4", "skylake"),
    )
    assert main(["check", str(path)]) == 1
    said = capsys.readouterr().out
    assert f"{path}:3: torn" in said
    assert f"{path}:4: not a tuning record" in said
    assert f"{path}:5: a record of version 'v0.5'" in said
    assert "1 record of target 'llvm -keys=cpu -mcpu=skylake" in said
    assert main(["check", str(log(path, record()))]) == 0


WORKLOAD = json.dumps(["a", [1, 2], [3, 4]])
LINE = json.dumps(json.loads(record()) | {"i": [[WORKLOAD, ZNVER4], [[], [["CI", 1]]]]})
HEADER = json.dumps(
    {
        "target": ZNVER4,
        "preset": "znver4",
        "network": "a test's",
        "origin": "measured on host",
        "measured": "measured on host: a test",
        "threads": 1,
        "tvm": "0.19.0",
        "trials": 7,
    }
)


def _use_or_refuse(header: str, *lines: str) -> lookup.RecordLog | None:
    """A log that every command took, or refused in a line; None where its header was refused."""
    with tempfile.TemporaryDirectory() as folder:
        path, output = Path(folder) / "x.json", Path(folder) / "y.json"
        path.write_text("\n".join([f"# {header}", *lines, ""]))
        for words in (
            ["check", path],
            ["check", "--json", path],
            ["best", path, "--output", output],
            ["merge", path, path, "--output", output],
            ["manifest", path],
        ):
            try:
                assert main(list(map(str, words))) in (0, 1)
            except UserError as error:
                assert str(error).encode().count(b"\n") == 0
        find(resolve("znver4"), (), [Path(folder)])
        try:
            return lookup.read(path)
        except UserError as error:
            assert "x.json: line 1 must be" in str(error)
            return None


@settings(max_examples=300, deadline=None, derandomize=True)
@given(to=changes(LINE))
def test_a_changed_record_is_used_or_named(to: Sequence[Change]) -> None:
    log = _use_or_refuse(HEADER, changed(LINE, to))
    assert log and len(log.lines) + len(log.skipped) == 1
    for each in log.records:
        assert 0 < each.seconds < math.inf
        assert distance(each.workload, WORKLOAD) >= 0


@settings(max_examples=300, deadline=None, derandomize=True)
@given(to=changes(WORKLOAD))
def test_a_changed_workload_is_of_the_same_structure_or_infinitely_far(
    to: Sequence[Change],
) -> None:
    assert distance(changed(WORKLOAD, to), WORKLOAD) >= 0


@settings(max_examples=200, deadline=None, derandomize=True)
@given(to=changes(HEADER))
def test_a_changed_header_is_used_or_refused(to: Sequence[Change]) -> None:
    log = _use_or_refuse(changed(HEADER, to), LINE)
    assert log is None or len(log.lines) == 1


@pytest.mark.parametrize(
    "line",
    [
        "[" * 100_000,
        json.dumps("half a character \ud800"),
        LINE.replace("1e-06", "0"),
        LINE.replace("1e-06", "-1e-06"),
        LINE.replace("1e-06", "NaN"),
        LINE.replace("1e-06", "1e999"),
        LINE.replace("1e-06", "1" * 400),
        LINE.replace("1700000000", "1e300"),
        LINE.replace('\\"a\\"', "\\ud800"),
    ],
    ids=lambda line: line[:20] + line[-20:],
)
def test_what_is_no_record_is_named(line: str) -> None:
    assert line != LINE
    log = _use_or_refuse(HEADER, line)
    assert log and len(log.skipped) == 1 and "x.json:2: " in log.skipped[0]


def test_float32_and_float16_have_records_of_their_own(tmp_path: Path) -> None:
    target = resolve("znver4")
    single = log(tmp_path / "all" / "single.json", record())
    half = log(tmp_path / "all" / "half.json", record(), numbers="float16")
    for numbers, ours, other in (
        ("float32", single, half),
        ("float16", half, single),
    ):
        found, _ = find(target, (), [tmp_path / "all"], numbers=numbers)
        assert [each.path for each in found] == [ours]
        assert find(target, (ours,), (), numbers=numbers)[0][0].path == ours
        with pytest.raises(
            UserError, match=f"{other.name}: .* network is in {numbers}"
        ):
            find(target, (other,), (), numbers=numbers)
    with pytest.raises(UserError, match="numbers is 'float16', that of single.json"):
        merge([lookup.read(single), lookup.read(half)])


def test_shipped_records_are_whole(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", *map(str, sorted(SHIPPED.glob("*.json")))]) == 0


def test_the_manifest_of_shipped_records_is_theirs() -> None:
    """After a change: python -m tuning.records manifest records/shipped/*.json > records/shipped/MANIFEST.md"""
    written = (SHIPPED / "MANIFEST.md").read_text()
    assert written == manifest(sorted(SHIPPED.glob("*.json")))
    assert "not said" not in written


def test_the_command_line_distils_and_refuses_in_one_line(tmp_path: Path) -> None:
    source, output = log(tmp_path / "x.json", record()), tmp_path / "y.json"
    assert "1 record of 1 task," in succeed(
        "tuning.records", "best", source, "--output", output
    )
    assert lookup.read(output).header["kept"] == "the best 2 records a task"
    refused = run("tuning.records", "best", tmp_path / "z.json", "--output", output)
    assert refused.returncode == 2
    assert len(refused.stderr.strip().splitlines()) == 1
