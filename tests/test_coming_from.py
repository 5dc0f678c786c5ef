"""What the page "Coming from" tells users to write is what they had: both halves of each block run,
and where the first is softmax the second does the same with ``alpha=1``."""

from __future__ import annotations

import ast
import functools
import math
import re
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import adasplash2

PAGE = (Path(__file__).resolve().parent.parent / "docs/coming_from.md").read_text()
BLOCK = re.compile(r"^## ([\w.-]+)\n.*?```python\n# before\n(.*?)# after\n(.*?)```", re.M | re.S)
BLOCKS = {name: (before, after) for name, before, after in BLOCK.findall(PAGE)}

SOFTMAX = ("SDPA", "flash-attn", "FlexAttention", "torch.nn.MultiheadAttention")

# What the blocks name: sizes at which windows, alignment and softcap matter.
BATCH, HEADS, LENGTH, WIDTH = 2, 4, 300, 16


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def three(*shape: int) -> dict[str, Tensor]:
    q, k, v = 4.0 * normal(*shape), normal(*shape).flip(-2), normal(*shape).flip(-1)
    return {"q": q, "k": k, "v": v}


def mask() -> Tensor:
    return normal(BATCH, HEADS, LENGTH, LENGTH) < 0.5


def of_adasplash() -> dict[str, Any]:
    lengths = torch.tensor([LENGTH, 33], dtype=torch.int32)
    return {**three(BATCH, HEADS, LENGTH, WIDTH), "lengths": lengths}


def of_entmax() -> dict[str, Any]:
    alphas = torch.tensor([1.2, 1.4, 1.6, 1.9])
    tensors = three(BATCH, HEADS, LENGTH, WIDTH)
    return {**tensors, "x": normal(5, 40), "mask": mask(), "alphas": alphas}


def of_sdpa() -> dict[str, Any]:
    return {**three(BATCH, HEADS, LENGTH, WIDTH), "mask": mask()}


def of_flash_attn() -> dict[str, Any]:
    cu_seqlens_q = torch.tensor([0, 40, 40, 70], dtype=torch.int32)
    cu_seqlens_k = torch.tensor([0, 50, 60, 70], dtype=torch.int32)
    return {
        "q": 20.0 * normal(BATCH, LENGTH, HEADS, WIDTH),
        "k": normal(BATCH, LENGTH + 30, HEADS // 2, WIDTH),
        "v": normal(BATCH, LENGTH + 30, HEADS // 2, WIDTH).flip(1),
        "slopes": torch.tensor([0.0, 0.1, 0.01, 1.0]),
        "all_q": normal(70, HEADS, WIDTH),
        "all_k": normal(70, HEADS // 2, WIDTH),
        "all_v": normal(70, HEADS // 2, WIDTH).flip(1),
        "cu_seqlens_q": cu_seqlens_q,
        "cu_seqlens_k": cu_seqlens_k,
        "max_q": 40,
        "max_k": 50,
    }


def of_flex_attention() -> dict[str, Any]:
    tensors = three(1, HEADS, LENGTH, WIDTH)
    document = torch.repeat_interleave(torch.arange(3), torch.tensor([265, 30, 5]))
    return {**tensors, "document": document, "slopes": torch.tensor([0.0, 0.1, 0.01, 1.0])}


def of_multihead_attention() -> dict[str, Any]:
    torch.manual_seed(0)
    return {
        "mha": torch.nn.MultiheadAttention(HEADS * WIDTH, HEADS, batch_first=True),
        "x": normal(BATCH, LENGTH, HEADS * WIDTH),
        "padding": torch.arange(LENGTH) >= torch.tensor([[LENGTH], [33]]),
        "hidden": torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1),
    }


NAMES: dict[str, Callable[[], dict[str, Any]]] = {
    "adasplash": of_adasplash,
    "entmax": of_entmax,
    "SDPA": of_sdpa,
    "flash-attn": of_flash_attn,
    "FlexAttention": of_flex_attention,
    "torch.nn.MultiheadAttention": of_multihead_attention,
}


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
) -> Tensor:
    """What flash-attn's documentation says of it: its kernels need a GPU."""
    assert not dropout_p
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))
    s = q @ k.mT * (q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale)
    s = softcap * torch.tanh(s / softcap) if softcap else s
    at = torch.arange(q.shape[2])[:, None] + k.shape[2] - q.shape[2]
    keys = torch.arange(k.shape[2])
    if alibi_slopes is not None:
        s = s - alibi_slopes[:, None, None] * (at - keys).abs()
    left, right = window_size[0], 0 if causal else window_size[1]
    hidden = torch.zeros(s.shape[2:], dtype=torch.bool)
    hidden |= (keys < at - left) if left >= 0 else hidden
    hidden |= (keys > at + right) if right >= 0 else hidden
    p = torch.softmax(s.masked_fill(hidden, -math.inf), dim=-1).nan_to_num(0.0)
    return (p @ v).transpose(1, 2)


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    **said: Any,
) -> Tensor:
    pieces = zip(
        q.tensor_split(cu_seqlens_q[1:-1].long()),
        k.tensor_split(cu_seqlens_k[1:-1].long()),
        v.tensor_split(cu_seqlens_k[1:-1].long()),
        strict=True,
    )
    return torch.cat([flash_attn_func(*(t[None] for t in piece), **said)[0] for piece in pieces])


def results(code: str, name: str, library: Any = adasplash2) -> dict[str, Any]:
    """What ``code`` leaves in ``out``, ``p`` and ``packed``."""
    given = {"torch": torch, "adasplash2": library, **NAMES[name]()}
    with torch.no_grad():
        exec(compile(code, name, "exec"), given)
    return {key: given[key] for key in ("out", "p", "packed") if key in given}


def test_every_block_is_run() -> None:
    assert list(BLOCKS) == list(NAMES)
    assert PAGE.count("```python") == len(BLOCKS)
    for before, _ in BLOCKS.values():  # adasplash needs a GPU, flash-attn too: these must parse
        ast.parse(before)


@pytest.mark.parametrize("name", NAMES)
def test_what_comes_after_runs(name: str) -> None:
    for result in results(BLOCKS[name][1], name).values():
        for tensor in result if isinstance(result, tuple) else (result,):
            assert tensor.isfinite().all()
            assert tensor.any()


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("name", SOFTMAX)
def test_softmax_is_what_it_was(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    flash_attn: Any = types.ModuleType("flash_attn")
    flash_attn.flash_attn_func = flash_attn_func
    flash_attn.flash_attn_varlen_func = flash_attn_varlen_func
    monkeypatch.setitem(sys.modules, "flash_attn", flash_attn)
    softmax = types.SimpleNamespace(
        entmax_attention=functools.partial(adasplash2.entmax_attention, alpha=1.0),
        entmax_attention_varlen=functools.partial(adasplash2.entmax_attention_varlen, alpha=1.0),
        nn=types.SimpleNamespace(
            EntmaxMultiheadAttention=functools.partial(
                adasplash2.nn.EntmaxMultiheadAttention, alpha=1.0
            )
        ),
    )
    before, after = BLOCKS[name]
    expected = results(before, name)
    assert expected
    torch.testing.assert_close(results(after, name, softmax), expected, rtol=1e-4, atol=1e-5)


def test_entmax_is_what_it_was() -> None:
    before, after = BLOCKS["entmax"]
    expected = results(before, "entmax")
    torch.testing.assert_close(results(after, "entmax"), expected, rtol=1e-4, atol=1e-5)
