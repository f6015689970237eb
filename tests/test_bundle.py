"""The bundle on disk: what it says, what it refuses to believe, how it comes to be whole."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import shutil
import struct
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from changed_json import Change, changed, changes
from hypothesis import given, settings
from hypothesis import strategies as st

from bundle.accuracy import TOLERANCE, compare
from bundle.golden import normalise, read_golden, seeded_inputs, write_golden
from bundle.manifest import (
    MAX_MANIFEST_BYTES,
    Lowering,
    Manifest,
    ModelIdentity,
    Preprocessing,
    TargetIdentity,
    Tensor,
    parse,
)
from bundle.store import (
    LIBRARY,
    MANIFEST,
    archive_of,
    check_replaceable,
    elf_machine,
    open_bundle,
    sha256_of,
    staging,
)
from targets.errors import UserError

INPUT = Tensor(name="image", shape=(1, 3, 4, 6), layout="NCHW")
OUTPUT = Tensor(name="scores", shape=(1, 5))
PREPROCESSING = Preprocessing(
    resize=8, crop=(4, 6), scale=1 / 127.5, mean=(1,), std=(1,)
)


def elf(machine: int = 62) -> bytes:
    """As much of a little-endian ELF file as the store looks at."""
    return b"\x7fELF\x02\x01" + bytes(12) + struct.pack("<H", machine) + bytes(44)


def scores(image: Any) -> list[Any]:
    return [np.arange(5, dtype=np.float32)[np.newaxis] + image.mean()]


def fill(folder: Path, library: bytes | None = None) -> Manifest:
    """Make a whole bundle in an empty folder."""
    (folder / LIBRARY).write_bytes(elf() if library is None else library)
    (folder / "labels.txt").write_text("ant\nbee\ncat\ndog\neel\n")
    golden = write_golden(folder, seeded_inputs(INPUT, PREPROCESSING), scores)
    files = [path for path in folder.rglob("*") if path.is_file()]
    manifest = Manifest(
        model=ModelIdentity(name="m.onnx", sha256="0" * 64),
        target=TargetIdentity(name="x86-64-v2", tvm="llvm", machine="x86_64"),
        engine="test",
        threads=2,
        input=INPUT,
        outputs=(OUTPUT,),
        probabilities=False,
        preprocessing=PREPROCESSING,
        labels="labels.txt",
        lowering=Lowering(
            layout="NCHW", reason="test", operators={}, groups=(), workspace_bytes=0
        ),
        golden=tuple(golden),
        files={path.relative_to(folder).as_posix(): sha256_of(path) for path in files},
        measured={"seconds": 1.5, "nested": {"list": [1, None]}},
    )
    (folder / MANIFEST).write_text(manifest.to_json())
    return manifest


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    path = tmp_path / "whole"
    path.mkdir()
    fill(path)
    return path


# The manifest


def test_a_manifest_reads_as_it_was_written(whole: Path) -> None:
    text = (whole / MANIFEST).read_bytes()
    manifest = parse(text, "m")
    assert manifest.to_json().encode() == text
    assert manifest.input == INPUT and manifest.outputs == (OUTPUT,)
    assert manifest.measured == {"seconds": 1.5, "nested": {"list": [1, None]}}


def without_figures() -> str:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        return fill(Path(folder)).to_json()


TEXT = without_figures()


@settings(max_examples=400, deadline=None, derandomize=True)
@given(changes=changes(TEXT))
def test_a_changed_manifest_is_valid_or_refused(changes: list[Change]) -> None:
    try:
        accepted = parse(changed(TEXT, changes).encode(), "m.json")
    except UserError as error:
        assert str(error).startswith("m.json: ")
    else:
        # What is accepted can be used: shapes have sizes, paths stay inside.
        assert accepted.input.nbytes > 0
        for value in (0.0, 255.0):
            image = np.full((accepted.input.channels, *accepted.input.size), value)
            tensor = normalise(image, accepted.preprocessing, accepted.input)
            assert tensor.shape == (1, *accepted.input.shape[1:])
            assert np.isfinite(tensor).all()
        for name in accepted.files:
            inside = os.path.normpath(os.path.join("/bundle", name))
            assert inside.startswith("/bundle/")


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    data=st.binary(max_size=200)
    | st.tuples(st.integers(0, len(TEXT)), st.binary(max_size=3)).map(
        lambda cut: TEXT[: cut[0]].encode() + cut[1] + TEXT[cut[0] + 1 :].encode()
    )
)
def test_other_bytes_are_refused_too(data: bytes) -> None:
    try:
        parse(data, "m.json")
    except UserError as error:
        assert str(error).startswith("m.json: ")


@pytest.mark.parametrize(
    "text", [b"[" * 100_000, b" " * (MAX_MANIFEST_BYTES + 1), b"", b"null", b"[]"]
)
def test_no_manifest_at_all(text: bytes) -> None:
    with pytest.raises(UserError, match=r"m\.json: "):
        parse(text, "m.json")


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("files", "../x"), "0" * 64),
        (("files", "a/../../x"), "0" * 64),
        (("files", "/x"), "0" * 64),
        (("files", "a\\x"), "0" * 64),
        (("files", "."), "0" * 64),
        (("files", "new.bin"), "0" * 63),
        (("labels",), "../labels.txt"),
        (("labels",), "unlisted.txt"),
        (("golden", 0, "input"), "unlisted.bin"),
        (("golden",), []),
        (("input", "shape"), [1, 3, 0, 6]),
        (("input", "shape"), [1, 3, 4]),
        (("input", "layout"), ""),
        (("input", "layout"), "NHWC"),
        (("input", "dtype"), "float16"),
        (("outputs",), []),
        (("preprocessing", "std"), [0]),
        (("preprocessing", "std"), [1e-40]),
        (("preprocessing", "scale"), 1e308),
        (("preprocessing", "scale"), float("inf")),
        (("preprocessing", "mean"), [1, 1]),
        (("preprocessing", "resize"), 5),
        (("threads",), 0),
        (("unheard_of",), 1),
    ],
    ids=str,
)
def test_a_manifest_that_contradicts_itself_is_refused(
    path: tuple[Any, ...], value: Any
) -> None:
    manifest = json.loads(TEXT)
    parent = manifest
    for step in path[:-1]:
        parent = parent[step]
    parent[path[-1]] = value
    with pytest.raises(UserError, match="build the bundle again"):
        parse(json.dumps(manifest).encode(), "m.json")


def test_a_newer_format_is_told_from_nonsense() -> None:
    text = json.dumps(json.loads(TEXT) | {"format_version": 7}).encode()
    with pytest.raises(UserError, match="format version 7, this program reads 1"):
        parse(text, "m.json")


# The store


def test_a_bundle_opens_and_gives_what_was_put_in(whole: Path) -> None:
    opened = open_bundle(whole)
    assert opened.labels() == ["ant", "bee", "cat", "dog", "eel"]
    assert opened.library == (whole / LIBRARY).resolve()
    assert opened.manifest.threads == 2


def test_golden_data_come_back_as_they_went_in(whole: Path) -> None:
    pairs = read_golden(open_bundle(whole))
    inputs = seeded_inputs(INPUT, PREPROCESSING)
    assert len(pairs) == len(inputs) == 2
    for (tensor, outputs), expected in zip(pairs, inputs, strict=True):
        assert np.array_equal(tensor, expected)
        assert np.array_equal(outputs[0], scores(expected)[0])


@pytest.mark.parametrize(
    ("library", "message"),
    [
        (elf(183), "is for aarch64, the manifest says x86_64"),
        (elf(8), "ELF machine 8 is not one"),
        (b"MZ" + bytes(62), "not a little-endian ELF file"),
        (elf()[:10], "not a little-endian ELF file"),
        (b"\x7fELF\x01\x02" + bytes(58), "not a little-endian ELF file"),
    ],
)
def test_a_library_of_another_kind_is_refused(
    tmp_path: Path, library: bytes, message: str
) -> None:
    fill(tmp_path, library)
    with pytest.raises(UserError, match=message):
        open_bundle(tmp_path)


@pytest.mark.parametrize(
    ("code", "machine"), [(62, "x86_64"), (183, "aarch64"), (40, "arm")]
)
def test_the_machine_is_named_as_linux_names_it(
    tmp_path: Path, code: int, machine: str
) -> None:
    (tmp_path / "x.so").write_bytes(elf(code))
    assert elf_machine(tmp_path / "x.so") == machine


def test_a_linked_folder_inside_a_bundle_is_refused(
    whole: Path, tmp_path: Path
) -> None:
    (whole / "golden").rename(tmp_path / "elsewhere")
    (whole / "golden").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="a link is not part of a bundle"):
        open_bundle(whole)


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


# Golden inputs


def digest(tensor: Any) -> str:
    return hashlib.sha256(tensor.tobytes()).hexdigest()


def test_seeded_inputs_are_the_same_everywhere() -> None:
    """What the rounding to whole pixels protects: another libm's sine may differ in its last bit."""
    inputs = seeded_inputs(INPUT, PREPROCESSING)
    assert [digest(tensor) for tensor in inputs] == SEEDED
    assert all(t.shape == INPUT.shape and t.dtype == np.float32 for t in inputs)


SEEDED = [
    "c646d1183328c921d3843c8c47deaadaffd4a7b80b853699a508b6abc045bc68",
    "4cf2056afecae15cce815fc86c4a02b6a67bc06de31a1b4440b97a7d0fb6151f",
]


def test_seeded_inputs_fill_the_range_of_a_photograph() -> None:
    large = Tensor(name="x", shape=(1, 3, 64, 64), layout="NCHW")
    preprocessing = PREPROCESSING.model_copy(update={"crop": (64, 64), "resize": 64})
    first, second = seeded_inputs(large, preprocessing)
    for tensor in (first, second):
        assert -1 <= tensor.min() < -0.5 and 0.5 < tensor.max() <= 1
    assert np.abs(first - second).max() > 0.5


def test_channels_last_has_the_same_pixels() -> None:
    last = Tensor(name="x", shape=(1, 4, 6, 3), layout="NHWC")
    for a, b in zip(
        seeded_inputs(INPUT, PREPROCESSING),
        seeded_inputs(last, PREPROCESSING),
        strict=True,
    ):
        assert b.shape == last.shape
        assert np.array_equal(a.transpose(0, 2, 3, 1), b)


def test_each_channel_has_its_own_mean_and_std() -> None:
    preprocessing = PREPROCESSING.model_copy(
        update={"scale": 0.5, "mean": (0.0, 1.0, 2.0), "std": (1.0, 2.0, 4.0)}
    )
    found = normalise(np.full((3, 4, 6), 10.0), preprocessing, INPUT)
    assert [np.unique(plane).tolist() for plane in found[0]] == [[5], [2], [0.75]]


# Accuracy


def arrays(*values: list[float]) -> list[Any]:
    return [np.array([each], np.float32) for each in values]


def test_equal_outputs_have_no_error() -> None:
    result = compare(arrays([1, 2, 3]), arrays([1, 2, 3]))
    assert result.passed
    assert (result.max_abs_error, result.rms_error, result.relative_error) == (0, 0, 0)
    assert result.cosine == pytest.approx(1)


def test_the_figures_are_those_worked_out_by_hand() -> None:
    """Errors 0, 0.5, 0 and 0; range 4; |ours|² = 26.25, |theirs|² = 24, their product 25."""
    result = compare(arrays([0, 2.5, 2, 4]), arrays([0, 2, 2, 4]))
    assert result.max_abs_error == 0.5
    assert result.rms_error == pytest.approx(0.25)
    assert result.relative_error == 0.125
    assert result.cosine == pytest.approx(25 / (26.25 * 24) ** 0.5)
    assert not result.passed


def test_the_worst_output_of_several_decides() -> None:
    """0.001 of a range of 1000 is nothing, 0.001 of a range of 0.01 is a tenth."""
    ours, theirs = arrays([0.001, 1000], [0.001, 0.01]), arrays([0, 1000], [0, 0.01])
    for order in (1, -1):
        result = compare(ours[::order], theirs[::order])
        assert result.relative_error == pytest.approx(0.1, rel=1e-3)
        assert not result.passed


def test_the_tolerance_is_relative_to_the_range() -> None:
    reference = arrays([0, 1000])
    assert compare(arrays([0.9 * TOLERANCE * 1000, 1000]), reference).passed
    assert not compare(arrays([1.1 * TOLERANCE * 1000, 1000]), reference).passed


def test_a_constant_output_is_measured_by_its_magnitude() -> None:
    """A constant has no range: a network of one class always answers 1."""
    assert compare(arrays([50, 50.001]), arrays([50, 50])).passed
    assert not compare(arrays([50, 51]), arrays([50, 50])).passed
    assert compare(arrays([0, 0]), arrays([0, 0])).passed
    assert compare(arrays([0, 0]), arrays([0, 0])).cosine == 1
    assert not compare(arrays([0, 0.001]), arrays([0, 0])).passed


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_no_number_never_passes(bad: float) -> None:
    good = arrays([1, 2, 3])
    for ours, theirs in (
        (arrays([1, bad, 3]), good),
        (good, arrays([1, bad, 3])),
        (arrays([1, bad, 3]), arrays([1, bad, 3])),
    ):
        result = compare(ours, theirs)
        assert not result.passed and result.max_abs_error == np.inf


def test_another_shape_never_passes() -> None:
    good = arrays([1, 2, 3])
    for ours in (arrays([1, 2]), arrays([1, 2, 3], [1]), [good[0].T], []):
        result = compare(ours, good)
        assert not result.passed and result.max_abs_error == np.inf
