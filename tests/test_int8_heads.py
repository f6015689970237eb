"""Heads that int8 leaves in float32, because boxes and scores in one tensor would lose the scores."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from conftest import run, shared
from integers import SAME, patterns
from integers import Graph as Writer
from numpy.typing import NDArray
from onnx import helper, numpy_helper
from test_quantise import IDENTITY, given, write_images

from netship.bundle import boxes
from netship.bundle.detections import Detections
from netship.bundle.golden import read_golden
from netship.bundle.store import Bundle, open_bundle
from netship.bundle.task import Task
from netship.compile.frontend import gate, sources
from netship.compile.frontend.decoding import assemble
from netship.compile.frontend.detectors import resolve_task
from netship.compile.frontend.model import Model
from netship.compile.frontend.preprocessing import Overrides, resolve_preprocessing
from netship.compile.frontend.reference import Reference
from netship.compile.ir import evaluate
from netship.compile.ir.operators import islands
from netship.compile.quantize import agreement, heads
from netship.compile.quantize.prepare import prepare
from netship.devices.microcontroller.host import run_on_host
from netship.devices.microcontroller.session import from_outputs, interface_of, to_input
from netship.devices.sessions.opening import open_here
from netship.targets.errors import UserError
from netship.targets.progress import Progress

SIDE, BINS, CLASSES = 64, 8, 3
GRIDS = (8, 4)
PLACES = sum(n * n for n in GRIDS)


class Net(Writer):
    def floats(self, name: str, values: object) -> str:
        return self.constant(name, np.asarray(values, np.float32))

    def sizes(self, name: str, *values: int) -> str:
        return self.constant(name, np.array(values, np.int64))

    def reshaped(self, name: str, source: str, *shape: int) -> str:
        return self.node("Reshape", name, [source, self.sizes(f"{name}.to", *shape)])

    def backbone(self) -> list[str]:
        x = self.convolution("stem", "image", 3, 8, 3, 2, SAME)
        x = self.convolution("second", x, 8, 16, 3, 2, SAME)
        fine = self.convolution("fine", x, 16, 16, 3, 2, SAME)
        return [fine, self.convolution("coarse", fine, 16, 16, 3, 2, SAME)]

    def yolo(self, levels: list[str]) -> str:
        """[1, 4 + classes, places]: centre and size in pixels, and scores."""
        parts: dict[str, list[str]] = {"boxes": [], "scores": []}
        for level, side in zip(levels, GRIDS, strict=True):
            for kind, count in (("boxes", 4 * BINS), ("scores", CLASSES)):
                made = self.convolution(
                    f"grid{side}.{kind}", level, 16, count, clip=False
                )
                parts[kind].append(
                    self.reshaped(f"{made}.rows", made, 1, count, side * side)
                )
        x, scores = (
            self.node("Concat", kind, made, axis=2) for kind, made in parts.items()
        )
        x = self.reshaped("binned", x, 1, 4, BINS, PLACES)
        x = self.node("Transpose", "bins.first", [x], perm=[0, 2, 1, 3])
        x = self.node("Softmax", "distribution", [x], axis=1)
        weights = self.floats("bins", np.arange(BINS).reshape(1, BINS, 1, 1))
        x = self.node("Conv", "dfl", [x, weights])
        x = self.reshaped("distances", x, 1, 4, PLACES)
        axis = self.sizes("axis", 1)
        ends = [self.sizes(f"at{n}", n) for n in (0, 2, 4)]
        left, right = (
            self.node("Slice", name, [x, *pair, axis])
            for name, pair in (("left", ends[:2]), ("right", ends[1:]))
        )
        cells = [np.indices((n, n))[::-1].reshape(1, 2, -1) + 0.5 for n in GRIDS]
        middle = self.floats("middle", np.concatenate(cells, axis=2))
        low = self.node("Sub", "low", [middle, left])
        high = self.node("Add", "high", [middle, right])
        extent = self.node("Sub", "extent", [high, low])
        both = self.node("Add", "both", [low, high])
        centre = self.node("Mul", "centre", [both, self.floats("half", 0.5)])
        x = self.node("Concat", "in.cells", [centre, extent], axis=1)
        strides = np.concatenate([np.full(n * n, SIDE / n) for n in GRIDS])
        x = self.node("Mul", "in.pixels", [x, self.floats("strides", strides)])
        shares = self.node("Sigmoid", "shares", [scores])
        return self.node("Concat", "yolo", [x, shares], axis=1)

    def ssd(self, level: str) -> str:
        """[1, 2 · 64, 4 + classes]: corners in pixels, and scores, of two anchors a cell."""
        found = []
        for kind, count in (("offsets", 4), ("chances", CLASSES)):
            x = self.convolution(kind, level, 16, 2 * count, clip=False)
            x = self.node("Transpose", f"{kind}.last", [x], perm=[0, 2, 3, 1])
            found.append(self.reshaped(f"{kind}.rows", x, 1, 128, count))
        shares = self.node("Softmax", "chances.shares", [found[1]], axis=2)
        y, x = np.repeat(np.indices((8, 8)).reshape(2, -1) * 8 + 4, 2, axis=1)
        sizes = np.tile([12, 24], 64)
        corners = np.stack([x - sizes, y - sizes, x + sizes, y + sizes], axis=1)
        moved = self.node("Mul", "moved", [found[0], self.floats("variance", [2.0])])
        where = self.node("Add", "corners", [moved, self.floats("anchors", corners)])
        return self.node("Concat", "ssd", [where, shares], axis=2)


def detector(*outputs: str) -> onnx.ModelProto:
    net = Net(3, SIDE)
    levels = net.backbone()
    shapes = {"yolo": (1, 4 + CLASSES, PLACES), "ssd": (1, 128, 4 + CLASSES)}
    for name in outputs:
        net.yolo(levels) if name == "yolo" else net.ssd(levels[0])
    proto = net.finish(shapes[outputs[-1]])
    for name in outputs[:-1]:
        proto.graph.output.insert(
            0, helper.make_tensor_value_info(name, 1, shapes[name])
        )
    return proto


def rows(outputs: list[NDArray[np.float32]]) -> list[Detections]:
    """Every row of both outputs as it is, without suppression."""
    found = []
    for values, centred in zip(
        (outputs[0][0].T, outputs[1][0]), (True, False), strict=True
    ):
        place = values[:, :4]
        if centred:
            half = place[:, 2:] / 2
            place = np.concatenate([place[:, :2] - half, place[:, :2] + half], axis=1)
        scores = values[:, 4:]
        points = np.zeros((len(scores), 0, 2), np.float32)
        classes = scores.argmax(axis=1).astype(np.int32)
        found.append(Detections(place, scores.max(axis=1), classes, points))
    return found


def assert_same_boxes(
    ours: list[NDArray[np.float32]], exact: list[NDArray[np.float32]]
) -> None:
    for int8, float32 in zip(rows(ours), rows(exact), strict=True):
        for place in range(len(float32.scores)):
            here = slice(place, place + 1)
            one, other = (
                Detections(x.boxes[here], x.scores[here], int8.classes[here], x.points)
                for x in (int8, float32)
            )
            found = boxes.match(one, other)
            assert found.same and found.ious.min() >= 0.8
        assert float32.scores.max() > 0.6
    for a, b in zip(ours, exact, strict=True):
        sides = (
            (slice(None), slice(4, None)) if a.shape[1] < 8 else (..., slice(4, None))
        )
        assert np.abs(a[sides] - b[sides]).max() <= 0.1


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    write_images(folder)
    return folder


def checked(proto: onnx.ModelProto) -> Model:
    return gate.check(proto, IDENTITY)


def test_boxes_and_scores_in_one_tensor_keep_their_head_in_float32(
    images: Path,
) -> None:
    proto = detector("yolo", "ssd")
    int8 = given(proto, True, (images,), trained=False, keep_float=["grid8.scores"])
    names = {each.label for each in islands(int8.graph)}
    assert {"dfl", "in.pixels", "yolo", "corners", "ssd", "grid8.scores"} <= names
    assert not {"stem", "second", "grid4.scores", "offsets", "fine"} & names
    reference = Reference(checked(proto))
    for image in patterns(proto, 2):
        values = evaluate.evaluate(int8.graph, {"image": image})
        ours = [values[each.name] for each in int8.graph.outputs]
        assert_same_boxes(ours, reference.run(image))
    with pytest.raises(UserError, match="--strict-int8: small.onnx .*float32 in "):
        given(proto, True, (images,), trained=False, strict=True)


def test_without_it_the_scores_are_lost(
    images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(heads, "find", lambda *_: [])
    proto = detector("ssd")
    int8 = given(proto, True, (images,), trained=False)
    (image,) = patterns(proto, 1)
    (ours,) = (
        evaluate.evaluate(int8.graph, {"image": image})[x.name]
        for x in int8.graph.outputs
    )
    (exact,) = Reference(checked(proto)).run(image)
    assert np.abs(ours[..., 4:] - exact[..., 4:]).max() > 0.1


@pytest.mark.parametrize("target", ["native", "cortex-m7"])
def test_builds_find_the_boxes_of_float32(
    target: str, images: Path, tmp_path: Path
) -> None:
    proto = detector("yolo", "ssd")
    onnx.save(proto, tmp_path / "model.onnx")
    words = ("--model", tmp_path / "model.onnx", "--target", target, "--name", "net")
    more = ("--quantize", "int8", "--calibration", images, "--accept-loss")
    made = run("compile.build", *words, *more, "--output", tmp_path / "bundle")
    assert made.returncode == 0, made.stderr
    for output in ("yolo", "ssd"):
        said = f"stays in float32: node '{output}' (Concat) joins "
        assert said in made.stderr
    bundle = open_bundle(tmp_path / "bundle")
    inputs = [each.inputs for each in read_golden(bundle)]
    reference = Reference(checked(proto))
    for given_inputs, ours in zip(inputs, answers(bundle, inputs), strict=True):
        assert_same_boxes(ours, reference.run(*given_inputs))


def answers(bundle: Bundle, inputs: list[Any]) -> list[Any]:
    if bundle.manifest.format == "c":
        interface = interface_of(bundle)
        given_inputs = [to_input(each, bundle) for each in inputs]
        made = run_on_host(bundle.path, "net", interface, given_inputs)
        return [from_outputs(each, bundle) for each in made]
    with open_here(bundle) as session:
        return [session.run(*each) for each in inputs]


def columns(scale: float, kind: str) -> onnx.ModelProto:
    """[1, 7, 64]: what one convolution makes, or a product with a factor for each column."""
    net = Net(3, 32)
    x = net.convolution("stem", "image", 3, 8, 3, 2, SAME)
    x = net.convolution("body", x, 8, 8, 3, 2, SAME)
    x = net.convolution("last", x, 8, 7, clip=False)
    factors = np.array([scale] * 4 + [0.2] * 3, np.float32)
    if kind == "Conv":
        for weights in net.weights[-2:]:
            values = numpy_helper.to_array(weights)
            values = values * factors.reshape(-1, *[1] * (values.ndim - 1))
            weights.CopyFrom(numpy_helper.from_array(values, weights.name))
        net.reshaped("columns", x, 1, 7, 64)
    else:
        x = net.reshaped("rows", x, 1, 7, 64)
        factor = net.floats("factor", factors.reshape(1, 7, 1))
        net.node("Mul", "columns", [x, factor])
    return net.finish((1, 7, 64))


def found(proto: onnx.ModelProto, task: Task | None = None) -> list[heads.Head]:
    return heads.find(proto, checked(proto), [[x] for x in patterns(proto, 4)], task)


@pytest.mark.parametrize("kind", ["Conv", "Mul"])
def test_columns_of_other_ranges_are_seen(kind: str) -> None:
    (head,) = found(columns(100, kind))
    nodes = {"Conv": ("last", "columns"), "Mul": ("rows", "columns")}
    assert head.nodes == nodes[kind]
    assert re.search(r"joins columns of range \d+ and of range \d\.\d+$", head.reason)
    assert found(columns(0.5, kind)) == []


def test_parts_of_a_known_decoding_are_compared() -> None:
    """Boxes in shares of the picture would not show by themselves."""
    proto = columns(0.01, "Mul")
    model = checked(proto)
    facts = {"box": "centre", "boxes": "columns", "scores": "columns"}
    detector = assemble("mine", facts, model.outputs, (32, 32))
    (head,) = found(proto, Task(kind="detect", detector=detector))
    assert "scores of range" in head.reason and "boxes of range" in head.reason
    assert found(columns(100, "Mul"), Task(kind="raw")) == []


def test_a_detector_is_judged_by_its_boxes() -> None:
    proto = columns(100, "Mul")
    model = checked(proto)
    facts = {"box": "corners", "boxes": "columns", "scores": "columns"}
    detector = assemble("mine", facts, model.outputs, (32, 32))
    task = Task(kind="detect", detector=detector)
    exact = np.zeros((1, 7, 64), np.float32)
    exact[0, :, 3], exact[0, :, 7] = (1, 1, 21, 21, 0.9, 0, 0), (5, 0, 9, 9, 0, 0.55, 0)
    # A cosine tells nothing of a box below which others are.
    ours = exact.copy()
    ours[0, 5, 7] = 0.47
    noise = exact.copy()
    noise[0, :4, 20:] = 30

    def judged(values: NDArray[np.float32]) -> agreement.Agreement:
        return agreement.agreement(model, [[values]], [[exact]], task)

    near = judged(ours)
    assert near.boxes and (near.boxes.judged, near.boxes.wrong) == (3, 0)
    assert near.enough and near.boxes.matched.missing == 1
    assert judged(noise).enough and judged(noise).cosine < 0.5
    for place, value in (((0, 5, 7), 0.44), ((0, 2, 3), 15), ((0, 4, 3), 0.75)):
        wrong = exact.copy()
        wrong[place] = value
        assert not judged(wrong).enough
        assert judged(wrong).cosine > 0.9
        assert "of 4 boxes" in judged(wrong).text(1) or place == (0, 5, 7)
    # Where no box is found, the cosine decides.
    nothing = agreement.agreement(model, [[noise * 0.1]], [[exact * 0.1]], task)
    assert nothing.boxes and not nothing.boxes.judged and not nothing.enough


def test_yunet_is_accepted_by_its_faces() -> None:
    """Noise in scores near 0 lowers a cosine below its limit, and moves no face."""
    source = sources.find(
        str(shared("detect/yunet_n_320.onnx")), {}, None, lambda stage: None
    )
    overrides = Overrides(task="detect", decode="yunet")
    preprocessing, _ = resolve_preprocessing(overrides, None, source.model.inputs)
    task, _ = resolve_task("detect", "yunet", source.model)
    int8 = prepare(
        source.model,
        True,
        (shared("photos"),),
        preprocessing,
        unsigned=True,
        trained=True,
        progress=Progress(quiet=True),
        task=task,
    )
    assert int8 and int8.measured["cosine"] < 0.99
    faces = int8.measured["boxes"]
    assert faces["judged"] >= 4 and not faces["wrong"]
    assert faces["least_iou"] > 0.8 and faces["max_score_difference"] < 0.1
