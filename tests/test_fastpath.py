"""Without a private name of torch, calls take the public way and give the same."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch.autograd import forward_ad

import adasplash2
from adasplash2 import dense, functional, lowering, ops, options, problem, torch_fastpath
from adasplash2.integrations.transformers import masks

SOURCE = Path(torch_fastpath.__file__)
NAMES = sorted(set(re.findall(r'private\("([\w.]+)"\)', SOURCE.read_text())))


STREAM = "_C._cuda_getCurrentRawStream"
USERS = [dense, functional, lowering, masks, ops, options, problem]


def without(name: str) -> ModuleType:
    """The module as it would be had torch lost ``name``."""
    parent, _, last = name.rpartition(".")
    spec = importlib.util.spec_from_file_location("fastpath_without", SOURCE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.delattr(torch_fastpath.private(parent) if parent else torch, last, raising=False)
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
    # Not around torch's dispatcher.
    options = 1.5, None, True, False, ""
    told, *_ = ops.attention_forward(leaf, leaf, leaf, *options, 0)
    rows = ops.entmax_forward(leaf, 1.5, -1, "", True)
    beneath = torch.autograd.grad(told.sum() + (rows * rows).sum(), leaf)
    with torch.no_grad():
        unseen = ops.attention_forward(leaf, leaf, leaf, *options, 0)[0]
    return out.detach(), stats.tau, cast, y.detach(), *gradients, mapped, *beneath, unseen


def test_every_private_name_is_found() -> None:
    """Else this torch has lost it, and calls are slower than they need be."""
    assert len(NAMES) >= 8
    missing = [name for name in NAMES if torch_fastpath.private(name) is None]
    assert missing == ([] if torch.backends.cuda.is_built() else [STREAM])
    assert torch_fastpath.is_plain(torch.ones(2))


@pytest.mark.parametrize("name", NAMES)
def test_calls_work_without(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(1, 2, 9, 4)
    expected = outcome(x)
    module = without(name)
    concerned = 0
    for user in USERS:
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


def test_a_stream_is_asked_for_in_public_without(monkeypatch: pytest.MonkeyPatch) -> None:
    class Stream:
        cuda_stream = 7

    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream())
    assert without(STREAM).raw_stream(0) == 7


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_graphs_without_a_length_that_data_tells(
    monkeypatch: pytest.MonkeyPatch, compiler: str
) -> None:
    """Neither the error's name nor detect_fake_mode."""
    x = torch.randn(1, 2, 9, 4, requires_grad=True)
    expected = adasplash2.entmax_attention(x, x, x)
    name = "_subclasses.fake_tensor.DynamicOutputShapeException"
    monkeypatch.setattr(ops, "new_dynamic_size", without(name).new_dynamic_size)
    name = "_guards.detect_fake_mode"
    monkeypatch.setattr(ops, "is_without_data", without(name).is_without_data)
    compiled = torch.compile(adasplash2.entmax_attention, backend=compiler, fullgraph=True)
    out = compiled(x, x, x)
    assert torch.equal(out, expected)
    for found, one in zip(*(torch.autograd.grad(o.sum(), x) for o in (out, expected)), strict=True):
        assert torch.equal(found, one)


def test_an_operator_in_forward_mode_is_refused_without() -> None:
    module = without("autograd.forward_ad._set_fwd_grad_enabled")
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match="jvp"):
        torch.func.vmap(lambda x: module.beneath(torch.sin, x))(torch.ones(2))


PRIVATE = re.compile(r"\btorch(\.\w+)*\._[a-zA-Z]|\b_C\.|from torch(\.\w+)*\._|\._version\b")


def test_what_is_private_stands_in_one_file() -> None:
    root = SOURCE.parent.parent.parent
    files = [*(root / "python").rglob("*.py"), *(root / "backends").rglob("*.py")]
    assert len(files) > 40
    found = [
        f"{path.relative_to(root)}: {line.strip()}"
        for path in files
        if path != SOURCE
        for line in path.read_text().splitlines()
        if PRIVATE.search(re.sub(r"torch\._dynamo\.(reset|config)", "", line))  # told to users
    ]
    assert found == []
    assert PRIVATE.search("torch.utils._pytree")
    assert PRIVATE.search("from torch._guards import x")
