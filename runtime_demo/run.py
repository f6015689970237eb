"""``python -m runtime_demo.run``: the classes of photographs by a bundle, and the latency."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from typing import Any

from runtime_demo.options import (
    DEVICES_HELP,
    add_device_options,
    add_input_option,
    check_given,
    open_session,
    threads_text,
)
from targets.arguments import add_json, command_parser, named_path
from targets.errors import UserError, run_command
from targets.escapes import lines, shown
from targets.progress import Progress

_EPILOG = (
    DEVICES_HELP
    + """
example:
  python -m runtime_demo.run out/model-znver4 --image cat.jpg

Exit codes: 0 done, 2 refused (one line says why), 130 Ctrl-C, 143 SIGTERM.
"""
)
_REPEAT = 20


def main(argv: Sequence[str] | None = None) -> int:
    parser = command_parser(
        "runtime_demo.run",
        "Classify photographs with a bundle: the five best classes and the latency.",
        _EPILOG,
    )
    add_device_options(parser)
    parser.add_argument(
        "--image",
        type=named_path,
        nargs="+",
        default=[],
        metavar="IMAGE",
        help="images, .npy files of the input tensor, .npz files where there are several, or folders of them",
    )
    add_input_option(parser)
    add_json(parser)
    arguments = parser.parse_args(argv)
    with Progress(quiet=arguments.json) as progress:
        answer = _run(arguments, progress)
    print(json.dumps(answer, indent=2) if arguments.json else lines(_table(answer)))
    return 0


def _run(arguments: argparse.Namespace, progress: Progress) -> dict[str, Any]:
    from bundle import inputs
    from bundle.store import open_bundle
    from devices.sessions.session import Origin
    from runtime_demo.comparison import read_inputs, time_both
    from runtime_demo.result import answers, scores_classes

    progress.stage("verifying the bundle")
    bundle = open_bundle(arguments.bundle)
    labels, probabilities = bundle.labels(), bundle.manifest.probabilities
    first = bundle.manifest.outputs[0]
    if not scores_classes(first.shape, first.dtype):
        shape = "×".join(map(str, first.shape))
        kind = "" if first.dtype == "float32" else f" of {first.dtype}"
        raise UserError(
            f"{bundle.path}: output {shown(first.name)!r} is {shape}{kind}, not one score a class; use check"
        )
    ports = bundle.manifest.inputs
    fixed = inputs.read_fixed(arguments.input, ports)
    found = inputs.find(arguments.image, ports, fixed)
    check_given(bundle, found, fixed)
    seen = []
    with open_session(bundle, arguments, progress, most=1) as session:
        progress.stage("classifying")
        latency = None
        for item in read_inputs(bundle, found, fixed, progress):
            progress.tick()
            top = answers(session.run(*item.tensors)[0], probabilities, labels)
            if latency is None and session.origin is not Origin.EMULATED:
                latency, _ = time_both(session, None, item.tensors, _REPEAT, progress)
            seen.append(
                {"name": item.name, "top": [answer._asdict() for answer in top]}
            )
        return {
            "bundle": str(bundle.path),
            "images": seen,
            "threads": session.threads,
            "latency_ms": latency.to_json() if latency else None,
            "origin": session.origin.split()[0],
            "device": str(session.origin),
        }


def _table(answer: dict[str, Any]) -> str:
    rows = []
    for image in answer["images"]:
        rows.append(shown(image["name"]))
        rows += [
            f"  {top['probability']:6.1%}  {shown(top['label']) or 'class ' + str(top['class_index'])}"
            for top in image["top"]
        ]
    times = answer["latency_ms"]
    if times is None:
        rows.append(f"latency: not measured ({answer['device']})")
    else:
        rows.append(
            f"latency: median {times['median']:.2f} ms, p90 {times['p90']:.2f}, p99 {times['p99']:.2f}, "
            f"{threads_text(answer['threads'])}, {answer['device']}"
        )
    return "\n".join(rows)


if __name__ == "__main__":
    run_command(main)
