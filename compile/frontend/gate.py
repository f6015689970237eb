"""The one place where an untrusted model is read.

What comes out is valid, static, float32 ONNX with one image input; everything else
is refused in one line that names the file. Nothing here imports TVM.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from math import prod
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper
from onnx.inliner import inline_local_functions

from bundle.manifest import ModelIdentity, Tensor
from compile.frontend.fold import (
    Value,
    constant_value,
    fold,
    is_onnx,
    opset,
    value_of,
    values,
)
from compile.frontend.model import Model
from compile.frontend.names import node_label, shown
from targets.errors import UserError

# Protobuf stops at 2 GiB, and onnx copies a model twice to check it: VGG-19 (575 MB) is the largest
# common CNN. The file and its external data together.
MAX_MODEL_BYTES = 1 << 30
MAX_TENSOR_BYTES = 1 << 29
MAX_ALL_TENSORS_BYTES = 1 << 32
MAX_NODES = 20_000
# 7: the oldest that ONNX Runtime supports and the first with NumPy's broadcasting, as Relay has it.
# 22: the newest whose operators were compared with ONNX Runtime (tests/test_rewrite.py).
OPSETS = range(7, 23)

_CONTROL_FLOW = frozenset(["If", "Loop", "Scan", "SequenceMap"])
_DTYPES = frozenset(
    [
        TensorProto.FLOAT,
        TensorProto.INT64,
        TensorProto.INT32,
        TensorProto.BOOL,
        TensorProto.UINT8,
        TensorProto.INT8,
    ]
)
# What exporters put between a softmax and the output.
_SHAPE_ONLY = frozenset(
    ["Cast", "Flatten", "Identity", "Reshape", "Squeeze", "Unsqueeze"]
)

Layout = Literal["NCHW", "NHWC"]


def load(
    path: Path,
    input_shapes: Mapping[str, tuple[int, ...]] | None = None,
    layout: Layout | None = None,
) -> Model:
    """Read an ONNX file, with its external data, and check it.

    Args:
        input_shapes: what ``--input-shape`` says, for the input's symbolic dimensions alone.
        layout: of the input; None infers it from where 1 or 3 channels stand.

    Raises:
        UserError: one line that names the file and what is wrong with it.
    """
    where = shown(path, 300)
    try:
        data = _read_regular(path, MAX_MODEL_BYTES)
    except _Unfit as error:
        raise UserError(f"{where}: {error}") from None
    if not data:
        raise UserError(f"{where}: is empty; export or copy the model again")
    proto = onnx.ModelProto()
    try:
        proto.ParseFromString(data)
    except Exception as error:  # noqa: BLE001  (protobuf's errors have no public base class)
        raise UserError(
            f"{where}: not an ONNX model, or cut short ({_excerpt(error)}); export or copy it again"
        ) from None
    try:
        external = _inline_external(proto, path.parent, MAX_MODEL_BYTES - len(data))
    except _Unfit as error:
        raise UserError(f"{where}: {error}") from None
    identity = ModelIdentity(
        name=path.name, sha256=hashlib.sha256(data).hexdigest(), external_data=external
    )
    return _check(proto, identity, input_shapes or {}, layout, where)


def check(
    proto: onnx.ModelProto,
    identity: ModelIdentity,
    input_shapes: Mapping[str, tuple[int, ...]] | None = None,
    layout: Layout | None = None,
) -> Model:
    """As :func:`load`, for a model already in memory."""
    return _check(
        proto, identity, input_shapes or {}, layout, shown(identity.name, 300)
    )


class _Unfit(Exception):
    """What is wrong with the model and what to do, before the file is named."""


def _check(
    proto: onnx.ModelProto,
    identity: ModelIdentity,
    input_shapes: Mapping[str, tuple[int, ...]],
    layout: Layout | None,
    where: str,
) -> Model:
    try:
        return _checked(proto, identity, input_shapes, layout)
    except _Unfit as error:
        raise UserError(f"{where}: {error}") from None
    except Exception as error:  # noqa: BLE001  (onnx and protobuf raise whatever they like on hostile input)
        raise UserError(
            f"{where}: not a valid ONNX model ({_excerpt(error)}); export it again"
        ) from None


def _checked(
    proto: onnx.ModelProto,
    identity: ModelIdentity,
    input_shapes: Mapping[str, tuple[int, ...]],
    layout: Layout | None,
) -> Model:
    _check_opsets(proto)
    proto = _inlined_functions(proto)
    _check_nodes(proto)
    _check_order(proto.graph)
    _check_all_inlined(proto)
    source = _only_input(proto.graph)
    notes = _make_static(source, input_shapes)
    static = _static(proto, source)
    _check_weights(static)
    folded = fold(static)
    _check_values(folded)
    outputs = _outputs(folded)
    tensor = _tensor(source.name, value_of(source), _layout_of(source, layout))
    for output, inferred in zip(static.graph.output, folded.graph.output, strict=True):
        output.CopyFrom(inferred)
    return Model(static, identity, tensor, outputs, _is_softmax(folded), notes)


def _excerpt(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return shown(lines[0] if lines else type(error).__name__, 160)


# Files


def _read_regular(path: Path, limit: int, follow: bool = True) -> bytes:
    """The bytes of a regular file of at most ``limit`` bytes, from one open file: no gap to change it in."""
    flags = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        descriptor = os.open(path, flags | (0 if follow else os.O_NOFOLLOW))
    except (OSError, ValueError) as error:
        if not follow and path.is_symlink():
            raise _Unfit("is a link; put the file itself there") from None
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise _Unfit(f"cannot be read ({reason}); check the path") from None
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise _Unfit("is not a regular file; give an .onnx file")
        if status.st_size > limit:
            raise _Unfit(
                f"{status.st_size} bytes is more than the {limit} allowed for a model with its "
                "external data; this is for CNNs of up to 1 GiB"
            )
        with open(descriptor, "rb", closefd=False) as file:
            data = file.read(limit + 1)
    except OSError as error:
        raise _Unfit(f"cannot be read ({error.strerror}); copy it again") from None
    finally:
        os.close(descriptor)
    if len(data) > limit:
        raise _Unfit("grew while it was read; try again when it is written")
    return data


def _inline_external(
    proto: onnx.ModelProto, folder: Path, budget: int
) -> dict[str, str]:
    """Put external data into the model's own tensors.

    Returns:
        the sha256 of each external file, whole, by name.
    """
    files: dict[str, bytes] = {}
    for tensor in _tensors(proto):
        if tensor.data_location != TensorProto.EXTERNAL:
            continue
        label = f"tensor {shown(tensor.name)!r}"
        entries = {entry.key: entry.value for entry in tensor.external_data}
        location = entries.get("location", "")
        if (
            location in ("", ".", "..")
            or "\0" in location
            or set(location) & set("/\\")
        ):
            raise _Unfit(
                f"{label}: external data {shown(location)!r} is not a plain file name; "
                "put the file beside the model and export again"
            )
        if location not in files:
            left = budget - sum(map(len, files.values()))
            try:
                files[location] = _read_regular(folder / location, left, follow=False)
            except _Unfit as error:
                raise _Unfit(f"external data {shown(location)!r}: {error}") from None
        tensor.raw_data = _external_bytes(tensor, entries, files[location], label)
        budget -= len(tensor.raw_data)
        if budget < 0:
            raise _Unfit(
                f"{label}: its external data bring the model above {MAX_MODEL_BYTES} bytes"
            )
        tensor.data_location = TensorProto.DEFAULT
        del tensor.external_data[:]
    return {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}


def _external_bytes(
    tensor: TensorProto, entries: Mapping[str, str], data: bytes, label: str
) -> bytes:
    try:
        size = (
            prod(tensor.dims)
            * onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
        )
        offset = int(entries.get("offset", "0"))
        length = int(entries.get("length", str(size)))
    except (ValueError, KeyError, TypeError):
        raise _Unfit(
            f"{label}: its external data have no sensible type, offset or length"
        ) from None
    if any(dim < 0 for dim in tensor.dims) or length != size:
        raise _Unfit(
            f"{label}: {length} bytes of external data for a tensor of {size}; export again"
        )
    if offset < 0 or offset + length > len(data):
        raise _Unfit(
            f"{label}: external data from {offset} to {offset + length} are beyond the file's "
            f"{len(data)} bytes; copy or export it again"
        )
    return data[offset : offset + length]


def _tensors(proto: onnx.ModelProto) -> Iterator[TensorProto]:
    """Every dense tensor of a model: initializers and attributes, in functions and subgraphs too."""
    yield from proto.graph.initializer
    yield from _attribute_tensors(proto.graph.node)
    for function in proto.functions:
        yield from _attribute_tensors(function.node)


def _attribute_tensors(nodes: Any) -> Iterator[TensorProto]:
    for node in nodes:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                yield attribute.t
            yield from attribute.tensors
            for graph in (
                *attribute.graphs,
                *([attribute.g] if attribute.HasField("g") else []),
            ):
                yield from graph.initializer
                yield from _attribute_tensors(graph.node)


# The graph as written


def _check_opsets(proto: onnx.ModelProto) -> None:
    if not proto.opset_import or not proto.HasField("graph"):
        raise _Unfit("not an ONNX model (no graph or no opset); export it again")
    version = opset(proto)
    if version not in OPSETS:
        raise _Unfit(
            f"opset {version} of ai.onnx, this takes {OPSETS[0]} to {OPSETS[-1]}; export with "
            "opset_version=17, or use onnx.version_converter"
        )
    if not proto.graph.node:
        raise _Unfit("the graph has no nodes; export a network")


def _inlined_functions(proto: onnx.ModelProto) -> onnx.ModelProto:
    if not proto.functions:
        return proto
    _check_expansion(proto)
    inlined: onnx.ModelProto = inline_local_functions(proto)
    return inlined


def _check_expansion(proto: onnx.ModelProto) -> None:
    """Functions that call each other must end, in at most MAX_NODES nodes."""
    bodies = {(f.domain, f.name): f.node for f in proto.functions}
    calls = {
        key: {(n.domain, n.op_type) for n in nodes} & bodies.keys()
        for key, nodes in bodies.items()
    }
    try:
        order = list(TopologicalSorter(calls).static_order())
    except CycleError as error:
        raise _Unfit(
            f"function {shown(error.args[1][0][1])!r} calls itself; export again"
        ) from None
    sizes: dict[tuple[str, str], int] = {}
    for key in order:
        sizes[key] = sum(sizes.get((n.domain, n.op_type), 1) for n in bodies[key])
    total = sum(sizes.get((n.domain, n.op_type), 1) for n in proto.graph.node)
    if total > MAX_NODES:
        raise _Unfit(
            f"its functions expand to {total} nodes, more than the {MAX_NODES} allowed"
        )


def _check_nodes(proto: onnx.ModelProto) -> None:
    graph, version = proto.graph, opset(proto)
    if not graph.node:
        raise _Unfit("the graph has no nodes; export a network")
    if len(graph.node) > MAX_NODES:
        raise _Unfit(f"{len(graph.node)} nodes, more than the {MAX_NODES} allowed")
    if graph.sparse_initializer:
        raise _Unfit("sparse initializers are not built; export dense weights")
    quantised: dict[str, int] = {}
    for node in graph.node:
        if _has_integer_operators(node):
            quantised[node.op_type] = quantised.get(node.op_type, 0) + 1
    if quantised:
        name, count = max(quantised.items(), key=lambda item: item[1])
        raise _Unfit(
            f"is quantised by {count} {shown(name)} nodes: int8 is built from QuantizeLinear and "
            "DequantizeLinear (QDQ); export that, or give the float32 model with --quantize int8"
        )
    for node in graph.node:
        if node.op_type in _CONTROL_FLOW or any(
            each.HasField("g") or each.graphs for each in node.attribute
        ):
            raise _Unfit(
                f"{node_label(node)}: control flow is not built; export the network without branches or loops"
            )
        if not is_onnx(node.domain):
            raise _Unfit(
                f"{node_label(node)}: is of the domain {shown(node.domain)!r}, only ai.onnx is built; "
                "export without custom or fused operators"
            )
        if not onnx.defs.has(node.op_type, max_inclusive_version=version):
            raise _Unfit(
                f"{node_label(node)}: is not an operator of ONNX opset {version}; export without it"
            )


def _has_integer_operators(node: onnx.NodeProto) -> bool:
    return node.op_type.startswith(
        ("QLinear", "QGemm", "QAttention")
    ) or node.op_type in (
        "ConvInteger",
        "DynamicQuantizeLinear",
        "MatMulInteger",
    )


def _check_order(graph: onnx.GraphProto) -> None:
    """Every input must be made before it is read: what is wrong otherwise, as a person would say it."""
    made = {each.name for each in (*graph.input, *graph.initializer)}
    maker = {
        name: index
        for index, node in enumerate(graph.node)
        for name in node.output
        if name
    }
    early = None
    for node in graph.node:
        for name in node.input:
            if name and name not in made and early is None:
                early = node, name
        made.update(node.output)
    if early is None:
        return
    node, name = early
    if name not in maker:
        raise _Unfit(
            f"{node_label(node)}: reads {shown(name)!r}, which nothing makes; export it again"
        )
    edges = {
        index: {maker[each] for each in node.input if each in maker}
        for index, node in enumerate(graph.node)
    }
    try:
        TopologicalSorter(edges).prepare()
    except CycleError as error:
        labels = " → ".join(
            node_label(graph.node[index]) for index in error.args[1][:4]
        )
        raise _Unfit(
            f"its nodes form a cycle ({labels}); export a feed-forward network"
        ) from None
    raise _Unfit(
        f"{node_label(node)}: reads {shown(name)!r} before it is made; sort the nodes or export it again"
    )


def _check_all_inlined(proto: onnx.ModelProto) -> None:
    """onnx.checker would look for external data in the working directory."""
    for tensor in _tensors(proto):
        if tensor.data_location == TensorProto.EXTERNAL:
            raise _Unfit(
                f"tensor {shown(tensor.name)!r}: has external data; give the model as a file"
            )


def _check_weights(proto: onnx.ModelProto) -> None:
    constants = [node for node in proto.graph.node if node.op_type == "Constant"]
    made = (constant_value(node) for node in constants)
    for tensor in (
        *proto.graph.initializer,
        *(each for each in made if each is not None),
    ):
        if tensor.data_type != TensorProto.FLOAT:
            continue
        array = numpy_helper.to_array(tensor)
        if not np.isfinite(array).all():
            kind = "NaN" if np.isnan(array).any() else "infinite values"
            raise _Unfit(
                f"weights {shown(tensor.name)!r} hold {kind}; train or export it again"
            )


# Shapes


def _only_input(graph: onnx.GraphProto) -> onnx.ValueInfoProto:
    """The one input that is no initializer (IR 3 lists those as inputs too)."""
    weights = {tensor.name for tensor in graph.initializer}
    real = [each for each in graph.input if each.name not in weights]
    if len(real) != 1:
        names = ", ".join(repr(shown(each.name)) for each in real[:5])
        raise _Unfit(
            f"{len(real)} inputs ({names or 'none'}), need one image; export one input"
        )
    source = onnx.ValueInfoProto()
    source.CopyFrom(real[0])
    return source


def _make_static(
    source: onnx.ValueInfoProto, given: Mapping[str, tuple[int, ...]]
) -> tuple[str, ...]:
    """Fill the input's symbolic dimensions, in place: the batch with 1, others from ``given``.

    Returns:
        a note for each thing filled that the user did not name.
    """
    name = shown(source.name)
    for other in given.keys() - {source.name}:
        raise _Unfit(f"--input-shape names {shown(other)!r}, but the input is {name!r}")
    dtype, shape = value_of(source)
    if dtype != TensorProto.FLOAT:
        raise _Unfit(_wrong_dtype(f"input {name!r}", dtype))
    if shape is None or len(shape) != 4:
        told = (
            "has no rank"
            if shape is None
            else f"has rank {len(shape)} {_shown_shape(source)}"
        )
        raise _Unfit(f"input {name!r} {told}, need rank 4: an image with its batch")
    wanted = given.get(source.name)
    if wanted is not None:
        fits = len(wanted) == 4 and all(
            new > 0 and old in (None, new)
            for old, new in zip(shape, wanted, strict=True)
        )
        if not fits:
            raise _Unfit(
                f"--input-shape {name}:{','.join(map(str, wanted))} contradicts the input's "
                f"{_shown_shape(source)}; it fills symbolic dimensions alone"
            )
    notes: tuple[str, ...] = ()
    final = list(wanted or shape)
    if final[0] is None:
        symbol = source.type.tensor_type.shape.dim[0].dim_param
        final[0] = 1
        notes = (f"input {name!r}: symbolic batch {shown(symbol) or '?'} made 1",)
    if None in final:
        raise _Unfit(
            f"input {name!r} has symbolic dimensions {_shown_shape(source)}; "
            f"give --input-shape {name}:1,3,224,224 with its sizes"
        )
    if final[0] != 1:
        raise _Unfit(
            f"input {name!r} has batch {final[0]}, need 1; export with batch 1 or a dynamic batch"
        )
    if any(size is None or size < 1 for size in final):
        raise _Unfit(
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


def _static(proto: onnx.ModelProto, source: onnx.ValueInfoProto) -> onnx.ModelProto:
    """The model with one input, valid, without shapes inferred from another input."""
    # IR 4 is the first whose initializers need not be inputs; 10 is as new as opset 22.
    static = onnx.ModelProto(ir_version=min(max(proto.ir_version, 4), 10))
    static.opset_import.extend(
        each for each in proto.opset_import if is_onnx(each.domain)
    )
    graph = static.graph
    graph.name = proto.graph.name or "graph"
    graph.input.append(source)
    graph.node.extend(proto.graph.node)
    graph.initializer.extend(proto.graph.initializer)
    graph.output.extend(proto.graph.output)
    shapes = [output.type.tensor_type for output in graph.output]
    for tensor in shapes:
        for dim in tensor.shape.dim:
            if not dim.HasField("dim_value"):
                dim.Clear()
    # onnx.checker wants a shape of every output; strict inference would take it at its word.
    shapeless = [tensor for tensor in shapes if not tensor.HasField("shape")]
    for tensor in shapeless:
        tensor.shape.SetInParent()
    onnx.checker.check_model(static)
    for tensor in shapeless:
        tensor.ClearField("shape")
    return static


def _check_values(proto: onnx.ModelProto) -> None:
    """Every tensor static, of a type that is built, and small enough."""
    known = values(proto.graph)
    read = {name for node in proto.graph.node for name in node.input if name}
    read.update(output.name for output in proto.graph.output)
    total = 0
    for node in proto.graph.node:
        # An output nobody reads (a Dropout's mask) often has no inferred shape.
        for name in read.intersection(node.output):
            label = f"{node_label(node)}: its output {shown(name)!r}"
            dtype, shape = known.get(name, Value(0, None))
            if shape is None or None in shape:
                raise _Unfit(f"{label} has no static shape; export with fixed sizes")
            if dtype not in _DTYPES:
                raise _Unfit(_wrong_dtype(label, dtype))
            size = prod(dim or 0 for dim in shape) * _itemsize(dtype)
            total += size
            if size > MAX_TENSOR_BYTES:
                raise _Unfit(
                    f"{label} takes {size} bytes, more than the {MAX_TENSOR_BYTES} allowed"
                )
            if size <= 0:
                raise _Unfit(
                    f"{label} is empty {list(shape)}; export with larger sizes"
                )
    if total > MAX_ALL_TENSORS_BYTES:
        raise _Unfit(
            f"its tensors take {total} bytes, more than the {MAX_ALL_TENSORS_BYTES} allowed"
        )
    for tensor in proto.graph.initializer:
        if tensor.data_type not in _DTYPES:
            raise _Unfit(
                _wrong_dtype(f"weights {shown(tensor.name)!r}", tensor.data_type)
            )


def _itemsize(dtype: int) -> int:
    return onnx.helper.tensor_dtype_to_np_dtype(dtype).itemsize


def _wrong_dtype(label: str, dtype: int) -> str:
    known = dtype in TensorProto.DataType.values()
    name = TensorProto.DataType.Name(dtype).lower() if known and dtype else "no tensor"
    if name in ("float16", "bfloat16", "double"):
        return f"{label} is {name}; convert to float32 and export again (PyTorch: model.float())"
    return f"{label} is {name}, need float32; export a float32 model"


def _outputs(proto: onnx.ModelProto) -> tuple[Tensor, ...]:
    reached = {each.name for each in proto.graph.input}
    for node in proto.graph.node:
        if reached.intersection(node.input):
            reached.update(node.output)
    found = []
    for output in proto.graph.output:
        label = f"output {shown(output.name)!r}"
        value = value_of(output)
        if output.name not in reached:
            raise _Unfit(
                f"{label} does not depend on the input; export the whole network"
            )
        if value.dtype != TensorProto.FLOAT:
            raise _Unfit(_wrong_dtype(label, value.dtype))
        if not value.shape or value.shape[0] != 1 and len(value.shape) > 1:
            raise _Unfit(
                f"{label} has shape {value.shape}, need a batch of 1; export with batch 1"
            )
        found.append(_tensor(output.name, value, ""))
    if not found:
        raise _Unfit("the graph has no outputs; export it again")
    return tuple(found)


def _tensor(name: str, value: Value, layout: Layout | Literal[""]) -> Tensor:
    return Tensor(
        name=name, shape=tuple(dim or 0 for dim in value.shape or ()), layout=layout
    )


def _layout_of(source: onnx.ValueInfoProto, given: Layout | None) -> Layout:
    """Channels are 1 or 3: where they stand says the layout, and NCHW wins a tie."""
    _, second, _, fourth = (dim.dim_value for dim in source.type.tensor_type.shape.dim)
    return given or ("NHWC" if fourth in (1, 3) and second not in (1, 3) else "NCHW")


def _is_softmax(proto: onnx.ModelProto) -> bool:
    """The first output is a softmax over all its elements, at most reshaped since."""
    maker = {name: node for node in proto.graph.node for name in node.output}
    known = values(proto.graph)
    node = maker.get(proto.graph.output[0].name)
    while node is not None and node.op_type in _SHAPE_ONLY:
        node = maker.get(node.input[0])
    if node is None or node.op_type != "Softmax":
        return False
    shape = [dim or 0 for dim in known[node.input[0]].shape or ()]
    one_axis = opset(proto) >= 13
    axis = next(
        (a.i for a in node.attribute if a.name == "axis"), -1 if one_axis else 1
    )
    axis %= len(shape)
    summed = shape[axis : axis + 1] if one_axis else shape[axis:]
    return prod(summed) == prod(shape)
