"""Few queries against a long cache of keys, beside torch's scaled_dot_product_attention.

Calls of one shape are timed in turn. On the CPU the least of the times is told, which other work
on the machine disturbs least; on a GPU the median. What is judged is the ratio to the fastest of
SDPA's backends, and that of pages to a cache that lies in one piece.
"""

from __future__ import annotations

import argparse
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from harness import command_line, records, tables, timing
from harness.targets import Target
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
SHARPNESS = [1.0, 4.0, 0.25]
"""Standard deviations of Gaussian scores."""

PAGES = [64]
MOST_BYTES = 32 << 30
"""Of keys and values: larger shapes are left out."""

OF_SDPA, OF_PAGES = 0.7, 1.15
SDPA = (
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.MATH,
)


class Shape(NamedTuple):
    dtype: str
    batch: int
    heads_kv: int
    keys: int
    head_dim: int
    queries: int

    def __str__(self) -> str:
        return (
            f"{self.dtype} batch {self.batch}, {self.heads_kv} heads, {self.keys:,} keys, "
            f"d {self.head_dim}, {self.queries} queries"
        )


def shapes(options: argparse.Namespace) -> Iterator[Shape]:
    for shape in itertools.starmap(
        Shape,
        itertools.product(
            DTYPES[options.device],
            BATCHES[options.device],
            options.heads_kv or [HEADS[options.device][1]],
            options.keys or KEYS[options.device],
            HEAD_DIMS[options.device],
            options.queries or QUERIES,
        ),
    ):
        element = getattr(torch, shape.dtype).itemsize
        if 2 * shape.batch * shape.heads_kv * shape.keys * shape.head_dim * element <= MOST_BYTES:
            yield shape


def in_pages(cache: Tensor, page: int) -> Tensor:
    """``(batch, heads, keys, head_dim)`` as ``(pages, page_size, heads, head_dim)``."""
    pages = cache.unflatten(2, (-1, page)).permute(0, 2, 3, 1, 4)
    return pages.flatten(0, 1).contiguous()


def sdpa_calls(query: Tensor, key: Tensor, value: Tensor) -> dict[str, Callable[[], object]]:
    """Those that take the tensors."""

    def calling(backend: SDPBackend) -> Callable[[], object]:
        def call() -> Tensor:
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(query, key, value, enable_gqa=True)

        return call

    found = {}
    for backend in SDPA:
        call = calling(backend)
        try:
            call()
        except RuntimeError:  # it says why in warnings
            continue
        found[f"sdpa {backend.name.partition('_')[0].lower()}"] = call
    return found


def paged(
    query: Tensor, key: Tensor, value: Tensor, page: int, said: dict[str, Any]
) -> Callable[[], object]:
    pages = [in_pages(t, page) for t in (key, value)]
    batch, keys = key.shape[0], key.shape[2]
    numbers = torch.arange(batch * keys // page, dtype=torch.int32, device=key.device)
    lengths = torch.full((batch,), keys, dtype=torch.int32, device=key.device)
    table = numbers.view(batch, -1)
    return lambda: adasplash2.entmax_attention_with_kvcache(
        query, *pages, cache_lengths=lengths, block_table=table, **said
    )


def measured(shape: Shape, options: argparse.Namespace) -> dict[str, timing.Timing]:
    device, backend, alpha = options.device, options.backend, options.alpha
    torch.manual_seed(0)
    heads_q = HEADS[device][0]
    made: dict[str, Any] = {"device": device, "dtype": getattr(torch, shape.dtype)}
    query = torch.randn(shape.batch, heads_q, shape.queries, shape.head_dim, **made)
    cache = shape.batch, shape.heads_kv, shape.keys, shape.head_dim
    key, value = torch.randn(cache, **made), torch.randn(cache, **made)
    said: dict[str, Any] = {"alpha": alpha, "backend": backend}

    def entmax(sharpness: float = 1.0, **more: Any) -> Callable[[], object]:
        sharp = query * sharpness
        return lambda: adasplash2.entmax_attention(
            sharp, key, value, enable_gqa=True, **said, **more
        )

    calls = sdpa_calls(query, key, value)
    calls["sum of K"] = lambda: key.sum()
    calls |= {f"c {c:g}": entmax(c) for c in SHARPNESS}
    calls["causal"] = entmax(is_causal=True, causal_align="bottom-right")
    for page in options.pages:
        if shape.keys % page == 0:
            calls[f"page {page}"] = paged(query, key, value, page, said)
    with torch.no_grad():
        return timing.side_by_side(calls, device, options.rounds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    device = "cuda" if torch.cuda.is_available() else "cpu"
    add("--device", choices=("cpu", "cuda"), default=device, help="default here: %(default)s")
    add("--backend", help="to measure; default: the dispatcher's choice")
    add("--alpha", type=command_line.above_one, default=1.5, help="default %(default)s")
    add("--keys", type=command_line.positive_int, nargs="+", help="default by device")
    add("--queries", type=command_line.positive_int, nargs="+", help="default 1 4 16")
    add("--heads-kv", type=command_line.positive_int, nargs="+", help="default by device")
    add("--pages", type=command_line.positive_int, nargs="+", default=PAGES, help="keys of a page")
    add("--rounds", type=command_line.positive_int, default=15, help="default %(default)s")
    add("--threads", type=command_line.positive_int, default=2, help="on the CPU; default 2")
    add("--json", type=command_line.writable, metavar="PATH", help="write the measurements there")
    add("--targets", action="store_true", help="exit with 1 if one is missed")
    options = parser.parse_args()
    command_line.check_device(parser, options)
    environment = records.environment(options.device)
    print(records.describe(environment), flush=True)
    told = "lowest" if options.device == "cpu" else "median"
    rows, found, targets = [], [], []
    for shape in shapes(options):
        timings = measured(shape, options)
        times = {name: float(getattr(t, told)) for name, t in timings.items()}
        best = min((name for name in times if name.startswith("sdpa")), key=times.__getitem__)
        ours = [f"c {c:g}" for c in SHARPNESS] + ["causal"]
        targets += [
            Target(f"{shape}, {name}", "x SDPA", times[name] / times[best], OF_SDPA)
            for name in ours
        ]
        in_page = [f"page {page}" for page in options.pages]
        targets += [
            Target(f"{shape}, {name}", "x one piece", times[name] / times[ours[0]], OF_PAGES)
            for name in in_page
            if name in times
        ]
        columns = [best, "sum of K", *ours, *in_page]
        cells = (tables.digits(times.get(name, math.nan)) for name in columns)
        rows.append((str(shape), best.removeprefix("sdpa "), *cells))
        found.append(
            {**shape._asdict(), "milliseconds": {n: t._asdict() for n, t in timings.items()}}
        )
        tables.progress(rows[-1][0])
        if options.json:
            record = {
                "program": "decoding",
                "backend": options.backend,
                "alpha": options.alpha,
                "environment": environment,
                "measured": found,
                "targets": [one.record() for one in targets],
            }
            records.write(options.json, record)
    head = ("ms", "sdpa", "sdpa ms", "sum of K", *ours, *in_page)
    print("\n" + tables.table(head, rows) + "\n")
    for target in targets:
        print(target)
    if options.targets and not all(target.met for target in targets):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
