"""A small call of each kind, for compute-sanitizer: ``small_calls.py cuda`` or ``triton``.

In training: lists, dense tiles, both scans, keys that hundreds of queries keep, values that are not
finite, blocks that work on several items; of Triton whole rows, thresholds of long ones, masks,
windows, learned alphas. Without gradients: few queries against a cache, in pages too, and counts.
And rows. Together they reach every kernel: what none has launched is told, and is an error.
``cpu`` runs what the others run, without that.
"""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

os.environ["ADASPLASH2_AUTOTUNE"] = "off"  # read at import: nothing measured chooses kernels

import torch
from cases import BFLOAT16, FLOAT16, FLOAT32, device_of
from torch import Tensor

import adasplash2
from adasplash2.backends import cuda


def normal(backend: str, *shape: int, dtype: torch.dtype = FLOAT32) -> Tensor:
    return torch.randn(shape, device=device_of(backend), dtype=dtype)


def train(
    backend: str,
    length: int,
    head_dim: int,
    sharpness: float,
    is_causal: bool = False,
    dtype: torch.dtype = BFLOAT16,
    heads: int = 2,
    **said: Any,
) -> None:
    query, key, value = (
        normal(backend, 1, count, length, head_dim, dtype=dtype) for count in (heads, 2, 2)
    )
    if sharpness == 4.0:  # the first key is a sink
        query[..., 0], key[:, :, 0, 0] = 4.0, 16.0
    if sharpness == 0.05:  # what dense tiles make of it is done again
        value[:, 0, length // 2, 3], key[:, 1, 5, 0] = torch.nan, -torch.inf
    inputs = [x.requires_grad_() for x in (query * sharpness, key, value)]
    learned = [x for x in said.values() if isinstance(x, Tensor) and x.requires_grad]
    said |= {"is_causal": is_causal, "enable_gqa": heads > 2, "backend": backend}
    out = adasplash2.entmax_attention(*inputs, **said)
    torch.autograd.grad(out, [*inputs, *learned], torch.randn_like(out))


def stats(backend: str, length_q: int, length_k: int, dtype: torch.dtype) -> None:
    lengths = length_q, length_k, length_k
    tensors = [normal(backend, 1, 2, length, 32, dtype=dtype) for length in lengths]
    adasplash2.attention_stats(*tensors, backend=backend)


def decode(
    backend: str,
    length: int,
    sharpness: float = 1.0,
    heads: int = 4,
    queries: int = 1,
    page_size: int = 0,
    dtype: torch.dtype = BFLOAT16,
    **said: Any,
) -> None:
    """Of two sequences, the second of which is shorter than the cache."""
    query = sharpness * normal(backend, 2, heads, queries, 32, dtype=dtype)
    shape = (2, 2, length, 32)
    if page_size:
        pages = -(-length // page_size)
        shape = (2 * pages, page_size, 2, 32)
        table = torch.arange(2 * pages, dtype=torch.int32).flip(0).view(2, pages)
        said["block_table"] = table.to(query.device)
    caches = [normal(backend, *shape, dtype=dtype) for _ in range(2)]
    lengths = torch.tensor([length, length // 3], dtype=torch.int32, device=query.device)
    with torch.no_grad():
        adasplash2.entmax_attention_with_kvcache(
            query, *caches, cache_lengths=lengths, backend=backend, **said
        )


def rows(backend: str, alpha: float, dtype: torch.dtype) -> None:
    x = normal(backend, 5, 700, dtype=dtype).requires_grad_()
    y = adasplash2.entmax(x, alpha, backend=backend)
    torch.autograd.grad(y, x, torch.randn_like(y))


def few_queries_and_rows(backend: str) -> None:
    for dtype in (BFLOAT16, FLOAT32):
        decode(backend, 500, dtype=dtype)
        decode(backend, 300, 0.01, page_size=16, dtype=dtype)
        stats(backend, 3, 400, dtype)
    decode(backend, 700, heads=12, queries=3, is_causal=True, window=(400, -1), alpha=2.0)
    decode(backend, 400, 0.1, alpha=1.25, page_size=17, dtype=FLOAT16)
    for alpha, dtype in ((1.5, FLOAT32), (2.0, BFLOAT16), (1.25, FLOAT16)):
        rows(backend, alpha, dtype)


def of_cuda(backend: str) -> None:
    train(backend, 200, 64, 1.0, True)
    train(backend, 160, 64, 0.05)
    train(backend, 600, 64, 0.05, True)
    train(backend, 1100, 64, 4.0, True)
    train(backend, 1100, 64, 0.05, True)
    train(backend, 130, 33, 4.0, True, FLOAT16)
    train(backend, 130, 32, 1.0, False, FLOAT32)
    train(backend, 600, 32, 0.05, False, FLOAT32)
    stats(backend, 600, 600, BFLOAT16)
    # As if problems were far larger.
    with mock.patch.object(cuda.attention.Plan, "_multiprocessors", 1):
        train(backend, 600, 64, 0.05)
        train(backend, 600, 64, 4.0)
    few_queries_and_rows(backend)


def of_triton(backend: str) -> None:
    train(backend, 100, 32, 1.0, True)
    train(backend, 300, 32, 0.05)
    train(backend, 600, 32, 4.0, True, heads=8)
    train(backend, 130, 24, 1.0, False, FLOAT32, alpha=1.25, window=(40, 3))
    train(backend, 600, 16, 1.0, True, FLOAT16, alpha=2.0, softcap=5.0)
    mask = normal(backend, 130, 130).requires_grad_()
    train(backend, 130, 16, 1.0, attn_mask=mask)
    hidden = torch.rand(1, 2, 600, 600, device=device_of(backend)) < 0.5
    alphas = torch.tensor([1.3, 1.8], device=device_of(backend)).requires_grad_()
    sinks = normal(backend, 2).requires_grad_()
    train(backend, 600, 16, 1.0, attn_mask=hidden, alpha=alphas, sinks=sinks, dropout_p=0.1)
    stats(backend, 300, 300, BFLOAT16)
    decode(backend, 17_000, 0.01, queries=16, dtype=FLOAT16)  # rows that are cut
    few_queries_and_rows(backend)


def kernels_of_cuda() -> set[str]:
    """Those of each unit. Some are of Hopper alone: its units, and what goes before dense tiles
    that are all there is."""
    hopper = torch.cuda.get_device_capability() == (9, 0)
    start = re.compile(r"__global__ void __launch_bounds__\([^)]*\)\s+(\w+)\(")
    return {
        f"{unit.name} {name}"
        for unit in Path(cuda.__file__).with_name("kernels").glob("*.cu")
        for name in start.findall(unit.read_text())
        if hopper or not ("90" in unit.name or name == "check_finite")
    }


def watched_on_cuda(launched: set[str]) -> Any:
    driver, of = cuda.attention.driver, cuda.attention.driver.kernel

    def kernel(device: int, unit: str, name: str, *more: Any) -> Any:
        launched.add(f"{unit} {name}")
        return of(device, unit, name, *more)

    return mock.patch.object(driver, "kernel", kernel)


def kernels_of_triton() -> set[str]:
    from adasplash2.backends.triton import sizes

    of_rows = {"entmax_rows", "entmax_rows_grad"}
    return {*sizes.KERNELS, *sizes.LIST_KERNELS, *sizes.DECODE_KERNELS, *of_rows}


def watched_on_triton(launched: set[str]) -> Any:
    from adasplash2.backends.triton import launch

    def launching(asked: Any, of: Callable[[Any], None] = launch.launch) -> None:
        launched.add(asked.kernel.__name__)
        of(asked)

    return mock.patch.object(launch, "launch", launching)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("backend", choices=("cuda", "triton", "cpu"))
    backend = parser.parse_args().backend
    torch.manual_seed(0)
    launched: set[str] = set()
    if backend == "cpu":
        of_triton(backend)
        of_cuda(backend)
        print("done")
        return
    if backend == "cuda":
        with watched_on_cuda(launched):
            of_cuda(backend)
        missing = kernels_of_cuda() - launched
    else:
        with watched_on_triton(launched):
            of_triton(backend)
        missing = kernels_of_triton() - launched
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    assert not missing, f"no call launches {', '.join(sorted(missing))}"
    print(f"done: {len(launched)} kernels")


if __name__ == "__main__":
    main()
