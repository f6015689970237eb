"""Convolutions take in the scales, shifts and zeros around them, and answer as before."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from gated import small
from onnx import helper
from relay_worker import through_onnxruntime

from netship.compile.frontend.absorb import absorb
from netship.compile.frontend.canonical.rules import canonical

RANDOM = np.random.default_rng(8)
SHAPE = (1, 3, 6, 4)
node = helper.make_node
W = RANDOM.normal(size=(4, 3, 3, 3)).astype(np.float32)
DEPTHWISE = RANDOM.normal(size=(3, 1, 3, 3)).astype(np.float32)


def row(channels: int, *after: int) -> Any:
    return RANDOM.uniform(0.5, 2, (channels, *after)).astype(np.float32)


CONV = node("Conv", ["x", "w"], ["a"], pads=[1, 1, 1, 1], strides=[2, 2])
BIASED = node("Conv", ["x", "w", "b"], ["a"])
TAKEN: dict[str, tuple[list[Any], dict[str, Any]]] = {
    "scale and shift": (
        [CONV, node("Mul", ["a", "s"], ["c"]), node("Add", ["t", "c"], ["y"])],
        {"w": W, "s": row(1, 4, 1, 1), "t": row(4, 1, 1)},
    ),
    "one number": (
        [BIASED, node("Div", ["a", "s"], ["c"]), node("Sub", ["c", "t"], ["y"])],
        {"w": W, "b": row(4), "s": np.float32(3), "t": np.full(1, 2, np.float32)},
    ),
    "depthwise": (
        [
            node("Conv", ["x", "w"], ["a"], group=3),
            node("Mul", ["s", "a"], ["c"]),
            node("Add", ["c", "t"], ["y"]),
        ],
        {"w": DEPTHWISE, "s": row(3, 1, 1), "t": row(3, 1, 1)},
    ),
    "zeros around": (
        [
            node("Pad", ["x", "p"], ["a"]),
            node("Conv", ["a", "w"], ["y"], strides=[2, 2], pads=[1, 0, 0, 1]),
        ],
        {"w": W, "p": np.array([0, 0, 0, 0, 0, 0, 1, 1])},
    ),
    "zeros that are stated, and VALID": (
        [
            node("Pad", ["x", "p", "v"], ["a"], mode="constant"),
            node("Conv", ["a", "w"], ["y"], auto_pad="VALID"),
        ],
        {"w": W, "p": np.array([0, 0, 1, 2, 0, 0, 0, 1]), "v": np.float32(0)},
    ),
}
LEFT: dict[str, tuple[list[Any], dict[str, Any]]] = {
    "a number from which it is subtracted": (
        [BIASED, node("Sub", ["t", "a"], ["y"])],
        {"w": W, "b": row(4), "t": row(4, 1, 1)},
    ),
    "a number for each column": (
        [CONV, node("Mul", ["a", "s"], ["y"])],
        {"w": W, "s": row(2)},
    ),
    "a number for each place": (
        [CONV, node("Mul", ["a", "s"], ["y"])],
        {"w": W, "s": row(1, 1, 3, 2)},
    ),
    "more axes than the convolution": (
        [CONV, node("Mul", ["a", "s"], ["y"])],
        {"w": W, "s": row(2, 1, 4, 1, 1)},
    ),
    "two readers": (
        [CONV, node("Mul", ["a", "s"], ["c"]), node("Add", ["a", "c"], ["y"])],
        {"w": W, "s": row(4, 1, 1)},
    ),
    "nothing finite": (
        [CONV, node("Div", ["a", "s"], ["y"])],
        {"w": W, "s": np.float32(0)},
    ),
    "other padding than zeros": (
        [node("Pad", ["x", "p", "v"], ["a"]), node("Conv", ["a", "w"], ["y"])],
        {"w": W, "p": np.array([0, 0, 1, 1, 0, 0, 1, 1]), "v": np.float32(1)},
    ),
    "mirrored padding": (
        [
            node("Pad", ["x", "p"], ["a"], mode="reflect"),
            node("Conv", ["a", "w"], ["y"]),
        ],
        {"w": W, "p": np.array([0, 0, 1, 1, 0, 0, 1, 1])},
    ),
    "a channel of zeros": (
        [node("Pad", ["x", "p"], ["a"]), node("Conv", ["a", "w"], ["y"])],
        {"w": np.ones((4, 4, 3, 3), np.float32), "p": np.array([0, 1, 0, 0] + [0] * 4)},
    ),
    "a cut": (
        [node("Pad", ["x", "p"], ["a"]), node("Conv", ["a", "w"], ["y"])],
        {"w": W, "p": np.array([0, 0, -1, 0, 0, 0, 1, 1])},
    ),
    "padding by the size": (
        [
            node("Pad", ["x", "p"], ["a"]),
            node("Conv", ["a", "w"], ["y"], auto_pad="SAME_UPPER"),
        ],
        {"w": W, "p": np.array([0, 0, 1, 1, 0, 0, 1, 1])},
    ),
}


def kinds(proto: onnx.ModelProto) -> list[str]:
    return [each.op_type for each in proto.graph.node]


@pytest.mark.parametrize("name", TAKEN)
def test_what_a_convolution_takes_in(name: str) -> None:
    proto = small(*TAKEN[name], shape=list(SHAPE))
    made = absorb(proto)
    assert kinds(made) == ["Conv"] and made.graph.output[0].name == "y"
    assert kinds(canonical(proto)) == ["Conv"]
    same_answers(proto, made)


@pytest.mark.parametrize("name", LEFT)
def test_what_it_leaves(name: str) -> None:
    proto = small(*LEFT[name], shape=list(SHAPE))
    assert absorb(proto).graph.node == proto.graph.node


def test_a_result_of_the_network_stays() -> None:
    nodes, constants = TAKEN["scale and shift"]
    proto = small(nodes, constants, shape=list(SHAPE))
    proto.graph.output.append(helper.make_tensor_value_info("a", 1, None))
    made = absorb(proto)
    assert kinds(made) == ["Conv", "Mul", "Add"]


def test_outputs_that_nothing_reads_keep_their_shapes() -> None:
    nodes, constants = TAKEN["scale and shift"]
    nodes = [*nodes[:-1], node("Add", ["t", "c"], ["d"])]
    nodes += [node("TopK", ["d", "k"], ["y", "places"], axis=1)]
    proto = small(nodes, {**constants, "k": np.array([2])}, shape=list(SHAPE))
    shapes = {each.name for each in canonical(proto).graph.value_info}
    assert {"d", "places"} <= shapes


def same_answers(one: onnx.ModelProto, other: onnx.ModelProto) -> None:
    x = RANDOM.normal(size=SHAPE).astype(np.float32)
    (expected,) = through_onnxruntime(one.SerializeToString(), [x])
    (found,) = through_onnxruntime(other.SerializeToString(), [x])
    assert np.allclose(found, expected, rtol=1e-5, atol=1e-5)
