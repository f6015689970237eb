"""The kit that goes to a board: its archive, its page, and the bundle that it may hold."""

from __future__ import annotations

import re
import subprocess
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest
from kits import HERE, OTHER, unpacked_kit
from tiny import tiny_bundle

from netship.bundle.store import Bundle
from netship.devices.board.kit import write_kit
from netship.targets.errors import UserError
from netship.targets.presets import native


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return tiny_bundle(tmp_path_factory.mktemp("kit"), native())


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return tiny_bundle(tmp_path_factory.mktemp("foreign"), OTHER)


@pytest.fixture(scope="module")
def kit(bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return unpacked_kit(tmp_path_factory.mktemp("unpacked"), bundle)


def test_the_kit_checks_its_bundle_and_serves(kit: Path) -> None:
    assert sorted(path.name for path in kit.iterdir()) == [
        "LICENSES",
        "README.md",
        "bundle",
        "install",
        "netship-serve.service",
        "serve",
        "verify",
    ]
    result = subprocess.run(
        ["./verify", "--repeat", "0"], cwd=kit, capture_output=True, check=False
    )
    assert result.returncode == 0
    command = ["./serve", "--port", "0", "--end-with-stdin"]
    served = subprocess.run(
        command, cwd=kit, input="", capture_output=True, text=True, check=True
    )
    assert served.stdout.startswith("listening on 127.0.0.1:")


def test_the_same_kit_has_the_same_bytes(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    archives = []
    for name, zone in (("one", "UTC"), ("two", "Asia/Tokyo")):
        monkeypatch.setenv("TZ", zone)
        archives.append(tmp_path / f"{name}.tar.gz")
        write_kit(HERE, archives[-1], bundle)  # type: ignore[arg-type]
    assert archives[0].read_bytes() == archives[1].read_bytes()
    with tarfile.open(archives[0]) as tar:
        entries = tar.getmembers()
    assert {entry.mode for entry in entries} == {0o644, 0o755}
    assert {(e.uid, e.gid, e.uname, e.mtime, e.type) for e in entries} == {
        (0, 0, "", 0, tarfile.REGTYPE)
    }


def test_the_page_is_filled_in(kit: Path) -> None:
    text = (kit / "README.md").read_text()
    assert f"# netship kit for {HERE}" in text
    assert not re.search(r"@[A-Z]+@", text + (kit / "LICENSES").read_text())
    for notice in ("Apache License", "Cybozu Labs", "llvm/compiler-rt contributors"):
        assert notice in (kit / "LICENSES").read_text()
    # A page of which half is scrolled away is not read.
    assert len(text.splitlines()) < 75


def test_a_kit_for_another_board_than_its_bundle_is_refused(
    bundle: Bundle, foreign: Bundle, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=f"is for {OTHER.machine}, the kit for {HERE};"):
        write_kit(HERE, tmp_path / "kit.tar.gz", foreign)  # type: ignore[arg-type]
    manifest = bundle.manifest.model_copy(update={"format": "c"})
    with pytest.raises(UserError, match="is C source for a microcontroller, a kit is"):
        write_kit(HERE, tmp_path / "kit.tar.gz", replace(bundle, manifest=manifest))  # type: ignore[arg-type]
    with pytest.raises(UserError, match="no such folder; make it, or choose another"):
        write_kit(HERE, tmp_path / "absent" / "kit.tar.gz")  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []
