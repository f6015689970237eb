"""The rule of RNN, GRU and LSTM: one matrix product for all steps' inputs, then step by step."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from netship.compile.frontend.canonical.graph import (
    Chain,
    Graph,
    attributes_of,
    refusal,
    text_of,
)
from netship.compile.frontend.canonical.sampling import part

Array = NDArray[Any]

# Each step becomes nodes and kernels of its own.
_MOST_STEPS = 512
_GATES = {"RNN": 1, "GRU": 3, "LSTM": 4}
_DEFAULTS = {
    "RNN": ["Tanh"],
    "GRU": ["Sigmoid", "Tanh"],
    "LSTM": ["Sigmoid", "Tanh", "Tanh"],
}
_ACTIVATIONS = {
    each.lower(): each for each in ("HardSigmoid", "Relu", "Sigmoid", "Tanh")
}
_NOT_BUILT = ("clip", "input_forget", "layout")
# Of the built activations only this one has parameters.
_OF_HARD_SIGMOID = ("activation_alpha", "activation_beta")


def recurrent(node: onnx.NodeProto, graph: Graph) -> list[onnx.NodeProto]:
    """TVM's importer fails with an index error, and takes sequence_lens and layout wrongly."""
    attributes = attributes_of(node)
    named = [text_of(each).lower() for each in attributes.get("activations", ())]
    for name in (*_NOT_BUILT, *(_OF_HARD_SIGMOID if "hardsigmoid" in named else ())):
        if attributes.get(name):
            raise refusal(node, f"its attribute {name} is not built; export without it")
    steps, batch, _ = graph.shape(node.input[0])
    lengths = graph.constant(node, 4)
    if lengths is not None and np.any(lengths != steps):
        raise refusal(
            node,
            "sequence_lens shorter than the sequence are not built; leave them out",
        )
    if steps > _MOST_STEPS:
        raise refusal(
            node,
            f"{steps} steps, more than the {_MOST_STEPS} that are built; export a shorter sequence",
        )
    directions = graph.shape(node.input[1])[0]
    reverse = text_of(attributes.get("direction", "forward")) == "reverse"
    chain = Chain(node, graph)
    results = [
        _Direction(node, graph, chain, k).run(reverse=bool(k) or reverse)
        for k in range(directions)
    ]
    hidden = graph.shape(node.input[2])[2]
    for index, shape in enumerate(
        ((steps, 1, batch, hidden), *[(1, batch, hidden)] * 2)
    ):
        if index < len(node.output) and node.output[index]:
            parts = [chain.add("Reshape", each[index], shape) for each in results]
            chain.make(index, "Concat", *parts, axis=1 if index == 0 else 0)
    return chain.made


class _Direction:
    """One direction of a recurrent node: its weights, and the nodes of its steps."""

    def __init__(
        self, node: onnx.NodeProto, graph: Graph, chain: Chain, index: int
    ) -> None:
        self._graph, self._chain, self._kind = graph, chain, node.op_type
        self._steps, self._batch, self._depth = graph.shape(node.input[0])
        self._input = node.input[0]
        w, r, b, peepholes = (graph.constant(node, k) for k in (1, 2, 3, 7))
        assert w is not None and r is not None
        self._w, state, self._hidden = w[index].T, r[index].T, r.shape[2]
        count = _GATES[node.op_type] * self._hidden
        both = np.zeros(2 * count, np.float32) if b is None else b[index]
        self._bias, self._state_bias = both[:count], both[count:]
        self._peepholes = (
            []
            if peepholes is None
            else [chain.constant(each) for each in np.split(peepholes[index], 3)]
        )
        named = attributes_of(node).get("activations")
        size = len(_DEFAULTS[node.op_type])
        names = (
            [text_of(each) for each in named[index * size : (index + 1) * size]]
            if named
            else _DEFAULTS[node.op_type]
        )
        unknown = [each for each in names if each.lower() not in _ACTIVATIONS]
        if unknown:
            raise refusal(
                node,
                f"its activation {unknown[0]} is not built; use {', '.join(_ACTIVATIONS.values())}",
            )
        self._activations = [_ACTIVATIONS[each.lower()] for each in names]
        self._linear = bool(attributes_of(node).get("linear_before_reset", 0))
        # GRU's last gate has a product of its own where the state is reset before it.
        cut = 2 * self._hidden if node.op_type == "GRU" and not self._linear else count
        self._r, self._r_new = (
            chain.constant(each) for each in (state[:, :cut].T, state[:, cut:].T)
        )
        self._h, self._c = (self._initial(node, k, index) for k in (5, 6))

    def _initial(self, node: onnx.NodeProto, place: int, index: int) -> Any:
        if place >= len(node.input) or not node.input[place]:
            return np.zeros((self._batch, self._hidden), np.float32)
        one = part(self._chain, self._graph, node.input[place], 0, index, index + 1)
        return self._chain.add("Reshape", one, (self._batch, self._hidden))

    def run(self, reverse: bool) -> tuple[str, Any, Any]:
        """All hidden states, in the order of the sequence; the last one; the last cell state."""
        add = self._chain.add
        # The state's bias joins the input's, but for the gate that GRU resets after it.
        bias, late = self._bias + self._state_bias, self._state_bias.copy()
        late[: -self._hidden] = 0
        if self._kind == "GRU" and self._linear:
            bias = bias - late
        self._zero = self._chain.constant(np.zeros(1, np.float32))
        self._late = self._chain.constant(late[-self._hidden :])
        flat = add("Reshape", self._input, (self._steps * self._batch, self._depth))
        products = add("Add", add("MatMul", flat, self._w), bias)
        shape = (self._batch, self._w.shape[1])
        products = add("Reshape", products, (self._steps, *shape))
        rows = self._chain.split(products, 0, self._steps, 1)
        states = [""] * self._steps
        order = range(self._steps)
        for step in reversed(order) if reverse else order:
            x = add("Reshape", rows[step], shape)
            states[step] = self._h = self._step(x)
        every = states[0] if len(states) == 1 else add("Concat", *states, axis=0)
        return every, self._h, self._c

    def _step(self, x: str) -> str:
        if self._kind == "GRU":
            return self._gru(x)
        gates = self._times(self._h, self._r, x)
        if self._kind == "RNN":
            return self._chain.add(self._activations[0], gates)
        return self._lstm(gates)

    def _lstm(self, gates: str) -> str:
        add, (f, g, h) = self._chain.add, self._activations
        i, o, forget, c = self._gates(gates, 4)
        if self._peepholes:
            i = add("Add", i, add("Mul", self._c, self._peepholes[0]))
            forget = add("Add", forget, add("Mul", self._c, self._peepholes[2]))
        kept = add("Mul", add(f, forget), self._c)
        self._c = add("Add", kept, add("Mul", add(f, i), add(g, c)))
        if self._peepholes:
            o = add("Add", o, add("Mul", self._c, self._peepholes[1]))
        return add("Mul", add(f, o), add(h, self._c))

    def _gru(self, x: str) -> str:
        add, (f, g) = self._chain.add, self._activations
        given = self._gates(x, 3)
        state = self._times(self._h, self._r, self._zero)
        kept = self._gates(state, 3 if self._linear else 2)
        z, r = (add(f, add("Add", given[k], kept[k])) for k in range(2))
        if self._linear:
            third = add("Mul", r, add("Add", kept[2], self._late))
        else:
            third = self._times(add("Mul", r, self._h), self._r_new, self._zero)
        new = add(g, add("Add", given[2], third))
        # (1 - z) new + z h
        return add("Add", new, add("Mul", z, add("Sub", self._h, new)))

    def _times(self, state: Any, weights: str, added: str) -> str:
        # As a MatMul, TVM's importer would compile a transposition of the weights for each step.
        return self._chain.add("Gemm", state, weights, added, transB=1)

    def _gates(self, source: str, count: int) -> list[str]:
        return self._chain.split(source, 1, count, self._hidden)
