"""Which class an operator of each kind is of; of kinds that are not here it is ONNX's own in everything."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from netship.compile.ir import operators, pooling
from netship.compile.ir.graph import Operator, Tensor
from netship.compile.ir.pointwise import FUNCTIONS, Pointwise

# Their numbers are those of one image; of other ranks they are ONNX's own.
_OF_IMAGES = (operators.Convolution, operators.GlobalAverage)
KINDS: dict[str, type[Operator]] = {
    "Conv": operators.Convolution,
    "Gemm": operators.Dense,
    "Add": operators.Addition,
    "Mul": operators.Multiplication,
    "AveragePool": pooling.AveragePool,
    "MaxPool": pooling.MaxPool,
    "GlobalAveragePool": operators.GlobalAverage,
    "QuantizeLinear": operators.Quantise,
    "DequantizeLinear": operators.Dequantise,
    "Transpose": operators.Transpose,
    "Identity": operators.Identity,
    "table": operators.Table,
    "channels": operators.FirstChannels,
    **dict.fromkeys(["Flatten", "Reshape", "Squeeze", "Unsqueeze"], operators.View),
    **dict.fromkeys(FUNCTIONS, Pointwise),
}


def make(
    kind: str,
    name: str,
    inputs: Sequence[Tensor | None],
    outputs: Sequence[Tensor],
    attributes: Mapping[str, Any] | None = None,
) -> Operator:
    """An operator, of its kind's class."""
    cls = KINDS.get(kind, Operator)
    if issubclass(cls, _OF_IMAGES) and inputs[0] and len(inputs[0].shape) != 4:
        cls = Operator
    # Of models that are read as they are written.
    given = attributes or {}
    if issubclass(cls, pooling.Pool) and ("auto_pad" in given or "ceil_mode" in given):
        cls = Operator
    return cls(kind, name, tuple(inputs), tuple(outputs), given)
