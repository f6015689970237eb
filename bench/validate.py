"""``python -m bench validate``: the meter's estimates and published measurements on real boards."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from netship.bench.baselines import runtimes
from netship.bench.validation import CLOSE, Summary, Validation, measure, read, summary
from netship.targets.arguments import add_result_options, command_parser, show_result
from netship.targets.progress import Progress

_EPILOG = """\
examples:
  python -m bench validate --report validation.html
  python -m bench validate --measure            run every network again under the meter (an hour)
  python -m bench validate --measure missing    only what published.json has and no estimate is stored of

Published times were `measured on board` by their sources; ours are `estimated`.
Exit codes: 0 shown, 2 refused (one line says why), 130 Ctrl-C, 143 SIGTERM.
"""


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    if arguments.measure:
        with Progress(quiet=arguments.json) as progress:
            measure(read(), progress, arguments.measure == "missing")
    validation = read()
    from netship.bench.validation_page import write_validation

    show_result(
        arguments,
        validation.to_json(),
        markdown(validation),
        lambda path: write_validation(validation, path),
    )
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = command_parser(
        "bench validate",
        "Compare the meter's estimates with published measurements on boards.",
        _EPILOG,
    )
    parser.add_argument(
        "--measure",
        nargs="?",
        const="all",
        choices=["all", "missing"],
        help="estimate everything again, or only what has no estimate, and store the results in the project",
    )
    add_result_options(parser)
    return parser


def markdown(validation: Validation) -> str:
    """The table for a README, and the summary under it."""
    lines = [
        "| board | threads | runtime | network | published, ms | estimated, ms | overlapped | ratio | |",
        "|---|--:|---|---|--:|--:|--:|--:|---|",
    ]
    for pair in validation.pairs:
        clock = f"{pair.source.clock:.1f} GHz"
        title = runtimes.find(pair.source.runtime).title
        estimate = "" if pair.estimate is None else f"{pair.estimate:.1f}"
        overlapped = "" if pair.overlapped is None else f"{pair.overlapped:.1f}"
        ratio = "" if pair.ratio is None else f"{pair.ratio:.2f}"
        lines.append(
            f"| {pair.source.board}, {clock} | {pair.source.threads} | {title} | {pair.network} "
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
