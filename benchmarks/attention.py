"""Attention against its rivals: time of a forward, of a forward and backward, and peak memory."""

from __future__ import annotations

import argparse
import functools
import warnings
from collections.abc import Callable, Sequence
from itertools import product
from typing import NamedTuple

import harness
import torch
import torch.nn.functional as F
from harness import BOTH, DTYPES, MODES, AttentionCase, Contender, Measurement, Target
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import adasplash2

OURS, DENSE = "adasplash2", "dense"
BASELINE = {"cpu": "sdpa", "cuda": "sdpa-flash"}
"""Whose time the table's ratios are relative to, beside dense entmax."""

DENSE_COPIES = 14
"""Buffers of the size of the scores at the peak of dense entmax15 attention, forward and backward:
measured with entmax 1.3 at 8 heads and 1,024 positions."""


# Contenders


def ours(case: AttentionCase, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return adasplash2.entmax_attention(
        query,
        key,
        value,
        alpha=case.alpha,
        is_causal=case.is_causal,
        enable_gqa=case.heads != case.heads_kv,
    )


def ours_refusal(case: AttentionCase) -> str | None:
    entry = torch.zeros((), dtype=DTYPES[case.dtype], device=case.device)

    def shaped(heads: int) -> Tensor:
        return entry.expand(case.batch, heads, case.length, case.head_dim)

    try:
        explanation = adasplash2.explain(
            shaped(case.heads),
            shaped(case.heads_kv),
            shaped(case.heads_kv),
            alpha=case.alpha,
            is_causal=case.is_causal,
            enable_gqa=case.heads != case.heads_kv,
        )
    except ValueError as error:
        return str(error)
    if explanation.chosen is not None:
        return None
    return "; ".join(
        f"backend {name}: {reason}" for name, reasons in explanation.others for reason in reasons
    )


def sdpa(case: AttentionCase, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(
        query, key, value, is_causal=case.is_causal, enable_gqa=case.heads != case.heads_kv
    )


def sdpa_by(
    backend: SDPBackend, case: AttentionCase, query: Tensor, key: Tensor, value: Tensor
) -> Tensor:
    with sdpa_kernel(backend):
        return sdpa(case, query, key, value)


def dense(case: AttentionCase, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Materialised scores through the package ``entmax``; 16-bit inputs in float32."""
    dtype = query.dtype
    if dtype.itemsize == 2:
        query, key, value = query.float(), key.float(), value.float()
    group = case.heads // case.heads_kv
    if group > 1:
        key, value = (t.repeat_interleave(group, dim=1) for t in (key, value))
    scores = (query @ key.mT) * case.head_dim**-0.5
    if case.is_causal:
        hidden = torch.ones(case.length, case.length, dtype=torch.bool, device=case.device).triu(1)
        scores = scores.masked_fill(hidden, -torch.inf)
    return (harness.entmax_package(scores, case.alpha) @ value).to(dtype)


def dense_refusal(case: AttentionCase) -> str | None:
    itemsize = max(4, DTYPES[case.dtype].itemsize)
    needed = case.batch * case.heads * case.length**2 * itemsize * DENSE_COPIES
    allowed = harness.free_bytes(case.device) // 2
    if needed > allowed:
        gib = 2**30
        return f"needs {needed / gib:.1f} GiB, half of the free memory is {allowed / gib:.1f} GiB"
    return harness.missing("entmax")


def adasplash(
    version: str, case: AttentionCase, query: Tensor, key: Tensor, value: Tensor
) -> Tensor:
    import adasplash

    if version == "v2":
        return adasplash.adasplash_v2(query, key, value)
    return adasplash.adasplash_v1(query, key, value, alpha=case.alpha, is_causal=case.is_causal)


def adasplash_refusal(version: str, case: AttentionCase) -> str | None:
    if reason := harness.missing("adasplash"):
        return reason
    if case.length & (case.length - 1):
        return "takes lengths that are powers of two"
    if version == "v2" and (case.alpha != 1.5 or not case.is_causal):
        return "is causal with alpha 1.5 alone"
    if version == "v1" and case.heads != case.heads_kv:
        return "has no grouped queries"
    return failure(f"adasplash-{version}", functools.partial(adasplash, version), case)


def failure(name: str, call: Callable[..., Tensor], case: AttentionCase) -> str | None:
    """What a rival that cannot be asked says when it tries the short case; None if it works."""
    short = case.short()
    harness.progress(f"{name}, {case}: trying {short.length} positions")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            harness.run(short, Contender(name, call), short.inputs(), BOTH)
        except Exception as error:  # whatever it is, it is this rival's reason
            words = [str(warning.message).partition(" (Triggered")[0] for warning in said]
            return " ".join([f"{type(error).__name__}: {error}", *words])
    return None


def _sdpa_contender(name: str, backend: SDPBackend) -> Contender:
    call = functools.partial(sdpa_by, backend)
    return Contender(name, call, ("cuda",), functools.partial(failure, name, call), softmax=True)


def _adasplash_contender(version: str) -> Contender:
    call = functools.partial(adasplash, version)
    refusal = functools.partial(adasplash_refusal, version)
    return Contender(f"adasplash-{version}", call, ("cuda",), refusal)


US = Contender(OURS, ours, refusal=ours_refusal)
RIVALS = (
    Contender("sdpa", sdpa, ("cpu",), softmax=True),
    _sdpa_contender("sdpa-flash", SDPBackend.FLASH_ATTENTION),
    _sdpa_contender("sdpa-cudnn", SDPBackend.CUDNN_ATTENTION),
    _sdpa_contender("sdpa-efficient", SDPBackend.EFFICIENT_ATTENTION),
    _adasplash_contender("v1"),
    _adasplash_contender("v2"),
    Contender(DENSE, dense, refusal=dense_refusal),
)


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
    entrants: Sequence[tuple[harness.Case, Contender]],
    left_out: Sequence[harness.LeftOut],
) -> None:
    """Ends the program, before it measures, where a target could not be judged."""
    if reason := harness.no_peak_memory("cpu"):
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
    for text, over, under, limits, at_least in RATIO_TARGETS:
        for mode, limit in zip(MODES, limits, strict=True):
            ratio = (
                times[over.case, over.contender][mode].median
                / times[under.case, under.contender][mode].median
            )
            unit = f"x {under.contender} {under.dtype}"
            targets.append(Target(f"{mode} {text}", unit, ratio, limit, at_least))
    peak = harness.peak_bytes(MEMORY_ENTRY.case, US) / 2**30
    text = "memory of forward+backward above the tensors, 32,768 positions"
    return [*targets, Target(text, "GiB", peak, MEMORY_LIMIT_GIB)]


# The program


def parse() -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    parser = harness.parser(__doc__)
    add = parser.add_argument
    count = harness.positive_int
    names = [rival.name for rival in RIVALS]
    dtypes = ["float32", "bfloat16"]
    add(
        "--lengths",
        type=count,
        nargs="+",
        default=[2048, 4096],
        metavar="N",
        help="queries and keys; default 2048 4096",
    )
    add("--batch", type=count, default=1, help="default %(default)s")
    add("--heads", type=count, default=8, help="of the queries; default %(default)s")
    add("--heads-kv", type=count, help="of keys and values; default: as --heads")
    add("--head-dim", type=count, default=64, help="default %(default)s")
    add("--dtypes", nargs="+", choices=DTYPES, default=dtypes, help="default float32 bfloat16")
    add(
        "--causal",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="whether queries see no later keys; default --causal",
    )
    add(
        "--sharpness",
        type=harness.positive,
        nargs="+",
        default=[1.0],
        metavar="FACTOR",
        help="factors of the queries, higher is sparser; default 1",
    )
    add("--rivals", nargs="*", choices=names, help="default: all that run on the device")
    add("--peak-memory", action="store_true", help="measure it too, of a forward and backward")
    add("--plot", type=harness.picture, metavar="PATH", help="draw time against length")
    options = parser.parse_args()
    options.heads_kv = options.heads_kv or options.heads
    harness.check_device(parser, options)
    if options.heads % options.heads_kv:
        parser.error(f"argument --heads-kv: must divide --heads {options.heads}")
    if options.peak_memory and (reason := harness.no_peak_memory(options.device)):
        parser.error(f"argument --peak-memory: {reason}")
    if options.rivals is None:
        options.rivals = [rival.name for rival in RIVALS if options.device in rival.devices]
    return parser, options


def main() -> int:
    parser, options = parse()
    contenders = [US, *(rival for rival in RIVALS if rival.name in options.rivals)]
    # Dtypes are measured in turn, since one target compares two of them.
    groups = [
        [
            AttentionCase(
                device=options.device,
                dtype=dtype,
                alpha=options.alpha,
                batch=options.batch,
                heads=options.heads,
                heads_kv=options.heads_kv,
                length=length,
                head_dim=options.head_dim,
                is_causal=options.causal,
                sharpness=sharpness,
            )
            for dtype in dict.fromkeys(options.dtypes)
        ]
        for length, sharpness in product(
            dict.fromkeys(options.lengths), dict.fromkeys(options.sharpness)
        )
    ]
    found = harness.environment(options.device)
    print(harness.describe(found), flush=True)
    cases = [case for group in groups for case in group]
    entrants, left_out = harness.admit(cases, contenders)
    if options.targets:
        check_targets(parser, entrants, left_out)

    measurements: list[Measurement] = []
    for group in groups:
        taking_part = [entrant for entrant in entrants if entrant[0] in group]
        measurements += harness.measure(taking_part, options.repeats, options.peak_memory)
    print(f"\n{table(measurements, options.device)}")
    for line in harness.absences(left_out, cases):
        print(line)

    targets = judge(measurements) if options.targets else []
    if targets:
        print("", *targets, sep="\n")
    if options.json:
        harness.save(options.json, options, found, measurements, left_out, targets)
    if options.plot:
        title = f"{found['device']}, {found['threads']} threads"
        harness.draw(
            options.plot, title, panels(measurements), "length", "ms (dashed: with backward)"
        )
    return 0 if all(target.met for target in targets) else 1


def table(measurements: Sequence[Measurement], device: str) -> str:
    """A line a measurement; ``/ name`` columns are times in units of that contender's."""
    times = {(m.case, m.contender.name): m.times for m in measurements}
    bases = (BASELINE[device], DENSE)
    head = ["dtype", "length", "sharpness", "contender", "fwd ms", "fwd+bwd ms"]
    head += [f"{mode} / {base}" for base in bases for mode in ("fwd", "fwd+bwd")]
    rows = []
    for m in measurements:
        case = m.case
        row = [case.dtype, str(case.length), f"{case.sharpness:g}", m.contender.name]
        row += [harness.digits(m.times[mode].median) for mode in MODES]
        for base in bases:
            row += harness.ratios(m.times, times.get((case, base)))
        row.append(f"{m.error:.0e}")
        if m.peak_bytes is not None:
            row.append(harness.digits(m.peak_bytes / harness.MEBIBYTE))
        rows.append(row)
    head.append("error")
    if measurements and measurements[0].peak_bytes is not None:
        head.append("peak MiB")
    return harness.table(head, rows)


def panels(measurements: Sequence[Measurement]) -> dict[str, list[harness.Line]]:
    """Lines of time against length, a panel a dtype and sharpness."""
    series: dict[str, dict[tuple[str, str], list[tuple[int, float]]]] = {}
    for m in measurements:
        panel = series.setdefault(f"{m.case.dtype}, sharpness {m.case.sharpness:g}", {})
        for mode in MODES:
            point = m.case.length, m.times[mode].median
            panel.setdefault((m.contender.name, mode), []).append(point)
    return {
        heading: [
            harness.Line(name, *zip(*sorted(points), strict=True), dashed=mode == BOTH)
            for (name, mode), points in panel.items()
        ]
        for heading, panel in series.items()
    }


if __name__ == "__main__":
    raise SystemExit(main())
