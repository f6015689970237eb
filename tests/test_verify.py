"""``verify``, the kit's program that checks a bundle on a board: what passes, and the one line for everything else."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_library import fake_library
from kits import HERE, OTHER
from tiny import tiny_bundle

from netship.bundle.store import LIBRARY, MANIFEST, Bundle, open_bundle, sha256_of
from netship.compile.frontend.limits import MAX_OUTPUTS
from netship.devices import sysroot
from netship.devices.board.programs import Machine, native_verifier
from netship.devices.sessions.emulated import find_qemu
from netship.targets.errors import UserError
from netship.targets.presets import native, resolve


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return tiny_bundle(tmp_path_factory.mktemp("kit"), native())


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return tiny_bundle(tmp_path_factory.mktemp("foreign"), OTHER)


Make = Callable[..., Bundle]


@pytest.fixture
def copy(bundle: Bundle, tmp_path: Path) -> Path:
    """A copy of the bundle, to spoil."""
    return Path(shutil.copytree(bundle.path, tmp_path / "copy"))


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


def test_several_outputs_of_a_library_are_compared_apart(make: Make) -> None:
    places = "for (int i = 0; i < 3; i++) second[i] = i"
    assert verify(make(name="right", SECOND=places).path).returncode == 0
    for name, second in (("wrong", f"{places} + i / 2"), ("unwritten", "")):
        result = verify(make(name=name, SECOND=second).path)
        assert result.returncode == 1, result.stderr


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
        r"FAIL       max-abs error .*, \d\d of an element's tolerance",
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


@pytest.mark.parametrize(("wrong", "code"), [("0", 0), ("1e-3f", 1)])
def test_a_wrong_score_is_seen_beside_a_mask(make: Make, wrong: str, code: int) -> None:
    """A mask of −1e9 would hide it from a comparison with the range of the output."""
    scores = "for (int i = 0; i < 12; i++) output[i] = i == 5 ? -1e9f : (float)i"
    folder = make(ON_RUN=f"{scores}; output[0] += {wrong}; return 0").path
    expected = np.arange(12, dtype=np.float32)
    expected[5] = -1e9
    for index in range(2):
        expected.tofile(folder / f"golden/{index}.output0.bin")
    rehash(folder)
    assert verify(folder, "--repeat", "0").returncode == code


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("1.tolerance0", np.nan, "has NaN or infinity"),
        ("1.tolerance0", np.inf, "has NaN or infinity"),
        ("1.tolerance0", -1e-9, "has a negative tolerance"),
        ("0.input", np.nan, "has NaN or infinity"),
        ("0.input", -np.inf, "has NaN or infinity"),
    ],
)
def test_golden_data_that_judge_nothing_are_refused(
    copy: Path, name: str, value: float, words: str
) -> None:
    path = copy / f"golden/{name}.bin"
    values = np.fromfile(path, "<f4")
    values[1] = value
    values.tofile(path)
    rehash(copy)
    expect_refusal(copy, rf"\S+{name}.bin: {words}; build the bundle again")


def test_golden_tolerances_of_another_size_are_refused(copy: Path) -> None:
    path = copy / "golden/0.tolerance0.bin"
    os.truncate(path, 16)
    rehash(copy)
    expect_refusal(copy, r"\S+/0.tolerance0.bin: 16 bytes, but .* takes 20; .*")
    path.write_bytes(bytes(20))
    golden = json.loads((copy / MANIFEST).read_text())["golden"]
    del golden[0]["tolerances"][0]
    rehash(copy, golden=golden)
    expect_refusal(copy, r"manifest.json: golden\[0\].tolerances: has not one file .*")


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


def test_too_many_outputs_are_refused(make: Make) -> None:
    folder = make().path
    manifest = json.loads((folder / MANIFEST).read_text())
    golden = [
        {**each, **{key: each[key] * 65 for key in ("outputs", "tolerances")}}
        for each in manifest["golden"]
    ]
    rehash(folder, outputs=manifest["outputs"] * (MAX_OUTPUTS + 1), golden=golden)
    words = f"manifest.json: a standalone library has at most {MAX_OUTPUTS} outputs; .*"
    expect_refusal(folder, words)


def test_shapes_that_are_not_the_librarys_are_refused(copy: Path) -> None:
    tensor = json.loads((copy / MANIFEST).read_text())["inputs"][0]
    rehash(copy, inputs=[{**tensor, "shape": [1, 3, 32, 8]}])
    expect_refusal(copy, r"\S+/model.so: its inputs are not the manifest's; .*")


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
        b'{"format_version": 4} {}',
        b"[" * 1_000_000,
        b'{"a":' * 500_000,
        b'{"format_version": 4e400}',
        b'{"format_version": 5}',
        b'{"format_version": "4"}',
        b" " * (5 << 20),
        b'{"format_version": 4, "format": "bundle", "files": {"../../etc/passwd": ""}}',
        b'{"format_version": 4, "format": "bundle", "files": {"/etc/passwd": ""}}',
        b'{"format_version": 4, "format": "bundle", "files": {"a\\u0000b": ""}}',
        b'{"format_version": 4, "format": "bundle", "files": {"\\u001b[2J\\n\\n": ""}}',
        b'{"format_version": 4, "format": "bundle", "files": {"' + b"x" * 9999 + b'": ""}}',
        b'{"format_version": 4, "format": "bundle", "files": {".": ""}}',
        b'{"format_version": 4, "format": "bundle", "files": []}',
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
