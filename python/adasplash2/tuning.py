"""Which configuration is fastest here: candidates timed side by side, once, for the records.

Backends are measured through their own functions, without autograd and the dispatcher, on
Gaussian inputs of several sparsities. Slow candidates drop out after a round or two.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import logging
import math
import os
import pickle
import statistics
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue
from subprocess import PIPE
from types import ModuleType
from typing import Any, BinaryIO, NamedTuple, TextIO, cast

import torch
from torch import Tensor

from adasplash2 import cache, records
from adasplash2.contract import Backend, Config
from adasplash2.problem import Inputs, Operand, Problem, RowProblem, compute_dtype
from adasplash2.records import Record

logger = logging.getLogger("adasplash2")

AnyProblem = Problem | RowProblem
Match = tuple[AnyProblem, Mapping[str, Backend]]
"""A problem and the backends, by name, that can run it."""

Progress = Callable[[str, int, int], None]
"""Told what is being done, how many steps are behind and how many there are."""

SHARPNESS = (1.0, 4.0)
"""Factors of the queries (of the scores, for rows): about 28 and 4 keys a row at 16,384. A record
has the geometric mean, since nobody knows before a call how sparse its rows will be."""

ROUNDS = 7
WARM_UPS = {"cuda": 3}
"""Untimed calls of a candidate by device; 1 where nothing is said."""

PRUNE_ABOVE = 1.25
"""A candidate whose best time is this far above the leader's median is out."""

WORTH = 1.03
"""The default stays unless another is faster by this factor: less is noise."""

MAX_PAIRS = {"cpu": 2**25, "cuda": 2**32}
"""(query, key) pairs of a measured problem; heads and batch are cut to it. Some 50 ms on two
cores, some 15 ms on an H100, which needs more heads to be filled."""

CANDIDATES_SHARE, DEFAULTS_SHARE = 0.5, 0.75
"""Parts of the time after which candidates are no longer waited for, and defaults neither. What is
left is enough to measure the defaults of dozens of problems."""

LATE = "not compiled in time"
"""The error of such a trial."""

MAX_COMPILERS = 12
FLUSH_BYTES = 256 * 2**20
"""Written before a timed call on a GPU: calls find no inputs in the L2 cache, and the host is
ahead of the device when the call begins."""


@dataclass(slots=True)
class Trial:
    """One candidate. ``times`` has a list of milliseconds for each of :data:`SHARPNESS`."""

    backend: str
    config: Config
    is_default: bool
    times: tuple[list[float], ...] = field(default_factory=lambda: tuple([] for _ in SHARPNESS))
    error: str | None = None
    pruned: bool = False

    @property
    def milliseconds(self) -> float | None:
        """Geometric mean of the medians; None before the first round."""
        return _mean([statistics.median(times) for times in self.times if times])

    @property
    def lowest(self) -> float | None:
        return _mean([min(times) for times in self.times if times])


@dataclass(frozen=True, slots=True)
class Outcome:
    """What tuning found for one problem."""

    problem_class: str
    problem: AnyProblem
    trials: tuple[Trial, ...]
    records: tuple[Record, ...]


def tune(
    problems: Sequence[Match],
    *,
    seconds: float,
    progress: Progress | None = None,
) -> Iterator[Outcome]:
    """Measure the configurations of backends on problems.

    Args:
        problems: each with the backends that do not refuse it.
        seconds: for everything. Defaults go before other candidates, those of all problems.
            Candidates that find no time are not measured; a call that has begun is not interrupted.
        progress: told of every step.

    Yields:
        an outcome a problem as it is found, without records where time was up.
    """
    end = time.perf_counter() + seconds
    cut = [(representative(problem), backends) for problem, backends in problems]
    trials = [_candidates(problem, backends) for problem, backends in cut]
    steps = 2 * len(cut)

    def tell(done: int, label: str) -> None:
        if progress is not None:
            progress(label, done, steps)

    _compile(cut, trials, seconds, progress)
    # Every problem's defaults first, last of all those that this process would have to compile.
    defaults = [[trial for trial in candidates if trial.is_default] for candidates in trials]
    none_ready = [bool(some) and all(trial.error for trial in some) for some in defaults]
    for done, index in enumerate(sorted(range(len(cut)), key=none_ready.__getitem__)):
        tell(done, records.problem_class(cut[index][0]))
        if none_ready[index]:
            defaults[index][0].error = None  # what a call would run
        measure(*cut[index], defaults[index], end - time.perf_counter(), rounds=1)
    for done, (problem, backends) in enumerate(cut):
        label = records.problem_class(problem)
        tell(len(cut) + done, label)
        share = (end - time.perf_counter()) / (len(cut) - done)
        measure(problem, backends, trials[done], share)
        found = tuple(_records(label, backends, trials[done]))
        yield Outcome(label, problem, tuple(trials[done]), found)
    tell(steps, "")


def _candidates(problem: AnyProblem, backends: Mapping[str, Backend]) -> list[Trial]:
    """Every configuration: the backends' defaults, then their second ones, and so on."""
    indexed = [
        (index, Trial(name, config, is_default=index == 0))
        for name, module in backends.items()
        for index, config in enumerate(module.configs(problem))
    ]
    return [trial for _, trial in sorted(indexed, key=lambda pair: pair[0])]


@torch.no_grad()
def measure(
    problem: AnyProblem,
    backends: Mapping[str, Backend],
    trials: Sequence[Trial],
    seconds: float,
    rounds: int = ROUNDS,
) -> None:
    """Time candidates in turn, round after round: what slows the machine for a while then slows
    all of them."""
    end = time.perf_counter() + seconds
    if seconds <= 0 or not trials:
        return
    data = [_Data.draw(problem, sharpness) for sharpness in SHARPNESS]

    def attempt(trial: Trial, calls: int) -> None:
        """One time for each of ``data``, after ``calls - 1`` that are not counted."""
        module = backends[trial.backend]
        try:
            for drawn, times in zip(data, trial.times, strict=True):
                for _ in range(calls):
                    took = clock(
                        functools.partial(_run, problem, module, trial.config, drawn),
                        problem.device,
                    )
                times.append(took)
        except Exception as error:  # whatever a compiler or a driver says
            trial.error = f"{type(error).__name__}: {error}"
            logger.debug("tuning drops %s %s: %s", trial.backend, trial.config, trial.error)

    for trial in trials:
        if not trial.error and not trial.times[-1] and time.perf_counter() < end:
            attempt(trial, 1 + WARM_UPS.get(problem.device.type, 1))
    for _ in range(rounds - 1):
        _prune(trials)
        for trial in trials:
            if trial.error or trial.pruned or not trial.times[-1]:
                continue
            if time.perf_counter() >= end:
                return
            attempt(trial, 1)


def representative(problem: AnyProblem) -> AnyProblem:
    """A problem of the same class and of a size that can be measured several times."""
    limit = MAX_PAIRS.get(problem.device.type, MAX_PAIRS["cpu"])
    if isinstance(problem, RowProblem):
        rows = max(1, min(problem.rows, limit // max(1, problem.length)))
        return dataclasses.replace(problem, rows=rows)
    group = problem.gqa_group
    while problem.allowed_pairs > limit and problem.batch * problem.heads_kv > 1:
        if problem.batch > 1:
            problem = dataclasses.replace(problem, batch=problem.batch // 2)
        else:
            heads = problem.heads_kv // 2
            problem = dataclasses.replace(problem, heads_q=heads * group, heads_kv=heads)
    return problem


class Job(NamedTuple):
    """Something to compile."""

    module: str
    problem: AnyProblem
    config: Config
    is_default: bool

    @property
    def variant(self) -> str:
        """Equal for jobs that are likely to compile the same: lengths seldom matter."""
        same: AnyProblem
        if isinstance(self.problem, RowProblem):
            same = dataclasses.replace(self.problem, rows=1, length=1)
        else:
            same = dataclasses.replace(self.problem, length_q=1, length_k=1)
        return repr((self.module, same, sorted(self.config.items())))


def _compile(
    cut: Sequence[Match],
    trials: Sequence[Sequence[Trial]],
    seconds: float,
    progress: Progress | None,
) -> None:
    """Compile what is compiled at run time, of all problems; what is late gets an error."""
    ranked = [
        (rank, trial, Job(_name(backends[trial.backend]), problem, trial.config, trial.is_default))
        for (problem, backends), candidates in zip(cut, trials, strict=True)
        if problem.device.type != "cpu"
        for rank, trial in enumerate(candidates)
    ]
    ranked.sort(key=lambda entry: entry[0])  # the first candidate of each problem, the second, ...
    if not ranked:
        return
    shares = CANDIDATES_SHARE * seconds, DEFAULTS_SHARE * seconds
    ready = compile_all([job for *_, job in ranked], *shares, progress)
    for _, trial, job in ranked:
        if job not in ready:
            trial.error = LATE


def _name(module: Backend) -> str:
    return cast(ModuleType, module).__name__


def compile_all(
    jobs: Sequence[Job], seconds: float, patience: float, progress: Progress | None = None
) -> list[Job]:
    """Let other processes compile into the disk caches: defaults first, else in order.

    The processes are started as ``python -c``, not by :mod:`multiprocessing`, which would run the
    caller's main module again.

    Args:
        seconds: after these what is not done is given up,
        patience: or after these while a default is not done.

    Returns:
        the jobs that were done in time.
    """
    began = time.perf_counter()
    # Jobs of a variant go to one process: the first compiles, the others find it in the cache.
    variants: dict[str, list[Job]] = {}
    for job in sorted(jobs, key=lambda job: not job.is_default):
        variants.setdefault(job.variant, []).append(job)
    waiting = deque(variants.values())
    count = max(1, min(len(waiting), (os.cpu_count() or 2) - 1, MAX_COMPILERS))
    workers = _start(count)
    answers: SimpleQueue[tuple[Job, bool] | None] = SimpleQueue()
    for worker in workers:
        threading.Thread(target=_employ, args=(worker, waiting, answers), daemon=True).start()
    done: list[Job] = []
    told, defaults, working = 0, sum(job.is_default for job in jobs), len(workers)
    try:
        while working:
            if progress is not None:
                progress(f"compiling {len(jobs)} variants", told, len(jobs))
            left = began + (patience if defaults else seconds) - time.perf_counter()
            answer = answers.get(timeout=max(0.0, left))
            if answer is None:
                working -= 1
                continue
            job, is_done = answer
            told += 1
            defaults -= job.is_default
            if is_done:
                done.append(job)
    except Empty:
        pass
    finally:
        waiting.clear()
        for worker in workers:
            worker.kill()
            worker.wait()
    logger.debug("%d of %d variants are compiled", len(done), len(jobs))
    return done


def _start(count: int) -> list[subprocess.Popen[bytes]]:
    """Processes that wait for orders; fewer where the system has no more.

    Nothing is imported from the working directory: Python is told so (``-P``), and what its
    variable says is left out, where an empty entry means that directory.
    """
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment[cache.VARIABLE] = str(cache.writable())
    command = [sys.executable, "-P", "-c", _WORKER]
    workers: list[subprocess.Popen[bytes]] = []
    try:
        for _ in range(count):
            workers.append(subprocess.Popen(command, stdin=PIPE, stdout=PIPE, env=environment))
    except OSError as error:
        logger.warning("%d of %d compilers can be started: %s", len(workers), count, error)
    return workers


def _search_path() -> list[str]:
    """``sys.path``, with the working directory last: it holds a program's own modules, and must
    hide none of the others."""
    try:
        here = os.getcwd()
    except OSError:  # deleted
        return [folder for folder in sys.path if os.path.isabs(folder)]
    return sorted(sys.path, key=lambda folder: os.path.realpath(folder) == here)


def _employ(
    worker: subprocess.Popen[bytes],
    waiting: deque[list[Job]],
    answers: SimpleQueue[tuple[Job, bool] | None],
) -> None:
    """Hand what waits to a process, a variant after the other; None says that it is at its end."""
    assert worker.stdin is not None
    assert worker.stdout is not None
    try:
        with worker.stdin as orders, worker.stdout as results:
            pickle.dump(_search_path(), orders)
            while True:
                for job in waiting.popleft():
                    pickle.dump(tuple(job), orders)
                    orders.flush()
                    if not (line := results.readline()):
                        return  # it has died: others go on
                    answers.put((job, line == b"done\n"))
    except (IndexError, OSError):  # nothing waits, or it has died
        pass
    finally:
        answers.put(None)


_WORKER = """
import os, pickle, signal, sys
signal.signal(signal.SIGINT, signal.SIG_IGN)  # it is for who gives the orders
sys.path[:] = pickle.load(sys.stdin.buffer)
output = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)
from adasplash2.tuning import compile_here
compile_here(sys.stdin.buffer, output)
"""
"""What compilers print goes to standard error: standard output says what is done."""


def compile_here(orders: BinaryIO, output: TextIO) -> None:
    """What a process of :func:`compile_all` does: a job after the other, and a line about each."""
    with contextlib.suppress(EOFError):
        while True:
            module, problem, config, _ = pickle.load(orders)
            try:
                importlib.import_module(module).precompile(problem, config)
            except Exception:
                logger.warning("cannot compile %s %s", module, config, exc_info=True)
                print("failed", file=output, flush=True)
            else:
                print("done", file=output, flush=True)


@dataclass(frozen=True, slots=True)
class _Data:
    """Random tensors of one problem."""

    inputs: Inputs | tuple[Tensor, Tensor | None]  # or the rows and their alphas
    grad: Tensor

    @staticmethod
    def draw(problem: AnyProblem, sharpness: float) -> _Data:
        generator = torch.Generator(problem.device).manual_seed(1)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, device=problem.device).to(problem.dtype)

        if isinstance(problem, RowProblem):
            shape = problem.rows, problem.length
            x = normal(*shape) * sharpness
            kind: dict[str, Any] = {"dtype": compute_dtype(x.dtype), "device": x.device}
            alphas = torch.full(shape[:1], 1.5, **kind) if problem.alphas else None
            return _Data((x, alphas), normal(*shape))
        p = problem
        queries, keys = (p.batch, p.heads_q, p.length_q), (p.batch, p.heads_kv, p.length_k)
        # Scores of a standard deviation of `sharpness`, whatever the scale.
        factor = sharpness / (abs(p.scores.scale) * math.sqrt(p.head_dim) or 1.0)
        query = normal(*queries, p.head_dim) * factor
        inputs = Inputs(query, normal(*keys, p.head_dim), normal(*keys, p.head_dim_v))
        inputs = inputs._replace(**{o.name: _operand(p, o, generator) for o in p.operands})
        return _Data(inputs, normal(*queries, p.head_dim_v))


_OF_NO_EFFECT = {"sinks": 0.0, "scales": 1.0, "alphas": 1.5}


def _operand(p: Problem, operand: Operand, generator: torch.Generator) -> Tensor:
    """What calls with such an operand are likely to have: masks that hide an eighth, slopes of
    ALiBi, sinks and factors of no effect, causal ranges. Of others numbers from 0 to 1."""
    name, dtype, spread = operand
    kind: dict[str, Any] = {"dtype": dtype, "device": p.device}
    if name == "ranges":
        keys = torch.arange(p.length_q, **kind).clamp(max=max(p.length_k - 1, 0))
        ranges = torch.stack([torch.zeros_like(keys), keys + 1, keys])[:, None]
        return ranges.expand(3, p.batch if spread[1] else 1, -1).contiguous()
    full = p.batch, p.heads_q, p.length_q, p.length_k
    shape = [size if wide else 1 for size, wide in zip(full, spread, strict=False)]
    if name == "attn_mask":
        drawn = torch.rand(shape, generator=generator, device=p.device)
        return drawn < 0.875 if dtype == torch.bool else drawn.to(dtype)
    if name == "alibi_slopes":
        steps = torch.arange(1, p.heads_q + 1, **kind)
        slopes = (2.0 ** (-8.0 * steps / p.heads_q))[: shape[1]]
        return slopes.view(1, -1, *[1] * len(shape[2:])).expand(shape).contiguous()
    if name == "dropout_seed":
        return torch.ones(shape, **kind)
    if name in _OF_NO_EFFECT:
        return torch.full(shape, _OF_NO_EFFECT[name], **kind)
    return torch.rand(shape, generator=generator, device=p.device).to(dtype)


def _run(problem: AnyProblem, backend: Backend, config: Config, data: _Data) -> None:
    if isinstance(problem, RowProblem):
        x, alphas = data.inputs[:2]
        y = backend.rows_forward(problem, x, config, alphas)
        if problem.needs_grad:
            backend.rows_backward(problem, y, data.grad, config, alphas)
        return
    inputs = Inputs(*data.inputs)
    result = backend.forward(problem, inputs, config)
    if problem.needs_grad:
        backend.backward(problem, inputs, result.kept, data.grad, config)


def side_by_side(
    calls: Mapping[str, Callable[[], object]], device: torch.device, rounds: int
) -> dict[str, float]:
    """Median milliseconds of calls, each made once a round after its warm-up."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        for _ in range(WARM_UPS.get(device.type, 1)):
            clock(call, device)
    for _ in range(rounds):
        for name, call in calls.items():
            times[name].append(clock(call, device))
    return {name: statistics.median(taken) for name, taken in times.items()}


def clock(call: Callable[[], object], device: torch.device) -> float:
    """Milliseconds of one call."""
    if device.type != "cuda":
        start = time.perf_counter()
        call()
        return 1e3 * (time.perf_counter() - start)
    with torch.cuda.device(device):
        torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=device).zero_()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        torch.cuda.synchronize()
        return float(begin.elapsed_time(end))


def _prune(trials: Sequence[Trial]) -> None:
    """Drop what is clearly slower than the leader of its backend, but no default."""
    leaders: dict[str, float] = {}
    for trial in trials:
        median = trial.milliseconds
        if median is not None and not trial.error:
            leaders[trial.backend] = min(median, leaders.get(trial.backend, math.inf))
    for trial in trials:
        lowest = trial.lowest
        if lowest is not None and not trial.is_default and trial.backend in leaders:
            trial.pruned |= lowest > PRUNE_ABOVE * leaders[trial.backend]


def _records(
    label: str, backends: Mapping[str, Backend], trials: Sequence[Trial]
) -> Iterator[Record]:
    for name, module in backends.items():
        timed = [t for t in trials if t.backend == name and not t.error and t.milliseconds]
        default = next((trial for trial in timed if trial.is_default), None)
        if default is None:
            continue
        winner = min(
            (trial for trial in timed if _is_worth_it(trial, default)),
            key=lambda trial: trial.milliseconds or math.inf,
            default=default,
        )
        yield Record(
            problem_class=label,
            backend=name,
            versions=records.versions(module),
            config=dict(winner.config),
            milliseconds=round(winner.milliseconds or math.inf, 6),
            default_milliseconds=round(default.milliseconds or math.inf, 6),
            measured=records.now(),
        )


def _is_worth_it(trial: Trial, default: Trial) -> bool:
    """Whether ``trial`` is faster in its medians and in its best times: noise seldom does both."""
    pairs = (trial.milliseconds, default.milliseconds), (trial.lowest, default.lowest)
    return all(
        ours is not None and theirs is not None and ours * WORTH < theirs for ours, theirs in pairs
    )


def _mean(times: Sequence[float]) -> float | None:
    return statistics.geometric_mean(times) if times else None
