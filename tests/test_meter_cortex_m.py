"""The meter on Cortex-M: exact cycles of short sequences, steps that sum to the whole, refusals, the page.

Longer than 450 lines: the cores' rules, the parts and the command share an assembler and the projects.
"""

from __future__ import annotations

import csv
import json
import re
import struct
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import cast

import pytest
from conftest import ROOT, run, succeed
from cortex_m_projects import Projects, small_networks

from netship.bench.cmsis_nn import COMMIT, NETWORKS
from netship.bench.microcontrollers import COLUMNS, PUBLISHED, to_csv
from netship.bundle.golden import read_golden
from netship.bundle.store import Bundle
from netship.devices.microcontroller.parts import PARTS, Cache, Part, Sizes, part
from netship.devices.microcontroller.session import open_firmware
from netship.meter import firmware_report, thumb_cycles
from netship.meter.__main__ import main
from netship.meter.counting import CountingError
from netship.meter.firmware import Places, measure_project
from netship.meter.thumb import MISSES, Block, is_mark, read_steps, run_llvm, split
from netship.runtime_demo import result_files
from netship.targets.errors import UserError
from netship.targets.escapes import ending


def assembled(text: str, cpu: str) -> bytes:
    """The machine code of instructions that semicolons separate."""
    model = thumb_cycles.core(cpu)
    options = [f"--triple={model.triple}", f"-mcpu={model.cpu}", "-show-encoding"]
    shown = "\n".join(run_llvm("llvm-mc", options, text.replace(";", "\n") + "\n"))
    codes = re.findall(r"encoding: \[(.*)\]", shown)
    assert len(codes) == text.count(";") + 1, shown
    return bytes(int(each, 16) for code in codes for each in code.split(","))


def cycles(text: str, cpu: str, jumps: int = 0, address: int = 0x1000) -> float:
    """Of one run of instructions; ``jumps`` 1 where the last branch is taken."""
    code = assembled(text, cpu)
    block = Block(address, code, 1, jumps, (0,) * MISSES)
    return thumb_cycles.costs([block], cpu)[0]


@pytest.mark.parametrize(
    ("cpu", "text", "expected"),
    [
        # 100166_0001, 3.3.1: LDR 2; N of them N + 1; MUL, MLA, SMULL, SMLAD 1; LDM and PUSH 1 + N.
        ("cortex-m4", "ldr r0, [r4]; nop", 3),
        ("cortex-m4", "ldr r0, [r4]; ldr r1, [r4, #4]; ldr r2, [r4, #8]; nop", 5),
        ("cortex-m4", "ldr r0, [r4]; ldr r1, [r0]; nop", 5),
        ("cortex-m4", "ldr r0, [r4]; str r0, [r5]; nop", 3),
        ("cortex-m4", "str r0, [r5]; nop", 2),
        ("cortex-m4", "str r0, [r5, r6]; nop", 3),
        ("cortex-m4", "ldrd r0, r1, [r4]; nop", 4),
        ("cortex-m4", "push {r4, r5, r6, lr}", 5),
        ("cortex-m4", "mul r0, r1, r2; mla r3, r1, r2, r3; smull r4, r5, r1, r2", 3),
        ("cortex-m4", "smlad r0, r1, r2, r0; sxtb16 r1, r2", 2),
        ("cortex-m4", "sdiv r0, r1, r2", 7),
        ("cortex-m4", "add r4, r4, #4; ldr r0, [r4]; nop", 5),
        # ARMScheduleM4.td: VFMA 3, VDIV and VSQRT 14; a result that the next instruction needs costs one more.
        ("cortex-m4", "vfma.f32 s0, s1, s2; vfma.f32 s0, s3, s4", 6),
        ("cortex-m4", "vadd.f32 s0, s1, s2; vmul.f32 s3, s0, s0", 3),
        ("cortex-m4", "vdiv.f32 s0, s1, s2; vsqrt.f32 s3, s4", 28),
        ("cortex-m4", "vldr s0, [r0]; nop", 3),
        # DDI 0337H, table 3.1.
        ("cortex-m3", "mul r0, r1, r2; mla r3, r1, r2, r3", 3),
        ("cortex-m3", "smull r0, r1, r2, r3; smlal r0, r1, r2, r3", 9.5),
        # DDI 0484C, table 3.1.
        ("cortex-m0plus", "ldr r0, [r4]; ldr r1, [r4, #4]; str r0, [r5]", 6),
        ("cortex-m0plus", "push {r4, r5, lr}; muls r0, r1, r0", 5),
        ("cortex-m33", "ldr r0, [r4]; ldr r1, [r4, #4]; mul r2, r3, r3", 3),
        ("cortex-m33", "ldr r0, [r4]; add.w r1, r0, r2", 3),
        ("cortex-m33", "adds r0, #1; ldr r1, [r4]; muls r2, r3, r2", 2),
        # github.com/jnk0le/random: pairs; two multiplications never; a factor waits two cycles for a load.
        ("cortex-m7", "add.w r0, r0, #1; add.w r1, r1, #1", 1),
        ("cortex-m7", "mul r0, r4, r5; mul r1, r4, r5", 2),
        ("cortex-m7", "ldr r0, [r4]; ldr r1, [r5]", 1),
        ("cortex-m7", "ldr.w r0, [r4]; mul r1, r0, r5", 2),
        ("cortex-m7", "smlad r0, r4, r5, r0; smlad r0, r6, r7, r0", 2),
        ("cortex-m7", "uxtb16 r0, r4; uxtb16 r1, r5", 2),
        ("cortex-m7", "vfma.f32 s0, s1, s2", 3),
        ("cortex-m7", "push {r4, r5, r6, lr}", 2),
        # ARMScheduleM55.td: two beats each, which overlap in different units.
        ("cortex-m55", "vldrb.u8 q0, [r0]; vldrb.u8 q1, [r1]", 4),
        ("cortex-m55", "vldrb.u8 q0, [r0]; vadd.i8 q1, q2, q3", 2),
    ],
)  # fmt: skip
def test_a_sequence_takes_exactly_the_cycles_of_its_core_s_source(
    cpu: str, text: str, expected: float
) -> None:
    assert cycles(text, cpu) == expected


@pytest.mark.parametrize(
    ("cpu", "text", "jumps", "expected"),
    [
        ("cortex-m4", "subs r0, #1; bne #-6", 0, 2),
        ("cortex-m4", "subs r0, #1; bne #-6", 1, 3),
        ("cortex-m4", "bx lr", 1, 3),
        ("cortex-m4", "pop {r4, pc}", 1, 5),
        ("cortex-m0plus", "subs r0, #1; bne #-6", 1, 3),
        ("cortex-m0plus", "bl #100", 1, 3),
        ("cortex-m0plus", "pop {r4, pc}", 1, 5),
        # Both ways once in two runs would be one misprediction; one way alone is none.
        ("cortex-m7", "add.w r0, r0, #1; bne #-6", 1, 1),
        ("cortex-m55", "vadd.i8 q1, q2, q3; bne #-8", 1, 4),
    ],
)
def test_a_taken_branch_refills_the_pipeline(
    cpu: str, text: str, jumps: int, expected: float
) -> None:
    assert cycles(text, cpu, jumps) == expected


def test_a_branch_to_a_wide_instruction_that_is_not_aligned_takes_one_more() -> None:
    loop = "mul r0, r0, r2; subs r1, #1; bne #-10"
    aligned = cycles(loop, "cortex-m4", jumps=1, address=0x1000)
    assert cycles(loop, "cortex-m4", jumps=1, address=0x1002) == aligned + 1


def test_a_branch_that_goes_both_ways_is_mispredicted_on_its_rarer_one() -> None:
    code = assembled("add.w r0, r0, #1; bne #-6", "cortex-m7")
    block = Block(0, code, 100, 97, (0,) * MISSES)
    assert thumb_cycles.costs([block], "cortex-m7") == [100 + 3 * 8]


def test_an_instruction_that_the_core_lacks_is_refused() -> None:
    code = assembled("smlad r0, r1, r2, r0", "cortex-m4")
    with pytest.raises(UserError, match="cortex-m3 has no instruction"):
        thumb_cycles.costs([Block(0, code, 1, 0, (0,) * MISSES)], "cortex-m3")


def test_marks_are_no_instructions(tmp_path: Path) -> None:
    words = struct.pack("<4H", 0xF3AF, 0x80C0, 0xF3AF, 0x80BF)
    assert [is_mark(word) for word in split(words)] == [True, True]
    for other in ("nop.w", "hint.w #16", "dbg #3"):
        assert not is_mark(assembled(other, "cortex-m4"))
    file = tmp_path / "blocks"
    file.write_text(
        "step 0\n10 4 2 1 0 0 3 0 0 aff3c080\n10 4 1 0 0 0 1 0 0 aff3c080\nend\n"
    )
    assert read_steps(file, 1) == [[Block(16, words[:4], 3, 1, (0, 0, 4, 0, 0))]]
    with pytest.raises(CountingError, match="1 of 2 steps ran"):
        read_steps(file, 2)
    file.write_text("step 0\n")
    with pytest.raises(CountingError, match="not written whole"):
        read_steps(file, 1)


# Flash and caches


def test_a_line_costs_what_the_model_says() -> None:
    chosen = part("stm32l4r5")
    jump, following = chosen.fetch_cycles()
    assert jump == 5
    assert following == pytest.approx(6 - 8 / 2.4)
    assert chosen.read_cycles("flash") == 5
    assert chosen.read_cycles("external") == 28 + 4 * 8
    # Two reads of flash a line.
    assert part("stm32h7a3").fetch_cycles() == pytest.approx([12 + 13 - 16 / 2.4] * 2)
    assert Cache(16 << 10, 4, 32).option == "128:4:5"


@pytest.mark.parametrize("name", PARTS)
def test_a_part_is_one_of_a_core_that_is_modelled(name: str) -> None:
    each = PARTS[name]
    assert each.cpu in thumb_cycles.CORES and each.source
    assert each.sizes.flash > each.sizes.ram > each.sizes.dtcm and each.sizes.source
    assert bool(each.sizes.dtcm) == (each.cpu == "cortex-m7") == bool(each.sizes.itcm)
    for cache in (each.fetch, each.read):
        if cache is not None:
            assert cache.bytes % (cache.ways * cache.line) == 0
            assert cache.line >= each.width or each.width % cache.line == 0


# Whole projects


@pytest.fixture(scope="module")
def projects(tmp_path_factory: pytest.TempPathFactory) -> Projects:
    networks = small_networks(tmp_path_factory.mktemp("quantised"))
    return Projects(networks, tmp_path_factory.mktemp("projects"))


@pytest.fixture(scope="module")
def bundle(projects: Projects) -> Bundle:
    return projects["residuals", "cortex-m4"]


def _sums(steps: Iterable[dict[str, float]]) -> dict[str, float]:
    keys = (
        "macs",
        "instructions",
        "core_cycles",
        "code_cycles",
        "weight_cycles",
        "cycles",
    )
    return {key: sum(step[key] for step in steps) for key in keys}


def test_steps_sum_to_the_whole_and_runs_agree(bundle: Bundle) -> None:
    options = (bundle.path, "--cpu", "cortex-m4", "--part", "stm32l4r5", "--json")
    first = json.loads(succeed("meter", *options))
    assert first == json.loads(succeed("meter", *options))
    assert {
        key: pytest.approx(value) for key, value in _sums(first["steps"]).items()
    } == {key: first[key] for key in _sums(first["steps"])}
    assert set(first) == {
        *("cpu", "part", "megahertz", "origin", "core_model", "memory_model", "code"),
        *(
            "weights",
            "macs",
            "instructions",
            "core_cycles",
            "code_cycles",
            "weight_cycles",
        ),
        *("cycles", "milliseconds", "steps", "meter", "origins", "fits", "memories"),
    }
    assert (first["origin"], first["megahertz"]) == ("estimated", 120)
    origins = first["origins"]
    assert origins.pop("instructions") == "emulated"
    assert len(origins) == 5 and set(origins.values()) == {"estimated"}
    assert first["cycles"] > first["core_cycles"] > first["instructions"] > 0
    assert first["milliseconds"] == pytest.approx(first["cycles"] / 120e3)
    names = [group.layer for group in bundle.manifest.lowering.groups]
    assert [step["name"] for step in first["steps"]] == names


def test_the_instructions_are_those_of_the_emulator_s_clock(bundle: Bundle) -> None:
    [golden] = read_golden(bundle)[0].inputs
    with open_firmware(bundle) as session:
        session.run(golden)
        clock = session.figures().instructions
    counted = measure_project(bundle, "cortex-m4").total.instructions
    # SysTick counts in steps of 40, and from before the call on.
    assert 0 <= clock - counted < 250


@pytest.mark.parametrize("cpu", ["cortex-m55", "cortex-m85"])
def test_a_hardware_loop_ends_at_no_cost(cpu: str) -> None:
    body = "ldr r3, [r2], #4; str r3, [r1], #4"
    assert cycles(f"{body}; le lr, #-12", cpu, jumps=1) == cycles(body, cpu)
    assert cycles("le lr, #-4", cpu, jumps=1) == 0


@pytest.mark.parametrize("cpu", thumb_cycles.CORES)
def test_every_core_has_an_estimate(projects: Projects, cpu: str) -> None:
    target = "cortex-m4" if cpu in ("cortex-m0plus", "cortex-m3") else cpu
    found = measure_project(projects["residuals", target], cpu)
    assert found.megahertz is None
    assert found.total.cycles == found.total.core_cycles > 0
    # Two instructions a cycle is what the widest of them does.
    assert 0.5 <= found.total.cycles / found.total.instructions < 2


def test_places_decide_what_waits(projects: Projects) -> None:
    bundle = projects["residuals", "cortex-m7"]
    flash, tcm, external = (
        measure_project(bundle, "cortex-m7", "stm32f746", places).total
        for places in (Places(), Places("tcm", "tcm"), Places("flash", "external"))
    )
    assert tcm.code_cycles == tcm.weight_cycles == 0
    assert external.weight_cycles > flash.weight_cycles > 0
    assert external.code_cycles == flash.code_cycles > 0
    assert flash.core_cycles == tcm.core_cycles == external.core_cycles


@pytest.fixture
def small_part(monkeypatch: pytest.MonkeyPatch) -> str:
    """With 1 KiB of each memory; its DTCM is a part of its RAM."""
    sizes = Sizes("none", flash=1, ram=1, itcm=1, dtcm=1, dtcm_in_ram=True)
    small = replace(PARTS["stm32f746"], sizes=sizes)
    monkeypatch.setitem(cast(dict[str, Part], PARTS), "small", small)
    return "small"


def test_a_part_that_cannot_hold_the_network_is_named_everywhere(
    projects: Projects, small_part: str, tmp_path: Path
) -> None:
    bundle = projects["residuals", "cortex-m7"]
    interface = bundle.manifest.firmware
    assert interface
    inference = measure_project(bundle, "cortex-m7", small_part)
    flash, ram = inference.memories
    assert flash.needs > interface.weights_bytes and flash.lacks == flash.needs - 1024
    assert ram.needs >= interface.arena_bytes + interface.output_bytes
    line = f"does not fit small: needs {flash.needs:,} bytes of flash, has 1,024 ({flash.lacks:,} too few)"
    assert line in firmware_report.table(inference)
    firmware_report.write_page(inference, bundle.path, tmp_path / "page.html")
    assert line in (tmp_path / "page.html").read_text()
    said = firmware_report.to_json(inference)
    assert (said["fits"], said["milliseconds"]) == (False, pytest.approx(inference.total.cycles / 216e3))  # fmt: skip
    assert cast(list[dict[str, object]], said["memories"])[0] == {
        "name": "flash",
        "needs": flash.needs,
        "has": 1024,
        "lacks": flash.lacks,
    }
    external = measure_project(
        bundle, "cortex-m7", small_part, Places("flash", "external")
    )
    assert external.memories[0].needs == flash.needs - interface.weights_bytes
    fitting = measure_project(bundle, "cortex-m7", "stm32f746")
    assert fitting.fits and "fit" not in firmware_report.table(fitting)
    assert measure_project(bundle, "cortex-m7").fits is None


def test_more_than_the_tightly_coupled_memory_is_refused_in_one_line(
    projects: Projects, small_part: str
) -> None:
    bundle = projects["residuals", "cortex-m7"]
    for places, reason in (
        (Places("tcm", "flash"), "--code tcm: the code needs "),
        (Places("flash", "tcm"), "--weights tcm: the weights need "),
    ):
        with pytest.raises(UserError, match=reason) as caught:
            measure_project(bundle, "cortex-m7", small_part, places)
        assert "has 1,024; leave it out" in str(caught.value)
        assert "\n" not in str(caught.value)


def test_a_comparison_takes_the_json_of_a_c_project(
    bundle: Bundle, tmp_path: Path
) -> None:
    file = tmp_path / "vww.json"
    options = ([bundle.path, "--cpu", "cortex-m4", "--json"], ["--part", "stm32l4r5"])
    file.write_text(succeed("meter", *options[0], *options[1]))
    said = json.loads(file.read_text())
    (found,) = result_files.read(file)
    assert found.about == "python -m meter, cortex-m4, stm32l4r5"
    figures = {n: (f.value, str(f.origin)) for n, f in found.facts.items()}
    assert figures == {
        "instructions": (said["instructions"], "emulated"),
        "cycles": (said["cycles"], "estimated"),
        "latency": (said["milliseconds"], "estimated"),
    }
    assert "stm32l4r5, code in flash" in found.facts["latency"].where
    file.write_text(json.dumps(said | {"fits": False}))
    assert result_files.read(file)[0].about.endswith(", does not fit")
    file.write_text(succeed("meter", *options[0]))
    assert set(result_files.read(file)[0].facts) == {"instructions", "cycles"}


def test_the_page_and_the_table_have_every_step(bundle: Bundle, tmp_path: Path) -> None:
    page = tmp_path / "meter.html"
    options = ("--cpu", "cortex-m4", "--part", "stm32l4r5", "--report", page)
    shown = succeed("meter", bundle.path, *options)
    text = page.read_text()
    names = {group.layer for group in bundle.manifest.lowering.groups}
    assert (
        "estimated" in shown and "estimated" in text and '<table class="steps">' in text
    )
    assert all(name[-40:] in shown and name[:40] in text for name in names)
    assert all(ending(name, 60) in shown and ending(name, 60) in text for name in names)
    assert "zero wait states" in text and "0 waits" in shown
    assert "weights w.: cycles that" in shown and "a cycle: MACs a cycle" in shown


def test_without_a_part_no_column_says_that_nothing_waits(
    bundle: Bundle, tmp_path: Path
) -> None:
    page = tmp_path / "meter.html"
    shown = succeed("meter", bundle.path, "--cpu", "cortex-m4", "--report", page)
    for text in (shown, page.read_text()):
        assert "not estimated; --part stm32l4r5" in text
        assert "as if memory never waited" in text
    assert "code waits" not in shown and "wait states" not in page.read_text()


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--cpu", "cortex-m4", "--part", "stm32x1"], "--part stm32x1: not known; there are stm32l4r5"),
        (["--cpu", "cortex-m4", "--part", "stm32u575"], "has a cortex-m33, not a cortex-m4; parts with one: stm32l4r5"),
        (["--cpu", "cortex-m7"], "is for cortex-m4; build it with --target cortex-m7"),
        (["--cpu", "cortex-m23"], "no model of this core; there are cortex-a53"),
        (["--cpu", "cortex-m4", "--weights", "tcm"], "need --part"),
        (["--cpu", "cortex-a72"], "is a C project for cortex-m4; give --cpu cortex-m4"),
        (["--cpu", "cortex-m4", "--part", "stm32l4r5", "--code", "tcm"], "--code tcm: stm32l4r5 has no ITCM"),
        (["--cpu", "cortex-m4", "--part", "stm32l4r5", "--weights", "tcm"], "--weights tcm: stm32l4r5 has no DTCM"),
        (["--cpu", "cortex-a72", "--part", "stm32l4r5"], "--part: is for microcontrollers"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_in_one_line(
    bundle: Bundle, options: list[str], reason: str
) -> None:
    with pytest.raises(UserError, match=re.escape(reason)) as caught:
        main([str(bundle.path), *options])
    assert "\n" not in str(caught.value)


def test_float32_is_refused_for_a_core_without_an_fpu(projects: Projects) -> None:
    advice = "has no FPU, and .* is float32; build it with --target {} --quantize int8"
    for built, cpu in (("cortex-m4", "cortex-m3"), ("cortex-m7", "cortex-m0plus")):
        with pytest.raises(UserError, match=advice.format(cpu)):
            measure_project(projects["float-residuals", built], cpu)


def test_a_folder_that_is_no_project_is_refused_in_one_line(tmp_path: Path) -> None:
    result = run("meter", tmp_path, "--cpu", "cortex-m4")
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert str(tmp_path) in result.stderr and result.stderr.count("\n") == 1


# CMSIS-NN


@pytest.mark.parametrize(
    ("network", "macs"),
    [("vww", 7_489_664), ("ic", 12_501_632), ("kws", 2_656_768), ("ad", 264_192)],
)
def test_the_calls_have_the_networks_multiply_adds(network: str, macs: int) -> None:
    assert sum(layer.macs for layer in NETWORKS[network]) == macs


def test_the_stored_counts_are_within_what_the_page_says_of_published_times() -> None:
    rows = list(csv.DictReader((ROOT / "bench/cmsis_nn_counts.csv").open()))
    assert tuple(rows[0]) == COLUMNS
    assert {row["commit"] for row in rows} == {COMMIT}
    differences = {}
    for chosen, networks in PUBLISHED.items():
        for network, published in networks.items():
            own = [r for r in rows if (r["part"], r["network"]) == (chosen, network)]
            assert [row["call"] for row in own] == [x.call for x in NETWORKS[network]]
            total = sum(
                int(row[key])
                for row in own
                for key in ("core_cycles", "code_cycles", "weight_cycles")
            )
            differences[chosen, network] = total / published / 1e6 - 1
    beyond = {key for key, each in differences.items() if abs(each) > 0.2}
    assert beyond == {("nrf5340", "ic")}
    assert max(differences.values()) < 0


def test_counts_are_written_with_what_they_were_made_with(bundle: Bundle) -> None:
    inference = measure_project(bundle, "cortex-m4", "stm32l4r5")
    first, *rows = to_csv({"net": inference}, "stm32l4r5").splitlines()
    assert first == ",".join(COLUMNS) and len(rows) == len(inference.steps)
    assert rows[0].startswith(f"{COMMIT},arm-none-eabi-gcc ")


def test_another_checkout_is_refused_in_one_line(tmp_path: Path) -> None:
    result = run("bench", "microcontrollers", "--cmsis-nn", tmp_path)
    assert result.returncode == 2
    assert f"is no checkout of CMSIS-NN at {COMMIT[:12]}" in result.stderr
    assert result.stderr.count("\n") == 1
