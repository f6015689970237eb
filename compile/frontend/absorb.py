"""Convolutions take in what surrounds them: a scale and a shift of each channel after them, zeros around their input.

Keras's graphs are full of both: batch normalisation as Mul and Add, and the padding of a strided convolution as Pad.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, numpy_helper

from netship.compile.frontend.canonical.graph import attributes_of, text_of
from netship.compile.frontend.fold import infer, with_nodes
from netship.compile.frontend.names import fresh_names

Array = NDArray[np.float32]


def absorb(proto: onnx.ModelProto) -> onnx.ModelProto:
    """The same function with fewer nodes; weights are products that were computed beforehand.

    Args:
        proto: folded: constants are initialisers. Float32 convolutions with constant weights are looked at.
    """
    graph = _Graph(proto.graph)
    for node in graph.nodes:
        if node.op_type == "Pad":
            graph.absorb_zeros(node)
        elif node.op_type in ("Add", "Div", "Mul", "Sub"):
            graph.absorb_numbers(node)
    if not graph.gone:
        return proto
    left = [node for node in graph.nodes if id(node) not in graph.gone]
    return infer(with_nodes(proto, left, graph.constants))


class _Graph:
    """A graph while nodes of it go.

    Attributes:
        nodes: copies, those that are gone included.
        gone: of which nodes, by Python's ``id``.
        constants: all initialisers, and what was computed of them.
    """

    def __init__(self, graph: onnx.GraphProto) -> None:
        self.nodes = [onnx.NodeProto() for _ in graph.node]
        for copy, node in zip(self.nodes, graph.node, strict=True):
            copy.CopyFrom(node)
        self.gone: set[int] = set()
        self.constants = {each.name: each for each in graph.initializer}
        self._makers = {name: node for node in self.nodes for name in node.output}
        self._readers: dict[str, list[onnx.NodeProto]] = {}
        for node in self.nodes:
            for name in node.input:
                self._readers.setdefault(name, []).append(node)
        self._results = {each.name for each in graph.output}
        self._fresh = fresh_names([*self.constants, *self._makers, *self._readers])

    def absorb_numbers(self, node: onnx.NodeProto) -> None:
        """A number, or one a channel, that the result of a convolution meets: its own weights and biases."""
        constants = [self._constant(name) for name in node.input]
        place = next((k for k, each in enumerate(constants) if each is not None), -1)
        convolution = self._makers.get(node.input[1 - place]) if place >= 0 else None
        if convolution is None or (place == 0 and node.op_type in ("Div", "Sub")):
            return
        weights, bias = self._of(convolution)
        number = constants[place]
        if weights is None or bias is None or number is None:
            return
        channels, rank = weights.shape[0], weights.ndim
        shape = (1,) * (rank - number.ndim) + number.shape
        if number.ndim > rank or shape not in (
            (1,) * rank,
            (1, channels, *(1,) * (rank - 2)),
        ):
            return
        row = np.broadcast_to(number.ravel(), channels)
        if node.op_type in ("Add", "Sub"):
            bias = bias + row if node.op_type == "Add" else bias - row
        else:
            with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
                factor = row if node.op_type == "Mul" else np.float32(1) / row
                weights = weights * factor.reshape(-1, *(1,) * (rank - 1))
                bias = bias * factor
        if not (np.isfinite(weights).all() and np.isfinite(bias).all()):
            return
        result = node.output[0]
        del convolution.input[1:]
        convolution.input.extend(
            [self._add(f"{result}/weights", weights), self._add(f"{result}/bias", bias)]
        )
        convolution.output[0] = result
        self._makers[result] = convolution
        self.gone.add(id(node))

    def absorb_zeros(self, node: onnx.NodeProto) -> None:
        """Zeros around an image that only a convolution reads: more padding of its own."""
        readers = self._readers.get(node.output[0], [])
        if len(readers) != 1 or node.output[0] in self._results:
            return
        (reader,) = readers
        attributes, its = attributes_of(node), attributes_of(reader)
        pads = self._pads(node)
        if (
            reader.op_type != "Conv"
            or reader.input[0] != node.output[0]
            or text_of(its.get("auto_pad", "NOTSET")) not in ("NOTSET", "VALID")
            or text_of(attributes.get("mode", "constant")) != "constant"
            or pads is None
            or min(pads) < 0
        ):
            return
        rank = len(pads) // 2
        before, after = pads[:rank], pads[rank:]
        if any((*before[:2], *after[:2])):
            return
        own = its.get("pads") or [0] * (2 * (rank - 2))
        total = [a + b for a, b in zip([*before[2:], *after[2:]], own, strict=True)]
        for name in ("pads", "auto_pad"):
            for attribute in [a for a in reader.attribute if a.name == name]:
                reader.attribute.remove(attribute)
        reader.attribute.append(onnx.helper.make_attribute("pads", total))
        reader.input[0] = node.input[0]
        self.gone.add(id(node))

    def _pads(self, node: onnx.NodeProto) -> list[int] | None:
        """Of all axes; None where they are not known, or what is padded with is not 0."""
        attributes = attributes_of(node)
        if "pads" in attributes or "paddings" in attributes:
            if attributes.get("value", 0.0) != 0:
                return None
            return list(attributes.get("pads") or attributes["paddings"])
        if any(node.input[3:]) or len(node.input) < 2:
            return None
        value = self._number(node.input[2]) if any(node.input[2:3]) else np.zeros(1)
        pads = self._number(node.input[1])
        if pads is None or value is None or value.any():
            return None
        return [int(each) for each in pads]

    def _of(self, node: onnx.NodeProto) -> tuple[Array | None, Array | None]:
        """Weights and biases of a convolution whose result one node reads; None where it is none."""
        result = node.output[0]
        if (
            node.op_type != "Conv"
            or len(self._readers.get(result, [])) != 1
            or result in self._results
        ):
            return None, None
        weights = self._constant(node.input[1])
        if weights is None:
            return None, None
        if len(node.input) < 3 or not node.input[2]:
            return weights, np.zeros(weights.shape[0], np.float32)
        return weights, self._constant(node.input[2])

    def _constant(self, name: str) -> Array | None:
        tensor = self.constants.get(name)
        if tensor is None or tensor.data_type != TensorProto.FLOAT:
            return None
        return numpy_helper.to_array(tensor)

    def _number(self, name: str) -> NDArray[Any] | None:
        tensor = self.constants.get(name)
        return None if tensor is None else numpy_helper.to_array(tensor)

    def _add(self, name: str, values: Array) -> str:
        whole = np.ascontiguousarray(values, np.float32)
        tensor = numpy_helper.from_array(whole, self._fresh(name))
        self.constants[tensor.name] = tensor
        return tensor.name
