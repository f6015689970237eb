"""What several commands read from their command lines: counts, and HOST:PORT."""

from __future__ import annotations

import argparse
import ipaddress
import json
import math
import re
from pathlib import Path

import pytest
from conftest import succeed
from hypothesis import example, given
from hypothesis import strategies as st
from whole_bundles import fill

import netship
from netship.bundle.store import Bundle
from netship.compile.build import main, parser
from netship.compile.precision import search
from netship.targets.arguments import as_json, count_up_to, host_and_port
from netship.targets.commands import COMMANDS
from netship.targets.errors import UserError

PORTS = st.integers(1, 65535)
NAMES = st.from_regex(r"[A-Za-z0-9.-]+", fullmatch=True)


@given(host=st.one_of(NAMES, st.ip_addresses(v=4).map(str)), port=PORTS)
def test_a_name_or_an_address_and_a_port_are_taken(host: str, port: int) -> None:
    assert host_and_port(f"{host}:{port}") == (host, port)


@given(host=st.ip_addresses(v=6).map(str), port=PORTS)
def test_an_ipv6_address_stands_in_brackets(host: str, port: int) -> None:
    assert host_and_port(f"[{host}]:{port}") == (host, port)
    with pytest.raises(UserError, match="is not HOST:PORT"):
        host_and_port(f"{host}:{port}")


@given(st.integers().filter(lambda port: not 0 < port < 1 << 16))
def test_a_port_out_of_range_is_refused(port: int) -> None:
    with pytest.raises(UserError, match="is not HOST:PORT"):
        host_and_port(f"board:{port}")


@given(st.text(alphabet=st.sampled_from("ab1:[]. ٣\n")) | st.text())
@example("board")
@example(":9090")
@example("board:")
@example("board:٣")
@example("[]:1")
@example("[::1:1")
@example("board:1\n")
@example(" board:1")
def test_anything_is_taken_whole_or_refused_in_one_line(text: str) -> None:
    try:
        host, port = host_and_port(text)
    except UserError as error:
        assert re.match(r".* is not HOST:PORT, such as \S+ or \S+$", str(error))
        assert "\n" not in str(error)
        return
    assert 0 < port < 1 << 16 and host and not re.search(r"[][\s]", host)
    digits = text.rpartition(":")[2]
    assert text in (f"{host}:{digits}", f"[{host}]:{digits}") and int(digits) == port
    # An address with colons is one only in its brackets.
    assert ":" not in host or text.startswith("[")


def test_every_ipv6_form_that_python_knows_is_taken() -> None:
    for host in ("::1", "fe80::1%eth0", "2001:db8::7"):
        assert ipaddress.ip_address(host)
        assert host_and_port(f"[{host}]:9") == (host, 9)


@given(most=st.integers(1, 1000), text=st.text() | st.integers().map(str))
def test_a_count_is_a_whole_number_in_its_range(most: int, text: str) -> None:
    try:
        count = count_up_to(most)(text)
    except argparse.ArgumentTypeError:
        return
    assert 1 <= count <= most and count == int(text)


def test_the_help_names_all_that_a_command_takes() -> None:
    assert "Cortex-A or Cortex-M" in COMMANDS["meter"].summary
    assert "one or several networks" in COMMANDS["compare"].summary
    assert "Compile a vision network" in parser().format_help()
    assert "boxes found, or the classes" in succeed("runtime_demo.run", "--help")


def test_the_help_has_the_units_that_a_limit_takes() -> None:
    text = " ".join(parser().format_help().split())
    for unit, size in (("KB", 1000), ("KiB", 1024)):
        assert f"{unit}: {size}" in text
        given = parser().parse_args(["--arena-limit", f"2{unit}"])
        assert given.arena_limit == 2 * size


def test_json_has_no_number_that_other_programs_refuse() -> None:
    data = {"a": [math.nan, 1.5], "b": (math.inf, {"c": -math.inf})}
    expected = {"a": [None, 1.5], "b": [None, {"c": None}]}
    assert json.loads(as_json(data), parse_constant=pytest.fail) == expected


def test_a_build_without_a_finite_error_prints_valid_json(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = fill(tmp_path)
    wrong = {"verification": {"max_abs_error": math.nan, "relative_error": math.inf}}
    bundle = Bundle(tmp_path, manifest.model_copy(update={"measured": wrong}))
    monkeypatch.setattr(search, "build", lambda *_: bundle)
    assert main(["--model", "m.onnx", "--json"]) == 0
    said = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert said["verification"] == {"max_abs_error": None, "relative_error": None}


def test_every_command_prints_json_by_the_function_that_leaves_out_nan() -> None:
    product = [
        path
        for folder in Path(netship.__file__).parent.iterdir()
        if folder.is_dir()
        for path in folder.rglob("*.py")
    ]
    assert len(product) > 100
    direct = re.compile(r"print\(\s*json|stdout\.write\(\s*json")
    assert [path for path in product if direct.search(path.read_text())] == []
