"""``python -m bench microcontrollers``: the meter's cycles of CMSIS-NN, and published times of boards that ran it."""

from __future__ import annotations

import argparse
import csv
import io
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from netship.bench import cmsis_nn
from netship.devices.microcontroller.boards import BOARDS
from netship.devices.microcontroller.parts import part
from netship.meter.firmware import Inference, count_steps, estimate
from netship.targets.arguments import add_json, command_parser, named_path, show_result
from netship.targets.progress import Progress

_EPILOG = """\
The published times are of microTVM with CMSIS-NN, of MLPerf Tiny 1.1 (Krai; closed division): cycles are time by clock.
What TVM adds to the kernels is in them, and not in the estimate: that should be lower.

example:
  python -m bench microcontrollers --cmsis-nn CMSIS-NN --part stm32l4r5
"""
# Million cycles, from the public results of MLPerf Tiny 1.1: Krai, NUCLEO-L4R5ZI and NRF5340-DK, microTVM with CMSIS-NN.
PUBLISHED = {
    "stm32l4r5": {"vww": 36.101, "ic": 46.747, "kws": 11.978, "ad": 1.033},
    "nrf5340": {"vww": 29.865, "ic": 40.674, "kws": 9.792, "ad": 0.805},
}
COLUMNS = (
    *("commit", "compiler", "flags", "part", "network", "layer", "call", "macs"),
    *("instructions", "core_cycles", "code_cycles", "weight_cycles"),
)


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    chosen = part(arguments.part)
    found = {}
    with Progress(quiet=arguments.json) as progress:
        for name in cmsis_nn.NETWORKS:
            progress.stage(f"counting {name} on a {chosen.cpu}")
            found[name] = measure(name, arguments.cmsis_nn, arguments.part)
    if arguments.csv:
        arguments.csv.write_text(to_csv(found, arguments.part))
    rows = {name: _row(name, each, arguments.part) for name, each in found.items()}
    arguments.report = None
    show_result(arguments, rows, table(rows, arguments.part), lambda _: None)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = command_parser(
        "bench microcontrollers",
        "Estimate the cycles of MLPerf Tiny's networks in calls of CMSIS-NN.",
        _EPILOG,
    )
    option = parser.add_argument
    checkout = f"a checkout of CMSIS-NN at {cmsis_nn.COMMIT[:12]}"
    option("--cmsis-nn", type=named_path, required=True, metavar="DIR", help=checkout)
    option("--part", default="stm32l4r5", help="microcontroller (default: stm32l4r5)")
    option("--csv", type=named_path, metavar="FILE", help="write each layer's counts")
    add_json(parser)
    return parser


def measure(network: str, checkout: Path, part_name: str) -> Inference:
    """The estimate for one network on a part.

    Raises:
        UserError: the checkout is another one, or a tool is missing.
    """
    layers, chosen = cmsis_nn.NETWORKS[network], part(part_name)
    interface = cmsis_nn.interface(layers, chosen.cpu)
    with tempfile.TemporaryDirectory(prefix="netship-cmsis-nn-") as scratch:
        folder = Path(scratch)
        name = cmsis_nn.write_project(layers, checkout.resolve(), folder)
        counted = count_steps(
            folder,
            name,
            interface,
            BOARDS[chosen.cpu],
            bytes(interface.inputs[0].nbytes),
            chosen,
            flags=[*cmsis_nn.FLAGS, "-I", str(checkout.resolve() / "Include")],
        )
    named = [(layer.call, layer.macs) for layer in layers]
    return estimate(named, counted.steps, chosen.cpu, part_name)


def _row(name: str, inference: Inference, part_name: str) -> dict[str, object]:
    total = inference.total
    published = PUBLISHED.get(part_name, {}).get(name)
    return {
        "origin": "estimated",
        "instructions": total.instructions,
        "core_cycles": total.core_cycles,
        "cycles": total.cycles,
        "published_cycles": published * 1e6 if published else None,
        "difference": total.cycles / published / 1e6 - 1 if published else None,
    }


def table(rows: dict[str, dict[str, object]], part_name: str) -> str:
    """For a terminal, in million cycles."""
    lines = [
        f"{'M cycles':<10}{'0 waits':>9}{part_name:>12}{'published':>11}{'difference':>12}"
    ]
    for name, row in rows.items():
        core, cycles = (
            f"{float(str(row[key])) / 1e6:.3f}" for key in ("core_cycles", "cycles")
        )
        line = f"{name:<10}{core:>9}{cycles:>12}"
        if row["published_cycles"]:
            published = float(str(row["published_cycles"])) / 1e6
            line += f"{published:>11.3f}{float(str(row['difference'])):>+12.1%}"
        lines.append(line)
    return "\n".join(
        [*lines, "", "estimated: the kernels alone, without what calls them"]
    )


def to_csv(found: dict[str, Inference], part_name: str) -> str:
    """Each layer's counts, with what they were made with."""
    command = ["arm-none-eabi-gcc", "-dumpfullversion"]
    compiler = subprocess.run(command, capture_output=True, text=True, check=True)
    flags = " ".join(["-O3", *cmsis_nn.FLAGS])
    head = (cmsis_nn.COMMIT, f"arm-none-eabi-gcc {compiler.stdout.strip()}", flags)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for network, inference in found.items():
        for number, step in enumerate(inference.steps):
            counts = [step.macs, step.instructions, *(round(each) for each in step[3:])]
            writer.writerow([*head, part_name, network, number, step.name, *counts])
    return text.getvalue()
