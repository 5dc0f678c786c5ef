"""What every test shares: one seed, and GPU tests skipped where there is no GPU.

With TRITON_INTERPRET=1, the second run of ``make test``, only the Triton backend is tested, in its
interpreter, on the cases of ``cases.INTERPRETED``: a case takes seconds there.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator

import pytest
import torch
from cases import is_interpreted, usable_backends

from adasplash2 import dispatch
from adasplash2.backends import REGISTRY
from adasplash2.backends.triton.sizes import INTERPRETED

# Read when the package is imported: what was measured on this machine must decide no test.
os.environ["ADASPLASH2_AUTOTUNE"] = "off"

# Dense float32, which some tolerances are made of, runs on the GPU there: it means float32.
torch.set_float32_matmul_precision("highest")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--part",
        metavar="I/N",
        help="every N-th test from the I-th on, for N processes side by side",
    )
    parser.addoption(
        "--prefer",
        metavar="KEY=VALUE",
        help="backends run with the first configuration that has this, where they offer one",
    )


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


@pytest.hookimpl(trylast=True)  # parts of what -k and -m leave
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if part := config.getoption("--part"):
        first, step = map(int, part.split("/"))
        items[:] = items[first::step]
    if INTERPRETED:
        chosen = [item for item in items if is_interpreted(item.name)]
        config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
        items[:] = chosen
        return
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="torch sees no CUDA device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)
