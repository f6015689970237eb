"""A float32 network quantised by ONNX Runtime, its ranges from the user's photographs."""

from __future__ import annotations

import difflib
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from math import prod
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal, NamedTuple

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper

from netship.bundle.accuracy import INT8_COSINE, cosine
from netship.compile.frontend.fold import is_onnx, opset
from netship.compile.frontend.model import Model
from netship.compile.frontend.names import fresh_names
from netship.compile.frontend.reference import Reference
from netship.compile.quantize import bias
from netship.compile.quantize.room import make_room
from netship.targets.child import run_in_child
from netship.targets.errors import UserError, first_line
from netship.targets.escapes import counted, shown
from netship.targets.onnx_runtime import Session
from netship.targets.progress import Progress

Array = NDArray[np.float32]
Sample = Sequence[NDArray[Any]]
"""The inputs of one inference."""

_Method = Literal["min-max", "percentile", "entropy"]
# By our names: ONNX Runtime's.
METHODS: dict[_Method, str] = {
    "min-max": "MinMax",
    "percentile": "Percentile",
    "entropy": "Entropy",
}


class Calibrated(NamedTuple):
    """A quantised model, and how the ranges of its activations were found.

    Attributes:
        method: of ``METHODS``, the one whose answers are nearest to the float network's; of those that lose little
            enough where there is one.
        cosines: of each method: the smallest cosine of an output, on the calibration images.
        folded: the float network, batch normalisation folded, its tensors named as the quantised one's.
    """

    model: Model
    folded: onnx.ModelProto
    method: _Method
    cosines: dict[str, float]


def quantise(
    model: Model,
    samples: Sequence[Sample],
    unsigned: bool,
    progress: Progress,
    keep_float: Sequence[str] = (),
) -> Calibrated:
    """Quantise a float model: weights symmetric per channel, activations per tensor.

    Batch normalisation is folded before, and biases are corrected (`compile.quantize.bias`). A ReLU6 disappears: its bounds are those of its
    output's type, so no range is left for it to cut.

    Args:
        samples: the inputs of inferences.
        unsigned: activations as uint8, which x86's dot product takes, in the place of int8.
        keep_float: names of nodes that are not quantised.

    Raises:
        UserError: there is no such node, or ONNX Runtime's quantiser refuses the network.
    """
    folded, reference = _folded(model), Reference(model)
    kept = _nodes(folded, model, keep_float)
    expected = [reference.run(*each) for each in samples]
    progress.stage("correcting biases for the rounding of weights")
    source = bias.corrected(folded, [model.feeds(each) for each in samples], kept)
    # Its calibration ends the process with ONNX Runtime, where that crashes.
    candidates = run_in_child(
        _candidates,
        *(source, model, samples, unsigned, kept),
        stage=progress.stage,
        tick=progress.tick,
    )
    found: list[tuple[bool, float, _Method, Model]] = []
    for method, proto in candidates.items():
        candidate = Reference(replace(model, proto=proto))
        answers = [candidate.run(*each) for each in samples]
        least, _ = least_cosine(model, answers, expected)
        same = sum(map(same_class, answers, expected))
        enough = is_enough(least, same if classifies(model) else len(samples), samples)
        found.append((enough, least, method, replace(model, proto=proto)))
    *_, method, best = max(found, key=lambda each: each[:2])
    return Calibrated(
        best, folded, method, {name: round(least, 6) for _, least, name, _ in found}
    )


def unquantised(model: Model) -> Calibrated:
    """As `quantise`, of a network that cannot be quantised: all of it in float32."""
    folded = _folded(model)
    return Calibrated(replace(model, proto=folded), folded, "min-max", {})


def is_enough(least: float, same: int, images: Sequence[Sample]) -> bool:
    """Whether int8 loses so little that a build accepts it.

    Args:
        least: smallest cosine of an output against float32's.
        same: on how many images the best class is float32's.
    """
    return least >= INT8_COSINE and len(images) - same <= max(1, len(images) // 16)


def classifies(model: Model) -> bool:
    """Whether the only output is one score a class."""
    shape = model.outputs[0].shape
    return len(model.outputs) == 1 and prod(shape) == max(shape, default=1)


def same_class(ours: Sequence[Array], theirs: Sequence[Array]) -> bool:
    """Of the first output."""
    return int(ours[0].argmax()) == int(theirs[0].argmax())


def least_cosine(
    model: Model, ours: Sequence[Sample], theirs: Sequence[Sample]
) -> tuple[float, str]:
    """The smallest cosine of an output, and the output's name.

    Of a classifier it is that of each inference. An output of another network is compared over all inferences at once:
    a detector's scores where nothing is to be seen are near 0, and their direction means nothing.

    Args:
        ours, theirs: the outputs of each inference.
    """
    one_each = classifies(model)
    found = []
    for number, output in enumerate(model.outputs):
        pairs = [
            (a[number].ravel(), b[number].ravel())
            for a, b in zip(ours, theirs, strict=True)
        ]
        if not one_each:
            first, second = zip(*pairs, strict=True)
            pairs = [(np.concatenate(first), np.concatenate(second))]
        found += [(cosine(a, b), output.name) for a, b in pairs]
    return min(found)


def _nodes(folded: onnx.ModelProto, model: Model, wanted: Sequence[str]) -> list[str]:
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


def _candidates(
    folded: onnx.ModelProto,
    model: Model,
    samples: Sequence[Sample],
    unsigned: bool,
    kept: list[str],
    stage: Callable[[str], None],
) -> dict[_Method, onnx.ModelProto]:
    """The QDQ graph by each method."""
    from onnxruntime import quantization

    types = quantization.QuantType
    found = {}
    with tempfile.TemporaryDirectory() as scratch:
        # Of a model in memory it writes external data, and loses them.
        source, path = Path(scratch) / "float.onnx", Path(scratch) / "int8.onnx"
        onnx.save(folded, source)
        for method, theirs in METHODS.items():
            stage(f"calibrating by {method} on {counted(len(samples), 'image')}")

            feeds = map(model.feeds, samples)
            try:
                quantization.quantize_static(
                    source,
                    path,
                    SimpleNamespace(get_next=partial(next, feeds, None)),
                    quant_format=quantization.QuantFormat.QDQ,
                    nodes_to_exclude=kept,
                    per_channel=True,
                    weight_type=types.QInt8,
                    activation_type=types.QUInt8 if unsigned else types.QInt8,
                    calibrate_method=quantization.CalibrationMethod[theirs],
                    extra_options={
                        "WeightSymmetric": True,
                        "ActivationSymmetric": False,
                    },
                )
            except Exception as error:
                raise UserError(
                    f"{model.identity.name}: ONNX Runtime's quantiser refuses it ({first_line(error)[:200]}); "
                    "give a QDQ model, or build without --quantize"
                ) from error
            found[method] = _plain(onnx.load(path))
            make_room(found[method])
    return found


def _plain(proto: onnx.ModelProto) -> onnx.ModelProto:
    """Without the domains that ONNX Runtime imports and nothing uses."""
    imports = [each for each in proto.opset_import if is_onnx(each.domain)]
    del proto.opset_import[:]
    proto.opset_import.extend(imports)
    return proto
