"""The operator graph read from ONNX and written as ONNX again: for TVM's importer, and for other runtimes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx
from onnx import helper, numpy_helper

from netship.compile.frontend.absorb import absorb
from netship.compile.frontend.canonical.rules import canonical
from netship.compile.frontend.fold import fold, opset, values
from netship.compile.frontend.quantised.operators import as_qdq
from netship.compile.ir.graph import Graph, Operator, Tensor, constant
from netship.compile.ir.kinds import make
from netship.compile.ir.operators import Scaled


def read(proto: onnx.ModelProto) -> Graph:
    """The operator graph of a model that passed the gate, each operator in the one form that the compiler knows."""
    return _graph(canonical(proto))


def read_as_written(proto: onnx.ModelProto) -> Graph:
    """As `read`, each operator in the model's own form: for other runtimes."""
    return _graph(fold(as_qdq(proto)))


def read_absorbed(proto: onnx.ModelProto) -> Graph:
    """As `read_as_written`, but convolutions have taken in scales, shifts and zeros around them."""
    return _graph(absorb(fold(as_qdq(proto))))


def _graph(clean: onnx.ModelProto) -> Graph:
    known = values(clean.graph)
    tensors = {
        each.name: constant(each.name, numpy_helper.to_array(each))
        for each in clean.graph.initializer
    }

    def tensor(name: str) -> Tensor:
        if name not in tensors:
            dtype, shape = known[name]
            sizes = tuple(size or 0 for size in shape or ())
            stored = helper.tensor_dtype_to_np_dtype(dtype).name
            tensors[name] = Tensor(name, sizes, stored)
        return tensors[name]

    return Graph(
        inputs=tuple(tensor(each.name) for each in clean.graph.input),
        outputs=tuple(tensor(each.name) for each in clean.graph.output),
        operators=tuple(
            make(
                node.op_type,
                node.name,
                [tensor(name) if name else None for name in node.input],
                [tensor(name) for name in node.output if name],
                {a.name: helper.get_attribute_value(a) for a in node.attribute},
            )
            for node in clean.graph.node
        ),
        opset=opset(clean),
    )


def write(graph: Graph, name: str = "graph") -> onnx.ModelProto:
    """The graph in ONNX; of operators that ONNX has."""
    written = [_as_onnx(each) for each in graph.operators]
    constants = {
        each.name: numpy_helper.from_array(each.value, each.name)
        for operator in written
        for each in operator.inputs
        if each is not None and each.value is not None
    }
    made = helper.make_graph(
        [
            helper.make_node(
                each.kind,
                [tensor.name if tensor else "" for tensor in each.inputs],
                [tensor.name for tensor in each.outputs],
                name=each.name,
                **each.attributes,
            )
            for each in written
        ],
        name,
        [_value_info(each) for each in graph.inputs],
        [_value_info(each) for each in graph.outputs],
        list(constants.values()),
        value_info=[
            _value_info(tensor)
            for operator in written
            for tensor in operator.outputs
            if tensor not in graph.outputs
        ],
    )
    return helper.make_model(
        made, opset_imports=[helper.make_opsetid("", graph.opset)], ir_version=8
    )


def _as_onnx(operator: Operator) -> Operator:
    """Scale, zero point and shape as ONNX has them: inputs, where here they are the tensor's own."""
    output = operator.output
    if operator.kind == "Reshape" and len(operator.inputs) == 1:
        if len(output.shape) == 2 and output.shape[0] == operator.input.shape[0]:
            return replace(operator, kind="Flatten")
        added = {"shape": np.array(output.shape, np.int64)}
    elif isinstance(operator, Scaled) and operator.stored.quantisation:
        stored = operator.stored
        added = {
            "scale": np.array(stored.scale, np.float32),
            "zero": np.array(stored.zero, stored.dtype),
        }
    else:
        return operator
    constants = (
        constant(f"{output.name}/{what}", value) for what, value in added.items()
    )
    return replace(operator, inputs=(operator.input, *constants))


def _value_info(tensor: Tensor) -> onnx.ValueInfoProto:
    dtype = helper.np_dtype_to_tensor_dtype(np.dtype(tensor.dtype))
    return helper.make_tensor_value_info(tensor.name, dtype, tensor.shape)
