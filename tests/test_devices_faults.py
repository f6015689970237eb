"""Everything that goes wrong between a host and its boards, each as a command of its own: one line, and the next run works."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from boards import HOST, KEY, Board, Wire, free_port, tracked, until
from conftest import ROOT, run
from test_devices_rpc import listener
from tiny import tiny_bundle

from netship.bundle.golden import read_golden
from netship.bundle.store import Bundle
from netship.targets.presets import native, resolve

# Each starts commands.
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return tiny_bundle(tmp_path_factory.mktemp("faults"), native())


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    name = "arm-cortex-a72" if native().machine == "x86_64" else "x86-64-v2"
    return tiny_bundle(tmp_path_factory.mktemp("foreign"), resolve(name))


@pytest.fixture
def board(tmp_path: Path) -> Iterator[Board]:
    with Board(tmp_path / "board") as board:
        yield board


def check(
    bundle: Bundle, *options: object, key: str = KEY
) -> subprocess.CompletedProcess[str]:
    return run("runtime_demo.check", bundle.path, "--key", key, *options)


def at(port: int) -> tuple[str, str]:
    return "--rpc", f"{HOST}:{port}"


def refused(result: subprocess.CompletedProcess[str]) -> str:
    """The one line of a command that was refused."""
    assert result.returncode == 2, result.stdout + result.stderr
    assert "Traceback" not in result.stderr
    [line] = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert "; " in line, "what to do next"
    return line


def expect_next_run_works(bundle: Bundle, port: int) -> None:
    result = check(bundle, *at(port), "--repeat", 1)
    assert result.returncode == 0, result.stderr


def inputs(bundle: Bundle) -> list[bytes]:
    """What each inference sends, as it is on the wire."""
    return [check.inputs[0].tobytes()[:256] for check in read_golden(bundle)]


def middle(bundle: Bundle) -> bytes:
    """Bytes from the middle of the library."""
    content = bundle.library.read_bytes()
    words = content[len(content) // 2 :]
    start = next(i for i in range(len(words)) if content.count(words[i : i + 64]) == 1)
    return words[start : start + 64]


def test_killed_before(bundle: Bundle, board: Board) -> None:
    board.kill()
    line = refused(check(bundle, *at(board.port)))
    assert f"{HOST}:{board.port}: nobody listens; on the board run `./serve" in line
    board.start()
    expect_next_run_works(bundle, board.port)


def test_killed_during_the_upload(bundle: Bundle, board: Board) -> None:
    with Wire(board.port, middle(bundle), board.kill) as wire:
        line = refused(check(bundle, *at(wire.port)))
        assert wire.acted
    assert "the connection was lost" in line
    board.start()
    expect_next_run_works(bundle, board.port)
    assert board.files() == []


def test_killed_in_an_inference_and_gone_for_good(bundle: Bundle, board: Board) -> None:
    with Wire(board.port, inputs(bundle)[0], board.kill) as wire:
        result = check(bundle, *at(wire.port), "--wait", 1)
        assert wire.acted
    assert "the connection was lost" in refused(result)
    assert f"waiting up to 1 s for {HOST}:{wire.port} to come back" in result.stderr
    board.start()
    expect_next_run_works(bundle, board.port)


@pytest.mark.parametrize("image", [0, 1])
def test_a_board_that_restarts_is_waited_for_and_the_check_goes_on(
    bundle: Bundle, board: Board, image: int
) -> None:
    with Wire(board.port, inputs(bundle)[image], board.restart) as wire:
        result = check(bundle, *at(wire.port), "--repeat", 1)
        assert wire.acted
    assert result.returncode == 0, result.stderr
    assert f"{HOST}:{wire.port} is back" in result.stderr
    assert f"PASSED, {len(inputs(bundle))} golden inputs" in result.stdout


def test_killed_while_it_is_timed(bundle: Bundle, board: Board) -> None:
    command = ["-m", "runtime_demo.check", str(bundle.path), "--key", KEY]
    process = subprocess.Popen(
        [sys.executable, *command, *at(board.port), "--repeat", "1000000"],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    )
    assert process.stderr
    lines = iter(process.stderr.readline, "")
    assert any("comparing" in line for line in lines)
    board.kill()
    said = process.stderr.read()
    process.stderr.close()
    assert process.wait() == 2
    assert "the connection was lost" in said and "Traceback" not in said
    board.start()
    expect_next_run_works(bundle, board.port)


def test_an_image_that_takes_every_board_down_is_given_up(
    bundle: Bundle, board: Board
) -> None:
    word, times = inputs(bundle)[0], []

    class Deadly(Wire):
        @property
        def acted(self) -> bool:
            return False

        @acted.setter
        def acted(self, value: bool) -> None:
            pass

    def restart() -> None:
        times.append(1)
        board.restart()

    with Deadly(board.port, word, restart) as wire:
        line = refused(check(bundle, *at(wire.port)))
    assert "the connection was lost" in line
    assert len(times) == 3


def test_the_tracker_is_gone(bundle: Bundle) -> None:
    port = free_port()
    line = refused(check(bundle, "--tracker", f"{HOST}:{port}"))
    assert (
        f"tracker {HOST}:{port}: nobody listens; start one with `python -m tvm" in line
    )


def test_a_wrong_key(bundle: Bundle, board: Board, tmp_path: Path) -> None:
    line = refused(check(bundle, *at(board.port), key="rock"))
    assert "wants another key; give --key" in line
    expect_next_run_works(bundle, board.port)
    with tracked(tmp_path, 1) as (port, _):
        line = refused(check(bundle, "--tracker", f"{HOST}:{port}", key="rock"))
    assert "no board with key 'rock' (registered: pi); on the board run" in line


def busy(bundle: Bundle, *options: str) -> subprocess.Popen[str]:
    """Another user, who has the board until killed."""
    program = (
        "import sys; from pathlib import Path; from netship.runtime_demo.check import parser\n"
        "from netship.runtime_demo.options import open_session; from netship.targets.progress import Progress\n"
        "from netship.bundle.store import open_bundle\n"
        "arguments = parser().parse_args(sys.argv[1:])\n"
        "with open_session(open_bundle(arguments.bundle), arguments, Progress()):\n"
        "    print('open', flush=True); sys.stdin.read()\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(bundle.path), "--key", KEY, *options],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout
    assert process.stdout.readline() == "open\n"
    return process


def leave(process: subprocess.Popen[str]) -> None:
    process.communicate("")
    assert process.returncode == 0


def test_all_boards_are_busy(bundle: Bundle, tmp_path: Path) -> None:
    with tracked(tmp_path, 1) as (port, _):
        where = ("--tracker", f"{HOST}:{port}")
        other = busy(bundle, *where)
        try:
            result = check(bundle, *where, "--wait", 1)
            words = "waiting up to 1 s for one of 1 board with key 'pi', all busy"
            assert words in result.stderr
            assert "the one board with key 'pi' stayed busy for 1 s" in refused(result)
        finally:
            leave(other)
        result = check(bundle, *where, "--repeat", 1)
        assert result.returncode == 0, result.stderr


def test_a_board_that_is_busy_is_not_waited_for_for_ever(
    bundle: Bundle, board: Board
) -> None:
    other = busy(bundle, *at(board.port))
    try:
        result = check(bundle, *at(board.port), "--wait", 2)
        assert (
            f"waiting up to 2 s for {HOST}:{board.port}, which another" in result.stderr
        )
        assert "no answer within 2 s to the handshake" in refused(result)
    finally:
        leave(other)
    expect_next_run_works(bundle, board.port)


def test_two_users_at_once_both_get_the_reference(bundle: Bundle, board: Board) -> None:
    command = ["-m", "runtime_demo.check", str(bundle.path), "--key", KEY, "--json"]
    both = [
        subprocess.Popen(
            [sys.executable, *command, *at(board.port), "--repeat", "1"],
            cwd=ROOT,
            stdout=subprocess.PIPE,
        )
        for _ in range(2)
    ]
    for process in both:
        said, _ = process.communicate()
        assert json.loads(said)["passed"]


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        pytest.param(None, "accepts connections but did not answer", id="silent"),
        pytest.param(b"\x00" * 64, "is no TVM RPC server", id="garbage"),
    ],
)
def test_something_else_listens(
    bundle: Bundle, answer: bytes | None, words: str
) -> None:
    with listener(answer) as port:
        assert words in refused(check(bundle, *at(port)))


def test_a_board_that_falls_silent_in_a_session(bundle: Bundle, board: Board) -> None:
    """The library's upload goes nowhere: a network that swallows everything."""
    from netship.devices.sessions.rpc import open_rpc
    from netship.devices.transport.link import Address, LostError

    def stop() -> None:
        os.killpg(board.process.pid, signal.SIGSTOP)

    with (
        Wire(board.port, middle(bundle), stop) as wire,
        pytest.raises(
            LostError, match="no answer within 1 s to the upload of model.so; check"
        ),
    ):
        open_rpc(bundle, Address(HOST, wire.port, KEY), call_timeout=1)
    os.killpg(board.process.pid, signal.SIGCONT)
    expect_next_run_works(bundle, board.port)


def test_another_tvm_on_the_board(bundle: Bundle, board: Board) -> None:
    lie = (b'"tvm": "0.19.0"', b'"tvm": "0.18.0"')
    with Wire(board.port, lie=lie) as wire:
        line = refused(check(bundle, *at(wire.port)))
    assert wire.carried < 10_000, "nothing was uploaded"
    assert "server is of TVM 0.18.0, this is 0.19.0; put the kit of this" in line
    expect_next_run_works(bundle, board.port)


def test_a_bundle_of_another_tvm(bundle: Bundle, board: Board) -> None:
    path = bundle.path / "manifest.json"
    whole = path.read_text()
    assert '"0.19.0"' in whole
    path.write_text(whole.replace('"0.19.0"', '"0.20.0"'))
    try:
        line = refused(check(bundle, *at(board.port)))
    finally:
        path.write_text(whole)
    assert "server is of TVM 0.19.0" in line and "was built by 0.20.0; build" in line
    expect_next_run_works(bundle, board.port)


def test_another_architecture_is_refused_before_the_upload(
    foreign: Bundle, bundle: Bundle, board: Board
) -> None:
    with Wire(board.port) as wire:
        line = refused(check(foreign, *at(wire.port)))
    assert wire.carried < 10_000, "nothing was uploaded"
    assert (
        f"the board is {native().machine}, not {foreign.manifest.target.machine}"
        in line
    )
    expect_next_run_works(bundle, board.port)


def test_a_full_disk_on_the_board(bundle: Bundle, tmp_path: Path) -> None:
    with Board(tmp_path / "board", largest_file=4096) as board:
        line = refused(check(bundle, *at(board.port)))
        assert "model.so could not be written there: " in line
        assert "make room on the board's disk" in line
        until(lambda: board.sessions() == [])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_host_that_goes_leaves_no_session_and_no_file(
    bundle: Bundle, board: Board, number: signal.Signals
) -> None:
    hosts: list[subprocess.Popen[bytes]] = []
    with Wire(board.port, inputs(bundle)[1], lambda: hosts[0].send_signal(number)) as w:
        command = ["-m", "runtime_demo.check", str(bundle.path), "--key", KEY]
        hosts.append(
            subprocess.Popen(
                [sys.executable, *command, *at(w.port), "--repeat", "1000000"],
                cwd=ROOT,
                stderr=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
            )
        )
        code = hosts[0].wait(30)
        assert w.acted
    assert code == (128 + number if number != signal.SIGKILL else -9)
    until(lambda: board.sessions() == [])
    expect_next_run_works(bundle, board.port)


def test_what_the_board_has_kept_is_not_sent_again(
    bundle: Bundle, board: Board
) -> None:
    sent = []
    for _ in range(2):
        with Wire(board.port) as wire:
            expect_next_run_works(bundle, wire.port)
            sent.append(wire.carried)
    size = bundle.library.stat().st_size
    assert sent[0] > size > sent[1]


def shares(result: subprocess.CompletedProcess[str]) -> dict[str, int]:
    boards: dict[str, int] = json.loads(result.stdout)["boards"]
    return boards


def test_images_are_spread_over_the_boards_of_a_key(
    bundle: Bundle, tmp_path: Path
) -> None:
    with tracked(tmp_path, 2) as (port, boards):
        result = check(bundle, "--tracker", f"{HOST}:{port}", "--repeat", 1, "--json")
        assert result.returncode == 0, result.stderr
        done = shares(result)
        assert set(done) == {f"{HOST}:{board.port}" for board in boards}
        assert sum(done.values()) == len(inputs(bundle))
        assert [r["name"][-1] for r in json.loads(result.stdout)["results"]] == [
            str(index) for index in range(len(inputs(bundle)))
        ]


def test_ctrl_c_with_several_boards_leaves_nothing_on_any(
    bundle: Bundle, tmp_path: Path
) -> None:
    program = (
        "import os, signal, sys; from itertools import count; from pathlib import Path\n"
        "from netship.bundle.golden import read_golden; from netship.bundle.store import open_bundle\n"
        "from netship.devices.sessions.fleet import open_fleet; from netship.targets.errors import run_command\n"
        "from netship.devices.transport.link import Address\n"
        "def main(argv):\n"
        "    bundle = open_bundle(Path(sys.argv[1]))\n"
        "    [image], _, _ = read_golden(bundle)[0]\n"
        "    with open_fleet(bundle, Address('127.0.0.1', int(sys.argv[2]), 'pi'), most=2, wait=5, on_note=print) as fleet:\n"
        "        for done, _ in fleet.run_all(count(), lambda _: [image]):\n"
        "            if done == 20:\n"
        "                os.kill(os.getpid(), signal.SIGINT)\n"
        "run_command(main)\n"
    )
    with tracked(tmp_path, 2) as (port, boards):
        host = subprocess.run(
            [sys.executable, "-c", program, str(bundle.path), str(port)],
            cwd=ROOT,
            timeout=60,
            capture_output=True,
            text=True,
            check=False,
        )
        assert host.returncode == 130, host.stderr
        assert "Traceback" not in host.stderr
        until(lambda: not any(board.sessions() for board in boards))
