"""alpha of each head of a model's layers, fixed or learned."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from adasplash2.options import check_alpha, shown

if TYPE_CHECKING:
    from transformers import PreTrainedModel

STORED = "adasplash2"
"""The entry of a model's config: ``{"alpha": ..., "learn": ...}``."""

ATTRIBUTE = "adasplash2"
"""Where a layer holds its :class:`HeadAlphas`."""

LOW, HIGH = 1.01, 1.99
"""What learned alphas lie between."""

STEEP = 30.0
"""The sigmoid of more is 1 in float64, from which no logit comes back."""


class HeadAlphas(nn.Module):
    """The alphas of one layer, one for each query head; called, it gives them as a tensor.

    Learned ones are ``1.01 + 0.98 * sigmoid(logit)`` of the parameter ``logit``: inside (1, 2)
    whatever an optimizer does, and never rounded to its ends. Fixed ones are no parameters.
    """

    logit: nn.Parameter | None
    bits: Tensor

    def __init__(self, alphas: Sequence[float], learned: bool, device: torch.device) -> None:
        super().__init__()
        self.fixed, self.logit = list(alphas), None
        if learned:
            write_when_saved()
            logits = [_logit(alpha) for alpha in alphas]
            self.logit = nn.Parameter(torch.tensor(logits, dtype=torch.float32, device=device))
        else:
            # As integers, which a model that is cast to bfloat16 leaves as they are.
            bits = torch.tensor(self.fixed, dtype=torch.float32, device=device).view(torch.int32)
            self.register_buffer("bits", bits, persistent=False)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        write_when_saved()  # also in a process that only loads and saves

    def forward(self) -> Tensor:
        if self.logit is None:
            return self.bits.view(torch.float32)
        return LOW + (HIGH - LOW) * self.logit.float().sigmoid()

    def numbers(self, logit: Tensor | None = None) -> list[float]:
        """As they are now, or of another ``logit``, such that learned ones come back to the last
        bit."""
        if self.logit is None:
            return self.fixed
        logit = self.logit if logit is None else logit
        logit = logit.detach().double().clamp(-STEEP, STEEP)
        found: list[float] = (LOW + (HIGH - LOW) * logit.sigmoid()).tolist()
        return found


def _logit(alpha: float) -> float:
    return math.log((alpha - LOW) / (HIGH - alpha))


def held_by(module: nn.Module) -> HeadAlphas | None:
    """The alphas of a layer, None where it has none of its own."""
    found = getattr(module, ATTRIBUTE, None)
    return found if isinstance(found, HeadAlphas) else None


def stored_by(model: nn.Module, state: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """``alpha`` and ``learn`` of the layers that have their own, or nothing; of what is learned in
    ``state``, the model's or another, where that has it."""
    layers = {path: held for path, module in model.named_modules() if (held := held_by(module))}
    if not layers:
        return {}
    state = state or {}
    return {
        "alpha": {
            path: held.numbers(state.get(f"{path}.{ATTRIBUTE}.logit"))
            for path, held in layers.items()
        },
        "learn": any(held.logit is not None for held in layers.values()),
    }


def write_when_saved() -> None:
    """From now on, whatever model of transformers is saved, one that was set, that holds it or is
    held by it, the config that is written has learned alphas as they are, or as they are in the
    ``state_dict`` to be saved: also the configs that parts have of their own."""
    from transformers import PreTrainedModel

    usual = PreTrainedModel.save_pretrained
    if getattr(usual, _MARK, False):
        return
    asked = inspect.signature(usual)

    @functools.wraps(usual)
    def save_pretrained(self: PreTrainedModel, *arguments: Any, **more: Any) -> Any:
        said = {**more, **asked.bind_partial(self, *arguments, **more).arguments}
        before = _write(self, said.get("state_dict"))
        try:
            return usual(self, *arguments, **more)
        finally:
            for config, entry in before:
                setattr(config, STORED, entry)

    setattr(save_pretrained, _MARK, True)
    PreTrainedModel.save_pretrained = save_pretrained  # type: ignore[method-assign]


_MARK = "_adasplash2_writes_alphas"


def _write(model: nn.Module, state: Mapping[str, Any] | None) -> list[tuple[Any, Any]]:
    """Write what is learned into the configs of a model and its parts that have an entry for it.
    These, and what they had."""
    before = []
    seen: set[int] = set()
    for path, part in model.named_modules():
        config = getattr(part, "config", None)
        if config is None or id(config) in seen or not hasattr(config, STORED):
            continue
        seen.add(id(config))
        prefix = path + "." if path else ""
        own = {
            name.removeprefix(prefix): tensor
            for name, tensor in (state or {}).items()
            if name.startswith(prefix)
        }
        if found := stored_by(part, own):
            before.append((config, getattr(config, STORED)))
            setattr(config, STORED, found)
    return before


def take_from(model: nn.Module) -> None:
    """Leaves no layer its own alphas."""
    for module in list(model.modules()):
        if held_by(module) is not None:
            delattr(module, ATTRIBUTE)


def renamed(
    stored: Mapping[str, Sequence[float]], layers: tuple[str, ...], model: nn.Module
) -> dict[str, Sequence[float]]:
    """What a config holds of ``layers``, which a model with a head, or without, names otherwise: as
    transformers finds their weights. What it holds of others, as of a decoder, is left.

    Raises:
        ValueError: it has nothing of a layer.
    """
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    found = {}
    for path in layers:
        names = [path, prefix + path, path.removeprefix(prefix)]
        known = [name for name in names if name in stored]
        if not known:
            raise ValueError(
                f"the config of this {type(model).__name__} holds alphas of "
                f"{shown(sorted(stored))}, which has not {path}: give alpha"
            )
        found[path] = stored[known[0]]
    return found


def by_layer(
    model: nn.Module,
    layers: tuple[str, ...],
    alpha: float | Mapping[str, Sequence[float]],
    learned: bool,
) -> dict[str, HeadAlphas]:
    """The alphas of each of ``layers``.

    Raises:
        TypeError, ValueError: ``alpha`` does not fit the layers, or is not in the range.
    """
    if isinstance(alpha, Mapping) and set(alpha) != set(layers):
        wrong = sorted(set(alpha) ^ set(layers), key=str)
        raise ValueError(
            f"alpha must name the layers that run our attention, and all of them: {shown(wrong)} "
            "are named and do not, or the reverse"
        )
    found = {}
    for path in layers:
        module = model.get_submodule(path)
        heads = _count_heads(module)
        given = alpha[path] if isinstance(alpha, Mapping) else [alpha] * heads
        if not isinstance(given, Iterable):
            raise TypeError(f"alpha of {path} must be a sequence of numbers, got {shown(given)}")
        alphas = [check_alpha(number) for number in given]
        if not alphas:
            raise ValueError(f"cannot tell how many heads {path} has: give alpha for each layer")
        if heads and len(alphas) != heads:
            raise ValueError(
                f"alpha of {path} must be one number for each of {heads} heads, got {len(alphas)}"
            )
        for number in alphas:
            if learned and not LOW < number < HIGH:
                raise ValueError(
                    f"alpha must be above {LOW} and below {HIGH} to be learned, got {number}"
                )
            if not 1.0 < number <= 2.0:
                raise ValueError(f"alpha of a head must be above 1 and at most 2, got {number}")
        device = next((p.device for p in module.parameters()), torch.device("cpu"))
        found[path] = HeadAlphas(alphas, learned, device)
    return found


def _count_heads(module: nn.Module) -> int:
    """The query heads of a layer, as models of transformers name their number; 0 where they do not
    tell."""
    for owner in (module, getattr(module, "config", None)):
        for name in ("num_attention_heads", "num_heads", "n_heads"):
            heads = getattr(owner, name, None)
            if isinstance(heads, int):
                return heads
    return 0
