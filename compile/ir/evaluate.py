"""The operator graph in numpy: the numbers that every backend is held against."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
from onnx.reference import ReferenceEvaluator

from netship.compile.ir import onnx_form
from netship.compile.ir.graph import Array, Graph, Operator
from netship.compile.ir.operators import Known
from netship.targets.errors import UserError
from netship.targets.onnx_runtime import Session


def run(graph: Graph, *inputs: Array) -> list[Array]:
    """One inference: every output of the network, of its inputs in their order."""
    names = (tensor.name for tensor in graph.inputs)
    values = evaluate(graph, dict(zip(names, inputs, strict=True)))
    return [values[tensor.name] for tensor in graph.outputs]


def evaluate(graph: Graph, inputs: Mapping[str, Array]) -> dict[str, Array]:
    """Every tensor of the network that is no constant, by its name, as it is stored."""
    values = dict(inputs)
    for operator in graph.operators:
        values |= apply(operator, values, graph.opset)
    return values


def apply(
    operator: Operator, values: Mapping[str, Array], opset: int = 22
) -> dict[str, Array]:
    """The outputs of one operator, by their names."""
    given: dict[str, Any] = {
        tensor.name: values.get(tensor.name, operator.constant(index))
        for index, tensor in enumerate(operator.inputs)
        if tensor is not None
    }
    if isinstance(operator, Known):
        inputs = [given[tensor.name] for tensor in operator.inputs if tensor]
        made = [operator.evaluate(*inputs)]
    else:
        # One may be read twice.
        read = tuple(dict.fromkeys(operator.activations))
        alone = Graph(read, operator.outputs, (operator,), opset)
        free = {tensor.name: given[tensor.name] for tensor in read}
        made = _alone(onnx_form.write(alone), operator, free)
    # A value that float32 has no room for is infinite.
    with np.errstate(over="ignore"):
        return {
            tensor.name: np.asarray(value, tensor.dtype).reshape(tensor.shape)
            for tensor, value in zip(operator.outputs, made, strict=True)
        }


def _alone(
    proto: onnx.ModelProto, operator: Operator, inputs: Mapping[str, Array]
) -> list[Array]:
    """By ONNX Runtime: ONNX's reference evaluator has faults, such as in LRN, and in Pad that cuts."""
    try:
        session = Session(proto.SerializeToString(), operator.label)
        return session.run([each.name for each in operator.outputs], inputs)
    except UserError:
        # It lacks some operators on int8.
        if operator.output.dtype == "float32":
            raise
    with np.errstate(all="ignore"):
        results: Any = ReferenceEvaluator(proto).run(None, dict(inputs))
        return list(results)
