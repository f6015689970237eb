"""What every device must answer of an int8 network, compared with ONNX Runtime's answer before anything is built.

An output that ends in stored values is judged in whole steps. One that is computed in float32, by a Softmax or the head
of a detector, may be as far off as those stored values move it that are a step higher or lower, and as float32 rounds
(compile/frontend/tolerance.py).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from netship.bundle.accuracy import INT8_STEPS, Array, compare, in_steps
from netship.bundle.golden import Check
from netship.compile.frontend.model import Model
from netship.compile.frontend.reference import Reference
from netship.compile.frontend.tolerance import (
    disturbed_input,
    disturbed_result,
    index_axis,
    index_tolerance,
    makes_indices,
    rounded,
    tolerance,
)
from netship.compile.ir import evaluate
from netship.compile.ir.graph import Graph, Operator, Tensor
from netship.compile.ir.operators import Dequantise, Quantise, View, islands
from netship.compile.quantize.wide import wide_step
from netship.targets.errors import UserError

_RUNS = 4
# How many times as far as random steps move an output it may be off; of rounding, tolerance.py's own factor.
_FACTOR = 2.0
_LEAST_STEP = float(np.finfo(np.float32).tiny)


class _Outputs:
    """How far the outputs of a network may be from an answer."""

    def __init__(self, graph: Graph) -> None:
        self._graph = graph
        self.steps = [self._step(each) for each in graph.outputs]

    def _step(self, output: Tensor) -> float | None:
        """What a step of stored values means; None of an output that is computed in float32."""
        wide = wide_step(self._graph, output)
        if wide is not None:
            return wide
        if output.dtype != "float32" and output.quantisation is not None:
            return 1.0
        maker = self._graph.makers.get(output.name)
        while isinstance(maker, View):
            maker = self._graph.makers.get(maker.input.name)
        return maker.input.scale if isinstance(maker, Dequantise) else None

    @cached_property
    def _tail(self) -> list[Operator]:
        """The float operators behind the last stored values, in the order they run."""
        pairs = zip(self._graph.outputs, self.steps, strict=True)
        return self._floats_before(each for each, step in pairs if step is None)

    @cached_property
    def exact(self) -> bool:
        """Whether no float operator lies between integers, and no activation has 16 bits."""
        if any(wide_step(self._graph, each) for each in self._graph.outputs):
            return False
        quantised = (x.input for x in self._graph.operators if isinstance(x, Quantise))
        inside = {id(each) for each in self._floats_before(quantised)}
        return not any(id(each) in inside for each in islands(self._graph))

    def _floats_before(self, tensors: Iterable[Tensor]) -> list[Operator]:
        needed, found = {each.name for each in tensors}, []
        for operator in reversed(self._graph.operators):
            made = not needed.isdisjoint(each.name for each in operator.outputs)
            if made and not isinstance(operator, Dequantise):
                found.append(operator)
                needed |= {each.name for each in operator.activations}
        return found[::-1]

    def moved(self, values: Mapping[str, Array], steps: int) -> list[list[Array]]:
        """The outputs, where what ends in stored values is disturbed by rounding and by ``steps`` steps, at random."""
        random, answers = np.random.default_rng(2), []
        own = {each.name for operator in self._tail for each in operator.outputs}
        for _ in range(_RUNS):
            changed: dict[str, Array] = {}
            for tensor in (x for each in self._tail for x in each.activations):
                name, value = tensor.name, values[tensor.name]
                if name in own or name in changed or value.dtype != np.float32:
                    continue
                maker = self._graph.makers.get(name)
                changed[name] = disturbed_input(value, random)
                if isinstance(maker, Dequantise):
                    signs = random.integers(0, 2, value.shape) * 2 - 1
                    move = np.float32(steps * maker.input.scale)
                    changed[name] += (signs * move).astype(np.float32)
            known = {**values, **changed}
            for operator in self._tail:
                inputs = [known[each.name] for each in operator.activations]
                made = evaluate.apply(operator, known, self._graph.opset)
                for name, value in made.items():
                    known[name] = rounded(operator.kind, inputs, value, random)
            answers.append([known[each.name] for each in self._graph.outputs])
        return answers

    @cached_property
    def _indices(self) -> list[Operator | None]:
        """The ArgMax or TopK whose indices an output is; None of another output."""
        found: list[Operator | None] = []
        for output in self._graph.outputs:
            maker, name = self._graph.makers.get(output.name), output.name
            while maker is not None and (
                isinstance(maker, View) or maker.kind in ("Cast", "Identity")
            ):
                name = maker.input.name
                maker = self._graph.makers.get(name)
            known = maker is not None and makes_indices(
                maker.kind, [each.name for each in maker.outputs], name
            )
            found.append(maker if known else None)
        return found

    def _ends(self, values: Mapping[str, Array]) -> dict[str, tuple[Array, Array]]:
        """The least and the largest value that the float operators' rounding makes of what indices are of.

        All results are moved up, then all down, which gives the ends where weights are not negative, as those of Resize
        are; then at random.
        """
        random = np.random.default_rng(3)
        floats = {id(each) for each in islands(self._graph)}
        names = {each.input.name for each in self._indices if each is not None}
        ends = {name: (values[name], values[name]) for name in names}
        for direction in (1, -1, *[0] * _RUNS):
            known, changed = dict(values), set[str]()
            for operator in self._graph.operators:
                is_float = id(operator) in floats
                inputs = (each.name for each in operator.activations)
                if not is_float and changed.isdisjoint(inputs):
                    continue
                made = evaluate.apply(operator, known, self._graph.opset)
                for name, value in made.items():
                    if is_float and value.dtype == np.float32:
                        value = disturbed_result(value, random, direction)
                    known[name] = value
                    changed.add(name)
            ends = {
                name: (np.minimum(low, known[name]), np.maximum(high, known[name]))
                for name, (low, high) in ends.items()
            }
        return ends

    def of_indices(
        self, values: Mapping[str, Array], answer: Sequence[Array]
    ) -> dict[int, Array]:
        """Tolerances around ``answer`` of the outputs that have indices."""
        ends = self._ends(values) if any(self._indices) else {}
        return {
            k: _of_index(index, answer[k], ends)
            for k, index in enumerate(self._indices)
            if index is not None
        }

    def near(
        self, values: Mapping[str, Array], answer: Sequence[Array], most: int
    ) -> list[Array]:
        """Tolerances around ``answer``: ``most`` steps.

        Args:
            values: every tensor of the network, on the same input.
        """
        exact = [values[each.name] for each in self._graph.outputs]
        rounded = self.moved(values, 0) if self._tail else []
        by_index = self.of_indices(values, answer)
        stepped = self.moved(values, most) if self._tail and most else []
        found = []
        for k, step in enumerate(self.steps):
            if step is not None:
                found.append(in_steps(answer[k], step, most))
                continue
            near = tolerance(exact[k], [each[k] for each in rounded])
            if stepped:
                by_steps = tolerance(exact[k], [each[k] for each in stepped], _FACTOR)
                near = np.maximum(near, by_steps)
            found.append(by_index.get(k, near))
        return found


def output_steps(graph: Graph, samples: Sequence[Sequence[Array]]) -> tuple[float, ...]:
    """What one step of each output stands for.

    Args:
        samples: inputs, by inference; an output that is computed in float32 has the step that it moves by on them.
    """
    outputs = _Outputs(graph)
    found = [step or _LEAST_STEP for step in outputs.steps]
    if all(outputs.steps):
        return tuple(found)
    for sample in samples:
        values = evaluate.evaluate(graph, _feeds(graph, sample))
        for answers in outputs.moved(values, 1):
            for k, tensor in enumerate(graph.outputs):
                if outputs.steps[k] is None:
                    change = np.abs(answers[k].astype(np.float64) - values[tensor.name])
                    change = change[np.isfinite(change)]
                    found[k] = max(found[k], float(change.max(initial=0)))
    return tuple(found)


def _of_index(
    operator: Operator, answer: Array, ends: Mapping[str, tuple[Array, Array]]
) -> Array:
    axis, largest = index_axis(operator.kind, operator.attributes)
    return index_tolerance(answer, *ends[operator.input.name], axis, largest)


def index_tolerances(
    graph: Graph, tensors: Sequence[Array], answer: Sequence[Array]
) -> dict[int, Array]:
    """How far the outputs that an ArgMax or TopK gives may be from ``answer``, by their number.

    Args:
        graph: with integer operators.
        tensors: the inputs of the inference.
    """
    values = evaluate.evaluate(graph, _feeds(graph, tensors))
    return _Outputs(graph).of_indices(values, answer)


def _feeds(graph: Graph, tensors: Sequence[Array]) -> dict[str, Array]:
    names = (each.name for each in graph.inputs)
    return dict(zip(names, tensors, strict=True))


def check(
    graph: Graph, model: Model, reference: Reference, *tensors: NDArray[Any]
) -> Check:
    """The outputs for the inputs of an inference, which integer operators must give bit by bit.

    A float operator between integers may round otherwise on another CPU; then `INT8_STEPS` decide.

    Args:
        graph: of ``model``, with integer operators.
        reference: ONNX Runtime on ``model``.

    Raises:
        UserError: farther than ``INT8_STEPS`` from what ``reference`` answers.
    """
    outputs, theirs = _Outputs(graph), reference.run(*tensors)
    values = evaluate.evaluate(graph, _feeds(graph, tensors))
    ours = [values[each.name] for each in graph.outputs]
    found = compare(ours, theirs, outputs.near(values, theirs, INT8_STEPS))
    if not found.passed:
        off = (found.excess or 0) * (INT8_STEPS + 0.5)
        raise UserError(
            f"{model.identity.name}: its integers are {off:.1f} steps from ONNX Runtime's (at most "
            f"{INT8_STEPS}) on a golden input; give photographs with --golden, or report the model"
        )
    most = 0 if outputs.exact else INT8_STEPS
    return Check(tensors, ours, outputs.near(values, ours, most))
