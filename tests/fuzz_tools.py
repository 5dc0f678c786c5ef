"""What random problems are made of, and how far off a right answer may be: what ``fuzz.py`` and
``fuzz_language.py`` share.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from cases import FLOAT32, FLOAT64
from torch import Tensor

NEAREST = 1e-30
"""Nearer to the threshold than this, GPU kernels keep no distance apart from another."""

ROUNDINGS = 4.0
"""Units of round-off that a short computation may err by: a score, a power, a quotient."""

NEAR_ONE = 1.05


# What is drawn


class Draw:
    """Decisions from a seed and a number."""

    def __init__(self, seed: int, number: int) -> None:
        self.random = random.Random(f"{seed}/{number}")
        self.generator = torch.Generator().manual_seed(self.random.getrandbits(62))

    def chance(self, share: float) -> bool:
        return self.random.random() < share

    def one_of(self, *options: Any) -> Any:
        return self.random.choice(options)

    def integer(self, low: int, high: int) -> int:
        """From both ends included, small ones as often as large ones."""
        return min(high, int(math.exp(self.random.uniform(math.log(low), math.log(high + 1)))))

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=FLOAT64)

    def index(self, size: int) -> int:
        return self.random.randrange(size)


def draw_alpha(draw: Draw) -> float:
    kind = draw.random.random()
    if kind < 0.3:
        return 1.5
    if kind < 0.5:
        return 2.0
    if kind < 0.7:
        return draw.random.uniform(NEAR_ONE, 2.0)
    if kind < 0.85:
        return draw.random.uniform(2.0, 4.0)
    if kind < 0.9:
        return draw.random.uniform(4.0, 50.0)
    if kind < 0.95:
        return 1.0 + 10.0 ** draw.random.uniform(-12.0, -1.0)
    nearly = draw.one_of(1.5, 2.0)
    return draw.one_of(math.nextafter(nearly, 0.0), math.nextafter(nearly, 9.0), nearly + 1e-7)


def draw_values(draw: Draw, *shape: int) -> Tensor:
    """Numbers of a size that suits every dtype, sometimes quantised so that many are equal."""
    x = draw.normal(*shape) * draw.one_of(1.0, 1.0, 1.0, 0.01, 10.0, 100.0)
    if draw.chance(0.25):
        x = (x * 4).round() / 4
    return x


def lay_out(draw: Draw, tensor: Tensor) -> Tensor:
    """The tensor with other strides, and NaN in what lies between its entries; where one of them is
    to be zero, the first of a dimension in place of all."""
    kind = draw.one_of("as it is", "as it is", "permuted", "sliced", "spread", "expanded")
    dim = draw.index(tensor.dim())
    if kind == "permuted":
        order = draw.random.sample(range(tensor.dim()), tensor.dim())
        back = [order.index(place) for place in range(tensor.dim())]
        return tensor.permute(order).contiguous().permute(back)
    if kind == "sliced":
        before = [draw.integer(1, 4) - 1 for _ in tensor.shape]
        padded = [
            size + one + draw.index(3) for size, one in zip(tensor.shape, before, strict=True)
        ]
        window = tensor.new_full(padded, math.nan)
        for place, (one, size) in enumerate(zip(before, tensor.shape, strict=True)):
            window = window.narrow(place, one, size)
        return window.copy_(tensor)
    if kind == "spread":
        step = draw.integer(2, 3)
        wide = tensor.new_full((*tensor.shape[:-1], step * tensor.shape[-1]), math.nan)
        return wide[..., ::step].copy_(tensor)
    if kind == "expanded" and tensor.shape[dim]:
        return tensor.narrow(dim, 0, 1).expand(tensor.shape)
    return tensor


def poison(draw: Draw, tensor: Tensor, *bad: float) -> None:
    """One or two entries of ``bad`` somewhere, in place."""
    for _ in range(draw.integer(1, 2) if tensor.numel() else 0):
        tensor[tuple(draw.index(size) for size in tensor.shape)] = draw.one_of(*bad)


# How far off a right answer may be


def highest_of(tensor: Tensor) -> Tensor:
    """Maxima along the last dimension, which is kept; -inf of nothing."""
    return torch.nn.functional.pad(tensor, (0, 1), value=-math.inf).amax(dim=-1, keepdim=True)


def finite(tensor: Tensor) -> Tensor:
    return tensor.nan_to_num(0.0, 0.0, 0.0)


def terms(count: Tensor | int) -> Any:
    """Units of round-off that a sum of so many terms may err by: one after the other, and alike."""
    return ROUNDINGS + count / 8.0


class Slack(NamedTuple):
    """What one backend may err by in one dtype."""

    unit: float  # of round-off of the arithmetic
    narrow: float  # of weights that are rounded to 16 bits before a product
    tiny: float  # numbers below count as zero
    largest: float  # beyond it are none


def slack_of(dtype: torch.dtype, backend: str) -> Slack:
    computed_in = torch.finfo(FLOAT64 if dtype == FLOAT64 else FLOAT32)
    unit = computed_in.eps * (2.0 if dtype == FLOAT64 else 1.0)  # the reference's own are as large
    narrow = torch.finfo(dtype).eps if dtype.itemsize == 2 and backend != "cpu" else 0.0
    return Slack(unit, narrow, computed_in.tiny, computed_in.max)


class Interval(NamedTuple):
    """``p`` and ``u`` of every entry with how far either may be off, and ``x = z - tau`` with the
    error ``x_error`` that they follow from."""

    p: Tensor
    p_error: Tensor
    u: Tensor
    u_error: Tensor
    x: Tensor
    x_error: Tensor


def interval(p: Tensor, y: Tensor, score_error: Tensor, alpha: float, slack: Slack) -> Interval:
    """From exact ``p``, shifted scores ``y = z - max z`` and errors of ``z``; rows that are not
    finite or empty have no meaning."""
    allowed = y > -math.inf
    y = torch.where(allowed, y, -2.0)
    r = 1.0 / (alpha - 1.0)
    inside = p > 0.0
    top = highest_of(p).clamp(min=0.0) ** (alpha - 1.0)
    # By the smaller numbers: z - tau would lose them where z is large.
    x = torch.where(inside, p ** (alpha - 1.0), torch.where(allowed, y + top, -1.0))
    u = torch.where(inside, p ** (2.0 - alpha), 0.0)
    own = ROUNDINGS * slack.unit * (y.abs().clamp(max=2.0) + top) + score_error + slack.tiny
    if alpha > 4.0:
        own = own + 2.0**-60
    # The threshold moves as the scores do, and by what rounding leaves of `sum p - 1`.
    near = allowed & (x > -8.0 * own)
    left = (alpha - 1.0) / u.sum(dim=-1, keepdim=True).clamp(min=slack.tiny)
    threshold = highest_of(torch.where(near, own, 0.0)).clamp(min=0.0)
    rounded = terms(inside.sum(dim=-1, keepdim=True)) * slack.unit
    x_error = own + threshold + rounded * left.clamp(max=1.0)

    def both(power: Callable[[Tensor], Tensor], at_x: Tensor) -> Tensor:
        high, low = power((x + x_error).clamp(min=0.0)), power((x - x_error).clamp(min=0.0))
        return (high - at_x).abs().maximum((at_x - low).abs())

    if alpha < NEAR_ONE:  # as softmax: a logarithm errs by itself, and by what its score does
        # Near the end of the window a power takes the digits of its base.
        base = r * (y.abs() + 1.0 - top) / x.clamp(min=1e-300)
        by = ROUNDINGS * slack.unit * (2.0 - p.clamp(min=1e-300).log() + base)
        moved = r * (score_error + highest_of(torch.where(inside, score_error, 0.0)))
        share = torch.expm1((by + moved).clamp(max=50.0))
        p_error, u_error = p * share + slack.tiny, u * share + slack.tiny ** (2.0 - alpha)
        p_error, u_error = p_error.clamp(max=1.0), u_error.clamp(max=1.0)
        return Interval(p, p_error, u, u_error, x, torch.where(allowed, x_error, 0.0))
    p_error = both(lambda x: x**r, p) + ROUNDINGS * slack.unit * p + slack.tiny
    p_error = p_error.clamp(max=1.0)
    if alpha > 2.0:  # between two thresholds a key's `p` may jump; then the sum of all is made one
        share = p_error.sum(dim=-1, keepdim=True).clamp(max=0.99)
        p_error = p_error + p * share / (1.0 - share)

    def sensitivity(x: Tensor) -> Tensor:
        return torch.where(x > 0.0, torch.where(x > 0.0, x, 1.0) ** (r - 1.0), 0.0)

    smallest = slack.tiny ** (2.0 - alpha) if alpha < 2.0 else 0.0
    u_error = both(sensitivity, u) + 2.0 * ROUNDINGS * slack.unit * u + smallest
    u_error = u_error.clamp(max=1.0) if alpha <= 2.0 else u_error
    return Interval(
        p,
        torch.where(allowed, p_error, 0.0),
        u,
        torch.where(allowed, u_error, 0.0),
        x,
        torch.where(allowed, x_error, 0.0),
    )


# What is found


def judge(
    what: str, got: Tensor, exact: Tensor, error: Tensor, backend: str, judged: Tensor | None = None
) -> str | None:
    """What is wrong with ``got``, or None. A 16-bit result must be what some number within
    ``error`` rounds to, by ties to even. ``judged`` ``(...)``: rows that have a right answer."""
    dtype, got = got.dtype, got.detach().cpu()
    assert got.shape == exact.shape, f"{what}: shape {got.shape} in place of {exact.shape}"
    low, high = (exact - error).to(dtype).double(), (exact + error).to(dtype).double()
    got = got.double()
    finite = exact.isfinite()
    right = torch.where(finite, (got >= low) & (got <= high), ~got.isfinite())
    if backend == "cpu":
        right &= finite | (got.isnan() == exact.isnan())
    # A result that may overflow may be infinite; one whose bound says nothing may be anything.
    right |= error == math.inf
    right |= finite & ~high.isfinite() & (got == math.inf)
    right |= finite & ~low.isfinite() & (got == -math.inf)
    if judged is not None:
        right |= ~judged.unsqueeze(-1)
    if right.all():
        return None
    wrong = (~right).nonzero()
    place = tuple(wrong[0].tolist())
    return (
        f"{what}: {len(wrong)} of {got.numel()} entries, first at {place}: got {got[place]:.9g}, "
        f"exact {exact[place]:.9g}, error allowed {error[place]:.3g}"
    )


def largest_share(got: Tensor, exact: Tensor, error: Tensor) -> float:
    """The most of its bound that an entry uses, in float32 and float64."""
    if got.dtype.itemsize == 2 or not got.numel():
        return 0.0
    rounding = torch.finfo(got.dtype).eps / 2.0 * exact.abs()
    share = (got.detach().cpu().double() - exact).abs() / (error + rounding)
    return share[share.isfinite()].max().item() if share.isfinite().any() else 0.0


class Verdict(NamedTuple):
    """What was found about a problem: ``failures``, empty if all is right, and how much of the
    bounds was used at most."""

    failures: list[str]
    shares: dict[str, float]


class Judge:
    """Collects a verdict."""

    def __init__(self, backend: str) -> None:
        self.backend = backend
        self.verdict = Verdict([], {})

    def __call__(
        self, what: str, got: Tensor, exact: Tensor, error: Tensor, judged: Tensor | None = None
    ) -> None:
        if failure := judge(what, got, exact, error, self.backend, judged):
            self.verdict.failures.append(failure)
        if judged is not None:
            error = torch.where(judged.unsqueeze(-1), error, math.nan)
        self.verdict.shares[what] = largest_share(got, exact, error)

    def holds(self, what: str, condition: Tensor, judged: Tensor) -> None:
        if (wrong := judged & ~condition).any():
            self.verdict.failures.append(f"{what}: {wrong.sum().item()} rows")
