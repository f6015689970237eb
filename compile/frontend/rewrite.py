"""ONNX forms that TVM 0.19's Relay importer gets wrong, rewritten into forms it gets right.

Each rule below says what goes wrong without it; tests/test_rewrite.py compares every
rule with ONNX Runtime, and fails when TVM gets the original right after all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from compile.frontend.fold import Value, fold, opset, values, with_nodes
from compile.frontend.names import node_label
from targets.errors import UserError
from targets.onnx_runtime import Session

_FLOAT32_MAX = float(np.finfo(np.float32).max)


class _Graph:
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


_Rule = Callable[[onnx.NodeProto, _Graph], "list[onnx.NodeProto]"]


def for_relay(proto: onnx.ModelProto) -> onnx.ModelProto:
    """The same function in ONNX forms that TVM's importer reads rightly.

    Args:
        proto: a static model (every shape known or inferable), one opset of ai.onnx.

    Returns:
        A new model, folded and shape-inferred; not always valid ONNX (reduction axes are
        attributes whatever the opset): it is for the importer alone.

    Raises:
        UserError: a form that has no right rewrite, named with its node.
    """
    folded = fold(proto)
    graph = _Graph(folded)
    nodes = [new for node in folded.graph.node for new in _rewritten(node, graph)]
    return with_nodes(folded, nodes, graph.constants)


def _rewritten(node: onnx.NodeProto, graph: _Graph) -> list[onnx.NodeProto]:
    rule = _RULES.get(node.op_type)
    return [node] if rule is None else rule(node, graph)


def _attributes(node: onnx.NodeProto) -> dict[str, Any]:
    return {each.name: helper.get_attribute_value(each) for each in node.attribute}


def _node(
    original: onnx.NodeProto,
    op_type: str,
    inputs: Sequence[str],
    outputs: Sequence[str],
    **attributes: Any,
) -> onnx.NodeProto:
    return helper.make_node(op_type, inputs, outputs, name=original.name, **attributes)


def _text(attribute: Any) -> str:
    return attribute.decode() if isinstance(attribute, bytes) else str(attribute)


def _refuse(node: onnx.NodeProto, why: str) -> UserError:
    return UserError(f"{node_label(node)}: {why}")


def _reduce(node: onnx.NodeProto, graph: _Graph) -> list[onnx.NodeProto]:
    """Of axes given as an input the importer takes the first alone, or dies; some ignore noop_with_empty_axes."""
    attributes = _attributes(node)
    noop = attributes.pop("noop_with_empty_axes", 0)
    axes = attributes.pop("axes", None)
    given = graph.constant(node, 1)
    if given is not None:
        axes = given.tolist()
    rank = len(graph.shape(node.input[0]))
    if not axes and noop and node.op_type in _NOT_IDENTITY_WITHOUT_AXES:
        raise _refuse(node, "noop_with_empty_axes is not built; reduce over named axes")
    if not axes and noop:
        return [_node(node, "Identity", node.input[:1], node.output)]
    axes = sorted(axis % rank for axis in axes) if axes else list(range(rank))
    return [
        _node(node, node.op_type, node.input[:1], node.output, axes=axes, **attributes)
    ]


# Without axes these still square, take magnitudes or logarithms, each element for itself.
_NOT_IDENTITY_WITHOUT_AXES = ("ReduceL1", "ReduceL2", "ReduceLogSum", "ReduceSumSquare")


class _Windows:
    """The sliding windows of a convolution or pooling, each attribute a list over the spatial axes."""

    def __init__(self, node: onnx.NodeProto, graph: _Graph) -> None:
        attributes = _attributes(node)
        self.input = graph.shape(node.input[0])[2:]
        self.output = graph.shape(node.output[0])[2:]
        kernel = attributes.get("kernel_shape") or graph.shape(node.input[1])[2:]
        axes = len(self.input)
        self.strides = list(attributes.get("strides") or [1] * axes)
        dilations = list(attributes.get("dilations") or [1] * axes)
        self.extent = [(k - 1) * d + 1 for k, d in zip(kernel, dilations, strict=True)]
        pads = list(attributes.get("pads") or [0] * (2 * axes))
        self.before, self.after = pads[:axes], pads[axes:]
        self.same = _text(attributes.get("auto_pad", "NOTSET"))

    def padded_to(self) -> list[int]:
        """How far the last window reaches, in elements from the first one's start."""
        sizes = zip(self.output, self.strides, self.extent, strict=True)
        return [(count - 1) * stride + extent for count, stride, extent in sizes]


def _split_padding(total: Sequence[int], lower: bool) -> list[int]:
    """ONNX's SAME_UPPER puts the odd element after, SAME_LOWER before: → pads, all begins then all ends."""
    small = [max(each, 0) // 2 for each in total]
    large = [max(each, 0) - s for each, s in zip(total, small, strict=True)]
    return large + small if lower else small + large


def _same_pads(node: onnx.NodeProto, graph: _Graph) -> dict[str, Any]:
    """The node's attributes with ``pads`` in the place of ``auto_pad``."""
    attributes = _attributes(node)
    mode = _text(attributes.pop("auto_pad", "NOTSET"))
    if mode == "VALID":
        attributes.pop("pads", None)
    if mode.startswith("SAME"):
        windows = _Windows(node, graph)
        total = [
            reach - size
            for reach, size in zip(windows.padded_to(), windows.input, strict=True)
        ]
        attributes["pads"] = _split_padding(total, mode == "SAME_LOWER")
    return attributes


def _convolution(node: onnx.NodeProto, graph: _Graph) -> list[onnx.NodeProto]:
    """auto_pad=SAME_* ends in LLVM's verifier."""
    return [_node(node, "Conv", node.input, node.output, **_same_pads(node, graph))]


def _pool(node: onnx.NodeProto, graph: _Graph) -> list[onnx.NodeProto]:
    """SAME_*, as above; an Indices output nobody reads is refused; ceil_mode counts the padding it adds."""
    if any(name in graph.read for name in node.output[1:]):
        raise _refuse(
            node, "its Indices output is used, which TVM cannot make; pool without it"
        )
    attributes = _same_pads(node, graph)
    attributes.pop("storage_order", None)  # Orders the Indices, which nobody reads.
    source = node.input[0]
    padding: list[onnx.NodeProto] = []
    if attributes.pop("ceil_mode", 0):
        windows = _Windows(node, graph)
        reach = windows.padded_to()
        starts = [r - extent for r, extent in zip(reach, windows.extent, strict=True)]
        ends = zip(starts, windows.before, windows.input, strict=True)
        if any(start >= before + size for start, before, size in ends):
            raise _refuse(
                node,
                "with ceil_mode its last window lies in the padding, where ONNX Runtime and "
                "ONNX's shapes disagree; export with ceil_mode off",
            )
        if attributes.get("count_include_pad") and any(windows.before + windows.after):
            # The padding counts, what ceil_mode adds to it does not: pad first, apart.
            source = graph.fresh(f"{node.output[0]}/padded")
            pads = [0, 0, *windows.before, 0, 0, *windows.after]
            padding.append(_pad_node(node, graph, node.input[0], source, pads))
            sizes = zip(windows.before, windows.input, windows.after, strict=True)
            sizes_in, begin = [sum(each) for each in sizes], [0] * len(reach)
        else:
            sizes_in, begin = list(windows.input), windows.before
        attributes["count_include_pad"] = 0
        needs = zip(reach, begin, sizes_in, strict=True)
        attributes["pads"] = begin + [max(0, r - b - size) for r, b, size in needs]
    if node.op_type != "AveragePool":
        attributes.pop("count_include_pad", None)
    return [
        *padding,
        _node(node, node.op_type, [source], node.output[:1], **attributes),
    ]


def _transposed_convolution(
    node: onnx.NodeProto, graph: _Graph
) -> list[onnx.NodeProto]:
    """auto_pad depends on the ONNX Runtime installed; dilations are not scheduled: the weights take the holes."""
    attributes = _attributes(node)
    mode = _text(attributes.pop("auto_pad", "NOTSET"))
    windows = _Windows(node, graph)
    if "output_shape" in attributes or mode.startswith("SAME"):
        attributes.pop("output_shape", None)
        extra = attributes.get("output_padding") or [0] * len(windows.strides)
        sizes = zip(
            windows.strides,
            windows.input,
            windows.extent,
            extra,
            windows.output,
            strict=True,
        )
        total = [s * (i - 1) + k + e - o for s, i, k, e, o in sizes]
        attributes["pads"] = _split_padding(total, mode != "SAME_UPPER")
    inputs = list(node.input)
    dilations = attributes.pop("dilations", None) or []
    if any(each != 1 for each in dilations):
        weights = graph.constant(node, 1)
        assert weights is not None
        holed = np.zeros((*weights.shape[:2], *windows.extent), weights.dtype)
        holes: tuple[Any, ...] = tuple(slice(None, None, each) for each in dilations)
        holed[(slice(None), slice(None), *holes)] = weights
        inputs[1] = graph.add_constant(f"{node.input[1]}/dilated", holed, holed.dtype)
        attributes["kernel_shape"] = windows.extent
    return [_node(node, "ConvTranspose", inputs, node.output, **attributes)]


def _pad_node(
    node: onnx.NodeProto,
    graph: _Graph,
    source: str,
    output: str,
    pads: Sequence[int],
    mode: str = "constant",
    value: float = 0.0,
) -> onnx.NodeProto:
    if graph.opset < 11:
        return _node(
            node, "Pad", [source], [output], pads=list(pads), mode=mode, value=value
        )
    amounts = graph.add_constant(f"{output}/pads", pads, np.int64)
    fill = graph.add_constant(f"{output}/value", value, np.float32)
    return _node(node, "Pad", [source, amounts, fill], [output], mode=mode)


def _pad(node: onnx.NodeProto, graph: _Graph) -> list[onnx.NodeProto]:
    """Axes (opset 18) abort; mode wrap is unknown."""
    attributes = _attributes(node)
    mode = _text(attributes.get("mode", "constant"))
    if mode == "wrap":
        raise _refuse(
            node, "mode wrap is not known to TVM; pad with constant, edge or reflect"
        )
    if graph.opset < 11:
        return [node]
    pads, axes, value = (graph.constant(node, index) for index in (1, 3, 2))
    assert pads is not None
    rank = len(graph.shape(node.input[0]))
    chosen = range(rank) if axes is None else [int(axis) % rank for axis in axes]
    full = np.zeros((2, rank), np.int64)
    full[:, list(chosen)] = pads.reshape(2, -1)
    fill = 0.0 if value is None or not value.size else float(value.flat[0])
    flat = full.ravel().tolist()
    return [_pad_node(node, graph, node.input[0], node.output[0], flat, mode, fill)]


def _clip(node: onnx.NodeProto, graph: _Graph) -> list[onnx.NodeProto]:
    """From opset 11 on a Clip with one bound is imported as no Clip at all."""
    if graph.opset < 11:
        return [node]
    low, high = (graph.constant(node, index) for index in (1, 2))
    if (low is None) == (high is None):
        return [node]
    bounds = [
        graph.add_constant(
            f"{node.output[0]}/bound",
            default if bound is None else bound.item(),
            np.float32,
        )
        for bound, default in ((low, -_FLOAT32_MAX), (high, _FLOAT32_MAX))
    ]
    return [_node(node, "Clip", [node.input[0], *bounds], node.output)]


def _dropout(node: onnx.NodeProto, graph: _Graph) -> list[onnx.NodeProto]:
    """The ratio as an input (opset 12) is a type error; in inference it is the identity."""
    training = graph.constant(node, 2)
    if training is not None and training.item():
        raise _refuse(node, "is in training mode; export with model.eval()")
    if any(name in graph.read for name in node.output[1:]):
        raise _refuse(
            node,
            "its mask output is used, which only training does; export for inference",
        )
    return [_node(node, "Identity", node.input[:1], node.output[:1])]


def _batch_normalisation(node: onnx.NodeProto, graph: _Graph) -> list[onnx.NodeProto]:
    """Training mode is ignored by the importer; the running statistics are no outputs in inference."""
    attributes = _attributes(node)
    if attributes.pop("training_mode", 0) or any(
        name in graph.read for name in node.output[1:]
    ):
        raise _refuse(node, "is in training mode; export with model.eval()")
    return [_node(node, node.op_type, node.input, node.output[:1], **attributes)]


def _unsqueeze(node: onnx.NodeProto, graph: _Graph) -> list[onnx.NodeProto]:
    """Negative axes are counted from the wrong end: a Reshape says the same."""
    return _reshape_to(node, graph, graph.shape(node.output[0]))


def _reshape_to(
    node: onnx.NodeProto, graph: _Graph, shape: Sequence[int]
) -> list[onnx.NodeProto]:
    sizes = graph.add_constant(f"{node.output[0]}/shape", shape, np.int64)
    return [_node(node, "Reshape", [node.input[0], sizes], node.output)]


def _split(node: onnx.NodeProto, graph: _Graph) -> list[onnx.NodeProto]:
    """num_outputs (opset 18) that does not divide the axis: sizes from the shapes instead."""
    axis = _attributes(node).get("axis", 0) % len(graph.shape(node.input[0]))
    if len(node.output) == 1:
        return [_node(node, "Identity", node.input[:1], node.output)]
    sizes = [graph.shape(name)[axis] for name in node.output]
    if graph.opset < 13:
        return [
            _node(node, "Split", node.input[:1], node.output, axis=axis, split=sizes)
        ]
    given = graph.add_constant(f"{node.output[0]}/split", sizes, np.int64)
    return [_node(node, "Split", [node.input[0], given], node.output, axis=axis)]


def _slice(node: onnx.NodeProto, graph: _Graph) -> list[onnx.NodeProto]:
    """Negative axes as an attribute (before opset 10) are an index error."""
    attributes = _attributes(node)
    if "axes" in attributes:
        rank = len(graph.shape(node.input[0]))
        attributes["axes"] = [axis % rank for axis in attributes["axes"]]
    return [_node(node, "Slice", node.input, node.output, **attributes)]


def _mean(node: onnx.NodeProto, graph: _Graph) -> list[onnx.NodeProto]:
    """Inputs of different ranks are concatenated without broadcasting."""
    total = graph.fresh(f"{node.output[0]}/sum")
    count = graph.add_constant(f"{node.output[0]}/count", len(node.input), np.float32)
    return [
        _node(node, "Sum", node.input, [total]),
        _node(node, "Div", [total, count], node.output),
    ]


def _softplus(node: onnx.NodeProto, graph: _Graph) -> list[onnx.NodeProto]:
    """log(1 + exp(x)) overflows from 89 on: max(x, 0) + log(1 + exp(-|x|)) does not."""
    return _chain(
        node,
        graph,
        ("Relu", ["x"], "positive"),
        ("Abs", ["x"], "magnitude"),
        ("Neg", ["magnitude"], "negative"),
        ("Exp", ["negative"], "small"),
        ("Add", ["small", 1.0], "more"),
        ("Log", ["more"], "log"),
        ("Add", ["positive", "log"], "y"),
    )


def _gelu(node: onnx.NodeProto, graph: _Graph) -> list[onnx.NodeProto]:
    """approximate="tanh" is ignored."""
    if _text(_attributes(node).get("approximate", "none")) != "tanh":
        return [node]
    return _chain(
        node,
        graph,
        ("Mul", ["x", "x"], "square"),
        ("Mul", ["square", 0.044715], "scaled"),
        ("Add", ["scaled", 1.0], "factor"),
        ("Mul", ["x", "factor"], "cubic"),
        ("Mul", ["cubic", float(np.sqrt(2 / np.pi))], "argument"),
        ("Tanh", ["argument"], "tanh"),
        ("Add", ["tanh", 1.0], "more"),
        ("Mul", ["x", "more"], "twice"),
        ("Mul", ["twice", 0.5], "y"),
    )


def _log_softmax(node: onnx.NodeProto, graph: _Graph) -> list[onnx.NodeProto]:
    """log(softmax(x)) is -inf where the softmax underflows: x - max - log(sum(exp(x - max))) is not."""
    shape = graph.shape(node.input[0])
    axis = _attributes(node).get("axis", -1 if graph.opset >= 13 else 1) % len(shape)
    axes = [axis] if graph.opset >= 13 else list(range(axis, len(shape)))
    return _chain(
        node,
        graph,
        ("ReduceMax", ["x"], "max", {"axes": axes}),
        ("Sub", ["x", "max"], "less"),
        ("Exp", ["less"], "exp"),
        ("ReduceSum", ["exp"], "sum", {"axes": axes}),
        ("Log", ["sum"], "log"),
        ("Sub", ["less", "log"], "y"),
    )


def _chain(
    node: onnx.NodeProto, graph: _Graph, *steps: tuple[Any, ...]
) -> list[onnx.NodeProto]:
    """Nodes in the place of one: each step (operator, inputs, result, attributes); numbers are constants."""
    names = {"x": node.input[0], "y": node.output[0]}
    nodes = []
    for op_type, inputs, result, *attributes in steps:
        if result != "y":
            names[result] = graph.fresh(f"{node.output[0]}/{result}")
        read = [
            names[each]
            if isinstance(each, str)
            else graph.add_constant(f"{node.output[0]}/{result}", each, np.float32)
            for each in inputs
        ]
        nodes.append(
            _node(node, op_type, read, [names[result]], **(attributes or [{}])[0])
        )
    return nodes


def _matrix_vector(node: onnx.NodeProto, graph: _Graph) -> list[onnx.NodeProto]:
    """A vector on the right of more than two dimensions is a type error: a one-column matrix instead."""
    right = graph.shape(node.input[1])
    if len(right) != 1 or len(graph.shape(node.input[0])) < 3:
        return [node]
    column, product = (
        graph.fresh(f"{node.output[0]}/{stem}") for stem in ("column", "product")
    )
    shapes = [
        graph.add_constant(f"{node.output[0]}/shape", shape, np.int64)
        for shape in ((*right, 1), graph.shape(node.output[0]))
    ]
    return [
        _node(node, "Reshape", [node.input[1], shapes[0]], [column]),
        _node(node, "MatMul", [node.input[0], column], [product]),
        _node(node, "Reshape", [product, shapes[1]], node.output),
    ]


def _group_normalisation(node: onnx.NodeProto, graph: _Graph) -> list[onnx.NodeProto]:
    """Unknown to the importer: an InstanceNormalization over groups, then scale and bias a channel."""
    attributes = _attributes(node)
    groups = attributes["num_groups"]
    shape = graph.shape(node.input[0])
    scale, bias = graph.constant(node, 1), graph.constant(node, 2)
    assert scale is not None and bias is not None
    if scale.size != shape[1]:  # One value a group, before opset 21.
        scale, bias = (np.repeat(each, shape[1] // groups) for each in (scale, bias))
    stem = node.output[0]
    per_channel = (shape[1], *[1] * (len(shape) - 2))
    grouped, normal, back, scaled = (
        graph.fresh(f"{stem}/{each}")
        for each in ("grouped", "normal", "back", "scaled")
    )
    add = graph.add_constant
    return [
        _node(
            node,
            "Reshape",
            [node.input[0], add(f"{stem}/shape", (shape[0], groups, -1), np.int64)],
            [grouped],
        ),
        _node(
            node,
            "InstanceNormalization",
            [
                grouped,
                add(f"{stem}/one", np.ones(groups), np.float32),
                add(f"{stem}/zero", np.zeros(groups), np.float32),
            ],
            [normal],
            epsilon=attributes.get("epsilon", 1e-5),
        ),
        _node(node, "Reshape", [normal, add(f"{stem}/shape", shape, np.int64)], [back]),
        _node(
            node,
            "Mul",
            [back, add(f"{stem}/scale", scale.reshape(per_channel), np.float32)],
            [scaled],
        ),
        _node(
            node,
            "Add",
            [scaled, add(f"{stem}/bias", bias.reshape(per_channel), np.float32)],
            node.output,
        ),
    ]


def _resize(node: onnx.NodeProto, graph: _Graph) -> list[onnx.NodeProto]:
    """Nearest picks wrong neighbours at fractional scales, linear and cubic end in LLVM's verifier.

    Resizing is linear and separable, so each axis is a constant matrix: what ONNX Runtime
    makes of the identity. Nearest picks, so there it is a Gather.
    """
    attributes = _attributes(node)
    if (
        _text(attributes.get("coordinate_transformation_mode", ""))
        == "tf_crop_and_resize"
    ):
        raise _refuse(
            node, "tf_crop_and_resize is not built; use half_pixel or align_corners"
        )
    if _text(attributes.get("keep_aspect_ratio_policy", "stretch")) != "stretch":
        raise _refuse(node, "keep_aspect_ratio_policy is not built; give the sizes")
    before, after = graph.shape(node.input[0]), graph.shape(node.output[0])
    resized = [
        axis for axis, (m, n) in enumerate(zip(before, after, strict=True)) if m != n
    ]
    nodes, current = [], node.input[0]
    for axis in resized:
        matrix = _axis_matrix(node, graph, axis)
        result = graph.fresh(f"{node.output[0]}/axis{axis}")
        if np.isin(matrix, (0, 1)).all() and (matrix.sum(axis=0) == 1).all():
            picked = graph.add_constant(
                f"{result}/from", matrix.argmax(axis=0), np.int64
            )
            nodes.append(_node(node, "Gather", [current, picked], [result], axis=axis))
        else:
            order = [each for each in range(len(before)) if each != axis] + [axis]
            last, product = (
                graph.fresh(f"{result}/{stem}") for stem in ("last", "product")
            )
            weights = graph.add_constant(f"{result}/weights", matrix, np.float32)
            back = np.argsort(order).tolist()
            nodes += [
                _node(node, "Transpose", [current], [last], perm=order),
                _node(node, "MatMul", [last, weights], [product]),
                _node(node, "Transpose", [product], [result], perm=back),
            ]
        current = result
    return [*nodes, _node(node, "Identity", [current], node.output)]


def _axis_matrix(node: onnx.NodeProto, graph: _Graph, axis: int) -> NDArray[np.float32]:
    """[size before, size after]: ``x @ matrix`` resizes the last axis as ``node`` does ``axis``."""
    before = graph.shape(node.input[0])[axis]
    after = graph.shape(node.output[0])[axis]
    attributes = _attributes(node)
    upsample = node.op_type == "Upsample"
    sizes = None if upsample or graph.opset < 11 else graph.constant(node, 3)
    axes = attributes.pop("axes", None) or list(range(len(graph.shape(node.input[0]))))
    at = [each % len(graph.shape(node.input[0])) for each in axes].index(axis)
    constants, inputs = [], ["x"]
    if sizes is not None and sizes.size:
        constants = [
            numpy_helper.from_array(np.zeros(0, np.float32), "none"),
            numpy_helper.from_array(np.array([1, 1, before, after], np.int64), "sizes"),
        ]
        inputs += ["none", "none", "sizes"]
    else:
        scales = attributes.pop("scales", None)
        if scales is None:
            given = graph.constant(node, 1 if upsample or graph.opset < 11 else 2)
            assert given is not None
            scales = given.tolist()
        scale = np.array([1, 1, 1, scales[at]], np.float32)
        if upsample and graph.opset < 9:
            attributes["scales"] = scale.tolist()
        else:
            constants = [
                numpy_helper.from_array(np.zeros(0, np.float32), "none"),
                numpy_helper.from_array(scale, "scales"),
            ]
            inputs += ["scales"] if upsample or graph.opset < 11 else ["none", "scales"]
    model = helper.make_model(
        helper.make_graph(
            [helper.make_node(node.op_type, inputs, ["y"], **attributes)],
            "axis",
            [
                helper.make_tensor_value_info(
                    "x", onnx.TensorProto.FLOAT, (1, 1, before, before)
                )
            ],
            [
                helper.make_tensor_value_info(
                    "y", onnx.TensorProto.FLOAT, (1, 1, before, after)
                )
            ],
            [each for each in constants if each.name in inputs],
        ),
        opset_imports=[helper.make_opsetid("", graph.opset)],
        ir_version=8,
    )
    session = Session(model.SerializeToString(), node_label(node))
    identity = np.eye(before, dtype=np.float32)[np.newaxis, np.newaxis]
    return np.asarray(session.run(["y"], {"x": identity})[0][0, 0])


_RULES: dict[str, _Rule] = {
    "AveragePool": _pool,
    "BatchNormalization": _batch_normalisation,
    "Clip": _clip,
    "Conv": _convolution,
    "ConvTranspose": _transposed_convolution,
    "Dropout": _dropout,
    "Gelu": _gelu,
    "GroupNormalization": _group_normalisation,
    "LogSoftmax": _log_softmax,
    "MatMul": _matrix_vector,
    "MaxPool": _pool,
    "Mean": _mean,
    "Pad": _pad,
    "Resize": _resize,
    "Slice": _slice,
    "Softplus": _softplus,
    "Split": _split,
    "Unsqueeze": _unsqueeze,
    "Upsample": _resize,
    **dict.fromkeys(
        [
            "ReduceL1",
            "ReduceL2",
            "ReduceLogSum",
            "ReduceLogSumExp",
            "ReduceMax",
            "ReduceMean",
            "ReduceMin",
            "ReduceProd",
            "ReduceSum",
            "ReduceSumSquare",
        ],
        _reduce,
    ),
}
