"""A network into a C project whose answers were compared before it is called built."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from bundle.manifest import (
    Firmware,
    Group,
    Lowering,
    MemoryPlan,
    PlannedBuffer,
    Quantised,
)
from compile.backends.c import emit
from compile.backends.c.emit import Constants, Project
from compile.ir import graph
from compile.ir.graph import Add, AveragePool, Convolution, Tensor
from compile.program import plan
from devices.microcontroller.host import run_on_host
from targets.presets import Target


def build(
    proto: onnx.ModelProto,
    name: str,
    version: str,
    target: Target,
    folder: Path,
    arena_limit: int | None,
    stage: Callable[[str], None],
) -> tuple[Lowering, Firmware]:
    """Write the C project ``name`` of a QDQ or float32 graph into ``folder``, its self-test's answer from this machine.

    Raises:
        UserError: an operator has no C lowering, a layer is too large, or the arena is larger than
            ``arena_limit`` bytes.
    """
    stage("reading the operators")
    network = graph.read(proto)
    project = emit.prepare(network, name, version, target.name)
    plan.check_limit(project.arena, project.steps, arena_limit)
    stage("writing C")
    constants = emit.emit(project, folder)
    interface = _interface(project, constants)
    unknown = np.zeros(network.output.size, interface.dtype)
    emit.emit_golden(project, folder, constants, unknown)
    stage("asking the same C on this machine for the self-test's answer")
    pattern = emit.test_pattern(network)[np.newaxis]
    answer = run_on_host(folder, name, interface, pattern)[0]
    emit.emit_golden(project, folder, constants, answer)
    return _lowering(project), interface


def _interface(project: Project, constants: Constants) -> Firmware:
    source, output = project.network.input, project.network.output
    return Firmware(
        cpu=project.cpu,
        input=_quantised(source),
        output=_quantised(output),
        input_bytes=source.nbytes,
        output_bytes=output.nbytes,
        arena_bytes=project.arena.nbytes,
        input_offset=project.arena.offset(source.name),
        peak=project.steps[project.arena.peak].name,
        steps=len(project.steps),
        weights_bytes=constants.nbytes,
    )


_KINDS = {Add: "add", AveragePool: "global_avg_pool2d"}


def _kind(operator: Any) -> str:
    if isinstance(operator, Convolution):
        return "dense" if operator.input.shape[:2] == (1, 1) else "conv2d"
    return _KINDS[type(operator)]


def _lowering(project: Project) -> Lowering:
    arena = project.arena
    counted = Counter(
        _kind(operator)
        for operator in project.network.operators
        if isinstance(operator, Convolution)
    )
    return Lowering(
        layout="NHWC",
        reason=f"{'float32' if project.network.floating else 'int8'} kernels for Cortex-M, inverted residuals "
        "row by row",
        operators=dict(counted),
        groups=tuple(
            Group(
                name=f"step{index}",
                layer=step.name,
                operators=tuple(_kind(part) for part in step.parts),
                output_shape=step.output.shape,
                macs=step.macs,
            )
            for index, step in enumerate(project.steps)
        ),
        workspace_bytes=arena.nbytes,
        memory=MemoryPlan(
            arena_bytes=arena.nbytes,
            lower_bound=arena.lower_bound,
            outer_workspace_bytes=0,
            inner_workspace_bytes=0,
            buffers=tuple(
                PlannedBuffer(
                    name=b.name,
                    nbytes=b.nbytes,
                    offset=b.offset,
                    first=b.first,
                    last=b.last,
                )
                for b in arena.buffers
            ),
        ),
    )


def _quantised(tensor: Tensor) -> Quantised | None:
    if tensor.itemsize != 1:
        return None
    return Quantised(scale=tensor.quantisation.scale, zero=tensor.quantisation.zero)
