"""The tuner in a process of its own, beside tests that load TVM's runtime alone: what goes wrong, and what is left then.

Each function runs in that process and gives back plain data.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from functools import cache
from itertools import cycle
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np
import onnx
from networks import Net
from onnx import numpy_helper

from netship.bundle.manifest import ModelIdentity
from netship.compile.frontend.gate import check
from netship.compile.ir import onnx_form
from netship.devices.board.programs import native_server
from netship.devices.sessions.session import Origin
from netship.targets.errors import UserError
from netship.targets.presets import native
from netship.targets.toolchain import compile_object

ROUND = 4
# A step that splits an axis which no task has.
AXIS_77 = ["SP", 2, 77, 1, [1], 1]
HEADER = {"target": "here", "measured": "by a test", "origin": "estimated", "tvm": "0"}
_KILLS = """
const char __tvm_main__[] = "default_function";
int default_function(void *a, int *b, int c, void *d, int *e, void *f) { *(volatile int *)0 = 1; return 0; }
"""
_HANGS = _KILLS.replace("*(volatile int *)0 = 1;", "for (volatile int i = 0;; i++);")


def network(size: int = 16, channels: int = 8) -> onnx.ModelProto:
    """One convolution and a classifier: three tasks."""
    net = Net(size)
    net.convolve(channels, 3, normalise=False)
    return net.finish(5)


@cache
def _tasks(size: int = 16, channels: int = 8) -> list[Any]:
    from netship.tuning.tasks import extract

    identity = ModelIdentity(name="tiny", sha256="0" * 64)
    model = check(network(size, channels), identity, {}, "NCHW")
    return extract("tiny", onnx_form.read(model.proto), native())


def retyped() -> dict[str, list[list[int]]]:
    """Of tasks in float16 the splits that are tried first, where the log has their records in float32.

    There channels are split into vectors of 4.
    """
    from tvm import auto_scheduler

    from netship.compile import passes
    from netship.compile.passes.half import BEFORE, to_float16
    from netship.records.lookup import RecordLog, parse
    from netship.tuning import transfer
    from netship.tuning.tasks import extract

    net = Net(16)
    for _ in range(2):
        net.convolve(16, 3, normalise=False)
    identity = ModelIdentity(name="tiny", sha256="0" * 64)
    model = check(net.finish(5), identity, {}, "NCHW")
    graph = passes.read(model.proto, BEFORE)
    lines = []
    for task in extract("tiny", graph, native()):
        state = task.search.compute_dag.get_init_state()
        stages = list(state.stages)
        if "conv 3" in task.operator:
            (stage,) = (each for each in stages if "conv" in each.op.name)
            state.split(stage.op, state[stage.op].iters[3], [1, 1, 4])
        result = auto_scheduler.MeasureResult([1e-3], 0, "", 0.1, 1.7e9)
        pair = auto_scheduler.MeasureInput(task.search, state), result
        lines.append(str(auto_scheduler.measure_record.dump_record_to_string(*pair)))
    log = RecordLog("single.json", HEADER, tuple(map(parse, lines)), ())
    found = {}
    for task in extract("tiny", to_float16(graph, ()), native()):
        for line in transfer.candidates(task, [log], 1):
            made = json.loads(line)["i"]
            assert made[0][0] == task.key
            splits = [step[4] for step in made[1][1] if step[0] == "SP"]
            found[task.operator] = splits
    return found


def operators_of_a_pair(size: int) -> list[str]:
    """The tasks of an expansion, clip and depthwise convolution on an image of ``size``²."""
    from netship.tuning.tasks import extract

    net = Net(size)
    for name, value in (("low", 0), ("high", 6)):
        net._weights.append(numpy_helper.from_array(np.array(value, np.float32), name))
    net.convolve(96, 1, normalise=False, relu=False)
    net.node("Clip", [net.at, "low", "high"])
    net.convolve(96, 3, groups=96, normalise=False)
    identity = ModelIdentity(name="pair", sha256="0" * 64)
    model = check(net.finish(5), identity, {}, "NCHW")
    graph = onnx_form.read(model.proto)
    return [task.operator for task in extract("pair", graph, native())]


class Outcome(NamedTuple):
    error: str
    trials: list[int]
    errors: list[int]
    best: list[float]
    lines: int
    skipped: int
    misfits: int


class _Scripted:
    """A measurer that says what the test wants."""

    origin, how = Origin.ESTIMATED, "by a test"

    def __init__(self, answer: Callable[[Any, int], Any]) -> None:
        self._answer, self.count = answer, 0

    def measure(self, kernels: Sequence[Any]) -> list[Any]:
        self.count += len(kernels)
        return [
            self._answer(kernel, self.count - i) for i, kernel in enumerate(kernels)
        ]

    def stop(self) -> None: ...

    def close(self) -> None: ...


def _search(
    folder: Path,
    trials: int,
    answer: Callable[[Any, int], Any],
    change: Callable[[Any], None] = lambda search: None,
    warm: Sequence[Any] = (),
    tasks: Sequence[Any] = (),
    hours: float | None = None,
) -> Outcome:
    from netship.records.log import TuningLog
    from netship.records.lookup import read
    from netship.tuning import search as module
    from netship.tuning.search import Limits, Search

    module._ROUND = ROUND
    module._SEARCH |= {
        "evolutionary_search_population": 16,
        "evolutionary_search_num_iters": 1,
        "sample_init_min_population": 8,
    }
    error = ""
    with TuningLog(folder / "log.json", HEADER) as log:
        search = Search(
            tasks or _tasks(),
            _Scripted(answer),
            log,
            Limits(trials, hours, None),
            prover=native().tvm,
            jobs=2,
            warm=warm,
        )
        with closing(search):
            change(search)
            try:
                search.run()
            except (UserError, KeyboardInterrupt) as ended:
                error = f"{type(ended).__name__}: {ended}"
    kept = read(folder / "log.json")
    states = search.states
    return Outcome(
        error,
        [state.trials for state in states],
        [state.errors for state in states],
        [state.best for state in states],
        len(kept.lines),
        len(kept.skipped),
        search.misfits,
    )


def _figure(_kernel: Any, count: int) -> list[float]:
    return [1e-3 / count]


def operators() -> list[tuple[str, int, float, int]]:
    return [(t.operator, t.weight, t.flops, t.nbytes) for t in _tasks()]


def continued(folder: Path) -> list[Outcome]:
    """Two runs of one log; between them its last line is torn, others are foreign, and one's schedule does not fit."""
    first = _search(folder, 3 * ROUND, _figure)
    log = folder / "log.json"
    text = log.read_text()
    misfit = json.loads(text.splitlines()[-2])
    misfit["i"][1][1] = [AXIS_77]
    nonsense = '{"i": [["x"], [[], []]], "r": [[1], 0, 0, 0], "v": "v0.6"}\n'
    torn = text.splitlines()[-1][:-20]
    log.write_text(f"{text}{nonsense}no record\n{json.dumps(misfit)}\n{torn}")
    return [first, _search(folder, 5 * ROUND, _figure)]


def few_trials(folder: Path) -> Outcome:
    """As many trials as there are tasks, and one round of spare ones."""
    return _search(folder, len(_tasks()) + ROUND - 1, _figure)


def one_task_fails(folder: Path) -> Outcome:
    from netship.tuning.measure import RUNTIME_DEVICE
    from netship.tuning.workers import Failure

    def answer(kernel: Any, count: int) -> Any:
        if kernel.shapes[-1] == (1, 16, 16, 8):
            return Failure(RUNTIME_DEVICE, "never")
        return _figure(kernel, count)

    return _search(folder, 9 * ROUND, answer)


def measurer_gone(folder: Path) -> list[Outcome]:
    """The boards vanish for good in the second round; then they are back."""

    def answer(kernel: Any, count: int) -> Any:
        if count > ROUND:
            raise UserError("the board is gone")
        return _figure(kernel, count)

    return [_search(folder, 60, answer), _search(folder, 3 * ROUND, _figure)]


def disk_full(folder: Path) -> list[Outcome]:
    """The log can grow by no more than a few records; then there is room again."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    full = _search(
        folder,
        60,
        _figure,
        lambda search: resource.setrlimit(resource.RLIMIT_FSIZE, (12_000, hard)),
    )
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    return [full, _search(folder, full.lines + ROUND, _figure)]


def clock_jumps(folder: Path) -> list[Outcome]:
    """The wall clock is set to 1970, to 2099 and back between any two looks at it, in a run of at most an hour and after."""
    dates = cycle([0.0, 4_070_908_800.0, time.time()])
    with patch.object(time, "time", lambda: next(dates)):
        return [
            _search(folder, rounds * ROUND, _figure, hours=1.0) for rounds in (3, 5)
        ]


def wrong_answer(folder: Path) -> tuple[Outcome, list[float]]:
    """The first that would be a best gives wrong answers; and what each check was of."""
    from netship.records.lookup import read

    seen: list[bool] = []

    def change(search: Any) -> None:
        proved = search._provers.map

        def prove(*arguments: Any) -> list[Any]:
            (right,) = proved(*arguments)
            seen.append(right)
            return [right and len(seen) > 1]

        search._provers.map = prove

    outcome = _search(folder, ROUND, _figure, change)
    assert all(seen)
    records = [json.loads(line)["r"] for line in read(folder / "log.json").lines]
    return outcome, [costs[0] for costs, error, *_ in records if not error]


def is_right_tells() -> list[bool]:
    """The check of answers, as it is and with a tolerance that nothing meets."""
    from tvm import auto_scheduler

    from netship.tuning import workers

    task = _tasks()[0].search
    state = auto_scheduler.SketchPolicy(task, verbose=0).sample_initial_population()[0]
    text = auto_scheduler.MeasureInput(task, state).serialize()
    with patch.dict(workers._TOLERANCES, float32=-1.0):
        never = workers.is_right(text, native().tvm)
    return [workers.is_right(text, native().tvm), never]


def interrupted(folder: Path) -> Outcome:
    def answer(kernel: Any, count: int) -> Any:
        if count == ROUND + 1:
            os.kill(os.getpid(), signal.SIGINT)
        return _figure(kernel, count)

    return _search(folder, 200, answer)


def warmed(
    folder: Path, log: Path, rounds: int = 1, size: int = 16, channels: int = 8
) -> Outcome:
    from netship.records.lookup import read

    tasks = _tasks(size, channels)
    return _search(folder, rounds * ROUND, _figure, warm=[read(log)], tasks=tasks)


def transferred(folder: Path, size: int, channels: int) -> list[tuple[str, bool]]:
    """Schedules of a convolution, one of them unusable, fitted to another: each one's steps, and if its answers are right."""
    from tvm import auto_scheduler

    from netship.records.lookup import read
    from netship.tuning import transfer, workers

    (task,) = (each for each in _tasks() if "conv 3×3" in each.operator)
    (other,) = (t for t in _tasks(size, channels) if "conv 3×3" in t.operator)
    policy = auto_scheduler.SketchPolicy(task.search, verbose=0)
    result = auto_scheduler.MeasureResult([1e-3], 0, "", 0.1, 1.7e9)
    dump = auto_scheduler.measure_record.dump_record_to_string
    lines = [
        str(dump(auto_scheduler.MeasureInput(task.search, state), result)).strip()
        for state in list(policy.sample_initial_population())[:6]
    ]
    broken = json.loads(lines[0])
    broken["i"][1][1] = [AXIS_77]
    log = folder / "log.json"
    text = [f"# {json.dumps(HEADER)}", json.dumps(broken), *lines, ""]
    log.write_text("\n".join(text))
    found = []
    for line in transfer.candidates(other, [read(log)], len(lines) + 1):
        state = transfer.replayed(json.loads(line), other)
        text = auto_scheduler.MeasureInput(other.search, state).serialize()
        found.append((line, workers.is_right(text, native().tvm)))
    return found


def workers_that_end() -> list[str]:
    """A crash, a hang and a stopped process between works that succeed."""
    from netship.tuning import workers

    pool = workers.Pool(1, 2.0)
    works: list[tuple[Any, tuple[Any, ...]]] = [
        (len, ([1],)),
        (ctypes.string_at, (0,)),
        (len, ([1, 2],)),
        (time.sleep, (60,)),
        (len, ([1, 2, 3],)),
        (signal.raise_signal, (signal.SIGSTOP,)),
        (len, ([1, 2, 3, 4],)),
    ]
    with closing(pool):
        return [str(pool.map(work, [arguments], 6)[0]) for work, arguments in works]


def boards(folder: Path) -> dict[str, Any]:
    """Two boards, one of which goes away and comes back; a kernel that crashes and one that hangs; then all are gone."""
    from tvm import auto_scheduler

    from netship.devices.transport.link import Address
    from netship.tuning import boards as over_rpc
    from netship.tuning import workers
    from netship.tuning.measure import Kernel

    over_rpc._CALL_SECONDS = 15.0
    task = _tasks()[0].search
    states = auto_scheduler.SketchPolicy(task, verbose=0).sample_initial_population()
    inputs = [auto_scheduler.MeasureInput(task, state) for state in list(states)[:12]]
    kernels = [
        Kernel.of(str(workers.build(each.serialize(), str(folder)))) for each in inputs
    ]
    for name, code in (("kills", _KILLS), ("hangs", _HANGS)):
        source, compiled = folder / f"{name}.c", folder / f"{name}.o"
        source.write_text(code)
        compile_object(source, compiled, native())
        kernels.insert(3, Kernel(compiled, [(1,)], ["float32"]))
    one, other = _Server(folder / "one"), _Server(folder / "other")
    addresses = [Address("127.0.0.1", server.port, "pi") for server in (one, other)]
    found = [over_rpc.of_address(address) for address in addresses]
    measurer = over_rpc.BoardMeasurer(native(), found, 1, patience=3.0)

    def come_back() -> None:
        one.kill()
        time.sleep(2)
        one.start()

    away = threading.Timer(0.5, come_back)
    away.start()
    results = measurer.measure(kernels)
    away.join()
    one.kill()
    other.kill()
    try:
        measurer.measure(kernels[:1])
        error = ""
    except UserError as gone:
        error = str(gone)
    return {
        "good": [isinstance(each, list) for each in results],
        "failed": [str(each) for each in results if not isinstance(each, list)],
        "error": error,
    }


class _Server:
    def __init__(self, folder: Path) -> None:
        self._folder, self.port = folder, 0
        folder.mkdir()
        self.start()

    def start(self) -> None:
        machine = native().machine
        options = [
            "--port",
            str(self.port),
            "--key",
            "pi",
            "--work-dir",
            str(self._folder),
        ]
        self._process = subprocess.Popen(
            [str(native_server(machine)), *options],  # type: ignore[arg-type]
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        assert self._process.stdout
        self.port = int(self._process.stdout.readline().rsplit(":", 1)[1])

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()
