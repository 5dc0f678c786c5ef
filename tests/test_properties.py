"""What must hold for any input, on inputs that hypothesis looks for."""

from __future__ import annotations

import os

import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

import adasplash2

# In CI the examples are always the same: a failure there is a failure of the change.
bounded = settings(max_examples=60, deadline=None, derandomize=bool(os.environ.get("CI")))


EXACT = 1e-9

alphas = st.sampled_from([1.1, 1.25, 1.5, 1.75, 2.0, 2.5, 3.0]) | st.floats(1.05, 4.0)
causal = st.booleans()
seeds = st.integers(0, 2**32 - 1)
TILE_ROWS = 8
"""At most, of the CPU backend: rows whose scores are made together."""
lengths = st.integers(1, 40) | st.sampled_from([63, 64, 65, 129, 600])
sharpness = st.sampled_from([1e-3, 0.1, 1.0, 10.0, 1e3])


@st.composite
def scores(draw: st.DrawFn) -> Tensor:
    """Rows of any finite scores: written out by hypothesis, or Gaussian with ties."""
    if draw(st.booleans()):
        values = st.floats(-50.0, 50.0, width=32)
        row = draw(st.lists(values, min_size=1, max_size=24))
        return torch.tensor([row], dtype=torch.float64)
    generator = torch.Generator().manual_seed(draw(seeds))
    x = torch.randn(3, draw(lengths), generator=generator, dtype=torch.float64)
    x *= draw(sharpness)
    return (x * 8).round() / 8 if draw(st.booleans()) else x


@st.composite
def attention_inputs(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(draw(seeds))
    length_q, length_k = draw(st.tuples(st.integers(1, 80), lengths))
    head_dim, head_dim_v = draw(st.tuples(st.integers(1, 20), st.integers(1, 20)))
    shapes = ((1, 2, length_q, head_dim), (1, 2, length_k, head_dim), (1, 2, length_k, head_dim_v))
    query, key, value = (
        torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes
    )
    return draw(sharpness) * query, key, value


def slack(alpha: float) -> float:
    """How far rounding of the scores can move a probability: above alpha = 2 the slope at the
    edge of the support is infinite."""
    return EXACT if alpha <= 2.0 else 1e-4


@bounded
@given(scores(), alphas)
def test_rows_are_distributions(x: Tensor, alpha: float) -> None:
    p = adasplash2.entmax(x, alpha)
    assert (p >= 0.0).all()
    assert (p.sum(dim=-1) - 1.0).abs().max() <= 1e-12


@bounded
@given(scores(), alphas)
def test_float32_rows_sum_to_one(x: Tensor, alpha: float) -> None:
    p = adasplash2.entmax(x.float(), alpha)
    assert (p >= 0.0).all()
    assert (p.double().sum(dim=-1) - 1.0).abs().max() <= 1e-6


@bounded
@given(scores(), alphas)
def test_rows_keep_the_order_and_ties(x: Tensor, alpha: float) -> None:
    ordered = x.sort(dim=-1)
    p = adasplash2.entmax(x, alpha).gather(-1, ordered.indices)
    assert (p.diff(dim=-1) >= 0.0).all()
    tied = ordered.values.diff(dim=-1) == 0.0
    assert (p.diff(dim=-1)[tied] == 0.0).all()
    assert (p[..., -1] > 0.0).all()


@bounded
@given(scores(), alphas, seeds)
def test_rows_are_equivariant_to_permutation(x: Tensor, alpha: float, seed: int) -> None:
    order = torch.randperm(x.shape[-1], generator=torch.Generator().manual_seed(seed))
    moved = adasplash2.entmax(x[..., order], alpha)
    assert (moved - adasplash2.entmax(x, alpha)[..., order]).abs().max() <= slack(alpha)


@bounded
@given(scores(), alphas, st.floats(-100.0, 100.0))
def test_rows_ignore_a_shift(x: Tensor, alpha: float, shift: float) -> None:
    moved = adasplash2.entmax(x + shift, alpha)
    assert (moved - adasplash2.entmax(x, alpha)).abs().max() <= slack(alpha)


@bounded
@given(scores(), alphas, st.integers(1, 5))
def test_rows_ignore_excluded_entries(x: Tensor, alpha: float, count: int) -> None:
    padding = torch.full((*x.shape[:-1], count), -torch.inf, dtype=x.dtype)
    p = adasplash2.entmax(torch.cat((padding, x, padding), dim=-1), alpha)
    assert (p[..., :count] == 0.0).all()
    assert (p[..., -count:] == 0.0).all()
    assert (p[..., count:-count] - adasplash2.entmax(x, alpha)).abs().max() <= slack(alpha)


@bounded
@given(scores(), alphas)
def test_rows_drop_what_is_out_of_reach(x: Tensor, alpha: float) -> None:
    """tau lies within 1 of the largest z: anything lower has probability zero, exactly."""
    p = adasplash2.entmax(x, alpha)
    gap = (alpha - 1.0) * (x.amax(dim=-1, keepdim=True) - x)
    assert (p[gap > 1.0 + 1e-9] == 0.0).all()


@bounded
@given(scores(), alphas)
def test_sharper_scores_keep_no_more(x: Tensor, alpha: float) -> None:
    """Scaling a row up never adds to its support; near the edge rounding decides."""
    p, sharper = adasplash2.entmax(x, alpha), adasplash2.entmax(2.0 * x, alpha)
    assert (p[sharper > 1e-7] > 0.0).all()


@bounded
@given(scores(), alphas)
def test_row_gradients_sum_to_zero(x: Tensor, alpha: float) -> None:
    """A shift changes nothing, so no gradient points along it; and none leaves the support."""
    leaf = x.requires_grad_()
    p = adasplash2.entmax(leaf, alpha)
    weights = torch.linspace(-1.0, 1.0, x.shape[-1], dtype=x.dtype).expand(x.shape)
    (gradient,) = torch.autograd.grad(p, leaf, weights)
    assert gradient.isfinite().all()
    assert (gradient.sum(dim=-1).abs() <= 1e-10 * (1.0 + gradient.abs().sum(dim=-1))).all()
    assert (gradient[p == 0.0] == 0.0).all()


@bounded
@given(attention_inputs(), alphas, causal)
def test_output_is_in_the_hull_of_the_values(
    tensors: tuple[Tensor, Tensor, Tensor], alpha: float, is_causal: bool
) -> None:
    query, key, value = tensors
    out = adasplash2.entmax_attention(query, key, value, alpha=alpha, is_causal=is_causal)
    low, high = value.amin(dim=2, keepdim=True), value.amax(dim=2, keepdim=True)
    assert (out >= low - EXACT).all()
    assert (out <= high + EXACT).all()
    ones = torch.ones_like(value)
    out = adasplash2.entmax_attention(query, key, ones, alpha=alpha, is_causal=is_causal)
    assert (out - 1.0).abs().max() <= 1e-12


@bounded
@given(attention_inputs(), alphas, seeds)
def test_output_ignores_the_order_of_keys(
    tensors: tuple[Tensor, Tensor, Tensor], alpha: float, seed: int
) -> None:
    query, key, value = tensors
    order = torch.randperm(key.shape[2], generator=torch.Generator().manual_seed(seed))
    out = adasplash2.entmax_attention(query, key, value, alpha=alpha)
    moved = adasplash2.entmax_attention(query, key[:, :, order], value[:, :, order], alpha=alpha)
    assert (moved - out).abs().max() <= slack(alpha)


@bounded
@given(attention_inputs(), alphas, st.data())
def test_causal_rows_ignore_later_keys(
    tensors: tuple[Tensor, Tensor, Tensor], alpha: float, data: st.DataObject
) -> None:
    query, key, value = tensors
    assume(key.shape[2] > 1)
    first = data.draw(st.integers(1, key.shape[2] - 1), label="first key that changes")
    out = adasplash2.entmax_attention(query, key, value, alpha=alpha, is_causal=True)
    key, value = key.clone(), value.clone()
    key[:, :, first:] = 7.0
    value[:, :, first:] = torch.nan
    moved = adasplash2.entmax_attention(query, key, value, alpha=alpha, is_causal=True)
    # The rows of a tile are all computed from lists, or all from their scores: the last bits of one
    # may change with another that does see later keys.
    apart = first // TILE_ROWS * TILE_ROWS
    assert torch.equal(moved[:, :, :apart], out[:, :, :apart])
    assert (moved[:, :, apart:first] - out[:, :, apart:first]).abs().le(slack(alpha)).all()


@bounded
@given(attention_inputs(), alphas, causal)
def test_a_block_of_queries_is_the_same_alone(
    tensors: tuple[Tensor, Tensor, Tensor], alpha: float, is_causal: bool
) -> None:
    """Rows do not know their neighbours: the first half alone gives the same. Rows that keep many
    keys are summed by tiles of eight, and those of a last tile that is cut round otherwise. Without
    gradients few queries may be computed otherwise."""
    query, key, value = tensors
    half = (query.shape[2] + 1) // 2
    for wanted in (True, False):
        query = query.detach().requires_grad_(wanted)
        out = adasplash2.entmax_attention(query, key, value, alpha=alpha, is_causal=is_causal)
        alone = adasplash2.entmax_attention(
            query[:, :, :half], key, value, alpha=alpha, is_causal=is_causal
        )
        assert (alone - out[:, :, :half]).abs().max() <= slack(alpha)
        if wanted:
            whole = half // 8 * 8
            assert torch.equal(alone[:, :, :whole], out[:, :, :whole])


@bounded
@given(attention_inputs(), alphas, causal)
def test_attention_is_rows_times_values(
    tensors: tuple[Tensor, Tensor, Tensor], alpha: float, is_causal: bool
) -> None:
    """Attention and the row mapping are separate kernels that must agree."""
    query, key, value = tensors
    scores = query @ key.mT / query.shape[3] ** 0.5
    if is_causal:
        hidden = torch.ones(scores.shape[2:], dtype=torch.bool).triu(diagonal=1)
        scores = scores.masked_fill(hidden, -torch.inf)
    out = adasplash2.entmax_attention(query, key, value, alpha=alpha, is_causal=is_causal)
    assert (out - adasplash2.entmax(scores, alpha) @ value).abs().max() <= 10.0 * slack(alpha)
