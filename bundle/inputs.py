"""From the files that a user names to the inputs of a network: photographs, or arrays of numpy.

A photograph or a .npy file is one input; a .npz file has an array for each, by its name.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from netship.bundle import photos
from netship.bundle.manifest import Preprocessing, Tensor
from netship.targets.errors import UserError, first_line
from netship.targets.escapes import listed, shown

Array = NDArray[Any]
_ARRAYS = frozenset([".npy"])
_ARCHIVES = frozenset([".npz"])
_MOST_HEADER_BYTES = 1 << 14


class Read(NamedTuple):
    """The inputs of one inference, with what a person should know of the file, a line each, and the photograph's width and height."""

    tensors: tuple[Array, ...]
    notes: tuple[str, ...]
    size: tuple[int, int] | None = None


def find(
    paths: Sequence[Path], tensors: Sequence[Tensor], fixed: Mapping[str, Array] = {}
) -> list[Path]:
    """The files that the paths name: files as they are; of folders the images, the .npy where the input is data or there
    are no images, or the .npz where there are several.

    Args:
        fixed: inputs that are the same in each inference, by name (see `read_fixed`).
    """
    free = [each for each in tensors if each.name not in fixed]
    if len(free) != 1:
        return photos.find(paths, _ARCHIVES, "archive")
    if free[0].is_image:
        return photos.find(paths, otherwise=_ARRAYS)
    return photos.find(paths, _ARRAYS, "array")


def read(
    path: Path,
    tensors: Sequence[Tensor],
    preprocessing: Preprocessing | None,
    fixed: Mapping[str, Array] = {},
) -> Read:
    """Read the inputs of one inference.

    Args:
        path: a .npz, with an array for each input that is not in ``fixed``; where that is one, also a .npy of it, or a
            photograph, which is preprocessed. Arrays are the input tensors as they are.

    Raises:
        UserError: as `photos.read`; an array is missing, has another shape or dtype, NaN or infinity, or is pickled;
            a photograph where the input is data.
    """
    free = [each for each in tensors if each.name not in fixed]
    notes: tuple[str, ...] = ()
    size: tuple[int, int] | None = None
    if path.suffix.lower() in _ARCHIVES:
        found = _archive(path, free)
    elif len(free) != 1:
        names = listed([repr(shown(each.name)) for each in free], 4) or "none"
        data = [shown(each.name) for each in free if not each.is_image]
        how = "or --input NAME=FILE.npy"
        if path.suffix.lower() not in _ARRAYS and len(free) == len(data) + 1:
            given = listed([f"--input {name}=FILE.npy" for name in data], 4)
            how = f"or, of run and check, {given} with the photograph"
        raise UserError(
            f"{path}: the inputs to give are {names}; give a .npz file with an array for each, {how}"
        )
    elif path.suffix.lower() in _ARRAYS:
        found = {free[0].name: _array(path, free[0])}
    elif preprocessing is None or not free[0].is_image:
        raise UserError(
            f"{path}: the network takes data, not photographs; give a .npy file of {_wanted(free[0])}"
        )
    else:
        photo = photos.read(path, free[0].channels)
        found = {free[0].name: photos.to_tensor(photo, preprocessing, free[0])}
        notes, size = photo.notes, photo.image.size
    found |= fixed
    return Read(tuple(found[each.name] for each in tensors), notes, size)


def read_fixed(
    given: Sequence[tuple[str, Path]], tensors: Sequence[Tensor]
) -> dict[str, Array]:
    """The inputs that ``--input NAME=FILE.npy`` gives.

    Raises:
        UserError: no input has the name, or it is given twice; and as `read` of an array.
    """
    known = {each.name: each for each in tensors}
    found: dict[str, Array] = {}
    for name, path in given:
        if name not in known:
            names = listed([repr(shown(each)) for each in known], 4)
            raise UserError(
                f"--input {shown(name)}: there is no such input, only {names}"
            )
        if name in found:
            raise UserError(f"--input {shown(name)}: is given twice; leave one out")
        found[name] = _array(path, known[name])
    return found


def _wanted(tensor: Tensor) -> str:
    return f"{tensor.dtype} {list(tensor.shape)}"


def _array(path: Path, tensor: Tensor) -> Array:
    """The array of a .npy file, with or without the batch."""
    if not path.is_file():
        raise UserError(f"{path}: no such file; give a .npy file of {_wanted(tensor)}")
    with path.open("rb") as file:
        return _read_array(file, path.stat().st_size, str(path), tensor)


def _archive(path: Path, tensors: Sequence[Tensor]) -> dict[str, Array]:
    """The arrays of a .npz file by name, each as `_array`."""
    wanted = {f"{each.name}.npy": each for each in tensors}
    names = listed([repr(shown(each.name)) for each in tensors], 4)
    if path.exists() and not path.is_file():
        raise UserError(f"{path}: is not a file; give a .npz file with {names}")
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.namelist()
            inside = set(entries)
            if len(inside) < len(entries):
                raise UserError(
                    f"{path}: two of its arrays have one name; leave one out"
                )
            for each in sorted(wanted.keys() - inside):
                needs = f"it needs one for each of {names}"
                if len(tensors) == 1:
                    needs = "name the array so, or give a .npy file"
                raise UserError(
                    f"{path}: has no array {shown(wanted[each].name)!r}; {needs}"
                )
            for each in sorted(inside - wanted.keys()):
                raise UserError(
                    f"{path}: has {shown(each.removesuffix('.npy'))!r}, which is no input to give; these are {names}"
                )
            found = {}
            for each, tensor in wanted.items():
                with archive.open(each) as file:
                    where = f"{path}: array {shown(tensor.name)!r}"
                    size = archive.getinfo(each).file_size
                    found[tensor.name] = _read_array(file, size, where, tensor)
            return found
    except UserError:
        raise
    except Exception as error:  # noqa: BLE001  (zipfile raises errors of any class on a hostile archive)
        raise UserError(
            f"{path}: not a .npz file of arrays ({shown(first_line(error), 160)}); write it with numpy.savez"
        ) from None


def _read_array(file: IO[bytes], size: int, where: str, tensor: Tensor) -> Array:
    """One array in numpy's format; shape and dtype are checked before it is read, and nothing is ever unpickled."""
    shapes = (tensor.shape, tensor.shape[1:])
    try:
        # A header may claim 4 GiB.
        head = io.BytesIO(file.read(_MOST_HEADER_BYTES))
        version = np.lib.format.read_magic(head)
        header = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
        }[version]
        shape, is_fortran, dtype = header(head)
        if dtype.hasobject:
            raise ValueError("pickled objects")
        if not 0 <= prod(shape) * dtype.itemsize <= size:
            raise ValueError(f"{size} bytes for {list(shape)[:8]}")
        if shape in shapes and dtype == np.dtype(tensor.dtype):
            data = head.read(tensor.nbytes)
            data += file.read(tensor.nbytes - len(data))
            array = np.frombuffer(data, dtype)
            array = array.reshape(shape, order="F" if is_fortran else "C")
    except Exception as error:  # noqa: BLE001  (numpy raises errors of any class on a hostile header)
        raise UserError(
            f"{where}: not a .npy file of numbers ({shown(first_line(error), 160)}); write it with numpy.save"
        ) from None
    if dtype != np.dtype(tensor.dtype):
        raise UserError(
            f"{where}: has {shown(dtype)}, the input is {_wanted(tensor)}; convert it with astype"
        )
    if shape not in shapes:
        raise UserError(
            f"{where}: has the shape {list(shape)}, the input is {_wanted(tensor)}; reshape it"
        )
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise UserError(f"{where}: has NaN or infinity; give finite values")
    if array.dtype.kind == "b" and array.view(np.uint8).max(initial=0) > 1:
        raise UserError(f"{where}: has other values than 0 and 1; give booleans")
    if tensor.choices and array.size:
        least, most = int(array.min()), int(array.max())
        if not -tensor.choices <= least <= most < tensor.choices:
            far = least if least < -tensor.choices else most
            raise UserError(
                f"{where}: has the index {far}, the input takes 0 to {tensor.choices - 1}; correct it"
            )
    return np.array(array, order="C").reshape(tensor.shape)
