"""The table of features by backend: complete, true of what runs here, and that of the documentation
is the same.

Run as a program it writes the documentation's.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from cases import device_of, interpreted, usable_backends
from click.testing import CliRunner

import adasplash2
from adasplash2 import cli, features, tuning
from adasplash2 import problem as problem_module
from adasplash2.backends import REGISTRY
from adasplash2.backends.triton import sizes
from adasplash2.contract import Gradients
from adasplash2.dense import softmax_attention, weights
from adasplash2.features import Call
from adasplash2.options import Options
from adasplash2.problem import (
    BATCH_AND_HEADS,
    DIFFERENTIABLE,
    DTYPES,
    FEATURES,
    TENSORS,
    Inputs,
    Operand,
    Problem,
    RowProblem,
    ScoreTransform,
    validated,
)

PAGE = Path(__file__).resolve().parent.parent / "docs/features.md"
CALLS = [call for calls in features.ROWS.values() for call in calls]


def with_table(text: str) -> str:
    """The page with the table of now."""
    before, rest = text.split(features.BEGIN)
    return before + features.markdown() + rest.split(features.END)[1]


def test_the_documentation_has_it() -> None:
    text = PAGE.read_text()
    assert text == with_table(text), "the page's table is another: run `make features`"


def test_all_that_may_be_asked_is_in_it() -> None:
    """Every argument, operand and number but its default, and every dtype."""
    arguments = inspect.signature(adasplash2.entmax_attention).parameters.keys()
    said = {name for call in CALLS for name in call.said}
    assert said == arguments - {*TENSORS, "enable_gqa", "return_aux", "backend"}
    problems = [call.problem(needs_grad=True) for call in CALLS]
    assert {feature for p in problems for feature in p.features} == set(FEATURES.values())
    assert {p.dtype for p in problems} == set(DTYPES)
    plain = Call({}).problem(needs_grad=True).scores
    for number in dataclasses.fields(plain):
        values = {getattr(p.scores, number.name) for p in problems}
        assert values != {getattr(plain, number.name)}, number.name


def with_number(problem: Problem) -> Problem:
    """With a number that no backend has heard of."""
    fields = [("bonus", float, 0.0)]
    kind = dataclasses.make_dataclass("Planted", fields, bases=(ScoreTransform,), frozen=True)
    return dataclasses.replace(
        problem, scores=kind(**dataclasses.asdict(problem.scores), bonus=1.0)
    )


def with_operand(problem: Problem) -> Problem:
    """With a tensor that no backend has heard of."""
    operand = Operand("bonus", torch.float32, (True, True))
    return dataclasses.replace(problem, operands=(*problem.operands, operand))


@pytest.mark.parametrize("plant", [with_number, with_operand])
@pytest.mark.parametrize("call", [Call({}), Call({"softcap": 3.0}), Call({}, paged=True)])
@pytest.mark.parametrize("backend", REGISTRY)
def test_what_a_backend_has_not_heard_of_it_refuses(
    plant: Callable[[Problem], Problem], call: Call, backend: str
) -> None:
    """By name, wherever its tensors are, so that a new option cannot be ignored."""
    module = importlib.import_module(REGISTRY[backend])
    problem = call.problem(needs_grad=False)
    planted = plant(problem)
    assert {*planted.features} == {*problem.features, "bonus"}
    reason = "bonus is computed by other backends only"
    assert reason in module.refusals_anywhere(planted)
    here = dataclasses.replace(planted, device=torch.device(device_of(backend)))
    assert backend == "cuda" or reason in module.refusals(here)


@pytest.mark.parametrize("plant", [with_number, with_operand])
def test_softmax_and_what_is_shown_refuse_it_too(plant: Callable[[Problem], Problem]) -> None:
    query = torch.randn(1, 2, 4, 8)
    inputs = Inputs(query, query, query)
    planted = plant(validated(inputs, Options(alpha=1.0), False))
    with pytest.raises(NotImplementedError, match="bonus"):
        softmax_attention(planted, inputs, Options(alpha=1.0))
    with pytest.raises(NotImplementedError, match="bonus"):
        weights(planted, inputs)


@pytest.mark.parametrize("plant", [with_number, with_operand])
def test_the_core_is_told_where_anything_is_asked(plant: Callable[[Problem], Problem]) -> None:
    """All that it takes by name; of a plain call nothing, which is faster."""
    query = torch.randn(1, 2, 4, 8)
    inputs = Inputs(query, query, query)
    cpu = importlib.import_module(REGISTRY["cpu"])
    plain = validated(inputs, Options(is_causal=True), False)
    assert not cpu._options(plain, inputs)
    assert cpu._options(plant(plain), inputs)


@pytest.mark.parametrize("plant", [with_number, with_operand])
def test_what_triton_has_not_heard_of_is_no_product(plant: Callable[[Problem], Problem]) -> None:
    """Whoever computes it must say so where kernels would be simpler without it."""
    added = {"attn_mask": torch.empty(4, 64, 96, dtype=torch.bfloat16, device="meta")}
    slopes = {"alibi_slopes": torch.empty(4, device="meta")}
    masked, sloped = (
        Call(said, torch.bfloat16).problem(needs_grad=True) for said in (added, slopes)
    )
    masked, sloped = (
        dataclasses.replace(p, scores=dataclasses.replace(p.scores, scale=0.25))
        for p in (masked, sloped)
    )
    config = {"block_q": 16, "block_k": 16}

    def options(problem: Problem) -> sizes.Options:
        return sizes.Options.of(problem, config)

    plain = Call({}).problem(needs_grad=True)
    assert not options(plain).scored
    assert not options(plain).scattered
    assert options(masked).folded
    assert options(sloped).local
    assert options(plant(plain)).scored
    assert options(plant(plain)).scattered
    assert not options(plant(masked)).folded
    assert not options(plant(sloped)).local


def test_triton_sorts_features_that_there_are() -> None:
    for some in (sizes.FACTORS, sizes.ADDED, sizes.BOUNDED, sizes.LEADING):
        assert some < set(FEATURES.values())


def test_a_new_gradient_is_given_or_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    """What operands a backend has gradients of is its own: one more is an error of those calls that
    want it, and of no others."""
    assert sizes.Wanted.of(("sinks", "warmth")) == sizes.Wanted(False, True, False, False, True)
    assert {"attn_mask", *sizes.ROW_GRADIENTS} <= {*DIFFERENTIABLE}
    assert Gradients._fields == (*TENSORS, *DIFFERENTIABLE)
    cpu = importlib.import_module(REGISTRY["cpu"])
    backward = cpu.backward
    monkeypatch.setattr(cpu, "backward", lambda *asked: backward(*asked)._replace(sinks=None))
    query = torch.randn(1, 2, 4, 8, requires_grad=True)
    sinks = torch.zeros(2, requires_grad=True)
    adasplash2.entmax_attention(query, query, query, backend="cpu").sum().backward()
    out = adasplash2.entmax_attention(query, query, query, sinks=sinks, backend="cpu")
    with pytest.raises(NotImplementedError, match="cpu gives no gradient of sinks"):
        out.sum().backward()


def test_every_operand_is_cut_and_drawn() -> None:
    """But pages, which are neither."""
    assert {*BATCH_AND_HEADS, "block_table"} == {*Inputs._fields}
    problem = Call({}).problem(needs_grad=True)
    here = dataclasses.replace(problem, device=torch.device("cpu"))
    operand = Operand("warmth", torch.float32, (True, False))
    drawn = tuning._operand(here, operand, torch.Generator().manual_seed(0))
    assert drawn.shape == (problem.batch, 1)
    assert drawn.isfinite().all()


def test_rows_too() -> None:
    kind = dataclasses.make_dataclass(
        "Planted", [("bonus", bool, False)], bases=(RowProblem,), frozen=True
    )
    rows = kind(3, 4, torch.float32, torch.device("cpu"), 1.5, False, bonus=True)
    for module in REGISTRY.values():
        refusals = importlib.import_module(module).refusals_anywhere(rows)
        assert refusals == ["bonus is computed by other backends only"]


def test_an_option_without_a_field_of_scores_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(problem_module, "_OF_SCORES", (*problem_module._OF_SCORES, "backend"))
    with pytest.raises(TypeError, match="backend"):
        Call({"softcap": 29.0}).problem(needs_grad=False)


@interpreted()
@pytest.mark.parametrize("backend", usable_backends())
def test_it_is_what_the_backend_says_of_a_device(backend: str) -> None:
    module = importlib.import_module(REGISTRY[backend])
    for call in CALLS:
        for needs_grad in (False, True):
            problem = call.problem(needs_grad)
            here = dataclasses.replace(problem, device=torch.device(device_of(backend)))
            assert module.refusals(here) == module.refusals_anywhere(problem)


def test_no_backend_needs_its_device(monkeypatch: pytest.MonkeyPatch) -> None:
    def there_is_none(*_: object) -> None:
        raise AssertionError("a device was asked")

    for name in ("get_device_capability", "get_device_properties", "current_device"):
        monkeypatch.setattr(torch.cuda, name, there_is_none)
    assert set(features.table()["float32"]) == set(REGISTRY)


def test_the_command_prints_it() -> None:
    def printed(*options: str) -> str:
        result = CliRunner().invoke(cli.main, ["features", *options])
        assert result.exit_code == 0, result.output
        return result.stdout

    assert printed("--markdown") == features.markdown() + "\n"
    told = json.loads(printed("--json"))["float64"]
    assert told["cpu"] == {"answer": "yes", "reasons": []}
    assert told["triton"]["answer"] == "no"
    assert "float64" in told["triton"]["reasons"][0]
    text = printed()
    assert "triton: dtype torch.float64 is computed by other backends only" in text
    assert "`" not in text


def test_a_backend_without_gradients_says_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = importlib.import_module(REGISTRY["cpu"])
    monkeypatch.setattr(
        cpu, "refusals_anywhere", lambda problem: ["no gradients"] if problem.needs_grad else []
    )
    assert features.table()["float32"]["cpu"] == ("forward", ("no gradients",))


def test_a_broken_backend_says_no(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(REGISTRY, "broken", "adasplash2_no_such_module")
    word, reasons = features.table()["float32"]["broken"]
    assert word == "no"
    assert "does not import" in reasons[0]


if __name__ == "__main__":
    PAGE.write_text(with_table(PAGE.read_text()))
