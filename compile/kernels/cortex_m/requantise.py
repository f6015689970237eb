"""What the int8 kernels begin a sum with and multiply it by: ONNX Runtime's rounding, see `compile.ir.evaluate`."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from compile.ir import evaluate
from compile.ir.graph import Add, AveragePool, Convolution
from targets.errors import UserError

SCALE = np.dtype([("bias", "<i4"), ("ratio", "<f4")])
"""nn_scale of int8.h. The bias holds what the input's zero point adds."""


def of_convolution(convolution: Convolution) -> NDArray[Any]:
    """`SCALE` for each output channel.

    Raises:
        UserError: a sum does not fit 32 bits.
    """
    bias, _ = evaluate.biases(convolution)
    return _scales(convolution, bias)


def of_average(pool: AveragePool) -> NDArray[Any]:
    """One `SCALE` for all channels; the division by the number of pixels is part of the ratio.

    Raises:
        UserError: a sum does not fit 32 bits.
    """
    pixels = pool.input.shape[0] * pool.input.shape[1]
    bias = np.array([-pool.input.quantisation.zero * pixels])
    evaluate.check_sum(pool, int(np.abs(bias).max()) + 128 * pixels)
    return _scales(pool, bias)


def _scales(
    operator: Convolution | AveragePool, bias: NDArray[np.int64]
) -> NDArray[Any]:
    scales = np.empty(bias.size, SCALE)
    scales["bias"], scales["ratio"] = bias, evaluate.ratios(operator)
    return scales


class Addition(NamedTuple):
    """output = rint(a × ratio_a + (b × ratio_b + fixed)), of values as they are stored: int8's and ``offset``."""

    ratio_a: float
    ratio_b: float
    fixed: float
    offset: int


def of_addition(add: Add) -> Addition:
    """Raises: UserError when int8 and uint8 are added, which ONNX does not do."""
    tensors = (add.input, add.other, add.output)
    offsets = {tensor.quantisation.offset for tensor in tensors}
    if len(offsets) != 1:
        raise UserError(
            f"node {add.name!r}: adds int8 and uint8; quantise both and the sum alike"
        )
    ratio_a, ratio_b, fixed = map(float, evaluate.addition(add))
    return Addition(ratio_a, ratio_b, fixed, offsets.pop())
