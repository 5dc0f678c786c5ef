"""Which rows and tiles a program works on, and where they lie in memory.

``query``, ``key`` and other tensors with heads are ``sizes.Heads``, ``shape`` is a ``sizes.Shape``,
``opt`` the compile-time ``sizes.Options``. A *head* ``(address, row stride)`` is one head of a
tensor; *entries* ``(numbers, open, end)`` are a list of which the first ``open`` need no mask.
"""

from __future__ import annotations

import triton
import triton.language as tl

from adasplash2.backends.triton.kernels.arithmetic import (
    INFINITY,
    INTERPRETED,
    any_of,
    is_finite,
    largest,
)


@triton.jit
def row_blocks_of(shape, opt: tl.constexpr):
    """Of a head."""
    return tl.cdiv(shape.length_q, opt.block_q)


@triton.jit
def tiles_of(shape, opt: tl.constexpr):
    """Key tiles of a head."""
    return tl.cdiv(shape.length_k, opt.block_k)


@triton.jit
def by_tiles(array, number, shape, opt: tl.constexpr):
    """Where the entries of row block, head or program ``number`` begin in an array that has one for
    each key tile."""
    return array + number.to(tl.int64) * tiles_of(shape, opt)


@triton.jit
def head_number(batch, head, shape):
    """The number of a query head among those of all sequences."""
    return batch * shape.heads_q + head


@triton.jit
def head_of(tensor, batch, head):
    base = tensor.base + batch.to(tl.int64) * tensor.batch + head.to(tl.int64) * tensor.head
    return base, tensor.row


@triton.jit
def keys_of(tensor, batch, head, shape, opt: tl.constexpr):
    """A head of keys or values as :func:`load_keys` takes it: where keys lie in pages, the numbers
    of the sequence's pages and the stride from page to page follow the row stride."""
    if opt.page_size > 0:
        pages = shape.terms.pages
        base = tensor.base + head.to(tl.int64) * tensor.head
        return base, tensor.row, pages.table + batch.to(tl.int64) * pages.batch, tensor.batch
    else:
        return head_of(tensor, batch, head)


@triton.jit
def row_pointers(head, rows, columns):
    base, stride = head
    return base + rows.to(tl.int64) * stride + columns


@triton.jit
def tile_pointers(head, first, BLOCK: tl.constexpr, PADDED: tl.constexpr):
    base, stride = head
    rows = tl.arange(0, BLOCK)[:, None] * stride
    return base + first.to(tl.int64) * stride + rows + tl.arange(0, PADDED)[None, :]


@triton.jit
def tile_mask(first, length, BLOCK: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr):
    rows = first + tl.arange(0, BLOCK)[:, None]
    return (rows < length) & (tl.arange(0, PADDED)[None, :] < WIDTH)


@triton.jit
def load_tile(
    head, first, length, BLOCK: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr,
    EDGE: tl.constexpr,
):  # fmt: skip
    """Rows ``first`` and following of a head; zeros from ``length`` (where EDGE) and WIDTH on."""
    pointers = tile_pointers(head, first, BLOCK, PADDED)
    if EDGE:
        mask = tile_mask(first, length, BLOCK, WIDTH, PADDED)
        tile = tl.load(pointers, mask=mask, other=0.0)
    elif WIDTH != PADDED:
        tile = tl.load(pointers, mask=tl.arange(0, PADDED)[None, :] < WIDTH, other=0.0)
    else:
        tile = tl.load(pointers)
    return tile


@triton.jit
def pages_of(head, keys, shape, opt: tl.constexpr):
    """The pages of keys of a head by :func:`keys_of`; nothing where keys do not lie in pages."""
    if opt.page_size > 0:
        pages = shape.terms.pages
        number = tl.load(head[2] + keys // opt.page_size * pages.column, mask=keys < shape.length_k,
                         other=0)  # fmt: skip
        return tl.minimum(tl.maximum(number, 0), pages.number - 1)
    else:
        return 0


@triton.jit
def pages_at(head, first, shape, BLOCK: tl.constexpr, opt: tl.constexpr):
    """:func:`pages_of` keys ``first`` and following, BLOCK times a whole number; one number where a
    page holds them all."""
    keys = first
    if opt.page_size % BLOCK != 0:
        keys = first + tl.arange(0, BLOCK)
    return pages_of(head, keys, shape, opt)


@triton.jit
def load_keys_in(
    number, head, first, shape, BLOCK: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr,
    EDGE: tl.constexpr, opt: tl.constexpr,
):  # fmt: skip
    """:func:`load_keys` in pages by :func:`pages_at`."""
    if opt.page_size == 0:
        return load_tile(head, first, shape.length_k, BLOCK, WIDTH, PADDED, EDGE)
    else:
        base, row, _, page = head
        place = number.to(tl.int64) * page
        if opt.page_size % BLOCK == 0:
            own = base + place + (first % opt.page_size).to(tl.int64) * row
            return load_tile((own, row), first * 0, shape.length_k - first, BLOCK, WIDTH, PADDED,
                             True)  # fmt: skip
        else:
            keys = first + tl.arange(0, BLOCK)
            place += (keys % opt.page_size).to(tl.int64) * row
            columns = tl.arange(0, PADDED)[None, :]
            mask = (keys < shape.length_k)[:, None] & (columns < WIDTH)
            return tl.load(base + place[:, None] + columns, mask=mask, other=0.0)


@triton.jit
def load_keys(
    head, first, shape, BLOCK: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr,
    EDGE: tl.constexpr, opt: tl.constexpr,
):  # fmt: skip
    """Keys or values ``first`` and following of a head by :func:`keys_of`, as :func:`load_tile`."""
    number = pages_at(head, first, shape, BLOCK, opt)
    return load_keys_in(number, head, first, shape, BLOCK, WIDTH, PADDED, EDGE, opt)


@triton.jit
def load_each_key(head, keys, wanted, shape, WIDTH: tl.constexpr, PADDED: tl.constexpr,
                  opt: tl.constexpr):  # fmt: skip
    """Any ``keys``, or values, of a head by :func:`keys_of`; zeros where not ``wanted``."""
    columns = tl.arange(0, PADDED)[None, :]
    if opt.page_size > 0:
        base, row, _, page = head
        number = pages_of(head, keys, shape, opt).to(tl.int64)
        places = number * page + (keys % opt.page_size).to(tl.int64) * row
    else:
        base, row = head
        places = keys.to(tl.int64) * row
    mask = wanted[:, None] & (columns < WIDTH)
    return tl.load(base + places[:, None] + columns, mask=mask, other=0.0)


@triton.jit
def store_tile(
    head, first, length, tile, BLOCK: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr
):
    mask = tile_mask(first, length, BLOCK, WIDTH, PADDED)
    element = head[0].dtype.element_ty
    tl.store(tile_pointers(head, first, BLOCK, PADDED), tile.to(element), mask=mask)


@triton.jit
def mark_rows(unsafe, some, tile, inside):
    """Store for each row of a tile whether it has an entry that is not finite, and in ``some``,
    which starts as zero, that there is such a row.

    By rows and not as one number: Triton 3.7.1 compiles no scalar of a product for sm_100.
    """
    found = tl.where(is_finite(largest(tl.abs(tile), 1)), 0, 1)
    tl.store(unsafe, found.to(tl.int8), mask=inside)
    tl.store(some + found * 0, 1, mask=inside & (found > 0))


@triton.jit
def is_marked(unsafe, inside):
    return any_of(tl.load(unsafe, mask=inside, other=0))


@triton.jit
def first_again(some, items):
    """The first of the ``items`` that a program looks at for marks, and whether it does: where
    there are ``some``. Programs may be fewer than items."""
    number = tl.program_id(0)
    return number, (tl.load(some) != 0) & (number < items)


@triton.jit
def next_again(number, items):
    """The item behind ``number`` that the same program looks at, and whether there is one."""
    number += tl.num_programs(0)
    return number, number < items


@triton.jit
def rows_at(head_row, first, length, BLOCK: tl.constexpr):
    """Offsets of BLOCK rows of a head in a ``(heads, length)`` array, and which of them exist."""
    rows = first + tl.arange(0, BLOCK)
    return head_row.to(tl.int64) * length + rows, rows < length


@triton.jit
def in_turn(number, heads, each, shape, opt: tl.constexpr):
    """The place, among ``each`` of all ``heads`` of all sequences, of what is ``number`` in launch
    order. Sequences that share a mask take turns, so that a tile of it comes from memory once and
    then from the L2."""
    if opt.shared:
        sharers = shape.terms.sharers
        number = number // sharers + number % sharers * heads * each
    return number


@triton.jit
def row_block_at(number, shape, opt: tl.constexpr):
    """:func:`row_block_of` what is ``number`` in launch order, see :func:`in_turn`."""
    number = in_turn(number, shape.heads_q, row_blocks_of(shape, opt), shape, opt)
    return row_block_of(number, shape, opt)


@triton.jit
def row_block_of(number, shape, opt: tl.constexpr):
    """Row block ``number`` (head by head, so that keys and values stay in the L2, and longest rows
    first): its place among all, ``(batch, head, kv_head)``, its first row, and :func:`rows_at`."""
    row_blocks = row_blocks_of(shape, opt)
    head_row = number // row_blocks
    row_block = row_blocks - 1 - number % row_blocks
    head = head_row % shape.heads_q
    at_head = (head_row // shape.heads_q, head, key_head_of(head, shape))
    first_row = row_block * opt.block_q
    at_row, inside = rows_at(head_row, first_row, shape.length_q, opt.block_q)
    return head_row * row_blocks + row_block, at_head, first_row, at_row, inside


@triton.jit
def is_block_marked(number, unsafe, shape, opt: tl.constexpr):
    """Whether a row is marked of the row block that is ``number`` in launch order."""
    _, _, _, at_row, inside = row_block_at(number, shape, opt)
    return is_marked(unsafe + at_row, inside)


@triton.jit
def key_head_at(kv_row, shape):
    """``(kv_row, batch, kv_head)`` of a key head by its number among those of all sequences."""
    heads_kv = shape.heads_q // shape.gqa_group
    return kv_row, kv_row // heads_kv, kv_row % heads_kv


@triton.jit
def first_head(kv_head, shape):
    """The first of the query heads that share a key head; also of numbers among all sequences."""
    return kv_head * shape.gqa_group


@triton.jit
def key_head_of(head, shape):
    """The key head of a query head."""
    return head // shape.gqa_group


@triton.jit
def key_head_number(batch, kv_head, shape):
    """The number that :func:`key_head_at` takes."""
    return batch * (shape.heads_q // shape.gqa_group) + kv_head


@triton.jit
def tile_at(number, shape, opt: tl.constexpr):
    """``(kv_row, batch, kv_head)`` and the first key of a key tile."""
    tiles = tiles_of(shape, opt)
    return key_head_at(number // tiles, shape), number % tiles * opt.block_k


@triton.jit
def tile_in_turn(number, shape, opt: tl.constexpr):
    """The key tile that is ``number`` in launch order, see :func:`in_turn`."""
    heads_kv = shape.heads_q // shape.gqa_group
    return in_turn(number, heads_kv, tiles_of(shape, opt), shape, opt)


@triton.jit
def mask_tile_at(number, heads, shape, opt: tl.constexpr, BY_ROW: tl.constexpr,
                 BY_KEY: tl.constexpr):  # fmt: skip
    """Batch and head of a mask of so many ``heads``, row block and key tile of tile ``number`` of
    it; zero where it has one row, or one key, for all."""
    row_block = 0
    tile = 0
    if BY_KEY:
        tile = number % tiles_of(shape, opt)
        number = number // tiles_of(shape, opt)
    if BY_ROW:
        row_block = number % row_blocks_of(shape, opt)
        number = number // row_blocks_of(shape, opt)
    return number // heads, number % heads, row_block, tile


@triton.jit
def store_mask_tile(mask, row_block, tile, sums, shape, opt: tl.constexpr, BY_ROW: tl.constexpr,
                    BY_KEY: tl.constexpr):  # fmt: skip
    """Store a tile by :func:`mask_tile_at`, added up where it has one row, or one key, for all;
    ``mask``: where the mask's head begins, and its row stride."""
    places, stride = mask
    rows = row_block * opt.block_q + tl.arange(0, opt.block_q)
    keys = tile * opt.block_k + tl.arange(0, opt.block_k)
    if BY_ROW and BY_KEY:
        places += rows.to(tl.int64)[:, None] * stride + keys[None, :]
        inside = (rows < shape.length_q)[:, None] & (keys < shape.length_k)[None, :]
        tl.store(places, sums, mask=inside)
    elif BY_ROW:
        places += rows.to(tl.int64) * stride
        tl.store(places, tl.sum(sums, 1), mask=rows < shape.length_q)
    elif BY_KEY:
        tl.store(places + keys, tl.sum(sums, 0), mask=keys < shape.length_k)
    else:
        tl.store(places, tl.sum(tl.sum(sums, 1), 0))


@triton.jit
def marks_of(marks, batch, head, shape, MARK: tl.constexpr):
    """Where a head's marks of tiles with support begin."""
    rows = head_number(batch, head, shape).to(tl.int64) * tl.cdiv(shape.length_q, MARK)
    return marks + rows * tl.cdiv(shape.length_k, MARK)


@triton.jit
def mark_pairs(marks, rows, keys, which, shape, MARK: tl.constexpr):
    """Mark those tiles, of a head by :func:`marks_of`, that hold one ``which`` of the pairs."""
    places = marks + (rows // MARK).to(tl.int64) * tl.cdiv(shape.length_k, MARK) + keys // MARK
    tl.store(places, tl.full(which.shape, 1, tl.int8), mask=which)


@triton.jit
def block_and_split(shape, splits, opt: tl.constexpr):
    """``(kv_row, batch, kv_head)``, block and split of a program. Blocks of the same keys are
    neighbours, so that these are read from memory once."""
    blocks = tl.cdiv(shape.gqa_group * shape.length_q, opt.block_q)
    number = tl.program_id(0)
    at_head = key_head_at(number // blocks // splits, shape)
    return at_head, number % blocks, number // blocks % splits


@triton.jit
def rows_in(block, at_head, shape, opt: tl.constexpr):
    """The rows of a block: numbers among those of all, query heads, rows of these, and which exist.
    Places behind the last row hold the last row again."""
    kv_row, _, kv_head = at_head
    count = shape.gqa_group * shape.length_q
    places = block * opt.block_q + tl.arange(0, opt.block_q)
    number = tl.minimum(places, count - 1)
    head = first_head(kv_head, shape) + number // shape.length_q
    return kv_row * count + number, head, number % shape.length_q, places < count


@triton.jit
def row_at(number, shape):
    """Batch, head and row of the row ``number``."""
    head = number // shape.length_q
    return head // shape.heads_q, head % shape.heads_q, number % shape.length_q


@triton.jit
def share_of(first, end, number, parts):
    """Where part ``number`` of what lies from ``first`` up to ``end`` begins and ends."""
    each = (end - first) // parts
    longer = (end - first) % parts
    begin = first + number * each + tl.minimum(number, longer)
    return begin, begin + each + (number < longer).to(tl.int32)


@triton.jit
def member_and_block(entry, shape, opt: tl.constexpr):
    """The head of its group, and the row block of that, that an entry of a key tile's list says."""
    row_blocks = row_blocks_of(shape, opt)
    if opt.grouped:
        return entry // row_blocks, entry % row_blocks
    else:
        return entry * 0, entry


@triton.jit
def group_blocks(shape, opt: tl.constexpr):
    """Row blocks of the heads of one key head: as many entries has a key tile's list room for."""
    return shape.gqa_group * row_blocks_of(shape, opt)


@triton.jit
def entries_at(lists, counts, number, capacity):
    """The entries of list ``number``."""
    numbers = lists + number.to(tl.int64) * capacity
    return numbers, tl.load(counts + 2 * number), tl.load(counts + 2 * number + 1)


@triton.jit
def checked(entries, shape, opt: tl.constexpr, CHUNK: tl.constexpr, FEW: tl.constexpr):
    """The entries of a saved list of key tiles, and whether they are some: what was saved may have
    been written over since. If so there are none, so that nothing else is read.

    Entries are looked at before the loop over tiles: a limit inside it would keep Triton from
    asking for tiles ahead. Where FEW, CHUNK is as long as a list can be, and entries are asked for
    beside their counts.
    """
    numbers, open_end, end = entries
    whole = shape.length_k // opt.block_k
    tiles = tiles_of(shape, opt)
    right = (open_end >= 0) & (open_end <= end) & (end <= tiles)
    if FEW:
        places = tl.arange(0, CHUNK)
        found = tl.load(numbers + places, mask=places < tiles, other=0)
        limit = tl.where(places < open_end, whole, tiles)
        outside = ((found < 0) | (found >= limit)) & (places < end)
        right = right & (end <= CHUNK) & (any_of(outside) == 0)
        return (numbers, tl.where(right, open_end, 0), tl.where(right, end, 0)), right
    end = tl.where(right, end, 0)
    for chunk in range(0, end, CHUNK):
        places = chunk + tl.arange(0, CHUNK)
        found = tl.load(numbers + places, mask=places < end, other=0)
        limit = tl.where(places < open_end, whole, tiles)
        outside = ((found < 0) | (found >= limit)) & (places < end)
        right = right & (any_of(outside) == 0)
    return (numbers, tl.where(right, open_end, 0), tl.where(right, end, 0)), right


@triton.jit
def portion(entries, EDGE: tl.constexpr):
    """The list, and where in it those that need no mask begin and end; where EDGE is 1 the others;
    where it is 2 all, for loops that ask :func:`is_edge`.

    Two loops do nothing but what is needed, but the second starts with nothing on the way. Where
    rows see few tiles (``opt.joined``) that takes longer.
    """
    numbers, open_end, end = entries
    return numbers, open_end if EDGE == 1 else 0, end if EDGE else open_end


@triton.jit
def is_cut(EDGE: tl.constexpr, opt: tl.constexpr):
    """Whether a tile of a loop of this EDGE may reach beyond the last key: at compile time."""
    return EDGE != 0 and not opt.even


@triton.jit
def is_edge(index, entries, EDGE: tl.constexpr):
    """Whether entry ``index`` needs the mask: at compile time but where EDGE is 2."""
    if EDGE == 2:
        return index >= entries[1]
    else:
        return EDGE == 1


@triton.jit
def entry_of(numbers, index, stop):
    """An entry of a list, zero from ``stop`` on.

    Loops load it an iteration ahead: else Triton waits for a tile as soon as it is asked for, since
    the entry of the next is asked for behind it.
    """
    return tl.load(numbers + index, mask=index < stop, other=0)


@triton.jit
def first_entry(numbers, start, stop, EDGE: tl.constexpr):
    """:func:`entry_of` the first entry of a loop. Where EDGE is 2 it is asked for beside the counts
    of the list: of an empty one it is any number, and no tile is loaded."""
    if EDGE == 2 and not INTERPRETED:
        return tl.load(numbers)
    else:
        return entry_of(numbers, start, stop)


@triton.jit
def load_pair(number, keys, values, shape, opt: tl.constexpr, EDGE: tl.constexpr):
    """``(first_key, k, v)`` of a list's entry."""
    first = number * opt.block_k
    k = load_keys(keys, first, shape, opt.block_k, opt.head_dim, opt.padded, EDGE, opt)
    v = load_keys(values, first, shape, opt.block_k, opt.head_dim_v, opt.padded_v, EDGE, opt)
    return first, k, v


@triton.jit
def load_thresholds(top, t, at_row, inside, opt: tl.constexpr):
    """``top`` and ``t`` where ``opt.relative``, else zero and ``tau``; see ``score.distance``."""
    top = tl.load(top + at_row, mask=inside, other=0.0) if opt.relative else 0.0
    return top, tl.load(t + at_row, mask=inside, other=INFINITY)
