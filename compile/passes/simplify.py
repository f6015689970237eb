"""One form for what exporters write in several: identities, fully connected layers, means, limits."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from compile.ir.graph import Graph, Operator, Tensor
from compile.ir.kinds import make
from compile.ir.operators import Convolution, Dense, Limited, View


def drop_identities(graph: Graph) -> Graph:
    """Without the operators that give their input back; a view of a view is one."""
    outputs = {tensor.name for tensor in graph.outputs}
    same: dict[str, Tensor] = {}
    kept: dict[str, Operator] = {}
    for operator in graph.operators:
        operator = operator.with_tensors(same)
        if isinstance(operator, View):
            before = kept.get(operator.input.name)
            if isinstance(before, View):
                operator = replace(operator, inputs=before.inputs)
            is_identity = operator.input.shape == operator.output.shape
        else:
            is_identity = operator.kind == "Identity"
        if is_identity and operator.output.name not in outputs:
            same[operator.output.name] = operator.input
        else:
            kept[operator.outputs[0].name] = operator
    return graph.with_operators(kept.values())


def matmul_as_gemm(graph: Graph) -> Graph:
    """A row times a constant matrix is a fully connected layer."""

    def changed(operator: Operator) -> Operator:
        if operator.kind != "MatMul" or operator.constant(1) is None:
            return operator
        left, right = operator.inputs
        assert left and right
        if len(left.shape) != 2 or len(right.shape) != 2:
            return operator
        return make("Gemm", operator.name, operator.inputs, operator.outputs)

    return graph.with_operators(map(changed, graph.operators))


def mean_as_pool(graph: Graph) -> Graph:
    """A mean over height and width is a global average pool, and a view where the axes disappear."""
    fresh = graph.fresh_names()
    made: list[Operator] = []
    for operator in graph.operators:
        axes = operator.attributes.get("axes", operator.constant(1))
        rank = len(operator.input.shape) if operator.activations else 0
        if operator.kind != "ReduceMean" or rank != 4 or list(axes) != [2, 3]:
            made.append(operator)
            continue
        pooled = replace(
            operator.output,
            name=fresh(f"{operator.output.name}/pooled"),
            shape=(*operator.input.shape[:2], 1, 1),
        )
        made += [
            make("GlobalAveragePool", operator.name, operator.inputs[:1], [pooled]),
            make("Reshape", "", [pooled], operator.outputs),
        ]
    return drop_identities(graph.with_operators(made))


def fold_normalisation(graph: Graph) -> Graph:
    """A batch normalisation that is the only reader of a convolution becomes part of its weights and bias."""
    made: dict[str, Operator] = {}
    for operator in graph.operators:
        before = (
            made.get(operator.activations[0].name) if operator.activations else None
        )
        if (
            operator.kind == "BatchNormalization"
            and isinstance(before, Convolution)
            and before.constant(1) is not None
            and graph.only_reader(before.output) is operator
            and all(operator.constant(index) is not None for index in range(1, 5))
        ):
            del made[before.output.name]
            operator = _normalised(before, operator)
        made[operator.outputs[0].name] = operator
    return graph.with_operators(made.values())


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
            Tensor(f"{name}/bias", bias.shape, value=bias),
        ),
        outputs=normalisation.outputs,
    )


def fold_limits(graph: Graph) -> Graph:
    """A ReLU or Clip that is the only reader of a convolution, fully connected layer or addition becomes part of it."""
    made: dict[str, Operator] = {}
    for operator in graph.operators:
        source = operator.activations[:1]
        before = made.get(source[0].name) if source else None
        limits = limits_of(operator)
        if (
            limits is None
            or not isinstance(before, Limited)
            or graph.only_reader(before.output) is not operator
        ):
            made |= dict.fromkeys((t.name for t in operator.outputs), operator)
            continue
        low, high = (
            choose(pair)
            for choose, pair in zip((max, min), zip(limits, before.limits), strict=True)
        )
        merged = replace(before, outputs=operator.outputs)
        del made[before.output.name]
        made[operator.output.name] = merged.with_attributes(limits=(low, high))
    return graph.with_operators(dict.fromkeys(made.values()))


def unfold_limits(graph: Graph) -> Graph:
    """A Clip of its own behind each operator that stays float: ONNX's have no limits."""
    fresh = graph.fresh_names()
    made: list[Operator] = []
    for operator in graph.operators:
        if (
            not isinstance(operator, Limited)
            or operator.output.quantisation is not None
            or not operator.limited
        ):
            made.append(operator)
            continue
        output = operator.output
        free = replace(output, name=fresh(f"{output.name}/free"))
        bounds = [
            Tensor(
                fresh(f"{output.name}/{name}"), (), value=np.array(bound, np.float32)
            )
            for name, bound in zip(("low", "high"), operator.limits, strict=True)
        ]
        attributes = {k: v for k, v in operator.attributes.items() if k != "limits"}
        made += [
            replace(operator, outputs=(free,), attributes=attributes),
            make("Clip", "", [free, *bounds], [output]),
        ]
    return graph.with_operators(made)


def limits_of(operator: Operator) -> tuple[float, float] | None:
    """What a ReLU or a Clip with constant bounds limits its input to; None for others."""
    if operator.kind == "Relu":
        return 0.0, math.inf
    if operator.kind != "Clip" or len(operator.activations) != 1:
        return None
    bounds = []
    for index, (name, default) in enumerate((("min", -math.inf), ("max", math.inf)), 1):
        bound = operator.constant(index)
        bounds.append(
            float(
                operator.attributes.get(name, default)
                if bound is None
                else bound.item()
            )
        )
    return bounds[0], bounds[1]


def dense_as_convolution(graph: Graph) -> Graph:
    """A fully connected layer is a 1×1 convolution of one pixel, between two views."""
    fresh = graph.fresh_names()
    made: list[Operator] = []
    for operator in graph.operators:
        if not isinstance(operator, Dense) or not _is_plain(operator):
            made.append(operator)
            continue
        weights = operator.inputs[1]
        assert weights and weights.value is not None
        source, output = operator.input, operator.output
        pixel, sums = (
            replace(
                tensor, name=fresh(f"{tensor.name}/pixel"), shape=(1, tensor.size, 1, 1)
            )
            for tensor in (source, output)
        )
        quantisation = weights.quantisation
        if quantisation is not None and quantisation.axis is not None:
            quantisation = replace(quantisation, axis=0)
        matrix = (
            weights.value if operator.attributes.get("transB", 0) else weights.value.T
        )
        kernel = replace(
            weights,
            shape=(*matrix.shape, 1, 1),
            value=matrix[:, :, None, None],
            quantisation=quantisation,
        )
        made += [
            make("Reshape", "", [source], [pixel]),
            make(
                "Conv",
                operator.name,
                [pixel, kernel, *operator.inputs[2:]],
                [sums],
                {"limits": operator.limits} if operator.limited else {},
            ),
            make("Reshape", "", [sums], [output]),
        ]
    return graph.with_operators(made)


def _is_plain(operator: Dense) -> bool:
    """One row, constant weights, a scale for each output, and none of what only some of ONNX's forms have."""
    attributes, weights = operator.attributes, operator.inputs[1]
    along = 0 if attributes.get("transB", 0) else 1
    facts = weights.quantisation if weights else None
    return (
        operator.constant(1) is not None
        and (facts is None or facts.axis in (None, along))
        and operator.input.shape[0] == 1
        and attributes.get("alpha", 1.0) == attributes.get("beta", 1.0) == 1.0
        and not attributes.get("transA", 0)
    )
