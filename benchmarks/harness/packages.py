"""Packages that a contender needs and that may be missing."""

from __future__ import annotations

import importlib.metadata
import importlib.util

from torch import Tensor


def missing(package: str) -> str | None:
    """The reason where ``package`` cannot be imported."""
    if importlib.util.find_spec(package) is None:
        return f"the package {package} is not installed"
    return None


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def entmax_package(scores: Tensor, alpha: float) -> Tensor:
    """The PyPI package ``entmax`` over the last dimension: by sorting where it can."""
    import entmax

    if alpha == 1.5:
        return entmax.entmax15(scores)
    if alpha == 2.0:
        return entmax.sparsemax(scores)
    return entmax.entmax_bisect(scores, alpha)
