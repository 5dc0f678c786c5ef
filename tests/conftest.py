"""What every test shares: one seed, and GPU tests skipped where there is no GPU."""

from __future__ import annotations

import os

import pytest
import torch

# Read when the package is imported: what was measured on this machine must decide no test.
os.environ["ADASPLASH2_AUTOTUNE"] = "off"


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="torch sees no CUDA device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)
