"""``entmax_rows``, entmax of dense rows, and its gradient: a program has a row, which it reads in
chunks."""

from __future__ import annotations

import triton
import triton.language as tl

from adasplash2.backends.triton.kernels.arithmetic import (
    INFINITY,
    is_finite,
    larger,
    largest,
    power,
)
from adasplash2.backends.triton.kernels.score import lift_of
from adasplash2.backends.triton.kernels.threshold import (
    HIGHEST,
    guarded,
    rise,
    weights,
)

SMALLEST = tl.constexpr(2.0**-126)

LARGEST = tl.constexpr(3.4028235e38)
"""Of float32's numbers, the smallest normal one and the largest."""


@triton.jit
def load_chunk(row, start, length, CHUNK: tl.constexpr):
    at = start + tl.arange(0, CHUNK)
    return tl.load(row + at, mask=at < length, other=-INFINITY).to(tl.float32)


@triton.jit
def store_chunk(row, start, length, values, CHUNK: tl.constexpr):
    at = start + tl.arange(0, CHUNK)
    tl.store(row + at, values.to(row.dtype.element_ty), mask=at < length)


@triton.jit(do_not_specialize=["length"])
def entmax_rows(
    x,
    y,
    stride_x,
    length,
    c,
    r,
    tolerance,
    alphas,
    opt: tl.constexpr,
    CHUNK: tl.constexpr,
    MAX_STEPS: tl.constexpr,
):
    """``y = [c (x - max x) - t]_+^r / sum``: one pass for the maximum, Newton's steps on ``t``
    from the lower end of its window (guarded above alpha = 2), one pass that writes.

    ``alphas`` has one of each row where ``opt.alphas``, in the place of ``c`` and ``r``; a row
    whose alpha is not in (1, 2] is NaN."""
    row = x + tl.program_id(0).to(tl.int64) * stride_x
    written = y + tl.program_id(0).to(tl.int64) * length
    highest = tl.full((CHUNK,), -INFINITY, tl.float32)
    for start in range(0, length, CHUNK):
        highest = larger(highest, load_chunk(row, start, length, CHUNK))
    top = largest(highest, 0)
    poisoned = (top != top) | (top == INFINITY)
    if opt.alphas:
        c = tl.load(alphas + tl.program_id(0)) - 1.0
        right = (c > 0.0) & (c <= 1.0)
        poisoned = poisoned | (right == 0)
        r = 1.0 / tl.where(right, c, 1.0)
    pending = (top > -INFINITY) & (poisoned == 0)
    top = tl.where(pending, top, 0.0)
    if opt.alphas:
        t = tl.where(pending, lift_of(r, opt) - 1.0, INFINITY)
    else:
        t = tl.where(pending, 0.0 if opt.shallow else -1.0, INFINITY)
    lo = t
    hi = tl.where(pending, HIGHEST, INFINITY)
    mass = 1.0
    step = 0
    while pending:
        sum_p = tl.full((CHUNK,), 0.0, tl.float32)
        sum_u = tl.full((CHUNK,), 0.0, tl.float32)
        for start in range(0, length, CHUNK):
            p, u = weights(c * (load_chunk(row, start, length, CHUNK) - top) - t, r, opt)
            sum_p += p
            sum_u += u
        mass = tl.sum(sum_p, 0)
        slope = tl.sum(sum_u, 0)
        if opt.steep:
            moved, lo, hi, final = guarded(t, lo, hi, mass, slope, r, tolerance, step, opt)
        else:
            moved = t + rise(mass, slope, r, opt)
            final = (mass <= 1.0 + tolerance) | (moved == t)
        step += 1
        pending = (final == 0) & (step < MAX_STEPS)
        # The last mass is that of `t`, so the row is written for the `t` before the last step.
        t = tl.where(pending, moved, t)
    for start in range(0, length, CHUNK):
        p, _ = weights(c * (load_chunk(row, start, length, CHUNK) - top) - t, r, opt)
        store_chunk(written, start, length, tl.where(poisoned, float("nan"), p / mass), CHUNK)


@triton.jit
def load_probabilities(row, start, length, CHUNK: tl.constexpr):
    at = start + tl.arange(0, CHUNK)
    return tl.load(row + at, mask=at < length, other=0.0).to(tl.float32)


@triton.jit
def load_sensitivity(row, start, length, least, exponent, opt: tl.constexpr, CHUNK: tl.constexpr):
    """``u = (y / least)^(2 - alpha)`` on the support, 0 off it, NaN where ``y`` is."""
    y = load_probabilities(row, start, length, CHUNK)
    if opt.alpha == 1.5:
        u = tl.sqrt(y)
    else:
        u = tl.where(y > 0.0, power(tl.where(y > 0.0, y / least, 1.0), exponent), y)
    return u


@triton.jit(do_not_specialize=["length"])
def entmax_rows_grad(
    y,
    grad_y,
    grad_x,
    stride_grad_y,
    length,
    exponent,
    alphas,
    opt: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """``dx = u (dy - sum u dy / sum u)``; off the support nothing is felt, not even a NaN.

    Above alpha = 2 ``u`` may leave float32: it is taken relative to the largest one, that of the
    least ``y``, and a gradient that leaves float32 stops at its end.
    """
    row = y + tl.program_id(0).to(tl.int64) * length
    grads = grad_y + tl.program_id(0).to(tl.int64) * stride_grad_y
    written = grad_x + tl.program_id(0).to(tl.int64) * length
    if opt.alphas:  # of a row whose alpha is not allowed, ``y`` is NaN
        exponent = 2.0 - tl.load(alphas + tl.program_id(0))
    least = 1.0
    if opt.steep:
        lowest = tl.full((CHUNK,), 1.0, tl.float32)
        for start in range(0, length, CHUNK):
            p = load_probabilities(row, start, length, CHUNK)
            lowest = tl.where((p > 0.0) & (p < lowest), p, lowest)
        least = tl.maximum(tl.min(lowest, 0), SMALLEST)
    sum_u = tl.full((CHUNK,), 0.0, tl.float32)
    weighted = tl.full((CHUNK,), 0.0, tl.float32)
    for start in range(0, length, CHUNK):
        u = load_sensitivity(row, start, length, least, exponent, opt, CHUNK)
        sum_u += u
        weighted += tl.where(u == 0.0, 0.0, u * load_chunk(grads, start, length, CHUNK))
    total = tl.sum(sum_u, 0)
    delta = tl.sum(weighted, 0) / tl.where(total == 0.0, 1.0, total)
    for start in range(0, length, CHUNK):
        u = load_sensitivity(row, start, length, least, exponent, opt, CHUNK)
        dx = tl.where(u == 0.0, 0.0, u * (load_chunk(grads, start, length, CHUNK) - delta))
        if opt.steep:
            root = power(least, 0.5 * exponent)  # of the largest u, which may leave the range alone
            scaled = dx * root * root
            scaled = tl.where(is_finite(scaled), scaled, tl.where(dx > 0.0, LARGEST, -LARGEST))
            dx = tl.where(is_finite(dx) & (dx != 0.0), scaled, dx)
        store_chunk(written, start, length, dx, CHUNK)
