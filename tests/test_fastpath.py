"""Without a private name of torch, calls take the public way and give the same."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest
import torch

import adasplash2
from adasplash2 import functional, ops, torch_fastpath

SOURCE = Path(torch_fastpath.__file__)
NAMES = sorted(set(re.findall(r'private\("([\w.]+)"\)', SOURCE.read_text())))


def without(name: str) -> ModuleType:
    """The module as it would be had torch lost ``name``."""
    parent, _, last = name.rpartition(".")
    spec = importlib.util.spec_from_file_location("fastpath_without", SOURCE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.delattr(torch_fastpath.private(parent) if parent else torch, last)
        spec.loader.exec_module(module)
    return module


def outcome(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    leaf = x.clone().requires_grad_()
    out = adasplash2.entmax_attention(leaf, leaf, leaf, is_causal=True)
    stats = adasplash2.attention_stats(x, x, x, is_causal=True)
    with torch.autocast("cpu", torch.bfloat16):
        cast = adasplash2.entmax_attention(x, x, x)
    y = adasplash2.entmax(leaf)
    gradients = torch.autograd.grad(out.sum() + (y * y).sum(), leaf)
    mapped = torch.func.vmap(lambda one: adasplash2.entmax_attention(one, one, one))(x[None])
    return out.detach(), stats.tau, cast, y.detach(), *gradients, mapped


def test_every_private_name_is_found() -> None:
    """Else this torch has lost it, and calls are slower than they need be."""
    assert len(NAMES) >= 8
    assert [name for name in NAMES if torch_fastpath.private(name) is None] == []
    assert torch_fastpath.is_plain(torch.ones(2))


@pytest.mark.parametrize("name", NAMES)
def test_calls_work_without(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(1, 2, 9, 4)
    expected = outcome(x)
    module = without(name)
    concerned = 0
    for user in (ops, functional):
        for function in vars(torch_fastpath):
            if getattr(user, function, None) is getattr(torch_fastpath, function) and callable(
                getattr(module, function, None)
            ):
                monkeypatch.setattr(user, function, getattr(module, function))
                concerned += 1
    assert concerned > 8
    for got, one in zip(outcome(x), expected, strict=True):
        assert torch.equal(got, one)


def test_a_lost_name_makes_no_call_plain() -> None:
    assert not without("_C._dispatch_keys").is_plain(torch.ones(2))
