"""Backward: gradients over the lists of live tiles, without atomics.

With ``dp = dO v`` and ``delta = dO . out_u`` it is ``ds = u (dp - delta)``, ``dQ = scale ds K``,
``dK = scale ds^T Q`` and ``dV = p^T dO``. Like ``output``, both gradient kernels are launched
twice: what is not finite is marked ``unsafe`` and done again where SAFE, with zeros off the
support whatever queries, keys, values and output gradients hold there.
"""

from __future__ import annotations

import triton
import triton.language as tl

from adasplash2.backends.triton.kernels import arithmetic, score, threshold, work
from adasplash2.backends.triton.kernels.arithmetic import PROB_SCALE


@triton.jit
def load_spread(spread, at_row, inside, opt: tl.constexpr):
    """0 for rows in which one key has all of the probability; 1 for others."""
    if opt.exact:
        return tl.load(spread + at_row, mask=inside, other=0.0)
    else:
        return tl.full(at_row.shape, 1.0, tl.float32)


@triton.jit
def distance_to_delta(u, dp, delta, spread, opt: tl.constexpr):
    """``dp - delta``. For a key that has all of its row's probability it would be nothing but
    rounding, and is zero; what is not finite stays NaN."""
    distance = dp - delta
    if opt.exact:
        distance = tl.where((spread == 0.0) & (u > 0.5), 0.0 * distance, distance)
    return distance


@triton.jit
def score_gradient(x, u, dp, delta, spread, r, opt: tl.constexpr, SAFE: tl.constexpr):
    """``ds``, see :func:`score.on_support`."""
    return score.on_support(u * distance_to_delta(u, dp, delta, spread, opt), x, r, opt, SAFE)


@triton.jit
def add_row_sums(parts, x, p, u, to_delta, ds, ds_product, product, rows, keys, terms,
                 shape, opt: tl.constexpr, WANTED: tl.constexpr, SAFE: tl.constexpr):  # fmt: skip
    """Add the sums over a tile that gradients of operands are made of."""
    of_slope, of_scale, of_alpha, slope = parts
    if WANTED.alibi_slopes:
        far = score.on_support(
            ds * score.key_distance(rows, keys, terms, shape, opt), x, terms.r, opt, SAFE
        )
        of_slope -= tl.sum(far, 1)
    if WANTED.scales:
        of_scale += tl.sum(score.on_support(ds_product * product, x, terms.r, opt, SAFE), 1)
    if WANTED.alphas:
        log, phi = threshold.alpha_terms(x, p, u, terms.r, opt)
        d = score.on_support(to_delta, x, terms.r, opt, True)
        slope += tl.sum(u, 1)
        of_alpha = (
            of_alpha[0] + tl.sum(p * d, 1),
            of_alpha[1] + tl.sum(log * d, 1),
            of_alpha[2] + tl.sum(phi * d, 1),
            of_alpha[3] + tl.sum(log, 1),
            of_alpha[4] + tl.sum(phi, 1),
        )
    return of_slope, of_scale, of_alpha, slope


@triton.jit
def tile_gradient(at_rows, grad, delta, spread, k, v, first_key, terms, shape, opt: tl.constexpr,
                  SAFE: tl.constexpr, EDGE):  # fmt: skip
    """``ds`` of a row block and a key tile, last, and what it is made of."""
    x, s, product = score.distances(at_rows, k, first_key, terms, shape, opt, EDGE)
    p, u = threshold.weights(x, terms.r, opt)
    dp = arithmetic.matmul(grad, tl.trans(v))
    if opt.dropout:
        rows, keys = score.numbers_of(at_rows[3], first_key, opt, opt.block_q)
        dp = score.through_dropout(dp, score.is_kept(rows, keys, terms, shape), shape)
    ds = score_gradient(x, u, dp, delta[:, None], spread[:, None], terms.r, opt, SAFE)
    return x, p, u, s, product, dp, ds


@triton.jit
def grad_query_tiles(acc, parts, at_rows, grad, delta, spread, keys, values, entries, terms,
                     shape, opt: tl.constexpr, WANTED: tl.constexpr, SAFE: tl.constexpr,
                     STAGES: tl.constexpr, EDGE: tl.constexpr):  # fmt: skip
    """Add ``ds K``, and the sums of :func:`add_row_sums`, over the entries that need no mask, or
    the others where EDGE."""
    numbers, start, stop = work.portion(entries, EDGE)
    number = work.first_entry(numbers, start, stop, EDGE)
    for index in tl.range(start, stop, num_stages=STAGES):
        first, k, v = work.load_pair(number, keys, values, shape, opt, work.is_cut(EDGE, opt))
        number = work.entry_of(numbers, index + 1, stop)
        x, p, u, s, product, dp, ds = tile_gradient(at_rows, grad, delta, spread, k, v, first,
                                                    terms, shape, opt, SAFE,
                                                    work.is_edge(index, entries, EDGE))  # fmt: skip
        ds_product = score.product_gradient(ds, s, x, terms.r, shape, opt, SAFE)
        if WANTED.some:
            rows, columns = score.numbers_of(at_rows[3], first, opt, opt.block_q)
            to_delta = distance_to_delta(u, dp, delta[:, None], spread[:, None], opt)
            parts = add_row_sums(parts, x, p, u, to_delta, ds, ds_product, product, rows, columns,
                                 terms, shape, opt, WANTED, SAFE)  # fmt: skip
        acc += arithmetic.gradient_product(ds_product, arithmetic.finite_part(k, SAFE), opt, SAFE)
    return acc, parts


@triton.jit
def store_row_gradients(parts, grads, top, t, delta, at_row, inside, right, terms,
                        opt: tl.constexpr, WANTED: tl.constexpr):  # fmt: skip
    """Store each row's part of the gradients of operands, and return a number for each row that is
    finite where these are."""
    of_slope, of_scale, of_alpha, slope = parts
    bad = (t != t) | (right == 0)
    total = tl.full(t.shape, 0.0, tl.float32)
    if opt.sinks and (WANTED.sinks or WANTED.alphas):
        # Its `dp` is zero.
        x = score.distance(terms.sink, top, t, terms.c, opt)
        p, u = threshold.weights(x, terms.r, opt)
    if WANTED.alibi_slopes:
        of_slope = tl.where(bad, float("nan"), of_slope)
        tl.store(grads.alibi_slopes + at_row, of_slope, mask=inside)
        total += of_slope
    if WANTED.sinks:
        of_sink = tl.where(bad, float("nan"), -u * delta)
        tl.store(grads.sinks + at_row, of_sink, mask=inside)
        total += of_sink
    if WANTED.scales:
        of_scale = tl.where(bad, float("nan"), of_scale)
        tl.store(grads.scales + at_row, of_scale, mask=inside)
        total += of_scale
    if WANTED.alphas:
        if opt.sinks:
            log, phi = threshold.alpha_terms(x, p, u, terms.r, opt)
            slope += u
            of_alpha = (
                of_alpha[0] - p * delta,
                of_alpha[1] - log * delta,
                of_alpha[2] - phi * delta,
                of_alpha[3] + log,
                of_alpha[4] + phi,
            )
        result = tl.where(bad, float("nan"), threshold.alpha_gradient(of_alpha, slope, terms.r))
        tl.store(grads.alphas + at_row, result, mask=inside)
        total += result
    return total


@triton.jit
def grad_query_of(number, query, key, value, grad_out, out_u, spread_in, top_in, t_in, lists,
                  counts, grad_q, delta_out, row_grads, unsafe, some, shape, scale,
                  opt: tl.constexpr, CHUNK: tl.constexpr, FEW: tl.constexpr, WANTED: tl.constexpr,
                  STAGES: tl.constexpr, SAFE: tl.constexpr):  # fmt: skip
    """:func:`grad_query` of the row block that is ``number`` in launch order."""
    at_block, at_head, first_row, at_row, inside = work.row_block_at(number, shape, opt)
    batch, head, kv_head = at_head
    length = shape.length_q
    terms = score.terms_of(batch, head, shape, opt)
    queries = work.head_of(query, batch, head)
    q = work.load_tile(queries, first_row, length, opt.block_q, opt.head_dim, opt.padded, True)
    q = score.folded_scale(q, shape, opt)
    grads = work.head_of(grad_out, batch, head)
    grad = work.load_tile(grads, first_row, length, opt.block_q, opt.head_dim_v, opt.padded_v, True)
    means = work.head_of(out_u, batch, head)
    mean = work.load_tile(means, first_row, length, opt.block_q, opt.head_dim_v, opt.padded_v, True)
    if opt.shares:
        most = tl.load(spread_in + at_row, mask=inside, other=0.0)
        mean = arithmetic.rows_of(mean, most, value.base.dtype.element_ty)
        mean = score.with_kept_factor(mean, shape, opt)
    spread = load_spread(spread_in, at_row, inside, opt)
    delta = tl.sum(grad.to(tl.float32) * mean, 1)
    if opt.sinks:  # where a sink has all of the probability no gradient is felt, NaN neither
        delta = tl.where(tl.max(tl.abs(mean), 1) == 0.0, 0.0, delta)
    keys = work.head_of(key, batch, kv_head)
    values = work.head_of(value, batch, kv_head)
    entries, right = work.checked(
        work.entries_at(lists, counts, at_block, work.tiles_of(shape, opt)), shape, opt, CHUNK, FEW
    )
    top, t = work.load_thresholds(top_in, t_in, at_row, inside, opt)
    at_rows = (q, top, t, first_row)
    acc = tl.full((opt.block_q, opt.padded), 0.0, tl.float32)
    zeros = tl.full((opt.block_q,), 0.0, tl.float32)
    parts = zeros, zeros, (zeros, zeros, zeros, zeros, zeros), zeros
    for edge in tl.static_range(2 if opt.joined else 0, 3 if opt.joined else 2):
        acc, parts = grad_query_tiles(
            acc, parts, at_rows, grad, delta, spread, keys, values, entries, terms, shape, opt,
            WANTED, SAFE, STAGES, edge,
        )  # fmt: skip
    rows = (first_row + tl.arange(0, opt.block_q))[:, None]
    result = score.through_scale(score.with_row_scales(acc, rows, terms, shape, opt), scale)
    result = tl.where((t != t)[:, None] | (right == 0), float("nan"), result)
    work.store_tile(
        work.head_of(grad_q, batch, head),
        first_row,
        length,
        result,
        opt.block_q,
        opt.head_dim,
        opt.padded,
    )
    tl.store(delta_out + at_row, delta, mask=inside)
    checksum = result
    if WANTED.some:
        checksum += store_row_gradients(parts, row_grads, top, t, delta, at_row, inside, right,
                                        terms, opt, WANTED)[:, None]  # fmt: skip
    if not SAFE:
        work.mark_rows(unsafe + at_row, some, checksum, inside)


@triton.jit
def grad_query(query, key, value, grad_out, out_u, spread_in, top_in, t_in, lists, counts, grad_q,
               delta_out, row_grads, unsafe, some, shape, scale, work_items, opt: tl.constexpr,
               CHUNK: tl.constexpr, FEW: tl.constexpr, WANTED: tl.constexpr, STAGES: tl.constexpr,
               SAFE: tl.constexpr):  # fmt: skip
    """``delta`` and ``dQ`` of a row block, and each row's part of the gradients of operands. Where
    FEW, its list has no more than CHUNK entries."""
    if SAFE:
        number, waiting = work.first_again(some, work_items)
        while waiting:
            if work.is_block_marked(number, unsafe, shape, opt):
                grad_query_of(number, query, key, value, grad_out, out_u, spread_in, top_in,
                              t_in, lists, counts, grad_q, delta_out, row_grads, unsafe, some,
                              shape, scale, opt, CHUNK, FEW, WANTED, STAGES, SAFE)  # fmt: skip
            number, waiting = work.next_again(number, work_items)
    else:
        grad_query_of(tl.program_id(0), query, key, value, grad_out, out_u, spread_in, top_in, t_in,
                      lists, counts, grad_q, delta_out, row_grads, unsafe, some, shape, scale, opt,
                      CHUNK, FEW, WANTED, STAGES, SAFE)  # fmt: skip


@triton.jit
def transpose_lists(
    live, row_block_lists, row_block_counts, shape, opt: tl.constexpr, CHUNK: tl.constexpr
):
    """Per key tile, the row blocks of its ``gqa_group`` of heads for which it is live, as
    ``member * row_blocks + row_block``: first those that see all of it, then those that need the
    mask.

    Where a window ends on both sides only row blocks are looked at that see the tile.
    """
    tiles = work.tiles_of(shape, opt)
    row_blocks = work.row_blocks_of(shape, opt)
    capacity = work.group_blocks(shape, opt)
    number = tl.program_id(0)
    tile = number % tiles
    begin = 0
    count = row_blocks
    if opt.joined:
        begin, end = score.seeing_rows(tile * opt.block_k, shape, opt)
        begin = begin // opt.block_q
        count = tl.cdiv(end, opt.block_q) - begin
    kv_row, batch, kv_head = work.key_head_at(number // tiles, shape)
    # What is seen is the same for all heads of a sequence.
    terms = score.terms_of(batch, work.first_head(kv_head, shape), shape, opt)
    # Query heads of one key head are neighbours, also across the batch.
    first_block = kv_row.to(tl.int64) * capacity
    numbers = row_block_lists + number.to(tl.int64) * capacity
    found = 0
    for edge in tl.static_range(2):
        for chunk in range(0, shape.gqa_group * count, CHUNK):
            entry = chunk + tl.arange(0, CHUNK)
            exists = entry < shape.gqa_group * count
            if opt.joined:
                entry = entry // count * row_blocks + begin + entry % count
            flags = work.by_tiles(live, first_block + entry, shape, opt)
            alive = tl.load(flags + tile, mask=exists, other=0)
            # The end of the keys needs no mask: what lies beyond it is not stored.
            first_row = entry % row_blocks * opt.block_q
            whole = score.is_open(tile, first_row, tiles * opt.block_k, terms, shape, opt)
            chosen = ((alive != 0) & (whole == (edge == 0))).to(tl.int32)
            tl.store(numbers + found + tl.cumsum(chosen, 0) - chosen, entry, mask=chosen > 0)
            found += tl.sum(chosen, 0)
        tl.store(row_block_counts + 2 * number + edge, found)


@triton.jit
def of_rows(vector, BY_KEY: tl.constexpr):
    """A vector of rows against the keys, as in :func:`score.numbers_of`."""
    if BY_KEY:
        return vector[None, :]
    else:
        return vector[:, None]


@triton.jit
def by_keys(tile, BY_KEY: tl.constexpr):
    """A tile whose keys run along the first axis, as they do already where BY_KEY."""
    if BY_KEY:
        return tile
    else:
        return tl.trans(tile)


@triton.jit
def grad_key_tiles(sums, k, v, first_key, queries, grads, thresholds, entries, at_head, shape,
                   opt: tl.constexpr, SCALE: tl.constexpr, ROW_PARTS: tl.constexpr,
                   SAFE: tl.constexpr, STAGES: tl.constexpr, EDGE: tl.constexpr):  # fmt: skip
    """Add ``ds^T Q`` and ``p^T dO`` over the entries that need no mask, or the others where EDGE.

    A row block is taken in ROW_PARTS: all of its rows do not fit the registers beside two sums.
    Tiles are made with keys along the first axis, as the sums want them, but for masks: those lie
    in memory by rows, and what threads would hand on of them is more than what they do of ``p`` and
    ``ds``.
    """
    by_key: tl.constexpr = not opt.masked
    acc_k, acc_v, bad = sums
    _, batch, kv_head = at_head
    q_base, q_member, q_row = queries
    g_base, g_member, g_row = grads
    top_in, t_in, delta_in, spread_in, first_head = thresholds
    numbers, start, stop = work.portion(entries, EDGE)
    part: tl.constexpr = opt.block_q // ROW_PARTS
    length = shape.length_q
    upcoming = work.first_entry(numbers, start, stop, EDGE)
    for index in tl.range(start * ROW_PARTS, stop * ROW_PARTS, num_stages=STAGES):
        entry = upcoming
        upcoming = work.entry_of(numbers, (index + 1) // ROW_PARTS, stop)
        head, row_block = work.member_and_block(entry, shape, opt)
        member = head.to(tl.int64)
        first_row = (row_block * ROW_PARTS + index % ROW_PARTS) * part
        q_head = (q_base + member * q_member, q_row)
        q = work.load_tile(q_head, first_row, length, part, opt.head_dim, opt.padded, not opt.even)
        g_head = (g_base + member * g_member, g_row)
        grad = work.load_tile(g_head, first_row, length, part, opt.head_dim_v, opt.padded_v,
                              not opt.even)  # fmt: skip
        at_row, inside = work.rows_at(first_head + member, first_row, length, part)
        if opt.even:
            inside = tl.full((part,), True, tl.int1)
        top, t = work.load_thresholds(top_in, t_in, at_row, inside, opt)
        delta = tl.load(delta_in + at_row, mask=inside, other=0.0)
        spread = load_spread(spread_in, at_row, inside, opt)
        terms = score.terms_of(batch, work.first_head(kv_head, shape) + head, shape, opt)
        # A rounding of the smallest `x` moves its `u`: where steep, to the bit as for `delta`.
        if by_key:
            product = (
                tl.trans(score.products(q, k, 0.0, opt))
                if opt.steep
                else score.products(k, q, 0.0, opt)
            )
            dp = arithmetic.matmul(v, tl.trans(grad))
        else:
            bias = score.folded_bias(first_row, first_key, terms, shape, opt, part)
            product = score.products(q, k, bias, opt)
            dp = arithmetic.matmul(grad, tl.trans(v))
        if opt.relative:
            top = of_rows(top, by_key)
        x, s = score.distances_of(product, top, of_rows(t, by_key), first_row, first_key, terms,
                                  shape, opt, part, by_key,
                                  work.is_edge(index // ROW_PARTS, entries, EDGE))  # fmt: skip
        p, u = threshold.weights(x, terms.r, opt)
        if opt.dropout or opt.scales:
            rows, keys = score.numbers_of(first_row, first_key, opt, part, by_key)
        if opt.dropout:
            kept = score.is_kept(rows, keys, terms, shape)
            p = tl.where(kept, p, 0.0)  # the factor of dropout last: float16 may not hold it
            dp = score.through_dropout(dp, kept, shape)
        acc_v += arithmetic.matmul(
            by_keys((p * SCALE).to(grad.dtype), by_key), arithmetic.finite_part(grad, SAFE)
        )
        ds = score_gradient(x, u, dp, of_rows(delta, by_key), of_rows(spread, by_key), terms.r, opt,
                            SAFE)  # fmt: skip
        ds = score.product_gradient(ds, s, x, terms.r, shape, opt, SAFE)
        if opt.scales:
            ds = score.with_row_scales(ds, rows, terms, shape, opt)
            ds = score.on_support(ds, x, terms.r, opt, SAFE)
        ds = by_keys(ds, by_key)
        acc_k += arithmetic.gradient_product(
            ds, arithmetic.finite_part(q, SAFE), opt, SAFE, opt.scales
        )
        if SAFE:
            reached = score.is_inside(x, terms.r, opt)
            if opt.dropout:
                reached = reached & kept
            bad = arithmetic.count_bad(bad, by_keys(reached, by_key), grad)
    return acc_k, acc_v, bad


@triton.jit(do_not_specialize=["key_tiles"])
def cut_lists(row_block_counts, cuts, owners, key_tiles, MOST: tl.constexpr,
              SHORTEST: tl.constexpr, TILES: tl.constexpr):  # fmt: skip
    """Cut long lists of key tiles into pieces, at most MOST in all.

    ``cuts``: per key tile, the pieces of the tiles before it; and of all. A list that stays whole
    has none. ``owners``: per piece, its tile; and at MOST the number of pieces.
    """
    total = 0
    for first in range(0, key_tiles, TILES):
        tiles = first + tl.arange(0, TILES)
        total += tl.sum(
            tl.load(row_block_counts + 2 * tiles + 1, mask=tiles < key_tiles, other=0), 0
        )
    # No piece is shorter, so that there are no more than MOST.
    length = tl.maximum(tl.cdiv(total, MOST), SHORTEST)
    found = 0
    for first in range(0, key_tiles, TILES):
        tiles = first + tl.arange(0, TILES)
        count = tl.load(row_block_counts + 2 * tiles + 1, mask=tiles < key_tiles, other=0)
        pieces = count // length
        pieces = tl.where(pieces > 1, pieces, 0)
        slots = found + tl.cumsum(pieces, 0) - pieces
        tl.store(cuts + tiles, slots, mask=tiles < key_tiles)
        for piece in range(0, tl.max(pieces, 0)):
            tl.store(owners + slots + piece, tiles, mask=piece < pieces)
        found += tl.sum(pieces, 0)
    tl.store(cuts + key_tiles, found)
    tl.store(owners + MOST, found)


@triton.jit
def work_of(program, cuts, owners, MOST: tl.constexpr):
    """``(tile, piece, pieces)`` of a program: the first MOST have a piece each, the others a list
    that is whole. A tile of -1: nothing to do."""
    cut = program < MOST
    owner = tl.load(owners + program, mask=program < tl.load(owners + MOST), other=-1)
    tile = tl.where(cut, owner, program - MOST)
    first = tl.load(cuts + tile, mask=tile >= 0, other=0)
    pieces = tl.load(cuts + tile + 1, mask=tile >= 0, other=0) - first
    nothing = (not cut) & (pieces > 0)
    return tl.where(nothing, -1, tile), tl.where(cut, program - first, 0), pieces


@triton.jit
def piece_of(entries, piece, pieces):
    """The entries of one of the pieces of a list."""
    numbers, open_end, end = entries
    first = piece * end // pieces
    count = (piece + 1) * end // pieces - first
    return numbers + first, tl.minimum(tl.maximum(open_end - first, 0), count), count


@triton.jit
def partial_sums(partials, slot, first_row, ROWS: tl.constexpr, opt: tl.constexpr):
    """Pointers to rows of the sums for keys and for values of the piece in a slot."""
    rows = (slot * opt.block_k + first_row + tl.arange(0, ROWS))[:, None]
    base = partials + rows * (opt.padded + opt.padded_v)
    of_keys = base + tl.arange(0, opt.padded)[None, :]
    return of_keys, base + opt.padded + tl.arange(0, opt.padded_v)[None, :]


@triton.jit
def poison_of(at_head, first_key, poison, shape, opt: tl.constexpr):
    """What the forward has marked of a key tile or, where poisoned rows see a head's leading keys,
    how many of these."""
    kv_row, _, _ = at_head
    if opt.scattered:
        poison = work.by_tiles(poison, kv_row, shape, opt) + first_key // opt.block_k
    else:
        poison += kv_row
    return tl.load(poison)


@triton.jit
def is_poisoned(at_head, first_key, t_in, tile_poison, shape, ROWS: tl.constexpr,
                opt: tl.constexpr):  # fmt: skip
    """Which of ROWS keys a poisoned row may see, where these are not a head's leading keys: by
    :func:`poison_of` their tile, and rows are looked at where they are."""
    kv_row, batch, kv_head = at_head
    found = tl.full((ROWS,), 0, tl.int32)
    if tile_poison != 0:
        keys = (first_key + tl.arange(0, ROWS))[:, None]
        for entry in range(0, work.group_blocks(shape, opt)):
            member, row_block = work.member_and_block(entry, shape, opt)
            first_row = row_block * opt.block_q
            head_row = work.first_head(kv_row, shape) + member
            at_row, inside = work.rows_at(head_row, first_row, shape.length_q, opt.block_q)
            t = tl.load(t_in + at_row, mask=inside, other=0.0)
            if arithmetic.any_of(t != t):
                terms = score.terms_of(batch, work.first_head(kv_head, shape) + member, shape, opt)
                rows = (first_row + tl.arange(0, opt.block_q))[None, :]
                sees = score.allowed(rows, keys, terms, shape, opt) & (t != t)[None, :]
                found = tl.maximum(found, tl.max(sees.to(tl.int32), 1))
    return found > 0


@triton.jit
def store_keys(acc_k, acc_v, bad, at_head, first_key, t_in, tile_poison, grad_k, grad_v, unsafe,
               some, shape, scale, ROWS: tl.constexpr, opt: tl.constexpr,
               SAFE: tl.constexpr):  # fmt: skip
    """Store ``dK`` and ``dV`` of ROWS keys from their sums, and mark what is not finite."""
    kv_row, batch, kv_head = at_head
    prob_scale: tl.constexpr = PROB_SCALE if grad_v.base.dtype.element_ty == tl.float16 else 1.0
    at_key, inside = work.rows_at(kv_row, first_key, shape.length_k, ROWS)
    length = shape.length_k
    if opt.scattered:
        poisoned = is_poisoned(at_head, first_key, t_in, tile_poison, shape, ROWS, opt)[:, None]
    else:
        poisoned = (first_key + tl.arange(0, ROWS) < tile_poison)[:, None]
    result_k = tl.where(poisoned, float("nan"), score.through_scale(acc_k, scale))
    result_v = tl.where(poisoned, float("nan"), acc_v * (1.0 / prob_scale))
    result_v = score.with_kept_factor(result_v, shape, opt)
    if SAFE:
        result_v = arithmetic.with_bad(result_v, bad)
    head = work.head_of(grad_k, batch, kv_head)
    work.store_tile(head, first_key, length, result_k, ROWS, opt.head_dim, opt.padded)
    head = work.head_of(grad_v, batch, kv_head)
    work.store_tile(head, first_key, length, result_v, ROWS, opt.head_dim_v, opt.padded_v)
    if not SAFE:
        # One mark for both: their sum may overflow where neither is infinite, which costs time
        # alone.
        work.mark_rows(unsafe + at_key, some, result_k + tl.sum(result_v, 1)[:, None], inside)


@triton.jit
def grad_key_value_of(number, piece, pieces, query, key, value, grad_out, top_in, t_in, delta_in,
                      spread_in, row_block_lists, row_block_counts, cuts, partials, poison,
                      grad_k, grad_v, unsafe, some, shape, scale, opt: tl.constexpr,
                      ROW_PARTS: tl.constexpr, MOST: tl.constexpr, STAGES: tl.constexpr,
                      SAFE: tl.constexpr):  # fmt: skip
    """:func:`grad_key_value` of one of the ``pieces`` of key tile ``number``; of none, of all."""
    at_head, first_key = work.tile_at(number, shape, opt)
    kv_row, batch, kv_head = at_head
    tile_poison = poison_of(at_head, first_key, poison, shape, opt)
    first_head = work.first_head(kv_head, shape)
    prob_scale: tl.constexpr = PROB_SCALE if value.base.dtype.element_ty == tl.float16 else 1.0
    length = shape.length_k
    keys = work.head_of(key, batch, kv_head)
    k = work.load_tile(keys, first_key, length, opt.block_k, opt.head_dim, opt.padded, True)
    k = score.folded_scale(k, shape, opt)
    values = work.head_of(value, batch, kv_head)
    v = work.load_tile(values, first_key, length, opt.block_k, opt.head_dim_v, opt.padded_v, True)
    capacity = work.group_blocks(shape, opt)
    entries = work.entries_at(row_block_lists, row_block_counts, number, capacity)
    if MOST and not SAFE:
        entries = piece_of(entries, piece, tl.maximum(pieces, 1))
    q_base, q_row = work.head_of(query, batch, first_head)
    g_base, g_row = work.head_of(grad_out, batch, first_head)
    thresholds = (top_in, t_in, delta_in, spread_in, work.first_head(kv_row, shape))
    none = tl.full((opt.block_k, opt.padded_v if SAFE else 1), 0.0, tl.float32)
    sums = (
        tl.full((opt.block_k, opt.padded), 0.0, tl.float32),
        tl.full((opt.block_k, opt.padded_v), 0.0, tl.float32),
        (none, none),
    )
    for edge in tl.static_range(2 if opt.joined else 0, 3 if opt.joined else 2):
        sums = grad_key_tiles(
            sums, k, v, first_key, (q_base, query.head, q_row), (g_base, grad_out.head, g_row),
            thresholds, entries, at_head, shape, opt, prob_scale, ROW_PARTS, SAFE, STAGES, edge,
        )  # fmt: skip
    acc_k, acc_v, bad = sums
    if pieces > 0:
        slot = tl.load(cuts + number) + piece
        of_keys, of_values = partial_sums(partials, slot, 0, opt.block_k, opt)
        tl.store(of_keys, acc_k)
        tl.store(of_values, acc_v)
    else:
        store_keys(acc_k, acc_v, bad, at_head, first_key, t_in, tile_poison, grad_k, grad_v,
                   unsafe, some, shape, scale, opt.block_k, opt, SAFE)  # fmt: skip


@triton.jit
def grad_key_value(query, key, value, grad_out, top_in, t_in, delta_in, spread_in,
                   row_block_lists, row_block_counts, cuts, owners, partials, poison, grad_k,
                   grad_v, unsafe, some, shape, scale, key_tiles, opt: tl.constexpr,
                   ROW_PARTS: tl.constexpr, MOST: tl.constexpr, STAGES: tl.constexpr,
                   SAFE: tl.constexpr):  # fmt: skip
    """``dK`` and ``dV`` of a key tile, or the sums of a piece of its list."""
    if SAFE:
        number, waiting = work.first_again(some, key_tiles)
        while waiting:
            at_head, first_key = work.tile_at(number, shape, opt)
            at_key, inside = work.rows_at(at_head[0], first_key, shape.length_k, opt.block_k)
            if work.is_marked(unsafe + at_key, inside):
                grad_key_value_of(number, 0, 0, query, key, value, grad_out, top_in, t_in,
                                  delta_in, spread_in, row_block_lists, row_block_counts, cuts,
                                  partials, poison, grad_k, grad_v, unsafe, some, shape, scale,
                                  opt, ROW_PARTS, MOST, STAGES, SAFE)  # fmt: skip
            number, waiting = work.next_again(number, key_tiles)
    else:
        number = tl.program_id(0)
        piece = 0
        pieces = 0
        if MOST:
            number, piece, pieces = work_of(number, cuts, owners, MOST)
            if number < 0:
                return
        else:
            number = work.tile_in_turn(number, shape, opt)
        grad_key_value_of(number, piece, pieces, query, key, value, grad_out, top_in, t_in,
                          delta_in, spread_in, row_block_lists, row_block_counts, cuts, partials,
                          poison, grad_k, grad_v, unsafe, some, shape, scale, opt, ROW_PARTS, MOST,
                          STAGES, SAFE)  # fmt: skip


@triton.jit
def add_pieces(cuts, owners, partials, t_in, poison, grad_k, grad_v, unsafe, some, shape, scale,
               opt: tl.constexpr, MOST: tl.constexpr, ROWS: tl.constexpr):  # fmt: skip
    """``dK`` and ``dV`` of ROWS keys of a tile whose list is cut, from its pieces in order."""
    parts: tl.constexpr = opt.block_k // ROWS
    slot = tl.program_id(0) // parts
    if slot >= tl.load(owners + MOST):
        return
    number = tl.load(owners + slot)
    if slot != tl.load(cuts + number):
        return
    first_row = tl.program_id(0) % parts * ROWS
    acc_k = tl.full((ROWS, opt.padded), 0.0, tl.float32)
    acc_v = tl.full((ROWS, opt.padded_v), 0.0, tl.float32)
    # Unrolled, so that several pieces are on the way.
    for piece in tl.range(slot, tl.load(cuts + number + 1), loop_unroll_factor=4):
        of_keys, of_values = partial_sums(partials, piece, first_row, ROWS, opt)
        acc_k += tl.load(of_keys)
        acc_v += tl.load(of_values)
    at_head, first_key = work.tile_at(number, shape, opt)
    tile_poison = poison_of(at_head, first_key, poison, shape, opt)
    store_keys(acc_k, acc_v, None, at_head, first_key + first_row, t_in, tile_poison, grad_k,
               grad_v, unsafe, some, shape, scale, ROWS, opt, False)  # fmt: skip


@triton.jit
def mask_piece(acc, row_block, tile, query, key, value, grad_out, thresholds, at_heads,
               shape, opt: tl.constexpr):  # fmt: skip
    """Add ``ds`` of one head's row block and key tile, with NaN where a poisoned row may see."""
    batch, head = at_heads
    kv_head = work.key_head_of(head, shape)
    top_in, t_in, delta_in, spread_in = thresholds
    terms = score.terms_of(batch, head, shape, opt)
    first_row = row_block * opt.block_q
    first = tile * opt.block_k
    length = shape.length_q
    q = work.load_tile(work.head_of(query, batch, head), first_row, length, opt.block_q,
                       opt.head_dim, opt.padded, True)  # fmt: skip
    q = score.folded_scale(q, shape, opt)
    grad = work.load_tile(work.head_of(grad_out, batch, head), first_row, length, opt.block_q,
                          opt.head_dim_v, opt.padded_v, True)  # fmt: skip
    keys = work.head_of(key, batch, kv_head)
    _, k, v = work.load_pair(tile, keys, work.head_of(value, batch, kv_head), shape, opt, True)
    head_row = work.head_number(batch, head, shape)
    at_row, inside = work.rows_at(head_row, first_row, length, opt.block_q)
    top, t = work.load_thresholds(top_in, t_in, at_row, inside, opt)
    delta = tl.load(delta_in + at_row, mask=inside, other=0.0)
    spread = load_spread(spread_in, at_row, inside, opt)
    _, _, _, _, _, _, ds = tile_gradient((q, top, t, first_row), grad, delta, spread, k, v, first,
                                         terms, shape, opt, True, True)  # fmt: skip
    rows, columns = score.numbers_of(first_row, first, opt, opt.block_q)
    sees = score.allowed(rows, columns, terms, shape, opt) & inside[:, None] & (t != t)[:, None]
    return acc + tl.where(sees, float("nan"), ds)


@triton.jit
def grad_mask(query, key, value, grad_out, top_in, t_in, delta_in, spread_in, live, poison, grad,
              sharers, shape, opt: tl.constexpr, BY_ROW: tl.constexpr,
              BY_KEY: tl.constexpr):  # fmt: skip
    """The gradient of an additive mask in its own shape: of a tile of it, the sum of ``ds`` over
    all that shares it, in order.

    ``sharers``: the mask's heads, and how many of the call's sequences and heads share one of its
    own. Where not BY_ROW one row of the mask holds for all, where not BY_KEY one key.
    """
    tiles = work.tiles_of(shape, opt)
    row_blocks = work.row_blocks_of(shape, opt)
    heads, batches_each, heads_each = sharers
    its_batch, its_head, row_block, tile = work.mask_tile_at(
        tl.program_id(0), heads, shape, opt, BY_ROW, BY_KEY
    )
    thresholds = (top_in, t_in, delta_in, spread_in)
    acc = tl.full((opt.block_q, opt.block_k), 0.0, tl.float32)
    for sharer in range(0, batches_each * heads_each):
        batch = its_batch * batches_each + sharer // heads_each
        head = its_head * heads_each + sharer % heads_each
        first_block = work.head_number(batch, head, shape) * row_blocks
        kv_row = work.key_head_number(batch, work.key_head_of(head, shape), shape)
        marks = work.by_tiles(poison, kv_row, shape, opt)
        for row in range(row_block, row_block + 1 if BY_ROW else row_blocks):
            for column in range(tile, tile + 1 if BY_KEY else tiles):
                flags = work.by_tiles(live, first_block + row, shape, opt)
                has_part = tl.load(flags + column) != 0
                if has_part | (tl.load(marks + column) != 0):
                    acc = mask_piece(acc, row, column, query, key, value, grad_out,
                                     thresholds, (batch, head), shape, opt)  # fmt: skip
    its = (score.base_of(grad, its_batch, its_head), grad.row)
    work.store_mask_tile(its, row_block, tile, acc, shape, opt, BY_ROW, BY_KEY)
