"""A network into a C project whose answers were compared before it is called built."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from bundle.accuracy import compare
from bundle.manifest import Firmware, Group, Lowering, Quantised
from compile import passes
from compile.backends.backend import Built
from compile.backends.c import arrange, emit, support
from compile.backends.c.emit import Constants, Project
from compile.ir.graph import Graph, Operator, Tensor
from compile.ir.operators import Convolution
from compile.passes.layout import channels_last
from compile.passes.ports import integer_ports
from compile.passes.simplify import drop_identities
from compile.passes.storage import store_as_int8
from devices.microcontroller.host import run_on_host
from targets.errors import UserError
from targets.presets import Target

Floats = NDArray[np.float32]

# From what passes.INTEGERS and passes.FLOATS make to what the kernels take.
PASSES: tuple[passes.Pass, ...] = (
    integer_ports,
    store_as_int8,
    channels_last,
    drop_identities,
)


def build(
    graph: Graph,
    name: str,
    version: str,
    target: Target,
    folder: Path,
    arena_limit: int | None,
    stage: Callable[[str], None],
    expected: Callable[[Floats], tuple[Floats, Floats]],
    dump: passes.Dump = passes.no_dump,
) -> Built:
    """Write the C project ``name`` of a network into ``folder``.

    The self-test demands of int8 what the same C gives on this machine, of float32 what the reference gives.

    Args:
        graph: after passes.INTEGERS or passes.FLOATS.
        expected: the reference: an input as the C takes it → the output and its tolerances as the C gives it.

    Raises:
        UserError: an operator has no C lowering, a layer is too large, the arena is larger than
            ``arena_limit`` bytes, or the self-test would fail.
    """
    stage("planning memory")
    graph = passes.run(PASSES, graph, dump)
    support.check(graph)
    arranged = arrange.arrange(graph)
    arrange.check_limit(arranged, arena_limit)
    project = Project(name, version, target.name, graph, arranged)
    stage("writing C")
    constants = emit.emit(project, folder)
    interface = _interface(project, constants)
    unknown = np.zeros(project.output.size, np.float32)
    emit.emit_golden(project, folder, constants, unknown, unknown)
    stage("asking the same C on this machine for the self-test's answer")
    pattern = emit.test_pattern(graph)
    answer = run_on_host(folder, name, interface, pattern[np.newaxis])[0]
    tolerance = None
    if project.floating:
        found, (answer, tolerance) = answer, expected(pattern)
        if not compare([found], [answer], [tolerance]).passed:
            raise UserError(
                f"{name}_self_test: would fail on this machine; please report the model"
            )
    emit.emit_golden(project, folder, constants, answer, tolerance)
    return Built(_lowering(project), interface)


def _interface(project: Project, constants: Constants) -> Firmware:
    source, output, plan = project.input, project.output, project.plan
    return Firmware(
        cpu=project.cpu,
        input=_quantised(source),
        output=_quantised(output),
        input_bytes=source.nbytes,
        output_bytes=output.nbytes,
        arena_bytes=plan.nbytes,
        input_offset=plan.offsets[project.arranged.owner(source)],
        peak=project.steps[plan.peak].name,
        steps=len(project.steps),
        weights_bytes=constants.nbytes,
    )


def _lowering(project: Project) -> Lowering:
    plan = project.plan
    numbers = "float32" if project.floating else "int8"
    return Lowering(
        layout="NHWC",
        reason=f"{numbers} kernels for Cortex-M, inverted residuals row by row",
        operators=Counter(
            _kind(operator)
            for operator in project.graph.operators
            if isinstance(operator, Convolution)
        ),
        groups=tuple(
            Group(
                name=f"step{index}",
                layer=step.name,
                operators=tuple(map(_kind, step.parts)),
                output_shape=step.output.image,
                macs=step.macs,
            )
            for index, step in enumerate(project.steps)
        ),
        workspace_bytes=plan.nbytes,
        memory=plan.describe(project.arranged.program),
    )


def _kind(operator: Operator) -> str:
    if isinstance(operator, Convolution):
        return "dense" if operator.input.image[:2] == (1, 1) else "conv2d"
    is_pool = operator.kind == "GlobalAveragePool"
    return "global_avg_pool2d" if is_pool else operator.kind.lower()


def _quantised(tensor: Tensor) -> Quantised | None:
    if tensor.quantisation is None:
        return None
    return Quantised(scale=tensor.scale, zero=tensor.zero)
