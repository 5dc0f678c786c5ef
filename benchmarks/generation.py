"""Tokens a second of SmolLM2-135M that continues a long text, with our attention and with sdpa.

Each attention reads the text once into a cache of its own. Then they make a token in turns, so that
whatever else the machine does meets all of them. Weights and text come out of packages. On a GPU a
model of this size waits for its host: ``--graph`` replays a token's kernels as one CUDA graph.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Iterator
from typing import Any

import torch
from harness import command_line, tables
from harness.cases import ROOT
from torch import Tensor

from adasplash2.integrations import transformers as integration

sys.path.insert(0, str(ROOT / "examples"))

SPEECH = "1946-Truman-1"

WARM = 3
"""First tokens, which are not counted: what is compiled is, and then a graph can be captured."""


def main() -> int:
    parser = command_line.plain_parser(__doc__, json=False)
    add = parser.add_argument
    count = command_line.positive_int
    add("--context", type=count, default=8192, help="tokens at the end; default %(default)s")
    add("--tokens", type=count, default=32, help="of these, made here; default %(default)s")
    add("--alpha", type=float, default=1.5, help="default %(default)s")
    add("--cache", choices=("dynamic", "static"), default="dynamic", help="default %(default)s")
    add("--graph", action="store_true", help="a token is a CUDA graph; takes a static cache")
    dtypes = "float32", "bfloat16"
    add("--dtype", choices=dtypes, help="default: bfloat16 on a GPU, float32 on the CPU")
    options = command_line.parsed(parser)
    command_line.check_real_model(parser)
    if not WARM + 1 < options.tokens < options.context:
        parser.error(
            f"argument --tokens: must be above {WARM + 1} and below --context, got {options.tokens}"
        )
    if options.graph and (options.device, options.cache) != ("cuda", "static"):
        parser.error("argument --graph: needs --device cuda and --cache static")
    options.dtype = options.dtype or dtypes[options.device == "cuda"]
    report(options, *generate(parser, options))
    return 0


def generate(
    parser: argparse.ArgumentParser, options: argparse.Namespace
) -> tuple[dict[str, float], dict[str, list[float]]]:
    """Seconds of reading the text and of each token, by attention."""
    from real_model import load_model, read_speech

    tables.progress("loading SmolLM2-135M")
    model, tokenizer = load_model(options.device)
    model.to(getattr(torch, options.dtype))
    ids = read_speech(SPEECH, tokenizer, options.context - options.tokens, parser)
    ids = ids.to(options.device)
    model.set_attn_implementation("sdpa")
    ours = integration.apply(model, alpha=options.alpha).name
    reading, tokens, caches, steps = {}, {}, {}, {}
    for name in ("sdpa", ours):
        tables.progress(f"{name} reads {ids.shape[1]} tokens")
        caches[name] = cache = new_cache(model, options)
        model.set_attn_implementation(name)
        began = now(ids)
        token = step(model, ids, cache)
        reading[name] = now(ids) - began
        steps[name] = steps_of(model, token, cache, options.graph)
        tokens[name] = []
    for number in range(options.tokens):
        for name, one in steps.items():
            model.set_attn_implementation(name)
            began = now(ids)
            next(one)
            if number > WARM:  # nor is the one before which the graph is captured
                tokens[name].append(now(ids) - began)
    for name, cache in caches.items():
        if (length := int(cache.get_seq_length())) != options.context:
            raise SystemExit(f"{name}: {length} tokens in the cache, not {options.context}")
    return reading, tokens


def new_cache(model: Any, options: argparse.Namespace) -> Any:
    import transformers

    if options.cache == "dynamic":
        return transformers.DynamicCache(config=model.config)
    return transformers.StaticCache(config=model.config, max_cache_len=options.context)


def step(model: Any, tokens: Tensor, cache: Any) -> Tensor:
    """The next token."""
    with torch.no_grad():
        out = model(tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
    found: Tensor = out.logits[:, -1:].argmax(-1)
    return found


def steps_of(model: Any, token: Tensor, cache: Any, graph: bool) -> Iterator[Tensor]:
    """Token after token; of a graph, all behind the first ones."""
    if not graph:
        while True:
            yield (token := step(model, token, cache))
    stream = torch.cuda.Stream()
    for _ in range(WARM):
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            token = step(model, token, cache)
        torch.cuda.current_stream().wait_stream(stream)
        yield token
    token = token.clone()
    captured = torch.cuda.CUDAGraph()
    # Masks are told otherwise while nothing can be read: kernels for those may be loaded here.
    with torch.cuda.graph(captured, capture_error_mode="relaxed"):
        token.copy_(step(model, token, cache))
    while True:
        captured.replay()
        yield token


def now(tensor: Tensor) -> float:
    if tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)
    return time.perf_counter()


def report(
    options: argparse.Namespace, reading: dict[str, float], tokens: dict[str, list[float]]
) -> None:
    print(
        f"SmolLM2-135M, {options.dtype}, {options.cache} cache{', graph' * options.graph}, "
        f"context {options.context}, {options.device}, {options.threads} threads"
    )
    print(f"{'attention':<16} {'read, s':>8} {'ms a token':>11} {'tokens/s':>9} {'/ sdpa':>7}")
    first = statistics.median(tokens["sdpa"])
    for name, seconds in tokens.items():
        median = statistics.median(seconds)
        print(
            f"{name:<16} {reading[name]:>8.1f} {1e3 * median:>11.1f} {1 / median:>9.1f} "
            f"{first / median:>6.2f}x"
        )


if __name__ == "__main__":
    raise SystemExit(main())
