"""The dispatcher, with backends made up here: order, refusals, force, broken ones, and words."""

from __future__ import annotations

import copy
import dataclasses
import errno
import functools
import logging
import os
import pickle
import subprocess
import sys
import time
import timeit
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

import adasplash2
from adasplash2 import backends, dispatch, records, tuning
from adasplash2.backends.cuda import compile as compiler
from adasplash2.problem import Inputs, Problem, RowProblem, attention_problem, row_problem
from adasplash2.records import Record

Register = Any


def problem(length: int = 5, **changes: Any) -> Problem:
    q = torch.ones(1, 2, length, 4)
    options = {"alpha": 1.5, "scale": None, "is_causal": False, "enable_gqa": False}
    return attention_problem(Inputs(q, q, q), **{**options, "needs_grad": False, **changes})


@pytest.fixture
def register(monkeypatch: pytest.MonkeyPatch) -> Iterator[Register]:
    """Put a made-up backend at the end of a registry that starts empty."""
    monkeypatch.setattr(backends, "REGISTRY", {})
    monkeypatch.setattr(dispatch, "FORCED", None)
    dispatch.forget()

    def add(name: str, *, unavailable: str | None = None, refusals: tuple[str, ...] = ()) -> Any:
        module: Any = ModuleType(f"made_up_{name}")
        module.name = name
        module.asked = []

        def refuse(problem: Problem | RowProblem) -> list[str]:
            module.asked.append(problem)
            return list(refusals)

        module.unavailable = lambda: unavailable
        module.refusals = refuse
        module.versions = lambda: {"kernels": "abc"}
        module.configs = lambda problem: [{"block": 64}, {"block": 128}]
        module.notes = lambda problem, inputs, config: [f"{name} notes {len(inputs)} tensors"]
        monkeypatch.setitem(sys.modules, module.__name__, module)
        backends.REGISTRY[name] = module.__name__
        return module

    yield add
    dispatch.forget()


def test_the_first_that_can_wins_with_its_first_config(register: Register) -> None:
    first, second = register("first"), register("second")
    choice = dispatch.choose(problem())
    assert choice.backend is first
    assert choice.config == {"block": 64}
    assert not second.asked


@pytest.mark.parametrize(
    ("asked", "first"),
    [
        ({"length": 512, "needs_grad": True}, "triton"),
        ({"length": 513, "needs_grad": True}, "cuda"),
        ({"length": 513, "needs_grad": False}, "cuda"),
        ({"length": 2048, "is_causal": True, "needs_grad": True}, "triton"),
        ({"length": 2048, "is_causal": True, "needs_grad": False}, "triton"),
        ({"length": 2049, "is_causal": True, "needs_grad": True}, "cuda"),
        ({"length": 1025, "alpha": 1.25, "needs_grad": True}, "triton"),
        ({"length": 1025, "alpha": 2.0, "needs_grad": True}, "cuda"),
    ],
)
def test_who_is_asked_first_without_measurements(
    asked: dict[str, Any], first: str, register: Register
) -> None:
    modules = {name: register(name) for name in ("cuda", "triton", "cpu")}
    assert dispatch.choose(problem(**asked)).backend is modules[first]


def test_few_queries_are_asked_of_triton_first(register: Register) -> None:
    """Without gradients, where a cache is long."""
    modules = {name: register(name) for name in ("cuda", "triton", "cpu")}
    for few, first in ((16, "triton"), (17, "cuda")):
        long = dataclasses.replace(problem(5000), length_q=few)
        assert dispatch.choose(long).backend is modules[first]


def test_one_that_is_unavailable_is_passed_over_and_not_asked(register: Register) -> None:
    first = register("first", unavailable="there is no such device")
    second = register("second")
    assert dispatch.choose(problem()).backend is second
    assert not first.asked


def test_one_that_refuses_is_passed_over(register: Register) -> None:
    register("first", refusals=("it is Tuesday",))
    second = register("second")
    assert dispatch.choose(problem()).backend is second


def test_one_that_does_not_import_is_passed_over(register: Register) -> None:
    backends.REGISTRY["broken"] = "adasplash2_no_such_module"
    register("second")
    assert dispatch.choose(problem()).backend.name == "second"
    broken, second = adasplash2.available_backends()
    assert not broken.usable
    assert "does not import (ModuleNotFoundError" in broken.reason
    assert second == dispatch.BackendStatus("second", True, "ready")


@pytest.mark.parametrize("error", [OSError("libfoo.so.1 is missing"), RuntimeError("no driver")])
def test_any_error_of_an_import_is_a_reason(
    register: Register, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(name: str) -> ModuleType:
        raise error

    backends.REGISTRY["broken"] = "made_up_broken"
    monkeypatch.setattr(dispatch.importlib, "import_module", fail)
    with pytest.raises(dispatch.BackendRefused, match=f"{type(error).__name__}: {error}"):
        dispatch.choose(problem(), "broken")


def test_a_name_forces(register: Register) -> None:
    first, second = register("first"), register("second")
    assert dispatch.choose(problem(), "second").backend is second
    assert not first.asked


def test_a_forced_one_that_refuses_says_all_its_reasons(register: Register) -> None:
    register("first")
    register("second", refusals=("it is Tuesday", "the moon is full"))
    with pytest.raises(dispatch.BackendRefused) as caught:
        dispatch.choose(problem(), "second")
    assert isinstance(caught.value, ValueError)
    assert caught.value.answers == (
        dispatch.Answer("second", ("it is Tuesday", "the moon is full")),
    )
    message = str(caught.value)
    assert message.startswith("backend 'second' cannot run attention of query (1, 2, 5, 4)")
    assert "second: it is Tuesday" in message
    assert "second: the moon is full" in message
    assert "first" not in message


@pytest.mark.parametrize("forced", [None, "first"])
def test_a_forced_one_that_is_unavailable_says_why(register: Register, forced: str | None) -> None:
    register("first", unavailable="there is no such device")
    with pytest.raises(dispatch.BackendRefused, match="first: there is no such device"):
        dispatch.choose(problem(), forced)


def test_where_none_can_every_reason_is_told(register: Register) -> None:
    register("first", unavailable="there is no such device")
    register("second", refusals=("it is Tuesday", "the moon is full"))
    backends.REGISTRY["broken"] = "adasplash2_no_such_module"
    with pytest.raises(dispatch.BackendRefused) as caught:
        dispatch.choose(row_problem(torch.ones(3, 7), alpha=2.0, needs_grad=True))
    lines = str(caught.value).splitlines()
    assert lines[0] == (
        "no backend can run entmax of 3 rows of 7, float32 on cpu, alpha=2, with gradient"
    )
    assert lines[1:4] == [
        "  first: there is no such device",
        "  second: it is Tuesday",
        "  second: the moon is full",
    ]
    assert lines[4].startswith("  broken: its module does not import")


def test_an_unknown_name_is_told_the_known_ones(register: Register) -> None:
    register("first")
    register("second")
    with pytest.raises(ValueError, match="backend must be None or one of 'first', 'second', got"):
        dispatch.choose(problem(), "third")
    with pytest.raises(ValueError, match="'first', 'second', got 'third'"):
        dispatch.explain(problem(), "third")


def test_the_environment_forces_and_an_argument_goes_before_it(
    register: Register, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = register("first"), register("second")
    monkeypatch.setattr(dispatch, "FORCED", "second")
    assert dispatch.choose(problem()).backend is second
    assert dispatch.explain(problem()).chosen == "second"
    assert dispatch.choose(problem(), "first").backend is first
    monkeypatch.setattr(dispatch, "FORCED", "third")
    with pytest.raises(ValueError, match="got 'third' from ADASPLASH2_BACKEND"):
        dispatch.choose(problem())


def test_problems_of_one_kind_are_decided_once(register: Register) -> None:
    first = register("first")
    choice = dispatch.choose(problem())
    assert dispatch.choose(problem()) is choice
    assert len(first.asked) == 1
    for said in ({"length": 4096}, {"alpha": 2.0}, {"is_causal": True}, {"needs_grad": True}):
        dispatch.choose(problem(**said))
    dispatch.choose(problem(), "first")
    assert len(first.asked) == 6
    long = dispatch.choose(problem(5000))
    for length in (4097, 6001, 8191):
        for numbers in ({"scale": 3.0}, {"scale": -1.0}):
            assert dispatch.choose(problem(length, **numbers)) is long
    assert len(first.asked) == 7


def test_a_call_that_is_refused_is_told_with_its_own_sizes(register: Register) -> None:
    """Also where another of its kind was refused before."""
    register("first", refusals=("it is Tuesday",))
    for length in (5000, 6001):
        with pytest.raises(dispatch.BackendRefused, match=rf"query \(1, 2, {length}, 4\)"):
            dispatch.choose(problem(length))


def test_strides_decide_nothing(register: Register) -> None:
    """Hooks on saved tensors may change strides between a forward and its backward."""
    first = register("first")
    q = torch.ones(1, 2, 4, 5).mT
    strided = attention_problem(
        Inputs(q, q, q),
        alpha=1.5,
        scale=None,
        is_causal=False,
        enable_gqa=False,
        needs_grad=False,
    )
    assert strided.strided == ("query", "key", "value")
    assert dispatch.choose(strided) is dispatch.choose(problem())
    assert len(first.asked) == 1


def test_a_refusal_is_not_remembered_as_an_answer(register: Register) -> None:
    first = register("first", refusals=("it is Tuesday",))
    with pytest.raises(dispatch.BackendRefused):
        dispatch.choose(problem())
    first.refusals = lambda problem: []
    assert dispatch.choose(problem()).backend is first


# What may pass


def too_many_files() -> OSError:
    return OSError(errno.EMFILE, os.strerror(errno.EMFILE))


def wrapped(error: Exception) -> Exception:
    """As a library tells of it."""
    found = ImportError("libfoo.so cannot be loaded")
    found.__cause__ = error
    return found


PASSING = [
    too_many_files(),
    OSError(errno.ENOMEM, "whatever"),
    MemoryError(),
    torch.OutOfMemoryError("CUDA out of memory"),
    RuntimeError("CUDA error: out of memory"),
    ImportError("libfoo.so.1: cannot open shared object file: Too many open files"),
    wrapped(too_many_files()),
    wrapped(MemoryError()),
]
FINAL = [
    ModuleNotFoundError("No module named 'foo'"),
    ImportError("libfoo.so.1: cannot open shared object file: No such file or directory"),
    OSError("libfoo.so.1 is missing"),
    PermissionError(errno.EACCES, "Permission denied"),
    RuntimeError("no driver"),
]


def fails_to_load(monkeypatch: pytest.MonkeyPatch, module: Any, error: Any, where: str) -> Any:
    """Let a backend fail where it is imported or asked; returns what ends that."""
    tried = []

    def fail(*_: Any) -> Any:
        tried.append(1)
        raise error

    patch = pytest.MonkeyPatch()
    if where == "asked":
        patch.setattr(module, "unavailable", fail)
    else:
        real = dispatch.importlib.import_module
        patch.setattr(
            dispatch.importlib,
            "import_module",
            lambda name: fail() if name == module.__name__ else real(name),
        )
    return patch, tried


@pytest.mark.parametrize("where", ["asked", "imported"])
@pytest.mark.parametrize("error", PASSING, ids=repr)
def test_a_failure_that_passes_is_asked_again(
    register: Register, monkeypatch: pytest.MonkeyPatch, error: Exception, where: str
) -> None:
    first = register("first")
    patch, tried = fails_to_load(monkeypatch, first, error, where)
    for _ in range(2):
        with pytest.raises(dispatch.BackendRefused, match="first: it"):
            dispatch.choose(problem())
    assert len(tried) == 2
    assert not adasplash2.available_backends()[0].usable
    patch.undo()
    assert dispatch.choose(problem()).backend is first
    assert adasplash2.available_backends()[0].usable


@pytest.mark.parametrize("where", ["asked", "imported"])
@pytest.mark.parametrize("error", FINAL, ids=repr)
def test_a_failure_that_stays_is_remembered(
    register: Register, monkeypatch: pytest.MonkeyPatch, error: Exception, where: str
) -> None:
    patch, tried = fails_to_load(monkeypatch, register("first"), error, where)
    second = register("second")
    for length in range(1, 5):
        assert dispatch.choose(problem(length)).backend is second
    patch.undo()
    assert len(tried) == 1


def test_ctrl_c_is_no_failure_of_a_backend(
    register: Register, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = register("first")
    patch, _ = fails_to_load(monkeypatch, first, KeyboardInterrupt(), "imported")
    with pytest.raises(KeyboardInterrupt):
        dispatch.choose(problem())
    patch.undo()
    assert dispatch.choose(problem()).backend is first


@pytest.mark.parametrize("needs_grad", [False, True])
def test_what_stood_in_does_so_for_good_only_where_a_backward_has_to_meet_it(
    register: Register, monkeypatch: pytest.MonkeyPatch, needs_grad: bool
) -> None:
    """Also where the decision has long been dropped from memory."""
    first, second = register("first"), register("second")
    asked = problem(needs_grad=needs_grad)
    patch, _ = fails_to_load(monkeypatch, first, too_many_files(), "imported")
    assert dispatch.choose(asked).backend is second
    assert dispatch.explain(asked).chosen == "second"
    patch.undo()
    for _ in range(2):
        assert dispatch.choose(asked).backend is (second if needs_grad else first)
        assert dispatch.choose(problem(99, needs_grad=True)).backend is first
        dispatch._decide.cache_clear()


@pytest.mark.parametrize("needs_grad", [False, True])
@pytest.mark.parametrize("what", ["file", "versions"])
def test_records_that_cannot_be_read_now_are_read_later(
    register: Register,
    measured: Any,
    monkeypatch: pytest.MonkeyPatch,
    needs_grad: bool,
    what: str,
) -> None:
    first = register("first")
    for each in (problem(), problem(needs_grad=True), problem(4096, needs_grad=True)):
        measured(first, 1.0, problem_class=records.problem_class(each))

    def fail(*_: Any) -> Any:
        raise too_many_files()

    asked = problem(needs_grad=needs_grad)
    with monkeypatch.context() as patch:
        if what == "file":
            patch.setattr(records.cache, "read", fail)
        else:
            patch.setattr(first, "versions", fail)
        patch.setattr(records.cache, "_warned", set())
        with pytest.warns(RuntimeWarning, match="cannot read measured speeds .*Too many open"):
            assert dispatch.choose(asked).config == {"block": 64}
    assert dispatch.choose(asked).config == {"block": 64 if needs_grad else 128}
    assert dispatch.choose(problem(4096, needs_grad=True)).config == {"block": 128}


def test_a_process_without_descriptors_recovers() -> None:
    """Nothing is free at the first call; then there is."""
    code = (
        "import os, resource, torch, adasplash2\n"
        "q = torch.ones(1, 1, 2, 4)\n"
        "taken = []\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))\n"
        "try:\n"
        "    while True: taken.append(os.open('/dev/null', os.O_RDONLY))\n"
        "except OSError: pass\n"
        "try: adasplash2.entmax_attention(q, q, q); print('ran')\n"
        "except adasplash2.BackendRefused as error: print('refused')\n"
        "for handle in taken: os.close(handle)\n"
        "adasplash2.entmax_attention(q, q, q)\n"
        "adasplash2.entmax_attention(q.requires_grad_(), q, q).sum().backward()\n"
        "print({status.name: status.reason for status in adasplash2.available_backends()})"
    )
    done = run(code, ADASPLASH2_AUTOTUNE="cached")
    assert done.returncode == 0, done.stderr
    first, reasons = done.stdout.splitlines()
    assert first == "refused"
    assert "'cpu': 'ready'" in reasons
    assert "Too many open files" not in reasons


# Exceptions and answers go to other processes


def refused() -> None:
    """In a module of its own, for processes that are started anew."""
    q = torch.ones(1, 1, 2, 4)
    adasplash2.entmax_attention(q, q, q, backend="cuda")


COPIES = {
    "pickle": lambda value: pickle.loads(pickle.dumps(value)),
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
}


@pytest.mark.parametrize("duplicate", COPIES.values(), ids=COPIES)
def test_a_refusal_can_be_copied(register: Register, duplicate: Any) -> None:
    register("first", refusals=("it is Tuesday",))
    with pytest.raises(dispatch.BackendRefused) as caught:
        dispatch.choose(problem())
    caught.value.add_note("a note")
    copied = duplicate(caught.value)
    assert type(copied) is dispatch.BackendRefused
    assert str(copied) == str(caught.value)
    assert copied.answers == caught.value.answers == (dispatch.Answer("first", ("it is Tuesday",)),)
    assert copied.__notes__ == ["a note"]


@pytest.mark.parametrize("duplicate", COPIES.values(), ids=COPIES)
def test_answers_can_be_copied(register: Register, duplicate: Any) -> None:
    register("first")
    asked = problem()
    [status] = adasplash2.available_backends()
    for value in (
        asked,
        dispatch.choose(asked),
        dispatch.explain(asked),
        status,
        dispatch.Answer("first", ("no",)),
        compiler.CompileError("log"),
        records.Record(
            problem_class="a",
            backend="b",
            versions={},
            config={},
            milliseconds=1.0,
            default_milliseconds=1.0,
            measured=records.now(),
        ),
        records.cache.Unsafe.of(Path("/x"), "is not"),
        tuning.Trial("first", {}, is_default=True),
    ):
        copied = duplicate(value)
        assert type(copied) is type(value)
        assert copied == value or str(copied) == str(value)
    stats = duplicate(adasplash2.AttentionStats(*torch.ones(4, 2), backend="cpu"))
    assert stats.backend == "cpu"
    assert torch.equal(stats.empty_tiles, torch.ones(2))


@pytest.mark.skipif(torch.cuda.is_available(), reason="the cuda backend does not refuse")
def test_a_refusal_comes_out_of_a_pool() -> None:
    code = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "import multiprocessing, test_dispatch\n"
        "if __name__ == '__main__':\n"
        "    with multiprocessing.get_context('spawn').Pool(1) as pool:\n"
        "        try: pool.apply_async(test_dispatch.refused).get(60)\n"
        "        except Exception as error: print(type(error).__name__, error)\n"
    )
    done = run(code)
    assert done.stdout.startswith("BackendRefused backend 'cuda' cannot run"), done.stderr


def test_explain_tells_the_choice_and_why_not_the_others(register: Register) -> None:
    register("first", unavailable="there is no such device")
    register("second", refusals=("it is Tuesday", "the moon is full"))
    register("third")
    register("fourth")
    told = dispatch.explain(problem(is_causal=True))
    assert told.chosen == "third"
    assert told.why == "the first that can, nothing measured for its class"
    assert told.config == {"block": 64}
    assert told.others == (
        ("first", ("there is no such device",)),
        ("second", ("it is Tuesday", "the moon is full")),
        ("fourth", ("could, but 'third' is first",)),
    )
    assert str(told).splitlines() == [
        "call        attention of query (1, 2, 5, 4), key (1, 2, 5, 4), value (1, 2, 5, 4), "
        "causal, float32 on cpu, alpha=1.5, without gradient",
        "chosen      third",
        "because     the first that can, nothing measured for its class",
        "config      block=64",
        "not first   there is no such device",
        "not second  it is Tuesday",
        "not second  the moon is full",
        "not fourth  could, but 'third' is first",
    ]


def test_explain_with_a_forced_one(register: Register) -> None:
    register("first")
    register("second")
    told = dispatch.explain(problem(), "second")
    assert told.chosen == "second"
    assert told.others == (("first", ("not asked, 'second' is forced",)),)


def test_explain_raises_nothing_where_nothing_can_run(register: Register) -> None:
    register("first", refusals=("it is Tuesday",))
    told = dispatch.explain(problem())
    assert told.chosen is None
    assert "nothing: the call raises" in str(told)
    assert "it is Tuesday" in str(told)


def test_explain_of_a_call(register: Register) -> None:
    register("first")
    q = torch.ones(1, 4, 4, 5, requires_grad=True)
    told = adasplash2.explain(q, q.mT.contiguous().mT[:, :2], q[:, :2], enable_gqa=True)
    assert told.notes == (
        "key is copied once: its head_dim stride is not 1",
        f"first notes {len(Inputs._fields)} tensors",
    )
    assert "with gradient" in told.problem
    with torch.no_grad():
        assert "without gradient" in adasplash2.explain(q, q, q).problem
    told = adasplash2.explain(q, q, q, alpha=torch.full((4,), 1.9))
    assert "alpha as a tensor" in told.problem
    assert "alpha=" not in told.problem


def test_explain_of_softmax_asks_nobody(register: Register) -> None:
    first = register("first")
    q = torch.ones(1, 2, 4, 5)
    told = adasplash2.explain(q, q, q, alpha=1)
    assert told.chosen == "torch.nn.functional.scaled_dot_product_attention"
    assert "softmax" in str(told)
    told = adasplash2.explain(q, q, q, alpha=1, sinks=torch.zeros(2))  # which SDPA does not know
    assert told.chosen.startswith("torch: the first that computes all of it")
    assert "not causal" in told.problem
    told = adasplash2.explain(
        q, q, q, alpha=1, kv_lengths=torch.tensor([3], dtype=torch.int32), is_causal=True
    )
    assert "causal" not in told.problem
    assert not first.asked


def test_decisions_are_logged_once(register: Register, caplog: pytest.LogCaptureFixture) -> None:
    register("first")
    with caplog.at_level(logging.DEBUG, logger="adasplash2"):
        dispatch.choose(problem())
        dispatch.choose(problem())
    [record] = caplog.records
    assert record.getMessage().endswith(
        "without gradient: first {'block': 64}, the first that can, nothing measured for its class"
    )


# Measured speeds


@pytest.fixture
def measured(register: Register, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Write records of made-up backends for the class of :func:`problem`."""
    monkeypatch.setenv("ADASPLASH2_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(dispatch, "AUTOTUNE", "cached")

    def write(module: Any, milliseconds: float, block: int = 128, **changes: Any) -> Record:
        fields = {
            "problem_class": records.problem_class(problem()),
            "backend": module.name,
            "versions": records.versions(module),
            "config": {"block": block},
            "milliseconds": milliseconds,
            "default_milliseconds": 9.0,
            "measured": "2026-01-01T00:00:00+00:00",
        }
        record = Record(**{**fields, **changes})
        assert records.Store(torch.device("cpu")).add([record])
        return record

    return write


def test_the_faster_by_record_wins(register: Register, measured: Any) -> None:
    first, second = register("first"), register("second")
    measured(first, 2.0)
    measured(second, 1.0, block=64)
    choice = dispatch.choose(problem())
    assert choice.backend is second
    assert choice.config == {"block": 64}
    assert dispatch.choose(problem(length=7)).backend is second
    told = dispatch.explain(problem())
    assert told.why == "measured 1 ms for its class"
    assert told.others == (("first", ("could, measured 2 ms",)),)


def test_the_first_stays_first_where_it_is_faster(register: Register, measured: Any) -> None:
    first, second = register("first"), register("second")
    measured(first, 1.0)
    measured(second, 2.0)
    choice = dispatch.choose(problem())
    assert choice.backend is first
    assert choice.config == {"block": 128}


def test_the_order_decides_where_the_first_was_not_measured(
    register: Register, measured: Any
) -> None:
    first, second = register("first"), register("second")
    measured(second, 1.0)
    choice = dispatch.choose(problem())
    assert choice.backend is first
    assert choice.config == {"block": 64}


def test_one_without_a_record_is_not_even_imported(register: Register, measured: Any) -> None:
    measured(register("first"), 1.0)
    backends.REGISTRY["broken"] = "made_up_broken"
    dispatch.choose(problem())
    assert list(dispatch._loaded) == ["first"]


def test_a_faster_one_that_refuses_is_passed_over(register: Register, measured: Any) -> None:
    first, second = register("first"), register("second", refusals=("it is Tuesday",))
    measured(first, 2.0)
    measured(second, 1.0)
    assert dispatch.choose(problem()).backend is first


def test_records_of_another_class_decide_nothing(register: Register, measured: Any) -> None:
    first, second = register("first"), register("second")
    measured(first, 2.0)
    measured(second, 1.0)
    assert dispatch.choose(problem(length=4096)).backend is first
    assert dispatch.choose(problem(is_causal=True)).config == {"block": 64}


def test_records_of_other_versions_decide_nothing(register: Register, measured: Any) -> None:
    first, second = register("first"), register("second")
    measured(first, 2.0)
    measured(second, 1.0)
    second.versions = lambda: {"kernels": "def"}
    assert dispatch.choose(problem()).backend is first


def test_a_config_that_is_no_longer_offered_is_not_used(register: Register, measured: Any) -> None:
    measured(register("first"), 2.0, block=999)
    assert dispatch.choose(problem()).config == {"block": 64}


def test_a_forced_one_runs_as_recorded(register: Register, measured: Any) -> None:
    first, second = register("first"), register("second")
    measured(first, 1.0)
    measured(second, 2.0)
    choice = dispatch.choose(problem(), "second")
    assert choice.backend is second
    assert choice.config == {"block": 128}
    assert dispatch.explain(problem(), "second").why == "forced; measured 2 ms for its class"
    assert dispatch.explain(problem(length=99), "second").why == "forced"


def test_off_ignores_records(
    register: Register, measured: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = register("first"), register("second")
    measured(first, 2.0)
    measured(second, 1.0)
    monkeypatch.setattr(dispatch, "AUTOTUNE", "off")
    choice = dispatch.choose(problem())
    assert choice.backend is first
    assert choice.config == {"block": 64}


def test_a_cache_that_is_broken_changes_no_decision(
    register: Register, measured: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = register("first")
    measured(first, 1.0)
    records.Store(torch.device("cpu")).path.write_text("{")
    monkeypatch.setattr(records.cache, "_warned", set())
    with pytest.warns(RuntimeWarning, match="aside"):
        choice = dispatch.choose(problem())
    assert choice.backend is first
    assert choice.config == {"block": 64}


def test_what_is_measured_meanwhile_changes_no_decision_of_this_process(
    register: Register, measured: Any
) -> None:
    """A backward must meet in the backend and configuration of its forward, whose lists it reads:
    also where the decision itself has long been dropped from memory."""
    first, second = register("first"), register("second")
    before = dispatch.choose(problem(needs_grad=True))
    label = records.problem_class(problem(needs_grad=True))
    measured(first, 2.0, problem_class=label)
    measured(second, 1.0, problem_class=label)
    dispatch._store(torch.device("cpu")).add(
        [measured(second, 1.0, problem_class=label)]  # known to this process too
    )
    dispatch._decide.cache_clear()
    assert dispatch.choose(problem(needs_grad=True)) == before
    assert dispatch.choose(problem(length=7, needs_grad=True)) == before
    dispatch.forget()
    assert dispatch.choose(problem(needs_grad=True)).backend is second


@pytest.fixture
def tuned(register: Register, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Any]:
    """``ADASPLASH2_AUTOTUNE=on`` with a tuner that finds the second config and counts."""
    monkeypatch.setenv("ADASPLASH2_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(dispatch, "AUTOTUNE", "on")
    asked = []

    def tune(problems: Any, *, seconds: float) -> Any:
        [(asked_problem, backends)] = problems
        asked.append((asked_problem, tuple(backends)))
        assert not torch.is_inference_mode_enabled()
        for name, module in backends.items():
            record = Record(
                problem_class=records.problem_class(asked_problem),
                backend=name,
                versions=records.versions(module),
                config={"block": 128},
                milliseconds=5.0 - len(name),
                default_milliseconds=9.0,
                measured=records.now(),
            )
            yield SimpleNamespace(records=(record,))

    monkeypatch.setattr(tuning, "tune", tune)
    return asked


def test_on_measures_a_class_when_it_is_first_met(register: Register, tuned: list[Any]) -> None:
    register("one")
    two = register("fast")
    register("refuses", refusals=("it is Tuesday",))
    with torch.inference_mode():
        choice = dispatch.choose(problem())
    assert choice.backend is two
    assert choice.config == {"block": 128}
    assert tuned == [(problem(), ("one", "fast"))]
    dispatch.choose(problem(length=7))
    assert len(tuned) == 1
    dispatch.choose(problem(length=4096))
    assert len(tuned) == 2
    dispatch.forget()  # as a new process
    assert dispatch.choose(problem()).backend is two
    assert len(tuned) == 2


def test_on_measures_what_is_missing_only(register: Register, tuned: list[Any]) -> None:
    register("one")
    dispatch.choose(problem())
    register("fast")
    dispatch.forget()
    dispatch.choose(problem())
    assert [names for _, names in tuned] == [("one",), ("fast",)]


def test_on_measures_a_forced_one_alone(register: Register, tuned: list[Any]) -> None:
    register("one")
    register("fast")
    assert dispatch.choose(problem(), "one").config == {"block": 128}
    assert tuned == [(problem(), ("one",))]


def test_measuring_that_fails_decides_as_without(
    register: Register, tuned: list[Any], monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    first = register("one")

    def fail(problems: Any, *, seconds: float) -> Any:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(tuning, "tune", fail)
    assert dispatch.choose(problem())[:2] == (first, {"block": 64})
    assert "measuring failed: out of memory" in caplog.text


def test_nothing_is_measured_while_a_graph_is_captured(
    register: Register, tuned: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = register("one")
    monkeypatch.setattr(dispatch, "_is_capturing", lambda device: True)
    assert dispatch.choose(problem())[:2] == (first, {"block": 64})
    monkeypatch.setattr(dispatch, "_is_capturing", lambda device: False)
    dispatch._decide.cache_clear()
    assert dispatch.choose(problem())[:2] == (first, {"block": 64})
    assert not tuned


def test_a_compiled_call_is_measured_when_it_runs(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The real tuner on the real backend: a trace asks for no decision, since it may be kept."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    monkeypatch.setenv("ADASPLASH2_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(dispatch, "AUTOTUNE", "on")
    monkeypatch.setattr(dispatch, "FORCED", "cpu")
    dispatch.forget()
    with FakeTensorMode(shape_env=ShapeEnv()):
        q = torch.empty(1, 1, 33, 8, requires_grad=True)
        assert adasplash2.entmax_attention(q, q, q).shape == q.shape
    assert not list(records.Store(torch.device("cpu")))
    torch._dynamo.reset()
    q = torch.randn(1, 1, 33, 8, requires_grad=True)
    torch.compile(adasplash2.entmax_attention, backend="aot_eager")(q, q, q).sum().backward()
    [record] = records.Store(torch.device("cpu"))
    assert record.problem_class.endswith("training")
    dispatch.forget()


# Costs


def microseconds(call: Callable[[], object], number: int) -> float:
    """Of this thread's processor time: other tests run beside."""
    return 1e6 * min(timeit.repeat(call, timer=time.thread_time, number=number, repeat=7)) / number


def test_a_decision_that_was_made_costs_little(register: Register) -> None:
    """Below 5 microseconds; 0.6 on a quiet machine (benchmarks/overhead.py)."""
    register("first")
    asked = problem()
    dispatch.choose(asked)
    equal = problem()  # as each call makes its own
    assert microseconds(lambda: dispatch.choose(equal), 10_000) < 5


def test_available_backends_print_a_sentence(register: Register) -> None:
    register("first", unavailable="there is no such device")
    register("second")
    assert [str(status) for status in adasplash2.available_backends()] == [
        "first: not usable, there is no such device",
        "second: usable, ready",
    ]


def functions_entered(call: Callable[[], object]) -> int:
    """How many functions, of Python and of C, ``call`` calls."""
    call()  # what is made once
    entered = 0

    def count(frame: object, event: str, argument: object) -> None:
        nonlocal entered
        entered += event in ("call", "c_call")

    sys.setprofile(count)
    try:
        call()
    finally:
        sys.setprofile(None)
    return entered


def test_a_call_costs_little_above_its_backends() -> None:
    """14 microseconds on a quiet machine (benchmarks/overhead.py), which no busy one can tell. How
    many functions are called any can, but not how long one takes: of that only the worst shows."""
    tensors = Inputs(*torch.randn(3, 1, 1, 4, 8))
    asked = attention_problem(
        tensors, alpha=1.5, scale=None, is_causal=False, enable_gqa=False, needs_grad=False
    )
    chosen, config, _ = dispatch.choose(asked, "cpu")
    direct = functools.partial(chosen.forward, asked, tensors, config)
    call = functools.partial(adasplash2.entmax_attention, *tensors[:3], backend="cpu")
    assert functions_entered(call) - functions_entered(direct) <= 60  # 53 with Python 3.11
    assert microseconds(call, 300) - microseconds(direct, 300) < 200


def test_the_environment_says_what_measurements_are_for(tmp_path: Path) -> None:
    """``on`` makes a record at the first call, ``off`` ignores it, ``cached`` uses it."""
    nothing = "the first that can, nothing measured for its class\n"
    for mode, files in (("cached", 0), ("on", 1), ("off", 1), ("", 1)):
        done = run(
            f"{CALL}; print(adasplash2.explain(q, q, q).why)",
            ADASPLASH2_CACHE_DIR=str(tmp_path),
            ADASPLASH2_AUTOTUNE=mode,
        )
        assert done.returncode == 0, done.stderr
        assert len(list(tmp_path.rglob("*.json"))) == files
        is_measured = done.stdout.startswith("measured ")
        assert is_measured if mode in ("on", "") else done.stdout == nothing


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


CALL = "import torch, adasplash2; q = torch.ones(1, 1, 2, 4); adasplash2.entmax_attention(q, q, q)"


def test_the_environment_is_read() -> None:
    """In a process of its own: a backend by name, and the log on standard error."""
    done = run(CALL, ADASPLASH2_BACKEND="cpu", ADASPLASH2_LOG="debug")
    assert done.returncode == 0, done.stderr
    assert "adasplash2 DEBUG: attention of query (1, 1, 2, 4)" in done.stderr

    done = run(CALL, ADASPLASH2_BACKEND="nowhere")
    assert done.returncode == 1
    assert "got 'nowhere' from ADASPLASH2_BACKEND" in done.stderr


def test_a_mode_of_tuning_that_is_none_is_warned_about() -> None:
    done = run("import adasplash2", ADASPLASH2_AUTOTUNE="always")
    assert done.returncode == 0, done.stderr
    allowed = "off, cached or on (cached is taken)"
    assert f"ADASPLASH2_AUTOTUNE must be {allowed}, got 'always'" in done.stderr


def test_a_log_level_that_is_none_is_warned_about() -> None:
    done = run("import adasplash2", ADASPLASH2_LOG="loud")
    assert done.returncode == 0, done.stderr
    assert "ADASPLASH2_LOG must be a level such as debug, got 'loud'" in done.stderr


@pytest.mark.parametrize("alpha", [1.0, 1.5])
def test_a_call_without_pairs_is_explained_as_nothing(alpha: float) -> None:
    query, key = torch.randn(1, 2, 0, 8), torch.randn(1, 2, 5, 8)
    for tensors in ((query, key, key), (key, query, query)):
        told = adasplash2.explain(*tensors, alpha=alpha)
        assert (told.chosen, told.config, told.others) == ("nothing", {}, ())
        assert "there is nothing to compute: no backend is asked" in str(told)
