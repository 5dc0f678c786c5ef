"""Thresholds, and outputs, of rows whose scores fit the registers, where they stay over all steps.

What is done with scores is that of ``solve.py`` and ``output.py``, and what they write is written.
``opt`` is that of the tiles in the lists, ``wide`` that of one tile of all keys.
"""

from __future__ import annotations

import triton
import triton.language as tl

from adasplash2.backends.triton.kernels import output, score, solve, work
from adasplash2.backends.triton.kernels.arithmetic import (
    INFINITY,
    INTERPRETED,
    PROB_SCALE,
    any_of,
    handed_on,
    larger,
    largest,
)
from adasplash2.backends.triton.kernels.solve import BOUND_STEPS
from adasplash2.backends.triton.kernels.threshold import (
    HIGHEST,
    advanced,
    guess_of,
    mean_and_deviation,
    pair_sums,
    sums_of,
    weights,
)

TILE_PARTS = tl.constexpr(8)
"""Of a tile, whose maxima bound a row's threshold. With 64 keys they leave blocks of Gaussian rows
two or three steps, one less than the maxima of whole tiles."""


SURE_STEPS = tl.constexpr(1)
"""After which no block of rows is expected to be done: whether one is takes all warps to say."""


@triton.jit
def part_maxima(s, opt: tl.constexpr, wide: tl.constexpr):
    """The row maxima of TILE_PARTS parts of each tile, of keys that one thread holds of a product
    of matrices before compute capability 10: pairs, four of which are neighbours over four threads.
    """
    tiles: tl.constexpr = wide.block_k // opt.block_k
    pairs: tl.constexpr = opt.block_k // TILE_PARTS
    parts = tl.reshape(s, (opt.block_q, tiles, TILE_PARTS // 4, pairs // 2, 4, 2))
    return tl.reshape(largest(largest(parts, 5), 3), (opt.block_q, tiles * TILE_PARTS))


@triton.jit
def bound_rows(maxima, top, pending, terms, opt: tl.constexpr):
    """A lower bound of ``t`` by certain rises on maxima, as ``solve.bound_of``."""
    t = solve.lowest(pending, terms.r, opt)
    for _ in tl.static_range(BOUND_STEPS):
        p, u = weights(terms.c * (maxima - top[:, None]) - t[:, None], terms.r, opt)
        mass, slope = pair_sums(p, u)
        t = solve.raised(t, mass, slope, top, terms, opt)
    return t - solve.slack(terms.r)


@triton.jit
def united_moments(top, total, squares, number, more_top, more_total, more_squares, more_number):
    return (
        larger(top, more_top),
        total + more_total,
        squares + more_squares,
        number + more_number,
    )


@triton.jit
def top_and_moments(maxima):
    """The highest of each row, which threads exchange with how many are finite, their sum and that
    of their squares."""
    seen = maxima > -INFINITY
    y = tl.where(seen, maxima, 0.0)
    number = seen.to(tl.int32)
    if INTERPRETED:  # whose reductions by a function are loops in Python
        top, total, squares = largest(maxima, 1), tl.sum(y, 1), tl.sum(y * y, 1)
        number = tl.sum(number, 1)
    else:
        top, total, squares, number = tl.reduce((maxima, y, y * y, number), 1, united_moments)
    return top, (total, squares, number)


@triton.jit
def guess_rows(moments, top, lo, rows, terms, shape, opt: tl.constexpr):
    """As ``guess_of`` by the moments of the maxima alone, an eighth of the scores or less: where
    Gaussian rows of such maxima have their threshold, or ``lo``.

    The largest of so many Gaussian scores is on the mean some deviations above theirs, and its own
    deviation is a part of theirs.
    """
    keys: tl.constexpr = opt.block_k // TILE_PARTS
    if keys >= 16:
        above: tl.constexpr = 1.76599
        part: tl.constexpr = 0.54303
    elif keys == 8:
        above: tl.constexpr = 1.42360
        part: tl.constexpr = 0.61065
    elif keys == 4:
        above: tl.constexpr = 1.02938
        part: tl.constexpr = 0.70122
    else:
        above: tl.constexpr = 0.56419
        part: tl.constexpr = 0.82565
    mean, deviation = mean_and_deviation(moments[0], moments[1], moments[2])
    deviation /= part
    mean -= above * deviation
    return guess_of(mean, deviation, score.count_seen(rows, terms, shape, opt), top, lo, terms)


@triton.jit
def united(a, b):
    return a | b


@triton.jit
def list_tiles(lists, live, counts, at_block, highest, top, t, open_ones, terms, shape,
               opt: tl.constexpr):  # fmt: skip
    """Write the list of the tiles with a maximum above some row's ``t``, its counts, and flags."""
    tiles = work.tiles_of(shape, opt)
    numbers = tl.arange(0, highest.shape[1])
    x = terms.c * (highest - top[:, None]) - (t - solve.slack(terms.r))[:, None]
    inside = score.is_inside(x, terms.r, opt)
    if INTERPRETED:
        alive = tl.max(inside.to(tl.int32), 0)
    else:  # as bits, which all threads get at once: else they take turns for each of the sums
        bits = tl.where(inside, 1 << numbers[None, :], 0)
        alive = (tl.reduce(tl.reduce(bits, 1, united), 0, united) >> numbers) & 1
    lists = work.by_tiles(lists, at_block, shape, opt)
    live = work.by_tiles(live, at_block, shape, opt)
    found_open = 0
    found = 0
    for edge in tl.static_range(2 if opt.lower else 1):
        found_open, found = solve.list_alive(lists, live, numbers, alive,
                                             numbers < tiles, open_ones, found_open, found, opt,
                                             edge)  # fmt: skip
    tl.store(counts + 2 * at_block, found_open)
    tl.store(counts + 2 * at_block + 1, found)


@triton.jit(do_not_specialize=["begin", "row_blocks", "each"])
def whole_rows(query, key, value, out, out_u, spread, top_out, t_out, tau_out, live, lists, counts,
               poison, unsafe, some, iterations, support, marks, shape, begin, row_blocks, each,
               tolerance, opt: tl.constexpr, wide: tl.constexpr, MAX_STEPS: tl.constexpr,
               OUTPUT: tl.constexpr, GRADIENT: tl.constexpr, COUNT: tl.constexpr,
               MARK: tl.constexpr):  # fmt: skip
    """What ``solve`` does, and where OUTPUT what ``output`` does if not SAFE, for ``row_blocks`` of
    each head from its ``begin``-th in launch order on, none of which sees a key behind the tile:
    for ``each`` of them, or fewer, whose keys and values stay in shared memory.

    ``live`` comes as zeros.
    """
    programs = tl.cdiv(row_blocks, each)
    number = work.in_turn(tl.program_id(0), shape.heads_q, programs, shape, opt)
    first_block = number // programs * work.row_blocks_of(shape, opt) + begin
    start = number % programs * each
    stop = tl.minimum(start + each, row_blocks)
    at_block, at_head, first_row, at_row, inside = work.row_block_of(
        first_block + start, shape, opt
    )
    batch, head, kv_head = at_head
    terms = score.terms_of(batch, head, shape, opt)
    queries = work.head_of(query, batch, head)
    upcoming = work.load_tile(queries, first_row, shape.length_q, opt.block_q, opt.head_dim,
                              opt.padded, True)  # fmt: skip
    keys = work.keys_of(key, batch, kv_head, shape, opt)
    first = tl.full((), 0, tl.int32)
    k = work.load_keys(keys, first, shape, wide.block_k, opt.head_dim, opt.padded, True, opt)
    scale: tl.constexpr = PROB_SCALE if value.base.dtype.element_ty == tl.float16 else 1.0
    if OUTPUT:
        values = work.keys_of(value, batch, kv_head, shape, opt)
        v = work.load_keys(
            values, first, shape, wide.block_k, opt.head_dim_v, opt.padded_v, True, opt
        )
        if COUNT:
            marks = work.marks_of(marks, batch, head, shape, MARK)
    for index in range(start, stop):
        at_block, at_head, first_row, at_row, inside = work.row_block_of(first_block + index, shape,
                                                                         opt)  # fmt: skip
        q = upcoming
        next_row = tl.maximum(first_row - opt.block_q, 0)  # see `row_block_of`
        upcoming = work.load_tile(queries, next_row, shape.length_q, opt.block_q, opt.head_dim,
                                  opt.padded, True)  # fmt: skip
        rows, columns = score.numbers_of(first_row, first, wide, opt.block_q)
        bias = 0.0
        if opt.biased:
            bias = score.bias_of(rows, columns, terms, shape, opt)
        s = solve.seen_scores(q, k, first_row, first, bias, terms, shape, wide, False)
        end = score.seen_tiles(first_row, terms, shape, opt)
        seen = tl.minimum(score.seen_begin(first_row, terms, shape, opt), end), end
        open_end = score.open_tiles(first_row, shape.length_k, terms, shape, opt)
        open_ones = solve.open_between(first_row, seen[0], end, open_end, terms, shape, opt)
        if (open_ones[0] > 0) | (open_ones[1] * opt.block_k < wide.block_k):
            s = tl.where(score.in_range(rows, columns, terms, shape, wide), s, -INFINITY)
        maxima = part_maxima(s, opt, wide)
        tiles: tl.constexpr = wide.block_k // opt.block_k
        highest = largest(tl.reshape(maxima, (opt.block_q, tiles, TILE_PARTS)), 2)
        if opt.guesses:
            top, moments = top_and_moments(maxima)
        else:
            top = largest(highest, 1)
        row_top, poisoned, pending = solve.kinds_of(top, inside, terms, opt)
        t = bound_rows(maxima, row_top, pending, terms, opt)
        if opt.guesses:
            numbers = first_row + tl.arange(0, opt.block_q)
            t = guess_rows(moments, row_top, t, numbers, terms, shape, opt)
        t = handed_on(t)
        top = handed_on(row_top)
        pending = t < INFINITY

        # A guess may lie above the threshold, and is followed by a better bound than the first.
        lo = solve.lowest(pending, terms.r, opt) if opt.guesses else t
        hi = tl.where(pending, HIGHEST, INFINITY)
        most = tl.full((opt.block_q,), 0.0, tl.float32) + (shape.length_k + 1)  # with the sink
        steps = tl.full((opt.block_q,), 0, tl.int32)
        step = 0
        waiting = step < MAX_STEPS
        while waiting:
            threshold = t
            if not opt.relative:
                threshold = terms.c * top + t
            x = score.distance(s, score.column(top, opt), threshold[:, None], terms.c, opt)
            state = t, lo, hi, most, pending, steps
            sums = sums_of(x, terms.r, wide)
            t, lo, hi, most, pending, steps = advanced(state, sums, top, threshold, step, terms,
                                                       tolerance, opt)  # fmt: skip
            step += 1
            if step > SURE_STEPS:
                waiting = any_of(pending) & (step < MAX_STEPS)
        if COUNT:
            tl.store(iterations + at_row, steps, mask=inside)
        list_tiles(lists, live, counts, at_block, highest, row_top, t, open_ones, terms, shape,
                   opt)  # fmt: skip
        t, tau = solve.store_thresholds(top_out, t_out, tau_out, row_top, t, poisoned, at_row,
                                        inside, terms, opt)  # fmt: skip
        solve.mark_poisoned(poison, t != t, first_row, seen, batch, kv_head, terms, shape, opt)

        if OUTPUT:
            if not opt.relative:
                t = tau
            x = score.distance(s, score.column(top, opt), t[:, None], terms.c, opt)
            u_scale, top_u = output.scale_of_u(t, terms.r, scale, opt)
            sums = output.weigh(output.no_sums(opt, GRADIENT, False), x, v, first_row, first, marks,
                                terms, shape, u_scale, wide, scale, GRADIENT, False, COUNT,
                                MARK)  # fmt: skip
            output.store_output(sums, out, out_u, spread, unsafe, some, support, top, t, top_u,
                                u_scale, batch, head, first_row, at_row, inside,
                                value.base.dtype.element_ty, terms, shape, opt, scale, GRADIENT,
                                False, COUNT)  # fmt: skip
