"""The attention that transformers' layers call."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from adasplash2.functional import entmax_attention, entmax_attention_varlen
from adasplash2.integrations.transformers.alphas import held_by
from adasplash2.integrations.transformers.masks import Statement, goes_back, statement_of
from adasplash2.options import shown

Observer = Callable[[int | None, Tensor, Tensor, Tensor, dict[str, Any]], object]
"""Called as ``observer(layer_idx, query, key, value, arguments)`` before each attention, with what
:func:`adasplash2.entmax_attention` is called with, or, for packed sequences,
:func:`adasplash2.entmax_attention_varlen`. Layers that their model does not number are numbered in
the order of their first calls."""

HARMLESS = {
    "cache_position": "where the cache was written; comes as a mask",
    "past_key_values": "key and value already hold it",
    "past_key_value": "its name in older models",
    "use_cache": "about what the model returns",
    "output_hidden_states": "about what the model returns",
    "output_router_logits": "about what the model returns",
    "return_dict": "about what the model returns",
    "num_items_in_batch": "for the loss",
    "max_length_q": "says nothing beside cu_seq_lens_q",
    "max_length_k": "says nothing beside cu_seq_lens_k",
    "deterministic": "about how flash attention adds up gradients",
    "layer_idx": "a layer's number",
}
"""Keyword arguments that change nothing in an attention, and why. Any other is refused."""

HINTS = {"head_mask": "leave it out"}


def check_observer(observer: Observer | None) -> Observer | None:
    """What can be called, or None.

    Raises:
        TypeError: it is neither.
    """
    if observer is not None and not callable(observer):
        raise TypeError(f"observer must be a function or None, got {shown(observer)}")
    return observer


class Attention:
    """One registered attention: ``alpha``, None where layers hold their own, ``backend`` and who
    watches."""

    def __init__(
        self,
        alpha: float | None,
        backend: str | None,
        observer: Observer | None,
        called: Callable[[nn.Module], object] | None = None,
    ) -> None:
        self.alpha, self.backend, self.called = alpha, backend, called
        self._has_looked = False  # at positions on a GPU
        self.observer = check_observer(observer)
        self._numbers: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()

    def _number_of(self, module: nn.Module) -> int:
        """Its ``layer_idx``; where its model numbers no layers, how many were called before it."""
        number: int | None = getattr(module, "layer_idx", None)
        return self._numbers.setdefault(module, len(self._numbers)) if number is None else number

    def _refuse_packing(self, said: Statement, position_ids: Tensor, rows: int) -> None:
        """Positions are in query and key already; but what is packed must not be one sequence. On a
        GPU they are looked at once, since that waits for it: a loader that packs does so at once.

        Raises:
            ValueError: they tell of packing that the mask does not part.
        """
        waits = position_ids.device.type != "cpu"
        if not said.is_causal_alone() or (waits and self._has_looked):
            return
        self._has_looked |= waits
        if goes_back(position_ids, rows):
            raise ValueError(
                "position_ids go back to 0 within a row, as those of several packed sequences, "
                "which the mask does not part: transformers looks at them only where the model "
                "fills no cache and no attention_mask is given. Pass use_cache=False, or "
                "cu_seq_lens_q and cu_seq_lens_k; or an attention_mask of ones, if each row is one "
                "sequence"
            )

    def __call__(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        dropout: float = 0.0,
        is_causal: bool | None = None,
        sliding_window: int | None = None,
        softcap: float | None = None,
        s_aux: Tensor | None = None,
        position_bias: Tensor | None = None,
        cu_seq_lens_q: Tensor | None = None,
        cu_seq_lens_k: Tensor | None = None,
        indices: Tensor | None = None,
        output_attentions: bool | None = None,
        position_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """As transformers' own attentions: ``(batch, length_q, heads, head_dim_v)`` and None.

        Raises:
            ValueError: what is asked cannot be computed; the message says what to set.
        """
        if self.called is not None:
            self.called(module)
        for name, argument in kwargs.items():
            if name not in HARMLESS and argument is not None and argument is not False:
                why = HINTS.get(name, "it is not known what it changes in an attention")
                raise ValueError(f"{name} must be None: {why}; got {_kind(argument)}")
        if (cu_seq_lens_q is None) != (cu_seq_lens_k is None):
            raise ValueError("cu_seq_lens_q and cu_seq_lens_k must be given together")
        if output_attentions:
            warn_no_probabilities()

        if attention_mask is None:
            said = _unmasked(module, is_causal, sliding_window, query.shape[2], key.shape[2])
        else:  # says all, a window too
            said = _masked(attention_mask, query, key.shape[2])
        alpha: float | Tensor | None = self.alpha
        if alpha is None:
            if (own := held_by(module)) is None:
                raise ValueError(f"{type(module).__name__} has no alphas: call apply for its model")
            alpha = own().to(query.device)
        arguments: dict[str, Any] = {
            "is_causal": said.is_causal,
            "scale": scaling,
            "enable_gqa": query.shape[1] != key.shape[1],
            "alpha": alpha,
            "backend": self.backend,
        }
        # What is not asked is left out: it leaves the call as it would be without.
        if said.is_causal or said.window:
            arguments |= {"causal_align": said.causal_align, "window": said.window}
        if softcap:
            arguments["softcap"] = softcap
        if s_aux is not None:
            arguments["sinks"] = s_aux
        if dropout:
            arguments["dropout_p"] = dropout
        tensors = {
            name: tensor.to(query.device)
            for name in ("q_lengths", "kv_lengths", "kv_starts")
            if (tensor := getattr(said, name)) is not None
        }
        whole = [position_bias, None if indices is None else _chosen(indices, key.shape[2])]
        if said.start or said.stop is not None:
            key, value = (t[:, :, said.start : said.stop] for t in (key, value))
            whole = [mask if mask is None else mask[..., said.start : said.stop] for mask in whole]
        masks = [said.attn_mask, *whole]
        batch, _, rows, _ = query.shape
        if cu_seq_lens_q is None or cu_seq_lens_k is None:
            cu_seq_lens_q = cu_seq_lens_k = said.cu_seqlens
            if cu_seq_lens_q is None and position_ids is not None:
                self._refuse_packing(said, position_ids, rows)
        packed = False
        if cu_seq_lens_q is not None and cu_seq_lens_k is not None:
            cu_seqlens = {"cu_seqlens_q": cu_seq_lens_q, "cu_seqlens_k": cu_seq_lens_k}
            cu_seqlens = {n: t.to(query.device, torch.int32) for n, t in cu_seqlens.items()}
            packed = not tensors and all(mask is None for mask in masks)
            if packed:
                tensors = cu_seqlens
                query, key, value = (t.transpose(1, 2).flatten(0, 1) for t in (query, key, value))
            else:
                masks.append(_same_sequence(query, key, *cu_seqlens.values()))
        mask = _combined(masks, query)
        if mask is not None:
            tensors["attn_mask"] = mask
        arguments |= tensors
        if self.observer is not None:
            self.observer(self._number_of(module), query, key, value, arguments)
        if packed:
            out: Tensor = entmax_attention_varlen(query, key, value, **arguments)
            return out.unflatten(0, (batch, -1)), None
        out = entmax_attention(query, key, value, **arguments)
        return out.transpose(1, 2).contiguous(), None


def _unmasked(
    module: nn.Module,
    is_causal: bool | None,
    sliding_window: int | None,
    length_q: int,
    length_k: int,
) -> Statement:
    """What the call says, or the module. Only models that never asked for a mask come here: ours
    is never None. Of a module it is taken only that nothing is hidden."""
    window = None
    if sliding_window is not None and sliding_window < length_k:
        window = sliding_window - 1, sliding_window - 1
    causal = getattr(module, "is_causal", None) if is_causal is None else is_causal
    if length_q == 1 or causal is False:
        return Statement(window=window)
    if causal is None:
        raise ValueError(
            f"{type(module).__name__} gives neither attention_mask nor is_causal: set "
            "module.is_causal to say whether queries may see later keys"
        )
    if is_causal is None:
        # Eager would hide nothing and SDPA later keys: they differ, so neither is taken.
        raise ValueError(
            f"{type(module).__name__} gives no attention_mask though it says is_causal: "
            "give the model an attention_mask"
        )
    if length_q != length_k:
        raise ValueError(
            "is_causal=True without attention_mask needs as many queries as keys, else it "
            f"does not say which keys a query sees; got {length_q} and {length_k}"
        )
    return Statement(is_causal=True, window=window)


def _masked(mask: Tensor, query: Tensor, length_k: int) -> Statement:
    """What a mask says, which says all: causality and windows too, as eager attention takes it."""
    length_q = query.shape[2]
    if mask.dim() != 4 or mask.shape[2] not in (1, length_q) or mask.shape[3] < length_k:
        raise ValueError(
            "attention_mask must be (batch, heads, length_q, length_k) = "
            f"(_, _, {length_q}, {length_k}), got {tuple(mask.shape)}"
        )
    if mask.shape[3] != length_k:  # as eager cuts it
        mask = mask[..., :length_k]
    return statement_of(mask)


def _combined(masks: list[Tensor | None], query: Tensor) -> Tensor | None:
    """All masks, of bools or added to scores, as one ``attn_mask`` on the device of ``query``."""
    found: Tensor | None = None
    for mask in masks:
        if mask is None:
            continue
        mask = mask.to(query.device)
        if found is None:
            found = mask
        elif found.dtype == mask.dtype == torch.bool:
            found = found & mask
        elif mask.dtype == torch.bool:
            found = torch.where(mask, found, -torch.inf)
        elif found.dtype == torch.bool:
            found = torch.where(found, mask, -torch.inf)
        else:
            found = found + mask
    if found is not None and found.dtype not in (torch.bool, query.dtype):
        found = found.float()
    return found


def _chosen(indices: Tensor, length_k: int) -> Tensor:
    """The mask of models that choose keys by an indexer: ``(batch, length_q, choices)`` are the
    keys of each query, where below 0 is none."""
    places = torch.where(indices < 0, length_k, indices).long()
    seen = torch.zeros(*indices.shape[:2], length_k + 1, dtype=torch.bool, device=indices.device)
    return seen.scatter(-1, places, True)[:, None, :, :length_k]


def _same_sequence(query: Tensor, key: Tensor, *cu_seqlens: Tensor) -> Tensor:
    """The mask of packed sequences, where something else is said of their tokens too."""
    numbers = []
    for tensor, ends in zip((query, key), cu_seqlens, strict=True):
        batch, _, length, _ = tensor.shape
        tokens = torch.arange(batch * length, device=ends.device, dtype=ends.dtype)
        number = torch.searchsorted(ends[1:].contiguous(), tokens, right=True)
        numbers.append(number.unflatten(0, (batch, length)))
    same: Tensor = numbers[0][:, None, :, None] == numbers[1][:, None, None, :]
    return same


def _kind(argument: object) -> str:
    if isinstance(argument, Tensor):
        return f"a tensor of shape {tuple(argument.shape)}"
    return repr(argument)


def warn_no_probabilities() -> None:
    """Once in a process, as Python's default filter does; compilers leave it out."""
    if not torch.compiler.is_compiling():
        warnings.warn(
            "adasplash2 makes no attention probabilities: output_attentions gives nothing for "
            'its layers; set_attn_implementation("eager") gives those of softmax',
            stacklevel=2,
        )
