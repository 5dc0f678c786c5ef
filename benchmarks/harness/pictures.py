"""What programs draw."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from harness.tables import progress

COLOURS = {
    "adasplash2-cuda": "#c1272d",
    "adasplash2-triton": "#e8871e",
    "adasplash2-cpu": "#c1272d",
    "sdpa": "#1f4e8c",
    "sdpa-flash": "#1f4e8c",
    "sdpa-cudnn": "#2a9d8f",
    "sdpa-efficient": "#7fb2e5",
    "flex": "#8e5ea2",
    "adasplash-v1": "#9a9a3c",
    "adasplash-v2": "#5c5c1c",
    "dense": "#777777",
    "dense-bisect": "#b0b0b0",
    "softmax": "#1f4e8c",
    "entmax": "#777777",
    "entmax-bisect": "#b0b0b0",
    "adasplash": "#9a9a3c",
}
"""A contender has one colour in all pictures; others take those of the cycle."""


def colours(names: Iterable[str]) -> dict[str, str]:
    spare = (f"C{i}" for i in range(100))
    return {name: COLOURS.get(name) or next(spare) for name in dict.fromkeys(names)}


class Line(NamedTuple):
    """One line of a panel; lines of one ``name`` share a colour and a place in the legend."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    dashed: bool = False


@contextlib.contextmanager
def canvas(
    path: Path,
    title: str,
    footer: str,
    columns: int,
    width: float = 4.8,
    share_y: bool = True,
    rows: int = 1,
) -> Iterator[Any]:
    """Gives a figure and its axes, row by row; saves it in the format of the path's suffix, with
    one legend for all axes below them, where it covers nothing."""
    from matplotlib.figure import Figure

    size = max(9.0, 1.2 + width * columns), 1.2 + 3.8 * rows
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(rows, columns, sharey=share_y, squeeze=False).flatten()
    yield figure, axes
    entries: dict[str, Any] = {}
    for axis in axes:
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            entries.setdefault(label, handle)
    widest = max(map(len, entries), default=0)
    figure.suptitle(title, fontweight="bold")
    figure.legend(
        entries.values(),
        entries.keys(),
        loc="outside lower center",
        ncols=max(1, min(len(entries), int(size[0] / (0.7 + 0.1 * widest)))),
        title=footer,
        title_fontsize=7,
        frameon=False,
    )
    figure.savefig(path, dpi=100)
    progress(f"wrote {path}")


def draw(
    path: Path,
    title: str,
    panels: dict[str, list[Line]],
    x_label: str,
    y_label: str,
    footer: str = "",
    x_log: bool = True,
    palette: Mapping[str, str] | None = None,
    mark: float | None = None,
    rows: int = 1,
) -> None:
    """Panels of lines with one logarithmic vertical scale; ``mark`` is a height to show dotted."""
    names = dict.fromkeys(line.name for lines in panels.values() for line in lines)
    colour = colours(names) | dict(palette or {})
    columns = -(-len(panels) // rows)
    with canvas(path, title, footer, columns, rows=rows) as (_, axes):
        for spare in axes[len(panels) :]:
            spare.set_axis_off()
        for axis, (heading, lines) in zip(axes, panels.items(), strict=False):
            if mark is not None:
                axis.axhline(mark, color="0.5", linestyle=":")
            for line in lines:
                axis.plot(
                    line.x,
                    line.y,
                    color=colour[line.name],
                    linestyle="--" if line.dashed else "-",
                    marker="o",
                    markersize=4,
                    label=None if line.dashed and _has_solid(line, lines) else line.name,
                )
            axis.set(title=heading, xlabel=x_label, yscale="log")
            if x_log:
                axis.set_xscale("log")
                ticks = sorted({x for line in lines for x in line.x})
                axis.set_xticks(ticks, [f"{tick:,.0f}" for tick in ticks], rotation=30)
                axis.set_xticks([], minor=True)
        for axis in axes[::columns]:
            axis.set_ylabel(y_label)


def _has_solid(line: Line, lines: Sequence[Line]) -> bool:
    return any(other.name == line.name and not other.dashed for other in lines)
