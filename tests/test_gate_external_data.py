"""Weights in files of their own: the gate reads them from the model's folder only, in bounds, with their hash."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import graphs
import onnx
import pytest
from gated import refused, small
from onnx import TensorProto

from netship.compile.frontend.gate import load


def with_external(
    folder: Path,
    location: str,
    length: int | None = 24,
    offset: int = 0,
    data: bytes = bytes(24),
) -> onnx.ModelProto:
    """The small model, its weights declared to lie in ``location``; w.bin holds ``data``."""
    (folder / "w.bin").write_bytes(data)
    model = small()
    (tensor,) = model.graph.initializer
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    entries = {"location": location, "offset": str(offset)}
    if length is not None:
        entries["length"] = str(length)
    for key, value in entries.items():
        tensor.external_data.add(key=key, value=value)
    return model


def linked(folder: Path) -> onnx.ModelProto:
    model = with_external(folder, "link.bin")
    (folder / "link.bin").symlink_to(folder / "w.bin")
    return model


EXTERNAL: dict[str, tuple[Callable[[Path], onnx.ModelProto], str]] = {
    "outside by ..": (
        lambda folder: with_external(folder, "../w.bin"),
        "not a plain file name",
    ),
    "outside by /": (
        lambda folder: with_external(folder, "/etc/passwd"),
        "not a plain file name",
    ),
    "in a sub-folder": (
        lambda folder: with_external(folder, "a/w.bin"),
        "not a plain file name",
    ),
    "the folder itself": (
        lambda folder: with_external(folder, "."),
        "not a plain file name",
    ),
    "without a name": (
        lambda folder: with_external(folder, ""),
        "not a plain file name",
    ),
    "a NUL in the name": (
        lambda folder: with_external(folder, "w\0.bin"),
        "not a plain file name",
    ),
    "a link": (linked, "'link.bin': is a link"),
    "missing": (
        lambda folder: with_external(folder, "other.bin"),
        "'other.bin': cannot be read",
    ),
    "beyond the file's end": (
        lambda folder: with_external(folder, "w.bin", offset=4),
        "beyond the file's 24",
    ),
    "before its start": (
        lambda folder: with_external(folder, "w.bin", offset=-4),
        "beyond the file's 24",
    ),
    "of another size": (
        lambda folder: with_external(folder, "w.bin", length=20),
        "20 bytes .* for a tensor of 24",
    ),
    "at an offset that is no number": (
        lambda folder: with_external(folder, "w.bin", offset="x"),  # type: ignore[arg-type]
        "no sensible type, offset or length",
    ),
}


@pytest.mark.parametrize("name", EXTERNAL)
def test_external_data_are_refused(name: str, tmp_path: Path) -> None:
    make, message = EXTERNAL[name]
    folder = tmp_path / "models"
    folder.mkdir()
    path = folder / "model.onnx"
    path.write_bytes(make(folder).SerializeToString())
    refused(path, message)


def test_external_data_are_capped_before_they_are_read(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(with_external(tmp_path, "w.bin").SerializeToString())
    with (tmp_path / "w.bin").open("wb") as file:
        file.truncate(3 << 30)
    refused(path, f"'w.bin': {3 << 30} bytes is more than")


def test_external_data_come_in_with_their_hash(tmp_path: Path) -> None:
    values = graphs.image((2, 3, 1, 1)).tobytes()
    model = with_external(
        tmp_path, "w.bin", length=None, offset=8, data=bytes(8) + values
    )
    path = tmp_path / "model.onnx"
    path.write_bytes(model.SerializeToString())
    loaded = load(path)
    assert loaded.identity.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    digest = hashlib.sha256((tmp_path / "w.bin").read_bytes()).hexdigest()
    assert loaded.identity.external_data == {"w.bin": digest}
    assert loaded.proto.graph.initializer[0].raw_data == values
