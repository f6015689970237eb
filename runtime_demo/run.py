"""``python -m runtime_demo.run``: what a bundle sees in photographs, classes, boxes or areas, and the latency."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from netship.runtime_demo.options import (
    DEVICES_HELP,
    add_device_options,
    add_input_option,
    check_given,
    open_session,
)
from netship.targets.arguments import (
    add_json,
    as_json,
    command_parser,
    file_to_write,
    named_path,
)
from netship.targets.errors import UserError, run_command
from netship.targets.escapes import counted, lines, milliseconds, shown
from netship.targets.progress import Progress

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from netship.bundle.store import Bundle

_EPILOG = (
    DEVICES_HELP
    + """
example:
  python -m runtime_demo.run out/model-znver4 --image cat.jpg

Exit codes: 0 done, 2 refused (one line says why), 130 Ctrl-C, 143 SIGTERM.
"""
)
_REPEAT = 20
_PICTURES = (".jpg", ".jpeg", ".png")


def main(argv: Sequence[str] | None = None) -> int:
    parser = command_parser(
        "runtime_demo.run",
        "Show photographs to a bundle: the five best classes, or the boxes found, or the classes of\nthe most pixels, and the latency.",
        _EPILOG,
    )
    add_device_options(parser)
    parser.add_argument(
        "--image",
        "--images",
        type=named_path,
        nargs="+",
        default=[],
        metavar="IMAGE",
        help="images, .npy files of the input tensor, .npz files where there are several, or folders of them",
    )
    add_input_option(parser)
    parser.add_argument(
        "--save",
        type=file_to_write("--save"),
        metavar="FILE.jpg",
        help="write a copy of the photograph with boxes, a mask or the best class drawn into it",
    )
    add_json(parser)
    arguments = parser.parse_args(argv)
    with Progress(quiet=arguments.json) as progress:
        answer = _run(arguments, progress)
    print(as_json(answer) if arguments.json else lines(_table(answer)))
    return 0


def _run(arguments: argparse.Namespace, progress: Progress) -> dict[str, Any]:
    from netship.bundle import inputs
    from netship.bundle.store import open_bundle
    from netship.devices.sessions.session import Origin
    from netship.runtime_demo import drawing, findings
    from netship.runtime_demo.comparison import read_inputs, time_both

    progress.stage("verifying the bundle")
    bundle = open_bundle(arguments.bundle)
    answer = _reader(bundle)
    ports = bundle.manifest.inputs
    fixed = inputs.read_fixed(arguments.input, ports)
    found = inputs.find(arguments.image, ports, fixed)
    check_given(bundle, found, fixed)
    if arguments.save and arguments.save.suffix.lower() not in _PICTURES:
        raise UserError(
            f"--save {arguments.save}: writes JPEG or PNG; give a name that ends with .jpg or .png"
        )
    if arguments.save and len(found) != 1:
        raise UserError(
            f"--save {arguments.save}: takes one image, not {len(found)}; give one --image"
        )
    if arguments.save and arguments.save.resolve() == found[0].resolve():
        raise UserError(
            f"--save {arguments.save}: is the image itself, which it would replace; give another name"
        )
    seen = []
    with open_session(bundle, arguments, progress, most=1) as session:
        progress.stage("running")
        latency = None
        for item in read_inputs(bundle, found, fixed, progress):
            progress.tick()
            outputs = session.run(*item.tensors)
            given = answer(outputs, item.size)
            if arguments.save:
                photograph = findings.Photograph(item.path, item.size)
                title = ""
                for best in given.get("top", ())[:1]:
                    title = f"{_named(best)} {best['probability']:.0%}"
                marked = findings.marked(bundle, photograph, outputs, title)
                drawing.save(marked, arguments.save, "--save")
            if latency is None and session.origin is not Origin.EMULATED:
                latency, _ = time_both(session, None, item.tensors, _REPEAT, progress)
            seen.append({"name": item.name, **given})
        return {
            "bundle": str(bundle.path),
            "images": seen,
            "saved": str(arguments.save) if arguments.save else None,
            "threads": session.threads,
            "latency_ms": latency.to_json() if latency else None,
            "origin": session.origin.split()[0],
            "device": str(session.origin),
        }


def _reader(
    bundle: Bundle,
) -> Callable[[Sequence[NDArray[Any]], tuple[int, int] | None], dict[str, Any]]:
    """What the outputs mean: a function of them and of the photograph's width and height, if it is one."""
    import numpy as np

    from netship.bundle.decode import NO_CLASS, segment
    from netship.runtime_demo.findings import Geometry
    from netship.runtime_demo.result import Answer, answers

    manifest, labels = bundle.manifest, bundle.labels()
    task, first = manifest.task, manifest.outputs[0]

    def label(index: int) -> str:
        return labels[index] if index < len(labels) else ""

    def boxes(
        outputs: Sequence[NDArray[Any]], size: tuple[int, int] | None
    ) -> dict[str, Any]:
        assert task
        found = Geometry.of(manifest, size).boxes(task, outputs)
        rows = [
            {
                "class_index": int(index),
                "label": label(int(index)),
                "score": float(score),
                "box": box.tolist(),
                "points": points.tolist(),
            }
            for box, score, index, points in zip(*found, strict=True)
        ]
        return {"pixels_of": "photograph" if size else "input", "boxes": rows}

    def areas(outputs: Sequence[NDArray[Any]], _size: object) -> dict[str, Any]:
        assert task
        pixels = segment(task, outputs)
        known = pixels[pixels != NO_CLASS]
        classes, counts = np.unique(known, return_counts=True)
        order = np.argsort(-counts, kind="stable")[:5]
        top = [
            Answer(int(classes[i]), label(int(classes[i])), counts[i] / pixels.size)
            for i in order
        ]
        answer = {"top": [each._asdict() for each in top], "without_class": 0.0}
        if known.size < pixels.size:
            answer["without_class"] = 1 - known.size / pixels.size
            wrong = "NaN" if task.class_axis is not None else "no whole number from 0"
            where = counted(pixels.size - known.size, "pixel")
            answer["note"] = f"output {shown(first.name)!r} has {wrong} in {where}"
        return answer

    def classes(outputs: Sequence[NDArray[Any]], _size: object) -> dict[str, Any]:
        top = answers(outputs[0], manifest.probabilities, labels)
        return {"top": [each._asdict() for each in top]}

    if task and task.kind == "detect":
        return boxes
    if task and task.kind == "segment":
        return areas
    raw = task is not None and task.kind == "raw"
    if raw or not manifest.scores_classes:
        shape = "×".join(map(str, first.shape))
        kind = "" if first.dtype == "float32" else f" of {first.dtype}"
        rest = len(manifest.outputs) - 1
        several = (
            f", and there {'is' if rest == 1 else 'are'} {counted(rest, 'other')}"
            if rest
            else ""
        )
        raise UserError(
            f"{bundle.path}: output {shown(first.name)!r} is {shape}{kind}, "
            f"{'of a task that is raw' if raw else 'not one score a class'}{several}; use check, or build with --task"
        )
    return classes


def _named(row: dict[str, Any]) -> str:
    return shown(row["label"]) or f"class {row['class_index']}"


def _box(row: dict[str, Any]) -> str:
    left, top, right, bottom = row["box"]
    return (
        f"  {row['score']:6.1%}  {_named(row)}: x {left:.0f} to {right:.0f}, "
        f"y {top:.0f} to {bottom:.0f}"
    )


def _table(answer: dict[str, Any]) -> str:
    rows = []
    for image in answer["images"]:
        rows.append(shown(image["name"]))
        if "boxes" in image:
            found = image["boxes"]
            rows[-1] += (
                f": {counted(len(found), 'object')}, pixels of the {image['pixels_of']}"
            )
            rows += map(_box, found)
            continue
        rows += [f"  {top['probability']:6.1%}  {_named(top)}" for top in image["top"]]
        if without := image.get("without_class"):
            rows.append(f"  {without:6.1%}  without a class: {image['note']}")
    if answer["saved"]:
        rows.append(f"saved: {shown(answer['saved'], 1 << 10)}")
    times = answer["latency_ms"]
    if times is None:
        rows.append(f"latency: not measured ({answer['device']})")
    else:
        rows.append(
            f"latency: median {milliseconds(times['median'])}, p90 {milliseconds(times['p90'])}, "
            f"p99 {milliseconds(times['p99'])}, {counted(answer['threads'], 'thread')}, {answer['device']}"
        )
    return "\n".join(rows)


if __name__ == "__main__":
    run_command(main)
