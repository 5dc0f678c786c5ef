"""Random problems against the float64 reference: see ``fuzz.py``.

Each run has a seed of its own, which is printed at its end, also where all is well. Beside them,
problems that were made for what they reach, held to the same bounds.
"""

from __future__ import annotations

import fuzz
import pytest
import torch
from cases import FLOAT16, FLOAT32, device_of, interpreted, usable_backends

import adasplash2
from adasplash2.backends.triton.sizes import INTERPRETED

on_every_backend = pytest.mark.parametrize("backend", usable_backends())


@interpreted()
@on_every_backend
def test_random_problems(backend: str, fuzz_seed: int) -> None:
    """In the interpreter, where one takes seconds, a few that are small."""
    count, largest = (10, 40) if INTERPRETED else (300, fuzz.LARGEST)
    report = fuzz.run(fuzz_seed, range(count), backend, largest=largest, say=lambda line: None)
    assert not report.failed, "\n".join(report.lines)
    judged = report.counts["rows"] + report.counts["attention"]
    assert judged > count // 2, report.counts


@interpreted()
@on_every_backend
@pytest.mark.parametrize("alpha", [1.25, 1.5, 1.75, 2.0, 3.0])
def test_thresholds_of_rows_are_exact_to_round_off(alpha: float, backend: str) -> None:
    """Rows of few keys, whose probabilities show an error of the threshold."""
    x = torch.randn(40, 12, generator=torch.Generator().manual_seed(3))
    verdict = fuzz.check_rows(fuzz.Rows(x, torch.ones_like(x), alpha, -1), backend)
    assert not verdict.failures


@interpreted()
@on_every_backend
@pytest.mark.parametrize(("alpha", "dtype"), [(1.25, FLOAT32), (1.5, FLOAT32), (1.75, FLOAT32),
                                              (2.0, FLOAT32), (3.0, FLOAT32)])  # fmt: skip
def test_thresholds_of_attention_are_exact_to_round_off(
    alpha: float, dtype: torch.dtype, backend: str
) -> None:
    """Scores without rounding, so that the bounds leave none but the threshold's."""
    generator = torch.Generator().manual_seed(4)
    query, key = (
        (4.0 * torch.randn(1, 1, 64, 2, generator=generator)).round() / 4.0 for _ in range(2)
    )
    value, grad_out = (torch.randn(1, 1, 64, 4, generator=generator) for _ in range(2))
    tensors = (t.to(dtype) for t in (query, key, value, grad_out))
    case = fuzz.Attention(*tensors, alpha=alpha, scale=1.0, is_causal=True)
    assert not fuzz.check_attention(case, backend).failures


@interpreted()
@on_every_backend
def test_small_probabilities_of_float16_are_kept(backend: str) -> None:
    """A key with nearly all of the mass and a value of zero: the others, of 1e-8 to 1e-4, are the
    output. Rounded to float16 as they are, a part of them is zero."""
    generator = torch.Generator().manual_seed(5)
    query, key = torch.ones(1, 1, 16, 1), 1e-2 * torch.randn(1, 1, 64, 1, generator=generator)
    query *= torch.linspace(1.0, 1.02, 16)[:, None]
    key[:, :, 0] = 1.96
    value = 1000.0 * torch.rand(1, 1, 64, 4, generator=generator) + 1000.0
    value[:, :, 0] = 0.0
    grad_out = torch.ones(1, 1, 16, 4)
    tensors = [t.to(FLOAT16) for t in (query, key, value, grad_out)]
    case = fuzz.Attention(*tensors, alpha=1.5, scale=1.0, is_causal=False)
    assert not fuzz.check_attention(case, backend).failures


@interpreted()
@pytest.mark.parametrize("backend", [name for name in usable_backends() if name == "triton"])
def test_steps_above_two_are_forced_to_bisect(backend: str) -> None:
    """Rows on which steps that stay in the bracket creep: 30 where none is a bisection, else 19."""
    rows = [
        [
            -0.17238742113113403,
            -0.17393770813941956,
            0.0,
            -0.17393773794174194,
            -0.1739395558834076,
            -0.1739393174648285,
            -0.17393870651721954,
            -0.1739386022090912,
        ],
        [
            -0.19926267862319946,
            -0.19918374717235565,
            0.0,
            -0.19916868209838867,
            -0.19926276803016663,
            -0.19926300644874573,
            -0.19926272332668304,
            -0.19926276803016663,
        ],
    ]
    key = torch.tensor(rows, device=device_of(backend)).view(1, 2, -1, 1)
    query = torch.ones_like(key[:, :, :1])
    stats = adasplash2.attention_stats(query, key, key, alpha=4.0, scale=1.0, backend=backend)
    assert stats.iterations.max() <= 23
