"""``python -m tuning.tune``: search for quick schedules of a network's operators, for hours if need be."""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

from targets.errors import UserError, run_command
from targets.presets import Target, missing_features, native, resolve, this_cpu
from targets.progress import Progress
from tuning import records

if TYPE_CHECKING:
    from tuning.measure import Measurer
    from tuning.search import State

_TVM = "0.19.0"
_EPILOG = """\
where candidates are measured (default: on this machine, on a core of its own):
  --measure meter           nowhere: exact counts under QEMU, estimated cycles; for the arm-cortex targets
  --rpc HOST:PORT           a TVM RPC server on a board; repeat it for several. It runs whatever it is sent: keep
                            it on 127.0.0.1 there and tunnel with ssh -L 9090:127.0.0.1:9090 pi@raspberrypi
  --tracker HOST:PORT --key KEY    all boards that a tracker has under KEY, at once

examples:
  python -m tuning.tune --model model.onnx --trials 4000
  python -m tuning.tune --target arm-cortex-a72 --model model.onnx --tracker 127.0.0.1:9190 --key pi4
  python -m tuning.tune --target arm-cortex-a72 --model model.onnx --measure meter --hours 8 \\
      --warm ../shared/tuning/cortex-a72-1thread-float32-estimated.json
  nohup python -m tuning.tune … > tune.log &      leaves it running; no escape codes in a log

Every batch is on the disk before the next begins: a crash loses at most the one under way. Ctrl-C ends the
search and keeps everything; the same command goes on where it ended, --trials counting what the log already holds.
Each new best is measured again and must give the untuned kernel's answers before it counts.
Allow --trials 64 × the number of tasks (32 in MobileNetV2) for a start, three times that for the last per cents.
Exit codes: 0 done, 2 refused (one line says why), 130 interrupted.
"""


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    _check(arguments)
    with Progress() as progress:
        _tune(arguments, progress)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tuning.tune",
        description="Search for quick schedules with AutoScheduler, operator by operator of a network.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--model", required=True, help="as --model of compile.build")
    add("--target", default="native", help="see python -m targets (default: native)")
    add(
        "--trials",
        type=_count,
        default=4000,
        metavar="N",
        help="in all, those that the log already holds included (default: 4000)",
    )
    add("--hours", type=_hours, metavar="H", help="stop after so many hours")
    add("--measure", choices=["here", "meter"], default="here", help="see below")
    add("--rpc", action="append", default=[], metavar="HOST:PORT", help="see below")
    add("--tracker", metavar="HOST:PORT", help="see below; needs --key")
    add("--key", help="the boards' key at the tracker, or the servers'")
    add(
        "--threads",
        type=_count,
        default=1,
        metavar="N",
        help="of an inference (default: 1)",
    )
    add(
        "--output",
        type=Path,
        metavar="FILE",
        help="the log (default: tuned/TARGET-ORIGIN.json)",
    )
    add(
        "--warm",
        type=Path,
        nargs="+",
        default=[],
        metavar="FILE",
        help="logs of any target whose best records are tried first (the shipped ones always are)",
    )
    add(
        "--tasks",
        metavar="TEXT",
        help="only tasks with TEXT in their operator, such as depthwise",
    )
    add(
        "--jobs",
        type=_count,
        default=max(1, (os.cpu_count() or 2) - 1),
        metavar="N",
        help="candidates compiled at a time (default: one less than the cores)",
    )
    return parser


def _count(text: str) -> int:
    if not text.isdecimal() or not 0 < int(text) <= 10_000_000:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 on")
    return int(text)


def _hours(text: str) -> float:
    try:
        hours = float(text)
    except ValueError:
        hours = 0.0
    if not 0 < hours < 10_000:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of hours")
    return hours


def _check(arguments: argparse.Namespace) -> None:
    if arguments.tracker and not arguments.key:
        raise UserError("--tracker needs --key KEY: which of its boards?")
    if arguments.key and not (arguments.tracker or arguments.rpc):
        raise UserError("--key goes with --tracker or --rpc; leave it out")
    places = [arguments.tracker, arguments.rpc, arguments.measure == "meter"]
    if sum(map(bool, places)) > 1:
        raise UserError(
            "--tracker, --rpc and --measure meter: records of each need a log of their own; take one"
        )
    if arguments.measure == "meter" and arguments.threads > 1:
        raise UserError("--measure meter: it counts one thread; leave --threads out")


def _tune(arguments: argparse.Namespace, progress: Progress) -> None:
    target = resolve(arguments.target)
    if target.format == "c":
        raise UserError(
            f"target {target.name}: AutoScheduler has no part in C source; nothing to tune"
        )
    from compile import sources

    progress.stage("reading the model")
    source = sources.find(arguments.model, {}, None, progress.stage)
    progress.stage("finding the tasks")
    from tuning.tasks import extract, peak

    tasks = extract(source.model, target, arguments.threads)
    if arguments.tasks:
        chosen = [task for task in tasks if arguments.tasks in task.operator]
        if not chosen:
            found = ", ".join(sorted({task.operator for task in tasks}))
            raise UserError(
                f"--tasks {arguments.tasks!r}: no such task; there are {found}"
            )
        tasks = chosen
    progress.stage("making ready to measure")
    with closing(_measurer(target, arguments)) as measurer:
        progress.finish()
        from tuning.log import TuningLog
        from tuning.search import Limits, Search

        header = {
            "target": target.tvm,
            "preset": target.name,
            "origin": str(measurer.origin),
            "measured": measurer.how,
            "threads": arguments.threads,
            "tvm": _TVM,
            "network": source.name,
        }
        # A CPU that this machine can be: its own, or the target's where it has all that it needs.
        here = native() if missing_features(target, this_cpu()) else target
        output = arguments.output or records.user_log(
            target.name, measurer.origin.name.lower()
        )
        with TuningLog(output, header) as log:
            progress.note(f"{len(tasks)} tasks; {measurer.how}; log {output}")
            for line in log.read().skipped:
                progress.note(line)
            limits = Limits(
                arguments.trials, arguments.hours, peak(target, arguments.threads)
            )
            search = Search(
                tasks,
                measurer,
                log,
                limits,
                prover=here.tvm,
                jobs=arguments.jobs,
                warm=_warm(arguments.warm, progress),
                report=_reporter(),
            )
            with closing(search):
                search.run()


def _measurer(target: Target, arguments: argparse.Namespace) -> Measurer:
    if arguments.tracker or arguments.rpc:
        from tuning import boards

        key = arguments.key or ""
        found = (
            boards.of_tracker(*_address(arguments.tracker), key)
            if arguments.tracker
            else [boards.at(*_address(each), key) for each in arguments.rpc]
        )
        return boards.BoardMeasurer(target, found, arguments.threads)
    from tuning.measure import LocalMeasurer, MeterMeasurer

    if arguments.measure == "meter":
        return MeterMeasurer(target, arguments.jobs)
    return LocalMeasurer(target, arguments.threads)


def _address(text: str) -> tuple[str, int]:
    host, _, port = text.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 1 << 16:
        raise UserError(f"{text!r} is not HOST:PORT, such as 127.0.0.1:9090")
    return host.strip("[]"), int(port)


def _warm(paths: Sequence[Path], progress: Progress) -> list[str]:
    logs = [records.read(path, bare=True) for path in paths]
    for line in (line for log in logs for line in log.skipped):
        progress.note(line)
    logs += [records.read(path) for path in sorted(records.SHIPPED.glob("*.json"))]
    return [line for log in logs for line in log.lines]


def _reporter() -> Callable[[list[State], State], None]:
    """A line a round."""
    started = time.monotonic()
    before: list[int] = []

    def report(states: list[State], current: State) -> None:
        seconds = time.monotonic() - started
        trials, errors = (
            sum(state.trials for state in states),
            sum(state.errors for state in states),
        )
        before.append(trials)
        total = sum(state.best * state.task.weight for state in states) * 1e3
        rate = (trials - before[0]) / seconds * 60
        print(
            f"{seconds:7.0f} s  {trials:6d} trials, {errors} errors, {rate:4.0f}/min  "
            f"total {total:.3f} ms  {current.task.operator}: {current.best * 1e6:.1f} µs",
            flush=True,
        )

    return report


if __name__ == "__main__":
    run_command(main)
