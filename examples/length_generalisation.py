"""Trained short, tested long: softmax, entmax, and entmax whose scale follows the length.

Small decoders learn tasks at lengths of 32 to 64 and are tested at up to 64 times that. Each
contender trains with each learning rate; the one that does best at twice the length, on sequences
of its own, is then trained with the other seeds. Prints a table and writes results.json and a
picture: means of the seeds, within their range. A run that was stopped goes on from where it was,
and one that is done is not done again.

Tasks: sort, reverse and copy digits; sort without repeats ("distinct"), the same among near-equal
numbers, of which one or some crowd ("crowd", "crowds"); recall the values of keys ("multi-token
recall": keys and values of two tokens each); read the bit that was written last ("flip-flop"); find
the one thing that is marked ("needle") or is asked for ("needles"); say the class of the largest
thing so far ("largest") or the highest of its kind among near-equal ones ("maxima"). The size
"published" has the decoder and the plan of Vasylenko et al. 2025, whose layers differ by task: 2
for sort and copy (16 heads), 6 for reverse, 4 for multi-token recall (512 features, 16 heads).
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from training import (
    Budget,
    Decoder,
    Plan,
    Recipe,
    Size,
    Stopped,
    add_common,
    autocast,
    chosen,
    compiled,
    draw_alphas,
    environment,
    file_name,
    fit,
    generator_of,
    learned_alphas,
    prepare,
    write_json,
)

from adasplash2 import plot

IGNORED = -100
"""Target of what is no answer; cross_entropy's default."""
SHORTEST, LONGEST = 32, 64
"""Lengths trained at."""

CONTENDERS = {
    "softmax": Recipe(alpha=1.0),
    "entmax": Recipe(alpha=1.5),
    "entmax, length scale": Recipe(alpha=1.5, length_scale=True),
    "softmax, length scale": Recipe(alpha=1.0, length_scale=True),
    "entmax, flat length scale": Recipe(alpha=1.5, length_scale="flat"),
    "softmax, nope": Recipe(alpha=1.0, positions="none"),
    "entmax, nope": Recipe(alpha=1.5, positions="none"),
    "softmax, rope": Recipe(alpha=1.0, positions="rope"),
    "entmax, rope": Recipe(alpha=1.5, positions="rope"),
    "softmax, qk-norm": Recipe(alpha=1.0, qk_norm=True),
    "entmax, qk-norm": Recipe(alpha=1.5, qk_norm=True),
    "entmax, learned alpha": Recipe(alpha="learn", length_scale=True),
    "learned alpha, qk-norm": Recipe(alpha="learn", qk_norm=True),
}

# Tasks


class Batch(NamedTuple):
    """``(batch, tokens)`` each; ``targets`` are the next tokens where they are an answer."""

    tokens: Tensor
    targets: Tensor


@dataclass(frozen=True)
class Task:
    """``draw(count, length, generator)``. ``whole``: a sequence is right if all its answers are;
    else answers are counted one by one."""

    vocabulary: int
    whole: bool
    draw: Callable[[int, int, torch.Generator], Batch]


DIGITS = 32


def answers_behind(source: Tensor, answer: Tensor, separator: int) -> Batch:
    """``source``, a separator, and what is to be said then."""
    mark = torch.full((len(source), 1), separator)
    tokens = torch.cat([source, mark, answer], dim=1)
    targets = torch.full_like(tokens, IGNORED)
    targets[:, source.shape[1] :] = torch.cat([answer, mark], dim=1)
    return Batch(tokens, targets)


def draw_sort(count: int, length: int, generator: torch.Generator) -> Batch:
    source = torch.randint(DIGITS, (count, length), generator=generator)
    return answers_behind(source, source.sort(dim=1).values, DIGITS)


def draw_reverse(count: int, length: int, generator: torch.Generator) -> Batch:
    source = torch.randint(DIGITS, (count, length), generator=generator)
    return answers_behind(source, source.flip(1), DIGITS)


def draw_copy(count: int, length: int, generator: torch.Generator) -> Batch:
    source = torch.randint(DIGITS, (count, length), generator=generator)
    return answers_behind(source, source, DIGITS)


PRESENT = DIGITS // 2


def draw_distinct(count: int, length: int, generator: torch.Generator) -> Batch:
    """Half of the digits, each at one place but one digit, which fills all others: they are to be
    said in order, each once. The next one is that key among all alike ones, and among those above
    it, that scores must lift out: the more of them, the further."""
    order = torch.rand(count, DIGITS, generator=generator).argsort(dim=1)[:, :PRESENT]
    place = torch.rand(count, length, generator=generator).argsort(dim=1)[:, : PRESENT - 1]
    source = order[:, :1].repeat(1, length).scatter(1, place, order[:, 1:])
    return answers_behind(source, order.sort(dim=1).values, DIGITS)


NUMBERS = 512


def draw_crowds(
    near: int, there: int, crowds: int, count: int, length: int, generator: torch.Generator
) -> Batch:
    """Some numbers, ``there`` of ``near`` neighbours, each at one place but ``crowds`` of them,
    which share all other places: they are to be said in order, each once. It is "distinct" with
    hard negatives (near-equal keys, as in the max retrieval of Velickovic et al. 2024, *softmax is
    not enough*): often a crowd is right above what is next, and grows with the length. As the
    neighbours may be any, scores must rise by enough from each number to the next."""
    lowest = torch.randint(NUMBERS - near + 1, (count, 1), generator=generator)
    chosen = lowest + torch.rand(count, near, generator=generator).argsort(dim=1)[:, :there]
    crowd = torch.randint(crowds, (count, length), generator=generator)
    place = torch.rand(count, length, generator=generator).argsort(dim=1)[:, :there]
    source = chosen.gather(1, crowd).scatter(1, place, chosen)
    return answers_behind(source, chosen.sort(dim=1).values, NUMBERS)


KEYS, VALUES, QUERIES = 4096, 16, 8


def draw_recall(count: int, length: int, generator: torch.Generator) -> Batch:
    """Pairs of keys, all different, and values; then some of the keys again, each to be followed by
    its value (Arora et al. 2023, multi-query associative recall)."""
    pairs = length // 2
    keys = torch.rand(count, KEYS, generator=generator).topk(pairs, dim=1).indices
    values = KEYS + torch.randint(VALUES, (count, pairs), generator=generator)
    asked = torch.rand(count, pairs, generator=generator).argsort(dim=1)[:, :QUERIES]
    held = torch.stack([keys, values], dim=2).flatten(1)
    again = torch.stack([keys.gather(1, asked), values.gather(1, asked)], dim=2).flatten(1)
    tokens = torch.cat([held, again], dim=1)
    targets = torch.full_like(tokens, IGNORED)
    targets[:, 2 * pairs :: 2] = values.gather(1, asked)
    return Batch(tokens, targets)


SPACE, IS, ASKS, ALPHABET = 0, 1, 2, 3
"""Letters come behind these."""
LETTER_COUNT, WORD_COUNT, ASKED_WORDS, FILLED = 256, 10_000, 4, 0.8
"""``FILLED``: the share of tokens that are no spaces, but for the one behind each pair."""


@cache
def known_words() -> list[Tensor]:
    """Keys and values, the same in every run."""
    once = torch.Generator().manual_seed(0)
    return [torch.randperm(LETTER_COUNT**2, generator=once)[:WORD_COUNT] for _ in range(2)]


def draw_multi_token_recall(count: int, length: int, generator: torch.Generator) -> Batch:
    """Pairs ``key IS value``, all keys different and all values, spaces between them; then some of
    the keys, and what is to be said: their values. Keys and values are words of two letters, all
    of the same 10,000 each (Vasylenko et al. 2025, multi-query multi-token associative recall)."""
    pairs = int(FILLED * length) // 6
    keys, values = (some_words(count, pairs, words, generator) for words in known_words())
    # Each space that is free goes before one of the pairs, or behind all.
    free = torch.randint(length - 6 * pairs + 1, (count, pairs), generator=generator)
    at = free.sort(dim=1).values + 6 * torch.arange(pairs)
    told = torch.cat([keys, torch.full_like(keys[..., :1], IS), values], dim=2)
    place = (at[..., None] + torch.arange(5)).flatten(1)
    source = torch.full((count, length), SPACE).scatter(1, place, told.flatten(1))
    asked = torch.randint(pairs, (count, ASKED_WORDS), generator=generator)
    asks = torch.full((count, ASKED_WORDS, 1), ASKS)
    row = torch.arange(count)[:, None]
    questions = torch.cat([asks, keys[row, asked]], dim=2).flatten(1)
    answer = torch.cat([asks, values[row, asked]], dim=2).flatten(1)
    return answers_behind(torch.cat([source, questions], dim=1), answer, ALPHABET + LETTER_COUNT)


def some_words(count: int, some: int, words: Tensor, generator: torch.Generator) -> Tensor:
    """Different ones of each row, as letters ``(count, some, 2)``."""
    drawn = torch.randint(len(words) - some + 1, (count, some), generator=generator)
    apart = drawn.sort(dim=1).values + torch.arange(some)
    order = torch.rand(count, some, generator=generator).argsort(dim=1)
    picked = words[apart.gather(1, order)]
    return ALPHABET + torch.stack([picked // LETTER_COUNT, picked % LETTER_COUNT], dim=2)


IGNORE, WRITE, READ, BITS = 0, 1, 2, 3
IGNORE_SHARE = 0.8


def draw_flip_flop(count: int, length: int, generator: torch.Generator) -> Batch:
    """Instructions, each with a bit: a read's is that of the last write, and is to be said (Liu et
    al. 2023, *Exposing Attention Glitches with Flip-Flop Language Modeling*)."""
    pairs = length // 2
    drawn = torch.rand(count, pairs, generator=generator)
    does = torch.where(drawn < IGNORE_SHARE, IGNORE, WRITE)
    does = torch.where(drawn > 0.5 + 0.5 * IGNORE_SHARE, READ, does)
    does[:, 0], does[:, -1] = WRITE, READ
    bits = torch.randint(2, (count, pairs), generator=generator)
    last = torch.where(does == WRITE, torch.arange(pairs), 0).cummax(dim=1).values
    bits = BITS + torch.where(does == READ, bits.gather(1, last), bits)
    tokens = torch.stack([does, bits], dim=2).flatten(1)
    targets = torch.full_like(tokens, IGNORED)
    targets[:, 0::2] = torch.where(does == READ, bits, IGNORED)
    return Batch(tokens, targets)


OTHER, NEEDLE, COLOURS, COLOUR_COUNT = 0, 1, 2, 8
"""Kinds come before colours; the token behind both asks."""


def draw_needle(count: int, length: int, generator: torch.Generator) -> Batch:
    """Things, each a kind and a colour. One is the needle: its colour is to be said at the end. All
    others have one colour, so that whoever attends to many of them says that."""
    pairs = length // 2
    place = torch.randint(pairs, (count, 1), generator=generator)
    colours = COLOURS + torch.randint(COLOUR_COUNT, (count, 2), generator=generator)
    kinds = torch.full((count, pairs), OTHER).scatter(1, place, NEEDLE)
    seen = colours[:, :1].repeat(1, pairs).scatter(1, place, colours[:, 1:])
    source = torch.stack([kinds, seen], dim=2).flatten(1)
    tokens = torch.cat([source, torch.full((count, 1), COLOURS + COLOUR_COUNT)], dim=1)
    targets = torch.full_like(tokens, IGNORED)
    targets[:, -1:] = colours[:, 1:]
    return Batch(tokens, targets)


TAGS, MARKS, NEEDLES = 8, 4, 4


def draw_needles(count: int, length: int, generator: torch.Generator) -> Batch:
    """Things, each a tag and a mark in one token, and behind them tags that are asked: the mark is
    to be said. Those that are asked stand once, all other things are alike. What matters is known
    from the question alone, so that no layer can leave out the others before it."""
    order = torch.rand(count, TAGS, generator=generator).argsort(dim=1)
    asked, other = order[:, :NEEDLES], order[:, NEEDLES : NEEDLES + 1]
    marks = torch.randint(MARKS, (count, NEEDLES + 1), generator=generator)
    place = torch.rand(count, length, generator=generator).argsort(dim=1)[:, :NEEDLES]
    alike = (MARKS * other + marks[:, -1:]).repeat(1, length)
    source = alike.scatter(1, place, MARKS * asked + marks[:, :-1])
    tokens = torch.cat([source, TAGS * MARKS + asked], dim=1)
    targets = torch.full_like(tokens, IGNORED)
    targets[:, length:] = marks[:, :-1]
    return Batch(tokens, targets)


LEVELS, CLASSES = 16, 8


def draw_largest(count: int, length: int, generator: torch.Generator) -> Batch:
    """Things, each a level and a class in one token: behind each the class of the largest so far
    is to be said (after Velickovic et al. 2024, whose max retrieval asks it of the whole). The
    largest of all stands once, and the longer the sequence the more there are right below it.
    Things of one level have one class."""
    top = torch.randint(1, LEVELS, (count, 1), generator=generator)
    place = torch.randint(length, (count, 1), generator=generator)
    level = (torch.rand(count, length, generator=generator) * top).long().scatter(1, place, top)
    classes = torch.randint(CLASSES, (count, LEVELS), generator=generator)
    tokens = CLASSES * level + classes.gather(1, level)
    return Batch(tokens, classes.gather(1, level.cummax(dim=1).values))


KINDS, HEIGHTS, RISES, DEPTH = 4, 256, 2, 8


def draw_maxima(count: int, length: int, generator: torch.Generator) -> Batch:
    """Things, each a kind and a height in one token: behind each the highest of its kind so far is
    to be said. It is max retrieval, too, with hard negatives: a kind's maximum rises by one, at
    ``RISES`` places, and from then on stands only there; half of its others are one below, a
    quarter two and so on, down to ``DEPTH``. Scores must put a kind above all heights of others
    and each height above the next, of which there are the more the longer the sequence."""
    low = torch.randint(DEPTH, HEIGHTS - RISES, (count, KINDS), generator=generator)
    kind = torch.randint(KINDS, (count, length), generator=generator)
    place = torch.rand(count, length, generator=generator).argsort(dim=1)[:, : KINDS * RISES]
    kind.scatter_(1, place, torch.arange(KINDS).repeat(RISES).expand(count, -1))
    rises = torch.zeros_like(kind).scatter(1, place, 1)[:, None]
    its = kind[:, None] == torch.arange(KINDS)[:, None]
    below = torch.empty(count, 1, length).geometric_(0.5, generator=generator).clamp(max=DEPTH)
    height = low[..., None] + (its * rises).cumsum(dim=2) - (1 - rises) * below.long()
    highest = torch.where(its, height, 0).cummax(dim=2).values
    things = (HEIGHTS * kind + of.gather(1, kind[:, None])[:, 0] for of in (height, highest))
    return Batch(*things)


LETTERS, FADING, FRESH = 8, 0.5, 0.1


def fading_letters(count: int, length: int, generator: torch.Generator) -> Tensor:
    """Each is that of ``d`` places before with a chance of ``exp(-FADING * d)``, and now and then
    one at random: what comes next is best told by a mean of all before, the nearer the heavier."""
    letters = torch.randint(LETTERS, (count, length), generator=generator)
    fresh = torch.rand(count, length, generator=generator) < FRESH
    back = torch.empty(count, length).geometric_(1.0 - math.exp(-FADING), generator=generator)
    source = torch.arange(length) - back.long()
    for place in range(length):
        copied = letters.gather(1, source[:, place : place + 1].clamp(min=0))[:, 0]
        kept = fresh[:, place] | (source[:, place] < 0)
        letters[:, place] = torch.where(kept, letters[:, place], copied)
    return letters


def draw_pick_and_mean(count: int, length: int, generator: torch.Generator) -> Batch:
    """Needles, then letters that fade, then the needles that are asked: some heads must pick one
    thing, others take a mean of many. What letter comes is chance, so that nobody says all."""
    letters = length // 4
    picked = draw_needles(count, length - letters, generator)
    things = length - letters
    faded = TAGS * MARKS + TAGS + fading_letters(count, letters, generator)
    tokens = torch.cat([picked.tokens[:, :things], faded, picked.tokens[:, things:]], dim=1)
    targets = torch.full_like(tokens, IGNORED)
    targets[:, things : length - 1] = faded[:, 1:]
    targets[:, length:] = picked.targets[:, things:]
    return Batch(tokens, targets)


# The last one shows how learned alphas part; the others are what sizes may ask.
TASKS = {
    "sort": Task(DIGITS + 1, True, draw_sort),
    "reverse": Task(DIGITS + 1, True, draw_reverse),
    "copy": Task(DIGITS + 1, True, draw_copy),
    "distinct": Task(DIGITS + 1, True, draw_distinct),
    "crowd": Task(NUMBERS + 1, True, partial(draw_crowds, 32, 16, 1)),
    "crowds": Task(NUMBERS + 1, True, partial(draw_crowds, 48, 24, 8)),
    "recall": Task(KEYS + VALUES, False, draw_recall),
    "multi-token recall": Task(ALPHABET + LETTER_COUNT + 1, True, draw_multi_token_recall),
    "flip-flop": Task(BITS + 2, False, draw_flip_flop),
    "needle": Task(COLOURS + COLOUR_COUNT + 1, False, draw_needle),
    "needles": Task(TAGS * MARKS + TAGS, False, draw_needles),
    "largest": Task(LEVELS * CLASSES, True, draw_largest),
    "maxima": Task(KINDS * HEIGHTS, True, draw_maxima),
    "pick and mean": Task(TAGS * MARKS + TAGS + LETTERS, False, draw_pick_and_mean),
}


def started(task: Task) -> Task:
    """With a token of its own before each sequence, to which heads can attend that look for what
    is not there."""

    def draw(count: int, length: int, generator: torch.Generator) -> Batch:
        tokens, targets = task.draw(count, length, generator)
        return Batch(
            F.pad(tokens, (1, 0), value=task.vocabulary), F.pad(targets, (1, 0), value=IGNORED)
        )

    return Task(task.vocabulary + 1, task.whole, draw)


# Sizes


@dataclass(frozen=True)
class Scale:
    """What ``--size`` stands for. ``tested``: tokens of each test. ``warmup``: steps of it.
    ``published``: see :class:`training.Size`; sequences have a start, too, and the rate falls to
    0."""

    tasks: tuple[str, ...]
    layers: int
    heads: int
    features: int
    steps: int
    batch: int
    rates: tuple[float, ...]
    seeds: int
    multiples: tuple[int, ...]
    tested: int
    warmup: int = 100
    published: bool = False


SIZES = {
    "cut": Scale(("distinct",), 2, 4, 32, 300, 32, (1e-2,), 1, (1, 64), 2**16),
    "small": Scale(
        ("distinct",), 2, 4, 32, 400, 32, (3e-2, 1e-2, 3e-3), 3, (1, 2, 4, 8, 64), 2**16
    ),
    "real": Scale(
        ("sort", "reverse", "distinct", "recall", "flip-flop", "needle", "needles"),
        4,
        8,
        256,
        6000,
        128,
        (3e-3, 1e-3, 3e-4),
        3,
        (1, 2, 4, 8, 64),
        2**18,
    ),
    "published": Scale(
        ("reverse",), 6, 8, 256, 234_375, 128, (4e-4,), 3, (1, 2, 4, 8), 2**18, 20_000, True
    ),
}

GIVEN = "layers", "heads", "features", "steps", "warmup", "seeds"
"""What of a size an option of its own can say."""
LOOKS = 20
"""How often learned alphas are noted in a run, beside before."""
VALIDATION, TEST = 1, 2
"""Of the seeds of sequences: never those trained on."""


def accuracy(
    model: Decoder, task: Task, multiple: int, purpose: int, tested: int, device: str
) -> float:
    """Share of what is right at ``multiple`` times the longest length trained at."""
    length = multiple * LONGEST
    count = max(4, tested // length)
    generator = generator_of(purpose, multiple)
    right = total = 0
    at_once = max(1, min(count, 2**15 // length))
    with torch.no_grad():
        for _ in range(-(-count // at_once)):
            tokens, targets = (t.to(device) for t in task.draw(at_once, length, generator))
            with autocast(device):
                said = model(tokens).argmax(dim=2)
            answers = targets != IGNORED
            wrong = answers & (said != targets)
            right += int((~wrong.any(dim=1)).sum() if task.whole else (answers & ~wrong).sum())
            total += at_once if task.whole else int(answers.sum())
    return right / total


def train_and_test(
    name: str, contender: str, rate: float, seed: int, scale: Scale, folder: Path,
    options: argparse.Namespace, budget: Budget,
) -> dict[str, Any]:  # fmt: skip
    """One run, or what it has left in ``folder``."""
    label = f"{file_name(name)}-{file_name(contender)}-{rate:g}-{seed}"
    done = folder / f"{label}.json"
    if done.exists():
        found: dict[str, Any] = json.loads(done.read_text())
        return found
    task = started(TASKS[name]) if scale.published else TASKS[name]
    torch.manual_seed(seed)
    size = Size(task.vocabulary, scale.layers, scale.heads, scale.features, scale.published)
    device = options.device
    model = Decoder(size, CONTENDERS[contender]).to(device)
    run = compiled(model, options)

    def batch_of(step: int) -> tuple[Tensor, ...]:
        generator = generator_of(0, seed, step)
        length = int(torch.randint(SHORTEST, LONGEST + 1, (), generator=generator))
        return tuple(t.to(device) for t in task.draw(scale.batch, length, generator))

    def loss_of(tokens: Tensor, targets: Tensor) -> Tensor:
        with autocast(device):
            logits = run(tokens)
        return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())

    notes: dict[str, Any] = {"alphas": {}}

    def note(step: int, _: float) -> None:
        if step % max(1, scale.steps // LOOKS) == 0 and (alphas := learned_alphas(model)):
            notes["alphas"][str(step)] = alphas

    note(0, 0.0)
    losses = fit(
        model,
        batch_of,
        loss_of,
        Plan(
            scale.steps,
            rate,
            seed,
            scale.warmup,
            options.decay,
            last=0.0 if scale.published else 0.1,
        ),
        graphed=options.graph,
        notes=notes,
        after=note,
        checkpoint=folder / f"{label}.pt",
        budget=budget,
        description=f"{name}, {contender}, rate {rate:g}, seed {seed}",
    )
    model.eval()
    result = {
        "task": name,
        "contender": contender,
        "rate": rate,
        "seed": seed,
        "loss": sum(losses[-50:]) / len(losses[-50:]),
        "validation": accuracy(model, task, 2, VALIDATION, scale.tested, device),
        "accuracy": {
            str(multiple): accuracy(model, task, multiple, TEST, scale.tested, device)
            for multiple in scale.multiples
        },
        **notes,
    }
    write_json(done, result)
    (folder / f"{label}.pt").unlink(missing_ok=True)
    return result


def compete(
    name: str,
    contender: str,
    scale: Scale,
    folder: Path,
    options: argparse.Namespace,
    budget: Budget,
) -> list[dict[str, Any]]:
    """The runs of a contender with its own best learning rate, one a seed."""

    def run(rate: float, seed: int) -> dict[str, Any]:
        return train_and_test(name, contender, rate, seed, scale, folder, options, budget)

    first = [run(rate, 0) for rate in scale.rates]
    best = max(first, key=lambda result: (result["validation"], -result["loss"]))
    return [best, *(run(best["rate"], seed) for seed in range(1, scale.seeds))]


def table(results: dict[str, dict[str, list[dict[str, Any]]]], multiples: tuple[int, ...]) -> str:
    """Means in percent, and the range where there are several seeds."""
    width = max(len(contender) for by in results.values() for contender in by)
    named = max(map(len, results))
    lines = [
        f"{'':<{named}} {'':<{width}} {'rate':>6} " + " ".join(f"{f'{m}x':>14}" for m in multiples)
    ]
    for name, by_contender in results.items():
        for contender, runs in by_contender.items():
            cells = []
            for multiple in multiples:
                values = [100 * run["accuracy"][str(multiple)] for run in runs]
                spread = f" ({min(values):.0f}-{max(values):.0f})" if len(values) > 1 else ""
                cells.append(f"{f'{sum(values) / len(values):.1f}{spread}':>14}")
            rate = f"{runs[0]['rate']:g}"
            lines.append(f"{name:<{named}} {contender:<{width}} {rate:>6} " + " ".join(cells))
    return "\n".join(lines)


def draw(results: dict[str, dict[str, list[dict[str, Any]]]], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1 + 4 * len(results), 4), layout="constrained")
    for axes, (name, by_contender) in zip(
        figure.subplots(1, len(results), squeeze=False)[0], results.items(), strict=True
    ):
        plot.training_curves(
            {
                contender: [
                    {float(m): 100 * value for m, value in run["accuracy"].items()} for run in runs
                ]
                for contender, runs in by_contender.items()
            },
            axes,
            xlabel=f"length, in times of {LONGEST}",
            ylabel="whole sequences right, %" if TASKS[name].whole else "answers right, %",
        )
        axes.set_xscale("log", base=2)
        axes.set(title=name, ylim=(-3, 103))
        axes.axvline(1, color="grey", lw=0.8, ls=":")
    figure.savefig(path, dpi=110)


def parse(arguments: list[str] | None) -> tuple[argparse.Namespace, Budget]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--size", choices=SIZES, default="small", help="small: five minutes on two threads; real: "
        "one GPU; cut: a minute, which tests run (default small)")  # fmt: skip
    add("--tasks", nargs="+", help=f"of {', '.join(TASKS)} (default: the size's)")
    add("--contenders", nargs="+", default=list(CONTENDERS)[:3], help=f"of {'; '.join(CONTENDERS)} "
        "(default: the first three)")  # fmt: skip
    add("--layers", type=int, help="of the decoder (default: the size's)")
    add("--heads", type=int, help="of each layer (default: the size's)")
    add("--features", type=int, help="of each token (default: the size's)")
    add("--warmup", type=int, help="steps in which the rate rises (default: the size's)")
    add("--rates", nargs="+", type=float, help="learning rates (default: the size's)")
    add("--steps", type=int, help="of each run (default: the size's)")
    add("--seeds", type=int, help="of each contender's best rate (default: the size's)")
    add("--decay", type=float, default=0.0, help="of weights (default 0): scores stay small")
    add_common(parser, "output/length_generalisation")
    options = parser.parse_args(arguments)
    scale = SIZES[options.size]
    options.tasks = chosen(parser, "--tasks", options.tasks or list(scale.tasks), TASKS)
    chosen(parser, "--contenders", options.contenders, CONTENDERS)
    for name in GIVEN:
        given = getattr(options, name)
        if given is not None and given < 1:
            parser.error(f"argument --{name}: must be at least 1, got {given}")
        setattr(options, name, given or getattr(scale, name))
    if options.features % (2 * options.heads):
        parser.error(
            "argument --features: must be a multiple of twice the heads, "
            f"got {options.features} of {options.heads} heads"
        )
    options.rates = tuple(options.rates or scale.rates)
    if options.decay < 0.0:
        parser.error(f"argument --decay: must be at least 0, got {options.decay:g}")
    if min(options.rates) <= 0.0:
        parser.error(f"argument --rates: must be above 0, got {min(options.rates):g}")
    return options, prepare(parser, options)


def main(arguments: list[str] | None = None) -> int:
    options, budget = parse(arguments)
    given = {name: getattr(options, name) for name in (*GIVEN, "rates")}
    scale = replace(SIZES[options.size], **given, tasks=tuple(options.tasks))
    parts = "size", "layers", "heads", "features", "steps", "warmup", "decay"
    folder = options.output / "-".join(str(getattr(options, part)) for part in parts)
    results: dict[str, dict[str, list[dict[str, Any]]]] = {}
    stopped = False
    try:
        for name in options.tasks:
            for contender in options.contenders:
                runs = compete(name, contender, scale, folder, options, budget)
                results.setdefault(name, {})[contender] = runs
    except Stopped:
        print("stopped: the same command goes on", file=sys.stderr)
        stopped = True
    if not results:
        return 1
    print(table(results, scale.multiples))
    write_json(
        options.output / "results.json",
        {
            "environment": environment(options.device),
            "size": {**vars(scale), "decay": options.decay},
            "results": results,
        },
    )
    draw(results, options.output / "length_generalisation.png")
    draw_alphas(
        {
            f"{name}, {contender}, seed {run['seed']}": run["alphas"]
            for name, by_contender in results.items()
            for contender, runs in by_contender.items()
            for run in runs
        },
        options.output / "length_generalisation-alpha.png",
    )
    print(f"picture: {options.output / 'length_generalisation.png'}")
    return 1 if stopped else 0


if __name__ == "__main__":
    raise SystemExit(main())
