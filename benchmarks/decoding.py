"""Few queries against a long cache of keys, beside torch's scaled_dot_product_attention.

Calls of one shape are timed in turn. On the CPU the least of the times is told, which other work
on the machine disturbs least; on a GPU the median of what a replay of a CUDA graph takes, as a loop
that decodes does it, and for one of them (``eager``) of what its launches take without. What is
judged is the ratio to the fastest of SDPA's backends, and that of pages to a cache that lies in one
piece; on a GPU also that to the time in which it reads, once, the keys and those values that have a
probability.

Beside Gaussian keys those of SmolLM2-135M, whose tensors ``long_text.py`` makes at any length, with
the model's own heads.
"""

from __future__ import annotations

import argparse
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from data import REAL_HEAD_DIM, REAL_HEADS, REAL_HEADS_KV, REAL_LAYERS
from harness import command_line, records, tables, timing
from harness.targets import Target
from long_text import LongText
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import adasplash2

KEYS = {"cpu": [16_384], "cuda": [8192, 131_072, 1_048_576]}
DTYPES = {"cpu": ["float32", "bfloat16"], "cuda": ["bfloat16"]}
HEAD_DIMS = {"cpu": [64, 128], "cuda": [128]}
BATCHES = {"cpu": [1], "cuda": [1, 16]}
HEADS = {"cpu": (8, 8), "cuda": (32, 8)}
"""Of queries, and of keys."""

QUERIES = [1, 4, 16]
SHARPNESS = {"cpu": [1.0, 4.0, 0.25], "cuda": [1.0, 4.0, 0.01]}
"""Standard deviations of Gaussian scores."""

FLAT = 0.1
"""Sharpness up to which rows keep so many keys that values are read as SDPA reads them: on a GPU,
which both are bound by, their ratio to SDPA is told and not judged."""

PAGES = [64]
MOST_BYTES = 32 << 30
"""Of keys and values: larger shapes are left out."""

OF_SDPA, OF_PAGES, OF_READING = 0.7, 1.15, 1.25
READ_FROM = 131_072
"""Keys from which a call is held to OF_READING: below, launches take longer than that."""

FUSED = SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION
SDPA = {"cpu": (*FUSED, SDPBackend.MATH), "cuda": FUSED}
"""On a GPU the last one copies keys for each head that shares them."""


class Shape(NamedTuple):
    dtype: str
    heads: int
    heads_kv: int
    head_dim: int
    layer: int | None  # of the real model; None for Gaussian tensors
    batch: int
    keys: int
    queries: int

    def __str__(self) -> str:
        data = "" if self.layer is None else f", SmolLM2 layer {self.layer}"
        return (
            f"{self.dtype} batch {self.batch}, {self.heads_kv} heads, {self.keys:,} keys, "
            f"d {self.head_dim}, {self.queries} queries{data}"
        )

    def sharpness(self, device: str) -> list[float]:
        return SHARPNESS[device] if self.layer is None else [1.0]


def shapes(options: argparse.Namespace) -> Iterator[Shape]:
    """Gaussian ones, then those of the real model."""
    device = options.device
    heads, heads_kv = HEADS[device]
    kinds: list[tuple[int, int, int, int | None]] = [
        (heads, at, width, None)
        for at, width in itertools.product(options.heads_kv or [heads_kv], HEAD_DIMS[device])
    ]
    kinds += [(REAL_HEADS, REAL_HEADS_KV, REAL_HEAD_DIM, layer) for layer in options.real_layers]
    for kind, dtype, batch, keys, queries in itertools.product(
        kinds,
        DTYPES[device],
        BATCHES[device],
        options.keys or KEYS[device],
        options.queries or QUERIES,
    ):
        shape = Shape(dtype, *kind, batch, keys, queries)
        element = getattr(torch, dtype).itemsize
        if 2 * batch * shape.heads_kv * keys * shape.head_dim * element <= MOST_BYTES:
            yield shape


def read_text(
    parser: argparse.ArgumentParser, options: argparse.Namespace
) -> tuple[LongText | None, str]:
    """The real model's tensors, as many as shapes ask for; or None, and why."""
    wanted = [shape.batch * shape.keys for shape in shapes(options) if shape.layer is not None]
    if not wanted:
        return None, ""
    if reason := command_line.missing_real_model():
        return None, reason
    try:
        return LongText(max(wanted), options.real_layers, options.device), ""
    except ValueError as error:
        parser.error(f"argument --real-layers: {error}")


def in_pages(cache: Tensor, page: int) -> Tensor:
    """``(batch, heads, keys, head_dim)`` as ``(pages, page_size, heads, head_dim)``."""
    pages = cache.unflatten(2, (-1, page)).permute(0, 2, 3, 1, 4)
    return pages.flatten(0, 1).contiguous()


class Measured(NamedTuple):
    """Times of all calls and, on a GPU, the share of values that have a probability, by name."""

    timings: dict[str, timing.Timing]
    shares: dict[str, float]

    def told(self, device: str) -> dict[str, float]:
        kind = "lowest" if device == "cpu" else "median"
        return {name: float(getattr(t, kind)) for name, t in self.timings.items()}

    def best(self, device: str) -> str:
        """The fastest of SDPA's backends."""
        times = self.told(device)
        return min((name for name in times if name.startswith("sdpa")), key=times.__getitem__)


Calls = dict[str, Callable[[], object]]


def sdpa_calls(query: Tensor, key: Tensor, value: Tensor) -> Calls:
    """Those that take the tensors: as they are or, where heads share keys, as views in which each
    key head is a sequence of its own."""
    heads_kv = key.shape[1]
    group = query.shape[1] // heads_kv
    grouped = query.unflatten(1, (heads_kv, group)).flatten(0, 1)
    keys, values = (t.flatten(0, 1)[:, None].expand(-1, group, -1, -1) for t in (key, value))

    def calling(backend: SDPBackend, *tensors: Tensor, **said: bool) -> Callable[[], object]:
        def call() -> Tensor:
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(*tensors, **said)

        return call

    found = {}
    for backend in SDPA[query.device.type]:
        name = f"sdpa {backend.name.partition('_')[0].lower()}"
        ways = {name: calling(backend, query, key, value, enable_gqa=True)}
        if group > 1:
            ways[f"{name} views"] = calling(backend, grouped, keys, values)
        for way, call in ways.items():
            try:
                call()
            except RuntimeError:  # it says why in warnings
                continue
            found[way] = call
    return found


def reading_calls(key: Tensor) -> Calls:
    """What reads all keys once."""
    if key.device.type == "cpu":
        return {"sum of K": key.sum}
    wide = key.view(torch.float32)  # whose sum is bound by memory alone
    return {"sum of K": wide.sum, "max of K": wide.amax}


def replayed(call: Callable[[], object]) -> Callable[[], object]:
    """The call as a CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = call()

    def replay() -> object:
        """It needs what the call holds: a graph knows addresses alone."""
        graph.replay()
        return call, kept

    return replay


def share_of_values(query: Tensor, key: Tensor, tau: Tensor, alpha: float) -> float:
    """How many of the rows of the values have a probability for one of the rows that share them,
    as thresholds of ``(alpha - 1)`` times the scores say."""
    batch, heads_kv, length, width = key.shape
    factor = (alpha - 1.0) / math.sqrt(width)
    rows = query.reshape(batch, heads_kv, -1, width).float() * factor
    limits = tau.reshape(batch, heads_kv, -1)
    kept = 0
    for b, h in itertools.product(range(batch), range(heads_kv)):
        for keys in key[b, h].split(65_536):
            z = keys.float() @ rows[b, h].mT
            kept += int((z > limits[b, h]).any(dim=-1).sum())
    return kept / (batch * heads_kv * length)


def cached(
    query: Tensor, key: Tensor, value: Tensor, page: int, said: dict[str, Any]
) -> Callable[[], object]:
    """Of a copy of the cache, in pages or, where ``page`` is 0, in one piece: what no other call
    has brought near the processor."""
    batch, keys = key.shape[0], key.shape[2]
    lengths = torch.full((batch,), keys, dtype=torch.int32, device=key.device)
    held = [in_pages(t, page) if page else t.clone() for t in (key, value)]
    table = None
    if page:
        numbers = torch.arange(batch * keys // page, dtype=torch.int32, device=key.device)
        table = numbers.view(batch, -1)
    return lambda: adasplash2.entmax_attention_with_kvcache(
        query, *held, cache_lengths=lengths, block_table=table, **said
    )


def tensors_of(shape: Shape, device: str, text: LongText | None) -> tuple[Tensor, ...]:
    """Query, key and value."""
    dtype = getattr(torch, shape.dtype)
    if text is not None and shape.layer is not None:
        return text.tensors(shape.layer, shape.batch, shape.keys, shape.queries, dtype)
    torch.manual_seed(0)
    return tuple(
        torch.randn(shape.batch, heads, length, shape.head_dim, device=device, dtype=dtype)
        for heads, length in (
            (shape.heads, shape.queries), *[(shape.heads_kv, shape.keys)] * 2,
        )
    )  # fmt: skip


def measured(shape: Shape, options: argparse.Namespace, text: LongText | None) -> Measured:
    device, backend, alpha = options.device, options.backend, options.alpha
    query, key, value = tensors_of(shape, device, text)
    said: dict[str, Any] = {"alpha": alpha, "backend": backend}

    def entmax(sharpness: float = 1.0, **more: Any) -> Callable[[], object]:
        sharp = query * sharpness
        return lambda: adasplash2.entmax_attention(
            sharp, key, value, enable_gqa=True, **said, **more
        )

    sdpa = sdpa_calls(query, key, value)
    ours = {f"c {c:g}": entmax(c) for c in shape.sharpness(device)}
    ours["causal"] = entmax(is_causal=True, causal_align="bottom-right")
    pages = [page for page in options.pages if shape.keys % page == 0]
    if pages:
        ours["copy"] = cached(query, key, value, 0, said)
    ours |= {f"page {page}": cached(query, key, value, page, said) for page in pages}
    shares = {}
    with torch.no_grad():
        if device == "cuda":
            eager = ours["c 1"]
            sdpa, ours = (
                {name: replayed(call) for name, call in calls.items()} for calls in (sdpa, ours)
            )
            ours["eager"] = eager
            for c in shape.sharpness(device):
                tau = adasplash2.attention_stats(query * c, key, value, enable_gqa=True, **said).tau
                shares[f"c {c:g}"] = share_of_values(query * c, key, tau, alpha)
        calls = sdpa | reading_calls(key) | ours
        return Measured(timing.side_by_side(calls, device, options.rounds), shares)


def judged(shape: Shape, found: Measured, options: argparse.Namespace) -> Iterator[Target]:
    """What holds of one shape."""
    device = options.device
    times = found.told(device)
    best = found.best(device)
    sharp = [c for c in shape.sharpness(device) if device == "cpu" or c > FLAT]
    for name in [*(f"c {c:g}" for c in sharp), "causal"]:
        yield Target(f"{shape}, {name}", "x SDPA", times[name] / times[best], OF_SDPA)
    for name in [f"page {page}" for page in options.pages]:
        if name in times:
            of_pages = times[name] / times["copy"]
            yield Target(f"{shape}, {name}", "x one piece", of_pages, OF_PAGES)
    if shape.keys >= READ_FROM:
        reading = min(times["sum of K"], times["max of K"]) if found.shares else math.nan
        for name, share in found.shares.items():
            least = reading * (1.0 + share)
            yield Target(f"{shape}, {name}", "x reading", times[name] / least, OF_READING)


def main() -> None:
    parser = command_line.plain_parser(__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--backend", help="to measure; default: the dispatcher's choice")
    add("--alpha", type=command_line.above_one, default=1.5, help="default %(default)s")
    add("--keys", type=command_line.positive_int, nargs="+", help="default by device")
    add("--queries", type=command_line.positive_int, nargs="+", help="default 1 4 16")
    add("--heads-kv", type=command_line.positive_int, nargs="+", help="default by device")
    add("--real-layers", type=int, nargs="*", default=REAL_LAYERS, help="default 0 6 18")
    add("--pages", type=command_line.positive_int, nargs="+", default=PAGES, help="keys of a page")
    add("--rounds", type=command_line.positive_int, default=15, help="default %(default)s")
    command_line.add_targets(parser)
    options = command_line.parsed(parser)
    environment = records.environment(options.device)
    print(records.describe(environment), flush=True)
    text, missing = read_text(parser, options)
    rows, records_of, targets, left_out = [], [], [], {}
    ours = [f"c {c:g}" for c in SHARPNESS[options.device]] + ["causal"]
    ours += ["copy"] * bool(options.pages) + [f"page {page}" for page in options.pages]
    ours += ["eager"] if options.device == "cuda" else []
    for shape in shapes(options):
        real = shape.layer is not None
        if real and (reason := missing or text.too_short(shape.batch * shape.keys)):
            left_out[str(shape)] = reason
        else:
            found = measured(shape, options, text)
            if options.device == "cuda":
                torch.cuda.empty_cache()  # of graphs, each of which has memory of its own
            times, best = found.told(options.device), found.best(options.device)
            targets += judged(shape, found, options)
            cells = (tables.digits(times.get(name)) for name in (best, "sum of K", *ours))
            rows.append((str(shape), best.removeprefix("sdpa "), *cells))
            records_of.append(
                {
                    **shape._asdict(),
                    "milliseconds": {n: t._asdict() for n, t in found.timings.items()},
                    "shares_of_values": found.shares,
                }
            )
            tables.progress(rows[-1][0])
        if options.json:
            record = {
                "program": "decoding",
                "backend": options.backend,
                "alpha": options.alpha,
                "environment": environment,
                "measured": records_of,
                "left_out": left_out,
                "targets": [one.record() for one in targets],
            }
            records.write(options.json, record)
    head = ("ms", "sdpa", "sdpa ms", "sum of K", *ours)
    print("\n" + tables.table(head, rows) + "\n")
    for name, reason in left_out.items():
        print(f"left out: {name}: {reason}")
    for target in targets:
        print(target)
    if options.targets and not all(target.met for target in targets):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
