"""Attention at alpha = 1 with what torch's SDPA does not know, by torch's own operators: scores of
some queries and the keys that they may see at a time, forgotten at once and found again for
gradients. Memory grows by the lengths, not by their product.

Has the functions of a backend that :mod:`adasplash2.ops` calls; users cannot ask for it. Also the
scores themselves, with gradients by autograd, for what is looked at rather than trained on.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from adasplash2.contract import Config, Forward, Gradients, Kept
from adasplash2.problem import (
    ALL,
    Inputs,
    Problem,
    cut,
    part_of,
    places,
    seen_keys,
    span_of_keys,
    unsupported,
)
from adasplash2.torch_fastpath import beside, is_transformed

SUPPORTED = (
    *("attn_mask", "dropout_p", "window", "causal_align", "softcap", "alibi_slopes", "sinks"),
    *("scale as a tensor", "alpha as a tensor", "lengths or packed sequences"),
)
"""Features of the scores that are made here."""

CHUNK = {"cpu": 2**20, "cuda": 2**23}
"""Scores that are held at a time, some times over: 4 MiB stay in a cache, and a GPU is kept busy by
more."""

ROWS = 128
"""Queries at a time, where they see few keys."""


class Scores(NamedTuple):
    """Scores ``(batch, heads_q, rows, keys)``, -inf where a key may not be seen, and what they were
    made of: queries ``(batch, heads_kv, group, rows, head_dim)`` and keys ``(batch, heads_kv, 1,
    keys, head_dim)``, zeros where they are not finite; for which pairs both are finite; which are
    seen; products; what these are multiplied by; what was before the softcap, without it and with
    it over the cap; distances, where there are slopes."""

    scores: Tensor
    query: Tensor
    key: Tensor
    right: Tensor
    seen: Tensor
    products: Tensor
    scale: float | Tensor
    capped: Tensor | None
    distance: Tensor | None


def scores(
    problem: Problem, inputs: Inputs, dtype: torch.dtype, rows: slice = ALL, keys: slice = ALL
) -> Scores:
    """Of some queries and keys. See :class:`adasplash2.problem.ScoreTransform`."""
    if reasons := unsupported(problem, SUPPORTED):
        raise NotImplementedError("; ".join(reasons))
    p, said = problem, problem.scores
    query = inputs.query[:, :, rows].to(dtype).unflatten(1, (p.heads_kv, p.gqa_group))
    key = inputs.key[:, :, keys].to(dtype).unsqueeze(2)
    # What is not finite makes its own scores, and by zeros times it no others and no gradients.
    right_q, right_k = query.isfinite(), key.isfinite()
    clean_q, clean_k = torch.where(right_q, query, 0.0), torch.where(right_k, key, 0.0)
    s = clean_q @ clean_k.mT
    right = right_q.all(-1, keepdim=True) & right_k.all(-1, keepdim=True).mT
    s = torch.where(right, s, query.detach() @ key.detach().mT).flatten(1, 2)
    # Before all factors: with a gradient of zero, what is not finite makes NaN of theirs.
    seen = seen_keys(p, inputs, rows, keys)
    products = s = torch.where(seen, s, 0.0)
    scale: float | Tensor = said.scale
    if inputs.scales is not None:
        scale = part_of(inputs.scales, 2, rows).to(dtype).unsqueeze(3)
    s = scale * s
    share = distance = None
    if said.softcap:
        share = torch.tanh(s / said.softcap)
        s = said.softcap * share
    mask = inputs.attn_mask
    if mask is not None and mask.dtype != torch.bool:
        s = s + part_of(part_of(mask, 2, rows), 3, keys).to(dtype)
    if inputs.alibi_slopes is not None:
        numbers = beside(torch.arange(p.length_k, device=p.device)[keys], query)
        distance = (places(p, inputs, rows).unsqueeze(-1) - numbers).abs().to(dtype)
        slopes = inputs.alibi_slopes.to(dtype)
        slopes = slopes.unsqueeze(2) if slopes.dim() == 2 else part_of(slopes, 2, rows)
        slopes = torch.where(slopes >= 0.0, slopes, math.nan)  # nobody may have looked at them
        s = s - slopes.unsqueeze(3) * distance
    s = torch.where(seen, s, -math.inf)
    return Scores(s, clean_q, clean_k, right, seen, products, scale, share, distance)


def with_sink(s: Tensor, inputs: Inputs) -> Tensor:
    """Scores, and behind them that of the sink, where there is one."""
    if inputs.sinks is None:
        return s
    sink = inputs.sinks.to(s.dtype)[:, :, None, None]
    return torch.cat([s, sink.expand(*s.shape[:3], 1)], dim=3)


def softmax(s: Tensor, inputs: Inputs) -> tuple[Tensor, Tensor | None]:
    """Probabilities of keys with these scores, and of the sink ``(batch, heads_q, rows, 1)``. Rows
    that see nothing have none."""
    count, s = s.shape[3], with_sink(s, inputs)
    hidden = s == -math.inf
    found = torch.softmax(torch.where(hidden.all(dim=3, keepdim=True), 0.0, s), dim=3)
    found = torch.where(hidden, 0.0, found)  # also in rows of NaN
    if inputs.sinks is None:
        return found, None
    return found[..., :count], found[..., count:]


def attended(weights: Tensor, value: Tensor) -> Tensor:
    """``weights @ value``, but what is not finite in a value reaches those rows alone that give its
    key a weight, and in the gradient nothing comes from rows that give none to any."""
    out = weights @ torch.where(value.isfinite(), value, 0.0)
    # How much of each row is on what is +inf, what is -inf, NaN being both, and on anything.
    beyond = [(value == sign * math.inf) | value.isnan() for sign in (1, -1)]
    asked = torch.cat([*beyond, torch.ones_like(beyond[0][..., :1])], dim=-1)
    reached = weights.detach() @ asked.to(weights.dtype)
    width = value.shape[-1]
    above, below, total = reached.split([width, width, 1], dim=-1)
    infinite = torch.where(above > 0.0, math.inf, 0.0) - torch.where(below > 0.0, math.inf, 0.0)
    return torch.where(total != 0.0, out + infinite.to(out.dtype), 0.0)


# Some at a time


class _Part(NamedTuple):
    """Some batch entries, key heads and queries, with the keys that these may see; ``heads`` are
    the query heads. ``problem`` and ``inputs`` are those of the entries and heads."""

    problem: Problem
    inputs: Inputs
    entries: slice
    heads_kv: slice
    heads: slice
    rows: slice
    keys: slice


def _parts(problem: Problem, inputs: Inputs) -> Iterator[_Part]:
    """All of them that see a key."""
    p, most = problem, CHUNK.get(problem.device.type, CHUNK["cpu"])
    known = inputs.ranges is None or inputs.ranges.device.type == "cpu"
    width = min(p.length_k, _widest(p, inputs) + ROWS) if known else p.length_k
    rows = min(p.length_q, ROWS)
    heads = _between(1, most // (p.gqa_group * rows * width), p.heads_kv)
    longest = p.length_q if width == p.length_k else rows
    rows = _between(1, most // (heads * p.gqa_group * width), longest)
    entries = 1
    if heads == p.heads_kv and rows == p.length_q:
        entries = _between(1, most // (heads * p.gqa_group * rows * width), p.batch)
    for b in _slices(p.batch, entries):
        for h in _slices(p.heads_kv, heads):
            group = slice(h.start * p.gqa_group, h.stop * p.gqa_group)
            own = cut(inputs, b, h, group)
            mine = dataclasses.replace(
                p,
                batch=b.stop - b.start,
                heads_kv=h.stop - h.start,
                heads_q=group.stop - group.start,
            )
            for r in _slices(p.length_q, rows):
                keys = span_of_keys(mine, own, r) if known else slice(0, p.length_k)
                if keys.stop > keys.start:
                    yield _Part(mine, own, b, h, group, r, keys)


def _between(least: int, number: int, most: int) -> int:
    return max(least, min(number, most))


def _slices(count: int, size: int) -> Iterator[slice]:
    for first in range(0, count, size):
        yield slice(first, min(first + size, count))


def _widest(problem: Problem, inputs: Inputs) -> int:
    """The most keys that a query may see, or more."""
    if inputs.ranges is not None:
        return max(0, int((inputs.ranges[1] - inputs.ranges[0]).max()))
    said = problem.scores
    if said.left < 0 or said.right < 0:
        return problem.length_k
    return said.left + said.right + 1


def _kept(part: _Part, whole: Problem) -> Tensor:
    """0 or ``1 / (1 - dropout_p)`` of each probability of a part, the same at every call. A few
    operations for each, by SplitMix64 (Steele, Lea, Flood 2014) of its number."""
    device, seed, p = whole.device, part.inputs.dropout_seed, whole.scores.dropout_p
    assert seed is not None

    def numbers(some: slice) -> Tensor:
        return torch.arange(some.start, some.stop, device=device)

    row = numbers(part.entries)[:, None] * whole.heads_q + numbers(part.heads)
    row = row[..., None] * whole.length_q + numbers(part.rows)
    x = row[..., None] * whole.length_k + numbers(part.keys)
    x.add_(1).mul_(_signed(0x9E3779B97F4A7C15)).add_(seed[:, None, None, None])
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x.bitwise_xor_((x >> shift).bitwise_and_(2 ** (64 - shift) - 1)).mul_(_signed(factor))
    x.bitwise_xor_((x >> 31).bitwise_and_(2**33 - 1))
    dropped = (x >> 32).bitwise_and_(2**32 - 1) < math.floor(p * 2**32)
    # Not by where(), of which two numbers are in float32.
    return (~dropped).to(whole.compute_dtype).mul_(1.0 / (1.0 - p))


def _signed(word: int) -> int:
    """64 bits as torch has them."""
    return word - 2**64 if word >= 2**63 else word


def whole(problem: Problem, inputs: Inputs) -> Tensor:
    """The output at once, with derivatives of any order and mode by autograd."""
    p = problem
    found, _ = softmax(scores(p, inputs, p.compute_dtype).scores, inputs)
    if p.scores.dropout_p:
        at = (p.batch, p.heads_kv, p.heads_q, p.length_q, p.length_k)
        found = found * _kept(_Part(p, inputs, *(slice(0, n) for n in at)), p)
    found = found.to(p.dtype).unflatten(1, (p.heads_kv, p.gqa_group))
    return attended(found, inputs.value.unsqueeze(2)).flatten(1, 2)


# As backends have it


def forward(problem: Problem, inputs: Inputs, config: Config, saved_bytes: int = -1) -> Forward:
    """See :meth:`adasplash2.contract.Backend.forward`; there is no threshold, and nothing is
    saved."""
    p = problem
    rows = p.batch, p.heads_q, p.length_q
    out = inputs.query.new_zeros((*rows, p.head_dim_v))
    with torch.no_grad(), torch.autocast(p.device.type, enabled=False):
        for part in _parts(p, inputs):
            s = scores(part.problem, part.inputs, p.compute_dtype, part.rows, part.keys).scores
            found, _ = softmax(s, part.inputs)
            if p.scores.dropout_p:
                found = found * _kept(part, p)
            found = found.to(p.dtype).unflatten(1, (-1, p.gqa_group))
            value = part.inputs.value[:, :, None, part.keys]
            out[part.entries, part.heads, part.rows] = attended(found, value).flatten(1, 2)
    tau = out.new_zeros(rows, dtype=p.compute_dtype)
    return Forward(out, tau, out.new_empty(max(saved_bytes, 0), dtype=torch.uint8))


def backward(
    problem: Problem, inputs: Inputs, kept: Kept, grad_out: Tensor, config: Config,
    wanted: Collection[str] = (),
) -> Gradients:  # fmt: skip
    """See :meth:`adasplash2.contract.Backend.backward`. Sums over queries are in the compute
    dtype."""
    p, compute = problem, problem.compute_dtype
    query, key, value = (t.new_zeros(t.shape, dtype=compute) for t in inputs.tensors())
    rows = p.batch, p.heads_q, p.length_q
    others: dict[str, Tensor] = {}
    for name in wanted:
        operand = getattr(inputs, name)
        shape = operand.shape if name == "attn_mask" else rows
        others[name] = operand.new_zeros(shape, dtype=compute)
    with torch.no_grad(), torch.autocast(p.device.type, enabled=False):
        for part in _parts(p, inputs):
            found = _gradients(part, p, grad_out[part.entries, part.heads, part.rows], wanted)
            query[part.entries, part.heads, part.rows] = found.query
            key[part.entries, part.heads_kv, part.keys] += found.key
            value[part.entries, part.heads_kv, part.keys] += found.value
            for name, whole_gradient in others.items():
                of_part = getattr(found, name)
                if name == "attn_mask":
                    at = (part.entries, part.heads, part.rows, part.keys)
                    for dim, some in enumerate(at):
                        whole_gradient = part_of(whole_gradient, dim, some)
                    whole_gradient += of_part.sum_to_size(whole_gradient.shape)
                else:
                    whole_gradient[part.entries, part.heads, part.rows] = of_part
    return Gradients(*(t.to(p.dtype) for t in (query, key, value)), **others)


def _gradients(
    part: _Part, problem: Problem, grad_out: Tensor, wanted: Collection[str]
) -> Gradients:
    """Of a part, in the compute dtype: with ``p`` the probabilities and ``dp`` their gradients,
    those of scores are ``p (dp - sum p dp)``."""
    group, compute = problem.gqa_group, problem.compute_dtype
    made = scores(part.problem, part.inputs, compute, part.rows, part.keys)
    p, sink = softmax(made.scores, part.inputs)
    kept = _kept(part, problem) if problem.scores.dropout_p else None
    weights = p if kept is None else p * kept
    value = part.inputs.value[:, :, None, part.keys].to(compute)
    finite = value.isfinite()
    # Rows that give no weight to any key feel nothing, whatever comes for them.
    grad = torch.where(weights.sum(3, keepdim=True) != 0.0, grad_out.to(compute), 0.0)
    grad = grad.unflatten(1, (-1, group))
    dp = (grad @ torch.where(finite, value, 0.0).mT).flatten(1, 2)
    if kept is not None:
        dp = dp * kept
    hidden = made.scores == -math.inf
    dp = torch.where(hidden, 0.0, dp)
    delta = (p * dp).sum(3, keepdim=True)
    ds = torch.where(hidden, 0.0, p * (dp - delta))
    others: dict[str, Tensor] = {}
    if "attn_mask" in wanted:
        others["attn_mask"] = ds
    if "alibi_slopes" in wanted:
        assert made.distance is not None
        others["alibi_slopes"] = -(ds * made.distance).sum(3)
    if "sinks" in wanted:
        assert sink is not None
        others["sinks"] = torch.where(sink == 0.0, 0.0, -sink * delta).squeeze(3)
    if made.capped is not None:
        ds = ds * (1.0 - made.capped.square())
    if "scales" in wanted:
        others["scales"] = torch.where(ds == 0.0, 0.0, ds * made.products).sum(3)
    ds = (ds * made.scale).unflatten(1, (-1, group))
    ds = torch.where(made.right & made.seen.expand(hidden.shape).unflatten(1, (-1, group)), ds, 0.0)
    of_query = torch.where(
        part.inputs.query[:, :, part.rows].isfinite(), (ds @ made.key).flatten(1, 2), 0.0
    )
    of_key = (ds.mT @ made.query).sum(2)
    of_key = torch.where(part.inputs.key[:, :, part.keys].isfinite(), of_key, 0.0)
    of_value = (weights.unflatten(1, (-1, group)).mT @ grad).sum(2)
    of_value = torch.where(finite.squeeze(2), of_value, 0.0)
    return Gradients(of_query, of_key, of_value, **others)


def gradients(
    problem: Problem, inputs: Inputs, grad_out: Tensor, names: Sequence[str]
) -> tuple[Tensor, ...]:
    """Gradients of the named ``inputs``, with derivatives of their own."""

    def out_of(*tensors: Tensor) -> Tensor:
        return whole(problem, inputs._replace(**dict(zip(names, tensors, strict=True))))

    return pulled_back(out_of, [getattr(inputs, name) for name in names], grad_out)


def pulled_back(
    function: Callable[..., Any], tensors: Sequence[Tensor], grads: Any
) -> tuple[Tensor, ...]:
    """Gradients of ``tensors`` from those of what ``function`` makes of them, to be differentiated
    where autograd records; whether it looks at the tensors themselves does not matter."""
    if is_transformed():  # where no tensor may be told to require a gradient
        found: tuple[Tensor, ...] = torch.func.vjp(function, *tensors)[1](grads)
        return found
    again = torch.is_grad_enabled()
    with torch.enable_grad():
        own = [t.view_as(t) if again else t.detach() for t in tensors]
        own = [t.requires_grad_() for t in own]
        made = function(*own)
        return torch.autograd.grad(
            made, own, grads, create_graph=again, allow_unused=True, materialize_grads=True
        )
