"""The native RPC server for boards: TVM's own clients and tracker with it, and everything that goes wrong."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import resource
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from boards import open_from_tracker
from tiny import INPUT, tiny_bundle

from bundle.golden import read_golden
from bundle.store import Bundle
from devices import sysroot
from devices.board.programs import native_server
from devices.sessions.emulated import find_qemu
from devices.sessions.rpc import open_rpc
from devices.transport.link import Address
from devices.transport.tracker import request_board
from targets.errors import UserError
from targets.presets import native, resolve, this_cpu
from targets.toolchain import run_zig

HOST = "127.0.0.1"
MAGIC, MISMATCH, TRACKER_MAGIC = 0xFF271, 0xFF273, 0x2F271
WITHIN = 20.0


class Server:
    """A native server on this machine with a work folder of its own."""

    def __init__(
        self, folder: Path, *options: str, command: Sequence[str] = (), **popen: Any
    ) -> None:
        program = str(native_server(native().machine))  # type: ignore[arg-type]
        self.folder = folder
        folder.mkdir(exist_ok=True)
        self.log = folder.with_suffix(".log")
        self.process = subprocess.Popen(
            [
                *(command or [program]),
                *("--port", "0", "--work-dir", str(folder), *options),
            ],
            stdin=popen.pop("stdin", subprocess.DEVNULL),
            stdout=subprocess.PIPE,
            stderr=self.log.open("a"),
            text=True,
            **popen,
        )
        assert self.process.stdout
        line = self.process.stdout.readline()
        assert re.fullmatch(r"listening on 127\.0\.0\.1:\d+\n", line), line
        self.port = int(line.rsplit(":", 1)[1])

    def said(self) -> str:
        return self.log.read_text()

    def children(self) -> list[int]:
        text = Path(
            f"/proc/{self.process.pid}/task/{self.process.pid}/children"
        ).read_text()
        return [int(pid) for pid in text.split()]

    def client_folders(self) -> list[Path]:
        return list(self.folder.glob("netship-serve-*/client"))

    def kept(self) -> list[Path]:
        return list(self.folder.glob("netship-serve-*/kept/*"))

    def end(self) -> None:
        self.process.kill()
        self.process.wait()


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return tiny_bundle(tmp_path_factory.mktemp("native"), native())


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Server]]:
    """Starts servers, and sees that each one leaves no folder when it ends in order."""
    servers: list[Server] = []

    def begin(*options: str, **popen: Any) -> Server:
        server = Server(tmp_path / f"work{len(servers)}", *options, **popen)
        servers.append(server)
        return server

    yield begin
    for server in servers:
        if server.process.poll() is None:
            server.process.terminate()
            assert server.process.wait(WITHIN) == 0
            assert list(server.folder.iterdir()) == []
        assert server.process.stdout
        server.process.stdout.close()


@pytest.fixture
def server(start: Callable[..., Server]) -> Server:
    return start("--key", "pi", "--threads", "2")


def connect(server: Server, key: str = "pi", timeout: int = 0) -> Any:
    """TVM's stock client."""
    from targets import engine

    if "tvm" not in sys.modules:
        engine.runtime(1)
    import tvm.rpc

    return tvm.rpc.connect(HOST, server.port, key, session_timeout=timeout)


def greet(server: Server, key: str = "pi") -> tuple[socket.socket, int]:
    """A client by hand, up to the server's answer."""
    client = socket.create_connection((HOST, server.port), WITHIN)
    word = f"client:{key}".encode()
    client.sendall(struct.pack("<ii", MAGIC, len(word)) + word)
    (answer,) = struct.unpack("<i", client.recv(4, socket.MSG_WAITALL))
    return client, answer


def until(condition: Callable[[], object]) -> None:
    end = time.monotonic() + WITHIN
    while not condition():
        assert time.monotonic() < end, "it did not come about"
        time.sleep(0.02)


def library(folder: Path, name: str, on_load: str) -> Path:
    """A shared library that does something when it is loaded."""
    path, source = folder / name, folder / f"{name}.c"
    source.write_text(
        "#include <signal.h>\n#include <stdio.h>\n#include <stdlib.h>\n#include <unistd.h>\n"
        f"__attribute__((constructor)) static void load(void) {{ {on_load} }}"
    )
    run_zig("cc", path, "-target", native().linker, "-shared", source)
    return path


def test_tvms_client_gets_the_reference(server: Server, bundle: Bundle) -> None:
    remote = connect(server)
    remote.upload(str(bundle.library))
    assert bytes(remote.download("model.so")) == bundle.library.read_bytes()
    remote.get_function("runtime.config_threadpool")(1, 1)
    executor = remote.load_module("model.so")["default"](remote.cpu())
    image, [expected] = read_golden(bundle)[0]
    executor["get_input"](INPUT.name).copyfrom(image)
    executor["run"]()
    np.testing.assert_allclose(executor["get_output"](0).numpy(), expected, atol=1e-6)
    times = executor.time_evaluator("run", remote.cpu(), number=1, repeat=3)().results
    assert len(times) == 3
    filled = executor["get_input"](INPUT.name)
    remote.get_function("tvm.contrib.random.random_fill")(filled)
    assert np.ptp(filled.numpy()) > 0
    remote.remove("model.so")
    [folder] = server.client_folders()
    assert list(folder.iterdir()) == []


def test_our_client_gets_the_reference_profile_and_all(
    server: Server, bundle: Bundle
) -> None:
    with open_rpc(bundle, Address(HOST, server.port, "pi"), threads=2) as session:
        for image, [expected] in read_golden(bundle):
            np.testing.assert_allclose(session.run(image)[0], expected, atol=1e-6)
        assert session.profile(image)[-1].output_shape == (1, 5)
    until(lambda: not server.client_folders())


def test_the_board_says_what_it_is(server: Server) -> None:
    board = json.loads(connect(server).get_function("netship.board")())
    cpu = this_cpu()
    assert (board["machine"], board["tvm"]) == (native().machine, "0.19.0")
    assert board["threads"] == 2
    assert board["cores"] == os.cpu_count()
    assert set(board["features"]) == cpu.features
    assert board["emulated"] is False
    assert board["memory_kb"] > 0 and board["disk_free_bytes"] > 0
    version = (Path(__file__).parents[1] / "pyproject.toml").read_text()
    assert f'version = "{board["server"]}"' in version


def test_another_key_is_refused_at_once_though_somebody_has_the_board(
    server: Server,
) -> None:
    first = connect(server)
    client, answer = greet(server, "rock")
    with client:
        assert answer == MISMATCH
    assert first.get_function("netship.board")()


def test_a_second_client_waits_for_the_first(server: Server) -> None:
    first = connect(server)
    served: list[str] = []

    def second() -> None:
        served.append(connect(server).get_function("netship.board")())

    thread = threading.Thread(target=second, daemon=True)
    thread.start()
    given_up, _ = socket.create_connection((HOST, server.port)), None
    given_up.sendall(struct.pack("<ii", MAGIC, 9) + b"client:pi")
    given_up.close()
    thread.join(0.3)
    assert served == []
    assert first.get_function("netship.board")()
    del first
    thread.join(WITHIN)
    assert len(served) == 1


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
    until(server.client_folders)
    client.sendall(struct.pack("<q", 1 << 28) + bytes(1 << 20))
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
    [child] = killed.children()
    killed.end()
    until(lambda: not Path(f"/proc/{child}").exists())
    client.close()
    [left] = killed.folder.iterdir()
    beside = killed.folder / "netship-serve-of-somebody"
    beside.mkdir()
    second = Server(killed.folder, "--key", "pi")
    assert not left.exists()
    assert beside.exists()
    third = Server(killed.folder, "--key", "pi")
    assert connect(second).get_function("netship.board")()
    for server in (second, third):
        server.process.terminate()
        assert server.process.wait(WITHIN) == 0
    assert list(killed.folder.iterdir()) == [beside]


def test_names_do_not_lead_out_of_the_clients_folder(
    server: Server, tmp_path: Path
) -> None:
    outside = tmp_path / "outside"
    outside.write_text("untouched")
    [own] = server.folder.iterdir()
    remote = connect(server)
    names = [str(outside), "../lock", "..", ".", "", "a/b", ".part", "/etc/hostname"]
    names.append(os.path.relpath(outside, own / "client"))
    for name in names:
        calls: list[Callable[[], object]] = [
            partial(remote.download, name),
            partial(remote.load_module, name),
            partial(remote.get_function("netship.sha256"), name),
            partial(remote.get_function("netship.keep"), name),
            partial(remote.get_function("netship.have"), "0" * 64, name),
        ]
        if name:
            calls.append(partial(remote.upload, bytearray(b"changed"), name))
        for call in calls:
            with pytest.raises(Exception, match="is no plain file name"):
                call()
        # TVM's runner removes by the paths of its own machine, and "".
        remote.remove(name)
    assert outside.read_text() == "untouched"
    assert (own / "lock").exists()
    # A link that loaded code made is not followed either.
    (own / "client" / "link").symlink_to(outside)
    with pytest.raises(Exception, match="symbolic links"):
        remote.download("link")
    remote.upload(bytearray(b"new"), "link")
    assert outside.read_text() == "untouched"


def test_a_kept_file_need_not_be_sent_again(server: Server, bundle: Bundle) -> None:
    digest = bundle.manifest.files["model.so"]
    remote = connect(server)
    have, keep = (remote.get_function(f"netship.{name}") for name in ("have", "keep"))
    assert have(digest, "model.so") == 0
    remote.upload(str(bundle.library))
    assert remote.get_function("netship.sha256")("model.so") == digest
    assert keep("model.so") == digest
    del remote, have, keep
    until(lambda: not server.client_folders())

    remote = connect(server)
    have = remote.get_function("netship.have")
    assert have(digest, "again.so") == 1
    assert remote.load_module("again.so")["default"](remote.cpu())
    # What a client then uploads under that name does not reach the kept file.
    remote.upload(bytearray(b"else"), "again.so")
    assert have(digest, "again.so") == 1
    # A changed one is no use and goes.
    [kept] = server.kept()
    kept.write_bytes(b"changed")
    assert have(digest, "again.so") == 0
    assert server.kept() == []
    assert have("../lock", "again.so") == 0


def test_the_newest_four_files_are_kept(server: Server) -> None:
    remote = connect(server)
    have, keep = (remote.get_function(f"netship.{name}") for name in ("have", "keep"))
    digests = []
    for number in range(6):
        remote.upload(bytearray([number]), "data")
        digests.append(hashlib.sha256(bytes([number])).hexdigest())
        assert keep("data") == digests[-1]
        if number > 0:
            assert have(digests[0], "first") == 1
    assert {path.name for path in server.kept()} == {digests[0], *digests[3:]}


def test_a_full_disk_is_told_to_the_client(start: Callable[..., Server]) -> None:
    def little_room() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16))

    server = start("--key", "pi", preexec_fn=little_room)
    remote = connect(server)
    with pytest.raises(Exception, match=r"data \(131072 bytes\): File too large"):
        remote.upload(bytearray(1 << 17), "data")
    [folder] = server.client_folders()
    assert list(folder.iterdir()) == []
    remote.upload(bytearray(1 << 10), "data")
    assert len(remote.download("data")) == 1 << 10


def test_a_library_that_cannot_be_loaded_is_told_to_the_client(server: Server) -> None:
    remote = connect(server)
    remote.upload(bytearray(b"no library"), "bad.so")
    with pytest.raises(Exception, match="file too short|invalid ELF header"):
        remote.load_module("bad.so")
    remote.upload(bytearray(b""), "objects.tar")
    with pytest.raises(Exception, match="is no .so; a board has no linker"):
        remote.load_module("objects.tar")
    assert remote.get_function("netship.board")()


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


@contextlib.contextmanager
def tracker(port: int = 0) -> Iterator[int]:
    """TVM's stock tracker."""
    if port == 0:
        with socket.socket() as free:
            free.bind((HOST, 0))
            port = int(free.getsockname()[1])
    command = [sys.executable, "-m", "tvm.exec.rpc_tracker", "--host", HOST]
    process = subprocess.Popen(
        [*command, "--port", str(port), "--port-end", str(port + 1)],
        start_new_session=True,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "TVM_USE_RUNTIME_LIB": "1"},
    )
    try:
        yield port
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def wait_for_boards(port: int, count: int) -> None:
    """Until the tracker has so many free boards."""

    def free() -> int:
        with contextlib.suppress(OSError), socket.socket() as asking:
            asking.settimeout(WITHIN)
            asking.connect((HOST, port))
            asking.sendall(struct.pack("<i", TRACKER_MAGIC))
            asking.recv(4, socket.MSG_WAITALL)
            asking.sendall(struct.pack("<i", 3) + b"[6]")
            (size,) = struct.unpack("<i", asking.recv(4, socket.MSG_WAITALL))
            _, summary = json.loads(asking.recv(size, socket.MSG_WAITALL))
            return int(summary["queue_info"].get("pi", {"free": 0})["free"])
        return -1

    until(lambda: free() == count)


def test_a_tracker_gives_the_board_out_again_and_again(
    start: Callable[..., Server], bundle: Bundle
) -> None:
    with tracker() as port:
        server = start("--key", "pi", "--tracker", f"{HOST}:{port}")
        wait_for_boards(port, 1)
        passing_by, answer = greet(server)
        passing_by.close()
        assert answer == MISMATCH
        for _ in range(3):
            # It takes 8 s to be free again by itself.
            with open_from_tracker(bundle, port, wait=5) as session:
                image, [expected] = read_golden(bundle)[0]
                np.testing.assert_allclose(session.run(image)[0], expected, atol=1e-6)
        wait_for_boards(port, 1)


@pytest.mark.slow
def test_a_board_that_is_asked_for_and_not_used_becomes_free_again(
    start: Callable[..., Server],
) -> None:
    with tracker() as port:
        server = start("--key", "pi", "--tracker", f"{HOST}:{port}")
        wait_for_boards(port, 1)
        board = request_board(Address(HOST, port, "pi"), WITHIN, timeout=WITHIN)
        assert board.port == server.port
        wait_for_boards(port, 0)
        wait_for_boards(port, 1)


def test_the_board_comes_back_to_a_tracker_that_restarts(
    start: Callable[..., Server],
) -> None:
    with tracker() as port:
        server = start("--key", "pi", "--tracker", f"{HOST}:{port}")
        second = start("--key", "pi", "--tracker", f"{HOST}:{port}")
        wait_for_boards(port, 2)
    until(lambda: "it hung up; trying again" in server.said())
    with tracker(port):
        wait_for_boards(port, 2)
        second.process.terminate()
        wait_for_boards(port, 1)
        assert server.said().count("it hung up") == 1


def test_what_is_no_tracker_is_said_once(
    start: Callable[..., Server], server: Server
) -> None:
    lost = start("--key", "pi", "--tracker", f"{HOST}:{server.port}")
    until(lambda: "trying again" in lost.said())
    time.sleep(1)
    assert lost.said().count("\n") == 1


# What a tuner does, with nothing of ours but the linker.
RUNNER = """
import os, sys, tempfile
from pathlib import Path
from targets.engine import compiler
from targets.toolchain import run_zig
tvm = compiler()
from tvm import auto_scheduler, te

@auto_scheduler.register_workload
def product(n):
    a, b = (te.placeholder((n, n), name=name) for name in "ab")
    k = te.reduce_axis((0, n), name="k")
    return [a, b, te.compute((n, n), lambda i, j: te.sum(a[i, k] * b[k, j], k))]

def link(path, objects, **options):
    run_zig("cc", Path(path), "-target", os.environ["LINKER"], "-shared", *objects)

link.output_format = "so"

if __name__ == "__main__":
    task = auto_scheduler.SearchTask(func=product, args=(32,), target=sys.argv[2])
    records = tempfile.mktemp()
    task.tune(auto_scheduler.TuningOptions(
        num_measure_trials=4, num_measures_per_round=4, verbose=0,
        builder=auto_scheduler.LocalBuilder(build_func=link, n_parallel=1),
        runner=auto_scheduler.RPCRunner(
            "pi", "127.0.0.1", int(sys.argv[1]), n_parallel=1, number=1, repeat=1,
            min_repeat_ms=0),
        measure_callbacks=[auto_scheduler.RecordToFile(records)],
    ), search_policy=auto_scheduler.SketchPolicy(task, verbose=0,
        params={"evolutionary_search_num_iters": 1, "evolutionary_search_population": 16}))
    found = [result for _, result in auto_scheduler.load_records(records)]
    print([result.error_no for result in found])
"""


@pytest.mark.slow
def test_autoschedulers_runner_measures_on_it(
    start: Callable[..., Server], tmp_path: Path
) -> None:
    script = tmp_path / "tune.py"
    script.write_text(RUNNER)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    environment.pop("TVM_USE_RUNTIME_LIB", None)
    with tracker() as port:
        server = start("--key", "pi", "--tracker", f"{HOST}:{port}")
        wait_for_boards(port, 1)
        target = native()
        result = subprocess.run(
            [sys.executable, str(script), str(port), target.tvm],
            env={**environment, "LINKER": target.linker},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
    assert result.stdout.splitlines()[-1:] == ["[0, 0, 0, 0]"], result.stderr
    assert server.client_folders() == []


@pytest.fixture(scope="module")
def arm64() -> list[str]:
    """The command, without a CPU, that runs a program on an emulated board."""
    try:
        root = sysroot.prepare(print)
        return [find_qemu(), "-L", str(root)]
    except UserError as error:
        if os.environ.get("CI"):
            pytest.fail(str(error))
        pytest.skip(f"not run: {error}")


@pytest.mark.slow
def test_an_emulated_board_knows_itself_and_gives_the_reference(
    start: Callable[..., Server], arm64: list[str], tmp_path: Path
) -> None:
    program = str(native_server("aarch64"))

    def begin(cpu: str) -> Server:
        return start("--key", "pi", command=[*arm64, "-cpu", cpu, program])

    old, new = begin("cortex-a72"), begin("cortex-a76")
    boards = [
        json.loads(connect(it).get_function("netship.board")()) for it in (old, new)
    ]
    assert [board["machine"] for board in boards] == ["aarch64", "aarch64"]
    assert [board["emulated"] for board in boards] == [True, True]
    assert [board["cpu_part"] for board in boards] == ["0xd08", "0xd0b"]
    assert [board["cpu_model"] for board in boards] == ["Cortex-A72", "Cortex-A76"]
    dot_product = resolve("arm-cortex-a76").features
    assert not dot_product & set(boards[0]["features"])
    assert dot_product <= set(boards[1]["features"])

    bundle = tiny_bundle(tmp_path, resolve("arm-cortex-a72"))
    remote = connect(old)
    remote.upload(str(bundle.library))
    assert (
        remote.get_function("netship.keep")("model.so")
        == bundle.manifest.files["model.so"]
    )
    executor = remote.load_module("model.so")["default"](remote.cpu())
    image, [expected] = read_golden(bundle)[0]
    executor["get_input"](INPUT.name).copyfrom(image)
    executor["run"]()
    np.testing.assert_allclose(executor["get_output"](0).numpy(), expected, atol=1e-5)
