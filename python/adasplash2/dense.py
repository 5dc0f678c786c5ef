"""Probabilities of some queries and keys, dense; and softmax, alpha = 1, by what of torch it suits.

Probabilities are for what is looked at rather than trained on
(:class:`adasplash2.auxiliary.AttentionAux`), and for weights that are asked for densely: slow,
plain, with gradients. The kernels of the backends do not use them.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from adasplash2 import ops, softmax
from adasplash2.lowering import Packed
from adasplash2.options import Options
from adasplash2.problem import (
    ALL,
    Inputs,
    Problem,
    is_known_to_sdpa,
    unsupported,
    validated,
)
from adasplash2.torch_fastpath import is_forward_mode, is_transformed, private


def probabilities(
    problem: Problem,
    inputs: Inputs,
    dtype: torch.dtype,
    rows: slice = ALL,
    keys: slice = ALL,
    backend: str = "",
) -> Tensor:
    """The probabilities of ``keys`` for the queries ``rows``, which see no others, shaped as
    :func:`softmax.scores`: dense, with gradients, without dropout. ``backend`` maps the rows."""
    p = problem
    s = softmax.scores(p, inputs, dtype, rows, keys).scores
    if p.alpha == 1.0:
        return softmax.softmax(s, inputs)[0]
    count, s = s.shape[3], softmax.with_sink(s, inputs)
    hidden = s == -math.inf
    alphas = None if inputs.alphas is None else inputs.alphas.to(dtype)[:, :, None, None]
    found = ops.rows(s, p.alpha, -1, backend, alphas)
    return torch.where(hidden, 0.0, found)[..., :count]  # also in rows of NaN


def weights(problem: Problem, inputs: Inputs, backend: str = "") -> Tensor:
    """:func:`probabilities` in the compute dtype, as dropout leaves them."""
    found = probabilities(problem, inputs, problem.compute_dtype, backend=backend)
    return F.dropout(found, problem.scores.dropout_p)


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


def softmax_attention(
    problem: Problem, inputs: Inputs, options: Options, packed: Packed | None = None
) -> Tensor:
    """Attention at alpha = 1: torch's SDPA where it knows all that is asked, of each sequence where
    some are ``packed`` at places that are known, or torch's kernel for these; else
    :mod:`adasplash2.softmax`. Memory grows by the lengths, not by their product."""
    if reasons := unsupported(problem, softmax.SUPPORTED):
        raise NotImplementedError("; ".join(reasons))
    if is_known_to_sdpa(problem):
        return _sdpa(problem, inputs, options)
    if packed is not None and is_by_sequence(problem, packed):
        return _by_sequence(inputs, packed)
    if (attend := varlen_of_torch(problem, options, packed)) is not None:
        return attend(inputs)
    if is_forward_mode():  # which no operator of ours knows
        return softmax.whole(problem, inputs)
    return ops.softmax_attention(problem, inputs, options)


FUSED_MULTIPLE = 8
"""Of what sizes of heads torch's fused kernels for GPUs are made, in every dtype."""


def _sdpa(problem: Problem, inputs: Inputs, options: Options) -> Tensor:
    mask, said = inputs.attn_mask, problem.scores
    query, key, value = inputs.tensors()
    head_dim_v, scale = value.shape[-1], options.scale
    grouped: dict[str, Any] = {}
    on_gpu = problem.device.type == "cuda"
    if on_gpu:
        query, key, value = map(_fused_operand, (query, key, value))
        if query.shape[-1] != inputs.query.shape[-1]:
            scale = said.scale  # by the head_dim that was given
    if mask is not None:
        mask = _once(mask)
        if on_gpu and mask.stride(-1) != 1:
            mask = mask.contiguous()  # as these kernels take it
        if mask.dtype != torch.bool:
            mask = mask.to(problem.dtype)
    if problem.gqa_group > 1:  # by a branch: of symbols of a trace a comparison is no bool
        if on_gpu and (mask is not None or problem.dtype.itemsize > 2):
            # Not every GPU has a kernel that shares heads of keys here, but for that which makes a
            # matrix of all scores.
            key, value = (t.repeat_interleave(problem.gqa_group, dim=1) for t in (key, value))
        else:
            grouped["enable_gqa"] = True
    risky = mask is not None and problem.needs_grad and on_gpu
    with without_cudnn() if risky else contextlib.nullcontext():
        out = F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=mask,
            dropout_p=said.dropout_p,
            is_causal=said.is_causal,
            scale=scale,
            **grouped,
        )
    return out if out.shape[-1] == head_dim_v else out[..., :head_dim_v]


def _fused_operand(tensor: Tensor) -> Tensor:
    """As torch's fused kernels for GPUs take queries, keys and values: of others SDPA makes all
    scores in memory."""
    if missing := -tensor.shape[-1] % FUSED_MULTIPLE:
        return F.pad(tensor, (0, missing))
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _once(mask: Tensor) -> Tensor:
    """A mask without what it says again for other sequences, heads or queries, which a copy would
    make anew for each. What has a gradient is kept as it is."""
    if not mask.requires_grad:
        for dim, stride in enumerate(mask.stride()[:-1]):
            mask = mask.narrow(dim, 0, 1) if stride == 0 else mask
    return mask


_OF_SEQUENCES = ("lengths or packed sequences", "dropout_p")
"""What SDPA computes of packed sequences that lie at known places."""


def is_by_sequence(problem: Problem, packed: Packed) -> bool:
    """Whether each of some packed sequences is a call of SDPA."""
    options = packed.options
    return (
        packed.places is not None
        and not unsupported(problem, _OF_SEQUENCES)
        and (options.window_left, options.window_right) == (-1, -1)
    )


def _by_sequence(inputs: Inputs, packed: Packed) -> Tensor:
    """A call for each of some packed sequences."""
    assert packed.places is not None
    of_queries, of_keys = packed.places
    # Whole splits, whose gradients are put together at once.
    queries = inputs.query.split(of_queries, dim=2)
    keys, values = (t.split(of_keys, dim=2)[1::2] for t in inputs.tensors()[1:])
    outs = []
    for own in zip(queries, keys, values, strict=True):
        mine, options = Inputs(*own), packed.options
        if options.dropout_p:  # SDPA's own
            mine = mine._replace(dropout_seed=inputs.dropout_seed)
        needs_grad = torch.is_grad_enabled() and any(t.requires_grad for t in own)
        problem = validated(mine, options, needs_grad)
        if problem.is_empty:
            # Zeros that autograd knows: all sequences may be so.
            outs.append(softmax.whole(problem, mine))
        else:
            outs.append(softmax_attention(problem, mine, options))
    return torch.cat(outs, dim=2)


HALVES = torch.bfloat16, torch.float16


def varlen_of_torch(
    problem: Problem, options: Options, packed: Packed | None
) -> Callable[[Inputs], Tensor] | None:
    """torch's kernel for packed sequences and windows, a FlashAttention, on a GPU, where it
    computes all that is asked; else None. It aligns at the bottom right, and its keys lie one
    behind another. Nothing waits for the device: where nobody has said how long the longest
    sequence is, it may be as long as all. Graphs, which cannot look for it, do without."""
    p, said = problem, options if packed is None else packed.options
    placed = said.is_causal or (said.window_left, said.window_right) != (-1, -1)
    is_self = p.length_q == p.length_k if packed is None else packed.sequences.is_self()
    if (
        torch.compiler.is_compiling()
        or is_transformed()
        or not has_flash(p.device)
        or p.dtype not in HALVES
        or p.head_dim != p.head_dim_v
        or p.head_dim % 8
        or p.is_empty
        or unsupported(p, _VARLEN)
        or (packed is None) != (p.operand("ranges") is None)
        or (packed is not None and packed.sequences.cu_seqlens_k is None)
        or (placed and said.causal_align != "bottom-right" and not is_self)
    ):
        return None
    kernel, knows_groups = _torch_varlen()
    if kernel is None or (p.gqa_group > 1 and not knows_groups):
        return None
    right = 0 if said.is_causal else said.window_right
    named: dict[str, Any] = {"scale": said.scale, "window_size": (said.window_left, right)}
    if p.gqa_group > 1:
        named["enable_gqa"] = True

    def attend(inputs: Inputs) -> Tensor:
        tensors = (t.transpose(1, 2).flatten(0, 1) for t in inputs.tensors())
        tensors = (t if t.stride(2) == 1 else t.contiguous() for t in tensors)
        longest = p.length_q, p.length_k
        if packed is None:
            each = torch.arange(p.batch + 1, dtype=torch.int32, device=p.device)
            places: tuple[Tensor | None, ...] = each * p.length_q, each * p.length_k
        else:
            places = packed.sequences.cu_seqlens_q, packed.sequences.cu_seqlens_k
            said_q, said_k = packed.longest
            longest = (
                longest[0] if said_q is None else said_q,
                longest[1] if said_k is None else said_k,
            )
        out: Tensor = kernel(*tensors, *places, *longest, **named)
        by_entry: Tensor = out.unflatten(0, (p.batch, p.length_q))
        return by_entry.transpose(1, 2)

    return attend


def has_flash(device: torch.device) -> bool:
    """Whether torch's FlashAttention runs there."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)


_VARLEN = ("lengths or packed sequences", "window", "causal_align")


@functools.cache
def _torch_varlen() -> tuple[Any, bool]:
    """``torch.nn.attention.varlen.varlen_attn``, None where it is not what is called here, and
    whether it lets query heads share key heads. Not looked for before it is needed: its module
    takes seconds to import."""
    kernel = private("nn.attention.varlen.varlen_attn")
    if kernel is None:
        return None, False
    taken = inspect.signature(kernel).parameters
    if not {"window_size", "scale", "max_q", "max_k"} <= taken.keys():
        return None, False
    return kernel, "enable_gqa" in taken
