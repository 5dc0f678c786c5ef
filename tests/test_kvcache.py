"""Attention over caches of keys and values, contiguous and in pages, against the float64 reference
of each sequence alone."""

from __future__ import annotations

import math
from typing import Any

import language
import pytest
import reference
import torch
from cases import device_of, interpreted, usable_backends
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import adasplash2
from adasplash2 import dispatch, entmax_attention_with_kvcache, functional, lowering, ops
from adasplash2.options import Options

BACKENDS = pytest.mark.parametrize("backend", usable_backends())

BATCH, HEADS_Q, HEADS_KV, CAPACITY, NEW, HEAD_DIM, HEAD_DIM_V = 3, 4, 2, 130, 3, 16, 24
LENGTHS = 5, 0, 127
"""Before the new keys: the last sequence then fills the cache."""

ASKED: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"is_causal": True},
    "window": {"is_causal": True, "window": (9, -1)},
    "slopes": {"alibi_slopes": torch.tensor([0.0, 0.3, 0.05, 2.0])},
    "softcap": {"softcap": 1.5, "sinks": torch.tensor([0.1, -1.0, 0.5, 2.0])},
    "starts": {"kv_starts": torch.tensor([2, 0, 100], dtype=torch.int32), "is_causal": True},
    "numbers": {
        "scale": torch.tensor([0.2, 0.1, 0.3, 0.4]),
        "alpha": torch.tensor([1.2, 1.5, 1.8, 2.0]),
    },
    "sparsemax": {"alpha": 2.0},
}
LIMITS = {torch.float32: 1e-5, torch.float64: 1e-10, torch.bfloat16: 5e-3}


class Cached:
    """A cache whose unused parts hold NaN, and new keys; ``page_size`` 0 for a contiguous one."""

    def __init__(self, page_size: int, dtype: torch.dtype, device: str) -> None:
        generator = torch.Generator().manual_seed(page_size)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

        self.query = normal(BATCH, HEADS_Q, NEW, HEAD_DIM)
        self.new = [normal(BATCH, HEADS_KV, NEW, width) for width in (HEAD_DIM, HEAD_DIM_V)]
        held = [normal(BATCH, HEADS_KV, CAPACITY, width) for width in (HEAD_DIM, HEAD_DIM_V)]
        self.lengths = torch.tensor(LENGTHS, dtype=torch.int32)
        # What the reference sees: each sequence with its new keys behind those that it had.
        self.all = [t.clone() for t in held]
        for t, new in zip(self.all, self.new, strict=True):
            for b, length in enumerate(LENGTHS):
                t[b, :, length : length + NEW] = new[b]
        for t in held:
            for b, length in enumerate(LENGTHS):
                t[b, :, length:] = math.nan
        self.table: Tensor | None = None
        if page_size:
            held = self._paged(held, page_size, generator)
        self.cache = [t.to(device) for t in held]
        self.query, self.lengths = self.query.to(device), self.lengths.to(device)
        self.new = [t.to(device) for t in self.new]
        self.table = None if self.table is None else self.table.to(device)

    def _paged(self, held: list[Tensor], size: int, generator: torch.Generator) -> list[Tensor]:
        """In pages out of order; numbers behind a sequence's last page are none."""
        count = -(-CAPACITY // size)
        numbers = torch.randperm(BATCH * count, generator=generator).view(BATCH, count)
        pages = []
        for t in held:
            width = t.shape[3]
            whole = torch.full((BATCH, HEADS_KV, count * size, width), math.nan, dtype=t.dtype)
            whole[:, :, :CAPACITY] = t
            cut = whole.view(BATCH, HEADS_KV, count, size, width).permute(0, 2, 3, 1, 4)
            pool = torch.empty((BATCH * count, size, HEADS_KV, width), dtype=t.dtype)
            pool[numbers.flatten()] = cut.flatten(0, 1)
            pages.append(pool)
        self.table = numbers.int()
        for b, length in enumerate(LENGTHS):
            self.table[b, -(-(length + NEW) // size) :] = (-5, 10**6, 0)[b]
        return pages

    def attend(self, backend: str | None = None, **said: Any) -> Tensor:
        device = self.query.device
        said = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in said.items()}
        said = {"cache_lengths": self.lengths, "block_table": self.table} | said
        try:
            return entmax_attention_with_kvcache(
                self.query, *self.cache, *self.new, backend=backend, **said
            )
        except adasplash2.BackendRefused as refused:
            if backend == "cpu":
                raise
            pytest.skip(str(refused))

    def assert_right(self, out: Tensor, said: dict[str, Any]) -> None:
        starts = said.get("kv_starts")
        numbers = {k: v for k, v in said.items() if k != "kv_starts"}
        numbers = {k: v.double() if isinstance(v, Tensor) else v for k, v in numbers.items()}
        for b, length in enumerate(LENGTHS):
            one = slice(b, b + 1)
            key, value = (t[one, :, : length + NEW].double() for t in self.all)
            exact, _ = language.attention(
                self.query[one].cpu().double(),
                key,
                value,
                causal_align="bottom-right",
                kv_starts=None if starts is None else starts[one],
                **numbers,
            )
            assert reference.error(out[one].cpu(), exact) <= LIMITS[out.dtype] * reference.norm(
                exact
            ), b


@BACKENDS
@interpreted(asked=("window", "slopes"), page_size=(0, 16))
@pytest.mark.parametrize("page_size", [0, 16, 17, 256])
@pytest.mark.parametrize("asked", ASKED)
def test_each_sequence_alone(asked: str, page_size: int, backend: str) -> None:
    said = ASKED[asked]
    cached = Cached(page_size, torch.float32, device_of(backend))
    cached.assert_right(cached.attend(backend, **said), said)


@BACKENDS
@pytest.mark.parametrize("page_size", [0, 64])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_dtypes(dtype: torch.dtype, page_size: int, backend: str) -> None:
    cached = Cached(page_size, dtype, device_of(backend))
    cached.assert_right(cached.attend(backend, is_causal=True), {"is_causal": True})


@pytest.mark.parametrize("page_size", [0, 16])
def test_new_keys_are_in_the_cache_afterwards_and_nothing_else_is(page_size: int) -> None:
    cached = Cached(page_size, torch.float32, "cpu")
    before = [t.clone() for t in cached.cache]
    cached.attend()
    for held, was, new in zip(cached.cache, before, cached.new, strict=True):
        changed = (held != was) & ~(held.isnan() & was.isnan())
        assert int(changed.sum()) == new.numel()
        for b, length in enumerate(LENGTHS):
            for i in range(NEW):
                j = length + i
                if cached.table is None:
                    found = held[b, :, j]
                else:
                    found = held[cached.table[b, j // page_size], j % page_size]
                assert torch.equal(found, new[b, :, i])


@pytest.mark.parametrize("page_size", [0, 16])
def test_softmax(page_size: int) -> None:
    cached = Cached(page_size, torch.float32, "cpu")
    out = cached.attend(alpha=1.0, is_causal=True)
    for b, length in enumerate(LENGTHS):
        one = slice(b, b + 1)
        exact = torch.nn.functional.scaled_dot_product_attention(
            cached.query[one],
            *(t[one, :, : length + NEW] for t in cached.all),
            attn_mask=torch.ones(NEW, length + NEW, dtype=torch.bool).tril(length),
            enable_gqa=True,
        )
        torch.testing.assert_close(out[one], exact)


def test_a_full_cache_and_a_number_of_keys() -> None:
    query, key, value = torch.randn(3, 2, 4, 20, 16)
    whole = adasplash2.entmax_attention(
        query, key, value, is_causal=True, causal_align="bottom-right"
    )
    assert torch.equal(entmax_attention_with_kvcache(query, key, value, is_causal=True), whole)
    some = entmax_attention_with_kvcache(query[:, :, :1], key, value, cache_lengths=7)
    exact = adasplash2.entmax_attention(query[:, :, :1], key[:, :, :7], value[:, :, :7])
    torch.testing.assert_close(some, exact)


def test_tokens_one_by_one_are_the_sequence_and_nothing_is_decided_anew(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    decided = []
    ask = dispatch._ask
    monkeypatch.setattr(dispatch, "_ask", lambda *asked: decided.append(1) or ask(*asked))
    query, key, value = torch.randn(3, 1, 4, 24, 16)
    keys, values = (torch.zeros(1, 4, 64, 16) for _ in range(2))
    found = []
    for i in range(24):
        if i == 2:
            decided.clear()
        one = slice(i, i + 1)
        found.append(
            entmax_attention_with_kvcache(
                query[:, :, one], keys, values, key[:, :, one], value[:, :, one], cache_lengths=i
            )
        )
    assert not decided
    whole = adasplash2.entmax_attention(query, key, value, is_causal=True)
    torch.testing.assert_close(torch.cat(found, dim=2), whole, atol=1e-5, rtol=1e-5)


class Operations(TorchDispatchMode):
    """The names of torch's operations that run within."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        self.names.append(function.overloadpacket.__name__)
        return function(*args, **kwargs or {})


@pytest.mark.parametrize("window", [None, (0, 0), (9, -1), (-1, 2), (20, 1)])
@pytest.mark.parametrize("placed", [False, True])
@pytest.mark.parametrize("length_q", [1, 3, 16])
def test_ranges_of_few_queries(length_q: int, placed: bool, window: tuple[int, int] | None) -> None:
    """One or two operations say what others say in ten."""
    query = torch.zeros(3, 4, length_q, 16)
    lengths = torch.tensor([0, 17, 60], dtype=torch.int32)
    left, right = window or (-1, -1)
    for new in (0, 1, 4):
        for is_causal in (False, True):
            options = Options(
                is_causal=is_causal,
                window_left=left,
                window_right=-1 if is_causal else right,
                causal_align="bottom-right",
            )
            found = lowering._few_ranges(options, query, lengths, new, placed)
            assert found is not None
            _, exact = lowering._ranges(options, query, 64, None, lengths + new, None)
            assert found.shape == exact.shape
            assert found.dtype == exact.dtype
            asked = slice(3 if placed else 2)
            assert torch.equal(found[asked], exact[asked])
    lowering._few_ranges(options, query, lengths, 0, False)  # puts its limits on the device
    with Operations() as operations:
        lowering._few_ranges(options, query, lengths, 0, False)
    launched = [name for name in operations.names if name in ("add", "clamp")]
    assert launched in (["clamp"], ["add", "clamp"])
    assert set(operations.names) <= {"add", "clamp", "alias", "slice", "unsqueeze", "view"}


@pytest.mark.parametrize("alpha", [1.0, 1.5])
def test_a_token_is_validated_once(monkeypatch: pytest.MonkeyPatch, alpha: float) -> None:
    asked = []
    for module in (functional, ops):

        def noted(*arguments: Any, validated: Any = module.validated) -> Any:
            asked.append(arguments)
            return validated(*arguments)

        monkeypatch.setattr(module, "validated", noted)
    caches, new = torch.zeros(2, 1, 2, 9, 8), torch.randn(3, 1, 2, 1, 8)
    entmax_attention_with_kvcache(new[0], *caches, *new[1:], cache_lengths=3, alpha=alpha)
    assert len(asked) == 1


@pytest.mark.parametrize("page_size", [0, 16])
def test_compiles_to_one_graph_for_all_lengths(page_size: int) -> None:
    torch._dynamo.reset()
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(entmax_attention_with_kvcache, fullgraph=True, backend=backend)
    with torch.no_grad():
        for shift in range(3):
            plain, traced = (Cached(page_size, torch.float32, "cpu") for _ in range(2))
            for cached in (plain, traced):
                cached.lengths[1] += shift
                for held in cached.cache:
                    held.nan_to_num_(1.0)
                if cached.table is not None:
                    cached.table.clamp_(0, len(cached.cache[0]) - 1)
            got = compiled(
                traced.query, *traced.cache, *traced.new, cache_lengths=traced.lengths,
                block_table=traced.table,
            )  # fmt: skip
            assert torch.equal(got, plain.attend())
            assert all(map(torch.equal, traced.cache, plain.cache))
    assert len(graphs) == 1


@pytest.mark.parametrize("alpha", [1.5, 1.0])
@pytest.mark.parametrize("page_size", [0, 16])
def test_compiles_with_dynamic_shapes(page_size: int, alpha: float) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(
        entmax_attention_with_kvcache, fullgraph=True, dynamic=True, backend="aot_eager"
    )
    plain, traced = (Cached(page_size, torch.float32, "cpu") for _ in range(2))
    for cached in (plain, traced):
        for held in cached.cache:
            held.nan_to_num_(1.0)
        if cached.table is not None:
            cached.table.clamp_(0, len(cached.cache[0]) - 1)
    with torch.no_grad():
        got = compiled(
            traced.query, *traced.cache, *traced.new, cache_lengths=traced.lengths,
            block_table=traced.table, alpha=alpha,
        )  # fmt: skip
    torch.testing.assert_close(got, plain.attend(alpha=alpha))


def test_autocast_casts_what_is_new_and_not_the_cache() -> None:
    cached = Cached(0, torch.bfloat16, "cpu")
    cached.query, *cached.new = (t.float() for t in (cached.query, *cached.new))
    with torch.autocast("cpu", torch.float16):
        out = cached.attend()
    assert out.dtype == torch.bfloat16
    cached.assert_right(out, {})


WRONG: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "no value": ({"value": None}, ValueError, "value must be given with key"),
    "no key": ({"key": None}, ValueError, "key must be given with value"),
    "no lengths": ({"cache_lengths": None}, ValueError, "cache_lengths must be given with key"),
    "too long": (
        {"cache_lengths": 128},
        ValueError,
        "cache_lengths must be from 0 to 127, got 128",
    ),
    "negative": ({"cache_lengths": -1}, ValueError, "cache_lengths must be at least 0"),
    "beyond int32": ({"cache_lengths": 2**40}, ValueError, "cache_lengths must be from 0 to 127"),
    "beyond floats": ({"cache_lengths": 10**400}, ValueError, "cache_lengths must be from 0 to 12"),
    "a flag": ({"cache_lengths": True}, TypeError, "cache_lengths"),
    "int64": (
        {"cache_lengths": torch.zeros(BATCH, dtype=torch.int64)},
        TypeError,
        "cache_lengths must have the dtype torch.int32",
    ),
    "another batch": (
        {"cache_lengths": torch.zeros(2, dtype=torch.int32)},
        ValueError,
        r"cache_lengths must have the shape \(3,\)",
    ),
    "dtype": ({"key_cache": torch.zeros(3, 2, 9, 16).half()}, TypeError, "key_cache must have"),
    "rank": ({"key_cache": torch.zeros(2, 9, 16)}, ValueError, "key_cache must have 4 dimensions"),
    "head_dim": (
        {"key_cache": torch.zeros(3, 2, 130, 8)},
        ValueError,
        "key_cache must have the he",
    ),
    "heads": (
        {k: torch.zeros(3, 3, 130, 16) for k in ("key_cache", "value_cache")},
        ValueError,
        "query must have a multiple of the heads of key_cache",
    ),
    "sizes": ({"value_cache": torch.zeros(3, 2, 9, 24)}, ValueError, "value_cache must have the"),
    "width": (
        {"value_cache": torch.zeros(3, 2, 130, 257)},
        ValueError,
        "value_cache must have a head_dim of 1 to 256, got 257",
    ),
    "new shape": ({"key": torch.zeros(3, 4, 3, 16)}, ValueError, "key must have the shape"),
    "new length": ({"value": torch.zeros(3, 2, 4, 24)}, ValueError, "value must have the shape"),
    "room": (
        {"key": torch.zeros(3, 2, 131, 16), "value": torch.zeros(3, 2, 131, 24)},
        ValueError,
        "key must have at most 130 keys",
    ),
    "starts": ({"kv_starts": torch.full((3,), 131, dtype=torch.int32)}, ValueError, "kv_starts"),
    "slopes": ({"alibi_slopes": torch.ones(3)}, ValueError, "alibi_slopes"),
    "alpha": ({"alpha": 0.5}, ValueError, "alpha"),
    "backend": ({"backend": "tpu"}, ValueError, "backend"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_bad_input_is_named_before_the_cache_is_written(wrong: str) -> None:
    said, kind, words = WRONG[wrong]
    cached = Cached(0, torch.float32, "cpu")
    before = [t.clone() for t in cached.cache]
    arguments = {
        "query": cached.query, "key_cache": cached.cache[0], "value_cache": cached.cache[1],
        "key": cached.new[0], "value": cached.new[1], "cache_lengths": cached.lengths,
    }  # fmt: skip
    with pytest.raises(kind, match=words):
        entmax_attention_with_kvcache(**arguments | said)
    for held, was in zip(cached.cache, before, strict=True):
        assert torch.equal(held.nan_to_num(), was.nan_to_num())


def test_a_backend_that_refuses_leaves_the_cache_as_it_was() -> None:
    cached = Cached(0, torch.float32, "cpu")
    before = [t.clone() for t in cached.cache]
    with pytest.raises(adasplash2.BackendRefused):
        entmax_attention_with_kvcache(
            cached.query, *cached.cache, *cached.new, cache_lengths=cached.lengths, backend="cuda"
        )
    for held, was in zip(cached.cache, before, strict=True):
        assert torch.equal(held.nan_to_num(), was.nan_to_num())


@pytest.mark.parametrize(
    ("table", "kind", "words"),
    [
        ([[0]], ValueError, "block_table must have the shape"),
        ([[0] * 9] * 3, ValueError, "cache_lengths must be from 0 to 141"),
        ([[0] * 8 + [99]] * 3, ValueError, "block_table must name pages from 0 to 26 .* got 99"),
        (torch.zeros(3, 9), TypeError, "block_table must have the dtype torch.int32"),
        ([0, 1, 2], ValueError, "block_table must have the shape"),
        (3, TypeError, "block_table must be a torch.Tensor"),
    ],
)
def test_a_bad_block_table_is_named(table: Any, kind: type[Exception], words: str) -> None:
    cached = Cached(16, torch.float32, "cpu")
    cached.table = torch.tensor(table, dtype=torch.int32) if isinstance(table, list) else table
    if "141" in words:
        cached.lengths[2] = 142
    with pytest.raises(kind, match=words):
        cached.attend()


def test_pages_may_be_shared_where_they_are_read_and_not_where_they_are_written() -> None:
    cached = Cached(16, torch.float32, "cpu")
    assert cached.table is not None
    before = [t.clone() for t in cached.cache]
    cached.lengths[:] = torch.tensor([18, 35, 16])  # the first page is full in all
    table = torch.arange(27, dtype=torch.int32).view(3, 9)
    clashes = {"both write": (0, 1), "one reads": (0, 0), "its own keys": (1, 1)}
    for place in clashes.values():
        cached.table = table.clone()
        cached.table[place] = table[1, 2]  # with new keys of the second sequence
        with pytest.raises(ValueError, match=r"block_table must name pages of its own .* got page"):
            cached.attend()
    for held, was in zip(cached.cache, before, strict=True):
        assert torch.equal(held.nan_to_num(), was.nan_to_num())
    cached.table = table.clone()
    cached.table[:, 0] = 0
    cached.table[:, 3:] = 7  # behind all keys
    for held in cached.cache:
        held.nan_to_num_(1.0)
    assert cached.attend().isfinite().all()


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("name", ["key_cache", "value_cache"])
def test_a_cache_that_overlaps_itself_is_not_written(name: str, compiled: bool) -> None:
    torch._dynamo.reset()
    q, k, v = torch.randn(3, 2, 4, 1, 8)
    caches = {"key_cache": torch.zeros(2, 4, 10, 8), "value_cache": torch.zeros(2, 4, 10, 8)}
    caches[name] = torch.zeros(1, 4, 10, 8).expand(2, 4, 10, 8)
    attend: Any = entmax_attention_with_kvcache
    if compiled:
        attend = torch.compile(attend, fullgraph=True, backend="eager")
    lengths = torch.full((2,), 3, dtype=torch.int32)
    error = torch._dynamo.exc.Unsupported if compiled else ValueError
    with pytest.raises(error, match=f"{name} must have memory of its own for each place"):
        attend(q, key=k, value=v, cache_lengths=lengths, **caches)
    assert attend(q, cache_lengths=lengths, **caches).shape == q.shape
    windows = torch.zeros(40).as_strided((2, 1, 4, 8), (3, 1, 8, 1))
    with pytest.raises(ValueError, match="key_cache must have memory of its own"):
        entmax_attention_with_kvcache(
            q[:, :1], windows, torch.zeros(2, 1, 4, 8), k[:, :1], v[:, :1], cache_lengths=1
        )
    assert not caches[name].any()


def test_caches_of_one_piece_of_memory() -> None:
    """Beside each other in any order, and the same one twice where what is written is the same."""
    q, k, v = torch.randn(3, 2, 4, 2, 8)
    apart = [torch.zeros(2, 4, 10, 8) for _ in "kv"]
    exact = entmax_attention_with_kvcache(q, *apart, k, v, cache_lengths=3)
    places = torch.zeros(2, 10, 2, 4, 8)
    for caches in (
        torch.zeros(2, 2, 4, 10, 8).unbind(),
        [places[:, :, i].transpose(1, 2) for i in (0, 1)],
        torch.zeros(2, 4, 10, 16).split(8, dim=3),
    ):
        out = entmax_attention_with_kvcache(q, *caches, k, v, cache_lengths=3)
        assert torch.equal(out, exact)
        assert all(map(torch.equal, caches, apart))
    one = torch.zeros(2, 4, 10, 8)
    with pytest.raises(ValueError, match="value_cache must not be in the memory of key_cache"):
        entmax_attention_with_kvcache(q, one, one, k, v, cache_lengths=3)
    assert not one.any()
    latent = entmax_attention_with_kvcache(q, one, one[..., :4], k, k[..., :4], cache_lengths=3)
    keys = torch.zeros(2, 4, 5, 8)
    keys[:, :, 3:] = k
    torch.testing.assert_close(
        latent,
        adasplash2.entmax_attention(q, keys, keys[..., :4]),
    )


@pytest.mark.parametrize("compiled", [False, True])
def test_what_is_new_may_lie_in_the_caches(compiled: bool) -> None:
    """It is read before they are written, in whichever of them it lies."""
    attend: Any = entmax_attention_with_kvcache
    lengths = torch.full((1,), 4, dtype=torch.int32)
    for queries, keys, values in ((None, 0, 1), (0, None, None), (None, 1, 0), (1, 0, 0)):
        torch._dynamo.reset()
        if compiled:
            attend = torch.compile(
                entmax_attention_with_kvcache, fullgraph=True, backend="aot_eager"
            )
        caches = [torch.randn(1, 4, 10, 8) for _ in "kv"]
        copies = [t.clone() for t in caches]
        fresh = torch.randn(1, 4, 2, 8)
        views = [fresh if i is None else caches[i][:, :, 3:5] for i in (queries, keys, values)]
        said = [t.clone() for t in views]
        with torch.no_grad():
            out = attend(views[0], *caches, *views[1:], cache_lengths=lengths)
        exact = entmax_attention_with_kvcache(said[0], *copies, *said[1:], cache_lengths=lengths)
        torch.testing.assert_close(out, exact)
        assert all(map(torch.equal, caches, copies))


@pytest.mark.parametrize("shape", [(0, 16, 2, 16), (27, 0, 2, 16)])
def test_pages_that_hold_nothing_are_refused(shape: tuple[int, ...]) -> None:
    cached = Cached(16, torch.float32, "cpu")
    cached.cache = [torch.zeros(shape) for _ in "kv"]
    with pytest.raises(ValueError, match="key_cache must have pages of at least one key"):
        entmax_attention_with_kvcache(cached.query, *cached.cache, block_table=cached.table)


def test_a_gradient_is_refused() -> None:
    cached = Cached(0, torch.float32, "cpu")
    cached.query.requires_grad_()
    with pytest.raises(RuntimeError, match="query must not require a gradient"):
        cached.attend()
    with torch.no_grad():
        cached.attend()
    cached.query = cached.query.detach()
    for name in ("alpha", "scale", "sinks", "alibi_slopes"):
        learned = torch.full((HEADS_Q,), 1.5, requires_grad=True)
        with pytest.raises(RuntimeError, match=f"{name} must not require a gradient"):
            cached.attend(**{name: learned})


def test_vmap_over_pages_is_refused() -> None:
    cached = Cached(16, torch.float32, "cpu")

    def one(query: Tensor) -> Tensor:
        return entmax_attention_with_kvcache(
            query, *cached.cache, cache_lengths=5, block_table=torch.zeros_like(cached.table)
        )

    with pytest.raises(RuntimeError, match="vmap does not go over a paged cache"):
        torch.vmap(one)(cached.query[None])
