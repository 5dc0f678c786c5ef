"""All that a call may say, in float64 and dense: the reference for masks, windows, slopes and the
rest, and the table of calls that every backend runs with them.

Written from the definitions in the docstring of ``entmax_attention``, pair by pair of query and
key; shares no code with the library. Gradients are autograd's, through :class:`Entmax`.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import reference
import torch
from torch import Tensor

FLOAT64 = torch.float64


class Entmax(torch.autograd.Function):
    """Rows of scores and one alpha each ``(..., 1)`` to probabilities, NaN where that is NaN;
    gradients by the explicit formulas of Correia, Niculae, Martins 2019, also that of alpha."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor, alpha: Tensor) -> Tensor:
        p = torch.full_like(scores, math.nan)
        rows = alpha.expand(*scores.shape[:-1], 1)[..., 0]
        for one in rows[rows == rows].unique().tolist():
            chosen = rows == one
            p[chosen] = reference.entmax(scores[chosen], one)
        ctx.save_for_backward(p, alpha)
        return p

    @staticmethod
    def backward(ctx: Any, grad_p: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        p, alpha = ctx.saved_tensors
        rows = alpha.expand(*p.shape[:-1], 1)[..., 0]
        ds = torch.full_like(p, math.nan)
        for one in rows[rows == rows].unique().tolist():
            chosen = rows == one
            ds[chosen] = reference.entmax_gradient(p[chosen], grad_p[chosen], one)
        log, gentle, rest = (p * part for part in logarithms(p, alpha - 1.0))
        log_all, gentle_all, rest_all = (t.sum(-1, keepdim=True) for t in (log, gentle, rest))
        dp = rest - p * rest_all + gentle_all * log - gentle * log_all
        dp = dp / (1.0 - (alpha - 1.0) * gentle_all)
        grad_alpha = torch.where(p > 0.0, grad_p * dp, 0.0).sum(-1, keepdim=True)
        return ds, grad_alpha.sum_to_size(alpha.shape)


def logarithms(p: Tensor, factor: Tensor | float) -> tuple[Tensor, Tensor, Tensor]:
    """``L = log p``, ``E = (1 - p^-factor) / factor``, which nears it as ``factor``, alpha - 1,
    nears 0, and ``D = (E - L) / factor``; 0 where ``p`` is. With means ``M`` by ``p``,

        dp / dalpha = p (D - M(D) + M(E) L - E M(L)) / (1 - factor M(E)),

    which is the formula of Correia, Niculae, Martins 2019 with ``u = p^(2-alpha) =
    p (1 - factor E)``, without terms that grow as alpha nears 1."""
    log = torch.where(p > 0.0, p, 1.0).log()
    x = -factor * log
    series = torch.zeros_like(x)
    for k in range(18, 1, -1):
        series = (series * x.clamp(max=1.0) + 1.0) / k
    square = torch.where(x > 0.0, x, 1.0) ** 2
    excess = torch.where(x < 0.5, series, (torch.expm1(x) - x) / square)
    return log, -torch.expm1(x) / factor, -(log**2) * excess


def seen(
    length_q: int,
    length_k: int,
    batch: int,
    *,
    is_causal: bool = False,
    causal_align: str = "top-left",
    window: tuple[int, int] | None = None,
    q_lengths: Tensor | None = None,
    kv_lengths: Tensor | None = None,
    kv_starts: Tensor | None = None,
    packed: tuple[tuple[int, ...], tuple[int, ...]] | None = None,
) -> tuple[Tensor, Tensor]:
    """Which keys each query sees ``(batch, length_q, length_k)``, and ``i' - j`` likewise.
    ``packed`` are lengths of queries and of keys of sequences that lie one behind another."""
    if packed is not None:
        alike = {"is_causal": is_causal, "causal_align": causal_align, "window": window}
        blocks = [seen(*lengths, 1, **alike) for lengths in zip(*packed, strict=True)]
        visible, distance = (
            torch.block_diag(*(block[part][0] for block in blocks))[None] for part in (0, 1)
        )
        return visible, distance
    i = torch.arange(length_q)[None, :, None]
    j = torch.arange(length_k)[None, None, :]

    def column(lengths: Tensor | None, otherwise: int) -> Tensor:
        found = torch.full((batch,), otherwise) if lengths is None else lengths.cpu().long()
        return found[:, None, None]

    rows, keys = column(q_lengths, length_q), column(kv_lengths, length_k)
    distance = (i + (keys - rows if causal_align == "bottom-right" else 0 * rows)) - j
    visible = (i < rows) & (j < keys) & (j >= column(kv_starts, 0))
    left, right = window or (-1, -1)
    if is_causal:
        visible = visible & (distance >= 0)
    if left >= 0:
        visible = visible & (distance <= left)
    if right >= 0:
        visible = visible & (distance >= -right)
    return visible, distance


def scores(
    query: Tensor,
    key: Tensor,
    *,
    scale: float | Tensor | None = None,
    attn_mask: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    **places: Any,
) -> Tensor:
    """In float64, -inf where a key is hidden; a sink is one more key. ``places`` are for
    :func:`seen`."""
    batch, heads = query.shape[:2]
    s = query @ key.repeat_interleave(heads // key.shape[1], dim=1).mT
    if isinstance(scale, Tensor):
        factor = scale[:, None] if scale.dim() == 1 else scale
        s = s * factor.expand(batch, heads, query.shape[2])[..., None]
    else:
        s = s * (query.shape[-1] ** -0.5 if scale is None else scale)
    if softcap:
        s = softcap * torch.tanh(s / softcap)
    visible, distance = seen(query.shape[2], key.shape[2], batch, **places)
    visible, distance = visible.to(s.device)[:, None], distance.to(s.device)[:, None]
    if attn_mask is not None:
        if attn_mask.dtype == torch.bool:
            visible = visible & attn_mask
        else:
            s = s + attn_mask
    if alibi_slopes is not None:
        slopes = alibi_slopes.expand(batch, heads)[:, :, None, None]
        s = s - slopes * distance.abs()
    s = torch.where(visible, s, -math.inf)
    if sinks is not None:
        s = torch.cat([s, sinks[None, :, None, None].expand(*s.shape[:3], 1)], dim=-1)
    return s


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    alpha: float | Tensor = 1.5,
    kept: Tensor | None = None,
    **said: Any,
) -> tuple[Tensor, Tensor]:
    """Output and probabilities, in float64. ``kept`` ``(batch, heads, length_q, length_k)`` are the
    factors of dropout; what else is ``said`` is for :func:`scores`."""
    s = scores(query, key, **said)
    if isinstance(alpha, float) and alpha == 1.0:
        hidden = s == -math.inf
        p = torch.softmax(torch.where(hidden.all(-1, keepdim=True), 0.0, s), dim=-1)
        p = torch.where(hidden, 0.0, p)[..., : key.shape[2]]
        value = value.repeat_interleave(query.shape[1] // value.shape[1], dim=1)
        return (p if kept is None else p * kept) @ value, p
    if isinstance(alpha, Tensor):  # one that is none makes its head NaN
        alphas = torch.where((alpha > 1.0) & (alpha <= 2.0), alpha, math.nan)[None, :, None, None]
    else:
        alphas = torch.full((1, 1, 1, 1), alpha, dtype=s.dtype, device=s.device)
    p = Entmax.apply(s, alphas)[..., : key.shape[2]]
    value = value.repeat_interleave(query.shape[1] // value.shape[1], dim=1)
    return (p if kept is None else p * kept) @ value, p


def thresholds(s: Tensor, alpha: float | Tensor = 1.5) -> Tensor:
    """``tau`` of rows of :func:`scores`."""
    alphas = [alpha] * s.shape[1] if isinstance(alpha, float) else alpha.tolist()
    rows = [reference.entmax_and_tau(s[:, head], one)[1] for head, one in enumerate(alphas)]
    return torch.stack(rows, dim=1)


def dropout_factors(seed: int, shape: tuple[int, ...], dropout_p: float) -> Tensor:
    """0 or ``1 / (1 - dropout_p)`` of each probability."""
    batch, heads, length_q, length_k = shape
    counter = [
        torch.arange(length_k).expand(shape),
        torch.arange(length_q)[:, None].expand(shape),
        torch.arange(batch * heads).view(batch, heads, 1, 1).expand(shape),
        torch.zeros(shape, dtype=torch.int64),
    ]
    dropped = philox(counter, seed)[0] < math.floor(dropout_p * 2**32)
    return (~dropped).double() / (1.0 - dropout_p)


def philox(counter: list[Tensor], seed: int) -> list[Tensor]:
    """The four words of Philox-4x32-10 (Salmon et al. 2011)."""
    mask = 0xFFFFFFFF
    low, high = seed & mask, (seed >> 32) & mask
    for _ in range(10):
        first, second = _product(0xD2511F53, counter[0]), _product(0xCD9E8D57, counter[2])
        counter = [
            second[0] ^ counter[1] ^ low,
            second[1],
            first[0] ^ counter[3] ^ high,
            first[1],
        ]
        low, high = (low + 0x9E3779B9) & mask, (high + 0xBB67AE85) & mask
    return counter


def _product(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    """Upper and lower half of the product of two 32-bit numbers, in int64."""
    low, high = a * (b & 0xFFFF), a * (b >> 16)
    total = (low >> 16) + high
    return (total >> 16) & 0xFFFFFFFF, ((total & 0xFFFF) << 16 | (low & 0xFFFF)) & 0xFFFFFFFF


# Calls


class Sizes(NamedTuple):
    batch: int = 2
    heads_q: int = 4
    heads_kv: int = 2
    length_q: int = 75
    length_k: int = 90
    head_dim: int = 16
    head_dim_v: int = 24


class Randomness:
    """Numbers, the same at every call."""

    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(1)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=FLOAT64)

    def uniform(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self.generator, dtype=FLOAT64)


Said = dict[str, Any]


def _bool_mask(n: Sizes, r: Randomness) -> Said:
    """Some pairs, a block of 64 by 64, and all keys of three queries are hidden."""
    mask = r.uniform(n.batch, n.heads_q, n.length_q, n.length_k) < 0.7
    mask[:, -1, :64, :64] = False
    mask[0, :, 5:8] = False
    return {"attn_mask": mask}


def _key_mask(n: Sizes, r: Randomness) -> Said:
    return {"attn_mask": r.uniform(n.batch, 1, 1, n.length_k) < 0.6}


def _added_mask(n: Sizes, r: Randomness) -> Said:
    mask = r.normal(n.batch, n.heads_q, n.length_q, n.length_k)
    mask[:, :, 3:4, ::2] = -math.inf
    return {"attn_mask": mask}


def _bias_of_heads(n: Sizes, r: Randomness) -> Said:
    return {"attn_mask": r.normal(1, n.heads_q, n.length_q, n.length_k)}


def _bias_of_keys(n: Sizes, r: Randomness) -> Said:
    return {"attn_mask": r.normal(n.batch, 1, 1, n.length_k)}


def _bias_of_queries(n: Sizes, r: Randomness) -> Said:
    return {"attn_mask": r.normal(1, 1, n.length_q, 1)}


def _bias_of_all(n: Sizes, r: Randomness) -> Said:
    mask = r.normal(1, 1, 1, n.length_k)
    mask[..., 60:64] = -math.inf
    return {"attn_mask": mask}


def _bias_across(n: Sizes, r: Randomness) -> Said:
    """Queries are its innermost dimension in memory."""
    mask = r.normal(n.batch, 1, n.length_k, n.length_q).mT
    mask[:, :, ::3, 48:96] = -math.inf
    return {"attn_mask": mask}


def _lengths(n: Sizes, r: Randomness) -> Said:
    return {
        "q_lengths": torch.tensor([max(n.length_q - 12, 0), 1][: n.batch], dtype=torch.int32),
        "kv_lengths": torch.tensor([n.length_k - 30, n.length_k][: n.batch], dtype=torch.int32),
        "kv_starts": torch.tensor([7, n.length_k - 9][: n.batch], dtype=torch.int32),
    }


def _slopes(n: Sizes, r: Randomness) -> Said:
    slopes = torch.tensor([0.0, 0.3, 0.05, 2.0], dtype=FLOAT64)
    return {"alibi_slopes": slopes[: n.heads_q]}


FEATURES: dict[str, Callable[[Sizes, Randomness], Said]] = {
    "causal": lambda n, r: {"is_causal": True},
    "bottom-right": lambda n, r: {"is_causal": True, "causal_align": "bottom-right"},
    "window": lambda n, r: {"window": (20, 5)},
    "left window": lambda n, r: {"window": (9, -1), "causal_align": "bottom-right"},
    "bool mask": _bool_mask,
    "key mask": _key_mask,
    "added mask": _added_mask,
    "bias of heads": _bias_of_heads,
    "bias of keys": _bias_of_keys,
    "bias of queries": _bias_of_queries,
    "bias of all": _bias_of_all,
    "bias across": _bias_across,
    "bias in float32": lambda n, r: {"attn_mask": r.normal(1, n.heads_q, n.length_q, n.length_k)},
    "slopes": _slopes,
    "slopes of batch": lambda n, r: {"alibi_slopes": r.uniform(n.batch, n.heads_q)},
    "softcap": lambda n, r: {"softcap": 1.5},
    "sinks": lambda n, r: {"sinks": r.normal(n.heads_q)},
    "scale of heads": lambda n, r: {"scale": 0.1 + 0.3 * r.uniform(n.heads_q)},
    "scale of rows": lambda n, r: {"scale": 0.3 * r.normal(n.batch, n.heads_q, n.length_q)},
    "alphas": lambda n, r: {
        "alpha": torch.tensor([1.2, 1.5, 1.8, 1.05], dtype=FLOAT64)[: n.heads_q]
    },
    "alphas near 1": lambda n, r: {
        "alpha": torch.tensor([1.001, 1.0625, 1.9, 1.1], dtype=FLOAT64)[: n.heads_q]
    },
    "lengths": _lengths,
    "dropout": lambda n, r: {"dropout_p": 0.3},
    "alpha 1.25": lambda n, r: {"alpha": 1.25},
    "alpha 2": lambda n, r: {"alpha": 2.0},
}

SAME = {
    **dict.fromkeys(("causal", "bottom-right"), "causal"),
    **dict.fromkeys(("window", "left window"), "window"),
    **{feature: "mask" for feature in FEATURES if "mask" in feature or "bias" in feature},
    **dict.fromkeys(("slopes", "slopes of batch"), "slopes"),
    **dict.fromkeys(("scale of heads", "scale of rows"), "scale"),
    **{feature: "alpha" for feature in FEATURES if feature.startswith("alpha")},
}
"""Features of which a call has one."""

PLACES = ("is_causal", "causal_align", "window", "q_lengths", "kv_lengths", "kv_starts")
"""What :func:`seen` is asked with, of what is said."""

FEW = Sizes(length_q=5, length_k=300, head_dim=23, head_dim_v=10)

VARIANTS = ("bias of queries", "bias of all", "bias across", "bias in float32", "alphas near 1")
"""Of another feature: in no pair but those of :data:`TOGETHER`."""

TOGETHER = (
    ("softcap", "scale of rows"),
    ("added mask", "softcap", "slopes"),
    ("bool mask", "slopes", "window"),
    ("lengths", "slopes", "sinks"),
    ("alphas", "sinks", "scale of rows", "softcap"),
    ("dropout", "sinks", "bias of keys"),
    ("dropout", "alphas", "lengths"),
    ("alpha 1.25", "slopes of batch", "softcap", "causal", "left window"),
    ("alpha 1.25", "added mask", "sinks", "dropout"),
    ("key mask", "sinks", "alphas"),
    ("bias of queries", "sinks"),
    ("causal", "added mask", "softcap", "sinks", "scale of rows", "alphas", "dropout"),
    ("bottom-right", "window", "bool mask", "slopes", "lengths"),
)

WITH_ADDED = (
    ("added mask", "softcap"),
    ("added mask", "scale of rows"),
    ("bias of heads", "slopes", "sinks"),
)
"""Of what is added to products in 16 bits, and of what forbids that; ``head_dim`` is 16, whose
scale is a power of two."""

WITH_GRADIENT = ("attn_mask", "alibi_slopes", "sinks", "scale", "alpha")


@dataclass(frozen=True)
class Call:
    """One call of ``entmax_attention`` with some of :data:`FEATURES`."""

    features: tuple[str, ...]
    dtype: torch.dtype = torch.float32
    sizes: Sizes = field(default_factory=Sizes)
    sharpness: float = 1.0  # factor of the queries

    @property
    def name(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        kinds = {1.0: "", 0.6: "-mixed", 0.01: "-flat"}
        extra = kinds.get(self.sharpness, f"-{self.sharpness}")
        if self.sizes.length_q <= FEW.length_q:
            extra += f"-{self.sizes.length_q}x{self.sizes.length_k}"
        return f"{'+'.join(self.features) or 'plain'}-{dtype}{extra}"

    @property
    def mask_dtype(self) -> torch.dtype:
        return torch.float32 if "bias in float32" in self.features else self.dtype

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Query, key, value and the output's gradient: float64, of numbers that ``dtype`` has."""
        n, r = self.sizes, Randomness()
        shapes = (
            (n.batch, n.heads_q, n.length_q, n.head_dim),
            (n.batch, n.heads_kv, n.length_k, n.head_dim),
            (n.batch, n.heads_kv, n.length_k, n.head_dim_v),
            (n.batch, n.heads_q, n.length_q, n.head_dim_v),
        )
        query, key, value, grad = (r.normal(*shape).to(self.dtype).double() for shape in shapes)
        return (query * self.sharpness).to(self.dtype).double(), key, value, grad

    def said(self) -> Said:
        """The arguments, numbers in float64 but exact in float32 (a mask in ``mask_dtype``)."""
        r = Randomness()
        said: Said = {}
        for feature in self.features:
            said |= FEATURES[feature](self.sizes, r)
        if {"bottom-right", "left window"} & set(self.features):
            said["causal_align"] = "bottom-right"
        for name, given in said.items():
            if isinstance(given, Tensor) and given.is_floating_point():
                otherwise = FLOAT64 if self.dtype == FLOAT64 else torch.float32
                exact = self.mask_dtype if name == "attn_mask" else otherwise
                said[name] = given.to(exact).double()
        return said


def calls() -> Iterator[Call]:
    """Each feature in each dtype and with rows of each kind, and each pair of features."""
    yield Call(())
    for feature in FEATURES:
        for dtype in (torch.float32, FLOAT64, torch.bfloat16, torch.float16):
            yield Call((feature,), dtype)
    for pair in itertools.combinations([f for f in FEATURES if f not in VARIANTS], 2):
        if SAME.get(pair[0], pair[0]) != SAME.get(pair[1], pair[1]):
            yield Call(pair)
    # Rows that keep more keys than a list holds, or some of which do.
    long = Sizes(batch=1, length_q=40, length_k=1300)
    flat = Sizes(1, 2, 1, 70, 700, 16, 24)
    for feature in FEATURES:
        if not feature.startswith("slopes"):
            yield Call((feature,), torch.float32, long, 0.01)
        yield Call((feature,), torch.float32, flat, 0.6)
        yield Call((feature,), FLOAT64, flat, 0.01)
        yield Call((feature,), FLOAT64, flat, 0.6)
    for pair in (("added mask", "sinks"), ("alphas", "window"), ("dropout", "scale of rows")):
        yield Call(pair, FLOAT64, long, 0.01)
    # Lists long enough, of keys and values large enough, for the CPU to gather them in turns.
    turns = Sizes(1, 4, 1, 140, 1100, 128, 120)
    for together in ((), ("bottom-right",), ("dropout",), ("alphas",), ("softcap", "sinks")):
        yield Call(together, FLOAT64, turns, 0.2)
    turns = turns._replace(length_q=280, length_k=2200)
    yield Call(("dropout", "softcap"), torch.float32, turns, 0.2)
    for together in WITH_ADDED:
        yield Call(together, torch.bfloat16)
    # Few queries, which are read together where they share keys; then keys enough for parts.
    for feature in FEATURES:
        yield Call((feature,), torch.float32, FEW)
    for dtype in (torch.float32, FLOAT64, torch.bfloat16, torch.float16):
        yield Call(("bottom-right",), dtype, FEW)
    many = Sizes(batch=1, heads_kv=1, length_q=3, length_k=20_000)
    for features in ((), ("left window",), ("alphas", "sinks"), ("key mask", "slopes")):
        yield Call(features, torch.float32, many)
    yield Call(("alpha 2", "bias of heads"), FLOAT64, many, 0.01)
    for together in TOGETHER:
        if len(together) > 2:
            yield Call(together)
        yield Call(together, FLOAT64)
        yield Call(together, FLOAT64, flat, 0.01)
        yield Call(together, FLOAT64, flat, 0.6)


def random_calls(count: int, seed: int) -> Iterator[Call]:
    """Calls of up to four features, sizes and sharpness at random: in float64, which leaves nothing
    to chance at the edge of a support."""
    chance = random.Random(seed)
    for _ in range(count):
        features = chance.sample(list(FEATURES), chance.randint(1, 4))
        kinds = [SAME.get(feature, feature) for feature in features]
        if len(set(kinds)) < len(kinds):
            features = features[:1]
        heads_kv = chance.choice((1, 2, 4))
        sizes = Sizes(
            batch=chance.choice((1, 2)),
            heads_q=4 if heads_kv == 4 else heads_kv * chance.choice((1, 2)),
            heads_kv=heads_kv,
            length_q=chance.choice((1, 2, 63, 65, 130, 200)),
            length_k=chance.choice((31, 64, 65, 129, 300, 700)),
            head_dim=chance.choice((1, 3, 16, 33, 64)),
            head_dim_v=chance.choice((1, 5, 16, 40)),
        )
        yield Call(tuple(features), FLOAT64, sizes, chance.choice((0.01, 0.3, 1.0)))


CALLS = tuple(calls())
