"""Files that a user asked for, written whole or not at all; and the folder for what can be made again."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from importlib.metadata import version
from pathlib import Path

from targets.errors import UserError


def check_writable(path: Path, option: str) -> None:
    """Refuse, before any work, a file that could not be written at its end.

    Args:
        option: what named the file, for the error.

    Raises:
        UserError: ``path`` is there and is no file, or its folder cannot take one.
    """
    try:
        if path.exists() and not path.is_file():
            raise UserError(f"{path}: is not a file; give {option} a file name")
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; choose another {option}") from None
    folder = path.parent
    if not folder.is_dir():
        raise UserError(
            f"{folder}: no such folder; make it, or choose another {option}"
        )
    if not os.access(folder, os.W_OK):
        raise UserError(f"{folder}: cannot be written to; choose another {option}")


def write_whole(path: Path, content: bytes, option: str) -> None:
    """Write a file, replacing one that is there only when all of it is on disk.

    Raises:
        UserError: it cannot be written.
    """
    check_writable(path, option)
    part = path.with_name(f".{os.getpid()}.part")
    try:
        part.write_bytes(content)
        part.replace(path)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; choose another {option}") from None
    finally:
        part.unlink(missing_ok=True)


def cache_folder() -> Path:
    """Where what can be made again is kept: ``$XDG_CACHE_HOME/netship``, by default below ``~/.cache``.

    Raises:
        UserError: it cannot be made.
    """
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(base, "netship")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"{folder}: {error.strerror}; set XDG_CACHE_HOME to a folder that can be written"
        ) from None
    return folder


def cache_key(
    *options: object, packages: Iterable[str] = (), files: Iterable[Path] = ()
) -> str:
    """A name of 24 hexadecimal digits for all that something kept was made of and by.

    Args:
        options: distinguished by their ``repr``, which must be the same in every process.
        packages: Python packages, distinguished by their versions.
        files: distinguished by name and content; of a folder all files in it but Python's byte code.
    """
    versions = [(name, version(name)) for name in packages]
    key = hashlib.sha256(repr((options, versions)).encode())
    for given in files:
        for path in sorted(given.rglob("*")) if given.is_dir() else [given]:
            if path.is_file() and "__pycache__" not in path.parts:
                content = hashlib.sha256(path.read_bytes()).digest()
                key.update(repr((path.relative_to(given.parent), content)).encode())
    return key.hexdigest()[:24]


@contextlib.contextmanager
def file_lock(lock: Path, on_wait: Callable[[], None]) -> Iterator[None]:
    """One process at a time behind the file ``lock``; ``on_wait`` is called first where another has it."""
    with lock.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            on_wait()
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def made_once(
    path: Path, name: str, make: Callable[[Path], None], on_wait: Callable[[], None]
) -> Path:
    """The folder ``path``, made unless it is there: whole or not at all, by one process at a time.

    Args:
        name: of the lock and of half-made folders next to ``path``; those that a killed process left are removed.
        make: fills the empty folder that it gets; the folder around it is for scratch files.
        on_wait: called first where another process makes it.
    """
    if path.is_dir():
        return path
    with file_lock(path.with_name(f"{name}.lock"), on_wait):
        if path.is_dir():
            return path
        for abandoned in path.parent.glob(f".{name}-*"):
            shutil.rmtree(abandoned, ignore_errors=True)
        with tempfile.TemporaryDirectory(prefix=f".{name}-", dir=path.parent) as work:
            made = Path(work, "made")
            made.mkdir()
            make(made)
            made.rename(path)
    return path
