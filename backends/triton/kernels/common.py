"""What every kernel shares: tiles, scores, masks, and the mathematics of the threshold.

Notation: ``s = q . k`` (times the sign of the scale), ``top`` the largest ``s`` of a row,
``c = (alpha - 1) |scale|``, ``x = c (s - top) - t`` the distance of a key above the threshold
``tau = c top + t``, and ``r = 1 / (alpha - 1)``. Then ``p = [x]_+^r`` with ``sum p = 1`` and
``u = p^(2 - alpha) = [x]_+^(r - 1)``. Where ``opt.shallow``, ``t`` is kept with 1 added and ``x``
with 1 taken away: near alpha = 1 all that matters is in digits that a number near 1 does not have.

Arguments: ``query``, ``key`` and other tensors with heads are ``sizes.Heads``, ``shape`` is a
``sizes.Shape``, ``opt`` the compile-time ``sizes.Options``. A *head* ``(address, row stride)`` is
one head of a tensor; a *row block* ``(q, top, t, first_row)`` what belongs to ``opt.block_q``
queries; *entries* ``(numbers, open, end)`` are a list of which the first ``open`` need no mask.
"""

from __future__ import annotations

import triton
import triton.language as tl

from adasplash2.backends.triton import sizes

INFINITY = tl.constexpr(float("inf"))
INTERPRETED = tl.constexpr(sizes.INTERPRETED)

PROB_SCALE = tl.constexpr(1024.0)
"""Factor of probabilities that are rounded to float16, whose smallest normal number is 6e-5."""

HIGHEST = tl.constexpr(-(2.0**-126))
"""Upper end of the window of ``t``. ``n`` equal keys have ``t = -n^(1 - alpha)``, for large alphas
less than any float32; but the nearest key must keep a distance to it."""

EPSILON = tl.constexpr(2.0**-23)

FREE_STEPS = tl.constexpr(8)
"""Newton's steps above alpha = 2 before every other one becomes a bisection."""


# Reductions that keep NaN


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
    """Whether one of a vector's booleans is set."""
    return tl.max(flags.to(tl.int32), 0) > 0


# Tiles


@triton.jit
def head_of(tensor, batch, head):
    base = tensor.base + batch.to(tl.int64) * tensor.batch + head.to(tl.int64) * tensor.head
    return base, tensor.row


@triton.jit
def tile_pointers(head, first, BLOCK: tl.constexpr, PADDED: tl.constexpr):
    base, stride = head
    rows = tl.arange(0, BLOCK)[:, None] * stride
    return base + first.to(tl.int64) * stride + rows + tl.arange(0, PADDED)[None, :]


@triton.jit
def tile_mask(first, length, BLOCK: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr):
    rows = first + tl.arange(0, BLOCK)[:, None]
    return (rows < length) & (tl.arange(0, PADDED)[None, :] < WIDTH)


@triton.jit
def load_tile(
    head, first, length, BLOCK: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr,
    EDGE: tl.constexpr,
):  # fmt: skip
    """Rows ``first`` and following of a head; zeros from ``length`` (where EDGE) and WIDTH on."""
    pointers = tile_pointers(head, first, BLOCK, PADDED)
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
    head, first, length, tile, BLOCK: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr
):
    mask = tile_mask(first, length, BLOCK, WIDTH, PADDED)
    element = head[0].dtype.element_ty
    tl.store(tile_pointers(head, first, BLOCK, PADDED), tile.to(element), mask=mask)


@triton.jit
def is_finite(x):
    return tl.abs(x) < INFINITY


@triton.jit
def finite_part(tile, SAFE: tl.constexpr):
    """The tile, with zeros for what is not finite where SAFE, so that ``0 * inf`` adds nothing."""
    if SAFE:
        tile = tl.where(is_finite(tile), tile, tl.zeros_like(tile))
    return tile


@triton.jit
def count_bad(bad, kept, tile):
    """Add to ``bad`` how many entries of the tile that are kept are +inf, and how many -inf, by row
    of ``kept`` and column of the tile; NaN is both."""
    above, below = bad
    kept = kept.to(tile.dtype)
    above += matmul(kept, tl.where(tile < INFINITY, 0.0, 1.0).to(tile.dtype))
    below += matmul(kept, tl.where(tile > -INFINITY, 0.0, 1.0).to(tile.dtype))
    return above, below


@triton.jit
def with_bad(total, bad):
    """A sum of finite entries and what :func:`count_bad` counted beside them."""
    above, below = bad
    infinite = tl.where(above > 0.0, INFINITY, -INFINITY)
    infinite = tl.where((above > 0.0) & (below > 0.0), float("nan"), infinite)
    return tl.where((above > 0.0) | (below > 0.0), infinite, total)


@triton.jit
def mark_rows(unsafe, tile, inside):
    """Store for each row of a tile whether it has an entry that is not finite.

    By rows and not as one number: Triton 3.7.1 compiles no scalar of a product for sm_100.
    """
    tl.store(unsafe, tl.max(tl.where(is_finite(tile), 0, 1), 1).to(tl.int8), mask=inside)


@triton.jit
def is_marked(unsafe, inside):
    return any_of(tl.load(unsafe, mask=inside, other=0))


# Rows and lists


@triton.jit
def rows_at(head_row, first, length, BLOCK: tl.constexpr):
    """Offsets of BLOCK rows of a head in a ``(heads, length)`` array, and which of them exist."""
    rows = first + tl.arange(0, BLOCK)
    return head_row.to(tl.int64) * length + rows, rows < length


@triton.jit
def row_block_at(number, shape, opt: tl.constexpr):
    """The row block that is ``number`` in launch order (head by head, so that keys and values stay
    in the L2, and longest rows first): its place among all, ``(batch, head, kv_head)``, its first
    row, and :func:`rows_at`."""
    blocks = tl.cdiv(shape.length_q, opt.block_q)
    head_row = number // blocks
    block = blocks - 1 - number % blocks
    head = head_row % shape.heads_q
    at_head = (head_row // shape.heads_q, head, head // shape.group)
    first_row = block * opt.block_q
    at_row, inside = rows_at(head_row, first_row, shape.length_q, opt.block_q)
    return head_row * blocks + block, at_head, first_row, at_row, inside


@triton.jit
def entries_at(lists, counts, number, capacity):
    """The entries of list ``number``."""
    numbers = lists + number.to(tl.int64) * capacity
    return numbers, tl.load(counts + 2 * number), tl.load(counts + 2 * number + 1)


@triton.jit
def checked(entries, shape, opt: tl.constexpr, CHUNK: tl.constexpr):
    """The entries of a saved list of key tiles, and whether they are some: what was saved may have
    been written over since. If so there are none, so that nothing else is read.

    Entries are looked at before the loop over tiles: a limit inside it would keep Triton from
    asking for tiles ahead.
    """
    numbers, open_end, end = entries
    whole = shape.length_k // opt.block_k
    tiles = tl.cdiv(shape.length_k, opt.block_k)
    right = (open_end >= 0) & (open_end <= end) & (end <= tiles)
    end = tl.where(right, end, 0)
    for chunk in range(0, end, CHUNK):
        places = chunk + tl.arange(0, CHUNK)
        found = tl.load(numbers + places, mask=places < end, other=0)
        limit = tl.where(places < open_end, whole, tiles)
        outside = ((found < 0) | (found >= limit)) & (places < end)
        right = right & (any_of(outside) == 0)
    return (numbers, tl.where(right, open_end, 0), tl.where(right, end, 0)), right


@triton.jit
def portion(entries, EDGE: tl.constexpr):
    """The list, and where in it those that need no mask begin and end, or the others where EDGE."""
    numbers, open_end, end = entries
    return numbers, open_end if EDGE else 0, end if EDGE else open_end


@triton.jit
def entry_of(numbers, index, stop):
    """An entry of a list, zero from ``stop`` on.

    Loops load it an iteration ahead: else Triton waits for a tile as soon as it is asked for, since
    the entry of the next is asked for behind it.
    """
    return tl.load(numbers + index, mask=index < stop, other=0)


@triton.jit
def load_pair(number, keys, values, shape, opt: tl.constexpr, EDGE: tl.constexpr):
    """``(first_key, k, v)`` of a list's entry."""
    first = number * opt.block_k
    length = shape.length_k
    k = load_tile(keys, first, length, opt.block_k, opt.head_dim, opt.padded, EDGE)
    v = load_tile(values, first, length, opt.block_k, opt.head_dim_v, opt.padded_v, EDGE)
    return first, k, v


@triton.jit
def load_thresholds(top, t, at_row, inside, opt: tl.constexpr):
    """``top`` and ``t`` where ``opt.exact``, else zero and ``tau``; see :func:`distance`."""
    top = tl.load(top + at_row, mask=inside, other=0.0) if opt.exact else 0.0
    return top, tl.load(t + at_row, mask=inside, other=INFINITY)


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


# Scores and probabilities


@triton.jit
def matmul(a, b):
    """``a b`` in float32; float32 operands are not cut to TensorFloat-32."""
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def halves(x, TYPE: tl.constexpr):
    """``x`` as a sum of two numbers of a narrower type: what rounding takes from the first is the
    second."""
    first = x.to(TYPE)
    rest = tl.where(is_finite(first), x - first.to(tl.float32), 0.0)  # inf - inf is none
    return first, rest.to(TYPE)


@triton.jit
def cut_to(x, TYPE: tl.constexpr):
    """``x >= 0``, rounded to the digits of a 16-bit type (ties up, below its normal numbers to more
    than it holds), in fewer and faster instructions than a conversion there and back."""
    if tl.bfloat16 == TYPE or tl.float16 == TYPE:
        dropped: tl.constexpr = 23 - TYPE.fp_mantissa_width
        bits = x.to(tl.int32, bitcast=True) + (1 << (dropped - 1))
        x = (bits & -(1 << dropped)).to(tl.float32, bitcast=True)
    return x


@triton.jit
def in_halves(x, TYPE: tl.constexpr):
    """``x`` as its two halves add up to it, which float32 holds exactly."""
    first, second = halves(x, TYPE)
    return first.to(tl.float32) + second.to(tl.float32)


@triton.jit
def weighted(x, tile, opt: tl.constexpr):
    """``x tile``, where ``x`` is ``u`` or ``ds``, whose rounding to 16 bits may be too much: see
    ``sizes.is_halved``."""
    if opt.halved:
        first, second = halves(x, tile.dtype)
        return matmul(first, tile) + matmul(second, tile)
    else:
        return matmul(x.to(tile.dtype), tile)


@triton.jit
def scores(a, b, opt: tl.constexpr):
    """``a b^T`` with the sign of the scale."""
    s = matmul(a, tl.trans(b))
    if opt.sign != 1:
        s = s * opt.sign
    return s


@triton.jit
def allowed(rows, keys, length_k, opt: tl.constexpr):
    """Which of ``keys`` each of ``rows`` may see; both are broadcast against each other."""
    mask = (keys < length_k) & (rows >= 0)
    if opt.causal:
        mask = mask & (keys <= rows)
    return mask


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
def positive(x, opt: tl.constexpr):
    """``x`` where it is above zero, else zero, also for NaN.

    It is above one by rounding alone. Cut there, where not ``opt.exact``, NVIDIA's assembler puts
    both limits into the instruction before; a maximum takes two.
    """
    # The interpreter's maximum keeps NaN, against the definition.
    x = tl.where(x > 0.0, x, 0.0) if INTERPRETED else tl.maximum(x, 0.0)
    if not opt.exact:
        x = tl.minimum(x, 1.0)
    return x


@triton.jit
def split_binary(x):
    """``whole`` and ``rest`` of ``x = 2^whole rest > 0``, where ``rest`` lies between the roots of
    1/2 and 2."""
    bits = x.to(tl.int32, bitcast=True)
    whole = (bits - 0x3F3504F3) >> 23
    return whole, (bits - whole * (1 << 23)).to(tl.float32, bitcast=True)


@triton.jit
def power_of_two(whole, part, exponent):
    """``2^(exponent (whole + part))``. The logarithm comes in two parts, since the rounding of a
    large one would grow to several ulps of the power."""
    part = exponent * part
    most = exponent * whole.to(tl.float32)
    total = most + part
    lost = tl.fma(exponent, whole.to(tl.float32), -most) + (part - (total - most))
    y = tl.exp2(total)
    return y + y * (0.69314718 * lost)


@triton.jit
def power(x, exponent):
    """``x^exponent`` of ``x > 0``."""
    whole, rest = split_binary(x)
    return power_of_two(whole, tl.log2(rest), exponent)


@triton.jit
def log2_above_one(w):
    """``log2(1 + w)`` of ``w > -1``, as a whole number and a rest that is right to a few of its
    own ulps, also where ``w`` is far below an ulp of 1."""
    whole, rest = split_binary(1.0 + w)
    d = tl.where(whole == 0, w, rest - 1.0)
    f = d / (2.0 + d)  # log(1 + d) = 2 artanh(f), |f| < 0.172
    g = f * f
    series = 1.0 + g * (1.0 / 3.0 + g * (0.2 + g * (1.0 / 7.0 + g * (1.0 / 9.0))))
    return whole, 2.8853900818 * f * series


@triton.jit
def power_above_one(w, exponent):
    """``(1 + w)^exponent`` of ``w > -1``."""
    whole, rest = log2_above_one(w)
    return power_of_two(whole, rest, exponent)


@triton.jit
def shortfall(mass, exponent):
    """``1 - mass^-exponent`` of ``mass > 0``, to round-off also where the power is nearly 1."""
    whole, rest = log2_above_one(mass - 1.0)
    y = 0.69314718 * exponent * (whole.to(tl.float32) + rest)
    series = 1.0 - y / 2.0 * (1.0 - y / 3.0 * (1.0 - y / 4.0 * (1.0 - y / 5.0 * (1.0 - y / 6.0))))
    return tl.where(tl.abs(y) < 0.1, y * series, 1.0 - tl.exp(-y))


@triton.jit
def is_inside(x, opt: tl.constexpr):
    """Which keys of distances ``x`` are in the support."""
    return x > (-1.0 if opt.shallow else 0.0)


@triton.jit
def weights(x, r, opt: tl.constexpr):
    """``p`` and ``u`` of distances ``x``; zeros off the support, also for NaN."""
    if opt.alpha == 1.5:
        u = positive(x, opt)
        p = u * u
    elif opt.alpha == 2.0:
        p = positive(x, opt)
        u = tl.where(x > 0.0, 1.0, 0.0)
    elif opt.shallow:
        inside = is_inside(x, opt)
        w = tl.where(inside, x, 0.0)
        p = tl.where(inside, power_above_one(w, r), 0.0)
        u = p / (1.0 + w)
    else:
        inside = tl.where(x > 0.0, x, 1.0)
        p = tl.where(x > 0.0, power(inside, r), 0.0)
        u = p / inside
    return p, u


@triton.jit
def rise(mass, slope, r, opt: tl.constexpr):
    """Newton's step for ``g(t) = (sum p)^(1/r) - 1`` from ``mass = sum p``, ``slope = sum u``.

    ``g`` is a norm of ``[z - t]_+`` less one: convex and falling for ``r >= 1``, so that steps
    from below the root never pass it; and linear where few keys hold the mass, so that two or
    three steps suffice. For ``r < 1`` see :func:`guarded`.
    """
    if opt.alpha == 1.5:
        gap = mass - tl.sqrt(mass)
    elif opt.alpha == 2.0:
        gap = mass - 1.0
    else:
        safe = tl.where(mass > 0.0, mass, 1.0)
        gap = safe * shortfall(safe, 1.0 / r) if opt.shallow else mass - power(safe, 1.0 - 1.0 / r)
    return gap / tl.where(slope > 0.0, slope, 1.0)


@triton.jit
def certain_rise(mass, slope, r, opt: tl.constexpr):
    """A step from ``t`` that does not pass the root, where ``mass >= 1``. A concave ``p`` stays
    above its chord ``x^r - d x^(r - 1)``, which falls to zero at ``x``."""
    if opt.steep:
        return (mass - 1.0) / tl.where(slope > 0.0, slope, 1.0)
    else:
        return rise(mass, slope, r, opt)


@triton.jit
def leap(mass, slope, count):
    """A step to the root at alpha = 1.5 if no key leaves the support on the way, by ``mass - 2 d
    slope + d^2 count = 1``. It errs by the third order, Newton's by the second, but may pass the
    root."""
    root = tl.sqrt(tl.maximum(slope * slope - count * (mass - 1.0), 0.0))
    return (mass - 1.0) / tl.where(slope > 0.0, slope + root, 1.0)


@triton.jit
def is_near(mass, slope, most, tolerance):
    """Whether ``sum p`` is one within ``tolerance`` as it is, or after a :func:`leap`, about ``d =
    (mass - 1) / (2 slope)`` long. It takes ``p`` of a key that enters or leaves for at most ``d^2``
    more or less; ``most`` is how many can: the size of the support below the root, infinite where
    no ``t`` below it was seen."""
    error = mass - 1.0
    near = error * error * most < 4.0 * tolerance * slope * slope
    return near | (tl.abs(error) <= tolerance)


@triton.jit
def guarded(t, lo, hi, mass, slope, r, tolerance, step, opt: tl.constexpr):
    """A step above alpha = 2: where ``t`` moves, ``[lo, hi]`` around the root, and whether that is
    final.

    ``sum p`` drops with infinite slope at every key, and Newton's steps can circle around one:
    after FREE_STEPS every other step is a bisection. It halves the floats between ``lo`` and
    ``hi``, not the window, since the root of equal keys is tiny. A step of less than an ulp takes
    an ulp, so that the bracket closes.
    """
    low = mass >= 1.0
    lo = tl.where(low, t, lo)
    hi = tl.where(low, hi, t)
    ulp = EPSILON * tl.abs(t)
    solved = tl.abs(mass - 1.0) <= tolerance
    newton = rise(mass, slope, r, opt)
    newton = tl.where((tl.abs(newton) > ulp) | solved, newton, tl.where(low, ulp, -ulp))
    inside = (t + newton >= lo) & (t + newton < hi)
    first = lo.to(tl.int32, bitcast=True)
    last = hi.to(tl.int32, bitcast=True)  # both are negative
    middle = (first + (last - first) // 2).to(tl.float32, bitcast=True)
    bisect = (step > FREE_STEPS) & (step % 2 == 1)
    otherwise = tl.where(solved, t, middle)
    moved = tl.where(inside & (solved | (bisect == 0)), t + newton, otherwise)
    closed = hi - lo <= ulp
    return tl.where(closed & (solved == 0), t, moved), lo, hi, solved | closed
