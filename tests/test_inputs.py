"""Arrays that a user gives as inputs: what is taken, and the one line for everything else."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from whole_bundles import INPUT, PREPROCESSING

from netship.bundle import inputs
from netship.bundle.golden import DATA_RANGE, seeded_inputs, signed_inputs
from netship.bundle.manifest import Tensor
from netship.compile.frontend.preprocessing import Overrides, resolve_preprocessing
from netship.targets.errors import UserError

ROW = Tensor(name="x", shape=(1, 4))
VALUES = np.array([[1, -2, 0.5, 3e30]], np.float32)


def saved(folder: Path, array: Any, name: str = "a.npy") -> Path:
    np.save(folder / name, array, allow_pickle=True)
    return folder / name


@pytest.mark.parametrize(
    "array", [VALUES, VALUES[0], np.asfortranarray(VALUES)], ids=["whole", "row", "f"]
)
def test_an_array_is_the_input(tmp_path: Path, array: Any) -> None:
    (tensor,), notes, _ = inputs.read(saved(tmp_path, array), [ROW], None)
    assert notes == () and tensor.dtype == np.float32
    assert np.array_equal(tensor, VALUES)
    tensor[:] = 0  # a copy of its own
    assert np.array_equal(np.load(tmp_path / "a.npy"), array)


def test_an_image_may_be_an_array_that_is_preprocessed_already(tmp_path: Path) -> None:
    image = np.ones(INPUT.shape[1:], np.float32)
    path = saved(tmp_path, image)
    (tensor,), _, _ = inputs.read(path, [INPUT], PREPROCESSING)
    assert np.array_equal(tensor[0], image)


@pytest.mark.parametrize(
    ("array", "words"),
    [
        (np.zeros((1, 5), np.float32), r"shape \[1, 5\], the input is float32 \[1, 4\]"),
        (np.zeros((2, 4), np.float32), r"shape \[2, 4\]"),
        (np.zeros((4, 1), np.float32), r"shape \[4, 1\]"),
        (np.zeros((), np.float32), r"shape \[\]"),
        (np.zeros((1, 4)), "has float64, the input is float32"),
        (np.zeros((1, 4), np.int64), "has int64"),
        (np.zeros((1, 4), ">f4"), "has >f4"),
        (np.zeros((1, 4), "f4,i8"), r"has \[\("),
        (VALUES * np.float32(np.nan), "NaN or infinity"),
        (VALUES * np.float32(np.inf), "NaN or infinity"),
        (np.array([[{}, [], 1, "a"]], object), "not a .npy file of numbers"),
    ],
    ids=range(11),
)  # fmt: skip
@pytest.mark.filterwarnings("ignore")
def test_another_array_is_refused(tmp_path: Path, array: Any, words: str) -> None:
    refused(saved(tmp_path, array), words)


def header(text: str) -> bytes:
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x93NUMPY",
        b"PK\x03\x04 a zip",
        b"\x80\x04K\x01.",
        header("{'descr': '<f4', 'fortran_order': False, 'shape': (1, 4)}"),
        header(f"{{'descr': '<f4', 'fortran_order': False, 'shape': (1, {10**15})}}"),
        header(f"{{'descr': '<f4', 'fortran_order': False, 'shape': (1, -{10**9})}}"),
        header("{'descr': '|O', 'fortran_order': False, 'shape': (1, 4)}") + bytes(99),
        header("(" * 60_000),
        header("\x1b[31m\n" * 100),
    ],
    ids=range(10),
)
def test_a_hostile_file_is_one_line(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.npy").write_bytes(content)
    refused(tmp_path / "a.npy", "not a .npy file of numbers")


def test_what_is_no_file_and_no_array_is_refused(tmp_path: Path) -> None:
    refused(tmp_path / "a.npy", "no such file")
    os.mkfifo(tmp_path / "a.npy")
    refused(tmp_path / "a.npy", "no such file")
    refused(tmp_path / "a.jpg", "takes data, not photographs; give a .npy file")


def refused(path: Path, words: str) -> None:
    with pytest.raises(UserError, match=words) as error:
        inputs.read(path, [ROW], None)
    text = str(error.value)
    assert text.startswith(f"{path}: ") and text.isprintable()


def test_a_folder_gives_the_files_that_fit_the_input(tmp_path: Path) -> None:
    for name in ("b.npy", "a.npy", "c.jpg", "d.txt"):
        (tmp_path / name).touch()
    assert [p.name for p in inputs.find([tmp_path], [ROW])] == ["a.npy", "b.npy"]
    assert [p.name for p in inputs.find([tmp_path], [INPUT])] == ["c.jpg"]
    (tmp_path / "c.jpg").unlink()
    assert [p.name for p in inputs.find([tmp_path], [INPUT])] == ["a.npy", "b.npy"]
    with pytest.raises(UserError, match="no such file or folder; give an array or a"):
        inputs.find([tmp_path / "e"], [ROW])


def test_seeded_data_has_both_signs_and_the_stated_range() -> None:
    wide = Tensor(name="x", shape=(1, 9, 128))
    first, second = seeded_inputs(wide, None)
    again, _ = seeded_inputs(wide, None)
    assert np.array_equal(first, again) and not np.array_equal(first, second)
    low, high = DATA_RANGE
    for each in (first, second):
        assert each.dtype == np.float32 and each.shape == wide.shape
        assert low <= each.min() < 0.9 * low and 0.9 * high < each.max() <= high
    noise, stripes = signed_inputs(wide, None)
    assert noise.min() < -4 and noise.max() > 4
    assert {0, 4, -4} <= set(stripes.ravel().tolist())


def test_data_has_no_preprocessing() -> None:
    found, note = resolve_preprocessing(Overrides(), None, [ROW])
    assert found is None
    assert note == (
        "the input [1, 4] is data, not an image: run and check take .npy files of float32"
    )
    given = Overrides(scale=1.0, resize=(8,), layout="data")
    with pytest.raises(UserError, match="--resize, --scale: the input .* is data"):
        resolve_preprocessing(given, None, [ROW])
