"""The reference: ONNX Runtime on the same ONNX."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import onnx
from numpy.typing import NDArray

from netship.bundle.golden import Check
from netship.compile.frontend.fold import fold
from netship.compile.frontend.model import Model
from netship.compile.frontend.quantised.operators import as_qdq
from netship.compile.frontend.tolerance import (
    disturbed,
    disturbed_input,
    index_axis,
    index_tolerance,
    makes_indices,
    tolerance,
)
from netship.targets.errors import UserError
from netship.targets.escapes import shown
from netship.targets.onnx_runtime import Session

_DISTURBED_RUNS = 4
# What cancels with some weights' moves, as w and -w do, rarely does with those of two sets.
_DISTURBED_WEIGHTS = 2
_MOVES = frozenset(["Cast", "Flatten", "Identity", "Reshape", "Squeeze", "Unsqueeze"])


class Reference:
    """ONNX Runtime over a model that passed the gate, with ``threads`` threads.

    Of a QDQ graph it computes on integers, as by default, but for what is coarse there (`_is_coarse`, `opened`), which it
    computes in float32 as the graph says. Its methods raise UserError when an operator refuses its inputs.
    """

    def __init__(self, model: Model, threads: int = 1) -> None:
        """Raises: UserError when ONNX Runtime refuses the model."""
        self._model = model
        self._outputs = [tensor.name for tensor in model.outputs]
        # The same coarse operator by another name.
        proto = as_qdq(model.proto, only="QLinearSoftmax")
        self._coarse = _coarse(proto.graph)
        self._threads = threads
        self._session = self._open(with_outputs(proto, self._coarse), threads)
        self.version = self._session.version
        self._indices = _indices(model.proto)
        self._compared = sorted({each.source for each in self._indices.values()})
        self._disturbed: list[Session] = []

    @cached_property
    def _as_by_default(self) -> Session:
        if not self._coarse:
            return self._session
        return self._open(self._model.proto, self._threads)

    @cached_property
    def _with_compared(self) -> Session:
        """With what indices are of, as outputs; its own answers may be rounded otherwise."""
        return self._open(with_outputs(self._model.proto, self._compared), 1)

    def _open(self, proto: onnx.ModelProto, threads: int) -> Session:
        return opened(proto, self._model.identity.name, threads)

    def run(self, *tensors: NDArray[Any]) -> list[NDArray[Any]]:
        """One inference: every output of the graph, in the graph's order.

        Raises:
            UserError: an output has another shape than ONNX infers for it.
        """
        outputs = self._session.run(self._outputs, self._model.feeds(tensors))
        for known, output in zip(self._model.outputs, outputs, strict=True):
            if output.shape != known.shape:
                raise UserError(
                    f"{self._model.identity.name}: output {shown(known.name)!r} has the shape {list(output.shape)} in "
                    f"{self.version} and {list(known.shape)} by ONNX's rules; replace the operator that they differ "
                    "in, often a pooling with ceil_mode or a transposed convolution, and export again"
                )
        return outputs

    def check(self, *tensors: NDArray[Any]) -> Check:
        """What a network in float32 must answer, and how near."""
        answer = self.run(*tensors)
        return Check(tensors, answer, self.tolerances(tensors, answer))

    def tolerances(
        self, tensors: Sequence[NDArray[Any]], answer: Sequence[NDArray[Any]]
    ) -> list[NDArray[np.float32]]:
        """Of each element of each output how far from ``answer``, which `run` gave for ``tensors``, it may be.

        It is for networks in float32: see compile/frontend/tolerance.py.
        """
        if not self._disturbed:
            # Weights that are computed from others move apart from these.
            folded = fold(as_qdq(self._model.proto))
            for seed in range(_DISTURBED_WEIGHTS):
                weights = disturbed(folded, np.random.default_rng(seed))
                made = with_outputs(weights, self._compared)
                self._disturbed.append(self._open(made, 1))
        random = np.random.default_rng(1)
        names = [*self._outputs, *self._compared]
        moved = []
        for number in range(_DISTURBED_RUNS):
            inputs = [disturbed_input(each, random) for each in tensors]
            feeds = self._model.feeds(inputs)
            session = self._disturbed[number % _DISTURBED_WEIGHTS]
            moved.append(session.run(names, feeds))
        found = [
            tolerance(output, [each[k] for each in moved])
            for k, output in enumerate(answer)
        ]
        if not self._indices:
            return found
        feeds = self._model.feeds(tensors)
        compared = self._with_compared.run(self._compared, feeds)
        near = {
            name: (values, tolerance(values, [each[k] for each in moved]))
            for k, (name, values) in enumerate(
                zip(self._compared, compared, strict=True), len(answer)
            )
        }
        for k, name in enumerate(self._outputs):
            if index := self._indices.get(name):
                values, off = near[index.source]
                ends = values - off, values + off
                by_index = index_tolerance(answer[k], *ends, *index.how)
                found[k] = np.maximum(found[k], by_index)
        return found

    def time(self, tensors: Sequence[NDArray[Any]], repeat: int) -> list[float]:
        """Seconds of each of ``repeat`` inferences, as ONNX Runtime does them by default."""
        feeds = self._model.feeds(tensors)
        return self._as_by_default.time(self._outputs, feeds, repeat)


def opened(proto: onnx.ModelProto, name: str, threads: int = 1) -> Session:
    """A session in which the float weights of a QDQ graph stay float32.

    ONNX Runtime (1.32) gives them one int8 scale for all channels where the operator reads and makes int8: a layer that was
    left in float32 for accuracy lost 8 to 24 dB.
    """
    graph = proto.graph
    constants = {each.name for each in graph.initializer}
    integers = {n.output[0] for n in graph.node if n.op_type == "DequantizeLinear"}
    coarse = any(
        node.op_type in ("Conv", "ConvTranspose", "Gemm")
        and node.input[0] in integers
        and node.input[1] in constants
        for node in graph.node
    )
    disabled = ["WeightBiasQuantization"] if coarse else []
    data = proto.SerializeToString()
    return Session(data, name, threads=threads, disabled=disabled)


def with_outputs(proto: onnx.ModelProto, names: Iterable[str]) -> onnx.ModelProto:
    """The model with more outputs; what makes them is then not fused with what reads them."""
    known = {output.name for output in proto.graph.output}
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    copy.graph.output.extend(
        onnx.helper.make_empty_tensor_value_info(n) for n in names if n not in known
    )
    return copy


class _Index(NamedTuple):
    """What an output has the indices of, along which axis, and whether of the largest values."""

    source: str
    how: tuple[int, bool]


def _indices(proto: onnx.ModelProto) -> dict[str, _Index]:
    """The outputs that an ArgMax or TopK gives, perhaps in another type or shape."""
    makers = {name: node for node in proto.graph.node for name in node.output}
    found = {}
    for output in proto.graph.output:
        name, node = output.name, makers.get(output.name)
        while node is not None and node.op_type in _MOVES:
            name = node.input[0]
            node = makers.get(name)
        known = node is not None and makes_indices(node.op_type, node.output, name)
        if node is not None and known and node.input[0] in makers:
            attributes = {
                a.name: onnx.helper.get_attribute_value(a) for a in node.attribute
            }
            how = index_axis(node.op_type, attributes)
            found[output.name] = _Index(node.input[0], how)
    return found


def _coarse(graph: onnx.GraphProto) -> list[str]:
    """What the operators give that ONNX Runtime would compute coarsely on integers."""
    quantised = {n.input[0] for n in graph.node if n.op_type == "QuantizeLinear"}
    made = [n.output[0] for n in graph.node if _is_coarse(n)]
    return [name for name in made if name in quantised]


def _is_coarse(node: onnx.NodeProto) -> bool:
    if node.op_type == "AveragePool":
        # On integers its counts are not those of ceil_mode, and with dilations it is refused.
        attributes = {
            a.name: onnx.helper.get_attribute_value(a) for a in node.attribute
        }
        dilations = attributes.get("dilations") or []
        return bool(attributes.get("ceil_mode")) or any(n > 1 for n in dilations)
    # On integers, one value in nine of 1.32 was a step below the real number rounded, and a layer after it 3 steps off.
    return node.op_type == "Softmax"
