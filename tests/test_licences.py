"""Terms: the project's, those of what it writes, and the notices that others ask to be passed on."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

from netship.__main__ import main as netship
from netship.compile import build
from netship.compile.backends.registry import BACKENDS
from netship.targets import VERSION
from netship.targets.licences import notice

ROOT = Path(__file__).parent.parent


def test_the_project_has_a_licence_and_a_version() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["license"] == "Apache-2.0"
    text = (ROOT / "LICENSE").read_text()
    assert "Apache License" in text and "END OF TERMS AND CONDITIONS" in text
    assert project["version"] == VERSION


@pytest.mark.parametrize("option", ["--version", "--licenses"])
def test_options_that_print_and_end(
    option: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        build.main([option])
    assert ended.value.code == 0
    printed = capsys.readouterr().out
    if option == "--version":
        assert printed == f"netship {VERSION}\n"
    else:
        for part in ("Apache License", "is yours", "MIT License", "picojson", "Zig"):
            assert part in printed
        assert not re.search(r"@[A-Z]+@", printed)


def test_the_command_prints_the_licences_too(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as ended:
        netship(["--licenses"])
    assert ended.value.code == 0
    assert "Apache License" in capsys.readouterr().out


def test_names_from_outside_are_shown_without_controls() -> None:
    assert "\x1b" not in notice("a\x1b[31m.onnx", linked=False)


def test_only_shared_libraries_carry_the_linkers_notice() -> None:
    assert {name: each.linked for name, each in BACKENDS.items()} == {
        "bundle": True,
        "standalone": True,
        "c": False,
    }
    assert "MIT License" in notice("m.onnx", linked=True)
    assert "MIT License" not in notice("m.onnx", linked=False)
    assert "is yours" in notice("m.onnx", linked=False)
