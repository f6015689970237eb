"""Among each task's records the one that is quickest inside the network is chosen."""

from __future__ import annotations

from pathlib import Path

from conftest import run

from netship.tuning.refine import choose


def test_a_task_takes_the_build_in_which_it_cost_least() -> None:
    costs = [{"a": 5.0, "b": 9.0}, {"a": 4.0, "b": 12.0}, {"a": 6.0, "b": 7.0}]
    found = {choice.workload: choice for choice in choose(costs)}
    assert found["a"].build == 1
    assert found["b"].build == 2
    assert found["b"].costs == (9.0, 12.0, 7.0)


def test_what_noise_may_explain_changes_nothing() -> None:
    (choice,) = choose([{"a": 100.0}, {"a": 99.5}])
    assert choice.build == 0


def test_a_build_that_lacks_the_task_is_not_chosen() -> None:
    (choice,) = choose([{"a": 5.0}, {}])
    assert choice.build == 0


def test_the_costliest_task_stands_first() -> None:
    costs = [{"a": 1.0, "b": 3.0, "c": 2.0}]
    assert [choice.workload for choice in choose(costs)] == ["b", "c", "a"]


def test_a_log_without_records_is_refused_before_any_build(tmp_path: Path) -> None:
    log = tmp_path / "x.json"
    log.write_text('# {"measured": "measured on host: a test"}\n')
    options = ("--model", "m.onnx", "--records", log, "--output", tmp_path / "y.json")
    result = run("tuning.refine", *options)
    assert result.returncode == 2
    assert "no record without an error" in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
