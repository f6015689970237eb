"""The error of a bundle's outputs against the reference's, and the accepted errors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

TOLERANCE = 2e-4
"""Largest accepted error of a float32 bundle, relative to the reference's range (max − min).

Two correct float32 runtimes sum in different orders: the trained MobileNetV2 of 53 layers was
observed to differ by 1e-6 of the range, deep networks with random weights by 7e-5. Faults (a
padding, a layout, the float ABI) were observed to differ by 1e-2 and more.
"""

INT8_STEPS = 2
"""How many steps an int8 network's logits may be from ONNX Runtime's on the same QDQ graph.

On x86 with VNNI the two are equal, bit by bit. ONNX Runtime's kernels for other CPUs round additions differently.
"""

INT8_COSINE = 0.99
"""Smallest accepted cosine of an int8 network against the float32 one that it was made from."""

Array = NDArray[np.float32]


class Accuracy(NamedTuple):
    """One inference against the reference, over all outputs together."""

    max_abs_error: float
    rms_error: float
    relative_error: float
    cosine: float

    @property
    def passed(self) -> bool:
        return self.relative_error <= TOLERANCE


def compare(outputs: Sequence[Array], reference: Sequence[Array]) -> Accuracy:
    """Compare all outputs of one inference; a NaN or a wrong shape is an infinite error.

    ``relative_error`` is the largest over the outputs of max-abs error ÷ (max − min) of the
    reference's output; a constant reference output counts with a range of its magnitude.
    """
    same = [o.shape for o in outputs] == [r.shape for r in reference]
    if not same or not all(np.isfinite(each).all() for each in (*outputs, *reference)):
        return Accuracy(np.inf, np.inf, np.inf, 0.0)
    relative = 0.0
    for output, expected in zip(outputs, reference, strict=True):
        error = np.abs(output.astype(np.float64) - expected).max()
        spread = float(expected.max()) - float(expected.min())
        relative = max(relative, error / (spread or abs(float(expected.max())) or 1.0))
    ours = np.concatenate([o.ravel() for o in outputs]).astype(np.float64)
    theirs = np.concatenate([r.ravel() for r in reference]).astype(np.float64)
    error = np.abs(ours - theirs)
    return Accuracy(
        max_abs_error=float(error.max()),
        rms_error=float(np.sqrt((error**2).mean())),
        relative_error=float(relative),
        cosine=cosine(ours, theirs),
    )


def cosine(ours: NDArray[np.floating], theirs: NDArray[np.floating]) -> float:
    """Of the angle between two answers as vectors; 1 where one of them is 0."""
    a, b = ours.ravel().astype(np.float64), theirs.ravel().astype(np.float64)
    norms = float(np.linalg.norm(a) * np.linalg.norm(b))
    return float(a @ b) / norms if norms else 1.0
