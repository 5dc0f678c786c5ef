"""Entmax of the rows of a matrix against softmax and the package entmax."""

from __future__ import annotations

import argparse
import dataclasses
import functools
from collections.abc import Sequence
from dataclasses import dataclass

import harness
import torch
from harness import DTYPES, FORWARD, MODES, Case, Contender, Inputs, Measurement, Target
from torch import Tensor

import adasplash2

OURS, SOFTMAX, PACKAGE = "adasplash2", "softmax", "entmax"


@dataclass(frozen=True, kw_only=True)
class RowCase(Case):
    """A matrix of independent standard normal scores."""

    rows: int
    columns: int

    def __str__(self) -> str:
        return f"{self.dtype}, {self.rows} x {self.columns}"

    def inputs(self) -> Inputs:
        generator, dtype = self.generator(), DTYPES[self.dtype]
        x, grad_out = (
            torch.randn(
                self.rows, self.columns, generator=generator, device=self.device, dtype=dtype
            )
            for _ in range(2)
        )
        return Inputs((x,), grad_out)

    def short(self) -> RowCase:
        return dataclasses.replace(self, rows=min(self.rows, harness.CHECKED_LENGTH))

    def expected(self, tensors: Sequence[Tensor], alpha: float) -> Tensor:
        return harness.reference.entmax(tensors[0].cpu().double(), alpha)


# Contenders


def ours(case: RowCase, x: Tensor) -> Tensor:
    return adasplash2.entmax(x, case.alpha)


def ours_refusal(case: RowCase) -> str | None:
    try:
        ours(case, torch.zeros(1, 1, dtype=DTYPES[case.dtype], device=case.device))
    except adasplash2.BackendRefused as refused:
        return "; ".join(reason for answer in refused.answers for reason in answer.reasons)
    return None


def softmax(case: RowCase, x: Tensor) -> Tensor:
    return torch.softmax(x, dim=-1)


def package(case: RowCase, x: Tensor) -> Tensor:
    """The package ``entmax``; 16-bit inputs in float32."""
    scores = x.float() if x.dtype.itemsize == 2 else x
    return harness.entmax_package(scores, case.alpha).to(x.dtype)


def adasplash(case: RowCase, x: Tensor) -> Tensor:
    import adasplash

    return adasplash.triton_entmax(x, alpha=case.alpha)


def needs(name: str, case: RowCase) -> str | None:
    return harness.missing(name)


CONTENDERS = (
    Contender(OURS, ours, refusal=ours_refusal),
    Contender(SOFTMAX, softmax, softmax=True),
    Contender(PACKAGE, package, refusal=functools.partial(needs, "entmax")),
    Contender("adasplash", adasplash, ("cuda",), functools.partial(needs, "adasplash")),
)

TARGET_CASE = RowCase(device="cpu", dtype="float32", alpha=1.5, rows=4096, columns=4096)
SOFTMAX_LIMIT = 2.5
PACKAGE_LIMIT = 10.0


# The program


def parse() -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    parser = harness.parser(__doc__)
    add = parser.add_argument
    add("--rows", type=harness.positive_int, default=TARGET_CASE.rows, help="default %(default)s")
    add(
        "--columns",
        type=harness.positive_int,
        default=TARGET_CASE.columns,
        help="default %(default)s",
    )
    add("--dtype", choices=DTYPES, default=TARGET_CASE.dtype, help="default %(default)s")
    options = parser.parse_args()
    harness.check_device(parser, options)
    return parser, options


def main() -> int:
    parser, options = parse()
    case = RowCase(
        device=options.device,
        dtype=options.dtype,
        alpha=options.alpha,
        rows=options.rows,
        columns=options.columns,
    )
    contenders = [c for c in CONTENDERS if case.device in c.devices]
    entrants, left_out = harness.admit([case], contenders)
    if options.targets:
        if case != TARGET_CASE:
            parser.error("argument --targets: needs the default of every option of the case")
        if left_out:
            parser.error(f"argument --targets: {left_out[0].contender}: {left_out[0].reason}")
    found = harness.environment(options.device)
    print(harness.describe(found))

    measurements = harness.measure(entrants, options.repeats)
    print(f"\n{table(measurements)}")
    for line in harness.absences(left_out, [case]):
        print(line)
    targets = judge(measurements) if options.targets else []
    if targets:
        print("", *targets, sep="\n")
    if options.json:
        harness.save(options.json, options, found, measurements, left_out, targets)
    return 0 if all(target.met for target in targets) else 1


def table(measurements: Sequence[Measurement]) -> str:
    """A line a contender; ``/ name`` columns are times in units of that contender's."""
    times = {m.contender.name: m.times for m in measurements}
    bases = (SOFTMAX, PACKAGE)
    head = ["contender", "fwd ms", "fwd+bwd ms"]
    head += [f"{mode} / {base}" for base in bases for mode in ("fwd", "fwd+bwd")]
    return harness.table(
        [*head, "error"],
        (
            [
                m.contender.name,
                *(harness.digits(m.times[mode].median) for mode in MODES),
                *(cell for base in bases for cell in harness.ratios(m.times, times.get(base))),
                f"{m.error:.0e}",
            ]
            for m in measurements
        ),
    )


def judge(measurements: Sequence[Measurement]) -> list[Target]:
    """Targets of the forward."""
    ours, softmax, package = (
        next(m for m in measurements if m.contender.name == name).times[FORWARD].median
        for name in (OURS, SOFTMAX, PACKAGE)
    )
    return [
        Target("forward time", "x torch.softmax", ours / softmax, SOFTMAX_LIMIT),
        Target(
            "forward time of entmax.entmax15",
            "x adasplash2",
            package / ours,
            PACKAGE_LIMIT,
            at_least=True,
        ),
    ]


if __name__ == "__main__":
    raise SystemExit(main())
