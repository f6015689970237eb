"""``python -m tuning.refine``: for each task, choose the record that is quickest inside the network.

Tuning times each task in isolation, with caches only roughly as they are inside a network. Here the whole network is
built with the first, second, … best record of every task and timed operator by operator; each task keeps the record
that was quickest there.
"""

from __future__ import annotations

import argparse
import math
import os
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, NamedTuple

from netship.devices.sessions.session import Origin
from netship.records import lookup
from netship.records.lookup import Record, RecordLog
from netship.targets.arguments import (
    add_calibration,
    command_parser,
    count_up_to,
    file_to_write,
    named_path,
)
from netship.targets.child import run_in_child
from netship.targets.errors import UserError, run_command
from netship.targets.escapes import counted
from netship.targets.files import cache_key, write_whole
from netship.targets.presets import Target, missing_features, resolve, this_cpu
from netship.targets.progress import Progress

if TYPE_CHECKING:
    from netship.bundle.store import Bundle

_EPILOG = """\
If this machine can run the target's code, it times inferences of all builds in turn and takes each operator's median.
For another Cortex-A target the meter estimates core and memory cycles. A build takes half a minute. Builds of an earlier
run are used again, so an interrupted run continues where it ended.

example:
  python -m tuning.refine --model model.onnx --records tuned/znver4-host.json --output tuned/znver4-refined.json

The output holds one record for each task; builds find it by themselves in tuned/. Do not use the machine meanwhile.
Exit codes: 0 done, 2 refused (one line says why), 130 Ctrl-C, 143 SIGTERM.
"""
# Inferences of one build in a turn; the first one fills the caches and is not counted.
_TURN = 5
# A difference of less than this share of a task's time is noise.
_WORTH = 0.01


class Choice(NamedTuple):
    """The record chosen for a task.

    Attributes:
        build: the index of the build with that record.
        costs: for each build, the cost of all runs of the task in an inference, in seconds or cycles.
    """

    workload: str
    build: int
    costs: tuple[float, ...]


_count = count_up_to(10_000)


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    with Progress() as progress:
        _refine(arguments, progress)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = command_parser(
        "tuning.refine",
        "Choose among each task's best records by their time inside the network.",
        _EPILOG,
    )
    add = parser.add_argument
    add("--model", required=True, help="as --model of python -m compile.build")
    add("--target", default="native", help="see python -m targets (default: native)")
    add(
        "--records", type=named_path, required=True, metavar="FILE", help="a tuning log"
    )
    output = file_to_write("--output")
    add(
        "--output",
        type=output,
        required=True,
        metavar="FILE",
        help="the chosen records",
    )
    add(
        "--top",
        type=_count,
        default=6,
        metavar="K",
        help="records tried for each task (default: 6)",
    )
    add(
        "--rounds",
        type=_count,
        default=40,
        metavar="N",
        help=f"turns of each build, each of {_TURN - 1} timed inferences (default: 40)",
    )
    add("--threads", type=_count, default=1, metavar="N", help="default: 1")
    add_calibration(parser)
    return parser


def _refine(arguments: argparse.Namespace, progress: Progress) -> None:
    target = resolve(arguments.target)
    log = lookup.read(arguments.records, bare=True)
    for line in log.skipped:
        progress.note(line)
    if not log.best:
        raise UserError(f"{arguments.records}: no record without an error; tune first")
    here = not missing_features(target, this_cpu())
    if not here and arguments.threads > 1:
        raise UserError("--threads: the meter counts one; leave it out")
    work = _Work(arguments, target, log, here, progress)
    builds = [work.build(0)]
    tasks = {group.task for group in builds[0].bundle.manifest.lowering.groups}
    if not tasks & log.best.keys():
        raise UserError(
            f"{arguments.records}: no record of a task of {arguments.model}; give a log of this network"
        )
    for rank in range(1, arguments.top):
        try:
            builds.append(work.build(rank))
        except UserError as error:
            progress.finish()
            progress.note(f"rank {rank + 1} left out: {error}")
    costs = [_by_task(*pair) for pair in work.measure(builds)]
    # A task without a record in the log is the same in every build.
    choices = [each for each in choose(costs) if each.workload in log.best]
    picked = {choice.workload: builds[choice.build].records for choice in choices}
    kept = {key: picked.get(key, builds[0].records)[key] for key in log.best}
    final = work.build_of(kept, "the network with what was chosen")
    before, after = (sum(costs) for _, costs in work.measure([builds[0], final]))
    progress.finish()
    print(_table(choices, here))
    if after < before:
        chosen, verdict = kept, "kept"
        which = "the record that is quickest inside the network"
    else:
        chosen = builds[0].records
        verdict = "no better: each task keeps its quickest record in isolation"
        which = "the one that is quickest in isolation; inside the network no other was quicker"
    print(
        f"whole network, sum of its operators: {_words(before, here)} with the records that are best in isolation, "
        f"{_words(after, here)} with those that are best in the network, {after / before:.3f} ×: {verdict}"
    )
    origin = Origin.HOST if here else Origin.ESTIMATED
    missing = {"origin": origin, "measured": f"{origin}: chosen inside the network"}
    header = {
        "target": target.tvm,
        **log.header,
        **({} if log.origin else missing),
        "preset": target.name,
        "kept": f"of each task's {len(builds)} best {which}",
    }
    made = replace(log, header=header, records=tuple(chosen.values()))
    write_whole(arguments.output, made.text.encode(), "--output")
    print(f"written: {arguments.output}, {counted(len(made.lines), 'record')}")


class _Build(NamedTuple):
    records: dict[str, Record]
    bundle: Bundle


class _Work:
    """Builds and measures; builds are kept in a folder next to the output."""

    def __init__(
        self,
        arguments: argparse.Namespace,
        target: Target,
        log: RecordLog,
        here: bool,
        progress: Progress,
    ) -> None:
        self._arguments, self._target, self._log = arguments, target, log
        self._here, self._progress = here, progress
        self._folder = arguments.output.with_suffix(".builds")

    def build(self, rank: int) -> _Build:
        """The network with record ``rank`` of each task, best first; a task with fewer records takes its last."""
        chosen = {
            key: own[min(rank, len(own) - 1)] for key, own in self._log.best.items()
        }
        return self.build_of(chosen, f"the network with each task's record {rank + 1}")

    def build_of(self, chosen: dict[str, Record], what: str) -> _Build:
        from netship.bundle.store import open_bundle
        from netship.compile.backends.request import BuildRequest
        from netship.compile.driver import build

        header = self._log.header | {"preset": self._target.name}
        records = tuple(chosen.values())
        text = replace(self._log, header=header, records=records).text
        path = self._folder / f"{cache_key(text)}.json"
        self._progress.finish()
        self._progress.note(what)
        self._folder.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        request = BuildRequest(
            model=self._arguments.model,
            target=self._target,
            threads=self._arguments.threads,
            records=(path,),
            require_tuned=True,
            precision="float16" if self._log.numbers == "float16" else "float32",
            calibration=tuple(self._arguments.calibration),
        )
        output = self._folder / request.key(self._progress.stage)
        if output.exists():
            return _Build(chosen, open_bundle(output))
        return _Build(chosen, build(replace(request, output=output), self._progress))

    def measure(self, builds: Sequence[_Build]) -> list[tuple[Bundle, list[float]]]:
        """The cost of each kernel of each build, in order of execution."""
        bundles = [each.bundle for each in builds]
        if not self._here:
            return [(bundle, self._count(bundle)) for bundle in bundles]
        paths = list(dict.fromkeys(bundle.path for bundle in bundles))
        try:
            costs = self._time(paths)
        except UserError as error:
            # The debug executor's process crashed once in some hundred runs; a crash must not lose hours of builds.
            self._progress.finish()
            self._progress.note(f"timing again: {error}")
            costs = self._time(paths)
        timed = dict(zip(paths, costs, strict=True))
        return [(bundle, timed[bundle.path]) for bundle in bundles]

    def _time(self, paths: Sequence[Path]) -> list[list[float]]:
        self._progress.stage(f"timing {len(paths)} builds in turn")
        return run_in_child(
            time_in_turn,
            paths,
            self._arguments.rounds,
            self._arguments.threads,
            stage=self._progress.stage,
            tick=self._progress.tick,
        )

    def _count(self, bundle: Bundle) -> list[float]:
        from netship.meter.operators import measure_bundle

        metered = measure_bundle(bundle.path, self._target.core, self._progress.stage)
        each = {
            operator.name: operator.cycles / max(operator.calls, 1)
            for operator in metered.operators
        }
        return [each[group.name] for group in bundle.manifest.lowering.groups]


def time_in_turn(
    paths: Sequence[Path], rounds: int, threads: int, stage: Callable[[str], None]
) -> list[list[float]]:
    """Median seconds of each kernel of each bundle inside whole inferences; the bundles take turns.

    Noise thus affects all alike. It must run in its own process, and uses the last cores that it may.
    """

    from netship.bundle.golden import of_all, seeded_inputs
    from netship.bundle.store import open_bundle
    from netship.devices.sessions import huge_pages
    from netship.devices.sessions.graph import kernel_seconds
    from netship.targets import engine

    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[-threads:])
    tvm = engine.runtime(threads)
    stage(f"timing {len(paths)} builds in turn, {counted(rounds, 'round')}")
    executors = []
    for bundle in map(open_bundle, paths):
        library = tvm.runtime.load_module(str(bundle.library))
        executor = library["debug_create"]("default", tvm.cpu())
        ports = bundle.manifest.inputs
        (values, *_) = of_all(seeded_inputs, ports, bundle.manifest.preprocessing)
        huge_pages.use_for_parameters(executor)
        for port, value in zip(ports, values, strict=True):
            executor["get_input"](port.name).copyfrom(value)
        executors.append(executor["profile_rpc"])
    runs: list[list[list[float]]] = [[] for _ in executors]
    for _ in range(rounds):
        for own, profile in zip(runs, executors, strict=True):
            turn = [kernel_seconds(profile()) for _ in range(_TURN)]
            own += turn[1:]
    return [[median(times) for times in zip(*own, strict=True)] for own in runs]


def _by_task(bundle: Bundle, costs: Sequence[float]) -> dict[str, float]:
    """The cost of all runs of each task in an inference."""
    found: defaultdict[str, float] = defaultdict(float)
    for group, cost in zip(bundle.manifest.lowering.groups, costs, strict=True):
        if group.task:
            found[group.task] += cost
    return dict(found)


def choose(costs: Sequence[Mapping[str, float]]) -> list[Choice]:
    """For each task the build in which it cost least, or the first one if the difference may be noise."""
    choices = []
    for workload in costs[0]:
        own = tuple(each.get(workload, math.inf) for each in costs)
        least = min(range(len(own)), key=own.__getitem__)
        worth = own[least] < own[0] * (1 - _WORTH)
        choices.append(Choice(workload, least if worth else 0, own))
    return sorted(choices, key=lambda choice: -choice.costs[0])


def _table(choices: Sequence[Choice], here: bool) -> str:
    from netship.records.workloads import operator_of

    rows = [
        (operator_of(each.workload), each.build, each.costs[0], each.costs[each.build])
        for each in choices
    ]
    width = max(len(operator) for operator, *_ in rows)
    lines = [f"{'task':<{width}}    isolated  in the network  record"]
    lines += [
        f"{operator:<{width}} {_words(before, here):>11} {_words(after, here):>15} {build + 1:7d}"
        for operator, build, before, after in rows
    ]
    return "\n".join(lines)


def _words(cost: float, here: bool) -> str:
    return f"{cost * 1e6:.1f} µs" if here else f"{cost / 1e6:.3f} Mcyc"


if __name__ == "__main__":
    run_command(main)
