"""The reference: ONNX Runtime on the same ONNX."""

from __future__ import annotations

import timeit
from functools import partial

import numpy as np
from numpy.typing import NDArray

from compile.frontend.model import Model
from targets.onnx_runtime import Session


class Reference:
    """ONNX Runtime over a model that passed the gate, with ``threads`` threads.

    Its methods raise UserError when an operator refuses its inputs.
    """

    def __init__(self, model: Model, threads: int = 1) -> None:
        """Raises: UserError when ONNX Runtime refuses the model."""
        data, name = model.proto.SerializeToString(), model.identity.name
        self._session = Session(data, name, threads=threads)
        self._input = model.input.name
        self._outputs = [tensor.name for tensor in model.outputs]
        self.version = self._session.version

    def run(self, tensor: NDArray[np.float32]) -> list[NDArray[np.float32]]:
        """One inference: every output of the graph, in the graph's order."""
        return self._session.run(self._outputs, {self._input: tensor})

    def time(self, tensor: NDArray[np.float32], repeat: int) -> list[float]:
        """Seconds of each of ``repeat`` inferences."""
        return timeit.repeat(partial(self.run, tensor), repeat=repeat, number=1)
