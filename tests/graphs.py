"""The same small CNN as PyTorch's two exporters and tf2onnx write it, made by hand.

Stem, two blocks (one depthwise separable with a residual, one with squeeze-and-excitation),
classifier, softmax. Weights are seeded; batch normalisation is not folded.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

IMAGE = (3, 20, 16)  # channels, height, width


class _Builder:
    """Nodes and initializers in order, with seeded weights of a sensible spread."""

    def __init__(self, opset: int, classes: int) -> None:
        self.opset, self.classes = opset, classes
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[TensorProto] = []
        self.random = np.random.Generator(np.random.PCG64(7))

    def node(
        self, op: str, inputs: list[str], output: str, name: str = "", **attributes: Any
    ) -> str:
        self.nodes.append(
            helper.make_node(
                op, inputs, [output], name=name or f"/{output}", **attributes
            )
        )
        return output

    def constant(self, name: str, value: Any, dtype: Any = np.float32) -> str:
        self.weights.append(numpy_helper.from_array(np.asarray(value, dtype), name))
        return name

    def kernel(self, name: str, *shape: int) -> str:
        spread = (2 / np.prod(shape[1:])) ** 0.5
        return self.constant(name, self.random.normal(0, spread, shape))

    def vector(self, name: str, size: int, low: float, high: float) -> str:
        return self.constant(name, self.random.uniform(low, high, size))

    def normalised(self, x: str, channels: int, module: str, name: str = "") -> str:
        inputs = [
            x,
            self.vector(f"{module}.weight", channels, 0.5, 1.5),
            self.vector(f"{module}.bias", channels, -0.2, 0.2),
            self.vector(f"{module}.running_mean", channels, -0.2, 0.2),
            self.vector(f"{module}.running_var", channels, 0.5, 1.5),
        ]
        mode = {"training_mode": 0} if self.opset >= 14 else {}
        return self.node(
            "BatchNormalization",
            inputs,
            f"{module}_output",
            name,
            epsilon=1e-5,
            momentum=0.9,
            **mode,
        )

    def model(
        self,
        source: tuple[str, list[Any]],
        output: tuple[str, list[Any]],
        producer: str,
        functions: list[onnx.FunctionProto] | None = None,
        ir_version: int = 8,
    ) -> onnx.ModelProto:
        graph = helper.make_graph(
            self.nodes,
            "main_graph",
            [helper.make_tensor_value_info(source[0], TensorProto.FLOAT, source[1])],
            [helper.make_tensor_value_info(output[0], TensorProto.FLOAT, output[1])],
            self.weights,
        )
        opsets = [helper.make_opsetid("", self.opset)]
        opsets += [
            helper.make_opsetid(domain, 1)
            for domain in {f.domain for f in functions or []}
        ]
        return helper.make_model(
            graph,
            opset_imports=opsets,
            functions=functions or [],
            producer_name=producer,
            ir_version=ir_version,
        )


def torchscript_cnn(opset: int, classes: int = 2) -> onnx.ModelProto:
    """As ``torch.onnx.export(…, dynamo=False, dynamic_axes={"input": {0: "batch"}})``: bounds as
    Constant nodes, ``x.view(x.size(0), -1)`` as a Shape chain, axes as attributes before opset 13."""
    b = _Builder(opset, classes)

    def convolution(
        x: str, module: str, shape: tuple[int, ...], stride: int = 1, group: int = 1
    ) -> str:
        pad = shape[-1] // 2
        return b.node(
            "Conv",
            [x, b.kernel(f"{module}.weight", *shape)],
            f"{module}_output",
            dilations=[1, 1],
            group=group,
            kernel_shape=list(shape[2:]),
            pads=[pad] * 4,
            strides=[stride] * 2,
        )

    def number(name: str, value: Any, dtype: Any = np.float32) -> str:
        tensor = numpy_helper.from_array(np.asarray(value, dtype))
        return b.node("Constant", [], name, value=tensor)

    def relu6(x: str) -> str:
        return b.node(
            "Clip", [x, number(f"{x}_min", 0), number(f"{x}_max", 6)], f"{x}_clip"
        )

    x = relu6(b.normalised(convolution("input", "stem", (8, 3, 3, 3), 2), 8, "stem_bn"))
    skip = x
    x = relu6(
        b.normalised(
            convolution(x, "depthwise", (8, 1, 3, 3), group=8), 8, "depthwise_bn"
        )
    )
    x = b.normalised(convolution(x, "project", (8, 8, 1, 1)), 8, "project_bn")
    x = b.node("Add", [skip, x], "residual")
    x = b.node(
        "MaxPool",
        [x],
        "pool",
        kernel_shape=[3, 3],
        strides=[2, 2],
        pads=[0] * 4,
        ceil_mode=1,
    )
    gate = b.node("GlobalAveragePool", [x], "squeeze")
    gate = b.node("Relu", [convolution(gate, "fc1", (4, 8, 1, 1))], "fc1_relu")
    gate = b.node(
        "HardSigmoid",
        [convolution(gate, "fc2", (8, 4, 1, 1))],
        "fc2_sigmoid",
        alpha=1 / 6,
    )
    x = b.node("Mul", [gate, x], "scaled")
    if opset >= 18:
        x = b.node(
            "ReduceMean", [x, number("axes", [2, 3], np.int64)], "mean", keepdims=0
        )
    else:
        x = b.node("ReduceMean", [x], "mean", axes=[2, 3], keepdims=0)
    batch = b.node(
        "Gather",
        [b.node("Shape", [x], "shape"), number("zero", 0, np.int64)],
        "size",
        axis=0,
    )
    if opset >= 13:
        batch = b.node("Unsqueeze", [batch, number("first", [0], np.int64)], "size1")
    else:
        batch = b.node("Unsqueeze", [batch], "size1", axes=[0])
    flat = b.node("Concat", [batch, number("rest", [-1], np.int64)], "sizes", axis=0)
    x = b.node("Reshape", [x, flat], "view")
    dense = [
        x,
        b.kernel("fc.weight", classes, 8),
        b.vector("fc.bias", classes, -0.1, 0.1),
    ]
    x = b.node("Gemm", dense, "logits", alpha=1.0, beta=1.0, transB=1)
    b.node("Softmax", [x], "output", axis=1)
    return b.model(
        ("input", ["batch", *IMAGE]), ("output", ["batch", classes]), "pytorch"
    )


def dynamo_cnn(
    opset: int, classes: int = 2, functions: bool = False
) -> onnx.ModelProto:
    """As ``torch.onnx.export(…, dynamo=True)``: reduction axes as inputs, batch ``s0``, IR 10.

    Args:
        functions: torch 2.1 to 2.4 wrapped each ATen operator in a function of the model's own.
    """
    b = _Builder(opset, classes)

    def convolution(
        x: str, module: str, shape: tuple[int, ...], stride: int = 1, group: int = 1
    ) -> str:
        pad = shape[-1] // 2
        inputs = [
            x,
            b.kernel(f"{module}.weight", *shape),
            b.vector(f"{module}.bias", shape[0], -0.1, 0.1),
        ]
        return b.node(
            "Conv",
            inputs,
            f"conv2d_{module}",
            f"node_conv2d_{module}",
            group=group,
            pads=[pad] * 4,
            auto_pad="NOTSET",
            strides=[stride] * 2,
            dilations=[1, 1],
        )

    def hardswish(x: str) -> str:
        if functions:
            b.nodes.append(
                helper.make_node(
                    "aten_hardswish",
                    [x],
                    [f"{x}_hs"],
                    domain="pkg.onnxscript.torch_lib",
                )
            )
            return f"{x}_hs"
        return b.node("HardSwish", [x], f"{x}_hs", f"node_hardswish_{x}")

    x = hardswish(b.normalised(convolution("x", "stem", (8, 3, 3, 3), 2), 8, "stem_bn"))
    skip = x
    x = b.node(
        "Relu",
        [convolution(x, "depthwise", (8, 1, 3, 3), group=8)],
        "relu",
        "node_relu",
    )
    x = b.normalised(convolution(x, "project", (8, 8, 1, 1)), 8, "project_bn")
    x = b.node("Add", [x, skip], "add_12", "node_add_12")
    axes = b.constant("val_3", [-1, -2], np.int64)
    squeeze = b.node(
        "ReduceMean", [x, axes], "mean", "node_mean", keepdims=1, noop_with_empty_axes=0
    )
    squeeze = b.node("Relu", [convolution(squeeze, "fc1", (4, 8, 1, 1))], "relu_1")
    gate = b.node(
        "HardSigmoid",
        [convolution(squeeze, "fc2", (8, 4, 1, 1))],
        "hardsigmoid",
        alpha=1 / 6,
    )
    x = b.node("Mul", [gate, x], "mul")
    x = b.node("Clip", [x, b.constant("val_min", -1)], "clamp_min", "node_clamp_min")
    x = b.node(
        "ReduceMean",
        [x, axes],
        "mean_1",
        "node_mean_1",
        keepdims=1,
        noop_with_empty_axes=0,
    )
    size = b.node("Shape", [x], "sym_size", "node_sym_size", start=0, end=1)
    sizes = b.node(
        "Concat", [size, b.constant("val_5", [8], np.int64)], "val_6", axis=0
    )
    x = b.node("Reshape", [x, sizes], "view", "node_view", allowzero=1)
    dense = [
        x,
        b.kernel("fc.weight", classes, 8),
        b.vector("fc.bias", classes, -0.1, 0.1),
    ]
    x = b.node(
        "Gemm", dense, "linear", "node_linear", beta=1.0, transB=1, alpha=1.0, transA=0
    )
    b.node("Softmax", [x], "softmax", "node_softmax", axis=-1)
    local = (
        [
            helper.make_function(
                "pkg.onnxscript.torch_lib",
                "aten_hardswish",
                ["self"],
                ["result"],
                [helper.make_node("HardSwish", ["self"], ["result"])],
                [helper.make_opsetid("", opset)],
            )
        ]
        if functions
        else []
    )
    return b.model(
        ("x", ["s0", *IMAGE]), ("softmax", ["s0", classes]), "pytorch", local, 10
    )


def tf2onnx_cnn(
    opset: int, classes: int = 2, auto_pad: bool = False
) -> onnx.ModelProto:
    """As tf2onnx writes a Keras model: NHWC input and a Transpose, ``SAME`` padding (explicit and
    asymmetric, or auto_pad), Squeeze, MatMul and Add for the classifier."""
    b = _Builder(opset, classes)
    channels, height, width = IMAGE

    def convolution(
        x: str, module: str, shape: tuple[int, ...], stride: int = 1, group: int = 1
    ) -> str:
        # TensorFlow's SAME puts the odd element at the end.
        total = max(shape[-1] - stride, 0)
        pads = [total // 2] * 2 + [total - total // 2] * 2
        padding: dict[str, Any] = (
            {"auto_pad": "SAME_UPPER"} if auto_pad else {"pads": pads}
        )
        return b.node(
            "Conv",
            [x, b.kernel(f"model/{module}/Conv2D/ReadVariableOp:0", *shape)],
            f"model/{module}/Conv2D:0",
            f"model/{module}/Conv2D",
            group=group,
            strides=[stride] * 2,
            kernel_shape=list(shape[2:]),
            **padding,
        )

    def relu6(x: str) -> str:
        low, high = b.constant(f"{x}__min", 0), b.constant(f"{x}__max", 6)
        return b.node("Clip", [x, low, high], f"{x}_relu6")

    x = b.node(
        "Transpose", ["input_1"], "transpose__0:0", "transpose__0", perm=[0, 3, 1, 2]
    )
    x = relu6(
        b.normalised(convolution(x, "stem", (8, channels, 3, 3), 2), 8, "model/stem_bn")
    )
    skip = x
    x = relu6(
        b.normalised(
            convolution(x, "depthwise", (8, 1, 3, 3), group=8), 8, "model/dw_bn"
        )
    )
    x = b.normalised(convolution(x, "project", (8, 8, 1, 1)), 8, "model/project_bn")
    x = b.node("Add", [skip, x], "model/add/add:0", "model/add/add")
    pad = {"auto_pad": "SAME_UPPER"} if auto_pad else {"pads": [0, 0, 1, 1]}
    x = b.node(
        "MaxPool", [x], "model/pool:0", kernel_shape=[3, 3], strides=[2, 2], **pad
    )
    x = b.node("GlobalAveragePool", [x], "model/gap/Mean:0", "model/gap/Mean")
    if opset >= 13:
        axes = b.constant("const_axes__1", [2, 3], np.int64)
        x = b.node(
            "Squeeze", [x, axes], "model/gap/Mean_Squeeze:0", "model/gap/Mean_Squeeze"
        )
    else:
        x = b.node(
            "Squeeze",
            [x],
            "model/gap/Mean_Squeeze:0",
            "model/gap/Mean_Squeeze",
            axes=[2, 3],
        )
    weights = b.constant(
        "model/dense/MatMul/ReadVariableOp:0", b.random.normal(0, 0.5, (8, classes))
    )
    x = b.node("MatMul", [x, weights], "model/dense/MatMul:0", "model/dense/MatMul")
    bias = b.vector("model/dense/BiasAdd/ReadVariableOp:0", classes, -0.1, 0.1)
    x = b.node("Add", [x, bias], "model/dense/BiasAdd:0", "model/dense/BiasAdd")
    b.node("Softmax", [x], "dense", "model/dense/Softmax", axis=1 if opset < 13 else -1)
    return b.model(
        ("input_1", ["unk__12", height, width, channels]),
        ("dense", ["unk__13", classes]),
        "tf2onnx",
    )


def image(shape: tuple[int, ...], seed: int = 0) -> NDArray[np.float32]:
    """A seeded input of normal spread."""
    random = np.random.Generator(np.random.PCG64(seed))
    return random.normal(size=shape).astype(np.float32)
