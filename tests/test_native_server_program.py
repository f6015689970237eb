"""The native server as a program: its options, its port and key, and what it may say and need."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from native_servers import WITHIN, Server, connect, starting

from netship.devices.board.programs import native_server
from netship.targets.presets import native


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Server]]:
    with starting(tmp_path) as begin:
        yield begin


@pytest.fixture
def server(start: Callable[..., Server]) -> Server:
    return start("--key", "pi", "--threads", "2")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--port", "65536"], "--port 65536: give a number from 0 to 65535"),
        (["--port", "x"], "--port x: give a number"),
        (["--key", "two words"], "the key: give at most 256 letters"),
        (["--key", 'a"b'], "the key: give at most 256 letters"),
        (["--key-file", "/absent"], "/absent: no key in it"),
        (["--key-stdin"], "--key-stdin: standard input has no line"),
        (["--tracker", "board"], "--tracker board: give HOST:PORT"),
        (["--tracker", "board:9190"], "--tracker: needs a --key"),
        (["--work-dir", "/absent"], "/absent: No such file or directory; choose"),
        (["--host", "192.0.2.1"], "192.0.2.1, port 9090: .*; choose another --port"),
        (["--unknown"], "--unknown: unknown, or without its value; see --help"),
        (["--port"], "--port: unknown, or without its value"),
        (["word"], "word: no option; see --help"),
    ],
)
def test_a_wrong_option_is_one_line(options: list[str], words: str) -> None:
    result = run(*options)
    assert result.returncode == 2
    assert re.fullmatch(f"error: {words}.*\n", result.stderr), result.stderr


def run(*options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(native_server(native().machine)), *options],  # type: ignore[arg-type]
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=WITHIN,
        check=False,
    )


def test_help_and_version_are_on_stdout() -> None:
    assert run("--help").stdout.startswith("usage: netship-serve [options]\n")
    assert native().machine in run("--version").stdout


def test_a_taken_port_is_refused_or_passed_over(
    server: Server, start: Callable[..., Server]
) -> None:
    result = run("--port", str(server.port))
    assert f"port {server.port}: Address already in use" in result.stderr
    end = str(min(server.port + 20, 65536))
    other = start("--port", str(server.port), "--port-end", end)
    assert server.port < other.port < int(end)


def test_the_key_may_come_by_a_file_or_by_standard_input(
    start: Callable[..., Server], tmp_path: Path
) -> None:
    file = tmp_path / "key"
    file.write_text("from-file\n")
    server = start("--key-file", str(file))
    assert connect(server, "from-file").get_function("netship.board")()
    reader, writer = os.pipe()
    os.write(writer, b"from-stdin\nwhat follows is nobody's business")
    server = start("--key-stdin", "--end-with-stdin", stdin=reader)
    os.close(reader)
    assert connect(server, "from-stdin").get_function("netship.board")()
    os.close(writer)
    assert server.process.wait(WITHIN) == 0


def test_the_program_does_not_say_where_it_was_built() -> None:
    program = native_server(native().machine).read_bytes()  # type: ignore[arg-type]
    for folder in (sys.prefix, str(Path.home()), str(Path(__file__).parents[1])):
        assert folder.encode() not in program


def test_the_program_runs_where_glibc_is_2_28() -> None:
    program = native_server(native().machine).read_bytes()  # type: ignore[arg-type]
    wanted = {int(minor) for minor in re.findall(rb"GLIBC_2\.(\d+)", program)}
    assert wanted and max(wanted) <= 28
