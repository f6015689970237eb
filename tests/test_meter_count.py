"""The meter's counts are exact, its traces are the loops, and its parts sum to the whole."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import run, succeed

from netship.meter import cycles
from netship.meter.__main__ import table
from netship.meter.candidate import CandidateMeter
from netship.meter.counting import Block, Cache, count, find_qemu, subtract
from netship.meter.cycles import Costs, Trace, traces
from netship.meter.operators import Metered, Operator
from netship.targets.errors import UserError
from netship.targets.presets import resolve
from netship.targets.toolchain import compile_object, run_zig

NOP, BEGIN, END = 0xD503201F, 0xD5032C1F, 0xD5032C3F


def program(folder: Path, body: str, prelude: str = "") -> Path:
    """A static aarch64 program whose main() is ``body``."""
    source, made = folder / "program.c", folder / "program"
    source.write_text(
        f"#include <string.h>\n{prelude}\nint main(int argc, char **argv) {{\n{body}\n}}\n"
    )
    run_zig("cc", made, "-target", "aarch64-linux-musl", "-static", "-O1", source)
    return made


def loop(rounds: int) -> str:
    """Three instructions a round, between the marks."""
    return f"""
  unsigned long n = {rounds};
  __asm__ volatile("hint #0x60\\n b 1f\\n1: subs %0, %0, #1\\n nop\\n b.ne 1b\\n hint #0x61" : "+r"(n));
  return 0;"""


def total(blocks: list[Block]) -> int:
    return sum(block.instructions * block.executions for block in blocks)


def test_what_lies_between_the_marks_is_counted_to_the_instruction(
    tmp_path: Path,
) -> None:
    made = program(tmp_path, loop(1000))
    first, _ = count([str(made)], cpu="cortex-a72")
    again, _ = count([str(made)], cpu="cortex-a72")
    assert first == again
    # The loop, its entry, and the instructions up to the end of the marks' own blocks.
    assert 3000 <= total(first) <= 3004


def test_without_marks_runs_are_subtracted(tmp_path: Path) -> None:
    made = program(
        tmp_path, "for (volatile int i = 0; i < 100 * argc; i++) {} return 0;"
    )
    shorter, _ = count([str(made)], cpu="cortex-a53")
    longer, _ = count([str(made), "x", "x"], cpu="cortex-a53")
    rest = subtract(longer, shorter)
    assert 200 in {block.executions for block in rest}


def test_the_caches_miss_what_they_cannot_hold(tmp_path: Path) -> None:
    body = """
  for (int round = 0; round < 2; round++) {
    __asm__ volatile("hint #0x60");
    for (unsigned i = 0; i < sizeof data; i += 64) *(volatile char *)(data + i) = 1;
    __asm__ volatile("hint #0x61");
  }
  return 0;"""
    made = program(
        tmp_path, body, "static char data[65536] __attribute__((aligned(64)));"
    )
    caches = [Cache(32 << 10, 2), Cache(1 << 20, 16)]
    blocks, _ = count([str(made)], cpu="cortex-a72", caches=caches)
    misses = np.sum([block.misses for block in blocks], axis=0)
    # 64 KB are 1024 lines: the second round misses them all in 32 KB, and none in 1 MB.
    assert 1020 <= misses[0] <= 1030
    assert misses[1] <= 4


def block(address: int, words: list[int], executions: int) -> Block:
    return Block(address, struct.pack(f"<{len(words)}I", *words), executions)


def back(words: int) -> int:
    """B.NE to so many instructions before itself."""
    return 0x54000001 | ((-words & 0x7FFFF) << 5)


def test_blocks_on_end_with_a_branch_back_are_one_loop() -> None:
    head = block(0x1000, [NOP] * 4, 500)
    tail = block(0x1010, [NOP, back(5)], 500)
    after = block(0x1018, [NOP], 1)
    found = traces([head, tail, after])
    loop = head._replace(code=head.code + tail.code)
    assert found == [Trace((loop,), 500, True), Trace((after,), 1, False)]


def test_an_outer_loop_does_not_swallow_the_inner_one() -> None:
    inner = block(0x1004, [NOP, back(1)], 900)
    outer = block(0x100C, [NOP, back(4)], 90)
    assert Trace((inner,), 900, True) in traces(
        [block(0x1000, [NOP], 90), inner, outer]
    )
    assert (
        sum(trace.executions * len(trace.blocks) for trace in traces([inner, outer]))
        == 990
    )


@pytest.mark.parametrize("cpu, cycles_each", [("cortex-a72", 1.0), ("cortex-a76", 0.5)])
def test_multiply_adds_cost_what_the_optimisation_guides_say(
    cpu: str, cycles_each: float
) -> None:
    # FMLA Vd.4S, V30.4S, V31.4S on twenty accumulators: throughput, not latency, decides.
    words = [0x4E3FCFC0 | d for d in range(20)]
    costs = Costs(cpu)
    [loop_cost] = costs.of([Trace((block(0, [*words, back(20)], 1),), 1, True)])
    costs.close()
    assert loop_cost == pytest.approx(20 * cycles_each, rel=0.15)


def test_costs_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    trace = Trace((block(0, [NOP] * 7 + [back(7)], 1),), 1, True)
    first = Costs("cortex-a72")
    known = first.of([trace])
    first.close()
    monkeypatch.setattr(cycles, "_simulate", lambda *_: pytest.fail("simulated again"))
    second = Costs("cortex-a72")
    assert second.of([trace]) == known
    second.close()


KERNEL = """
#include <stdint.h>
typedef struct { float *data; int32_t device[2]; int32_t rank; uint8_t code, bits; uint16_t lanes; int64_t *shape; } T;
int default_function(T **values, int *codes, int count, void *r, int *rc, void *h) {
  BODY
}
"""
ADD = "for (int i = 0; i < values[1]->shape[0]; i++) values[1]->data[i] = values[0]->data[i] + 1; return 0;"


def kernel(folder: Path, body: str) -> Path:
    source, made = folder / "kernel.c", folder / "kernel.o"
    source.write_text(KERNEL.replace("BODY", body))
    compile_object(source, made, resolve("arm-cortex-a72"))
    return made


def test_a_candidate_is_run_and_costed_the_same_every_time(tmp_path: Path) -> None:
    made = kernel(tmp_path, ADD)
    with CandidateMeter("cortex-a72") as meter:
        costs = {meter.measure(made, [(512,), (512,)]) for _ in range(4)}
        x = np.arange(512, dtype=np.float32)
        answer = meter.run(made, [x, np.zeros_like(x)])
    assert len(costs) == 1
    np.testing.assert_array_equal(answer, x + 1)


@pytest.mark.parametrize(
    "body, reason",
    [
        ("*(volatile int *)8 = 1; return 0;", "failed under QEMU"),
        ('__asm__ volatile(".inst 0x4e809400"); return 0;', "does not have"),
        ("return 1;", "exit code 3"),
    ],
    ids=["crash", "dot product", "refusal"],
)
def test_a_bad_candidate_is_one_error(tmp_path: Path, body: str, reason: str) -> None:
    made = kernel(tmp_path, body)
    with CandidateMeter("cortex-a72") as meter, pytest.raises(UserError, match=reason):
        meter.measure(made, [(4,), (4,)])


def test_an_endless_candidate_is_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("netship.meter.candidate._SECONDS", 1.0)
    made = kernel(tmp_path, 'for (;;) __asm__ volatile("");')
    with (
        CandidateMeter("cortex-a72") as meter,
        pytest.raises(UserError, match="no end within"),
    ):
        meter.measure(made, [(4,), (4,)])


def fake_qemu(folder: Path, version: str) -> str:
    tool = folder / "qemu-aarch64"
    tool.write_text(f"#!/bin/sh\necho qemu-aarch64 version {version}\n")
    tool.chmod(0o755)
    return str(folder)


def test_a_qemu_with_another_plugin_interface_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", fake_qemu(tmp_path, "9.2.0"))
    with pytest.raises(
        UserError, match=r"QEMU 9\.2 has another plugin API.*4\.2 to 8\.1"
    ):
        find_qemu()
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    with pytest.raises(UserError, match="apt install qemu-user"):
        find_qemu()


MODEL = "mobilenetv2-0.35-96"


@pytest.mark.slow
@pytest.mark.parametrize("format", ["bundle", "standalone"])
def test_the_operators_sum_to_the_whole(
    built: Callable[..., Path], format: str
) -> None:
    path = built(MODEL, "arm-cortex-a72", "--format", format)
    shown = [
        json.loads(succeed("meter", path, "--cpu", "cortex-a72", "--json"))
        for _ in range(2)
    ]
    first, again = shown
    assert first["instructions"] == again["instructions"]
    assert first["core_cycles"] == again["core_cycles"]
    assert first["memory_cycles"] == again["memory_cycles"]
    for figure in ("instructions", "core_cycles", "memory_cycles", "macs"):
        assert sum(each[figure] for each in first["operators"]) == pytest.approx(
            first[figure]
        )
    assert first["origin"] == "estimated"
    # All of the kernels' work is found by its symbols.
    outside = first["operators"][-1]
    assert outside["name"] == "outside the kernels"
    assert outside["instructions"] < 0.05 * first["instructions"]
    heavy = [each for each in first["operators"] if each["macs"]]
    assert len(heavy) >= 20
    assert (first["numbers"], first["peak_macs_per_cycle"]) == ("float32", 4)
    assert all(0 < each["macs_per_cycle"] <= 4 for each in heavy)
    assert first["macs"] == sum(each["macs"] for each in heavy) > 10e6


@pytest.mark.slow
def test_the_page_names_every_layer(built: Callable[..., Path], tmp_path: Path) -> None:
    path = built(MODEL, "arm-cortex-a72", "--format", "bundle")
    page = tmp_path / "meter.html"
    shown = succeed("meter", path, "--cpu", "cortex-a76", "--report", page)
    assert "neoverse-n1" in shown and "estimated" in shown
    text = page.read_text()
    manifest = json.loads((path / "manifest.json").read_text())
    layers = {group["layer"] for group in manifest["lowering"]["groups"]} - {""}
    assert layers and all(layer in text for layer in list(layers)[:10])


def test_layers_that_share_a_kernel_are_one_row_that_says_so() -> None:
    def operator(layer: str, calls: int, cycles: float) -> Operator:
        return Operator("fused_conv_add", layer, calls, 1000, cycles, 0.0, 100, (0, 0))

    operators = (operator("a, b", 2, 30e6), operator("c", 1, 9e6), operator("", 1, 1e6))
    rows = table(Metered("cortex-a72", operators, "int8", 8), None).splitlines()[2:5]
    assert rows[0].endswith("  2 calls: a, b") and " 75.0% " in rows[0]
    assert rows[1].endswith("  c") and " 22.5% " in rows[1]
    assert rows[2].endswith("  conv add") and " 2.5% " in rows[2]


@pytest.mark.parametrize(
    "options, reason",
    [
        (
            ["--cpu", "cortex-a57"],
            "no model of this core; there are cortex-a53, cortex-a55, cortex-a72",
        ),
        (["--cpu", "cortex-m7"], "is no C project for a microcontroller"),
        (["--cpu", "cortex-a72"], "the meter takes aarch64"),
    ],
    ids=["cpu", "no C project", "machine"],
)
def test_what_cannot_be_metered_is_refused_in_one_line(
    built: Callable[..., Path], options: list[str], reason: str
) -> None:
    result = run("meter", built(MODEL), *options)
    assert result.returncode == 2
    assert reason in result.stderr and "Traceback" not in result.stderr
