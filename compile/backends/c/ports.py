"""The inputs and outputs of a C project as its header has them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from netship.bundle.golden import INDICES
from netship.bundle.manifest import Tensor as Given
from netship.compile.ir.graph import NHWC, Graph, Tensor
from netship.targets.escapes import C_TYPES

# Of the self-test's pattern: from one input to the next.
SALT = 977


@dataclass(frozen=True)
class Port:
    """An input or output of the generated function.

    Attributes:
        number: what tells it from others; empty where it is the only one.
    """

    tensor: Tensor
    number: str
    kind: ClassVar[str] = "output"

    @property
    def name(self) -> str:
        return f"{self.kind}{self.number}"

    @property
    def macro(self) -> str:
        return self.name.upper()

    @property
    def c_type(self) -> str:
        return C_TYPES[self.tensor.dtype]

    @property
    def dims(self) -> tuple[int, ...]:
        return dims(self.tensor)


def dims(tensor: Tensor) -> tuple[int, ...]:
    """Its sizes as they lie in memory, for a person: of one image height, width and channels."""
    if len(tensor.shape) == 4 and tensor.layout == NHWC and tensor.shape[0] == 1:
        return tensor.image
    return tensor.shape if len(tensor.shape) > 2 else tensor.image


@dataclass(frozen=True)
class InputPort(Port):
    """An input of the generated function.

    Attributes:
        offset: where in the arena it begins, in bytes, if it lies there.
        given: the model's input.
        image: whether photographs become it.
        arena: the arena that this is of.
        home, example: C that finds it there, in the generated function and in a program.
        elsewhere: C that is true where it lies elsewhere.
    """

    offset: int
    given: Given
    image: bool
    arena: str = "arena"
    home: str = ""
    elsewhere: str = ""
    example: str = ""
    kind: ClassVar[str] = "input"

    @property
    def choices(self) -> int:
        """How many values it has in the self-test, of whole numbers of 32 or 64 bits."""
        return choices(self.given)

    @property
    def variable(self) -> str:
        """What a program calls it."""
        return "image" if self.image and not self.number else self.name

    @property
    def laid_out(self) -> tuple[int, ...]:
        """Its sizes as they lie in memory: of an image height, width and channels, of data all."""
        if self.image:
            return self.tensor.image
        if len(self.tensor.shape) == 4:
            return (self.tensor.shape[0], *self.tensor.image)
        return self.given.shape

    @property
    def moved(self) -> bool:
        """Whether axis 1 of the model's input lies last in memory."""
        return self.laid_out != self.given.shape

    @property
    def salt(self) -> int:
        """By how much the self-test's pattern is ahead of the first input's."""
        return int(self.number or 0) * SALT


def input_port(name: str, port: InputPort, dtype: str) -> InputPort:
    """The input with its C filled in.

    Args:
        name: the project's.
        dtype: of the values that its kernels work on.
    """
    source = port.tensor
    begin = f"{name.upper()}_{port.macro}_OFFSET"
    kind, size = C_TYPES[source.dtype], source.itemsize
    if source.dtype != dtype:
        home = f"({kind} *)((uint8_t *){port.arena} + {begin})"
        example = f"({kind} *)((uint8_t *)&{port.arena} + {begin})"
        return replace(
            port, home=home, elsewhere=f"{port.name} != {home}", example=example
        )
    of_base, of_type = (
        (" / sizeof *base", f" / sizeof({kind})") if size > 1 else ("", "")
    )
    return replace(
        port,
        home=f"({kind} *){port.arena} + {begin}{of_type}",
        elsewhere=f"{port.name} != {base_of(port.arena)} + {begin}{of_base}",
        example=f"{port.arena}.values + {begin}{of_type}",
    )


def base_of(arena: str) -> str:
    """What the generated function calls the values of an arena."""
    return arena.replace("arena", "base", 1)


def choices(given: Given) -> int:
    """How many values the self-test's whole numbers of 32 or 64 bits have."""
    return given.choices or int(INDICES[1]) + 1


def test_patterns(graph: Graph, given: Sequence[Given]) -> list[NDArray[Any]]:
    """The inputs of the generated self-test: the top byte of Knuth's multiplicative hash of the index.

    As int8 or uint8, or as float32 from −1 to 1; of other whole numbers the rest by `choices`, of a truth by 2.
    """
    patterns = []
    for number, source in enumerate(graph.inputs):
        indices = np.arange(source.size, dtype=np.uint32) + np.uint32(number * SALT)
        hashes = indices * np.uint32(2654435761)
        pattern = (hashes >> np.uint32(24)).astype(np.uint8)
        if source.dtype == "float32":
            patterns.append(pattern.view(np.int8).astype(np.float32) / 128)
        elif source.dtype in ("int8", "uint8"):
            patterns.append(pattern.view(source.dtype))
        else:
            most = 2 if source.dtype == "bool" else choices(given[number])
            patterns.append((pattern % most).astype(source.dtype))
    return patterns
