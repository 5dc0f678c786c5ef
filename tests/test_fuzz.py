"""Random problems against the float64 reference: see ``fuzz.py``.

Each run has a seed of its own unless it is given one, as ``make test`` does; it is printed at the
end, also where all is well. Beside them, problems that were made for what they reach, held to the
same bounds.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import fuzz
import fuzz_language
import language
import pytest
import reference
import torch
from cases import FLOAT16, FLOAT32, Case, device_of, interpreted, usable_backends
from fuzz_tools import Draw

import adasplash2
from adasplash2.backends import triton
from adasplash2.backends.triton.sizes import INTERPRETED, Saved
from adasplash2.options import Said
from adasplash2.problem import Inputs, attention_problem

on_every_backend = pytest.mark.parametrize("backend", usable_backends())
on_triton = pytest.mark.parametrize(
    "backend", [name for name in usable_backends() if name == "triton"]
)


@interpreted()
@on_every_backend
@pytest.mark.parametrize("kind", fuzz.KINDS)
def test_random_problems(kind: str, backend: str, fuzz_seed: int) -> None:
    """In the interpreter, where one takes seconds, a few that are small; on a GPU, where nearly
    each compiles kernels of its own, as many as a minute allows."""
    count, largest = (10, 40) if INTERPRETED else (300, fuzz.LARGEST)
    if kind == "language":
        count, largest = (10, 20) if INTERPRETED else (300, 100)
    report = fuzz.run(
        fuzz_seed,
        range(count),
        backend,
        kind=kind,
        largest=largest,
        seconds=60.0 if device_of(backend) == "cuda" else math.inf,
        say=lambda line: None,
    )
    assert not report.failed, "\n".join(report.lines)
    assert backend != "cpu" or not report.counts["refused"]
    total = report.counts.total()
    judged = total - report.counts["refused"]
    # Of ten, chance refuses half in one run of seven; `cuda` computes little of the language.
    if kind == "plain" or backend != "cuda":
        assert judged > total // (5 if total < 50 else 2), report.counts


WRONG: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "a window's left end": ("window", lambda window: (window[0] + (window[0] >= 0), window[1])),
    "a window's right end": ("window", lambda window: (window[0], window[1] + (window[1] >= 0))),
    "the diagonal": ("causal_align", lambda align: "top-left"),
    "a sequence's first key": ("kv_starts", lambda starts: starts + 1),
    "a sequence's last key": ("kv_lengths", lambda lengths: (lengths - 1).clamp(min=0)),
    "a slope's sign": ("alibi_slopes", lambda slopes: -slopes),
    "a sink": ("sinks", lambda sinks: sinks - math.inf),
    "a head's sink": ("sinks", lambda sinks: sinks.roll(1)),
    "a mask's row": ("attn_mask", lambda mask: mask.roll(1, -2) if mask.dim() > 1 else mask),
}


@pytest.mark.parametrize("what", WRONG)
def test_random_problems_show_what_is_wrong(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bounds leave no room for the least that may be wrong: with a reference that is, problems
    fail."""
    name, change = WRONG[what]
    place = "scores" if name in ("alibi_slopes", "sinks", "attn_mask") else "seen"
    right = getattr(language, place)

    def wrong(*args: Any, **said: Any) -> Any:
        if said.get(name) is not None:
            said[name] = change(said[name])
        return right(*args, **said)

    monkeypatch.setattr(language, place, wrong)
    for number in range(200):
        problem = fuzz_language.draw_problem(Draw(1, number), 60)
        if name in problem.said and fuzz_language.check_problem(problem, "cpu").failures:
            return
    raise AssertionError("200 problems are right by a reference that is wrong")


@interpreted()
@on_every_backend
@pytest.mark.parametrize("alpha", [1.25, 1.5, 1.75, 2.0, 3.0])
def test_thresholds_of_rows_are_exact_to_round_off(alpha: float, backend: str) -> None:
    """Rows of few keys, whose probabilities show an error of the threshold."""
    x = torch.randn(40, 12, generator=torch.Generator().manual_seed(3))
    verdict = fuzz.check_rows(fuzz.Rows(x, torch.ones_like(x), alpha, -1), backend)
    assert not verdict.failures


def near_the_edge(alpha: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries and keys of one dimension. At alpha 1.25 and 1.75 any; else a key that outscores the
    others by what makes them just enter the support, where a threshold that stops short shows."""
    generator = torch.Generator().manual_seed(4)
    shape = (1, 4, 64, 1)
    if alpha in (1.25, 1.75):
        query, key = (torch.randn(shape, generator=generator) for _ in range(2))
        return (16.0 * query).round() / 16.0, (16.0 * key).round() / 16.0

    def scattered(size: float, decades: float, negative: float) -> torch.Tensor:
        exponent = -decades * torch.rand(shape, generator=generator)
        sign = torch.where(torch.rand(shape, generator=generator) < negative, -1.0, 1.0)
        return size * sign * 10.0**exponent

    if alpha == 1.5:
        off, key = scattered(1e-2, 1.0, 0.3), scattered(1e-2, 1.0, 0.5)
    else:
        off, key = scattered(1e-3, 3.0, 0.5), scattered(1e-4, 2.0, 0.5)[:, :, :4]
    key[:, :, 0] = 1.0
    return (1.0 + off) / (alpha - 1.0), key


@interpreted()
@on_every_backend
@pytest.mark.parametrize("alpha", [1.25, 1.5, 1.75, 2.0, 3.0])
def test_thresholds_of_attention_are_exact_to_round_off(alpha: float, backend: str) -> None:
    query, key = (t.to(device_of(backend)) for t in near_the_edge(alpha))
    options = {"alpha": alpha, "scale": 1.0}
    tau = adasplash2.attention_stats(query, key, key, **options, backend=backend).tau.double()
    exact = reference.attention(query, key, key, **options).tau
    error = (tau - exact).abs() / exact.abs().clamp(min=1.0)
    # Above alpha = 2 the rounding of a score moves the threshold by more than itself.
    assert error.max() <= (10.0 if alpha > 2.0 else 2.0) * torch.finfo(FLOAT32).eps


@interpreted()
@on_every_backend
def test_small_probabilities_of_float16_are_kept(backend: str) -> None:
    """A key with nearly all of the mass and a value of zero: the others, of about 2e-8, are the
    output. Rounded to float16 as they are they would be zero."""
    generator = torch.Generator().manual_seed(5)
    query, key = torch.ones(1, 1, 16, 1), 1e-5 * torch.randn(1, 1, 6, 1, generator=generator)
    key[:, :, 0] = 1.0
    value = 1e4 * (1.0 + torch.rand(1, 1, 6, 4, generator=generator))
    value[:, :, 0] = 0.0
    tensors = [t.to(FLOAT16) for t in (query, key, value, torch.ones(1, 1, 16, 4))]
    case = fuzz.Attention(*tensors, alpha=1.5, scale=1.9997, is_causal=False)
    assert not fuzz.check_attention(case, backend).failures


@interpreted()
@on_triton
@pytest.mark.parametrize(("dtype", "round_offs"), [(FLOAT32, 2.0), (FLOAT16, 32.0)])
def test_a_last_step_at_one_and_a_half_is_small(
    dtype: torch.dtype, round_offs: float, backend: str
) -> None:
    """One key with nearly all of the mass, one with a share and thirty at the edge, which leave the
    support during a step that takes them for kept: what that errs by is what the tolerance says."""
    key = 1e-6 * torch.arange(32.0).expand(1, 8, 32)
    shares = 2.0 ** -torch.arange(7.0, 15.0)
    key = torch.stack([torch.ones(1, 8), shares.sqrt()[None], *key.unbind(2)[2:]], dim=2)
    key = key.unsqueeze(3).to(device_of(backend), dtype)
    query = torch.full_like(key[:, :, :1], 2.0)
    tau = adasplash2.attention_stats(query, key, key, scale=1.0, backend=backend).tau.double()
    exact = reference.attention(query, key, key, scale=1.0).tau
    assert (tau - exact).abs().max() <= round_offs * torch.finfo(FLOAT32).eps


@interpreted()
@on_triton
@pytest.mark.parametrize("alpha", [2.1, 2.5])
def test_thresholds_of_steep_rows_are_exact_to_round_off(alpha: float, backend: str) -> None:
    x = torch.randn(24, 12, generator=torch.Generator().manual_seed(3))
    y = adasplash2.entmax(x.to(device_of(backend)), alpha, backend=backend).cpu()
    assert (y - reference.entmax(x.double(), alpha)).abs().max() <= 3.0 * torch.finfo(FLOAT32).eps


@interpreted()
@on_triton
@pytest.mark.parametrize(("length_k", "sharpness"), [(2048, 2.0), (512, 8.0)])
def test_lists_hold_the_tiles_with_support_alone(
    length_k: int, sharpness: float, backend: str
) -> None:
    """Whatever more they held would cost time alone: no result shows it."""
    case = Case("lists", length_q=1, length_k=length_k, heads_q=8, sharpness=sharpness)
    inputs = case.inputs(device_of(backend))
    tensors = Inputs(*inputs[:3])
    problem = attention_problem(tensors, **case.options, enable_gqa=False, needs_grad=True)
    config = triton.configs(problem)[0]
    saved = triton.forward(problem, tensors, config).saved
    counts = Saved(problem, config).pieces.tensors(saved)["counts"]
    listed = counts[: 2 * case.heads_q].view(-1, 2)[:, 1].cpu()

    p = reference.attention(*inputs[:3], **case.options).probabilities
    tiles = p.flatten().view(case.heads_q, -1, int(config["block_k"]))
    live = (tiles > 0.0).any(dim=2).sum(dim=1).cpu()
    assert 0 < live.sum() < tiles.shape[0] * tiles.shape[1] // 2
    assert (listed >= live).all()
    assert listed.sum() <= live.sum() + 1  # a key that round-off puts on either side


@interpreted()
@on_triton
def test_steps_above_two_are_forced_to_bisect(backend: str) -> None:
    """Rows on which steps that stay in the bracket creep: 30 where none is a bisection, else 19; by
    an H100's powers 33 and 26."""
    rows = [
        [
            -0.17238742113113403,
            -0.17393770813941956,
            0.0,
            -0.17393773794174194,
            -0.1739395558834076,
            -0.1739393174648285,
            -0.17393870651721954,
            -0.1739386022090912,
        ],
        [
            -0.19926267862319946,
            -0.19918374717235565,
            0.0,
            -0.19916868209838867,
            -0.19926276803016663,
            -0.19926300644874573,
            -0.19926272332668304,
            -0.19926276803016663,
        ],
    ]
    key = torch.tensor(rows, device=device_of(backend)).view(1, 2, -1, 1)
    query = torch.ones_like(key[:, :, :1])
    stats = adasplash2.attention_stats(query, key, key, alpha=4.0, scale=1.0, backend=backend)
    assert stats.iterations.max() <= (28 if key.is_cuda else 23)


def test_every_option_is_asked_and_drawn() -> None:
    """A new one has a call in the table and chances in the random problems; those that are left
    out, every call has."""
    asked = set(Said._fields) - {"enable_gqa", "backend"}
    table = {name for call in language.CALLS for name in call.said()}
    assert table >= asked
    drawn: set[str] = set()
    for number in range(200):
        drawn |= fuzz_language.draw_problem(Draw(1, number), 20).said.keys()
    assert drawn >= asked
