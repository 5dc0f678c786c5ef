"""Where a score is made: which keys a query may see, and what becomes of ``q . k``.

What masks, windows, caps, slopes, scales and dropout do is said here and nowhere else. Other files
learn from ``opt`` whether a call asks for one, to leave out what it takes, and ask here for what it
does.

Notation: a *product* is ``q . k``, times the sign of the scale where not ``opt.scored``; ``s`` is
the product or, where ``opt.scored``, the score; ``top`` the largest ``s`` of a row, ``c = (alpha -
1) |scale|``, without the scale where ``opt.scored``; ``x = c (s - top) - t`` the distance of a key
above the threshold ``tau = c top + t``. Near alpha = 1 (see ``lift_of``) ``t`` is kept with 1 added
and ``x`` with 1 taken away: all that matters there is in digits that a number near 1 does not have.
``at_rows``, ``(q, top, t, first_row)``, is what belongs to the queries of a row block.

``rows`` and ``keys`` are numbers, of shapes that broadcast: either may run along the first axis.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from adasplash2.backends.triton.kernels.arithmetic import (
    INFINITY,
    added_product,
    any_of,
    matmul,
    tanh,
)

GROUP = tl.constexpr(8)
"""Neighbouring keys of which four threads hold two each of a product of matrices."""

FARTHEST = tl.constexpr(2.0**30)
"""A place behind all keys, in float32 and in 32 bits."""


class HeadTerms(NamedTuple):
    """What scores of one query head are made with; 0 where ``opt`` does not ask for it: Triton
    before 3.7 takes no None here.

    ``c`` and ``r = 1 / (alpha - 1)``; where alpha is an operand, ``c`` is NaN for one that is not
    allowed. ``slope`` and ``sink``: numbers. ``mask``, ``scales``, ``slopes`` (in the place of
    ``slope``) and ``ranges``: where those of the head begin. ``seed`` of its sequence, and the
    head's ``number`` among those of all.
    """

    c: Any
    r: Any
    slope: Any = 0
    sink: Any = 0
    mask: Any = 0
    scales: Any = 0
    slopes: Any = 0
    ranges: Any = 0
    seed: Any = 0
    number: Any = 0


@triton.jit
def base_of(operand, batch, head):
    """Where an operand's entries of one head begin."""
    return operand.base + batch.to(tl.int64) * operand.batch + head.to(tl.int64) * operand.head


@triton.jit
def terms_of(batch, head, shape, opt: tl.constexpr):
    """The :class:`HeadTerms` of a query head."""
    asked = shape.terms
    c = shape.c
    r = shape.r
    slope = 0
    sink = 0
    mask = 0
    scales = 0
    slopes = 0
    ranges = 0
    seed = 0
    number = 0
    if opt.alphas:
        excess = tl.load(base_of(asked.alphas, batch, head)) - 1.0
        right = (excess > 0.0) & (excess <= 1.0)
        c = tl.where(right, excess * c, float("nan"))
        r = 1.0 / tl.where(right, excess, 1.0)
    if opt.slopes:
        slopes = base_of(asked.slopes, batch, head)
    elif opt.alibi:
        slope = slope_from(tl.load(base_of(asked.slopes, batch, head)))
    if opt.sinks:
        sink = tl.load(base_of(asked.sinks, batch, head))
    if opt.masked:
        mask = base_of(asked.mask, batch, head)
    if opt.scales:
        scales = base_of(asked.scales, batch, head)
    if opt.ranges:
        ranges = asked.ranges.base + batch.to(tl.int64) * asked.ranges.batch
    if opt.dropout:
        seed = tl.load(asked.seed.base + batch * asked.seed.batch)
        number = batch * shape.heads_q + head
    return HeadTerms(c, r, slope, sink, mask, scales, slopes, ranges, seed, number)


# Which keys a query may see


@triton.jit
def from_odd(number):
    """What ``sizes.as_odd`` was made of."""
    return (number >> 1).to(tl.int32) - 1


@triton.jit
def load_range(rows, part: tl.constexpr, terms, shape):
    """First key, end or place of ``rows``, by ``part``; zero for rows that do not exist."""
    ranges = shape.terms.ranges
    places = terms.ranges + part * ranges.part + rows.to(tl.int64) * ranges.row
    return tl.load(places, mask=rows < shape.length_q, other=0)


@triton.jit
def place_of(rows, terms, shape, opt: tl.constexpr):
    """The key whose distance to each of ``rows`` is zero."""
    if opt.ranges:
        return load_range(rows, 2, terms, shape)
    elif opt.shifted:
        return rows + (shape.length_k - shape.length_q)
    else:
        return rows


@triton.jit
def begin_of(rows, terms, shape, opt: tl.constexpr):
    """The first key that each of ``rows`` may see, where ``opt.lower``."""
    if opt.ranges:
        begin = load_range(rows, 0, terms, shape)
    else:
        begin = place_of(rows, terms, shape, opt) - from_odd(shape.terms.left)
    return tl.minimum(tl.maximum(begin, 0), shape.length_k)


@triton.jit
def end_of(rows, terms, shape, opt: tl.constexpr):
    """The end of the keys that each of ``rows`` may see, where ``opt.upper``; it may lie behind the
    last key."""
    if opt.ranges:
        end = load_range(rows, 1, terms, shape)
    else:
        end = place_of(rows, terms, shape, opt) + 1
        if opt.right:
            end += from_odd(shape.terms.right)
    if opt.ranges or opt.shifted:
        end = tl.maximum(end, 0)
    return end


@triton.jit
def last_row(first_row, shape, opt: tl.constexpr):
    """The last row of a block, one that exists where ``opt.ranges``: other rows have none."""
    row = first_row + opt.block_q - 1
    if opt.ranges:
        row = tl.minimum(row, shape.length_q - 1)
    return row


@triton.jit
def open_begin(first_row, terms, shape, opt: tl.constexpr):
    """The first key tile from which on every row from ``first_row`` on sees in full, up to
    :func:`open_tiles`. Neither end of what is seen falls from row to row."""
    tile = 0
    if opt.lower:
        row = last_row(first_row, shape, opt)
        tile = tl.cdiv(begin_of(row, terms, shape, opt), opt.block_k)
    return tile


@triton.jit
def open_tiles(first_row, length_k, terms, shape, opt: tl.constexpr):
    """The end of the key tiles that every row from ``first_row`` on sees in full."""
    tiles = length_k // opt.block_k
    if opt.upper:
        tiles = tl.minimum(tiles, end_of(first_row, terms, shape, opt) // opt.block_k)
    return tiles


@triton.jit
def is_open(tile, first_row, length_k, terms, shape, opt: tl.constexpr):
    """Whether every row from ``first_row`` on sees a key tile in full."""
    found = open_tiles(first_row, length_k, terms, shape, opt) > tile
    if opt.lower:
        found = found & (open_begin(first_row, terms, shape, opt) <= tile)
    return found


@triton.jit
def seen_begin(first_row, terms, shape, opt: tl.constexpr):
    """The first key tile that some row of the block from ``first_row`` on sees."""
    tile = 0
    if opt.lower:
        tile = begin_of(first_row, terms, shape, opt) // opt.block_k
    return tile


@triton.jit
def seen_tiles(first_row, terms, shape, opt: tl.constexpr):
    """The end of the key tiles that some row of the block from ``first_row`` on sees."""
    keys = shape.length_k
    if opt.upper:
        keys = tl.minimum(keys, end_of(last_row(first_row, shape, opt), terms, shape, opt))
    return tl.cdiv(keys, opt.block_k)


@triton.jit
def tiles_seen_by(rows, terms, shape, opt: tl.constexpr):
    """The first key tile that one of ``rows`` sees, and the end of those."""
    first = 0
    keys = shape.length_k
    if opt.lower:
        first = tl.min(begin_of(rows, terms, shape, opt), 0) // opt.block_k
    if opt.upper:
        keys = tl.minimum(keys, tl.max(end_of(rows, terms, shape, opt), 0))
    return first, tl.maximum(tl.cdiv(keys, opt.block_k), first)


@triton.jit
def seeing_rows(first_key, shape, opt: tl.constexpr):
    """The rows that see some key of a tile, from a first one up to an end, at least one: where
    windows end on both sides."""
    shift = shape.length_k - shape.length_q if opt.shifted else 0
    begin = first_key - shift
    if opt.right:
        begin -= from_odd(shape.terms.right)
    end = first_key + opt.block_k + from_odd(shape.terms.left) - shift
    begin = tl.minimum(tl.maximum(begin, 0), shape.length_q - 1)
    return begin, tl.maximum(tl.minimum(end, shape.length_q), begin + 1)


@triton.jit
def near_tiles(q, first_row, begin, end, kv_row, terms, shape, opt: tl.constexpr):
    """``begin`` and ``end`` of the key tiles of a row block without those that slopes keep out of
    its support.

    Without slope and mask ``|s| <= m = |scale| |q_i| max |k_j|``, and no more than the softcap. The
    nearest key that row ``i`` sees, ``d`` from its place, has a score of at least ``-m - slope d``,
    one at a distance ``e`` of at most ``m - slope e``. What is in the support lies less than
    ``1 / (alpha - 1)`` below the highest score, thus ``e < d + (2 m + 1 / (alpha - 1)) / slope``. A
    sink only raises the highest score. A mask would move scores, or hide the nearest key: with one
    this is not asked.
    """
    rows = first_row + tl.arange(0, opt.block_q)
    exists = rows < shape.length_q
    wide = q.to(tl.float32)
    m = tl.sqrt(tl.sum(wide * wide, 1)) * tl.load(shape.terms.longest + kv_row)
    m = m * tl.abs(scale_of(rows, terms, shape, opt))
    if opt.softcap:
        m = tl.minimum(m, shape.terms.softcap, propagate_nan=tl.PropagateNan.ALL)
    place = place_of(rows, terms, shape, opt)
    nearest = place * 0
    if opt.lower:
        nearest = tl.maximum(nearest, begin_of(rows, terms, shape, opt) - place)
    last = shape.length_k - 1
    if opt.upper:
        last = tl.minimum(last, end_of(rows, terms, shape, opt) - 1)
    nearest = tl.maximum(nearest, place - last)
    slope = slope_of(rows, terms, shape, opt)
    distance = (2.0 * m + terms.r) / tl.where(slope > 0.0, slope, 1.0)
    distance = tl.where(slope > 0.0, nearest.to(tl.float32) + distance, INFINITY)
    place = place.to(tl.float32)
    # More than rounding can take from it, also from the norms and the scores.
    distance = distance * (1.0 + 2.0**-10) + tl.abs(place) * 2.0**-20 + 2.0
    right = distance < INFINITY  # not NaN either
    first = tl.min(tl.where(exists, tl.where(right, place - distance, 0.0), INFINITY), 0)
    stop = tl.max(tl.where(exists, tl.where(right, place + distance, INFINITY), 0.0), 0)
    first = tl.minimum(tl.maximum(first, 0.0), FARTHEST).to(tl.int32)
    stop = tl.minimum(tl.maximum(stop, 0.0), FARTHEST).to(tl.int32)
    end = tl.minimum(end, tl.cdiv(stop + 1, opt.block_k))
    return tl.minimum(tl.maximum(begin, first // opt.block_k), end), end


@triton.jit
def leading_seen(rows, terms, shape, opt: tl.constexpr):
    """How many leading keys each of ``rows`` may see, where these are all that it may."""
    keys = tl.full(rows.shape, 0, tl.int32) + shape.length_k
    if opt.upper:
        keys = tl.minimum(end_of(rows, terms, shape, opt), keys)
    return keys


@triton.jit
def count_seen(rows, terms, shape, opt: tl.constexpr):
    """How many keys each of ``rows`` may see, masks aside."""
    keys = leading_seen(rows, terms, shape, opt)
    if opt.lower:
        keys = tl.maximum(keys - begin_of(rows, terms, shape, opt), 0)
    return keys


@triton.jit
def window(rows, terms, shape, opt: tl.constexpr):
    """The first key that each of ``rows`` may see, and how many, masks aside: for
    :func:`is_within`."""
    keys = count_seen(rows, terms, shape, opt).to(tl.uint32, bitcast=True)
    first = rows * 0
    if opt.lower:
        first = begin_of(rows, terms, shape, opt)
    return first, keys


@triton.jit
def is_within(keys, seen):
    """Which of ``keys`` are ``seen``, a :func:`window`, by one comparison for each: what is before
    the first is large without a sign."""
    first, count = seen
    return (keys - first).to(tl.uint32, bitcast=True) < count


@triton.jit
def in_range(rows, keys, terms, shape, opt: tl.constexpr, further=0):
    """Which of ``keys`` each of ``rows`` may see as far as numbers and ranges say: a mask has its
    say in :func:`bias_of`. Under causal windows of keys that are ``further`` than these."""
    if opt.causal and not opt.ranges:  # one limit, and one comparison for each key
        place = place_of(rows, terms, shape, opt)
        last = tl.where(rows >= 0, tl.minimum(place, shape.length_k - 1), -1)
        if opt.left:  # and of windows too: what is before the first is large without a sign
            begin = place - from_odd(shape.terms.left)
            seen = tl.maximum(last + 1 - begin, 0)
            if opt.even:  # of keys that exist, all rows see as many
                seen = from_odd(shape.terms.left) + 1
            mask = is_within(keys + further, (begin, seen.to(tl.uint32, bitcast=True)))
        else:
            mask = keys <= last
    else:
        mask = (keys < shape.length_k) & (rows >= 0)
    if opt.ranges:
        mask = mask & (keys >= begin_of(rows, terms, shape, opt))
        mask = mask & (keys < end_of(rows, terms, shape, opt))
    else:
        place = place_of(rows, terms, shape, opt)
        if opt.right:
            mask = mask & (keys <= place + from_odd(shape.terms.right))
        if opt.left and not opt.causal:
            mask = mask & (keys >= place - from_odd(shape.terms.left))
    return mask


@triton.jit
def among_seen(values, first_row, first_key, terms, shape, opt: tl.constexpr):
    """The values of rows and keys from these on, -inf where a key may not be seen.

    Where one comparison is enough a thread counts from its first key on: else it makes the number
    of each anew, having no registers to keep them.
    """
    rows = first_row + tl.arange(0, values.shape[0])
    if opt.causal and opt.left and not opt.ranges:
        groups: tl.constexpr = values.shape[1] // GROUP
        keys = (first_key + tl.arange(0, GROUP))[None, None, :]
        further = (tl.arange(0, groups) * GROUP)[None, :, None]
        seen = in_range(rows[:, None, None], keys, terms, shape, opt, further)
        grouped = tl.reshape(values, (values.shape[0], groups, GROUP))
        return tl.reshape(tl.where(seen, grouped, -INFINITY), values.shape)
    else:
        keys = first_key + tl.arange(0, values.shape[1])
        seen = in_range(rows[:, None], keys[None, :], terms, shape, opt)
        return tl.where(seen, values, -INFINITY)


@triton.jit
def allowed(rows, keys, terms, shape, opt: tl.constexpr):
    """Which of ``keys`` each of ``rows`` may see, masks and all."""
    mask = in_range(rows, keys, terms, shape, opt)
    if opt.masked:
        mask = mask & (bias_of(rows, keys, terms, shape, opt) != -INFINITY)
    return mask


@triton.jit
def any_shown(bias):
    """Whether a mask of booleans, of which ``bias`` is what it adds, shows a pair of a tile."""
    return any_of(tl.max((bias != -INFINITY).to(tl.int32), 1))


# What becomes of a product


@triton.jit
def products(a, b, bias, opt: tl.constexpr):
    """``a b^T``, with the sign of the scale where not ``opt.scored``; where ``opt.folded`` scores
    with their ``bias``, of which one operand is :func:`folded_scale`."""
    if opt.folded:
        return added_product(a, tl.trans(b), bias)
    else:
        s = matmul(a, tl.trans(b))
        if opt.sign != 1:
            s = s * opt.sign
        return s


@triton.jit
def folded_scale(tile, shape, opt: tl.constexpr):
    """Queries or keys, with the scale where ``opt.folded``: a power of two, so that nothing is
    rounded."""
    if opt.folded:
        tile = (tile.to(tl.float32) * shape.terms.scale).to(tile.dtype)
    return tile


@triton.jit
def scale_of(rows, terms, shape, opt: tl.constexpr):
    """What products of ``rows`` are multiplied by, where ``opt.scored``."""
    if opt.scales:
        places = terms.scales + rows.to(tl.int64) * shape.terms.scales.row
        return tl.load(places, mask=rows < shape.length_q, other=0.0)
    else:
        return shape.terms.scale


@triton.jit
def capped(product, rows, terms, shape, opt: tl.constexpr):
    """The scaled product, where ``opt.scored``, and not beyond the softcap."""
    s = product
    if opt.scored and not opt.folded:
        s = s * scale_of(rows, terms, shape, opt)
        if opt.softcap:
            s = shape.terms.softcap * tanh(s / shape.terms.softcap)
    return s


@triton.jit
def through_cap(ds, s, shape, opt: tl.constexpr):
    """The gradient of a scaled product from ``ds``; ``s`` by :func:`capped`."""
    if opt.softcap:
        share = s / shape.terms.softcap
        ds = ds * (1.0 - share * share)
    return ds


@triton.jit
def key_distance(rows, keys, terms, shape, opt: tl.constexpr):
    """How far each of ``keys`` is from the place of each of ``rows``."""
    return tl.abs(place_of(rows, terms, shape, opt) - keys).to(tl.float32)


@triton.jit
def slope_from(given):
    """A slope, NaN where it is below zero: the host does not look at values."""
    return tl.where(given >= 0.0, given, float("nan"))


@triton.jit
def slope_of(rows, terms, shape, opt: tl.constexpr):
    """What distances of each of ``rows`` are multiplied by, where ``opt.alibi``."""
    if opt.slopes:
        places = terms.slopes + rows.to(tl.int64) * shape.terms.slopes.row
        return slope_from(tl.load(places, mask=rows < shape.length_q, other=0.0))
    else:
        return terms.slope


@triton.jit
def bias_of(rows, keys, terms, shape, opt: tl.constexpr):
    """What masks and slopes add to a score; -inf hides a key."""
    bias = 0.0
    if opt.masked:
        mask = shape.terms.mask
        places = terms.mask + rows.to(tl.int64) * mask.row + keys.to(tl.int64) * mask.key
        inside = (rows < shape.length_q) & (keys < shape.length_k)
        if opt.adds:
            # Zeros, which loads ahead fill in themselves; what there is not, `in_range` hides.
            bias = tl.load(places, mask=inside, other=0.0).to(tl.float32)
        else:
            bias = tl.where(tl.load(places, mask=inside, other=0) != 0, 0.0, -INFINITY)
    if opt.alibi:
        slope = slope_of(rows, terms, shape, opt)
        bias = bias - slope * key_distance(rows, keys, terms, shape, opt)
    return bias


@triton.jit
def biased(s, bias, opt: tl.constexpr):
    """A score with its bias. What is hidden stays so, whatever its key holds."""
    if opt.folded:
        s = tl.where(bias == -INFINITY, -INFINITY, s)
    elif opt.masked:
        s = tl.where(bias == -INFINITY, -INFINITY, s + bias)
    elif opt.alibi:
        s = s + bias
    return s


@triton.jit
def distance(s, top, t, c, opt: tl.constexpr):
    """``x = c (s - top) - t``; where not ``opt.relative``, ``x = c s - tau``, which rounds as
    ``tau`` does but costs one operation less."""
    if opt.relative:
        return c * (s - top) - t
    else:
        return c * s - t


@triton.jit
def column(top, opt: tl.constexpr):
    """``top`` against the keys; nothing where it is not used."""
    if opt.relative:
        top = top[:, None]
    return top


@triton.jit
def numbers_of(first_row, first_key, opt: tl.constexpr, ROWS: tl.constexpr,
               BY_KEY: tl.constexpr = False):  # fmt: skip
    """``rows`` and ``keys`` of ROWS rows and a key tile; where BY_KEY the keys run along the first
    axis."""
    rows = first_row + tl.arange(0, ROWS)
    keys = first_key + tl.arange(0, opt.block_k)
    if BY_KEY:
        return rows[None, :], keys[:, None]
    else:
        return rows[:, None], keys[None, :]


@triton.jit
def folded_bias(first_row, first_key, terms, shape, opt: tl.constexpr, ROWS: tl.constexpr):
    """What :func:`products` of ROWS rows and a key tile add up from, where ``opt.folded``; what is
    hidden, with a key that is not finite, is NaN then: off the support."""
    bias = 0.0
    if opt.folded:
        rows, keys = numbers_of(first_row, first_key, opt, ROWS)
        bias = bias_of(rows, keys, terms, shape, opt)
    return bias


@triton.jit
def distances_of(product, top, t, first_row, first_key, terms, shape, opt: tl.constexpr,
                 ROWS: tl.constexpr, BY_KEY: tl.constexpr, EDGE):  # fmt: skip
    """``x`` of products (off the support where a key may not be seen) and scores by
    :func:`capped`; the others as for :func:`numbers_of`."""
    s = product
    score = product
    if opt.scored and not opt.folded:
        rows, keys = numbers_of(first_row, first_key, opt, ROWS, BY_KEY)
        s = capped(product, rows, terms, shape, opt)
        score = s
        if opt.biased:  # what is hidden, with a key that is not finite, is NaN: off the support
            score = s + bias_of(rows, keys, terms, shape, opt)
    if opt.joined:
        if EDGE:  # see `is_edge`; before the last operation, into which `x` is cut
            if BY_KEY:
                rows, keys = numbers_of(first_row, first_key, opt, ROWS, BY_KEY)
                score = tl.where(in_range(rows, keys, terms, shape, opt), score, -INFINITY)
            else:
                score = among_seen(score, first_row, first_key, terms, shape, opt)
        x = distance(score, top, t, terms.c, opt)
    else:
        x = distance(score, top, t, terms.c, opt)
        if EDGE:
            rows, keys = numbers_of(first_row, first_key, opt, ROWS, BY_KEY)
            x = tl.where(in_range(rows, keys, terms, shape, opt), x, -1.0)
    return x, s


@triton.jit
def distances(at_rows, k, first_key, terms, shape, opt: tl.constexpr, EDGE):
    """:func:`distances_of` a row block and a key tile, the scores, and the products."""
    q, top, t, first_row = at_rows
    bias = folded_bias(first_row, first_key, terms, shape, opt, opt.block_q)
    product = products(q, k, bias, opt)
    x, s = distances_of(product, column(top, opt), t[:, None], first_row, first_key, terms, shape,
                        opt, opt.block_q, False, EDGE)  # fmt: skip
    return x, s, product


@triton.jit
def lift_of(r, opt: tl.constexpr):
    """What ``t`` is kept with added: 1 where ``r`` is so large that a power takes the digits of its
    base, see ``sizes.is_shallow``."""
    if opt.alphas:
        return tl.where(r > 2.0, 1.0, 0.0)
    else:
        return 1.0 if opt.shallow else 0.0


@triton.jit
def is_inside(x, r, opt: tl.constexpr):
    """Which keys of distances ``x`` are in the support."""
    if opt.alphas:
        return x > -lift_of(r, opt)
    else:
        return x > (-1.0 if opt.shallow else 0.0)


@triton.jit
def on_support(values, x, r, opt: tl.constexpr, SAFE: tl.constexpr):
    """The values, exactly zero off the support where SAFE."""
    if SAFE:
        values = tl.where(is_inside(x, r, opt), values, 0.0)
    return values


@triton.jit
def product_gradient(ds, s, x, r, shape, opt: tl.constexpr, SAFE: tl.constexpr):
    """The gradient of a scaled product, see :func:`on_support`. That of ``q . k`` is left to the
    sums: :func:`through_scale`, and :func:`with_row_scales` where rows have scales of their own."""
    if opt.softcap:
        ds = on_support(through_cap(ds, s, shape, opt), x, r, opt, SAFE)
    return ds


@triton.jit
def through_scale(sums, scale):
    """Sums over gradients of scaled products, as gradients of queries or keys."""
    return sums * scale


@triton.jit
def with_row_scales(values, rows, terms, shape, opt: tl.constexpr):
    """Values times the scales that ``rows`` have of their own, if they have."""
    if opt.scales:
        values = values * scale_of(rows, terms, shape, opt)
    return values


# Dropout


@triton.jit
def is_kept(rows, keys, terms, shape):
    """Which probabilities are not dropped."""
    zeros = rows * 0 + keys * 0
    words, _, _, _ = tl.philox(terms.seed, zeros + keys, zeros + rows, zeros + terms.number, zeros)
    # Both as signed numbers, less 2^31: a limit that fits 32 bits is one type, whatever it is.
    return (words ^ 0x80000000).to(tl.int32, bitcast=True) >= shape.terms.dropped


@triton.jit
def through_dropout(values, kept, shape):
    """What dropout makes of values, which may be gradients; ``kept`` by :func:`is_kept`."""
    return tl.where(kept, values * shape.terms.kept, 0.0)


@triton.jit
def with_kept_factor(values, shape, opt: tl.constexpr):
    """Sums of what dropout has left, with the factor that makes up for what it has dropped."""
    if opt.dropout:
        values = values * shape.terms.kept
    return values
