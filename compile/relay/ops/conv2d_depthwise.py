"""A convolution and the depthwise convolution after it as one operator, so that what lies between stays in the cache.

An inverted residual (arXiv 1801.04381, figure 3) expands its input six-fold only to filter it channel by channel. From
28×28 on the expanded tensor is larger than a small second-level cache, and crosses it twice. Here its rows
are computed as the output needs them (compile/relay/ops/rows.py).

AutoScheduler cannot do this by itself: its sketches never compute one convolution inside another.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from netship.compile.relay.expressions import is_call, nodes, shape
from netship.compile.relay.ops import registration, rows
from netship.compile.relay.prefetch import LINE
from netship.targets import engine

tvm = engine.compiler()
from tvm import relay, te
from tvm.target.x86 import get_simd_32bit_lanes

OPERATOR = "netship.conv2d_depthwise"
# The smallest second-level cache of the CPUs that there are targets for, the Raspberry Pi 3's and 5's; also by trial on
# MobileNetV2 1.0/224: of 256 KB, 512 KB and 1 MB it gives the fewest cycles, core and memory, on Cortex-A72 (estimated).
CACHE_BYTES = 512 << 10
_AVX512_LANES = 16


def fuse(module: Any) -> Any:
    """Fuse each pair whose intermediate tensor is larger than ``CACHE_BYTES``.

    Args:
        module: NHWC, with constant weights.
    """
    users = _users(module["main"])
    return tvm.IRModule.from_expr(_Fuse(users).visit(module["main"]))


def _users(function: Any) -> Counter[Any]:
    counts: Counter[Any] = Counter()
    for node in nodes(function):
        if isinstance(node, relay.Call):
            counts.update(node.args)
        if isinstance(node, relay.Tuple):
            counts.update(node.fields)
    return counts


@dataclass(frozen=True)
class _Layer:
    """A convolution, its bias, and what its sums are clipped to; empty where they are not."""

    convolution: Any
    bias: NDArray[Any]
    limits: tuple[float, ...]


class _Fuse(relay.ExprMutator):  # type: ignore[misc]
    def __init__(self, users: Counter[Any]) -> None:
        super().__init__()
        self._users = users

    def visit_call(self, call: Any) -> Any:
        second = self._layer(call)
        if second is None or not _is_depthwise(second.convolution):
            return super().visit_call(call)
        between = second.convolution.args[0]
        users = [self._users[between]]
        if is_call(between, "cast"):
            between = between.args[0]
            users.append(self._users[between])
        first = self._layer(between)
        if (
            first is None
            or users != [1] * len(users)
            or not (first.limits and _is_plain(first.convolution))
            or call.checked_type.dtype != between.checked_type.dtype
            or _bytes(between.checked_type) <= CACHE_BYTES
        ):
            return super().visit_call(call)
        data, layout = first.convolution.args[0], "NHWC"
        if is_call(data, "layout_transform") and data.attrs.src_layout == "NCHW":
            data, layout = data.args[0], "NCHW"
        # HWOI of one input channel each.
        filters = second.convolution.args[1].data.numpy()[..., 0]
        return registration.call(
            OPERATOR,
            [
                self.visit(data),
                first.convolution.args[1],
                relay.const(first.bias),
                relay.const(filters),
                relay.const(second.bias),
            ],
            data_layout=layout,
            strides=first.convolution.attrs.strides,
            padding=first.convolution.attrs.padding,
            limits=first.limits,
            depthwise_strides=second.convolution.attrs.strides,
            depthwise_padding=second.convolution.attrs.padding,
            depthwise_limits=second.limits,
        )

    def _layer(self, node: Any) -> _Layer | None:
        """The convolution that ``node`` is the end of, if nothing else uses what lies between.

        In a network of float16 a convolution of float32 ends with a cast.
        """
        limits: tuple[float, ...] = ()
        bias = None
        between = []
        if is_call(node, "clip"):
            limits = (float(node.attrs.a_min), float(node.attrs.a_max))
            node = node.args[0]
            between.append(node)
        if is_call(node, "cast"):
            node = node.args[0]
            between.append(node)
        if is_call(node, "add") and isinstance(node.args[1], relay.Constant):
            bias, node = node.args[1].data.numpy(), node.args[0]
            between.append(node)
        if not (
            is_call(node, "nn.conv2d")
            and isinstance(node.args[1], relay.Constant)
            and node.checked_type.dtype in ("float32", "float16")
            and node.attrs.data_layout == "NHWC"
            and all(int(dilation) == 1 for dilation in node.attrs.dilation)
            and all(self._users[each] == 1 for each in between)
        ):
            return None
        channels = shape(node.checked_type)[3]
        if bias is None:
            bias = np.zeros(channels, node.checked_type.dtype)
        if bias.shape[-1:] != (channels,) or bias.size != channels:
            return None
        return _Layer(node, bias.reshape(channels), limits)


def _bytes(tensor: Any) -> int:
    size: int = np.dtype(tensor.dtype).itemsize
    return prod(shape(tensor)) * size


def _is_plain(call: Any) -> bool:
    return call.attrs.kernel_layout == "HWIO" and int(call.attrs.groups) == 1


def _is_depthwise(call: Any) -> bool:
    shapes = (call.args[0].checked_type, call.checked_type)
    channels = {shape(each)[3] for each in shapes}
    groups = int(call.attrs.groups)
    return call.attrs.kernel_layout == "HWOI" and channels == {groups} != {1}


def _pair(tensors: Any, attrs: Any) -> rows.FusedConvDepthwise:
    """What a call with arguments ``tensors`` computes."""
    data, weight, _, filters, *_ = map(shape, tensors)
    if attrs["data_layout"] == "NCHW":
        data = tuple(data[axis] for axis in (0, 2, 3, 1))
    numbers: dict[str, Any] = {
        f"{which}{name}": tuple(map(kind, attrs[f"{which}{name}"]))
        for which in ("", "depthwise_")
        for name, kind in (("strides", int), ("padding", int), ("limits", float))
    }
    layout = str(attrs["data_layout"])
    dtypes = tensors[0].dtype, tensors[3].dtype
    return rows.FusedConvDepthwise(
        data,
        layout,
        weight,
        filters,
        **numbers,
        dtype=dtypes[0],
        depthwise_dtype=dtypes[1],
    )


def _macs(call: Any) -> int:
    """Multiply-adds of one call of the operator, rows that two threads compute counted once."""
    pair = _pair([argument.checked_type for argument in call.args], call.attrs)
    expanded = prod(pair.expanded) * prod(pair.weight[:3])
    return expanded + prod(pair.output) * prod(pair.filters[:2])


def _relation(types: Any, attrs: Any) -> Any:
    return relay.TensorType(_pair(types[:5], attrs).output, types[0].dtype)


def _compute(attrs: Any, inputs: Any, output_type: Any) -> list[Any]:
    pair = _pair(inputs, attrs)
    tile = _tile(tvm.target.Target.current(), pair.dtype)

    def body(buffers: Any, outputs: Any) -> Any:
        return rows.Kernel(pair, tile, buffers, outputs[0]).statement()

    return [
        te.extern(
            pair.output, inputs, body, name="pair", tag=OPERATOR, dtype=pair.dtype
        )
    ]


def _tile(target: Any, dtype: str) -> rows.Tile:
    """By trial over the four pairs of MobileNetV2 1.0/224: of two vectors each input is used twice, and 8 divides 112 and 56.

    With AVX-512, 14 columns or three vectors fill the registers and are no quicker; on Cortex-A72 blocks of 48 channels
    cost as many core cycles, and more of the memory's.
    """
    with target:
        lanes = get_simd_32bit_lanes()
    aarch64 = target.attrs.get("mtriple", "").startswith("aarch64")
    registers = 32 if aarch64 or lanes == _AVX512_LANES else 16
    smaller = 4 // np.dtype(dtype).itemsize
    lanes *= smaller
    return rows.Tile(
        lanes=lanes,
        columns=registers // 4,
        vectors=2,
        outputs=8,
        block=max(2 * lanes, LINE * smaller),
        # Of 128-bit vectors, two clips of integers are done in a cycle, and one of float32 (Arm, Cortex-A72 Software
        # Optimization Guide, UAN 0016A, 3.14 and 3.15).
        as_integers=aarch64,
    )


_operator = registration.register(
    OPERATOR,
    "A convolution, bias and clip, then a depthwise one, likewise.",
    ("data", "weight", "bias", "filters", "shift"),
    _relation,
    relay.op.OpPattern.OPAQUE,
    macs=_macs,
    layers=2,
)
registration.use(_operator, _compute)
