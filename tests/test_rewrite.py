"""Operators of CNNs, in the forms that exporters write, answer in TVM as in ONNX Runtime.

Longer than 450 lines: a table of forms.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import graphs
import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from relay_worker import (
    relay_worker,
    through_onnxruntime,
    through_relay,
    worst_difference,
)

from netship.compile.frontend.canonical.rules import canonical
from netship.targets.errors import UserError

Array = NDArray[Any]
IMAGE = (1, 3, 7, 5)


def weights(*shape: int) -> Array:
    return graphs.image(shape, seed=3)


def whole(*numbers: int) -> Array:
    return np.array(numbers, np.int64)


def real(*numbers: float) -> Array:
    return np.array(numbers, np.float32)


def number(value: float) -> Array:
    return np.array(value, np.float32)


def single(
    operator: str,
    *constants: Array | None,
    opset: int = 13,
    shape: tuple[int, ...] = IMAGE,
    outputs: Sequence[str] = ("y",),
    **attributes: Any,
) -> onnx.ModelProto:
    """A model of one node: the input ``x``, then ``constants`` (None: that input is left out)."""
    names = ["" if each is None else f"c{k}" for k, each in enumerate(constants)]
    initializers = [
        numpy_helper.from_array(each, f"c{k}")
        for k, each in enumerate(constants)
        if each is not None
    ]
    node = helper.make_node(operator, ["x", *names], outputs, **attributes)
    return chain([node], initializers, opset, shape, [name for name in outputs if name])


def chain(
    nodes: list[onnx.NodeProto],
    initializers: list[TensorProto],
    opset: int,
    shape: tuple[int, ...],
    outputs: Sequence[str] = ("y",),
) -> onnx.ModelProto:
    graph = helper.make_graph(
        nodes,
        "operator",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [
            helper.make_tensor_value_info(name, TensorProto.FLOAT, None)
            for name in outputs
        ],
        initializers,
    )
    opsets = [helper.make_opsetid("", opset)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8)


def shape_chain() -> onnx.ModelProto:
    """``x.view(x.size(0), -1)`` as PyTorch writes it."""
    node = helper.make_node
    nodes = [
        node("Shape", ["x"], ["shape"]),
        node("Gather", ["shape", "zero"], ["size"], axis=0),
        node("Unsqueeze", ["size"], ["size1"], axes=[0]),
        node("Concat", ["size1", "rest"], ["sizes"], axis=0),
        node("Reshape", ["x", "sizes"], ["y"]),
    ]
    constants = [
        numpy_helper.from_array(np.array(0, np.int64), "zero"),
        numpy_helper.from_array(whole(-1), "rest"),
    ]
    return chain(nodes, constants, 11, IMAGE)


def constant_attribute() -> onnx.ModelProto:
    nodes = [
        helper.make_node("Constant", [], ["c"], value_floats=[2.0, 1, 3, 4, 5]),
        helper.make_node("Add", ["x", "c"], ["y"]),
    ]
    return chain(nodes, [], 13, IMAGE)


KERNEL = weights(4, 3, 3, 3)
UP = weights(3, 4, 2, 3)
CHANNEL = [weights(3), weights(3), weights(3), np.abs(weights(3)) + np.float32(0.5)]
NONE = np.zeros(0, np.float32)

# What TVM's importer gets wrong as it is: each rule of compile/frontend/canonical at least once.
WRONG: dict[str, onnx.ModelProto] = {
    "reduce-axes-input": single("ReduceMean", whole(2, 3), opset=18, keepdims=0),
    "reduce-axes-negative": single("ReduceMax", whole(-1, 1), opset=18),
    "reduce-sum-13": single("ReduceSum", whole(2, 3), opset=13),
    "reduce-no-axes": single("ReduceMin", np.zeros(0, np.int64), opset=18),
    "reduce-l2": single("ReduceL2", whole(2, 3), opset=18),
    "conv-same-upper": single("Conv", KERNEL, auto_pad="SAME_UPPER", strides=[2, 2]),
    "conv-same-lower": single("Conv", KERNEL, auto_pad="SAME_LOWER", strides=[2, 1]),
    "max-pool-same": single(
        "MaxPool", auto_pad="SAME_UPPER", kernel_shape=[3, 2], strides=[2, 2]
    ),
    "max-pool-indices": single("MaxPool", kernel_shape=[3, 2], outputs=["y", "unread"]),
    "conv-transpose-dilated": single(
        "ConvTranspose", UP, strides=[2, 1], dilations=[2, 1]
    ),
    "pad-axes": single("Pad", whole(1, 2, 2, 1), None, whole(2, 3), opset=18),
    "pad-wrap": single("Pad", whole(0, 1, -1, 8, 0, 0, 9, -2), mode="wrap", opset=19),
    "pad-axes-negative": single(
        "Pad", whole(1, 2, 2, 1), real(3), whole(-2, -1), opset=18, mode="constant"
    ),
    "clip-low": single("Clip", number(-0.3)),
    "clip-high": single("Clip", None, number(0.3), opset=11),
    "dropout-ratio": single("Dropout", number(0.5)),
    "unsqueeze-negative": single("Unsqueeze", whole(-1, 0)),
    "unsqueeze-negative-11": single("Unsqueeze", opset=11, axes=[-1, 0]),
    "split-uneven": single(
        "Split", opset=18, shape=(1, 5, 4, 6), outputs=["y", "z"], axis=1, num_outputs=2
    ),
    "mean-broadcast": single("Mean", weights(3, 1, 1)),
    "softplus-large": single("Softplus"),
    "gelu-tanh": single("Gelu", opset=20, approximate="tanh"),
    "log-softmax-large": single("LogSoftmax", shape=(1, 6)),
    "matrix-vector": single("MatMul", weights(5)),
    "resize-nearest": single(
        "Resize",
        None,
        real(1, 1, 1.5, 0.6),
        nearest_mode="floor",
        coordinate_transformation_mode="half_pixel",
    ),
    "resize-linear": single("Resize", None, real(1, 1, 2, 1.5), mode="linear"),
    "resize-axes": single("Resize", None, None, whole(11, 9), opset=18, axes=[2, 3]),
    "resize-10-linear": single("Resize", real(1, 1, 2, 2), opset=10, mode="linear"),
    "upsample-linear": single("Upsample", real(1, 1, 2, 3), opset=9, mode="linear"),
    "constant-floats": constant_attribute(),
}

# Forms that must go on working, with or without a rule.
RIGHT: dict[str, onnx.ModelProto] = {
    "shape-chain": shape_chain(),
    "conv": single("Conv", KERNEL, weights(4), pads=[0, 2, 1, 0], strides=[2, 1]),
    # Clipped to the range of the integers that it becomes.
    **{
        f"clip-cast-{kind.__name__}": chain(
            [
                helper.make_node("Mul", ["x", "scale"], ["scaled"]),
                helper.make_node("Clip", ["scaled", "low", "high"], ["clipped"]),
                helper.make_node(
                    "Cast",
                    ["clipped"],
                    ["whole"],
                    to=helper.np_dtype_to_tensor_dtype(np.dtype(kind)),
                ),
                helper.make_node("Cast", ["whole"], ["y"], to=TensorProto.FLOAT),
            ],
            [
                numpy_helper.from_array(np.array(value, np.float32), name)
                for name, value in (
                    ("scale", 50),
                    ("low", np.iinfo(kind).min),
                    ("high", np.iinfo(kind).max),
                )
            ],
            13,
            IMAGE,
        )
        for kind in (np.uint8, np.int8, np.int16)
    },
    "trilu-lower": single("Trilu", np.array(1), opset=14, upper=0),
    "trilu-upper": single("Trilu", np.array(-2), opset=14),
    "conv-grouped": single("Conv", weights(6, 1, 3, 3), group=3, opset=22),
    "conv-valid": single("Conv", KERNEL, auto_pad="VALID", opset=11),
    "conv-transpose": single(
        "ConvTranspose", UP, strides=[2, 2], output_padding=[1, 1]
    ),
    "conv-transpose-same": single(
        "ConvTranspose", UP, strides=[2, 2], auto_pad="SAME_UPPER"
    ),
    "conv-transpose-lower": single(
        "ConvTranspose", UP, strides=[2, 2], auto_pad="SAME_LOWER"
    ),
    "conv-transpose-shape": single(
        "ConvTranspose", UP, strides=[2, 2], output_shape=[14, 10]
    ),
    "batch-norm-7": single("BatchNormalization", *CHANNEL, opset=7, epsilon=1e-3),
    "batch-norm-15": single("BatchNormalization", *CHANNEL, opset=15, training_mode=0),
    "gemm": single(
        "Gemm", weights(4, 5), weights(4), shape=(1, 5), transB=1, alpha=0.5, beta=2.0
    ),
    "matmul": single("MatMul", weights(5, 4)),
    "clip-6": single("Clip", opset=7, min=-0.3, max=0.5),
    "clip-both": single("Clip", number(-0.3), number(0.5), opset=22),
    "leaky-relu-default": single("LeakyRelu"),
    "prelu": single("PRelu", weights(3, 1, 1)),
    "hard-swish": single("HardSwish", opset=14),
    "hard-sigmoid": single("HardSigmoid"),
    "sigmoid": single("Sigmoid", opset=22),
    "gelu": single("Gelu", opset=20),
    "mish": single("Mish", opset=18),
    "elu": single("Elu", alpha=0.7),
    "global-average": single("GlobalAveragePool", opset=22),
    "global-max": single("GlobalMaxPool"),
    "average-counting": single(
        "AveragePool", kernel_shape=[3, 2], pads=[1, 1, 0, 0], count_include_pad=1
    ),
    "average-same": single(
        "AveragePool", kernel_shape=[3, 2], auto_pad="SAME_UPPER", strides=[2, 2]
    ),
    "average-ceil": single(
        "AveragePool", kernel_shape=[3, 2], strides=[3, 2], ceil_mode=1
    ),
    "average-ceil-padded": single(
        "AveragePool",
        kernel_shape=[3, 2],
        strides=[3, 2],
        pads=[1, 1, 0, 0],
        ceil_mode=1,
    ),
    "average-ceil-counting": single(
        "AveragePool",
        kernel_shape=[3, 2],
        strides=[3, 2],
        pads=[1, 1, 0, 0],
        ceil_mode=1,
        count_include_pad=1,
    ),
    "average-dilated": single(
        "AveragePool", kernel_shape=[3, 2], dilations=[2, 1], opset=19
    ),
    "max-ceil": single("MaxPool", kernel_shape=[3, 3], strides=[2, 2], ceil_mode=1),
    "max-dilated": single("MaxPool", kernel_shape=[3, 2], dilations=[2, 1]),
    "reduce-attribute": single("ReduceMean", opset=11, axes=[-1, 1], keepdims=0),
    "reduce-noop": single("ReduceMean", opset=18, noop_with_empty_axes=1),
    "flatten": single("Flatten", axis=2),
    "reshape": single("Reshape", whole(0, -1)),
    "reshape-allowzero": single("Reshape", whole(1, -1), opset=14, allowzero=1),
    "squeeze-input": single("Squeeze", whole(-1, 2), shape=(1, 3, 1, 1)),
    "squeeze-all": single("Squeeze", shape=(1, 3, 1, 1)),
    "transpose": single("Transpose", perm=[0, 2, 3, 1]),
    "concat": single("Concat", weights(1, 2, 7, 5), axis=1),
    "split": single("Split", whole(1, 2), outputs=["y", "z"], axis=1),
    "slice": single(
        "Slice", whole(0, 1), whole(2**63 - 1, 2**63 - 1), whole(2, 3), whole(2, 2)
    ),
    "slice-backwards": single(
        "Slice", whole(-1), whole(-(2**63) + 1), whole(3), whole(-1)
    ),
    "slice-9": single("Slice", opset=9, axes=[2, 3], starts=[1, -3], ends=[1000, -1]),
    "pad-7": single("Pad", opset=7, pads=[0, 0, 1, 2, 0, 0, 2, 1], value=3.0),
    "pad-edge": single("Pad", whole(0, 0, 1, 2, 0, 0, 2, 1), mode="edge"),
    "pad-reflect": single(
        "Pad", whole(0, 0, 1, 2, 0, 0, 2, 1), mode="reflect", opset=19
    ),
    "pad-negative": single("Pad", whole(0, 0, -1, 2, 0, 0, 0, -2)),
    "resize-10": single("Resize", real(1, 1, 2, 2), opset=10),
    "resize-11-sizes": single("Resize", NONE, NONE, whole(1, 3, 11, 9), opset=11),
    "resize-align": single(
        "Resize",
        None,
        real(1, 1, 1.5, 2),
        mode="linear",
        coordinate_transformation_mode="align_corners",
        opset=19,
    ),
    "resize-cubic": single(
        "Resize", None, real(1, 1, 2, 2), mode="cubic", cubic_coeff_a=-0.5
    ),
    "resize-antialias": single(
        "Resize", None, real(1, 1, 0.6, 0.6), mode="linear", antialias=1, opset=18
    ),
    "upsample-7": single("Upsample", opset=7, scales=[1.0, 1.0, 2.0, 3.0]),
    "softmax-11": single("Softmax", opset=11, axis=1),
    "softmax-13": single("Softmax", axis=1),
    "softmax-one": single("Softmax", axis=1, shape=(1, 1, 4, 3)),
    "softmax-one-11": single("Softmax", opset=11, axis=2, shape=(1, 3, 1, 1)),
    "log-softmax-one": single("LogSoftmax", axis=-1, shape=(1, 3, 4, 1)),
    "log-softmax-11": single("LogSoftmax", opset=11, axis=2),
    "lrn": single("LRN", shape=(1, 9, 4, 5), size=5, alpha=0.1, bias=2.0),
    "dropout-7": single("Dropout", opset=7, outputs=["y", "unread"]),
    "identity": single("Identity"),
    "expand": single("Expand", whole(1, 3, 4, 5), shape=(1, 3, 1, 1)),
    "mul": single("Mul", weights(3, 1, 1)),
    "sub": single("Sub", weights(5)),
    "div": single("Div", weights(3, 1, 1) + 3),
    "pow": single("Pow", number(2)),
    "depth-to-space": single(
        "DepthToSpace", blocksize=2, mode="CRD", shape=(1, 12, 3, 5)
    ),
    "layer-norm": single("LayerNormalization", weights(5), weights(5), opset=17),
    "instance-norm": single(
        "InstanceNormalization", weights(3), weights(3), epsilon=1e-3
    ),
    "gather": single("Gather", whole(2, 0, -1), axis=1),
}
# Outputs that a test leaves unread, so that they are no graph outputs.
for _model in (*WRONG.values(), *RIGHT.values()):
    _kept = [each for each in _model.graph.output if each.name != "unread"]
    del _model.graph.output[:]
    _model.graph.output.extend(_kept)


@pytest.fixture(scope="module")
def relay() -> Iterator[ProcessPoolExecutor]:
    with relay_worker() as worker:
        yield worker


def an_image(model: onnx.ModelProto, scale: float) -> Array:
    shape = [dim.dim_value for dim in model.graph.input[0].type.tensor_type.shape.dim]
    return graphs.image(tuple(shape)) * np.float32(scale)


def answers_as_onnxruntime(
    model: onnx.ModelProto, relay: ProcessPoolExecutor, scale: float = 1
) -> None:
    x, proto = an_image(model, scale), model.SerializeToString()
    (expected,) = through_onnxruntime(proto, [x])
    (got,) = relay.submit(through_relay, proto, [x]).result()
    assert worst_difference(got, expected) < 1e-5


def is_wrong_as_it_is(
    model: onnx.ModelProto, relay: ProcessPoolExecutor, scale: float = 1
) -> None:
    x, proto = an_image(model, scale), model.SerializeToString()
    (expected,) = through_onnxruntime(proto, [x])
    try:
        (got,) = relay.submit(through_relay, proto, [x], rewrite=False).result()
    except Exception:  # noqa: BLE001  (whatever the importer or LLVM raises)
        return
    shapes = [each.shape for each in got], [each.shape for each in expected]
    assert shapes[0] != shapes[1] or not worst_difference(got, expected) < 1e-5


@pytest.mark.parametrize("name", [*WRONG, *RIGHT])
def test_an_operator_answers_as_in_onnxruntime(
    name: str, relay: ProcessPoolExecutor
) -> None:
    answers_as_onnxruntime((WRONG | RIGHT)[name], relay, 150 if "large" in name else 1)


@pytest.mark.parametrize("name", WRONG)
def test_a_rule_is_still_needed(name: str, relay: ProcessPoolExecutor) -> None:
    """When this fails, TVM got better: take the rule out of compile/frontend/canonical."""
    is_wrong_as_it_is(WRONG[name], relay, 150 if "large" in name else 1)


REFUSED: dict[str, tuple[onnx.ModelProto, str]] = {
    "batch norm that trains": (
        single(
            "BatchNormalization",
            *CHANNEL,
            opset=15,
            training_mode=1,
            outputs=["y", "m", "v"],
        ),
        r"\(BatchNormalization\).*training mode",
    ),
    "dropout that trains": (
        single("Dropout", number(0.5), np.array(True)),
        r"\(Dropout\).*training mode",
    ),
    "a window wholly in the padding": (
        single(
            "MaxPool",
            kernel_shape=[3, 2],
            strides=[3, 2],
            pads=[1] * 4,
            shape=(1, 3, 8, 7),
            ceil_mode=1,
        ),
        r"\(MaxPool\).*ceil_mode",
    ),
    "bounds that are computed": (
        chain(
            [
                helper.make_node("ReduceMin", ["x"], ["low"], keepdims=0),
                helper.make_node("Clip", ["x", "low"], ["y"], name="clamp"),
            ],
            [],
            13,
            IMAGE,
        ),
        r"node 'clamp' \(Clip\).*input 1 is computed",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_form_that_cannot_be_built_is_named(name: str) -> None:
    model, message = REFUSED[name]
    with pytest.raises(UserError, match=message):
        canonical(model)


def test_an_operator_unknown_to_tvm_is_named_with_its_node(
    relay: ProcessPoolExecutor,
) -> None:
    model = single("Hardmax")
    model.graph.node[0].name = "best"
    with pytest.raises(UserError, match=r"^node 'best' \(Hardmax\): not an operator"):
        relay.submit(
            through_relay, model.SerializeToString(), [graphs.image(IMAGE)]
        ).result()


def test_what_the_importer_cannot_take_names_the_node(
    relay: ProcessPoolExecutor,
) -> None:
    shape = (1, 3, 2, 2, 2, 2)
    model = single("Conv", weights(4, 3, 1, 1, 1, 1), shape=shape)
    with pytest.raises(
        UserError, match=r"^node that makes 'y' \(Conv\): TVM cannot import"
    ):
        relay.submit(
            through_relay, model.SerializeToString(), [graphs.image(shape)]
        ).result()


def test_rewriting_leaves_the_model_it_was_given() -> None:
    model = WRONG["conv-same-upper"]
    before = model.SerializeToString(deterministic=True)
    canonical(model)
    assert model.SerializeToString(deterministic=True) == before
