"""TOPI's int8 convolutions for x86, used where they are exact: with VNNI's dot product.

Without VNNI TOPI multiplies by ``pmaddubsw``, whose sums of two products saturate at 16 bits: 255 × 127 × 2 does
not fit. And since LLVM 21 ``vpdpbusd`` takes bytes, where TOPI still passes it words and LLVM aborts.
"""

from __future__ import annotations

from typing import Any

from targets import engine

tvm = engine.compiler()
from tvm import te, tir, topi
from tvm.target.codegen import target_has_features
from tvm.topi.x86 import conv2d_alter_op, tensor_intrin

_LANES, _DEPTH = 16, 4


def mend() -> None:
    """Make TOPI choose and write its int8 schedules so, from now on in this process."""
    conv2d_alter_op.is_int8_hw_support = _is_exact
    topi.x86.is_int8_hw_support = _is_exact
    tensor_intrin.dot_16x1x16_uint8_int8_int32_cascadelake = _dot_product


def _is_exact(data: str, kernel: str) -> bool:
    return data == "uint8" and kernel == "int8" and target_has_features("avx512vnni")


def _dot_product() -> Any:
    """int32[16] += uint8[4] · int8[16, 4], one ``vpdpbusd``."""
    data = te.placeholder((_DEPTH,), dtype="uint8", name="data")
    kernel = te.placeholder((_LANES, _DEPTH), dtype="int8", name="kernel")
    k = te.reduce_axis((0, _DEPTH), name="k")
    result = te.compute(
        (_LANES,),
        lambda i: te.sum(data[k].astype("int32") * kernel[i, k].astype("int32"), k),
        name="C",
    )

    def buffer(tensor: Any, name: str, strides: list[Any]) -> Any:
        return tir.decl_buffer(
            tensor.shape, tensor.dtype, name, strides=strides, offset_factor=1
        )

    buffers = {
        data: buffer(data, "data", [1]),
        kernel: buffer(kernel, "kernel", [te.var("row"), 1]),
    }
    return te.decl_tensor_intrin(
        result.op,
        _body,
        binds=buffers,
        default_buffer_params={"offset_factor": 1},
    )


def _body(inputs: Any, outputs: Any) -> tuple[Any, Any, Any]:
    """What TOPI asks of a tensor intrinsic: the whole, setting to zero, adding."""
    (output,) = outputs
    zero = output.vstore(0, tir.const(0, "int32x16"))

    def add(sums: Any) -> Any:
        word = tir.call_intrin(
            "int32", "tir.reinterpret", inputs[0].vload([0], "uint8x4")
        )
        data = tir.call_intrin("int8x64", "tir.reinterpret", word.astype("int32x16"))
        total = tir.call_llvm_pure_intrin(
            "int32x16",
            "llvm.x86.avx512.vpdpbusd.512",
            tir.const(3, "uint32"),
            sums,
            data,
            inputs[1].vload([0, 0], "int8x64"),
        )
        return output.vstore(0, total)

    return (
        add(tir.const(0, "int32x16")),
        zero,
        add(output.vload([0], "int32x16")),
    )
