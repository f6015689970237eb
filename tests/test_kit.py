"""What goes to a board: ``verify``, the archive, its ``install``, its service and its page."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_library import fake_library
from tiny import tiny_bundle

from bundle.store import LIBRARY, MANIFEST, Bundle, open_bundle, sha256_of
from devices import sysroot
from devices.board.kit import write_kit
from devices.board.programs import Machine, native_verifier
from devices.sessions.emulated import find_qemu
from targets.errors import UserError
from targets.presets import native, resolve

HERE = native().machine
OTHER = resolve("arm-cortex-a72" if HERE == "x86_64" else "x86-64-v2")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return tiny_bundle(tmp_path_factory.mktemp("kit"), native())


@pytest.fixture
def copy(bundle: Bundle, tmp_path: Path) -> Path:
    """A copy of the bundle, to spoil."""
    return Path(shutil.copytree(bundle.path, tmp_path / "copy"))


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return tiny_bundle(tmp_path_factory.mktemp("foreign"), OTHER)


Make = Callable[..., Bundle]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """``make(MACRO="what C", …)``: a standalone library that does that."""
    return lambda **macros: fake_library(tmp_path, native(), **macros)


def verify(
    folder: Path, *options: str, program: Path | None = None
) -> subprocess.CompletedProcess[str]:
    program = program or native_verifier(HERE)  # type: ignore[arg-type]
    return subprocess.run(
        [str(program), *options, str(folder)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def expect_refusal(folder: Path, words: str, *options: str) -> None:
    """Exit code 2 and one line that is ``words``, a regular expression."""
    result = verify(folder, *options)
    assert result.returncode == 2, result.stdout
    assert re.fullmatch(f"error: {words}\n", result.stderr), result.stderr


def rehash(folder: Path, **changes: object) -> None:
    """Give the manifest the hashes of the files as they are, and new values."""
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["files"] = {name: sha256_of(folder / name) for name in manifest["files"]}
    (folder / MANIFEST).write_text(json.dumps({**manifest, **changes}))


def test_a_bundle_is_right(bundle: Bundle) -> None:
    result = verify(bundle.path, "--repeat", "7")
    assert result.returncode == 0, result.stderr
    assert "bundle     tiny for " in result.stdout
    assert f"{len(bundle.manifest.files)} files match their SHA-256" in result.stdout
    assert (
        len(re.findall(r"^golden \d   max-abs error ", result.stdout, re.MULTILINE))
        == 2
    )
    assert re.search(
        r"^latency    median [\d.]+ ms, p90 [\d.]+ ms, p99 [\d.]+ ms: measured on this board, "
        r"7 inferences after \d+, 1 thread$",
        result.stdout,
        re.MULTILINE,
    )
    assert re.search(r"^before     .*throttl", result.stdout, re.MULTILINE)
    assert re.search(r"^after      .*throttl", result.stdout, re.MULTILINE)
    assert result.stdout.splitlines()[-1].startswith("PASS ")


def test_a_standalone_library_is_right(make: Make) -> None:
    result = verify(make().path, "--threads", "3")
    assert result.returncode == 0, result.stderr
    assert "200 inferences" in result.stdout and "3 threads" in result.stdout


def test_no_repeats_are_no_latency(bundle: Bundle) -> None:
    result = verify(bundle.path, "--repeat", "0")
    assert result.returncode == 0
    assert "latency" not in result.stdout


def test_a_flipped_bit_is_found_and_nothing_is_loaded(make: Make) -> None:
    folder = make(ON_LOAD='write(1, "loaded", 6)').path
    library = folder / "libfake.so"
    assert "loaded" in verify(folder).stdout
    content = bytearray(library.read_bytes())
    content[-1] ^= 1
    library.write_bytes(content)
    result = verify(folder)
    assert result.returncode == 2
    assert result.stdout == ""
    assert f"{library}: its SHA-256 is not the manifest's; copy or" in result.stderr


@pytest.mark.parametrize("name", ["golden/0.input.bin", "golden/1.output0.bin"])
def test_changed_golden_data_is_found(copy: Path, name: str) -> None:
    (copy / name).write_bytes(b"\0" * (copy / name).stat().st_size)
    expect_refusal(copy, rf"\S+{name}: its SHA-256 is not the manifest's; .*")


def test_wrong_answers_are_exit_code_1(copy: Path) -> None:
    golden = copy / "golden/1.output0.bin"
    expected = np.fromfile(golden, "<f4")
    expected[0] += np.float32(1e-3 * np.ptp(expected))
    expected.tofile(golden)
    rehash(copy)
    result = verify(copy, "--repeat", "0")
    assert result.returncode == 1
    assert re.match(
        r"FAIL       max-abs error .*, 0\.0010? of the range; at most 0\.0002 is right",
        result.stdout.splitlines()[-1],
    )


@pytest.mark.parametrize(
    "macros", [{"WRITTEN": 11}, {"ON_RUN": "output[0] = 0.0f / 0.0f; return 0"}]
)
def test_an_output_that_is_no_number_is_wrong(
    make: Make, macros: dict[str, object]
) -> None:
    result = verify(make(**macros).path, "--repeat", "0")
    assert result.returncode == 1
    assert "max-abs error inf" in result.stdout


def test_a_missing_file_is_named(copy: Path) -> None:
    (copy / "golden/0.input.bin").unlink()
    expect_refusal(copy, r"\S+/golden/0.input.bin: No such file or directory; .*")


def test_a_link_is_no_part_of_a_bundle(copy: Path, tmp_path: Path) -> None:
    (copy / LIBRARY).rename(tmp_path / "elsewhere.so")
    (copy / LIBRARY).symlink_to(tmp_path / "elsewhere.so")
    expect_refusal(copy, r"\S+/model.so: leads out of the bundle; .*")
    (copy / LIBRARY).unlink()
    (tmp_path / "elsewhere.so").rename(copy / "inside.so")
    (copy / LIBRARY).symlink_to("inside.so")
    expect_refusal(copy, r"\S+/model.so: a link is not part of a bundle; .*")


def test_a_bundle_for_another_architecture_is_not_loaded(foreign: Bundle) -> None:
    machine = foreign.manifest.target.machine
    words = rf"\S+/model.so: is for {machine} \(target {OTHER.name}\), this program runs on {HERE}; .*"
    expect_refusal(foreign.path, words)


def test_a_manifest_that_lies_about_the_architecture_is_found(
    foreign: Bundle, copy: Path
) -> None:
    shutil.copy(foreign.library, copy / LIBRARY)
    rehash(copy)
    expect_refusal(
        copy, rf"\S+/model.so: is for {OTHER.machine}, the manifest says {HERE}; .*"
    )
    (copy / LIBRARY).write_text("no library at all, but of some length, as ELF headers")
    rehash(copy)
    expect_refusal(copy, rf"\S+/model.so: is no ELF file, the manifest says {HERE}; .*")


def test_instructions_that_the_cpu_lacks_are_named_before_loading(copy: Path) -> None:
    target = json.loads((copy / MANIFEST).read_text())["target"]
    target["features"].append("amx9")
    rehash(copy, target=target)
    expect_refusal(copy, r"target \S+: this CPU \(.*\) has no amx9; build for .*")


@pytest.mark.parametrize(
    ("macros", "words"),
    [
        ({"ON_LOAD": "raise(SIGILL)"}, "the bundle's code needs an instruction .*"),
        ({"ON_RUN": "raise(SIGILL)"}, "the bundle's code needs an instruction .*"),
        ({"ON_RUN": "raise(SIGSEGV)"}, "the bundle's code crashed; .*"),
        ({"ON_RUN": "return 7"}, r"\S+libfake.so: error 7 \(too many threads\)"),
        ({"ON_RUN": "return 3"}, r"\S+libfake.so: error 3 \(it has no text\)"),
        ({"ON_CREATE": "return NULL"}, r"\S+libfake.so: error 0 \(it has no text\)"),
    ],
)
def test_a_library_that_goes_wrong_is_one_line(
    make: Make, macros: dict[str, object], words: str
) -> None:
    expect_refusal(make(**macros).path, words)


def test_a_library_without_a_network_is_one_line(make: Make, copy: Path) -> None:
    shutil.copy(make().library, copy / LIBRARY)
    rehash(copy)
    expect_refusal(copy, r"\S+/model.so: holds no network; build the bundle again")
    rehash(copy, format="standalone", name="other")
    expect_refusal(copy, r"\S+/model.so: has no function other_create; .*")


def test_shapes_that_are_not_the_librarys_are_refused(copy: Path) -> None:
    tensor = json.loads((copy / MANIFEST).read_text())["input"]
    rehash(copy, input={**tensor, "shape": [1, 3, 32, 8]})
    expect_refusal(copy, r"\S+/model.so: its input is not the manifest's; .*")


def test_what_is_no_bundle_is_one_line(tmp_path: Path) -> None:
    expect_refusal(tmp_path / "absent", r"\S+/absent: No such file or directory; .*")
    expect_refusal(tmp_path, r"\S+: not a bundle \(it has no manifest.json\); .*")
    expect_refusal(tmp_path, "--repeat x: give a number .*", "--repeat", "x")
    expect_refusal(tmp_path, "--fast: unknown, or .*", "--fast")


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"\0\xff\xfe",
        b"null",
        b"[]",
        b"{",
        b'{"format_version": 1} {}',
        b"[" * 1_000_000,
        b'{"a":' * 500_000,
        b'{"format_version": 1e400}',
        b'{"format_version": 2}',
        b'{"format_version": "1"}',
        b" " * (5 << 20),
        b'{"format_version": 1, "format": "bundle", "files": {"../../etc/passwd": ""}}',
        b'{"format_version": 1, "format": "bundle", "files": {"/etc/passwd": ""}}',
        b'{"format_version": 1, "format": "bundle", "files": {"a\\u0000b": ""}}',
        b'{"format_version": 1, "format": "bundle", "files": {"\\u001b[2J\\n\\n": ""}}',
        b'{"format_version": 1, "format": "bundle", "files": {"' + b"x" * 9999 + b'": ""}}',
        b'{"format_version": 1, "format": "bundle", "files": {".": ""}}',
        b'{"format_version": 1, "format": "bundle", "files": []}',
    ],
    ids=range(19),
)  # fmt: skip
def test_a_hostile_manifest_is_one_line(tmp_path: Path, text: bytes) -> None:
    (tmp_path / MANIFEST).write_bytes(text)
    result = verify(tmp_path)
    assert (result.returncode, result.stdout) == (2, "")
    assert re.fullmatch(r"error: [ -~]{10,1000}\n", result.stderr)


def _places(value: object, path: tuple[object, ...] = ()) -> list[tuple[object, ...]]:
    """The way to every value inside a manifest."""
    found = [path]
    if isinstance(value, dict):
        for key, inner in value.items():
            found += _places(inner, (*path, key))
    if isinstance(value, list):
        for index, inner in enumerate(value):
            found += _places(inner, (*path, index))
    return found


# What verify uses; the rest may be anything.
_USED = re.compile(
    r"(format_version|threads|golden|files|target\.machine)(\.|$)|"
    r"(input|outputs)(\.\d)?$|outputs\.\d\.shape|(input|outputs\.\d)\.dtype"
)


def test_a_wrong_value_anywhere_is_one_line(copy: Path) -> None:
    original = json.loads((copy / MANIFEST).read_text())
    places = [p for p in _places(original) if _USED.match(".".join(map(str, p)))]
    assert len(places) > 20
    wrongs: list[Any] = [None, -1, 1e300, "x", [], {"x": [[]]}]
    for path in places:
        for wrong in wrongs:
            manifest = json.loads(json.dumps(original))
            inner = manifest
            for step in path[:-1]:
                inner = inner[step]
            inner[path[-1]] = wrong
            (copy / MANIFEST).write_text(json.dumps(manifest))
            result = verify(copy, "--repeat", "0")
            assert result.returncode == 2, (path, wrong)
            assert re.fullmatch(r"error: [ -~]{10,1000}\n", result.stderr), path


# ---- the archive


@pytest.fixture(scope="module")
def kit(bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The unpacked kit for this machine, with the bundle."""
    folder = tmp_path_factory.mktemp("unpacked")
    archive = folder.with_suffix(".tar.gz")
    write_kit(HERE, archive, bundle)  # type: ignore[arg-type]
    subprocess.run(["tar", "xf", str(archive)], cwd=folder, check=True)
    return folder


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


# ---- install, with a systemd and a user database that only write down what they are told

STUBS = {
    "id": "echo ${FAKE_ID:-0}",
    "systemctl": 'echo "systemctl $*" >>"$CALLS"; [ "$1" != "${FAIL:-}" ]',
    "getent": 'grep -qx "$2" "$CALLS.users"',
    "useradd": 'for name; do :; done; echo "$name" >>"$CALLS.users"',
    "userdel": ': >"$CALLS.users"',
    "chgrp": 'echo "chgrp $1" >>"$CALLS"',
    "sleep": ":",
}


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


# ---- what other people's tools say of it


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


# ---- under QEMU


def emulated(machine: Machine, cpu: str) -> list[str]:
    """The command that runs a program on an emulated board."""
    try:
        root = sysroot.prepare(print, machine)
        return [find_qemu(machine), "-L", str(root), "-cpu", cpu]
    except UserError as error:
        if os.environ.get("CI"):
            pytest.fail(str(error))
        pytest.skip(f"not run: {error}")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("machine", "target", "name"),
    [
        ("aarch64", "arm-cortex-a72", "Cortex-A72"),
        ("arm", "arm-cortex-a7", "unknown CPU"),
    ],
)
def test_an_emulated_board_checks_bundles(
    machine: Machine, target: str, name: str, tmp_path: Path
) -> None:
    board = emulated(machine, resolve(target).qemu_cpu)
    command = [*board, str(native_verifier(machine)), "--repeat", "2"]
    tiny = tiny_bundle(tmp_path, resolve(target))
    for checked in (tiny, fake_library(tmp_path, resolve(target))):
        result = subprocess.run(
            [*command, str(checked.path)], capture_output=True, text=True, check=False
        )
        assert result.returncode == 0, result.stderr
        assert f"board      {name}, {machine}, emulated, glibc" in result.stdout
        assert ": emulated, which says nothing of a board, " in result.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    ("machine", "cpu", "target", "lacking"),
    [
        ("aarch64", "cortex-a72", "arm-cortex-a76", "asimddp, asimdhp, asimdrdm, .*"),
        ("arm", "cortex-a9", "arm-cortex-a7", "vfpv4"),
    ],
)
def test_an_emulated_board_names_what_its_cpu_lacks(
    machine: Machine, cpu: str, target: str, lacking: str, tmp_path: Path
) -> None:
    bundle = fake_library(tmp_path, resolve(target))
    result = subprocess.run(
        [*emulated(machine, cpu), str(native_verifier(machine)), str(bundle.path)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 2
    assert re.search(rf"^error: target {target}: .* has no {lacking};", result.stderr)


def test_the_bundle_is_one(bundle: Bundle) -> None:
    """That the checks above start from what the host accepts too."""
    assert open_bundle(bundle.path).manifest == bundle.manifest
