"""What Python and the kernels share, each written once: constants, and the structs in memory.

:func:`header` makes ``layout.cuh`` of this module, which the kernels include. Every upper-case
integer becomes a ``constexpr int`` (``ARENA_ROW`` is ``kArenaRow`` there), every struct is declared
with its size and the offset of each field asserted. What depends on a problem's shape comes to the
kernels as ``-D`` macros instead, from ``sizes.py``.
"""

from __future__ import annotations

import ctypes
import functools

import torch

DTYPE_CODES = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}
"""The values of ``ADASPLASH2_DTYPE``."""

ALPHA_KINDS = {"k15": 0, "k2": 1, "kGeneral": 2}
"""``AlphaKind`` of ``threshold.h``: 1.5 and 2, which have closed forms, and every other alpha."""

# Rows and their survivors

ROW_BLOCK = 16
"""Query rows that are listed or flat together: one matrix fragment."""

ARENA_ROW = 64
"""Entries of the survivor arena per query row. A row block shares those of its rows, so
single rows may keep more."""

LISTED, TO_RETRY, FLAT, UNSAFE = range(4)
"""What ``Params.flat`` says of a row block. LISTED: its survivors are in the arena. TO_RETRY: they
did not fit, and another scan may find that they do. FLAT: the dense kernels compute it. UNSAFE:
they have, and since what came out is not finite, ``exact.cu`` computes it again. The marks of
gradients are UNSAFE or zero."""

COPY_BYTES = 16
"""What a thread copies at once where rows allow it (``ALIGNED``)."""

MIXED, ALL_FLAT, ALL_LISTED = range(3)
"""What ``Params.all_flat`` says of a key head."""

POISONED = -1
"""The number of survivors of a row whose output is NaN."""

STATS_TILE = 64
"""Queries and keys of the tiles of which ``stats`` tells whether one has support."""

CHECK_ROWS = 128
"""Rows in which a block of ``check_finite`` looks for NaN and infinities."""

# Lists of the scans (lists.cuh)

LIST_LANES = 4
"""Lanes that share a row in the accumulators of mma.sync and wgmma; each has its own list of it."""

MAX_LIST = 64
"""Entries of one lane's list at most."""

KEPT_LEAST, KEPT_KEYS, KEPT_MOST = 12, 192, 48
"""With how many survivors a row, on the mean of those that a warp scans, lists give way to
``dense90_output.cu``: ``KEPT_LEAST``, and one more for each ``KEPT_KEYS`` keys, since dense tiles
take time for all of them; at most ``KEPT_MOST``, where lists are slower than any number of keys in
dense tiles. While some keys were not seen yet, fewer are too many (``lists.cuh``)."""

FIRST_LEAST, FIRST_KEYS = 110, 33
"""And with how many of their first 128 keys together the 16 rows of a warp, on the mean of a
block's warps, where problems are not causal: ``FIRST_LEAST``, and one more for each ``FIRST_KEYS``
keys. Gaussian rows of which a step takes as long in lists as in dense tiles keep so many."""

LIST_ENTRY_BYTES = 8
"""One entry of a lane's list: a score and its column."""

STAGING_PARTS = 2
"""Accumulator fragments of 8 keys that are staged at once: a lane's scores of two rows."""

STAGING_KEYS = 8 * STAGING_PARTS
STAGING_APPEND = STAGING_KEYS // LIST_LANES
"""Entries that these may add to one list."""

STAGING_LANE_BYTES = 16 * STAGING_PARTS + 4
"""What a lane stages at once: its scores, and their first column."""

MIN_STAGING_BLOCKS = 2
"""How often a lane may stage scores at least, however long the lists are."""

# Memory of lists and staging is counted in entries of a lane's lists, for two rows as staging is.
_PAIR_ENTRY_BYTES = 2 * LIST_ENTRY_BYTES

MIN_CAPACITY = -(-MIN_STAGING_BLOCKS * STAGING_LANE_BYTES // _PAIR_ENTRY_BYTES) + 2 * STAGING_APPEND
"""The least room for staging, and in the lists for twice what is added at once."""

MOST_STAGING_BLOCKS = 12
"""How often it may beside full lists: a tile of 128 keys takes 8. Not tuned."""

MAX_CAPACITY = MAX_LIST + STAGING_APPEND * -(
    -MOST_STAGING_BLOCKS * STAGING_LANE_BYTES // (_PAIR_ENTRY_BYTES * STAGING_APPEND)
)
"""Full lists and these blocks, rounded up to what a block may add to a list."""

SCAN_STAGES = 2
"""Tiles of keys in shared memory in ``scan.cu``."""

SCAN_WARP_ROWS = 32
"""Queries of a warp of ``scan.cu``."""

# Gathers (elements.cu)

ELEMENT_THREADS = 256
MOST_ITEMS, ITEM_BLOCKS = 4, 16
"""Items (as many rows as a block of the gathers has at once, or a row block) that it takes one
after another: at most so many, and as many as leave so many blocks a multiprocessor."""

PREFIX_THREADS = 1024
SORT_THREADS = 512
LONG_THREADS = 128

SHORT_COLUMN = 256
"""Survivors of a key that one warp sums; a column of more is a long one."""

LONG_BLOCKS = 4
"""Blocks a multiprocessor for long columns."""

LONG_WAVES = 2
"""Where long columns are split over several blocks, they have at most so many parts for each
block of the launch, together."""

LONG_PART_BYTES = 2048
"""The sums of one part."""

STATIC_SHARED = 48 * 1024
"""Bytes of shared memory that a block has without asking for more."""

ROW_THREADS = 256
"""Threads of a block of ``rows.cu``."""

# Few queries (decode.cu)

MOST_DECODED = 16
"""The most queries of a head that are decoded."""

DECODE_TILE = 16
"""Keys whose scores a warp has at once: M of mma.sync."""

DECODE_ROW_TILE = 8
"""Rows whose scores it has at once: N of mma.sync."""

DECODE_PART = 1 << 16
"""Keys of a part at most: its lists count them in 16 bits."""

SOLVE_THREADS = 256
"""Threads of a block of ``decode_solve``."""

WEIGH_THREADS = 128
"""Threads of a block of ``decode_weigh``."""

SOLVE_KEPT = 256
"""Keys that a warp of it holds in shared memory; a row that keeps more is a flat one."""

WEIGHED_KEYS = 32
"""Keys whose probabilities a warp of ``decode_weigh`` has at once."""

# Hopper (scan90.cu, dense90.cuh)

WARPGROUP_THREADS = 128
WARPGROUP_ROWS = 64
"""M of wgmma."""

SWIZZLE_BYTES = 128
"""The width of the swizzle: a row of a panel."""

PANEL_COLUMNS = SWIZZLE_BYTES // 2
"""Columns of a panel, of 16-bit types."""

SWIZZLE_ALIGNMENT = 1024
"""Tiles start on so many bytes: eight rows of a panel, after which the swizzle repeats."""

HOPPER_KEYS = 128
"""Keys of a tile in ``scan90.cu`` and ``dense90_output.cu``; N of wgmma."""

HOPPER_MAX_HEAD_DIM = 128
"""Wider queries leave the accumulators of ``scan90.cu`` too few registers."""

DENSE_WARPGROUPS = 2
"""Warpgroups of ``dense90.cuh`` that multiply, beside the one that copies."""

DENSE_BOX = 64
"""Rows that one copy of ``dense90.cuh`` brings."""

STAYING_TILES = 8
"""Tiles of keys that ``dense90_output.cu`` has room for at once, of a head_dim up to 64."""

MOST_TILES = 64
"""Tiles of rows or keys that a block of ``dense90_grad.cu`` works on at most, one after another."""

DISTRIBUTED_TILES = 32
"""Of how many a thread finds out whether there is something to do: a bit each."""

DENSE_VALUE_STAGES = 2
GRAD_STAGES = 3
GRAD_QUERIES = 64
"""Queries of a tile in ``dense_grad_columns``."""

LIVE_KEYS = 64
LIVE_WORD_KEYS = 32 * LIVE_KEYS
"""Keys of which a bit of ``Params.live`` tells whether some have weights, and of one of its
words."""

OUTPUT_PLAIN, OUTPUT_SAVES, OUTPUT_COUNTS = range(3)
"""``ADASPLASH2_OUTPUT`` of ``dense90_output.cu``: no backward is to come; one is; the call counts
what it did."""

# Structs

_POINTER = ctypes.c_uint64
_TYPES: dict[str, type] = {
    "int": ctypes.c_int32,
    "long long": ctypes.c_int64,
    "float": ctypes.c_float,
}
_Fields = tuple[tuple[str, ...], ...]
"""C types, each with the names that have it."""

_DECLARED: dict[str, tuple[str, _Fields]] = {}


def _declare(keyword: str, name: str, fields: _Fields) -> dict[str, list[tuple[str, type]]]:
    _DECLARED[name] = keyword, fields
    kinds = ((kind, field) for kind, *names in fields for field in names)
    found = [(field, _POINTER if kind.endswith("*") else _TYPES[kind]) for kind, field in kinds]
    return {"_fields_": found}


def _struct(name: str, *fields: tuple[str, ...]) -> type[ctypes.Structure]:
    made = type(name, (ctypes.Structure,), _declare("struct", name, fields))
    _TYPES[name] = made
    return made


def _union(name: str, *fields: tuple[str, ...]) -> type[ctypes.Union]:
    made = type(name, (ctypes.Union,), _declare("union", name, fields))
    _TYPES[name] = made
    return made


View = _struct(  # (batch, heads, length, head_dim) with unit stride in head_dim
    "View",
    ("void*", "data"),
    ("long long", "batch", "head", "row"),  # strides in elements
)

RowStart = _union(
    "RowStart",
    ("int", "entry"),  # a listed row: its first entry in the arena of its row block
    ("float", "top"),  # another row before the dense kernels: the largest score as far as seen
    ("float", "factor"),  # after them: what makes its probabilities sum to one
)

RowCount = _union(
    "RowCount",
    ("int", "survivors"),  # a listed row, and another after the dense kernels; or kPoisoned
    ("float", "bound"),  # before them: a lower bound of tau / c
)

Terms = _struct(  # what the keys of a listed row need of it in the backward
    "Terms",
    ("float", "score", "x"),  # of its first survivor: q . k as grad_rows sums it, and z - tau
    ("float", "delta"),
    ("float", "factor"),  # what makes its probabilities sum to one
)

Params = _struct(
    "Params",
    ("View", "q", "k", "v", "o", "grad_o", "grad_q", "grad_k", "grad_v"),
    ("float*", "tau"),  # (batch * heads_q, length_q)
    ("int*", "iterations"),  # likewise, or null
    # (batch * heads_q, tiles_q, tiles_k) 64x64 tiles with support, or null
    ("unsigned char*", "tiles"),
    # Of each row; rows are numbered head by head, each head's padded to whole row blocks.
    ("RowStart*", "row_start"),
    ("RowCount*", "row_count"),
    ("unsigned char*", "flat"),  # of each row block: kListed (zero), kToRetry, kFlat or kUnsafe
    # Of each flat row block, which tiles of kLiveKeys keys have weights: a bit each, in words of
    # kLiveWordKeys keys. Only of tiles that the block sees, and only from dense90_output.cu.
    ("unsigned int*", "live"),
    ("int*", "poison"),  # per (batch, key head): keys before it are seen by a poisoned row
    # The arena, kRowBlock * kArenaBytes a row block: of a listed one the columns of its survivors
    # (columns_of() in common.cuh), of a flat one what its dense kernels keep (kept_of_flat_row()).
    ("void*", "columns"),
    # Of each survivor z - tau > 0. Where alpha has a closed form they are gone after the forward,
    # which keeps that of each row's first survivor: the backward finds the others from it. Flat
    # rows have what their O2 is shares of in its place (SecondOutput in dense90.cuh).
    ("float*", "weights", "first_weight"),
    # Of each column: survivors, and in `rows` their first one's place; after grad_rows, their end.
    ("int*", "column_count", "column_start"),
    # Of each (batch, key head): kAllFlat where dense tiles serve all rows that share its keys, and
    # none is poisoned: they write its dK and dV then, to which they add elsewhere. kAllListed where
    # they serve none. Null: they always add.
    ("int*", "all_flat"),
    # Survivors column by column: query rows, counted over the heads of a key head, as RowNumber.
    ("void*", "rows"),
    ("Terms*", "terms"),  # of each row, numbered as in row_start
    ("float*", "delta"),  # (batch * heads_q, length_q), flat rows only
    # Whether any row block is unsafe, and in the backward: any rows by their dQ, any keys.
    ("int*", "unsafe_output", "unsafe_grads"),
    # Which ones: row blocks, and of each kRowBlock keys first their dK, then their dV.
    ("unsigned char*", "unsafe_rows", "unsafe_keys"),
    ("int*", "long_columns"),  # [0] their number, then the columns
    ("int*", "long_done"),  # parts of a long column that are summed
    ("void*", "long_parts"),  # their sums, kLongPartBytes each
    ("int", "batch", "heads_q", "heads_kv", "gqa_group", "length_q", "length_k", "row_blocks"),
    ("int", "long_limit"),  # kShortColumn
    # Query rows that share keys are numbered: the number of the head among those of the key head,
    # then in the lowest `row_bits` bits the row.
    ("int", "row_bits"),
    ("float", "c", "inv_c"),  # z = c * (q . k), c = (alpha-1) |scale| > 0; and its inverse
    ("float", "scale"),  # as given; a negative one is carried by the sign of q
    ("float", "q_sign"),  # 1, -1, or 0 where scale is 0
    ("float", "r"),  # 1 / (alpha-1)
)

Part = _struct(  # of a row's keys: what a warp of decode_scan says of it
    "Part",
    ("float", "top"),  # the largest score
    ("float", "bound"),  # a lower bound of tau / c, of the row
    ("int", "first"),  # key of the part; its list begins at this place of a row's scores
    ("int", "count"),  # of keys in the list
)

Solved = _struct(  # what decode_solve leaves of a row to decode_weigh
    "Solved",
    ("float", "top"),  # the largest score
    ("float", "t"),  # threshold of c (score - top); infinite where nothing is left to do
)

DecodeParams = _struct(  # of decode.cu
    "DecodeParams",
    ("View", "q", "k", "v", "o"),  # of a paged cache k and v are (pages, heads, page_size, width)
    ("float*", "tau"),  # (batch, heads_q, length_q): the order in which rows are numbered
    ("int*", "iterations", "support"),  # likewise, or null
    ("unsigned char*", "tiles"),  # as in Params
    ("int*", "ranges"),  # Inputs.ranges, or null
    ("long long", "ranges_end", "ranges_batch"),  # from a row's first key to its end; strides
    ("int*", "table"),  # Inputs.block_table, where PAGED
    ("long long", "table_batch", "pages"),
    ("Part*", "parts"),  # (rows, parts)
    # (rows, list_length): lists of the parts, each at the place of its first key. Scores, and keys
    # counted from that one.
    ("float*", "scores"),
    ("unsigned short*", "offsets"),
    ("Solved*", "solved"),  # of each row
    ("float*", "partials", "masses"),  # of each row and weighed split: sum p v, sum p
    ("int*", "arrivals"),  # of each tile of rows: weighed splits that are summed
    ("long long", "list_length"),
    ("int", "heads_q", "heads_kv", "gqa_group", "length_q", "length_k", "page_size"),
    ("int", "left", "right", "shift"),  # ScoreTransform, where there are no ranges
    ("int", "splits", "weighed"),  # blocks among which keys are cut, to be scanned and weighed
    ("int", "row_scores"),  # from one row of a scan's scores to the next
    ("float", "c", "inv_c", "q_sign", "r"),  # as in Params
)

RowParams = _struct(  # of rows.cu
    "RowParams",
    ("void*", "x", "grad_y", "y", "grad_x"),
    ("long long", "stride_x", "stride_grad_y"),  # in elements; y is dense
    ("int", "rows", "length"),
    ("float", "c", "r"),  # alpha - 1 and 1 / (alpha - 1)
)


@functools.cache
def header() -> str:
    """``layout.cuh``."""
    lines = ["// Generated by layout.py.", "#pragma once", '#include "adasplash2/threshold.h"']
    for dtype, code in DTYPE_CODES.items():
        lines.append(f"#define ADASPLASH2_{str(dtype).removeprefix('torch.').upper()} {code}")
    lines += [
        # NVRTC has no offsetof(), but what its host compilers make theirs of.
        "#define ASSERT_FIELD(type, field, offset, size)                               \\",
        "  static_assert(__INTADDR__(&static_cast<type*>(nullptr)->field) == offset && \\",
        "                sizeof(type::field) == size)",
    ]
    lines.append("namespace adasplash2 {")
    lines += [
        f"static_assert(int(AlphaKind::{kind}) == {code});" for kind, code in ALPHA_KINDS.items()
    ]
    lines += [
        f"constexpr int k{name.title().replace('_', '')} = {value};"
        for name, value in globals().items()
        if name.isupper() and isinstance(value, int) and not name.startswith("_")
    ]
    for name, (keyword, fields) in _DECLARED.items():
        made = _TYPES[name]
        lines.append(f"{keyword} {name} {{")
        lines += [f"  {kind} {field};" for kind, *names in fields for field in names]
        lines.append("};")
        lines.append(f"static_assert(sizeof({name}) == {ctypes.sizeof(made)});")
        for _, *names in fields:
            for field in names:
                at = getattr(made, field)
                lines.append(f"ASSERT_FIELD({name}, {field}, {at.offset}, {at.size});")
    lines += ["}  // namespace adasplash2", "#undef ASSERT_FIELD"]
    return "\n".join(lines) + "\n"
