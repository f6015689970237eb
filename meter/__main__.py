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
from netship.targets.escapes import counted, milliseconds
from netship.targets.progress import Progress

if TYPE_CHECKING:
    from netship.meter.calibrate import Calibration
    from netship.meter.firmware import Inference
    from netship.meter.operators import Metered, Operator

_EPILOG = """\
also:
  python -m meter calibrate    store a factor from a measurement on your own board
  python -m bench compare      our bundle and other runtimes with one network, by the same meter
  python -m bench validate     the estimates and published measurements on real boards

Instructions are exact: QEMU counts them, and every run has the same. Cycles are estimated: core cycles by LLVM's
scheduling model of the core, without branch prediction; memory cycles by a cache model without prefetching, in which
every missed line costs bandwidth. The time is their sum: published times of real boards fit it best (bench validate).
A core that overlaps them takes less, but not less than the larger one. One thread; the operating system is not counted.
Of a microcontroller core cycles are those of a memory that never waits; --part adds what its flash makes it wait.

examples:
  python -m meter out/model-arm-cortex-a72 --cpu cortex-a72 --report meter.html
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
    with Progress(quiet=arguments.json) as progress:
        found = measure(arguments, progress.stage)
    from netship.meter import firmware_report
    from netship.meter.calibrate import factor
    from netship.meter.operators import Metered

    if isinstance(found, Metered):
        calibration = factor(arguments.cpu)
        show_result(
            arguments,
            to_json(found),
            table(found, calibration),
            lambda path: write_page(found, arguments.bundle, calibration, path),
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
    from netship.meter.firmware import Places, measure_project
    from netship.meter.operators import PEAK_MACS, measure_bundle
    from netship.meter.thumb_cycles import CORES

    cpu, part, cores = arguments.cpu, arguments.part or "", (*PEAK_MACS, *CORES)
    if cpu not in cores:
        raise UserError(
            f"--cpu {cpu}: no model of this core; there are {', '.join(cores)}"
        )
    if cpu.startswith("cortex-m"):
        for option in ("board", "threads"):
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
    board, threads = arguments.board or "", arguments.threads or 1
    return measure_bundle(arguments.bundle, cpu, on_progress, board, threads)


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
    option("--board", help="whose memory the core has, rk3588 … (default: a Pi's)")
    option("--threads", type=int, choices=[1, 2, 4], help="(default: 1)")
    option("--part", help="microcontroller whose flash and caches count, stm32l4r5 …")
    option("--code", choices=["flash", "tcm"], help="of the part (default: flash)")
    weights = ["flash", "tcm", "external"]
    option("--weights", choices=weights, help="of the part (default: as built)")
    add_result_options(parser)
    return parser


def write_page(
    metered: Metered, bundle: Path, calibration: Calibration | None, path: Path
) -> None:
    """Write the estimate as one self-contained HTML page, whole or not at all."""
    from netship.meter import cycles
    from netship.meter.counts import meter_version
    from netship.targets import templates

    hierarchy = metered.hierarchy
    low, high = metered.milliseconds(hierarchy.clock)
    templates.write_page(
        path,
        "--report",
        Path(__file__).with_name("operators.html.jinja"),
        metered=metered,
        bundle=bundle.name,
        calibration=calibration,
        core_model=cycles.model(metered.cpu),
        hierarchy=hierarchy,
        peak=metered.peak,
        worst=max(each.cycles for each in metered.operators),
        total=metered.cycles,
        low=low,
        high=high,
        meter=meter_version(),
        filters={"milliseconds": milliseconds},
    )


def to_json(metered: Metered) -> dict[str, object]:
    from netship.devices.sessions.session import Origin
    from netship.meter import cycles
    from netship.meter.counts import ORIGINS, meter_version

    hierarchy = metered.hierarchy
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
        "macs": metered.macs,
        "numbers": metered.numbers,
        "peak_macs_per_cycle": metered.peak,
        "operators": [
            {
                **operator._asdict(),
                "missed_bytes": list(operator.missed_bytes),
                "macs_per_cycle": operator.macs_per_cycle,
            }
            for operator in metered.operators
        ],
    }


def table(metered: Metered, calibration: Calibration | None) -> str:
    """The estimate for a terminal, operators in the order they run."""
    from netship.meter import cycles

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
        f"instructions {metered.instructions / 1e6:.1f} M{slowest}, exact (QEMU)",
        f"core         {metered.core_cycles / 1e6:.1f} M cycles, estimated (LLVM's model of {cycles.model(metered.cpu)}, no caches)",
        f"memory       {metered.memory_cycles / 1e6:.1f} M cycles, estimated (cache model of the {hierarchy.board}; no prefetching)",
        f"time         {milliseconds(high, 1)} at {hierarchy.clock} GHz, {counted(metered.threads, 'thread')}, estimated (core + memory; {milliseconds(low, 1)} if they overlapped)",
    ]
    if metered.threads > 1:
        lines.insert(
            -1,
            f"threads      {metered.threads}: the rows are of each region's slowest; core and memory have "
            f"{metered.barriers / 1e6:.1f} M cycles more for the ends of {metered.regions} regions, "
            f"{metered.saturated / 1e6:.1f} M for the memory that all share",
        )
    if calibration is not None and not calibration.is_current:
        lines.append(
            f"calibrated   no: your board's factor is of meter {calibration.meter}, this is another one; run "
            "python -m meter calibrate again"
        )
    elif calibration is not None:
        lines.append(
            f"calibrated   {milliseconds(high * calibration.factor, 1)} by your board's factor of "
            f"{calibration.factor:.2f} ({calibration.date})"
        )
    return "\n".join(lines)


def _row(operator: Operator) -> str:
    # Layers of one shape share a kernel, and with that a row.
    calls = f"{operator.calls} calls: " if operator.calls > 1 else ""
    return calls + operator.title


if __name__ == "__main__":
    run_command(main)
