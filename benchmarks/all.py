"""Runs a choice of the benchmarks into one folder: JSON, table and picture of each.

Every program runs in a process of its own with a share of the time, so that one that fails or
hangs takes nothing from the others. Options after ``--`` go to every program.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

from harness import command_line, packages, tables
from harness.budget import BUDGET_SECONDS
from harness.cases import ROOT

PROGRAMS = {
    "attention": "attention.py",
    "paper_figure": "paper_figure.py",
    "crossover": "crossover.py",
    "regimes": "regimes.py",
    "solver": "solver.py",
    "scaling": "scaling.py",
    "entmax": "rows.py",
}
TINY = {
    "attention": "--lengths 256 --heads 2 --real-layers 6 --real-length 256 --sharpness 1 "
    "--dtypes float32",
    "paper_figure": "--lengths 1024 4096 --heads 2",
    "crossover": "--length 1024 --heads 2 --block-sparsity 0 0.7 --sharpness 0.05 1 4",
    "regimes": "--lengths 128 512 --rows 1024 --heads 2 --head-dims 32 --causal yes "
    "--sharpness 0.1 2 --real-layers",
    "solver": "--lengths 512 --rows 18 --real-length 512",
    "scaling": "--lengths 256 512 1024 --heads 1 2 4 --head-dims 32 64 128 --length 256 "
    "--middle-heads 2 --memory-lengths 1024",
    "entmax": "--rows 64 --columns 128 512",
}
"""Options of a run that only shows that everything works."""

OVERHEAD_SECONDS = 20
"""Imports, the last call and the picture, beside a program's budget."""


def main() -> int:
    ours = sys.argv[1:]
    passed: list[str] = []
    if "--" in ours:
        at = ours.index("--")
        ours, passed = ours[:at], ours[at + 1 :]
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--only", nargs="+", choices=PROGRAMS, default=list(PROGRAMS), help="default: all")
    add("--output", type=Path, default=ROOT / "output", help="folder; default output/")
    add(
        "--seconds",
        type=command_line.positive,
        default=len(PROGRAMS) * (BUDGET_SECONDS + OVERHEAD_SECONDS),
        help="for all together; each gets an equal share of what is left; default %(default)s",
    )
    add("--tiny", action="store_true", help="tiny sizes, to see that everything works")
    options = parser.parse_args(ours)
    options.output.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + options.seconds
    outcomes = []
    for i, name in enumerate(options.only):
        allowed = max(1.0, (end - time.monotonic()) / (len(options.only) - i))
        outcomes.append([name, *run(name, allowed, options, passed)])
    print(tables.table(["program", "result", "seconds", "files"], outcomes))
    return 0 if all(outcome[1] == "done" for outcome in outcomes) else 1


def run(
    name: str, allowed: float, options: argparse.Namespace, passed: list[str]
) -> tuple[str, str, str]:
    """How it went, its seconds, and what it left in the folder."""
    left = {kind: options.output / f"{name}.{kind}" for kind in ("json", "png", "txt")}
    for path in left.values():
        path.unlink(missing_ok=True)
    budget = min(BUDGET_SECONDS, max(1.0, allowed - OVERHEAD_SECONDS))
    command = [sys.executable, str(Path(__file__).with_name(PROGRAMS[name]))]
    command += ["--json", str(left["json"]), "--budget", f"{budget:.0f}"]
    if packages.missing("matplotlib"):
        tables.progress("no pictures: matplotlib is not installed")
    else:
        command += ["--plot", str(left["png"])]
    command += TINY[name].split() if options.tiny else []
    tables.progress(" ".join(["running", name, *command[2:]]))
    began = time.monotonic()
    with left["txt"].open("w") as text:
        try:
            # What a program prints is its table; its progress goes on to standard error.
            code = subprocess.run(
                command + passed, stdout=text, timeout=allowed, check=False
            ).returncode
            result = "done" if code == 0 else f"exit code {code}"
        except subprocess.TimeoutExpired:
            result = f"stopped after {allowed:.0f} s"
    seconds = time.monotonic() - began
    print(left["txt"].read_text(), flush=True)
    return result, f"{seconds:.0f}", " ".join(p.name for p in left.values() if p.exists())


if __name__ == "__main__":
    raise SystemExit(main())
