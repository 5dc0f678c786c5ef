"""Kinds of problems: what is decided for one holds for all of its kind, whatever their sizes."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Iterable
from typing import Any

import pytest
import torch

import adasplash2
from adasplash2 import dispatch
from adasplash2 import problem as problem_module
from adasplash2.backends import REGISTRY, cpu, cuda, triton
from adasplash2.backends.cuda import attention, configurations, decoding, driver
from adasplash2.backends.cuda.sizes import SharedMemory
from adasplash2.backends.triton import sizes
from adasplash2.problem import (
    FEW,
    Operand,
    Problem,
    RowProblem,
    ScoreTransform,
    by_kind,
    rounded,
)
from adasplash2.records import problem_class

CPU, GPU = torch.device("cpu"), torch.device("cuda:0")
DEVICES = {"cuda": GPU, "triton": GPU, "cpu": CPU}
BACKENDS: dict[str, Any] = {"cuda": cuda, "triton": triton, "cpu": cpu}

PLAIN = Problem(
    batch=1, heads_q=2, heads_kv=2, length_q=1, length_k=1, head_dim=64, head_dim_v=64,
    dtype=torch.bfloat16, device=GPU, alpha=1.5, scores=ScoreTransform(scale=0.125),
    needs_grad=False,
)  # fmt: skip
CAUSAL = ScoreTransform(scale=0.125, is_causal=True)
MASK = Operand("attn_mask", torch.bool, (False, True, True, True))
RANGES = Operand("ranges", torch.int32, (True, True, True))
TABLE = Operand("block_table", torch.int32, (True, True))

ASKED: dict[str, dict[str, Any]] = {
    "plain": {},
    "training": {"needs_grad": True},
    "causal": {"scores": CAUSAL, "needs_grad": True},
    "float32": {"dtype": torch.float32},
    "float64": {"dtype": torch.float64},
    "general": {"alpha": 1.25, "needs_grad": True},
    "steep": {"alpha": 12.5, "needs_grad": True, "dtype": torch.float32},
    "steeper": {"alpha": 31.9, "needs_grad": True, "dtype": torch.float32},
    "odd": {"head_dim": 20, "head_dim_v": 33},
    "wide": {"head_dim": 256, "head_dim_v": 256, "dtype": torch.float32},
    "group": {"heads_q": 10},
    "odd group": {"heads_q": 15, "heads_kv": 3},
    "ranges": {"operands": (RANGES,)},
    "pages": {"operands": (RANGES, TABLE), "page_size": 16},
    "mask": {"operands": (MASK,)},
    "window": {"scores": ScoreTransform(scale=0.125, window=(40, 9))},
    "dropout": {"scores": ScoreTransform(scale=0.125, dropout_p=0.1)},
}


@pytest.fixture(autouse=True)
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if there were one."""
    shared = SharedMemory(232_448, 233_472)
    limits = sizes.Limits(shared.per_block, wgmma=True, overlaps=True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(configurations, "shared_memory", lambda device: shared)
    monkeypatch.setattr(triton, "_limits", lambda device: limits)
    monkeypatch.setattr(triton, "INTERPRETED", False)


def answers(problem: Problem | RowProblem) -> dict[str, Any]:
    """All that a decision about ``problem`` rests on."""
    found: dict[str, Any] = {"class": problem_class(problem), "order": dispatch._asked(problem)}
    for name, backend in BACKENDS.items():
        asked = dataclasses.replace(problem, device=DEVICES[name])
        reasons = backend.refusals(asked)
        # In words of their own sizes, which are no reasons.
        found[name] = len(reasons), [] if reasons else backend.configs(asked)
    return found


def assert_one_answer_a_kind(problems: Iterable[Problem | RowProblem]) -> int:
    """Returns how many kinds there are."""
    known: dict[Any, tuple[Problem | RowProblem, dict[str, Any]]] = {}
    for problem in problems:
        found = answers(problem)
        first, said = known.setdefault(problem.kind, (problem, found))
        assert found == said, f"{problem} is decided otherwise than {first}"
    return len(known)


@functools.cache
def around_powers() -> tuple[int, ...]:
    powers = (2**n for n in range(34))
    return tuple(sorted({max(1, power + step) for power in powers for step in (-1, 0, 1)}))


def test_the_backends_are_all_there_are() -> None:
    assert set(REGISTRY) == set(BACKENDS)


@pytest.mark.parametrize("name", ASKED)
def test_no_length_is_decided_otherwise_than_its_kind(name: str) -> None:
    """Every number of keys up to where all limits but those of 32 bits have passed."""
    base = dataclasses.replace(PLAIN, **ASKED[name])
    lengths = sorted({*range(1, 1100), *(n for n in around_powers() if n < 2**21)})
    for length_q in (1, FEW + 1):
        problems = [dataclasses.replace(base, length_q=length_q, length_k=n) for n in lengths]
        kinds = assert_one_answer_a_kind(problems)
        exact = base.alpha > 2.0 and base.needs_grad
        assert kinds == len(lengths) if exact else kinds < 45


@pytest.mark.parametrize("name", ASKED)
def test_no_number_of_queries_is_decided_otherwise_than_its_kind(name: str) -> None:
    base = dataclasses.replace(PLAIN, **ASKED[name])
    lengths = {*range(1, 300), *around_powers()}
    for length_k in (255, 256):
        problems = [dataclasses.replace(base, length_q=n, length_k=length_k) for n in lengths]
        assert assert_one_answer_a_kind(problems) < 120 or base.alpha > 2.0


@pytest.mark.parametrize("name", ASKED)
def test_no_batch_is_decided_otherwise_than_its_kind(name: str) -> None:
    """Nor heads, nor sizes that 32 bits do not hold."""
    base = dataclasses.replace(PLAIN, **ASKED[name])
    group = base.gqa_group
    some, lengths = (1, 3, 31, 32, 33, 255, 256, 257, 2049), ((1, 300), (3, 300), (40, 40))
    problems = [
        dataclasses.replace(
            base, batch=batch, heads_q=heads * group, heads_kv=heads, length_q=q, length_k=k
        )
        for batch, heads, (q, k) in itertools.product(some, some, lengths)
    ]
    problems += [
        dataclasses.replace(base, batch=batch, length_q=q, length_k=k)
        for batch in (1, 2**10, 2**20 - 1, 2**24 + 1, 2**25, 2**30)
        for n in around_powers()
        for q, k in ((1, n), (16, n), (n, 1), (n, n))
    ]
    assert_one_answer_a_kind(problems)


def kernels_of_cuda(problem: Problem) -> list[Any]:
    """Macros and blocks of all that may be launched for ``problem``."""
    found: list[Any] = []
    for config, aligned in itertools.product(cuda.configs(problem), (False, True)):
        if config == configurations.SPLIT:
            few = decoding.Kernels(problem, aligned)
            found.append((few.options, few.block))
        else:
            of = attention.Kernels(problem, tuple(config.items()), aligned)
            found.append((of.options, of.scan, of.dense))
    return found


@pytest.mark.parametrize("name", ["plain", "training", "causal", "general", "odd group", "float32"])
def test_kernels_of_cuda_are_those_of_the_kind(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver, "index", lambda device: 0)
    base, known = dataclasses.replace(PLAIN, **ASKED[name]), dict[Any, Any]()
    lengths = [n for n in around_powers() if n < 2**16] + [3, 5, 6, 7, 13, 300, 700, 1000, 1500]
    for length_q, length_k in itertools.product([1, 3, 5, 16, 17, 100], lengths):
        asked = dataclasses.replace(base, length_q=length_q, length_k=length_k)
        found = kernels_of_cuda(asked)
        assert known.setdefault(asked.kind, found) == found
    assert len({str(found) for found in known.values()}) > (name != "general")


@pytest.mark.parametrize("alpha", [1.25, 1.5, 12.5])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_no_rows_are_decided_otherwise_than_their_kind(alpha: float, dtype: torch.dtype) -> None:
    lengths = {*range(1, 600), *around_powers()}
    pairs = [(5, length) for length in lengths] + [(rows, 700) for rows in lengths]
    problems = (RowProblem(rows, n, dtype, GPU, alpha, needs_grad=True) for rows, n in pairs)
    assert assert_one_answer_a_kind(problems) < 300


LIMITS = {
    "of few queries": ({"length_k": 5000}, {"length_q": FEW}, {"length_q": FEW + 1}),
    "of keys that are cut": ({}, {"length_k": 255}, {"length_k": 256}),
    "of what is short": ({"needs_grad": True}, {"length_k": 512}, {"length_k": 513}),
    "of what is short, causal": (ASKED["causal"], {"length_k": 2048}, {"length_k": 2049}),
    "of whole rows' outputs": ({"length_q": 17}, {"length_k": 128}, {"length_k": 129}),
    "of whole rows with masks": (
        {"length_q": 17, "operands": (MASK,)}, {"length_k": 128}, {"length_k": 129},
    ),
    "of many rows": ({"length_k": 300}, {"batch": 1023}, {"batch": 1024}),
    "of 32 bits": ({"length_k": 300}, {"batch": 2**23 // 3}, {"batch": 2**23}),
    "of gradients in float32": (ASKED["steep"], {"length_k": 1980}, {"length_k": 1990}),
}  # fmt: skip


@pytest.mark.parametrize("name", LIMITS)
def test_limits_that_are_asked_divide_kinds(name: str) -> None:
    """As they do decisions: else the tests above would miss them."""
    base, below, above = LIMITS[name]
    one, other = (dataclasses.replace(PLAIN, **{**base, **said}) for said in (below, above))
    assert answers(one) != answers(other)
    assert one.kind != other.kind


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"scale": 0.5}, {"scale": -3.0}),
        ({"softcap": 5.0}, {"softcap": 30.0}),
        ({"dropout_p": 0.1}, {"dropout_p": 0.5}),
        ({"window": (100, 5)}, {"window": (70, 7)}),
    ],
)
def test_numbers_make_no_kinds(one: dict[str, Any], other: dict[str, Any]) -> None:
    plain, first, second = (
        dataclasses.replace(PLAIN, scores=ScoreTransform(**{"scale": 1.0, **said}))
        for said in ({}, one, other)
    )
    assert first.kind == second.kind
    assert (first.kind == plain.kind) == ("scale" in one)
    assert answers(first) == answers(second)


@pytest.mark.parametrize("of", [Problem, ScoreTransform, RowProblem])
def test_a_new_option_makes_kinds(of: type) -> None:
    """Whoever adds a field need not think of kinds."""
    new = dataclasses.make_dataclass("New", [("warmth", float, 0.0)], bases=(of,), frozen=True)
    rows = RowProblem(5, 700, torch.float32, CPU, 1.5, needs_grad=True)
    asked = rows if of is RowProblem else PLAIN
    holder = asked.scores if isinstance(asked, Problem) and of is ScoreTransform else asked
    values = {field.name: getattr(holder, field.name) for field in dataclasses.fields(of)}
    cold, warm = (new(**values, warmth=warmth) for warmth in (0.0, 30.0))
    if of is ScoreTransform:
        cold, warm = (dataclasses.replace(PLAIN, scores=scores) for scores in (cold, warm))
    assert cold.kind != warm.kind


@pytest.mark.parametrize("name", ["length_k", "length", "rows", "all_rows", "alpha"])
def test_a_new_option_has_a_name_of_its_own(name: str) -> None:
    """Else a rule for another field would drop it."""
    new = dataclasses.make_dataclass("New", [(name, int, 0)], bases=(ScoreTransform,), frozen=True)
    with pytest.raises(TypeError, match=f"a field of New must have a name of its own.*{name}"):
        problem_module.check_fields(new)


def test_a_new_option_is_compared() -> None:
    hidden = [("warmth", float, dataclasses.field(default=0.0, compare=False))]
    new = dataclasses.make_dataclass("New", hidden, bases=(ScoreTransform,), frozen=True)
    with pytest.raises(TypeError, match=r"New\.warmth must be compared"):
        problem_module.check_fields(new)


def test_a_new_option_that_is_ruled_is_in_no_class_where_nobody_says_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also where its default is not what kinds have of it."""
    monkeypatch.setitem(problem_module._IN_KINDS, "warmth", bool)
    new = dataclasses.make_dataclass(
        "New", [("warmth", float | None, None)], bases=(ScoreTransform,), frozen=True
    )
    nothing, warm = (
        problem_class(dataclasses.replace(PLAIN, scores=new(0.125, warmth=warmth)))
        for warmth in (None, 30.0)
    )
    assert nothing == problem_class(PLAIN)
    assert "warmth True" in warm


def test_kinds_are_copied_with_nothing() -> None:
    """A problem that has been asked equals one that has not."""
    one, other = dataclasses.replace(PLAIN), dataclasses.replace(PLAIN)
    assert hash(one.kind) is not None
    assert one == other
    longer = dataclasses.replace(one, length_k=5000)
    assert longer.kind != one.kind


def test_rounded() -> None:
    assert [rounded(n) for n in range(10)] == [0, 1, 2, 3, 4, 5, 5, 5, 8, 9]


def test_keys_that_grow_are_decided_a_few_times(monkeypatch: pytest.MonkeyPatch) -> None:
    decided = []
    ask = dispatch._ask
    monkeypatch.setattr(dispatch, "_ask", lambda *asked: decided.append(1) or ask(*asked))
    query, keys = torch.randn(1, 2, 1, 8), torch.randn(1, 2, 200, 8)
    dispatch.forget()
    for length in range(70, 200):
        adasplash2.entmax_attention(query, keys[:, :, :length], keys[:, :, :length], backend="cpu")
    assert len(decided) == 3  # up to 127, of 128, beyond


def test_what_is_found_by_kind_does_not_pile_up() -> None:
    asked = []

    @by_kind(3)
    def found(problem: Problem, more: str) -> str:
        asked.append(problem.length_k)
        return f"{more} {rounded(problem.length_k)}"

    def of(length_k: int) -> str:
        return found(dataclasses.replace(PLAIN, length_k=length_k), "about")

    assert [of(n) for n in (1, 5, 6, 7, 1)] == ["about 1", *["about 5"] * 3, "about 1"]
    assert asked == [1, 5]
    assert found(PLAIN, "of") == found(PLAIN, more="of") == "of 1"
    assert found(PLAIN, more="about") == "about 1"
    for n in range(40):
        assert of(n) == f"about {rounded(n)}"
        assert len(found) <= 3
    found.cache_clear()
    assert len(found) == 0
