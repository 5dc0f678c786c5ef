"""What programs print."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Sequence

from harness.contender import MODES, LeftOut
from harness.timing import Timing


def progress(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Aligned columns: words to the left, numbers to the right."""
    cells = [tuple(head), *map(tuple, rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    is_word = [
        any(cell[:1].isalpha() for cell in column[1:]) for column in zip(*cells, strict=True)
    ]

    def line(row: Sequence[str]) -> str:
        aligned = (
            cell.ljust(width) if word else cell.rjust(width)
            for cell, width, word in zip(row, widths, is_word, strict=True)
        )
        return "  ".join(aligned).rstrip()

    return "\n".join([line(cells[0]), "  ".join("-" * w for w in widths), *map(line, cells[1:])])


def digits(number: float | None) -> str:
    """Three significant digits without an exponent; a dash for nothing."""
    if number is None:
        return "-"
    places = max(0, 2 - math.floor(math.log10(number))) if number > 0 else 0
    return f"{number:.{min(places, 5)}f}"


def ratios(times: dict[str, Timing], base: dict[str, Timing] | None) -> list[str]:
    """Cells: each mode's median in units of that of ``base``; dashes where it is not there."""
    return [digits(times[mode].median / base[mode].median if base else None) for mode in MODES]


def absences(left_out: Sequence[LeftOut]) -> list[str]:
    """Who was left out, where and why: a line a contender and reason."""
    absent: dict[tuple[str, str], list[str]] = {}
    for case, contender, reason in left_out:
        absent.setdefault((contender, reason), []).append(str(case))
    everywhere = {str(entry.case) for entry in left_out}
    return [
        f"left out: {contender}: {reason}"
        + ("" if len(where) == len(everywhere) > 1 else f" (at {_listed(where)})")
        for (contender, reason), where in absent.items()
    ]


def _listed(where: Sequence[str], most: int = 3) -> str:
    more = [f"{len(where) - most} more"] if len(where) > most else []
    return "; ".join([*where[:most], *more])
