"""``python -m compile.mobilenet``: the MobileNetV2 family's parameters and multiply-adds.

They are counted from the ONNX graphs and printed next to the released figures.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from compile.frontend.family import (
    DEFAULT,
    RESOLUTIONS,
    WIDTHS,
    build,
    network_name,
    parse_name,
)
from targets.errors import UserError, run_command
from targets.files import write_whole

if TYPE_CHECKING:
    import onnx


class Figures(NamedTuple):
    """Published figures of one network, both in millions."""

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
# Paper, Table 3, column MobileNetV2, row max: activations between bottlenecks, in 16-bit
# floats, for 1.0 at 224.
PAPER_ACTIVATIONS = "400K"


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
        """The largest tensor between two bottlenecks, in 16-bit floats."""
        between = (x.output for x in self.layers if x.name.endswith(".project"))
        return max(2 * math.prod(shape) for shape in between)

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
            "(MAdds) counted from the ONNX graph, next to the figures the authors released\n"
            "with the trained networks and the paper's Table 4."
        ),
        epilog=(
            "width multiplies the channels of every layer, resolution is the side of the\n"
            "input in pixels; MAdds grow with the square of both, parameters with the square\n"
            "of width only.\n\n"
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
