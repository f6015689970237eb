"""float16 networks: which operators stay in float32, what the others cost in accuracy, and how far off an answer may be."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper

from netship.bundle.manifest import Float16, InFloat32
from netship.compile import passes
from netship.compile.frontend.model import Model
from netship.compile.ir.graph import Graph, Operator, Tensor, check
from netship.compile.ir.operators import Convolution
from netship.compile.passes.half import (
    ARITHMETIC,
    BEFORE,
    LARGEST,
    LEAST_NORMAL,
    LONGEST_SUM,
    is_half,
    is_long_sum,
    to_float16,
)
from netship.compile.passes.simplify import limits_of
from netship.compile.quantize.reduced import (
    Reduced,
    RoundedReference,
    measured,
    noise,
    on_request,
)
from netship.compile.quantize.simulation import Probe, Sample, costly, written
from netship.targets.errors import UserError
from netship.targets.escapes import shown

Array = NDArray[Any]

# Other inputs may give values as many times as large as those seen.
_MARGIN = 8
# float16 rounds to 2^-11.
_ROUNDING = 2.0**-11
# Numbers near zero become very large in these, or are divided by.
_SENSITIVE = ("Div", "Log", "Pow", "Reciprocal", "Sqrt")
_OTHER = Tensor("", ())


class Range(NamedTuple):
    """What was seen of a tensor: its largest magnitude, its smallest that is not zero, whether all are finite."""

    most: float
    least: float
    finite: bool


def prepare(
    model: Model,
    samples: Sequence[Sample],
    calibration: int,
    keep_float: Sequence[str],
    dump: passes.Dump,
) -> Reduced[Float16]:
    """The float16 form of a float32 network; what may overflow or vanish stays in float32.

    Args:
        samples: the inputs of inferences by which ranges are known.
        calibration: how many of them, the first, are the user's.
        keep_float: nodes that stay in float32 on request.

    Raises:
        UserError: no such node, nothing is left for float16, or a float16 tensor is not finite where float32's is.
    """
    graph = passes.read(model.proto, BEFORE, dump)
    ranges = _ranges(graph, model, samples)
    kept = _kept(graph, ranges)
    kept |= on_request(graph, keep_float, "float16")
    kept |= costly(graph, model, kept, samples, to_float16, is_half)
    half = to_float16(graph, kept)
    check(half)
    dump("to_float16", half)
    if not any(each.dtype == "float16" for each in half.tensors.values()):
        raise UserError(
            f"{model.identity.name}: nothing of it can be computed in float16; build it without --precision float16"
        )
    facts = Float16(
        images=calibration,
        seeded=len(samples) - calibration,
        float32=tuple(
            InFloat32(
                tensor=operator.outputs[0].name,
                node=operator.label,
                kind=operator.kind,
                reason=kept.get(
                    operator.outputs[0].name, f"{operator.kind} computes in float32"
                ),
            )
            for operator in graph.operators
            if not is_half(operator, kept)
        ),
        float32_sums=tuple(
            each.label
            for each in graph.operators
            if is_long_sum(each) and is_half(each, kept)
        ),
    )
    layers = {
        operator.output.name: operator
        for operator in graph.operators
        if half.tensors.get(operator.output.name, _OTHER).dtype == "float16"
    }
    lost = measured(model, graph, half, layers, samples, "float16")
    return Reduced(half, facts, lost)


def graph_of(model: Model, facts: Float16) -> Graph:
    """The network again that a build made, from what its manifest says."""
    graph = passes.read(model.proto, BEFORE)
    return to_float16(graph, {each.tensor for each in facts.float32})


class Float16Reference(RoundedReference):
    """Of a network in float16.

    Weights of a sum are disturbed by as much as its partial sums are, too. The roundings of n products of random signs
    have a variance of n u²/3 (u: 2^-11; two factors each, u²/6 being the mean over a binade), those of their n partial
    sums one of n² u²/12.
    """

    rounding = _ROUNDING

    def disturbed(self, random: np.random.Generator) -> onnx.ModelProto:
        return disturbed(self._graph, random)


def disturbed(
    graph: Graph, random: np.random.Generator, share: float = 1.0
) -> onnx.ModelProto:
    """The float16 network in ONNX with its weights moved at random by their rounding and by that of partial sums.

    Args:
        share: of how far they are moved.
    """
    proto = written(graph)
    terms = {
        operator.inputs[1].name: min(operator.depth, LONGEST_SUM)
        for operator in graph.operators
        if isinstance(operator, Convolution) and operator.inputs[1]
    }
    for tensor in proto.graph.initializer:
        if graph.tensors.get(tensor.name, _OTHER).dtype == "float16":
            value = numpy_helper.to_array(tensor)
            partial = np.sqrt(1 + terms.get(tensor.name, 0) / 4)
            moved = value * (
                1 + share * partial * noise(value.shape, random, _ROUNDING)
            )
            inside = np.where(
                np.isfinite(value), np.clip(moved, -LARGEST, LARGEST), value
            )
            tensor.CopyFrom(
                numpy_helper.from_array(inside.astype(np.float32), tensor.name)
            )
    return proto


def _names(tensors: Sequence[Tensor | None]) -> list[str]:
    return [each.name for each in tensors if each is not None]


def guarded(model: Model, graph: Graph, samples: Sequence[Sample]) -> set[str]:
    """The first outputs of operators that could overflow or vanish in float16.

    Args:
        graph: of ``model`` in float32, after `BEFORE`.
    """
    return set(_kept(graph, _ranges(graph, model, samples)))


def _ranges(graph: Graph, model: Model, samples: Sequence[Sample]) -> dict[str, Range]:
    made = [
        each.name
        for operator in graph.operators
        for each in operator.outputs
        if each.dtype == "float32"
    ]
    found, probe = dict[str, Range](), Probe(graph, made, model)
    for sample in samples:
        seen = probe.run(sample)
        seen |= {k: v for k, v in model.feeds(sample).items() if v.dtype == np.float32}
        for name, value in seen.items():
            size = np.abs(value[np.isfinite(value)].astype(np.float64))
            before = found.get(name, Range(0.0, np.inf, True))
            found[name] = Range(
                max(before.most, float(size.max(initial=0))),
                min(before.least, float(size[size > 0].min(initial=np.inf))),
                before.finite and size.size == value.size,
            )
    return found


def _kept(graph: Graph, ranges: Mapping[str, Range]) -> dict[str, str]:
    """Why an operator of `ARITHMETIC` stays in float32, by the name of its first output."""
    limits = {
        operator.output.name: max(map(abs, limited))
        for operator in graph.operators
        if operator.kind == "Clip" and (limited := limits_of(operator))
    }
    most = {
        name: min(each.most * _MARGIN, limits.get(name, np.inf))
        for name, each in ranges.items()
    }
    unfit = dict[str, str]()
    for name, each in ranges.items():
        readers = {reader.kind for reader in graph.readers.get(name, ())}
        if not each.finite:
            unfit[name] = f"{shown(name)!r} is infinite or NaN"
        elif most[name] > LARGEST:
            unfit[name] = f"{shown(name)!r} has values of {each.most:.3g}"
        elif 0 < each.most < LEAST_NORMAL or (
            each.least < LEAST_NORMAL and readers.intersection(_SENSITIVE)
        ):
            unfit[name] = f"{shown(name)!r} has values of {each.least:.3g}"
    kept = dict[str, str]()
    for operator in graph.operators:
        if operator.kind not in ARITHMETIC:
            continue
        ports = _names((*operator.inputs, *operator.outputs))
        why = next((unfit[name] for name in ports if name in unfit), "")
        if why := why or _unfit_constants(operator) or _unfit_sum(operator, most):
            kept[operator.outputs[0].name] = why
    return kept


def _unfit_constants(operator: Operator) -> str:
    if operator.kind in ("Clip", "Pad"):
        return ""
    for tensor in operator.inputs:
        if tensor is None or tensor.value is None or tensor.dtype != "float32":
            continue
        size = np.abs(tensor.value[np.isfinite(tensor.value)])
        if size.max(initial=0) > LARGEST:
            return f"weights {shown(tensor.name)!r} have values of {size.max():.3g}"
        # Of weights each output has its own row, which may be smaller than the others.
        rows = size.reshape(len(size), -1) if size.ndim > 1 else size.reshape(1, -1)
        largest = rows.max(axis=1, initial=0)
        least = largest[largest > 0].min(initial=np.inf)
        if least < LEAST_NORMAL:
            return f"weights {shown(tensor.name)!r} have values of {least:.3g}"
    return ""


def _unfit_sum(operator: Operator, most: Mapping[str, float]) -> str:
    """Whether partial sums of a convolution may overflow: they are at most the sum of all magnitudes."""
    if not isinstance(operator, Convolution):
        return ""
    weights = operator.constant(1)
    if weights is None or len(operator.activations) > 1:
        return "its weights are computed"
    sums = np.abs(weights.astype(np.float64)).reshape(len(weights), -1).sum(axis=1)
    bound = sums * most.get(operator.input.name, np.inf) + np.abs(operator.bias)
    if bound.max() > LARGEST:
        return f"partial sums may reach {bound.max():.3g}"
    return ""
