"""The gate's checks of shapes: static inputs, sizes within limits, the outputs."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import count
from math import prod
from typing import Literal, cast

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper

from netship.bundle.manifest import MAX_TENSOR_BYTES, Dtype, Quantised, Tensor
from netship.compile.frontend.fold import (
    UNKNOWN,
    Value,
    is_onnx,
    opset,
    value_of,
    values,
)
from netship.compile.frontend.limits import MAX_INPUTS
from netship.compile.frontend.names import Unfit, node_label
from netship.compile.frontend.preprocessing import Layout
from netship.compile.frontend.widening import OTHER_FLOATS
from netship.targets.escapes import shown

MAX_ALL_TENSORS_BYTES = 1 << 32
# Multiply-adds, comparisons and additions of an inference; VGG-19 at 224 takes 2e10.
MAX_WORK = 10**12

_DTYPES = {
    *(TensorProto.FLOAT, TensorProto.INT64, TensorProto.INT32),
    *(TensorProto.BOOL, TensorProto.UINT8, TensorProto.INT8),
}
_INPUTS = (TensorProto.FLOAT, TensorProto.UINT8, TensorProto.INT8)
_AS_MANY_AS_FOUND = {"Compress", "NonMaxSuppression", "NonZero", "Unique"}
_MOVES_ONLY = {
    *("Flatten", "Identity", "Reshape", "Squeeze", "Transpose", "Unsqueeze"),
}
# Operators that exporters and quantisers put between a softmax and the output.
_SAME_VALUES = _MOVES_ONLY | {"Cast", "DequantizeLinear", "QuantizeLinear"}


def real_inputs(graph: onnx.GraphProto) -> list[onnx.ValueInfoProto]:
    """Copies of the inputs that are no initializers (IR 3 lists those as inputs too)."""
    weights = {tensor.name for tensor in graph.initializer}
    real = [each for each in graph.input if each.name not in weights]
    if not real:
        raise Unfit("0 inputs, need at least one; export a network with inputs")
    dtypes = [value_of(each)[0] for each in real]
    if not {*_INPUTS, *OTHER_FLOATS}.intersection(dtypes):
        raise Unfit(_wrong_dtype(f"input {shown(real[0].name)!r}", dtypes[0]))
    if len(real) > MAX_INPUTS:
        raise Unfit(f"{len(real)} inputs, more than the {MAX_INPUTS} allowed")
    copies = []
    for each in real:
        # TVM writes it into JSON as it is.
        if any(ord(letter) < ord(" ") for letter in each.name):
            raise Unfit(
                f"input {shown(each.name)!r} has a control character in its name; give it another name"
            )
        copies.append(onnx.ValueInfoProto())
        copies[-1].CopyFrom(each)
    return copies


def check_names(
    sources: Sequence[onnx.ValueInfoProto], given: Mapping[str, tuple[int, ...]]
) -> None:
    """Refuse a name of ``--input-shape`` that no input has."""
    names = [each.name for each in sources]
    for other in given.keys() - set(names):
        known = " and ".join(repr(shown(each)) for each in names[:5])
        verb = "is" if len(names) == 1 else "are"
        raise Unfit(
            f"--input-shape names {shown(other)!r}, but the input{'s' * (len(names) > 1)} {verb} {known}"
        )


def make_static(
    source: onnx.ValueInfoProto, given: Mapping[str, tuple[int, ...]]
) -> tuple[str, ...]:
    """Fill an input's symbolic dimensions, in place: the batch with 1, others from ``given``.

    Returns:
        a note for each thing filled that the user did not name.
    """
    name = shown(source.name)
    dtype, shape = value_of(source)
    if dtype not in (*_DTYPES, *OTHER_FLOATS):
        raise Unfit(_wrong_dtype(f"input {name!r}", dtype))
    if shape is None or len(shape) not in range(1, 5):
        found = (
            "has no rank"
            if shape is None
            else f"has rank {len(shape)} {_shown_shape(source)}"
        )
        raise Unfit(f"input {name!r} {found}, need 1 to 4; export with fixed sizes")
    wanted = given.get(source.name, ())
    if len(wanted) not in (0, len(shape)) or any(
        new <= 0 or old not in (None, new) for old, new in zip(shape, wanted)
    ):
        raise Unfit(
            f"--input-shape {name}:{','.join(map(str, wanted))} contradicts the input's "
            f"{_shown_shape(source)}; it fills in symbolic dimensions only"
        )
    notes: tuple[str, ...] = ()
    final = list(wanted or shape)
    batched = len(final) > 1
    if batched and final[0] is None:
        symbol = source.type.tensor_type.shape.dim[0].dim_param
        final[0] = 1
        notes = (f"input {name!r}: symbolic batch {shown(symbol) or '?'} made 1",)
    if None in final:
        example = ",".join(("1", "3", "224", "224")[: len(final)])
        raise Unfit(
            f"input {name!r} has symbolic dimensions {_shown_shape(source)}; "
            f"give --input-shape {name}:{example} with its sizes"
        )
    if batched and final[0] != 1:
        raise Unfit(
            f"input {name!r} has batch {final[0]}, need 1; export with batch 1 or a dynamic batch"
        )
    if any(size is None or size < 1 for size in final):
        raise Unfit(
            f"input {name!r} has an empty dimension {_shown_shape(source)}; export again"
        )
    for dim, size in zip(source.type.tensor_type.shape.dim, final, strict=True):
        dim.dim_value = int(size or 0)
    return notes


def _shown_shape(source: onnx.ValueInfoProto) -> str:
    dims = source.type.tensor_type.shape.dim
    words = [
        str(d.dim_value) if d.HasField("dim_value") else shown(d.dim_param, 20) or "?"
        for d in dims
    ]
    return f"[{', '.join(words[:8])}{', …' if len(words) > 8 else ''}]"


def named_apart(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.NodeProto]:
    """Nodes of which no two have one name: ONNX allows that, ONNX Runtime does not."""
    nodes = list(nodes)
    given, seen = {node.name for node in nodes}, set[str]()
    numbers: dict[str, Iterator[int]] = defaultdict(lambda: count(2))
    for node in nodes:
        if node.name and node.name in seen:
            names = (f"{node.name} ({number})" for number in numbers[node.name])
            renamed = onnx.NodeProto()
            renamed.CopyFrom(node)
            renamed.name = next(name for name in names if name not in given)
            node = renamed
        seen.add(node.name)
        yield node


def static_model(
    proto: onnx.ModelProto, sources: Iterable[onnx.ValueInfoProto]
) -> onnx.ModelProto:
    """A valid model with these inputs, without the shapes that were inferred from the original ones."""
    # IR 4 is the first whose initializers need not be inputs; 10 belongs to opset 22.
    static = onnx.ModelProto(ir_version=min(max(proto.ir_version, 4), 10))
    domains = {node.domain for node in proto.graph.node}
    static.opset_import.extend(
        each
        for each in proto.opset_import
        if is_onnx(each.domain) or each.domain in domains
    )
    graph = static.graph
    graph.name = proto.graph.name or "graph"
    graph.input.extend(sources)
    graph.node.extend(named_apart(proto.graph.node))
    graph.initializer.extend(proto.graph.initializer)
    graph.output.extend(proto.graph.output)
    shapes = [output.type.tensor_type for output in graph.output]
    for tensor in shapes:
        for dim in tensor.shape.dim:
            if not dim.HasField("dim_value"):
                dim.Clear()
    # onnx.checker requires a shape of every output, but strict inference would believe an empty one.
    shapeless = [tensor for tensor in shapes if not tensor.HasField("shape")]
    for tensor in shapeless:
        tensor.shape.SetInParent()
    onnx.checker.check_model(_checkable(static))
    for tensor in shapeless:
        tensor.ClearField("shape")
    return static


def _checkable(proto: onnx.ModelProto) -> onnx.ModelProto:
    """The model as onnx.checker takes it: opset 18's GroupNormalization, which is deprecated, as opset 21's."""
    kinds = {node.op_type for node in proto.graph.node}
    if "GroupNormalization" not in kinds or opset(proto) not in range(18, 21):
        return proto
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    for each in copy.opset_import:
        each.version = 21
    return copy


def check_values(proto: onnx.ModelProto) -> None:
    """Refuse a tensor that is not static, of an unsupported type, or too large."""
    known = values(proto.graph)
    read = {name for node in proto.graph.node for name in node.input if name}
    read.update(output.name for output in proto.graph.output)
    total = work = 0
    for node in proto.graph.node:
        work += _work(node, known)
        # An output that no node reads (a Dropout's mask) often has no inferred shape.
        for name in read.intersection(node.output):
            label = f"{node_label(node)}: its output {shown(name)!r}"
            value = known.get(name, UNKNOWN)
            if value.sizes is None:
                advice = "export with fixed sizes"
                if node.op_type in _AS_MANY_AS_FOUND:
                    advice = "its size depends on the input: end the network before it"
                raise Unfit(f"{label} has no static shape; {advice}")
            if value.dtype not in _DTYPES:
                raise Unfit(_wrong_dtype(label, value.dtype))
            size = _bytes(value.dtype, value.sizes)
            total += size
            if size > MAX_TENSOR_BYTES:
                raise Unfit(
                    f"{label} takes {size} bytes, more than the {MAX_TENSOR_BYTES} allowed"
                )
            if size <= 0:
                raise Unfit(
                    f"{label} is empty {list(value.sizes)}; export with larger sizes"
                )
    if total > MAX_ALL_TENSORS_BYTES:
        raise Unfit(
            f"its tensors take {total} bytes, more than the {MAX_ALL_TENSORS_BYTES} allowed"
        )
    if work > MAX_WORK:
        raise Unfit(
            f"an inference takes {work:.1e} multiply-adds, more than the {MAX_WORK:.0e} allowed"
        )
    for tensor in proto.graph.initializer:
        if tensor.data_type not in _DTYPES:
            raise Unfit(
                _wrong_dtype(f"weights {shown(tensor.name)!r}", tensor.data_type)
            )


def check_sizes(proto: onnx.ModelProto) -> None:
    """Refuse a tensor that is too large, where an operator was replaced by simpler ones."""
    known = values(proto.graph)
    for node in proto.graph.node:
        for name in node.output:
            value = known.get(name, UNKNOWN)
            if value.sizes is None:
                continue
            size = _bytes(value.dtype, value.sizes)
            if size > MAX_TENSOR_BYTES:
                raise Unfit(
                    f"{node_label(node)}: a step of it takes {size} bytes, more than the {MAX_TENSOR_BYTES} "
                    "allowed; export with smaller sizes"
                )


def _bytes(dtype: int, sizes: tuple[int, ...]) -> int:
    return prod(sizes) * onnx.helper.tensor_dtype_to_np_dtype(dtype).itemsize


def _work(node: onnx.NodeProto, known: Mapping[str, Value]) -> int:
    """Steps of convolutions, pools and matrix products, whose cost is not that of their tensors."""
    first, second = (
        known.get(name, UNKNOWN).sizes or () for name in [*node.input, "", ""][:2]
    )
    output = prod(known.get(node.output[0], UNKNOWN).sizes or (0,))
    if node.op_type == "Conv":
        return output * prod(second[1:])
    if node.op_type == "ConvTranspose":
        return prod(first) * prod(second[1:])
    if node.op_type in ("Gemm", "MatMul"):
        return output * max((*first[-2:], 1))
    if node.op_type == "Einsum":
        return _einsum_work(node, known)
    if node.op_type == "LRN":
        size: int = next((a.i for a in node.attribute if a.name == "size"), 1)
        return output * size
    kernel = next((a.ints for a in node.attribute if a.name == "kernel_shape"), ())
    return output * prod(kernel) if kernel else 0


def _einsum_work(node: onnx.NodeProto, known: Mapping[str, Value]) -> int:
    """TVM's loops go over every letter at once."""
    equation = next((a.s for a in node.attribute if a.name == "equation"), b"")
    terms = bytes(equation).replace(b" ", b"").partition(b"->")[0].split(b",")
    sizes, others = dict[int, int](), 1
    for term, name in zip(terms, node.input, strict=False):
        shape = known.get(name, UNKNOWN).sizes or ()
        left, dots, right = term.partition(b"...")
        sizes |= zip(left, shape, strict=False)
        sizes |= zip(right[::-1], shape[::-1], strict=False)
        if dots:
            others = max(others, prod(shape[len(left) : len(shape) - len(right)]))
    return prod(sizes.values()) * others


def _wrong_dtype(label: str, dtype: int) -> str:
    known = dtype in TensorProto.DataType.values()
    name = TensorProto.DataType.Name(dtype).lower() if known and dtype else "no tensor"
    return f"{label} is {name}, need float32; export a float32 model"


def quantised_of(proto: onnx.ModelProto, name: str) -> Quantised | None:
    """What the int8 or uint8 input ``name`` means, where DequantizeLinear alone reads it, if in another shape or order of axes."""
    constants = {each.name: each for each in proto.graph.initializer}
    while True:
        readers = [node for node in proto.graph.node if name in node.input]
        if len(readers) != 1 or name in {each.name for each in proto.graph.output}:
            return None
        (reader,) = readers
        if reader.op_type == "DequantizeLinear":
            break
        if reader.op_type not in _MOVES_ONLY:
            return None
        name = reader.output[0]
    facts = [
        numpy_helper.to_array(constants[each]).ravel()
        for each in reader.input[1:]
        if each in constants
    ]
    if len(facts) != len(reader.input) - 1 or any(each.size != 1 for each in facts):
        return None
    scale, zero = facts[0][0], facts[1][0] if len(facts) > 1 else 0
    if not 0 < scale < np.inf:
        return None
    return Quantised(scale=float(scale), zero=int(zero))


def choices_of(proto: onnx.ModelProto, name: str) -> int:
    """Of how many places the indices in the input ``name`` choose one; 0 where they are not known to be indices."""
    known, same, counts = values(proto.graph), {name}, []
    for node in proto.graph.node:
        if node.op_type in _SAME_VALUES and node.input[0] in same:
            same.update(node.output)
        is_gather = node.op_type in ("Gather", "GatherElements")
        sizes = known.get(node.input[0], UNKNOWN).sizes if node.input else None
        if is_gather and node.input[1] in same and sizes:
            axis = next((a.i for a in node.attribute if a.name == "axis"), 0)
            counts.append(sizes[axis])
    return min(counts, default=0)


def tensors_of(
    proto: onnx.ModelProto, sources: Sequence[onnx.ValueInfoProto], given: Layout | None
) -> tuple[Tensor, ...]:
    """The inputs; of several only the first that may be an image has a layout."""
    tensors: list[Tensor] = []
    for source in sources:
        layout = layout_of(source, given if len(sources) == 1 else None)
        tensor = tensor_of(source.name, value_of(source), layout)
        facts: dict[str, object] = {}
        if len(sources) > 1:
            is_first = not any(each.is_image for each in tensors)
            is_image = tensor.is_image and is_first and given != "data"
            facts["layout"] = (given or layout) if is_image else ""
        if tensor.dtype in ("int8", "uint8"):
            facts["quantised"] = quantised_of(proto, source.name)
        elif tensor.dtype != "float32":
            facts |= {"layout": "", "choices": choices_of(proto, source.name)}
        tensors.append(tensor.model_copy(update=facts))
    return tuple(tensors)


def outputs_of(proto: onnx.ModelProto) -> tuple[Tensor, ...]:
    reached = {each.name for each in proto.graph.input}
    for node in proto.graph.node:
        if reached.intersection(node.input):
            reached.update(node.output)
    found = []
    for output in proto.graph.output:
        label = f"output {shown(output.name)!r}"
        value = value_of(output)
        if output.name not in reached:
            raise Unfit(
                f"{label} does not depend on the input; export the whole network"
            )
        if value.dtype not in _DTYPES:
            raise Unfit(_wrong_dtype(label, value.dtype))
        if value.shape is None or len(value.shape) > 1 and value.shape[0] != 1:
            raise Unfit(
                f"{label} has shape {value.shape}, need a batch of 1 as the first axis; export with batch 1, or add "
                "that axis (Unsqueeze)"
            )
        found.append(tensor_of(output.name, value, ""))
    if not found:
        raise Unfit("the graph has no outputs; export it again")
    return tuple(found)


def tensor_of(name: str, value: Value, layout: Literal["NCHW", "NHWC", ""]) -> Tensor:
    dtype = onnx.helper.tensor_dtype_to_np_dtype(value.dtype).name
    try:
        return Tensor(
            name=name,
            shape=value.sizes or (),
            dtype=cast(Dtype, dtype),
            layout=layout,
        )
    except ValueError:
        raise Unfit(
            f"tensor {shown(name)!r} has the shape {list(value.sizes or ())}, too large; export with less"
        ) from None


def layout_of(
    source: onnx.ValueInfoProto, given: Layout | None
) -> Literal["NCHW", "NHWC", ""]:
    """Of rank 4 the layout by the axis that has 1 or 3 channels, NCHW where both or none have; of other ranks none."""
    sizes = [dim.dim_value for dim in source.type.tensor_type.shape.dim]
    if given == "data":
        return ""
    if len(sizes) != 4:
        if given:
            raise Unfit(
                f"--layout {given}: input {shown(source.name)!r} has rank {len(sizes)}, an image has 4; leave it out"
            )
        return ""
    return given or (
        "NHWC" if sizes[3] in (1, 3) and sizes[1] not in (1, 3) else "NCHW"
    )


def is_softmax(proto: onnx.ModelProto) -> bool:
    """Whether the first output is a softmax over all its elements, at most reshaped or quantised afterwards."""
    maker = {name: node for node in proto.graph.node for name in node.output}
    known = values(proto.graph)
    node = maker.get(proto.graph.output[0].name)
    while node is not None and node.op_type in _SAME_VALUES:
        node = maker.get(node.input[0])
    if node is None or node.op_type != "Softmax":
        return False
    shape = known[node.input[0]].sizes or ()
    one_axis = opset(proto) >= 13
    axis = next(
        (a.i for a in node.attribute if a.name == "axis"), -1 if one_axis else 1
    )
    axis %= len(shape)
    summed = shape[axis : axis + 1] if one_axis else shape[axis:]
    return prod(summed) == prod(shape)
