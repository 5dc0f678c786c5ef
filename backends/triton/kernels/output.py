"""The output over the lists of live tiles."""

from __future__ import annotations

import triton
import triton.language as tl

from adasplash2.backends.triton.kernels import score, threshold, work
from adasplash2.backends.triton.kernels.arithmetic import (
    PROB_SCALE,
    any_of,
    count_bad,
    cut_to,
    finite_part,
    in_halves,
    is_finite,
    matmul,
    shares_of,
    weighted,
    with_bad,
)
from adasplash2.backends.triton.kernels.threshold import PARTS

LARGEST = tl.constexpr(65504.0)
"""Of float16's numbers."""

LEFT = tl.constexpr(2.0**-9)
"""How far ``sum p`` may be from 1 where ``opt.rough``: probabilities are divided by it, and of what
else it moves between the keys of a row a part is seen, less than bfloat16 rounds."""

MOST_AGAIN = tl.constexpr(8)
"""The most times that a row block's means are found where ``opt.rough``; hardly ever three."""


@triton.jit
def scaled(u, u_scale, TYPE: tl.constexpr, opt: tl.constexpr):
    """``u`` for the sums of :func:`output`, as :func:`weighted` takes it: the weights of one key's
    row must be one, however ``u`` is rounded."""
    u = u * u_scale
    if opt.steep:
        u = in_halves(tl.minimum(u, LARGEST), TYPE)
    elif not opt.halved:
        u = cut_to(u, TYPE)
    return u


@triton.jit
def weigh(sums, x, v, first_row, first, marks, terms, shape, u_scale, opt: tl.constexpr,
          SCALE: tl.constexpr, GRADIENT: tl.constexpr, SAFE: tl.constexpr, COUNT: tl.constexpr,
          MARK: tl.constexpr):  # fmt: skip
    """Add the values ``v`` of keys at distances ``x``, weighted by ``p``, and by ``u`` where
    GRADIENT."""
    acc, acc_u, bad, mass, slope, count = sums
    p, u = threshold.weights(x, terms.r, opt)
    mass += threshold.part_sums(p)
    if opt.dropout:
        rows, columns = score.numbers_of(first_row, first, opt, opt.block_q)
        kept = score.is_kept(rows, columns, terms, shape)
        p = tl.where(kept, p, 0.0)
    acc += matmul((p * SCALE).to(v.dtype), finite_part(v, SAFE))
    if GRADIENT or opt.rough:
        u = scaled(u, u_scale, v.dtype, opt)
        slope += threshold.part_sums(u)
    if GRADIENT:
        if opt.dropout:
            u = tl.where(kept, u, 0.0)
        acc_u += weighted(u, finite_part(v, SAFE), opt)
    if SAFE:
        reached = score.is_inside(x, terms.r, opt)
        if opt.dropout:
            reached = reached & kept
        bad = count_bad(bad, reached, v)
    if COUNT:
        count += tl.sum(score.is_inside(x, terms.r, opt).to(tl.int32), 1)
        rows = (first_row + tl.arange(0, opt.block_q))[:, None]
        columns = (first + tl.arange(0, opt.block_k))[None, :]
        work.mark_pairs(marks, rows, columns, score.is_inside(x, terms.r, opt), shape, MARK)
    return acc, acc_u, bad, mass, slope, count


@triton.jit
def weigh_tiles(sums, number, at_rows, keys, values, entries, marks, terms, shape, u_scale,
                opt: tl.constexpr, SCALE: tl.constexpr, GRADIENT: tl.constexpr, SAFE: tl.constexpr,
                COUNT: tl.constexpr, MARK: tl.constexpr, EDGE: tl.constexpr):  # fmt: skip
    """:func:`weigh` the entries that need no mask, or the others where EDGE, of which ``number`` is
    the first."""
    numbers, start, stop = work.portion(entries, EDGE)
    for index in range(start, stop):
        first, k, v = work.load_pair(number, keys, values, shape, opt, work.is_cut(EDGE, opt))
        number = work.entry_of(numbers, index + 1, stop)
        x, _, _ = score.distances(
            at_rows, k, first, terms, shape, opt, work.is_edge(index, entries, EDGE)
        )
        sums = weigh(sums, x, v, at_rows[3], first, marks, terms, shape, u_scale, opt, SCALE,
                     GRADIENT, SAFE, COUNT, MARK)  # fmt: skip
    return sums


@triton.jit
def start_of(entries, EDGE: tl.constexpr):
    """The first entry of a loop over :func:`work.portion`."""
    numbers, start, stop = work.portion(entries, EDGE)
    return work.first_entry(numbers, start, stop, EDGE)


@triton.jit
def settled(sums, t, r, opt: tl.constexpr):
    """Where :func:`weigh_tiles` has found how far from the root ``t`` is, a step to it, which is
    the last but for rows that are far off; and which these are."""
    mass, slope = threshold.pair_sums(sums[3], sums[4])
    moved = tl.where(mass > 0.0, t + threshold.rise(mass, slope, r, opt), t)
    return moved, (tl.abs(mass - 1.0) > LEFT) & is_finite(moved) & (mass > 0.0)


@triton.jit
def no_sums(opt: tl.constexpr, GRADIENT: tl.constexpr, SAFE: tl.constexpr):
    """The sums of :func:`weigh` before all keys: of values by ``p`` and by ``u``, what is not
    finite beside them, ``sum p`` and ``sum u`` by :func:`threshold.part_sums`, the size of the
    support."""
    none = tl.full((opt.block_q, opt.padded_v if SAFE else 1), 0.0, tl.float32)
    return (
        tl.full((opt.block_q, opt.padded_v), 0.0, tl.float32),
        tl.full((opt.block_q, opt.padded_v if GRADIENT else 1), 0.0, tl.float32),
        (none, none),
        tl.full((opt.block_q, PARTS), 0.0, tl.float32),
        tl.full((opt.block_q, PARTS), 0.0, tl.float32),
        tl.full((opt.block_q,), 0, tl.int32),
    )


@triton.jit
def scale_of_u(t, r, SCALE: tl.constexpr, opt: tl.constexpr):
    """What ``u`` is multiplied by before it is rounded, and the ``u`` of the highest score where
    ``opt.exact``."""
    u_scale = SCALE
    top_u = 0.0
    if opt.exact:
        _, top_u = threshold.weights(-t, r, opt)
    if opt.steep:
        # Other keys have up to 2^23 times as much, as far as `t` resolves them, which float16 must
        # hold. Where one outweighs all others, its `dp - delta` is what these add to `delta`: so
        # `slope` sums the very weights that values are multiplied by.
        u_scale = (1.0 / 256.0 / tl.where(top_u > 0.0, top_u, 1.0))[:, None]
    return u_scale, top_u


@triton.jit
def store_output(sums, out, out_u, spread, unsafe, some, support, top, t, top_u, u_scale, batch,
                 head, first_row, at_row, inside, TYPE: tl.constexpr, terms, shape,
                 opt: tl.constexpr, SCALE: tl.constexpr, GRADIENT: tl.constexpr, SAFE: tl.constexpr,
                 COUNT: tl.constexpr):  # fmt: skip
    """Store the means that the sums of all keys make, and mark rows that are not finite."""
    acc, acc_u, bad, masses, slopes, count = sums
    mass, slope = threshold.pair_sums(masses, slopes)
    if opt.sinks:
        p, u = threshold.weights(score.distance(terms.sink, top, t, terms.c, opt), terms.r, opt)
        mass += p
        if GRADIENT:
            u = scaled(u[:, None], u_scale, TYPE, opt)
            slope += tl.max(u, 1)
    # A number of each row, not a division of each entry.
    result = acc * (1.0 / tl.where(mass > 0.0, mass * SCALE, 1.0))[:, None]
    result = score.with_kept_factor(result, shape, opt)
    if SAFE:
        result = with_bad(result, bad)
    result = tl.where((t != t)[:, None], float("nan"), result)
    outs = work.head_of(out, batch, head)
    work.store_tile(
        outs, first_row, shape.length_q, result, opt.block_q, opt.head_dim_v, opt.padded_v
    )
    if GRADIENT:
        mean = acc_u * (1.0 / tl.where(slope > 0.0, slope, 1.0))[:, None]
        if not opt.shares:  # else it is a factor of what is read
            mean = score.with_kept_factor(mean, shape, opt)
        if SAFE:
            mean = with_bad(mean, bad)
        if opt.exact:
            if opt.steep:  # as in the sum
                top_u = tl.max(scaled(top_u[:, None], u_scale, TYPE, opt), 1)
            tl.store(spread + at_row, tl.where(slope == top_u, 0.0, 1.0), mask=inside)
        if opt.shares:
            mean, most = shares_of(mean, TYPE)
            tl.store(spread + at_row, most, mask=inside)
        means = work.head_of(out_u, batch, head)
        work.store_tile(
            means, first_row, shape.length_q, mean, opt.block_q, opt.head_dim_v, opt.padded_v
        )
    if COUNT:
        tl.store(support + at_row, count, mask=inside)
    if not SAFE:
        work.mark_rows(unsafe + at_row, some, result, inside)


@triton.jit
def output_of(number, query, key, value, out, out_u, spread, top_in, t_in, lists, counts, unsafe,
              some, support, marks, shape, opt: tl.constexpr, GRADIENT: tl.constexpr,
              SAFE: tl.constexpr, COUNT: tl.constexpr, MARK: tl.constexpr):  # fmt: skip
    """:func:`output` of the row block that is ``number`` in launch order."""
    at_block, at_head, first_row, at_row, inside = work.row_block_at(number, shape, opt)
    batch, head, kv_head = at_head
    terms = score.terms_of(batch, head, shape, opt)
    queries = work.head_of(query, batch, head)
    q = work.load_tile(
        queries, first_row, shape.length_q, opt.block_q, opt.head_dim, opt.padded, True
    )
    keys = work.keys_of(key, batch, kv_head, shape, opt)
    values = work.keys_of(value, batch, kv_head, shape, opt)
    entries = work.entries_at(lists, counts, at_block, work.tiles_of(shape, opt))
    top, t = work.load_thresholds(top_in, t_in, at_row, inside, opt)
    scale: tl.constexpr = PROB_SCALE if value.base.dtype.element_ty == tl.float16 else 1.0
    if COUNT:
        marks = work.marks_of(marks, batch, head, shape, MARK)
    sums = no_sums(opt, GRADIENT, SAFE)
    u_scale, top_u = scale_of_u(t, terms.r, scale, opt)
    if opt.rough and not SAFE:  # under windows alone, where all tiles share a loop
        tl.static_assert(opt.joined)
        number = start_of(entries, 2)  # on its way beside the queries
        step = 0
        waiting = step < MOST_AGAIN
        while waiting:
            at_rows = (q, top, t, first_row)
            sums = no_sums(opt, GRADIENT, SAFE)
            sums = weigh_tiles(sums, number, at_rows, keys, values, entries, marks, terms,
                               shape, u_scale, opt, scale, GRADIENT, SAFE, COUNT, MARK,
                               2)  # fmt: skip
            moved, off = settled(sums, t, terms.r, opt)
            step += 1
            waiting = any_of(off) & (step < MOST_AGAIN)
            t = tl.where(off & waiting, moved, t)
            number = start_of(entries, 2)  # anew: what follows has no registers to stay in
        moved, _ = settled(sums, t, terms.r, opt)
        tl.store(t_in + at_row, moved, mask=inside)
    else:
        at_rows = (q, top, t, first_row)
        for edge in tl.static_range(2 if opt.joined else 0, 3 if opt.joined else 2):
            sums = weigh_tiles(sums, start_of(entries, edge), at_rows, keys, values, entries,
                               marks, terms, shape, u_scale, opt, scale, GRADIENT, SAFE, COUNT,
                               MARK, edge)  # fmt: skip
    store_output(sums, out, out_u, spread, unsafe, some, support, top, t, top_u, u_scale, batch,
                 head, first_row, at_row, inside, value.base.dtype.element_ty, terms, shape, opt,
                 scale, GRADIENT, SAFE, COUNT)  # fmt: skip


@triton.jit
def output(query, key, value, out, out_u, spread, top_in, t_in, lists, counts, unsafe, some,
           support, marks, shape, work_items, opt: tl.constexpr, GRADIENT: tl.constexpr,
           SAFE: tl.constexpr, COUNT: tl.constexpr, MARK: tl.constexpr):  # fmt: skip
    """``out = sum p v / sum p`` and, where GRADIENT, ``out_u = sum u v / sum u`` for the backward.

    Launched twice: rows whose result is not finite are marked ``unsafe``, and only their blocks
    are done again where SAFE, by a loop in which values that are not finite reach the rows alone
    whose support holds them. There are few programs then, since hardly ever there are ``some``.
    ``spread``: 0 where one key has all of the probability, whose ``ds`` is zero; or the largest
    entry of ``out_u``, which has shares of it. Where ``opt.rough`` thresholds, which are ``tau``
    there, take a last step, and are stored anew.
    """
    if SAFE:
        number, waiting = work.first_again(some, work_items)
        while waiting:
            if work.is_block_marked(number, unsafe, shape, opt):
                output_of(number, query, key, value, out, out_u, spread, top_in, t_in, lists,
                          counts, unsafe, some, support, marks, shape, opt, GRADIENT, SAFE,
                          COUNT, MARK)  # fmt: skip
            number, waiting = work.next_again(number, work_items)
    else:
        output_of(tl.program_id(0), query, key, value, out, out_u, spread, top_in, t_in, lists,
                  counts, unsafe, some, support, marks, shape, opt, GRADIENT, SAFE, COUNT,
                  MARK)  # fmt: skip
