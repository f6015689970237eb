"""The bytes of a model file and of its external data, read once and within a limit."""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from collections.abc import Iterator, Mapping
from math import prod
from pathlib import Path
from typing import Any

import onnx
from onnx import TensorProto

from netship.compile.frontend.names import Unfit
from netship.targets.escapes import shown

# Protobuf stops at 2 GiB, and onnx copies a model twice to check it: VGG-19 (575 MB) is the largest
# common CNN. The file and its external data together.
MAX_MODEL_BYTES = 1 << 30


def read_regular(path: Path, limit: int, follow: bool = True) -> bytes:
    """The bytes of a regular file of at most ``limit`` bytes, from one open file, so that nobody can exchange it in between."""
    flags = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        descriptor = os.open(path, flags | (0 if follow else os.O_NOFOLLOW))
    except (OSError, ValueError) as error:
        if isinstance(error, OSError) and error.errno == errno.ELOOP and not follow:
            raise Unfit("is a link; put the file itself there") from None
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise Unfit(f"cannot be read ({reason}); check the path") from None
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise Unfit("is not a regular file; give an .onnx file")
        if status.st_size > limit:
            raise Unfit(
                f"{status.st_size} bytes is more than the {limit} allowed for a model with its "
                "external data; this is for CNNs of up to 1 GiB"
            )
        with open(descriptor, "rb", closefd=False) as file:
            data = file.read(limit + 1)
    except OSError as error:
        raise Unfit(f"cannot be read ({error.strerror}); copy it again") from None
    finally:
        os.close(descriptor)
    if len(data) > limit:
        raise Unfit("grew while it was read; try again when it is written")
    return data


def inline_external(
    proto: onnx.ModelProto, folder: Path, budget: int
) -> dict[str, str]:
    """Put external data into the model's own tensors.

    Returns:
        the sha256 of each external file, whole, by name.
    """
    files: dict[str, bytes] = {}
    for tensor in tensors(proto):
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
            raise Unfit(
                f"{label}: external data {shown(location)!r} is not a plain file name; "
                "put the file beside the model and export again"
            )
        if location not in files:
            left = budget - sum(map(len, files.values()))
            try:
                files[location] = read_regular(folder / location, left, follow=False)
            except Unfit as error:
                raise Unfit(f"external data {shown(location)!r}: {error}") from None
        tensor.raw_data = _external_bytes(tensor, entries, files[location], label)
        budget -= len(tensor.raw_data)
        if budget < 0:
            raise Unfit(
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
        raise Unfit(
            f"{label}: its external data have no sensible type, offset or length"
        ) from None
    if any(dim < 0 for dim in tensor.dims) or length != size:
        raise Unfit(
            f"{label}: {length} bytes of external data for a tensor of {size}; export again"
        )
    if offset < 0 or offset + length > len(data):
        raise Unfit(
            f"{label}: external data from {offset} to {offset + length} are beyond the file's "
            f"{len(data)} bytes; copy or export it again"
        )
    return data[offset : offset + length]


def tensors(proto: onnx.ModelProto) -> Iterator[TensorProto]:
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
            for graph in (*attribute.graphs, attribute.g):
                yield from graph.initializer
                yield from _attribute_tensors(graph.node)
