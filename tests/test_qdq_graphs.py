"""Seeded QDQ graphs of integer operators, against ONNX Runtime by the interpreter alone: bit by bit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import pytest
from integers import graph_of
from onnx import TensorProto, helper, numpy_helper

from netship.compile.ir import evaluate
from netship.compile.ir.operators import islands
from netship.compile.passes.channels import fill_blocks
from netship.compile.passes.storage import store_as_int8, store_as_uint8
from netship.targets.onnx_runtime import Session

_SHAPE = (1, 4, 6, 5)


@dataclass
class Value:
    """A float tensor; ``scale`` and ``zero`` where it was dequantised."""

    name: str
    shape: tuple[int, ...]
    scale: float
    zero: int
    stored: bool = True


@dataclass
class Writer:
    """A QDQ graph that is being written."""

    random: np.random.Generator
    dtype: Any
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    constants: list[onnx.TensorProto] = field(default_factory=list)
    count: int = 0

    def fresh(self) -> str:
        self.count += 1
        return f"t{self.count}"

    def constant(self, value: Any) -> str:
        name = self.fresh()
        self.constants.append(numpy_helper.from_array(np.asarray(value), name))
        return name

    def facts(self) -> tuple[float, int]:
        info = np.iinfo(self.dtype)
        scale = float(np.float32(self.random.uniform(0.01, 0.1)))
        return scale, int(self.random.integers(info.min + 30, info.max - 30))

    def dequantised(
        self, name: str, shape: tuple[int, ...], facts: tuple[float, int]
    ) -> Value:
        scale, zero = facts
        rest = [
            self.constant(np.float32(scale)),
            self.constant(np.array(zero, self.dtype)),
        ]
        stored, real = self.fresh(), self.fresh()
        self.nodes.append(helper.make_node("QuantizeLinear", [name, *rest], [stored]))
        self.nodes.append(helper.make_node("DequantizeLinear", [stored, *rest], [real]))
        return Value(real, shape, scale, zero)

    def operand(self, shape: tuple[int, ...]) -> str:
        """A constant as the quantiser writes it."""
        scale, zero = self.facts()
        info = np.iinfo(self.dtype)
        stored = self.random.integers(info.min, info.max, shape, self.dtype, True)
        inputs = [stored, np.float32(scale), np.array(zero, self.dtype)]
        name = self.fresh()
        names = [self.constant(each) for each in inputs]
        self.nodes.append(helper.make_node("DequantizeLinear", names, [name]))
        return name

    def node(
        self, kind: str, inputs: list[str], outputs: int = 1, **attributes: Any
    ) -> list[str]:
        names = [self.fresh() for _ in range(outputs)]
        self.nodes.append(helper.make_node(kind, inputs, names, **attributes))
        return names


Made = tuple[list[str], list[tuple[int, ...]]]
Step = Callable[[Writer, Value, Value], Made | None]


def _one(w: Writer, kind: str, x: Value, *constants: Any, **attributes: Any) -> Made:
    """An operator on one value; its output's shape from ONNX's inference."""
    inputs = [x.name, *(w.constant(each) for each in constants)]
    return w.node(kind, inputs, **attributes), [()]


def _integers(*values: int) -> Any:
    return np.array(values, np.int64)


def max_pool(w: Writer, x: Value, y: Value) -> Made | None:
    if len(x.shape) != 4 or min(x.shape[2:]) < 3:
        return None
    pads = w.random.integers(0, 2, 4).tolist()
    strides = w.random.integers(1, 3, 2).tolist()
    return _one(w, "MaxPool", x, kernel_shape=[3, 2], pads=pads, strides=strides)


def average_pool(w: Writer, x: Value, y: Value) -> Made | None:
    if len(x.shape) != 4 or min(x.shape[2:]) < 3:
        return None
    return _one(
        w,
        "AveragePool",
        x,
        kernel_shape=w.random.integers(2, 4, 2).tolist(),
        pads=[1, 0, 1, 1],
        strides=w.random.integers(1, 3, 2).tolist(),
        count_include_pad=int(w.random.integers(2)),
    )


def global_pool(w: Writer, x: Value, y: Value) -> Made | None:
    kind = w.random.choice(["GlobalAveragePool", "GlobalMaxPool"])
    return _one(w, str(kind), x) if len(x.shape) == 4 else None


def extreme(w: Writer, x: Value, y: Value) -> Made | None:
    kind = str(w.random.choice(["ReduceMax", "ReduceMin"]))
    axis = int(w.random.integers(1, len(x.shape)))
    return _one(w, kind, x, axes=[axis], keepdims=1)


def of_two(w: Writer, x: Value, y: Value) -> Made | None:
    try:
        np.broadcast_shapes(x.shape, y.shape)
    except ValueError:
        return None
    # Of one value it is a table, which ONNX Runtime's integers need not equal where another order of the two is taken.
    if x.name == y.name:
        return None
    kind = str(w.random.choice(["Add", "Mul"]))
    return w.node(kind, [x.name, y.name]), [()]


def with_constant(w: Writer, x: Value, y: Value) -> Made | None:
    shape = tuple(int(n) if w.random.integers(2) else 1 for n in x.shape)
    operands = [x.name, w.operand(shape)]
    if w.random.integers(2):
        operands.reverse()
    return w.node(str(w.random.choice(["Add", "Mul"])), operands), [()]


def choose(w: Writer, x: Value, y: Value) -> Made | None:
    kind = str(w.random.choice(["Max", "Min"]))
    return (w.node(kind, [x.name, y.name]), [()]) if x.shape == y.shape else None


def concat(w: Writer, x: Value, y: Value) -> Made | None:
    if x.shape[:1] + x.shape[2:] != y.shape[:1] + y.shape[2:]:
        return None
    return w.node("Concat", [x.name, y.name], axis=1), [()]


def split(w: Writer, x: Value, y: Value) -> Made | None:
    if x.shape[1] < 2:
        return None
    sizes = w.constant(_integers(1, x.shape[1] - 1))
    return w.node("Split", [x.name, sizes], 2, axis=1), [(), ()]


def cut(w: Writer, x: Value, y: Value) -> Made | None:
    axis = int(w.random.integers(1, len(x.shape)))
    step = int(w.random.choice([1, 2, -1]))
    ends = (-1, -100) if step < 0 else (0, 100)
    values = (*ends, axis, step)
    return _one(w, "Slice", x, *(_integers(each) for each in values))


def pad(w: Writer, x: Value, y: Value) -> Made | None:
    mode = str(w.random.choice(["constant", "reflect", "edge", "wrap"]))
    if len(x.shape) != 4 or min(x.shape[2:]) < 2:
        return None
    amounts = _integers(0, 0, 1, 0, 0, 0, 1, 1)
    value = np.float32(w.random.choice([0, 0.37, -9]))
    return _one(w, "Pad", x, amounts, value, mode=mode)


def gather(w: Writer, x: Value, y: Value) -> Made | None:
    axis = int(w.random.integers(1, len(x.shape)))
    places = w.random.integers(0, x.shape[axis], 3)
    return _one(w, "Gather", x, places, axis=axis)


def turn(w: Writer, x: Value, y: Value) -> Made | None:
    order = [0, *(1 + w.random.permutation(len(x.shape) - 1)).tolist()]
    return _one(w, "Transpose", x, perm=order)


def reshape(w: Writer, x: Value, y: Value) -> Made | None:
    return _one(w, "Reshape", x, _integers(1, x.shape[-1], -1, *x.shape[1:-2]))


def repeat(w: Writer, x: Value, y: Value) -> Made | None:
    return _one(w, "Tile", x, _integers(1, 2, *[1] * (len(x.shape) - 2)))


def blocks(w: Writer, x: Value, y: Value) -> Made | None:
    if len(x.shape) != 4 or x.shape[1] % 4:
        return None
    return _one(w, "DepthToSpace", x, blocksize=2)


def nearest(w: Writer, x: Value, y: Value) -> Made | None:
    if len(x.shape) != 4:
        return None
    scales = w.constant(np.array([1, 1, 2, 1.5], np.float32))
    return w.node("Resize", [x.name, "", scales], mode="nearest"), [()]


def function(w: Writer, x: Value, y: Value) -> Made | None:
    kinds = ["Sigmoid", "Relu", "LeakyRelu", "Tanh", "Elu", "Softplus", "HardSigmoid"]
    return _one(w, str(w.random.choice(kinds)), x)


def convolution(w: Writer, x: Value, y: Value) -> Made | None:
    if len(x.shape) != 4:
        return None
    channels = int(w.random.choice([4, x.shape[1]]))
    weights = w.random.integers(-127, 128, (channels, x.shape[1], 1, 1), np.int8)
    scale = np.float32(0.3 / (127 * x.shape[1]))
    names = [w.constant(each) for each in (weights, scale, np.int8(0))]
    kernel = w.fresh()
    w.nodes.append(helper.make_node("DequantizeLinear", names, [kernel]))
    return w.node("Conv", [x.name, kernel]), [()]


MOVING: list[Step] = [
    *(max_pool, extreme, choose, concat, split, cut, pad, gather, turn),
    *(reshape, repeat, blocks, nearest),
]
STEPS: list[Step] = [
    *MOVING,
    *(average_pool, global_pool, of_two, of_two, with_constant, function),
    *(convolution, convolution),
]


def network(seed: int) -> onnx.ModelProto:
    """Some operators; what moves values may leave its output unquantised to another that does."""
    random = np.random.default_rng(seed)
    w = Writer(random, np.uint8 if seed % 2 else np.int8)
    known = [w.dequantised("image", _SHAPE, w.facts())]
    while len(known) < 6:
        x, y = (known[int(random.integers(len(known)))] for _ in range(2))
        steps = STEPS if x.stored and y.stored else MOVING
        step = steps[int(random.integers(len(steps)))]
        made = step(w, x, y)
        if made is None:
            continue
        for name in made[0]:
            shape = _shape(w, name)
            same = x.stored and random.integers(3) == 0
            facts = (x.scale, x.zero) if same else w.facts()
            # What is padded with may be no stored value of the input.
            if step in MOVING and step is not pad and random.integers(4) == 0:
                known.append(Value(name, shape, 0, 0, stored=False))
            else:
                known.append(w.dequantised(name, shape, facts))
    # ONNX Runtime's integers need what it quantises.
    ends = [x if x.stored else w.dequantised(x.name, x.shape, w.facts()) for x in known]
    return _model(w, [each.name for each in ends[1:]])


def _shape(w: Writer, name: str) -> tuple[int, ...]:
    inferred = onnx.shape_inference.infer_shapes(
        _model(w, [name]), strict_mode=True, data_prop=True
    )
    dims = inferred.graph.output[0].type.tensor_type.shape.dim
    return tuple(each.dim_value for each in dims)


def _model(w: Writer, outputs: list[str]) -> onnx.ModelProto:
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        w.nodes,
        "random",
        [value("image", TensorProto.FLOAT, _SHAPE)],
        [value(name, TensorProto.FLOAT, None) for name in dict.fromkeys(outputs)],
        w.constants,
    )
    opset = [helper.make_opsetid("", 17)]
    return helper.make_model(graph, opset_imports=opset, ir_version=8)


@pytest.mark.parametrize("part", range(8))
def test_random_graphs_of_integers_are_onnx_runtimes(part: int) -> None:
    for seed in range(part * 30, part * 30 + 30):
        proto = onnx.shape_inference.infer_shapes(network(seed), data_prop=True)
        image = np.random.default_rng(seed).normal(0, 3, _SHAPE).astype(np.float32)
        session = Session(proto.SerializeToString(), "random")
        theirs = session.run([x.name for x in proto.graph.output], {"image": image})
        graph = graph_of(proto)
        assert [each.label for each in islands(graph)] == [], seed
        unsigned = store_as_uint8(graph)
        for each in (graph, store_as_int8(graph), unsigned, fill_blocks(unsigned)):
            for output, ours, expected in zip(
                graph.outputs, evaluate.run(each, image), theirs, strict=True
            ):
                assert np.array_equal(ours, expected), (seed, output.name)
