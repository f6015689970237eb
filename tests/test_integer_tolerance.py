"""How far an int8 answer may be from its integers and from ONNX Runtime's: in whole steps of each output."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import pytest
from gated import IDENTITY
from integers import graph_of, patterns, quantised, residuals
from onnx import TensorProto, helper

from netship.bundle.golden import Check
from netship.compile.frontend import gate
from netship.compile.frontend.model import Model
from netship.compile.frontend.reference import Reference
from netship.compile.ir.graph import Graph
from netship.compile.quantize import answer
from netship.targets.errors import UserError


@pytest.fixture(scope="module")
def proto(tmp_path_factory: pytest.TempPathFactory) -> onnx.ModelProto:
    return quantised(residuals(), tmp_path_factory.mktemp("qdq"), unsigned=True)


def read(proto: onnx.ModelProto) -> tuple[Graph, Model]:
    return graph_of(proto), gate.check(proto, IDENTITY)


class Shifted:
    """A reference whose outputs are so far off ONNX Runtime's."""

    def __init__(self, model: Model, shifts: Sequence[float]) -> None:
        self._reference, self._shifts = Reference(model), shifts

    def run(self, image: Any) -> list[Any]:
        outputs = self._reference.run(image)
        return [
            each + np.float32(shift)
            for each, shift in zip(outputs, self._shifts, strict=True)
        ]


def another_output(proto: onnx.ModelProto) -> onnx.ModelProto:
    """The sum of a residual becomes an output, too: its step is another than the scores'."""
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    (node,) = (n for n in copy.graph.node if n.name == "b.add")
    (stored,) = (n for n in copy.graph.node if n.input[0] == node.output[0])
    (real,) = (n for n in copy.graph.node if n.input[0] == stored.output[0])
    added = helper.make_tensor_value_info(real.output[0], TensorProto.FLOAT, None)
    copy.graph.output.append(added)
    return copy


def test_each_output_is_judged_in_its_own_steps(proto: onnx.ModelProto) -> None:
    graph, model = read(another_output(proto))
    steps = answer.output_steps(graph, [])
    assert len(steps) == 2 and max(steps) > 1.2 * min(steps)
    (image,) = patterns(proto, 1)

    def check(*shifts: float) -> Check:
        reference: Any = Shifted(model, shifts)
        return answer.check(graph, model, reference, image)

    for near, step in zip(check(0, 0).tolerances, steps, strict=True):
        assert (near == np.float32(step / 2)).all()
    check(2 * steps[0], -2 * steps[1])
    for which in range(2):
        shifts = [0.0, 0.0]
        shifts[which] = 3 * steps[which]
        with pytest.raises(UserError, match=r"3\.0 steps from ONNX Runtime's"):
            check(*shifts)


def test_an_answer_that_is_no_number_is_refused(proto: onnx.ModelProto) -> None:
    graph, model = read(proto)
    (image,) = patterns(proto, 1)
    reference: Any = Shifted(model, [np.nan])
    with pytest.raises(UserError, match="its integers are inf steps from"):
        answer.check(graph, model, reference, image)


def test_a_float_operator_inside_may_round_otherwise(proto: onnx.ModelProto) -> None:
    """A convolution is given what the operator before makes, not quantised."""
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    (maker,) = (n for n in copy.graph.node if n.name == "b.add")
    (reader,) = (n for n in copy.graph.node if n.name == "c.expand")
    reader.input[0] = maker.output[0]
    graph, model = read(copy)
    (image,) = patterns(proto, 1)
    check = answer.check(graph, model, Reference(model), image)
    (step,) = answer.output_steps(graph, [])
    assert (check.tolerances[0] == np.float32(2.5 * step)).all()
