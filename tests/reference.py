"""What every backend is measured against: entmax and attention, slow and obvious.

Everything is dense and in float64, from the exact values of the inputs. The same functions with
``dtype=torch.float32`` are the dense float32 evaluation that ill-conditioned cases are compared
with. Used by tests and benchmarks; shares no code with the library.

Notation: ``s`` are a row's scores, ``z = (alpha-1) * s``, ``r = 1 / (alpha-1)``, and
``p = [z - tau]_+^r`` with ``sum p = 1``.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

BISECTIONS = 64
"""Halvings of an interval of width 1: past the resolution of float64."""


class Attention(NamedTuple):
    """``out`` ``(batch, heads_q, length_q, head_dim_v)``, ``probabilities`` and ``z``
    ``(batch, heads_q, length_q, length_k)`` (``z`` is -inf at keys not allowed), ``tau``
    ``(batch, heads_q, length_q)``."""

    out: Tensor
    probabilities: Tensor
    z: Tensor
    tau: Tensor


class Gradients(NamedTuple):
    """Gradients in the shapes of their inputs."""

    query: Tensor
    key: Tensor
    value: Tensor


def entmax(scores: Tensor, alpha: float) -> Tensor:
    """alpha-entmax over the last dimension, in the dtype of ``scores``.

    -inf excludes an entry; a row without any other is zeros; NaN or +inf makes its row NaN.
    """
    if alpha == 1.0:
        highest = scores.amax(dim=-1, keepdim=True)
        return torch.where(highest == -math.inf, 0.0, torch.softmax(scores, dim=-1))
    return entmax_and_tau(scores, alpha)[0]


def entmax_and_tau(scores: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    """``p`` and ``tau``, the threshold of ``z = (alpha-1) * scores``; ``tau`` is +inf for a row
    without keys.

    In float64 only differences of scores are multiplied by ``alpha - 1``: they are exact near the
    maximum, and the products neither overflow nor vanish. Other dtypes do as anyone would.
    """
    if scores.dtype != torch.float64:
        return probabilities_and_tau((alpha - 1.0) * scores, alpha)
    return _solve(scores, alpha - 1.0, alpha)


def probabilities_and_tau(z: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    """The same from ``z``, where that is what is known."""
    return _solve(z, 1.0, alpha)


def _solve(x: Tensor, factor: float, alpha: float) -> tuple[Tensor, Tensor]:
    """``p`` and ``tau`` of ``z = factor * x``."""
    if x.shape[-1] == 0:
        return x, torch.full(x.shape[:-1], math.inf, dtype=x.dtype, device=x.device)
    highest = x.amax(dim=-1, keepdim=True)  # NaN where the row has one
    empty, poisoned = highest == -math.inf, torch.isnan(highest) | (highest == math.inf)
    # tau >= max z - 1, so nothing changes for scores below that if they move up to it; this
    # keeps the sums free of cancellation, and of -inf.
    below = torch.where(empty | poisoned, 0.0, x - highest).clamp(min=-1.0 / factor)
    y = factor * below
    if alpha in (1.5, 2.0):
        lowest, tau_below = (_tau_entmax15 if alpha == 1.5 else _tau_sparsemax)(y)
        p = (y - lowest - tau_below).clamp(min=0.0) ** (1.0 / (alpha - 1.0))
        shifted_tau = lowest + tau_below
    elif y.dtype == torch.float64:
        p, shifted_tau = _bisect(below, factor, alpha)
    else:
        p, shifted_tau = _bisect_tau(y, alpha)
    # Nothing is above tau there; by rounding it may be an ulp below the end of the window.
    p = torch.where(below <= -1.0 / factor, 0.0, p)
    p = p / p.sum(dim=-1, keepdim=True)
    tau = torch.where(empty, math.inf, factor * highest + shifted_tau)
    p, tau = torch.where(empty, 0.0, p), torch.where(poisoned, math.nan, tau)
    return torch.where(poisoned, math.nan, p), tau.squeeze(-1)


def bisection(z: Tensor, alpha: float) -> Tensor:
    """``p`` of finite rows by bisection for any alpha > 1, also those with a closed form."""
    p = _bisect((z - z.amax(dim=-1, keepdim=True)).clamp(min=-1.0), 1.0, alpha)[0]
    return p / p.sum(dim=-1, keepdim=True)


# Both give the lowest value that is kept, and how far tau is above that, which is below zero:
# where the lowest has a small probability, the sum of both has none of its digits.
def _tau_sparsemax(y: Tensor) -> tuple[Tensor, Tensor]:
    """Martins, Astudillo 2016, algorithm 1."""
    ordered = y.sort(dim=-1, descending=True).values
    k = torch.arange(1, y.shape[-1] + 1, dtype=y.dtype, device=y.device)
    support = (1.0 + k * ordered > ordered.cumsum(dim=-1)).sum(dim=-1, keepdim=True)
    lowest = ordered.gather(-1, support - 1)
    first = torch.where(k <= support, ordered - lowest, 0.0).sum(dim=-1, keepdim=True)
    return lowest, (first - 1.0) / support


def _tau_entmax15(y: Tensor) -> tuple[Tensor, Tensor]:
    """Peters, Niculae, Martins 2019, algorithm 2."""
    ordered = y.sort(dim=-1, descending=True).values
    k = torch.arange(1, y.shape[-1] + 1, dtype=y.dtype, device=y.device)
    mean = ordered.cumsum(dim=-1) / k
    spread = (ordered**2).cumsum(dim=-1) - k * mean**2
    tau = mean - ((1.0 - spread) / k).clamp(min=0.0).sqrt()
    inside = (tau <= ordered) & (ordered > -1.0)  # what was moved up to -1 is outside
    support = inside.sum(dim=-1, keepdim=True)
    # The same formula once more on the support alone, with sums that do not cancel: the lower
    # root of k t^2 - 2 k mean t + (sum of squares - 1) from the higher one.
    lowest = ordered.gather(-1, support - 1)
    above = torch.where(k <= support, ordered - lowest, 0.0)
    mean = above.sum(dim=-1, keepdim=True) / support
    spread = torch.where(k <= support, (above - mean) ** 2, 0.0).sum(dim=-1, keepdim=True)
    higher = mean + ((1.0 - spread) / support).clamp(min=0.0).sqrt()
    return lowest, (above.square().sum(dim=-1, keepdim=True) - 1.0) / support / higher


def _bisect(below: Tensor, factor: float, alpha: float) -> tuple[Tensor, Tensor]:
    """``p`` (not yet normalised) and ``tau`` of ``y = factor * below`` for any alpha > 1."""
    solve = _bisect_highest if alpha <= 2.0 else _bisect_lowest
    return solve(below, factor, alpha)


def _bisect_highest(below: Tensor, factor: float, alpha: float) -> tuple[Tensor, Tensor]:
    """Bisection for the logarithm of the largest ``p``, that of ``y = 0``, which lies between
    ``1 / n`` and 1. ``tau`` is ``-p^(alpha-1)``, near -1 as alpha nears 1, where ``p`` is
    ``exp(r log1p(y - (1 + tau)))``: nothing is lost, and the limit is softmax."""
    y, r = factor * below, 1.0 / (alpha - 1.0)

    def p_at(log_highest: Tensor) -> Tensor:
        near_one = (alpha - 1.0) * log_highest > math.log(0.5)
        w = y + torch.expm1((alpha - 1.0) * log_highest)
        x = y + torch.exp((alpha - 1.0) * log_highest)
        log = torch.where(near_one, torch.log1p(w.clamp(min=-1.0)), torch.log(x.clamp(min=0.0)))
        return torch.exp(r * log)

    low = torch.full_like(y[..., :1], -math.log(y.shape[-1]) - 1.0)
    high = torch.zeros_like(low)
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        short = p_at(middle).sum(dim=-1, keepdim=True) < 1.0
        low, high = torch.where(short, middle, low), torch.where(short, high, middle)
    return p_at(high), -torch.exp((alpha - 1.0) * high)


def _bisect_lowest(below: Tensor, factor: float, alpha: float) -> tuple[Tensor, Tensor]:
    """First the support, by halving the sorted row: key ``k`` is in it if the keys above it alone
    do not reach a sum of 1 with ``tau = y_k``. Then its lowest probability ``u``, by bisection,
    so that it is as exact as the others: ``tau``, ``u^(alpha-1)`` below the lowest key, could not
    resolve it, and may even underflow."""
    r = 1.0 / (alpha - 1.0)
    ordered = below.sort(dim=-1, descending=True).values
    lowest_in = torch.zeros_like(ordered[..., :1], dtype=torch.long)
    first_out = torch.full_like(lowest_in, below.shape[-1])
    for _ in range(max(1, below.shape[-1]).bit_length() + 1):
        middle = (lowest_in + first_out) // 2
        edge = ordered.gather(-1, middle.clamp(max=below.shape[-1] - 1))
        mass = ((factor * (ordered - edge)).clamp(min=0.0) ** r).sum(dim=-1, keepdim=True)
        inside = (mass < 1.0) & (middle < first_out)
        lowest_in = torch.where(inside, middle, lowest_in)
        first_out = torch.where(inside, first_out, middle.maximum(lowest_in + 1))
    edge = ordered.gather(-1, lowest_in)
    above = factor * (below - edge)

    def p_at(u: Tensor) -> Tensor:
        p = (above + u ** (alpha - 1.0)).clamp(min=0.0) ** r
        return torch.where(above > 0.0, p, torch.where(above == 0.0, u, 0.0))

    low, high = torch.zeros_like(edge), torch.ones_like(edge)
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        short = p_at(middle).sum(dim=-1, keepdim=True) < 1.0
        low, high = torch.where(short, middle, low), torch.where(short, high, middle)
    return p_at(high), factor * edge - high ** (alpha - 1.0)


def _bisect_tau(y: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    """The same as anyone writes it: bisection of ``tau`` itself. What a dense float32 evaluation
    does; above alpha = 2 it is no reference."""
    low, high = torch.full_like(y[..., :1], -1.0), torch.zeros_like(y[..., :1])
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        p = (y - middle).clamp(min=0.0) ** (1.0 / (alpha - 1.0))
        short = p.sum(dim=-1, keepdim=True) < 1.0
        low, high = torch.where(short, low, middle), torch.where(short, middle, high)
    return (y - low).clamp(min=0.0) ** (1.0 / (alpha - 1.0)), low


def entmax_gradient(p: Tensor, grad_p: Tensor, alpha: float) -> Tensor:
    """Gradient of the scores ``s``: ``u (dp - sum u dp / sum u)``, ``u = p^(2-alpha)`` on the
    support (Correia, Niculae, Martins 2019). Keys off the support have no part in it, whatever
    ``grad_p`` holds there."""
    if p.shape[-1] == 0:
        return p * grad_p
    inside = p != 0.0  # NaN counts as inside
    u = torch.where(inside, torch.where(inside, p, 1.0) ** (2.0 - alpha), 0.0)
    u = torch.where(p.isnan(), math.nan, u)  # NaN ** 0 is 1
    # Only ratios count in delta: relative to the largest, that of the lowest p, none overflows.
    lowest = torch.where(inside, p, 1.0).amin(dim=-1, keepdim=True) if alpha > 2.0 else 1.0
    ratio = torch.where(inside, torch.where(inside, p / lowest, 1.0) ** (2.0 - alpha), 0.0)
    ratio = torch.where(p.isnan(), math.nan, ratio)
    weighted = torch.where(inside, ratio * grad_p, 0.0)
    mass = ratio.sum(dim=-1, keepdim=True)
    distance = grad_p - weighted.sum(dim=-1, keepdim=True) / torch.where(mass == 0.0, 1.0, mass)
    felt = inside & ((distance != 0.0) | p.isnan())  # an infinite u times zero is zero
    return torch.where(felt, u * distance, 0.0)


def entmax_gradient_magnitude(p: Tensor, grad_p: Tensor, alpha: float) -> Tensor:
    """:func:`entmax_gradient` with every term made positive: what its rounding errors are
    relative to, where its terms cancel."""
    u = torch.where(p > 0.0, p, 1.0) ** (2.0 - alpha) * (p > 0.0)
    mass = u.sum(dim=-1, keepdim=True).clamp(min=torch.finfo(p.dtype).tiny)
    return u * (grad_p.abs() + (u * grad_p.abs()).sum(dim=-1, keepdim=True) / mass)


def undecided_rows(z: Tensor, tau: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows with a score so near to ``tau`` that arithmetic in ``dtype`` cannot tell whether it is
    in the support. Above alpha = 2 the gradient jumps there, so that it is left to chance."""
    distance = (z - tau.unsqueeze(-1)).abs().amin(dim=-1)
    size = torch.maximum(z.amax(dim=-1).abs(), tau.abs())
    return distance < 32.0 * torch.finfo(dtype).eps * size


def allowed_keys(
    length_q: int, length_k: int, is_causal: bool, device: torch.device | str = "cpu"
) -> Tensor:
    """``(length_q, length_k)`` bool; causal is aligned top-left: key ``j <= i`` for query ``i``."""
    allowed = torch.ones(length_q, length_k, dtype=torch.bool, device=device)
    return allowed.tril() if is_causal else allowed


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    alpha: float = 1.5,
    is_causal: bool = False,
    scale: float | None = None,
    dtype: torch.dtype = torch.float64,
) -> Attention:
    """Dense entmax attention, evaluated in ``dtype``; heads of ``key`` are shared by groups of
    consecutive query heads. A row without allowed keys is zeros. Keys with probability zero add
    nothing, whatever their value (0 * NaN is no part of the sum)."""
    query, key, value = (t.detach().to(dtype) for t in (query, key, value))
    group = query.shape[1] // key.shape[1]
    key, value = (t.repeat_interleave(group, dim=1) for t in (key, value))
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    allowed = allowed_keys(query.shape[2], key.shape[2], is_causal, query.device)
    scores = torch.where(allowed, scale * (query @ key.mT), -math.inf)
    if alpha == 1.0:
        z, p = scores, entmax(scores, alpha)
        tau = torch.full(scores.shape[:-1], math.nan, dtype=dtype, device=scores.device)
    else:
        z = (alpha - 1.0) * scores
        p, tau = entmax_and_tau(scores, alpha)
    p = torch.where(allowed, p, 0.0)
    return Attention(_weighted_sum(p, value), p, z, tau)


def attention_gradients(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    grad_out: Tensor,
    *,
    alpha: float = 1.5,
    is_causal: bool = False,
    scale: float | None = None,
    dtype: torch.dtype = torch.float64,
    p: Tensor | None = None,
) -> Gradients:
    """Gradients by the explicit formula: ``dV = p^T dO``, ``dp = dO V^T``, ``ds`` as in
    :func:`entmax_gradient`, ``dQ = scale * ds K``, ``dK = scale * ds^T Q``. ``p`` are the
    probabilities, where the caller has them already."""
    if p is None:
        p = attention(
            query, key, value, alpha=alpha, is_causal=is_causal, scale=scale, dtype=dtype
        ).probabilities
    query, key, value, grad_out = (t.detach().to(dtype) for t in (query, key, value, grad_out))
    heads_kv = key.shape[1]
    group = query.shape[1] // heads_kv
    shared_key, shared_value = (t.repeat_interleave(group, dim=1) for t in (key, value))
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    allowed = allowed_keys(query.shape[2], key.shape[2], is_causal, query.device)
    ds = torch.where(allowed, entmax_gradient(p, grad_out @ shared_value.mT, alpha), 0.0)

    def over_group(grad: Tensor) -> Tensor:
        return grad.unflatten(1, (heads_kv, group)).sum(dim=2)

    return Gradients(
        scale * _weighted_sum(ds, shared_key),
        scale * over_group(_weighted_sum(ds.mT, query)),
        over_group(_weighted_sum(p.mT, grad_out)),
    )


def magnitudes(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    grad_out: Tensor,
    *,
    p: Tensor,
    alpha: float = 1.5,
    scale: float | None = None,
) -> tuple[Tensor, Gradients]:
    """Output and gradients with every term of every sum made positive: what the rounding errors
    of a sum are relative to, where its terms cancel. NaN and infinities count as zero. ``p`` are
    the probabilities."""
    p = p.nan_to_num(0.0, 0.0, 0.0)
    query, key, value, grad_out = (
        t.detach().double().abs().nan_to_num(0.0, 0.0, 0.0) for t in (query, key, value, grad_out)
    )
    heads_kv = key.shape[1]
    group = query.shape[1] // heads_kv
    shared_key, shared_value = (t.repeat_interleave(group, dim=1) for t in (key, value))
    scale = query.shape[-1] ** -0.5 if scale is None else abs(scale)
    ds = entmax_gradient_magnitude(p, grad_out @ shared_value.mT, alpha)

    def over_group(grad: Tensor) -> Tensor:
        return grad.unflatten(1, (heads_kv, group)).sum(dim=2)

    return p @ shared_value, Gradients(
        scale * (ds @ shared_key),
        scale * over_group(ds.mT @ query),
        over_group(p.mT @ grad_out),
    )


def _weighted_sum(weights: Tensor, rows: Tensor) -> Tensor:
    """``weights @ rows`` over the nonzero weights."""
    if rows.isfinite().all():
        return weights @ rows
    products = weights.unsqueeze(-1) * rows.unsqueeze(-3)
    return torch.where(weights.unsqueeze(-1) != 0.0, products, 0.0).sum(dim=-2)


def empty_tiles(p: Tensor, is_causal: bool, side: int = 64) -> Tensor:
    """Share of ``side x side`` tiles with an allowed pair in which every ``p`` is zero.

    ``p`` ``(batch, heads, length_q, length_k)`` -> ``(batch, heads)`` float64.
    """
    allowed = allowed_keys(p.shape[2], p.shape[3], is_causal)
    counted = 0
    empty = torch.zeros(p.shape[:2], dtype=torch.float64, device=p.device)
    for i in range(0, p.shape[2], side):
        for j in range(0, p.shape[3], side):
            if allowed[i : i + side, j : j + side].any():
                counted += 1
                empty += (p[..., i : i + side, j : j + side] == 0).all(dim=-1).all(dim=-1)
    return empty / counted


def norm(tensor: Tensor) -> float:
    """Euclidean norm over the finite entries, in float64."""
    tensor = tensor.detach().double()
    return torch.linalg.vector_norm(tensor[tensor.isfinite()]).item()


def error(got: Tensor, expected: Tensor) -> float:
    """``norm(got - expected)``; infinite where not both have NaN and infinities at the same
    entries."""
    assert got.shape == expected.shape, (got.shape, expected.shape)
    got, expected = got.detach().double(), expected.detach().to(got.device).double()
    finite = expected.isfinite()
    if not torch.equal(got.isfinite(), finite) or not torch.equal(got.isnan(), expected.isnan()):
        return math.inf
    return norm((got - expected)[finite])


def relative_error(got: Tensor, expected: Tensor) -> float:
    """``error / norm(expected)``; 0 / 0 is 0."""
    difference, size = error(got, expected), norm(expected)
    if difference == 0.0:
        return 0.0
    return difference / size if size > 0.0 else math.inf
