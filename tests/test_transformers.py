"""Our attention in models of transformers: equal to the model's own in all that models ask.

Runs with the newest and with the oldest release that pyproject.toml allows, see the Makefile;
``test_architectures.py`` goes through all kinds of models.
Models are tiny and random. With alpha = 1 ours is softmax, so a model's eager attention is the
reference for everything but the numbers of entmax, which other files hold.
"""

from __future__ import annotations

import copy
import inspect
import pickle
import re
import subprocess
import sys
import tomllib
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd

import adasplash2
from adasplash2.integrations import transformers as integration

transformers = pytest.importorskip("transformers")
from architectures import (  # noqa: E402
    BIG_BIRD,
    DECODER,
    ENCODER,
    GPT,
    GPT_NEO,
    GPT_OSS,
    LLAMA4,
    LOCAL,
    OLD,
    PAIR,
    SEQ2SEQ,
    SHORTER,
    T5,
    TEXT,
    TOKENS,
    VISION,
    make,
    run,
    weigh,
    window,
)

from adasplash2.integrations.transformers import alphas as alphas_of  # noqa: E402
from adasplash2.integrations.transformers import attention, masks  # noqa: E402

ROOT = Path(__file__).parent.parent

PACKED = torch.cat([torch.arange(5), torch.arange(7)]).repeat(2, 1)


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """Layers that are not ours cost a warning, which one test is about."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"(?s).*attention layers run")
        yield


def llama(implementation: str = "eager", **arguments: Any) -> Any:
    return make("LlamaForCausalLM", "Llama", {**DECODER, **arguments}, implementation)


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("model", ["BloomForCausalLM", "GPTJForCausalLM", "GPTNeoForCausalLM"])
@pytest.mark.parametrize("padded", [False, True])
def test_models_that_never_ask_keep_their_masks(model: str, padded: bool) -> None:
    """Set by its config, a model may take our masks and compute attention itself."""
    arguments = {**DECODER, **GPT, "rotary_dim": 8}
    if model.startswith("GPTNeo"):
        arguments = GPT_NEO
    padding = torch.ones_like(TOKENS)
    padding[0, :3] = 0 if padded else 1
    integration.register("adasplash2-forced")
    config = model.removesuffix("ForCausalLM")
    expected = run(make(model, config, arguments), **TEXT, attention_mask=padding)
    ours = make(model, config, arguments)
    ours.config._attn_implementation_internal = "adasplash2-forced"
    close(run(ours, **TEXT, attention_mask=padding), expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"backend": "zz"}, "backend must be None or one of"),
        ({"backend": 3}, "backend must be the name"),
        ({"name": 1.5}, "name must be a text"),
        ({"observer": 3}, "observer must be a function"),
    ],
)
def test_what_is_registered_is_checked_at_once(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        integration.register(**arguments)


def test_apply_tells_which_layers_are_ours() -> None:
    model = make("BigBirdPegasusModel", "BigBirdPegasus", BIG_BIRD)
    with pytest.warns(UserWarning, match="4 of 6 attention layers run"):
        found = integration.apply(model)
    assert set(found.ours) == {
        f"decoder.layers.{i}.{kind}" for i in (0, 1) for kind in ("self_attn", "encoder_attn")
    }
    assert all("in its own code" in why for why in found.others.values())
    assert len(found.others) == 2
    assert "not encoder.layers.0.self_attn" in str(found)

    found = integration.apply(llama(), example=TEXT)
    assert found.ours == ("model.layers.0.self_attn", "model.layers.1.self_attn")
    assert not found.others


def test_apply_counts_what_ran_in_an_example() -> None:
    """The decoder's cross attention asks for ours but has nothing to attend to."""
    model = make("BartForCausalLM", "Bart", SEQ2SEQ)
    found = integration.apply(model, example=TEXT)
    assert [layer.rsplit(".")[-1] for layer in found.ours] == ["self_attn"] * 2
    assert all("example" in why for why in found.others.values())
    assert len(found.others) == 2


def test_apply_reaches_the_parts_of_a_model() -> None:
    text, vision = {**ENCODER, "projection_dim": 16}, {**VISION, "projection_dim": 16}
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)
    config._attn_implementation = "eager"
    model = transformers.CLIPModel(config).eval()
    found = integration.apply(model, alpha=1.0)
    assert {layer.split(".")[0] for layer in found.ours} == {"text_model", "vision_model"}
    assert len(found.ours) == 4


def test_models_do_not_change_each_other() -> None:
    sparse, soft = llama(), llama()
    integration.apply(sparse, alpha=2.0)
    expected = run(sparse, **TEXT)
    integration.apply(soft, alpha=1.0)
    close(run(sparse, **TEXT), expected)
    assert (run(soft, **TEXT) - expected).abs().max() > 1e-4


def test_heads_that_are_too_wide_are_refused_at_once() -> None:
    model = make("LlamaForCausalLM", "Llama", {**DECODER, "head_dim": 264})
    with pytest.raises(ValueError, match=r"head_dim must be at most 256, got 264 in model\.layers"):
        integration.apply(model)
    assert model.config._attn_implementation == "eager"


def test_apply_wants_a_model() -> None:
    with pytest.raises(TypeError, match="model must be a transformers PreTrainedModel, got Linear"):
        integration.apply(nn.Linear(2, 2))


@pytest.mark.parametrize("name", ["", "eager", "sdpa", "my_flash", "a|b", "a/b"])
def test_names_of_transformers_are_not_taken(name: str) -> None:
    with pytest.raises(ValueError, match="name must not be"):
        integration.register(name)


def test_alpha_is_refused_when_it_is_registered() -> None:
    with pytest.raises(ValueError, match=r"alpha must be .*at least 1.*0\.5"):
        integration.register("adasplash2-bad", alpha=0.5)


@pytest.mark.parametrize("call", ["register", "apply"])
def test_backend_arrives(call: str) -> None:
    """One that does not take tensors of the CPU."""
    model = llama()
    if call == "register":
        integration.register("adasplash2-elsewhere", backend="cuda")
        model.set_attn_implementation("adasplash2-elsewhere")
    else:
        integration.apply(model, backend="cuda")
    with pytest.raises(adasplash2.BackendRefused, match="backend 'cuda' cannot run"):
        run(model, **TEXT)


# alpha of each head

LAYERS = ("model.layers.0.self_attn", "model.layers.1.self_attn")


def alphas(model: Any) -> list[Any]:
    return [layer.self_attn.adasplash2 for layer in model.base_model.layers]


def test_learned_alphas_are_seen_by_an_optimizer_and_stay_inside() -> None:
    model = llama()
    integration.apply(model, alpha=1.5)
    expected = run(model, **TEXT)
    found = integration.apply(model, alpha=1.5, learn=True)
    assert found.name == "adasplash2-learned"
    close(run(model, **TEXT), expected)
    logits = [held.logit for held in alphas(model)]
    assert all(any(logit is p for p in model.parameters()) for logit in logits)
    optimizer = torch.optim.SGD(logits, lr=1e6)
    for _ in range(2):
        optimizer.zero_grad()
        model(TOKENS, labels=TOKENS).loss.backward()
        optimizer.step()
    for held in alphas(model):
        assert held().shape == (4,)
        assert ((held() > 1) & (held() < 2)).all()
        assert (held() != 1.5).all()
    assert run(model, **TEXT).isfinite().all()


COPIES = {"copied": copy.deepcopy, "pickled": lambda model: pickle.loads(pickle.dumps(model))}


@pytest.mark.parametrize(
    "how",
    ["number", "by head", "by head, pickled", "learned", "learned, copied", "learned, pickled"],
)
def test_alpha_comes_back_with_the_model(how: str, tmp_path: Path) -> None:
    model = llama()
    by_head = dict(zip(LAYERS, ([1.2, 1.5, 1.7, 1.9], [1.2, 1.5, 1.7, 1.4]), strict=True))
    if how == "number":
        integration.apply(model, alpha=1.3)
    else:
        integration.apply(model, alpha=by_head, learn="learned" in how)
    copied = how.partition(", ")[2]
    if copied:
        model = COPIES[copied](model)
    if "learned" in how:
        with torch.no_grad():
            alphas(model)[0].logit += torch.tensor([-50.0, 0.1, 3.0, 50.0])
    expected = run(model, **TEXT)
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    integration.apply(loaded)
    assert ("learned" in how) == any("adasplash2" in name for name, _ in loaded.named_parameters())
    torch.testing.assert_close(run(loaded, **TEXT), expected, rtol=1e-6, atol=1e-6)
    loaded.load_state_dict(model.state_dict())
    assert run(loaded, **TEXT).equal(expected)


def logits_moved(model: Any) -> list[list[float]]:
    """The numbers after a step of training."""
    with torch.no_grad():
        for held in alphas(model):
            held.logit += torch.tensor([-1.0, 0.1, 2.0, 0.0])
    return [held.numbers() for held in alphas(model)]


@pytest.mark.parametrize("positional", [False, True])
def test_learned_alphas_are_saved_as_the_state_dict_has_them(
    positional: bool, tmp_path: Path
) -> None:
    """As whoever saves an average of the weights, or gathers shards, passes it."""
    model = llama()
    integration.apply(model, alpha=1.3, learn=True)
    before = [held.numbers() for held in alphas(model)]
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    logits_moved(model)
    if positional:
        model.save_pretrained(tmp_path, True, state)
    else:
        model.save_pretrained(tmp_path, state_dict=state)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    integration.apply(loaded)
    assert [held.numbers() for held in alphas(loaded)] == before


@pytest.mark.parametrize("applied", ["whole", "part"])
@pytest.mark.parametrize("saved", ["whole", "part"])
@pytest.mark.parametrize("loaded", ["AutoModelForCausalLM", "AutoModel"])
def test_learned_alphas_are_those_of_the_weights(
    applied: str, saved: str, loaded: str, tmp_path: Path
) -> None:
    """Whichever level of a model is set and saved, and whichever class reads it."""
    model = llama()
    levels = {"whole": model, "part": model.model}
    integration.apply(levels[applied], alpha=1.3, learn=True)
    moved = logits_moved(model)
    levels[saved].save_pretrained(tmp_path)
    again = getattr(transformers, loaded).from_pretrained(tmp_path)
    integration.apply(again)
    assert [held.numbers() for held in alphas(again)] == moved


def test_learned_alphas_of_a_part_with_its_own_config(tmp_path: Path) -> None:
    text, vision = transformers.LlamaConfig(**DECODER), transformers.CLIPVisionConfig(**VISION)
    config = transformers.LlavaConfig(vision_config=vision, text_config=text)
    model = transformers.LlavaForConditionalGeneration(config)
    integration.apply(model.model.language_model, alpha=1.3, learn=True)
    layers = [m for m in model.modules() if isinstance(m, alphas_of.HeadAlphas)]
    with torch.no_grad():
        for held in layers:
            held.logit += torch.tensor(1.0)
    before = copy.deepcopy(text.adasplash2)
    model.save_pretrained(tmp_path)
    assert text.adasplash2 == before  # what is written is not what is kept
    again = transformers.LlavaForConditionalGeneration.from_pretrained(tmp_path)
    assert not hasattr(again.config, "adasplash2")  # nothing was asked of the whole
    integration.apply(again.model.language_model)
    found = [m for m in again.modules() if isinstance(m, alphas_of.HeadAlphas)]
    assert [m.numbers() for m in found] == [m.numbers() for m in layers]
    assert found


def test_learned_alphas_are_saved_by_a_process_that_loads(tmp_path: Path) -> None:
    """And does nothing else; and where somebody took a change of save_pretrained back."""
    model = llama()
    integration.apply(model, alpha=1.3, learn=True)
    moved = logits_moved(model)
    torch.save(model, tmp_path / "model.pt")
    program = (
        "import sys, torch; model = torch.load(sys.argv[1] + '/model.pt', weights_only=False); "
        "model.save_pretrained(sys.argv[1])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], capture_output=True, check=False
    )
    assert done.returncode == 0, done.stderr.decode()
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    integration.apply(loaded)
    assert [held.numbers() for held in alphas(loaded)] == moved
    theirs = inspect.unwrap(transformers.PreTrainedModel.save_pretrained)
    with mock.patch.object(transformers.PreTrainedModel, "save_pretrained", theirs):
        integration.apply(model, learn=True)
        moved = logits_moved(model)
        model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    integration.apply(loaded)
    assert [held.numbers() for held in alphas(loaded)] == moved


def test_alphas_of_other_layers_are_refused(tmp_path: Path) -> None:
    model = llama(num_hidden_layers=1)
    integration.apply(model, alpha=1.3, learn=True)
    deeper = llama()
    deeper.config.adasplash2 = model.config.adasplash2
    with pytest.raises(ValueError, match=r"holds alphas of .*layers\.0.*has not model\.layers\.1"):
        integration.apply(deeper)


def test_each_head_has_its_own_alpha() -> None:
    model = llama(num_hidden_layers=1)
    of_heads: list[Tensor] = []
    model.model.layers[0].self_attn.o_proj.register_forward_pre_hook(
        lambda module, inputs: of_heads.append(inputs[0].unflatten(-1, (4, 8)))
    )
    own = [1.2, 1.5, 1.7, 2.0]
    integration.apply(model, alpha={"model.layers.0.self_attn": own})
    model.bfloat16().float()  # the weights are rounded, alpha is not
    run(model, **TEXT)
    for head, alpha in enumerate(own):
        integration.apply(model, alpha=alpha)
        run(model, **TEXT)
        close(of_heads[0][:, :, head], of_heads[-1][:, :, head])
        assert (of_heads[0] - of_heads[-1]).abs().max() > 1e-4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"alpha": 2.5, "learn": True}, r"above 1\.01 and below 1\.99 to be learned, got 2\.5"),
        ({"alpha": 1.0, "learn": True}, r"above 1\.01 and below 1\.99 to be learned, got 1"),
        ({"alpha": {"model.layers.0.self_attn": [1.5] * 4}}, "alpha must name the layers"),
        (
            {"alpha": {layer: [1.5, 1.5, 1.5, 2.5] for layer in LAYERS}},
            "above 1 and at most 2, got 2.5",
        ),
        (
            {"alpha": {layer: [1.5] * 3 for layer in LAYERS}},
            "one number for each of 4 heads, got 3",
        ),
        ({"alpha": "learn"}, "alpha must be a real number"),
        ({"learn": 2}, "learn must be True or False"),
        ({"alpha": dict.fromkeys(LAYERS, 1.5)}, "must be a sequence of numbers, got 1.5"),
        ({"alpha": {3: [1.5], "x": [1.5]}}, "alpha must name the layers"),
        ({"observer": 3}, "observer must be a function or None, got 3"),
        ({"example": 3}, "example must be a mapping of arguments, got 3"),
    ],
)
def test_alphas_that_do_not_fit_change_nothing(arguments: dict[str, Any], message: str) -> None:
    model = llama()
    expected = run(model, **TEXT)
    with pytest.raises((TypeError, ValueError), match=message):
        integration.apply(model, **arguments)
    assert run(model, **TEXT).equal(expected)
    assert "adasplash2" not in repr(model) + repr(model.config)


@pytest.mark.parametrize("model", [llama(), make("T5Model", "T5", T5)], ids=["Llama", "T5"])
def test_a_model_gets_back_what_it_had(model: Any) -> None:
    if OLD and isinstance(model, transformers.T5Model):
        pytest.skip("T5 computes its attention itself here")
    inputs = PAIR if isinstance(model, transformers.T5Model) else TEXT
    expected, before = run(model, **inputs), (repr(model), repr(model.config))
    integration.apply(model, alpha=1.9)
    integration.apply(model, learn=True)
    assert not run(model, **inputs).equal(expected)
    integration.restore(model)
    assert run(model, **inputs).equal(expected)
    assert (repr(model), repr(model.config)) == before
    with pytest.raises(ValueError, match="was not set by apply"):
        integration.restore(model)


def test_names_are_forgotten() -> None:
    model, other = llama(), llama()
    name = integration.apply(model, alpha=1.25).name
    integration.apply(other, alpha=2.0)
    integration.unregister(name)
    run(other, **TEXT)
    with pytest.raises(KeyError):
        run(model, **TEXT)
    with pytest.raises(ValueError, match="name must be registered"):
        integration.unregister(name)
    integration.restore(model)
    run(model, **TEXT)
    integration.unregister()
    with pytest.raises(KeyError):
        run(other, **TEXT)


# Modules that call our attention

QKV = torch.randn(3, 1, 2, 6, 8, generator=torch.Generator().manual_seed(0))


def attend(
    mask: Tensor | None = None, *, queries: int = 6, alpha: float = 1.5, **arguments: Any
) -> Tensor:
    """Our attention of the last ``queries`` tokens of six."""
    integration.register("adasplash2-module", alpha=alpha)
    attention = transformers.AttentionInterface()["adasplash2-module"]
    module = nn.Module()
    if "module_is_causal" in arguments:
        module.is_causal = arguments.pop("module_is_causal")
    q, k, v = QKV
    out: Tensor = attention(module, q[:, :, -queries:], k, v, mask, **arguments)[0]
    return out.transpose(1, 2)


def exact(causal: bool, **options: Any) -> Tensor:
    out: Tensor = adasplash2.entmax_attention(*QKV, alpha=1.5, is_causal=causal, **options)
    return out


@pytest.mark.parametrize("causal", [False, True])
def test_a_module_or_a_call_says_whether_it_is_causal(causal: bool) -> None:
    assert (exact(True) - exact(False)).abs().max() > 0.1
    if causal:  # eager would hide nothing, SDPA later keys
        with pytest.raises(ValueError, match="no attention_mask though it says is_causal"):
            attend(module_is_causal=True)
    else:
        close(attend(module_is_causal=False), exact(False))
    close(attend(is_causal=causal), exact(causal))
    close(attend(is_causal=causal, module_is_causal=not causal), exact(causal))


def test_who_does_not_say_it_is_refused() -> None:
    with pytest.raises(ValueError, match="neither attention_mask nor is_causal"):
        attend()
    with pytest.raises(ValueError, match=r"needs as many queries as keys.*got 3 and 6"):
        attend(queries=3, is_causal=True)
    close(attend(queries=1), exact(False)[:, :, -1:])


def triangle(rows: int = 6, keys: int = 6, start: int = 0, more: int = 0) -> Tensor:
    """Causal over ``keys`` keys, after ``start`` and before ``more`` hidden ones."""
    mask = torch.zeros(1, 1, rows, start + keys + more, dtype=torch.bool)
    mask[..., start : start + keys] = torch.ones(rows, keys).tril(keys - rows).bool()
    return mask


def additive(mask: Tensor, dtype: torch.dtype = torch.float32, low: float | None = None) -> Tensor:
    value = torch.finfo(dtype).min if low is None else low
    return torch.zeros(mask.shape, dtype=dtype).masked_fill(~mask, value)


PLAIN = [
    ("causal", triangle(), masks.Statement(True, stop=6)),
    ("all", torch.ones(1, 1, 6, 6).bool(), masks.Statement(stop=6)),
    ("one row for all", torch.ones(1, 1, 1, 6).bool(), masks.Statement(stop=6)),
    ("batch and heads", triangle().expand(3, 2, 6, 6).clone(), masks.Statement(True, stop=6)),
    ("static cache", triangle(more=4), masks.Statement(True, stop=6)),
    ("second turn", triangle(rows=2), masks.Statement(True, stop=6)),
    ("one token", triangle(rows=1, keys=4, more=2), masks.Statement(stop=4)),
    ("one token's window", triangle(rows=1, keys=4, start=2), masks.Statement(start=2, stop=6)),
]

FORMS: dict[str, Callable[[Tensor], Tensor]] = {
    "bool": lambda mask: mask,
    "lowest": lambda mask: additive(mask),
    "-inf": lambda mask: additive(mask, low=-torch.inf),
    "-1e4": lambda mask: additive(mask, low=-1e4),
    "half": lambda mask: additive(mask, torch.float16),
}


@pytest.mark.parametrize(("mask", "says"), [pytest.param(*c[1:], id=c[0]) for c in PLAIN])
@pytest.mark.parametrize("form", FORMS)
def test_plain_masks_become_words(mask: Tensor, says: masks.Statement, form: str) -> None:
    assert masks.read(FORMS[form](mask)) == says


def without(mask: Tensor, *place: int) -> Tensor:
    mask = mask.clone()
    mask[place] = ~mask[place]
    return mask


NOT_PLAIN = [
    ("another sequence", without(triangle().expand(2, 1, 6, 6), 1, 0, 5, 0)),
    ("another head", without(triangle().expand(1, 2, 6, 6), 0, 1, 5, 0)),
    ("a hole", without(triangle(), 0, 0, 5, 2)),
    ("a hole above", without(triangle(), 0, 0, 3, 2)),
    ("a look ahead", without(triangle(), 0, 0, 2, 3)),
    ("a row of nothing", without(triangle(), 0, 0, 0, 0)),
    ("nothing at all", torch.zeros(1, 1, 6, 6).bool()),
    ("a window", triangle() & ~triangle().roll(3, 2)),
    ("rows before the keys", triangle(rows=6, keys=4)),
]


@pytest.mark.parametrize("mask", [pytest.param(mask, id=name) for name, mask in NOT_PLAIN])
@pytest.mark.parametrize("form", FORMS)
def test_other_masks_stay_masks(mask: Tensor, form: str) -> None:
    """Of bools, whatever they came as; rows that see nothing are zeros."""
    statement = masks.read(FORMS[form](mask))
    assert statement.attn_mask is not None
    assert statement.attn_mask.equal(mask)
    if mask.shape == (1, 1, 6, 6):
        out = attend(FORMS[form](mask), alpha=1.0)
        scores = QKV[0] @ QKV[1].mT / 8**0.5
        p = scores.masked_fill(~mask, -torch.inf).softmax(3).nan_to_num()
        close(out, p @ QKV[2])


@pytest.mark.parametrize("traced", [False, True])
def test_biases_are_added(traced: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a gradient, beside what hides, and where numbers cannot be looked at."""
    monkeypatch.setattr(masks, "is_tracing", lambda like=None: traced)
    bias = torch.randn(1, 2, 6, 6, generator=torch.Generator().manual_seed(1)).requires_grad_()
    mask = (bias + additive(triangle())).detach()
    expected = exact(True, attn_mask=bias)
    close(attend(mask), expected)
    close(attend(additive(triangle()) + bias), expected)
    close(attend(triangle(), position_bias=bias), expected)
    close(attend(mask - bias.detach(), position_bias=bias), expected)
    close(attend(is_causal=True, position_bias=bias), expected)
    (found,) = torch.autograd.grad(attend(triangle(), position_bias=bias).square().sum(), bias)
    (right,) = torch.autograd.grad(exact(True, attn_mask=bias).square().sum(), bias)
    close(found, right)
    assert found.any()


def test_masks_of_integers_are_refused() -> None:
    with pytest.raises(ValueError, match=r"attention_mask must be of bools or floats.*int32"):
        attend(triangle().int())


def test_masks_say_more_than_flags() -> None:
    """Eager knows masks only; BigBirdPegasus' decoder is causal and its modules say it is not."""
    close(attend(triangle(), module_is_causal=False), exact(True))
    close(attend(additive(triangle()), is_causal=False), exact(True))
    close(attend(torch.ones(1, 1, 6, 6).bool(), module_is_causal=True), exact(False))
    close(attend(torch.ones(1, 1, 6, 9).bool()), exact(False))  # longer: cut, as eager cuts it
    with pytest.raises(ValueError, match=r"attention_mask must be .*6, 6.* got \(1, 6\)"):
        attend(torch.ones(1, 6).bool())
    with pytest.raises(ValueError, match=r"attention_mask must be .* got \(1, 1, 6, 5\)"):
        attend(torch.ones(1, 1, 6, 5).bool())


def test_a_mask_is_read_once_and_again_when_it_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[Tensor] = []
    read = masks.read
    monkeypatch.setattr(masks, "read", lambda mask: reads.append(mask) or read(mask))
    mask = additive(triangle())
    attend(mask)
    attend(mask)
    assert len(reads) == 1
    mask.zero_()
    close(attend(mask), exact(False))
    assert len(reads) == 2
    with torch.inference_mode():
        mask = triangle()
        close(attend(mask), exact(True))
        mask.fill_(True)
        close(attend(mask), exact(False))


@pytest.mark.parametrize("queries", [1, 2, 5])
def test_several_tokens_against_a_cache(queries: int) -> None:
    close(attend(triangle(rows=queries), queries=queries), exact(True)[:, :, -queries:])


HARMLESS = {
    "position_ids": torch.arange(6),
    "cache_position": torch.arange(6),
    "use_cache": True,
    "output_hidden_states": True,
    "max_length_q": 6,
    "deterministic": True,
    "softcap": None,
    "a_new_keyword": None,
    "another": False,
}


@pytest.mark.parametrize("name", HARMLESS)
def test_harmless_keywords_are_ignored(name: str) -> None:
    close(attend(is_causal=True, **{name: HARMLESS[name]}), exact(True))


REFUSED = {
    "head_mask": torch.ones(2),
    "block_indices": torch.zeros(1, 2, 6, 1),
    "seq_idx": torch.zeros(1, 6),
    "a_new_keyword": 0,
    "block_table": True,
}


@pytest.mark.parametrize("name", REFUSED)
def test_other_keywords_are_refused_by_name(name: str) -> None:
    with pytest.raises(ValueError, match=f"^{name} must be None"):
        attend(is_causal=True, **{name: REFUSED[name]})


def test_caps_and_sinks_are_passed_on() -> None:
    sinks = torch.tensor([0.5, -0.25], requires_grad=True)
    expected = exact(True, softcap=2.0, sinks=sinks)
    found = attend(is_causal=True, softcap=2.0, s_aux=sinks)
    close(found, expected)
    assert (found - exact(True)).abs().max() > 1e-2
    close(*(torch.autograd.grad(out.square().sum(), sinks)[0] for out in (found, expected)))


@pytest.mark.parametrize(("queries", "hidden"), [(6, 0), (6, 2), (2, 0), (1, 2)])
def test_chosen_keys(queries: int, hidden: int) -> None:
    """By number, -1 for none, beside a mask that hides the first keys and later ones."""
    mask = triangle()[:, :, -queries:]
    mask[..., :hidden] = False
    indices = torch.tensor([[2, 0, -1], [1, 3, 3], [-1, -1, -1], [5, 2, 0], [4, 0, 3], [1, 5, 2]])
    indices = indices[None, -queries:].int()
    chosen = (indices[..., None] == torch.arange(6)).any(2)
    q, k, v = QKV
    expected = adasplash2.entmax_attention(q[:, :, -queries:], k, v, attn_mask=mask & chosen)
    close(attend(mask, queries=queries, indices=indices), expected)


def test_dropout_is_drawn_from_torchs_generator() -> None:
    torch.manual_seed(3)
    found = attend(is_causal=True, dropout=0.5)
    torch.manual_seed(3)
    close(found, exact(True, dropout_p=0.5))
    assert (found - exact(True)).abs().max() > 1e-2


@pytest.mark.parametrize("size", [3, 5, 6, 9])
def test_windows_without_a_mask(size: int) -> None:
    """The size counts a query's own key, on both sides where both are seen."""
    close(attend(is_causal=True, sliding_window=size), exact(True, window=(size - 1, 0)))
    both = exact(False, window=(size - 1, size - 1))
    close(attend(is_causal=False, sliding_window=size), both)
    last = exact(True, window=(size - 1, 0))[:, :, -1:]
    close(attend(queries=1, sliding_window=size), last)


def test_masks_say_windows_too() -> None:
    """As in eager attention: what a mask shows is seen, whatever the layer's own window."""
    close(attend(triangle(), sliding_window=2), exact(True))


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("mask", [None, triangle(), without(triangle(), 0, 0, 5, 2)])
def test_packed_sequences_by_their_lengths(mask: Tensor | None, biased: bool) -> None:
    """``cu_seq_lens``, as collators make them for flash attention, beside any mask and bias."""
    ends = torch.tensor([0, 2, 6])
    number = torch.tensor([0, 0, 1, 1, 1, 1])
    seen = (triangle() if mask is None else mask) & (number == number[:, None])
    bias = torch.linspace(-1, 1, 72).sin().reshape(1, 2, 6, 6) * biased
    bias = bias.masked_fill(~seen, -torch.inf)
    packed = {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": 4, "max_length_k": 4}
    if mask is None:
        packed["is_causal"] = True
    if biased:
        packed["position_bias"] = bias
    close(attend(mask, **packed), exact(False, attn_mask=bias))
    with pytest.raises(ValueError, match="must be given together"):
        attend(mask, cu_seq_lens_k=ends)


def test_probabilities_are_none_with_a_warning() -> None:
    model = llama()
    integration.apply(model, alpha=1.0)
    expected = run(model, **TEXT)
    with pytest.warns(UserWarning, match="no attention probabilities"), torch.no_grad():
        out = model(**TEXT, output_attentions=True)
    close(out.logits, expected)
    assert not any(isinstance(p, Tensor) for p in out.attentions or ())


# Whole models


def test_entmax_trains_and_is_observed() -> None:
    seen: list[tuple[int | None, bool]] = []

    def observe(
        layer: int | None, query: Tensor, key: Tensor, value: Tensor, arguments: dict[str, Any]
    ) -> None:
        assert query.shape == (2, 4, 12, 8)
        assert key.shape == value.shape == (2, 2, 12, 8)
        stats = adasplash2.attention_stats(query, key, value, **arguments)
        assert stats.support.shape == (2, 4, 12)
        seen.append((layer, arguments["is_causal"]))

    model = llama()
    integration.apply(model, observer=observe)
    model(TOKENS, labels=TOKENS).loss.backward()
    assert seen == [(0, True), (1, True)]
    weight = model.model.layers[0].self_attn.q_proj.weight
    assert weight.grad.isfinite().all()
    assert weight.grad.any()


TRAINED = [
    ("LlamaForCausalLM", "Llama", {**DECODER, "attention_dropout": 0.1}),
    ("MistralForCausalLM", "Mistral", {**DECODER, "sliding_window": 4}),
    ("Gemma2ForCausalLM", "Gemma2", {**DECODER, "sliding_window": 4}),
    ("GptOssForCausalLM", "GptOss", {**DECODER, **GPT_OSS, "sliding_window": 4}),
    ("T5ForConditionalGeneration", "T5", T5),
]


@pytest.mark.parametrize(("model", "config", "arguments"), TRAINED)
def test_a_padded_batch_trains(model: str, config: str, arguments: dict[str, Any]) -> None:
    if OLD and config == "T5":
        pytest.skip("T5 computes its attention itself here")
    ours = make(model, config, arguments).train()
    integration.apply(ours)
    tokens = torch.ones_like(TOKENS)
    tokens[0, 9:] = 0
    loss = ours(TOKENS, attention_mask=tokens, labels=TOKENS.where(tokens.bool(), -100)).loss
    loss.backward()
    gradients = {name: p.grad for name, p in ours.named_parameters() if p.grad is not None}
    assert all(gradient.isfinite().all() for gradient in gradients.values())
    learned = [name for name in gradients if "q_proj" in name or "sinks" in name or ".q." in name]
    assert learned
    assert all(gradients[name].any() for name in learned)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_gives_the_same_gradients(use_reentrant: bool) -> None:
    def gradient(checkpointed: bool) -> Tensor:
        model = llama().train()
        integration.apply(model)
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        model(TOKENS, labels=TOKENS, use_cache=False).loss.backward()
        grad: Tensor = model.model.layers[0].self_attn.q_proj.weight.grad
        return grad

    torch.testing.assert_close(gradient(True), gradient(False), rtol=0, atol=0)


def steps(model: Any, cache: Any, turns: list[int]) -> Tensor:
    """Logits of ``TOKENS``, given in turns of so many."""
    logits, start = [], 0
    for turn in turns:
        place = {"cache_position": torch.arange(start, start + turn)} if OLD else {}
        with torch.no_grad():
            part = TOKENS[:, start : start + turn]
            logits.append(model(part, past_key_values=cache, use_cache=True, **place).logits)
        start += turn
    return torch.cat(logits, dim=1)


@pytest.mark.parametrize("turns", [[9, 1, 1, 1], [6, 4, 2], [1, 11], [12]], ids=str)
@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("alpha", [1.0, 1.5])
def test_caches_and_turns_equal_the_whole(turns: list[int], kind: str, alpha: float) -> None:
    model = llama()
    if alpha == 1.0:
        expected = run(model, **TEXT)
    integration.apply(model, alpha=alpha)
    if alpha != 1.0:
        expected = run(model, **TEXT)
    cache = transformers.DynamicCache()
    if kind == "static":
        cache = transformers.StaticCache(config=model.config, max_cache_len=20)
    close(steps(model, cache, turns), expected)


@pytest.mark.parametrize("turns", [[5] + [1] * 7, [8, 4], [3, 1, 5, 3]], ids=str)
@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("alpha", [1.0, 1.5])
@pytest.mark.parametrize("config", ["Mistral", "Gemma2", "GptOss"])
def test_windows_and_caches(config: str, alpha: float, kind: str, turns: list[int]) -> None:
    """Hybrid caches too: of Gemma and gpt-oss every other layer keeps all keys."""
    if OLD and kind == "static" and turns != [5] + [1] * 7:
        pytest.skip("the static sliding cache of this release loses keys between several tokens")
    model = make(config + "ForCausalLM", config, {**DECODER, **GPT_OSS, "sliding_window": 5})
    if alpha == 1.0:
        expected = run(model, **TEXT)
        integration.apply(model, alpha=alpha)
    else:
        integration.apply(model, alpha=alpha)
        expected = run(model, **TEXT)
    cache = transformers.DynamicCache(config=model.config)
    if kind == "static":
        cache = transformers.StaticCache(config=model.config, max_cache_len=20)
    close(steps(model, cache, turns), expected)


def generated(model: Any, inputs: Tensor, **arguments: Any) -> Tensor:
    out: Tensor = model.generate(
        inputs, max_new_tokens=6, do_sample=False, eos_token_id=None, **arguments
    )
    return out


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("alpha", [1.0, 1.5])
@pytest.mark.parametrize("config", ["Llama", "Mistral", "Gemma2"])
def test_generation_equals_recomputing(config: str, alpha: float, cache: str) -> None:
    """Padded on the left, as prompts are; without a cache, and each prompt by itself."""
    window = {} if config == "Llama" else {"sliding_window": 6}
    model = make(config + "ForCausalLM", config, {**DECODER, **window})
    integration.apply(model, alpha=alpha)
    tokens = torch.ones_like(TOKENS)
    tokens[0, :4] = 0
    how = {"cache_implementation": cache, "disable_compile": True}
    found = generated(model, TOKENS, attention_mask=tokens, **how)
    assert found.equal(generated(model, TOKENS, attention_mask=tokens, use_cache=False))
    for prompt, whole in ((TOKENS[:1, 4:], found[:1, 4:]), (TOKENS[1:], found[1:])):
        assert generated(model, prompt, attention_mask=torch.ones_like(prompt)).equal(whole)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("config", ["T5", "Bart"])
def test_encoder_decoders_generate_as_eager(config: str, cache: str) -> None:
    """Cross attention to padded encoders, biases that grow with the cache."""
    if OLD and (config == "T5" or cache == "static"):
        pytest.skip("T5 computes its attention itself here; static caches are of decoders")
    arguments = T5 if config == "T5" else SEQ2SEQ
    model = make(config + "ForConditionalGeneration", config, arguments)
    tokens = torch.ones_like(TOKENS)
    tokens[0, 8:] = 0
    how: dict[str, Any] = {"attention_mask": tokens}
    if cache == "static":
        how |= {"cache_implementation": cache, "disable_compile": True}
    expected = generated(model, TOKENS, **how)
    integration.apply(model, alpha=1.0)
    assert generated(model, TOKENS, **how).equal(expected)


PADDED = [
    ("LlamaForCausalLM", "Llama", DECODER),
    ("MistralForCausalLM", "Mistral", {**DECODER, "sliding_window": 4}),
    ("Gemma2ForCausalLM", "Gemma2", {**DECODER, "sliding_window": 4}),
    ("GptOssForCausalLM", "GptOss", {**DECODER, **GPT_OSS, "sliding_window": 4}),
    ("Llama4ForCausalLM", "Llama4Text", {**DECODER, **LLAMA4}),
    ("BertModel", "Bert", ENCODER),
    ("ModernBertModel", "ModernBert", LOCAL),
    ("T5Model", "T5", T5),
    ("BartModel", "Bart", SEQ2SEQ),
]


@pytest.mark.parametrize("side", ["left", "right", "middle"])
@pytest.mark.parametrize("alpha", [1.0, 1.5])
@pytest.mark.parametrize(("model", "config", "arguments"), PADDED)
def test_a_padded_batch_equals_its_sequences(
    model: str, config: str, arguments: dict[str, Any], alpha: float, side: str
) -> None:
    """Also with a hole, which lengths do not tell."""
    if OLD and config in ("Bert", "ModernBert", "T5"):
        pytest.skip(f"{config} does not run our attention here")
    tokens = torch.ones_like(TOKENS).bool()
    tokens[0, {"left": slice(4), "right": slice(8, None), "middle": slice(3, 7)}[side]] = False
    by_distance = config in ("T5", "Llama4Text", "ModernBert") or "window" in str(arguments)
    if (config == "Bart" and side != "right") or (by_distance and side == "middle"):
        pytest.skip("places or distances of tokens count what is padded")
    ours = make(model, config, arguments)
    integration.apply(ours, alpha=alpha)
    alone = {"input_ids": TOKENS[:1][tokens[:1]][None]}
    batch = {"input_ids": TOKENS, "attention_mask": tokens.long()}
    if config in ("T5", "Bart"):
        batch["decoder_input_ids"], alone["decoder_input_ids"] = SHORTER, SHORTER[:1]
        close(run(ours, **batch)[:1], run(ours, **alone))
        return
    if config != "ModernBert" or side == "left":
        batch["position_ids"] = (tokens.cumsum(1) - 1).clamp(min=0)
    close(run(ours, **batch)[:1][tokens[:1]], run(ours, **alone)[0])
    close(run(ours, **batch)[1:], run(ours, input_ids=TOKENS[1:]))


def test_padding_queries_give_zeros_and_read_nothing() -> None:
    seen: list[dict[str, Any]] = []
    outputs: list[Tensor] = []
    model = llama(num_hidden_layers=1)
    integration.apply(model, alpha=1.0, observer=lambda *call: seen.append(call[-1]))
    model.model.layers[0].self_attn.o_proj.register_forward_pre_hook(
        lambda module, inputs: outputs.append(inputs[0])
    )
    for padded in (slice(3), slice(9, None)):
        tokens = torch.ones_like(TOKENS).bool()
        tokens[0, padded] = False
        run(model, **TEXT, attention_mask=tokens)
        assert not outputs[-1][~tokens].any()
        assert (outputs[-1][tokens] != 0).all()
    assert [set(call) & {"kv_starts", "kv_lengths", "q_lengths", "attn_mask"} for call in seen] == [
        {"kv_starts"},
        {"kv_lengths", "q_lengths"},
    ]


@pytest.mark.parametrize("alpha", [1.0, 1.5])
@pytest.mark.parametrize("config", ["Llama", "Mistral", "Gemma2", "Qwen3"])
def test_packed_sequences_equal_single_ones(config: str, alpha: float) -> None:
    """Told by position_ids, and for flash attention by lengths too; as one of many rows. With a
    cache, as a model has it by default, transformers does not look at positions: lengths tell it,
    and without them it is an error."""
    model = make(config + "ForCausalLM", config, {**DECODER, "sliding_window": 4})
    integration.apply(model, alpha=alpha)
    places = torch.cat([torch.arange(5), torch.arange(7)])
    whole = torch.stack([places, torch.arange(12)])
    ends = torch.tensor([0, 5, 12, 24], dtype=torch.int32)
    lengths = {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": 12, "max_length_k": 12}
    expected = [run(model, input_ids=part) for part in (TOKENS[:1, :5], TOKENS[:1, 5:], TOKENS[1:])]
    for more in ({"use_cache": False}, {"use_cache": False, **lengths}, lengths):
        found = run(model, **TEXT, position_ids=whole, **more)
        close(found, torch.cat([torch.cat(expected[:2], dim=1), expected[2]]))
    static = transformers.StaticCache(model.config, max_cache_len=20)
    for more in ({}, {"past_key_values": static}):
        with pytest.raises(ValueError, match="position_ids go back to 0 within a row"):
            run(model, **TEXT, position_ids=whole, **more)


@pytest.mark.parametrize("told", ["mask", "zeros", "padding", "gap"])
def test_rows_that_are_one_sequence_whatever_their_positions(told: str) -> None:
    """A padding mask says so, as to transformers; positions that are all 0, that skip some, or that
    begin behind padding do not go back."""
    model = llama()
    places = torch.arange(12).repeat(2, 1)
    more = {}
    if told == "mask":
        places, more = PACKED, {"attention_mask": torch.ones_like(TOKENS)}
    elif told == "zeros":
        places = torch.zeros_like(places)
    elif told == "padding":
        places = (places - 3).clamp(min=0)
    else:
        places = places + 5 * (places > 4)
    expected = run(model, **TEXT, position_ids=places, **more)  # transformers' own softmax
    integration.apply(model, alpha=1.0)
    close(run(model, **TEXT, position_ids=places, **more), expected)


def test_positions_on_a_gpu_are_looked_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Looking waits for it; on a CPU every call is looked at, also of what cannot be kept."""
    looked: list[bool] = []
    monkeypatch.setattr(attention, "goes_back", lambda *asked: bool(looked.append(True)))
    said = masks.Statement(is_causal=True)
    for device, times in (("cpu", 3), ("meta", 1)):
        own = attention.Attention(1.5, None, None)
        for _ in range(3):
            own._refuse_packing(said, PACKED.to(device), 12)
        assert len(looked) == times
        looked.clear()
    own._refuse_packing(said._replace(is_whole=True), PACKED, 12)
    own._refuse_packing(said._replace(attn_mask=triangle()), PACKED, 12)
    assert not looked


@pytest.mark.parametrize(
    ("places", "rows", "back"),
    [
        *((PACKED, 12, True), (PACKED.int(), 12, True), (PACKED.float(), 12, True)),
        *((PACKED[:1], 12, True), (PACKED, 11, False), (PACKED[:, :1], 1, False)),
        *((PACKED.expand(3, 2, 12), 12, False), (PACKED.to("meta"), 12, False)),
        *((torch.zeros(2, 12), 12, False), (torch.arange(12).flip(0)[None], 12, True)),
    ],
)
def test_positions_that_go_back(places: Tensor, rows: int, back: bool) -> None:
    assert masks.goes_back(places, rows) == back
    with torch.inference_mode():
        assert masks.goes_back(places.clone(), rows) == back
    if places.dim() == 2 and not places.is_meta:
        mapped = torch.vmap(lambda one: one + masks.goes_back(one, rows))(places[None])
        assert mapped.equal(places[None])


@pytest.mark.parametrize("what", ["nothing", "mask", "padding", "window", "packed"])
def test_no_numbers_are_made_where_words_suffice(
    what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mask of 32,768 tokens would take 4 GiB."""
    model = make("MistralForCausalLM", "Mistral", {**DECODER, "sliding_window": 4})
    if what != "window":
        model = llama()
    integration.apply(model, alpha=1.0)
    monkeypatch.setattr("transformers.masking_utils.sdpa_mask", None)
    inputs = dict(TEXT)
    if what in ("mask", "padding"):
        inputs["attention_mask"] = torch.ones_like(TOKENS)
        inputs["attention_mask"][0, 9:] = what == "mask"
    if what == "packed":
        inputs["position_ids"] = torch.cat([torch.arange(5), torch.arange(7)]).expand(2, -1)
    else:
        run(model, **inputs, past_key_values=transformers.DynamicCache())
    model.gradient_checkpointing_enable({"use_reentrant": True})
    model.train()(**inputs, use_cache=False)


def test_a_stated_mask_is_eagers_mask_for_others() -> None:
    numbers = additive(triangle())
    known = masks.Statement(is_causal=True)
    mask = masks.StatedMask.of(torch.zeros(()).expand(1, 1, 6, 6), known, lambda: numbers)
    assert mask.shape == (1, 1, 6, 6)
    assert mask[:, :, :, :6] is mask
    assert mask.detach() is mask
    moved = mask.to(torch.float64)
    assert type(moved) is masks.StatedMask
    assert moved.dtype == torch.float64
    assert "numbers" not in vars(mask)
    torch.testing.assert_close(moved + 0, numbers.double())
    torch.testing.assert_close(mask + 1, numbers + 1)
    torch.testing.assert_close(mask[:, :, 2:, :3], numbers[:, :, 2:, :3])
    torch.testing.assert_close(torch.cat([mask, mask]), torch.cat([numbers, numbers]))
    assert mask.to(torch.bool).equal(numbers.bool())


# Compilers

PADDED_LEFT = {**TEXT, "attention_mask": (TOKENS != 3).long()}
PADDED_RIGHT = {**TEXT, "attention_mask": (torch.arange(12) < torch.tensor([[12], [9]])).long()}

COMPILED = [
    ("LlamaForCausalLM", "Llama", DECODER, TEXT),
    ("LlamaForCausalLM", "Llama", DECODER, {**TEXT, "use_cache": False}),
    ("LlamaForCausalLM", "Llama", DECODER, {**TEXT, "attention_mask": torch.ones_like(TOKENS)}),
    ("LlamaForCausalLM", "Llama", DECODER, {**TEXT, "attention_mask": triangle(12, 12)}),
    ("LlamaForCausalLM", "Llama", DECODER, {**TEXT, "use_cache": False, "position_ids": PACKED}),
    ("MistralForCausalLM", "Mistral", {**DECODER, "sliding_window": 12}, TEXT),
    ("MistralForCausalLM", "Mistral", {**DECODER, "sliding_window": 5}, TEXT),
    (
        "MistralForCausalLM",
        "Mistral",
        {**DECODER, "sliding_window": 5},
        {**TEXT, "use_cache": False, "position_ids": PACKED},
    ),
    ("Gemma2ForCausalLM", "Gemma2", {**DECODER, "sliding_window": 5}, PADDED_LEFT),
    ("GptOssForCausalLM", "GptOss", {**DECODER, **GPT_OSS, "sliding_window": 5}, PADDED_RIGHT),
    ("Llama4ForCausalLM", "Llama4Text", {**DECODER, **LLAMA4}, TEXT),
    ("BigBirdPegasusForCausalLM", "BigBirdPegasus", BIG_BIRD, {**TEXT, "use_cache": False}),
    ("BartModel", "Bart", SEQ2SEQ, {**PAIR, "use_cache": False}),
    ("T5Model", "T5", T5, {**PAIR, **PADDED_RIGHT, "use_cache": False}),
]


@pytest.mark.parametrize("fullgraph", [False, True])
@pytest.mark.parametrize("case", range(len(COMPILED)))
def test_compiled_models_equal_eager(case: int, fullgraph: bool) -> None:
    model, config, arguments, inputs = COMPILED[case]
    if OLD and config == "T5":
        pytest.skip("T5 computes its attention itself here")
    if OLD and fullgraph and config in ("Gemma2", "GptOss"):
        pytest.skip("this release looks at a number of its window when it pads")
    ours = make(model, config, arguments)
    integration.apply(ours)
    expected = run(ours, **inputs)
    torch._dynamo.reset()
    found = run(torch.compile(ours, fullgraph=fullgraph, backend="aot_eager"), **inputs)
    tokens = inputs.get("attention_mask", torch.ones(1))
    if tokens.shape == found.shape[:2]:
        found, expected = found[tokens.bool()], expected[tokens.bool()]
    close(found, expected)


@pytest.mark.slow
def test_compiled_by_the_default_compiler() -> None:
    model = llama(num_hidden_layers=1)
    integration.apply(model)
    expected = run(model, **TEXT, use_cache=False)
    torch._dynamo.reset()
    close(run(torch.compile(model, fullgraph=True), **TEXT, use_cache=False), expected)


def keeping(graphs: list[torch.fx.GraphModule]) -> Any:
    """A backend of ``torch.compile`` that adds what it is given to ``graphs``."""

    def keep(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    return aot_autograd(fw_compiler=keep)


def test_what_is_compiled_for_any_length_makes_no_mask_of_a_long_chunk() -> None:
    """It may ask whether the chunk bites, and is compiled again where it does."""
    model = make(
        "Llama4ForCausalLM", "Llama4Text", {**DECODER, **LLAMA4, "attention_chunk_size": 8192}
    )
    integration.apply(model)
    graphs: list[torch.fx.GraphModule] = []
    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(model, dynamic=True, backend=keeping(graphs))(
            input_ids=TOKENS, attention_mask=torch.ones_like(TOKENS), use_cache=False
        )
    shapes = [
        str(tuple(getattr(node.meta.get("val"), "shape", ()))[-2:])
        for graph in graphs
        for node in graph.graph.nodes
    ]
    squares = [one for one in shapes if re.fullmatch(r"\((s\d+|12), \1\)", one)]
    assert any("adasplash2" in str(node.target) for g in graphs for node in g.graph.nodes)
    assert squares == []


@pytest.mark.parametrize("strict", [False, True])
def test_exported_models_equal_eager(strict: bool) -> None:
    model = llama()
    integration.apply(model)
    inputs = {"use_cache": False, "attention_mask": torch.ones_like(TOKENS)}
    exported = torch.export.export(model, (TOKENS,), inputs, strict=strict)
    assert "adasplash2.attention_forward" in str(exported.graph)
    with torch.no_grad():
        found = exported.module()(TOKENS, **inputs).logits
    close(found, run(model, **TEXT, **inputs))


@pytest.mark.parametrize("compiler", ["compile", "export"])
@pytest.mark.parametrize("input_name", ["attention_mask", "position_ids"])
def test_one_graph_serves_all_numbers(compiler: str, input_name: str) -> None:
    """Numbers cannot be read while tracing: padding, holes and packing are operands."""
    model = llama()
    integration.apply(model)
    padded = torch.ones_like(TOKENS)
    padded[0, :5], padded[1, 4:] = 0, 0
    holes = torch.ones_like(TOKENS)
    holes[0, 3:7] = 0
    whole = torch.arange(12).repeat(2, 1)
    first, *others = {
        "attention_mask": [torch.ones_like(TOKENS), padded, holes],
        "position_ids": [whole, PACKED, torch.stack([whole[0], PACKED[0]])],
    }[input_name]
    inputs = {"use_cache": False, input_name: first}
    graph: Any = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch._dynamo.reset()
    if compiler == "export":
        graph = torch.export.export(model, (TOKENS,), inputs).module()
    with torch.no_grad():
        for numbers in (first, *others):
            expected = model(TOKENS, **{**inputs, input_name: numbers}).logits
            close(graph(TOKENS, **{**inputs, input_name: numbers}).logits, expected)


@pytest.mark.parametrize("what", ["mask", "packed", "window", "cache"])
def test_graphs_hold_no_mask_where_words_suffice(what: str) -> None:
    """No tensor of queries by keys; and no operands at all for a plain causal model."""
    if OLD and what == "packed":
        pytest.skip("here nothing tells packing from masks of other kinds")
    arguments = {**DECODER, "sliding_window": 4} if what == "window" else DECODER
    config = "Mistral" if what == "window" else "Llama"
    model = make(config + "ForCausalLM", config, arguments)
    integration.apply(model)
    graphs: list[torch.fx.GraphModule] = []
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend=keeping(graphs))
    inputs: dict[str, Any] = dict(TEXT, use_cache=what == "cache")
    if what in ("mask", "window"):
        inputs["attention_mask"] = torch.ones_like(TOKENS)
    run(compiled, **inputs)
    nodes = [node for graph in graphs for node in graph.graph.nodes]
    calls = [node for node in nodes if "adasplash2" in str(node.target)]
    assert len(calls) == 2
    shapes = [getattr(node.meta.get("val"), "shape", ()) for node in nodes]
    assert not [shape for shape in shapes if tuple(shape[-2:]) == (12, 12)]
    if what == "cache":
        tensors = [a for a in calls[0].args if isinstance(a, torch.fx.Node)]
        assert len(tensors) == 3


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("config", ["Mistral", "Gemma3Text", "Llama4Text"])
def test_one_graph_serves_lengths_on_both_sides_of_a_window(config: str, strict: bool) -> None:
    """Or of a chunk: whether it bites is not asked while tracing."""
    arguments = {**DECODER, **LLAMA4} if config == "Llama4Text" else window(5)
    model = make(config.removesuffix("Text") + "ForCausalLM", config, arguments)
    weigh(model, integration.apply(model).ours, 1.0)
    length = torch.export.Dim("length", min=3, max=60)
    padded = torch.ones(2, 24, dtype=torch.long)
    padded[0, :2] = 0
    whole = {"input_ids": TOKENS.repeat(1, 2), "attention_mask": padded}

    def cut(number: int) -> dict[str, Any]:
        parts = {name: numbers[:, :number].clone() for name, numbers in whole.items()}
        return {**parts, "use_cache": False}

    shapes = {**{name: {1: length} for name in whole}, "use_cache": None}
    exported = torch.export.export(model, (), cut(12), dynamic_shapes=shapes, strict=strict)
    for number in (3, 4, 5, 6, 7, 24):
        seen, inputs = padded[:, :number].bool(), cut(number)
        close(run(exported.module(), **inputs)[seen], run(model, **inputs)[seen])


def test_lengths_of_models_that_may_be_packed_are_no_constants() -> None:
    if OLD:
        pytest.skip("here nothing tells packing from masks of other kinds")
    model = make("LlamaForCausalLM", "Llama", DECODER)
    integration.apply(model)
    said = {"input_ids": TOKENS, "use_cache": False}
    shapes = {"input_ids": {1: torch.export.Dim("length", min=3, max=100)}, "use_cache": None}
    program = torch.export.export(model, (), said, dynamic_shapes=shapes, strict=False)
    with torch.no_grad():
        for tokens in (TOKENS, TOKENS[:, :7]):
            close(
                program.module()(input_ids=tokens, use_cache=False).logits,
                model(input_ids=tokens, use_cache=False).logits,
            )


def test_observers_tell_layers_apart_that_have_no_numbers() -> None:
    if OLD:
        pytest.skip("here this model has an attention of its own")
    config = transformers.DistilBertConfig(
        vocab_size=99, dim=32, n_layers=3, n_heads=4, hidden_dim=48
    )
    model = transformers.DistilBertModel(config).eval()
    layers: list[int | None] = []
    integration.apply(model, observer=lambda layer, *_: layers.append(layer))
    for _ in "ab":
        with torch.no_grad():
            model(input_ids=TOKENS)
    assert layers == [0, 1, 2] * 2


@pytest.mark.parametrize("window", [None, 4])
def test_a_model_that_is_said_not_to_be_packed(
    window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where numbers cannot be looked at its mask has no operands; a batch that is seen to be packed
    is refused."""
    if OLD:
        pytest.skip("here nothing tells packing from masks of other kinds")
    arguments = {**DECODER, **({"sliding_window": window} if window else {})}
    config = "Mistral" if window else "Llama"
    model = make(config + "ForCausalLM", config, arguments)
    said: list[dict[str, Any]] = []
    integration.apply(model, observer=lambda *call: said.append(call[-1]), packed=False)
    expected = run(model, **TEXT, use_cache=False)
    eager = said.copy()
    monkeypatch.setattr(masks, "is_tracing", lambda like=None: True)
    theirs = transformers.masking_utils
    monkeypatch.setattr(theirs, "is_tracing", lambda like=None: True)
    said.clear()
    assert torch.equal(run(model, **TEXT, use_cache=False), expected)
    assert said == eager
    assert not any(isinstance(value, torch.Tensor) for call in said for value in call.values())
    monkeypatch.undo()
    with pytest.raises(ValueError, match="packed=False"):
        run(model, **TEXT, use_cache=False, position_ids=PACKED)
    with pytest.raises(TypeError, match="packed"):
        integration.apply(model, packed=1)


@pytest.mark.parametrize("config", ["Llama", "Mistral", "Gemma2"])
def test_static_caches_compile(config: str) -> None:
    """How much of a cache is filled is a number of the graph, which serves each next token."""
    window = {} if config == "Llama" else {"sliding_window": 5}
    model = make(config + "ForCausalLM", config, {**DECODER, **window})
    integration.apply(model)
    expected = run(model, **TEXT)
    cache = transformers.StaticCache(config=model.config, max_cache_len=20)
    torch._dynamo.reset()
    found = steps(model, cache, [8])
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for i in range(8, 12):
        place = {"cache_position": torch.tensor([i])} if OLD else {}
        with torch.no_grad():
            out = compiled(TOKENS[:, i : i + 1], past_key_values=cache, use_cache=True, **place)
        found = torch.cat([found, out.logits], dim=1)
    close(found, expected)


# The range of releases


def test_both_ends_of_the_range_are_what_is_tested() -> None:
    """The lower bound is the pinned oldest release, and this runs with one of the two pins."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]

    def pin(file: str) -> str:
        found = re.search(r"^transformers==(\S+)", (ROOT / "requirements" / file).read_text(), re.M)
        assert found
        return found[1]

    for extra in ("transformers", "examples"):
        asked = next(line for line in extras[extra] if line.startswith("transformers"))
        assert asked == f"transformers>={pin('oldest.txt').removesuffix('.0')}"
    assert transformers.__version__ in (pin("oldest.txt"), pin("test.txt"))
