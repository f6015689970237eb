"""The environment: what setup.sh refuses, what it says, what the lock promises; and the wrong Python."""

from __future__ import annotations

import ast
import os
import re
import shutil
import stat
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import ROOT, hostile
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

COMMANDS = [
    "compile.build",
    "compile.mobilenet",
    "runtime_demo.board",
    "runtime_demo.check",
    "runtime_demo.compare",
    "runtime_demo.demo",
    "runtime_demo.run",
    "targets",
]
PYTHONS = ("python3.12", "python3.11", "python3", "python")


@pytest.fixture
def programs(tmp_path: Path) -> Callable[[str, str], Path]:
    """``programs(name, script)`` puts a program of ours before the machine's own."""
    folder = tmp_path / "programs"
    folder.mkdir()

    def add(name: str, script: str) -> Path:
        path = folder / name
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
        return path

    return add


def setup(tmp_path: Path, *options: object) -> subprocess.CompletedProcess[str]:
    """setup.sh with the venv in tmp_path/venv unless told otherwise."""
    folder = tmp_path / "programs"
    return subprocess.run(
        [ROOT / "setup.sh", *map(str, options or [tmp_path / "venv"])],
        env={**os.environ, "PATH": f"{folder}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        check=False,
    )


def refusal(tmp_path: Path, *options: object) -> str:
    """The one line with which setup.sh refuses, having made nothing."""
    before = sorted(tmp_path.rglob("*"))
    result = setup(tmp_path, *options)
    assert (result.returncode, result.stdout) == (2, "")
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ")
    assert sorted(tmp_path.rglob("*")) == before
    return line


Programs = Callable[[str, str], Path]


@pytest.mark.parametrize("platform", ["Darwin arm64", "Linux armv7l", "Linux riscv64"])
def test_a_platform_without_a_wheel_is_refused(
    tmp_path: Path, programs: Programs, platform: str
) -> None:
    system, machine = platform.split()
    programs("uname", f"case $1 in -s) echo {system};; -m) echo {machine};; esac")
    line = refusal(tmp_path)
    assert platform in line and "x86-64 and aarch64 Linux only" in line


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        ("exit 1", "no glibc"),
        ("echo glibc 2.17", "glibc 2.17"),
        ("echo glibc 2.27", "glibc 2.27"),
    ],
)
def test_a_linux_without_a_new_enough_glibc_is_refused(
    tmp_path: Path, programs: Programs, answer: str, words: str
) -> None:
    programs("getconf", answer)
    line = refusal(tmp_path)
    assert words in line and "2.28 or later" in line


@pytest.mark.parametrize("version", ["2.28", "2.31", "2.41"])
def test_a_new_enough_glibc_is_taken(
    tmp_path: Path, programs: Programs, version: str
) -> None:
    programs("getconf", f"echo glibc {version}")
    assert "PYTHON=" in refusal(tmp_path, tmp_path / "venv", "nowhere/python")


def test_a_python_of_another_version_is_refused(
    tmp_path: Path, programs: Programs
) -> None:
    old = programs("python3.9", "exit 1")
    line = refusal(tmp_path, tmp_path / "venv", old)
    assert f"PYTHON={old}" in line and "CPython 3.11 or 3.12" in line


def test_a_python_that_is_not_there_is_refused(tmp_path: Path) -> None:
    line = refusal(tmp_path, tmp_path / "venv", "nowhere/python3.11")
    assert "PYTHON=nowhere/python3.11" in line


def test_a_machine_without_python_is_told_what_to_install(
    tmp_path: Path, programs: Programs
) -> None:
    for name in PYTHONS:
        programs(name, "exit 1")
    line = refusal(tmp_path)
    assert "apt install python3.11 python3.11-venv" in line and "make PYTHON=" in line


def test_a_python_without_venv_is_told_its_package(
    tmp_path: Path, programs: Programs
) -> None:
    python = programs(
        "bare", f'case $2 in *ensurepip*) exit 1;; esac; exec {sys.executable} "$@"'
    )
    version = f"{sys.version_info[0]}.{sys.version_info[1]}"
    line = refusal(tmp_path, tmp_path / "venv", python)
    assert f"apt install python{version}-venv" in line


def test_the_first_python_that_fits_is_taken(
    tmp_path: Path, programs: Programs
) -> None:
    programs("python3.12", "exit 1")
    programs(
        "python3.11",
        f'case $2 in *ensurepip*) exit 1;; esac; exec {sys.executable} "$@"',
    )
    assert "error: python3.11 has no venv module" in refusal(tmp_path)


def test_a_folder_of_the_user_s_is_not_taken_for_the_environment(
    tmp_path: Path,
) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("mine")
    line = refusal(tmp_path, tmp_path / "thesis", sys.executable)
    assert "thesis" in line and "move it away" in line


def made_environment(tmp_path: Path) -> Path:
    venv = tmp_path / "venv"
    (venv / "bin").mkdir(parents=True)
    (venv / "bin" / "python").symlink_to(sys.executable)
    (venv / "pyvenv.cfg").touch()
    shutil.copy(ROOT / "requirements.lock", venv)
    return venv


def test_what_is_up_to_date_is_left_alone_and_its_activation_printed(
    tmp_path: Path,
) -> None:
    venv = made_environment(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    result = setup(tmp_path, venv, sys.executable)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout == f"ready; activate it with:  . {venv}/bin/activate\n"
    assert sorted(tmp_path.rglob("*")) == before


def fake_python(programs: Programs, tmp_path: Path, pip: str) -> Path:
    """A Python whose venv has a pip that only notes how it was called."""
    inside = f"""case "$*" in
        "-m pip "*) echo "$*" > {tmp_path}/pip-called; {pip};;
        *purelib*) echo {tmp_path};;
        *) exec {sys.executable} "$@";;
    esac"""
    script = programs("inside", inside)
    return programs(
        "outside",
        f"""if [ "$1 $2" = "-m venv" ]; then
        mkdir -p "$3/bin" && touch "$3/pyvenv.cfg" && cp {script} "$3/bin/python"
        else exec {sys.executable} "$@"; fi""",
    )


def test_a_stale_environment_is_made_anew_from_the_lock(
    tmp_path: Path, programs: Programs
) -> None:
    venv = made_environment(tmp_path)
    (venv / "requirements.lock").write_text("numpy==1.0\n")
    (venv / "old").touch()
    result = setup(tmp_path, venv, fake_python(programs, tmp_path, "exit 0"))
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1].endswith(f". {venv}/bin/activate")
    assert not (venv / "old").exists()
    called = (tmp_path / "pip-called").read_text()
    assert "--require-hashes" in called and "--only-binary :all:" in called
    assert f"--requirement {ROOT}/requirements.lock" in called
    lock = (ROOT / "requirements.lock").read_text()
    assert (venv / "requirements.lock").read_text() == lock
    assert (tmp_path / "netship.pth").read_text() == f"{ROOT}\n"
    said = subprocess.run(
        [venv / "bin" / "netship", "targets", "--version"],
        cwd=hostile(tmp_path),
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert said.stdout == f"netship {PROJECT['project']['version']}\n", said.stderr


def test_when_pip_fails_the_environment_does_not_count_as_made(
    tmp_path: Path, programs: Programs
) -> None:
    python = fake_python(programs, tmp_path, "echo no network >&2; exit 1")
    result = setup(tmp_path, tmp_path / "venv", python)
    assert result.returncode == 2
    assert result.stderr.splitlines()[0] == "no network"
    assert result.stderr.splitlines()[-1].startswith("error: pip could not install")
    assert not (tmp_path / "venv" / "requirements.lock").exists()


# The lock


LOCK = (ROOT / "requirements.lock").read_text()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def locked() -> list[tuple[Requirement, list[str]]]:
    """Every requirement of the lock with its hashes."""
    entries = LOCK.replace("\\\n", " ").splitlines()
    parts = [entry.split("--hash=") for entry in entries]
    return [(Requirement(part[0]), [h.strip() for h in part[1:]]) for part in parts]


def test_the_lock_holds_no_address() -> None:
    assert not re.search(r"https?:|--(extra-)?index|--find-links|@ ", LOCK)


def test_every_locked_package_has_one_version_and_hashes() -> None:
    for requirement, hashes in locked():
        assert re.fullmatch(r"==[\w.]+", str(requirement.specifier)), requirement
        assert hashes, requirement
        assert all(re.fullmatch(r"sha256:[0-9a-f]{64}", each) for each in hashes)


def test_the_lock_fits_what_the_project_asks_for() -> None:
    versions: dict[str, list[str]] = {}
    for requirement, _ in locked():
        (pin,) = requirement.specifier
        versions.setdefault(canonicalize_name(requirement.name), []).append(pin.version)
    groups = PROJECT["dependency-groups"]
    asked = [*PROJECT["project"]["dependencies"], *groups["demo"], *groups["dev"]]
    assert len(asked) >= 10
    for text in asked:
        wanted = Requirement(text)
        found = versions[canonicalize_name(wanted.name)]
        assert all(version in wanted.specifier for version in found), text


# The wrong Python


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Python that fits but has none of the packages."""
    folder = tmp_path_factory.mktemp("bare") / "venv"
    command = [sys.executable, "-m", "venv", "--without-pip", str(folder)]
    subprocess.run(command, check=True)
    return folder / "bin" / "python"


@pytest.mark.parametrize("module", COMMANDS)
def test_a_python_without_the_packages_says_how_to_get_them(
    bare: Path, module: str
) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    result = subprocess.run(
        [bare, "-m", module, "--help"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (result.returncode, result.stdout) == (2, "")
    (line,) = result.stderr.splitlines()
    assert line == (
        f"error: {bare} does not have the project's packages; in the project's folder "
        "run `make setup` once, then `. .venv/bin/activate`"
    )


@pytest.mark.parametrize("version", [(3, 9), (3, 13), (4, 0)])
def test_a_python_of_another_version_is_named(version: tuple[int, int]) -> None:
    script = f"import sys; sys.version_info = {(*version, 0)}; import targets"
    result = subprocess.run(
        [sys.executable, "-c", script],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 2
    (line,) = result.stderr.splitlines()
    assert line.startswith(f"error: Python {version[0]}.{version[1]} has no engine")
    assert "make setup" in line and "activate" in line


@pytest.mark.parametrize("module", COMMANDS)
def test_what_refuses_a_wrong_python_is_old_syntax(module: str) -> None:
    """Python 3.6 must get as far as the message: every package of a command begins with it."""
    package = ROOT / module.split(".")[0] / "__init__.py"
    packages = (ROOT / folder / "__init__.py" for folder in ("targets", "netship"))
    for path in {package, *packages}:
        ast.parse(path.read_text(), feature_version=(3, 6))
    if module != "targets":
        assert "\nfrom netship import targets as targets" in package.read_text()


@pytest.mark.parametrize("module", COMMANDS)
def test_help_teaches_without_the_heavy_packages(module: str) -> None:
    script = (
        "import runpy, sys\n"
        f"sys.argv = [{module!r}, '--help']\n"
        "try: runpy.run_module(sys.argv[0], run_name='__main__', alter_sys=True)\n"
        "finally: print('loaded:', *sys.modules)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", script],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (result.returncode, result.stderr) == (0, "")
    help_text, _, loaded = result.stdout.partition("loaded: ")
    assert help_text.startswith(f"usage: python -m {module}")
    assert not {"tvm", "onnx", "onnxruntime", "PIL", "scipy"} & set(loaded.split())
