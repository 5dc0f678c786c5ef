"""Few queries without gradients against a long cache: what kernels of their own compute, on every
backend that has some. What a call may say is asked of all in ``test_language.py``; here are rows
and cuts at the edge, and Triton's interpreter."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import language
import pytest
import reference
import torch
from cases import device_of, interpreted, usable_backends
from language import FEW, Call
from torch import Tensor

import adasplash2
from adasplash2.backends.triton import sizes
from adasplash2.lowering import new_seed

BACKENDS = pytest.mark.parametrize("backend", usable_backends())
SEED = 7
LIMITS = {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 5e-3}


@pytest.fixture(autouse=True)
def _many_multiprocessors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys are cut into a few parts in the interpreter, too."""
    if sizes.INTERPRETED:
        from adasplash2.backends.triton import launch

        monkeypatch.setattr(launch, "multiprocessors", lambda device: 8)


def attend(backend: str, *tensors: Tensor, **said: Any) -> Tensor:
    said = {k: v.to(tensors[0].device) if isinstance(v, Tensor) else v for k, v in said.items()}
    torch.manual_seed(SEED)
    try:
        with torch.no_grad():
            return adasplash2.entmax_attention(*tensors, **said, enable_gqa=True, backend=backend)
    except adasplash2.BackendRefused as refused:
        if backend == "cpu":
            raise
        pytest.skip(str(refused))


TOGETHER = (
    ("bottom-right", "alpha 2"),
    ("left window", "alpha 1.25"),
    ("bool mask", "slopes", "window"),
    ("added mask", "softcap", "slopes"),
    ("lengths", "slopes", "sinks"),
    ("alphas", "sinks", "scale of rows", "softcap"),
    ("dropout", "alphas", "lengths"),
    ("key mask", "sinks", "scale of heads"),
)
"""Each kind of feature."""


@BACKENDS
@interpreted()
@pytest.mark.parametrize("features", TOGETHER, ids="+".join)
def test_features(features: tuple[str, ...], backend: str) -> None:
    call = Call(features, torch.float32, FEW)
    device = device_of(backend)
    *tensors, _ = (t.to(device, call.dtype) for t in call.tensors())
    said = {k: v.float() if is_real(v) else v for k, v in call.said().items()}
    out = attend(backend, *tensors, **said)
    said = call.said()
    if dropout_p := said.pop("dropout_p", 0.0):
        torch.manual_seed(SEED)
        seed = int(new_seed(torch.device(device)))
        shape = FEW.batch, FEW.heads_q, FEW.length_q, FEW.length_k
        said["kept"] = language.dropout_factors(seed, shape, dropout_p)
    exact, _ = language.attention(*call.tensors()[:3], **said)
    assert reference.error(out.cpu(), exact) <= LIMITS[call.dtype] * reference.norm(exact)


def is_real(given: Any) -> bool:
    return isinstance(given, Tensor) and given.is_floating_point()


# Rows at the edge


def _ties(query: Tensor, key: Tensor, value: Tensor) -> None:
    key[:] = key[:, :, torch.arange(key.shape[2]) // 4].clone()


def _one_hot(query: Tensor, key: Tensor, value: Tensor) -> None:
    query *= 1e4


def _equal(query: Tensor, key: Tensor, value: Tensor) -> None:
    key[:] = key[:, :, :1].clone()


def _flat(query: Tensor, key: Tensor, value: Tensor) -> None:
    query *= 0.01


def _last(query: Tensor, key: Tensor, value: Tensor) -> None:
    """Only the last keys are kept: most splits keep none."""
    key[:, :, -5:] *= 9.0


def _minus_infinity(query: Tensor, key: Tensor, value: Tensor) -> None:
    query[..., 0] = query[..., 0].abs() + 0.1
    key[:, :, ::3, 0] = -math.inf


def _not_finite_keys(query: Tensor, key: Tensor, value: Tensor) -> None:
    """Of the first key head alone."""
    key[0, 0, 200, 3] = math.nan
    key[-1, 0, 300, 3] = math.inf


def _not_finite_values(query: Tensor, key: Tensor, value: Tensor) -> None:
    value[0, 0, ::7, 1] = math.nan
    value[0, 0, ::5, 2] = math.inf


def _not_finite_query(query: Tensor, key: Tensor, value: Tensor) -> None:
    query[0, 1, 0, 3] = math.nan


ROWS: dict[str, tuple[Callable[..., None], dict[str, Any]]] = {
    "ties": (_ties, {}),
    "one-hot": (_one_hot, {}),
    "equal": (_equal, {}),
    "flat": (_flat, {}),
    "flat near 1": (_flat, {"alpha": 1.02}),
    "flat above 2": (_flat, {"alpha": 2.5}),
    "last": (_last, {}),
    "scores of -inf": (_minus_infinity, {}),
    "keys": (_not_finite_keys, {}),
    "values": (_not_finite_values, {}),
    "query": (_not_finite_query, {"alpha": 2.0}),
    "nothing seen": (_flat, {"kv_lengths": torch.tensor([0, 130], dtype=torch.int32)}),
}


@BACKENDS
@interpreted()
@pytest.mark.parametrize("rows", ROWS)
def test_rows(rows: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of four heads, two of which share keys; the threshold of those that keep more than a tile is
    found in parts."""
    if sizes.INTERPRETED:
        from adasplash2.backends.triton import decoding

        monkeypatch.setattr(decoding, "SERIAL", 64)
    change, said = ROWS[rows]
    generator = torch.Generator().manual_seed(3)
    shapes = (2, 4, 1, 16), (2, 2, 700, 16), (2, 2, 700, 24)
    query, key, value = (torch.randn(shape, generator=generator) for shape in shapes)
    change(query, key, value)
    out = attend(backend, *(t.to(device_of(backend)) for t in (query, key, value)), **said).cpu()
    exact = attend("cpu", query.double(), key.double(), value.double(), **said)
    assert torch.equal(out.isnan(), exact.isnan())
    assert torch.equal(out.isinf(), exact.isinf())
    assert torch.equal(out[out.isinf()].double(), exact[exact.isinf()])
    finite = exact.isfinite()
    limit = LIMITS[torch.float32] * (30.0 if rows == "one-hot" else 1.0)
    error = (out.double() - exact)[finite].norm()
    assert error <= limit * exact[finite].norm()


@BACKENDS
@interpreted(heads=((6, 2), (20, 1)), dtype=(torch.bfloat16,))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("heads", "length_q"), [((6, 2), 1), ((4, 4), 16), ((20, 1), 4)])
def test_groups(heads: tuple[int, int], length_q: int, dtype: torch.dtype, backend: str) -> None:
    """Of 3 rows, of 16, and of more than a block has; a call gives the same bits at every run."""
    generator = torch.Generator().manual_seed(4)
    heads_q, heads_kv = heads
    shapes = (1, heads_q, length_q, 40), (1, heads_kv, 600, 40), (1, heads_kv, 600, 40)
    tensors = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    moved = [t.to(device_of(backend)) for t in tensors]
    said = {"is_causal": True, "causal_align": "bottom-right"}
    out = attend(backend, *moved, **said)
    exact = attend("cpu", *(t.double() for t in tensors), **said)
    assert reference.relative_error(out.cpu(), exact) <= LIMITS[dtype]
    if not sizes.INTERPRETED:
        assert torch.equal(attend(backend, *moved, **said), out)


@BACKENDS
@interpreted(page_size=(16, 256))
@pytest.mark.parametrize("page_size", [16, 17, 256])
def test_pages(page_size: int, backend: str) -> None:
    """Pages out of order, a window, and a sequence without keys."""
    generator = torch.Generator().manual_seed(5)
    each = -(-700 // page_size)
    query = torch.randn(3, 4, 1, 16, generator=generator)
    pools = [torch.randn(3 * each, page_size, 2, width, generator=generator) for width in (16, 24)]
    table = torch.randperm(3 * each, generator=generator).view(3, each).int()
    lengths = torch.tensor([700, 0, 333], dtype=torch.int32)
    caches = [pool[table.long()].flatten(1, 2).transpose(1, 2) for pool in pools]
    said: dict[str, Any] = {"is_causal": True, "window": (400, -1), "alpha": 1.5}
    exact = adasplash2.entmax_attention_with_kvcache(
        query.double(), *(cache.double() for cache in caches), cache_lengths=lengths, **said
    )
    device = device_of(backend)
    try:
        out = adasplash2.entmax_attention_with_kvcache(
            query.to(device), *(pool.to(device) for pool in pools),
            cache_lengths=lengths.to(device), block_table=table.to(device), backend=backend, **said,
        )  # fmt: skip
    except adasplash2.BackendRefused as refused:
        pytest.skip(str(refused))
    assert reference.relative_error(out.cpu(), exact) <= LIMITS[torch.float32]
    assert (out[1] == 0.0).all()


@BACKENDS
@interpreted()
def test_statistics(backend: str) -> None:
    generator = torch.Generator().manual_seed(6)
    shapes = (2, 4, 3, 16), (2, 2, 500, 16), (2, 2, 500, 16)
    tensors = [torch.randn(shape, generator=generator) for shape in shapes]
    exact = adasplash2.attention_stats(
        *(t.double() for t in tensors), enable_gqa=True, backend="cpu"
    )
    moved = (t.to(device_of(backend)) for t in tensors)
    with torch.no_grad():
        got = adasplash2.attention_stats(*moved, enable_gqa=True, backend=backend)
    assert torch.equal(got.support.cpu(), exact.support)
    torch.testing.assert_close(got.tau.cpu().double(), exact.tau, atol=1e-5, rtol=1e-5)
    assert torch.equal(got.empty_tiles.cpu(), exact.empty_tiles)
    assert (got.iterations >= 1).all()


@pytest.mark.gpu
@BACKENDS
@pytest.mark.parametrize("page_size", [0, 64])
def test_cuda_graphs_capture_a_step(page_size: int, backend: str) -> None:
    """A replay serves new data and, where they are a tensor, new lengths; rows of many keys and of
    few, not finite ones too."""
    if backend == "cpu":
        pytest.skip("a graph holds kernels of the GPU")
    count, keys = 2, 32_768
    query = torch.randn(count, 8, 1, 64, device="cuda", dtype=torch.bfloat16)
    shape = (count * keys // 64, 64, 2, 64) if page_size else (count, 2, keys, 64)
    key, value = (torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    table = torch.arange(count * keys // 64, dtype=torch.int32, device="cuda").view(count, -1)
    lengths = torch.tensor([keys, 1000], dtype=torch.int32, device="cuda")
    said: dict[str, Any] = {"cache_lengths": lengths, "backend": backend}
    if page_size:
        said["block_table"] = table

    def step() -> Tensor:
        with torch.no_grad():
            return adasplash2.entmax_attention_with_kvcache(query, key, value, **said)

    try:
        step()  # compiles
    except adasplash2.BackendRefused as refused:
        pytest.skip(str(refused))
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for factor, length, number in ((1.0, 1000, 1.0), (0.01, 32_768, 1.0), (3.0, 0, math.nan)):
        query.copy_(factor * torch.randn_like(query))
        lengths[1] = length
        value.flatten()[5] = number
        graph.replay()
        torch.testing.assert_close(captured, step(), rtol=0, atol=0, equal_nan=True)


@BACKENDS
@interpreted()
@pytest.mark.parametrize("sharpness", [1.0, 0.1, 0.01])
def test_many_rows_that_share_keys(sharpness: float, backend: str) -> None:
    """Scores are kept by groups of fewer keys than a tile."""
    generator = torch.Generator().manual_seed(5)
    shapes = (1, 4, 11, 16), (1, 2, 900, 16), (1, 2, 900, 24)
    query, key, value = (torch.randn(shape, generator=generator) for shape in shapes)
    query *= sharpness
    out = attend(backend, *(t.to(device_of(backend)) for t in (query, key, value))).cpu()
    tensors = (t.double() for t in (query, key, value))
    exact, _ = language.attention(*tensors)
    assert reference.error(out, exact) <= LIMITS[torch.float32] * reference.norm(exact)


def test_flat_rows_are_what_they_are_alone() -> None:
    """The CPU keeps lists of some rows at a time where all of them would be long."""
    generator = torch.Generator().manual_seed(9)
    shapes = (1, 2, 10, 8), (1, 1, 2**18 + 5, 8), (1, 1, 2**18 + 5, 4)
    query, key, value = (torch.randn(shape, generator=generator) for shape in shapes)
    query *= 0.01
    together = attend("cpu", query, key, value)
    for i in range(10):
        assert torch.equal(
            together[:, :, i : i + 1], attend("cpu", query[:, :, i : i + 1], key, value)
        )


@interpreted()
@pytest.mark.parametrize("serial", [16_384, 64])
def test_flat_rows_start_near_their_threshold(serial: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """From where Gaussian rows have it: two steps, where the maxima's bound takes three or four;
    also in parts. One row that keeps few keys shares theirs."""
    if "triton" not in usable_backends():
        pytest.skip("no GPU, and Triton's interpreter is not asked for")
    from adasplash2.backends.triton import decoding, launch

    monkeypatch.setattr(decoding, "SERIAL", serial)
    launch.forget()
    generator = torch.Generator().manual_seed(8)
    shapes = (1, 3, 1, 16), (1, 1, 1500, 16), (1, 1, 1500, 16)
    tensors = [torch.randn(shape, generator=generator) for shape in shapes]
    tensors[0] *= torch.tensor([1.0, 0.08, 0.01])[:, None, None]
    moved = [t.to(device_of("triton")) for t in tensors]
    with torch.no_grad():
        got = adasplash2.attention_stats(*moved, enable_gqa=True, backend="triton")
    launch.forget()
    exact = adasplash2.attention_stats(*(t.double() for t in tensors), enable_gqa=True)
    assert (exact.support[0, :, 0] > torch.tensor([0, 512, 1499])).all(), "as meant"
    assert torch.equal(got.support.cpu(), exact.support)
    assert (got.iterations[0, 1:] <= 2).all()


@pytest.mark.gpu
@BACKENDS
@pytest.mark.parametrize("sharpness", [1.0, 0.1, 0.001])
@pytest.mark.parametrize("length_q", [1, 16])
def test_long_rows(length_q: int, sharpness: float, backend: str) -> None:
    """Of few keys and of nearly all of 100,003, which are solved in parts."""
    tensors = [
        torch.randn(1, heads, length, 64, device=device_of(backend))
        for heads, length in ((4, length_q), (2, 100_003), (2, 100_003))
    ]
    tensors[0] *= sharpness
    out = attend(backend, *tensors)
    exact = attend("cpu", *(t.cpu().double() for t in tensors))
    assert reference.relative_error(out.cpu(), exact) <= LIMITS[torch.float32]


@pytest.mark.gpu
@BACKENDS
@pytest.mark.parametrize("alpha", [1.5, 2.0, 1.25])
def test_keys_that_are_kept_lie_side_by_side(alpha: float, backend: str) -> None:
    """More of them than one program has memory for, while most programs have none."""
    query, key, value = (
        torch.randn(2, heads, length, 64, device=device_of(backend))
        for heads, length in ((8, 2), (2, 30_000), (2, 30_000))
    )
    query *= 0.1
    query[..., 0], key[..., 0] = 1.0, -80.0
    key[:, :, 7000:9500, 0] = 0.0
    out = attend(backend, query, key, value, alpha=alpha)
    exact = attend("cpu", *(t.cpu().double() for t in (query, key, value)), alpha=alpha)
    assert reference.relative_error(out.cpu(), exact) <= LIMITS[torch.float32]


@pytest.mark.gpu
@BACKENDS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_caches_at_any_address(dtype: torch.dtype, backend: str) -> None:
    """Rows that do not start on 16 bytes, and heads that lie side by side."""
    device = device_of(backend)
    query = torch.randn(2, 6, 1, 64, device=device).to(dtype)
    shifted = [torch.randn(2, 2, 3000, 65, device=device).to(dtype)[..., 1:] for _ in range(2)]
    side_by_side = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in shifted]
    exact = attend("cpu", *(t.cpu().double() for t in (query, *shifted)))
    for caches in (shifted, side_by_side):
        out = attend(backend, query, *caches)
        assert reference.relative_error(out.cpu(), exact) <= LIMITS[dtype]
