"""The log that a tuner appends to: AutoScheduler's JSON lines below a header, one tuner at a time, nothing lost."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import IO, Self

from netship.records.lookup import RecordLog, read
from netship.targets.errors import UserError


class TuningLog:
    """An open log. Each batch is one write, forced to the disk; use it in ``with``.

    A last line that was cut short by a crash is left as it is: the next batch begins on a line of its own, and
    readers name and skip the torn one.

    Args:
        header: ``target``, ``measured``, ``origin``, ``tvm`` and what else is worth knowing.

    Raises:
        UserError: another tuner has the file, it belongs to another target or way of measuring, or cannot
            be written.
    """

    def __init__(self, path: Path, header: Mapping[str, object]) -> None:
        self.path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file: IO[bytes] = path.open("ab+", buffering=0)
        except OSError as error:
            raise UserError(
                f"{path}: {error.strerror}; choose another --output"
            ) from None
        try:
            self._lock()
            self._begin(header)
        except BaseException:
            self._file.close()
            raise

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(
                f"{self.path}: another tuner is writing to it; wait for its end, or choose another --output"
            ) from None

    def _begin(self, header: Mapping[str, object]) -> None:
        if os.fstat(self._file.fileno()).st_size == 0:
            self._write(f"# {json.dumps(header)}\n")
            return
        present = self.read().comparable
        for key, ours in RecordLog("", dict(header), (), ()).comparable.items():
            if present[key] != ours:
                raise UserError(
                    f"{self.path}: its records are of {key} {present[key]!r}, not {ours!r}; "
                    "choose another --output"
                )

    def read(self) -> RecordLog:
        return read(self.path)

    def append(self, records: Iterable[str]) -> None:
        """Add records, one JSON text each."""
        text = "".join(record.strip() + "\n" for record in records)
        self._file.seek(max(os.fstat(self._file.fileno()).st_size - 1, 0))
        torn = self._file.read(1) not in (b"\n", b"")
        self._write(("\n" if torn else "") + text)

    def _write(self, text: str) -> None:
        data = memoryview(text.encode())
        try:
            while data:
                data = data[self._file.write(data) :]
            os.fsync(self._file.fileno())
        except OSError as error:
            raise UserError(
                f"{self.path}: {error.strerror}; what was measured before is kept: make room and "
                "run the command again"
            ) from None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):
            self._file.close()
