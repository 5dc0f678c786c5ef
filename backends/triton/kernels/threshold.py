"""The mathematics of a row's threshold: probabilities, and steps to the root of ``sum p = 1``.

``x`` is the distance of a key above the threshold, see ``score.py``, and ``r = 1 / (alpha - 1)``.
Then ``p = [x]_+^r`` and ``u = p^(2 - alpha) = [x]_+^(r - 1)``.
"""

from __future__ import annotations

import triton
import triton.language as tl

from adasplash2.backends.triton.kernels.arithmetic import (
    INTERPRETED,
    log2_of,
    power,
    power_above_one,
    power_of_two,
    shortfall,
)
from adasplash2.backends.triton.kernels.score import (
    distance,
    is_inside,
    lift_of,
)

HIGHEST = tl.constexpr(-(2.0**-126))
"""Upper end of the window of ``t``. ``n`` equal keys have ``t = -n^(1 - alpha)``, for large alphas
less than any float32; but the nearest key must keep a distance to it."""

EPSILON = tl.constexpr(2.0**-23)

PARTS = tl.constexpr(8)
"""See :func:`part_sums`."""

SHALLOW_TOLERANCE = tl.constexpr(1e-3)
"""How far ``sum p`` may be above 1 before the last step where alpha is below 1.5, see
``launch.tolerance``."""

LARGEST_SHARE = tl.constexpr(0.88)
"""Of :func:`guess_of`: one key of 17 is in the support of a Gaussian row. Below, maxima bound it as
well."""

ROUGH = tl.constexpr(2.0**-5)
"""See :func:`is_rough`. On Gaussian rows of a window of 1,024 keys (c = 0.5, 19 keys kept) 7 % of
blocks then take a second step, and 5 % of the others come again in ``output``, simulated; with
twice as much 1 % and 10 %, with half 27 % and 1 %."""

FREE_STEPS = tl.constexpr(8)
"""Newton's steps above alpha = 2 before every other one becomes a bisection."""


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
def whole_power(x, DEGREE: tl.constexpr):
    """``x`` to a small whole number, 1 or more."""
    power = x
    for _ in tl.static_range(DEGREE - 1):
        power = power * x
    return power


@triton.jit
def weights(x, r, opt: tl.constexpr):
    """``p`` and ``u`` of distances ``x``; zeros off the support, also for NaN."""
    if opt.alpha == 1.5:
        u = positive(x, opt)
        p = u * u
    elif opt.alpha == 2.0:
        p = positive(x, opt)
        u = tl.where(x > 0.0, 1.0, 0.0)
    elif opt.alphas:
        inside = is_inside(x, r, opt)
        lift = lift_of(r, opt)
        base = tl.where(inside, x + lift, 1.0)
        whole, rest = log2_of(tl.where(inside, x, 1.0 - lift), lift)
        p = tl.where(inside, power_of_two(whole, rest, r), 0.0)
        u = p / base
    elif opt.degree > 0:
        base = tl.where(x > -1.0, 1.0 + x, 0.0)
        u = whole_power(base, opt.degree - 1)
        p = u * base
    elif opt.shallow:
        inside = is_inside(x, r, opt)
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
        if opt.shallow or opt.alphas:
            gap = safe * shortfall(safe, 1.0 / r)
        else:
            gap = mass - power(safe, 1.0 - 1.0 / r)
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
def is_near(mass, slope, count, most, tolerance):
    """Whether ``sum p`` is one within ``tolerance`` as it is, or after a :func:`leap`, about ``d =
    (mass - 1) / (2 slope)`` long. It takes ``p`` of a key that enters or leaves for at most ``d^2``
    more or less. How many can: from below the root all of the support, which has ``count`` keys;
    from above those alone that it lacks of ``most``, as many as it had below, or all keys."""
    error = mass - 1.0
    movers = tl.where(mass >= 1.0, most, most - count)
    near = error * error * movers < 4.0 * tolerance * slope * slope
    return near | (tl.abs(error) <= tolerance)


@triton.jit
def is_rough(mass, slope, count):
    """Whether a :func:`leap` will leave little of ``sum p - 1``. Of the ``count`` keys of the
    support, or of as many that enter, few are so near to the edge that ``p`` of them is off, by
    ``d^2`` at most."""
    error = mass - 1.0
    return error * error * count < 4.0 * slope * slope * ROUGH


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


@triton.jit
def grain(top, t, c, opt: tl.constexpr):
    """A distance of thresholds that rounding of ``x`` hides: steps of it may go to and fro."""
    if opt.relative:
        return tl.abs(t) * EPSILON
    else:
        return tl.abs(c * top + t) * EPSILON


@triton.jit
def stepped(t, top, lo, hi, most, mass, slope, count, terms, tolerance, step, opt: tl.constexpr,
            ROUGHLY: tl.constexpr = False):  # fmt: skip
    """Where ``t`` moves from ``mass = sum p``, ``slope = sum u`` and, at alpha = 1.5 alone, the
    size ``count`` of the support; ``lo``, ``hi`` and ``most`` after that; and who is done, where
    ROUGHLY also by :func:`is_rough`."""
    r = terms.r
    if opt.steep:
        moved, lo, hi, final = guarded(t, lo, hi, mass, slope, r, tolerance, step, opt)
    else:
        certain = t + rise(mass, slope, r, opt)
        lo = tl.maximum(lo, certain)
        moved = certain
        if opt.alpha == 1.5:
            kept = count.to(tl.float32)
            most = tl.where(mass >= 1.0, tl.minimum(kept, most), most)
            solved = is_near(mass, slope, kept, most, tolerance)
            if ROUGHLY:
                solved = solved | is_rough(mass, slope, kept)
            ahead = t + leap(mass, slope, count)
            # From above the root keys only enter on the way: that leap does not pass it.
            lo = tl.maximum(lo, tl.where(mass < 1.0, ahead, certain))
            moved = tl.where(mass > 1.0, ahead, lo)
        elif opt.alphas:
            near = tl.where(lift_of(r, opt) > 0.0, SHALLOW_TOLERANCE, tolerance)
            solved = tl.abs(mass - 1.0) <= near
        else:
            solved = tl.abs(mass - 1.0) <= tolerance
        final = solved | (certain == t)
        if opt.alpha != 1.5:  # there, `solved` allows for it
            final = final | (tl.abs(certain - t) <= grain(top, t, terms.c, opt))
    return moved, lo, hi, most, final


@triton.jit
def part_sums(x):
    """PARTS sums of each row, of keys that one thread holds of a product of matrices before compute
    capability 10: a loop over tiles adds these up, and threads exchange sums behind it."""
    return tl.sum(tl.reshape(x, (x.shape[0], x.shape[1] // PARTS, PARTS)), 1)


@triton.jit
def added_pairs(a, b, more_a, more_b):
    return a + more_a, b + more_b


@triton.jit
def pair_sums(a, b):
    """The row sums of two tensors, which threads exchange at once."""
    if INTERPRETED:  # whose reductions by a function are loops in Python
        return tl.sum(a, 1), tl.sum(b, 1)
    else:
        return tl.reduce((a, b), 1, added_pairs)


@triton.jit
def mean_and_deviation(total, squares, number):
    """Of ``number`` scores by their sum and that of their squares; zeros where there are none."""
    number = tl.maximum(number, 1).to(tl.float32)
    mean = total / number
    return mean, tl.sqrt(tl.maximum(squares / number - mean * mean, 0.0))


@triton.jit
def guess_share(deviation, seen, terms):
    """``d``, ``w`` and ``d / (d + w)`` as :func:`guess_of` has them."""
    d = terms.c * deviation
    w = tl.rsqrt(tl.maximum(seen, 1).to(tl.float32))
    return d, w, d / (d + w)


@triton.jit
def guess_of(mean, deviation, seen, top, lo, terms):
    """Where a row of ``seen`` Gaussian scores has its root at alpha = 1.5, if that is above ``lo``
    and its support not small; else ``lo``.

    In units of the deviation ``d`` of ``c s``, with the mean as zero, the root is ``a`` of ``G(a) =
    1 / (n d^2)``, where ``G(a) = (1 + a^2) Phi(-a) - a phi(a)`` is the mean of ``[x - a]_+^2``. Of
    rows without an end of support that is ``-sqrt(1 / (n d^2) - 1)``; what ``a`` has beside ``-w /
    d`` with ``w = 1 / sqrt(n)`` is a polynomial of ``d / (d + w)``, fitted to 0.001.
    """
    d, w, share = guess_share(deviation, seen, terms)
    rest = 20.577406 + share * (-28.159221 + share * 13.761974)
    rest = share * (0.44725788 + share * (1.4061079 + share * (-5.3392119 + share * rest)))
    # The highest key alone has a mass of 1 / n at `-w`, which no root is above.
    guess = tl.minimum(terms.c * (mean - top) - w + rest * d, -w)
    return tl.where((guess > lo) & (share < LARGEST_SHARE), guess, lo)


@triton.jit
def no_parts(opt: tl.constexpr):
    """Sums of :func:`with_parts` before all tiles."""
    zeros = tl.full((opt.block_q, PARTS), 0.0, tl.float32)
    return zeros, zeros, zeros.to(tl.int32)


@triton.jit
def with_parts(sums, x, r, opt: tl.constexpr):
    """``sum p``, ``sum u`` and, at alpha = 1.5 alone, the size of the support, by
    :func:`part_sums`, with those of a tile's distances added."""
    mass, slope, count = sums
    p, u = weights(x, r, opt)
    mass += part_sums(p)
    slope += part_sums(u)
    if opt.alpha == 1.5:
        if opt.masked:  # of what a mask hides `x` may be NaN, of either sign
            count += part_sums((-u.to(tl.int32, bitcast=True)).to(tl.uint32) >> 31).to(tl.int32)
        else:
            count += opt.block_k // PARTS + part_sums(x.to(tl.int32, bitcast=True) >> 31)
    return mass, slope, count


@triton.jit
def added(mass, slope, count, more_mass, more_slope, more_count):
    return mass + more_mass, slope + more_slope, count + more_count


@triton.jit
def row_sums(parts):
    """The row sums of three tensors, which threads exchange at once: ``sum p``, ``sum u`` and a
    count, from those of :func:`with_parts` or of a tile."""
    if INTERPRETED:  # whose reductions by a function are loops in Python
        return tl.sum(parts[0], 1), tl.sum(parts[1], 1), tl.sum(parts[2], 1)
    else:
        return tl.reduce(parts, 1, added)


@triton.jit
def total_sums(mass, slope, count):
    """The sums over all of three tensors, which threads exchange at once."""
    if INTERPRETED:  # whose reductions by a function are loops in Python
        return tl.sum(mass), tl.sum(slope), tl.sum(count)
    else:
        return tl.reduce((mass, slope, count), None, added)


@triton.jit
def sums_of(x, r, opt: tl.constexpr):
    """``sum p``, ``sum u`` and the size of the support of one tile alone."""
    p, u = weights(x, r, opt)
    outside = x.to(tl.int32, bitcast=True) >> 31
    mass, slope, count = row_sums((p, u, outside))
    return mass, slope, opt.block_k + count


@triton.jit
def with_sink(mass, slope, top, t, terms, opt: tl.constexpr):
    """``sum p`` and ``sum u`` with the sink, one more candidate of each row; and whether it is in
    the support."""
    x = distance(terms.sink, top, t, terms.c, opt)
    p, u = weights(x, terms.r, opt)
    return mass + p, slope + u, is_inside(x, terms.r, opt).to(tl.int32)


@triton.jit
def advanced(state, sums, top, threshold, step, terms, tolerance, opt: tl.constexpr,
             ROUGHLY: tl.constexpr = False):  # fmt: skip
    """``state`` after the step that follows from ``sums``, of ``p``, of ``u`` and of the keys of
    the support, at ``threshold``: ``t``, ``lo``, ``hi`` and ``most`` of :func:`stepped`, which rows
    are pending, and the steps of each."""
    t, lo, hi, most, pending, steps = state
    mass, slope, count = sums
    if opt.sinks:
        mass, slope, is_kept = with_sink(mass, slope, top, threshold, terms, opt)
        count += is_kept
    moved, lo, hi, most, final = stepped(t, top, lo, hi, most, mass, slope, count, terms,
                                         tolerance, step, opt, ROUGHLY)  # fmt: skip
    steps += pending.to(tl.int32)
    t = tl.where(pending, moved, t)
    return t, lo, hi, most, pending & (final == 0), steps


@triton.jit
def alpha_terms(x, p, u, r, opt: tl.constexpr):
    """``p log p`` and ``p phi`` of distances ``x``, for :func:`alpha_gradient`; zeros off the
    support."""
    inside = is_inside(x, r, opt)
    lift = lift_of(r, opt)
    whole, rest = log2_of(tl.where(inside, x, 1.0 - lift), lift)
    y = -0.69314718 * (whole.to(tl.float32) + rest)
    series = 1.0 / 5040.0 + y * (1.0 / 40320.0 + y * (1.0 / 362880.0))
    series = 1.0 / 6.0 + y * (1.0 / 24.0 + y * (1.0 / 120.0 + y * (1.0 / 720.0 + y * series)))
    near = p * y * y * (0.5 + y * series)
    phi = tl.where(y < 1.0, near, u - p * (1.0 + y))
    return tl.where(inside, -r * p * y, 0.0), tl.where(inside, r * r * phi, 0.0)


@triton.jit
def alpha_gradient(sums, slope, r):
    """A row's part of alpha's gradient from its sums, in which ``d = dp - delta``: of ``p d``, ``p
    log p d``, ``p phi d``, ``p log p`` and ``p phi``; ``slope`` is that of ``u``.

    With ``e = alpha - 1``, ``q = u / sum u`` and ``h = -p log p`` it is ``sum (p - q) d / e^2 + sum
    (h - q sum h) d / e`` (Correia, Niculae, Martins 2019), whose two parts nearly cancel where
    ``e`` is small. With ``u = p exp(-e log p) = p (1 - e log p + e^2 phi)``, ``H = sum h`` and ``F
    = sum p phi``, so that ``sum u = 1 + e H + e^2 F``, what cancels can be struck out:
    ``(F sum p d - sum p phi d - e (F sum p log p d + H sum p phi d)) / sum u``.
    """
    of_p, of_log, of_phi, log, phi = sums
    total = phi * of_p - of_phi - (phi * of_log - log * of_phi) / r
    return total / tl.where(slope > 0.0, slope, 1.0)
