"""A float32 network quantised by ONNX Runtime, its ranges from the user's photographs."""

from __future__ import annotations

import difflib
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal, NamedTuple

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper

from netship.bundle.task import Task
from netship.compile.frontend.fold import is_onnx, opset
from netship.compile.frontend.model import Model
from netship.compile.frontend.names import fresh_names
from netship.compile.frontend.reference import Reference
from netship.compile.quantize import bias, heads
from netship.compile.quantize.agreement import Agreement, agreement
from netship.compile.quantize.heads import Head
from netship.compile.quantize.room import make_room
from netship.targets.child import run_in_child
from netship.targets.errors import UserError, first_line
from netship.targets.escapes import counted, shown
from netship.targets.onnx_runtime import Session
from netship.targets.progress import Progress

Array = NDArray[np.float32]
Sample = Sequence[NDArray[Any]]
"""The inputs of one inference."""

Method = Literal["min-max", "percentile", "entropy"]
# By our names: ONNX Runtime's.
METHODS: dict[Method, str] = {
    "min-max": "MinMax",
    "percentile": "Percentile",
    "entropy": "Entropy",
}


class Job(NamedTuple):
    """A quantisation: the float network, the images that calibrate it, and the nodes that stay in float32."""

    source: onnx.ModelProto
    samples: Sequence[Sample]
    method: Method
    kept: list[str]


class Calibrated(NamedTuple):
    """A quantised model, and how the ranges of its activations were found.

    Attributes:
        method: of ``METHODS``, the one whose answers are nearest to the float network's; of those that lose little
            enough where there is one.
        cosines: of each method: the smallest cosine of an output, on the calibration images.
        folded: the float network, batch normalisation folded, its tensors named as the quantised one's.
        heads: what stays in float32 because its values differ too much in range.
    """

    model: Model
    folded: onnx.ModelProto
    method: Method
    cosines: dict[str, float]
    heads: tuple[Head, ...] = ()


def quantise(
    model: Model,
    samples: Sequence[Sample],
    unsigned: bool,
    progress: Progress,
    keep_float: Sequence[str] = (),
    task: Task | None = None,
) -> Calibrated:
    """Quantise a float model: weights symmetric per channel, activations per tensor.

    Batch normalisation is folded before, and biases are corrected (`compile.quantize.bias`). A ReLU6 disappears: its bounds are those of its
    output's type, so no range is left for it to cut.

    Args:
        samples: the inputs of inferences.
        unsigned: activations as uint8, which x86's dot product takes, in the place of int8.
        keep_float: names of nodes that are not quantised; neither are those of `heads.find`.
        task: what the outputs are for, where that is known.

    Raises:
        UserError: there is no such node, or ONNX Runtime's quantiser refuses the network.
    """
    folded, reference = _folded(model), Reference(model)
    kept = nodes_of(folded, model, keep_float)
    apart = heads.find(folded, model, samples, task)
    kept = list(dict.fromkeys([*kept, *(x for each in apart for x in each.nodes)]))
    expected = [reference.run(*each) for each in samples]
    progress.stage("correcting biases for the rounding of weights")
    source = bias.corrected(folded, [model.feeds(each) for each in samples], kept)
    jobs = [Job(source, samples, method, kept) for method in METHODS]
    candidates = run_jobs(model, jobs, unsigned, progress.stage, progress.tick)
    found: list[tuple[Agreement, Method, Model]] = []
    for method, proto in zip(METHODS, candidates, strict=True):
        made = replace(model, proto=proto)
        candidate = Reference(made)
        answers = [candidate.run(*each) for each in samples]
        found.append((agreement(model, answers, expected, task), method, made))
    _, method, best = max(found, key=lambda each: each[0].rank)
    cosines: dict[str, float] = {x: round(each.cosine, 6) for each, x, _ in found}
    return Calibrated(best, folded, method, cosines, tuple(apart))


def unquantised(model: Model) -> Calibrated:
    """As `quantise`, of a network that cannot be quantised: all of it in float32."""
    folded = _folded(model)
    return Calibrated(replace(model, proto=folded), folded, "min-max", {})


def nodes_of(folded: onnx.ModelProto, model: Model, wanted: Sequence[str]) -> list[str]:
    """The names in ``folded`` of the nodes wanted, each named by itself or by what it makes."""
    known = {
        name: node.name
        for node in folded.graph.node
        for name in (*node.output, node.name)
    }
    for name in wanted:
        if name in known:
            continue
        written = {x for n in model.proto.graph.node for x in (n.name, *n.output)}
        if name in written:
            raise UserError(
                f"--keep-float {shown(name)!r}: this node is computed beforehand, or is part of the convolution before "
                "it; name that one"
            )
        near = difflib.get_close_matches(name, sorted(known), 3, cutoff=0.4)
        hint = (
            f"; did you mean {' or '.join(map(repr, map(shown, near)))}?"
            if near
            else ""
        )
        raise UserError(f"--keep-float {shown(name)!r}: there is no such node{hint}")
    return [known[name] for name in wanted]


def _folded(model: Model) -> onnx.ModelProto:
    """Batch normalisation in the convolutions' weights, in an opset that has scales per channel (13)."""
    proto = model.proto
    if opset(proto) < 13:
        proto = onnx.version_converter.convert_version(proto, 13)
    with tempfile.TemporaryDirectory() as scratch:
        folded = Path(scratch) / "folded.onnx"
        data, name = proto.SerializeToString(), model.identity.name
        Session(data, name, optimisation="basic", optimised=folded)
        made = onnx.load(folded)
    _make_biases_vectors(made.graph)
    # The quantiser knows nodes by their names.
    fresh = fresh_names(node.name for node in made.graph.node)
    for node in made.graph.node:
        node.name = node.name or fresh(node.output[0])
    return made


def _make_biases_vectors(graph: onnx.GraphProto) -> None:
    """The biases of Gemm with one number for each output: the quantiser dies of other forms."""
    constants = {each.name: numpy_helper.to_array(each) for each in graph.initializer}
    fresh = fresh_names([*constants, *(x for n in graph.node for x in n.output)])
    for node in graph.node:
        names = list(node.input)
        if node.op_type != "Gemm" or not constants.keys() >= set(names[1:]):
            continue
        transposed = any(a.name == "transB" and a.i for a in node.attribute)
        outputs = constants[names[1]].shape[0 if transposed else 1]
        if len(names) > 2 and constants[names[2]].size in (1, outputs):
            vector = np.array(np.broadcast_to(constants[names[2]].ravel(), outputs))
            node.input[2] = fresh(f"{names[2]}/vector")
            graph.initializer.append(numpy_helper.from_array(vector, node.input[2]))


def run_jobs(
    model: Model,
    jobs: Sequence[Job],
    unsigned: bool,
    stage: Callable[[str], None],
    tick: Callable[[], None],
) -> list[onnx.ModelProto]:
    """The QDQ graph of each; ONNX Runtime's calibration ends its process where it crashes."""
    return run_in_child(_quantised, model, jobs, unsigned, stage=stage, tick=tick)


def _quantised(
    model: Model, jobs: Sequence[Job], unsigned: bool, stage: Callable[[str], None]
) -> list[onnx.ModelProto]:
    found = []
    with tempfile.TemporaryDirectory() as scratch:
        # Of a model in memory it writes external data, and loses them.
        source, path = Path(scratch) / "float.onnx", Path(scratch) / "int8.onnx"
        for job in jobs:
            onnx.save(job.source, source)
            stage(
                f"calibrating by {job.method} on {counted(len(job.samples), 'image')}"
            )
            # There is no histogram of a tensor that is nearly constant, nor of a network without one to quantise.
            for method in dict.fromkeys((job.method, "min-max")):
                feeds = map(model.feeds, job.samples)
                try:
                    _quantise(source, path, feeds, job.kept, METHODS[method], unsigned)
                    break
                except Exception as error:
                    if method != "min-max":
                        continue
                    raise UserError(
                        f"{model.identity.name}: ONNX Runtime's quantiser refuses it ({first_line(error)[:200]}); "
                        "give a QDQ model, or build without --quantize"
                    ) from error
            found.append(_plain(onnx.load(path)))
            make_room(found[-1])
    return found


def _quantise(
    source: Path,
    path: Path,
    feeds: Iterator[dict[str, NDArray[Any]]],
    kept: list[str],
    method: str,
    unsigned: bool,
) -> None:
    from onnxruntime import quantization

    types = quantization.QuantType
    quantization.quantize_static(
        source,
        path,
        SimpleNamespace(get_next=partial(next, feeds, None)),
        quant_format=quantization.QuantFormat.QDQ,
        nodes_to_exclude=kept,
        per_channel=True,
        weight_type=types.QInt8,
        activation_type=types.QUInt8 if unsigned else types.QInt8,
        calibrate_method=quantization.CalibrationMethod[method],
        extra_options={"WeightSymmetric": True, "ActivationSymmetric": False},
    )


def _plain(proto: onnx.ModelProto) -> onnx.ModelProto:
    """Without the domains that ONNX Runtime imports and nothing uses."""
    imports = [each for each in proto.opset_import if is_onnx(each.domain)]
    del proto.opset_import[:]
    proto.opset_import.extend(imports)
    return proto
