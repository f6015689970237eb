"""``--precision auto``: what each layer computes in, chosen by what it costs and by what it loses on photographs.

The costs of layers are those of the network in one type throughout: cycles by the meter on 64-bit ARM cores that it
knows, elsewhere multiply-adds, weighted. Each layer's loss is measured with it alone in another type. From both follow
choices, from the fastest to float32 (compile.quantize.tradeoff); each is measured as a whole. The fastest that loses at
most what is asked for is built, and judged by its own answers.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from netship.bundle.manifest import (
    LayerPrecision,
    Numbers,
    Precision,
    TradeoffPoint,
)
from netship.bundle.store import (
    MANIFEST,
    Bundle,
    check_replaceable,
    staging,
)
from netship.compile import driver
from netship.compile.backends.request import BuildRequest
from netship.compile.frontend import sources
from netship.compile.precision.network import Measured, Network
from netship.compile.precision.page import PAGE, write_page
from netship.compile.quantize.tradeoff import PRECISIONS, Choice
from netship.targets.errors import UserError
from netship.targets.escapes import counted
from netship.targets.files import copy_folder
from netship.targets.progress import Progress

# Choices that are built before float32 is taken.
_MOST_BUILT = 4


class Figures(NamedTuple):
    """Of a build or a choice: the cost of an inference, and the loss."""

    cost: float
    loss: float


class Trial(NamedTuple):
    """A network that may be built: by a choice, or as --precision makes it.

    Attributes:
        simulated: its loss before it is built.
        plain: the option's value, where that makes it.
    """

    name: str
    choice: Choice
    figures: Figures
    simulated: float
    plain: Numbers | None = None

    def expecting(self, more: float) -> Trial:
        """Before it is built, where builds with float16 lose so many times what their simulation does."""
        if self.plain or "float16" not in self.choice:
            return self
        figures = self.figures._replace(loss=self.simulated * more)
        return self._replace(figures=figures)


def fastest(trials: Iterable[Trial], limit: float) -> Trial | None:
    """Of those that lose at most ``limit``."""
    fitting = (each for each in trials if each.figures.loss <= limit)
    return min(fitting, key=lambda each: each.figures, default=None)


def build(request: BuildRequest, progress: Progress) -> Bundle:
    """As `driver.build`; with ``max_loss`` of the network whose layers compute in what is fastest within that loss.

    Raises:
        UserError: as `driver.build`; the options contradict each other, or not even float32 has so small a loss.
    """
    if request.max_loss is None:
        return driver.build(request, progress)
    _check(request)
    source = sources.find(
        request.model, request.input_shapes, request.overrides.layout, progress.stage
    )
    output = request.output or Path("out") / f"{source.name}-{request.target.name}"
    check_replaceable(output)
    with tempfile.TemporaryDirectory(prefix="netship-precision-") as scratch:
        network = Network(request, source, Path(scratch), progress)
        search = Search(network, request.max_loss, Path(scratch), progress)
        found, facts = search.best()
        with staging(output) as folder:
            copy_folder(found.path, folder)
            manifest = found.manifest.model_copy(update={"precision": facts})
            (folder / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")
            (folder / PAGE).parent.mkdir(exist_ok=True)
            write_page(Bundle(output, manifest), folder / PAGE)
    return Bundle(output, manifest)


def _check(request: BuildRequest) -> None:
    auto = "--precision auto"
    if request.format == "c":
        raise UserError(
            f"{auto}: makes no C source; leave it out, or take --quantize int8"
        )
    for name, given in (
        ("--quantize", request.quantize),
        ("--keep-float", request.keep_float),
        ("--strict-int8", request.strict_int8),
        ("--accept-loss", request.accept_loss),
        ("--records", request.records),
        ("--require-tuned", request.require_tuned),
        ("--dump", request.dump),
        ("--input-type", request.input_type),
    ):
        if given:
            raise UserError(f"{name}: {auto} chooses by itself; leave one of them out")
    if not request.calibration:
        raise UserError(
            f"{auto}: needs --calibration PHOTOS, a folder of 16 or more images of the kind that the network will see"
        )


class Search:
    """Chooses among what a network can be."""

    def __init__(
        self, network: Network, limit: float, scratch: Path, progress: Progress
    ) -> None:
        self._network, self._limit = network, limit
        self._scratch, self._progress = scratch, progress

    def best(self) -> tuple[Bundle, Precision]:
        """The fastest build within the limit, and what the search knows."""
        measured = self._network.measure()
        trials = self.trials(measured)
        built: dict[str, Bundle] = {}
        # By how much more a build with float16 loses than its simulation.
        more = 1.0
        for number in range(_MOST_BUILT + 1):
            best = fastest(trials, self._limit) or trials[-1]
            if number == _MOST_BUILT:
                # Enough was tried: what was built, or else float32.
                done = [each for each in trials if each.name in built]
                best = fastest(done, self._limit) or trials[-1]
            if best.name in built:
                break
            try:
                bundle = self._try(best, self._scratch / f"trial{number}")
            except UserError as error:
                if best is trials[-1]:
                    raise
                self._progress.finish()
                self._progress.note(f"not built: {error}")
                trials.remove(best)
                continue
            judged = bundle.manifest.measured["precision"]
            figures = Figures(judged["cost"] or best.figures.cost, judged["loss"])
            self._progress.note(f"built: {self._shown(figures)}")
            built[best.name] = bundle
            if "float16" in best.choice and best.simulated:
                more = max(more, figures.loss / best.simulated)
            trials = [
                each._replace(figures=figures)
                if each is best
                else each.expecting(more)
                if each.name not in built
                else each
                for each in trials
            ]
        found = fastest([x for x in trials if x.name in built], self._limit)
        if found is None:
            raise UserError(
                f"--max-loss {self._limit:g}: float32 as it is built loses {trials[-1].figures.loss:.2g}; give at least that"
            )
        return built[found.name], self._described(found, trials, measured)

    def trials(self, measured: Measured) -> list[Trial]:
        """Every choice that was measured; float32 is the last."""
        tradeoff = self._network.tradeoff(measured)
        found = [
            Trial(f"choice {n}", choice, Figures(tradeoff.cost(choice), loss), loss)
            for n, (choice, loss) in enumerate(measured.points)
            if set(choice) != {"float32"}
        ]
        plain = tradeoff.uniform("float32")
        exact: dict[Numbers, tuple[Choice, float, float]] = {
            "float32": (plain, tradeoff.cost(plain), 0.0)
        }
        return found + [
            Trial(kind, choice, Figures(cost, loss), loss, kind)
            for kind, (choice, cost, loss) in sorted((exact | measured.plain).items())
        ]

    def _described(
        self, best: Trial, trials: Sequence[Trial], measured: Measured
    ) -> Precision:
        return Precision(
            max_loss=self._limit,
            images=len(self._network.samples),
            unit=self._network.unit,
            cost=best.figures.cost,
            simulated_loss=best.simulated,
            layers=tuple(
                LayerPrecision(layer=layer.name, numbers=kind, costs=costs, losses=lost)
                for layer, kind, costs, lost in zip(
                    self._network.mixture.layers,
                    best.choice,
                    measured.costs,
                    measured.losses,
                    strict=True,
                )
            ),
            curve=tuple(
                TradeoffPoint(
                    cost=each.figures.cost,
                    loss=each.figures.loss,
                    layers={
                        kind: each.choice.count(kind)
                        for kind in PRECISIONS
                        if kind in each.choice
                    },
                )
                for each in sorted(trials, key=lambda each: each.figures)
            ),
        )

    def _try(self, trial: Trial, output: Path) -> Bundle:
        layers = ", ".join(
            f"{counted(trial.choice.count(kind), 'layer')} in {kind}"
            for kind in PRECISIONS
            if kind in trial.choice
        )
        self._progress.finish()
        self._progress.note(f"building {layers}: {self._shown(trial.figures)}")
        if trial.plain:
            return self._network.build_plain(trial.plain, output)
        return self._network.build_choice(trial.choice, output, judged=True)

    def _shown(self, figures: Figures) -> str:
        unit = self._network.unit
        return f"{figures.cost / 1e6:.2f} M {unit}, loss {figures.loss:.5f} (at most {self._limit:g})"
