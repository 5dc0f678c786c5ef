"""The functions of the package adasplash, as its own tests call them, against dense float64."""

from __future__ import annotations

import doctest
import inspect
import math
from collections.abc import Callable, Iterator
from typing import Any

import language
import pytest
import reference
import torch
from cases import device_of, interpreted, usable_backends
from torch import Tensor

import adasplash2
from adasplash2 import compat, dispatch

ATTENTION = ("adasplash", "adasplash_v1", "adasplash_v2", "adasplash_no_block_mask")
OUT, GRADIENT = 1e-5, 1e-4
"""Relative errors (norms over whole tensors) in float32."""

SIGNATURES = {
    "adasplash": "q, k, v, alpha=1.5, is_causal=True, varlen=None, niter=None",
    "adasplash2": "q, k, v, niter=1, varlen=None",
    "adasplash_v1": "q, k, v, alpha=1.5, is_causal=False, varlen=None, niter=10",
    "adasplash_v2": "q, k, v, niter=1, varlen=None",
    "adasplash_no_block_mask": "q, k, v, alpha=1.5, is_causal=False, varlen=None, niter=10",
    "triton_entmax": "x, alpha=1.5, n_iter=2, use_histogram=True, fast_math=False",
    "triton_entmax_v1": "x, alpha=1.5, n_iter=10, fast_math=True",
    "triton_entmax_v2": "x, alpha=1.5, n_iter=2, use_histogram=True, fast_math=False",
    "triton_sparsemax": "x, *, n_iter=2, use_histogram=True, fast_math=False",
    "triton_entmax15": "x, *, n_iter=2, use_histogram=True, fast_math=False",
}
"""Those of adasplash 0.2.2, whose ``**kwargs`` of the last two are spelled out."""


@pytest.fixture(params=usable_backends())
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A backend that all calls go to."""
    monkeypatch.setattr(dispatch, "FORCED", request.param)
    dispatch.forget()
    yield request.param
    dispatch.forget()


def run(call: Callable[..., Tensor], *args: Any, backend: str, **said: Any) -> Tensor:
    """Skips where a GPU's backend refuses; the CPU must run everything."""
    try:
        return call(*args, **said)
    except adasplash2.BackendRefused as refused:
        if backend == "cpu":
            raise
        pytest.skip(str(refused))


def assert_near(got: Tensor, exact: Tensor, limit: float) -> None:
    assert reference.error(got.detach().cpu(), exact) <= limit * reference.norm(exact)


def test_names_arguments_and_defaults_are_theirs() -> None:
    assert set(compat.__all__) == set(SIGNATURES)
    for name, expected in SIGNATURES.items():
        parameters = inspect.signature(getattr(compat, name)).parameters.values()
        assert str(inspect.Signature([p.replace(annotation=p.empty) for p in parameters])) == (
            f"({expected})"
        )
        assert getattr(compat, name).__doc__


def test_examples_are_true() -> None:
    found = doctest.testmod(compat)
    assert found.attempted > 10
    assert found.failed == 0


def said_by(name: str, is_causal: bool, alpha: float) -> dict[str, Any]:
    """Arguments with which a function attends so; some have no choice."""
    if name == "adasplash_v2":
        if not is_causal or alpha != 1.5:
            pytest.skip("is causal, with alpha 1.5")
        return {}
    return {"is_causal": is_causal, "alpha": alpha}


@interpreted(name="adasplash_v1", varlen=((90, 33),), alpha=1.5)
@pytest.mark.parametrize("name", ATTENTION)
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("alpha", [1.333, 1.5, 2.0])
@pytest.mark.parametrize("varlen", [None, (90, 33), (1, 0)], ids=str)
def test_attention_and_gradients(
    name: str, is_causal: bool, alpha: float, varlen: tuple[int, ...] | None, backend: str
) -> None:
    said = said_by(name, is_causal, alpha)
    device = device_of(backend)
    q, k, v = (
        torch.randn(2, heads, 90, 16, device=device, requires_grad=True) for heads in (4, 2, 2)
    )
    lengths = None if varlen is None else torch.tensor(varlen, device=device)
    out = run(getattr(compat, name), q, k, v, varlen=lengths, backend=backend, **said)
    grad = torch.randn_like(out)
    gradients = torch.autograd.grad(out, (q, k, v), grad)
    leaves = [t.detach().cpu().double().requires_grad_() for t in (q, k, v)]
    exact, _ = language.attention(
        *leaves, alpha=alpha, is_causal=is_causal, q_lengths=lengths, kv_lengths=lengths
    )
    assert_near(out, exact.detach(), OUT)
    exact_gradients = torch.autograd.grad(exact, leaves, grad.cpu().double())
    for got, one in zip(gradients, exact_gradients, strict=True):
        assert_near(got, one, GRADIENT)
    for i, length in enumerate(varlen or ()):
        assert all(not t[i, :, length:].any() for t in (out, *gradients))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_dtypes(dtype: torch.dtype, backend: str) -> None:
    q, k, v = (torch.randn(1, 2, 64, 32, dtype=dtype, device=device_of(backend)) for _ in "qkv")
    out = run(compat.adasplash, q, k, v, backend=backend)
    exact, _ = language.attention(*(t.cpu().double() for t in (q, k, v)), is_causal=True)
    assert out.dtype == dtype
    assert_near(out, exact, 1e-2 if dtype.itemsize == 2 else OUT)


def test_large_scores_stay_finite(backend: str) -> None:
    q, k, v = (100 * torch.randn(2, 2, 128, 64, device=device_of(backend)) for _ in "qkv")
    assert run(compat.adasplash, q, k, v, backend=backend).isfinite().all()


def test_equal_scores_give_the_mean(backend: str) -> None:
    q = torch.zeros(1, 1, 64, 16, device=device_of(backend))
    v = torch.randn_like(q)
    out = run(compat.adasplash_v1, q, q, v, backend=backend)
    torch.testing.assert_close(out, v.mean(2, keepdim=True).expand_as(v))


@interpreted(shape=((3, 5),))
@pytest.mark.parametrize("shape", [(7,), (3, 5), (2, 3, 4, 33)])
@pytest.mark.parametrize(
    ("call", "alpha"),
    [
        (compat.triton_entmax, 1.5),
        (lambda x: compat.triton_entmax(x, 1.333, 10, False, True), 1.333),
        (lambda x: compat.triton_entmax_v1(x, alpha=2.0, n_iter=10, fast_math=False), 2.0),
        (compat.triton_entmax_v2, 1.5),
        (lambda x: compat.triton_sparsemax(x, n_iter=4), 2.0),
        (lambda x: compat.triton_entmax15(x, use_histogram=False), 1.5),
    ],
)
def test_entmax(
    call: Callable[..., Tensor], alpha: float, shape: tuple[int, ...], backend: str
) -> None:
    x = torch.randn(shape, device=device_of(backend), requires_grad=True)
    y = run(call, x, backend=backend)
    grad = torch.randn_like(y)
    (grad_x,) = torch.autograd.grad(y, x, grad)
    exact = reference.entmax(x.detach().cpu().double(), alpha)
    assert_near(y, exact, OUT)
    assert_near(grad_x, reference.entmax_gradient(exact, grad.cpu().double(), alpha), GRADIENT)


Q = torch.randn(2, 2, 8, 4)
WRONG = "^varlen must be from 0 to 8, got"


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: compat.adasplash_v2(Q, Q, Q, torch.tensor([3, 4])), TypeError, "niter must be of"),
        (lambda: compat.adasplash(Q, Q, Q, niter=-1), ValueError, "niter must be at least 0"),
        (lambda: compat.adasplash(Q, Q, Q, varlen=[3, 4]), TypeError, "varlen must be a torch"),
        (lambda: compat.adasplash(Q, Q, Q, varlen=Q[0, 0, 0]), TypeError, "varlen must have the d"),
        (lambda: compat.adasplash(Q, Q, Q, varlen=torch.tensor([3])), ValueError, "varlen must h"),
        (lambda: compat.adasplash(Q, Q, Q, varlen=torch.tensor([3, 9])), ValueError, f"{WRONG} 9"),
        (
            lambda: compat.adasplash(Q, Q, Q, varlen=torch.tensor([-1, 8])),
            ValueError,
            f"{WRONG} -1",
        ),
        (
            lambda: compat.adasplash(Q, Q, Q, varlen=torch.tensor([2**32 + 3, 8])),
            ValueError,
            f"{WRONG} {2**32 + 3}",
        ),
        (lambda: compat.adasplash(Q, Q[:, :, :5], Q[:, :, :5]), ValueError, "the length of q"),
        (lambda: compat.adasplash(Q[0], Q[0], Q[0]), ValueError, "q must have 4 dimensions"),
        (lambda: compat.adasplash(Q, Q, Q, alpha=0.5), ValueError, "alpha must be"),
        (lambda: compat.adasplash(None, Q, Q), TypeError, "q must be a torch.Tensor"),
        (lambda: compat.triton_entmax(Q, n_iter=math.pi), TypeError, "n_iter must be of"),
        (lambda: compat.triton_entmax(Q, use_histogram=3), TypeError, "use_histogram must be"),
        (lambda: compat.triton_entmax_v1(Q, fast_math=None), TypeError, "fast_math must be"),
        (lambda: compat.triton_sparsemax(Q, alpha=1.5), TypeError, "alpha"),
    ],
)
def test_what_cannot_be_meant_is_refused(
    call: Callable[[], Tensor], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        call()
