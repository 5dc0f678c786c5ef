"""Against the package ``entmax``, by the authors of alpha-entmax: a judge nobody here wrote.

It judges in float64, at the exact values of our inputs.
"""

from __future__ import annotations

import pytest
import torch
from cases import ALPHAS, device_of, usable_backends
from reference import relative_error
from torch import Tensor

import adasplash2

judge = pytest.importorskip("entmax", reason="the package entmax is not installed")

on_every_backend = pytest.mark.parametrize("backend", usable_backends())
in_both_precisions = pytest.mark.parametrize("dtype", [torch.float64, torch.float32])


def judged(x: Tensor, alpha: float) -> Tensor:
    if alpha == 1.5:
        return judge.entmax15(x, dim=-1)
    if alpha == 2.0:
        return judge.sparsemax(x, dim=-1)
    return judge.entmax_bisect(x, alpha, dim=-1, n_iter=100)


def tolerance(dtype: torch.dtype, alpha: float) -> float:
    """Above alpha = 2 the judge's tau does not resolve the smallest probabilities, and neither
    does float32."""
    if dtype == torch.float32:
        return 1e-5 if alpha <= 2.0 else 1e-4
    return 1e-10 if alpha <= 2.0 else 1e-6


def gaussian(*shape: int, dtype: torch.dtype, factor: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return (factor * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype)


def refused(error: adasplash2.BackendRefused, backend: str) -> None:
    """The CPU must run everything; others may refuse."""
    if backend == "cpu":
        raise error
    pytest.skip(str(error))


@on_every_backend
@in_both_precisions
@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("factor", [0.1, 1.0, 5.0])
@pytest.mark.parametrize("length", [1, 7, 200, 3000])
def test_rows(length: int, factor: float, alpha: float, dtype: torch.dtype, backend: str) -> None:
    x = gaussian(20, length, dtype=dtype, factor=factor).to(device_of(backend))
    grad_y = gaussian(length, 20, dtype=dtype).T.to(x.device)
    ours, theirs = x.detach().requires_grad_(), x.double().detach().requires_grad_()
    try:
        y = adasplash2.entmax(ours, alpha, backend=backend)
    except adasplash2.BackendRefused as error:
        refused(error, backend)
    expected = judged(theirs, alpha)
    (gradient,) = torch.autograd.grad(y, ours, grad_y)
    (expected_gradient,) = torch.autograd.grad(expected, theirs, grad_y.double())
    assert relative_error(y, expected) <= tolerance(dtype, alpha)
    if length > 1:  # the gradient of a single entry is zero, and its error not relative to it
        assert relative_error(gradient, expected_gradient) <= 10.0 * tolerance(dtype, alpha)
    else:
        assert gradient.abs().max() <= 1e-6


@on_every_backend
@in_both_precisions
@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("is_causal", [False, True])
def test_attention(is_causal: bool, alpha: float, dtype: torch.dtype, backend: str) -> None:
    """Dense attention with the judge in the place of softmax, and its autograd."""
    shapes = ((2, 3, 129, 40), (2, 3, 150, 40), (2, 3, 150, 24))
    device = device_of(backend)
    tensors = [gaussian(*shape, dtype=dtype).to(device) for shape in shapes]
    grad_out = gaussian(2, 3, 129, 24, dtype=dtype).to(device)
    ours = [t.detach().requires_grad_() for t in tensors]
    query, key, value = theirs = [t.double().detach().requires_grad_() for t in tensors]

    scores = query @ key.mT / 40**0.5
    if is_causal:  # the judge knows no -inf
        hidden = torch.ones(129, 150, dtype=torch.bool, device=device).triu(diagonal=1)
        scores = scores.masked_fill(hidden, -1e4)
    expected = judged(scores, alpha) @ value
    try:
        out = adasplash2.entmax_attention(*ours, alpha=alpha, is_causal=is_causal, backend=backend)
    except adasplash2.BackendRefused as error:
        refused(error, backend)
    assert relative_error(out, expected) <= tolerance(dtype, alpha)
    gradients = torch.autograd.grad(out, ours, grad_out)
    expected_gradients = torch.autograd.grad(expected, theirs, grad_out.double())
    for gradient, other in zip(gradients, expected_gradients, strict=True):
        assert relative_error(gradient, other) <= 10.0 * tolerance(dtype, alpha)
