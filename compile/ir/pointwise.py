"""Operators that turn each value into another by itself: one line of `FUNCTIONS` each.

Of int8 every backend runs them as a table of 256 values (compile/passes/tables.py), in float32 TVM has code for them,
and C for microcontrollers is written from ``c``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import inf
from typing import Any, NamedTuple

import numpy as np

from netship.compile.ir.graph import Array, Operator
from netship.compile.ir.operators import Known


class Function(NamedTuple):
    """A function of one real number x.

    Attributes:
        compute: in numpy.
        c: an expression of the float ``x`` in C99; names in braces are those of ``parameters``.
        parameters: attributes, with ONNX's defaults.
    """

    compute: Callable[..., Any]
    c: str
    parameters: Mapping[str, float] = {}


FUNCTIONS = {
    "Relu": Function(lambda x: np.maximum(x, 0), "x < 0.0f ? 0.0f : x"),
    "Clip": Function(
        lambda x, min, max: np.minimum(np.maximum(x, min), max),
        "x < {min} ? {min} : x > {max} ? {max} : x",
        {"min": -inf, "max": inf},
    ),
    "LeakyRelu": Function(
        lambda x, alpha: np.where(x < 0, alpha * x, x),
        "x < 0.0f ? {alpha} * x : x",
        {"alpha": 0.01},
    ),
    "HardSwish": Function(
        lambda x: x * np.clip(x / 6 + 0.5, 0, 1),
        "x < -3.0f ? 0.0f : x > 3.0f ? x : x * (x / 6.0f + 0.5f)",
    ),
    "HardSigmoid": Function(
        lambda x, alpha, beta: np.clip(alpha * x + beta, 0, 1),
        "{alpha} * x + {beta} < 0.0f ? 0.0f : {alpha} * x + {beta} > 1.0f ? 1.0f : {alpha} * x + {beta}",
        {"alpha": 0.2, "beta": 0.5},
    ),
    "Sigmoid": Function(
        lambda x: 1 / (1 + np.exp(-x)),
        "1.0f / (1.0f + expf(-x))",
    ),
    "Tanh": Function(np.tanh, "tanhf(x)"),
    "Exp": Function(np.exp, "expf(x)"),
    "Sqrt": Function(np.sqrt, "sqrtf(x)"),
    "Abs": Function(np.abs, "fabsf(x)"),
    "Neg": Function(np.negative, "-x"),
}
# Those of two inputs that work on each value by itself, where one is a constant number or both come from one value.
OF_TWO = frozenset(["Add", "Sub", "Mul", "Div", "Min", "Max", "Pow"])
# Those of one input for which there is no C here: of int8 they are tables, too.
_OTHERS = frozenset(
    ["Acos", "Acosh", "Asin", "Asinh", "Atan", "Atanh", "Ceil", "Celu", "Cos", "Cosh"]
    + ["Elu", "Erf", "Floor", "Gelu", "Log", "Mish", "Reciprocal", "Round", "Selu"]
    + ["Shrink", "Sign", "Sin", "Sinh", "Softplus", "Softsign", "Tan"]
    + ["ThresholdedRelu"]
)


class Pointwise(Known):
    """An operator of `FUNCTIONS`."""

    @property
    def parameters(self) -> dict[str, float]:
        """The numbers that the function takes besides x; ONNX has those of Clip as inputs too."""
        known = FUNCTIONS[self.kind].parameters
        values = {}
        for index, (name, default) in enumerate(known.items(), start=1):
            bound = self.constant(index)
            given = self.attributes.get(name, default)
            values[name] = float(given if bound is None else bound.item())
        return values

    def evaluate(self, *values: Array) -> Array:
        compute = FUNCTIONS[self.kind].compute
        with np.errstate(all="ignore"):
            return np.asarray(compute(values[0].astype(np.float64), **self.parameters))


def is_pointwise(operator: Operator) -> bool:
    """Whether each value of the output depends on one value of each input that is no constant number."""
    if operator.kind in OF_TWO:
        constants = [
            each for each in operator.inputs if each and each.value is not None
        ]
        shapes = {each.shape for each in operator.activations}
        return shapes == {operator.output.shape} and all(
            each.size == 1 for each in constants
        )
    known = isinstance(operator, Pointwise) or operator.kind in _OTHERS
    return known and len(operator.activations) == 1
