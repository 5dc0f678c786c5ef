"""Forward: scan, then threshold and output on live tiles.

A row block is BLOCK_Q queries of one head, a tile BLOCK_K keys.
"""

from __future__ import annotations

import triton
import triton.language as tl

from adasplash2.backends.triton.kernels.common import (
    INFINITY,
    PROB_SCALE,
    SIZES,
    allowed,
    any_of,
    finite_part,
    head_of,
    is_finite,
    larger,
    largest,
    load_tile,
    is_marked,
    mark_rows,
    matmul,
    open_tiles,
    rise,
    seen_tiles,
    signed,
    store_tile,
    weights,
)

BOUND_STEPS = tl.constexpr(4)
"""Newton steps on the maxima of a row's tiles. On Gaussian scores the bound then keeps a
twentieth more keys than the threshold itself; more steps change nothing."""

BOUND_SLACK = tl.constexpr(1e-6)
"""What rounding may add to a bound."""


@triton.jit
def scan_tiles(
    maxima,
    top,
    q,
    keys,
    stride_k,
    first_row,
    length_k,
    start,
    stop,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED: tl.constexpr,
    CAUSAL: tl.constexpr,
    SIGN: tl.constexpr,
    EDGE: tl.constexpr,
):
    """Store the row maxima of tiles [start, stop) and return the maxima so far."""
    rows = tl.arange(0, BLOCK_Q)
    for tile in range(start, stop):
        first = tile * BLOCK_K
        k = load_tile(keys, stride_k, first, length_k, BLOCK_K, HEAD_DIM, PADDED, EDGE)
        s = signed(matmul(q, tl.trans(k)), SIGN)
        if EDGE:
            columns = first + tl.arange(0, BLOCK_K)
            mask = allowed((first_row + rows)[:, None], columns[None, :], length_k, CAUSAL)
            s = tl.where(mask, s, -INFINITY)
        highest = largest(s, 1)
        tl.store(maxima + tile * BLOCK_Q + rows, highest)
        top = larger(top, highest)
    return top


@triton.jit
def tile_maxima(maxima, first_tile, tiles, BLOCK_Q: tl.constexpr, CHUNK: tl.constexpr):
    numbers = first_tile + tl.arange(0, CHUNK)
    pointers = maxima + numbers[None, :] * BLOCK_Q + tl.arange(0, BLOCK_Q)[:, None]
    return tl.load(pointers, mask=(numbers < tiles)[None, :], other=-INFINITY)


@triton.jit(do_not_specialize=SIZES)
def scan(
    query,
    key,
    maxima,
    top_out,
    t_out,
    live,
    lists,
    counts,
    poison,
    stride_qb,
    stride_qh,
    stride_qn,
    stride_kb,
    stride_kh,
    stride_kn,
    heads_q,
    group,
    length_q,
    length_k,
    blocks,
    tiles,
    work_items,
    c,
    r,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED: tl.constexpr,
    CAUSAL: tl.constexpr,
    SIGN: tl.constexpr,
    ALPHA: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """The one dense pass: maxima of rows and tiles, a lower bound of every row's threshold, and
    the tiles that hold a key above some row's bound, as a list per row block.

    The threshold of a subset of a row's scores is a lower bound of the row's: the subset is the
    maxima of its tiles, which lie in ``maxima`` (one slice a program, reused by its blocks).
    """
    maxima += tl.program_id(0).to(tl.int64) * tiles * BLOCK_Q
    rows = tl.arange(0, BLOCK_Q)
    for item in range(tl.program_id(0), work_items, tl.num_programs(0)):
        # Head by head, so that its keys stay in the L2; longest rows first.
        head_row = item // blocks
        block = blocks - 1 - item % blocks
        batch = head_row // heads_q
        head = head_row % heads_q
        first_row = block * BLOCK_Q
        q = load_tile(
            head_of(query, stride_qb, stride_qh, batch, head),
            stride_qn,
            first_row,
            length_q,
            BLOCK_Q,
            HEAD_DIM,
            PADDED,
            True,
        )
        keys = head_of(key, stride_kb, stride_kh, batch, head // group)
        open_end = open_tiles(first_row, length_k, CAUSAL, BLOCK_K)
        end = seen_tiles(first_row, length_k, CAUSAL, BLOCK_Q, BLOCK_K)
        top = tl.full((BLOCK_Q,), -INFINITY, tl.float32)
        for edge in tl.static_range(2):
            top = scan_tiles(
                maxima,
                top,
                q,
                keys,
                stride_kn,
                first_row,
                length_k,
                open_end if edge else 0,
                end if edge else open_end,
                BLOCK_Q,
                BLOCK_K,
                HEAD_DIM,
                PADDED,
                CAUSAL,
                SIGN,
                edge == 1,
            )
        tl.debug_barrier()  # the maxima are read back by other threads

        inside = first_row + rows < length_q
        poisoned = (top != top) | (top == INFINITY)
        dead = poisoned | (top == -INFINITY) | (first_row + rows >= length_q)
        top = tl.where(dead, 0.0, top)
        bound = tl.full((BLOCK_Q,), -1.0, tl.float32)  # tau >= max z - 1
        for _ in range(BOUND_STEPS):
            mass = tl.zeros((BLOCK_Q,), tl.float32)
            slope = tl.zeros((BLOCK_Q,), tl.float32)
            for chunk in range(0, end, CHUNK):
                highest = tile_maxima(maxima, chunk, end, BLOCK_Q, CHUNK)
                p, u = weights(c * (highest - top[:, None]) - bound[:, None], r, ALPHA)
                mass += tl.sum(p, 1)
                slope += tl.sum(u, 1)
            bound += tl.where(mass > 1.0, rise(mass, slope, r, ALPHA), 0.0)
        bound = tl.where(dead, INFINITY, bound - BOUND_SLACK)

        at_block = head_row * blocks + block
        found = 0
        found_open = 0
        for chunk in range(0, tiles, CHUNK):
            highest = tile_maxima(maxima, chunk, end, BLOCK_Q, CHUNK)
            above = c * (highest - top[:, None]) - bound[:, None] > 0.0
            alive = tl.max(above.to(tl.int32), 0)
            numbers = chunk + tl.arange(0, CHUNK)
            place = at_block.to(tl.int64) * tiles
            tl.store(live + place + numbers, alive.to(tl.int8), mask=numbers < tiles)
            slots = found + tl.cumsum(alive, 0) - alive
            tl.store(lists + place + slots, numbers, mask=alive > 0)
            found += tl.sum(alive, 0)
            found_open += tl.sum(tl.where(numbers < open_end, alive, 0), 0)
        tl.store(counts + 2 * at_block, found_open)
        tl.store(counts + 2 * at_block + 1, found)

        at_row = head_row.to(tl.int64) * length_q + first_row + rows
        tl.store(top_out + at_row, top, mask=inside)
        tl.store(t_out + at_row, tl.where(poisoned, float("nan"), bound), mask=inside)
        # A poisoned row poisons every key that it may see.
        reach = length_k
        if CAUSAL:
            reach = tl.minimum(first_row + rows + 1, length_k)
        reach = tl.max(tl.where(poisoned & inside, reach, 0), 0)
        tl.atomic_max(poison + head_row // group, reach, mask=reach > 0)
        tl.debug_barrier()  # the maxima are free for the next block


@triton.jit
def sum_tiles(
    mass,
    slope,
    q,
    keys,
    stride_k,
    numbers,
    start,
    stop,
    top,
    t,
    first_row,
    length_k,
    c,
    r,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED: tl.constexpr,
    CAUSAL: tl.constexpr,
    SIGN: tl.constexpr,
    ALPHA: tl.constexpr,
    EDGE: tl.constexpr,
):
    """Add ``sum p`` and ``sum u`` of list entries [start, stop)."""
    for index in range(start, stop):
        first = tl.load(numbers + index) * BLOCK_K
        k = load_tile(keys, stride_k, first, length_k, BLOCK_K, HEAD_DIM, PADDED, EDGE)
        s = signed(matmul(q, tl.trans(k)), SIGN)
        x = c * (s - top[:, None]) - t[:, None]
        if EDGE:
            rows = first_row + tl.arange(0, BLOCK_Q)
            columns = first + tl.arange(0, BLOCK_K)
            mask = allowed(rows[:, None], columns[None, :], length_k, CAUSAL)
            x = tl.where(mask, x, -1.0)
        p, u = weights(x, r, ALPHA)
        mass += tl.sum(p, 1)
        slope += tl.sum(u, 1)
    return mass, slope


@triton.jit(do_not_specialize=SIZES)
def solve(
    query,
    key,
    top_in,
    t_io,
    tau_out,
    lists,
    counts,
    iterations,
    stride_qb,
    stride_qh,
    stride_qn,
    stride_kb,
    stride_kh,
    stride_kn,
    heads_q,
    group,
    length_q,
    length_k,
    blocks,
    tiles,
    c,
    r,
    tolerance,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED: tl.constexpr,
    CAUSAL: tl.constexpr,
    SIGN: tl.constexpr,
    ALPHA: tl.constexpr,
    MAX_STEPS: tl.constexpr,
    COUNT: tl.constexpr,
):
    """Thresholds: Newton's steps from the scan's bound, over live tiles, until every row of the
    block is done."""
    head_row = tl.program_id(0) // blocks
    block = blocks - 1 - tl.program_id(0) % blocks
    batch = head_row // heads_q
    head = head_row % heads_q
    first_row = block * BLOCK_Q
    q = load_tile(
        head_of(query, stride_qb, stride_qh, batch, head),
        stride_qn,
        first_row,
        length_q,
        BLOCK_Q,
        HEAD_DIM,
        PADDED,
        True,
    )
    keys = head_of(key, stride_kb, stride_kh, batch, head // group)
    at_block = head_row * blocks + block
    numbers = lists + at_block.to(tl.int64) * tiles
    open_end = tl.load(counts + 2 * at_block)
    end = tl.load(counts + 2 * at_block + 1)
    rows = first_row + tl.arange(0, BLOCK_Q)
    inside = rows < length_q
    at_row = head_row.to(tl.int64) * length_q + rows
    top = tl.load(top_in + at_row, mask=inside, other=0.0)
    t = tl.load(t_io + at_row, mask=inside, other=INFINITY)
    pending = t < INFINITY  # neither poisoned nor empty
    steps = tl.zeros((BLOCK_Q,), tl.int32)
    step = 0
    waiting = any_of(pending)
    while waiting:
        mass = tl.zeros((BLOCK_Q,), tl.float32)
        slope = tl.zeros((BLOCK_Q,), tl.float32)
        for edge in tl.static_range(2):
            mass, slope = sum_tiles(
                mass,
                slope,
                q,
                keys,
                stride_kn,
                numbers,
                open_end if edge else 0,
                end if edge else open_end,
                top,
                t,
                first_row,
                length_k,
                c,
                r,
                BLOCK_Q,
                BLOCK_K,
                HEAD_DIM,
                PADDED,
                CAUSAL,
                SIGN,
                ALPHA,
                edge == 1,
            )
        moved = t + rise(mass, slope, r, ALPHA)
        steps += pending.to(tl.int32)
        final = (mass <= 1.0 + tolerance) | (moved == t)
        t = tl.where(pending, moved, t)
        pending = pending & (final == 0)
        step += 1
        waiting = any_of(pending) & (step < MAX_STEPS)
    tl.store(t_io + at_row, t, mask=inside)
    tl.store(tau_out + at_row, c * top + t, mask=inside)
    if COUNT:
        tl.store(iterations + at_row, steps, mask=inside)


@triton.jit
def weigh_tiles(
    acc,
    acc_u,
    spoiled,
    mass,
    slope,
    kept,
    q,
    keys,
    stride_k,
    values,
    stride_v,
    numbers,
    start,
    stop,
    top,
    t,
    first_row,
    length_k,
    c,
    r,
    marks,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED: tl.constexpr,
    HEAD_DIM_V: tl.constexpr,
    PADDED_V: tl.constexpr,
    CAUSAL: tl.constexpr,
    SIGN: tl.constexpr,
    ALPHA: tl.constexpr,
    SCALE: tl.constexpr,
    GRADIENT: tl.constexpr,
    SAFE: tl.constexpr,
    COUNT: tl.constexpr,
    MARK: tl.constexpr,
    EDGE: tl.constexpr,
):
    """Add values weighted by ``p``, and by ``u`` where GRADIENT, of list entries [start, stop)."""
    for index in range(start, stop):
        first = tl.load(numbers + index) * BLOCK_K
        k = load_tile(keys, stride_k, first, length_k, BLOCK_K, HEAD_DIM, PADDED, EDGE)
        v = load_tile(values, stride_v, first, length_k, BLOCK_K, HEAD_DIM_V, PADDED_V, EDGE)
        s = signed(matmul(q, tl.trans(k)), SIGN)
        x = c * (s - top[:, None]) - t[:, None]
        rows = first_row + tl.arange(0, BLOCK_Q)
        columns = first + tl.arange(0, BLOCK_K)
        if EDGE:
            mask = allowed(rows[:, None], columns[None, :], length_k, CAUSAL)
            x = tl.where(mask, x, -1.0)
        p, u = weights(x, r, ALPHA)
        mass += tl.sum(p, 1)
        slope += tl.sum(u, 1)
        sound = finite_part(v, SAFE)
        acc += matmul((p * SCALE).to(v.dtype), sound)
        if GRADIENT:
            acc_u += matmul((u * SCALE).to(v.dtype), sound)
        if SAFE:
            support = tl.where(x > 0.0, 1.0, 0.0).to(v.dtype)
            spoiled += matmul(support, tl.where(is_finite(v), 0.0, 1.0).to(v.dtype))
        if COUNT:
            kept += tl.sum((x > 0.0).to(tl.int32), 1)
            places = marks + (rows // MARK)[:, None] * tl.cdiv(length_k, MARK)
            tl.store(places + (columns // MARK)[None, :], tl.full(x.shape, 1, tl.int8), mask=x > 0.0)
    return acc, acc_u, spoiled, mass, slope, kept


@triton.jit(do_not_specialize=SIZES)
def output(
    query,
    key,
    value,
    out,
    out_u,
    top_in,
    t_in,
    lists,
    counts,
    unsafe,
    support,
    marks,
    stride_qb,
    stride_qh,
    stride_qn,
    stride_kb,
    stride_kh,
    stride_kn,
    stride_vb,
    stride_vh,
    stride_vn,
    stride_ob,
    stride_oh,
    stride_on,
    heads_q,
    group,
    length_q,
    length_k,
    blocks,
    tiles,
    c,
    r,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED: tl.constexpr,
    HEAD_DIM_V: tl.constexpr,
    PADDED_V: tl.constexpr,
    CAUSAL: tl.constexpr,
    SIGN: tl.constexpr,
    ALPHA: tl.constexpr,
    GRADIENT: tl.constexpr,
    SAFE: tl.constexpr,
    COUNT: tl.constexpr,
    MARK: tl.constexpr,
):
    """``out = sum p v / sum p`` and, where GRADIENT, ``out_u = sum u v / sum u`` for the backward.

    Launched twice: blocks whose result is not finite mark themselves ``unsafe``, and only those
    are done again where SAFE, by a loop in which values that are not finite reach the rows alone
    whose support holds them.
    """
    head_row = tl.program_id(0) // blocks
    block = blocks - 1 - tl.program_id(0) % blocks
    at_block = head_row * blocks + block
    batch = head_row // heads_q
    head = head_row % heads_q
    first_row = block * BLOCK_Q
    rows = first_row + tl.arange(0, BLOCK_Q)
    inside = rows < length_q
    at_row = head_row.to(tl.int64) * length_q + rows
    if SAFE:
        if not is_marked(unsafe + at_row, inside):
            return
    scale: tl.constexpr = PROB_SCALE if value.dtype.element_ty == tl.float16 else 1.0
    q = load_tile(
        head_of(query, stride_qb, stride_qh, batch, head),
        stride_qn,
        first_row,
        length_q,
        BLOCK_Q,
        HEAD_DIM,
        PADDED,
        True,
    )
    keys = head_of(key, stride_kb, stride_kh, batch, head // group)
    values = head_of(value, stride_vb, stride_vh, batch, head // group)
    numbers = lists + at_block.to(tl.int64) * tiles
    open_end = tl.load(counts + 2 * at_block)
    end = tl.load(counts + 2 * at_block + 1)
    top = tl.load(top_in + at_row, mask=inside, other=0.0)
    t = tl.load(t_in + at_row, mask=inside, other=INFINITY)
    acc = tl.zeros((BLOCK_Q, PADDED_V), tl.float32)
    acc_u = tl.zeros((BLOCK_Q, PADDED_V if GRADIENT else 1), tl.float32)
    spoiled = tl.zeros((BLOCK_Q, PADDED_V if SAFE else 1), tl.float32)
    mass = tl.zeros((BLOCK_Q,), tl.float32)
    slope = tl.zeros((BLOCK_Q,), tl.float32)
    kept = tl.zeros((BLOCK_Q,), tl.int32)
    if COUNT:
        marks += head_row.to(tl.int64) * tl.cdiv(length_q, MARK) * tl.cdiv(length_k, MARK)
    for edge in tl.static_range(2):
        acc, acc_u, spoiled, mass, slope, kept = weigh_tiles(
            acc,
            acc_u,
            spoiled,
            mass,
            slope,
            kept,
            q,
            keys,
            stride_kn,
            values,
            stride_vn,
            numbers,
            open_end if edge else 0,
            end if edge else open_end,
            top,
            t,
            first_row,
            length_k,
            c,
            r,
            marks,
            BLOCK_Q,
            BLOCK_K,
            HEAD_DIM,
            PADDED,
            HEAD_DIM_V,
            PADDED_V,
            CAUSAL,
            SIGN,
            ALPHA,
            scale,
            GRADIENT,
            SAFE,
            COUNT,
            MARK,
            edge == 1,
        )
    poisoned = t != t
    result = acc / tl.where(mass > 0.0, mass * scale, 1.0)[:, None]
    if SAFE:
        result = tl.where(spoiled > 0.0, float("nan"), result)
    result = tl.where(poisoned[:, None], float("nan"), result)
    store_tile(
        head_of(out, stride_ob, stride_oh, batch, head),
        stride_on,
        first_row,
        length_q,
        result,
        BLOCK_Q,
        HEAD_DIM_V,
        PADDED_V,
    )
    if GRADIENT:
        mean = acc_u / tl.where(slope > 0.0, slope * scale, 1.0)[:, None]
        if SAFE:  # a bad value in the support spoils the whole row's gradient
            mean = tl.where((tl.max(spoiled, 1) > 0.0)[:, None], float("nan"), mean)
        at_head = out_u + head_row.to(tl.int64) * length_q * HEAD_DIM_V
        store_tile(at_head, HEAD_DIM_V, first_row, length_q, mean, BLOCK_Q, HEAD_DIM_V, PADDED_V)
    if COUNT:
        tl.store(support + at_row, kept, mask=inside)
    if not SAFE:
        mark_rows(unsafe + at_row, result, inside)
