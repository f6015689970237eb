"""A model being written again: its constants, its new nodes, fresh names."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from netship.compile.frontend.fold import constant_value, is_onnx, with_nodes
from netship.compile.frontend.names import Unfit, fresh_names, node_label
from netship.targets.escapes import shown

Array = NDArray[Any]


class Writer:
    """A copy of a model while its nodes are rewritten one by one.

    Attributes:
        constants: by their names, those of the model and new ones.
        made: the new nodes.
    """

    def __init__(self, proto: onnx.ModelProto) -> None:
        self.proto = proto
        graph = proto.graph
        self.constants = {each.name: each for each in graph.initializer}
        self.constants |= {
            node.output[0]: value
            for node in graph.node
            if node.op_type == "Constant" and (value := constant_value(node))
        }
        self.fresh = fresh_names(
            [*self.constants, *(each.name for each in graph.input)]
            + [name for node in graph.node for name in node.output]
        )
        self.made: list[onnx.NodeProto] = []

    def finish(self, plain: bool) -> onnx.ModelProto:
        """The model of the new nodes.

        Args:
            plain: only ONNX's own operators are left.
        """
        model = with_nodes(self.proto, self.made, self.constants)
        del model.graph.value_info[:]
        if plain:
            imports = [each for each in model.opset_import if is_onnx(each.domain)]
            del model.opset_import[:]
            model.opset_import.extend(imports)
        return model

    def add(
        self, kind: str, inputs: Any, output: str, name: str = "", **attributes: Any
    ) -> None:
        self.made.append(
            helper.make_node(kind, list(inputs), [output], name, **attributes)
        )

    def step(self, node: onnx.NodeProto, kind: str, *inputs: Any) -> str:
        """An operator of float32; returns its output's name."""
        output = self.fresh(f"{node.output[0]}/{kind}")
        names = [
            each
            if isinstance(each, str)
            else self.constant(np.asarray(each, np.float32), node)
            for each in inputs
        ]
        self.add(kind, names, output)
        return output

    def constant(self, value: Array, node: onnx.NodeProto) -> str:
        name = self.fresh(f"{node.output[0]}/constant")
        self.constants[name] = numpy_helper.from_array(np.asarray(value), name)
        return name

    def flat(self, name: str, node: onnx.NodeProto) -> str:
        """A constant with one axis."""
        value = self.constants.get(name)
        if value is None or len(value.dims) == 1:
            return name
        return self.constant(numpy_helper.to_array(value).ravel(), node)

    def fold(self, node: onnx.NodeProto, value: Array) -> None:
        """A constant in the place of the node."""
        name = node.output[0]
        self.constants[name] = numpy_helper.from_array(value, name)

    def array(self, node: onnx.NodeProto, place: int) -> Array:
        """The constant that an input is.

        Raises:
            Unfit: it is computed.
        """
        return self.array_of(input_of(node, place), node)

    def array_of(self, name: str, node: onnx.NodeProto) -> Array:
        """As `array`, of the constant's name."""
        if name not in self.constants:
            raise Unfit(
                f"{node_label(node)}: {shown(name)!r} is computed while the model runs; quantise statically, so that "
                "scales and zero points are constants"
            )
        return numpy_helper.to_array(self.constants[name])


def input_of(node: onnx.NodeProto, place: int) -> str:
    """The name of an input; empty where it is left out."""
    return node.input[place] if place < len(node.input) else ""


def attributes_of(node: onnx.NodeProto) -> dict[str, Any]:
    return {each.name: helper.get_attribute_value(each) for each in node.attribute}
