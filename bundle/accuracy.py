"""The error of a bundle's outputs against the reference's, element by element, and the accepted errors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

INT8_STEPS = 2
"""How many steps an int8 network's logits may be from ONNX Runtime's on the same QDQ graph.

On x86 with VNNI the two are equal, bit by bit. ONNX Runtime's kernels for other CPUs round additions differently.
"""

INT8_COSINE = 0.99
"""Smallest accepted cosine of an int8 network against the float32 one that it was made from."""

Array = NDArray[np.float32]
_FLOAT32_MAX = float(np.finfo(np.float32).max)
Output = NDArray[Any]


def in_steps(answer: Array, step: float, steps: int) -> Array:
    """Tolerances for ``answer``, whose elements are whole multiples of ``step``: so many steps, and half a step for
    rounding.
    """
    return np.full(answer.shape, (steps + 0.5) * step, np.float32)


class Swap(NamedTuple):
    """Two classes in another order than the reference's.

    Attributes:
        ours, reference: the classes that have the same place.
        gap: how far apart the reference has them, in the output's unit.
        tolerances: the sum of theirs.
    """

    ours: int
    reference: int
    gap: float
    tolerances: float


def best_classes(scores: NDArray[np.floating], top: int = 5) -> NDArray[np.intp]:
    """The classes of the largest elements, best first; of equal ones the lower class first."""
    return np.argsort(-scores.ravel(), kind="stable")[:top]


def first_swap(ours: Array, reference: Array, tolerances: Array) -> Swap | None:
    """The first place among the best five classes where the two have different ones; None where there is none.

    Where every element is within its tolerance, ``gap`` is at most ``tolerances``: each of the two classes moved by no
    more than its own. So `Accuracy.passed` also judges classes and their order.
    """
    for own, given in zip(best_classes(ours), best_classes(reference), strict=True):
        if own != given:
            pair = [given, own]
            first, second = reference.ravel()[pair].astype(np.float64)
            allowed = float(tolerances.ravel()[pair].astype(np.float64).sum())
            return Swap(int(own), int(given), float(first - second), allowed)
    return None


class Worst(NamedTuple):
    """The element that is farthest from the reference in units of its own tolerance.

    Attributes:
        output: which of the network's outputs it is in, from 0.
        excess: its error ÷ its tolerance; infinite where one of the values is not finite.
    """

    output: int
    place: tuple[int, ...]
    found: float
    expected: float
    excess: float


class Accuracy(NamedTuple):
    """One inference against the reference, over all outputs together.

    Attributes:
        worst: None where elements have no tolerances, or the shapes differ.
    """

    max_abs_error: float
    rms_error: float
    relative_error: float
    cosine: float
    worst: Worst | None = None

    @property
    def excess(self) -> float | None:
        """The largest error of an element ÷ its tolerance; None where elements have none."""
        return self.worst.excess if self.worst else None

    @property
    def passed(self) -> bool:
        """Every element is within its tolerance; False where elements have none, or the shapes differ."""
        return self.worst is not None and self.worst.excess <= 1


def compare(
    outputs: Sequence[Output],
    reference: Sequence[Output],
    tolerances: Sequence[Array] | None = None,
) -> Accuracy:
    """Compare all outputs of one inference.

    A value that is infinite or NaN on one side only is an infinite error, and so is a wrong shape. Values that are
    the same infinity, or NaN on both sides, are equal. So are float32's largest number and infinity: ONNX Runtime's
    MaxPool makes either of windows of -inf, as they touch the padding or not, and C limits its sums to the largest number.

    Args:
        tolerances: of each element of each output how far from the reference it may be.

    Returns:
        ``relative_error`` is the largest over the outputs of max-abs error ÷ (max − min) of the reference's output's
        finite values; a constant output counts with a range of its magnitude.
    """
    unequal = Accuracy(np.inf, np.inf, np.inf, 0.0)
    if [o.shape for o in outputs] != [r.shape for r in reference]:
        return unequal
    errors = [_error(o, r) for o, r in zip(outputs, reference, strict=True)]
    relative = max(
        float(error.max(initial=0)) / range_of(expected)
        for error, expected in zip(errors, reference, strict=True)
    )
    error = np.concatenate([each.ravel() for each in errors])
    worst = _worst(outputs, reference, errors, tolerances) if tolerances else None
    if not np.isfinite(error).all():
        return unequal._replace(worst=worst)
    ours = np.concatenate([o.ravel() for o in outputs])
    theirs = np.concatenate([r.ravel() for r in reference])
    finite = np.isfinite(ours) & np.isfinite(theirs)
    return Accuracy(
        max_abs_error=float(error.max(initial=0)),
        rms_error=float(np.sqrt((error**2).mean())) if error.size else 0.0,
        relative_error=relative,
        cosine=cosine(ours[finite], theirs[finite]),
        worst=worst,
    )


def _error(output: Output, expected: Output) -> NDArray[np.float64]:
    with np.errstate(invalid="ignore"):
        error = np.abs(output.astype(np.float64) - expected)
    same = (output == expected) | (np.isnan(output) & np.isnan(expected))
    for one, other in ((output, expected), (expected, output)):
        same |= np.isinf(one) & (other == np.copysign(_FLOAT32_MAX, one))
    return np.where(same, 0.0, np.where(np.isfinite(error), error, np.inf))


def range_of(expected: NDArray[Any]) -> float:
    """Max − min of the finite values; of a constant its magnitude, or 1."""
    finite = expected[np.isfinite(expected)].astype(np.float64)
    if not finite.size:
        return 1.0
    return float(finite.max() - finite.min()) or abs(float(finite[0])) or 1.0


def _worst(
    outputs: Sequence[Output],
    reference: Sequence[Output],
    errors: Sequence[NDArray[np.float64]],
    tolerances: Sequence[Array],
) -> Worst | None:
    found = None
    for which, (error, allowed) in enumerate(zip(errors, tolerances, strict=True)):
        if not error.size:
            continue
        with np.errstate(divide="ignore", invalid="ignore"):
            excess = np.where(error > 0, error / allowed.astype(np.float64), 0.0)
        # An infinite error with an infinite tolerance, or a tolerance that is NaN.
        excess[np.isnan(excess)] = np.inf
        place = np.unravel_index(int(excess.argmax()), excess.shape)
        if found is None or excess[place] > found.excess:
            found = Worst(
                which,
                tuple(map(int, place)),
                float(outputs[which][place]),
                float(reference[which][place]),
                float(excess[place]),
            )
    return found


def cosine(ours: Output, theirs: Output) -> float:
    """Of the angle between two answers as vectors; 1 where one of them is 0."""
    a, b = ours.ravel().astype(np.float64), theirs.ravel().astype(np.float64)
    norms = float(np.linalg.norm(a) * np.linalg.norm(b))
    return float(a @ b) / norms if norms else 1.0
