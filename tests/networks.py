"""CNNs that are not MobileNetV2, whose answers depend on what they see.

Graphs of ours, and the ``onnx`` package's light models with random instead of constant weights.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from netship.bundle.golden import seeded_inputs
from netship.bundle.manifest import Preprocessing, Tensor
from netship.compile.frontend.family import divisible

Array = NDArray[np.float32]


def mobilenet_v1(
    width: float = 0.25, resolution: int = 64, classes: int = 10
) -> onnx.ModelProto:
    """MobileNetV1 (arXiv 1704.04861, Table 1): depthwise separable, batch normalisation not folded."""
    net = Net(resolution)
    net.convolve(divisible(32 * width), 3, 2)
    plan = [(64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2)]
    for channels, stride in [*plan, *[(512, 1)] * 5, (1024, 2), (1024, 1)]:
        net.convolve(net.channels, 3, stride, groups=net.channels)
        net.convolve(divisible(channels * width), 1)
    return net.finish(classes, softmax=True)


def resnet18_like(resolution: int = 64, classes: int = 10) -> onnx.ModelProto:
    """ResNet-18 (arXiv 1512.03385, Table 1) at a quarter of its width."""
    net = Net(resolution)
    net.convolve(16, 7, 2)
    net.pool(3, 2)
    for channels, stride in ((16, 1), (32, 2), (64, 2), (128, 2)):
        for step in (stride, 1):
            before = net.at, net.channels
            net.convolve(channels, 3, step)
            net.convolve(channels, 3, relu=False)
            after = net.at
            net.at, net.channels = before
            if step != 1:
                net.convolve(channels, 1, step, relu=False)
            net.channels = channels
            net.node("Relu", [net.node("Add", [after, net.at])])
    return net.finish(classes)


def squeezenet_like(resolution: int = 64, classes: int = 10) -> onnx.ModelProto:
    """SqueezeNet 1.1 (arXiv 1602.07360): fire modules that end in Concat; biases, no normalisation."""
    net = Net(resolution)
    net.convolve(64, 3, 2, normalise=False)
    net.pool(3, 2)
    for index, squeezed in enumerate((16, 16, 32, 32, 48, 48, 64, 64)):
        if index in (2, 4):
            net.pool(3, 2)
        net.convolve(squeezed, 1, normalise=False)
        narrow, branches = net.at, []
        for kernel in (1, 3):
            net.at, net.channels = narrow, squeezed
            branches.append(net.convolve(4 * squeezed, kernel, normalise=False))
        net.node("Concat", branches, axis=1)
        net.channels = 8 * squeezed
    net.convolve(classes, 1, normalise=False)
    net.node("Flatten", [net.node("GlobalAveragePool", [net.at])])
    return net.close(classes, softmax=True)


def gated(resolution: int = 32, classes: int = 10) -> onnx.ModelProto:
    """Values below 0 in a padded max-pool, a HardSigmoid that multiplies, and a map made twice as large."""
    net = Net(resolution)
    net.convolve(16, 3, 2, normalise=False, relu=False)
    net.pool(3, 2)
    pooled = net.at
    net.convolve(16, 1, normalise=False, relu=False)
    net.node("Mul", [pooled, net.node("HardSigmoid", [net.at])])
    net._weights.append(
        numpy_helper.from_array(np.array([1, 1, 2, 2], np.float32), "scales")
    )
    net.node("Resize", [net.at, "", "scales"], mode="nearest")
    net.convolve(32, 3, 2, normalise=False)
    return net.finish(classes)


def quantised(proto: onnx.ModelProto, folder: Path) -> onnx.ModelProto:
    """A network as a QDQ graph by ONNX Runtime's quantiser: uint8 activations, int8 weights per channel."""
    from onnxruntime import quantization

    class Reader(quantization.CalibrationDataReader):  # type: ignore[misc]
        left = 4

        def get_next(self) -> dict[str, Array] | None:
            if not self.left:
                return None
            self.left -= 1
            value = proto.graph.input[0]
            shape = [d.dim_value for d in value.type.tensor_type.shape.dim]
            random = np.random.default_rng(self.left)
            return {value.name: random.uniform(-1, 1, shape).astype(np.float32)}

    source, made = folder / "float.onnx", folder / "int8.onnx"
    onnx.save(proto, source)
    quantization.quantize_static(source, made, Reader(), per_channel=True)
    return onnx.load(made)


class Net:
    """A chain of layers; ``at`` is the value it has come to, of ``channels`` channels."""

    opset = 13

    def __init__(self, resolution: int) -> None:
        self.at, self.channels = "image", 3
        self._resolution = resolution
        self._random = np.random.Generator(np.random.PCG64(11))
        self._nodes: list[onnx.NodeProto] = []
        self._weights: list[TensorProto] = []

    def node(self, operator: str, inputs: list[str], **attributes: object) -> str:
        self.at = f"{operator.lower()}{len(self._nodes)}"
        self._nodes.append(
            helper.make_node(operator, inputs, [self.at], self.at, **attributes)  # type: ignore[arg-type]
        )
        return self.at

    def weight(self, operator: str, position: int, *shape: int) -> str:
        name = f"weight{len(self._weights)}"
        value = _random(self._random, operator, position, shape)
        self._weights.append(numpy_helper.from_array(value, name))
        return name

    def convolve(
        self,
        channels: int,
        kernel: int,
        stride: int = 1,
        groups: int = 1,
        normalise: bool = True,
        relu: bool = True,
    ) -> str:
        shape = (channels, self.channels // groups, kernel, kernel)
        inputs = [self.at, self.weight("Conv", 1, *shape)]
        if not normalise:
            inputs.append(self.weight("Conv", 2, channels))
        self.node(
            "Conv",
            inputs,
            strides=[stride, stride],
            pads=[kernel // 2] * 4,
            group=groups,
        )
        if normalise:
            statistics = [
                self.weight("BatchNormalization", i, channels) for i in range(1, 5)
            ]
            self.node("BatchNormalization", [self.at, *statistics])
        self.channels = channels
        return self.node("Relu", [self.at]) if relu else self.at

    def pool(self, kernel: int, stride: int) -> None:
        self.node(
            "MaxPool",
            [self.at],
            kernel_shape=[kernel, kernel],
            strides=[stride, stride],
            pads=[kernel // 2] * 4,
        )

    def finish(self, classes: int, softmax: bool = False) -> onnx.ModelProto:
        flat = self.node("Flatten", [self.node("GlobalAveragePool", [self.at])])
        weight = self.weight("Gemm", 1, classes, self.channels)
        self.node("Gemm", [flat, weight, self.weight("Gemm", 2, classes)], transB=1)
        return self.close(classes, softmax)

    def close(self, classes: int, softmax: bool) -> onnx.ModelProto:
        if softmax:
            self.node("Softmax", [self.at], axis=1)
        shape = [1, 3, self._resolution, self._resolution]
        graph = helper.make_graph(
            self._nodes,
            "network",
            [helper.make_tensor_value_info("image", TensorProto.FLOAT, shape)],
            [helper.make_tensor_value_info(self.at, TensorProto.FLOAT, [1, classes])],
            self._weights,
        )
        opset = [helper.make_opsetid("", self.opset)]
        return _spread(helper.make_model(graph, ir_version=8, opset_imports=opset))


def light_models() -> dict[str, Path]:
    """The ``onnx`` package's light models, by name (``squeezenet``, …)."""
    folder = Path(onnx.__file__).parent / "backend" / "test" / "data" / "light"
    paths = sorted(folder.glob("light_*.onnx"))
    return {path.stem.removeprefix("light_"): path for path in paths}


def with_random_weights(model: Path | onnx.ModelProto) -> onnx.ModelProto:
    """A model with its constant weights replaced by seeded random ones of the same shapes.

    Weights are float initializers, and ConstantOfShape nodes, that a layer takes directly or
    through Unsqueeze; they become initializers (in IR 3 listed as inputs, as it demands).
    """
    proto = (
        onnx.load(model)
        if isinstance(model, Path)
        else onnx.ModelProto.FromString(model.SerializeToString())
    )
    graph = proto.graph
    random = np.random.Generator(np.random.PCG64(12))
    roles = _roles(graph.node)
    initial = {tensor.name: tensor for tensor in graph.initializer}
    shapes = {
        name: tuple(tensor.dims)
        for name, tensor in initial.items()
        if tensor.data_type == TensorProto.FLOAT
    }
    made = [
        n
        for n in graph.node
        if n.op_type == "ConstantOfShape" and n.input[0] in initial
    ]
    for node in made:
        sizes = numpy_helper.to_array(initial[node.input[0]])
        shapes[node.output[0]] = tuple(int(size) for size in sizes)
    for name, shape in shapes.items():
        if name not in roles:
            continue
        value = _random(random, *roles[name], shape)
        tensor = numpy_helper.from_array(value, name)
        if name in initial:
            initial[name].CopyFrom(tensor)
            continue
        graph.initializer.append(tensor)
        graph.input.append(
            helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
        )
    for node in made:
        if node.output[0] in roles:
            graph.node.remove(node)
    return _spread(proto)


def _roles(nodes: Iterable[onnx.NodeProto]) -> dict[str, tuple[str, int]]:
    """What each weight is to the layer that takes it: (operator, position among its inputs)."""
    nodes = list(nodes)
    return {
        _origin(name, nodes): (node.op_type, position)
        for node in nodes
        if node.op_type in _LAYERS
        for position, name in enumerate(node.input)
        if position
    }


def _origin(name: str, nodes: Iterable[onnx.NodeProto]) -> str:
    """The value that ``name`` is, but for its shape."""
    shaped = {n.output[0]: n.input[0] for n in nodes if n.op_type in _SHAPERS}
    while name in shaped:
        name = shaped[name]
    return name


_SHAPERS = ("Reshape", "Unsqueeze")
_LAYERS = ("Conv", "Gemm", "BatchNormalization", "Mul", "Add")


def _random(
    random: np.random.Generator, operator: str, position: int, shape: tuple[int, ...]
) -> Array:
    """A weight for that input of that layer: factors and variances near 1, what is added near 0."""
    if operator in ("Conv", "Gemm") and position == 1:
        return _filters(random, shape)
    factor = (operator, position) in _FACTORS
    return (random.uniform(-0.1, 0.1, shape) + factor).astype(np.float32)


_FACTORS = {("BatchNormalization", 1), ("BatchNormalization", 4), ("Mul", 1)}


def _filters(random: np.random.Generator, shape: tuple[int, ...]) -> Array:
    """Filters that keep the energy of what ReLU leaves: He, arXiv 1502.01852.

    Normalising harder would tell inputs apart better and magnify rounding errors as much.
    """
    fan = shape[-3:] if len(shape) == 4 and shape[0] > 1 else shape[-1:]
    deviation = np.float32(math.sqrt(2 / math.prod(fan)))
    return random.standard_normal(shape, dtype=np.float32) * deviation


def _spread(model: onnx.ModelProto) -> onnx.ModelProto:
    """Settle the last layer's weights so that its outputs have mean 0 and deviation 2 over inputs.

    What all inputs have in common goes into the bias, so what is left differs between them.
    """
    last = [n for n in model.graph.node if n.op_type in ("Conv", "Gemm")][-1]
    probe = onnx.ModelProto.FromString(model.SerializeToString())
    probe.graph.output.append(helper.make_empty_tensor_value_info(last.output[0]))
    session = _session(probe)
    found = [session.run([last.output[0]], feed)[0] for feed in _inputs(model, 4)]
    values = np.concatenate(found)
    values = np.moveaxis(values, 1, -1).reshape(-1, values.shape[1])
    mean = values.mean(axis=0)
    factor = np.float32(2 / (values - mean).std())
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    weight, bias = (weights[_origin(x, model.graph.node)] for x in last.input[1:3])
    scaled = numpy_helper.to_array(weight) * factor
    weight.CopyFrom(numpy_helper.from_array(scaled, weight.name))
    centred = (numpy_helper.to_array(bias) - mean) * factor
    bias.CopyFrom(numpy_helper.from_array(centred, bias.name))
    return model


def distinct(model: onnx.ModelProto) -> float:
    """The largest difference between the outputs for two inputs, relative to the outputs' range."""
    session = _session(model)
    one, other = (session.run(None, feed)[0] for feed in _inputs(model, 2))
    values = np.stack([one, other])
    extent = values.max() - values.min()
    return float(np.abs(one - other).max() / extent) if extent > 0 else 0.0


def _session(model: onnx.ModelProto) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.log_severity_level = 3  # unused initializers of the light models
    return ort.InferenceSession(model.SerializeToString(), options)


def _inputs(model: onnx.ModelProto, count: int) -> list[dict[str, Array]]:
    initial = {tensor.name for tensor in model.graph.initializer}
    (value,) = (value for value in model.graph.input if value.name not in initial)
    shape = tuple(d.dim_value for d in value.type.tensor_type.shape.dim)
    tensor = Tensor(name=value.name, shape=shape, layout="NCHW")
    settings = Preprocessing(
        resize=shape[2], crop=shape[2:], scale=1 / 127.5, mean=(1,), std=(1,)
    )
    return [{value.name: x} for x in seeded_inputs(tensor, settings, count)]
