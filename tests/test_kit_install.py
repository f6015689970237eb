"""The kit's ``install`` and its service: installed, removed, refused, and what other people's tools say of them."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from kits import HERE, OTHER, unpacked_kit
from tiny import tiny_bundle

from netship.bundle.store import Bundle
from netship.targets.presets import native

# A systemd and a user database that only write down what they are asked for.

STUBS = {
    "id": "echo ${FAKE_ID:-0}",
    "systemctl": 'echo "systemctl $*" >>"$CALLS"; [ "$1" != "${FAIL:-}" ]',
    "getent": 'grep -qx "$2" "$CALLS.users"',
    "useradd": 'for name; do :; done; echo "$name" >>"$CALLS.users"',
    "userdel": ': >"$CALLS.users"',
    "chgrp": 'echo "chgrp $1" >>"$CALLS"',
    "sleep": ":",
}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return tiny_bundle(tmp_path_factory.mktemp("kit"), native())


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return tiny_bundle(tmp_path_factory.mktemp("foreign"), OTHER)


@pytest.fixture(scope="module")
def kit(bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return unpacked_kit(tmp_path_factory.mktemp("unpacked"), bundle)


class System:
    """A folder that ``install`` takes for a whole system."""

    def __init__(self, folder: Path) -> None:
        self.root, self.calls = folder / "root", folder / "calls"
        (self.root / "run/systemd/system").mkdir(parents=True)
        (folder / "calls.users").touch()
        self.calls.touch()
        self.stubs = folder / "stubs"
        self.stubs.mkdir()
        for name, body in STUBS.items():
            (self.stubs / name).write_text(f"#!/bin/sh\n{body}\n")
            (self.stubs / name).chmod(0o755)

    def install(
        self, kit: Path, *options: str, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        path = f"{self.stubs}:{os.environ['PATH']}"
        more = {"PATH": path, "DESTDIR": str(self.root), "CALLS": str(self.calls)}
        return subprocess.run(
            ["sh", str(kit / "install"), *options],
            env={**os.environ, **more, **environment},
            capture_output=True,
            text=True,
            check=False,
        )

    def users(self) -> list[str]:
        return self.calls.with_name("calls.users").read_text().split()

    def files(self) -> set[str]:
        return {
            str(p.relative_to(self.root)) for p in self.root.rglob("*") if p.is_file()
        }


@pytest.fixture
def machine(tmp_path: Path) -> System:
    return System(tmp_path)


def test_the_service_is_installed_and_removed(kit: Path, machine: System) -> None:
    done = machine.install(kit, "--service")
    assert done.returncode == 0, done.stderr
    assert "runs on 127.0.0.1:9090" in done.stdout
    assert machine.users() == ["netship"]
    key = machine.root / "etc/netship/key"
    assert re.fullmatch("[0-9a-f]{32}\n", key.read_text())
    assert key.stat().st_mode & 0o777 == 0o640
    assert machine.files() == {
        "etc/netship/key",
        "etc/systemd/system/netship-serve.service",
        "opt/netship/LICENSES",
        "opt/netship/README.md",
        "opt/netship/serve",
        "opt/netship/verify",
    }
    assert machine.calls.read_text().splitlines() == [
        "chgrp netship",
        "chgrp netship",
        "systemctl daemon-reload",
        "systemctl enable netship-serve",
        "systemctl restart netship-serve",
        "systemctl is-active --quiet netship-serve",
    ]

    before = key.read_text()
    assert machine.install(kit, "--service").returncode == 0
    assert (machine.users(), key.read_text()) == (["netship"], before)

    for _ in range(2):  # the second time there is nothing left to remove
        done = machine.install(kit, "--uninstall")
        assert done.returncode == 0, done.stderr
        assert (machine.files(), machine.users()) == (set(), [])
    assert "disable --now netship-serve" in machine.calls.read_text()


@pytest.mark.parametrize("option", ["--service", "--uninstall"])
def test_install_without_rights_changes_nothing(
    kit: Path, machine: System, option: str
) -> None:
    done = machine.install(kit, option, FAKE_ID="1000")
    assert done.returncode == 2
    assert done.stderr == f"error: not root; run it as: sudo ./install {option}\n"
    (machine.root / "run/systemd/system").rmdir()
    done = machine.install(kit, option)
    assert done.returncode == 2
    assert re.fullmatch("error: no systemd runs here; .*: ./serve\n", done.stderr)
    assert (machine.files(), machine.calls.read_text()) == (set(), "")


def test_install_on_another_architecture_changes_nothing(
    kit: Path, machine: System, foreign: Bundle, tmp_path: Path
) -> None:
    other = Path(shutil.copytree(kit, tmp_path / "other"))
    shutil.copy(foreign.library, other / "serve")
    done = machine.install(other, "--service")
    assert done.returncode == 2
    assert re.match(f"error: this kit is for {HERE} with glibc 2.28", done.stderr)
    assert machine.files() == set()


def test_an_incomplete_kit_is_refused(
    kit: Path, machine: System, tmp_path: Path
) -> None:
    other = Path(shutil.copytree(kit, tmp_path / "other"))
    (other / "serve").unlink()
    done = machine.install(other, "--service")
    assert (done.returncode, machine.files()) == (2, set())
    assert "/other/serve: missing; unpack the kit again" in done.stderr


@pytest.mark.parametrize("step", ["enable", "restart", "is-active"])
def test_a_service_that_does_not_start_is_said(
    kit: Path, machine: System, step: str
) -> None:
    done = machine.install(kit, "--service", FAIL=step)
    assert done.returncode == 2
    assert re.fullmatch(
        "error: .*; see: (journalctl -u|systemctl status) netship-serve.*\n",
        done.stderr,
    )


def test_install_says_how_it_is_used(kit: Path, machine: System) -> None:
    assert machine.install(kit, "--help").stdout.startswith("usage: sudo ./install")
    for options in ([], ["--purge"]):
        done = machine.install(kit, *options)
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.startswith("usage: ")


def tool(name: str) -> str:
    """Where a tool is; where there is none, CI fails and a person is told."""
    if found := shutil.which(name):
        return found
    if os.environ.get("CI"):
        pytest.fail(f"{name} is missing")
    pytest.skip(f"not run: no {name}")


def test_install_is_portable_shell(kit: Path) -> None:
    subprocess.run([tool("shellcheck"), "--shell=sh", str(kit / "install")], check=True)


def test_the_unit_is_valid_and_shut_in(kit: Path, tmp_path: Path) -> None:
    analyse = tool("systemd-analyze")
    unit = tmp_path / "netship-serve.service"
    text = (kit / unit.name).read_text()
    unit.write_text(text.replace("/opt/netship/", f"{kit}/"))
    verified = subprocess.run(
        [analyse, "verify", "--man=no", str(unit)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (verified.returncode, verified.stderr) == (0, "")
    # 1.4 of 10 when written; systemd's "OK" ends at 4.9.
    limit = ["--offline=yes", "--threshold=20"]
    subprocess.run([analyse, "security", *limit, str(unit)], check=True)
