"""The attention that transformers' layers call."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from adasplash2.functional import entmax_attention
from adasplash2.integrations.transformers.masks import Visible, statement_of

Observer = Callable[[int | None, Tensor, Tensor, Tensor, bool, float | None], object]
"""Called as ``observer(layer_idx, query, key, value, is_causal, scale)`` before each attention:
key and value as far as they are visible, and with ``is_causal`` the last query sees all of them
and each earlier one a key less."""

HARMLESS = {
    "position_ids": "already in query and key; packing that it tells comes as a mask",
    "cache_position": "where the cache was written; comes as a mask",
    "past_key_values": "key and value already hold it",
    "past_key_value": "its name in older models",
    "use_cache": "about what the model returns",
    "output_hidden_states": "about what the model returns",
    "output_router_logits": "about what the model returns",
    "return_dict": "about what the model returns",
    "num_items_in_batch": "for the loss",
    "max_length_q": "says nothing beside cu_seq_lens_q, which is refused",
    "max_length_k": "says nothing beside cu_seq_lens_k, which is refused",
    "deterministic": "about how flash attention adds up gradients",
    "layer_idx": "a layer's number",
}
"""Keyword arguments that change nothing in an attention, and why. Any other is refused."""

HINTS = {
    "cu_seq_lens_q": "packed sequences are not supported yet: give them as a batch",
    "cu_seq_lens_k": "packed sequences are not supported yet: give them as a batch",
    "head_mask": "leave it out",
    "softcap": "capped scores are not supported yet",
    "s_aux": "attention sinks are not supported yet",
    "sinks": "attention sinks are not supported yet",
    "position_bias": "biases are not supported yet",
}

ROWS_PER_CALL = 32
"""A call for one query costs about as much as so many queries of a call for many."""


class Attention:
    """One registered attention: ``alpha``, ``backend`` and who watches."""

    def __init__(
        self,
        alpha: float,
        backend: str | None,
        observer: Observer | None,
        called: Callable[[nn.Module], object] | None = None,
    ) -> None:
        self.alpha, self.backend, self.observer, self.called = alpha, backend, observer, called

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
        output_attentions: bool | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """As transformers' own attentions: ``(batch, length_q, heads, head_dim_v)`` and None.

        Raises:
            ValueError: what is asked cannot be computed; the message says what to set.
        """
        if self.called is not None:
            self.called(module)
        if dropout:
            raise ValueError(
                "dropout must be 0, dropout is not supported: set attention_dropout=0 (in some "
                "models attention_probs_dropout_prob or attn_pdrop) in the model's config or call "
                f"model.eval(); got {dropout}"
            )
        for name, argument in kwargs.items():
            if name not in HARMLESS and argument is not None and argument is not False:
                why = HINTS.get(name, "it is not known what it changes in an attention")
                raise ValueError(f"{name} must be None: {why}; got {_kind(argument)}")
        if output_attentions:
            _warn_no_probabilities()

        visible = _visible(module, attention_mask, is_causal, query.shape[2], key.shape[2])
        if visible.start or visible.stop is not None:
            key = key[:, :, visible.start : visible.stop]
            value = value[:, :, visible.start : visible.stop]
        _check_window(sliding_window, key.shape[2])
        if self.observer is not None:
            layer = getattr(module, "layer_idx", None)
            self.observer(layer, query, key, value, visible.causal, scaling)
        out = self._run(query, key, value, visible.causal, scaling)
        return out.transpose(1, 2).contiguous(), None

    def _run(
        self, query: Tensor, key: Tensor, value: Tensor, causal: bool, scale: float | None
    ) -> Tensor:
        """With ``causal`` the last query sees all keys and each earlier one a key less."""
        options: dict[str, Any] = {
            "alpha": self.alpha,
            "scale": scale,
            "enable_gqa": query.shape[1] != key.shape[1],
            "backend": self.backend,
        }
        length = query.shape[2]
        earlier = key.shape[2] - length
        if not causal or earlier == 0:
            out: Tensor = entmax_attention(query, key, value, is_causal=causal, **options)
            return out
        # entmax_attention aligns causality at the first key. A few new tokens against a longer
        # cache go one by one; many get queries for the earlier keys too, which are dropped.
        if length * ROWS_PER_CALL < earlier:
            rows = [
                entmax_attention(
                    query[:, :, i : i + 1],
                    key[:, :, : earlier + i + 1],
                    value[:, :, : earlier + i + 1],
                    **options,
                )
                for i in range(length)
            ]
            return torch.cat(rows, dim=2)
        # The first query again: its rows are about as sparse as the others.
        filler = query[:, :, :1].expand(-1, -1, earlier, -1)
        whole = torch.cat([filler, query], dim=2)
        out = entmax_attention(whole, key, value, is_causal=True, **options)
        return out[:, :, earlier:]


def _visible(
    module: nn.Module,
    mask: Tensor | None,
    is_causal: bool | None,
    length_q: int,
    length_k: int,
) -> Visible:
    """Which keys are visible: as the mask says, else as the call or the module says."""
    if mask is None:
        # Only models that never asked for a mask come here: ours is never None. What a call says
        # is taken, of a module only that nothing is hidden.
        causal = getattr(module, "is_causal", None) if is_causal is None else is_causal
        if length_q == 1 or causal is False:
            return Visible(0, None, False)
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
        return Visible(0, None, True)
    if mask.dim() != 4 or mask.shape[2] not in (1, length_q) or mask.shape[3] < length_k:
        raise ValueError(
            "attention_mask must be (batch, heads, length_q, length_k) = "
            f"(_, _, {length_q}, {length_k}), got {tuple(mask.shape)}"
        )
    if mask.shape[3] != length_k:  # as eager cuts it
        mask = mask[..., :length_k]
    visible, refusal, proof = statement_of(mask)
    if visible is None:
        raise ValueError(f"attention_mask cannot be computed: {refusal}")
    if proof is not None:
        torch._assert_async(
            proof,
            "adasplash2: what was compiled or exported holds for inputs without padding and "
            "packing only, and for queries at the end of the keys",
        )
    return visible


def _check_window(window: int | None, keys: int) -> None:
    """A window comes with the mask too; here only whoever gave no such mask is caught."""
    if window is not None and window < keys:
        raise ValueError(
            f"sliding_window must be None or at least the number of visible keys ({keys}), "
            f"windows are not supported yet; got {window}"
        )


def _kind(argument: object) -> str:
    if isinstance(argument, Tensor):
        return f"a tensor of shape {tuple(argument.shape)}"
    return repr(argument)


def _warn_no_probabilities() -> None:
    """Once in a process, as Python's default filter does; compilers leave it out."""
    if not torch.compiler.is_compiling():
        warnings.warn(
            "adasplash2 makes no attention probabilities: output_attentions gives None for its "
            'layers; set_attn_implementation("eager") gives those of softmax',
            stacklevel=2,
        )
