"""What every device must answer of an int8 network, held against ONNX Runtime before anything is built."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from bundle.accuracy import INT8_STEPS
from compile.frontend.model import Model
from compile.frontend.reference import Reference
from compile.ir import evaluate
from compile.ir.graph import Graph, Tensor
from compile.ir.operators import Dequantise, View
from targets.errors import UserError
from targets.escapes import shown

Array = NDArray[np.float32]


def output_step(graph: Graph, output: Tensor) -> float:
    """What one step of an output stands for."""
    maker = graph.makers.get(output.name)
    while isinstance(maker, View):
        maker = graph.makers.get(maker.input.name)
    if not isinstance(maker, Dequantise):
        raise UserError(
            f"output {shown(output.name)!r}: is not quantised; build with --quantize int8"
        )
    return maker.input.scale


def answer(
    graph: Graph, model: Model, image: Array, reference: Reference
) -> list[Array]:
    """The outputs for float32 of the input's shape; of integer operators bit by bit.

    Args:
        graph: of ``model``, with integer operators.
        reference: ONNX Runtime on ``model``.

    Raises:
        UserError: farther than ``INT8_STEPS`` from what ``reference`` answers, or another best class.
    """
    ours, theirs = evaluate.run(graph, image), reference.run(image)
    for tensor, own, given in zip(graph.outputs, ours, theirs, strict=True):
        step = output_step(graph, tensor)
        steps = float(np.abs(own - given).max()) / step
        best = np.sort(given.ravel())[::-1]
        gap = float(best[0] - best[1]) / step if best.size > 1 else 0
        another = int(own.argmax()) != int(given.argmax()) and gap > INT8_STEPS
        if steps > INT8_STEPS + 1e-3 or another:
            raise UserError(
                f"{model.identity.name}: its integers are {steps:.1f} steps from ONNX Runtime's (at most "
                f"{INT8_STEPS}) on a golden input; give photographs with --golden, or report the model"
            )
    return ours
