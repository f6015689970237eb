"""A network into a C project whose answers were compared before it is called built."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from netship.bundle.accuracy import INT8_STEPS, compare
from netship.bundle.manifest import Firmware, FirmwareTensor, Group, Lowering, Quantised
from netship.bundle.manifest import Tensor as Given
from netship.compile import passes
from netship.compile.backends.backend import Built
from netship.compile.backends.c import arrange, emit, placement, support
from netship.compile.backends.c.emit import Constants
from netship.compile.backends.c.ports import dims, test_patterns
from netship.compile.backends.c.project import Project
from netship.compile.backends.c.steps import Generated, Step, fuse
from netship.compile.ir.graph import Graph, Operator, Tensor
from netship.compile.ir.islands import CFunction, Island
from netship.compile.ir.operators import Convolution
from netship.compile.kernels.cortex_m import pack
from netship.compile.passes.layout import (
    channels_last,
    ports_channels_last,
    transposed_as_views,
)
from netship.compile.passes.ports import (
    dequantise_for_each,
    integer_ports,
    own_outputs,
)
from netship.compile.passes.simplify import drop_identities, fold_constants
from netship.compile.passes.storage import store_as_int8
from netship.devices.microcontroller.host import run_on_host
from netship.devices.microcontroller.regions import Region
from netship.targets.child import run_in_child
from netship.targets.cores import CORES
from netship.targets.errors import UserError
from netship.targets.escapes import counted
from netship.targets.presets import Target
from netship.targets.progress import Progress

Floats = NDArray[np.float32]

# From what passes.INTEGERS and passes.FLOATS make to what the kernels take.
PASSES: tuple[passes.Pass, ...] = (
    fold_constants,
    integer_ports,
    store_as_int8,
    channels_last,
    ports_channels_last,
    transposed_as_views,
    drop_identities,
    own_outputs,
    dequantise_for_each,
)


def build(
    graph: Graph,
    name: str,
    version: str,
    target: Target,
    folder: Path,
    arena_limit: int | None,
    progress: Progress,
    inputs: Sequence[Given],
    expected: Callable[[Sequence[Floats]], list[tuple[Floats, Floats]]],
    dump: passes.Dump = passes.no_dump,
    flash_limit: int | None = None,
    extras: Sequence[str] = (),
    regions: Sequence[Region] = (),
) -> Built:
    """Write the C project ``name`` of a network into ``folder``.

    The self-test demands of int8 what the same C gives on this machine, of float32 what the reference gives.

    Args:
        graph: after passes.INTEGERS or passes.FLOATS.
        inputs: the model's.
        expected: the reference: inputs in the order that the C takes them in → each output and its tolerances as the C gives it.
        extras: what else the project has, written after this: "image", "labels", "detect", "segment".
        regions: the memories for activations and weights; without them there is one arena, wherever the caller likes.

    Raises:
        UserError: the network is float32 and the core has no FPU, TVM has no C for an operator, the arena is larger than ``arena_limit`` bytes or the weights than
            ``flash_limit``, or the self-test would fail.
    """
    if not graph.quantised and CORES[target.name].float_abi == "soft":
        raise UserError(
            f"--target {target.name}: has no FPU, and the network is float32; add --quantize int8 --calibration PHOTOS"
        )
    progress.stage("planning memory")
    graph = passes.run(PASSES, graph, dump)
    support.check(graph)
    arranged = arrange.arrange(
        graph,
        written(fuse(graph), graph.opset, progress),
        widened=graph.quantised and pack.layout_of(target.name) == pack.SMLAD,
    )
    arrange.check_arena(arranged, arena_limit)
    if regions:
        arranged = placement.split(arranged, regions, target.name)
    facts = (graph, arranged, inputs, extras, regions)
    project = Project(name, version, target.name, *facts)
    progress.stage("writing C")
    constants = emit.emit(project, folder)
    sizes = constants.nbytes, constants.largest
    arrange.check_flash(*sizes, flash_limit, graph.quantised)
    interface = _interface(project, constants)
    unknown = [np.zeros(each.tensor.size) for each in project.outputs]
    emit.emit_golden(project, folder, constants, unknown, unknown)
    progress.stage("asking the same C on this machine for the self-test's answer")
    patterns = test_patterns(graph, inputs)
    stored = b"".join(each.tobytes() for each in patterns)
    answers = run_on_host(folder, name, interface, [stored])[0]
    tolerances = [np.full(each.size, INT8_STEPS) for each in answers]
    floats = [i for i, each in enumerate(graph.outputs) if not each.quantisation]
    if floats:
        pairs = zip(patterns, graph.inputs, strict=True)
        wanted = expected([_real(*each) for each in pairs])
        for index in floats:
            found, (answers[index], tolerances[index]) = answers[index], wanted[index]
            if not compare(
                [found], *([x[index]] for x in (answers, tolerances))
            ).passed:
                raise UserError(
                    f"{name}_self_test: would fail on this machine; please report the model"
                )
            # The reference may have the largest number there.
            answers[index] = np.where(np.isinf(found), found, answers[index])
    emit.emit_golden(project, folder, constants, answers, tolerances)
    return Built(_lowering(project), interface)


def _real(stored: NDArray[Any], tensor: Tensor) -> Floats:
    """The numbers that stored values of a tensor stand for."""
    if tensor.quantisation is None:
        return stored.astype(np.float32)
    return (stored.astype(np.float32) - tensor.zero) * np.float32(tensor.scale)


def written(steps: Sequence[Step], opset: int, progress: Progress) -> tuple[Step, ...]:
    """The steps with the functions that TVM writes, in a process of its own."""
    islands = [each.island for each in steps if isinstance(each, Generated)]
    if not islands:
        return tuple(steps)
    functions = iter(
        run_in_child(
            _functions, islands, opset, stage=progress.stage, tick=progress.tick
        )
    )
    return tuple(
        replace(each, function=next(functions)) if isinstance(each, Generated) else each
        for each in steps
    )


def _functions(
    islands: Sequence[Island], opset: int, stage: Callable[[str], None]
) -> list[CFunction]:
    stage("writing C for what has no kernel")
    from netship.compile.relay.c_functions import c_functions

    return c_functions(islands, opset)


def _interface(project: Project, constants: Constants) -> Firmware:
    plan = project.plan
    return Firmware(
        cpu=project.cpu,
        inputs=tuple(map(_port, project.graph.inputs)),
        outputs=tuple(_port(each.tensor) for each in project.outputs),
        exact=project.exact,
        arena_bytes=plan.nbytes,
        input_offsets=tuple(
            plan.offsets[project.arranged.owner(x)] for x in project.graph.inputs
        ),
        peak=project.steps[plan.peak].name,
        steps=len(project.steps),
        weights_bytes=constants.nbytes,
        arenas=placement.arenas(project.arranged, project.cpu, project.regions),
        weights_in=constants.weights_in,
    )


def _lowering(project: Project) -> Lowering:
    plan = project.plan
    numbers = "float32" if project.floating else "int8"
    where = "for Cortex-M" if project.core.cpu else "in C99"
    return Lowering(
        layout="NHWC",
        reason=f"{numbers} kernels {where}, inverted residuals row by row{_generated(project)}",
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
                output_shape=dims(step.output),
                macs=step.macs,
            )
            for index, step in enumerate(project.steps)
        ),
        workspace_bytes=plan.nbytes,
        memory=plan.describe(project.arranged.program),
    )


def _generated(project: Project) -> str:
    """How much has no kernel, for a person; empty where everything has one."""
    made = [each for each in project.steps if isinstance(each, Generated)]
    floats = [
        each
        for each in made
        if not project.floating
        and any(part.output.quantisation is None for part in each.parts[:-1])
    ]
    if not made:
        return ""
    also = f", {len(floats)} of them in float32" if floats else ""
    steps = counted(len(project.steps), "step")
    return f"; in plain C by TVM, as they have no kernel: {len(made)} of {steps}{also}"


def _kind(operator: Operator) -> str:
    if isinstance(operator, Convolution):
        return "dense" if operator.input.image[:2] == (1, 1) else "conv2d"
    is_pool = operator.kind == "GlobalAveragePool"
    return "global_avg_pool2d" if is_pool else operator.kind.lower()


def _port(tensor: Tensor) -> FirmwareTensor:
    quantised = (
        Quantised(scale=tensor.scale, zero=tensor.zero) if tensor.quantisation else None
    )
    return FirmwareTensor(dtype=tensor.dtype, nbytes=tensor.nbytes, quantised=quantised)  # type: ignore[arg-type]
