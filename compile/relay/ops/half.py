"""float16 convolutions: vectors of eight in TOPI's schedules, long sums in parts that are added in float32."""

from __future__ import annotations

from math import prod
from typing import Any

import numpy as np

from netship.compile.passes.half import LONGEST_SUM
from netship.compile.relay.expressions import is_call, shape
from netship.targets import engine

tvm = engine.compiler()
from tvm import relay
from tvm.topi.x86 import conv2d_avx_1x1, conv2d_avx_common, depthwise_conv2d

# float16 values of a NEON register.
LANES = 8


def patch_topi() -> None:
    """Make TOPI's schedules without records take blocks of eight channels, from now on in this process."""
    for module in (conv2d_avx_1x1, conv2d_avx_common, depthwise_conv2d):
        module.get_simd_32bit_lanes = lambda: LANES


class LongSums(relay.ExprMutator):  # type: ignore[misc]
    """float16 convolutions of more than `LONGEST_SUM` products an output: over parts of the channels, added in float32.

    TOPI's own sums in float32 (``out_dtype``) convert every weight each time that it is used: 13 % of a Cortex-A76's
    peak, against 85 % in float16.
    """

    def visit_call(self, call: Any) -> Any:
        new = super().visit_call(call)
        if not is_call(call, "nn.conv2d") or call.checked_type.dtype != "float16":
            return new
        weights = shape(call.args[1].checked_type)
        if prod(weights[1:]) <= LONGEST_SUM:
            return new
        parts = -(-weights[1] // _channels(prod(weights[2:])))
        if call.attrs.groups != 1 or parts == 1:
            wide = relay.nn.conv2d(*new.args, **{**call.attrs, "out_dtype": "float32"})
            return relay.cast(wide, "float16")
        # Whole vectors of channels, as even as they can be.
        vectors = np.array_split(np.arange(-(-weights[1] // LANES)), parts)
        ends = [int(each[0]) * LANES for each in vectors[1:]]
        data = relay.split(new.args[0], ends, axis=1)
        kernel = relay.split(new.args[1], ends, axis=1)
        zeros = relay.const(np.zeros(weights[0], np.float16))
        sums = []
        for k in range(parts):
            part = relay.nn.conv2d(data[k], kernel[k], **call.attrs)
            named = relay.Call(part.op, part.args, part.attrs, span=call.span)
            # Each part is a kernel of its own, the same one for all where their shapes are; with a bias it is the kind of
            # kernel for whose like there are tuning records.
            part = relay.annotation.stop_fusion(relay.nn.bias_add(named, zeros))
            sums.append(relay.cast(part, "float32"))
        return relay.cast(sum(sums[1:], sums[0]), "float16")


def _channels(taps: int) -> int:
    """How many channels a part may have, whole vectors; at least one."""
    return max(LONGEST_SUM // taps // LANES, 1) * LANES
