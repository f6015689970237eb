"""The MobileNetV2 family (arXiv 1801.04381) as ONNX graphs with seeded weights."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from netship.bundle.manifest import Preprocessing
from netship.targets.errors import UserError

if TYPE_CHECKING:
    import onnx

DEFAULT = "mobilenetv2-1.0-224"
WIDTHS = (0.1, 4.0)
RESOLUTIONS = (32, 1024)


# Paper, Table 2, between the stem (32, stride 2) and the head (1280): t, c, n, s, which are the expansion, the
# channels, the number of bottlenecks, and the stride of the first of them.
STEM_CHANNELS = 32
STAGES = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)
HEAD_CHANNELS = 1280

# What every ReLU6 gets: mean and standard deviation of the pre-activations. A third of
# them is cut at 0 and 0.6 % at 6. A lower mean would distinguish photographs better, but
# each cut also magnifies rounding errors, by 1.47 in variance at mean 0 and 1.26 here: over
# 35 layers this decides whether two runtimes agree.
_MEAN, _SPREAD = 1.0, 2.0
# Mean and variance of min(max(x, 0), 6) for normally distributed x of those.
_RELU6_MEAN, _RELU6_VARIANCE = 1.39158, 2.17204
# A photograph's x/127.5 - 1 has mean 0 and deviation 0.5, roughly.
_IMAGE_VARIANCE = 0.25
# Gives logits a standard deviation of 0.5 to 1 over the classes.
_CLASSIFIER_SPREAD = 2.0


def network_name(width: float, resolution: int) -> str:
    return f"mobilenetv2-{width}-{resolution}"


def parse_name(name: str) -> tuple[float, int]:
    """``mobilenetv2-WIDTH-RESOLUTION`` → (width, resolution)."""
    match = re.fullmatch(r"mobilenetv2-([0-9]+(?:\.[0-9]+)?)-([0-9]{1,6})", name[:80])
    if not match:
        raise UserError(
            f"network {name[:80]!r}: is not mobilenetv2-WIDTH-RESOLUTION; "
            f"write for example {DEFAULT}"
        )
    width, resolution = float(match[1]), int(match[2])
    check_range(width, resolution)
    return width, resolution


def check_range(width: float, resolution: int) -> None:
    for what, value, (low, high) in (
        ("width", width, WIDTHS),
        ("resolution", resolution, RESOLUTIONS),
    ):
        if not low <= value <= high:
            raise UserError(f"{what} {value}: choose {low} to {high}")


def preprocessing(height: int, width: int = 0) -> Preprocessing:
    """The family's: short side to 256/224 of the longer one of the crop, centre crop, v / 127.5 - 1.

    Args:
        width: of the crop; 0 for a square.
    """
    return Preprocessing(
        resize=round(max(height, width) * 256 / 224),
        crop=(height, width or height),
        scale=1 / 127.5,
        mean=(1.0,),
        std=(1.0,),
    )


def divisible(channels: float, by: int = 8) -> int:
    """Round to a multiple of ``by``, with a loss of at most a tenth, as the released networks do."""
    rounded = max(by, int(channels + by / 2) // by * by)
    return rounded + by if rounded < 0.9 * channels else rounded


def same_padding(size: int, kernel: int, stride: int) -> tuple[int, int]:
    """TensorFlow's SAME padding of one axis, (before, after): the odd pixel goes after."""
    total = max((math.ceil(size / stride) - 1) * stride + kernel - size, 0)
    return total // 2, total - total // 2


def build(width: float, resolution: int, classes: int = 1000) -> onnx.ModelProto:
    """The network as an ONNX graph: the same bytes for the same arguments.

    ``input`` is float32 [1, 3, resolution, resolution], RGB, v / 127.5 - 1; ``logits`` is
    float32 [1, classes]. Batch normalisation is folded into the convolutions. The weights
    are random: labels mean nothing, but activations keep their spread to the last layer,
    and different photographs get different answers.
    """
    check_range(width, resolution)
    graph = Graph()
    x = backbone(graph, width, resolution)[-1]
    x = graph.convolution("head", x, head_channels(width))
    pooled = graph.node("GlobalAveragePool", "pool", [x.name])
    flat = graph.node("Flatten", "flatten", [pooled])
    graph.classifier(flat, x, classes)
    return graph.finish({"logits": (1, classes)}, resolution)


def head_channels(width: float) -> int:
    """Of the last convolution: a width below 1 leaves them as they are."""
    return divisible(HEAD_CHANNELS * max(1.0, width))


def backbone(
    graph: Graph, width: float, resolution: int, output_stride: int = 32
) -> tuple[Signal, ...]:
    """The stem and the bottlenecks.

    Args:
        output_stride: where the maps have shrunk by it, strides become 1 and the depthwise
            convolutions that follow are dilated instead, as in DeepLab.

    Returns:
        The expanded map of each bottleneck, and last the output of the last one.
    """
    x = graph.convolution(
        "stem",
        Signal("input", 3, resolution, mean=0.0, variance=_IMAGE_VARIANCE),
        divisible(STEM_CHANNELS * width),
        kernel=3,
        stride=2,
    )
    expanded: list[Signal] = []
    shrunk, dilation = 2, 1
    for expansion, unscaled, repeats, first_stride in STAGES:
        channels = divisible(unscaled * width)
        for repeat in range(repeats):
            wanted = 1 if repeat else first_stride
            stride = wanted if shrunk * wanted <= output_stride else 1
            name = f"block{len(expanded) + 1}"
            y, x = _bottleneck(graph, name, x, expansion, channels, stride, dilation)
            expanded.append(y)
            shrunk *= stride
            dilation *= wanted // stride
    return *expanded, x


@dataclass(frozen=True)
class Signal:
    """A square feature map, with the mean and variance of its values."""

    name: str
    channels: int
    size: int
    mean: float
    variance: float


def _bottleneck(
    graph: Graph,
    name: str,
    x: Signal,
    expansion: int,
    channels: int,
    stride: int,
    dilation: int,
) -> tuple[Signal, Signal]:
    """Paper, Table 1: expand, depthwise, project; the projection is linear.

    Returns:
        The expanded map, and the output.
    """
    expanded = x
    if expansion != 1:
        expanded = graph.convolution(f"{name}.expand", x, x.channels * expansion)
    y = graph.depthwise(f"{name}.depthwise", expanded, stride, dilation)
    y = graph.convolution(f"{name}.project", y, channels, linear=True)
    if stride == 1 and x.channels == channels:
        y = graph.add(name, x, y)
    return expanded, y


class Graph:
    """Collects nodes and weights.

    The result of each convolution has a known mean and variance: its filters are normalised,
    and its bias subtracts the contribution of the input's mean, as batch normalisation would.
    Without the bias all photographs would give the same answer: the mean after ReLU6 grows
    from layer to layer and hides everything else.
    """

    def __init__(self) -> None:
        from onnx import numpy_helper

        self._to_tensor = numpy_helper.from_array
        self._random = np.random.PCG64(1801_04381)
        self._nodes: list[onnx.NodeProto] = []
        self._weights: list[onnx.TensorProto] = []
        self.constant("zero", np.float32(0))
        self.constant("six", np.float32(6))

    def convolution(
        self,
        name: str,
        x: Signal,
        channels: int,
        kernel: int = 1,
        stride: int = 1,
        depthwise: bool = False,
        linear: bool = False,
        dilation: int = 1,
    ) -> Signal:
        """A convolution with SAME padding, followed by ReLU6 unless ``linear``."""
        filters = self._integers(channels, (1 if depthwise else x.channels) * kernel**2)
        mean, spread = (0.0, 1.0) if linear else (_MEAN, _SPREAD)
        weights, bias = _normalised(filters, x, mean, spread, smooth=depthwise)
        per_filter = (1 if depthwise else x.channels, kernel, kernel)
        before, after = same_padding(x.size, (kernel - 1) * dilation + 1, stride)
        dilated: dict[str, Any] = (
            {"dilations": [dilation, dilation]} if dilation > 1 else {}
        )
        output = self.node(
            "Conv",
            name,
            [
                x.name,
                self.constant(f"{name}.weight", weights.reshape(-1, *per_filter)),
                self.constant(f"{name}.bias", bias),
            ],
            kernel_shape=[kernel, kernel],
            strides=[stride, stride],
            pads=[before, before, after, after],
            group=channels if depthwise else 1,
            **dilated,
        )
        size = math.ceil(x.size / stride)
        if linear:
            return Signal(output, channels, size, mean=0.0, variance=1.0)
        output = self.node("Clip", f"{name}.relu6", [output, "zero", "six"])
        return Signal(output, channels, size, _RELU6_MEAN, _RELU6_VARIANCE)

    def depthwise(
        self, name: str, x: Signal, stride: int = 1, dilation: int = 1
    ) -> Signal:
        """A 3×3 depthwise convolution and ReLU6."""
        return self.convolution(
            name, x, x.channels, 3, stride, depthwise=True, dilation=dilation
        )

    def add(self, name: str, x: Signal, y: Signal) -> Signal:
        output = self.node("Add", f"{name}.add", [x.name, y.name])
        return Signal(output, x.channels, x.size, 0.0, x.variance + y.variance)

    def classifier(self, flat: str, x: Signal, classes: int) -> None:
        from onnx import helper

        filters = self._integers(classes, x.channels)
        weights, bias = _normalised(filters, x, 0.0, _CLASSIFIER_SPREAD)
        inputs = [
            flat,
            self.constant("classifier.weight", weights),
            self.constant("classifier.bias", bias),
        ]
        self._nodes.append(
            helper.make_node("Gemm", inputs, ["logits"], "classifier", transB=1)
        )

    def finish(
        self, outputs: Mapping[str, tuple[int, ...]], resolution: int
    ) -> onnx.ModelProto:
        """Close the graph: its outputs are float32, of those shapes."""
        from onnx import TensorProto, helper

        def declared(name: str, shape: tuple[int, ...]) -> onnx.ValueInfoProto:
            return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)

        graph = helper.make_graph(
            self._nodes,
            "mobilenetv2",
            [declared("input", (1, 3, resolution, resolution))],
            [declared(name, shape) for name, shape in outputs.items()],
            self._weights,
        )
        return helper.make_model(
            graph,
            producer_name="netship",
            ir_version=8,
            opset_imports=[helper.make_opsetid("", 13)],
        )

    def node(
        self,
        operator: str,
        name: str,
        inputs: list[str],
        output: str = "",
        **attributes: Any,
    ) -> str:
        """Returns the output's name: the node's with ``.out`` unless given."""
        from onnx import helper

        output = output or f"{name}.out"
        self._nodes.append(
            helper.make_node(operator, inputs, [output], name, **attributes)
        )
        return output

    def constant(self, name: str, value: NDArray[Any] | np.float32) -> str:
        self._weights.append(self._to_tensor(np.asarray(value), name))
        return name

    def _integers(self, rows: int, columns: int) -> NDArray[np.int64]:
        """Uniform in ±32768, from the generator's raw stream: the same on every machine."""
        raw = self._random.random_raw(math.ceil(rows * columns / 4))
        words = raw.astype("<u8", copy=False).view("<u2")[: rows * columns]
        return words.astype(np.int64).reshape(rows, columns) - (1 << 15)


def _normalised(
    filters: NDArray[np.int64],
    x: Signal,
    mean: float,
    spread: float,
    smooth: bool = False,
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Weights and biases for an output of that mean and standard deviation.

    Args:
        filters: [outputs, inputs of each].
        smooth: the inputs of one filter are neighbours in one map, so half of their values is
            common: the common half adds up by amplitude, the rest by energy.
    """
    # Sums of integers are exact in any order, so the bytes do not depend on the machine.
    total = filters.sum(axis=1).astype(np.float32)
    energy = (filters * filters).sum(axis=1).astype(np.float32)
    if smooth:
        energy = (energy + total * total) / np.float32(2)
    scale = np.float32(spread / math.sqrt(x.variance)) / np.sqrt(energy)
    weights = filters.astype(np.float32) * scale[:, np.newaxis]
    return weights, np.float32(mean) - total * scale * np.float32(x.mean)
