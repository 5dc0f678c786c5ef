"""The public functions.

Their names and shapes follow :func:`torch.nn.functional.scaled_dot_product_attention` (SDPA).
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import replace
from typing import Any, ParamSpec, Protocol, TypeVar, Unpack, overload

import torch
from torch import Tensor

from adasplash2 import dispatch, ops
from adasplash2.auxiliary import AttentionAux, counted
from adasplash2.contract import AttentionStats
from adasplash2.dense import HALVES, softmax_attention, weights
from adasplash2.lowering import (
    Call,
    alphas_of_rows,
    lowered,
    lowered_cached,
    lowered_packed,
)
from adasplash2.options import (
    NOTHING,
    Options,
    Said,
    ScoreOptions,
    check_alpha,
    check_alpha_above_one,
    check_backend,
    check_count,
    check_dim,
    check_flag,
    tensor_or_number,
)
from adasplash2.problem import (
    TENSORS,
    Inputs,
    Problem,
    check_tensor,
    row_problem,
    unpaged,
    validated,
)
from adasplash2.torch_fastpath import is_autocast_on, is_transformed

P = ParamSpec("P")
R = TypeVar("R", covariant=True)


def _shown(function: Callable[P, R]) -> Callable[P, R]:
    """Show each of ``**options`` with its type and default: to ``inspect.signature``, ``help``,
    ``get_type_hints`` and documentation. The function itself is as it was."""
    signature = inspect.signature(function)
    types = {name: kind.__forward_arg__ for name, kind in ScoreOptions.__annotations__.items()}
    named = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
    first = [p for p in named if p.kind is not p.KEYWORD_ONLY]
    options = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=kind)
        for name, kind in types.items()
        for default in (Said._field_defaults[name],)
    ]
    shown = signature.replace(parameters=[*first, *options, *named[len(first) :]])
    function.__signature__ = shown  # type: ignore[attr-defined]
    function.__annotations__ = {
        **{name: p.annotation for name, p in shown.parameters.items()},
        "return": signature.return_annotation,
    }
    return function


def _unexpected(function: str, options: ScoreOptions) -> TypeError:
    """What Python says of arguments that are none, where ``options`` do not make :class:`Said`."""
    name = next(name for name in options if name not in ScoreOptions.__annotations__)
    return TypeError(f"{function}() got an unexpected keyword argument {name!r}")


@_shown
def entmax_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = NOTHING,
    is_causal: bool = False,
    scale: float | Tensor | None = None,
    enable_gqa: bool = False,
    *,
    causal_align: str = "top-left",
    q_lengths: Tensor | None = None,
    kv_lengths: Tensor | None = None,
    kv_starts: Tensor | None = None,
    return_aux: bool = False,
    **options: Unpack[ScoreOptions],
) -> Any:
    r"""Attention whose probabilities are alpha-entmax of the scores: exact, with true zeros.

    Takes what :func:`torch.nn.functional.scaled_dot_product_attention` (SDPA) takes, in its order,
    and stands where it stood. For query row :math:`i` over the keys :math:`j` it may see, with
    scores :math:`s_{ij} = \mathrm{scale} \cdot q_i \cdot k_j` and
    :math:`z_{ij} = (\alpha - 1) s_{ij}`,

    .. math:: p_{ij} = [z_{ij} - \tau_i]_+^{1 / (\alpha - 1)}, \quad
              \sum_j p_{ij} = 1, \quad \mathrm{out}_i = \sum_j p_{ij} v_j.

    What is asked changes scores in this order: ``softcap``, an additive ``attn_mask``,
    ``alibi_slopes``; then hidden keys leave. The diagonal of causal masks, windows and slopes is
    :math:`i' = i`, or :math:`i' = i + \mathrm{length_k} - \mathrm{length_q}` with
    ``causal_align="bottom-right"``.

    Any strides and any lengths, also unequal ones. bfloat16 and float16 are read as they are and
    computed in float32. Under ``torch.autocast`` the inputs are cast as SDPA casts them.
    Differentiable once, in reverse mode, also under ``vmap``, ``grad``, ``vjp`` and ``jacrev`` of
    :mod:`torch.func`. ``torch.compile`` makes one graph of it, which serves all values of ``alpha``
    and ``scale`` where these change.

    What happens at the edges:

    - A row without an allowed key gives zeros and zero gradients.
    - NaN or inf in a query poisons its own row with NaN, no other. NaN in a key poisons the rows
      that may see it, as in SDPA. NaN in a value reaches only the rows whose support holds its
      key, where softmax would poison every row that may see it.
    - A score of +inf makes its row NaN; a score of -inf leaves its key out.

    Args:
        query: ``(batch, heads_q, length_q, head_dim)``, float32, float64, bfloat16 or float16,
            ``head_dim`` from 1 to 256. As in SDPA there may be more dimensions before the heads, or
            only three (no batch) or two (one head), and those of size 1 broadcast. ``batch`` below
            stands for all that are before the heads; of ``scale``, ``alibi_slopes`` and lengths it
            may be one dimension of their product too. Jagged nested tensors are taken, all three
            of them, with the lengths, which are ragged, in third place. They may have ``lengths()``
            of their own, as of :func:`torch.nested.narrow`: nobody sees the padding behind, and its
            gradients are zeros. Key and value have the same offsets, which on a GPU is checked
            there, as ``cu_seqlens`` of :func:`entmax_attention_varlen` are; ``scale`` of rows is as
            there too.
        key: ``(batch, heads_kv, length_k, head_dim)``, dtype and device of ``query``.
        value: ``(batch, heads_kv, length_k, head_dim_v)``, ``head_dim_v`` from 1 to 256.
        attn_mask: broadcasts to ``(batch, heads_q, length_q, length_k)`` and is not expanded. bool:
            True may be seen. Dtype of ``query``, or float32: added to the scores, with a gradient
            where it requires one; -inf hides a key. Under autocast also bfloat16 or float16,
            whichever ``query`` is. torch's ``causal_upper_left`` and ``causal_lower_right`` are
            taken as ``is_causal`` with their ``causal_align``, which is then that of ``window`` and
            ``alibi_slopes`` too.
        dropout_p: each probability is dropped with this probability, in [0, 1); the others are
            divided by ``1 - dropout_p``. Drawn from a counter-based generator whose seed comes from
            torch's, so that ``torch.manual_seed`` repeats it and every backend drops the same keys.
        is_causal: query ``i`` sees keys ``j <= i'``, also where the lengths differ.
        scale: factor of ``q . k``; ``1 / sqrt(head_dim)`` where None. A number, or a tensor
            ``(heads_q,)`` or one of at least two dimensions that broadcasts to ``(batch, heads_q,
            length_q)``, with gradient. Values of a tensor are not looked at: NaN and inf make their
            rows NaN. NumPy's numbers and tensors without dimensions that require no gradient are
            read as numbers; reading one waits for its device, and breaks a compiled graph. Those
            that ``vmap`` maps over, also as ``alpha``, are as those with a gradient.
        enable_gqa: let ``heads_q`` be a multiple of ``heads_kv``; consecutive query heads share
            a key and value head.
        alpha: any finite number of at least 1. 1.5 and 2 (sparsemax) have fast paths; 1 is softmax.
            A call at 1 that asks for nothing but ``attn_mask`` or ``is_causal``, ``dropout_p``, a
            number as ``scale`` and ``enable_gqa`` is SDPA's own, edges included: NaN in what is
            hidden then reaches the output. So is each of packed or nested sequences that lie on a
            CPU, outside of graphs. On a GPU torch's kernel for packed sequences takes these and
            windows, in bfloat16 and float16, where nothing more is asked, keys and values are
            equally wide (a multiple of 8) and all is aligned at the bottom right or lengths do not
            differ; its edges are SDPA's, and it is not in graphs. All else at 1 is computed by
            dense operators, of some queries at a time and again for gradients, in memory that grows
            with the lengths, and with edges as said above; of lengths and packed sequences on a GPU
            every query with every key, since where they end is known there alone.
            Second derivatives are there where torch has them: of SDPA's calls, packed ones
            included, under ``sdpa_kernel(SDPBackend.MATH)``, not of torch's kernel for packed
            sequences and windows (float32 goes another way), and always of the dense operators.
            Or a tensor ``(heads_q,)`` of values in (1, 2], with gradient (Correia, Niculae, Martins
            2019). Its values are not looked at: one outside makes the rows of its head NaN.
        causal_align: ``"top-left"``, as SDPA aligns, or ``"bottom-right"``, as flash-attn does: the
            last query is at the last key. With lengths, these are each sequence's own. A causal
            mask object of torch as ``attn_mask`` says it by itself; ``"bottom-right"`` with one of
            the upper left is an error.
        window: ``(left, right)``: only keys with ``i' - left <= j <= i' + right``; -1 leaves a side
            open. Combines with ``is_causal``.
        alibi_slopes: ``(heads_q,)`` or ``(batch, heads_q)``, finite and at least 0: ``slope`` times
            ``|i' - j|`` is taken from the score (Press, Smith, Lewis 2022), with gradient. With
            entmax a slope above 0 makes keys from some distance on *exactly* zero, and they are not
            read: scores without the slope lie within ``+-m``, ``m = |scale| |q_i| max_j |k_j|``, so
            that a key further than ``(2 m + 1 / (alpha - 1)) / slope`` behind the nearest one is
            outside the support. Values are looked at only where they are on a CPU, outside of
            traces and transforms; elsewhere one that is wrong makes its head NaN.
        softcap: scores become ``softcap * tanh(s / softcap)``; 0 for none.
        sinks: ``(heads_q,)``: one more score for each row of a head, not scaled, which takes
            probability and has no value; with gradient. Values are not looked at: -inf is no sink,
            NaN and +inf make the rows of their head NaN.
        q_lengths: int32 ``(batch,)``: queries from here on are padding; their rows are zeros, in
            the output and in gradients.
        kv_lengths: int32 ``(batch,)``: keys from here on are padding, which nobody sees.
        kv_starts: int32 ``(batch,)``: keys before are padding. On a GPU, in traces and
            transforms values of the three are not looked at, but clamped to what exists.
        return_aux: return also an :class:`AttentionAux`; not for ``alpha = 1``.
        backend: name of the backend to run; None lets the dispatcher choose. See :func:`explain`
            and :func:`available_backends`. For ``alpha = 1``, which is torch's, it is only checked.

    Returns:
        ``(batch, heads_q, length_q, head_dim_v)``, dtype of ``query``, nested as ``query`` is, and
        contiguous, but for ``alpha = 1``, where strides may be those that SDPA gives; with
        ``return_aux`` a pair of it and an :class:`AttentionAux`.

    Raises:
        TypeError: an argument has a type or dtype that it must not have.
        ValueError: shapes, devices, heads, numbers or the name ``backend`` do not fit.
        BackendRefused: no backend that was asked can run this (a ``ValueError``).

    Example:
        >>> import torch, adasplash2
        >>> q, k, v = torch.randn(3, 2, 4, 128, 32)
        >>> adasplash2.entmax_attention(q, k, v, is_causal=True, window=(64, 0)).shape
        torch.Size([2, 4, 128, 32])

    Sources:
        Peters, Niculae, Martins 2019, *Sparse Sequence-to-Sequence Models* (alpha-entmax);
        Correia, Niculae, Martins 2019, *Adaptively Sparse Transformers* (its gradients);
        Goncalves et al. 2026, *AdaSplash-2* (finding the threshold from a histogram).
    """
    try:
        said = Said(
            dropout_p, is_causal, scale, enable_gqa, causal_align, attn_mask,
            q_lengths, kv_lengths, kv_starts, **options,
        )  # fmt: skip
    except TypeError:
        raise _unexpected("entmax_attention", options) from None
    return _attend(lowered(query, key, value, said), return_aux)


@_shown
def entmax_attention_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    dropout_p: float = NOTHING,
    is_causal: bool = False,
    scale: float | Tensor | None = None,
    enable_gqa: bool = False,
    *,
    attn_mask: Tensor | None = None,
    causal_align: str = "top-left",
    return_aux: bool = False,
    **options: Unpack[ScoreOptions],
) -> Any:
    """:func:`entmax_attention` of sequences that lie one behind another, as flash-attn packs them.

    Each query sees keys of its own sequence only. Sequences may be empty, and there may be none.
    Not padded, so that nothing is computed for padding.

    Args:
        query: ``(total_q, heads_q, head_dim)``.
        key: ``(total_k, heads_kv, head_dim)``.
        value: ``(total_k, heads_kv, head_dim_v)``.
        cu_seqlens_q, cu_seqlens_k: int32 ``(sequences + 1,)`` on the device of ``query``: where
            each sequence begins, from 0, and the total. On a GPU their values are checked there,
            without waiting: what is wrong ends the program with an assertion of the device.
        max_seqlen_q, max_seqlen_k: lengths of the longest, which flash-attn needs; None where not
            known. Nothing depends on them but torch's kernel, which ``alpha = 1`` takes on a GPU:
            there they must not be too small.
        dropout_p, is_causal, scale, enable_gqa, alpha, window, softcap, sinks, backend: as in
            :func:`entmax_attention`; ``scale`` as a tensor is ``(heads_q,)``, ``(sequences,
            heads_q, 1)`` or has at least two dimensions, which broadcast to ``(1, heads_q,
            total_q)``.
        causal_align: within each sequence. flash-attn's is ``"bottom-right"``; they are the same
            where queries and keys are equally many.
        alibi_slopes: ``(heads_q,)`` or ``(sequences, heads_q)``, as there.
        attn_mask: as there, broadcasts to ``(1, heads_q, total_q, total_k)``; what it says of keys
            of other sequences is not looked at. No causal mask object of torch: ``is_causal``.
        return_aux: as there; rows are ``(1, heads_q, total_q)``.

    Returns:
        ``(total_q, heads_q, head_dim_v)``, dtype of ``query``; with ``return_aux`` a pair.

    Raises:
        TypeError, ValueError, BackendRefused: as :func:`entmax_attention`.

    Example:
        >>> import torch, adasplash2
        >>> q, k, v = torch.randn(3, 48, 4, 16)
        >>> cu_seqlens = torch.tensor([0, 16, 16, 48], dtype=torch.int32)
        >>> adasplash2.entmax_attention_varlen(q, k, v, cu_seqlens, cu_seqlens, 32, 32).shape
        torch.Size([48, 4, 16])
    """
    try:
        said = Said(
            dropout_p, is_causal, scale, enable_gqa, causal_align, attn_mask,
            None, None, None, **options,
        )  # fmt: skip
    except TypeError:
        raise _unexpected("entmax_attention_varlen", options) from None
    call = lowered_packed(
        query, key, value, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, said
    )
    return _attend(call, return_aux)


@_shown
def entmax_attention_with_kvcache(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    key: Tensor | None = None,
    value: Tensor | None = None,
    *,
    cache_lengths: Tensor | int | None = None,
    block_table: Tensor | None = None,
    is_causal: bool = False,
    scale: float | Tensor | None = None,
    kv_starts: Tensor | None = None,
    **options: Unpack[ScoreOptions],
) -> Tensor:
    """:func:`entmax_attention` of new queries over a cache of keys and values, as flash-attn's
    ``flash_attn_with_kvcache``: for generation, without gradient.

    ``key`` and ``value``, where they are given, are written into the cache in place, behind the
    ``cache_lengths`` that there are, and seen by ``query``. Lengths are data: as they grow nothing
    is compiled or decided anew, nothing waits for a device, and a CUDA graph can hold the call.
    The last query stands at the last key: causal masks, windows and slopes are aligned at the
    bottom right. ``cache_lengths`` is left as it is: add the new length for the next call.

    Args:
        query: ``(batch, heads_q, length_q, head_dim)``. ``heads_q`` may be a multiple of the
            cache's heads.
        key_cache: ``(batch, heads_kv, capacity, head_dim)``, dtype and device of ``query``, any
            strides: flash-attn's ``(batch, capacity, heads_kv, head_dim)`` with ``transpose(1,
            2)``. With a ``block_table`` pages of all sequences, ``(pages there are, page_size,
            heads_kv, head_dim)``, as flash-attn and vLLM keep them.
        value_cache: likewise, ``head_dim_v`` wide. Where ``key`` is given, no place of a cache may
            stand for another one too, as in what is expanded.
        key: new ``(batch, heads_kv, new, head_dim)``; None where the cache has all. May be a view
            of a cache: it is read before anything is written.
        value: ``(batch, heads_kv, new, head_dim_v)``.
        cache_lengths: int32 ``(batch,)``, or a number for all: how many keys of each sequence are
            in the cache, without those of ``key``. None if it is full. flash-attn's
            ``cache_seqlens``. On a GPU lengths are not looked at, but clamped to what exists;
            writing beyond it ends the program with an assertion of the device.
        block_table: int32 ``(batch, pages)``: key ``j`` of a sequence is number ``j % page_size``
            of page ``block_table[j // page_size]``. Any page size; what stands behind a sequence's
            last page is not read. Sequences may share pages that are only read; pages into which
            ``key`` is written are of one sequence alone, which on a GPU is not looked at. For
            ``alpha = 1`` pages are copied.
        is_causal: query ``i`` of the last ``length_q`` sees no key behind its own.
        scale, alpha, window, alibi_slopes, softcap, sinks, backend: as in :func:`entmax_attention`.
        kv_starts: int32 ``(batch,)``: keys before are padding. flash-attn's ``cache_leftpad``.

    Returns:
        ``(batch, heads_q, length_q, head_dim_v)``, dtype of ``query``.

    Raises:
        TypeError, ValueError, BackendRefused: as :func:`entmax_attention`. Nothing has been written
            to the cache then.
        RuntimeError: a gradient is asked for: call it under ``torch.no_grad()``.

    Example:
        >>> import torch, adasplash2
        >>> keys, values = torch.zeros(2, 1, 4, 128, 32)
        >>> for length in range(3):
        ...     q, k, v = torch.randn(3, 1, 4, 1, 32)
        ...     out = adasplash2.entmax_attention_with_kvcache(
        ...         q, keys, values, k, v, cache_lengths=length
        ...     )
        >>> out.shape, int((keys != 0).any(dim=3).sum())  # 3 keys of 4 heads
        (torch.Size([1, 4, 1, 32]), 12)
    """
    try:
        said = Said(
            NOTHING, is_causal, scale, True, "bottom-right", None, None, None, kv_starts, **options,
        )  # fmt: skip
    except TypeError:
        raise _unexpected("entmax_attention_with_kvcache", options) from None
    if torch.is_grad_enabled():
        for name, tensor in {
            **{"query": query, "key_cache": key_cache, "value_cache": value_cache},
            **{"key": key, "value": value, **said._asdict()},
        }.items():
            if getattr(tensor, "requires_grad", False):
                raise RuntimeError(
                    f"{name} must not require a gradient: entmax_attention_with_kvcache has none; "
                    "call it under torch.no_grad(), or entmax_attention"
                )
    if is_autocast_on() and isinstance(key_cache, Tensor):
        # What is new becomes what the cache is: the whole cache is not cast at every step.
        query = query.to(key_cache.dtype)
        key = key if key is None else key.to(key_cache.dtype)
        value = value if value is None else value.to(key_cache.dtype)
    (inputs, checked, shaped, *_), append = lowered_cached(
        query, key_cache, value_cache, key, value, cache_lengths, block_table, said
    )
    if checked.alpha != 1.0:
        return shaped(ops.attention(inputs, checked, append))
    problem = _problem(inputs, checked)
    append()
    if inputs.block_table is not None:
        inputs = unpaged(inputs)
        problem = _problem(inputs, checked)
    return shaped(softmax_attention(problem, inputs, checked))


def _attend(call: Call, return_aux: bool) -> Any:
    inputs, options, shaped, shaped_beside, packed, problems = call
    if is_autocast_on() or options.alpha == 1.0:  # else checked where it is validated
        inputs = _cast(inputs)
    if options.alpha == 1.0:
        if check_flag("return_aux", return_aux):
            raise ValueError("return_aux must be False for alpha = 1: softmax has no threshold")
        return shaped(softmax_attention(_problem(inputs, options), inputs, options, packed))
    if return_aux is False:
        return shaped(ops.attention(inputs, options, problems=problems))
    if not check_flag("return_aux", return_aux):
        return shaped(ops.attention(inputs, options))
    out, tau = ops.attention_and_tau(inputs, options)
    kept = inputs.mapped(Tensor.detach)._replace(dropout_seed=None)
    tau = shaped_beside(tau.detach())
    return shaped(out), AttentionAux(tau, kept, options._replace(dropout_p=0.0))


def dense_weights(query: Tensor, key: Tensor, value: Tensor, said: Said) -> Tensor:
    """The weights of the values in :func:`entmax_attention`, ``(batch, heads, length_q, length_k)``
    in the dtype of the queries: dense, with gradients, as dropout leaves them. For modules that
    return them."""
    inputs, options, *_ = lowered(query, key, value, said)
    inputs = _cast(inputs)
    found = weights(_problem(inputs, options), inputs, options.backend)
    return found.to(inputs.query.dtype)


PACKING = {
    **dict.fromkeys(("cu_seqlens_q", "cu_seqlens_k"), "Tensor | None"),
    **dict.fromkeys(("max_seqlen_q", "max_seqlen_k"), "int | None"),
}
"""Arguments that say where packed sequences are, and their types."""


class _Answers(Protocol[P, R]):
    """What answers about a call, packed or not, as type checkers see it."""

    @overload
    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R: ...
    @overload
    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        max_seqlen_q: int | None = None,
        max_seqlen_k: int | None = None,
        **said: Any,
    ) -> R: ...


def _takes_what(like: Callable[P, Any]) -> Callable[[Callable[[Call], R]], _Answers[P, R]]:
    """Give a function that answers about a call the arguments of ``like``: the list of options
    stands once. Behind them are those of :data:`PACKING`, None where nothing is packed. A trace or
    a transform has no numbers to answer about: where ``torch.compile`` may break its graph it does
    so here, and calls the function as it is."""
    signature = inspect.signature(like)
    taken = [p for name, p in signature.parameters.items() if name != "return_aux"]
    packing = (
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=kind)
        for name, kind in PACKING.items()
    )
    signature = signature.replace(parameters=[*taken, *packing])

    def decorate(body: Callable[[Call], R]) -> _Answers[P, R]:
        @functools.wraps(body)
        def function(*args: Any, **kwargs: Any) -> R:
            if torch.compiler.is_compiling() or is_transformed():
                raise TypeError(
                    f"{body.__name__} works in neither a trace nor a transform: call it outside"
                )
            try:
                bound = signature.bind(*args, **kwargs)
            except TypeError as wrong:  # begins with what is wrong, where Python has the function
                raise TypeError(f"{body.__name__}() {wrong}") from None
            bound.apply_defaults()
            query, key, value = (bound.arguments.pop(name) for name in TENSORS)
            cu_q, cu_k, max_q, max_k = packing = [bound.arguments.pop(name) for name in PACKING]
            said = Said(**bound.arguments)
            if any(given is not None for given in packing):
                if cu_q is None or cu_k is None:
                    names = ", ".join(PACKING)
                    raise TypeError(
                        f"cu_seqlens_q and cu_seqlens_k must both be a torch.Tensor where any of "
                        f"{names} is given, got {type(cu_q).__name__} and {type(cu_k).__name__}"
                    )
                call = lowered_packed(
                    query, key, value, cu_q, cu_k, max_q, max_k, said, draws=False
                )
            else:
                call = lowered(query, key, value, said, draws=False)
            return body(call._replace(inputs=_cast(call.inputs)))

        returns = inspect.signature(body).return_annotation
        function.__signature__ = signature.replace(return_annotation=returns)  # type: ignore[attr-defined]
        return function

    return decorate


@_takes_what(entmax_attention)
def attention_stats(call: Call) -> AttentionStats:
    """How sparse one attention call is, and what it took to find its thresholds.

    Arguments as for :func:`entmax_attention`, or, where ``cu_seqlens_q`` and ``cu_seqlens_k`` are
    given, as for :func:`entmax_attention_varlen`; no gradient, and not for ``torch.compile``. Where
    dense tiles of ``cuda`` correct their outputs, thresholds are found closer here than there, in
    as many iterations as that takes.

    Returns:
        :class:`AttentionStats`: thresholds, support and solver iterations of every row, and the
        share of 64x64 tiles without a single probability above zero. Of packed and nested
        sequences rows are ``(1, heads_q, total_q)``.

    Raises:
        TypeError, ValueError, BackendRefused: as :func:`entmax_attention`, and ``ValueError`` for
            ``alpha = 1``: softmax has no threshold and no zeros.

    Example:
        >>> import torch, adasplash2
        >>> q, k, v = torch.randn(3, 2, 4, 128, 32)
        >>> stats = adasplash2.attention_stats(q, k, v, is_causal=True)
        >>> stats.support.shape, stats.empty_tiles.shape  # keys a row keeps; share of empty tiles
        (torch.Size([2, 4, 128]), torch.Size([2, 4]))
    """
    check_alpha_above_one(call.options.alpha)
    found = counted(call.inputs, call.options)
    shaped = call.shaped_beside
    return replace(
        found,
        tau=shaped(found.tau),
        support=shaped(found.support),
        iterations=shaped(found.iterations),
        empty_tiles=shaped(found.empty_tiles),
    )


@_takes_what(entmax_attention)
def explain(call: Call) -> dispatch.Explanation:
    """Which backend would run this call of :func:`entmax_attention`, and why not the others; where
    ``cu_seqlens_q`` and ``cu_seqlens_k`` are given, this call of :func:`entmax_attention_varlen`.

    Computes nothing; not for ``torch.compile``. ``print`` shows the answer as a table.

    Raises:
        TypeError, ValueError: as :func:`entmax_attention`; a call that every backend refuses is
            explained, not raised.

    Example:
        >>> import torch, adasplash2
        >>> q, k, v = torch.randn(3, 2, 4, 128, 32)
        >>> print(adasplash2.explain(q, k, v, is_causal=True))  # doctest: +ELLIPSIS
        call        attention of query (2, 4, 128, 32), key (2, 4, 128, 32), ...
        chosen      cpu
        ...
    """
    problem = _problem(call.inputs, call.options)
    return dispatch.explain(problem, call.options.backend or None, call.inputs)


def entmax(
    x: Tensor, alpha: float | Tensor = 1.5, dim: int = -1, backend: str | None = None
) -> Tensor:
    r"""alpha-entmax of ``x`` along ``dim``: like softmax, with true zeros.

    With :math:`z = (\alpha - 1) x` it is :math:`p = [z - \tau]_+^{1 / (\alpha - 1)}`,
    :math:`\sum p = 1`. Differentiable once, in reverse mode; works in ``torch.compile`` and
    :mod:`torch.func` as :func:`entmax_attention`.

    Entries of -inf get probability zero; a row of nothing else gives zeros and zero gradients, for
    ``alpha = 1`` NaN, as in softmax. NaN or +inf makes its row NaN. bfloat16 and float16 are
    computed in float32.

    Args:
        x: any shape but a scalar, float32, float64, bfloat16 or float16, any strides. Where
            ``dim`` is not the last dimension, or has a stride, it is copied once.
        alpha: any finite number of at least 1, as in :func:`entmax_attention`; 1 is
            :func:`torch.softmax` and goes there. Or a tensor with an alpha for each row, of values
            in (1, 2], with gradient (Correia, Niculae, Martins 2019): of the shape of ``x`` without
            ``dim``, or one that broadcasts to the shape of ``x`` with the size 1 in ``dim``. Its
            values are not looked at: one outside makes its rows NaN. Tensors without dimensions
            that require no gradient are read as numbers, but those that ``vmap`` maps over are as
            those with a gradient.
        dim: the dimension along which probabilities sum to 1.
        backend: name of the backend to run; None lets the dispatcher choose.

    Returns:
        Shape and dtype of ``x``.

    Raises:
        TypeError: ``x``, ``alpha``, ``dim`` or ``backend`` is not of the type it must be.
        ValueError: ``alpha`` (also its shape or device) or the name ``backend`` does not fit, or
            ``x`` is a scalar.
        IndexError: ``x`` has no dimension ``dim``.
        BackendRefused: no backend that was asked can run this (a ``ValueError``).

    Example:
        >>> import torch, adasplash2
        >>> adasplash2.entmax(torch.tensor([[2.0, 1.0, -2.0], [0.0, 0.0, 0.0]]), alpha=2.0)
        tensor([[1.0000, 0.0000, 0.0000],
                [0.3333, 0.3333, 0.3333]])
        >>> x = torch.randn(8, 16)
        >>> adasplash2.entmax(x, alpha=torch.linspace(1.1, 2.0, 8)).shape  # one for each row
        torch.Size([8, 16])

    Sources:
        Peters, Niculae, Martins 2019, *Sparse Sequence-to-Sequence Models*; gradient: Correia,
        Niculae, Martins 2019, *Adaptively Sparse Transformers*.
    """
    alphas, number = tensor_or_number(alpha, 1.5)
    number = check_alpha(number)
    check_tensor("x", x)
    backend = check_backend(backend)
    dim = check_dim(dim, x.dim())
    if alphas is not None:
        return ops.rows(x, number, dim, backend, alphas_of_rows(alphas, x, dim))
    if number == 1.0:
        row_problem(x, alpha=number, needs_grad=False)
        return torch.softmax(x, dim)
    return ops.rows(x, number, dim, backend)


def entmax15(x: Tensor, dim: int = -1, k: int | None = None) -> Tensor:
    """:func:`entmax` with ``alpha = 1.5``.

    Args:
        x, dim: as there.
        k: of no effect: how many of the largest entries the package ``entmax`` sorts at first. An
            integer of at least 1, or None.

    Example:
        >>> import torch, adasplash2
        >>> adasplash2.entmax15(torch.tensor([1.0, 1.0, -1.0]))
        tensor([0.5000, 0.5000, 0.0000])
    """
    _check_k(k)
    return entmax(x, 1.5, dim)


def sparsemax(x: Tensor, dim: int = -1, k: int | None = None) -> Tensor:
    """:func:`entmax` with ``alpha = 2``: the Euclidean projection onto the simplex.

    Args:
        x, dim: as there.
        k: of no effect: how many of the largest entries the package ``entmax`` sorts at first. An
            integer of at least 1, or None.

    Source: Martins, Astudillo 2016, *From Softmax to Sparsemax*.

    Example:
        >>> import torch, adasplash2
        >>> adasplash2.sparsemax(torch.tensor([0.5, 0.25, -1.0]))
        tensor([0.6250, 0.3750, 0.0000])
    """
    _check_k(k)
    return entmax(x, 2.0, dim)


def _check_k(k: int | None) -> None:
    if k is not None:
        check_count("k", k, at_least=1)


def _cast(inputs: Inputs) -> Inputs:
    """The tensors, cast as an autocast region asks (to its dtype, but never from float64), and a
    mask that is then of the other half precision."""
    for name, tensor in zip(TENSORS, inputs, strict=False):
        check_tensor(name, tensor)
    device = inputs.query.device.type
    # Autocast knows nothing of meta, where asking is an error. Whether it knows a device can be
    # asked as well, but not in graphs of torch 2.11.
    if device != "meta" and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        cast = (t if t.dtype == torch.float64 else t.to(dtype) for t in inputs.tensors())
        inputs = Inputs(*cast, *inputs.operands())
        mask = inputs.attn_mask
        if mask is not None and mask.dtype in HALVES and mask.dtype != inputs.query.dtype:
            inputs = inputs._replace(attn_mask=mask.float())  # which holds both
    return inputs


def _problem(inputs: Inputs, options: Options) -> Problem:
    needs_grad = torch.is_grad_enabled() and any(t.requires_grad for t in inputs.given())
    return validated(inputs, options, needs_grad)
