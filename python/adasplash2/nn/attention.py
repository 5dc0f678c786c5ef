"""torch.nn.MultiheadAttention with entmax in softmax's place."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adasplash2.functional import dense_weights, entmax_attention
from adasplash2.lowering import check_slopes
from adasplash2.nn.alpha import LearnedAlpha
from adasplash2.nn.length import LengthScale
from adasplash2.nn.monitor import Observer
from adasplash2.options import (
    Said,
    check_alpha,
    check_backend,
    check_count,
    check_dropout,
    check_dtype,
    check_flag,
    check_scale,
    shown,
)
from adasplash2.problem import MAX_HEAD_DIM
from adasplash2.softmax import attended

LEARNED = "alpha.logits", "length_scale.weight", "q_norm.weight", "k_norm.weight"
"""Entries of a state dict that torch's module has not."""
NORM_EPS = 1e-6
"""Added to the mean square of queries and keys, in every dtype."""


class EntmaxMultiheadAttention(nn.MultiheadAttention):
    r"""Multi-head attention with alpha-entmax: :class:`torch.nn.MultiheadAttention`'s arguments,
    shapes, masks and state dict, and its results for ``alpha=1``, which is softmax.

    What is otherwise than there:

    - ``is_causal=True`` needs no ``attn_mask``. With one it is a promise, as there, that the mask
      is causal: the mask is then not read.
    - With ``add_bias_kv`` or ``add_zero_attn`` every query sees the added key, whatever
      ``is_causal`` and ``need_weights`` say. There ``is_causal=True`` with ``need_weights=False``
      and no ``key_padding_mask`` hides it, as it hides keys behind the query.
    - A row without an allowed key gives zeros before the output projection; there it may be NaN.
    - NaN and inf in what is hidden stay there, but for ``alpha=1`` with ``need_weights=False``,
      which is torch's SDPA.
    - ``dropout`` is below 1.
    - Nested tensors are refused. It never takes torch's fused inference path, which knows softmax
      alone, also within :class:`torch.nn.TransformerEncoderLayer`: for that its
      ``_qkv_same_embed_dim`` is False, also where there is one ``in_proj_weight`` for all.

    State dict: that of torch's module where ``alpha`` is fixed, ``length_scale`` and ``qk_norm``
    are False and there are no ``alibi_slopes``, so that checkpoints load both ways, strictly. The
    fixed ``alpha`` travels in the dict's metadata (``torch.save`` keeps it, formats that hold
    tensors alone do not) and is set when it is loaded. ``alpha="learn"`` adds ``alpha.logits``,
    ``length_scale=True`` ``length_scale.weight``, ``qk_norm=True`` ``q_norm.weight`` and
    ``k_norm.weight``, and slopes ``alibi_slopes``: these keep their start where a dict has none, as
    torch's, and torch's module takes ours with ``strict=False``.

    Args:
        embed_dim: features of the queries and of the output, a multiple of ``num_heads``.
        num_heads: each of ``embed_dim / num_heads`` features, 256 at most.
        dropout: of the probabilities, while training.
        bias: of the projections.
        add_bias_kv: one more key and value, learned, which every query sees.
        add_zero_attn: one more key and value of zeros, which every query sees.
        kdim, vdim: features of keys and values; ``embed_dim`` where None.
        batch_first: tensors are ``(batch, length, features)``, not ``(length, batch, features)``.
        device, dtype: of the parameters.
        alpha: a number of at least 1 (an attribute, which :class:`adasplash2.nn.AlphaSchedule`
            drives), or ``"learn"``: one of each head, a :class:`adasplash2.nn.LearnedAlpha` from
            1.5, which says what learning rate it wants.
        scale: of the scores; ``1 / sqrt(head_dim)`` where None.
        length_scale: multiply ``scale`` by :class:`adasplash2.nn.LengthScale` of the queries. The
            keys that a query sees are counted from the masks: those that a mask of floats adds
            -inf to are hidden, others are seen, also where it adds a large negative number.
        qk_norm: divide every query and key of a head by its root mean square (1e-6 is added to the
            mean square), and multiply by a learned gain of each feature, which starts at 1 and
            which all heads share. Scores then start within ``scale * head_dim`` of 0, and rows
            begin with many keys: what to choose for a model from random start. Weights that were
            trained without it compute something else with it.
        alibi_slopes: ``(num_heads,)``, as :func:`adasplash2.nn.nape_slopes`; a constant, which no
            optimizer sees, and a state dict that is loaded replaces. Not with ``add_bias_kv`` or
            ``add_zero_attn``, whose keys have no place.
        backend: as for :func:`adasplash2.entmax_attention`.

    Raises:
        TypeError, ValueError: an argument is not what it must be.
        AssertionError: ``embed_dim`` is no multiple of ``num_heads`` (torch's own).

    Example:
        >>> import torch, adasplash2
        >>> attention = adasplash2.nn.EntmaxMultiheadAttention(32, 4, batch_first=True)
        >>> x = torch.randn(2, 10, 32)
        >>> out, weights = attention(x, x, x, is_causal=True, average_attn_weights=False)
        >>> out.shape, weights.shape, bool((weights == 0).any())
        (torch.Size([2, 10, 32]), torch.Size([2, 4, 10, 10]), True)
        >>> softmax = torch.nn.MultiheadAttention(32, 4)
        >>> attention.load_state_dict(softmax.state_dict())
        <All keys matched successfully>

    Sources:
        Vaswani et al. 2017, *Attention Is All You Need*; Correia, Niculae, Martins 2019,
        *Adaptively Sparse Transformers* (entmax in its place, alpha by head); Henry, Dachapally,
        Pawar, Chen 2020, *Query-Key Normalization for Transformers*; Dehghani et al. 2023, *Scaling
        Vision Transformers to 22 Billion Parameters* (norms of queries and keys with learned
        gains); Zhang, Sennrich 2019, *Root Mean Square Layer Normalization*.
    """

    alpha: float | LearnedAlpha
    observer: Observer | None
    """Sees the inputs of every attention outside of traces, see
    :class:`adasplash2.nn.AttentionMonitor`."""

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        alpha: float | str = 1.5,
        scale: float | None = None,
        length_scale: bool = False,
        qk_norm: bool = False,
        alibi_slopes: Tensor | None = None,
        backend: str | None = None,
    ) -> None:
        sizes = {"embed_dim": embed_dim, "num_heads": num_heads, "kdim": kdim, "vdim": vdim}
        flags = {
            **{"bias": bias, "add_bias_kv": add_bias_kv},
            **{"add_zero_attn": add_zero_attn, "batch_first": batch_first},
        }
        for name, size in sizes.items():
            if size is not None or name not in ("kdim", "vdim"):
                check_count(name, size, at_least=1)  # type: ignore[arg-type]
        for name, flag in flags.items():
            check_flag(name, flag)
        dropout, dtype = check_dropout(dropout, "dropout"), check_dtype(dtype)
        super().__init__(
            embed_dim, num_heads, dropout, bias, add_bias_kv, add_zero_attn, kdim, vdim,
            batch_first, device, dtype,
        )  # fmt: skip
        if self.head_dim > MAX_HEAD_DIM:
            raise ValueError(
                f"embed_dim must be at most {MAX_HEAD_DIM} times num_heads, got {embed_dim} and "
                f"{num_heads}"
            )
        # torch's encoder layers ask for this before they compute softmax by themselves.
        self._qkv_same_embed_dim = False
        if isinstance(alpha, str):
            if alpha != "learn":
                raise ValueError(f"alpha must be a number or 'learn', got {shown(alpha)}")
            self.alpha = LearnedAlpha(num_heads, device=device, dtype=dtype)
        else:
            self.alpha = check_alpha(alpha)
        self.scale = check_scale(scale, self.head_dim)
        self.length_scale = None
        if check_flag("length_scale", length_scale):
            self.length_scale = LengthScale(embed_dim, num_heads, device=device, dtype=dtype)
        self.q_norm = self.k_norm = None
        if check_flag("qk_norm", qk_norm):
            self.q_norm, self.k_norm = (
                nn.RMSNorm(self.head_dim, NORM_EPS, device=device, dtype=dtype) for _ in range(2)
            )
        if alibi_slopes is not None:
            if add_bias_kv or add_zero_attn:
                name = "add_bias_kv" if add_bias_kv else "add_zero_attn"
                raise ValueError(f"{name} must be False with alibi_slopes: its key has no place")
            alibi_slopes = check_slopes(alibi_slopes).to(device)
            if alibi_slopes.shape != (num_heads,):
                raise ValueError(
                    f"alibi_slopes must have the shape ({num_heads},), got "
                    f"{tuple(alibi_slopes.shape)}"
                )
        self.register_buffer("alibi_slopes", alibi_slopes)
        self.backend = check_backend(backend) or None
        self.observer = None

    def _reset_parameters(self) -> None:
        # torch's own reads which projections there are from what tells its fused path from others.
        fused = self._qkv_same_embed_dim
        self._qkv_same_embed_dim = self.in_proj_weight is not None
        try:
            super()._reset_parameters()
        finally:
            self._qkv_same_embed_dim = fused

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool | str = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As torch's module. ``L`` queries, ``S`` keys, ``N`` sequences, ``H`` heads.

        Args:
            query: ``(L, N, embed_dim)``, ``(N, L, embed_dim)`` with ``batch_first``, or
                ``(L, embed_dim)`` for one sequence.
            key: likewise, ``S`` and ``kdim``.
            value: likewise, ``S`` and ``vdim``.
            key_padding_mask: ``(N, S)``, or ``(S,)`` for one sequence. bool: True is padding, which
                nobody sees. Floats are added to the scores of that key.
            need_weights: True returns the exact probabilities too, in a dense tensor of true zeros
                with a gradient, as dropout leaves them: scores are then held densely, as in torch.
                False is fast. ``"sparse"`` is fast too and returns what lies above zero, before
                dropout and without gradient, as a sparse CSR tensor of float64 (not in compiled
                graphs, nor for softmax).
            attn_mask: ``(L, S)`` or ``(N * H, L, S)``; bool: True is hidden. Floats are added to
                the scores.
            average_attn_weights: average the weights over heads; must be False for ``"sparse"``.
            is_causal: query ``i`` sees keys ``j <= i``.

        Returns:
            The output, shaped as ``query``, and the weights, ``(N, L, S)`` or, not averaged,
            ``(N, H, L, S)``, without ``N`` for one sequence; sparse: ``(N * H * L, S)``. Keys that
            ``add_bias_kv`` and ``add_zero_attn`` add stand behind the others. None where they are
            not needed.

        Raises:
            TypeError: a tensor is nested, or a mask is neither bool nor of floats.
            ValueError: shapes do not fit, or ``"sparse"`` is asked of what it cannot give.
        """
        sparse = need_weights == "sparse"
        average_attn_weights = check_flag("average_attn_weights", average_attn_weights)
        if not sparse:
            need_weights = check_flag("need_weights", need_weights)
        elif average_attn_weights:
            raise ValueError('average_attn_weights must be False where need_weights is "sparse"')
        batched = self._check_shapes(query, key, value)
        q, k, v = self._projected(query, key, value, batched)
        length_q, length_k = q.shape[2], k.shape[2]
        hidden, added = self._masks(key_padding_mask, attn_mask, is_causal, q, length_k, batched)
        more = 0
        if self.bias_k is not None and self.bias_v is not None:
            k = torch.cat([k, self._of_all(self.bias_k, k)], dim=2)
            v = torch.cat([v, self._of_all(self.bias_v, v)], dim=2)
            more += 1
        if self.add_zero_attn:
            k, v = (F.pad(t, (0, 0, 0, 1)) for t in (k, v))
            more += 1
        if more and is_causal:  # the added keys stand behind the diagonal
            causal = torch.ones(length_q, length_k, dtype=torch.bool, device=q.device).triu(1)
            hidden, is_causal = causal if hidden is None else hidden | causal, False
        if more:
            hidden, added = (None if t is None else F.pad(t, (0, more)) for t in (hidden, added))
        if self.q_norm is not None and self.k_norm is not None:
            q, k = _normed(q, self.q_norm), _normed(k, self.k_norm)

        arguments: dict[str, Any] = {
            "is_causal": is_causal,
            "scale": self.scale,
            "alpha": self.alpha() if isinstance(self.alpha, LearnedAlpha) else self.alpha,
            "backend": self.backend,
        }
        if hidden is not None and added is not None:
            arguments["attn_mask"] = added.masked_fill(hidden, -math.inf)
        elif hidden is not None or added is not None:
            arguments["attn_mask"] = added if hidden is None else ~hidden
        if self.length_scale is not None:
            features = query if self.batch_first or not batched else query.transpose(0, 1)
            seen = _seen(arguments.get("attn_mask"), is_causal, length_q, k)
            factor = self.length_scale(features if batched else features[None], seen)
            arguments["scale"] = self.scale * factor
        if self.alibi_slopes is not None:
            arguments["alibi_slopes"] = self.alibi_slopes
        if self.training and self.dropout:
            arguments["dropout_p"] = self.dropout
        if self.observer is not None and not torch.compiler.is_compiling():
            self.observer(None, q, k, v, arguments)

        weights = None
        if sparse:
            out, aux = entmax_attention(q, k, v, return_aux=True, **arguments)
            weights = aux.probabilities()
        elif need_weights:
            weights = dense_weights(q, k, v, Said(**arguments))
            out = attended(weights, v)
            weights = weights.mean(dim=1) if average_attn_weights else weights
            weights = weights if batched else weights[0]
        else:
            out = entmax_attention(q, k, v, **arguments)
        out = self.out_proj(out.transpose(1, 2).flatten(2))
        if not batched:
            return out[0], weights
        return out if self.batch_first else out.transpose(0, 1), weights

    def _check_shapes(self, query: Tensor, key: Tensor, value: Tensor) -> bool:
        """Whether the tensors have a batch."""
        tensors = {"query": query, "key": key, "value": value}
        for name, tensor in tensors.items():
            if not isinstance(tensor, Tensor):
                raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
            if tensor.is_nested:
                raise TypeError(
                    f"{name} must not be nested: adasplash2.entmax_attention takes jagged tensors. "
                    "A torch.nn.TransformerEncoder whose layers are given this attention nests "
                    "none with enable_nested_tensor=False"
                )
        dims = query.dim()
        features = (self.embed_dim, self.kdim, self.vdim)
        for (name, tensor), width in zip(tensors.items(), features, strict=True):
            if dims not in (2, 3) or tensor.dim() != dims or tensor.shape[-1] != width:
                shape = "(length, {0})" if dims == 2 else "(batch, length, {0}) in their order"
                raise ValueError(
                    f"{name} must be {shape.format(width)}, got the shape {tuple(tensor.shape)}"
                )
        if key.shape[:-1] != value.shape[:-1]:
            raise ValueError(
                f"value must have key's length and batch {tuple(key.shape[:-1])}, got "
                f"{tuple(value.shape[:-1])}"
            )
        at = 0 if self.batch_first else 1
        if dims == 3 and query.shape[at] != key.shape[at]:
            raise ValueError(f"key must have query's batch {query.shape[at]}, got {key.shape[at]}")
        return dims == 3

    def _projected(
        self, query: Tensor, key: Tensor, value: Tensor, batched: bool
    ) -> tuple[Tensor, ...]:
        """Queries, keys and values of the heads: ``(batch, heads, length, head_dim)``."""
        if self.in_proj_weight is None:
            weights = self.q_proj_weight, self.k_proj_weight, self.v_proj_weight
        elif query is key and key is value:  # one product for all
            joint = F.linear(query, self.in_proj_weight, self.in_proj_bias)
            return tuple(self._heads(t, batched) for t in joint.chunk(3, dim=-1))
        else:
            weights = self.in_proj_weight.chunk(3)
        biases = (None,) * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        return tuple(
            self._heads(F.linear(t, weight, bias), batched)
            for t, weight, bias in zip((query, key, value), weights, biases, strict=True)
        )

    def _of_all(self, added: Tensor, like: Tensor) -> Tensor:
        """A learned key or value as the heads of every sequence of ``like`` see it."""
        shape = like.shape[0], self.num_heads, 1, self.head_dim
        return added.to(like.dtype).view(1, *shape[1:]).expand(shape)

    def _heads(self, features: Tensor, batched: bool) -> Tensor:
        split: Tensor = features.unflatten(-1, (self.num_heads, self.head_dim))
        if not batched:
            return split.transpose(0, 1)[None]
        return split.transpose(1, 2) if self.batch_first else split.permute(1, 2, 0, 3)

    def _masks(
        self,
        key_padding_mask: Tensor | None,
        attn_mask: Tensor | None,
        is_causal: bool,
        q: Tensor,
        length_k: int,
        batched: bool,
    ) -> tuple[Tensor | None, Tensor | None]:
        """What is hidden, and what is added to scores, of both masks: each in the dimensions
        ``(N, H, L, S)``, of their size or 1."""
        batch, _, length_q, _ = q.shape
        hidden, added = None, None
        if attn_mask is not None:
            allowed = [(length_q, length_k), (batch * self.num_heads, length_q, length_k)]
            _check_mask("attn_mask", attn_mask, allowed, None if is_causal else q)
            if not is_causal:  # else that is what it says
                if attn_mask.dim() == 3:
                    attn_mask = attn_mask.unflatten(0, (batch, self.num_heads))
                hidden, added = (
                    (attn_mask, None) if attn_mask.dtype == torch.bool else (None, attn_mask)
                )
        if key_padding_mask is not None:
            allowed = [(batch, length_k) if batched else (length_k,)]
            _check_mask("key_padding_mask", key_padding_mask, allowed, q)
            padding = key_padding_mask.reshape(batch, 1, 1, length_k)
            if padding.dtype == torch.bool:
                hidden = padding if hidden is None else hidden | padding
            else:
                added = padding if added is None else added + padding
        if added is not None:  # masks of float16 or bfloat16 beside queries of another dtype
            added = added.to(torch.promote_types(added.dtype, torch.float32))
        return hidden, added

    def extra_repr(self) -> str:
        alpha = "" if isinstance(self.alpha, nn.Module) else f", alpha={self.alpha:g}"
        return f"{self.embed_dim}, {self.num_heads}{alpha}"

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles are watched by nobody."""
        return self.__dict__ | {"observer": None}

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if not isinstance(self.alpha, nn.Module) and hasattr(destination, "_metadata"):
            destination._metadata[prefix[:-1]]["alpha"] = self.alpha

    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        local_metadata: dict[str, Any],
        *rest: Any,
    ) -> None:
        ours = {name: t for name, t in self.named_parameters() if name in LEARNED}
        if not any(prefix + name in state_dict for name in ours):
            state_dict.update((prefix + name, t.detach()) for name, t in ours.items())
        if self.alibi_slopes is not None:
            state_dict.setdefault(prefix + "alibi_slopes", self.alibi_slopes)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *rest)
        if "alpha" in local_metadata and not isinstance(self.alpha, nn.Module):
            self.alpha = check_alpha(local_metadata["alpha"])


def _normed(heads: Tensor, norm: nn.RMSNorm) -> Tensor:
    """In the dtype of ``heads``, which autocast makes another one than the gains'."""
    return F.rms_norm(heads, norm.normalized_shape, norm.weight.to(heads.dtype), norm.eps)


def _check_mask(
    name: str, mask: Tensor, allowed: list[tuple[int, ...]], like: Tensor | None
) -> None:
    """One of the shapes ``allowed``, and where it is read what can be added to scores of ``like``:
    afterwards both masks are one, of which no error could tell which it was."""
    if not isinstance(mask, Tensor) or not (mask.dtype == torch.bool or mask.is_floating_point()):
        raise TypeError(
            f"{name} must be a tensor of bools or floats, got "
            f"{shown(getattr(mask, 'dtype', type(mask).__name__))}"
        )
    if tuple(mask.shape) not in allowed:
        shapes = " or ".join(map(str, allowed))
        raise ValueError(f"{name} must have the shape {shapes}, got {tuple(mask.shape)}")
    if like is None:
        return
    dtypes = torch.bool, torch.bfloat16, torch.float16, torch.float32, like.dtype
    if mask.dtype not in dtypes:
        names = ", ".join(dict.fromkeys(map(str, dtypes)))
        raise TypeError(f"{name} must have one of the dtypes {names}, got {mask.dtype}")
    if mask.layout != torch.strided:
        raise TypeError(f"{name} must be a strided tensor, got layout {mask.layout}")
    if mask.device != like.device:
        raise ValueError(
            f"{name} must be on the device of query ({like.device}), got {mask.device}"
        )


def _seen(mask: Tensor | None, is_causal: bool, length_q: int, key: Tensor) -> Tensor | int:
    """How many keys each query sees: a number, or what broadcasts to ``(N, H, L)``."""
    length_k = key.shape[2]
    if is_causal:
        first = torch.arange(1, length_q + 1, device=key.device)
        if mask is None:
            return first.clamp(max=length_k)
    if mask is None:
        return length_k
    seen = mask if mask.dtype == torch.bool else mask > -math.inf
    if is_causal:
        seen = seen & torch.ones(length_q, length_k, dtype=torch.bool, device=key.device).tril()
    return seen.sum(dim=-1)
