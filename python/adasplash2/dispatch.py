"""Which backend runs a problem, and why not the others: decided here and nowhere else.

Backends are modules named in :data:`adasplash2.backends.REGISTRY`, imported when first asked.
The first one that can run here and has nothing against the problem wins; a name given to
``backend=`` or in the environment variable ``ADASPLASH2_BACKEND`` (read at import) asks that one
alone. ``ADASPLASH2_LOG=debug`` tells every new decision on standard error.
"""

from __future__ import annotations

import functools
import importlib
import logging
import os
import warnings
from dataclasses import dataclass
from typing import NamedTuple, cast

from adasplash2.backends import REGISTRY
from adasplash2.contract import Backend, Config
from adasplash2.problem import Problem, RowProblem

logger = logging.getLogger("adasplash2")

FORCED = os.environ.get("ADASPLASH2_BACKEND") or None
"""The backend that the environment forces; an argument ``backend=`` goes before it."""

CACHED_DECISIONS = 4096
"""Problems whose decision is remembered, about 1 kB each; decoding meets a new one a token."""


class Choice(NamedTuple):
    """What runs a problem: a backend's module and one of its configurations."""

    backend: Backend
    config: Config


@dataclass(frozen=True, slots=True)
class BackendStatus:
    """Whether a backend can run anything on this machine.

    Attributes:
        name: as ``backend=`` takes it.
        usable: True if it can.
        reason: why, or why not, in a sentence.
    """

    name: str
    usable: bool
    reason: str

    def __str__(self) -> str:
        return f"{self.name}: {'usable' if self.usable else 'not usable'}, {self.reason}"


@dataclass(frozen=True, slots=True)
class Answer:
    """What one backend says to one problem: ``reasons`` against it, none if it can run it."""

    name: str
    reasons: tuple[str, ...]


class BackendRefused(ValueError):
    """No backend that was asked can run the problem.

    Attributes:
        answers: what each backend that was asked has against it.
    """

    def __init__(self, problem: Problem | RowProblem, answers: tuple[Answer, ...]) -> None:
        self.answers = answers
        asked = f"backend {answers[0].name!r}" if len(answers) == 1 else "no backend"
        verb = "cannot run" if len(answers) == 1 else "can run"
        lines = [f"{asked} {verb} {describe(problem)}"]
        lines += [f"  {answer.name}: {reason}" for answer in answers for reason in answer.reasons]
        super().__init__("\n".join(lines))


@dataclass(frozen=True, slots=True)
class Explanation:
    """Which backend runs a call, with which configuration, and why not the others.

    Prints as a table.

    Attributes:
        problem: the call in words.
        chosen: name of what runs it; None where nothing can, and the call would raise.
        config: the configuration it runs with.
        others: name of every backend that is not chosen, and why.
        notes: what is worth knowing beside, such as copies that are made.
    """

    problem: str
    chosen: str | None
    config: Config
    others: tuple[tuple[str, tuple[str, ...]], ...] = ()
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        config = ", ".join(f"{key}={value}" for key, value in self.config.items())
        rows = [("call", self.problem), ("chosen", self.chosen or "nothing: the call raises")]
        if config:
            rows.append(("config", config))
        rows += [("note", note) for note in self.notes]
        rows += [(f"not {name}", reason) for name, reasons in self.others for reason in reasons]
        width = max(len(head) for head, _ in rows)
        return "\n".join(f"{head:<{width}}  {text}" for head, text in rows)


def choose(problem: Problem | RowProblem, backend: str | None = None) -> Choice:
    """The backend and configuration for ``problem``; ``backend`` forces one by name.

    The answer to equal arguments is the same throughout a process: the forward and the backward
    of one call ask separately and must meet in the same backend.

    Raises:
        ValueError: there is no backend of that name.
        BackendRefused: none that was asked can run the problem.
    """
    return _decide(problem, FORCED if backend is None else backend)


def explain(problem: Problem | RowProblem, backend: str | None = None) -> Explanation:
    """What :func:`choose` decides, and what every other backend says.

    Raises:
        ValueError: there is no backend of that name.
    """
    forced = FORCED if backend is None else backend
    try:
        choice = _decide(problem, forced)
    except BackendRefused:
        chosen, config = None, cast(Config, {})
    else:
        chosen, config = choice.backend.name, choice.config
    preferred = f"not asked, {forced!r} is forced" if forced else f"could, but {chosen!r} is first"
    others = tuple(
        (answer.name, answer.reasons or (preferred,))
        for answer in (_ask(name, problem) for name in REGISTRY)
        if answer.name != chosen
    )
    strided = problem.strided if isinstance(problem, Problem) else ()
    notes = tuple(f"{name} is copied once: its head_dim stride is not 1" for name in strided)
    return Explanation(describe(problem), chosen, config, others, notes)


def available_backends() -> list[BackendStatus]:
    """Every backend there is, in the order in which they are asked, usable here or not."""
    statuses = []
    for name in REGISTRY:
        module, reason = _load(name)
        statuses.append(BackendStatus(name, module is not None, reason))
    return statuses


def describe(problem: Problem | RowProblem) -> str:
    """``problem`` in a line."""
    kind = f"{str(problem.dtype).removeprefix('torch.')} on {problem.device}"
    gradient = "with" if problem.needs_grad else "without"
    tail = f"{kind}, alpha={problem.alpha:g}, {gradient} gradient"
    if isinstance(problem, RowProblem):
        return f"entmax of {problem.rows} rows of {problem.length}, {tail}"
    p = problem
    query = (p.batch, p.heads_q, p.length_q, p.head_dim)
    key = (p.batch, p.heads_kv, p.length_k, p.head_dim)
    value = (p.batch, p.heads_kv, p.length_k, p.head_dim_v)
    causal = "causal" if p.scores.is_causal else "not causal"
    return f"attention of query {query}, key {key}, value {value}, {causal}, {tail}"


def forget() -> None:
    """Ask every backend anew, as after a change of the registry."""
    _load.cache_clear()
    _decide.cache_clear()


@functools.cache
def _load(name: str) -> tuple[Backend | None, str]:
    """The module of a backend, or None, and why it is or is not usable."""
    try:
        module = cast(Backend, importlib.import_module(REGISTRY[name]))
    except Exception as error:  # a broken installation raises whatever it likes
        return None, f"its module does not import ({type(error).__name__}: {error})"
    reason = module.unavailable()
    return (module, "ready") if reason is None else (None, reason)


def _ask(name: str, problem: Problem | RowProblem) -> Answer:
    module, reason = _load(name)
    return Answer(name, (reason,) if module is None else tuple(module.refusals(problem)))


@functools.lru_cache(maxsize=CACHED_DECISIONS)
def _decide(problem: Problem | RowProblem, forced: str | None) -> Choice:
    if forced is not None and forced not in REGISTRY:
        names = ", ".join(repr(name) for name in REGISTRY)
        source = " from ADASPLASH2_BACKEND" if forced == FORCED else ""
        raise ValueError(f"backend must be None or one of {names}, got {forced!r}{source}")
    answers = []
    for name in REGISTRY if forced is None else (forced,):
        answer = _ask(name, problem)
        module, _ = _load(name)
        if module is not None and not answer.reasons:
            choice = Choice(module, module.configs(problem)[0])
            logger.debug("%s: %s %s", describe(problem), name, dict(choice.config))
            return choice
        answers.append(answer)
    raise BackendRefused(problem, tuple(answers))


def _log_to_stderr(level: str) -> None:
    """Show the library's log from ``level`` on; a program that sets up logging needs it not."""
    number = logging.getLevelNamesMapping().get(level.upper())
    if number is None:
        warnings.warn(f"ADASPLASH2_LOG must be a level such as debug, got {level!r}", stacklevel=2)
        return
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(name)s %(levelname)s: %(message)s"))
    logger.addHandler(handler)
    logger.setLevel(number)


if os.environ.get("ADASPLASH2_LOG"):
    _log_to_stderr(os.environ["ADASPLASH2_LOG"])
