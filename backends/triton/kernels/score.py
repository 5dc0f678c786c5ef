"""Where a score is made: which keys a query may see, and what becomes of ``q . k``.

Masks and the sign of the scale are named here and nowhere else.

Notation: ``s = q . k`` (times the sign of the scale), ``top`` the largest ``s`` of a row,
``c = (alpha - 1) |scale|``, ``x = c (s - top) - t`` the distance of a key above the threshold
``tau = c top + t``. Where ``opt.shallow``, ``t`` is kept with 1 added and ``x`` with 1 taken away:
near alpha = 1 all that matters is in digits that a number near 1 does not have. A *row block*
``(q, top, t, first_row)`` is what belongs to ``opt.block_q`` queries.
"""

from __future__ import annotations

import triton
import triton.language as tl

from adasplash2.backends.triton.kernels.arithmetic import (
    matmul,
)


@triton.jit
def open_tiles(first_row, length_k, opt: tl.constexpr):
    """How many leading key tiles every row from ``first_row`` on sees in full."""
    tiles = length_k // opt.block_k
    if opt.causal:
        tiles = tl.minimum(tiles, (first_row + 1) // opt.block_k)
    return tiles


@triton.jit
def seen_tiles(first_row, length_k, opt: tl.constexpr):
    """How many leading key tiles some row of the block from ``first_row`` on sees."""
    keys = length_k
    if opt.causal:
        keys = tl.minimum(keys, first_row + opt.block_q)
    return tl.cdiv(keys, opt.block_k)


@triton.jit
def reach(rows, length_k, opt: tl.constexpr):
    """How many leading keys each of ``rows`` may see."""
    keys = tl.full(rows.shape, 0, tl.int32) + length_k
    if opt.causal:
        keys = tl.minimum(rows + 1, keys)
    return keys


@triton.jit
def allowed(rows, keys, length_k, opt: tl.constexpr):
    """Which of ``keys`` each of ``rows`` may see; both are broadcast against each other."""
    mask = (keys < length_k) & (rows >= 0)
    if opt.causal:
        mask = mask & (keys <= rows)
    return mask


@triton.jit
def scores(a, b, opt: tl.constexpr):
    """``a b^T`` with the sign of the scale."""
    s = matmul(a, tl.trans(b))
    if opt.sign != 1:
        s = s * opt.sign
    return s


@triton.jit
def distance(s, top, t, c, opt: tl.constexpr):
    """``x = c (s - top) - t``; where not ``opt.exact``, ``x = c s - tau``, which rounds as ``tau``
    does but costs one operation less."""
    if opt.exact:
        return c * (s - top) - t
    else:
        return c * s - t


@triton.jit
def column(top, opt: tl.constexpr):
    """``top`` against the keys; nothing where it is not used."""
    if opt.exact:
        top = top[:, None]
    return top


@triton.jit
def distances(row_block, k, first_key, shape, opt: tl.constexpr, EDGE: tl.constexpr):
    """``x`` of a row block and a key tile; off the support where a key may not be seen."""
    q, top, t, first_row = row_block
    x = distance(scores(q, k, opt), column(top, opt), t[:, None], shape.c, opt)
    if EDGE:
        rows = first_row + tl.arange(0, opt.block_q)
        keys = first_key + tl.arange(0, opt.block_k)
        x = tl.where(allowed(rows[:, None], keys[None, :], shape.length_k, opt), x, -1.0)
    return x


@triton.jit
def is_inside(x, opt: tl.constexpr):
    """Which keys of distances ``x`` are in the support."""
    return x > (-1.0 if opt.shallow else 0.0)
