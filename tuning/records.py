"""``python -m tuning.records``: reduce, merge and check logs, and list the tasks of a network that they cover."""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from bundle.store import sha256_of
from records import lookup
from records.lookup import Record, RecordLog
from targets.arguments import count_up_to
from targets.errors import UserError, run_command
from targets.files import check_writable, write_whole
from targets.presets import resolve
from targets.progress import Progress

_EPILOG = """\
examples:
  python -m tuning.records best tuned/znver4-host.json --keep 2 --output znver4.json
  python -m tuning.records coverage --model model.onnx --target znver4
  python -m tuning.records merge monday.json tuesday.json --output week.json
  python -m tuning.records check tuned/*.json
  python -m tuning.records manifest records/shipped/*.json > records/shipped/MANIFEST.md

Exit codes: 0 fine, 1 check found a problem or coverage a task without records, 2 refused (one line says why).
"""
# Header fields in which logs must agree to be merged.
_SAME = ("origin", "tvm", "threads")


class Covered(NamedTuple):
    """A task of a network, and the record that a build would take, if any."""

    operator: str
    weight: int
    flops: float
    log: RecordLog | None
    record: Record | None


_count = count_up_to(100_000)


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    code: int = arguments.action(arguments)
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tuning.records",
        description="Tuning records: AutoScheduler's JSON lines below a header, one origin and target a file.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verbs = parser.add_subparsers(required=True, metavar="VERB")
    verb = verbs.add_parser("best", help="keep the best few records of each task")
    verb.set_defaults(action=_best)
    verb.add_argument("log", type=Path, metavar="FILE")
    verb.add_argument(
        "--keep",
        type=_count,
        default=2,
        metavar="K",
        help="records for each task (default: 2)",
    )
    verb.add_argument("--output", type=Path, required=True, metavar="FILE")
    verb = verbs.add_parser("coverage", help="which tasks of a network have records")
    verb.set_defaults(action=_coverage)
    verb.add_argument("--model", required=True, help="as --model of compile.build")
    verb.add_argument(
        "--target", default="native", help="see python -m targets (default: native)"
    )
    verb.add_argument(
        "--records",
        type=Path,
        nargs="+",
        default=[],
        metavar="FILE",
        help="preferred to those found in tuned/ and the shipped ones",
    )
    verb.add_argument("--json", action="store_true", help="one JSON object")
    verb = verbs.add_parser(
        "merge",
        help="merge logs of one target and origin; repeated records are dropped",
    )
    verb.set_defaults(action=_merge)
    verb.add_argument("logs", type=Path, nargs="+", metavar="FILE")
    verb.add_argument("--output", type=Path, required=True, metavar="FILE")
    verb = verbs.add_parser(
        "check", help="list every line that is cut short, foreign or of another version"
    )
    verb.set_defaults(action=_check)
    verb.add_argument("logs", type=Path, nargs="+", metavar="FILE")
    verb.add_argument("--json", action="store_true", help="one JSON object")
    verb = verbs.add_parser(
        "manifest", help="a table of logs: target, network, how measured, date, SHA-256"
    )
    verb.set_defaults(action=_manifest)
    verb.add_argument("logs", type=Path, nargs="+", metavar="FILE")
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
    """One log of several, each record once.

    Raises:
        UserError: they are of different targets, origins, TVM versions or thread counts.
    """
    first = logs[0]
    for other in logs[1:]:
        _expect(first, other, "target", _target(first), _target(other))
        for key in _SAME:
            ours, theirs = (
                log.origin if key == "origin" else log.header.get(key)
                for log in (first, other)
            )
            _expect(first, other, key, ours, theirs)
    measured = dict.fromkeys(log.measured for log in logs)
    header = first.header | {"measured": "; ".join(measured)}
    header.pop("trials", None)
    found = {record.line: record for log in logs for record in log.records}
    return RecordLog(first.name, header, tuple(found.values()), ())


def _target(log: RecordLog) -> str:
    return lookup.canonical(str(log.header.get("target", "")))


def _expect(
    one: RecordLog, other: RecordLog, what: str, ours: object, theirs: object
) -> None:
    if ours != theirs:
        raise UserError(
            f"{other.name}: its {what} is {theirs!r}, that of {one.name} {ours!r}; such records are not "
            "comparable: keep them in files of their own"
        )


def _write(log: RecordLog, output: Path) -> None:
    text = "\n".join([f"# {json.dumps(log.header, ensure_ascii=False)}", *log.lines])
    write_whole(output, f"{text}\n".encode(), "--output")


def _best(arguments: argparse.Namespace) -> int:
    check_writable(arguments.output, "--output")
    log = lookup.read(arguments.log)
    kept = distil(log, arguments.keep)
    _write(kept, arguments.output)
    for line in log.skipped:
        print(line)
    print(
        f"{arguments.output}: {len(kept.lines)} records of {len(log.best)} tasks, out of {len(log.lines)} trials"
    )
    return 0


def _merge(arguments: argparse.Namespace) -> int:
    check_writable(arguments.output, "--output")
    logs = [lookup.read(path) for path in arguments.logs]
    whole = merge(logs)
    _write(whole, arguments.output)
    for line in (line for log in logs for line in log.skipped):
        print(line)
    total = sum(len(log.lines) for log in logs)
    print(
        f"{arguments.output}: {len(whole.lines)} records of {len(whole.best)} tasks, "
        f"{total - len(whole.lines)} repeats dropped"
    )
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
        ours = _target(log)
        for target, count in Counter(map(_line_target, log.lines)).items():
            if ours and lookup.canonical(target) != ours:
                problems.append(
                    f"{path}: {count} records are of target {target!r}, the header says {ours!r}"
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
        print(json.dumps(found, indent=2, ensure_ascii=False))
        return int(any(each["problems"] for each in found))
    for each in found:
        for line in each["problems"]:
            print(line)
        if "records" in each:
            print(
                f"{each['file']}: {each['records']} records of {each['tasks']} tasks, "
                f"{each['errors']} of them errors, {each['origin'] or 'origin not said'}"
            )
    return int(any(each["problems"] for each in found))


def _line_target(line: str) -> str:
    return str(json.loads(line)["i"][0][1])


def _manifest(arguments: argparse.Namespace) -> int:
    print(manifest(arguments.logs), end="")
    return 0


def manifest(paths: Sequence[Path]) -> str:
    """A Markdown table with a row for each log; its date is that of the newest record.

    Raises:
        UserError: one cannot be read.
    """
    lines = [
        "| file | target | network | tasks | out of trials | measured | newest | TVM | SHA-256 |",
        "|---|---|---|--:|--:|---|---|---|---|",
    ]
    for path in paths:
        log = lookup.read(path)
        newest = max((record.when for record in log.records), default=0.0)
        cells = [
            path.name,
            log.preset,
            log.header.get("network", "not said"),
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
        logs, notes = lookup.find(target, arguments.records)
        progress.stage("finding the network's tasks")
        from compile.frontend import sources
        from tuning.tasks import extract

        model = sources.find(arguments.model, {}, None, progress.stage).model
        rows = []
        for task in extract(model, target):
            log = next((log for log in logs if task.key in log.best), None)
            record = log.best[task.key][0] if log else None
            rows.append(Covered(task.operator, task.weight, task.flops, log, record))
    covered = sum(row.record is not None for row in rows)
    if arguments.json:
        tasks = [_fields(row) for row in rows]
        print(
            json.dumps(
                {
                    "target": target.name,
                    "tasks": len(rows),
                    "covered": covered,
                    "rows": tasks,
                },
                indent=2,
                ensure_ascii=False,
            )
        )
    else:
        print("\n".join([*notes, *_table(rows)]))
        print(f"{covered} of {len(rows)} tasks have records for {target.name}")
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
