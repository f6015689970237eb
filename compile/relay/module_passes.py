"""Relay passes from an imported module to the one that is compiled: the two lists, and the passes that TVM lacks."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from netship.compile.relay import shared_values, vector_channels
from netship.compile.relay.expressions import is_call, shape
from netship.compile.relay.ops import conv2d_bfloat16, conv2d_depthwise, half
from netship.targets import engine

tvm = engine.compiler()
from tvm import relay

# TVM would also convert pooling, with a warning, if it were not listed.
_LAYOUTS = {
    "nn.conv2d": ["NHWC", "default"],
    **{
        f"nn.{kind}_pool2d": ["NHWC"]
        for kind in ("max", "avg", "global_max", "global_avg")
    },
    conv2d_bfloat16.OPERATOR: ["NHWC", "default"],
}

Dump = Callable[[str, Any], None]


def run(
    passes: Iterable[tuple[str, Any]],
    module: Any,
    dump: Dump = lambda name, module: None,
) -> Any:
    """The module after each pass in turn.

    Args:
        passes: names and functions of a module.
        dump: called with each name and what the pass made.
    """
    # ConvertLayout silently does nothing outside a PassContext of opt_level 3.
    with tvm.transform.PassContext(opt_level=3):
        for name, each in passes:
            module = each(module)
            dump(name, module)
    return module


def _mutator(mutator: type[relay.ExprMutator]) -> Callable[[Any], Any]:
    return lambda module: tvm.IRModule.from_expr(mutator().visit(module["main"]))


class _ConstantsLaidOut(relay.ExprMutator):  # type: ignore[misc]
    """Layout changes of weights, done by numpy: FoldConstant compiles a kernel for each, a tenth of a second."""

    def visit_call(self, call: Any) -> Any:
        call = super().visit_call(call)
        # Some have no arguments, such as zeros.
        if not (
            is_call(call) and isinstance(next(iter(call.args), None), relay.Constant)
        ):
            return call
        value = call.args[0].data.numpy()
        if call.op.name == "expand_dims":
            axis = int(call.attrs.axis)
            axis += value.ndim + 1 if axis < 0 else 0
            for _ in range(int(call.attrs.num_newaxis)):
                value = np.expand_dims(value, axis)
            return relay.const(value)
        if call.op.name == "layout_transform":
            source, target = call.attrs.src_layout, call.attrs.dst_layout
            if sorted(source) == sorted(target):
                order = [source.index(letter) for letter in target]
                return relay.const(np.ascontiguousarray(value.transpose(order)))
        return call


class _DenseAsConvolution(relay.ExprMutator):  # type: ignore[misc]
    def visit_call(self, call: Any) -> Any:
        call = super().visit_call(call)
        if not is_call(call, "nn.dense"):
            return call
        data, weight = call.args
        image = relay.expand_dims(data, axis=2, num_newaxis=2)
        kernel = relay.expand_dims(weight, axis=2, num_newaxis=2)
        return relay.squeeze(
            relay.nn.conv2d(image, kernel, kernel_size=(1, 1)), axis=[2, 3]
        )


class _ProductsApart(relay.ExprMutator):  # type: ignore[misc]
    """Products of matrices end their kernel where the rank changes: their schedules take outputs of their own rank."""

    def visit_call(self, call: Any) -> Any:
        new = super().visit_call(call)
        if not is_call(call) or isinstance(call.checked_type, tvm.ir.TupleType):
            return new
        rank = len(call.checked_type.shape)
        arguments = [
            relay.annotation.stop_fusion(made)
            if _ends_product(each) and len(each.checked_type.shape) != rank
            else made
            for each, made in zip(call.args, new.args, strict=True)
        ]
        if arguments == list(new.args):
            return new
        return relay.Call(new.op, arguments, new.attrs, new.type_args, new.span)


def _ends_product(node: Any) -> bool:
    """Whether only elementwise operators, if any, lie between it and a product of matrices."""
    seen, left = set(), [node]
    while left:
        each = left.pop()
        if each in seen or not is_call(each):
            continue
        seen.add(each)
        if is_call(each, "nn.dense", "nn.batch_matmul"):
            return True
        pattern = each.op.get_attr("TOpPattern")
        if pattern is not None and int(pattern) <= relay.op.OpPattern.BROADCAST:
            left += each.args
    return False


class _NotDepthwise(relay.ExprMutator):  # type: ignore[misc]
    """Convolutions of one channel with the layout that their schedules assert: ConvertLayout takes them for depthwise."""

    def visit_call(self, call: Any) -> Any:
        call = super().visit_call(call)
        if not is_call(call, "nn.conv2d") or call.attrs.groups != 1:
            return call
        if call.attrs.kernel_layout != "HWOI":
            return call
        return relay.nn.conv2d(*call.args, **{**call.attrs, "kernel_layout": "HWIO"})


class _Apart(relay.ExprMutator):  # type: ignore[misc]
    """What ends a kernel, also where TVM fuses again: it does so once weights lie as records want them.

    The annotation is gone by then. A convolution is fused with what is elementwise, which a view is not.
    """

    def visit_call(self, call: Any) -> Any:
        new = super().visit_call(call)
        if not is_call(call, "annotation.stop_fusion"):
            return new
        return relay.reshape(new.args[0], shape(call.checked_type))


# Batch normalisation and constants into the convolutions.
FOLD: tuple[tuple[str, Any], ...] = (
    ("types", relay.transform.InferType()),
    ("simplify inference", relay.transform.SimplifyInference()),
    ("fold constants", relay.transform.FoldConstant()),
    ("fold scales", relay.transform.FoldScaleAxis()),
    ("fold constants again", relay.transform.FoldConstant()),
    ("whole vectors", vector_channels.fill),
    ("shared values", shared_values.store),
    ("types of products", relay.transform.InferType()),
    ("products apart", _mutator(_ProductsApart)),
    ("types of kernels", relay.transform.InferType()),
)
# Behind FOLD, of a network in float16.
LONG_SUMS: tuple[tuple[str, Any], ...] = (
    ("types of convolutions", relay.transform.InferType()),
    ("long sums", _mutator(half.LongSums)),
    ("types of long sums", relay.transform.InferType()),
    ("fold constants", relay.transform.FoldConstant()),
)
FOLD_HALF = (*FOLD, *LONG_SUMS)
# For schedules of AutoScheduler: NHWC, large pairs fused, and the classifier as a 1×1 convolution, as ``dense`` breaks
# AutoScheduler in TVM 0.19.
CHANNELS_LAST: tuple[tuple[str, Any], ...] = (
    ("dense as convolution", _mutator(_DenseAsConvolution)),
    # CanonicalizeOps asks for the type of what it adds a bias to.
    ("types of convolutions", relay.transform.InferType()),
    # bias_add as a plain add: ConvertLayout would not move a layout across it.
    ("canonical operators", relay.transform.CanonicalizeOps()),
    ("types", relay.transform.InferType()),
    ("channels last", relay.transform.ConvertLayout(_LAYOUTS)),
    ("one channel", _mutator(_NotDepthwise)),
    ("constants laid out", _mutator(_ConstantsLaidOut)),
    ("types of constants", relay.transform.InferType()),
    ("kernels apart", _mutator(_Apart)),
    ("fold constants", relay.transform.FoldConstant()),
    ("fused pairs", conv2d_depthwise.fuse),
    ("types of pairs", relay.transform.InferType()),
)
