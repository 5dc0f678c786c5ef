"""A softmax model continued with entmax: SmolLM2-135M on State of the Union speeches.

alpha is 1.5 from the first step on. Each head learns a factor of its scale, and starts with one
that brings its output near to softmax's. Beside it the same model takes the same steps with
softmax. The speeches of the last ten years are held out.
Prints a table and writes results.json and a picture: held-out loss before, during and after, at
equal steps and at equal time, loss by position, keys kept by layer. A run that was stopped goes on
from where it was, and one that is done is not done again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import torch
from text_models import Corpus, Ready, Scale, bytes_of, compete, parse, texts
from torch import Tensor
from torch.nn.utils import parametrize
from training import autocast, compiled

from adasplash2.integrations.transformers import apply, restore
from adasplash2.integrations.transformers.schedule import alpha_setter
from adasplash2.nn import AlphaSchedule, AttentionMonitor, HeadScale, ScaleMatcher


class Contender(NamedTuple):
    """``rise``: the share of the steps in which alpha rises from 1; 0 begins with it. ``start``:
    where each head's learned factor of the scale starts; "matched": where its output is near to
    softmax's, by ``tolerance``; None leaves the scale as it is."""

    alpha: float
    rise: float = 0.0
    start: float | Literal["matched"] | None = None
    tolerance: float = 0.0


CONTENDERS = {
    "softmax": Contender(1.0),
    "entmax": Contender(1.5, start="matched", tolerance=0.05),
    "nearest": Contender(1.5, start="matched"),
    "sparser": Contender(1.5, start="matched", tolerance=0.15),
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

    config = LlamaConfig(
        vocab_size=256, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8,
    )  # fmt: skip
    return Source(lambda: LlamaForCausalLM(config), bytes_of)


def matched(model: Any, contender: Contender, tokens: Tensor) -> list[Tensor]:
    """Of each layer, the factors with which its heads' outputs are near to softmax's."""
    matcher = ScaleMatcher(contender.alpha, contender.tolerance)
    apply(model, 1.0, observer=matcher)
    with torch.no_grad(), autocast(tokens.device.type):
        model(input_ids=tokens, use_cache=False)
    restore(model)
    return [matcher.factors(layer) for layer in range(len(model.model.layers))]


def scale_heads(model: Any, starts: Sequence[float | Tensor]) -> None:
    """Each head of each layer learns a factor of its scale."""
    heads = model.config.num_attention_heads
    for layer, start in zip(model.model.layers, starts, strict=True):
        queries = layer.self_attn.q_proj
        scale = HeadScale(heads, start, device=queries.weight.device)
        parametrize.register_parametrization(queries, "weight", scale)


def real_source() -> Source:
    from real_model import load_model

    _, tokenizer = load_model("cpu")
    return Source(
        lambda: load_model("cpu")[0],
        lambda text: tokenizer(text, return_tensors="pt").input_ids[0],
    )


def main(arguments: list[str] | None = None) -> int:
    program = parse("from_softmax", __doc__, SIZES, CONTENDERS, arguments)
    options, scale = program.options, program.scale
    source = tiny_source() if options.size == "tiny" else real_source()
    corpus = Corpus(program, *(source.encode(text) for text in texts(options.text)))

    def ready(name: str) -> Ready:
        contender, device = CONTENDERS[name], options.device
        model = source.load().to(device).train()
        monitor = AttentionMonitor()
        schedule = None
        if contender.alpha == 1.0:
            # SDPA's kernels. Where transformers calls them itself it makes a mask while a graph is
            # captured, with which none of the fast ones is taken.
            apply(model, alpha=1.0, packed=False)
        else:
            if contender.start == "matched":
                unseen = corpus.draw(1, options.seed, scale.steps)  # no step's
                scale_heads(model, matched(model, contender, unseen[:, :-1].to(device)))
            elif contender.start is not None:
                scale_heads(model, [contender.start] * len(model.model.layers))
            set_alpha = alpha_setter(model, observer=monitor, packed=False)
            set_alpha(contender.alpha)
            if contender.rise:
                rise = max(1, round(contender.rise * scale.steps))
                schedule = AlphaSchedule(set_alpha, rise, contender.alpha)
        run = compiled(model, options)

        def logits(tokens: Tensor) -> Tensor:
            found: Tensor = run(input_ids=tokens, use_cache=False).logits
            return found

        return Ready(model, logits, schedule, monitor)

    return compete(program, corpus, ready)


if __name__ == "__main__":
    raise SystemExit(main())
