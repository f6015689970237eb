"""What the C kernels for Cortex-M read: weights in the order of int8.h and float32.h, and what belongs to the sums."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from netship.compile.ir.operators import Convolution
from netship.compile.ir.requantise import Requantisation

SMLAD, MVE = 1, 2
"""How int8.h wants the weights (NN_LAYOUT there)."""
SCALE = np.dtype([("bias", "<i4"), ("ratio", "<f4")])
"""nn_scale of int8.h. The bias holds what the input's zero point adds."""


def scales(requantisation: Requantisation) -> NDArray[Any]:
    """`SCALE` for each output channel, or one for all."""
    packed = np.empty(requantisation.bias.size, SCALE)
    packed["bias"], packed["ratio"] = requantisation.bias, requantisation.ratio
    return packed


def padded_depth(convolution: Convolution) -> int:
    """``depth``, rounded up to the four values that the kernels take at a time."""
    return -(-convolution.depth // 4) * 4


def integers(convolution: Convolution, layout: int) -> NDArray[np.int8]:
    """The weights in the order of int8.h (see NN_LAYOUT there), flat."""
    weights = convolution.weights
    if convolution.depthwise:
        together = 4 if layout == SMLAD else 8
        grouped = _by_tap(weights, together)
        if layout == SMLAD:
            return grouped[:, :, [0, 2, 1, 3]].astype("<i2").ravel().view(np.int8)
        return grouped.ravel()
    flat = weights.reshape(weights.shape[0], -1)
    channels, width = (2, 4) if layout == SMLAD else (4, 16)
    rows, depth = -flat.shape[0] % channels, -flat.shape[1] % width
    flat = np.pad(flat, ((0, rows), (0, depth)))
    # [channel, depth] → [channels together, word or vector, channel, byte].
    tiled = flat.reshape(-1, channels, flat.shape[1] // width, width)
    return tiled.transpose(0, 2, 1, 3).ravel()


def floats(convolution: Convolution) -> NDArray[np.float32]:
    """The weights in the order of float32.h, flat."""
    weights = convolution.weights
    if convolution.depthwise:
        return _by_tap(weights, 4).ravel()
    flat = weights.reshape(weights.shape[0], -1)
    flat = np.pad(flat, ((0, -flat.shape[0] % 4), (0, -flat.shape[1] % 4)))
    # [channel, depth] → [channels together, depth, channel].
    return flat.reshape(-1, 4, flat.shape[1]).transpose(0, 2, 1).ravel()


def _by_tap(weights: NDArray[Any], together: int) -> NDArray[Any]:
    """Of a depthwise convolution: [channels together, tap, channel]."""
    flat = weights.reshape(-1, weights.shape[2])
    flat = np.pad(flat, ((0, 0), (0, -flat.shape[1] % together)))
    return flat.reshape(flat.shape[0], -1, together).transpose(1, 0, 2)


def biases(bias: NDArray[np.float32]) -> NDArray[np.float32]:
    return np.pad(bias.astype(np.float32), (0, -bias.size % 4))
