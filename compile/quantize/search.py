"""Other ways to quantise a network that loses too much: other ranges, and a few layers in float32.

Each is judged on photographs that did not calibrate it: the calibration images are two halves, and each half is judged
by what the other one calibrated. The way that is taken is calibrated with all of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import NamedTuple

import onnx

from netship.bundle.manifest import Judging, LayerLoss, QuantisedWay
from netship.compile.frontend.model import Model
from netship.compile.ir.graph import Graph
from netship.compile.quantize import bias
from netship.compile.quantize.calibrate import (
    Calibrated,
    Job,
    Method,
    Sample,
    nodes_of,
    run_jobs,
)
from netship.compile.quantize.judge import RULE, Array, Judged, answers, judge
from netship.compile.quantize.loss import by_layer
from netship.targets.escapes import counted, ending, listed
from netship.targets.progress import Progress

FEWEST_IMAGES = 4
"""Halves of fewer calibrate nothing."""
# Of the network's multiply-adds in float32.
_LARGEST_SHARE = 0.15
# Layers that are tried on their own, and with the one before; and how many of these sets are joined at most.
_TRIED, _PAIRS, _KEPT = 6, 3, 4
# Bytes of networks that are quantised in one process.
_AT_ONCE = 1 << 28
# Layers in the manifest.
_LISTED = 32
# By how many dB the signal to noise must rise for a layer to be kept: its noise falls by a ninth.
_WORTH = 0.5
_WEIGHTED = ("Conv", "ConvTranspose", "Gemm", "MatMul")


class Recipe(NamedTuple):
    """How a network is quantised.

    Attributes:
        kept: names of nodes in float32.
        corrected: biases take back what the rounding of weights moves.
    """

    method: Method
    kept: tuple[str, ...] = ()
    corrected: bool = True


class Found(NamedTuple):
    """The best way that was found.

    Attributes:
        kept: the layers that it leaves in float32, those on request not counted.
        judged: on photographs that did not calibrate.
        tried: every way with its figures, and the layers that lose most, for the manifest.
    """

    calibrated: Calibrated
    kept: tuple[str, ...]
    judged: Judged
    tried: Judging


def search(
    first: Calibrated,
    model: Model,
    samples: Sequence[Sample],
    graph: Graph,
    *,
    unsigned: bool,
    keep_float: Sequence[str],
    strict: bool,
    progress: Progress,
) -> Found:
    """The best way to quantise ``model``; it is ``first`` where that is good on other photographs.

    Args:
        first: the network by the usual way.
        samples: at least ``FEWEST_IMAGES``.
        graph: of ``first``.
        keep_float, strict: as `quantise` and `prepare` have them; ``strict`` leaves no further layer in float32.
    """
    trials = _Trials(first.folded, model, samples, unsigned, progress)
    heads = (name for head in first.heads for name in head.nodes)
    wanted = nodes_of(first.folded, model, keep_float)
    asked = tuple(dict.fromkeys([*wanted, *heads]))
    usual = Recipe(first.method, asked)
    others: list[Method] = ["min-max", "percentile"]
    ways = [Recipe(each, asked) for each in others if each != first.method]
    plain = Recipe("min-max", asked, corrected=False)
    judged = trials.judge([usual, *ways, plain])
    best = usual if judged[usual].good else max([usual, *ways], key=trials.rank)
    layers = _layers(first, graph, samples[0], asked)
    if not judged[best].good and not strict:
        best = _in_float(trials, best, layers)
    chosen = trials.judged[best]
    calibrated = first
    if best != usual:
        proto = trials.quantise([(best, samples)])[0]
        int8 = replace(model, proto=proto)
        calibrated = first._replace(model=int8, method=best.method)
    progress.finish()
    kept = tuple(name for name in best.kept if name not in asked)
    tried = [
        QuantisedWay(
            method=way.method,
            bias_correction=way.corrected,
            kept=tuple(name for name in way.kept if name not in asked),
            **each._asdict(),
        )
        for way, each in trials.judged.items()
    ]
    losses = [
        LayerLoss(layer=each.name, fall_decibels=each.fall, multiply_adds=each.share)
        for each in sorted(layers, key=lambda each: -each.fall)[:_LISTED]
    ]
    taken = list(trials.judged).index(best)
    judging = Judging(ways=tuple(tried), taken=taken, layers=tuple(losses))
    return Found(calibrated, kept, chosen, judging)


def report(found: Found, lost: str) -> list[str]:
    """What was tried and taken, line by line.

    Args:
        lost: what the usual way loses on the images that calibrate it.
    """
    lines = [
        f"{lost}, on the images that calibrate",
        f"these ways are judged on {counted(found.judged.images, 'image')} that did not calibrate ({RULE}):",
    ]
    for way in found.tried.ways:
        own = "" if way.bias_correction else "ONNX Runtime's own "
        name = f"{own}{way.method}"
        if way.kept:
            name += f", in float32 {listed([ending(each, 24) for each in way.kept], 4)}"
        same = "" if way.same is None else f"{way.same} of {way.images}, "
        lines.append(f"{same}cosine {way.cosine:.4f}, {way.decibels:.1f} dB: {name}")
    falls = [
        f"{ending(each.layer, 32)} {each.fall_decibels:.1f} dB"
        for each in found.tried.layers[:_TRIED]
        if each.fall_decibels >= _WORTH
    ]
    if falls:
        lines.append(f"signal to noise falls most at: {', '.join(falls)}")
    theirs = next(x.decibels for x in found.tried.ways if not x.bias_correction)
    better = found.judged.decibels - theirs
    kept = f"kept in float32: {listed([ending(x, 40) for x in found.kept], _KEPT)}"
    if not found.kept:
        kept = "no further layer in float32"
    # The usual way is the first that is judged.
    usual = found.tried.taken == 0 and found.judged.good
    why = ", the usual way, which is within these limits" if usual else ""
    taken = f"taken: {found.calibrated.method}{why}, {kept}"
    lines += [
        f"{taken}; {better:+.1f} dB against ONNX Runtime's own quantiser",
        found.judged.text(),
    ]
    return lines


class _Layer(NamedTuple):
    """A layer that may stay in float32.

    Attributes:
        fall: of the signal to noise from its input to its output, in dB.
        share: of the network's multiply-adds.
        reads: the layer that makes its input; "" where that is the network's input, or several make it.
    """

    name: str
    fall: float
    share: float
    reads: str


def _layers(
    first: Calibrated, graph: Graph, sample: Sample, kept: Sequence[str]
) -> list[_Layer]:
    """The layers with weights; the first and the last one before all others, of these what costs most first."""
    folded = first.folded.graph
    constants = {each.name for each in folded.initializer}
    nodes = [
        node
        for node in folded.node
        if node.op_type in _WEIGHTED and node.input[1] in constants
    ]
    names = [node.name for node in nodes]
    makers = {name: node for node in folded.node for name in node.output}

    def layer_of(node: onnx.NodeProto | None) -> str:
        """``node``, or the layer before it, where one chain of operators leads there."""
        while node is not None and node.name not in names:
            sources = [name for name in node.input if name and name not in constants]
            node = makers.get(sources[0]) if len(sources) == 1 else None
        return node.name if node is not None else ""

    macs = dict.fromkeys(names, 0)
    for each in graph.operators:
        macs[each.label] = macs.get(each.label, 0) + each.macs
    total = max(sum(macs.values()), 1)
    falls = dict.fromkeys(names, 0.0)
    for after in by_layer(first, sample):
        if name := layer_of(after.node):
            falls[name] = max(falls[name], after.fall)
    found = [
        _Layer(node.name, falls[node.name], macs[node.name] / total, reads)
        for node in nodes
        if node.name not in kept
        for reads in [layer_of(makers.get(node.input[0]))]
    ]
    ends = (*names[:1], *names[-1:])
    return sorted(found, key=lambda each: (each.name not in ends, -each.fall))


def _in_float(trials: _Trials, usual: Recipe, layers: Sequence[_Layer]) -> Recipe:
    """With the fewest multiply-adds in float32 that make it good; where none do, with what helps measurably.

    A layer is tried on its own, and those that cost most also with the layer before, as what lies between is only then
    not stored.
    """
    shares = {each.name: each.share for each in layers}
    worst = sorted(layers, key=lambda each: -each.fall)[:_PAIRS]
    sets: list[tuple[str, ...]] = [(each.name,) for each in layers[:_TRIED]]
    sets += [(each.reads, each.name) for each in worst if each.reads in shares]

    def share(names: Iterable[str]) -> float:
        return sum(shares[name] for name in names)

    def way(names: Iterable[str]) -> Recipe:
        return usual._replace(kept=(*usual.kept, *names))

    sets = [each for each in sets if share(each) <= _LARGEST_SHARE]
    judged = trials.judge([way(each) for each in sets])
    least = trials.judged[usual].decibels + _WORTH
    helping = [each for each in sets if judged[way(each)].decibels >= least]
    if good := [each for each in helping if judged[way(each)].good]:
        return way(min(good, key=share))
    ratios = {each: judged[way(each)].decibels - _WORTH * len(each) for each in helping}
    best: tuple[str, ...] = ()
    for each in sorted(helping, key=lambda each: -ratios[each])[:_KEPT]:
        wider = tuple(dict.fromkeys((*best, *each)))
        before = trials.judged[way(best)].decibels
        if wider == best or share(wider) > _LARGEST_SHARE:
            continue
        found = trials.judge([way(wider)])[way(wider)]
        if found.decibels >= before + _WORTH * (len(wider) - len(best)):
            best = wider
        if found.good:
            break
    return way(best)


class _Trials:
    """Ways that were judged, each once.

    Attributes:
        judged: by way.
    """

    def __init__(
        self,
        folded: onnx.ModelProto,
        model: Model,
        samples: Sequence[Sample],
        unsigned: bool,
        progress: Progress,
    ) -> None:
        self._folded, self._model, self._unsigned = folded, model, unsigned
        self._samples, self._progress = samples, progress
        self._halves = samples[::2], samples[1::2]
        self._exact = [answers(model, half) for half in self._halves]
        self.judged: dict[Recipe, Judged] = {}

    def rank(self, way: Recipe) -> tuple[bool, float]:
        return self.judged[way].good, self.judged[way].decibels

    def judge(self, ways: Sequence[Recipe]) -> dict[Recipe, Judged]:
        """What each loses on the photographs that did not calibrate it."""
        new = [way for way in ways if way not in self.judged]
        exact = [*self._exact[1], *self._exact[0]]
        most = max(1, _AT_ONCE // (2 * self._folded.ByteSize()))
        for start in range(0, len(new), most):
            some = new[start : start + most]
            jobs = [(way, half) for way in some for half in self._halves]
            made = iter(self.quantise(jobs))
            for way in some:
                ours: list[list[Array]] = []
                for judging in reversed(self._halves):
                    int8 = replace(self._model, proto=next(made))
                    ours += answers(int8, judging)
                self.judged[way] = judge(self._model, ours, exact)
        return {way: self.judged[way] for way in ways}

    def quantise(
        self, jobs: Sequence[tuple[Recipe, Sequence[Sample]]]
    ) -> list[onnx.ModelProto]:
        self._progress.stage(
            f"trying other ways to quantise: {counted(len(jobs), 'network')}"
        )
        made = []
        for way, samples in jobs:
            source = self._folded
            if way.corrected:
                feeds = [self._model.feeds(each) for each in samples]
                source = bias.corrected(source, feeds, way.kept)
            made.append(Job(source, samples, way.method, list(way.kept)))
        tick = self._progress.tick
        return run_jobs(self._model, made, self._unsigned, lambda _: tick(), tick)
