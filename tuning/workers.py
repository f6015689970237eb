"""Compiles, times and proves candidates, each function in persistent worker processes.

Workers import the engine once. A worker that crashes or hangs loses only its candidate: the next one starts a new
worker. Only the tuner's process and its workers import this.
"""

from __future__ import annotations

import ctypes
import gc
import os
import select
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from netship.targets import engine
from netship.targets.errors import UserError, reason
from netship.targets.toolchain import run_zig

tvm = engine.compiler()
from tvm import te
from tvm.auto_scheduler.measure import MeasureErrorNo, MeasureInput
from tvm.contrib.popen_pool import PopenWorker

from netship.compile.relay import prefetch
from netship.compile.relay.fallbacks import accepted

# MeasureErrorNo of tvm/auto_scheduler/measure.py.
BUILD_FAILED = 2
# A build worker grows by about a megabyte a candidate.
_RECYCLED_AFTER = 400
# Starting a worker: importing the engine on a busy machine.
_START_SECONDS = 60.0
# A worker has this much more than its time limit before it counts as dead.
_GRACE_SECONDS = 5.0
_REPEATS = 25
# More than a core's second-level cache; written by each thread.
_EVICTED_BYTES = 4 << 20
_BETWEEN = "netship.between_runs"
# Correct schedules of one kernel differ by rounding; relative to the output's range, by the output's type. A wrong index
# is off by as much as the range.
_TOLERANCES = {"float32": 1e-3, "float16": 3e-2}
_PARENT_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of linux/prctl.h


class Failure(NamedTuple):
    """The reason why a candidate has no time: one of AutoScheduler's MeasureErrorNo, and words."""

    number: int
    message: str


class _Worker(PopenWorker):  # type: ignore[misc]
    """TVM's worker process, but one that no longer answers is ended too, not only a slow one."""

    ended = False

    def call(
        self, work: Callable[..., Any], arguments: tuple[Any, ...], seconds: float
    ) -> Any:
        self.send(work, arguments, timeout=seconds)
        if self.ended:
            self.end()
        limit = seconds + _GRACE_SECONDS + (0 if self.began else _START_SECONDS)
        ready, _, _ = select.select([self._reader], [], [], limit)
        if not ready:
            self.kill()
            raise TimeoutError
        return self.recv()

    @property
    def began(self) -> bool:
        """Whether it did anything before its present work."""
        return bool(self._remaining_uses and self._remaining_uses < _RECYCLED_AFTER - 1)

    def end(self) -> None:
        """Kill the process, from any thread; a thread that waits for it gets an error."""
        self.ended = True
        process = self._proc
        if process is not None:
            process.kill()


class Pool:
    """Worker processes that end with this one.

    Args:
        seconds: for one candidate.
        threads: of TVM's own pool in each worker.
        cores: that the workers stay on; anywhere where None.
    """

    def __init__(
        self,
        jobs: int,
        seconds: float,
        threads: int = 1,
        cores: Sequence[int] | None = None,
    ) -> None:
        self._seconds = seconds
        self._begin = (os.getpid(), threads, tuple(cores) if cores else None)
        self._threads = ThreadPoolExecutor(jobs)
        self._own = threading.local()
        self._workers: list[_Worker] = []
        self._stopped = False

    def map(
        self,
        work: Callable[..., Any],
        arguments: Sequence[tuple[Any, ...]],
        number: int,
    ) -> list[Any]:
        """``work`` for each of ``arguments``; a crash or a hang is a `Failure` with that ``number``."""
        if self._stopped:
            return [Failure(number, "the search ended")] * len(arguments)
        return list(
            self._threads.map(lambda each: self._do(work, each, number), arguments)
        )

    def _do(
        self, work: Callable[..., Any], arguments: tuple[Any, ...], number: int
    ) -> Any:
        if self._stopped:
            return Failure(number, "the search ended")
        try:
            return self._worker().call(work, arguments, self._seconds)
        except TimeoutError:
            return Failure(number, f"no end within {self._seconds:g} s")
        except Exception as error:  # noqa: BLE001 - any error fails only this candidate
            return Failure(number, reason(error))

    def _worker(self) -> _Worker:
        if not hasattr(self._own, "worker"):
            self._own.worker = _Worker(
                begin,
                self._begin,
                _RECYCLED_AFTER,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
            self._workers.append(self._own.worker)
        worker: _Worker = self._own.worker
        if self._stopped:
            worker.end()
        return worker

    def stop(self) -> None:
        """End all work: `map` returns at once, with failures."""
        self._stopped = True
        for worker in self._workers:
            worker.end()

    def close(self) -> None:
        self.stop()
        self._threads.shutdown()
        for worker in self._workers:
            worker.kill()


def begin(parent: int, threads: int, cores: tuple[int, ...] | None) -> None:
    """In a worker: end when the parent ends, in whatever way, and ignore Ctrl-C."""
    # The engine's objects stay to the end; collecting garbage among them again and again is slow.
    gc.freeze()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    ctypes.CDLL(None).prctl(_PARENT_DEATH_SIGNAL, signal.SIGKILL)
    if os.getppid() != parent:
        sys.exit()
    os.environ["TVM_NUM_THREADS"] = str(threads)
    if cores:
        os.sched_setaffinity(0, cores)


def build(serialised: str, folder: str) -> str | Failure:
    """Compile a candidate into an object file with a function ``default_function``; returns its path."""
    candidate = MeasureInput.deserialize(serialised)
    task = candidate.task
    try:
        schedule, arguments = task.compute_dag.apply_steps_from_state(
            candidate.state, layout_rewrite=task.layout_rewrite_option
        )
    except Exception as error:  # noqa: BLE001 - as AutoScheduler's own builder
        return _failed(MeasureErrorNo.INSTANTIATION_ERROR, error)
    handle, path = tempfile.mkstemp(".o", dir=folder)
    os.close(handle)
    try:
        function = _compile(schedule, arguments, task.target)
        function.save(path)
    except Exception as error:  # noqa: BLE001 - as AutoScheduler's own builder
        return _failed(MeasureErrorNo.COMPILE_HOST, error)
    _note_tensors(Path(path), arguments)
    return path


def compile_function(function: Any, target: str, path: Path) -> None:
    """Compile a kernel of a build into an object file as `build` makes them."""
    buffers = [function.buffer_map[parameter] for parameter in function.params]
    if any(buffer.dtype not in _TOLERANCES for buffer in buffers):
        raise UserError("not all of the network is floating point")
    named = function.with_attr("global_symbol", "default_function")

    def build(more: Mapping[str, Any]) -> Any:
        with tvm.transform.PassContext(**more):
            return tvm.build(named, target=tvm.target.Target(target))

    accepted(build).save(str(path))
    _note_tensors(path, buffers)


def _note_tensors(path: Path, tensors: Sequence[Any]) -> None:
    shapes = [tuple(int(size) for size in tensor.shape) for tensor in tensors]
    dtypes = [str(tensor.dtype) for tensor in tensors]
    path.with_suffix(".tensors").write_text(repr((shapes, dtypes)))


def _compile(schedule: Any, arguments: Any, target: Any) -> Any:
    """A candidate's library by `tvm.build`'s own steps, without two that take more than half of its time.

    One is common subexpression elimination, which LLVM does too: tuned kernels of MobileNetV2 differ by at most 1.4 % of
    their cycles, except for one that is 4 % better without (estimated, Cortex-A72). A network's build has it, except for
    x86-64 (compile/relay/prefetch.py). The other is the checks of the arguments, which are no part of the kernel.
    """
    host = tvm.target.Target(target, host=target)
    config = {"tir.disable_cse_tir": True, **prefetch.passes(host)}
    with tvm.transform.PassContext(config=config):
        module = tvm.lower(schedule, arguments, name="default_function")
        for passes in ("driver.mixed_mod_passes", "driver.host_mod_passes"):
            module = tvm.get_global_func(passes)(module, host)(module)
        module = tvm.tir.transform.SkipAssert()(module)
        return tvm.get_global_func("target.build.llvm")(module, host)


def time_here(
    kernel: str, shapes: list[tuple[int, ...]], dtypes: list[str]
) -> list[float] | Failure:
    """Seconds of one run on this machine, as inside a network: the median of a few repeats.

    Before each run the weights are evicted from the cores' caches, as between two inferences; the input is written
    last, each thread its part.
    """
    try:
        function = load(Path(kernel))
    except Exception as error:  # noqa: BLE001 - any error fails only this candidate
        return _failed(MeasureErrorNo.COMPILE_DEVICE, error)
    random = np.random.default_rng(0)
    arrays = [
        tvm.nd.array(random.random(shape, np.float32).astype(dtype))
        for shape, dtype in zip(shapes, dtypes, strict=True)
    ]
    output = shapes[-1]
    # Activations have the output's rank and batch, and so has a bias, which is small.
    activations = [
        array
        for array, shape in zip(arrays, shapes, strict=True)
        if len(shape) == len(output) and shape[:1] == output[:1]
    ]
    threads = int(os.environ.get("TVM_NUM_THREADS", "1"))
    fill = _fill(threads)
    others = tvm.nd.empty((threads * _EVICTED_BYTES // 4,))

    def between(*_: Any) -> None:
        for array in (others, *activations):
            fill(array._create_view((prod(array.shape),)))

    tvm.register_func(_BETWEEN, between, override=True)
    try:
        evaluate = function.time_evaluator(
            function.entry_name,
            tvm.cpu(),
            number=1,
            repeat=_REPEATS,
            f_preproc=_BETWEEN,
        )
        return [statistics.median(evaluate(*arrays).results)]
    except Exception as error:  # noqa: BLE001 - any error fails only this candidate
        return _failed(MeasureErrorNo.RUNTIME_DEVICE, error)


@cache
def _fill(threads: int) -> Any:
    """A function that writes a one-dimensional float32 array, each thread of TVM's pool its part."""
    size = te.var("size")
    ones = te.compute((size,), lambda _: tvm.tir.const(1.0, "float32"))
    schedule = te.create_schedule(ones.op)
    part, _ = schedule[ones].split(ones.op.axis[0], nparts=threads)
    schedule[ones].parallel(part)
    return tvm.build(schedule, [ones], target="llvm")


def load(kernel: Path) -> Any:
    """Link an object file for this machine and load it."""
    library = kernel.with_suffix(".so")
    run_zig("ld.lld", library, "-shared", kernel)
    return tvm.runtime.load_module(str(library))


def is_right(serialised: str, target: str) -> bool:
    """Whether a schedule computes the same as the untuned one; both are compiled for and run on this machine.

    Weights keep their layout: only the schedule is proved.

    Args:
        target: the target string of a CPU whose code this machine runs.
    """
    candidate = MeasureInput.deserialize(serialised)
    graph = candidate.task.compute_dag
    random = np.random.default_rng(1)
    answers: list[Any] = []
    arrays: list[Any] = []
    for state in (graph.get_init_state(), candidate.state):
        schedule, arguments = graph.apply_steps_from_state(state)
        function = _compile(schedule, arguments, tvm.target.Target(target))
        if not arrays:
            arrays = [
                random.uniform(-1, 1, [int(size) for size in tensor.shape]).astype(
                    tensor.dtype
                )
                for tensor in arguments[:-1]
            ]
        dtype = str(arguments[-1].dtype)
        output = tvm.nd.empty([int(size) for size in arguments[-1].shape], dtype)
        function(*map(tvm.nd.array, arrays), output)
        answers.append(output.numpy().astype(np.float32))
    reference, answer = answers
    reach = float(np.abs(reference).max()) or 1.0
    return bool(np.abs(answer - reference).max() <= _TOLERANCES[dtype] * reach)


def _failed(number: int, error: Exception) -> Failure:
    return Failure(int(number), reason(error)[:2000])
