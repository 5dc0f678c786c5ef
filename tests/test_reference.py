"""The reference itself: against its defining equations, another algorithm, and autograd."""

from __future__ import annotations

import math

import pytest
import reference
import torch
from torch import Tensor

ALPHAS = (1.1, 1.25, 1.5, 1.75, 2.0, 3.0)


def rows(length: int, factor: float = 1.0, count: int = 40) -> Tensor:
    generator = torch.Generator().manual_seed(length)
    return factor * torch.randn(count, length, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("factor", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize("length", [1, 2, 7, 300])
def test_solves_the_defining_equations(length: int, factor: float, alpha: float) -> None:
    """p = [z - tau]_+^r and sum p = 1, with tau as reported."""
    z = (alpha - 1.0) * rows(length, factor)
    p, tau = reference.probabilities_and_tau(z, alpha)
    assert (p.sum(dim=-1) - 1.0).abs().max() < 1e-14
    assert (p >= 0.0).all()
    # Compared as z - tau = p^(alpha-1): above alpha = 2 the power of a rounded z - tau is not
    # exact to 1e-12, and the reference does not compute it.
    distance = torch.where(p > 0.0, p ** (alpha - 1.0), 0.0)
    rounding = 1e-14 * z.abs().max().clamp(min=1.0)
    assert ((z - tau.unsqueeze(-1)).clamp(min=0.0) - distance).abs().max() < rounding


@pytest.mark.parametrize("alpha", [1.5, 2.0])
@pytest.mark.parametrize("factor", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize("length", [1, 2, 65, 2000])
def test_closed_forms_agree_with_bisection(length: int, factor: float, alpha: float) -> None:
    z = rows(length, factor)
    p = reference.probabilities_and_tau(z, alpha)[0]
    assert (p - reference.bisection(z, alpha)).abs().max() < 1e-12


@pytest.mark.parametrize("alpha", [1.1, 1.25, 1.5, 2.0, 3.0])
@pytest.mark.parametrize("factor", [0.01, 1.0, 30.0])
@pytest.mark.parametrize("parts", [2, 7, 60])
def test_parts_of_the_keys_are_scanned_alone_and_solved_once(
    parts: int, factor: float, alpha: float
) -> None:
    """What ``contract.py`` says of phases, and all backends rest on."""
    z = rows(120, factor)
    p, tau = reference.probabilities_and_tau(z, alpha)
    bounds = [
        reference.probabilities_and_tau(part, alpha)[1][:, None].expand_as(part)
        for part in z.chunk(parts, dim=1)
    ]
    bound = torch.cat(bounds, dim=-1)
    rounding = 1e-12 * (1.0 + z.abs().amax())
    assert bool((bound <= tau[:, None] + rounding).all())
    left = z >= bound - rounding
    assert not bool((p[~left] > 0).any())
    merged = z.masked_fill(~left, -math.inf)
    again = reference.probabilities_and_tau(merged, alpha)
    torch.testing.assert_close(again, (p, tau), atol=1e-9, rtol=1e-9)


def test_known_values() -> None:
    scores = torch.tensor([0.5, 0.0, -2.0], dtype=torch.float64)
    expected = torch.tensor([0.75, 0.25, 0.0], dtype=torch.float64)
    torch.testing.assert_close(reference.entmax(scores, 2.0), expected, rtol=0, atol=1e-15)
    # alpha = 1.5 with two keys: sqrt(p) - sqrt(1 - p) is the difference of z.
    p = torch.tensor([0.64, 0.36], dtype=torch.float64)
    torch.testing.assert_close(reference.entmax(2.0 * p.sqrt(), 1.5), p, rtol=0, atol=1e-15)
    # alpha = 3: sqrt(z - tau) with z = (0.64, 0.04) and tau = 0 is (0.8, 0.2).
    z = torch.tensor([0.64, 0.04, -0.1], dtype=torch.float64)
    expected = torch.tensor([0.8, 0.2, 0.0], dtype=torch.float64)
    torch.testing.assert_close(reference.entmax(z / 2.0, 3.0), expected, rtol=0, atol=1e-15)


@pytest.mark.parametrize("alpha", ALPHAS)
def test_special_rows(alpha: float) -> None:
    inf, nan = math.inf, math.nan
    scores = torch.tensor(
        [[1.0, -inf, 1.0], [-inf, -inf, -inf], [1.0, nan, 0.0], [inf, 0.0, 0.0]],
        dtype=torch.float64,
    )
    p = reference.entmax(scores, alpha)
    assert p[0].tolist() == [0.5, 0.0, 0.5]
    assert p[1].tolist() == [0.0, 0.0, 0.0]
    assert p[2:].isnan().all()
    assert reference.entmax(scores[:, :0], alpha).shape == (4, 0)


@pytest.mark.parametrize("alpha", ALPHAS)
def test_ties_share_the_mass(alpha: float) -> None:
    p = reference.entmax(torch.zeros(1, 999, dtype=torch.float64), alpha)
    assert (p - 1.0 / 999).abs().max() < 1e-15


@pytest.mark.parametrize("alpha", [1.0, *ALPHAS])
@pytest.mark.parametrize("is_causal", [False, True])
def test_gradients_agree_with_finite_differences(alpha: float, is_causal: bool) -> None:
    """Central differences of the loss along random directions of all inputs at once."""
    generator = torch.Generator().manual_seed(5)
    shapes = ((1, 4, 9, 5), (1, 2, 7, 5), (1, 2, 7, 3), (1, 4, 9, 3))
    query, key, value, grad_out = (
        torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes
    )
    options = {"alpha": alpha, "is_causal": is_causal, "scale": 0.7}
    gradients = reference.attention_gradients(query, key, value, grad_out, **options)
    step = 1e-6
    for index, (tensor, gradient) in enumerate(zip((query, key, value), gradients, strict=True)):
        direction = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
        losses = []
        for sign in (1.0, -1.0):
            moved = [query, key, value]
            moved[index] = tensor + sign * step * direction
            out = reference.attention(*moved, **options).out
            losses.append((out * grad_out).sum())
        expected = (losses[0] - losses[1]) / (2.0 * step)
        torch.testing.assert_close((gradient * direction).sum(), expected, rtol=1e-6, atol=1e-7)


def test_gradients_agree_with_autograd() -> None:
    """Autograd through the closed form of the tau of a known support."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 2, 6, 4), (2, 2, 8, 4), (2, 2, 8, 3), (2, 2, 6, 3))
    query, key, value, grad_out = (
        torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes
    )
    support = reference.attention(query, key, value, alpha=2.0).probabilities > 0.0
    leaves = [t.clone().requires_grad_() for t in (query, key, value)]
    scores = leaves[0] @ leaves[1].mT / 2.0
    kept = torch.where(support, scores, 0.0)
    tau = (kept.sum(dim=-1, keepdim=True) - 1.0) / support.sum(dim=-1, keepdim=True)
    out = torch.where(support, scores - tau, 0.0) @ leaves[2]
    expected = torch.autograd.grad(out, leaves, grad_out)
    gradients = reference.attention_gradients(query, key, value, grad_out, alpha=2.0)
    for gradient, other in zip(gradients, expected, strict=True):
        assert reference.relative_error(gradient, other) < 1e-13


def test_alpha_one_is_scaled_dot_product_attention() -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 6, 9, 4), (2, 2, 7, 4), (2, 2, 7, 3))
    query, key, value = (
        torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes
    )
    expected = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, is_causal=True, enable_gqa=True
    )
    out = reference.attention(query, key, value, alpha=1.0, is_causal=True).out
    assert reference.relative_error(out, expected) < 1e-14


def test_zero_weights_hide_nan() -> None:
    """A value that no probability touches is no part of the sum."""
    query = torch.ones(1, 1, 2, 1, dtype=torch.float64)
    key = torch.tensor([5.0, 0.0, -5.0], dtype=torch.float64).view(1, 1, 3, 1)
    value = torch.tensor([1.0, math.nan, math.nan], dtype=torch.float64).view(1, 1, 3, 1)
    assert reference.attention(query, key, value, scale=1.0).out.flatten().tolist() == [1.0, 1.0]
    assert reference.attention(query, key, value, scale=0.1).out.isnan().all()


def test_empty_tiles_counts_by_hand() -> None:
    p = torch.zeros(1, 1, 130, 70)
    p[0, 0, 0, 0] = p[0, 0, 129, 69] = 1.0
    assert reference.empty_tiles(p, is_causal=False).item() == 4 / 6
    assert reference.empty_tiles(p, is_causal=True).item() == 3 / 5


def test_relative_error_sees_what_it_must() -> None:
    one = torch.ones(4)
    assert reference.relative_error(one, one) == 0.0
    assert reference.relative_error(1.1 * one, one) == pytest.approx(0.1)
    assert reference.relative_error(torch.full((4,), math.nan), one) == math.inf
    assert reference.relative_error(one, torch.full((4,), math.nan)) == math.inf
    assert reference.relative_error(one, 0.0 * one) == math.inf
    with pytest.raises(AssertionError):
        reference.relative_error(one[:3], one)
