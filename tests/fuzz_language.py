"""Random problems of all that a call may say: masks, windows, slopes, caps, sinks, scales and
alphas as tensors, lengths, packed sequences, dropout, caches. Run by ``fuzz.py --kind language``.

The reference is that of :mod:`language`. Bounds are made as in ``fuzz.py``, entry by entry: what a
score is made of adds to its error, and how far that moves a probability, a gradient, or the
gradient of what is learned, is evaluated.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import language
import torch
from cases import DTYPES, FLOAT16, FLOAT32, FLOAT64, device_of
from fuzz_tools import (
    NEAR_ONE,
    NEAREST,
    ROUNDINGS,
    Draw,
    Interval,
    Judge,
    Slack,
    Verdict,
    finite,
    highest_of,
    interval,
    lay_out,
    slack_of,
    terms,
)
from language import Sizes
from torch import Tensor

import adasplash2
from adasplash2.lowering import new_seed
from adasplash2.problem import compute_dtype

PAIRS = 300_000
"""Most pairs of query and key in a problem, of all heads."""

SEED = 7
"""Of dropout."""

TENSORS = "query", "key", "value"

Said = dict[str, Any]


# What is drawn


@dataclass(frozen=True)
class Problem:
    """One call: tensors of four dimensions, what is said beside, and how it is asked. What is not
    finite in tensors and masks (but for -inf in these) is where nobody sees it."""

    query: Tensor
    key: Tensor
    value: Tensor
    grad_out: Tensor
    said: Said
    packed: tuple[tuple[int, ...], tuple[int, ...]] | None = None  # lengths of sequences
    cache: Cache | None = None
    wanted: tuple[str, ...] = TENSORS  # those of which gradients are
    traits: set[str] = field(default_factory=set)

    @property
    def places(self) -> Said:
        """What :func:`language.seen` is asked with."""
        places = {name: given for name, given in self.said.items() if name in language.PLACES}
        return places if self.packed is None else places | {"packed": self.packed}

    @property
    def numbers(self) -> Said:
        """What is said to the reference."""
        said = {name: exact(given) for name, given in self.said.items() if name != "dropout_p"}
        return said | self.places

    def describe(self) -> str:
        def shown(given: Any) -> str:
            if not isinstance(given, Tensor):
                return repr(given)
            dtype = str(given.dtype).removeprefix("torch.")
            return f"{dtype}{tuple(given.shape)}" + (":grad" if given.requires_grad else "")

        tensors = (self.query, self.key, self.value, self.grad_out)
        parts = [f"{tuple(t.shape)}:{t.stride()}" for t in tensors]
        parts += [str(self.query.dtype).removeprefix("torch.")]
        parts += [f"{name}={shown(given)}" for name, given in self.said.items()]
        parts += [f"wanted={self.wanted}"] if self.wanted != TENSORS else []
        parts += [f"packed={self.packed}"] if self.packed else []
        parts += [f"{self.cache}"] if self.cache else []
        return f"language {' '.join(parts)} {sorted(self.traits)}"


@dataclass(frozen=True)
class Cache:
    """How keys and values are kept: in pages of ``page_size`` keys, or contiguous where it is 0.
    ``lengths`` hold how many there are with the ``new`` ones; None: all, as a full cache has."""

    page_size: int
    new: int
    lengths: tuple[int, ...] | None
    is_number: bool  # whether lengths are said as one number


def exact(given: Any) -> Any:
    """In float64, without what nobody sees."""
    if not isinstance(given, Tensor) or not given.is_floating_point():
        return given
    return given.detach().double().nan_to_num(0.0, math.inf, -math.inf)


def draw_sizes(draw: Draw, form: str, largest: int) -> tuple[Sizes, Any]:
    """With the lengths of packed sequences."""
    batch, heads_kv, group = (
        draw.one_of(1, 1, 2, 3),
        draw.one_of(1, 1, 2, 3),
        draw.one_of(1, 1, 2, 4),
    )
    length_q, length_k, packed = draw.integer(1, largest), draw.integer(1, largest), None
    if draw.chance(0.3):
        length_k = length_q
    elif draw.chance(0.2):  # few queries
        length_q, length_k = draw.integer(1, 16), draw.integer(largest, 8 * largest)
    elif draw.chance(0.06):
        length_q, length_k = draw.one_of((0, length_k), (length_q, 0), (1, 1), (1, length_k))
    if form == "cache":
        length_q = draw.integer(1, 16)
        length_k = draw.integer(length_q, draw.one_of(largest, 4 * largest))
    if form == "packed":
        count, batch = draw.integer(1, 6), 1
        lengths = [
            tuple(0 if draw.chance(0.2) else draw.integer(1, largest // 2) for _ in range(count))
            for _ in "qk"
        ]
        packed = (lengths[0], lengths[0] if draw.chance(0.4) else lengths[1])
        length_q, length_k = sum(packed[0]), sum(packed[1])
    pairs = max(1, length_q * length_k)
    while batch * heads_kv * group * pairs > PAIRS and batch * heads_kv * group > 1:
        batch, heads_kv, group = -(-batch // 2), -(-heads_kv // 2), -(-group // 2)
    head_dim = draw.one_of(1, draw.integer(1, 256), draw.integer(1, 64), 16, 64)
    head_dim_v = draw.one_of(head_dim, head_dim, draw.integer(1, 256), 1)
    n = Sizes(batch, heads_kv * group, heads_kv, length_q, length_k, head_dim, head_dim_v)
    return n, packed


def draw_tensors(draw: Draw, n: Sizes, dtype: torch.dtype, traits: set[str]) -> list[Tensor]:
    """Query, key, value and the output's gradient, in float64."""
    query = draw.normal(n.batch, n.heads_q, n.length_q, n.head_dim)
    query *= 10.0 ** draw.random.uniform(-2.0, 0.7)
    key = draw.normal(n.batch, n.heads_kv, n.length_k, n.head_dim)
    value = draw.normal(n.batch, n.heads_kv, n.length_k, n.head_dim_v)
    grad_out = draw.normal(n.batch, n.heads_q, n.length_q, n.head_dim_v)
    kind = draw.random.random()
    if kind < 0.15:
        query, key, value = ((4.0 * t).round() / 4.0 for t in (query, key, value))
        traits.add("tied")
    elif kind < 0.2:
        key[:] = key[:, :, :1].clone() if n.length_k else key
        traits.add("constant")
    elif kind < 0.25:
        key[:, :, ::2] = key[:, :, 1:2].clone() if n.length_k > 1 else key[:, :, ::2]
        traits.add("tied")
    elif kind < 0.35:  # scores of the same size, of products that 16 bits do not hold
        query, key = 300.0 * query, 300.0 * key
        traits.add("large")
    elif kind < 0.4:
        value *= torch.finfo(dtype).max * 2.0**-8 if dtype == FLOAT16 else 1e4
        traits.add("large values")
    elif kind < 0.45:
        value *= torch.finfo(dtype).tiny
        traits.add("tiny values")
    elif kind < 0.5:
        query, key = query * 1e-3, key * 1e-3
        traits.add("tiny")
    elif kind < 0.55:
        grad_out *= 10.0 ** draw.random.uniform(-4.0, 3.0)
    return [query, key, value, grad_out]


def draw_mask(draw: Draw, n: Sizes, dtype: torch.dtype) -> Tensor:
    shape = [n.batch, n.heads_q, n.length_q, n.length_k]
    shape = [1 if draw.chance(0.35) else size for size in shape]
    hidden = draw.normal(*shape) > draw.one_of(-1.0, 0.0, 1.0, 9.0)
    if hidden.numel() and draw.chance(0.3):  # rows, and a block of keys
        hidden[:, :, draw.index(shape[2])] = True
        first = draw.index(shape[3])
        hidden[..., first : first + draw.one_of(1, 16, 64, 200)] = True
    if draw.chance(0.4):
        mask = ~hidden
    else:
        size = draw.one_of(1.0, 1.0, 0.1, 10.0, 0.0)
        its_dtype = draw.one_of(dtype, dtype, FLOAT32)
        # Libraries of models say the least number in place of -inf.
        least = (
            1e-8 * torch.finfo(its_dtype).min
            if its_dtype == FLOAT64
            else torch.finfo(its_dtype).min
        )
        hide = draw.one_of(-math.inf, -math.inf, -math.inf, least)
        mask = (size * draw.normal(*shape)).masked_fill(hidden, hide).to(its_dtype)
    mask = lay_out(draw, mask)
    while mask.dim() > 2 and mask.shape[0] == 1 and draw.chance(0.5):
        mask = mask[0]
    return mask


def draw_scales(draw: Draw, n: Sizes, usual: float) -> Any:
    """A number, or a tensor that broadcasts to (batch, heads, length_q)."""
    kind = draw.random.random()
    if kind < 0.5:
        return usual
    if kind < 0.65:
        return draw.one_of(0.0, -usual, usual * 10.0 ** draw.random.uniform(-4.0, 1.0))
    shape = draw.one_of(
        (n.heads_q,),
        (n.batch, n.heads_q, n.length_q),
        (n.batch, n.heads_q, 1),
        (n.heads_q, n.length_q),
        (1, 1, n.length_q),
        (),
    )
    scales = usual * draw.normal(*shape)
    if scales.numel() and draw.chance(0.3):
        scales.view(-1)[draw.index(scales.numel())] = 0.0
    return scales


def draw_alphas(draw: Draw, heads: int) -> Any:
    def one() -> float:
        kind = draw.random.random()
        if kind < 0.6:
            return draw.one_of(1.5, 1.5, 2.0, 1.25)
        if kind < 0.85:
            return draw.random.uniform(NEAR_ONE, 2.0)
        if kind < 0.95:
            return 1.0 + 10.0 ** draw.random.uniform(-4.0, -1.0)
        return draw.one_of(2.0 - 1e-6, 1.5 + 1e-6, 1.5 - 1e-3)

    if draw.chance(0.1):
        return draw.random.uniform(2.0, 3.5)
    if draw.chance(0.6):
        return one()
    return torch.tensor([one() for _ in range(heads)], dtype=FLOAT64).float().double()


def draw_said(draw: Draw, n: Sizes, dtype: torch.dtype, form: str, usual: float) -> Said:
    """Everything but lengths."""
    said: Said = {"scale": draw_scales(draw, n, usual), "alpha": draw_alphas(draw, n.heads_q)}
    if draw.chance(0.4):
        said["is_causal"] = True
    if draw.chance(0.35):
        longest = max(n.length_q, n.length_k, 2)
        sides = [draw.one_of(-1, 0, 1, draw.integer(1, longest), 2 * longest) for _ in "lr"]
        said["window"] = tuple(sides)
    if form != "cache" and draw.chance(0.4):
        said["causal_align"] = "bottom-right"
    if form == "dense" and draw.chance(0.45):
        said["attn_mask"] = draw_mask(draw, n, dtype)
    if draw.chance(0.3):
        shape = (n.heads_q,) if form == "packed" or draw.chance(0.5) else (n.batch, n.heads_q)
        size = draw.one_of(1e6, *[10.0 ** draw.random.uniform(-4.0, 1.0)] * 15)
        slopes = size * draw.normal(*shape).abs()
        slopes[draw.normal(*shape) > 0.5] = 0.0
        said["alibi_slopes"] = slopes
    if draw.chance(0.25):
        said["softcap"] = draw.one_of(10.0 ** draw.random.uniform(-2.0, 2.0), 30.0, 1e6, 1e30)
    if draw.chance(0.3):
        said["sinks"] = draw.one_of(1.0, 1.0, 1.0, 10.0, 1e4) * draw.normal(n.heads_q)
    if form != "cache" and draw.chance(0.15):
        said["dropout_p"] = draw.one_of(0.1, 0.5, draw.random.uniform(0.0, 0.99), 0.99)
    compute = compute_dtype(dtype)
    for name, given in said.items():
        if isinstance(given, Tensor) and name != "attn_mask":
            # Alphas of 16 bits may be 1.
            narrow = dtype if name != "alpha" and draw.chance(0.15) else compute
            said[name] = lay_out(draw, given.to(narrow)) if given.numel() > 1 else given.to(narrow)
        if isinstance(given, Tensor) and given.is_floating_point() and form != "cache":
            said[name] = said[name].requires_grad_(draw.chance(0.8))
    return said


def draw_lengths(draw: Draw, batch: int, limit: int) -> Tensor:
    lengths = [draw.one_of(0, limit, draw.random.randint(0, limit)) for _ in range(batch)]
    return torch.tensor(lengths, dtype=torch.int32)


def draw_problem(draw: Draw, largest: int) -> Problem:
    form = draw.one_of(*["dense"] * 5, "packed", "cache", "cache")
    dtype, traits = draw.one_of(*DTYPES), set[str]()
    n, packed = draw_sizes(draw, form, largest)
    tensors = draw_tensors(draw, n, dtype, traits)
    usual = n.head_dim**-0.5 * (300.0**-2 if "large" in traits else 1.0)
    said = draw_said(draw, n, dtype, form, usual)
    if "large" not in traits and draw.chance(0.3):
        del said["scale"]  # as usual
    cache = None
    if form == "dense":
        for name, limit in (
            ("q_lengths", n.length_q), ("kv_lengths", n.length_k), ("kv_starts", n.length_k)
        ):  # fmt: skip
            if draw.chance(0.2):
                said[name] = draw_lengths(draw, n.batch, limit)
    if form == "cache":
        cache = draw_cache(draw, n)
        if cache.lengths is not None:
            said["kv_lengths"] = torch.tensor(cache.lengths, dtype=torch.int32)
        said["causal_align"] = "bottom-right"
        if draw.chance(0.25):
            said["kv_starts"] = draw_lengths(draw, n.batch, n.length_k)
    tensors = [lay_out(draw, t.to(dtype)) for t in tensors]
    wanted = TENSORS if draw.chance(0.8) else tuple(draw.random.sample(TENSORS, draw.integer(1, 2)))
    problem = Problem(*tensors, said, packed, cache, wanted, traits)
    if draw.chance(0.3):
        poison_what_is_hidden(draw, problem)
        traits.add("poisoned")
    if draw.chance(0.1):
        traits.add("poisoned values")
    return problem


def draw_cache(draw: Draw, n: Sizes) -> Cache:
    new = draw.one_of(0, n.length_q, draw.random.randint(0, n.length_q))
    is_number = draw.chance(0.2)
    lengths = [
        draw.one_of(new, n.length_k, draw.random.randint(new, n.length_k)) for _ in "b" * n.batch
    ]
    if is_number:
        lengths = lengths[:1] * n.batch
    page_size = draw.one_of(0, 0, 1, 16, 17, draw.integer(1, 300))
    # Pages beyond the capacity would be keys, too.
    is_full = new == 0 and (page_size == 0 or n.length_k % page_size == 0) and draw.chance(0.3)
    return Cache(page_size, new, None if is_full else tuple(lengths), is_number)


def poison_what_is_hidden(draw: Draw, problem: Problem) -> None:
    """In place: keys that no query of their head sees, queries that are padding, what a mask says
    where nobody looks."""
    n_batch, heads_q, length_q, length_k = *problem.query.shape[:3], problem.key.shape[2]
    seen = language.seen(length_q, length_k, n_batch, **problem.places)[0][:, None]
    mask = problem.said.get("attn_mask")
    shown = seen.expand(n_batch, heads_q, length_q, length_k)
    if mask is not None:
        shown = shown & (mask if mask.dtype == torch.bool else mask > -math.inf)
    shown = shown.unflatten(1, (problem.key.shape[1], -1)).any(2).any(2)
    bad = draw.one_of(math.nan, math.inf, -math.inf)
    with torch.no_grad():
        for tensor in (problem.key, problem.value):
            if is_writable(tensor):
                tensor.masked_fill_(~shown[..., None], bad)
        if (lengths := problem.said.get("q_lengths")) is not None:
            padding = torch.arange(length_q) >= lengths[:, None, None]
            for tensor in (problem.query, problem.grad_out):
                if is_writable(tensor):
                    tensor.masked_fill_(padding[..., None], bad)
        if mask is not None and mask.is_floating_point() and is_writable(mask):
            wide = mask[(None,) * (4 - mask.dim())]
            for dim, size in enumerate(wide.shape):
                seen = seen.amax(dim, keepdim=True) if size == 1 and seen.shape[dim] else seen
            if seen.numel():
                wide.masked_fill_(~seen, math.nan)


def is_writable(tensor: Tensor) -> bool:
    """Whether each entry has a place of its own."""
    return all(step or size < 2 for size, step in zip(tensor.shape, tensor.stride(), strict=True))


# How far off a right answer may be


class Bounds:
    """Of one problem, entry by entry. Rows have one more key, the last, where there are sinks."""

    def __init__(self, problem: Problem, slack: Slack) -> None:
        self.slack, said = slack, problem.numbers
        query, key, self.value = (
            finite(t.double()) for t in (problem.query, problem.key, problem.value)
        )
        self.heads_kv, self.heads_q = key.shape[1], query.shape[1]
        group = self.heads_q // self.heads_kv
        key, self.value = (t.repeat_interleave(group, dim=1) for t in (key, self.value))
        self.query, self.key, self.value = query.abs(), key.abs(), self.value.abs()
        batch, heads, length_q, head_dim = query.shape
        self.alphas = said.pop("alpha", 1.5)
        if not isinstance(self.alphas, Tensor):
            self.alphas = torch.full((heads,), self.alphas, dtype=FLOAT64)
        self.alphas = self.alphas[:, None, None]
        scores = language.scores(query, finite(problem.key.double()), **said)
        with torch.no_grad():
            self.p = language.Entmax.apply(scores, self.alphas[None])
        unit = slack.unit

        dots, self.products = query @ key.mT, self.query @ self.key.mT
        scale = said.get("scale", head_dim**-0.5)
        if isinstance(scale, Tensor):
            scale = scale[:, None] if scale.dim() == 1 else scale
            scale = scale.expand(batch, heads, length_q)[..., None]
        self.scale = scale
        self.scaled = abs(scale) * self.products
        self.by_dim = terms(head_dim) * unit
        error, size, self.through = self.by_dim * self.scaled, self.scaled, None
        if softcap := said.get("softcap"):
            at = (scale * dots).abs()

            def derivative(at: Tensor) -> Tensor:
                return torch.cosh((at / softcap).clamp(max=300.0)) ** -2.0

            through = derivative(at)
            nearest = derivative((at - error).clamp(min=0.0))
            moved = (nearest - through).maximum(through - derivative(at + error))
            self.through, self.through_error = through, moved + ROUNDINGS * unit
            size = softcap * torch.tanh(at / softcap)
            error = (error * nearest).clamp(max=2.0 * softcap)
        self.visible, distance = language.seen(length_q, key.shape[2], batch, **problem.places)
        self.visible, self.distance = self.visible[:, None], distance[:, None].abs().double()
        self.visible = self.visible.expand(batch, heads, length_q, -1)
        mask = said.get("attn_mask")
        if mask is not None and mask.dtype == torch.bool:
            self.visible = self.visible & mask
        elif mask is not None:
            self.visible = self.visible & (mask > -math.inf)
            size = size + finite(mask).abs()
        if (slopes := said.get("alibi_slopes")) is not None:
            size = size + slopes.expand(batch, heads)[:, :, None, None] * self.distance
        error = torch.where(self.visible, error + ROUNDINGS * unit * size, 0.0)
        self.sinks = said.get("sinks")
        self.allowed = self.visible
        if self.sinks is not None:
            of_sinks = self.with_sinks(self.sinks.abs())
            error = torch.cat([error, ROUNDINGS * unit * of_sinks], dim=-1)
            self.allowed = torch.cat([self.visible, of_sinks == of_sinks], dim=-1)
        factor = self.alphas - 1.0
        self.highest = highest_of(scores)
        y = torch.where(self.allowed, factor * (scores - self.highest), -math.inf)
        self.z_highest = (factor * self.highest).squeeze(-1)
        self.found = self.of_heads(y, factor * error)

        inside = (self.p > 0.0).double()
        self.by_row = terms(inside.sum(dim=-1, keepdim=True)) * unit
        self.by_key = terms(self.over_group(self.kept_only(inside).sum(dim=2)[..., None])) * unit
        narrow = 2.0 * slack.narrow * self.p + 2.0**-35 * inside * (slack.narrow > 0.0)
        self.weight = self.found.p_error + narrow
        longest = max(self.p.shape[-1], self.p.shape[-2] * group)
        self.least = slack.tiny * unit * (8 + longest)

    def with_sinks(self, of_heads: Tensor) -> Tensor:
        """``(heads,)`` as one more key of all rows."""
        return of_heads[None, :, None, None].expand(*self.visible.shape[:3], 1)

    def kept_only(self, of_keys: Tensor) -> Tensor:
        """Without what is a sink's."""
        return of_keys[..., : self.visible.shape[-1]]

    def with_nothing(self, of_keys: Tensor) -> Tensor:
        """With zeros for sinks, which have no value."""
        return of_keys if self.sinks is None else torch.nn.functional.pad(of_keys, (0, 1))

    def over_group(self, by_head: Tensor) -> Tensor:
        return by_head.unflatten(1, (self.heads_kv, -1)).sum(dim=2)

    def of_heads(self, y: Tensor, error: Tensor) -> Interval:
        """Each head with its alpha."""
        found = [
            interval(self.p[:, h], y[:, h], error[:, h], float(alpha), self.slack)
            for h, alpha in enumerate(self.alphas.flatten().tolist())
        ]
        return Interval(*(torch.stack(parts, dim=1) for parts in zip(*found, strict=True)))

    def of_output(self, kept: Tensor | float) -> Tensor:
        error = self.kept_only(self.weight + (self.by_row + self.slack.unit) * self.p) * kept
        return error @ self.value + self.least

    def unsupported(self) -> Tensor:
        """Keys that are surely outside all supports, ``(batch, heads_kv, length_k)``."""
        near = self.kept_only((self.found.x > -2.0 * self.found.x_error) & self.allowed)
        return ~near.unflatten(1, (self.heads_kv, -1)).any(2).any(2)

    @property
    def jumps(self) -> Tensor:
        """Rows ``(batch, heads, length_q, 1)`` with a key at the edge of the support."""
        x, error = self.found.x, self.found.x_error
        edge = (x.abs() <= error) | ((self.p > 0.0) & (x - error < NEAREST))
        return (edge & self.allowed).any(dim=-1, keepdim=True)

    @cached_property
    def powers(self) -> tuple[Tensor, Tensor]:
        """``dp / dalpha`` made of positive terms, and how far it may be off."""
        p, p_error, factor = self.p, self.found.p_error, self.alphas - 1.0

        def parts(p: Tensor) -> tuple[Tensor, ...]:
            return tuple(p * part.abs() for part in language.logarithms(p, factor))

        at, high, low = parts(p), parts(p + p_error), parts((p - p_error).clamp(min=0.0))
        errors = [
            torch.where(self.allowed, (h - a).abs().maximum((a - b).abs()) + p_error, 0.0)
            + ROUNDINGS * self.slack.unit * a
            for a, h, b in zip(at, high, low, strict=True)
        ]
        log, gentle, rest = at
        of_log, of_gentle, of_rest = errors
        every_log, every_gentle, every_rest = (t.sum(-1, keepdim=True) for t in at)
        all_log, all_gentle, all_rest = (t.sum(-1, keepdim=True) for t in errors)
        mass = 1.0 + factor * every_gentle
        size = (rest + p * every_rest + every_gentle * log + gentle * every_log) / mass
        error = of_rest + p_error * every_rest + p * all_rest
        error = error + all_gentle * log + every_gentle * of_log
        error = error + of_gentle * every_log + gentle * all_log
        return size, (error + size * factor * all_gentle) / mass + self.by_row * size

    def of_gradients(self, grad_out: Tensor, kept: Tensor | float) -> dict[str, Tensor]:
        _, _, u, u_error, *_ = self.found
        narrow, unit = self.slack.narrow, self.slack.unit
        grad = finite(grad_out)
        value = self.signed_value
        dp = self.with_nothing((grad @ value.mT) * kept)
        grad = grad.abs()
        dp_size = self.with_nothing((grad @ self.value.mT) * kept)
        dp_error = (terms(value.shape[-1]) + 1.0) * unit * dp_size

        # As in fuzz.py.
        total = u.sum(dim=-1, keepdim=True)
        safe = torch.where(total > 0.0, total, 1.0)
        delta = (u * dp).sum(dim=-1, keepdim=True) / safe
        off = (dp - delta).abs()
        rest = total - u_error.sum(dim=-1, keepdim=True)
        moved = (u_error * off).sum(dim=-1, keepdim=True) / torch.where(rest > 0.0, rest, 1.0)
        most = highest_of(torch.where(u + u_error > 0.0, off, 0.0)).clamp(min=0.0)
        moved = torch.where(rest > 0.0, moved.minimum(most), most)
        rounded = (u * (dp_error + (self.by_row + narrow) * dp_size)).sum(dim=-1, keepdim=True)
        delta_error = moved + rounded / safe

        ds = u * off
        ds_error = u_error * off + (u + u_error) * (delta_error + dp_error) + narrow * ds
        ds_error = torch.where(self.allowed, ds_error + self.slack.tiny, 0.0)
        size, error = self.powers
        of_alpha = error * (dp.abs() + delta.abs()) + (size + error) * (dp_error + delta_error)
        of_sinks = ds_error + self.by_row * ds
        ds, ds_error = self.kept_only(ds), self.kept_only(ds_error)

        scored, scored_error = ds, ds_error  # gradients of scale * q . k
        if self.through is not None:
            scored = ds * self.through
            scored_error = ds_error * (self.through + self.through_error) + ds * self.through_error
        dot, dot_error = scored * abs(self.scale), scored_error * abs(self.scale)
        dot_error = dot_error + ROUNDINGS * unit * dot
        of_query = (dot_error + self.by_row * dot) @ self.key
        of_key = self.over_group(dot_error.mT @ self.query)
        of_key = of_key + self.by_key * self.over_group(dot.mT @ self.query)
        # Above alpha = 2 a term may overflow, and then its sum.
        of_query, of_key = (
            torch.where(size < self.slack.largest * 2.0**-24, size, math.inf)
            for size in (of_query, of_key)
        )
        weight = self.kept_only(self.weight + unit * self.p) * kept
        of_value = self.over_group(weight.mT @ grad)
        mass = (self.kept_only(self.p) * kept).mT @ grad
        of_value = of_value + self.by_key * self.over_group(mass)
        of_scale = (scored_error + (self.by_row + self.by_dim) * scored) * self.products
        by_row = self.by_row + unit * terms(self.p.shape[2])
        found = {
            "query": of_query + self.least,
            "key": of_key + self.least,
            "value": of_value + self.least,
            "attn_mask": ds_error + by_row * ds,
            "alibi_slopes": ((ds_error + by_row * ds) * self.distance).sum(-1).sum(-1),
            "scale": of_scale.sum(-1),
            "alpha": (of_alpha + by_row * size * dp_size).sum(-1).sum(-1),
        }
        return found if self.sinks is None else found | {"sinks": of_sinks[..., -1].sum(-1)}

    signed_value: Tensor  # as it is, for each query head


def summed_to(error: Tensor, shape: torch.Size, name: str) -> Tensor:
    """Errors of ``(batch, heads, ...)`` as those of an operand that broadcasts to it."""
    if name == "scale" and len(shape) == 1:
        return error.sum((0, 2))
    if name in ("sinks", "alpha", "alibi_slopes") and len(shape) == 1:  # of heads
        return error.sum(0)
    return error.sum_to_size(shape)


# Asking


def call_of(problem: Problem, backend: str, leaves: dict[str, Tensor]) -> Tensor:
    """The library's answer, ``(batch, heads, length_q, head_dim_v)``."""
    device = device_of(backend)
    said = {
        name: leaves.get(name, given.detach().to(device) if isinstance(given, Tensor) else given)
        for name, given in problem.said.items()
    }
    tensors = [leaves[name] for name in TENSORS]
    if problem.cache is not None:
        return call_of_cache(problem, problem.cache, said, tensors, backend)
    said |= {"enable_gqa": tensors[0].shape[1] != tensors[1].shape[1], "backend": backend}
    torch.manual_seed(SEED)
    if problem.packed is None:
        out: Tensor = adasplash2.entmax_attention(*tensors, **said)
        return out
    cumulative = [
        torch.tensor([0, *itertools.accumulate(n)], dtype=torch.int32, device=device)
        for n in problem.packed
    ]
    tensors = [t.squeeze(0).transpose(0, 1) for t in tensors]
    out = adasplash2.entmax_attention_varlen(*tensors, *cumulative, **said)
    return out.transpose(0, 1).unsqueeze(0)


def call_of_cache(
    problem: Problem, cache: Cache, said: Said, tensors: list[Tensor], backend: str
) -> Tensor:
    """With NaN in the cache where nothing is said to be, and pages in an order of their own."""
    query, *held = (t.detach() for t in tensors)
    batch, heads, capacity, _ = held[0].shape
    totals = cache.lengths or (capacity,) * batch
    said = {
        name: given for name, given in said.items() if name not in ("kv_lengths", "causal_align")
    }
    new = [t.new_empty(batch, heads, cache.new, t.shape[3]) for t in held]
    held = [t.clone() for t in held]
    for t, fresh in zip(held, new, strict=True):
        for b, total in enumerate(totals):
            fresh[b] = t[b, :, total - cache.new : total]
            t[b, :, total - cache.new :] = math.nan
    if cache.lengths is not None:
        before = torch.tensor(totals, dtype=torch.int32, device=query.device) - cache.new
        said["cache_lengths"] = int(before[0]) if cache.is_number else before
    if size := cache.page_size:
        count = -(-capacity // size)
        order = torch.randperm(batch * count, generator=torch.Generator().manual_seed(SEED))
        order = order.view(batch, count)
        pages = []
        for t in held:
            whole = t.new_full((batch, heads, count * size, t.shape[3]), math.nan)
            whole[:, :, :capacity] = t
            cut = whole.unflatten(2, (count, size)).permute(0, 2, 3, 1, 4)
            pool = torch.empty_like(cut.flatten(0, 1))
            pool[order.flatten()] = cut.flatten(0, 1)
            pages.append(pool)
        held, table = pages, order.int()
        for b, total in enumerate(totals):
            table[b, -(-total // size) :] = (-5, 10**6, 0)[b]  # behind the last page
        said["block_table"] = table.to(query.device)
    out: Tensor = adasplash2.entmax_attention_with_kvcache(
        query, *held, *(new if cache.new else ()), **said, backend=backend
    )
    return out


def check_problem(problem: Problem, backend: str) -> Verdict:
    judge, device = Judge(backend), device_of(backend)
    slack = slack_of(problem.query.dtype, backend)
    bounds = Bounds(problem, slack)
    if "poisoned values" in problem.traits and is_writable(problem.value):
        clean = problem.value.clone()
        hidden = problem.value.masked_fill(bounds.unsupported()[..., None], math.nan)
    else:
        clean = hidden = problem.value
    tensors = {"query": problem.query, "key": problem.key, "value": hidden}
    learned = {
        name: given
        for name, given in problem.said.items()
        if isinstance(given, Tensor) and given.requires_grad
    }
    leaves = {name: t.detach().to(device) for name, t in (tensors | learned).items()}
    with torch.no_grad():
        alone = call_of(problem, backend, leaves)

    # What is right.
    kept: Tensor | float = 1.0
    if dropout_p := problem.said.get("dropout_p", 0.0):
        torch.manual_seed(SEED)
        seed = int(new_seed(torch.device(device)))
        shape = *problem.query.shape[:3], problem.key.shape[2]
        kept = language.dropout_factors(seed, shape, dropout_p)
    said = problem.numbers
    right = {
        "query": finite(problem.query.double()),
        "key": finite(problem.key.double()),
        "value": finite(clean.double()),
    } | {name: said[name] for name in learned}
    wanted = *problem.wanted, *learned
    for name in wanted:
        right[name].requires_grad_()
    found, _ = language.attention(
        right["query"], right["key"], right["value"],
        **said | {name: right[name] for name in learned},
        kept=kept if isinstance(kept, Tensor) else None,
    )  # fmt: skip
    error = bounds.of_output(kept)
    judge("out without gradients", alone, found.detach(), error)
    if problem.cache is not None:
        return judge.verdict

    for name in wanted:
        leaves[name].requires_grad_()
    out = call_of(problem, backend, leaves)
    judge("out", out, found.detach(), error)
    if problem.packed is None:
        check_stats(judge, problem, bounds, backend, leaves)
    grad_out = finite(problem.grad_out.double())
    if bounds.alphas.max() > 2.0:  # the gradient jumps at the edge of the support
        grad_out = torch.where(bounds.jumps, 0.0, grad_out)
        problem = replace(problem, grad_out=torch.where(bounds.jumps, 0.0, problem.grad_out))
    exact_ones = torch.autograd.grad(found, [right[name] for name in wanted], grad_out)
    given = problem.grad_out.to(device)
    gradients = torch.autograd.grad(out, [leaves[name] for name in wanted], given)
    bounds.signed_value = (
        right["value"]
        .detach()
        .repeat_interleave(problem.query.shape[1] // problem.key.shape[1], dim=1)
    )
    errors = bounds.of_gradients(grad_out, kept)
    for name, got, one in zip(wanted, gradients, exact_ones, strict=True):
        error = errors[name]
        if error.shape != got.shape:
            error = summed_to(error, got.shape, name)
        judge(f"gradient of {name}", got, one, error + bounds.least)
    return judge.verdict


def check_stats(
    judge: Judge, problem: Problem, bounds: Bounds, backend: str, leaves: dict[str, Tensor]
) -> None:
    """Thresholds, how many keys are kept, empty tiles, and the probabilities."""
    device, numbers = device_of(backend), problem.numbers
    said = {name: given for name, given in problem.said.items() if name != "dropout_p"}
    said = {k: v.detach().to(device) if isinstance(v, Tensor) else v for k, v in said.items()}
    tensors = [leaves[name].detach() for name in TENSORS]
    said |= {"enable_gqa": tensors[0].shape[1] != tensors[1].shape[1], "backend": backend}
    stats = adasplash2.attention_stats(*tensors, **said)
    _, aux = adasplash2.entmax_attention(*tensors, **said, return_aux=True)
    alpha = numbers.pop("alpha", 1.5)
    scores = language.scores(*(finite(t.double()).cpu() for t in tensors[:2]), **numbers)
    tau = language.thresholds(scores, alpha)
    found, slack = bounds.found, bounds.slack
    near = (found.x > -found.x_error) & bounds.allowed
    error = highest_of(torch.where(near, found.x_error, 0.0)).clamp(min=0.0).squeeze(-1)
    error = error + slack.unit * (finite(bounds.z_highest).abs() + 0.5) + slack.tiny
    empty = tau == math.inf
    got = stats.tau.cpu()
    everywhere = torch.ones_like(empty)
    judge.holds("tau of an empty row", (got == math.inf) == empty, everywhere)
    of_rows = (torch.where(empty, 0.0, t).unsqueeze(-1) for t in (got, tau))
    judge("tau", *of_rows, error.unsqueeze(-1))
    vanishing = slack.tiny ** (bounds.alphas - 1.0)
    certain = bounds.kept_only((found.x > found.x_error + vanishing) & (found.p > 0.0))
    near, support = bounds.kept_only(near), stats.support.cpu()
    judge.holds("support too small", support >= certain.sum(-1), ~empty)
    judge.holds("support too large", support <= near.sum(-1), everywhere)
    p = aux.probabilities().to_dense().cpu().view(near.shape)
    judge("probabilities", p, bounds.kept_only(bounds.p), bounds.kept_only(found.p_error))
    if p.numel():
        seen, least, most = (in_tiles(which) for which in (bounds.visible, near, certain))
        share = stats.empty_tiles.cpu() * seen.clamp(min=1.0)
        right = (share >= seen - least - 1e-9) & (share <= seen - most + 1e-9)
        judge.holds("empty tiles", right, torch.ones_like(right))


def in_tiles(which: Tensor) -> Tensor:
    """How many tiles of 64 by 64 pairs have one of ``which``, ``(batch, heads)``."""
    tiles = torch.nn.functional.max_pool2d(which.double(), 64, ceil_mode=True)
    return tiles.sum((-1, -2))
