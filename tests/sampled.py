"""Models of GridSample, RoiAlign, DeformConv, RNN, GRU and LSTM, with each of their attributes."""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper
from test_rewrite import chain, single, weights, whole

Array = NDArray[Any]
IMAGE = (1, 2, 6, 8)
SPREAD = np.random.Generator(np.random.PCG64(5))


def grid(*shape: int) -> Array:
    """Points within the image, beyond it, and halves between pixels."""
    points = SPREAD.uniform(-2.4, 2.4, shape)
    points[..., ::2, :] = SPREAD.integers(-20, 20, points[..., ::2, :].shape) / 8
    return points.astype(np.float32)


def grid_samples() -> dict[str, onnx.ModelProto]:
    made = {}
    for opset, modes in (
        (16, ("bilinear", "nearest", "bicubic")),
        (20, ("linear", "nearest", "cubic")),
    ):
        for mode, padding, align in product(
            modes, ("zeros", "border", "reflection"), (0, 1)
        ):
            made[f"grid {opset} {mode} {padding} {align}"] = single(
                "GridSample",
                grid(1, 4, 10, 2),
                opset=opset,
                shape=IMAGE,
                mode=mode,
                padding_mode=padding,
                align_corners=align,
            )
    return made


def computed_grid() -> onnx.ModelProto:
    nodes = [
        helper.make_node("Transpose", ["x"], ["grid"], perm=[0, 2, 3, 1]),
        helper.make_node("GridSample", ["x", "grid"], ["y"], padding_mode="border"),
    ]
    return chain(nodes, [], 16, (1, 2, 6, 8))


ROIS = np.array(
    [[0, 0, 7, 5], [1.3, 0.4, 5.1, 4.9], [-3, -2, 12, 9], [4, 4, 4.2, 4.1]], np.float32
)


def roi_aligns() -> dict[str, onnx.ModelProto]:
    made = {}
    for opset, mode, ratio, half in product(
        (10, 16), ("avg", "max"), (0, 2), ("half_pixel", "output_half_pixel")
    ):
        named = {"coordinate_transformation_mode": half} if opset == 16 else {}
        made[f"roi {opset} {mode} {ratio} {half}"] = single(
            "RoiAlign",
            ROIS,
            whole(0, 1, 1, 0),
            opset=opset,
            shape=(2, 3, 6, 8),
            mode=mode,
            sampling_ratio=ratio,
            output_height=3,
            output_width=2,
            spatial_scale=0.8,
            **named,
        )
    return made


def deformable(**attributes: Any) -> onnx.ModelProto:
    """Offsets and a mask that the network computes."""
    group, groups = attributes.get("group", 1), attributes.get("offset_group", 1)
    constants = {
        "w": weights(6, 4 // group, 3, 2),
        "b": weights(6),
        "wo": weights(groups * 12, 4, 3, 2),
        "wm": weights(groups * 6, 4, 3, 2),
    }
    named = {
        k: v for k, v in attributes.items() if k in ("strides", "pads", "dilations")
    }
    nodes = [
        helper.make_node("Conv", ["x", "wo"], ["offset"], **named),
        helper.make_node("Conv", ["x", "wm"], ["mask"], **named),
        helper.make_node(
            "DeformConv", ["x", "w", "offset", "b", "mask"], ["y"], **attributes
        ),
        helper.make_node("DeformConv", ["x", "w", "offset"], ["z"], **attributes),
    ]
    tensors = [onnx.numpy_helper.from_array(v, k) for k, v in constants.items()]
    return chain(nodes, tensors, 19, (2, 4, 7, 8), ["y", "z"])


def recurrents() -> dict[str, onnx.ModelProto]:
    made = {}
    for (kind, gates), direction, linear, state in product(
        (("RNN", 1), ("GRU", 3), ("LSTM", 4)),
        ("forward", "reverse", "bidirectional"),
        (0, 1),
        (False, True),
    ):
        if linear and kind != "GRU":
            continue
        d, h = 2 if direction == "bidirectional" else 1, 5
        inputs: list[Array | None] = [
            weights(d, gates * h, 3) * 0.5,
            weights(d, gates * h, h) * 0.5,
            weights(d, 2 * gates * h) * 0.3 if state else None,
            None,
            weights(d, 2, h) if state else None,
        ]
        outputs = ["y", "h"]
        if kind == "LSTM":
            inputs += [weights(d, 2, h) * 0.7 if state else None]
            inputs += [weights(d, 3 * h) * 0.4 if state else None]
            outputs.append("c")
        named = {"linear_before_reset": 1} if linear else {}
        made[f"{kind} {direction} {linear} {state}"] = single(
            kind,
            *inputs,
            opset=14 if state else 7,
            shape=(4, 2, 3),
            outputs=outputs,
            hidden_size=h,
            direction=direction,
            **named,
        )
    return made


MODELS: dict[str, onnx.ModelProto] = {
    **grid_samples(),
    "grid computed": computed_grid(),
    "grid batch": single("GridSample", grid(2, 4, 6, 2), opset=16, shape=(2, 3, 6, 8)),
    "grid volume": single(
        "GridSample", grid(1, 3, 4, 4, 3), opset=20, shape=(1, 2, 3, 4, 5)
    ),
    "grid volume nearest": single(
        "GridSample",
        grid(1, 3, 4, 4, 3),
        opset=20,
        shape=(1, 2, 3, 4, 5),
        mode="nearest",
        padding_mode="reflection",
    ),
    **roi_aligns(),
    "deform": deformable(),
    "deform groups": deformable(group=2, offset_group=2, pads=[1, 1, 1, 1]),
    "deform strided": deformable(
        group=2, offset_group=4, pads=[1, 0, 2, 1], strides=[2, 1], dilations=[1, 2]
    ),
    **recurrents(),
    "GRU with parameters of nothing": single(
        "GRU",
        weights(1, 6, 3),
        weights(1, 6, 2),
        shape=(4, 2, 3),
        hidden_size=2,
        activations=["Sigmoid", "Tanh"],
        activation_alpha=[0.5, 0.25],
        activation_beta=[0.3, 0.1],
    ),
    "RNN relu": single(
        "RNN",
        weights(1, 5, 3),
        weights(1, 5, 5),
        shape=(4, 2, 3),
        hidden_size=5,
        activations=["Relu"],
    ),
}
