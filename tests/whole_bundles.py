"""A whole bundle without code: as much of a library as the store looks at, golden data, a manifest."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np

from netship.bundle.golden import Check, seeded_inputs, write_golden
from netship.bundle.manifest import (
    Lowering,
    Manifest,
    ModelIdentity,
    Preprocessing,
    TargetIdentity,
    Tensor,
)
from netship.bundle.store import LIBRARY, MANIFEST, sha256_of

INPUT = Tensor(name="image", shape=(1, 3, 4, 6), layout="NCHW")
OUTPUT = Tensor(name="scores", shape=(1, 5))
PREPROCESSING = Preprocessing(
    resize=8, crop=(4, 6), scale=1 / 127.5, mean=(1,), std=(1,)
)


def elf(machine: int = 62) -> bytes:
    """As much of a little-endian ELF file as the store looks at."""
    return b"\x7fELF\x02\x01" + bytes(12) + struct.pack("<H", machine) + bytes(44)


def scores(image: Any) -> list[Any]:
    return [np.arange(5, dtype=np.float32)[np.newaxis] + image.mean()]


def fill(folder: Path, library: bytes | None = None) -> Manifest:
    """Make a whole bundle in an empty folder."""
    (folder / LIBRARY).write_bytes(elf() if library is None else library)
    (folder / "labels.txt").write_text("ant\nbee\ncat\ndog\neel\n")
    inputs = seeded_inputs(INPUT, PREPROCESSING)
    near = [np.full(OUTPUT.shape, 0.25, np.float32)]
    golden = write_golden(folder, [Check([x], scores(x), near) for x in inputs])
    files = [path for path in folder.rglob("*") if path.is_file()]
    manifest = Manifest(
        model=ModelIdentity(name="m.onnx", sha256="0" * 64),
        target=TargetIdentity(name="x86-64-v2", tvm="llvm", machine="x86_64"),
        engine="test",
        threads=2,
        inputs=(INPUT,),
        outputs=(OUTPUT,),
        probabilities=False,
        preprocessing=PREPROCESSING,
        labels="labels.txt",
        lowering=Lowering(
            layout="NCHW", reason="test", operators={}, groups=(), workspace_bytes=0
        ),
        golden=tuple(golden),
        files={path.relative_to(folder).as_posix(): sha256_of(path) for path in files},
        measured={"seconds": 1.5, "nested": {"list": [1, None]}},
    )
    (folder / MANIFEST).write_text(manifest.to_json())
    return manifest
