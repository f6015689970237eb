"""Full disks: whether a folder is on one, and which folder an error comes from."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

# No space, over quota, over the process's limit (ulimit -f).
DISK_FULL = frozenset([errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
# A folder with less room than this counts as full when a tool that writes there has failed.
_ROOM_BYTES = 64 << 20


def why_full(folder: Path) -> str:
    """The system's words where ``folder`` has no room for 64 MiB; empty where it has."""
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            os.posix_fallocate(file.fileno(), 0, _ROOM_BYTES)
    except OSError as error:
        return str(error.strerror) if error.errno in DISK_FULL else ""
    return ""


def full_folder(error: BaseException, folders: Sequence[Path]) -> str:
    """What is full, as ``FOLDER: No space left on device``; empty where ``error`` is none of a full disk.

    Python does not always say which file it could not write.

    Args:
        folders: that may be the full one, the likeliest first; then the temporary folder is looked at.
    """
    if not isinstance(error, OSError) or error.errno not in DISK_FULL:
        return ""
    candidates = [*folders, *_temporary()]
    # Of a copy the second one is written.
    named = error.filename2 or error.filename
    if isinstance(named, str):
        inside = [
            folder
            for folder in candidates
            if Path(named).resolve().is_relative_to(folder.resolve())
        ]
        candidates = inside or [Path(named).parent]
    full = next(filter(why_full, candidates), candidates[0])
    return f"{full}: {error.strerror}"


def _temporary() -> list[Path]:
    try:
        return [Path(tempfile.gettempdir())]
    except FileNotFoundError:
        # Python tries to write to it, so that there is none where every disk is full.
        return []
