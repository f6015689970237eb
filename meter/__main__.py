"""``python -m meter``: estimate the cycles of a bundle on a Cortex-A or Cortex-M core without the board."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from netship.targets.arguments import (
    add_result_options,
    command_parser,
    named_path,
    show_result,
)
from netship.targets.errors import UserError, run_command
from netship.targets.escapes import counted, millions, milliseconds, shown
from netship.targets.progress import Progress

if TYPE_CHECKING:
    from netship.meter.builds import Build
    from netship.meter.calibrate import Calibration
    from netship.meter.firmware import Inference
    from netship.meter.operators import Metered, Operator
    from netship.meter.roofline import Advice

_EPILOG = """\
also:
  python -m meter calibrate    store a factor from a measurement on your own board
  python -m bench compare      our bundle and other runtimes with one network, by the same meter
  python -m bench validate     the estimates and published measurements on real boards

Instructions are exact: QEMU counts them, and every run has the same. Cycles are estimated: core cycles by LLVM's
scheduling model of the core, without branch prediction; memory cycles by a cache model without prefetching, in which
every missed line costs bandwidth. The time is their sum: published times of real boards fit it best (bench validate).
A core that overlaps them takes less, but not less than the larger one. The operating system is not counted.
Of a microcontroller core cycles are those of a memory that never waits; --part adds what its flash makes it wait.

examples:
  python -m meter out/model-arm-cortex-a72 --cpu cortex-a72 --report meter.html
  python -m meter out/model-int8 --cpu cortex-a72 --against out/model-arm-cortex-a72 --report both.html
  python -m meter out/vww-m4 --cpu cortex-m4 --part stm32l4r5
Exit codes: 0 estimated, 2 refused (one line says why), 130 Ctrl-C, 143 SIGTERM.
"""
# Commands that moved.
_MOVED = {"compare": "python -m bench compare", "truth": "python -m bench validate"}


def main(argv: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] == ["calibrate"]:
        from netship.meter.calibrate import main as calibrate

        return calibrate(words[1:])
    if words[:1] and words[0] in _MOVED:
        raise UserError(f"python -m meter {words[0]}: is now {_MOVED[words[0]]}")
    arguments = parser().parse_args(words)
    from netship.meter import firmware_report
    from netship.meter.calibrate import factor
    from netship.meter.cycles import CORES
    from netship.meter.operators import Metered

    # A damaged store is refused before anything is counted.
    calibration = factor(arguments.cpu) if arguments.cpu in CORES else None
    with Progress(quiet=arguments.json) as progress:
        found = measure(arguments, progress.stage)
        builds = _builds(found, arguments, progress.stage)
    if isinstance(found, Metered):
        several = len(builds) > 1
        show_result(
            arguments,
            builds_json(builds) if several else to_json(found),
            builds_table(builds) if several else table(found, calibration),
            lambda path: write_page(builds, calibration, path),
        )
    else:
        show_result(
            arguments,
            firmware_report.to_json(found),
            firmware_report.table(found),
            lambda path: firmware_report.write_page(found, arguments.bundle, path),
        )
    return 0


def measure(
    arguments: argparse.Namespace, on_progress: Callable[[str], None]
) -> Metered | Inference:
    """Estimate as the options ask: a C project on a Cortex-M core, all else on a Cortex-A core.

    Raises:
        UserError: as `measure_bundle` and `measure_project`; options of microcontrollers for another core.
    """
    from netship.bundle.store import open_bundle
    from netship.meter.builds import check_number
    from netship.meter.firmware import Places, measure_project
    from netship.meter.operators import PEAK_MACS, measure_bundle, open_countable
    from netship.meter.thumb_cycles import CORES

    cpu, part, cores = arguments.cpu, arguments.part or "", (*PEAK_MACS, *CORES)
    if cpu not in cores:
        raise UserError(
            f"--cpu {cpu}: no model of this core; there are {', '.join(cores)}"
        )
    if cpu.startswith("cortex-m"):
        for option in ("board", "threads", "against"):
            if getattr(arguments, option):
                raise UserError(f"--{option}: is for Cortex-A; leave it out")
        bundle = open_bundle(arguments.bundle)
        built = bundle.manifest.firmware.weights_in if bundle.manifest.firmware else ""
        external = bool(part) and built.startswith(("qspi", "ospi"))
        weights = arguments.weights or ("external" if external else "flash")
        places = Places(arguments.code or "flash", weights)
        return measure_project(bundle, cpu, part, places, on_progress)
    for option in ("part", "code", "weights"):
        if getattr(arguments, option):
            raise UserError(f"--{option}: is for microcontrollers; leave it out")
    check_number(len(arguments.against))
    for path in arguments.against:
        open_countable(path, cpu)
    board, threads = arguments.board or "", arguments.threads or 1
    return measure_bundle(arguments.bundle, cpu, on_progress, board, threads)


def _builds(
    found: Metered | Inference,
    arguments: argparse.Namespace,
    on_progress: Callable[[str], None],
) -> list[Build]:
    """The build that was measured, and those of ``--against``, which are measured here; none of a C project."""
    from netship.meter.builds import Build, check, names
    from netship.meter.operators import Metered, measure_bundle

    if not isinstance(found, Metered):
        return []
    metered = [found]
    for path in arguments.against:
        where = arguments.cpu, on_progress, found.board, found.threads
        metered.append(measure_bundle(path, *where))
    builds = list(map(Build, names([arguments.bundle, *arguments.against]), metered))
    check(builds)
    return builds


def parser() -> argparse.ArgumentParser:
    parser = command_parser(
        "meter",
        "Estimate how many cycles an inference takes on a Cortex-A or Cortex-M core.",
        _EPILOG,
    )
    option = parser.add_argument
    help_bundle = "a bundle or library for aarch64, or a C project for Cortex-M"
    option("bundle", type=named_path, help=help_bundle)
    option("--cpu", required=True, help="the core, such as cortex-a72 or cortex-m4")
    option(
        "--against",
        type=named_path,
        nargs="+",
        default=[],
        metavar="DIR",
        help="more builds of the network for aarch64, side by side",
    )
    option(
        "--board",
        help="whose memory the core has, rk3588 … (default: a Raspberry Pi's, where one has the core)",
    )
    option("--threads", type=int, choices=[1, 2, 4], help="(default: 1)")
    option("--part", help="microcontroller whose flash and caches count, stm32l4r5 …")
    option("--code", choices=["flash", "tcm"], help="of the part (default: flash)")
    weights = ["flash", "tcm", "external"]
    option("--weights", choices=weights, help="of the part (default: as built)")
    add_result_options(parser)
    return parser


def write_page(
    builds: Sequence[Build], calibration: Calibration | None, path: Path
) -> None:
    """Write estimates as one self-contained HTML page, whole or not at all.

    Args:
        builds: of one core, board and number of threads.
        calibration: of the core.
    """
    from netship.meter import cycles, power
    from netship.meter.builds import rows
    from netship.meter.counts import meter_version
    from netship.meter.drawing import drawing
    from netship.meter.roofline import advice
    from netship.targets import templates

    first = builds[0].metered
    templates.write_page(
        path,
        "--report",
        Path(__file__).with_name("operators.html.jinja"),
        builds=builds,
        advice=advice,
        energy=power.words,
        powers=power.powers(first),
        rows=rows(builds) if len(builds) > 1 else [],
        drawing=drawing(builds),
        cpu=first.cpu,
        threads=first.threads,
        calibration=calibration
        if calibration
        and calibration.is_current
        and calibration.suits(first.board, first.threads)
        else None,
        core_model=cycles.model(first.cpu),
        hierarchy=first.hierarchy,
        meter=meter_version(),
        filters={"milliseconds": milliseconds},
    )


def to_json(metered: Metered) -> dict[str, object]:
    from netship.devices.sessions.session import Origin
    from netship.meter import cycles
    from netship.meter.counts import ORIGINS, meter_version
    from netship.meter.power import energy
    from netship.meter.roofline import advice, roof

    hierarchy, joules = metered.hierarchy, energy(metered)
    over, next_steps = roof(metered), advice(metered)
    return {
        "cpu": metered.cpu,
        "meter": meter_version(),
        "origin": Origin.ESTIMATED.value,
        "origins": ORIGINS,
        "core_model": f"llvm-mca {cycles.model(metered.cpu)}",
        "memory_model": f"{hierarchy.board}, {hierarchy.clock} GHz",
        "instructions": metered.instructions,
        "core_cycles": metered.core_cycles,
        "memory_cycles": metered.memory_cycles,
        "threads": metered.threads,
        "parallel_regions": metered.regions,
        "barrier_cycles": metered.barriers,
        "saturated_cycles": metered.saturated,
        "joules": joules and joules._asdict(),
        "macs": metered.macs,
        "numbers": metered.numbers,
        "peak_macs_per_cycle": metered.peak,
        "operators": [
            {
                **operator._asdict(),
                "missed_bytes": list(operator.missed_bytes),
                "macs_per_cycle": operator.macs_per_cycle,
                "roof_cycles": over and over.cycles(operator),
            }
            for operator in metered.operators
        ],
        "roof": over and {"macs_per_cycle": over.macs, "bytes_per_cycle": over.bytes},
        "next": next_steps
        and {
            **next_steps._asdict(),
            "steps": [step._asdict() for step in next_steps.steps],
        },
    }


def builds_json(builds: Sequence[Build]) -> dict[str, object]:
    """The first build as `to_json` has it, the others in ``against``, and ``rows`` with the cycles of each build."""
    from netship.meter.builds import rows

    (_, first), *others = builds
    return {
        **to_json(first),
        "against": [{"name": name, **to_json(metered)} for name, metered in others],
        "rows": [{"layers": row.title, "cycles": row.cycles} for row in rows(builds)],
    }


def builds_table(builds: Sequence[Build]) -> str:
    """Builds side by side for a terminal: millions of cycles, core and memory, and their ratio to the first."""
    from netship.meter.builds import LETTERS, rows
    from netship.meter.roofline import advice

    hierarchy = builds[0].metered.hierarchy
    lines = [
        f"{letter}  {shown(name, 60)}, {metered.numbers}: {metered.cycles / 1e6:.1f} M cycles, "
        f"{milliseconds(metered.milliseconds(hierarchy.clock)[1], 1)}"
        for letter, (name, metered) in zip(LETTERS, builds, strict=False)
    ]
    letters = LETTERS[: len(builds)]
    ratios = [f"{letter} ÷ A" for letter in letters[1:]]
    heads = [*letters, *ratios, " layers"]
    threads = counted(builds[0].metered.threads, "thread")
    lines.append(
        f"estimated for {builds[0].metered.cpu}, {hierarchy.board} at {hierarchy.clock} GHz, {threads}, core + memory"
    )
    lines += ["", "million cycles, core and memory, estimated"]
    lines.append(" ".join(f"{head:>8}" for head in heads))
    for row in rows(builds):
        first, *others = row.cycles
        cells = [
            f"{count / 1e6:.3f}" if count is not None else "–" for count in row.cycles
        ]
        cells += [f"{each / first:.2f}" if each and first else "" for each in others]
        lines.append(" ".join(f"{cell:>8}" for cell in cells) + f"  {row.title}")
    for letter, build in zip(LETTERS, builds, strict=False):
        lines += _next(advice(build.metered), f"{letter}: ")
    return "\n".join(lines)


def table(metered: Metered, calibration: Calibration | None) -> str:
    """The estimate for a terminal, operators in the order they run."""
    from netship.meter import cycles, power
    from netship.meter.roofline import advice

    hierarchy = metered.hierarchy
    low, high = metered.milliseconds(hierarchy.clock)
    slowest = " on each region's slowest thread" if metered.threads > 1 else ""
    lines = [
        f"{'core':>8} {'memory':>8} {'share':>6} {'instr.':>8} {'MACs':>7} {'a cycle':>8} {'of peak':>8}  {'L1, L2 missed':>17}  operator",
        f"{'Mcycles':>8} {'Mcycles':>8} {'':>6} {'M':>8} {'M':>7} {'':>8} {'':>8}  {'MB':>17}",
    ]
    for each in metered.operators:
        missed = ", ".join(f"{count / 1e6:.2f}" for count in each.missed_bytes)
        rate = f"{each.macs_per_cycle:8.2f} {each.macs_per_cycle / metered.peak:8.0%}"
        lines.append(
            f"{each.core_cycles / 1e6:8.3f} {each.memory_cycles / 1e6:8.3f} {each.cycles / metered.cycles:6.1%} "
            f"{each.instructions / 1e6:8.3f} "
            f"{each.macs / 1e6:7.2f} {rate if each.macs else '':>17}  {missed:>17}  {_row(each)}"
        )
    lines += [
        "",
        "columns      a cycle, of peak: MACs a core cycle, and their share of what the core can do; missed: of each cache",
        f"instructions {millions(metered.instructions, 1)}{slowest}, exact (QEMU)",
        f"core         {millions(metered.core_cycles, 1)} cycles, estimated (LLVM's model of {cycles.model(metered.cpu)}, no caches)",
        f"memory       {millions(metered.memory_cycles, 1)} cycles, estimated (cache model of the {hierarchy.board}; no prefetching)",
        f"time         {milliseconds(high, 1)} at {hierarchy.clock} GHz, {counted(metered.threads, 'thread')}, estimated (core + memory; {milliseconds(low, 1)} if they overlapped)",
        f"energy       {power.words(metered)}",
    ]
    if metered.threads > 1:
        lines.insert(
            -2,
            f"threads      {metered.threads}: the rows are of each region's slowest; core and memory have "
            f"{millions(metered.barriers, 1)} cycles more for the ends of {counted(metered.regions, 'region')}, "
            f"{millions(metered.saturated, 1)} for the memory that all share",
        )
    lines += _calibrated(metered, calibration)
    return "\n".join([*lines, *_next(advice(metered))])


def _calibrated(metered: Metered, calibration: Calibration | None) -> list[str]:
    if calibration is None:
        return []
    if not calibration.is_current:
        words = (
            f"no: your board's factor is of meter {calibration.meter}, this is another one; run "
            "python -m meter calibrate again"
        )
    elif not calibration.suits(metered.board, metered.threads):
        words = f"no: your board's factor is of the {calibration.hierarchy.board}'s memory and 1 thread"
    else:
        time = metered.milliseconds(metered.hierarchy.clock)[1] * calibration.factor
        words = (
            f"{milliseconds(time, 1)} by your board's factor of "
            f"{calibration.factor:.2f} ({calibration.date})"
        )
    return [f"calibrated   {words}"]


def _next(found: Advice | None, whose: str = "") -> list[str]:
    if found is None:
        return []
    above = f"{millions(found.above, 1)} cycles above the roofs of core and memory"
    lines = ["", f"{whose}what to do next: {above}, {found.share:.1%} of the inference"]
    if found.first:
        lines += [f"   {found.first}", f"      {found.command}"]
    for index, step in enumerate(found.steps, 1):
        lines.append(
            f"{index:2} {millions(step.above)} cycles ({step.share:.1%}), {millions(step.core)} in the core: {step.operator}: {step.advice}"
        )
        lines += [f"      {step.command}"] if step.command else []
    if found.fixed:
        lines.append(
            f"   {millions(found.fixed)} of them are in this project's own kernels, which no search changes"
        )
    return lines


def _row(operator: Operator) -> str:
    # Layers of one shape share a kernel, and with that a row.
    calls = f"{operator.calls} calls: " if operator.calls > 1 else ""
    return calls + operator.title


if __name__ == "__main__":
    run_command(main)
