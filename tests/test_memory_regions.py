"""Activations over several memories: nothing overlaps, the numbers stay, what is used most lies where it waits least."""

from __future__ import annotations

import itertools
import json
import re
import subprocess
from pathlib import Path

import numpy as np
import onnx
import pytest
from cortex_m_projects import expected_output, graph_for_c, planned
from gated import small
from integers import chain, patterns, project, quantised, residuals
from onnx import helper

from netship.bundle.store import Bundle, open_bundle
from netship.compile import driver
from netship.compile.backends.c import placement
from netship.compile.backends.c.scratch import ALIGNMENT
from netship.compile.build import _table, _warnings, parser, request
from netship.compile.build import main as build
from netship.compile.program.planner import buffers, end_of, live_bytes, packed
from netship.devices.microcontroller.parts import PARTS, too_large
from netship.devices.microcontroller.regions import Region, of_part, parse
from netship.devices.microcontroller.session import (
    FirmwareSession,
    interface_of,
    open_firmware,
    to_input,
)
from netship.meter import firmware_report
from netship.meter.__main__ import measure
from netship.meter.__main__ import parser as meter_parser
from netship.meter.firmware import Inference
from netship.runtime_demo import microcontroller
from netship.targets.errors import UserError
from netship.targets.progress import Progress

CPU = "cortex-m7"


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> onnx.ModelProto:
    return quantised(residuals(), tmp_path_factory.mktemp("quantised"))


MEMORY = (
    *(Region("dtcm", 1024, 0x2000_0000), Region("sram", 1024, 0x2001_0000)),
    *(Region("sdram", 1 << 20, 0xC000_0000), Region("flash", 1000, 0x0800_0000)),
    Region("qspi", 1 << 20, 0x9000_0000),
)


@pytest.fixture(scope="module")
def bundle(
    network: onnx.ModelProto, tmp_path_factory: pytest.TempPathFactory
) -> Bundle:
    folder = tmp_path_factory.mktemp("projects") / "split"
    return project(network, folder, CPU, regions=MEMORY)


def test_the_numbers_stay_on_host_and_board(
    bundle: Bundle, network: onnx.ModelProto
) -> None:
    """The build has compared the host's."""
    (image,) = patterns(network, 1)
    with open_firmware(bundle) as session:
        assert isinstance(session, FirmwareSession)
        session.run(image)
        figures = session.figures()
    assert figures.max_error == 0
    (line,) = (x for x in microcontroller.lines(figures) if x.startswith("placed"))
    assert re.search(r"dtcm [\d,]+ of 1,024 bytes, .*, weights in qspi", line)
    stored = np.frombuffer(to_input([image], bundle), np.int8)
    (outputs,) = (run.outputs[0] for _, run in session._runs)
    assert (outputs[0] == expected_output(graph_for_c(network), stored)).all()


def test_the_manifest_says_what_lies_where(bundle: Bundle) -> None:
    interface = interface_of(bundle)
    assert [each.name for each in interface.arenas] == ["dtcm", "sram", "sdram"]
    assert all(each.nbytes <= each.size for each in interface.arenas)
    assert interface.arenas[0].cycles == 0 < interface.arenas[2].cycles
    assert interface.weights_in == "qspi"
    plan = bundle.manifest.lowering.memory
    assert plan is not None
    ends = [(x.begin, x.begin + x.nbytes) for x in interface.arenas]
    for each in plan.buffers:
        begin = each.offset
        assert any(b <= begin and begin + each.nbytes <= end for b, end in ends)
    header = (bundle.path / "small.h").read_text()
    assert "void *arena, void *arena_sram, void *arena_sdram);" in header
    page = (bundle.path / "README.md").read_text()
    assert "| sdram | " in page and "| qspi | " in page


def test_the_meter_takes_the_memories_as_built(bundle: Bundle) -> None:
    options = [str(bundle.path), "--cpu", CPU, "--part", "stm32f746"]
    found = measure(meter_parser().parse_args(options), lambda stage: None)
    assert isinstance(found, Inference)
    assert (found.places.weights, found.fits) == ("external", True)
    assert found.activation_cycles > 0
    assert "not in the sum" in firmware_report.table(found)
    assert [each.name for each in found.memories] == ["flash", "dtcm", "sram", "sdram"]


def test_the_linker_puts_it_there(bundle: Bundle, tmp_path: Path) -> None:
    """With the generated script and no other word about these memories; without NN_SECTIONS they are plain data."""
    (tmp_path / "part.ld").write_text(
        "MEMORY { FLASH (rx) : ORIGIN = 0x08000000, LENGTH = 1M\n"
        "RAM (rwx) : ORIGIN = 0x20030000, LENGTH = 64K }\n"
        "SECTIONS { .text : { *(.text*) *(.rodata*) } > FLASH\n"
        ".data : { *(.data*) } > RAM AT > FLASH\n .bss : { *(.bss*) } > RAM }\n"
        "INCLUDE small_memory.ld\n"
    )
    flags = ["-mcpu=cortex-m7", "-mthumb", "-mfloat-abi=hard", "-std=c99", "-Werror"]
    for sections, wanted in (
        (["-DNN_SECTIONS"], ("20000000", "20010000", "c0000000", "90000000")),
        ([], ("2003", "2003", "2003", "0800")),
    ):
        program = tmp_path / "a.elf"
        command = ["arm-none-eabi-gcc", *flags, *sections, "-I", str(bundle.path)]
        command += [
            "-T",
            "part.ld",
            f"-L{bundle.path}",
            "-nostartfiles",
            "-specs=nosys.specs",
        ]
        command += ["-Wl,-e,main", "-Wl,--no-warn-rwx-segments", "-o", str(program)]
        files = ("example/main.c", "small.c", "small_weights.c")
        command += [str(bundle.path / name) for name in files]
        ran = subprocess.run(
            command, cwd=tmp_path, capture_output=True, text=True, check=False
        )
        assert ran.returncode == 0, ran.stderr
        shown = subprocess.run(
            ["arm-none-eabi-nm", str(program)],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        symbols = {
            name: address for address, _, name in map(str.split, shown.splitlines())
        }
        names = ("arena", "arena_sram", "arena_sdram", "small_weights")
        for name, address in zip(names, wanted, strict=True):
            assert symbols[name].startswith(address), (name, symbols[name])
    scatter = (bundle.path / "small_memory.sct").read_text()
    assert "SMALL_SDRAM 0xC0000000 UNINIT 0x100000 {\n  *(.small_sdram)" in scatter


@pytest.mark.parametrize("model", [chain, residuals])
@pytest.mark.parametrize("size", [700, 1400])
def test_no_other_split_costs_less(model: object, size: int, tmp_path: Path) -> None:
    assert callable(model)
    arranged = planned(graph_for_c(quantised(model(), tmp_path)))
    regions = [Region("dtcm", size), Region("sdram", 1 << 20)]
    found = placement.split(arranged, regions, CPU)
    wanted = buffers(found.program, ALIGNMENT, found.program.outputs)
    needs = live_bytes(found.program, wanted)
    moved = placement._moved(found)
    assert len(wanted) < 16
    fits = [
        sum(
            moved[placement._key(x)]
            for x, is_fast in zip(wanted, fast, strict=True)
            if not is_fast
        )
        for fast in itertools.product((True, False), repeat=len(wanted))
        if end_of(packed([x for x, f in zip(wanted, fast, strict=True) if f], needs))
        <= size
    ]
    slow = [x for x in placement.arenas(found, CPU, regions) if x.name == "sdram"]
    assert (slow[0].moved if slow else 0) <= 1.02 * min(fits) + 1


@pytest.mark.parametrize(
    ("memory", "why"),
    [
        ("sram=1K", r"sram 1,024 bytes: step '.*' has [\d,]+ bytes live at once, [\d,]+ too many: .* sdram=8M"),
        ("dtcm=800,sram=800,sram2=800,sram3=800,sram4=800,sram5=800", r"'.*' takes [\d,]+ bytes in one piece, [\d,]+ more than \w+ has"),
        ("sram=64K,flash=1K,qspi=2K", r"flash 1,024, qspi 2,048 bytes: the weights take [\d,]+ bytes, [\d,]+ more than qspi has; most are of '\w+'"),
    ],
)  # fmt: skip
def test_what_does_not_fit_says_by_how_much_and_which_layer(
    network: onnx.ModelProto, memory: str, why: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=why) as caught:
        project(network, tmp_path / "c", CPU, regions=parse(memory))
    assert "\n" not in str(caught.value)


def test_all_in_one_memory_is_one_arena(
    network: onnx.ModelProto, tmp_path: Path
) -> None:
    whole = project(network, tmp_path / "c", CPU, regions=parse("sram=64K,flash=1M"))
    plain = project(network, tmp_path / "d", CPU)
    (arena,) = interface_of(whole).arenas
    assert (arena.name, arena.nbytes) == ("sram", interface_of(plain).arena_bytes)
    same = ("small.c", "small_int8.h", "golden.h")
    for name in same:
        assert (whole.path / name).read_bytes() == (plain.path / name).read_bytes()
    assert not list(plain.path.glob("*memory.[hls]*[!g]"))


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("sram", "is not a memory such as"),
        ("sram=0K", "is not a memory such as"),
        ("sram=5G", "is not a memory such as"),
        ("disk=5M", "a memory's name begins with"),
        ("sram=1K,sram=2K", "given twice"),
        ("flash=1M", "no memory for activations"),
    ],
)
def test_a_memory_that_cannot_be_is_refused(text: str, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        parse(text)


def test_parts_have_memories() -> None:
    assert [x.size for x in parse("dtcm=128K,sdram=8MiB")] == [128 << 10, 8 << 20]
    for name, part in PARTS.items():
        regions = of_part(name, part.cpu)
        assert any(each.is_data for each in regions)
        assert all(each.kind for each in regions)
        flash = sum(x.size for x in regions if x.kind == "flash")
        assert flash == part.sizes.flash << 10
        inside = sum(x.size for x in regions if x.is_data and x.kind != "sdram")
        assert inside <= (part.sizes.ram + part.sizes.dtcm) << 10
    with pytest.raises(UserError, match="has a cortex-m7; build with --target cortex"):
        of_part("stm32f746", "cortex-m4")


def test_more_than_any_known_part_has_is_said_with_what_to_do() -> None:
    weights, arena = 18_500_000, 3 << 20
    flash, ram = too_large("cortex-m7", weights, arena, quantised=False)
    assert (
        "weights take 18,500,000 bytes, 16,402,848 more than the flash of any cortex-m7"
        " known here (stm32h7a3 has 2,097,152, stm32f746 has 1,048,576)"
    ) in flash
    assert "narrower network, --memory sram=1M,qspi=32M uses external" in flash
    assert "take 3,145,728 bytes, 1,933,312 more than the RAM of any cortex-m7" in ram
    assert "--quantize int8 takes about a quarter of it, --memory sdram=4M" in ram
    assert too_large("cortex-m7", 2 << 20, 1184 << 10, quantised=False) == []
    [flash] = too_large("cortex-m0plus", 600_000, 100_000, quantised=True)
    assert "of any cortex-m0plus known here (stm32g0b1 has 524" in flash
    assert "int8" not in flash
    [flash] = too_large("cortex-m55", 3 << 20, 1, quantised=True)
    assert "1,048,576 more than the flash of any part known here (stm32l4r5" in flash


def test_a_network_that_no_part_can_hold_is_built_with_a_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = np.random.Generator(np.random.PCG64(5)).normal(0, 0.1, (1000, 750))
    node = helper.make_node("MatMul", ["x", "w"], ["y"], "dense")
    proto = small([node], {"w": weights.astype(np.float32)}, [1, 1000])
    model = tmp_path / "dense.onnx"
    model.write_bytes(proto.SerializeToString())
    output = str(tmp_path / "out")
    asked = ["--model", str(model), "--target", "cortex-m7", "--output", output]
    assert build([*asked, "--json"]) == 0
    [line] = json.loads(capsys.readouterr().out)["warnings"]
    assert re.match(
        "the weights take 3,0.* bytes, 9.* more than the flash of any", line
    )
    made = open_bundle(tmp_path / "out")
    assert f"\nwarning  {line}\n" in _table(made, str(model), [line])
    limited = parser().parse_args([*asked, "--flash-limit", "4MB"])
    assert _warnings(made.manifest, limited) == []


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ("--part stm32f746 --target cortex-m4", "has a cortex-m7; build with"),
        ("--part none --target cortex-m4", "--part none: not known; there are"),
        ("--part stm32f746 --memory sram=1K --target cortex-m7", "both say the memories"),
        ("--memory sram=1K --target native", "--memory: is for microcontrollers"),
        ("--part stm32f746 --target native", "--part: is for microcontrollers"),
        ("--memory disk=1K --target cortex-m7", "a memory's name begins with"),
    ],
)  # fmt: skip
def test_options_are_refused_in_one_line(options: str, why: str) -> None:
    with pytest.raises(UserError) as caught:
        asked = request(parser().parse_args(options.split()))
        driver.build(asked, Progress(quiet=True))
    assert re.search(why, str(caught.value))
