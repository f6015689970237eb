"""A damaged or forged bundle is refused before it is loaded: exit code 2, one line, nothing left behind."""

from __future__ import annotations

import os
import re
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from refusals import CHECK, Place, contents, expect, labelled_bundle, rehash, rewrite

from netship.targets.presets import native


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return labelled_bundle(tmp_path_factory.mktemp("valid"))


def flip(name: str) -> Callable[[Path], None]:
    def damage(bundle: Path) -> None:
        data = bytearray((bundle / name).read_bytes())
        data[len(data) // 2] ^= 1
        (bundle / name).write_bytes(data)

    return damage


def replace_by_link(bundle: Path) -> None:
    (bundle / "model.so").rename(bundle.parent / "elsewhere.so")
    (bundle / "model.so").symlink_to("../elsewhere.so")


def truncate_manifest(bundle: Path) -> None:
    text = (bundle / "manifest.json").read_text()
    (bundle / "manifest.json").write_text(text[: len(text) // 2])


def huge_manifest(bundle: Path) -> None:
    os.truncate(bundle / "manifest.json", 3 << 30)


def state(*path: str | int, value: object) -> Callable[[Path], None]:
    """Let the manifest say ``value`` at that path."""

    def change(manifest: Any) -> None:
        *way, last = path
        for step in way:
            manifest = manifest[step]
        manifest[last] = value

    return lambda bundle: rewrite(bundle, change)


def another_image(bundle: Path) -> None:
    """As many bytes, and consistent in itself: only the library knows better."""

    def change(manifest: Any) -> None:
        manifest["inputs"][0]["shape"] = [1, 3, 8, 32]
        manifest["preprocessing"] |= {"crop": [8, 32], "resize": 32}

    rewrite(bundle, change)


OTHER, OTHER_CODE = ("aarch64", 183) if native().machine == "x86_64" else ("x86_64", 62)


def for_other_machine(bundle: Path) -> None:
    library = bytearray((bundle / "model.so").read_bytes())
    library[18:20] = struct.pack("<H", OTHER_CODE)
    (bundle / "model.so").write_bytes(library)
    rehash(bundle)


def whole_for_other_machine(bundle: Path) -> None:
    for_other_machine(bundle)
    rewrite(bundle, lambda m: m["target"].update(machine=OTHER, name="far-away"))


def no_library(bundle: Path) -> None:
    data = (bundle / "model.so").read_bytes()
    (bundle / "model.so").write_bytes(data[:64] + bytes(len(data) - 64))
    rehash(bundle)


def odd_name(name: str) -> Callable[[Path], None]:
    return lambda bundle: rewrite(bundle, lambda m: m["files"].update({name: "0" * 64}))


def newer(bundle: Path) -> None:
    rewrite(bundle, lambda m: m.update(format_version=5, novelty=[]))


def older(bundle: Path) -> None:
    """As the first format: golden outputs had no tolerances."""

    def change(manifest: Any) -> None:
        manifest["format_version"] = 1
        for entry in manifest["golden"]:
            del entry["tolerances"]

    rewrite(bundle, change)


def tolerance(value: float) -> Callable[[Path], None]:
    """Let a golden tolerance be ``value``, with the hash that fits."""

    def damage(bundle: Path) -> None:
        path = bundle / "golden/1.tolerance0.bin"
        values = np.fromfile(path, "<f4")
        values[2] = value
        values.tofile(path)
        rehash(bundle)

    return damage


def short_tolerances(bundle: Path) -> None:
    os.truncate(bundle / "golden/0.tolerance0.bin", 4)
    rehash(bundle)


def not_finite(bundle: Path) -> None:
    path = bundle / "golden/0.input.bin"
    values = np.fromfile(path, "<f4")
    values[5] = np.nan
    values.tofile(path)
    rehash(bundle)


AGAIN = "build the bundle again"
BUNDLES: dict[str, tuple[Callable[[Path], object], str]] = {
    "a byte of model.so": (flip("model.so"), "model.so|SHA-256|copy or build"),
    "a byte of a golden output": (flip("golden/0.output0.bin"), "0.output0|SHA-256"),
    "a byte of the labels": (flip("labels.txt"), "labels.txt|SHA-256|copy or build"),
    "no model.so": (lambda b: (b / "model.so").unlink(), "model.so|missing|copy"),
    "a measurement of another form": (
        state("measured", "verification", value=True),
        f"manifest.json|of measured is no object|{AGAIN}",
    ),
    "no golden input": (
        lambda b: (b / "golden/1.input.bin").unlink(),
        "golden/1.input.bin|missing|copy or build",
    ),
    "no manifest": (lambda b: (b / "manifest.json").unlink(), "not a bundle|build"),
    "a link for model.so": (replace_by_link, "model.so|a link|copy the bundle again"),
    "a manifest that is text": (
        lambda b: (b / "manifest.json").write_text("hello"),
        f"manifest.json|{AGAIN}",
    ),
    "half a manifest": (truncate_manifest, f"manifest.json|{AGAIN}"),
    "a manifest of 3 GB": (huge_manifest, f"manifest.json|{AGAIN}"),
    "a newer format": (newer, f"manifest.json|format version 5|{AGAIN}"),
    "the format before": (older, f"manifest.json|format version 1|{AGAIN}"),
    **{
        f"a tolerance that is {value}": (
            tolerance(value),
            f"1.tolerance0.bin|{words}|{AGAIN}",
        )
        for value, words in (
            (-1e-9, "has a negative tolerance"),
            (np.nan, "has NaN or infinity"),
            (np.inf, "has NaN or infinity"),
        )
    },
    "too few tolerances": (
        short_tolerances,
        f"0.tolerance0.bin|4 bytes|takes 20|{AGAIN}",
    ),
    "a byte of the tolerances": (flip("golden/0.tolerance0.bin"), "0.tol|SHA-256"),
    "NaN in a golden input": (not_finite, f"0.input.bin|NaN or infinity|{AGAIN}"),
    "../ in a file's name": (odd_name("../outside"), f"'../outside'|{AGAIN}"),
    "an absolute file name": (odd_name("/etc/hostname"), f"'/etc/hostname'|{AGAIN}"),
    "a file's name of two lines": (odd_name("a\nb\x1b[1m"), "missing|copy"),
    "channels last, it says": (
        state("inputs", 0, "shape", value=[1, 16, 3, 16]),
        f"manifest.json|{AGAIN}",
    ),
    "another image, it says": (
        another_image,
        f"float32[1,3,16,16]|the manifest says image float32[1,3,8,32]|{AGAIN}",
    ),
    "no image, it says": (
        state("inputs", 0, "shape", value=[768]),
        f"manifest.json|not an image|{AGAIN}",
    ),
    "a larger input, it says": (
        lambda b: rewrite(
            b,
            lambda m: (
                m["inputs"][0].update(shape=[1, 3, 32, 32]),
                m["preprocessing"].update(crop=[32, 32], resize=32),
            ),
        ),
        f"0.input.bin|3072 bytes|takes 12288|{AGAIN}",
    ),
    "another output, it says": (
        state("outputs", 0, "shape", value=[5, 1]),
        f"output float32[1,5]|says float32[5,1]|{AGAIN}",
    ),
    "another input's name, it says": (
        state("inputs", 0, "name", value="picture"),
        f"image|picture|{AGAIN}",
    ),
    "no golden data": (state("golden", value=[]), f"golden|{AGAIN}"),
    "a library for another machine": (
        for_other_machine,
        f"model.so|is for {OTHER}, the manifest says {native().machine}",
    ),
    "a whole bundle for another machine": (
        whole_for_other_machine,
        f"is for {OTHER} (far-away)|this machine is {native().machine}|run it on",
    ),
    "a CPU feature that is not here": (
        state("target", "features", value=["timetravel"]),
        "lacks timetravel|--target native",
    ),
    "a library of zeros": (no_library, "model.so|cannot be loaded|build it"),
}


@pytest.mark.parametrize("case", BUNDLES)
def test_refuses_a_bundle(place: Place, bundle: Path, case: str) -> None:
    damage, words = BUNDLES[case]
    shutil.copytree(bundle, place.here / "bundle")
    damage(place.here / "bundle")
    expect(place.refused(CHECK, "bundle"), "bundle|" + words)


def test_the_undamaged_bundle_passes(place: Place, bundle: Path) -> None:
    shutil.copytree(bundle, place.here / "bundle")
    before = contents(place.here)
    with place.start(CHECK, "bundle", "--repeat", 1) as process:
        out, err = process.communicate()
    assert process.returncode == 0, err
    assert "PASSED" in out
    assert (contents(place.here), contents(place.temporary)) == (before, {})


def test_a_wrong_answer_is_no_refusal_but_a_verdict(place: Place, bundle: Path) -> None:
    path = place.here / "bundle"
    shutil.copytree(bundle, path)
    golden = path / "golden/0.output0.bin"
    golden.write_bytes((np.frombuffer(golden.read_bytes(), "<f4") + 1).tobytes())
    rehash(path)
    with place.start(CHECK, "bundle", "--repeat", 1) as process:
        out, err = process.communicate()
    assert process.returncode == 1, err
    assert "FAILED" in out and "error:" not in err


@pytest.mark.parametrize(
    ("tolerance", "words", "code"),
    [
        (1.0, "explain", 0),
        (1e-5, "do not explain", 1),
    ],
)
def test_golden_classes_in_another_order_pass_where_tolerances_explain_it(
    place: Place, bundle: Path, tolerance: float, words: str, code: int
) -> None:
    """The reference's best class is our second; far less apart than the range of the output."""
    path = place.here / "bundle"
    shutil.copytree(bundle, path)
    for index in range(2):
        output = path / f"golden/{index}.output0.bin"
        scores = np.fromfile(output, "<f4")
        first, second = np.argsort(-scores)[:2]
        scores[second] = scores[first] + np.float32(1e-4)
        scores.tofile(output)
        near = np.full(scores.size, tolerance, np.float32)
        near.tofile(path / f"golden/{index}.tolerance0.bin")
    rehash(path)
    with place.start(CHECK, "bundle", "--repeat", 1) as process:
        out, err = process.communicate()
    assert process.returncode == code, err
    assert (
        len(
            re.findall(rf"^note: .* their tolerances, \S+, {words}$", out, re.MULTILINE)
        )
        == 2
    )
    assert "top-1 0/2, top-5 2/2, in the same order 0/2, with" in out


def test_a_golden_score_is_judged_by_its_own_tolerance(
    place: Place, bundle: Path
) -> None:
    """Less than the 2e-4 of the output's range that a bundle of the first format accepted."""
    path = place.here / "bundle"
    shutil.copytree(bundle, path)
    output = path / "golden/1.output0.bin"
    scores = np.fromfile(output, "<f4")
    scores[3] += 1e-4 * np.ptp(scores)
    scores.tofile(output)
    rehash(path)
    with place.start(CHECK, "bundle", "--repeat", 1) as process:
        out, err = process.communicate()
    assert process.returncode == 1, err
    assert "FAILED" in out and "of an element's tolerance" in out


def test_refuses_the_archive_in_place_of_the_folder(place: Place) -> None:
    (place.here / "bundle.tar.gz").write_bytes(b"\x1f\x8b")
    line = place.refused(CHECK, "bundle.tar.gz")
    expect(line, "bundle.tar.gz|not a bundle|unpack it first (tar xf)")


def test_refuses_a_folder_that_is_not_there(place: Place) -> None:
    expect(place.refused(CHECK, "nowhere"), "nowhere|not a bundle|compile.build")


def test_there_are_many_cases_and_each_expects_words_of_its_own() -> None:
    """A case whose words any error has would test nothing."""
    assert len(BUNDLES) >= 25
    for _, words in BUNDLES.values():
        assert re.sub(r"[^a-z]", "", words.lower())
