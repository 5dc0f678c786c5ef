"""What an installed package promises: version, types, light imports, a stub that matches."""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.resources
import inspect
import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import adasplash2
from adasplash2 import _core

ROOT = Path(__file__).resolve().parent.parent
OPTIONAL = ("triton", "cupy", "transformers", "entmax", "matplotlib")
LATER = ("click", "filelock", "platformdirs", "rich")
"""Required, but not by the import: the command line and a writer of the cache need them."""


def test_version_is_the_one_in_pyproject() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert adasplash2.__version__ == project["version"]
    assert importlib.metadata.version("adasplash2") == project["version"]


@pytest.mark.parametrize("name", ["py.typed", "_core.pyi", "include/adasplash2/threshold.h"])
def test_data_files_are_installed(name: str) -> None:
    assert (importlib.resources.files("adasplash2") / name).is_file()


def test_public_names_exist() -> None:
    assert all(hasattr(adasplash2, name) for name in adasplash2.__all__)
    assert all(inspect.getdoc(getattr(adasplash2, name)) for name in adasplash2.__all__)


def test_stub_names_what_the_extension_has() -> None:
    stub = ast.parse((ROOT / "python/adasplash2/_core.pyi").read_text())
    named = {
        node.name
        for node in stub.body
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_")
    } | {
        node.target.id
        for node in stub.body
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
    }
    assert named == {name for name in dir(_core) if not name.startswith("_")}


def test_import_is_light() -> None:
    """Importing torch may itself bring in some optional packages: only ours are counted."""
    code = (
        "import json, sys, time, torch\n"
        "before, began = set(sys.modules), time.perf_counter()\n"
        "import adasplash2\n"
        "took = time.perf_counter() - began\n"
        "print(json.dumps([took, sorted(set(sys.modules) - before)]))"
    )
    runs = []
    for _ in range(3):
        out = subprocess.run(
            [sys.executable, "-c", code], check=True, capture_output=True, text=True
        ).stdout
        runs.append(json.loads(out))
    loaded = {name.partition(".")[0] for _, names in runs for name in names}
    assert not loaded & {*OPTIONAL, *LATER}
    # 0.15 s is the promise on a quiet machine; tests share theirs.
    assert min(took for took, _ in runs) < 0.5
