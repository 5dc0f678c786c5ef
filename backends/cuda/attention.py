"""Attention: which kernels a call launches, in which order, with what memory.

A :class:`Plan` has what a problem needs besides its tensors: sizes, grids, constants. It is made
once per problem, configuration and alignment, so that a call fills in pointers and launches. What
does not follow from sizes, :class:`Kernels`, plans of one kind share.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Collection, Hashable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from adasplash2.backends.cuda import configurations, driver, layout, sizes
from adasplash2.contract import AttentionStats, Config, Forward, Gradients, Kept
from adasplash2.problem import Inputs, Problem, by_kind

MAX_INVERSE = 1e30
"""The largest ``1 / c``: bounds lie a few times that below scores, and must be finite numbers."""

EXACT_BLOCKS = 2
"""Blocks of ``exact.cu`` for each multiprocessor: what is marked is shared among them."""

CACHED_PLANS = 1024


class Scratch(NamedTuple):
    """Where the parts of an allocation of ``total`` bytes go, of which the first ``zeroed`` must be
    zeros."""

    places: tuple[tuple[int, int], ...]
    zeroed: int
    total: int


Made = Callable[[], tuple[Mapping[str, int], int]]
"""Makes the macros of a kernel, and its dynamic shared memory."""


class Compiled:
    """Kernels for one device by unit, name and variant. Their macros are put together once: that
    takes longer than a launch."""

    def __init__(self, device: int) -> None:
        self.device = device
        self._found: dict[Hashable, driver.Kernel] = {}

    def kernel(self, unit: str, name: str, made: Made, variant: Hashable = None) -> driver.Kernel:
        """``variant`` tells apart those of one name."""
        key = unit, name, variant
        found = self._found.get(key)
        if found is None:
            options, shared = made()
            found = driver.kernel(self.device, unit, name, tuple(options.items()), shared)
            self._found[key] = found
        return found


class Kernels:
    """What all problems of one kind have in common: macros, blocks of kernels, and these."""

    def __init__(
        self, problem: Problem, items: tuple[tuple[str, int | str], ...], aligned: bool
    ) -> None:
        config = dict(items)
        self.options = sizes.kind_defines(
            problem.dtype,
            problem.head_dim,
            problem.head_dim_v,
            problem.alpha,
            causal=problem.scores.is_causal,
            aligned=aligned,
            length_k=problem.length_k,
            rows=sizes.row_numbers(problem),
        )
        self.scan = configurations.scan_of(problem, config)
        self.dense = configurations.dense_of(problem, self.scan)
        self.compiled = Compiled(driver.index(problem.device))


_kernels = by_kind(CACHED_PLANS)(Kernels)


class Plan:
    """One problem on one device."""

    def __init__(self, problem: Problem, config: Config, aligned: bool) -> None:
        self.problem = problem
        self.counts = sizes.Counts.of(problem)
        self.saved = sizes.Saved(problem)
        self.saved_places = driver.places(self.saved.offsets)
        kernels = _kernels(problem, tuple(config.items()), aligned)
        self._compiled, self._options = kernels.compiled, kernels.options
        self._scan, self._dense = kernels.scan, kernels.dense
        self._scans_first = config != configurations.DENSE
        constants = driver.params(
            {
                "batch": problem.batch,
                "heads_q": problem.heads_q,
                "heads_kv": problem.heads_kv,
                "gqa_group": problem.gqa_group,
                "length_q": problem.length_q,
                "length_k": problem.length_k,
                "row_blocks": self.counts.row_blocks_per_head,
                "long_limit": layout.SHORT_COLUMN,
                "row_bits": sizes.row_bits(problem),
                "scale": problem.scores.scale,
                **score_constants(problem),
            }
        )
        self._constants = driver.words(constants)

    def call(self) -> driver.Call:
        """A call whose argument block has the constants."""
        return driver.Call(self._compiled.device, self._constants)

    def start(self, call: driver.Call, saved: Tensor) -> None:
        """Set what must have a value before the first kernel."""
        if self._scans_first:
            call.fill(*self.saved.span(saved, "poison", "unsafe_output"))
        else:  # ``check_finite`` sets the rest
            call.fill(*self.saved.span(saved, "flat"), layout.FLAT)

    @functools.cached_property
    def scratch(self) -> Scratch:
        """The backward's own memory; what must start as zeros is first."""
        counts = self.counts
        entries = counts.rows * layout.ARENA_ROW
        long_parts = layout.LONG_WAVES * self._long_blocks
        offsets, total = sizes.parts(
            {
                "column_count": 4 * counts.columns,
                "long_columns": 4 * (1 + entries // layout.SHORT_COLUMN),
                "long_done": 4 * long_parts,
                "unsafe_grads": 8,
                "unsafe_rows": counts.row_blocks,
                "unsafe_keys": 2 * counts.key_blocks,
                "column_start": 4 * counts.columns,
                **({"all_flat": 4 * counts.kv_heads} if self._dense.maps else {}),
                "rows": self._options["ROW_BYTES"] * entries,
                "terms": ctypes.sizeof(layout.Terms) * counts.rows,
                "delta": 4 * counts.heads * self.problem.length_q,
                "long_parts": layout.LONG_PART_BYTES * long_parts,
            }
        )
        return Scratch(driver.places(offsets), offsets["column_start"], total)

    @functools.cached_property
    def scans(self) -> tuple[driver.Launch, ...]:
        """The scan, or what replaces it; where keys come by TMA, the retry."""
        scan, counts = self._scan, self.counts
        if self._scans_first:
            first = self._launch_scan(scan, counts.heads * -(-self.problem.length_q // scan.rows))
        else:
            tiles_q, tiles_k = (
                -(-length // layout.CHECK_ROWS)
                for length in (self.problem.length_q, self.problem.length_k)
            )
            blocks = counts.heads * tiles_q + counts.kv_heads * tiles_k
            first = self._elements("check_finite", blocks)
        if not scan.maps_keys:
            return (first,)
        retry = sizes.hopper_scan(self.problem.head_dim, *configurations.RETRY_SHAPE, retry=True)
        return (first, self._launch_scan(retry, self._multiprocessors, "retry"))

    @functools.cached_property
    def forward(self) -> tuple[driver.Launch, ...]:
        """What follows the scan."""
        return self._outputs(
            layout.OUTPUT_SAVES if self.problem.needs_grad else layout.OUTPUT_PLAIN
        )

    @functools.cached_property
    def forward_counted(self) -> tuple[driver.Launch, ...]:
        """The same where the call counts what it did."""
        return self._outputs(layout.OUTPUT_COUNTS)

    @functools.cached_property
    def backward(self) -> tuple[driver.Launch, ...]:
        problem, counts, dense = self.problem, self.counts, self._dense
        lanes = self._options["GRAD_LANES"]
        query_tiles, key_tiles = (
            self._dense_blocks(tiles)
            for tiles in (self._query_tiles, counts.kv_heads * -(-problem.length_k // dense.rows))
        )
        names = "q", "k", "v", "grad_o"
        return (
            self._gathers("count_columns", counts.row_blocks),
            self._elements("prefix_columns", counts.kv_heads, layout.PREFIX_THREADS),
            self._gathers("grad_rows", -(-counts.rows * lanes // layout.ELEMENT_THREADS)),
            self._elements("grad_columns", -(-counts.columns * lanes // layout.ELEMENT_THREADS)),
            self._elements("sort_long_columns", self._long_blocks, layout.SORT_THREADS),
            self._elements("grad_long_columns", self._long_blocks, layout.LONG_THREADS),
            self._launch_dense(dense.grad_unit, "dense_grad_rows", (query_tiles,), names),
            self._launch_exact("exact_grad_rows"),  # the next one needs their delta
            self._launch_dense(
                dense.grad_unit, "dense_grad_columns", (key_tiles, dense.key_blocks), names
            ),
            self._launch_exact("exact_grad_columns", 2),
        )

    def _outputs(self, kind: int) -> tuple[driver.Launch, ...]:
        dense, tiles = self._dense, (self._query_tiles,)
        lanes = self._options["OUTPUT_LANES"]
        # The portable kernel saves nothing, and always counts.
        options = {"OUTPUT": kind} if dense.maps else {}
        return (
            self._gathers("output", -(-self.counts.rows * lanes // layout.ELEMENT_THREADS)),
            self._launch_dense(
                dense.output_unit, "dense_output", tiles, ("q", "k", "v"), **options
            ),
            self._launch_exact("exact_output"),
        )

    @functools.cached_property
    def _multiprocessors(self) -> int:
        found: int = torch.cuda.get_device_properties(self.problem.device).multi_processor_count
        return found

    @property
    def _long_blocks(self) -> int:
        return layout.LONG_BLOCKS * self._multiprocessors

    @property
    def _query_tiles(self) -> int:
        return self.counts.heads * -(-self.problem.length_q // self._dense.rows)

    def _dense_blocks(self, tiles: int) -> int:
        """Blocks that work on so many tiles, one after another. Those of causal problems, which
        differ, go to whichever block ends first: one each."""
        alone = not self._dense.maps or self.problem.scores.is_causal
        return tiles if alone else self._dense.blocks(tiles, self._multiprocessors)

    def _launch_scan(
        self, scan: sizes.Scan, blocks: int, variant: Hashable = None
    ) -> driver.Launch:
        def made() -> tuple[Mapping[str, int], int]:
            capacity = scan.capacity(configurations.shared_memory(self.problem.device))
            if capacity is None:
                raise RuntimeError(f"{scan.unit} has no room for lists on {self.problem.device}")
            return self._options | scan.defines_for(capacity), scan.shared(capacity)

        maps = (("k", layout.HOPPER_KEYS),) if scan.maps_keys else ()
        return self._launch(scan.unit, "scan", made, (blocks,), scan.threads, maps, variant)

    def _elements(
        self, kernel: str, blocks: int, threads: int = layout.ELEMENT_THREADS
    ) -> driver.Launch:
        # The gathers depend on neither the masks nor the lists: one variant serves all.
        def made() -> tuple[Mapping[str, int], int]:
            return self._options | {"CAUSAL": 0}, 0

        return self._launch("elements.cu", kernel, made, (blocks,), threads)

    def _gathers(self, kernel: str, items: int) -> driver.Launch:
        """One whose blocks take some of ``items`` each, however many those are."""
        enough = layout.ITEM_BLOCKS * self._multiprocessors
        most = layout.MOST_ITEMS if self.problem.dtype.itemsize == 2 else 1
        each = max(1, min(most, items // enough))
        return self._elements(kernel, -(-items // each))

    def _launch_dense(
        self,
        unit: str,
        kernel: str,
        blocks: tuple[int, ...],
        names: tuple[str, ...],
        **options: int,
    ) -> driver.Launch:
        dense = self._dense
        maps = tuple((name, layout.DENSE_BOX) for name in names) if dense.maps else ()

        def made() -> tuple[Mapping[str, int], int]:
            return self._options | dense.defines | options, dense.shared[kernel]

        variant = tuple(options.values())
        return self._launch(unit, kernel, made, blocks, dense.threads, maps, variant)

    def _launch_exact(self, kernel: str, gradients: int = 1) -> driver.Launch:
        """What a dense kernel marked, by as many blocks as are at work at once."""
        problem = self.problem
        dense = sizes.portable_dense(problem.head_dim, problem.head_dim_v, problem.dtype.itemsize)

        def made() -> tuple[Mapping[str, int], int]:
            return self._options | dense.defines, dense.shared[kernel]

        blocks = EXACT_BLOCKS * self._multiprocessors, gradients
        return self._launch("exact.cu", kernel, made, blocks, dense.threads)

    def _launch(
        self,
        unit: str,
        kernel: str,
        made: Made,
        blocks: tuple[int, ...],
        threads: int,
        maps: driver.Maps = (),
        variant: Hashable = None,
    ) -> driver.Launch:
        found = self._compiled.kernel(unit, kernel, made, variant)
        return functools.partial(found, (*blocks, 1)[:2], threads, maps)


def score_constants(problem: Problem) -> dict[str, float]:
    """How ``q . k`` becomes ``z``, as ``score.cuh`` has it, and the power of ``z - tau``."""
    factor = (problem.alpha - 1.0) * abs(problem.scores.scale)
    c = factor if factor > 0.0 else 1.0
    return {
        "c": c,
        "inv_c": min(1.0 / c, MAX_INVERSE),
        "q_sign": (problem.scores.scale > 0.0) - (problem.scores.scale < 0.0),
        "r": 1.0 / (problem.alpha - 1.0),
    }


def plan_of(problem: Problem, config: Config, aligned: bool) -> Plan:
    """The plan for these, made at the first call. Forward and backward share it."""
    return _plan(problem, tuple(config.items()), aligned)


@functools.lru_cache(CACHED_PLANS)
def _plan(problem: Problem, config: tuple[tuple[str, int | str], ...], aligned: bool) -> Plan:
    return Plan(problem, dict(config), aligned)


def forward(problem: Problem, inputs: Inputs, config: Config, saved_bytes: int = -1) -> Forward:
    """Attention output, thresholds and the survivors for the backward."""
    return _forward(problem, inputs, config, {}, saved_bytes=saved_bytes)


def backward(
    problem: Problem, inputs: Inputs, kept: Kept, grad_out: Tensor, config: Config,
    wanted: Collection[str] = (),
) -> Gradients:  # fmt: skip
    """Gradients of query, key and value."""
    query, key, value, grad_out = placed(config, *inputs.tensors(), grad_out)
    grad_query, grad_key, grad_value = (
        torch.empty_like(x, memory_format=torch.contiguous_format) for x in inputs.tensors()
    )
    plan = plan_of(problem, config, _aligned(config, query, key, value, grad_out))
    plan.saved.check(kept.saved)
    scratch, steps = plan.scratch, plan.backward
    memory = torch.empty(scratch.total, dtype=torch.uint8, device=problem.device)
    call = plan.call()
    call.put_parts(memory, scratch.places)
    call.put_parts(kept.saved, plan.saved_places)
    call.put_pointer("tau", kept.tau)
    call.put_view("q", query)
    call.put_view("k", key)
    call.put_view("v", value)
    call.put_view("grad_o", grad_out)
    call.put_view("grad_q", grad_query)
    call.put_view("grad_k", grad_key)
    call.put_view("grad_v", grad_value)
    with call:
        call.fill(
            memory.data_ptr(), scratch.zeroed
        )  # counts, marks, and the number of long columns
        for step in steps:
            step(call)
    return Gradients(grad_query, grad_key, grad_value)


def stats(problem: Problem, inputs: Inputs, config: Config) -> AttentionStats:
    """A forward that counts what it did."""
    shape = (problem.batch, problem.heads_q, problem.length_q)
    side = layout.STATS_TILE
    tiles_q, tiles_k = -(-problem.length_q // side), -(-problem.length_k // side)
    device = problem.device
    iterations = torch.zeros(shape, dtype=torch.int32, device=device)
    tiles = torch.zeros((*shape[:2], tiles_q, tiles_k), dtype=torch.uint8, device=device)
    support = torch.zeros(shape, dtype=torch.int32, device=device)
    result = _forward(
        problem, inputs, config, {"iterations": iterations, "tiles": tiles}, support=support
    )
    empty = 1.0 - tiles.sum((-1, -2), dtype=torch.float64) / problem.allowed_tiles(side)
    return AttentionStats(
        tau=result.tau, support=support, iterations=iterations, empty_tiles=empty, backend="cuda"
    )


def _forward(
    problem: Problem,
    inputs: Inputs,
    config: Config,
    counted: dict[str, Tensor],
    support: Tensor | None = None,
    saved_bytes: int = -1,
) -> Forward:
    query, key, value = placed(config, *inputs.tensors())
    plan = plan_of(problem, config, _aligned(config, query, key, value))
    shape = (problem.batch, problem.heads_q, problem.length_q)
    device = problem.device
    out = torch.empty((*shape, problem.head_dim_v), dtype=problem.dtype, device=device)
    tau = torch.empty(shape, dtype=torch.float32, device=device)
    length = saved_bytes if saved_bytes > 0 else plan.saved.total
    saved = torch.empty(length, dtype=torch.uint8, device=device)
    plan.saved.check(saved)
    steps = plan.scans + (plan.forward if support is None else plan.forward_counted)
    call = plan.call()
    call.put_parts(saved, plan.saved_places)
    if not plan.saved.keeps_weights:  # from the scan to the output only
        weights = torch.empty(plan.saved.weights, dtype=torch.uint8, device=device)
        call.put_pointer("weights", weights)
    call.put_pointer("tau", tau)
    call.put_view("q", query)
    call.put_view("k", key)
    call.put_view("v", value)
    call.put_view("o", out)
    for field, tensor in counted.items():
        call.put_pointer(field, tensor)
    with call:
        plan.start(call, saved)
        for step in steps:
            step(call)
    if support is not None:
        survivors = plan.saved.part(saved, "row_count").view(torch.int32).view(*shape[:2], -1)
        support.copy_(survivors[..., : problem.length_q].clamp(min=0))
    return Forward(out, tau, saved if problem.needs_grad else saved.new_empty(0))


def placed(config: Config, *tensors: Tensor) -> tuple[Tensor, ...]:
    """``tensors``, or copies of those that the kernels of ``config`` cannot read where they lie."""
    is_mapped, found = configurations.needs_alignment(config), []
    for x in tensors:  # a loop: every call comes by
        x = unit_stride(x)
        found.append(_copied(x) if is_mapped and not configurations.is_aligned(x) else x)
    return tuple(found)


def _copied(x: Tensor) -> Tensor:
    """``x`` where an allocation begins. What entries of the batch or heads share stays shared; rows
    that are all the same one become rows, since TMA takes no such stride."""
    shared = (slice(None, 1) if stride == 0 else slice(None) for stride in x.stride()[:2])
    return x[tuple(shared)].clone(memory_format=torch.contiguous_format).expand(x.shape)


def unit_stride(x: Tensor) -> Tensor:
    """``x``, or a copy whose head_dim has a stride of 1."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _aligned(config: Config, *tensors: Tensor) -> bool:
    return configurations.needs_alignment(config) or configurations.is_aligned(*tensors)
