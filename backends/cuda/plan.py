"""What a kind of attention call needs besides its tensors: sizes, kernels, constants.

Made once per problem, configuration and alignment, so that a call fills in pointers and launches.
"""

from __future__ import annotations

import ctypes
import functools
import logging
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from adasplash2.backends.cuda import launch, layout, sizes
from adasplash2.contract import Config
from adasplash2.problem import Problem

logger = logging.getLogger("adasplash2")

PORTABLE: Config = {"scan": "portable", "blocks": 1}
PORTABLE_TWO: Config = {"scan": "portable", "blocks": 2}
DENSE: Config = {"scan": "none"}
"""All rows in dense tiles from the start, on Hopper."""

HOPPER_SHAPES = ((3, 2), (3, 3), (2, 3))
"""Warpgroups and stages of ``scan90.cu``, for head_dim up to 128. The first was the fastest or
within 10 % of it wherever measured; fewer warpgroups or stages leave room for longer lists."""

RETRY_SHAPE = (1, 2)
"""The same of the retry of rows that their lists could not hold."""

SHORT_KEYS = 512
"""Keys that a row sees, on the mean, up to which it is taken to keep so many of them that the scan
does not pay. On an H100 a step with Gaussian q, k, v took 0.6x of the time (0.5x with 256 keys);
with queries times 4, where a row keeps four keys, it takes 1.5x."""

MAX_INVERSE = 1e30
"""Of ``c``: bounds are a few times its inverse below scores, and must be finite in float32."""

MINUS_INFINITY = 0xFF800000
"""Its bits in float32."""

ALIGNMENT = 16
"""Bytes of the copies that kernels make at once."""

EXACT_BLOCKS = 2
"""Blocks of ``exact.cu`` for each multiprocessor: what is marked is shared among them."""

CACHED_PLANS = 1024


def configs(problem: Problem) -> list[Config]:
    """The shapes of the scan that the device has room for."""
    shapes = [PORTABLE, PORTABLE_TWO]
    if _has_wgmma(problem) and may_align(problem):
        shapes = [{"scan": "hopper", "warpgroups": w, "stages": s} for w, s in HOPPER_SHAPES]
        shapes.append(PORTABLE)
        if _dense(problem, _scan(problem, DENSE)).maps:
            shapes.insert(0 if _is_short(problem) else len(shapes), DENSE)
    available = shared_memory(problem.device)
    return [c for c in shapes if _scan(problem, c).capacity(available) is not None]


def may_align(problem: Problem) -> bool:
    """Whether rows of so many elements can all start on 16 bytes, as TMA and wgmma need them."""
    widths = problem.head_dim, problem.head_dim_v
    return all(width * problem.dtype.itemsize % ALIGNMENT == 0 for width in widths)


def running(config: Config, aligned: bool) -> Config:
    """``config``, or what runs instead of it for tensors whose rows do not all start on 16
    bytes."""
    return config if aligned or config["scan"] == PORTABLE["scan"] else PORTABLE


def plan(problem: Problem, config: Config, aligned: bool) -> Plan:
    """The plan for these, made at the first call. Forward and backward share it."""
    return _plan(problem, tuple(config.items()), aligned)


class Scratch(NamedTuple):
    """Where the parts of an allocation of ``total`` bytes go, of which the first ``zeroed`` must be
    zeros."""

    places: tuple[tuple[int, int], ...]
    zeroed: int
    total: int


class Plan:
    """One kind of attention call on one device."""

    def __init__(self, problem: Problem, config: Config, aligned: bool) -> None:
        self.problem = problem
        self.counts = sizes.Counts.of(problem)
        self.saved = sizes.Saved(self.counts)
        self.saved_places = launch.places(self.saved.offsets)
        self._device = launch.index(problem.device)
        self._options = sizes.kind_defines(
            problem.dtype,
            problem.head_dim,
            problem.head_dim_v,
            problem.alpha,
            causal=problem.scores.is_causal,
            aligned=aligned,
        )
        self.config = running(config, aligned)
        self._scans_first = self.config != DENSE
        self._scan = _scan(problem, self.config)
        self._dense = _dense(problem, self._scan)
        factor = (problem.alpha - 1.0) * abs(problem.scores.scale)
        c = factor if factor > 0.0 else 1.0
        constants = launch.params(
            {
                "batch": problem.batch,
                "heads_q": problem.heads_q,
                "heads_kv": problem.heads_kv,
                "gqa_group": problem.group_size,
                "length_q": problem.length_q,
                "length_k": problem.length_k,
                "row_blocks": self.counts.row_blocks_per_head,
                "long_limit": layout.SHORT_COLUMN,
                "c": c,
                "inv_c": min(1.0 / c, MAX_INVERSE),
                "scale": problem.scores.scale,
                "q_sign": (problem.scores.scale > 0.0) - (problem.scores.scale < 0.0),
                "r": 1.0 / (problem.alpha - 1.0),
            }
        )
        self._constants = launch.words(constants)

    def call(self) -> launch.Call:
        """A call whose argument block has the constants."""
        return launch.Call(self._device, self._constants)

    def start(self, call: launch.Call, saved: Tensor) -> None:
        """Set what must have a value before the first kernel."""
        call.fill(*self.saved.span(saved, "poison", "unsafe_output"))
        if self._scans_first:
            return
        call.fill(*self.saved.span(saved, "flat"), layout.FLAT)
        for of_a_row in ("row_start", "row_count"):  # RowStart.top and RowCount.bound
            call.fill_words(*self.saved.span(saved, of_a_row), MINUS_INFINITY)

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
                "rank": 4 * entries,
                "delta": 4 * counts.heads * self.problem.length_q,
                "records": ctypes.sizeof(layout.Record) * entries,
                "long_parts": layout.LONG_PART_BYTES * long_parts,
            }
        )
        return Scratch(launch.places(offsets), offsets["column_start"], total)

    @functools.cached_property
    def scans(self) -> tuple[launch.Launch, ...]:
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
        retry = sizes.hopper_scan(self.problem.head_dim, *RETRY_SHAPE, retry=True)
        return (first, self._launch_scan(retry, self._multiprocessors))

    @functools.cached_property
    def forward(self) -> tuple[launch.Launch, ...]:
        """What follows the scan."""
        return self._outputs(
            layout.OUTPUT_SAVES if self.problem.needs_grad else layout.OUTPUT_PLAIN
        )

    @functools.cached_property
    def forward_counted(self) -> tuple[launch.Launch, ...]:
        """The same where the call counts what it did."""
        return self._outputs(layout.OUTPUT_COUNTS)

    @functools.cached_property
    def backward(self) -> tuple[launch.Launch, ...]:
        problem, counts, dense = self.problem, self.counts, self._dense
        lanes = self._options["GRAD_LANES"]
        key_tiles = counts.kv_heads * -(-problem.length_k // dense.rows)
        names = "q", "k", "v", "grad_o"
        return (
            self._elements("count_columns", counts.row_blocks),
            self._elements("prefix_columns", counts.kv_heads, layout.PREFIX_THREADS),
            self._elements("grad_rows", -(-counts.rows * lanes // layout.ELEMENT_THREADS)),
            self._elements("grad_columns", -(-counts.columns * lanes // layout.ELEMENT_THREADS)),
            self._elements("sort_long_columns", self._long_blocks, layout.SORT_THREADS),
            self._elements("grad_long_columns", self._long_blocks, layout.LONG_THREADS),
            self._launch_dense(dense.grad_unit, "dense_grad_rows", (self._query_tiles,), names),
            self._launch_exact("exact_grad_rows"),  # the next one needs their delta
            self._launch_dense(
                dense.grad_unit, "dense_grad_columns", (key_tiles, dense.key_blocks), names
            ),
            self._launch_exact("exact_grad_columns", 2),
        )

    def _outputs(self, kind: int) -> tuple[launch.Launch, ...]:
        dense, tiles = self._dense, (self._query_tiles,)
        lanes = self._options["OUTPUT_LANES"]
        # The portable kernel saves nothing, and always counts.
        options = {"OUTPUT": kind} if dense.maps else {}
        return (
            self._elements("output", -(-self.counts.rows * lanes // layout.ELEMENT_THREADS)),
            self._launch_dense(
                dense.output_unit, "dense_output", tiles, ("q", "k", "v"), **options
            ),
            self._launch_exact("exact_output"),
        )

    @property
    def _multiprocessors(self) -> int:
        found: int = torch.cuda.get_device_properties(self.problem.device).multi_processor_count
        return found

    @property
    def _long_blocks(self) -> int:
        return layout.LONG_BLOCKS * self._multiprocessors

    @property
    def _query_tiles(self) -> int:
        return self.counts.heads * -(-self.problem.length_q // self._dense.rows)

    def _launch_scan(self, scan: sizes.Scan, blocks: int) -> launch.Launch:
        capacity = scan.capacity(shared_memory(self.problem.device))
        if capacity is None:
            raise RuntimeError(f"{scan.unit} has no room for lists on {self.problem.device}")
        options = self._options | scan.defines_for(capacity)
        shared = scan.shared(capacity)
        maps = (("k", layout.HOPPER_KEYS),) if scan.maps_keys else ()
        return self._launch(scan.unit, "scan", options, (blocks,), scan.threads, shared, maps)

    def _elements(
        self, kernel: str, blocks: int, threads: int = layout.ELEMENT_THREADS
    ) -> launch.Launch:
        # The gathers depend on neither the masks nor the lists: one variant serves all.
        options = self._options | {"CAUSAL": 0}
        return self._launch("elements.cu", kernel, options, (blocks,), threads, 0)

    def _launch_dense(
        self,
        unit: str,
        kernel: str,
        blocks: tuple[int, ...],
        names: tuple[str, ...],
        **options: int,
    ) -> launch.Launch:
        dense, options = self._dense, self._options | self._dense.defines | options
        maps = tuple((name, layout.DENSE_BOX) for name in names) if dense.maps else ()
        shared = dense.shared[kernel]
        return self._launch(unit, kernel, options, blocks, dense.threads, shared, maps)

    def _launch_exact(self, kernel: str, gradients: int = 1) -> launch.Launch:
        """What a dense kernel marked, by as many blocks as are at work at once."""
        problem = self.problem
        dense = sizes.portable_dense(problem.head_dim, problem.head_dim_v, problem.dtype.itemsize)
        blocks = EXACT_BLOCKS * self._multiprocessors
        return self._launch(
            "exact.cu",
            kernel,
            self._options | dense.defines,
            (blocks, gradients),
            dense.threads,
            dense.shared[kernel],
        )

    def _launch(
        self,
        unit: str,
        kernel: str,
        options: Mapping[str, int],
        blocks: tuple[int, ...],
        threads: int,
        shared: int,
        maps: launch.Maps = (),
    ) -> launch.Launch:
        found = launch.kernel(self._device, unit, kernel, tuple(options.items()), shared)
        return functools.partial(found, (*blocks, 1)[:2], threads, maps)


@functools.lru_cache(CACHED_PLANS)
def _plan(problem: Problem, config: tuple[tuple[str, int | str], ...], aligned: bool) -> Plan:
    made = Plan(problem, dict(config), aligned)
    if made.config != dict(config):
        logger.debug(
            "cuda: rows of the tensors do not all start on %d bytes, %s runs instead of %s",
            ALIGNMENT,
            dict(made.config),
            dict(config),
        )
    return made


def _scan(problem: Problem, config: Config) -> sizes.Scan:
    if config == DENSE:
        return sizes.hopper_scan(problem.head_dim, *RETRY_SHAPE)
    if config["scan"] == "hopper":
        return sizes.hopper_scan(problem.head_dim, int(config["warpgroups"]), int(config["stages"]))
    return sizes.portable_scan(problem.head_dim, problem.dtype.itemsize, int(config["blocks"]))


def _dense(problem: Problem, scan: sizes.Scan) -> sizes.Dense:
    widths = problem.head_dim, problem.head_dim_v
    closed_form = sizes.alpha_code(problem.alpha) != layout.ALPHA_KINDS["kGeneral"]
    if scan.maps_keys and closed_form and max(widths) <= layout.HOPPER_MAX_HEAD_DIM:
        return sizes.hopper_dense(*widths)
    return sizes.portable_dense(*widths, problem.dtype.itemsize)


def _is_short(problem: Problem) -> bool:
    return problem.length_k <= SHORT_KEYS * (2 if problem.scores.is_causal else 1)


def _has_wgmma(problem: Problem) -> bool:
    return (
        torch.cuda.get_device_capability(problem.device) == (9, 0)
        and problem.dtype.itemsize == 2
        and problem.head_dim <= layout.HOPPER_MAX_HEAD_DIM
    )


@functools.cache
def shared_memory(device: torch.device) -> sizes.SharedMemory:
    """What a block and a multiprocessor of ``device`` have."""
    found: Any = torch.cuda.get_device_properties(device)
    return sizes.SharedMemory(
        found.shared_memory_per_block_optin, found.shared_memory_per_multiprocessor
    )
