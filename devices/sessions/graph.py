"""A bundle's network on TVM's graph executor, on this machine or a board."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from statistics import median
from time import perf_counter
from typing import Any, NamedTuple, Protocol, Self, TypeVar

import numpy as np
from numpy.typing import NDArray

from bundle.store import Bundle
from devices.board.board_state import BoardState
from devices.sessions import huge_pages
from devices.sessions.session import OperatorTime, Origin
from targets.errors import UserError

T = TypeVar("T")
_PROFILE_REPEATS = 5
# A reshape, which moves nothing.
_NO_OPERATION = "__nop"


class Node(NamedTuple):
    """One input, parameter or kernel of the executor's graph."""

    name: str
    kernel: str
    shape: tuple[int, ...]
    dtype: str


class Graph(NamedTuple):
    """A library's own description: its inputs without parameters, its kernels in order, its outputs."""

    inputs: tuple[Node, ...]
    kernels: tuple[Node, ...]
    outputs: tuple[Node, ...]


class Caller(Protocol):
    """Runs an action that uses the device, and turns the device's failures into `UserError`."""

    def __call__(self, action: Callable[[], T]) -> T: ...


def parse_graph(text: str) -> Graph:
    """Read the graph JSON that the library holds (``get_graph_json``)."""
    graph = json.loads(text)
    starts = graph["node_row_ptr"]
    shapes, types = graph["attrs"]["shape"][1], graph["attrs"]["dltype"][1]

    def node(index: int, output: int = 0) -> Node:
        entry, what = starts[index] + output, graph["nodes"][index]
        kernel = what.get("attrs", {}).get("func_name", "")
        return Node(what["name"], kernel, tuple(shapes[entry]), types[entry])

    leaves = [node(index) for index in graph["arg_nodes"]]
    calls = [node(i) for i, what in enumerate(graph["nodes"]) if what["op"] == "tvm_op"]
    return Graph(
        # Relay names the constants it lifts out of the network p0, p1, ….
        inputs=tuple(leaf for leaf in leaves if not re.fullmatch(r"p\d+", leaf.name)),
        kernels=tuple(call for call in calls if call.kernel != _NO_OPERATION),
        outputs=tuple(node(head[0], head[1]) for head in graph["heads"]),
    )


def check_graph(graph: Graph, bundle: Bundle) -> None:
    """Compare the library's own inputs and outputs with the manifest's.

    The executor copies bytes without checking shapes, so a manifest with wrong ones must be refused here.

    Raises:
        UserError: another number, name, shape or dtype.
    """
    manifest = bundle.manifest
    _expect(
        bundle,
        "input",
        [(node.name, node.shape, node.dtype) for node in graph.inputs],
        [(manifest.input.name, manifest.input.shape, manifest.input.dtype)],
    )
    _expect(
        bundle,
        "output",
        [("", node.shape, node.dtype) for node in graph.outputs],
        [("", tensor.shape, tensor.dtype) for tensor in manifest.outputs],
    )


def _expect(
    bundle: Bundle,
    what: str,
    actual: list[tuple[str, tuple[int, ...], str]],
    expected: list[tuple[str, tuple[int, ...], str]],
) -> None:
    def words(tensors: Iterable[tuple[str, tuple[int, ...], str]]) -> str:
        each = [
            f"{name} {dtype}[{','.join(map(str, shape))}]"
            for name, shape, dtype in tensors
        ]
        return " and ".join(text.strip() for text in each) or "none"

    if actual != expected:
        raise UserError(
            f"{bundle.path}: model.so has {what} {words(actual)}, the manifest says "
            f"{words(expected)}; build the bundle again"
        )


class GraphSession:
    """A `Session` over a loaded library; `open_local`, `open_rpc` and `open_emulated` make one.

    Args:
        library: the TVM module of model.so, local or remote.
        device: the TVM device it runs on, local or remote.
        call: wraps everything that uses the device.
        on_close: closes the connection to the device.
        remote: times come from the device's own clock, through TVM's evaluator, which first
            runs one inference that it does not count; on this machine each inference is
            timed separately, so that it can alternate with another runtime's.
        state: asks the board for its state.

    Raises:
        UserError: the library's inputs or outputs are not the manifest's.
    """

    def __init__(
        self,
        bundle: Bundle,
        library: Any,
        device: Any,
        *,
        origin: Origin,
        threads: int,
        call: Caller,
        on_close: Callable[[], None],
        remote: bool,
        state: Callable[[], BoardState | None] = lambda: None,
    ) -> None:
        self.origin = origin
        self.threads = threads
        try:
            self._graph = parse_graph(call(lambda: library["get_graph_json"]()))
        except AttributeError:
            raise UserError(
                f"{bundle.library}: holds no network of TVM's graph executor; build the bundle again"
            ) from None
        check_graph(self._graph, bundle)
        self._input = bundle.manifest.input
        self._library = library
        self._device = device
        self._call = call
        self._on_close = on_close
        self._remote = remote
        self._state = state
        self._executor = self._create("default")

    def run(self, tensor: NDArray[np.float32]) -> list[NDArray[np.float32]]:
        """One inference: float32 of the manifest's input shape in, every output back.

        Raises:
            ValueError: another shape.
            UserError: the device is gone.
        """

        def infer() -> list[NDArray[np.float32]]:
            self._set_input(self._executor, tensor)
            self._executor["run"]()
            read = self._executor["get_output"]
            return [read(index).numpy() for index in range(len(self._graph.outputs))]

        return self._call(infer)

    def time(self, tensor: NDArray[np.float32], repeat: int) -> list[float]:
        """Seconds of each of ``repeat`` inferences on ``tensor``, transfers left out."""
        self._call(lambda: self._set_input(self._executor, tensor))
        if self._remote:
            # number=1 and repeat=1: one call a time, so that none outlasts the time limit.
            evaluate = self._call(
                lambda: self._executor.time_evaluator("run", self._device, 1, 1)
            )
            return [float(self._call(evaluate).results[0]) for _ in range(repeat)]
        run = self._executor["run"]
        seconds = []
        for _ in range(repeat):
            start = perf_counter()
            run()
            seconds.append(perf_counter() - start)
        return seconds

    def profile(self, tensor: NDArray[np.float32]) -> list[OperatorTime]:
        """Each kernel's median time inside whole inferences, in order of execution.

        Empty where the runtime has no debug executor, and on an emulated board, where operators
        take other shares of the time than on the real one.
        """
        if self.origin is Origin.EMULATED:
            return []
        try:
            executor = self._create("debug_create", "default")
            report = self._call(lambda: executor["profile_rpc"])
        except AttributeError:
            return []
        self._call(lambda: self._set_input(executor, tensor))
        runs = [
            [
                call["Duration (us)"]["microseconds"]
                for call in json.loads(text)["calls"]
                if call["Name"]["string"] != _NO_OPERATION
            ]
            for text in (self._call(report) for _ in range(_PROFILE_REPEATS))
        ]
        return [
            OperatorTime(kernel.kernel, kernel.shape, median(times) / 1e6)
            for kernel, *times in zip(self._graph.kernels, *runs, strict=True)
        ]

    def board(self) -> BoardState | None:
        """The board's state now, where its server tells."""
        return self._state()

    def close(self) -> None:
        """End the session; the second time does nothing."""
        if self._executor is None:
            return
        # First the connection: a call that another thread waits for ends with it.
        self._on_close()
        self._executor = self._library = self._device = None

    def _create(self, function: str, *arguments: str) -> Any:
        """An executor made by one of the library's functions."""
        executor = self._call(lambda: self._library[function](*arguments, self._device))
        if not self._remote:
            huge_pages.use_for_parameters(executor)
        return executor

    def _set_input(self, executor: Any, tensor: NDArray[np.float32]) -> None:
        if tensor.shape != self._input.shape:
            raise ValueError(f"input is {tensor.shape}, not {self._input.shape}")
        slot = executor["get_input"](self._input.name)
        slot.copyfrom(np.ascontiguousarray(tensor, np.float32))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
