"""Boards through the system's ssh: an sshd of our own on 127.0.0.1, its keys, and everything that it refuses."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import NamedTuple

import pytest
from boards import HOST, KEY, Board, free_port, until
from conftest import run
from tiny import tiny_bundle

from netship.bundle.golden import read_golden
from netship.bundle.store import Bundle
from netship.devices.board.kit import write_kit
from netship.devices.sessions.fleet import Fleet, opener
from netship.devices.sessions.rpc import describe
from netship.devices.transport.link import Address
from netship.devices.transport.ssh import open_server
from netship.targets.errors import UserError
from netship.targets.presets import native

SSHD = shutil.which("sshd", path="/usr/sbin:/usr/local/sbin:/usr/bin")


class Daemon(NamedTuple):
    """An sshd; its users' home is ``home``."""

    folder: Path
    port: int

    @property
    def home(self) -> Path:
        return self.folder / "home"


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    if SSHD is None or shutil.which("ssh") is None:
        if os.environ.get("CI"):
            pytest.fail("no sshd; apt install openssh-server openssh-client")
        pytest.skip("not run: no sshd; apt install openssh-server")
    folder, port = tmp_path_factory.mktemp("sshd"), free_port()
    for name in ("host", "user", "stranger"):
        keygen = ["ssh-keygen", "-q", "-t", "ed25519", "-N", ""]
        subprocess.run([*keygen, "-f", str(folder / name)], check=True)
    (folder / "home").mkdir()
    (folder / "sshd_config").write_text(
        f"ListenAddress {HOST}\nPort {port}\nHostKey {folder}/host\nPidFile none\n"
        f"AuthorizedKeysFile {folder}/user.pub\nStrictModes no\nUsePAM no\n"
        "PasswordAuthentication no\nKbdInteractiveAuthentication no\nPermitRootLogin yes\n"
        f'ForceCommand cd {folder}/home && eval "$SSH_ORIGINAL_COMMAND"\n'
    )
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(exist_ok=True)
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            [SSHD, "-D", "-e", "-f", str(folder / "sshd_config")], stderr=log
        )
    until(lambda: "Server listening" in (folder / "log").read_text())
    yield Daemon(folder, port)
    process.terminate()
    process.wait()


@pytest.fixture
def pi(daemon: Daemon, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Daemon:
    """``pi`` is a name of the user's own ssh configuration, whose file is ``tmp_path / "config"``."""
    public = (daemon.folder / "host.pub").read_text()
    (tmp_path / "known").write_text(f"[{HOST}]:{daemon.port} {public}")
    write_config(daemon, tmp_path)
    program = tmp_path / "bin" / "ssh"
    program.parent.mkdir()
    ssh = shutil.which("ssh")
    program.write_text(f'#!/bin/sh\nexec {ssh} -F {tmp_path}/config "$@"\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    return daemon


def write_config(daemon: Daemon, folder: Path, **changed: object) -> None:
    options = {
        "HostName": HOST,
        "Port": daemon.port,
        "IdentityFile": daemon.folder / "user",
        "IdentitiesOnly": "yes",
        "UserKnownHostsFile": folder / "known",
        "GlobalKnownHostsFile": "/dev/null",
        "StrictHostKeyChecking": "yes",
        **changed,
    }
    lines = [f"  {name} {value}\n" for name, value in options.items()]
    (folder / "config").write_text("Host pi\n" + "".join(lines))


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return tiny_bundle(tmp_path_factory.mktemp("ssh"), native())


@pytest.fixture
def kit(pi: Daemon, tmp_path: Path) -> Iterator[Daemon]:
    """The board with a kit in ~/netship."""
    write_kit(native().machine, tmp_path / "kit.tar.gz")  # type: ignore[arg-type]
    with tarfile.open(tmp_path / "kit.tar.gz") as archive:
        archive.extractall(pi.home / "netship")
    yield pi
    shutil.rmtree(pi.home / "netship")


def servers(daemon: Daemon) -> list[int]:
    """Kits' servers that run."""
    program = str(daemon.home / "netship/serve").encode()
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if os.readlink(folder / "exe").encode() == program:
                found.append(int(folder.name))
        except OSError:
            continue
    return found


def test_a_check_starts_the_kits_server_and_ends_it(
    kit: Daemon, bundle: Bundle
) -> None:
    result = run(
        *("runtime_demo.check", bundle.path, "--ssh", "pi", "--repeat", 2, "--json")
    )
    assert result.returncode == 0, result.stderr
    said = json.loads(result.stdout)
    assert said["passed"] and said["latency_ms"]["median"] > 0
    assert said["boards"] == {"pi": said["images"]}
    assert said["board"]["machine"] == native().machine
    assert said["device"] == "measured on board"
    until(lambda: not servers(kit))


def test_a_server_that_runs_is_used(pi: Daemon, tmp_path: Path) -> None:
    notes: list[str] = []
    with (
        Board(tmp_path / "board") as board,
        open_server("pi", KEY, board.port, notes.append) as served,
    ):
        assert (notes, served.key) == ([], KEY)
        state = describe(served)
        assert state is not None and state.machine == native().machine


def test_a_board_without_a_kit_says_how_it_gets_one(pi: Daemon, bundle: Bundle) -> None:
    result = run("runtime_demo.check", bundle.path, "--ssh", "pi")
    assert result.returncode == 2
    assert "no server listens on its port 9090 and no kit lies in" in result.stderr
    assert f"board kit --machine {native().machine} --output" in result.stderr


def test_a_tunnel_carries_and_ends(pi: Daemon, tmp_path: Path) -> None:
    with Board(tmp_path / "board") as board:
        with open_server("pi", KEY, board.port) as address:
            assert address.port != board.port
            assert describe(address)
        with pytest.raises(UserError, match="nobody listens"):
            describe(address)


def test_a_board_that_restarts_under_a_check_is_waited_for(
    kit: Daemon, bundle: Bundle
) -> None:
    notes: list[str] = []

    def find() -> AbstractContextManager[Address]:
        return open_server("pi", on_note=notes.append)

    open_it = opener(bundle, find, wait=20)
    with Fleet([(open_it, open_it())], 20, notes.append) as board:
        for index, ([image], _, _) in enumerate(read_golden(bundle)):
            board.run(image)
            if index == 0:
                for server in servers(kit):
                    os.kill(server, 9)
    assert any("pi is back" in note for note in notes)
    until(lambda: not servers(kit))


def test_a_host_that_is_killed_leaves_no_server_there(
    kit: Daemon, bundle: Bundle
) -> None:
    program = (
        "import sys, time; from netship.devices.transport.ssh import open_server\n"
        "with open_server('pi') as served: print(served.port, flush=True); time.sleep(60)\n"
    )
    host = subprocess.Popen(
        [sys.executable, "-c", program],
        cwd=Path(__file__).parents[1],
        stdout=subprocess.PIPE,
    )
    assert host.stdout
    assert host.stdout.readline().strip().isdigit()
    assert servers(kit)
    host.kill()
    host.wait()
    host.stdout.close()
    until(lambda: not servers(kit))


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"HostName": "no-such-host.invalid"}, "unknown host; check its name"),
        ({"Port": "closed"}, "nobody listens on its ssh port; switch SSH on"),
        ({"IdentityFile": "stranger"}, "permission denied; .*ssh-copy-id pi"),
        ({"UserKnownHostsFile": "/dev/null"}, "its host key is not known yet; log in"),
        (
            {"UserKnownHostsFile": "changed"},
            "its host key has changed; .*ssh-keygen -R",
        ),
    ],
)
def test_what_ssh_refuses_is_one_line_with_what_to_do(
    pi: Daemon, tmp_path: Path, changed: dict[str, object], words: str
) -> None:
    other = (pi.folder / "stranger.pub").read_text()
    (tmp_path / "changed").write_text(f"[{HOST}]:{pi.port} {other}")
    values: dict[object, object] = {
        "closed": free_port(),
        "stranger": pi.folder / "stranger",
        "changed": tmp_path / "changed",
    }
    write_config(
        pi,
        tmp_path,
        **{name: values.get(value, value) for name, value in changed.items()},
    )
    with pytest.raises(UserError, match=f"^pi: {words}"), open_server("pi"):
        pass


def test_nobody_is_asked_anything(
    pi: Daemon, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = tmp_path / "asked"
    ask = tmp_path / "ask"
    ask.write_text(f"#!/bin/sh\ntouch {asked}\necho yes\n")
    ask.chmod(0o755)
    monkeypatch.setenv("SSH_ASKPASS", str(ask))
    monkeypatch.setenv("SSH_ASKPASS_REQUIRE", "force")
    write_config(
        pi, tmp_path, UserKnownHostsFile="/dev/null", StrictHostKeyChecking="ask"
    )
    with pytest.raises(UserError, match="host key is not known"), open_server("pi"):
        pass
    assert not asked.exists()


def test_no_ssh_gives_the_line_that_installs_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("shutil.which", lambda name: None)
    with (
        pytest.raises(UserError, match="`apt install openssh-client`"),
        open_server("pi"),
    ):
        pass


@pytest.mark.parametrize("destination", ["-oProxyCommand=touch x", "", " "])
def test_a_destination_is_never_an_option(destination: str) -> None:
    with (
        pytest.raises(UserError, match="is not USER@HOST"),
        open_server(destination),
    ):
        pass


def test_the_doctor_finds_a_board_without_a_kit_not_fit_and_with_one_fit(
    pi: Daemon, tmp_path: Path
) -> None:
    def doctor() -> tuple[int, dict[str, object]]:
        result = run("runtime_demo.board", "doctor", "--ssh", "pi", "--json")
        assert result.stdout, result.stderr
        said = json.loads(result.stdout)
        grades = {row["name"]: row["grade"] for row in said["checks"]}
        assert said["fit"] == ("missing" not in grades.values())
        return result.returncode, grades

    code, grades = doctor()
    assert (code, grades["server"]) == (1, "missing")
    assert (grades["architecture"], grades["glibc"], grades["CPU"]) == ("ok",) * 3
    output = tmp_path / "kit.tar.gz"
    machine = native().machine
    kit = run("runtime_demo.board", "kit", "--machine", machine, "--output", output)
    assert kit.returncode == 0, kit.stderr
    with tarfile.open(output) as archive:
        archive.extractall(pi.home / "netship")
    try:
        code, grades = doctor()
        assert (code, grades["server"], grades["TVM"]) == (0, "ok", "ok")
    finally:
        shutil.rmtree(pi.home / "netship")
