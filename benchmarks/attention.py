"""Attention against its rivals: forward, backward, both, and peak memory.

Data: Gaussian with a sharpness, tensors made to a share of empty tiles (``blocks``), and the
queries, keys and values of a real model (``real``; ``capture.py`` makes them).
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import contenders
import data
from contenders import BASELINE, DENSE
from data import AttentionCase
from harness import command_line, pictures, tables
from harness.cases import DTYPES, Case
from harness.contender import BOTH, FORWARD, MODES, Contender, LeftOut, admit
from harness.measuring import Measurement
from harness.memory import MEBIBYTE, no_peak_memory, peak_bytes
from harness.runs import Run
from harness.targets import Target

OURS = contenders.name_of("cpu")
"""Whom the targets are for."""

KINDS = ("gaussian", "blocks", "real")
"""Of data, with an option each that says how sparse they are."""

DEFAULTS = {
    "cpu": {
        "lengths": [2048, 4096],
        "dtypes": ["float32", "bfloat16"],
        "heads": 8,
        "sharpness": [1.0],
        "real_length": 2048,
    },
    "cuda": {
        "lengths": [4096, 16384],
        "dtypes": ["bfloat16"],
        "heads": 16,
        "sharpness": [1.0, 4.0],
        "real_length": 8192,
    },
}


# Targets on the CPU


class Entry(NamedTuple):
    """A contender on the default case of a dtype and length."""

    contender: str
    dtype: str
    length: int

    @property
    def case(self) -> AttentionCase:
        return AttentionCase(device="cpu", dtype=self.dtype, alpha=1.5, length=self.length)


class RatioTarget(NamedTuple):
    """``over``'s time in units of ``under``'s; limits of a forward, of a forward and backward."""

    text: str
    over: Entry
    under: Entry
    limits: tuple[float, float]
    at_least: bool = False


RATIO_TARGETS = (
    RatioTarget(
        "time, float32, 4,096 positions",
        Entry(OURS, "float32", 4096),
        Entry("sdpa", "float32", 4096),
        (0.7, 0.3),
    ),
    RatioTarget(
        "time of dense entmax15 attention, float32, 2,048 positions",
        Entry(DENSE, "float32", 2048),
        Entry(OURS, "float32", 2048),
        (60.0, 60.0),
        at_least=True,
    ),
    RatioTarget(
        "time, bfloat16, 4,096 positions",
        Entry(OURS, "bfloat16", 4096),
        Entry(OURS, "float32", 4096),
        (1.3, 1.3),
    ),
)
MEMORY_ENTRY = Entry(OURS, "float32", 32768)
MEMORY_LIMIT_GIB = 1.5


def check_targets(
    parser: argparse.ArgumentParser,
    entrants: Sequence[tuple[Case, Contender]],
    left_out: Sequence[LeftOut],
) -> None:
    """Ends the program, before it measures, where a target could not be judged."""
    if reason := no_peak_memory("cpu"):
        parser.error(f"argument --targets: {reason}")
    present = {(case, contender.name) for case, contender in entrants}
    reasons = {(case, contender): f": {reason}" for case, contender, reason in left_out}
    for entry in {entry for target in RATIO_TARGETS for entry in (target.over, target.under)}:
        pair = entry.case, entry.contender
        if pair not in present:
            parser.error(
                f"argument --targets: needs {entry.contender} on the CPU at {entry.dtype}, length "
                f"{entry.length} and the default of every other option"
                + reasons.get(pair, ", which these options leave out")
            )


def judge(measurements: Sequence[Measurement]) -> list[Target]:
    """All targets; measures the memory of the long case."""
    times = {(m.case, m.contender.name): m.times for m in measurements}
    targets = []
    for entry in {e for target in RATIO_TARGETS for e in (target.over, target.under)}:
        if (entry.case, entry.contender) not in times:
            raise SystemExit(f"error: --targets: {entry.contender} was left out, see above")
    for text, over, under, limits, at_least in RATIO_TARGETS:
        for mode, limit in zip(MODES, limits, strict=True):
            ratio = (
                times[over.case, over.contender][mode].median
                / times[under.case, under.contender][mode].median
            )
            unit = f"x {under.contender} {under.dtype}"
            targets.append(Target(f"{mode} {text}", unit, ratio, limit, at_least))
    peak = peak_bytes(MEMORY_ENTRY.case, next(c for c in contenders.OURS if c.name == OURS)) / 2**30
    text = "memory of forward+backward above the tensors, 32,768 positions"
    return [*targets, Target(text, "GiB", peak, MEMORY_LIMIT_GIB)]


# The program


def parse() -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    parser = command_line.parser(__doc__)
    command_line.add_targets(parser, "judge the CPU targets; exit with 1 if one is missed")
    contenders.add_rivals(parser)
    add = parser.add_argument
    count = command_line.positive_int
    add(
        "--lengths",
        type=count,
        nargs="+",
        metavar="N",
        help="queries and keys of gaussian and blocks; default 2048 4096, on cuda 4096 16384",
    )
    add("--batch", type=count, default=1, help="default %(default)s")
    add("--heads", type=count, help="of the queries; default 8, on cuda 16")
    add("--heads-kv", type=count, help="of keys and values; default: as --heads")
    add("--head-dim", type=count, default=64, help="default %(default)s")
    add("--dtypes", nargs="+", choices=DTYPES, help="default float32 bfloat16, on cuda bfloat16")
    add(
        "--causal",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="whether queries see no later keys; default --causal",
    )
    add(
        "--data",
        nargs="+",
        choices=KINDS,
        default=list(KINDS),
        help="default: all; real needs what capture.py writes",
    )
    add(
        "--sharpness",
        type=command_line.positive,
        nargs="+",
        metavar="FACTOR",
        help="factors of gaussian queries, higher is sparser; default 1, on cuda 1 4",
    )
    add(
        "--block-sparsity",
        type=command_line.share,
        nargs="+",
        default=[0.75],
        metavar="SHARE",
        help="shares of empty tiles of blocks; default 0.75",
    )
    add("--block", type=count, default=64, help="side of these tiles; default %(default)s")
    add("--real-layers", type=int, nargs="+", default=data.REAL_LAYERS, help="default 0 6 18")
    add("--real-length", type=count, help="default 2048, on cuda 8192")
    add(
        "--peak-memory",
        action=argparse.BooleanOptionalAction,
        help="measure it too, of a forward and backward; default on cuda alone",
    )
    options = command_line.parsed(parser, DEFAULTS)
    options.heads_kv = options.heads_kv or options.heads
    if options.peak_memory is None:
        options.peak_memory = options.device == "cuda"
    if options.heads % options.heads_kv:
        parser.error(f"argument --heads-kv: must divide --heads {options.heads}")
    if options.peak_memory and (reason := no_peak_memory(options.device)):
        parser.error(f"argument --peak-memory: {reason}")
    return parser, options


def groups(options: argparse.Namespace) -> list[list[AttentionCase]]:
    """Cases that are measured in turn: the dtypes of one problem, since a target compares two of
    them. Short ones first: they tell how long the others will take."""
    base = AttentionCase(
        device=options.device,
        dtype="float32",
        alpha=options.alpha,
        batch=options.batch,
        heads=options.heads,
        heads_kv=options.heads_kv,
        length=1,
        head_dim=options.head_dim,
        is_causal=options.causal,
        block=options.block,
    )
    kinds: list[AttentionCase] = []
    for length in options.lengths:
        sized = dataclasses.replace(base, length=length)
        if "gaussian" in options.data:
            kinds += [dataclasses.replace(sized, sharpness=c) for c in options.sharpness]
        if "blocks" in options.data:
            kinds += [
                dataclasses.replace(sized, data="blocks", block_sparsity=share)
                for share in options.block_sparsity
            ]
    if "real" in options.data:
        kinds += [
            dataclasses.replace(
                base,
                data="real",
                layer=layer,
                batch=1,
                heads=data.REAL_HEADS,
                heads_kv=data.REAL_HEADS_KV,
                head_dim=data.REAL_HEAD_DIM,
                length=options.real_length,
                is_causal=True,
            )
            for layer in options.real_layers
        ]
    kinds = sorted(dict.fromkeys(kinds), key=lambda case: case.work())
    return [
        [dataclasses.replace(case, dtype=dtype) for dtype in dict.fromkeys(options.dtypes)]
        for case in kinds
    ]


def main() -> int:
    parser, options = parse()
    taking_part = contenders.on(options.device, options.rivals)
    run = Run(options)
    cases = groups(options)
    if options.targets:
        check_targets(parser, *admit([c for group in cases for c in group], taking_part))
    sparsity: dict[str, dict[str, float]] = {}
    for group in cases:
        if not (reason := run.budget.over() or data.missing(group[0])):
            sparsity[str(group[0])] = contenders.sparsity(group[0])
            run.results["sparsity"] = sparsity
            run.measure(group, taking_part, options.peak_memory)
        else:
            run.leave_out(group, reason)
    run.report(table(run.measurements, options.device))
    print(f"\n{sparsity_table(sparsity)}")
    return run.conclude(judge, draw)


def table(measurements: Sequence[Measurement], device: str) -> str:
    """A line a measurement; ``/ name`` columns are times in units of that contender's."""
    times = {(m.case, m.contender.name): m.times for m in measurements}
    bases = (BASELINE[device], DENSE)
    head = ["dtype", "length", "data", "contender", "fwd ms", "bwd ms", "fwd+bwd ms"]
    head += [f"{mode} / {base}" for base in bases for mode in ("fwd", "fwd+bwd")]
    rows = []
    for m in measurements:
        case = m.case
        row = [case.dtype, str(case.length), case.data_words(), m.contender.name]
        row += [tables.digits(ms) for ms in (m.forward, m.backward, m.both)]
        for base in bases:
            row += tables.ratios(m.times, times.get((case, base)))
        row.append(f"{m.error:.0e}")
        row.append(tables.digits(m.peak_bytes and m.peak_bytes / MEBIBYTE))
        rows.append(row)
    return tables.table([*head, "error", "peak MiB"], rows)


def sparsity_table(found: dict[str, dict[str, float]]) -> str:
    return tables.table(
        ["measured on", "empty 64x64 tiles", "zeros", "keys a row", "solver steps"],
        (
            [
                case,
                f"{100 * s['empty_tiles']:.1f} %",
                f"{100 * s['zeros']:.2f} %",
                f"{s['support']:.1f}",
                f"{s['iterations']:.2f}",
            ]
            for case, s in found.items()
        ),
    )


def draw(run: Run) -> None:
    """Bars: a panel a mode, a group of bars a case of the first dtype."""
    dtype = run.options.dtypes[0]
    found = [m for m in run.measurements if m.case.dtype == dtype]
    cases = list(dict.fromkeys(m.case for m in found))
    names = list(dict.fromkeys(m.contender.name for m in found))
    colour = pictures.colours(names)
    title = f"Attention, {dtype}, head_dim {run.options.head_dim}"
    width = 0.84 / max(1, len(names))
    wide = max(9.0, 1.1 * len(cases))  # the labels below the groups stand side by side
    with pictures.canvas(run.options.plot, title, run.footer(), 1, wide, rows=2) as (_, axes):
        for axis, mode in zip(axes, (FORWARD, BOTH), strict=True):
            for i, name in enumerate(names):
                at = {m.case: m.times[mode].median for m in found if m.contender.name == name}
                places = [cases.index(c) + (i - (len(names) - 1) / 2) * width for c in at]
                axis.bar(places, at.values(), 0.92 * width, color=colour[name], label=name)
            labels = [f"{c.data_words()}\n{c.length:,}" for c in cases]
            axis.set_xticks(range(len(cases)), labels, fontsize=8)
            axis.set(title=mode, yscale="log", ylabel="time, ms (log scale)")
        axes[-1].set_xlabel("data, and length")


if __name__ == "__main__":
    raise SystemExit(main())
