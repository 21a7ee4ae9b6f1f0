"""Imports inside `unseg` go down only; projects import `unseg` and nothing of each other."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# DESIGN: compat < layers < structures, config, geometry < checkpoint < discovery < data <
# modeling < evaluation < engine < tools, demo. Packages of one rank may not import each other.
RANKS = {
    "compat": 0,
    "layers": 1,
    "structures": 2,
    "config": 2,
    "geometry": 2,
    "checkpoint": 3,
    "discovery": 4,
    "data": 5,
    "modeling": 6,
    "evaluation": 7,
    "engine": 8,
    "tools": 9,
    "demo": 9,
}
SOURCES = sorted((ROOT / "unseg").rglob("*.py"))
PROJECT_SOURCES = sorted((ROOT / "projects").rglob("*.py"))


def imported_modules(path: Path) -> set[str]:
    """Absolute names of all modules a file imports, also inside functions."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide the layer, use absolute ones"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def unseg_packages(path: Path) -> set[str]:
    parts = (name.split(".") for name in imported_modules(path))
    own = {p[1] for p in parts if p[0] == "unseg" and len(p) > 1}
    return own - {"__version__", "_C"}  # not packages


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_down(path):
    own = path.relative_to(ROOT / "unseg").with_suffix("").parts[0]
    if own == "__init__":  # the package itself imports all of them to register
        return
    assert own in RANKS, f"{own} is not in DESIGN's layout"
    for package in unseg_packages(path) - {own}:
        assert RANKS[package] < RANKS[own], f"{path} imports unseg.{package}, which is not below it"


def test_layers_know_nothing_of_detectron2():
    for path in (ROOT / "unseg/layers").rglob("*.py"):
        assert not any(name.startswith("detectron2") for name in imported_modules(path)), path


@pytest.mark.parametrize("path", PROJECT_SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_projects_import_unseg_only(path):
    for name in imported_modules(path):
        assert name.split(".")[0] != "projects", f"{path} imports {name}"
    if path.name == "train_net.py":
        assert len(path.read_text().splitlines()) < 60
