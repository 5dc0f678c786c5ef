"""The modules: torch.nn.MultiheadAttention is the reference at alpha = 1, float64 entmax beyond."""

from __future__ import annotations

import copy
import doctest
import importlib
import io
import math
import pickle
from typing import Any

import pytest
import reference
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

import adasplash2
from adasplash2.nn import (
    AlphaSchedule,
    AttentionMonitor,
    Entmax,
    EntmaxMultiheadAttention,
    HeadScale,
    LearnedAlpha,
    LengthScale,
    ScaleMatcher,
    Sparsemax,
    nape_slopes,
)
from adasplash2.softmax import attended

EMBED, HEADS, BATCH, LENGTH_Q, LENGTH_K = 24, 4, 3, 7, 9
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5}


def pair(**arguments: Any) -> tuple[nn.MultiheadAttention, EntmaxMultiheadAttention]:
    """torch's module and ours at alpha = 1, with the same weights, biases not zero."""
    arguments = {"dtype": torch.float64, **arguments}
    theirs = nn.MultiheadAttention(EMBED, HEADS, **arguments)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    ours = EntmaxMultiheadAttention(EMBED, HEADS, alpha=1.0, **arguments)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def inputs(module: nn.MultiheadAttention, batched: bool = True) -> list[Tensor]:
    found = []
    for length, width in (
        (LENGTH_Q, EMBED),
        (LENGTH_K, module.kdim),
        (LENGTH_K, module.vdim),
    ):
        shape = (BATCH, length) if module.batch_first else (length, BATCH)
        shape = shape if batched else (length,)
        dtype = module.out_proj.weight.dtype
        found.append(torch.randn(*shape, width, dtype=dtype, requires_grad=True))
    return found


def causal_mask(dtype: torch.dtype = torch.bool) -> Tensor:
    hidden = torch.ones(LENGTH_Q, LENGTH_K, dtype=torch.bool).triu(1)
    if dtype == torch.bool:
        return hidden
    return torch.zeros(LENGTH_Q, LENGTH_K, dtype=dtype).masked_fill(hidden, -math.inf)


def padding(dtype: torch.dtype = torch.bool) -> Tensor:
    padded = torch.arange(LENGTH_K) >= torch.tensor([[LENGTH_K], [4], [6]])
    if dtype == torch.bool:
        return padded
    return torch.zeros(BATCH, LENGTH_K, dtype=dtype).masked_fill(padded, -math.inf)


def by_head(dtype: torch.dtype = torch.bool) -> Tensor:
    """Another mask for each sequence and head, which leaves key 0 to all."""
    numbers = torch.randn(BATCH * HEADS, LENGTH_Q, LENGTH_K)
    if dtype != torch.bool:
        return numbers.to(dtype)
    hidden = numbers > 0
    hidden[..., 0] = False
    return hidden


CONSTRUCTED: dict[str, dict[str, Any]] = {
    "plain": {},
    "batch first": {"batch_first": True},
    "no bias": {"bias": False},
    "kdim and vdim": {"kdim": 10, "vdim": 14},
    "kdim, batch first, no bias": {"kdim": 10, "batch_first": True, "bias": False},
    "add_bias_kv": {"add_bias_kv": True},
    "add_zero_attn": {"add_zero_attn": True, "batch_first": True},
    "both added": {"add_bias_kv": True, "add_zero_attn": True},
    "float32": {"dtype": torch.float32},
}
CALLED: dict[str, dict[str, Any]] = {
    "plain": {},
    "padding": {"key_padding_mask": padding},
    "mask": {"attn_mask": causal_mask},
    "both masks": {"key_padding_mask": padding, "attn_mask": causal_mask},
    "mask of heads": {"attn_mask": by_head},
    "mask of heads and padding": {"key_padding_mask": padding, "attn_mask": by_head},
    "causal": {"attn_mask": causal_mask, "is_causal": True},
    "causal and padding": {
        "attn_mask": causal_mask,
        "is_causal": True,
        "key_padding_mask": padding,
    },
}


def compare(theirs: nn.MultiheadAttention, ours: nn.MultiheadAttention, *calls: Any) -> None:
    """Outputs, weights and gradients of ``(tensors, arguments)`` are the same."""
    tensors, said = calls
    results = []
    for module in (theirs, ours):
        leaves = [*tensors, *module.parameters()]
        out, weights = module(*tensors, **said)
        total = (out * torch.linspace(-1.0, 1.0, out.numel()).view_as(out)).sum()
        if weights is not None:
            total = total + weights.square().sum()
        gradients = torch.autograd.grad(total, leaves)
        results.append([out, *([] if weights is None else [weights]), *gradients])
    limit = TOLERANCE[tensors[0].dtype]
    for expected, got in zip(*results, strict=True):
        assert got.shape == expected.shape
        assert got.dtype == expected.dtype
        torch.testing.assert_close(got, expected, atol=limit, rtol=limit)


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize(
    ("called", "floats"),
    [
        (called, floats)
        for called, said in CALLED.items()
        for floats in (False, True)[: 1 + bool(said)]
    ],
)
@pytest.mark.parametrize("constructed", CONSTRUCTED)
def test_softmax_is_torchs(constructed: str, called: str, floats: bool, need_weights: bool) -> None:
    theirs, ours = pair(**CONSTRUCTED[constructed])
    said = dict(CALLED[called])
    added = ours.bias_k is not None or ours.add_zero_attn
    if added and said.get("is_causal") and not need_weights and len(said) == 2:
        pytest.skip("torch hides the added keys there, and shows them where weights are needed")
    dtype = ours.out_proj.weight.dtype if floats else torch.bool
    said = {name: make(dtype) if callable(make) else make for name, make in said.items()}
    compare(theirs, ours, inputs(ours), {**said, "need_weights": need_weights})


@pytest.mark.parametrize("average", [True, False])
@pytest.mark.parametrize("batched", [True, False])
def test_weights_are_averaged_and_unbatched_as_torchs(average: bool, batched: bool) -> None:
    theirs, ours = pair(add_bias_kv=True)
    said: dict[str, Any] = {"average_attn_weights": average}
    if not batched:
        said["key_padding_mask"] = padding()[1]
        said["attn_mask"] = by_head()[:HEADS]
    compare(theirs, ours, inputs(ours, batched), said)


def test_self_attention_is_projected_at_once() -> None:
    theirs, ours = pair(batch_first=True)
    x = inputs(ours)[0]
    for said in ({"need_weights": False}, {"attn_mask": causal_mask()[:, :LENGTH_Q]}):
        expected, got = (module(x, x, x, **said)[0] for module in (theirs, ours))
        torch.testing.assert_close(got, expected, atol=1e-12, rtol=1e-12)


def test_causal_needs_no_mask() -> None:
    _, ours = pair(add_zero_attn=True)
    tensors = inputs(ours)
    for need_weights in (True, False):
        expected, _ = ours(*tensors, attn_mask=causal_mask(), need_weights=need_weights)
        got, _ = ours(*tensors, is_causal=True, need_weights=need_weights)
        torch.testing.assert_close(got, expected, atol=1e-12, rtol=1e-12)


def test_a_changed_mask_changes_the_output() -> None:
    ours = EntmaxMultiheadAttention(EMBED, HEADS, dtype=torch.float64)
    tensors = inputs(ours)
    mask = causal_mask()
    before, _ = ours(*tensors, attn_mask=mask)
    mask[3, 1] = True
    after, weights = ours(*tensors, attn_mask=mask)
    assert weights[:, 3, 1].abs().max() == 0.0
    changed = (before != after).flatten(1).any(1)
    assert changed.tolist() == [row == 3 for row in range(LENGTH_Q)]


# entmax


def expected(module: EntmaxMultiheadAttention, tensors: list[Tensor], **said: Any) -> Any:
    """Weights by head and output, from the float64 reference."""
    projections = module.in_proj_weight.double().chunk(3)
    q, k, v = (
        (t.double() @ weight.T).unflatten(-1, (HEADS, -1)).permute(1, 2, 0, 3)
        for t, weight in zip(tensors, projections, strict=True)
    )
    if module.q_norm is not None and module.k_norm is not None:
        q, k = (
            norm.weight.double() * t / (t.square().mean(dim=-1, keepdim=True) + 1e-6).sqrt()
            for t, norm in ((q, module.q_norm), (k, module.k_norm))
        )
    scores = said.get("scale", module.scale) * (q @ k.mT) + said.get("bias", 0.0)
    scores = scores.masked_fill(said.get("hidden", torch.tensor(False)), -math.inf)
    alphas = said.get("alphas", [module.alpha] * HEADS)
    weights = torch.stack(
        [reference.entmax(scores[:, head], alpha) for head, alpha in enumerate(alphas)], dim=1
    )
    out = (weights @ v).permute(2, 0, 1, 3).flatten(2)
    return weights, out @ module.out_proj.weight.double().T


def judge(module: EntmaxMultiheadAttention, tensors: list[Tensor], call: Any, **said: Any) -> None:
    """Both ways of ``module`` against the reference."""
    with torch.no_grad():
        weights, out = expected(module, tensors, **said)
        for need_weights in (True, False):
            got, found = module(
                *tensors, need_weights=need_weights, average_attn_weights=False, **call
            )
            limit = TOLERANCE[got.dtype]
            torch.testing.assert_close(got.double(), out, atol=limit, rtol=limit)
            if found is not None:
                torch.testing.assert_close(found.double(), weights, atol=limit, rtol=limit)
                assert torch.equal(found == 0.0, weights == 0.0)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("alpha", [1.25, 1.5, 2.0])
def test_entmax_is_the_references(alpha: float, dtype: torch.dtype) -> None:
    module = EntmaxMultiheadAttention(EMBED, HEADS, bias=False, alpha=alpha, scale=1.0, dtype=dtype)
    hidden = padding()[:, None, None] | causal_mask()
    call = {"key_padding_mask": padding(), "attn_mask": causal_mask()}
    judge(module, inputs(module), call, hidden=hidden)
    judge(module, inputs(module), {})


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("alpha", [1.0, 1.25, 1.5])
def test_normalised_queries_and_keys_are_the_references(alpha: float, dtype: torch.dtype) -> None:
    module = EntmaxMultiheadAttention(
        EMBED, HEADS, bias=False, alpha=alpha, scale=1.0, qk_norm=True, dtype=dtype
    )
    for norm in (module.q_norm, module.k_norm):
        assert norm is not None
        assert torch.equal(norm.weight, torch.ones(EMBED // HEADS, dtype=dtype))
        nn.init.uniform_(norm.weight, 0.5, 1.5)
    tensors = inputs(module)
    with torch.no_grad():
        tensors[0][0] = 0.0  # a query of zeros stays one
    hidden = padding()[:, None, None] | causal_mask()
    call = {"key_padding_mask": padding(), "attn_mask": causal_mask()}
    judge(module, tensors, call, hidden=hidden)
    judge(module, tensors, {})


@pytest.mark.parametrize("need_weights", [True, False])
def test_norms_of_queries_and_keys_have_their_gradients(need_weights: bool) -> None:
    """Also those of the keys that are added: a learned one, and zeros."""
    module = EntmaxMultiheadAttention(
        8, 2, add_bias_kv=True, add_zero_attn=True, qk_norm=True, dtype=torch.float64
    )
    names = [name for name, _ in module.named_parameters()]
    assert {"q_norm.weight", "k_norm.weight"} <= set(names)
    x = torch.randn(4, 2, 8, dtype=torch.float64, requires_grad=True)

    def called(x: Tensor, *parameters: Tensor) -> Any:
        given = dict(zip(names, parameters, strict=True))
        found = torch.func.functional_call(
            module, given, (x, x, x), {"need_weights": need_weights, "is_causal": True}
        )
        return found if need_weights else found[0]

    assert torch.autograd.gradcheck(called, (x, *module.parameters()))


def test_positions_and_length_scale_are_the_references() -> None:
    slopes = nape_slopes(HEADS, dtype=torch.float64)
    module = EntmaxMultiheadAttention(
        EMBED, HEADS, bias=False, length_scale=True, alibi_slopes=slopes, dtype=torch.float64
    )
    assert module.length_scale is not None
    with torch.no_grad():
        module.length_scale.weight.normal_()
    tensors = inputs(module)
    seen = (~(padding()[:, None] | causal_mask())).sum(-1)[:, None]
    beta, gamma = (tensors[0].double() @ module.length_scale.weight.T).permute(1, 2, 0).chunk(2, 1)
    factor = (
        1.0
        - math.log(2.0)
        + torch.log1p(beta.exp()) * torch.log(seen.double() + 1.0) ** (2.0 * torch.tanh(gamma))
    )
    distance = (torch.arange(LENGTH_Q)[:, None] - torch.arange(LENGTH_K)).abs()
    judge(
        module,
        tensors,
        {"key_padding_mask": padding(), "is_causal": True},
        scale=module.scale * factor[..., None],
        bias=-slopes[:, None, None] * distance,
        hidden=padding()[:, None, None] | causal_mask(),
    )


def test_alphas_are_learned_by_head() -> None:
    module = EntmaxMultiheadAttention(EMBED, HEADS, bias=False, alpha="learn", dtype=torch.float64)
    assert isinstance(module.alpha, LearnedAlpha)
    assert module.alpha().tolist() == pytest.approx([1.5] * HEADS)
    with torch.no_grad():
        module.alpha.logits.copy_(torch.linspace(-9.0, 9.0, HEADS))
    alphas = module.alpha().tolist()
    assert all(1.0 < alpha < 2.0 for alpha in alphas)
    tensors = inputs(module)
    judge(module, tensors, {}, alphas=alphas)
    logits = module.alpha.logits
    with torch.no_grad():
        logits.copy_(torch.linspace(-1.0, 1.0, HEADS))

    def value(*_: Tensor) -> Tensor:
        return module(*tensors, need_weights=False)[0].square().sum()

    (got,) = torch.autograd.grad(value(), logits)
    for head in range(HEADS):
        step = torch.zeros_like(logits)
        step[head] = 1e-5
        with torch.no_grad():
            logits += step
            above = value()
            logits -= 2 * step
            below = value()
            logits += step
        assert got[head].item() == pytest.approx((above - below).item() / 2e-5, rel=1e-4, abs=1e-8)


def test_learned_alphas_stay_inside_and_start_where_they_are_told() -> None:
    alpha = LearnedAlpha(3, start=torch.tensor([1.05, 1.5, 1.95]))
    torch.testing.assert_close(alpha(), torch.tensor([1.05, 1.5, 1.95]))
    for end in (-1e4, 1e4):
        nn.init.constant_(alpha.logits, end)
        assert ((alpha() > 1.0) & (alpha() < 2.0)).all()
    alpha.reset_parameters()
    torch.testing.assert_close(alpha(), torch.tensor([1.05, 1.5, 1.95]))


def test_sparse_weights_are_the_dense_ones() -> None:
    module = EntmaxMultiheadAttention(EMBED, HEADS)
    tensors = inputs(module)
    dense = module(*tensors, average_attn_weights=False)
    sparse = module(*tensors, average_attn_weights=False, need_weights="sparse")
    assert sparse[1].layout == torch.sparse_csr
    assert sparse[1].shape == (BATCH * HEADS * LENGTH_Q, LENGTH_K)
    torch.testing.assert_close(sparse[0], dense[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(
        sparse[1].to_dense().view(dense[1].shape).float(), dense[1], atol=1e-6, rtol=1e-6
    )


def test_dropout_is_for_training_and_repeats_by_seed() -> None:
    module = EntmaxMultiheadAttention(EMBED, HEADS, dropout=0.5)
    tensors = inputs(module)
    for need_weights in (True, False):
        outs = []
        for _ in range(2):
            torch.manual_seed(0)
            outs.append(module(*tensors, need_weights=need_weights)[0])
        assert torch.equal(*outs)
        other = module(*tensors, need_weights=need_weights)[0]
        assert not torch.equal(other, outs[0])
    module.eval()
    assert torch.equal(*(module(*tensors, need_weights=False)[0] for _ in range(2)))


@pytest.mark.parametrize("how", ["padding", "mask", "floats", "causal"])
@pytest.mark.parametrize("alpha", [1.5, "learn", 1.0])
def test_what_is_hidden_reaches_no_weights_and_no_output(alpha: Any, how: str) -> None:
    """Nor gradients: keys and values that nobody sees may be anything."""
    module = EntmaxMultiheadAttention(EMBED, HEADS, batch_first=True, alpha=alpha)
    query, key = torch.randn(2, 3, EMBED), torch.randn(2, 5, EMBED)
    hidden = torch.tensor([False, False, False, True, True])
    said: dict[str, Any] = {
        "padding": {"key_padding_mask": hidden.expand(2, 5)},
        "mask": {"attn_mask": hidden.expand(3, 5)},
        "floats": {"attn_mask": torch.where(hidden, -math.inf, 0.0).expand(3, 5)},
        "causal": {"is_causal": True},
    }[how]
    found = []
    for bad in (0.0, math.nan, math.inf):
        q, k = query.clone().requires_grad_(), key.masked_fill(hidden[:, None], bad)
        k.requires_grad_()
        out, weights = module(q, k, k, **said)
        found.append([out, weights, *torch.autograd.grad(out.sum(), (q, k))])
    for one in found[1:]:
        for got, expected in zip(one, found[0], strict=True):
            assert torch.equal(got, expected)


def test_values_that_are_not_finite_reach_the_rows_that_weigh_them() -> None:
    """Dense weights do to them what the kernels do."""
    q, k, v = (torch.zeros(1, 1, length, 4) for length in (3, 6, 6))
    v[..., [0, 1, 2], [0, 1, 2]] = torch.tensor([math.inf, -math.inf, math.nan])
    v[..., 3, 0] = -math.inf
    seen = torch.eye(3, 6, dtype=torch.bool) | (torch.arange(6) == 4)
    for rows in (seen, seen | (torch.arange(6) == 3)):
        expected = adasplash2.entmax_attention(q, k, v, rows)
        got = attended(rows / rows.sum(1, keepdim=True), v)
        assert expected.isinf().any()
        assert expected.isnan().any()
        torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)


def test_rows_that_see_nothing_are_zeros_before_the_projection() -> None:
    module = EntmaxMultiheadAttention(EMBED, HEADS, alpha=1.0)
    hidden = torch.ones(BATCH, LENGTH_K, dtype=torch.bool)
    for need_weights in (True, False):
        out, _ = module(*inputs(module), key_padding_mask=hidden, need_weights=need_weights)
        torch.testing.assert_close(out, module.out_proj.bias.expand_as(out))


def test_torchs_encoder_layer_runs_it() -> None:
    layer = nn.TransformerEncoderLayer(EMBED, HEADS, 32, batch_first=True).eval()
    ours = EntmaxMultiheadAttention(EMBED, HEADS, batch_first=True, alpha=2.0)
    layer.self_attn = ours.eval()
    x = 3 * torch.randn(BATCH, LENGTH_Q, EMBED)
    with torch.no_grad():
        found = layer(x)  # without gradients it would go to torch's fused softmax
        attended = layer.norm1(x + ours(x, x, x, need_weights=False)[0])
        expected = layer.norm2(attended + layer._ff_block(attended))
    torch.testing.assert_close(found, expected)


# State


def test_state_dicts_go_both_ways() -> None:
    theirs, ours = pair(kdim=10, add_bias_kv=True)
    assert list(theirs.state_dict()) == list(ours.state_dict())
    theirs.load_state_dict(ours.state_dict())
    for module in (nn.MultiheadAttention(EMBED, HEADS), EntmaxMultiheadAttention(EMBED, HEADS)):
        learned = EntmaxMultiheadAttention(
            EMBED, HEADS, alpha="learn", length_scale=True, qk_norm=True
        )
        holder = nn.ModuleDict({"attention": learned})
        holder.load_state_dict({f"attention.{k}": v for k, v in module.state_dict().items()})
        torch.testing.assert_close(learned.in_proj_weight, module.in_proj_weight)
        assert learned.alpha().tolist() == pytest.approx([1.5] * HEADS)  # type: ignore[operator]
    missing, unexpected = nn.MultiheadAttention(EMBED, HEADS).load_state_dict(
        learned.state_dict(), strict=False
    )
    added = ["alpha.logits", "length_scale.weight", "q_norm.weight", "k_norm.weight"]
    assert (missing, unexpected) == ([], added)
    for norm in (learned.q_norm, learned.k_norm):
        nn.init.normal_(norm.weight)  # type: ignore[union-attr]
    again = EntmaxMultiheadAttention(EMBED, HEADS, alpha="learn", length_scale=True, qk_norm=True)
    again.load_state_dict(learned.state_dict())
    x = torch.randn(LENGTH_Q, BATCH, EMBED)
    assert torch.equal(again(x, x, x)[0], learned(x, x, x)[0])
    half = learned.state_dict()
    del half["alpha.logits"]
    with pytest.raises(RuntimeError, match=r"alpha\.logits"):
        learned.load_state_dict(half)


@pytest.mark.parametrize("saved", ["state_dict", "file"])
def test_a_fixed_alpha_travels_with_its_state_dict(saved: str) -> None:
    model = nn.Sequential(EntmaxMultiheadAttention(EMBED, HEADS, alpha=1.25))
    state = model.state_dict()
    if saved == "file":
        stream = io.BytesIO()
        torch.save(state, stream)
        stream.seek(0)
        state = torch.load(stream, weights_only=True)
    other = nn.Sequential(EntmaxMultiheadAttention(EMBED, HEADS))
    other.load_state_dict(state)
    assert other[0].alpha == 1.25
    other.load_state_dict(nn.Sequential(nn.MultiheadAttention(EMBED, HEADS)).state_dict())
    assert other[0].alpha == 1.25


def all_that_is_learned() -> EntmaxMultiheadAttention:
    slopes = nape_slopes(HEADS)
    return EntmaxMultiheadAttention(
        EMBED, HEADS, alpha="learn", length_scale=True, qk_norm=True, alibi_slopes=slopes
    )


@pytest.mark.parametrize("way", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_compute_the_same_and_are_watched_by_nobody(way: Any) -> None:
    module = all_that_is_learned()
    AttentionMonitor(lambda values, step: None).watch(module)
    tensors = inputs(module)
    copied = way(module)
    assert copied.observer is None
    assert module.observer is not None
    assert torch.equal(module(*tensors)[0], copied(*tensors)[0])


@pytest.mark.parametrize("more", [{}, {"kdim": 5}, {"add_bias_kv": True}, {"bias": False}], ids=str)
def test_parameters_are_reset_as_torchs(more: dict[str, Any]) -> None:
    """As after ``to_empty``, or by code that resets every module."""
    ours = EntmaxMultiheadAttention(EMBED, HEADS, **more)
    theirs = torch.nn.MultiheadAttention(EMBED, HEADS, **more)
    for module in (ours, theirs):
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.fill_(7.0)
        torch.manual_seed(0)
        module._reset_parameters()
    for name, parameter in theirs.named_parameters():
        assert ours.get_parameter(name).equal(parameter), name
    assert ours._qkv_same_embed_dim is False  # what keeps torch's encoder layers from softmax


def test_numbers_to_start_from_must_be_known() -> None:
    start = torch.full((2,), 1.5, device="meta")
    for made in (adasplash2.nn.LearnedAlpha, adasplash2.nn.HeadScale):
        with pytest.raises(TypeError, match="start must be a number or a tensor of numbers"):
            made(2, start=start)


def test_meta_device() -> None:
    module = EntmaxMultiheadAttention(
        EMBED, HEADS, alpha="learn", length_scale=True, qk_norm=True, device="meta"
    )
    x = torch.empty(LENGTH_Q, BATCH, EMBED, device="meta")
    out, weights = module(x, x, x, is_causal=True)
    assert (out.shape, out.device.type) == (x.shape, "meta")
    assert weights is not None
    assert module(x, x, x, need_weights=False)[0].shape == x.shape


def test_slopes_come_back_from_a_state_dict() -> None:
    """Also where they had no data before; a dict without them, as torch's, leaves them alone."""
    slopes = torch.tensor([0.0, 0.5, 1.0, 0.25])[:HEADS]
    saved = EntmaxMultiheadAttention(EMBED, HEADS, alibi_slopes=slopes).state_dict()
    module = EntmaxMultiheadAttention(EMBED, HEADS, alibi_slopes=slopes, device="meta")
    module.to_empty(device="cpu").load_state_dict(saved)
    assert torch.equal(module.get_buffer("alibi_slopes"), slopes)
    module.load_state_dict(nn.MultiheadAttention(EMBED, HEADS).state_dict())
    assert torch.equal(module.get_buffer("alibi_slopes"), slopes)


# torch's machinery


@pytest.mark.parametrize("need_weights", [True, False])
def test_compiles_to_one_graph_for_all_alphas(need_weights: bool) -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    module = EntmaxMultiheadAttention(EMBED, HEADS, batch_first=True)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    x = torch.randn(BATCH, LENGTH_Q, EMBED, requires_grad=True)
    for alpha in (1.3, 1.4, 1.5):
        module.alpha = alpha
        results = []
        for call in (module, compiled):
            out, _ = call(x, x, x, is_causal=True, need_weights=need_weights)
            results.append([out, *torch.autograd.grad(out.square().sum(), x)])
        torch.testing.assert_close(*results, atol=1e-5, rtol=1e-5)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert graphs <= 2, "one for the first alpha, one for all others"


def test_compiles_with_all_that_is_learned() -> None:
    torch._dynamo.reset()
    module = all_that_is_learned()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    tensors = inputs(module)
    results = []
    for call in (module, compiled):
        out, _ = call(*tensors, key_padding_mask=padding(), is_causal=True, need_weights=False)
        parameters = list(module.parameters())
        results.append([out, *torch.autograd.grad(out.square().sum(), parameters)])
    torch.testing.assert_close(*results, atol=1e-5, rtol=1e-5)


def test_exports() -> None:
    module = EntmaxMultiheadAttention(EMBED, HEADS, batch_first=True).eval()
    x = torch.randn(BATCH, LENGTH_Q, EMBED)
    length = torch.export.Dim("length", min=2, max=64)
    program = torch.export.export(
        module,
        (x, x, x),
        {"need_weights": False, "is_causal": True},
        dynamic_shapes={
            "query": {1: length}, "key": {1: length}, "value": {1: length},
            "need_weights": None, "is_causal": None,
        },
    )  # fmt: skip
    y = torch.randn(BATCH, 20, EMBED)
    got, _ = program.module()(y, y, y, need_weights=False, is_causal=True)
    torch.testing.assert_close(got, module(y, y, y, is_causal=True)[0], atol=1e-5, rtol=1e-5)


def test_autocast() -> None:
    module = EntmaxMultiheadAttention(EMBED, HEADS, length_scale=True, qk_norm=True, alpha="learn")
    tensors = inputs(module)
    exact, _ = module(*tensors, attn_mask=causal_mask(torch.float32))
    with torch.autocast("cpu", torch.bfloat16):
        for need_weights in (True, False):
            out, _ = module(
                *tensors, attn_mask=causal_mask(torch.float32), need_weights=need_weights
            )
            assert out.dtype == torch.bfloat16
            torch.testing.assert_close(out.float(), exact, atol=0.03, rtol=0.03)
    out.float().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in module.parameters())


def test_bfloat16() -> None:
    module = EntmaxMultiheadAttention(
        EMBED, HEADS, length_scale=True, qk_norm=True, alpha="learn"
    ).bfloat16()
    tensors = inputs(module)
    fast, _ = module(*tensors, is_causal=True, need_weights=False)
    slow, weights = module(*tensors, is_causal=True)
    assert fast.dtype == slow.dtype == weights.dtype == torch.bfloat16
    torch.testing.assert_close(fast, slow, atol=0.03, rtol=0.03)


# Errors

X = torch.zeros(LENGTH_Q, BATCH, EMBED)
NESTED = torch.nested.nested_tensor([X[0], X[1]], layout=torch.jagged)


@pytest.mark.parametrize(
    ("arguments", "name", "kind"),
    [
        ({"alpha": "learned"}, "alpha", ValueError),
        ({"alpha": 0.5}, "alpha", ValueError),
        ({"alpha": None}, "alpha", TypeError),
        ({"scale": math.inf}, "scale", ValueError),
        ({"length_scale": 2}, "length_scale", TypeError),
        ({"qk_norm": "rms"}, "qk_norm", TypeError),
        ({"backend": "gpu"}, "backend", ValueError),
        ({"dropout": 1.0}, "dropout", ValueError),
        ({"dropout": "a"}, "dropout", TypeError),
        ({"num_heads": 2.0}, "num_heads", TypeError),
        ({"num_heads": 0}, "num_heads", ValueError),
        ({"kdim": "a"}, "kdim", TypeError),
        ({"bias": "no"}, "bias", TypeError),
        ({"batch_first": 1}, "batch_first", TypeError),
        ({"dtype": torch.int32}, "dtype", TypeError),
        ({"alibi_slopes": torch.zeros(3)}, "alibi_slopes", ValueError),
        ({"alibi_slopes": [0.0] * HEADS}, "alibi_slopes", TypeError),
        ({"alibi_slopes": torch.zeros(HEADS).int()}, "alibi_slopes", TypeError),
        ({"alibi_slopes": -torch.ones(HEADS)}, "alibi_slopes", ValueError),
        ({"alibi_slopes": torch.zeros(HEADS), "add_bias_kv": True}, "add_bias_kv", ValueError),
        ({"alibi_slopes": torch.zeros(HEADS), "add_zero_attn": True}, "add_zero_attn", ValueError),
    ],
)
def test_what_cannot_be_constructed(arguments: Any, name: str, kind: type[Exception]) -> None:
    with pytest.raises(kind, match=f"^{name}"):
        EntmaxMultiheadAttention(**{"embed_dim": EMBED, "num_heads": HEADS, **arguments})


def test_heads_that_are_too_wide() -> None:
    with pytest.raises(ValueError, match=r"^embed_dim must be at most 256 times num_heads"):
        EntmaxMultiheadAttention(1024, 2)


@pytest.mark.parametrize(
    ("tensors", "said", "name", "kind"),
    [
        ((X[..., 1:], X, X), {}, "query", ValueError),
        ((X, X[0], X), {}, "key", ValueError),
        ((X, X, X[1:]), {}, "value", ValueError),
        ((X, X[:, 1:], X[:, 1:]), {}, "key", ValueError),
        ((X[None], X[None], X[None]), {}, "query", ValueError),
        ((NESTED, NESTED, NESTED), {}, "query", TypeError),
        ((None, X, X), {}, "query", TypeError),
        ((X, [1], X), {}, "key", TypeError),
        ((X, X, X), {"average_attn_weights": "no"}, "average_attn_weights", TypeError),
        ((X, X, X), {"attn_mask": torch.zeros(2, 2)}, "attn_mask", ValueError),
        ((X, X, X), {"attn_mask": torch.zeros(7, 7, dtype=torch.int64)}, "attn_mask", TypeError),
        ((X, X, X), {"attn_mask": [[True]]}, "attn_mask", TypeError),
        ((X, X, X), {"key_padding_mask": torch.zeros(2, 2)}, "key_padding_mask", ValueError),
        *(
            ((X, X, X), {name: change(torch.zeros(*shape))}, name, kind)
            for name, shape in (
                ("key_padding_mask", (X.shape[1], X.shape[0])), ("attn_mask", (X.shape[0],) * 2),
            )
            for change, kind in (
                (Tensor.double, TypeError),
                (Tensor.to_sparse, TypeError),
                (lambda t: t.to("meta"), ValueError),
                (lambda t: t.to(torch.float8_e4m3fn), TypeError),
            )
        ),
        ((X, X, X), {"is_causal": 1}, "is_causal", TypeError),
        ((X, X, X), {"need_weights": "dense"}, "need_weights", TypeError),
        ((X, X, X), {"need_weights": "sparse"}, "average_attn_weights", ValueError),
    ],
)  # fmt: skip
def test_what_cannot_be_called(tensors: Any, said: Any, name: str, kind: type[Exception]) -> None:
    module = EntmaxMultiheadAttention(EMBED, HEADS)
    with pytest.raises(kind, match=f"^{name}"):
        module(*tensors, **said)


# The smaller ones


def test_entmax_modules() -> None:
    x = torch.randn(4, 5, 6, dtype=torch.float64)
    model = nn.Sequential(nn.Linear(6, 6, dtype=torch.float64), Entmax(1.25, dim=1))
    torch.testing.assert_close(
        model(x).mT, reference.entmax(model[0](x).mT, 1.25), atol=1e-12, rtol=1e-12
    )
    assert torch.equal(Sparsemax(dim=0)(x), adasplash2.sparsemax(x, 0))
    assert repr(Entmax(1.25)) == "Entmax(alpha=1.25, dim=-1)"
    with pytest.raises(ValueError, match=r"^alpha"):
        Entmax(0.0)


def test_length_scale_starts_as_nothing_and_grows_with_the_length() -> None:
    scale = LengthScale(4, 2)
    x = torch.randn(3, 5, 4)
    torch.testing.assert_close(scale(x, 7), torch.ones(3, 2, 5))
    torch.testing.assert_close(
        LengthScale(4, 2, delta=1.0)(x, 7), torch.full((3, 2, 5), 1.0 + math.log(2.0))
    )
    with torch.no_grad():
        scale.weight[2:] = 1.0
    ones = torch.ones(1, 2, 4)
    few, many = scale(ones, torch.tensor([0, 1]))[0, 0], scale(ones, 10_000)[0, 0]
    assert few[0] == few[1], "below 1 counts as 1"
    assert (many > few).all()
    for wrong in ({"features": 0}, {"heads": 0}, {"delta": math.nan}):
        with pytest.raises(ValueError, match=f"^{next(iter(wrong))}"):
            LengthScale(**{"features": 4, "heads": 2, **wrong})


@pytest.mark.parametrize(
    ("call", "name", "kind"),
    [
        (lambda: nape_slopes(4, dtype=torch.int32), "dtype", TypeError),
        (lambda: LearnedAlpha(4, dtype=torch.int32), "dtype", TypeError),
        (lambda: LengthScale(4, 2, dtype="float"), "dtype", TypeError),
        (lambda: HeadScale(4, dtype=torch.int32), "dtype", TypeError),
        (lambda: LengthScale(4, 2)(torch.zeros(3, 4), 5), "x", ValueError),
        (lambda: LengthScale(4, 2)(torch.zeros(1, 3, 5), 5), "x", ValueError),
        (lambda: LengthScale(4, 2)([0.0], 5), "x", TypeError),
        (lambda: LengthScale(4, 2)(torch.zeros(1, 3, 4), torch.arange(4)), "seen", ValueError),
        (
            lambda: LengthScale(4, 2)(torch.zeros(1, 3, 4), torch.ones(1, 1, 2, 3)),
            "seen",
            ValueError,
        ),
        (lambda: LengthScale(4, 2)(torch.zeros(1, 3, 4), "all"), "seen", TypeError),
    ],
)
def test_small_ones_that_cannot_be(call: Any, name: str, kind: type[Exception]) -> None:
    with pytest.raises(kind, match=f"^{name} must"):
        call()


def test_nape_slopes() -> None:
    for heads in range(1, 9):
        slopes = nape_slopes(heads)
        assert slopes.shape == (heads,)
        assert (slopes == 0).sum() == heads - heads // 2
    torch.testing.assert_close(nape_slopes(16)[8:], 1.0 - torch.arange(8.0) / 8.0)
    with pytest.raises(ValueError, match=r"^heads"):
        nape_slopes(0)


def test_schedule() -> None:
    model = nn.Sequential(EntmaxMultiheadAttention(EMBED, HEADS), Entmax(2.0))
    schedule = AlphaSchedule(model, steps=4, target=1.6, warmup=2)
    seen = []
    for _ in range(8):
        assert model[0].alpha == model[1].alpha == schedule.alpha
        seen.append(schedule.alpha)
        schedule.step()
    assert seen == pytest.approx([1.0, 1.0, 1.0, 1.15, 1.3, 1.45, 1.6, 1.6])
    assert schedule.alpha == 1.6
    saved = schedule.state_dict()
    other = AlphaSchedule(Entmax(), steps=1)
    other.load_state_dict(saved)
    assert other.state_dict() == saved
    assert other.alpha == 1.6
    given: list[float] = []
    gentle = AlphaSchedule(given.append, steps=2, shape="cosine")
    gentle.step()
    assert given == pytest.approx([1.0, 1.25])
    with pytest.raises(ValueError, match=r"^state_dict"):
        gentle.load_state_dict({"last_step": 1})


@pytest.mark.parametrize(
    ("arguments", "name", "kind"),
    [
        ({"driven": nn.Linear(2, 2)}, "driven", ValueError),
        ({"driven": EntmaxMultiheadAttention(4, 2, alpha="learn")}, "driven", ValueError),
        ({"driven": 1.5}, "driven", TypeError),
        ({"steps": 0}, "steps", ValueError),
        ({"warmup": -1}, "warmup", ValueError),
        ({"target": 0.5}, "alpha", ValueError),
        ({"shape": "sine"}, "shape", ValueError),
    ],
)
def test_schedules_that_cannot_be(arguments: Any, name: str, kind: type[Exception]) -> None:
    with pytest.raises(kind, match=f"^{name}"):
        AlphaSchedule(**{"driven": print, "steps": 2, **arguments})


# Monitoring


class Board:
    """A TensorBoard writer."""

    def __init__(self) -> None:
        self.logged: dict[str, list[tuple[int, float]]] = {}

    def add_scalar(self, tag: str, value: float, step: int) -> None:
        self.logged.setdefault(tag, []).append((step, value))


class Run:
    """A W&B run."""

    def __init__(self) -> None:
        self.logged: list[tuple[int, dict[str, float]]] = []

    def log(self, values: dict[str, float], step: int) -> None:
        self.logged.append((step, values))


def test_monitor_logs_what_the_statistics_say() -> None:
    model = nn.ModuleList(
        [EntmaxMultiheadAttention(EMBED, HEADS, dropout=0.1, alpha=a) for a in (1.5, "learn", 1.0)]
    )
    board, run = Board(), Run()
    monitors = [AttentionMonitor(logger, every=2) for logger in (board, run)]
    for step in range(4):
        tensors = inputs(model[0])
        for monitor in monitors:
            assert monitor.watch(model) == 3
            for attention in model:
                attention(*tensors, need_weights=False)
                attention(*(2 * t for t in tensors), need_weights=False)  # not the first
            monitor.step()
        if step == 2:
            for attention, found in zip(model, monitors[0].history[2].values(), strict=True):
                if attention.alpha == 1.0:
                    assert found.support.isnan().all()
                    continue
                _, weights = attention.eval()(*tensors, average_attn_weights=False)
                kept = (weights > 0).sum(-1).double().mean(dim=(0, 2))
                torch.testing.assert_close(found.support, kept)
                attention.train()
    assert [step for step, _ in run.logged] == [0, 2]
    assert board.logged["attention/0/alpha/1"] == [(0, 1.5), (2, 1.5)]
    assert len(board.logged) == 3 * 3 * HEADS
    assert set(board.logged) == set(run.logged[0][1])


@pytest.mark.parametrize("logger", [None, Run(), Board(), math.hypot])
@pytest.mark.parametrize("way", [copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))])
def test_monitors_are_copied_and_pickled(way: Any, logger: Any) -> None:
    model = EntmaxMultiheadAttention(EMBED, HEADS)
    monitor = way(AttentionMonitor(logger))
    if logger is math.hypot:  # which could be logged to if it took a step
        return
    monitor.watch(model)
    x = torch.randn(5, 2, EMBED)
    model(x, x, x)
    monitor.step()
    other = way(monitor)
    assert other.last_step == 1
    assert other.history[0].keys() == monitor.history[0].keys()
    if logger is not None:
        assert len(monitor._log.args[0].logged) == len(other._log.args[0].logged) > 0
    assert not getattr(logger, "logged", None)


def test_monitor_looks_at_nothing_in_between(monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[None] = []
    watcher = importlib.import_module("adasplash2.nn.monitor")
    monkeypatch.setattr(watcher, "_look", lambda *_: looked.append(None))
    module = EntmaxMultiheadAttention(EMBED, HEADS)
    monitor = AttentionMonitor(every=5)
    monitor.watch(module)
    monkeypatch.setattr(watcher, "_named", lambda watched: {})
    for _ in range(11):
        module(*inputs(module), need_weights=False)
        monitor.step()
    assert len(looked) == 3


@pytest.mark.parametrize(
    ("call", "name", "kind"),
    [
        (lambda: AttentionMonitor(logger=3), "logger", TypeError),
        (lambda: AttentionMonitor(every=0), "every", ValueError),
        (lambda: AttentionMonitor().watch(nn.Linear(2, 2)), "model", ValueError),
        (lambda: AttentionMonitor().watch(3), "model", TypeError),
    ],
)
def test_monitors_that_cannot_be(call: Any, name: str, kind: type[Exception]) -> None:
    with pytest.raises(kind, match=f"^{name}"):
        call()


@pytest.mark.parametrize(
    "name", ["", ".alpha", ".attention", ".heads", ".length", ".mappings", ".monitor"]
)
def test_examples_are_true(name: str) -> None:
    found = doctest.testmod(importlib.import_module(f"adasplash2.nn{name}"))
    assert found.attempted
    assert not found.failed


# Factors of heads.


def test_a_factor_of_each_head_scales_its_scores() -> None:
    torch.manual_seed(1)
    heads, head_dim = 3, 4
    plain, scaled = (nn.Linear(6, heads * head_dim, dtype=torch.float64) for _ in range(2))
    scaled.load_state_dict(plain.state_dict())
    for name in ("weight", "bias"):
        scale = HeadScale(heads, start=0.5, dtype=torch.float64)
        parametrize.register_parametrization(scaled, name, scale)
        with torch.no_grad():
            scale.log_factor += torch.tensor([0.0, 0.1, -0.2], dtype=torch.float64)
    factors = 0.5 * torch.tensor([0.0, 0.1, -0.2], dtype=torch.float64).exp()
    x = torch.randn(5, 6, dtype=torch.float64)
    expected = (plain(x).unflatten(1, (heads, head_dim)) * factors[:, None]).flatten(1)
    torch.testing.assert_close(scaled(x), expected)
    scaled(x).square().sum().backward()
    assert all(p.grad is not None and p.grad.all() for p in scaled.parameters())
    for name in ("weight", "bias"):
        parametrize.remove_parametrizations(scaled, name)
    assert list(scaled.state_dict()) == list(plain.state_dict())
    torch.testing.assert_close(scaled(x), expected)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ((0,), "heads"),
        ((2.5,), "heads"),
        ((2, 0.0), "start"),
        ((2, math.nan), "start"),
        ((2, torch.ones(3)), "start"),
        ((2, torch.ones(2, dtype=torch.int64)), "start"),
        ((2, torch.tensor([1.0, 0.0])), "start"),
        ((2, torch.tensor([1.0, math.inf])), "start"),
    ],
)
def test_factors_of_heads_refuse_nonsense(arguments: Any, named: str) -> None:
    with pytest.raises((TypeError, ValueError), match=named):
        HeadScale(*arguments)
    with pytest.raises(ValueError, match="multiple of heads=4, got"):
        HeadScale(4)(torch.ones(6, 2))


def test_factors_of_heads_start_where_each_is_told_to() -> None:
    starts = torch.tensor([0.5, 0.25])
    scale = HeadScale(2, starts)
    starts.zero_()  # they are ours now
    torch.testing.assert_close(scale(torch.ones(4, 3))[::2, 0], torch.tensor([0.5, 0.25]))


# Where they should start.


def outputs_with(factor: float, calls: list[dict[str, Any]]) -> list[Tensor]:
    """Of alpha 1.5 where all queries are multiplied."""
    return [
        adasplash2.entmax_attention(**c | {"query": factor * c["query"]}, alpha=1.5) for c in calls
    ]


def test_matched_scales_are_those_nearest_to_softmax() -> None:
    """By brute force, over two calls of a layer; sharp heads keep more of their scale."""
    torch.manual_seed(3)
    calls = []
    for length in (24, 40):
        query, key, value = torch.randn(3, 2, 4, length, 8, dtype=torch.float64).unbind(0)
        query = query * torch.tensor([0.3, 1.0, 3.0, 20.0], dtype=torch.float64)[:, None, None]
        calls.append({"query": query, "key": key, "value": value, "is_causal": True})
    matcher, sparser = ScaleMatcher(1.5), ScaleMatcher(1.5, tolerance=0.05)
    for call in calls:
        said = {k: v for k, v in call.items() if k not in ("query", "key", "value")}
        said |= {"alpha": 1.0, "scale": None}
        for one in (matcher, sparser):
            one(2, call["query"], call["key"], call["value"], said)
    targets = [adasplash2.entmax_attention(**call, alpha=1.0) for call in calls]
    tried = torch.tensor([2.0 ** (-step / 4) for step in range(21)], dtype=torch.float64)
    errors = torch.stack(
        [
            sum(
                (out - target).square().sum((0, 2, 3))
                for out, target in zip(outputs_with(f, calls), targets, strict=True)
            )
            for f in tried.tolist()
        ]
    )
    found = matcher.factors(2)
    torch.testing.assert_close(found.double(), tried[errors.argmin(0)])
    assert len(found.unique()) > 1, "heads differ"
    assert (errors.min(0).values < errors[0]).any()
    most = errors.min(0).values + 0.05 * sum(t.square().sum((0, 2, 3)) for t in targets)
    largest = [
        max(f for f, e in zip(tried, of, strict=True) if e <= m)
        for of, m in zip(errors.T, most, strict=True)
    ]
    torch.testing.assert_close(sparser.factors(2).double(), torch.stack(largest))
    assert (sparser.factors(2) >= found).all()
    assert (sparser.factors(2) > found).any()
    with pytest.raises(KeyError, match=r"layer 0 was not seen .* seen: \[2\]"):
        matcher.factors()


def test_matched_scales_pay_for_empty_tiles_where_these_can_be_had() -> None:
    """By brute force, over calls of two sequences and of one."""
    torch.manual_seed(5)
    value_of_tiles, alpha = 2.0, 1.5
    matcher, plain = ScaleMatcher(alpha, tile_value=value_of_tiles), ScaleMatcher(alpha)
    tried = [2.0 ** (-step / 4) for step in range(21)]
    errors, outputs, shares = 0.0, 0.0, []
    for batch in (2, 1):
        query, key, value = torch.randn(3, batch, 3, 320, 8)
        query[:, 0] *= 0.05
        place = torch.arange(320) / 40  # heads 1 and 2: scores fall with the square of the distance
        key[:, 1:, :, :2] = torch.stack([2 * place, -place.square()], dim=-1)
        query[:, 1:, :, :2] = torch.stack([place, torch.ones(320)], dim=-1)
        query[:, 2] *= 3.0
        said = {"is_causal": True, "scale": 0.5}
        for one in (matcher, plain):
            one(0, query, key, value, said | {"alpha": 1.0})
        target = adasplash2.entmax_attention(query, key, value, alpha=1.0, **said)
        outputs += target.square().sum((0, 2, 3))
        said.pop("scale")
        outs, empty = [], []
        for factor in tried:
            call = {"query": query, "key": key, "value": value, "scale": 0.5 * factor, **said}
            outs.append(adasplash2.entmax_attention(**call, alpha=alpha))
            empty.append(adasplash2.attention_stats(**call, alpha=alpha).empty_tiles)
        errors += torch.stack([(out - target).square().sum((0, 2, 3)) for out in outs])
        shares.append(torch.stack(empty))
    share = torch.cat(shares, dim=1).mean(dim=1)
    best = (errors / outputs - value_of_tiles * share).argmin(0)
    torch.testing.assert_close(matcher.factors(), torch.tensor(tried)[best])
    torch.testing.assert_close(matcher.empty_tiles(), share.gather(0, best[None])[0])
    assert matcher.factors()[0] == plain.factors()[0], "no tile of it is ever empty"
    assert (matcher.factors() > plain.factors()).any()
    with pytest.raises(ValueError, match="tile_value must be above 0"):
        plain.empty_tiles()
    with pytest.raises(KeyError, match=r"layer 1 was not seen"):
        matcher.empty_tiles(1)
    lengths = dict.fromkeys(("cu_seqlens_q", "cu_seqlens_k"), torch.tensor([0, 320]).int())
    with pytest.raises(ValueError, match="tile_value must be 0 for packed sequences"):
        matcher(0, *torch.randn(3, 320, 3, 8), lengths | {"alpha": 1.0})


def test_matched_scales_of_packed_sequences_are_those_of_their_parts() -> None:
    torch.manual_seed(4)
    query, key, value = torch.randn(3, 2, 24, 3, 8).unbind(0)
    apart, packed = ScaleMatcher(), ScaleMatcher()
    apart(0, *(t.transpose(1, 2) for t in (query, key, value)), {"alpha": 1.0, "dropout_p": 0.5})
    places = torch.tensor([0, 24, 48], dtype=torch.int32)
    lengths = {"cu_seqlens_q": places, "cu_seqlens_k": places, "max_seqlen_q": 24}
    flat = (t.flatten(0, 1) for t in (query, key, value))
    packed(
        None, *flat, lengths | {"max_seqlen_k": 24, "alpha": 1.0, "scale": torch.tensor(8**-0.5)}
    )
    torch.testing.assert_close(packed.factors(), apart.factors())


@pytest.mark.parametrize(
    ("name", "number"),
    [
        *(("alpha", n) for n in (1.0, 0.5, "1.5", math.nan)),
        *(("tolerance", n) for n in (-0.1, math.inf, "0")),
        *(("tile_value", n) for n in (-0.1, math.nan, "0")),
    ],
)
def test_matched_scales_refuse_nonsense(name: str, number: Any) -> None:
    with pytest.raises((TypeError, ValueError), match=f"^{name}"):
        ScaleMatcher(**{name: number})


def test_monitors_leave_padding_out() -> None:
    monitor = AttentionMonitor(every=1)
    x = torch.randn(1, 2, 6, 8)
    said: dict[str, Any] = {"alpha": 1.5, "is_causal": True}
    lengths = torch.tensor([4], dtype=torch.int32)
    monitor(0, *[x[:, :, :4]] * 3, said)
    monitor.step()
    monitor(0, *[x] * 3, said | {"q_lengths": lengths, "kv_lengths": lengths})
    monitor.step()
    assert torch.equal(monitor.history[1]["0"].support, monitor.history[0]["0"].support)
