"""Contenders on their cases: warmed up, then timed in turn, in rounds."""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from harness.budget import BUDGET_MS, WARM_UPS, Budget, time_limit
from harness.cases import Case, Inputs
from harness.contender import BACKWARD, BOTH, FORWARD, MODES, Contender, LeftOut
from harness.memory import peak_bytes
from harness.tables import progress
from harness.timing import TIMED, Timing, clock, parts, summary

ROUNDS_SHARE = 0.25
"""Part of what is left of the budget that the rounds of one group of cases may take."""


def _not_here(*_: Any) -> Tensor:
    raise NotImplementedError("this contender was read from results")


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

    @classmethod
    def of(cls, record: Mapping[str, Any], case: type[Case]) -> Measurement:
        """From :meth:`record`. Its contender has a name alone: nothing is measured again."""
        times = {mode: Timing(**timing) for mode, timing in record["milliseconds"].items()}
        contender = Contender(record["contender"], _not_here)
        error, peak = record["relative_error"], record["peak_bytes"]
        return cls(case(**record["case"]), contender, error, times, peak)

    def record(self) -> dict[str, object]:
        """As it stands in JSON."""
        return {
            "case": asdict(self.case),
            "contender": self.contender.name,
            "relative_error": self.error,
            "milliseconds": {mode: timing._asdict() for mode, timing in self.times.items()},
            "peak_bytes": self.peak_bytes,
        }


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
    times: dict[str, list[float]] = field(
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
