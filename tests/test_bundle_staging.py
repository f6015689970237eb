"""A bundle and its archive appear whole or not at all, and replace nothing but a bundle."""

from __future__ import annotations

import errno
import io
import os
import shutil
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from whole_bundles import elf, fill

from netship.bundle.store import (
    MANIFEST,
    archive_of,
    check_replaceable,
    open_bundle,
    staging,
)
from netship.targets import disk
from netship.targets.errors import UserError


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    path = tmp_path / "whole"
    path.mkdir()
    fill(path)
    return path


def tree(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_a_staged_bundle_appears_whole_with_its_archive(tmp_path: Path) -> None:
    output = tmp_path / "new" / "deep" / "bundle"
    with staging(output) as folder:
        fill(folder)
        assert not output.exists()
    open_bundle(output)
    assert sorted(path.name for path in output.parent.iterdir()) == [
        "bundle",
        "bundle.tar.gz",
    ]


def test_a_staged_bundle_replaces_the_old_one(tmp_path: Path) -> None:
    output = tmp_path / "bundle"
    for content in ("old", "new"):
        with staging(output) as folder:
            fill(folder)
            (folder / f"{content}.txt").write_text(content)
    assert (output / "new.txt").exists() and not (output / "old.txt").exists()
    with tarfile.open(archive_of(output)) as archive:
        names = archive.getnames()
    assert "bundle/new.txt" in names and "bundle/old.txt" not in names
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("failure", [ValueError, KeyboardInterrupt, UserError])
def test_after_a_failure_the_old_bundle_is_as_it_was(
    tmp_path: Path, failure: type[BaseException]
) -> None:
    output = tmp_path / "bundle"
    with staging(output) as folder:
        fill(folder)
    before = tree(tmp_path)
    with pytest.raises(failure), staging(output) as folder:
        (folder / "half.txt").write_text("half")
        raise failure("stop")
    assert tree(tmp_path) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "bundle",
        "bundle.tar.gz",
    ]


def test_after_a_failure_no_folder_is_left(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="stop"), staging(tmp_path / "a/b/c"):
        raise ValueError("stop")
    assert list(tmp_path.iterdir()) == []


def test_when_the_new_one_cannot_take_its_place_the_old_one_comes_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "bundle"
    with staging(output) as folder:
        fill(folder)
    before = tree(tmp_path)
    rename: Callable[[Path, Path], Path] = Path.rename

    def fail(self: Path, target: Path) -> Path:
        if target == output and self.name == "bundle":
            raise OSError(errno.EIO, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(OSError, match="Input/output"), staging(output) as folder:
        fill(folder)
        (folder / "new.txt").write_text("new")
    assert tree(tmp_path) == before


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_full_disk_names_the_folder(tmp_path: Path, number: int) -> None:
    with (
        pytest.raises(UserError, match=f"{tmp_path}: .*; make room"),
        staging(tmp_path / "bundle"),
    ):
        raise OSError(number, os.strerror(number))
    assert list(tmp_path.iterdir()) == []


def test_a_full_temporary_folder_is_not_taken_for_the_output(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    errors = [
        OSError(errno.ENOSPC, "No space left", str(temporary / "x/model.so")),
        OSError(errno.ENOSPC, "No space left", "read", None, str(temporary / "x")),
        OSError(errno.ENOSPC, "No space left"),
    ]
    monkeypatch.setattr(disk, "why_full", lambda folder: folder == temporary)
    for error in errors:
        with (
            pytest.raises(UserError, match=f"^{temporary}: No space left; .* TMPDIR"),
            staging(tmp_path / "out/bundle"),
        ):
            raise error


def test_without_a_temporary_folder_a_full_disk_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def nowhere() -> str:
        raise FileNotFoundError(errno.ENOENT, "No usable temporary directory found")

    monkeypatch.setattr(tempfile, "gettempdir", nowhere)
    with (
        pytest.raises(UserError, match=f"^{tmp_path}: .*; make room"),
        staging(tmp_path / "bundle"),
    ):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert list(tmp_path.iterdir()) == []


def test_an_empty_folder_may_become_a_bundle(tmp_path: Path) -> None:
    (tmp_path / "bundle").mkdir()
    with staging(tmp_path / "bundle") as folder:
        fill(folder)
    open_bundle(tmp_path / "bundle")


def test_what_is_no_bundle_is_never_replaced(tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    (photos / MANIFEST).write_text("{}")  # a web application has one too
    (tmp_path / "other.tar.gz").write_text("mine")
    (tmp_path / "link").symlink_to(photos)
    for output in (photos, tmp_path / "other", tmp_path / "link", Path(), Path("..")):
        with pytest.raises(UserError, match="choose another --output"):
            check_replaceable(output)


def test_an_archive_whose_folder_was_deleted_is_replaced(tmp_path: Path) -> None:
    output = tmp_path / "bundle"
    for library in (elf(), elf() + b"newer"):
        with staging(output) as folder:
            fill(folder, library)
        with tarfile.open(archive_of(output)) as archive:
            stored = archive.extractfile("bundle/model.so")
            assert stored and stored.read() == library
        shutil.rmtree(output)


def other_archive(path: Path, *members: tuple[str, bytes], mode: str = "w:gz") -> None:
    with tarfile.open(path, mode) as archive:  # type: ignore[call-overload]
        for name, content in members:
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))


def test_an_archive_of_anything_else_is_never_replaced(
    tmp_path: Path, whole: Path
) -> None:
    output = tmp_path / "bundle"
    with staging(output) as folder:
        fill(folder)
    ours, place = archive_of(output).read_bytes(), archive_of(output)
    shutil.rmtree(output)
    manifest = (whole / MANIFEST).read_bytes()
    mine = ("bundle/diary.txt", b"mine")
    cases: list[Callable[[], object]] = [
        lambda: place.write_bytes(b""),
        lambda: place.write_bytes(ours[: len(ours) // 2]),
        lambda: place.write_bytes(b"\x1f\x8b" + bytes(100)),
        lambda: other_archive(place, mine),
        lambda: other_archive(place, mine, (f"bundle/{MANIFEST}", manifest)),
        lambda: other_archive(place, (f"bundle/{MANIFEST}", b"{}")),
        lambda: other_archive(place, (f"bundle/{MANIFEST}", b"[]")),
        lambda: other_archive(place, (f"bundle/{MANIFEST}", b"[" * 100_000)),
        lambda: other_archive(place, (f"another/{MANIFEST}", manifest)),
        lambda: other_archive(place, (f"bundle/{MANIFEST}", manifest), mode="w"),
        lambda: place.mkdir(),
        lambda: place.symlink_to(tmp_path / "ours.tar.gz"),
    ]
    (tmp_path / "ours.tar.gz").write_bytes(ours)
    for write in cases:
        if place.is_dir():
            place.rmdir()
        place.unlink(missing_ok=True)
        write()
        with pytest.raises(UserError, match="remove it or choose another --output"):
            check_replaceable(output)
    place.unlink()
    place.write_bytes(ours)
    check_replaceable(output)


def test_the_archive_depends_on_names_and_contents_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    archives = []
    for day, place in enumerate(("one", "two")):
        monkeypatch.setattr("time.time", lambda day=day: 1e9 + day * 86400)
        with staging(tmp_path / place / "bundle") as folder:
            fill(folder)
            if place == "two":  # other times and permissions, same files
                for path in folder.rglob("*"):
                    os.utime(path, (0, 0))
                    path.chmod(0o700)
        archives.append((tmp_path / place / "bundle.tar.gz").read_bytes())
    assert archives[0] == archives[1]


def test_the_archive_unpacks_to_the_bundle_and_nowhere_else(tmp_path: Path) -> None:
    with staging(tmp_path / "bundle") as folder:
        fill(folder)
    with tarfile.open(archive_of(tmp_path / "bundle")) as archive:
        members = archive.getmembers()
        assert all(member.isreg() for member in members)
        assert all(member.name.startswith("bundle/") for member in members)
        # No filter="data": Debian 12's Python 3.11.2 has none.
        archive.extractall(tmp_path / "elsewhere")
    assert {member.uid for member in members} == {0}
    assert [m.mode for m in members if m.name.endswith(".so")] == [0o755]
    open_bundle(tmp_path / "elsewhere" / "bundle")
    assert tree(tmp_path / "elsewhere" / "bundle") == tree(tmp_path / "bundle")
