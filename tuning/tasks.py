"""The parts of a network that can be tuned: AutoScheduler's tasks, in the layout that it needs."""

from __future__ import annotations

import json
from itertools import pairwise
from math import prod
from typing import Any, NamedTuple

from netship.compile.frontend.model import Model
from netship.meter.memory import hierarchy
from netship.meter.operators import PEAK_MACS
from netship.targets.errors import UserError, reason
from netship.targets.presets import Target


class Task(NamedTuple):
    """One task.

    Attributes:
        key: AutoScheduler's workload key; records are looked up by it.
        operator: what it computes, for people.
        weight: how often an inference runs it.
        flops: floating-point operations of one run.
        nbytes: of its tensors, each counted once.
        search: AutoScheduler's own object.
    """

    key: str
    operator: str
    weight: int
    flops: float
    nbytes: int
    search: Any

    @property
    def intensity(self) -> float:
        """Arithmetic intensity: operations a byte (Williams et al., Roofline, CACM 52(4), 2009)."""
        return self.flops / self.nbytes

    def bound(self, peak: float) -> float:
        """Seconds that no schedule can beat at ``peak`` operations a second."""
        return self.flops / peak


def peak(target: Target, threads: int) -> float | None:
    """Float32 operations a second that ``threads`` cores of a board's CPU can do; None if unknown."""
    if target.core not in PEAK_MACS:
        return None
    clock = hierarchy(target.core).clock * 1e9
    return 2 * PEAK_MACS[target.core] * clock * threads


def extract(model: Model, target: Target, threads: int = 1) -> list[Task]:
    """The tasks of a network, as compile.relay.lower finds them; loads the engine's compiler.

    Raises:
        UserError: TVM cannot find them, or there are none.
    """
    from netship.compile.ir import onnx_form
    from netship.compile.relay.importer import to_relay
    from netship.compile.relay.tasks import tuning_tasks

    module = to_relay(onnx_form.read(model.proto))
    try:
        found, weights = tuning_tasks(module, target, threads)
    except Exception as error:
        # TVM has no class for it. A build then leaves tuning records out.
        raise UserError(
            f"{model.identity.name}: TVM cannot find what to tune in it ({reason(error)[:200]}); build it untuned"
        ) from error
    if not found:
        raise UserError(f"{model.identity.name}: it has no operator that can be tuned")
    return [
        Task(
            key=str(task.workload_key),
            operator=operator_of(str(task.workload_key)),
            weight=int(weight),
            # AutoScheduler gives -1 if it cannot count.
            flops=max(float(task.compute_dag.flop_ct), 0.0),
            nbytes=4 * sum(prod(shape) for shape in shapes(str(task.workload_key))),
            search=task,
        )
        for task, weight in zip(found, weights, strict=True)
    ]


def shapes(key: str) -> list[tuple[int, ...]]:
    """The shapes of a task's tensors, the output's last; all are float32."""
    return [tuple(shape) for shape in json.loads(key)[1:] if isinstance(shape, list)]


def operator_of(key: str) -> str:
    """What a task computes, for people, from its tensors' shapes."""
    *inputs, output = shapes(key)
    where = "×".join(map(str, output[1:-1] if len(output) > 2 else output))
    for image, weight in pairwise(inputs):
        if not len(image) == len(weight) == 4 or image[3] != weight[2]:
            continue
        filters = f"{weight[0]}×{weight[1]}"
        if weight[3] == 1 and output[3] == image[3] > 1:
            return f"depthwise {filters}, {image[3]}, {where}"
        if weight[3] == output[3]:
            residual = " + residual" if inputs.index(image) else ""
            return f"conv {filters}, {image[3]}→{weight[3]}, {where}{residual}"
    return f"other, {where}"
