"""Known classes of photographs: by a table or by folders, and only where they are the network's classes."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

import pytest
from check_results import a_result, an_input
from tiny import tiny_bundle

from netship.bundle import photos
from netship.bundle.store import Bundle
from netship.runtime_demo import file_names, known_classes
from netship.runtime_demo.check import _known_classes, _table
from netship.runtime_demo.known_classes import Known
from netship.targets.errors import UserError
from netship.targets.presets import native

TREES = ["ash", "birch", "Elm, field elm"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("ash/1.jpg", "ash/2.jpg", "elm/1.jpg", "elm/notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    return tmp_path


def found(
    folder: Path, names: list[str], count: int = 3, table: str | None = None
) -> Known:
    path = None
    if table is not None:
        path = folder / "mine.csv"
        path.write_text(table)
    return known_classes.find(photos.find([folder]), [folder], path, names, count)


def numbers(known: Known) -> list[tuple[str, int]]:
    return [(f"{p.parent.name}/{p.name}", k) for p, k in known.classes.items()]


IN_ORDER = [("ash/1.jpg", 0), ("ash/2.jpg", 0)]


def test_folders_are_classes_by_name(folder: Path) -> None:
    known = found(folder, ["birch", "Elm", "ash"])
    assert numbers(known) == [("ash/1.jpg", 2), ("ash/2.jpg", 2), ("elm/1.jpg", 1)]
    assert (known.source, known.notes) == ("the folders", ())


def test_a_network_of_seeded_weights_is_not_judged_by_a_table_that_lies_there(
    tmp_path: Path,
) -> None:
    made = tiny_bundle(tmp_path, native())
    (tmp_path / "photo.png").touch()
    (tmp_path / "labels.csv").write_text("file,class_index\nphoto.png,1\n")
    for model, table, judged in (
        ("mine.onnx", None, 1),
        ("mobilenetv2-0.35-96", None, 0),
        ("mobilenetv2-0.35-96", tmp_path / "labels.csv", 1),
    ):
        identity = made.manifest.model.model_copy(update={"name": model})
        known_as = made.manifest.model_copy(update={"model": identity})
        bundle = Bundle(made.path, known_as)
        asked = Namespace(labels=table, images=[tmp_path])
        known = _known_classes(bundle, [tmp_path / "photo.png"], asked)
        assert len(known.classes) == judged
        assert ["seeded" in each for each in known.notes] == [True] * (not judged)


def test_folders_are_classes_by_number_or_in_order(folder: Path) -> None:
    assert numbers(found(folder, [], 2)) == [*IN_ORDER, ("elm/1.jpg", 1)]
    (folder / "ash").rename(folder / "7")
    (folder / "elm").rename(folder / "12")
    assert sorted(numbers(found(folder, [], 13))) == [("12/1.jpg", 12), ("7/1.jpg", 7), ("7/2.jpg", 7)]  # fmt: skip


def test_folders_of_other_classes_are_not_counted(folder: Path) -> None:
    other = found(folder, ["ash", "oak", "fir"])
    assert other.classes == {} and "'elm' is no class of the network" in other.notes[0]
    unnamed = found(folder, [], 1000)
    assert unnamed.classes == {}
    assert "2 folders, but the network has 1,000 classes" in unnamed.notes[0]


def test_a_folder_of_images_has_no_classes(folder: Path) -> None:
    assert known_classes.find(photos.find([folder / "ash"]), [folder / "ash"], None, TREES, 3) == Known({})  # fmt: skip


def test_a_table_that_is_given_counts_for_all(folder: Path) -> None:
    known = found(folder, TREES, table="file,class_index\nash/1.jpg,1\n1.jpg,2\n2.jpg,\n")  # fmt: skip
    assert numbers(known) == [("ash/1.jpg", 1), ("elm/1.jpg", 2)]
    assert known.source == "mine.csv"


def test_a_table_next_to_the_images_is_used_where_it_fits(folder: Path) -> None:
    table = folder / "ash" / "labels.csv"
    table.write_text("file,class_index,label\n1.jpg,2,field elm\n3.jpg,0,\n")
    assert numbers(found(folder, TREES)) == [("ash/1.jpg", 2)]
    table.write_text("file,class_index,label\n1.jpg,1,chickadee\n2.jpg,2,elm\n2.jpg,0,hen\n")  # fmt: skip
    known = found(folder, TREES)
    assert known.classes == {} and known.source == ""
    assert "its class 1 is 'chickadee', the network's is 'birch'" in known.notes[0]
    table.write_text("file,class_index\n1.jpg,281\n")
    assert "it has class 281, the network has 3 classes" in found(folder, []).notes[0]


@pytest.mark.parametrize(
    ("table", "says"),
    [
        ("file,class_index\n1.jpg,3\n", "it has class 3, the network has 3"),
        ("file,class_index\n1.jpg,-1\n", "it has class -1"),
        ("file,class_index,label\n1.jpg,0,cat\n", "its class 0 is 'cat'"),
        ("file,class_index\nother.jpg,1\n", "names none of the 3 images"),
        (
            "file,class_index\n1.jpg,1\n",
            "'1.jpg' can be .*ash/1.jpg or .*elm/1.jpg; name",
        ),
        ("file,class_index\n1.jpg,one\n", "whole number"),
        ("", "names none"),
        ("name,class_index\n1.jpg,1\n", "no column 'file'"),
        ("file\n1.jpg\n", "no column 'class_index'"),
        ("file,class_index,label\n1.jpg,0,\x1b[31mcat\n", r"'\ufffd\[31mcat'"),
    ],
)
def test_a_broken_or_foreign_table_is_refused_in_one_line(
    folder: Path, table: str, says: str
) -> None:
    with pytest.raises(UserError, match=says) as error:
        found(folder, TREES, table=table)
    assert "mine.csv" in str(error.value) and "\n" not in str(error.value)


def test_files_of_one_name_are_shown_with_their_folders() -> None:
    files = [Path(name) for name in ("x/a/1.jpg", "y/a/1.jpg", "b/1.jpg", "b/2.jpg")]
    said = file_names.titles([*files, files[3]])
    assert [said[each] for each in files] == ["x/a/1.jpg", "y/a/1.jpg", "b/1.jpg", "2.jpg"]  # fmt: skip
    assert file_names.titles(files[:1]) == {files[0]: "1.jpg"}


def test_a_table_that_is_not_there_is_refused(folder: Path) -> None:
    with pytest.raises(UserError, match="No such file"):
        known_classes.find([], [folder], folder / "nowhere.csv", [], 3)


def test_right_answers_are_counted_at_the_top_and_among_five(tmp_path: Path) -> None:
    inputs = [an_input(None, ours=1, expected=k, name=f"{k}") for k in (1, 0, 9)]
    result = a_result(tmp_path, inputs, labels="the folders")
    assert (result.labelled(), result.labelled(5)) == ((1, 3), (2, 3))
    line = next(x for x in _table(result).splitlines() if x.startswith("labels"))
    assert line.split(maxsplit=1)[1] == (
        "1 of 3 with a known class are right, 2 among the best five (the folders)"
    )
