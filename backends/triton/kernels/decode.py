"""Few queries against a long cache, without gradients.

The rows of all query heads that share a key head are read together, so that each key is read once,
and keys are cut into ``splits``, so that few heads occupy a whole GPU. A *block* is ``opt.block_q``
of these rows, a *tile* ``opt.block_k`` keys, a *segment* ``opt.segment`` of these. In this order:

1. ``decode_scan``, a program for each block and split: scores, and their row maxima by segment.
   The threshold of some of a row's scores is at most that of all: scores of a row and a segment are
   kept only where one is not below the bound that the split's own scores set so far.
2. ``decode_solve``, a program for each row: a bound from the maxima of all splits, the list of the
   segments that reach it, and the threshold, where these are not too many for one program. Then
   also the list of the keys of the support and, if they are few, the output.
3. ``decode_narrow``, for rows of more, in parts: a step of their thresholds, from the sums of the
   parts. The last one of a few launches leaves no row without its threshold.
4. ``decode_weigh``, a program for each block and split: the sums of its values, for rows whose
   support is not listed. Of these, only those are read that have a probability. Where a block has
   few rows, the program that comes last has the output, from the sums of all splits.
5. ``decode_combine``, where it has many, a program for each row whose support is not listed: the
   same.

Lengths are arguments of their own, for which nothing is specialised: a cache grows.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from adasplash2.backends.triton.kernels import score, solve, work
from adasplash2.backends.triton.kernels.arithmetic import (
    INFINITY,
    PROB_SCALE,
    any_of,
    count_bad,
    finite_part,
    is_finite,
    larger,
    largest,
    matmul,
    with_bad,
)
from adasplash2.backends.triton.kernels.solve import BOUND_STEPS
from adasplash2.backends.triton.kernels.threshold import (
    HIGHEST,
    PARTS,
    certain_rise,
    guess_of,
    mean_and_deviation,
    pair_sums,
    part_sums,
    stepped,
    total_sums,
    weights,
    with_sink,
)
from adasplash2.backends.triton.sizes import Shape

FIRST_BOUND = tl.constexpr(8)
"""Tiles of a split after which its maxima set a bound; then each time there are BOUND_GROWTH times
as many."""

BOUND_GROWTH = tl.constexpr(4)

# What `decode_solve` and `decode_narrow` leave of a row: (rows, STATES) float32.
STATES = tl.constexpr(8)
TOP = tl.constexpr(0)
T = tl.constexpr(1)
LO = tl.constexpr(2)
HI = tl.constexpr(3)
MOST = tl.constexpr(4)
FLOOR = tl.constexpr(5)
STEPS = tl.constexpr(6)
LISTED = tl.constexpr(7)

MOST_LISTED = tl.constexpr(512)
"""Keys of a row's support up to which they are listed, to be weighed by one program. ``LISTED`` is
their number, -1 where they are more or not known. On an H100 rows of 267 of 131,072 keys took twice
as long as those of 34 where ``decode_weigh`` looked for them."""

FEW_LISTED = tl.constexpr(640)
"""Keys of the support before a row's last step up to which it may have MOST_LISTED after it: others
are not looked for."""

DENSE = tl.constexpr(2)
"""``decode_weigh`` reads all values of a split where one of so many of its tiles has some that it
needs: what it need not look for, it asks for ahead."""

SPLITS_AHEAD = tl.constexpr(8)
"""Splits whose sums the last program of ``decode_weigh`` asks for before it adds them."""

SUMS = tl.constexpr(3)
"""What a part of ``decode_narrow`` leaves: ``sum p``, ``sum u`` and the size of the support."""


@triton.jit
def after_the_last(opt: tl.constexpr):
    """Let the next kernel's programs be placed where there is room, and wait for the end of the
    last kernel. Every program of every kernel waits: the end of one means that of all before."""
    if opt.overlaps:
        gdc_launch_dependents()
        gdc_wait()


# Where things are


@triton.jit
def with_length(shape, length_k):
    """The shape as other kernels take it. Members of a tuple are specialised, arguments need not
    be."""
    return Shape(
        shape.heads_q, shape.gqa_group, shape.length_q, length_k, shape.c, shape.r, shape.terms
    )


@triton.jit
def segments_in(tile, opt: tl.constexpr):
    """Where the segments of a tile begin."""
    return tile * (opt.block_k // opt.segment)


@triton.jit
def scores_at(scores, at_row, shape, opt: tl.constexpr):
    """Where the scores of rows begin."""
    return scores + at_row.to(tl.int64) * (work.tiles_of(shape, opt) * opt.block_k)


@triton.jit
def maxima_at(maxima, at_row, shape, opt: tl.constexpr):
    """Where the maxima of rows, or their lists, begin."""
    segments = segments_in(work.tiles_of(shape, opt), opt)
    return maxima + at_row.to(tl.int64) * segments


@triton.jit
def store_scores(scores, first, s, kept, opt: tl.constexpr):
    """Store those of a tile's segments that are ``kept``; ``scores`` is where those of rows begin.

    By rows, segments and keys of these: a mask that was reshaped hides from the compiler that
    neighbours are stored together, and it stores scores one by one.
    """
    segments: tl.constexpr = opt.block_k // opt.segment
    if segments == 1:
        columns = tl.arange(0, opt.block_k)[None, :]
        tl.store(scores + first + columns, s, mask=kept & (columns >= 0))
    else:
        columns = tl.arange(0, segments)[None, :, None] * opt.segment
        columns += tl.arange(0, opt.segment)[None, None, :]
        by_segment = tl.reshape(s, (opt.block_q, segments, opt.segment))
        tl.store(scores[:, :, None] + first + columns, by_segment, mask=kept[:, :, None])


@triton.jit
def by_key(flags, opt: tl.constexpr):
    """What holds of the segments of a tile, for each key."""
    segments: tl.constexpr = opt.block_k // opt.segment
    if segments == 1:
        return flags
    else:
        wide = tl.broadcast_to(flags[:, :, None], (opt.block_q, segments, opt.segment))
        return tl.reshape(wide, (opt.block_q, opt.block_k))


# Bounds


@triton.jit
def floor_of(top, t, terms, opt: tl.constexpr):
    """A score that no key of the support is below, from a lower bound of ``t``."""
    below = (t - score.lift_of(terms.r, opt)) / terms.c
    return top + below - (tl.abs(top) + tl.abs(below)) * 2.0**-22  # more than rounding adds


@triton.jit
def bound_of_maxima(pointers, begin, end, top, terms, opt: tl.constexpr, ROWS: tl.constexpr,
                    CHUNK: tl.constexpr):  # fmt: skip
    """A lower bound of ``t`` of ROWS rows: certain rises on maxima of segments ``begin`` up to
    ``end``, from ``tau >= max z - 1``. ``pointers`` and ``top`` are columns."""
    t = tl.full((ROWS, 1), 0.0, tl.float32) + (score.lift_of(terms.r, opt) - 1.0)
    for _ in tl.static_range(BOUND_STEPS):
        mass = tl.full((ROWS, CHUNK), 0.0, tl.float32)
        slope = tl.full((ROWS, CHUNK), 0.0, tl.float32)
        for first in range(begin, end, CHUNK):
            places = first + tl.arange(0, CHUNK)[None, :]
            highest = tl.load(pointers + places, mask=places < end, other=-INFINITY)
            p, u = weights(score.distance(highest, top, t, terms.c, opt), terms.r, opt)
            mass += p
            slope += u
        mass, slope = pair_sums(mass, slope)
        mass = mass[:, None]
        slope = slope[:, None]
        if opt.sinks:
            mass, slope, _ = with_sink(mass, slope, top, t, terms, opt)
        t += tl.where(mass > 1.0, certain_rise(mass, slope, terms.r, opt), 0.0)
    return t - solve.slack(terms.r)


# 1. Scores


@triton.jit
def scores_of(q, number, keys, first, bias, rows, seen, terms, shape, opt: tl.constexpr):
    """Scores of rows and a tile, -inf where a key may not be seen; ``seen`` by ``score.window``."""
    k = work.load_keys_in(
        number, keys, first, shape, opt.block_k, opt.head_dim, opt.padded, True, opt
    )
    s = score.biased(
        score.capped(score.products(q, k, bias, opt), rows, terms, shape, opt), bias, opt
    )
    keys = first + tl.arange(0, opt.block_k)[None, :]
    return tl.where(score.is_within(keys, seen), s, -INFINITY)


@triton.jit(do_not_specialize=["length_k", "splits"])
def decode_scan(query, key, maxima, scores, tops, floors, totals, squares, arrivals, shape,
                length_k, splits, opt: tl.constexpr, CHUNK: tl.constexpr,
                STAGES: tl.constexpr):  # fmt: skip
    """Maxima of each row and segment and, where they are not below a bound, all scores of the two;
    the maxima of a split and, at its end, the bound; where ``opt.guesses``, the sums of its scores
    and of their squares."""
    after_the_last(opt)
    shape = with_length(shape, length_k)
    at_head, block, split = work.block_and_split(shape, splits, opt)
    _, batch, kv_head = at_head
    at_row, head, row, inside = work.rows_in(block, at_head, shape, opt)
    if split == 0:
        tl.store(arrivals + at_row, tl.full((opt.block_q,), 0, tl.int32), mask=inside)
    terms = score.terms_of(batch, head[:, None], shape, opt)
    rows = row[:, None]
    wide = tl.arange(0, opt.padded)[None, :]
    queries = work.row_pointers(work.head_of(query, batch, head[:, None]), rows, wide)
    q = tl.load(queries, mask=wide < opt.head_dim, other=0.0)
    keys = work.keys_of(key, batch, kv_head, shape, opt)
    some, some_end = score.tiles_seen_by(row, terms, shape, opt)
    begin, end = work.share_of(some, some_end, split, splits)
    seen = score.window(rows, terms, shape, opt)
    pointers = maxima_at(maxima, at_row[:, None], shape, opt)
    own_scores = scores_at(scores, at_row[:, None], shape, opt)
    each: tl.constexpr = opt.block_k // opt.segment
    segments = tl.arange(0, each)[None, :]
    columns = tl.arange(0, opt.block_k)[None, :]
    top = tl.full((opt.block_q, 1), -INFINITY, tl.float32)
    if opt.sinks:
        top = larger(top, terms.sink)
    floor = tl.full((opt.block_q, 1), -INFINITY, tl.float32)
    # Of 64 rows a warp has whole rows, and few registers; of fewer, warps share rows.
    by_parts: tl.constexpr = opt.block_q >= 64
    total = tl.full((opt.block_q, PARTS if by_parts else opt.block_k), 0.0, tl.float32)
    square = tl.full((opt.block_q, PARTS if by_parts else opt.block_k), 0.0, tl.float32)
    start = begin
    size = FIRST_BOUND
    while start < end:
        stop = tl.minimum(start + size, end)
        number = work.pages_at(keys, start * opt.block_k, shape, opt.block_k, opt)
        for tile in tl.range(start, stop, num_stages=STAGES if opt.adds else None):
            first = tile * opt.block_k
            here = number
            number = work.pages_at(keys, first + opt.block_k, shape, opt.block_k, opt)
            bias = 0.0
            if opt.biased:
                bias = score.bias_of(rows, first + columns, terms, shape, opt)
            if opt.hides:  # as in `scan_tiles`
                s = tl.full((opt.block_q, opt.block_k), -INFINITY, tl.float32)
                if score.any_shown(bias):
                    s = scores_of(q, here, keys, first, bias, rows, seen, terms, shape, opt)
            else:
                s = scores_of(q, here, keys, first, bias, rows, seen, terms, shape, opt)
            highest = largest(tl.reshape(s, (opt.block_q, each, opt.segment)), 2)
            top = larger(top, largest(highest, 1)[:, None])
            floor = tl.maximum(floor, floor_of(top, score.lift_of(terms.r, opt) - 1.0, terms, opt))
            kept = inside[:, None] & (highest >= floor) & (highest > -INFINITY)
            tl.store(pointers + tile * each + segments, highest, mask=inside[:, None])
            store_scores(own_scores, first, s, kept, opt)
            if opt.guesses:
                s = tl.where(s > -INFINITY, s, 0.0)
                total += part_sums(s) if by_parts else s
                square += part_sums(s * s) if by_parts else s * s
        if stop < end:
            tl.debug_barrier()  # the maxima are read back by other threads
            t = bound_of_maxima(
                pointers, begin * each, stop * each, top, terms, opt, opt.block_q, CHUNK
            )
            floor = tl.maximum(floor, floor_of(top, t, terms, opt))
        start = stop
        size = size * BOUND_GROWTH
    places = at_row[:, None] * splits + split
    tl.store(tops + places, top, mask=inside[:, None])
    tl.store(floors + places, floor, mask=inside[:, None])
    if opt.guesses:
        total, square = pair_sums(total, square)
        tl.store(totals + places, total[:, None], mask=inside[:, None])
        tl.store(squares + places, square[:, None], mask=inside[:, None])


# 2. and 3. Thresholds


@triton.jit
def listed_scores(scores, listed, first, stop, opt: tl.constexpr, SEGMENTS: tl.constexpr):
    """The keys of SEGMENTS segments of a row's list from ``first`` on, and their scores; none from
    ``stop`` on."""
    places = first + tl.arange(0, SEGMENTS)
    segment = tl.load(listed + places, mask=places < stop, other=0)[:, None]
    keys = segment * opt.segment + tl.arange(0, opt.segment)[None, :]
    return keys, tl.load(scores + keys, mask=(places < stop)[:, None], other=-INFINITY)


@triton.jit
def sums_over(s, scores, listed, start, stop, top, t, terms, opt: tl.constexpr,
              SEGMENTS: tl.constexpr):  # fmt: skip
    """``sum p``, ``sum u`` and the size of the support over entries of a row's list of segments, of
    which ``s`` are the scores of the first SEGMENTS."""
    x = score.distance(s, top, t, terms.c, opt)
    mass, slope = weights(x, terms.r, opt)
    count = score.is_inside(x, terms.r, opt).to(tl.float32)
    _, ahead = listed_scores(scores, listed, start + SEGMENTS, stop, opt, SEGMENTS)
    for first in range(start + SEGMENTS, stop, SEGMENTS):
        more = ahead
        _, ahead = listed_scores(scores, listed, first + SEGMENTS, stop, opt, SEGMENTS)
        x = score.distance(more, top, t, terms.c, opt)
        p, u = weights(x, terms.r, opt)
        mass += p
        slope += u
        count += score.is_inside(x, terms.r, opt).to(tl.float32)
    return total_sums(mass, slope, count)


@triton.jit
def step_from(sums, top, t, lo, hi, most, step, terms, tolerance, opt: tl.constexpr):
    """:func:`stepped` from the sums over a row's keys."""
    mass, slope, count = sums
    if opt.sinks:
        mass, slope, is_one = with_sink(mass, slope, top, t, terms, opt)
        count += is_one.to(tl.float32)
    return stepped(t, top, lo, hi, most, mass, slope, count, terms, tolerance, step, opt)


@triton.jit
def rest_of_steps(s, scores, listed, count, top, t, lo, hi, most, step, pending, terms, tolerance,
                  opt: tl.constexpr, SEGMENTS: tl.constexpr, MAX_STEPS: tl.constexpr):  # fmt: skip
    """Steps up to the root, by this program alone, and how many keys were in the support before the
    last one; ``s`` as in :func:`sums_over`."""
    kept = 0.0
    while pending & (step < MAX_STEPS):
        sums = sums_over(s, scores, listed, 0, count, top, t, terms, opt, SEGMENTS)
        t, lo, hi, most, final = step_from(sums, top, t, lo, hi, most, step, terms, tolerance, opt)
        step += 1
        pending = final == 0
        kept = sums[2]
    return t, step, kept


@triton.jit
def list_keys(keys, s, found, top, t, entry_keys, entry_weights, terms, opt: tl.constexpr):
    """Write which of ``keys``, by segments, are in the support and their ``p`` behind ``found``
    others, in order and as far as MOST_LISTED; return how many there are then."""
    x = score.distance(s, top, t, terms.c, opt)
    p, _ = weights(x, terms.r, opt)
    some = score.is_inside(x, terms.r, opt).to(tl.int32)
    of_segment = tl.sum(some, 1)
    before = found + tl.cumsum(of_segment, 0) - of_segment
    goal = before[:, None] + tl.cumsum(some, 1) - some
    put = (some > 0) & (goal < MOST_LISTED)
    tl.store(entry_keys + goal, keys, mask=put)
    tl.store(entry_weights + goal, p, mask=put)
    return found + tl.sum(of_segment, 0)


@triton.jit
def list_support(keys, s, scores, listed, count, top, t, entry_keys, entry_weights, terms,
                 opt: tl.constexpr, SEGMENTS: tl.constexpr):  # fmt: skip
    """Write the keys of a row's support and their ``p``, in order, and return how many they are, if
    no more than MOST_LISTED; else -1. ``keys`` and ``s`` are of the first SEGMENTS of the list."""
    found = list_keys(keys, s, 0, top, t, entry_keys, entry_weights, terms, opt)
    for first in range(SEGMENTS, count, SEGMENTS):
        more, s_more = listed_scores(scores, listed, first, count, opt, SEGMENTS)
        found = list_keys(more, s_more, found, top, t, entry_keys, entry_weights, terms, opt)
    return tl.where(found <= MOST_LISTED, found, -1)


@triton.jit
def store_tau(tau, at_row, top, t, terms, opt: tl.constexpr):
    tl.store(tau + at_row, terms.c * top + (t - score.lift_of(terms.r, opt)))


@triton.jit
def sums_of_listed(value, entry_keys, entry_weights, marks, count, batch, head, row, terms, shape,
                   opt: tl.constexpr, ENTRIES: tl.constexpr, COUNT: tl.constexpr,
                   MARK: tl.constexpr):  # fmt: skip
    """``sum p v`` and ``sum p`` of a row from its ``count`` entries."""
    scale: tl.constexpr = PROB_SCALE if value.base.dtype.element_ty == tl.float16 else 1.0
    values = work.keys_of(value, batch, work.key_head_of(head, shape), shape, opt)
    total = tl.full((ENTRIES, opt.padded_v), 0.0, tl.float32)
    mass = tl.full((ENTRIES,), 0.0, tl.float32)
    for first in range(0, count, ENTRIES):
        places = first + tl.arange(0, ENTRIES)
        real = places < count
        keys = tl.load(entry_keys + places, mask=real, other=0)
        p = tl.load(entry_weights + places, mask=real, other=0.0)
        mass += p
        if COUNT:
            work.mark_pairs(marks, row, keys, real, shape, MARK)
        if opt.dropout:
            real = real & score.is_kept(row, keys, terms, shape)
        v = work.load_each_key(values, keys, real, shape, opt.head_dim_v, opt.padded_v, opt).to(
            tl.float32
        )
        weighed = tl.where(is_finite(v), (p * scale)[:, None] * v, v)
        total += tl.where(real[:, None], weighed, 0.0)
    return tl.sum(total, 0), tl.sum(mass, 0)


@triton.jit
def store_output(out, total, mass, top, t, at_head, row, wide, wanted, terms, shape,
                 opt: tl.constexpr):  # fmt: skip
    """``out = sum p v / sum p``, with the sink among them, of a row or, where all but ``wide`` are
    columns, of those of a block that are ``wanted``."""
    batch, head = at_head
    if opt.sinks:
        mass, _, _ = with_sink(mass, mass, top, t, terms, opt)
    scale: tl.constexpr = PROB_SCALE if out.base.dtype.element_ty == tl.float16 else 1.0
    result = total / tl.where(mass > 0.0, mass * scale, 1.0)
    result = score.with_kept_factor(result, shape, opt)
    result = tl.where(t != t, float("nan"), result)
    pointers = work.row_pointers(work.head_of(out, batch, head), row, wide)
    mask = wanted & (wide < opt.head_dim_v)
    tl.store(pointers, result.to(out.base.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["length_k", "splits"])
def decode_solve(value, maxima, scores, tops, floors, totals, squares, lists, counts, states,
                 entry_keys, entry_weights, tau, out, support, marks, shape, length_k, splits,
                 tolerance, opt: tl.constexpr, SPLITS: tl.constexpr, CHUNK: tl.constexpr,
                 SEGMENTS: tl.constexpr, SERIAL: tl.constexpr, MAX_STEPS: tl.constexpr,
                 ENTRIES: tl.constexpr, COUNT: tl.constexpr, MARK: tl.constexpr):  # fmt: skip
    """A row's threshold or, where more than SERIAL segments reach its bound, a lower bound of it.
    Then ``counts`` has their number, else 0. Where the support is listed, also the output."""
    after_the_last(opt)
    shape = with_length(shape, length_k)
    at_row = tl.program_id(0)
    batch, head, row = work.row_at(at_row, shape)
    terms = score.terms_of(batch, head, shape, opt)
    highest = tl.full((SPLITS,), -INFINITY, tl.float32)
    bounds = tl.full((SPLITS,), -INFINITY, tl.float32)
    summed = tl.full((SPLITS,), 0.0, tl.float32)
    squared = tl.full((SPLITS,), 0.0, tl.float32)
    for first in range(0, splits, SPLITS):
        places = first + tl.arange(0, SPLITS)
        at = at_row * splits + places
        highest = larger(highest, tl.load(tops + at, mask=places < splits, other=-INFINITY))
        bounds = tl.maximum(bounds, tl.load(floors + at, mask=places < splits, other=-INFINITY))
        if opt.guesses:
            summed += tl.load(totals + at, mask=places < splits, other=0.0)
            squared += tl.load(squares + at, mask=places < splits, other=0.0)
    top = largest(highest, 0)
    floor = tl.max(bounds, 0)
    if opt.alphas:
        top = tl.where(terms.c == terms.c, top, float("nan"))
    poisoned = (top != top) | (top == INFINITY)
    pending = (poisoned == 0) & (top > -INFINITY)
    top = tl.where(pending, top, 0.0)
    t = tl.where(poisoned, float("nan"), INFINITY)
    lo = t
    hi = tl.full((), HIGHEST, tl.float32)
    most = tl.full((), 0.0, tl.float32) + (shape.length_k + 1)  # with the sink
    count = 0
    step = 0
    found = 0
    listed = maxima_at(lists, at_row, shape, opt)
    entry_keys += at_row.to(tl.int64) * MOST_LISTED
    entry_weights += at_row.to(tl.int64) * MOST_LISTED
    if pending:
        rows = row + tl.arange(0, 1)
        seen, end = score.tiles_seen_by(rows, terms, shape, opt)
        ones = maxima_at(maxima, at_row, shape, opt)
        column = ones + tl.full((1, 1), 0, tl.int32)
        seen = segments_in(seen, opt)
        end = segments_in(end, opt)
        bound = bound_of_maxima(column, seen, end, top, terms, opt, 1, CHUNK)
        t = tl.max(tl.max(bound, 1), 0)
        lo = t
        floor = tl.maximum(floor, floor_of(top, t, terms, opt))
        if opt.guesses:
            keys_seen = tl.max(score.count_seen(rows, terms, shape, opt), 0)
            mean, deviation = mean_and_deviation(tl.sum(summed, 0), tl.sum(squared, 0), keys_seen)
            t = guess_of(mean, deviation, keys_seen, top, lo, terms)
        for first in range(seen, end, CHUNK):
            places = first + tl.arange(0, CHUNK)
            of_segments = tl.load(ones + places, mask=places < end, other=-INFINITY)
            alive = ((of_segments >= floor) & (places < end)).to(tl.int32)
            tl.store(listed + count + tl.cumsum(alive, 0) - alive, places, mask=alive > 0)
            count += tl.sum(alive, 0)
        if count <= SERIAL:
            tl.debug_barrier()  # the list is written
            own = scores_at(scores, at_row, shape, opt)
            keys, s = listed_scores(own, listed, 0, count, opt, SEGMENTS)
            t, step, kept = rest_of_steps(s, own, listed, count, top, t, lo, hi, most, step,
                                          pending, terms, tolerance, opt, SEGMENTS,
                                          MAX_STEPS)  # fmt: skip
            found = -1
            if kept <= FEW_LISTED:
                found = list_support(keys, s, own, listed, count, top, t, entry_keys,
                                     entry_weights, terms, opt, SEGMENTS)  # fmt: skip
            count = 0
        else:
            found = -1
    tl.store(counts + at_row, count)
    state = states + at_row * STATES
    tl.store(state + TOP, top)
    tl.store(state + T, t)
    tl.store(state + LO, lo)
    tl.store(state + HI, hi)
    tl.store(state + MOST, most)
    tl.store(state + FLOOR, tl.where(pending, floor, INFINITY))
    tl.store(state + STEPS, step.to(tl.float32))
    tl.store(state + LISTED, found.to(tl.float32))
    store_tau(tau, at_row, top, t, terms, opt)
    if found >= 0:
        tl.debug_barrier()  # the entries are written
        if COUNT:
            tl.store(support + at_row, found)
            marks = work.marks_of(marks, batch, head, shape, MARK)
        total, mass = sums_of_listed(value, entry_keys, entry_weights, marks, found, batch, head,
                                     row, terms, shape, opt, ENTRIES, COUNT, MARK)  # fmt: skip
        wide = tl.arange(0, opt.padded_v)
        store_output(out, total, mass, top, t, (batch, head), row, wide, wide >= 0, terms, shape,
                     opt)  # fmt: skip


@triton.jit(do_not_specialize=["length_k", "parts"])
def decode_narrow(scores, lists, counts, states, sums, arrivals, tau, shape, length_k, parts,
                  tolerance, opt: tl.constexpr, SEGMENTS: tl.constexpr, PARTS: tl.constexpr,
                  MAX_STEPS: tl.constexpr, LAST: tl.constexpr):  # fmt: skip
    """One step of a row that ``decode_solve`` left over, or all that it takes where LAST. The
    program that comes last adds the sums of all parts, always in the same order."""
    after_the_last(opt)
    shape = with_length(shape, length_k)
    at_row = tl.program_id(0) // parts
    part = tl.program_id(0) % parts
    count = tl.load(counts + at_row)
    if count == 0:
        return
    batch, head, _ = work.row_at(at_row, shape)
    terms = score.terms_of(batch, head, shape, opt)
    state = states + at_row * STATES
    top = tl.load(state + TOP)
    t = tl.load(state + T)
    listed = maxima_at(lists, at_row, shape, opt)
    own = scores_at(scores, at_row, shape, opt)
    begin, end = work.share_of(0, count, part, parts)
    _, s = listed_scores(own, listed, begin, end, opt, SEGMENTS)
    mass, slope, kept = sums_over(s, own, listed, begin, end, top, t, terms, opt, SEGMENTS)
    own_sums = sums + (at_row * parts + part) * SUMS
    tl.store(own_sums, mass)
    tl.store(own_sums + 1, slope)
    tl.store(own_sums + 2, kept)
    tl.debug_barrier()  # all threads have stored
    if tl.atomic_add(arrivals + at_row, 1) == parts - 1:
        places = tl.arange(0, PARTS)
        found = sums + (at_row * parts + places) * SUMS
        real = places < parts
        mass = tl.sum(tl.load(found, mask=real, other=0.0, cache_modifier=".cg"), 0)
        slope = tl.sum(tl.load(found + 1, mask=real, other=0.0, cache_modifier=".cg"), 0)
        kept = tl.sum(tl.load(found + 2, mask=real, other=0.0, cache_modifier=".cg"), 0)
        lo = tl.load(state + LO)
        hi = tl.load(state + HI)
        most = tl.load(state + MOST)
        step = tl.load(state + STEPS).to(tl.int32)
        whole = mass, slope, kept
        t, lo, hi, most, final = step_from(whole, top, t, lo, hi, most, step, terms, tolerance, opt)
        step += 1
        if LAST:
            _, s = listed_scores(own, listed, 0, count, opt, SEGMENTS)
            # Not `_`, which is a tensor here: Triton 3.6 lets a branch give no name another type.
            t, step, kept = rest_of_steps(s, own, listed, count, top, t, lo, hi, most, step,
                                          final == 0, terms, tolerance, opt, SEGMENTS,
                                          MAX_STEPS)  # fmt: skip
        tl.store(counts + at_row, tl.where(final, 0, count))
        tl.store(state + T, t)
        tl.store(state + LO, lo)
        tl.store(state + HI, hi)
        tl.store(state + MOST, most)
        tl.store(state + STEPS, step.to(tl.float32))
        store_tau(tau, at_row, top, t, terms, opt)
        tl.store(arrivals + at_row, 0)


# 4. and 5. Output


@triton.jit
def weighted_values(p, reached, v, opt: tl.constexpr, SCALE: tl.constexpr):
    """``p v``, where values that are not finite reach the rows alone that ``reached`` them."""
    weight = (p * SCALE).to(v.dtype)
    total = tl.full((opt.block_q, opt.padded_v), 0.0, tl.float32)
    if any_of(tl.max(tl.where(is_finite(v), 0, 1), 1)):
        bad = count_bad((total, total), reached, v)
        total = with_bad(matmul(weight, finite_part(v, True)), bad)
    else:
        total = matmul(weight, v)
    return total


@triton.jit
def alive_tiles(maxima, start, end, least, opt: tl.constexpr, CHUNK: tl.constexpr):
    """Of CHUNK tiles from ``start`` on, which reach ``least`` with one of the rows: 1, else 0."""
    each: tl.constexpr = opt.block_k // opt.segment
    tiles = start + tl.arange(0, CHUNK)[None, :]
    reaches = tl.full((opt.block_q, CHUNK), 0, tl.int32)
    for segment in tl.static_range(each):
        highest = tl.load(maxima + tiles * each + segment, mask=tiles < end, other=-INFINITY)
        reaches = reaches | ((highest >= least) & (tiles < end)).to(tl.int32)
    return tl.max(reaches, 0)


@triton.jit
def dense_sums(values, maxima, scores, begin, end, top, t, least, terms, shape,
               opt: tl.constexpr):  # fmt: skip
    """``sum p v``, ``sum p`` and the size of the support from tiles ``begin`` up to ``end``, all of
    whose values are read, ahead of their products: of a value that is not finite nothing is known
    but that sums are not either. ``maxima`` and ``scores`` are where those of the rows begin."""
    scale: tl.constexpr = PROB_SCALE if values[0].dtype.element_ty == tl.float16 else 1.0
    columns = tl.arange(0, opt.block_k)[None, :]
    acc = tl.full((opt.block_q, opt.padded_v), 0.0, tl.float32)
    mass = tl.full((opt.block_q, opt.block_k), 0.0, tl.float32)
    count = tl.full((opt.block_q, opt.block_k), 0, tl.int32)
    number = work.pages_at(values, begin * opt.block_k, shape, opt.block_k, opt)
    each: tl.constexpr = opt.block_k // opt.segment
    segments = tl.arange(0, each)[None, :]
    highest = tl.load(maxima + begin * each + segments)
    for tile in range(begin, end):
        first = tile * opt.block_k
        s = tl.load(scores + first + columns)
        v = work.load_keys_in(number, values, first, shape, opt.block_k, opt.head_dim_v,
                              opt.padded_v, True, opt)  # fmt: skip
        s = tl.where(by_key(highest >= least, opt), s, -INFINITY)  # others were not written
        # Of the next one, since a tile that hangs on a load of its own is not asked for ahead.
        number = work.pages_at(values, first + opt.block_k, shape, opt.block_k, opt)
        highest = tl.load(maxima + tl.minimum(tile + 1, end - 1) * each + segments)
        x = score.distance(s, top, t, terms.c, opt)
        p, _ = weights(x, terms.r, opt)
        mass += p
        count += score.is_inside(x, terms.r, opt).to(tl.int32)
        acc += matmul((p * scale).to(v.dtype), v)
    return acc, tl.sum(mass, 1), tl.sum(count, 1)


@triton.jit
def sums_of_block(partials, masses, kept, at_row, wanted, splits, opt: tl.constexpr):
    """``sum p v`` and, as columns, ``sum p`` and the size of the support of those rows of a block
    that are ``wanted``, from what all programs wrote; always in the same order."""
    wide = tl.arange(0, opt.padded_v)[None, :]
    total = tl.full((opt.block_q, opt.padded_v), 0.0, tl.float32)
    mass = tl.full((opt.block_q, 1), 0.0, tl.float32)
    count = tl.full((opt.block_q, 1), 0, tl.int32)
    for split in tl.range(0, splits, loop_unroll_factor=SPLITS_AHEAD):
        at = at_row.to(tl.int64) * splits + split
        total += tl.load(partials + at * opt.padded_v + wide, mask=wanted & (wide >= 0), other=0.0,
                         cache_modifier=".cg")  # fmt: skip
        mass += tl.load(masses + at, mask=wanted, other=0.0, cache_modifier=".cg")
        count += tl.load(kept + at, mask=wanted, other=0, cache_modifier=".cg")
    return total, mass, count


@triton.jit(do_not_specialize=["length_k", "splits"])
def decode_weigh(value, maxima, scores, states, partials, masses, kept, arrivals, out, support,
                 marks, shape, length_k, splits, opt: tl.constexpr, CHUNK: tl.constexpr,
                 LAST_ADDS: tl.constexpr, COUNT: tl.constexpr, MARK: tl.constexpr):  # fmt: skip
    """The sums of a block and a split: of values, if its support has some of the split's keys; of
    ``p``; keys of the support. With LAST_ADDS all sums are there, and the program that comes last
    has the outputs."""
    after_the_last(opt)
    shape = with_length(shape, length_k)
    at_head, block, split = work.block_and_split(shape, splits, opt)
    _, batch, kv_head = at_head
    at_row, head, row, inside = work.rows_in(block, at_head, shape, opt)
    state = states + at_row[:, None] * STATES
    listed = tl.load(state + LISTED) >= 0.0
    if tl.min(tl.min(listed.to(tl.int32), 1), 0) > 0:
        return
    terms = score.terms_of(batch, head[:, None], shape, opt)
    rows = row[:, None]
    seen, seen_end = score.tiles_seen_by(row, terms, shape, opt)
    begin, end = work.share_of(seen, seen_end, split, splits)
    top = tl.load(state + TOP)
    t = tl.load(state + T)
    least = tl.maximum(tl.load(state + FLOOR), floor_of(top, t, terms, opt))
    least = tl.where(listed, INFINITY, least)
    highest_at = maxima_at(maxima, at_row[:, None], shape, opt)
    own_scores = scores_at(scores, at_row[:, None], shape, opt)
    values = work.keys_of(value, batch, kv_head, shape, opt)
    acc = tl.full((opt.block_q, opt.padded_v), 0.0, tl.float32)
    mass = tl.full((opt.block_q,), 0.0, tl.float32)
    count = tl.full((opt.block_q,), 0, tl.int32)
    columns = tl.arange(0, opt.block_k)[None, :]
    places = tl.arange(0, CHUNK)
    each: tl.constexpr = opt.block_k // opt.segment
    segments = tl.arange(0, each)[None, :]
    pending = begin < end
    if not (COUNT or opt.dropout):
        several = 0
        for start in range(begin, end, CHUNK):
            alive = alive_tiles(highest_at, start, end, least, opt, CHUNK)
            several += tl.sum(alive, 0)
        if (several * DENSE >= end - begin) & pending:
            acc, mass, count = dense_sums(values, highest_at, own_scores, begin, end, top, t, least,
                                          terms, shape, opt)  # fmt: skip
            pending = any_of(tl.max(tl.where(is_finite(acc), 0, 1), 1))
            if pending:
                acc = tl.full((opt.block_q, opt.padded_v), 0.0, tl.float32)
                mass = tl.full((opt.block_q,), 0.0, tl.float32)
                count = tl.full((opt.block_q,), 0, tl.int32)
    if pending:
        scale: tl.constexpr = PROB_SCALE if value.base.dtype.element_ty == tl.float16 else 1.0
        if COUNT:
            marks_at = work.marks_of(marks, batch, head[:, None], shape, MARK)
        for start in range(begin, end, CHUNK):
            alive = alive_tiles(highest_at, start, end, least, opt, CHUNK)
            place = -1
            for _ in range(0, tl.sum(alive, 0)):
                place = tl.min(tl.where((alive > 0) & (places > place), places, CHUNK), 0)
                highest = tl.load(highest_at + (start + place) * each + segments)
                here = by_key(highest >= least, opt) & (columns >= 0)
                first = (start + place) * opt.block_k
                s = tl.load(own_scores + first + columns, mask=here, other=-INFINITY)
                x = score.distance(s, top, t, terms.c, opt)
                p, _ = weights(x, terms.r, opt)
                reached = score.is_inside(x, terms.r, opt)
                mass += tl.sum(p, 1)
                count += tl.sum(reached.to(tl.int32), 1)
                if COUNT:
                    work.mark_pairs(marks_at, rows, first + columns, reached, shape, MARK)
                if opt.dropout:
                    reached = reached & score.is_kept(rows, first + columns, terms, shape)
                    p = tl.where(reached, p, 0.0)
                wanted = tl.max(reached.to(tl.int32), 0) > 0
                keys = first + tl.arange(0, opt.block_k)
                v = work.load_each_key(
                    values, keys, wanted, shape, opt.head_dim_v, opt.padded_v, opt
                )
                acc += weighted_values(p, reached, v, opt, scale)
    at_split = at_row.to(tl.int64) * splits + split
    at = partials + at_split[:, None] * opt.padded_v + tl.arange(0, opt.padded_v)[None, :]
    tl.store(at, acc, mask=(inside & ((count > 0) | LAST_ADDS))[:, None])
    tl.store(masses + at_split, mass, mask=inside)
    tl.store(kept + at_split, count, mask=inside)
    if LAST_ADDS:
        tl.debug_barrier()  # all threads have stored
        if tl.atomic_add(arrivals + tl.min(at_row, 0), 1) == splits - 1:
            wanted = inside[:, None] & (listed == 0)
            total, whole, number = sums_of_block(partials, masses, kept, at_row[:, None], wanted,
                                                 splits, opt)  # fmt: skip
            wide = tl.arange(0, opt.padded_v)[None, :]
            store_output(out, total, whole, top, t, (batch, head[:, None]), rows, wide, wanted,
                         terms, shape, opt)  # fmt: skip
            if COUNT:
                tl.store(support + at_row[:, None], number, mask=wanted)


@triton.jit
def sums_of_splits(partials, masses, kept, at_row, splits, opt: tl.constexpr,
                   SPLITS: tl.constexpr):  # fmt: skip
    """``sum p v``, ``sum p`` and the size of the support of a row from those of its splits."""
    wide = tl.arange(0, opt.padded_v)
    total = tl.full((SPLITS, opt.padded_v), 0.0, tl.float32)
    mass = tl.full((SPLITS,), 0.0, tl.float32)
    count = tl.full((SPLITS,), 0, tl.int32)
    for first in range(0, splits, SPLITS):
        places = first + tl.arange(0, SPLITS)
        at = at_row.to(tl.int64) * splits + places
        some = tl.load(kept + at, mask=places < splits, other=0)
        mass += tl.load(masses + at, mask=places < splits, other=0.0)
        count += some
        pointers = partials + at[:, None] * opt.padded_v + wide[None, :]
        total += tl.load(pointers, mask=(some > 0)[:, None], other=0.0)
    return tl.sum(total, 0), tl.sum(mass, 0), tl.sum(count, 0)


@triton.jit(do_not_specialize=["length_k", "splits"])
def decode_combine(partials, masses, kept, states, out, support, shape, length_k, splits,
                   opt: tl.constexpr, SPLITS: tl.constexpr, COUNT: tl.constexpr):  # fmt: skip
    """The output of a row whose support is not listed."""
    after_the_last(opt)
    shape = with_length(shape, length_k)
    at_row = tl.program_id(0)
    if tl.load(states + at_row * STATES + LISTED) >= 0.0:
        return
    batch, head, row = work.row_at(at_row, shape)
    terms = score.terms_of(batch, head, shape, opt)
    top = tl.load(states + at_row * STATES + TOP)
    t = tl.load(states + at_row * STATES + T)
    total, mass, count = sums_of_splits(partials, masses, kept, at_row, splits, opt, SPLITS)
    wide = tl.arange(0, opt.padded_v)
    store_output(out, total, mass, top, t, (batch, head), row, wide, wide >= 0, terms, shape, opt)
    if COUNT:
        tl.store(support + at_row, count)
