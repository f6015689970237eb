"""The native RPC server for boards: what TVM's client and ours get from it, here and on an emulated board."""

from __future__ import annotations

import hashlib
import json
import os
import resource
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from boards import HOST, until
from native_servers import MAGIC, MISMATCH, WITHIN, Server, connect, greet, starting
from tiny import INPUT, tiny_bundle

from netship.bundle.golden import read_golden
from netship.bundle.store import Bundle
from netship.devices import sysroot
from netship.devices.board.programs import native_server
from netship.devices.sessions.emulated import find_qemu
from netship.devices.sessions.rpc import open_rpc
from netship.devices.transport.link import Address
from netship.targets.errors import UserError
from netship.targets.presets import native, resolve, this_cpu


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return tiny_bundle(tmp_path_factory.mktemp("native"), native())


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Server]]:
    with starting(tmp_path) as begin:
        yield begin


@pytest.fixture
def server(start: Callable[..., Server]) -> Server:
    return start("--key", "pi", "--threads", "2")


def test_tvms_client_gets_the_reference(server: Server, bundle: Bundle) -> None:
    remote = connect(server)
    remote.upload(str(bundle.library))
    assert bytes(remote.download("model.so")) == bundle.library.read_bytes()
    remote.get_function("runtime.config_threadpool")(1, 1)
    executor = remote.load_module("model.so")["default"](remote.cpu())
    [image], [expected], _ = read_golden(bundle)[0]
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
        for [image], [expected], _ in read_golden(bundle):
            np.testing.assert_allclose(session.run(image)[0], expected, atol=1e-6)
        assert session.profile([image])[-1].output_shape == (1, 5)
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
    [image], [expected], _ = read_golden(bundle)[0]
    executor["get_input"](INPUT.name).copyfrom(image)
    executor["run"]()
    np.testing.assert_allclose(executor["get_output"](0).numpy(), expected, atol=1e-5)
