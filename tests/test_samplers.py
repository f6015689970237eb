"""Operators that resample, unpool or repeat answer as in ONNX Runtime, with each of their attributes."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import graphs
import numpy as np
import onnx
import pytest
import resampled
import sampled
from conftest import succeed
from relay_worker import (
    relay_worker,
    through_onnxruntime,
    through_relay,
    worst_difference,
)
from test_rewrite import chain, real, single, weights, whole

from netship.compile.frontend.canonical import resize
from netship.compile.frontend.canonical.rules import canonical
from netship.targets.errors import UserError

MODELS = {**sampled.MODELS, **resampled.MODELS}
# Every operator of the rewritten forms at least once.
COMPILED = [
    *("grid computed", "grid 16 nearest reflection 0", "grid volume"),
    *("roi 16 max 2 half_pixel", "roi 10 avg 0 half_pixel", "deform strided"),
    *(
        "RNN relu",
        "GRU reverse 1 True",
        "GRU forward 0 False",
        "LSTM bidirectional 0 True",
    ),
    *("unpool 2", "nearest crop beyond -2.5", "cubic antialias policy"),
    *(
        f"transposed 17 {named}"
        for named in (
            {"strides": [2, 2], "output_shape": [15, 12]},
            {"strides": [2, 2], "output_shape": [7, 4]},
            {"strides": [2, 2], "auto_pad": "SAME_UPPER", "output_padding": [1, 1]},
        )
    ),
    "transposed rank 3 1 {'output_shape': [5]}",
]


def shape_of(model: onnx.ModelProto) -> tuple[int, ...]:
    dims = model.graph.input[0].type.tensor_type.shape.dim
    return tuple(dim.dim_value for dim in dims)


@pytest.mark.parametrize("name", MODELS)
def test_the_rewritten_form_is_the_same_function(name: str) -> None:
    proto = MODELS[name].SerializeToString()
    x = graphs.image(shape_of(MODELS[name]))
    (expected,) = through_onnxruntime(proto, [x])
    rewritten = canonical(MODELS[name]).SerializeToString()
    (got,) = through_onnxruntime(rewritten, [x])
    assert worst_difference(got, expected) < 1e-5


@pytest.fixture(scope="module")
def relay() -> Iterator[ProcessPoolExecutor]:
    with relay_worker() as worker:
        yield worker


@pytest.mark.parametrize("name", COMPILED)
def test_it_answers_in_tvm_as_in_onnxruntime(
    name: str, relay: ProcessPoolExecutor
) -> None:
    proto = MODELS[name].SerializeToString()
    x = graphs.image(shape_of(MODELS[name]))
    (expected,) = through_onnxruntime(proto, [x])
    (got,) = relay.submit(through_relay, proto, [x], optimise=False).result()
    assert worst_difference(got, expected) < 1e-5


def computed_regions() -> onnx.ModelProto:
    nodes = [
        onnx.helper.make_node("Reshape", ["x", "shape"], ["rois"]),
        onnx.helper.make_node("RoiAlign", ["x", "rois", "first"], ["y"]),
    ]
    tensors = [
        onnx.numpy_helper.from_array(whole(-1, 4), "shape"),
        onnx.numpy_helper.from_array(whole(0, 0), "first"),
    ]
    return chain(nodes, tensors, 16, (1, 1, 2, 4))


REFUSED = {
    r"\(RoiAlign\): with sampling_ratio 0 .*export with sampling_ratio=2": computed_regions(),
    r"\(MaxPool\): storage_order 1 is not built": chain(
        [
            onnx.helper.make_node(
                "MaxPool", ["x"], ["p", "i"], kernel_shape=[2, 2], storage_order=1
            ),
            onnx.helper.make_node("Cast", ["i"], ["y"], to=1),
        ],
        [],
        13,
        (1, 1, 4, 4),
    ),
    r"\(GRU\): its attribute clip is not built": single(
        "GRU",
        weights(1, 6, 3),
        weights(1, 6, 2),
        shape=(4, 1, 3),
        hidden_size=2,
        clip=1.0,
    ),
    r"\(RNN\): its attribute activation_alpha is not built": single(
        "RNN",
        weights(1, 2, 3),
        weights(1, 2, 2),
        shape=(4, 1, 3),
        hidden_size=2,
        activations=["HardSigmoid"],
        activation_alpha=[0.3],
    ),
    r"\(RNN\): its activation Softsign is not built; use HardSigmoid": single(
        "RNN",
        weights(1, 2, 3),
        weights(1, 2, 2),
        shape=(4, 1, 3),
        hidden_size=2,
        activations=["Softsign"],
    ),
    r"\(LSTM\): 600 steps, more than the 512": single(
        "LSTM", weights(1, 8, 3), weights(1, 8, 2), shape=(600, 1, 3), hidden_size=2
    ),
    r"\(Resize\): .*computed": chain(
        [
            onnx.helper.make_node(
                "ReduceMax", ["x"], ["roi"], axes=[0, 1, 2], keepdims=0
            ),
            onnx.helper.make_node(
                "Resize",
                ["x", "roi", "scales"],
                ["y"],
                coordinate_transformation_mode="tf_crop_and_resize",
            ),
        ],
        [onnx.numpy_helper.from_array(real(1, 1, 2, 2), "scales")],
        13,
        (1, 1, 4, 8),
    ),
}


def recurrent_layers(count: int) -> onnx.ModelProto:
    node = onnx.helper.make_node
    nodes, at = [], "x"
    for k in range(count):
        nodes += [
            node("LSTM", [at, "w", "r"], [f"y{k}"], hidden_size=2),
            node("Squeeze", [f"y{k}", "one"], [f"s{k}"]),
        ]
        at = f"s{k}"
    nodes[-1].output[0] = "y"
    constants = [
        onnx.numpy_helper.from_array(weights(1, 8, 2), "w"),
        onnx.numpy_helper.from_array(weights(1, 8, 2), "r"),
        onnx.numpy_helper.from_array(np.array([1]), "one"),
    ]
    return chain(nodes, constants, 13, (500, 1, 2))


def whole_number_linear() -> onnx.ModelProto:
    node = onnx.helper.make_node
    nodes = [
        node("Cast", ["x"], ["whole"], to=onnx.TensorProto.INT32),
        node("Resize", ["whole", "", "scales"], ["wide"], mode="linear"),
        node("Cast", ["wide"], ["y"], to=onnx.TensorProto.FLOAT),
    ]
    scales = onnx.numpy_helper.from_array(np.array([1, 1, 2, 2], np.float32), "scales")
    return chain(nodes, [scales], 13, (1, 1, 4, 4))


def places_of_a_pool(size: int) -> onnx.ModelProto:
    node = onnx.helper.make_node
    nodes = [
        node("MaxPool", ["x"], ["large", "places"], kernel_shape=[size, size]),
        node("Cast", ["places"], ["y"], to=onnx.TensorProto.FLOAT),
    ]
    return chain(nodes, [], 13, (1, 1, 50, 50))


# Small files that become large: each is refused before the cost.
COSTLY = {
    r"\(RoiAlign\): takes \d{10} samples": single(
        "RoiAlign",
        np.array([[0, 0, 1e9, 1e9]], np.float32),
        np.array([0]),
        shape=(1, 1, 4, 4),
        opset=16,
    ),
    r"a step of it takes \d{13} bytes": single(
        "RoiAlign",
        np.array([[0, 0, 1e6, 1e6]], np.float32),
        np.array([0]),
        shape=(1, 1, 4, 4),
        opset=16,
    ),
    r"\(Resize\): keeps the aspect ratio 999/2000": single(
        "Resize",
        None,
        None,
        np.array([999, 999]),
        shape=(1, 1, 2000, 2000),
        opset=18,
        mode="linear",
        axes=[2, 3],
        keep_aspect_ratio_policy="not_larger",
    ),
    r"\(Resize\): resizes whole numbers": whole_number_linear(),
    r"\(MaxPool\): its Indices .* at most 512": places_of_a_pool(23),
    r"\(LSTM\): the network becomes more than 60000": recurrent_layers(25),
}


@pytest.mark.parametrize("message", COSTLY)
def test_what_becomes_too_large_is_refused_before_it_does(message: str) -> None:
    with pytest.raises(UserError, match=message):
        canonical(COSTLY[message])


def test_an_aspect_ratio_of_large_numbers_is_resized_in_parts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(resize, "_AT_ONCE", 4000)
    model = single(
        "Resize",
        None,
        None,
        np.array([19, 13]),
        shape=(1, 2, 22, 30),
        opset=18,
        mode="linear",
        axes=[2, 3],
        keep_aspect_ratio_policy="not_larger",
    )
    x = graphs.image((1, 2, 22, 30))
    (expected,), (got,) = (
        through_onnxruntime(each.SerializeToString(), [x])[0]
        for each in (model, canonical(model))
    )
    np.testing.assert_allclose(got, expected, atol=1e-5)


@pytest.mark.parametrize("message", REFUSED)
def test_a_form_that_cannot_be_built_is_named(message: str) -> None:
    with pytest.raises(UserError, match=message):
        canonical(REFUSED[message])


@pytest.mark.slow
def test_indices_that_are_computed_are_written_in_c(tmp_path: Path) -> None:
    """A real number becomes a whole one by trunc, of which TVM's C knows nothing; a build compares its answers."""
    onnx.save(MODELS["grid computed"], tmp_path / "m.onnx")
    options = ("--model", tmp_path / "m.onnx", "--target", "cortex-m7", "--name", "net")
    succeed("compile.build", *options, "--output", tmp_path / "built")
    assert "truncf(" in (tmp_path / "built" / "net.c").read_text()


@pytest.mark.parametrize("sizes", [(100_000, 4), (3, 100_000)])
def test_a_long_axis_that_stays_takes_no_memory(sizes: tuple[int, int]) -> None:
    shape = (1, 1, *sizes)
    scales = [1 if each == 100_000 else 2 for each in sizes]
    model = single("Resize", None, real(1, 1, *scales), shape=shape, mode="linear")
    products = [n for n in canonical(model).graph.node if n.op_type == "MatMul"]
    assert len(products) == 1


def test_a_long_axis_that_is_resized_is_refused() -> None:
    model = single("Resize", None, real(1, 1, 1e-4, 1), shape=(1, 1, 100_000, 1))
    with pytest.raises(UserError, match="from 100000 to 9, too large to compute"):
        canonical(model)
