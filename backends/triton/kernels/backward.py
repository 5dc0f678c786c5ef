"""Backward: gradients over the lists of live tiles, without atomics.

With ``dp = dO v`` and ``delta = dO . out_u`` it is ``ds = u (dp - delta)``, ``dQ = scale ds K``,
``dK = scale ds^T Q`` and ``dV = p^T dO``. Like ``output``, both gradient kernels are launched
twice: blocks whose result is not finite mark themselves ``unsafe`` and are done again where SAFE,
with zeros off the support whatever queries, keys, values and output gradients hold there.
"""

from __future__ import annotations

import triton
import triton.language as tl

from adasplash2.backends.triton.kernels.common import (
    INFINITY,
    PROB_SCALE,
    SIZES,
    allowed,
    finite_part,
    head_of,
    is_finite,
    load_tile,
    is_marked,
    mark_rows,
    matmul,
    open_tiles,
    signed,
    store_tile,
    weights,
)


@triton.jit
def grad_query_tiles(
    acc,
    q,
    grad,
    delta,
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
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED: tl.constexpr,
    HEAD_DIM_V: tl.constexpr,
    PADDED_V: tl.constexpr,
    CAUSAL: tl.constexpr,
    SIGN: tl.constexpr,
    ALPHA: tl.constexpr,
    SAFE: tl.constexpr,
    EDGE: tl.constexpr,
):
    """Add ``ds K`` of list entries [start, stop)."""
    for index in range(start, stop):
        first = tl.load(numbers + index) * BLOCK_K
        k = load_tile(keys, stride_k, first, length_k, BLOCK_K, HEAD_DIM, PADDED, EDGE)
        v = load_tile(values, stride_v, first, length_k, BLOCK_K, HEAD_DIM_V, PADDED_V, EDGE)
        s = signed(matmul(q, tl.trans(k)), SIGN)
        dp = matmul(grad, tl.trans(v))
        x = c * (s - top[:, None]) - t[:, None]
        if EDGE:
            rows = first_row + tl.arange(0, BLOCK_Q)
            columns = first + tl.arange(0, BLOCK_K)
            mask = allowed(rows[:, None], columns[None, :], length_k, CAUSAL)
            x = tl.where(mask, x, -1.0)
        _, u = weights(x, r, ALPHA)
        ds = u * (dp - delta[:, None])
        if SAFE:
            ds = tl.where(x > 0.0, ds, 0.0)
        acc += matmul(ds.to(k.dtype), finite_part(k, SAFE))
    return acc


@triton.jit(do_not_specialize=SIZES)
def grad_query(
    query,
    key,
    value,
    grad_out,
    out_u,
    top_in,
    t_in,
    lists,
    counts,
    grad_q,
    delta_out,
    unsafe,
    stride_qb,
    stride_qh,
    stride_qn,
    stride_kb,
    stride_kh,
    stride_kn,
    stride_vb,
    stride_vh,
    stride_vn,
    stride_gb,
    stride_gh,
    stride_gn,
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
    scale,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED: tl.constexpr,
    HEAD_DIM_V: tl.constexpr,
    PADDED_V: tl.constexpr,
    CAUSAL: tl.constexpr,
    SIGN: tl.constexpr,
    ALPHA: tl.constexpr,
    SAFE: tl.constexpr,
):
    """``delta`` and ``dQ`` of a row block."""
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
    q_head = head_of(query, stride_qb, stride_qh, batch, head)
    q = load_tile(q_head, stride_qn, first_row, length_q, BLOCK_Q, HEAD_DIM, PADDED, True)
    g_head = head_of(grad_out, stride_gb, stride_gh, batch, head)
    grad = load_tile(g_head, stride_gn, first_row, length_q, BLOCK_Q, HEAD_DIM_V, PADDED_V, True)
    u_head = out_u + head_row.to(tl.int64) * length_q * HEAD_DIM_V
    mean = load_tile(u_head, HEAD_DIM_V, first_row, length_q, BLOCK_Q, HEAD_DIM_V, PADDED_V, True)
    delta = tl.sum(grad.to(tl.float32) * mean, 1)
    keys = head_of(key, stride_kb, stride_kh, batch, head // group)
    values = head_of(value, stride_vb, stride_vh, batch, head // group)
    numbers = lists + at_block.to(tl.int64) * tiles
    open_end = tl.load(counts + 2 * at_block)
    end = tl.load(counts + 2 * at_block + 1)
    top = tl.load(top_in + at_row, mask=inside, other=0.0)
    t = tl.load(t_in + at_row, mask=inside, other=INFINITY)
    acc = tl.zeros((BLOCK_Q, PADDED), tl.float32)
    for edge in tl.static_range(2):
        acc = grad_query_tiles(
            acc,
            q,
            grad,
            delta,
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
            BLOCK_Q,
            BLOCK_K,
            HEAD_DIM,
            PADDED,
            HEAD_DIM_V,
            PADDED_V,
            CAUSAL,
            SIGN,
            ALPHA,
            SAFE,
            edge == 1,
        )
    result = tl.where((t != t)[:, None], float("nan"), acc * scale)
    o_head = head_of(grad_q, stride_ob, stride_oh, batch, head)
    store_tile(o_head, stride_on, first_row, length_q, result, BLOCK_Q, HEAD_DIM, PADDED)
    tl.store(delta_out + at_row, delta, mask=inside)
    if not SAFE:
        mark_rows(unsafe + at_row, result, inside)


@triton.jit(do_not_specialize=SIZES)
def transpose_lists(
    live,
    lists,
    counts,
    heads_q,
    group,
    length_k,
    blocks,
    tiles,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    CAUSAL: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Per key tile, the row blocks of its group's heads for which it is live, as ``member *
    blocks + block``: first those that see all of it, then those that need the mask."""
    kv_row = tl.program_id(0) // tiles
    tile = tl.program_id(0) % tiles
    entries = group * blocks
    heads_kv = heads_q // group
    first_head = kv_row // heads_kv * heads_q + kv_row % heads_kv * group
    at_tile = tl.program_id(0).to(tl.int64)
    numbers = lists + at_tile * entries
    found = 0
    for edge in tl.static_range(2):
        for chunk in range(0, entries, CHUNK):
            entry = chunk + tl.arange(0, CHUNK)
            at_block = first_head.to(tl.int64) * blocks + entry
            alive = tl.load(live + at_block * tiles + tile, mask=entry < entries, other=0)
            # The end of the keys needs no mask: what lies beyond it is not stored.
            whole = open_tiles(entry % blocks * BLOCK_Q, tiles * BLOCK_K, CAUSAL, BLOCK_K) > tile
            chosen = ((alive != 0) & (whole == (edge == 0))).to(tl.int32)
            slots = found + tl.cumsum(chosen, 0) - chosen
            tl.store(numbers + slots, entry, mask=chosen > 0)
            found += tl.sum(chosen, 0)
        tl.store(counts + 2 * at_tile + edge, found)


@triton.jit
def grad_key_tiles(
    acc_k,
    acc_v,
    spoiled,
    k,
    v,
    queries,
    stride_q,
    stride_qh,
    grads,
    stride_g,
    stride_gh,
    first_row_of_heads,
    top_in,
    t_in,
    delta_in,
    numbers,
    start,
    stop,
    first_key,
    length_q,
    length_k,
    blocks,
    c,
    r,
    PART: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED: tl.constexpr,
    HEAD_DIM_V: tl.constexpr,
    PADDED_V: tl.constexpr,
    CAUSAL: tl.constexpr,
    SIGN: tl.constexpr,
    ALPHA: tl.constexpr,
    SCALE: tl.constexpr,
    SAFE: tl.constexpr,
    EDGE: tl.constexpr,
):
    """Add ``ds^T Q`` and ``p^T dO`` of list entries [start, stop); the EDGE is causal.

    A row block is taken in PARTS of PART rows: more do not fit the registers beside two sums."""
    for index in range(start * PARTS, stop * PARTS):
        entry = tl.load(numbers + index // PARTS)
        member = (entry // blocks).to(tl.int64)
        first_row = (entry % blocks * PARTS + index % PARTS) * PART
        q_head = queries + member * stride_qh
        g_head = grads + member * stride_gh
        q = load_tile(q_head, stride_q, first_row, length_q, PART, HEAD_DIM, PADDED, True)
        grad = load_tile(g_head, stride_g, first_row, length_q, PART, HEAD_DIM_V, PADDED_V, True)
        rows = first_row + tl.arange(0, PART)
        at_row = first_row_of_heads + member * length_q + rows
        inside = rows < length_q
        top = tl.load(top_in + at_row, mask=inside, other=0.0)
        t = tl.load(t_in + at_row, mask=inside, other=INFINITY)
        delta = tl.load(delta_in + at_row, mask=inside, other=0.0)
        s = signed(matmul(k, tl.trans(q)), SIGN)
        dp = matmul(v, tl.trans(grad))
        x = c * (s - top[None, :]) - t[None, :]
        if EDGE:
            keys = first_key + tl.arange(0, BLOCK_K)
            x = tl.where(allowed(rows[None, :], keys[:, None], length_k, CAUSAL), x, -1.0)
        p, u = weights(x, r, ALPHA)
        acc_v += matmul((p * SCALE).to(grad.dtype), finite_part(grad, SAFE))
        ds = u * (dp - delta[None, :])
        if SAFE:
            ds = tl.where(x > 0.0, ds, 0.0)
            support = tl.where(x > 0.0, 1.0, 0.0).to(grad.dtype)
            spoiled += matmul(support, tl.where(is_finite(grad), 0.0, 1.0).to(grad.dtype))
        acc_k += matmul(ds.to(q.dtype), finite_part(q, SAFE))
    return acc_k, acc_v, spoiled


@triton.jit(do_not_specialize=SIZES)
def grad_key_value(
    query,
    key,
    value,
    grad_out,
    top_in,
    t_in,
    delta_in,
    lists,
    counts,
    poison,
    grad_k,
    grad_v,
    unsafe,
    stride_qb,
    stride_qh,
    stride_qn,
    stride_kb,
    stride_kh,
    stride_kn,
    stride_vb,
    stride_vh,
    stride_vn,
    stride_gb,
    stride_gh,
    stride_gn,
    stride_ob,
    stride_oh,
    stride_on,
    stride_wb,
    stride_wh,
    stride_wn,
    heads_q,
    group,
    length_q,
    length_k,
    blocks,
    tiles,
    c,
    r,
    scale,
    BLOCK_Q: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED: tl.constexpr,
    HEAD_DIM_V: tl.constexpr,
    PADDED_V: tl.constexpr,
    CAUSAL: tl.constexpr,
    SIGN: tl.constexpr,
    ALPHA: tl.constexpr,
    SAFE: tl.constexpr,
):
    """``dK`` and ``dV`` of a key tile."""
    kv_row = tl.program_id(0) // tiles
    first_key = tl.program_id(0) % tiles * BLOCK_K
    keys = first_key + tl.arange(0, BLOCK_K)
    inside = keys < length_k
    at_key = kv_row.to(tl.int64) * length_k + keys
    if SAFE:
        if not is_marked(unsafe + at_key, inside):
            return
    heads_kv = heads_q // group
    batch = kv_row // heads_kv
    kv_head = kv_row % heads_kv
    first_head = kv_head * group
    prob_scale: tl.constexpr = PROB_SCALE if value.dtype.element_ty == tl.float16 else 1.0
    k_head = head_of(key, stride_kb, stride_kh, batch, kv_head)
    k = load_tile(k_head, stride_kn, first_key, length_k, BLOCK_K, HEAD_DIM, PADDED, True)
    v_head = head_of(value, stride_vb, stride_vh, batch, kv_head)
    v = load_tile(v_head, stride_vn, first_key, length_k, BLOCK_K, HEAD_DIM_V, PADDED_V, True)
    at_tile = tl.program_id(0).to(tl.int64)
    numbers = lists + at_tile * group * blocks
    open_end = tl.load(counts + 2 * at_tile)
    end = tl.load(counts + 2 * at_tile + 1)
    acc_k = tl.zeros((BLOCK_K, PADDED), tl.float32)
    acc_v = tl.zeros((BLOCK_K, PADDED_V), tl.float32)
    spoiled = tl.zeros((BLOCK_K, PADDED_V if SAFE else 1), tl.float32)
    for edge in tl.static_range(2):
        acc_k, acc_v, spoiled = grad_key_tiles(
            acc_k,
            acc_v,
            spoiled,
            k,
            v,
            head_of(query, stride_qb, stride_qh, batch, first_head),
            stride_qn,
            stride_qh,
            head_of(grad_out, stride_gb, stride_gh, batch, first_head),
            stride_gn,
            stride_gh,
            (batch * heads_q + first_head).to(tl.int64) * length_q,
            top_in,
            t_in,
            delta_in,
            numbers,
            open_end if edge else 0,
            end if edge else open_end,
            first_key,
            length_q,
            length_k,
            blocks,
            c,
            r,
            BLOCK_Q // PARTS,
            PARTS,
            BLOCK_K,
            HEAD_DIM,
            PADDED,
            HEAD_DIM_V,
            PADDED_V,
            CAUSAL,
            SIGN,
            ALPHA,
            prob_scale,
            SAFE,
            edge == 1,
        )
    result_k = acc_k * scale
    result_v = acc_v * (1.0 / prob_scale)
    if SAFE:
        result_v = tl.where(spoiled > 0.0, float("nan"), result_v)
    poisoned = (keys < tl.load(poison + kv_row))[:, None]
    result_k = tl.where(poisoned, float("nan"), result_k)
    result_v = tl.where(poisoned, float("nan"), result_v)
    o_head = head_of(grad_k, stride_ob, stride_oh, batch, kv_head)
    store_tile(o_head, stride_on, first_key, length_k, result_k, BLOCK_K, HEAD_DIM, PADDED)
    w_head = head_of(grad_v, stride_wb, stride_wh, batch, kv_head)
    store_tile(w_head, stride_wn, first_key, length_k, result_v, BLOCK_K, HEAD_DIM_V, PADDED_V)
    if not SAFE:
        # One mark for both: a sum that overflows costs time alone.
        mark_rows(unsafe + at_key, result_k + tl.sum(result_v, 1)[:, None], inside)
