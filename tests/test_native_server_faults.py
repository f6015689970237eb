"""Strangers, clients that vanish, hang or crash, and servers that are ended: the native server frees the board and its folder."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from boards import HOST, until
from native_servers import MAGIC, WITHIN, Server, connect, greet, library, starting

# The size of a packet, of which nothing follows.
REQUEST = struct.pack("<q", 1 << 10)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Server]]:
    with starting(tmp_path) as begin:
        yield begin


@pytest.fixture
def server(start: Callable[..., Server]) -> Server:
    return start("--key", "pi", "--threads", "2")


@pytest.mark.parametrize(
    "greeting",
    [
        b"GET / HTTP/1.0\r\n\r\n",
        struct.pack("<ii", MAGIC + 1, 9),
        struct.pack("<ii", MAGIC, -1),
        struct.pack("<ii", MAGIC, 1 << 30),
    ],
)
def test_what_is_no_client_is_hung_up_on_at_once(
    server: Server, greeting: bytes
) -> None:
    # Silence is cut off after 5 s.
    with socket.create_connection((HOST, server.port), timeout=3) as stranger:
        stranger.sendall(greeting)
        with contextlib.suppress(ConnectionResetError):
            assert stranger.recv(1) == b""
    assert connect(server).get_function("netship.board")()


@pytest.mark.parametrize(
    "greeting", [b"", struct.pack("<i", MAGIC)[:3], struct.pack("<ii", MAGIC, 9) + b"c"]
)
def test_half_a_greeting_blocks_nobody(server: Server, greeting: bytes) -> None:
    with socket.create_connection((HOST, server.port), WITHIN) as stranger:
        stranger.sendall(greeting)
        assert connect(server).get_function("netship.board")()


@pytest.mark.slow
def test_a_stranger_that_stays_silent_is_hung_up_on(server: Server) -> None:
    with socket.create_connection((HOST, server.port), WITHIN) as stranger:
        assert stranger.recv(1) == b""


def test_garbage_from_a_client_ends_that_client_alone(server: Server) -> None:
    client, answer = greet(server)
    with client:
        assert answer == MAGIC
        client.sendall(struct.pack("<q", 16) + b"\xff" * 16)
        until(lambda: client.recv(1 << 16) == b"")
    assert connect(server).get_function("netship.board")()


def test_a_client_that_asks_for_nothing_is_hung_up_on(
    start: Callable[..., Server],
) -> None:
    server = start("--key", "pi", "--idle-timeout", "1")
    client, answer = greet(server)
    with client:
        assert answer == MAGIC
        assert connect(server).get_function("netship.board")()
        until(lambda: "it asked for nothing for 1 s" in server.said())


def test_a_client_that_stops_asking_is_hung_up_on(start: Callable[..., Server]) -> None:
    server = start("--key", "pi", "--idle-timeout", "1")
    remote = connect(server)
    assert remote.get_function("netship.board")()
    assert connect(server).get_function("netship.board")()
    assert "it asked for nothing for 1 s" in server.said()


def test_a_session_ends_when_the_time_that_its_client_gave_is_over(
    server: Server, tmp_path: Path
) -> None:
    remote = connect(server, timeout=1)
    remote.upload(str(library(tmp_path, "sleepy.so", "sleep(60);")))
    with pytest.raises(Exception, match="Your 1s session has expired"):
        remote.load_module("sleepy.so")
    until(lambda: not server.client_folders())
    assert connect(server).get_function("netship.board")()


@pytest.mark.parametrize("reset", [False, True])
def test_a_client_that_vanishes_in_an_upload_leaves_nothing(
    server: Server, reset: bool
) -> None:
    client, _ = greet(server)
    client.sendall(struct.pack("<q", 1 << 28) + bytes(1 << 20))
    until(server.client_folders)
    if reset:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.close()
    until(lambda: not server.client_folders() and not server.children())
    assert "SIG" not in server.said()
    assert connect(server).get_function("netship.board")()


def test_a_client_killed_in_an_inference_frees_the_board(
    server: Server, tmp_path: Path
) -> None:
    on_load = 'fopen("loading", "w"); for (;;) pause();'
    hangs = library(tmp_path, "hangs.so", on_load)
    code = (
        "import sys, tvm.rpc\n"
        f"remote = tvm.rpc.connect('{HOST}', {server.port}, 'pi')\n"
        f"remote.upload({str(hangs)!r})\n"
        "remote.load_module('hangs.so')\n"
    )
    client = subprocess.Popen(
        [sys.executable, "-c", code],
        stderr=subprocess.DEVNULL,
        env={**os.environ, "TVM_USE_RUNTIME_LIB": "1"},
    )
    with client:
        until(lambda: list(server.folder.glob("netship-serve-*/client/loading")))
        client.kill()
    until(lambda: not server.client_folders() and not server.children())
    assert connect(server).get_function("netship.board")()


@pytest.mark.parametrize("name", ["SIGILL", "SIGSEGV", "SIGBUS", "SIGABRT"])
def test_a_crash_is_one_line_and_ends_that_client_alone(
    server: Server, tmp_path: Path, name: str
) -> None:
    remote = connect(server)
    remote.upload(str(library(tmp_path, "bad.so", f"raise({name});")))
    with pytest.raises(Exception, match="kShutdown"):
        remote.load_module("bad.so")
    until(lambda: f"its process ended by {name}\n" in server.said())
    assert connect(server).get_function("netship.board")()


@pytest.mark.parametrize("how", ["SIGTERM", "SIGINT", "SIGHUP", "stdin"])
def test_the_end_leaves_no_process_and_no_folder(
    start: Callable[..., Server], tmp_path: Path, how: str
) -> None:
    end_with = ["--end-with-stdin"] if how == "stdin" else []
    server = start("--key", "pi", *end_with, stdin=subprocess.PIPE)
    remote = connect(server)
    remote.upload(str(library(tmp_path, "sleepy.so", "sleep(60);")))

    def load() -> None:
        with contextlib.suppress(Exception):
            remote.load_module("sleepy.so")

    threading.Thread(target=load, daemon=True).start()
    [child] = server.children()
    assert server.process.stdin
    if how == "stdin":
        server.process.stdin.close()
    else:
        server.process.send_signal(getattr(signal, how))
    assert server.process.wait(WITHIN) == 0
    assert not Path(f"/proc/{child}").exists()
    assert list(server.folder.iterdir()) == []
    server.process.stdin.close()


def test_a_server_that_was_killed_is_cleaned_up_after_by_the_next(
    start: Callable[..., Server],
) -> None:
    killed = start("--key", "pi")
    client, _ = greet(killed)
    client.sendall(REQUEST)
    until(killed.children)
    [child] = killed.children()
    killed.end()
    until(lambda: not Path(f"/proc/{child}").exists())
    client.close()
    [left] = killed.folder.iterdir()
    beside = killed.folder / "netship-serve-of-somebody"
    beside.mkdir()
    outside = killed.folder.with_name("outside")
    outside.mkdir()
    (outside / "lock").write_text("untouched")
    (left / "kept/link").symlink_to(outside)
    (left / "kept/deep/er").mkdir(parents=True)
    second = Server(killed.folder, "--key", "pi")
    assert not left.exists()
    assert beside.exists()
    third = Server(killed.folder, "--key", "pi")
    assert connect(second).get_function("netship.board")()
    for server in (second, third):
        server.process.terminate()
        assert server.process.wait(WITHIN) == 0
    assert list(killed.folder.iterdir()) == [beside]
    assert (outside / "lock").read_text() == "untouched"


def abandoned(folder: Path, name: str) -> Path:
    """A folder as a killed server leaves it."""
    left = folder / f"netship-serve-{name}"
    (left / "kept").mkdir(parents=True)
    (left / "lock").touch()
    left.chmod(0o700)
    return left


def test_only_folders_of_this_user_alone_are_removed(
    start: Callable[..., Server], tmp_path: Path
) -> None:
    folder, elsewhere = tmp_path / "work0", tmp_path / "elsewhere"
    left = abandoned(folder, "left")
    shared = abandoned(folder, "shared")
    shared.chmod(0o777)
    link = folder / "netship-serve-link"
    link.symlink_to(abandoned(elsewhere, "target"))
    kept = [shared, link]
    if os.geteuid() == 0:
        foreign = abandoned(folder, "foreign")
        os.chown(foreign, 12345, 12345)
        kept.append(foreign)
    server = start("--key", "pi")
    assert not left.exists()
    assert set(server.folder.iterdir()) > set(kept)
    assert (elsewhere / "netship-serve-target/lock").exists()
    for path in kept:
        path.unlink() if path.is_symlink() else shutil.rmtree(path)


def send_slowly(stranger: socket.socket) -> None:
    with contextlib.suppress(OSError):
        for byte in struct.pack("<ii", MAGIC, 4000) + b"client:pi" * 400:
            stranger.sendall(bytes([byte]))
            time.sleep(0.05)


@pytest.mark.parametrize("how", ["silent", "slow", "half", "with the key"])
def test_however_many_others_hang_a_client_with_the_key_is_served(
    server: Server, how: str
) -> None:
    with contextlib.ExitStack() as stack:
        for _ in range(40 if how == "with the key" else 200):
            if how == "with the key":
                other, answer = greet(server)
                assert answer == MAGIC
            else:
                other = socket.create_connection((HOST, server.port), WITHIN)
            stack.enter_context(other)
            if how == "half":
                other.sendall(struct.pack("<ii", MAGIC, 9) + b"client")
            elif how == "slow":
                threading.Thread(target=send_slowly, args=[other], daemon=True).start()
        served: list[str] = []

        def ask() -> None:
            served.append(connect(server).get_function("netship.board")())

        threading.Thread(target=ask, daemon=True).start()
        # Hung up on one after the other, 200 strangers would keep it waiting for longer.
        until(lambda: served)


def test_a_client_that_no_place_in_the_queue_is_left_for_is_told_so(
    server: Server,
) -> None:
    has_the_board = connect(server)
    with contextlib.ExitStack() as stack:
        for _ in range(64):
            client, answer = greet(server)
            stack.enter_context(client)
            assert answer == MAGIC
            client.sendall(REQUEST)
        with pytest.raises(Exception, match="64 clients wait for it already; try ag"):
            connect(server)
        assert has_the_board.get_function("netship.board")()
