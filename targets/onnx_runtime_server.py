"""The process that ONNX Runtime runs in: questions of targets/onnx_runtime.py, one at a time, until its end."""

from __future__ import annotations

import itertools
import sys
import time
from multiprocessing.connection import Connection
from typing import Any

from netship.targets import interrupts

# Before ONNX Runtime is imported: it takes the interrupt of an import for an error of its own.
interrupts.restore()

import onnxruntime

from netship.targets.errors import first_line


def serve(connection: Connection) -> None:
    """Answer each question with ("done", value) or ("refused", what ONNX Runtime says)."""
    sessions: dict[int, Any] = {}
    keys = itertools.count()

    def answer(what: str, *arguments: Any) -> Any:
        if what == "open":
            key = next(keys)
            sessions[key] = _session(*arguments)
            return key, onnxruntime.__version__
        key, outputs, inputs, *repeat = arguments
        if what == "run":
            return list(sessions[key].run(outputs, inputs))
        times = []
        for _ in range(*repeat):
            start = time.perf_counter()
            sessions[key].run(outputs, inputs)
            times.append(time.perf_counter() - start)
        return times

    while True:
        try:
            unused, what, *arguments = connection.recv()
        except EOFError:
            return
        for key in unused:
            del sessions[key]
        try:
            connection.send(("done", answer(what, *arguments)))
        except Exception as error:  # noqa: BLE001  (its errors share no public base class)
            connection.send(("refused", first_line(error)))


def _session(
    model: bytes,
    threads: int,
    optimisation: str,
    optimised: str | None,
    disabled: list[str],
) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 4
    # On x86 it would compute a QDQ graph's int8 activations, unlike uint8 ones, in float32.
    options.add_session_config_entry("session.qdqisint8allowed", "1")
    level = {"none": "DISABLE_ALL", "basic": "ENABLE_BASIC", "all": "ENABLE_ALL"}
    options.graph_optimization_level = getattr(
        onnxruntime.GraphOptimizationLevel, f"ORT_{level[optimisation]}"
    )
    if optimised is not None:
        options.optimized_model_filepath = optimised
    return onnxruntime.InferenceSession(
        model,
        options,
        providers=["CPUExecutionProvider"],
        disabled_optimizers=disabled,
    )


if __name__ == "__main__":
    serve(Connection(int(sys.argv[1])))
