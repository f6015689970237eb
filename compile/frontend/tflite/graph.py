"""The ONNX graph that is made of a .tflite file: which order the axes of each tensor have, quantisation, names.

Images have channels last in the file and first in ONNX. Each tensor of four axes is made in one of the two orders, and
transposed where an operator wants the other. Of a quantised tensor every reader gets what DequantizeLinear makes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from netship.compile.frontend.fold import with_nodes
from netship.compile.frontend.model_file import MAX_MODEL_BYTES
from netship.compile.frontend.names import Unfit, fresh_names
from netship.compile.frontend.tflite.reader import Array, File, Operator, Quantisation

OPSET = 22
_IR_VERSION = 10
Order = Literal["file", "NCHW"]
# Axes of [N, H, W, C] in the order of [N, C, H, W], and back.
TO_NCHW = (0, 3, 1, 2)
TO_NHWC = (0, 2, 3, 1)


@dataclass
class Made:
    """What the graph has of a tensor: its names by the order of the axes, real and stored values."""

    order: Order
    real: dict[Order, str] = field(default_factory=dict)
    stored: dict[Order, str] = field(default_factory=dict)


class Builder:
    """The graph in the making. Indices are those of the file's tensors."""

    def __init__(self, file: File) -> None:
        self.file = file
        self.tensors = list(file.tensors)
        self.nodes: list[onnx.NodeProto] = []
        self.constants: dict[str, TensorProto] = {}
        self.made: dict[int, Made] = {}
        self.makers = {
            index: operator for operator in file.operators for index in operator.outputs
        }
        self.readers: dict[int, list[Operator]] = {}
        for operator in file.operators:
            for index in operator.inputs:
                self.readers.setdefault(index, []).append(operator)
        self._fresh = fresh_names(())
        self._named = fresh_names(())
        self._bytes = 0
        self._scales: dict[int, tuple[str, str]] = {}
        self._held: dict[tuple[int, Order], str] = {}
        self._names = {
            index: self._fresh(self.tensors[index].name or f"tensor {index}")
            for index in (*file.inputs, *file.outputs)
        }
        # The last node of an operator under conversion, by its output: it may get that of the file's tensor.
        self._unnamed: dict[str, onnx.NodeProto] = {}
        self._current = ""
        for index in file.inputs:
            self.made[index] = Made("file")
        # Inputs that an operator reads in the file's order of axes.
        self._flattened = {
            index
            for operator in file.operators
            if operator.kind in ("RESHAPE", "FULLY_CONNECTED")
            for index in operator.inputs
        }

    # Names and nodes.

    def name(self, index: int) -> str:
        """The ONNX name of a tensor: its name in the file, made unique."""
        if index not in self._names:
            self._names[index] = self._fresh(
                self.tensors[index].name or f"tensor {index}"
            )
        return self._names[index]

    def begin(self, operator: Operator) -> None:
        """From here on nodes are made for ``operator``."""
        self._current = self.name(operator.outputs[0])
        self._unnamed.clear()

    def node(
        self,
        op_type: str,
        *inputs: str,
        output: str = "",
        label: str = "",
        **attributes: Any,
    ) -> str:
        """Add a node of one output; returns that output's name."""
        (made,) = self.split(
            op_type, *inputs, outputs=[output], label=label, **attributes
        )
        return made

    def split(
        self,
        op_type: str,
        *inputs: str,
        outputs: Sequence[str],
        label: str = "",
        **attributes: Any,
    ) -> list[str]:
        """Add a node of several outputs; an empty name is replaced by a new one."""
        names = [each or self._fresh(f"{self._current}/{op_type}") for each in outputs]
        made = helper.make_node(
            op_type,
            list(inputs),
            names,
            name=self._named(label or self._current or names[0]),
            **attributes,
        )
        self.nodes.append(made)
        self._unnamed |= {
            name: made for name, given in zip(names, outputs, strict=True) if not given
        }
        return names

    def constant(self, value: Array, stem: str = "") -> str:
        """The name of a new constant."""
        self._bytes += value.nbytes
        if self._bytes > MAX_MODEL_BYTES:
            raise Unfit(
                f"its constants take more than the {MAX_MODEL_BYTES} bytes allowed for a model"
            )
        name = self._fresh(stem or f"{self._current}/constant")
        self.constants[name] = numpy_helper.from_array(np.asarray(value), name)
        return name

    def integers(self, *values: int) -> str:
        """A vector of int64."""
        return self.constant(np.array(values, np.int64))

    def number(self, value: float, like: str = "") -> str:
        """A single float32."""
        return self.constant(np.array(value, np.float32), like)

    # Values of the file's tensors.

    def shape(self, index: int) -> tuple[int, ...]:
        return self.tensors[index].shape

    def is_constant(self, index: int) -> bool:
        return self.tensors[index].value is not None

    def value(self, index: int) -> Array:
        """Stored values of a constant."""
        value = self.tensors[index].value
        if value is None:
            raise Unfit(
                f"{self.tensors[index].label}: is computed while the model runs, need a constant; "
                "convert with fixed sizes"
            )
        return value

    def fold(self, index: int, value: Array) -> None:
        """The tensor ``index`` is a constant."""
        tensor = self.tensors[index]
        self._check_new(index)
        self.tensors[index] = replace(tensor, value=value.astype(tensor.dtype))

    def is_image(self, index: int) -> bool:
        """Whether the graph has a tensor of four axes with the channels first."""
        if self.is_constant(index) or len(self.shape(index)) != 4:
            return False
        if index in self.file.inputs:
            return index not in self._flattened
        return self._of(index).order == "NCHW"

    def _of(self, index: int) -> Made:
        if index not in self.made:
            raise Unfit(
                f"{self.tensors[index].label}: is read before an operator makes it; convert it again"
            )
        return self.made[index]

    def plain(self, index: int) -> str:
        """The real values with the axes in the file's order."""
        return self._real(index, "file")

    def image(self, index: int) -> str:
        """The real values of four axes with the channels first."""
        if len(self.shape(index)) != 4:
            raise Unfit(
                f"{self.tensors[index].label}: has {len(self.shape(index))} axes, need an image of 4"
            )
        return self._real(index, "NCHW")

    def either(self, index: int) -> tuple[str, Order]:
        """The real values in the order of axes that the graph has."""
        order: Order = "NCHW" if self.is_image(index) else "file"
        return self._real(index, order), order

    def in_memory(self, index: int) -> str:
        """The real values in a shape of any order of axes, whose elements follow each other as in the file."""
        moves = self.is_image(index) and not _is_view(self.shape(index))
        return self.plain(index) if moves else self.either(index)[0]

    def broadcast(self, index: int, order: Order) -> str:
        """The real values for an operator that broadcasts to an output in ``order``."""
        shape = self.shape(index)
        if order == "file" or len(shape) == 4:
            return self._real(index, order)
        if self.is_constant(index):
            single = self.tensors[index].value
            assert single is not None
            return self._constant(index, "file" if single.size == 1 else "NCHW")
        whole = (1,) * (4 - len(shape)) + shape
        made = self.plain(index)
        if not _is_view(whole):
            made = self.moved(index, "Reshape", made, self.integers(*whole))
        return self._as_image(index, made, whole)

    def _real(self, index: int, order: Order) -> str:
        if self.is_constant(index):
            return self._constant(index, order)
        made = self._of(index)
        if order not in made.real:
            if index in self.file.inputs:
                self._input(index, order)
            else:
                made.real[order] = self._in_other_order(index, order)
        return made.real[order]

    def _input(self, index: int, order: Order) -> None:
        """An input in an order: it is transposed before it is quantised."""
        name = self.name(index)
        if order == "NCHW":
            output = self._fresh(f"{name}/NCHW")
            name = self.node(
                "Transpose", name, output=output, label=output, perm=TO_NCHW
            )
        self.made[index].real[order] = name
        if self.tensors[index].quantised:
            self._quantised(index, name, order, self._fresh(f"{name}/dequantized"))

    def _in_other_order(self, index: int, order: Order) -> str:
        made, shape = self.made[index], self.shape(index)
        name = made.real[made.order]
        if order == "NCHW":
            return self._as_image(index, name, shape)
        if _is_view(shape):
            return self.moved(index, "Reshape", name, self.integers(*shape))
        return self.moved(index, "Transpose", name, perm=TO_NHWC)

    def _as_image(self, index: int, name: str, shape: tuple[int, ...]) -> str:
        """Of values in the shape [N, H, W, C], or of as many, those with the channels first."""
        n, h, w, c = shape
        if _is_view(shape):
            return self.moved(index, "Reshape", name, self.integers(n, c, h, w))
        return self.moved(index, "Transpose", name, perm=TO_NCHW)

    def moved(self, index: int, op_type: str, *inputs: str, **attributes: Any) -> str:
        """What an operator makes that only moves the values of a tensor."""
        return self.requantised(index, self.node(op_type, *inputs, **attributes))

    def requantised(self, index: int, made: str) -> str:
        """Values of a tensor stored again as the tensor is.

        Every operator then reads and makes stored values, and becomes one of integers (compile/passes/integers.py).
        """
        if not self.tensors[index].quantised:
            return made
        scale, zero = self._scale(index)
        stored = self.node("QuantizeLinear", made, scale, zero)
        return self.node("DequantizeLinear", stored, scale, zero)

    def _constant(self, index: int, order: Order) -> str:
        if (index, order) not in self._held:
            self._held[index, order] = self._new_constant(index, order)
        return self._held[index, order]

    def _new_constant(self, index: int, order: Order) -> str:
        tensor = self.tensors[index]
        assert tensor.value is not None
        value, facts = tensor.value, tensor.quantisation
        if not tensor.quantised or facts is None or facts.scale.size > 1:
            value, facts = tensor.real, None
        if order == "NCHW":
            whole = value.reshape((1,) * (4 - value.ndim) + value.shape)
            value = whole.transpose(TO_NCHW)
        if facts is None:
            return self.constant(value, tensor.name)
        return self.dequantised(value, facts, tensor.name)

    def dequantised(self, stored: Array, facts: Quantisation, stem: str) -> str:
        """The real values of stored constants, as int8 without a zero point where they are in its range."""
        zero, stem = facts.zero, stem or f"{self._current}/constant"
        is_byte = stored.dtype.itemsize == 1
        if is_byte and zero.size == 1:
            steps = stored.astype(np.int16) - zero
            if steps.min() >= -128 and steps.max() <= 127:
                stored, zero = steps.astype(np.int8), np.zeros(1, np.int64)
        single = facts.scale.size == 1
        scale = facts.scale[0] if single else facts.scale
        inputs = [
            self.constant(stored, f"{stem}/stored"),
            self.constant(np.asarray(scale, np.float32), f"{stem}/scale"),
        ]
        if is_byte:
            zeros = zero[0] if single else np.broadcast_to(zero, facts.scale.shape)
            inputs.append(
                self.constant(np.asarray(zeros, stored.dtype), f"{stem}/zero")
            )
        axis = {} if single else {"axis": facts.axis}
        output = self._fresh(stem)
        return self.node("DequantizeLinear", *inputs, output=output, label=stem, **axis)

    # What operators make.

    def define(self, index: int, made: str, order: Order = "file") -> None:
        """The tensor ``index`` is what the node behind ``made`` gives, quantised where the file says so."""
        tensor = self.tensors[index]
        self._check_new(index)
        self.made[index] = Made(order)
        name = self.name(index)
        if order == "NCHW" and index in self.file.outputs:
            name = self._fresh(f"{name}/NCHW")
        if tensor.quantised:
            self._quantised(index, made, order, name)
            return
        node = self._unnamed.pop(made, None)
        if node is None:
            self.node("Identity", made, output=name)
        else:
            node.output[list(node.output).index(made)] = name
        self.made[index].real[order] = name

    def _check_new(self, index: int) -> None:
        if index in self.made or self.is_constant(index):
            label = self.tensors[index].label
            raise Unfit(f"{label}: is made twice; convert it again")

    def _quantised(self, index: int, real: str, order: Order, name: str) -> None:
        scale, zero = self._scale(index)
        stored = self.node(
            "QuantizeLinear", real, scale, zero, label=f"{name}/QuantizeLinear"
        )
        label = f"{name}/DequantizeLinear"
        self.node("DequantizeLinear", stored, scale, zero, output=name, label=label)
        self.made[index].real[order] = name
        self.made[index].stored[order] = stored

    def dequantise(self, index: int) -> tuple[str, Order]:
        """A DequantizeLinear of its own of a quantised tensor, and its order of axes."""
        _, order = self.either(index)
        if not self.tensors[index].quantised:
            raise Unfit(
                f"{self.tensors[index].label}: has no stored values to dequantise; convert to float32 or int8"
            )
        stored = self.made[index].stored[order]
        return self.node("DequantizeLinear", stored, *self._scale(index)), order

    def _scale(self, index: int) -> tuple[str, str]:
        """The names of an activation's scale and zero point."""
        tensor = self.tensors[index]
        facts = tensor.quantisation
        assert facts is not None
        if facts.scale.size > 1:
            raise Unfit(
                f"{tensor.label}: has a scale for each channel of an activation; quantise per tensor"
            )
        if index not in self._scales:
            name = self.name(index)
            self._scales[index] = (
                self.constant(facts.scale[0], f"{name}/scale"),
                self.constant(facts.zero[0].astype(tensor.dtype), f"{name}/zero"),
            )
        return self._scales[index]

    def same_scale(self, first: int, second: int) -> bool:
        """Whether two tensors store real values alike."""
        a, b = (self.tensors[index].quantisation for index in (first, second))
        if a is None or b is None:
            return a is b
        return bool(np.array_equal(a.scale, b.scale) and np.array_equal(a.zero, b.zero))

    def finished(self) -> onnx.ModelProto:
        """The whole model, without what no output needs."""
        file = self.file
        for index in dict.fromkeys(file.outputs):
            if index in file.inputs or self.is_constant(index):
                raise Unfit(
                    f"{self.tensors[index].label}: no operator makes this output; convert the whole network"
                )
            self._named_as_output(index)
        graph = helper.make_graph(
            [],
            "main",
            [self._info(index) for index in file.inputs],
            [self._info(index) for index in dict.fromkeys(file.outputs)],
        )
        proto = helper.make_model(
            graph,
            ir_version=_IR_VERSION,
            opset_imports=[helper.make_opsetid("", OPSET)],
        )
        return with_nodes(proto, self.nodes, self.constants)

    def _named_as_output(self, index: int) -> None:
        """The tensor in the file's order under its own name."""
        name, made = self.name(index), self.made.get(index)
        self._current = name
        # A node that others read already keeps the name of its output.
        self._unnamed.clear()
        last = self.plain(index)
        if made is not None and made.order == "NCHW":
            node = self._unnamed.pop(last, None)
            if node is None:
                self.node("Identity", last, output=name)
            else:
                node.output[0] = made.real["file"] = name

    def _info(self, index: int) -> onnx.ValueInfoProto:
        tensor = self.tensors[index]
        dtype = np.dtype(np.float32) if tensor.quantised else tensor.dtype
        number = helper.np_dtype_to_tensor_dtype(dtype)
        return helper.make_tensor_value_info(self.name(index), number, tensor.shape)


def _is_view(shape: tuple[int, ...]) -> bool:
    """Whether [N, H, W, C] and [N, C, H, W] are the same in memory."""
    return shape[3] == 1 or shape[1] == shape[2] == 1
