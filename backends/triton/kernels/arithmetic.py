"""Arithmetic that kernels share: reductions that keep NaN, products in 16 bits, powers."""

from __future__ import annotations

import triton
import triton.language as tl

from adasplash2.backends.triton import sizes

INFINITY = tl.constexpr(float("inf"))
WHOLE = tl.constexpr(32767.0)
ROUNDING = tl.constexpr(2.0**-21)
"""A row is one of a 16-bit type where its entries are off by no more than this part of the largest.
Shares are off by 2^-16 of it."""

INTERPRETED = tl.constexpr(sizes.INTERPRETED)

PROB_SCALE = tl.constexpr(1024.0)
"""Factor of probabilities that are rounded to float16, whose smallest normal number is 6e-5."""

LEAST_DIVISOR = tl.constexpr(1e-30)
"""Of a row of ``ds`` by its largest. It is far above float32's smallest normal number, 1.2e-38, so
that what it divides keeps its digits, and far below all that counts: rows of less are multiplied as
they are, of which float16 makes zeros."""


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


@triton.jit
def handed_on(x):
    """A vector of rows through shared memory: else the compiler hands all scores, or maxima, to the
    threads that hold it."""
    return tl.gather(x, tl.arange(0, x.shape[0]), 0)


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
def count_bad(bad, reached, tile):
    """Add to ``bad`` how many entries of the tile that are ``reached`` are +inf, and how many -inf,
    by row of ``reached`` and column of the tile; NaN is both."""
    above, below = bad
    reached = reached.to(tile.dtype)
    above += matmul(reached, tl.where(tile < INFINITY, 0.0, 1.0).to(tile.dtype))
    below += matmul(reached, tl.where(tile > -INFINITY, 0.0, 1.0).to(tile.dtype))
    return above, below


@triton.jit
def with_bad(total, bad):
    """A sum of finite entries and what :func:`count_bad` counted beside them."""
    above, below = bad
    infinite = tl.where(above > 0.0, INFINITY, -INFINITY)
    infinite = tl.where((above > 0.0) & (below > 0.0), float("nan"), infinite)
    return tl.where((above > 0.0) | (below > 0.0), infinite, total)


@triton.jit
def bits_of(x, TYPE: tl.constexpr):
    """float32 as the nearest of a 16-bit type, in its bits; the interpreter has float32 for
    bfloat16."""
    if tl.float16 == TYPE:
        return x.to(tl.float16).to(tl.int16, bitcast=True)
    else:
        return ((x.to(tl.int32, bitcast=True) + (1 << 15)) >> 16).to(tl.int16)


@triton.jit
def of_bits(bits, TYPE: tl.constexpr):
    """What :func:`bits_of` was given, rounded."""
    if tl.float16 == TYPE:
        return bits.to(tl.float16, bitcast=True).to(tl.float32)
    else:
        return (bits.to(tl.int32) << 16).to(tl.float32, bitcast=True)


@triton.jit
def shares_of(rows, TYPE: tl.constexpr):
    """Entries as shares of the largest of their row, as whole numbers of 16 bits, and that one.
    Where it is not finite they say which are: 1 and -1 are infinities, 2 is NaN. Where a row is one
    of TYPE, but for rounding, its entries are kept as they are, and -1 says so: a mean of the same
    value is then right to the last digit, and ``dp - delta`` of a key that has all of the
    probability is zero."""
    most = largest(tl.abs(rows), 1)
    # Of what is hardly a number any more, 1 / most would be infinite.
    lift = tl.where(most < 2.0**-60, 2.0**80, 1.0)
    share = WHOLE / (tl.where(most > 0.0, most, 1.0) * lift)
    shares = tl.floor(rows * lift[:, None] * share[:, None] + 0.5)
    bad = tl.where(rows == INFINITY, 1.0, tl.where(rows == -INFINITY, -1.0, 0.0))
    bad = tl.where(rows != rows, 2.0, bad)
    shares = tl.where(is_finite(most)[:, None], shares, bad).to(tl.int16)
    nearest = bits_of(rows, TYPE)
    off = tl.max(tl.abs(rows - of_bits(nearest, TYPE)), 1)
    is_one = is_finite(most) & (off <= most * ROUNDING)
    shares = tl.where(is_one[:, None], nearest, shares)
    return shares, tl.where(is_one, -1.0, most)


@triton.jit
def rows_of(shares, most, TYPE: tl.constexpr):
    """What :func:`shares_of` was given; zeros for what is finite in a row that is not."""
    rows = shares.to(tl.float32) * (1.0 / WHOLE) * most[:, None]
    bad = tl.where(shares == 1, INFINITY, tl.where(shares == -1, -INFINITY, 0.0))
    bad = tl.where(shares == 2, float("nan"), bad)
    rows = tl.where(is_finite(most)[:, None], rows, bad)
    return tl.where(most[:, None] < 0.0, of_bits(shares, TYPE), rows)


@triton.jit
def matmul(a, b):
    """``a b`` in float32; float32 operands are not cut to TensorFloat-32."""
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def added_product(a, b, start):
    """``start + a b`` as :func:`matmul`, where ``start`` is what sums begin with."""
    return tl.dot(a, b, start, input_precision="ieee")


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
def gradient_product(ds, tile, opt: tl.constexpr, SAFE: tl.constexpr, SCALED: tl.constexpr = False):
    """``ds tile``. Above alpha = 2 a small probability makes ``ds`` as large as it likes, below it
    a large gradient of a large value may: what float16 cannot hold, or holds in part, goes as a
    multiple of its row's largest. Where that is rare it is left to the kernels that make again what
    is not finite. SCALED: ``ds`` holds scales already, which may be small."""
    if (SAFE or opt.steep or SCALED) and tile.dtype == tl.float16:
        most = tl.max(tl.abs(ds), 1)[:, None]
        most = tl.where((most > LEAST_DIVISOR) & is_finite(most), most, 1.0)
        return most * weighted(ds / most, tile, opt)
    else:
        return weighted(ds, tile, opt)


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
def log2_near_one(d):
    """``log2(1 + d)`` of ``1 + d`` between the roots of 1/2 and 2."""
    f = d / (2.0 + d)  # log(1 + d) = 2 artanh(f), |f| < 0.172
    g = f * f
    series = 1.0 + g * (1.0 / 3.0 + g * (0.2 + g * (1.0 / 7.0 + g * (1.0 / 9.0))))
    return 2.8853900818 * f * series


@triton.jit
def log2_above_one(w):
    """``log2(1 + w)`` of ``w > -1``, as a whole number and a rest that is right to a few of its
    own ulps, also where ``w`` is far below an ulp of 1."""
    whole, rest = split_binary(1.0 + w)
    return whole, log2_near_one(tl.where(whole == 0, w, rest - 1.0))


@triton.jit
def power_above_one(w, exponent):
    """``(1 + w)^exponent`` of ``w > -1``."""
    whole, rest = log2_above_one(w)
    return power_of_two(whole, rest, exponent)


@triton.jit
def log2_of(x, lift):
    """``log2(x + lift)`` of a sum above zero, as :func:`log2_above_one` has it; ``lift`` is 0 or 1,
    and the last digits of ``x`` count also where it is 1."""
    whole, rest = split_binary(x + lift)
    exact = tl.where(lift > 0.0, x, rest - 1.0)
    return whole, log2_near_one(tl.where(whole == 0, exact, rest - 1.0))


@triton.jit
def tanh(x):
    """The hyperbolic tangent, to a few ulps also near zero."""
    far = tl.abs(x)
    g = tl.where(far < 0.4, x * x, 0.0)
    series = 62.0 / 2835.0 + g * (-1382.0 / 155925.0 + g * (21844.0 / 6081075.0))
    series = 1.0 + g * (-1.0 / 3.0 + g * (2.0 / 15.0 + g * (-17.0 / 315.0 + g * series)))
    other = 1.0 - 2.0 / (tl.exp(2.0 * far) + 1.0)  # infinities become ones
    return tl.where(far < 0.4, x * series, tl.where(x < 0.0, -other, other))


@triton.jit
def shortfall(mass, exponent):
    """``1 - mass^-exponent`` of ``mass > 0``, to round-off also where the power is nearly 1."""
    whole, rest = log2_above_one(mass - 1.0)
    y = 0.69314718 * exponent * (whole.to(tl.float32) + rest)
    series = 1.0 - y / 2.0 * (1.0 - y / 3.0 * (1.0 - y / 4.0 * (1.0 - y / 5.0 * (1.0 - y / 6.0))))
    return tl.where(tl.abs(y) < 0.1, y * series, 1.0 - tl.exp(-y))
