"""The interface of a device with a bundle loaded: run it, time it, profile it, close it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from enum import StrEnum
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol, Self, TypeVar

import numpy as np
from numpy.typing import NDArray

from netship.bundle.manifest import Tensor
from netship.devices.board.board_state import BoardState
from netship.devices.microcontroller.figures import Figures
from netship.targets.errors import UserError
from netship.targets.escapes import counted, shown

T = TypeVar("T")
Array = NDArray[Any]
Outputs = list[NDArray[Any]]


class Origin(StrEnum):
    """Where a figure comes from. Figures of different origins are never compared in a ratio."""

    HOST = "measured on host"
    BOARD = "measured on board"
    EMULATED = "emulated"
    ESTIMATED = "estimated"


class OperatorTime(NamedTuple):
    """One fused operator's share of an inference, in seconds."""

    name: str
    output_shape: tuple[int, ...]
    seconds: float


def check_inputs(tensors: Sequence[Array], wanted: Sequence[Tensor]) -> None:
    """`check_input` of each; a ValueError where there are more or fewer."""
    if len(tensors) != len(wanted):
        raise ValueError(f"{counted(len(tensors), 'input')}, not {len(wanted)}")
    for tensor, each in zip(tensors, wanted, strict=True):
        check_input(tensor, each)


def check_input(tensor: Array, wanted: Tensor) -> None:
    """Refuse what no kernel may see: a maximum or a quantisation makes an ordinary number of NaN.

    Raises:
        ValueError: another shape, or not the type of an integer input.
        UserError: a value is NaN or infinite.
    """
    if wanted.dtype not in ("float32", tensor.dtype.name):
        raise ValueError(f"input is {tensor.dtype}, not {wanted.dtype}")
    if tensor.shape != wanted.shape:
        raise ValueError(f"input is {tensor.shape}, not {wanted.shape}")
    if not np.isfinite(tensor).all():
        raise UserError(
            f"input {shown(wanted.name)!r}: has NaN or infinity; give finite values"
        )


class Session(Protocol):
    """A bundle loaded on one device. Not thread-safe; close it, or use it in ``with``.

    Attributes:
        done: how many inputs each board of several has run; empty for a single device.
    """

    origin: Origin
    threads: int
    done: Mapping[str, int] = MappingProxyType({})

    def run(self, *tensors: Array) -> Outputs:
        """One inference: inputs of the manifest's shapes and types in, every output back.

        Raises:
            ValueError: another shape.
            UserError: an input has NaN or infinity (see `check_input`), the device is gone, or what runs there fails.
        """
        ...

    def run_all(
        self, items: Iterable[T], tensors: Callable[[T], Sequence[Array]]
    ) -> Iterator[tuple[T, Outputs]]:
        """Every item with the outputs of its tensors, in order."""
        for item in items:
            yield item, self.run(*tensors(item))

    def time(self, tensors: Sequence[Array], repeat: int) -> list[float]:
        """Seconds of each of ``repeat`` inferences by the device's own clock, without transfers."""
        ...

    def profile(self, tensors: Sequence[Array]) -> list[OperatorTime]:
        """Time of each fused operator; empty where the device cannot measure it."""
        return []

    def figures(self) -> Figures | None:
        """What an inference needs of a microcontroller; None on other devices."""
        return None

    def board(self) -> BoardState | None:
        """The board's state now; None where it cannot tell, and on this machine."""
        return None

    def close(self) -> None:
        """End the session; the second time does nothing."""
        ...

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # An error while closing must not replace the first one.
        with contextlib.suppress(*([UserError] if kind else [])):
            self.close()
