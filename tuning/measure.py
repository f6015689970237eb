"""Measures candidates on this machine or by the meter (on boards: tuning/boards.py)."""

from __future__ import annotations

import ast
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple, Protocol

from netship.devices.sessions.session import Origin
from netship.meter.candidate import CandidateMeter
from netship.meter.counting import Block, CountingError
from netship.meter.cycles import CORES
from netship.meter.memory import hierarchy
from netship.targets.errors import UserError
from netship.targets.escapes import counted
from netship.targets.presets import Target, missing_features, this_cpu
from netship.tuning import workers
from netship.tuning.workers import Failure

# MeasureErrorNo of tvm/auto_scheduler/measure.py.
RUNTIME_DEVICE = 6
_SECONDS = 20.0


class Kernel(NamedTuple):
    """A compiled candidate: an object file, and the shapes and types of its tensors, the output's last."""

    path: Path
    shapes: list[tuple[int, ...]]
    dtypes: list[str]

    @classmethod
    def of(cls, path: str) -> Kernel:
        noted = ast.literal_eval(Path(path).with_suffix(".tensors").read_text())
        return cls(Path(path), *noted)


class Measurer(Protocol):
    """Measures how long kernels take.

    Attributes:
        origin: of its figures.
        how: in words, for the log's header.
    """

    origin: Origin
    how: str

    def measure(self, kernels: Sequence[Kernel]) -> list[list[float] | Failure]:
        """Seconds of each kernel, or the reason of its failure.

        Raises:
            UserError: nothing can be measured any more.
        """
        ...

    def stop(self) -> None:
        """From a signal handler: `measure` returns soon, with failures."""
        ...

    def close(self) -> None: ...


class LocalMeasurer:
    """On this machine: one persistent worker on cores of its own.

    Caches are as between two operators of a network: they hold the inputs and not the weights.
    """

    origin = Origin.HOST

    def __init__(self, target: Target, threads: int) -> None:
        cpu = this_cpu()
        if missing := missing_features(target, cpu):
            raise UserError(
                f"target {target.name}: this machine lacks {', '.join(missing[:4])}; tune over --tracker "
                "or --rpc, or --measure meter for an arm-cortex target"
            )
        cores = sorted(os.sched_getaffinity(0))
        if threads > len(cores):
            raise UserError(
                f"--threads {threads}: this machine has {counted(len(cores), 'core')}"
            )
        self.how = (
            f"{self.origin}: {cpu.model}, {counted(threads, 'thread')}, weights cold"
        )
        self._workers = workers.Pool(1, _SECONDS, threads, cores[-threads:])

    def measure(self, kernels: Sequence[Kernel]) -> list[list[float] | Failure]:
        arguments = [(str(path), *tensors) for path, *tensors in kernels]
        return self._workers.map(workers.time_here, arguments, RUNTIME_DEVICE)

    def stop(self) -> None:
        self._workers.stop()

    def close(self) -> None:
        self._workers.close()


class MeterMeasurer:
    """By the meter: exact counts, estimated cycles; a candidate has the same figure in every run."""

    origin = Origin.ESTIMATED

    def __init__(self, target: Target, jobs: int) -> None:
        if target.machine != "aarch64" or target.core not in CORES:
            raise UserError(
                f"--measure meter: there is no meter for {target.name}; there is one for {', '.join(CORES)}"
            )
        memory = hierarchy(target.core)
        self._hertz = memory.clock * 1e9
        self.how = (
            f"{self.origin}: QEMU block counts × llvm-mca for {target.core} and a cache model, "
            f"{memory.clock} GHz ({memory.board}), 1 thread"
        )
        self._meter = CandidateMeter(target.core)
        self._threads = ThreadPoolExecutor(jobs)
        self._stopped = False

    def measure(self, kernels: Sequence[Kernel]) -> list[list[float] | Failure]:
        counted = list(self._threads.map(self._count, kernels))
        return [
            each if isinstance(each, Failure) else [self._seconds(each)]
            for each in counted
        ]

    def _count(self, kernel: Kernel) -> list[Block] | Failure:
        if self._stopped:
            return Failure(RUNTIME_DEVICE, "the search ended")
        try:
            return self._meter.count(*kernel)
        except CountingError as error:
            return Failure(RUNTIME_DEVICE, str(error))

    def _seconds(self, blocks: list[Block]) -> float:
        return self._meter.cost(blocks).cycles / self._hertz

    def stop(self) -> None:
        self._stopped = True

    def close(self) -> None:
        self._threads.shutdown(cancel_futures=True)
        self._meter.close()
