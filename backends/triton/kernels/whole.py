"""Thresholds, and outputs, of rows whose scores fit the registers, where they stay over all steps.

What is done with scores is that of ``solve.py`` and ``output.py``, and what they write is written.
``opt`` is that of the tiles in the lists, ``wide`` that of one tile of all keys.
"""

from __future__ import annotations

import triton
import triton.language as tl

from adasplash2.backends.triton.kernels.arithmetic import (
    INFINITY,
    PROB_SCALE,
    any_of,
    largest,
)
from adasplash2.backends.triton.kernels.output import (
    marks_of,
    no_sums,
    scale_of_u,
    store_output,
    weigh,
)
from adasplash2.backends.triton.kernels.score import (
    bias_of,
    column,
    distance,
    is_inside,
    numbers_of,
    open_tiles,
    seen_begin,
    seen_tiles,
    terms_of,
)
from adasplash2.backends.triton.kernels.solve import (
    BOUND_STEPS,
    kinds_of,
    list_alive,
    lowest,
    mark_poisoned,
    open_between,
    raised,
    seen_scores,
    slack,
    store_thresholds,
)
from adasplash2.backends.triton.kernels.threshold import (
    HIGHEST,
    stepped,
    sums_of,
    weights,
    with_sink,
)
from adasplash2.backends.triton.kernels.work import (
    head_of,
    in_turn,
    keys_of,
    load_keys,
    load_tile,
    row_block_of,
)

PARTS = tl.constexpr(8)
"""Of a tile, whose maxima bound a row's threshold. With 64 keys they leave blocks of Gaussian rows
two or three steps, one less than the maxima of whole tiles."""


@triton.jit
def part_maxima(s, opt: tl.constexpr, wide: tl.constexpr):
    """The row maxima of PARTS parts of each tile, of keys that one thread holds of a product of
    matrices before compute capability 10: pairs, four of which are neighbours over four threads."""
    tiles: tl.constexpr = wide.block_k // opt.block_k
    pairs: tl.constexpr = opt.block_k // PARTS
    parts = tl.reshape(s, (opt.block_q, tiles, PARTS // 4, pairs // 2, 4, 2))
    return tl.reshape(largest(largest(parts, 5), 3), (opt.block_q, tiles * PARTS))


@triton.jit
def bound_rows(maxima, top, pending, terms, opt: tl.constexpr):
    """A lower bound of ``t`` by certain rises on maxima, as ``solve.bound_of``."""
    t = lowest(pending, terms.r, opt)
    for _ in tl.static_range(BOUND_STEPS):
        p, u = weights(terms.c * (maxima - top[:, None]) - t[:, None], terms.r, opt)
        t = raised(t, tl.sum(p, 1), tl.sum(u, 1), top, terms, opt)
    return t - slack(terms.r)


@triton.jit
def list_tiles(lists, live, counts, at_block, highest, top, t, open_ones, terms, shape,
               opt: tl.constexpr):  # fmt: skip
    """Write the list of the tiles with a maximum above some row's ``t``, its counts, and flags."""
    tiles = tl.cdiv(shape.length_k, opt.block_k)
    numbers = tl.arange(0, highest.shape[1])
    x = terms.c * (highest - top[:, None]) - (t - slack(terms.r))[:, None]
    alive = tl.max(is_inside(x, terms.r, opt).to(tl.int32), 0)
    first = at_block.to(tl.int64) * tiles
    found_open = 0
    found = 0
    for edge in tl.static_range(2 if opt.lower else 1):
        found_open, found = list_alive(lists + first, live + first, numbers, alive, numbers < tiles,
                                       open_ones, found_open, found, opt, edge)  # fmt: skip
    tl.store(counts + 2 * at_block, found_open)
    tl.store(counts + 2 * at_block + 1, found)


@triton.jit(do_not_specialize=["each"])
def whole_rows(query, key, value, out, out_u, spread, top_out, t_out, tau_out, live, lists, counts,
               poison, unsafe, iterations, support, marks, shape, each, tolerance,
               opt: tl.constexpr, wide: tl.constexpr, MAX_STEPS: tl.constexpr,
               OUTPUT: tl.constexpr, GRADIENT: tl.constexpr, COUNT: tl.constexpr,
               MARK: tl.constexpr):  # fmt: skip
    """What ``solve`` does, and where OUTPUT what ``output`` does if not SAFE, for ``each`` row
    blocks of a head, or fewer, whose keys and values stay in shared memory.

    ``live`` comes as zeros.
    """
    row_blocks = tl.cdiv(shape.length_q, opt.block_q)
    programs = tl.cdiv(row_blocks, each)
    number = in_turn(tl.program_id(0), shape.heads_q, programs, shape, opt)
    first_block = number // programs * row_blocks
    start = number % programs * each
    stop = tl.minimum(start + each, row_blocks)
    at_block, at_head, first_row, at_row, inside = row_block_of(first_block + start, shape, opt)
    batch, head, kv_head = at_head
    terms = terms_of(batch, head, shape, opt)
    queries = head_of(query, batch, head)
    upcoming = load_tile(queries, first_row, shape.length_q, opt.block_q, opt.head_dim, opt.padded,
                         True)  # fmt: skip
    keys = keys_of(key, batch, kv_head, shape, opt)
    first = tl.full((), 0, tl.int32)
    k = load_keys(keys, first, shape, wide.block_k, opt.head_dim, opt.padded, True, opt)
    scale: tl.constexpr = PROB_SCALE if value.base.dtype.element_ty == tl.float16 else 1.0
    if OUTPUT:
        values = keys_of(value, batch, kv_head, shape, opt)
        v = load_keys(values, first, shape, wide.block_k, opt.head_dim_v, opt.padded_v, True, opt)
        if COUNT:
            marks = marks_of(marks, batch, head, shape, MARK)
    for index in range(start, stop):
        at_block, at_head, first_row, at_row, inside = row_block_of(first_block + index, shape,
                                                                    opt)  # fmt: skip
        q = upcoming
        next_row = tl.maximum(first_row - opt.block_q, 0)  # see `row_block_of`
        upcoming = load_tile(queries, next_row, shape.length_q, opt.block_q, opt.head_dim,
                             opt.padded, True)  # fmt: skip
        rows, columns = numbers_of(first_row, first, wide, opt.block_q)
        bias = 0.0
        if opt.biased:
            bias = bias_of(rows, columns, terms, shape, opt)
        s = seen_scores(q, k, rows, first, bias, terms, shape, wide, wide.block_k, True)
        maxima = part_maxima(s, opt, wide)
        tiles: tl.constexpr = wide.block_k // opt.block_k
        highest = largest(tl.reshape(maxima, (opt.block_q, tiles, PARTS)), 2)
        top, poisoned, pending = kinds_of(largest(highest, 1), inside, terms, opt)
        t = bound_rows(maxima, top, pending, terms, opt)
        # Through memory: else the compiler hands all scores to the threads that hold their maxima.
        tl.store(top_out + at_row, top, mask=inside)
        tl.store(t_out + at_row, t, mask=inside)
        tl.debug_barrier()
        top = tl.load(top_out + at_row, mask=inside, other=0.0)
        t = tl.load(t_out + at_row, mask=inside, other=INFINITY)
        pending = t < INFINITY

        lo = t
        hi = tl.where(pending, HIGHEST, INFINITY)
        most = tl.full((opt.block_q,), INFINITY, tl.float32)
        steps = tl.full((opt.block_q,), 0, tl.int32)
        step = 0
        waiting = any_of(pending)
        while waiting:
            threshold = t
            if not opt.relative:
                threshold = terms.c * top + t
            x = distance(s, column(top, opt), threshold[:, None], terms.c, opt)
            mass, slope, count = sums_of(x, terms.r, wide)
            if opt.sinks:
                mass, slope, is_kept = with_sink(mass, slope, top, threshold, terms, opt)
                count += is_kept
            moved, lo, hi, most, final = stepped(t, top, lo, hi, most, mass, slope, count, terms,
                                                 tolerance, step, opt)  # fmt: skip
            steps += pending.to(tl.int32)
            t = tl.where(pending, moved, t)
            pending = pending & (final == 0)
            step += 1
            waiting = any_of(pending) & (step < MAX_STEPS)
        if COUNT:
            tl.store(iterations + at_row, steps, mask=inside)
        end = seen_tiles(first_row, terms, shape, opt)
        begin = tl.minimum(seen_begin(first_row, terms, shape, opt), end)
        open_end = open_tiles(first_row, shape.length_k, terms, shape, opt)
        open_ones = open_between(first_row, begin, end, open_end, terms, shape, opt)
        list_tiles(lists, live, counts, at_block, highest, top, t, open_ones, terms, shape, opt)
        t, tau = store_thresholds(top_out, t_out, tau_out, top, t, poisoned, at_row, inside, terms,
                                  opt)  # fmt: skip
        mark_poisoned(poison, poisoned, first_row, (begin, end), batch, kv_head, terms, shape, opt)

        if OUTPUT:
            if not opt.relative:
                t = tau
            x = distance(s, column(top, opt), t[:, None], terms.c, opt)
            u_scale, top_u = scale_of_u(t, terms.r, scale, opt)
            sums = weigh(no_sums(opt, GRADIENT, False), x, v, first_row, first, marks, terms, shape,
                         u_scale, wide, scale, GRADIENT, False, COUNT, MARK)  # fmt: skip
            store_output(sums, out, out_u, spread, unsafe, support, top, t, top_u, u_scale, batch,
                         head, first_row, at_row, inside, value.base.dtype.element_ty, terms, shape,
                         opt, scale, GRADIENT, False, COUNT)  # fmt: skip
