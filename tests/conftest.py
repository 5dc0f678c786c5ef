"""What every test shares: one seed, and GPU tests skipped where there is no GPU.

With TRITON_INTERPRET=1, the second run of ``make test``, only the Triton backend is tested, in its
interpreter, on what is marked ``cases.interpreted``: a case takes seconds there.
"""

from __future__ import annotations

import importlib
import os
import random
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from cases import usable_backends

import adasplash2
from adasplash2 import dispatch
from adasplash2.backends import REGISTRY
from adasplash2.backends.triton.sizes import INTERPRETED

# Read when the package is imported: what was measured on this machine must decide no test.
os.environ["ADASPLASH2_AUTOTUNE"] = "off"

# Dense float32, which some tolerances are made of, runs on the GPU there: it means float32.
torch.set_float32_matmul_precision("highest")


NO_BACKEND = "none"
"""Of tests that are of no backend by their parameters."""

SKIPS = (
    # A backend refuses, and each of its reasons is a sentence of these, which no problem of its own
    # kind can meet: not that tensors lie elsewhere, or that its kernels failed before.
    r"backend '\w+' cannot run .*(\n  \w+: .*"
    r"(is computed by other backends only|is computed here without gradients only"
    r"|which these kernels do not compute|alpha must be at (most|least) "
    r"|needs more shared memory than ).*)+\Z",
    # What a test of all backends asks of some.
    r"there are \d+ configurations",
    r"blocks of others have an item each",
    r"a graph holds kernels of the GPU",
    r"is causal, with alpha 1\.5",
    # What is about machines without a GPU.
    r"words for a machine without a GPU",
    r"a device that is here",
    r"the cuda backend does not refuse",
    # What the installed transformers is too old for.
    r"transformers [\w.]+ has no ",
)
"""Reasons, from their beginnings, for which ``--judge-skips`` lets a test be skipped. That
something is missing, a device, a backend or a package, is none."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--part",
        metavar="I/N",
        help="every N-th test from the I-th on, for N processes side by side",
    )
    parser.addoption(
        "--together",
        action="store_true",
        help="a part is a run of tests sorted by case, so that a process makes a kernel once",
    )
    parser.addoption(
        "--expect-backends",
        metavar="NAME,...",
        default="",
        help="backends that must be usable here, and, but with --together, pass tests where any "
        "are by backend: else the run fails, whatever its tests say",
    )
    parser.addoption(
        "--only-backend",
        metavar="NAME",
        choices=[*REGISTRY, NO_BACKEND],
        help="only tests that are of this backend by their parameters, whatever they are called; "
        f"'{NO_BACKEND}': those that are of no backend",
    )
    parser.addoption(
        "--without",
        metavar="NAME=VALUE,...",
        help="no tests of which a parameter, or a field of one, has one of these values",
    )
    parser.addoption(
        "--judge-skips",
        action="store_true",
        help="a test or a file that is skipped fails, but for reasons that tests/conftest.py names",
    )
    parser.addoption(
        "--may-skip",
        metavar="REGEX",
        action="append",
        default=[],
        help="a further reason for --judge-skips to allow",
    )
    parser.addoption(
        "--fuzz-seed",
        metavar="SEED",
        type=int,
        default=random.SystemRandom().getrandbits(32),
        help="of the random problems; a new one where it is not given",
    )
    parser.addoption(
        "--prefer",
        metavar="KEY=VALUE",
        help="backends run with the first configuration that has this, where they offer one",
    )


def expected_backends(config: pytest.Config) -> list[str]:
    return [name for name in config.getoption("--expect-backends").split(",") if name]


def pytest_sessionstart(session: pytest.Session) -> None:
    """A backend that cannot run is no parameter of any test: it would be missed by nobody."""
    reasons = {status.name: status for status in adasplash2.available_backends()}
    for name in expected_backends(session.config):
        if name not in reasons:
            raise pytest.UsageError(f"--expect-backends: there is no backend {name!r}")
        if not reasons[name].usable:
            raise pytest.UsageError(f"--expect-backends: {name} cannot run: {reasons[name].reason}")


OUTCOMES = pytest.StashKey[dict[str, Counter[str]]]()
"""By backend, how many of its tests passed, failed or were skipped."""


def backend_of(item: pytest.Item) -> str | None:
    """The backend that a test is about, by its parameters."""
    parameters = parameters_of(item)
    found = parameters.get("backend", parameters.get("name"))
    return found if found in REGISTRY else None


def judge_skip(report: pytest.TestReport | pytest.CollectReport, config: pytest.Config) -> None:
    """Makes a failure of what is skipped for a reason that is not allowed."""
    judged = config.getoption("--judge-skips") and report.outcome == "skipped"
    if not judged or hasattr(report, "wasxfail"):
        return
    path, line, said = report.longrepr  # type: ignore[misc]
    reason = said.removeprefix("Skipped: ")
    if not any(re.match(allowed, reason) for allowed in (*SKIPS, *config.getoption("--may-skip"))):
        report.outcome = "failed"
        report.longrepr = f"{path}:{line}: skipped, which is not allowed here: {reason}"


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector: pytest.Collector) -> Any:
    report = yield
    judge_skip(report, collector.config)
    return report


@pytest.hookimpl(wrapper=True, tryfirst=True)  # outside of what makes skips
def pytest_runtest_makereport(item: pytest.Item) -> Any:
    report = yield
    judge_skip(report, item.config)
    if report.when == "call" or report.outcome != "passed":
        counts = item.config.stash.setdefault(OUTCOMES, {})
        counts = counts.setdefault(backend_of(item) or NO_BACKEND, Counter())
        counts[report.outcome] += report.when != "teardown"
    return report


def idle_backends(config: pytest.Config) -> list[str]:
    """Expected backends of which no test has passed, in a run with tests by backend. A part of
    tests that stand together may hold nothing but what a backend refuses: who runs the parts adds
    them up."""
    if config.getoption("--together"):
        return []
    outcomes = config.stash.get(OUTCOMES, {})
    expected = expected_backends(config) if outcomes.keys() - {NO_BACKEND} else []
    return [name for name in expected if not outcomes.get(name, Counter())["passed"]]


def pytest_sessionfinish(session: pytest.Session) -> None:
    if idle_backends(session.config) and session.exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    for name, counts in sorted(config.stash.get(OUTCOMES, {}).items()):
        told = ", ".join(f"{counts[kind]} {kind}" for kind in ("passed", "failed", "skipped"))
        terminalreporter.write_line(f"backend {name}: {told}")
    for name in idle_backends(config):
        terminalreporter.write_line(f"backend {name}: expected, but no test passed", red=True)
    if config.stash.get(FUZZED, False):
        seed = config.getoption("--fuzz-seed")
        terminalreporter.write_line(f"random problems: again with --fuzz-seed {seed}")


FUZZED = pytest.StashKey[bool]()
"""Whether a test has drawn random problems."""


@pytest.fixture
def fuzz_seed(request: pytest.FixtureRequest) -> int:
    request.config.stash[FUZZED] = True
    return int(request.config.getoption("--fuzz-seed"))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _preferred(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Puts the configurations that ``--prefer`` names first."""
    if not (preferred := request.config.getoption("--prefer")):
        yield
        return
    key, _, value = preferred.partition("=")
    for name in usable_backends():
        backend = importlib.import_module(REGISTRY[name])
        offered = backend.configs
        monkeypatch.setattr(
            backend,
            "configs",
            lambda problem, offered=offered: sorted(
                offered(problem), key=lambda config: str(config.get(key)) != value
            ),
        )
    dispatch.forget()
    yield
    dispatch.forget()


def parameters_of(item: pytest.Item) -> dict[str, Any]:
    """What a test is run with."""
    return getattr(getattr(item, "callspec", None), "params", {})


def values_of(item: pytest.Item, name: str) -> set[str]:
    """What a parameter of that name, and such a field of any parameter, says in a test."""
    parameters = parameters_of(item)
    found = {str(getattr(value, name)) for value in parameters.values() if hasattr(value, name)}
    return found | ({str(parameters[name])} if name in parameters else set())


def is_chosen(item: pytest.Item, marker: pytest.Mark) -> bool:
    """Whether a mark ``interpreted(...)`` is of the values that a test is run with."""
    parameters = parameters_of(item)
    return all(
        parameters[name] in (values if isinstance(values, tuple) else (values,))
        for name, values in marker.kwargs.items()
    )


def is_interpreted(item: pytest.Item) -> bool:
    """Whether Triton's interpreter runs a test."""
    if backend_of(item) not in (None, "triton"):
        return False
    return any(is_chosen(item, marker) for marker in item.iter_markers("interpreted"))


def choose(config: pytest.Config, items: list[pytest.Item], chosen: list[pytest.Item]) -> None:
    """Leaves ``chosen`` of the items."""
    kept = set(chosen)
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = chosen


@pytest.hookimpl(trylast=True)  # parts of what -k and -m leave
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if INTERPRETED:
        choose(config, items, [item for item in items if is_interpreted(item)])
    if name := config.getoption("--only-backend"):
        choose(config, items, [i for i in items if (backend_of(i) or NO_BACKEND) == name])
    if without := config.getoption("--without"):
        name, _, values = without.partition("=")
        left_out = set(values.split(","))
        choose(config, items, [i for i in items if not values_of(i, name) & left_out])
    if part := config.getoption("--part"):
        which, parts = map(int, part.split("/"))
        if config.getoption("--together"):
            items.sort(key=lambda item: (item.path, item.name.partition("[")[2]))
            items[:] = items[len(items) * which // parts : len(items) * (which + 1) // parts]
        else:
            items[:] = items[which::parts]
    if INTERPRETED:
        return
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="torch sees no CUDA device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)
