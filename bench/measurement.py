"""One runtime on one core: its counts, once its answer is ONNX Runtime's. What was counted is kept."""

from __future__ import annotations

import gzip
import hashlib
import json
import tempfile
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from netship.bench.baselines import converters, emulated, runtimes
from netship.bench.baselines.int8_graph import is_quantised
from netship.bench.baselines.plain import plain
from netship.bench.baselines.runtimes import Baseline
from netship.bundle import accuracy
from netship.bundle.golden import seeded_inputs
from netship.bundle.manifest import ModelIdentity, Preprocessing
from netship.bundle.store import sha256_of
from netship.compile.frontend import gate, sources
from netship.compile.frontend.model import Model
from netship.compile.frontend.reference import Reference
from netship.devices import sysroot
from netship.devices.sessions.session import Origin
from netship.meter.counting import Block, Part
from netship.meter.counts import Counts, at_best, cost, count_program, counter_version
from netship.meter.memory import hierarchy
from netship.targets.errors import UserError
from netship.targets.escapes import counted
from netship.targets.files import cache_folder, cache_key, write_whole
from netship.targets.progress import Progress

if TYPE_CHECKING:
    import onnx

Array = NDArray[np.float32]

# Of the range of the output: other runtimes multiply by other algorithms (Winograd), which round more coarsely.
_NEAR = 2e-4
# In int8 and in 16 bits each runtime rounds in its own way, and the differences grow from layer to layer.
_COARSE_COSINE = 0.95
_COARSE = frozenset(["mnn-half", "ncnn-default"])


@dataclass(frozen=True)
class Row:
    """One runtime.

    Attributes:
        counts: of one inference; None where there are none, and ``refused`` says why.
        max_abs_error: of the first output, against ONNX Runtime on this machine.
        at_best: whether the counts are the least that several threads can take, by those of one.
    """

    runtime: str
    title: str
    version: str
    counts: Counts | None
    max_abs_error: float | None = None
    same_top1: bool | None = None
    refused: str = ""
    at_best: bool = False

    def to_json(self) -> dict[str, Any]:
        counted = self.counts._asdict() if self.counts else {}
        return {
            "runtime": self.runtime,
            "title": self.title,
            "version": self.version,
            **counted,
            "origin": str(Origin.ESTIMATED),
            "at_best": self.at_best,
            "max_abs_error": self.max_abs_error,
            "same_top1": self.same_top1,
            "refused": self.refused or None,
        }


class Case(NamedTuple):
    """What every runtime gets, and the answer that it must give.

    Attributes:
        model: as the gate passes it: its graph is static and has one input.
        sha256: of that graph.
        quantised: whether it is a QDQ graph.
        tensor: float32, of the input's shape.
        expected: the first output, by ONNX Runtime on this machine.
    """

    model: Model
    sha256: str
    quantised: bool
    tensor: Array
    expected: Array


def read_case(
    model: Path, on_progress: Callable[[str], None] = lambda stage: None
) -> Case:
    """Read a model as a build does, and ask ONNX Runtime for its answer to a smooth seeded pattern."""
    return _case(sources.find(str(model), {}, None, on_progress).model)


def case_of(proto: onnx.ModelProto, name: str) -> Case:
    """As ``read_case``, for a graph in memory."""
    identity = ModelIdentity(name=name, sha256=_sha256(proto))
    return _case(gate.check(proto, identity))


def _case(model: Model) -> Case:
    given = model.inputs[0]
    if not given.layout or given.dtype != "float32" or len(model.inputs) > 1:
        raise UserError(
            f"{model.identity.name}: its input {list(given.shape)} is no image of float32, as the other runtimes' files "
            "need; compare another network"
        )
    size = given.size
    preprocessing = Preprocessing(
        scale=1 / 127.5, mean=(1,), std=(1,), resize=max(size), crop=size
    )
    (tensor,) = seeded_inputs(given, preprocessing, 1)
    expected = Reference(model).run(tensor)[0]
    quantised = is_quantised(model.proto)
    return Case(model, _sha256(model.proto), quantised, tensor, expected)


def _sha256(proto: onnx.ModelProto) -> str:
    return hashlib.sha256(proto.SerializeToString(deterministic=True)).hexdigest()


def measure(
    case: Case,
    runtime: Baseline,
    cpu: str,
    progress: Progress,
    model_file: Path | None = None,
    board: str = "",
    threads: int = 1,
) -> Row:
    """One runtime on one core; where it cannot be converted, run or trusted, the row says so.

    Args:
        board: whose memory, by its name for the meter; the core's default one where empty.
        threads: 4 at most; of a runtime whose parallel parts cannot be counted apart, what they take `at_best`.
        model_file: what the runtime loads in place of the case's graph, converted; only the best
            class of its answer is compared.
    """
    version = runtimes.version(runtime)
    bounded = threads > 1 and not runtime.openmp
    counted_on = 1 if bounded else threads
    path = kept(
        runtime.name,
        cpu,
        board,
        counted_on,
        version,
        case.sha256,
        hashlib.sha256(case.tensor.tobytes()).digest(),
        model_file and sha256_of(model_file),
        files=runtimes.SOURCES,
    )
    try:
        counted = known = _read(path)
        if counted is None:
            counted = _count(
                case, runtime, cpu, board, counted_on, progress, model_file
            )
        if model_file is None:
            off, same = _compare(case, runtime, counted.answer)
        else:
            off, same = _compare_best_class(case, counted.answer)
        if known is None:
            _write(path, counted)
        progress.stage(f"{runtime.title}: estimating cycles")
        counts = cost(counted.parts, cpu, board)
        if bounded:
            counts = at_best(counts, counted.parts, cpu, board, threads)
    except UserError as error:
        return Row(runtime.name, runtime.title, version, None, refused=str(error))
    return Row(runtime.name, runtime.title, version, counts, off, same, at_best=bounded)


class _Counted(NamedTuple):
    """The parts of an inference, and the elements of its first output."""

    parts: list[Part]
    answer: list[float]


def _count(
    case: Case,
    runtime: Baseline,
    cpu: str,
    board: str,
    threads: int,
    progress: Progress,
    model_file: Path | None,
) -> _Counted:
    progress.stage(f"{runtime.title}: preparing")
    machine = emulated.prepare(cpu, progress.stage, board)
    proto, given = case.model.proto, case.tensor
    if runtime.package in converters.CHANNELS_FIRST:
        is_last = case.model.inputs[0].layout == "NHWC"
        names = [each.name for each in case.model.inputs if is_last]
        proto = plain(proto, names)
        given = given.transpose(0, 3, 1, 2) if is_last else given
    model = model_file or converters.convert(machine, runtime, proto, progress.stage)
    progress.stage(f"{runtime.title}: counting")
    with tempfile.TemporaryDirectory() as work:
        tensor, output = Path(work, "input.npy"), Path(work, "output.npy")
        np.save(tensor, np.ascontiguousarray(given))
        command = emulated.inference(machine, runtime, model, tensor, output, threads)
        parts = count_program(command, cpu, board, threads)
        return _Counted(parts, np.load(output).ravel().tolist())


def _compare(
    case: Case, runtime: Baseline, answer: list[float]
) -> tuple[float | None, bool]:
    """The max-abs error, and whether the best class is the same.

    Raises:
        UserError: the answer is not the reference's, so that the counts mean nothing.
    """
    found, expected = np.array(answer, np.float32), case.expected.ravel()
    _check_elements(found, expected)
    judged = accuracy.compare([found], [expected])
    near = judged.relative_error <= _NEAR
    coarse = case.quantised or runtime.name in _COARSE
    if not (judged.cosine >= _COARSE_COSINE if coarse else near):
        raise UserError(
            f"its answer is {judged.max_abs_error:.1e} off ONNX Runtime's, {judged.relative_error:.1e} "
            "of the range: not counted"
        )
    return judged.max_abs_error, bool(found.argmax() == expected.argmax())


def _compare_best_class(case: Case, answer: list[float]) -> tuple[float | None, bool]:
    """As ``_compare``, for a file whose numbers may be others."""
    expected = case.expected.ravel()
    # TensorFlow's networks have a background class before the others.
    found = np.array(answer)[-expected.size :]
    _check_elements(found, expected)
    if found.argmax() != expected.argmax():
        raise UserError("another best class than ONNX Runtime's: not counted")
    return None, True


def _check_elements(found: NDArray[Any], expected: Array) -> None:
    if found.size != expected.size or not np.isfinite(found).all():
        raise UserError(
            f"its output has {counted(found.size, 'value')}, not {expected.size} finite ones"
        )


# Blocks are kept, not cycles: estimating is quick, and the models of cores change.


def kept(
    runtime: str,
    cpu: str,
    board: str,
    threads: int,
    *options: object,
    **made_of: Iterable[Any],
) -> Path:
    """Where the counts of a runtime on a core are kept; ``options`` and ``made_of`` as in ``cache_key``."""
    where = (
        cpu,
        threads,
        hierarchy(cpu, board).caches,
        counter_version(),
        sysroot.sysroot_path(),
    )
    key = cache_key(where, *options, **made_of)
    return cache_folder() / "compare" / f"{runtime}-{key}.json.gz"


def _read(path: Path) -> _Counted | None:
    try:
        found = json.loads(gzip.decompress(path.read_bytes()))
        parts = [
            Part(
                thread,
                [
                    Block(address, bytes.fromhex(code), executions, tuple(misses))
                    for address, code, executions, misses in blocks
                ],
            )
            for thread, blocks in found["parts"]
        ]
        return _Counted(parts, list(found["answer"]))
    except (OSError, EOFError, zlib.error, ValueError, KeyError, TypeError):
        return None


def _write(path: Path, counted: _Counted) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    parts = [
        (
            part.thread,
            [
                (block.address, block.code.hex(), block.executions, block.misses)
                for block in part.blocks
            ],
        )
        for part in counted.parts
    ]
    text = json.dumps({"parts": parts, "answer": counted.answer})
    write_whole(path, gzip.compress(text.encode(), mtime=0), "XDG_CACHE_HOME")
