"""What the training recipes share: a small decoder whose attention is said by a recipe, a training
loop that goes on after a stop, and the records it leaves."""

from __future__ import annotations

import argparse
import datetime
import json
import math
import os
import platform
import shlex
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import adasplash2
import adasplash2.plot

FACTOR_RATE = 1e-2
"""The highest learning rate of a :class:`adasplash2.nn.HeadScale`."""
SAVE_SECONDS = 60.0
"""Between checkpoints: what a run that is stopped loses at most."""
READ_STEPS = 10
"""Between looks at the losses."""


@dataclass(frozen=True)
class Recipe:
    """How a contender attends.

    Attributes:
        alpha: 1 is softmax. "learn": one of each head.
        rise: the share of the steps in which alpha rises from 1; 0 begins with it.
        scale: a factor of 1/sqrt(head_dim).
        learn_scale: each head learns a factor of its own; it starts at 1.
        length_scale: the factor of ASEntmax, which follows the keys that a query sees. "flat": of
            the heads without slopes alone, as published; the others see as far at any length.
        positions: "nape", "rope" or "none".
        qk_norm: queries and keys have a root mean square of 1.
    """

    alpha: float | str = 1.5
    rise: float = 0.0
    scale: float = 1.0
    learn_scale: bool = False
    length_scale: bool | str = False
    positions: str = "nape"
    qk_norm: bool = False


@dataclass(frozen=True)
class Size:
    """Of a decoder.

    Attributes:
        published: blocks, slopes and the start of the length scale are those of the published
            recipe (Vasylenko et al. 2025): Gemma 2's blocks, which have a gate and norms behind
            each part, too; NAPE's slopes are 1, 1/2, 1/3 and so on; ``delta`` is 1.
    """

    vocabulary: int
    layers: int
    heads: int
    features: int
    published: bool = False


# The model


class Attention(nn.Module):
    """Causal self-attention as a :class:`Recipe` says."""

    def __init__(self, size: Size, recipe: Recipe) -> None:
        super().__init__()
        self.heads, self.recipe = size.heads, recipe
        self.inputs = nn.Linear(size.features, 3 * size.features, bias=False)
        self.output = nn.Linear(size.features, size.features, bias=False)
        self.alpha: Any = 1.0 if recipe.rise else recipe.alpha
        if recipe.alpha == "learn":
            self.alpha = adasplash2.nn.LearnedAlpha(size.heads)
        self.scale = recipe.scale / math.sqrt(size.features // size.heads)
        self.log_scale = nn.Parameter(torch.zeros(size.heads)) if recipe.learn_scale else None
        slopes = slopes_of(size) if recipe.positions == "nape" else None
        self.length_scale = None
        if recipe.length_scale:
            self.sloped = 0
            if recipe.length_scale == "flat" and slopes is not None:
                self.sloped = int((slopes > 0).sum())
            delta = {"delta": 1.0} if size.published else {}
            scaled = size.heads - self.sloped
            self.length_scale = adasplash2.nn.LengthScale(size.features, scaled, **delta)
        self.register_buffer("slopes", slopes, persistent=False)
        self.observer: adasplash2.nn.Observer | None = None

    def forward(self, x: Tensor) -> Tensor:
        heads = self.inputs(x).unflatten(-1, (3, self.heads, -1))
        query, key, value = heads.permute(2, 0, 3, 1, 4).unbind(0)
        if self.recipe.qk_norm:
            query, key = (F.rms_norm(t, t.shape[-1:]) for t in (query, key))
        if self.recipe.positions == "rope":
            query, key = rotated(query), rotated(key)
        length = x.shape[1]
        alpha = self.alpha() if isinstance(self.alpha, nn.Module) else self.alpha
        scale: float | Tensor = self.scale
        if self.log_scale is not None:
            scale = scale * self.log_scale.exp()
        if self.length_scale is not None:
            seen = torch.arange(1, length + 1, device=x.device)
            by_head = scale[:, None] if isinstance(scale, Tensor) else scale
            # Heads with slopes are the last ones.
            factor = F.pad(self.length_scale(x, seen), (0, 0, 0, self.sloped), value=1.0)
            scale = by_head * factor
        arguments: dict[str, Any] = {"is_causal": True, "scale": scale, "alpha": alpha}
        if self.slopes is not None and alpha is self.alpha and alpha == 1.0:
            # As a mask they go through SDPA's own kernels.
            bias = causal_bias(self.slopes, length)
            arguments |= {"is_causal": False, "attn_mask": bias.to(query.dtype)}
        elif self.slopes is not None:
            arguments["alibi_slopes"] = self.slopes
        if self.observer is not None and not torch.compiler.is_compiling():
            self.observer(None, query, key, value, arguments)
        out = adasplash2.entmax_attention(query, key, value, **arguments)
        return self.output(out.transpose(1, 2).flatten(2))


def slopes_of(size: Size) -> Tensor:
    """NAPE's: the first half of the heads have none."""
    if not size.published:
        return adasplash2.nn.nape_slopes(size.heads)
    sloped = size.heads // 2
    return torch.cat([torch.zeros(size.heads - sloped), 1.0 / torch.arange(1, sloped + 1)])


def rotated(x: Tensor, base: float = 10000.0) -> Tensor:
    """Rotary positions (Su et al. 2021) of ``(batch, heads, length, head_dim)``."""
    half = x.shape[-1] // 2
    rate = base ** (-torch.arange(half, device=x.device, dtype=torch.float32) / half)
    angle = torch.arange(x.shape[-2], device=x.device, dtype=torch.float32)[:, None] * rate
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    first, second = x[..., :half], x[..., half:]
    return torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1)


def causal_bias(slopes: Tensor, length: int) -> Tensor:
    """ALiBi and the causal mask, ``(1, heads, length, length)``."""
    place = torch.arange(length, device=slopes.device)
    distance = place[:, None] - place
    bias = -slopes[:, None, None] * distance
    return bias.masked_fill(distance < 0, -math.inf)[None]


class Block(nn.Module):
    def __init__(self, size: Size, recipe: Recipe) -> None:
        super().__init__()
        self.attention = Attention(size, recipe)
        self.norms = nn.ModuleList(nn.LayerNorm(size.features) for _ in range(2))
        self.hidden = nn.Linear(size.features, 4 * size.features)
        self.output = nn.Linear(4 * size.features, size.features)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norms[0](x))
        return x + self.output(F.gelu(self.hidden(self.norms[1](x))))


class GatedBlock(nn.Module):
    """Gemma 2's (Gemma Team 2024)."""

    def __init__(self, size: Size, recipe: Recipe) -> None:
        super().__init__()
        self.attention = Attention(size, recipe)
        self.norms = nn.ModuleList(nn.RMSNorm(size.features) for _ in range(4))
        self.gate = nn.Linear(size.features, 4 * size.features, bias=False)
        self.hidden = nn.Linear(size.features, 4 * size.features, bias=False)
        self.output = nn.Linear(4 * size.features, size.features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.norms[1](self.attention(self.norms[0](x)))
        inner = self.norms[2](x)
        gated = F.gelu(self.gate(inner), approximate="tanh") * self.hidden(inner)
        return x + self.norms[3](self.output(gated))


class Decoder(nn.Module):
    """A transformer that predicts the next token: ``(batch, length)`` to logits
    ``(batch, length, vocabulary)``."""

    def __init__(self, size: Size, recipe: Recipe) -> None:
        super().__init__()
        self.embedding = nn.Embedding(size.vocabulary, size.features)
        block, norm = (GatedBlock, nn.RMSNorm) if size.published else (Block, nn.LayerNorm)
        self.blocks = nn.ModuleList(block(size, recipe) for _ in range(size.layers))
        self.norm = norm(size.features)
        self.logits = nn.Linear(size.features, size.vocabulary, bias=False)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2 and "length_scale" not in name:
                deep = name.endswith("output.weight") and not size.published
                scale = 0.02 / math.sqrt(2 * size.layers) if deep else 0.02
                nn.init.normal_(parameter, std=scale)
        std = 0.02 * math.sqrt(size.features) if size.published else 1.0 / math.sqrt(size.features)
        nn.init.normal_(self.embedding.weight, std=std)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        return self.logits(self.norm(x))


# Training


class Plan(NamedTuple):
    """How long and how fast: ``rate`` is the highest learning rate."""

    steps: int
    rate: float
    seed: int
    warmup: int = 100
    decay: float = 0.0
    """Of the weights, but of no vector."""
    last: float = 0.1
    """The rate at the end, in parts of the highest."""


class Budget:
    """Minutes of a whole program; None for as many as it takes. Ctrl-C ends it, too, and a second
    one the program."""

    def __init__(self, minutes: float | None) -> None:
        self.ends = math.inf if minutes is None else time.monotonic() + 60.0 * minutes

    def heed_interrupts(self) -> None:
        def end(*_: object) -> None:
            self.ends = -math.inf
            signal.signal(signal.SIGINT, signal.default_int_handler)

        signal.signal(signal.SIGINT, end)

    @property
    def is_spent(self) -> bool:
        return time.monotonic() >= self.ends


class Stopped(Exception):
    """The budget is spent; the checkpoint holds what was reached."""


def rate_at(step: int, plan: Plan) -> float:
    """Linear warm-up, then half a cosine down to the last rate."""
    if step < plan.warmup:
        return plan.rate * (step + 1) / plan.warmup
    share = (step - plan.warmup) / max(1, plan.steps - plan.warmup)
    mean, swing = 0.5 * (1.0 + plan.last), 0.5 * (1.0 - plan.last)
    return plan.rate * (mean + swing * math.cos(math.pi * share))


def optimizer_of(model: nn.Module, plan: Plan, graphed: bool = False) -> torch.optim.AdamW:
    """AdamW; learned alphas move ten times as fast, as ``LearnedAlpha`` says, and the factors of
    heads as ``HeadScale`` does. What is ``graphed`` reads its rates from the device."""
    groups: dict[str, list[nn.Parameter]] = {
        "weights": [],
        "vectors": [],
        "alphas": [],
        "factors": [],
    }
    for name, parameter in model.named_parameters():
        kind = "weights" if parameter.dim() > 1 else "vectors"
        kind = "alphas" if name.endswith("alpha.logits") else kind
        kind = "factors" if name.endswith("log_factor") else kind
        groups[kind].append(parameter)
    faster = {"weights": 1.0, "vectors": 1.0, "alphas": 10.0, "factors": FACTOR_RATE / plan.rate}
    return torch.optim.AdamW(
        [
            {
                "params": parameters,
                "weight_decay": plan.decay if kind == "weights" else 0.0,
                "faster": faster[kind],
                "lr": torch.tensor(plan.rate, device=parameters[0].device)
                if graphed
                else plan.rate,
            }
            for kind, parameters in groups.items()
            if parameters
        ],
        betas=(0.9, 0.98),
        capturable=graphed,
    )


def set_rate(optimizer: torch.optim.Optimizer, step: int, plan: Plan) -> None:
    for group in optimizer.param_groups:
        rate = rate_at(step, plan) * group["faster"]
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


class Steps:
    """Steps of training on batches: ``steps(*batch)`` makes one and returns its loss.

    ``graphed``: each shape of a batch has a few steps as they are, then one is captured into a CUDA
    graph and the others are replays of it. What the host has to do for a step of a small model
    takes longer than the step.
    """

    WARM = 3
    """Steps before a shape's capture: what is compiled or chosen at first is no part of it."""

    def __init__(
        self,
        model: nn.Module,
        loss_of: Callable[..., Tensor],
        optimizer: torch.optim.Optimizer,
        graphed: bool,
    ) -> None:
        self.model, self.loss_of, self.optimizer, self.graphed = model, loss_of, optimizer, graphed
        self.made: dict[Any, int] = {}
        self.captured: dict[Any, tuple[torch.cuda.CUDAGraph, tuple[Tensor, ...], Tensor]] = {}
        self.stream = torch.cuda.Stream() if graphed else None

    def step(self, *batch: Tensor) -> Tensor:
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.loss_of(*batch)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        return loss.detach()

    def capture(self, batch: tuple[Tensor, ...]) -> tuple[Any, tuple[Tensor, ...], Tensor]:
        pool = next((graph.pool() for graph, *_ in self.captured.values()), None)
        graph, held = torch.cuda.CUDAGraph(), tuple(t.clone() for t in batch)
        with torch.cuda.graph(graph, pool=pool, stream=self.stream):
            loss = self.step(*held)
        return graph, held, loss

    def __call__(self, *batch: Tensor) -> Tensor:
        if self.stream is None:
            return self.step(*batch)
        shape = tuple(t.shape for t in batch)
        if self.made.setdefault(shape, 0) < self.WARM:
            self.made[shape] += 1
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                loss = self.step(*batch)
            torch.cuda.current_stream().wait_stream(self.stream)
            return loss
        if shape not in self.captured:
            self.captured[shape] = self.capture(batch)
        graph, held, loss = self.captured[shape]
        for ours, given in zip(held, batch, strict=True):
            ours.copy_(given)
        graph.replay()
        return loss.clone()


def fit(
    model: nn.Module,
    batch_of: Callable[[int], tuple[Tensor, ...]],
    loss_of: Callable[..., Tensor],
    plan: Plan,
    *,
    checkpoint: Path,
    budget: Budget,
    description: str,
    graphed: bool = False,
    schedule: adasplash2.nn.AlphaSchedule | None = None,
    notes: dict[str, Any] | None = None,
    after: Callable[[int, float], object] | None = None,
) -> list[float]:
    """Train ``model`` and return its losses, one a step.

    A step's loss must follow from the model and the step's number alone: a run that was stopped
    goes on from ``checkpoint`` as if nothing had been.

    Args:
        batch_of: the tensors of a step, drawn by its number, on the model's device.
        loss_of: the loss of such tensors.
        checkpoint: is written now and then, and where the budget ends.
        graphed: see :class:`Steps`.
        notes: what ``after`` has noted; kept in the checkpoint, and filled from it.
        after: called as ``after(steps done, seconds of training)`` after each step.

    Raises:
        Stopped: the budget ended before the steps.
        ValueError: an alpha that is to rise does not go into a graph.
    """
    if graphed and schedule is not None:
        raise ValueError("graphed: a graph's alpha stays as it is; the schedule's rises")
    optimizer = optimizer_of(model, plan, graphed)
    steps = Steps(model, loss_of, optimizer, graphed)
    losses: list[float] = []
    unread: list[Tensor] = []
    seconds, notes = 0.0, {} if notes is None else notes
    if checkpoint.exists():
        held = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(held["model"])
        optimizer.load_state_dict(held["optimizer"])
        losses, seconds = held["losses"], held["seconds"]
        notes.update(held["notes"])
        if schedule is not None:
            schedule.load_state_dict(held["schedule"])

    def save() -> None:
        state = {
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "losses": losses,
            "seconds": seconds,
            "notes": notes,
            "schedule": None if schedule is None else schedule.state_dict(),
        }
        checkpoint.parent.mkdir(parents=True, exist_ok=True)
        torch.save(state, checkpoint.with_suffix(".new"))
        os.replace(checkpoint.with_suffix(".new"), checkpoint)

    saved = time.monotonic()
    bar = tqdm(total=plan.steps, initial=len(losses), desc=description, leave=False)
    with bar:
        for step in range(len(losses), plan.steps):
            began = time.monotonic()
            set_rate(optimizer, step, plan)
            unread.append(steps(*batch_of(step)))
            if schedule is not None:
                schedule.step()
            ends = budget.is_spent and step + 1 < plan.steps
            saves = ends or time.monotonic() - saved > SAVE_SECONDS
            # A GPU is waited for now and then only: the host goes ahead of it.
            if saves or (step + 1) % READ_STEPS == 0 or step + 1 == plan.steps:
                losses += torch.stack(unread).tolist()
                unread.clear()
                bar.set_postfix(loss=f"{losses[-1]:.3f}", refresh=False)
            seconds += time.monotonic() - began
            bar.update()
            if after is not None:
                after(step + 1, seconds)
            if saves:
                save()
                saved = time.monotonic()
            if ends:
                raise Stopped
    return losses


def schedule_of(model: nn.Module, recipe: Recipe, steps: int) -> adasplash2.nn.AlphaSchedule | None:
    """What drives alpha, where the recipe lets it rise."""
    if not recipe.rise:
        return None
    assert isinstance(recipe.alpha, float)
    rise = max(1, round(recipe.rise * steps))
    return adasplash2.nn.AlphaSchedule(model, steps=rise, target=recipe.alpha)


def learned_alphas(model: Decoder) -> dict[str, list[float]]:
    """Of each layer's heads; empty where none is learned."""
    learned = ((n, block.attention.alpha) for n, block in enumerate(model.blocks))
    return {str(n): a().tolist() for n, a in learned if isinstance(a, adasplash2.nn.LearnedAlpha)}


def generator_of(*numbers: int) -> torch.Generator:
    """A generator on the CPU, another one for other ``numbers``, the same on every machine."""
    seed = 0
    for number in numbers:
        seed = (seed * 1_000_003 + number) % 2**63
    return torch.Generator().manual_seed(seed)


# Programs


def add_common(parser: argparse.ArgumentParser, output: str) -> None:
    add = parser.add_argument
    add("--device", default="cpu", help="cpu or cuda (default cpu)")
    add("--threads", type=int, help="on the CPU (default: torch's)")
    add("--compile", action="store_true", help="with torch.compile")
    add("--graph", action="store_true", help="steps as CUDA graphs: small models are several times "
        "as fast")  # fmt: skip
    add("--minutes", type=float, help="stop after so many; the same command goes on then")
    add("--output", type=Path, default=Path(output), help=f"a folder (default {output})")


def prepare(parser: argparse.ArgumentParser, options: argparse.Namespace) -> Budget:
    """Check and apply what :func:`add_common` added."""
    if options.threads is not None:
        if options.threads < 1:
            parser.error(f"argument --threads: must be at least 1, got {options.threads}")
        torch.set_num_threads(options.threads)
    if torch.device(options.device).type == "cuda" and not torch.cuda.is_available():
        parser.error("argument --device: torch sees no CUDA device")
    if options.graph and torch.device(options.device).type != "cuda":
        parser.error(f"argument --graph: needs --device cuda, got {options.device}")
    options.output.mkdir(parents=True, exist_ok=True)
    budget = Budget(options.minutes)
    if threading.current_thread() is threading.main_thread():
        budget.heed_interrupts()
    return budget


def chosen(parser: argparse.ArgumentParser, flag: str, names: list[str], known: Any) -> list[str]:
    """``names``, all of them ``known``."""
    for name in names:
        if name not in known:
            parser.error(f"argument {flag}: {name!r} is none of: {', '.join(known)}")
    return names


def asked() -> list[str]:
    """The program's arguments, but for where it writes and how long it takes."""
    kept: list[str] = []
    skipped = False
    for argument in sys.argv:
        if skipped or argument.split("=")[0] in ("--output", "--minutes"):
            skipped = not skipped and "=" not in argument
        else:
            kept.append(argument)
    return kept


def environment(device: str) -> dict[str, Any]:
    """What a result depends on beside its arguments."""
    on_gpu = torch.device(device).type == "cuda"
    return {
        "command": shlex.join(["python", *asked()]),
        "date": datetime.date.today().isoformat(),
        "device": torch.cuda.get_device_name() if on_gpu else platform.processor() or "CPU",
        "threads": torch.get_num_threads(),
        "adasplash2": adasplash2.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def compiled(model: nn.Module, options: argparse.Namespace) -> Callable[..., Any]:
    """``model`` as ``--compile`` says; what it computes is the same."""
    return torch.compile(model) if options.compile else model


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_suffix(".new")
    new.write_text(json.dumps(value, indent=1) + "\n")
    os.replace(new, path)


def file_name(name: str) -> str:
    return name.replace(", ", "-").replace(" ", "-")


def draw_alphas(
    histories: Mapping[str, Mapping[str, Mapping[str, list[float]]]], path: Path
) -> None:
    """The alphas of heads over the steps, of each run whose heads differ: ``{run: {step: {layer:
    alphas}}}``. Nothing is drawn where there is none."""
    from matplotlib.figure import Figure

    drawn = {}
    for name, history in histories.items():
        watched = {
            int(step): {
                layer: adasplash2.nn.Watched(*(torch.tensor(alphas, dtype=torch.float64),) * 3)
                for layer, alphas in layers.items()
            }
            for step, layers in history.items()
            if layers
        }
        last = [seen.alpha for seen in watched[max(watched)].values()] if watched else []
        if any(alpha.min() < alpha.max() for alpha in last):
            drawn[name] = watched
    if not drawn:
        return
    figure = Figure(figsize=(6 * len(drawn), 5), layout="constrained")
    panels = figure.subplots(1, len(drawn), squeeze=False)[0]
    for axes, (name, watched) in zip(panels, drawn.items(), strict=True):
        adasplash2.plot.alpha_by_head(watched, axes).set_title(name)
    figure.savefig(path, dpi=110)


def autocast(device: str) -> torch.autocast:
    """bfloat16 on GPUs."""
    kind = torch.device(device).type
    return torch.autocast(kind, torch.bfloat16, enabled=kind == "cuda")
