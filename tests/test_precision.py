"""--precision auto: the types of layers, the bound that it keeps, and what it refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
from conftest import run
from integers import oddities, patterns, residuals
from test_quantise import IDENTITY, write_images

import netship
from netship.bundle.manifest import Manifest, Precision
from netship.bundle.store import Bundle, open_bundle
from netship.compile import build as command
from netship.compile.backends.request import BuildRequest
from netship.compile.frontend import gate, sources
from netship.compile.frontend.reference import Reference
from netship.compile.precision import metering, network, search
from netship.compile.quantize import answer, calibrate
from netship.compile.quantize.mixing import layers, mix
from netship.compile.quantize.mixture import Mixture, relative_loss
from netship.compile.quantize.tradeoff import (
    PRECISIONS,
    Choice,
    Passed,
    Traded,
    Tradeoff,
)
from netship.compile.quantize.tradeoff import (
    Precision as Numbers,
)
from netship.targets.errors import UserError
from netship.targets.presets import resolve
from netship.targets.progress import Progress

AUTO = ("--precision", "auto", "--max-loss")


def mixture(proto: onnx.ModelProto, has_float16: bool = False) -> Mixture:
    model = gate.check(proto, IDENTITY)
    samples = [(each,) for each in patterns(proto, 4)]
    calibrated = calibrate.quantise(model, samples, False, Progress(quiet=True))
    return Mixture(model, samples, calibrated, (), has_float16)


@pytest.fixture(scope="module")
def small() -> Mixture:
    return mixture(residuals(), has_float16=True)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    write_images(folder)
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "small.onnx"
    onnx.save(residuals(), path)
    return path


@pytest.fixture(autouse=True, scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Nothing that another test measured."""
    patch = pytest.MonkeyPatch()
    folder = tmp_path_factory.mktemp("cache")
    patch.setattr(network, "cached_path", lambda name, key, **_: folder / key)


def random_tradeoff(seed: int) -> Tradeoff:
    random = np.random.default_rng(seed)
    count = int(random.integers(1, 12))
    traded = []
    for _ in range(count):
        costs: dict[Numbers, float] = {"float32": random.uniform(2, 4)}
        losses: dict[Numbers, float] = {}
        for kind, most in (("int8", 1.5), ("float16", 3.0)):
            if random.random() < 0.8:
                costs[kind] = random.uniform(0.1, most)  # type: ignore[index]
                losses[kind] = random.uniform(0, 0.01)  # type: ignore[index]
        traded.append(Traded(costs, losses))
    tensors = [
        Passed(
            k - 1 if k else None, (k if k < count else None,), int(random.integers(9))
        )
        for k in range(count + 1)
    ]
    return Tradeoff(traded, tensors, 0.1, 0.01)


@pytest.mark.parametrize("seed", range(12))
def test_choices_go_from_the_fastest_types_to_float32(seed: int) -> None:
    tradeoff = random_tradeoff(seed)
    found = list(tradeoff.choices())
    assert found[0] == tradeoff.uniform("int8")
    assert set(found[-1]) == {"float32"}
    for before, after in pairwise(found):
        ranks = [[PRECISIONS.index(x) for x in each] for each in (before, after)]
        assert before != after
        assert all(a <= b for a, b in zip(*ranks, strict=True))


def test_a_conversion_is_paid_once_for_each_type_that_reads_a_tensor() -> None:
    layer = Traded(dict.fromkeys(PRECISIONS, 1.0), {})
    read = (Passed(None, (0,), 5), Passed(0, (1, 2, 3), 10), Passed(3, (None,), 1))
    tradeoff = Tradeoff([layer] * 4, read, border=2.0, float_border=0.5)
    assert tradeoff.cost(("float32",) * 4) == 4
    assert tradeoff.cost(("int8", "float32", "float32", "int8")) == 4 + 10 + 20 + 2
    assert tradeoff.cost(("float16", "int8", "float32", "float32")) == 4 + 2.5 + 25


def test_kernels_are_shared_out_among_their_layers() -> None:
    def kernel(layer: str, cycles: float) -> dict[str, object]:
        return {"layer": layer, "core_cycles": cycles - 1, "memory_cycles": 1.0}

    names = [frozenset(["a", "a.out"]), frozenset(["b"]), frozenset(["c"])]
    operators = [kernel("a.out, b", 4), kernel("c", 4), kernel("", 2)]
    assert metering.layer_cycles(names, operators) == [2.5, 2.5, 5.0]
    assert metering.layer_cycles(names, [kernel("", 3)]) == [1, 1, 1]


def test_the_loss_is_of_each_outputs_range_in_float32() -> None:
    exact = [np.array([0, 4], np.float32), np.array([2], np.float32)]
    other = [np.array([0, 2], np.float32), np.array([4], np.float32)]
    worse = [np.array([1, 4], np.float32), np.array([2], np.float32)]
    assert relative_loss([exact, other], [exact, other]) == 0
    # A quarter of the range of one, none of the other.
    assert relative_loss([worse, other], [exact, other]) == 0.125
    # The second output has one value; its range is that of all inferences.
    second = [exact[0], np.array([3], np.float32)]
    assert relative_loss([second], [exact]) == 0.5
    assert relative_loss([second, other], [exact, other]) == 0.25
    broken = [np.array([0, np.nan], np.float32), exact[1]]
    assert relative_loss([broken], [exact]) == np.inf


@pytest.mark.parametrize("make", [residuals, oddities])
def test_a_mix_answers_as_its_graph_of_integers_and_floats(
    make: Callable[[], onnx.ModelProto],
) -> None:
    proto = make()
    found = mixture(proto)
    floating, quantised = found._calibrated.folded, found._calibrated.model.proto
    every = {name for each in found.layers for name in each.nodes}
    assert every == {node.name for node in floating.graph.node}
    assert found.loss(found.uniform("float32")) < 1e-6
    image = patterns(proto, 5)[4]
    model = gate.check(proto, IDENTITY)
    whole = Reference(gate.check(quantised, IDENTITY)).run(image)
    again = gate.check(mix(floating, quantised, every), IDENTITY)
    assert np.array_equal(Reference(again).run(image)[0], whole[0])
    random = np.random.default_rng(1)
    for _ in range(4):
        choice: Choice = tuple(
            kinds[int(random.integers(len(kinds)))] for kinds in found.precisions
        )
        mixed = found.mixed(choice)
        check = answer.check(mixed.graph, mixed.model, mixed.reference, image)
        assert len(check.outputs) == len(model.outputs)


def test_layers_end_where_the_next_weights_are() -> None:
    (first, *_, last) = layers(mixture(residuals())._calibrated.folded)
    assert first.nodes[:2] == ("stem", "stem.relu6")
    assert first.inputs == ("image",)
    assert "scores" in last.tensors


def test_float16_is_simulated_between_integers(small: Mixture) -> None:
    kinds = {kind for each in small.precisions for kind in each}
    assert kinds == set(PRECISIONS)
    integers, halves = (small.loss(small.uniform(x)) for x in ("int8", "float16"))
    assert 0 < halves < integers / 3
    choice: list[Numbers] = list(small.uniform("int8"))
    choice[0] = "float16"
    mixed = small.mixed(tuple(choice))
    stored = {each.dtype for each in mixed.graph.tensors.values()}
    assert {"float16", "float32", "int8"} <= stored
    assert mixed.rounded is not None
    assert small.loss(tuple(choice)) < integers * 1.2


def asked(model: Path, images: Path, target: str, loss: float) -> BuildRequest:
    options = ["--model", str(model), "--target", target, *AUTO, str(loss)]
    parsed = command.parser().parse_args([*options, "--calibration", str(images)])
    return command.request(parsed)


def losses_of(bundle: Bundle, model: Path, images: Path) -> float:
    """Measured once more, by the build's own answers."""
    reference = Reference(gate.check(onnx.load(model), IDENTITY))
    with netship.open(bundle) as network:
        samples = [network.read(each) for each in sorted(images.glob("[0-9]*"))]
        ours = [network.run(*each) for each in samples]
    return relative_loss(ours, [reference.run(*each) for each in samples])


def test_a_build_keeps_the_bound_and_says_what_it_chose(
    model: Path, images: Path, tmp_path: Path
) -> None:
    given = ("--model", model, "--target", "native", "--calibration", images)
    built = tmp_path / "built"
    done = run("compile.build", *given, *AUTO, "0.002", "--output", built, "--json")
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert set(said["layers"].values()) == {"int8", "float32"}
    assert said["precision"]["origin"] == "measured on host"
    assert said["precision"]["loss"] <= 0.002
    bundle = open_bundle(built)
    found = losses_of(bundle, model, images)
    assert found == pytest.approx(said["precision"]["loss"], rel=1e-3)
    facts = bundle.manifest.precision
    assert isinstance(facts, Precision)
    assert {each.layer: each.numbers for each in facts.layers} == said["layers"]
    assert facts.simulated_loss == pytest.approx(found, rel=0.05)
    costs = [each.cost for each in facts.pareto]
    assert costs == sorted(costs)
    assert Manifest.model_validate_json(bundle.manifest.to_json()) == bundle.manifest
    page = (built / "reference" / "precision.html").read_text()
    assert "at most 0.002 was asked for" in page
    assert all(f">{each}</td>" in page for each in said["layers"])
    assert "<script" not in page


def test_more_loss_never_costs_more(
    model: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the search's own figures, which are measured once for every limit."""
    request = asked(model, images, "arm-cortex-a76", 0.5)
    monkeypatch.setattr(metering, "CPUS", ())
    source = sources.find(str(model), {}, None, lambda stage: None)
    given = request, source, tmp_path, Progress(quiet=True)
    found = network.Network(*given)
    measured = found.measure()
    trials = search.Search(found, 0.5, tmp_path, given[-1]).trials(measured)
    again = network.Network(*given)
    monkeypatch.setattr(Mixture, "loss", None)
    assert again.measure() == measured
    before = np.inf
    for limit in (0.0, 1e-5, 1e-4, 5e-4, 1e-3, 2e-3, 4e-3, 1e-2, 0.1):
        best = search.fastest(trials, limit)
        assert best is not None
        assert best.figures.loss <= limit
        assert best.figures.cost <= before
        before = best.figures.cost
    assert {kind for each in trials for kind in each.choice} == set(PRECISIONS)


def test_a_build_for_a_board_mixes_all_three(
    model: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metering, "CPUS", ())
    some: list[Numbers] = ["int8", "float16", "int8", "int8", "int8", "float16"]
    chosen: Choice = (*some, "float16", "float16", "float16", "int8", "float32")
    monkeypatch.setattr(
        search,
        "fastest",
        lambda trials, _: next(
            (x for x in trials if x.name == "built"),
            search.Trial("built", chosen, search.Figures(1, 0), 0.0),
        ),
    )
    request = asked(model, images, "arm-cortex-a76", 0.05)
    output = tmp_path / "mixed"
    library = replace(request, output=output, format="standalone")
    bundle = search.build(library, Progress(quiet=True))
    judged = bundle.manifest.measured["precision"]
    assert judged["origin"] == "emulated"
    assert 0 < judged["loss"] < 0.02
    facts = bundle.manifest.precision
    assert facts is not None
    assert tuple(each.numbers for each in facts.layers) == chosen


@pytest.fixture
def halves(
    model: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[network.Network, list[Choice]]:
    """A network whose builds lose 2.5 times what is simulated, and float32 1e-7; and the choices that were built."""
    monkeypatch.setattr(metering, "CPUS", ())
    request = asked(model, images, "arm-cortex-a76", 0.5)
    source = sources.find(str(model), {}, None, lambda stage: None)
    found = network.Network(request, source, tmp_path, Progress(quiet=True))
    built: list[Choice] = []

    def build(choice: Choice, output: Path, **_: object) -> SimpleNamespace:
        built.append(choice)
        loss = 2.5 * found.mixture.loss(choice) if "float16" in choice else 1e-7
        measured = {"precision": {"loss": loss, "cost": None, "origin": "emulated"}}
        return SimpleNamespace(path=output, manifest=SimpleNamespace(measured=measured))

    monkeypatch.setattr(found, "build_choice", build)
    plain = found.mixture.uniform("float32")
    monkeypatch.setattr(found, "build_plain", lambda kind, out: build(plain, out))
    return found, built


@pytest.mark.parametrize("limit", [0.0002, 0.0006, 0.001, 0.002])
def test_a_build_that_loses_more_than_its_simulation_makes_way(
    limit: float, halves: tuple[network.Network, list[Choice]], tmp_path: Path
) -> None:
    found, built = halves
    chosen = search.Search(found, limit, tmp_path, Progress(quiet=True))
    bundle, facts = chosen.best()
    assert bundle.manifest.measured["precision"]["loss"] <= limit
    assert tuple(each.numbers for each in facts.layers) in built
    assert 1 <= len(built) == len(set(built)) <= 5


def test_what_cannot_be_reached_is_refused_in_one_line(
    halves: tuple[network.Network, list[Choice]], tmp_path: Path
) -> None:
    chosen = search.Search(halves[0], 1e-12, tmp_path, Progress(quiet=True))
    wanted = "--max-loss 1e-12: float32 as it is built loses 1e-07; give at least that"
    with pytest.raises(UserError, match=f"^{wanted}$"):
        chosen.best()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("--precision auto", "--precision auto: needs --max-loss X"),
        ("--max-loss 0.1", "--max-loss: goes with --precision auto"),
        ("--precision auto --max-loss 0", "'0' is not a fraction above 0"),
        ("--precision auto --max-loss nan", "'nan' is not a fraction above 0"),
        ("--precision auto --max-loss 1.5", "'1.5' is not a fraction above 0"),
        ("--precision auto --max-loss 1%", "'1%' is not a fraction above 0"),
        ("--precision auto --max-loss 0.1", "needs --calibration PHOTOS"),
        (
            "--precision auto --max-loss 0.1 --target cortex-m7 --calibration x",
            "--precision auto: makes no C source",
        ),
        (
            "--precision auto --max-loss 0.1 --quantize int8 --calibration x",
            "--quantize: --precision auto chooses by itself",
        ),
        (
            "--precision auto --max-loss 0.1 --keep-float stem --calibration x",
            "--keep-float: --precision auto chooses by itself",
        ),
    ],
)
def test_options_that_do_not_fit_are_refused(
    options: str, said: str, model: Path
) -> None:
    with pytest.raises(UserError) as refused:
        parsed = command.parser().parse_args(["--model", str(model), *options.split()])
        search.build(command.request(parsed), Progress(quiet=True))
    assert said in str(refused.value)


def test_a_network_that_cannot_be_quantised_is_left_in_float(
    model: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise UserError("ONNX Runtime's quantiser refuses it")

    monkeypatch.setattr(metering, "CPUS", ())
    monkeypatch.setattr(calibrate, "quantise", refuse)
    request = replace(asked(model, images, "arm-cortex-a76", 0.5), threads=2)
    source = sources.find(str(model), {}, None, lambda stage: None)
    found = network.Network(request, source, tmp_path, Progress(quiet=True))
    points = found.measure().points
    assert {kind for choice, _ in points for kind in choice} == {"float16", "float32"}


def test_a_quantised_model_is_refused(images: Path, tmp_path: Path) -> None:
    found = mixture(residuals())._calibrated.model.proto
    onnx.save(found, tmp_path / "qdq.onnx")
    request = asked(tmp_path / "qdq.onnx", images, "native", 0.1)
    with pytest.raises(UserError, match=r"qdq.onnx: is quantised; leave"):
        search.build(request, Progress(quiet=True))


def test_python_takes_the_options(
    model: Path, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[BuildRequest] = []
    monkeypatch.setattr(search, "build", lambda request, _: seen.append(request))
    netship.build(model, precision="auto", max_loss=0.25, calibration=images)
    assert seen[0].max_loss == 0.25
    assert seen[0].target == resolve("native")
