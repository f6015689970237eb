"""TOPI's int8 convolutions for x86 with dot products that are exact, with VNNI and without.

Without VNNI TOPI multiplies by ``vpmaddubsw``, whose sums of two products saturate at 16 bits: 255 × 127 × 2 does not
fit. Here a weight is twice its half plus its lowest bit, and the two are multiplied apart: 255 × 64 × 2 fits. And since
LLVM 21 ``vpdpbusd`` takes bytes, where TOPI still passes it words and LLVM aborts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

from netship.targets import engine
from netship.targets.presets import Target

tvm = engine.compiler()
from tvm import te, tir, topi
from tvm.autotvm.task.space import OtherOptionEntity, SplitEntity
from tvm.target.codegen import target_has_features
from tvm.target.x86 import get_simd_32bit_lanes
from tvm.topi.generic import conv2d as generic
from tvm.topi.x86 import conv2d_alter_op, depthwise_conv2d, tensor_intrin

BLOCK = 16
"""Channels that TOPI keeps together where it has a dot product; others it fills up and cuts off again."""
_DEPTH = 4
# By bytes of a register: (vpmaddubsw, vpmaddwd, vpdpbusd).
_INSTRUCTIONS = {
    32: ("avx2.pmadd.ub.sw", "avx2.pmadd.wd", "avx512.vpdpbusd.256"),
    64: ("avx512.pmaddubs.w.512", "avx512.pmaddw.d.512", "avx512.vpdpbusd.512"),
}
# Pixels whose sums are kept in registers, by bytes of a register, without VNNI; AVX2 keeps two registers a pixel.
_PIXELS = {32: 5, 64: 24}


def patch_topi() -> None:
    """Make TOPI choose and write its int8 schedules so, from now on in this process."""
    conv2d_alter_op.is_int8_hw_support = _is_exact
    topi.x86.is_int8_hw_support = _is_exact
    tensor_intrin.dot_16x1x16_uint8_int8_int32_cascadelake = _dot_product
    tensor_intrin.dot_16x1x16_uint8_int8_int32_skylake = _dot_product
    generic.fallback_schedule_cpu_1x1_int8 = _tile_pointwise
    generic.fallback_schedule_cpu_common_int8 = _tile_common
    depthwise_conv2d._fallback_schedule = _tile_depthwise


def instruction(target: Target) -> str:
    """What int8 convolutions multiply by on ``target``, for a person."""
    with tvm.target.Target(target.tvm):
        if _has_vnni():
            return "int8: VPDPBUSD"
        if target_has_features("avx2"):
            return "int8: VPMADDUBSW, weights by halves"
    return "int8: no dot product of this CPU is used"


def serves(target: Any = None) -> bool:
    """Whether int8 convolutions for TVM's ``target``, the current one where None, have a dot product."""
    return bool(target_has_features("avx2", target))


def _is_exact(data: str, kernel: str) -> bool:
    return data == "uint8" and kernel == "int8" and serves()


def _has_vnni() -> bool:
    return bool(target_has_features("avx512vnni") or target_has_features("avxvnni"))


# TOPI's own choices, and what they are where VNNI is not: fewer pixels at a time.
_topi_pointwise = generic.fallback_schedule_cpu_1x1_int8
_topi_common = generic.fallback_schedule_cpu_common_int8
_topi_depthwise = depthwise_conv2d._fallback_schedule


def _tile_pointwise(cfg: Any, workload: Any, **sizes: int) -> None:
    _topi_pointwise(cfg, workload, **sizes)
    if not _has_vnni():
        width = prod(cfg["tile_ow"].size)
        height = workload.height // workload.stride_h
        _, rows, columns = max(
            (h * w, h, w)
            for h in (1, 2)
            for w in range(1, width + 1)
            if height % h == 0 and width % w == 0 and h * w <= _most_pixels(width)
        )
        cfg["tile_oh"] = OtherOptionEntity(rows)
        cfg["tile_ow"] = SplitEntity([width // columns, columns])


def _tile_common(cfg: Any, workload: Any, **sizes: int) -> None:
    _topi_common(cfg, workload, **sizes)
    if not _has_vnni():
        _tile_columns(cfg)


def _tile_depthwise(cfg: Any, workload: Any) -> None:
    _topi_depthwise(cfg, workload)
    channels = workload.in_filter
    if workload.in_dtype == "uint8" and serves() and channels % BLOCK == 0:
        # AVX2's own block, of 8, would change the layout before and after.
        cfg["tile_ic"] = cfg["tile_oc"] = SplitEntity([channels // BLOCK, BLOCK])
        _tile_columns(cfg)


def _tile_columns(cfg: Any) -> None:
    width = prod(cfg["tile_ow"].size)
    columns = max(w for w in range(1, _most_pixels(width) + 1) if width % w == 0)
    cfg["tile_ow"] = SplitEntity([width // columns, columns])


def _most_pixels(width: int) -> int:
    most = _PIXELS[get_simd_32bit_lanes() * 4]
    # A row of seven is better kept whole than taken pixel by pixel.
    return max(most, 7) if width == 7 else most


def _dot_product() -> Any:
    """int32[lanes] += uint8[4] · int8[lanes, 4]."""
    lanes = get_simd_32bit_lanes()
    data = te.placeholder((_DEPTH,), dtype="uint8", name="data")
    kernel = te.placeholder((lanes, _DEPTH), dtype="int8", name="kernel")
    k = te.reduce_axis((0, _DEPTH), name="k")
    result = te.compute(
        (lanes,),
        lambda i: te.sum(data[k].astype("int32") * kernel[i, k].astype("int32"), k),
        name="C",
    )

    return intrinsic(result, ([1], [te.var("row"), 1]), _load)


def _load(data: Any, kernel: Any) -> tuple[Any, Any]:
    lanes = get_simd_32bit_lanes()
    octets = f"int8x{_DEPTH * lanes}"
    word = tir.call_intrin("int32", "tir.reinterpret", data.vload([0], "uint8x4"))
    words = word.astype(f"int32x{lanes}")
    loaded = tir.call_intrin(octets, "tir.reinterpret", words)
    return loaded, kernel.vload([0, 0], octets)


def intrinsic(
    result: Any, strides: Sequence[Any], load: Callable[[Any, Any], tuple[Any, Any]]
) -> Any:
    """A tensor intrinsic that computes ``result``, int32 of a register, by `add_products`.

    Args:
        strides: of its two inputs, uint8 data and int8 weights.
        load: makes of buffers of the two what `add_products` takes.
    """

    def body(inputs: Any, outputs: Any) -> tuple[Any, Any, Any]:
        """What TVM asks of a tensor intrinsic: the whole, setting to zero, adding."""
        (output,) = outputs
        sums = f"int32x{get_simd_32bit_lanes()}"

        def added(before: Any) -> Any:
            return output.vstore(0, add_products(before, *load(*inputs)))

        zero = tir.const(0, sums)
        return added(zero), output.vstore(0, zero), added(output.vload([0], sums))

    buffers = {
        each: tir.decl_buffer(
            each.shape, each.dtype, each.name, strides=stride, offset_factor=1
        )
        for each, stride in zip(result.op.input_tensors, strides, strict=True)
    }
    return te.decl_tensor_intrin(
        result.op, body, binds=buffers, default_buffer_params={"offset_factor": 1}
    )


def add_products(before: Any, data: Any, weights: Any) -> Any:
    """``before`` (int32 of a register) + products of bytes, summed by fours: uint8 ``data``, int8 ``weights``."""
    lanes = get_simd_32bit_lanes()
    multiply, add_pairs, multiply_add = _INSTRUCTIONS[lanes * 4]
    sums, words = f"int32x{lanes}", f"int16x{2 * lanes}"
    if _has_vnni():
        return _call(sums, multiply_add, before, data, weights)
    one = tir.const(1, f"int8x{_DEPTH * lanes}")
    for part, factor in ((weights >> one, 2), (weights & one, 1)):
        products = _call(words, multiply, data, part)
        before = before + _call(sums, add_pairs, products, tir.const(factor, words))
    return before


def _call(dtype: str, name: str, *arguments: Any) -> Any:
    count = tir.const(len(arguments), "uint32")
    return tir.call_llvm_pure_intrin(dtype, f"llvm.x86.{name}", count, *arguments)
