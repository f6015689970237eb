"""``python -m runtime_demo.compare``: several builds side by side, each checked against ONNX Runtime."""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from netship.runtime_demo.check import check
from netship.runtime_demo.check import parser as check_parser
from netship.runtime_demo.options import count
from netship.targets import engine, escapes
from netship.targets.arguments import (
    add_result_options,
    command_parser,
    named_path,
    show_result,
)
from netship.targets.errors import UserError, run_command
from netship.targets.escapes import ending, shown
from netship.targets.progress import Progress

if TYPE_CHECKING:
    from netship.bundle.store import Bundle
    from netship.meter.operators import Metered
    from netship.runtime_demo.columns import Column
    from netship.runtime_demo.side_by_side import Comparison, Row

_EPILOG = """\
examples:
  python -m runtime_demo.compare out/float32 out/int8 --model model.onnx --images photos/ --report page.html
  python -m runtime_demo.compare out/small out/large out/int8-m7 --model small.onnx large.onnx --images photos/
      builds of several networks: each is checked with the model that it was built from
  python -m runtime_demo.compare out/model-arm-cortex-a72 --estimate cortex-a72 --peers others.json
      others.json is what python -m bench compare … --json printed

Builds for this machine run here, others on an emulated board; without --images they run on their golden data.
What cannot run says why in its column. They are timed one after the other, each in alternation with ONNX Runtime.
Every figure has its origin; a ratio has two of one origin, and of one number of threads, board or CPU.
Exit codes: 0 all passed, 1 a build did not pass or run, 2 refused (one line says why), 130 Ctrl-C, 143 SIGTERM.
"""
_HEAD, _CELL = 42, 39


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    with Progress(quiet=arguments.json) as progress:
        result = compare_builds(arguments, progress)
    show_result(
        arguments,
        result.to_json(),
        escapes.lines(table(result)),
        lambda path: write_page(result, path),
    )
    return 0 if result.passed else 1


def _parser() -> argparse.ArgumentParser:
    parser = command_parser(
        "runtime_demo.compare",
        "Compare builds of one or several networks: speed, size, memory, and answers.",
        _EPILOG,
    )
    option = parser.add_argument
    option(
        "builds",
        type=named_path,
        nargs="+",
        metavar="DIR",
        help="folders that python -m compile.build made, of any format",
    )
    option(
        "--model",
        nargs="+",
        default=[],
        metavar="MODEL",
        help="the models that they were built from (default: only golden data are checked)",
    )
    option(
        "--images",
        type=named_path,
        nargs="+",
        default=[],
        metavar="IMAGE",
        help="images for all of them, .npy files of the input tensor, or folders of them; needs --model",
    )
    option(
        "--labels",
        type=named_path,
        metavar="FILE",
        help="as --labels of check, for all",
    )
    option(
        "--masks", type=named_path, metavar="DIR", help="as --masks of check, for all"
    )
    option(
        "--peers",
        type=named_path,
        nargs="+",
        default=[],
        metavar="FILE",
        help="more columns: what bench compare, runtime_demo.check (as on a board) or meter printed with --json",
    )
    option(
        "--estimate",
        metavar="CPU",
        help="estimate the cycles of builds for aarch64 on a core of the meter, cortex-a72 …",
    )
    option(
        "--threads",
        type=count,
        metavar="N",
        help="threads of what runs on this machine (default: the manifests', where they agree)",
    )
    option("--repeat", type=count, metavar="N", help="inferences to time (default: 50)")
    add_result_options(parser)
    return parser


def compare_builds(arguments: argparse.Namespace, progress: Progress) -> Comparison:
    """Check every build, and read the result files.

    Raises:
        UserError: a folder is no build, the inputs of two have nothing in common, a file is no result,
            or not one build can be run and there is no other column.
    """
    from netship.bundle.store import open_bundle
    from netship.meter.builds import names
    from netship.runtime_demo.result_files import read
    from netship.runtime_demo.side_by_side import Comparison, check_number

    progress.stage("verifying the builds")
    others = [column for path in arguments.peers for column in read(path)]
    bundles = [open_bundle(path) for path in arguments.builds]
    check_number(len(bundles) + len(others))
    _check_inputs(bundles, arguments)
    threads = _threads(bundles, arguments.threads)
    _check_estimate(bundles, arguments.estimate)
    if threads:
        # A session on an emulated board would give this process one thread.
        engine.runtime(threads)
    labels = names([bundle.path for bundle in bundles])
    columns = [
        _column(name, bundle, threads, arguments, progress)
        for name, bundle in zip(labels, bundles, strict=True)
    ]
    if all(column.refused for column in columns) and not others:
        raise UserError(columns[0].refused)
    return Comparison((*columns, *others))


def _check_inputs(bundles: Sequence[Bundle], arguments: argparse.Namespace) -> None:
    """Refuse images that not every build can take."""
    from netship.bundle import inputs

    if not arguments.images:
        return
    if not arguments.model:
        raise UserError(
            "--images needs --model: the reference answers come from ONNX Runtime on it"
        )
    first = bundles[0]
    found = inputs.find(arguments.images, first.manifest.inputs)
    arrays = any(path.suffix.lower() in (".npy", ".npz") for path in found)
    for other in bundles[1:]:
        ours, theirs = first.manifest.inputs, other.manifest.inputs
        kinds = [[(x.shape, x.dtype) for x in each] for each in (ours, theirs)]
        fits = [[x.is_image for x in each] for each in (ours, theirs)]
        if fits[0] != fits[1] or (arrays and kinds[0] != kinds[1]):
            said = [
                ", ".join(f"{dtype} {list(shape)}" for shape, dtype in kind)
                for kind in kinds
            ]
            raise UserError(
                f"--images: {first.path} takes {said[0]}, {other.path} takes {said[1]}: they cannot share these; compare them without --images"
            )


def _runs_here(bundle: Bundle) -> bool:
    from netship.targets.presets import this_cpu

    return bundle.manifest.target.machine == this_cpu().machine


def _threads(bundles: Sequence[Bundle], asked: int | None) -> int | None:
    """Of what runs on this machine, where one process has one number."""
    found = {b.manifest.threads for b in bundles if _runs_here(b)}
    if asked is None and len(found) > 1:
        numbers = " and ".join(map(str, sorted(found)))
        raise UserError(
            f"the builds have {numbers} threads; give --threads N, the same for all"
        )
    return asked or next(iter(found), None)


def _check_estimate(bundles: Sequence[Bundle], cpu: str | None) -> None:
    if cpu is None:
        return
    from netship.meter.memory import hierarchy

    hierarchy(cpu)
    if not any(_is_metered(bundle) for bundle in bundles):
        raise UserError("--estimate: no build is for aarch64; leave it out")


def _is_metered(bundle: Bundle) -> bool:
    return bundle.manifest.target.machine == "aarch64"


def _column(
    name: str,
    bundle: Bundle,
    threads: int | None,
    arguments: argparse.Namespace,
    progress: Progress,
) -> Column:
    from netship.runtime_demo.columns import column

    progress.finish()
    progress.note(f"{name}:")
    result, refused = None, []
    try:
        options = check_parser().parse_args(["--", str(bundle.path)])
        options.images, options.repeat = arguments.images, arguments.repeat
        options.report = arguments.report
        options.labels, options.masks = arguments.labels, arguments.masks
        options.model = _model_of(bundle, arguments.model, progress)
        if _runs_here(bundle):
            options.threads = threads
        else:
            options.repeat = None
            options.board = None if bundle.manifest.is_source else "emulated"
        result = check(options, progress)
    except UserError as error:
        refused.append(str(error))
    metered: Metered | None = None
    meter = ""
    if arguments.estimate and _is_metered(bundle):
        from netship.meter.counts import meter_version
        from netship.meter.operators import measure_bundle

        meter = meter_version()
        try:
            metered = measure_bundle(bundle.path, arguments.estimate, progress.stage)
        except UserError as error:
            refused.append(str(error))
    return column(name, bundle, result, "; ".join(refused), metered, meter)


def _model_of(bundle: Bundle, models: Sequence[str], progress: Progress) -> str | None:
    """The one that the build was made from; the first where none is, which the check then refuses."""
    from netship.bundle.store import sha256_of
    from netship.compile.frontend import sources

    for model in models[1:] and models:
        if Path(model).is_file():
            found = sha256_of(Path(model))
        else:
            source = sources.find(model, {}, None, progress.stage)
            found = source.model.identity.sha256
        if found == bundle.manifest.model.sha256:
            return model
    return models[0] if models else None


def table(result: Comparison) -> str:
    """The comparison for a terminal, under each figure its origin; as many columns in a block as fit."""
    lines = []
    for letter, column in zip(result.letters, result.columns, strict=True):
        lines.append(f"{letter}  {shown(column.name, 60)}: {shown(column.about, 160)}")
        if column.refused:
            lines.append(f"   could not run: {shown(column.refused, 400)}")
    rows = result.rows
    cells = [
        _cells(letter, column, rows, index)
        for index, (letter, column) in enumerate(
            zip(result.letters, result.columns, strict=True)
        )
    ]
    width = shutil.get_terminal_size((160, 24)).columns
    while cells:
        most = max(1, (width - _HEAD) // _CELL)
        lines += _block(rows, cells[:most])
        cells = cells[most:]
    if result.pairs:
        lines += ["", "Between two, differences of the first output"]
    for pair in result.pairs:
        note = f"; {pair.note}" if pair.note else ""
        lines.append(
            f"{'–'.join(pair.letters)}  {pair.text()}, {escapes.counted(pair.inputs, 'input')}, {pair.origin}{note}"
        )
    return "\n".join(lines)


def _cells(
    letter: str, column: Column, rows: Sequence[Row], index: int
) -> list[tuple[str, str]]:
    """Of one column its head, and for each row a figure and its origin."""
    texts = [(f"{letter}  {ending(column.name, _CELL - 5)}", "")]
    for row in rows:
        cell = row.cells[index]
        if cell is None:
            texts.append(("–", ""))
            continue
        fact = cell.fact
        ratio = f", {cell.ratio:.2f} ×" if cell.ratio else ""
        where = f", {fact.where}" if fact.where else ""
        origin = shown(f"{fact.origin}{where}", _CELL - 2)
        texts.append((f"{fact.text}{ratio}", origin))
    return texts


def _block(
    rows: Sequence[Row], columns: Sequence[Sequence[tuple[str, str]]]
) -> list[str]:
    """Some columns with all rows that one of them has."""
    lines, section = [], ""
    for index, row in enumerate(rows, 1):
        if not any(column[index][1] for column in columns):
            continue
        if row.kind.section != section:
            section = row.kind.section
            lines += ["", _line(section, [column[0][0] for column in columns])]
        lines.append(_line(f"  {row.kind.title}", [c[index][0] for c in columns]))
        lines.append(_line("", [c[index][1] for c in columns]))
    return lines


def _line(head: str, cells: Sequence[str]) -> str:
    return (f"{head:<{_HEAD}}" + "".join(f"{cell:<{_CELL}}" for cell in cells)).rstrip()


def write_page(result: Comparison, path: Path) -> None:
    """Write the comparison as one self-contained HTML page, whole or not at all."""
    from netship.targets import templates

    templates.write_page(
        path,
        "--report",
        Path(__file__).with_name("compare.html.jinja"),
        result=result,
        columns=list(zip(result.letters, result.columns, strict=True)),
    )


if __name__ == "__main__":
    run_command(main)
