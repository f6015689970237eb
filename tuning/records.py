"""``python -m tuning.records``: reduce, merge and check logs, and list the tasks of a network that they cover."""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from netship.bundle.store import sha256_of
from netship.records import lookup
from netship.records.lookup import Record, RecordLog
from netship.targets.arguments import (
    add_json,
    add_precision,
    as_json,
    command_parser,
    count_up_to,
    file_to_write,
    named_path,
)
from netship.targets.errors import UserError, run_command
from netship.targets.escapes import counted
from netship.targets.files import write_whole
from netship.targets.presets import resolve
from netship.targets.progress import Progress

_EPILOG = """\
examples:
  python -m tuning.records best tuned/znver4-host.json --keep 2 --output znver4.json
  python -m tuning.records coverage --model model.onnx --target znver4
  python -m tuning.records merge monday.json tuesday.json --output week.json
  python -m tuning.records check tuned/*.json
  python -m tuning.records manifest records/shipped/*.json > records/shipped/MANIFEST.md

Exit codes: 0 fine, 1 check found a problem or coverage a task without records, 2 refused (one line says why).
"""


class Covered(NamedTuple):
    """A task of a network, and the record that a build would take, if any."""

    operator: str
    weight: int
    flops: float
    log: RecordLog | None
    record: Record | None


_count = count_up_to(100_000)
Action = Callable[[argparse.Namespace], int]


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    code: int = arguments.action(arguments)
    return code


def _parser() -> argparse.ArgumentParser:
    parser = command_parser(
        "tuning.records",
        "Tuning records: AutoScheduler's JSON lines below a header, one origin and target a file.",
        _EPILOG,
    )
    verbs = parser.add_subparsers(required=True, metavar="VERB")

    def verb(name: str, action: Action, what: str) -> argparse.ArgumentParser:
        added = verbs.add_parser(name, help=what)
        added.set_defaults(action=action)
        return added

    output = file_to_write("--output")
    best = verb("best", _best, "keep the best few records of each task")
    best.add_argument("log", type=named_path, metavar="FILE")
    best.add_argument(
        "--keep",
        type=_count,
        default=2,
        metavar="K",
        help="records for each task (default: 2)",
    )
    best.add_argument("--output", type=output, required=True, metavar="FILE")
    coverage = verb("coverage", _coverage, "which tasks of a network have records")
    coverage.add_argument(
        "--model", required=True, help="as --model of python -m compile.build"
    )
    coverage.add_argument(
        "--target", default="native", help="see python -m targets (default: native)"
    )
    add_precision(coverage)
    coverage.add_argument(
        "--records",
        type=named_path,
        nargs="+",
        default=[],
        metavar="FILE",
        help="preferred to those that a build finds by itself",
    )
    what = "merge logs of one target and origin; repeated records are dropped"
    merged = verb("merge", _merge, what)
    merged.add_argument("--output", type=output, required=True, metavar="FILE")
    what = "list every line that is cut short, foreign or of another version"
    checked = verb("check", _check, what)
    what = "a table of logs: target, network, how measured, date, SHA-256"
    listed = verb("manifest", _manifest, what)
    for several in (merged, checked, listed):
        several.add_argument("logs", type=named_path, nargs="+", metavar="FILE")
    for reader in (coverage, checked):
        add_json(reader)
    return parser


def distil(log: RecordLog, keep: int) -> RecordLog:
    """The best ``keep`` records of each task, without errors; the header says so."""
    best = [record for own in log.best.values() for record in own[:keep]]
    header = log.header | {
        "trials": log.header.get("trials", len(log.lines)),
        "kept": f"the best {keep} records a task",
    }
    return RecordLog(log.name, header, tuple(best), ())


def merge(logs: Sequence[RecordLog]) -> RecordLog:
    """One log of several, each record once."""
    first = logs[0]
    for other in logs[1:]:
        for what, ours in first.comparable.items():
            if (theirs := other.comparable[what]) != ours:
                raise UserError(
                    f"{other.name}: its {what} is {theirs!r}, that of {first.name} {ours!r}; such records "
                    "are not comparable: keep them in files of their own"
                )
    measured = dict.fromkeys(log.measured for log in logs)
    header = first.header | {"measured": "; ".join(measured)}
    header.pop("trials", None)
    found = {record.line: record for log in logs for record in log.records}
    return RecordLog(first.name, header, tuple(found.values()), ())


def _write(arguments: argparse.Namespace, kept: RecordLog, skipped: list[str]) -> str:
    """Write a log and show the lines that were skipped; the beginning of the line that says so."""
    write_whole(arguments.output, kept.text.encode(), "--output")
    for line in skipped:
        print(line)
    return f"{arguments.output}: {counted(len(kept.lines), 'record')} of {counted(len(kept.best), 'task')}"


def _best(arguments: argparse.Namespace) -> int:
    log = lookup.read(arguments.log)
    done = _write(arguments, distil(log, arguments.keep), list(log.skipped))
    print(f"{done}, out of {counted(len(log.lines), 'trial')}")
    return 0


def _merge(arguments: argparse.Namespace) -> int:
    logs = [lookup.read(path) for path in arguments.logs]
    whole = merge(logs)
    done = _write(arguments, whole, [line for log in logs for line in log.skipped])
    repeats = sum(len(log.lines) for log in logs) - len(whole.lines)
    print(f"{done}, {counted(repeats, 'repeat')} dropped")
    return 0


def _check(arguments: argparse.Namespace) -> int:
    found: list[dict[str, Any]] = []
    for path in arguments.logs:
        try:
            log = lookup.read(path)
        except UserError as error:
            found.append({"file": str(path), "problems": [str(error)]})
            continue
        problems = list(log.skipped)
        if not log.origin:
            problems.append(
                f"{path}:1: measured {log.measured!r}: begins with none of {', '.join((*lookup.ORIGINS, lookup.EMULATED))}"
            )
        ours = log.comparable["target"]
        for target, count in Counter(map(_line_target, log.lines)).items():
            if ours and lookup.canonical(target) != ours:
                problems.append(
                    f"{path}: {counted(count, 'record')} of target {target!r}, the header says {ours!r}"
                )
        found.append(
            {
                "file": str(path),
                "records": len(log.lines),
                "tasks": len(log.best),
                "errors": sum(record.error != 0 for record in log.records),
                "origin": log.origin,
                "problems": problems,
            }
        )
    if arguments.json:
        print(as_json(found))
    for each in [] if arguments.json else found:
        for line in each["problems"]:
            print(line)
        if "records" in each:
            print(
                f"{each['file']}: {counted(each['records'], 'record')} of {counted(each['tasks'], 'task')}, "
                f"{each['errors']} of them errors, {each['origin'] or 'origin not said'}"
            )
    return int(any(each["problems"] for each in found))


def _line_target(line: str) -> str:
    return str(json.loads(line)["i"][0][1])


def _manifest(arguments: argparse.Namespace) -> int:
    print(manifest(arguments.logs), end="")
    return 0


def manifest(paths: Sequence[Path]) -> str:
    """A Markdown table with a row for each log; its date is that of the newest record."""
    lines = [
        "| file | target | network | numbers | tasks | out of trials | measured | newest | TVM | SHA-256 |",
        "|---|---|---|---|--:|--:|---|---|---|---|",
    ]
    for path in paths:
        log = lookup.read(path)
        newest = max((record.when for record in log.records), default=0.0)
        cells = [
            path.name,
            log.preset,
            log.header.get("network", "not said"),
            log.numbers,
            len(log.best),
            log.header.get("trials", len(log.lines)),
            log.measured,
            datetime.fromtimestamp(newest, UTC).date(),
            log.header.get("tvm", "not said"),
            f"`{sha256_of(path)}`",
        ]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join([*lines, ""])


def _coverage(arguments: argparse.Namespace) -> int:
    target = resolve(arguments.target)
    if target.microcontroller:
        raise UserError(f"target {target.name}: takes C source, which is not tuned")
    with Progress(quiet=arguments.json) as progress:
        places, numbers = lookup.places(arguments.model), arguments.precision
        logs, notes = lookup.find(target, arguments.records, places, numbers=numbers)
        progress.stage("finding the network's tasks")
        from netship.compile.frontend import sources
        from netship.tuning.tasks import extract, graph_of

        source = sources.find(arguments.model, {}, None, progress.stage)
        graph = graph_of(source, target, arguments, progress)
        rows = []
        for task in extract(source.model.identity.name, graph, target):
            log = next((log for log in logs if task.key in log.best), None)
            record = log.best[task.key][0] if log else None
            rows.append(Covered(task.operator, task.weight, task.flops, log, record))
    covered = sum(row.record is not None for row in rows)
    if arguments.json:
        whole = {
            "target": target.name,
            "numbers": numbers,
            "tasks": len(rows),
            "covered": covered,
            "rows": [_fields(row) for row in rows],
        }
        print(as_json(whole))
    else:
        print("\n".join([*notes, *_table(rows)]))
        where = f"{target.name}, {numbers}"
        print(f"{covered} of {counted(len(rows), 'task')} have records for {where}")
    return int(covered < len(rows))


def _fields(row: Covered) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "operator": row.operator,
        "weight": row.weight,
        "flops": row.flops,
    }
    if row.log and row.record:
        fields |= {
            "microseconds": row.record.seconds * 1e6,
            "gflops": row.flops / row.record.seconds / 1e9,
            "origin": row.log.origin,
            "file": row.log.name,
            "days": _days(row.record),
        }
    return fields


def _table(rows: Sequence[Covered]) -> list[str]:
    width = max(len(row.operator) for row in rows)
    lines = [f"{'task':<{width}}  ×  best µs  GFLOP/s  days  measured"]
    for row in rows:
        start = f"{row.operator:<{width}} {row.weight:2d}"
        if row.log and row.record:
            lines.append(
                f"{start} {row.record.seconds * 1e6:8.1f} {row.flops / row.record.seconds / 1e9:8.1f} "
                f"{_days(row.record):5.0f}  {row.log.origin} ({row.log.name})"
            )
        else:
            lines.append(f"{start}        —        —     —  no record")
    return lines


def _days(record: Record) -> float:
    return max(0.0, (time.time() - record.when) / 86400)


if __name__ == "__main__":
    run_command(main)
