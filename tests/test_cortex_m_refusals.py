"""What cannot be built, compiled or run for a microcontroller is refused in one line that says why."""

from __future__ import annotations

import re
import subprocess
from functools import partial
from pathlib import Path

import integers
import onnx
import pytest
from conftest import run
from cortex_m_projects import Projects, graph_for_c, planned
from integers import project, quantised, residuals

from netship.bundle.store import Bundle, open_bundle
from netship.compile import build
from netship.compile.backends.c.arrange import check_arena, check_flash
from netship.compile.backends.c.placement import split, weights_in
from netship.compile.backends.c.steps import Generated, fuse
from netship.devices.microcontroller.firmware import definitions
from netship.devices.microcontroller.regions import parse
from netship.devices.microcontroller.session import interface_of, open_firmware
from netship.devices.sessions.opening import check_served
from netship.targets.errors import UserError


def test_an_arena_limit_says_what_is_missing_and_where(
    networks: dict[str, onnx.ModelProto], tmp_path: Path
) -> None:
    with pytest.raises(
        UserError,
        match=r"limit 1,000 bytes.* too many; the peak is '\w.*'; no plan can take less than [\d,]+, the most bytes live",
    ):
        project(networks["residuals"], tmp_path / "c", limit=1000)


def test_an_operator_without_c_is_named() -> None:
    g = integers.Graph(3, 8)
    x = g.convolution("stem", "image", 3, 8, 3)
    g.node("Hardmax", "gate", [x], axis=1)
    with pytest.raises(UserError, match=r"node 'gate' \(Hardmax\): not an operator"):
        planned(graph_for_c(g.finish((1, 8, 6, 6))))


def test_a_folder_that_no_compiler_includes_from_is_refused(
    projects: Projects, tmp_path: Path
) -> None:
    bundle = projects["float-residuals", "cortex-m4"]
    with pytest.raises(UserError, match="double quote or a new line; take another"):
        definitions(tmp_path / 'a "b"', "small", interface_of(bundle))


def test_operators_that_are_not_quantised_are_steps_in_float32(tmp_path: Path) -> None:
    proto = quantised(residuals(), tmp_path)
    for maker, reader in (("b.add", "c.expand"), ("c.project", "head")):
        (node,) = (n for n in proto.graph.node if n.name == reader)
        node.input[0] = next(n.output[0] for n in proto.graph.node if n.name == maker)
    made = [each for each in fuse(graph_for_c(proto)) if isinstance(each, Generated)]
    assert {part.label for each in made for part in each.parts} >= {"b.add", "c.expand"}
    project(proto, tmp_path / "c")


def test_float32_for_a_core_without_an_fpu_is_refused_in_one_line(
    projects: Projects,
) -> None:
    source = projects["float-residuals", "cortex-m4"].path / "small.c"
    options = ["-mcpu=cortex-m4", "-mthumb", "-mfloat-abi=soft", "-fsyntax-only"]
    made = subprocess.run(
        ["arm-none-eabi-gcc", *options, source],
        capture_output=True,
        text=True,
        check=False,
    )
    errors = [line for line in made.stderr.splitlines() if "error:" in line]
    assert len(errors) == 1
    assert "needs a core with an FPU" in errors[0] and "--quantize int8" in errors[0]


def test_a_network_too_large_for_the_board_says_by_how_much(
    projects: Projects,
) -> None:
    bundle = projects["residuals", "cortex-m55"]
    firmware = interface_of(bundle).model_copy(update={"arena_bytes": 1 << 20})
    compared = {"verification": {"origin": "measured on host"}}
    manifest = bundle.manifest.model_copy(update={"measured": compared})
    fitting = Bundle(bundle.path, manifest)
    manifest = manifest.model_copy(update={"firmware": firmware})
    larger = Bundle(bundle.path, manifest)
    with pytest.raises(
        UserError,
        match=r"mps3-an547: .* bytes, [\d,]+ more than its RAM; the peak is .*: choose .* on your own board",
    ):
        open_firmware(larger)
    # The build does not send the user there.
    assert "runtime_demo.check" in build._next(fitting, "m.onnx")
    assert "on your board: the emulated mps3-an547 has no room" in build._next(
        larger, "m.onnx"
    )


def test_missing_tools_give_the_line_that_installs_them(
    projects: Projects, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(UserError, match="apt install gcc-arm-none-eabi"):
        open_firmware(open_bundle(projects["residuals", "cortex-m7"].path))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--target", "cortex-m7", "--format", "standalone"], "takes C source; leave"),
        (["--target", "x86-64-v3", "--format", "c"], "such as --target cortex-m7"),
        (
            ["--target", "x86-64-v3", "--arena-limit", "72KB"],
            "--arena-limit: is for micro",
        ),
        (
            ["--target", "x86-64-v3", "--flash-limit", "72KB"],
            "--flash-limit: is for micro",
        ),
        (
            ["--target", "cortex-m7", "--threads", "4"],
            "--threads: cortex-m7 has one core",
        ),
        (
            ["--target", "cortex-m4", "--flash-limit", "100KB"],
            "limit 100,000 bytes: the weights take .*, .* too many; most are of 'classifier'",
        ),
    ],
)
def test_options_that_do_not_go_together_are_refused_in_one_line(
    options: list[str], said: str, tmp_path: Path
) -> None:
    model = ["--model", "mobilenetv2-0.1-32", "--output", tmp_path / "out"]
    result = run("compile.build", *model, *options)
    assert result.returncode == 2
    assert re.search(said, result.stderr.splitlines()[-1])
    assert not (tmp_path / "out").exists()


def test_c_source_is_not_sent_to_a_server(
    projects: Projects,
) -> None:
    with pytest.raises(UserError, match="is C source for a microcontroller; leave"):
        check_served(projects["residuals", "cortex-m7"])


def test_int8_is_no_advice_for_a_network_in_int8(
    networks: dict[str, onnx.ModelProto],
) -> None:
    """Of limits and memories: float32 is told of --quantize int8, int8 is not."""
    for proto, told in ((residuals(), True), (networks["residuals"], False)):
        graph = graph_for_c(proto)
        arranged = planned(graph)
        largest, flash = ("a", 90), parse("sram=10,flash=10")
        said = []
        for refusal in (
            partial(check_arena, arranged, 100),
            partial(check_flash, 100, largest, 10, graph.quantised),
            partial(weights_in, 100, largest, flash, graph.quantised),
            partial(split, arranged, parse("sram=100"), "cortex-m7"),
        ):
            with pytest.raises(UserError) as refused:
                refusal()
            said.append("--quantize int8" in str(refused.value))
        assert said == [told] * 4
