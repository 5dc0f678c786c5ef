"""entmax of a row in 40 digits: what the float64 reference itself is held to.

Uses mpmath, which comes with torch (by way of sympy).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import mpmath
import torch
from mpmath import mpf
from torch import Tensor

DIGITS = 40


@functools.cache
def entmax(row: tuple[float, ...], alpha: float) -> list[float]:
    """Probabilities of a row of finite scores and -inf, for any alpha > 1."""
    with mpmath.workdps(DIGITS):
        factor = mpf(alpha) - 1
        scores = [mpf(score) for score in row if score > -math.inf]
        z = [factor * (score - max(scores)) for score in scores]
        p = _solve(z, factor)
        total = mpmath.fsum(p)
        shares = iter([float(one / total) for one in p])
    return [next(shares) if score > -math.inf else 0.0 for score in row]


def _solve(z: list[mpf], factor: mpf) -> list[mpf]:
    """``[z - tau]_+^r``: ``tau`` is as far below the lowest ``z`` of the support as the bisection
    of that distance's ``r``-th power says."""
    r = 1 / factor
    levels = sorted(set(z), reverse=True)
    low, high = 0, len(levels)  # levels[low] is in the support, levels[high] is not
    while high - low > 1:
        middle = (low + high) // 2
        edge = levels[middle]
        inside = mpmath.fsum((v - edge) ** r for v in z if v > edge) < 1
        low, high = (middle, high) if inside else (low, middle)
    above = [v - levels[low] for v in z]

    def p_at(lowest: mpf) -> list[mpf]:
        x = lowest**factor
        return [(v + x) ** r if v >= 0 else mpf(0) for v in above]

    return p_at(_root(lambda lowest: mpmath.fsum(p_at(lowest)) - 1))


def _root(increasing: Callable[[mpf], mpf]) -> mpf:
    """By bisection of the logarithm: small roots are as exact as large ones."""
    low, high = mpf(-800), mpf(0)
    for _ in range(110):
        middle = (low + high) / 2
        low, high = (middle, high) if increasing(mpmath.exp(middle)) < 0 else (low, middle)
    return mpmath.exp(high)


def _gaussian(factor: float, shift: float = 0.0) -> list[float]:
    generator = torch.Generator().manual_seed(0)
    return (factor * torch.randn(20, generator=generator) + shift).tolist()


LARGEST = torch.finfo(torch.float32).max
ALPHAS = (1 + 2**-52, 1 + 1e-12, 1 + 1e-8, 1 + 1e-6, 1.001, 1.1, 1.3, 1.7, 1.99, 2.01, 3.0, 10.0,
          50.0, 300.0)  # fmt: skip
ROWS = {
    "three": [0.0, 1.0, 2.0],
    "one": [3.0],
    "gaussian": _gaussian(1.0),
    "sharp": _gaussian(5.0),
    "flat": _gaussian(0.01),
    "shifted": _gaussian(1.0, 1e4),
    "shifted-far": _gaussian(1e29, 1e30),
    "equal": 17 * [0.7],
    "ties": [1.0, 1.0, 0.5, 0.5, 0.5, -3.0, -math.inf],
    "large": [3e38, 0.0, -3e38],
    "largest-tied": [LARGEST, LARGEST, 1.0],
    "subnormal": [1e-45, 0.0, 3e-45, 1e-40],
    "a-round-off-apart": [1.0, 1 - 2**-24, 1 - 2**-23, 0.9],
}
"""Rows of float32 numbers at the edges, by name."""


def rows(dtype: torch.dtype) -> dict[str, Tensor]:
    """:data:`ROWS`, as float32 rounds them, in ``dtype``."""
    return {name: torch.tensor([row]).to(dtype) for name, row in ROWS.items()}
