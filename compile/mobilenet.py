"""``python -m compile.mobilenet``: the MobileNetV2 family's parameters and multiply-adds.

They are counted from the ONNX graphs and printed next to the published figures.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from netship.compile.frontend.dense import DEEPLABV3_CLASSES, PREDICTION, Network, parse
from netship.compile.frontend.family import DEFAULT, RESOLUTIONS, WIDTHS
from netship.targets.arguments import add_json, as_json, command_parser, named_path
from netship.targets.errors import UserError, run_command
from netship.targets.files import write_whole

if TYPE_CHECKING:
    import onnx

    from netship.compile.ir.graph import Operator


class Figures(NamedTuple):
    """Published figures of one network, both in millions."""

    macs: int
    parameters: float


# The authors' released networks: table "MobileNet V2 ImageNet checkpoints" in
# tensorflow/models, research/slim/nets/mobilenet/README.md. Multiply-adds are of
# convolutions and classifier, truncated; parameters without batch normalisation, rounded.
RELEASED = {
    (width, resolution): Figures(macs, parameters)
    for width, parameters, by_resolution in (
        (1.4, 6.06, {224: 582}),
        (1.3, 5.34, {224: 509}),
        (1.0, 3.47, {224: 300, 192: 221, 160: 154, 128: 99, 96: 56}),
        (0.75, 2.61, {224: 209, 192: 153, 160: 107, 128: 69, 96: 39}),
        (0.5, 1.95, {224: 97, 192: 71, 160: 50, 128: 32, 96: 18}),
        (0.35, 1.66, {224: 59, 192: 43, 160: 30, 128: 20, 96: 11}),
    )
    for resolution, macs in by_resolution.items()
}
# Paper, Table 4.
PAPER = {(1.0, 224): Figures(300, 3.4), (1.4, 224): Figures(585, 6.9)}
# Paper, Tables 6 and 7: multiply-adds and parameters as printed. Output stride 8 has no row of one pass.
TASKS = {
    "ssdlite-mobilenetv2-1.0-320": {"macs": "0.8 B", "parameters": "4.3 M"},
    "deeplabv3-mobilenetv2-1.0-513": {"macs": "2.75 B", "parameters": "2.11 M"},
    "deeplabv3-mobilenetv2-1.0-513-os8": {"macs": None, "parameters": "2.11 M"},
}
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
    """Every Conv and Gemm of a static graph, in the graph's order."""
    from netship.compile.ir.onnx_form import read_as_written

    operators = read_as_written(model).operators
    return tuple(_layer(x) for x in operators if x.kind in ("Conv", "Gemm"))


def _layer(operator: Operator) -> Layer:
    weights, *bias = filter(None, operator.inputs[1:])
    for tensor in (operator.input, weights, *bias, operator.output):
        if not tensor.size:
            raise UserError(
                f"node {operator.label!r}: the shape of {tensor.name!r} is not "
                "static; give the model fixed input shapes"
            )
    kernel, is_convolution = weights.shape[2:], operator.kind == "Conv"
    return Layer(
        name=operator.name,
        operator=operator.kind,
        input=operator.input.shape,
        output=operator.output.shape,
        kernel=kernel,
        stride=tuple(operator.attributes.get("strides", [1] * len(kernel))),
        groups=operator.attributes.get("group", 1),
        macs=operator.macs,
        parameters=weights.size + sum(x.size for x in bias if not is_convolution),
    )


def _report(network: Network, model: onnx.ModelProto) -> dict[str, Any]:
    """One network as ``--json`` prints it."""
    layers = count(model)
    macs = sum(layer.macs for layer in layers)
    parameters = sum(layer.parameters for layer in layers)
    key = network.width, network.resolution
    if network.head:
        released, paper = None, TASKS.get(network.name)
        parameters += sum(_channel_parameters(layer) for layer in layers)
        if network.head == "deeplabv3":
            # The resized logits, one for each value: 2.75 B, and the release's 152.59 B, need them.
            macs += DEEPLABV3_CLASSES * network.resolution**2
    else:
        released, paper = (
            figures and figures._asdict()
            for figures in (RELEASED.get(key), PAPER.get(key))
        )
    between = (x.output for x in layers if x.name.endswith(".project"))
    return {
        "name": network.name,
        "width": network.width,
        "resolution": network.resolution,
        "macs": macs,
        "parameters": parameters,
        "bottleneck_bytes_16_bit": max(2 * math.prod(shape) for shape in between),
        "released": released,
        "paper": paper,
        "layers": [asdict(layer) for layer in layers],
    }


def _channel_parameters(layer: Layer) -> int:
    """Scales and offsets of batch normalisation, or the bias of a layer without it.

    Table 7 needs them: without, 2.08 M. Its row with ASPP, 4.52 M, too: without, 4.49 M.
    """
    return layer.output[1] * (1 if layer.name.endswith(PREDICTION) else 2)


def _print_table(reports: Sequence[dict[str, Any]]) -> None:
    columns = "{:<24}{:>11}{:>10}{:>8}  {:>13}{:>10}{:>8}"
    heads = ("counted", "released", "paper")
    print(f"{'':24}{'parameters':^29}  {'multiply-adds':^31}")
    print(columns.format("network", *heads, *heads))
    for x in reports:
        known, figures = (x["released"], x["paper"]), []
        for kind in ("parameters", "macs"):
            figures += [f"{x[kind]:,}", *(f"{f[kind]} M" if f else "" for f in known)]
        print(columns.format(x["name"], *figures))
    print(
        "\nparameters: convolutions and classifier without batch normalisation; "
        "multiply-adds: the same layers\n"
        "released: tensorflow/models, research/slim/nets/mobilenet/README.md "
        "(multiply-adds truncated, parameters rounded)\n"
        "paper: arXiv 1801.04381, Table 4"
    )


def _print_tasks(reports: Sequence[dict[str, Any]]) -> None:
    columns = "{:<36}{:>11}{:>10}  {:>13}{:>10}"
    print(f"{'':36}{'parameters':^21}  {'multiply-adds':^23}")
    print(columns.format("network", "counted", "paper", "counted", "paper"))
    for x in reports:
        figures = []
        for kind in ("parameters", "macs"):
            figures += [f"{x[kind]:,}", (x["paper"] or {}).get(kind) or ""]
        print(columns.format(x["name"], *figures))
    print(
        "\nparameters: with the scale and offset of batch normalisation, as the paper counts here\n"
        "multiply-adds: convolutions, and one for each value of the resized logits; one pass\n"
        "paper: arXiv 1801.04381, Tables 6 and 7"
    )


def _print_layers(report: dict[str, Any]) -> None:
    width = max(18, *(len(x["name"]) + 1 for x in report["layers"]))
    columns = f"{{:<{width}}}{{:<9}}{{:>13}}{{:>13}}{{:>8}}{{:>15}}{{:>12}}"
    heads = "layer kernel input output stride multiply-adds parameters"
    print("\n" + columns.format(*heads.split()))
    for x in report["layers"]:
        kernel, source, output = (
            "×".join(map(str, sizes))
            for sizes in (x["kernel"], x["input"][1:], x["output"][1:])
        )
        kernel += " dw" if x["groups"] > 1 else ""
        stride = x["stride"][0] if x["stride"] else ""
        counts = (f"{x[kind]:,}" for kind in ("macs", "parameters"))
        print(columns.format(x["name"], kernel, source, output, stride, *counts))
    is_papers = report["name"] == DEFAULT
    paper = f"; the paper's Table 3 has {PAPER_ACTIVATIONS}" if is_papers else ""
    print(
        f"\nlargest tensor between bottlenecks, as 16-bit floats: "
        f"{report['bottleneck_bytes_16_bit']:,} bytes{paper}"
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = command_parser(
        "compile.mobilenet",
        (
            "Size the MobileNetV2 family (arXiv 1801.04381): parameters and multiply-adds\n"
            "(MAdds) counted from the ONNX graph, next to the figures the authors released\n"
            "with the trained networks and the paper's Tables 4, 6 and 7."
        ),
        (
            "width multiplies the channels of every layer, resolution is the side of the\n"
            "input in pixels; MAdds grow with the square of both, parameters with the square\n"
            "of width only.\n\n"
            "examples:\n"
            "  python -m compile.mobilenet          the 22 released classifiers, SSDLite and DeepLabv3\n"
            "  python -m compile.mobilenet --width 0.35 --resolution 96 --layers\n"
            "  python -m compile.mobilenet --width 0.6 --output small.onnx\n"
            "  python -m compile.mobilenet --model ssdlite-mobilenetv2-0.5-320 --layers\n\n"
            "The weights are random (seeded): use a written model to build, time and compare,\n"
            "not to recognise anything."
        ),
    )
    parser.add_argument(
        "--model",
        metavar="NAME",
        help="one network by its name, as python -m compile.build --model takes it",
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
        type=named_path,
        metavar="FILE.onnx",
        help="write one network as an ONNX file",
    )
    add_json(parser)
    arguments = parser.parse_args(argv)
    networks = [
        *(Network("", width, resolution, 32) for width, resolution in RELEASED),
        *map(parse, TASKS),
    ]
    sizes = {
        key: value
        for key in ("width", "resolution")
        if (value := getattr(arguments, key)) is not None
    }
    if sizes and arguments.model:
        raise UserError("--model: has its own width and resolution; leave them out")
    if arguments.layers or arguments.output or arguments.model or sizes:
        networks = [parse(arguments.model or DEFAULT)._replace(**sizes)]
    reports = []
    for network in networks:
        model = network.build()
        reports.append(_report(network, model))
        if not arguments.layers:
            del reports[-1]["layers"]
        if arguments.output:
            write_whole(
                arguments.output,
                model.SerializeToString(deterministic=True),
                "--output",
            )
    tasks = {network.name for network in networks if network.head}
    if arguments.json:
        print(as_json({"networks": reports}))
        return 0
    classifiers = [x for x in reports if x["name"] not in tasks]
    if classifiers:
        _print_table(classifiers)
    if tasks:
        print(end="\n" if classifiers else "")
        _print_tasks([x for x in reports if x["name"] in tasks])
    if arguments.layers:
        _print_layers(reports[0])
    if arguments.output:
        print(f"\nwritten: {arguments.output}, with seeded random weights")
    return 0


if __name__ == "__main__":
    run_command(main)
