"""Few queries without gradients against long caches: the launches of ``kernels/decode.cu``."""

from __future__ import annotations

import ctypes
import functools

import torch
from torch import Tensor

from adasplash2.backends.cuda import configurations, driver, layout, sizes
from adasplash2.backends.cuda.attention import Compiled, score_constants, unit_stride
from adasplash2.contract import AttentionStats, Forward
from adasplash2.problem import Inputs, Problem, allowed_tiles, by_kind

CACHED_PLANS = 1024


class Kernels:
    """What all problems of one kind have in common, as a cache that grows has with itself."""

    def __init__(self, problem: Problem, aligned: bool) -> None:
        block = configurations.decode_of(problem)
        if block is None:
            raise RuntimeError(f"decode.cu has no room for keys on {problem.device}")
        self.block = block
        self.options = sizes.kind_defines(
            problem.dtype,
            problem.head_dim,
            problem.head_dim_v,
            problem.alpha,
            causal=False,  # which keys are seen comes with the call
            aligned=aligned,
        ) | {"PAGED": int(problem.page_size > 0), **block.defines}
        self.compiled = Compiled(driver.index(problem.device))


_kernels = by_kind(CACHED_PLANS)(Kernels)


class Plan:
    """One problem on one device: constants, kernels, and where its memory goes."""

    def __init__(self, problem: Problem, aligned: bool) -> None:
        kernels = _kernels(problem, aligned)
        self._compiled, self._options = kernels.compiled, kernels.options
        self._block = block = kernels.block
        key_heads = problem.batch * problem.heads_kv
        shared_rows = problem.gqa_group * problem.length_q
        self._rows = rows = key_heads * shared_rows
        blocks = key_heads * -(-shared_rows // block.held)
        multiprocessors = torch.cuda.get_device_properties(problem.device).multi_processor_count
        splits = block.splits(blocks, problem.length_k, multiprocessors)
        self._scanned = blocks * splits
        parts = splits * block.row_warps
        weighed = -(-parts * 32 // layout.WEIGH_THREADS)
        tiles = key_heads * -(-shared_rows // layout.DECODE_ROW_TILE)
        self._weighed = tiles * weighed
        tile = layout.DECODE_TILE
        list_length = -(-problem.length_k // tile) * tile
        width = 8 * self._options["OUTPUT_LANES"]
        offsets, self.scratch = sizes.parts(
            {
                "parts": ctypes.sizeof(layout.Part) * rows * parts,
                "scores": 4 * rows * list_length,
                "offsets": 2 * rows * list_length,
                "solved": ctypes.sizeof(layout.Solved) * rows,
                "partials": 4 * rows * weighed * width,
                "masses": 4 * rows * weighed,
                "arrivals": 4 * tiles,
            }
        )
        self.places = driver.places(offsets, layout.DecodeParams)
        beyond = problem.length_q + problem.length_k  # no window need reach further
        left, right = (min(side, beyond) for side in (problem.scores.left, problem.scores.right))
        constants = driver.params(
            {
                "heads_q": problem.heads_q,
                "heads_kv": problem.heads_kv,
                "gqa_group": problem.gqa_group,
                "length_q": problem.length_q,
                "length_k": problem.length_k,
                "page_size": problem.page_size,
                "left": left,
                "right": right,
                "shift": problem.shift,
                "splits": splits,
                "weighed": weighed,
                "row_scores": block.row_scores(problem.length_k, splits),
                "list_length": list_length,
                **score_constants(problem),
            },
            layout.DecodeParams,
        )
        self._constants = driver.words(constants)

    def call(self) -> driver.Call:
        """A call whose argument block has the constants."""
        return driver.Call(self._compiled.device, self._constants, layout.DecodeParams)

    @functools.cached_property
    def launches(self) -> tuple[driver.Launch, ...]:
        """In order."""
        block = self._block
        return (
            self._launch("decode_scan", self._scanned, block.threads, block.shared),
            self._launch("decode_solve", self._rows, layout.SOLVE_THREADS),
            self._launch("decode_weigh", self._weighed, layout.WEIGH_THREADS),
        )

    def _launch(self, kernel: str, blocks: int, threads: int, shared: int = 0) -> driver.Launch:
        found = self._compiled.kernel("decode.cu", kernel, lambda: (self._options, shared))
        return functools.partial(found, (blocks, 1), threads, ())


def forget() -> None:
    """Drop all plans, and what they share."""
    plan_of.cache_clear()
    _kernels.cache_clear()


@functools.lru_cache(CACHED_PLANS)
def plan_of(problem: Problem, aligned: bool) -> Plan:
    """The plan for these, made at the first call."""
    return Plan(problem, aligned)


def forward(problem: Problem, inputs: Inputs, counted: dict[str, Tensor] | None = None) -> Forward:
    """Output and thresholds; ``counted`` are the counts of ``DecodeParams``, which start as zeros.

    Lists take 6 bytes a row and key. Few of them are written where few keys reach a bound.
    """
    query, key, value = (unit_stride(x) for x in inputs.tensors())
    plan = plan_of(problem, configurations.is_aligned(key, value))
    shape = (problem.batch, problem.heads_q, problem.length_q)
    device = problem.device
    out = torch.empty((*shape, problem.head_dim_v), dtype=problem.dtype, device=device)
    tau = torch.empty(shape, dtype=torch.float32, device=device)
    scratch = torch.empty(plan.scratch, dtype=torch.uint8, device=device)
    call = plan.call()
    call.put_parts(scratch, plan.places)
    call.put_view("q", query)
    call.put_view("k", key)
    call.put_view("v", value)
    call.put_view("o", out)
    call.put_pointer("tau", tau)
    # What the launches read must live until they are made: hence names.
    ranges, table = inputs.ranges, inputs.block_table
    if ranges is not None:
        ranges = unit_stride(ranges)
        call.put_pointer("ranges", ranges)
        call.put_number("ranges_end", ranges.stride(0))
        call.put_number("ranges_batch", ranges.stride(1) if ranges.shape[1] > 1 else 0)
    if table is not None:
        table = unit_stride(table)
        call.put_pointer("table", table)
        call.put_number("table_batch", table.stride(0))
        call.put_number("pages", key.shape[0])
    for field, tensor in (counted or {}).items():
        call.put_pointer(field, tensor)
    with call:
        for launch in plan.launches:
            launch(call)
    return Forward(out, tau, scratch.new_empty(0))


def stats(problem: Problem, inputs: Inputs) -> AttentionStats:
    """A forward that counts what it did."""
    shape = (problem.batch, problem.heads_q, problem.length_q)
    tiles = (
        *shape[:2],
        *(-(-n // layout.STATS_TILE) for n in (problem.length_q, problem.length_k)),
    )
    counted = {
        "iterations": torch.zeros(shape, dtype=torch.int32, device=problem.device),
        "support": torch.zeros(shape, dtype=torch.int32, device=problem.device),
        "tiles": torch.zeros(tiles, dtype=torch.uint8, device=problem.device),
    }
    tau = forward(problem, inputs, counted).tau
    allowed = allowed_tiles(problem, inputs, layout.STATS_TILE).to(torch.float64)
    live = counted["tiles"].sum((2, 3), dtype=torch.float64)
    empty = (allowed - live) / allowed.clamp(min=1.0)
    return AttentionStats(tau, counted["support"], counted["iterations"], empty, backend="cuda")
