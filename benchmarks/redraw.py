"""Draws the pictures of results that are there: ``redraw.py results/*/attention.json``.

Each goes beside its JSON file, in the place of the one that the run drew.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import attention
import paper_figure
import regimes
import rows
import solver
from data import AttentionCase
from harness.cases import Case
from harness.runs import Run

DRAWN: dict[str, tuple[type[Case], Callable[[Run], None]]] = {
    "attention": (AttentionCase, attention.draw),
    "paper_figure": (AttentionCase, paper_figure.draw),
    "regimes": (AttentionCase, regimes.draw),
    "rows": (rows.RowCase, rows.draw),
    "solver": (solver.Rows, solver.draw),
}
"""By program, what its cases are and what draws them."""


def redraw(path: Path, picture: Path) -> None:
    program = json.loads(path.read_text())["program"]
    if program not in DRAWN:
        raise SystemExit(f"error: {path} is of {program}; known are {', '.join(DRAWN)}")
    case, draw = DRAWN[program]
    run = Run.read(path, case)
    run.options.plot = picture
    draw(run)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", type=Path, nargs="+", metavar="FILE.json")
    for path in parser.parse_args().results:
        redraw(path, path.with_suffix(".png"))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
