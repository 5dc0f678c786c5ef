"""NVIDIA GPUs from compute capability 8.0 on: CUDA C++ compiled at run time by NVRTC.

The element path: one dense scan of the scores keeps each row's survivors, all else are
gathers over survivors (``kernels/scan.cu``, ``kernels/elements.cu``). Rows whose support does
not fit their lists are found on the device and served by dense tiles (``kernels/dense.cu``).
Nothing waits for the host, so CUDA graphs can capture forward and backward.

Rows in dense tiles multiply their zeros too: there a key or value that is not finite reaches the
gradients and outputs of every row of its block, as in softmax attention.

Needs CuPy, which brings NVRTC, and neither Triton nor a compiler.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from adasplash2.backends.cuda import launch, rows, sizes
from adasplash2.contract import AttentionStats, Config, Forward
from adasplash2.problem import Inputs, Problem, RowProblem

name = "cuda"

MIN_CAPABILITY = (8, 0)
"""``cp.async`` and bfloat16 matrix fragments."""

MAX_ALPHA = 2.0
"""Above it p has infinite slopes at the edge of the support, and the refinement stalls."""


HOPPER_SHAPES = ((3, 4), (2, 4))
"""Warpgroups and stages of ``scan90.cu``: three groups keep the tensor cores busy while two
filter, two have longer lists."""

HOPPER_SHAPES_WIDE = ((2, 3), (3, 3), (2, 4))
"""The same for head_dim above 64."""


def unavailable() -> str | None:
    """Why nothing can run here, in a sentence; None where it can."""
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    if torch.version.hip is not None:
        return "this is a ROCm build of torch; these kernels are for NVIDIA GPUs"
    try:
        import cupy
        from cupy.cuda import nvrtc

        nvrtc.getVersion()
        if not hasattr(cupy, "RawModule"):  # a folder named cupy is not CuPy
            return "CuPy is not installed (pip install cupy-cuda13x or cupy-cuda12x)"
    except ImportError:
        return "CuPy is not installed (pip install cupy-cuda13x or cupy-cuda12x)"
    except Exception as error:
        return f"NVRTC cannot be loaded through CuPy ({error})"
    return None


def refusals(problem: Problem | RowProblem) -> list[str]:
    """All reasons why this problem cannot run here; empty: it can."""
    reasons = []
    if problem.device.type != "cuda":
        reasons.append(f"tensors are on {problem.device}, this backend needs a CUDA device")
    if problem.dtype not in launch.DTYPE_CODES:
        reasons.append(f"dtype {problem.dtype} is computed by other backends only")
    if problem.alpha == 1.0:
        reasons.append("alpha = 1 is softmax, which these kernels do not compute")
    if problem.alpha > MAX_ALPHA:
        reasons.append(
            f"alpha = {problem.alpha:g} is above {MAX_ALPHA:g}, where these kernels do not solve "
            "the threshold to float32 round-off"
        )
    if reasons:
        return reasons
    capability = torch.cuda.get_device_capability(problem.device)
    if capability < MIN_CAPABILITY:
        reasons.append(
            f"{problem.device} has compute capability {capability[0]}.{capability[1]}, "
            f"the kernels need {MIN_CAPABILITY[0]}.{MIN_CAPABILITY[1]}"
        )
    if isinstance(problem, RowProblem):
        return reasons + rows.refusals(problem)
    if sizes.Counts.of(problem).rows > 2**31 - 1:
        reasons.append("the query rows of all heads together exceed 2^31 - 1")
    itemsize = problem.dtype.itemsize
    dense = max(sizes.dense_shared(problem.head_dim, problem.head_dim_v, itemsize).values())
    optin = _shared_memory(problem.device)
    if not configs(problem) or dense > optin:
        reasons.append(
            f"{problem.dtype} with head_dim {problem.head_dim} and {problem.head_dim_v} needs "
            f"more shared memory than the {optin} bytes a block has on {problem.device}"
        )
    return reasons


def configs(problem: Problem | RowProblem) -> Sequence[Config]:
    """The shapes of the scan that the device has room for."""
    if isinstance(problem, RowProblem):
        return [{}]
    portable: Config = {"scan": "portable"}
    shapes: list[Config] = [portable]
    if _has_wgmma(problem):
        choices = HOPPER_SHAPES if problem.head_dim <= 64 else HOPPER_SHAPES_WIDE
        shapes = [{"scan": "hopper", "warpgroups": w, "stages": s} for w, s in choices]
        shapes.append(portable)
    available = _shared_memory(problem.device)
    return [c for c in shapes if _scan(problem, c).capacity(available) is not None]


def saved_bytes(problem: Problem, config: Config) -> int | None:
    """Length of ``Forward.saved``."""
    return sizes.Saved(sizes.Counts.of(problem)).total if problem.needs_grad else 0


def forward(problem: Problem, inputs: Inputs, config: Config) -> Forward:
    """Attention output, thresholds and the survivors for the backward."""
    return _forward(problem, inputs, config, {})


def backward(
    problem: Problem, inputs: Inputs, forward: Forward, grad_out: Tensor, config: Config
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value."""
    call = _Call(problem, (*inputs, grad_out), config)
    grad_out = call.tensors[3]
    grads = tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in inputs)
    grad_query, grad_key, grad_value = grads
    if not problem.length_q or not problem.length_k or not call.counts.rows:
        return grad_query.zero_(), grad_key.zero_(), grad_value.zero_()
    counts = call.counts
    entries = counts.rows * sizes.ARENA_ROW
    long_room = 1 + entries // sizes.SHORT_COLUMN
    zeroed = torch.zeros(counts.columns + long_room, dtype=torch.int32, device=problem.device)
    scratch = {
        "rank": torch.empty(entries, dtype=torch.int32, device=problem.device),
        "records": torch.empty(
            entries * sizes.RECORD_BYTES, dtype=torch.uint8, device=problem.device
        ),
        "column_count": zeroed[: counts.columns],
        "column_start": torch.empty(counts.columns, dtype=torch.int32, device=problem.device),
        "long_columns": zeroed[counts.columns :],
        "delta": torch.empty_like(forward.tau),
    }
    block = call.params(
        **call.saved_parts(forward.saved),
        **scratch,
        tau=forward.tau,
        grad_o=launch.view(grad_out),
        grad_q=launch.view(grad_query),
        grad_k=launch.view(grad_key),
        grad_v=launch.view(grad_value),
        long_limit=sizes.SHORT_COLUMN,
    )
    with torch.cuda.device(problem.device):
        lanes = sizes.lanes_per_row(max(problem.head_dim, problem.head_dim_v))
        call.elements("count_columns", counts.groups, block)
        call.elements("prefix_columns", counts.kv_heads, block, threads=sizes.PREFIX_THREADS)
        call.elements("grad_rows", -(-counts.rows * lanes // sizes.ELEMENT_THREADS), block)
        call.elements("grad_columns", -(-counts.columns * 32 // sizes.ELEMENT_THREADS), block)
        call.elements(
            "grad_long_columns",
            torch.cuda.get_device_properties(problem.device).multi_processor_count,
            block,
            threads=sizes.LONG_THREADS,
        )
        call.dense("dense_grad_rows", (counts.heads * _tiles(problem.length_q),), block)
        split = 2 if sizes.padded(problem.head_dim) + sizes.padded(problem.head_dim_v) > 256 else 1
        call.dense("dense_grad_columns", (counts.kv_heads * _tiles(problem.length_k), split), block)
    return grad_query, grad_key, grad_value


def stats(problem: Problem, inputs: Inputs, config: Config) -> AttentionStats:
    """A forward that records what it did."""
    shape = (problem.batch, problem.heads_q, problem.length_q)
    tiles_q, tiles_k = -(-problem.length_q // 64), -(-problem.length_k // 64)
    device = problem.device
    iterations = torch.zeros(shape, dtype=torch.int32, device=device)
    tiles = torch.zeros((*shape[:2], tiles_q, tiles_k), dtype=torch.uint8, device=device)
    support = torch.zeros(shape, dtype=torch.int32, device=device)
    result = _forward(
        problem, inputs, config, {"iterations": iterations, "tiles": tiles}, support=support
    )
    allowed = torch.ones((tiles_q, tiles_k), dtype=torch.bool, device=device)
    if problem.scores.is_causal:
        allowed = allowed.tril()
    live = (tiles.bool() & allowed).sum((-1, -2))
    empty = 1.0 - live.double() / max(1, int(allowed.sum()))
    return AttentionStats(
        tau=result.tau, support=support, iterations=iterations, empty_tiles=empty, backend=name
    )


def rows_forward(problem: RowProblem, x: Tensor, config: Config) -> Tensor:
    """Entmax of each row of ``x``."""
    return rows.forward(problem, x)


def rows_backward(problem: RowProblem, y: Tensor, grad_y: Tensor, config: Config) -> Tensor:
    """Gradient of ``x`` from the output ``y`` and its gradient."""
    return rows.backward(problem, y, grad_y)


class _Call:
    """One attention call: its tensors as the kernels take them, and its compiled variant."""

    def __init__(self, problem: Problem, tensors: tuple[Tensor, ...], config: Config) -> None:
        self.problem = problem
        self.counts = sizes.Counts.of(problem)
        self.tensors = tuple(
            x if x.shape[-1] == 1 or x.stride(-1) == 1 else x.contiguous() for x in tensors
        )
        self.config = config
        self.aligned = launch.is_aligned(*self.tensors) and all(
            width * problem.dtype.itemsize % 16 == 0
            for width in (problem.head_dim, problem.head_dim_v)
        )
        self.layout = sizes.Saved(self.counts)

    def params(self, **fields: Any) -> Any:
        """The argument block with what every kernel reads, and ``fields``."""
        problem, query, key, value = self.problem, *self.tensors[:3]
        factor = (problem.alpha - 1.0) * abs(problem.scores.scale)
        c = factor if factor > 0.0 else 1.0
        sign = (problem.scores.scale > 0.0) - (problem.scores.scale < 0.0)
        return launch.params(
            {
                "q": launch.view(query),
                "k": launch.view(key),
                "v": launch.view(value),
                "batch": problem.batch,
                "heads_q": problem.heads_q,
                "heads_kv": problem.heads_kv,
                "group": problem.group_size,
                "length_q": problem.length_q,
                "length_k": problem.length_k,
                "groups_q": self.counts.groups_per_head,
                "c": c,
                "inv_c": min(1.0 / c, 1e30),
                "scale": problem.scores.scale,
                "q_sign": sign,
                "r": 1.0 / (problem.alpha - 1.0),
                **fields,
            }
        )

    def saved_parts(self, saved: Tensor) -> dict[str, Tensor]:
        names = ("row_start", "row_count", "flat", "poison", "entries")
        return {part: self.layout.part(saved, part) for part in names}

    def scan(self, block: Any) -> None:
        problem = self.problem
        scan = _scan(problem, self.config if self.aligned else {"scan": "portable"})
        capacity = scan.capacity(_shared_memory(problem.device))
        options = launch.defines(problem, self.aligned) | dict(scan.defines)
        options["CAPACITY"] = capacity
        blocks = self.counts.heads * -(-problem.length_q // scan.rows)
        shared = scan.shared(capacity)
        self._run(scan.unit, "scan", options, shared, (blocks,), scan.threads, block)

    def elements(
        self, kernel: str, blocks: int, block: Any, threads: int = sizes.ELEMENT_THREADS
    ) -> None:
        # The gathers depend on neither the masks nor the lists: one variant serves all.
        options = launch.defines(self.problem, self.aligned) | {"CAUSAL": 0}
        self._run("elements.cu", kernel, options, 0, (blocks,), threads, block)

    def dense(self, kernel: str, blocks: tuple[int, ...], block: Any) -> None:
        problem = self.problem
        shared = sizes.dense_shared(problem.head_dim, problem.head_dim_v, problem.dtype.itemsize)
        options = launch.defines(problem, self.aligned)
        self._run("dense.cu", kernel, options, shared[kernel], blocks, sizes.DENSE_THREADS, block)

    def _run(
        self,
        unit: str,
        kernel: str,
        options: dict[str, int],
        shared: int,
        blocks: tuple[int, ...],
        threads: int,
        block: Any,
    ) -> None:
        device = torch.cuda.current_device()
        launch.kernel(device, unit, kernel, tuple(options.items()), shared)(blocks, threads, block)


def _forward(
    problem: Problem,
    inputs: Inputs,
    config: Config,
    recorded: dict[str, Tensor],
    support: Tensor | None = None,
) -> Forward:
    call = _Call(problem, tuple(inputs), config)
    shape = (problem.batch, problem.heads_q, problem.length_q)
    out = torch.empty((*shape, problem.head_dim_v), dtype=problem.dtype, device=problem.device)
    tau = torch.empty(shape, dtype=torch.float32, device=problem.device)
    saved = torch.empty(call.layout.total, dtype=torch.uint8, device=problem.device)
    empty = saved.new_empty(0)
    if not call.counts.rows or not problem.length_k:
        saved.zero_()
        out.zero_()
        tau.fill_(float("inf"))
        return Forward(out, tau, saved if problem.needs_grad else empty)
    parts = call.saved_parts(saved)
    parts["poison"].zero_()
    block = call.params(**parts, **recorded, tau=tau, o=launch.view(out))
    with torch.cuda.device(problem.device):
        call.scan(block)
        lanes = sizes.lanes_per_row(problem.head_dim_v)
        call.elements("output", -(-call.counts.rows * lanes // sizes.ELEMENT_THREADS), block)
        call.dense("dense_output", (call.counts.heads * _tiles(problem.length_q),), block)
    if support is not None:
        counted = parts["row_count"].view(torch.int32).view(*shape[:2], -1)
        support.copy_(counted[..., : problem.length_q].clamp(min=0))
    return Forward(out, tau, saved if problem.needs_grad else empty)


def _tiles(length: int) -> int:
    return -(-length // sizes.DENSE_ROWS)


def _scan(problem: Problem, config: Config) -> sizes.Scan:
    if config["scan"] == "hopper":
        return sizes.hopper_scan(
            problem.head_dim, int(config["warpgroups"]), int(config["stages"])
        )
    return sizes.portable_scan(problem.head_dim, problem.dtype.itemsize)


def _has_wgmma(problem: Problem) -> bool:
    return (
        torch.cuda.get_device_capability(problem.device) == (9, 0)
        and problem.dtype.itemsize == 2
        and problem.head_dim <= sizes.HOPPER_MAX_HEAD_DIM
    )


def _shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that a block may ask for."""
    return int(torch.cuda.get_device_properties(device).shared_memory_per_block_optin)
