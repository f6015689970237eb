"""``python -m bench validate``: the meter's estimates and published measurements on real boards."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from bench.baselines import runtimes
from bench.validation import CLOSE, Summary, Validation, measure, read, summary
from targets.files import check_writable
from targets.progress import Progress

_EPILOG = """\
examples:
  python -m bench validate --report validation.html
  python -m bench validate --measure        run every network again under the meter (a quarter of an hour)

Published times were `measured on board` by their sources; ours are `estimated`.
Exit codes: 0 shown, 2 refused (one line says why), 130 interrupted.
"""


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    if arguments.report is not None:
        check_writable(arguments.report, "--report")
    if arguments.measure:
        with Progress(quiet=arguments.json) as progress:
            measure(read(), progress)
    validation = read()
    if arguments.report is not None:
        from bench.validation_page import write_validation

        write_validation(validation, arguments.report)
    if arguments.json:
        print(json.dumps(validation.to_json(), indent=2))
    else:
        print(markdown(validation))
        if arguments.report is not None:
            print(f"\nreport  {arguments.report}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench validate",
        description="Compare the meter's estimates with published measurements on Raspberry Pis.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    option = parser.add_argument
    option(
        "--measure",
        action="store_true",
        help="estimate everything again and store the results in the project",
    )
    option("--report", type=Path, metavar="FILE", help="write one HTML page")
    option("--json", action="store_true", help="print one JSON object")
    return parser


def markdown(validation: Validation) -> str:
    """The table for a README, and the summary under it."""
    lines = [
        "| board | runtime | network | published, ms | estimated, ms | overlapped | ratio | |",
        "|---|---|---|--:|--:|--:|--:|---|",
    ]
    for pair in validation.pairs:
        clock = f"{pair.source.clock:.1f} GHz"
        title = runtimes.find(pair.source.runtime).title
        estimate = "" if pair.estimate is None else f"{pair.estimate:.1f}"
        overlapped = "" if pair.overlapped is None else f"{pair.overlapped:.1f}"
        ratio = "" if pair.ratio is None else f"{pair.ratio:.2f}"
        lines.append(
            f"| {pair.source.board}, {clock} | {title} | {pair.network} "
            f"| {pair.published:.1f} | {estimate} | {overlapped} | {ratio} | {pair.verdict} |"
        )
    lines.append("")
    lines += [_sentence(summary(name, pairs)) for name, pairs in validation.groups()]
    if validation.stale:
        lines.append(
            f"These estimates are {validation.stale}: `python -m bench validate --measure` makes new ones."
        )
    return "\n".join(lines)


def _sentence(of: Summary) -> str:
    if of.ratio is None or of.low is None or of.high is None:
        return f"- {of.name}: nothing estimated yet"
    rank = "" if of.spearman is None else f", rank correlation {of.spearman:.2f}"
    wrong = f", {of.wrong} of {of.pairs} wrong (over {CLOSE} × off)" if of.wrong else ""
    return (
        f"- {of.name}: estimated ÷ published {of.ratio:.2f} in the geometric mean "
        f"({of.low:.2f} to {of.high:.2f}){rank}{wrong}"
    )
