"""Write what turns a camera's bytes into the input as C99, with the manifest's preprocessing as constants."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from netship.bundle.golden import normalise
from netship.bundle.manifest import Preprocessing, Tensor
from netship.bundle.photos import LONGEST_RATIO
from netship.compile.backends import companions
from netship.targets.escapes import C_TYPES, c_float

_HERE = Path(__file__).parent
# How far a weight reaches, in pixels of the smaller image.
_SUPPORT = {"area": 0.5, "bilinear": 1.0, "bicubic": 2.0, "lanczos": 3.0, "nearest": 0}


@dataclass(frozen=True)
class Image:
    """The input that is an image, as the network's C function takes it.

    Attributes:
        number: what tells it from other inputs; empty where it is the only one.
        values: [channels, 256], what each byte becomes, in the C's type.
        layout: NCHW or NHWC, as it lies in memory.
        memory_bytes: of the memory for parts of the resized image.
        fixed: whether that is compiled into a library.
    """

    preprocessing: Preprocessing
    tensor: Tensor
    number: str
    values: NDArray[Any]
    layout: str
    memory_bytes: int
    fixed: bool

    @property
    def name(self) -> str:
        return f"input{self.number}"

    @property
    def index(self) -> int:
        return int(self.number or 0)

    @property
    def c_type(self) -> str:
        return C_TYPES[self.values.dtype.name]


def byte_values(preprocessing: Preprocessing, tensor: Tensor) -> NDArray[Any]:
    """What each byte becomes in the input tensor: [1, channels, 1, 256], in its type."""
    pixels = np.tile(np.arange(256.0), (tensor.channels, 1, 1))
    in_order = tensor.model_copy(update={"layout": "NCHW"})
    return normalise(pixels, preprocessing, in_order)


def write(folder: Path, name: str, version: str, image: Image) -> None:
    """Write ``NAME_image.h`` and ``NAME_image.c`` into ``folder``.

    Args:
        name: the prefix of what they declare.
        version: what the code says of itself.
    """
    how = image.preprocessing
    height, width = how.crop
    rows = image.values.reshape(-1, 256).tolist()
    if all(row == rows[0] for row in rows):
        del rows[1:]
    texts = c_float if image.values.dtype == np.float32 else str
    values = {
        "version": version,
        "port": image,
        "values": [[texts(each) for each in row] for row in rows],
        "layout": image.layout,
        "memory_bytes": image.memory_bytes,
        "memory_bytes_fixed": image.fixed,
        "channels": image.tensor.channels,
        "height": height,
        "width": width,
        "fit": how.fit,
        "resize": how.resize if isinstance(how.resize, tuple) else (how.resize,) * 2,
        "pad": how.pad,
        "order": how.channel_order,
        "longest": LONGEST_RATIO,
        "filter": how.interpolation,
        "support": _SUPPORT[how.interpolation],
        "geometry": how.geometry(),
        "formula": how.formula(),
        "quantised": image.values.dtype == np.int8,
    }
    companions.write(folder, name, "image", _HERE, values)


def write_labels(folder: Path, name: str, version: str, labels: Sequence[str]) -> None:
    """Write ``NAME_labels.h`` and ``NAME_labels.c`` into ``folder``."""
    values = {"version": version, "labels": labels}
    companions.write(folder, name, "labels", _HERE, values)
