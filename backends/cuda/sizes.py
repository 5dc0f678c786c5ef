"""Sizes that the launcher and the kernels must agree on, and what follows from them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch

from adasplash2.problem import Problem

DTYPE_CODES = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}
"""The values of ``ADASPLASH2_DTYPE``."""

GROUP_ROWS = 16
"""``kGroupRows``: query rows that are an element group or a flat one together."""

ARENA_ROW = 64
"""``kArenaRow``: survivors that a group may keep, per row, before it turns flat."""

FLAT = 2
"""``kFlat``."""

CHECK_ROWS = 128
"""``kCheckRows``."""

ENTRY_BYTES = 8
RECORD_BYTES = 16
LIST_ENTRY_BYTES = 32
"""One entry of the four lists of a query row in the scans."""

ELEMENT_THREADS = 256
PREFIX_THREADS = 1024
SORT_THREADS, LONG_THREADS = 512, 128
LONG_BLOCKS, LONG_WAVES, LONG_PART_BYTES = 4, 2, 2048
"""``kLongBlocks``, ``kLongWaves`` and ``kLongPartBytes``."""

SHORT_COLUMN = 256
"""``kShortColumn``: survivors of a key that one warp sums; more take blocks."""

MAX_CAPACITY = 92
"""What ``kMaxList`` entries of a lane's list and some strips take (``lists.cuh``)."""

MIN_CAPACITY = 13
"""``kMinStrips`` strips, and entries for twice what one of them may add."""

RESERVED_SHARED = 1024
"""Shared memory that the driver takes from each block."""

HOPPER_KEYS = 128
"""``kTileKeys`` of ``scan90.cu``."""

HOPPER_RESERVED = 1280
"""What the start of its stages may lose to alignment, and its barriers."""

HOPPER_MAX_HEAD_DIM = 128
"""Wider queries leave ``scan90.cu`` too few registers."""


def padded(width: int) -> int:
    """A head_dim as the matrix fragments see it."""
    return -(-width // 16) * 16


def tile_bytes(rows: int, width: int, itemsize: int) -> int:
    """A tile in shared memory, with the padding of ``tile_stride``."""
    return rows * (padded(width) * itemsize + 16)


def lanes_per_row(width: int) -> int:
    """Lanes that share one row in the gathers."""
    return 8 if width <= 64 else 16 if width <= 128 else 32


class Dense(NamedTuple):
    """One of the two sets of kernels that serve flat rows: rows and threads of a block, dynamic
    shared memory by kernel, whether its tensors come by the copy engine."""

    output_unit: str
    grad_unit: str
    rows: int
    threads: int
    shared: Mapping[str, int]
    maps: bool


def portable_dense(head_dim: int, head_dim_v: int, itemsize: int) -> Dense:
    """``dense.cu``."""
    wide = itemsize == 4 and max(padded(head_dim), padded(head_dim_v)) > 128
    rows = 32 if wide else 64
    keys = tile_bytes(rows, head_dim, itemsize)
    values = tile_bytes(rows, head_dim_v, itemsize)
    shared = {
        "dense_output": 3 * keys + 2 * values,
        "dense_grad_rows": 3 * keys + 3 * values,
        "dense_grad_columns": 2 * keys + 2 * values,
    }
    return Dense("dense.cu", "dense.cu", rows, 2 * rows, shared, maps=False)


HOPPER_BOX = 64
"""``kBox`` of ``dense90.cuh``: rows that the copy engine brings at once."""


def hopper_dense(head_dim: int, head_dim_v: int) -> Dense:
    """``dense90.cuh``: what a block owns, stages of tiles, and what alignment may take."""
    rows, line, alignment = 128, 128, 1024
    keys, values = (-(-width // 64) * line for width in (head_dim, head_dim_v))  # bytes a row
    narrow = keys == values == line
    shared = {
        "dense_output": rows * (keys * (1 + (4 if narrow else 3)) + 2 * values),
        "dense_grad_rows": (keys + values) * (rows + 3 * (128 if narrow else 64)),
        "dense_grad_columns": (keys + values) * (rows + 3 * 64),
    }
    shared = {kernel: size + alignment for kernel, size in shared.items()}
    return Dense("dense90_output.cu", "dense90_grad.cu", rows, 384, shared, maps=True)


class SharedMemory(NamedTuple):
    """Bytes of shared memory that a block may ask for, and that a multiprocessor has."""

    per_block: int
    per_unit: int


@dataclass(frozen=True, slots=True)
class Scan:
    """One of the two scans: how many rows a block has, and what of its shared memory is taken."""

    unit: str
    rows: int
    threads: int
    fixed_shared: int
    blocks: int = 1  # that share a multiprocessor
    defines: tuple[tuple[str, int], ...] = ()
    maps_keys: bool = False  # whether its keys come by the copy engine

    def shared(self, capacity: int) -> int:
        """Dynamic shared memory where lists take that of ``capacity`` entries."""
        return self.fixed_shared + self.rows * capacity * LIST_ENTRY_BYTES

    def capacity(self, memory: SharedMemory) -> int | None:
        """Entries of a lane's list for which there is memory; None where too few."""
        share = memory.per_unit // self.blocks - RESERVED_SHARED
        left = min(memory.per_block, share) - self.fixed_shared
        fit = left // (self.rows * LIST_ENTRY_BYTES)
        return min(fit, MAX_CAPACITY) if fit >= MIN_CAPACITY else None


def portable_scan(head_dim: int, itemsize: int, blocks: int = 1) -> Scan:
    """``scan.cu``: two stages of keys, and float32 queries; ``blocks`` to a multiprocessor."""
    wide = itemsize == 4 and padded(head_dim) > 128
    rows, keys = (64, 32) if wide else (128, 64)
    stages = 2 * tile_bytes(keys, head_dim, itemsize)
    queries = 0 if itemsize == 2 else tile_bytes(rows, head_dim, itemsize)
    return Scan("scan.cu", rows, rows, stages + queries, blocks)


def hopper_scan(head_dim: int, warpgroups: int, stages: int, retry: bool = False) -> Scan:
    """``scan90.cu``: ``stages`` tiles of keys, ``warpgroups`` of 64 rows and one that copies."""
    panels = -(-padded(head_dim) // 64)
    return Scan(
        "scan90.cu",
        rows=warpgroups * 64,
        threads=warpgroups * 128 + 128,
        fixed_shared=HOPPER_RESERVED + stages * panels * HOPPER_KEYS * 128,
        defines=(("WARPGROUPS", warpgroups), ("STAGES", stages), ("RETRY", int(retry))),
        maps_keys=True,
    )


@dataclass(frozen=True, slots=True)
class Counts:
    """How many of everything a problem has."""

    groups_per_head: int
    groups: int
    rows: int
    heads: int
    kv_heads: int
    columns: int

    @staticmethod
    def of(problem: Problem) -> Counts:
        heads = problem.batch * problem.heads_q
        kv_heads = problem.batch * problem.heads_kv
        per_head = -(-problem.length_q // GROUP_ROWS)
        return Counts(
            groups_per_head=per_head,
            groups=heads * per_head,
            rows=heads * per_head * GROUP_ROWS,
            heads=heads,
            kv_heads=kv_heads,
            columns=kv_heads * problem.length_k,
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

    Its length is ``rows * (8 + 8 * ARENA_ROW)`` bytes and a little, whatever the data.
    """

    def __init__(self, counts: Counts) -> None:
        self._sizes = {
            "row_start": counts.rows * 4,
            "row_count": counts.rows * 4,
            "flat": counts.groups,
            "poison": counts.kv_heads * 4,
            "entries": counts.rows * ARENA_ROW * ENTRY_BYTES,
        }
        self.offsets, self.total = parts(self._sizes)

    def check(self, saved: torch.Tensor) -> None:
        """Raise ``ValueError`` where ``saved`` is too short. It may be longer."""
        if saved.numel() < self.total:
            raise ValueError(f"saved must have {self.total} bytes here, got {saved.numel()}")

    def span(self, saved: torch.Tensor, name: str) -> tuple[int, int]:
        """Address and bytes of one part."""
        return saved.data_ptr() + self.offsets[name], self._sizes[name]

    def part(self, saved: torch.Tensor, name: str) -> torch.Tensor:
        """One part as bytes."""
        at = self.offsets[name]
        return saved[at : at + self._sizes[name]]
