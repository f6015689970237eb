"""Models broken at random: taken, or refused in one line, by a process with limits of its own."""

from __future__ import annotations

from pathlib import Path

import mutate_models
import numpy as np
import onnx
import pytest
from gated import node, refused, small

from netship.compile import passes
from netship.compile.frontend import gate
from netship.targets.errors import UserError


@pytest.mark.slow
def test_broken_models_end_in_one_line(tmp_path: Path) -> None:
    found = mutate_models.campaign(7, 1500, [], tmp_path)
    assert not found.faults
    assert found.counts["refused"] > 1000 and found.counts["accepted"] > 50


def test_a_mutation_is_known_by_its_seed_and_number() -> None:
    models = mutate_models.small_models()
    made = [mutate_models.mutated(models, 3, number) for number in range(200)]
    assert made == [mutate_models.mutated(models, 3, number) for number in range(200)]
    assert len({data for _, data in made}) > 150


def _written(path: Path, model: onnx.ModelProto) -> Path:
    path.write_bytes(model.SerializeToString())
    return path


def test_a_name_that_is_too_long_for_a_file(tmp_path: Path) -> None:
    model = small()
    weights = model.graph.initializer[0]
    weights.data_location = onnx.TensorProto.EXTERNAL
    weights.external_data.add(key="location", value="ü" * 300)
    refused(_written(tmp_path / "m.onnx", model), "external data .* cannot be read")


def test_bytes_that_do_not_fill_their_shape(tmp_path: Path) -> None:
    model = small([node("Add", ["x", "w"], ["y"])], {"w": [[1.0, 2.0]]})
    model.graph.initializer[0].data_type = onnx.TensorProto.FLOAT
    model.graph.initializer[0].raw_data = bytes(8)
    del model.graph.initializer[0].dims[:]
    refused(_written(tmp_path / "m.onnx", model), "'w': their bytes do not fill")


@pytest.mark.parametrize(
    ("pads", "step", "words"),
    [
        ([0, -(1 << 62), 0, 0, 0, 0, 0, 0], 1, "'pad' .*negative size"),
        ([0, -3, 0, 0, 0, 0, 0, 0], -1, "'slice' .*backwards through an empty axis"),
    ],
)
def test_axes_that_would_end_onnx_s_inference(
    tmp_path: Path, pads: list[int], step: int, words: str
) -> None:
    """An assertion of its C++ on the Slice behind, which no process survives."""
    nodes = [
        node("Pad", ["x", "pads"], ["a"], "pad"),
        node("Slice", ["a", "zero", "end", "axis", "step"], ["y"], "slice"),
    ]
    numbers = {"pads": pads, "zero": [0], "end": [2], "axis": [1], "step": [step]}
    arrays = {name: np.array(value, np.int64) for name, value in numbers.items()}
    refused(_written(tmp_path / "m.onnx", small(nodes, arrays)), words)


def test_an_auto_pad_that_onnx_does_not_have(tmp_path: Path) -> None:
    model = small()
    pads = onnx.helper.make_attribute("auto_pad", "NOTRET")
    model.graph.node[0].attribute.append(pads)
    refused(_written(tmp_path / "m.onnx", model), "'stem' .*auto_pad 'NOTRET'")


@pytest.mark.parametrize(
    ("nodes", "constants", "words"),
    [
        (
            [node("Clip", ["x", "w"], ["y"])],
            {"w": [1.0, 2.0]},
            r"'n' \(Clip\): its inputs or attributes are not what ONNX defines",
        ),
        (
            [
                node("Reshape", ["x", "s"], ["a"]),
                node("Resize", ["a", "", "t"], ["y"], "big"),
            ],
            {"s": [1, 1, 1, 72], "t": [1.0, 1, 1, 1e5]},
            "'big' .*an axis from 72 to 7200000, too large",
        ),
    ],
)
def test_operands_that_only_a_rule_reads(
    tmp_path: Path,
    nodes: list[onnx.NodeProto],
    constants: dict[str, object],
    words: str,
) -> None:
    arrays = {
        name: np.array(value, np.float32 if name != "s" else np.int64)
        for name, value in constants.items()
    }
    model = gate.load(_written(tmp_path / "m.onnx", small(nodes, arrays)))
    with pytest.raises(UserError, match=words):
        passes.read(model.proto, (), passes.no_dump)
