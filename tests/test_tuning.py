"""Tuning: what is found is kept, whatever goes wrong; a wrong schedule is never a best."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx
import pytest
import tuning_worker
from conftest import ROOT, run
from hypothesis import given, settings
from hypothesis import strategies as st
from relay_worker import relay_worker

from netship.records import lookup
from netship.records.log import TuningLog
from netship.records.workloads import operator_of
from netship.targets.errors import UserError
from netship.tuning import tune
from netship.tuning.transfer import distance, refit

HEADER, ROUND = tuning_worker.HEADER, tuning_worker.ROUND
RECORD = '{"i": [["[\\"k\\", [1]]", "llvm", [], "", 2, []], [[], []]], "r": [[0.5], 0, 0, 1], "v": "v0.6"}'


@pytest.fixture(scope="module")
def tuner() -> Iterator[ProcessPoolExecutor]:
    with relay_worker() as pool:
        yield pool


@pytest.fixture
def do(tuner: ProcessPoolExecutor) -> Callable[..., Any]:
    return lambda work, *arguments: tuner.submit(work, *arguments).result()


@pytest.mark.slow
def test_tasks_are_those_of_the_network_in_words(do: Callable[..., Any]) -> None:
    found = {operator: rest for operator, *rest in do(tuning_worker.operators)}
    weight, flops, nbytes = found["conv 3×3, 3→8, 16×16"]
    assert weight == 1
    multiplied = 2 * 16 * 16 * 8 * 3 * 9
    assert multiplied <= flops <= multiplied * 1.1
    assert nbytes == 4 * (16 * 16 * 3 + 3 * 3 * 3 * 8 + 8 + 16 * 16 * 8)
    assert "conv 1×1, 8→5, 1×1" in found


@pytest.mark.slow
def test_what_a_build_fuses_in_pairs_is_not_tuned(do: Callable[..., Any]) -> None:
    pair = {"conv 1×1, 3→96, {0}×{0}", "depthwise 3×3, 96, {0}×{0}"}
    small, large = (
        {text.format(size) for text in pair}
        & {*do(tuning_worker.operators_of_a_pair, size)}
        for size in (20, 60)
    )
    assert len(small) == 2 and not large


@pytest.mark.slow
def test_float16_begins_with_records_of_float32_and_vectors_of_twice_as_many(
    do: Callable[..., Any],
) -> None:
    found = do(tuning_worker.retyped)
    assert found["conv 3×3, 3→16, 16×16"] == [[1, 1, 8]]


@pytest.mark.slow
def test_a_second_run_goes_on_where_the_first_ended(
    do: Callable[..., Any], tmp_path: Path
) -> None:
    first, second = do(tuning_worker.continued, tmp_path)
    assert first.error == second.error == ""
    assert sum(first.trials) == first.lines == 3 * ROUND
    assert sum(second.trials) == 5 * ROUND
    assert (second.skipped, second.misfits) == (3, 1)
    assert min(second.best) <= min(first.best)


@pytest.mark.slow
def test_few_trials_give_every_task_a_time_before_any_gets_more(
    do: Callable[..., Any], tmp_path: Path
) -> None:
    outcome = do(tuning_worker.few_trials, tmp_path)
    assert outcome.error == ""
    assert all(map(math.isfinite, outcome.best))
    assert sum(outcome.trials) == len(outcome.trials) + ROUND - 1


@pytest.mark.parametrize(
    ("trials", "words"),
    [(5, "too few for every task.*give --trials 7 or more"), (130, "about 21 a task")],
)
def test_what_a_number_of_trials_can_reach_is_said_before(
    trials: int, words: str
) -> None:
    states: Any = [SimpleNamespace(best=math.inf, trials=0) for _ in range(5)]
    states += [SimpleNamespace(best=1.0, trials=2)]
    assert re.search(words, tune._reach(states, trials))


@pytest.mark.slow
def test_a_task_of_which_all_fails_does_not_stop_the_rest(
    do: Callable[..., Any], tmp_path: Path
) -> None:
    outcome = do(tuning_worker.one_task_fails, tmp_path)
    failed = [i for i, best in enumerate(outcome.best) if math.isinf(best)]
    assert len(failed) == 1 and outcome.trials[failed[0]] == outcome.errors[failed[0]]
    assert outcome.trials[failed[0]] <= ROUND * 5
    assert all(trials for i, trials in enumerate(outcome.trials) if i not in failed)


@pytest.mark.slow
def test_boards_that_stay_away_end_the_search_and_nothing_is_lost(
    do: Callable[..., Any], tmp_path: Path
) -> None:
    gone, back = do(tuning_worker.measurer_gone, tmp_path)
    assert gone.error == "UserError: the board is gone"
    assert gone.lines == sum(gone.trials) > 0
    assert back.error == "" and back.lines >= 3 * ROUND


@pytest.mark.slow
def test_a_full_disk_ends_the_search_and_nothing_is_lost(
    do: Callable[..., Any], tmp_path: Path
) -> None:
    full, room = do(tuning_worker.disk_full, tmp_path)
    assert "File too large" in full.error and "make room" in full.error
    assert full.lines >= sum(full.trials) > 0
    assert room.error == "" and room.lines >= full.lines + ROUND


@pytest.mark.slow
def test_a_clock_that_jumps_costs_no_record_and_no_time(
    do: Callable[..., Any], tmp_path: Path
) -> None:
    first, second = do(tuning_worker.clock_jumps, tmp_path)
    assert first.error == second.error == ""
    assert sum(first.trials) == first.lines == 3 * ROUND
    assert sum(second.trials) == second.lines == 5 * ROUND
    assert first.skipped == second.skipped == 0
    assert {record.when for record in lookup.read(tmp_path / "log.json").records} > {0}


@pytest.mark.slow
def test_a_wrong_schedule_is_an_error_and_never_the_best(
    do: Callable[..., Any], tmp_path: Path
) -> None:
    outcome, right = do(tuning_worker.wrong_answer, tmp_path)
    assert sum(outcome.errors) == 1
    assert min(outcome.best) == min(right)
    assert do(tuning_worker.is_right_tells) == [True, False]


@pytest.mark.slow
def test_ctrl_c_keeps_what_was_measured(do: Callable[..., Any], tmp_path: Path) -> None:
    outcome = do(tuning_worker.interrupted, tmp_path)
    assert outcome.error.startswith("Interrupted")
    assert 0 < outcome.lines == sum(outcome.trials) <= 2 * ROUND


@pytest.mark.slow
def test_records_of_other_logs_are_measured_first(
    do: Callable[..., Any], tmp_path: Path
) -> None:
    for name in ("there", "here"):
        (tmp_path / name).mkdir()
    do(tuning_worker.continued, tmp_path / "there")
    log = tmp_path / "there" / "log.json"
    there = lookup.read(log).lines
    log.write_text(log.read_text().replace("num-cores=1", "num-cores=2"))
    outcome = do(tuning_worker.warmed, tmp_path / "here", log)
    assert outcome.error == ""
    here = lookup.read(tmp_path / "here" / "log.json").lines
    known = {json.dumps(json.loads(line)["i"][1]) for line in there}
    assert len(here) >= ROUND
    assert all(json.dumps(json.loads(line)["i"][1]) in known for line in here)
    assert all("num-cores=1" in line for line in here)


@pytest.mark.slow
def test_records_of_another_network_are_fitted_to_the_shapes_of_this_one(
    do: Callable[..., Any], tmp_path: Path
) -> None:
    (tmp_path / "here").mkdir()
    fitted = do(tuning_worker.transferred, tmp_path, 24, 20)
    assert len(fitted) >= 3
    for line, right in fitted:
        assert right
        for kind, *rest in json.loads(line)["i"][1][1]:
            if kind == "SP":
                *_, extent, lengths, _ = rest
                assert extent in (1, 3, 24, 20) and extent % math.prod(lengths) == 0
    log = tmp_path / "log.json"
    outcome = do(tuning_worker.warmed, tmp_path / "here", log, 3, 24, 20)
    assert outcome.error == "" and outcome.errors == [0, 0, 0]
    known = [json.loads(line)["i"][1] for line, _ in fitted]
    first = lookup.read(tmp_path / "here" / "log.json").lines[:ROUND]
    assert all(json.loads(line)["i"][1] in known for line in first)


@settings(deadline=None)
@given(
    lengths=st.lists(st.integers(1, 16), min_size=1, max_size=3),
    extent=st.integers(1, 1000),
    outer=st.integers(1, 8),
)
def test_split_lengths_are_fitted_from_the_innermost_on(
    lengths: list[int], extent: int, outer: int
) -> None:
    fitted = refit(lengths, extent)
    assert len(fitted) == len(lengths) and extent % math.prod(fitted) == 0
    if extent % lengths[-1] == 0:
        assert fitted[-1] == lengths[-1]
    assert refit(lengths, outer * math.prod(lengths)) == lengths


def test_splits_end_with_whole_vectors_where_they_can() -> None:
    assert refit([1, 16], 24) == [1, 12]
    assert refit([1, 16], 24, 8) == [1, 24]
    assert refit([3, 16], 20, 8) == [1, 20]


def test_neighbours_have_the_same_structure_and_the_nearest_shapes_come_first() -> None:
    def key(structure: str, *shape: int) -> str:
        return json.dumps([structure, list(shape)])

    assert distance(key("a", 1, 8), key("a", 1, 8)) == 0
    assert distance(key("a", 1, 8), key("a", 2, 4)) == pytest.approx(math.log(4))
    assert distance(key("a", 1, 8), key("b", 1, 8)) == math.inf
    assert distance(key("a", 1, 8), key("a", 8)) == math.inf


@pytest.mark.slow
def test_a_candidate_that_crashes_or_hangs_costs_only_itself(
    do: Callable[..., Any],
) -> None:
    results = do(tuning_worker.workers_that_end)
    assert results[::2] == ["1", "2", "3", "4"]
    assert "terminated" in results[1]
    assert "no end within 2 s" in results[3] and "no end within 2 s" in results[5]


@pytest.mark.slow
def test_boards_share_the_work_and_one_that_goes_away_is_waited_for(
    do: Callable[..., Any], tmp_path: Path
) -> None:
    outcome = do(tuning_worker.boards, tmp_path)
    assert outcome["good"].count(True) == 12
    assert outcome["good"][3:5] == [False, False]
    assert len(outcome["failed"]) == 2
    assert "nobody listens" in outcome["error"] and "is kept" in outcome["error"]


@pytest.mark.slow
def test_kill_at_any_moment_and_go_on(tmp_path: Path) -> None:
    model, log = tmp_path / "tiny.onnx", tmp_path / "log.json"
    onnx.save(tuning_worker.network(), model)
    command = [sys.executable, "-m", "tuning.tune", "--model", str(model)]
    command += ["--output", str(log), "--jobs", "1"]
    process = subprocess.Popen(
        [*command, "--trials", "400"], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout
    assert "trials" in process.stdout.readline()
    second = run("tuning.tune", *command[3:])
    assert second.returncode == 2 and "another tuner" in second.stderr
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()
    before = len(lookup.read(log).lines)
    assert before >= 1
    again = run("tuning.tune", *command[3:], "--trials", before + 5, "--json")
    assert again.returncode == 0, again.stderr
    said = json.loads(again.stdout)
    assert said["trials"] >= before + 5 and said["origin"] == "measured on host"
    assert said["gain"]["untuned"] > 0 and said["gain"]["tuned"] > 0
    after = lookup.read(log)
    assert before + 5 <= len(after.lines) <= before + 5 + 32 and after.skipped == ()
    assert _children_named(str(tmp_path)) == []


def _children_named(text: str) -> list[str]:
    found = subprocess.run(
        ["pgrep", "-f", text], capture_output=True, text=True, check=False
    )
    return [pid for pid in found.stdout.split() if int(pid) != os.getpid()]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--tracker", "127.0.0.1:9"], "--tracker needs --key"),
        (["--key", "pi"], "--key goes with"),
        (["--rpc", "h:1", "--measure", "meter"], "take one"),
        (["--measure", "meter", "--threads", "2"], "counts one thread"),
        (["--target", "cortex-m7"], "nothing to tune"),
        (["--target", "x86-64-v3", "--measure", "meter"], "no meter for x86-64-v3"),
        (["--target", "arm-cortex-a72"], "--measure meter for an arm-cortex"),
        (["--tracker", "127.0.0.1:9", "--key", "pi"], "nobody listens"),
        (["--rpc", "127.0.0.1:9"], "nobody listens"),
        (["--rpc", "board"], "is not HOST:PORT"),
    ],
)
def test_refusals_are_one_line(options: list[str], words: str) -> None:
    result = run("tuning.tune", "--model", "mobilenetv2-0.35-96", *options)
    assert result.returncode == 2
    (line,) = [x for x in result.stderr.splitlines() if x.startswith("error: ")]
    assert words in line


def test_a_log_belongs_to_one_target_way_and_tvm(tmp_path: Path) -> None:
    with TuningLog(tmp_path / "log", HEADER) as log:
        log.append([RECORD])
        with pytest.raises(UserError, match="another tuner"):
            TuningLog(tmp_path / "log", HEADER)
    for key in ("target", "origin", "threads", "tvm"):
        with pytest.raises(UserError, match=f"of {key} .* choose another --output"):
            TuningLog(tmp_path / "log", HEADER | {key: "other"})


def test_a_torn_line_is_not_glued_to_the_next(tmp_path: Path) -> None:
    path = tmp_path / "log"
    with TuningLog(path, HEADER) as log:
        log.append([RECORD, RECORD])
    path.write_bytes(path.read_bytes()[:-30])
    with TuningLog(path, HEADER) as log:
        log.append([RECORD])
        kept = log.read()
    assert len(kept.lines) == 2 and len(kept.skipped) == 1


@pytest.mark.parametrize(
    ("key", "words"),
    [
        (
            [[1, 56, 56, 24], [1, 1, 24, 144], [1, 1, 1, 144], [1, 56, 56, 144]],
            "conv 1×1, 24→144, 56×56",
        ),
        (
            [[1, 112, 112, 96], [3, 3, 96, 1], [1, 1, 1, 96], [1, 56, 56, 96]],
            "depthwise 3×3, 96, 56×56",
        ),
        ([[1, 7, 7, 1280], [1, 1, 1, 1280]], "other, 1×1"),
    ],
)
def test_a_task_is_named_by_what_it_computes(key: list[Any], words: str) -> None:
    assert operator_of(json.dumps(["hash", *key])) == words
