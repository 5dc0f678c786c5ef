"""What every kernel shares: tiles, scores, masks, and the mathematics of the threshold.

Notation: ``s = q . k`` (times the sign of the scale), ``top`` the largest ``s`` of a row,
``c = (alpha - 1) |scale|``, ``x = c (s - top) - t`` the distance of a key above the threshold
``tau = c top + t``, and ``r = 1 / (alpha - 1)``. Then ``p = [x]_+^r`` with ``sum p = 1`` and
``u = p^(2 - alpha) = [x]_+^(r - 1)``.
"""

from __future__ import annotations

import triton
import triton.language as tl

from adasplash2.backends.triton import sizes

INFINITY = tl.constexpr(float("inf"))
INTERPRETED = tl.constexpr(sizes.INTERPRETED)

SIZES = ["heads_q", "group", "length_q", "length_k", "blocks", "tiles", "work_items", "length"]
"""Arguments whose values compile nothing new."""

PROB_SCALE = tl.constexpr(1024.0)
"""Factor of probabilities that are rounded to float16, whose smallest normal number is 6e-5."""


@triton.jit
def larger(a, b):
    """The maximum, NaN where either is."""
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def largest(x, AXIS: tl.constexpr):
    """The maximum along an axis, NaN where one is in it."""
    if INTERPRETED:  # whose reductions by a function are loops in Python
        spoiled = tl.max((x != x).to(tl.int32), AXIS) > 0
        return tl.where(spoiled, float("nan"), tl.max(tl.where(x != x, -INFINITY, x), AXIS))
    else:
        return tl.reduce(x, AXIS, larger)


@triton.jit
def any_of(flags):
    """Whether one of a block's booleans is set."""
    return tl.max(flags.to(tl.int32), 0) > 0


@triton.jit
def is_finite(x):
    return tl.abs(x) < INFINITY


@triton.jit
def mark_rows(unsafe, tile, inside):
    """Store for each row of a tile whether it has an entry that is not finite.

    By rows and not as one number: Triton 3.7.1 compiles no scalar of a product for sm_100.
    """
    tl.store(unsafe, tl.max(tl.where(is_finite(tile), 0, 1), 1).to(tl.int8), mask=inside)


@triton.jit
def is_marked(unsafe, inside):
    return tl.max(tl.load(unsafe, mask=inside, other=0).to(tl.int32), 0) > 0


@triton.jit
def head_of(base, stride_batch, stride_head, batch, head):
    """Address of one head of a ``(batch, heads, length, head_dim)`` tensor."""
    return base + batch.to(tl.int64) * stride_batch + head.to(tl.int64) * stride_head


@triton.jit
def tile_pointers(base, stride, first, BLOCK: tl.constexpr, PADDED: tl.constexpr):
    rows = tl.arange(0, BLOCK)[:, None] * stride
    return base + first.to(tl.int64) * stride + rows + tl.arange(0, PADDED)[None, :]


@triton.jit
def tile_mask(
    first, length, BLOCK: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr
):
    rows = first + tl.arange(0, BLOCK)[:, None]
    return (rows < length) & (tl.arange(0, PADDED)[None, :] < WIDTH)


@triton.jit
def load_tile(
    base,
    stride,
    first,
    length,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
    PADDED: tl.constexpr,
    EDGE: tl.constexpr,
):
    """Rows ``first`` and following of a head; zeros from ``length`` (where EDGE) and WIDTH on."""
    pointers = tile_pointers(base, stride, first, BLOCK, PADDED)
    if EDGE:
        mask = tile_mask(first, length, BLOCK, WIDTH, PADDED)
        tile = tl.load(pointers, mask=mask, other=0.0)
    elif WIDTH != PADDED:
        tile = tl.load(pointers, mask=tl.arange(0, PADDED)[None, :] < WIDTH, other=0.0)
    else:
        tile = tl.load(pointers)
    return tile


@triton.jit
def store_tile(
    base,
    stride,
    first,
    length,
    tile,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
    PADDED: tl.constexpr,
):
    pointers = tile_pointers(base, stride, first, BLOCK, PADDED)
    mask = tile_mask(first, length, BLOCK, WIDTH, PADDED)
    tl.store(pointers, tile.to(base.dtype.element_ty), mask=mask)


@triton.jit
def matmul(a, b):
    """``a b`` in float32; float32 operands are not cut to TensorFloat-32."""
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def finite_part(tile, SAFE: tl.constexpr):
    """The tile, with zeros for what is not finite where SAFE, so that ``0 * inf`` adds nothing."""
    if SAFE:
        tile = tl.where(is_finite(tile), tile, tl.zeros_like(tile))
    return tile


@triton.jit
def signed(s, SIGN: tl.constexpr):
    """Scores with the sign of the scale: -1, 0 or 1."""
    if SIGN != 1:
        s = s * SIGN
    return s


@triton.jit
def allowed(rows, keys, length_k, CAUSAL: tl.constexpr):
    """Which of ``keys`` each of ``rows`` may see; both are broadcast against each other."""
    mask = (keys < length_k) & (rows >= 0)
    if CAUSAL:
        mask = mask & (keys <= rows)
    return mask


@triton.jit
def open_tiles(first_row, length_k, CAUSAL: tl.constexpr, TILE: tl.constexpr):
    """How many leading key tiles every row from ``first_row`` on sees in full."""
    tiles = length_k // TILE
    if CAUSAL:
        tiles = tl.minimum(tiles, (first_row + 1) // TILE)
    return tiles


@triton.jit
def seen_tiles(first_row, length_k, CAUSAL: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr):
    """How many leading key tiles some of BLOCK rows from ``first_row`` on sees."""
    keys = length_k
    if CAUSAL:
        keys = tl.minimum(keys, first_row + BLOCK)
    return tl.cdiv(keys, TILE)


@triton.jit
def weights(x, r, ALPHA: tl.constexpr):
    """``p`` and ``u`` of distances ``x``; zeros where ``x`` is not above zero, also for NaN."""
    inside = tl.where(x > 0.0, x, 0.0)
    if ALPHA == 1.5:
        p = inside * inside
        u = inside
    elif ALPHA == 2.0:
        p = inside
        u = tl.where(x > 0.0, 1.0, 0.0)
    else:
        logarithm = tl.log2(tl.where(x > 0.0, x, 1.0))
        p = tl.where(x > 0.0, tl.exp2(r * logarithm), 0.0)
        u = tl.where(x > 0.0, tl.exp2((r - 1.0) * logarithm), 0.0)
    return p, u


@triton.jit
def rise(mass, slope, r, ALPHA: tl.constexpr):
    """Newton's step for ``g(t) = (sum p)^(1/r) - 1`` from ``mass = sum p``, ``slope = sum u``.

    ``g`` is a norm of ``[z - t]_+`` less one: convex and falling for ``r >= 1``, so that steps
    from below the root never pass it; and linear where few keys hold the mass, so that two or
    three steps suffice.
    """
    if ALPHA == 1.5:
        gap = mass - tl.sqrt(mass)
    elif ALPHA == 2.0:
        gap = mass - 1.0
    else:
        safe = tl.where(mass > 0.0, mass, 1.0)
        gap = mass - tl.exp2((1.0 - 1.0 / r) * tl.log2(safe))
    return gap / tl.where(slope > 0.0, slope, 1.0)
