"""The interface of a device with a bundle loaded: run it, time it, profile it, close it."""

from __future__ import annotations

from enum import StrEnum
from types import TracebackType
from typing import NamedTuple, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from devices.board.board_state import BoardState


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


class Session(Protocol):
    """A bundle loaded on one device. Not thread-safe; close it, or use it in ``with``."""

    origin: Origin
    threads: int

    def run(self, tensor: NDArray[np.float32]) -> list[NDArray[np.float32]]:
        """One inference: the input tensor in the manifest's shape, every output back."""
        ...

    def time(self, tensor: NDArray[np.float32], repeat: int) -> list[float]:
        """Seconds of each of ``repeat`` inferences by the device's own clock, without transfers."""
        ...

    def profile(self, tensor: NDArray[np.float32]) -> list[OperatorTime]:
        """Time of each fused operator; empty where the device cannot measure it."""
        ...

    def board(self) -> BoardState | None:
        """The board's state now; None where it cannot tell, and on this machine."""
        ...

    def close(self) -> None: ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...
