"""Networks with fewer bits a number than float32: what that costs in accuracy, and how far off an answer may be."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, ClassVar, Generic, TypeVar

import numpy as np
import onnx
from numpy.typing import NDArray

from netship.bundle.accuracy import cosine
from netship.compile.frontend.model import Model
from netship.compile.frontend.reference import Reference
from netship.compile.frontend.tolerance import of_slices, tolerance
from netship.compile.ir.graph import Graph, Operator
from netship.compile.quantize.simulation import Probe, Sample
from netship.targets.errors import UserError
from netship.targets.escapes import shown
from netship.targets.onnx_runtime import Session

Array = NDArray[Any]
Facts = TypeVar("Facts")

_RUNS = 4
# How many times as far as the roundings move the reference an answer may be off.
_FACTOR = 4.0
_LEAST_COSINE = 0.99


@dataclass(frozen=True)
class Reduced(Generic[Facts]):
    """A network with fewer bits.

    Attributes:
        graph: with what has fewer bits.
        facts: for the manifest.
        measured: what it loses against float32, simulated by ONNX Runtime.
    """

    graph: Graph
    facts: Facts
    measured: dict[str, Any]


def on_request(graph: Graph, names: Sequence[str], numbers: str) -> dict[str, str]:
    """The operators that ``--keep-float`` names, by their first output: the reason that they stay in float32.

    Raises:
        UserError: there is no such operator.
    """
    known = {
        name: operator.outputs[0].name
        for operator in graph.operators
        for name in (operator.name, *(each.name for each in operator.outputs))
    }
    for name in names:
        if name not in known:
            raise UserError(
                f"--keep-float {shown(name)!r}: no operator of the network in {numbers} has this name; give a node's name, "
                "or that of its output"
            )
    return {known[name]: "--keep-float" for name in names}


class RoundedReference(Reference):
    """ONNX Runtime in float32, with tolerances for fewer bits: what their roundings move the answer by.

    To find that, the network is run as it is rounded, its input and weights disturbed at random by as much.

    Attributes:
        rounding: the largest relative error of a rounded number.
    """

    rounding: ClassVar[float]

    def __init__(self, model: Model, graph: Graph, threads: int = 1) -> None:
        super().__init__(model, threads)
        self._graph = graph
        self._moved: list[Session] = []

    def disturbed(self, random: np.random.Generator) -> onnx.ModelProto:
        """The network in ONNX as it is rounded, its weights moved at random."""
        raise NotImplementedError

    def tolerances(
        self, tensors: Sequence[NDArray[Any]], answer: Sequence[NDArray[Any]]
    ) -> list[NDArray[np.float32]]:
        """Of each element of each output how far from ``answer``, which `run` gave for ``tensors``, it may be."""
        random = np.random.default_rng(1)
        names = [each.name for each in self._graph.outputs]
        if not self._moved:
            for _ in range(_RUNS):
                data = self.disturbed(random).SerializeToString()
                self._moved.append(Session(data, self._model.identity.name))
        moved = []
        for session in self._moved:
            given = [
                each
                if each.dtype.kind != "f"
                else (each * (1 + noise(each.shape, random, self.rounding))).astype(
                    np.float32
                )
                for each in tensors
            ]
            moved.append(session.run(names, self._model.feeds(given)))
        found = []
        for k, output in enumerate(answer):
            near = tolerance(output, [each[k] for each in moved], _FACTOR)
            if output.dtype.kind == "f":
                # A few runs may leave one element, and a Relu half of them, where they were.
                changes = [
                    np.abs(each[k].astype(np.float64) - output) for each in moved
                ]
                largest = np.nan_to_num(np.max(changes, axis=0), posinf=0.0)
                size = np.where(np.isfinite(output), np.abs(output), 0)
                floor = of_slices(np.atleast_1d(largest), _root_mean_square)
                floor = floor.reshape(output.shape) + self.rounding * size
                near = near + (_FACTOR * floor).astype(np.float32)
            found.append(near)
        return found


def _root_mean_square(values: Array, **axes: Any) -> Any:
    return np.sqrt(np.mean(np.square(values), **axes))


def noise(
    shape: tuple[int, ...], random: np.random.Generator, rounding: float
) -> Array:
    """Relative errors of numbers that are rounded."""
    return random.uniform(-rounding, rounding, shape)


def measured(
    model: Model,
    graph: Graph,
    reduced: Graph,
    layers: Mapping[str, Operator],
    samples: Sequence[Sample],
    numbers: str,
) -> dict[str, Any]:
    """What ``numbers`` of fewer bits lose against float32 on the samples, and the layer with the least signal to noise.

    Args:
        layers: those of ``graph`` that have fewer bits, by their output.

    Raises:
        UserError: a tensor is not finite where float32's is.
    """
    outputs = [each.name for each in graph.outputs]
    names = list(dict.fromkeys([*layers, *outputs]))
    lost, signal = dict.fromkeys(names, 0.0), dict.fromkeys(names, 0.0)
    same, least = 0, 1.0
    floating, rounded = (Probe(each, names, model) for each in (graph, reduced))
    for sample in samples:
        exact, ours = floating.run(sample), rounded.run(sample)
        for name in names:
            finite = np.isfinite(exact[name])
            if not np.isfinite(ours[name][finite]).all():
                raise UserError(
                    f"{model.identity.name}: tensor {shown(name)!r} is infinite or NaN in {numbers} and not in float32; "
                    f"leave what makes it in float32 (--keep-float {shown(name)!r}), or build without --precision {numbers}"
                )
            real = exact[name][finite].astype(np.float64)
            signal[name] += float((real**2).sum())
            lost[name] += float(((ours[name][finite] - real) ** 2).sum())
        first = outputs[0]
        same += int(exact[first].argmax() == ours[first].argmax())
        for name in outputs:
            if exact[name].dtype == np.float32:
                least = min(least, cosine(ours[name], exact[name]))
    ratios = {
        name: 10 * np.log10((signal[name] or 1e-30) / (lost[name] or 1e-30))
        for name in names
    }
    worst = min(ratios, key=ratios.__getitem__)
    label = layers[worst].label if worst in layers else worst
    shape = model.outputs[0].shape
    classifies = len(outputs) == 1 and prod(shape) == max(shape, default=1)
    return {
        "cosine": round(least, 6),
        "top1_agreement": same / len(samples) if classifies else None,
        "images": len(samples),
        "worst_layer": label,
        "worst_decibels": round(float(ratios[worst]), 1),
    }


def loss(measured: Mapping[str, Any], numbers: str) -> str:
    """What ``numbers`` of fewer bits lose, if it is too much; else empty."""
    if measured["cosine"] >= _LEAST_COSINE:
        return ""
    return (
        f"{numbers} loses too much: cosine {measured['cosine']:.4f} (at least {_LEAST_COSINE}); least signal to noise at "
        f"{shown(measured['worst_layer'])} ({measured['worst_decibels']:.1f} dB)"
    )
