"""Where sparsity makes entmax attention faster than softmax attention, and by how much.

Two sweeps at one length: the share of empty tiles (data made to it), and the share of zero
probabilities (Gaussian data; the sharpness of the queries sets it, the result is measured).
"""

from __future__ import annotations

import argparse
import dataclasses
import math
from collections.abc import Sequence
from typing import NamedTuple

import contenders
import data
from data import AttentionCase
from harness import command_line, pictures, tables
from harness.cases import DTYPES
from harness.contender import BOTH, FORWARD, MODES
from harness.runs import Run

DEFAULTS = {
    "cpu": {"length": 4096, "heads": 2, "dtype": "float32"},
    "cuda": {"length": 16384, "heads": 16, "dtype": "bfloat16"},
}
RIVALS = ("sdpa", "sdpa-flash", "sdpa-cudnn", "adasplash-v1", "adasplash-v2")
TILES, ELEMENTS = "empty tiles", "zero probabilities"


class Point(NamedTuple):
    """A case of a sweep and its measured ``share`` of empty tiles or of zeros."""

    sweep: str
    case: AttentionCase
    share: float
    support: float


def parse() -> argparse.Namespace:
    parser = command_line.parser(__doc__)
    contenders.add_rivals(parser)
    add = parser.add_argument
    count = command_line.positive_int
    add("--length", type=count, help="default 4096, on cuda 16384")
    add("--heads", type=count, help="default 2, on cuda 16")
    add("--head-dim", type=count, default=64, help="default %(default)s")
    add("--dtype", choices=DTYPES, help="default float32, on cuda bfloat16")
    add(
        "--block-sparsity",
        type=command_line.share,
        nargs="*",
        default=[0.0, 0.25, 0.5, 0.7, 0.8, 0.9, 0.95, 0.99],
        metavar="SHARE",
        help="default 0 to 0.99",
    )
    add(
        "--sharpness",
        type=command_line.positive,
        nargs="*",
        default=[0.01, 0.05, 0.15, 0.4, 1.0, 2.0, 4.0, 8.0],
        metavar="FACTOR",
        help="of Gaussian queries; default 0.01 (nearly no zeros) to 8",
    )
    options = command_line.parsed(parser, DEFAULTS)
    return options


def main() -> int:
    options = parse()
    taking_part = contenders.on(options.device, options.rivals, RIVALS)
    run = Run(options)
    base = data.attention_case(options, length=options.length)
    # Sparse ones first: they are quick, and the budget is for where the crossing is.
    wanted = [
        (TILES, dataclasses.replace(base, data="blocks", block_sparsity=share))
        for share in sorted(options.block_sparsity, reverse=True)
    ] + [
        (ELEMENTS, dataclasses.replace(base, sharpness=sharpness))
        for sharpness in sorted(options.sharpness, reverse=True)
    ]
    points: list[Point] = []
    for sweep, case in wanted:
        if reason := run.budget.over() or data.missing(case):
            run.leave_out([case], reason)
            continue
        found = contenders.sparsity(case)
        share = found["empty_tiles" if sweep == TILES else "zeros"]
        points.append(Point(sweep, case, share, found["support"]))
        run.results["points"] = [
            {"sweep": p.sweep, "case": str(p.case), "share": p.share, "support": p.support}
            for p in points
        ]
        run.measure([case], taking_part)
    times = {(m.case, m.contender.name): m for m in run.measurements}
    names = list(dict.fromkeys(m.contender.name for m in run.measurements))
    found = crossings(points, times, names)
    run.results["crossings"] = found
    run.save()
    run.report(table(points, times, names))
    print()
    for entry in found:
        print(words(entry))
    if options.plot:
        draw(run, points, times, names)
    return 0


def crossings(points: Sequence[Point], times: dict, names: Sequence[str]) -> list[dict]:
    """From which share on each of ours stays faster than each rival; the share between two
    measured ones is interpolated linearly in the ratio."""
    mine = contenders.best(names)
    result = []
    for sweep in (TILES, ELEMENTS):
        at = sorted((p for p in points if p.sweep == sweep), key=lambda p: p.share)
        for ours in mine:
            for rival in names:
                if rival in mine:
                    continue
                for mode in MODES:
                    ratios = [
                        (p.share, a.times[mode].median / b.times[mode].median)
                        for p in at
                        if (a := times.get((p.case, ours))) and (b := times.get((p.case, rival)))
                    ]
                    if ratios:
                        result.append(
                            {
                                "sweep": sweep,
                                "ours": ours,
                                "rival": rival,
                                "mode": mode,
                                "from": crossing(ratios),
                                "sparsest": ratios[-1][0],
                                "ratio_there": ratios[-1][1],
                                "ratio_densest": ratios[0][1],
                            }
                        )
    return result


def crossing(ratios: Sequence[tuple[float, float]]) -> float | None:
    """The share from which all ratios are below 1; None where the last one is not."""
    if ratios[-1][1] >= 1.0:
        return None
    for (x, above), (after, below) in zip(ratios[-2::-1], ratios[:0:-1], strict=True):
        if above >= 1.0:
            return x + (after - x) * (above - 1.0) / (above - below)
    return ratios[0][0]


def words(entry: dict) -> str:
    at = f"{100 * entry['sparsest']:.2f} % {entry['sweep']}: {entry['ratio_there']:.2f}x its time"
    if entry["from"] is None:
        return f"{entry['ours']} does not pass {entry['rival']} ({entry['mode']}); at {at}"
    return (
        f"{entry['ours']} passes {entry['rival']} ({entry['mode']}) from "
        f"{100 * entry['from']:.2f} % {entry['sweep']} on; at {at}"
    )


def table(points: Sequence[Point], times: dict, names: Sequence[str]) -> str:
    head = ["sweep", "measured", "keys a row"]
    head += [f"{name} {short}" for name in names for short in ("fwd", "f+b")]
    rows = []
    for p in points:
        row = [p.sweep, f"{100 * p.share:.2f} %", f"{p.support:.1f}"]
        for name in names:
            m = times.get((p.case, name))
            row += [tables.digits(m.times[mode].median if m else None) for mode in MODES]
        rows.append(row)
    return tables.table(head, rows)


def draw(run: Run, points: Sequence[Point], times: dict, names: Sequence[str]) -> None:
    """A panel a sweep and mode; zeros are spread by the logarithm of what is left."""
    options = run.options
    colour = pictures.colours(names)
    title = f"Time by sparsity: {options.length:,} positions, {options.heads} heads, "
    title += f"head_dim {options.head_dim}, {options.dtype}, causal"
    panels = [(sweep, mode) for sweep in (TILES, ELEMENTS) for mode in (FORWARD, BOTH)]
    with pictures.canvas(options.plot, title, run.footer(), 4, 4.0) as (_, axes):
        for axis, (sweep, mode) in zip(axes, panels, strict=True):
            at = sorted((p for p in points if p.sweep == sweep), key=lambda p: p.share)
            for name in names:
                line = [
                    (p.share, times[p.case, name].times[mode].median)
                    for p in at
                    if (p.case, name) in times
                ]
                if line:
                    x = [100 * s if sweep == TILES else 1 - s for s, _ in line]
                    y = [ms for _, ms in line]
                    axis.plot(x, y, "o-", color=colour[name], markersize=4, label=name)
            axis.set(title=f"{mode}\nby {sweep}", yscale="log", xlabel=f"{sweep}, %")
            if sweep == ELEMENTS and at:
                axis.set_xscale("log")
                lowest = math.floor(math.log10(max(1e-6, 1 - at[-1].share)))
                ticks = [10.0**e for e in range(0, lowest - 1, -1)]
                axis.set_xticks(ticks, [f"{100 * (1 - t):.6g}" for t in ticks])
                axis.set_xticks([], minor=True)
                axis.invert_xaxis()
        axes[0].set_ylabel("time, ms (log scale)")


if __name__ == "__main__":
    raise SystemExit(main())
