"""What the C kernels for Cortex-M read: weights in the order of int8.h and float32.h, and what belongs to the sums."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from netship.compile.ir.operators import Convolution
from netship.compile.ir.requantise import Requantisation
from netship.targets.cores import CORES

SMLAD, MVE, PLAIN = 1, 2, 3
"""How int8.h wants the weights (NN_LAYOUT there), and portable.h."""

SCALE = np.dtype([("bias", "<i4"), ("ratio", "<f4")])
"""nn_scale of int8.h. The bias holds what the input's zero point adds."""
# What the kernels for SMLAD take: sums that are 256 times as large in 32 bits, and numbers in 16 before they saturate.
_LARGEST_SUM, _LARGEST_NUMBER = 1 << 23, 32000


def layout_of(cpu: str) -> int:
    """How the int8 kernels for a core want the weights."""
    core = CORES[cpu]
    return MVE if core.mve else SMLAD if core.dsp else PLAIN


def scales(requantisation: Requantisation) -> NDArray[Any]:
    """`SCALE` for each output channel, or one for all."""
    packed = np.empty(requantisation.bias.size, SCALE)
    packed["bias"], packed["ratio"] = requantisation.bias, requantisation.ratio
    return packed


def convolution_scales(convolution: Convolution, layout: int) -> NDArray[Any]:
    """`SCALE` for each output channel of a convolution; as many as `integers` has channels."""
    packed = scales(convolution.requantisation)
    if layout != SMLAD or convolution.depthwise:
        return packed
    words, sums = _sums(convolution)
    if not wide(convolution):
        packed["bias"] = 256 * sums.bias - 127 * words[:, :, ::2].sum(axis=(1, 2))
        packed["ratio"] = sums.ratio / np.float32(256)
    return np.pad(packed, (0, packed.size % 2))


def wide(convolution: Convolution) -> bool:
    """Whether the kernels for SMLAD need the plain form of a convolution (see NN_LAYOUT in int8.h)."""
    if convolution.depthwise:
        _, ratio, largest = convolution.requantisation
        return bool((largest * ratio).max() >= _LARGEST_NUMBER)
    words, (_, ratio, largest) = _sums(convolution)
    return bool(
        (largest * ratio).max() >= _LARGEST_NUMBER
        or largest.max() >= _LARGEST_SUM
        or _pairs(words).min() < -(1 << 15)
    )


def _sums(convolution: Convolution) -> tuple[NDArray[np.int64], Requantisation]:
    """`_in_words` and what belongs to it, where a channel whose output never changes has no weights.

    TFLite gives such a channel a bias of 2^30, which would make a convolution wide.
    """
    words = _in_words(convolution)
    bias, ratio, largest = convolution.requantisation
    zero, spread = convolution.output.zero, largest - np.abs(bias)
    least, most = (
        np.clip(
            np.rint((bias + by).astype(np.float32) * ratio), -128 - zero, 127 - zero
        )
        for by in (-spread, spread)
    )
    fixed, number = least == most, least.astype(np.int64)
    words[fixed] = 0
    return words, Requantisation(
        np.where(fixed, number, bias),
        np.where(fixed, np.float32(1), ratio),
        np.where(fixed, np.abs(number), largest),
    )


def _in_words(convolution: Convolution) -> NDArray[np.int64]:
    """[channels, words, 4]: each kernel row's whole words, then what is left of the rows."""
    rows = convolution.weights.astype(np.int64)
    rows = rows.reshape(*rows.shape[:2], -1)
    whole = rows.shape[2] // 4 * 4
    parts = [rows[:, :, :whole], rows[:, :, whole:]]
    flat = np.concatenate([each.reshape(len(rows), -1) for each in parts], axis=1)
    return np.pad(flat, ((0, 0), (0, -flat.shape[1] % 4))).reshape(len(rows), -1, 4)


def _pairs(words: NDArray[np.int64]) -> NDArray[np.int64]:
    return words[..., 1::2] * 256 + words[..., ::2]


def padded_depth(convolution: Convolution) -> int:
    """``depth``, rounded up to the four values that the kernels take at a time."""
    return -(-convolution.depth // 4) * 4


def integers(convolution: Convolution, layout: int) -> NDArray[np.int8]:
    """The weights in the order of int8.h (see NN_LAYOUT there), flat."""
    weights = convolution.weights
    if convolution.depthwise:
        if layout == MVE:
            return _by_tap(weights, 8).ravel()
        taps = weights.reshape(-1, weights.shape[2]).T
        if layout == PLAIN or convolution.kernel != (3, 3):
            return taps.ravel()
        paired = np.pad(taps, ((0, 0), (0, 1)))[:, [0, 3, 1, 4, 2, 5, 6, 7, 8, 9]]
        return paired.astype("<i2").ravel().view(np.int8)
    if layout == SMLAD:
        if wide(convolution):
            bytes_ = _in_words(convolution).astype(np.int8)
        else:
            pairs = _pairs(_sums(convolution)[0]).astype("<i2", order="C")
            bytes_ = pairs.view(np.int8)
        bytes_ = np.pad(bytes_, ((0, len(bytes_) % 2), (0, 0), (0, 0)))
        # [channel, word, byte] → [two channels, word, channel, byte].
        return bytes_.reshape(-1, 2, *bytes_.shape[1:]).transpose(0, 2, 1, 3).ravel()
    flat = weights.reshape(weights.shape[0], -1)
    channels, width = (2, 4) if layout == PLAIN else (4, 16)
    rows, depth = -flat.shape[0] % channels, -flat.shape[1] % width
    flat = np.pad(flat, ((0, rows), (0, depth)))
    if layout == PLAIN:
        # [channel, depth] → [two channels, depth, channel].
        return flat.reshape(-1, channels, flat.shape[1]).transpose(0, 2, 1).ravel()
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
