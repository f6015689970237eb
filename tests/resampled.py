"""Models of Resize, ConvTranspose, MaxPool with Indices and MaxUnpool, with each of their attributes."""

from __future__ import annotations

from typing import Any

import onnx
from onnx import helper, numpy_helper
from test_rewrite import chain, real, single, weights, whole

IMAGE = (1, 2, 6, 9)


def resized(
    *, sizes: Any = None, scales: Any = None, region: Any = None, **attributes: Any
) -> onnx.ModelProto:
    return single(
        "Resize",
        None if region is None else real(*region),
        None if scales is None else real(*scales),
        *([] if sizes is None else [whole(*sizes)]),
        opset=19,
        shape=IMAGE,
        **attributes,
    )


SCALED: dict[str, dict[str, Any]] = {
    "sizes": {"sizes": [1, 2, 13, 5]},
    "scales": {"scales": [1, 1, 1.1, 0.7]},
}
CROPPED: dict[str, dict[str, Any]] = {
    "inside": {
        "sizes": [1, 2, 6, 9],
        "region": [0, 0, 0.2, 0.1, 1, 1, 0.7, 0.9],
    },
    "beyond": {
        "sizes": [1, 2, 7, 5],
        "region": [0, 0, -0.3, 0.1, 1, 1, 1, 1.4],
    },
    "axes": {
        "scales": [1.5, 0.9],
        "axes": [3, 2],
        "region": [-0.2, 0, 1.2, 0.8],
    },
    "flipped": {"sizes": [5, 8], "axes": [2, 3], "region": [1, 0, 0, 0.5]},
}
SMOOTHED: dict[str, dict[str, Any]] = {
    "sizes": {"sizes": [1, 2, 4, 5]},
    "scales": {"scales": [1, 1, 0.9, 0.5]},
    "policy": {
        "sizes": [3, 3],
        "axes": [2, 3],
        "keep_aspect_ratio_policy": "not_smaller",
    },
    "outside": {"sizes": [1, 2, 4, 5], "exclude_outside": 1},
}
RESIZED: dict[str, onnx.ModelProto] = {
    **{
        f"{mode} {transform} {kind}": resized(
            mode=mode, coordinate_transformation_mode=transform, **given
        )
        for mode in ("nearest", "linear", "cubic")
        for transform in (
            "half_pixel_symmetric",
            "half_pixel",
            "align_corners",
            "asymmetric",
            "pytorch_half_pixel",
        )
        for kind, given in SCALED.items()
    },
    **{
        f"{mode} crop {kind} {value}": resized(
            mode=mode,
            coordinate_transformation_mode="tf_crop_and_resize",
            extrapolation_value=value,
            **given,
        )
        for mode in ("nearest", "linear", "cubic")
        for value in (0.0, -2.5)
        for kind, given in CROPPED.items()
    },
    **{
        f"{mode} {policy} {sizes}": resized(
            mode=mode, keep_aspect_ratio_policy=policy, sizes=sizes, axes=[2, 3]
        )
        for mode in ("nearest", "linear", "cubic")
        for policy in ("not_larger", "not_smaller")
        for sizes in ([13, 11], [4, 8], [3, 20])
    },
    **{
        f"{mode} antialias {kind}": resized(mode=mode, antialias=1, **given)
        for mode in ("linear", "cubic")
        for kind, given in SMOOTHED.items()
    },
    "channels": resized(scales=[1, 2, 1, 0.5]),
}


def unpooled(
    shape: tuple[int, ...], out: list[int] | None = None, **named: Any
) -> onnx.ModelProto:
    """A MaxPool whose Indices a MaxUnpool and an output of their own read."""
    unpool = {
        k: v for k, v in named.items() if k in ("kernel_shape", "strides", "pads")
    }
    inputs = ["p", "i", *(["s"] if out else [])]
    nodes = [
        helper.make_node("MaxPool", ["x"], ["p", "i"], **named),
        helper.make_node("Cast", ["i"], ["places"], to=onnx.TensorProto.FLOAT),
        helper.make_node("MaxUnpool", inputs, ["y"], **unpool),
    ]
    tensors = [numpy_helper.from_array(whole(*out), "s")] if out else []
    return chain(nodes, tensors, 12, shape, ["y", "places"])


POOLED: list[tuple[tuple[Any, ...], dict[str, Any]]] = [
    (((2, 3, 6, 8),), {"kernel_shape": [2, 2], "strides": [2, 2]}),
    (((2, 3, 7, 8), [2, 3, 7, 8]), {"kernel_shape": [2, 2], "strides": [2, 2]}),
    (
        ((2, 3, 7, 8), [2, 3, 7, 8]),
        {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1] * 4},
    ),
    (
        ((1, 3, 7, 8),),
        {"kernel_shape": [3, 2], "strides": [3, 2], "pads": [1, 0, 1, 0]},
    ),
    (
        ((2, 3, 7, 8), [2, 3, 7, 8]),
        {
            "kernel_shape": [3, 3],
            "strides": [2, 2],
            "dilations": [1, 2],
            "ceil_mode": 1,
        },
    ),
    (((2, 3, 9),), {"kernel_shape": [3], "strides": [3]}),
    (((1, 2, 4, 6, 4),), {"kernel_shape": [2, 2, 2], "strides": [2, 2, 2]}),
]
UNPOOLED = {
    f"unpool {index}": unpooled(*given, **named)
    for index, (given, named) in enumerate(POOLED)
}

_WIDE: list[dict[str, Any]] = [
    {"strides": [2, 2], "output_shape": [14, 10]},
    {"strides": [2, 2], "output_shape": [15, 12]},
    {"strides": [2, 3], "output_shape": [13, 9], "auto_pad": "SAME_UPPER"},
    {"strides": [2, 3], "output_shape": [13, 9], "auto_pad": "SAME_LOWER"},
    {"output_shape": [6, 4]},
    {"strides": [2, 2], "output_shape": [7, 4]},
    {"strides": [1, 2], "output_shape": [6, 9]},
    {"strides": [2, 2], "output_shape": [15, 12], "output_padding": [1, 1]},
    {"strides": [2, 2], "auto_pad": "SAME_UPPER", "output_padding": [1, 1]},
    {"strides": [2, 2], "auto_pad": "SAME_LOWER", "output_padding": [1, 0]},
    {"strides": [3, 2], "auto_pad": "SAME_UPPER"},
    {"strides": [3, 4], "auto_pad": "SAME_LOWER"},
    {"strides": [3, 2], "auto_pad": "VALID", "output_padding": [2, 1]},
    {"strides": [3, 4], "output_padding": [2, 3]},
    {"strides": [2, 2], "auto_pad": "SAME_UPPER", "dilations": [2, 1]},
    {
        "strides": [2, 2],
        "dilations": [2, 3],
        "pads": [1, 0, 2, 1],
        "output_padding": [1, 1],
    },
    {"strides": [2, 2], "pads": [1, 2, 1, 2]},
]
_LONG: list[dict[str, Any]] = [
    {"strides": [2]},
    {"strides": [2], "dilations": [2], "pads": [1, 0]},
    {"strides": [2], "output_shape": [14]},
    {"output_shape": [5]},
    {"strides": [2], "auto_pad": "SAME_UPPER", "output_padding": [1]},
]
TRANSPOSED = {
    **{
        f"transposed {opset} {named}": single(
            "ConvTranspose",
            weights(4, 3, 2, 3),
            weights(3),
            opset=opset,
            shape=(1, 4, 7, 5),
            **named,
        )
        for opset in (10, 17)
        for named in _WIDE
    },
    **{
        f"transposed groups {groups} {named}": single(
            "ConvTranspose",
            weights(4, filters, 2, 3),
            shape=(1, 4, 7, 5),
            group=groups,
            **named,
        )
        for groups, filters in ((2, 3), (4, 1), (4, 2))
        for named in _WIDE[:6]
    },
    **{
        f"transposed rank 3 {groups} {named}": single(
            "ConvTranspose", weights(4, 3, 3), shape=(1, 4, 7), group=groups, **named
        )
        for groups in (1, 2, 4)
        for named in _LONG
    },
    "transposed rank 5": single(
        "ConvTranspose",
        weights(4, 3, 2, 3, 2),
        shape=(1, 4, 3, 4, 4),
        strides=[2, 2, 2],
        output_shape=[6, 7, 8],
    ),
}
MODELS = {**RESIZED, **UNPOOLED, **TRANSPOSED}
