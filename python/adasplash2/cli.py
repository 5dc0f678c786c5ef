"""The command ``adasplash2``: what works here, what would run, measure, look into the cache.

Exit codes: 0 for success; 1 where the answer is no (nothing can run the call, nothing could be
measured, memory did not suffice); 2 for a wrong command line; 3 where the cache could not be
written, read or deleted; 130 after Ctrl-C.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import json
import logging
import math
import os
import platform
import re
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import click
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.padding import Padding
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Column, Table
from torch import Tensor

from adasplash2 import _core, cache, dispatch, failures, records, tuning
from adasplash2 import features as feature_table
from adasplash2.backends import REGISTRY
from adasplash2.contract import Backend
from adasplash2.functional import entmax_attention
from adasplash2.options import check_alpha
from adasplash2.problem import DTYPES, Inputs, Problem, RowProblem, attention_problem

NO, CACHE_FAILED, INTERRUPTED = 1, 3, 130
"""Exit codes beside 0 and click's 2."""

PACKAGES = ("torch", "cupy", "triton", "transformers", "numpy", "filelock", "platformdirs")
"""Whose versions ``info`` tells where they are installed."""

DTYPE_NAMES = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES}

SECONDS = {"cpu": 300, "cuda": 900}
QUICK_SECONDS = {"cpu": 40, "cuda": 80}
"""Budgets of ``tune`` by device. Starting takes seconds beside: a quick run ends within a minute on
a CPU and two on a GPU."""

BENCH_LENGTHS = {"cpu": (512, 1024, 2048, 4096), "cuda": (1024, 4096, 16384)}
BENCH_ROUNDS = 5

WIDE = 200
"""Columns of what goes to a file or a pipe, where ``COLUMNS`` says nothing."""

IN_PATH = r"""[^\s'"(),;]"""
"""A character of a path that is not quoted."""

ABSOLUTE = rf"""(['"])[~/].*?\1|(?<![\w.)\]])[~/]{IN_PATH}+"""
"""A path from the root or a home: quoted, as errors have it, or up to the next blank."""

MAX_SHOWN = 200
"""Characters of a configuration: what a record may hold is longer."""

console = Console(highlight=False, markup=False)
errors = Console(stderr=True, highlight=False, markup=False)


def alpha_option(context: click.Context, parameter: click.Parameter, value: float) -> float:
    try:
        return check_alpha(value)
    except ValueError as error:
        raise click.BadParameter(str(error)) from None


class Finite(click.ParamType):  # type: ignore[type-arg]  # generic from click 8.4 on
    """A number that is neither NaN nor infinite. Not click's range: NaN is in every one, and one
    without limits is shown as ``x<=None``."""

    name = "float"

    def __init__(self, at_least: float = -math.inf) -> None:
        self.at_least = at_least

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        number = float(click.FLOAT.convert(value, param, ctx))
        if not math.isfinite(number):
            self.fail(f"must be a finite number, got {value}", param, ctx)
        if number < self.at_least:
            self.fail(f"must be at least {self.at_least:g}, got {value}", param, ctx)
        return number


class Shape(click.ParamType):  # type: ignore[type-arg]  # generic from click 8.4 on
    """``batch,heads,length,head_dim``."""

    name = "B,H,L,D"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, ...]:
        try:
            sizes = tuple(int(part) for part in value.split(","))
        except ValueError:
            sizes = ()
        if len(sizes) != 4 or min(sizes) < 1:
            self.fail(f"must be four sizes above 0 such as 1,8,4096,64, got {value!r}", param, ctx)
        return sizes


class Device(click.ParamType):  # type: ignore[type-arg]  # generic from click 8.4 on
    """A torch device of type cpu or cuda."""

    name = "cpu|cuda[:N]"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> torch.device:
        try:
            device = torch.device(value)
        except RuntimeError:
            device = torch.device("meta")
        known = device.type == "cuda" or (device.type == "cpu" and device.index is None)
        if not known or str(device) != value:  # torch reads 300 as another number
            self.fail(f"must be cpu, cuda or cuda:N, got {value!r}", param, ctx)
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", 0)
        return device


def default_device() -> torch.device:
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def present(device: torch.device | None) -> torch.device:
    """The device to measure on."""
    device = device or default_device()
    count = torch.cuda.device_count()
    if device.type == "cuda" and (not torch.cuda.is_available() or device.index >= count):
        raise click.BadParameter(
            f"{device} is not here: torch sees {count} CUDA devices", param_hint="'--device'"
        )
    return device


json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON instead of tables.")
device_option = click.option(
    "--device", type=Device(), metavar=Device.name, help="Default: a GPU if there is one."
)


def call_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options that make up one call of ``entmax_attention``."""
    options = (
        click.option("--heads-kv", type=click.IntRange(1), help="Default: as many as heads."),
        click.option("--length-k", type=click.IntRange(1), help="Default: the length."),
        click.option(
            "--dtype", type=click.Choice(list(DTYPE_NAMES)), default="float32", show_default=True
        ),
        click.option("--causal/--no-causal", default=False, show_default=True),
        click.option("--alpha", type=float, default=1.5, show_default=True, callback=alpha_option),
        click.option("--grad/--no-grad", default=True, show_default=True, help="With backward."),
        device_option,
    )
    for option in reversed(options):
        command = option(command)
    return command


@dataclass(frozen=True)
class Call:
    """A call of ``entmax_attention`` as the command line has it."""

    shape: tuple[int, ...]
    heads_kv: int | None
    length_k: int | None
    dtype: str
    causal: bool
    alpha: float
    grad: bool
    device: torch.device

    def problem(self) -> Problem:
        batch, heads, length, width = self.shape
        keys = (batch, self.heads_kv or heads, self.length_k or length, width)
        dtype = DTYPE_NAMES[self.dtype]
        try:
            query = torch.empty(self.shape, dtype=dtype, device="meta")
            key = torch.empty(keys, dtype=dtype, device="meta")
        except (RuntimeError, TypeError):  # whose words are torch's inside
            raise click.UsageError(
                f"{self.shape} with keys {keys} is larger than any tensor"
            ) from None
        try:
            problem = attention_problem(
                Inputs(query, key, key),
                alpha=self.alpha,
                scale=None,
                is_causal=self.causal,
                enable_gqa=True,
                needs_grad=self.grad,
            )
        except (TypeError, ValueError) as error:
            raise click.UsageError(str(error)) from None
        return dataclasses.replace(problem, device=self.device)


class _Main(click.Group):
    """Ctrl-C is no answer: click would exit with 1. And what is larger than the memory is no bug
    that a traceback would tell of."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            _fail("interrupted", INTERRUPTED)
        except Exception as error:
            if isinstance(error, click.ClickException) or not failures.may_pass(error):
                raise
            lines = str(error).splitlines() or [type(error).__name__]
            _fail(f"this is more than the machine has to give now: {lines[0]}", NO)


def _format_warning(message: Warning | str, *_: Any, **__: Any) -> str:
    """Without the line of source that made it, which says nothing to who typed a command."""
    return f"warning: {message}\n"


@click.group(cls=_Main, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(importlib.metadata.version("adasplash2"), prog_name="adasplash2")
def main() -> None:
    """Exact sparse attention: what runs here, how fast, and what is remembered of it."""
    warnings.formatwarning = _format_warning
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # names of files and devices hold what they like
            stream.reconfigure(errors="backslashreplace")
    for each in (console, errors):
        if not each.is_terminal:
            columns = os.environ.get("COLUMNS", "")
            each.width = int(columns) if columns.isdecimal() and int(columns) else WIDE


@main.command(short_help="Versions, devices, backends, the cache.")
@json_option
def info(as_json: bool) -> None:
    """Versions, devices, backends and why each is or is not usable, the cache.

    Exits with 1 if no backend is usable, or the one that the environment forces is not.
    """
    found = _state()
    if as_json:
        _print_json(found)
    else:
        _print_rows(_rows(found))
    asked = [s for s in found["backends"] if dispatch.FORCED in (None, s["name"])]
    if not any(status["usable"] for status in asked):
        sys.exit(NO)


def _devices() -> list[torch.device]:
    gpus = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    return [torch.device("cpu"), *gpus]


def _state() -> dict[str, Any]:
    """What is installed, here and set."""
    return {
        "adasplash2": importlib.metadata.version("adasplash2"),
        "python": platform.python_version(),
        "packages": _versions(),
        "devices": [{"device": str(device), **records.identity(device)} for device in _devices()],
        "threads": torch.get_num_threads(),
        "backends": [dataclasses.asdict(status) for status in dispatch.available_backends()],
        "backend_versions": {
            name: _backend_versions(module) for name, module in dispatch.usable().items()
        },
        "forced_backend": dispatch.FORCED,
        "autotune": dispatch.AUTOTUNE,
        "cache": str(cache.directory()),
        "cache_trouble": _cache_trouble(),
        "environment": _environment(),
    }


def _rows(found: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """What :func:`_state` found, as heads and words."""
    yield "adasplash2", f"{found['adasplash2']} on Python {found['python']}"
    for name, version in found["packages"].items():
        yield name, version or "not installed"
    for device in found["devices"]:
        yield device["device"], ", ".join(v for k, v in device.items() if k != "device")
    yield "threads", str(found["threads"])
    for status in found["backends"]:
        versions = found["backend_versions"].get(status["name"], {})
        words = ", ".join(f"{name} {value}" for name, value in versions.items())
        usable = "usable" if status["usable"] else "not usable"
        yield (
            f"backend {status['name']}",
            f"{usable}: {status['reason']}" + (words and f" ({words})"),
        )
    yield "autotune", found["autotune"]
    trouble = found["cache_trouble"]
    yield "cache", found["cache"] + (f": cannot be used, {trouble}" if trouble else "")
    for setting in found["environment"]:
        trouble = f": {setting['trouble']}" if setting["trouble"] else ""
        yield setting["variable"], f"{_shown(setting['value'])}{trouble}"


@main.command(short_help="What a bug report needs.")
@json_option
def report(as_json: bool) -> None:
    """What a bug report needs: versions, devices, who would run a call, what the cache holds.

    Names no folder, and of the environment the library's own variables alone.
    """
    warnings.formatwarning = lambda *said, **_: _without_paths(_format_warning(*said))
    found = {**_state(), "platform": platform.platform()}
    kept = _kept()
    valid = sum(ok for *_, ok in kept)
    sizes = cache.sizes()
    found["cache"] = (
        f"{len(sizes)} files, {_mebibytes(sizes)}, {len(kept)} records, {valid} of these versions"
    )
    device = default_device()
    dtype = "bfloat16" if device.type == "cuda" else "float32"
    sample = Call((1, 8, 4096, 64), None, None, dtype, True, 1.5, True, device).problem()
    try:
        told = dispatch.explain(sample)
    except ValueError as error:  # of a backend that is forced and is none
        told = dispatch.Explanation(dispatch.describe(sample), None, {}, notes=(str(error),))
    found["sample"] = dataclasses.asdict(told)
    for setting in found["environment"]:
        if setting["variable"] == cache.VARIABLE or os.sep in setting["value"]:
            setting["value"] = "PATH"  # the whole, whatever it is
    found = _without_paths(found)
    if as_json:
        _print_json(found)
        return
    rows = [*_rows(found), ("platform", found["platform"])]
    rows += [(head, _without_paths(text)) for head, text in told.rows()]
    _print_rows(rows)


def _without_paths(found: Any) -> Any:
    """``found``, at any depth, with a word for every absolute path: whose folders they are is not
    for a report."""
    if isinstance(found, Mapping):
        return {key: _without_paths(value) for key, value in found.items()}
    if isinstance(found, list | tuple):
        return [_without_paths(value) for value in found]
    if not isinstance(found, str):
        return found
    folder = cache.directory()
    places = folder, Path(os.path.realpath(folder)), Path(os.path.expanduser("~"))
    known = {str(path) for place in places for path in (place, *place.parents) if path.name}
    # Names of folders that are known may have blanks.
    whole = (re.escape(path) + IN_PATH + "*" for path in sorted(known, key=len, reverse=True))
    return re.sub("|".join([*whole, ABSOLUTE]), "PATH", found)


def _environment() -> list[dict[str, Any]]:
    """The library's variables that are set: what they say, and what is wrong with it."""
    found = []
    for name, value in sorted(os.environ.items()):
        if name.startswith("ADASPLASH2_") and value:
            check = SETTINGS.get(name)
            known = ", ".join(SETTINGS)
            trouble = check(value) if check else f"there is no such variable, only {known}"
            found.append({"variable": name, "value": value, "trouble": trouble})
    return found


def _backend_trouble(value: str) -> str | None:
    if value not in REGISTRY:
        return f"must be one of {', '.join(REGISTRY)}; calls that name no backend raise"
    statuses = {status.name: status for status in dispatch.available_backends()}
    return None if statuses[value].usable else f"not usable, {statuses[value].reason}"


def _autotune_trouble(value: str) -> str | None:
    if value not in dispatch.AUTOTUNE_MODES:
        return f"must be one of {', '.join(dispatch.AUTOTUNE_MODES)}; {dispatch.AUTOTUNE} is taken"
    return None


def _isa_trouble(value: str) -> str | None:
    names = _core.usable_isas()
    return None if value in names else f"must be one of {', '.join(names)} on this processor"


def _log_trouble(value: str) -> str | None:
    names = [name.lower() for name in logging.getLevelNamesMapping()]
    return None if value.lower() in names else f"must be one of {', '.join(names)}"


def _cache_trouble(value: str = "") -> str | None:
    try:
        cache.check()
    except OSError as error:
        return str(error)
    return None


SETTINGS: dict[str, Callable[[str], str | None]] = {
    "ADASPLASH2_BACKEND": _backend_trouble,
    "ADASPLASH2_AUTOTUNE": _autotune_trouble,
    cache.VARIABLE: _cache_trouble,
    "ADASPLASH2_ISA": _isa_trouble,
    "ADASPLASH2_LOG": _log_trouble,
}
"""The environment variables, and what tells what is wrong with a value."""


def _backend_versions(module: Backend) -> dict[str, str]:
    try:
        return dict(module.versions())
    except Exception as error:
        return {"unknown": f"({error})"}


@main.command(short_help="Which backend would run a call, and why.")
@click.option("--shape", type=Shape(), required=True, help="Of the query.")
@call_options
@click.option("--backend", help="Ask this one alone.")
@json_option
def explain(backend: str | None, as_json: bool, device: torch.device | None, **call: Any) -> None:
    """Which backend would run a call, with which configuration, and why not the others.

    Exits with 1 if none can.
    """
    problem = Call(device=device or default_device(), **call).problem()
    try:
        told = dispatch.explain(problem, backend)
    except ValueError as error:
        raise click.UsageError(str(error)) from None
    if as_json:
        _print_json({"problem_class": records.problem_class(problem), **dataclasses.asdict(told)})
    else:
        _print_rows(told.rows())
    if told.chosen is None:
        sys.exit(NO)


@main.command(short_help="What each backend computes.")
@click.option("--markdown", is_flag=True, help="Print the table as the documentation has it.")
@json_option
def features(markdown: bool, as_json: bool) -> None:
    """What each backend computes, on whatever device, and why not the rest.

    `forward` is without gradients.
    """
    if markdown:
        click.echo(feature_table.markdown())
        return
    found = feature_table.table()
    if as_json:
        rows = {
            label: {name: {"answer": a.word, "reasons": a.reasons} for name, a in answers.items()}
            for label, answers in found.items()
        }
        _print_json(rows)
        return
    table = _table("", *REGISTRY)
    for label, answers in found.items():
        table.add_row(label.replace("`", ""), *(answer.word for answer in answers.values()))
    console.print(table)
    reasons = {
        f"{name}: {reason}": None
        for answers in found.values()
        for name, answer in answers.items()
        for reason in answer.reasons
    }
    _print_record("", *reasons)


@main.command(short_help="Measure backends here, keep the fastest.")
@click.option("--quick", is_flag=True, help="A few common shapes: a minute on a CPU, two on a GPU.")
@click.option("--shape", "shapes", type=Shape(), multiple=True, help="This query; repeatable.")
@call_options
@click.option("--backend", help="Measure this one alone.")
@click.option("--seconds", type=Finite(1.0), help="Budget, at least 1; default: by device.")
@json_option
def tune(
    quick: bool,
    shapes: tuple[tuple[int, ...], ...],
    backend: str | None,
    seconds: float | None,
    device: torch.device | None,
    as_json: bool,
    **call: Any,
) -> None:
    """Measure the backends and their configurations here and remember the fastest.

    Without --shape it takes common shapes, whose dtype, alpha and masks are its own. Exits with 1
    if some class of problems found no time or no backend, with 3 if the cache cannot be written.
    """
    if shapes and call["alpha"] == 1.0:
        raise click.BadParameter(
            "1 is softmax, which torch computes: there is nothing to choose", param_hint="'--alpha'"
        )
    device = present(device)
    budget = seconds or (QUICK_SECONDS if quick else SECONDS)[device.type]
    problems: list[Problem | RowProblem] = [
        Call(shape=shape, device=device, **call).problem() for shape in shapes
    ] or list(common_problems(device, quick))
    if backend is not None and backend not in REGISTRY:
        names = ", ".join(REGISTRY)
        raise click.BadParameter(f"--backend must be one of {names}, got {backend!r}")
    if trouble := _cache_trouble():
        errors.print(f"what is measured will not be kept: {trouble}", soft_wrap=True)
    able = [(problem, dispatch.able(problem, backend)) for problem in problems]
    with _progress(as_json) as progress:
        outcomes = list(tuning.tune(able, seconds=budget, progress=progress))
    found = [record for outcome in outcomes for record in outcome.records]
    kept = records.Store(device).add(found)
    if as_json:
        _print_json({"outcomes": [_outcome(o) for o in outcomes], "kept": kept})
    else:
        _print_outcomes(outcomes)
        where = f" in {records.Store(device).path}" if found and kept else ""
        console.print(f"{len(found)} records{where}", soft_wrap=True)
    if not kept:
        _fail("the records could not be kept: see the warning above", CACHE_FAILED)
    missing = [outcome for outcome in outcomes if not outcome.records]
    for outcome in missing:
        asked = dispatch.explain(outcome.problem, backend)
        against = [
            f"{name}: {reason}"
            for name, reasons in asked.others
            if backend in (None, name)
            for reason in reasons
        ]
        why = "time was up" if dispatch.able(outcome.problem, backend) else "; ".join(against)
        errors.print(f"nothing was measured for {outcome.problem_class}: {why}", soft_wrap=True)
    if missing:
        sys.exit(NO)


def common_problems(device: torch.device, quick: bool) -> Iterator[Problem | RowProblem]:
    """What ``tune`` measures where it is given no shapes."""
    gpu = device.type == "cuda"
    dtypes = ("bfloat16",) if gpu and quick else ("bfloat16", "float32")
    lengths = (4096, 16384) if gpu else (1024, 4096)
    widths = (64, 128) if gpu or not quick else (64,)
    alphas = (1.5,) if quick else (1.5, 2.0)
    for dtype in dtypes:
        for width in widths:
            for length in lengths:
                for alpha in alphas:
                    for causal in (True,) if quick else (True, False):
                        for grad in (True, False):
                            shape = (1, 16 if gpu else 4, length, width)
                            yield Call(
                                shape, None, None, dtype, causal, alpha, grad, device
                            ).problem()
        yield RowProblem(4096, 4096, DTYPE_NAMES[dtype], device, 1.5, needs_grad=True)


@main.group("cache", short_help="What is kept: measured speeds, kernels.")
def cache_group() -> None:
    """The folder with measured speeds and compiled kernels."""


@cache_group.command()
def path() -> None:
    """Print the folder; it need not exist."""
    click.echo(os.fsencode(cache.directory()))


def _kept() -> list[tuple[torch.device, records.Record, bool]]:
    """The records of this machine's devices, and whether each is of what is installed."""
    valid = dispatch.usable()
    return [
        (device, record, _is_valid(record, valid.get(record.backend)))
        for device in _devices()
        for record in records.Store(device)
    ]


def _mebibytes(sizes: Sequence[int]) -> str:
    return f"{sum(sizes) / 2**20:.1f} MiB"


@cache_group.command(short_help="The records, and the size of all.")
@json_option
def show(as_json: bool) -> None:
    """The records of this machine's devices, and the size of everything kept."""
    rows = _kept()
    try:
        cache.kept_parts()
    except OSError as error:
        _fail(f"the cache in {cache.directory()} cannot be read ({error})", CACHE_FAILED)
    sizes = cache.sizes()
    if as_json:
        listed = [
            {"device": str(device), "valid": ok, **dataclasses.asdict(record)}
            for device, record, ok in rows
        ]
        _print_json(
            {
                "path": str(cache.directory()),
                "files": len(sizes),
                "bytes": sum(sizes),
                "records": listed,
            }
        )
        return
    for device, record, ok in rows:
        _print_record(
            f"{device}: {record.problem_class}",
            f"{record.backend}: {_ms(record.milliseconds)} ms, default ms "
            f"{_ms(record.default_milliseconds)}, {_words(record.config)}"
            + ("" if ok else ", of other versions: not used"),
        )
    folder = cache.directory()
    if not rows:
        console.print("no records of speeds: adasplash2 tune makes them")
    if sizes:
        console.print(f"{len(sizes)} files, {_mebibytes(sizes)} in {folder}", soft_wrap=True)
    else:
        console.print(f"nothing is kept in {folder}", soft_wrap=True)


@cache_group.command()
@click.option("--yes", is_flag=True, help="Do not ask.")
def clear(yes: bool) -> None:
    """Delete everything kept. Exits with 3 if that fails."""
    folder = cache.directory()
    try:
        parts = cache.kept_parts()
        if parts is None:
            console.print(f"{folder} does not exist: nothing to delete", soft_wrap=True)
            return
        words = ", ".join(parts) or "nothing"
        if not yes:
            click.confirm(f"Delete {words} in {folder}?", abort=True)
        cache.clear(parts)
    except OSError as error:
        _fail(f"{folder} cannot be deleted: {error}", CACHE_FAILED)
    console.print(f"deleted {words} in {folder}", soft_wrap=True)


@main.command(short_help="Time it beside torch's SDPA.")
@click.option("--length", "lengths", type=click.IntRange(1), multiple=True, help="Repeatable.")
@click.option("--heads", type=click.IntRange(1), default=8, show_default=True)
@click.option("--head-dim", type=click.IntRange(1, 256), default=64, show_default=True)
@click.option("--dtype", type=click.Choice(list(DTYPE_NAMES)), help="Default: by device.")
@click.option("--causal/--no-causal", default=True, show_default=True)
@click.option("--alpha", type=float, default=1.5, show_default=True, callback=alpha_option)
@click.option(
    "--sharpness", type=Finite(), default=4.0, show_default=True, help="Queries times this."
)
@device_option
@json_option
def bench(
    lengths: tuple[int, ...],
    heads: int,
    head_dim: int,
    dtype: str | None,
    causal: bool,
    alpha: float,
    sharpness: float,
    device: torch.device | None,
    as_json: bool,
) -> None:
    """A quick table beside torch's scaled_dot_product_attention (SDPA).

    Gaussian inputs, batch 1, medians in milliseconds. The programs in benchmarks/ measure with
    more care.
    """
    device = present(device)
    dtype = dtype or ("bfloat16" if device.type == "cuda" else "float32")
    rows: list[dict[str, Any]] = []
    chosen = lengths or BENCH_LENGTHS[device.type]
    with _progress(as_json) as progress:
        for done, length in enumerate(chosen):
            progress(f"length {length}", done, len(chosen))
            shape = (1, heads, length, head_dim)
            rows.append(
                {"length": length, **_compare(shape, dtype, causal, alpha, sharpness, device)}
            )
    if as_json:
        head = {"device": dict(records.identity(device)), "dtype": dtype, "heads": heads}
        _print_json({**head, "head_dim": head_dim, "rows": rows})
        return
    name = records.identity(device).get("name", str(device))
    console.print(
        f"{name}: {dtype}, {heads} heads, head_dim {head_dim}, "
        f"{'causal' if causal else 'full'}, alpha {alpha:g}, queries times {sharpness:g}; ms"
    )
    table = _table("length", "backend", "forward", "sdpa", "ratio", "fwd+bwd", "sdpa", "ratio")
    for row in rows:
        cells = [str(row["length"]), row["backend"]]
        for mode in ("forward", "forward+backward"):
            ours, sdpa = row[mode]["adasplash2"], row[mode]["sdpa"]
            cells += [_ms(ours), _ms(sdpa), f"{ours / sdpa:.2f}"]
        table.add_row(*cells)
    console.print(table)


def _compare(
    shape: tuple[int, ...],
    dtype: str,
    causal: bool,
    alpha: float,
    sharpness: float,
    device: torch.device,
) -> dict[str, Any]:
    """Medians of both, in turn."""
    generator = torch.Generator(device).manual_seed(1)
    query, key, value, grad = (
        torch.randn(shape, generator=generator, device=device).to(DTYPE_NAMES[dtype])
        for _ in range(4)
    )
    query *= sharpness
    calls = {
        "adasplash2": functools.partial(entmax_attention, alpha=alpha, is_causal=causal),
        "sdpa": functools.partial(F.scaled_dot_product_attention, is_causal=causal),
    }
    problem = attention_problem(
        Inputs(query, key, value),
        alpha=alpha,
        scale=None,
        is_causal=causal,
        enable_gqa=False,
        needs_grad=True,
    )
    try:
        told = dispatch.explain(problem)
    except ValueError as error:
        raise click.UsageError(str(error)) from None
    if told.chosen is None:
        _fail(str(told), NO)
    found: dict[str, Any] = {"backend": "sdpa" if alpha == 1.0 else told.chosen}
    for mode in ("forward", "forward+backward"):
        leaves = [t.detach().requires_grad_(mode != "forward") for t in (query, key, value)]

        def step(call: Callable[..., Tensor], leaves: Sequence[Tensor] = leaves) -> None:
            out = call(*leaves)
            if out.requires_grad:
                torch.autograd.grad(out, leaves, grad)

        found[mode] = tuning.side_by_side(
            {name: functools.partial(step, call) for name, call in calls.items()},
            device,
            BENCH_ROUNDS,
        )
    return found


@contextmanager
def _progress(quiet: bool) -> Iterator[tuning.Progress]:
    """A bar on standard error; where that is no terminal, or ``quiet``, a line a class."""
    if quiet or not errors.is_terminal:
        told: list[str] = []

        def tell(text: str, done: int, total: int) -> None:
            if text and text not in told[-1:]:
                told.append(text)
                errors.print(f"{done + 1}/{total} {text}", soft_wrap=True)

        yield tell
        return
    text = TextColumn("{task.description}", table_column=Column(no_wrap=True, ratio=1))
    columns = (BarColumn(bar_width=10), text, TimeElapsedColumn())
    with Progress(*columns, console=errors, transient=True) as bar:
        task = bar.add_task("starting", total=None)

        def advance(text: str, done: int, total: int) -> None:
            bar.update(task, description=text, completed=done, total=total)

        yield advance


def _print_outcomes(outcomes: Sequence[tuning.Outcome]) -> None:
    for outcome in outcomes:
        lines = []
        for record in outcome.records:
            candidates = [t for t in outcome.trials if t.backend == record.backend and any(t.times)]
            lines.append(
                f"{record.backend}: default ms {_ms(record.default_milliseconds)}, "
                f"tuned ms {_ms(record.milliseconds)}, "
                f"{record.default_milliseconds / record.milliseconds:.2f}x, "
                f"{len(candidates)} candidates, {_words(record.config)}"
            )
        _print_record(outcome.problem_class, *(lines or ["nothing was measured"]))
    late = Counter(t.backend for o in outcomes for t in o.trials if t.error == tuning.LATE)
    for name, count in late.items():
        console.print(
            f"{name}: {count} candidates {tuning.LATE}; what was is kept for the next run"
        )
    gains = [r.default_milliseconds / r.milliseconds for o in outcomes for r in o.records]
    if gains:
        mean = math.exp(sum(map(math.log, gains)) / len(gains))
        console.print(f"gained {mean:.2f}x in the geometric mean, {max(gains):.2f}x at most")


def _outcome(outcome: tuning.Outcome) -> dict[str, Any]:
    return {
        "problem_class": outcome.problem_class,
        "trials": [
            {
                "backend": trial.backend,
                "config": dict(trial.config),
                "milliseconds": trial.milliseconds,
                "rounds": min(map(len, trial.times)),
                "pruned": trial.pruned,
                "error": trial.error,
            }
            for trial in outcome.trials
        ],
        "records": [dataclasses.asdict(record) for record in outcome.records],
    }


def _is_valid(record: records.Record, backend: Any) -> bool:
    return backend is not None and dict(record.versions) == records.versions(backend)


def _print_record(head: str, *lines: str) -> None:
    """A head and what is below it; each wraps by itself."""
    console.print(head)
    for line in lines:
        console.print(Padding(line, (0, 0, 0, 2), expand=False))


def _table(*heads: str) -> Table:
    table = Table(box=None, show_header=any(heads), pad_edge=False, padding=(0, 1, 0, 0))
    for head in heads:
        table.add_column(head, overflow="fold")
    return table


def _print_rows(rows: Iterable[tuple[str, str]]) -> None:
    table = _table("", "")
    for row in rows:
        table.add_row(*row)
    console.print(table)


def _ms(milliseconds: float) -> str:
    """Three digits, or all before the point: never an exponent, which takes columns."""
    return f"{milliseconds:.0f}" if milliseconds >= 100 else f"{milliseconds:.3g}"


def _words(config: Any) -> str:
    return _shown(", ".join(f"{name}={value}" for name, value in config.items()) or "-")


def _shown(text: str) -> str:
    return text if len(text) <= MAX_SHOWN else f"{text[: MAX_SHOWN - 3]}..."


def _versions() -> dict[str, str | None]:
    """Of :data:`PACKAGES`, None where one is not installed. CuPy's wheels are named after the CUDA
    release; which one torch is built for only torch itself tells."""
    wheels = importlib.metadata.packages_distributions()
    found = {n: importlib.metadata.version(wheels[n][0]) if n in wheels else None for n in PACKAGES}
    return {**found, "torch": str(torch.__version__)}


def _print_json(data: Any) -> None:
    click.echo(json.dumps(data, indent=1))


def _fail(text: str, code: int) -> NoReturn:
    errors.print(text, soft_wrap=True)
    sys.exit(code)
