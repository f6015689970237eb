"""The native server under TVM's own tracker, and AutoScheduler's runner that measures on it."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from boards import HOST, open_from_tracker, until
from native_servers import MISMATCH, TRACKER_MAGIC, WITHIN, Server, greet, starting
from tiny import tiny_bundle

from netship.bundle.golden import read_golden
from netship.bundle.store import Bundle
from netship.devices.transport.link import Address
from netship.devices.transport.tracker import request_board
from netship.targets.presets import native


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Server]]:
    with starting(tmp_path) as begin:
        yield begin


@pytest.fixture
def server(start: Callable[..., Server]) -> Server:
    return start("--key", "pi", "--threads", "2")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return tiny_bundle(tmp_path_factory.mktemp("native"), native())


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
                [image], [expected], _ = read_golden(bundle)[0]
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
from netship.targets.engine import compiler
from netship.targets.toolchain import run_zig
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
