"""Scores of some queries against all keys, with torch's own operators: slow, plain, with gradients.

For what is looked at rather than trained on (:class:`adasplash2.auxiliary.AttentionAux`), for
weights that are asked for densely, and for softmax with what SDPA does not know. The kernels of the
backends do not use it.
"""

from __future__ import annotations

import contextlib
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from adasplash2 import ops
from adasplash2.problem import (
    ALL,
    Inputs,
    Problem,
    is_known_to_sdpa,
    part_of,
    places,
    seen_keys,
    unsupported,
)
from adasplash2.torch_fastpath import beside

SUPPORTED = (
    *("attn_mask", "dropout_p", "window", "causal_align", "softcap", "alibi_slopes", "sinks"),
    *("scale as a tensor", "alpha as a tensor", "lengths or packed sequences"),
)
"""Features of what is here."""


def scores(
    problem: Problem, inputs: Inputs, dtype: torch.dtype, rows: slice = ALL, keys: slice = ALL
) -> Tensor:
    """Scores of the queries ``rows`` and ``keys`` in ``dtype``, ``(batch, heads_q, rows, keys)``;
    -inf where a key may not be seen. See :class:`adasplash2.problem.ScoreTransform`."""
    if reasons := unsupported(problem, SUPPORTED):
        raise NotImplementedError("; ".join(reasons))
    p, said = problem, problem.scores
    query = inputs.query[:, :, rows].to(dtype).unflatten(1, (p.heads_kv, p.group_size))
    key = inputs.key[:, :, keys].to(dtype).unsqueeze(2)
    # What is not finite makes its own scores, and by zeros times it no others and no gradients.
    right_q, right_k = query.isfinite(), key.isfinite()
    s = torch.where(right_q, query, 0.0) @ torch.where(right_k, key, 0.0).mT
    right = right_q.all(-1, keepdim=True) & right_k.all(-1, keepdim=True).mT
    s = torch.where(right, s, query.detach() @ key.detach().mT).flatten(1, 2)
    # Before all factors: with a gradient of zero, what is not finite makes NaN of theirs.
    seen = seen_keys(p, inputs, rows, keys)
    s = torch.where(seen, s, 0.0)
    if inputs.scales is None:
        s = said.scale * s
    else:
        s = part_of(inputs.scales, 2, rows).to(dtype).unsqueeze(3) * s
    if said.softcap:
        s = said.softcap * torch.tanh(s / said.softcap)
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
    return torch.where(seen, s, -math.inf)


def probabilities(
    problem: Problem,
    inputs: Inputs,
    dtype: torch.dtype,
    rows: slice = ALL,
    keys: slice = ALL,
    backend: str = "",
) -> Tensor:
    """The probabilities of ``keys`` for the queries ``rows``, which see no others, shaped as
    :func:`scores`: dense, with gradients, without dropout. ``backend`` maps the rows."""
    p = problem
    s = scores(p, inputs, dtype, rows, keys)
    count = s.shape[3]
    if inputs.sinks is not None:
        sink = inputs.sinks.to(dtype)[:, :, None, None]
        s = torch.cat([s, sink.expand(*s.shape[:3], 1)], dim=3)
    hidden = s == -math.inf
    if p.alpha == 1.0:
        found = torch.softmax(torch.where(hidden.all(dim=3, keepdim=True), 0.0, s), dim=3)
    else:
        alphas = None if inputs.alphas is None else inputs.alphas.to(dtype)[:, :, None, None]
        found = ops.rows(s, p.alpha, -1, backend, alphas)
    return torch.where(hidden, 0.0, found)[..., :count]  # also in rows of NaN


def weights(problem: Problem, inputs: Inputs, backend: str = "") -> Tensor:
    """:func:`probabilities` in the compute dtype, as dropout leaves them."""
    found = probabilities(problem, inputs, problem.compute_dtype, backend=backend)
    return F.dropout(found, problem.scores.dropout_p)


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


def without_cudnn() -> contextlib.AbstractContextManager[None]:
    """SDPA takes what kernels it may, but not those of cuDNN: with a mask that hides a whole tile
    of keys their gradient of queries has NaN (torch 2.11)."""
    others = {
        SDPBackend.FLASH_ATTENTION: torch.backends.cuda.flash_sdp_enabled,
        SDPBackend.EFFICIENT_ATTENTION: torch.backends.cuda.mem_efficient_sdp_enabled,
        SDPBackend.MATH: torch.backends.cuda.math_sdp_enabled,
    }
    # What a graph would be made for is not known while it is traced.
    allowed = [one for one, may in others.items() if torch.compiler.is_compiling() or may()]
    return sdpa_kernel(allowed or [SDPBackend.MATH])


def softmax_attention(problem: Problem, inputs: Inputs, scale: float | None) -> Tensor:
    """Attention at alpha = 1: torch's SDPA where it knows all that is asked, else dense, with
    memory that grows by the product of the lengths. ``scale`` as the caller gave it."""
    said = problem.scores
    if is_known_to_sdpa(problem):
        mask = inputs.attn_mask
        # By a branch: of symbols of a trace a comparison is no bool.
        grouped: dict[str, Any] = {"enable_gqa": True} if problem.group_size > 1 else {}
        risky = mask is not None and problem.needs_grad and problem.device.type == "cuda"
        with without_cudnn() if risky else contextlib.nullcontext():
            return F.scaled_dot_product_attention(
                *inputs.tensors(),
                attn_mask=mask
                if mask is None or mask.dtype == torch.bool
                else mask.to(problem.dtype),
                dropout_p=said.dropout_p,
                is_causal=said.is_causal,
                scale=scale,
                **grouped,
            )
    p = weights(problem, inputs)
    p = p.to(problem.dtype).unflatten(1, (problem.heads_kv, problem.group_size))
    return attended(p, inputs.value.unsqueeze(2)).flatten(1, 2)
