"""Operators of ONNX's newest opsets, and what the newest says of old ones, from the gate to an answer."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor

import graphs
import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper
from relay_worker import relay_worker, through_product
from test_rewrite import IMAGE, chain, number, real, single, weights

from netship.bundle.manifest import ModelIdentity
from netship.compile.frontend import gate
from netship.compile.frontend.canonical.rules import canonical
from netship.compile.frontend.fold import opset
from netship.compile.frontend.model import Model
from netship.targets.errors import UserError

QUANTISED = [
    helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["q"], output_dtype=0),
    helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["y"]),
]
STEP = [
    numpy_helper.from_array(number(0.1), "scale"),
    numpy_helper.from_array(np.array(128, np.uint8), "zero"),
]


def group_norm(count: int, version: int) -> onnx.ModelProto:
    """Of two groups of two channels; ``count`` scales."""
    scale, bias = weights(count), weights(count)
    kind, shape = "GroupNormalization", (1, 4, 3, 5)
    return single(kind, scale, bias, opset=version, shape=shape, num_groups=2)


# Each with the opset that is compiled.
TAKEN: dict[str, tuple[onnx.ModelProto, int]] = {
    "group-norm-18": (group_norm(2, 18), 18),
    "group-norm-28": (group_norm(4, 28), 22),
    "swish": (single("Swish", opset=24), 22),
    "swish-alpha": (single("Swish", opset=28, alpha=1.5), 22),
    "swiglu": (single("SwiGLU", weights(*IMAGE), opset=28), 22),
    "rms-norm": (single("RMSNormalization", weights(5), opset=23), 22),
    "rotary": (
        single(
            *("RotaryEmbedding", weights(1, 6, 2), weights(1, 6, 2)),
            opset=24,
            shape=(1, 6, 12),
            num_heads=3,
        ),
        24,
    ),
    "rotary-part": (
        single(
            *("RotaryEmbedding", weights(9, 2), weights(9, 2)),
            np.array([[8, 1, 0, 3, 2, 7]]),
            opset=23,
            shape=(1, 3, 6, 8),
            rotary_embedding_dim=4,
            num_heads=3,
            interleaved=1,
        ),
        23,
    ),
    "attention": (
        single(
            "Attention", weights(1, 3, 6, 5), weights(1, 3, 6, 4), opset=25, is_causal=1
        ),
        25,
    ),
    "center-crop-pad": (
        single("CenterCropPad", np.array([4, 8]), opset=18, axes=[2, 3]),
        18,
    ),
    "quantised": (chain(QUANTISED, STEP, 28, IMAGE), 22),
    "cast": (
        chain(
            [
                helper.make_node("Cast", ["x"], ["whole"], to=6, round_mode="up"),
                helper.make_node("Cast", ["whole"], ["y"], to=1),
            ],
            [],
            28,
            IMAGE,
        ),
        22,
    ),
    "blocks": (
        single("SpaceToDepth", blocksize=2, mode="CRD", opset=28, shape=(1, 3, 6, 4)),
        28,
    ),
    "mod": (single("Mod", real(1, -2, 3, -4, 5), opset=28), 28),
    "mask": (
        single("Add", np.where(weights(7, 5) > 0, -np.inf, number(0)), opset=28),
        22,
    ),
    "mask-maximum": (
        chain(
            [
                helper.make_node("Add", ["x", "mask"], ["masked"]),
                helper.make_node("ReduceMax", ["masked", "last"], ["y"]),
            ],
            [
                numpy_helper.from_array(
                    np.where(np.arange(7)[:, None] < 2, -np.inf, number(0)), "mask"
                ),
                numpy_helper.from_array(np.array([-1]), "last"),
            ],
            18,
            IMAGE,
        ),
        18,
    ),
}


def gated(model: onnx.ModelProto) -> Model:
    return gate.check(model, ModelIdentity(name="case.onnx", sha256="0" * 64))


@pytest.fixture(scope="module")
def relay() -> Iterator[ProcessPoolExecutor]:
    with relay_worker() as worker:
        yield worker


@pytest.mark.parametrize("name", TAKEN)
def test_it_is_taken_and_answers_as_onnxruntime(
    name: str, relay: ProcessPoolExecutor
) -> None:
    model, compiled = TAKEN[name]
    assert opset(gated(model).proto) == compiled
    shape = [dim.dim_value for dim in model.graph.input[0].type.tensor_type.shape.dim]
    x = graphs.image(tuple(shape))
    _, _, passed = relay.submit(through_product, model.SerializeToString(), x).result()
    assert passed


def test_scales_that_are_neither_of_groups_nor_of_channels_are_refused() -> None:
    model = group_norm(3, 18)
    with pytest.raises(UserError, match="one value a group or a channel"):
        gated(model)


def test_angles_that_do_not_fit_are_refused() -> None:
    few = single("RotaryEmbedding", weights(9, 2), weights(9, 2), opset=23)
    with pytest.raises(UserError, match="4 of 5 elements .* its angles do not fit"):
        few.graph.node[0].attribute.append(
            helper.make_attribute("rotary_embedding_dim", 4)
        )
        canonical(gated(few).proto)


def repeated(*operator: str, count: int = 201) -> onnx.ModelProto:
    nodes = [
        helper.make_node(
            operator[0], [f"x{k}" if k else "x", *operator[1:]], [f"x{k + 1}"]
        )
        for k in range(count)
    ]
    nodes[-1].output[0] = "y"
    weights = [numpy_helper.from_array(np.ones(1, np.float32), "w")]
    return chain(nodes, weights, 28, IMAGE)


def test_operators_that_stand_for_many_nodes_are_counted() -> None:
    with pytest.raises(UserError, match="201 operators that stand for up to 100 nodes"):
        gated(repeated("RMSNormalization", "w"))


def test_those_that_stand_for_few_nodes_are_taken_in_any_number() -> None:
    for operator in (("Swish",), ("CastLike", "w")):
        assert gated(repeated(*operator)).outputs


def test_an_opset_that_is_not_published_yet_is_refused() -> None:
    with pytest.raises(UserError, match=r"opset 29 .*takes 7 to 28"):
        gated(single("Relu", opset=29))
