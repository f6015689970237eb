"""Convolutions with an odd number of outputs, as the heads of detectors have: their channels filled up to whole vectors.

A vector of channels is the innermost loop of all schedules for convolutions, and its length divides their number: of
243 channels a vector has 9, or 3.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from netship.compile.relay.expressions import is_call, nodes, readers, shape
from netship.targets import engine

tvm = engine.compiler()
from tvm import relay

_UNITS = (16, 8, 4)
# What the longest vectors may add to the multiply-adds; the shortest add less than a quarter.
_MOST = 1.07
_MOVES = {"transpose", "reshape", "squeeze", "concatenate", "nn.batch_flatten"}
_BIAS = "nn.bias_add"


def fill(module: Any) -> Any:
    """Convolutions whose outputs are only moved get channels with weights of 0, which are cut off behind them.

    Args:
        module: of one function, images as NCHW, with types.
    """
    filler = _Filler(readers(nodes(module["main"])))
    function = filler.visit(module["main"])
    if not filler.filled:
        return module
    return relay.transform.InferType()(tvm.IRModule.from_expr(function))


def whole(channels: int) -> int:
    """The least number of channels that fills vectors."""
    sizes = [-(-channels // unit) * unit for unit in _UNITS]
    return next((each for each in sizes if each <= _MOST * channels), sizes[-1])


class _Filler(relay.ExprMutator):  # type: ignore[misc]
    def __init__(self, after: dict[Any, list[Any]]) -> None:
        super().__init__()
        self._after = after
        self.filled = 0

    def visit_call(self, call: Any) -> Any:
        convolution = call.args[0] if is_call(call, _BIAS) else call
        if not self._is_odd(convolution) or not self._is_moved(call):
            return super().visit_call(call)
        self.filled += 1
        channels = shape(convolution.checked_type)[1]
        added = whole(channels) - channels
        weights = _with_zeros(convolution.args[1], added)
        attributes = {**convolution.attrs, "channels": channels + added}
        source = self.visit(convolution.args[0])
        new = relay.nn.conv2d(source, weights, **attributes)
        new = relay.Call(new.op, new.args, new.attrs, span=convolution.span)
        if call is not convolution:
            bias = _with_zeros(call.args[1], added)
            new = relay.Call(call.op, [new, bias], call.attrs, span=call.span)
        return relay.strided_slice(new, [0], [channels], axes=[1])

    def _is_odd(self, call: Any) -> bool:
        if not is_call(call, "nn.conv2d") or call.attrs.groups != 1:
            return False
        channels = shape(call.checked_type)[1]
        return (
            isinstance(call.args[1], relay.Constant)
            and channels >= _UNITS[0]
            and channels % _UNITS[-1] > 0
        )

    def _is_moved(self, call: Any) -> bool:
        """Whether nothing that could be of the same kernel reads it."""
        if call.op.name == _BIAS and not isinstance(call.args[1], relay.Constant):
            return False
        read = self._after.get(call, [])
        return all(
            isinstance(each, relay.Tuple | relay.Function) or is_call(each, *_MOVES)
            for each in read
        )


def _with_zeros(constant: Any, added: int) -> Any:
    """Weights or biases with more output channels, the first axis."""
    values = constant.data.numpy()
    return relay.const(np.pad(values, [(0, added)] + [(0, 0)] * (values.ndim - 1)))
