"""Tuning records on disk: AutoScheduler's own JSON lines, one file a target, with a header.

A leaf: it imports nothing above targets/, so that the build can read records through it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from targets.errors import UserError

SHIPPED = Path(__file__).parent / "records"
USER = Path("tuned")


@dataclass(frozen=True)
class RecordLog:
    """The records of one target.

    Attributes:
        name: the file's name.
        header: what the first line says: target, measured (on what the times were taken), …
        lines: the records that parse, as JSON text.
        skipped: one message for each line that does not.
    """

    name: str
    header: dict[str, Any]
    lines: tuple[str, ...]
    skipped: tuple[str, ...]

    @property
    def measured(self) -> str:
        """On what the times were taken."""
        return str(self.header["measured"])

    @cached_property
    def workloads(self) -> frozenset[str]:
        """AutoScheduler's workload keys that have at least one record."""
        return frozenset(_workload(line) for line in self.lines)

    def measurements(self, auto_scheduler: Any) -> Iterator[tuple[Any, Any]]:
        """The records as AutoScheduler's (MeasureInput, MeasureResult), for ``ApplyHistoryBest``."""
        load = auto_scheduler.measure_record.load_record_from_string
        return (load(line) for line in self.lines)


def shipped(target_name: str, folder: Path = SHIPPED) -> RecordLog | None:
    """The records that come with the project for a preset; None where there are none."""
    path = folder / f"{target_name}.json"
    return read(path) if path.is_file() else None


def user_log(target_name: str, origin: str) -> Path:
    """Where a user's own records of a preset lie, in the working folder: one log for each origin."""
    return USER / f"{target_name}-{origin}.json"


def read(path: Path, bare: bool = False) -> RecordLog:
    """Read a record log; a torn or foreign line is skipped and named, not fatal.

    Args:
        bare: take a file without a header too, as TVM's own tools write it.

    Raises:
        UserError: the file cannot be read, or does not begin with its header line.
    """
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    if bare and not text.startswith("#"):
        text = '# {"measured": "not said"}\n' + text
    header, _, body = text.partition("\n")
    try:
        fields = dict(json.loads(header.removeprefix("#")))
        if not isinstance(fields["measured"], str):
            raise KeyError("measured")
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path}: line 1 must be '# {{\"measured\": …}}'") from None
    lines, skipped = [], []
    for number, line in enumerate(body.splitlines(), start=2):
        if not line.strip() or line.startswith("#"):
            continue
        try:
            _workload(line)
        except (ValueError, KeyError, IndexError, TypeError):
            skipped.append(f"{path}:{number}: not a tuning record; skipped")
        else:
            lines.append(line)
    return RecordLog(path.name, fields, tuple(lines), tuple(skipped))


def _workload(line: str) -> str:
    """The workload key of a record: ["i"][0][0] of AutoScheduler's format, version v0.6."""
    record = json.loads(line)
    key, times = record["i"][0][0], record["r"][0]
    if not isinstance(key, str) or not isinstance(times, list) or not times:
        raise ValueError(line)
    return key
