"""The house has one direction: imports go down the list of folders only, and never in a circle."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FLOORS = [
    "runtime_demo",
    "bench",
    "tuning",
    "meter",
    "compile",
    "records",
    "devices",
    "bundle",
    "targets",
]
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(
        ".__init__"
    ): path
    for floor in FLOORS
    for path in sorted((ROOT / floor).rglob("*.py"))
}


def _imports(source: str) -> Iterator[tuple[str, bool]]:
    """Modules of ours that a source names in imports, whole names; and whether as soon as it is imported."""
    tree = ast.parse(source)
    late = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        or (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names = [
                whole if whole in MODULES else node.module
                for whole in (f"{node.module}.{alias.name}" for alias in node.names)
            ]
        else:
            continue
        for name in names:
            if name.split(".")[0] in FLOORS:
                yield name, node not in late


def _breaks(module: str, imported: str) -> bool:
    floors = [FLOORS.index(name.split(".")[0]) for name in (imported, module)]
    return floors[0] < floors[1]


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_down_only(module: str) -> None:
    imported = {name for name, _ in _imports(MODULES[module].read_text())}
    assert [name for name in sorted(imported) if _breaks(module, name)] == []
    # What a module of ours is called changes with the files: no name may lead nowhere.
    assert imported <= MODULES.keys()


def test_no_module_imports_itself_in_a_circle() -> None:
    graph = {
        module: {name for name, _ in _imports(path.read_text())} - {module}
        for module, path in MODULES.items()
    }
    assert _circle(graph) == []


def _circle(graph: dict[str, set[str]]) -> list[str]:
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def test_the_checks_can_fail() -> None:
    assert _breaks("bundle.store", "compile.build")
    assert _breaks("records.lookup", "compile.build")
    assert _breaks("compile.build", "tuning.records")
    assert not _breaks("compile.build", "records.lookup")
    assert _circle({"a": {"b"}, "b": {"c"}, "c": {"a"}})
    late = "def f():\n    from tuning.records import main\nimport records.lookup"
    assert dict(_imports(late)) == {"tuning.records": False, "records.lookup": True}
