"""The meter's cores issue what Arm's guides and measurements say: the table that the corrections of cycles.py come from.

Cycles an instruction, by throughput. Cortex-A72: Arm's Cortex-A72 Software Optimization Guide (UAN 0016A), 3.12 to 3.17,
and what OSACA (github.com/RRZE-HPC/OSACA, commit 2cb454e, a72.yml) measured. Cortex-A76: Neoverse N1's guide
(PJDOC-466751330-9707), as GCC (neoverse-n1.md) and OSACA (n1.yml) have it. Cortex-A53, which has no guide: GCC's
cortex-a53.md (by Arm) and ncnn's arm-a53-a55-dual-issue.md.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

from netship.meter.counting import Block
from netship.meter.cycles import Costs, Trace

OLDEST = ("cortex-a53", "cortex-a72", "cortex-a76")
# Of these.
THROUGHPUT = {
    "fmla v0.4s, v1.4s, v2.4s": (1, 1, 0.5),
    "fmla v0.4s, v1.4s, v2.s[1]": (1, 1, 0.5),
    "fmul v0.4s, v1.4s, v2.4s": (1, 1, 0.5),
    "fadd v0.4s, v1.4s, v2.4s": (1, 1, 0.5),
    "fmax v0.4s, v1.4s, v2.4s": (1, 1, 0.5),
    "smlal v0.4s, v1.4h, v2.4h": (1, 1, 1),
    "smull v0.8h, v1.8b, v2.8b": (1, 1, 1),
    "sadalp v0.4s, v1.8h": (1, 1, 1),
    "dup v0.4s, v1.s[0]": (1, 0.5, 0.5),
    "ldr q0, [x0]": (2, 1, 0.5),
    "ldr d0, [x0]": (1, 1, 0.5),
    "ldp q0, q1, [x0]": (4, 2, 1),
    "ld1 {v0.4s, v1.4s}, [x0]": (4, 2, 1),
    "ld1r {v0.4s}, [x0]": (1, 1, 0.5),
    "str q0, [x0]": (1, 2, 1),
    "stp q0, q1, [x0]": (1, 4, 1),
    "ldr x0, [x1]": (1, 1, 0.5),
    "add x0, x1, x2": (0.5, 0.5, 1 / 3),
}
ONLY_A76 = {"sdot v0.4s, v1.16b, v2.16b": 0.5}
CASES = [
    (cpu, text, expected)
    for text, row in THROUGHPUT.items()
    for cpu, expected in zip(OLDEST, row, strict=True)
] + [("cortex-a76", text, expected) for text, expected in ONLY_A76.items()]


@pytest.fixture(autouse=True, scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


def assembled(*lines: str) -> bytes:
    package = find_spec("llvm")
    assert package and package.submodule_search_locations
    tool = Path(package.submodule_search_locations[0], "bin", "llvm-mc")
    said = subprocess.run(
        [tool, "--triple=aarch64", "-mattr=+all", "-show-encoding"],
        input="\n".join(lines) + "\n",
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    found = re.findall(r"encoding: \[(.*?)\]", said)
    assert len(found) == len(lines)
    return bytes(int(byte, 16) for word in found for byte in word.split(","))


def cost(cpu: str, *lines: str, loops: bool = False) -> float:
    costs = Costs(cpu)
    [cycles] = costs.of([Trace((Block(0, assembled(*lines), 1),), 1, loops)])
    costs.close()
    return cycles


@pytest.mark.parametrize("cpu, text, expected", CASES)
def test_an_instruction_has_its_published_throughput(
    cpu: str, text: str, expected: float
) -> None:
    assert cost(cpu, text) == pytest.approx(expected, abs=0.01)


@pytest.mark.parametrize("cpu, expected", [("cortex-a72", 3), ("cortex-a76", 2)])
def test_a_sum_waits_for_its_own_additions_alone(cpu: str, expected: int) -> None:
    one = "fmla v0.4s, v30.4s, v31.4s"
    assert cost(cpu, one, loops=True) == pytest.approx(expected, rel=0.02)
    assert cost(cpu, one, one, loops=True) == pytest.approx(2 * expected, rel=0.02)


def test_cortex_a76_dispatches_loads_beside_multiply_adds() -> None:
    # LLVM's Neoverse N1 by itself has it take three cycles: three micro-operations each, two of them a load's.
    work = [f"ldr q{i}, [x{i}]" for i in (20, 21, 22)]
    work += [f"fmla v{i}.4s, v30.4s, v31.4s" for i in range(4)]
    assert cost("cortex-a76", *work, loops=True) == pytest.approx(2, rel=0.05)


def test_no_core_takes_more_instructions_than_it_decodes() -> None:
    two_units = ["add x3, x4, x5", "add x6, x4, x5", "ldr x1, [x2]"]
    three_units = [*two_units, "fadd v0.2s, v1.2s, v2.2s"]
    assert cost("cortex-a53", *two_units) == pytest.approx(3 / 2)
    assert cost("cortex-a72", *three_units) == pytest.approx(4 / 3)
    assert cost("cortex-a76", *three_units, "ldr x7, [x8]") == pytest.approx(5 / 4)
