"""The generated C as the ecosystems of embedded development take a library, each in its own layout.

The C is copied as it is. Each layout has the sources in ``src/`` and the project's example.
"""

from __future__ import annotations

import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from netship.targets import templates
from netship.targets.cores import CORES

_HERE = Path(__file__).parent
_MAIN = "int main(void) {"
_FIXED_TIME = (1980, 1, 1, 0, 0, 0)


class _Layout(NamedTuple):
    """How an ecosystem wants a library.

    Attributes:
        files: templates, and what they become.
        example: where the project's example goes as it is; empty where a template has it.
        archive: what the whole is called as a zip file; empty where nobody unpacks one.
    """

    files: Mapping[str, str]
    example: str = ""
    archive: str = ""


_LAYOUTS: Mapping[str, _Layout] = {
    "cmsis-pack": _Layout(
        {"pack.pdsc": "netship.{name}.pdsc"},
        "examples/main.c",
        "netship.{name}.1.0.0.pack",
    ),
    "arduino": _Layout(
        {
            "library.properties": "library.properties",
            "example.ino": "examples/{name}_example/{name}_example.ino",
        },
        archive="{name}.zip",
    ),
    "zephyr": _Layout(
        {
            "module.yml": "zephyr/module.yml",
            "zephyr.cmake": "CMakeLists.txt",
            "Kconfig": "Kconfig",
            "sample.cmake": "samples/{name}/CMakeLists.txt",
            "prj.conf": "samples/{name}/prj.conf",
            "sample.yaml": "samples/{name}/sample.yaml",
        },
        "samples/{name}/src/main.c",
    ),
    "platformio": _Layout(
        {
            "library.json": "library.json",
            "platformio.ini": "examples/{name}_example/platformio.ini",
        },
        "examples/{name}_example/src/main.c",
    ),
    "esp-idf": _Layout(
        {
            "idf_component.yml": "idf_component.yml",
            "idf.cmake": "CMakeLists.txt",
            "idf_example.cmake": "examples/{name}_example/CMakeLists.txt",
            "idf_main.cmake": "examples/{name}_example/main/CMakeLists.txt",
            "idf_main.yml": "examples/{name}_example/main/idf_component.yml",
            "idf_main.c": "examples/{name}_example/main/main.c",
        }
    ),
    "cmake": _Layout(
        {
            "package.cmake": "CMakeLists.txt",
            "config.cmake": "cmake/{name}Config.cmake.in",
        },
        "example/main.c",
    ),
}
KINDS = tuple(_LAYOUTS)


def write(folder: Path, kind: str, name: str, cpu: str) -> None:
    """Write the C project ``name`` in ``folder`` as ``package/KIND/NAME`` in it.

    Args:
        kind: of `KINDS`.
        cpu: the target's name.
    """
    core = CORES[cpu]
    layout, root = _LAYOUTS[kind], folder / "package" / kind / name
    code = sorted(each for each in folder.glob("*.[ch]"))
    (root / "src").mkdir(parents=True)
    for path in code:
        (root / "src" / path.name).write_bytes(path.read_bytes())
    beside = ["LICENSES", f"{name}_memory.ld", f"{name}_memory.sct"]
    for each in [*beside, *(["toolchain.cmake"] if kind == "cmake" else [])]:
        if (folder / each).exists():
            (root / each).write_bytes((folder / each).read_bytes())
    main = (folder / "example" / "main.c").read_text(encoding="utf-8")
    values = {
        "name": name,
        "NAME": name.upper(),
        # Text that every one of the languages takes as it is.
        "title": f"Neural network {name} as C99" + (core.cpu and f" for {core.cpu}"),
        "core": core,
        "sources": [each.name for each in code if each.suffix == ".c"],
        "headers": [each.name for each in code if each.suffix == ".h"],
        "public": [
            each.name
            for each in code
            if re.fullmatch(rf"{name}(_detect|_image|_labels|_memory)?\.h", each.name)
        ],
        # As a function that any program may call.
        "example": main.replace(_MAIN, "static int example(void) {").rstrip(),
    }
    assert _MAIN in main
    environment = templates.code_environment(_HERE)
    environment.filters["in_src"] = "src/{}".format
    for template, place in layout.files.items():
        text = environment.get_template(f"{template}.jinja").render(values)
        _put(root / place.format(name=name), text)
    if layout.example:
        _put(root / layout.example.format(name=name), main)
    if layout.archive:
        # A pack has its description at the top, a library of Arduino its folder.
        top = root if kind == "cmsis-pack" else root.parent
        _zip(root, top, root.parent / layout.archive.format(name=name))


def _put(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def _zip(root: Path, top: Path, archive: Path) -> None:
    """The files of ``root`` by their paths from ``top``; the same files give the same bytes."""
    files = sorted(path for path in root.rglob("*") if path.is_file())
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as packed:
        for path in files:
            entry = zipfile.ZipInfo(path.relative_to(top).as_posix(), _FIXED_TIME)
            entry.compress_type = zipfile.ZIP_DEFLATED
            packed.writestr(entry, path.read_bytes())
