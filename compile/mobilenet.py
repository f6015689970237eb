"""The MobileNetV2 family (arXiv 1801.04381) as ONNX graphs with seeded weights.

``python -m compile.mobilenet`` prints parameters and multiply-adds, counted from the
graphs, beside the released figures.
"""

from __future__ import annotations

import argparse
import json
import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from bundle.manifest import Preprocessing
from targets.errors import UserError, run_command
from targets.files import write_whole

if TYPE_CHECKING:
    import onnx

DEFAULT = "mobilenetv2-1.0-224"
WIDTHS = (0.1, 4.0)
RESOLUTIONS = (32, 1024)


class Stage(NamedTuple):
    """``repeats`` bottlenecks that end in ``channels``; the first of them strides."""

    expansion: int
    channels: int
    repeats: int
    stride: int


# Paper, Table 2: columns t, c, n, s, between the stem (32, stride 2) and the head (1280).
STEM_CHANNELS = 32
STAGES = (
    Stage(1, 16, 1, 1),
    Stage(6, 24, 2, 2),
    Stage(6, 32, 3, 2),
    Stage(6, 64, 4, 2),
    Stage(6, 96, 3, 1),
    Stage(6, 160, 3, 2),
    Stage(6, 320, 1, 1),
)
HEAD_CHANNELS = 1280


class Figures(NamedTuple):
    """What others say of one network, both in millions."""

    macs: int
    parameters: float


# The authors' released networks: table "MobileNet V2 ImageNet checkpoints" in
# tensorflow/models, research/slim/nets/mobilenet/README.md. Multiply-adds are of
# convolutions and classifier, truncated; parameters without batch normalisation, rounded.
RELEASED = {
    (1.4, 224): Figures(582, 6.06),
    (1.3, 224): Figures(509, 5.34),
    (1.0, 224): Figures(300, 3.47),
    (1.0, 192): Figures(221, 3.47),
    (1.0, 160): Figures(154, 3.47),
    (1.0, 128): Figures(99, 3.47),
    (1.0, 96): Figures(56, 3.47),
    (0.75, 224): Figures(209, 2.61),
    (0.75, 192): Figures(153, 2.61),
    (0.75, 160): Figures(107, 2.61),
    (0.75, 128): Figures(69, 2.61),
    (0.75, 96): Figures(39, 2.61),
    (0.5, 224): Figures(97, 1.95),
    (0.5, 192): Figures(71, 1.95),
    (0.5, 160): Figures(50, 1.95),
    (0.5, 128): Figures(32, 1.95),
    (0.5, 96): Figures(18, 1.95),
    (0.35, 224): Figures(59, 1.66),
    (0.35, 192): Figures(43, 1.66),
    (0.35, 160): Figures(30, 1.66),
    (0.35, 128): Figures(20, 1.66),
    (0.35, 96): Figures(11, 1.66),
}
# Paper, Table 4.
PAPER = {(1.0, 224): Figures(300, 3.4), (1.4, 224): Figures(585, 6.9)}
# Paper, Table 3, column MobileNetV2, row max: activations that bottlenecks hand on, in
# 16-bit floats, for 1.0 at 224.
PAPER_ACTIVATIONS = "400K"

# What every ReLU6 gets: mean and standard deviation of the pre-activations. A third of
# them is cut at 0 and 0.6 % at 6. A lower mean tells photographs apart better, but each
# cut also magnifies rounding errors, by 1.47 in variance at mean 0 and 1.26 here: over
# 35 layers that is what decides whether two runtimes agree.
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
    """``mobilenetv2-WIDTH-RESOLUTION`` → (width, resolution).

    Raises:
        UserError: not of that form, or out of range.
    """
    match = re.fullmatch(r"mobilenetv2-([0-9]+(?:\.[0-9]+)?)-([0-9]{1,6})", name[:80])
    if not match:
        raise UserError(
            f"network {name[:80]!r}: is not mobilenetv2-WIDTH-RESOLUTION; "
            f"write for example {DEFAULT}"
        )
    width, resolution = float(match[1]), int(match[2])
    _check_range(width, resolution)
    return width, resolution


def _check_range(width: float, resolution: int) -> None:
    for what, value, (low, high) in (
        ("width", width, WIDTHS),
        ("resolution", resolution, RESOLUTIONS),
    ):
        if not low <= value <= high:
            raise UserError(f"{what} {value}: choose {low} to {high}")


def preprocessing(resolution: int) -> Preprocessing:
    """The family's: short side to 256/224 of the resolution, centre crop, v / 127.5 - 1."""
    return Preprocessing(
        resize=round(resolution * 256 / 224),
        crop=(resolution, resolution),
        scale=1 / 127.5,
        mean=(1.0,),
        std=(1.0,),
    )


def divisible(channels: float, by: int = 8) -> int:
    """Round to a multiple of ``by``, losing at most a tenth, as the released networks do."""
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

    Raises:
        UserError: width or resolution out of range.
    """
    _check_range(width, resolution)
    graph = _Graph()
    x = graph.convolution(
        "stem",
        _Signal("input", 3, resolution, mean=0.0, variance=_IMAGE_VARIANCE),
        divisible(STEM_CHANNELS * width),
        kernel=3,
        stride=2,
    )
    block = 0
    for stage in STAGES:
        channels = divisible(stage.channels * width)
        for repeat in range(stage.repeats):
            block += 1
            stride = stage.stride if repeat == 0 else 1
            x = _bottleneck(
                graph, f"block{block}", x, stage.expansion, channels, stride
            )
    head = divisible(HEAD_CHANNELS * max(1.0, width))
    return graph.finish(graph.convolution("head", x, head), resolution, classes)


@dataclass(frozen=True)
class _Signal:
    """A square feature map, and what its values are like (mean and variance of each)."""

    name: str
    channels: int
    size: int
    mean: float
    variance: float


def _bottleneck(
    graph: _Graph, name: str, x: _Signal, expansion: int, channels: int, stride: int
) -> _Signal:
    """Paper, Table 1: expand, depthwise, project; the projection is linear."""
    y = x
    if expansion != 1:
        y = graph.convolution(f"{name}.expand", y, x.channels * expansion)
    y = graph.convolution(
        f"{name}.depthwise", y, y.channels, kernel=3, stride=stride, depthwise=True
    )
    y = graph.convolution(f"{name}.project", y, channels, linear=True)
    return graph.add(name, x, y) if stride == 1 and x.channels == channels else y


class _Graph:
    """Collects nodes and weights.

    Each convolution is made so that its result has a known mean and variance: its
    filters are normalised and its bias takes off what the input's mean contributes, as
    batch normalisation would. Without the bias all photographs end up alike: the mean
    that ReLU6 leaves grows from layer to layer until nothing else is seen.
    """

    def __init__(self) -> None:
        from onnx import numpy_helper

        self._to_tensor = numpy_helper.from_array
        self._random = np.random.PCG64(1801_04381)
        self._nodes: list[onnx.NodeProto] = []
        self._weights: list[onnx.TensorProto] = []
        self._constant("zero", np.float32(0))
        self._constant("six", np.float32(6))

    def convolution(
        self,
        name: str,
        x: _Signal,
        channels: int,
        kernel: int = 1,
        stride: int = 1,
        depthwise: bool = False,
        linear: bool = False,
    ) -> _Signal:
        """A convolution with SAME padding, followed by ReLU6 unless ``linear``."""
        filters = self._integers(channels, (1 if depthwise else x.channels) * kernel**2)
        mean, spread = (0.0, 1.0) if linear else (_MEAN, _SPREAD)
        weights, bias = _normalised(filters, x, mean, spread, smooth=depthwise)
        per_filter = (1 if depthwise else x.channels, kernel, kernel)
        before, after = same_padding(x.size, kernel, stride)
        output = self._node(
            "Conv",
            name,
            [
                x.name,
                self._constant(f"{name}.weight", weights.reshape(-1, *per_filter)),
                self._constant(f"{name}.bias", bias),
            ],
            kernel_shape=[kernel, kernel],
            strides=[stride, stride],
            pads=[before, before, after, after],
            group=channels if depthwise else 1,
        )
        size = math.ceil(x.size / stride)
        if linear:
            return _Signal(output, channels, size, mean=0.0, variance=1.0)
        output = self._node("Clip", f"{name}.relu6", [output, "zero", "six"])
        return _Signal(output, channels, size, _RELU6_MEAN, _RELU6_VARIANCE)

    def add(self, name: str, x: _Signal, y: _Signal) -> _Signal:
        output = self._node("Add", f"{name}.add", [x.name, y.name])
        return _Signal(output, x.channels, x.size, 0.0, x.variance + y.variance)

    def finish(self, x: _Signal, resolution: int, classes: int) -> onnx.ModelProto:
        """Pool, classify, and close the graph."""
        from onnx import TensorProto, helper

        pooled = self._node("GlobalAveragePool", "pool", [x.name])
        flat = self._node("Flatten", "flatten", [pooled])
        filters = self._integers(classes, x.channels)
        weights, bias = _normalised(filters, x, 0.0, _CLASSIFIER_SPREAD)
        inputs = [
            flat,
            self._constant("classifier.weight", weights),
            self._constant("classifier.bias", bias),
        ]
        self._nodes.append(
            helper.make_node("Gemm", inputs, ["logits"], "classifier", transB=1)
        )
        shape = [1, 3, resolution, resolution]
        graph = helper.make_graph(
            self._nodes,
            "mobilenetv2",
            [helper.make_tensor_value_info("input", TensorProto.FLOAT, shape)],
            [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [1, classes])],
            self._weights,
        )
        return helper.make_model(
            graph,
            producer_name="netship",
            ir_version=8,
            opset_imports=[helper.make_opsetid("", 13)],
        )

    def _node(
        self, operator: str, name: str, inputs: list[str], **attributes: Any
    ) -> str:
        from onnx import helper

        self._nodes.append(
            helper.make_node(operator, inputs, [f"{name}.out"], name, **attributes)
        )
        return f"{name}.out"

    def _constant(self, name: str, value: NDArray[np.float32] | np.float32) -> str:
        self._weights.append(self._to_tensor(np.asarray(value), name))
        return name

    def _integers(self, rows: int, columns: int) -> NDArray[np.int64]:
        """Uniform in ±32768, from the generator's raw stream: the same on every machine."""
        raw = self._random.random_raw(math.ceil(rows * columns / 4))
        words = raw.astype("<u8", copy=False).view("<u2")[: rows * columns]
        return words.astype(np.int64).reshape(rows, columns) - (1 << 15)


def _normalised(
    filters: NDArray[np.int64],
    x: _Signal,
    mean: float,
    spread: float,
    smooth: bool = False,
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Weights and biases for an output of that mean and standard deviation.

    Args:
        filters: [outputs, inputs of each].
        smooth: the inputs of one filter are neighbours in one map, which are half alike:
            what is alike adds up by amplitude, the rest by energy.
    """
    # Sums of integers are exact in any order, so the bytes do not depend on the machine.
    total = filters.sum(axis=1).astype(np.float32)
    energy = (filters * filters).sum(axis=1).astype(np.float32)
    if smooth:
        energy = (energy + total * total) / np.float32(2)
    scale = np.float32(spread / math.sqrt(x.variance)) / np.sqrt(energy)
    weights = filters.astype(np.float32) * scale[:, np.newaxis]
    return weights, np.float32(mean) - total * scale * np.float32(x.mean)


@dataclass(frozen=True)
class Layer:
    """A convolution or classifier: shapes as in the graph, multiply-adds, parameters.

    The bias of a convolution is not counted as a parameter: it is folded batch
    normalisation, which the released figures leave out. The classifier's is counted.
    """

    name: str
    operator: str
    input: tuple[int, ...]
    output: tuple[int, ...]
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    groups: int
    macs: int
    parameters: int


def count(model: onnx.ModelProto) -> tuple[Layer, ...]:
    """Every Conv and Gemm of a static graph, in the graph's order.

    Raises:
        UserError: a shape that is not static.
    """
    import onnx

    inferred = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
    shapes = {tensor.name: tuple(tensor.dims) for tensor in inferred.initializer}
    for value in (*inferred.input, *inferred.value_info, *inferred.output):
        sizes = tuple(d.dim_value for d in value.type.tensor_type.shape.dim)
        shapes.setdefault(value.name, sizes)
    return tuple(
        _layer(node, shapes)
        for node in inferred.node
        if node.op_type in ("Conv", "Gemm")
    )


def _layer(node: onnx.NodeProto, shapes: dict[str, tuple[int, ...]]) -> Layer:
    from onnx import helper

    for name in (*node.input, *node.output):
        if name and not all(shapes.get(name, (0,))):
            raise UserError(
                f"node {node.name or node.output[0]!r}: the shape of {name!r} is not "
                "static; give the model fixed input shapes"
            )
    attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    data, weight = shapes[node.input[0]], shapes[node.input[1]]
    output = shapes[node.output[0]]
    parameters = math.prod(weight)
    if node.op_type == "Conv":
        summed = math.prod(weight[1:])
        stride = tuple(attributes.get("strides", [1] * len(weight[2:])))
    else:
        summed = data[0] if attributes.get("transA") else data[1]
        stride = ()
        parameters += sum(math.prod(shapes[name]) for name in node.input[2:])
    return Layer(
        name=node.name,
        operator=node.op_type,
        input=data,
        output=output,
        kernel=weight[2:],
        stride=stride,
        groups=attributes.get("group", 1),
        macs=math.prod(output) * summed,
        parameters=parameters,
    )


@dataclass(frozen=True)
class _Report:
    width: float
    resolution: int
    layers: tuple[Layer, ...]

    @property
    def name(self) -> str:
        return network_name(self.width, self.resolution)

    @property
    def macs(self) -> int:
        return sum(layer.macs for layer in self.layers)

    @property
    def parameters(self) -> int:
        return sum(layer.parameters for layer in self.layers)

    @property
    def released(self) -> Figures | None:
        return RELEASED.get((self.width, self.resolution))

    @property
    def paper(self) -> Figures | None:
        return PAPER.get((self.width, self.resolution))

    @property
    def bottleneck_bytes(self) -> int:
        """The largest tensor that one bottleneck hands to the next, in 16-bit floats."""
        handed_on = (x.output for x in self.layers if x.name.endswith(".project"))
        return max(2 * math.prod(shape) for shape in handed_on)

    def as_json(self, with_layers: bool) -> dict[str, Any]:
        report: dict[str, Any] = {
            "name": self.name,
            "width": self.width,
            "resolution": self.resolution,
            "macs": self.macs,
            "parameters": self.parameters,
            "bottleneck_bytes_16_bit": self.bottleneck_bytes,
            "released": self.released and self.released._asdict(),
            "paper": self.paper and self.paper._asdict(),
        }
        if with_layers:
            report["layers"] = [asdict(layer) for layer in self.layers]
        return report


def _print_table(reports: Sequence[_Report]) -> None:
    print(f"{'':24}{'parameters':^29}  {'multiply-adds':^31}")
    heads = ("counted", "released", "paper")
    print(
        "{:<24}{:>11}{:>10}{:>8}  {:>13}{:>10}{:>8}".format("network", *heads, *heads)
    )
    for x in reports:
        known = (x.released, x.paper)
        parameters = [f"{f.parameters} M" if f else "" for f in known]
        macs = [f"{f.macs} M" if f else "" for f in known]
        print(
            f"{x.name:<24}{x.parameters:>11,}{parameters[0]:>10}{parameters[1]:>8}"
            f"  {x.macs:>13,}{macs[0]:>10}{macs[1]:>8}"
        )
    print(
        "\nparameters: convolutions and classifier without batch normalisation; "
        "multiply-adds: the same layers\n"
        "released: tensorflow/models, research/slim/nets/mobilenet/README.md "
        "(multiply-adds truncated, parameters rounded)\n"
        "paper: arXiv 1801.04381, Table 4"
    )


def _print_layers(report: _Report) -> None:
    columns = "{:<18}{:<9}{:>13}{:>13}{:>8}{:>15}{:>12}"
    print()
    print(
        columns.format(
            "layer",
            "kernel",
            "input",
            "output",
            "stride",
            "multiply-adds",
            "parameters",
        )
    )
    for x in report.layers:
        kernel = "×".join(map(str, x.kernel)) + (" dw" if x.groups > 1 else "")
        print(
            columns.format(
                x.name,
                kernel,
                "×".join(map(str, x.input[1:])),
                "×".join(map(str, x.output[1:])),
                x.stride[0] if x.stride else "",
                f"{x.macs:,}",
                f"{x.parameters:,}",
            )
        )
    paper = (
        f"; the paper's Table 3 has {PAPER_ACTIVATIONS}"
        if report.name == DEFAULT
        else ""
    )
    print(
        f"\nlargest tensor between bottlenecks, as 16-bit floats: "
        f"{report.bottleneck_bytes:,} bytes{paper}"
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m compile.mobilenet",
        description=(
            "Size the MobileNetV2 family (arXiv 1801.04381): parameters and multiply-adds\n"
            "(MAdds) counted from the ONNX graph, beside the figures the authors released\n"
            "with the trained networks and the paper's Table 4."
        ),
        epilog=(
            "width multiplies the channels of every layer, resolution is the side of the\n"
            "input in pixels; MAdds grow with the square of both, parameters with the square\n"
            "of width alone.\n\n"
            "examples:\n"
            "  python -m compile.mobilenet                        the 22 released networks\n"
            "  python -m compile.mobilenet --width 0.35 --resolution 96 --layers\n"
            "  python -m compile.mobilenet --width 0.6 --output small.onnx\n\n"
            "The weights are random (seeded): use a written model to build, time and compare,\n"
            "not to recognise anything."
        ),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--width",
        type=float,
        help=f"one network: {WIDTHS[0]} to {WIDTHS[1]} (default 1.0)",
    )
    parser.add_argument(
        "--resolution",
        type=int,
        help=f"one network: {RESOLUTIONS[0]} to {RESOLUTIONS[1]} pixels (default 224)",
    )
    parser.add_argument(
        "--layers", action="store_true", help="each layer's shape, of one network"
    )
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FILE.onnx",
        help="write one network as an ONNX file",
    )
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object, for machines"
    )
    arguments = parser.parse_args(argv)
    networks = list(RELEASED)
    one = (arguments.width, arguments.resolution) != (None, None)
    if one or arguments.layers or arguments.output:
        width, resolution = parse_name(DEFAULT)
        if arguments.width is not None:
            width = arguments.width
        if arguments.resolution is not None:
            resolution = arguments.resolution
        networks = [(width, resolution)]
    reports = []
    for width, resolution in networks:
        model = build(width, resolution)
        reports.append(_Report(width, resolution, count(model)))
        if arguments.output:
            write_whole(
                arguments.output,
                model.SerializeToString(deterministic=True),
                "--output",
            )
    if arguments.json:
        networks_as_json = [report.as_json(arguments.layers) for report in reports]
        print(json.dumps({"networks": networks_as_json}, indent=2))
        return 0
    _print_table(reports)
    if arguments.layers:
        _print_layers(reports[0])
    return 0


if __name__ == "__main__":
    run_command(main)
