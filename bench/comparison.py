"""What a comparison consists of: each runtime's counts on one core, once its answer is right."""

from __future__ import annotations

import gzip
import hashlib
import json
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from bench import baselines, qdq
from bundle import accuracy
from bundle.golden import seeded_inputs
from bundle.manifest import ModelIdentity, Preprocessing
from bundle.store import MANIFEST, open_bundle, sha256_of
from compile.frontend import gate, sources
from compile.frontend.model import Model
from compile.frontend.reference import Reference
from devices import sysroot
from devices.board import programs
from devices.sessions.session import Origin
from meter.counting import Block, find_qemu
from meter.counts import (
    Counts,
    cost,
    count_bundle,
    count_program,
    counter_version,
    meter_version,
)
from meter.memory import hierarchy
from targets.errors import UserError
from targets.files import cache_folder, cache_key, write_whole
from targets.progress import Progress

if TYPE_CHECKING:
    import onnx

Array = NDArray[np.float32]

# Of int8 and of 16 bits the runtimes' rounding differs, and adds up over layers.
_COARSE_COSINE = 0.95
_COARSE = frozenset(["ncnn-default"])
OURS = "netship"


@dataclass(frozen=True)
class Row:
    """One runtime.

    Attributes:
        counts: of one inference; None where there is none, and ``refused`` says why.
        max_abs_error: against ONNX Runtime on this machine, of the first output.
    """

    runtime: str
    title: str
    version: str
    counts: Counts | None
    max_abs_error: float | None = None
    same_top1: bool | None = None
    refused: str = ""

    def to_json(self) -> dict[str, Any]:
        counted = self.counts._asdict() if self.counts else {}
        return {
            "runtime": self.runtime,
            "title": self.title,
            "version": self.version,
            **counted,
            "origin": str(Origin.ESTIMATED),
            "max_abs_error": self.max_abs_error,
            "same_top1": self.same_top1,
            "refused": self.refused or None,
        }


@dataclass(frozen=True)
class Comparison:
    """All runtimes on one model and one core; ``clock`` is that of the board named, in GHz."""

    model: str
    model_sha256: str
    cpu: str
    board: str
    clock: float
    rows: tuple[Row, ...]
    notes: tuple[str, ...] = ()

    @property
    def best(self) -> float | None:
        return min((r.counts.cycles for r in self.rows if r.counts), default=None)

    def sorted_rows(self) -> list[Row]:
        return sorted(
            self.rows, key=lambda r: r.counts.cycles if r.counts else float("inf")
        )

    def to_json(self) -> dict[str, Any]:
        best = self.best
        return {
            "model": self.model,
            "model_sha256": self.model_sha256,
            "cpu": self.cpu,
            "threads": 1,
            "meter": meter_version(),
            "origin": str(Origin.ESTIMATED),
            "runtimes": [
                {
                    **row.to_json(),
                    "ratio": round(row.counts.cycles / best, 4)
                    if row.counts and best
                    else None,
                }
                for row in self.sorted_rows()
            ],
            "notes": list(self.notes),
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


def compare(
    model: Path,
    cpu: str,
    runtimes: Sequence[baselines.Peer],
    progress: Progress,
    bundle: Path | None = None,
    tflite: Path | None = None,
) -> Comparison:
    """Count our bundle and each runtime.

    Raises:
        UserError: the model, the CPU or this machine is not fit. One runtime that cannot be
            converted or run is a row that says so.
    """
    where = hierarchy(cpu)
    progress.stage("reading the model")
    case = read_case(model, progress.stage)
    rows = [_ours(case, model, cpu, bundle, progress)]
    for runtime in runtimes:
        given = tflite if runtime.name == "litert" else None
        rows.append(measure(case, runtime, cpu, progress, given))
    identity = case.model.identity
    return Comparison(
        identity.name, identity.sha256, cpu, where.board, where.clock, tuple(rows)
    )


def read_case(
    model: Path, on_progress: Callable[[str], None] = lambda stage: None
) -> Case:
    """Read a model as a build does, and ask ONNX Runtime for its answer to a seeded smooth pattern.

    Raises:
        UserError: the gate or ONNX Runtime refuses the model.
    """
    return _case(sources.find(str(model), {}, None, on_progress).model)


def case_of(proto: onnx.ModelProto, name: str) -> Case:
    """As ``read_case``, for a graph in memory."""
    identity = ModelIdentity(name=name, sha256=_sha256(proto))
    return _case(gate.check(proto, identity))


def _case(model: Model) -> Case:
    size = model.input.size
    preprocessing = Preprocessing(
        scale=1 / 127.5, mean=(1,), std=(1,), resize=max(size), crop=size
    )
    (tensor,) = seeded_inputs(model.input, preprocessing, 1)
    expected = Reference(model).run(tensor)[0]
    quantised = qdq.is_quantised(model.proto)
    return Case(model, _sha256(model.proto), quantised, tensor, expected)


def _sha256(proto: onnx.ModelProto) -> str:
    return hashlib.sha256(proto.SerializeToString(deterministic=True)).hexdigest()


def measure(
    case: Case,
    runtime: baselines.Peer,
    cpu: str,
    progress: Progress,
    given: Path | None = None,
) -> Row:
    """One runtime on one core; what was measured before is kept and taken.

    Args:
        given: a model file for the runtime, instead of the case's graph converted; its answer
            is checked by the best class alone.
    """
    version = baselines.version(runtime)
    path = _kept(
        runtime.name,
        cpu,
        version,
        case.sha256,
        hashlib.sha256(case.tensor.tobytes()).digest(),
        given and sha256_of(given),
        files=baselines.SOURCES,
    )
    try:
        counted = kept = _read(path)
        if counted is None:
            counted = _count(case, runtime, cpu, progress, given)
        off, same = _judge(case, runtime, counted.answer, given is not None)
        if kept is None:
            _write(path, counted)
        progress.stage(f"{runtime.title}: what it costs the core")
        counts = cost(counted.blocks, cpu)
    except UserError as error:
        return Row(runtime.name, runtime.title, version, None, refused=str(error))
    return Row(runtime.name, runtime.title, version, counts, off, same)


class _Counted(NamedTuple):
    """An inference's blocks, and its first output as numbers in a row."""

    blocks: list[Block]
    answer: list[float]


def _count(
    case: Case,
    runtime: baselines.Peer,
    cpu: str,
    progress: Progress,
    given: Path | None,
) -> _Counted:
    progress.stage(f"{runtime.title}: preparing")
    machine = baselines.emulated(cpu, progress.stage)
    model = given or baselines.converted(
        machine, runtime, case.model.proto, progress.stage
    )
    progress.stage(f"{runtime.title}: counting")
    with tempfile.TemporaryDirectory() as work:
        tensor, output = Path(work, "input.npy"), Path(work, "output.npy")
        np.save(tensor, case.tensor)
        command = baselines.inference(machine, runtime, model, tensor, output)
        blocks = count_program(command, cpu)
        return _Counted(blocks, np.load(output).ravel().tolist())


def _judge(
    case: Case, runtime: baselines.Peer, answer: list[float], other_file: bool
) -> tuple[float | None, bool]:
    """The max-abs error and whether the best class is the same.

    Raises:
        UserError: the answer is not the reference's, so that its figures mean nothing.
    """
    wanted = case.expected.ravel().astype(np.float64)
    found = np.array(answer)
    if other_file:
        # A background class before the others, as TensorFlow's networks have.
        found = (
            found[found.size - wanted.size :] if found.size >= wanted.size else found
        )
    if found.size != wanted.size or not np.isfinite(found).all():
        raise UserError(
            f"its output has {found.size} values, not {wanted.size} finite ones"
        )
    same = bool(found.argmax() == wanted.argmax())
    if other_file:
        if not same:
            raise UserError("another best class than ONNX Runtime's: not counted")
        return None, same
    judged = accuracy.compare([found.astype(np.float32)], [wanted.astype(np.float32)])
    coarse = case.quantised or runtime.name in _COARSE
    right = judged.cosine >= _COARSE_COSINE if coarse else judged.passed
    error = judged.max_abs_error
    if not right:
        raise UserError(
            f"its answer is {error:.1e} off ONNX Runtime's, {judged.relative_error:.1e} of the range: "
            "not counted"
        )
    return error, same


def _ours(
    case: Case, model: Path, cpu: str, bundle: Path | None, progress: Progress
) -> Row:
    try:
        if bundle is None:
            # Without QEMU a bundle is built that was not verified; it must not be kept.
            find_qemu()
            progress.stage("our bundle: building")
            bundle = _built(case, model, cpu, progress)
        return _counted_bundle(case, cpu, bundle, progress)
    except UserError as error:
        return Row(OURS, "this project", "", None, refused=str(error))


def _built(case: Case, model: Path, cpu: str, progress: Progress) -> Path:
    """Our bundle of the model for the CPU; one of the same build is taken."""
    from compile.build_key import build_key
    from compile.driver import Order, build
    from compile.frontend.preprocessing import Stated
    from targets.presets import resolve

    order = Order(
        model=str(model),
        target=resolve(f"arm-{cpu}"),
        output=None,
        format="bundle",
        name=None,
        threads=1,
        input_shapes={},
        golden=(),
        dump=None,
        stated=Stated(),
    )
    folder, start = cache_folder() / "compare", f"{case.sha256[:16]}-{cpu}-"
    output = folder / f"{start}{build_key(order, progress.stage)}"
    if output.is_dir():
        return output
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob(f"{start}*"):
        shutil.rmtree(old) if old.is_dir() else old.unlink()
    return build(replace(order, output=output), progress).path


def _counted_bundle(case: Case, cpu: str, path: Path, progress: Progress) -> Row:
    bundle = open_bundle(path)
    theirs, ours = bundle.manifest.model, case.model.identity
    if (theirs.sha256, theirs.external_data) != (ours.sha256, ours.external_data):
        raise UserError(
            f"{path}: is of another model, {theirs.name}; "
            "give the bundle of this one, or leave --bundle out"
        )
    kept = _kept(
        OURS,
        cpu,
        meter_version(),
        packages=("xtc-tvm-python-bindings", "ziglang"),
        files=[path / MANIFEST, programs.SOURCES],
    ).with_suffix("")
    try:
        counts = Counts(**json.loads(kept.read_text()))
    except (OSError, ValueError, TypeError):
        counts = count_bundle(path, cpu, progress.stage)
        kept.parent.mkdir(parents=True, exist_ok=True)
        write_whole(kept, json.dumps(counts._asdict()).encode(), "XDG_CACHE_HOME")
    verification = bundle.manifest.measured.get("verification") or {}
    # Of int8 it is the distance from the project's own integers, which is none.
    against_reference = bundle.manifest.quantisation is None
    return Row(
        OURS,
        "this project",
        "",
        counts,
        verification.get("max_abs_error") if against_reference else None,
        True if verification else None,
    )


# What was counted before. What it costs is reckoned anew: that is quick, and models change.


def _kept(runtime: str, cpu: str, *options: object, **made_of: Iterable[Any]) -> Path:
    where = (cpu, hierarchy(cpu).caches, counter_version(), sysroot.sysroot_path())
    key = cache_key(where, *options, **made_of)
    return cache_folder() / "compare" / f"{runtime}-{key}.json.gz"


def _read(path: Path) -> _Counted | None:
    try:
        found = json.loads(gzip.decompress(path.read_bytes()))
        blocks = [
            Block(address, bytes.fromhex(code), executions, tuple(misses))
            for address, code, executions, misses in found["blocks"]
        ]
        return _Counted(blocks, list(found["answer"]))
    except (OSError, EOFError, zlib.error, ValueError, KeyError, TypeError):
        return None


def _write(path: Path, counted: _Counted) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    blocks = [
        (block.address, block.code.hex(), block.executions, block.misses)
        for block in counted.blocks
    ]
    text = json.dumps({**counted._asdict(), "blocks": blocks})
    write_whole(path, gzip.compress(text.encode(), mtime=0), "XDG_CACHE_HOME")
