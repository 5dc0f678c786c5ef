"""Masks, windows, lengths, slopes, caps, sinks, scales and alphas by head, dropout: what the
``cpu`` backend makes of them, alone and together, against dense float64."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import pytest
import reference
import torch
from torch import Tensor

from adasplash2 import _core, dense
from adasplash2.backends import cpu
from adasplash2.contract import Gradients
from adasplash2.problem import DIFFERENTIABLE, Inputs, Problem, attention_problem, compute_dtype

FLOAT32, FLOAT64 = torch.float32, torch.float64

TOLERANCES = {FLOAT32: 1e-5, FLOAT64: 1e-12, torch.bfloat16: 6e-3, torch.float16: 8e-4}


class Shape(NamedTuple):
    batch: int = 2
    heads_q: int = 4
    heads_kv: int = 2
    length_q: int = 77
    length_k: int = 131
    head_dim: int = 20
    head_dim_v: int = 12


FLAT = Shape(1, 2, 1, 70, 700, 16, 24)
"""Rows keep more keys than a list may have."""


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(3)


def features(shape: Shape, dtype: torch.dtype, names: tuple[str, ...]) -> dict[str, Any]:
    """Operands and options by name; the same whatever else is asked."""
    g = generator()
    compute = compute_dtype(dtype)
    b, h, n, m = shape.batch, shape.heads_q, shape.length_q, shape.length_k

    def uniform(*size: int, low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(size, generator=g, dtype=FLOAT64)

    rows = torch.arange(n)
    first = (rows * (m // 2)) // n
    ranges = torch.stack([first, (first + 1 + m // 2).clamp(max=m), rows + 5]).int()
    ranges = torch.stack([ranges, ranges + torch.tensor([0, -3, 2])[:, None].int()], dim=1)
    ranges[:, :, -3:] = m  # see nothing
    bools = torch.rand((b, h, n, m), generator=g) < 0.4
    bools[:, :, 5] = False
    bools[:, :, :, 40:110] = False
    bias = uniform(b, h, n, m, low=-2.0, high=2.0)
    bias[:, :, 7] = -math.inf
    bias[:, :, ::3, 48:96] = -math.inf
    bias[..., 60:64] = -math.inf
    slopes = uniform(b, h, low=0.001, high=0.03)
    slopes[:, -1] = 2.0
    slopes[:, 1] = 0.0
    across = bias.mT.contiguous().mT
    found: dict[str, dict[str, Any]] = {
        "causal": {"is_causal": True},
        "bottom-right": {"is_causal": True, "causal_align": "bottom-right"},
        "window": {"window_left": 9, "window_right": 20},
        "left": {"window_left": 30, "is_causal": True, "causal_align": "bottom-right"},
        "ranges": {"ranges": ranges[:, :b]},
        "bool": {"attn_mask": bools},
        "bool rows": {"attn_mask": bools[:, :1, :1]},
        "bias": {"attn_mask": bias.to(dtype)},
        "bias32": {"attn_mask": bias[:1].float()},
        "bias keys": {"attn_mask": bias[:, :, :1].to(dtype)},
        "bias rows": {"attn_mask": bias[:1, :1, :, :1].nan_to_num(0, 0, 0).to(dtype)},
        "bias of all": {"attn_mask": bias[:1, :1, :1].to(dtype)},
        "bias across": {"attn_mask": across[:, :1].to(dtype)},
        "softcap": {"softcap": 0.8},
        "slopes": {"alibi_slopes": slopes.to(compute)},
        "slopes of heads": {"alibi_slopes": slopes[:1].to(compute)},
        "scales": {"scales": uniform(b, h, n, low=-0.2, high=0.6).to(compute)},
        "sinks": {"sinks": uniform(1, h, low=-0.5, high=2.0).to(compute)},
        "alphas": {"alphas": torch.tensor([[1.5, 2.0, 1.25, 1.8][:h]], dtype=compute)},
        "alphas near 1": {"alphas": torch.tensor([[1.001, 1.0625, 1.9, 1.1][:h]], dtype=compute)},
        "dropout": {"dropout_p": 0.3, "dropout_seed": torch.tensor([-(2**61) - 12345])},
        "alpha": {"alpha": 1.3},
    }  # fmt: skip
    asked: dict[str, Any] = {}
    for name in names:
        asked |= found[name]
    return asked


def philox(seed: int, shape: Shape, dropped_below: int) -> Tensor:
    """Whether a probability is kept, as in the paper."""
    b, h, n, m = shape.batch, shape.heads_q, shape.length_q, shape.length_k
    keys = torch.arange(m)
    counters = [
        keys.expand(b, h, n, m),
        torch.arange(n)[:, None].expand(b, h, n, m),
        torch.arange(b * h).view(b, h, 1, 1).expand(b, h, n, m),
        torch.zeros((b, h, n, m), dtype=torch.int64),
    ]
    word = 2**32 - 1
    k0, k1 = seed & word, (seed >> 32) & word

    def product(x: Tensor, factor: int) -> tuple[Tensor, Tensor]:
        low, high = x * (factor & 0xFFFF), x * (factor >> 16)  # both below 2^48
        total = low + ((high & 0xFFFF) << 16)
        return ((high >> 16) + (total >> 32)) & word, total & word

    for _ in range(10):
        high0, low0 = product(counters[0], 0xD2511F53)
        high1, low1 = product(counters[2], 0xCD9E8D57)
        counters = [high1 ^ counters[1] ^ k0, low1, high0 ^ counters[3] ^ k1, low0]
        k0, k1 = (k0 + 0x9E3779B9) & word, (k1 + 0xBB67AE85) & word
    return counters[0] >= dropped_below


class Expected(NamedTuple):
    out: Tensor
    tau: Tensor
    support: Tensor
    grads: dict[str, Tensor]


def expected(problem: Problem, inputs: Inputs, grad_out: Tensor) -> Expected:
    """Dense, in float64; gradients of all that has one but ``alphas``."""
    leaves: dict[str, Tensor] = {}
    doubles = {}
    for name, t in inputs._asdict().items():
        doubles[name] = t
        if t is not None and t.is_floating_point():
            doubles[name] = t.detach().double()
            if name in (*DIFFERENTIABLE, "query", "key", "value"):
                leaves[name] = doubles[name].requires_grad_()
    given = Inputs(**doubles)
    b, h, n, m = problem.batch, problem.heads_q, problem.length_q, problem.length_k
    s = dense.scores(problem, given, FLOAT64)
    hidden = s == -math.inf
    sink = torch.full((b, h, n, 1), -math.inf, dtype=FLOAT64)
    if given.sinks is not None:
        sink = given.sinks[:, :, None, None].expand(b, h, n, 1)
    s = torch.cat([s, sink], dim=3)
    alphas = torch.full((b, h), problem.alpha, dtype=FLOAT64)
    if given.alphas is not None:
        alphas = given.alphas.detach().expand(b, h)
    keep = torch.ones(b, h, n, m, dtype=FLOAT64)
    if inputs.dropout_seed is not None:
        p_drop = problem.scores.dropout_p
        keep = philox(
            int(inputs.dropout_seed), Shape(b, h, 1, n, m), int(p_drop * 2**32)
        ).double() / (1 - p_drop)  # fmt: skip
    value = given.value.repeat_interleave(problem.group_size, dim=1)
    p, tau, ds = torch.empty_like(s), torch.empty(b, h, n, dtype=FLOAT64), torch.empty_like(s)
    dp = torch.cat([keep * (grad_out.double() @ value.detach().mT), torch.zeros(b, h, n, 1)], dim=3)
    for i in range(b):
        for j in range(h):
            alpha = alphas[i, j].item()
            p[i, j], tau[i, j] = reference.entmax_and_tau(s[i, j].detach(), alpha)
            ds[i, j] = reference.entmax_gradient(p[i, j], dp[i, j], alpha)
    p, ds = p.detach(), torch.where(torch.cat([hidden, sink == -math.inf], 3), 0.0, ds)
    out = (keep * p[..., :m]) @ value
    out.backward(grad_out.double())
    torch.where(s == -math.inf, 0.0, s).backward(ds)
    grads = {name: t.grad for name, t in leaves.items() if t.grad is not None}
    return Expected(out.detach(), tau, (p[..., :m] > 0).sum(dim=3), grads)


def made(
    shape: Shape, dtype: torch.dtype, sharpness: float, asked: dict[str, Any]
) -> tuple[Problem, Inputs, Tensor]:
    g = generator()

    def gaussian(heads: int, length: int, width: int) -> Tensor:
        size = (shape.batch, heads, length, width)
        return torch.randn(size, generator=g, dtype=FLOAT64).to(dtype)

    query = sharpness * gaussian(shape.heads_q, shape.length_q, shape.head_dim)
    key = gaussian(shape.heads_kv, shape.length_k, shape.head_dim)
    value = gaussian(shape.heads_kv, shape.length_k, shape.head_dim_v)
    grad_out = gaussian(shape.heads_q, shape.length_q, shape.head_dim_v)
    operands = {name: t for name, t in asked.items() if name in Inputs._fields}
    options = {name: t for name, t in asked.items() if name not in Inputs._fields}
    options.setdefault("scale", None)
    inputs = Inputs(query, key, value, **operands)
    return attention_problem(inputs, needs_grad=True, enable_gqa=True, **options), inputs, grad_out


def run(problem: Problem, inputs: Inputs, grad_out: Tensor) -> tuple[Tensor, Tensor, Gradients]:
    assert cpu.refusals(problem) == []
    config = cpu.configs(problem)[0]
    forward = cpu.forward(problem, inputs, config)
    wanted = [
        name for name in DIFFERENTIABLE
        if (t := getattr(inputs, name)) is not None and t.is_floating_point()
    ]  # fmt: skip
    grads = cpu.backward(problem, inputs, forward, grad_out, config, wanted)
    return forward.out, forward.tau, grads


def flat(found: tuple[Tensor, Tensor, Gradients]) -> list[Tensor]:
    return [*found[:2], *(grad for grad in found[2] if grad is not None)]


def summed(name: str, grad: Tensor, operand: Tensor) -> Tensor:
    if name in ("query", "key", "value", "attn_mask"):
        return grad
    grad = grad.double()
    return (grad if name == "scales" else grad.sum(dim=2)).sum_to_size(operand.shape)


def check(shape: Shape, dtype: torch.dtype, sharpness: float, names: tuple[str, ...]) -> None:
    problem, inputs, grad_out = made(shape, dtype, sharpness, features(shape, dtype, names))
    out, tau, grads = run(problem, inputs, grad_out)
    want = expected(problem, inputs, grad_out)
    tolerance = TOLERANCES[dtype]
    assert reference.relative_error(out, want.out) < tolerance
    assert reference.relative_error(tau, want.tau) < min(tolerance, 1e-5)
    for name, grad in want.grads.items():
        got = summed(name, getattr(grads, name), getattr(inputs, name))
        # What sums to nothing over keys is judged by what is summed.
        size = reference.norm(grad)
        if name == "attn_mask" and grad.shape[3] == 1:
            size = max(size, reference.norm(want.grads["query"]))
        assert got.shape == grad.shape
        assert reference.error(got, grad) <= 10 * tolerance * size, (name, size)
    stats = cpu.stats(problem, inputs, cpu.configs(problem)[0])
    if dtype == FLOAT64:
        assert torch.equal(stats.support.long(), want.support)


ALONE = (
    "causal", "bottom-right", "window", "left", "ranges", "bool", "bool rows", "bias", "bias32",
    "bias keys", "bias rows", "bias of all", "bias across", "softcap", "slopes", "slopes of heads",
    "scales", "sinks", "alphas", "alphas near 1", "dropout",
)  # fmt: skip

TOGETHER = [("softcap", "scales"), ("bias", "softcap", "slopes"), ("bool", "slopes", "window"),
            ("ranges", "slopes of heads", "sinks"), ("alphas", "sinks", "scales", "softcap"),
            ("dropout", "sinks", "bias keys"), ("dropout", "alphas", "ranges"),
            ("alpha", "slopes", "softcap", "left"), ("alpha", "bias", "sinks", "dropout"),
            ("bool rows", "sinks", "alphas"), ("bias rows", "sinks")]  # fmt: skip


@pytest.mark.parametrize("names", [(name,) for name in ALONE] + TOGETHER, ids="+".join)
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_lists(names: tuple[str, ...], dtype: torch.dtype) -> None:
    check(Shape(), dtype, 1.0, names)


@pytest.mark.parametrize("sharpness", [0.01, 0.6])
@pytest.mark.parametrize("names", [(name,) for name in ALONE] + TOGETHER, ids="+".join)
@pytest.mark.parametrize("dtype", [FLOAT32, FLOAT64], ids=str)
def test_flat_rows(names: tuple[str, ...], dtype: torch.dtype, sharpness: float) -> None:
    check(FLAT, dtype, sharpness, names)


@pytest.mark.parametrize(
    ("shape", "sharpness"), [(Shape(), 1.0), (FLAT, 0.1)], ids=["lists", "flat"]
)
@pytest.mark.parametrize("names", [("alphas",), ("alphas near 1",), ("alphas", "sinks", "bool"),
                                   ("alphas", "dropout", "softcap")], ids="+".join)  # fmt: skip
@pytest.mark.parametrize("dtype", [FLOAT32, FLOAT64], ids=str)
def test_gradient_of_alphas(
    dtype: torch.dtype, names: tuple[str, ...], shape: Shape, sharpness: float
) -> None:
    """Against central differences of the float64 reference."""
    asked = features(shape, dtype, names)
    problem, inputs, grad_out = made(shape, dtype, sharpness, asked)
    got = run(problem, inputs, grad_out)[2].alphas
    assert got is not None
    assert got.dtype == dtype
    step = 1e-6
    ends = []
    for sign in (1.0, -1.0):
        moved = inputs._replace(alphas=asked["alphas"].double() + sign * step)
        ends.append((expected(problem, moved, grad_out).out * grad_out.double()).sum(dim=3))
    difference = (ends[0] - ends[1]) / (2 * step)
    assert reference.relative_error(got, difference) < (1e-4 if dtype == FLOAT32 else 1e-6)


def test_alphas_that_are_none() -> None:
    """Outside (1, 2] or NaN: the head's rows are NaN, and nothing else is."""
    shape = Shape(heads_q=4, heads_kv=4)
    for names in (("alphas",), ("alphas", "bias", "sinks")):
        asked = features(shape, FLOAT32, names)
        asked["alphas"] = torch.tensor([[1.5, 1.0, math.nan, 2.5]])
        problem, inputs, grad_out = made(shape, FLOAT32, 1.0, asked)
        out, _, grads = run(problem, inputs, grad_out)
        for name in ("query", "key", "value", "alphas"):
            grad = getattr(grads, name)
            assert grad[:, 0].isfinite().all()
            assert grad[:, 1:].isnan().flatten(2).any(dim=2).all()
        assert out[:, 0].isfinite().all()
        hidden = inputs.attn_mask is not None
        assert out[:, 1:].isnan().flatten(2)[:, :, : 7 * 12 if hidden else None].all()


@pytest.mark.parametrize("names", ["bool", "bias", "ranges"])
def test_rows_that_see_nothing(names: str) -> None:
    problem, inputs, grad_out = made(Shape(), FLOAT32, 1.0, features(Shape(), FLOAT32, (names,)))
    nothing = {"bool": [5], "bias": [7], "ranges": [74, 75, 76]}[names]
    out, tau, grads = run(problem, inputs, grad_out)
    for t in (out, grads.query):
        assert (t[:, :, nothing] == 0.0).all()
    assert (tau[:, :, nothing] == math.inf).all()


@pytest.mark.parametrize("sharpness", [1.0, 0.01])
@pytest.mark.parametrize("names", ["bool", "bias", "window", "ranges"])
def test_what_is_hidden_is_not_felt(names: str, sharpness: float) -> None:
    """NaN in keys and values that no query sees."""
    shape = FLAT._replace(batch=2)
    asked = features(shape, FLOAT32, (names,))
    problem, inputs, grad_out = made(shape, FLOAT32, sharpness, asked)
    seen = (dense.scores(problem, inputs, FLOAT32) != -math.inf).any(dim=2).any(dim=1)
    assert not seen.all()
    clean = run(problem, inputs, grad_out)
    for t in (inputs.key, inputs.value):
        t.masked_fill_(~seen[:, None, :, None], math.nan)
    for got, want in zip(flat(run(problem, inputs, grad_out)), flat(clean), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize(
    "names", ["bool", "bias", "window", "ranges", "slopes", "sinks", "softcap"]
)
def test_a_poisoned_row_poisons_what_it_sees(names: str) -> None:
    asked = features(Shape(), FLOAT32, (names,))
    problem, inputs, grad_out = made(Shape(), FLOAT32, 1.0, asked)
    row = 20
    seen = (dense.scores(problem, inputs, FLOAT32) != -math.inf)[0, 0, row]
    inputs.query[0, 0, row] = math.nan
    out, tau, grads = run(problem, inputs, grad_out)
    assert out[0, 0, row].isnan().all()
    assert tau[0, 0, row].isnan()
    for grad in (grads.key, grads.value):
        assert torch.equal(grad[0, 0].isnan().all(dim=1), seen)
        assert not grad[1].isnan().any()
    assert grads.query[0, 0, row].isnan().all()
    assert torch.equal(out.isnan().sum(), torch.tensor(out.shape[3]))
    if grads.attn_mask is not None:
        assert torch.equal(grads.attn_mask[0, 0, row].isnan(), seen)


@pytest.mark.parametrize("names", [("bias keys",), ("bias of all", "alphas"), ("bias rows",),
                                   ("bias32", "dropout", "slopes")], ids="+".join)  # fmt: skip
@pytest.mark.parametrize("sharpness", [1.0, 0.02])
def test_the_same_bits_for_any_number_of_threads(names: tuple[str, ...], sharpness: float) -> None:
    shape = Shape(2, 4, 2, 200, 700, 16, 8)
    asked = features(shape, FLOAT32, names)
    problem, inputs, grad_out = made(shape, FLOAT32, sharpness, asked)
    threads = torch.get_num_threads()
    found = []
    try:
        for n in (1, 2, 5):
            torch.set_num_threads(n)
            found.append(run(problem, inputs, grad_out))
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        for got, want in zip(flat(other), flat(found[0]), strict=True):
            assert torch.equal(got, want)


def work_of(asked: dict[str, Any], shape: Shape, sharpness: float = 1.0) -> Any:
    problem, inputs, _ = made(shape, FLOAT32, sharpness, asked)
    work = _core.Work()
    rows = (problem.batch, problem.heads_q, problem.length_q)
    out, tau = torch.empty((*rows, problem.head_dim_v)), torch.empty(rows)
    _core.attention_forward(
        **cpu._asked(problem, inputs, {"isa": _core.isa()}), out=cpu._reference(out),
        tau=tau.data_ptr(), keep=False, scan_rows=_core.TILE_ROWS, work=work,
    )  # fmt: skip
    return work


def test_tiles_that_nobody_sees_are_not_computed() -> None:
    shape = Shape(1, 1, 1, 512, 2048, 16, 16)
    all_tiles = work_of({}, shape).tiles
    mask = torch.zeros(1, 1, 1, 2048, dtype=torch.bool)
    mask[..., :256] = True
    diagonal = torch.arange(512, dtype=torch.int32)
    packed = torch.stack([diagonal // 128 * 512, diagonal // 128 * 512 + 256, diagonal])[:, None]
    far = torch.tensor([[5.0]])
    for asked, share in (
        ({"attn_mask": mask}, 1 / 8),
        ({"attn_mask": torch.where(mask, 0.0, -math.inf)}, 1 / 8),
        ({"window_left": 100, "window_right": 27}, 1 / 16),
        ({"ranges": packed}, 1 / 8),
        ({"alibi_slopes": far}, 1 / 16),
        ({"alibi_slopes": far, "attn_mask": mask}, 1 / 8),
    ):
        assert work_of(asked, shape).tiles < (share + 0.04) * all_tiles, asked.keys()


@pytest.mark.parametrize("names", ["bool", "bias", "ranges", "left"])
def test_empty_tiles(names: str) -> None:
    shape = Shape(2, 2, 1, 200, 300, 16, 16)
    problem, inputs, _ = made(shape, FLOAT64, 1.0, features(shape, FLOAT64, (names,)))
    got = cpu.stats(problem, inputs, cpu.configs(problem)[0]).empty_tiles
    seen = dense.scores(problem, inputs, FLOAT64) != -math.inf
    p = reference.entmax(dense.scores(problem, inputs, FLOAT64), 1.5)
    counted, empty = torch.zeros(2, 2), torch.zeros(2, 2)
    for i in range(0, 200, 64):
        for j in range(0, 300, 64):
            tile = (slice(None), slice(None), slice(i, i + 64), slice(j, j + 64))
            any_seen = seen[tile].flatten(2).any(dim=2)
            counted += any_seen
            empty += any_seen & (p[tile] == 0.0).flatten(2).all(dim=2)
    assert torch.allclose(got, (empty / counted).double())
