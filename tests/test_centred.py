"""Normalisations of equal values, and of values far from 0: the right answer where ONNX Runtime gives NaN."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from relay_worker import relay_worker, through_product
from test_rewrite import single, weights

from netship.bundle.accuracy import compare
from netship.bundle.manifest import ModelIdentity
from netship.compile.frontend import gate
from netship.compile.frontend.reference import Reference
from netship.targets.errors import UserError

Array = NDArray[np.float32]
SHAPE = (1, 3, 8, 8)
SCALE, BIAS = weights(3), weights(3) + np.float32(0.5)


def units(x: Array, axes: tuple[int, ...], least: float, added: float = 0) -> Array:
    """In float64: x − mean over the standard deviation, to whose square ``least`` is added, and ``added`` to its root."""
    wide = x.astype(np.float64)
    apart = wide - wide.mean(axes, keepdims=True)
    square = (apart * apart).mean(axes, keepdims=True) + least
    found: Array = (apart / (np.sqrt(square) + added)).astype(np.float32)
    return found


def by_channel(values: Array) -> Array:
    return values.reshape(1, -1, 1, 1)


KINDS: dict[str, onnx.ModelProto] = {
    "groups": single(
        "GroupNormalization", SCALE, BIAS, opset=18, shape=SHAPE, num_groups=3
    ),
    "channels": single(
        "GroupNormalization", SCALE, BIAS, opset=21, shape=SHAPE, num_groups=1
    ),
    "mean-variance": single("MeanVarianceNormalization", shape=SHAPE),
    "mean-variance-18": single(
        "MeanVarianceNormalization", shape=SHAPE, axes=[-1, 1], opset=18
    ),
}


def right(kind: str, x: Array) -> Array:
    scale, bias = by_channel(SCALE), by_channel(BIAS)
    if kind == "groups":
        return units(x, (2, 3), 1e-5) * scale + bias
    if kind == "channels":
        return units(x, (1, 2, 3), 1e-5) * scale + bias
    return units(x, (0, 2, 3) if kind == "mean-variance" else (1, 3), 0, 1e-9)


@pytest.fixture(scope="module")
def relay() -> Iterator[ProcessPoolExecutor]:
    with relay_worker() as worker:
        yield worker


def reference(model: onnx.ModelProto) -> Reference:
    return Reference(gate.check(model, ModelIdentity(name="m.onnx", sha256="0" * 64)))


@pytest.mark.parametrize("kind", KINDS)
def test_values_far_from_0_are_normalised_as_exactly_as_they_are_given(
    kind: str, relay: ProcessPoolExecutor
) -> None:
    """ONNX Runtime's own GroupNormalization is off by 7 % there, as is the definition that it takes."""
    x = weights(*SHAPE) + np.float32(1000)
    model = KINDS[kind].SerializeToString()
    got, expected, passed = relay.submit(through_product, model, x).result()
    assert passed
    np.testing.assert_allclose(got[0], right(kind, x), atol=1e-3)
    np.testing.assert_allclose(expected[0], right(kind, x), atol=1e-3)


@pytest.mark.parametrize("value", [0.0, 50.1, 1000.3, 1e4])
@pytest.mark.parametrize("kind", KINDS)
def test_equal_values_are_the_bias_and_no_false_alarm(kind: str, value: float) -> None:
    """ONNX Runtime's own answer is NaN of most of these."""
    x = np.full(SHAPE, value, np.float32)
    found = reference(KINDS[kind]).check(x)
    assert np.isfinite(found.outputs[0]).all()
    assert compare([right(kind, x)], found.outputs, found.tolerances).passed


def test_a_single_value_has_mean_variance_0() -> None:
    model = single("MeanVarianceNormalization", shape=(1, 3, 1, 1))
    (answer,) = reference(model).run(np.full((1, 3, 1, 1), 7, np.float32))
    assert answer.tolist() == [[[[0]]] * 3]


@pytest.mark.parametrize("axis", [-1, 1])
@pytest.mark.parametrize("outputs", [("y", "mean", "inverse"), ("y", "", "inverse")])
def test_layer_normalisation_gives_its_mean_and_deviation(
    axis: int, outputs: tuple[str, ...], relay: ProcessPoolExecutor
) -> None:
    x, sizes = weights(*SHAPE), SHAPE[axis:]
    scale, bias = weights(*sizes), weights(*sizes)
    model = single(
        *("LayerNormalization", scale, bias),
        opset=17,
        shape=SHAPE,
        outputs=outputs,
        axis=axis,
    )
    got, _, passed = relay.submit(
        through_product, model.SerializeToString(), x
    ).result()
    axes = tuple(range(axis % 4, 4))
    wide = x.astype(np.float64)
    inverse = 1 / np.sqrt(wide.var(axes, keepdims=True) + 1e-5)
    answers = {
        "y": units(x, axes, 1e-5) * scale + bias,
        "mean": wide.mean(axes, keepdims=True),
        "inverse": inverse,
    }
    assert passed
    for name, each in zip(filter(None, outputs), got, strict=True):
        np.testing.assert_allclose(each, answers[name], atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize(
    "model, said",
    [
        (
            single("GroupNormalization", SCALE, BIAS, opset=21, num_groups=0),
            "num_groups 0 does not divide 3 channels",
        ),
        (
            single(
                *("LayerNormalization", SCALE),
                opset=17,
                outputs=("y", "mean"),
                axis=9,
            ),
            "it has no axis 9 of 4",
        ),
    ],
    ids=["groups", "axis"],
)
def test_groups_and_axes_that_cannot_be_are_refused(
    model: onnx.ModelProto, said: str
) -> None:
    with pytest.raises(UserError, match=said):
        reference(model)
