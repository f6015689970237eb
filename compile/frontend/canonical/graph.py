"""The graph that rules rewrite, and what every rule needs of a node."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from netship.compile.frontend.fold import names_read, opset, values
from netship.compile.frontend.names import fresh_names, node_label
from netship.targets.errors import UserError

# Nodes that rules make in all: 512 steps of ten recurrent layers take 60,000.
_MOST_MADE = 60_000


_MAKE_INFINITY = ("Div", "Log", "Reciprocal")
_FINITE = ("DequantizeLinear", "HardSigmoid", "Sigmoid", "Softmax", "Tanh")


class Graph:
    """A static, folded graph while its nodes are rewritten: shapes, constants, fresh names."""

    def __init__(self, proto: onnx.ModelProto) -> None:
        self.opset, self.made = opset(proto), 0
        self.constants = {tensor.name: tensor for tensor in proto.graph.initializer}
        self.read = names_read(proto.graph)
        self._values = values(proto.graph)
        self._dequantised = {
            node.output[0]: node.input
            for node in proto.graph.node
            if node.op_type == "DequantizeLinear"
        }
        self._infinite = {
            name
            for name, each in self.constants.items()
            if each.data_type == onnx.TensorProto.FLOAT
            and np.isinf(numpy_helper.to_array(each)).any()
        }
        for node in proto.graph.node:
            infinite = not self._infinite.isdisjoint(node.input)
            if node.op_type in _MAKE_INFINITY or (
                infinite and node.op_type not in _FINITE
            ):
                self._infinite.update(node.output)
        self.fresh = fresh_names(
            name for node in proto.graph.node for name in (*node.input, *node.output)
        )

    def shape(self, name: str) -> tuple[int, ...]:
        sizes = self._values[name].sizes
        assert sizes is not None
        return sizes

    def may_be_infinite(self, name: str) -> bool:
        """Whether a float32 tensor can have infinite elements: of a constant, such as an attention's mask, or a quotient."""
        return self.dtype(name) == onnx.TensorProto.FLOAT and name in self._infinite

    def dtype(self, name: str) -> int:
        return self._values[name].dtype

    def constant(self, node: onnx.NodeProto, index: int) -> NDArray[Any] | None:
        """Input ``index`` of ``node``, which may be dequantised; None where the node has none."""
        if index >= len(node.input) or not node.input[index]:
            return None
        value = self._constant(node.input[index])
        if value is None:
            raise refusal(
                node,
                f"input {index} is computed while the model runs; make it a constant and export again",
            )
        return value

    def _constant(self, name: str) -> NDArray[Any] | None:
        if name in self.constants:
            return numpy_helper.to_array(self.constants[name])
        known = [self._constant(each) for each in self._dequantised.get(name, ())]
        # A scale for each channel has no use here.
        if len(known) < 2 or any(x is None or x.size != 1 for x in known[1:]):
            return None
        stored, scale, zero = (*known, np.zeros(1))[:3]
        assert stored is not None and scale is not None and zero is not None
        steps = stored.astype(np.float32) - zero.astype(np.float32)
        return np.asarray(steps * scale)


class Chain:
    """The nodes that take the place of one; inputs are names, or numbers that become constants."""

    def __init__(self, node: onnx.NodeProto, graph: Graph) -> None:
        self._node, self._graph = node, graph
        self.made: list[onnx.NodeProto] = []

    def add(self, op_type: str, *inputs: Any, **attributes: Any) -> str:
        """Add a node; returns the name of its output."""
        output = self._graph.fresh(f"{self._node.output[0]}/{op_type}")
        self._append(op_type, inputs, [output], attributes)
        return output

    def split(self, source: str, axis: int, count: int, size: int) -> list[str]:
        """The ``count`` parts of ``size`` elements of an axis; of several Slices TVM's importer compiles each one's axes."""
        stem = f"{self._node.output[0]}/Split"
        outputs = [self._graph.fresh(stem) for _ in range(count)]
        if count == 1:
            self._append("Identity", [source], outputs, {})
        elif self._graph.opset < 13:
            self._append("Split", [source], outputs, {"axis": axis})
        else:
            self._append("Split", [source, [size] * count], outputs, {"axis": axis})
        return outputs

    def end(
        self, op_type: str, *inputs: Any, outputs: int = 1, **attributes: Any
    ) -> list[onnx.NodeProto]:
        """Add the node that makes the first ``outputs`` of the outputs; returns all nodes."""
        self._append(op_type, inputs, self._node.output[:outputs], attributes)
        return self.made

    def make(self, index: int, op_type: str, *inputs: Any, **attributes: Any) -> None:
        """Add the node that makes the output ``index``."""
        self._append(op_type, inputs, [self._node.output[index]], attributes)

    def _append(self, op_type: str, inputs: Any, outputs: Any, attributes: Any) -> None:
        self._graph.made += 1
        if self._graph.made > _MOST_MADE:
            raise refusal(
                self._node,
                f"the network becomes more than {_MOST_MADE} simple operators; export shorter sequences or "
                "smaller kernels",
            )
        names = [
            each if isinstance(each, str) else self.constant(each, f"{outputs[0]}/in")
            for each in inputs
        ]
        self.made.append(
            helper.make_node(
                op_type, names, outputs, name=self._node.name, **attributes
            )
        )

    def constant(self, value: Any, stem: str = "constant") -> str:
        """The name of a new constant; whole numbers are int64, others float32."""
        array, name = np.asarray(value), self._graph.fresh(stem)
        dtype = np.int64 if array.dtype.kind == "i" else np.float32
        self._graph.constants[name] = numpy_helper.from_array(array.astype(dtype), name)
        return name


Rule = Callable[[onnx.NodeProto, Graph], "list[onnx.NodeProto]"]


def attributes_of(node: onnx.NodeProto) -> dict[str, Any]:
    return {each.name: helper.get_attribute_value(each) for each in node.attribute}


def text_of(attribute: Any) -> str:
    return attribute.decode() if isinstance(attribute, bytes) else str(attribute)


def refusal(node: onnx.NodeProto, why: str) -> UserError:
    return UserError(f"{node_label(node)}: {why}")
