"""A board that cannot be reached, and options that do not name one, are refused in one line."""

from __future__ import annotations

import http.server
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from refusals import CHECK, RUN, Place, expect, labelled_bundle


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return labelled_bundle(tmp_path_factory.mktemp("valid"))


@pytest.fixture
def nobody() -> int:
    """A port where nobody listens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@pytest.fixture
def web() -> Iterator[int]:
    class Handler(http.server.BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    yield server.server_port
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def silent() -> Iterator[int]:
    """A port that takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield int(server.getsockname()[1])


def test_refuses_a_port_where_nobody_listens(
    place: Place, bundle: Path, nobody: int
) -> None:
    line = place.refused(CHECK, bundle, "--rpc", f"127.0.0.1:{nobody}")
    expect(line, f"127.0.0.1:{nobody}|nobody listens|tvm.exec.rpc_server")


@pytest.mark.slow
def test_refuses_a_web_server(place: Place, bundle: Path, web: int) -> None:
    line = place.refused(CHECK, bundle, "--rpc", f"127.0.0.1:{web}")
    expect(line, f"127.0.0.1:{web}")


@pytest.mark.slow
def test_refuses_a_server_that_never_answers(
    place: Place, bundle: Path, silent: int
) -> None:
    line = place.refused(CHECK, bundle, "--rpc", f"127.0.0.1:{silent}")
    expect(line, f"127.0.0.1:{silent}")


def test_refuses_a_tracker_that_is_not_there(
    place: Place, bundle: Path, nobody: int
) -> None:
    options = ["--tracker", f"127.0.0.1:{nobody}", "--key", "pi"]
    expect(place.refused(RUN, bundle, "--image", ".", *options), "no images")
    expect(place.refused(CHECK, bundle, *options), f"127.0.0.1:{nobody}|tracker")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--tracker", "127.0.0.1:9190"], "--tracker|--key KEY"),
        (["--key", "pi"], "--key|--tracker|leave it out"),
        (["--rpc", "raspberrypi"], "'raspberrypi'|HOST:PORT"),
        (["--rpc", "raspberrypi:99999"], "HOST:PORT"),
        (["--rpc", "no-such-host.invalid:9090"], "no-such-host.invalid|check its name"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_refuses_the_options_of_a_board(
    place: Place, bundle: Path, options: list[str], words: str
) -> None:
    expect(place.refused(CHECK, bundle, *options), words)
