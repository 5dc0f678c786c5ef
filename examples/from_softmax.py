"""A softmax model continued with entmax: SmolLM2-135M on State of the Union speeches.

alpha is 1.5 from the first step on. Each head learns a factor of its scale, and starts with one
that brings its output near to softmax's. Beside it the same model takes the same steps with
softmax. What is "taught" begins where that ended, and learns what that says of each token. The
speeches of the last ten years are held out.
Prints a table and writes results.json and a picture: held-out loss before, during and after, at
equal steps and at equal time, loss by position, keys kept by layer. A run that was stopped goes on
from where it was, and one that is done is not done again.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from text_models import (
    Corpus,
    Logits,
    Program,
    Ready,
    Scale,
    bytes_of,
    compete,
    parse,
    record,
    texts,
)
from torch import Tensor
from torch.nn.utils import parametrize
from training import autocast, compiled

from adasplash2.integrations.transformers import apply, restore
from adasplash2.integrations.transformers.schedule import alpha_setter
from adasplash2.nn import AlphaSchedule, AttentionMonitor, HeadScale, ScaleMatcher


class Contender(NamedTuple):
    """How the model is continued.

    Attributes:
        rise: the share of the steps in which alpha rises from 1; 0 begins with it.
        start: where each head's learned factor of the scale starts; "matched": where its output is
            near to softmax's, by ``tolerance``; None leaves the scale as it is.
        tile_value: what empty tiles are worth where factors start "matched", see ScaleMatcher.
        learned: whether the factors are learned; else the weights take them at once.
        pressure: times the mean of the factors' logarithms is taken off the loss: larger factors
            keep fewer keys. With a ``tile_value`` the mean is weighted by head: a head whose tiles
            are all empty, or none of which is, gains nothing.
        taught: the share of the steps in which it learns what softmax says instead of the text.
        nearness: times how far its layers' outputs are from the teacher's, of each token in parts
            of their square, is added to what is learned of it.
        after: it starts with the weights that this contender ended with, which teaches it.
        faster: times the rate.
        attention_only: no weights learn but those of attention and of the norms before it.
    """

    alpha: float
    rise: float = 0.0
    start: float | Literal["matched"] | None = None
    tolerance: float = 0.0
    tile_value: float = 0.0
    learned: bool = True
    pressure: float = 0.0
    taught: float = 0.0
    nearness: float = 0.0
    after: str | None = None
    faster: float = 1.0
    attention_only: bool = False


SPARSER = Contender(
    1.5, start="matched", tolerance=0.3, pressure=0.06, taught=1.0, after="softmax", faster=2.0
)
BY_TILES = SPARSER._replace(tolerance=0.0, tile_value=2.5, pressure=0.03)

CONTENDERS = {
    "softmax": Contender(1.0),
    "entmax": Contender(1.5, start="matched", tolerance=0.05),
    "nearest": Contender(1.5, start="matched"),
    "sparser": Contender(1.5, start="matched", tolerance=0.15),
    "factors stay": Contender(1.5, start="matched", tolerance=0.15, learned=False),
    "pressed": Contender(1.5, start="matched", tolerance=0.2, pressure=0.03),
    "taught first": Contender(1.5, start="matched", tolerance=0.2, pressure=0.03, taught=0.5),
    "taught": Contender(
        1.5, start="matched", tolerance=0.2, pressure=0.03, taught=1.0, after="softmax", faster=2.0
    ),
    "taught, nearest": Contender(1.5, start="matched", taught=1.0, after="softmax", faster=2.0),
    "taught, sparser": SPARSER,
    "taught, attention only": SPARSER._replace(attention_only=True),
    "taught, by tiles": BY_TILES,
    "taught, by layers": BY_TILES._replace(tile_value=3.0, pressure=0.05, nearness=1.0),
    "same start": Contender(1.5, start=0.45),
    "alpha rises": Contender(1.5, rise=0.5, start=1.0),
    "scale stays": Contender(1.5, rise=0.5),
    "alpha 1.25": Contender(1.25, start="matched"),
}

SIZES = {
    "tiny": Scale(64, 2, 20, (1e-3,), 2),
    "small": Scale(256, 1, 30, (5e-5,), 4),
    "real": Scale(8192, 2, 400, (1e-4, 5e-5), 8),
}


class Source(NamedTuple):
    """``load()`` gives a new model with the weights to start from."""

    load: Callable[[], Any]
    encode: Callable[[str], Tensor]


def tiny_source() -> Source:
    """A random model of the same family, and bytes."""
    from transformers import LlamaConfig, LlamaForCausalLM

    def load() -> Any:
        config = LlamaConfig(
            vocab_size=256, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        )  # fmt: skip
        return LlamaForCausalLM(config)

    return Source(load, bytes_of)


def matched(model: Any, contender: Contender, tokens: Tensor) -> ScaleMatcher:
    """Knows of each layer the factors with which its heads' outputs are near to softmax's."""
    matcher = ScaleMatcher(contender.alpha, contender.tolerance, contender.tile_value)
    apply(model, 1.0, observer=matcher)
    with torch.no_grad(), autocast(tokens.device.type):
        model(input_ids=tokens, use_cache=False)
    restore(model)
    return matcher


def scale_heads(
    model: Any, starts: Sequence[float | Tensor], learned: bool = True
) -> list[HeadScale]:
    """Each head of each layer learns a factor of its scale, or has it for good."""
    heads, scales = model.config.num_attention_heads, []
    for layer, start in zip(model.model.layers, starts, strict=True):
        queries = layer.self_attn.q_proj
        scale = HeadScale(heads, start, device=queries.weight.device)
        parametrize.register_parametrization(queries, "weight", scale)
        if learned:
            scales.append(scale)
        else:
            parametrize.remove_parametrizations(queries, "weight")
    return scales


def real_source() -> Source:
    from real_model import load_model

    _, tokenizer = load_model("cpu")
    return Source(
        lambda: load_model("cpu")[0],
        lambda text: tokenizer(text, return_tensors="pt").input_ids[0],
    )


def keep_all_but_attention(model: Any) -> None:
    """Weights that are no part of attention, nor of the norms before it, stay as they are."""
    model.requires_grad_(False)
    for layer in model.model.layers:
        for part in (layer.input_layernorm, layer.self_attn):
            part.requires_grad_(True)


def pressed(scales: Sequence[HeadScale], pressure: float, empty: Tensor | None = None) -> Tensor:
    """What is added to the loss so that heads keep fewer keys, the more so where some of their
    tiles, by ``empty``, are empty and some are not."""
    logarithms = torch.cat([scale.log_factor for scale in scales])
    if empty is None:
        return -pressure * logarithms.mean()
    weights = empty * (1 - empty)
    return -pressure * (weights * logarithms).sum() / weights.sum().clamp_min(1e-6)


def logits_of(run: Callable[..., Any]) -> Logits:
    def logits(tokens: Tensor) -> Tensor:
        found: Tensor = run(input_ids=tokens, use_cache=False).logits
        return found

    return logits


def outputs_of(run: Callable[..., Any], tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Logits, and what each layer gives: ``(layers, batch, context, features)``."""
    found = run(input_ids=tokens, use_cache=False, output_hidden_states=True)
    return found.logits, torch.stack(found.hidden_states[1:])


def distance_to(
    run: Callable[..., Any], weight: float, tokens: Tensor, told: Tensor
) -> tuple[Tensor, Tensor]:
    """Logits, and ``weight`` times the distance of what layers give to what was ``told``."""
    logits, given = outputs_of(run, tokens)
    told = told.float()
    squares = (given.float() - told).square().sum(dim=-1) / told.square().sum(dim=-1)
    return logits, weight * squares.mean()


def teacher_of(model: Any, contender: Contender) -> Callable[[Tensor], tuple[Tensor, ...]]:
    if contender.nearness:
        return partial(outputs_of, model)
    logits = logits_of(model)
    return lambda tokens: (logits(tokens),)


def weights_of(program: Program, name: str, rate: float) -> Path:
    """Those that a contender ended with."""
    return record(program, name, rate).with_suffix(".weights.pt")


def main(arguments: list[str] | None = None) -> int:
    program = parse("from_softmax", __doc__, SIZES, CONTENDERS, arguments)
    options, scale = program.options, program.scale
    for place, name in enumerate(options.contenders):
        before = CONTENDERS[name].after
        if before is not None and before not in options.contenders[:place]:
            program.parser.error(
                f"argument --contenders: {name!r} goes on from where {before!r} ends: name that "
                "before it"
            )
    source = tiny_source() if options.size == "tiny" else real_source()
    corpus = Corpus(program, *(source.encode(text) for text in texts(options.text)))

    def softmax(weights: Path | None) -> Any:
        """SDPA's kernels. Where transformers calls them itself it makes a mask while a graph is
        captured, with which none of the fast ones is taken."""
        model = source.load().to(options.device).train()
        if weights is not None:
            held = torch.load(weights, map_location=options.device, weights_only=True)
            model.load_state_dict(held)
        apply(model, alpha=1.0, packed=False)
        return model

    teaching = {CONTENDERS[name].after for name in options.contenders} - {None}
    for name in teaching:
        for rate in scale.rates:
            if not weights_of(program, name, rate).exists():  # trained again, to be there
                record(program, name, rate).unlink(missing_ok=True)

    def ready(name: str, rate: float) -> Ready:
        contender = CONTENDERS[name]
        monitor = AttentionMonitor()
        if contender.alpha == 1.0:
            model = softmax(None)
            run = compiled(model, options)
            kept = weights_of(program, name, rate) if name in teaching else None
            return Ready(model, logits_of(run), None, monitor, kept=kept)
        before = contender.after and weights_of(program, contender.after, rate)
        model, schedule, scales, empty = softmax(before), None, [], None
        layers = range(len(model.model.layers))
        teacher = teacher_of(copy.deepcopy(model), contender) if contender.taught else None
        if contender.start == "matched":
            unseen = corpus.draw(1, options.seed, scale.steps)  # no step's
            matcher = matched(model, contender, unseen[:, :-1].to(options.device))
            starts = [matcher.factors(layer) for layer in layers]
            scales = scale_heads(model, starts, contender.learned)
            if contender.tile_value:
                shares = [matcher.empty_tiles(layer) for layer in layers]
                empty = torch.cat(shares).to(options.device, torch.float32)
        elif contender.start is not None:
            scales = scale_heads(model, [contender.start for _ in layers], contender.learned)
        if contender.attention_only:
            keep_all_but_attention(model)
        set_alpha = alpha_setter(model, observer=monitor, packed=False)
        set_alpha(contender.alpha)
        if contender.rise:
            rise = max(1, round(contender.rise * scale.steps))
            schedule = AlphaSchedule(set_alpha, rise, contender.alpha)

        run = compiled(model, options)
        return Ready(
            model,
            logits_of(run),
            schedule,
            monitor,
            teacher=teacher,
            taught=contender.taught,
            distance=(
                partial(distance_to, run, contender.nearness) if contender.nearness else None
            ),
            faster=contender.faster,
            penalty=(
                partial(pressed, scales, contender.pressure, empty) if contender.pressure else None
            ),
        )

    return compete(program, corpus, ready)


if __name__ == "__main__":
    raise SystemExit(main())
