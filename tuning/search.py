"""The search: it chooses a task, takes candidates of AutoScheduler's evolution, measures, proves and logs them."""

from __future__ import annotations

import json
import math
import shutil
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import tvm
from tvm import auto_scheduler

from netship.devices.sessions.session import Origin
from netship.records.log import TuningLog
from netship.records.lookup import Record, RecordLog, parse
from netship.targets import interrupts
from netship.targets.interrupts import Interrupted
from netship.tuning import transfer, workers
from netship.tuning.measure import RUNTIME_DEVICE, Kernel, Measurer
from netship.tuning.supervision import Rounds
from netship.tuning.tasks import Task
from netship.tuning.workers import Failure

# The default population of 2048 takes half a minute a round before anything is measured.
_SEARCH = {
    "evolutionary_search_population": 256,
    "evolutionary_search_num_iters": 3,
    "sample_init_min_population": 32,
    "eps_greedy": 0.02,
}
_ROUND = 16
# Schedules from other logs that are tried for a task; more only if they were found for the same task.
_SUGGESTIONS = 8
# A task this near its bound is finished. The priority of a task falls with each round without improvement; a task
# without any working candidate is given up after a few rounds.
_NEAR = 0.97
_PATIENCE = 0.8
_HOPELESS_ROUNDS = 4
_GAIN = 0.999
# Noise makes false winners: a new best is measured this many times in all, and the median counts.
_CONFIRMATIONS = 3
_FAILED_SECONDS = 1e10
_BUILD_SECONDS = 60.0


@dataclass
class State:
    """The progress of a task.

    Attributes:
        best: seconds of its best correct candidate; infinite before there is one.
        trials: in this log, failed ones included.
        stale: rounds since the last improvement.
        exhausted: the search finds no candidate that was not measured.
    """

    task: Task
    best: float = math.inf
    trials: int = 0
    errors: int = 0
    stale: int = 0
    exhausted: bool = False
    policy: Any = field(default=None, repr=False)


class Limits(NamedTuple):
    """When to stop.

    Attributes:
        trials: of all tasks together, those already in the log included.
        hours: of this run; None for no limit.
        peak: operations a second that the cores can do; None if unknown.
    """

    trials: int
    hours: float | None
    peak: float | None


class Search:
    """A search over the tasks of one network.

    Args:
        log: each measurement is written to it at once; the search continues from what it holds.
        prover: the target string for proving candidates correct on this machine.
        jobs: candidates compiled at the same time.
        warm: other logs, the preferred one first: their best records of each task and of its neighbours
            (tuning/transfer.py) are measured first.
        report: called after each round with every task's state and that of the task measured.
        rounds: told where the search is; tasks that it leaves are left.

    Attributes:
        misfits: how many of the log's records do not fit their task and are ignored.
    """

    def __init__(
        self,
        tasks: Sequence[Task],
        measurer: Measurer,
        log: TuningLog,
        limits: Limits,
        *,
        prover: str,
        jobs: int,
        warm: Sequence[RecordLog] = (),
        report: Callable[[list[State], State], None] = lambda states, current: None,
        rounds: Rounds | None = None,
    ) -> None:
        self._measurer, self._log, self._limits = measurer, log, limits
        self._prover_target, self._report = prover, report
        self._rounds = rounds or Rounds()
        self._builders = workers.Pool(jobs, _BUILD_SECONDS)
        self._provers = workers.Pool(1, _BUILD_SECONDS)
        self._ending: BaseException | None = None
        self._writing = threading.RLock()
        self.states = [self._begun(task) for task in tasks]
        self._by_key = {state.task.key: state for state in self.states}
        self._current = self.states[0]
        own = self._rounds.folder or tempfile.mkdtemp(prefix="netship-tune-")
        self._folder = Path(own)
        self._model = auto_scheduler.XGBModel(
            verbose_eval=0, num_warmup_sample=64, adaptive_training=True
        )
        self._records: dict[str, list[Record]] = {task.key: [] for task in tasks}
        self.misfits = 0
        for record in log.read().records:
            state = self._by_key.get(record.workload)
            if state is None:
                continue
            # A schedule that does not fit would crash AutoScheduler, and with it the search.
            if record.error or transfer.fitted(record, state.task):
                self._remember(record)
            else:
                self.misfits += 1
        self._warm = warm

    def _begun(self, task: Task) -> State:
        lost = self._rounds.lost[task.operator]
        is_left = self._rounds.is_left(task.operator)
        return State(task, stale=lost, exhausted=is_left)

    def _remember(self, record: Record) -> None:
        state = self._by_key[record.workload]
        state.trials += 1
        if record.error:
            state.errors += 1
        else:
            state.best = min(state.best, record.seconds)
        self._records[record.workload].append(record)

    def _untried(self, state: State) -> list[str]:
        """Schedules from other logs for a task that this log does not have yet."""
        known = {_schedule(each.line) for each in self._records[state.task.key]}
        suggested = transfer.candidates(state.task, self._warm, _SUGGESTIONS)
        new = (line for line in suggested if _schedule(line) not in known)
        return list(islice(new, self._share(state)))

    def _share(self, state: State) -> int:
        """Trials of the next round: while tasks have no time, none of them takes what the others need for theirs."""
        left, waiting = self._left(), sum(map(math.isinf, map(self._gain, self.states)))
        if math.isinf(self._gain(state)):
            return min(_ROUND, max(1, left // waiting))
        return min(_ROUND, max(0, left - waiting))

    def run(self) -> None:
        """Search until a limit is reached, or every task is near its bound.

        Raises:
            UserError: nothing can be measured, or written, any more.
            Interrupted: Ctrl-C or SIGTERM; every measurement is in the log.
        """
        started = time.monotonic()
        measurer = auto_scheduler.measure.ProgramMeasurer(
            *self._handles(), [_writer(self._record)], 0, 1 << 30
        )
        try:
            interrupts.in_thread(partial(self._search, measurer, started))
        except KeyboardInterrupt:
            self._end(Interrupted())
            raise Interrupted from None

    def _search(self, measurer: Any, started: float) -> None:
        self._learn()
        for state in self.states:
            if self._is_over(started):
                return
            if self._rounds.lost[state.task.operator]:
                # Perhaps one of them ended the process.
                continue
            with self._rounds.at(state.task.operator):
                suggested = self._untried(state)
                if suggested:
                    self._current = state
                    self._again(state, suggested)
            if suggested:
                self._report(self.states, state)
        for state in self.states:
            if not state.exhausted:
                with self._rounds.at(state.task.operator):
                    state.policy = self._policy(state.task)
        while not self._is_over(started):
            chosen = self._next()
            if chosen is None:
                return
            self._round(chosen, measurer)
            self._report(self.states, chosen)

    def _round(self, state: State, measurer: Any) -> None:
        self._current, best, trials = state, state.best, state.trials
        with self._rounds.at(state.task.operator):
            state.policy.continue_search_one_round(self._share(state), measurer)
        # No exception may pass through AutoScheduler's C++.
        self._check()
        state.stale = 0 if state.best < best * _GAIN else state.stale + 1
        state.exhausted = state.trials == trials

    def _end(self, reason: BaseException) -> None:
        # What is being written to the log gets there whole.
        with self._writing:
            if self._ending is not None:
                return
            self._ending = reason
        for each in (self._builders, self._provers, self._measurer):
            each.stop()

    def _check(self) -> None:
        if self._ending is not None:
            raise self._ending

    def _is_over(self, started: float) -> bool:
        hours = self._limits.hours
        return self._left() <= 0 or (
            hours is not None and time.monotonic() - started > hours * 3600
        )

    def _left(self) -> int:
        return self._limits.trials - sum(state.trials for state in self.states)

    def _next(self) -> State | None:
        """A task without a time first, else the one with the largest possible gain; None if none is left."""
        chosen = max(self.states, key=lambda each: (self._gain(each), -each.trials))
        return chosen if self._gain(chosen) > 0 else None

    def _gain(self, state: State) -> float:
        """Seconds of an inference that the next round of a task may save, up to a common factor.

        It falls with each round without improvement.
        """
        if state.exhausted:
            return 0.0
        if math.isinf(state.best):
            return math.inf if state.stale < _HOPELESS_ROUNDS else 0.0
        slack = 1.0
        if self._limits.peak:
            slack = 1 - state.task.bound(self._limits.peak) / state.best
            if slack <= 1 - _NEAR:
                return 0.0
        return state.task.weight * state.best * slack * _PATIENCE**state.stale

    def _learn(self) -> None:
        """Train the cost model with the log."""
        load = auto_scheduler.measure_record.load_record_from_string
        loaded = [load(line) for key in self._records for line in self._right(key)]
        if loaded:
            self._model.update(*map(list, zip(*loaded, strict=True)))

    def _right(self, key: str) -> list[str]:
        return [each.line for each in self._records[key] if not each.error]

    def _policy(self, task: Task) -> Any:
        right = self._right(task.key)
        callbacks = None
        if right:
            path = self._folder / "measured.json"
            path.write_text("\n".join(right) + "\n")
            callbacks = [auto_scheduler.PreloadMeasuredStates(str(path))]
        return auto_scheduler.SketchPolicy(
            task.search,
            program_cost_model=self._model,
            params=dict(_SEARCH),
            verbose=0,
            init_search_callbacks=callbacks,
        )

    def _again(self, state: State, lines: Sequence[str]) -> None:
        """Measure schedules from other logs."""
        inputs = [
            auto_scheduler.MeasureInput(
                state.task.search, transfer.replayed(json.loads(line), state.task)
            )
            for line in lines
        ]
        results = self._run(inputs, self._build(inputs))
        self._record(inputs, results)
        self._check()
        self._model.update(inputs, results)

    def _handles(self) -> tuple[Any, Any]:
        """Register our builder and runner under the names that AutoScheduler calls."""
        tvm.register_func(
            "auto_scheduler.local_builder.build", self._build, override=True
        )
        tvm.register_func("auto_scheduler.local_runner.run", self._run, override=True)
        # Batches have twice `n_parallel` candidates.
        return auto_scheduler.LocalBuilder(
            n_parallel=_ROUND
        ), auto_scheduler.LocalRunner()

    def _build(self, inputs: Any, *_: Any) -> list[Any]:
        arguments = [(each.serialize(), str(self._folder)) for each in inputs]
        made = self._builders.map(workers.build, arguments, workers.BUILD_FAILED)
        result = auto_scheduler.measure.BuildResult
        return [
            result("", [], each.number, each.message, 0.0)
            if isinstance(each, Failure)
            else result(each, [], 0, None, 0.0)
            for each in made
        ]

    def _run(self, inputs: Any, built: Any, *_: Any) -> list[Any]:
        results: list[list[float] | Failure] = [
            Failure(int(each.error_no), str(each.error_msg)) for each in built
        ]
        try:
            kernels = {
                i: Kernel.of(str(each.filename))
                for i, each in enumerate(built)
                if int(each.error_no) == 0
            }
            measured = self._measurer.measure(list(kernels.values()))
            for index, each in zip(kernels, measured, strict=True):
                results[index] = each
            self._prove(inputs, kernels, results)
            for file in self._folder.iterdir():
                file.unlink(missing_ok=True)
        except Exception as error:  # noqa: BLE001 - raised by `_check`, not through C++
            self._end(error)
        return [_result(each) for each in results]

    def _prove(
        self,
        inputs: Any,
        kernels: dict[int, Kernel],
        results: list[list[float] | Failure],
    ) -> None:
        """A new best must give the right answer and be quick in further measurements; else its result is replaced."""
        confirmed: set[int] = set()
        while True:
            timed = [
                (statistics.fmean(each), i)
                for i, each in enumerate(results)
                if not isinstance(each, Failure)
            ]
            best, index = min(timed, default=(math.inf, -1))
            if best >= self._current.best or index in confirmed:
                return
            confirmed.add(index)
            arguments = [(inputs[index].serialize(), self._prover_target)]
            (right,) = self._provers.map(workers.is_right, arguments, RUNTIME_DEVICE)
            if right is not True:
                wrong = Failure(RUNTIME_DEVICE, "its answers are wrong")
                results[index] = right if isinstance(right, Failure) else wrong
            elif self._measurer.origin is not Origin.ESTIMATED:
                results[index] = self._confirm(kernels[index], best)

    def _confirm(self, kernel: Kernel, seconds: float) -> list[float] | Failure:
        """The median of further measurements; a kernel that fails once has failed."""
        again = [seconds]
        for _ in range(_CONFIRMATIONS - 1):
            (measured,) = self._measurer.measure([kernel])
            if isinstance(measured, Failure):
                return measured
            again += measured
        return [statistics.median(again)]

    def _record(self, inputs: Any, results: Any) -> None:
        dump = auto_scheduler.measure_record.dump_record_to_string
        pairs = zip(inputs, results, strict=True)
        lines = [str(dump(*each)).strip() for each in pairs]
        with self._writing:
            if self._ending is not None:
                return
            try:
                self._log.append(lines)
            except Exception as error:  # noqa: BLE001 - raised by `_check`, not through C++
                self._end(error)
                return
            for line in lines:
                self._remember(parse(line))

    def close(self) -> None:
        self._builders.close()
        self._provers.close()
        shutil.rmtree(self._folder, ignore_errors=True)


def _result(outcome: list[float] | Failure) -> Any:
    now = time.time()
    if isinstance(outcome, Failure):
        number, message = outcome
        return auto_scheduler.MeasureResult([_FAILED_SECONDS], number, message, 0, now)
    return auto_scheduler.MeasureResult(outcome, 0, None, 0, now)


def _schedule(line: str) -> str:
    """What identifies a schedule: the workload and the transformation steps."""
    (task, *_), steps = json.loads(line)["i"]
    return json.dumps([task[0], steps])


def _writer(record: Callable[[Any, Any], None]) -> Any:
    class Writer(auto_scheduler.measure.PythonBasedMeasureCallback):  # type: ignore[misc]
        def callback(self, policy: Any, inputs: Any, results: Any) -> None:
            record(inputs, results)

    return Writer()
