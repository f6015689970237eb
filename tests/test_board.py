"""``python -m runtime_demo.board``: kits, emulated boards kept up, and what the doctor says of boards."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from boards import HOST, KEY, Board, until
from conftest import ROOT, run
from test_devices_rpc import children, ended
from tiny import tiny_bundle

from netship.devices.board.board_state import BoardState
from netship.runtime_demo.doctor import Check, Found, Grade, checks, fit
from netship.targets.presets import native, resolve

PI = BoardState(
    server="0.1.0",
    tvm="0.19.0",
    machine="aarch64",
    board="Raspberry Pi 4 Model B Rev 1.4",
    cpu_model="Cortex-A72",
    features=("fp", "asimd"),
    cores=4,
    threads=4,
    glibc="2.36",
    governor="performance",
    frequency_khz=1_500_000,
    temperature_c=48.2,
    throttled=0,
    memory_kb=3_884_000,
    disk_free_bytes=20e9,
)


def examine(**changed: object) -> dict[str, Check]:
    state = PI.model_copy(update=changed)
    return {row.name: row for row in checks(Found("ssh pi", state, "Raspberry Pi OS"))}


def test_a_good_board_is_fit_and_its_targets_are_named() -> None:
    rows = examine()
    assert fit(list(rows.values()))
    assert {row.grade for row in rows.values()} == {Grade.GOOD}
    assert "arm-cortex-a53, arm-cortex-a72" in rows["CPU"].found
    assert "a76" not in rows["CPU"].found


@pytest.mark.parametrize(
    ("changed", "row", "grade", "advice"),
    [
        ({"machine": "armv6l"}, "architecture", "missing", "another board"),
        ({"glibc": "2.24"}, "glibc", "missing", "upgrade"),
        ({"glibc": None}, "glibc", "missing", "install Raspberry Pi OS"),
        ({"machine": "arm"}, "CPU", "missing", "no target fits"),
        ({"threads": 1}, "cores", "note", "--threads 4"),
        ({"memory_kb": 60_000}, "memory", "note", "smaller network"),
        ({"disk_free_bytes": 1e6}, "disk", "missing", "make room"),
        ({"governor": "ondemand"}, "governor", "note", "echo performance"),
        ({"temperature_c": 81.0}, "temperature", "note", "cool it"),
        ({"throttled": 0x50005}, "throttling", "note", "power supply"),
        ({"server": "0.0.9"}, "server", "note", "kit"),
        ({"tvm": "0.18.0"}, "TVM", "missing", "0.19.0 is needed"),
    ],
)
def test_each_miss_says_what_to_do(
    changed: dict[str, object], row: str, grade: str, advice: str
) -> None:
    rows = examine(**changed)
    assert rows[row].grade == grade
    assert advice in rows[row].advice
    assert fit(list(rows.values())) == (grade != "missing")


def test_throttling_in_the_past_is_none_now() -> None:
    assert examine(throttled=0x50000)["throttling"].found == "none now"


def test_the_state_of_an_emulated_board_is_this_machines_and_not_told() -> None:
    rows = examine(emulated=True)
    unknown = {name for name, row in rows.items() if row.grade is Grade.UNKNOWN}
    assert unknown == {"governor", "temperature", "throttling"}


def test_the_doctor_over_rpc(tmp_path: Path) -> None:
    with Board(tmp_path / "board") as board:
        where = ("--rpc", f"{HOST}:{board.port}", "--key", KEY)
        result = run("runtime_demo.board", "doctor", *where)
        assert result.returncode == 0, result.stderr
        assert re.search(
            rf"^ok +architecture +{native().machine}$", result.stdout, re.MULTILINE
        )
        assert result.stdout.endswith("\nfit\n")
    result = run("runtime_demo.board", "doctor", *where)
    assert result.returncode == 2
    assert "nobody listens; on the board run" in result.stderr


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--target", "cortex-m7"), "a microcontroller takes C source, no kit"),
        (("--target", "arm-cortex-a73"), "unknown target"),
        (("--machine", "x86_64", "--bundle", "/nowhere"), "/nowhere"),
    ],
)
def test_a_kit_that_cannot_be(
    options: tuple[str, ...], words: str, tmp_path: Path
) -> None:
    output = tmp_path / "kit.tar.gz"
    result = run("runtime_demo.board", "kit", *options, "--output", output)
    assert result.returncode == 2
    assert words in result.stderr
    assert not output.exists()


@pytest.mark.parametrize("verb", [(), ("kit",), ("doctor",), ("emulate",)])
def test_help_needs_no_engine(verb: tuple[str, ...]) -> None:
    program = (
        "import sys; from netship.runtime_demo.board import main\n"
        "try: main(sys.argv[1:])\n"
        "finally: assert not {'tvm', 'onnx', 'numpy'} & set(sys.modules)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", program, *verb, "--help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert "usage:" in result.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    ("cpu", "target"),
    [("cortex-a72", "arm-cortex-a72"), ("cortex-a7", "arm-cortex-a7")],
)
def test_emulated_boards_are_kept_up_until_ctrl_c(
    tmp_path: Path, cpu: str, target: str
) -> None:
    bundle = tiny_bundle(tmp_path, resolve(target))
    (tmp_path / "scratch").mkdir()
    command = ["emulate", "--count", "2", "--cpu", cpu, "--port", "0"]
    process = subprocess.Popen(
        [sys.executable, "-m", "runtime_demo.board", *command],
        cwd=ROOT,
        env={**os.environ, "TMPDIR": str(tmp_path / "scratch")},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout
    lines = [process.stdout.readline() for _ in range(5)]
    everyone = children([process.pid])
    try:
        assert [line.split()[0] for line in lines] == [
            *("board", "board", "tracker", "check", "end")
        ]
        options = lines[3].split()[5:]
        result = run("runtime_demo.check", bundle.path, *options, "--json")
        assert result.returncode == 0, result.stderr
        said = json.loads(result.stdout)
        assert (said["device"], said["latency_ms"]) == ("emulated", None)
        assert said["board"]["emulated"] and said["board"]["before"] is None
        assert set(said["boards"]) == {line.split()[1].strip(",") for line in lines[:2]}
    finally:
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=30)
    assert process.returncode == 130, error
    assert error.endswith("the boards and the tracker have ended\n")
    assert "interrupted" not in error
    assert "Traceback" not in error
    until(lambda: all(ended(one) for one in everyone))
    assert list((tmp_path / "scratch").iterdir()) == []


@pytest.mark.slow
def test_an_emulated_cpu_that_qemu_does_not_know() -> None:
    result = run("runtime_demo.board", "emulate", "--cpu", "cortex-x9", "--port", 0)
    assert result.returncode == 2
    assert "knows no CPU 'cortex-x9', only" in result.stderr
