"""Classes that tie: any of them is accepted where rounding decides, and only there."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from conftest import run, succeed
from gated import IDENTITY
from integers import SAME, graph_of, patterns, quantised
from integers import Graph as Writer
from test_quantise import write_images

from netship.bundle.accuracy import compare
from netship.bundle.golden import read_golden
from netship.bundle.store import open_bundle
from netship.compile.frontend import gate
from netship.compile.frontend.reference import Reference
from netship.compile.frontend.tolerance import index_tolerance
from netship.compile.ir import evaluate
from netship.compile.ir.graph import Operator
from netship.compile.quantize import answer


def test_an_index_is_open_where_rounding_decides() -> None:
    exact = np.array([[3, 5, 5, 1], [2, 9, 4, 4]], np.float32)
    best = exact.argmax(axis=1)

    def by(noise: Any) -> list[Any]:
        off = np.array(noise, np.float32)
        found = index_tolerance(best, exact - off, exact + off, 1)
        return list(found.tolist())

    # Equal values that nothing moves: the first one, on every machine.
    assert by([[0, 0, 0, 0], [0, 0, 0, 0]]) == [0, 0]
    assert by([[0, 0, 1, 0], [1, 1, 1, 1]]) == [1, 0]
    assert by([[0, 1, 0, 0], [0, 3, 0, 2]]) == [1, 2]
    assert by([[3, 0, 0, 4], [0, 0, 0, 0]]) == [2, 0]
    least = np.array([[3], [0]])
    for noise, open_to in ((0.5, [[0], [0]]), (1, [[3], [3]])):
        ends = exact - np.float32(noise), exact + np.float32(noise)
        assert index_tolerance(least, *ends, 1, False).tolist() == open_to


def test_the_places_of_the_best_are_open_where_these_tie() -> None:
    scores = np.array([[7.0, 6.9, 1, 4, 3.95]], np.float32)
    off = np.float32(0.06)
    best = np.array([[0, 1, 3]])
    found = index_tolerance(best, scores - off, scores + off, -1)
    assert found.tolist() == [[1, 1, 1]]
    off = np.float32(0.03)
    assert index_tolerance(best, scores - off, scores + off, -1).tolist() == [[0, 0, 1]]


def mapped(ties: bool) -> onnx.ModelProto:
    """A map of classes [1, 33, 33], resized from 8×8 scores; where ``ties``, classes 1 and 2 are nearly one."""
    net = Writer(3, 16)
    x = net.convolution("stem", "image", 3, 8, 3, 2, SAME)
    x = net.convolution("scores", x, 8, 3, clip=False)
    if ties:
        for tensor in net.weights[-2:]:
            values = onnx.numpy_helper.to_array(tensor).copy()
            values[2] = values[1] * np.float32(1 + 2**-22)
            tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))
    sizes = net.constant("sizes", np.array([1, 3, 33, 33], np.int64))
    x = net.node("Resize", "resized", [x, "", "", sizes], mode="linear")
    net.node("ArgMax", "classes", [x], axis=1, keepdims=0)
    proto = net.finish((1, 33, 33))
    proto.graph.output[0].type.tensor_type.elem_type = onnx.TensorProto.INT64
    return proto


def test_near_ties_in_float32_are_open_and_nothing_else_is() -> None:
    proto = mapped(ties=True)
    check = Reference(gate.check(proto, IDENTITY)).check(*patterns(proto, 1))
    (classes,), (near,) = check.outputs, check.tolerances
    tied = classes > 0
    assert 0.05 < tied.mean() < 0.95
    assert (near[tied] >= 1).mean() > 0.98 and (near[~tied] == 0).mean() > 0.98
    swapped = np.where(tied, 3 - classes, classes)
    assert compare([swapped], check.outputs, check.tolerances).excess is not None
    wrong = np.where(tied, 0, classes)
    assert not compare([wrong], check.outputs, check.tolerances).passed


def test_indices_of_an_input_are_the_references() -> None:
    net = Writer(3, 8)
    net.node("ArgMax", "classes", ["image"], axis=1, keepdims=0)
    proto = net.finish((1, 8, 8))
    proto.graph.output[0].type.tensor_type.elem_type = onnx.TensorProto.INT64
    check = Reference(gate.check(proto, IDENTITY)).check(*patterns(proto, 1))
    assert (check.tolerances[0] == 0).mean() > 0.9


@pytest.fixture(scope="module")
def integers(tmp_path_factory: pytest.TempPathFactory) -> onnx.ModelProto:
    folder = tmp_path_factory.mktemp("qdq")
    return quantised(mapped(ties=False), folder, unsigned=True)


def test_rounding_between_integers_opens_few_classes(
    integers: onnx.ModelProto, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The resized scores are rounded to integers again; another CPU may round halves of a step otherwise."""
    graph, model = graph_of(integers), gate.check(integers, IDENTITY)
    (image,) = patterns(integers, 1)
    check = answer.check(graph, model, Reference(model), image)
    (classes,), (near,) = check.outputs, check.tolerances
    assert 0 < (near > 0).mean() < 0.02 and (near < 3).all()
    apply = evaluate.apply
    for direction in (1, -1):

        def moved(operator: Operator, *rest: Any, sign: int = direction) -> Any:
            made = apply(operator, *rest)
            if operator.kind == "MatMul":
                made = {k: x + np.float32(sign * 1e-6) for k, x in made.items()}
            return made

        monkeypatch.setattr(evaluate, "apply", moved)
        values = evaluate.evaluate(graph, {"image": image})
        (ours,) = (values[each.name] for each in graph.outputs)
        assert compare([ours], check.outputs, check.tolerances).passed
    wrong = classes.copy()
    wrong[np.unravel_index(near.argmin(), near.shape)] += 1
    assert not compare([wrong], check.outputs, check.tolerances).passed


def test_a_build_counts_ties_and_check_accepts_them(
    integers: onnx.ModelProto, tmp_path: Path
) -> None:
    onnx.save(integers, tmp_path / "m.onnx")
    words = ("--model", tmp_path / "m.onnx", "--task", "segment", "--fit", "stretch")
    made = run("compile.build", *words, "--output", tmp_path / "built")
    assert made.returncode == 0, made.stderr
    (golden,) = re.findall(r"'classes' has (\d+) of 2,178 elements", made.stderr)
    bundle = open_bundle(tmp_path / "built")
    near = [each.tolerances[0] for each in read_golden(bundle)]
    assert 0 < int(golden) == sum(int((x > 0).sum()) for x in near)
    write_images(tmp_path)
    images = ("--images", tmp_path / "1.png", "--repeat", "1")
    table = succeed("runtime_demo.check", tmp_path / "built", *words[:2], *images)
    assert "PASSED" in table and "steps" not in table


def test_golden_data_in_which_many_classes_tie_is_refused(tmp_path: Path) -> None:
    onnx.save(mapped(ties=True), tmp_path / "m.onnx")
    made = run(
        "compile.build", "--model", tmp_path / "m.onnx", "--output", tmp_path / "b"
    )
    assert made.returncode == 2
    assert re.search(
        r"'classes' has [\d,]+ of 2,178 .*at most 5%.*--golden", made.stderr
    )
    assert not (tmp_path / "b").exists()
