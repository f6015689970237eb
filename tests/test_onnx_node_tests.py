"""ONNX's own tests of single operators: each with an image is built as a user's model, or refused for its reason."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, numpy_helper
from relay_worker import relay_worker, through_product

pytestmark = pytest.mark.slow

Array = NDArray[Any]

_ONE_BATCH = r"output '\w+' has shape \(3, .*need a batch of 1"
# Names of tests (as a pattern of all of it) and what the refusal says.
REFUSED = {
    r"dequantizelinear_blocked": "'x_scale' is computed",
    r"flexattention_(?!.*_expanded).*": "control flow is not supported",
    r"matmul_bcast": _ONE_BATCH,
    r"maxpool_with_argmax_2d_precomputed_strides": "storage_order 1 is not built",
    r"roialign_.*": _ONE_BATCH,
    r"squeeze": _ONE_BATCH,
}
# ONNX Runtime's answer is not what these expect, and ours is ONNX Runtime's.
UNLIKE_ONNX = {
    "maxunpool_export_with_output_shape",
    "resize_downsample_scales_linear_align_corners",
    "resize_downsample_scales_cubic_align_corners",
}


class Case:
    """A node test as a model with one image; its other inputs are constants."""

    def __init__(self, name: str, model: onnx.ModelProto, data: Any) -> None:
        inputs, self.expected = data
        self.name, self.model = name.removeprefix("test_"), onnx.ModelProto()
        self.model.CopyFrom(model)
        graph = self.model.graph
        self.index = next((k for k, i in enumerate(graph.input) if _is_image(i)), None)
        if self.index is None:
            return
        self.image: Array = inputs[self.index]
        given = [each.name for each in graph.input]
        image = graph.input[self.index]
        del graph.input[:]
        graph.input.append(image)
        graph.initializer.extend(
            numpy_helper.from_array(array, name)
            for name, array in zip(given, inputs, strict=True)
            if name != image.name
        )


def _is_image(value: onnx.ValueInfoProto) -> bool:
    tensor = value.type.tensor_type
    sizes = [dim.dim_value for dim in tensor.shape.dim]
    return tensor.elem_type == TensorProto.FLOAT and len(sizes) == 4 and sizes[0] == 1


def _cases() -> list[Case]:
    from onnx.backend.test.case.node import collect_testcases

    with warnings.catch_warnings():
        # Some tests overflow, or divide by zero, on purpose.
        warnings.simplefilter("ignore")
        found = collect_testcases(None)
    cases = [
        Case(each.name, each.model, each.data_sets[0])
        for each in found
        # What an Attention expands to is what is built of it.
        if each.model is not None
        and each.data_sets
        and not re.match("test_attention.*_expanded", each.name)
    ]
    return [case for case in cases if case.index is not None]


def _verdict(case: Case, worker: Any) -> str:
    """``right``, or what is not."""
    model = case.model.SerializeToString()
    try:
        got, _, passed = worker.submit(through_product, model, case.image).result()
    except BrokenProcessPool:
        raise
    except Exception as error:  # noqa: BLE001  (a build that fails is not refused: its words are compared all the same)
        return str(error)
    if not passed:
        return "wrong: not what ONNX Runtime answers"
    # The tolerance of onnx.backend.test.runner; near zero, that of sums of large values.
    close = [
        a.shape == b.shape
        and np.allclose(a, b, 1e-3, 1e-6 * float(np.abs(b).max()), equal_nan=True)
        for a, b in zip(got, case.expected, strict=True)
    ]
    return "right" if all(close) else "wrong: not what ONNX expects"


@pytest.fixture(scope="module")
def verdicts() -> dict[str, str]:
    left, found = _cases(), {}
    while left:
        with relay_worker() as worker:
            while left:
                case = left.pop()
                try:
                    found[case.name] = _verdict(case, worker)
                except BrokenProcessPool:
                    found[case.name] = "wrong: the process ended"
                    break
    return found


def _reasons(name: str) -> Iterator[str]:
    return (why for names, why in REFUSED.items() if re.fullmatch(names, name))


def test_every_node_test_is_right_or_refused_for_its_reason(
    verdicts: dict[str, str],
) -> None:
    unlike = {name for name, verdict in verdicts.items() if "ONNX expects" in verdict}
    assert unlike == UNLIKE_ONNX
    wrong = {}
    for name, verdict in verdicts.items():
        reason = next(_reasons(name), None)
        taken = verdict == "right" or name in unlike
        if taken != (reason is None) or not re.search(reason or "", verdict):
            wrong[name] = verdict
    assert wrong == {}


def test_most_node_tests_are_built(verdicts: dict[str, str]) -> None:
    assert len(verdicts) >= 165
    assert sum(verdict == "right" for verdict in verdicts.values()) >= 151
