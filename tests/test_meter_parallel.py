"""Several threads in the meter: tasks counted one after another, the slowest decides; code has its cost wherever it lies."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from conftest import run, succeed
from hypothesis import given
from hypothesis import strategies as st

from netship.bench.comparison import compare
from netship.meter import counting, parallel
from netship.meter.board_files import check_threads
from netship.meter.counting import Block, Cache, Part, count_parts
from netship.meter.counts import at_best, cost
from netship.meter.cycles import Trace, canonical
from netship.meter.memory import hierarchy
from netship.meter.operators import OUTSIDE
from netship.targets.errors import UserError
from netship.targets.progress import Progress
from netship.targets.toolchain import run_zig

NOP, RET = 0xD503201F, 0xD65F03C0
PI4 = hierarchy("cortex-a72")

PROGRAM = """
extern void GOMP_parallel(void (*)(void *), void *, unsigned, unsigned);
extern int omp_get_thread_num(void), omp_get_num_threads(void);
static char data[32768] __attribute__((aligned(64)));
static void task(void *rounds) {
  int thread = omp_get_thread_num(), threads = omp_get_num_threads();
  for (int i = thread; i < *(int *)rounds; i += threads) __asm__ volatile("nop");
  for (int i = 0; i < 32768; i += 64) *(volatile char *)(data + i);
}
int main(void) {
  int rounds = 100000;
  __asm__ volatile("hint #0x60" ::: "memory");
  GOMP_parallel(task, &rounds, ASKED, 0);
  __asm__ volatile("hint #0x61" ::: "memory");
  return 0;
}
"""


def instructions(blocks: Sequence[Block]) -> int:
    return sum(block.instructions * block.executions for block in blocks)


@pytest.fixture(scope="module")
def regions(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], list[Part]]:
    """The parts of a region that asks for four threads, run with so many."""
    folder = tmp_path_factory.mktemp("regions")
    source, made = folder / "program.c", folder / "program"
    source.write_text(PROGRAM)
    run_zig(
        *("cc", made, "-target", "aarch64-linux-musl", "-static", "-O1"),
        *("-DASKED=4", source, counting.SERIAL),
    )
    caches = (Cache(64 << 10, 4), Cache(1 << 20, 16))

    def counted(threads: int) -> list[Part]:
        parts, _ = count_parts(
            [str(made)], cpu="cortex-a72", caches=caches, private=1, threads=threads
        )
        return parts

    return counted


@pytest.mark.parametrize("threads", [2, 4])
def test_each_thread_has_its_share_and_the_sum_is_one_threads(
    regions: Callable[[int], list[Part]], threads: int
) -> None:
    [alone] = regions(1)
    parts = regions(threads)
    numbers = [part.thread for part in parts]
    assert numbers == [None, *range(threads), None]
    tasks = [instructions(part.blocks) for part in parts if part.thread is not None]
    # Every task reads all of the data, 512 lines of five instructions; only the rounds are divided.
    reads = 5 * 512
    assert max(tasks) - min(tasks) < 50
    assert sum(tasks) - (threads - 1) * reads == pytest.approx(
        instructions(alone.blocks), abs=200
    )
    again = regions(threads)
    assert again == parts


def test_each_core_misses_for_itself_and_the_last_level_is_all_cores(
    regions: Callable[[int], list[Part]],
) -> None:
    tasks = [part for part in regions(4) if part.thread is not None]
    first, shared = (
        [sum(block.misses[level] for block in part.blocks) for part in tasks]
        for level in (0, 1)
    )
    assert all(misses >= 512 for misses in first)
    assert shared[0] >= 512
    assert all(misses < 10 for misses in shared[1:])


class Costs:
    """A cycle an instruction."""

    def of(self, wanted: Sequence[Trace]) -> list[float]:
        return [float(len(trace.code) // 4) for trace in wanted]


def part(thread: int | None, executions: int, lines: int = 0) -> Part:
    words = [NOP, NOP, NOP, RET]
    code = struct.pack("<4I", *words)
    address = 0x1000 * (2 + (-1 if thread is None else thread))
    return Part(thread, [Block(address, code, executions, (lines, lines))])


def test_the_slowest_task_of_each_region_decides() -> None:
    parts = [
        *(part(None, 10), part(0, 100), part(1, 300), part(None, 5)),
        *(part(0, 50), part(1, 20)),
        # A region right behind another one.
        *(part(0, 1), part(1, 2)),
    ]
    found = parallel.critical(parts, Costs(), PI4)  # type: ignore[arg-type]
    assert instructions(found.blocks) == 4 * (10 + 300 + 5 + 50 + 2)
    assert found.regions == 3
    assert found.barriers == pytest.approx(3 * parallel.BARRIER_NS * PI4.clock)
    assert found.saturated == 0


def test_without_regions_nothing_is_added() -> None:
    found = parallel.critical([part(None, 7, 3)], Costs(), PI4)  # type: ignore[arg-type]
    assert (found.regions, found.barriers, found.saturated) == (0, 0, 0)
    assert found.blocks == part(None, 7, 3).blocks


def test_the_memory_serves_all_tasks_before_the_region_ends() -> None:
    tasks = [part(thread, 10, 1000) for thread in range(4)]
    found = parallel.critical(tasks, Costs(), PI4)  # type: ignore[arg-type]
    one = 1000 * sum(PI4.line_cycles)
    assert found.saturated == pytest.approx(4 * one / parallel.STREAMS - one)


@pytest.mark.parametrize("lines", [0, 100, 100_000])
def test_at_best_is_no_more_than_what_threads_take(
    lines: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    whole = [part(None, 400_000, lines)]
    one = cost(whole, "cortex-a72")
    bound = at_best(one, whole, "cortex-a72", "", 4)
    assert bound.core_cycles == pytest.approx(one.core_cycles / 4, abs=1)
    tasks = [part(thread, 100_000, lines // 4) for thread in range(4)]
    counted = cost(tasks, "cortex-a72")
    barrier = parallel.BARRIER_NS * PI4.clock
    assert bound.cycles == pytest.approx(counted.cycles - barrier, abs=2)
    # The memory serves all cores together no faster than it can.
    assert bound.memory_cycles == pytest.approx(
        lines * sum(PI4.line_cycles) / parallel.STREAMS, abs=1
    )
    uneven = [part(0, 250_000, lines), *(part(n, 50_000) for n in (1, 2, 3))]
    assert bound.cycles < cost(uneven, "cortex-a72").cycles


@given(
    st.lists(st.sampled_from([NOP, RET, 0x8B020020]), min_size=2, max_size=12),
    st.data(),
)
def test_equal_code_has_equal_traces_wherever_a_page_ends(
    words: list[int], data: st.DataObject
) -> None:
    code = struct.pack(f"<{len(words)}I", *words)
    at = 4 * data.draw(st.integers(1, len(words) - 1))
    whole = [Block(0x1000, code, 30, (3,))]
    cut = [Block(0x1000, code[:at], 30, (1,)), Block(0x1000 + at, code[at:], 30, (2,))]
    # A jump into the middle: QEMU makes a block of the end once more.
    entered = [
        Block(0x1000, code, 20, (2,)),
        Block(0x1000, code[:at], 10, (0,)),
        Block(0x1000 + at, code[at:], 10, (1,)),
    ]
    for other in (cut, entered):
        assert [(b.address, b.code, b.executions) for b in canonical(other)] == [
            (b.address, b.code, b.executions) for b in canonical(whole)
        ]
        assert sum(b.misses[0] for b in canonical(other)) == 3
    assert instructions(canonical(entered)) == instructions(whole)


def test_code_that_was_replaced_at_its_address_is_counted_too() -> None:
    old = Block(0x1000, struct.pack("<2I", NOP, RET), 5)
    new = Block(0x1000, struct.pack("<2I", 0x8B020020, RET), 7)
    assert instructions(canonical([old, new])) == 2 * 5 + 2 * 7


@pytest.mark.slow
def test_a_bundle_on_several_threads(built: Callable[..., Path]) -> None:
    path = built("mobilenetv2-0.35-96", "arm-cortex-a72", "--format", "bundle")
    one, four = (
        json.loads(
            succeed("meter", path, "--cpu", "cortex-a72", "--threads", count, "--json")
        )
        for count in ("1", "4")
    )
    assert (one["threads"], one["parallel_regions"], one["barrier_cycles"]) == (1, 0, 0)
    assert four["threads"] == 4 and four["parallel_regions"] > 20
    assert 0.25 * one["core_cycles"] < four["core_cycles"] < 0.7 * one["core_cycles"]
    for figure in ("core_cycles", "memory_cycles"):
        added = {"core_cycles": "barrier_cycles", "memory_cycles": "saturated_cycles"}
        assert sum(each[figure] for each in four["operators"]) == pytest.approx(
            four[figure] - four[added[figure]]
        )
    shown = succeed("meter", path, "--cpu", "cortex-a72", "--threads", "2")
    assert "2 threads, estimated" in shown and "regions" in shown


@pytest.mark.slow
def test_a_library_on_several_threads_costs_what_its_bundle_does(
    built: Callable[..., Path],
) -> None:
    formats = ("standalone", "bundle")
    library, bundle = (
        built("mobilenetv2-0.35-96", "arm-cortex-a72", "--format", each)
        for each in formats
    )
    mine, its = (
        json.loads(
            succeed("meter", path, "--cpu", "cortex-a72", "--threads", "4", "--json")
        )
        for path in (library, bundle)
    )
    assert mine["threads"] == 4
    assert mine["parallel_regions"] == its["parallel_regions"]
    kernels = [
        {each["name"]: each["instructions"] for each in figures["operators"]}
        for figures in (mine, its)
    ]
    assert kernels[0].keys() == kernels[1].keys()
    for name, count in kernels[0].items():
        # A bundle's kernels check their arguments too.
        same = 0.9 * kernels[1][name] - 100 < count <= kernels[1][name]
        assert same or name == OUTSIDE, (
            "kernels are the same code, and so are the tasks"
        )
    # The library's own launch would run all tasks on one thread.
    one = succeed("meter", library, "--cpu", "cortex-a72", "--json")
    assert mine["core_cycles"] < 0.7 * json.loads(one)["core_cycles"]


def test_more_threads_than_a_board_has_cores_are_refused() -> None:
    check_threads("cortex-a72", "rk3399", 2)
    check_threads("cortex-a53", "rk3399", 4)
    check_threads("cortex-a72", "", 4)
    words = "--threads 4: rk3399 has 2 cortex-a72; give 2 at most"
    with pytest.raises(UserError, match=words):
        check_threads("cortex-a72", "rk3399", 4)
    with pytest.raises(UserError, match=words):
        compare(
            *(Path("none.onnx"), "cortex-a72", (), Progress(quiet=True)),
            board="rk3399",
            threads=4,
        )


def test_another_boards_memory_costs_what_it_was_measured_to(
    built: Callable[..., Path],
) -> None:
    result = run(
        "meter",
        built("mobilenetv2-0.35-96"),
        "--cpu",
        "cortex-a72",
        "--board",
        "rk3588",
    )
    assert result.returncode == 2
    assert "there are rpi4, rk3399" in result.stderr
    assert hierarchy("cortex-a72", "rk3399").line_cycles != PI4.line_cycles
