"""Every backend against the float64 reference, on the table of cases."""

from __future__ import annotations

import math
from typing import NamedTuple

import pytest
import reference
import torch
from cases import (
    ALPHAS,
    BFLOAT16,
    CASES,
    DENSE_FACTOR,
    DENSE_ORDERS,
    FLOAT16,
    FLOAT32,
    FLOAT32_FLOOR,
    FLOAT64,
    ROUNDING_FACTOR,
    Case,
    Inputs,
    device_of,
    interpreted,
    named,
    tolerances,
    usable_backends,
)
from torch import Tensor

import adasplash2
from adasplash2.backends.triton.sizes import INTERPRETED

on_every_backend = pytest.mark.parametrize("backend", usable_backends())


TENSOR_CORE_FACTOR = 1.5
"""Tensor cores cut the sums of their products short, where a CPU rounds them, and take weights
rounded to 16 bits, as Triton's interpreter does."""


class Result(NamedTuple):
    out: Tensor
    gradients: reference.Gradients


def evaluate(inputs: Inputs, case: Case, dtype: torch.dtype) -> tuple[Result, Tensor]:
    """The reference's output and gradients, and its probabilities."""
    out, p, *_ = reference.attention(*inputs[:3], **case.options, dtype=dtype)
    gradients = reference.attention_gradients(*inputs, **case.options, dtype=dtype, p=p)
    return Result(out, gradients), p


def attend(inputs: Inputs, case: Case, backend: str) -> Tensor:
    """Skips with the backend's reasons where it refuses; the CPU must run everything."""
    try:
        return adasplash2.entmax_attention(
            *inputs[:3],
            **case.options,
            enable_gqa=case.heads_kv is not None,
            backend=backend,
        )
    except adasplash2.BackendRefused as refused:
        if backend == "cpu":
            raise
        pytest.skip(str(refused))


def run(inputs: Inputs, case: Case, backend: str) -> Result:
    leaves = [t.detach().requires_grad_() for t in inputs[:3]]
    out = attend(Inputs(*leaves, inputs.grad_out), case, backend)
    gradients = torch.autograd.grad(out, leaves, inputs.grad_out)
    return Result(out.detach(), reference.Gradients(*gradients))


def dense_float32(inputs: Inputs, case: Case) -> list[Result]:
    """What dense evaluation gives in float32, with the products in ``q . k`` summed in several
    orders: near the edge of the support a single one may be exact by luck."""
    query, key, value, grad_out = inputs
    generator = torch.Generator().manual_seed(0)
    results = []
    for _ in range(DENSE_ORDERS):
        order = torch.randperm(case.head_dim, generator=generator)
        moved = Inputs(query[..., order], key[..., order], value, grad_out)
        (out, gradients), _ = evaluate(moved, case, FLOAT32)
        back = order.argsort()
        gradients = gradients._replace(
            query=gradients.query[..., back], key=gradients.key[..., back]
        )
        results.append(Result(out, gradients))
    return results


def assert_close(
    what: str,
    case: Case,
    got: Tensor,
    exact: Tensor,
    magnitude: Tensor,
    kind: str,
    dense: list[Tensor],
    backend: str,
) -> None:
    """The one place that says how large an error may be.

    ``magnitude`` is what rounding errors are relative to, ``kind`` a field of ``Tolerance``,
    ``dense`` the dense float32 evaluations of an ill-conditioned case.
    """
    limits = tolerances(backend)
    if case.dtype in limits and case.well_conditioned:
        allowed = getattr(limits[case.dtype], kind) * reference.norm(exact)
    elif case.dtype == FLOAT64:
        allowed = getattr(limits[FLOAT64], kind) * reference.norm(magnitude)
    else:
        allowed = FLOAT32_FLOOR * reference.norm(magnitude)
        if case.dtype == FLOAT32:
            errors = [reference.error(one, exact) for one in dense]
            allowed = max(allowed, DENSE_FACTOR * max(errors))
        else:
            rounded = exact.to(case.dtype)
            allowed += ROUNDING_FACTOR * reference.error(rounded, exact)
    if (got.is_cuda or INTERPRETED) and case.dtype.itemsize == 2:
        allowed *= TENSOR_CORE_FACTOR
    error = reference.error(got, exact)
    assert error <= allowed, f"{what}: error {error:.2e}, allowed {allowed:.2e}"


def without_gradient_of_undecided_rows(inputs: Inputs, case: Case) -> None:
    """Sets ``grad_out`` to zero, in place, where there is no right gradient to agree with."""
    exact = reference.attention(*inputs[:3], **case.options)
    computed_in = FLOAT64 if case.dtype == FLOAT64 else FLOAT32
    undecided = reference.undecided_rows(exact.z, exact.tau, computed_in)
    assert undecided.double().mean() < 0.1
    inputs.grad_out[undecided] = 0.0


# What each reaches in the Triton backend, where others of the table do not.
REACHING = named(
    *("grid-float32-alpha1.5-causal", "grid-float32-alpha2-full", "grid-float32-alpha1.25-causal"),
    *("grid-float16-alpha1.5-causal", "grid-bfloat16-alpha1.5-full"),
    *("grid-float32-alpha3-causal", "ties-alpha2", "ties-alpha3"),
    *("lengths-1x200-full", "lengths-200x1-causal", "lengths-65x63-causal", "gqa-6to2-causal"),
    # Padded and narrow heads, two halves of `u` and `ds`.
    *("head_dim-1-float32", "head_dim-1-value-256-float16", "head_dim-17-value-33-float32"),
    "dominated-float16",
    *("scale-negative", "scale-zero", "layout-sliced-float32", "layout-inner_stride-bfloat16"),
    # Poisoned rows, and blocks that are done again with what is not finite kept apart.
    *("minus_infinity-alpha1.5", "nan_query-alpha1.5", "nan_key-alpha1.5", "nan_value-alpha2"),
    # Keys that have all of the probability, whose ``dp - delta`` large keys multiply.
    *("huge_negative-bfloat16", "local-alpha1.5"),
)


@on_every_backend
@interpreted(case=REACHING)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_agrees_with_the_reference(case: Case, backend: str) -> None:
    inputs = case.inputs(device_of(backend))
    if case.alpha > 2.0:
        without_gradient_of_undecided_rows(inputs, case)
    got = run(inputs, case, backend)
    assert got.out.dtype == case.dtype
    assert got.out.is_contiguous()

    exact, p = evaluate(inputs, case, FLOAT64)
    magnitude = Result(*reference.magnitudes(*inputs, p=p, alpha=case.alpha, scale=case.scale))
    ill_conditioned = case.dtype == FLOAT32 and not case.well_conditioned
    dense = dense_float32(inputs, case) if ill_conditioned else []
    assert_close("out", case, got.out, exact.out, magnitude.out, "out", [one.out for one in dense],
                 backend)  # fmt: skip
    for index, name in enumerate(reference.Gradients._fields):
        assert_close(
            f"gradient of {name}",
            case,
            got.gradients[index],
            exact.gradients[index],
            magnitude.gradients[index],
            "gradient",
            [one.gradients[index] for one in dense],
            backend,
        )
    for gradient, tensor in zip(got.gradients, inputs[:3], strict=True):
        assert gradient.dtype == tensor.dtype

    with torch.no_grad():
        without_gradient = attend(inputs, case, backend)
    if case.length_q <= MOST_DECODED:  # may be computed otherwise
        assert_close("out without gradients", case, without_gradient, exact.out, magnitude.out,
                     "out", [one.out for one in dense], backend)  # fmt: skip
    else:
        torch.testing.assert_close(without_gradient, got.out, rtol=0, atol=0, equal_nan=True)


def probabilities(inputs: Inputs, case: Case, backend: str) -> Tensor:
    """``p`` of every key, exactly as computed: values that are rows of the identity, a window of
    keys at a time."""
    query, key, value, _ = inputs
    length, width = key.shape[2], min(256, key.shape[2])
    identity = torch.eye(length, dtype=case.dtype, device=query.device)
    windows = [
        attend(Inputs(query, key, window.expand(*value.shape[:3], -1), query), case, backend)
        for window in identity.split(width, dim=1)
    ]
    return torch.cat(windows, dim=-1)


MOST_DECODED = 16
"""Queries up to which backends may read keys as generation does."""


SUM_CASES = [
    case
    for case in CASES
    if case.dtype in (FLOAT32, FLOAT64)
    and (case.is_finite or case.data == "minus_infinity")
    and case.layout == "contiguous"
]


@on_every_backend
@pytest.mark.parametrize("case", SUM_CASES, ids=lambda case: case.name)
def test_probabilities_sum_to_one(case: Case, backend: str) -> None:
    inputs = case.inputs(device_of(backend))
    p = probabilities(inputs, case, backend).double()
    assert (p >= 0.0).all()
    z = reference.attention(*inputs[:3], **case.options).z
    expected = (z > -math.inf).any(dim=-1).double()  # a row without keys has no mass
    tolerance = 1e-6 if case.dtype == FLOAT32 else 1e-14
    if backend != "cpu":  # sums of thousands of terms without compensation
        tolerance = 1e-5
    assert (p.sum(dim=-1) - expected).abs().max() <= tolerance
    assert (p[z == -math.inf] == 0.0).all()


# What poisons a row, and whom it reaches.

POISONED = [
    Case("list", length_k=200, heads_q=2),
    Case("list-causal", length_k=200, is_causal=True, batch=2),
    Case("flat", length_k=1500, sharpness=0.01),
    Case("flat-causal", length_q=1300, length_k=1300, sharpness=0.01, is_causal=True),
    Case("flat-bfloat16", length_k=1500, sharpness=0.01, head_dim=64, dtype=BFLOAT16),
    Case("flat-wide-bfloat16", length_k=1500, sharpness=0.01, head_dim=128, dtype=BFLOAT16),
    Case("mixed", length_k=1500, data="mixed"),
    Case("flat-alpha2", length_k=2100, sharpness=1e-3, alpha=2.0),
    Case("flat-wide", length_k=2100, sharpness=1e-3, alpha=2.0, head_dim=128),
    Case("list-bfloat16", length_k=200, dtype=BFLOAT16),
    Case("list-alpha1.25", length_k=200, alpha=1.25, head_dim=3),
]


def assert_unchanged(what: str, got: Tensor, clean: Tensor, rows: Tensor) -> None:
    """At ``rows`` ``(batch, heads, length)``: bitwise on the CPU. On a GPU neighbours share the
    choice between lists and tiles, whose roundings differ."""
    tolerance = 0.0 if got.device.type == "cpu" else 1e-2 if got.dtype.itemsize == 2 else 1e-4
    size = clean.nan_to_num(0.0, 0.0, 0.0).abs().amax()
    same = ((got - clean).abs() <= tolerance * size).all(dim=-1).cpu()
    changed = (~same & rows).sum().item()
    assert changed == 0, f"{what}: {changed} of {rows.sum().item()} rows changed"


@on_every_backend
@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("case", POISONED, ids=lambda case: case.name)
def test_a_bad_query_reaches_its_row_alone(case: Case, poison: float, backend: str) -> None:
    inputs = case.inputs(device_of(backend))
    clean = run(inputs, case, backend)
    row = case.length_q - 3
    inputs.query[:, 0, row, 0] = poison
    got = run(inputs, case, backend)

    others = torch.ones(inputs.query.shape[:3], dtype=torch.bool)
    others[:, 0, row] = False
    assert_unchanged("out", got.out, clean.out, others)
    before, after = clean.gradients.query, got.gradients.query
    assert_unchanged("gradient of query", after, before, others)
    assert got.out[~others.to(got.out.device)].isnan().all()
    assert got.gradients.query[~others.to(got.out.device)].isnan().all()
    # Keys that the row may see get NaN gradients, as in SDPA; no other key does.
    unseen = torch.ones(inputs.key.shape[:3], dtype=torch.bool)
    unseen[:, 0, : row + 1 if case.is_causal else None] = False
    for gradient, before in zip(got.gradients[1:], clean.gradients[1:], strict=True):
        assert_unchanged("gradient of key or value", gradient, before, unseen)
        assert gradient[~unseen.to(gradient.device)].isnan().all()


@on_every_backend
@pytest.mark.parametrize("case", POISONED, ids=lambda case: case.name)
def test_a_bad_key_reaches_the_rows_that_may_see_it(case: Case, backend: str) -> None:
    inputs = case.inputs(device_of(backend))
    clean = run(inputs, case, backend)
    column = 70
    inputs.key[:, 0, column, -1] = math.nan
    got = run(inputs, case, backend)
    blind = torch.ones(inputs.query.shape[:3], dtype=torch.bool)
    blind[:, 0, column if case.is_causal else 0 :] = False
    assert_unchanged("out", got.out, clean.out, blind)
    before, after = clean.gradients.query, got.gradients.query
    assert_unchanged("gradient of query", after, before, blind)
    assert got.out[~blind.to(got.out.device)].isnan().all()


@on_every_backend
@pytest.mark.parametrize("poison", [math.nan, math.inf])
@pytest.mark.parametrize("case", POISONED, ids=lambda case: case.name)
def test_a_bad_value_reaches_the_rows_that_keep_it(case: Case, poison: float, backend: str) -> None:
    inputs = case.inputs(device_of(backend))
    p = probabilities(inputs, case, backend)[:, 0]
    kept_by = (p > 0.0).double().mean(dim=(0, 1))
    # The key that is nearest to being kept by half of the rows.
    column = int((kept_by - 0.5).abs().argmin())
    clean = run(inputs, case, backend)
    inputs.value[:, 0, column, -1] = poison
    got = run(inputs, case, backend)
    untouched = torch.ones(inputs.query.shape[:3], dtype=torch.bool)
    untouched[:, 0] = (p[..., column] == 0.0).cpu()
    assert not untouched.all()
    assert_unchanged("out", got.out, clean.out, untouched)
    before, after = clean.gradients.query, got.gradients.query
    assert_unchanged("gradient of query", after, before, untouched)
    assert not got.out[~untouched.to(got.out.device)][:, -1].isfinite().any()
    assert got.out[~untouched.to(got.out.device)][:, :-1].isfinite().all()


# Gradients that the reference does not know of.


def edge_distance(inputs: Inputs, case: Case) -> float:
    """How far the nearest score is from its row's threshold, where the gradient has a kink."""
    exact = reference.attention(*inputs[:3], **case.options)
    distance = (exact.z - exact.tau.unsqueeze(-1)).abs()
    return distance[exact.z > -math.inf].min().item()


@on_every_backend
@pytest.mark.parametrize("alpha", [1.25, 1.5, 2.0, 3.0])
@pytest.mark.parametrize(
    "case",
    [
        Case("full", length_q=5, length_k=6, head_dim=3),
        Case("causal", length_q=6, length_k=6, head_dim=3, head_dim_v=2, is_causal=True),
        Case("causal-short-keys", length_q=7, length_k=4, head_dim=2, is_causal=True),
        Case("causal-long-keys", length_q=4, length_k=7, head_dim=2, is_causal=True),
        Case("gqa", length_q=4, length_k=5, head_dim=3, heads_q=4, heads_kv=2, batch=2),
        Case("scale", length_q=5, length_k=5, head_dim=4, scale=0.9),
    ],
    ids=lambda case: case.name,
)
def test_gradcheck(case: Case, alpha: float, backend: str) -> None:
    case = Case(**{**vars(case), "alpha": alpha, "dtype": FLOAT64})
    # Queries are scaled until no score is near a threshold, where finite differences are wrong.
    inputs = case.inputs(device_of(backend))
    for factor in torch.linspace(1.0, 3.0, 400).tolist():
        moved = inputs._replace(query=factor * inputs.query)
        if edge_distance(Inputs(*(t.cpu() for t in moved)), case) > 2e-3:
            break
    else:
        pytest.fail("no factor keeps the scores away from the thresholds")

    leaves = [t.detach().requires_grad_() for t in moved[:3]]
    attend(Inputs(*leaves, moved.grad_out), case, backend)  # skips where refused
    assert torch.autograd.gradcheck(
        lambda *leaves: attend(Inputs(*leaves, moved.grad_out), case, backend), leaves
    )


@on_every_backend
@interpreted(wanted="query")
@pytest.mark.parametrize("wanted", ["query", "key", "value"])
def test_gradient_of_one_input_alone(wanted: str, backend: str) -> None:
    case = Case("one", is_causal=True)
    inputs = case.inputs(device_of(backend))
    expected = getattr(run(inputs, case, backend).gradients, wanted)
    leaf = getattr(inputs, wanted).detach().requires_grad_()
    out = attend(inputs._replace(**{wanted: leaf}), case, backend)
    (got,) = torch.autograd.grad(out, [leaf], inputs.grad_out)
    assert torch.equal(got, expected)


@on_every_backend
@interpreted(layout=("transposed", "inner_stride"))
@pytest.mark.parametrize("layout", ["transposed", "expanded", "inner_stride"])
def test_strided_output_gradient(layout: str, backend: str) -> None:
    """What arrives from autograd has any strides: a sum's gradient is one number, expanded."""
    case = Case("strided", length_q=70, head_dim=24)
    inputs = case.inputs(device_of(backend))
    grad_out = inputs.grad_out
    strided = {
        "transposed": grad_out.mT.contiguous().mT,
        "expanded": grad_out[:, :, :1, :1].expand(grad_out.shape),
        "inner_stride": torch.stack((grad_out, grad_out), dim=-1)[..., 0],
    }[layout]
    got = run(inputs._replace(grad_out=strided), case, backend).gradients
    expected = run(inputs._replace(grad_out=strided.contiguous()), case, backend).gradients
    for one, other in zip(got, expected, strict=True):
        assert torch.equal(one, other)


def shifted(tensor: Tensor) -> Tensor:
    """A copy that starts an element behind where an allocation does."""
    return torch.cat((tensor.new_zeros(1), tensor.flatten()))[1:].view_as(tensor)


@on_every_backend
@interpreted(sharpness=8.0)
@pytest.mark.parametrize("sharpness", [0.1, 8.0])
@pytest.mark.parametrize("lie", ["forward", "backward", "gradient"])
def test_tensors_may_lie_elsewhere_in_the_backward(
    lie: str, sharpness: float, backend: str
) -> None:
    """What is saved may come back at another address (hooks, offloading), and the output's gradient
    may lie anywhere: whichever kernels ran, the backward finds what they left. Rows that keep most
    keys, and rows that keep few."""
    device = device_of(backend)
    length = 600 if device == "cuda" else 80
    case = Case("moved", length_q=length, length_k=length, head_dim=64, dtype=BFLOAT16)
    generator = torch.Generator().manual_seed(0)
    made = (torch.randn(1, 2, length, 64, generator=generator) for _ in range(4))
    query, key, value, grad = (x.to(device, BFLOAT16) for x in made)
    inputs = Inputs(sharpness * query, key, value, grad)
    placed = [shifted(x) if lie == "forward" else x.clone() for x in inputs[:3]]
    leaves = [x.requires_grad_() for x in placed]
    back = shifted if lie == "backward" else torch.clone
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x, back):
        out = attend(Inputs(*leaves, grad), case, backend)
        found = torch.autograd.grad(out, leaves, shifted(grad) if lie == "gradient" else grad)
    exact, dense = (evaluate(inputs, case, dtype)[0].gradients for dtype in (FLOAT64, BFLOAT16))
    for got, wanted, rounded in zip(found, exact, dense, strict=True):
        limit = 2.0 * reference.relative_error(rounded, wanted)
        assert reference.relative_error(got, wanted) <= limit


@on_every_backend
@interpreted(dtype=FLOAT16)
@pytest.mark.parametrize("alpha", [1.5, 2.0])
@pytest.mark.parametrize("dtype", [FLOAT16, BFLOAT16])
def test_results_are_rounded_to_even(
    dtype: torch.dtype, alpha: float, backend: str, request: pytest.FixtureRequest
) -> None:
    """Two equal keys: the mean of neighbours is a tie, that of the largest numbers is no infinity.
    (The interpreter computes bfloat16 in float32: there a GPU alone can show it.)"""
    if backend == "triton" and alpha == 1.5:
        reason = "the weights are rounded to 16 bits before they are multiplied, their sum is not"
        request.applymarker(pytest.mark.xfail(strict=INTERPRETED, reason=reason))
    one, two = torch.finfo(dtype).eps, 2.0 * torch.finfo(dtype).eps
    largest = torch.finfo(dtype).max if dtype == FLOAT16 else 2.0**127
    values = [[1.0, 1.0 + one, largest], [1.0 + one, 1.0 + two, largest]]
    value = torch.tensor(values, dtype=dtype, device=device_of(backend)).view(1, 1, 2, 3)
    query, key = torch.ones_like(value[..., :1, :1]), torch.ones_like(value[..., :1])
    out = adasplash2.entmax_attention(query, key, value, alpha=alpha, backend=backend)
    assert out.flatten().double().tolist() == [1.0, 1.0 + two, largest]


# Statistics.


def stats(inputs: Inputs, case: Case, backend: str) -> adasplash2.AttentionStats:
    try:
        return adasplash2.attention_stats(
            *inputs[:3], **case.options, enable_gqa=case.heads_kv is not None, backend=backend
        )
    except adasplash2.BackendRefused as refused:
        if backend == "cpu":
            raise
        pytest.skip(str(refused))


STATS_CASES = [
    Case(f"{name}-alpha{alpha:g}", alpha=alpha, **shape)
    for alpha in ALPHAS
    for name, shape in {
        "full": {"length_q": 130, "length_k": 200},
        "causal": {"length_q": 200, "length_k": 200, "is_causal": True, "sharpness": 4.0},
        "gqa": {"length_q": 65, "length_k": 129, "heads_q": 6, "heads_kv": 2, "batch": 2},
        "causal-wide": {"length_q": 70, "length_k": 300, "is_causal": True},
        "causal-tall": {"length_q": 300, "length_k": 70, "is_causal": True, "sharpness": 4.0},
        "local": {"length_q": 300, "length_k": 270, "data": "local"},
        "local-causal": {"length_q": 200, "length_k": 300, "data": "local", "is_causal": True},
        "flat": {"length_q": 9, "length_k": 1500, "sharpness": 1e-3},
        "minus-infinity": {"data": "minus_infinity", "is_causal": True},
    }.items()
]


@on_every_backend
@interpreted(case=tuple(c for c in STATS_CASES if c.name == "local-causal-alpha1.5"), dtype=FLOAT32)
@pytest.mark.parametrize("dtype", [FLOAT64, FLOAT32, BFLOAT16, FLOAT16])
@pytest.mark.parametrize("case", STATS_CASES, ids=lambda case: case.name)
def test_stats_agree_with_the_reference(case: Case, dtype: torch.dtype, backend: str) -> None:
    case = Case(**{**vars(case), "dtype": dtype})
    inputs = case.inputs(device_of(backend))
    got = stats(inputs, case, backend)
    exact = reference.attention(*inputs[:3], **case.options)
    rows = exact.tau.shape
    assert got.backend == backend
    assert got.tau.shape == got.support.shape == got.iterations.shape == rows
    assert got.tau.dtype == (FLOAT64 if dtype == FLOAT64 else FLOAT32)
    assert got.support.dtype == got.iterations.dtype == torch.int32
    assert got.empty_tiles.shape == rows[:2]
    assert got.empty_tiles.dtype == FLOAT64

    tau, support = got.tau.double(), got.support
    size = exact.z[exact.z > -math.inf].abs().max().item()
    near = 1e-13 if dtype == FLOAT64 else 2e-6
    if backend == "cpu":
        near = 8.0 * torch.finfo(got.tau.dtype).eps
    near *= max(1.0, size)
    assert reference.error(tau, exact.tau) < math.inf  # +inf for rows without keys, as there
    found = exact.tau.isfinite()
    assert ((tau - exact.tau)[found].abs() <= near).all()
    # A score that rounding may put on either side of tau counts either way, and so does one
    # whose probability float32 may not hold.
    distance = exact.z - exact.tau.unsqueeze(-1)
    vanishing = torch.finfo(got.tau.dtype).tiny ** (case.alpha - 1.0)
    assert (support >= (distance > near + vanishing).sum(dim=-1)).all()
    assert (support <= (distance > -near).sum(dim=-1)).all()
    if dtype == FLOAT64:
        assert torch.equal(support, (exact.probabilities > 0.0).sum(dim=-1).int())
        empty = reference.empty_tiles(exact.probabilities, case.is_causal)
        torch.testing.assert_close(got.empty_tiles, empty, rtol=0, atol=1e-12)


@on_every_backend
def test_stats_find_empty_tiles(backend: str) -> None:
    """The comparison above means something: some cases have empty tiles, others none."""
    shares = {
        case.name: stats(case.inputs(device_of(backend)), case, backend).empty_tiles.mean().item()
        for case in STATS_CASES
    }
    assert shares["local-alpha1.5"] == pytest.approx(1.0 - 5 / 25)
    assert shares["local-causal-alpha1.5"] == pytest.approx(1.0 - 4 / 10)
    assert shares["flat-alpha1.5"] == 0.0


@on_every_backend
@pytest.mark.parametrize("alpha", [1.5, 2.0])
@pytest.mark.parametrize("length", [512, 2048])
@pytest.mark.parametrize("is_causal", [False, True])
def test_the_histogram_starts_close(
    is_causal: bool, length: int, alpha: float, backend: str
) -> None:
    """At most two refinement steps a row on average, on Gaussian scores."""
    case = Case("iterations", length_q=length, length_k=length, head_dim=64, alpha=alpha,
                is_causal=is_causal)  # fmt: skip
    iterations = stats(case.inputs(device_of(backend)), case, backend).iterations
    assert iterations.min() >= 1
    # The GPU starts from the running bound instead of a histogram: a step or so more.
    assert iterations.double().mean() <= (2.0 if backend == "cpu" else 3.5)


MOST_STEPS = {1.1: 5, 1.25: 4, 1.5: 3, 1.75: 5, 2.0: 3}
"""Of a row on the CPU; one less is what these cases take."""


@on_every_backend
@interpreted(alpha=1.5)
@pytest.mark.parametrize("alpha", ALPHAS)
def test_iterations_are_bounded(alpha: float, backend: str) -> None:
    """Bisection guards every row: none circles, also where Newton would. The CPU starts from a
    histogram. Above alpha = 2 a key next to the threshold takes many steps, and no more than these.
    """
    most = 50 if alpha > 2.0 else MOST_STEPS[alpha] if backend == "cpu" else 12
    for sharpness in (1e-3, 1.0, 30.0, 1e3):
        case = Case("bounded", alpha=alpha, sharpness=sharpness, length_k=300)
        iterations = stats(case.inputs(device_of(backend)), case, backend).iterations
        assert iterations.min() >= 1
        assert iterations.max() <= most


@on_every_backend
@interpreted()
@pytest.mark.parametrize("alpha", [1.75, 2.0])
def test_rounding_ends_steps(alpha: float, backend: str) -> None:
    """Where the sum of 16-bit rows cannot come as close to one as is asked."""
    case = Case("rounding", length_k=1024, head_dim=64, alpha=alpha, dtype=BFLOAT16)
    assert stats(case.inputs(device_of(backend)), case, backend).iterations.max() <= 12


@pytest.mark.parametrize("alpha", [1.25, 1.5, 2.0])
def test_equal_scores_take_few_steps(alpha: float) -> None:
    """Also where the histogram's edge is the threshold: rows of 1 to 60 scores of zero."""
    zeros = torch.zeros(1, 1, 60, 1)
    got = adasplash2.attention_stats(
        zeros, zeros, zeros, alpha=alpha, is_causal=True, backend="cpu"
    )
    count = torch.arange(1, 61)
    assert got.iterations.max() <= 4
    exact = -(count.double() ** (1.0 - alpha))
    assert ((got.tau[0, 0] - exact).abs() <= 4.0 * FLOAT32_FLOOR * exact.abs()).all()
