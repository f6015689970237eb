"""A float32 network in float16 arithmetic: weights and activations of 16 bits, but for the operators that are kept."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

import numpy as np

from netship.compile.ir.graph import Graph, Operator, Tensor
from netship.compile.ir.kinds import make
from netship.compile.ir.operators import Convolution
from netship.compile.passes import simplify

HALF = np.finfo(np.float16)
LARGEST = float(HALF.max)
LEAST_NORMAL = float(HALF.tiny)
# Products in one sum in float16; the parts of a longer one are added in float32. Rounding partial sums costs
# √(length / 4) times what rounding the products costs (see compile/quantize/float16.py).
LONGEST_SUM = 384
# Sums and products of few terms, comparisons and moves. Functions, means and what divides stay in float32.
ARITHMETIC = frozenset(
    ["Abs", "Add", "Clip", "Concat", "Conv", "DepthToSpace", "Expand", "Flatten"]
    + ["Identity", "LeakyRelu", "Max", "MaxPool", "Min", "Mul", "Neg"]
    + ["PRelu", "Pad", "Relu", "Reshape", "Slice", "Split", "Squeeze", "Sub", "Tile"]
    + ["Transpose", "Unsqueeze"]
)
# Before the network becomes float16: what float32 computes with its constants, and fully connected layers as convolutions.
BEFORE = (
    simplify.drop_identities,
    simplify.fold_normalisation,
    simplify.matmul_as_gemm,
    simplify.one_dimension_as_two,
    simplify.dense_as_convolution,
    simplify.drop_identities,
)
# Constants that only limit or fill: one beyond float16's range is as good as its largest number.
_LIMITS = ("Clip", "Max", "Min", "Pad")


def to_float16(graph: Graph, kept: Collection[str]) -> Graph:
    """The network with float16 in the place of float32, its inputs and outputs excepted.

    Args:
        graph: after `BEFORE`.
        kept: the first outputs of the operators that stay in float32, in addition to those not in `ARITHMETIC`.
    """
    fresh = graph.fresh_names()
    ports = {each.name for each in graph.outputs}
    stored: dict[str, Tensor] = {}
    casts: dict[tuple[str, str], Tensor] = {}
    made: list[Operator] = []

    def as_dtype(tensor: Tensor, dtype: str, kind: str) -> Tensor:
        """The tensor in that type; a cast is added once."""
        tensor = stored.get(tensor.name, tensor)
        if tensor.dtype == dtype or tensor.dtype not in ("float32", "float16"):
            return tensor
        key = (tensor.name, dtype)
        if key not in casts:
            value, name = tensor.value, fresh(f"{tensor.name}/{dtype}")
            if value is not None:
                limit = LARGEST if kind in _LIMITS else np.inf
                inside = np.where(np.isinf(value), value, np.clip(value, -limit, limit))
                with np.errstate(over="ignore"):
                    value = inside.astype(dtype)
            casts[key] = replace(tensor, name=name, dtype=dtype, value=value)
            if value is None:
                to = {"to": 10 if dtype == "float16" else 1}
                made.append(make("Cast", "", [tensor], [casts[key]], to))
        return casts[key]

    for operator in graph.operators:
        half = is_half(operator, kept)
        dtype = "float16" if half else "float32"
        inputs = [
            each and as_dtype(each, dtype, operator.kind) for each in operator.inputs
        ]
        outputs = []
        for each in operator.outputs:
            if half and each.dtype == "float32":
                name = (
                    fresh(f"{each.name}/float16") if each.name in ports else each.name
                )
                stored[each.name] = replace(each, name=name, dtype="float16")
            outputs.append(stored.get(each.name, each))
        made.append(replace(operator, inputs=tuple(inputs), outputs=tuple(outputs)))
        for each in operator.outputs:
            if each.name in ports and each.name in stored:
                source = stored.pop(each.name)
                made.append(make("Cast", "", [source], [each], {"to": 1}))
    return graph.with_operators(made)


def is_half(operator: Operator, kept: Collection[str]) -> bool:
    """Whether an operator of a network after `BEFORE` is computed in float16."""
    return operator.kind in ARITHMETIC and operator.outputs[0].name not in kept


def is_long_sum(operator: Operator) -> bool:
    """Whether a convolution adds its products in float32."""
    return isinstance(operator, Convolution) and operator.depth > LONGEST_SUM
