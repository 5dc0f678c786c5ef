"""Pictures show what they are given."""

from __future__ import annotations

import doctest
import sys
from collections.abc import Callable

import pytest
import torch

from adasplash2 import plot
from adasplash2.nn import AttentionMonitor, EntmaxMultiheadAttention, Watched

matplotlib = pytest.importorskip("matplotlib")


def watched(alpha: float = 1.5, heads: int = 2) -> Watched:
    numbers = torch.arange(1.0, heads + 1.0, dtype=torch.float64)
    return Watched(alpha + 0.1 * numbers, 10 * numbers, numbers / 10)


@pytest.mark.parametrize(
    "draw",
    [
        lambda: plot.attention_map(torch.eye(2)),
        lambda: plot.support_by_head({"0": watched()}),
        lambda: plot.alpha_by_head({0: {"0": watched()}}),
        lambda: plot.training_curves({"a": [{1: 1.0}]}),
    ],
    ids=["attention_map", "support_by_head", "alpha_by_head", "curves"],
)
def test_without_matplotlib_the_extra_is_named(
    monkeypatch: pytest.MonkeyPatch, draw: Callable[[], object]
) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=r"needs matplotlib.*pip install '\.\[plot\]'"):
        draw()


@pytest.mark.parametrize("length", [8, 3 * plot.SIDE])
def test_exact_zeros_are_white_and_nothing_else_is(length: int) -> None:
    weights = torch.zeros(length, length)
    weights[length // 2, 0] = 1e-30
    cells = plot.attention_map(weights).images[0].get_array()
    assert cells.shape[0] <= plot.SIDE
    assert (~cells.mask).sum() == 1


def test_support_by_layer_and_head() -> None:
    axes = plot.support_by_head({"0": watched(), "7": watched(heads=3)})
    drawn = axes.images[0].get_array()
    assert drawn.filled(-1.0).tolist() == [[10.0, 20.0, -1.0], [10.0, 20.0, 30.0]]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["0", "7"]


def test_softmax_alone_is_white() -> None:
    softmax = watched()._replace(support=torch.full((2,), torch.nan))
    axes = plot.support_by_head({"0": softmax})
    assert axes.images[0].get_array().mask.all()
    axes.figure.canvas.draw()


def test_alpha_by_head_over_steps() -> None:
    axes = plot.alpha_by_head({0: {"0": watched()}, 50: {"0": watched(1.2)}})
    assert [list(line.get_xdata()) for line in axes.lines] == [[0, 50]] * 2
    assert list(axes.lines[1].get_ydata()) == pytest.approx([1.7, 1.4])


def test_curves_are_means_within_ranges() -> None:
    axes = plot.training_curves(
        {"a": [{1: 1.0, 2: 4.0, 3: 9.0}, {1: 3.0, 2: 4.0}], "b": [{1: 0.0}]}
    )
    assert [list(line.get_ydata()) for line in axes.lines] == [[2.0, 4.0], [0.0]]
    assert len(axes.collections) == 1


def test_what_a_monitor_saw_is_drawn(tmp_path: object) -> None:
    module = EntmaxMultiheadAttention(8, 2)
    monitor = AttentionMonitor(every=1)
    monitor.watch(module)
    x = torch.randn(5, 3, 8)
    module(x, x, x)
    monitor.step()
    axes = plot.support_by_head(monitor.history[0])
    axes.figure.savefig(f"{tmp_path}/picture.png")
    assert plot.alpha_by_head(monitor.history, axes) is axes


def test_errors_name_the_argument() -> None:
    for name, draw in {
        "weights": lambda: plot.attention_map(torch.zeros(3)),
        "watched": lambda: plot.support_by_head({}),
        "history": lambda: plot.alpha_by_head({}),
        "runs": lambda: plot.training_curves({"a": []}),
    }.items():
        with pytest.raises(ValueError, match=f"^{name}"):
            draw()


def test_examples_are_true() -> None:
    found = doctest.testmod(plot)
    assert found.attempted
    assert not found.failed
