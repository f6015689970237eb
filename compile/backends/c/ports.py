"""The input and the outputs of a C project as its header has them."""

from __future__ import annotations

from dataclasses import dataclass

from netship.compile.ir.graph import NHWC, Tensor
from netship.targets.escapes import C_TYPES


@dataclass(frozen=True)
class Port:
    """An output of the generated function.

    Attributes:
        number: what tells it from others; empty where it is the only one.
    """

    tensor: Tensor
    number: str

    @property
    def name(self) -> str:
        return f"output{self.number}"

    @property
    def macro(self) -> str:
        return f"OUTPUT{self.number}"

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


def input_places(name: str, source: Tensor, dtype: str) -> dict[str, str]:
    """C that finds the input in the arena, and C that is true where it lies elsewhere.

    Args:
        name: the project's.
        dtype: of the values that its kernels work on.
    """
    begin = f"{name.upper()}_INPUT_OFFSET"
    kind, size = C_TYPES[source.dtype], source.itemsize
    if source.dtype != dtype:
        home = f"({kind} *)((uint8_t *)arena + {begin})"
        example = f"({kind} *)((uint8_t *)&arena + {begin})"
        return {
            "input_home": home,
            "input_at_home": f"input != {home}",
            "example_input": example,
        }
    of_base, of_type = (
        (" / sizeof *base", f" / sizeof({kind})") if size > 1 else ("", "")
    )
    return {
        "input_home": f"({kind} *)arena + {begin}{of_type}",
        "input_at_home": f"input != base + {begin}{of_base}",
        "example_input": f"arena.values + {begin}{of_type}",
    }
