"""A QDQ graph as int8 for MNN, ncnn and OpenVINO, in the form of each one's own quantiser.

On aarch64 none of them runs every QDQ graph in int8 as it is. ncnn and OpenVINO get symmetric activations, so
that a ReLU's output has seven bits there.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto

from netship.bench.baselines.int8_graph import (
    HIGHEST,
    LOWEST,
    high,
    int8_activations,
    is_relu,
    magnitude,
    refusal,
    stored,
)
from netship.compile.frontend.quantised.operators import quantises
from netship.compile.ir import onnx_form
from netship.compile.ir.graph import Graph, Operator, Quantisation, Tensor
from netship.compile.ir.kinds import make
from netship.compile.ir.operators import Convolution, Quantise
from netship.compile.passes.integers import absorb_constants
from netship.compile.passes.simplify import dense_as_convolution
from netship.targets.errors import UserError

if TYPE_CHECKING:
    import onnx

Array = NDArray[np.float32]

# Operators whose values can lie outside the range of a QuantizeLinear after them.
_UNBOUNDED = frozenset(["Conv", "Gemm", "Add", "BatchNormalization"])


def read(proto: onnx.ModelProto) -> Graph:
    """The network of a QDQ graph with int8 activations; a ReLU that only a range implies is missing: see `with_relu`.

    Raises:
        UserError: an activation that is neither int8 nor uint8 with one scale, or weights with a zero point.
    """
    dtypes = {each.name: each.data_type for each in proto.graph.initializer}
    for node in filter(quantises, proto.graph.node):
        if dtypes.get(node.input[-1]) in (TensorProto.INT16, TensorProto.UINT16):
            raise refusal(node.output[0])
    graph = absorb_constants(onnx_form.read_as_written(proto))
    return int8_activations(graph, float_ports=False)


def with_relu(graph: Graph, without: Collection[str] = ()) -> onnx.ModelProto:
    """The float32 network with the ReLUs that only ranges imply, as Clip to the range.

    Args:
        without: names of outputs that get none, such as those of int8 layers, which cannot be negative anyway.
    """
    made: list[Operator] = []
    for operator in graph.operators:
        output = operator.outputs[0]
        implied = operator.kind in _UNBOUNDED and is_relu(output)
        if implied and output.name not in without:
            unbounded = Tensor(f"{output.name}/unbounded", output.shape)
            operator = replace(operator, outputs=(unbounded,))
            made += [operator, _clip(unbounded, output, high(output))]
        else:
            made.append(operator)
    graph = graph.with_operators(made)
    quantised = (each for each in graph.tensors.values() if each.quantisation)
    floats = {each.name: each.as_float() for each in quantised}
    return onnx_form.write(graph.with_tensors(floats))


def _clip(source: Tensor, output: Tensor, highest: float) -> Operator:
    bounds = [
        Tensor(f"{output.name}/{end}", (), value=np.array(value, np.float32))
        for end, value in (("low", 0), ("high", highest))
    ]
    return make("Clip", "", [source, *bounds], [output])


class Layer(NamedTuple):
    """A convolution or fully connected layer with int8 input and weights.

    Attributes:
        weights: their name.
        kernel: float32, output channels first.
        scales: of the kernel, float32, one for each output channel; its zero point is 0.
    """

    input: Tensor
    output: Tensor
    weights: str
    kernel: Array
    scales: Array


def layers(graph: Graph) -> list[Layer]:
    found = []
    for each in dense_as_convolution(graph).operators:
        weights = each.inputs[1] if isinstance(each, Convolution) else None
        if weights and weights.quantisation and each.input.quantisation:
            scale = np.array(weights.quantisation.scale, np.float32)
            scales = np.broadcast_to(scale, weights.shape[:1])
            kernel = weights.real.astype(np.float32)
            found.append(Layer(each.input, each.output, weights.name, kernel, scales))
    return found


def for_mnn(graph: Graph) -> tuple[onnx.ModelProto, str]:
    """The float network, and its layers' ranges and scales as JSON for ``mnnconvert --compressionParamsFile``.

    Fully connected layers become convolutions: MNN 3.6 cannot load its own int8 Gemm.
    The format: tools/converter/source/compression/MNN_compression.proto in MNN's sources.
    """
    graph = dense_as_convolution(graph)
    found = [each for each in layers(graph) if each.output.quantisation]
    described = [
        {
            "input": [_mnn_activation(each.input)],
            "output": [_mnn_activation(each.output)],
            "weight": [_mnn_scales(each.weights, each.scales.tolist(), -HIGHEST)],
        }
        for each in found
    ]
    algorithm = {"type": "QUANTIZE", "quant_params": {"layer": described}}
    text = json.dumps({"version": "0.0.0", "algo": [algorithm]})
    return with_relu(graph, [each.output.name for each in found]), text


def _mnn_activation(tensor: Tensor) -> dict[str, Any]:
    found = _mnn_scales(tensor.name, [tensor.scale], LOWEST)
    return found | {"zero_point": tensor.zero}


def _mnn_scales(name: str, scales: list[float], lowest: int) -> dict[str, Any]:
    return {"name": name, "scales": scales, "clamp_min": lowest, "clamp_max": HIGHEST}


class _Line(NamedTuple):
    """A layer of ncnn's .param file, and its part of the .bin file: a flag, the kernel, the bias."""

    text: str
    kind: str
    inputs: list[str]
    outputs: list[str]
    data: bytes
    kernel: bytes


# The keys of the kernel's size and of the bias: load_param of src/layer/convolution.cpp, innerproduct.cpp in ncnn.
_NCNN_KEYS = {
    "Convolution": ("6", "5"),
    "ConvolutionDepthWise": ("6", "5"),
    "InnerProduct": ("2", "1"),
}
_NCNN_FLOAT32 = b"\0\0\0\0"


def for_ncnn(graph: Graph, param: str, binary: bytes) -> tuple[str, bytes]:
    """ncnn's conversion of ``with_relu(graph)`` with int8 scales, as its ncnn2int8 writes them.

    That tool is not in the wheel. Kernels stay float32 in the file: ncnn quantises them when it loads them.
    """
    int8 = {each.kernel.tobytes(): each for each in layers(graph)}
    lines = list(_ncnn_lines(param, binary))
    texts, parts = param.splitlines()[:2], list[bytes]()
    for line in lines:
        texts.append(line.text)
        parts.append(line.data)
        if line.kernel not in int8:
            continue
        layer = int8[line.kernel]
        term = 1 if line.kind == "ConvolutionDepthWise" else 2
        parts += [(1 / layer.scales).tobytes(), _ncnn_scale(layer)]
        users = list(_ncnn_users(lines, line.outputs[0]))
        if users and all(
            each.kind.startswith("Convolution") and each.kernel in int8
            for each in (line, *users)
        ):
            # All its readers take int8, so its output is int8 too.
            term += 100
            parts.append(_ncnn_scale(int8[users[0].kernel]))
        texts[-1] += f" 8={term}"
    return "\n".join([*texts, ""]), b"".join(parts)


def _ncnn_scale(layer: Layer) -> bytes:
    return np.float32(HIGHEST / magnitude(layer.input)).tobytes()


def _ncnn_lines(param: str, binary: bytes) -> Iterator[_Line]:
    at = 0
    for text in param.splitlines()[2:]:
        kind, _, inputs, outputs, *rest = text.split()
        first, last = int(inputs), int(inputs) + int(outputs)
        values = dict(word.split("=") for word in rest[last:])
        size, kernel = 0, b""
        if kind in _NCNN_KEYS:
            weights, bias = _NCNN_KEYS[kind]
            end = at + 4 + 4 * int(values[weights])
            kernel = binary[at + 4 : end]
            size = end - at + 4 * int(values["0"]) * int(values.get(bias, "0"))
            if not binary.startswith(_NCNN_FLOAT32, at):
                raise UserError("its conversion's weights are not float32")
        yield _Line(
            text, kind, rest[:first], rest[first:last], binary[at : at + size], kernel
        )
        at += size
    if at != len(binary):
        raise UserError("no int8: its conversion has a layer whose weights are unknown")


def _ncnn_users(lines: list[_Line], blob: str) -> Iterator[_Line]:
    """The layers that read a blob, also through Split."""
    for line in lines:
        if blob in line.inputs and line.kind == "Split":
            for output in line.outputs:
                yield from _ncnn_users(lines, output)
        elif blob in line.inputs:
            yield line


def for_openvino(proto: onnx.ModelProto) -> onnx.ModelProto:
    """The graph with symmetric activations, except for those of a ReLU directly after a convolution.

    OpenVINO's ARM plugin has int8 convolutions of one group whose input and output are of one type. It computes
    other quantised operators in float16, or refuses them on a core without it. Its depthwise convolutions are float.
    """
    graph = onnx_form.read_as_written(proto)
    made: list[Operator] = []
    typed: dict[str, Tensor] = {}
    for operator in graph.operators:
        if isinstance(operator, Quantise):
            source, output = operator.input, stored(operator)
            maker = graph.makers.get(source.name)
            in_layer = isinstance(maker, Convolution) and maker.group == 1
            if not (is_relu(output) and in_layer):
                if is_relu(output):
                    bounded = replace(source, name=f"{output.name}/bounded")
                    made.append(_clip(source, bounded, high(output)))
                    operator = replace(operator, inputs=(bounded,))
                symmetric = Quantisation((magnitude(output) / HIGHEST,))
                output = replace(output, quantisation=symmetric)
            typed[output.name] = output
        made.append(operator.with_tensors(typed))
    return onnx_form.write(graph.with_operators(made))
