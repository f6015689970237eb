"""What a user with a board of their own gets: a factor, stored, shown, and refusals in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from check_results import manifest

from netship.bundle.manifest import ModelIdentity
from netship.bundle.store import Bundle
from netship.meter import __main__ as meter
from netship.meter import calibrate
from netship.meter.__main__ import table, write_page
from netship.meter.builds import Build
from netship.meter.counts import Counts
from netship.meter.operators import Metered, Operator
from netship.targets.errors import UserError

CHECKED = {
    "bundle": "out/model-arm-cortex-a72",
    "model_sha256": "ab" * 32,
    "target": "arm-cortex-a72",
    "threads": 1,
    "latency_ms": {"median": 75.0, "p90": 76.0, "p99": 77.0, "minimum": 74.0},
    "origin": "measured",
    "device": "measured on board",
}


@pytest.fixture(autouse=True)
def own_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))


def result(folder: Path, **changes: Any) -> Path:
    path = folder / "result.json"
    path.write_text(json.dumps({**CHECKED, **changes}))
    return path


def estimate(bundle: Path, cpu: str, board: str = "") -> Counts:
    assert (bundle, cpu) == (Path("out/model-arm-cortex-a72"), "cortex-a72")
    return Counts(100_000_000, 45e6, 45e6)


def a_bundle(_path: Path) -> Bundle:
    model = ModelIdentity(name="m.onnx", sha256="ab" * 32)
    return Bundle(Path("out"), manifest(model=model))


def test_no_factor_before_a_calibration() -> None:
    assert calibrate.factor("cortex-a72") is None


def test_a_board_measurement_becomes_the_factor_of_its_cpu(tmp_path: Path) -> None:
    measured = calibrate.read_result(result(tmp_path))
    made = calibrate.calibrate(measured, 1.5, estimate)
    assert made.estimated_ms == 60.0
    assert made.factor == 1.25
    assert calibrate.factor("cortex-a72") == made
    assert calibrate.factor("cortex-a76") is None


def test_the_command_line_stores_shows_and_forgets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(calibrate, "count_bundle", estimate)
    monkeypatch.setattr(calibrate, "open_bundle", a_bundle)
    path = str(result(tmp_path))
    assert calibrate.main([path, "--clock", "1.8", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert (shown["estimated_ms"], shown["factor"]) == (55.0, 1.3636)
    assert calibrate.main([path]) == 0
    line = capsys.readouterr().out
    assert "75.00 ms measured on board" in line and "estimated at 1.50 GHz" in line
    stored = calibrate.factor("cortex-a72")
    assert stored is not None and stored.factor == 1.25
    with pytest.raises(UserError, match="for it, only for cortex-a72$"):
        calibrate.main(["--forget", "cortex-a53"])
    assert calibrate.main(["--forget", "cortex-a72"]) == 0
    assert "cortex-a72: its factor is removed from" in capsys.readouterr().out
    assert calibrate.factor("cortex-a72") is None
    assert calibrate.main([path]) == 0
    capsys.readouterr()
    assert calibrate.main(["--forget", "cortex-a72", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"cpu": "cortex-a72", "removed": True}
    with pytest.raises(UserError, match="for it, nor for any other CPU$"):
        calibrate.main(["--forget", "cortex-a72"])


def test_a_factor_of_another_meter_is_not_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = calibrate.calibrate(
        calibrate.read_result(result(tmp_path)), 1.5, lambda *_: Counts(1, 45e6, 45e6)
    )
    metered = Metered(
        "cortex-a72", (Operator("k", "", 1, 1, 45e6, 45e6, 1, (64, 64)),), "float32", 4
    )
    page = tmp_path / "page.html"

    def shown() -> str:
        write_page([Build("out", metered)], made, page)
        return table(metered, made) + page.read_text()

    assert "factor of 1.25" in table(metered, made) and "your own board" in shown()
    monkeypatch.setattr(calibrate, "meter_version", lambda: "new")
    assert "python -m meter calibrate again" in table(metered, made)
    assert "your own board" not in shown() and "1.25" not in shown()


def test_a_factor_is_shown_for_its_board_and_one_thread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(calibrate, "count_bundle", estimate)
    monkeypatch.setattr(calibrate, "open_bundle", a_bundle)
    assert calibrate.main([str(result(tmp_path)), "--board", "rk3399"]) == 0
    assert "at 1.80 GHz: factor 1.50" in capsys.readouterr().out
    made = calibrate.factor("cortex-a72")
    assert made is not None and made.board == "rk3399"
    operators = (Operator("k", "", 1, 1, 45e6, 45e6, 1, (64, 64)),)
    of_pi = Metered("cortex-a72", operators, "float32", 4)
    for metered, suits in (
        (of_pi._replace(board="rk3399"), True),
        (of_pi, False),
        (of_pi._replace(board="rk3399", threads=4), False),
    ):
        page = tmp_path / "page.html"
        write_page([Build("out", metered)], made, page)
        for text in (table(metered, made), page.read_text()):
            assert ("factor of 1.50" in " ".join(text.split())) == suits
        words = "no: your board's factor is of the RK3399's memory and 1 thread"
        assert (words in table(metered, made)) != suits
    default = calibrate.calibrate(
        calibrate.read_result(result(tmp_path)), 1.5, estimate
    )
    assert default.suits("", 1) and default.suits("rpi4", 1)
    with pytest.raises(UserError, match="--board rpi5: no memory of it is known"):
        calibrate.main([str(result(tmp_path)), "--board", "rpi5"])


def test_a_result_of_another_network_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibrate, "open_bundle", a_bundle)
    path = result(tmp_path, model_sha256="cd" * 32)
    with pytest.raises(UserError, match="is of another network than the one"):
        calibrate.main([str(path)])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"device": "emulated"}, "its times are emulated, not measured on board"),
        ({"device": "measured on host"}, "measured on host, not measured on board"),
        ({"device": "estimated"}, "its times are estimated"),
        ({"threads": 4}, "4 threads"),
        ({"latency_ms": None}, "has no times"),
        ({"latency_ms": {"median": 0}}, "has no times"),
        ({"latency_ms": {"median": "fast"}}, "not a result"),
        ({"target": "znver4"}, "the meter has no model"),
        ({"threads": "many"}, "not a result"),
    ],
)
def test_what_is_no_measurement_on_a_board_is_refused(
    tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    path = result(tmp_path, **changes)
    with pytest.raises(UserError, match=said):
        calibrate.main([str(path)])
    assert calibrate.factor("cortex-a72") is None


@pytest.mark.parametrize("text", ["", "[]", "{}", "no json", '{"device": 1}'])
def test_other_files_are_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "other.json"
    path.write_text(text)
    with pytest.raises(UserError, match=r"other\.json"):
        calibrate.read_result(path)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="No such file"):
        calibrate.read_result(tmp_path / "none.json")


@pytest.mark.parametrize("text", ["{", "[]", '{"cortex-a72": {"factor": 1}}'])
def test_a_damaged_store_is_named(text: str) -> None:
    path = calibrate.config_file()
    path.parent.mkdir(parents=True)
    path.write_text(text)
    with pytest.raises(UserError, match=str(path)):
        calibrate.factor("cortex-a72")


def test_a_damaged_store_is_refused_before_anything_is_counted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def never(*_: Any) -> None:
        raise AssertionError("counted before the refusal")

    path = calibrate.config_file()
    path.parent.mkdir(parents=True)
    path.write_text("{")
    monkeypatch.setattr(meter, "measure", never)
    with pytest.raises(UserError, match="not what `python -m meter calibrate` wrote"):
        meter.main(["out/model", "--cpu", "cortex-a72"])


@pytest.mark.parametrize(
    "changes",
    [
        {"factor": "1.25"},
        {"factor": -1},
        {"factor": 10**400},
        {"factor": True},
        {"date": 7},
        {"cpu": "cortex-a53"},
        {"board": "rpi5"},
        {"unheard_of": 1},
    ],
    ids=str,
)
def test_a_changed_factor_is_named(tmp_path: Path, changes: dict[str, Any]) -> None:
    calibrate.calibrate(calibrate.read_result(result(tmp_path)), 1.5, estimate)
    path = calibrate.config_file()
    stored = json.loads(path.read_text())
    stored["cortex-a72"] |= changes
    path.write_text(json.dumps(stored))
    with pytest.raises(UserError, match="not what `python -m meter calibrate` wrote"):
        calibrate.factor("cortex-a72")


@pytest.mark.parametrize("clock", ["fast", "0", "1500", "nan"])
def test_a_clock_that_no_board_has_is_refused(clock: str) -> None:
    with pytest.raises(UserError, match="not a clock in GHz"):
        calibrate.main(["result.json", "--clock", clock])
