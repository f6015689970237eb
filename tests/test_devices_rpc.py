"""A bundle on a board over TVM RPC, and everything else that may listen there."""

from __future__ import annotations

import http.server
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path

import numpy as np
import pytest
from boards import open_from_tracker
from tiny import tiny_bundle

from netship.bundle.golden import read_golden
from netship.bundle.store import Bundle
from netship.devices.sessions.rpc import open_rpc, open_rpc_local
from netship.devices.sessions.session import Origin, Session
from netship.devices.transport.link import Address
from netship.devices.transport.server import start_server, this_python
from netship.targets.errors import UserError
from netship.targets.presets import native, resolve

PROJECT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return tiny_bundle(tmp_path_factory.mktemp("rpc"), native())


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    name = "arm-cortex-a72" if native().machine == "x86_64" else "x86-64-v2"
    return tiny_bundle(tmp_path_factory.mktemp("foreign"), resolve(name))


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def until(condition: Callable[[], bool]) -> None:
    """Wait for what must come about, for at most 20 s."""
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end, "it did not come about"
        time.sleep(0.05)


def listens(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


@contextmanager
def stock(module: str, port: int, *options: str, probe: bool = True) -> Iterator[int]:
    """TVM's own command line, as a user starts it on a board; its process group's id.

    A server that a tracker knows forgets it when somebody only connects: no ``probe`` then.
    """
    command = [sys.executable, "-m", f"tvm.exec.{module}", "--host", "127.0.0.1"]
    process = subprocess.Popen(
        [*command, "--port", str(port), "--port-end", str(port + 1), *options],
        start_new_session=True,
        env={**os.environ, "TVM_NUM_THREADS": "2", "TVM_USE_RUNTIME_LIB": "1"},
        stderr=subprocess.DEVNULL,
    )
    try:
        if probe:
            until(lambda: listens(port))
        yield process.pid
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        until(lambda: not listens(port))


@pytest.fixture(scope="module")
def board() -> Iterator[int]:
    port = free_port()
    with stock("rpc_server", port, "--key", "pi"):
        yield port


def expect_reference(session: Session, bundle: Bundle) -> None:
    for [image], [expected], _ in read_golden(bundle):
        [actual] = session.run(image)
        np.testing.assert_allclose(actual, expected, atol=1e-6)


def test_a_server_of_our_own_gives_the_reference(bundle: Bundle) -> None:
    with open_rpc_local(bundle, threads=2) as session:
        assert (session.origin, session.threads) == (Origin.HOST, 2)
        expect_reference(session, bundle)
        [image], _, _ = read_golden(bundle)[0]
        assert len(session.time([image], 3)) == 3
        assert session.profile([image])[-1].output_shape == (1, 5)


def test_a_board_gives_the_reference_on_the_threads_asked_for(
    bundle: Bundle, board: int
) -> None:
    for threads in (1, 2):
        with open_rpc(
            bundle, Address("127.0.0.1", board, "pi"), threads=threads
        ) as session:
            assert (session.origin, session.threads) == (Origin.BOARD, threads)
            expect_reference(session, bundle)


def test_more_threads_than_the_board_has_are_refused(
    bundle: Bundle, board: int
) -> None:
    with pytest.raises(UserError, match="has 2 threads, not 64; start it with"):
        open_rpc(bundle, Address("127.0.0.1", board, "pi"), threads=64)


def test_another_key_is_refused(bundle: Bundle, board: int) -> None:
    with pytest.raises(UserError, match="another key; give --key"):
        open_rpc(bundle, Address("127.0.0.1", board, "rock"))


def test_a_board_of_another_architecture_is_refused(
    foreign: Bundle, bundle: Bundle, board: int
) -> None:
    with pytest.raises(
        UserError, match=f"board is not {foreign.manifest.target.machine}"
    ):
        open_rpc(foreign, Address("127.0.0.1", board, "pi"))
    with open_rpc(bundle, Address("127.0.0.1", board, "pi")) as session:
        expect_reference(session, bundle)


def test_where_the_board_cannot_tell_a_foreign_library_is_one_line(
    foreign: Bundle, board: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "netship.devices.sessions.rpc._check_architecture", lambda *_: None
    )
    with pytest.raises(UserError, match="model.so could not be loaded there: it wants"):
        open_rpc(foreign, Address("127.0.0.1", board, "pi"))


def test_a_busy_board_is_not_waited_for_for_ever(bundle: Bundle, board: int) -> None:
    with (
        open_rpc(bundle, Address("127.0.0.1", board, "pi")),
        pytest.raises(UserError, match="busy with another client"),
    ):
        open_rpc(bundle, Address("127.0.0.1", board, "pi"), probe_timeout=0.5)


def test_nothing_of_a_session_stays_on_the_board(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    server = start_server(this_python(), {"TVM_NUM_THREADS": "1"}, 20)
    try:
        with open_rpc(bundle, Address("127.0.0.1", server.port, server.key)) as session:
            expect_reference(session, bundle)
            assert list(tmp_path.glob("netship-rpc-*/*")), "the session's own folder"
            assert not list(tmp_path.rglob("model.so"))
        with open_rpc(bundle, Address("127.0.0.1", server.port, server.key)) as session:
            expect_reference(session, bundle)
    finally:
        server.close()
    assert not listens(server.port)
    assert not list(tmp_path.iterdir())


def test_a_connection_that_is_lost_is_one_line(bundle: Bundle) -> None:
    port = free_port()
    [image], _, _ = read_golden(bundle)[0]
    with ExitStack() as stack:
        group = stack.enter_context(stock("rpc_server", port))
        session = stack.enter_context(open_rpc(bundle, Address("127.0.0.1", port)))
        session.run(image)
        os.killpg(group, signal.SIGKILL)
        with pytest.raises(
            UserError, match="the connection was lost .*; check the board"
        ):
            session.run(image)
        with pytest.raises(UserError, match="open it again"):
            session.run(image)


def test_a_board_that_stops_answering_ends_at_the_time_limit(bundle: Bundle) -> None:
    port = free_port()
    [image], _, _ = read_golden(bundle)[0]
    with stock("rpc_server", port):
        with open_rpc(bundle, Address("127.0.0.1", port), call_timeout=1) as session:
            serving = children(tree_of(f"--port={port}", f"--port {port}"))
            for process in serving:
                os.kill(process, signal.SIGSTOP)
            with pytest.raises(UserError, match="no answer within 1 s"):
                session.run(image)
            for process in serving:
                os.kill(process, signal.SIGCONT)
        until(lambda: listens(port))


def tree_of(*words: str) -> list[int]:
    """Processes whose command line has one of ``words``."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if any(word in command for word in words):
            found.append(int(folder.name))
    return found


def children(processes: list[int]) -> list[int]:
    """``processes`` and everything they started, deepest last."""
    everyone = list(processes)
    for process in everyone:
        tasks = Path(f"/proc/{process}/task").glob("*/children")
        everyone += [int(child) for task in tasks for child in task.read_text().split()]
    return everyone


def test_nobody_listens(bundle: Bundle) -> None:
    port = free_port()
    with pytest.raises(
        UserError,
        match=f"127.0.0.1:{port}: nobody listens; on the board run `./serve --port {port}`",
    ):
        open_rpc(bundle, Address("127.0.0.1", port))


def test_an_unknown_host(bundle: Bundle) -> None:
    with pytest.raises(UserError, match="no-such-host.invalid: unknown host"):
        open_rpc(bundle, Address("no-such-host.invalid", 9090))


@contextmanager
def listener(answer: bytes | None) -> Iterator[int]:
    """Something that accepts and says ``answer``, or nothing at all where None."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        clients: list[socket.socket] = []

        def serve() -> None:
            while True:
                try:
                    client, _ = server.accept()
                except OSError:
                    return
                clients.append(client)
                if answer is not None:
                    client.sendall(answer)

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield int(server.getsockname()[1])
        finally:
            server.shutdown(socket.SHUT_RDWR)
            thread.join()
            for client in clients:
                client.close()


@contextmanager
def http_server() -> Iterator[int]:
    handler = http.server.SimpleHTTPRequestHandler
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server.server_port
        finally:
            server.shutdown()
            thread.join()


@pytest.mark.parametrize("tracker", [False, True])
@pytest.mark.parametrize(
    "other",
    [
        pytest.param(lambda: listener(None), id="silent"),
        pytest.param(lambda: listener(b"220 mail.example ESMTP\r\n"), id="garbage"),
        pytest.param(lambda: listener(b"\x01"), id="short"),
        pytest.param(http_server, id="http"),
    ],
)
def test_something_else_listens(
    bundle: Bundle,
    other: Callable[[], AbstractContextManager[int]],
    tracker: bool,
) -> None:
    words = "no TVM RPC tracker" if tracker else "no TVM RPC server|did not answer as"
    with other() as port, pytest.raises(UserError, match=words):
        if tracker:
            open_from_tracker(bundle, port, timeout=0.5)
        else:
            open_rpc(bundle, Address("127.0.0.1", port), probe_timeout=0.5)


def test_a_tracker_gives_a_board_or_says_why_not(bundle: Bundle) -> None:
    tracker, port = free_port(), free_port()
    options = ("--tracker", f"127.0.0.1:{tracker}", "--key", "pi")
    with stock("rpc_tracker", tracker):
        with pytest.raises(
            UserError,
            match=r"no board with key 'pi' \(registered: none\); on the board",
        ):
            open_from_tracker(bundle, tracker)
        with pytest.raises(UserError, match="is a tracker, use --tracker"):
            open_rpc(bundle, Address("127.0.0.1", tracker), probe_timeout=1)
        with stock("rpc_server", port, *options, probe=False):
            until(lambda: "registered: pi" in refusal(tracker, "rock", bundle))
            with open_from_tracker(bundle, tracker) as session:
                assert session.origin is Origin.BOARD
                expect_reference(session, bundle)
                with pytest.raises(
                    UserError, match="the one board with key .* stayed busy"
                ):
                    open_from_tracker(bundle, tracker, wait=0.5)
    with pytest.raises(UserError, match=f"tracker 127.0.0.1:{tracker}: nobody listens"):
        open_from_tracker(bundle, tracker)


def refusal(tracker: int, key: str, bundle: Bundle) -> str:
    with pytest.raises(UserError) as refused:
        open_from_tracker(bundle, tracker, key=key)
    return str(refused.value)


def test_the_server_ends_with_the_session(bundle: Bundle) -> None:
    before = set(tree_of("rpc_server.py"))
    session = open_rpc_local(bundle)
    [mine, *rest] = sorted(set(children(tree_of("rpc_server.py"))) - before)
    assert rest, "the process that serves this session"
    session.close()
    assert not {mine, *rest} & set(children(tree_of("rpc_server.py")))


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_the_server_ends_however_its_parent_does(
    bundle: Bundle, end: signal.Signals, tmp_path: Path
) -> None:
    program = (
        "import sys, time; from pathlib import Path; from netship.bundle.store import open_bundle\n"
        "from netship.devices.sessions.rpc import open_rpc_local\n"
        "with open_rpc_local(open_bundle(Path(sys.argv[1]))):\n"
        "    print('ready', flush=True); time.sleep(60)\n"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", program, str(bundle.path)],
        cwd=PROJECT,
        env={**os.environ, "TMPDIR": str(tmp_path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    assert parent.stdout
    assert parent.stdout.readline() == b"ready\n"
    servers = children([parent.pid])[1:]
    assert len(servers) == 2
    parent.send_signal(end)
    parent.wait()
    parent.stdout.close()
    until(lambda: all(ended(server) for server in servers))
    until(lambda: not list(tmp_path.iterdir()))


def test_a_server_that_is_starting_ends_when_its_parent_is_killed(
    tmp_path: Path,
) -> None:
    program = (
        "import sys; from netship.devices.transport.server import start_server, this_python\n"
        "print('starting', flush=True); start_server(this_python(), {}, 20)\n"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", program],
        cwd=PROJECT,
        env={**os.environ, "TMPDIR": str(tmp_path)},
        stdout=subprocess.PIPE,
    )
    assert parent.stdout
    assert parent.stdout.readline() == b"starting\n"
    until(lambda: len(children([parent.pid])) == 2)
    [_, server] = children([parent.pid])
    until(lambda: b"rpc_server" in Path(f"/proc/{server}/cmdline").read_bytes())
    parent.kill()
    parent.wait()
    parent.stdout.close()
    until(lambda: ended(server) and not list(tmp_path.iterdir()))


def ended(process: int) -> bool:
    try:
        return "\nState:\tZ" in Path(f"/proc/{process}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return True


def test_a_server_that_does_not_start_says_why() -> None:
    with pytest.raises(UserError, match="did not start within .*No module named 'tvm'"):
        start_server(["/usr/bin/env", "-i", sys.executable, "-S"], {}, 20)
