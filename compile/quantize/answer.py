"""What every device must answer of an int8 network, compared with ONNX Runtime's answer before anything is built."""

from __future__ import annotations

from typing import Any

from numpy.typing import NDArray

from bundle.accuracy import INT8_STEPS, Array, compare, in_steps
from bundle.golden import Check
from compile.frontend.model import Model
from compile.frontend.reference import Reference
from compile.ir import evaluate
from compile.ir.graph import Graph, Tensor
from compile.ir.operators import Dequantise, View
from compile.quantize.wide import wide_step
from targets.errors import UserError
from targets.escapes import shown


def output_steps(graph: Graph) -> tuple[float, ...]:
    """What one step of each output stands for: of stored values 1."""
    return tuple(_step(graph, output) for output in graph.outputs)


def _step(graph: Graph, output: Tensor) -> float:
    wide = wide_step(graph, output)
    if wide is not None:
        return wide
    if output.dtype != "float32" and output.quantisation is not None:
        return 1.0
    maker = graph.makers.get(output.name)
    while isinstance(maker, View):
        maker = graph.makers.get(maker.input.name)
    if not isinstance(maker, Dequantise):
        raise UserError(
            f"output {shown(output.name)!r}: is computed in float32, by {maker.label if maker else 'no operator'}; an int8 "
            "network ends in a quantised value: end it before that operator, or build it in float32"
        )
    return maker.input.scale


def check(
    graph: Graph, model: Model, image: NDArray[Any], reference: Reference
) -> Check:
    """The outputs for an input, which integer operators must give bit by bit.

    A float operator between integers may round otherwise on another CPU; then `INT8_STEPS` decide.

    Args:
        graph: of ``model``, with integer operators.
        reference: ONNX Runtime on ``model``.

    Raises:
        UserError: farther than ``INT8_STEPS`` from what ``reference`` answers.
    """
    ours, theirs = evaluate.run(graph, image), reference.run(image)
    steps = output_steps(graph)
    found = compare(ours, theirs, _near(theirs, steps, INT8_STEPS))
    if not found.passed:
        off = (found.excess or 0) * (INT8_STEPS + 0.5)
        raise UserError(
            f"{model.identity.name}: its integers are {off:.1f} steps from ONNX Runtime's (at most "
            f"{INT8_STEPS}) on a golden input; give photographs with --golden, or report the model"
        )
    floats = any(
        each.output.dtype == "float32" and not isinstance(each, Dequantise | View)
        for each in graph.operators
    )
    return Check(image, ours, _near(ours, steps, INT8_STEPS if floats else 0))


def _near(
    answer: list[NDArray[Any]], steps: tuple[float, ...], most: int
) -> list[Array]:
    return [
        in_steps(output, step, most) for output, step in zip(answer, steps, strict=True)
    ]
