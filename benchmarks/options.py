"""What masks, windows, slopes, packing and padding cost, beside calls of the same tensors without.

A step is a forward and a backward. Each pair of calls is timed in turn; what is judged is the ratio
of their medians to the ratio of the work that is left.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from harness import command_line, records, tables, timing
from harness.targets import Target
from torch import Tensor

import adasplash2

LONG = {"cuda": 65_536, "cpu": 4096}
"""Positions of a window and of slopes."""

WINDOW = {"cuda": 1024, "cpu": 256}
DOCUMENTS = 16

SHARPNESS = 1.0
"""Factor of Gaussian queries: some 28 keys a row at 16,384 positions."""


@dataclass(frozen=True)
class Pair:
    """``step`` must take at most ``limit`` times as long as ``base``."""

    name: str
    limit: float
    step: Callable[[], object]
    base: Callable[[], object]


def tensors(device: str, *shape: int) -> list[Tensor]:
    """Query, key, value and the output's gradient."""
    torch.manual_seed(0)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    made = [torch.randn(shape, device=device).to(dtype) for _ in range(4)]
    made[0] *= SHARPNESS
    return [t.requires_grad_() for t in made[:3]] + made[3:]


def stepping(
    function: Callable[..., Tensor], made: list[Tensor], *args: Any, **said: Any
) -> Callable[[], object]:
    def step() -> object:
        out = function(*made[:3], *args, **said)
        return torch.autograd.grad(out, made[:3], made[3])

    return step


def pairs(device: str, backend: str | None) -> Iterator[Pair]:
    """One at a time, so that the tensors of one are gone before the next."""
    attend = adasplash2.entmax_attention
    said: dict[str, Any] = {"is_causal": True, "backend": backend}
    heads = 8 if device == "cuda" else 2
    long, window = LONG[device], WINDOW[device]

    made = tensors(device, 1, heads, long, 64)
    causal = stepping(attend, made, **said)
    pairs_causal, pairs_window = long * (long + 1) / 2, (window + 1) * (long - window / 2)
    share = pairs_window / pairs_causal
    windowed = stepping(attend, made, window=(window, 0), **said)
    yield Pair(f"window of {window} in {long:,}, causal", 1.3 * share, windowed, causal)
    slopes = torch.ones(heads, device=device)
    sloped = stepping(attend, made, alibi_slopes=slopes, **said)
    yield Pair(f"slopes of 1, {long:,}, causal", 0.25, sloped, causal)
    del made, causal, windowed, sloped

    length = long // DOCUMENTS
    made = tensors(device, DOCUMENTS, heads, length, 64)
    apart = stepping(attend, made, **said)
    packed = [t.detach().transpose(1, 2).flatten(0, 1).contiguous() for t in made]
    packed = [t.requires_grad_() for t in packed[:3]] + packed[3:]
    places = torch.arange(0, long + 1, length, dtype=torch.int32, device=device)
    together = stepping(
        adasplash2.entmax_attention_varlen, packed, places, places, length, length, **said
    )
    yield Pair(f"{DOCUMENTS} packed documents of {length:,}, causal", 1.15, together, apart)
    del packed, together

    lengths = torch.full((DOCUMENTS,), length // 2, dtype=torch.int32, device=device)
    full = stepping(attend, made, backend=backend)
    padded = stepping(attend, made, q_lengths=lengths, kv_lengths=lengths, backend=backend)
    yield Pair(f"{DOCUMENTS} x {length:,}, half padded", 0.6, padded, full)
    bias = torch.randn(1, heads, length, length, device=device, dtype=made[0].dtype)
    biased = stepping(attend, made, bias, backend=backend)
    yield Pair(f"{DOCUMENTS} x {length:,}, additive mask of heads", 1.5, biased, full)


def main() -> None:
    parser = command_line.plain_parser(__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--backend", help="to measure; default: the dispatcher's choice")
    add("--rounds", type=command_line.positive_int, default=7, help="default %(default)s")
    add("--long", type=command_line.positive_int, help="positions; default 65,536, CPU 4,096")
    add("--window", type=command_line.positive_int, help="its keys; default 1,024, CPU 256")
    command_line.add_targets(parser)
    options = command_line.parsed(parser)
    if options.long:
        LONG[options.device] = options.long
    if options.window:
        WINDOW[options.device] = options.window
    environment = records.environment(options.device)
    print(records.describe(environment), flush=True)
    measured, targets = [], []
    for pair in pairs(options.device, options.backend):
        calls = {"with": pair.step, "without": pair.base}
        timings = timing.side_by_side(calls, options.device, options.rounds)
        found = {way: t.median for way, t in timings.items()}
        measured.append({"name": pair.name, **found})
        target = Target(pair.name, "x", found["with"] / found["without"], round(pair.limit, 4))
        targets.append(target)
        print(f"{target}  ({found['with']:.3f} / {found['without']:.3f} ms)", flush=True)
        if options.json:
            record = {
                "program": "options",
                "backend": options.backend,
                "environment": environment,
                "milliseconds": measured,
                "targets": [one.record() for one in targets],
            }
            records.write(options.json, record)
    rows = [
        (m["name"], *(tables.digits(float(m[way])) for way in ("with", "without")))
        for m in measured
    ]
    print("\n" + tables.table(("what", "with ms", "without ms"), rows))
    if options.targets and not all(target.met for target in targets):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
