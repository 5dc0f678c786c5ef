"""The time of one call."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from harness.cases import Case, Inputs
from harness.contender import BACKWARD, BOTH, FORWARD, Contender, run

TIMED = {FORWARD: (FORWARD,), BOTH: (BOTH, BACKWARD)}
"""What a call of a mode gives times of."""

FLUSH_BYTES = 256 * 2**20
"""Written before each call timed on CUDA: more than any L2 cache holds, so that calls start from
one state."""

HOST_AHEAD_CYCLES = 5_000_000
"""Clock ticks, about 3 ms, that the GPU idles before that, so that a call has been enqueued when
its turn comes: what is timed is the GPU's work, as within a model, where the host runs ahead. What
the host takes longer than that, or where it waits for the GPU, counts. ``overhead.py`` measures
the host's own work."""


class Timing(NamedTuple):
    """Milliseconds a call over ``rounds`` calls."""

    median: float
    lowest: float
    highest: float
    rounds: int


def summary(times: Sequence[float]) -> Timing:
    return Timing(statistics.median(times), min(times), max(times), len(times))


WARM_UPS = 3
"""Rounds of :func:`side_by_side` that are not counted."""


def side_by_side(
    calls: dict[str, Callable[[], object]], device: str, rounds: int
) -> dict[str, Timing]:
    """Calls made in turn: on a GPU, the time of its work."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(WARM_UPS + rounds):
        for name, call in calls.items():
            if device == "cuda":
                torch.cuda._sleep(HOST_AHEAD_CYCLES)
                torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=device).zero_()
                begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                begin.record()
                call()
                end.record()
                torch.cuda.synchronize()
                taken = begin.elapsed_time(end)
            else:
                began = time.perf_counter()
                call()
                taken = 1e3 * (time.perf_counter() - began)
            if turn >= WARM_UPS:
                times[name].append(taken)
    return {name: summary(taken) for name, taken in times.items()}


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
