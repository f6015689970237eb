"""Our bundle and other runtimes with one model on one core, by the same meter."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from netship.bench.baselines.runtimes import Baseline
from netship.bench.measurement import Case, Row, kept, measure, read_case
from netship.bundle.store import MANIFEST, open_bundle
from netship.devices.board import programs
from netship.devices.sessions.session import Origin
from netship.meter.board_files import check_threads
from netship.meter.counting import find_qemu
from netship.meter.counts import ORIGINS, Counts, count_bundle, meter_version
from netship.meter.memory import hierarchy
from netship.targets import templates
from netship.targets.errors import UserError
from netship.targets.files import cache_folder, write_whole
from netship.targets.progress import Progress

OURS = "netship"
AT_BEST = (
    "its threads cannot be counted apart: what it takes at best, if it does the same as on one thread, all of it divided "
    "evenly"
)


def in_millions(count: float) -> str:
    """With three digits of a small network's, of which a tenth of a million would be nothing."""
    return f"{count / 1e6:.{1 if count >= 1e6 else 3}f}"


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
    threads: int = 1

    @property
    def best(self) -> float | None:
        """The fewest cycles that were counted; what a runtime takes at best was not."""
        counted = (r.counts.cycles for r in self.rows if r.counts and not r.at_best)
        return min(counted, default=None)

    def sorted_rows(self) -> list[Row]:
        return sorted(
            self.rows, key=lambda r: r.counts.cycles if r.counts else float("inf")
        )

    def write_page(self, path: Path) -> None:
        """Write the comparison as one self-contained HTML page, whole or not at all."""
        sums = [row.counts.cycles for row in self.rows if row.counts]
        templates.write_page(
            path,
            "--report",
            Path(__file__).with_name("comparison.html.jinja"),
            result=self,
            worst=max(sums, default=1),
            at_best=AT_BEST,
            meter=meter_version(),
            filters={"in_millions": in_millions},
        )

    def to_json(self) -> dict[str, Any]:
        best = self.best
        return {
            "model": self.model,
            "model_sha256": self.model_sha256,
            "cpu": self.cpu,
            "board": self.board,
            "threads": self.threads,
            "meter": meter_version(),
            "origin": str(Origin.ESTIMATED),
            "origins": ORIGINS,
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


class Machine(NamedTuple):
    """What every runtime is counted on; an empty board is the core's default one."""

    cpu: str
    board: str
    threads: int


def compare(
    model: Path,
    cpu: str,
    runtimes: Sequence[Baseline],
    progress: Progress,
    bundle: Path | None = None,
    tflite: Path | None = None,
    board: str = "",
    threads: int = 1,
) -> Comparison:
    """Count our bundle and each runtime."""
    where = hierarchy(cpu, board)
    check_threads(cpu, board, threads)
    machine = Machine(cpu, board, threads)
    progress.stage("reading the model")
    case = read_case(model, progress.stage)
    rows = [_ours(case, model, machine, bundle, progress)]
    for runtime in runtimes:
        model_file = tflite if runtime.name == "litert" else None
        rows.append(
            measure(
                case,
                runtime,
                cpu,
                progress,
                model_file,
                board=board,
                threads=threads,
            )
        )
    identity = case.model.identity
    return Comparison(
        identity.name,
        identity.sha256,
        cpu,
        where.board,
        where.clock,
        tuple(rows),
        threads=threads,
    )


def _ours(
    case: Case, model: Path, machine: Machine, bundle: Path | None, progress: Progress
) -> Row:
    try:
        if bundle is None:
            # Without QEMU a bundle is built that was not verified; it must not be kept.
            find_qemu()
            progress.stage("our bundle: building")
            bundle = _built(case, model, machine.cpu, progress)
        return _counted_bundle(case, machine, bundle, progress)
    except UserError as error:
        return Row(OURS, "this project", "", None, refused=str(error))


def _built(case: Case, model: Path, cpu: str, progress: Progress) -> Path:
    """Our bundle of the model for the CPU; one of the same build is taken."""
    from netship.compile.backends.request import BuildRequest
    from netship.compile.driver import build
    from netship.targets.presets import of_core

    request = BuildRequest(str(model), of_core(cpu))
    folder, start = cache_folder() / "compare", f"{case.sha256[:16]}-{cpu}-"
    output = folder / f"{start}{request.key(progress.stage)}"
    if output.is_dir():
        return output
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob(f"{start}*"):
        shutil.rmtree(old) if old.is_dir() else old.unlink()
    return build(replace(request, output=output), progress).path


def _counted_bundle(
    case: Case, machine: Machine, path: Path, progress: Progress
) -> Row:
    bundle = open_bundle(path)
    theirs, ours = bundle.manifest.model, case.model.identity
    if (theirs.sha256, theirs.external_data) != (ours.sha256, ours.external_data):
        raise UserError(
            f"{path}: is of another model, {theirs.name}; "
            "give a bundle of this one, or leave --bundle out"
        )
    stored = kept(
        OURS,
        *machine,
        meter_version(),
        packages=("xtc-tvm-python-bindings", "ziglang"),
        files=[path / MANIFEST, programs.SOURCES],
    ).with_suffix("")
    try:
        counts = Counts(**json.loads(stored.read_text()))
    except (OSError, ValueError, TypeError):
        counts = count_bundle(
            path, machine.cpu, progress.stage, machine.board, machine.threads
        )
        stored.parent.mkdir(parents=True, exist_ok=True)
        write_whole(stored, json.dumps(counts._asdict()).encode(), "XDG_CACHE_HOME")
    verification = bundle.manifest.measured.get("verification") or {}
    # An int8 bundle was verified against the project's own integers, not against ONNX Runtime.
    against_reference = bundle.manifest.quantisation is None
    return Row(
        OURS,
        "this project",
        "",
        counts,
        verification.get("max_abs_error") if against_reference else None,
        True if verification else None,
    )
