"""Builds side by side in the meter: rows by layers, the roofline, and what to do next."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from check_results import Page
from conftest import run, succeed

from netship.bundle.manifest import Group, Records
from netship.meter import drawing as drawings
from netship.meter.__main__ import builds_json, builds_table, table, to_json, write_page
from netship.meter.builds import Build, check, check_number, names, rows
from netship.meter.operators import Metered, Operator, _task
from netship.meter.power import POWERS, energy
from netship.meter.roofline import Roof, advice, roof
from netship.targets.errors import UserError

TASK = "conv 1×1, 96→24, 56×56"
HOSTILE = "<script>alert(1)</script>" + "n" * 300


def kernel(
    name: str,
    *layers: str,
    core: float = 4e6,
    memory: float = 1e6,
    macs: int = 8_000_000,
    fetched: int = 64_000,
    task: str = "",
    own: bool = False,
) -> Operator:
    missed = (2 * fetched, fetched)
    calls = max(len(layers), 1)
    layer = ", ".join(layers)
    return Operator(
        *(name, layer, calls, 1000, core, memory, macs, missed),
        *(layers, task, own),
    )


def metered(
    *operators: Operator, numbers: str = "float32", threads: int = 1
) -> Metered:
    peak = {"float32": 4, "int8": 8}[numbers] * threads
    return Metered(
        *("cortex-a72", operators, numbers, peak, "", threads), target="arm-cortex-a72"
    )


def test_a_row_has_the_layers_that_no_build_joins_with_others() -> None:
    joined = metered(
        kernel("fused_pair", "stem", "dw", core=7e6),
        kernel("fused_conv", "project"),
        kernel("fused_conv_1", "a", "b"),
        kernel("fused_pool", core=1e6),
    )
    apart = metered(
        kernel("fused_quantise"),
        kernel("fused_conv", "stem"),
        kernel("fused_dw", "dw"),
        kernel("fused_conv_1", "project", "a"),
        kernel("fused_conv_2", "b"),
        kernel("fused_pool", core=1e6),
        kernel("fused_pool_1", core=1e6),
    )
    found = rows([Build("A", joined), Build("B", apart)])
    assert [(row.title, row.cycles) for row in found] == [
        ("stem, dw", [8e6, 10e6]),
        ("project, a, b", [10e6, 10e6]),
        ("pool", [2e6, 4e6]),
        ("quantise", [None, 5e6]),
    ]
    for index, build in enumerate((joined, apart)):
        total = sum(row.cycles[index] or 0 for row in found)
        assert total == pytest.approx(build.cycles)


def test_long_names_are_shown_by_their_ends_and_kept_in_json() -> None:
    names = [f"model/relu_{n};model/bias_{n};model/conv_{n}" for n in range(8)]
    one = metered(
        kernel("k", *names), kernel("pad\x1b[31m", "/a/" + "b/" * 90 + "conv")
    )
    shared, long = one.operators
    assert shared.title == (
        "model/conv_0, model/conv_1, model/conv_2, model/conv_3, model/conv_4, model/conv_5 and 2 more"
    )
    assert long.title.startswith("…") and long.title.endswith("/b/conv")
    assert max(map(len, table(one, None).splitlines())) < 250
    assert to_json(one)["operators"][0]["layers"] == tuple(names)  # type: ignore[index]
    joined = shared._replace(layer="a;b + c;d")
    assert joined.title == "b + d"
    (row, _) = rows([Build("one", one), Build("two", one)])
    assert row.title.startswith("model/conv_0, model/conv_1, ")


def test_a_kernel_is_judged_by_the_nearer_roof() -> None:
    over = Roof(macs=4, bytes=2)
    assert over.cycles(kernel("k", macs=8_000_000, fetched=1000)) == 2e6
    assert over.cycles(kernel("k", macs=8_000, fetched=8_000_000)) == 4e6
    one = metered(kernel("k", "a"))
    found = roof(one)
    assert found is not None and found.macs == 4
    # A line of 64 bytes from memory costs what all levels do.
    assert 64 / found.bytes == pytest.approx(sum(one.hierarchy.line_cycles))
    assert roof(metered(kernel("k", "a"), threads=4)) is None
    assert advice(metered(kernel("k", "a"), threads=4)) is None


def test_the_kernels_with_most_to_gain_come_first_and_say_how() -> None:
    build = metered(
        kernel("good", "a", core=20e6, memory=0, macs=80_000_000, fetched=0),
        kernel("slow", "b", core=9e6, memory=0, task=TASK),
        kernel("pair", "c", core=8e6, own=True),
        kernel("waits", "d", core=2e6, memory=4e6),
        kernel("moves", core=2e6, macs=0),
        kernel("small", "e", core=2e6 + 100, memory=0),
    )
    found = advice(build)
    assert found is not None and found.first == ""
    assert [step.operator for step in found.steps] == ["b", "d", "moves"]
    slow, waits, moves = found.steps
    assert (slow.above, slow.core, slow.share) == (7e6, 7e6, 7e6 / build.cycles)
    assert slow.command == (
        "python -m tuning.tune --target arm-cortex-a72 --model MODEL --measure meter "
        f"--tasks '{TASK}'"
    )
    # Kernels of our own, which no search changes, are no step.
    assert found.fixed == 7e6
    assert (waits.above, waits.core) == (4e6, 0)
    assert "most of it waits" in waits.advice and "most of it waits" not in slow.advice
    assert "moves data" in moves.advice
    assert found.above == sum(step.above for step in found.steps) + 7e6 + 100
    half = build._replace(numbers="float16")
    assert "--precision float16 --calibration photos/" in advice(half).steps[0].command  # type: ignore[union-attr]


def test_a_network_without_all_records_is_tuned_whole() -> None:
    records = Records(file="", measured="", tasks=22, covered=3)
    found = advice(metered(kernel("k", "a"))._replace(records=records))
    assert found is not None and "3 of the network's 22 tasks" in found.first
    assert found.command.endswith("--measure meter") and "--tasks" not in found.command


@pytest.mark.parametrize("key", ["", "[", "[1]", "7", "{}", "[" * 90_000])
def test_a_damaged_workload_key_has_no_task(key: str) -> None:
    group = Group(name="k", task=key, operators=(), output_shape=(1,), macs=0)
    assert _task([group]) == ""


def test_points_lie_under_their_roofs_and_inside_the_drawing() -> None:
    float32 = metered(
        kernel("a", "a", core=2e6, memory=0, fetched=0),
        kernel("b", "b", core=1, memory=3e6, macs=8000, fetched=6_000_000),
        kernel("c", "c", core=4e9, macs=1),
        kernel("none", macs=0),
    )
    int8 = metered(kernel("a", "a", core=1.1e6), numbers="int8")
    found = drawings.drawing([Build("A", float32), Build("B", int8)])
    assert found is not None and len(found.points) == 4
    for point in found.points:
        assert 0 < point.x <= drawings.WIDTH - 14 and 12 <= point.y < drawings.HEIGHT
    at_best = next(p for p in found.points if p.title == "A: a")
    flat = [float(line.points.split(",")[-1]) for line in found.roofs]
    assert at_best.y == pytest.approx(flat[0], abs=0.1), "its core is at the peak"
    assert at_best.x == drawings.WIDTH - 14, "no byte from memory"
    assert [line.words for line in found.roofs] == [
        "float32: 4 a cycle",
        "int8: 8 a cycle",
    ]
    assert flat[1] < flat[0], "up is more"
    assert 2 <= len(found.across) <= 9 and 2 <= len(found.up) <= 9
    assert drawings.drawing([Build("A", metered(kernel("k", macs=0)))]) is None
    threads = metered(kernel("a", "a"), threads=4)
    assert drawings.drawing([Build("A", threads)]) is None


def test_a_network_that_fits_the_caches_has_its_points_at_the_right_edge() -> None:
    small = metered(kernel("a", "a", fetched=0), kernel("b", "b", fetched=0))
    found = drawings.drawing([Build("A", small)])
    assert found is not None
    assert [point.x for point in found.points] == [drawings.WIDTH - 14] * 2


@pytest.mark.parametrize("several", [False, True], ids=["one", "two"])
@pytest.mark.parametrize("threads", [1, 4])
def test_the_page_needs_nothing_and_takes_any_name(
    several: bool, threads: int, tmp_path: Path
) -> None:
    first = metered(
        kernel("k", HOSTILE, core=9e6, task=HOSTILE), kernel("pool"), threads=threads
    )
    second = metered(kernel("k", HOSTILE, "b"), numbers="int8", threads=threads)
    builds = [Build(HOSTILE, first), Build("two", second)][: 1 + several]
    write_page(builds, None, tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text()
    page = Page(text)
    assert not {"script", "img"} & set(page.tags)
    assert not re.search(r"https?:|url\(|@import", text)
    assert ("svg" in page.tags) == ("What to do next" in page.text) == (threads == 1)
    assert ("Layer by layer" in page.text) == several
    assert f"estimated, {threads} thread" in page.text
    assert ("instructions on each region's slowest" in page.text) == (threads > 1)
    assert ("B none" in page.text) == several, "the second has no pool"
    if threads == 1:
        assert "8.00 M cycles above its roof" in page.text
        assert page.tags.count("circle") == 1 + 1 + several


def test_json_and_table_have_what_the_page_has(tmp_path: Path) -> None:
    first = metered(kernel("k", "a", core=9e6, task=TASK), kernel("pool"))
    second = metered(kernel("k", "a"), numbers="int8")
    builds = [Build("one", first), Build("two", second)]
    found = json.loads(json.dumps(builds_json(builds)))
    assert found["rows"] == [
        {"layers": "a", "cycles": [10e6, 5e6]},
        {"layers": "pool", "cycles": [5e6, None]},
    ]
    (other,) = found["against"]
    assert (other["name"], other["numbers"]) == ("two", "int8")
    assert found["roof"]["macs_per_cycle"] == 4
    assert found["operators"][0]["roof_cycles"] == 2e6
    assert found["next"]["steps"][0]["command"].endswith(f"--tasks '{TASK}'")
    text = builds_table(builds)
    assert "for cortex-a72, Raspberry Pi 4 at 1.5 GHz, 1 thread, core + memory" in text
    assert re.search(r"10\.000 +5\.000 +0\.50 +a\n", text)
    assert re.search(r"5\.000 +– +pool\n", text)
    assert "A: what to do next: " in text and "B: what to do next: " in text
    several = to_json(metered(kernel("k", "a"), threads=4))
    assert (several["roof"], several["next"]) == (None, None)


def test_builds_that_have_nothing_in_common_are_refused() -> None:
    one, other = metered(kernel("k", "a")), metered(kernel("k", "b"))
    check([Build("one", one), Build("again", one)])
    with pytest.raises(UserError, match="has no layer of one; give builds of one"):
        check([Build("one", one), Build("other", other)])
    with pytest.raises(UserError, match="5 builds; give 4 at most"):
        check_number(5)
    assert names([Path("x/a"), Path("y/a"), Path("b")]) == ["x/a", "y/a", "b"]


def test_energy_is_a_range_by_published_power_or_is_not_given() -> None:
    one = metered(kernel("k", "a", core=100e6, memory=50e6))
    found = energy(one)
    assert found is not None and one.milliseconds(1.5)[1] == pytest.approx(100)
    # Raspberry Pi 4: 2.1 W idle, 6.41 W on four cores; 2.7 and 6.4 W by the other source.
    assert found.board == pytest.approx((0.1 * (2.1 + 4.31 / 4), 0.641))
    assert found.above_idle == pytest.approx((0.1 * 3.7 / 4, 0.431))
    assert energy(one._replace(threads=4)) == found, "in the same time"
    assert "0.318 to 0.641 J of the whole board" in table(one, None)
    other = one._replace(board="rk3399")
    assert energy(other) is None and to_json(other)["joules"] is None
    assert "no published power of RK3399 is known here" in table(other, None)
    for sources in POWERS.values():
        assert len(sources) > 1 and all(0.5 < x.idle < x.load < 15 for x in sources)


@pytest.mark.slow
def test_two_builds_of_a_network_are_matched(
    built: Callable[..., Path], tmp_path: Path
) -> None:
    first = built("mobilenetv2-0.35-96", "arm-cortex-a72", "--format", "bundle")
    second = built("mobilenetv2-0.35-96", "arm-cortex-a72", "--format", "standalone")
    page = tmp_path / "page.html"
    options = ("--cpu", "cortex-a72", "--against", second, "--report", page, "--json")
    found = json.loads(succeed("meter", first, *options))
    matched = [row for row in found["rows"] if None not in row["cycles"]]
    assert len(matched) >= 20
    assert "Layer by layer" in Page(page.read_text()).text


def test_against_is_refused_before_anything_is_counted(
    built: Callable[..., Path], tmp_path: Path
) -> None:
    path = built("mobilenetv2-0.35-96")
    for options, words in (
        (("--cpu", "cortex-a72", "--against", tmp_path), "not a bundle"),
        (("--cpu", "cortex-a72", "--against", path), "model.so is for x86_64"),
        (("--cpu", "cortex-a72", "--against", *[path] * 5), "give 4 at most"),
        (("--cpu", "cortex-m7", "--against", path), "--against: is for Cortex-A"),
    ):
        result = run("meter", path, *options)
        assert result.returncode == 2 and words in result.stderr, result.stderr
