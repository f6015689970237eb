"""32-bit ARM: code that passes floats as soft-float systems do links, runs and is wrong by 0.3."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

from netship.targets.presets import native, resolve
from netship.targets.toolchain import compile_object, is_hard_float

# Builds and links an exponential for a preset, as given or without hard-float.
SCRIPT = """
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from netship.compile.backends.bundle import link
from netship.targets.engine import compiler
from netship.targets.errors import UserError
from netship.targets.presets import resolve
target = resolve(sys.argv[1])
if sys.argv[2] == "soft":
    target = replace(target, tvm=target.tvm.replace(" -mfloat-abi=hard", ""))
tvm = compiler()
x = tvm.relay.var("x", shape=(1, 8))
module = tvm.IRModule.from_expr(tvm.relay.Function([x], tvm.relay.exp(x)))
factory = tvm.relay.build(module, tvm.target.Target(target.tvm))
job = SimpleNamespace(target=target, library=Path(sys.argv[3]))
try:
    link(SimpleNamespace(factory=factory), SimpleNamespace(source=None), job)
except UserError as error:
    sys.exit(f"refused: {error}")
"""


def link(target: str, floats: str, output: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", SCRIPT, target, floats, str(output)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("target", ["arm-cortex-a7", "arm-cortex-a53-32bit"])
def test_both_presets_pass_floats_in_registers(target: str, tmp_path: Path) -> None:
    output = tmp_path / "model.so"
    result = link(target, "hard", output)
    assert result.returncode == 0, result.stderr
    assert is_hard_float(output)


def test_soft_float_code_is_refused_before_it_is_linked(tmp_path: Path) -> None:
    output = tmp_path / "model.so"
    result = link("arm-cortex-a7", "soft", output)
    assert result.returncode == 1
    assert "refused: target arm-cortex-a7: the code passes floats as" in result.stderr
    assert "give the target -mfloat-abi=hard" in result.stderr
    assert not output.exists()


def test_what_is_no_arm_code_is_not_hard_float(tmp_path: Path) -> None:
    source, other = tmp_path / "a.c", tmp_path / "a.o"
    source.write_text("float f(float x) { return x; }")
    compile_object(source, other, native())
    assert not is_hard_float(other)


@pytest.mark.parametrize("target", ["arm-cortex-a7", "arm-cortex-a53-32bit"])
def test_a_32_bit_board_gets_a_bundle_by_default(target: str) -> None:
    assert resolve(target).format == "bundle"
    assert resolve(target).machine == "arm"
