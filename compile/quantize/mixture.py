"""A network whose layers compute in int8, float16 or float32, each as it is chosen: its graphs, and what it loses."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from netship.bundle.accuracy import INT8_STEPS
from netship.bundle.manifest import Quantisation
from netship.compile import passes
from netship.compile.frontend.model import Model
from netship.compile.frontend.reference import Reference
from netship.compile.ir.graph import Graph, check
from netship.compile.passes.half import BEFORE, is_half, to_float16
from netship.compile.quantize import float16, loss
from netship.compile.quantize.answer import output_steps
from netship.compile.quantize.calibrate import Calibrated, Sample
from netship.compile.quantize.float16 import Float16Reference
from netship.compile.quantize.mixing import layers, mix
from netship.compile.quantize.prepare import REFERENCE, Int8
from netship.compile.quantize.tradeoff import Choice, Passed, Precision
from netship.targets.onnx_runtime import Session

Array = NDArray[np.float32]

# Of float16's noise as tolerances assume it, what a build is seen to have: MobileNetV2 1.0/224 loses 0.0025 with tensors
# rounded, 0.0115 with all of the noise, and 0.0050 in the compiled code.
_SHARE = 0.4


@dataclass(frozen=True)
class Mixed:
    """One choice.

    Attributes:
        model: in float32 and int8; where float16 is chosen it says float32.
        graph: what a backend compiles.
        rounded: the network in ONNX's operators, with float16; None where there is none.
    """

    model: Model
    graph: Graph
    rounded: Graph | None

    @property
    def reference(self) -> Reference:
        """ONNX Runtime, with tolerances for float16 where there is any."""
        if self.rounded is None:
            return Reference(self.model)
        return Float16Reference(self.model, self.rounded)


@dataclass(frozen=True)
class Chosen:
    """What --precision auto has chosen for a build.

    Attributes:
        mixed: the network; None where a build without this makes it.
        int8: of the network, where a part of it computes on integers.
        judge: of the folder of a build that is verified, what it loses and costs; it may refuse it.
    """

    mixed: Mixed | None = None
    int8: Int8 | None = None
    judge: Callable[[Path], dict[str, Any]] | None = None


AS_ASKED = Chosen()
"""Of a build that its options alone describe."""


class Mixture:
    """A network of layers to choose types for.

    Attributes:
        layers: in the order they run.
        precisions: the types that each may have.
    """

    def __init__(
        self,
        model: Model,
        samples: Sequence[Sample],
        calibrated: Calibrated,
        ranges: Sequence[Sample],
        has_float16: bool,
    ) -> None:
        """
        Args:
            samples: the user's inputs, on which losses are measured.
            ranges: further inputs, by which is known what could overflow in float16.
        """
        self._calibrated = calibrated
        self._floating = replace(model, proto=calibrated.folded)
        self._samples = samples
        self.layers = layers(calibrated.folded)
        reference = Reference(model)
        self.expected = [reference.run(*each) for each in samples]
        self._plain = passes.read(calibrated.folded, ())
        plain = passes.run(BEFORE, self._plain)
        self._guarded = set[str]()
        if has_float16:
            self._guarded.update(
                float16.guarded(self._floating, plain, [*samples, *ranges])
            )
        half = {
            each.outputs[0].name
            for each in plain.operators
            if is_half(each, self._guarded)
        }
        stored = {x.output[0] for x in calibrated.model.proto.graph.node}
        self.precisions: list[tuple[Precision, ...]] = []
        for layer in self.layers:
            found: list[Precision] = ["float32"]
            if has_float16 and not half.isdisjoint(layer.tensors):
                found.insert(0, "float16")
            if not stored.isdisjoint(
                f"{x}_QuantizeLinear_Output" for x in layer.tensors
            ):
                found.insert(0, "int8")
            self.precisions.append(tuple(found))

    def uniform(self, precision: Precision) -> Choice:
        """That type wherever a layer may have it, else float32."""
        return tuple(
            precision if precision in each else "float32" for each in self.precisions
        )

    def tensors(self) -> list[Passed]:
        """What passes between layers, and between them and the network's inputs and outputs."""
        makers = {x: k for k, each in enumerate(self.layers) for x in each.tensors}
        sizes = {name: each.size for name, each in self._plain.tensors.items()}
        return [
            Passed(makers.get(name), tuple(read), sizes[name])
            for name, read in self._between().items()
        ]

    def _between(self) -> dict[str, list[int | None]]:
        """The layers that read each tensor that passes between them; None is an output of the network."""
        readers: dict[str, list[int | None]] = {}
        for number, layer in enumerate(self.layers):
            for name in layer.inputs:
                readers.setdefault(name, []).append(number)
        for output in self._floating.outputs:
            readers.setdefault(output.name, []).append(None)
        return {k: v for k, v in readers.items() if k in self._plain.tensors}

    def counted(
        self, weights: Mapping[Precision, float], sizes: Mapping[Precision, int]
    ) -> list[dict[Precision, float]]:
        """Of each layer its multiply-adds, weighted, and the bytes that it reads and writes, by type."""
        graph = self._plain
        made = {x.name: each for each in graph.operators for x in each.outputs}
        found = []
        for layer, kinds in zip(self.layers, self.precisions, strict=True):
            own = {id(made[x]): made[x] for x in layer.tensors if x in made}.values()
            macs = sum(each.macs for each in own)
            elements = sum(
                graph.tensors[x].size
                for x in (*layer.inputs, *layer.tensors)
                if x in graph.tensors
            )
            found.append(
                {kind: macs * weights[kind] + elements * sizes[kind] for kind in kinds}
            )
        return found

    def mixed(self, choice: Choice) -> Mixed:
        """The network as it is chosen."""
        pairs = list(zip(self.layers, choice, strict=True))
        integers = {
            name for layer, kind in pairs if kind == "int8" for name in layer.nodes
        }
        proto = mix(self._calibrated.folded, self._calibrated.model.proto, integers)
        model = replace(self._floating, proto=proto)
        halves = "float16" in choice
        graph = passes.read(
            proto, passes.INTEGERS if integers else BEFORE if halves else ()
        )
        if not halves:
            return Mixed(model, graph, None)
        kept = {x for layer, kind in pairs if kind != "float16" for x in layer.tensors}
        kept |= self._guarded
        graph = to_float16(graph, kept)
        check(graph)
        return Mixed(model, graph, to_float16(passes.read(proto, BEFORE), kept))

    def loss(self, choice: Choice) -> float:
        """What the network loses on the samples as it is chosen, by ONNX Runtime.

        Of float16 tensors and partial sums are rounded.
        """
        mixed = self.mixed(choice)
        if mixed.rounded is None:
            return self._loss(mixed.model.proto)
        random = np.random.default_rng(0)
        return self._loss(float16.disturbed(mixed.rounded, random, _SHARE))

    def rounding_losses(self) -> list[float]:
        """What the network loses with each of `tensors` alone rounded to int8, all else in float32."""
        floating, quantised = self._calibrated.folded, self._calibrated.model.proto
        return [
            self._loss(mix(floating, quantised, (), name)) for name in self._between()
        ]

    def _loss(self, proto: onnx.ModelProto) -> float:
        names = [each.name for each in self._floating.outputs]
        session = Session(proto.SerializeToString(), self._floating.identity.name)
        feeds = map(self._floating.feeds, self._samples)
        answers = [session.run(names, each) for each in feeds]
        return relative_loss(answers, self.expected)

    def int8(self, mixed: Mixed, facts: Quantisation) -> Int8:
        """What a build needs of a choice with int8.

        Args:
            facts: of the calibration.
        """
        few = self._samples[:2]
        steps = (
            output_steps(mixed.graph, few)
            if mixed.rounded is None
            else _steps(mixed, few)
        )
        data = mixed.model.proto.SerializeToString()
        facts = facts.model_copy(
            update={
                "model": REFERENCE,
                "sha256": hashlib.sha256(data).hexdigest(),
                "output_steps": steps,
            }
        )
        calibrated = self._calibrated._replace(model=mixed.model)
        _, measured = loss.compare(self._floating, calibrated, self._samples)
        return Int8(mixed.model, mixed.graph, facts, measured)


def relative_loss(
    answers: Sequence[Sequence[Array]], expected: Sequence[Sequence[Array]]
) -> float:
    """The mean over the inferences of the largest error of an output, of that output's range in float32.

    An output that has the same value everywhere takes its range from all inferences, or its size.
    """
    ranges = []
    for outputs in zip(*expected, strict=True):
        every = np.concatenate([each.ravel() for each in outputs]).astype(np.float64)
        every = every[np.isfinite(every)]
        size = np.abs(every).max(initial=0.0)
        ranges.append(float(np.ptp(every) if every.size else 0) or float(size) or 1.0)
    found = []
    for ours, theirs in zip(answers, expected, strict=True):
        worst = 0.0
        for a, b, span in zip(ours, theirs, ranges, strict=True):
            finite = np.isfinite(b)
            exact = b[finite].astype(np.float64)
            if exact.size:
                error = float(np.abs(a[finite] - exact).max())
                error /= float(np.ptp(exact)) or span
                worst = max(worst, error if np.isfinite(error) else np.inf)
        found.append(worst)
    return float(np.mean(found))


def _steps(mixed: Mixed, samples: Sequence[Sample]) -> tuple[float, ...]:
    """What a step of each output stands for, so that as many as a check accepts are the roundings of float16."""
    reference = mixed.reference
    checks = [reference.check(*each) for each in samples]
    most = [
        max(float(each.tolerances[k].max(initial=0)) for each in checks)
        for k in range(len(mixed.graph.outputs))
    ]
    least = float(np.finfo(np.float32).tiny)
    return tuple(max(each / INT8_STEPS, least) for each in most)
