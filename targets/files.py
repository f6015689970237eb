"""Files that a user asked for, written whole or not at all; and the cache folder for what can be made again."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from importlib.metadata import version
from pathlib import Path

from netship.targets.errors import UserError


def read_text(path: Path, most: int = 16 << 20) -> str:
    """The text of a file that a user names, in UTF-8 with or without a byte order mark.

    Raises:
        OSError: it cannot be read, is no regular file, or has more than ``most`` bytes.
        UnicodeDecodeError: it is not UTF-8.
    """

    def opener(name: str, flags: int) -> int:
        # A pipe that nobody writes to would be waited for.
        return os.open(name, flags | os.O_NONBLOCK)

    if "\0" in str(path):
        raise OSError(errno.EINVAL, "no path has a zero byte", str(path))
    with open(path, "rb", opener=opener) as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise OSError(errno.EINVAL, "is not a regular file", str(path))
        content = file.read(most + 1)
    if len(content) > most:
        raise OSError(errno.EFBIG, f"has more than {most >> 20} MiB", str(path))
    return content.decode("utf-8-sig")


def check_writable(path: Path, option: str) -> None:
    """Refuse a file that cannot be written, before any work is done for it.

    Args:
        option: the command-line option that named the file, for the error.
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
    """Write a file; one that is there is replaced only when the new one is whole on the disk."""
    check_writable(path, option)
    part = path.with_name(f".{os.getpid()}.part")
    try:
        part.write_bytes(content)
        part.replace(path)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; choose another {option}") from None
    finally:
        part.unlink(missing_ok=True)


def copy_folder(source: Path, to: Path) -> None:
    """Copy all files of a folder into another one, which may exist.

    Raises:
        OSError: of the first file that cannot be copied; `shutil.Error` has a list, without numbers.
    """
    failed: list[OSError] = []

    def copy(file: str, copied: str) -> str:
        try:
            return shutil.copy2(file, copied)
        except OSError as error:
            failed.append(error)
            raise

    try:
        shutil.copytree(source, to, copy_function=copy, dirs_exist_ok=True)
    except shutil.Error:
        if failed:
            raise failed[0] from None
        raise


def cache_folder(program: str = "netship") -> Path:
    """Where what can be made again is kept: ``$XDG_CACHE_HOME/netship``, by default below ``~/.cache``."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    folder = Path(base, program)
    try:
        # The XDG base directory specification: a relative path is to be ignored.
        if not os.path.isabs(base):
            folder = Path.home() / ".cache" / program
        folder.mkdir(parents=True, exist_ok=True)
    except RuntimeError:
        raise UserError(
            "cache: this user has no home; set XDG_CACHE_HOME to a folder"
        ) from None
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


def cached_path(
    name: str,
    *options: object,
    packages: Iterable[str] = (),
    files: Iterable[Path] = (),
) -> Path:
    """Where the cache folder keeps the file or folder ``name``; the rest as in `cache_key`.

    A suffix of ``name`` stays at the end: ``a.so`` becomes ``a-0123456789abcdef01234567.so``.
    """
    stem, suffix = os.path.splitext(name)
    key = cache_key(*options, packages=packages, files=files)
    return cache_folder() / f"{stem}-{key}{suffix}"


def make_once(
    path: Path,
    make: Callable[[Path], object],
    on_wait: Callable[[], None] = lambda: None,
) -> Path:
    """Make a file or folder of the cache unless it is there; ``path`` appears whole or not at all.

    Args:
        path: what begins with the same word of its name, up to a hyphen, is made by one process at a time.
        make: writes the file or folder at the path that it is given.
        on_wait: called once where another process is making one.
    """
    if path.exists():
        return path
    name = path.name.partition("-")[0]
    with file_lock(path.with_name(f"{name}.lock"), cache(on_wait)):
        if path.exists():
            return path
        for abandoned in path.parent.glob(f".{name}-*"):
            # Another user may be able to write to the folder. `rmtree` follows no links.
            with contextlib.suppress(FileNotFoundError):
                if abandoned.lstat().st_uid == os.geteuid():
                    shutil.rmtree(abandoned, ignore_errors=True)
        with tempfile.TemporaryDirectory(prefix=f".{name}-", dir=path.parent) as work:
            made = Path(work, path.name)
            make(made)
            made.rename(path)
    return path


@contextlib.contextmanager
def file_lock(lock: Path, on_wait: Callable[[], None]) -> Iterator[None]:
    """Let one process at a time hold the file ``lock``; ``on_wait`` is called again and again while another one holds it."""
    with lock.open("w") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                on_wait()
                time.sleep(0.2)
        yield
