"""``python -m bench compare``: our bundle and other runtimes on one core, by the same meter."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

from netship.bench.baselines import runtimes
from netship.meter.cycles import CORES
from netship.targets.arguments import (
    add_result_options,
    command_parser,
    named_path,
    show_result,
)
from netship.targets.escapes import counted
from netship.targets.progress import Progress

if TYPE_CHECKING:
    from netship.bench.comparison import Comparison
    from netship.bench.measurement import Row

_EPILOG = """\
examples:
  python -m bench compare --model model.onnx --cpu cortex-a72
  python -m bench compare --model out/model-int8/reference/quantised.onnx --cpu cortex-a76
      a QDQ graph: every runtime computes in int8, with the graph's scales

Each runs under QEMU; every figure is estimated, none is a time. Core cycles come from
LLVM's scheduling model and the instructions counted, memory cycles from a cache model: see
`python -m meter --help`. A runtime's figures count only if its answer is ONNX Runtime's; in int8, if the
cosine of both is 0.95 or more. Results are kept: a second run is quick.
Exit codes: 0 compared, 1 a runtime could not be compared, 2 refused (one line says why), 130 Ctrl-C, 143 SIGTERM.
"""


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    chosen = [runtimes.find(name) for name in arguments.runtimes]
    with Progress(quiet=arguments.json) as progress:
        from netship.bench.comparison import compare

        result = compare(
            arguments.model,
            arguments.cpu,
            chosen,
            progress,
            bundle=arguments.bundle,
            tflite=arguments.tflite,
            board=arguments.board,
            threads=arguments.threads,
        )
    show_result(
        arguments,
        result.to_json(),
        table(result),
        result.write_page,
    )
    return 0 if all(row.counts for row in result.rows) else 1


def _parser() -> argparse.ArgumentParser:
    parser = command_parser(
        "bench compare",
        "Estimate a network's cycles on a Cortex-A core in our bundle and in other runtimes.",
        _EPILOG,
    )
    option = parser.add_argument
    option(
        "--model",
        type=named_path,
        required=True,
        metavar="FILE",
        help="as --model of python -m compile.build",
    )
    option(
        "--cpu",
        required=True,
        metavar="CPU",
        help=", ".join(CORES),
    )
    option(
        "--board",
        metavar="NAME",
        default="",
        help="whose memory the core has, rk3588 … (default: a Raspberry Pi's, where one has the core)",
    )
    option(
        "--threads",
        type=int,
        choices=[1, 2, 4],
        default=1,
        help="counted for ours and ncnn; of the others the least that they can take (default: 1)",
    )
    option(
        "--runtimes",
        nargs="*",
        default=list(runtimes.DEFAULT),
        metavar="NAME",
        help=f"of {', '.join(runtimes.BASELINES)} (default: those that compute in the model's own precision)",
    )
    option(
        "--bundle",
        type=named_path,
        metavar="DIR",
        help="our bundle of this model for this CPU (default: one is built)",
    )
    option(
        "--tflite",
        type=named_path,
        metavar="FILE",
        help="what LiteRT runs in place of the model, converted",
    )
    add_result_options(parser)
    return parser


def table(result: Comparison) -> str:
    """The comparison for a terminal: millions of instructions and cycles, best first."""
    from netship.bench.comparison import AT_BEST, in_millions

    best = result.best
    header = (
        "runtime",
        "version",
        "instructions",
        "core cycles",
        "memory cycles",
        "sum",
        "× best",
        "max-abs",
    )
    lines = [header]
    refused = []
    for row in result.sorted_rows():
        if row.counts is None:
            refused.append(f"{row.title} {row.version}".rstrip() + f": {row.refused}")
            continue
        lines.append(
            (
                row.title,
                row.version,
                in_millions(row.counts.instructions),
                in_millions(row.counts.core_cycles),
                in_millions(row.counts.memory_cycles),
                _least(row) + in_millions(row.counts.cycles),
                _least(row) + f"{row.counts.cycles / best:.2f}" if best else "",
                _error(row),
            )
        )
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    shown = [
        "  ".join(
            cell.ljust(width) if i < 2 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]
    title = f"{result.model} on {result.cpu}, {counted(result.threads, 'thread')}, an inference: estimated, in millions"
    if any(row.at_best for row in result.rows):
        refused.append(f"≥ {AT_BEST}")
    return "\n".join([title, *shown, *refused, *result.notes])


def _least(row: Row) -> str:
    return "≥ " if row.at_best else ""


def _error(row: Row) -> str:
    return "" if row.max_abs_error is None else f"{row.max_abs_error:.1e}"
