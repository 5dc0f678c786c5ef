"""What the documentation shows runs: the Python of every page, the example of every public name."""

from __future__ import annotations

import doctest
import functools
import importlib
import inspect
import pkgutil
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import adasplash2
from adasplash2 import cli

for package in ("matplotlib", "transformers"):
    pytest.importorskip(package)

ROOT = Path(__file__).resolve().parent.parent
PAGES = {
    path.relative_to(ROOT).as_posix(): path
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
}
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.M | re.S)

ELSEWHERE = ("docs/coming_from.md",)
"""Run by tests/test_coming_from.py: its blocks need what they name."""

NOT_RUN = "# Not run by the tests: "
"""How a block begins that tests leave out, with the reason, which readers see."""


def blocks(page: str) -> list[tuple[int, str]]:
    """The Python of a page, and in which lines it begins."""
    text = PAGES[page].read_text()
    found = [(text[: match.start(1)].count("\n"), match[1]) for match in BLOCK.finditer(text)]
    assert text.count("```python") == len(found), "a block is not closed, or is indented"
    return [(line, code) for line, code in found if not code.startswith(NOT_RUN)]


@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module")
@pytest.mark.parametrize(
    "page",
    [page for page in PAGES if page not in ELSEWHERE and "```python" in PAGES[page].read_text()],
)
def test_the_python_of_a_page_runs(page: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In order, one after another, as a reader would."""
    # That there is one graph is shown as well, without half a minute of a C++ compiler.
    compiled = functools.partial(torch.compile, backend="aot_eager")
    monkeypatch.setattr(torch, "compile", compiled)
    names: dict[str, Any] = {"__name__": page}
    for line, code in blocks(page):
        if ">>> " in code:
            examples = doctest.DocTestParser().get_doctest(code, names, page, page, line)
            run_examples(examples)
            names = examples.globs
        else:
            exec(compile("\n" * line + code, page, "exec"), names)


def run_examples(examples: doctest.DocTest) -> None:
    told: list[str] = []
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    runner.run(examples, out=told.append, clear_globs=False)
    assert not told, "".join(told)


def public_modules() -> list[ModuleType]:
    """Those that say what is public in them."""
    names = [
        module.name
        for module in pkgutil.walk_packages(adasplash2.__path__, "adasplash2.")
        if not module.name.startswith("adasplash2.backends.") and "__main__" not in module.name
    ]
    modules = [adasplash2, *map(importlib.import_module, names)]
    return [module for module in modules if hasattr(module, "__all__")]


def public_names() -> dict[str, Any]:
    """Functions and classes; each once, however many names it has."""
    found = {
        f"{module.__name__}.{name}": getattr(module, name)
        for module in public_modules()
        for name in module.__all__
    }
    return {
        name: thing
        for name, thing in found.items()
        if inspect.isclass(thing) or inspect.isroutine(thing)
    }


PUBLIC = public_names()


@pytest.mark.parametrize("name", PUBLIC)
def test_the_examples_of_a_public_name_run(name: str) -> None:
    thing, module = PUBLIC[name], importlib.import_module(PUBLIC[name].__module__)
    found = doctest.DocTestFinder(recurse=True).find(thing, name, module, globs={})
    examples = [one for one in found if one.examples]
    assert examples, f"{name} has no example in its docstring"
    for one in examples:
        run_examples(one)


@pytest.mark.parametrize("module", public_modules(), ids=lambda module: str(module.__name__))
def test_public_names_are_on_the_page_of_their_module(module: ModuleType) -> None:
    """One by one, or all of the module at once."""
    pages = [path.read_text() for path in (ROOT / "docs/api").glob("*.md")]
    found = [page for page in pages if f".. automodule:: {module.__name__}\n" in page]
    assert len(found) == 1, f"{module.__name__} needs a page in docs/api"
    if f".. automodule:: {module.__name__}\n   :members:" not in found[0]:
        shown = re.findall(r"^\.\. (?:auto(?!module)\w+|py:data):: (\w+)$", found[0], re.M)
        names = [n for n in module.__all__ if not inspect.ismodule(getattr(module, n))]
        assert sorted(shown) == sorted(names)


@pytest.mark.parametrize("module", public_modules(), ids=lambda module: str(module.__name__))
def test_the_examples_of_a_module_run(module: ModuleType) -> None:
    text = module.__doc__ or ""
    run_examples(doctest.DocTestParser().get_doctest(text, {}, module.__name__, None, 0))


def anchors(page: Path) -> set[str]:
    """Of the headings, as forges and the site make them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.M)
    return {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "benchmarks/README.md"])
def test_links_of_pages_outside_the_site_lead_somewhere(page: str) -> None:
    """The site's own are checked where it is built."""
    for link in re.findall(r"\]\(([^)]+)\)", (ROOT / page).read_text()):
        if not link.startswith("https://"):
            path, _, anchor = link.partition("#")
            target = (ROOT / page).parent / path if path else ROOT / page
            assert target.is_file(), link
            assert not anchor or anchor in anchors(target), link


def test_every_variable_and_command_is_told() -> None:
    variables = PAGES["docs/environment.md"].read_text()
    assert set(re.findall(r"^\| `(ADASPLASH2_\w+)`", variables, re.M)) == set(cli.SETTINGS)
    commands = PAGES["docs/command_line.md"].read_text()
    assert set(re.findall(r"^\| `adasplash2 (\w+)", commands, re.M)) == set(cli.main.commands)


def test_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().split()) <= 900
