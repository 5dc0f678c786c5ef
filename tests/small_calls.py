"""A few small calls of the cuda backend for compute-sanitizer: lists, dense tiles, both scans, keys
that hundreds of queries keep, values that are not finite, blocks that work on several items."""

from __future__ import annotations

from unittest import mock

import torch

import adasplash2
from adasplash2.backends.cuda import attention


def call(length: int, head_dim: int, sharpness: float, is_causal: bool, dtype: torch.dtype) -> None:
    query, key, value = (
        torch.randn(1, 2, length, head_dim, device="cuda", dtype=dtype) for _ in range(3)
    )
    if sharpness == 4.0:  # the first key is a sink
        query[..., 0], key[:, :, 0, 0] = 4.0, 16.0
    if sharpness == 0.05:  # what dense tiles make of it is done again
        value[:, 0, length // 2, 3], key[:, 1, 5, 0] = torch.nan, -torch.inf
    inputs = [x.requires_grad_() for x in (query * sharpness, key, value)]
    out = adasplash2.entmax_attention(*inputs, is_causal=is_causal, backend="cuda")
    torch.autograd.grad(out, inputs, torch.randn_like(out))


torch.manual_seed(0)
call(200, 64, 1.0, True, torch.bfloat16)
call(160, 64, 0.05, False, torch.bfloat16)
call(600, 64, 0.05, True, torch.bfloat16)
call(1100, 64, 4.0, True, torch.bfloat16)
call(1100, 64, 0.05, True, torch.bfloat16)
call(130, 33, 4.0, True, torch.float16)
call(130, 32, 1.0, False, torch.float32)
with mock.patch.object(attention.Plan, "_multiprocessors", 1):  # as if problems were far larger
    call(600, 64, 0.05, False, torch.bfloat16)
    call(600, 64, 4.0, False, torch.bfloat16)
torch.cuda.synchronize()
print("done")
