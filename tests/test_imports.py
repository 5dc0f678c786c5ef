"""Modules import one way: what they import as they are loaded forms no circle."""

from __future__ import annotations

import ast
import graphlib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = {"python/adasplash2": "adasplash2", "backends": "adasplash2.backends", "benchmarks": ""}
"""What a folder's modules are imported as."""


def sources() -> dict[str, str]:
    """The source of each module, by its name; a package's is that of its ``__init__.py``."""
    found = {}
    for folder, package in FOLDERS.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            parts = parts[:-1] if parts[-1] == "__init__" else parts
            found[".".join(filter(None, (package, *parts)))] = path.read_text()
    return found


def loaded(node: ast.AST) -> Iterator[ast.Import | ast.ImportFrom]:
    """Imports that run with the module: not those of functions, nor those for types alone."""
    if isinstance(node, ast.Import | ast.ImportFrom):
        yield node
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
        return
    children = ast.iter_child_nodes(node)
    if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
        children = iter(node.orelse)
    for child in children:
        yield from loaded(child)


def imported(source: str, modules: dict[str, str]) -> set[str]:
    """Which of ``modules`` it imports. A name that a package gives is the package's own, unless it
    is a module of it."""
    names: set[str] = set()
    for node in loaded(ast.parse(source)):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        else:
            assert not node.level, "imports are absolute"
            full = {f"{node.module}.{alias.name}" for alias in node.names}
            names.update(name if name in modules else str(node.module) for name in full)
    return names & modules.keys()


def circle(modules: dict[str, str]) -> list[str] | None:
    """Modules each of which is imported by the next, the first one by itself in the end."""
    graph = {name: imported(source, modules) for name, source in modules.items()}
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        found: list[str] = error.args[1]
        return found
    return None


def test_no_circle() -> None:
    modules = sources()
    assert {"adasplash2.dispatch", "adasplash2.backends.cuda", "data", "harness.runs"} <= set(
        modules
    )
    assert circle(modules) is None


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("adasplash2.problem", "from adasplash2 import dispatch"),
        ("adasplash2.problem", "import adasplash2.ops"),
        ("adasplash2.problem", "from adasplash2 import entmax"),
        ("adasplash2.backends.triton.sizes", "from adasplash2.backends.triton import launch"),
        ("harness.cases", "try:\n    from data import DATA\nexcept ImportError:\n    pass"),
    ],
)
def test_a_planted_circle_is_found(module: str, line: str) -> None:
    modules = sources()
    modules[module] += f"\n{line}\n"
    assert module in (circle(modules) or [])


@pytest.mark.parametrize(
    "text",
    [
        "def f():\n    import data",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import data",
    ],
)
def test_what_is_not_imported_at_once_makes_no_circle(text: str) -> None:
    modules = sources()
    modules["harness.cases"] += f"\n{text}\n"
    assert circle(modules) is None


def constants_by_attribute(source: str, modules: set[str]) -> list[str]:
    """What is taken from one of ``modules`` as an attribute, and has a constant's name."""
    return [
        ast.unparse(node)
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Attribute) and node.attr.isupper()
        if isinstance(node.value, ast.Name) and node.value.id in modules
    ]


KERNELS = ROOT / "backends/triton/kernels"


@pytest.mark.parametrize("path", sorted(KERNELS.glob("*.py")), ids=lambda path: path.stem)
def test_triton_sees_constants_of_kernels_by_name(path: Path) -> None:
    """Triton's disk cache knows a constant's value by its name, and an attribute's not at all: a
    kernel that was compiled with another value would be taken."""
    modules = {other.stem for other in KERNELS.glob("*.py")}
    assert not constants_by_attribute(path.read_text(), modules)


def test_a_planted_attribute_is_found() -> None:
    source = (KERNELS / "solve.py").read_text()
    planted = source.replace("-INFINITY", "-arithmetic.INFINITY", 1)
    assert constants_by_attribute(planted, {"arithmetic"}) == ["arithmetic.INFINITY"]
