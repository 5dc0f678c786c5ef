"""A small GPT of bytes from random start, with softmax and with entmax in many ways.

Where no contender is named, these are softmax, and entmax with normalised queries and keys
(QK-norm), which won. Text: the State of the Union speeches, of which the last ten years are held
out. Each contender trains with each learning rate on the same batches; the best one counts. Prints
a table and writes results.json and a picture: held-out loss at equal steps and at equal time, loss
by position, keys kept by layer. A run that was stopped goes on from where it was, and one that is
done is not done again.
"""

from __future__ import annotations

from dataclasses import dataclass

from text_models import Corpus, Ready, Scale, bytes_of, compete, parse, texts
from training import Decoder, Recipe, Size, compiled, schedule_of

from adasplash2.nn import AttentionMonitor

BYTES = 256

CONTENDERS = {
    "softmax": Recipe(alpha=1.0, positions="rope"),
    "qk-norm": Recipe(positions="rope", qk_norm=True),
    "entmax": Recipe(positions="rope"),
    "half scale": Recipe(positions="rope", scale=0.5),
    "quarter scale": Recipe(positions="rope", scale=0.25),
    "eighth scale": Recipe(positions="rope", scale=0.125),
    "learned scale": Recipe(positions="rope", learn_scale=True),
    "quarter scale, learned": Recipe(positions="rope", scale=0.25, learn_scale=True),
    "length scale": Recipe(positions="rope", length_scale=True),
    "alpha 1.25": Recipe(alpha=1.25, positions="rope"),
    "alpha 1.25, half scale": Recipe(alpha=1.25, positions="rope", scale=0.5),
    "alpha from 1": Recipe(positions="rope", rise=0.5),
    "alpha from 1, half scale": Recipe(positions="rope", scale=0.5, rise=0.5),
    "alpha from 1, qk-norm": Recipe(positions="rope", qk_norm=True, rise=0.5),
    "learned alpha": Recipe(alpha="learn", positions="rope"),
    "learned alpha, qk-norm": Recipe(alpha="learn", positions="rope", qk_norm=True),
    "qk-norm, learned scale": Recipe(positions="rope", qk_norm=True, learn_scale=True),
    "nape": Recipe(),
    "nape, half scale": Recipe(scale=0.5),
    "softmax, qk-norm": Recipe(alpha=1.0, positions="rope", qk_norm=True),
    "nape, qk-norm": Recipe(qk_norm=True),
    "nape, learned alpha, qk-norm": Recipe(alpha="learn", qk_norm=True),
    "softmax, nape": Recipe(alpha=1.0),
    "softmax, nape, qk-norm": Recipe(alpha=1.0, qk_norm=True),
}


@dataclass(frozen=True)
class Decoders(Scale):
    """A scale with the model's size."""

    layers: int
    heads: int
    features: int


SIZES = {
    "tiny": Decoders(128, 2, 20, (3e-3,), 2, layers=2, heads=2, features=32),
    "small": Decoders(512, 4, 400, (2e-3, 1e-3), 8, layers=4, heads=4, features=128),
    "real": Decoders(8192, 4, 2000, (1e-3, 6e-4, 3e-4), 8, layers=12, heads=12, features=768),
}


def main(arguments: list[str] | None = None) -> int:
    program = parse("train_lm", __doc__, SIZES, CONTENDERS, arguments)
    options, scale = program.options, program.scale
    assert isinstance(scale, Decoders)
    corpus = Corpus(program, *(bytes_of(text) for text in texts(options.text)))

    def ready(name: str, rate: float) -> Ready:
        recipe = CONTENDERS[name]
        size = Size(BYTES, scale.layers, scale.heads, scale.features)
        model = Decoder(size, recipe).to(options.device)
        monitor = AttentionMonitor()
        monitor.watch(model)
        run = compiled(model, options)
        return Ready(model, run, schedule_of(model, recipe, scale.steps), monitor)

    return compete(program, corpus, ready)


if __name__ == "__main__":
    raise SystemExit(main())
