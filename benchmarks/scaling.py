"""Time and memory of attention against length, heads and head_dim, with fitted exponents."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence

import contenders
import data
from data import AttentionCase
from harness import command_line, pictures, tables
from harness.cases import DTYPES
from harness.measuring import Measurement
from harness.memory import MEBIBYTE, no_peak_memory
from harness.runs import Run

DEFAULTS = {
    "cpu": {
        "lengths": [1024, 2048, 4096, 8192, 16384, 32768],
        "length_heads": 1,
        "heads": [1, 2, 4, 8],
        "head_dims": [16, 32, 64, 128, 256],
        "length": 2048,
        "middle_heads": 2,
        "dtype": "float32",
        "memory_lengths": [8192, 16384, 32768],
    },
    "cuda": {
        "lengths": [4096, 8192, 16384, 32768, 65536, 131072, 262144, 524288, 1048576],
        "length_heads": 2,
        "heads": [1, 2, 4, 8, 16, 32, 64],
        "head_dims": [16, 32, 64, 128, 256],
        "length": 8192,
        "middle_heads": 16,
        "dtype": "bfloat16",
        "memory_lengths": None,
    },
}
RIVALS = ("sdpa", "sdpa-flash", "sdpa-cudnn", "adasplash-v1", "adasplash-v2")
FITTED = 3
"""Points of the steep end that an exponent is fitted to: below them launches and set-up count."""

AXES = ("length", "heads", "head_dim")


def parse() -> argparse.Namespace:
    parser = command_line.parser(__doc__)
    contenders.add_rivals(parser)
    add = parser.add_argument
    count = command_line.positive_int
    add("--lengths", type=count, nargs="*", help="default 4096 to 1048576, on the CPU to 32768")
    add("--length-heads", type=count, help="heads of that sweep; default 2, on the CPU 1")
    add("--heads", type=count, nargs="*", help="default 1 to 64, on the CPU 1 to 8")
    add("--head-dims", type=count, nargs="*", help="default 16 to 256")
    add("--length", type=count, help="of the sweeps of heads and head_dim; default 8192, CPU 2048")
    add("--middle-heads", type=count, help="heads of the sweep of head_dim; default 16, CPU 2")
    add("--dtype", choices=DTYPES, help="default bfloat16, on the CPU float32")
    add(
        "--memory-lengths",
        type=count,
        nargs="*",
        help="lengths whose memory is measured; default: all, on the CPU 8192 16384 32768",
    )
    add(
        "--sharpness",
        type=command_line.positive,
        default=4.0,
        help="of the Gaussian queries; default %(default)s",
    )
    options = command_line.parsed(parser, DEFAULTS)
    if options.memory_lengths is None:
        options.memory_lengths = options.lengths
    if options.memory_lengths and (reason := no_peak_memory(options.device)):
        parser.error(f"argument --memory-lengths: {reason}")
    return options


def main() -> int:
    options = parse()
    taking_part = contenders.on(options.device, options.rivals, RIVALS)
    run = Run(options)

    def case(length: int, heads: int, head_dim: int) -> AttentionCase:
        return data.attention_case(
            options,
            length=length,
            heads=heads,
            head_dim=head_dim,
            sharpness=options.sharpness,
        )

    # Long lengths come last: they take what is left of the budget.
    sweeps = {
        "heads": [case(options.length, heads, 64) for heads in sorted(options.heads)],
        "head_dim": [
            case(options.length, options.middle_heads, d) for d in sorted(options.head_dims)
        ],
        "length": [case(n, options.length_heads, 64) for n in sorted(options.lengths)],
    }
    found: dict[str, list[Measurement]] = {axis: [] for axis in AXES}
    for axis, cases in sweeps.items():
        for one in cases:
            memory = axis == "length" and one.length in options.memory_lengths
            found[axis] += run.measure([one], taking_part, memory)
    fits = {
        f"{quantity} by {axis}": {
            name: fit(points) for name, points in series(found[axis], axis, quantity).items()
        }
        for axis in AXES
        for quantity in QUANTITIES
    }
    run.results["exponents"] = fits
    run.results["sweeps"] = {axis: [m.record() for m in found[axis]] for axis in AXES}
    run.save()
    run.report(table(found))
    print(f"\n{fits_table(fits)}")
    if options.plot:
        draw(run, found, fits)
    return 0


QUANTITIES = {
    "forward ms": lambda m: m.forward,
    "fwd+bwd ms": lambda m: m.both,
    "peak MiB": lambda m: m.peak_bytes and m.peak_bytes / MEBIBYTE,
}


def series(
    measurements: Sequence[Measurement], axis: str, quantity: str
) -> dict[str, list[tuple[int, float]]]:
    """Points of each contender, where the quantity was measured."""
    found: dict[str, list[tuple[int, float]]] = {}
    for m in measurements:
        if (value := QUANTITIES[quantity](m)) is not None:
            found.setdefault(m.contender.name, []).append((getattr(m.case, axis), value))
    return found


def fit(points: Sequence[tuple[int, float]]) -> float | None:
    """The exponent of ``y = c x^e``, by least squares of logarithms over the last points."""
    logs = [(math.log(x), math.log(y)) for x, y in points[-FITTED:] if y > 0]
    if len(logs) < FITTED:
        return None
    mean_x, mean_y = (sum(v) / len(logs) for v in zip(*logs, strict=True))
    spread = sum((x - mean_x) ** 2 for x, _ in logs)
    return sum((x - mean_x) * (y - mean_y) for x, y in logs) / spread


def table(found: dict[str, list[Measurement]]) -> str:
    rows = [
        [
            axis,
            str(getattr(m.case, axis)),
            m.contender.name,
            *(tables.digits(value(m)) for value in QUANTITIES.values()),
            f"{m.error:.0e}",
        ]
        for axis, measurements in found.items()
        for m in measurements
    ]
    return tables.table(["sweep", "value", "contender", *QUANTITIES, "error"], rows)


def fits_table(fits: dict[str, dict[str, float | None]]) -> str:
    rows = [
        [what, name, "-" if exponent is None else f"{exponent:.2f}"]
        for what, by_name in fits.items()
        for name, exponent in by_name.items()
    ]
    return tables.table([f"last {FITTED} points", "contender", "exponent"], rows)


def draw(
    run: Run,
    found: dict[str, list[Measurement]],
    fits: dict[str, dict[str, float | None]],
) -> None:
    """A panel a sweep that was measured, each with its own scale; dashed: with backward."""
    options = run.options
    panels = (
        ("length", ("forward ms", "fwd+bwd ms"), f"heads {options.length_heads}, head_dim 64"),
        ("length", ("peak MiB",), f"heads {options.length_heads}, head_dim 64"),
        ("heads", ("forward ms", "fwd+bwd ms"), f"length {options.length:,}, head_dim 64"),
        (
            "head_dim",
            ("forward ms", "fwd+bwd ms"),
            f"length {options.length:,}, heads {options.middle_heads}",
        ),
    )
    panels = tuple(panel for panel in panels if found[panel[0]])
    colour = pictures.colours(m.contender.name for ms in found.values() for m in ms)
    title = f"Scaling of attention: causal, {options.dtype}, queries x {options.sharpness:g}"
    columns = max(1, len(panels))
    with pictures.canvas(options.plot, title, run.footer(), columns, 4.0, share_y=False) as (
        _,
        axes,
    ):
        for axis, (swept, quantities, fixed) in zip(axes, panels, strict=False):
            notes = []
            ticks: set[int] = set()
            for quantity in quantities:
                for name, points in series(found[swept], swept, quantity).items():
                    dashed = quantity.startswith("fwd+bwd")
                    x, y = zip(*points, strict=True)
                    ticks.update(x)
                    axis.plot(
                        x,
                        y,
                        "o--" if dashed else "o-",
                        color=colour[name],
                        markersize=4,
                        label=None if dashed else name,
                    )
                    exponent = fits[f"{quantity} by {swept}"][name]
                    if exponent is not None and quantity == quantities[-1]:
                        notes.append(f"{name}: exponent {exponent:.2f}")
            unit = (
                "peak memory, MiB" if quantities == ("peak MiB",) else "ms (dashed: with backward)"
            )
            axis.set(title=f"{swept}\n({fixed})", xlabel=swept, ylabel=unit)
            axis.set(xscale="log", yscale="log")
            labels = [f"{t // 1024}k" if t >= 1024 else str(t) for t in sorted(ticks)]
            axis.set_xticks(sorted(ticks), labels, fontsize=8)
            axis.set_xticks([], minor=True)
            if notes:
                # In the margin below the axis label, where no line passes.
                axis.set_xlabel(f"{swept}\n" + "\n".join(notes), fontsize=8)


if __name__ == "__main__":
    raise SystemExit(main())
