"""How many passes over a row find its entmax threshold, by the way of starting and stepping.

A simulation, vectorised over rows, of the mathematics of threshold.h (histogram, bracket, guarded
step) beside bisection, Newton and Halley from the bracket that the row's maximum alone gives. A
pass evaluates the sums over the scores above the present guess; the histogram itself is filled
during the scan of the scores. Rows: Gaussian scores, and scores of a real model if captured.
"""

from __future__ import annotations

import argparse
import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import data
import torch
from data import AttentionCase
from harness import command_line, pictures, tables
from harness.cases import DTYPES, Case, reference
from harness.runs import Run
from torch import Tensor

TOLERANCE = 2.0**-22
"""A row has converged where its threshold is this near: float32's round-off in a window of 1."""

PASSES = 30
"""Passes that are simulated; bisection needs 22 to halve its bracket below the tolerance."""

SHOWN = 10
"""Passes that the picture shows."""

FLOOR = 1e-8
"""Smaller errors are drawn there, where a line ends: float32 has long converged."""


class Bracket(NamedTuple):
    """``lo <= tau <= hi`` and the first guess, each ``(rows, 1)``."""

    lo: Tensor
    hi: Tensor
    start: Tensor


@dataclass(frozen=True)
class Method:
    """``bracket`` takes shifted scores ``y = z - max z``, alpha and the keys of a row; ``step``
    takes the sums at a guess and gives the distance to the next one."""

    name: str
    bracket: Callable[[Tensor, float, int], Bracket]
    step: Callable[[Sums, float], Tensor]


class Sums(NamedTuple):
    """Over the scores above a guess, with ``x = y - t`` and ``r = 1 / (alpha - 1)``: ``f`` is
    ``sum x^r - 1``, ``s1`` ``sum x^(r-1)``, ``s0`` ``sum x^(r-2)``; alpha 1.5: r = 2."""

    f: Tensor
    s1: Tensor
    s0: Tensor


def sums(y: Tensor, t: Tensor, alpha: float) -> Sums:
    r = 1.0 / (alpha - 1.0)
    x = y - t
    inside = x > 0
    x = torch.where(inside, x, 1.0)

    def power(exponent: float) -> Tensor:
        return torch.where(inside, x**exponent, 0.0).sum(-1, keepdim=True)

    return Sums(power(r) - 1.0, power(r - 1.0), power(r - 2.0))


# Brackets


def from_maximum(y: Tensor, alpha: float, length: int) -> Bracket:
    """``[-1, -n^(1-alpha)]``, from its lower end: f is convex, so steps come from one side."""
    lo = torch.full_like(y[:, :1], -1.0)
    return Bracket(lo, torch.full_like(lo, -(length ** (1.0 - alpha))), lo)


def middle(y: Tensor, alpha: float, length: int) -> Bracket:
    lo, hi, _ = from_maximum(y, alpha, length)
    return Bracket(lo, hi, (lo + hi) / 2)


def from_histogram(bins: int, y: Tensor, alpha: float, length: int) -> Bracket:
    """As ``histogram_bracket`` of threshold.h: the threshold of scores rounded down to the edges
    of their bins is a lower bound, one bin above it an upper bound."""
    bin_of = ((y + 1.0) * bins).long().clamp(0, bins - 1)
    counts = torch.zeros(y.shape[0], bins, dtype=y.dtype).scatter_add_(
        1, bin_of, torch.ones_like(y)
    )
    width = 1.0 / bins
    root = torch.full_like(y[:, :1], -1.0)
    if alpha not in (1.5, 2.0):
        r = 1.0 / (alpha - 1.0)
        powers = (torch.arange(bins, dtype=y.dtype) / bins) ** r
        found = torch.zeros_like(root, dtype=torch.bool)
        for edge in range(bins - 1, 0, -1):
            mass = (counts[:, edge + 1 :] * powers[1 : bins - edge]).sum(-1, keepdim=True)
            reached = (mass >= 1.0) & ~found
            root = torch.where(reached, -1.0 + edge * width, root)
            found |= reached
        return Bracket(root, (root + 2 * width).clamp(max=0.0), root + width)
    # Moments about the present edge, in bins, are whole numbers.
    n, s1, s2 = (torch.zeros_like(root) for _ in range(3))
    target = bins * bins if alpha == 1.5 else bins
    going = torch.ones_like(root, dtype=torch.bool)
    for b in range(bins - 1, -1, -1):
        next_s1, next_s2 = s1 + n, s2 + 2 * s1 + n
        reached = going & ((next_s2 if alpha == 1.5 else next_s1) >= target)
        if alpha == 1.5:
            missing = target - s2
            down = missing / (s1 + (s1 * s1 + n * missing).sqrt())
        else:
            down = (target - s1) / n
        root = torch.where(reached, -1.0 + (b + 1 - down) * width, root)
        going &= ~reached
        s1, s2 = torch.where(going, next_s1, s1), torch.where(going, next_s2, s2)
        n = torch.where(going, n + counts[:, b : b + 1], n)
    return Bracket(root, (root + width).clamp(max=0.0), root + width / 2)


# Steps


def bisect(found: Sums, alpha: float) -> Tensor:
    """Always out of the bracket, so that the guard halves it."""
    return torch.full_like(found.f, math.inf)


def newton(found: Sums, alpha: float) -> Tensor:
    return found.f * (alpha - 1.0) / found.s1


def halley(found: Sums, alpha: float) -> Tensor:
    r = 1.0 / (alpha - 1.0)
    slope = r * found.s1
    return 2 * found.f * slope / (2 * slope * slope - found.f * r * (r - 1) * found.s0)


def exact(found: Sums, alpha: float) -> Tensor:
    """As ``refinement_step`` of threshold.h: alpha 1.5 and 2 solve on the present support."""
    if alpha == 2.0:
        return newton(found, alpha)  # s1 counts the support
    if alpha != 1.5:
        return halley(found, alpha)
    root = (found.s1**2 - found.s0 * found.f).clamp(min=0.0).sqrt()
    return found.f / (found.s1 + root)


def methods(bins: Sequence[int]) -> list[Method]:
    return [
        Method("bisection", middle, bisect),
        Method("Newton from max - 1", from_maximum, newton),
        Method("Halley from max - 1", from_maximum, halley),
        Method("our step from max - 1", from_maximum, exact),
        *(
            Method(f"histogram, {b} bins", functools.partial(from_histogram, b), exact)
            for b in bins
        ),
    ]


def in_window(z: Tensor) -> Tensor:
    """Rows cut to as many of their largest scores as any of them has above its maximum - 1: no
    other can enter a sum, nor a bin that the histogram's root depends on."""
    above = (z > z.amax(-1, keepdim=True) - 1.0).sum(-1).max()
    return z.topk(int(above), dim=-1).values


def palette(bins: Sequence[int]) -> dict[str, str]:
    """Histograms in reds, the finer the darker; what starts from the maximum in other colours."""
    reds = ["#f4a582", "#e0685a", "#c1272d", "#6b0f1a"]
    names = [f"histogram, {b} bins" for b in sorted(bins)]
    fixed = {"bisection": "#777777", "Newton from max - 1": "#1f4e8c"}
    fixed |= {"Halley from max - 1": "#2a9d8f", "our step from max - 1": "#e8871e"}
    return fixed | {n: reds[round(3 * i / max(1, len(names) - 1))] for i, n in enumerate(names)}


def errors(method: Method, z: Tensor, tau: Tensor, alpha: float, length: int) -> Tensor:
    """``(1 + PASSES, rows)``: distance of the guess from ``tau`` after so many passes."""
    highest = z.amax(-1, keepdim=True)
    y = z - highest
    exact_tau = tau.unsqueeze(-1) - highest.double()
    lo, hi, t = method.bracket(y, alpha, length)
    history = [(t - exact_tau).abs()]
    for _ in range(PASSES):
        found = sums(y, t, alpha)
        left = found.f >= 0
        lo, hi = torch.where(left, t, lo), torch.where(left, hi, t)
        guess = t + method.step(found, alpha)
        t = torch.where((guess >= lo) & (guess <= hi), guess, (lo + hi) / 2)
        history.append((t - exact_tau).abs())
    return torch.stack(history).squeeze(-1)


def passes(history: Tensor) -> Tensor:
    """Passes of each row after which it stays converged."""
    return (history > TOLERANCE).long().flip(0).cumsum(0).gt(0).sum(0)


# Rows


@dataclass(frozen=True, kw_only=True)
class Rows(Case):
    """``z`` of ``count`` rows; ``kind`` is gaussian or the layer of a real model."""

    kind: str
    count: int
    length: int

    def __str__(self) -> str:
        return f"{self.kind}, {self.length:,} keys"

    def z(self) -> Tensor:
        """Scores times ``alpha - 1``, ``(count, length)`` float64."""
        if self.kind == "Gaussian":
            generator = self.generator()
            scores = torch.randn(self.count, self.length, generator=generator, dtype=torch.float64)
        else:
            query, key, _ = data.captured()[int(self.kind.split()[-1])]
            heads, length = query.shape[1], self.length
            group = heads // key.shape[1]
            per_head = -(-self.count // heads)
            scores = torch.cat(
                [
                    query[0, h, length - per_head : length].double()
                    @ key[0, h // group, :length].double().T
                    for h in range(heads)
                ]
            )[: self.count]
            scores = scores * query.shape[-1] ** -0.5
        return (self.alpha - 1.0) * scores


def parse() -> argparse.Namespace:
    parser = command_line.parser(__doc__)
    add = parser.add_argument
    count = command_line.positive_int
    add("--lengths", type=count, nargs="+", default=[1024, 16384, 131072], help="of Gaussian rows")
    add("--rows", type=count, default=126, help="rows of each kind; default %(default)s")
    add("--bins", type=count, nargs="+", default=[4, 8, 16, 32], help="default 4 8 16 32")
    add("--real-layers", type=int, nargs="*", default=data.REAL_LAYERS, help="default 0 6 18")
    add("--real-length", type=count, default=8192, help="keys of real rows; default %(default)s")
    add("--dtype", choices=("float32", "float64"), default="float64", help="default %(default)s")
    options = command_line.parsed(parser)
    options.device = "cpu"  # a simulation
    return options


def main() -> int:
    options = parse()
    run = Run(options)
    shared = {
        "device": "cpu",
        "dtype": options.dtype,
        "alpha": options.alpha,
        "count": options.rows,
    }
    cases = [Rows(kind="Gaussian", length=length, **shared) for length in options.lengths]
    for layer in options.real_layers:
        case = Rows(kind=f"SmolLM2 layer {layer}", length=options.real_length, **shared)
        where = AttentionCase(
            device="cpu", dtype="float32", alpha=1.5, data="real", layer=layer, length=case.length
        )
        if reason := data.missing(where):
            run.leave_out([case], reason)
        else:
            cases.append(case)
    table: list[dict[str, object]] = []
    for case in cases:
        if reason := run.budget.over():
            run.leave_out([case], reason)
            continue
        z = in_window(case.z().to(DTYPES[case.dtype]))
        tau = reference.probabilities_and_tau(z.double(), case.alpha)[1]
        for method in methods(options.bins):
            history = errors(method, z, tau, case.alpha, case.length)
            needed = passes(history)
            median = history.median(1).values
            table.append(
                {
                    "rows": str(case),
                    "method": method.name,
                    "mean_passes": needed.double().mean().item(),
                    "max_passes": int(needed.max()),
                    "within_two": (needed <= 2).double().mean().item(),
                    "median_error": median.tolist(),
                    "max_error": history.max(1).values.tolist(),
                }
            )
        tables.progress(f"{case}: done, {run.budget.left():.0f} s left")
    run.results["passes"] = table
    run.results["tolerance"] = TOLERANCE
    run.save()
    run.report(
        tables.table(
            ["rows", "method", "mean passes", "max", "in 2 or fewer", "error of the start"],
            (
                [
                    entry["rows"],
                    entry["method"],
                    f"{entry['mean_passes']:.2f}",
                    str(entry["max_passes"]),
                    f"{100 * entry['within_two']:.0f} %",
                    f"{entry['median_error'][0]:.0e}",
                ]
                for entry in table
            ),
        )
    )
    if options.plot:
        draw(run)
    return 0


def draw(run: Run) -> None:
    """A panel a kind of rows; a line ends where all of its errors are below :data:`FLOOR`."""
    options = run.options
    panels: dict[str, list[pictures.Line]] = {}
    for entry in run.results["passes"]:
        median = entry["median_error"][: SHOWN + 1]
        last = max((i for i, error in enumerate(median) if error > FLOOR), default=0)
        shown = [max(error, FLOOR) for error in median[: last + 2]]
        line = pictures.Line(entry["method"], range(len(shown)), shown)
        panels.setdefault(entry["rows"], []).append(line)
    pictures.draw(
        options.plot,
        f"Threshold of entmax, alpha {options.alpha:g}: error by passes over the row",
        panels,
        "passes",
        f"median error, {options.dtype}",
        f"{run.footer()}; {options.rows} rows each; dotted: float32 has converged",
        x_log=False,
        palette=palette(options.bins),
        mark=TOLERANCE,
        rows=1 if len(panels) <= 3 else 2,
    )


if __name__ == "__main__":
    raise SystemExit(main())
