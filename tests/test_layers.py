"""The layout of the code: imports go down the list of folders only, never in a circle; a long file says why it is long."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FLOORS = [
    "netship",
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
                whole if _short(whole) in MODULES else node.module
                for whole in (f"{node.module}.{alias.name}" for alias in node.names)
            ]
        else:
            continue
        for name in names:
            assert name.split(".")[0] not in FLOORS[1:], f"{name}: not netship.{name}"
            if name.split(".")[0] == "netship":
                yield _short(name), node not in late


def _short(name: str) -> str:
    """A module's name in the checkout: what lies in the linked folders has none of the links' folder."""
    inside = name.removeprefix("netship.")
    return inside if inside.split(".")[0] in FLOORS else name


def _breaks(module: str, imported: str) -> bool:
    floors = [FLOORS.index(name.split(".")[0]) for name in (imported, module)]
    return floors[0] < floors[1]


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_down_only(module: str) -> None:
    imported = {name for name, _ in _imports(MODULES[module].read_text())}
    assert [name for name in sorted(imported) if _breaks(module, name)] == []
    # Every module that is named exists, also after files were renamed.
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
    assert _breaks("runtime_demo.check", "netship.api")
    assert not _breaks("compile.build", "records.lookup")
    assert _circle({"a": {"b"}, "b": {"c"}, "c": {"a"}})
    late = "def f():\n    from netship.tuning.records import main\nimport netship.records.lookup"
    assert dict(_imports(late)) == {"tuning.records": False, "records.lookup": True}


# The length of files

MOST_LINES = 450
SOURCES = {".py", ".c", ".h", ".cc", ".cpp", ".hpp", ".cu", ".S", ".jinja"}


def _first_comment(name: str, text: str) -> str:
    """The docstring of a Python file; the comment that another file begins with."""
    if name.endswith(".py"):
        return ast.get_docstring(ast.parse(text)) or ""
    begins = re.match(r"\s*(/\*.*?\*/|(//[^\n]*\n)+|\{#.*?#\})", text, re.DOTALL)
    return begins[1] if begins else ""


def _lacks_a_reason(name: str, text: str) -> bool:
    long = len(text.splitlines()) > MOST_LINES
    reason = rf"Longer than {MOST_LINES} lines: \w"
    return long and not re.search(reason, _first_comment(name, text))


def test_a_long_file_says_why_it_is_long() -> None:
    lacking = {
        path.relative_to(ROOT).as_posix()
        for folder in (*FLOORS, "tests")
        for path in (ROOT / folder).rglob("*")
        if path.suffix in SOURCES
        and _lacks_a_reason(path.name, path.read_text(encoding="utf-8"))
    }
    assert not lacking


@pytest.mark.parametrize(
    ("name", "comment"),
    [
        ("a.py", '"""A.\n\n{}\n"""\n'),
        ("a.h", "/* A.\n * {} */\n"),
        ("a.cc", "// A.\n// {}\n"),
        ("a.jinja", "{{# A.\n   {} #}}\n"),
    ],
)
def test_only_a_reason_in_the_first_comment_counts(name: str, comment: str) -> None:
    reason = "Longer than 450 lines: one table."
    lines = "x = 0;\n" * MOST_LINES
    assert not _lacks_a_reason(name, comment.format(reason) + lines)
    assert not _lacks_a_reason(name, comment.format("") + lines[: len(lines) // 2])
    for wrong in ("", "Longer than 450 lines: ", "Longer than others: one table."):
        assert _lacks_a_reason(name, comment.format(wrong) + lines)
    assert _lacks_a_reason(name, lines + comment.format(reason))
