"""What a check found: plain data for the table, the JSON and the report."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from netship.bundle.accuracy import Accuracy, Swap, best_classes
from netship.bundle.store import Bundle
from netship.devices.board.board_state import BoardState
from netship.devices.microcontroller.figures import Figures
from netship.devices.sessions.session import OperatorTime, Origin
from netship.runtime_demo import microcontroller
from netship.runtime_demo.findings import Boxes, Findings, Given, Masks, summary


class Answer(NamedTuple):
    """One class a network answered with; ``label`` is empty where the bundle has no labels."""

    class_index: int
    label: str
    probability: float


class Latency(NamedTuple):
    """Times of single inferences, in milliseconds."""

    median: float
    p90: float
    p99: float
    minimum: float
    samples: tuple[float, ...]

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Latency | None:
        """None where nothing was timed."""
        if not seconds:
            return None
        ms = np.asarray(seconds) * 1e3
        median, p90, p99 = np.percentile(ms, [50, 90, 99])
        return cls(
            float(median), float(p90), float(p99), float(ms.min()), tuple(ms.tolist())
        )

    @property
    def has_percentiles(self) -> bool:
        """Whether there are enough samples to speak of p90 and p99."""
        return len(self.samples) >= 20

    def to_json(self) -> dict[str, float]:
        """With four significant digits."""
        return {
            name: float(f"{getattr(self, name):.4g}")
            for name in ("median", "p90", "p99", "minimum")
        }


class Steps(NamedTuple):
    """Of an int8 network the largest error in steps of its output, and how many are accepted."""

    found: float
    accepted: int


class Confusion(NamedTuple):
    """The inputs that are known to show one class.

    Attributes:
        right: how many of the ``size`` have it as our best class.
        taken: our best classes of the others and how often, the most frequent first.
    """

    expected: int
    right: int
    size: int
    taken: tuple[tuple[int, int], ...]


class ClassNumbers(NamedTuple):
    """Of maps of class numbers how many elements are not the reference's, and whether rounding explains each."""

    differ: int
    elements: int
    explained: bool

    def text(self) -> str:
        """Such as ``33 of 263,169 class numbers differ; rounding explains each``."""
        said = f"{self.differ:,} of {self.elements:,} class numbers differ"
        if not self.differ:
            return said
        why = "explains each" if self.explained else "does not explain all"
        return f"{said}; rounding {why}"


@dataclass(frozen=True)
class InputResult:
    """One input through both networks.

    Attributes:
        name: the image's file name, or the golden input's.
        path: the image; None for a golden input.
        ours, reference: the top classes, best first; empty where the network is no classifier.
        output: our first output.
        gap: the reference's best output minus its second best, in the output's own unit.
        swap: of a classifier the first place of the best five where the two have different classes.
        expected: the class that it is known to show, if it is.
        errors: every |ours − reference| of the first output, flattened.
        vs_float, float_top1, float_found: of an int8 network, against the float32 network it was made from, that
            network's best class, and boxes or masks of both.
        found: of a detector or a segmenting network, what both found in the photograph.
    """

    name: str
    path: Path | None
    ours: tuple[Answer, ...]
    reference: tuple[Answer, ...]
    accuracy: Accuracy
    gap: float
    expected: int | None
    errors: NDArray[np.float64]
    swap: Swap | None = None
    steps: Steps | None = None
    output: NDArray[Any] | None = None
    vs_float: Accuracy | None = None
    float_top1: int | None = None
    found: Boxes | Masks | None = None
    float_found: Boxes | Masks | None = None

    @property
    def differing(self) -> int:
        """How many elements of the first output are not the reference's."""
        return int(np.count_nonzero(self.errors))

    @property
    def same_top1_as_float(self) -> bool:
        return bool(self.ours) and self.ours[0].class_index == self.float_top1

    @property
    def same_top1(self) -> bool:
        return [a.class_index for a in self.ours[:1]] == [
            a.class_index for a in self.reference[:1]
        ]

    @property
    def same_answer(self) -> bool:
        """The same best class, boxes or mask as the reference's."""
        return self.found.same if self.found else self.same_top1

    @property
    def same_top5(self) -> bool:
        return {a.class_index for a in self.ours} == {
            a.class_index for a in self.reference
        }

    @property
    def right(self) -> bool | None:
        """Whether our answer is the known class; None where that is not known."""
        if self.expected is None or not self.ours:
            return None
        return self.ours[0].class_index == self.expected


class Board(NamedTuple):
    """The board that was timed, before its first inference and after the last."""

    before: BoardState
    after: BoardState

    def to_json(self) -> dict[str, Any]:
        """The board, and its condition before and after; an emulated one has no condition."""
        changing = {"governor", "frequency_khz", "temperature_c", "throttled"}
        lasting = {
            *("server", "tvm", "machine", "emulated", "board", "cpu_model"),
            *("cores", "threads", "glibc"),
        }
        condition = {
            name: None if state.emulated else state.model_dump(include=changing)
            for name, state in self._asdict().items()
        }
        return {**self.before.model_dump(include=lasting), **condition}

    def lines(self) -> list[str]:
        """For the table."""
        what = [self.before.board, self.before.cpu_model, self.before.machine]
        words = ", ".join(word for word in what if word)
        if self.before.emulated:
            return [f"board      {words}, emulated"]
        conditions = [self.before.condition(), self.after.condition()]
        if conditions[0]:
            words += f"; {conditions[0]}"
        if conditions[1] != conditions[0]:
            words += f"; afterwards {conditions[1]}"
        return [f"board      {words}"]


@dataclass(frozen=True)
class CheckResult:
    """A whole check; ``compared`` says what was compared: "images" or "golden inputs".

    Attributes:
        skipped: the number of files that could not be read.
        boards: how many inputs each board of several did; empty where it was none of them.
        labels: where the known classes or boxes are from, such as labels.csv; empty without any.
        findings: boxes and masks of all inputs.
    """

    bundle: Bundle
    compared: str
    origin: Origin
    threads: int
    reference: str
    inputs: tuple[InputResult, ...]
    latency: Latency | None
    reference_latency: Latency | None
    operators: tuple[OperatorTime, ...]
    figures: Figures | None = None
    board: Board | None = None
    boards: Mapping[str, int] = field(default_factory=dict)
    skipped: int = 0
    labels: str = ""
    findings: Findings = field(default_factory=Findings)

    @property
    def passed(self) -> bool:
        """Every element within its tolerance; then classes can only differ where they tie (`accuracy.first_swap`).

        Integers on a microcontroller must also equal this machine's, bit by bit.
        """
        if self.figures and self.figures.interface.exact and self.figures.max_error:
            return False
        return all(result.accuracy.passed for result in self.inputs)

    @property
    def assumed(self) -> bool:
        """Whether nobody has stated how photographs become the input."""
        preprocessing = self.bundle.manifest.preprocessing
        return preprocessing is not None and preprocessing.assumed

    @property
    def seeded(self) -> bool:
        """Whether the network is built in, and no weight of it was trained."""
        from netship.compile.frontend.sources import is_built_in

        return is_built_in(self.bundle.manifest.model.name)

    @property
    def step(self) -> float | None:
        """Of an int8 network: what one step of its first output means."""
        facts = self.bundle.manifest.quantisation
        return facts.output_steps[0] if facts else None

    @property
    def steps(self) -> Steps | None:
        """Of an int8 network the largest error of all inputs."""
        return max((r.steps for r in self.inputs if r.steps), default=None)

    @property
    def vs_float(self) -> dict[str, Any] | None:
        """An int8 network against the float32 one, where the images went through both."""
        found = [r.vs_float for r in self.inputs if r.vs_float is not None]
        if not found:
            return None
        same = sum(r.same_top1_as_float for r in self.inputs)
        judged = self.float_findings
        return {
            "max_abs_error": max(each.max_abs_error for each in found),
            "cosine": min(each.cosine for each in found),
            "top1_agreement": same / len(found) if self.classifies else None,
            "boxes": judged.boxes.to_json() if judged.boxes else None,
            "masks": judged.masks.to_json() if judged.masks else None,
        }

    @property
    def float_findings(self) -> Findings:
        """Boxes and masks of an int8 network against those of the float32 one."""
        found = [(r.path, r.float_found) for r in self.inputs if r.float_found]
        return summary(found, Given())

    @property
    def vs_quantised(self) -> dict[str, float] | None:
        """An int8 network against ONNX Runtime on the same QDQ graph."""
        if self.steps is None:
            return None
        return {
            "max_abs_error": self.max_abs_error,
            "steps": self.steps.found,
            "tolerance_steps": self.steps.accepted,
        }

    @property
    def max_abs_error(self) -> float:
        return max(result.accuracy.max_abs_error for result in self.inputs)

    @property
    def relative_error(self) -> float:
        return max(result.accuracy.relative_error for result in self.inputs)

    @property
    def excess(self) -> float | None:
        """The largest error of an element ÷ its tolerance; None where shapes differ."""
        found = [result.accuracy.excess for result in self.inputs]
        known = [each for each in found if each is not None]
        return max(known) if len(known) == len(found) else None

    @property
    def other_classes(self) -> ClassNumbers | None:
        """Of a network whose one output is a map of class numbers: their distance says nothing. None for others."""
        task, outputs = self.bundle.manifest.task, self.bundle.manifest.outputs
        mapped = task and task.kind == "segment" and task.class_axis is None
        if not mapped or len(outputs) != 1 or "int" not in outputs[0].dtype:
            return None
        return ClassNumbers(
            sum(result.differing for result in self.inputs),
            sum(result.errors.size for result in self.inputs),
            self.passed,
        )

    @property
    def classifies(self) -> bool:
        return all(result.ours for result in self.inputs)

    def agreement(self, top: int) -> float | None:
        """Share of inputs with the same best class (1) or the same set of best five (5)."""
        if not self.classifies:
            return None
        same = [r.same_top1 if top == 1 else r.same_top5 for r in self.inputs]
        return sum(same) / len(same)

    @property
    def order_agreement(self) -> float | None:
        """Share of inputs with the same best five classes in the same order."""
        if not self.classifies:
            return None
        return sum(r.swap is None for r in self.inputs) / len(self.inputs)

    def labelled(self, top: int = 1) -> tuple[int, int]:
        """How many inputs of those with a known class have it among our best ``top``, and how many those are."""
        judged = [r for r in self.inputs if r.expected is not None and r.ours]
        right = [r.expected in [a.class_index for a in r.ours[:top]] for r in judged]
        return sum(right), len(judged)

    def confusion(self) -> list[Confusion]:
        """By known class, those with the most mistakes first."""
        answered: dict[int, Counter[int]] = {}
        for each in self.inputs:
            if each.expected is not None and each.ours:
                counts = answered.setdefault(each.expected, Counter())
                counts[each.ours[0].class_index] += 1
        found = []
        for expected, counts in answered.items():
            size, right = counts.total(), counts.pop(expected, 0)
            found.append(Confusion(expected, right, size, (*counts.most_common(),)))
        return sorted(found, key=lambda x: (x.right - x.size, x.expected))

    def class_name(self, number: int) -> str:
        labels = self.bundle.labels()
        name = labels[number] if 0 <= number < len(labels) else ""
        return name or f"class {number}"

    def to_json(self) -> dict[str, Any]:
        right, judged = self.labelled()
        return {
            "bundle": str(self.bundle.path),
            "model_sha256": self.bundle.manifest.model.sha256,
            "target": self.bundle.manifest.target.name,
            "compared": self.compared,
            "images": len(self.inputs),
            "skipped": self.skipped,
            "max_abs_error": self.max_abs_error,
            "rms_error": max(r.accuracy.rms_error for r in self.inputs),
            "relative_error": self.relative_error,
            "of_tolerance": self.excess,
            "cosine": min(r.accuracy.cosine for r in self.inputs),
            "other_classes": self.other_classes.differ if self.other_classes else None,
            "top1_agreement": self.agreement(1),
            "top5_agreement": self.agreement(5),
            "top5_order_agreement": self.order_agreement,
            "labelled": judged,
            "labelled_right": right,
            "labelled_right_top5": self.labelled(5)[0],
            "labels": self.labels,
            "confusion": [
                each._asdict() | {"taken": dict(each.taken)}
                for each in self.confusion()
            ],
            "threads": self.threads,
            "latency_ms": self.latency.to_json() if self.latency else None,
            "reference": self.reference,
            "reference_latency_ms": self.reference_latency.to_json()
            if self.reference_latency
            else None,
            "origin": self.origin.split()[0],
            "device": str(self.origin),
            "board": self.board.to_json() if self.board else None,
            "boards": dict(self.boards),
            "passed": self.passed,
            "preprocessing_assumed": self.assumed,
            "seeded_weights": self.seeded,
            "vs_quantised": self.vs_quantised,
            "vs_float": self.vs_float,
            **self.findings.to_json(),
            **microcontroller.to_json(self.figures, self.step is not None),
            "results": [
                {
                    "name": r.name,
                    "max_abs_error": r.accuracy.max_abs_error,
                    "ours": [a._asdict() for a in r.ours],
                    "reference": [a._asdict() for a in r.reference],
                    "top2_gap": r.gap,
                    "swap": r.swap._asdict() if r.swap else None,
                    "expected": r.expected,
                    **(r.found.to_json() if r.found else {}),
                }
                for r in self.inputs
            ],
        }


def answers(
    output: NDArray[Any],
    probabilities: bool,
    labels: Sequence[str],
    top: int = 5,
) -> tuple[Answer, ...]:
    """The best classes of one output [1, classes] (or with trailing 1s), best first.

    Logits go through a softmax; what already are probabilities do not.
    """
    scores = output.astype(np.float64).ravel()
    if not probabilities:
        with np.errstate(invalid="ignore"):
            powers = np.exp(scores - scores.max())
            scores = powers / powers.sum()
    return tuple(
        Answer(int(i), labels[i] if i < len(labels) else "", float(scores[i]))
        for i in best_classes(output, top)
    )
