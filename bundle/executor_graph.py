"""The JSON that TVM's graph executor runs: its tensors, its kernels in order, and which tensors share memory."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import NamedTuple

# A reshape, which moves nothing.
NO_OPERATION = "__nop"
# TVM's names of types → numpy's.
_TYPES = {"uint1": "bool"}


class Entry(NamedTuple):
    """A tensor; tensors of one ``storage`` lie in the same memory."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    storage: int


class Call(NamedTuple):
    """A kernel call on entries, by their indices; ``kernel`` is empty of a reshape, which only gives memory another shape."""

    kernel: str
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]


@dataclass(frozen=True)
class ExecutorGraph:
    """The graph; inputs and outputs are indices of entries.

    Attributes:
        inputs: those that are no parameters.
        parameters: constants that Relay lifted out of the network.
    """

    entries: tuple[Entry, ...]
    calls: tuple[Call, ...]
    inputs: tuple[int, ...]
    parameters: tuple[int, ...]
    outputs: tuple[int, ...]

    @property
    def kernels(self) -> list[str]:
        """Of each call that is no reshape, in the order they run."""
        return [call.kernel for call in self.calls if call.kernel]


def parse(text: str) -> ExecutorGraph:
    """Read the graph JSON that a library holds (``get_graph_json``)."""
    graph = json.loads(text)
    starts, nodes = graph["node_row_ptr"], graph["nodes"]
    shapes, types, storages = (
        graph["attrs"][name][1] for name in ("shape", "dltype", "storage_id")
    )
    entries, calls = [], []
    for index, node in enumerate(nodes):
        outputs = tuple(range(starts[index], starts[index + 1]))
        entries += [
            Entry(
                node["name"],
                tuple(shapes[i]),
                _TYPES.get(types[i], types[i]),
                storages[i],
            )
            for i in outputs
        ]
        if node["op"] == "tvm_op":
            kernel = node["attrs"]["func_name"].replace(NO_OPERATION, "")
            inputs = tuple(
                starts[source] + which for source, which, _ in node["inputs"]
            )
            calls.append(Call(kernel, inputs, outputs))
    leaves = [starts[index] for index in graph["arg_nodes"]]
    # Relay names the constants it lifts out of the network p0, p1, ….
    parameters = {i for i in leaves if re.fullmatch(r"p\d+", entries[i].name)}
    return ExecutorGraph(
        entries=tuple(entries),
        calls=tuple(calls),
        inputs=tuple(i for i in leaves if i not in parameters),
        parameters=tuple(sorted(parameters)),
        outputs=tuple(starts[head[0]] + head[1] for head in graph["heads"]),
    )
