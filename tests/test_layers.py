"""The house has one direction: imports go down the list of folders only."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FLOORS = ["runtime_demo", "tuning", "meter", "compile", "devices", "bundle", "targets"]
# The build reads records through this leaf, which itself imports nothing above targets/.
LEAVES = {"tuning.records": "targets"}


def _modules() -> list[Path]:
    return [path for floor in FLOORS for path in sorted((ROOT / floor).rglob("*.py"))]


def _imported(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in names if name.split(".")[0] in FLOORS}


def _breaks(module: str, imported: str) -> bool:
    leaf = next((leaf for leaf in LEAVES if imported.startswith(leaf)), None)
    if leaf is not None:
        return FLOORS.index(module.split(".")[0]) > FLOORS.index("compile")
    floor = LEAVES.get(module, module.split(".")[0])
    return FLOORS.index(imported.split(".")[0]) < FLOORS.index(floor)


@pytest.mark.parametrize(
    "path", _modules(), ids=lambda path: str(path.relative_to(ROOT))
)
def test_imports_go_down_only(path: Path) -> None:
    module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    assert [name for name in sorted(_imported(path)) if _breaks(module, name)] == []


def test_the_check_can_fail() -> None:
    assert _breaks("bundle.store", "compile.build.main")
    assert _breaks("tuning.records", "bundle.manifest.Tensor")
    assert not _breaks("compile.lower", "tuning.records.RecordLog")
    assert _breaks("compile.lower", "tuning.search.tune")
