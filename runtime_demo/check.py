"""``python -m runtime_demo.check``: a bundle's accuracy against the reference, and its latency."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from netship.runtime_demo.options import (
    DEVICES_HELP,
    add_device_options,
    add_input_option,
    check_given,
    count,
    open_session,
)
from netship.targets import escapes
from netship.targets.arguments import (
    add_result_options,
    command_parser,
    named_path,
    show_result,
)
from netship.targets.errors import UserError, run_command
from netship.targets.escapes import counted, listed, magnitude, milliseconds, shown
from netship.targets.progress import Progress

if TYPE_CHECKING:
    from netship.bundle.accuracy import Swap
    from netship.bundle.manifest import Quantisation
    from netship.bundle.store import Bundle
    from netship.runtime_demo.findings import Given
    from netship.runtime_demo.known_classes import Known
    from netship.runtime_demo.result import (
        Answer,
        CheckResult,
        Confusion,
        InputResult,
        Latency,
    )

_EPILOG = (
    DEVICES_HELP
    + """
examples:
  python -m runtime_demo.check out/model-znver4 --model model.onnx --images photos/
  python -m runtime_demo.check out/model-arm-cortex-a72 --board emulated
      the golden data that the bundle carries, no model needed
  python -m runtime_demo.check out/model-arm-cortex-a72 --ssh pi@raspberrypi --images photos/ --model model.onnx
  python -m runtime_demo.check out/detector --model detector.onnx --images val/ --labels instances.json

Boxes and classes of pixels are compared with the reference's, and with labels where they are given.
It also counts right answers of a classifier: by a labels.csv next to the images (columns file, class_index, and
label where it has one), by --labels FILE.csv, or by the names of folders, one a class.
Exit codes: 0 passed, 1 not within the tolerance, 2 refused (one line says why), 130 Ctrl-C, 143 SIGTERM.
"""
)
_DEFAULT_REPEAT = 50


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parser().parse_args(argv)
    with Progress(quiet=arguments.json) as progress:
        result = check(arguments, progress)
    from netship.runtime_demo.report import write_report

    show_result(
        arguments,
        result.to_json(),
        escapes.lines(_table(result)),
        lambda path: write_report(result, path),
    )
    return 0 if result.passed else 1


def parser() -> argparse.ArgumentParser:
    parser = command_parser(
        "runtime_demo.check",
        "Compare a bundle with ONNX Runtime on the same ONNX and the same inputs.",
        _EPILOG,
    )
    add_device_options(parser)
    parser.add_argument(
        "--repeat",
        type=count,
        metavar="N",
        help=f"inferences to time (default: {_DEFAULT_REPEAT}; on an emulated board none)",
    )
    parser.add_argument(
        "--model",
        metavar="MODEL",
        help="the model that the bundle was built from, as --model of python -m compile.build takes it "
        "(default: only the bundle's golden data are checked)",
    )
    parser.add_argument(
        "--images",
        type=named_path,
        nargs="+",
        default=[],
        metavar="IMAGE",
        help="images, .npy files of the input tensor, .npz files where there are several, or folders of them; needs --model",
    )
    add_input_option(parser)
    parser.add_argument(
        "--labels",
        type=named_path,
        metavar="FILE",
        help="what the images show: FILE.csv with columns file and class_index for a classifier (default: labels.csv "
        "next to the images); boxes for a detector, a JSON file as COCO's, counted by pycocotools",
    )
    parser.add_argument(
        "--masks",
        type=named_path,
        metavar="DIR",
        help="what the images show, for a segmenting network: a PNG of class numbers for each, of its size and name",
    )
    add_result_options(parser)
    return parser


def check(arguments: argparse.Namespace, progress: Progress) -> CheckResult:
    """Run the whole check that the options ask for."""
    from netship.bundle import golden, inputs
    from netship.bundle.store import open_bundle
    from netship.devices.sessions.session import Origin
    from netship.runtime_demo import comparison, findings
    from netship.runtime_demo.result import Board, CheckResult

    if arguments.images and not arguments.model:
        raise UserError(
            "--images needs --model: the reference answers come from ONNX Runtime on it"
        )
    for name in ("labels", "masks"):
        if getattr(arguments, name) and not arguments.images:
            raise UserError(f"--{name} needs --images; give the images that it is of")
    progress.stage("verifying the bundle")
    bundle = open_bundle(arguments.bundle)
    ports = bundle.manifest.inputs
    fixed = inputs.read_fixed(arguments.input, ports)
    found = inputs.find(arguments.images, ports, fixed)
    if arguments.input and not arguments.model:
        raise UserError(
            "--input needs --model: the reference answers come from ONNX Runtime on it"
        )
    if found or fixed:
        check_given(bundle, found, fixed)
    known = _known_classes(bundle, found, arguments)
    given = _given(bundle, found, arguments)
    for note in (*known.notes, *given.notes):
        progress.note(note)
    references = None
    if arguments.model:
        progress.stage("loading the reference, ONNX Runtime")
        threads = arguments.threads or bundle.manifest.threads
        references = comparison.reference_for(
            bundle, arguments.model, threads, progress
        )
        facts = bundle.manifest.quantisation
        if facts is not None and calibrated_on(facts, found):
            progress.note(
                "some of these images calibrated the network: it may do better on them than on others"
            )
    reference = references.exact if references else None
    with open_session(bundle, arguments, progress) as session:
        before = session.board()
        progress.stage("comparing")
        if references is not None and (found or fixed):
            items = comparison.read_inputs(
                bundle, found, fixed, progress, known.classes
            )
            results = comparison.compare_images(
                bundle, session, references, items, progress, given
            )
        else:
            results = comparison.compare_golden(bundle, session, progress)
        emulated = session.origin is Origin.EMULATED
        tensors = golden.read_golden(bundle)[0].inputs
        repeat = arguments.repeat or (0 if emulated else _DEFAULT_REPEAT)
        if repeat:
            progress.stage(f"timing {counted(repeat, 'inference')}")
        # A ratio needs the same hardware under both.
        alternating = reference if session.origin is Origin.HOST else None
        ours, theirs = comparison.time_both(
            session, alternating, tensors, repeat, progress
        )
        operators = []
        if arguments.report is not None and not emulated:
            progress.stage("timing each operator")
            operators = session.profile(tensors)
        after = session.board() if before else None
        return CheckResult(
            bundle=bundle,
            compared="images" if found or fixed else "golden inputs",
            skipped=max(0, len(found) - len(results)),
            origin=session.origin,
            threads=session.threads,
            reference=reference.version
            if reference
            else comparison.built_against(bundle),
            inputs=results,
            latency=ours,
            reference_latency=theirs,
            operators=tuple(operators),
            figures=session.figures(),
            board=Board(before, after) if before and after else None,
            boards=session.done,
            labels=known.source,
            findings=findings.summary(
                [(item.path, item.found) for item in results if item.found], given
            ),
        )


def _given(
    bundle: Bundle, found: Sequence[Path], arguments: argparse.Namespace
) -> Given:
    """Labels of boxes, and masks, of the files found.

    Raises:
        UserError: the network's answers are not of that kind, or the labels are broken.
    """
    from netship.runtime_demo import coco, masks
    from netship.runtime_demo.findings import Given

    task, kind = bundle.manifest.task, bundle.manifest.kind
    labels = None
    if arguments.masks and kind != "segment":
        raise UserError(
            f"--masks: {bundle.path} does not segment, its task is {kind}; leave it out"
        )
    if arguments.masks and not arguments.masks.is_dir():
        raise UserError(
            f"{arguments.masks}: no such folder; --masks takes a folder of PNGs"
        )
    if arguments.labels and kind not in ("classify", "detect"):
        raise UserError(
            f"--labels: {bundle.path} finds no classes or boxes, its task is {kind}; leave it out"
        )
    if arguments.labels and task and task.detector:
        coco.require()
        detector = task.detector
        labels = coco.read(
            arguments.labels, bundle.labels(), detector.classes, detector.background
        ).of_photographs(found)
    if arguments.masks:
        axis = task.class_axis if task else None
        classes = len(bundle.labels()) or None
        if axis is not None:
            classes = bundle.manifest.outputs[0].shape[axis]
        files = masks.of_photographs(arguments.masks, found)
        left = masks.without_photograph(arguments.masks, files)
        return Given(None, files, classes, left)
    return Given(labels, notes=labels.notes if labels else ())


def _known_classes(
    bundle: Bundle, found: Sequence[Path], arguments: argparse.Namespace
) -> Known:
    from netship.compile.frontend.sources import is_built_in
    from netship.runtime_demo import known_classes

    first, kind = bundle.manifest.outputs[0], bundle.manifest.kind
    if kind != "classify" or not bundle.manifest.scores_classes:
        return known_classes.Known({})
    known = known_classes.find(
        found, arguments.images, arguments.labels, bundle.labels(), first.shape[1]
    )
    name = bundle.manifest.model.name
    if known.classes and not arguments.labels and is_built_in(name):
        why = f"{known.source}: not used, as the built-in network's weights are seeded"
        return known_classes.Known({}, notes=(why,))
    return known


def calibrated_on(facts: Quantisation, found: Sequence[Path]) -> bool:
    """Whether one of the images calibrated the ranges of activations."""
    from netship.bundle.store import sha256_of

    calibrating = {image.sha256 for image in facts.images}
    return any(sha256_of(path) in calibrating for path in found)


def _table(result: CheckResult) -> str:
    mapped = result.other_classes
    lines = [_image_line(r, mapped is not None) for r in result.inputs]
    lines += [
        f"note: {shown(r.name)}: {_swapped(r.swap)}" for r in result.inputs if r.swap
    ]
    from netship.runtime_demo import microcontroller

    tolerance = "other shapes"
    if result.excess is not None:
        tolerance = f"at most {result.excess:.2g} of an element's tolerance"
    if result.steps is not None:
        tolerance = f"{result.steps.found:.0f} of {counted(result.steps.accepted, 'accepted step')} of {result.step:.3g}"
    worst = f"{magnitude(result.max_abs_error, 2)}, {magnitude(result.relative_error)} of the reference's range"
    rms = max(r.accuracy.rms_error for r in result.inputs)
    cosine = min(r.accuracy.cosine for r in result.inputs)
    error = f"max-abs {worst} ({tolerance}); RMS {magnitude(rms)}; cosine {cosine:.9f}"
    lines += ["", f"error      {mapped.text() if mapped else error}"]
    if result.classifies:
        size = len(result.inputs)
        same = [
            sum(r.same_top1 for r in result.inputs),
            sum(r.same_top5 for r in result.inputs),
            sum(r.swap is None for r in result.inputs),
        ]
        lines.append(
            f"agreement  top-1 {same[0]}/{size}, top-5 {same[1]}/{size}, in the same order {same[2]}/{size}, "
            f"with {result.reference}"
        )
    lines += result.findings.lines(result.bundle.labels())
    right, judged = result.labelled()
    if judged:
        lines.append(
            f"labels     {right} of {judged} with a known class are right, {result.labelled(5)[0]} among the best five "
            f"({result.labels})"
        )
        wrong = [_taken(result, each) for each in result.confusion() if each.taken]
        if wrong:
            lines.append(f"confused   {listed(wrong, 4)}")
    if result.vs_float is not None:
        loss, found = result.vs_float, result.float_findings
        words = [f"cosine {loss['cosine']:.4f}"]
        if loss["top1_agreement"] is not None:
            words.insert(0, f"top-1 {loss['top1_agreement']:.1%}")
        words += [each.text() for each in (found.boxes, found.masks) if each]
        if found.masks:
            words[-1] = f"same class in {words[-1]}"
        end = ";" if found.boxes or found.masks else ""
        lines.append(
            f"float32    {', '.join(words)}{end} against the network that was quantised"
        )
    if result.figures is None:
        lines += _latency_lines(result)
        lines += result.board.lines() if result.board else []
        lines += _share_lines(result)
    else:
        lines += microcontroller.lines(result.figures)
    verdict = (
        "PASSED"
        if result.passed
        else "FAILED: farther from the reference than the tolerance"
    )
    boxes = result.findings.boxes
    if boxes and not boxes.same:
        verdict += f"; boxes: {boxes.missing} missing, {boxes.extra} extra"
    elif boxes and not result.passed:
        verdict += "; all boxes match"
    assumed = "; preprocessing assumed, not given" if result.assumed else ""
    seeded = "; seeded weights: its answers mean nothing" if result.seeded else ""
    lines.append(
        f"verdict    {verdict}, {_compared(result)}, {result.origin}{assumed}{seeded}"
    )
    return "\n".join(lines)


def _taken(result: CheckResult, of: Confusion) -> str:
    others = [f"{_short(result, k)} ({count})" for k, count in of.taken]
    return f"{_short(result, of.expected)}: {of.right} of {of.size} right, taken for {listed(others, 3)}"


def _short(result: CheckResult, number: int) -> str:
    name, *_ = result.class_name(number).split(",")
    return shown(name, 24)


def _image_line(result: InputResult, mapped: bool) -> str:
    error = f"max-abs {magnitude(result.accuracy.max_abs_error)}"
    if mapped:
        error = f"{counted(result.differing, 'class number')} {'differs' if result.differing == 1 else 'differ'}"
    if result.found:
        end = "" if mapped else f"; {error}"
        return f"{shown(result.name):<22} {result.found.text()}{end}"
    if not result.ours:
        return f"{shown(result.name):<22} {error}"
    return (
        f"{shown(result.name):<22} ours {_answer(result.ours[0]):<36} "
        f"reference {_answer(result.reference[0]):<36} {error}"
    )


def _answer(answer: Answer) -> str:
    return f"{answer.probability:6.1%} {shown(answer.label)[:24] or f'class {answer.class_index}'}"


def _swapped(swap: Swap) -> str:
    explains = "explain" if swap.gap <= swap.tolerances else "do not explain"
    return (
        f"class {swap.ours} in the place of class {swap.reference}; the reference has them {swap.gap:.1e} apart, "
        f"which their tolerances, {swap.tolerances:.1e}, {explains}"
    )


def _latency_lines(result: CheckResult) -> list[str]:
    if result.latency is None:
        # An emulator of C has no times even then.
        manifest = result.bundle.manifest
        how = "" if manifest.is_source else "; --repeat N asks for it"
        if result.origin == "emulated" and manifest.target.machine == "aarch64":
            how = "; python -m meter estimates it"
        return [f"latency    not measured ({result.origin}{how})"]
    lines = [
        f"latency    {_times(result.latency)}, {counted(result.threads, 'thread')}, {result.origin}"
    ]
    if result.reference_latency is not None:
        ratio = result.latency.median / result.reference_latency.median
        lines.append(
            f"           {_times(result.reference_latency)}, {result.reference}, in alternation: "
            f"ours takes {ratio:.2f} × its median"
        )
    return lines


def _compared(result: CheckResult) -> str:
    """Such as "1 image", "2 golden inputs" and "3 images (1 file skipped)"."""
    compared = counted(len(result.inputs), result.compared.removesuffix("s"))
    if result.skipped:
        compared += f" ({counted(result.skipped, 'file')} skipped)"
    return compared


def _share_lines(result: CheckResult) -> list[str]:
    if len(result.boards) < 2:
        return []
    shares = ", ".join(f"{name} did {done}" for name, done in result.boards.items())
    return [f"boards     {shares} of {_compared(result)}"]


def _times(latency: Latency) -> str:
    tails = ""
    if latency.has_percentiles:
        tails = f"p90 {milliseconds(latency.p90)}, p99 {milliseconds(latency.p99)}, "
    return (
        f"median {milliseconds(latency.median)}, {tails}minimum {milliseconds(latency.minimum)}, "
        f"{counted(len(latency.samples), 'inference')}"
    )


if __name__ == "__main__":
    run_command(main)
