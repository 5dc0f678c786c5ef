"""Thresholds from one dense pass and few over live tiles.

A row block is ``opt.block_q`` queries of one head, a tile ``opt.block_k`` keys.
"""

from __future__ import annotations

import triton
import triton.language as tl

from adasplash2.backends.triton.kernels import arithmetic, score, work
from adasplash2.backends.triton.kernels.arithmetic import INFINITY
from adasplash2.backends.triton.kernels.threshold import (
    HIGHEST,
    LARGEST_SHARE,
    advanced,
    certain_rise,
    guess_of,
    guess_share,
    mean_and_deviation,
    no_parts,
    pair_sums,
    part_sums,
    row_sums,
    weights,
    with_parts,
    with_sink,
)

BOUND_STEPS = tl.constexpr(3)
"""Certain rises on the maxima of a row's tiles. On Gaussian scores the bound then keeps a
twentieth more keys than the threshold itself; more steps change nothing."""

FIRST_SPANS = tl.constexpr(2)
"""Spans after whose scores all rows of a block may be known to take no guess, where FEW. With tiles
of 64 keys their deviation is off by a sixteenth, and rows with c of 0.6 and above are sharp."""

SHARPEST = tl.constexpr(1e30)
"""A sum of squares with which no row takes a guess."""

PIECES = tl.constexpr(4)
"""Of a tile, whose maxima are kept apart where all that a row block may see are few. With 17 tiles
they leave blocks of Gaussian rows two of Newton's steps, where maxima of whole tiles leave
three."""

GAP = tl.constexpr(0.006)
"""How far a row's threshold is above the bound that its PIECES' maxima give, divided by their ``sum
u - 1``. On Gaussian rows of 1,025 keys it is 0.0064 where they keep 20 or 40 keys, 0.0087 where
four, of 301 keys 0.0045; blocks of the first then take 2.1 steps, from the bound itself 2.3,
simulated."""

BOUND_SLACK = tl.constexpr(1e-6)
"""See :func:`slack`."""


@triton.jit
def slack(r):
    """What rounding may add to a bound; near alpha = 1 the powers of more would overflow."""
    return BOUND_SLACK * tl.minimum(1.0, 1.0 / r)


@triton.jit
def seen_scores(q, k, first_row, first, bias, terms, shape, opt: tl.constexpr, EDGE):
    """Scores of a row block and the keys from ``first`` on, with their ``bias``; -inf where, with
    EDGE, a key may not be seen."""
    rows = (first_row + tl.arange(0, opt.block_q))[:, None]
    s = score.biased(
        score.capped(score.products(q, k, bias, opt), rows, terms, shape, opt), bias, opt
    )
    if EDGE:
        s = score.among_seen(s, first_row, first, terms, shape, opt)
    return s


@triton.jit
def piece_maxima(s, SPAN: tl.constexpr):
    """The row maxima of PIECES of each of SPAN tiles, of keys that one thread holds of a product of
    matrices before compute capability 10: of four neighbouring pairs each has one."""
    pairs: tl.constexpr = s.shape[1] // (SPAN * PIECES * 2)
    pieces = tl.reshape(s, (s.shape[0], SPAN, pairs, PIECES, 2))
    return arithmetic.largest(arithmetic.largest(pieces, 4), 2)


@triton.jit
def moments_of(s, EDGE):
    """:func:`part_sums` of scores and of their squares; where EDGE some are -inf."""
    if EDGE:
        seen = tl.where(s > -INFINITY, s, 0.0)
        total = part_sums(seen)
        squares = part_sums(seen * seen)
    else:
        total = part_sums(s)
        squares = part_sums(s * s)
    return total, squares


@triton.jit
def without_sharp(total, squares, rows, end, terms, shape, opt: tl.constexpr):
    """:func:`moments_of` all keys up to ``end``, with the SHARPEST squares for rows that are too
    sharp for a guess; and whether all are."""
    seen = tl.minimum(score.end_of(rows, terms, shape, opt), end) - score.begin_of(
        rows, terms, shape, opt
    )
    _, deviation = mean_and_deviation(*pair_sums(total, squares), seen)
    _, _, share = guess_share(deviation, score.count_seen(rows, terms, shape, opt), terms)
    sharp = share >= LARGEST_SHARE
    return tl.where(sharp[:, None], SHARPEST, squares), arithmetic.any_of(sharp == 0) == 0


@triton.jit
def span_maxima(q, keys, first, bias, first_row, edge, terms, shape, opt: tl.constexpr,
                SPAN: tl.constexpr, EDGE: tl.constexpr, FEW: tl.constexpr):  # fmt: skip
    """The row maxima of SPAN tiles, where FEW by :func:`piece_maxima`, and their scores."""
    width: tl.constexpr = SPAN * opt.block_k
    k = work.load_keys(
        keys, first, shape, width, opt.head_dim, opt.padded, work.is_cut(EDGE, opt), opt
    )
    s = seen_scores(q, k, first_row, first, bias, terms, shape, opt, edge)
    if FEW:
        highest = piece_maxima(s, SPAN)
    else:
        highest = arithmetic.largest(tl.reshape(s, (opt.block_q, SPAN, opt.block_k)), 2)
    return highest, s


@triton.jit
def scan_tiles(found, maxima, q, keys, first_row, start, stop, open_spans, terms, shape,
               opt: tl.constexpr, SPAN: tl.constexpr, STAGES: tl.constexpr, EDGE: tl.constexpr,
               FEW: tl.constexpr, CHUNK: tl.constexpr):  # fmt: skip
    """Store the row maxima of tiles, SPAN of them at a time, and return those so far and, where
    ``opt.guesses``, the sums of scores and of their squares: ``found`` with more tiles. EDGE is as
    for ``portion``, with ``open_spans`` from a first one up to an end. Keys of
    tiles that a mask of booleans hides are not read; to look for such in one that is added would
    keep its tiles and those of keys from being asked for ahead. Of a window's FEW tiles, sums end
    where no row takes a guess."""
    top, total, squares = found
    sharp = False
    rows = tl.arange(0, opt.block_q)
    width: tl.constexpr = SPAN * opt.block_k
    for span in tl.range(start, stop, num_stages=STAGES if opt.adds else None):
        first = span * width
        edge = EDGE == 1
        if EDGE == 2:
            edge = (span < open_spans[0]) | (span >= open_spans[1])
        bias = 0.0
        if opt.biased:
            columns = (first + tl.arange(0, width))[None, :]
            bias = score.bias_of((first_row + rows)[:, None], columns, terms, shape, opt)
        if opt.hides:
            if FEW:
                highest = tl.full((opt.block_q, SPAN, PIECES), -INFINITY, tl.float32)
            else:
                highest = tl.full((opt.block_q, SPAN), -INFINITY, tl.float32)
            if score.any_shown(bias):
                highest, _ = span_maxima(q, keys, first, bias, first_row, edge, terms, shape, opt,
                                         SPAN, EDGE, FEW)  # fmt: skip
        else:
            highest, s = span_maxima(q, keys, first, bias, first_row, edge, terms, shape, opt,
                                     SPAN, EDGE, FEW)  # fmt: skip
            if opt.guesses and not (FEW and opt.joined):
                moments = moments_of(s, edge)
                total += moments[0]
                squares += moments[1]
            elif opt.guesses:
                if not sharp:
                    moments = moments_of(s, edge)
                    total += moments[0]
                    squares += moments[1]
                if span == open_spans[0] + (FIRST_SPANS - 1):
                    squares, sharp = without_sharp(total, squares, first_row + rows, first + width,
                                                   terms, shape, opt)  # fmt: skip
        numbers = span * SPAN + tl.arange(0, SPAN)
        if FEW:
            places = numbers[:, None] + tl.arange(0, PIECES)[None, :] * CHUNK
            tl.store(maxima + places[None, :, :] * opt.block_q + rows[:, None, None], highest)
        else:
            tl.store(maxima + numbers[None, :] * opt.block_q + rows[:, None], highest)
        top = arithmetic.larger(top, arithmetic.largest(highest, 1))
    return top, total, squares


@triton.jit
def load_maxima(maxima, first, end, opt: tl.constexpr, CHUNK: tl.constexpr):
    places = first + tl.arange(0, CHUNK)
    pointers = maxima + places[None, :] * opt.block_q + tl.arange(0, opt.block_q)[:, None]
    return tl.load(pointers, mask=(places < end)[None, :], other=-INFINITY)


@triton.jit
def load_pieces(maxima, count, opt: tl.constexpr, CHUNK: tl.constexpr, FOLDS: tl.constexpr):
    """What :func:`scan_tiles` has stored of ``count`` tiles where FEW, by row, and by piece and
    tile; of FOLDS tiles, as far apart as can be, the maxima of both."""
    width: tl.constexpr = CHUNK // FOLDS
    places = tl.arange(0, PIECES * width)
    pieces = places // width * CHUNK
    highest = tl.full((opt.block_q, PIECES * width), -INFINITY, tl.float32)
    for fold in tl.static_range(FOLDS):
        tiles = places % width + fold * width
        pointers = maxima + (pieces + tiles)[None, :] * opt.block_q
        pointers += tl.arange(0, opt.block_q)[:, None]
        more = tl.load(pointers, mask=(tiles < count)[None, :], other=-INFINITY)
        highest = tl.maximum(highest, more)
    return highest


@triton.jit
def filter_candidates(candidates, maxima, top, t, count, is_first, origin, terms,
                      opt: tl.constexpr, CHUNK: tl.constexpr):  # fmt: skip
    """``sum p`` and ``sum u`` of the maxima of ``count`` candidates, and how many are left: tiles
    without a maximum above some row's ``t`` are dropped, and the others move up, in order. Where
    ``is_first`` the candidates are the tiles from ``origin`` on.

    Bounds only rise, so that no later pass misses what was dropped.
    """
    mass = tl.full((opt.block_q,), 0.0, tl.float32)
    slope = tl.full((opt.block_q,), 0.0, tl.float32)
    left = 0
    for chunk in range(0, count, CHUNK):
        places = chunk + tl.arange(0, CHUNK)
        old = tl.load(candidates + places, mask=(places < count) & (is_first == 0), other=0)
        numbers = tl.where(is_first, origin + places, old)
        highest = load_maxima(maxima, chunk, count, opt, CHUNK)
        x = terms.c * (highest - top[:, None]) - t[:, None]
        p, u = weights(x, terms.r, opt)
        mass += tl.sum(p, 1)
        slope += tl.sum(u, 1)
        alive = tl.max(score.is_inside(x, terms.r, opt).to(tl.int32), 0)
        goal = left + tl.cumsum(alive, 0) - alive
        moves = (alive > 0) & (goal < places)
        pointers = maxima + goal[None, :] * opt.block_q + tl.arange(0, opt.block_q)[:, None]
        tl.debug_barrier()  # the chunk is read
        tl.store(pointers, highest, mask=moves[None, :])
        tl.store(candidates + goal, numbers, mask=moves | ((alive > 0) & is_first))
        left += tl.sum(alive, 0)
    tl.debug_barrier()  # what moved is read back by other threads
    return mass, slope, left


@triton.jit
def lowest(pending, r, opt: tl.constexpr):
    """``t`` of ``tau = max z - 1``, which the threshold is not below; infinite for other rows."""
    if opt.alphas:
        return tl.where(pending, score.lift_of(r, opt) - 1.0, INFINITY)
    else:
        return tl.where(pending, 0.0 if opt.shallow else -1.0, INFINITY)


@triton.jit
def raised(t, mass, slope, top, terms, opt: tl.constexpr):
    """A bound after a certain rise on some of a row's scores, and its sink."""
    if opt.sinks:
        mass, slope, _ = with_sink(mass, slope, top, t, terms, opt)
    return t + tl.where(mass > 1.0, certain_rise(mass, slope, terms.r, opt), 0.0)


@triton.jit
def bound_few(highest, top, t, terms, opt: tl.constexpr):
    """:func:`bound_of` by ``c (s - top)`` of maxima that are at hand, from ``t`` on; and where
    Newton's steps start, which may be above the threshold."""
    slope = tl.full(t.shape, 1.0, tl.float32)
    for _ in range(BOUND_STEPS):  # unrolled, it would take too many registers
        p, u = weights(highest - t[:, None], terms.r, opt)
        mass, slope = pair_sums(p, u)
        t = raised(t, mass, slope, top, terms, opt)
    start = t
    if opt.guesses:  # not beyond zero, where flat rows have it
        start = tl.minimum(t + GAP * tl.maximum(slope - 1.0, 0.0), 0.5 * t)
    return t - slack(terms.r), start


@triton.jit
def bound_of(candidates, maxima, top, pending, origin, tiles, terms, opt: tl.constexpr,
             CHUNK: tl.constexpr):  # fmt: skip
    """A lower bound of ``t`` and how many candidates are left: certain rises on the tiles' maxima,
    from ``tau >= max z - 1``."""
    t = lowest(pending, terms.r, opt)
    left = tiles
    for step in range(BOUND_STEPS):
        mass, slope, left = filter_candidates(
            candidates, maxima, top, t, left, step == 0, origin, terms, opt, CHUNK
        )
        t = raised(t, mass, slope, top, terms, opt)
    return t - slack(terms.r), left


@triton.jit
def list_alive(lists, live, numbers, alive, exist, open_ones, found_open, found,
               opt: tl.constexpr, EDGE: tl.constexpr):  # fmt: skip
    """Add the tiles that are ``alive`` to a list, and write flags of those that ``exist``; return
    how many are listed then, of those that need no mask and of all.

    The ``open_ones``, from a first one up to an end, need none. Where they need not begin with the
    first of all, they are listed before the others, in a pass of their own.
    """
    first_open, open_end = open_ones
    tl.store(live + numbers, alive.to(tl.int8), mask=exist)
    if opt.lower:
        is_open = (numbers >= first_open) & (numbers < open_end)
        alive = tl.where(is_open == (EDGE == 0), alive, 0)
    tl.store(lists + found + tl.cumsum(alive, 0) - alive, numbers, mask=alive > 0)
    if EDGE == 0:
        found_open += tl.sum(tl.where(numbers < open_end, alive, 0), 0)
    found += tl.sum(alive, 0)
    return found_open, found


@triton.jit
def list_live(lists, live, candidates, maxima, top, t, open_ones, count, terms,
              opt: tl.constexpr, CHUNK: tl.constexpr):  # fmt: skip
    """Write the numbers of the candidates with a maximum above some row's bound, and flags of all;
    return how many are listed, of those that need no mask and of all."""
    found_open = 0
    found = 0
    for edge in tl.static_range(2 if opt.lower else 1):
        for chunk in range(0, count, CHUNK):
            places = chunk + tl.arange(0, CHUNK)
            numbers = tl.load(candidates + places, mask=places < count, other=0)
            highest = load_maxima(maxima, chunk, count, opt, CHUNK)
            x = terms.c * (highest - top[:, None]) - t[:, None]
            alive = tl.max(score.is_inside(x, terms.r, opt).to(tl.int32), 0)
            found_open, found = list_alive(lists, live, numbers, alive, places < count, open_ones,
                                           found_open, found, opt, edge)  # fmt: skip
    return found_open, found


@triton.jit
def list_few(lists, live, first, maxima, top, t, open_ones, count, terms, opt: tl.constexpr,
             CHUNK: tl.constexpr):  # fmt: skip
    """:func:`list_live` of ``count`` tiles from ``first`` on, which are no more than CHUNK."""
    first_open, open_end = open_ones
    places = tl.arange(0, CHUNK)
    numbers = first + places
    highest = load_maxima(maxima, 0, count, opt, CHUNK)
    for piece in tl.static_range(1, PIECES):
        more = load_maxima(maxima + piece * CHUNK * opt.block_q, 0, count, opt, CHUNK)
        highest = tl.maximum(highest, more)
    x = tl.max(terms.c * (highest - top[:, None]) - t[:, None], 0)
    alive = score.is_inside(x, terms.r, opt) & (places < count)
    tl.store(live + numbers, alive.to(tl.int8), mask=places < count)
    # Both kinds are counted at once, in the halves of a word.
    is_open = (numbers >= first_open) & (numbers < open_end)
    ones = tl.where(alive, tl.where(is_open, 1, 1 << 16), 0)
    before = tl.cumsum(ones, 0) - ones
    total = tl.sum(ones, 0)
    found_open = total & 0xFFFF
    goal = tl.where(is_open, before & 0xFFFF, found_open + (before >> 16))
    tl.store(lists + goal, numbers, mask=alive)
    return found_open, found_open + (total >> 16)


@triton.jit
def sum_tiles(sums, at_rows, keys, entries, terms, shape, opt: tl.constexpr,
              STAGES: tl.constexpr, EDGE: tl.constexpr):  # fmt: skip
    """:func:`with_parts` for the entries that need no mask, or the others where EDGE."""
    numbers, start, stop = work.portion(entries, EDGE)
    number = work.entry_of(numbers, start, stop)
    for index in tl.range(start, stop, num_stages=STAGES):
        first = number * opt.block_k
        number = work.entry_of(numbers, index + 1, stop)
        k = work.load_keys(keys, first, shape, opt.block_k, opt.head_dim, opt.padded,
                           work.is_cut(EDGE, opt), opt)  # fmt: skip
        x, _, _ = score.distances(
            at_rows, k, first, terms, shape, opt, work.is_edge(index, entries, EDGE)
        )
        sums = with_parts(sums, x, terms.r, opt)
    return sums


@triton.jit
def open_between(first_row, begin, end, open_end, terms, shape, opt: tl.constexpr):
    """The tiles that need no mask of those from ``begin`` to ``end``, from a first one up to an
    end, where ``open_end`` is that of all."""
    first_open = tl.maximum(score.open_begin(first_row, terms, shape, opt), begin)
    first_open = tl.minimum(first_open, end)
    return first_open, tl.maximum(tl.minimum(open_end, end), first_open)


@triton.jit
def kinds_of(top, inside, terms, opt: tl.constexpr):
    """The highest score of each row from that of its keys, zero where it has no threshold; which
    rows are poisoned by what is not finite; and which have one."""
    if opt.sinks:
        top = arithmetic.larger(top, terms.sink)
    if opt.alphas:
        top = tl.where(terms.c == terms.c, top, float("nan"))
    poisoned = ((top != top) | (top == INFINITY)) & inside
    pending = inside & (poisoned == 0) & (top > -INFINITY)
    return tl.where(pending, top, 0.0), poisoned, pending


@triton.jit
def store_thresholds(top_out, t_out, tau_out, top, t, poisoned, at_row, inside, terms,
                     opt: tl.constexpr):  # fmt: skip
    """Store what thresholds are made of, and return ``t`` and ``tau`` as they are stored."""
    t = tl.where(poisoned, float("nan"), t)
    tl.store(top_out + at_row, top, mask=inside)
    tl.store(t_out + at_row, t, mask=inside)
    if opt.alphas:
        tau = terms.c * top + (t - score.lift_of(terms.r, opt))
    else:
        tau = terms.c * top + (t - 1.0 if opt.shallow else t)
    tl.store(tau_out + at_row, tau, mask=inside)
    return t, tau


@triton.jit
def mark_poisoned(poison, poisoned, first_row, seen, batch, kv_head, terms, shape,
                  opt: tl.constexpr):  # fmt: skip
    """A poisoned row poisons every key that it may see; ``seen``: the tiles that some row of the
    block may, from a first one up to an end."""
    if opt.scattered:
        kv_row = work.key_head_number(batch, kv_head, shape)
        if arithmetic.any_of(poisoned):
            for tile in range(seen[0], seen[1]):
                tl.atomic_max(work.by_tiles(poison, kv_row, shape, opt) + tile, 1)
    else:
        leading = score.leading_seen(first_row + tl.arange(0, opt.block_q), terms, shape, opt)
        kv_row = work.key_head_number(batch, kv_head, shape)
        # Row by row, of which hardly ever one does: to find the most of all takes all warps.
        tl.atomic_max(poison + kv_row + leading * 0, leading, mask=poisoned & (leading > 0))


@triton.jit
def solve(query, key, maxima, candidates, top_out, t_out, tau_out, live, lists, counts, poison,
          taken, iterations, shape, work_items, tolerance, opt: tl.constexpr, CHUNK: tl.constexpr,
          MAX_STEPS: tl.constexpr, SPAN: tl.constexpr, STAGES: tl.constexpr, FEW: tl.constexpr,
          FOLDS: tl.constexpr, REUSES: tl.constexpr, COUNT: tl.constexpr):  # fmt: skip
    """Thresholds of all rows, and per row block the list of the tiles that hold support.

    One dense pass keeps the maxima of rows and tiles. The threshold of a subset of a row's scores
    is a lower bound of the row's, so the maxima bound it; tiles without a key above some row's
    bound are dead. Newton's steps follow, over live tiles; after each the tiles are listed anew,
    for the rows that are not done.

    Programs take row blocks as they get done, by the count ``taken``: a causal block may see many
    times the keys of another. ``maxima`` and ``candidates`` have one slice a program, reused by its
    row blocks. ``live`` and ``taken`` come as zeros.

    Where FEW, no row block sees more than CHUNK tiles, all about as many: their maxima stay in
    registers, and a program's row blocks are known before it starts.

    Where ``opt.rough`` the last step is left to ``output``, but where its steps are counted.
    """
    roughly: tl.constexpr = opt.rough and not COUNT
    if FEW:
        maxima += tl.program_id(0).to(tl.int64) * PIECES * CHUNK * opt.block_q
        item = tl.program_id(0)
    else:
        each = tl.cdiv(work.tiles_of(shape, opt), SPAN).to(tl.int64) * SPAN * opt.block_q
        maxima += tl.program_id(0).to(tl.int64) * each
        candidates = work.by_tiles(candidates, tl.program_id(0), shape, opt)
        item = tl.atomic_add(taken, 1)
    while item < work_items:
        at_block, at_head, first_row, at_row, inside = work.row_block_at(item, shape, opt)
        batch, head, kv_head = at_head
        q = work.load_tile(work.head_of(query, batch, head), first_row, shape.length_q, opt.block_q,
                           opt.head_dim, opt.padded, True)  # fmt: skip
        q = score.folded_scale(q, shape, opt)
        keys = work.keys_of(key, batch, kv_head, shape, opt)
        terms = score.terms_of(batch, head, shape, opt)
        open_end = score.open_tiles(first_row, shape.length_k, terms, shape, opt)
        end = score.seen_tiles(first_row, terms, shape, opt)
        zeros = tl.full((opt.block_q,), 0.0, tl.float32)
        parts = no_parts(opt)
        tops = tl.full((opt.block_q, PIECES), -INFINITY, tl.float32) if FEW else zeros - INFINITY
        scanned = tops, parts[0], parts[1]
        seen = 0, end
        first_open = 0
        origin = 0
        if opt.lower or opt.local:
            begin = tl.minimum(score.seen_begin(first_row, terms, shape, opt), end)
            seen = begin, end
            if opt.local:
                kv_row = work.key_head_number(batch, kv_head, shape)
                begin, end = score.near_tiles(q, first_row, begin, end, kv_row, terms, shape, opt)
            first_open, open_end = open_between(first_row, begin, end, open_end, terms, shape, opt)
            # A program's maxima begin with those of the first span that some row sees.
            first_span = begin // SPAN
            origin = first_span * SPAN
            whole = tl.cdiv(first_open, SPAN)
            last = tl.cdiv(end, SPAN)
            maxima_at = maxima - origin * opt.block_q
            open_spans = (whole, open_end // SPAN)
            if opt.joined:
                scanned = scan_tiles(scanned, maxima_at, q, keys, first_row, first_span, last,
                                     open_spans, terms, shape, opt, SPAN, STAGES, 2, FEW,
                                     CHUNK)  # fmt: skip
            else:
                whole = tl.minimum(whole, last)
                stop = tl.maximum(open_spans[1], whole)
                scanned = scan_tiles(scanned, maxima_at, q, keys, first_row, first_span, whole,
                                     open_spans, terms, shape, opt, SPAN, STAGES, 1, FEW,
                                     CHUNK)  # fmt: skip
                scanned = scan_tiles(scanned, maxima_at, q, keys, first_row, whole, stop,
                                     open_spans, terms, shape, opt, SPAN, STAGES, 0, FEW,
                                     CHUNK)  # fmt: skip
                scanned = scan_tiles(scanned, maxima_at, q, keys, first_row, stop, last,
                                     open_spans, terms, shape, opt, SPAN, STAGES, 1, FEW,
                                     CHUNK)  # fmt: skip
        else:
            whole = open_end // SPAN
            last = tl.cdiv(end, SPAN)
            scanned = scan_tiles(scanned, maxima, q, keys, first_row, 0, whole, (0, whole), terms,
                                 shape, opt, SPAN, STAGES, 0, FEW, CHUNK)  # fmt: skip
            scanned = scan_tiles(scanned, maxima, q, keys, first_row, whole, last, (0, whole),
                                 terms, shape, opt, SPAN, STAGES, 1, FEW, CHUNK)  # fmt: skip
        tl.debug_barrier()  # the maxima are read back by other threads

        numbers = work.by_tiles(lists, at_block, shape, opt)
        flags = work.by_tiles(live, at_block, shape, opt)
        open_ones = (first_open, open_end)
        tops = arithmetic.largest(scanned[0], 1) if FEW else scanned[0]
        top, poisoned, pending = kinds_of(tops, inside, terms, opt)
        if FEW:
            left = end - origin
            tops = arithmetic.handed_on(top)
            pieces = load_pieces(maxima, left, opt, CHUNK, FOLDS)
            pieces = terms.c * (pieces - tops[:, None])
            t = arithmetic.handed_on(lowest(pending, terms.r, opt))
            bound, start = bound_few(pieces, tops, t, terms, opt)
            found_open, found = list_few(numbers, flags, origin, maxima, tops, bound, open_ones,
                                         left, terms, opt, CHUNK)  # fmt: skip
            lo = arithmetic.handed_on(bound)
            start = arithmetic.handed_on(start)
        else:
            lo, left = bound_of(
                candidates, maxima, top, pending, origin, end - origin, terms, opt, CHUNK
            )
            found_open, found = list_live(
                numbers, flags, candidates, maxima, top, lo, open_ones, left, terms, opt, CHUNK
            )
            start = lo
        t = start
        if opt.guesses:
            rows = first_row + tl.arange(0, opt.block_q)
            keys_seen = score.count_seen(rows, terms, shape, opt)
            total, squares = pair_sums(scanned[1], scanned[2])
            mean, deviation = mean_and_deviation(total, squares, keys_seen)
            guess = guess_of(mean, deviation, keys_seen, top, lo, terms)
            t = tl.where(guess > lo, guess, start)
        hi = tl.where(pending, HIGHEST, INFINITY)
        most = zeros + (shape.length_k + 1)  # with the sink
        steps = tl.full((opt.block_q,), 0, tl.int32)
        step = 0
        waiting = arithmetic.any_of(pending)
        while waiting:
            tl.debug_barrier()  # the list is written
            threshold = t
            if not opt.relative:
                threshold = terms.c * top + t
            at_rows = (q, top, threshold, first_row)
            entries = (numbers, found_open, found)
            sums = no_parts(opt)
            for edge in tl.static_range(2 if opt.joined else 0, 3 if opt.joined else 2):
                sums = sum_tiles(sums, at_rows, keys, entries, terms, shape, opt, STAGES, edge)
            state = t, lo, hi, most, pending, steps
            t, lo, hi, most, pending, steps = advanced(state, row_sums(sums), top, threshold, step,
                                                       terms, tolerance, opt,
                                                       roughly)  # fmt: skip
            step += 1
            waiting = arithmetic.any_of(pending) & (step < MAX_STEPS)
            # The first list holds little more than the last one: where tiles are few, it serves the
            # second step too.
            if (not FEW) or (step > REUSES) or (waiting == 0):
                # The next step may fall back to `lo`, `output` where it goes on.
                bound = (lo if roughly else tl.where(waiting, lo, t)) - slack(terms.r)
                bound = tl.where(pending | (waiting == 0), bound, INFINITY)
                bound = arithmetic.handed_on(bound)
                tl.debug_barrier()  # the list is read
                if FEW:
                    found_open, found = list_few(
                        numbers, flags, origin, maxima, arithmetic.handed_on(top), bound, open_ones,
                        left, terms, opt, CHUNK,
                    )  # fmt: skip
                else:
                    found_open, found = list_live(
                        numbers, flags, candidates, maxima, top, bound, open_ones, left, terms,
                        opt, CHUNK,
                    )  # fmt: skip
        tl.store(counts + 2 * at_block, found_open)
        tl.store(counts + 2 * at_block + 1, found)
        store_thresholds(top_out, t_out, tau_out, top, t, poisoned, at_row, inside, terms, opt)
        if COUNT:
            tl.store(iterations + at_row, steps, mask=inside)

        mark_poisoned(poison, poisoned, first_row, seen, batch, kv_head, terms, shape, opt)
        tl.debug_barrier()  # the maxima are free for the next block
        item = item + tl.num_programs(0) if FEW else tl.atomic_add(taken, 1)
