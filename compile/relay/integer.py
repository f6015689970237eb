"""Integer operators (compile.ir.graph) into Relay: no float operator between quantising and dequantising.

Activations are uint8, 128 above the graph's int8: what ReLU6 leaves then has the zero point 0,
and a convolution's padding costs nothing. Only the engine's process imports this.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from bundle.manifest import Tensor as Output
from compile.ir.evaluate import addition, biases, ratios
from compile.ir.graph import Add, AveragePool, Convolution, Network, Quantisation
from compile.passes.channels import fill_blocks
from compile.relay.ops import depthwise, dot_product, requantise
from targets import engine
from targets.presets import Target

tvm = engine.compiler()
from tvm import relay

_OFFSET = 128
# An image's channels, fewer than these, are interleaved by a kernel of their own: LLVM would not vectorise one that quantises too.
_FEW = 4
# x + this − this is x rounded half to even in float32 (|x| < 2²²), as ONNX Runtime rounds.
_ROUNDING = np.float32(1.5 * 2**23)


def to_relay(network: Network, output: Output, target: Target) -> Any:
    """The network as a Relay module from float32 NCHW to float32 of ``output.shape``.

    Requantisation is that of compile.ir.evaluate, bit by bit.

    Raises:
        UserError: a sum does not fit 32 bits.
    """
    dot_product.mend()
    tvm_target = tvm.target.Target(target.tvm)
    classes = network.output.shape[2]
    if dot_product.serves(tvm_target):
        network = fill_blocks(network, dot_product.BLOCK)
    height, width, channels = network.input.shape
    image = relay.var(
        network.input.name, shape=(1, channels, height, width), dtype="float32"
    )
    values = {network.input.name: _quantise(image, network.input.quantisation)}
    for operator in network.operators:
        source = values[operator.input.name]
        if isinstance(operator, Convolution):
            made = _convolution(operator, source, tvm_target)
        elif isinstance(operator, Add):
            made = _add(operator, source, values[operator.other.name])
        else:
            made = _average(operator, source)
        values[operator.output.name] = made
    last = values[network.output.name]
    if network.output.shape[2] != classes:
        last = relay.strided_slice(last, [0], [classes], axes=[1])
    return dequantised(last, network.output.quantisation, output, _OFFSET)


def dequantised(x: Any, of: Quantisation, output: Output, offset: int = 0) -> Any:
    """The module that ends in ``x`` [1, C, H, W] as float32 of ``output.shape``; ``offset``: what x is above int8."""
    steps = relay.cast(x, "int32") - _int32(of.zero + offset)
    made = relay.cast(steps, "float32") * relay.const(np.float32(of.scale))
    module = tvm.IRModule.from_expr(relay.reshape(made, output.shape))
    return relay.transform.InferType()(module)


def float_operators(module: Any) -> list[str]:
    """The operators whose result is float, made from integers and turned into integers again."""
    integral: dict[Any, bool] = {}
    found: list[tuple[str, Any]] = []
    feeding: set[Any] = set()
    calls: list[Any] = []

    def collect(node: Any) -> None:
        if isinstance(node, relay.Call) and isinstance(node.op, tvm.ir.Op):
            calls.append(node)

    relay.analysis.post_order_visit(module["main"], collect)
    for call in calls:
        own = not _is_float(call)
        integral[call] = own or any(integral.get(arg, False) for arg in call.args)
    for call in reversed(calls):
        if call in feeding or not _is_float(call):
            feeding.update(call.args)
        if call in feeding and _is_float(call) and integral[call]:
            found.append((call.op.name, call))
    return [name for name, _ in reversed(found)]


def _is_float(call: Any) -> bool:
    return str(getattr(call.checked_type, "dtype", "")).startswith("float")


def _quantise(x: Any, to: Quantisation) -> Any:
    low, high = -128 - to.zero, 127 - to.zero
    # Division by a scalar would become multiplication by its inverse, which rounds to other steps.
    scale = relay.const(np.full((1, 1, 1, 1), to.scale, np.float32))
    steps = relay.divide(x, scale)
    steps = relay.clip(steps, float(low), float(high))
    # Subtractions: a sum of constants would be simplified away.
    rounded = relay.subtract(
        relay.subtract(steps, relay.const(-_ROUNDING)), relay.const(_ROUNDING)
    )
    return relay.cast(relay.cast(rounded, "int32") + _int32(to.zero + _OFFSET), "uint8")


def _convolution(operator: Convolution, source: Any, target: Any) -> Any:
    channels = operator.output.shape[2]
    zero = operator.input.quantisation.zero + _OFFSET
    if not operator.depthwise and operator.input.shape != _image(source):
        # The classifier takes its input as one row, channels last.
        last = relay.transpose(source, (0, 2, 3, 1))
        source = relay.reshape(last, (1, operator.input.shape[2], 1, 1))
    if operator.depthwise and depthwise.serves(target, operator.kernel, channels):
        sums = depthwise.depthwise(source, operator, zero)
    else:
        sums = _plain_convolution(source, operator, zero)
    span = relay.Span(relay.SourceName(operator.name), 0, 0, 0, 0)
    sums = relay.Call(sums.op, sums.args, sums.attrs, sums.type_args, span)
    bias, _ = biases(operator, _OFFSET)
    return _requantised(sums, operator, bias, operator.low, operator.high)


def _plain_convolution(source: Any, operator: Convolution, zero: int) -> Any:
    channels = operator.output.shape[2]
    top, left, bottom, right = operator.pads
    padding = operator.pads
    if any(padding) and zero:
        widths = ((0, 0), (0, 0), (top, bottom), (left, right))
        source = relay.nn.pad(source, widths, relay.const(np.uint8(zero)))
        padding = (0, 0, 0, 0)
    if operator.input.shape[2] < _FEW:
        source = relay.annotation.stop_fusion(source)
    if operator.depthwise:
        weights = operator.weights.transpose(2, 0, 1)[:, np.newaxis]
    else:
        weights = operator.weights.transpose(0, 3, 1, 2)
    return relay.nn.conv2d(
        source,
        relay.const(np.ascontiguousarray(weights)),
        strides=operator.strides,
        padding=padding,
        groups=channels if operator.depthwise else 1,
        channels=channels,
        kernel_size=operator.kernel,
        out_dtype="int32",
    )


def _image(source: Any) -> tuple[int, ...]:
    """[height, width, channels] of an NCHW expression."""
    module = relay.transform.InferType()(tvm.IRModule.from_expr(source))
    shape = module["main"].body.checked_type.shape
    return tuple(int(shape[axis]) for axis in (2, 3, 1))


def _average(operator: AveragePool, source: Any) -> Any:
    pixels = operator.input.shape[0] * operator.input.shape[1]
    sums = relay.sum(relay.cast(source, "int32"), axis=[2, 3], keepdims=True)
    zero = operator.input.quantisation.zero + _OFFSET
    bias = np.full(operator.input.shape[2], -zero * pixels)
    return _requantised(sums, operator, bias, -128, 127)


def _requantised(
    sums: Any,
    operator: Convolution | AveragePool,
    bias: NDArray[np.int64],
    low: int,
    high: int,
) -> Any:
    return requantise.requantise(
        sums,
        bias.astype(np.int32),
        np.broadcast_to(ratios(operator), bias.shape),
        operator.output.quantisation.zero + _OFFSET,
        low + _OFFSET,
        high + _OFFSET,
    )


def _add(operator: Add, first: Any, second: Any) -> Any:
    a, b, fixed = addition(operator)
    offset = _OFFSET - operator.input.quantisation.offset
    low, high = operator.low + _OFFSET, operator.high + _OFFSET
    return requantise.add(first, second, (a, b), fixed, offset, low, high)


def _int32(value: int) -> Any:
    return relay.const(value, "int32")
