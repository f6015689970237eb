"""A compiled network as plain data: its tensors, and the kernel calls in order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np

from netship.bundle.executor_graph import parse
from netship.bundle.manifest import Group


@dataclass(frozen=True)
class Tensor:
    """One tensor; ``weights`` are its bytes where it is constant."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    weights: bytes | None = None

    @property
    def elements(self) -> int:
        return prod(self.shape)

    @property
    def itemsize(self) -> int:
        return np.dtype(self.dtype).itemsize

    @property
    def nbytes(self) -> int:
        return self.elements * self.itemsize


@dataclass(frozen=True)
class Call:
    """One kernel call; inputs and outputs are indices of the program's tensors.

    Attributes:
        kernel: the function's name.
        scratch: bytes that it needs while it runs.
        inplace: how the first output may take the first input's place: pairs of the bytes of the output that are written
            when the bytes of the input from a place on are still needed. None where it may not.
    """

    kernel: str
    layer: str
    operators: tuple[str, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    scratch: int = 0
    inplace: tuple[tuple[int, int], ...] | None = None

    @property
    def arguments(self) -> tuple[int, ...]:
        return (*self.inputs, *self.outputs)


@dataclass(frozen=True)
class Program:
    """A network whose every kernel is known.

    Attributes:
        aliases: tensor → the tensor whose memory it shares, for reshapes that cost nothing.
        outer_bytes: the largest workspace that a kernel allocates outside its parallel loops.
        inner_bytes: the largest that one task of a parallel loop allocates.
    """

    tensors: tuple[Tensor, ...]
    calls: tuple[Call, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    aliases: Mapping[int, int]
    outer_bytes: int = 0
    inner_bytes: int = 0

    def storage(self, tensor: int) -> int:
        """The tensor that owns the memory of ``tensor``."""
        while tensor in self.aliases:
            tensor = self.aliases[tensor]
        return tensor


def read_program(
    graph_json: str,
    params: Mapping[str, Any],
    groups: Sequence[Group],
    workspaces: tuple[int, int],
) -> Program:
    """The program that TVM's graph executor would run.

    Args:
        params: TVM arrays by name.
        groups: the fused groups in the graph's order (compile.relay.describe).
        workspaces: (outer, inner) bytes.
    """
    graph = parse(graph_json)
    constants = {name: array.numpy().tobytes() for name, array in params.items()}
    called = [call for call in graph.calls if call.kernel]
    return Program(
        tensors=tuple(
            Tensor(each.name, each.shape, each.dtype, constants.get(each.name))
            for each in graph.entries
        ),
        calls=tuple(
            Call(call.kernel, group.layer, group.operators, call.inputs, call.outputs)
            for call, group in zip(called, groups, strict=True)
        ),
        inputs=graph.inputs,
        outputs=graph.outputs,
        aliases={
            call.outputs[0]: call.inputs[0] for call in graph.calls if not call.kernel
        },
        outer_bytes=workspaces[0],
        inner_bytes=workspaces[1],
    )
