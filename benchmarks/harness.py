"""What every benchmark shares: cases, contenders, timing, memory, records, tables and plots.

A *case* is one problem with its seeded tensors; a *contender* is one way to solve it. A program
lists both and lets a :class:`Run` measure them within its budget of seconds; then it prints, saves
and draws the measurements.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import importlib.metadata
import importlib.util
import json
import math
import multiprocessing
import os
import platform
import signal
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import data
import torch
from torch import Tensor

import adasplash2

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))
import reference  # noqa: E402  (the float64 reference of the tests)

FORWARD, BOTH, BACKWARD = "forward", "forward+backward", "backward"
MODES = (FORWARD, BOTH)
"""How a contender is called; the backward's own time is taken within :data:`BOTH`."""

TIMED = {FORWARD: (FORWARD,), BOTH: (BOTH, BACKWARD)}
"""What a call of a mode gives times of."""

DTYPES = {
    "float32": torch.float32,
    "float64": torch.float64,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}

BUDGET_MS = 3_000.0
"""Time that the rounds of one contender and mode may take: dense attention needs seconds a call,
and all others would wait for as many of its rounds as of their own. A call that takes longer is
timed once."""

ROUNDS_SHARE = 0.25
"""Part of what is left of the budget that the rounds of one group of cases may take."""

CONTENDER_SHARE = 0.5
"""Part of the budget after which a contender takes part in no further case: a slow rival must not
keep all others from the later ones. Compiling counts where it comes again with each shape."""

BUDGET_SECONDS = 240
"""What a program may take by default: it ends within five minutes, imports and pictures counted."""

LIMIT_SECONDS = {"cpu": 20, "cuda": 60}
"""What a contender may take for the warm-up of one case, compiling and tuning counted; never more
than half of what is left, so that others and later cases have a half too."""

WARM_UPS = {"cpu": 1, "cuda": 3}
"""Untimed calls of each mode before the rounds; the first may compile and tune."""

FLUSH_BYTES = 256 * 2**20
"""Written before each call timed on CUDA: more than any L2 cache holds, so that calls start from
one state."""

HOST_AHEAD_CYCLES = 5_000_000
"""Clock ticks, about 3 ms, that the GPU idles before that, so that a call has been enqueued when
its turn comes: what is timed is the GPU's work, as within a model, where the host runs ahead. What
the host takes longer than that, or where it waits for the GPU, counts. ``overhead.py`` measures
the host's own work."""

CHECKED_LENGTH = 512
"""Rows and keys of the short case on which a contender's error is found: dense float64 is quick."""

MEBIBYTE = 2**20


# Cases


class Inputs(NamedTuple):
    """``tensors`` are what a contender is called with; ``grad_out`` has the output's shape."""

    tensors: tuple[Tensor, ...]
    grad_out: Tensor


@dataclass(frozen=True, kw_only=True)
class Case:
    """What all problems have; a program's own case adds its shapes.

    ``alpha`` is that of the entmax contenders: softmax contenders ignore it.
    """

    device: str
    dtype: str  # of DTYPES
    alpha: float

    def __str__(self) -> str:
        """What tells it from the other cases of one run."""
        raise NotImplementedError

    def inputs(self) -> Inputs:
        """The tensors, the same at every call."""
        raise NotImplementedError

    def short(self) -> Case:
        """The same case cut to :data:`CHECKED_LENGTH`."""
        raise NotImplementedError

    def expected(self, tensors: Sequence[Tensor], alpha: float) -> Tensor:
        """The exact output in float64."""
        raise NotImplementedError

    def work(self) -> float:
        """Grows as the time of a dense solution does."""
        raise NotImplementedError

    def shape(self) -> Case:
        """What those who tune or compile for it do not do again for: the same for cases that
        differ in their numbers alone."""
        return self

    def generator(self, seed: int = 1) -> torch.Generator:
        return torch.Generator(self.device).manual_seed(seed)

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]


@dataclass(frozen=True, kw_only=True)
class AttentionCase(Case):
    """Self-attention; ``sharpness`` is a factor of the queries, and with it of the scores.

    ``block_sparsity`` and ``block`` are read by the data ``blocks``, ``layer`` by ``real``.
    """

    batch: int = 1
    heads: int = 8
    heads_kv: int = 8
    length: int
    head_dim: int = 64
    is_causal: bool = True
    sharpness: float = 1.0
    data: str = "gaussian"  # of DATA
    block_sparsity: float = 0.0
    block: int = 64
    layer: int = 0

    def __str__(self) -> str:
        shape = f"length {self.length}, {self.heads} heads of {self.head_dim}"
        return f"{self.dtype}, {shape}, {self.data_words()}"

    def shape(self) -> AttentionCase:
        return dataclasses.replace(self, sharpness=1.0, layer=0, block_sparsity=0.0)

    def data_words(self) -> str:
        """Its data, in words."""
        words = self.data
        if self.data == "real":
            words += f" layer {self.layer}"
        if self.data == "blocks":
            words += f" {100 * self.block_sparsity:g} %"
        return words + (f" x {self.sharpness:g}" if self.sharpness != 1.0 else "")

    def inputs(self) -> Inputs:
        tensors = DATA[self.data](self)
        shape = (*tensors[0].shape[:3], tensors[2].shape[3])
        generator = self.generator(2)
        grad_out = torch.randn(
            shape, generator=generator, device=self.device, dtype=self.torch_dtype
        )
        return Inputs(tensors, grad_out)

    def short(self) -> AttentionCase:
        return dataclasses.replace(self, length=min(self.length, CHECKED_LENGTH))

    def expected(self, tensors: Sequence[Tensor], alpha: float) -> Tensor:
        tensors = [t.cpu() for t in tensors]
        return reference.attention(*tensors, alpha=alpha, is_causal=self.is_causal).out

    def work(self) -> float:
        return float(self.batch * self.heads * self.length**2 * self.head_dim)


def attention_case(options: argparse.Namespace, **fields: Any) -> AttentionCase:
    """A case with what programs have options for, and ``fields``."""
    names = ("device", "dtype", "alpha", "heads", "head_dim")
    shared = {name: getattr(options, name) for name in names if name not in fields}
    return AttentionCase(**{"heads_kv": fields.get("heads") or options.heads, **shared, **fields})


DATA: dict[str, Callable[[AttentionCase], tuple[Tensor, Tensor, Tensor]]] = {
    "gaussian": data.gaussian,
    "blocks": data.blocks,
    "real": data.real,
}
"""Where an attention case takes its tensors from. A new kind of data is one function more."""


# Contenders


def never(case: Case) -> None:
    """The refusal of a contender that runs every case."""


@dataclass(frozen=True)
class Contender:
    """One way to solve a case.

    Attributes:
        name: as ``--rivals``, tables and JSON have it.
        call: takes the case and its tensors, gives the output. A module's function, or a
            ``functools.partial`` of one, so that another process can be told of it.
        devices: where it runs at all.
        refusal: takes a case on one of them, says in a sentence what is against it, or None.
        softmax: whether it computes softmax instead of entmax.
        tunes: whether it compiles or tunes anew for each shape. It is then checked on the shape
            that is timed, not on the short case, and each shape is reckoned to cost that again.
        reference: what it computes, of a case and the tensors of its first positions, in float64;
            None where that is the case's softmax or entmax.
    """

    name: str
    call: Callable[..., Tensor]
    devices: tuple[str, ...] = ("cpu", "cuda")
    refusal: Callable[..., str | None] = never
    softmax: bool = False
    tunes: bool = False
    reference: Callable[..., Tensor] | None = None

    def why_not(self, case: Case) -> str | None:
        if case.device not in self.devices:
            return f"runs on {' or '.join(self.devices)}, not on {case.device}"
        return self.refusal(case)

    def error(self, case: Case, inputs: Inputs) -> float:
        """Relative error of the output on a short case, against float64."""
        if self.tunes and isinstance(case, AttentionCase) and case.is_causal:
            # The first rows of causal attention see the first keys alone: a short case in itself.
            out = run(case, self, inputs, FORWARD)[0][:, :, :CHECKED_LENGTH]
            tensors = tuple(t[:, :, :CHECKED_LENGTH] for t in inputs.tensors)
        else:
            case = case.short()
            tensors, grad_out = case.inputs()
            out = run(case, self, Inputs(tensors, grad_out), BOTH)[0]
        if self.reference is not None:
            return reference.relative_error(out, self.reference(case, tensors))
        alpha = 1.0 if self.softmax else case.alpha
        return reference.relative_error(out, case.expected(tensors, alpha))


def missing(package: str) -> str | None:
    """The reason where ``package`` cannot be imported."""
    if importlib.util.find_spec(package) is None:
        return f"the package {package} is not installed"
    return None


def entmax_package(scores: Tensor, alpha: float) -> Tensor:
    """The PyPI package ``entmax`` over the last dimension: by sorting where it can."""
    import entmax

    if alpha == 1.5:
        return entmax.entmax15(scores)
    if alpha == 2.0:
        return entmax.sparsemax(scores)
    return entmax.entmax_bisect(scores, alpha)


# Measuring


class Timing(NamedTuple):
    """Milliseconds a call over ``rounds`` calls."""

    median: float
    lowest: float
    highest: float
    rounds: int


@dataclass
class Measurement:
    """A contender on a case. ``peak_bytes``: memory of a forward and backward above the inputs
    and the output's gradient; None where it was not asked for."""

    case: Case
    contender: Contender
    error: float
    times: dict[str, Timing]
    peak_bytes: int | None = None

    @property
    def forward(self) -> float:
        """Milliseconds, median."""
        return self.times[FORWARD].median

    @property
    def both(self) -> float:
        return self.times[BOTH].median

    @property
    def backward(self) -> float:
        return self.times[BACKWARD].median

    def record(self) -> dict[str, object]:
        """As it stands in JSON."""
        return {
            "case": dataclasses.asdict(self.case),
            "contender": self.contender.name,
            "relative_error": self.error,
            "milliseconds": {mode: timing._asdict() for mode, timing in self.times.items()},
            "peak_bytes": self.peak_bytes,
        }


class LeftOut(NamedTuple):
    """A contender that does not take part in a case, and why."""

    case: Case
    contender: str
    reason: str

    def record(self) -> dict[str, object]:
        return {**self._asdict(), "case": dataclasses.asdict(self.case)}


def admit(
    cases: Iterable[Case], contenders: Iterable[Contender]
) -> tuple[list[tuple[Case, Contender]], list[LeftOut]]:
    """Who takes part in what, and who does not."""
    entrants: list[tuple[Case, Contender]] = []
    left_out: list[LeftOut] = []
    contenders = tuple(contenders)
    for case in cases:
        for contender in contenders:
            reason = contender.why_not(case)
            if reason is None:
                entrants.append((case, contender))
            else:
                left_out.append(LeftOut(case, contender.name, reason))
    return entrants, left_out


class Budget:
    """Seconds that a program may take, and what is known of who takes how long.

    ``limit``: seconds that a contender may take for the warm-up of one case.
    """

    def __init__(self, seconds: float = math.inf, limit: float = math.inf) -> None:
        self.seconds, self.limit = seconds, limit
        self._end = time.monotonic() + seconds
        self._seen: dict[tuple[str, str], _Seen] = {}  # by contender and dtype
        self._used: dict[str, float] = {}
        self._stopped: str | None = None

    def left(self) -> float:
        return 0.0 if self._stopped else max(0.0, self._end - time.monotonic())

    def over(self) -> str | None:
        return (
            None if self.left() else self._stopped or f"the {self.seconds:g} s of --budget are over"
        )

    def stop(self, reason: str) -> None:
        """Nothing more can be measured."""
        self._stopped = reason

    def for_warm_up(self) -> float:
        """What a contender may take to warm up now."""
        return min(self.limit, self.left() / 2)

    def saw(self, case: Case, contender: Contender, seconds: float, compiling: float = 0.0) -> None:
        """Notes what a call of each mode takes together, and what the next shape takes beside."""
        key = contender.name, case.dtype
        before = self._seen.get(key)
        if before and before.shape == case.shape():
            compiling = max(compiling, before.compiling)
        self._seen[key] = _Seen(case.shape(), case.work(), seconds, compiling)

    def saw_fail(self, case: Case, contender: Contender, seconds: float) -> None:
        """Notes what a warm-up took that came to nothing."""
        self._seen[contender.name, case.dtype] = _Seen(None, case.work(), 0.0, seconds)

    def used(self, contender: Contender, seconds: float) -> None:
        self._used[contender.name] = self._used.get(contender.name, 0.0) + seconds

    def why_not(self, case: Case, contender: Contender) -> str | None:
        """The reason where a case does not fit in what is left, reckoned from the last one."""
        left = self.left()
        if reason := self.over():
            return reason
        if (used := self._used.get(contender.name, 0.0)) > CONTENDER_SHARE * self.seconds:
            return f"has used its share, {used:.0f} s of --budget {self.seconds:g}"
        if seen := self._seen.get((contender.name, case.dtype)):
            call = seen.seconds * max(1.0, case.work() / seen.work)
            calls = WARM_UPS[case.device]
            if call > BUDGET_MS / 1e3:
                calls = min(calls, 2)
            warm_up = calls * call
            if case.shape() != seen.shape:
                warm_up += seen.compiling
            if warm_up >= self.for_warm_up():
                return (
                    f"would take about {warm_up:.0f} s to warm up; left are {left:.0f} s of "
                    f"--budget {self.seconds:g}, --limit is {self.limit:g} s"
                )
        return None


class _Seen(NamedTuple):
    """What a contender's last case took, in seconds."""

    shape: Case | None  # None: not compiled for
    work: float
    seconds: float
    compiling: float


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raises TimeoutError in the body once its time is over: between two Python instructions, so
    that a call into a library ends first. Does nothing where there is no SIGALRM (Windows)."""
    if not hasattr(signal, "SIGALRM") or math.isinf(seconds):
        yield
        return

    def ring(number: int, frame: object) -> None:
        raise TimeoutError(f"took more than the {seconds:.0f} s that --limit and --budget allow")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-3))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, before)


def measure(
    entrants: Sequence[tuple[Case, Contender]],
    repeats: int,
    peak_memory: bool = False,
    budget: Budget | None = None,
    left_out: list[LeftOut] | None = None,
) -> list[Measurement]:
    """Times all entrants in turn: each round calls every one once a mode.

    What slows the machine for a while then slows all of them, and their ratios stay right. An
    entrant takes part in ``repeats`` rounds, or in as many as fit in :data:`BUDGET_MS` and in the
    budget, or in one. One that fails, or does not fit in the budget, goes to ``left_out``. Only
    rounds give times: a warm-up may have compiled.
    """
    budget = Budget() if budget is None else budget
    left_out = [] if left_out is None else left_out
    inputs = {case: case.inputs() for case in dict.fromkeys(case for case, _ in entrants)}
    present: list[_Entrant] = []

    def leave_out(case: Case, contender: Contender, reason: str) -> None:
        progress(f"{contender.name}, {case}: left out, {reason}")
        left_out.append(LeftOut(case, contender.name, reason))
        if case.device == "cuda" and not budget.over() and not _gpu_works():
            budget.stop(f"the GPU fails since {contender.name} ran {case}")

    for case, contender in entrants:
        reason = budget.why_not(case, contender)
        if reason is None:
            began = time.monotonic()
            try:
                error = _warm_up(case, contender, inputs[case], budget)
            except _Failed as failed:
                reason = str(failed)
            else:
                took = time.monotonic() - began
                progress(f"{contender.name}, {case}: warm-up {took:.1f} s")
                present.append(_Entrant(case, contender, inputs[case], error, took))
        if reason is not None:
            leave_out(case, contender, reason)

    end = time.monotonic() + ROUNDS_SHARE * budget.left()
    for number in range(repeats):
        if number and time.monotonic() >= end:
            break
        for entrant in list(present):
            reason = None
            if not number and (over := budget.over()):
                reason = f"no timed round: {over}"
            else:
                try:
                    entrant.take_part()
                except Exception as failed:  # memory, say, that others took meanwhile
                    reason = _words(failed)
            if reason is not None:
                leave_out(entrant.case, entrant.contender, reason)
                present.remove(entrant)
    for entrant in present:
        entrant.tell(budget)
    return [
        Measurement(
            entrant.case,
            entrant.contender,
            entrant.error,
            {timed: summary(taken) for timed, taken in entrant.times.items()},
            _peak(entrant) if peak_memory and budget.left() else None,
        )
        for entrant in present
    ]


@dataclass(eq=False)
class _Entrant:
    """A contender on a case that has warmed up, in ``warm_up`` seconds; ``times`` of its rounds."""

    case: Case
    contender: Contender
    inputs: Inputs
    error: float
    warm_up: float
    times: dict[str, list[float]] = dataclasses.field(
        default_factory=lambda: {timed: [] for mode in MODES for timed in TIMED[mode]}
    )
    seconds: float = 0.0

    def take_part(self) -> None:
        """A round: one call of each mode that has time for another."""
        began = time.monotonic()
        for mode in MODES:
            so_far = self.times[mode]
            if not so_far or sum(so_far) + so_far[-1] <= BUDGET_MS:
                for timed, ms in parts(self.case, self.contender, self.inputs, mode).items():
                    self.times[timed].append(ms)
        self.seconds += time.monotonic() - began

    def tell(self, budget: Budget) -> None:
        """What the rounds say of the next case; who compiles once is not charged for it."""
        calls = sum(statistics.median(self.times[mode]) for mode in MODES) / 1e3
        again = self.warm_up if self.contender.tunes else 0.0
        budget.saw(self.case, self.contender, calls, again)
        warm_up = again or min(self.warm_up, WARM_UPS[self.case.device] * calls)
        budget.used(self.contender, warm_up + self.seconds)


def _gpu_works() -> bool:
    """Whether no call has spoilt it, by a wrong address say: all later ones would fail too."""
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True


def _peak(entrant: _Entrant) -> int | None:
    """Its peak memory; None where that needs more than there is."""
    try:
        return peak_bytes(entrant.case, entrant.contender)
    except RuntimeError as failed:  # torch.OutOfMemoryError is one
        progress(f"{entrant.contender.name}, {entrant.case}: no peak memory, {_words(failed)}")
        return None


class _Failed(Exception):
    """A contender failed; in words."""


def _words(failed: Exception) -> str:
    """An exception in a line."""
    lines = str(failed).strip().splitlines()
    return f"{type(failed).__name__}: {lines[0]}" if lines else type(failed).__name__


def _warm_up(case: Case, contender: Contender, inputs: Inputs, budget: Budget) -> float:
    """Its error. Calls each mode until it is warm: a first call, however long, may have compiled
    and says nothing; a later one that is long is warm enough."""
    began = time.monotonic()
    with warnings.catch_warnings(record=True) as said, time_limit(budget.for_warm_up()):
        warnings.simplefilter("always")
        try:
            error = contender.error(case, inputs)
            for mode in MODES:
                for number in range(WARM_UPS[case.device]):
                    if clock(case, contender, inputs, mode) > BUDGET_MS and number:
                        break
        except Exception as failed:  # whatever it is, it is this contender's reason
            took = time.monotonic() - began
            budget.used(contender, took)
            if isinstance(failed, TimeoutError):
                budget.saw_fail(case, contender, took)
            # SDPA says in warnings why an implementation does not run.
            words = dict.fromkeys(str(w.message).partition(" (Triggered")[0] for w in said)
            raise _Failed(" ".join([_words(failed), *words])) from failed
    return error


def summary(times: Sequence[float]) -> Timing:
    return Timing(statistics.median(times), min(times), max(times), len(times))


def clock(case: Case, contender: Contender, inputs: Inputs, mode: str) -> float:
    """Milliseconds of one call; freeing its results is not counted."""
    return parts(case, contender, inputs, mode)[mode]


def parts(case: Case, contender: Contender, inputs: Inputs, mode: str) -> dict[str, float]:
    """Milliseconds of one call, and of the backward in it if there is one."""
    if case.device == "cpu":
        marks = [time.perf_counter()]
        results = run(case, contender, inputs, mode, lambda: marks.append(time.perf_counter()))
        marks.append(time.perf_counter())
        del results
        spans = [1e3 * (end - marks[0]) for end in marks[1:]]
    else:
        torch.cuda._sleep(HOST_AHEAD_CYCLES)
        torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=case.device).zero_()
        events: list[Any] = []

        def mark() -> None:
            events.append(torch.cuda.Event(enable_timing=True))
            events[-1].record()

        mark()
        run(case, contender, inputs, mode, mark)
        mark()
        torch.cuda.synchronize()
        spans = [events[0].elapsed_time(end) for end in events[1:]]
    if mode == FORWARD:
        return {FORWARD: spans[0]}
    return {BOTH: spans[1], BACKWARD: spans[1] - spans[0]}


def run(
    case: Case,
    contender: Contender,
    inputs: Inputs,
    mode: str,
    mark: Callable[[], None] = lambda: None,
) -> tuple[Tensor, ...]:
    """One call: the output without gradients, or the output and all gradients; ``mark`` is called
    between forward and backward."""
    if mode == FORWARD:
        with torch.no_grad():
            return (contender.call(case, *inputs.tensors),)
    leaves = [t.detach().requires_grad_() for t in inputs.tensors]
    out = contender.call(case, *leaves)
    mark()
    return (out.detach(), *torch.autograd.grad(out, leaves, inputs.grad_out))


def peak_bytes(case: Case, contender: Contender) -> int:
    """Memory at the peak of a forward and backward above the inputs and the output's gradient;
    output and gradients count.

    On CUDA what torch's allocator handed out; on the CPU resident pages, in a process of its own,
    whose peak nothing else has raised.
    """
    progress(f"{contender.name}, {case}: peak memory")
    if case.device == "cuda":
        inputs = case.inputs()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run(case, contender, inputs, BOTH)
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    spawn = multiprocessing.get_context("spawn")
    receiver, sender = spawn.Pipe(duplex=False)
    arguments = (case, contender, torch.get_num_threads(), sender)
    child = spawn.Process(target=_send_peak_bytes, args=arguments)
    child.start()
    sender.close()
    try:
        peak: int = receiver.recv()
    except EOFError:
        child.join()
        raise RuntimeError(
            f"measuring the memory of {contender.name} ended with exit code "
            f"{child.exitcode} (-9: too little memory)"
        ) from None
    child.join()
    return peak


def _send_peak_bytes(case: Case, contender: Contender, threads: int, sender: Any) -> None:
    torch.set_num_threads(threads)
    short = case.short()
    run(short, contender, short.inputs(), BOTH)  # loads what is loaded at a first call
    inputs = case.inputs()
    before = _status_bytes("VmRSS")
    run(case, contender, inputs, BOTH)
    sender.send(_status_bytes("VmHWM") - before)


def no_peak_memory(device: str) -> str | None:
    """Why :func:`peak_bytes` cannot measure here; None where it can."""
    if device == "cpu" and not Path("/proc/self/status").exists():
        return "peak memory on the CPU is read from /proc/self/status, which Linux alone has"
    return None


def _status_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return 1024 * int(line.split()[1])
    raise KeyError(field)


def free_bytes(device: str) -> int:
    """Memory that can still be allocated."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return 1024 * int(line.split()[1])
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


# Targets


@dataclass(frozen=True)
class Target:
    """A number that must not pass its limit."""

    text: str
    unit: str
    measured: float
    limit: float
    at_least: bool = False

    @property
    def met(self) -> bool:
        return self.measured >= self.limit if self.at_least else self.measured <= self.limit

    def __str__(self) -> str:
        bound = "at least" if self.at_least else "at most"
        return (
            f"{'met   ' if self.met else 'MISSED'}  {self.text}: {self.measured:.3g} {self.unit}, "
            f"{bound} {self.limit:g}"
        )

    def record(self) -> dict[str, object]:
        return {**dataclasses.asdict(self), "met": self.met}


# The command line


def parser(description: str | None) -> argparse.ArgumentParser:
    """A parser with the options that every program has."""
    result = argparse.ArgumentParser(description=description)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    add = result.add_argument
    add("--device", choices=("cpu", "cuda"), default=device, help="default here: %(default)s")
    add("--alpha", type=above_one, default=1.5, help="of entmax, above 1; default %(default)s")
    add("--threads", type=positive_int, default=2, help="on the CPU; default %(default)s")
    add(
        "--repeats",
        type=positive_int,
        default=10,
        help="rounds; slow contenders get fewer; default %(default)s",
    )
    add(
        "--budget",
        type=positive,
        default=BUDGET_SECONDS,
        metavar="SECONDS",
        help="what does not fit is left out and named; default %(default)s",
    )
    add(
        "--limit",
        type=positive,
        metavar="SECONDS",
        help="for a contender to compile, tune and warm up for one case, half of what is left of "
        "the budget at most; default 60, on the CPU 20",
    )
    add("--json", type=writable, metavar="PATH", help="write environment and measurements there")
    add("--plot", type=picture, metavar="PATH", help="draw a picture (.png, .svg, .pdf) there")
    return result


def add_targets(result: argparse.ArgumentParser) -> None:
    result.add_argument(
        "--targets",
        action="store_true",
        help="judge the CPU targets; exit with 1 if one is missed",
    )


def check_device(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Ends the program where the device is not there; sets the number of threads."""
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("argument --device: torch sees no CUDA device here; allowed: cpu")
    torch.set_num_threads(options.threads)


def set_defaults(
    options: argparse.Namespace, by_device: Mapping[str, Mapping[str, object]]
) -> None:
    """Gives options that were not given their default on the device."""
    for name, value in by_device[options.device].items():
        if getattr(options, name) is None:
            setattr(options, name, value)


def positive_int(text: str) -> int:
    return int(_number(text, lambda n: n == int(n) > 0, "an integer of at least 1"))


def positive(text: str) -> float:
    return _number(text, lambda x: x > 0, "a number above 0")


def share(text: str) -> float:
    return _number(text, lambda x: 0 <= x < 1, "a number from 0 to below 1")


def above_one(text: str) -> float:
    return _number(text, lambda x: x > 1, "a number above 1")


def _number(text: str, allowed: Callable[[float], bool], words: str) -> float:
    try:
        number = float(text)
        if math.isfinite(number) and allowed(number):
            return number
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"must be {words}, got {text!r}")


def writable(text: str) -> Path:
    """A path in a folder that exists: said before minutes of measuring, not after."""
    path = Path(text)
    if path.is_dir() or not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"must be a file in a folder that exists, got {text!r}")
    return path


def picture(text: str) -> Path:
    """A writable path that :func:`draw` knows the format of."""
    path = writable(text)
    if path.suffix not in (".png", ".svg", ".pdf"):
        raise argparse.ArgumentTypeError(f"must end in .png, .svg or .pdf, got {text!r}")
    if missing("matplotlib"):
        raise argparse.ArgumentTypeError("needs the package matplotlib, which is not installed")
    return path


# Records


def progress(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def environment(device: str) -> dict[str, object]:
    """When, on what and with which versions."""
    packages = ("adasplash2", "torch", "entmax", "adasplash", "triton", "numpy")
    found: dict[str, object] = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": _commit(),
        "device": device_name(device),
        "cpu": device_name("cpu"),
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0],  # over the last minute: a busy machine spoils times
        "threads": torch.get_num_threads(),
        "system": platform.platform(),
        "python": platform.python_version(),
        **{package: _version(package) for package in packages},
        **_backend(device),
    }
    if device == "cuda":
        found["cuda"] = torch.version.cuda
        found["capability"] = ".".join(map(str, torch.cuda.get_device_capability()))
    return found


def describe(found: dict[str, object]) -> str:
    """An environment in two lines."""
    counts = f"{found['cores']} cores, {found['threads']} threads, load {found['load']:.1f}"
    names = ("adasplash2", "torch", "entmax", "adasplash", "python")
    versions = ", ".join(f"{name} {found[name]}" for name in names if found[name])
    backend = " ".join(str(found[name]) for name in ("backend", "isa") if found.get(name))
    return f"{found['date']}  {found['device']}, {counts}\n{versions}; backend {backend or 'none'}"


def device_name(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _backend(device: str) -> dict[str, object]:
    """What adasplash2 would run a small attention with."""
    tensor = torch.zeros(1, 1, 1, 1, device=device)
    explanation = adasplash2.explain(tensor, tensor, tensor)
    return {"backend": explanation.chosen, **explanation.config}


def _commit() -> str | None:
    """The git commit of this folder, with a plus sign if tracked files have been changed."""

    def git(*arguments: str) -> str:
        command = ("git", "--no-optional-locks", "-C", str(ROOT), *arguments)
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def save(
    path: Path,
    options: argparse.Namespace,
    found: dict[str, object],
    measurements: Iterable[Measurement],
    left_out: Iterable[LeftOut],
    targets: Iterable[Target] = (),
    results: Mapping[str, object] | None = None,
) -> None:
    """Writes one run as JSON; ``results`` are what a program found beside measurements."""
    run_record = {
        "program": Path(sys.argv[0]).stem,
        "arguments": vars(options),
        "environment": found,
        "measurements": [measurement.record() for measurement in measurements],
        "left_out": [entry.record() for entry in left_out],
        "targets": [target.record() for target in targets],
        "results": dict(results or {}),
    }
    path.write_text(json.dumps(run_record, indent=1, default=str) + "\n")
    progress(f"wrote {path}")


class Run:
    """One run of a program: its budget, and what it has found so far.

    ``results``: what there is beside measurements; a program puts it there before :meth:`save`.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        options.limit = options.limit or LIMIT_SECONDS[options.device]
        self.budget = Budget(options.budget, options.limit)
        self.environment = environment(options.device)
        self.measurements: list[Measurement] = []
        self.left_out: list[LeftOut] = []
        self.results: dict[str, object] = {}
        print(describe(self.environment), flush=True)

    def measure(
        self, cases: Sequence[Case], contenders: Iterable[Contender], peak_memory: bool = False
    ) -> list[Measurement]:
        """Measures who takes part and notes who does not; keeps what was found in the JSON file."""
        if reason := self.budget.over():
            self.leave_out(cases, reason)
            return []
        entrants, left_out = admit(cases, contenders)
        self.left_out += left_out
        found = measure(entrants, self.options.repeats, peak_memory, self.budget, self.left_out)
        self.measurements += found
        self.save()
        if self.options.device == "cuda" and not self.budget.over():
            torch.cuda.empty_cache()
        return found

    def leave_out(self, cases: Iterable[Case], reason: str) -> None:
        """Notes cases that nobody can take part in."""
        self.left_out += [LeftOut(case, "all", reason) for case in cases]

    def save(self, targets: Iterable[Target] = ()) -> None:
        """Writes ``--json`` if it was asked for."""
        if self.options.json:
            save(
                self.options.json,
                self.options,
                self.environment,
                self.measurements,
                self.left_out,
                targets,
                self.results,
            )

    def report(self, text: str) -> None:
        """Prints a table and, below it, who was left out and why."""
        print(f"\n{text}")
        for line in absences(self.left_out):
            print(line)

    def footer(self) -> str:
        """Where and when, for below a picture."""
        found = self.environment
        threads = f", {found['threads']} threads" if self.options.device == "cpu" else ""
        return (
            f"{found['device']}{threads}, {str(found['date'])[:10]}, torch {found['torch']}, "
            f"adasplash2 {found['adasplash2']} ({str(found['commit'])[:7]}), "
            f"alpha {self.options.alpha:g}"
        )


# Tables and plots


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Aligned columns: words to the left, numbers to the right."""
    cells = [tuple(head), *map(tuple, rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    is_word = [
        any(cell[:1].isalpha() for cell in column[1:]) for column in zip(*cells, strict=True)
    ]

    def line(row: Sequence[str]) -> str:
        aligned = (
            cell.ljust(width) if word else cell.rjust(width)
            for cell, width, word in zip(row, widths, is_word, strict=True)
        )
        return "  ".join(aligned).rstrip()

    return "\n".join([line(cells[0]), "  ".join("-" * w for w in widths), *map(line, cells[1:])])


def digits(number: float | None) -> str:
    """Three significant digits without an exponent; a dash for nothing."""
    if number is None:
        return "-"
    places = max(0, 2 - math.floor(math.log10(number))) if number > 0 else 0
    return f"{number:.{min(places, 5)}f}"


def ratios(times: dict[str, Timing], base: dict[str, Timing] | None) -> list[str]:
    """Cells: each mode's median in units of that of ``base``; dashes where it is not there."""
    return [digits(times[mode].median / base[mode].median if base else None) for mode in MODES]


def absences(left_out: Sequence[LeftOut]) -> list[str]:
    """Who was left out, where and why: a line a contender and reason."""
    absent: dict[tuple[str, str], list[str]] = {}
    for case, contender, reason in left_out:
        absent.setdefault((contender, reason), []).append(str(case))
    everywhere = {str(entry.case) for entry in left_out}
    return [
        f"left out: {contender}: {reason}"
        + ("" if len(where) == len(everywhere) > 1 else f" (at {_listed(where)})")
        for (contender, reason), where in absent.items()
    ]


def _listed(where: Sequence[str], most: int = 3) -> str:
    more = [f"{len(where) - most} more"] if len(where) > most else []
    return "; ".join([*where[:most], *more])


COLOURS = {
    "adasplash2-cuda": "#c1272d",
    "adasplash2-triton": "#e8871e",
    "adasplash2-cpu": "#c1272d",
    "sdpa": "#1f4e8c",
    "sdpa-flash": "#1f4e8c",
    "sdpa-cudnn": "#2a9d8f",
    "sdpa-efficient": "#7fb2e5",
    "flex": "#8e5ea2",
    "adasplash-v1": "#9a9a3c",
    "adasplash-v2": "#5c5c1c",
    "dense": "#777777",
}
"""A contender has one colour in all pictures; others take those of the cycle."""


def colours(names: Iterable[str]) -> dict[str, str]:
    spare = (f"C{i}" for i in range(100))
    return {name: COLOURS.get(name) or next(spare) for name in dict.fromkeys(names)}


class Line(NamedTuple):
    """One line of a panel; lines of one ``name`` share a colour and a place in the legend."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    dashed: bool = False


@contextlib.contextmanager
def canvas(
    path: Path,
    title: str,
    footer: str,
    columns: int,
    width: float = 4.8,
    share_y: bool = True,
    rows: int = 1,
) -> Iterator[Any]:
    """Gives a figure and its axes, row by row; saves it in the format of the path's suffix, with
    one legend for all axes below them, where it covers nothing."""
    from matplotlib.figure import Figure

    size = max(9.0, 1.2 + width * columns), 1.2 + 3.8 * rows
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(rows, columns, sharey=share_y, squeeze=False).flatten()
    yield figure, axes
    entries: dict[str, Any] = {}
    for axis in axes:
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            entries.setdefault(label, handle)
    widest = max(map(len, entries), default=0)
    figure.suptitle(title, fontweight="bold")
    figure.legend(
        entries.values(),
        entries.keys(),
        loc="outside lower center",
        ncols=max(1, min(len(entries), int(size[0] / (0.7 + 0.1 * widest)))),
        title=footer,
        title_fontsize=7,
        frameon=False,
    )
    figure.savefig(path, dpi=130)
    progress(f"wrote {path}")


def draw(
    path: Path,
    title: str,
    panels: dict[str, list[Line]],
    x_label: str,
    y_label: str,
    footer: str = "",
    x_log: bool = True,
    palette: Mapping[str, str] | None = None,
    mark: float | None = None,
    rows: int = 1,
) -> None:
    """Panels of lines with one logarithmic vertical scale; ``mark`` is a height to show dotted."""
    names = dict.fromkeys(line.name for lines in panels.values() for line in lines)
    colour = colours(names) | dict(palette or {})
    columns = -(-len(panels) // rows)
    with canvas(path, title, footer, columns, rows=rows) as (_, axes):
        for spare in axes[len(panels) :]:
            spare.set_axis_off()
        for axis, (heading, lines) in zip(axes, panels.items(), strict=False):
            if mark is not None:
                axis.axhline(mark, color="0.5", linestyle=":")
            for line in lines:
                axis.plot(
                    line.x,
                    line.y,
                    color=colour[line.name],
                    linestyle="--" if line.dashed else "-",
                    marker="o",
                    markersize=4,
                    label=None if line.dashed and _has_solid(line, lines) else line.name,
                )
            axis.set(title=heading, xlabel=x_label, yscale="log")
            if x_log:
                axis.set_xscale("log")
                ticks = sorted({x for line in lines for x in line.x})
                axis.set_xticks(ticks, [f"{tick:,.0f}" for tick in ticks], rotation=30)
                axis.set_xticks([], minor=True)
        for axis in axes[::columns]:
            axis.set_ylabel(y_label)


def _has_solid(line: Line, lines: Sequence[Line]) -> bool:
    return any(other.name == line.name and not other.dashed for other in lines)
