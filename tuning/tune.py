"""``python -m tuning.tune``: search for quick schedules of a network's operators, for hours if you like."""

from __future__ import annotations

import argparse
import math
import os
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from netship.records import lookup
from netship.targets import interrupts
from netship.targets.arguments import (
    add_precision,
    as_json,
    check_key,
    command_parser,
    count_up_to,
    host_and_port,
    named_path,
    number_between,
)
from netship.targets.errors import UserError, run_command
from netship.targets.escapes import counted
from netship.targets.interrupts import Interrupted
from netship.targets.presets import Target, missing_features, native, resolve, this_cpu
from netship.targets.progress import Progress
from netship.tuning.supervision import Rounds, supervised

if TYPE_CHECKING:
    from netship.compile.frontend.sources import Source
    from netship.compile.ir.graph import Graph
    from netship.records.lookup import RecordLog
    from netship.tuning.gain import Gain
    from netship.tuning.measure import Measurer
    from netship.tuning.search import State
    from netship.tuning.tasks import Task

_TVM = "0.19.0"
_EPILOG = """\
where candidates are measured (default: on this machine, on a core of its own):
  --measure meter           by estimate: exact counts under QEMU, estimated cycles; for the arm-cortex targets
  --rpc HOST:PORT           a TVM RPC server on a board; repeat it for several. It runs any code it receives: keep
                            it on 127.0.0.1 there and tunnel with ssh -L 9090:127.0.0.1:9090 pi@raspberrypi
  --ssh USER@HOST           a board through ssh, its server started if need be (python -m runtime_demo.board)
  --tracker HOST:PORT --key KEY    all boards that a tracker has under KEY, at once

examples:
  python -m tuning.tune --model model.onnx --trials 4000
  python -m tuning.tune --target arm-cortex-a72 --model model.onnx --tracker 127.0.0.1:9190 --key pi4
  python -m tuning.tune --target arm-cortex-a72 --model model.onnx --measure meter --hours 8 \\
      --warm tuned/arm-cortex-a53-estimated.json
  nohup python -m tuning.tune … > tune.log &      runs in the background; the log has no escape codes

Every batch is on the disk before the next begins: a crash loses at most one batch. Ctrl-C ends the search and
keeps everything; the same command continues it, and --trials includes the trials in the log.
Each new best is measured again and must give the untuned kernel's answers before it counts.
Begin with --trials 64 × the number of tasks (22 in MobileNetV2); three times that gains the last few per cent.
Records of tasks that differ only in their shapes are fitted and tried first: for a second network of a tuned
family, 16 × the number of tasks may suffice.
Exit codes: 0 done, 2 refused (one line says why), 130 Ctrl-C, 143 SIGTERM.
"""
_count = count_up_to(10_000_000)


def main(argv: Sequence[str] | None = None) -> int:
    return supervised(partial(_run, parser().parse_args(argv)))


def _run(arguments: argparse.Namespace, rounds: Rounds) -> int:
    with Progress(quiet=arguments.json) as progress:
        tuned = tune(arguments, progress, quiet=arguments.json, rounds=rounds)
    if arguments.json:
        print(as_json(tuned.to_json()))
    return 0


def parser() -> argparse.ArgumentParser:
    parser = command_parser(
        "tuning.tune",
        "Search for quick schedules with AutoScheduler, operator by operator of a network.",
        _EPILOG,
    )
    add = parser.add_argument
    add("--model", required=True, help="as --model of python -m compile.build")
    add("--target", default="native", help="see python -m targets (default: native)")
    add_precision(parser)
    add(
        "--trials",
        type=_count,
        default=4000,
        metavar="N",
        help="in all, those already in the log included (default: 4000)",
    )
    hours = number_between(1e-6, 10_000, "a number of hours")
    add("--hours", type=hours, metavar="H", help="stop after so many hours")
    add("--measure", choices=["here", "meter"], default="here", help="see below")
    add("--rpc", action="append", default=[], metavar="HOST:PORT", help="see below")
    add("--ssh", action="append", default=[], metavar="USER@HOST", help="see below")
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
        type=named_path,
        metavar="FILE",
        help="the log (default: tuned/TARGET-ORIGIN.json, of float16 tuned/TARGET-ORIGIN-float16.json)",
    )
    add(
        "--warm",
        type=named_path,
        nargs="+",
        default=[],
        metavar="FILE",
        help="logs of any target and network whose best records are tried first (the shipped ones always are)",
    )
    add(
        "--tasks",
        metavar="TEXT",
        help="only tasks with TEXT in their operator, such as depthwise",
    )
    add(
        "--jobs",
        type=_count,
        default=os.cpu_count() or 1,
        metavar="N",
        help="candidates compiled at the same time (default: the number of cores; nothing is measured meanwhile)",
    )
    add("--json", action="store_true", help="print only one JSON object, at the end")
    return parser


def _check(arguments: argparse.Namespace) -> None:
    check_key(arguments)
    boards = bool(arguments.rpc or arguments.ssh)
    if bool(arguments.tracker) + boards + (arguments.measure == "meter") > 1:
        raise UserError(
            "--tracker, --measure meter and --rpc or --ssh: take one; each has a log of its own"
        )
    if arguments.measure == "meter" and arguments.threads > 1:
        raise UserError("--measure meter: it counts one thread; leave --threads out")


class TunedTask(NamedTuple):
    """A task of the network.

    Attributes:
        weight: how many layers share it.
        flops: of one run of the kernel.
        seconds: of the best record; None where no trial succeeded.
        trials, errors: in the log, and how many of them failed.
    """

    operator: str
    weight: int
    flops: float
    seconds: float | None
    trials: int
    errors: int


class Tuned(NamedTuple):
    """What a search came to.

    Attributes:
        header: of the log: target, origin, network, …
        gain: against an untuned build; None where it could not be measured.
    """

    header: Mapping[str, object]
    log: Path
    page: Path
    took_seconds: float
    gain: Gain | None
    tasks: tuple[TunedTask, ...]

    def to_json(self) -> dict[str, object]:
        return {
            **self.header,
            "log": str(self.log),
            "page": str(self.page),
            "took_seconds": self.took_seconds,
            "trials": sum(task.trials for task in self.tasks),
            "errors": sum(task.errors for task in self.tasks),
            "gain": self.gain and self.gain._asdict(),
            "tasks": [task._asdict() for task in self.tasks],
        }


def tune(
    arguments: argparse.Namespace,
    progress: Progress,
    quiet: bool,
    rounds: Rounds | None = None,
) -> Tuned:
    """Search as the options ask; without a table where ``quiet``.

    Args:
        rounds: of a search that is supervised.

    Raises:
        UserError: the options contradict each other, nothing can be tuned, or a device fails.
    """
    _check(arguments)
    target = resolve(arguments.target)
    if target.microcontroller:
        raise UserError(
            f"target {target.name}: takes C source, so there is nothing to tune; give another --target"
        )
    with ExitStack() as cleanup:
        progress.stage("preparing to measure")
        measurer = _measurer(target, arguments)
        cleanup.callback(measurer.close)
        tasks, source, graph = _tasks(target, arguments, progress)
        progress.finish()
        from netship.records.log import TuningLog
        from netship.tuning.page import write_search
        from netship.tuning.search import Limits, Search
        from netship.tuning.table import SearchTable
        from netship.tuning.tasks import peak

        header = {
            "target": target.tvm,
            "preset": target.name,
            "origin": str(measurer.origin),
            "measured": measurer.how,
            "numbers": arguments.precision,
            "threads": arguments.threads,
            "tvm": _TVM,
            "network": source.name,
        }
        # A CPU whose code this machine runs: the target's if possible, else its own.
        here = native() if missing_features(target, this_cpu()) else target
        output = arguments.output or _default_output(target, measurer, arguments)
        with TuningLog(output, header) as log:
            progress.note(
                f"{counted(len(tasks), 'task')}; {measurer.how}; log {output}"
            )
            held = log.read()
            for line in held.skipped:
                progress.note(line)
            most = peak(target, arguments.threads, arguments.precision)
            limits = Limits(arguments.trials, arguments.hours, most)
            started = time.monotonic()
            warm = _warm(arguments.warm, target, progress)
            table = SearchTable(limits, quiet=quiet)
            if held.lines:
                progress.stage(
                    f"reading {counted(len(held.lines), 'trial')} of the log"
                )
            search = Search(
                tasks,
                measurer,
                log,
                limits,
                prover=here.tvm,
                jobs=arguments.jobs,
                warm=warm,
                report=table.update,
                rounds=rounds,
            )
            cleanup.callback(search.close)
            progress.finish()
            progress.note(_reach(search.states, arguments.trials))
            if search.misfits:
                progress.note(
                    f"{output}: {counted(search.misfits, 'record')} ignored: made for another task"
                )
            page = output.with_suffix(".html")
            with table:
                try:
                    search.run()
                except Interrupted:
                    kept = sum(state.trials for state in search.states)
                    raise Interrupted(
                        f"interrupted: {counted(kept, 'trial')} kept in {output}; the same command goes on with them"
                    ) from None
                finally:
                    write_search(page, log.read(), search.states, limits.peak)
            seconds = time.monotonic() - started
            places = lookup.places(arguments.model)
            gain = _gain(
                graph,
                target,
                log.read(),
                measurer,
                arguments.threads,
                places,
                progress,
            )
            write_search(page, log.read(), search.states, limits.peak, gain)
            progress.note(f"log {output}; page {page}")
            found = tuple(map(_task, search.states))
            return Tuned(header, output, page, seconds, gain, found)


def _reach(states: Sequence[State], trials: int) -> str:
    """What a search of so many trials can come to, before it begins."""
    waiting = sum(math.isinf(state.best) for state in states)
    left = max(0, trials - sum(state.trials for state in states))
    known = f"{len(states) - waiting} of {counted(len(states), 'task')} have a time, {counted(left, 'trial')} to go"
    if left < waiting:
        more = trials + waiting - left
        return (
            f"{known}: too few for every task, and the others take fitted records of neighbours; "
            f"give --trials {more} or more"
        )
    each = f", about {left // len(states)} a task; 64 a task find most of the gain"
    return known + each


def _gain(
    graph: Graph,
    target: Target,
    log: RecordLog,
    measurer: Measurer,
    threads: int,
    places: Sequence[Path],
    progress: Progress,
) -> Gain | None:
    from netship.tuning.gain import compare

    progress.stage("comparing with an untuned build")
    others, _ = lookup.find(target, (), places, threads, log.numbers)
    try:
        logs = [log, *others]
        gain = interrupts.in_thread(partial(compare, graph, target.tvm, logs, measurer))
    except UserError as error:
        progress.finish()
        progress.note(str(error))
        return None
    progress.finish()
    progress.note(f"{measurer.origin}: {gain}")
    return gain


def _task(state: State) -> TunedTask:
    task, best = state.task, state.best
    seconds = best if math.isfinite(best) else None
    return TunedTask(
        task.operator, task.weight, task.flops, seconds, state.trials, state.errors
    )


def _default_output(
    target: Target, measurer: Measurer, arguments: argparse.Namespace
) -> Path:
    threads, numbers = arguments.threads, arguments.precision
    several = f"-{threads}-threads" if threads > 1 else ""
    half = f"-{numbers}" if numbers != "float32" else ""
    return lookup.user_log(target.name, measurer.origin.name.lower() + several + half)


def _tasks(
    target: Target, arguments: argparse.Namespace, progress: Progress
) -> tuple[list[Task], Source, Graph]:
    from netship.compile.frontend import sources
    from netship.tuning.tasks import extract, graph_of

    progress.stage("reading the model")
    source = sources.find(arguments.model, {}, None, progress.stage)
    progress.stage("finding the tasks")
    graph = graph_of(source, target, arguments, progress)
    name = source.model.identity.name
    tasks = interrupts.in_thread(
        partial(extract, name, graph, target, arguments.threads)
    )
    chosen = [task for task in tasks if (arguments.tasks or "") in task.operator]
    if not chosen:
        found = " | ".join(sorted({task.operator for task in tasks}))
        raise UserError(f"--tasks {arguments.tasks!r}: no such task of {found}")
    return chosen, source, graph


def _measurer(target: Target, arguments: argparse.Namespace) -> Measurer:
    threads, key = arguments.threads, arguments.key
    if arguments.measure == "meter":
        from netship.tuning.measure import MeterMeasurer

        return MeterMeasurer(target, arguments.jobs)
    if not (arguments.tracker or arguments.rpc or arguments.ssh):
        from netship.tuning.measure import LocalMeasurer

        return LocalMeasurer(target, threads)
    from netship.devices.transport.link import Address
    from netship.tuning import boards

    if arguments.tracker:
        tracker = Address(*host_and_port(arguments.tracker), key)
        found = boards.of_tracker(tracker)
    else:
        addresses = [Address(*host_and_port(each), key or "") for each in arguments.rpc]
        found = [boards.of_address(address) for address in addresses]
        found += [boards.of_ssh(each, key) for each in arguments.ssh]
    return boards.BoardMeasurer(target, found, threads)


def _warm(paths: Sequence[Path], target: Target, progress: Progress) -> list[RecordLog]:
    stated = [lookup.read(path, bare=True) for path in paths]
    for line in (line for log in stated for line in log.skipped):
        progress.note(line)
    return [*stated, *lookup.shipped(target)]


if __name__ == "__main__":
    run_command(main)
