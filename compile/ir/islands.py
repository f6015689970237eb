"""Operators that a target has no kernel for, which one generated function runs."""

from __future__ import annotations

from dataclasses import dataclass

from netship.compile.ir.graph import Array, Operator, Tensor


@dataclass(frozen=True)
class Island:
    """Operators that one function runs.

    Attributes:
        inputs: what they read of others, each once.
        outputs: what others read of them.
    """

    name: str
    operators: tuple[Operator, ...]
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]


@dataclass(frozen=True)
class CFunction:
    """One function in C.

    Attributes:
        text: its definition, ``NN_KERNEL void NAME(inputs…, constants…, outputs…, uint8_t *scratch)``.
        constants: what its parameters behind the inputs point to.
        scratch: bytes, aligned to 8.
    """

    text: str
    constants: tuple[Array, ...]
    scratch: int
