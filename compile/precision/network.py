"""A network whose layers may compute in several types: what each of them, and choices for all, cost and lose."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np

from netship.bundle import golden, inputs
from netship.bundle.manifest import (
    Numbers,
    Quantisation,
)
from netship.bundle.store import (
    Bundle,
)
from netship.compile import driver
from netship.compile.backends.request import BuildRequest, Precision
from netship.compile.backends.verify import Array, answers
from netship.compile.frontend import sources
from netship.compile.frontend.preprocessing import resolve_preprocessing
from netship.compile.precision import metering
from netship.compile.quantize import calibrate
from netship.compile.quantize.mixture import Chosen, Mixture, relative_loss
from netship.compile.quantize.prepare import MAX_IMAGES, is_quantised, read_images
from netship.compile.quantize.tradeoff import PRECISIONS, Choice, Traded, Tradeoff
from netship.devices.sessions.session import Origin
from netship.targets.child import run_in_child
from netship.targets.errors import UserError
from netship.targets.files import cached_path, write_whole
from netship.targets.presets import missing_features, this_cpu
from netship.targets.progress import Progress

_METER = Path(__file__).parents[2] / "meter"
# A multiply-add of a core without a meter, in those of float32; a byte that is read or written counts as one, too.
_WEIGHTS: dict[Numbers, float] = {"int8": 0.25, "float16": 0.5, "float32": 1.0}
_BYTES: dict[Numbers, int] = {"int8": 1, "float16": 2, "float32": 4}
# Cycles of a value that is converted between integers and float, whose layouts differ: 4.9 to 6.2 were metered in
# MobileNetV2 1.0/224 on Cortex-A76. Conversions between float types are part of other kernels.
_BORDER, _FLOAT_BORDER = 5.5, 0.1
# Choices that are measured.
_MOST_MEASURED = 48


@dataclass
class Measured:
    """What is known of a network, and kept for the next build of it with another limit.

    Attributes:
        costs, losses: of each layer, by type.
        roundings: losses where a tensor between layers alone is rounded to int8.
        points: choices and what they lose.
        plain: of builds in one type by an option of their own: the choice, the cost and the loss.
    """

    costs: list[dict[Numbers, float]] = field(default_factory=list)
    losses: list[dict[Numbers, float]] = field(default_factory=list)
    roundings: list[float] = field(default_factory=list)
    points: list[tuple[Choice, float]] = field(default_factory=list)
    plain: dict[Numbers, tuple[Choice, float, float]] = field(default_factory=dict)


class Network:
    """What the search asks of a network.

    Attributes:
        samples: the user's inputs.
        metered: whether costs are cycles by the meter.
    """

    def __init__(
        self,
        request: BuildRequest,
        source: sources.Source,
        scratch: Path,
        progress: Progress,
    ) -> None:
        self._request = replace(request, max_loss=None)
        self._scratch, self._progress = scratch, progress
        self.metered = (
            request.target.machine == "aarch64" and request.target.core in metering.CPUS
        )
        model = source.model
        if is_quantised(model.proto):
            raise UserError(
                f"{model.identity.name}: is quantised; leave --precision auto out"
            )
        preprocessing, _ = resolve_preprocessing(
            request.overrides.with_defaults(source.overrides),
            source.preprocessing,
            model.inputs,
        )
        found = inputs.find(request.calibration, model.inputs)[:MAX_IMAGES]
        images, self.samples, skipped = read_images(
            found, model, preprocessing, progress
        )
        unsigned = request.target.machine == "x86_64"
        try:
            calibrated = calibrate.quantise(model, self.samples, unsigned, progress)
        except UserError as error:
            progress.finish()
            progress.note(f"int8 is left out: {error}")
            calibrated = calibrate.unquantised(model)
        self._facts = Quantisation(
            method=calibrated.method, images=images, skipped=skipped, output_steps=(1,)
        )
        progress.stage("finding what may compute in what")
        more = [
            *golden.of_all(golden.seeded_inputs, model.inputs, preprocessing),
            *golden.of_all(golden.signed_inputs, model.inputs, preprocessing),
        ]
        self.mixture = Mixture(
            model, self.samples, calibrated, more, request.target.has_float16
        )
        progress.finish()
        key = self._request.key(lambda stage: None)
        self._kept = cached_path("precision.json", key, files=[_METER])

    @property
    def unit(self) -> Literal["cycles", "weighted multiply-adds"]:
        """Of costs."""
        return "cycles" if self.metered else "weighted multiply-adds"

    def build_plain(self, kind: Numbers, output: Path) -> Bundle:
        """A build as --precision ``kind`` makes it, with tuning records where there are any."""
        precision: Precision = "float16" if kind == "float16" else "float32"
        request = replace(self._request, output=output, precision=precision)
        if precision == "float32":
            request = replace(request, calibration=())
        chosen = Chosen(judge=partial(self._judged, self.mixture.uniform(kind)))
        return driver.build(request, self._progress, chosen)

    def build_choice(self, choice: Choice, output: Path, judged: bool) -> Bundle:
        request = replace(self._request, output=output)
        mixed = self.mixture.mixed(choice)
        int8 = self.mixture.int8(mixed, self._facts) if "int8" in choice else None
        judge = partial(self._judged, choice) if judged else None
        return driver.build(request, self._progress, Chosen(mixed, int8, judge))

    def _judged(self, choice: Choice, folder: Path) -> dict[str, Any]:
        """What a build loses, and what it costs.

        Emulation is slow. Where nothing computes in float16, a build answers as ONNX Runtime does, which was checked.
        """
        emulated = bool(missing_features(self._request.target, this_cpu()))
        found: tuple[list[list[Array]], Origin] | str = "as ONNX Runtime answers"
        if "float16" in choice or not emulated:
            found = answers(folder, self.samples, self._request, self._progress)
        if isinstance(found, str):
            loss, origin = self.mixture.loss(choice), f"simulated: {found}"
        else:
            loss = relative_loss(found[0], self.mixture.expected)
            origin = found[1].value
        cost = metering.cycles(self._operators(folder)) if self.metered else None
        self._progress.finish()
        return {"loss": loss, "origin": origin, "cost": cost}

    def _operators(self, folder: Path) -> list[dict[str, Any]]:
        """Each kernel's cycles by the meter."""
        cpu = self._request.target.core
        self._progress.stage(f"metering on {cpu}")
        return run_in_child(
            metering.meter,
            folder,
            cpu,
            stage=self._progress.stage,
            tick=self._progress.tick,
        )

    def measure(self) -> Measured:
        known = Measured()
        if self._kept.exists():
            known = Measured(**json.loads(self._kept.read_text()))
            known.points = [(tuple(each), loss) for each, loss in known.points]
            known.plain = {
                kind: (tuple(choice), cost, loss)
                for kind, (choice, cost, loss) in known.plain.items()
            }
        mixture, progress = self.mixture, self._progress
        if not known.costs:
            known.costs = self._layer_costs(known)
            self._keep(known)
        if not known.losses:
            progress.stage("measuring what each layer loses")
            plain: list[Numbers] = ["float32"] * len(mixture.layers)
            for number, kinds in enumerate(known.costs):
                lost = {}
                for kind in kinds.keys() - {"float32"}:
                    alone = (*plain[:number], kind, *plain[number + 1 :])
                    lost[kind] = mixture.loss(alone)
                    progress.tick()
                known.losses.append(lost)
            self._keep(known)
        if not known.roundings:
            progress.stage("measuring what rounding between layers loses")
            known.roundings = mixture.rounding_losses()
            self._keep(known)
        if not known.points:
            progress.stage("measuring choices")
            tradeoff = self.tradeoff(known)
            every = list(tradeoff.choices())
            every += [
                each
                for each in (tradeoff.uniform("float16"), tradeoff.uniform("float32"))
                if each not in every
            ]
            step = max(len(every) / _MOST_MEASURED, 1)
            taken = [every[int(k * step)] for k in range(int(len(every) / step))]
            for choice in dict.fromkeys([*taken, *every[-2:]]):
                known.points.append((choice, mixture.loss(choice)))
                progress.tick()
            self._keep(known)
        progress.finish()
        return known

    def _keep(self, known: Measured) -> None:
        self._kept.parent.mkdir(parents=True, exist_ok=True)
        write_whole(self._kept, json.dumps(vars(known)).encode(), "the cache")

    def tradeoff(self, known: Measured) -> Tradeoff:
        """For the search, of what was measured."""
        border, between = _BORDER, _FLOAT_BORDER
        if not self.metered:
            border, between = _BYTES["float32"] + _BYTES["int8"], 0.0
        tensors = [
            replace(each, loss=lost)
            for each, lost in zip(self.mixture.tensors(), known.roundings, strict=True)
        ]
        around = [0.0] * len(known.losses)
        for each in tensors:
            for k in {each.maker, *each.readers} - {None}:
                assert k is not None
                around[k] += each.loss**2
        layers = []
        for costs, losses, rounded in zip(
            known.costs, known.losses, around, strict=True
        ):
            costs, losses = dict(costs), dict(losses)
            # float16 that is no more accurate than int8 is no choice.
            if losses.get("float16", 0.0) >= losses.get("int8", np.inf):
                del costs["float16"], losses["float16"]
            if "int8" in losses:
                losses["int8"] = max(losses["int8"] ** 2 - rounded, 0.0) ** 0.5
            layers.append(Traded(costs, losses))
        return Tradeoff(layers, tensors, border, between)

    def _layer_costs(self, known: Measured) -> list[dict[Numbers, float]]:
        """Of each layer, in each type that it may have."""
        mixture = self.mixture
        if not self.metered:
            return mixture.counted(_WEIGHTS, _BYTES)
        found: list[dict[Numbers, float]] = [{} for _ in mixture.layers]
        for kind in reversed(PRECISIONS):
            choice = mixture.uniform(kind)
            if kind not in choice:
                continue
            self._progress.finish()
            self._progress.note(f"building all of it in {kind}, for the meter")
            try:
                operators = self._uniform(kind, choice, known)
            except UserError as error:
                if kind == "float32":
                    raise
                self._progress.finish()
                self._progress.note(f"{kind} is left out: {error}")
                continue
            names = [each.names for each in mixture.layers]
            cycles = metering.layer_cycles(names, operators)
            for layer, each, own in zip(found, cycles, choice, strict=True):
                if own == kind:
                    layer[kind] = each
        return [{kind: x[kind] for kind in PRECISIONS if kind in x} for x in found]

    def _nearly_float32(self) -> Choice:
        """float32, but for the smallest layer that may be float16: with it, all float kernels get float16's blocks."""
        choice = list(self.mixture.uniform("float32"))
        sizes = [
            (costs["float16"], number)
            for number, costs in enumerate(self.mixture.counted(_WEIGHTS, _BYTES))
            if "float16" in costs
        ]
        if sizes:
            choice[min(sizes)[1]] = "float16"
        return tuple(choice)

    def _uniform(
        self, kind: Numbers, choice: Choice, known: Measured
    ) -> list[dict[str, Any]]:
        """Cycles of the kernels with all layers in one type, without tuning records, as between layers of other types.

        What float types cost with records is noted in ``known``.
        """
        if kind != "int8":
            plain = self.build_plain(kind, self._scratch / f"plain-{kind}")
            judged = plain.manifest.measured["precision"]
            kept = plain.manifest.float16.float32 if plain.manifest.float16 else ()
            names = {each.tensor for each in kept}
            own: Choice = tuple(
                "float32" if names.intersection(layer.tensors[:1]) else each
                for layer, each in zip(self.mixture.layers, choice, strict=True)
            )
            known.plain[kind] = own, judged["cost"], judged["loss"]
            if kind == "float32":
                choice = self._nearly_float32()
            if plain.manifest.lowering.layout == "NCHW" and own == choice:
                return self._operators(plain.path)
        bundle = self.build_choice(choice, self._scratch / kind, judged=False)
        return self._operators(bundle.path)
