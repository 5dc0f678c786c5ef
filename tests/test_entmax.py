"""``entmax``, ``entmax15`` and ``sparsemax`` of rows against the float64 reference."""

from __future__ import annotations

import math
from typing import Any

import language
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
from adasplash2 import dispatch
from adasplash2.backends import cuda
from adasplash2.problem import row_problem

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


# alpha as a tensor

ROW_ALPHAS = (1.05, 1.25, 1.5, 1.7, 2.0)


def run_with_alphas(
    x: Tensor, grad_y: Tensor, alpha: Tensor, backend: str, dim: int = -1
) -> tuple[Tensor, Tensor, Tensor]:
    """Output and gradients of ``x`` and ``alpha``; skips with the reasons where a backend
    refuses."""
    device = device_of(backend)
    leaf = x.to(device).detach().requires_grad_()
    alphas = alpha.to(device).detach().requires_grad_()
    try:
        y = adasplash2.entmax(leaf, alphas, dim, backend=backend)
    except adasplash2.BackendRefused as refused:
        if backend == "cpu":
            raise
        pytest.skip(str(refused))
    of_x, of_alpha = torch.autograd.grad(y, (leaf, alphas), grad_y.to(device))
    assert y.dtype == of_x.dtype == x.dtype
    assert of_alpha.dtype == alpha.dtype
    assert of_alpha.shape == alpha.shape
    return y.detach().to(x.device), of_x.to(x.device), of_alpha.to(x.device)


def exact_with_alphas(x: Tensor, grad_y: Tensor, alpha: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """By the float64 reference, of ``alpha`` that broadcasts to ``x`` with a last size of 1."""
    leaf, alphas = x.double().requires_grad_(), alpha.double().requires_grad_()
    y = language.Entmax.apply(leaf, alphas.expand(*x.shape[:-1], 1))
    return y.detach(), *torch.autograd.grad(y, (leaf, alphas), grad_y.double())


@on_every_backend
@interpreted(length=65, dtype=FLOAT32)
@interpreted(length=65, dtype=BFLOAT16)
@interpreted(length=200, dtype=FLOAT16)
@interpreted(length=1, dtype=FLOAT32)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length", [1, 2, 16, 65, 200, 1023])
def test_alphas_agree_with_the_reference(length: int, dtype: torch.dtype, backend: str) -> None:
    computed = FLOAT64 if dtype == FLOAT64 else FLOAT32
    x, grad_y = gaussian(3, 5, length, dtype=dtype), gaussian(5, 3, length, dtype=dtype)
    grad_y = grad_y.reshape(x.shape)
    alpha = torch.tensor(ROW_ALPHAS, dtype=computed)[:, None]
    got = run_with_alphas(x, grad_y, alpha, backend)
    exact = exact_with_alphas(x, grad_y, alpha)
    if dtype in (BFLOAT16, FLOAT16):  # gradients are the formulas', at the output as it was rounded
        rounded = got[0].double()
        assert reference.error(rounded, exact[0]) <= (
            ROUNDING_FACTOR * reference.error(exact[0].to(dtype), exact[0])
            + FLOAT32_FLOOR * reference.norm(exact[0])
        )
        for row, one in enumerate(alpha[:, 0].tolist()):
            expected = reference.entmax_gradient(rounded[:, row], grad_y[:, row].double(), one)
            allowed = ROUNDING_FACTOR * reference.error(expected.to(dtype), expected)
            allowed += FLOAT32_FLOOR * reference.norm(grad_y.double())
            assert reference.error(got[1][:, row], expected) <= allowed
        assert reference.error(got[2], exact[2]) <= 0.02 * reference.norm(grad_y.double())
        return
    limits = tolerances(backend)[dtype]
    for one, expected, allowed in zip(
        got, exact, (limits.out, *2 * [limits.gradient]), strict=True
    ):
        floor = FLOAT32_FLOOR * (1.0 if dtype == FLOAT32 else 1e-8)
        assert reference.error(one, expected) <= allowed * reference.norm(expected) + floor


@on_every_backend
@interpreted()
def test_equal_alphas_are_as_a_number(backend: str) -> None:
    x, grad_y = gaussian(6, 50), gaussian(50, 6).T
    for alpha in (1.1, 1.5, 1.8, 2.0):
        number = run(x, grad_y, alpha, backend)
        one_for_all = run_with_alphas(x, grad_y, torch.tensor(alpha), backend)
        each = run_with_alphas(x, grad_y, torch.full((6,), alpha), backend)
        for index in range(2):
            assert torch.equal(one_for_all[index], each[index])
            if backend == "cpu" and alpha in (1.5, 2.0):  # the others are no float32
                assert torch.equal(number[index], each[index])
            else:
                assert reference.relative_error(number[index], each[index]) < 5e-6
        torch.testing.assert_close(one_for_all[2], each[2].sum(), rtol=1e-5, atol=1e-6)


@on_every_backend
@interpreted()
@pytest.mark.parametrize(
    ("shape", "dim"),
    [((), -1), ((1,), 0), ((2, 3), -1), ((2, 3, 1), -1), ((3, 1), -1), ((1, 3, 1), 2),
     ((2, 1, 1), -1), ((2, 7), 1), ((2, 1, 7), 1), ((1, 7), 1), ((7,), -2), ((3, 7), 0),
     ((1, 3, 7), -3), ((3, 1), 0)],
)  # fmt: skip
def test_alphas_broadcast(shape: tuple[int, ...], dim: int, backend: str) -> None:
    x, grad_y = gaussian(2, 3, 7), gaussian(3, 2, 7).reshape(2, 3, 7)
    count = math.prod(shape)
    alpha = torch.linspace(1.2, 1.9, count).reshape(shape)
    got = run_with_alphas(x, grad_y, alpha, backend, dim)
    rows = list(x.shape)
    rows[dim] = 1
    without = [n for index, n in enumerate(x.shape) if index != dim % 3]
    full = (alpha.unsqueeze(dim) if list(shape) == without else alpha).expand(rows)
    moved = run_with_alphas(
        x.movedim(dim, -1).contiguous(), grad_y.movedim(dim, -1).contiguous(),
        full.movedim(dim, -1).contiguous(), backend,
    )  # fmt: skip
    for one, other in zip(got[:2], moved[:2], strict=True):
        assert torch.equal(one, other.movedim(-1, dim))
    for index in range(count):  # its gradient is the sum of its rows'
        mark = torch.zeros(count)
        mark[index] = 1.0
        mark = mark.reshape(shape)
        mark = (mark.unsqueeze(dim) if list(shape) == without else mark).expand(rows)
        expected = (moved[2].movedim(-1, dim) * mark).sum()
        torch.testing.assert_close(got[2].flatten()[index], expected, rtol=1e-5, atol=1e-6)


@on_every_backend
@interpreted(layout="columns")
@pytest.mark.parametrize("layout", ["columns", "slice", "transposed", "expanded"])
def test_strides_with_alphas(layout: str, backend: str) -> None:
    base, of_base = gaussian(12, 12), torch.linspace(1.1, 2.0, 144).reshape(12, 12)
    x = {
        "columns": base[:, ::3],
        "slice": base[1:-1, 3:-5],
        "transposed": base.T,
        "expanded": base[:1].expand(12, 12),
    }[layout]
    alpha = of_base[: x.shape[0], 3]  # has a stride
    grad_y = torch.ones(()).expand(x.shape) + x
    got = run_with_alphas(x, grad_y, alpha, backend)
    expected = run_with_alphas(
        x.clone(memory_format=torch.contiguous_format), grad_y, alpha.contiguous(), backend
    )
    for one, other in zip(got, expected, strict=True):
        assert torch.equal(one, other)


@on_every_backend
@interpreted()
def test_special_entries_with_alphas(backend: str) -> None:
    inf, nan = math.inf, math.nan
    x = gaussian(12, 40)
    x[0, ::3] = -inf
    x[1] = -inf
    x[2, 7] = nan
    x[3, 8] = inf
    x[4, 1:] = -inf
    alpha = torch.tensor([1.3, 1.4, 1.5, 1.6, 1.7, 1.8, 1.0, 0.5, 2.5, nan, inf, -inf])
    y, of_x, of_alpha = run_with_alphas(x, torch.ones_like(x).cumsum(-1), alpha, backend)
    bad = torch.tensor([2, 3, 6, 7, 8, 9, 10, 11])
    for found in (y, of_x, of_alpha[:, None]):
        assert found[bad].isnan().all()
    good = [0, 1, 4, 5]
    exact = exact_with_alphas(x[good], torch.ones(4, 40).cumsum(-1), alpha[good, None])
    assert reference.relative_error(y[good], exact[0]) < 1e-5
    assert reference.relative_error(of_x[good], exact[1]) < 1e-4
    assert reference.relative_error(of_alpha[good], exact[2][:, 0]) < 1e-4
    assert (y[1] == 0.0).all()
    assert (of_x[1] == 0.0).all()
    assert of_alpha[1] == of_alpha[4] == 0.0
    assert y[4].tolist() == [1.0] + 39 * [0.0]


@pytest.mark.parametrize("shape", [(5,), (5, 1), (1,), ()])
@pytest.mark.parametrize("dim", [0, 1])
def test_gradcheck_with_alphas(dim: int, shape: tuple[int, ...]) -> None:
    x = (1.7 * gaussian(5, 6, dtype=FLOAT64)).movedim(-1, dim).requires_grad_()
    alpha = torch.linspace(1.15, 1.85, math.prod(shape), dtype=FLOAT64).reshape(shape)
    if shape == (5, 1) and dim == 0:
        alpha = alpha.T
    assert torch.autograd.gradcheck(
        lambda x, alpha: adasplash2.entmax(x, alpha, dim), [x, alpha.clone().requires_grad_()]
    )


def test_learned_alphas_are_as_in_the_package_entmax() -> None:
    import entmax

    x, grad_y = gaussian(2, 5, 30, dtype=FLOAT64), gaussian(5, 2, 30, dtype=FLOAT64)
    grad_y = grad_y.reshape(x.shape)
    alpha = torch.tensor([1.01, 1.2, 1.5, 1.8, 1.99], dtype=FLOAT64)[:, None]
    got = run_with_alphas(x, grad_y, alpha, "cpu")
    leaf, alphas = x.clone().requires_grad_(), alpha.clone().requires_grad_()
    y = entmax.entmax_bisect(leaf, alphas.expand(2, 5, 1), n_iter=100)
    theirs = y.detach(), *torch.autograd.grad(y, (leaf, alphas), grad_y)
    for one, other in zip(got, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("alpha", [1.0 + 2.0**-20, 1.0 + 2.0**-10, 1.01])
def test_gradient_of_alphas_next_to_softmax(alpha: float) -> None:
    """Where the formula's own terms grow without bound and cancel; the derivative of softmax's
    neighbours in alpha is known: by differences of the float64 reference."""
    x, grad_y = gaussian(4, 30, dtype=FLOAT64), gaussian(30, 4, dtype=FLOAT64).T
    step = 2.0**-22
    ends = (reference.entmax(x, alpha + sign * step) for sign in (1.0, -1.0))
    above, below = ((y * grad_y).sum() for y in ends)
    slope = (above - below) / (2.0 * step)
    for dtype, near in ((FLOAT64, 1e-6), (FLOAT32, 1e-5)):
        of_alpha = run_with_alphas(
            x.to(dtype), grad_y.to(dtype), torch.tensor(alpha, dtype=dtype), "cpu"
        )[2]
        torch.testing.assert_close(of_alpha.double(), slope, rtol=near, atol=near)


@pytest.mark.parametrize("in_dims", [(0, 0), (0, None), (None, 0), (1, 0), (None, 1)], ids=str)
def test_vmap_with_alphas(in_dims: tuple[int | None, int | None]) -> None:
    def one(x: Tensor, alpha: Tensor) -> Tensor:
        return adasplash2.entmax(x, alpha, 0)

    def squares(x: Tensor, alpha: Tensor) -> Tensor:
        return one(x, alpha).square().sum()

    x, alpha = gaussian(4, 4, 7), torch.linspace(1.1, 2.0, 28).reshape(4, 7)
    if in_dims[0] is None:
        x = x[0]
    if in_dims[1] is None:
        alpha = alpha[0]
    if in_dims[1] == 1:
        alpha = alpha.T
    pairs = [
        (
            x if in_dims[0] is None else x.select(in_dims[0], i),
            alpha if in_dims[1] is None else alpha.select(in_dims[1], i),
        )
        for i in range(4)
    ]
    mapped = torch.vmap(one, in_dims)(x, alpha)
    torch.testing.assert_close(mapped, torch.stack([one(*pair) for pair in pairs]))
    gradients = torch.func.grad(squares, (0, 1))
    expected = zip(*(gradients(*pair) for pair in pairs), strict=True)
    for found, each in zip(torch.vmap(gradients, in_dims)(x, alpha), expected, strict=True):
        torch.testing.assert_close(found, torch.stack(each))
    jacobian = torch.func.jacrev(one, 1)(*pairs[0])
    leaf = pairs[0][1].clone().requires_grad_()
    y = one(pairs[0][0], leaf)
    rows = [torch.autograd.grad(p, leaf, retain_graph=True)[0] for p in y.flatten()]
    torch.testing.assert_close(jacobian.flatten(0, 1), torch.stack(rows))


def test_vmap_with_one_alpha_for_each() -> None:
    """A number to the function that is mapped; nested, also where only the outer one maps it. What
    is not mapped stays a number, which may be above 2."""
    x, alpha = gaussian(4, 7), torch.linspace(1.1, 2.0, 4)
    expected = adasplash2.entmax(x, alpha)
    of_all = torch.stack([adasplash2.entmax(x, float(one)) for one in alpha])
    assert torch.equal(torch.vmap(adasplash2.entmax)(x, alpha), expected)
    assert torch.equal(torch.vmap(adasplash2.entmax, (None, 0))(x, alpha), of_all)
    rows = torch.vmap(adasplash2.entmax, (0, None))
    assert torch.equal(torch.vmap(rows, (None, 0))(x, alpha), of_all)

    def squares(x: Tensor, alpha: Tensor) -> Tensor:
        return adasplash2.entmax(x, alpha).square().sum()

    found = torch.vmap(torch.func.grad(squares))(x, alpha)
    assert torch.equal(found, torch.func.grad(lambda x: squares(x, alpha))(x))
    above = torch.tensor(3.0)
    assert torch.equal(rows(x, above), adasplash2.entmax(x, 3.0))
    assert torch.func.grad(squares)(x, above).isfinite().all()


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_with_alphas(dynamic: bool) -> None:
    torch._dynamo.reset()

    def layer(x: Tensor, alpha: Tensor) -> Tensor:
        return adasplash2.entmax(2.0 * x, alpha.sigmoid() + 1.0, 1) + 1.0

    compiled = torch.compile(layer, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for length in (7, 9):
        x = gaussian(3, length, 5).requires_grad_()
        alpha = gaussian(3, 5).requires_grad_()
        found = torch.autograd.grad(compiled(x, alpha).square().sum(), (x, alpha))
        expected = torch.autograd.grad(layer(x, alpha).square().sum(), (x, alpha))
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other)
        with torch.no_grad():
            assert torch.equal(compiled(x, alpha), layer(x, alpha))


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0, 0)])
def test_empty_with_alphas(shape: tuple[int, int]) -> None:
    x = torch.ones(shape, requires_grad=True)
    alpha = torch.full(shape[:1], 1.5, requires_grad=True)
    y = adasplash2.entmax(x, alpha)
    assert y.shape == shape
    of_x, of_alpha = torch.autograd.grad(y.sum(), (x, alpha))
    assert of_x.shape == shape
    assert torch.equal(of_alpha, torch.zeros(shape[:1]))


def test_only_what_is_asked_is_differentiated() -> None:
    x, alpha = gaussian(3, 9), torch.tensor([1.2, 1.5, 1.9])
    for asked in ((True, False), (False, True)):
        leaves = [t.clone().requires_grad_(want) for t, want in zip((x, alpha), asked, strict=True)]
        adasplash2.entmax(*leaves).square().sum().backward()
        assert tuple(leaf.grad is not None for leaf in leaves) == asked
    y = adasplash2.entmax(x, torch.tensor(1.3))  # is read as a number
    assert torch.equal(y, adasplash2.entmax(x, torch.tensor(1.3).item()))


def test_cuda_refuses_alphas_by_name() -> None:
    x = torch.empty(3, 9, device="meta")
    alphas = torch.empty(3, 1, device="meta")
    asked = row_problem(x, alpha=1.5, needs_grad=False, alphas=alphas)
    assert asked.alphas
    assert cuda.refusals_anywhere(asked) == ["alpha as a tensor is computed by other backends only"]
    assert "entmax of 3 rows of 9, alpha as a tensor" in dispatch.describe(asked)


@pytest.mark.parametrize(
    ("loss", "mapping"), [("Entmax15", "entmax15"), ("Sparsemax", "sparsemax")]
)
def test_losses_of_the_package_entmax_run_on_our_mappings(loss: str, mapping: str) -> None:
    from entmax import losses

    function: Any = getattr(losses, f"{loss}LossFunction")

    class Ours(function):  # type: ignore[misc]
        @classmethod
        def project(cls, X: Tensor, alpha: float, k: int | None = None) -> Tensor:  # noqa: N803
            found: Tensor = getattr(adasplash2, mapping)(X, dim=-1)
            return found

    torch.manual_seed(0)
    x, target = torch.randn(7, 50, dtype=torch.float64), torch.randint(50, (7,))
    results = []
    for one in (function, Ours):
        leaf = x.clone().requires_grad_()
        value = one.apply(leaf, target)
        results.append((value.detach(), *torch.autograd.grad(value.sum(), leaf)))
    torch.testing.assert_close(results[1], results[0])


@pytest.mark.parametrize("name", ["entmax15", "sparsemax"])
def test_losses_of_the_package_entmax_run_with_ours(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = pytest.importorskip("entmax.losses")
    loss = losses.Entmax15Loss if name == "entmax15" else losses.SparsemaxLoss
    x, target = torch.randn(5, 9, requires_grad=True), torch.randint(9, (5,))
    found = []
    for of in ("theirs", "ours"):
        if of == "ours":
            monkeypatch.setattr(losses, name, getattr(adasplash2, name))
        for k in (None, 2, 100):
            one = loss(k=k)(x, target)
            found.append((one, *torch.autograd.grad(one, x)))
    for one in found[1:]:
        for got, expected in zip(one, found[0], strict=True):
            torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(("k", "error"), [(0, ValueError), (1.5, TypeError), (True, TypeError)])
def test_k_is_a_count(k: Any, error: type[Exception]) -> None:
    for function in (adasplash2.entmax15, adasplash2.sparsemax):
        with pytest.raises(error, match=r"^k must be"):
            function(torch.randn(3, 4), k=k)
