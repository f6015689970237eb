"""A bundle on disk: verified before it is used, written completely or not at all."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import io
import json
import os
import shutil
import struct
import tarfile
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from netship.bundle.manifest import MAX_MANIFEST_BYTES, Manifest, parse
from netship.targets.disk import full_folder
from netship.targets.errors import UserError

MANIFEST = "manifest.json"
LIBRARY = "model.so"

# e_machine of the ELF header (elf.h), by the name uname -m gives the architecture.
_ELF_MACHINES = {62: "x86_64", 183: "aarch64", 40: "arm"}


@dataclass(frozen=True, slots=True)
class Bundle:
    """A bundle whose every file was hashed against its manifest."""

    path: Path
    manifest: Manifest

    @property
    def library(self) -> Path:
        """The compiled model, as an absolute path (``dlopen`` wants one)."""
        return (self.path / self.manifest.library).resolve()

    def read(self, relative: str) -> bytes:
        return (self.path / relative).read_bytes()

    def labels(self) -> list[str]:
        """The class names, one a line of the labels file; empty where the bundle has none."""
        if self.manifest.labels is None:
            return []
        return self.read(self.manifest.labels).decode(errors="replace").splitlines()


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def open_bundle(path: Path) -> Bundle:
    """Read and verify a bundle; nothing in it is loaded or trusted before.

    Raises:
        UserError: no bundle, a changed, missing or linked file, golden data that do not
            have the sizes the manifest gives, an ELF machine other than the target's.
    """
    manifest_path = path / MANIFEST
    if not manifest_path.is_file():
        hint = (
            "unpack it first (tar xf)"
            if path.name.endswith(".tar.gz")
            else "python -m compile.build makes one"
        )
        raise UserError(f"{path}: not a bundle (it has no {MANIFEST}); {hint}")
    with manifest_path.open("rb") as file:
        manifest = parse(file.read(MAX_MANIFEST_BYTES + 1), str(manifest_path))
    for relative, expected in manifest.files.items():
        _verify_file(path, relative, expected)
    for entry in manifest.golden:
        sizes = [tensor.nbytes for tensor in (*manifest.inputs, *manifest.outputs)]
        sizes += [4 * tensor.elements for tensor in manifest.outputs]
        for relative, size in zip(entry.paths, sizes, strict=True):
            _expect_size(path / relative, size)
    library, expected = path / manifest.library, manifest.target.machine
    if not manifest.is_source and (machine := elf_machine(library)) != expected:
        raise UserError(f"{library}: is for {machine}, the manifest says {expected}")
    return Bundle(path, manifest)


def _verify_file(bundle: Path, relative: str, expected: str) -> None:
    file = bundle / relative
    if file.is_symlink() or not file.resolve().is_relative_to(bundle.resolve()):
        raise UserError(
            f"{file}: a link is not part of a bundle; copy the bundle again"
        )
    if not file.is_file():
        raise UserError(f"{file}: missing; copy or build the bundle again")
    if sha256_of(file) != expected:
        raise UserError(
            f"{file}: its SHA-256 is not the manifest's; copy or build the bundle again"
        )


def _expect_size(file: Path, expected: int) -> None:
    actual = file.stat().st_size
    if actual != expected:
        raise UserError(
            f"{file}: {actual} bytes, but the manifest's shape takes {expected}; build the bundle again"
        )


def elf_machine(file: Path) -> str:
    """The architecture an ELF file is for, as ``uname -m`` names it."""
    with file.open("rb") as stream:
        header = stream.read(20)
    if len(header) < 20 or header[:4] != b"\x7fELF" or header[5] != 1:
        raise UserError(f"{file}: not a little-endian ELF file; build the bundle again")
    (code,) = struct.unpack_from("<H", header, 18)
    if code not in _ELF_MACHINES:
        raise UserError(
            f"{file}: ELF machine {code} is not one this project builds for"
        )
    return _ELF_MACHINES[code]


def check_replaceable(output: Path) -> None:
    """Refuse an output path that holds anything but a bundle.

    Raises:
        UserError: ``output`` is a file, a link, or a folder of something else, or its archive's
            place is taken by anything but a bundle's archive.
    """
    if output.name in ("", ".."):
        raise UserError(f"{output}: has no name of its own; choose another --output")
    if output.is_symlink() or (output.exists() and not output.is_dir()):
        raise UserError(
            f"{output}: exists and is not a directory; choose another --output"
        )
    is_bundle = (output / MANIFEST).is_file() and any(
        [*output.glob("*.so"), *output.glob("*_weights.c")]
    )
    if output.is_dir() and any(output.iterdir()) and not is_bundle:
        raise UserError(
            f"{output}: holds something that is not a bundle; choose another --output"
        )
    archive = archive_of(output)
    if not os.path.lexists(archive) or (is_bundle and archive.is_file()):
        return
    if archive.is_symlink() or not _holds_bundle(archive, output.name):
        raise UserError(
            f"{archive}: is not the archive of a bundle; remove it or choose another --output"
        )


def _holds_bundle(archive: Path, name: str) -> bool:
    """Whether this is an archive as :func:`staging` writes it, of the folder ``name``: its members up to the manifest."""
    found: set[str] = set()
    try:
        with tarfile.open(archive, "r|gz") as tar:
            for member in tar:
                path = member.name.removeprefix(f"{name}/")
                if not member.isreg() or path == member.name:
                    return False
                file = tar.extractfile(member)
                if path == MANIFEST and file and member.size <= MAX_MANIFEST_BYTES:
                    # Of any version: only that a build wrote it is checked.
                    manifest = json.loads(file.read())
                    files = {*manifest["files"], manifest["library"]}
                    return bool(manifest["golden"]) and found <= files
                found.add(path)
    except Exception:  # noqa: BLE001  (tarfile, zlib and json raise errors of any class on a foreign file)
        return False
    return False


@contextlib.contextmanager
def staging(output: Path) -> Iterator[Path]:
    """A new folder next to ``output`` that takes its place when the block succeeds, and is removed when it fails.

    An archive ``<output>.tar.gz`` of the same files takes its place with it.
    """
    check_replaceable(output)
    folders = (output.parent, *output.parent.parents)
    created = [folder for folder in folders if not folder.exists()]
    try:
        if created:
            output.parent.mkdir(parents=True, exist_ok=True)
        stage = Path(tempfile.mkdtemp(prefix=f".{output.name}-", dir=output.parent))
    except OSError as error:
        _remove(created)
        raise UserError(
            f"{output.parent}: {error.strerror}; choose another --output"
        ) from None
    archive = stage.with_name(stage.name + ".tar.gz")
    try:
        content = stage / output.name
        content.mkdir()
        yield content
        with archive.open("wb") as file:
            write_archive(file, _members(content), level=1)
        archive.chmod(0o644)
        if output.exists():
            output.rename(stage / "replaced")
        content.rename(output)
        archive.rename(archive_of(output))
    except BaseException as error:
        # Before the room is given back.
        full = full_folder(error, [output.parent])
        if (stage / "replaced").exists() and not output.exists():
            (stage / "replaced").rename(output)
        archive.unlink(missing_ok=True)
        shutil.rmtree(stage, ignore_errors=True)
        _remove(created)
        if full:
            advice = "choose another --output"
            if not full.startswith(f"{output.parent}: "):
                advice = "set TMPDIR to another folder"
            raise UserError(f"{full}; make room or {advice}") from None
        raise
    shutil.rmtree(stage, ignore_errors=True)


def archive_of(output: Path) -> Path:
    return output.with_name(output.name + ".tar.gz")


def _remove(folders: list[Path]) -> None:
    """Those of the folders, deepest first, that are empty."""
    for folder in folders:
        with contextlib.suppress(OSError):
            folder.rmdir()


def _members(folder: Path) -> Iterator[tuple[str, int, bytes]]:
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = path.relative_to(folder.parent).as_posix()
        yield name, 0o755 if path.suffix == ".so" else 0o644, path.read_bytes()


def write_archive(
    archive: IO[bytes], files: Iterable[tuple[str, int, bytes]], level: int
) -> None:
    """Write a .tar.gz of files, each a name, a mode and content; its bytes depend on nothing else.

    Args:
        level: gzip's, 1 for quick to 9 for small.
    """
    with (
        gzip.GzipFile("", "wb", level, archive, mtime=0) as packed,
        tarfile.open(fileobj=packed, mode="w", format=tarfile.USTAR_FORMAT) as tar,
    ):
        for name, mode, content in files:
            entry = tarfile.TarInfo(name)
            entry.size, entry.mode = len(content), mode
            tar.addfile(entry, io.BytesIO(content))
