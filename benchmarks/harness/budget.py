"""The seconds that a program and its contenders may take."""

from __future__ import annotations

import contextlib
import math
import signal
import time
from collections.abc import Iterator
from typing import NamedTuple

from harness.cases import Case
from harness.contender import Contender

BUDGET_MS = 3_000.0
"""Time that the rounds of one contender and mode may take: dense attention needs seconds a call,
and all others would wait for as many of its rounds as of their own. A call that takes longer is
timed once."""

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
