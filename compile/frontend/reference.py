"""The reference: ONNX Runtime on the same ONNX."""

from __future__ import annotations

import time

import numpy as np
from numpy.typing import NDArray

from compile.frontend.model import Model
from targets.errors import UserError


class Reference:
    """ONNX Runtime's CPU provider over a gated model, with ``threads`` threads."""

    def __init__(self, model: Model, threads: int = 1) -> None:
        """Raises: UserError when ONNX Runtime refuses the model."""
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 4
        # On x86 it would compute a QDQ graph's int8 activations, unlike uint8 ones, in float32.
        options.add_session_config_entry("session.qdqisint8allowed", "1")
        try:
            self._session = onnxruntime.InferenceSession(
                model.proto.SerializeToString(),
                options,
                providers=["CPUExecutionProvider"],
            )
        except Exception as error:  # noqa: BLE001  (its errors share no public base class)
            first = str(error).splitlines()[0][:200]
            raise UserError(
                f"{model.identity.name}: ONNX Runtime refuses it: {first}"
            ) from None
        self._input = model.input.name
        self._outputs = [tensor.name for tensor in model.outputs]
        self.threads = threads
        self.version = f"onnxruntime {onnxruntime.__version__}"

    def run(self, tensor: NDArray[np.float32]) -> list[NDArray[np.float32]]:
        """One inference: every output of the graph, in the graph's order."""
        return list(self._session.run(self._outputs, {self._input: tensor}))

    def time(self, tensor: NDArray[np.float32], repeat: int) -> list[float]:
        """Seconds of each of ``repeat`` inferences."""
        times = []
        for _ in range(repeat):
            start = time.perf_counter()
            self._session.run(self._outputs, {self._input: tensor})
            times.append(time.perf_counter() - start)
        return times
