"""``--input-type uint8``: a network that takes the bytes of an image, and scales them itself."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from netship.bundle.manifest import Preprocessing, Scaling
from netship.compile.frontend import gate
from netship.compile.frontend.model import Model
from netship.compile.frontend.names import fresh_names
from netship.targets.errors import UserError


def outside(preprocessing: Preprocessing | None, model: Model) -> Preprocessing:
    """What is left to do before a network that scales the bytes itself: ``preprocessing`` without its scale, mean and std.

    Raises:
        UserError: the model takes no image of float32.
    """
    if preprocessing is None or model.image is None:
        raise UserError(
            "--input-type uint8: the inputs are data, not images; leave it out"
        )
    if model.image.dtype != "float32":
        raise UserError(
            f"--input-type uint8: the input is {model.image.dtype} already; leave it out"
        )
    names = ("scale", "mean", "std")
    own = {name: getattr(preprocessing, name) for name in names}
    inside = Scaling.model_validate({"layout": model.image.layout, **own})
    neutral = {"scale": 1.0, "mean": (0.0,), "std": (1.0,)}
    return preprocessing.model_copy(update={**neutral, "inside": inside})


def taking_bytes(model: Model, scaling: Scaling | None) -> Model:
    """The model with an image [1, height, width, channels] of uint8, which it scales; as it is where ``scaling`` is None.

    Where a QuantizeLinear alone reads the image, the scaling is one function of a byte for each channel, so that it becomes a table.

    Args:
        model: its image is float32.
    """
    image = model.image
    if scaling is None or image is None:
        return model
    proto = onnx.ModelProto()
    proto.CopyFrom(model.proto)
    graph = proto.graph
    readers = [node for node in graph.node if image.name in node.input]
    (given,) = (each for each in graph.input if each.name == image.name)
    given.type.CopyFrom(
        helper.make_tensor_type_proto(
            TensorProto.UINT8, [1, *image.size, image.channels]
        )
    )
    head = _Head(graph)
    pixels = image.name
    if image.layout == "NCHW":
        pixels = head.add("Transpose", [pixels], perm=[0, 3, 1, 2])
    axis = 1 if image.layout == "NCHW" else 3
    factors = np.float64(scaling.scale) / np.array(scaling.std)
    shifts = -np.array(scaling.mean) / np.array(scaling.std)
    if len(set(zip(factors, shifts, strict=True))) == 1:
        factors, shifts = factors[:1], shifts[:1]
    if [each.op_type for each in readers] == ["QuantizeLinear"]:
        real = head.quantised(pixels, axis, factors, shifts, readers[0])
    else:
        real = head.add("Cast", [pixels], to=TensorProto.FLOAT)
        shape = [-1 if each == axis else 1 for each in range(4)]
        constants = (each.reshape(shape) for each in (factors, shifts))
        real = head.scaled(real, *constants)
    for node in readers:
        names = [real if name == image.name else name for name in node.input]
        del node.input[:]
        node.input.extend(names)
    head.put_first()
    return gate.check(proto, model.identity, {}, "NHWC")


class _Head:
    """Nodes before all others of a graph."""

    def __init__(self, graph: onnx.GraphProto) -> None:
        self._graph = graph
        self._nodes: list[onnx.NodeProto] = []
        made = (name for node in graph.node for name in (*node.output, node.name))
        taken = [each.name for each in (*graph.input, *graph.initializer)]
        self._fresh = fresh_names([*taken, *made])

    def add(self, kind: str, inputs: Iterable[str], **attributes: Any) -> str:
        name = self._fresh(f"pixels/{kind}")
        node = helper.make_node(kind, list(inputs), [name], name=name, **attributes)
        self._nodes.append(node)
        return name

    def constant(self, value: Any) -> str:
        name = self._fresh("pixels/constant")
        self._graph.initializer.append(numpy_helper.from_array(np.asarray(value), name))
        return name

    def scaled(self, real: str, factor: Any, shift: Any) -> str:
        real = self.add("Mul", [real, self.constant(np.float32(factor))])
        return self.add("Add", [real, self.constant(np.float32(shift))])

    def quantised(
        self, pixels: str, axis: int, factors: Any, shifts: Any, reader: onnx.NodeProto
    ) -> str:
        """The real values that ``reader`` quantises; of unlike channels each quantised as it does."""
        one, zero = self.constant(np.float32(1)), self.constant(np.uint8(0))
        real = self.add("DequantizeLinear", [pixels, one, zero])
        if len(factors) == 1:
            return self.scaled(real, factors[0], shifts[0])
        parts = []
        for index, each in enumerate(zip(factors, shifts, strict=True)):
            bounds = ([index], [index + 1], [axis])
            part = self.add(
                "Slice", [real, *(self.constant(np.array(x, np.int64)) for x in bounds)]
            )
            scales = list(reader.input[1:])
            whole = self.add("QuantizeLinear", [self.scaled(part, *each), *scales])
            parts.append(self.add("DequantizeLinear", [whole, *scales]))
        return self.add("Concat", parts, axis=axis)

    def put_first(self) -> None:
        nodes = [*self._nodes, *self._graph.node]
        del self._graph.node[:]
        self._graph.node.extend(nodes)
