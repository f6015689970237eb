"""ONNX Runtime on this machine's CPU: every session of the product is made here, with the same settings."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from numpy.typing import NDArray

from targets.errors import UserError, first_line

Array = NDArray[Any]

# What its messages say of its own sources, and before what is wrong.
_INTERNAL = re.compile(
    r"^\[ONNXRuntimeError\] : \d+ : \w+ : |Non-zero status code returned while running |"
    r"/onnxruntime_src/\S+ .*? was false\. "
)


class Session:
    """A model in ONNX Runtime's CPU provider; its telemetry is off since ``targets`` was imported.

    Args:
        model: serialised ONNX.
        name: of the model, for errors.
        threads: of one operator; operators run one after the other.
        optimisation: "basic" keeps to operators of ONNX.
        optimised: a file that the optimised graph is written to.

    Raises:
        UserError: ONNX Runtime refuses the model.
    """

    def __init__(
        self,
        model: bytes,
        name: str,
        *,
        threads: int = 1,
        optimisation: Literal["basic", "all"] = "all",
        optimised: Path | None = None,
    ) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 4
        # On x86 it would compute a QDQ graph's int8 activations, unlike uint8 ones, in float32.
        options.add_session_config_entry("session.qdqisint8allowed", "1")
        options.graph_optimization_level = getattr(
            onnxruntime.GraphOptimizationLevel, f"ORT_ENABLE_{optimisation.upper()}"
        )
        if optimised is not None:
            options.optimized_model_filepath = str(optimised)
        self._name = name
        self.version = f"onnxruntime {onnxruntime.__version__}"
        try:
            self._session = onnxruntime.InferenceSession(
                model, options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # noqa: BLE001  (its errors share no public base class)
            raise UserError(
                f"{name}: ONNX Runtime refuses it ({_reason(error)}); export it again"
            ) from None

    def run(self, outputs: Sequence[str], inputs: Mapping[str, Array]) -> list[Array]:
        """One inference: the outputs named, in that order; ONNX Runtime looks at many shapes here only."""
        try:
            return list(self._session.run(list(outputs), dict(inputs)))
        except Exception as error:  # noqa: BLE001  (its errors share no public base class)
            raise UserError(
                f"{self._name}: ONNX Runtime cannot run it ({_reason(error)}); "
                "check --input-shape and the sizes in the graph, or export it again"
            ) from None


def _reason(error: Exception) -> str:
    return _INTERNAL.sub("", first_line(error))[:300]
