"""Small int8 networks for microcontrollers, their C projects, and what their integers must be."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from netship.bundle.golden import Check, seeded_inputs, write_golden
from netship.bundle.manifest import (
    Manifest,
    ModelIdentity,
    Preprocessing,
    TargetIdentity,
    Tensor,
)
from netship.bundle.store import MANIFEST, Bundle, open_bundle, sha256_of
from netship.compile import passes
from netship.compile.backends.c import build
from netship.compile.ir import graph as operators
from netship.compile.ir import onnx_form
from netship.devices.microcontroller.regions import Region
from netship.targets.presets import resolve
from netship.targets.progress import Progress

Floats = NDArray[np.float32]
Integers = NDArray[np.int8]

# A 3×3 kernel's padding that keeps the size.
SAME = (1, 1, 1, 1)


class Graph:
    """A float32 network being written, with seeded weights."""

    def __init__(self, channels: int, size: int) -> None:
        self.shape = (1, channels, size, size)
        self.random = np.random.default_rng(7)
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[TensorProto] = []

    def constant(self, name: str, values: NDArray[Any]) -> str:
        self.weights.append(numpy_helper.from_array(values, name))
        return name

    def node(
        self, kind: str, name: str, inputs: Sequence[str], **attributes: Any
    ) -> str:
        self.nodes.append(helper.make_node(kind, inputs, [name], name, **attributes))
        return name

    def convolution(
        self,
        name: str,
        source: str,
        into: int,
        out: int,
        kernel: int = 1,
        stride: int = 1,
        pads: Sequence[int] = (0, 0, 0, 0),
        depthwise: bool = False,
        clip: bool = True,
    ) -> str:
        shape = (out, 1 if depthwise else into, kernel, kernel)
        spread = np.sqrt(2 / (shape[1] * kernel * kernel))
        weights = self.random.normal(0, spread, shape).astype(np.float32)
        bias = self.random.normal(0.3, 0.3, out).astype(np.float32)
        inputs = [
            source,
            self.constant(f"{name}.weight", weights),
            self.constant(f"{name}.bias", bias),
        ]
        made = self.node(
            "Conv",
            name,
            inputs,
            strides=[stride, stride],
            pads=list(pads),
            group=into if depthwise else 1,
        )
        if not clip:
            return made
        limits = [
            self.constant(f"{name}.{end}", np.array(value, np.float32))
            for end, value in (("min", 0), ("max", 6))
        ]
        return self.node("Clip", f"{name}.relu6", [made, *limits])

    def residual(
        self,
        name: str,
        source: str,
        into: int,
        middle: int,
        out: int,
        stride: int = 1,
        pads: Sequence[int] = SAME,
    ) -> str:
        """An inverted residual without its addition; nothing is expanded where ``middle`` is ``into``."""
        x = source
        if middle != into:
            x = self.convolution(f"{name}.expand", x, into, middle)
        x = self.convolution(
            f"{name}.depthwise", x, middle, middle, 3, stride, pads, depthwise=True
        )
        return self.convolution(f"{name}.project", x, middle, out, clip=False)

    def classifier(self, source: str, into: int, classes: int) -> str:
        weights = self.random.normal(0, 0.3, (classes, into)).astype(np.float32)
        pooled = self.node("GlobalAveragePool", "pool", [source])
        flat = self.node("Flatten", "flat", [pooled])
        inputs = [
            flat,
            self.constant("classifier.weight", weights),
            self.constant("classifier.bias", np.zeros(classes, np.float32)),
        ]
        return self.node("Gemm", "scores", inputs, transB=1)

    def finish(self, shape: Sequence[int]) -> onnx.ModelProto:
        graph = helper.make_graph(
            self.nodes,
            "small",
            [helper.make_tensor_value_info("image", TensorProto.FLOAT, self.shape)],
            [
                helper.make_tensor_value_info(
                    self.nodes[-1].output[0], TensorProto.FLOAT, shape
                )
            ],
            self.weights,
        )
        opset = [helper.make_opsetid("", 13)]
        return helper.make_model(graph, opset_imports=opset, ir_version=8)


def residuals() -> onnx.ModelProto:
    """A stem, three inverted residuals (strides 1 and 2, with and without addition), a classifier."""
    g = Graph(3, 17)
    x = g.convolution("stem", "image", 3, 8, 3, 2, SAME)
    x = g.residual("a", x, 8, 8, 12)
    x = g.node("Add", "b.add", [g.residual("b", x, 12, 24, 12), x])
    x = g.residual("c", x, 12, 28, 20, 2, (0, 0, 1, 1))
    x = g.convolution("head", x, 20, 33)
    g.classifier(x, 33, 5)
    return g.finish((1, 5))


def blocks() -> onnx.ModelProto:
    """Channels by sixteens and not, around depthwise convolutions that pad with zeros and with other values."""
    g = Graph(3, 13)
    x = g.convolution("stem", "image", 3, 16, 3, 1, SAME)
    x = g.residual("a", x, 16, 16, 24)
    x = g.node("Add", "b.add", [x, g.residual("b", x, 24, 48, 24)])
    x = g.convolution("c.expand", x, 24, 32, clip=False)
    x = g.convolution("c.depthwise", x, 32, 32, 3, 2, (0, 1, 1, 1), depthwise=True)
    x = g.convolution("c.wide", x, 32, 32, 5, 1, (2, 2, 2, 2), depthwise=True)
    g.classifier(x, 32, 10)
    return g.finish((1, 10))


def chain() -> onnx.ModelProto:
    """Two blocks with more between them than before and after."""
    g = Graph(3, 19)
    x = g.convolution("stem", "image", 3, 8, 3, 1, SAME)
    x = g.residual("a", x, 8, 8, 16)
    x = g.residual("b", x, 16, 20, 12, 2, (0, 0, 1, 1))
    g.classifier(x, 12, 4)
    return g.finish((1, 4))


def several_rows() -> onnx.ModelProto:
    """An image as two rows, each of which meets a matrix: channels that are added to the image lie within a rog."""
    g = Graph(3, 4)
    x = g.convolution("stem", "image", 3, 6, 1, clip=False)
    x = g.node("Reshape", "rows", [x, g.constant("two", np.array([2, 48, 1, 1]))])
    x = g.convolution("matrix", x, 48, 4, clip=False)
    g.node("Reshape", "one", [x, g.constant("row", np.array([1, 8]))])
    return g.finish((1, 8))


def oddities() -> onnx.ModelProto:
    """What fits no fast path: odd channels, a depthwise 5×5, a wide convolution, an addition of branches."""
    g = Graph(1, 14)
    x = g.convolution("wide", "image", 1, 7, 5, 1, (2, 2, 2, 2))
    left = g.convolution("left", x, 7, 9, 3, 2, (0, 1, 1, 0))
    right = g.convolution(
        "right.depthwise", x, 7, 7, 5, 2, (2, 2, 2, 2), depthwise=True
    )
    right = g.convolution("right.project", right, 7, 9, clip=False)
    x = g.node("Add", "sum", [left, right])
    x = g.node("Relu", "sum.relu", [x])
    x = g.convolution("last", x, 9, 3, 2, 2)
    g.classifier(x, 3, 4)
    return g.finish((1, 4))


def branches() -> onnx.ModelProto:
    """The arena is full at the second convolution, whose output lies apart from its input, which the sum needs too."""
    g = Graph(3, 12)
    x = g.convolution("first", "image", 3, 8, 3, 1, (1, 1, 1, 1))
    y = g.convolution("second", x, 8, 8, 3, 1, (1, 1, 1, 1))
    x = g.node("Add", "sum", [x, y])
    g.classifier(x, 8, 5)
    return g.finish((1, 5))


def quantised(
    model: onnx.ModelProto, folder: Path, *, unsigned: bool = False
) -> onnx.ModelProto:
    """The QDQ graph that ONNX Runtime's quantiser makes, per channel, on seeded patterns."""
    from onnxruntime.quantization import (
        CalibrationDataReader,
        QuantFormat,
        QuantType,
        quantize_static,
    )

    inputs = patterns(model, 8)

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.rest = iter(inputs)

        def get_next(self) -> dict[str, Floats] | None:
            tensor = next(self.rest, None)
            return None if tensor is None else {"image": tensor}

    onnx.save(model, folder / "float.onnx")
    quantize_static(
        folder / "float.onnx",
        folder / "quantised.onnx",
        Reader(),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        weight_type=QuantType.QInt8,
        activation_type=QuantType.QUInt8 if unsigned else QuantType.QInt8,
        extra_options={"WeightSymmetric": True, "ActivationSymmetric": False},
    )
    return onnx.load(folder / "quantised.onnx")


def extremes(model: onnx.ModelProto) -> onnx.ModelProto:
    """A quantised graph in which channel 0 of a convolution has weights of -128, or none and the bias 2^30, in turn."""
    makers = {name: node for node in model.graph.node for name in node.output}
    stored = {each.name: each for each in model.graph.initializer}
    layers = [each for each in model.graph.node if each.op_type in ("Conv", "Gemm")]
    for number, layer in enumerate(layers):
        for tensor, values in zip(
            layer.input[1:], ((-128, 0), (0, 1 << 30)), strict=True
        ):
            constant = stored[makers[tensor].input[0]]
            changed = numpy_helper.to_array(constant).copy()
            if values[number % 2] or number % 2:
                changed[0] = values[number % 2]
            constant.CopyFrom(numpy_helper.from_array(changed, constant.name))
    return model


def graph_of(proto: onnx.ModelProto) -> operators.Graph:
    """The operator graph that backends start from, of a QDQ or a float32 graph."""
    quantised = any(node.op_type == "QuantizeLinear" for node in proto.graph.node)
    wanted = passes.INTEGERS if quantised else passes.FLOATS
    return passes.run(wanted, onnx_form.read(proto))


def tensors(model: onnx.ModelProto) -> tuple[Tensor, Preprocessing]:
    shape = tuple(d.dim_value for d in model.graph.input[0].type.tensor_type.shape.dim)
    preprocessing = Preprocessing(
        resize=shape[2], crop=shape[2:], scale=1 / 127.5, mean=(1,), std=(1,)
    )
    return Tensor(name="image", shape=shape, layout="NCHW"), preprocessing


def patterns(model: onnx.ModelProto, count: int) -> list[Floats]:
    return seeded_inputs(*tensors(model), count)


def project(
    proto: onnx.ModelProto,
    folder: Path,
    cpu: str = "cortex-m7",
    limit: int | None = None,
    regions: Sequence[Region] = (),
) -> Bundle:
    """A C project of a QDQ graph with its manifest, as a build leaves it."""
    import onnxruntime

    folder.mkdir()
    session = onnxruntime.InferenceSession(
        proto.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    inputs = patterns(proto, 2)

    def check(image: Floats) -> Check:
        outputs = session.run(None, {"image": image})
        return Check(
            [image], outputs, [np.full(x.shape, 1e-5, np.float32) for x in outputs]
        )

    def expected(inputs: Sequence[Floats]) -> list[tuple[Floats, Floats]]:
        _, channels, height, width = patterns(proto, 1)[0].shape
        (pattern,) = inputs
        pixels = pattern.reshape(1, height, width, channels).transpose(0, 3, 1, 2)
        _, outputs, nears = check(pixels)
        return [
            (channels_last(x).ravel(), channels_last(near).ravel())
            for x, near in zip(outputs, nears, strict=True)
        ]

    def channels_last(x: Floats) -> Floats:
        return x.transpose(0, 2, 3, 1) if x.ndim == 4 else x

    golden = write_golden(folder, [check(x) for x in inputs])
    tensor, preprocessing = tensors(proto)
    lowering, firmware = build.build(
        graph_of(proto),
        "small",
        "small: a test",
        resolve(cpu),
        folder,
        limit,
        Progress(quiet=True),
        [tensor],
        expected,
        regions=regions,
    )
    outputs = tuple(
        Tensor(
            name=each.name,
            shape=tuple(d.dim_value for d in each.type.tensor_type.shape.dim),
        )
        for each in proto.graph.output
    )
    manifest = Manifest(
        format="c",
        name="small",
        library="small.c",
        model=ModelIdentity(name="small.onnx", sha256="0" * 64),
        target=TargetIdentity.of(resolve(cpu)),
        engine="int8 C kernels",
        threads=1,
        inputs=(tensor,),
        outputs=outputs,
        probabilities=False,
        preprocessing=preprocessing,
        lowering=lowering,
        firmware=firmware,
        golden=tuple(golden),
        files={
            path.relative_to(folder).as_posix(): sha256_of(path)
            for path in folder.rglob("*")
            if path.is_file()
        },
    )
    (folder / MANIFEST).write_text(manifest.to_json())
    return open_bundle(folder)
