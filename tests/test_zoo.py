"""Fetching a trained network: whole or not at all, whatever the server does."""

from __future__ import annotations

import hashlib
import io
import itertools
import re
import socket
import threading
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPMessage
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from netship.compile.frontend import zoo
from netship.targets.errors import UserError

CONTENT = bytes(range(256)) * 2000
NAME = "small-1"
ROUTE = "/small-1/resolve/main/small-1.onnx"


class Server(ThreadingHTTPServer):
    """A file server on 127.0.0.1 that can be told to misbehave."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.content = CONTENT
        self.cuts: list[int] = []  # bytes to send of each next body
        self.ranges = True
        self.sizes = True
        self.status = 200
        self.redirects: dict[str, str] = {}
        self.content_range = ""
        self.silent = threading.Event()  # cleared: answers nothing
        self.silent.set()
        self.pause = 0.0
        self.asked: list[tuple[str, str]] = []

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        server = self.server
        wanted = self.headers.get("Range", "")
        server.asked.append((self.path, wanted))
        server.silent.wait(10)
        time.sleep(server.pause)
        if self.path in server.redirects:
            self.send_response(302)
            self.send_header("Location", server.redirects[self.path])
            self.end_headers()
            return
        if server.status != 200 or self.path != ROUTE:
            self.send_error(server.status if server.status != 200 else 404)
            return
        start = 0
        if server.ranges and (match := re.fullmatch(r"bytes=(\d+)-", wanted)):
            start = int(match[1])
            self.send_response(206)
            whole = f"bytes {start}-{len(server.content) - 1}/{len(server.content)}"
            self.send_header("Content-Range", server.content_range or whole)
        else:
            self.send_response(200)
        body = server.content[start:]
        if server.sizes:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: server.cuts.pop(0)] if server.cuts else body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    server = Server()
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    monkeypatch.setenv(zoo.ADDRESS_VARIABLE, server.address)
    yield server
    server.silent.set()
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the test's own, and a small model pinned beside the real one."""
    small = zoo.ZooModel(
        path=ROUTE[1:],
        nbytes=len(CONTENT),
        sha256=hashlib.sha256(CONTENT).hexdigest(),
        preprocessing=zoo.MODELS["mobilenetv2-12"].preprocessing,
    )
    monkeypatch.setitem(zoo.MODELS, NAME, small)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    # A proxy of the user's must not be asked for 127.0.0.1.
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    return tmp_path / "netship" / "models"


def fetch(name: str = NAME) -> Path:
    return zoo.fetch(name, lambda done, total: None)


def refusal(name: str = NAME) -> str:
    """What a refused fetch says: one line that names what to do instead."""
    with pytest.raises(UserError) as caught:
        fetch(name)
    text = str(caught.value)
    assert "\n" not in text
    return text


def left(cache: Path) -> set[str]:
    return {path.name for path in cache.iterdir()} - {f"{NAME}.lock"}


def test_a_network_is_fetched_whole_with_progress(server: Server, cache: Path) -> None:
    seen: list[tuple[int, int]] = []
    path = zoo.fetch(NAME, lambda done, total: seen.append((done, total)))
    assert path == cache / f"{NAME}.onnx"
    assert path.read_bytes() == CONTENT
    assert left(cache) == {path.name}
    assert server.asked == [(ROUTE, "")]
    assert seen == sorted(seen)
    assert seen[-1] == (len(CONTENT), len(CONTENT))


def test_the_second_time_needs_no_network(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = fetch()
    monkeypatch.setenv(zoo.ADDRESS_VARIABLE, "http://127.0.0.1:9")
    assert fetch() == path
    assert len(server.asked) == 1


def test_a_damaged_file_in_the_cache_is_fetched_again(server: Server) -> None:
    path = fetch()
    path.write_bytes(CONTENT[:-1] + b"!")
    assert fetch().read_bytes() == CONTENT
    assert len(server.asked) == 2


def test_a_cut_connection_is_gone_on_from(server: Server) -> None:
    server.cuts = [100_000, 50_000]
    assert fetch().read_bytes() == CONTENT
    assert server.asked == [
        (ROUTE, ""),
        (ROUTE, "bytes=100000-"),
        (ROUTE, "bytes=150000-"),
    ]


def test_what_a_failed_download_kept_is_used_by_the_next(
    server: Server, cache: Path
) -> None:
    server.cuts = [100_000, 0]
    text = refusal()
    assert "the connection was cut; 100,000 of 512,000 bytes are kept" in text
    assert "--model mobilenetv2-1.0-224" in text
    assert "--model FILE.onnx" in text
    assert left(cache) == {f"{NAME}.part"}
    assert fetch().read_bytes() == CONTENT
    assert server.asked[-1] == (ROUTE, "bytes=100000-")


def test_a_server_without_ranges_starts_again(server: Server) -> None:
    server.cuts = [100_000]
    server.ranges = False
    assert fetch().read_bytes() == CONTENT
    assert len(server.asked) == 2


def test_a_server_that_does_not_state_sizes_is_understood(server: Server) -> None:
    server.sizes = False
    server.cuts = [100_000]
    assert fetch().read_bytes() == CONTENT


def test_wrong_bytes_are_refused_and_removed(server: Server, cache: Path) -> None:
    server.content = CONTENT[:-1] + b"!"
    assert "not those of the pinned SHA-256 and were removed" in refusal()
    assert left(cache) == set()


def test_a_part_of_something_else_is_found_out(server: Server, cache: Path) -> None:
    cache.mkdir(parents=True)
    (cache / f"{NAME}.part").write_bytes(b"?" * 1000)
    assert "removed" in refusal()
    assert fetch().read_bytes() == CONTENT


def test_a_part_that_is_too_long_is_thrown_away(server: Server, cache: Path) -> None:
    cache.mkdir(parents=True)
    (cache / f"{NAME}.part").write_bytes(CONTENT + b"?")
    assert fetch().read_bytes() == CONTENT


@pytest.mark.parametrize("content_range", ["bytes 7-8/512000", "nonsense"])
def test_another_range_than_asked_is_refused(
    server: Server, cache: Path, content_range: str
) -> None:
    server.cuts = [100_000]
    server.content_range = content_range
    assert "another range than asked" in refusal()
    assert (cache / f"{NAME}.part").stat().st_size == 100_000


def test_a_file_of_another_size_is_refused_before_it_is_read(
    server: Server, cache: Path
) -> None:
    server.content = CONTENT + b"more"
    assert "offers 512,004 bytes, this model has 512,000" in refusal()
    assert left(cache) == set()


def test_a_body_that_does_not_end_is_refused_and_removed(
    server: Server, cache: Path
) -> None:
    server.content = CONTENT * 8
    server.sizes = False
    seen: list[int] = []
    with pytest.raises(UserError, match="sends more than the 512,000 bytes"):
        zoo.fetch(NAME, lambda done, total: seen.append(done))
    assert max(seen) <= len(CONTENT)
    assert left(cache) == set()


@pytest.mark.parametrize("status", [404, 403, 500, 503])
def test_an_error_of_the_server_is_named(server: Server, status: int) -> None:
    server.status = status
    assert f"{server.address}{ROUTE}: the server answers {status} " in refusal()


def test_nobody_listening_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    monkeypatch.setenv(zoo.ADDRESS_VARIABLE, f"http://127.0.0.1:{port}")
    text = refusal()
    assert "cannot be reached" in text
    assert "Connection refused" in text
    assert "--model mobilenetv2-1.0-224" in text


def test_a_silent_server_is_given_up(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(zoo, "TIMEOUT_SECONDS", 0.2)
    server.silent.clear()
    assert "no answer in 0.2 s" in refusal()
    assert len(server.asked) == 1


def test_something_that_is_no_web_server_is_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def greet() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.recv(1000)
                connection.sendall(b"220 mail.example ESMTP\r\n")

        thread = threading.Thread(target=greet)
        thread.start()
        port = listener.getsockname()[1]
        monkeypatch.setenv(zoo.ADDRESS_VARIABLE, f"http://127.0.0.1:{port}")
        assert "does not speak HTTP" in refusal()
        thread.join()


def test_a_redirect_is_followed(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.redirects = {f"/mirror{ROUTE}": ROUTE}
    monkeypatch.setenv(zoo.ADDRESS_VARIABLE, f"{server.address}/mirror/")
    assert fetch().read_bytes() == CONTENT


@pytest.mark.parametrize(
    ("target", "says"),
    [
        (
            "http://example.org/x",
            "redirects to http://example.org/x, which is not https",
        ),
        ("ftp://127.0.0.1/x", "redirects to ftp://127.0.0.1/x, which is not https"),
        ("file:///etc/hosts", "the server answers 302 Found"),
    ],
)
def test_a_redirect_to_anything_but_https_is_refused(
    server: Server, target: str, says: str
) -> None:
    server.redirects = {ROUTE: target}
    assert says in refusal()


def test_a_redirect_never_leads_from_https_to_this_machine() -> None:
    request = urllib.request.Request("https://example.org/x")
    with pytest.raises(UserError, match="which is not https"):
        zoo._Redirects().redirect_request(
            request, io.BytesIO(), 302, "", HTTPMessage(), "http://127.0.0.1/x"
        )


@pytest.mark.parametrize(("steps", "arrives"), [(5, True), (6, False)])
def test_a_long_way_of_redirects_is_given_up(
    server: Server, monkeypatch: pytest.MonkeyPatch, steps: int, arrives: bool
) -> None:
    way = [f"/{step}{ROUTE}" for step in range(steps)] + [ROUTE]
    server.redirects = dict(itertools.pairwise(way))
    monkeypatch.setenv(zoo.ADDRESS_VARIABLE, f"{server.address}/0")
    if arrives:
        assert fetch().read_bytes() == CONTENT
    else:
        assert "the server answers 302 Found" in refusal()


def test_two_at_once_fetch_once(server: Server) -> None:
    server.pause = 0.3
    with ThreadPoolExecutor(2) as pool:
        paths = list(pool.map(fetch, [NAME, NAME]))
    assert paths[0] == paths[1]
    assert paths[0].read_bytes() == CONTENT
    assert len(server.asked) == 1


def test_a_cache_that_cannot_be_written_to_says_what_to_set(
    server: Server, cache: Path
) -> None:
    cache.parent.write_text("a file where the folder should be")
    text = refusal()
    assert str(cache) in text
    assert "set XDG_CACHE_HOME" in text


@pytest.mark.parametrize(
    "address",
    ["http://example.org", "ftp://127.0.0.1", "example.org", "https://", "http://["],
)
def test_an_address_that_is_not_https_is_refused(
    monkeypatch: pytest.MonkeyPatch, address: str
) -> None:
    monkeypatch.setenv(zoo.ADDRESS_VARIABLE, address)
    assert f"NETSHIP_ZOO={address}: must begin with https://" in refusal()


def test_an_unknown_name_names_the_known_ones() -> None:
    assert "known: mobilenetv2-12" in refusal("mobilenetv3")


def test_the_cache_is_in_the_users_home_unless_set(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for ignored in ("", "relative"):
        monkeypatch.setenv("XDG_CACHE_HOME", ignored)
        kept = tmp_path / ".cache" / "netship" / "models" / f"{NAME}.onnx"
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.write_bytes(CONTENT)
        assert fetch() == kept


def test_the_pinned_network_is_the_zoos() -> None:
    model = zoo.MODELS["mobilenetv2-12"]
    assert f"{zoo.ADDRESS}/{model.path}" == (
        "https://huggingface.co/onnxmodelzoo/mobilenetv2-12/resolve/main/mobilenetv2-12.onnx"
    )
    assert model.nbytes == 13_964_571
    assert len(model.sha256) == 64
    assert (model.preprocessing.resize, model.preprocessing.crop) == (256, (224, 224))
