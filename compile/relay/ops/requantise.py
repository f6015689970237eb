"""Two Relay operators that turn 32-bit sums into uint8 as ONNX Runtime does, bit by bit (compile.ir.evaluate says how).

The product with the ratio of scales is one of float32 because ONNX Runtime's is: no fixed-point product rounds as
it does. Relay sees integers go in and come out.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from netship.compile.relay.ops import registration
from netship.targets import engine

tvm = engine.compiler()
from tvm import relay, te, tir, topi
from tvm.relay.op import op as registry
from tvm.target.codegen import target_has_features

REQUANTISE, ADD = "netship.requantize", "netship.add"
# float32 of |x| < 2²² plus this is a whole number, x rounded half to even, in the lowest bits.
_WHOLE = 1.5 * 2**23
_WHOLE_BITS = int(np.float32(_WHOLE).view(np.int32))


def requantise(
    sums: Any,
    bias: NDArray[np.int32],
    ratio: NDArray[np.float32],
    zero: int,
    low: int,
    high: int,
) -> Any:
    """uint8 of int32 NCHW sums: clip(rint((sum + bias) × ratio) + zero, low, high).

    Args:
        bias, ratio: one for each channel.
        zero, low, high: 0 to 255.
    """
    constants = [relay.const(each.reshape(1, -1, 1, 1)) for each in (bias, ratio)]
    arguments = [sums, *constants]
    return registration.call(REQUANTISE, arguments, zero=zero, low=low, high=high)


def add(
    first: Any,
    second: Any,
    ratios: tuple[np.float32, np.float32],
    fixed: np.float32,
    offset: int,
    low: int,
    high: int,
) -> Any:
    """uint8 of two uint8 tensors: clip(rint(a × ratio + (b × ratio + fixed)) + offset, low, high), each sum rounded once.

    Args:
        offset: what ``first``, ``second`` and the result are above the stored a, b and result.
        low, high: 0 to 255.
    """
    a, b = (float(ratio) for ratio in ratios)
    numbers = {"first": a, "second": b, "fixed": float(fixed), "offset": offset}
    return registration.call(ADD, [first, second], **numbers, low=low, high=high)


def _requantise(attrs: Any, inputs: Any, output_type: Any) -> list[Any]:
    sums, bias, ratio = inputs

    def steps(*index: Any) -> Any:
        channel = [
            0 if int(size) == 1 else i
            for i, size in zip(index, bias.shape, strict=True)
        ]
        total = sums(*index) + bias(*channel)
        return _whole(total.astype("float32") * ratio(*channel), attrs, attrs["zero"])

    return [te.compute(output_type.shape, steps, REQUANTISE, topi.tag.BROADCAST)]


def _add(attrs: Any, inputs: Any, output_type: Any) -> list[Any]:
    offset = attrs["offset"]
    multiply_add = _multiply_add(tvm.target.Target.current())

    def steps(*index: Any) -> Any:
        a, b = (
            (tensor(*index).astype("int32") - offset).astype("float32")
            for tensor in inputs
        )
        second = multiply_add(b, _float(attrs["second"]), _float(attrs["fixed"]))
        return _whole(multiply_add(a, _float(attrs["first"]), second), attrs, offset)

    return [te.compute(output_type.shape, steps, ADD, topi.tag.ELEMWISE)]


def _whole(value: Any, attrs: Any, zero: Any) -> Any:
    """float32 → uint8: clipped, rounded half to even, plus ``zero``.

    Between the product and the rounding sum, the clip keeps LLVM from making one operation of the two.
    """
    low, high = (
        _float(float(int(attrs[name]) - int(zero))) for name in ("low", "high")
    )
    clipped = te.max(te.min(value, high), low)
    bits = tir.call_intrin("int32", "tir.reinterpret", clipped + _float(_WHOLE))
    return (bits - tir.const(_WHOLE_BITS - int(zero), "int32")).astype("uint8")


def _multiply_add(target: Any) -> Callable[[Any, Any, Any], Any]:
    """a × b + c in float32, rounded once."""
    if str(target.attrs["mtriple"]).startswith("x86") and not target_has_features(
        "fma", target
    ):
        # The product of 8 bits and 24 and the sum are exact in double precision.
        def emulated(a: Any, b: Any, c: Any) -> Any:
            a, b, c = (each.astype("float64") for each in (a, b, c))
            return (a * b + c).astype("float32")

        return emulated
    return lambda a, b, c: tir.call_llvm_pure_intrin(
        "float32", "llvm.fma", tir.const(3, "uint32"), a, b, c
    )


def _float(value: Any) -> Any:
    return tir.const(float(value), "float32")


def _register(name: str, compute: Any, *arguments: str) -> None:
    operator = registration.register(
        name,
        "Integers in, uint8 out, rounded as ONNX Runtime does.",
        arguments,
        lambda types, attrs: relay.TensorType(types[0].shape, "uint8"),
        relay.op.OpPattern.BROADCAST,
    )
    operator.set_attr("FInferCorrectLayout", registration.layouts)
    registry.register_compute(name, compute)
    registry.register_injective_schedule(name)


_register(REQUANTISE, _requantise, "sums", "bias", "ratio")
_register(ADD, _add, "first", "second")
