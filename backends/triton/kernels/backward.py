"""Backward: gradients over the lists of live tiles, without atomics.

With ``dp = dO v`` and ``delta = dO . out_u`` it is ``ds = u (dp - delta)``, ``dQ = scale ds K``,
``dK = scale ds^T Q`` and ``dV = p^T dO``. Like ``output``, both gradient kernels are launched
twice: what is not finite is marked ``unsafe`` and done again where SAFE, with zeros off the
support whatever queries, keys, values and output gradients hold there.
"""

from __future__ import annotations

import triton
import triton.language as tl

from adasplash2.backends.triton.kernels.arithmetic import (
    PROB_SCALE,
    count_bad,
    finite_part,
    gradient_product,
    matmul,
    with_bad,
)
from adasplash2.backends.triton.kernels.score import (
    allowed,
    distance,
    distances,
    is_inside,
    open_tiles,
    scores,
)
from adasplash2.backends.triton.kernels.threshold import (
    weights,
)
from adasplash2.backends.triton.kernels.work import (
    checked,
    entries_at,
    entry_of,
    head_of,
    is_marked,
    load_pair,
    load_thresholds,
    load_tile,
    mark_rows,
    portion,
    row_block_at,
    rows_at,
    store_tile,
    tile_at,
)


@triton.jit
def load_spread(spread, at_row, inside, opt: tl.constexpr):
    """0 for rows with one key, whose ``dp - delta`` is zero but for rounding; 1 else."""
    if opt.exact:
        return tl.load(spread + at_row, mask=inside, other=0.0)
    else:
        return tl.full(at_row.shape, 1.0, tl.float32)


@triton.jit
def score_gradient(x, u, dp, delta, spread, opt: tl.constexpr, SAFE: tl.constexpr):
    """``ds``, exactly zero off the support where SAFE; ``delta`` is already times ``spread``."""
    if opt.exact:
        dp = dp * spread
    ds = u * (dp - delta)
    if SAFE:
        ds = tl.where(is_inside(x, opt), ds, 0.0)
    return ds


@triton.jit
def grad_query_tiles(acc, row_block, grad, delta, spread, keys, values, entries, shape,
                     opt: tl.constexpr, SAFE: tl.constexpr, EDGE: tl.constexpr):  # fmt: skip
    """Add ``ds K`` over the entries that need no mask, or the others where EDGE."""
    numbers, start, stop = portion(entries, EDGE)
    number = entry_of(numbers, start, stop)
    for index in range(start, stop):
        first, k, v = load_pair(number, keys, values, shape, opt, EDGE)
        number = entry_of(numbers, index + 1, stop)
        x = distances(row_block, k, first, shape, opt, EDGE)
        _, u = weights(x, shape.r, opt)
        dp = matmul(grad, tl.trans(v))
        ds = score_gradient(x, u, dp, delta[:, None], spread[:, None], opt, SAFE)
        acc += gradient_product(ds, finite_part(k, SAFE), opt)
    return acc


@triton.jit
def grad_query(query, key, value, grad_out, out_u, spread_in, top_in, t_in, lists, counts, grad_q,
               delta_out, unsafe, shape, scale, opt: tl.constexpr, CHUNK: tl.constexpr,
               SAFE: tl.constexpr):  # fmt: skip
    """``delta`` and ``dQ`` of a row block."""
    tiles = tl.cdiv(shape.length_k, opt.block_k)
    at_block, at_head, first_row, at_row, inside = row_block_at(tl.program_id(0), shape, opt)
    batch, head, kv_head = at_head
    if SAFE and not is_marked(unsafe + at_row, inside):
        return
    length = shape.length_q
    queries = head_of(query, batch, head)
    q = load_tile(queries, first_row, length, opt.block_q, opt.head_dim, opt.padded, True)
    grads = head_of(grad_out, batch, head)
    grad = load_tile(grads, first_row, length, opt.block_q, opt.head_dim_v, opt.padded_v, True)
    means = head_of(out_u, batch, head)
    mean = load_tile(means, first_row, length, opt.block_q, opt.head_dim_v, opt.padded_v, True)
    spread = load_spread(spread_in, at_row, inside, opt)
    delta = spread * tl.sum(grad.to(tl.float32) * mean, 1)
    keys = head_of(key, batch, kv_head)
    values = head_of(value, batch, kv_head)
    entries, right = checked(entries_at(lists, counts, at_block, tiles), shape, opt, CHUNK)
    top, t = load_thresholds(top_in, t_in, at_row, inside, opt)
    row_block = (q, top, t, first_row)
    acc = tl.full((opt.block_q, opt.padded), 0.0, tl.float32)
    for edge in tl.static_range(2):
        acc = grad_query_tiles(
            acc, row_block, grad, delta, spread, keys, values, entries, shape, opt, SAFE, edge == 1
        )
    result = tl.where((t != t)[:, None] | (right == 0), float("nan"), acc * scale)
    store_tile(
        head_of(grad_q, batch, head),
        first_row,
        length,
        result,
        opt.block_q,
        opt.head_dim,
        opt.padded,
    )
    tl.store(delta_out + at_row, delta, mask=inside)
    if not SAFE:
        mark_rows(unsafe + at_row, result, inside)


@triton.jit
def transpose_lists(
    live, row_block_lists, row_block_counts, shape, opt: tl.constexpr, CHUNK: tl.constexpr
):
    """Per key tile, the row blocks of its ``gqa_group`` of heads for which it is live, as
    ``member * row_blocks + row_block``: first those that see all of it, then those that need the
    mask."""
    tiles = tl.cdiv(shape.length_k, opt.block_k)
    row_blocks = tl.cdiv(shape.length_q, opt.block_q)
    number = tl.program_id(0)
    tile = number % tiles
    capacity = shape.gqa_group * row_blocks
    # Query heads of one key head are neighbours, also across the batch.
    first_block = (number // tiles).to(tl.int64) * capacity
    numbers = row_block_lists + number.to(tl.int64) * capacity
    found = 0
    for edge in tl.static_range(2):
        for chunk in range(0, capacity, CHUNK):
            entry = chunk + tl.arange(0, CHUNK)
            flags = live + (first_block + entry) * tiles + tile
            alive = tl.load(flags, mask=entry < capacity, other=0)
            # The end of the keys needs no mask: what lies beyond it is not stored.
            whole = open_tiles(entry % row_blocks * opt.block_q, tiles * opt.block_k, opt) > tile
            chosen = ((alive != 0) & (whole == (edge == 0))).to(tl.int32)
            tl.store(numbers + found + tl.cumsum(chosen, 0) - chosen, entry, mask=chosen > 0)
            found += tl.sum(chosen, 0)
        tl.store(row_block_counts + 2 * number + edge, found)


@triton.jit
def grad_key_tiles(sums, k, v, first_key, queries, grads, thresholds, entries, shape,
                   opt: tl.constexpr, SCALE: tl.constexpr, PARTS: tl.constexpr,
                   SAFE: tl.constexpr, EDGE: tl.constexpr):  # fmt: skip
    """Add ``ds^T Q`` and ``p^T dO`` over the entries that need no mask, or the others where EDGE.

    A row block is taken in PARTS: all of its rows do not fit the registers beside two sums.
    """
    acc_k, acc_v, bad = sums
    q_base, q_member, q_row = queries
    g_base, g_member, g_row = grads
    top_in, t_in, delta_in, spread_in, first_head = thresholds
    numbers, start, stop = portion(entries, EDGE)
    part: tl.constexpr = opt.block_q // PARTS
    row_blocks = tl.cdiv(shape.length_q, opt.block_q)
    length = shape.length_q
    upcoming = entry_of(numbers, start, stop)
    for index in range(start * PARTS, stop * PARTS):
        entry = upcoming
        upcoming = entry_of(numbers, (index + 1) // PARTS, stop)
        member = (entry // row_blocks).to(tl.int64)
        first_row = (entry % row_blocks * PARTS + index % PARTS) * part
        q_head = (q_base + member * q_member, q_row)
        q = load_tile(q_head, first_row, length, part, opt.head_dim, opt.padded, True)
        g_head = (g_base + member * g_member, g_row)
        grad = load_tile(g_head, first_row, length, part, opt.head_dim_v, opt.padded_v, True)
        at_row, inside = rows_at(first_head + member, first_row, length, part)
        top, t = load_thresholds(top_in, t_in, at_row, inside, opt)
        delta = tl.load(delta_in + at_row, mask=inside, other=0.0)
        spread = load_spread(spread_in, at_row, inside, opt)
        # A rounding of the smallest `x` moves its `u`: where steep, to the bit as for `delta`.
        s = tl.trans(scores(q, k, opt)) if opt.steep else scores(k, q, opt)
        dp = matmul(v, tl.trans(grad))
        x = distance(s, top[None, :] if opt.exact else top, t[None, :], shape.c, opt)
        if EDGE:
            rows = first_row + tl.arange(0, part)
            keys = first_key + tl.arange(0, opt.block_k)
            x = tl.where(allowed(rows[None, :], keys[:, None], shape.length_k, opt), x, -1.0)
        p, u = weights(x, shape.r, opt)
        acc_v += matmul((p * SCALE).to(grad.dtype), finite_part(grad, SAFE))
        ds = score_gradient(x, u, dp, delta[None, :], spread[None, :], opt, SAFE)
        acc_k += gradient_product(ds, finite_part(q, SAFE), opt)
        if SAFE:
            bad = count_bad(bad, is_inside(x, opt), grad)
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
def store_keys(acc_k, acc_v, bad, at_head, first_key, poison, grad_k, grad_v, unsafe, shape,
               scale, ROWS: tl.constexpr, opt: tl.constexpr, SAFE: tl.constexpr):  # fmt: skip
    """Store ``dK`` and ``dV`` of ROWS keys from their sums, and mark what is not finite."""
    kv_row, batch, kv_head = at_head
    prob_scale: tl.constexpr = PROB_SCALE if grad_v.base.dtype.element_ty == tl.float16 else 1.0
    at_key, inside = rows_at(kv_row, first_key, shape.length_k, ROWS)
    length = shape.length_k
    poisoned = (at_key - kv_row.to(tl.int64) * length < tl.load(poison + kv_row))[:, None]
    result_k = tl.where(poisoned, float("nan"), acc_k * scale)
    result_v = tl.where(poisoned, float("nan"), acc_v * (1.0 / prob_scale))
    if SAFE:
        result_v = with_bad(result_v, bad)
    head = head_of(grad_k, batch, kv_head)
    store_tile(head, first_key, length, result_k, ROWS, opt.head_dim, opt.padded)
    head = head_of(grad_v, batch, kv_head)
    store_tile(head, first_key, length, result_v, ROWS, opt.head_dim_v, opt.padded_v)
    if not SAFE:
        # One mark for both: a sum that overflows costs time alone.
        mark_rows(unsafe + at_key, result_k + tl.sum(result_v, 1)[:, None], inside)


@triton.jit
def grad_key_value(query, key, value, grad_out, top_in, t_in, delta_in, spread_in,
                   row_block_lists, row_block_counts, cuts, owners, partials, poison, grad_k,
                   grad_v, unsafe, shape, scale, opt: tl.constexpr, PARTS: tl.constexpr,
                   MOST: tl.constexpr, SAFE: tl.constexpr):  # fmt: skip
    """``dK`` and ``dV`` of a key tile, or the sums of a piece of its list."""
    number = tl.program_id(0)
    piece = 0
    pieces = 0
    if MOST and not SAFE:
        number, piece, pieces = work_of(number, cuts, owners, MOST)
        if number < 0:
            return
    at_head, first_key = tile_at(number, shape, opt)
    kv_row, batch, kv_head = at_head
    at_key, inside = rows_at(kv_row, first_key, shape.length_k, opt.block_k)
    if SAFE and not is_marked(unsafe + at_key, inside):
        return
    first_head = kv_head * shape.gqa_group
    prob_scale: tl.constexpr = PROB_SCALE if value.base.dtype.element_ty == tl.float16 else 1.0
    length = shape.length_k
    keys = head_of(key, batch, kv_head)
    k = load_tile(keys, first_key, length, opt.block_k, opt.head_dim, opt.padded, True)
    values = head_of(value, batch, kv_head)
    v = load_tile(values, first_key, length, opt.block_k, opt.head_dim_v, opt.padded_v, True)
    capacity = shape.gqa_group * tl.cdiv(shape.length_q, opt.block_q)
    entries = entries_at(row_block_lists, row_block_counts, number, capacity)
    if MOST and not SAFE:
        entries = piece_of(entries, piece, tl.maximum(pieces, 1))
    q_base, q_row = head_of(query, batch, first_head)
    g_base, g_row = head_of(grad_out, batch, first_head)
    thresholds = (top_in, t_in, delta_in, spread_in, kv_row * shape.gqa_group)
    none = tl.full((opt.block_k, opt.padded_v if SAFE else 1), 0.0, tl.float32)
    sums = (
        tl.full((opt.block_k, opt.padded), 0.0, tl.float32),
        tl.full((opt.block_k, opt.padded_v), 0.0, tl.float32),
        (none, none),
    )
    for edge in tl.static_range(2):
        sums = grad_key_tiles(
            sums, k, v, first_key, (q_base, query.head, q_row), (g_base, grad_out.head, g_row),
            thresholds, entries, shape, opt, prob_scale, PARTS, SAFE, edge == 1,
        )  # fmt: skip
    acc_k, acc_v, bad = sums
    if pieces > 0:
        slot = tl.load(cuts + number) + piece
        of_keys, of_values = partial_sums(partials, slot, 0, opt.block_k, opt)
        tl.store(of_keys, acc_k)
        tl.store(of_values, acc_v)
    else:
        store_keys(acc_k, acc_v, bad, at_head, first_key, poison, grad_k, grad_v, unsafe, shape,
                   scale, opt.block_k, opt, SAFE)  # fmt: skip


@triton.jit
def add_pieces(cuts, owners, partials, poison, grad_k, grad_v, unsafe, shape, scale,
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
    at_head, first_key = tile_at(number, shape, opt)
    store_keys(acc_k, acc_v, None, at_head, first_key + first_row, poison, grad_k, grad_v, unsafe,
               shape, scale, ROWS, opt, False)  # fmt: skip
