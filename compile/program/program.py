"""A compiled network as plain data: its tensors, and the kernel calls in order."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from bundle.manifest import Group

_DTYPE_BYTES = {"float32": 4, "int32": 4, "int64": 8, "int8": 1, "uint8": 1, "bool": 1}


@dataclass(frozen=True)
class Tensor:
    """One tensor; ``weights`` are its bytes where it is constant."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    weights: bytes | None = None

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * _DTYPE_BYTES[self.dtype]


@dataclass(frozen=True)
class Call:
    """One kernel call: ``arguments`` index the program's tensors, inputs first, then outputs."""

    kernel: str
    layer: str
    operators: tuple[str, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]

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
    aliases: dict[int, int]
    outer_bytes: int
    inner_bytes: int

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
    """Read the graph executor's JSON into a program.

    Args:
        params: TVM arrays by name.
        groups: the fused groups in the graph's order (compile.relay.lower).
        workspaces: (outer, inner) bytes.
    """
    graph = json.loads(graph_json)
    starts, nodes = graph["node_row_ptr"], graph["nodes"]
    shapes, types = graph["attrs"]["shape"][1], graph["attrs"]["dltype"][1]
    tensors = []
    for index, node in enumerate(nodes):
        for entry in range(starts[index], starts[index + 1]):
            weights = (
                params[node["name"]].numpy().tobytes()
                if node["name"] in params
                else None
            )
            tensors.append(
                Tensor(node["name"], tuple(shapes[entry]), types[entry], weights)
            )
    calls, aliases = [], {}
    described = iter(groups)
    for index, node in enumerate(nodes):
        if node["op"] != "tvm_op":
            continue
        inputs = tuple(starts[source] + output for source, output, _ in node["inputs"])
        outputs = tuple(range(starts[index], starts[index + 1]))
        if node["attrs"]["func_name"] == "__nop":
            aliases[outputs[0]] = inputs[0]
            continue
        group = next(described)
        kernel = node["attrs"]["func_name"]
        calls.append(Call(kernel, group.layer, group.operators, inputs, outputs))
    free = [i for i in graph["arg_nodes"] if nodes[i]["name"] not in params]
    return Program(
        tensors=tuple(tensors),
        calls=tuple(calls),
        inputs=tuple(starts[index] for index in free),
        outputs=tuple(starts[index] + output for index, output, _ in graph["heads"]),
        aliases=aliases,
        outer_bytes=workspaces[0],
        inner_bytes=workspaces[1],
    )
