"""Numbers at the edge: alpha near 1 and far above 2, large and shifted scores, infinities, and how
results are rounded."""

from __future__ import annotations

import math

import exact
import pytest
import reference
import torch
from cases import (
    BFLOAT16,
    DTYPES,
    FLOAT16,
    FLOAT32,
    FLOAT64,
    Case,
    device_of,
    interpreted,
    usable_backends,
)
from torch import Tensor

import adasplash2

on_every_backend = pytest.mark.parametrize("backend", usable_backends())

ROUND_OFFS = {"cpu": 4.0}
"""Round-offs of its norm that a row of :mod:`exact` may be off."""
ROUND_OFFS_ON_GPU = 64.0


def entmax(x: Tensor, alpha: float, backend: str) -> Tensor:
    """On the backend's device and back; skips where it refuses."""
    try:
        return adasplash2.entmax(x.to(device_of(backend)), alpha, backend=backend).to(x.device)
    except adasplash2.BackendRefused as refused:
        if backend == "cpu":
            raise
        pytest.skip(str(refused))


def row_gradient(x: Tensor, grad_y: Tensor, alpha: float, backend: str) -> Tensor:
    leaf = x.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(entmax(leaf, alpha, backend), leaf, grad_y)
    return gradient


def attend(
    inputs: tuple[Tensor, ...], case: Case, backend: str
) -> tuple[Tensor, reference.Gradients]:
    leaves = [t.to(device_of(backend)).detach().requires_grad_() for t in inputs[:3]]
    try:
        out = adasplash2.entmax_attention(*leaves, **case.options, backend=backend)
    except adasplash2.BackendRefused as refused:
        if backend == "cpu":
            raise
        pytest.skip(str(refused))
    gradients = torch.autograd.grad(out, leaves, inputs[3].to(out.device))
    return out.detach().cpu(), reference.Gradients(*(g.cpu() for g in gradients))


def expect(inputs: tuple[Tensor, ...], case: Case) -> tuple[Tensor, reference.Gradients]:
    found = reference.attention(*inputs[:3], **case.options)
    gradients = reference.attention_gradients(*inputs, **case.options, p=found.probabilities)
    return found.out, gradients


# Every alpha.


@on_every_backend
@pytest.mark.parametrize("dtype", [FLOAT32, FLOAT64])
@pytest.mark.parametrize("alpha", exact.ALPHAS)
def test_rows_of_every_alpha(alpha: float, dtype: torch.dtype, backend: str) -> None:
    limit = ROUND_OFFS.get(backend, ROUND_OFFS_ON_GPU) * torch.finfo(dtype).eps
    for name, x in exact.rows(dtype).items():
        expected = torch.tensor([exact.entmax(tuple(x[0].tolist()), alpha)], dtype=FLOAT64)
        got = entmax(x, alpha, backend)
        assert reference.relative_error(got, expected) <= limit, name
        assert ((got > 0.0) == (expected > torch.finfo(dtype).tiny))[expected != 0.0].all(), name


@on_every_backend
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("alpha", [1 + 2**-52, 1 + 1e-8, 1 + 1e-5])
def test_alpha_near_one_is_softmax(alpha: float, dtype: torch.dtype, backend: str) -> None:
    """Forward and gradient, of rows and of attention: the difference is of the order of alpha - 1
    times the square of the scores."""
    case = Case("near-one", length_q=70, length_k=600, dtype=dtype, alpha=alpha, is_causal=True)
    inputs = case.inputs()
    found = attend(inputs, case, backend)
    softmax = expect(inputs, Case("softmax", alpha=1.0, is_causal=True))
    near = 200.0 * (alpha - 1.0) + 16.0 * torch.finfo(dtype).eps
    for got, expected in zip((found[0], *found[1]), (softmax[0], *softmax[1]), strict=True):
        assert reference.relative_error(got, expected) < near
    x = inputs.query.flatten(0, 2)
    softmax_of_rows = torch.softmax(x.double(), dim=-1)
    assert reference.relative_error(entmax(x, alpha, backend), softmax_of_rows) < near


@on_every_backend
@pytest.mark.parametrize("alpha", [1 + 1e-6, 1.3, 1.7, 2.5, 10.0])
@pytest.mark.parametrize("shift", [0.0, 1e4, -1e6, 1e30])
def test_rows_do_not_feel_a_shift(shift: float, alpha: float, backend: str) -> None:
    """Scores that are shifted exactly give the same, and so does their gradient."""
    step = max(2.0**-10, 2.0 ** math.ceil(math.log2(max(abs(shift), 1.0)) - 22))
    x = step * torch.randint(-64, 64, (20, 300)).float()
    moved = x + shift - math.fmod(shift, step)
    assert torch.equal((moved.double() - moved.double()[:1, :1]), (x - x[:1, :1]).double())
    grad_y = torch.randn(20, 300)
    near = ROUND_OFFS.get(backend, ROUND_OFFS_ON_GPU) * torch.finfo(FLOAT32).eps
    still = entmax(x, alpha, backend)
    assert reference.relative_error(entmax(moved, alpha, backend), still) <= near
    got = row_gradient(moved, grad_y, alpha, backend)
    # Above alpha = 2 the gradient is p to the power 2 - alpha, and the least p is the largest term.
    near *= 1.0 if alpha < 2.0 else 64.0 * alpha
    assert reference.relative_error(got, row_gradient(x, grad_y, alpha, backend)) <= near


@on_every_backend
@pytest.mark.parametrize("alpha", [1 + 1e-9, 1.05, 1.9, 2.1, 5.0, 50.0])
@pytest.mark.parametrize("data", ["gaussian", "equal", "ties", "minus_infinity", "huge_negative"])
@pytest.mark.parametrize("length", [100, 1500])
def test_attention_of_every_alpha(length: int, data: str, alpha: float, backend: str) -> None:
    """Long rows are flat where alpha is near 1, and everywhere where scores are equal."""
    case = Case("any", alpha=alpha, data=data, length_q=33, length_k=length, dtype=FLOAT64,
                head_dim=5)  # fmt: skip
    inputs = case.inputs()
    found = reference.attention(*inputs[:3], **case.options)
    got, expected = attend(inputs, case, backend), expect(inputs, case)
    sizes = reference.magnitudes(*inputs, p=found.probabilities, alpha=alpha)
    assert reference.error(got[0], expected[0]) <= 1e-13 * reference.norm(sizes[0])
    # Above alpha = 2 the gradient takes a power 2 - alpha of p: its relative error is as many
    # times that of p, which the scores' own round-off moves most at the edge of the support.
    near = 1e-12 * max(1.0, alpha) if alpha < 2.0 else 1e-7
    for one, other, size in zip(got[1], expected[1], sizes[1], strict=True):
        assert reference.error(one, other) <= near * reference.norm(size)


# Gradients that leave the range.


@on_every_backend
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("alpha", [3.0, 10.0, 60.0])
@pytest.mark.parametrize("length", [2, 1000, 600_000])
def test_row_gradients_of_equal_scores(
    length: int, alpha: float, dtype: torch.dtype, backend: str
) -> None:
    """p^(2-alpha) may overflow: then the gradient is infinite, or the largest number, where the
    exact one is, with its sign; NaN nowhere."""
    x = torch.full((1, length), 0.37, dtype=dtype)
    grad_y = torch.randint(-8, 8, (1, length)).to(dtype)
    got = row_gradient(x, grad_y, alpha, backend).double()
    y = entmax(x, alpha, backend).double()
    centred = grad_y.double() - grad_y.double().mean()
    log_size = (2.0 - alpha) * y.log2() + centred.abs().log2()
    assert not got.isnan().any()
    clear = centred.abs() > 0.5
    assert (got.sign() == centred.sign())[clear].all()
    fits = clear & (log_size < math.log2(torch.finfo(dtype).max))
    expected = 2.0**log_size * centred.sign()
    error = ((got - expected) / expected)[fits].abs()
    assert (error <= 64.0 * alpha * torch.finfo(dtype).eps).all()
    too_large = clear & (log_size > 1.0 + math.log2(torch.finfo(dtype).max))
    assert (got.abs() >= torch.finfo(dtype).max)[too_large].all()


@on_every_backend
@pytest.mark.parametrize("alpha", [3.0, 10.0, 60.0])
@pytest.mark.parametrize("length", [300, 3000])
def test_attention_gradients_of_equal_scores(length: int, alpha: float, backend: str) -> None:
    """Lists and flat rows; zeros of queries and keys stay zeros beside an infinite ds."""
    case = Case("equal", alpha=alpha, data="equal", length_q=9, length_k=length, head_dim=8)
    inputs = case.inputs()
    inputs.key[..., 1] *= 1e3
    out, got = attend(inputs, case, backend)
    assert reference.relative_error(out, expect(inputs, case)[0]) < 1e-5
    assert not got.query.isnan().any()
    for gradient, expected in zip(got, expect(inputs, case)[1], strict=True):
        # A key's sum over rows may be infinite with both signs where the exact one is out of range.
        assert not gradient[expected.abs() < 1e38].isnan().any()
        largest = expected.abs().max()
        if largest < 1e38:
            assert reference.relative_error(gradient, expected) < 1e-4
        assert (gradient[expected == 0.0] == 0.0).all()
    assert got.key[..., 1:].abs().max() == 0.0  # the queries are zero there


@interpreted()
@on_every_backend
@pytest.mark.parametrize("dtype", [BFLOAT16, FLOAT16, FLOAT32])
@pytest.mark.parametrize("alpha", [1.25, 1.5, 2.0])
def test_a_mean_of_zero_is_no_row_of_one_key(
    alpha: float, dtype: torch.dtype, backend: str
) -> None:
    """Two keys of equal scores and opposite values: their mean is zero, their gradients are not."""
    generator = torch.Generator().manual_seed(0)
    query, grad_out = torch.randn((2, 1, 1, 24, 64), generator=generator)
    value = torch.randn((1, 1, 1, 64), generator=generator).sign()
    key, value = torch.zeros(1, 1, 2, 64), torch.cat([value, -value], dim=2)
    leaves = [x.to(device_of(backend), dtype).requires_grad_() for x in (query, key, value)]
    out = adasplash2.entmax_attention(*leaves, alpha=alpha, backend=backend)
    (grad_key,) = torch.autograd.grad(out, leaves[1], grad_out.to(out))
    wide = [x.detach().double().cpu().requires_grad_() for x in leaves]
    exact_out = adasplash2.entmax_attention(*wide, alpha=alpha, backend="cpu")
    (wanted,) = torch.autograd.grad(exact_out, wide[1], grad_out.to(dtype).double())
    assert wanted.norm() > 1.0
    assert (grad_key.double().cpu() - wanted).norm() < 0.01 * wanted.norm()


@pytest.mark.parametrize("alpha", [20.0, 35.5, 60.0])
@pytest.mark.parametrize("dtype", [FLOAT32, FLOAT64])
def test_one_small_probability_outweighs_all(alpha: float, dtype: torch.dtype) -> None:
    """Its u is up to 1e87 times the other's: delta is its dp but for that much, and its gradient
    all the same minus the other's. With an equal dp elsewhere, and where u leaves the range too."""
    for small in (0.03, 1e-3):
        y = torch.tensor([[small, 1.0 - small]], dtype=FLOAT64)
        x = ((y ** (alpha - 1.0)) / (alpha - 1.0)).to(dtype)
        if x[0, 0] == 0.0:
            continue  # the scores do not resolve it
        grad_y = torch.tensor([[0.7, -1.9]], dtype=dtype)
        got = row_gradient(x, grad_y, alpha, "cpu").double()
        u = entmax(x, alpha, "cpu").double()[0, 1] ** (2.0 - alpha)
        expected = (u * -2.6).item()
        assert got[0, 1].item() == pytest.approx(expected, rel=1e-4)
        assert got[0, 0].item() == pytest.approx(-expected, rel=1e-4)


@on_every_backend
@interpreted()
def test_gradients_of_scores_beyond_float16(backend: str) -> None:
    """Above alpha = 2 a small probability has a large one: 1e5 here, where what is asked for, the
    gradients of queries and keys, mostly fits."""
    case = Case("steep", alpha=3.0, length_q=9, head_dim=3, dtype=FLOAT16, heads_q=1,
                length_k=1500, sharpness=1e-6)  # fmt: skip
    inputs = case.inputs()
    got, expected = attend(inputs, case, backend), expect(inputs, case)
    for one, other in zip((got[0], *got[1]), (expected[0], *expected[1]), strict=True):
        rounded = other.to(FLOAT16)
        assert torch.equal(one.isinf(), rounded.isinf())
        kept = rounded.isfinite()
        assert reference.relative_error(one[kept], other[kept]) < 1e-3


@on_every_backend
@interpreted()
@pytest.mark.parametrize("alpha", [1.5, 2.0])
@pytest.mark.parametrize("length_k", [40, 1500])
def test_large_gradients_of_large_values_in_float16(
    length_k: int, alpha: float, backend: str
) -> None:
    """A score's gradient is 1e5 to 1e6 and fits no float16; those of queries and keys do."""
    case = Case("large", alpha=alpha, length_q=9, head_dim=16, dtype=FLOAT16, heads_q=1,
                length_k=length_k, sharpness=0.1)  # fmt: skip
    inputs = case.inputs()
    inputs.query.mul_(2.0**-5)
    inputs.key.mul_(2.0**-9)
    inputs.value.mul_(2.0**8)
    inputs.grad_out.mul_(2.0**8)
    got, expected = attend(inputs, case, backend), expect(inputs, case)
    assert max(gradient.abs().max() for gradient in expected[1][:2]) < 6e4
    for one, other in zip((got[0], *got[1]), (expected[0], *expected[1]), strict=True):
        assert one.isfinite().all()
        assert reference.relative_error(one, other) < 2e-3


# Infinities.


def assert_same_infinities(got: Tensor, expected: Tensor) -> None:
    expected = expected.to(got.dtype)  # which has infinities of its own
    assert torch.equal(got.isnan(), expected.isnan())
    infinite = expected.isinf()
    assert torch.equal(got[infinite], expected[infinite])
    assert got[~infinite & ~expected.isnan()].isfinite().all()


@on_every_backend
@interpreted(alpha=(1.5, 3.0), shape="lists", sign=1.0)
@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("where", ["value", "grad_out", "two_values", "value_outside"])
@pytest.mark.parametrize("alpha", [1.25, 1.5, 2.0, 3.0])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", ["lists", "flat"])
def test_infinities_as_in_float64(
    shape: str, dtype: torch.dtype, alpha: float, where: str, sign: float, backend: str
) -> None:
    """An infinite value or gradient gives infinities, and NaN where inf - inf is genuine."""
    flat = {"length_k": 1500, "sharpness": 1e-6} if shape == "flat" else {"length_k": 70}
    case = Case("inf", length_q=9, head_dim=3, dtype=dtype, alpha=alpha, heads_q=1, **flat)
    inputs = case.inputs()
    p = reference.attention(*inputs[:3], **case.options).probabilities
    order = p[0, 0, 4].argsort(descending=True)
    if where == "grad_out":
        inputs.grad_out[0, 0, 4, 1] = sign * math.inf
    else:
        inputs.value[0, 0, order[-1 if where == "value_outside" else 0], 1] = sign * math.inf
    if where == "two_values":
        inputs.value[0, 0, order[1], 1] = -sign * math.inf
    got, expected = attend(inputs, case, backend), expect(inputs, case)
    for one, other in zip((got[0], *got[1]), (expected[0], *expected[1]), strict=True):
        if backend == "triton" and where == "grad_out" and one is not got[0]:
            # Its delta is dO times a mean of the values: infinite where a sum of dp may be NaN.
            assert torch.equal(one.isfinite(), other.to(one.dtype).isfinite())
        else:
            assert_same_infinities(one, other)


@on_every_backend
@pytest.mark.parametrize("alpha", [1.25, 1.5, 2.0, 3.0])
@pytest.mark.parametrize("dtype", DTYPES)
def test_infinite_row_gradients_as_in_float64(
    dtype: torch.dtype, alpha: float, backend: str
) -> None:
    x = 0.3 * torch.randn(6, 200, dtype=FLOAT64).to(dtype)
    y = entmax(x, alpha, backend)
    grad_y = torch.randn(6, 200, dtype=FLOAT64).to(dtype)
    order = y.argsort(dim=-1, descending=True)
    grad_y[0, order[0, 0]] = math.inf
    grad_y[1, order[1, 0]] = -math.inf
    grad_y[2, order[2, :2]] = math.inf
    grad_y[3, order[3, 0]], grad_y[3, order[3, 1]] = math.inf, -math.inf
    grad_y[4, order[4, -1]] = math.inf  # outside the support, but for alpha near 1
    got = row_gradient(x, grad_y, alpha, backend)
    expected = reference.entmax_gradient(y.double(), grad_y.double(), alpha)
    assert_same_infinities(got, expected)


# How 16-bit results are rounded: two equal keys, so that the output is the mean of their values.

NEIGHBOURS = {
    FLOAT16: [
        *((1.0, 1.0 + 2.0**-10), (1.0 + 2.0**-10, 1.0 + 2.0**-9), (65504.0, 65472.0)),
        *((2.0**-24, 0.0), (2.0**-24, 2.0**-23), (-(2.0**-24), 0.0), (65504.0, 65504.0)),
        *((2.0**-14, 2.0**-14 - 2.0**-24), (-65504.0, -65472.0), (3 * 2.0**-24, 2.0**-23)),
    ],
    BFLOAT16: [
        *((1.0, 1.0 + 2.0**-7), (1.0 + 2.0**-7, 1.0 + 2.0**-6), (-1.0, -1.0 - 2.0**-7)),
        *((3.0e38, 3.0e38), (torch.finfo(BFLOAT16).max, 0.0), (2.0**-126, 0.0)),
    ],
}


@on_every_backend
@pytest.mark.parametrize("alpha", [1.25, 1.5, 2.0, 3.0])
@pytest.mark.parametrize("dtype", [FLOAT16, BFLOAT16])
def test_halves_are_rounded_to_even(dtype: torch.dtype, alpha: float, backend: str) -> None:
    value = torch.tensor(NEIGHBOURS[dtype], dtype=FLOAT64).T.to(dtype)
    query, key = torch.ones(1, 1, 3, 4, dtype=dtype), torch.ones(1, 1, 2, 4, dtype=dtype)
    case = Case("halves", alpha=alpha)
    grad_out = torch.ones(1, 1, 3, value.shape[1], dtype=dtype)
    out, _ = attend((query, key, value[None, None], grad_out), case, backend)
    mean = value.double().mean(dim=0)
    nearest = mean.to(dtype)
    if backend != "cpu" and alpha in (1.25, 1.5):
        # Powers of float32 roots of 1/2: what they weigh is a tie but for round-off.
        other = (2.0 * mean - nearest.double()).to(dtype)
        assert ((out == nearest) | (out == other)).all()
    else:
        assert torch.equal(out, nearest.expand(1, 1, 3, -1))


@pytest.mark.parametrize(
    ("dtype", "below", "above"), [(FLOAT16, 15.99, 16.0), (BFLOAT16, 2.0**118, 2.0**119)]
)
def test_where_sixteen_bits_overflow(dtype: torch.dtype, below: float, above: float) -> None:
    """What lies nearest to the largest number is stored as that; one key of weight 1 passes its
    gradient on as it is, so that the sum of two queries' gives what is wanted."""
    largest = torch.finfo(dtype).max
    for more in (below, above, -below, -above):
        parts = torch.tensor([math.copysign(largest, more), more])
        grad_out = parts.to(dtype).view(1, 1, 2, 1)
        total = grad_out.float().sum().to(dtype)  # torch rounds to nearest, ties to even
        ones = torch.ones(1, 1, 2, 1, dtype=dtype)
        value = torch.ones(1, 1, 1, 1, dtype=dtype).requires_grad_()
        out = adasplash2.entmax_attention(ones, ones[:, :, :1], value, backend="cpu")
        (got,) = torch.autograd.grad(out, value, grad_out)
        assert got.item() == total.item()
        assert math.isinf(got.item()) == (abs(more) == above)


@pytest.mark.parametrize("dtype", [FLOAT16, BFLOAT16])
def test_nan_is_stored_as_nan(dtype: torch.dtype) -> None:
    """Whatever its payload, also where rounding it up would overflow into an infinity."""
    payloads = torch.tensor([0x7F800001, 0x7FFFFFFF, -1, -0x7FFFFF], dtype=torch.int32)
    value = payloads.view(FLOAT32).view(1, 1, 1, 4).to(dtype)
    value.view(torch.int16)[..., 0] = {FLOAT16: 0x7C01, BFLOAT16: 0x7F81}[dtype]
    value.view(torch.int16)[..., 1] = 0x7FFF
    ones = torch.ones(1, 1, 1, 1, dtype=dtype)
    assert adasplash2.entmax_attention(ones, ones, value, backend="cpu").isnan().all()
