"""Pictures of what attention does; needs matplotlib (``pip install '.[plot]'``).

Each function draws on the ``axes`` that it is given, else on its own, and returns them;
``axes.figure.savefig(path)`` writes the picture.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from adasplash2.nn.monitor import Watched

__all__ = ["alpha_by_head", "attention_map", "support_by_head", "training_curves"]

SIDE = 512
"""Cells of a drawn map in each direction: larger maps are shown by the maxima of their squares."""


@contextmanager
def _needs_matplotlib() -> Iterator[None]:
    """Says how to get matplotlib where it is missing."""
    try:
        yield
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "matplotlib":
            raise
        raise ImportError(
            "adasplash2.plot needs matplotlib, which is not installed (pip install '.[plot]')",
            name="matplotlib",
        ) from error


@_needs_matplotlib()
def attention_map(weights: Tensor, axes: Any = None) -> Any:
    """Probabilities of one head, darker where larger, on a log scale; exact zeros are white.

    Args:
        weights: ``(queries, keys)``, as ``EntmaxMultiheadAttention`` returns them for one sequence
            and head.

    Raises:
        ValueError: ``weights`` has other dimensions.
        ImportError: matplotlib is not installed.

    Example:
        >>> import torch, adasplash2.plot
        >>> axes = adasplash2.plot.attention_map(adasplash2.entmax15(3 * torch.randn(40, 60)))
        >>> axes.get_xlabel(), axes.get_ylabel()
        ('key', 'query')
    """
    from matplotlib.colors import LogNorm

    if weights.dim() != 2:
        raise ValueError(f"weights must be (queries, keys), got the shape {tuple(weights.shape)}")
    axes = _axes(axes)
    queries, keys = weights.shape
    step = max(1, -(-max(queries, keys) // SIDE))
    cells = F.max_pool2d(weights.detach().float().cpu()[None], step, ceil_mode=True)[0]
    drawn = axes.imshow(
        cells.masked_fill(cells == 0.0, torch.nan).numpy(),
        cmap="inferno_r",
        norm=LogNorm(1e-3, 1.0, clip=True),
        extent=(0, keys, queries, 0),
        interpolation="nearest",
    )
    kept = (weights > 0).sum().item() / max(weights.numel(), 1)
    axes.set(title=f"{kept:.1%} of the pairs above zero", xlabel="key", ylabel="query")
    axes.figure.colorbar(drawn, ax=axes, label="probability (log scale)")
    return axes


@_needs_matplotlib()
def support_by_head(watched: Mapping[str, Watched], axes: Any = None) -> Any:
    """The keys that a query keeps, by layer and head: one step of
    :attr:`adasplash2.nn.AttentionMonitor.history`. Softmax is left white.

    Raises:
        ValueError: ``watched`` has no layer.
        ImportError: matplotlib is not installed.

    Example:
        >>> import torch, adasplash2.plot
        >>> four = torch.ones(4)
        >>> layer = adasplash2.nn.Watched(alpha=1.5 * four, support=9 * four, empty_tiles=0 * four)
        >>> adasplash2.plot.support_by_head({"0": layer, "1": layer}).get_title()
        'Keys that a query keeps'
    """
    from matplotlib.colors import LogNorm

    support = _by_layer(watched, "support")
    axes = _axes(axes)
    ends = (1.0, 10.0) if support.isnan().all() else (None, None)  # nothing to scale by
    drawn = axes.imshow(support.numpy(), aspect="auto", cmap="viridis", norm=LogNorm(*ends))
    axes.set(title="Keys that a query keeps", xlabel="head", ylabel="layer")
    _whole(axes, support.shape[1], list(watched))
    axes.figure.colorbar(drawn, ax=axes, label="keys (log scale)")
    return axes


@_needs_matplotlib()
def alpha_by_head(history: Mapping[int, Mapping[str, Watched]], axes: Any = None) -> Any:
    """Every head's alpha over the steps of :attr:`adasplash2.nn.AttentionMonitor.history`; a colour
    is a layer.

    Raises:
        ValueError: ``history`` has no step.
        ImportError: matplotlib is not installed.

    Example:
        >>> import torch, adasplash2.plot
        >>> four = torch.ones(4)
        >>> layer = adasplash2.nn.Watched(alpha=1.5 * four, support=9 * four, empty_tiles=0 * four)
        >>> adasplash2.plot.alpha_by_head({0: {"0": layer}, 100: {"0": layer}}).get_xlabel()
        'step'
    """
    import matplotlib

    if not history:
        raise ValueError("history must hold a step, it is empty")
    axes = _axes(axes)
    alphas = torch.stack([_by_layer(watched, "alpha") for watched in history.values()])
    layers = list(next(iter(history.values())))
    colours = matplotlib.colormaps["viridis"](torch.linspace(0.0, 0.9, len(layers)).numpy())
    for number, layer in enumerate(layers):
        lines = axes.plot(list(history), alphas[:, number].numpy(), color=colours[number], lw=1)
        lines[0].set_label(f"layer {layer}")
    axes.set(title="alpha by head", xlabel="step", ylabel="alpha (1 is softmax, 2 sparsemax)")
    axes.legend(fontsize="small")
    return axes


@_needs_matplotlib()
def training_curves(
    runs: Mapping[str, Sequence[Mapping[float, float]]],
    axes: Any = None,
    xlabel: str = "step",
    ylabel: str = "loss",
) -> Any:
    """A line for each name: the mean of its runs at every ``x`` that all have, within their range.

    Args:
        runs: ``{name: [{x: y}, ...]}``, one mapping a seed.

    Raises:
        ValueError: a name has no run.
        ImportError: matplotlib is not installed.

    Example:
        >>> import adasplash2.plot
        >>> runs = {"softmax": [{0: 3.0, 100: 2.0}, {0: 3.2, 100: 2.1}]}
        >>> [line.get_ydata().tolist() for line in adasplash2.plot.training_curves(runs).lines]
        [[3.1, 2.05]]
    """
    axes = _axes(axes)
    for name, seeds in runs.items():
        if not seeds:
            raise ValueError(f"runs must hold a run of each name, {name!r} has none")
        shared = sorted(set(seeds[0]).intersection(*seeds[1:]))
        values = [[run[x] for run in seeds] for x in shared]
        (line,) = axes.plot(
            shared, [sum(of) / len(of) for of in values], label=name, marker=".", lw=1.5
        )
        if len(seeds) > 1:
            lowest, highest = [min(of) for of in values], [max(of) for of in values]
            axes.fill_between(shared, lowest, highest, color=line.get_color(), alpha=0.2, lw=0)
    axes.set(xlabel=xlabel, ylabel=ylabel)
    axes.legend(fontsize="small")
    return axes


def _axes(axes: Any) -> Any:
    if axes is not None:
        return axes
    from matplotlib.figure import Figure

    return Figure(layout="constrained").subplots()  # of no window: works without a display


def _by_layer(watched: Mapping[str, Watched], what: str) -> Tensor:
    """``(layers, heads)``; layers with fewer heads are filled with NaN."""
    if not watched:
        raise ValueError("watched must hold a layer, it is empty")
    rows = [getattr(found, what) for found in watched.values()]
    widest = max(len(row) for row in rows)
    return torch.stack([F.pad(row, (0, widest - len(row)), value=torch.nan) for row in rows])


def _whole(axes: Any, heads: int, layers: list[str]) -> None:
    every = max(1, len(layers) // 16)
    axes.set_xticks(range(heads))
    axes.set_yticks(range(0, len(layers), every), layers[::every])
