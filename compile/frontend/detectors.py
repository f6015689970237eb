"""From ``--task`` and ``--decode`` to what the manifest says of a network's outputs."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from itertools import pairwise
from math import prod, sqrt
from pathlib import Path
from typing import Any, NamedTuple

import onnx
from pydantic import ValidationError

from netship.bundle.decode import MOST_CLASSES
from netship.bundle.manifest import Tensor
from netship.bundle.task import Detector, Kind, Task, scores_classes
from netship.compile.frontend.decoding import (
    assemble,
    grids_of,
    read_decoding,
    without_effect,
)
from netship.compile.frontend.dense import box_specifications
from netship.compile.frontend.model import Model
from netship.targets.errors import UserError
from netship.targets.escapes import counted, shown


class _Misfit(Exception):
    """Outputs that a preset does not take; says what it expects."""


class _Network(NamedTuple):
    """What a preset sees; ``activated``: the outputs that a Sigmoid or Softmax gives."""

    outputs: tuple[Tensor, ...]
    size: tuple[int, int]
    activated: frozenset[str]

    def grids(self, strides: Sequence[float]) -> list[tuple[int, int]]:
        """Lines and columns at each stride."""
        return grids_of(self.size, strides)

    def cells(self, strides: Sequence[float]) -> int:
        return sum(map(prod, self.grids(strides)))

    def with_columns(self, count: int) -> list[Tensor]:
        """The outputs [1, rows, count]."""
        return [x for x in self.outputs if len(x.shape) == 3 and x.shape[2] == count]

    def listed(self, expected: str) -> tuple[Tensor, Tensor]:
        """Boxes [1, n, 4] and scores [1, n, classes], by shape, else by name."""
        if len(self.outputs) == 2 and all(len(x.shape) == 3 for x in self.outputs):
            for boxes, scores in (self.outputs, self.outputs[::-1]):
                same = boxes.shape[1] == scores.shape[1] and boxes.shape[2] == 4
                named = re.search("score|class|cls|conf|prob", boxes.name.lower())
                if same and (scores.shape[2] != 4 or not named):
                    return boxes, scores
        raise _Misfit(expected)


def _yunet(network: _Network) -> dict[str, Any]:
    strides = (8, 16, 32)
    height, width = network.size
    roles: dict[str, list[str]] = {"scores": [], "objectness": []}
    for stride, grid in zip(strides, network.grids(strides), strict=True):
        for role, count in (("both", 1), ("boxes", 4), ("points", 10)):
            found = [
                x.name for x in network.with_columns(count) if x.shape[1] == prod(grid)
            ]
            if len(found) != 1 + (role == "both") or height % 32 or width % 32:
                raise _Misfit(
                    f"for strides 8, 16 and 32 two scores [1, n, 1], boxes [1, n, 4] and points [1, n, 10], n being "
                    f"{', '.join(str(prod(each)) for each in network.grids(strides))}"
                )
            found.sort(key=lambda name: "obj" in name)
            for name, output in zip(
                ("scores", "objectness") if role == "both" else (role,),
                found,
                strict=True,
            ):
                roles.setdefault(name, []).append(output)
    return {
        **roles,
        "strides": strides,
        "offset": 0,
        "box": "offsets",
        "product": "root",
        "score_threshold": 0.6,
        "iou_threshold": 0.3,
    }


def _ultraface(network: _Network) -> dict[str, Any]:
    boxes, scores = network.listed(
        "boxes [1, n, 4] in shares of the picture, and scores [1, n, classes]"
    )
    return {
        "boxes": boxes.name,
        "scores": scores.name,
        "box": "corners",
        "normalised": True,
        "background": 0 if scores.shape[2] > 1 else None,
        "score_threshold": 0.7,
        "iou_threshold": 0.3,
    }


def _scaled(scales: Sequence[float], ratios: Sequence[Sequence[int]]) -> Any:
    """Torchvision's default boxes, in shares of the picture (DefaultBoxGenerator)."""
    levels = []
    for (scale, following), each in zip(pairwise(scales), ratios, strict=True):
        between = sqrt(scale * following)
        sizes = [(scale, scale), (between, between)]
        for ratio in map(sqrt, each):
            width, height = scale * ratio, scale / ratio
            sizes += [(width, height), (height, width)]
        levels.append([(min(w, 1.0), min(h, 1.0)) for w, h in sizes])
    return levels


_SIX = [0.2 + 0.15 * k for k in range(6)] + [1.0]


def _ssd(network: _Network) -> dict[str, Any]:
    powers = (16, 32, 64, 128, 256, 512)
    mobilenet = [
        [(scale * sqrt(ratio), scale / sqrt(ratio)) for scale, ratio in cell]
        for cell in box_specifications(len(powers))
    ]
    kinds = (
        (powers, mobilenet, True, "sigmoid"),
        (powers, _scaled(_SIX, [(2, 3)] * 6), False, "softmax"),
        (
            (8, 16, 32, 64, 100, 300),
            _scaled(
                (0.07, 0.15, 0.33, 0.51, 0.69, 0.87, 1.05),
                ((2,), (2, 3), (2, 3), (2, 3), (2,), (2,)),
            ),
            False,
            "softmax",
        ),
    )
    counts = []
    expected = "boxes [1, n, 4] and scores [1, n, classes], n being "
    height, width = network.size
    for strides, anchors, transposed, activation in kinds:
        # Torchvision's third kind is of 300 pixels only, and its last grids have no room for their strides.
        grids = [(max(1, h), max(1, w)) for h, w in network.grids(strides)]
        if strides[0] == 8:
            if network.size != (300, 300):
                continue
            grids = [(n, n) for n in (38, 19, 10, 5, 3, 1)]
        count = sum(prod(g) * len(a) for g, a in zip(grids, anchors, strict=True))
        counts.append(str(count))
        try:
            boxes, scores = network.listed("")
        except _Misfit:
            continue
        if boxes.shape[1] != count:
            continue
        steps = [(width / w, height / h) for h, w in grids]
        return {
            "boxes": boxes.name,
            "scores": scores.name,
            "grids": grids,
            "steps": steps if strides[0] != 8 else [(s, s) for s in strides],
            "anchors": [
                [(w * width, h * height) for w, h in sizes] for sizes in anchors
            ],
            "box": "offsets",
            "variances": (0.1, 0.2),
            "transposed": transposed,
            "activation": "none" if scores.name in network.activated else activation,
            "background": 0,
        }
    raise _Misfit(expected + " or ".join(counts))


def _yolo(network: _Network) -> dict[str, Any]:
    strides = (8, 16, 32)
    cells = network.cells(strides)
    facts: dict[str, Any] = {"score_threshold": 0.25, "iou_threshold": 0.45}
    names = [x.name for x in network.outputs]
    if len(names) == 1 and len(network.outputs[0].shape) == 3:
        rest = set(network.outputs[0].shape[1:])
        if 3 * cells in rest and min(rest) > 5:
            return {
                **facts,
                "boxes": names,
                "scores": names,
                "objectness": names,
                "box": "centre",
            }
        if cells in rest and min(rest) > 4:
            return {**facts, "boxes": names, "scores": names, "box": "centre"}
    heads = [
        [x for x in network.outputs if x.shape[2:4] == grid and len(x.shape) in (4, 5)]
        for grid in network.grids(strides)
    ]
    raw = {**facts, "strides": strides, "activation": "sigmoid"}
    if len(names) == 3 and all(len(found) == 1 for found in heads):
        ordered = [found[0].name for found in heads]
        channels = {found[0].shape[1] for found in heads}
        if all(len(found[0].shape) == 4 for found in heads) and min(channels) > 64:
            return {**raw, "boxes": ordered, "scores": ordered, "box": "dfl"}
    five = [
        [x for x in network.outputs if len(x.shape) == 5 and x.shape[2:4] == grid]
        for grid in network.grids(strides)
    ]
    if len(names) == 3 and all(len(f) == 1 and f[0].shape[1] == 3 for f in five):
        ordered = [f[0].name for f in five]
        return {
            **raw,
            "boxes": ordered,
            "scores": ordered,
            "objectness": ordered,
            "box": "yolov5",
            # ultralytics/yolov5, models/yolov5s.yaml.
            "anchors": (
                ((10, 13), (16, 30), (33, 23)),
                ((30, 61), (62, 45), (59, 119)),
                ((116, 90), (156, 198), (373, 326)),
            ),
        }
    pairs = [sorted(found, key=lambda x: x.shape[1] not in (4, 64)) for found in heads]
    if len(names) == 6 and all(len(f) == 2 and f[0].shape[1] in (4, 64) for f in pairs):
        return {
            **raw,
            "boxes": [found[0].name for found in pairs],
            "scores": [found[1].name for found in pairs],
            "box": "dfl" if pairs[0][0].shape[1] == 64 else "distances",
        }
    raise _Misfit(
        f"one output [1, 4 + classes, {cells}] (v8) or [1, {3 * cells}, 5 + classes] (v5), or for strides 8, 16 and 32 "
        "one head [1, 64 + classes, h, w] or [1, 3, h, w, 5 + classes], or boxes [1, 64 or 4, h, w] and scores "
        "[1, classes, h, w]; state other heads in a TOML file"
    )


PRESETS: dict[str, Callable[[_Network], dict[str, Any]]] = {
    "ssd": _ssd,
    "yolo": _yolo,
    "yunet": _yunet,
    "ultraface": _ultraface,
}


def preset_of(decode: str) -> str:
    """The preset that ``--decode`` names, itself or in its file; empty where it has none.

    Raises:
        UserError: as `resolve_task`, of the file.
    """
    return str(_stated(decode).get("preset", ""))


def _stated(decode: str) -> dict[str, Any]:
    if decode in PRESETS:
        return {"preset": decode}
    known = ", ".join(PRESETS)
    if not decode.strip():
        raise UserError(f"--decode {decode!r}: is empty; give {known}, or a TOML file")
    return read_decoding(Path(decode), known)


def resolve_task(
    kind: Kind | None, decode: str | None, model: Model
) -> tuple[Task | None, str]:
    """What the network is for, and a note that says what was found; the task is None where nothing is stated.

    Args:
        decode: a preset, or the path of a TOML file.

    Raises:
        UserError: the outputs do not fit, or the file is not one of a decoding.
    """
    if kind is None and decode is None:
        return None, _seen(model)
    if decode is not None and kind not in (None, "detect"):
        raise UserError(f"--decode: is for --task detect, not {kind}; leave it out")
    if decode is not None:
        return _detect(decode, model)
    if kind == "detect":
        raise UserError(
            f"--task detect: needs --decode {', '.join(PRESETS)} or a TOML file; found {_shapes(model.outputs)}"
        )
    if kind == "segment":
        return _segment(model)
    if kind == "classify":
        return _classify(model)
    return Task(kind="raw"), ""


def _shapes(outputs: Sequence[Tensor], most: int = 12) -> str:
    texts = [f"{shown(x.name)} {list(x.shape)}" for x in outputs[:most]]
    return ", ".join(texts) + (", …" if len(outputs) > most else "")


def _classify(model: Model) -> tuple[Task, str]:
    first, *rest = model.outputs
    shape, seen = first.shape, _seen(model)
    if seen or not scores_classes(shape, first.dtype, len(model.outputs)):
        raise UserError(
            f"--task classify: found {_shapes(model.outputs)}; expects one score a class, float32 [1, classes], in the "
            f"first output; {seen or 'state --task segment, --task detect --decode …, or --task raw'}"
        )
    if not rest:
        return Task(kind="classify"), ""
    return Task(kind="classify"), (
        f"task: classify; {shown(first.name)} {list(shape)} has the scores, {_shapes(rest, 3)} {'is' if len(rest) == 1 else 'are'} not used"
    )


def _segment(model: Model) -> tuple[Task, str]:
    shape = model.outputs[0].shape
    image = model.image
    height, width = image.size if image else (0, 0)
    ratios = [(a, shape[:a] + shape[a + 1 :]) for a in (1, 3) if len(shape) == 4]
    planes = [
        a
        for a, rest in ratios
        if rest[0] == 1
        and rest[1] * width == rest[2] * height
        and 1 < shape[a] <= MOST_CLASSES
    ]
    if model.outputs[0].dtype == "float32" and planes:
        axis = planes[-1] if image and image.layout == "NHWC" else planes[0]
        return Task(kind="segment", class_axis=axis), (
            f"task: segment; {shown(model.outputs[0].name)} {list(shape)} scores {counted(shape[axis], 'class')} (axis {axis})"
        )
    sides = [side for side in shape if side != 1]
    if len(sides) == 2 and sides[0] * width == sides[1] * height:
        name = model.outputs[0].name
        if image and name in _network(model, image).activated:
            raise UserError(
                f"--task segment: {shown(name)} {list(shape)} is one share a pixel, of a Sigmoid or Softmax, and no class; "
                "end the network with Round, which makes 0 and 1 of it, or state --task raw"
            )
        return Task(kind="segment"), (
            f"task: segment; {shown(name)} {list(shape)} is a map of classes"
        )
    raise UserError(
        f"--task segment: found {_shapes(model.outputs)}; expects a map [1, height, width] of classes, or scores "
        "[1, classes, height, width]"
    )


def _seen(model: Model) -> str:
    """A note for a detector that nothing is stated of."""
    if model.image is None:
        return ""
    network = _network(model, model.image)
    for name, preset in PRESETS.items():
        try:
            preset(network)
        except _Misfit:
            continue
        return (
            f"outputs look like a detector's ({_shapes(model.outputs, 3)}): with --task detect --decode {name} "
            "the bundle says how they become boxes"
        )
    return ""


def _network(model: Model, image: Tensor) -> _Network:
    producers = {name: node for node in model.proto.graph.node for name in node.output}
    passed = {
        "Reshape",
        "Transpose",
        "Flatten",
        "Concat",
        "Identity",
        "Squeeze",
        "Unsqueeze",
    }

    def activated(name: str) -> bool:
        node: onnx.NodeProto | None = producers.get(name)
        for _ in range(len(producers)):
            if node is None or node.op_type not in passed:
                break
            node = producers.get(node.input[0])
        return node is not None and node.op_type in ("Softmax", "Sigmoid")

    names = frozenset(x.name for x in model.outputs if activated(x.name))
    return _Network(model.outputs, image.size, names)


def _detect(decode: str, model: Model) -> tuple[Task, str]:
    if model.image is None:
        raise UserError(
            f"--decode: the input {list(model.inputs[0].shape)} is no image, so no boxes lie in it; leave it out"
        )
    network = _network(model, model.image)
    given = _stated(decode)
    preset = given.pop("preset", None)
    if preset is not None and preset not in PRESETS:
        raise UserError(
            f"--decode {decode}: preset: {shown(preset, 40)!r} is none of {', '.join(PRESETS)}; state one of these, or none"
        )
    try:
        facts = PRESETS[preset](network) if preset else {}
        detector = assemble(
            Path(decode).name, facts | given, network.outputs, network.size
        )
        if useless := without_effect(given, detector):
            raise ValueError(useless)
        for _, _, values, _ in detector.parts():
            output = model.outputs[values.output]
            if output.dtype != "float32":
                raise _Misfit(
                    f"float32: end the network with DequantizeLinear or a Cast, as {shown(output.name)} is {output.dtype}"
                )
        task = Task(kind="detect", detector=detector)
        task.check([x.shape for x in model.outputs])
    except _Misfit as misfit:
        raise UserError(
            f"--decode {decode}: found {_shapes(model.outputs)}; expects {misfit}"
        ) from None
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        what = first["msg"].removeprefix("Value error, ")
        # What is wrong with several values together has no place.
        place = ".".join(map(str, first["loc"]))
        text = f"{place}: {what}" if place else what
        raise UserError(f"--decode {decode}: {text}; see docs/detection.md") from None
    except ValueError as error:
        raise UserError(f"--decode {decode}: {error}; see docs/detection.md") from None
    return task, _note(detector, model.outputs)


def _note(detector: Detector, outputs: Sequence[Tensor]) -> str:
    places: dict[str, list[str]] = {}
    for what, _, values, _ in detector.parts():
        places.setdefault(what, []).append(shown(outputs[values.output].name))
    found = "; ".join(
        f"{what} in {', '.join(dict.fromkeys(names))}" for what, names in places.items()
    )
    return (
        f"task: detect ({detector.decoder}), {counted(detector.rows, 'box')}, "
        f"{counted(detector.classes, 'class')}; {found}; "
        f"score at least {detector.score_threshold:g}, IoU at most {detector.iou_threshold:g}"
    )
