"""The efficiency figure of AdaSplash-2: time of a training step relative to FlashAttention-2.

A length and block sparsity each, forward and backward stacked. The paper's own bars stand beside
ours for reference: they were measured on the paper's device and its problem size, not here.
"""

from __future__ import annotations

import argparse
from typing import NamedTuple

import contenders
import data
from contenders import BASELINE
from harness import command_line, pictures, tables
from harness.cases import DTYPES
from harness.measuring import Measurement
from harness.runs import Run


class Paper(NamedTuple):
    """A bar pair of the paper: share of empty blocks, ms of AdaSplash-2 and FlashAttention-2."""

    block_sparsity: float
    adasplash2: float
    flash: float


PAPER = {
    4096: Paper(0.51, 3.3, 3.1),
    8192: Paper(0.58, 11, 11),
    16384: Paper(0.64, 41, 42),
    32768: Paper(0.70, 142, 160),
    65536: Paper(0.75, 461, 583),
    131072: Paper(0.85, 1500, 2400),
}
"""Goncalves et al. 2026, AdaSplash-2: run time by length, forward and backward."""

PAPER_NAME = "the paper's bars (its device)"

DEFAULTS = {
    "cpu": {"lengths": [1024, 2048, 4096, 8192, 16384], "heads": 2, "dtype": "float32"},
    "cuda": {"lengths": list(PAPER), "heads": 16, "dtype": "bfloat16"},
}
RIVALS = ("sdpa", "sdpa-flash", "sdpa-cudnn", "flex", "adasplash-v1", "adasplash-v2")


def sparsity_at(length: int) -> float:
    """The paper's at its lengths; below and between them that of the nearest one."""
    nearest = min(PAPER, key=lambda known: abs(known.bit_length() - length.bit_length()))
    return PAPER[nearest].block_sparsity


def parse() -> argparse.Namespace:
    parser = command_line.parser(__doc__)
    contenders.add_rivals(parser)
    add = parser.add_argument
    count = command_line.positive_int
    add(
        "--lengths",
        type=count,
        nargs="+",
        help="default: the paper's, 4096 to 131072; on the CPU 1024 to 16384",
    )
    add(
        "--block-sparsity",
        type=command_line.share,
        nargs="+",
        metavar="SHARE",
        help="one a length; default: the paper's, 0.51 to 0.85",
    )
    add("--block", type=count, default=64, help="side of the tiles; default %(default)s")
    add("--heads", type=count, help="default 16, on the CPU 2")
    add("--head-dim", type=count, default=64, help="default %(default)s")
    add("--dtype", choices=DTYPES, help="default bfloat16, on the CPU float32")
    options = command_line.parsed(parser, DEFAULTS)
    options.lengths = sorted(set(options.lengths))
    if options.block_sparsity is None:
        options.block_sparsity = [sparsity_at(length) for length in options.lengths]
    if len(options.block_sparsity) != len(options.lengths):
        parser.error("argument --block-sparsity: needs as many numbers as --lengths")
    return options


def main() -> int:
    options = parse()
    taking_part = contenders.on(options.device, options.rivals, RIVALS)
    run = Run(options)
    sparsity: dict[int, dict[str, float]] = {}
    for length, share in zip(options.lengths, options.block_sparsity, strict=True):
        case = data.attention_case(
            options, length=length, data="blocks", block_sparsity=share, block=options.block
        )
        if reason := run.budget.over() or data.missing(case):
            run.leave_out([case], reason)
            continue
        sparsity[length] = contenders.sparsity(case)
        run.results["sparsity"] = sparsity
        run.results["paper_ms"] = {n: p._asdict() for n, p in PAPER.items()}
        run.measure([case], taking_part)
    run.report(table(run.measurements, sparsity, BASELINE[options.device]))
    if options.plot:
        draw(run)
    return 0


def table(
    measurements: list[Measurement], sparsity: dict[int, dict[str, float]], baseline: str
) -> str:
    base = {m.case.length: m.both for m in measurements if m.contender.name == baseline}
    rows = []
    for m in measurements:
        length = m.case.length
        cells = [str(length), f"{100 * sparsity[length]['empty_tiles']:.1f} %", m.contender.name]
        cells += [tables.digits(ms) for ms in (m.forward, m.backward, m.both)]
        ratio = m.both / base[length] if length in base else None
        paper = PAPER.get(length)
        printed = (
            paper.adasplash2 / paper.flash if paper and m.contender in contenders.OURS else None
        )
        cells += [tables.digits(ratio), tables.digits(printed), f"{m.error:.0e}"]
        rows.append(cells)
    head = ["length", "empty tiles", "contender", "fwd ms", "bwd ms", "fwd+bwd ms"]
    return tables.table([*head, f"/ {baseline}", "paper's ratio", "error"], rows)


def draw(run: Run) -> None:
    """Stacked bars relative to the baseline; milliseconds written above them. As high as ours, the
    baseline's and those that are not far beyond: taller ones are cut."""
    # Lengths are words where the results come from JSON.
    sparsity = {int(length): found for length, found in run.results["sparsity"].items()}
    baseline = BASELINE[run.options.device]
    base = {m.case.length: m.both for m in run.measurements if m.contender.name == baseline}
    found = [m for m in run.measurements if m.case.length in base]
    lengths = list(dict.fromkeys(m.case.length for m in found))
    names = list(dict.fromkeys(m.contender.name for m in found))
    colour = pictures.colours(names)
    slots = len(names) + 1
    width = 0.86 / slots
    title = f"Forward and backward relative to {baseline}\n{run.options.heads} heads, "
    title += f"head_dim {run.options.head_dim}, {run.options.dtype}, causal"
    tops = [m.both / base[m.case.length] for m in found]
    mine = {contender.name for contender in contenders.OURS}
    ours = [t for t, m in zip(tops, found, strict=True) if m.contender.name in mine]
    papers = [PAPER[n].adasplash2 / PAPER[n].flash for n in lengths if n in PAPER]
    concerned = max([1.2, *ours, *papers])
    top = max([concerned, *(t for t in tops if t <= 1.5 * concerned)])
    with pictures.canvas(run.options.plot, title, run.footer(), 1, 2.6 * len(lengths)) as (
        _,
        (axis,),
    ):
        axis.axhline(1.0, color="0.4", linewidth=0.8)

        def written(x: float, height: float, text: str, colour: str = "0.2") -> None:
            axis.annotate(
                text,
                (x, min(height, top)),
                xytext=(0, 3),
                textcoords="offset points",
                ha="center",
                va="bottom",
                rotation=90,
                fontsize=7,
                color=colour,
            )

        for m in found:
            length, name = m.case.length, m.contender.name
            x = lengths.index(length) + (names.index(name) - (slots - 1) / 2) * width
            backward = m.backward / base[length]
            forward = m.both / base[length] - backward  # with what it keeps for the backward
            axis.bar(x, forward, 0.92 * width, color=colour[name], label=name)
            axis.bar(x, backward, 0.92 * width, bottom=forward, color=colour[name], alpha=0.45)
            cut = " (cut off)" if forward + backward > top else ""
            written(x, forward + backward, f"{tables.digits(m.both)} ms{cut}")
        for length in lengths:
            if paper := PAPER.get(length):
                x = lengths.index(length) + (slots - 1) / 2 * width
                height = paper.adasplash2 / paper.flash
                outline = {"fill": False, "edgecolor": "0.4", "hatch": "///", "label": PAPER_NAME}
                axis.bar(x, height, 0.92 * width, **outline)
                written(x, height, f"{paper.adasplash2:g} / {paper.flash:g} ms", "0.4")
        axis.bar(0, 0, color="0.3", label="forward (full colour)")
        axis.bar(0, 0, color="0.3", alpha=0.45, label="backward (pale)")
        labels = [f"{n:,}\n{100 * sparsity[n]['empty_tiles']:.0f} % empty" for n in lengths]
        axis.set_xticks(range(len(lengths)), labels)
        axis.set(xlabel="length, and measured share of empty 64x64 tiles", ylim=(0, top * 1.3))
        axis.set_ylabel(f"time / time of {baseline}")


if __name__ == "__main__":
    raise SystemExit(main())
