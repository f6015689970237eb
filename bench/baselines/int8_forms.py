"""A QDQ graph as int8 for MNN, ncnn and OpenVINO, in the form of each one's own quantiser.

On aarch64 none of them runs every QDQ graph in int8 as it is. ncnn and OpenVINO get symmetric activations, so
that a ReLU's output has seven bits there.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from bench.baselines import qdq
from bench.baselines.qdq import HIGHEST, LOWEST, Layer, Network, Range
from targets.errors import UserError

if TYPE_CHECKING:
    import onnx


def for_mnn(network: Network) -> tuple[onnx.ModelProto, str]:
    """The float network, and its layers' ranges and scales as JSON for ``mnnconvert --compressionParamsFile``.

    The format: tools/converter/source/compression/MNN_compression.proto in MNN's sources.
    """
    proto, dense = _dense_as_convolution(qdq.with_relu(network, layers_too=False))
    layers = []
    for node in proto.graph.node:
        name = node.output[0]
        layer = network.layers.get(dense.get(name, name))
        if node.op_type == "Conv" and layer is not None and layer.output is not None:
            kernel = {"name": node.input[1], "scales": layer.scales.tolist()}
            limits = {"clamp_min": -HIGHEST, "clamp_max": HIGHEST}
            layers.append(
                {
                    "input": [_mnn_activation(node.input[0], layer.input)],
                    "output": [_mnn_activation(name, layer.output)],
                    "weight": [kernel | limits],
                }
            )
    algorithm = {"type": "QUANTIZE", "quant_params": {"layer": layers}}
    return proto, json.dumps({"version": "0.0.0", "algo": [algorithm]})


def _mnn_activation(name: str, found: Range) -> dict[str, Any]:
    limits = {"clamp_min": LOWEST, "clamp_max": HIGHEST}
    return {"name": name, "scales": [found.scale], "zero_point": found.zero} | limits


def _dense_as_convolution(
    proto: onnx.ModelProto,
) -> tuple[onnx.ModelProto, dict[str, str]]:
    """Gemm as 1×1 convolutions: MNN 3.6 cannot load its own int8 Gemm; → the Gemm's output, by the convolution's."""
    import onnx
    from onnx import helper, numpy_helper

    made = onnx.ModelProto()
    made.CopyFrom(proto)
    graph = made.graph
    constants = {each.name: each for each in proto.graph.initializer}
    dense: dict[str, str] = {}
    del graph.node[:]
    for node in proto.graph.node:
        if node.op_type != "Gemm":
            graph.node.add().CopyFrom(node)
            continue
        kernel = qdq.dense_kernel(node, numpy_helper.to_array(constants[node.input[1]]))
        name, inputs = node.output[0], kernel.shape[1]
        x, shape, weights, y = (
            f"{name}/{part}" for part in ("image", "shape", "kernel", "convolved")
        )
        dense[y] = name
        new = {
            shape: np.array([1, inputs, 1, 1], np.int64),
            weights: kernel.reshape(-1, inputs, 1, 1),
        }
        graph.initializer.extend(numpy_helper.from_array(v, k) for k, v in new.items())
        graph.node.extend(
            [
                helper.make_node("Reshape", [node.input[0], shape], [x]),
                helper.make_node("Conv", [x, weights, *node.input[2:]], [y]),
                helper.make_node("Flatten", [y], [name]),
            ]
        )
    return made, dense


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


def for_ncnn(network: Network, param: str, binary: bytes) -> tuple[str, bytes]:
    """ncnn's conversion of ``qdq.with_relu(network)`` with int8 scales, as its ncnn2int8 writes them.

    That tool is not in the wheel. Kernels stay float32 in the file: ncnn quantises them when it loads them.

    Raises:
        UserError: the conversion is not of the expected form.
    """
    layers = {layer.kernel.tobytes(): layer for layer in network.layers.values()}
    lines = list(_ncnn_lines(param, binary))
    found = {i: layers[x.kernel] for i, x in enumerate(lines) if x.kernel in layers}
    texts, parts = param.splitlines()[:2], list[bytes]()
    for index, line in enumerate(lines):
        texts.append(line.text)
        parts.append(line.data)
        if index not in found:
            continue
        term = 1 if line.kind == "ConvolutionDepthWise" else 2
        scales = np.float32(1) / found[index].scales
        parts += [scales.astype(np.float32).tobytes(), _ncnn_scale(found[index])]
        users = list(_ncnn_users(lines, line.outputs[0]))
        int8 = [i for i in users if i in found and _is_ncnn_convolution(lines[i])]
        if _is_ncnn_convolution(line) and users and int8 == users:
            # All its readers take int8, so its output is int8 too.
            term += 100
            parts.append(_ncnn_scale(found[users[0]]))
        texts[-1] += f" 8={term}"
    return "\n".join([*texts, ""]), b"".join(parts)


def _is_ncnn_convolution(line: _Line) -> bool:
    return line.kind in ("Convolution", "ConvolutionDepthWise")


def _ncnn_scale(layer: Layer) -> bytes:
    return np.float32(HIGHEST / layer.input.magnitude).tobytes()


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


def _ncnn_users(lines: list[_Line], blob: str) -> Iterator[int]:
    """The layers that read a blob, also through Split."""
    for index, line in enumerate(lines):
        if blob not in line.inputs:
            continue
        if line.kind == "Split":
            for output in line.outputs:
                yield from _ncnn_users(lines, output)
        else:
            yield index


def for_openvino(proto: onnx.ModelProto) -> onnx.ModelProto:
    """The graph with symmetric activations, except for those of a ReLU directly after a convolution.

    OpenVINO's ARM plugin has int8 convolutions of one group whose input and output are of one type. It computes
    other quantised operators in float16, or refuses them on a core without it. Its depthwise convolutions are float.
    """
    import onnx
    from onnx import helper, numpy_helper

    arrays = {i.name: numpy_helper.to_array(i) for i in proto.graph.initializer}
    made = onnx.ModelProto()
    made.CopyFrom(proto)
    graph = made.graph
    del graph.node[:], graph.value_info[:]
    makers = {output: node for node in proto.graph.node for output in node.output}
    for node in proto.graph.node:
        quantiser = node
        if node.op_type == "DequantizeLinear":
            quantiser = makers.get(node.input[0], node)
        if quantiser.op_type != "QuantizeLinear":
            graph.node.add().CopyFrom(node)
            continue
        found = qdq.activation_range(quantiser, arrays)
        maker = makers.get(quantiser.input[0])
        bounded = found.is_relu and maker is not None and _is_convolution(maker)
        used = found if bounded else Range(found.magnitude / HIGHEST, 0)
        name = node.output[0]
        source, scale, zero = node.input[0], f"{name}/scale", f"{name}/zero"
        new = {scale: np.float32(used.scale), zero: np.int8(used.zero)}
        if node is quantiser and found.is_relu and not bounded:
            new |= {
                f"{name}/low": np.float32(0),
                f"{name}/high": np.float32(found.high),
            }
            limits = [source, f"{name}/low", f"{name}/high"]
            source = f"{name}/bounded"
            graph.node.append(helper.make_node("Clip", limits, [source]))
        graph.node.append(
            helper.make_node(node.op_type, [source, scale, zero], [name], node.name)
        )
        graph.initializer.extend(
            numpy_helper.from_array(np.asarray(v), k) for k, v in new.items()
        )
    qdq.drop_unused(graph)
    return made


def _is_convolution(node: onnx.NodeProto) -> bool:
    grouped = any(a.name == "group" and a.i > 1 for a in node.attribute)
    return node.op_type == "Conv" and not grouped
