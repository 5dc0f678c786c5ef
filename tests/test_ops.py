"""The operators as torch sees them: registration, gradients, compilation, autocast, empties.

Whether the numbers are right is asked elsewhere; here, whether every way of calling gives the
same ones.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import importlib
import math
import random
import re
import subprocess
import sys
import warnings
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.func import grad, vmap

import adasplash2
from adasplash2 import backends, dispatch, ops, softmax
from adasplash2.backends import cuda
from adasplash2.contract import Forward
from adasplash2.options import MAY_BE_NONE, NUMBERS, Options
from adasplash2.problem import Inputs, Problem, attention_problem

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
@pytest.mark.parametrize(
    ("requires_grad", "saved_bytes"),
    # 0 with gradients leaves the length to autograd: by data, but in a trace by shapes.
    [(True, ops.AS_NEEDED), (True, 1 << 20), (False, ops.AS_NEEDED), (False, 1 << 20), (False, 0)],
)
def test_opcheck_attention_forward(device: str, requires_grad: bool, saved_bytes: int) -> None:
    arguments = (*inputs(device, requires_grad=requires_grad), *OPTIONS, saved_bytes)
    torch.library.opcheck(ops.attention_forward, arguments)


@pytest.mark.parametrize("device", DEVICES)
def test_opcheck_attention_backward(device: str) -> None:
    tensors = inputs(device, requires_grad=False)
    out, tau, saved = ops.attention_forward(*tensors, *OPTIONS, ops.AS_NEEDED)
    for given in (out, None):  # as older graphs give it, and as autograd does
        arguments = (torch.randn_like(out), *tensors, given, tau, saved, *OPTIONS)
        torch.library.opcheck(ops.attention_backward, arguments)


@pytest.mark.parametrize("device", DEVICES)
def test_opcheck_entmax(device: str) -> None:
    x = torch.randn(3, 5, 11, device=device)
    torch.library.opcheck(ops.entmax_forward, (x, 1.5, -1, "", False))
    torch.library.opcheck(ops.entmax_forward, (x.clone().requires_grad_(), 1.3, 1, "", False))
    y = ops.entmax_forward(x, 1.5, -1, "", False)
    torch.library.opcheck(ops.entmax_backward, (torch.randn_like(y), y, 1.5, -1, ""))
    alphas = torch.linspace(1.2, 1.9, 5, device=device)[:, None]
    learned = alphas[None].clone().requires_grad_()
    asked = x.clone().requires_grad_(), 1.5, -1, "", False, None, learned
    torch.library.opcheck(ops.entmax_forward, asked)
    y = ops.entmax_forward(x, 1.5, -1, "", False, None, alphas[None])
    torch.library.opcheck(
        ops.entmax_backward, (torch.randn_like(y), y, 1.5, -1, "", None, alphas[None])
    )


# torch.compile


def test_what_is_traced_does_not_read_the_list_of_modules() -> None:
    """A compiler holds on to all of ``sys.modules`` then; torch 2.11 fails where an import falls
    between."""
    package = Path(adasplash2.__file__).parent
    reading = {
        path.relative_to(package).as_posix()
        for path in package.rglob("*.py")
        if "sys.modules" in path.read_text(encoding="utf-8")
    }
    assert reading <= {"auxiliary.py", "integrations/torch_tools.py"}  # never traced


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


def several(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    alpha: float = 1.5,
    scale: float | None = None,
) -> Tensor:
    once = attend(2.0 * query, key, value, alpha=alpha, scale=scale)
    twice = attend(once, key, value, alpha=alpha, scale=scale)
    return adasplash2.entmax(twice, alpha, dim=1) * adasplash2.sparsemax(twice)


def assert_compiles(
    calls: list[tuple[int, Any, Any]],
    graphs: int,
    function: Callable[..., Tensor] = several,
    *,
    dynamic: bool | None = None,
    dtype: torch.dtype = torch.float32,
    mode: Any = torch.enable_grad,
    mark: bool = False,
    compiler: str = "aot_eager",
) -> None:
    """``function`` in ``calls`` of a length, alpha and scale: compiled into so many ``graphs``,
    with neither a graph break nor a warning, and to the same numbers."""
    torch._dynamo.reset()
    counters.clear()
    counted = CompileCounterWithBackend(compiler)
    compiled = torch.compile(function, backend=counted, dynamic=dynamic)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        for length, alpha, scale in calls:
            tensors = [torch.randn(2, 3, length, 16, dtype=dtype) for _ in "qkv"]
            if mark:
                for tensor in tensors:
                    torch._dynamo.mark_dynamic(tensor, 2)
            with mode():
                leaves = [t.requires_grad_(mode is torch.enable_grad) for t in tensors]
                results = []
                for one in (compiled, function):
                    out = one(*leaves, alpha, scale)
                    results.append([out.detach()])
                    if mode is torch.enable_grad:
                        ones = torch.ones_like(out)
                        results[-1] += torch.autograd.grad(out, leaves, ones)
            for one, other in zip(*results, strict=True):
                tolerance = 0.1 if dtype == torch.bfloat16 else 1e-4
                torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)
    assert not counters["graph_break"]
    assert counted.frame_count == counters["stats"]["unique_graphs"] == graphs
    from_torch = "torch.jit.script"  # what torch says of itself
    assert [str(w.message) for w in warned if from_torch not in str(w.message)] == []


MODES = pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
SAME, LENGTHS = [(9, 1.5, None)] * 3, [(n, 1.5, None) for n in (7, 9, 33, 600)]
ALPHAS = (1.5, 1.6, 1.75, 1.9, 2.0)


@MODES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_never_breaks_a_graph(mode: Any, dtype: torch.dtype) -> None:
    assert_compiles(SAME, 1, dynamic=False, dtype=dtype, mode=mode)


@MODES
def test_one_graph_for_all_lengths(mode: Any) -> None:
    assert_compiles(LENGTHS, 1, dynamic=True, mode=mode)
    assert_compiles(LENGTHS, 2, mode=mode)
    assert_compiles(LENGTHS, 1, mode=mode, mark=True)


@MODES
@pytest.mark.parametrize(
    "numbers",
    [
        [(alpha, None) for alpha in ALPHAS],
        [(alpha, alpha / 9) for alpha in ALPHAS],
        [(1.5, alpha / 9) for alpha in ALPHAS],
        [(alpha, None) for alpha in (2, 3, 4, 5, 6)],
        [(alpha, None) for alpha in (1.0, *ALPHAS)],
    ],
    ids=["alpha", "both", "scale", "integers", "from softmax"],
)
def test_numbers_that_change_do_not_compile_anew(mode: Any, numbers: list[Any]) -> None:
    """The first change makes them symbols: a second graph, and no third."""
    assert_compiles([(9, *pair) for pair in numbers], 2, mode=mode)


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.inference_mode])
def test_inductor_does_not_compile_numbers_anew_either(mode: Any) -> None:
    """It makes constants of numbers that it cannot make tensors of."""

    def once(query: Tensor, key: Tensor, value: Tensor, alpha: Any, scale: Any) -> Tensor:
        return attend(query, key, value, alpha=alpha, scale=scale)

    calls = [(9, alpha, alpha / 9) for alpha in ALPHAS]
    assert_compiles(calls, 2, once, compiler="inductor", mode=mode)


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
    hooks = torch.autograd.graph.saved_tensors_hooks
    for back in (torch.clone, lambda t: t.mT.contiguous().mT if t.dim() == 4 else t):
        with hooks(lambda t: t.contiguous(), back):
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
    monkeypatch.setattr(backends, "REGISTRY", {name: name for name in spies})
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


# torch.func


def loss(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return attend(query, key, value, is_causal=False).square().sum()


INPUTS = inputs(requires_grad=False)


def samples(*batched: bool) -> list[Tensor]:
    """Inputs of three samples, or of one for all where not ``batched``."""
    torch.manual_seed(0)
    return [
        torch.stack([t.detach() * (1.0 + i) for i in range(3)]) if many else t.detach()
        for t, many in zip(inputs(), batched, strict=True)
    ]


def slices(tensors: list[Tensor], batched: tuple[bool, ...]) -> list[list[Tensor]]:
    return [
        [t[i] if many else t for t, many in zip(tensors, batched, strict=True)] for i in range(3)
    ]


SOME_BATCHED = [
    (True, True, True),
    (True, False, False),
    (False, True, False),
    (False, False, True),
    (False, True, True),
]


@pytest.mark.parametrize("batched", SOME_BATCHED)
def test_vmap_and_per_sample_gradients(batched: tuple[bool, ...]) -> None:
    tensors = samples(*batched)
    dims = tuple(0 if many else None for many in batched)
    singles = slices(tensors, batched)
    assert_near([vmap(attend, dims)(*tensors)], [torch.stack([attend(*one) for one in singles])])
    found = vmap(grad(loss, (0, 1, 2)), dims)(*tensors)
    expected = [grad(loss, (0, 1, 2))(*one) for one in singles]
    assert_near(list(found), [torch.stack(each) for each in zip(*expected, strict=True)])


@pytest.mark.parametrize("batched", SOME_BATCHED)
def test_gradients_through_vmap(batched: tuple[bool, ...]) -> None:
    tensors = samples(*batched)
    dims = tuple(0 if many else None for many in batched)

    def mapped(*tensors: Tensor) -> Tensor:
        return vmap(attend, dims)(*tensors).square().sum()

    def looped(*tensors: Tensor) -> Tensor:
        singles = slices(list(tensors), batched)
        return torch.stack([attend(*one).square().sum() for one in singles]).sum()

    expected = gradients(looped, *tensors)
    assert_near(gradients(mapped, *tensors), expected)
    assert_near(
        list(grad(lambda *t: expected_scale() * mapped(*t), (0, 1, 2))(*tensors)), expected[1:]
    )


def expected_scale() -> Tensor:
    """The cotangent that ``gradients`` gives a scalar."""
    return torch.randn((), generator=torch.Generator().manual_seed(1))


def assert_near(found: list[Tensor], expected: list[Tensor]) -> None:
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_vmap_over_any_dimension() -> None:
    query, key, value = samples(True, True, True)
    expected = torch.stack([attend(query[i], key[i], value[i]) for i in range(3)], 1)
    moved = query.movedim(0, 2), key.movedim(0, -1), value.movedim(0, 1)
    assert_near([vmap(attend, (2, -1, 1), out_dims=1)(*moved)], [expected])
    twice = vmap(vmap(lambda q, k, v: attend(q[None], k[None], v[None])[0]))
    assert_near([twice(query, key, value)], [vmap(attend)(query, key, value)])


@pytest.mark.parametrize("dim", [0, 1, -1])
@pytest.mark.parametrize("in_dim", [0, 1, 2])
def test_vmap_of_entmax(dim: int, in_dim: int) -> None:
    def one(x: Tensor) -> Tensor:
        return adasplash2.entmax(x, 1.3, dim)

    def squares(x: Tensor) -> Tensor:
        return one(x).square().sum()

    x = torch.randn(3, 4, 5)
    singles = x.unbind(in_dim)
    assert_near([vmap(one, in_dim)(x)], [torch.stack([one(s) for s in singles])])
    expected = torch.stack([gradients(squares, s)[1] / expected_scale() for s in singles])
    assert_near([vmap(grad(squares), in_dim)(x)], [expected])


def test_jacobians() -> None:
    query, key, value = (t.detach()[:1, :2, :3] for t in inputs())
    small = query, key, value

    def output(*tensors: Tensor) -> Tensor:
        return attend(*tensors)

    rows = [
        torch.autograd.grad(out, leaves, retain_graph=True)
        for leaves in [[t.clone().requires_grad_() for t in small]]
        for out in output(*leaves).flatten()
    ]
    expected = [torch.stack(each) for each in zip(*rows, strict=True)]
    shape = output(*small).shape
    for found in (
        torch.func.jacrev(output, (0, 1, 2))(*small),
        torch.autograd.functional.jacobian(output, small, vectorize=True),
    ):
        assert_near([j.reshape(-1, *j.shape[len(shape) :]) for j in found], expected)
    x = torch.randn(2, 4)
    found = torch.func.jacrev(adasplash2.entmax15)(x)
    assert_near([found], [torch.autograd.functional.jacobian(adasplash2.entmax15, x)])
    stacked = torch.stack([query, 2.0 * query])
    per_sample = vmap(torch.func.jacrev(lambda q: attend(q, key, value)))(stacked)
    each = [torch.func.jacrev(lambda q: attend(q, key, value))(q) for q in stacked]
    assert_near([per_sample], [torch.stack(each)])


class Layer(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.project = torch.nn.Linear(8, 24)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.project(x).unflatten(-1, (3, 8)).unbind(-2)
        return attend(query[None, None], key[None, None], value[None, None])[0, 0]


@pytest.mark.parametrize("compiled", [False, True])
def test_per_sample_gradients_of_a_module(compiled: bool) -> None:
    torch._dynamo.reset()
    layer, x = Layer(), torch.randn(3, 7, 8)
    weights = {name: weight.detach() for name, weight in layer.named_parameters()}

    def one(weights: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(layer, weights, (x,)).square().sum()

    function = vmap(grad(one), (None, 0))
    if compiled:
        function = torch.compile(function, fullgraph=True, backend="aot_eager")
    found = function(weights, x)
    for i in range(3):
        layer.zero_grad()
        layer(x[i]).square().sum().backward()
        for name, weight in layer.named_parameters():
            assert weight.grad is not None
            assert_near([found[name][i]], [weight.grad])


@pytest.mark.parametrize(
    "function",
    [
        lambda q: loss(q, *INPUTS[1:]),
        lambda q: adasplash2.entmax15(q, 0).square().sum(),
    ],
)
def test_transforms_refuse_what_there_is_not(function: Callable[[Tensor], Tensor]) -> None:
    """Forward mode and second derivatives, in our words: never a zero instead."""
    query = INPUTS[0]
    first = "no forward-mode derivatives"
    with pytest.raises(RuntimeError, match=first):
        torch.func.jvp(function, (query,), (query,))
    with pytest.raises(RuntimeError, match=first):
        torch.func.jacfwd(function)(query)
    with pytest.raises(RuntimeError, match=first):
        torch.func.hessian(function)(query)
    second = "no second derivatives"
    with pytest.raises(RuntimeError, match=second):
        grad(lambda q: grad(function)(q).square().sum())(query)
    with pytest.raises(RuntimeError, match=second):
        torch.func.jacrev(torch.func.jacrev(function))(query)
    leaf = query.clone().requires_grad_()
    with pytest.raises(RuntimeError, match=second):
        grad(function)(leaf).square().sum().backward()


def dense_softmax(
    query: Tensor, key: Tensor, value: Tensor, softcap: float, window: tuple[int, int]
) -> Tensor:
    """Attention at alpha = 1 by its formula."""
    scores = query @ key.mT / math.sqrt(query.shape[-1])
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    distance = torch.arange(key.shape[2]) - torch.arange(query.shape[2])[:, None]
    left, right = (math.inf if side < 0 else side for side in window)
    seen = (distance >= -left) & (distance <= right)
    return torch.softmax(scores.masked_fill(~seen, -math.inf), -1) @ value


@pytest.mark.parametrize("by", ["vjp", "jacrev", "jacrev of jacrev", "grad", "grad of grad",
    "backward of grad", "hessian", "vmap of grad", "third order"])  # fmt: skip
@pytest.mark.parametrize("said", [(2.0, (-1, -1)), (0.0, (2, 1)), (2.0, (2, -1))], ids=str)
def test_transforms_of_softmax(
    said: tuple[float, tuple[int, int]], by: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What SDPA does not know has at alpha = 1 derivatives of any order, and scores of all pairs at
    once are made for no first one."""
    shape = (2, 2, 5, 4) if by == "vmap of grad" else (1, 2, 5, 4)
    q, k, v, g = (torch.randn(shape, dtype=torch.float64) for _ in range(4))

    def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out: Tensor = adasplash2.entmax_attention(
            q, k, v, alpha=1.0, softcap=said[0], window=said[1]
        )
        return out

    def derivatives(attend: Callable[..., Tensor]) -> Any:
        each = (0, 1, 2)

        def loss(*tensors: Tensor) -> Tensor:
            return (attend(*tensors) * g[: len(tensors[0])]).square().sum()

        def first(*tensors: Tensor) -> Tensor:
            return sum(one.square().sum() for one in grad(loss, each)(*tensors))

        def of_query(q: Tensor) -> Tensor:
            return attend(q, k, v)

        if by == "vjp":
            return torch.func.vjp(attend, q, k, v)[1](g)
        if by == "jacrev":
            return torch.func.jacrev(attend, each)(q, k, v)
        if by == "jacrev of jacrev":
            return [torch.func.jacrev(torch.func.jacrev(of_query))(q)]
        if by == "grad":
            return grad(loss, each)(q, k, v)
        if by == "grad of grad":
            return grad(first, each)(q, k, v)
        if by == "hessian":
            return [torch.func.hessian(of_query)(q)]
        if by == "vmap of grad":
            return vmap(lambda *t: grad(first, each)(*(one[None] for one in t)))(q, k, v)
        leaves = [t.clone().requires_grad_() for t in (q, k, v)]
        if by == "backward of grad":
            return torch.autograd.grad(first(*leaves), leaves)
        found = torch.autograd.grad(loss(*leaves), leaves, create_graph=True)
        penalty = sum(one.square().sum() for one in found)
        found = torch.autograd.grad(penalty, leaves, create_graph=True)
        return torch.autograd.grad(sum(one.square().sum() for one in found), leaves)

    expected = derivatives(lambda *t: dense_softmax(*t, *said))
    if by in ("vjp", "jacrev", "grad"):
        monkeypatch.setattr(softmax, "whole", None)
    for got, right in zip(derivatives(ours), expected, strict=True):
        torch.testing.assert_close(got, right, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dim", [0, 1])
def test_vmap_over_nothing(dim: int) -> None:
    x = torch.randn(0, 2, 3, 6, 4).movedim(0, dim)
    out = torch.func.vmap(lambda one: adasplash2.entmax_attention(one, one, one), in_dims=dim)(x)
    assert out.shape == (0, 2, 3, 6, 4)


def test_transforms_check_what_one_sample_has() -> None:
    query, key, value = samples(True, True, True)
    with pytest.raises(ValueError, match=r"query must have at least 2 dimensions.*got 1"):
        vmap(attend)(query[0, 0, :2, 0], key[0, 0, :2, 0], value[0, 0, :2, 0])
    with pytest.raises(ValueError, match=r"key must have the batch of query \(2\), got 3"):
        vmap(attend)(query, torch.cat([key, key[:, :1]], dim=1), value)
    for one in (adasplash2.entmax15, lambda x: ops.entmax_forward(x, 1.5, -1, "", False)):
        with pytest.raises(ValueError, match="at least 1 dimension"):
            vmap(one)(torch.randn(3))
    with pytest.raises(TypeError, match="attention_stats works in neither"):
        vmap(lambda *t: adasplash2.attention_stats(*t, enable_gqa=True).tau)(query, key, value)


# Tensors without data


@pytest.mark.parametrize("where", ["meta", "fake"])
def test_training_without_data(where: str) -> None:
    mode = FakeTensorMode() if where == "fake" else contextlib.nullcontext()
    with mode:
        tensors = [
            torch.empty(t.shape, device="meta" if where == "meta" else "cpu") for t in inputs()
        ]
        leaves = [t.requires_grad_() for t in tensors]
        out = attend(*leaves)
        rows = adasplash2.entmax(leaves[0], 1.3, dim=1)
        (out.sum() + rows.sum()).backward()
    assert out.shape == attend(*inputs()).shape
    assert rows.shape == leaves[0].shape
    for leaf in leaves:
        assert leaf.grad is not None
        assert (leaf.grad.shape, leaf.grad.device) == (leaf.shape, leaf.device)


def test_a_model_made_on_meta_trains() -> None:
    with torch.device("meta"):
        layer, x = Layer(), torch.randn(7, 8)
    layer(x).sum().backward()
    assert layer.project.weight.grad is not None


def test_joint_graphs_are_exported() -> None:
    from torch._functorch.aot_autograd import aot_export_joint_simple
    from torch.fx.experimental.proxy_tensor import make_fx

    tensors = inputs()
    graph = aot_export_joint_simple(lambda *t: (attend(*t),), tensors, trace_joint=True)
    assert "adasplash2.attention_backward" in str(graph.graph)

    def both(*tensors: Tensor) -> list[Tensor]:
        return list(torch.autograd.grad(attend(*tensors).sum(), tensors))

    for mode in ("real", "fake", "symbolic"):
        assert_equal(make_fx(both, tracing_mode=mode)(*tensors)(*tensors), both(*tensors))


@pytest.mark.parametrize(
    ("device", "dtype"),
    [("meta", torch.float32), ("cpu", torch.float64), ("meta", torch.bfloat16)],
)
def test_default_device_and_dtype_change_nothing(device: str, dtype: torch.dtype) -> None:
    tensors = inputs()
    empty = [t.detach()[:, :, :0] for t in tensors]

    def everything() -> list[Tensor]:
        found = []
        for q, k, v in (tensors, empty, (tensors[0], *empty[1:])):
            leaves = [t.detach().requires_grad_() for t in (q, k, v)]
            out = attend(*leaves)
            stats = adasplash2.attention_stats(q, k, v, is_causal=True, enable_gqa=True)
            rows = adasplash2.entmax15(leaves[0], dim=0)
            found += [out, rows, stats.tau, stats.support, stats.iterations, stats.empty_tiles]
            found += torch.autograd.grad(out.sum() + rows.square().sum(), leaves)
            found.append(attend(*(t.detach() for t in (q, k, v))))
            adasplash2.explain(q, k, v, enable_gqa=True)
        return found

    expected, before = everything(), torch.get_default_dtype()
    torch.set_default_device(device)
    torch.set_default_dtype(dtype)
    try:
        found = everything()
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(before)
    assert [t.device.type for t in found] == ["cpu"] * len(expected)
    assert_equal(found, expected)


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize(
    "function",
    [
        lambda x: adasplash2.entmax15(x),
        lambda x: adasplash2.entmax15(x, dim=0),
        lambda x: adasplash2.entmax(x, 1.3, dim=-2),
        lambda x: adasplash2.entmax15(x[:0], dim=1),
        lambda x: adasplash2.entmax15(x.transpose(0, 2)),
        lambda x: attend(x, x, x),
        lambda x: attend(x[:, :, :0], x, x),
        lambda x: attend(x, x[:, :, :0], x[:, :, :0]),
    ],
)
def test_outputs_are_changed_in_place_as_softmaxs(
    mode: Any, function: Callable[[Tensor], Tensor]
) -> None:
    with mode():
        x = torch.randn(2, 3, 5, 8, requires_grad=True)
        for argument in (x, x * 1.0):
            out = function(argument)
            assert not out._is_view()
            out.masked_fill_(out < 0.1, 0.0)
            out.mul_(2.0)
            out.detach_()


def test_a_gradient_from_a_changed_output_is_refused() -> None:
    x = torch.randn(2, 3, 5, 8, requires_grad=True)
    for out in (adasplash2.entmax15(x), adasplash2.entmax15(x, dim=1)):
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            out.mul_(2.0).sum().backward()


def test_an_output_of_attention_may_be_changed() -> None:
    """Its gradient does not need it."""
    x = torch.randn(2, 3, 5, 8, requires_grad=True)
    (expected,) = torch.autograd.grad((2.0 * attend(x, x, x)).sum(), x)
    (found,) = torch.autograd.grad(attend(x, x, x).mul_(2.0).sum(), x)
    assert_equal([found], [expected])


@pytest.mark.parametrize("compiled", [False, True])
def test_an_output_lives_no_longer_than_who_needs_it(compiled: bool) -> None:
    """A model's next product keeps a copy in another layout: kept here too, each layer would have
    its output twice until the backward."""
    tensors = inputs(length_q=8, length_k=8)
    function = torch.compile(attend, backend="aot_eager") if compiled else attend
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = function(*tensors)
    places = {t.untyped_storage().data_ptr() for t in kept}
    assert len(kept) == 5  # query, key, value, tau, saved
    assert {t.untyped_storage().data_ptr() for t in tensors} < places
    assert out.untyped_storage().data_ptr() not in places


# Raw operators


def test_operators_check_all_their_tensors() -> None:
    tensors = inputs(requires_grad=False)
    out, tau, saved = ops.attention_forward(*tensors, *OPTIONS, ops.AS_NEEDED)
    good = dict(
        zip(
            ("grad_out", "query", "key", "value", "out", "tau", "saved"),
            (torch.ones_like(out), *tensors, out, tau, saved),
            strict=True,
        )
    )
    for name in ("grad_out", "out", "tau"):
        for change, error in (
            (lambda t: t[:1], ValueError),
            (lambda t: t[..., :1], ValueError),
            (lambda t: t.mT, ValueError),
            (lambda t: t.double(), TypeError),
            (lambda t: t.to("meta"), ValueError),
            (lambda t: t.to_sparse(), TypeError),
        ):
            with pytest.raises(error, match=rf"{name} must"):
                ops.attention_backward(*{**good, name: change(good[name])}.values(), *OPTIONS)
    for change, error in (
        (lambda t: t[:-1], ValueError),
        (lambda t: t[:0], ValueError),
        (lambda t: t.view(1, -1), ValueError),
        (lambda t: t.float(), TypeError),
        (lambda t: t.to("meta"), ValueError),
    ):
        with pytest.raises(error, match="saved must"):
            ops.attention_backward(*{**good, "saved": change(saved)}.values(), *OPTIONS)
    with pytest.raises(ValueError, match="saved_bytes must be at least"):
        ops.attention_forward(*tensors, *OPTIONS, 100)
    y = ops.entmax_forward(tensors[0], 1.5, 1, "", False)
    for grad_y, error in (
        (y[:1], ValueError),
        (y.double(), TypeError),
        (y.to("meta"), ValueError),
    ):
        with pytest.raises(error, match="grad_y must"):
            ops.entmax_backward(grad_y, y, 1.5, 1, "")
    with pytest.raises(IndexError, match="dim must"):
        ops.entmax_forward(tensors[0], 1.5, 4, "", False)


def test_what_is_saved_may_be_longer_than_need_be_and_lie_anywhere() -> None:
    tensors = inputs(requires_grad=False)
    out, tau, saved = ops.attention_forward(*tensors, *OPTIONS, ops.AS_NEEDED)
    grad_out = torch.randn_like(out)
    expected = ops.attention_backward(grad_out, *tensors, out, tau, saved, *OPTIONS)
    *_, longer = ops.attention_forward(*tensors, *OPTIONS, 1 << 16)
    assert longer.numel() == 1 << 16
    odd = torch.cat([saved.new_zeros(3), saved])[3:]
    apart = saved.repeat_interleave(2)[::2]
    for other in (longer, odd, apart):
        found = ops.attention_backward(grad_out, *tensors, out, tau, other, *OPTIONS)
        assert_equal(list(found), list(expected))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("length_k", [3, 70, 600])
@pytest.mark.parametrize("sharpness", [0.0, 1.0])
def test_the_bound_holds(
    dtype: torch.dtype, is_causal: bool, length_k: int, sharpness: float
) -> None:
    """Also where all keys of a row survive, which then has no list."""
    tensors = inputs(dtype=dtype, length_q=65, length_k=length_k, requires_grad=False)
    query = sharpness * tensors[0]
    options = (1.5, None, is_causal, True, "cpu")
    saved = ops.attention_forward(query, *tensors[1:], *options, ops.AS_NEEDED)[2]
    problem = attention_problem(
        Inputs(query, *tensors[1:]),
        alpha=1.5,
        scale=None,
        is_causal=is_causal,
        enable_gqa=True,
        needs_grad=True,
    )
    bound = dispatch.saved_bound(problem, "cpu")
    assert saved.numel() <= bound
    ops.attention_forward(query, *tensors[1:], *options, bound)


def test_a_bound_holds_for_every_alpha_that_a_graph_may_be_given(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A GPU's backends keep more for some."""
    monkeypatch.setattr(ops, "saved_bound", lambda problem, name: cuda.saved_bound(problem))
    tensors = inputs(dtype=torch.bfloat16, requires_grad=False)
    asked = {"scale": None, "is_causal": True, "enable_gqa": True, "needs_grad": True}
    shapes = dataclasses.replace(
        attention_problem(Inputs(*tensors), alpha=1.5, **asked), device=torch.device("cuda")
    )

    def least(alpha: float) -> int:
        return cuda.saved_bound(dataclasses.replace(shapes, alpha=alpha))

    assert ops._bound(shapes, Options(), None, 1.5) == least(1.5)
    most = ops._bound(shapes, Options(), torch.zeros(2, dtype=torch.float64), 1.5)
    assert most == max(map(least, (1.1, 1.25, 1.5, 1.9, 2.0, 2.5, 7.0))) > least(1.5)


FUZZ = """
import random, sys, torch
from adasplash2 import ops

generator = random.Random(int(sys.argv[1]))
torch.manual_seed(0)
for sharpness, causal in ((1.0, False), (1.0, True), (0.0, False)):
    query, key = torch.randn(1, 4, 70, 8) * sharpness, torch.randn(1, 2, 600, 8)
    options = (1.5, None, causal, True, "cpu")
    out, tau, saved = ops.attention_forward(query, key, key, *options, -1)
    ones, refused = torch.ones_like(out), 0
    for _ in range(150):
        changed = saved.clone()
        # Offsets and what else comes first are the most dangerous, and few.
        reach = generator.choice((560, 2248, saved.numel()))
        for _ in range(generator.choice((1, 3, 50))):
            at = generator.randrange(min(reach, saved.numel()))
            changed[at] ^= 1 << generator.randrange(8)
        try:
            ops.attention_backward(ones, query, key, key, out, tau, changed, *options)
        except ValueError as error:
            assert "saved must be what attention_forward" in str(error), error
            refused += 1
    assert 0 < refused < 150, refused
print("done")
"""


def test_changed_bits_of_what_is_saved_never_crash() -> None:
    """In a process of its own, with a new seed each time."""
    seed = str(random.SystemRandom().randrange(2**32))
    done = subprocess.run(
        [sys.executable, "-c", FUZZ, seed], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (0, "done\n"), f"seed {seed}: {done.stderr}"


@pytest.mark.parametrize(
    "change",
    ["begin", "offset", "length", "key below", "key above", "support", "flat", "last"],
)
def test_each_part_of_what_is_saved_is_checked(change: str) -> None:
    query, key = torch.randn(1, 1, 5, 8), torch.randn(1, 1, 6, 8)
    options = (1.5, None, True, False, "cpu")
    out, tau, saved = ops.attention_forward(query, key, key, *options, ops.AS_NEEDED)
    rows = 5
    offsets = saved[: 8 * (rows + 1)].view(torch.int64)
    entries = int(offsets[-1])
    support = saved[8 * (rows + 1) + 12 * rows + 4 * entries :][: 4 * rows].view(torch.int32)
    keys = saved[-4 * entries :].view(torch.int32)
    assert int(support.sum()) == entries
    assert int(keys[0]) == 0  # the first row sees one key
    if change == "begin":
        offsets[0] = -1
    elif change == "offset":
        offsets[2] += 1
    elif change == "length":
        offsets[-1] += 1
    elif change == "key below":
        keys[0] = -1
    elif change == "key above":
        keys[0] = 1  # a key there is, but not for this row
    elif change == "support":
        support[1] += 1
    elif change == "flat":
        support[-1] = -8
    else:
        offsets[-1] = 2**62
    with pytest.raises(ValueError, match="saved must be what attention_forward"):
        ops.attention_backward(torch.ones_like(out), query, key, key, out, tau, saved, *options)


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


@pytest.mark.parametrize("alpha", [1.0, 1.5])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_takes_masks_of_any_float(alpha: float, dtype: torch.dtype) -> None:
    """As SDPA does, and without loss."""
    tensors = [t.detach() for t in inputs()]
    mask = torch.randn(tensors[0].shape[2], tensors[1].shape[2])
    halves = torch.bfloat16, torch.float16
    with torch.autocast("cpu", dtype=dtype):
        for given in halves:
            rounded = mask.to(given).requires_grad_()
            out = adasplash2.entmax_attention(*tensors, rounded, alpha=alpha, enable_gqa=True)
            exact = rounded.detach().float()
            expected = adasplash2.entmax_attention(*tensors, exact, alpha=alpha, enable_gqa=True)
            assert_equal([out], [expected])
            (gradient,) = torch.autograd.grad(out.float().square().sum(), rounded)
            assert gradient.dtype == given
            assert gradient.any()
            adasplash2.attention_stats(*tensors, rounded, enable_gqa=True)


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


@pytest.mark.parametrize("alpha", [1.0, 1.5])
@pytest.mark.parametrize("heads_kv", [1, 2])
def test_heads_and_flags_may_be_symbols(heads_kv: int, alpha: float) -> None:
    """Equally many heads of queries and keys, and twice as many."""

    class Block(torch.nn.Module):
        def forward(self, query: Tensor, key: Tensor) -> Tensor:
            said = {"enable_gqa": query.shape[1] != key.shape[1], "is_causal": query.shape[2] > 1}
            return adasplash2.entmax_attention(query, key, key, alpha=alpha, **said)

    def tensors(heads: int) -> tuple[Tensor, Tensor]:
        return torch.randn(2, heads, 7, 8), torch.randn(2, heads * heads_kv // 2, 7, 8)

    torch._dynamo.reset()
    compiled = torch.compile(Block(), dynamic=True, fullgraph=True, backend="aot_eager")
    groups = torch.export.Dim("groups", min=2, max=9)
    shapes = {1: 2 * groups}, {1: heads_kv * groups}
    exported = torch.export.export(Block(), tensors(4), dynamic_shapes=shapes).module()
    for heads in (4, 6, 10):
        given = tensors(heads)
        expected = [Block()(*given)]
        assert_equal([exported(*given)], expected)
        assert_equal([compiled(*given)], expected)


def test_vmap_runs_each_slice() -> None:
    x = torch.randn(3, 4, 5)
    assert_equal([torch.func.vmap(adasplash2.entmax15)(x)], [adasplash2.entmax15(x)])


# Numbers of a graph


@pytest.mark.parametrize("count", range(2, len(NUMBERS) + 1))
def test_graphs_of_older_releases_are_read(count: int) -> None:
    """They have fewer numbers: options that came later are what the graph says beside them."""
    tensors = inputs(requires_grad=False)
    said = {"alpha": 1.25, "scale": math.nan, "softcap": 3.0}
    numbers = torch.tensor([said.get(name, 0.0) for name in NUMBERS], dtype=torch.float64)
    out, *rest = ops.attention_forward(*tensors, *OPTIONS, ops.AS_NEEDED, numbers[:count])
    softcap = 3.0 if "softcap" in NUMBERS[:count] else 0.0
    assert_equal([out], [attend(*tensors, alpha=1.25, softcap=softcap)])
    arguments = torch.ones_like(out), *tensors, out, *rest, *OPTIONS
    numbered = ops.attention_backward(*arguments, numbers[:count])
    later = {"softcap": softcap} if softcap else {}
    plain = ops.attention_backward(*arguments[:7], 1.25, *OPTIONS[1:], **later)
    assert_equal(list(numbered), list(plain))


@pytest.mark.parametrize("shape", [(1,), (len(NUMBERS) + 1,), (1, 2), (2, 2), ()])
def test_numbers_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    numbers = torch.ones(shape, dtype=torch.float64)
    with pytest.raises(ValueError, match="numbers must have the shape"):
        ops.attention_forward(*inputs(requires_grad=False), *OPTIONS, ops.AS_NEEDED, numbers)


def test_every_float_of_the_options_is_one_of_the_numbers() -> None:
    """Else a compiler makes a constant of it, and compiles anew for each."""
    schema = str(ops.attention_forward._schema)
    assert [name for name in Options._fields if f" {name}" in schema] == list(Options._fields)
    scalars = re.findall(r"Scalar\??? (\w+)", schema)
    assert scalars == list(NUMBERS)
    assert frozenset(re.findall(r"Scalar\? (\w+)", schema)) == MAY_BE_NONE


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


def test_compiled_softmax_warns_of_nothing(recwarn: pytest.WarningsRecorder) -> None:
    query = torch.randn(1, 2, 8, 4)
    compiled = torch.compile(
        lambda q, alpha: adasplash2.entmax_attention(q, q, q, alpha=alpha), backend="aot_eager"
    )
    compiled(query, 1.0)
    assert not [w for w in recwarn if "lru_cache" in str(w.message)]
