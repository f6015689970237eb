"""The one place where an untrusted model is read.

Its result is valid, static ONNX. Anything else is refused in
one line that names the file. Nothing here imports TVM.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import onnx

from netship.bundle.manifest import ModelIdentity
from netship.compile.frontend import checks, limits, opsets, shapes
from netship.compile.frontend.centred import centred
from netship.compile.frontend.fold import fold
from netship.compile.frontend.formats import advice
from netship.compile.frontend.model import Model
from netship.compile.frontend.model_file import (
    MAX_MODEL_BYTES,
    inline_external,
    read_regular,
)
from netship.compile.frontend.names import Unfit
from netship.compile.frontend.preprocessing import Layout
from netship.compile.frontend.quantised.operators import as_qdq
from netship.compile.frontend.tflite.convert import convert, pixel_values
from netship.compile.frontend.tflite.reader import is_tflite
from netship.compile.frontend.widening import as_float32
from netship.targets.errors import UserError, first_line
from netship.targets.escapes import shown


def load(
    path: Path,
    input_shapes: Mapping[str, tuple[int, ...]] = {},
    layout: Layout | None = None,
) -> Model:
    """Read an ONNX file, with its external data, or a .tflite file, and check it.

    Args:
        input_shapes: what ``--input-shape`` says, for symbolic dimensions of inputs only.
        layout: of the image among the inputs; None infers it from the axis with 1 or 3 channels, an image of .tflite is NHWC; "data" says
            that none is an image.

    Raises:
        UserError: one line that names the file and what is wrong with it.
    """
    where, external, lite = shown(path, 300), dict[str, str](), False
    try:
        data = read_regular(path, MAX_MODEL_BYTES)
        lite = is_tflite(data)
        proto = convert(data) if lite else _parse(data)
        if not lite:
            external = inline_external(proto, path.parent, MAX_MODEL_BYTES - len(data))
    except Unfit as error:
        known = None if lite else advice(path)
        raise UserError(f"{where}: {known or error}") from None
    ranks = {len(each.type.tensor_type.shape.dim) for each in proto.graph.input}
    if lite and 4 in ranks:
        layout = layout or "NHWC"
    identity = ModelIdentity(
        name=path.name, sha256=hashlib.sha256(data).hexdigest(), external_data=external
    )
    model = check(proto, identity, input_shapes, layout, where)
    return replace(model, pixels=pixel_values(proto)) if lite else model


def _parse(data: bytes) -> onnx.ModelProto:
    if not data:
        raise Unfit("is empty; export or copy the model again")
    proto = onnx.ModelProto()
    try:
        proto.ParseFromString(data)
    except Exception as error:  # noqa: BLE001  (protobuf's errors have no public base class)
        raise Unfit(
            f"not an ONNX model, or cut short ({shown(first_line(error), 160)}); export or copy it again"
        ) from None
    return proto


def check(
    proto: onnx.ModelProto,
    identity: ModelIdentity,
    input_shapes: Mapping[str, tuple[int, ...]] = {},
    layout: Layout | None = None,
    where: str = "",
) -> Model:
    """As :func:`load`, for a model already in memory; ``where`` is what errors call it, by default its name."""
    where = where or shown(identity.name, 300)
    try:
        return _checked(proto, identity, input_shapes, layout)
    except Unfit as error:
        raise UserError(f"{where}: {error}") from None
    except Exception as error:  # noqa: BLE001  (onnx and protobuf raise errors of any class on hostile input)
        raise UserError(
            f"{where}: not a valid ONNX model ({shown(first_line(error), 160)}); export it again"
        ) from None


def _checked(
    proto: onnx.ModelProto,
    identity: ModelIdentity,
    input_shapes: Mapping[str, tuple[int, ...]],
    layout: Layout | None,
) -> Model:
    opsets.check_opsets(proto)
    limits.check_counts(proto.graph)
    proto = checks.inlined_functions(proto)
    limits.check_counts(proto.graph)
    checks.check_nodes(proto)
    checks.check_order(proto.graph)
    checks.check_all_inlined(proto)
    sources = shapes.real_inputs(proto.graph)
    shapes.check_names(sources, input_shapes)
    notes = [
        note for each in sources for note in shapes.make_static(each, input_shapes)
    ]
    static = opsets.expanded(shapes.static_model(proto, sources))
    static = opsets.made_older(static)
    checks.check_weights(static)
    static, converted = as_float32(static)
    static = centred(static)
    known = as_qdq(static)
    limits.check_counts(known.graph)
    folded = fold(known)
    shapes.check_values(folded)
    outputs = shapes.outputs_of(folded)
    notes += converted
    inputs = shapes.tensors_of(folded, static.graph.input, layout)
    for output, inferred in zip(static.graph.output, folded.graph.output, strict=True):
        output.CopyFrom(inferred)
    is_softmax = shapes.is_softmax(folded)
    return Model(static, identity, inputs, outputs, is_softmax, tuple(notes))
