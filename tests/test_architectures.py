"""Every kind of model of transformers equals its own attention, or is refused; see the program."""

from __future__ import annotations

import pytest

pytest.importorskip("transformers")
from architectures import ARCHITECTURES, Architecture, examine, transformers


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=lambda architecture: architecture.name)
def test_a_model_equals_eager_or_is_refused(architecture: Architecture) -> None:
    if not hasattr(transformers, architecture.model):
        pytest.skip(f"transformers {transformers.__version__} has no {architecture.model}")
    outcome = examine(architecture)
    assert outcome.checks or outcome.refusal


ON_GPU = (
    "Llama", "Mistral", "Gemma2", "GptOss", "Llama4", "Bert", "ModernBert", "T5", "Whisper", "ViT",
    "Qwen3Moe",
)  # fmt: skip
"""Whose parts differ: one with plain heads, windows, caps, sinks, chunks, biases, images, sound."""


@pytest.mark.gpu
@pytest.mark.parametrize("name", ON_GPU)
def test_a_model_equals_eager_on_a_gpu(name: str) -> None:
    found = next(a for a in ARCHITECTURES if a.config.removesuffix("Text") == name)
    assert examine(found, "cuda").checks


def test_there_are_forty() -> None:
    assert len({architecture.model for architecture in ARCHITECTURES}) >= 40
