"""Run inputs through a bundle and through the reference, and time both in alternation."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from netship.bundle import golden, inputs
from netship.bundle.accuracy import INT8_STEPS, compare, first_swap, in_steps
from netship.bundle.golden import Check
from netship.bundle.store import Bundle, sha256_of
from netship.compile import passes
from netship.compile.frontend import byte_input, gate, sources
from netship.compile.frontend.model import Model
from netship.compile.frontend.reference import Reference
from netship.compile.ir.graph import Graph
from netship.compile.quantize import bfloat16, float16
from netship.compile.quantize.answer import index_tolerances
from netship.devices.sessions.session import Origin, Session
from netship.runtime_demo import file_names, findings
from netship.runtime_demo.findings import Given, Photograph
from netship.runtime_demo.result import InputResult, Latency, Steps, answers
from netship.targets.errors import UserError
from netship.targets.progress import Progress

# Classes and other indices have no steps.
_WHOLE = ("int32", "int64")
_ROUND = 5
# ONNX Runtime's threads were observed to spin for 40 ms after an inference, on a core that ours need.
_PAUSE_SECONDS = 0.1
# A board is warm when the median of a round differs by this share from the one before, or after so many rounds.
_STEADY, _MOST_WARMING_ROUNDS = 0.03, 10


class Input(NamedTuple):
    """The inputs of one inference, where they came from, the class it is known to show, and the photograph's width and height."""

    name: str
    path: Path | None
    tensors: tuple[NDArray[Any], ...]
    expected: int | None = None
    size: tuple[int, int] | None = None


class References(NamedTuple):
    """The network that a bundle is compared with, and for one that a build quantised the float32 network too.

    Attributes:
        integers: the operators of an int8 network with outputs of whole numbers.
    """

    exact: Reference
    floating: Reference | None
    integers: Graph | None = None


def reference_for(
    bundle: Bundle, model: str, threads: int, progress: Progress
) -> References:
    """ONNX Runtime on the model that the bundle was built from, and on its QDQ graph."""
    ports = bundle.manifest.inputs
    shapes = {each.name: each.shape for each in ports}
    layout = (bundle.manifest.image or ports[0]).layout or "data"
    how, image = bundle.manifest.preprocessing, bundle.manifest.image
    if how and how.inside and image:
        layout, size = how.inside.layout, image.size
        first = layout == "NCHW"
        channels = (image.channels,)
        shapes[image.name] = (1, *channels, *size) if first else (1, *size, *channels)
    try:
        source = sources.find(model, shapes, layout, progress.stage)
    except UserError as unfit:
        # Another network may have another input. That it is another one is the better message.
        try:
            source = sources.find(model, {}, None, progress.stage)
        except UserError:
            raise unfit from None
        _check_same(bundle, model, source)
        raise
    _check_same(bundle, model, source)
    if how and how.inside:
        bytes_of = byte_input.taking_bytes(source.model, how.inside)
        source = replace(source, model=bytes_of)
    half = bundle.manifest.float16
    reference = Reference(source.model, threads)
    if half is not None:
        graph = float16.graph_of(source.model, half)
        reference = float16.Float16Reference(source.model, graph, threads)
    if (short := bundle.manifest.bfloat16) is not None:
        graph = bfloat16.graph_of(source.model, short)
        reference = bfloat16.BFloat16Reference(source.model, graph, threads)
    facts = bundle.manifest.quantisation
    if facts is None:
        return References(reference, None)
    counts = any(each.dtype in _WHOLE for each in bundle.manifest.outputs)

    def integers(model: Model) -> Graph | None:
        return passes.read(model.proto, passes.INTEGERS) if counts else None

    if not facts.model:
        return References(reference, None, integers(source.model))
    quantised = bundle.path / facts.model
    if not quantised.is_file() or sha256_of(quantised) != facts.sha256:
        raise UserError(
            f"{quantised}: missing or changed since the build; copy the whole bundle again"
        )
    if how and how.inside:
        shapes, layout = {}, "NHWC"
    exact = gate.load(quantised, shapes, layout)
    return References(Reference(exact, threads), reference, integers(exact))


def _check_same(bundle: Bundle, model: str, source: sources.Source) -> None:
    theirs, ours = source.model.identity, bundle.manifest.model
    if (theirs.sha256, theirs.external_data) != (ours.sha256, ours.external_data):
        raise UserError(
            f"{model}: its SHA-256 is {theirs.sha256[:12]}…, but {bundle.path} was built from "
            f"{ours.name} with {ours.sha256[:12]}…; give that model, or build again"
        )


def read_inputs(
    bundle: Bundle,
    files: Sequence[Path],
    fixed: Mapping[str, NDArray[Any]],
    progress: Progress,
    classes: Mapping[Path, int] | None = None,
) -> Iterator[Input]:
    """The files as inputs, one at a time, with the classes that they are known to show.

    Of several files one that cannot be read is skipped with a note.

    Args:
        fixed: inputs that are the same in each inference, by name; where these are all, the one inference of them.

    Raises:
        UserError: no file can be read.
    """
    manifest = bundle.manifest
    if len(fixed) == len(manifest.inputs):
        yield Input("inputs", None, tuple(fixed[each.name] for each in manifest.inputs))
        return
    left, titles = len(files), file_names.titles(files)
    for path in files:
        try:
            read = inputs.read(path, manifest.inputs, manifest.preprocessing, fixed)
        except UserError as error:
            left -= 1
            if not left:
                raise
            progress.note(f"skipped {error}")
            continue
        for note in read.notes:
            progress.note(note)
        known = (classes or {}).get(path)
        yield Input(titles[path], path, read.tensors, known, read.size)


def compare_images(
    bundle: Bundle,
    session: Session,
    references: References,
    items: Iterator[Input],
    progress: Progress,
    given: Given,
) -> tuple[InputResult, ...]:
    """Each input through the bundle, on as many boards as the session has, and through ONNX Runtime."""
    results = []
    for item, ours in session.run_all(items, lambda item: item.tensors):
        progress.tick()
        expected = _expected(bundle, references, item.tensors)
        result = _result(bundle, item, ours, expected, given)
        if references.floating is not None:
            floating = references.floating.run(*item.tensors)
            result = replace(
                result,
                vs_float=compare(ours, floating),
                float_top1=int(floating[0].argmax()),
                float_found=findings.find(
                    bundle.manifest,
                    Photograph(item.path, item.size),
                    ours,
                    floating,
                    Given(),
                ),
            )
        results.append(result)
    return tuple(results)


def compare_golden(
    bundle: Bundle, session: Session, progress: Progress
) -> tuple[InputResult, ...]:
    """The bundle's golden inputs against the outputs stored with them."""
    checks = golden.read_golden(bundle)
    items = (
        Input(f"golden input {index}", None, tuple(check.inputs))
        for index, check in enumerate(checks)
    )
    results = []
    outputs = session.run_all(items, lambda item: item.tensors)
    for (item, ours), check in zip(outputs, checks, strict=True):
        progress.tick()
        results.append(_result(bundle, item, ours, check, Given()))
    return tuple(results)


def _expected(
    bundle: Bundle, references: References, tensors: Sequence[NDArray[Any]]
) -> Check:
    """What the reference answers, and how far from it a bundle may be: of int8, `INT8_STEPS`; of classes, those that tie."""
    facts, reference = bundle.manifest.quantisation, references.exact
    if facts is None:
        return reference.check(*tensors)
    answer = reference.run(*tensors)
    near = [
        in_steps(output, step, INT8_STEPS)
        for output, step in zip(answer, facts.output_steps, strict=True)
    ]
    if references.integers:
        for k, each in index_tolerances(references.integers, tensors, answer).items():
            near[k] = each
    return Check(tensors, answer, near)


def _result(
    bundle: Bundle,
    item: Input,
    ours: Sequence[NDArray[Any]],
    check: Check,
    given: Given,
) -> InputResult:
    labels, probabilities = bundle.labels(), bundle.manifest.probabilities
    facts = bundle.manifest.quantisation
    classifies = bundle.manifest.kind == "classify" and bundle.manifest.scores_classes
    own, reference = (
        answers(outputs[0], probabilities, labels) if classifies else ()
        for outputs in (ours, check.outputs)
    )
    best = np.sort(check.outputs[0].astype(np.float64).ravel())[::-1]
    steps = None
    if facts is not None and bundle.manifest.outputs[0].dtype not in _WHOLE:
        errors = [
            np.abs(found - wanted).max() / step
            for found, wanted, step in zip(
                ours, check.outputs, facts.output_steps, strict=True
            )
        ]
        allowed = check.tolerances[0].max() / facts.output_steps[0]
        steps = Steps(float(max(errors)), int(allowed))
    return InputResult(
        name=item.name,
        path=item.path,
        ours=own,
        reference=reference,
        accuracy=compare(ours, check.outputs, check.tolerances),
        gap=float(best[0] - best[1]) if best.size > 1 else 0.0,
        swap=first_swap(ours[0], check.outputs[0], check.tolerances[0])
        if reference
        else None,
        expected=item.expected,
        errors=np.abs(ours[0].astype(np.float64) - check.outputs[0]).ravel(),
        output=ours[0],
        steps=steps,
        found=findings.find(
            bundle.manifest,
            Photograph(item.path, item.size),
            ours,
            check.outputs,
            given,
        ),
    )


def time_both(
    session: Session,
    reference: Reference | None,
    tensors: Sequence[NDArray[Any]],
    repeat: int,
    progress: Progress,
) -> tuple[Latency | None, Latency | None]:
    """Latencies of ``repeat`` warm inferences of each, in alternating rounds so that a noisy machine hits both.

    The second is None without a reference, both without a ``repeat``. Each round begins with one that does not count, after a pause in which the other's threads stop spinning.
    """
    ours: list[float] = []
    theirs: list[float] = []
    if repeat and session.origin is Origin.BOARD:
        _warm_up(session, tensors, progress)
    while len(ours) < repeat:
        progress.tick()
        size = min(_ROUND, repeat - len(ours))
        time.sleep(_PAUSE_SECONDS)
        ours += session.time(tensors, size + 1)[1:]
        if reference is not None:
            time.sleep(_PAUSE_SECONDS)
            theirs += reference.time(tensors, size + 1)[1:]
    return Latency.of(ours), Latency.of(theirs)


def _warm_up(
    session: Session, tensors: Sequence[NDArray[Any]], progress: Progress
) -> None:
    before = 0.0
    for _ in range(_MOST_WARMING_ROUNDS):
        progress.tick()
        now = float(np.median(session.time(tensors, _ROUND)))
        if abs(now - before) <= _STEADY * now:
            return
        before = now


def built_against(bundle: Bundle) -> str:
    """The runtime that computed the golden outputs."""
    verification = bundle.manifest.measured.get("verification") or {}
    return str(verification.get("reference", "ONNX Runtime"))
