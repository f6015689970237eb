"""A column of a comparison: a build's figures, each with its origin."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from netship.bundle.store import Bundle
from netship.devices.sessions.session import Origin
from netship.runtime_demo import microcontroller
from netship.runtime_demo.result import CheckResult
from netship.targets.escapes import (
    counted,
    magnitude,
    megabytes,
    millions,
    milliseconds,
)

if TYPE_CHECKING:
    from netship.meter.operators import Metered

COUNTED = "counted"
"""The origin of sizes that files and manifests state."""


class Fact(NamedTuple):
    """A figure; a ratio has two of one ``origin`` and one ``where`` (threads, board, CPU with the meter's version)."""

    value: float
    text: str
    origin: str
    where: str = ""


class Kind(NamedTuple):
    """A row of the comparison; less is better in one that is ``drawn`` as bars, with ratios."""

    section: str
    title: str
    drawn: bool = False


KINDS = {
    "latency": Kind("Speed", "latency, median", drawn=True),
    "p90": Kind("Speed", "latency, 90th percentile"),
    "of_reference": Kind("Speed", "× ONNX Runtime’s median, in alternation"),
    "instructions": Kind("Speed", "instructions", drawn=True),
    "cycles": Kind("Speed", "cycles, core and memory", drawn=True),
    "library": Kind("Size", "library", drawn=True),
    "flash": Kind("Size", "flash, code and weights", drawn=True),
    "weights": Kind("Size", "weights", drawn=True),
    "arena": Kind("Memory", "arena"),
    "workspace": Kind("Memory", "workspace"),
    "stack": Kind("Memory", "stack"),
    "ram": Kind("Memory", "RAM of an inference", drawn=True),
    "error": Kind("Against ONNX Runtime", "largest error"),
    "of_range": Kind("Against ONNX Runtime", "error, of the reference’s range"),
    "of_tolerance": Kind("Against ONNX Runtime", "error, of the tolerance"),
    "cosine": Kind("Against ONNX Runtime", "least cosine"),
    "top1": Kind("Against ONNX Runtime", "same best class"),
    "top5": Kind("Against ONNX Runtime", "same best five"),
    "labelled": Kind("Against ONNX Runtime", "right by labels"),
    "boxes": Kind("Against ONNX Runtime", "boxes matched"),
    "precision": Kind("Against ONNX Runtime", "mAP@0.5 by labels"),
    "masks": Kind("Against ONNX Runtime", "pixels of the same class"),
    "without_class": Kind("Against ONNX Runtime", "pixels without a class (NaN)"),
    "given_masks": Kind("Against ONNX Runtime", "pixels right by masks"),
    "float_top1": Kind("int8 against float32", "same best class"),
    "float_cosine": Kind("int8 against float32", "least cosine"),
}


class Layer(NamedTuple):
    """A kernel or a step; ``cost`` in the unit of its `Layers`, None where it was not measured."""

    name: str
    macs: int
    cost: float | None


class Layers(NamedTuple):
    unit: str
    origin: str
    rows: tuple[Layer, ...]

    @property
    def most(self) -> float:
        return max((row.cost or 0.0 for row in self.rows), default=0.0)


@dataclass(frozen=True)
class Column:
    """One build, or one entry of a result file.

    Attributes:
        about: what it is, in words.
        facts: by the names of `KINDS`.
        refused: why it could not run; empty where it ran.
        path: of the build; None for an entry of a file.
        result: of its check; None where it did not run here.
    """

    name: str
    about: str
    facts: Mapping[str, Fact]
    refused: str = ""
    path: Path | None = None
    result: CheckResult | None = None
    layers: Layers | None = None


def column(
    name: str,
    bundle: Bundle,
    result: CheckResult | None,
    refused: str = "",
    metered: Metered | None = None,
    meter: str = "",
) -> Column:
    """A build, with what its check found where it ran and its estimate where there is one.

    Args:
        meter: the version that the estimate is of.
    """
    manifest = bundle.manifest
    facts = _sizes(bundle)
    if result is not None:
        facts |= _speed(result) | _accuracy(result)
    if metered is not None:
        where = metered.hierarchy.board, threads(metered.threads)
        figures = metered.instructions, metered.cycles
        facts |= estimated(metered.cpu, meter, *figures, *where)
    words = [
        manifest.model.name,
        manifest.target.name,
        manifest.format,
        manifest.numbers,
    ]
    if result is not None:
        checked = "passed" if result.passed else "FAILED"
        inputs = counted(len(result.inputs), result.compared.removesuffix("s"))
        words.append(f"{checked} on {inputs}")
    layers = _layers(bundle, result, metered)
    about = ", ".join(words)
    return Column(name, about, facts, refused, bundle.path, result, layers)


def estimated(
    cpu: str, meter: str, instructions: float, cycles: float, *where_else: str
) -> dict[str, Fact]:
    """The facts of the meter, ours and of a result file: QEMU counts the instructions.

    Args:
        where_else: what the figures depend on, too: the board, the number of threads.
    """
    where = ", ".join([cpu, *where_else, f"meter {meter}"])
    return {
        "instructions": Fact(
            instructions, millions(instructions), Origin.EMULATED, where
        ),
        "cycles": Fact(cycles, millions(cycles), Origin.ESTIMATED, where),
    }


def _speed(result: CheckResult) -> dict[str, Fact]:
    facts = {}
    origin = str(result.origin)
    if result.latency:
        where = threads(result.threads)
        facts["latency"] = in_ms(result.latency.median, origin, where)
        if result.latency.has_percentiles:
            facts["p90"] = in_ms(result.latency.p90, origin, where)
        if result.reference_latency:
            ratio = result.latency.median / result.reference_latency.median
            facts["of_reference"] = Fact(ratio, f"{ratio:.2f} ×", origin, where)
    if figures := result.figures:
        guess = microcontroller.estimate(figures)
        facts["latency"] = in_ms(
            guess.milliseconds,
            Origin.ESTIMATED,
            f"{figures.interface.cpu}, {guess.megahertz} MHz, IPC 1",
        )
        count = figures.instructions
        facts["instructions"] = Fact(count, millions(count), origin, figures.board)
        for name, size in (
            ("flash", figures.flash_bytes),
            ("ram", figures.ram_bytes),
            ("stack", figures.stack_bytes),
        ):
            facts[name] = in_bytes(size, origin)
    return facts


def _accuracy(result: CheckResult) -> dict[str, Fact]:
    origin, size = str(result.origin), len(result.inputs)
    facts = {
        "error": Fact(result.max_abs_error, magnitude(result.max_abs_error), origin),
        "of_range": Fact(
            result.relative_error, magnitude(result.relative_error), origin
        ),
    }
    if result.steps and (result.steps.accepted or not result.steps.found):
        found = f"{result.steps.found:.0f} of {counted(result.steps.accepted, 'step')}"
        if not result.steps.accepted:
            found = "exact"
        facts["of_tolerance"] = Fact(result.steps.found, found, origin)
    elif result.excess is not None:
        facts["of_tolerance"] = Fact(result.excess, f"{result.excess:.2g}", origin)
    cosine = min(item.accuracy.cosine for item in result.inputs)
    facts["cosine"] = Fact(cosine, f"{cosine:.6f}", origin)
    if result.classifies:
        for name, same in (
            ("top1", sum(item.same_top1 for item in result.inputs)),
            ("top5", sum(item.same_top5 for item in result.inputs)),
        ):
            facts[name] = Fact(same / size, f"{same}/{size}", origin)
    right, judged = result.labelled()
    if judged:
        facts["labelled"] = Fact(right / judged, f"{right}/{judged}", origin)
    facts |= _found(result)
    if loss := result.vs_float:
        facts["float_cosine"] = Fact(loss["cosine"], f"{loss['cosine']:.6f}", origin)
        if result.classifies:
            top1 = loss["top1_agreement"]
            facts["float_top1"] = Fact(top1, f"{top1:.1%}", origin)
    return facts


def _found(result: CheckResult) -> dict[str, Fact]:
    """Of a detector or a segmenting network."""
    origin, found, facts = str(result.origin), result.findings, {}
    if found.boxes:
        matched, size = found.boxes.matched, found.boxes.matched + found.boxes.missing
        facts["boxes"] = Fact(matched / max(size, 1), f"{matched}/{size}", origin)
    if found.precision and found.precision[0].at_50 is not None:
        precision = found.precision[0].at_50
        facts["precision"] = Fact(precision, f"{precision:.3f}", origin)
    for name, masks in (
        ("masks", found.masks),
        ("given_masks", found.given and found.given[0]),
    ):
        if masks and masks.share is not None:
            facts[name] = Fact(masks.share, masks.text(), origin)
    if found.masks and (without := found.masks.without[0]):
        facts["without_class"] = Fact(without, f"{without:,}", origin)
    return facts


def _sizes(bundle: Bundle) -> dict[str, Fact]:
    """What the files and the manifest say, whether the build runs here or not."""
    manifest = bundle.manifest
    weights, arena = manifest.measured.get("weight_bytes"), None
    facts = {}
    if manifest.firmware:
        weights, arena = manifest.firmware.weights_bytes, manifest.firmware.arena_bytes
    else:
        facts["library"] = in_bytes(bundle.library.stat().st_size, COUNTED)
        plan, workspace = manifest.lowering.memory, manifest.lowering.workspace_bytes
        if plan:
            arena = plan.arena_bytes
            workspace = plan.outer_workspace_bytes
            workspace += manifest.threads * plan.inner_workspace_bytes
        facts["workspace"] = in_bytes(workspace, COUNTED)
    for name, size in (("weights", weights), ("arena", arena)):
        # A manifest is from outside.
        if isinstance(size, int) and 0 <= size < 1 << 60:
            facts[name] = in_bytes(size, COUNTED)
    return facts


def _layers(
    bundle: Bundle, result: CheckResult | None, metered: Metered | None
) -> Layers:
    groups = bundle.manifest.lowering.groups
    if metered is not None:
        rows = (Layer(each.title, each.macs, each.cycles) for each in metered.operators)
        return Layers("cycles", Origin.ESTIMATED, tuple(rows))
    if result and result.figures:
        parts = result.figures.parts
        rows = (Layer(each.name, each.macs, each.instructions) for each in parts)
        return Layers("instructions", str(result.origin), tuple(rows))
    if result and result.operators:
        names = [each.name.removeprefix("tvmgen_default_") for each in result.operators]
        known = bundle.manifest.lowering.groups_of(names)
        timed = []
        for operator, name, group in zip(result.operators, names, known, strict=True):
            title, macs = (group.layer or name, group.macs) if group else (name, 0)
            timed.append(Layer(title, macs, operator.seconds * 1e6))
        return Layers("µs", str(result.origin), tuple(timed))
    rows = (Layer(group.layer or group.name, group.macs, None) for group in groups)
    return Layers("", COUNTED, tuple(rows))


def in_ms(value: float, origin: str, where: str) -> Fact:
    return Fact(value, milliseconds(value), origin, where)


def in_bytes(value: float, origin: str, where: str = "") -> Fact:
    return Fact(value, megabytes(value), origin, where)


def threads(count: int) -> str:
    return f"{count} thread{'' if count == 1 else 's'}"
