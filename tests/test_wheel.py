"""The wheel: what it carries, and its command in a folder whose files have the names of the project's."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import graphs
import onnx
import pytest
from conftest import ROOT, hostile
from test_layers import FLOORS

from netship.targets import commands
from netship.targets.commands import COMMANDS, as_called
from netship.targets.errors import UserError

NOT_PACKED = shutil.ignore_patterns("__pycache__")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy: the checkout stays as it is."""
    if int(version("setuptools").partition(".")[0]) < 77:
        pytest.skip("setuptools of requirements.lock is not installed: run make setup")
    folder = tmp_path_factory.mktemp("wheel")
    for name in FLOORS:
        shutil.copytree(ROOT / name, folder / name, symlinks=True, ignore=NOT_PACKED)
    for name in ("pyproject.toml", "README.md", "LICENSE", "requirements.lock"):
        shutil.copy(ROOT / name, folder)
    pip("wheel", "--no-build-isolation", "--wheel-dir", folder / "dist", folder)
    (made,) = (folder / "dist").iterdir()
    return made


@pytest.fixture(scope="module")
def site(wheel: Path) -> Path:
    pip("install", "--no-compile", "--target", wheel.parent / "site", wheel)
    return wheel.parent / "site"


def pip(*words: object) -> None:
    options = ["--quiet", "--no-index", "--no-deps", "--disable-pip-version-check"]
    command = [sys.executable, "-m", "pip", str(words[0]), *options]
    subprocess.run([*command, *map(str, words[1:])], check=True)


def run(command: list[object], path: Path, cwd: Path) -> str:
    result = subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_all_of_the_wheel_lies_in_one_package_without_tests(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if ".dist-info/" not in name]
    wanted = {
        f"netship/{path.relative_to(ROOT / floor if floor == 'netship' else ROOT)}"
        for floor in FLOORS
        for path in (ROOT / floor).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert set(names) == wanted and len(names) == len(wanted)


def test_an_installed_netship_builds_where_files_have_the_names_of_its_own(
    site: Path, tmp_path: Path
) -> None:
    here = hostile(tmp_path)
    # A package of the user's too, which `python -m compile.build` in a checkout would take for ours.
    (here / "compile" / "__init__.py").write_text("raise SystemExit('imported')")
    onnx.save(graphs.torchscript_cnn(17), here / "model.onnx")
    netship = site / "bin" / "netship"
    assert "netship build" in run([netship, "--help"], site, here)
    shown = run([netship, "build", "--model", "model.onnx"], site, here)
    assert "netship check out/model-" in shown and "python -m" not in shown
    (built,) = (each for each in (here / "out").iterdir() if each.is_dir())
    checked = run([netship, "check", built, "--repeat", 1, "--json"], site, here)
    assert json.loads(checked)["passed"]
    assert sorted(each.name for each in site.iterdir() if each.name != "bin") == [
        "netship",
        *(each.name for each in site.glob("*.dist-info")),
    ]


def test_a_checkout_builds_where_files_have_the_names_of_its_own(
    tmp_path: Path,
) -> None:
    here = hostile(tmp_path)
    onnx.save(graphs.torchscript_cnn(17), here / "model.onnx")
    python = [sys.executable, "-m"]
    shown = run([*python, "compile.build", "--model", "model.onnx"], ROOT, here)
    assert "python -m runtime_demo.check out/model-" in shown
    shown = run([*python, "netship", "build", "--help"], ROOT, here)
    assert shown.startswith("usage: netship build") and "python -m" not in shown


def test_texts_name_commands_as_they_are_called(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    text = "run `python -m meter calibrate`, python -m\n  compile.build or python -m compile.builder"
    monkeypatch.setattr(sys, "argv", ["/srv/netship/compile/build.py"])
    assert as_called(text) == text
    called = "run `netship meter calibrate`, netship build or python -m compile.builder"
    for program in ("/usr/bin/netship", "/srv/netship/__main__.py"):
        monkeypatch.setattr(sys, "argv", [program])
        assert as_called(text) == called
        assert str(UserError(text)) == called
    for name, command in COMMANDS.items():
        assert find_spec(f"netship.{command.module}"), name


def test_only_a_checkout_is_set_up_with_make(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "zig is missing; run make setup again, and report it"
    assert as_called(text) == text
    monkeypatch.setattr(commands, "_is_checkout", lambda: False)
    assert as_called(text) == "zig is missing; install netship again, and report it"
