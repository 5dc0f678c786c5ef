"""What follows from a problem's shape: the macros of the kernels, their blocks, their memory."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch

from adasplash2.backends.cuda import layout
from adasplash2.problem import Problem

RESERVED_SHARED = 1024
"""Shared memory that the driver takes from each block."""

HOPPER_RESERVED = layout.SWIZZLE_ALIGNMENT + 512
"""What the start of the stages of ``scan90.cu`` may lose to alignment, its barriers and notes."""


DECODE_KEY_BYTES = 64
"""Bytes of a key that four lanes load in one step."""

DECODE_WARPS = 8
"""Warps of a block that scans; a power of two."""

DECODE_HELD = 16
"""Rows whose scores it holds at most, of 4-byte types half as many; a power of two. Where more rows
share keys, several blocks read these."""

DECODE_SHARED = 224 * 1024
"""Shared memory of a multiprocessor that blocks of a scan use at most: what Hopper has in all is
rounded where it is shared out."""

DECODE_SPLIT_TILES = 8
"""The fewest tiles of a split: one for each warp."""

DECODE_WAVES = 8
"""Where more than so many thread blocks for each block of rows are at work at once, splits fill
these once. Else a short last wave would cost much, and of so many splits those are chosen that fill
it best."""

DECODE_RESIDENTS = 2, 1
"""Blocks of a scan that a multiprocessor has at a time: as a rule, and of 4-byte types and a
head_dim above 128, which were not timed with two. The launch bounds of ``decode_scan`` hold the
compiler to it."""

REGISTER_FILE = 65_536
"""Registers of a multiprocessor."""


def padded(width: int) -> int:
    """A head_dim as the matrix fragments see it."""
    return -(-width // 16) * 16


def tile_bytes(rows: int, width: int, itemsize: int) -> int:
    """A tile in shared memory, with the padding of ``tile_stride``."""
    return rows * (padded(width) * itemsize + 16)


def panels(width: int) -> int:
    """Panels of a tile that TMA brings."""
    return -(-width // layout.PANEL_COLUMNS)


def lanes_per_row(width: int) -> int:
    """Lanes that share one row in the gathers, eight elements each."""
    return 8 if width <= 64 else 16 if width <= 128 else 32


def number_bytes(count: int) -> int:
    """Of a number below ``count``, which may be a symbol: 2 where these suffice, else 4."""
    found: int = 2 + 2 * torch.sym_min(1, count // ((1 << 16) + 1))
    return found


def arena_bytes(head_dim_v: int, length_k: int) -> int:
    """Of the arena per query row: columns of survivors, or O2 of a flat row, in 16 bits. The length
    may be a symbol."""
    second = 2 * min(padded(head_dim_v), layout.HOPPER_MAX_HEAD_DIM)
    found: int = torch.sym_max(layout.ARENA_ROW * number_bytes(length_k), second)
    return found


def keeps_weights(alpha: float) -> bool:
    """Whether the backward needs what the scan made of scores: above alpha = 2 another rounding of
    them may be more than a window."""
    return alpha_code(alpha) == layout.ALPHA_KINDS["kGeneral"]


def row_bits(problem: Problem) -> int:
    """``Params.row_bits``: the bits of a row's number in which its place in its head stands."""
    return (problem.length_q - 1).bit_length()


def row_numbers(problem: Problem) -> int:
    """How far the rows that share keys are numbered in the backward."""
    return problem.gqa_group << row_bits(problem)


def kind_defines(
    dtype: torch.dtype,
    head_dim: int,
    head_dim_v: int,
    alpha: float,
    *,
    causal: bool,
    aligned: bool,
    length_k: int = 1,
    rows: int = 1,
) -> dict[str, int]:
    """The macros that every kernel expects (``kernels/common.cuh``). Those that number keys and the
    ``rows`` that share them are told how many there are."""
    return {
        "DTYPE": layout.DTYPE_CODES[dtype],
        "HEAD_DIM": head_dim,
        "HEAD_DIM_V": head_dim_v,
        "ALPHA": alpha_code(alpha),
        "CAUSAL": int(causal),
        "ALIGNED": int(aligned),
        "ARENA_BYTES": arena_bytes(head_dim_v, length_k),
        "KEY_BYTES": number_bytes(length_k),
        "ROW_BYTES": number_bytes(rows),
        "KEEPS_WEIGHTS": int(keeps_weights(alpha)),
        "OUTPUT_LANES": lanes_per_row(head_dim_v),
        "GRAD_LANES": lanes_per_row(max(head_dim, head_dim_v)),
    }


def alpha_code(alpha: float) -> int:
    """The ``AlphaKind`` of ``alpha``."""
    return layout.ALPHA_KINDS[{1.5: "k15", 2.0: "k2"}.get(alpha, "kGeneral")]


@dataclass(frozen=True, slots=True)
class Dense:
    """One of the two sets of kernels that serve flat rows.

    ``key_blocks``: blocks of ``dense_grad_columns`` for one tile of keys. ``shared``: dynamic
    shared memory by kernel. ``maps``: whether TMA brings the tensors.
    """

    output_unit: str
    grad_unit: str
    rows: int
    threads: int
    key_blocks: int
    shared: Mapping[str, int]
    geometry: Mapping[str, int]
    maps: bool

    @property
    def defines(self) -> dict[str, int]:
        """Macros: the shape of its blocks, and the shared memory that they are given."""
        given = {f"SHARED_{kernel.upper()}": size for kernel, size in self.shared.items()}
        return {**self.geometry, **given}

    def blocks(self, tiles: int, multiprocessors: int) -> int:
        """Blocks that work on so many tiles together; as many as tiles where they are too many to
        be distributed (``Share`` in ``dense90_grad.cu``)."""
        if tiles > self.threads * layout.DISTRIBUTED_TILES:
            return tiles
        return min(tiles, max(multiprocessors, -(-tiles // layout.MOST_TILES)))


@functools.cache
def portable_dense(head_dim: int, head_dim_v: int, itemsize: int) -> Dense:
    """``dense.cu``, and ``exact.cu``, whose blocks have the same shape."""
    wide = itemsize == 4 and max(padded(head_dim), padded(head_dim_v)) > 128
    rows = 32 if wide else 64  # wide float32 tiles fill the shared memory at half the rows
    keys = tile_bytes(rows, head_dim, itemsize)
    values = tile_bytes(rows, head_dim_v, itemsize)
    weights = rows * rows * ctypes.sizeof(ctypes.c_float)
    # The sums of both gradients of wide heads do not fit the registers together.
    key_blocks = 2 if padded(head_dim) + padded(head_dim_v) > 256 else 1
    return Dense(
        output_unit="dense.cu",
        grad_unit="dense.cu",
        rows=rows,
        threads=2 * rows,  # 16 rows a warp
        key_blocks=key_blocks,
        shared={
            "dense_output": 3 * keys + 2 * values,
            "dense_grad_rows": 3 * keys + 3 * values,
            "dense_grad_columns": 2 * keys + 2 * values,
            "exact_output": 2 * keys + values + weights,
            "exact_grad_rows": 2 * keys + 2 * values + weights,
            "exact_grad_columns": 2 * keys + 2 * values + weights,
        },
        geometry={"BLOCK_ROWS": rows, "KEY_BLOCKS": key_blocks},
        maps=False,
    )


def hopper_dense(head_dim: int, head_dim_v: int, length_k: int) -> Dense:
    """``dense90.cuh``: what a block owns, and stages of tiles. Where there is room for all keys of
    a head they stay there."""
    rows = layout.DENSE_WARPGROUPS * layout.WARPGROUP_ROWS
    keys, values = (panels(width) * layout.SWIZZLE_BYTES for width in (head_dim, head_dim_v))
    narrow = keys == values == layout.SWIZZLE_BYTES
    stay = narrow and length_k <= layout.STAYING_TILES * layout.HOPPER_KEYS
    key_stages = layout.STAYING_TILES if stay else 4 if narrow else 3
    grad_keys = 128 if narrow else 64
    own = 2 if narrow else 1  # what a block owns of a tile, and of the next one
    shared = {
        "dense_output": rows * keys
        + layout.HOPPER_KEYS * (key_stages * keys + layout.DENSE_VALUE_STAGES * values),
        "dense_grad_rows": (keys + values) * (own * rows + layout.GRAD_STAGES * grad_keys),
        "dense_grad_columns": (keys + values)
        * (own * rows + layout.GRAD_STAGES * layout.GRAD_QUERIES),
    }
    return Dense(
        output_unit="dense90_output.cu",
        grad_unit="dense90_grad.cu",
        rows=rows,
        threads=(layout.DENSE_WARPGROUPS + 1) * layout.WARPGROUP_THREADS,
        key_blocks=1,
        shared={kernel: size + layout.SWIZZLE_ALIGNMENT for kernel, size in shared.items()},
        geometry={
            "KEY_STAGES": key_stages,
            "KEYS_STAY": int(stay),
            "GRAD_KEYS": grad_keys,
            "OWN_STAGES": own,
        },
        maps=True,
    )


class SharedMemory(NamedTuple):
    """Bytes of shared memory that a block may ask for, and that a multiprocessor has."""

    per_block: int
    per_multiprocessor: int


@dataclass(frozen=True, slots=True)
class Scan:
    """One of the two scans: how many rows a block has, and what of its shared memory is taken."""

    unit: str
    rows: int
    threads: int
    fixed_shared: int
    geometry: Mapping[str, int]
    blocks: int = 1  # that share a multiprocessor
    maps_keys: bool = False  # whether TMA brings its keys

    def shared(self, capacity: int) -> int:
        """Dynamic shared memory where lists take that of ``capacity`` entries."""
        return self.fixed_shared + capacity * self._entry_bytes

    def capacity(self, memory: SharedMemory) -> int | None:
        """Entries of a lane's list for which there is memory; None where too few."""
        share = memory.per_multiprocessor // self.blocks - RESERVED_SHARED
        fit = (min(memory.per_block, share) - self.fixed_shared) // self._entry_bytes
        return min(fit, layout.MAX_CAPACITY) if fit >= layout.MIN_CAPACITY else None

    def defines_for(self, capacity: int) -> dict[str, int]:
        """Macros: the shape of its blocks, and the shared memory that they are given."""
        return {**self.geometry, "CAPACITY": capacity, "SHARED_SCAN": self.shared(capacity)}

    @property
    def _entry_bytes(self) -> int:
        return self.rows * layout.LIST_LANES * layout.LIST_ENTRY_BYTES


@functools.cache
def portable_scan(head_dim: int, itemsize: int, blocks: int = 1) -> Scan:
    """``scan.cu``: stages of keys, and float32 queries; ``blocks`` to a multiprocessor."""
    wide = itemsize == 4 and padded(head_dim) > 128
    rows, keys = (64, 32) if wide else (128, 64)
    stages = layout.SCAN_STAGES * tile_bytes(keys, head_dim, itemsize)
    queries = 0 if itemsize == 2 else tile_bytes(rows, head_dim, itemsize)
    return Scan(
        "scan.cu",
        rows=rows,
        threads=rows // layout.SCAN_WARP_ROWS * 32,
        fixed_shared=stages + queries,
        geometry={"BLOCK_ROWS": rows, "TILE_KEYS": keys},
        blocks=blocks,
    )


@functools.cache
def hopper_scan(head_dim: int, warpgroups: int, stages: int, retry: bool = False) -> Scan:
    """``scan90.cu``: ``stages`` tiles of keys, ``warpgroups`` that filter and one that copies."""
    tile = layout.HOPPER_KEYS * panels(head_dim) * layout.SWIZZLE_BYTES
    return Scan(
        "scan90.cu",
        rows=warpgroups * layout.WARPGROUP_ROWS,
        threads=(warpgroups + 1) * layout.WARPGROUP_THREADS,
        fixed_shared=HOPPER_RESERVED + stages * tile,
        geometry={"WARPGROUPS": warpgroups, "STAGES": stages, "RETRY": int(retry)},
        maps_keys=True,
    )


class Decode(NamedTuple):
    """A block of ``decode_scan``: scores of ``held`` rows and ``tiles`` tiles of keys fit into its
    shared memory, beside ``fixed`` bytes of it and ``static`` ones that the kernel declares.
    ``residents``: blocks that a multiprocessor has room for.
    """

    held: int
    tiles: int
    fixed: int
    static: int
    residents: int

    @property
    def threads(self) -> int:
        return 32 * DECODE_WARPS

    @property
    def row_warps(self) -> int:
        """Parts into which a row's keys of a split are listed."""
        return max(1, DECODE_WARPS // self.held)

    @property
    def defines(self) -> dict[str, int]:
        """Macros: the shape of its blocks, and the shared memory that they are given."""
        return {
            "HELD_ROWS": self.held,
            "WARPS": DECODE_WARPS,
            "RESIDENTS": self.residents,
            "FIXED_DECODE_SCAN": self.fixed,
            "STATIC_DECODE_SCAN": self.static,
        }

    @property
    def shared(self) -> int:
        """The most dynamic shared memory of a block."""
        return self.fixed + 4 * self.held * self._row_scores(self.tiles)

    def row_scores(self, keys: int, splits: int) -> int:
        """Scores of a row that a block has room for, of ``splits`` of all ``keys``."""
        return self._row_scores(-(-_tiles(keys) // splits))

    @staticmethod
    def _row_scores(tiles: int) -> int:
        # Rows begin on different banks: those of two lanes' rows of a tile are 8 apart.
        return tiles * layout.DECODE_TILE + 4

    def splits(self, blocks: int, keys: int, multiprocessors: int) -> int:
        """Among how many blocks the keys of each of ``blocks`` are cut, so that all that are at
        work at once are busy until the end."""
        tiles = _tiles(keys)
        least = max(1, -(-tiles // self.tiles))
        most = max(least, tiles // DECODE_SPLIT_TILES)
        at_once = self.residents * multiprocessors
        if blocks * DECODE_WAVES <= at_once:
            return max(least, min(at_once // blocks, most))

        def busy(splits: int) -> float:
            waves = -(-blocks * splits // at_once)
            return blocks * splits / (waves * at_once)

        return max(range(least, min(least + DECODE_WAVES, most) + 1), key=busy)


def _tiles(keys: int) -> int:
    return -(-keys // layout.DECODE_TILE)


def above(number: int) -> int:
    """The smallest power of two that is at least that."""
    return 1 << (number - 1).bit_length()


def decode(rows: int, head_dim: int, itemsize: int, memory: SharedMemory) -> Decode | None:
    """Blocks where ``rows`` of queries share keys; None where there is too little memory."""
    held = min(above(rows), DECODE_HELD if itemsize == 2 else DECODE_HELD // 2)
    rows = -(-held // layout.DECODE_ROW_TILE) * layout.DECODE_ROW_TILE  # as products have them
    steps = -(-head_dim * itemsize // DECODE_KEY_BYTES)
    fixed = steps * DECODE_KEY_BYTES * rows  # the queries
    static = 8 * rows + 4 * held * 8 * DECODE_WARPS  # keys of each row; scores of subsets
    residents = DECODE_RESIDENTS[itemsize == 4 or steps > 4]
    share = min(memory.per_multiprocessor, DECODE_SHARED) // residents - RESERVED_SHARED
    room = (min(memory.per_block, share) - fixed - static) // (4 * held) - 4
    if room < layout.DECODE_TILE:
        return None
    tiles = min(room, layout.DECODE_PART) // layout.DECODE_TILE
    return Decode(held, tiles, fixed, static, residents)


@dataclass(frozen=True, slots=True)
class Counts:
    """How many of everything a problem has."""

    row_blocks_per_head: int
    row_blocks: int
    rows: int
    heads: int
    kv_heads: int
    columns: int
    key_blocks: int

    @staticmethod
    def of(problem: Problem) -> Counts:
        heads = problem.batch * problem.heads_q
        kv_heads = problem.batch * problem.heads_kv
        per_head = -(-problem.length_q // layout.ROW_BLOCK)
        return Counts(
            row_blocks_per_head=per_head,
            row_blocks=heads * per_head,
            rows=heads * per_head * layout.ROW_BLOCK,
            heads=heads,
            kv_heads=kv_heads,
            columns=kv_heads * problem.length_k,
            key_blocks=kv_heads * -(-problem.length_k // layout.ROW_BLOCK),
        )


def parts(nbytes: Mapping[str, int]) -> tuple[dict[str, int], int]:
    """Offsets of parts of one allocation, each on 256 bytes, and the whole size; in bytes."""
    offsets, at = {}, 0
    for name, size in nbytes.items():
        offsets[name] = at
        at += -(-size // 256) * 256
    return offsets, at


class Saved:
    """The parts of ``Forward.saved``: where each row's survivors are, and the survivors.

    Its length follows from the shape, whatever the data: ``rows * (12 + 2 * ARENA_ROW)`` bytes and
    a little, up to a head_dim of 64 and 65,536 keys and where alpha has a closed form. To that
    little belongs a bit for each 16 rows and 64 keys.
    """

    def __init__(self, problem: Problem) -> None:
        counts = Counts.of(problem)
        self.weights = counts.rows * layout.ARENA_ROW * 4
        """Bytes of those of all survivors, wherever they are."""
        self.keeps_weights = keeps_weights(problem.alpha)
        weights = (
            {"weights": self.weights} if self.keeps_weights else {"first_weight": counts.rows * 4}
        )
        self._sizes = {
            "row_start": counts.rows * 4,
            "row_count": counts.rows * 4,
            "flat": counts.row_blocks,
            "poison": counts.kv_heads * 4,
            "unsafe_output": 4,
            **weights,
            "columns": counts.rows * arena_bytes(problem.head_dim_v, problem.length_k),
        }
        if problem.dtype.itemsize == 2 and not self.keeps_weights:  # else dense90.cuh has no part
            words = -(-problem.length_k // layout.LIVE_WORD_KEYS)
            self._sizes["live"] = counts.row_blocks * words * 4
        self.offsets, self.total = parts(self._sizes)

    def check(self, saved: torch.Tensor) -> None:
        """Raise ``ValueError`` where ``saved`` is too short. It may be longer."""
        if saved.numel() < self.total:
            raise ValueError(f"saved must have {self.total} bytes here, got {saved.numel()}")

    def span(self, saved: torch.Tensor, name: str, last: str = "") -> tuple[int, int]:
        """Address and bytes of one part, or of several up to ``last``."""
        at, last = self.offsets[name], last or name
        return saved.data_ptr() + at, self.offsets[last] + self._sizes[last] - at

    def part(self, saved: torch.Tensor, name: str) -> torch.Tensor:
        """One part as bytes."""
        at = self.offsets[name]
        return saved[at : at + self._sizes[name]]
