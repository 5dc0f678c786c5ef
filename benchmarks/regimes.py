"""Every regime: the time of attention by sharpness, length, causal or not and head_dim, in units of
softmax's; which cell is the worst; and a map.

Sharpness goes from rows that keep nearly all keys, as those of a fresh model do, to rows that keep
a few. All cells of the grid have about as many rows. Beside the grid, rows with a sink, and layers
of a real model.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import contenders
import data
from contenders import BASELINE
from data import AttentionCase
from harness import command_line, pictures, tables
from harness.cases import DTYPES
from harness.contender import BOTH, FORWARD, MODES, Contender
from harness.runs import Run
from harness.targets import Target

OURS = "adasplash2"
"""Ours by the dispatcher's choice."""

DEFAULTS = {
    "cpu": {
        "lengths": [128, 512, 1024, 4096, 8192],
        "rows": 16384,
        "dtype": "float32",
        "real_length": 2048,
    },
    "cuda": {
        "lengths": [128, 512, 1024, 4096, 16384, 65536],
        "rows": 262144,
        "dtype": "bfloat16",
        "real_length": 8192,
    },
}
RIVALS = {"cpu": ("sdpa",), "cuda": ("sdpa-flash", "sdpa-cudnn")}


class Limit(NamedTuple):
    """What no cell of a group may pass, in units of the baseline."""

    mode: str
    most: float
    shortest: int
    longest: int = 2**30
    sharpest_below: float = 0.0  # the smallest sharpness of the group

    def holds(self, case: AttentionCase) -> bool:
        return (
            self.shortest <= case.length <= self.longest and case.sharpness >= self.sharpest_below
        )

    def __str__(self) -> str:
        where = f"{self.shortest:,} positions and more"
        if self.longest < 2**30:
            where = f"{self.shortest:,} to {self.longest:,} positions"
        return f"worst {self.mode}, {where}" + (
            f", sharpness from {self.sharpest_below:g} on" if self.sharpest_below else ""
        )


LIMITS = {
    "cpu": (
        Limit(BOTH, 1.0, 1),
        Limit(FORWARD, 1.3, 1),
        Limit(BOTH, 0.25, 2048, sharpest_below=0.25),
        Limit(FORWARD, 0.5, 2048, sharpest_below=0.25),
    ),
    "cuda": (Limit(BOTH, 1.0, 1024), Limit(BOTH, 1.2, 1, 1023), Limit(FORWARD, 1.5, 1)),
}


class Cell(NamedTuple):
    """A case and the contenders' milliseconds on it: by contender, by mode."""

    case: AttentionCase
    times: dict[str, dict[str, float]]
    support: float

    def ratio(self, mode: str, contender: str = OURS) -> float | None:
        base = self.times.get(BASELINE[self.case.device])
        ours = self.times.get(contender)
        return ours[mode] / base[mode] if ours and base else None


def parse() -> argparse.Namespace:
    parser = command_line.parser(__doc__)
    contenders.add_rivals(parser)
    add = parser.add_argument
    count = command_line.positive_int
    add(
        "--sharpness",
        type=command_line.positive,
        nargs="+",
        metavar="FACTOR",
        default=[0.05, 0.1, 0.15, 0.25, 0.4, 0.6, 0.8, 1.0, 2.0, 4.0, 8.0],
        help="of Gaussian queries; default 0.05 to 8",
    )
    add("--lengths", type=count, nargs="+", metavar="N", help="default 128 to 8192; cuda 65536")
    add("--head-dims", type=count, nargs="+", metavar="D", default=[32, 64, 128])
    add("--rows", type=count, help="of all heads together; default 16384, on cuda 262144")
    add("--heads", type=count, default=16, help="at most; default %(default)s")
    add("--dtype", choices=DTYPES, help="default float32, on cuda bfloat16")
    add("--causal", choices=("both", "yes", "no"), default="both", help="default %(default)s")
    add("--backends", action="store_true", help="each backend by itself too")
    add("--real-layers", type=int, nargs="*", default=data.REAL_LAYERS, help="default 0 6 18")
    add("--real-length", type=count, help="default 2048, on cuda 8192")
    command_line.add_targets(parser, "exit with 1 if a cell passes its limit")
    options = command_line.parsed(parser, DEFAULTS)
    return options


def grid(options: argparse.Namespace) -> Iterator[list[AttentionCase]]:
    """The cases of one shape at a time, whose contenders are then warm."""
    for length in sorted(options.lengths):
        for head_dim in options.head_dims:
            for is_causal in {"both": (True, False), "yes": (True,), "no": (False,)}[
                options.causal
            ]:
                heads = max(1, min(options.heads, options.rows // length))
                base = data.attention_case(
                    options,
                    length=length,
                    heads=heads,
                    head_dim=head_dim,
                    is_causal=is_causal,
                    batch=max(1, options.rows // (length * heads)),
                )
                yield [dataclasses.replace(base, sharpness=c) for c in options.sharpness] + [
                    dataclasses.replace(base, data="sink", sharpness=0.25)
                ]


def real_layers(options: argparse.Namespace) -> list[AttentionCase]:
    shape = {"heads": data.REAL_HEADS, "heads_kv": data.REAL_HEADS_KV}
    return [
        data.attention_case(
            options,
            data="real",
            layer=layer,
            length=options.real_length,
            head_dim=data.REAL_HEAD_DIM,
            **shape,
        )
        for layer in options.real_layers
    ]


def taking_part(options: argparse.Namespace) -> list[Contender]:
    rivals = RIVALS[options.device] if options.rivals is None else options.rivals
    by_choice = Contender(OURS, functools.partial(contenders.ours, None))
    others = contenders.on(options.device, list(rivals))
    if not options.backends:
        others = [other for other in others if other.name not in contenders.best([other.name])]
    return [by_choice, *others]


def cells_of(run: Run) -> list[Cell]:
    """Also of a run that was read from its file."""
    supports = {AttentionCase(**e["case"]): e["support"] for e in run.results.get("sparsity", [])}
    found: dict[AttentionCase, dict[str, dict[str, float]]] = {}
    for m in run.measurements:
        medians = {mode: m.times[mode].median for mode in MODES}
        found.setdefault(m.case, {})[m.contender.name] = medians
    return [Cell(case, times, supports[case]) for case, times in found.items()]


def worst(cells: Iterable[Cell], limit: Limit) -> tuple[float, AttentionCase] | None:
    found = [
        (ratio, cell.case)
        for cell in cells
        if limit.holds(cell.case) and (ratio := cell.ratio(limit.mode)) is not None
    ]
    return max(found, key=lambda pair: pair[0], default=None)


def judge(cells: Sequence[Cell], device: str) -> list[Target]:
    """The worst cell of each limit's group, and how many of the group pass the limit."""
    targets = []
    for limit in LIMITS[device]:
        if (found := worst(cells, limit)) is None:
            continue
        ratio, case = found
        ratios = [c.ratio(limit.mode) for c in cells if limit.holds(c.case)]
        known = [r for r in ratios if r is not None]
        beyond = sum(r > limit.most for r in known)
        text = f"{limit} ({name(case)}; {beyond} of {len(known)} cells beyond)"
        targets.append(Target(text, f"x {BASELINE[device]}", ratio, limit.most))
    return targets


def name(case: AttentionCase) -> str:
    seen = "causal" if case.is_causal else "all keys"
    return f"{case.length:,}, {seen}, d {case.head_dim}, {case.data_words()}"


def table(cells: Sequence[Cell], names: Sequence[str]) -> str:
    head = ["length", "sees", "d", "data", "keys a row"]
    head += [f"{one} {short}" for one in names for short in ("fwd", "f+b")] + ["fwd x", "f+b x"]
    rows = []
    for cell in cells:
        case = cell.case
        row = [f"{case.length}", "causal" if case.is_causal else "all", f"{case.head_dim}"]
        row += [case.data_words(), f"{cell.support:.1f}"]
        for one in names:
            times = cell.times.get(one)
            row += [tables.digits(times and times[mode]) for mode in MODES]
        row += [tables.digits(cell.ratio(mode)) for mode in MODES]
        rows.append(row)
    return tables.table(head, rows)


def main() -> int:
    options = parse()
    entrants = taking_part(options)
    run = Run(options)
    sparsity = run.results.setdefault("sparsity", [])
    for shape in [*grid(options), *([case] for case in real_layers(options))]:
        for case in shape:
            if reason := run.budget.over() or data.missing(case):
                run.leave_out([case], reason)
                continue
            support = contenders.sparsity(case)["support"]
            sparsity.append({"case": dataclasses.asdict(case), "support": support})
            run.measure([case], entrants)
    cells = cells_of(run)
    run.report(table(cells, [entrant.name for entrant in entrants]))
    targets = judge(cells, options.device)
    print("", *targets, sep="\n")
    run.save(targets)
    if options.plot:
        draw(run)
    return 1 if options.targets and not all(target.met for target in targets) else 0


def draw(run: Run) -> None:
    """Maps of ratios: a row a mode, a panel each for causal or not by head_dim; blue is ahead of
    softmax, red behind."""
    from matplotlib.colors import LogNorm

    cells = [cell for cell in cells_of(run) if cell.case.data != "real"]
    shapes = sorted({(not c.case.is_causal, c.case.head_dim) for c in cells})
    columns = [(c.case.data, c.case.sharpness) for c in cells]
    columns = sorted(dict.fromkeys(columns))
    lengths = sorted({c.case.length for c in cells}, reverse=True)
    options = run.options
    title = f"Time of entmax attention in units of {BASELINE[options.device]}'s, {options.dtype}"
    panels = [(mode, shape) for mode in (FORWARD, BOTH) for shape in shapes]
    wide = 1.5 + 0.42 * len(columns)
    with pictures.canvas(options.plot, title, run.footer(), len(shapes), wide, rows=2) as (
        figure,
        axes,
    ):
        for axis, (mode, (sees_all, head_dim)) in zip(axes, panels, strict=True):
            ratios: dict[tuple[Any, ...], float | None] = {
                (c.case.length, c.case.data, c.case.sharpness): c.ratio(mode)
                for c in cells
                if (not c.case.is_causal, c.case.head_dim) == (sees_all, head_dim)
            }
            image = [
                [ratios.get((length, *column)) or float("nan") for column in columns]
                for length in lengths
            ]
            shown = axis.imshow(
                image, cmap="RdBu_r", norm=LogNorm(vmin=0.1, vmax=10.0), aspect="auto"
            )
            for y, line in enumerate(image):
                for x, ratio in enumerate(line):
                    if ratio == ratio:
                        axis.text(
                            x, y, f"{ratio:.2f}", ha="center", va="center", fontsize=6, zorder=3,
                            color="black" if 0.2 < ratio < 5.0 else "white",
                        )  # fmt: skip
            labels = [f"{c:g}" if kind == "gaussian" else f"{kind} {c:g}" for kind, c in columns]
            axis.set_axisbelow(True)  # the grid
            axis.set_xticks(range(len(columns)), labels, rotation=60, fontsize=7)
            axis.set_yticks(range(len(lengths)), [f"{length:,}" for length in lengths], fontsize=7)
            sees = "all keys" if sees_all else "causal"
            axis.set(title=f"{mode}, {sees}, d {head_dim}", xlabel="sharpness")
        axes[0].set_ylabel("positions")
        figure.colorbar(shown, ax=list(axes), label="ours / softmax", shrink=0.6)


if __name__ == "__main__":
    raise SystemExit(main())
