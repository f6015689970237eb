"""bfloat16 networks: which convolutions stay in float32, what the others cost in accuracy, how far off an answer may be.

bfloat16 has the exponents of float32: nothing overflows that did not before, and only accuracy is to be guarded.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx
from onnx import numpy_helper

from netship.bundle.manifest import BFloat16, InFloat32
from netship.compile import passes
from netship.compile.frontend.model import Model
from netship.compile.ir.graph import Graph, check
from netship.compile.passes.bfloat16 import (
    is_reduced,
    short_weights,
    to_bfloat16,
    unfit,
)
from netship.compile.passes.half import BEFORE
from netship.compile.quantize.reduced import (
    Reduced,
    RoundedReference,
    measured,
    noise,
    on_request,
)
from netship.compile.quantize.simulation import Sample, costly, written
from netship.targets.errors import UserError

# bfloat16 rounds to 2^-8.
_ROUNDING = 2.0**-8


def prepare(
    model: Model,
    samples: Sequence[Sample],
    calibration: int,
    keep_float: Sequence[str],
    dump: passes.Dump,
) -> Reduced[BFloat16]:
    """The bfloat16 form of a float32 network.

    Args:
        samples: the inputs of inferences by which the loss is known.
        calibration: how many of them, the first, are the user's.
        keep_float: nodes that stay in float32 on request.

    Raises:
        UserError: no such node, or nothing is left for bfloat16.
    """
    graph = passes.read(model.proto, BEFORE, dump)
    kept = on_request(graph, keep_float, "bfloat16")
    kept |= costly(graph, model, kept, samples, to_bfloat16, is_reduced)
    layers = {
        operator.output.name: operator
        for operator in graph.operators
        if is_reduced(operator, kept)
    }
    if not layers:
        raise UserError(
            f"{model.identity.name}: nothing of it can be computed in bfloat16; build it without --precision bfloat16"
        )
    reduced = to_bfloat16(graph, kept)
    check(reduced)
    dump("to_bfloat16", reduced)
    facts = BFloat16(
        images=calibration,
        seeded=len(samples) - calibration,
        float32=tuple(
            InFloat32(
                tensor=operator.output.name,
                node=operator.label,
                kind=operator.kind,
                reason=unfit(operator) or kept[operator.output.name],
            )
            for operator in graph.operators
            if operator.kind == "Conv" and operator.output.name not in layers
        ),
    )
    lost = measured(model, graph, reduced, layers, samples, "bfloat16")
    return Reduced(reduced, facts, lost)


def graph_of(model: Model, facts: BFloat16) -> Graph:
    """The network again that a build made, from what its manifest says."""
    graph = passes.read(model.proto, BEFORE)
    return to_bfloat16(graph, {each.tensor for each in facts.float32})


class BFloat16Reference(RoundedReference):
    """Of a network in bfloat16."""

    rounding = _ROUNDING

    def disturbed(self, random: np.random.Generator) -> onnx.ModelProto:
        proto = written(self._graph)
        short = short_weights(self._graph)
        for tensor in proto.graph.initializer:
            if tensor.name in short:
                value = numpy_helper.to_array(tensor)
                moved = value * (1 + noise(value.shape, random, _ROUNDING))
                tensor.CopyFrom(
                    numpy_helper.from_array(moved.astype(np.float32), tensor.name)
                )
        return proto
