"""``entmax``, ``entmax15`` and ``sparsemax`` of rows against the float64 reference."""

from __future__ import annotations

import math

import pytest
import reference
import torch
from cases import (
    ALPHAS,
    BFLOAT16,
    DENSE_FACTOR,
    DENSE_ORDERS,
    DTYPES,
    FLOAT16,
    FLOAT32,
    FLOAT32_FLOOR,
    FLOAT64,
    ROUNDING_FACTOR,
    device_of,
    interpreted,
    tolerances,
    usable_backends,
)
from torch import Tensor

import adasplash2

on_every_backend = pytest.mark.parametrize("backend", usable_backends())


def gaussian(*shape: int, factor: float = 1.0, dtype: torch.dtype = FLOAT32) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return (factor * torch.randn(shape, generator=generator, dtype=FLOAT64)).to(dtype)


def run(x: Tensor, grad_y: Tensor, alpha: float, backend: str, dim: int = -1) -> tuple[Tensor, ...]:
    """Output and gradient, on the device of ``x``; skips with the reasons where a backend
    refuses."""
    leaf = x.to(device_of(backend)).detach().requires_grad_()
    try:
        y = adasplash2.entmax(leaf, alpha, dim, backend=backend)
    except adasplash2.BackendRefused as refused:
        if backend == "cpu":
            raise
        pytest.skip(str(refused))
    (gradient,) = torch.autograd.grad(y, leaf, grad_y.to(leaf.device))
    assert y.dtype == gradient.dtype == x.dtype
    assert y.shape == gradient.shape == x.shape
    return y.detach().to(x.device), gradient.to(x.device)


def dense(x: Tensor, grad_y: Tensor, alpha: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    y = reference.entmax(x.to(dtype), alpha)
    return y, reference.entmax_gradient(y, grad_y.to(dtype), alpha)


def dense_errors(
    x: Tensor, grad_y: Tensor, alpha: float, exact: tuple[Tensor, Tensor]
) -> tuple[float, float]:
    """Errors of dense float32 evaluation, the worst of several orders of summation."""
    generator = torch.Generator().manual_seed(0)
    worst = [0.0, 0.0]
    for _ in range(DENSE_ORDERS):
        order = torch.randperm(x.shape[-1], generator=generator)
        got = dense(x[..., order], grad_y[..., order], alpha, FLOAT32)
        for index in range(2):
            error = reference.error(got[index], exact[index][..., order])
            worst[index] = max(worst[index], error)
    return worst[0], worst[1]


def assert_agrees(x: Tensor, alpha: float, backend: str, *, well_conditioned: bool = True) -> None:
    x = x.to(device_of(backend))  # the reference runs there too
    grad_y = gaussian(*x.shape, 1)[..., 0].to(x)
    if alpha > 2.0:  # there is no right gradient to agree with in rows at a kink
        z = (alpha - 1.0) * x.double()
        computed_in = FLOAT64 if x.dtype == FLOAT64 else FLOAT32
        tau = reference.probabilities_and_tau(z, alpha)[1]
        undecided = reference.undecided_rows(z, tau, computed_in)
        assert undecided.double().mean() < 0.5
        grad_y[undecided] = 0.0
    got = run(x, grad_y, alpha, backend)
    exact = dense(x, grad_y, alpha, FLOAT64)
    magnitude = exact[0], reference.entmax_gradient_magnitude(exact[0], grad_y.double(), alpha)
    limits = tolerances(backend)
    for index, what in enumerate(("out", "gradient")):
        expected, floor = exact[index], FLOAT32_FLOOR * reference.norm(magnitude[index])
        if x.dtype in limits and well_conditioned:
            allowed = getattr(limits[x.dtype], what) * reference.norm(expected)
        elif x.dtype == FLOAT64:
            allowed = getattr(limits[x.dtype], what) * reference.norm(magnitude[index])
        elif x.dtype == FLOAT32:
            rival = dense_errors(x, grad_y, alpha, exact)[index]
            allowed = max(floor, DENSE_FACTOR * rival)
        elif what == "out":
            allowed = floor + ROUNDING_FACTOR * reference.error(expected.to(x.dtype), expected)
        else:
            continue  # depends on the rounded output: see test_gradient_of_a_rounded_output
        error = reference.error(got[index], expected)
        assert error <= allowed, f"{what}: error {error:.2e}, allowed {allowed:.2e}"


@on_every_backend
@interpreted(length=1, alpha=1.5, dtype=FLOAT32)
@interpreted(length=200, alpha=2.0, dtype=BFLOAT16)
@interpreted(length=65, alpha=1.25, dtype=FLOAT16)
@interpreted(length=1023, alpha=1.75, dtype=FLOAT32)
@interpreted(length=200, alpha=3.0, dtype=FLOAT32)
@interpreted(length=65, alpha=3.0, dtype=FLOAT16)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("length", [1, 2, 3, 5, 8, 15, 16, 17, 31, 64, 65, 200, 1023])
def test_agrees_with_the_reference(
    length: int, alpha: float, dtype: torch.dtype, backend: str
) -> None:
    assert_agrees(gaussian(19, length, dtype=dtype), alpha, backend, well_conditioned=alpha <= 2)


@on_every_backend
@interpreted(length=700, factor=1e3, alpha=1.5, dtype=FLOAT32)
@interpreted(length=5000, factor=0.05, alpha=1.5, dtype=FLOAT32)
@interpreted(length=700, factor=0.05, alpha=3.0, dtype=FLOAT32)
@pytest.mark.parametrize("dtype", [FLOAT32, FLOAT64])
@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("factor", [1e-4, 0.05, 10.0, 1e3])
@pytest.mark.parametrize("length", [700, 5000])
def test_long_rows_flat_and_sharp(
    length: int, factor: float, alpha: float, dtype: torch.dtype, backend: str
) -> None:
    x = gaussian(3, length, factor=factor, dtype=dtype)
    assert_agrees(x, alpha, backend, well_conditioned=alpha <= 2 and factor < 10)


@on_every_backend
@interpreted(alpha=1.5, dtype=BFLOAT16)
@interpreted(alpha=1.25, dtype=FLOAT16)
@pytest.mark.parametrize("dtype", [BFLOAT16, FLOAT16])
@pytest.mark.parametrize("alpha", [1.25, 1.5, 2.0])
def test_gradient_of_a_rounded_output(alpha: float, dtype: torch.dtype, backend: str) -> None:
    """The gradient of 16-bit rows is the formula's, at the output as it was rounded."""
    x, grad_y = gaussian(40, 300, dtype=dtype), gaussian(40, 301, dtype=dtype)[:, :300]
    y, gradient = run(x, grad_y, alpha, backend)
    exact = reference.entmax_gradient(y.double(), grad_y.double(), alpha)
    rounding = reference.error(exact.to(dtype), exact)
    allowed = ROUNDING_FACTOR * rounding + FLOAT32_FLOOR * reference.norm(exact)
    assert reference.error(gradient, exact) <= allowed


@on_every_backend
@interpreted(dim=-1, dtype=BFLOAT16)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [0, 1, 2, -1, -2, -3])
def test_every_dimension(dim: int, dtype: torch.dtype, backend: str) -> None:
    x = gaussian(5, 7, 9, dtype=dtype)
    grad_y = gaussian(9, 7, 5, dtype=dtype).transpose(0, 2)
    got = run(x, grad_y, 1.5, backend, dim)
    moved = run(x.movedim(dim, -1).contiguous(), grad_y.movedim(dim, -1).contiguous(), 1.5, backend)
    for one, other in zip(got, moved, strict=True):
        assert torch.equal(one, other.movedim(-1, dim))
    sums = got[0].double().sum(dim=dim)
    tolerance = {FLOAT64: 1e-14, FLOAT32: 1e-6}.get(dtype, 0.02)
    assert (sums - 1.0).abs().max() <= tolerance


@on_every_backend
@interpreted(layout=("columns", "slice", "transposed"))
@pytest.mark.parametrize("layout", ["rows", "columns", "slice", "expanded", "vector", "transposed"])
def test_strides(layout: str, backend: str) -> None:
    base = gaussian(12, 40)
    x = {
        "rows": base[::3],
        "columns": base[:, ::3],
        "slice": base[1:-1, 3:-5],
        "expanded": base[:1].expand(12, 40),
        "vector": base[0],
        "transposed": base.T,
    }[layout]
    grad_y = torch.ones(()).expand(x.shape) + x  # dense, other strides
    got = run(x, grad_y, 1.5, backend)
    expected = run(x.clone(memory_format=torch.contiguous_format), grad_y, 1.5, backend)
    for one, other in zip(got, expected, strict=True):
        assert torch.equal(one, other)


@on_every_backend
@interpreted(alpha=(1.5, 1.75, 2.0, 3.0))
@pytest.mark.parametrize("alpha", ALPHAS)
def test_special_entries(alpha: float, backend: str) -> None:
    inf, nan = math.inf, math.nan
    x = gaussian(6, 40)
    x[0, ::3] = -inf
    x[1] = -inf
    x[2, 7] = nan
    x[3, 8] = inf
    x[4, 1:] = -inf
    y, gradient = run(x, torch.ones_like(x).cumsum(-1), alpha, backend)
    exact, exact_gradient = dense(x, torch.ones_like(x).cumsum(-1), alpha, FLOAT64)
    assert (y[0, ::3] == 0.0).all()
    assert (y[1] == 0.0).all()
    assert (gradient[1] == 0.0).all()
    assert y[2:4].isnan().all()
    assert y[4].tolist() == [1.0] + 39 * [0.0]
    clean = [0, 1, 4, 5]
    assert reference.relative_error(y[clean], exact[clean]) < 1e-5
    # The gradient is exactly zero in row 4, so errors are relative to the others.
    assert reference.relative_error(gradient[clean], exact_gradient[clean]) < 1e-4
    # A row's neighbours never notice.
    for index in (0, 5):
        alone = run(x[index : index + 1], torch.ones(1, 40).cumsum(-1), alpha, backend)
        assert torch.equal(alone[0][0], y[index])
        assert torch.equal(alone[1][0], gradient[index])


@on_every_backend
@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("length", [1, 3, 64, 5000])
def test_ties_share_the_mass(length: int, alpha: float, backend: str) -> None:
    x = torch.full((2, length), 0.37)
    y = run(x, x, alpha, backend)[0]
    assert (y == y[0, 0]).all()
    assert y[0, 0].item() == pytest.approx(1.0 / length, rel=1e-6)


@on_every_backend
@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("offset", [-1e4, 0.0, 1e4])
def test_one_huge_entry_takes_all(offset: float, alpha: float, backend: str) -> None:
    x = gaussian(4, 99) + offset
    x[:, 42] += 1e6
    y, gradient = run(x, torch.ones_like(x).cumsum(-1), alpha, backend)
    expected = torch.zeros_like(x)
    expected[:, 42] = 1.0
    assert torch.equal(y, expected)
    assert gradient.abs().max() <= 1e-5 * 99


@on_every_backend
@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("length", [2, 65, 5000])
@pytest.mark.parametrize("factor", [1e-3, 0.05, 1.0, 1e3])
def test_sums_to_one(factor: float, length: int, alpha: float, backend: str) -> None:
    x = gaussian(20, length, factor=factor)
    y = run(x, x, alpha, backend)[0]
    assert (y >= 0.0).all()
    limit = 2.0 * FLOAT32_FLOOR if backend == "cpu" else 1e-6
    assert (y.double().sum(dim=-1) - 1.0).abs().max() <= limit


@on_every_backend
@pytest.mark.parametrize("alpha", [1.25, 1.5, 2.0, 3.0])
@pytest.mark.parametrize("dim", [0, 1])
def test_gradcheck(dim: int, alpha: float, backend: str) -> None:
    x = gaussian(5, 6, dtype=FLOAT64)
    for factor in torch.linspace(1.0, 3.0, 400).tolist():
        z = (alpha - 1.0) * factor * x.movedim(dim, -1)
        tau = reference.probabilities_and_tau(z, alpha)[1]
        if (z - tau.unsqueeze(-1)).abs().min() > 5e-3:
            break
    else:
        pytest.fail("no factor keeps the scores away from the thresholds")
    run(x, x, alpha, backend)  # skips where refused
    leaf = (factor * x).to(device_of(backend)).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x: adasplash2.entmax(x, alpha, dim, backend=backend), [leaf]
    )


def test_named_shorthands() -> None:
    x = gaussian(6, 33)
    assert torch.equal(adasplash2.entmax15(x), adasplash2.entmax(x, 1.5))
    assert torch.equal(adasplash2.entmax15(x, dim=0), adasplash2.entmax(x, 1.5, dim=0))
    assert torch.equal(adasplash2.sparsemax(x), adasplash2.entmax(x, 2.0))
    assert torch.equal(adasplash2.sparsemax(x, dim=0), adasplash2.entmax(x, 2.0, dim=0))
    assert torch.equal(adasplash2.entmax(x), adasplash2.entmax15(x))
    assert not torch.equal(adasplash2.entmax15(x), adasplash2.sparsemax(x))
