"""What ``--task`` and ``--decode`` make of a network's outputs: presets, a TOML file, and refusals."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from conftest import shared

from netship.bundle import photos
from netship.bundle.decode import decode
from netship.bundle.detections import on_photograph
from netship.bundle.manifest import ModelIdentity, Tensor
from netship.bundle.task import Detector, Task
from netship.compile.frontend import dense, sources
from netship.compile.frontend.detectors import resolve_task
from netship.compile.frontend.model import Model
from netship.compile.frontend.preprocessing import (
    Overrides,
    read_labels,
    resolve_preprocessing,
)
from netship.compile.frontend.reference import Reference
from netship.targets.errors import UserError

SIDE = 64
HEADS = {8: 64, 16: 16, 32: 4}
FACES = [
    *((f"cls_{s}", (1, n, 1)) for s, n in HEADS.items()),
    *((f"obj_{s}", (1, n, 1)) for s, n in HEADS.items()),
    *((f"bbox_{s}", (1, n, 4)) for s, n in HEADS.items()),
    *((f"kps_{s}", (1, n, 10)) for s, n in HEADS.items()),
]
LISTED = [("scores", (1, 30, 2)), ("boxes", (1, 30, 4))]


def network(*outputs: tuple[str, tuple[int, ...]], side: int = SIDE) -> Model:
    """A model of which nothing but its ports is looked at."""
    return Model(
        proto=onnx.ModelProto(),
        identity=ModelIdentity(name="m", sha256="0" * 64),
        inputs=(Tensor(name="x", shape=(1, 3, side, side), layout="NCHW"),),
        outputs=tuple(Tensor(name=name, shape=shape) for name, shape in outputs),
        probabilities=False,
    )


def found(model: Model, how: str) -> Detector:
    task, note = resolve_task("detect", how, model)
    assert task and task.detector
    assert note.startswith("task: detect")
    return task.detector


def grid(stride: int, *channels: int) -> tuple[int, ...]:
    return 1, *channels, SIDE // stride, SIDE // stride


YOLO: dict[str, tuple[list[tuple[str, tuple[int, ...]]], tuple[str, int, int]]] = {
    "v8": ([("o", (1, 14, 84))], ("centre", 84, 10)),
    "v8, rows first": ([("o", (1, 84, 14))], ("centre", 84, 10)),
    "v5": ([("o", (1, 252, 15))], ("centre", 252, 10)),
    "v8 heads": ([(f"o{s}", grid(s, 74)) for s in HEADS], ("dfl", 84, 10)),
    "v5 heads": (
        [(f"o{s}", (1, 3, *grid(s)[1:], 15)) for s in HEADS],
        ("yolov5", 252, 10),
    ),
    "two heads": (
        [(f"{k}{s}", grid(s, c)) for s in HEADS for k, c in (("c", 10), ("b", 4))],
        ("distances", 84, 10),
    ),
}


@pytest.mark.parametrize("kind", YOLO)
def test_yolo_is_found_by_its_shapes(kind: str) -> None:
    outputs, expected = YOLO[kind]
    detector = found(network(*outputs), "yolo")
    assert (detector.box, detector.rows, detector.classes) == expected
    assert (detector.levels[0].objectness is not None) == kind.startswith("v5")


def test_a_yolo_head_gives_the_box_that_was_put_into_it() -> None:
    """[1, 4 + 10, 84], centre and size in pixels, as YOLOv8 exports it; and [1, 252, 15] as YOLOv5."""
    eight = np.zeros((1, 14, 84), np.float32)
    eight[0, :4, 7], eight[0, 4 + 3, 7] = (20, 30, 8, 4), 0.9
    five = np.zeros((1, 252, 15), np.float32)
    five[0, 7, :5], five[0, 7, 5 + 3] = (20, 30, 8, 4, 0.5), 0.8
    for array, score in ((eight, 0.9), (five, 0.4)):
        model = network(("o", array.shape))
        task, _ = resolve_task(None, "yolo", model)
        assert task
        boxes = decode(task, [array], (SIDE, SIDE))
        assert boxes.boxes.tolist() == [[16, 28, 24, 32]]
        assert boxes.classes.tolist() == [3]
        assert boxes.scores[0] == pytest.approx(score)


def test_yunet_takes_its_heads_by_shape_and_name() -> None:
    task, note = resolve_task("detect", "yunet", network(*FACES[::-1]))
    assert "objectness in obj_8, obj_16, obj_32; points in kps_8" in note
    assert task
    arrays = [np.zeros(shape, np.float32) for _, shape in FACES[::-1]]
    by_name = dict(zip([name for name, _ in FACES[::-1]], arrays, strict=True))
    by_name["cls_16"][0, 6], by_name["obj_16"][0, 6] = 0.81, 1
    by_name["bbox_16"][0, 6] = 0.5, 0.25, np.log(2), 0
    by_name["kps_16"][0, 6, 2:4] = 1, 2
    face = decode(task, arrays, (SIDE, SIDE))
    # Cell 6 of the 4×4 grid: column 2, line 1.
    assert face.boxes[0] == pytest.approx([40 - 16, 20 - 8, 40 + 16, 20 + 8])
    assert face.scores[0] == pytest.approx(0.9)
    assert face.points[0, :2].tolist() == [[32, 16], [48, 48]]


@pytest.mark.parametrize(
    ("rows", "transposed", "activation"),
    [(2034, True, "sigmoid"), (3234, False, "softmax")],
)
def test_ssd_knows_its_anchors_by_their_number(
    rows: int, transposed: bool, activation: str
) -> None:
    model = network(("b", (1, rows, 4)), ("s", (1, rows, 91)), side=320)
    detector = found(model, "ssd")
    assert (detector.rows, detector.transposed) == (rows, transposed)
    assert (detector.activation, detector.background) == (activation, 0)
    assert [level.columns for level in detector.levels] == [20, 10, 5, 3, 2, 1]
    assert detector.variances == (0.1, 0.2)
    large = network(("b", (1, 8732, 4)), ("s", (1, 8732, 21)), side=300)
    assert found(large, "ssd").levels[4].stride == (100, 100)


def test_a_score_that_the_graph_activates_is_not_activated_again() -> None:
    model = network(("b", (1, 2034, 4)), ("s", (1, 2034, 91)), side=320)
    nodes = [("Softmax", "a", "p"), ("Reshape", "p", "s")]
    graph = onnx.GraphProto(
        node=[onnx.helper.make_node(op, [x], [y]) for op, x, y in nodes]
    )
    model.proto.graph.CopyFrom(graph)
    assert found(model, "ssd").activation == "none"


LIST = 'box = "corners"\nboxes = "boxes"\nscores = "scores"\n'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("background = 0", "background: 0 is the only class, so nothing would be found"),
        ('activation = "softmax"', "activation: softmax of one class is always 1"),
    ],
)  # fmt: skip
def test_of_one_class_a_decoder_can_find_something(
    tmp_path: Path, text: str, message: str
) -> None:
    file = tmp_path / "mine.toml"
    file.write_text(LIST + text)
    one = network(("scores", (1, 30, 1)), ("boxes", (1, 30, 4)))
    with pytest.raises(UserError, match=message):
        resolve_task("detect", str(file), one)


def test_a_file_states_a_decoder_or_changes_a_preset(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text('preset = "yunet"\nscore_threshold = 0.9\nmost = 5\n')
    changed = found(network(*FACES), str(file))
    assert (changed.decoder, changed.most, changed.score_threshold) == (
        "mine.toml",
        5,
        0.9,
    )
    assert changed.product == "root"
    file.write_text(
        'box = "offsets"\nboxes = ["b8", "b16"]\nscores = "all"\nstrides = [8, 16]\n'
        "anchors = [[[8, 8], [9, 5]], [[20, 20]]]\n"
    )
    model = network(("b8", grid(8, 8)), ("b16", (1, 4, 4, 4)), ("all", (1, 144, 3)))
    stated = found(model, str(file))
    assert (stated.rows, stated.classes) == (144, 3)
    assert [level.boxes.step for level in stated.levels] == [64, 16]
    assert [level.scores.first for level in stated.levels] == [0, 128 * 3]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("most = 1\nbox = ", "not TOML: Invalid value (at the end of line 2); correct"),
        ("most = 1\nbox = !\n", "not TOML: Invalid value (at line 2, column 7); correct"),
        ('preset = "yola"', "preset: 'yola' is none of ssd, yolo, yunet, ultraface; state"),
        ('box = "corners"', "boxes and scores must name outputs"),
        (
            'box = "corners"\nboxes = "b"\nscores = "scores"',
            "no output is called 'b', there are scores, boxes",
        ),
        ('preset = "ultraface"\nmost = 0', "most: Input should be greater than"),
        ('preset = "ultraface"\nstride = 1', "there is no key 'stride'"),
        ('preset = "ultraface"\nstrides = [8]', "is not of 64 rows"),
        ('preset = "ultraface"\nbackground = 2', ".toml: background 2 is beyond the last of 2 classes"),
        ('preset = "ultraface"\nclasses = 3', "classes: 3, but scores have room for 2"),
        ('preset = "ultraface"\nbox = "offsets"', "normalised: is for boxes that are corners or centre, these are offsets"),
        (LIST.replace("corners", "offsets"), "strides: boxes that are offsets need them"),
        (LIST.replace("corners", "xyxy"), "box: Input should be 'corners', 'centre'"),
        (LIST + 'product = "root"', "product: the root is of score × objectness"),
        (LIST + 'most = "9"', "most: '9' where it takes numbers, without quotes; see"),
        (LIST + "strides = [8, true]", "strides: true where it takes numbers"),
        (LIST + "background = false", "background: false where it takes numbers"),
        (LIST + "normalised = 1", "normalised: 1 where it takes true or false"),
        (LIST + "points = 5", "points: 5 where it takes names of outputs in quotes"),
        ("preset = ['ssd']", "preset: ['ssd'] where it takes text in quotes"),
        ('preset = ""', "preset: '' is none of ssd, yolo"),
        ('preset = "ultraface"\nbins = 8', "bins: is for boxes that are dfl, these are corners; leave it out"),
        (LIST + "variances = [0.1, 0.2]", "variances: is for boxes that are offsets and for points, these boxes are corners"),
        (LIST + "offset = 0.5", "offset: is for anchors, which boxes that are corners or centre have none of"),
        (LIST + "anchors = [[[8, 8]]]", "anchors: is for anchors, which boxes that are corners"),
        (LIST + "candidates = 9\nmost = 10", "most: 10 boxes are not found of 9 candidates; leave it out"),
        (LIST.replace('"boxes"', '["boxes", "scores"]'), "boxes: 2 outputs for 1 grid; name one for all, or one for each of strides"),
        (LIST + "anchors = [[[8, 8]], [[8, 8]]]", "2 lists of anchors for 1 grid;"),
    ],
)  # fmt: skip
def test_a_file_that_does_not_fit_is_refused(
    tmp_path: Path, text: str, message: str
) -> None:
    file = tmp_path / "mine.toml"
    file.write_text(text)
    with pytest.raises(UserError, match="mine.toml") as refused:
        resolve_task("detect", str(file), network(*LISTED))
    assert message in str(refused.value)
    assert "\n" not in str(refused.value) and ": :" not in str(refused.value)


def test_names_of_outputs_in_a_refusal_are_one_short_line(tmp_path: Path) -> None:
    file, odd = tmp_path / "mine.toml", "s\x1b[1m" + "x" * 300
    for boxes, shape, says in (
        ("none", (1, 30, 2), "no output is called 'none', there are boxes, s\ufffd[1mxx"),
        ("boxes", (1, 2), "xx… [1, 2] is not of 30 rows"),
    ):  # fmt: skip
        file.write_text(
            f'box = "corners"\nboxes = "{boxes}"\nscores = {json.dumps(odd)}\n'
        )
        with pytest.raises(UserError) as refused:
            found(network(("boxes", (1, 30, 4)), (odd, shape)), str(file))
        assert says in str(refused.value) and len(str(refused.value)) < 400
        assert str(refused.value).isprintable()


def test_keys_that_have_an_effect_are_taken(tmp_path: Path) -> None:
    """Of corners too, where these have points or several anchors in a cell."""
    file = tmp_path / "mine.toml"
    boxes, scores = ("boxes", (1, 128, 4)), ("scores", (1, 128, 2))
    points = ("points", (1, 128, 10))
    file.write_text(LIST + "strides = [8]\nanchors = [[[8, 8], [9, 9]]]\n")
    assert found(network(boxes, scores), str(file)).rows == 128
    file.write_text(
        LIST
        + 'points = "points"\nstrides = [8]\nanchors = [[[8, 8], [9, 9]]]\n'
        + "offset = 0\nvariances = [0.1, 0.2]\ncandidates = 9\n"
    )
    assert found(network(boxes, scores, points), str(file)).points == 5


@pytest.mark.parametrize(
    ("decode", "message"),
    [
        ("", "--decode '': is empty; give ssd, yolo, yunet, ultraface, or a TOML"),
        ("pnope", "--decode pnope: no such preset or file; give ssd, yolo, yunet"),
        ("x" * 5000, "no such preset or file"),
        (".", "--decode .: Is a directory; give ssd"),
    ],
)
def test_what_is_no_decoder_lists_the_presets(decode: str, message: str) -> None:
    with pytest.raises(UserError) as refused:
        resolve_task("detect", decode, network(*LISTED))
    assert message in str(refused.value)


@pytest.mark.parametrize("preset", ["ssd", "yolo", "yunet"])
def test_a_preset_says_what_it_found_and_what_it_expects(preset: str) -> None:
    expected = (
        rf"--decode {preset}: found scores \[1, 30, 2\], boxes \[1, 30, 4\]; expects"
    )
    with pytest.raises(UserError, match=expected):
        resolve_task("detect", preset, network(*LISTED))
    with pytest.raises(UserError, match="no such preset or file"):
        resolve_task("detect", preset.upper(), network(*LISTED))


def test_what_is_not_stated_is_seen_and_noted() -> None:
    task, note = resolve_task(None, None, network(*FACES))
    assert task is None
    assert "--task detect --decode yunet" in note
    assert resolve_task(None, None, network(("y", (1, 10)))) == (None, "")
    assert resolve_task("raw", None, network(*LISTED))[0] == Task(kind="raw")
    with pytest.raises(UserError, match="--task detect: needs --decode ssd, yolo"):
        resolve_task("detect", None, network(*LISTED))
    with pytest.raises(UserError, match="is for --task detect, not classify"):
        resolve_task("classify", "ssd", network(*LISTED))


def test_a_classifier_has_one_score_a_class() -> None:
    """Of several outputs the first; a map or a detector's twelve are none."""
    first = ("y", (1, 10, 1, 1))
    assert resolve_task("classify", None, network(first))[0] == Task(kind="classify")
    task, note = resolve_task("classify", None, network(first, ("z", (1, 3))))
    assert task == Task(kind="classify") and "z [1, 3] is not used" in note
    for outputs, says in (
        (FACES, "outputs look like a detector's .* with --task detect --decode yunet"),
        ([("y", (1, 21, 16, 16))], "state --task segment, --task detect"),
        ([("n", (1,)), first], "found n .* in the first output"),
    ):
        with pytest.raises(UserError, match=f"^--task classify: .*{says}") as refused:
            resolve_task("classify", None, network(*outputs))
        assert "\n" not in str(refused.value)


def test_labels_are_as_many_as_the_tasks_classes(tmp_path: Path) -> None:
    labels = tmp_path / "labels.txt"
    labels.write_text("\n".join("abcdefghij"))
    model = network(("o", (1, 14, 84)))
    task, _ = resolve_task("detect", "yolo", model)
    assert read_labels(labels, model.outputs, task) == list("abcdefghij")
    with pytest.raises(UserError, match="10 labels, but the model has 84 classes"):
        read_labels(labels, model.outputs)
    planes = Task(kind="segment", class_axis=1)
    maps = [Tensor(name="y", shape=(1, 21, 16, 16))]
    with pytest.raises(UserError, match="has 21 classes"):
        read_labels(labels, maps, planes)
    assert read_labels(labels, maps, Task(kind="segment")) == list("abcdefghij")


def test_a_decoder_of_known_networks_brings_their_preprocessing() -> None:
    image = network(*FACES).inputs[0]
    found, note = resolve_preprocessing(Overrides(decode="yunet"), None, [image])
    assert found and (found.fit, found.channel_order) == ("letterbox", "BGR")
    assert set(found.normalised(255.0)) == {255}
    assert note.startswith("preprocessing yunet: v; letterbox")
    file = Overrides(decode="yunet", task="detect", scale=0.5)
    stated, _ = resolve_preprocessing(file, None, [image])
    assert stated and (stated.scale, stated.channel_order) == (0.5, "RGB")
    kept = Overrides(preprocessing="none").with_defaults(file)
    assert (kept.decode, kept.task, kept.scale) == ("yunet", "detect", None)
    ultra, _ = resolve_preprocessing(Overrides(decode="ultraface"), None, [image])
    assert ultra and set(ultra.normalised(255.0)) == {1}


def test_a_file_with_a_preset_brings_its_preprocessing_too(tmp_path: Path) -> None:
    image = network(*FACES).inputs[0]
    file = tmp_path / "mine.toml"
    file.write_text('preset = "yunet"\nscore_threshold = 0.9\n')
    known, note = resolve_preprocessing(Overrides(decode="yunet"), None, [image])
    mine = Overrides(decode=str(file), task="detect")
    assert resolve_preprocessing(mine, None, [image]) == (known, note)
    stated = mine.model_copy(update={"scale": 0.5})
    found, said = resolve_preprocessing(stated, None, [image])
    assert found and (found.scale, found.channel_order) == (0.5, "RGB")
    assert said.endswith("because of --scale: --preprocessing yunet takes it")
    file.write_text('box = "corners"\n')
    none, said = resolve_preprocessing(mine, None, [image])
    assert none and none.assumed and "preprocessing assumed" in said


def test_a_segmentation_is_scores_or_a_map() -> None:
    scores, note = resolve_task("segment", None, network(("y", (1, 21, 16, 16))))
    assert scores == Task(kind="segment", class_axis=1)
    assert "scores 21 classes" in note
    assert resolve_task("segment", None, network(("y", (1, 16, 16))))[0] == Task(
        kind="segment"
    )
    with pytest.raises(UserError, match="--task segment: found y"):
        resolve_task("segment", None, network(("y", (1, 10))))
    # A detector's rows are no picture.
    with pytest.raises(UserError, match="--task segment: found rows"):
        resolve_task("segment", None, network(("rows", (1, 4420, 2))))


def test_a_share_of_each_pixel_is_no_map_of_classes() -> None:
    model = network(("y", (1, 1, 16, 16)))
    task = Task(kind="segment")
    assert resolve_task("segment", None, model)[0] == task
    model.proto.graph.node.append(onnx.helper.make_node("Sigmoid", ["a"], ["y"]))
    with pytest.raises(UserError, match=r"y \[1, 1, 16, 16\] is one share a pixel, of a Sigmoid .* end the network with Round"):  # fmt: skip
        resolve_task("segment", None, model)
    model.proto.graph.node.append(onnx.helper.make_node("Round", ["y"], ["z"]))
    rounded = replace(model, outputs=network(("z", (1, 1, 16, 16))).outputs)
    assert resolve_task("segment", None, rounded)[0] == task


def test_the_anchors_of_the_built_in_detector_are_its_own(tmp_path: Path) -> None:
    anchors = dense.anchors(320)
    rows = len(anchors)
    model = network(("b", (1, rows, 4)), ("s", (1, rows, 3)), side=320)
    file = tmp_path / "all.toml"
    file.write_text(
        'preset = "ssd"\niou_threshold = 1.0\nmost = 4096\ncandidates = 4096\n'
    )
    task, _ = resolve_task("detect", str(file), model)
    offsets = np.random.default_rng(0).normal(size=(rows, 4)).astype(np.float32)
    scores = np.linspace(3, 1, 3 * rows, dtype=np.float32)
    assert task
    found = decode(task, [offsets[None], scores.reshape(1, rows, 3)], (320, 320))
    ys, xs, heights, widths = anchors.astype(np.float64).T * 320
    ty, tx, th, tw = offsets.astype(np.float64).T
    centres = np.stack([xs + tx / 10 * widths, ys + ty / 10 * heights], axis=1)
    halves = np.stack([widths * np.exp(tw / 5), heights * np.exp(th / 5)], axis=1) / 2
    expected = np.concatenate([centres - halves, centres + halves], axis=1)
    assert found.boxes == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize(
    ("name", "preset", "expected"),
    [
        ("ultraface_rfb_320", "ultraface", (163, 113, 335, 313)),
        ("yunet_n_320", "yunet", (166, 96, 332, 319)),
    ],
)
def test_a_trained_face_detector_finds_the_face(
    name: str, preset: str, expected: tuple[int, ...]
) -> None:
    """One face on a photograph of 480×562 pixels, near where it is; points lie in it."""
    photo = photos.read(shared("photos/grace_hopper.jpg"))
    path = shared(f"detect/{name}.onnx")
    source = sources.find(str(path), {}, None, lambda _: None)
    task, _ = resolve_task("detect", preset, source.model)
    preprocessing, _ = resolve_preprocessing(
        Overrides(decode=preset), None, source.model.inputs
    )
    assert task and preprocessing
    tensor = photos.to_tensor(photo, preprocessing, source.model.inputs[0])
    outputs = Reference(source.model).run(tensor)
    found = decode(task, outputs, source.model.inputs[0].size)
    place = photos.placement(photo.image.size, preprocessing)
    (box,) = on_photograph(found, place, photo.image.size).boxes
    assert box == pytest.approx(expected, abs=25)
    (points,) = on_photograph(found, place, photo.image.size).points
    assert ((points > box[:2]) & (points < box[2:])).all()
