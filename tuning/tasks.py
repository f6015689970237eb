"""The parts of a network that can be tuned: AutoScheduler's tasks, in the layout that it needs."""

from __future__ import annotations

import argparse
import json
import re
from hashlib import md5
from math import prod
from typing import Any, NamedTuple

import numpy as np

from netship.compile.frontend.sources import Source
from netship.compile.ir.graph import Graph
from netship.meter.memory import hierarchy
from netship.meter.operators import PEAKS
from netship.records.workloads import operator_of
from netship.targets import engine
from netship.targets.errors import UserError, reason
from netship.targets.presets import Target
from netship.targets.progress import Progress


class Task(NamedTuple):
    """One task.

    Attributes:
        key: AutoScheduler's workload key; records are looked up by it.
        operator: what it computes, for people.
        weight: how often an inference runs it.
        flops: floating-point operations of one run.
        nbytes: of its tensors, each counted once.
        search: AutoScheduler's own object.
        numbers: what its convolutions compute in, float32 or float16.
    """

    key: str
    operator: str
    weight: int
    flops: float
    nbytes: int
    search: Any
    numbers: str = "float32"

    @property
    def float32_key(self) -> str:
        """The key of the task in float32: the hash of its loops with constants of that type."""
        if self.numbers == "float32":
            return self.key
        show = engine.compiler().get_global_func("auto_scheduler.ComputeDAGPrintDAG")
        printed = re.sub(r"(?<=\d)h\b", "f", show(self.search.compute_dag, True))
        _, *extents = json.loads(self.key)
        return json.dumps([md5(printed.encode()).hexdigest(), *extents])

    @property
    def intensity(self) -> float:
        """Arithmetic intensity: operations a byte (Williams et al., Roofline, CACM 52(4), 2009)."""
        return self.flops / self.nbytes

    def bound(self, peak: float) -> float:
        """Seconds that no schedule can beat at ``peak`` operations a second."""
        return self.flops / peak


def graph_of(
    source: Source, target: Target, arguments: argparse.Namespace, progress: Progress
) -> Graph:
    """The operators of a network that have tasks, in the precision that the options ask for.

    Raises:
        UserError: as a build.
    """
    from netship.compile.backends.request import BuildRequest
    from netship.compile.sixteen_bits import tuned_graph

    request = BuildRequest(
        arguments.model,
        target,
        precision=arguments.precision,
        calibration=tuple(arguments.calibration),
        accept_loss=True,
    )
    return tuned_graph(request, source, progress)


def peak(target: Target, threads: int, numbers: str = "float32") -> float | None:
    """Operations a second that ``threads`` cores of a board's CPU can do; None if unknown."""
    macs = PEAKS[numbers].get(target.core)
    if macs is None:
        return None
    return 2 * macs * hierarchy(target.core).clock * 1e9 * threads


def extract(name: str, graph: Graph, target: Target, threads: int = 1) -> list[Task]:
    """The tasks of a network, as compile.relay.lower finds them; loads the engine's compiler.

    Args:
        name: the network's, for errors.
        graph: as of `netship.compile.sixteen_bits.tuned_graph`.

    Raises:
        UserError: TVM cannot find them, or there are none.
    """
    from netship.compile.relay.convert import Converted
    from netship.compile.relay.importer import to_relay
    from netship.compile.relay.tasks import tuning_tasks

    half = any(each.dtype == "float16" for each in graph.tensors.values())
    module = to_relay(graph)
    try:
        found, weights = tuning_tasks(Converted(module, half=half), target, threads)
    except Exception as error:
        # TVM has no class for it. A build then leaves tuning records out.
        raise UserError(
            f"{name}: TVM cannot find what to tune in it ({reason(error)[:200]}); build it untuned"
        ) from error
    if not found:
        raise UserError(f"{name}: it has no operator that can be tuned")
    return [
        Task(
            key=str(task.workload_key),
            operator=operator_of(str(task.workload_key)),
            weight=int(weight),
            # AutoScheduler gives -1 if it cannot count.
            flops=max(float(task.compute_dag.flop_ct), 0.0),
            nbytes=sum(map(_nbytes, task.compute_dag.tensors)),
            search=task,
            numbers="float16" if half else "float32",
        )
        for task, weight in zip(found, weights, strict=True)
    ]


def _nbytes(tensor: Any) -> int:
    size: int = np.dtype(tensor.dtype).itemsize
    return prod(map(int, tensor.shape)) * size
