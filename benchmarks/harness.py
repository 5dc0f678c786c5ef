"""What every benchmark shares: cases, contenders, timing, memory, records, tables and plots.

A *case* is one problem with its seeded tensors; a *contender* is one way to solve it. Programs list
both, hand the pairs to :func:`measure` and print, save or draw the measurements.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import importlib.metadata
import importlib.util
import json
import math
import multiprocessing
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import adasplash2

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))
import reference  # noqa: E402  (the float64 reference of the tests)

FORWARD, BOTH = "forward", "forward+backward"
MODES = (FORWARD, BOTH)

DTYPES = {
    "float32": torch.float32,
    "float64": torch.float64,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}

BUDGET_MS = 10_000.0
"""Time that the rounds of one contender and mode may take: dense attention needs seconds a call,
and all others would wait for as many of its rounds as of their own."""

WARM_UPS = {"cpu": 1, "cuda": 3}
"""Untimed calls before the rounds; on CUDA the first ones compile and tune."""

FLUSH_BYTES = 256 * 2**20
"""Written before each call timed on CUDA: more than any L2 cache holds, so that calls start from
one state, and long enough that the host is ahead when the timed call begins."""

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

    def generator(self) -> torch.Generator:
        return torch.Generator(self.device).manual_seed(1)


@dataclass(frozen=True, kw_only=True)
class AttentionCase(Case):
    """Self-attention; ``sharpness`` is a factor of the queries, and with it of the scores."""

    batch: int = 1
    heads: int = 8
    heads_kv: int = 8
    length: int
    head_dim: int = 64
    is_causal: bool = True
    sharpness: float = 1.0
    data: str = "gaussian"  # of DATA

    def __str__(self) -> str:
        return f"{self.dtype}, length {self.length}, sharpness {self.sharpness:g}"

    def inputs(self) -> Inputs:
        return DATA[self.data](self)

    def short(self) -> AttentionCase:
        return dataclasses.replace(self, length=min(self.length, CHECKED_LENGTH))

    def expected(self, tensors: Sequence[Tensor], alpha: float) -> Tensor:
        tensors = [t.cpu() for t in tensors]
        return reference.attention(*tensors, alpha=alpha, is_causal=self.is_causal).out


def gaussian(case: AttentionCase) -> Inputs:
    """Independent standard normal entries."""
    generator, dtype = case.generator(), DTYPES[case.dtype]

    def draw(heads: int) -> Tensor:
        shape = (case.batch, heads, case.length, case.head_dim)
        return torch.randn(shape, generator=generator, device=case.device, dtype=dtype)

    query, key, value, grad_out = (
        draw(heads) for heads in (case.heads, case.heads_kv, case.heads_kv, case.heads)
    )
    return Inputs((query.mul_(case.sharpness), key, value), grad_out)


DATA: dict[str, Callable[[AttentionCase], Inputs]] = {"gaussian": gaussian}
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
    """

    name: str
    call: Callable[..., Tensor]
    devices: tuple[str, ...] = ("cpu", "cuda")
    refusal: Callable[..., str | None] = never
    softmax: bool = False

    def why_not(self, case: Case) -> str | None:
        if case.device not in self.devices:
            return f"runs on {' or '.join(self.devices)}, not on {case.device}"
        return self.refusal(case)

    def error(self, case: Case) -> float:
        """Relative error of the output on the short case, against float64."""
        short = case.short()
        inputs = short.inputs()
        out = run(short, self, inputs, BOTH)[0]
        return reference.relative_error(
            out, short.expected(inputs.tensors, 1.0 if self.softmax else case.alpha)
        )


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


def measure(
    entrants: Sequence[tuple[Case, Contender]], repeats: int, peak_memory: bool = False
) -> list[Measurement]:
    """Times all entrants in turn: each round calls every one once a mode.

    What slows the machine for a while then slows all of them, and their ratios stay right. An
    entrant takes part in ``repeats`` rounds, or in as many as fit in :data:`BUDGET_MS`, or in one.
    """
    inputs = {case: case.inputs() for case, _ in entrants}
    samples: list[dict[str, list[float]]] = []
    rounds: list[dict[str, int]] = []
    errors: list[float] = []
    for case, contender in entrants:
        errors.append(contender.error(case))
        last = {}
        for mode in MODES:
            for _ in range(WARM_UPS[case.device]):
                last[mode] = clock(case, contender, inputs[case], mode)
        rounds.append({mode: max(1, min(repeats, int(BUDGET_MS / last[mode]))) for mode in MODES})
        samples.append({mode: [] for mode in MODES})
        took = ", ".join(f"{digits(last[mode])} ms {mode}" for mode in MODES)
        progress(f"{contender.name}, {case}: warm-up {took}")
    for turn in range(repeats):
        for (case, contender), times, wanted in zip(entrants, samples, rounds, strict=True):
            for mode in MODES:
                if turn < wanted[mode]:
                    times[mode].append(clock(case, contender, inputs[case], mode))
    return [
        Measurement(
            case,
            contender,
            error,
            {mode: summary(times[mode]) for mode in MODES},
            peak_bytes(case, contender) if peak_memory else None,
        )
        for (case, contender), error, times in zip(entrants, errors, samples, strict=True)
    ]


def summary(times: Sequence[float]) -> Timing:
    return Timing(statistics.median(times), min(times), max(times), len(times))


def clock(case: Case, contender: Contender, inputs: Inputs, mode: str) -> float:
    """Milliseconds of one call; freeing its results is not counted."""
    if case.device == "cpu":
        start = time.perf_counter()
        results = run(case, contender, inputs, mode)
        elapsed = 1e3 * (time.perf_counter() - start)
        del results
        return elapsed
    torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=case.device).zero_()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    run(case, contender, inputs, mode)
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end)


def run(case: Case, contender: Contender, inputs: Inputs, mode: str) -> tuple[Tensor, ...]:
    """One call: the output without gradients, or the output and all gradients."""
    if mode == FORWARD:
        with torch.no_grad():
            return (contender.call(case, *inputs.tensors),)
    leaves = [t.detach().requires_grad_() for t in inputs.tensors]
    out = contender.call(case, *leaves)
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
        raise SystemExit(
            f"error: measuring the memory of {contender.name} ended with exit code "
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


def parser(description: str) -> argparse.ArgumentParser:
    """A parser with the options that every program has."""
    result = argparse.ArgumentParser(description=description)
    add = result.add_argument
    add("--device", choices=("cpu", "cuda"), default="cpu", help="default %(default)s")
    add("--alpha", type=above_one, default=1.5, help="of entmax, above 1; default %(default)s")
    add("--threads", type=positive_int, default=2, help="on the CPU; default %(default)s")
    add(
        "--repeats",
        type=positive_int,
        default=10,
        help="rounds; slow contenders get fewer; default %(default)s",
    )
    add("--json", type=writable, metavar="PATH", help="write environment and measurements there")
    add(
        "--targets",
        action="store_true",
        help="judge the CPU targets; exit with 1 if one is missed",
    )
    return result


def check_device(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Ends the program where the device is not there; sets the number of threads."""
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("argument --device: torch sees no CUDA device here; allowed: cpu")
    torch.set_num_threads(options.threads)


def positive_int(text: str) -> int:
    return int(_number(text, lambda n: n == int(n) > 0, "an integer of at least 1"))


def positive(text: str) -> float:
    return _number(text, lambda x: x > 0, "a number above 0")


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
    packages = ("adasplash2", "torch", "entmax", "adasplash", "triton")
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
    targets: Iterable[Target],
) -> None:
    """Writes one run as JSON."""
    run_record = {
        "program": Path(sys.argv[0]).stem,
        "arguments": vars(options),
        "environment": found,
        "measurements": [measurement.record() for measurement in measurements],
        "left_out": [entry.record() for entry in left_out],
        "targets": [target.record() for target in targets],
    }
    path.write_text(json.dumps(run_record, indent=1, default=str) + "\n")
    progress(f"wrote {path}")


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


def absences(left_out: Sequence[LeftOut], cases: Sequence[Case]) -> list[str]:
    """Who was left out, where and why: a line a contender and reason."""
    absent: dict[tuple[str, str], list[Case]] = {}
    for case, contender, reason in left_out:
        absent.setdefault((contender, reason), []).append(case)
    return [
        f"left out: {contender}: {reason}"
        + ("" if len(where) == len(cases) else f" (at {'; '.join(map(str, where))})")
        for (contender, reason), where in absent.items()
    ]


class Line(NamedTuple):
    """One line of a panel; lines of one ``name`` share a colour."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    dashed: bool = False


def draw(path: Path, title: str, panels: dict[str, list[Line]], x_label: str, y_label: str) -> None:
    """Panels side by side with both axes logarithmic, as a file in the format of its suffix."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1.5 + 4.5 * len(panels), 4.5), layout="constrained")
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    names = dict.fromkeys(line.name for lines in panels.values() for line in lines)
    colour = {name: f"C{i}" for i, name in enumerate(names)}
    for axis, (heading, lines) in zip(axes, panels.items(), strict=True):
        for line in lines:
            axis.plot(
                line.x,
                line.y,
                color=colour[line.name],
                linestyle="--" if line.dashed else "-",
                marker="o",
                label=None if line.dashed else line.name,
            )
        axis.set(title=heading, xlabel=x_label, xscale="log", yscale="log")
        ticks = sorted({x for line in lines for x in line.x})
        axis.set_xticks(ticks, [f"{tick:,.0f}" for tick in ticks])
        axis.set_xticks([], minor=True)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel(y_label)
    axes[0].legend()
    figure.suptitle(title)
    figure.savefig(path, dpi=150)
    progress(f"wrote {path}")
