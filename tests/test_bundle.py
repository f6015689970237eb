"""The bundle on disk: its manifest, what a changed one is refused for, and how it opens."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from changed_json import Change, changed, changes
from hypothesis import given, settings
from hypothesis import strategies as st
from whole_bundles import INPUT, OUTPUT, PREPROCESSING, elf, fill, scores

from netship.bundle.golden import normalise, read_golden, seeded_inputs
from netship.bundle.manifest import MAX_MANIFEST_BYTES, parse
from netship.bundle.store import LIBRARY, MANIFEST, elf_machine, open_bundle
from netship.targets.errors import UserError


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
    assert manifest.inputs[0] == INPUT and manifest.outputs == (OUTPUT,)
    assert manifest.measured == {"seconds": 1.5, "nested": {"list": [1, None]}}


def without_figures() -> str:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        return fill(Path(folder)).to_json()


TEXT = without_figures()
GROUP = {"name": "k", "operators": [], "output_shape": [1], "macs": 1}
# Of one step, where the manifest's groups name none.
FIRMWARE = {
    "cpu": "cortex-m4",
    "inputs": [{"dtype": "float32", "nbytes": 288}],
    "outputs": [{"dtype": "float32", "nbytes": 20}],
    "exact": True,
    "arena_bytes": 288,
    "input_offsets": [0],
    "peak": "stem",
    "steps": 1,
    "weights_bytes": 0,
}


@settings(max_examples=400, deadline=None, derandomize=True)
@given(changes=changes(TEXT))
def test_a_changed_manifest_is_valid_or_refused(changes: list[Change]) -> None:
    try:
        accepted = parse(changed(TEXT, changes).encode(), "m.json")
    except UserError as error:
        assert str(error).startswith("m.json: ")
    else:
        # What is accepted can be used: shapes have sizes, paths stay inside.
        assert accepted.inputs[0].nbytes > 0
        assert (accepted.preprocessing is None) != accepted.inputs[0].is_image
        for value in (0.0, 255.0):
            if accepted.preprocessing is None:
                break
            image = np.full(
                (accepted.inputs[0].channels, *accepted.inputs[0].size), value
            )
            tensor = normalise(image, accepted.preprocessing, accepted.inputs[0])
            assert tensor.shape == (1, *accepted.inputs[0].shape[1:])
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
        (("golden", 0, "inputs", 0), "unlisted.bin"),
        (("golden", 0, "inputs"), []),
        (("inputs",), []),
        (("inputs",), [json.loads(TEXT)["inputs"][0]] * 2),
        (("golden", 0, "tolerances", 0), "unlisted.bin"),
        (("golden", 0, "tolerances"), []),
        (("golden",), []),
        (("inputs", 0, "shape"), [1, 3, 0, 6]),
        (("inputs", 0, "shape"), [1, 3, 4]),
        (("inputs", 0, "layout"), ""),
        (("inputs", 0, "layout"), "NHWC"),
        (("preprocessing",), None),
        (("inputs", 0, "quantised"), {"scale": 0, "zero": 0}),
        (("inputs", 0, "quantised"), {"scale": 1, "zero": 256}),
        (("inputs", 0, "dtype"), "int64"),
        (("inputs", 0, "dtype"), "float16"),
        (("outputs",), []),
        (("preprocessing", "std"), [0]),
        (("preprocessing", "std"), [1e-40]),
        (("preprocessing", "scale"), 1e308),
        (("preprocessing", "scale"), float("inf")),
        (("preprocessing", "mean"), [1, 1]),
        (("preprocessing", "resize"), 5),
        (("preprocessing", "resize"), 40_000),
        (("outputs", 0, "shape"), [1, 1 << 20, 1 << 20]),
        (("threads",), 0),
        (("lowering", "groups"), [GROUP | {"macs": -1}]),
        (("lowering", "groups"), [GROUP | {"macs": 10**30}]),
        (("firmware",), FIRMWARE),
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


def test_a_projects_steps_are_as_many_as_its_groups() -> None:
    manifest = json.loads(TEXT) | {"firmware": FIRMWARE}
    manifest["lowering"]["groups"] = [GROUP]
    assert parse(json.dumps(manifest).encode(), "m.json").firmware


@pytest.mark.parametrize("version", [1, 2, 7])
def test_another_format_is_told_from_nonsense(version: int) -> None:
    text = json.dumps(json.loads(TEXT) | {"format_version": version}).encode()
    words = f"format version {version}, this program reads 4; build the bundle again"
    with pytest.raises(UserError, match=words):
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
    for ([tensor], outputs, tolerances), expected in zip(pairs, inputs, strict=True):
        assert np.array_equal(tensor, expected)
        assert np.array_equal(outputs[0], scores(expected)[0])
        assert np.array_equal(tolerances, [np.full((1, 5), 0.25)])


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
