"""Which backend runs a problem, and why not the others: decided here and nowhere else.

Backends are modules named in :data:`adasplash2.backends.REGISTRY`, imported when first asked.
The first one that can run here and has nothing against the problem wins, unless the records of
:mod:`adasplash2.records` say that another one is faster for this class of problems. A name given
to ``backend=`` or in the environment variable ``ADASPLASH2_BACKEND`` asks that one alone.

``ADASPLASH2_AUTOTUNE`` says what measurements are for: ``off`` ignores them, ``cached`` uses those
that are there, ``on`` makes those that are not when a class is first met.
``ADASPLASH2_LOG=debug`` tells every new decision on standard error. All are read at import.
"""

from __future__ import annotations

import functools
import importlib
import logging
import os
import threading
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any, NamedTuple, cast

import torch

from adasplash2 import backends as registry
from adasplash2 import cache
from adasplash2.contract import Backend, Config
from adasplash2.failures import may_pass
from adasplash2.options import check_backend
from adasplash2.problem import (
    FEW,
    Inputs,
    Kind,
    Problem,
    RowProblem,
    by_kind,
    is_known_to_sdpa,
)
from adasplash2.records import Record, Store, problem_class

logger = logging.getLogger("adasplash2")

FORCED = os.environ.get("ADASPLASH2_BACKEND") or None
"""The backend that the environment forces; an argument ``backend=`` goes before it."""


def _warn_of_setting(name: str, allowed: str, value: str) -> None:
    """As coming from the environment: no line of source is at fault, and neither its path nor one
    in ``value`` is for who reads the output."""
    given = "a path" if os.sep in value else repr(value)
    warnings.warn_explicit(f"{name} must be {allowed}, got {given}", UserWarning, "environment", 1)


AUTOTUNE_MODES = ("off", "cached", "on")
AUTOTUNE = os.environ.get("ADASPLASH2_AUTOTUNE") or "cached"
if AUTOTUNE not in AUTOTUNE_MODES:
    _warn_of_setting("ADASPLASH2_AUTOTUNE", "off, cached or on (cached is taken)", AUTOTUNE)
    AUTOTUNE = "cached"

AUTOTUNE_SECONDS = 20.0
"""What a first call may wait for measurements with ``ADASPLASH2_AUTOTUNE=on``."""

CACHED_DECISIONS = 4096
"""Kinds of problems whose decision is remembered, about 1 kB each."""


class Choice(NamedTuple):
    """What runs a problem: a backend's module, one of its configurations, and why."""

    backend: Backend
    config: Config
    why: str

    def __reduce__(self) -> tuple[Any, ...]:
        """By the module's name: modules cannot be copied."""
        return _choice, (cast(ModuleType, self.backend).__name__, self.config, self.why)


def _choice(module: str, config: Config, why: str) -> Choice:
    return Choice(cast(Backend, importlib.import_module(module)), config, why)


@dataclass(frozen=True, slots=True)
class BackendStatus:
    """Whether a backend can run anything on this machine.

    Attributes:
        name: as ``backend=`` takes it.
        usable: True if it can.
        reason: why, or why not, in a sentence.

    Example:
        >>> import adasplash2
        >>> status = adasplash2.available_backends()[-1]
        >>> status.name, status.usable
        ('cpu', True)
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

    Example:
        >>> import torch, adasplash2
        >>> q = torch.randn(1, 1, 4, 8, dtype=torch.float64)
        >>> try:
        ...     adasplash2.entmax_attention(q, q, q, backend="cuda")
        ... except adasplash2.BackendRefused as error:
        ...     print([answer.name for answer in error.answers])
        ['cuda']
    """

    def __init__(self, message: str, answers: tuple[Answer, ...] = ()) -> None:
        super().__init__(message)  # alone, as copying and pickling an exception expect
        self.answers = answers

    @staticmethod
    def of(problem: Problem | RowProblem, answers: tuple[Answer, ...]) -> BackendRefused:
        """That all of ``answers`` are against ``problem``."""
        asked = f"backend {answers[0].name!r}" if len(answers) == 1 else "no backend"
        verb = "cannot run" if len(answers) == 1 else "can run"
        lines = [f"{asked} {verb} {describe(problem)}"]
        lines += [f"  {answer.name}: {reason}" for answer in answers for reason in answer.reasons]
        return BackendRefused("\n".join(lines), answers)


@dataclass(frozen=True, slots=True)
class Explanation:
    """Which backend runs a call, with which configuration, and why not the others.

    Prints as a table.

    Attributes:
        problem: the call in words.
        chosen: name of what runs it; ``"nothing"`` where there is nothing to compute, None where
            nothing can, and the call would raise.
        config: the configuration it runs with.
        others: name of every backend that is not chosen, and why.
        notes: what is worth knowing beside, such as copies that are made.
        why: what the choice rests on, a measurement or the order of the registry.

    Example:
        >>> import torch, adasplash2
        >>> q = torch.randn(1, 1, 4, 8)
        >>> explanation = adasplash2.explain(q, q, q)
        >>> explanation.chosen, [name for name, reasons in explanation.others]
        ('cpu', ['cuda', 'triton'])
    """

    problem: str
    chosen: str | None
    config: Config
    others: tuple[tuple[str, tuple[str, ...]], ...] = ()
    notes: tuple[str, ...] = ()
    why: str = ""

    def rows(self) -> list[tuple[str, str]]:
        """What it prints, as heads and texts."""
        config = ", ".join(f"{key}={value}" for key, value in self.config.items())
        rows = [("call", self.problem), ("chosen", self.chosen or "nothing: the call raises")]
        if self.why:
            rows.append(("because", self.why))
        if config:
            rows.append(("config", config))
        rows += [("note", note) for note in self.notes]
        rows += [(f"not {name}", reason) for name, reasons in self.others for reason in reasons]
        return rows

    def __str__(self) -> str:
        rows = self.rows()
        width = max(len(head) for head, _ in rows)
        return "\n".join(f"{head:<{width}}  {text}" for head, text in rows)


NOTHING = "nothing"
"""What runs a problem without a pair of a query and a key, or without a score."""


def choose(problem: Problem | RowProblem, backend: str | None = None) -> Choice:
    """The backend and configuration for ``problem``; ``backend`` forces one by name.

    The answer to problems of one kind is the same throughout a process, whatever is measured
    meanwhile: the forward and the backward of one call ask separately and must meet in the same
    backend and configuration. Except that of a problem without gradient, which nothing has to
    meet, where a backend could not be asked for a reason that may pass.

    Raises:
        ValueError: there is no backend of that name.
        BackendRefused: none that was asked can run the problem.
    """
    forced = FORCED if backend is None else backend
    try:
        return _decide(problem, forced)
    except _Passing as passing:
        return passing.choice


def saved_bound(problem: Problem, backend: str | None = None) -> int:
    """Bytes that suffice for ``Forward.saved`` whichever backend runs ``problem``: what is compiled
    for them is kept on disk, and may be run where something else was measured or is forced.
    Lengths and heads may be symbols.

    Raises:
        ValueError: there is no backend of that name.
    """
    check_backend(backend)
    modules = (_load(name).module for name in ((backend,) if backend else registry.REGISTRY))
    bounds = [module.saved_bound(problem) for module in modules if module is not None]
    concerned = [bound for bound in bounds if not isinstance(bound, int) or bound > 0]
    return functools.reduce(torch.sym_max, concerned) if concerned else 0


def explain(
    problem: Problem | RowProblem, backend: str | None = None, inputs: Inputs | None = None
) -> Explanation:
    """What :func:`choose` decides, and what every other backend says; of ``inputs``, where these
    are known, also what the backend notes.

    Raises:
        ValueError: there is no backend of that name.
    """
    if problem.is_empty:
        note = "there is nothing to compute: no backend is asked"
        return Explanation(describe(problem), NOTHING, {}, notes=(note,))
    if problem.alpha == 1.0:
        return Explanation(
            problem=describe(problem),
            chosen=_softmax_by(problem),
            config={},
            notes=("alpha = 1 is softmax: no backend is asked",),
        )
    forced = FORCED if backend is None else backend
    try:
        choice = choose(problem, backend)
    except BackendRefused:
        chosen, config, why = None, cast(Config, {}), ""
    else:
        chosen, config, why = choice.backend.name, choice.config, choice.why
    others = []
    for name in registry.REGISTRY:
        if name != chosen:
            reasons = _ask(name, problem).reasons
            if forced:
                could = f"not asked, {forced!r} is forced"
            elif not reasons and (record := _record(problem, name)) is not None:
                could = f"could, measured {record.milliseconds:.3g} ms"
            else:
                could = f"could, but {chosen!r} is first"
            others.append((name, reasons or (could,)))
    strided = problem.strided if isinstance(problem, Problem) else ()
    notes = tuple(f"{name} is copied once: its head_dim stride is not 1" for name in strided)
    if inputs is not None and chosen is not None:
        notes += tuple(choice.backend.notes(problem, inputs, config))
    return Explanation(describe(problem), chosen, config, tuple(others), notes, why)


def _softmax_by(problem: Problem | RowProblem) -> str:
    """What of torch runs a problem whose alpha is 1."""
    if isinstance(problem, RowProblem):
        return "torch.softmax"
    if is_known_to_sdpa(problem):
        return "torch.nn.functional.scaled_dot_product_attention"
    ways = [
        *(["SDPA for each packed sequence"] if problem.operand("ranges") else []),
        "its kernel for packed sequences and windows",
        "its operators, some queries at a time",
    ]
    return f"torch: the first that computes all of it of {', '.join(ways)}"


def available_backends() -> list[BackendStatus]:
    """Every backend there is, usable here or not, in the order in which most calls ask them:
    for some ``triton`` is asked before ``cuda``.

    Example:
        >>> import adasplash2
        >>> [status.name for status in adasplash2.available_backends()]
        ['cuda', 'triton', 'cpu']
    """
    statuses = []
    for name in registry.REGISTRY:
        found = _load(name)
        statuses.append(BackendStatus(name, found.module is not None, found.reason))
    return statuses


def describe(problem: Problem | RowProblem) -> str:
    """``problem`` in a line."""
    kind = f"{str(problem.dtype).removeprefix('torch.')} on {problem.device}"
    gradient = "with" if problem.needs_grad else "without"
    # Where it is a tensor, the features say so.
    alpha = "" if "alpha as a tensor" in problem.features else f", alpha={problem.alpha:g}"
    tail = f"{kind}{alpha}, {gradient} gradient"
    asked = "".join(f", {feature}" for feature in problem.features)
    if isinstance(problem, RowProblem):
        return f"entmax of {problem.rows} rows of {problem.length}{asked}, {tail}"
    p = problem
    query = (p.batch, p.heads_q, p.length_q, p.head_dim)
    key = (p.batch, p.heads_kv, p.length_k, p.head_dim)
    value = (p.batch, p.heads_kv, p.length_k, p.head_dim_v)
    # Ranges hold what is causal, too: whether it is, they do not say.
    causal = ", causal" if p.scores.is_causal else ", not causal"
    causal = "" if p.operand("ranges") else causal
    return f"attention of query {query}, key {key}, value {value}{causal}{asked}, {tail}"


def able(problem: Problem | RowProblem, backend: str | None = None) -> dict[str, Backend]:
    """The backends that can run ``problem``, by name; of these alone ``backend`` if it is given."""
    found = {}
    for name in registry.REGISTRY if backend is None else (backend,):
        module = _load(name).module
        if module is not None and not module.refusals(problem):
            found[name] = module
    return found


def usable() -> dict[str, Backend]:
    """The backends that can run something here, by name."""
    loaded = {name: _load(name).module for name in registry.REGISTRY}
    return {name: module for name, module in loaded.items() if module is not None}


def forget() -> None:
    """Ask every backend anew and read records anew, as after a change of the registry. Not between
    a forward and its backward, which must meet in the same decision."""
    _loaded.clear()
    _decide.cache_clear()
    _held.clear()
    _stores.clear()
    _seen.clear()


class _Loaded(NamedTuple):
    """The module of a backend, or None, why it is or is not usable, and whether that stays so."""

    module: Backend | None
    reason: str
    is_final: bool = True


_loaded: dict[str, _Loaded] = {}
"""What is final of what was found about backends."""


def _load(name: str) -> _Loaded:
    found = _loaded.get(name)
    if found is None:
        found = _look(name)
        if found.is_final:
            _loaded[name] = found
    return found


def _look(name: str) -> _Loaded:
    try:
        module = cast(Backend, importlib.import_module(registry.REGISTRY[name]))
    except Exception as error:  # a broken installation raises whatever it likes
        reason = f"its module does not import ({type(error).__name__}: {error})"
        return _Loaded(None, reason, not may_pass(error))
    try:
        against = module.unavailable()
    except Exception as error:
        reason = f"it cannot tell whether it can run here ({type(error).__name__}: {error})"
        return _Loaded(None, reason, not may_pass(error))
    return _Loaded(module, "ready") if against is None else _Loaded(None, against)


def _ask(name: str, problem: Problem | RowProblem) -> Answer:
    found = _load(name)
    module = found.module
    return Answer(name, (found.reason,) if module is None else tuple(module.refusals(problem)))


class _Passing(Exception):
    """A decision that is not to be remembered."""

    def __init__(self, choice: Choice) -> None:
        super().__init__(choice)
        self.choice = choice


_held: dict[tuple[Kind, str | None], Choice] = {}
"""Decisions about calls with a backward that were made while a backend could not be asked: they
hold, also when it can."""


SHORT, SHORT_CAUSAL = 512, 2048
"""Keys up to which rows are short, see :func:`_asked`."""


def _asked(problem: Problem | RowProblem) -> tuple[str, ...]:
    """The backends in the order in which they are asked without measurements: that of the registry,
    but ``triton`` first where on an H100 it was the faster one, or on an H200 where models train.
    Steps of ``cuda`` and of ``triton``, in ms (``benchmarks/results/2026-11-28-h200-evening.txt``,
    ``2026-11-27-h100-first-choice.txt``):

    - up to 512 keys: 0.91 and 0.73 (512 keys, sharpness 1); not so of 1,024: 1.37 and 1.36, and
      0.80 and 1.25 at sharpness 4;
    - up to 2,048 of causal rows: a byte model of 16 sequences 113 and 106, clustered rows 1.8 and
      1.2, sharpness 1 1.9 and 1.4; only where a row keeps a handful of scattered keys it loses,
      0.8 and 1.3. Of 8,192 a byte model takes 130 and 155;
    - few queries without gradients, which ``triton`` cuts by keys;
    - an alpha that ``cuda`` has no closed form for: 26.8 and 10.7 (4,096 keys, alpha 1.25).
    """
    names = tuple(registry.REGISTRY)
    if isinstance(problem, RowProblem):
        return names
    decoded = problem.length_q <= FEW and not problem.needs_grad
    short = SHORT_CAUSAL if problem.scores.is_causal else SHORT
    if problem.length_k <= short or decoded or problem.alpha not in (1.5, 2.0):
        return tuple(sorted(names, key=lambda name: name != "triton"))
    return names


@by_kind(CACHED_DECISIONS)
def _decide(problem: Problem | RowProblem, forced: str | None) -> Choice:
    """
    Raises:
        _Passing: with the decision, where it may be another at the next call.
    """
    if (held := _held.get((problem.kind, forced))) is not None:
        return held
    if forced is not None:
        check_backend(forced, " from ADASPLASH2_BACKEND" if forced == FORCED else "")
    names = _asked(problem) if forced is None else (forced,)
    answers: list[Answer] = []
    for name in names:
        answer = _ask(name, problem)
        if not answer.reasons:
            break
        answers.append(answer)
    else:
        raise BackendRefused.of(problem, tuple(answers))
    if AUTOTUNE == "on":
        _tune_once(problem, forced)
    # The first that can holds its place until one behind it has been measured to be faster: what
    # has no record is not even imported.
    record = _record(problem, name)
    if record is not None:
        for other in names[len(answers) + 1 :]:
            rival = _record(problem, other)
            if rival is None or rival.milliseconds >= record.milliseconds:
                continue
            if not _ask(other, problem).reasons:
                name, record = other, rival
    module = cast(Backend, _load(name).module)
    configs = module.configs(problem)
    tuned = record is not None and record.config in configs
    config = record.config if record is not None and tuned else configs[0]
    choice = Choice(module, config, _why(record, forced))
    if logger.isEnabledFor(logging.DEBUG):
        logger.debug("%s: %s %s, %s", describe(problem), name, dict(config), choice.why)
    asked = names[: names.index(name) + 1]
    if any(other not in _loaded for other in asked):
        if problem.needs_grad:
            _held[problem.kind, forced] = choice
        else:
            raise _Passing(choice)
    elif AUTOTUNE != "off" and not _is_seen(problem, name):
        raise _Passing(choice)
    return choice


def _why(record: Record | None, forced: str | None) -> str:
    measured = f"measured {record.milliseconds:.3g} ms for its class" if record else ""
    if forced:
        return f"forced; {measured}" if measured else "forced"
    return measured or "the first that can, nothing measured for its class"


# Records, as this process first saw them

_seen: dict[tuple[torch.device, str], dict[str, Record | None]] = {}
"""By device and class, then backend: what was known when first asked, and holds from then on."""

_seen_lock = threading.RLock()


_stores: dict[torch.device, Store] = {}


def _store(device: torch.device) -> Store:
    """The records of ``device``.

    Raises:
        Exception: they cannot be read now, for a reason that may pass.
    """
    with _seen_lock:
        if device not in _stores:
            _stores[device] = Store(device)
        return _stores[device]


def _record(problem: Problem | RowProblem, name: str) -> Record | None:
    """The record of a backend for the class of ``problem``. The answer is the same throughout a
    process, but where something that may pass keeps it from being read and no backward has to meet
    in it."""
    if AUTOTUNE == "off":
        return None
    label = problem_class(problem)
    with _seen_lock:
        seen = _seen.setdefault((problem.device, label), {})
        if name not in seen:
            try:
                store = _store(problem.device)
                module = _load(name).module if name in store.names(label) else None
                found = None if module is None else store.find(label, module)
            except Exception as error:  # whatever versions are read from
                cache.warn(f"adasplash2 cannot read measured speeds of {name!r} ({error})")
                if may_pass(error) and not problem.needs_grad:
                    return None
                found = None
            seen[name] = found
        return seen[name]


def _is_seen(problem: Problem | RowProblem, name: str) -> bool:
    return name in _seen.get((problem.device, problem_class(problem)), {})


def _tune_once(problem: Problem | RowProblem, forced: str | None) -> None:
    """Measure what can run ``problem`` and has no record yet, before anyone has asked for it."""
    label = problem_class(problem)
    with _seen_lock:
        seen = _seen.setdefault((problem.device, label), {})
        missing = {
            name: module
            for name, module in able(problem, forced).items()
            if name not in seen and _record(problem, name) is None
        }
        if not missing or _is_capturing(problem.device):
            return
        logger.info("measuring %s for %s", ", ".join(missing), label)
        found = _in_a_thread(functools.partial(_measure, problem, missing))
        try:
            _store(problem.device).add(found)
        except Exception as error:
            cache.warn(f"adasplash2 cannot keep measured speeds ({error})")
        for record in found:
            seen[record.backend] = record


def _measure(problem: Problem | RowProblem, backends: dict[str, Backend]) -> list[Record]:
    from adasplash2 import tuning

    outcomes = tuning.tune([(problem, backends)], seconds=AUTOTUNE_SECONDS)
    return [record for outcome in outcomes for record in outcome.records]


def _in_a_thread(work: Callable[[], list[Record]]) -> list[Record]:
    """Run ``work`` where none of the caller's modes hold: fake tensors of a trace, autocast,
    inference mode, streams. Whatever goes wrong is a warning: the call itself can still run."""
    found: list[Record] = []

    def run() -> None:
        try:
            found.extend(work())
        except Exception as error:
            logger.warning("measuring failed: %s", error, exc_info=True)

    thread = threading.Thread(target=run, name="adasplash2-tuning")
    thread.start()
    thread.join()
    return found


def _is_capturing(device: torch.device) -> bool:
    """Whether a CUDA graph is being captured, in which nothing can be measured."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _log_to_stderr(level: str) -> None:
    """Show the library's log from ``level`` on; a program that sets up logging does not need it."""
    number = logging.getLevelNamesMapping().get(level.upper())
    if number is None:
        _warn_of_setting("ADASPLASH2_LOG", "a level such as debug", level)
        return
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(name)s %(levelname)s: %(message)s"))
    logger.addHandler(handler)
    logger.setLevel(number)


if os.environ.get("ADASPLASH2_LOG"):
    _log_to_stderr(os.environ["ADASPLASH2_LOG"])
