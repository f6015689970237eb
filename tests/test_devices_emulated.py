"""A bundle on an emulated board, and the arm64 system under it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import onnx
import pytest
from conftest import succeed
from tiny import DOT_PRODUCT, tiny_bundle
from tuning_worker import network

from netship.bundle.golden import read_golden
from netship.bundle.manifest import Manifest
from netship.bundle.store import Bundle
from netship.devices import sysroot
from netship.devices.sessions.emulated import (
    find_qemu,
    open_emulated,
    prepare_board,
    serve_boards,
)
from netship.devices.sessions.fleet import open_fleet
from netship.devices.sessions.session import Origin, Session
from netship.devices.transport.link import Address
from netship.devices.transport.tracker import open_tracker
from netship.records import lookup
from netship.targets.errors import UserError
from netship.targets.presets import resolve


@pytest.fixture(scope="module")
def board() -> Path:
    """The arm64 system; where it or QEMU cannot be had, CI fails and a person is told."""
    try:
        find_qemu()
        return sysroot.prepare(lambda stage: print(stage, file=sys.stderr))
    except UserError as error:
        if os.environ.get("CI"):
            pytest.fail(str(error))
        pytest.skip(f"not run: {error}")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return tiny_bundle(tmp_path_factory.mktemp("a72"), resolve("arm-cortex-a72"))


@pytest.fixture(scope="module")
def dot_product(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    target = resolve("arm-cortex-a76")
    folder = tmp_path_factory.mktemp("a76")
    return tiny_bundle(folder, target, extra_c=DOT_PRODUCT)


@pytest.mark.slow
def test_the_emulated_board_gives_the_reference(board: Path, bundle: Bundle) -> None:
    assert sysroot.sysroot_path().is_dir()
    stages: list[str] = []
    with open_emulated(bundle, on_progress=stages.append) as session:
        assert (session.origin, session.threads) == (Origin.EMULATED, 1)
        for [image], [expected], _ in read_golden(bundle):
            [actual] = session.run(image)
            np.testing.assert_allclose(actual, expected, atol=1e-4)
        assert len(session.time([image], 2)) == 2
        assert session.profile([image]) == []
        state = session.board()
        assert state is not None and state.emulated
        assert (state.machine, state.cpu_model) == ("aarch64", "Cortex-A72")
    assert stages == ["starting an emulated cortex-a72"]


@pytest.mark.slow
@pytest.mark.parametrize("target", ["arm-cortex-a7", "arm-cortex-a53-32bit"])
def test_the_emulated_32_bit_board_gives_the_reference(
    target: str, tmp_path: Path, board: Path
) -> None:
    bundle = tiny_bundle(tmp_path, resolve(target))
    with open_emulated(bundle) as session:
        state = session.board()
        assert state is not None and (state.machine, state.emulated) == ("arm", True)
        for [image], [expected], _ in read_golden(bundle):
            [actual] = session.run(image)
            np.testing.assert_allclose(actual, expected, atol=1e-4)


@pytest.mark.slow
def test_an_x86_bundle_on_an_emulated_board_is_refused_before_it_is_sent(
    board: Path, bundle: Bundle
) -> None:
    emulated = prepare_board("aarch64", "cortex-a53")
    with open_tracker(0) as port, serve_boards(emulated, 1, "pi", port):
        here = replace(bundle, manifest=_for_x86(bundle))
        with pytest.raises(UserError, match="the board is aarch64, not x86_64"):
            request_and_open(here, port)
        with request_and_open(bundle, port) as session:
            assert session.origin is Origin.EMULATED, "though it came over RPC"


def request_and_open(bundle: Bundle, port: int) -> Session:
    return open_fleet(
        bundle, Address("127.0.0.1", port, "pi"), most=1, wait=20, on_note=print
    )


def _for_x86(bundle: Bundle) -> Manifest:
    target = bundle.manifest.target.model_copy(update={"machine": "x86_64"})
    return bundle.manifest.model_copy(update={"target": target})


@pytest.mark.slow
def test_a_tuning_log_from_an_emulated_board_says_emulated(
    board: Path, tmp_path: Path
) -> None:
    onnx.save(network(), tmp_path / "tiny.onnx")
    emulated = prepare_board("aarch64", "cortex-a72")
    with open_tracker(0) as port, serve_boards(emulated, 1, "pi", port):
        where = ["--tracker", f"127.0.0.1:{port}", "--key", "pi"]
        options = ["--target", "arm-cortex-a72", "--model", tmp_path / "tiny.onnx"]
        output = ["--output", tmp_path / "log.json", "--trials", 2]
        succeed("tuning.tune", *options, *where, *output)
    log = lookup.read(tmp_path / "log.json")
    assert log.origin == "emulated" and log.measured.startswith("emulated: pi 1 of")
    assert log.records and not any(record.error for record in log.records)


@pytest.mark.slow
def test_an_instruction_the_cpu_lacks_is_one_line(
    board: Path, dot_product: Bundle
) -> None:
    with pytest.raises(
        UserError,
        match="built for arm-cortex-a76, needs an instruction that the emulated cortex-a72",
    ):
        open_emulated(dot_product, cpu="cortex-a72")
    with open_emulated(dot_product) as session:
        [image], [expected], _ = read_golden(dot_product)[0]
        np.testing.assert_allclose(session.run(image)[0], expected, atol=1e-4)


@pytest.mark.slow
def test_variables_of_this_machine_do_not_reach_the_board(
    board: Path, bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LD_LIBRARY_PATH", "/lib/x86_64-linux-gnu")
    with open_emulated(bundle) as session:
        [image], _, _ = read_golden(bundle)[0]
        session.run(image)


@pytest.mark.slow
def test_an_unknown_cpu_is_refused_with_the_known_ones(
    board: Path, bundle: Bundle
) -> None:
    with pytest.raises(UserError, match="knows no CPU 'cortex-x9', only .*cortex-a53"):
        open_emulated(bundle, cpu="cortex-x9")


def test_only_arm_is_emulated(bundle: Bundle) -> None:
    target = bundle.manifest.target.model_copy(update={"machine": "x86_64"})
    manifest = bundle.manifest.model_copy(update={"target": target})
    with pytest.raises(
        UserError, match="is for x86_64, emulated boards are aarch64 or arm"
    ):
        open_emulated(replace(bundle, manifest=manifest))


def test_no_qemu_gives_the_line_that_installs_it(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(UserError, match="`apt install qemu-user-static`"):
        open_emulated(bundle)


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "netship"


def left_over(cache: Path) -> list[str]:
    return [path.name for path in cache.iterdir() if path.name != "sysroot.lock"]


@pytest.mark.slow
def test_no_network_is_one_line_and_leaves_nothing(
    empty_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(sysroot.MIRROR_VARIABLE, "http://127.0.0.1:9/debian")
    monkeypatch.setattr(sysroot, "KEYRING", Path(__file__))
    with pytest.raises(UserError, match="127.0.0.1.*check the network"):
        sysroot.prepare(lambda stage: None)
    assert left_over(empty_cache) == []
    assert not sysroot.sysroot_path().is_dir()


def test_what_an_interrupted_fetch_left_is_removed(
    empty_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (empty_cache / ".sysroot-killed" / "root").mkdir(parents=True)
    monkeypatch.setattr(sysroot, "_fetch_packages", lambda *_: [])
    monkeypatch.setattr(sysroot, "unpack_wheels", lambda *_, **__: None)
    path = sysroot.prepare(lambda stage: None)
    assert left_over(empty_cache) == [path.name]
    assert sysroot.sysroot_path().is_dir()


def test_two_at_once_fetch_once(
    empty_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    empty_cache.mkdir()
    program = (
        "import fcntl, sys; file = open(sys.argv[1], 'w'); fcntl.flock(file, fcntl.LOCK_EX)\n"
        "print('locked', flush=True); sys.stdin.read()"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", program, str(empty_cache / "sysroot.lock")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert other.stdin and other.stdout
    assert other.stdout.readline() == b"locked\n"
    stages: list[str] = []

    def the_other_is_done(stage: str) -> None:
        stages.append(stage)
        sysroot.sysroot_path().mkdir()
        assert other.stdin
        other.stdin.close()

    try:
        assert sysroot.prepare(the_other_is_done) == sysroot.sysroot_path()
    finally:
        other.kill()
        other.wait()
        other.stdout.close()
    assert stages == ["waiting for another process that fetches a system"]


def test_the_system_is_another_one_when_a_lock_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = sysroot.sysroot_path()
    changed = tmp_path / "lock"
    changed.write_text(sysroot.lock_of().read_text() + "zlib1g 2 00\n")
    monkeypatch.setattr(sysroot, "lock_of", lambda machine: changed)
    assert sysroot.sysroot_path() != before


def test_a_package_with_another_hash_is_refused(
    empty_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def download(command: list[str], environment: dict[str, str], folder: Path) -> None:
        for pin in command[2:]:
            (folder / f"{pin.replace('=', '_')}_arm64.deb").write_text("not this")

    monkeypatch.setattr(sysroot, "_private_apt", lambda *_: {})
    monkeypatch.setattr(sysroot, "_run", download)
    with pytest.raises(UserError, match="libc6_.*SHA-256 is not the one in"):
        sysroot.prepare(lambda stage: None)
    assert left_over(empty_cache) == []


@pytest.mark.parametrize(
    ("tool", "output", "words"),
    [
        (
            "apt-get",
            "E: Version '1.2' for 'libc6' was not found\n",
            "the lock is stale: Version '1.2' for 'libc6' was not found, .*refresh it",
        ),
        (
            "python",
            "WARNING: Retrying\nERROR: No matching distribution found for numpy\n",
            "^No matching distribution found for numpy; check the network",
        ),
        ("python3.11", "/bin/python: No module named pip\n", "ensurepip"),
        ("dpkg-deb", "dpkg-deb: error: unexpected end of file\n", "^dpkg-deb: .*; try"),
    ],
)
def test_a_tool_that_fails_is_one_line(tool: str, output: str, words: str) -> None:
    line = sysroot._why(tool, output)
    assert re.search(words, line)
    assert "\n" not in line


def test_an_environment_without_pip_uses_pythons_own_copy(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As uv makes environments, also for pipx."""
    found = find_spec("ensurepip")
    if found is None:
        pytest.skip("this Python has no ensurepip, which Debian packs apart")
    monkeypatch.setattr(
        sysroot, "find_spec", lambda name: found if name == "ensurepip" else None
    )
    command = sysroot._pip()
    assert "-m" not in command
    assert sysroot._run([*command, "--version"]).startswith("pip ")


def test_a_missing_tool_is_named() -> None:
    with pytest.raises(
        UserError, match="no-such-tool: not found; emulated boards need"
    ):
        sysroot._run(["no-such-tool"])


def test_every_package_is_pinned() -> None:
    small = sysroot.read_lock("arm")
    assert {package.name for package in small} == {"libc6", "libgcc-s1"}
    packages = [*sysroot.read_lock(), *small]
    assert {package.name for package in packages} >= {"libc6", "python3.11-minimal"}
    assert all(len(package.sha256) == 64 for package in packages)
    pinned = sysroot._wheel_requirements()
    for name in sysroot.WHEELS:
        assert f"{name}==" in pinned
    assert pinned.count("--hash=sha256:") > len(sysroot.WHEELS)


def test_the_machine_is_not_named_in_the_lock() -> None:
    for machine in sysroot.ARCHITECTURES:
        assert "://" not in sysroot.lock_of(machine).read_text()
