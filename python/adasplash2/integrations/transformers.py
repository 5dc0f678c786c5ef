"""entmax attention in the models of Hugging Face transformers.

>>> from adasplash2.integrations.transformers import register
>>> register("adasplash2", alpha=1.5)
>>> model.set_attn_implementation("adasplash2")
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from adasplash2.functional import entmax_attention
from adasplash2.problem import check_alpha

Observer = Callable[[int | None, Tensor, Tensor, Tensor, bool, float | None], object]
"""Called as ``observer(layer_idx, query, key, value, is_causal, scale)`` before each attention."""

UNSUPPORTED = (
    "softcap",
    "s_aux",
    "position_bias",
    "head_mask",
    "cu_seq_lens_q",
    "cu_seq_lens_k",
    "output_attentions",
)
"""Keyword arguments of attention functions that change the result and have no counterpart here."""


def register(
    name: str = "adasplash2",
    alpha: float = 1.5,
    backend: str | None = None,
    observer: Observer | None = None,
) -> None:
    """Make ``name`` an attention implementation of transformers; a second call replaces it.

    Registers the attention and the masks that belong to it (those of ``sdpa``: None where
    causality says all). Without the latter, transformers would drop padding without a word.
    What cannot be computed yet is refused when a model asks for it: padding and other masks,
    dropout, windows that bite, several new tokens against a cache.

    Args:
        name: what ``model.set_attn_implementation(name)`` takes.
        alpha, backend: as for :func:`adasplash2.entmax_attention`.
        observer: sees the inputs of every attention, see :data:`Observer`.

    Raises:
        ImportError: transformers is not installed.
        TypeError, ValueError: ``alpha`` is not a number of at least 1.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    alpha = check_alpha(alpha)

    def attention(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        dropout: float = 0.0,
        is_causal: bool | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        if is_causal is None:
            is_causal = getattr(module, "is_causal", True)
        length_q, length_k = query.shape[2], key.shape[2]
        _refuse(attention_mask, dropout, length_k, kwargs)
        causal = _top_left(is_causal, length_q, length_k)
        if observer is not None:
            observer(getattr(module, "layer_idx", None), query, key, value, causal, scaling)
        out = entmax_attention(
            query,
            key,
            value,
            alpha=alpha,
            is_causal=causal,
            scale=scaling,
            enable_gqa=query.shape[1] != key.shape[1],
            backend=backend,
        )
        return out.transpose(1, 2).contiguous(), None

    AttentionInterface.register(name, attention)
    AttentionMaskInterface.register(name, sdpa_mask)


def _top_left(is_causal: bool, length_q: int, length_k: int) -> bool:
    """``is_causal`` as :func:`adasplash2.entmax_attention` means it.

    transformers aligns causality bottom-right: new tokens stand at the end of the cache. That is
    the same as top-left for equal lengths, and no mask at all for a single new token.
    """
    if not is_causal or length_q == 1:
        return False
    if length_q != length_k:
        raise ValueError(
            "several new tokens against a longer cache are not supported yet: the lengths of "
            f"query and key must be equal or that of query 1, got {length_q} and {length_k}"
        )
    return True


def _refuse(
    attention_mask: Tensor | None, dropout: float, length_k: int, kwargs: dict[str, Any]
) -> None:
    if attention_mask is not None:
        raise ValueError(
            "attention_mask must be None, masks are not supported yet; got a mask of shape "
            f"{tuple(attention_mask.shape)} (from padding, packing, a window, or several new "
            "tokens against a cache)"
        )
    if dropout:
        raise ValueError(f"dropout must be 0, dropout is not supported; got {dropout}")
    window = kwargs.get("sliding_window")
    if window is not None and window < length_k:
        raise ValueError(
            f"sliding_window must be None or at least the length of key ({length_k}), windows "
            f"are not supported yet; got {window}"
        )
    for name in UNSUPPORTED:
        argument = kwargs.get(name)
        if argument is not None and argument is not False:
            raise ValueError(
                f"{name} must be None, it is not supported; got {type(argument).__name__}"
            )
