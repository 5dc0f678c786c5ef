"""Sizes that the launcher and the kernels must agree on, and what follows from them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from adasplash2.problem import Problem

WARP_ROWS = 32
"""``kWarpRows``: query rows of one group, which is an element group or a flat one."""

ARENA_ROW = 64
"""``kArenaRow``: survivors that a group may keep, per row, before it turns flat."""

ENTRY_BYTES = 8
RECORD_BYTES = 16
LIST_ENTRY_BYTES = 768
"""``kEntryBytes``: one entry of all survivor lists of a warp of the scan."""

SCAN_ROWS = 128
"""``kBlockRows`` of ``scan.cu``."""

SCAN_THREADS = 128
DENSE_ROWS = 64
"""``kRows`` and ``kTile`` of ``dense.cu``."""

DENSE_THREADS = 128
ELEMENT_THREADS = 256
PREFIX_THREADS = 1024
LONG_THREADS = 512
SHORT_COLUMN = 256
"""``kShortColumn``: survivors of a key that one warp sums; more take a block."""

MAX_CAPACITY = 32
"""Entries of a lane's list that ``kMaxRow`` (four lists) of ``elements.cu`` allows."""

MIN_CAPACITY = 20
"""Fewer overflow too often: a row of support 28 puts up to 20 into one of its four lists."""

MAX_LENGTH_K = 2**18
"""Keys that the 16-bit column codes of ``scan.cu`` reach."""

RESERVED_SHARED = 1024
"""Shared memory that the driver takes from each block."""


def padded(width: int) -> int:
    """A head_dim as the matrix fragments see it."""
    return -(-width // 16) * 16


def tile_bytes(rows: int, width: int, itemsize: int) -> int:
    """A tile in shared memory, with the padding of ``tile_stride``."""
    return rows * (padded(width) * itemsize + 16)


def lanes_per_row(width: int) -> int:
    """Lanes that share one row in the gathers."""
    return 8 if width <= 64 else 16 if width <= 128 else 32


def scan_shared(head_dim: int, itemsize: int, capacity: int) -> int:
    """Dynamic shared memory of ``scan``: two stages of 64 keys, the lists, float32 queries."""
    stages = 2 * tile_bytes(64, head_dim, itemsize)
    queries = 0 if itemsize == 2 else tile_bytes(SCAN_ROWS, head_dim, itemsize)
    return stages + queries + SCAN_ROWS // WARP_ROWS * capacity * LIST_ENTRY_BYTES


def dense_shared(head_dim: int, head_dim_v: int, itemsize: int) -> dict[str, int]:
    """Dynamic shared memory of the kernels of ``dense.cu``: tiles of 64 rows."""
    keys = tile_bytes(DENSE_ROWS, head_dim, itemsize)
    values = tile_bytes(DENSE_ROWS, head_dim_v, itemsize)
    return {
        "dense_output": 3 * keys + 2 * values,
        "dense_grad_rows": 3 * keys + 3 * values,
        "dense_grad_columns": 2 * keys + 2 * values,
    }


def scan_capacity(head_dim: int, itemsize: int, per_block: int, per_unit: int) -> int | None:
    """Entries of a lane's list that fit: with two blocks a multiprocessor if enough do, else
    with one; None where too few fit even then."""
    for limit in (min(per_block, per_unit // 2 - RESERVED_SHARED), per_block):
        left = limit - scan_shared(head_dim, itemsize, 0)
        fit = left // (SCAN_ROWS // WARP_ROWS * LIST_ENTRY_BYTES)
        if fit >= MIN_CAPACITY:
            return min(fit, MAX_CAPACITY)
    return None


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
        per_head = -(-problem.length_q // WARP_ROWS)
        return Counts(
            groups_per_head=per_head,
            groups=heads * per_head,
            rows=heads * per_head * WARP_ROWS,
            heads=heads,
            kv_heads=kv_heads,
            columns=kv_heads * problem.length_k,
        )


class Saved:
    """The parts of ``Forward.saved``: where each row's survivors are, and the survivors.

    Its length is ``rows * (8 + 8 * ARENA_ROW)`` bytes and a little, whatever the data.
    """

    def __init__(self, counts: Counts) -> None:
        sizes = {
            "row_start": counts.rows * 4,
            "row_count": counts.rows * 4,
            "flat": counts.groups,
            "poison": counts.kv_heads * 4,
            "entries": counts.rows * ARENA_ROW * ENTRY_BYTES,
        }
        self._ranges: dict[str, tuple[int, int]] = {}
        at = 0
        for name, size in sizes.items():
            self._ranges[name] = (at, size)
            at += math.ceil(size / 256) * 256
        self.total = at

    def part(self, saved: torch.Tensor, name: str) -> torch.Tensor:
        """One part as bytes."""
        at, size = self._ranges[name]
        return saved[at : at + size]
