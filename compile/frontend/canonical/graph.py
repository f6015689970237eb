"""The graph that rules rewrite, and what every rule needs of a node."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from compile.frontend.fold import Value, opset, values
from compile.frontend.names import node_label
from targets.errors import UserError


class Graph:
    """A static, folded graph while its nodes are rewritten: shapes, constants, fresh names."""

    def __init__(self, proto: onnx.ModelProto) -> None:
        self.opset = opset(proto)
        self.constants = {tensor.name: tensor for tensor in proto.graph.initializer}
        self.read = {name for node in proto.graph.node for name in node.input}
        self.read.update(output.name for output in proto.graph.output)
        self._values: dict[str, Value] = values(proto.graph)
        self._taken = {
            name for node in proto.graph.node for name in (*node.input, *node.output)
        }

    def shape(self, name: str) -> tuple[int, ...]:
        shape = self._values[name].shape
        if shape is None:
            raise KeyError(name)
        return tuple(dim or 0 for dim in shape)

    def constant(self, node: onnx.NodeProto, index: int) -> NDArray[Any] | None:
        """Input ``index`` of ``node``; None where the node has none.

        Raises:
            UserError: the input is computed while the model runs.
        """
        if index >= len(node.input) or not node.input[index]:
            return None
        tensor = self.constants.get(node.input[index])
        if tensor is None:
            raise UserError(
                f"{node_label(node)}: input {index} is computed while the model runs; "
                "make it a constant and export again"
            )
        return numpy_helper.to_array(tensor)

    def fresh(self, stem: str) -> str:
        number = 0
        while (name := f"{stem}/{number}") in self._taken:
            number += 1
        self._taken.add(name)
        return name

    def add_constant(self, stem: str, value: Any, dtype: Any) -> str:
        name = self.fresh(stem)
        self.constants[name] = numpy_helper.from_array(np.asarray(value, dtype), name)
        return name


Rule = Callable[[onnx.NodeProto, Graph], "list[onnx.NodeProto]"]


def attributes_of(node: onnx.NodeProto) -> dict[str, Any]:
    return {each.name: helper.get_attribute_value(each) for each in node.attribute}


def make_node(
    original: onnx.NodeProto,
    op_type: str,
    inputs: Sequence[str],
    outputs: Sequence[str],
    **attributes: Any,
) -> onnx.NodeProto:
    return helper.make_node(op_type, inputs, outputs, name=original.name, **attributes)


def text_of(attribute: Any) -> str:
    return attribute.decode() if isinstance(attribute, bytes) else str(attribute)


def refusal(node: onnx.NodeProto, why: str) -> UserError:
    return UserError(f"{node_label(node)}: {why}")
