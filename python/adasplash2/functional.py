"""The public functions.

Their names and shapes follow :func:`torch.nn.functional.scaled_dot_product_attention` (SDPA).
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from adasplash2 import dispatch, ops
from adasplash2.contract import AttentionStats
from adasplash2.options import (
    Options,
    check_alpha,
    check_alpha_above_one,
    check_backend,
    check_dim,
    check_options,
)
from adasplash2.problem import Inputs, Problem, check_tensor, row_problem, validated
from adasplash2.torch_fastpath import is_autocast_on, is_transformed

P = ParamSpec("P")
R = TypeVar("R")


def entmax_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    alpha: float = 1.5,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    backend: str | None = None,
) -> Tensor:
    r"""Attention whose probabilities are alpha-entmax of the scores: exact, with true zeros.

    For query row :math:`i` over the keys :math:`j` it may see, with
    :math:`z_{ij} = (\alpha - 1) \cdot \mathrm{scale} \cdot q_i \cdot k_j`,

    .. math:: p_{ij} = [z_{ij} - \tau_i]_+^{1 / (\alpha - 1)}, \quad
              \sum_j p_{ij} = 1, \quad \mathrm{out}_i = \sum_j p_{ij} v_j.

    Any strides and any lengths, also unequal ones. bfloat16 and float16 are read as they are and
    computed in float32. Under ``torch.autocast`` the inputs are cast as SDPA casts them.
    Differentiable once, in reverse mode, also under ``vmap``, ``grad``, ``vjp`` and ``jacrev`` of
    :mod:`torch.func`. ``torch.compile`` makes one graph of it, which serves all values of ``alpha``
    and ``scale`` where these change.

    What happens at the edges:

    - A row without an allowed key (``length_k = 0``) gives zeros and zero gradients.
    - NaN or inf in a query poisons its own row with NaN, no other. NaN in a key poisons the rows
      that may see it, as in SDPA. NaN in a value reaches only the rows whose support holds its
      key, where softmax would poison every row that may see it.
    - A score of +inf makes its row NaN; a score of -inf leaves its key out.

    Args:
        query: ``(batch, heads_q, length_q, head_dim)``, float32, float64, bfloat16 or float16,
            ``head_dim`` from 1 to 256.
        key: ``(batch, heads_kv, length_k, head_dim)``, dtype and device of ``query``.
        value: ``(batch, heads_kv, length_k, head_dim_v)``, ``head_dim_v`` from 1 to 256.
        alpha: any finite number of at least 1. 1.5 and 2 (sparsemax) have fast paths; 1 is softmax
            and always goes to SDPA, edges included. NumPy's numbers and tensors without dimensions
            are read as numbers; reading one waits for its device, and breaks a compiled graph.
        is_causal: query ``i`` sees keys ``j <= i``, aligned top-left as SDPA aligns it, also where
            the lengths differ.
        scale: factor of the scores, a number as ``alpha``; ``1 / sqrt(head_dim)`` where None.
        enable_gqa: let ``heads_q`` be a multiple of ``heads_kv``; consecutive query heads share
            a key and value head.
        backend: name of the backend to run; None lets the dispatcher choose. See :func:`explain`
            and :func:`available_backends`.

    Returns:
        ``(batch, heads_q, length_q, head_dim_v)``, contiguous, dtype of ``query``.

    Raises:
        TypeError: an argument has a type or dtype that it must not have.
        ValueError: shapes, devices, heads, ``alpha``, ``scale`` or the name ``backend`` do not fit.
        BackendRefused: no backend that was asked can run this (a ``ValueError``).

    Sources:
        Peters, Niculae, Martins 2019, *Sparse Sequence-to-Sequence Models* (alpha-entmax);
        Correia, Niculae, Martins 2019, *Adaptively Sparse Transformers* (its gradient);
        Goncalves et al. 2026, *AdaSplash-2* (finding the threshold from a histogram).
    """
    options = check_options(
        alpha=alpha, scale=scale, is_causal=is_causal, enable_gqa=enable_gqa, backend=backend
    )
    inputs = Inputs(query, key, value)
    if is_autocast_on() or options.alpha == 1.0:  # else checked where it is validated
        inputs = _cast(inputs)
    if options.alpha == 1.0:
        problem = _problem(inputs, options)
        return F.scaled_dot_product_attention(
            *inputs,
            is_causal=problem.scores.is_causal,
            scale=options.scale,
            enable_gqa=options.enable_gqa,
        )
    return ops.attention(inputs, options)


def _takes_what(
    like: Callable[P, Any],
) -> Callable[[Callable[[Inputs, Options], R]], Callable[P, R]]:
    """Give a function that answers about a call the arguments of ``like``: the list of options
    stands once. A trace or a transform has no numbers to answer about: where ``torch.compile`` may
    break its graph it does so here, and calls the function as it is."""
    signature = inspect.signature(like)

    def decorate(body: Callable[[Inputs, Options], R]) -> Callable[P, R]:
        @functools.wraps(body)
        def function(*args: P.args, **kwargs: P.kwargs) -> R:
            if torch.compiler.is_compiling() or is_transformed():
                raise TypeError(
                    f"{body.__name__} works in neither a trace nor a transform: call it outside"
                )
            bound = signature.bind(*args, **kwargs)
            bound.apply_defaults()
            inputs = Inputs(*(bound.arguments.pop(name) for name in Inputs._fields))
            options = check_options(**bound.arguments)
            return body(_cast(inputs), options)

        returns = inspect.signature(body).return_annotation
        function.__signature__ = signature.replace(return_annotation=returns)  # type: ignore[attr-defined]
        return function

    return decorate


@_takes_what(entmax_attention)
def attention_stats(inputs: Inputs, options: Options) -> AttentionStats:
    """How sparse one attention call is, and what it took to find its thresholds.

    Arguments as for :func:`entmax_attention`; no gradient, and not for ``torch.compile``.

    Returns:
        :class:`AttentionStats`: thresholds, support and solver iterations of every row, and the
        share of 64x64 tiles without a single probability above zero.

    Raises:
        TypeError, ValueError, BackendRefused: as :func:`entmax_attention`, and ``ValueError`` for
            ``alpha = 1``: softmax has no threshold and no zeros.
    """
    check_alpha_above_one(options.alpha)
    return ops.attention_stats(inputs, options)


@_takes_what(entmax_attention)
def explain(inputs: Inputs, options: Options) -> dispatch.Explanation:
    """Which backend would run this call of :func:`entmax_attention`, and why not the others.

    Computes nothing; not for ``torch.compile``. ``print`` shows the answer as a table.

    Raises:
        TypeError, ValueError: as :func:`entmax_attention`; a call that every backend refuses is
            explained, not raised.
    """
    return dispatch.explain(_problem(inputs, options), options.backend or None)


def entmax(x: Tensor, alpha: float = 1.5, dim: int = -1, backend: str | None = None) -> Tensor:
    r"""alpha-entmax of ``x`` along ``dim``: like softmax, with true zeros.

    With :math:`z = (\alpha - 1) x` it is :math:`p = [z - \tau]_+^{1 / (\alpha - 1)}`,
    :math:`\sum p = 1`. Differentiable once, in reverse mode; works in ``torch.compile`` and
    :mod:`torch.func` as :func:`entmax_attention`.

    Entries of -inf get probability zero; a row of nothing else gives zeros and zero gradients.
    NaN or +inf makes its row NaN. bfloat16 and float16 are computed in float32.

    Args:
        x: any shape but a scalar, float32, float64, bfloat16 or float16, any strides. Where
            ``dim`` is not the last dimension, or has a stride, it is copied once.
        alpha: any finite number of at least 1, as in :func:`entmax_attention`; 1 is
            :func:`torch.softmax` and goes there.
        dim: the dimension along which probabilities sum to 1.
        backend: name of the backend to run; None lets the dispatcher choose.

    Returns:
        Shape and dtype of ``x``.

    Raises:
        TypeError: ``x``, ``alpha``, ``dim`` or ``backend`` is not of the type it must be.
        ValueError: ``alpha`` or the name ``backend`` does not fit.
        IndexError: ``x`` has no dimension ``dim``.
        BackendRefused: no backend that was asked can run this (a ``ValueError``).

    Sources:
        Peters, Niculae, Martins 2019, *Sparse Sequence-to-Sequence Models*; gradient: Correia,
        Niculae, Martins 2019, *Adaptively Sparse Transformers*.
    """
    alpha = check_alpha(alpha)
    check_tensor("x", x)
    backend = check_backend(backend)
    dim = check_dim(dim, x.dim())
    if alpha == 1.0:
        row_problem(x, alpha=alpha, needs_grad=False)
        return torch.softmax(x, dim)
    return ops.rows(x, alpha, dim, backend)


def entmax15(x: Tensor, dim: int = -1) -> Tensor:
    """:func:`entmax` with ``alpha = 1.5``."""
    return entmax(x, 1.5, dim)


def sparsemax(x: Tensor, dim: int = -1) -> Tensor:
    """:func:`entmax` with ``alpha = 2``: the Euclidean projection onto the simplex.

    Source: Martins, Astudillo 2016, *From Softmax to Sparsemax*.
    """
    return entmax(x, 2.0, dim)


def _cast(inputs: Inputs) -> Inputs:
    """The tensors, cast as an autocast region asks (to its dtype, but never from float64)."""
    for name, tensor in zip(Inputs._fields, inputs, strict=True):
        check_tensor(name, tensor)
    device = inputs.query.device.type
    # Where autocast knows nothing of a device (meta), asking is an error.
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        return Inputs(*(t if t.dtype == torch.float64 else t.to(dtype) for t in inputs))
    return inputs


def _problem(inputs: Inputs, options: Options) -> Problem:
    needs_grad = torch.is_grad_enabled() and any(t.requires_grad for t in inputs)
    return validated(inputs, options, needs_grad)
