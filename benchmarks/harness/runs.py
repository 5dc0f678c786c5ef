"""One run of a program: what it measures, keeps and says."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from harness.budget import LIMIT_SECONDS, Budget
from harness.cases import Case
from harness.contender import Contender, LeftOut, admit
from harness.measuring import Measurement, measure
from harness.records import describe, environment, write
from harness.tables import absences
from harness.targets import Target


class Run:
    """One run of a program: its budget, and what it has found so far.

    ``results``: what there is beside measurements; a program puts it there before :meth:`save`.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        options.limit = options.limit or LIMIT_SECONDS[options.device]
        self.budget = Budget(options.budget, options.limit)
        self.environment = environment(options.device)
        self.measurements: list[Measurement] = []
        self.left_out: list[LeftOut] = []
        self.results: dict[str, Any] = {}
        print(describe(self.environment), flush=True)

    @classmethod
    def read(cls, path: Path, case: type[Case]) -> Run:
        """The run that wrote ``path``, whose cases are ``case``, as far as pictures need it."""
        kept = json.loads(path.read_text())
        run = cls.__new__(cls)
        run.options = argparse.Namespace(**kept["arguments"])
        run.environment = kept["environment"]
        run.measurements = [Measurement.of(record, case) for record in kept["measurements"]]
        run.results = kept["results"]
        return run

    def measure(
        self, cases: Sequence[Case], contenders: Iterable[Contender], peak_memory: bool = False
    ) -> list[Measurement]:
        """Measures who takes part and notes who does not; keeps what was found in the JSON file."""
        if reason := self.budget.over():
            self.leave_out(cases, reason)
            return []
        entrants, left_out = admit(cases, contenders)
        self.left_out += left_out
        found = measure(entrants, self.options.repeats, peak_memory, self.budget, self.left_out)
        self.measurements += found
        self.save()
        if self.options.device == "cuda" and not self.budget.over():
            torch.cuda.empty_cache()
        return found

    def leave_out(self, cases: Iterable[Case], reason: str) -> None:
        """Notes cases that nobody can take part in."""
        self.left_out += [LeftOut(case, "all", reason) for case in cases]

    def save(self, targets: Iterable[Target] = ()) -> None:
        """Writes ``--json`` if it was asked for."""
        if self.options.json:
            write(
                self.options.json,
                {
                    "program": Path(sys.argv[0]).stem,
                    "arguments": vars(self.options),
                    "environment": self.environment,
                    "measurements": [measurement.record() for measurement in self.measurements],
                    "left_out": [entry.record() for entry in self.left_out],
                    "targets": [target.record() for target in targets],
                    "results": self.results,
                },
            )

    def report(self, text: str) -> None:
        """Prints a table and, below it, who was left out and why."""
        print(f"\n{text}")
        for line in absences(self.left_out):
            print(line)

    def conclude(
        self,
        judge: Callable[[Sequence[Measurement]], Sequence[Target]],
        draw: Callable[[Run], None],
    ) -> int:
        """Does what ``--targets``, ``--json`` and ``--plot`` ask for; 1 if a target is missed."""
        targets = judge(self.measurements) if self.options.targets else []
        if targets:
            print("", *targets, sep="\n")
        self.save(targets)
        if self.options.plot:
            draw(self)
        return 0 if all(target.met for target in targets) else 1

    def footer(self) -> str:
        """Where and when, for below a picture."""
        found = self.environment
        threads = f", {found['threads']} threads" if self.options.device == "cpu" else ""
        return (
            f"{found['device']}{threads}, {str(found['date'])[:10]}, torch {found['torch']}, "
            f"adasplash2 {found['adasplash2']} ({str(found['commit'])[:7]}), "
            f"alpha {self.options.alpha:g}"
        )
