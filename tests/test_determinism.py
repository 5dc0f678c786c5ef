"""The same bits for any number of threads and at every run; every instruction set is right."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from cases import BFLOAT16, FLOAT32, FLOAT64, Case, device_of, usable_backends
from torch import Tensor

import adasplash2
from adasplash2 import _core

CASES = [
    Case("causal", length_q=600, length_k=600, is_causal=True, heads_q=3, head_dim=64),
    Case("gqa", length_q=300, length_k=500, heads_q=6, heads_kv=2, batch=2),
    Case("flat", length_q=300, length_k=1500, sharpness=0.01),
    Case("mixed", length_q=1300, length_k=1300, data="mixed", is_causal=True, heads_q=1),
    Case("sink", length_q=1500, length_k=1500, data="sink", is_causal=True, heads_q=1),
    Case("alpha1.25-bfloat16", length_q=200, length_k=300, alpha=1.25, dtype=BFLOAT16),
    Case("alpha2-float64", length_q=200, length_k=300, alpha=2.0, dtype=FLOAT64),
]
X86 = platform.machine() == "x86_64"
ROWS = [(alpha, dtype) for alpha in (1.5, 2.0, 1.25) for dtype in (FLOAT32, BFLOAT16)]


@pytest.fixture(autouse=True)
def _restore_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def attention(case: Case, backend: str) -> tuple[Tensor, ...]:
    inputs = case.inputs(device_of(backend))
    leaves = [t.detach().requires_grad_() for t in inputs[:3]]
    options = {**case.options, "enable_gqa": case.heads_kv is not None, "backend": backend}
    try:
        out = adasplash2.entmax_attention(*leaves, **options)
    except adasplash2.BackendRefused as refused:
        if backend == "cpu":
            raise
        pytest.skip(str(refused))
    gradients = torch.autograd.grad(out, leaves, inputs.grad_out)
    stats = adasplash2.attention_stats(*inputs[:3], **options)
    return (out, *gradients, stats.tau, stats.support, stats.iterations, stats.empty_tiles)


def assert_same_bits(got: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    for one, other in zip(got, expected, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_attention_for_any_number_of_threads(case: Case) -> None:
    torch.set_num_threads(1)
    expected = attention(case, "cpu")
    for threads in (2, 3, 5):
        torch.set_num_threads(threads)
        assert_same_bits(attention(case, "cpu"), expected)


@pytest.mark.parametrize("options", [{}, {"dropout_p": 0.1}, {"attn_mask": True}], ids=str)
@pytest.mark.parametrize("sharpness", [0.25, 0.02], ids=["lists", "flat"])
def test_heads_whose_gradients_are_made_in_turn(
    sharpness: float, options: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is held for the gradients of all these heads, 24 MiB, is more than is held at a time."""
    turns = []
    backward = _core.attention_backward
    monkeypatch.setattr(
        _core, "attention_backward", lambda *asked, **more: turns.append(backward(*asked, **more))
    )
    generator = torch.Generator().manual_seed(0)
    query = sharpness * torch.randn(1, 12, 1024, 64, generator=generator)
    key = torch.randn(1, 6, 1024, 64, generator=generator)
    value, grad_out = (torch.randn(1, n, 1024, 48, generator=generator) for n in (6, 12))
    leaves = [t.requires_grad_() for t in (query, key, value)]
    if "attn_mask" in options:
        options = {"attn_mask": torch.zeros(1024, 1024, requires_grad=True)}
        leaves.append(options["attn_mask"])

    def gradients(of: slice, keys: slice) -> tuple[Tensor, ...]:
        torch.manual_seed(0)
        out = adasplash2.entmax_attention(
            query[:, of], key[:, keys], value[:, keys], enable_gqa=True, backend="cpu", **options
        )
        return torch.autograd.grad(out, leaves, grad_out[:, of])

    torch.set_num_threads(1)
    expected = gradients(slice(None), slice(None))
    for threads in (2, 5):
        torch.set_num_threads(threads)
        assert_same_bits(gradients(slice(None), slice(None)), expected)
    assert len(turns) == 3
    assert min(turns[:2]) > 1  # more threads may ask for more heads at a time
    if "dropout_p" in options:  # heads alone drop others
        return
    alone = [gradients(slice(2 * i, 2 * i + 2), slice(i, i + 1)) for i in range(6)]
    assert turns[3:] == [1] * 6
    for found, together in zip(map(sum, zip(*alone, strict=True)), expected, strict=True):
        torch.testing.assert_close(found, together, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("backend", usable_backends())
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_attention_at_every_run(case: Case, backend: str) -> None:
    expected = attention(case, backend)
    for _ in range(3):
        assert_same_bits(attention(case, backend), expected)


@pytest.mark.parametrize(("alpha", "dtype"), ROWS)
def test_rows_for_any_number_of_threads(alpha: float, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(500, 333, generator=generator).to(dtype)
    results = []
    for threads in (1, 2, 3, 5):
        torch.set_num_threads(threads)
        leaf = x.clone().requires_grad_()
        y = adasplash2.entmax(leaf, alpha, backend="cpu")
        results.append((y, *torch.autograd.grad(y, leaf, x)))
    for result in results[1:]:
        assert_same_bits(result, results[0])


# Instruction sets are chosen once a process: each one runs the CPU's tests of agreement in its own.

PYTEST = (
    *(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=line"),
    *("--only-backend", "cpu"),
)

TABLE = " or ".join(
    (
        "grid-float32",
        "grid-float64-alpha1.5",
        "grid-bfloat16-alpha1.5",
        "grid-float16-alpha1.5",
        "lengths-257x129",
        "head_dim-3-",
        "head_dim-17-",
        "head_dim-256-",
        "layout-sliced",
        "flat",
        "local",
        "nan_query",
        "minus_infinity",
    )
)

# All options, alone and together: of their rows some are flat, and some have lists.
OPTIONS = "test_attention_and_gradients and float64-mixed-cpu"


@pytest.mark.parametrize("isa", _core.usable_isas())
def test_every_instruction_set_agrees_with_the_reference(isa: str) -> None:
    tests = Path(__file__).parent
    command = [
        *PYTEST,
        *("-k", f"test_agrees_with_the_reference and ({TABLE}) or {OPTIONS}"),
        str(tests / "test_attention.py"),
        str(tests / "test_language.py"),
    ]
    environment = {**os.environ, "ADASPLASH2_ISA": isa, "ADASPLASH2_BACKEND": ""}
    probe = "from adasplash2 import _core; print(_core.isa())"
    done = subprocess.run(
        [sys.executable, "-c", probe], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == isa
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:]
    assert " passed" in done.stdout


@pytest.mark.parametrize("isa", _core.usable_isas())
def test_every_instruction_set_maps_rows(isa: str) -> None:
    done = subprocess.run(
        [
            *PYTEST,
            *("-k", "test_agrees_with_the_reference or test_special_entries"),
            str(Path(__file__).parent / "test_entmax.py"),
        ],
        env={**os.environ, "ADASPLASH2_ISA": isa, "ADASPLASH2_BACKEND": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:]
    assert " passed" in done.stdout


def test_baseline_is_always_there() -> None:
    """The fastest first. What this machine has, torch knows by code of its own."""
    expected = {"AVX512": ["avx512", "avx2"], "AVX2": ["avx2"]} if X86 else {}
    capability = torch.backends.cpu.get_cpu_capability()
    assert _core.usable_isas() == [*expected.get(capability, []), "baseline"]


def test_unknown_instruction_set_is_refused() -> None:
    program = "import adasplash2, torch; adasplash2.entmax15(torch.zeros(3))"
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "ADASPLASH2_ISA": "mmx"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode != 0
    assert "ADASPLASH2_ISA must be one of" in done.stderr
    assert "'mmx'" in done.stderr
