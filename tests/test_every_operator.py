"""Every row of the table of operators in one network, built for each kind of target and compared with ONNX Runtime."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import pytest
from conftest import succeed
from integers import SAME, quantised
from integers import Graph as Writer
from onnx import compose, numpy_helper
from test_docs import NETWORKS, finished, function, model

from netship.compile.ir.pointwise import FUNCTIONS

pytestmark = pytest.mark.slow


def together() -> onnx.ModelProto:
    """A network with an output for each row, all of one image, and one that ends in a Softmax."""
    rows = [model(network) for networks in NETWORKS.values() for network in networks]
    w = Writer(3, 8)
    w.classifier(w.convolution("stem", "image", 3, 8), 8, 5)
    w.node("Softmax", "probabilities", ["scores"], axis=1)
    rows.append(finished(w))
    whole = rows[0]
    del whole.graph.value_info[:]
    for index, row in enumerate(rows[1:]):
        named = compose.add_prefix(row, f"{index}/", rename_inputs=False)
        for node in named.graph.node:
            node.input[:] = [
                "image" if each.endswith("/image") else each for each in node.input
            ]
        whole.graph.node.extend(named.graph.node)
        whole.graph.initializer.extend(named.graph.initializer)
        whole.graph.output.extend(named.graph.output)
    return onnx.shape_inference.infer_shapes(whole, strict_mode=True)


@pytest.mark.parametrize(
    "target, numbers",
    [
        ("native", "float32"),
        ("native", "uint8"),
        ("arm-cortex-a72", "int8"),
        ("arm-cortex-a76", "int8"),
        ("cortex-m4", "int8"),
        ("cortex-m7", "float32"),
    ],
)
def test_every_operator_answers_as_onnx_runtime(
    target: str, numbers: str, tmp_path: Path
) -> None:
    proto = together()
    if numbers != "float32":
        proto = quantised(proto, tmp_path, unsigned=numbers == "uint8")
    checked = built(proto, target, tmp_path)["verification"]
    # Of what computes in float32 among integers the last is rounded to a step.
    assert checked["relative_error"] < 1e-5 or numbers != "float32"
    where = "emulated" if target.startswith("arm") else "measured on host"
    assert checked["origin"] == where


@pytest.mark.parametrize("numbers", ["float32", "int8"])
def test_every_function_in_c_answers_as_onnx_runtime(
    numbers: str, tmp_path: Path
) -> None:
    w = Writer(3, 8)
    sums = w.convolution("stem", "image", 3, 4, 3, 1, SAME)
    for kind in FUNCTIONS:
        x = w.convolution(f"{kind}.source", "image", 3, 4, 1, clip=False)
        sums = w.node("Add", f"{kind}.sum", [sums, function(kind)(w, x)])
    proto = finished(w)
    if numbers == "int8":
        proto = quantised(proto, tmp_path)
    checked = built(proto, "cortex-m7", tmp_path)["verification"]
    assert checked["relative_error"] < (1e-6 if numbers == "float32" else 1e-9)


@pytest.mark.parametrize("numbers", ["float32", "int8"])
def test_several_images_and_orders_of_axes_in_c(numbers: str, tmp_path: Path) -> None:
    """Convolutions and means of four images inside, and outputs that have another order of axes than what they are of."""
    proto = onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["": 17]>
        images (float[1, 4, 8, 8] image) => (float[1, 12] means, float[1, 4, 8, 2] best, int64[1, 4, 8, 2] places) {
          apart = Transpose<perm = [1, 0, 2, 3]>(image)
          sums = Conv<pads = [1, 1, 1, 1]>(apart, weights)
          pooled = GlobalAveragePool(sums)
          all = Reshape(pooled, flat)
          means = Tanh(all)
          scaled = Conv(image, mixing)
          best, places = TopK<axis = 3>(scaled, two)
        }"""
    )
    random = np.random.default_rng(0)
    weights = random.standard_normal((3, 1, 3, 3)).astype(np.float32)
    mixing = random.standard_normal((4, 4, 1, 1)).astype(np.float32)
    proto.graph.initializer.extend(
        [
            numpy_helper.from_array(weights, "weights"),
            numpy_helper.from_array(mixing, "mixing"),
            numpy_helper.from_array(np.array([1, 12]), "flat"),
            numpy_helper.from_array(np.array([2]), "two"),
        ]
    )
    if numbers == "int8":
        proto = quantised(proto, tmp_path)
    built(proto, "cortex-m7", tmp_path)


@pytest.mark.parametrize("target", ["native", "cortex-m7"])
def test_recurrence_norms_and_best_in_int8(target: str, tmp_path: Path) -> None:
    """What has biases of one number for all outputs, two outputs, or norms."""
    proto = onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["": 17]>
        rows (float[1, 3, 8, 8] image) => (float[1, 4, 8, 4] unit, float[1, 4, 8, 2] best, int64[1, 4, 8, 2] places,
                                           float[1, 1, 4, 5] states) {
          mixed = Conv<strides = [1, 2]>(image, mixing)
          unit = LpNormalization<axis = 1>(mixed)
          best, places = TopK<axis = 3>(mixed, two)
          rows = ReduceMean<axes = [2], keepdims = 0>(mixed)
          steps = Transpose<perm = [2, 0, 1]>(rows)
          each = GRU<hidden_size = 5, direction = "reverse", linear_before_reset = 1>(steps, weights, again, biases)
          states = Transpose<perm = [2, 1, 0, 3]>(each)
        }"""
    )
    random = np.random.default_rng(0)
    shapes = {"mixing": (4, 3, 1, 1), "weights": (1, 15, 4), "again": (1, 15, 5)}
    shapes["biases"] = (1, 30)
    proto.graph.initializer.extend(
        numpy_helper.from_array(random.standard_normal(shape).astype(np.float32), name)
        for name, shape in shapes.items()
    )
    proto.graph.initializer.append(numpy_helper.from_array(np.array([2]), "two"))
    built(quantised(proto, tmp_path), target, tmp_path)


def built(proto: onnx.ModelProto, target: str, folder: Path) -> dict[str, Any]:
    """What a build that must succeed says of itself."""
    onnx.save(proto, folder / "all.onnx")
    options = ("--model", folder / "all.onnx", "--target", target, "--json")
    said: dict[str, Any] = json.loads(
        succeed("compile.build", *options, "--output", folder / "built")
    )
    return said
