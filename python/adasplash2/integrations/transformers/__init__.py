"""entmax attention in the models of Hugging Face transformers.

:func:`apply` sets it and tells which layers run it.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from adasplash2.integrations.transformers.attention import Attention, Observer
from adasplash2.integrations.transformers.coverage import Coverage, cover, ran
from adasplash2.integrations.transformers.masks import mask_function
from adasplash2.options import check_alpha, check_backend, shown

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["Coverage", "Observer", "apply", "cover", "register"]

_observed = itertools.count()


def apply(
    model: PreTrainedModel,
    alpha: float = 1.5,
    backend: str | None = None,
    observer: Observer | None = None,
    example: Mapping[str, Any] | None = None,
) -> Coverage:
    """Make a model run our attention, and tell which of its layers do.

    Some models never ask for an attention (Bloom, Falcon, GPT-J, DeBERTa), some only in part.
    Which layers ask is read from their code; with ``example`` also seen in a forward.

    Args:
        model: a model of transformers. Models that it holds are set too.
        alpha, backend: as for :func:`adasplash2.entmax_attention`.
        observer: sees the inputs of every attention, see :data:`Observer`.
        example: arguments of one ``model(**example)``, which is run without gradients.

    Returns:
        :class:`Coverage`: the layers that run our attention, and why the others do not. Others
        keep what they had, and cost a warning.

    Raises:
        ImportError: transformers is not installed.
        TypeError: ``model`` is not a model of transformers.
        TypeError, ValueError: ``alpha`` is not a number of at least 1.
        ValueError: no layer of the model runs our attention.

    Example:
        >>> import torch
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> from adasplash2.integrations.transformers import apply
        >>> model = GPT2LMHeadModel(GPT2Config(vocab_size=9, n_embd=8, n_layer=2, n_head=2))
        >>> print(apply(model, alpha=1.5))
        2 of 2 attention layers run adasplash2-1.5
        >>> seen = lambda layer, query, key, value, arguments: print(layer, tuple(query.shape))
        >>> _ = apply(model, observer=seen)
        >>> _ = model(input_ids=torch.tensor([[1, 2, 3]]))
        0 (1, 2, 3, 4)
        1 (1, 2, 3, 4)
    """
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"model must be a transformers PreTrainedModel, got {type(model).__name__}")
    backend = check_backend(backend) or None
    # One name for one set of options: models do not change each other's.
    name = f"adasplash2-{check_alpha(alpha):g}" + (f"-{backend}" if backend else "")
    if float(f"{alpha:g}") != alpha or observer is not None:
        name += f"-{next(_observed)}"
    register(name, alpha, backend or None, observer)
    before = _implementations(model)
    model.set_attn_implementation(name)
    # A part with a copy of the model's config (T5's encoder and decoder) is not reached by that.
    for config, _ in before:
        if type(config) is type(model.config):
            config._attn_implementation_internal = model.config._attn_implementation_internal
    found = cover(model, name)
    if example is not None:
        called: set[nn.Module] = set()
        _register(name, Attention(alpha, backend, observer, called.add))
        try:
            with torch.no_grad():
                model(**example)
        finally:
            register(name, alpha, backend, observer)
        found = ran(found, model, called)
    if not found.ours:
        for config, implementation in before:
            config._attn_implementation_internal = implementation
        raise ValueError(f"{type(model).__name__} cannot run our attention: {found}")
    if found.others:
        warnings.warn(f"{type(model).__name__}: {found}", stacklevel=2)
    return found


def register(
    name: str = "adasplash2",
    alpha: float = 1.5,
    backend: str | None = None,
    observer: Observer | None = None,
) -> None:
    """Make ``name`` an attention implementation of transformers; a second call replaces it.

    For whoever sets implementations by name; :func:`apply` also tells which layers take it.
    Registers the attention and the masks that belong to it. Padding, packed sequences, windows,
    caches, biases, caps, sinks and dropout are passed on; keywords that are not known are refused
    when a model asks for them.

    Rows without a visible key give zeros, and so do queries behind the last key of their sequence,
    which are padding. Attention probabilities are never returned.

    Args:
        name: what ``model.set_attn_implementation(name)`` takes; not one of transformers' own.
        alpha, backend: as for :func:`adasplash2.entmax_attention`.
        observer: sees the inputs of every attention, see :data:`Observer`.

    Raises:
        ImportError: transformers is not installed.
        TypeError, ValueError: ``alpha`` is not a number of at least 1, or ``name`` is taken.

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> from adasplash2.integrations.transformers import register
        >>> register("sparsemax", alpha=2.0)
        >>> config = GPT2Config(vocab_size=9, n_embd=8, n_layer=2, n_head=2)
        >>> model = GPT2LMHeadModel._from_config(config, attn_implementation="sparsemax")
    """
    _register(name, Attention(check_alpha(alpha), check_backend(backend) or None, observer))


def _register(name: str, attention: Callable[..., Any]) -> None:
    from transformers import AttentionInterface, AttentionMaskInterface

    if not isinstance(name, str):
        raise TypeError(f"name must be a text, got {shown(name)}")
    # Models branch on these names, and others would lose their attention.
    if name in ("eager", "sdpa", "flex_attention") or "flash" in name or set(name) & set("|:/"):
        raise ValueError(
            "name must not be eager, sdpa or flex_attention nor hold 'flash', '|', ':' or '/', "
            f"which transformers reads in its own way; got {name!r}"
        )
    AttentionInterface.register(name, attention)
    AttentionMaskInterface.register(name, mask_function())


def _implementations(model: PreTrainedModel) -> list[tuple[Any, str | None]]:
    """The configs of a model and its parts, with what each says."""
    held: list[Any] = [getattr(module, "config", None) for module in model.modules()]
    configs = {id(config): config for config in held if config is not None}
    for key in getattr(model.config, "sub_configs", {}):
        sub = getattr(model.config, key, None)
        if sub is not None:
            configs[id(sub)] = sub
    return [
        (config, config._attn_implementation_internal)
        for config in configs.values()
        if hasattr(config, "_attn_implementation_internal")
    ]
