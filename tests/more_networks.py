"""Small networks of the kinds that people bring, with seeded weights: what each has that MobileNetV2 has not."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
from networks import Net, mobilenet_v1, resnet18_like, squeezenet_like
from onnx import TensorProto, helper, numpy_helper

from netship.compile.frontend import family
from netship.compile.frontend.family import divisible


class _Wide(Net):
    """`Net` with constants, activations and heads."""

    opset = 17

    def constant(self, values: object, dtype: type = np.int64) -> str:
        name = f"constant{len(self._weights)}"
        self._weights.append(numpy_helper.from_array(np.asarray(values, dtype), name))
        return name

    def activated(
        self, kind: str, channels: int, kernel: int, stride: int = 1, groups: int = 1
    ) -> str:
        """A convolution with normalisation and an activation: HardSwish, SiLU, Relu6 or Relu."""
        x = self.convolve(channels, kernel, stride, groups, relu=False)
        if kind == "SiLU":
            return self.node("Mul", [x, self.node("Sigmoid", [x])])
        if kind == "Relu6":
            low, high = self.constant(0, np.float32), self.constant(6, np.float32)
            return self.node("Clip", [x, low, high])
        return self.node(kind, [x])

    def squeezed(self, channels: int) -> str:
        """Squeeze-and-excitation of what ``at`` is."""
        x, whole = self.at, self.channels
        self.node("GlobalAveragePool", [x])
        self.convolve(channels, 1, normalise=False)
        gate = self.convolve(whole, 1, normalise=False, relu=False)
        return self.node("Mul", [x, self.node("HardSigmoid", [gate])])

    def inverted(
        self,
        kind: str,
        expanded: int,
        channels: int,
        kernel: int,
        stride: int,
        squeeze: bool = False,
    ) -> None:
        x, before = self.at, self.channels
        if expanded != before:
            self.activated(kind, expanded, 1)
        self.activated(kind, expanded, kernel, stride, groups=expanded)
        if squeeze:
            self.squeezed(divisible(expanded / 4))
        made = self.convolve(channels, 1, relu=False)
        if stride == 1 and channels == before:
            self.node("Add", [x, made])

    def outputs(self, *shapes: tuple[str, list[int]]) -> onnx.ModelProto:
        size = [1, 3, self._resolution, self._resolution]
        graph = helper.make_graph(
            self._nodes,
            "network",
            [helper.make_tensor_value_info("image", TensorProto.FLOAT, size)],
            [
                helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
                for name, shape in shapes
            ],
            self._weights,
        )
        opset = [helper.make_opsetid("", self.opset)]
        return helper.make_model(graph, ir_version=8, opset_imports=opset)


def mobilenet_v3_small(resolution: int = 64) -> onnx.ModelProto:
    """MobileNetV3-Small (arXiv 1905.02244, Table 2) at half its width: squeeze-and-excitation, HardSwish, 5×5."""
    net = _Wide(resolution)
    net.activated("HardSwish", 8, 3, 2)
    for kernel, expanded, channels, squeeze, kind, stride in (
        (3, 8, 8, True, "Relu", 2),
        (3, 36, 12, False, "Relu", 2),
        (3, 44, 12, False, "Relu", 1),
        (5, 48, 20, True, "HardSwish", 2),
        (5, 120, 20, True, "HardSwish", 1),
        (5, 60, 24, True, "HardSwish", 1),
        (5, 144, 48, True, "HardSwish", 2),
        (5, 288, 48, True, "HardSwish", 1),
    ):
        net.inverted(kind, expanded, channels, kernel, stride, squeeze)
    net.activated("HardSwish", 288, 1)
    return net.finish(10)


def efficientnet_lite0(resolution: int = 64) -> onnx.ModelProto:
    """EfficientNet-Lite0 (github.com/tensorflow/tpu) at a quarter of its width and a third of its depth: Relu6, 5×5."""
    net = _Wide(resolution)
    net.activated("Relu6", 8, 3, 2)
    for kernel, channels, stride, factor in (
        *((3, 8, 1, 1), (3, 8, 2, 6), (5, 16, 2, 6), (3, 24, 2, 6)),
        *((5, 32, 1, 6), (5, 48, 2, 6), (3, 80, 1, 6)),
    ):
        net.inverted("Relu6", factor * net.channels, channels, kernel, stride)
    net.activated("Relu6", 320, 1)
    return net.finish(10)


def resnet8(resolution: int = 32) -> onnx.ModelProto:
    """MLPerf Tiny's ResNet-8 by its layers."""
    net = Net(resolution)
    net.convolve(16, 3)
    for channels, stride in ((16, 1), (32, 2), (64, 2)):
        before = net.at, net.channels
        net.convolve(channels, 3, stride)
        after = net.convolve(channels, 3, relu=False)
        net.at, net.channels = before
        if stride != 1:
            net.convolve(channels, 1, stride, relu=False)
        net.channels = channels
        net.node("Relu", [net.node("Add", [after, net.at])])
    return net.finish(10, softmax=True)


def shufflenet_v2(resolution: int = 64) -> onnx.ModelProto:
    """ShuffleNetV2 (arXiv 1807.11164) 0.5 of fewer units: Split, Concat, channels shuffled by Reshape and Transpose."""
    net = _Wide(resolution)
    net.convolve(24, 3, 2)
    net.pool(3, 2)
    size = resolution // 4
    for channels, units in ((48, 2), (96, 2)):
        size //= 2
        for unit in range(units):
            half = channels // 2
            if unit == 0:
                x, before = net.at, net.channels
                net.convolve(before, 3, 2, groups=before, relu=False)
                left = net.convolve(half, 1)
                net.at, net.channels = x, before
                net.convolve(half, 1)
                net.convolve(half, 3, 2, groups=half, relu=False)
            else:
                left = net.node(
                    "Slice", [net.at, *(net.constant([v]) for v in (0, half, 1))]
                )
                net.node(
                    "Slice", [x, *(net.constant([v]) for v in (half, channels, 1))]
                )
                net.channels = half
                net.convolve(half, 1)
                net.convolve(half, 3, groups=half, relu=False)
            right = net.convolve(half, 1)
            net.node("Concat", [left, right], axis=1)
            net.node("Reshape", [net.at, net.constant([1, 2, half, size, size])])
            net.node("Transpose", [net.at], perm=[0, 2, 1, 3, 4])
            x = net.node("Reshape", [net.at, net.constant([1, channels, size, size])])
            net.channels = channels
    net.convolve(128, 1)
    return net.finish(10)


def densenet_like(resolution: int = 64) -> onnx.ModelProto:
    """DenseNet (arXiv 1608.06993) of few layers: normalisation before convolution, Concat of all before, AveragePool."""
    net = _Wide(resolution)
    net.convolve(16, 7, 2)
    net.pool(3, 2)
    for block in range(2):
        for _ in range(3):
            x, before = net.at, net.channels
            statistics = [
                net.weight("BatchNormalization", i, before) for i in range(1, 5)
            ]
            net.node("Relu", [net.node("BatchNormalization", [x, *statistics])])
            net.convolve(16, 1)
            new = net.convolve(8, 3, normalise=False, relu=False)
            net.node("Concat", [x, new], axis=1)
            net.channels = before + 8
        if block == 0:
            net.convolve(net.channels // 2, 1)
            net.node("AveragePool", [net.at], kernel_shape=[2, 2], strides=[2, 2])
    return net.finish(10)


def yolo_like(resolution: int = 64, classes: int = 4) -> onnx.ModelProto:
    """A detector in the form of YOLOv8: SiLU, Split and Concat, pooled pyramid, Resize, a head whose boxes are expectations."""
    net = _Wide(resolution)
    bins = 16
    net.activated("SiLU", 8, 3, 2)
    net.activated("SiLU", 16, 3, 2)
    net.activated("SiLU", 16, 1)
    sizes = net.constant([8, 8])
    names = ["part0", "part1"]
    net._nodes.append(
        helper.make_node("Split", [net.at, sizes], names, "parts", axis=1)
    )
    net.at, net.channels = names[1], 8
    net.activated("SiLU", 8, 3)
    inner = net.activated("SiLU", 8, 3)
    net.node("Add", [inner, names[1]])
    net.node("Concat", [*names, net.at], axis=1)
    net.channels = 24
    fine = net.activated("SiLU", 16, 1)
    net.activated("SiLU", 32, 3, 2)
    x = net.activated("SiLU", 16, 1)
    pooled = [x]
    for _ in range(3):
        net.pool(5, 1)
        pooled.append(net.at)
    net.node("Concat", pooled, axis=1)
    net.channels = 64
    coarse = net.activated("SiLU", 32, 1)
    scales = net.constant([1, 1, 2, 2], np.float32)
    up = net.node("Resize", [coarse, "", scales], mode="nearest")
    net.node("Concat", [up, fine], axis=1)
    net.channels = 48
    net.activated("SiLU", 16, 3)
    fine = net.at
    found = []
    places = 0
    for source, channels, size in (
        (fine, 16, resolution // 4),
        (coarse, 32, resolution // 8),
    ):
        heads = []
        for count in (4 * bins, classes):
            net.at, net.channels = source, channels
            net.activated("SiLU", 16, 3)
            heads.append(net.convolve(count, 1, normalise=False, relu=False))
        both = net.node("Concat", heads, axis=1)
        places += size * size
        shape = net.constant([1, 4 * bins + classes, size * size])
        found.append(net.node("Reshape", [both, shape]))
    net.node("Concat", found, axis=2)
    parts = ["boxes", "scores"]
    sizes = net.constant([4 * bins, classes])
    net._nodes.append(
        helper.make_node("Split", [net.at, sizes], parts, "halves", axis=1)
    )
    net.node("Reshape", [parts[0], net.constant([1, 4, bins, places])])
    net.node("Transpose", [net.at], perm=[0, 2, 1, 3])
    likely = net.node("Softmax", [net.at], axis=1)
    expected = net.constant(np.arange(bins).reshape(1, bins, 1, 1), np.float32)
    net.node(
        "ReduceSum",
        [net.node("Mul", [likely, expected]), net.constant([1])],
        keepdims=0,
    )
    boxes = net.at
    net.node("Sigmoid", [parts[1]])
    made = net.node("Concat", [boxes, net.at], axis=1)
    return net.outputs((made, [1, 4 + classes, places]))


def mobilevit_like(resolution: int = 64) -> onnx.ModelProto:
    """MobileViT's block (arXiv 2110.02178) between convolutions: attention of two heads, LayerNormalization, Gelu's parts."""
    net = _Wide(resolution)
    net.activated("SiLU", 16, 3, 2)
    net.inverted("SiLU", 32, 24, 3, 2)
    net.inverted("SiLU", 48, 32, 3, 2)
    width, heads, tokens = 32, 2, (resolution // 8) ** 2
    x = net.convolve(width, 1, relu=False)
    net.node("Reshape", [x, net.constant([1, width, tokens])])
    rows = net.node("Transpose", [net.at], perm=[0, 2, 1])

    def normalised(source: str) -> str:
        ones = [net.constant(np.full(width, v), np.float32) for v in (1, 0)]
        return net.node("LayerNormalization", [source, *ones], axis=-1)

    def dense(source: str, inputs: int, outputs: int) -> str:
        made = net.node("MatMul", [source, net.weight("Gemm", 1, inputs, outputs)])
        return net.node("Add", [made, net.weight("Gemm", 2, outputs)])

    source = normalised(rows)
    parts = []
    for order in ([0, 2, 1, 3], [0, 2, 3, 1], [0, 2, 1, 3]):
        made = dense(source, width, width)
        made = net.node(
            "Reshape", [made, net.constant([1, tokens, heads, width // heads])]
        )
        parts.append(net.node("Transpose", [made], perm=order))
    query, key, value = parts
    scores = net.node("MatMul", [query, key])
    scores = net.node(
        "Mul", [scores, net.constant((width // heads) ** -0.5, np.float32)]
    )
    mixed = net.node("MatMul", [net.node("Softmax", [scores], axis=-1), value])
    mixed = net.node("Transpose", [mixed], perm=[0, 2, 1, 3])
    mixed = net.node("Reshape", [mixed, net.constant([1, tokens, width])])
    rows = net.node("Add", [rows, dense(mixed, width, width)])
    inner = dense(normalised(rows), width, 2 * width)
    root = net.constant(np.sqrt(2), np.float32)
    error = net.node("Erf", [net.node("Div", [inner, root])])
    gate = net.node("Add", [error, net.constant(1, np.float32)])
    inner = net.node(
        "Mul", [net.node("Mul", [inner, gate]), net.constant(0.5, np.float32)]
    )
    rows = net.node("Add", [rows, dense(inner, 2 * width, width)])
    net.node("Transpose", [rows], perm=[0, 2, 1])
    size = resolution // 8
    net.node("Reshape", [net.at, net.constant([1, width, size, size])])
    net.channels = width
    net.activated("SiLU", 48, 1)
    return net.finish(10)


NETWORKS: dict[str, Callable[[], onnx.ModelProto]] = {
    "MobileNetV1 0.25/64": mobilenet_v1,
    "MobileNetV2 0.35/96": lambda: family.build(0.35, 96),
    "MobileNetV3-small 0.5/64": mobilenet_v3_small,
    "EfficientNet-Lite0, small": efficientnet_lite0,
    "ResNet-8": resnet8,
    "ResNet-18-like": resnet18_like,
    "SqueezeNet 1.1/64": squeezenet_like,
    "ShuffleNetV2-like": shufflenet_v2,
    "DenseNet-like": densenet_like,
    "YOLO-like with DFL": yolo_like,
    "MobileViT-like": mobilevit_like,
}
"""By name: a function that makes it."""
