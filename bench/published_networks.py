"""The networks that published benchmarks time, as ONNX graphs with random weights.

Their speed does not depend on the weights. Batch normalisation is folded, as every runtime does. Layers are those of
benchncnn's files (Tencent/ncnn, benchmark/models/*.param), which differ from the papers where the functions say so.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from netship.targets.errors import UserError

if TYPE_CHECKING:
    import onnx

_CLASSES = 1000


def build(name: str) -> onnx.ModelProto:
    """Raises: UserError for an unknown name."""
    if name not in NETWORKS:
        raise UserError(f"network {name!r}: unknown; known: {', '.join(NETWORKS)}")
    return NETWORKS[name]()


def _mobilenet_v1() -> onnx.ModelProto:
    """arXiv 1704.04861, Table 1."""
    net = _Net(224)
    net.convolve(32, 3, 2)
    plan = [(64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2)]
    for channels, stride in [*plan, *[(512, 1)] * 5, (1024, 2), (1024, 1)]:
        net.convolve(net.channels, 3, stride, groups=net.channels)
        net.convolve(channels, 1)
    return net.classify()


def _mobilenet_v2() -> onnx.ModelProto:
    """arXiv 1801.04381, Table 2, with ReLU in the place of ReLU6, and an expansion in the first bottleneck too."""
    net = _Net(224)
    net.convolve(32, 3, 2)
    plan = [(1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2)]
    plan += [(6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1)]
    for factor, channels, repeats, stride in plan:
        for step in (stride, *[1] * (repeats - 1)):
            start = net.at if step == 1 and net.channels == channels else None
            net.convolve(factor * net.channels, 1)
            net.convolve(net.channels, 3, step, groups=net.channels)
            net.convolve(channels, 1, relu=False)
            if start is not None:
                net.node("Add", [start, net.at])
    net.convolve(1280, 1)
    return net.classify()


def _resnet18() -> onnx.ModelProto:
    """arXiv 1512.03385, Table 1, with a projection in the first stage too, and a pool that rounds up."""
    net = _Net(224)
    net.convolve(64, 7, 2)
    net.pool([0, 0, 1, 1])
    for channels, stride in ((64, 1), (128, 2), (256, 2), (512, 2)):
        for first, step in ((True, stride), (False, 1)):
            start = net.at, net.channels
            net.convolve(channels, 3, step)
            net.convolve(channels, 3, relu=False)
            branch, (net.at, net.channels) = net.at, start
            if first:
                net.convolve(channels, 1, step, relu=False)
            net.node("Relu", [net.node("Add", [branch, net.at])])
            net.channels = channels
    return net.classify()


def _squeezenet() -> onnx.ModelProto:
    """Version 1.1 of arXiv 1602.07360 at Caffe's 227, whose pooling rounds up; the last convolution has padding."""
    net = _Net(227)
    net.convolve(64, 3, 2, pad=0)
    net.pool([0, 0, 0, 0])
    for stage in ((16, 16), (32, 32), (48, 48, 64, 64)):
        for squeezed in stage:
            _fire(net, squeezed)
        if stage[0] != 48:
            net.pool([0, 0, 1, 1])
    net.convolve(_CLASSES, 1, pad=1)
    net.node("Flatten", [net.node("GlobalAveragePool", [net.at])])
    return net.finish()


def _fire(net: _Net, squeezed: int) -> None:
    net.convolve(squeezed, 1)
    start = net.at
    parts = []
    for kernel in (1, 3):
        net.at, net.channels = start, squeezed
        parts.append(net.convolve(4 * squeezed, kernel))
    net.node("Concat", parts, axis=1)
    net.channels = 8 * squeezed


NETWORKS: dict[str, Callable[[], onnx.ModelProto]] = {
    "mobilenet_v1": _mobilenet_v1,
    "mobilenet_v2": _mobilenet_v2,
    "resnet18": _resnet18,
    "squeezenet_v1.1": _squeezenet,
}


class _Net:
    """A chain of layers; ``at`` is the last value, of ``channels`` channels."""

    def __init__(self, resolution: int) -> None:
        self.at, self.channels = "image", 3
        self._resolution = resolution
        self._random = np.random.Generator(np.random.PCG64(5))
        self._nodes: list[onnx.NodeProto] = []
        self._weights: list[onnx.TensorProto] = []

    def node(self, operator: str, inputs: Sequence[str], **attributes: Any) -> str:
        from onnx import helper

        self.at = f"{operator.lower()}{len(self._nodes)}"
        self._nodes.append(
            helper.make_node(operator, inputs, [self.at], self.at, **attributes)
        )
        return self.at

    def convolve(
        self,
        channels: int,
        kernel: int,
        stride: int = 1,
        groups: int = 1,
        relu: bool = True,
        pad: int | None = None,
    ) -> str:
        """A convolution with bias, its padding the kernel's half unless given, and a ReLU."""
        shape = (channels, self.channels // groups, kernel, kernel)
        pads = [kernel // 2 if pad is None else pad] * 4
        inputs = [self.at, *self._parameters(shape, 2.0 if relu else 0.2)]
        self.node("Conv", inputs, strides=[stride] * 2, pads=pads, group=groups)
        self.channels = channels
        return self.node("Relu", [self.at]) if relu else self.at

    def pool(self, pads: list[int]) -> None:
        self.node("MaxPool", [self.at], kernel_shape=[3, 3], strides=[2, 2], pads=pads)

    def classify(self) -> onnx.ModelProto:
        flat = self.node("Flatten", [self.node("GlobalAveragePool", [self.at])])
        inputs = [flat, *self._parameters((_CLASSES, self.channels), 2.0)]
        self.node("Gemm", inputs, transB=1)
        return self.finish()

    def finish(self) -> onnx.ModelProto:
        from onnx import TensorProto, helper

        self.node("Softmax", [self.at], axis=1)
        shape = [1, 3, self._resolution, self._resolution]
        output = helper.make_tensor_value_info(
            self.at, TensorProto.FLOAT, [1, _CLASSES]
        )
        graph = helper.make_graph(
            self._nodes,
            "network",
            [helper.make_tensor_value_info("image", TensorProto.FLOAT, shape)],
            [output],
            self._weights,
        )
        opset = [helper.make_opsetid("", 13)]
        return helper.make_model(graph, ir_version=8, opset_imports=opset)

    def _parameters(self, shape: tuple[int, ...], gain: float) -> tuple[str, str]:
        """Weights and a bias; a gain of 2 keeps a rectified signal's spread (arXiv 1502.01852)."""
        from onnx import numpy_helper

        name = f"layer{len(self._weights)}"
        spread = np.sqrt(gain / np.prod(shape[1:]))
        weight = self._random.standard_normal(shape, np.float32) * np.float32(spread)
        bias = self._random.standard_normal(shape[0], np.float32) * np.float32(0.1)
        names = (f"{name}.weight", f"{name}.bias")
        for each, value in zip(names, (weight, bias), strict=True):
            self._weights.append(numpy_helper.from_array(value, each))
        return names
