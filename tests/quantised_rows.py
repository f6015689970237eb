"""Networks of one quantised form each, written by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

STEP = np.float32(0.05)
ZEROS = np.zeros(7, np.int8)
MIDDLE = np.uint8(120)
# Their outputs are computed in float32.
FLOAT_OUTPUTS = ("a_layer_that_answers_in_float32", "weights_alone")


class Row:
    """A network of one form, of an image that is quantised first."""

    def __init__(self, opset: int = 21, zero: Any = MIDDLE) -> None:
        self.opset, self.zero, self.scale = opset, zero, np.float32(0.02)
        self.random = np.random.default_rng(3)
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []
        self.image = self.node("QuantizeLinear", "image", self.scale, zero)

    def integers(
        self, *shape: int, low: int = -127, high: int = 128, dtype: Any = np.int8
    ) -> Any:
        return self.random.integers(low, high, shape).astype(dtype)

    def scales(self, *shape: int, size: float = 0.005) -> Any:
        return self.random.uniform(size / 5, size * 2, shape).astype(np.float32)

    def node(self, kind: str, *inputs: Any, domain: str = "", **attributes: Any) -> str:
        return self.nodes_of(kind, 1, *inputs, domain=domain, **attributes)[0]

    def nodes_of(
        self, kind: str, count: int, *inputs: Any, **attributes: Any
    ) -> list[str]:
        number = len(self.nodes)
        outputs = [f"t{number}.{k}" for k in range(count)]
        names = [
            each if isinstance(each, str) else self.constant(each) for each in inputs
        ]
        self.nodes.append(
            helper.make_node(kind, names, outputs, f"n{number}", **attributes)
        )
        return outputs

    def own(self, kind: str, *inputs: Any, **attributes: Any) -> str:
        """An operator of ONNX Runtime's."""
        return self.node(kind, *inputs, domain="com.microsoft", **attributes)

    def constant(self, value: Any, dtype: int = 0) -> str:
        name, array = f"c{len(self.constants)}", np.asarray(value)
        tensor = numpy_helper.from_array(array, name)
        if dtype:
            tensor = helper.make_tensor(name, dtype, array.shape, array.ravel())
        self.constants.append(tensor)
        return name

    def real(self) -> str:
        return self.node("DequantizeLinear", self.image, self.scale, self.zero)

    def flat(self) -> str:
        return self.node("Reshape", self.image, np.array([1, 144]))

    def flat_real(self) -> str:
        return self.node("Reshape", self.real(), np.array([1, 144]))

    def weights(self, stored: Any, scale: Any, zero: Any, **attributes: Any) -> str:
        return self.node("DequantizeLinear", stored, scale, zero, **attributes)

    def quantised(self, source: str) -> str:
        stored = self.node("QuantizeLinear", source, STEP, self.zero)
        return self.node("DequantizeLinear", stored, STEP, self.zero)

    def dequantised(self, source: str, scale: Any = None) -> str:
        scale = STEP if scale is None else scale
        return self.node("DequantizeLinear", source, scale, self.zero)

    def convolution(
        self, weights: Any, scale: Any, zero: Any, **attributes: Any
    ) -> None:
        facts = (self.image, self.scale, self.zero, weights, scale, zero)
        made = self.node("QLinearConv", *facts, STEP, self.zero, **attributes)
        self.dequantised(made)

    def model(self) -> onnx.ModelProto:
        image = helper.make_tensor_value_info("image", TensorProto.FLOAT, [1, 4, 6, 6])
        (name,) = self.nodes[-1].output
        output = helper.make_tensor_value_info(name, TensorProto.FLOAT, None)
        graph = helper.make_graph(self.nodes, "row", [image], [output], self.constants)
        opsets = [
            helper.make_opsetid("", self.opset),
            helper.make_opsetid("com.microsoft", 1),
        ]
        return helper.make_model(graph, opset_imports=opsets, ir_version=10)


ROWS: dict[str, Callable[[], Row]] = {}


def row(write: Callable[[Row], object]) -> Callable[[Row], object]:
    def written_row() -> Row:
        made = Row()
        write(made)
        return made

    ROWS[write.__name__] = written_row
    return write


@row
def a_scale_for_each_output_channel(r: Row) -> None:
    bias = r.integers(5, low=-500, high=500, dtype=np.int32)
    facts = (r.image, r.scale, r.zero, r.integers(5, 4, 3, 3), r.scales(5))
    rest = (np.zeros(5, np.int8), STEP, r.zero, bias)
    r.dequantised(r.node("QLinearConv", *facts, *rest, pads=[1] * 4))


@row
def depthwise_weights_far_from_their_zero(r: Row) -> None:
    stored = r.integers(4, 1, 3, 3, low=0, high=256, dtype=np.uint8)
    r.convolution(stored, np.float32(0.003), np.uint8(9), group=4)


@row
def grouped_weights_far_from_their_zero(r: Row) -> None:
    stored = r.integers(6, 2, 3, 3, low=-128)
    r.convolution(stored, np.float32(0.003), np.int8(-100), group=2)


@row
def weights_of_255(r: Row) -> None:
    stored = np.full((2, 4, 1, 1), 255, np.uint8)
    r.convolution(stored, np.float32(0.001), np.uint8(0))


@row
def a_matrix_with_a_scale_for_each_column(r: Row) -> None:
    facts = (r.flat(), r.scale, r.zero, r.integers(144, 7), r.scales(7, size=0.001))
    r.dequantised(r.node("QLinearMatMul", *facts, ZEROS, STEP, r.zero))


@row
def a_matrix_far_from_its_zero(r: Row) -> None:
    stored = r.integers(144, 7, low=0, high=256, dtype=np.uint8)
    facts = (r.flat(), r.scale, r.zero, stored, np.float32(0.0005), np.uint8(100))
    r.dequantised(r.node("QLinearMatMul", *facts, STEP, r.zero))


@row
def a_layer_without_bias(r: Row) -> None:
    facts = (r.flat(), r.scale, r.zero, r.integers(144, 7), r.scales(7, size=0.001))
    r.dequantised(r.own("QGemm", *facts, ZEROS, "", STEP, r.zero))


@row
def a_layer_that_answers_in_float32(r: Row) -> None:
    bias = r.integers(7, low=-900, high=900, dtype=np.int32)
    facts = (r.flat(), r.scale, r.zero, r.integers(7, 144), np.float32(0.001))
    r.own("QGemm", *facts, np.int8(0), bias, transB=1)


@row
def a_choice(r: Row) -> None:
    chosen = np.arange(36).reshape(1, 1, 6, 6) % 3 == 0
    operand = (r.image, r.scale, r.zero)
    r.dequantised(r.own("QLinearWhere", chosen, *operand, *operand, STEP, r.zero))


@row
def stored_values_are_moved(r: Row) -> None:
    x = r.node("Transpose", r.image, perm=[0, 1, 3, 2])
    x = r.node("Pad", x, np.array([0, 0, 1, 1, 0, 0, 1, 1]), r.zero)
    parts = r.nodes_of("Split", 2, x, np.array([2, 2]), axis=1)
    facts = (r.scale, r.zero)
    operands = (parts[1], *facts, parts[0], *facts)
    x = r.own("QLinearConcat", STEP, r.zero, *operands, axis=1)
    x = r.node("MaxPool", x, kernel_shape=[2, 2])
    r.dequantised(r.node("Slice", x, np.array([0]), np.array([5]), np.array([3])))


@row
def padded_with_the_stored_zero(r: Row) -> None:
    padded = r.node("Pad", r.image, np.array([0, 0, 1, 1, 0, 0, 1, 1]))
    r.dequantised(padded, r.scale)


@row
def an_average(r: Row) -> None:
    step = np.float32(0.015)
    facts = (r.image, r.scale, r.zero, step, r.zero)
    window = {"kernel_shape": [3, 3], "pads": [1] * 4, "count_include_pad": 1}
    r.dequantised(r.own("QLinearAveragePool", *facts, **window), step)


@row
def an_axis_from_the_end(r: Row) -> None:
    zeros = np.zeros(5, np.int8)
    weights = r.weights(r.integers(5, 4, 3, 3), r.scales(5), zeros, axis=-4)
    r.quantised(r.node("Conv", r.real(), weights))


@row
def weights_behind_a_transposition(r: Row) -> None:
    stored, scales = r.integers(7, 144), r.scales(7, size=0.001)
    weights = r.weights(stored, scales, ZEROS, axis=0)
    turned = r.node("Transpose", weights, perm=[1, 0])
    r.quantised(r.node("MatMul", r.flat_real(), turned))


@row
def a_scale_for_each_input(r: Row) -> None:
    scales, zeros = r.scales(144, size=0.001), np.zeros(144, np.int8)
    weights = r.weights(r.integers(7, 144), scales, zeros, axis=1)
    r.quantised(r.node("Gemm", r.flat_real(), weights, transB=1))


@row
def no_zero_points(r: Row) -> None:
    stored = r.node("QuantizeLinear", "image", r.scale)
    real = r.node("DequantizeLinear", stored, r.scale)
    weights = r.node("DequantizeLinear", r.integers(5, 4, 3, 3), np.float32(0.004))
    stored = r.node("QuantizeLinear", r.node("Conv", real, weights), STEP)
    r.node("DequantizeLinear", stored, STEP)


@row
def a_type_that_an_attribute_says(r: Row) -> None:
    wanted: dict[str, Any] = {"output_dtype": TensorProto.INT16}
    small = np.float32(0.001)
    stored = r.node("QuantizeLinear", r.real(), small, **wanted)
    real = r.node("DequantizeLinear", stored, small)
    r.quantised(r.node("Relu", real))


@row
def a_channel_of_zeros(r: Row) -> None:
    stored, scales = r.integers(5, 4, 3, 3), r.scales(5)
    stored[2], scales[2] = 0, 0
    bias = r.integers(5, low=-99, high=99, dtype=np.int32)
    whole = np.zeros(5, np.int32)
    facts = (
        r.weights(stored, scales, np.zeros(5, np.int8), axis=0),
        r.weights(bias, r.scale * scales, whole, axis=0),
    )
    r.quantised(r.node("Conv", r.real(), *facts))


@row
def a_bias_of_float32(r: Row) -> None:
    weights = r.weights(r.integers(5, 4, 3, 3), np.float32(0.003), np.int8(0))
    bias = r.random.normal(0, 1, 5).astype(np.float32)
    r.quantised(r.node("Conv", r.real(), weights, bias))


@row
def weights_in_blocks_of_4_bits(r: Row) -> None:
    stored = r.constant(r.integers(144, 7, low=-8, high=8), TensorProto.INT4)
    blocks: dict[str, Any] = {"axis": 0, "block_size": 16}
    weights = r.node("DequantizeLinear", stored, r.scales(9, 7, size=0.01), **blocks)
    r.quantised(r.node("MatMul", r.flat_real(), weights))


@row
def weights_of_16_bits(r: Row) -> None:
    stored = r.integers(5, 4, 3, 3, low=-30000, high=30000, dtype=np.int16)
    zeros = np.zeros(5, np.int16)
    weights = r.weights(stored, r.scales(5, size=2e-5), zeros, axis=0)
    r.quantised(r.node("Conv", r.real(), weights))


@row
def weights_that_the_graph_quantises(r: Row) -> None:
    facts = (r.scales(5), np.zeros(5, np.int8))
    values = r.random.normal(0, 0.3, (5, 4, 3, 3)).astype(np.float32)
    stored = r.node("QuantizeLinear", values, *facts, axis=0)
    weights = r.node("DequantizeLinear", stored, *facts, axis=0)
    r.quantised(r.node("Conv", r.real(), weights))


@row
def constant_operands(r: Row) -> None:
    stored = r.integers(1, 4, 1, 1, low=0, high=255, dtype=np.uint8)
    facts = (stored, np.float32(0.01), np.uint8(100))
    x = r.quantised(r.node("Add", r.real(), r.weights(*facts)))
    r.quantised(r.node("Mul", r.weights(*facts), x))


@row
def weights_alone(r: Row) -> None:
    facts = (r.integers(5, 4, 3, 3), r.scales(5), np.zeros(5, np.int8))
    r.node("Conv", "image", r.weights(*facts, axis=0))
