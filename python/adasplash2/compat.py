"""The functions of the package ``adasplash`` 0.2.2 (deep-spin/adasplash), for programs written for
it: the import changes, calls stay as they are.

::

    from adasplash2.compat import adasplash, triton_entmax  # was: from adasplash import ...

Names, arguments, their order and defaults are that package's; so are scores, ``q . k / sqrt(d)``,
and what ``varlen`` means. What it demands of shapes is not demanded here: lengths need be no powers
of 2, ``head_dim`` may be anything up to 256, tensors need not be contiguous nor on a GPU, and
``heads`` may be a multiple of ``kv_heads`` in every function. Its names for versions of its kernels
all lead to :func:`adasplash2.entmax_attention` or :func:`adasplash2.entmax`.

Not needed, checked and then left alone: ``niter`` and ``n_iter``, steps of an iteration that ends
early there, since thresholds are exact here; ``use_histogram``, how that iteration starts; and
``fast_math``, which allows errors that are not made here.
"""

from __future__ import annotations

import torch
from torch import Tensor

from adasplash2.functional import entmax, entmax_attention
from adasplash2.lowering import check_length_values
from adasplash2.options import check_count, check_flag
from adasplash2.problem import check_like, check_tensor

__all__ = [
    "adasplash",
    "adasplash2",
    "adasplash_no_block_mask",
    "adasplash_v1",
    "adasplash_v2",
    "triton_entmax",
    "triton_entmax15",
    "triton_entmax_v1",
    "triton_entmax_v2",
    "triton_sparsemax",
]


def adasplash(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    alpha: float = 1.5,
    is_causal: bool = True,
    varlen: Tensor | None = None,
    niter: int | None = None,
) -> Tensor:
    """Entmax attention of padded sequences, causal unless told otherwise.

    Args:
        q: ``(batch, heads, length, head_dim)``.
        k: ``(batch, kv_heads, length, head_dim)``; ``heads`` is a multiple of ``kv_heads``.
        v: as ``k``.
        alpha: as in :func:`adasplash2.entmax_attention`.
        is_causal: query ``i`` sees keys ``j <= i``.
        varlen: int32 or int64 ``(batch,)``: how long each sequence is. What is behind its end is
            padding: nobody sees those keys, and those rows are zeros, in the output and in
            gradients.
        niter: not needed, thresholds are exact.

    Returns:
        Shape and dtype of ``q``.

    Raises:
        TypeError, ValueError, BackendRefused: as :func:`adasplash2.entmax_attention`.

    Example:
        >>> import torch
        >>> from adasplash2.compat import adasplash
        >>> q, k, v = torch.randn(3, 2, 8, 128, 64)
        >>> out = adasplash(q, k, v, varlen=torch.tensor([128, 96]))
        >>> out.shape, out[1, :, 96:].count_nonzero().item()
        (torch.Size([2, 8, 128, 64]), 0)
    """
    return _attention(q, k, v, alpha, is_causal, varlen, niter)


def adasplash_v1(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    alpha: float = 1.5,
    is_causal: bool = False,
    varlen: Tensor | None = None,
    niter: int | None = 10,
) -> Tensor:
    """:func:`adasplash`, not causal unless told so.

    Example:
        >>> import torch
        >>> from adasplash2.compat import adasplash_v1
        >>> adasplash_v1(*torch.randn(3, 1, 2, 64, 32), alpha=1.333).shape
        torch.Size([1, 2, 64, 32])
    """
    return _attention(q, k, v, alpha, is_causal, varlen, niter)


def adasplash_no_block_mask(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    alpha: float = 1.5,
    is_causal: bool = False,
    varlen: Tensor | None = None,
    niter: int | None = 10,
) -> Tensor:
    """:func:`adasplash_v1`: which kernels run is decided by the dispatcher.

    Example:
        >>> import torch
        >>> from adasplash2.compat import adasplash_no_block_mask
        >>> adasplash_no_block_mask(*torch.randn(3, 1, 2, 64, 32), alpha=2.0).shape
        torch.Size([1, 2, 64, 32])
    """
    return _attention(q, k, v, alpha, is_causal, varlen, niter)


def adasplash_v2(
    q: Tensor, k: Tensor, v: Tensor, niter: int | None = 1, varlen: Tensor | None = None
) -> Tensor:
    """:func:`adasplash` with ``alpha = 1.5``, causal. ``niter`` comes before ``varlen``.

    Example:
        >>> import torch
        >>> from adasplash2.compat import adasplash_v2
        >>> q, k = torch.randn(1, 8, 256, 64), torch.randn(1, 2, 256, 64)
        >>> adasplash_v2(q, k, k).shape
        torch.Size([1, 8, 256, 64])
    """
    return _attention(q, k, v, 1.5, True, varlen, niter)


adasplash2 = adasplash_v2


def triton_entmax(
    x: Tensor,
    alpha: float = 1.5,
    n_iter: int = 2,
    use_histogram: bool = True,
    fast_math: bool = False,
) -> Tensor:
    """Entmax along the last dimension.

    Args:
        x: any shape but a scalar.
        alpha: as in :func:`adasplash2.entmax`.
        n_iter, use_histogram, fast_math: not needed, thresholds are exact.

    Returns:
        Shape and dtype of ``x``.

    Raises:
        TypeError, ValueError, BackendRefused: as :func:`adasplash2.entmax`.

    Example:
        >>> import torch
        >>> from adasplash2.compat import triton_entmax
        >>> triton_entmax(torch.tensor([2.0, 1.0, -1.0]), alpha=2.0)
        tensor([1., 0., 0.])
    """
    check_count("n_iter", n_iter)
    check_flag("use_histogram", use_histogram)
    check_flag("fast_math", fast_math)
    return entmax(x, alpha)


triton_entmax_v2 = triton_entmax


def triton_entmax_v1(
    x: Tensor, alpha: float = 1.5, n_iter: int = 10, fast_math: bool = True
) -> Tensor:
    """:func:`triton_entmax`.

    Example:
        >>> import torch
        >>> from adasplash2.compat import triton_entmax_v1
        >>> triton_entmax_v1(torch.tensor([1.0, 1.0, -1.0]))
        tensor([0.5000, 0.5000, 0.0000])
    """
    return triton_entmax(x, alpha, n_iter, fast_math=fast_math)


def triton_sparsemax(
    x: Tensor, *, n_iter: int = 2, use_histogram: bool = True, fast_math: bool = False
) -> Tensor:
    """:func:`triton_entmax` with ``alpha = 2``.

    Example:
        >>> import torch
        >>> from adasplash2.compat import triton_sparsemax
        >>> triton_sparsemax(torch.tensor([0.5, 0.25, -1.0]))
        tensor([0.6250, 0.3750, 0.0000])
    """
    return triton_entmax(x, 2.0, n_iter, use_histogram, fast_math)


def triton_entmax15(
    x: Tensor, *, n_iter: int = 2, use_histogram: bool = True, fast_math: bool = False
) -> Tensor:
    """:func:`triton_entmax` with ``alpha = 1.5``.

    Example:
        >>> import torch
        >>> from adasplash2.compat import triton_entmax15
        >>> triton_entmax15(torch.tensor([1.0, 1.0, -1.0]))
        tensor([0.5000, 0.5000, 0.0000])
    """
    return triton_entmax(x, 1.5, n_iter, use_histogram, fast_math)


def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    alpha: float,
    is_causal: bool,
    varlen: Tensor | None,
    niter: int | None,
) -> Tensor:
    if niter is not None:
        check_count("niter", niter)
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        check_tensor(name, tensor)
        if tensor.dim() != 4:
            raise ValueError(
                f"{name} must have 4 dimensions (batch, heads, length, head_dim), got "
                f"{tensor.dim()} with shape {tuple(tensor.shape)}"
            )
    if k.shape[2] != q.shape[2]:  # one varlen is for both
        raise ValueError(f"k must have the length of q ({q.shape[2]}), got {k.shape[2]}")
    lengths = None if varlen is None else _lengths(varlen, q)
    out: Tensor = entmax_attention(
        q,
        k,
        v,
        alpha=alpha,
        is_causal=is_causal,
        enable_gqa=True,
        q_lengths=lengths,
        kv_lengths=lengths,
    )
    return out


def _lengths(varlen: object, q: Tensor) -> Tensor:
    """``varlen`` in int32. Numbers that int32 does not have stay too large, or negative."""
    if not isinstance(varlen, Tensor):
        raise TypeError(f"varlen must be a torch.Tensor or None, got {type(varlen).__name__}")
    if varlen.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"varlen must have the dtype torch.int32 or int64, got {varlen.dtype}")
    check_like("varlen", varlen, (q.shape[0],), varlen.dtype, q.device)
    check_length_values("varlen", varlen, q.shape[2])
    return varlen.clamp(-1, torch.iinfo(torch.int32).max).to(torch.int32)
