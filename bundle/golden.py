"""Golden data: inputs and the reference's outputs, so that a device can check itself without the model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

import numpy as np
from numpy.typing import NDArray

from netship.bundle.manifest import Golden, Preprocessing, Tensor
from netship.targets.errors import UserError

if TYPE_CHECKING:
    from netship.bundle.store import Bundle

Array = NDArray[np.float32]


class Check(NamedTuple):
    """Inputs of one inference, what the network must answer, and how far each element of that may be off.

    Attributes:
        tolerances: of the shapes of ``outputs``; finite, not negative.
    """

    inputs: Sequence[NDArray[Any]]
    outputs: Sequence[NDArray[Any]]
    tolerances: Sequence[Array]


DATA_RANGE = (-1.0, 1.0)
"""Of the seeded inputs of a network that takes data, whose own range nothing states."""
INDICES = (0.0, 3.0)
"""The same of whole numbers of 32 or 64 bits that are no known indices."""
# Between those of two inputs.
_SEEDS = 1000
# As far from 0 as nearly all of what has mean 0 and standard deviation 1.
_DATA_EXTREME = 4.0


def input_range(
    tensor: Tensor, preprocessing: Preprocessing | None
) -> tuple[float, float]:
    """What the darkest and the brightest pixel become in the first channel; of data `DATA_RANGE`; of bytes theirs.

    Whole numbers of 32 or 64 bits often are indices: `Tensor.choices`, or `INDICES`.
    """
    if tensor.dtype == "bool":
        return 0.0, 1.0
    if tensor.dtype in ("int32", "int64"):
        return (0.0, tensor.choices - 1.0) if tensor.choices else INDICES
    if tensor.dtype != "float32":
        known = np.iinfo(tensor.dtype)
        return float(known.min), float(known.max)
    if preprocessing is None:
        return DATA_RANGE
    return preprocessing.normalised(0.0)[0], preprocessing.normalised(255.0)[0]


def of_all(
    make: Callable[..., list[NDArray[Any]]],
    tensors: Sequence[Tensor],
    preprocessing: Preprocessing | None,
) -> list[tuple[NDArray[Any], ...]]:
    """What `seeded_inputs` or `signed_inputs` makes of each input of a network, by inference."""
    made = [
        make(each, preprocessing if each.is_image else None, number=number)
        for number, each in enumerate(tensors)
    ]
    return list(zip(*made, strict=True))


def seeded_inputs(
    tensor: Tensor,
    preprocessing: Preprocessing | None,
    count: int = 2,
    *,
    number: int = 0,
) -> list[NDArray[Any]]:
    """Smooth seeded patterns in the value range of preprocessed photographs; of data uniform noise in `input_range`.

    Each channel is a sum of three plane waves of a few periods across the image, as
    0 to 255 pixels, then preprocessed: closer to a photograph than white noise is.

    Args:
        number: of the input, among several; each has seeds of its own.

    Returns:
        ``count`` arrays of ``tensor.shape`` and its type.
    """
    seeds = range(number * _SEEDS, number * _SEEDS + count)
    if preprocessing is None:
        low, high = input_range(tensor, None)
        # Of whole numbers the largest is as frequent as others.
        high += tensor.dtype in ("int32", "int64", "bool")
        return [
            np.random.Generator(np.random.PCG64(seed))
            .uniform(low, high, tensor.shape)
            .astype(np.uint8 if tensor.dtype == "bool" else tensor.dtype)
            .astype(tensor.dtype)
            for seed in seeds
        ]
    height, width = tensor.size
    y, x = np.mgrid[0 : 1 : complex(0, height), 0 : 1 : complex(0, width)]
    inputs = []
    for seed in seeds:
        random = np.random.Generator(np.random.PCG64(seed))
        waves = np.zeros((tensor.channels, height, width))
        for plane in waves:
            for _ in range(3):
                fx, fy, phase = random.uniform((0.5, 0.5, 0), (6, 6, 2 * np.pi))
                plane += np.sin(2 * np.pi * (fx * x + fy * y) + phase)
        pixels = np.rint((waves / 3 + 1) * 127.5)
        inputs.append(normalise(pixels, preprocessing, tensor))
    return inputs


def signed_inputs(
    tensor: Tensor, preprocessing: Preprocessing | None, *, number: int = 0
) -> list[NDArray[Any]]:
    """What photographs do not have: noise of both signs, and stripes of zeros and of the largest values.

    Of data the noise has the standard deviation 2, and the largest values are ±4. Integers are spread over their range.

    Returns:
        Two arrays of ``tensor.shape`` and its type.
    """
    integers = tensor.dtype != "float32"
    most = _DATA_EXTREME
    if preprocessing is not None:
        ends = [preprocessing.normalised(value) for value in (0.0, 255.0)]
        most = float(np.abs(ends).max())
    random = np.random.Generator(np.random.PCG64(2 + number * _SEEDS))
    low, high = input_range(tensor, preprocessing) if integers else (-most, most)
    values = random.normal(size=tensor.shape) * (high - low) / 4 + (low + high) / 2
    noise = values.astype(np.float32)
    if integers:
        noise = np.clip(np.trunc(values), low, high).astype(tensor.dtype)
    stripes = noise.copy().ravel()
    for part, value in zip(
        np.array_split(stripes, 8)[::2], (0, high, low, 0), strict=True
    ):
        part[:] = value
    return [noise, stripes.reshape(tensor.shape)]


def normalise(
    pixels: NDArray[np.float64], preprocessing: Preprocessing, tensor: Tensor
) -> NDArray[Any]:
    """Pixels [channels, height, width] in 0 to 255 → the input tensor, ``(v * scale - mean) / std``, quantised where it is."""
    mean = np.asarray(preprocessing.mean).reshape(-1, 1, 1)
    std = np.asarray(preprocessing.std).reshape(-1, 1, 1)
    real = (pixels * preprocessing.scale - mean) / std
    values = stored(real, tensor)
    if tensor.layout == "NHWC":
        values = values.transpose(1, 2, 0)
    return np.ascontiguousarray(values[np.newaxis])


def stored(real: NDArray[np.floating], tensor: Tensor) -> NDArray[Any]:
    """Real values as the input tensor has them: float32, or rounded to a step of int8 or uint8."""
    if tensor.dtype == "float32":
        return real.astype("<f4")
    steps, zero = real, 0
    if tensor.quantised is not None:
        steps, zero = real / tensor.quantised.scale, tensor.quantised.zero
    low, high = input_range(tensor, None)
    values: NDArray[Any] = np.clip(np.rint(steps) + zero, low, high)
    return values.astype(tensor.dtype)


def undecided(
    checks: Sequence[Check], outputs: Sequence[Tensor]
) -> dict[str, tuple[int, int]]:
    """Of each output of whole numbers that rounding can change: in how many of its elements, and of how many."""
    found = {}
    for number, output in enumerate(outputs):
        near = [each.tolerances[number] for each in checks]
        count = sum(int(np.count_nonzero(each)) for each in near)
        if output.dtype in ("int32", "int64") and count:
            found[output.name] = count, sum(each.size for each in near)
    return found


def write_golden(folder: Path, checks: Iterable[Check]) -> list[Golden]:
    """Write ``golden/`` under ``folder``: inputs, the reference's outputs and their tolerances, raw little-endian.

    Each has its own type; tolerances are float32.
    """
    (folder / "golden").mkdir()
    written = []
    for index, check in enumerate(checks):
        numbers = range(len(check.outputs))
        sources = [""] if len(check.inputs) == 1 else range(len(check.inputs))
        entry = Golden(
            inputs=tuple(f"golden/{index}.input{k}.bin" for k in sources),
            outputs=tuple(f"golden/{index}.output{k}.bin" for k in numbers),
            tolerances=tuple(f"golden/{index}.tolerance{k}.bin" for k in numbers),
        )
        arrays = (*check.inputs, *check.outputs, *check.tolerances)
        for path, values in zip(entry.paths, arrays, strict=True):
            stored = values.astype(values.dtype.newbyteorder("<"))
            (folder / path).write_bytes(stored.tobytes())
        written.append(entry)
    return written


def read_golden(bundle: Bundle) -> list[Check]:
    """Every golden input with its reference outputs and their tolerances, in the manifest's shapes.

    Raises:
        UserError: a tolerance is negative, or it or an input is not finite.
    """
    manifest = bundle.manifest
    checks = []
    for entry in manifest.golden:
        given, outputs, tolerances = (
            [
                _read(bundle, path, tensor.shape, dtype or tensor.dtype)
                for path, tensor in zip(paths, tensors, strict=True)
            ]
            for paths, tensors, dtype in (
                (entry.inputs, manifest.inputs, ""),
                (entry.outputs, manifest.outputs, ""),
                (entry.tolerances, manifest.outputs, "float32"),
            )
        )
        check = Check(given, outputs, tolerances)
        finite = zip(
            (*entry.inputs, *entry.tolerances), (*given, *tolerances), strict=True
        )
        for path, values in finite:
            if not np.isfinite(values).all():
                _refuse(bundle, path, "has NaN or infinity")
        for path, values in zip(entry.tolerances, tolerances, strict=True):
            if (values < 0).any():
                _refuse(bundle, path, "has a negative tolerance")
        checks.append(check)
    return checks


def _read(
    bundle: Bundle, path: str, shape: tuple[int, ...], dtype: str
) -> NDArray[Any]:
    stored = np.dtype(dtype).newbyteorder("<")
    return np.frombuffer(bundle.read(path), stored).reshape(shape)


def _refuse(bundle: Bundle, path: str, what: str) -> NoReturn:
    raise UserError(f"{bundle.path / path}: {what}; build the bundle again")
