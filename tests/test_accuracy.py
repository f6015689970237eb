"""Golden inputs are the same everywhere, and two outputs are compared by figures worked out by hand."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import pytest
from whole_bundles import INPUT, PREPROCESSING

from netship.bundle.accuracy import compare, first_swap, in_steps
from netship.bundle.golden import normalise, seeded_inputs
from netship.bundle.manifest import Tensor


def digest(tensor: Any) -> str:
    return hashlib.sha256(tensor.tobytes()).hexdigest()


def test_seeded_inputs_are_the_same_everywhere() -> None:
    """What the rounding to whole pixels protects: another libm's sine may differ in its last bit."""
    inputs = seeded_inputs(INPUT, PREPROCESSING)
    assert [digest(tensor) for tensor in inputs] == SEEDED
    assert all(t.shape == INPUT.shape and t.dtype == np.float32 for t in inputs)


SEEDED = [
    "c646d1183328c921d3843c8c47deaadaffd4a7b80b853699a508b6abc045bc68",
    "4cf2056afecae15cce815fc86c4a02b6a67bc06de31a1b4440b97a7d0fb6151f",
]


def test_seeded_inputs_fill_the_range_of_a_photograph() -> None:
    large = Tensor(name="x", shape=(1, 3, 64, 64), layout="NCHW")
    preprocessing = PREPROCESSING.model_copy(update={"crop": (64, 64), "resize": 64})
    first, second = seeded_inputs(large, preprocessing)
    for tensor in (first, second):
        assert -1 <= tensor.min() < -0.5 and 0.5 < tensor.max() <= 1
    assert np.abs(first - second).max() > 0.5


def test_channels_last_has_the_same_pixels() -> None:
    last = Tensor(name="x", shape=(1, 4, 6, 3), layout="NHWC")
    for a, b in zip(
        seeded_inputs(INPUT, PREPROCESSING),
        seeded_inputs(last, PREPROCESSING),
        strict=True,
    ):
        assert b.shape == last.shape
        assert np.array_equal(a.transpose(0, 2, 3, 1), b)


def test_each_channel_has_its_own_mean_and_std() -> None:
    preprocessing = PREPROCESSING.model_copy(
        update={"scale": 0.5, "mean": (0.0, 1.0, 2.0), "std": (1.0, 2.0, 4.0)}
    )
    found = normalise(np.full((3, 4, 6), 10.0), preprocessing, INPUT)
    assert [np.unique(plane).tolist() for plane in found[0]] == [[5], [2], [0.75]]


def arrays(*values: list[float]) -> list[Any]:
    return [np.array([each], np.float32) for each in values]


def test_equal_outputs_have_no_error() -> None:
    result = compare(arrays([1, 2, 3]), arrays([1, 2, 3]), arrays([0, 0, 0]))
    assert result.passed
    assert (result.max_abs_error, result.rms_error, result.relative_error) == (0, 0, 0)
    assert result.cosine == pytest.approx(1)


def test_the_figures_are_those_worked_out_by_hand() -> None:
    """Errors 0, 0.5, 0 and 0; range 4; |ours|² = 26.25, |theirs|² = 24, their product 25."""
    near = arrays([0, 0.4, 0, 0])
    result = compare(arrays([0, 2.5, 2, 4]), arrays([0, 2, 2, 4]), near)
    assert result.max_abs_error == 0.5
    assert result.rms_error == pytest.approx(0.25)
    assert result.relative_error == 0.125
    assert result.cosine == pytest.approx(25 / (26.25 * 24) ** 0.5)
    assert result.excess == pytest.approx(1.25) and not result.passed


def test_the_worst_output_of_several_decides() -> None:
    """0.001 of a range of 1000 is nothing, 0.001 of a range of 0.01 is a tenth."""
    ours, theirs = arrays([0.001, 1000], [0.001, 0.01]), arrays([0, 1000], [0, 0.01])
    near = arrays([0.01, 0.01], [0.0005, 0.01])
    for order in (1, -1):
        result = compare(ours[::order], theirs[::order], near[::order])
        assert result.relative_error == pytest.approx(0.1, rel=1e-3)
        assert not result.passed


def test_without_tolerances_nothing_passes() -> None:
    assert not compare(arrays([1, 2]), arrays([1, 2])).passed


def test_integers_may_be_a_whole_number_of_steps_off() -> None:
    answer = arrays([-0.5, 0.25, 3])
    for steps, others in ((0, (1, 2)), (2, (3, 4))):
        near = [in_steps(answer[0], 0.25, steps)]
        for off in range(steps + 1):
            assert compare([answer[0] - np.float32(off * 0.25)], answer, near).passed
        for off in others:
            result = compare([answer[0] + np.float32(off * 0.25)], answer, near)
            assert not result.passed


def test_a_constant_output_is_measured_by_its_magnitude() -> None:
    """A constant has no range: a network of one class always answers 1."""
    assert compare(arrays([50, 51]), arrays([50, 50])).relative_error == 0.02
    assert compare(arrays([0, 0]), arrays([0, 0])).relative_error == 0
    assert compare(arrays([0, 0]), arrays([0, 0])).cosine == 1
    assert compare(arrays([0, 0.5]), arrays([0, 0])).relative_error == 0.5


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_no_number_never_passes(bad: float) -> None:
    good = arrays([1, 2, 3])
    for ours, theirs in (
        (arrays([1, bad, 3]), good),
        (good, arrays([1, bad, 3])),
        (arrays([1, bad, 3]), arrays([1, -bad if np.isinf(bad) else 2, 3])),
    ):
        for tolerances in (None, arrays([1, 1, 1])):
            result = compare(ours, theirs, tolerances)
            assert not result.passed and result.max_abs_error == np.inf


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("sign", [1, -1])
def test_the_largest_number_is_equal_to_infinity(sign: int) -> None:
    largest = sign * float(np.finfo(np.float32).max)
    ours, theirs = arrays([0, sign * np.inf, 3]), arrays([0, largest, 3])
    for one, other in ((ours, theirs), (theirs, ours)):
        assert compare(one, other, arrays([0, 0, 0])).passed
        assert compare(one, other).cosine == pytest.approx(1)
        assert not compare(-one[0][None], other, arrays([1, 1, 1])).passed


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("same", [np.nan, np.inf, -np.inf])
def test_the_same_infinity_is_equal(same: float) -> None:
    reference = arrays([0, same, 4])
    tolerances = arrays([0, 0, 0.5])
    result = compare(arrays([0, same, 4]), reference, tolerances)
    assert result.passed and result.relative_error == 0
    result = compare(arrays([0, same, 3]), reference, tolerances)
    assert not result.passed and result.relative_error == 0.25


def test_each_element_has_its_own_tolerance() -> None:
    """An error that is nothing beside the largest value, and more than its element may have."""
    reference, tolerances = arrays([0.5, -1e9]), arrays([1e-6, 100])
    result = compare(arrays([0.5, -1e9 + 64]), reference, tolerances)
    assert result.passed and result.excess == pytest.approx(0.64)
    result = compare(arrays([0.6, -1e9]), reference, tolerances)
    assert not result.passed and result.relative_error < 1e-9
    assert result.worst is not None and result.worst.place == (0, 0)
    assert result.excess == pytest.approx(1e5, rel=0.01)
    assert compare(reference, reference, tolerances).excess == 0
    assert compare(reference, reference).excess is None


@pytest.mark.parametrize(("wrong", "tolerance"), [(9, np.nan), (np.inf, np.inf)])
def test_a_useless_tolerance_passes_in_no_output(
    wrong: float, tolerance: float
) -> None:
    for at in range(3):
        found, allowed = arrays([1], [1], [1]), arrays([1], [1], [1])
        found[at][...], allowed[at][...] = wrong, tolerance
        result = compare(found, arrays([1], [1], [1]), allowed)
        assert not result.passed
        assert result.worst is not None and result.worst.output == at


def test_another_shape_never_passes() -> None:
    good = arrays([1, 2, 3])
    for ours in (arrays([1, 2]), arrays([1, 2, 3], [1]), [good[0].T], []):
        result = compare(ours, good)
        assert not result.passed and result.max_abs_error == np.inf


def test_another_class_passes_only_where_the_reference_has_them_within_tolerances() -> (
    None
):
    reference = arrays([0.1, 5.0, 4.75, 3, 2, 1])
    ours = arrays([0.1, 4.875, 4.9375, 3, 2, 1])
    for near, passed in ((0.25, True), (0.1, False)):
        tolerances = arrays([near] * 6)
        assert compare(ours, reference, tolerances).passed == passed
        swap = first_swap(ours[0], reference[0], tolerances[0])
        assert swap is not None
        assert (swap.ours, swap.reference, swap.gap) == (2, 1, 0.25)
        assert (swap.gap <= swap.tolerances) == passed
    assert first_swap(reference[0], reference[0], arrays([0] * 6)[0]) is None


def test_what_passes_has_no_class_in_another_place_than_tolerances_explain() -> None:
    """Errors up to the tolerances, which are of very different sizes, and beyond."""
    random = np.random.default_rng(0)
    swapped = [0, 0]
    for trial in range(400):
        reference = random.normal(0, 1, (1, 12)).astype(np.float32)
        near = (10 ** random.uniform(-3, 0, (1, 12))).astype(np.float32)
        reach = 0.99 if trial % 2 else 3.0
        moved = reference + near * random.uniform(-reach, reach, (1, 12))
        ours = moved.astype(np.float32)
        swap = first_swap(ours, reference, near)
        if swap is None:
            continue
        passed = compare([ours], [reference], [near]).passed
        swapped[passed] += 1
        assert swap.gap <= swap.tolerances or not passed
    assert min(swapped) > 20
