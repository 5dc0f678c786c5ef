"""What an installed package promises: version, types, light imports, a stub that matches."""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.resources
import inspect
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch

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
        "before, began = set(sys.modules), time.process_time()\n"
        "import adasplash2\n"
        "took = time.process_time() - began\n"
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
    # 0.03 s on a quiet machine: of the processor's time, which others do not take.
    assert min(took for took, _ in runs) < 0.15


WITHOUT_NUMPY = """
import json, sys
class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in HIDDEN:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
for name in [name for name in sys.modules if name.partition(".")[0] in HIDDEN]:
    del sys.modules[name]
sys.meta_path.insert(0, Hidden())
import torch, adasplash2
from adasplash2.backends import cuda
q = torch.randn(1, 1, 4, 8, requires_grad=True)
adasplash2.entmax_attention(q, q, q).sum().backward()
assert q.grad.isfinite().all()
assert adasplash2.explain(q, q, q).chosen == "cpu"
status = {s.name: s.reason for s in adasplash2.available_backends()}
from click.testing import CliRunner
from adasplash2.cli import main
assert CliRunner().invoke(main, ["info"]).exit_code == 0
torch.cuda.is_available = lambda: True
torch.version.hip = None
print(json.dumps([status["cuda"], cuda.unavailable()]))
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="words for a machine without a GPU")
@pytest.mark.parametrize(
    ("hidden", "words"),
    [(("numpy",), "(NumPy|CuPy)[^(]* not installed"), (("numpy", "cupy"), "CuPy is not installed")],
)
def test_the_package_works_without_numpy(hidden: tuple[str, ...], words: str) -> None:
    """And says what to do first: find a GPU, then install CuPy."""
    code = f"HIDDEN = {hidden!r}\n{WITHOUT_NUMPY}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    without_gpu, with_gpu = json.loads(done.stdout)
    assert without_gpu == "torch sees no CUDA device"
    assert re.search(words, with_gpu)


def test_what_is_imported_is_declared() -> None:
    """Names of packages that anything of ours imports, by the project's dependencies and extras."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = project["dependencies"] + [
        entry for entries in project["optional-dependencies"].values() for entry in entries
    ]
    names = {re.split(r"[<>=\[-]", entry)[0] for entry in declared} | set(sys.stdlib_module_names)
    imported = set()
    for folder in ("python/adasplash2", "backends"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Import):
                    imported |= {alias.name.partition(".")[0] for alias in node.names}
                elif isinstance(node, ast.ImportFrom) and not node.level:
                    imported.add(str(node.module).partition(".")[0])
    assert imported - names == {"adasplash2"}
    assert all("numpy" in str(project["optional-dependencies"][f"cuda{n}"]) for n in (12, 13))
