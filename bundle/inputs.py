"""From the files that a user names to input tensors: photographs, or arrays of numpy."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from netship.bundle import photos
from netship.bundle.manifest import Preprocessing, Tensor
from netship.targets.errors import UserError, first_line
from netship.targets.escapes import shown

_ARRAYS = frozenset([".npy"])


class Read(NamedTuple):
    """An input tensor, with what a person should know of the file, a line each, and the photograph's width and height."""

    tensor: NDArray[Any]
    notes: tuple[str, ...]
    size: tuple[int, int] | None = None


def find(paths: Sequence[Path], tensor: Tensor) -> list[Path]:
    """The files that the paths name: files as they are, of folders the images, or the .npy where the input is data."""
    if tensor.is_image:
        return photos.find(paths)
    return photos.find(paths, _ARRAYS, "array")


def read(path: Path, tensor: Tensor, preprocessing: Preprocessing | None) -> Read:
    """Read one input: a photograph, which is preprocessed, or a .npy, which is the input tensor as it is.

    Raises:
        UserError: as `photos.read`; an array of another shape or dtype, with NaN or infinity, or pickled;
            a photograph where the input is data.
    """
    if path.suffix.lower() in _ARRAYS:
        return Read(_array(path, tensor), ())
    if preprocessing is None:
        raise UserError(
            f"{path}: the network takes data, not photographs; give a .npy file of {_wanted(tensor)}"
        )
    photo = photos.read(path, tensor.channels)
    values = photos.to_tensor(photo, preprocessing, tensor)
    return Read(values, photo.notes, photo.image.size)


def _wanted(tensor: Tensor) -> str:
    return f"{tensor.dtype} {list(tensor.shape)}"


def _array(path: Path, tensor: Tensor) -> NDArray[Any]:
    """The array of a .npy file, with or without the batch."""
    if not path.is_file():
        raise UserError(f"{path}: no such file; give a .npy file of {_wanted(tensor)}")
    try:
        # Mapped: shape and dtype are known before anything is read, and nothing is ever unpickled.
        array = np.lib.format.open_memmap(path, mode="r")
    except Exception as error:  # noqa: BLE001  (numpy raises errors of any class on a hostile header)
        raise UserError(
            f"{path}: not a .npy file of numbers ({shown(first_line(error), 160)}); write it with numpy.save"
        ) from None
    if array.dtype != np.dtype(tensor.dtype):
        raise UserError(
            f"{path}: has {shown(array.dtype)}, the input is {_wanted(tensor)}; convert it with astype"
        )
    if array.shape not in (tensor.shape, tensor.shape[1:]):
        raise UserError(
            f"{path}: has the shape {list(array.shape)}, the input is {_wanted(tensor)}; reshape it"
        )
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise UserError(f"{path}: has NaN or infinity; give finite values")
    return np.array(array, order="C").reshape(tensor.shape)
