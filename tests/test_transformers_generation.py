"""Generation of models of transformers with our attention, in every way that they know.

A way of generating is held to the same way with eager attention whose softmax is the package
entmax's; and where it must not change the tokens, to plain recomputing without a cache.
"""

from __future__ import annotations

from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from torch import Tensor

from adasplash2.integrations import transformers as integration

transformers = pytest.importorskip("transformers")
from architectures import (  # noqa: E402
    DECODER,
    GPT_OSS,
    LLAMA4,
    OLD,
    SEQ2SEQ,
    T5,
    TOKENS,
    entmax_for_softmax,
    make,
    weigh,
)

MODELS = {
    "Llama": DECODER,
    "Mistral": {**DECODER, "sliding_window": 5},
    "Gemma3Text": {**DECODER, "sliding_window": 5},
    "GptOss": {**DECODER, **GPT_OSS, "sliding_window": 5},
    "Llama4Text": {**DECODER, **LLAMA4},
}
LEFT = torch.ones_like(TOKENS)
LEFT[0, :4] = 0


def model_of(config: str) -> Any:
    """Sharp, with our attention."""
    model = make(config.removesuffix("Text") + "ForCausalLM", config, MODELS[config])
    weigh(model, integration.apply(model).ours, 2.0)
    return model


def generated(model: Any, tokens: Tensor, mask: Tensor | None = None, **how: Any) -> Tensor:
    mask = torch.ones_like(tokens) if mask is None else mask
    how = {"max_new_tokens": 8, "do_sample": False, **how}
    out: Tensor = model.generate(tokens, attention_mask=mask, eos_token_id=-1, **how)
    return out


def by_eager(model: Any, tokens: Tensor, mask: Tensor | None = None, **how: Any) -> Tensor:
    integration.restore(model)
    with entmax_for_softmax(model) as replaced:
        out = generated(model, tokens, mask, **how)
    assert replaced.zeros > 0
    return out


def skip_what_transformers_cannot(config: str, way: str) -> None:
    """With any attention."""
    if "static" in way and config == "Llama4Text" and not OLD:
        pytest.skip("transformers makes no chunked masks for static caches")
    if way == "offloaded, static" and config in ("Mistral", "Gemma3Text", "Llama4Text"):
        pytest.skip("transformers offloads no static cache of which each layer has a window")
    if "static" in way and OLD and ("chunks" in way or "turns" in way):
        pytest.skip("static caches of this release take several tokens at the beginning only")


STATIC = {"cache_implementation": "static", "disable_compile": True}
GREEDY: dict[str, dict[str, Any]] = {
    "dynamic": {},
    "static": STATIC,
    "chunks": {"prefill_chunk_size": 5},
    "chunks, static": {"prefill_chunk_size": 5, **STATIC},
    "offloaded": {"cache_implementation": "offloaded"},
    "offloaded, static": {"cache_implementation": "offloaded_static", "disable_compile": True},
    "prompt lookup": {"prompt_lookup_num_tokens": 3},
    "assisted": {},
}


@pytest.mark.parametrize("config", MODELS)
@pytest.mark.parametrize("way", GREEDY)
def test_greedy_ways_give_the_same_tokens(
    monkeypatch: pytest.MonkeyPatch, config: str, way: str
) -> None:
    skip_what_transformers_cannot(config, way)
    if "offloaded" in way:  # for which transformers asks CUDA, also on a CPU: in order is no stream
        monkeypatch.setattr(torch, "Stream", MagicMock)
        monkeypatch.setattr(torch.cuda, "default_stream", MagicMock())
    model, how = model_of(config), dict(GREEDY[way])
    prompt, mask = TOKENS, LEFT
    if way in ("prompt lookup", "assisted"):  # of one sequence
        prompt, mask = torch.cat([TOKENS[:1, :8], TOKENS[:1, :4]], dim=1), None
    if way == "assisted":
        how["assistant_model"] = make(
            "LlamaForCausalLM", "Llama", {**DECODER, "num_hidden_layers": 1}
        )
        integration.apply(how["assistant_model"])
    found = generated(model, prompt, mask, **how)
    if OLD and way == "chunks":  # where this release changes tokens
        assert found.equal(by_eager(model, prompt, mask, **how))
    else:
        assert found.equal(generated(model, prompt, mask, use_cache=False))
        assert found.equal(by_eager(model, prompt, mask, use_cache=False))


@pytest.mark.parametrize("config", MODELS)
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_beams_equal_those_of_eager(config: str, cache: str) -> None:
    skip_what_transformers_cannot(config, cache)
    how: dict[str, Any] = {"num_beams": 3, "num_return_sequences": 2}
    if cache == "static":
        how |= STATIC
    model = model_of(config)
    found = generated(model, TOKENS, LEFT, **how)
    assert found.shape[0] == 4
    assert found.equal(by_eager(model, TOKENS, LEFT, num_beams=3, num_return_sequences=2))


@pytest.mark.parametrize("config", MODELS)
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_a_second_turn_equals_the_whole(config: str, cache: str) -> None:
    """The cache of a first answer goes on with the next question."""
    skip_what_transformers_cannot(config, cache + " turns")
    model = model_of(config)
    kept = transformers.DynamicCache(config=model.config)
    if cache == "static":
        kept = transformers.StaticCache(config=model.config, max_cache_len=64)
    prompt = TOKENS[:1]
    for turn in range(3):
        found = generated(model, prompt, past_key_values=kept)
        assert found.equal(generated(model, prompt, use_cache=False)), f"turn {turn}"
        prompt = torch.cat([found, TOKENS[1:, : 3 + turn]], dim=1)


@pytest.mark.parametrize("config", ["T5", "Bart"])
def test_beams_of_encoder_decoders_equal_eager(config: str) -> None:
    if OLD and config == "T5":
        pytest.skip("T5 computes its attention itself here")
    arguments = T5 if config == "T5" else SEQ2SEQ
    model = make(config + "ForConditionalGeneration", config, arguments)
    weigh(model, integration.apply(model).ours, 1.0)
    right = LEFT.flip(1)
    found = generated(model, TOKENS, right, num_beams=3)
    assert found.equal(by_eager(model, TOKENS, right, num_beams=3))


@pytest.mark.parametrize("config", ["Llama", "Gemma3Text"])
def test_sampling_draws_what_eager_draws(config: str) -> None:
    model = model_of(config)
    how = {"do_sample": True, "top_k": 20, "temperature": 0.7}
    torch.manual_seed(5)
    found = generated(model, TOKENS, LEFT, **how)
    torch.manual_seed(5)
    assert found.equal(by_eager(model, TOKENS, LEFT, **how))


@pytest.mark.parametrize("config", ["Llama", "Gemma3Text"])
def test_generation_compiles(config: str) -> None:
    """As ``generate`` compiles a model with a static cache on a GPU."""
    model = model_of(config)
    expected = generated(model, TOKENS, LEFT)
    compiled = transformers.CompileConfig(fullgraph=True, backend="aot_eager", mode=None)
    compiled._compile_all_devices = True
    graphs = torch._dynamo.utils.counters["stats"]
    torch._dynamo.reset()
    graphs.clear()
    how = {"cache_implementation": "static", "compile_config": compiled}
    assert generated(model, TOKENS, LEFT, **how).equal(expected)
    assert graphs["unique_graphs"] >= 1


@pytest.mark.gpu
@pytest.mark.parametrize("config", ["Llama", "Gemma3Text", "GptOss"])
@pytest.mark.parametrize("cache", ["dynamic", "static", "compiled", "offloaded"])
def test_greedy_on_a_gpu(monkeypatch: pytest.MonkeyPatch, config: str, cache: str) -> None:
    """Where ``generate`` compiles by itself, and offloads."""
    if cache == "offloaded":
        # The stream on which transformers brings keys back waits for none of the copies that took
        # them away: on a GPU that lags behind the host it reads what is not there yet, with any
        # attention. One stream has them in order.
        monkeypatch.setattr(torch, "Stream", torch.cuda.default_stream)
    # Floats that differ from those of a model before are symbols, which no CUDA graph takes.
    torch._dynamo.reset()
    model, prompt, mask = model_of(config).to("cuda"), TOKENS.to("cuda"), LEFT.to("cuda")
    how: dict[str, Any] = {"cache_implementation": cache}
    if cache == "static":
        how = STATIC
    elif cache == "compiled":
        how = {"cache_implementation": "static"}
    found = generated(model, prompt, mask, **how)
    assert found.equal(by_eager(model, prompt, mask, use_cache=False))
