"""A QDQ graph for runtimes with an int8 of their own: the same network, in each one's form."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import integers
import numpy as np
import onnx
import onnxruntime as ort
import pytest
from integer_operators import per_tensor, quantised_tensor
from networks import quantised
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from netship.bench.baselines import int8_forms, int8_graph
from netship.bench.baselines.int8_forms import layers
from netship.compile.ir import onnx_form
from netship.compile.ir.graph import Graph, Tensor, check
from netship.compile.ir.kinds import make
from netship.compile.passes.integers import absorb_constants
from netship.compile.passes.simplify import dense_as_convolution, fold_normalisation
from netship.targets.errors import UserError

Array = NDArray[np.float32]


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> onnx.ModelProto:
    """An inverted residual with ReLU6, a ReLU behind its sum, a dense layer; quantised by ONNX Runtime."""
    random = np.random.default_rng(5)
    constants: dict[str, Array] = {
        "low": np.array(0, np.float32),
        "high": np.array(6, np.float32),
    }
    nodes = []

    def node(operator: str, name: str, *inputs: str, **attributes: Any) -> str:
        nodes.append(helper.make_node(operator, inputs, [name], name, **attributes))
        return name

    def layer(name: str, x: str, shape: tuple[int, ...], **attributes: Any) -> str:
        fan = float(np.prod(shape[1:]))
        weights = random.normal(0, np.sqrt(2 / fan), shape)
        constants[f"{name}.w"] = weights.astype(np.float32)
        constants[f"{name}.b"] = random.normal(0, 0.1, shape[0]).astype(np.float32)
        operator = "Conv" if len(shape) == 4 else "Gemm"
        return node(operator, name, x, f"{name}.w", f"{name}.b", **attributes)

    def relu6(x: str) -> str:
        return node("Clip", f"{x}.relu6", x, "low", "high")

    stem = layer("stem", "image", (8, 3, 3, 3), pads=[1, 1, 1, 1])
    x = relu6(layer("expand", stem, (16, 8, 1, 1)))
    x = relu6(layer("dw", x, (16, 1, 3, 3), pads=[1, 1, 1, 1], group=16))
    x = node("Add", "sum", stem, layer("project", x, (8, 16, 1, 1)))
    x = relu6(layer("head", node("Relu", "sum.relu", x), (12, 8, 1, 1)))
    x = node("Flatten", "flat", node("GlobalAveragePool", "pooled", x))
    layer("scores", x, (10, 12), transB=1)
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes,
        "block",
        [value("image", TensorProto.FLOAT, [1, 3, 16, 16])],
        [value("scores", TensorProto.FLOAT, [1, 10])],
        [numpy_helper.from_array(v, k) for k, v in constants.items()],
    )
    opset = [helper.make_opsetid("", 13)]
    proto = helper.make_model(graph, ir_version=8, opset_imports=opset)
    return quantised(proto, tmp_path_factory.mktemp("qdq"))


@pytest.fixture(scope="module")
def network(graph: onnx.ModelProto) -> Graph:
    return int8_forms.read(graph)


def answer(proto: onnx.ModelProto) -> Array:
    """ONNX Runtime's, of the graph as it stands: its optimisations take scales of biases for granted."""
    onnx.checker.check_model(proto)
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(proto.SerializeToString(), options)
    image = np.random.default_rng(1).uniform(-1, 1, (1, 3, 16, 16)).astype(np.float32)
    found: Array = session.run(None, {"image": image})[0]
    return found


def distance(one: Array, other: Array) -> float:
    """The largest difference, of the other's range."""
    return float(np.abs(one - other).max() / np.ptp(other))


def test_the_float_network_is_the_graphs_without_its_rounding(
    graph: onnx.ModelProto, network: Graph
) -> None:
    proto = int8_forms.with_relu(network)
    assert not int8_graph.is_quantised(proto) and int8_graph.is_quantised(graph)
    assert distance(answer(proto), answer(graph)) < 0.05
    # The quantiser leaves ReLUs out.
    bare = int8_forms.with_relu(network, without=network.tensors)
    assert distance(answer(bare), answer(graph)) > 0.2
    assert {layer.weights for layer in layers(network)} == {
        node.input[1] for node in bare.graph.node if node.op_type in ("Conv", "Gemm")
    }
    for layer in layers(network):
        shape = (-1, *[1] * (layer.kernel.ndim - 1))
        integers = layer.kernel / layer.scales.reshape(shape)
        np.testing.assert_allclose(integers, np.rint(integers), atol=1e-3)
        assert 100 < np.abs(integers).max() <= 127.001


def test_mnn_gets_every_layer_by_the_name_of_its_output(
    graph: onnx.ModelProto, network: Graph
) -> None:
    proto, text = int8_forms.for_mnn(network)
    [algorithm] = json.loads(text)["algo"]
    layers = {
        layer["output"][0]["name"]: layer
        for layer in algorithm["quant_params"]["layer"]
    }
    nodes = {node.output[0]: node for node in proto.graph.node}
    # Nothing is dense: the last layer is a 1×1 convolution.
    assert {name for name, node in nodes.items() if node.op_type == "Conv"} == {*layers}
    assert not {"Gemm"} & {node.op_type for node in nodes.values()}
    kernels = {each.name: each for each in proto.graph.initializer}
    for name, layer in layers.items():
        [inputs], [outputs], [weights] = (
            layer[key] for key in ("input", "output", "weight")
        )
        assert inputs["name"] == nodes[name].input[0]
        assert -128 <= inputs["zero_point"] <= 127 and outputs["scales"][0] > 0
        assert len(weights["scales"]) == kernels[nodes[name].input[1]].dims[0]
    kinds = [node.op_type for node in nodes.values()]
    assert kinds[-3:] == ["Reshape", "Conv", "Flatten"]
    # A layer's ReLU is its range; the sum's is a Clip.
    assert kinds.count("Clip") == 1
    whole = int8_forms.with_relu(dense_as_convolution(network))
    assert distance(answer(whole), answer(graph)) < 0.05


def test_openvino_gets_inputs_and_outputs_of_one_type(graph: onnx.ModelProto) -> None:
    proto = int8_forms.for_openvino(graph)
    assert distance(answer(proto), answer(graph)) < 0.1
    arrays = {i.name: numpy_helper.to_array(i) for i in proto.graph.initializer}
    makers = {output: node for node in proto.graph.node for output in node.output}
    behind = set()
    for node in proto.graph.node:
        if node.op_type == "QuantizeLinear":
            zero = arrays[node.input[2]]
            assert zero.dtype == np.int8
            if zero != 0:
                behind.add(makers[node.input[0]].name)
    # ReLUs right behind convolutions of one group; the depthwise one's is a Clip.
    assert behind == {"expand", "head"}


NCNN = """7767517
7 8
Input image 0 1 image
Convolution stem 1 1 image a 0=8 1=3 4=1 5=1 6=216
Split split 1 2 a b c
Convolution expand 1 1 b d 0=16 1=1 5=1 6=128 9=3
ConvolutionDepthWise dw 1 1 d e 0=16 1=3 4=1 5=1 6=144 7=16 9=3
Convolution project 1 1 e f 0=8 1=1 5=1 6=128
BinaryOp sum 2 1 c f g 0=0
"""


def test_ncnn_gets_scales_and_keeps_int8_between_convolutions(network: Graph) -> None:
    names = ("stem", "expand", "dw", "project")
    of_output = {each.output.name: each for each in layers(network)}
    found = {
        name: next(v for k, v in of_output.items() if k.startswith(name))
        for name in names
    }
    bias = np.arange(16, dtype=np.float32)
    parts = [
        b"\0\0\0\0" + each.kernel.tobytes() + bias[: len(each.kernel)].tobytes()
        for each in found.values()
    ]
    param, binary = int8_forms.for_ncnn(network, NCNN, b"".join(parts))
    terms = {
        line.split()[1]: line.split()[-1]
        for line in param.splitlines()[2:]
        if " 8=" in line
    }
    # Only what goes to convolutions alone is int8 behind a layer: see ncnn2int8's fuse_requantize.
    assert terms == {"stem": "8=2", "expand": "8=102", "dw": "8=101", "project": "8=2"}
    at = 0
    for name, part in zip(names, parts, strict=True):
        assert binary.startswith(part, at)
        channels = len(found[name].kernel)
        count = channels + (2 if name in ("expand", "dw") else 1)
        scales = np.frombuffer(binary, np.float32, count, at + len(part))
        at += len(part) + scales.nbytes
        np.testing.assert_allclose(scales[:channels] * found[name].scales, 1, 1e-6)
        np.testing.assert_allclose(
            scales[channels] * int8_graph.magnitude(found[name].input), 127, 1e-6
        )
    assert at == len(binary)


def test_ncnns_files_in_another_form_are_refused(network: Graph) -> None:
    with pytest.raises(UserError, match="weights are unknown"):
        int8_forms.for_ncnn(network, "7767517\n1 1\nInput image 0 1 image\n", b"1234")
    half = b"\x47\x6b\x30\x01" + bytes(4 * 216)
    stem = "\n".join([*NCNN.splitlines()[:2], NCNN.splitlines()[3]])
    with pytest.raises(UserError, match="not float32"):
        int8_forms.for_ncnn(network, stem, half)


def test_quantisation_of_another_kind_is_refused(graph: onnx.ModelProto) -> None:
    other = onnx.ModelProto()
    other.CopyFrom(graph)
    [zero] = [i for i in other.graph.initializer if i.name == "image_zero_point"]
    zero.CopyFrom(numpy_helper.from_array(np.array(3, np.uint16), zero.name))
    # The first opset with uint16.
    other.opset_import[0].version = 21
    with pytest.raises(UserError, match="otherwise than in int8 or uint8"):
        int8_forms.read(other)


@pytest.mark.parametrize(
    ("zero", "high", "magnitude", "relu"),
    [(-128, 2.55, 2.55, True), (0, 1.27, 1.28, False), (100, 0.27, 2.28, False)],
)
def test_a_range_is_what_its_integers_stand_for(
    zero: int, high: float, magnitude: float, relu: bool
) -> None:
    found = quantised_tensor("x", (1,), per_tensor(0.01, zero))
    assert int8_graph.high(found) == pytest.approx(high)
    assert int8_graph.magnitude(found) == pytest.approx(magnitude)
    assert int8_graph.is_relu(found) is relu


def test_uint8_is_int8_shifted() -> None:
    scale = Tensor("scale", (), value=np.array(0.5, np.float32))
    zero = Tensor("zero", (), "uint8", value=np.array(3, np.uint8))
    inputs = [Tensor("x", (1,)), scale, zero]
    node = make("QuantizeLinear", "", inputs, [Tensor("y", (1,), "uint8")])
    stored = int8_graph.stored(node)
    assert stored.dtype == "int8" and stored.quantisation == per_tensor(0.5, -125)


def test_what_moves_values_stays_int8(tmp_path: Path) -> None:
    g = integers.Graph(3, 12)
    x = g.convolution("stem", "image", 3, 8, clip=False)
    x = g.node("MaxPool", "largest", [x], kernel_shape=[2, 2], strides=[2, 2])
    x = g.node("Concat", "both", [x, x], axis=1)
    g.classifier(x, 16, 4)
    proto = integers.quantised(g.finish((1, 4)), tmp_path, unsigned=True)
    graph = absorb_constants(onnx_form.read_as_written(proto))
    inside = int8_graph.int8_activations(graph)
    check(inside)
    kinds = ["Conv", "MaxPool", "Concat", "GlobalAveragePool", "Flatten", "Gemm"]
    assert [each.kind for each in inside.operators] == [
        *("QuantizeLinear", *kinds, "DequantizeLinear")
    ]
    assert {each.output.dtype for each in inside.operators[:-1]} == {"int8"}
    ports = (*inside.inputs, *inside.outputs)
    assert [(each.name, each.dtype) for each in ports] == [
        *(("image", "float32"), ("scores", "float32"))
    ]
    throughout = int8_graph.int8_activations(graph, float_ports=False)
    check(throughout)
    assert [each.kind for each in throughout.operators] == kinds


def test_a_normalisation_behind_computed_weights_stays() -> None:
    x, weights = Tensor("x", (1, 3, 4, 4)), Tensor("weights", (8, 3, 1, 1))
    y, z = (Tensor(name, (1, 8, 4, 4)) for name in "yz")
    ones = [Tensor(f"{i}", (8,), value=np.ones(8, np.float32)) for i in range(4)]
    operators = (
        make("Conv", "", [x, weights], [y]),
        make("BatchNormalization", "", [y, *ones], [z]),
    )
    graph = Graph((x, weights), (z,), operators)
    assert fold_normalisation(graph).operators == operators
