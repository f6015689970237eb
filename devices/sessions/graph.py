"""A bundle's network on TVM's graph executor, on this machine or a board."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from statistics import median
from time import perf_counter
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from netship.bundle.executor_graph import NO_OPERATION, Entry, ExecutorGraph, parse
from netship.bundle.manifest import Tensor
from netship.bundle.store import Bundle
from netship.devices.board.board_state import BoardState
from netship.devices.sessions import huge_pages
from netship.devices.sessions.session import (
    OperatorTime,
    Origin,
    Outputs,
    Session,
    check_inputs,
)
from netship.targets.errors import UserError

T = TypeVar("T")
Array = NDArray[Any]
_PROFILE_REPEATS = 5


class Caller(Protocol):
    """Runs an action that uses the device, and turns the device's failures into `UserError`."""

    def __call__(self, action: Callable[[], T]) -> T: ...


def check_graph(graph: ExecutorGraph, bundle: Bundle) -> None:
    """Refuse a library whose inputs or outputs are not the manifest's; outputs have no names to compare.

    The executor copies bytes without checking shapes, so a manifest with wrong ones must be refused here.
    """
    manifest = bundle.manifest
    for what, names, indices, tensors in (
        ("input", True, graph.inputs, manifest.inputs),
        ("output", False, graph.outputs, manifest.outputs),
    ):
        actual = [_words(graph.entries[index], names) for index in indices]
        expected = [_words(tensor, names) for tensor in tensors]
        if actual != expected:
            raise UserError(
                f"{bundle.path}: model.so has {what} {' and '.join(actual) or 'none'}, the manifest says "
                f"{' and '.join(expected)}; build the bundle again"
            )


def _words(tensor: Entry | Tensor, named: bool) -> str:
    shape = f"{tensor.dtype}[{','.join(map(str, tensor.shape))}]"
    return f"{tensor.name} {shape}" if named else shape


def kernel_seconds(report: str) -> list[float]:
    """The time of each kernel, in order of execution, of the debug executor's ``profile_rpc``."""
    return [
        call["Duration (us)"]["microseconds"] / 1e6
        for call in json.loads(report)["calls"]
        if call["Name"]["string"] != NO_OPERATION
    ]


class GraphSession(Session):
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
            self._graph = parse(call(lambda: library["get_graph_json"]()))
        except AttributeError:
            raise UserError(
                f"{bundle.library}: holds no network of TVM's graph executor; build the bundle again"
            ) from None
        check_graph(self._graph, bundle)
        self._inputs = bundle.manifest.inputs
        self._library = library
        self._device = device
        self._call = call
        self._on_close = on_close
        self._remote = remote
        self._state = state
        self._executor = self._create("default")

    def run(self, *tensors: Array) -> Outputs:
        """As `Session.run`."""

        def infer() -> Outputs:
            self._set_inputs(self._executor, tensors)
            self._executor["run"]()
            read = self._executor["get_output"]
            return [read(index).numpy() for index in range(len(self._graph.outputs))]

        return self._call(infer)

    def time(self, tensors: Sequence[Array], repeat: int) -> list[float]:
        """Seconds of each of ``repeat`` inferences on ``tensors``, transfers left out."""
        self._call(lambda: self._set_inputs(self._executor, tensors))
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

    def profile(self, tensors: Sequence[Array]) -> list[OperatorTime]:
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
        self._call(lambda: self._set_inputs(executor, tensors))
        runs = [kernel_seconds(self._call(report)) for _ in range(_PROFILE_REPEATS)]
        kernels = (call for call in self._graph.calls if call.kernel)
        return [
            OperatorTime(
                call.kernel, self._graph.entries[call.outputs[0]].shape, median(times)
            )
            for call, *times in zip(kernels, *runs, strict=True)
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

    def _set_inputs(self, executor: Any, tensors: Sequence[Array]) -> None:
        check_inputs(tensors, self._inputs)
        for tensor, port in zip(tensors, self._inputs, strict=True):
            slot = executor["get_input"](port.name)
            slot.copyfrom(np.ascontiguousarray(tensor, port.dtype))
