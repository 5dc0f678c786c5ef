"""The tuner: what it times, drops and chooses, on backends made up here and on the real one."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from adasplash2 import cache, records, tuning
from adasplash2.backends import cpu
from adasplash2.contract import Config, Forward
from adasplash2.problem import Inputs, Problem, RowProblem, attention_problem

CPU = torch.device("cpu")


def problem(batch: int = 1, heads: int = 2, length: int = 8, **changes: Any) -> Problem:
    q = torch.ones(batch, heads, length, 4)
    options = {"alpha": 1.5, "scale": None, "is_causal": True, "enable_gqa": True}
    return attention_problem(Inputs(q, q, q), **{**options, "needs_grad": False, **changes})


def sleeper(name: str = "sleeper", *, fails: str = "", **milliseconds: float) -> Any:
    """A backend whose configs, called by name, take so long; the one named ``fails`` raises."""
    module: Any = ModuleType(name)
    module.name = name
    module.calls = Counter()
    module.versions = lambda: {"kernels": "abc"}
    module.configs = lambda problem: [{"block": block} for block in milliseconds]

    def run(config: Config) -> None:
        module.calls[config["block"]] += 1
        if config["block"] == fails:
            raise RuntimeError("out of luck")
        time.sleep(1e-3 * milliseconds[str(config["block"])])

    def forward(problem: Problem, inputs: Inputs, config: Config) -> Forward:
        run(config)
        return Forward(inputs.query, inputs.query, inputs.query)

    module.forward = forward
    return module


def tune(*backends: Any, seconds: float = 60.0) -> tuning.Outcome:
    able = {backend.name: backend for backend in backends}
    [outcome] = tuning.tune([(problem(), able)], seconds=seconds)
    return outcome


def test_the_fastest_config_is_recorded() -> None:
    [record] = tune(sleeper(slow=8, fast=2, middling=5)).records
    assert record.config == {"block": "fast"}
    assert 2 <= record.milliseconds < 8 <= record.default_milliseconds
    assert record.backend == "sleeper"
    assert record.problem_class == records.problem_class(problem())
    assert record.versions == records.versions(sleeper())


def test_each_backend_gets_its_record() -> None:
    outcome = tune(sleeper("one", a=6, b=3), sleeper("two", a=1))
    assert [(r.backend, r.config["block"]) for r in outcome.records] == [("one", "b"), ("two", "a")]
    assert outcome.records[1].milliseconds == outcome.records[1].default_milliseconds


def test_the_default_stays_where_nothing_is_clearly_faster() -> None:
    [record] = tune(sleeper(default=10, same=10)).records
    assert record.config == {"block": "default"}
    assert record.milliseconds == record.default_milliseconds


@pytest.mark.parametrize(
    ("ours", "theirs", "worth"),
    [([1.0, 2.0, 3.0], [1.5, 3.0, 4.0], True), ([1.0, 2.0, 3.0], [0.9, 3.0, 4.0], False)],
)
def test_noise_alone_does_not_win(ours: list[float], theirs: list[float], worth: bool) -> None:
    """A better median counts only beside a better best time."""
    trial, default = (
        tuning.Trial("x", {}, is_default=False, times=(times, times)) for times in (ours, theirs)
    )
    assert tuning._is_worth_it(trial, default) is worth


def test_what_is_clearly_slower_drops_out_but_no_default() -> None:
    backend = sleeper(default=20, fast=2, slow=20)
    outcome = tune(backend)
    all_rounds = len(tuning.SHARPNESS) * (tuning.ROUNDS + 1)
    assert backend.calls["fast"] == backend.calls["default"] == all_rounds
    assert backend.calls["slow"] < all_rounds / 2
    assert [trial.pruned for trial in outcome.trials] == [False, False, True]


def test_a_config_that_fails_is_dropped_and_told() -> None:
    outcome = tune(sleeper(default=4, broken=1, fast=1, fails="broken"))
    [record] = outcome.records
    assert record.config == {"block": "fast"}
    assert outcome.trials[1].error == "RuntimeError: out of luck"


def test_a_backend_whose_default_fails_gets_no_record() -> None:
    outcome = tune(sleeper("one", default=1, other=1, fails="default"), sleeper("two", a=1))
    assert [record.backend for record in outcome.records] == ["two"]


def test_a_single_config_is_measured_too() -> None:
    backend = sleeper(only=1)
    [record] = tune(backend).records
    assert record.config == {"block": "only"}
    assert backend.calls["only"] > 3


def test_no_backend_means_no_record() -> None:
    assert tune().records == ()


def test_time_that_is_up_is_kept_to() -> None:
    backend = sleeper(default=50, **{f"other{i}": 50 for i in range(20)})
    outcome = tune(backend, seconds=0.1)
    assert outcome.records[0].config == {"block": "default"}
    assert sum(backend.calls.values()) < 10


def test_problems_for_which_no_time_is_left_get_no_record() -> None:
    able = {"sleeper": sleeper(default=30)}
    problems = [(problem(length=n), able) for n in (4, 16, 64)]
    outcomes = list(tuning.tune(problems, seconds=0.05))
    assert [bool(o.records) for o in outcomes] == [True, False, False]


def test_progress_is_told() -> None:
    told: list[tuple[str, int, int]] = []
    able = {"sleeper": sleeper(default=0)}
    problems = [(problem(), able), (problem(length=64), able)]
    list(tuning.tune(problems, seconds=10, progress=lambda *step: told.append(step)))
    assert [(done, total) for _, done, total in told] == [(step, 4) for step in range(5)]
    assert told[0][0] == records.problem_class(problem())


def test_a_large_problem_is_cut_to_one_of_its_class() -> None:
    large = problem(batch=8, heads=8, length=4096)
    cut = tuning.representative(large)
    assert isinstance(cut, Problem)
    assert cut.allowed_pairs <= tuning.MAX_PAIRS["cpu"] < 2 * cut.allowed_pairs
    assert records.problem_class(cut) == records.problem_class(large)
    assert tuning.representative(problem()) == problem()
    rows = RowProblem(10**6, 4096, torch.float32, CPU, 1.5, needs_grad=False)
    assert tuning.representative(rows) == dataclasses.replace(rows, rows=2**13)


def test_groups_stay_groups() -> None:
    query, key = torch.ones(1, 12, 4096, 4), torch.ones(1, 4, 4096, 4)
    large = attention_problem(
        Inputs(query, key, key),
        alpha=1.5,
        scale=None,
        is_causal=False,
        enable_gqa=True,
        needs_grad=False,
    )
    cut = tuning.representative(large)
    assert isinstance(cut, Problem)
    assert (cut.heads_q, cut.heads_kv) == (3, 1)


@pytest.mark.parametrize("needs_grad", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_the_cpu_backend_is_measured(dtype: torch.dtype, needs_grad: bool) -> None:
    attention = dataclasses.replace(problem(length=96), dtype=dtype, needs_grad=needs_grad)
    rows = RowProblem(4, 50, dtype, CPU, 1.5, needs_grad)
    for asked in (attention, rows, dataclasses.replace(rows, alphas=True)):
        [outcome] = tuning.tune([(asked, {"cpu": cpu})], seconds=60)
        [record] = outcome.records
        assert record.config in cpu.configs(asked)
        assert {trial.config["isa"] for trial in outcome.trials} == {
            config["isa"] for config in cpu.configs(asked)
        }
        assert all(trial.error is None for trial in outcome.trials)
        assert record.versions["threads"] == str(torch.get_num_threads())


def test_the_cpu_backends_configs_are_real() -> None:
    """Each runs the instruction set it names: results differ in the last bits at most, within one
    not at all, and a name that is none is refused by the core."""
    asked = problem(length=300, needs_grad=True)
    inputs = Inputs(*torch.randn(3, 1, 2, 300, 4))
    grad = torch.randn(1, 2, 300, 4)
    configs = cpu.configs(asked)
    assert len({config["scan_rows"] for config in configs}) > 1
    results = []
    for config in configs:
        result = cpu.forward(asked, inputs, config)
        results.append((result.out, *cpu.backward(asked, inputs, result.kept, grad, config)))
    for config, other in zip(configs, results, strict=True):
        exact = config["isa"] == configs[0]["isa"]
        rtol, atol = (0.0, 0.0) if exact else (1e-4, 1e-5)
        for ours, theirs in zip(results[0], other, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=rtol, atol=atol)
    with pytest.raises(ValueError, match=r"isa must be one of .*, got 'mmx'"):
        cpu.forward(asked, inputs, configs[0] | {"isa": "mmx"})


@pytest.mark.parametrize(
    ("sizes", "more", "decoded"),
    [
        ((1, 5, 16), {}, True),
        ((1, 5, 15), {}, False),
        ((2, 64, 16), {}, True),
        ((2, 63, 16), {}, False),
        ((16, 300, 64), {}, True),
        ((16, 300, 63), {}, False),
        ((16, 8192, 4), {}, True),
        ((16, 8191, 4), {}, False),
        ((17, 9000, 256), {}, False),
        ((1, 300, 64), {"needs_grad": True}, False),
        ((100, 300, 64), {"page_size": 4}, True),
        ((0, 300, 64), {}, False),
    ],
)
def test_what_is_decoded_has_no_rows_of_a_scan(
    sizes: tuple[int, int, int], more: dict[str, Any], decoded: bool
) -> None:
    length_q, length_k, head_dim = sizes
    asked = dataclasses.replace(
        problem(length=1), length_q=length_q, length_k=length_k, head_dim=head_dim, **more
    )
    configs = cpu.configs(asked)
    assert any("scan_rows" in config for config in configs) != decoded
    assert len({tuple(config.items()) for config in configs}) == len(configs)


# Compiling in other processes

MODULE = """
import os, pathlib
def precompile(problem, config):
    if config["block"] == "broken":
        raise RuntimeError("does not compile")
    if config["block"] == "deadly":
        os._exit(1)
    if config["block"] == "endless":
        import time; time.sleep(60)
    folder = pathlib.Path(os.environ["MADE_UP_FOLDER"])
    (folder / f"{config['block']} {problem.length_q}").write_text(str(os.getpid()))
"""


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A module to be imported from ``sys.path`` alone, and the folder it compiles into."""
    (tmp_path / "made_up_compiler.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "compiled").mkdir()
    monkeypatch.setenv("MADE_UP_FOLDER", str(tmp_path / "compiled"))
    return tmp_path / "compiled"


def jobs(*blocks: str) -> list[tuning.Job]:
    return [
        tuning.Job("made_up_compiler", problem(), {"block": block}, is_default=index == 0)
        for index, block in enumerate(blocks)
    ]


def test_compilation_runs_in_other_processes(
    compiler: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 3)
    told: list[tuple[str, int, int]] = []
    done = tuning.compile_all(jobs("a", "b", "c"), 60, 60, lambda *step: told.append(step))
    assert all(job in done for job in jobs("a", "b", "c"))
    assert len(done) == 3
    assert {path.name for path in compiler.iterdir()} == {"a 8", "b 8", "c 8"}
    pids = {path.read_text() for path in compiler.iterdir()}
    assert len(pids) == 2
    assert str(os.getpid()) not in pids
    assert told[0] == ("compiling 3 variants", 0, 3)


def test_nothing_is_imported_from_the_working_directory(
    compiler: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Not by what starts a process, nor by what it is told to import; but a program's own modules
    are found there."""
    here = tmp_path / "here"
    here.mkdir()
    planted = f"open({str(here / 'planted')!r}, 'a').write(__name__)\n"
    for name in ("pickle", "json", "torch", "signal", "queue", "adasplash2", "sitecustomize"):
        (here / f"{name}.py").write_text(planted)
    (here / "their_own_module.py").write_text(MODULE)
    monkeypatch.chdir(here)
    monkeypatch.setenv("PYTHONPATH", f":{here}")
    for entry in ("", str(here)):
        monkeypatch.setattr(sys, "path", [entry, *sys.path])
    theirs = jobs("b")[0]._replace(module="their_own_module")
    done = tuning.compile_all([*jobs("a"), theirs], 60, 60)
    assert not (here / "planted").exists()
    assert {job.module for job in done} == {"made_up_compiler", "their_own_module"}


def test_what_is_compiled_where_the_cache_is_unsafe_is_found(
    compiler: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Processes that compile put it where this one looks, for its own use."""
    (tmp_path / "made_up_keeper.py").write_text(
        "from adasplash2 import cache\n"
        "def precompile(problem, config):\n"
        "    cache.keep_sealed('cuda', 'unit', '.cubin', b'kernel')\n"
    )
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache").chmod(0o777)
    monkeypatch.setenv("ADASPLASH2_CACHE_DIR", str(tmp_path / "cache"))
    asked = jobs("a")[0]._replace(module="made_up_keeper")
    assert tuning.compile_all([asked], 60, 60) == [asked]
    assert cache.find_sealed("cuda", "unit", ".cubin") == b"kernel"
    assert list((tmp_path / "cache").iterdir()) == []


def test_processes_that_cannot_be_started_cost_a_warning(
    compiler: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    real, left = tuning.subprocess.Popen, [1]

    def start(*arguments: Any, **options: Any) -> Any:
        if not left:
            raise OSError(errno.EMFILE, "Too many open files")
        left.pop()
        return real(*arguments, **options)

    monkeypatch.setattr(os, "cpu_count", lambda: 3)
    monkeypatch.setattr(tuning.subprocess, "Popen", start)
    assert len(tuning.compile_all(jobs("a", "b"), 60, 60)) == 2
    assert "1 of 2 compilers" in caplog.text
    assert tuning.compile_all(jobs("a", "b"), 60, 60) == []
    assert "0 of 2 compilers" in caplog.text


def test_a_variant_that_does_not_compile_stops_no_other(compiler: Path, capfd: Any) -> None:
    assert [job.config for job in tuning.compile_all(jobs("broken", "a"), 60, 60)] == [
        {"block": "a"}
    ]
    assert {path.name for path in compiler.iterdir()} == {"a 8"}
    assert "does not compile" in capfd.readouterr().err


def test_compilation_that_takes_too_long_is_given_up(
    compiler: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Defaults later than others."""
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    began = time.perf_counter()
    assert tuning.compile_all(jobs("a", "endless", "b"), 0.0, 50.0) == jobs("a")
    assert [path.name for path in compiler.iterdir()] == ["a 8"]
    assert tuning.compile_all(jobs("endless"), 0.0, 1.0) == []
    assert time.perf_counter() - began < 50


def test_a_process_that_dies_stops_no_other(
    compiler: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 3)
    done = tuning.compile_all(jobs("deadly", "a", "b"), 60, 60)
    assert [job.config["block"] for job in done] == ["a", "b"]


def test_problems_that_differ_in_length_share_a_process(
    compiler: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 3)
    asked = [
        tuning.Job("made_up_compiler", problem(length=length), {"block": block}, is_default=True)
        for length in (4, 16)
        for block in ("a", "b")
    ]
    tuning.compile_all(asked, 60, 60)
    pids = {path.name: path.read_text() for path in compiler.iterdir()}
    assert pids["a 4"] == pids["a 16"] != pids["b 4"] == pids["b 16"]


def on_meta(monkeypatch: pytest.MonkeyPatch, **changes: Any) -> Problem:
    """A problem of a device that compiles, where tensors are empty and calls take no time."""
    data = tuning._Data((torch.ones(1), torch.ones(1), torch.ones(1)), torch.ones(1))
    monkeypatch.setattr(tuning._Data, "draw", lambda *_: data)
    return dataclasses.replace(problem(**changes), device=torch.device("meta"))


def test_what_is_not_compiled_in_time_is_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """But one default is: it will run in any case."""
    backend = sleeper(default=1, late=1, ready=1)
    monkeypatch.setattr(tuning, "compile_all", lambda jobs, *_: [jobs[2]])
    [outcome] = tuning.tune([(on_meta(monkeypatch), {"sleeper": backend})], seconds=60)
    assert set(backend.calls) == {"default", "ready"}
    assert [trial.error for trial in outcome.trials] == [None, tuning.LATE, None]


def test_a_short_time_measures_the_default_of_every_class(monkeypatch: pytest.MonkeyPatch) -> None:
    """With one backend that compiles in 2 seconds and one that needs 20, on 4 processes."""
    took = {"quick": 2.0, "slow": 20.0}
    backends = {name: sleeper(name, default=0, **{f"b{i}": 0 for i in range(9)}) for name in took}
    classes = [on_meta(monkeypatch, length=length) for length in (4, 16, 64, 256, 1024)]

    def compiled(jobs: list[tuning.Job], seconds: float, patience: float, _: Any) -> Any:
        free = [0.0] * 4
        for job in jobs:
            free[0] += took[job.module]
            if free[0] <= (patience if job.is_default else seconds):
                yield job
            free.sort()

    monkeypatch.setattr(tuning, "compile_all", lambda *arguments: list(compiled(*arguments)))
    able = [(asked, backends) for asked in classes]
    for seconds, measured in ((25, ["quick"]), (80, ["quick", "slow"])):
        outcomes = list(tuning.tune(able, seconds=seconds))
        assert [[r.backend for r in o.records] for o in outcomes] == [measured] * len(classes)


def test_problems_off_the_cpu_are_compiled_before_they_are_measured(
    compiler: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the device type meta, where tensors are empty and calls take no time."""
    import made_up_compiler

    module: Any = sleeper("made_up_compiler", one=0, two=0)
    module.precompile = made_up_compiler.precompile
    asked = dataclasses.replace(problem(), device=torch.device("meta"))
    monkeypatch.setattr(tuning, "measure", lambda *_, **__: None)
    list(tuning.tune([(asked, {"made_up_compiler": module})], seconds=60))
    assert {path.name for path in compiler.iterdir()} == {"one 8", "two 8"}


# The whole way


def test_two_processes_that_tune_at_once_keep_both(tmp_path: Path) -> None:
    environment = {**os.environ, "ADASPLASH2_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-m", "adasplash2", "tune", "--json", "--seconds", "20", "--shape"]
    runs = [
        subprocess.Popen([*command, shape], env=environment, stdout=subprocess.PIPE)
        for shape in ("1,1,16,8", "1,1,64,8")
    ]
    told = [json.loads(run.communicate(timeout=120)[0]) for run in runs]
    assert [run.returncode for run in runs] == [0, 0]
    assert all(answer["kept"] for answer in told)
    [path] = (tmp_path / "speeds").glob("*.json")
    found = {record["problem_class"] for record in json.loads(path.read_text())["records"]}
    assert found == {answer["outcomes"][0]["problem_class"] for answer in told}
    assert len(found) == 2
