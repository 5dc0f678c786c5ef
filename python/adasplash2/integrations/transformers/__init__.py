"""entmax attention in the models of Hugging Face transformers.

:func:`apply` sets it and tells which layers run it.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from adasplash2.integrations.transformers import alphas
from adasplash2.integrations.transformers.attention import (
    Attention,
    Observer,
    warn_no_probabilities,
)
from adasplash2.integrations.transformers.coverage import (
    Coverage,
    asks,
    cover,
    ran,
    refuse_too_wide,
)
from adasplash2.integrations.transformers.masks import mask_function
from adasplash2.options import check_alpha, check_backend, check_flag, shown

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["Coverage", "Observer", "apply", "cover", "register", "restore", "unregister"]

BEFORE = "_adasplash2_before"
"""Where a model keeps which implementations it had."""

_observed = itertools.count()
_registered: set[str] = set()


def apply(
    model: PreTrainedModel,
    alpha: float | Mapping[str, Sequence[float]] | None = None,
    backend: str | None = None,
    observer: Observer | None = None,
    example: Mapping[str, Any] | None = None,
    *,
    learn: bool | None = None,
    packed: bool = True,
) -> Coverage:
    """Make a model run our attention, and tell which of its layers do.

    Some models never ask for an attention (Bloom, Falcon, GPT-J, DeBERTa), some only in part.
    Which layers ask is read from their code; with ``example`` also seen in a forward.

    What is set for ``alpha`` is kept in the model's config, learned numbers as they are when the
    model is saved. A model that is loaded has transformers' attention until this is called::

        model.save_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(folder)
        apply(model)

    transformers then tells that learned alphas are in the file unexpected; they come from the
    config. A model that another process has pickled needs this call too. Models that were made from
    one config object share it, and what is set for one is set for all: give each a copy.

    Args:
        model: a model of transformers. Models that it holds are set too.
        alpha: as for :func:`adasplash2.entmax_attention`; or for each layer, by its name in
            :attr:`Coverage.ours`, a number above 1 and up to 2 for each query head. None: what the
            model or its config holds, else 1.5.
        backend: as for :func:`adasplash2.entmax_attention`.
        observer: sees the inputs of every attention, see :data:`Observer`.
        example: arguments of one ``model(**example)``, which is run without gradients.
        learn: each head's alpha becomes a parameter that begins at ``alpha``, see
            :class:`~adasplash2.integrations.transformers.alphas.HeadAlphas`; so make the optimizer
            after this call. None: what the model or its config holds where ``alpha`` is None too,
            else False.
        packed: whether several sequences may lie one behind another in a row of a batch, told by
            ``position_ids`` that begin anew. transformers looks at these where the model fills no
            cache (``use_cache=False``) and no ``attention_mask`` is given, and so do its own eager
            and SDPA attention. Where it has not looked and a layer is given positions that go back
            to 0, that is an error, on a GPU at the first forward alone; in graphs, and in layers
            that are not given them (OPT, Llama 4 and others), it is not seen. ``cu_seq_lens_q``
            and ``cu_seq_lens_k`` tell of packing everywhere. Where ``torch.compile`` or a CUDA
            graph looks at no numbers of a model without a cache, sequences might be packed
            anywhere, and fewer kernels compute that. With False the mask of such a model is causal
            and no more; a batch seen to be packed is an error.

    Returns:
        :class:`Coverage`: the layers that run our attention, and why the others do not. Others
        keep what they had, and cost a warning.

    Raises:
        ImportError: transformers is not installed.
        TypeError: ``model`` is not a model of transformers, ``observer`` no function or
            ``example`` no mapping.
        TypeError, ValueError: ``alpha`` is not a number of at least 1, or does not fit the layers.
        ValueError: no layer of the model runs our attention, or one has heads wider than 256.

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
    if example is not None and not isinstance(example, Mapping):
        raise TypeError(f"example must be a mapping of arguments, got {shown(example)}")
    is_kept = alpha is None  # by the model or its config
    if alpha is None:
        stored = alphas.stored_by(model) or getattr(model.config, alphas.STORED, {})
        alpha = stored.get("alpha", 1.5)
        learn = stored.get("learn", False) if learn is None else learn
    learn = learn is not None and check_flag("learn", learn)
    packed = check_flag("packed", packed)
    number = None if learn or isinstance(alpha, Mapping) else check_alpha(alpha)
    # One name for one set of options: models do not change each other's.
    kind = "learned" if learn else "by-head" if number is None else f"{number:g}"
    name = f"adasplash2-{kind}" + (f"-{backend}" if backend else "") + "-unpacked" * (not packed)
    if (number is not None and float(kind) != number) or observer is not None:
        name += f"-{next(_observed)}"
    _register(name, Attention(number, backend, observer), packed)
    previous = _implementations(model)
    try:
        model.set_attn_implementation(name)
        # Copies of a config are not reached by that: those of T5's encoder and decoder.
        for module in filter(asks, model.modules()):
            config: Any = getattr(module, "config", None)
            if config is not None:
                config._attn_implementation_internal = name
        found = cover(model, name)
        if example is not None:
            found = _probed(found, model, example, Attention(number or 1.5, backend, observer))
        if not found.ours:
            raise ValueError(f"{type(model).__name__} cannot run our attention: {found}")
        refuse_too_wide(model, found)
        if is_kept and isinstance(alpha, Mapping):
            alpha = alphas.renamed(alpha, found.ours, model)
        own = {} if number is not None else alphas.by_layer(model, found.ours, alpha, learn)
    except BaseException:
        _put_back(previous)
        raise
    alphas.take_from(model)
    for path, held in own.items():
        setattr(model.get_submodule(path), alphas.ATTRIBUTE, held)
    if BEFORE not in vars(model):
        setattr(model, BEFORE, previous)
    store(model, alphas.stored_by(model) or {"alpha": number, "learn": False})
    if getattr(model.config, "output_attentions", False):
        warn_no_probabilities()
    if found.others:
        warnings.warn(f"{type(model).__name__}: {found}", stacklevel=2)
    return found


def restore(model: PreTrainedModel) -> None:
    """Give a model back the attention that it had before :func:`apply`, and leave nothing of ours:
    no parameters of alpha, no entry in its config.

    Raises:
        ValueError: :func:`apply` did not set this model.

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> from adasplash2.integrations.transformers import apply, restore
        >>> model = GPT2LMHeadModel(GPT2Config(vocab_size=9, n_embd=8, n_layer=1, n_head=2))
        >>> covered = apply(model, alpha=1.5)
        >>> restore(model)
        >>> model.config._attn_implementation
        'sdpa'
    """
    if BEFORE not in vars(model):
        raise ValueError(f"this {type(model).__name__} was not set by apply")
    _put_back(getattr(model, BEFORE))
    delattr(model, BEFORE)
    alphas.take_from(model)
    store(model, None)


def register(
    name: str = "adasplash2",
    alpha: float = 1.5,
    backend: str | None = None,
    observer: Observer | None = None,
    *,
    packed: bool = True,
) -> None:
    """Make ``name`` an attention implementation of transformers; a second call replaces it.

    For whoever sets implementations by name; :func:`apply` also tells which layers take it.
    Registers the attention and the masks that belong to it. Padding, packed sequences, windows,
    caches, biases, caps, sinks and dropout are passed on; keywords that are not known are refused
    when a model asks for them.

    Rows without a visible key give zeros, and so do queries behind the last key of their sequence,
    which are padding. Attention probabilities are never returned: ``output_attentions=True`` costs
    a warning, where a model tells its layers of it (GPT-2 and OPT do not).

    Args:
        name: what ``model.set_attn_implementation(name)`` takes; not one of transformers' own.
        alpha, backend: as for :func:`adasplash2.entmax_attention`.
        observer: sees the inputs of every attention, see :data:`Observer`.
        packed: as for :func:`apply`.

    Raises:
        ImportError: transformers is not installed.
        TypeError, ValueError: ``alpha`` is not a number of at least 1, ``observer`` no function,
            ``packed`` no bool, or ``name`` is taken.

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> from adasplash2.integrations.transformers import register
        >>> register("sparsemax", alpha=2.0)
        >>> config = GPT2Config(vocab_size=9, n_embd=8, n_layer=2, n_head=2)
        >>> model = GPT2LMHeadModel._from_config(config, attn_implementation="sparsemax")
    """
    attention = Attention(check_alpha(alpha), check_backend(backend) or None, observer)
    _register(name, attention, check_flag("packed", packed))


def unregister(name: str | None = None) -> None:
    """Make transformers forget ``name``, or all names of :func:`apply` and :func:`register`.

    Models that are still set to it cannot run any more: :func:`restore` them before.

    Raises:
        ValueError: ``name`` was not registered here.

    Example:
        >>> from adasplash2.integrations.transformers import register, unregister
        >>> register("sparse-for-a-while", alpha=2.0)
        >>> unregister("sparse-for-a-while")
    """
    from transformers import AttentionInterface, AttentionMaskInterface

    if name is not None and name not in _registered:
        known = ", ".join(sorted(_registered)) or "none are"
        raise ValueError(f"name must be registered ({known}), got {shown(name)}")
    for gone in [name] if name is not None else list(_registered):
        _registered.remove(gone)
        for interface in (AttentionInterface, AttentionMaskInterface):
            # What register fills; transformers has no function that takes a name out of it.
            interface._global_mapping.pop(gone, None)


def _register(name: str, attention: Callable[..., Any], packed: bool) -> None:
    from transformers import AttentionInterface, AttentionMaskInterface

    if not isinstance(name, str):
        raise TypeError(f"name must be a text, got {shown(name)}")
    # Models branch on these names, and others would lose their attention.
    theirs = "", "eager", "sdpa", "flex_attention"
    if name in theirs or "flash" in name or set(name) & set("|:/"):
        raise ValueError(
            "name must not be empty, eager, sdpa or flex_attention nor hold 'flash', '|', ':' or "
            f"'/', which transformers reads in its own way; got {name!r}"
        )
    AttentionInterface.register(name, attention)
    AttentionMaskInterface.register(name, mask_function(packed))
    _registered.add(name)


def _probed(
    coverage: Coverage, model: PreTrainedModel, example: Mapping[str, Any], attention: Attention
) -> Coverage:
    """``coverage`` after ``model(**example)``, in which layers run ``attention``."""
    from transformers import AttentionInterface

    called: set[nn.Module] = set()
    usual = AttentionInterface()[coverage.name]
    attention.called = called.add
    AttentionInterface.register(coverage.name, attention)
    try:
        with torch.no_grad():
            model(**example)
    finally:
        AttentionInterface.register(coverage.name, usual)
    return ran(coverage, model, called)


def _put_back(implementations: list[tuple[Any, str | None]]) -> None:
    for config, implementation in implementations:
        config._attn_implementation_internal = implementation


def store(model: PreTrainedModel, entry: dict[str, Any] | None) -> None:
    """Keeps ``entry`` in a model's config; what is learned is written anew at each saving, see
    :func:`alphas.write_when_saved`."""
    if entry is not None:
        setattr(model.config, alphas.STORED, entry)
    elif hasattr(model.config, alphas.STORED):
        delattr(model.config, alphas.STORED)


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
