"""However the tuner's process ends, what it has said to be measured is in the log."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from argparse import Namespace
from pathlib import Path

import onnx
import pytest
import tuning_worker
from conftest import ROOT
from stub_tuner import ROUND

from netship.records import lookup
from netship.targets.errors import UserError
from netship.targets.progress import Progress
from netship.tuning import apart
from netship.tuning.supervision import Rounds

# Of the clock, for a command that hangs.
_SECONDS = 300


def script(text: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", textwrap.dedent(text), *map(str, arguments)]
    return subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=_SECONDS
    )


_KILLED = """
    import json, os, random, signal, sys
    from pathlib import Path
    from netship.records.log import TuningLog
    log, header, record = Path(sys.argv[1]), json.loads(sys.argv[2]), json.loads(sys.argv[3])
    said = []

    def write(to):
        with TuningLog(log, header) as opened:
            first = 1000 * len(opened.read().lines)
            for number in range(first, first + 10**6, 4):
                batch = [record | {"r": [[each + 1], 0, 0, 1]} for each in range(number, number + 4)]
                opened.append(map(json.dumps, batch))
                os.write(to, b"".join(b"%d\\n" % each for each in range(number, number + 4)))

    for dice in map(random.Random, range(30)):
        here, there = os.pipe()
        child = os.fork()
        if not child:
            write(there)
        os.close(there)
        with os.fdopen(here) as lines:
            for _ in range(dice.randrange(1, 40)):
                said.append(int(next(lines)))
            os.kill(child, signal.SIGKILL)
            said += map(int, lines)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    print(*said)
"""


def test_no_record_that_was_said_is_lost_in_30_kills(tmp_path: Path) -> None:
    record = '{"i": [["[\\"k\\", [1]]", "llvm", [], "", 2, []], [[], []]], "v": "v0.6"}'
    header = (
        '{"target": "here", "measured": "by a test", "origin": "estimated", "tvm": "0"}'
    )
    log = tmp_path / "log.json"
    result = script(_KILLED, log, header, record)
    assert result.returncode == 0, result.stderr
    said = [int(each) for each in result.stdout.split()]
    kept = lookup.read(log)
    found = [int(each.seconds) - 1 for each in kept.records]
    assert len(said) >= 30 and set(said) <= set(found)
    # A kill may tear what was not said yet.
    assert len(set(found)) == len(found) and len(kept.skipped) <= 30


_SUPERVISED = """
    import os, sys
    from netship.targets.errors import run_command
    from netship.tuning.supervision import supervised
    {search}
    run_command(lambda _: supervised(search))
"""


def supervised(search: str) -> subprocess.CompletedProcess[str]:
    search = textwrap.indent(textwrap.dedent(search), "    ")
    return script(_SUPERVISED.format(search=search.strip()))


def test_a_task_whose_rounds_end_the_process_is_left() -> None:
    result = supervised(
        """
        def search(rounds):
            print(rounds.lost["conv"], rounds.lost["pool"], flush=True)
            for task in ("pool", "conv"):
                with rounds.at(task):
                    if task == "conv" and not rounds.is_left(task):
                        os.abort()
            return 7
        """
    )
    assert result.returncode == 7
    assert result.stdout.split() == ["0", "0", "1", "0", "2", "0"]
    first, second = result.stderr.splitlines()
    assert "ended by SIGABRT in a round of conv" in first and "goes on" in first
    assert "ended by SIGABRT in a round of conv" in second and "is left" in second


@pytest.mark.parametrize(
    "end",
    ["os.abort()", "os.kill(os.getpid(), 9)"],
    ids=["outside a round", "by somebody"],
)
def test_a_search_that_cannot_go_on_is_one_line(end: str) -> None:
    inside = "kill" in end
    result = supervised(
        f"""
        def search(rounds):
            with rounds.at("conv" if {inside} else ""):
                {end}
        """
    )
    assert result.returncode == 2 and result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: the search's process was ended by SIG")
    assert "is kept" in line


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("network") / "tiny.onnx"
    onnx.save(tuning_worker.network(), path)
    return path


def tuner(mode: str, network: Path, folder: Path) -> subprocess.Popen[str]:
    options = f"--model {network} --output log.json --jobs 1 --trials {3 * ROUND}"
    folders = [str(ROOT), str(ROOT / "tests")]
    return subprocess.Popen(
        [sys.executable, "-m", "tests.stub_tuner", mode, "flag", *options.split()],
        cwd=folder,
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(folders),
            "TMPDIR": str(folder),
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_is_heard_while_a_measurement_does_not_end(
    number: signal.Signals, network: Path, tmp_path: Path
) -> None:
    process = tuner("stuck", network, tmp_path)
    end = time.monotonic() + _SECONDS
    while not (tmp_path / "flag").exists() and process.poll() is None:
        assert time.monotonic() < end
        time.sleep(0.05)
    process.send_signal(number)
    _, said = process.communicate(timeout=_SECONDS)
    assert process.returncode == 128 + number, said
    kept = lookup.read(tmp_path / "log.json")
    assert len(kept.lines) == ROUND and kept.skipped == ()
    assert f"interrupted: {ROUND} trials kept in log.json" in said.splitlines()[-1]
    assert not list(tmp_path.glob("netship-tune-*"))


@pytest.mark.slow
def test_an_abort_of_the_search_costs_one_round(network: Path, tmp_path: Path) -> None:
    process = tuner("abort", network, tmp_path)
    _, said = process.communicate(timeout=_SECONDS)
    assert process.returncode == 0, said
    assert said.count("ended by SIGABRT") == 1 and "Traceback" not in said
    kept = lookup.read(tmp_path / "log.json")
    assert len(kept.lines) >= 3 * ROUND and kept.skipped == ()
    assert not list(tmp_path.glob("netship-tune-*"))


def aborts(
    arguments: Namespace, progress: Progress, quiet: bool, rounds: Rounds
) -> int:
    """For the Python API's process: as often as asked for; the rounds that were lost."""
    progress.note("it begins")
    with rounds.at("conv"):
        if rounds.lost["conv"] < arguments.times:
            os.abort()
    return rounds.lost["conv"]


def refuses(arguments: Namespace, *_: object) -> None:
    raise UserError(f"no board {arguments.times}")


def fails(arguments: Namespace, *_: object) -> None:
    raise LookupError("a bug")


class Said(Progress):
    def __init__(self) -> None:
        super().__init__(quiet=True)
        self.lines: list[str] = []

    def note(self, text: str) -> None:
        self.lines.append(text)


def test_an_abort_of_the_search_leaves_the_caller_of_the_api_alive() -> None:
    progress = Said()
    assert apart.run(aborts, Namespace(times=1), progress) == 1
    first, lost, second = progress.lines
    assert first == second == "it begins"
    assert "ended by SIGABRT in a round of conv" in lost and "goes on" in lost


def test_what_the_search_raises_reaches_the_caller_of_the_api() -> None:
    with pytest.raises(UserError, match="no board 3"):
        apart.run(refuses, Namespace(times=3), Said())
    with pytest.raises(RuntimeError, match="LookupError: a bug"):
        apart.run(fails, Namespace(), Said())
