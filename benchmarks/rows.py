"""Entmax of the rows of a matrix against softmax and the packages entmax and adasplash.

It is the benchmark ``entmax``; a file of that name would hide the package.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from harness import command_line, packages, pictures, tables
from harness.cases import CHECKED_LENGTH, DTYPES, Case, Inputs, reference
from harness.contender import MODES, Contender, admit
from harness.measuring import Measurement
from harness.runs import Run
from harness.targets import Target
from torch import Tensor

import adasplash2
from adasplash2.backends import REGISTRY

OURS, SOFTMAX, PACKAGE = "adasplash2-cpu", "softmax", "entmax"


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
        return dataclasses.replace(self, rows=min(self.rows, CHECKED_LENGTH))

    def work(self) -> float:
        return float(self.rows * self.columns)

    def expected(self, tensors: Sequence[Tensor], alpha: float) -> Tensor:
        return reference.entmax(tensors[0].cpu().double(), alpha)


# Contenders


def ours(backend: str, case: RowCase, x: Tensor) -> Tensor:
    return adasplash2.entmax(x, case.alpha, backend=backend)


def ours_refusal(backend: str, case: RowCase) -> str | None:
    try:
        ours(
            backend, case, torch.zeros(1, case.columns, dtype=case.torch_dtype, device=case.device)
        )
    except adasplash2.BackendRefused as refused:
        return "; ".join(reason for answer in refused.answers for reason in answer.reasons)
    return None


def softmax(case: RowCase, x: Tensor) -> Tensor:
    return torch.softmax(x, dim=-1)


def package(case: RowCase, x: Tensor) -> Tensor:
    """The package ``entmax``; 16-bit inputs in float32."""
    scores = x.float() if x.dtype.itemsize == 2 else x
    return packages.entmax_package(scores, case.alpha).to(x.dtype)


def bisect(case: RowCase, x: Tensor) -> Tensor:
    """The package ``entmax`` by bisection, which it has for every alpha."""
    import entmax

    scores = x.float() if x.dtype.itemsize == 2 else x
    return entmax.entmax_bisect(scores, case.alpha).to(x.dtype)


def adasplash(case: RowCase, x: Tensor) -> Tensor:
    import adasplash

    return adasplash.triton_entmax(x, alpha=case.alpha)


def needs(name: str, case: RowCase) -> str | None:
    return packages.missing(name)


def _ours(backend: str) -> Contender:
    return Contender(
        f"adasplash2-{backend}",
        functools.partial(ours, backend),
        ("cpu",) if backend == "cpu" else ("cuda",),
        functools.partial(ours_refusal, backend),
    )


CONTENDERS = (
    *map(_ours, REGISTRY),
    Contender(SOFTMAX, softmax, softmax=True),
    Contender(PACKAGE, package, refusal=functools.partial(needs, "entmax")),
    Contender("entmax-bisect", bisect, refusal=functools.partial(needs, "entmax")),
    Contender("adasplash", adasplash, ("cuda",), functools.partial(needs, "adasplash")),
)

TARGET_CASE = RowCase(device="cpu", dtype="float32", alpha=1.5, rows=4096, columns=4096)
SOFTMAX_LIMIT = 2.5
PACKAGE_LIMIT = 10.0


# The program

DEFAULTS = {
    "cpu": {"rows": 4096, "columns": [512, 4096], "dtype": "float32"},
    "cuda": {"rows": 16384, "columns": [512, 4096, 32768], "dtype": "float32"},
}


def parse() -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    parser = command_line.parser(__doc__)
    command_line.add_targets(parser, "judge the CPU targets; exit with 1 if one is missed")
    add = parser.add_argument
    count = command_line.positive_int
    add("--rows", type=count, help="default 4096, on cuda 16384")
    add("--columns", type=count, nargs="+", help="default 512 4096, on cuda 512 4096 32768")
    add("--dtype", choices=DTYPES, help="default float32")
    options = command_line.parsed(parser, DEFAULTS)
    return parser, options


def main() -> int:
    parser, options = parse()
    cases = [
        RowCase(
            device=options.device,
            dtype=options.dtype,
            alpha=options.alpha,
            rows=options.rows,
            columns=columns,
        )
        for columns in sorted(set(options.columns))
    ]
    contenders = [c for c in CONTENDERS if options.device in c.devices]
    if options.targets:
        _, left_out = admit([TARGET_CASE], contenders)
        if TARGET_CASE not in cases:
            parser.error(f"argument --targets: needs the case {TARGET_CASE} on the CPU")
        if left_out:
            parser.error(f"argument --targets: {left_out[0].contender}: {left_out[0].reason}")
    run = Run(options)
    for case in cases:
        run.measure([case], contenders)
    run.report(table(run.measurements))
    return run.conclude(judge, draw)


def table(measurements: Sequence[Measurement]) -> str:
    """A line a contender and case; ``/ name`` columns are times in units of that contender's."""
    times = {(m.case, m.contender.name): m.times for m in measurements}
    bases = (SOFTMAX, PACKAGE)
    head = ["rows", "columns", "contender", "fwd ms", "bwd ms", "fwd+bwd ms"]
    head += [f"{mode} / {base}" for base in bases for mode in ("fwd", "fwd+bwd")]
    return tables.table(
        [*head, "error"],
        (
            [
                str(m.case.rows),
                str(m.case.columns),
                m.contender.name,
                *(tables.digits(ms) for ms in (m.forward, m.backward, m.both)),
                *(
                    cell
                    for base in bases
                    for cell in tables.ratios(m.times, times.get((m.case, base)))
                ),
                f"{m.error:.0e}",
            ]
            for m in measurements
        ),
    )


def draw(run: Run) -> None:
    panels: dict[str, list[pictures.Line]] = {}
    for mode in MODES:
        lines: dict[str, list[tuple[int, float]]] = {}
        for m in run.measurements:
            point = m.case.columns, m.times[mode].median
            lines.setdefault(m.contender.name, []).append(point)
        panels[mode] = [
            pictures.Line(name, *zip(*points, strict=True)) for name, points in lines.items()
        ]
    options = run.options
    title = f"Entmax of {options.rows:,} rows, {options.dtype}"
    pictures.draw(options.plot, title, panels, "columns", "time, ms", run.footer())


def judge(measurements: Sequence[Measurement]) -> list[Target]:
    """Targets of the forward."""
    at = {m.contender.name: m.forward for m in measurements if m.case == TARGET_CASE}
    if missing := {OURS, SOFTMAX, PACKAGE} - at.keys():
        raise SystemExit(f"error: --targets: {', '.join(missing)} was left out, see above")
    ours, softmax, package = (at[name] for name in (OURS, SOFTMAX, PACKAGE))
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
