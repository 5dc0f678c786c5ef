"""The operators as torch sees them: registration, gradients, compilation, autocast, empties.

Whether the numbers are right is asked elsewhere; here, whether every way of calling gives the
same ones.
"""

from __future__ import annotations

import gc
import importlib
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

import adasplash2
from adasplash2 import dispatch, ops
from adasplash2.contract import Forward
from adasplash2.problem import Inputs, Problem

DEVICES = [
    pytest.param("cpu"),
    pytest.param("cuda", marks=pytest.mark.gpu),
]
OPTIONS = (1.5, None, True, True, "")  # alpha, scale, is_causal, enable_gqa, backend


def inputs(
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    *,
    length_q: int = 7,
    length_k: int = 9,
    requires_grad: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """Grouped heads, unequal lengths, the (batch, length, heads, head_dim) layout of models."""

    def one(heads: int, length: int, head_dim: int) -> Tensor:
        data = torch.randn(2, length, heads, head_dim).to(device, dtype)
        return data.transpose(1, 2).requires_grad_(requires_grad)

    return one(4, length_q, 16), one(2, length_k, 16), one(2, length_k, 24)


def attend(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
    options = {"is_causal": True, "enable_gqa": True, **options}
    return adasplash2.entmax_attention(query, key, value, **options)


def gradients(function: Callable[..., Tensor], *tensors: Tensor) -> list[Tensor]:
    """Output and gradients of ``function`` under a fixed cotangent."""
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    out = function(*leaves)
    generator = torch.Generator().manual_seed(1)
    cotangent = torch.randn(out.shape, generator=generator).to(out)
    return [out.detach(), *torch.autograd.grad(out, leaves, cotangent)]


def assert_equal(found: list[Tensor], expected: list[Tensor]) -> None:
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


# Registration


@pytest.fixture
def filled_memory() -> Iterator[None]:
    """opcheck compares outputs bit by bit, and of ``saved`` also what no backend writes."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("filled_memory")
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("requires_grad", [True, False])
@pytest.mark.parametrize("saved_bytes", [ops.AS_NEEDED, 0, 1 << 20])
def test_opcheck_attention_forward(device: str, requires_grad: bool, saved_bytes: int) -> None:
    arguments = (*inputs(device, requires_grad=requires_grad), *OPTIONS, saved_bytes)
    torch.library.opcheck(ops.attention_forward, arguments)


@pytest.mark.parametrize("device", DEVICES)
def test_opcheck_attention_backward(device: str) -> None:
    tensors = inputs(device, requires_grad=False)
    out, tau, saved = ops.attention_forward(*tensors, *OPTIONS, ops.AS_NEEDED)
    arguments = (torch.randn_like(out), *tensors, out, tau, saved, *OPTIONS)
    torch.library.opcheck(ops.attention_backward, arguments)


@pytest.mark.parametrize("device", DEVICES)
def test_opcheck_entmax(device: str) -> None:
    x = torch.randn(3, 5, 11, device=device)
    torch.library.opcheck(ops.entmax_forward, (x, 1.5, -1, "", False))
    torch.library.opcheck(ops.entmax_forward, (x.clone().requires_grad_(), 1.3, 1, "", False))
    y = ops.entmax_forward(x, 1.5, -1, "", False)
    torch.library.opcheck(ops.entmax_backward, (torch.randn_like(y), y, 1.5, -1, ""))


# torch.compile


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compiled_attention_equals_eager(device: str, dynamic: bool, compiler: str) -> None:
    torch._dynamo.reset()

    def block(query: Tensor, key: Tensor, value: Tensor, alpha: float = 1.5) -> Tensor:
        return attend(2.0 * query, key, value, alpha=alpha) + 1.0

    compiled = torch.compile(block, fullgraph=True, dynamic=dynamic, backend=compiler)
    for length_q, length_k, alpha in ((7, 9, 1.5), (12, 5, 1.5), (7, 9, 1.25), (7, 9, 2.0)):
        tensors = inputs(device, length_q=length_q, length_k=length_k)
        found = gradients(lambda *t, a=alpha: compiled(*t, alpha=a), *tensors)
        assert_equal(found, gradients(lambda *t, a=alpha: block(*t, alpha=a), *tensors))
        with torch.no_grad():
            assert_equal([compiled(*tensors)], [block(*tensors)])


@pytest.mark.parametrize("dim", [-1, 0, 1])
def test_compiled_entmax_equals_eager(dim: int) -> None:
    torch._dynamo.reset()

    def block(x: Tensor) -> Tensor:
        return adasplash2.sparsemax(3.0 * x, dim=dim) + 1.0

    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    x = torch.randn(4, 5, 6)
    assert_equal(gradients(compiled, x), gradients(block, x))


def test_compiled_autocast_equals_eager() -> None:
    torch._dynamo.reset()

    def block(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return attend(query, key, value)

    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    tensors = inputs()
    found = gradients(compiled, *tensors)
    assert found[0].dtype == torch.bfloat16
    assert_equal(found, gradients(block, *tensors))


# Gradients


def test_gradients_only_where_they_are_needed() -> None:
    every = gradients(attend, *inputs())[1:]
    for i in range(3):
        torch.manual_seed(0)
        tensors = [t.detach() for t in inputs()]
        tensors[i].requires_grad_()
        out = attend(*tensors)
        generator = torch.Generator().manual_seed(1)
        out.backward(torch.randn(out.shape, generator=generator))
        assert [t.grad is not None for t in tensors] == [j == i for j in range(3)]
        assert_equal([tensors[i].grad], [every[i]])  # type: ignore[list-item]


def test_cotangents_of_any_stride() -> None:
    tensors = inputs()
    out = attend(*tensors)
    cotangent = torch.randn(out.shape)
    expected = torch.autograd.grad(out, tensors, cotangent, retain_graph=True)
    for strided in (
        cotangent.mT.contiguous().mT,
        cotangent.transpose(1, 2).clone().transpose(1, 2),
    ):
        assert_equal(
            list(torch.autograd.grad(out, tensors, strided, retain_graph=True)), list(expected)
        )
    ones = torch.autograd.grad(out, tensors, torch.ones(out.shape), retain_graph=True)
    assert_equal(list(torch.autograd.grad(out.sum(), tensors)), list(ones))


def test_thresholds_and_what_is_saved_have_no_gradient() -> None:
    out, tau, saved = ops.attention_forward(*inputs(), *OPTIONS, 0)
    assert out.requires_grad
    assert not tau.requires_grad
    assert not saved.requires_grad
    assert saved.dtype == torch.uint8
    assert saved.dim() == 1


def test_only_a_call_with_gradients_saves() -> None:
    def saved(*tensors: Tensor) -> int:
        return ops.attention_forward(*tensors, *OPTIONS, 0)[2].numel()

    tensors = inputs()
    assert saved(*tensors) > 0
    assert saved(*(t.detach() for t in tensors)) == 0
    with torch.no_grad():
        assert saved(*tensors) == 0
    with torch.inference_mode():
        assert saved(*tensors) == 0


def test_backward_frees_what_was_saved() -> None:
    query, key, value = inputs()
    out = attend(query * 1.0, key, value)
    scaled = weakref.ref(out.grad_fn.saved_tensors[0])  # type: ignore[union-attr]
    assert scaled() is not None
    out.sum().backward()
    gc.collect()
    assert scaled() is None
    with pytest.raises(RuntimeError, match="second time"):
        out.sum().backward()


def test_saved_tensor_hooks_may_change_layouts() -> None:
    tensors = inputs()
    expected = gradients(attend, *tensors)
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: t.contiguous(), lambda t: t.clone())
    with hooks:
        assert_equal(gradients(attend, *tensors), expected)


def test_checkpointing_gives_the_same() -> None:
    from torch.utils.checkpoint import checkpoint

    tensors = inputs()
    again = gradients(lambda *t: checkpoint(attend, *t, use_reentrant=False), *tensors)
    assert_equal(again, gradients(attend, *tensors))


def test_forward_and_backward_run_in_the_same_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two backends that run the same code: the name that is forced does both passes."""
    calls: list[str] = []
    cpu: Any = importlib.import_module("adasplash2.backends.cpu")

    class Spy:
        def __init__(self, name: str) -> None:
            self.name = name

        def __getattr__(self, attribute: str) -> Any:
            return getattr(cpu, attribute)

        def forward(self, problem: Problem, inputs: Inputs, *more: Any) -> Forward:
            calls.append(f"{self.name} forward")
            return cpu.forward(problem, inputs, *more)

        def backward(self, *arguments: Any) -> Any:
            calls.append(f"{self.name} backward")
            return cpu.backward(*arguments)

    spies = {name: Spy(name) for name in ("one", "two")}
    monkeypatch.setattr(dispatch, "REGISTRY", {name: name for name in spies})
    monkeypatch.setattr(dispatch, "FORCED", None)
    monkeypatch.setattr(dispatch.importlib, "import_module", spies.__getitem__)
    dispatch.forget()
    try:
        for backend in (None, "two"):
            attend(*inputs(), backend=backend).sum().backward()
    finally:
        dispatch.forget()
    assert calls == ["one forward", "one backward", "two forward", "two backward"]


@pytest.mark.parametrize("function", [attend, lambda q, k, v: adasplash2.entmax15(q)])
def test_double_backward_is_refused(function: Callable[..., Tensor]) -> None:
    tensors = inputs()
    out = function(*tensors)
    [first] = torch.autograd.grad(out.square().sum(), tensors[:1], create_graph=True)
    assert first.requires_grad
    with pytest.raises(RuntimeError, match="no second derivatives"):
        first.square().sum().backward()


@pytest.mark.parametrize("function", [attend, lambda q, k, v: adasplash2.entmax15(q)])
@pytest.mark.parametrize("requires_grad", [True, False])
def test_forward_mode_is_refused(function: Callable[..., Tensor], requires_grad: bool) -> None:
    query, key, value = inputs(requires_grad=requires_grad)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(query, torch.ones_like(query))
        with pytest.raises(RuntimeError, match="no forward-mode derivatives"):
            function(dual, key, value)


def test_functorch_transforms_are_refused_not_wrong() -> None:
    x = torch.randn(3, 5)
    with pytest.raises(RuntimeError, match=r"functorch transforms"):
        torch.func.grad(lambda x: adasplash2.entmax15(x).square().sum())(x)
    with pytest.raises(RuntimeError, match=r"functorch transforms"):
        torch.func.jvp(adasplash2.entmax15, (x,), (x,))


# No allowed pair


EMPTY = {
    "batch": ((0, 4, 5, 8), (0, 4, 6, 8), (0, 4, 6, 7)),
    "heads": ((2, 0, 5, 8), (2, 0, 6, 8), (2, 0, 6, 7)),
    "length_q": ((2, 4, 0, 8), (2, 4, 6, 8), (2, 4, 6, 7)),
    "length_k": ((2, 4, 5, 8), (2, 4, 0, 8), (2, 4, 0, 7)),
    "both lengths": ((2, 4, 0, 8), (2, 4, 0, 8), (2, 4, 0, 7)),
}


@pytest.fixture
def no_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(problem: Any, backend: str | None = None) -> Any:
        raise AssertionError("a backend was asked")

    monkeypatch.setattr(ops, "choose", fail)


@pytest.mark.usefixtures("no_backend")
@pytest.mark.parametrize("shapes", EMPTY.values(), ids=EMPTY.keys())
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_empty_attention(
    shapes: tuple[tuple[int, ...], ...], is_causal: bool, dtype: torch.dtype
) -> None:
    tensors = [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]
    out = adasplash2.entmax_attention(*tensors, is_causal=is_causal)
    assert out.shape == (*shapes[0][:3], shapes[2][3])
    assert out.dtype == dtype
    assert not out.any()
    out.sum().backward()
    for tensor in tensors:
        assert tensor.grad is not None
        assert tensor.grad.shape == tensor.shape
        assert not tensor.grad.any()
    stats = adasplash2.attention_stats(*tensors, is_causal=is_causal)
    assert stats.tau.shape == stats.support.shape == stats.iterations.shape == shapes[0][:3]
    assert (stats.tau == float("inf")).all()
    assert not stats.support.any()
    assert stats.empty_tiles.shape == shapes[0][:2]


@pytest.mark.usefixtures("no_backend")
@pytest.mark.parametrize("shapes", EMPTY.values(), ids=EMPTY.keys())
def test_empty_attention_compiles(shapes: tuple[tuple[int, ...], ...]) -> None:
    torch._dynamo.reset()
    tensors = [torch.randn(shape) for shape in shapes]
    compiled = torch.compile(
        adasplash2.entmax_attention, fullgraph=True, dynamic=False, backend="aot_eager"
    )
    assert_equal(gradients(compiled, *tensors), gradients(adasplash2.entmax_attention, *tensors))


@pytest.mark.usefixtures("no_backend")
@pytest.mark.parametrize("shape", [(0,), (0, 3), (3, 0), (2, 0, 4)])
@pytest.mark.parametrize("dim", [0, -1])
def test_empty_entmax(shape: tuple[int, ...], dim: int) -> None:
    x = torch.randn(shape, requires_grad=True)
    y = adasplash2.entmax15(x, dim=dim)
    assert y.shape == shape
    y.sum().backward()
    assert x.grad is not None
    assert x.grad.shape == shape


# Layouts of entmax


@pytest.mark.parametrize("dim", [0, 1, 2, -1, -2, -3])
def test_entmax_along_any_dimension(dim: int) -> None:
    x = torch.randn(3, 4, 5)

    def last(x: Tensor) -> Tensor:
        return adasplash2.entmax15(x.movedim(dim, -1).contiguous()).movedim(-1, dim)

    assert_equal(gradients(lambda x: adasplash2.entmax15(x, dim=dim), x), gradients(last, x))


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x[:, ::2],
        lambda x: x[::3],
        lambda x: x.T,
        lambda x: x[:1].expand(5, -1),
        lambda x: x[:, :1].expand(-1, 5),
        lambda x: x[:, 3],
        lambda x: x.view(2, 3, 12).transpose(0, 1),
    ],
)
def test_entmax_of_any_strides(view: Callable[[Tensor], Tensor]) -> None:
    x = torch.randn(6, 12)
    found = gradients(lambda x: adasplash2.entmax15(view(x)), x)
    assert_equal(found, gradients(lambda x: adasplash2.entmax15(view(x).contiguous()), x))


# Softmax and autocast


@pytest.mark.parametrize("alpha", [1, 1.0])
def test_alpha_one_is_softmax(alpha: float) -> None:
    tensors = inputs()
    found = gradients(lambda *t: attend(*t, alpha=alpha, scale=0.3), *tensors)
    assert_equal(
        found,
        gradients(
            lambda *t: F.scaled_dot_product_attention(
                *t, is_causal=True, scale=0.3, enable_gqa=True
            ),
            *tensors,
        ),
    )
    x = torch.randn(3, 4, 5)
    found = gradients(lambda x: adasplash2.entmax(x, alpha=alpha, dim=1), x)
    assert_equal(found, gradients(lambda x: torch.softmax(x, 1), x))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("alpha", [1.0, 1.5])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_casts_as_sdpa_does(device: str, alpha: float, dtype: torch.dtype) -> None:
    query, key, value = inputs(device)
    key = key.to(dtype)  # mixed dtypes meet in the one of the region
    with torch.autocast(device, dtype=dtype):
        out = attend(query, key, value, alpha=alpha)
        reference = F.scaled_dot_product_attention(query, key, value, enable_gqa=True)
        assert adasplash2.explain(query, key, value, enable_gqa=True).problem.count(
            str(dtype).removeprefix("torch.")
        )
        stats = adasplash2.attention_stats(query, key, value, is_causal=True, enable_gqa=True)
    assert out.dtype == reference.dtype == dtype
    rounded = [t.to(dtype) for t in (query, key, value)]
    assert_equal([out], [attend(*rounded, alpha=alpha)])
    expected = adasplash2.attention_stats(*rounded, is_causal=True, enable_gqa=True)
    assert_equal([stats.tau], [expected.tau])
    out.float().sum().backward()
    assert query.grad is not None
    assert query.grad.dtype == torch.float32


def test_autocast_leaves_float64_alone() -> None:
    tensors = inputs(dtype=torch.float64)
    expected = attend(*tensors)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_equal([attend(*tensors)], [expected])


def test_export() -> None:
    class Block(torch.nn.Module):
        def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            return attend(query, key, value)

    tensors = inputs(requires_grad=False)
    exported = torch.export.export(Block(), tensors)
    assert "adasplash2.attention_forward" in str(exported.graph)
    assert_equal([exported.module()(*tensors)], [attend(*tensors)])


def test_vmap_runs_each_slice() -> None:
    x = torch.randn(3, 4, 5)
    assert_equal([torch.func.vmap(adasplash2.entmax15)(x)], [adasplash2.entmax15(x)])


# transformers


def tiny_llama() -> Any:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        attn_implementation="sdpa",
    )
    return transformers.LlamaForCausalLM(config).eval()


def test_transformers_softmax_agrees_with_sdpa() -> None:
    """alpha = 1 through our door is the model's own attention: masks, scale, groups, layout."""
    model = tiny_llama()
    tokens = torch.randint(0, 50, (2, 11))
    expected = model(tokens).logits
    from adasplash2.integrations.transformers import register

    register("adasplash2-softmax", alpha=1.0)
    model.set_attn_implementation("adasplash2-softmax")
    torch.testing.assert_close(model(tokens).logits, expected)


def test_transformers_entmax_runs_trains_and_is_observed() -> None:
    from adasplash2.integrations.transformers import register

    model = tiny_llama()
    seen: list[tuple[int | None, bool, float | None]] = []

    def observe(
        layer: int | None, query: Tensor, key: Tensor, value: Tensor, causal: bool, scale: Any
    ) -> None:
        assert query.shape == (2, 4, 11, 8)
        assert key.shape == value.shape == (2, 2, 11, 8)
        seen.append((layer, causal, scale))

    register("adasplash2-observed", observer=observe)
    model.set_attn_implementation("adasplash2-observed")
    tokens = torch.randint(0, 50, (2, 11))
    out = model(tokens, labels=tokens)
    out.loss.backward()
    assert seen == [(0, True, 8**-0.5), (1, True, 8**-0.5)]
    weight = model.model.layers[0].self_attn.q_proj.weight
    assert weight.grad.isfinite().all()
    assert weight.grad.any()


def test_transformers_decoding_with_a_cache_equals_the_whole() -> None:
    from adasplash2.integrations.transformers import register

    model = tiny_llama()
    register("adasplash2-decode")
    model.set_attn_implementation("adasplash2-decode")
    tokens = torch.randint(0, 50, (1, 9))
    with torch.no_grad():
        whole = model(tokens).logits
        step = model(tokens[:, :6], use_cache=True)
        logits = [step.logits]
        for i in range(6, 9):
            step = model(tokens[:, i : i + 1], past_key_values=step.past_key_values, use_cache=True)
            logits.append(step.logits)
    torch.testing.assert_close(torch.cat(logits, dim=1), whole)


def test_transformers_padding_is_refused_not_ignored() -> None:
    from adasplash2.integrations.transformers import register

    model = tiny_llama()
    register("adasplash2-padding")
    model.set_attn_implementation("adasplash2-padding")
    tokens = torch.randint(0, 50, (2, 6))
    everything = torch.ones_like(tokens)
    model(tokens, attention_mask=everything)
    padded = everything.clone()
    padded[0, :2] = 0
    with pytest.raises(ValueError, match="attention_mask must be None"):
        model(tokens, attention_mask=padded)
    several = model(tokens, use_cache=True).past_key_values
    with pytest.raises(ValueError, match="several new"):
        model(tokens[:, :2], past_key_values=several, use_cache=True)


# Calls that skip torch's dispatcher


@pytest.fixture
def dispatched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the operators that calls went through."""
    names: list[str] = []

    def watch(name: str) -> None:
        operator = getattr(ops, name)

        def call(*args: Any) -> Any:
            names.append(name)
            return operator(*args)

        monkeypatch.setattr(ops, name, call)

    for name in ("attention_forward", "attention_backward", "entmax_forward", "entmax_backward"):
        watch(name)
    return names


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("inference", [False, True])
def test_a_plain_call_skips_torchs_dispatcher(
    dispatched: list[str], device: str, inference: bool
) -> None:
    with torch.inference_mode(inference):
        q, k, v = inputs(device, requires_grad=False)
        attend(q, k, v)
        adasplash2.entmax15(q)
        attend(torch.nn.Parameter(q, requires_grad=False), k, v)
    assert not dispatched
    with torch.no_grad():
        attend(*inputs(device))
    tensors = inputs(device)
    gradients(attend, *tensors)
    torch.autograd.grad(adasplash2.entmax15(tensors[0]).square().sum(), tensors[:1])
    assert not dispatched


class Subclass(Tensor):
    pass


@pytest.mark.parametrize(
    "change",
    [
        lambda t: torch._neg_view(t),
        lambda t: t.as_subclass(Subclass),
        lambda t: torch._efficientzerotensor(t.shape),
    ],
    ids=["negated lazily", "subclass", "zeros without memory"],
)
def test_tensors_of_special_kinds_go_through_it(
    dispatched: list[str], change: Callable[[Tensor], Tensor]
) -> None:
    q, k, v = (change(t) for t in inputs(requires_grad=False))
    out = attend(q, k, v)
    assert "attention_forward" in dispatched
    copies = [torch.empty(t.shape).copy_(t) for t in (q, k, v)]
    assert_equal([out.as_subclass(Tensor)], [attend(*copies)])


def test_whoever_watches_operators_sees_them(dispatched: list[str]) -> None:
    from torch.overrides import TorchFunctionMode
    from torch.profiler import profile
    from torch.utils._python_dispatch import TorchDispatchMode

    class Functions(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None):
            return func(*args, **(kwargs or {}))

    class Dispatches(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None):
            return func(*args, **(kwargs or {}))

    tensors = inputs(requires_grad=False)
    for watcher in (Functions(), Dispatches(), profile()):
        dispatched.clear()
        with watcher:
            attend(*tensors)
        assert "attention_forward" in dispatched
    out = attend(*inputs())
    dispatched.clear()
    with Dispatches():
        out.sum().backward()
    assert dispatched == ["attention_backward"]
