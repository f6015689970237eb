"""One form for what exporters write in several: identities, fully connected layers, means, limits."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from netship.compile.ir.evaluate import apply
from netship.compile.ir.graph import Graph, Operator, Tensor, constant
from netship.compile.ir.kinds import make
from netship.compile.ir.operators import (
    Convolution,
    Dense,
    Dequantise,
    Limited,
    Quantise,
    View,
)
from netship.compile.ir.pointwise import Pointwise


def drop_identities(graph: Graph) -> Graph:
    """Without the operators that give their input back; a view of a view is one."""
    outputs = {tensor.name for tensor in graph.outputs}
    same: dict[str, Tensor] = {}
    kept: dict[str, Operator] = {}
    for operator in graph.operators:
        operator = operator.with_tensors(same)
        if isinstance(operator, View):
            before = kept.get(operator.input.name)
            if isinstance(before, View) and not operator.attributes.get("order"):
                order = before.attributes.get("order", "")
                operator = replace(operator, inputs=before.inputs)
                operator = operator.with_attributes(order=order) if order else operator
            moves = operator.attributes.get("order")
            is_identity = not moves and operator.input.shape == operator.output.shape
        else:
            is_identity = operator.kind == "Identity"
        if is_identity and operator.output.name not in outputs:
            same[operator.output.name] = operator.input
        else:
            kept[operator.outputs[0].name] = operator
    return graph.with_operators(kept.values())


def fold_constants(graph: Graph) -> Graph:
    """Values in the place of operators that read nothing else."""
    known: dict[str, Tensor] = {}
    kept = []
    for operator in graph.operators:
        operator = operator.with_tensors(known)
        if operator.activations:
            kept.append(operator)
            continue
        values = apply(operator, {}, graph.opset)
        known |= {
            each.name: replace(each, value=values[each.name])
            for each in operator.outputs
        }
    return graph.with_tensors(known).with_operators(kept)


def matmul_as_gemm(graph: Graph) -> Graph:
    """A row times a constant matrix is a fully connected layer."""

    def rule(operator: Operator) -> list[Operator] | None:
        if operator.kind != "MatMul" or operator.constant(1) is None:
            return None
        if any(tensor and len(tensor.shape) != 2 for tensor in operator.inputs):
            return None
        return [make("Gemm", operator.name, operator.inputs, operator.outputs)]

    return graph.rewritten(rule)


def one_dimension_as_two(graph: Graph) -> Graph:
    """A convolution over one axis is one over an image of one row, between two views."""
    fresh = graph.fresh_names()

    def rule(operator: Operator) -> list[Operator] | None:
        weights = operator.inputs[1] if len(operator.inputs) > 1 else None
        if operator.kind != "Conv" or len(operator.input.shape) != 3:
            return None
        if weights is None or weights.value is None:
            return None
        row, made = (
            replace(
                each,
                name=fresh(f"{each.name}/row"),
                shape=(*each.shape[:2], 1, each.shape[2]),
            )
            for each in (operator.input, operator.output)
        )
        begin, end = operator.attributes.get("pads") or (0, 0)
        attributes = {
            **operator.attributes,
            "kernel_shape": (1, weights.shape[2]),
            "strides": (1, *(operator.attributes.get("strides") or (1,))),
            "dilations": (1, *(operator.attributes.get("dilations") or (1,))),
            "pads": (0, begin, 0, end),
        }
        kernel = replace(
            weights,
            name=fresh(f"{weights.name}/row"),
            shape=(*weights.shape[:2], 1, weights.shape[2]),
            value=weights.value[:, :, None],
        )
        inputs = (row, kernel, *operator.inputs[2:])
        return [
            make("Reshape", "", [operator.input], [row]),
            make("Conv", operator.name, inputs, [made], attributes),
            make("Reshape", "", [made], operator.outputs),
        ]

    return drop_identities(graph.rewritten(rule))


def matmul_as_convolution(graph: Graph) -> Graph:
    """Rows of one image times a matrix of integers, between quantised values, are a 1×1 convolution of as many pixels."""
    fresh = graph.fresh_names()

    def rule(operator: Operator) -> list[Operator] | None:
        if operator.kind != "MatMul" or operator.constant(1) is None:
            return None
        source, output, weights = operator.input, operator.output, operator.inputs[1]
        assert weights is not None and weights.value is not None
        facts = weights.quantisation
        if len(source.shape) != 3 or source.shape[0] != 1 or len(weights.shape) != 2:
            return None
        quantised = isinstance(graph.makers.get(source.name), Dequantise)
        quantised &= isinstance(graph.only_reader(output), Quantise)
        if not quantised or facts is None or facts.axis not in (None, 1):
            return None
        if facts.axis is not None:
            facts = replace(facts, axis=0)
        kernel = np.ascontiguousarray(weights.value.T[:, :, None, None])
        rows, into, out = source.shape[1], *weights.shape
        columns, image = (
            replace(source, name=fresh(f"{source.name}/{name}"), shape=shape)
            for name, shape in (
                ("columns", (1, into, rows)),
                ("image", (1, into, rows, 1)),
            )
        )
        sums, flat = (
            replace(output, name=fresh(f"{output.name}/{name}"), shape=shape)
            for name, shape in (
                ("image", (1, out, rows, 1)),
                ("columns", (1, out, rows)),
            )
        )
        named = constant(fresh(f"{weights.name}/kernel"), kernel, facts)
        turned = {"perm": [0, 2, 1]}
        return [
            make("Transpose", "", [source], [columns], turned),
            make("Reshape", "", [columns], [image]),
            make("Conv", operator.name, [image, named], [sums]),
            make("Reshape", "", [sums], [flat]),
            make("Transpose", "", [flat], [output], turned),
        ]

    return graph.rewritten(rule)


def mean_as_pool(graph: Graph) -> Graph:
    """A mean over height and width is a global average pool, and a view where the axes disappear."""
    fresh = graph.fresh_names()

    def rule(operator: Operator) -> list[Operator] | None:
        if operator.kind != "ReduceMean" or len(operator.input.shape) != 4:
            return None
        if list(operator.attributes.get("axes", operator.constant(1))) != [2, 3]:
            return None
        pooled = replace(
            operator.output,
            name=fresh(f"{operator.output.name}/pooled"),
            shape=(*operator.input.shape[:2], 1, 1),
        )
        return [
            make("GlobalAveragePool", operator.name, operator.inputs[:1], [pooled]),
            make("Reshape", "", [pooled], operator.outputs),
        ]

    return drop_identities(graph.rewritten(rule))


def fold_normalisation(graph: Graph) -> Graph:
    """A batch normalisation that is the only reader of a convolution becomes part of its weights and bias."""

    def merge(before: Operator, operator: Operator) -> Operator | None:
        if operator.kind != "BatchNormalization" or len(operator.activations) != 1:
            return None
        if not isinstance(before, Convolution) or before.constant(1) is None:
            return None
        return _normalised(before, operator)

    return _merged(graph, merge)


def _normalised(convolution: Convolution, normalisation: Operator) -> Operator:
    """In float32 and in the order of ONNX Runtime's conv_bn_fusion.cc, which gives the same bits."""
    scale, shift, mean, variance = (
        np.asarray(normalisation.constant(index), np.float32) for index in range(1, 5)
    )
    epsilon = np.float32(normalisation.attributes.get("epsilon", 1e-5))
    factor = scale / np.sqrt(variance + epsilon)
    weights = convolution.inputs[1]
    assert weights is not None and weights.value is not None
    value = weights.value * factor.reshape(-1, *[1] * (weights.value.ndim - 1))
    bias = shift + (convolution.bias - mean) * factor
    name = normalisation.output.name
    return replace(
        convolution,
        inputs=(
            convolution.input,
            replace(weights, name=f"{name}/weights", value=value),
            constant(f"{name}/bias", bias),
        ),
        outputs=normalisation.outputs,
    )


def fold_limits(graph: Graph) -> Graph:
    """A ReLU or Clip that is the only reader of a convolution, fully connected layer or addition becomes part of it."""

    def merge(before: Operator, operator: Operator) -> Operator | None:
        limits = limits_of(operator)
        if limits is None or not isinstance(before, Limited):
            return None
        low, high = np.clip(before.limits, *limits).tolist()
        return replace(before, outputs=operator.outputs).with_attributes(
            limits=(low, high)
        )

    return _merged(graph, merge)


def _merged(
    graph: Graph, merge: Callable[[Operator, Operator], Operator | None]
) -> Graph:
    """The graph with one operator in the place of two, of which the second is the first's only reader, where ``merge`` has one."""
    made: dict[str, Operator] = {}
    for operator in graph.operators:
        source = operator.activations[:1]
        before = made.get(source[0].name) if source else None
        alone = before is not None and graph.only_reader(before.output) is operator
        if before and alone and (merged := merge(before, operator)):
            del made[before.output.name]
            operator = merged
        made |= dict.fromkeys((t.name for t in operator.outputs), operator)
    return graph.with_operators(dict.fromkeys(made.values()))


def unfold_limits(graph: Graph) -> Graph:
    """A Clip of its own behind each operator that stays float: ONNX's have no limits."""
    fresh = graph.fresh_names()

    def rule(operator: Operator) -> list[Operator] | None:
        output = operator.output
        if not isinstance(operator, Limited) or output.quantisation is not None:
            return None
        if not operator.limited:
            return None
        free = replace(output, name=fresh(f"{output.name}/free"))
        bounds = (
            constant(fresh(f"{output.name}/{name}"), np.array(bound, np.float32))
            for name, bound in zip(("low", "high"), operator.limits, strict=True)
        )
        return [
            replace(operator.without_limits(), outputs=(free,)),
            make("Clip", "", [free, *bounds], [output]),
        ]

    return graph.rewritten(rule)


def limits_of(operator: Operator) -> tuple[float, float] | None:
    """What a ReLU or a Clip with constant bounds limits its input to; None for others."""
    if operator.kind == "Relu":
        return 0.0, math.inf
    if operator.kind != "Clip" or len(operator.activations) != 1:
        return None
    assert isinstance(operator, Pointwise)
    return operator.parameters["min"], operator.parameters["max"]


def dense_as_convolution(graph: Graph) -> Graph:
    """A fully connected layer is a 1×1 convolution of one pixel, between two views."""
    fresh = graph.fresh_names()

    def rule(operator: Operator) -> list[Operator] | None:
        if not isinstance(operator, Dense) or not _is_plain(operator):
            return None
        weights = operator.inputs[1]
        assert weights and weights.value is not None
        source, output = operator.input, operator.output
        pixel, sums = (
            replace(
                tensor, name=fresh(f"{tensor.name}/pixel"), shape=(1, tensor.size, 1, 1)
            )
            for tensor in (source, output)
        )
        facts = weights.quantisation
        if facts is not None and facts.axis is not None:
            facts = replace(facts, axis=0)
        transposed = operator.attributes.get("transB", 0)
        matrix = weights.value if transposed else weights.value.T
        kernel = constant(weights.name, matrix[:, :, None, None], facts)
        limits = {"limits": operator.limits} if operator.limited else {}
        inputs = [pixel, kernel]
        if (
            bias := operator.inputs[2] if len(operator.inputs) > 2 else None
        ) is not None:
            assert bias.value is not None
            if bias.shape != (output.size,):
                # A Gemm's bias may be one number for all outputs.
                values = np.broadcast_to(bias.value, output.shape).reshape(-1)
                bias = constant(fresh(f"{bias.name}/wide"), values, bias.quantisation)
            inputs.append(bias)
        return [
            make("Reshape", "", [source], [pixel]),
            make("Conv", operator.name, inputs, [sums], limits),
            make("Reshape", "", [sums], [output]),
        ]

    return graph.rewritten(rule)


def _is_plain(operator: Dense) -> bool:
    """One row that is computed, constant weights, a scale for each output, and none of what only some of ONNX's forms have."""
    attributes, weights = operator.attributes, operator.inputs[1]
    along = 0 if attributes.get("transB", 0) else 1
    facts = weights.quantisation if weights else None
    bias = operator.inputs[2] if len(operator.inputs) > 2 else None
    return (
        operator.constant(1) is not None
        and (bias is None or bias.value is not None)
        and operator.input.value is None
        and (facts is None or facts.axis in (None, along))
        and operator.input.shape[0] == 1
        and attributes.get("alpha", 1.0) == attributes.get("beta", 1.0) == 1.0
        and not attributes.get("transA", 0)
    )
