"""Masks, windows, slopes and all else that a call may say, against the float64 reference: each
feature in each dtype, pairs of them, forward and all gradients; packed sequences as calls."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import language
import pytest
import reference
import torch
from cases import device_of, interpreted, usable_backends
from language import CALLS, FEATURES, PLACES, VARIANTS, WITH_ADDED, Call, Sizes
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import adasplash2
from adasplash2 import dense, ops, problem, softmax
from adasplash2.lowering import new_seed
from adasplash2.options import Options

BACKENDS = pytest.mark.parametrize("backend", usable_backends())
SEED = 7

MOST_DECODED = 16
"""Queries that backends may treat otherwise where no gradient is wanted."""

INTERPRETED = tuple(
    call
    for call in CALLS
    if len(call.features) == 1 and call.sizes == Sizes() and call.sharpness == 1.0
    if call.dtype == torch.float32 and call.features[0] not in VARIANTS
) + tuple(Call(together, torch.bfloat16) for together in WITH_ADDED)

LIMITS = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 8e-3, torch.bfloat16: 2e-2}
"""Relative error (norms over whole tensors) of a gradient; of the output a tenth."""

CPU_LIMITS = {**LIMITS, torch.float64: 1e-11}


def attend(call: Callable[..., Any], *args: Any, backend: str, **said: Any) -> Any:
    """Skips where a GPU's backend refuses; the CPU must run everything."""
    torch.manual_seed(SEED)
    try:
        return call(*args, **said, backend=backend)
    except adasplash2.BackendRefused as refused:
        if backend == "cpu":
            raise
        pytest.skip(str(refused))


def leaves_of(call: Call, device: str) -> tuple[list[Tensor], Tensor, dict[str, Any]]:
    """Tensors that require gradients, the output's gradient, and what is said beside."""
    *tensors, grad = (t.to(device, call.dtype) for t in call.tensors())
    compute = problem.compute_dtype(call.dtype)
    said = {}
    for name, given in call.said().items():
        if isinstance(given, Tensor):
            given = given.to(device)
            if given.is_floating_point():
                dtype = call.mask_dtype if name == "attn_mask" else compute
                given = given.to(dtype).requires_grad_()
        said[name] = given
    return [t.requires_grad_() for t in tensors], grad, said


def expected(call: Call, seed: int | None) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """Output, gradients by name, and probabilities, in float64."""
    query, key, value, grad = call.tensors()
    leaves = {"query": query, "key": key, "value": value}
    said = call.said()
    dropout_p = said.pop("dropout_p", 0.0)
    if dropout_p:
        n = call.sizes
        shape = n.batch, n.heads_q, n.length_q, n.length_k
        said["kept"] = language.dropout_factors(seed or 0, shape, dropout_p)
    for name, given in said.items():
        if isinstance(given, Tensor) and given.is_floating_point():
            leaves[name] = given
    leaves.pop("kept", None)
    for leaf in leaves.values():
        leaf.requires_grad_()
    out, p = language.attention(query, key, value, **said)
    gradients = torch.autograd.grad(out, list(leaves.values()), grad)
    return out.detach(), dict(zip(leaves, gradients, strict=True)), p.detach()


def assert_near(name: str, got: Tensor, exact: Tensor, limit: float) -> None:
    least = 1e-2 * exact.numel() ** 0.5  # of gradients whose terms cancel, of order one
    assert_nearer(name, got, exact, limit, least)


def assert_nearer(name: str, got: Tensor, exact: Tensor, limit: float, least: float) -> None:
    error = reference.error(got.cpu(), exact)
    assert error <= limit * max(reference.norm(exact), least), f"{name}: {error:.2e}"


@BACKENDS
@interpreted(call=INTERPRETED)  # fmt: skip
@pytest.mark.parametrize("call", CALLS, ids=lambda call: call.name)
def test_attention_and_gradients(call: Call, backend: str) -> None:
    assert_right(call, backend)


def assert_right(call: Call, backend: str) -> None:
    """Output and all gradients are the reference's."""
    device = device_of(backend)
    tensors, grad, said = leaves_of(call, device)
    out = attend(adasplash2.entmax_attention, *tensors, **said, enable_gqa=True, backend=backend)
    learned = [name for name, t in said.items() if isinstance(t, Tensor) and t.requires_grad]
    gradients = torch.autograd.grad(out, [*tensors, *(said[name] for name in learned)], grad)
    torch.manual_seed(SEED)
    seed = int(new_seed(torch.device(device))) if "dropout" in call.features else None
    exact_out, exact, p = expected(call, seed)
    limit = (CPU_LIMITS if backend == "cpu" else LIMITS)[call.dtype]
    assert_near("out", out, exact_out, limit / 10.0 if call.dtype != torch.bfloat16 else limit / 4)
    for name, got in zip(("query", "key", "value", *learned), gradients, strict=True):
        # The sum over keys of a row's gradients of scores is nothing.
        is_nothing = name == "attn_mask" and exact[name].shape[3] == 1
        sums_of_nothing = reference.norm(exact["query"]) if is_nothing else 0.0
        if backend == "cpu" and name != "alpha":
            rounding = torch.finfo(got.dtype).eps / 2.0
            assert_nearer(name, got, exact[name], max(limit, rounding), sums_of_nothing)
        else:
            least = max(1e-2 * exact[name].numel() ** 0.5, sums_of_nothing)
            assert_nearer(name, got, exact[name], LIMITS[call.dtype], least)
    if backend == "cpu" and call.dtype == torch.float64:
        assert_right_thresholds(call, tensors, said, p)
    if call.sizes.length_q <= MOST_DECODED:
        with torch.no_grad():
            said = {k: t.detach() if isinstance(t, Tensor) else t for k, t in said.items()}
            out = attend(
                adasplash2.entmax_attention, *tensors, **said, enable_gqa=True, backend=backend
            )
        assert_near(
            "decoded", out, exact_out, limit / 10.0 if call.dtype != torch.bfloat16 else limit / 4
        )


def assert_right_thresholds(
    call: Call, tensors: list[Tensor], said: dict[str, Any], p: Tensor
) -> None:
    with torch.no_grad():
        said = {name: given for name, given in said.items() if name != "dropout_p"}
        stats = adasplash2.attention_stats(*tensors, **said, enable_gqa=True, backend="cpu")
        exact = call.said()
        exact.pop("dropout_p", None)
        alpha = exact.pop("alpha", 1.5)
        tau = language.thresholds(language.scores(*call.tensors()[:2], **exact), alpha)
    assert reference.relative_error(stats.tau, tau) < 1e-12
    assert torch.equal(stats.support, (p > 0).sum(-1).int())


@pytest.mark.parametrize("seed", range(10))
def test_random_calls(seed: int) -> None:
    """Many features at once, odd sizes, rows with short lists and flat ones."""
    for number, call in enumerate(language.random_calls(12, seed)):
        try:
            assert_right(call, "cpu")
        except AssertionError as error:
            raise AssertionError(f"number {number} of seed {seed}: {call}") from error


@BACKENDS
@interpreted(features=(("causal",), ("lengths", "causal"), ("bool mask",)))
@pytest.mark.parametrize(
    "features",
    [
        *(("causal",), ("lengths", "causal"), ("bool mask",), ("sinks",), ("slopes",)),
        *(("added mask",), ("left window",)),
    ],
)
def test_statistics(features: tuple[str, ...], backend: str) -> None:
    call = Call(features)
    tensors, _, said = leaves_of(call, device_of(backend))
    with torch.no_grad():
        stats = attend(
            adasplash2.attention_stats, *tensors, **said, enable_gqa=True, backend=backend
        )
    _, _, p = expected(call, None)
    assert torch.equal(stats.support.cpu(), (p > 0).sum(-1).int())
    n = call.sizes
    places = {k: v for k, v in call.said().items() if k in PLACES}
    visible = language.seen(n.length_q, n.length_k, n.batch, **places)[0][:, None]
    mask = said.get("attn_mask")
    if mask is not None:
        visible = visible & (mask if mask.dtype == torch.bool else mask > -math.inf).cpu()
    visible = visible.expand(p.shape)
    seen = torch.nn.functional.max_pool2d(visible.double(), 64, ceil_mode=True).sum((-1, -2))
    live = torch.nn.functional.max_pool2d((p > 0).double(), 64, ceil_mode=True).sum((-1, -2))
    assert_near("empty tiles", stats.empty_tiles, (seen - live) / seen.clamp(min=1.0), 1e-12)


@BACKENDS
@pytest.mark.parametrize("hidden", [1, 64])
@pytest.mark.parametrize("left", [0, 1, 2])
def test_tiles_whose_pairs_a_mask_hides_are_not_counted(
    left: int, hidden: int, backend: str
) -> None:
    """Of the second block's rows the first few see the first block's last keys, unless a mask
    hides these: the tile has allowed pairs or none, whatever the rows below them see."""
    device = device_of(backend)
    query, key = torch.ones(1, 1, 80, 16, device=device), torch.zeros(1, 1, 80, 16, device=device)
    mask = torch.ones(1, 1, 1, 80, dtype=torch.bool, device=device)
    mask[..., 64 - hidden : 64] = False
    said = {"attn_mask": mask, "window": (left, 80), "backend": backend}
    with torch.no_grad():
        stats = attend(adasplash2.attention_stats, query, key, key, **said)
    assert stats.empty_tiles.item() == 0.0  # all that is allowed has the same score


@BACKENDS
@interpreted()
@pytest.mark.parametrize("masked", ["", "bool", "added"])
@pytest.mark.parametrize("causal_align", ["top-left", "bottom-right"])
def test_packed_sequences_are_calls_of_their_own(
    causal_align: str, masked: str, backend: str
) -> None:
    device = device_of(backend)
    lengths_q, lengths_k = (5, 0, 37, 70), (9, 3, 37, 20)
    generator = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device)

    slopes = torch.tensor([0.0, 0.1, 0.2, 1.0], device=device)
    said = {"is_causal": True, "causal_align": causal_align, "softcap": 3.0, "enable_gqa": True}
    said |= {"alibi_slopes": slopes, "backend": backend}
    tensors = [normal(sum(lengths_q), 4, 16), normal(sum(lengths_k), 2, 16)]
    tensors = [*tensors, normal(sum(lengths_k), 2, 8)]
    mask = normal(4, sum(lengths_q), sum(lengths_k)) if masked else None
    if masked == "bool":
        mask = mask > -0.5
    leaves = [t.requires_grad_() for t in (*tensors, *([mask] if masked == "added" else []))]
    cumulative = [
        torch.tensor([0, *itertools.accumulate(n)], dtype=torch.int32, device=device)
        for n in (lengths_q, lengths_k)
    ]
    packed = adasplash2.entmax_attention_varlen
    out = attend(packed, *tensors, *cumulative, *(70, 37), **said, attn_mask=mask)
    assert out.is_contiguous()
    grad = normal(*out.shape)
    gradients = torch.autograd.grad(out, leaves, grad)
    own = [
        [slice(end - n, end) for n, end in zip(each, itertools.accumulate(each), strict=True)]
        for each in (lengths_q, lengths_k)
    ]
    outs = [
        attend(
            adasplash2.entmax_attention,
            *(t[part].transpose(0, 1) for t, part in zip(tensors, (q, k, k), strict=True)),
            **said,
            attn_mask=None if mask is None else mask[:, q, k],
        ).transpose(0, 1)
        for q, k in zip(*own, strict=True)
    ]
    apart = torch.cat(outs)
    assert_near("out", out, apart.detach().cpu(), 1e-5)
    for got, exact in zip(gradients, torch.autograd.grad(apart, leaves, grad), strict=True):
        assert_near("gradient", got, exact.cpu(), 1e-4)


@BACKENDS
@interpreted()
def test_answers_about_packed_sequences(backend: str) -> None:
    """By offsets as nested, and as of each sequence alone."""
    device = device_of(backend)
    lengths_q, lengths_k = (5, 0, 37, 70), (9, 3, 37, 20)
    q, k = (torch.randn(sum(n), 2, 16, device=device) for n in (lengths_q, lengths_k))
    places = [
        torch.tensor([0, *itertools.accumulate(n)], dtype=torch.int32, device=device)
        for n in (lengths_q, lengths_k)
    ]
    slopes = torch.rand(4, 2, device=device)
    said = {"is_causal": True, "causal_align": "bottom-right", "backend": backend}
    packing = dict(zip(("cu_seqlens_q", "cu_seqlens_k"), places, strict=True))
    with torch.no_grad():
        stats = attend(adasplash2.attention_stats, q, k, k, **said, **packing, alibi_slopes=slopes)
        begins, alone = [torch.stack([p[:-1], p[1:]]).T.tolist() for p in places], []
        for (a, b), (c, d), slope in zip(*begins, slopes, strict=True):
            own = (t.transpose(0, 1)[None] for t in (q[a:b], k[c:d], k[c:d]))
            alone.append(attend(adasplash2.attention_stats, *own, **said, alibi_slopes=slope))
    assert stats.support.shape == (1, 2, sum(lengths_q))
    assert torch.equal(stats.support, torch.cat([one.support for one in alone], dim=2))
    torch.testing.assert_close(stats.tau, torch.cat([one.tau for one in alone], dim=2))
    told = adasplash2.explain(
        q, k, k, **said, **packing, max_seqlen_q=70, max_seqlen_k=37, alibi_slopes=slopes
    )
    assert told.chosen == backend
    assert "packed sequences" in told.problem


class OfEach:
    """Packed sequences, what each has of its own, and in float64 what comes of them one by one."""

    LENGTHS = (5, 0, 37, 70, 3), (9, 3, 37, 20, 0)

    def __init__(
        self, dtype: torch.dtype, device: str, *, plain: bool = False, **said: Any
    ) -> None:
        r = language.Randomness()
        of_queries, of_keys = map(sum, self.LENGTHS)
        exact = [r.normal(of_queries, 4, 16), r.normal(of_keys, 2, 16), r.normal(of_keys, 2, 8)]
        slopes = r.uniform(5, 4) * torch.tensor([0.0, 1.0, 1.0, 8.0], dtype=torch.float64)
        exact = [t.to(dtype).double() for t in exact]
        exact += [t.float().double() for t in (slopes, 0.1 + 0.3 * r.uniform(5, 4, 1))]
        grad = r.normal(of_queries, 4, 8).to(dtype).double()
        compute = problem.compute_dtype(dtype)
        self.said, self.grad = said, grad.to(device, dtype)
        self.leaves = [
            t.to(device, dtype if i < 3 else compute).requires_grad_() for i, t in enumerate(exact)
        ]
        self.places = [
            torch.tensor([0, *itertools.accumulate(n)], dtype=torch.int32, device=device)
            for n in self.LENGTHS
        ]
        q, k, v, slopes, scales = exact = [t.requires_grad_() for t in exact]
        outs, of_each = [], {} if plain else {"alibi_slopes": slopes, "scale": scales}
        if plain:
            exact, self.leaves = exact[:3], self.leaves[:3]
        parts = (q.split(self.LENGTHS[0]), *(t.split(self.LENGTHS[1]) for t in (k, v)))
        for i, tensors in enumerate(zip(*parts, strict=True)):
            four = (t.transpose(0, 1)[None] for t in tensors)
            mine = {name: t[i : i + 1] for name, t in of_each.items()}
            if tensors[0].numel() and tensors[1].numel():
                outs.append(language.attention(*four, **mine, **said)[0][0].transpose(0, 1))
            else:
                outs.append(torch.zeros(len(tensors[0]), 4, 8, dtype=torch.float64))
        self.exact = torch.cat(outs)
        self.gradients = torch.autograd.grad(self.exact, exact, grad)

    def assert_right(self, out: Tensor, limit: float) -> None:
        assert_near("out", out.detach(), self.exact.detach(), limit / 4)
        found = torch.autograd.grad(out, self.leaves, self.grad)
        names = ("query", "key", "value", "alibi_slopes", "scale")
        for name, got, exact in zip(names, found, self.gradients, strict=False):
            assert_near(name, got, exact, limit)


@BACKENDS
@interpreted(dtype=torch.float32, said=({"is_causal": True, "causal_align": "bottom-right"},))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("said", [
    {"is_causal": True, "causal_align": "bottom-right"}, {"window": (9, 4), "softcap": 2.0},
    {"is_causal": True, "alpha": 1.25}, {},
], ids=str)  # fmt: skip
def test_slopes_and_scales_of_each_packed_sequence(
    said: dict[str, Any], dtype: torch.dtype, backend: str
) -> None:
    """With their gradients, by offsets and nested; the slopes are not those of other sequences."""
    case = OfEach(dtype, device_of(backend), **said)
    q, k, v, slopes, scale = case.leaves
    said = said | {"alibi_slopes": slopes, "scale": scale, "enable_gqa": True}
    packed = adasplash2.entmax_attention_varlen
    out = attend(packed, q, k, v, *case.places, **said, backend=backend)
    case.assert_right(out, LIMITS[dtype])
    nested = [
        torch.nested.nested_tensor_from_jagged(t, offsets).transpose(1, 2)
        for t, offsets in ((q, case.places[0]), (k, case.places[1]), (v, case.places[1]))
    ]
    out = attend(adasplash2.entmax_attention, *nested, **said, backend=backend)
    case.assert_right(out.transpose(1, 2).values(), LIMITS[dtype])


def test_slopes_of_each_packed_sequence_compile_to_one_graph() -> None:
    torch._dynamo.reset()
    case = OfEach(torch.float32, "cpu", is_causal=True)

    def of(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor, scale: Tensor) -> Any:
        return adasplash2.entmax_attention_varlen(
            q, k, v, *case.places, is_causal=True, alibi_slopes=slopes, scale=scale, enable_gqa=True
        )

    compiled = torch.compile(of, fullgraph=True, backend="aot_eager", dynamic=True)
    case.assert_right(compiled(*case.leaves), LIMITS[torch.float32])


@pytest.mark.parametrize("alpha", [1.0, 1.5])
def test_slopes_of_nested_tensors_with_holes(alpha: float) -> None:
    case = Holes("query and key")
    slopes = torch.tensor([[0.0, 1.0], [3.0, 0.5], [0.2, 2.0]], requires_grad=True)
    said = {"alpha": alpha, "is_causal": True}
    out = adasplash2.entmax_attention(*case.nested, alibi_slopes=slopes, **said)
    out = out.transpose(1, 2).values()
    (found,) = torch.autograd.grad(out.sum(), slopes, retain_graph=True)
    places, alone = case.nested[0].transpose(1, 2).offsets().tolist(), []
    for place, slope, *rows in zip(places, slopes, *case.alone, strict=False):
        one = adasplash2.entmax_attention(
            *(t.transpose(0, 1) for t in rows), alibi_slopes=slope, **said
        ).transpose(0, 1)
        torch.testing.assert_close(out[place : place + len(one)], one)
        alone.append(one.sum())
    torch.testing.assert_close(found, *torch.autograd.grad(sum(alone), slopes))


@pytest.mark.parametrize("alpha", [1.0, 1.5])
def test_no_packed_sequences_at_all(alpha: float) -> None:
    tensors = [torch.randn(0, 2, width, requires_grad=True) for width in (8, 8, 4)]
    places = torch.zeros(1, dtype=torch.int32)
    out = adasplash2.entmax_attention_varlen(*tensors, places, places, is_causal=True, alpha=alpha)
    gradients = torch.autograd.grad(out.sum(), tensors)
    assert [t.shape for t in (out, *gradients)] == [(0, 2, 4), (0, 2, 8), (0, 2, 8), (0, 2, 4)]


@BACKENDS
@interpreted()
def test_nested_tensors_are_packed_sequences(backend: str) -> None:
    device = device_of(backend)
    lengths = (5, 19, 33)
    rows = [torch.randn(n, 2, 8, device=device) for n in lengths]
    nested = torch.nested.nested_tensor(rows, layout=torch.jagged).transpose(1, 2)
    out = attend(
        adasplash2.entmax_attention, nested, nested, nested, is_causal=True, backend=backend
    )
    assert out.shape[0] == 3
    for got, row in zip(out.transpose(1, 2).unbind(), rows, strict=True):
        one = row.transpose(0, 1)
        alone = attend(adasplash2.entmax_attention, one, one, one, is_causal=True, backend=backend)
        assert_near("out", got.transpose(0, 1), alone.cpu(), 1e-5)


SEQUENCES = {
    "query": ((2, 9, 9, 16), (5, 0, 4), (0, 7, 7, 14), (7, 0, 7)),
    "key": ((0, 6, 10, 19), (6, 2, 7), (0, 6, 10, 19), (6, 4, 9)),
}
"""Where they begin, and how long they are, with holes and without."""


class Holes:
    """Nested query, key and value of three sequences, with padding full of NaN where ``lengths``
    are said; and the sequences alone."""

    def __init__(self, holes: str, device: str = "cpu") -> None:
        self.leaves, self.nested, self.alone = [], [], []
        for name, width in (("query", 8), ("key", 8), ("key", 4)):
            with_holes = name in holes
            places, lengths = SEQUENCES[name][:2] if with_holes else SEQUENCES[name][2:]
            values = torch.full((places[-1] + 2 * with_holes, 2, width), math.nan)
            for place, length in zip(places, lengths, strict=False):
                values[place : place + length] = torch.randn(length, 2, width)
            values = values.to(device).requires_grad_()
            said = [torch.tensor(t, device=device) for t in (places, lengths)]
            jagged = torch.nested.nested_tensor_from_jagged(
                values, said[0], said[1] if with_holes else None
            )
            self.leaves.append(values)
            self.nested.append(jagged.transpose(1, 2))
            self.alone.append([values[p : p + n] for p, n in zip(places, lengths, strict=False)])

    def assert_right(self, values: Tensor, **said: Any) -> None:
        """``values`` are those of the result, packed."""
        grad = torch.ones_like(values)  # of padding too
        outs, places = [], self.nested[0].transpose(1, 2).offsets().tolist()
        exact = torch.zeros_like(values)
        for place, *rows in zip(places, *self.alone, strict=False):
            one = adasplash2.entmax_attention(*(t.transpose(0, 1) for t in rows), **said)
            outs.append(one.sum())
            exact[place : place + len(rows[0])] = one.transpose(0, 1)
        assert_near("out", values.detach(), exact.detach().cpu(), 1e-5)
        gradients = torch.autograd.grad(sum(outs), self.leaves)
        for got, one in zip(torch.autograd.grad(values, self.leaves, grad), gradients, strict=True):
            assert_near("gradient", got, one.cpu(), 1e-4)


@BACKENDS
@interpreted(holes=("query and key",), said=({"window": (2, 1), "causal_align": "bottom-right"},))
@pytest.mark.parametrize("holes", ["query", "key", "query and key"])
@pytest.mark.parametrize("said", [
    {"alpha": 1.0}, {"is_causal": True}, {"window": (2, 1), "causal_align": "bottom-right"},
    {"is_causal": True, "alpha": 1.0},
], ids=str)  # fmt: skip
def test_nobody_sees_the_holes_of_nested_tensors(
    said: dict[str, Any], holes: str, backend: str
) -> None:
    case = Holes(holes, device_of(backend))
    out = attend(adasplash2.entmax_attention, *case.nested, **said, backend=backend)
    assert out.shape[:3] == case.nested[0].shape[:3]  # also the number that stands for lengths
    case.assert_right(out.transpose(1, 2).values(), **said)


def test_holes_of_narrowed_tensors() -> None:
    dense = torch.randn(2, 10, 2, 8)
    nested = torch.nested.narrow(dense, 1, 0, torch.tensor([3, 10]), layout=torch.jagged)
    nested = nested.transpose(1, 2)
    out = adasplash2.entmax_attention(nested, nested, nested)
    padded = dense.transpose(1, 2)
    lengths = torch.tensor([3, 10], dtype=torch.int32)
    exact = adasplash2.entmax_attention(
        padded, padded, padded, q_lengths=lengths, kv_lengths=lengths
    )
    torch.testing.assert_close(out.transpose(1, 2).values(), exact.transpose(1, 2).flatten(0, 1))


def test_holes_compile_to_one_graph() -> None:
    torch._dynamo.reset()

    def attend(*nested: Tensor) -> Any:
        return adasplash2.entmax_attention(*nested, is_causal=True).transpose(1, 2).values()

    case = Holes("query and key")
    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    case.assert_right(compiled(*case.nested), is_causal=True)


def test_keys_and_values_of_equal_offsets_that_are_two_tensors() -> None:
    torch._dynamo.reset()
    x = torch.randn(9, 2, 8)
    q, k, v = (
        torch.nested.nested_tensor_from_jagged(x, torch.tensor([0, 5, 9])).transpose(1, 2)
        for _ in "qkv"
    )
    same = adasplash2.entmax_attention(q, q, q).values()
    assert torch.equal(adasplash2.entmax_attention(q, k, v).values(), same)
    compiled = torch.compile(adasplash2.entmax_attention, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(q, k, v).values(), same)


@pytest.mark.parametrize("shapes", [
    ((5, 8), (7, 8), (7, 4)),
    ((3, 5, 8), (3, 7, 8), (3, 7, 4)),
    ((2, 3, 2, 5, 8), (2, 1, 2, 7, 8), (1, 3, 2, 7, 4)),
    ((2, 3, 5, 8), (1, 3, 7, 8), (2, 1, 7, 4)),
    ((2, 3, 5, 8), (2, 1, 7, 8), (2, 1, 7, 4)),
    ((3, 5, 8), (2, 3, 7, 8), (7, 4)),
], ids=str)  # fmt: skip
def test_leading_dimensions_as_sdpa_has_them(shapes: tuple[tuple[int, ...], ...]) -> None:
    tensors = [torch.randn(shape, requires_grad=True) for shape in shapes]
    out = adasplash2.entmax_attention(*tensors)
    soft = torch.nn.functional.scaled_dot_product_attention(*tensors)
    assert out.shape == soft.shape
    sizes = torch.broadcast_shapes(*(t.shape[:-2] for t in tensors))
    full = [t.expand(*sizes, *t.shape[-2:]) for t in tensors]
    four = [t.reshape(-1, 1, *t.shape[-2:]).double() for t in full]
    exact = language.attention(*four)[0].view(out.shape)
    assert_near("out", out.detach(), exact.detach(), 1e-5)
    grad = torch.randn(out.shape)
    exact_grads = torch.autograd.grad(exact, tensors, grad.double())
    for got, one in zip(torch.autograd.grad(out, tensors, grad), exact_grads, strict=True):
        assert_near("gradient", got, one, 1e-4)


def test_torchs_causal_masks_are_taken() -> None:
    from torch.nn.attention.bias import causal_lower_right, causal_upper_left

    q, k = torch.randn(1, 2, 5, 8), torch.randn(1, 2, 9, 8)
    for mask, align in ((causal_upper_left, "top-left"), (causal_lower_right, "bottom-right")):
        got = adasplash2.entmax_attention(q, k, k, mask(5, 9))
        assert torch.equal(
            got, adasplash2.entmax_attention(q, k, k, is_causal=True, causal_align=align)
        )
        got = adasplash2.entmax_attention(q, k, k, mask(5, 9), window=(2, -1))
        said: dict[str, Any] = {"is_causal": True, "causal_align": align, "window": (2, -1)}
        assert torch.equal(got, adasplash2.entmax_attention(q, k, k, **said))


def test_window_and_causal_say_the_same_twice() -> None:
    q = torch.randn(1, 2, 40, 8)
    causal = adasplash2.entmax_attention(q, q, q, is_causal=True)
    assert torch.equal(adasplash2.entmax_attention(q, q, q, window=(-1, 0)), causal)
    assert torch.equal(adasplash2.entmax_attention(q, q, q, window=(-1, 7), is_causal=True), causal)


@BACKENDS
@interpreted()
def test_rows_that_see_nothing_are_zeros(backend: str) -> None:
    device = device_of(backend)
    tensors = [torch.randn(2, 2, 40, 16, device=device, requires_grad=True) for _ in "qkv"]
    mask = torch.ones(2, 1, 40, 40, dtype=torch.bool, device=device)
    mask[1, :, 7] = False
    lengths = torch.tensor([0, 33], dtype=torch.int32, device=device)
    out = attend(adasplash2.entmax_attention, *tensors, mask, q_lengths=lengths, backend=backend)
    gradients = torch.autograd.grad(out.sum(), tensors)
    assert not out[0].any()
    assert not out[1, :, 7].any()
    assert not out[1, :, 33:].any()
    assert out[1, :, 6].any()
    assert not gradients[0][0].any()
    assert not gradients[0][1, :, 7].any()
    assert all(g.isfinite().all() for g in gradients)


@BACKENDS
@interpreted()
def test_thresholds_without_keys_are_those_of_sinks(backend: str) -> None:
    """Whether keys are hidden or there are none."""
    device = device_of(backend)
    sinks = torch.tensor([0.5, -3.0], device=device)
    query = torch.randn(1, 2, 3, 8, device=device)
    hidden = {"kv_lengths": torch.zeros(1, dtype=torch.int32, device=device)}
    for length_k, said in ((0, {}), (9, hidden)):
        key = torch.randn(1, 2, length_k, 8, device=device)
        stats = attend(
            adasplash2.attention_stats, query, key, key, sinks=sinks, **said, backend=backend
        )
        expected = (0.5 * sinks - 1.0)[None, :, None].expand(1, 2, 3)
        torch.testing.assert_close(stats.tau, expected)
        assert not stats.support.any()


@BACKENDS
@interpreted()
def test_sinks_do_not_feel_what_comes_for_padding(backend: str) -> None:
    device = device_of(backend)
    query, key, value = (torch.randn(1, 1, 6, 8, device=device) for _ in "qkv")
    query[:, :, 4:] = math.nan
    sinks = torch.zeros(1, device=device, requires_grad=True)
    lengths = torch.full((1,), 4, dtype=torch.int32, device=device)
    out = attend(
        adasplash2.entmax_attention, query, key, value, sinks=sinks, q_lengths=lengths,
        backend=backend,
    )  # fmt: skip
    grad = torch.ones_like(out)
    (expected,) = torch.autograd.grad(out, sinks, grad, retain_graph=True)
    grad[:, :, 4:] = math.nan
    (got,) = torch.autograd.grad(out, sinks, grad)
    assert torch.equal(got, expected)
    assert got != 0.0


@BACKENDS
@interpreted()
def test_small_scales_of_rows_in_float16(backend: str) -> None:
    """Of large queries and keys: a gradient of a score times its scale is less than float16
    holds."""
    call = Call(("scale of rows",), torch.float16, Sizes(1, 1, 1, 20, 40, 16, 8))
    tensors, grad, said = leaves_of(call, device_of(backend))
    large = [(256.0 * t.detach()).requires_grad_() for t in tensors[:2]]
    said["scale"] = (said["scale"].detach() * 2.0**-16).requires_grad_()
    found = []
    for leaves, scale in ((tensors, said["scale"] * 2.0**16), (large, said["scale"])):
        leaves = [*leaves[:2], tensors[2]]
        out = attend(adasplash2.entmax_attention, *leaves, scale=scale, backend=backend)
        found.append([t.cpu() for t in (out, *torch.autograd.grad(out, leaves, grad))])
    for name, usual, small, size in zip(
        ("out", "query", "key", "value"), *found, (1.0, 256.0, 256.0, 1.0), strict=True
    ):
        assert_near(name, size * small.double(), usual.double(), LIMITS[torch.float16])


@BACKENDS
@interpreted(window=(1, 0))
@pytest.mark.parametrize("window", [(1, 0), (0, 1), (1, 1), (0, 0)])
def test_narrow_windows(window: tuple[int, int], backend: str) -> None:
    """With a key head for each query head: Triton's compiler takes a 1 for a constant."""
    tensors = [torch.randn(2, 2, 70, 16, device=device_of(backend)) for _ in "qkv"]
    query, key, value = (t.cpu().double() for t in tensors)
    far = torch.arange(70) - torch.arange(70)[:, None]
    hidden = (far < -window[0]) | (far > window[1])
    p = reference.entmax((query @ key.mT / 4.0).masked_fill(hidden, -math.inf), 1.5)
    got = attend(adasplash2.entmax_attention, *tensors, window=window, backend=backend)
    assert_near("out", got, p @ value, 1e-5)


@interpreted()
@pytest.mark.parametrize(("few", "length"), [(True, 300), (True, 384), (False, 300), (False, 384)])
def test_windows_of_few_tiles_and_of_many(
    few: bool, length: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The Triton backend keeps the maxima of few in registers, here of two tiles at a place, and
    does not ask for the end of the keys where tiles end with them."""
    if "triton" not in usable_backends():
        pytest.skip("the Triton backend cannot run here")
    from adasplash2.backends.triton import launch

    if few:
        monkeypatch.setattr(launch, "FEWEST_MAXIMA", 4)
    else:
        monkeypatch.setattr(launch, "FEW_MAXIMA", 0)
        monkeypatch.setattr(launch, "MAXIMA_CHUNK", 2 * 64)
    launch.forget()
    tensors = [torch.randn(1, 2, length, 16, device=device_of("triton")) for _ in "qkvg"]
    leaves = [t.requires_grad_() for t in tensors[:3]]
    out = attend(adasplash2.entmax_attention, *leaves, window=(77, 20), backend="triton")
    grads = torch.autograd.grad(out, leaves, tensors[3])
    launch.forget()
    query, key, value, grad = (t.detach().cpu().double() for t in tensors)
    far = torch.arange(length) - torch.arange(length)[:, None]
    p = reference.entmax(
        (query @ key.mT / 4.0).masked_fill((far < -77) | (far > 20), -math.inf), 1.5
    )
    u, dp = p.sqrt(), grad @ value.mT
    ds = u * (dp - (u * dp).sum(-1, keepdim=True) / u.sum(-1, keepdim=True))
    exact = p @ value, ds @ key / 4.0, ds.mT @ query / 4.0, p.mT @ grad
    for name, got, asked in zip(("out", "dq", "dk", "dv"), (out, *grads), exact, strict=True):
        assert_near(name, got.detach(), asked, 1e-5)


@BACKENDS
@interpreted()
def test_a_window_whose_rows_differ_in_bfloat16(backend: str) -> None:
    """Flat rows, sharp ones and ones between in one block: the Triton backend leaves the last step
    of thresholds to the output, which some rows are near to then and some are not."""
    length, left = 576, 300
    tensors = [torch.randn(1, 1, length, 16) for _ in "qkvg"]
    tensors[0] *= torch.tensor([0.1, 0.7, 2.0, 2.0, 8.0]).repeat(116)[:length, None]
    tensors = [t.to(device_of(backend), torch.bfloat16) for t in tensors]
    leaves = [t.requires_grad_() for t in tensors[:3]]
    said: dict[str, Any] = {"is_causal": True, "window": (left, 0), "backend": backend}
    out, aux = attend(adasplash2.entmax_attention, *leaves, **said, return_aux=True)
    grads = torch.autograd.grad(out, leaves, tensors[3])
    with torch.no_grad():
        plain = attend(adasplash2.entmax_attention, *leaves, **said)
    assert torch.equal(plain, out)
    query, key, value, grad = (t.detach().cpu().double() for t in tensors)
    far = torch.arange(length) - torch.arange(length)[:, None]
    scores = (query @ key.mT / 4.0).masked_fill((far < -left) | (far > 0), -math.inf)
    p = reference.entmax(scores, 1.5)
    x = scores / 2.0 - aux.tau.cpu().double().unsqueeze(-1)
    assert ((x.clamp(min=0.0) ** 2).sum(-1) - 1.0).abs().max() < 2e-5
    u, dp = p.sqrt(), grad @ value.mT
    ds = u * (dp - (u * dp).sum(-1, keepdim=True) / u.sum(-1, keepdim=True))
    exact = p @ value, ds @ key / 4.0, ds.mT @ query / 4.0, p.mT @ grad
    for name, got, asked in zip(("out", "dq", "dk", "dv"), (out, *grads), exact, strict=True):
        assert_near(name, got.detach(), asked, 4e-3)


@BACKENDS
@interpreted()
def test_padding_is_not_read(backend: str) -> None:
    """Whatever is in it, NaN too."""
    device = device_of(backend)
    tensors = [torch.randn(2, 2, 80, 16, device=device) for _ in "qkv"]
    lengths = torch.tensor([50, 80], dtype=torch.int32, device=device)
    said: dict[str, Any] = {"is_causal": True, "q_lengths": lengths, "kv_lengths": lengths}
    results = []
    for filler in (0.0, math.nan):
        leaves = [t.clone() for t in tensors]
        for leaf in leaves:
            leaf[0, :, 50:] = filler
            leaf.requires_grad_()
        out = attend(adasplash2.entmax_attention, *leaves, **said, backend=backend)
        results.append([out.detach(), *torch.autograd.grad(out.sum(), leaves)])
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)
        assert not one[0, :, 50:].any()


@BACKENDS
@interpreted()
@pytest.mark.parametrize("features", [("window",), ("lengths", "causal"), ("bool mask",)])
def test_a_poisoned_row_poisons_the_keys_that_it_may_see(
    features: tuple[str, ...], backend: str
) -> None:
    assert_poison_spreads(features, backend)


@pytest.mark.parametrize("feature", ["added mask", "slopes", "sinks", "softcap"])
def test_a_poisoned_row_whatever_else_is_said(feature: str) -> None:
    assert_poison_spreads((feature,), "cpu")


def assert_poison_spreads(features: tuple[str, ...], backend: str) -> None:
    call = Call(features, sizes=Sizes(batch=1, heads_q=2, heads_kv=1))
    tensors, grad, said = leaves_of(call, device_of(backend))
    with torch.no_grad():
        tensors[0][0, 1, 40, 3] = math.nan
    out = attend(adasplash2.entmax_attention, *tensors, **said, enable_gqa=True, backend=backend)
    n = call.sizes
    places = {k: v for k, v in call.said().items() if k in PLACES}
    visible = language.seen(n.length_q, n.length_k, n.batch, **places)[0][0, 40]
    mask = said.get("attn_mask")
    if mask is not None:
        row = mask.detach().cpu()[0, 1, 40]
        visible = visible & (row if row.dtype == torch.bool else row > -math.inf)
    learned = [t for t in (mask,) if t is not None and t.requires_grad]
    found = torch.autograd.grad(out, [*tensors, *learned], grad)
    assert out[0, 1].isnan().any(-1).sum() == 1
    assert found[0][0, 1, 40].isnan().all()
    for gradient in found[1:3]:
        assert torch.equal(gradient[0, 0].isnan().all(-1).cpu(), visible)
        assert torch.equal(gradient[0, 0].isnan().any(-1).cpu(), visible)
    for gradient in found[3:]:
        assert torch.equal(gradient[0, 1, 40].isnan(), visible)


@pytest.mark.parametrize("sharpness", [1.0, 0.01])
@pytest.mark.parametrize("feature", ["bool mask", "added mask", "window", "lengths"])
def test_what_is_hidden_is_not_felt(feature: str, sharpness: float) -> None:
    """NaN in keys and values that no query sees."""
    call = Call((feature,), sizes=Sizes(2, 2, 1, 70, 700), sharpness=sharpness)
    n = call.sizes
    tensors, grad, said = leaves_of(call, "cpu")
    said = {name: t.detach() if isinstance(t, Tensor) else t for name, t in said.items()}
    places = {k: v for k, v in said.items() if k in PLACES}
    visible = language.seen(n.length_q, n.length_k, n.batch, **places)[0].any(1)
    if "attn_mask" in said:
        mask = said["attn_mask"]
        mask[..., 40:110] = False if mask.dtype == torch.bool else -math.inf
        visible[:, 40:110] = False
    assert not visible.all()
    results = []
    for filler in (0.0, math.nan):
        with torch.no_grad():
            for t in tensors[1:]:
                t.masked_fill_(~visible[:, None, :, None], filler)
        out = adasplash2.entmax_attention(*tensors, **said, enable_gqa=True, backend="cpu")
        results.append([out.detach(), *torch.autograd.grad(out, tensors, grad)])
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


@BACKENDS
@interpreted()
@pytest.mark.parametrize("bad", [1.0, 0.5, 2.5, math.nan])
def test_an_alpha_that_is_none_makes_its_head_nan(bad: float, backend: str) -> None:
    device = device_of(backend)
    q = torch.randn(1, 2, 20, 8, device=device, requires_grad=True)
    alpha = torch.tensor([1.5, bad], device=device, requires_grad=True)
    more = {"attn_mask": torch.randn(1, 2, 20, 20), "sinks": torch.randn(2)}
    for said in ({}, more) if backend == "cpu" else ({},):
        out = attend(adasplash2.entmax_attention, q, q, q, alpha=alpha, **said, backend=backend)
        gradient, of_alpha = torch.autograd.grad(out.sum(), (q, alpha))
        assert out[:, 0].isfinite().all()
        assert gradient[:, 0].isfinite().all()
        assert out[:, 1].isnan().all()
        assert gradient[:, 1].isnan().all()
        assert of_alpha.isnan().tolist() == [False, True]


@BACKENDS
@interpreted()
@pytest.mark.parametrize("alpha", [1.0, 1.5])
def test_sinks_and_scales_that_are_no_numbers(alpha: float, backend: str) -> None:
    """As they are: none is -inf, the others make the rows of their head NaN."""
    device = device_of(backend)
    q = torch.randn(1, 2, 20, 8, device=device)
    plain = attend(adasplash2.entmax_attention, q, q, q, alpha=alpha, backend=backend)
    for name, bad in itertools.product(("sinks", "scale"), (math.nan, math.inf, -math.inf)):
        right = -math.inf if name == "sinks" else 8**-0.5
        said = {name: torch.tensor([right, bad], device=device)}
        out = attend(adasplash2.entmax_attention, q, q, q, alpha=alpha, **said, backend=backend)
        torch.testing.assert_close(out[:, 0], plain[:, 0])
        if bad == right:
            torch.testing.assert_close(out[:, 1], plain[:, 1])
        else:
            assert out[:, 1].isnan().all()


@BACKENDS
def test_dropout_repeats_and_keeps_the_expected_value(backend: str) -> None:
    device = device_of(backend)
    q = torch.randn(1, 2, 64, 16, device=device)
    v = torch.ones(1, 2, 64, 4, device=device)

    def drop() -> Tensor:
        return adasplash2.entmax_attention(q, q, v, dropout_p=0.25, backend=backend)

    first = attend(adasplash2.entmax_attention, q, q, v, dropout_p=0.25, backend=backend)
    torch.manual_seed(SEED)
    assert torch.equal(drop(), first)
    assert not torch.equal(drop(), first)
    mean = torch.stack([drop() for _ in range(200)]).mean()
    assert abs(mean.item() - 1.0) < 0.01
    torch.manual_seed(SEED)
    compiled = torch.compile(drop, fullgraph=True, backend="aot_eager")
    once, twice = compiled(), compiled()
    assert not torch.equal(once, twice)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@BACKENDS
@interpreted(dtype=torch.float16)
def test_a_row_of_one_key_has_no_gradient_under_dropout(backend: str, dtype: torch.dtype) -> None:
    """``dp - delta`` is zero there, which large keys multiply: also where values are divided by the
    share that is kept."""
    device = device_of(backend)
    torch.manual_seed(SEED)
    leaves = [torch.randn(1, 2, 40, 64).to(device, dtype) for _ in "qkv"]
    leaves[1][:, :, 0] = -3e4
    leaves[0][:, :, 0] = leaves[0][:, :, 0].abs()
    leaves = [leaf.requires_grad_() for leaf in leaves]
    grad_out = torch.randn(1, 2, 40, 64).to(device, dtype)
    out = attend(
        adasplash2.entmax_attention, *leaves, is_causal=True, dropout_p=0.1, backend=backend
    )
    (found,) = torch.autograd.grad(out, leaves[:1], grad_out)
    assert found[:, :, 0].abs().max() < 0.1


@BACKENDS
@interpreted()
def test_dropout_of_nearly_all_in_float16(backend: str) -> None:
    """What is left is multiplied by 100: a weight that a narrow number cannot hold as the kernels
    scale it, and a gradient that it can."""
    torch.manual_seed(SEED)
    device = device_of(backend)
    q, k, v = (torch.randn(1, 1, 300, 8, device=device).half() for _ in range(3))
    leaves = [t.requires_grad_() for t in (20.0 * q, k, v.abs() + 0.5)]
    out = attend(adasplash2.entmax_attention, *leaves, dropout_p=0.99, backend=backend)
    gradients = torch.autograd.grad(out, leaves, torch.ones_like(out))
    assert out.isfinite().all()
    assert out.max() > 64.0
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert gradients[2].max() > 64.0


def test_the_reference_is_right() -> None:
    """Its random numbers are those of the paper's known answer; its gradients those of finite
    differences, alpha's too."""
    words = language.philox([torch.zeros(1, dtype=torch.int64)] * 4, 0)
    assert [int(word) for word in words] == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    torch.manual_seed(0)
    scores = torch.randn(3, 4, 5, dtype=torch.float64, requires_grad=True)
    alphas = [[[1.3], [1.8], [1.001], [2.0]]]
    alpha = torch.tensor(alphas, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(language.Entmax.apply, (scores, alpha), eps=1e-7, atol=1e-5)


@BACKENDS
@interpreted()
@pytest.mark.parametrize("alpha", [1.0, 1.5])
def test_slopes_below_zero_that_none_could_refuse_are_nan(alpha: float, backend: str) -> None:
    """Inside a transform or a compiled graph values are not looked at; nor are those on a GPU."""
    query = torch.randn(1, 3, 20, 16, device=device_of(backend))

    def of(slopes: Tensor) -> Tensor:
        said = {"alpha": alpha, "alibi_slopes": slopes, "backend": backend}
        return attend(adasplash2.entmax_attention, query, query, query, **said)

    slopes = torch.tensor([0.5, -1e-3, 0.0], device=query.device)
    found = torch.func.vmap(of)(slopes[None])[0, 0]
    assert found.isnan().flatten(1).all(dim=1).tolist() == [False, True, False]
    assert not found[[0, 2]].isnan().any()


def test_questions_leave_the_generator_as_it_is() -> None:
    query = torch.randn(1, 2, 5, 8)
    before = torch.get_rng_state()
    adasplash2.explain(query, query, query, dropout_p=0.5)
    adasplash2.attention_stats(query, query, query, dropout_p=0.5)
    assert torch.equal(torch.get_rng_state(), before)
    adasplash2.entmax_attention(query, query, query, dropout_p=0.5)
    assert not torch.equal(torch.get_rng_state(), before)


def test_what_is_returned_beside() -> None:
    call = Call(("causal", "sinks", "added mask", "alphas"))
    tensors, _, said = leaves_of(call, "cpu")
    out, aux = adasplash2.entmax_attention(*tensors, **said, enable_gqa=True, return_aux=True)
    _, _, p = expected(call, None)
    found = aux.probabilities()
    assert found.layout == torch.sparse_csr
    assert_near("probabilities", found.to_dense().view(p.shape), p, 1e-5)
    assert torch.equal(aux.support, (p > 0).sum(-1).int())
    assert aux.tau.shape == p.shape[:3]
    assert not aux.tau.requires_grad
    assert out.requires_grad


def test_probabilities_are_found_some_queries_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """And from the keys alone that these see."""
    monkeypatch.setattr(adasplash2.auxiliary, "CHUNK", 500)
    seen = []
    of = adasplash2.AttentionAux._of
    monkeypatch.setattr(
        adasplash2.AttentionAux, "_of", lambda aux, *part: seen.append(part) or of(aux, *part)
    )
    query, key = torch.randn(2, 48, 2, 8).unbind()
    ends = torch.tensor([0, 20, 20, 31, 48], dtype=torch.int32)
    _, aux = adasplash2.entmax_attention_varlen(
        query, key, key, ends, ends, 20, 20, is_causal=True, return_aux=True
    )
    found = aux.probabilities().to_dense().view(2, 48, 48)
    assert len(seen) == 10  # of ten queries of a head
    assert all(keys.stop - keys.start <= 31 for *_, keys in seen)
    for begin, end in itertools.pairwise(ends.tolist()):
        part = slice(begin, end)
        own = (x[part].transpose(0, 1)[None] for x in (query, key, key))
        _, alone = adasplash2.entmax_attention(*own, is_causal=True, return_aux=True)
        expected = alone.probabilities().to_dense().view(2, end - begin, end - begin)
        torch.testing.assert_close(found[:, part, part], expected)
        found[:, part, part] = 0.0
    assert not found.any()


def test_probabilities_near_one_are_those_of_softmax() -> None:
    query, key = (torch.randn(1, 2, 9, 8, dtype=torch.float64) for _ in "qk")
    _, aux = adasplash2.entmax_attention(query, key, key, alpha=1.0 + 1e-10, return_aux=True)
    softmax = torch.softmax(query @ key.mT * 8**-0.5, dim=3)
    found = aux.probabilities().to_dense().view(softmax.shape)
    torch.testing.assert_close(found, softmax, rtol=1e-8, atol=0.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("alpha", [3.0, 8.0, 32.0])
@pytest.mark.parametrize("features", [(), ("causal", "sinks", "lengths")])
def test_probabilities_far_above_one_are_those_of_the_output(
    features: tuple[str, ...], alpha: float, dtype: torch.dtype
) -> None:
    """Thresholds lie ``n^(1 - alpha)`` below scores: they cannot tell."""
    tensors, _, said = leaves_of(Call(features, dtype), "cpu")
    said["alpha"] = alpha
    with torch.no_grad():
        out, aux = adasplash2.entmax_attention(
            *tensors, **said, enable_gqa=True, return_aux=True, backend="cpu"
        )
        stats = adasplash2.attention_stats(*tensors, **said, enable_gqa=True, backend="cpu")
    assert torch.equal(aux.support, stats.support)
    p = aux.probabilities().to_dense().view(*aux.tau.shape, -1)
    value = tensors[2].double().repeat_interleave(p.shape[1] // tensors[2].shape[1], dim=1)
    assert_near("output", out, p @ value, 1e-5 if dtype == torch.float32 else 1e-13)


LEARNED = {
    "added mask": "attn_mask", "bias of heads": "attn_mask", "bias of keys": "attn_mask",
    "slopes": "alibi_slopes", "slopes of batch": "alibi_slopes", "sinks": "sinks",
    "scale of heads": "scale", "scale of rows": "scale", "alphas": "alpha",
}  # fmt: skip


@pytest.mark.parametrize("feature", LEARNED)
def test_gradcheck(feature: str) -> None:
    call = Call((feature, "softcap"), torch.float64, Sizes(1, 2, 1, 7, 9, 4, 3))
    tensors, _, said = leaves_of(call, "cpu")
    name = LEARNED[feature]
    if name == "attn_mask":
        said[name] = said[name].detach().clamp(min=-3.0).requires_grad_()
    if feature == "slopes":
        said[name] = said[name].detach() + 0.05
        said[name].requires_grad_()

    def attend(operand: Tensor, *tensors: Tensor) -> Any:
        return adasplash2.entmax_attention(*tensors, **{**said, name: operand}, enable_gqa=True)

    assert torch.autograd.gradcheck(attend, (said[name], *tensors), eps=1e-7, atol=1e-5)


def test_learned_alpha_is_as_in_the_package_entmax() -> None:
    import entmax

    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 3, 12, 8, dtype=torch.float64) for _ in "qkv")
    ours = torch.tensor([1.3, 1.5, 1.9], dtype=torch.float64, requires_grad=True)
    theirs = ours.detach().clone().requires_grad_()
    grad = torch.randn(1, 3, 12, 8, dtype=torch.float64)
    adasplash2.entmax_attention(q, k, v, alpha=ours).backward(grad)
    scores = q @ k.mT * 8**-0.5
    p = entmax.entmax_bisect(scores, theirs[None, :, None, None], n_iter=100)
    (p @ v).backward(grad)
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-5, atol=1e-7)


@BACKENDS
def test_gradients_are_the_same_bits_each_time(backend: str) -> None:
    call = Call(("bias of keys", "alphas", "scale of heads", "sinks", "slopes"))
    results = []
    for _ in range(2):
        tensors, grad, said = leaves_of(call, device_of(backend))
        out = attend(
            adasplash2.entmax_attention, *tensors, **said, enable_gqa=True, backend=backend
        )
        learned = [t for t in said.values() if isinstance(t, Tensor) and t.requires_grad]
        results.append(torch.autograd.grad(out, [*tensors, *learned], grad))
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("features", [
    ("bias of keys", "alphas", "sinks", "slopes", "dropout"), ("bias of all", "alphas"),
    ("bias of queries",), ("bias in float32", "dropout", "slopes"),
], ids="+".join)  # fmt: skip
@pytest.mark.parametrize("sharpness", [1.0, 0.01])
def test_threads_change_no_bit(sharpness: float, features: tuple[str, ...]) -> None:
    """Not of the gradients of masks either, which many rows share."""
    call = Call(features, sizes=Sizes(2, 4, 2, 150, 600))
    results, before = [], torch.get_num_threads()
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        tensors, grad, said = leaves_of(replace(call, sharpness=sharpness), "cpu")
        out = attend(adasplash2.entmax_attention, *tensors, **said, enable_gqa=True, backend="cpu")
        learned = [t for t in said.values() if isinstance(t, Tensor) and t.requires_grad]
        results.append(torch.autograd.grad(out, [*tensors, *learned], grad))
    torch.set_num_threads(before)
    for others in results[1:]:
        for one, other in zip(results[0], others, strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("features", [("bottom-right",), ("window",), ("bool mask",), ("sinks",)])
def test_few_queries_are_poisoned_by_what_poisons_them_with_gradients(
    features: tuple[str, ...],
) -> None:
    tensors, _, said = leaves_of(Call(features, sizes=language.FEW), "cpu")
    with torch.no_grad():
        tensors[0][0, 3, 2, 1] = math.inf
        tensors[1][0, 0, 298:, 3] = math.nan
        tensors[2][1, 1, ::5] = math.inf
    exact = attend(adasplash2.entmax_attention, *tensors, **said, enable_gqa=True, backend="cpu")
    with torch.no_grad():
        out = attend(adasplash2.entmax_attention, *tensors, **said, enable_gqa=True, backend="cpu")
    assert not exact.isfinite().all()
    assert torch.equal(out.isnan(), exact.isnan())
    assert torch.equal(out.isinf(), exact.isinf())


@pytest.mark.parametrize("sharpness", [1.0, 0.01])
def test_threads_change_no_bit_of_decoding(sharpness: float) -> None:
    sizes = Sizes(1, 4, 1, 2, 30_000)
    call = Call(("bias of keys", "alphas", "sinks", "slopes", "dropout"), sizes=sizes)
    results, before = [], torch.get_num_threads()
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        tensors, _, said = leaves_of(replace(call, sharpness=sharpness), "cpu")
        with torch.no_grad():
            results.append(
                attend(
                    adasplash2.entmax_attention, *tensors, **said, enable_gqa=True, backend="cpu"
                )
            )
    torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.gpu
@pytest.mark.parametrize("compiles", [False, True])
def test_softmax_with_masks_has_finite_gradients(compiles: bool) -> None:
    """cuDNN's are NaN now and then where a mask hides a tile of keys, and torch asks it first."""
    torch.manual_seed(SEED)
    place = torch.arange(64, device="cuda")
    hidden = place > place[:, None]
    attend = adasplash2.entmax_attention
    if compiles:
        attend = torch.compile(attend, fullgraph=True)
    for mask in (~hidden, torch.zeros(64, 64, device="cuda").masked_fill(hidden, -math.inf)):
        mask = mask if mask.dtype == torch.bool else mask.bfloat16()
        for _ in range(10):
            inputs = torch.randn(3, 128, 8, 64, 32, device="cuda", dtype=torch.bfloat16)
            query, key, value = (t.requires_grad_() for t in (30.0 * inputs[0], *inputs[1:]))
            out = attend(query, key, value, mask, alpha=1.0)
            gradients = torch.autograd.grad(out.sum(), (query, key, value))
            assert all(gradient.isfinite().all() for gradient in gradients)


class Soft(NamedTuple):
    """A call at alpha = 1 for which SDPA may choose a kernel that makes all scores, as it is."""

    dtype: torch.dtype
    masked: str = ""
    heads_kv: int = 2
    head_dim: int = 64
    head_dim_v: int = 64
    strided: bool = False

    def tensors(self, length: int, device: str) -> list[Tensor]:
        sizes = (8, self.head_dim), (self.heads_kv, self.head_dim), (self.heads_kv, self.head_dim_v)
        made = [
            torch.randn(1, heads, length, dim, device=device, dtype=self.dtype)
            for heads, dim in sizes
        ]
        return [t.mT.contiguous().mT if self.strided else t for t in made]

    def mask(self, length: int, device: str) -> Tensor | None:
        of = torch.rand(length, length, device=device)
        made = {
            "": None,
            "bool": of < 0.7,
            "across": of.mT < 0.7,
            "added across": of.to(self.dtype).mT,
            "of queries": of[:, :1] < 0.7,
            "added of queries": of[:, :1].to(self.dtype),
            "expanded": (of[:, :1] < 0.7).expand(8, length, length),
            "expanded float": of.expand(8, length, length),
        }
        return made[self.masked]


MATRIX_FREE = pytest.mark.parametrize("soft", [
    Soft(torch.bfloat16, "bool"),
    Soft(torch.float32),
    Soft(torch.float32, "bool"),
    Soft(torch.bfloat16, "across"),
    Soft(torch.float32, "added across", heads_kv=8),
    Soft(torch.bfloat16, "of queries"),
    Soft(torch.float32, "added of queries", heads_kv=8),
    Soft(torch.float32, "expanded"),
    Soft(torch.bfloat16, "expanded float"),
    Soft(torch.float64, heads_kv=8),
    Soft(torch.float64, "bool"),
    Soft(torch.float32, "bool", head_dim=20, head_dim_v=7),
    Soft(torch.bfloat16, "bool", head_dim=23, head_dim_v=64),
    Soft(torch.bfloat16, head_dim_v=32),
    Soft(torch.bfloat16, strided=True, heads_kv=8),
], ids=lambda soft: "-".join(map(str, soft)))  # fmt: skip


@MATRIX_FREE
def test_softmax_on_a_gpu_asks_for_no_kernel_that_makes_a_matrix(
    soft: Soft, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What fused kernels for GPUs do not take: heads that share keys with a mask or in float32,
    head dims that are no multiples of 8, or of another stride than 1, such masks, float64."""
    length = 12
    inputs = problem.Inputs(*soft.tensors(length, "cpu"))
    if (mask := soft.mask(length, "cpu")) is not None:
        inputs = inputs._replace(attn_mask=mask[(None,) * (4 - mask.dim())])
    options = Options(alpha=1.0)
    asked = problem.validated(inputs, options._replace(enable_gqa=True), needs_grad=True)
    expected = dense.softmax_attention(asked, inputs, options)
    sdpa, given = torch.nn.functional.scaled_dot_product_attention, []

    def seen(*tensors: Tensor, **said: Any) -> Tensor:
        attn_mask = said["attn_mask"]
        given.extend([*tensors, *([] if attn_mask is None else [attn_mask])])
        assert not said.get("enable_gqa", False) or (attn_mask is None and tensors[0].itemsize < 4)
        return sdpa(*tensors, **said)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", seen)
    monkeypatch.setattr(dense, "has_flash", lambda device: False)
    monkeypatch.setattr(ops, "softmax_attention", lambda *asked: expected)
    on_gpu = replace(asked, device=torch.device("cuda"))
    near = {"rtol": 2e-2, "atol": 1e-2} if soft.dtype == torch.bfloat16 else {}
    torch.testing.assert_close(dense.softmax_attention(on_gpu, inputs, options), expected, **near)
    assert bool(given) == (soft.dtype != torch.float64 and "of queries" not in soft.masked)
    assert all(t.stride(-1) == 1 for t in given)
    assert all(t.shape[-1] % 8 == 0 for t in given[:3])
    assert all(t.shape[1] == 1 for t in given[3:])  # no mask is repeated for heads


@pytest.mark.gpu
@MATRIX_FREE
def test_softmax_on_a_gpu_makes_no_matrix(soft: Soft) -> None:
    length = 8192  # whose matrix is more than the parts that are held at a time
    tensors = [t.requires_grad_() for t in soft.tensors(length, "cuda")]
    mask = soft.mask(length, "cuda")
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    out = adasplash2.entmax_attention(*tensors, attn_mask=mask, alpha=1.0, enable_gqa=True)
    torch.autograd.grad(out.sum(), tensors)
    # In the dtype of scores, of 8 heads
    matrix = 8 * length * length * soft.dtype.itemsize
    assert torch.cuda.max_memory_allocated() - before < 0.8 * matrix


@pytest.mark.parametrize("features", [
    ("causal",), ("window", "added mask"), ("lengths", "sinks"), ("slopes", "softcap"),
    ("scale of rows",), ("dropout", "key mask"),
], ids="+".join)  # fmt: skip
def test_softmax_takes_it_all(features: tuple[str, ...]) -> None:
    """alpha = 1: rows sum to 1, also where SDPA does not know what is asked."""
    call = Call(features)
    tensors, _, said = leaves_of(call, "cpu")
    tensors[2] = torch.ones_like(tensors[2])
    out = adasplash2.entmax_attention(*tensors, **said, enable_gqa=True, alpha=1.0)
    near = adasplash2.entmax_attention(*tensors, **said, enable_gqa=True, alpha=1.0001)
    if "dropout" not in features:
        torch.testing.assert_close(out, near, rtol=1e-3, atol=1e-3)
    assert out.shape == near.shape


DEVICES = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
SOFT = tuple(
    call
    for call in CALLS
    if call.sharpness == 1.0 and call.sizes.length_k < 1000
    if call.dtype in (torch.float32, torch.float64) and "dropout" not in call.features
    if not any(feature.startswith("alpha") for feature in call.features)
)


@DEVICES
@pytest.mark.parametrize("call", SOFT, ids=lambda call: call.name)
def test_softmax_and_gradients(call: Call, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """alpha = 1 with all that may be said, some heads and queries at a time."""
    monkeypatch.setattr(softmax, "CHUNK", dict.fromkeys(("cpu", "cuda"), 2**11))
    monkeypatch.setattr(softmax, "ROWS", 16)
    tensors, grad, said = leaves_of(call, device)
    out = adasplash2.entmax_attention(*tensors, **said, enable_gqa=True, alpha=1.0)
    learned = {name: t for name, t in said.items() if isinstance(t, Tensor) and t.requires_grad}
    leaves = dict(zip(("query", "key", "value"), tensors, strict=True)) | learned
    exact_tensors = [t.requires_grad_() for t in call.tensors()[:3]]
    exact_said = call.said()
    for name in learned:
        exact_said[name].requires_grad_()
    exact, _ = language.attention(*exact_tensors, **exact_said, alpha=1.0)
    exact_leaves = [*exact_tensors, *(exact_said[name] for name in learned)]
    gradients = torch.autograd.grad(exact, exact_leaves, call.tensors()[3])
    limit = {torch.float32: 1e-5, torch.float64: 1e-12}[call.dtype]
    assert_near("out", out.detach(), exact.detach(), limit)
    found = torch.autograd.grad(out, list(leaves.values()), grad)
    for name, got, one in zip(leaves, found, gradients, strict=True):
        is_nothing = name == "attn_mask" and one.shape[3] == 1
        least = reference.norm(gradients[0]) if is_nothing else 1e-2 * one.numel() ** 0.5
        assert_nearer(name, got, one, max(limit, torch.finfo(got.dtype).eps / 2.0), least)


@DEVICES
@pytest.mark.parametrize("plain", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("said", [
    {}, {"is_causal": True}, {"is_causal": True, "causal_align": "bottom-right"},
    {"window": (9, 4), "causal_align": "bottom-right"}, {"window": (9, -1), "softcap": 2.0},
], ids=str)  # fmt: skip
def test_softmax_of_packed_sequences(
    said: dict[str, Any], dtype: torch.dtype, plain: bool, device: str
) -> None:
    """By SDPA, by torch's kernel for packed ones, or by operators of ours."""
    case = OfEach(dtype, device, plain=plain, **said, alpha=1.0)
    q, k, v = case.leaves[:3]
    said = said | {"enable_gqa": True, "alpha": 1.0}
    if not plain:
        said |= dict(zip(("alibi_slopes", "scale"), case.leaves[3:], strict=True))
    out = adasplash2.entmax_attention_varlen(q, k, v, *case.places, 70, 37, **said)
    case.assert_right(out, {**LIMITS, torch.float64: 1e-11}[dtype])


def varlen_attn(
    query: Tensor, key: Tensor, value: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor, max_q: int,
    max_k: int, *, scale: float | None = None, window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    """What torch's kernel of this name says of itself, in float64."""
    outs = []
    places = (list(itertools.pairwise(places.tolist())) for places in (cu_seq_q, cu_seq_k))
    for of_q, of_k in zip(*places, strict=True):
        assert of_q[1] - of_q[0] <= max_q
        assert of_k[1] - of_k[0] <= max_k
        parts = (query[slice(*of_q)], key[slice(*of_k)], value[slice(*of_k)])
        q, k, v = (t.transpose(0, 1)[None].double() for t in parts)
        assert enable_gqa or q.shape[1] == k.shape[1]
        said = {"window": window_size, "causal_align": "bottom-right", "scale": scale}
        outs.append(language.attention(q, k, v, **said, alpha=1.0)[0][0].transpose(0, 1))
    return torch.cat(outs).to(query.dtype)


@pytest.mark.parametrize(("lengths", "said", "taken"), [
    (None, {"window": (5, 2)}, True),
    (None, {"window": (5, 2), "sinks": torch.zeros(4)}, False),
    (((9, 30, 21), (9, 30, 21)), {"is_causal": True}, True),
    (((9, 30, 21), (20, 0, 40)), {}, True),
    (((9, 30, 21), (20, 0, 40)), {"is_causal": True}, False),
    (((9, 30, 21), (20, 0, 40)), {"is_causal": True, "causal_align": "bottom-right"}, True),
    (((9, 30, 21), (20, 0, 40)), {"window": (7, 3), "causal_align": "bottom-right"}, True),
    (((9, 30, 21), (20, 0, 40)), {"alibi_slopes": torch.ones(3, 4)}, False),
], ids=str)  # fmt: skip
@pytest.mark.parametrize("knows_groups", [True, False])
def test_softmax_by_torchs_kernel_for_packed_sequences(
    knows_groups: bool, lengths: Any, said: dict[str, Any], taken: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """What is handed to it, and what is not, without a GPU."""
    calls = []

    def noted(*args: Any, **named: Any) -> Tensor:
        calls.append(args)
        return varlen_attn(*args, **named)

    monkeypatch.setattr(dense, "has_flash", lambda device: True)
    monkeypatch.setattr(dense, "is_by_sequence", lambda problem, packed: False)
    monkeypatch.setattr(dense, "_torch_varlen", lambda: (noted, knows_groups))
    q, k, v = (torch.randn(2, heads, 60, 16).bfloat16() for heads in (4, 2, 2))
    said = said | {"alpha": 1.0, "enable_gqa": True}

    def attend(*tensors: Tensor) -> Tensor:
        out: Tensor
        if lengths is None:
            out = adasplash2.entmax_attention(*tensors, **said)
        else:
            places = [torch.tensor([0, *itertools.accumulate(n)]).int() for n in lengths]
            places = [places[0]] * 2 if lengths[0] == lengths[1] else places
            packed = (t[0].transpose(0, 1) for t in tensors)
            out = adasplash2.entmax_attention_varlen(*packed, *places, **said)
        return out

    got = attend(q, k, v)
    assert bool(calls) == (taken and knows_groups)
    exact = attend(*(t.double() for t in (q, k, v)))
    assert_near("out", got, exact, 5e-3)


@pytest.mark.parametrize("compiles", [False, True])
def test_softmax_of_packed_sequences_is_that_of_sdpa(
    monkeypatch: pytest.MonkeyPatch, compiles: bool
) -> None:
    """One call for each, where their places are known; a graph does not know them."""
    torch._dynamo.reset()
    case = OfEach(torch.float32, "cpu", plain=True, is_causal=True, alpha=1.0)
    asked = []
    sdpa = torch.nn.functional.scaled_dot_product_attention
    if not compiles:
        monkeypatch.setattr(
            torch.nn.functional,
            "scaled_dot_product_attention",
            lambda *args, **named: asked.append(named["is_causal"]) or sdpa(*args, **named),
        )

    def attend(*tensors: Tensor) -> Tensor:
        out: Tensor = adasplash2.entmax_attention_varlen(
            *tensors, *case.places, is_causal=True, enable_gqa=True, alpha=1.0
        )
        return out

    if compiles:
        attend = torch.compile(attend, fullgraph=True, backend="aot_eager", dynamic=True)
    case.assert_right(attend(*case.leaves), LIMITS[torch.float32])
    assert asked == [] if compiles else [True] * 3


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize(("of_q", "of_k"), [
    ([0, 3], [0, 0]), ([0, 0, 3], [0, 4, 4]), ([0, 0], [0, 4]), ([0, 0, 3], [0, 4, 9]),
])  # fmt: skip
def test_softmax_of_empty_sequences_has_gradients(
    of_q: list[int], of_k: list[int], dropout_p: float
) -> None:
    """Zeros where all are empty."""
    leaves = [torch.randn(n, 2, 8, requires_grad=True) for n in (of_q[-1], of_k[-1], of_k[-1])]
    places = [torch.tensor(of, dtype=torch.int32) for of in (of_q, of_k)]
    out = adasplash2.entmax_attention_varlen(*leaves, *places, 3, 5, alpha=1.0, dropout_p=dropout_p)
    assert out.requires_grad
    is_empty = of_k[-1] != 9
    assert out.shape == leaves[0].shape
    assert not (is_empty and out.any())
    for leaf, gradient in zip(leaves, torch.autograd.grad(out.sum(), leaves), strict=True):
        assert gradient.shape == leaf.shape
        assert gradient.isfinite().all()
        assert not (is_empty and gradient.any())


def test_what_dropout_keeps_of_softmax_is_scaled_in_float64() -> None:
    query, value = torch.zeros(1, 1, 64, 16), torch.eye(16)[None, None]
    tensors = (t.double() for t in (query, value, value))
    out = adasplash2.entmax_attention(*tensors, alpha=1.0, softcap=2.0, dropout_p=0.3)
    kept = out[out != 0.0]
    assert 0 < kept.numel() < out.numel()
    torch.testing.assert_close(kept, torch.full_like(kept, 1.0 / 16 / 0.7), rtol=1e-12, atol=0.0)


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_softmax_some_at_a_time_is_that_at_once(
    dropout_p: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the same probabilities dropped; gradients of gradients, and forward mode, are there."""
    call = Call(("window", "sinks", "scale of rows", "bias of heads"), torch.float64)
    tensors, grad, said = leaves_of(call, "cpu")
    said |= {"alpha": 1.0, "dropout_p": dropout_p, "enable_gqa": True}
    found = []
    for chunk in (2**11, 2**30):
        monkeypatch.setattr(softmax, "CHUNK", {"cpu": chunk})
        torch.manual_seed(SEED)
        out = adasplash2.entmax_attention(*tensors, **said)
        learned = [t for t in said.values() if isinstance(t, Tensor)]
        gradients = torch.autograd.grad(out, [*tensors, *learned], grad, retain_graph=True)
        again = torch.autograd.grad(out, [*tensors, *learned], grad, create_graph=True)
        penalty = sum(t.square().sum() for t in again)
        found.append([out, *gradients, *again, *torch.autograd.grad(penalty, tensors)])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)
    count = len(gradients)
    for one, other in zip(found[0][1 : count + 1], found[0][count + 1 :], strict=False):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)
    if not dropout_p:
        detached = {n: t.detach() if isinstance(t, Tensor) else t for n, t in said.items()}
        q, k, v = (t.detach() for t in tensors)

        def of(q: Tensor) -> Tensor:
            out: Tensor = adasplash2.entmax_attention(q, k, v, **detached)
            return out

        step = torch.randn(q.shape, dtype=q.dtype)
        _, moved = torch.func.jvp(of, (q,), (step,))
        torch.testing.assert_close((moved * grad).sum(), (found[0][1] * step).sum())


@pytest.mark.parametrize("feature", ["scale", "scale of rows", "softcap", "mask", "sinks"])
@pytest.mark.parametrize("alpha", [1.0, 1.5])
def test_padding_reaches_no_gradient(alpha: float, feature: str) -> None:
    """Of softmax neither where its own dense operators compute it, whatever padding holds and
    whatever comes back for it."""
    lengths = {n: torch.tensor([6, 3], dtype=torch.int32) for n in ("q_lengths", "kv_lengths")}
    said: dict[str, Any] = {
        "scale": {"scale": torch.rand(4)},
        "scale of rows": {"scale": torch.rand(2, 4, 6)},
        "softcap": {"softcap": 2.0},
        "mask": {"attn_mask": torch.randn(2, 4, 6, 6)},
        "sinks": {"sinks": torch.randn(4)},
    }[feature]
    whole = [torch.randn(2, heads, 6, 8) for heads in (4, 2, 2, 4)]
    found = []
    for bad in (0.0, math.nan, math.inf):
        *tensors, grad = (t.clone() for t in whole)
        for tensor in (*tensors, grad):
            tensor[1, :, 3:] = bad
        given = {n: t.clone() if isinstance(t, Tensor) else t for n, t in said.items()}
        if feature == "scale of rows":
            given["scale"][1, :, 3:] = bad
        leaves = [t.requires_grad_() for t in (*tensors, *given.values()) if isinstance(t, Tensor)]
        out = adasplash2.entmax_attention(
            *tensors, **given, **lengths, enable_gqa=True, alpha=alpha
        )
        found.append([out, *torch.autograd.grad(out, leaves, grad)])
    for one in found[1:]:
        for got, expected in zip(one, found[0], strict=True):
            assert torch.equal(got, expected)


def test_vmap_over_operands() -> None:
    torch.manual_seed(0)
    n = 3
    q, k, v = (torch.randn(n, 2, 2, 9, 8) for _ in "qkv")
    given = {
        "attn_mask": (torch.randn(n, 2, 1, 9, 9), "attn_mask"),
        "alibi_slopes": (torch.rand(n, 2), "alibi_slopes"),
        "sinks": (torch.randn(n, 2), "sinks"),
        "alpha": (1.2 + 0.5 * torch.rand(n, 2), "alpha"),
        "scale": (torch.rand(n, 2, 2, 9), "scale"),
    }
    for name, (operands, argument) in given.items():
        for mapped in (True, False):
            operand = operands if mapped else operands[0]

            def loss(operand: Tensor, q: Tensor, k: Tensor, v: Tensor, name=argument) -> Tensor:
                out = adasplash2.entmax_attention(q, k, v, **{name: operand})
                return out.square().sum()

            grad = torch.func.grad(loss, argnums=(0, 1, 2, 3))
            found = torch.func.vmap(grad, in_dims=(0 if mapped else None, 0, 0, 0))(
                operand, q, k, v
            )
            for i in range(n):
                one = grad(operand[i] if mapped else operand, q[i], k[i], v[i])
                for got, exact in zip(found, one, strict=True):
                    assert_near(f"{name} {mapped}", got[i], exact.double(), 1e-5)


@pytest.mark.parametrize("alpha", [1.0, None])
def test_vmap_over_numbers(alpha: float | None) -> None:
    """A scale and, where None, an alpha for each call, by all functions that take them."""
    torch.manual_seed(0)
    n = 3
    tensors = torch.randn(n, 2, 9, 8)
    scales, alphas = torch.rand(n), torch.linspace(1.1, 2.0, n)
    cu_seqlens = torch.tensor([0, 4, 9], dtype=torch.int32)

    def attend(t: Tensor, scale: float | Tensor, one: float | Tensor) -> Tensor:
        said = {"scale": scale, "alpha": one if alpha is None else alpha}
        by_token = t.transpose(0, 1)
        packed = adasplash2.entmax_attention_varlen(*[by_token] * 3, *[cu_seqlens] * 2, **said)
        cached = adasplash2.entmax_attention_with_kvcache(*[t[None]] * 3, **said)
        return adasplash2.entmax_attention(t, t, t, **said) + packed.transpose(0, 1) + cached[0]

    each = zip(tensors, scales.tolist(), alphas.tolist(), strict=True)
    expected = torch.stack([attend(*one) for one in each])
    torch.testing.assert_close(torch.vmap(attend)(tensors, scales, alphas), expected)


@pytest.mark.parametrize(("features", "more"), [
    *(((feature,), {}) for feature in FEATURES if feature not in VARIANTS),
    *((features, {"alpha": 1.0}) for features in (
        ("causal",), ("bottom-right",), ("window", "dropout"), ("lengths", "slopes"),
        ("added mask", "sinks"), ("softcap", "scale of rows"),
    )),
], ids=str)  # fmt: skip
def test_compiles_to_one_graph(features: tuple[str, ...], more: dict[str, Any]) -> None:
    torch._dynamo.reset()
    call = Call(features)

    def step(*tensors: Tensor, **said: Any) -> Tensor:
        out: Tensor = adasplash2.entmax_attention(*tensors, **said, **more, enable_gqa=True)
        return out

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    results = []
    for function in (step, compiled):
        tensors, grad, said = leaves_of(call, "cpu")
        torch.manual_seed(SEED)
        out = function(*tensors, **said)
        learned = [t for t in said.values() if isinstance(t, Tensor) and t.requires_grad]
        results.append([out.detach(), *torch.autograd.grad(out, [*tensors, *learned], grad)])
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("window", [(2**63, 2**63), (-1, 2**63 - 1), (2**63 - 1, -1)])
def test_windows_wider_than_any_number(window: tuple[int, int]) -> None:
    q = torch.randn(1, 2, 9, 8)
    for align in ("top-left", "bottom-right"):
        whole = adasplash2.entmax_attention(q[:, :, :4], q, q)
        got = adasplash2.entmax_attention(q[:, :, :4], q, q, window=window, causal_align=align)
        assert torch.equal(got, whole)


@pytest.mark.parametrize("alpha", [1.0, 1.5])
def test_nothing_leaks_out_of_other_documents(alpha: float) -> None:
    x = torch.randn(9, 2, 4)
    x[5:] = math.nan
    x.requires_grad_()
    places = torch.tensor([0, 5, 9], dtype=torch.int32)
    out = adasplash2.entmax_attention_varlen(x, x, x, places, places, alpha=alpha)
    (gradient,) = torch.autograd.grad(out[:5].sum(), x)
    assert out[:5].isfinite().all()
    assert out[5:].isnan().all()
    assert gradient[:5].isfinite().all()


def test_slices_of_one_seed_drop_the_same() -> None:
    x = torch.randn(2, 4, 9, 8).expand(3, 2, 4, 9, 8).clone().requires_grad_()
    results = {}
    for randomness in ("same", "different"):
        out = torch.vmap(
            lambda x: adasplash2.entmax_attention(x, x, x, dropout_p=0.5), randomness=randomness
        )(x)
        results[randomness] = out
        (gradient,) = torch.autograd.grad(out.sum(), x)
        assert torch.equal(gradient[0], gradient[1]) == (randomness == "same")
    assert torch.equal(results["same"][0], results["same"][1])
    assert not torch.equal(results["different"][0], results["different"][1])


@pytest.mark.parametrize("shape", [
    (3, 1, 5, 7), (3, 2, 5, 7), (2, 1, 1, 5, 7), (1, 3, 1, 5, 7), (1, 1, 1, 5, 7), (5, 7),
], ids=str)  # fmt: skip
def test_masks_broadcast_over_all_leading_dimensions(shape: tuple[int, ...]) -> None:
    q, k = torch.randn(2, 3, 2, 5, 4), torch.randn(2, 3, 2, 7, 4)
    mask = torch.randn(shape) > 0
    flat = [t.flatten(0, 1) for t in (q, k, k)]
    expected = adasplash2.entmax_attention(*flat, mask.expand(2, 3, 2, 5, 7).flatten(0, 1))
    assert torch.equal(adasplash2.entmax_attention(q, k, k, mask), expected.view(q.shape))


@pytest.mark.parametrize("alpha", [1.0, 1.5])
@pytest.mark.parametrize("lead", [(2, 3), (2, 1, 2), (3,), ()], ids=str)
def test_operands_and_results_have_the_leading_dimensions(
    lead: tuple[int, ...], alpha: float
) -> None:
    """As one batch of their product has them."""
    torch.manual_seed(0)
    flat, heads = math.prod(lead), 4
    q, k, v = (torch.randn(*lead, heads, n, 8) for n in (5, 7, 7))
    lengths = {
        "q_lengths": torch.randint(1, 6, lead, dtype=torch.int32),
        "kv_lengths": torch.randint(3, 8, lead, dtype=torch.int32),
        "kv_starts": torch.randint(0, 3, lead, dtype=torch.int32),
    }
    learned = {
        "alibi_slopes": torch.rand(*lead, heads, requires_grad=True),
        "scale": torch.rand(*lead, heads, 1, requires_grad=True),
    }
    said = {**lengths, **learned}

    def merged(tensor: Tensor) -> Tensor:
        return tensor.reshape(flat, *tensor.shape[len(lead) :])

    four, said_flat = [merged(t) for t in (q, k, v)], {name: merged(t) for name, t in said.items()}
    exact = adasplash2.entmax_attention(*four, **said_flat, alpha=alpha)
    out = adasplash2.entmax_attention(q, k, v, **said, alpha=alpha)
    assert out.shape == (*lead, heads, 5, 8)
    assert torch.equal(out, exact.view(out.shape))
    leaves = tuple(learned.values())
    gradients = [torch.autograd.grad(t.square().sum(), leaves) for t in (out, exact)]
    assert all(map(torch.equal, *gradients))
    assert torch.equal(adasplash2.entmax_attention(q, k, v, **said_flat, alpha=alpha), out)
    for rows in ((heads, 1), (1, heads, 5), (*lead[-1:], heads, 1), (*lead, 1, 1)):
        scale = torch.rand(rows)
        full = scale.expand(*(lead or (1,)), heads, 5)
        out = adasplash2.entmax_attention(q, k, v, scale=scale, alpha=alpha)
        exact = adasplash2.entmax_attention(*four, scale=full.reshape(flat, heads, 5), alpha=alpha)
        assert torch.equal(out, exact.view(out.shape))


@pytest.mark.parametrize("shape", [(2, 3, 4, 5, 8), (3, 4, 5, 8), (4, 5, 8), (5, 8)], ids=str)
def test_what_is_found_has_the_dimensions_of_the_output(shape: tuple[int, ...]) -> None:
    q = torch.randn(shape)
    out, aux = adasplash2.entmax_attention(q, q, q, return_aux=True)
    stats = adasplash2.attention_stats(q, q, q)
    for found in (aux.tau, aux.support, stats.tau, stats.support, stats.iterations):
        assert found.shape == out.shape[:-1]
    assert stats.empty_tiles.shape == out.shape[:-2]
    weights = aux.probabilities().to_dense().view(*aux.tau.shape, 5)
    torch.testing.assert_close(weights.float() @ q, out)


def test_nothing_at_all() -> None:
    """No heads, no queries."""
    none = torch.randn(1, 0, 4, 8)
    assert adasplash2.entmax_attention(none, none, none).shape == none.shape
    query, key = torch.randn(1, 2, 0, 8), torch.randn(1, 2, 9, 8)
    _, aux = adasplash2.entmax_attention(query, key, key, return_aux=True)
    assert aux.probabilities().shape == (0, 9)
    assert aux.support.shape == (1, 2, 0)


def test_packed_graphs_are_dynamic() -> None:
    torch._dynamo.reset()

    def packed(x: Tensor, places: Tensor, sinks: Tensor) -> Tensor:
        out: Tensor = adasplash2.entmax_attention_varlen(x, x, x, places, places, sinks=sinks)
        return out

    compiled = torch.compile(packed, fullgraph=True, dynamic=True, backend="aot_eager")
    for total in (9, 14):
        x, sinks = torch.randn(total, 2, 8), torch.zeros(2)
        places = torch.tensor([0, 4, total], dtype=torch.int32)
        assert torch.equal(compiled(x, places, sinks), packed(x, places, sinks))


TOTALS = (30, 31, 17, 44, 29, 52, 61, 77, 12, 90, 33, 25)
"""More than the graphs that torch keeps of one function."""


def offsets_attention(x: Tensor, places: Tensor) -> Any:
    return adasplash2.entmax_attention_varlen(x, x, x, places, places, is_causal=True)


def nested_attention(x: Tensor) -> Any:
    out = adasplash2.entmax_attention(x, x, x, is_causal=True)
    return out.transpose(1, 2).values()


def transposing_attention(x: Tensor) -> Any:
    return nested_attention(x.transpose(1, 2))


@pytest.mark.parametrize("dynamic", [True, None])
@pytest.mark.parametrize(("function", "holes"), [
    (offsets_attention, False),
    *((f, holes) for f in (nested_attention, transposing_attention) for holes in (False, True)),
])  # fmt: skip
def test_one_graph_for_packed_sequences_of_all_totals(
    function: Callable[..., Any], holes: bool, dynamic: bool | None
) -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, backend=counter, fullgraph=True, dynamic=dynamic)
    for total in TOTALS:
        x = torch.randn(total, 2, 8, requires_grad=True)
        places = torch.tensor([0, total // 3, total - holes])
        args: tuple[Tensor, ...] = x, places.int()
        if function is not offsets_attention:
            lengths = places.diff() - 1 if holes else None
            nested = torch.nested.nested_tensor_from_jagged(x, places, lengths)
            args = (nested.transpose(1, 2) if function is nested_attention else nested,)
        found = []
        for one in (compiled, function):
            out = one(*args)
            found.append((out.detach(), *torch.autograd.grad(out.square().sum(), x)))
        assert all(map(torch.equal, *found)), total
    assert counter.frame_count <= 2


def test_compiled_packed_sequences_of_wrong_offsets() -> None:
    """What is said has no number, which would be a constant of the graph."""
    torch._dynamo.reset()
    x, places = torch.randn(9, 2, 8), torch.tensor([0, 4, 8], dtype=torch.int32)
    with pytest.raises(ValueError, match=r"end at the total of 9, got \[0, 4, 8\]"):
        offsets_attention(x, places)
    compiled = torch.compile(offsets_attention, backend="aot_eager", fullgraph=True, dynamic=True)
    with pytest.raises(RuntimeError, match=r"cu_seqlens_q must begin .* end at the total"):
        compiled(x, places)
