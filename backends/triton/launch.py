"""The launches of attention, in order. Importing this imports Triton.

``run`` is what is done with a launch: :func:`launch` it, or :func:`compile_only`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from adasplash2.backends.triton import sizes
from adasplash2.backends.triton.kernels import backward as backward_kernels
from adasplash2.backends.triton.kernels import forward as forward_kernels
from adasplash2.contract import Config, Forward
from adasplash2.problem import Inputs, Problem

Run = Callable[..., None]

MAX_STEPS = 64
"""Newton's steps of one row; supports of Gaussian scores take one to four."""

LONGEST_STRIDE = 1 << 23
"""A larger stride from row to row times the rows of a tile would leave 32 bits."""

STATS_TILE = 64
"""Side of the tiles that ``AttentionStats.empty_tiles`` counts."""

MAXIMA_CHUNK = 4096
"""Tile maxima that a block holds at a time: 32 of 128 rows."""

LIST_CHUNK = 256
"""Row blocks that the transposition looks at together."""

PROGRAMS_PER_SM = 2
"""Blocks of the scan that a multiprocessor holds; each owns a slice of tile maxima, so that these
take memory by the device and not by the square of the length."""


def launch(kernel: Any, grid: int, arguments: dict[str, Any], **options: int) -> None:
    """Launch ``kernel`` on the present stream."""
    kernel[(grid,)](**arguments, **options)


def compile_only(kernel: Any, grid: int, arguments: dict[str, Any], **options: int) -> None:
    """Compile ``kernel`` into Triton's cache; tensors stand for their dtypes."""
    values = (arguments[name] for name in kernel.arg_names)
    dtypes = (x.dtype if isinstance(x, Tensor) else x for x in values)
    kernel.warmup(*dtypes, grid=(grid,), **options)


def on_device(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on the present device, whatever the tensors'."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


class Call:
    """One attention call: its tensors as the kernels take them, and how it is launched."""

    def __init__(self, problem: Problem, inputs: Inputs, config: Config, run: Run) -> None:
        self.problem, self.config, self.run = problem, config, run
        self.dtype = sizes.kernel_dtype(problem.dtype)
        self.device = inputs.query.device
        self.inputs = tuple(self.prepared(x) for x in inputs)
        self.grid = sizes.Grid.of(problem, config)
        self.layout = sizes.Saved(problem, config)
        self.programs = min(_scan_programs(problem.device), self.grid.heads * self.grid.blocks)
        factor = (problem.alpha - 1.0) * abs(problem.scores.scale)
        self.numbers: dict[str, Any] = {
            "heads_q": problem.heads_q,
            "group": problem.group_size,
            "length_q": problem.length_q,
            "length_k": problem.length_k,
            "blocks": self.grid.blocks,
            "tiles": self.grid.tiles,
            "c": factor if factor > 0.0 else 1.0,
            "r": 1.0 / (problem.alpha - 1.0),
        }
        self.constants: dict[str, Any] = {
            "BLOCK_Q": int(config["block_q"]),
            "BLOCK_K": int(config["block_k"]),
            "HEAD_DIM": problem.head_dim,
            "PADDED": sizes.padded(problem.head_dim),
            "HEAD_DIM_V": problem.head_dim_v,
            "PADDED_V": sizes.padded(problem.head_dim_v),
            "CAUSAL": problem.scores.is_causal,
            "SIGN": (problem.scores.scale > 0.0) - (problem.scores.scale < 0.0),
            "ALPHA": problem.alpha if problem.alpha in (1.5, 2.0) else 0.0,
        }

    def empty(self, *shape: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self.device)

    def prepared(self, tensor: Tensor) -> Tensor:
        """With unit stride in head_dim, and in a dtype that can be computed with."""
        tensor = tensor.to(self.dtype)
        unit = tensor.shape[3] == 1 or tensor.stride(3) == 1
        short = abs(tensor.stride(2)) <= LONGEST_STRIDE
        return tensor if unit and short else tensor.contiguous()

    def __call__(self, kernel: Any, grid: int, options: dict[str, int], **arguments: Any) -> None:
        """Launch ``kernel``; what it takes of a call's numbers and constants is added."""
        known = self.numbers | self.constants | arguments
        self.run(kernel, grid, {name: known[name] for name in kernel.arg_names}, **options)

    def options(self, prefix: str = "") -> dict[str, int]:
        config = self.config
        return {
            "num_warps": int(config[f"{prefix}warps"]),
            "num_stages": int(config[f"{prefix}stages"]),
        }


def forward(call: Call, counted: dict[str, Tensor] | None = None) -> Forward:
    """Output, thresholds and saved parts; ``counted`` receives ``iterations``, ``support`` and
    ``marks`` of tiles with support."""
    problem = call.problem
    query, key, value = call.inputs
    shape = (problem.batch, problem.heads_q, problem.length_q)
    row_blocks = call.grid.heads * call.grid.blocks
    out = call.empty(*shape, problem.head_dim_v, dtype=call.dtype)
    tau = call.empty(*shape, dtype=torch.float32)
    saved = call.empty(call.layout.total, dtype=torch.uint8)
    parts = call.layout.split(saved)
    parts["poison"].zero_()
    block_q = int(call.config["block_q"])
    maxima = call.empty(call.programs * call.grid.tiles * block_q, dtype=torch.float32)
    unsafe = call.empty(call.grid.rows, dtype=torch.int8)
    strides = _strides(q=query, k=key, v=value, o=out)
    known = {"query": query, "key": key, "value": value, **strides}
    known |= {"top_in": parts["top"], "t_in": parts["t"], "lists": parts["lists"]}
    known |= {"counts": parts["counts"], "COUNT": counted is not None}
    known |= {"iterations": None, "support": None, "marks": None, "MARK": STATS_TILE}
    known |= counted or {}
    with on_device(problem.device):
        call(
            forward_kernels.scan,
            call.programs,
            call.options("scan_"),
            **known,
            maxima=maxima,
            top_out=parts["top"],
            t_out=parts["t"],
            live=parts["live"],
            poison=parts["poison"],
            work_items=row_blocks,
            CHUNK=MAXIMA_CHUNK // block_q,
        )
        call(
            forward_kernels.solve,
            row_blocks,
            call.options("scan_"),
            **known,
            t_io=parts["t"],
            tau_out=tau,
            tolerance=tolerance(problem.alpha),
            MAX_STEPS=MAX_STEPS,
        )
        for safe in (False, True):
            call(
                forward_kernels.output,
                row_blocks,
                call.options(),
                **known,
                out=out,
                out_u=parts["out_u"],
                unsafe=unsafe,
                GRADIENT=problem.needs_grad,
                SAFE=safe,
            )
    if not problem.needs_grad:
        saved = saved.new_empty(0)
    return Forward(out.to(problem.dtype), tau, saved)


def backward(call: Call, saved: Tensor, grad_out: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value."""
    problem, grid = call.problem, call.grid
    query, key, value = call.inputs
    grad_out = call.prepared(grad_out)
    grads = [call.empty(*x.shape, dtype=call.dtype) for x in call.inputs]
    parts = call.layout.split(saved)
    row_blocks, key_tiles = grid.heads * grid.blocks, grid.heads_kv * grid.tiles
    delta = call.empty(grid.rows, dtype=torch.float32)
    lists = call.empty(key_tiles * grid.group * grid.blocks, dtype=torch.int32)
    counts = call.empty(key_tiles * 2, dtype=torch.int32)
    unsafe = call.empty(max(grid.rows, grid.heads_kv * problem.length_k), dtype=torch.int8)
    known = {"query": query, "key": key, "value": value, "grad_out": grad_out}
    known |= {"top_in": parts["top"], "t_in": parts["t"], "scale": problem.scores.scale}
    known |= _strides(q=query, k=key, v=value, g=grad_out)
    with on_device(problem.device):
        for safe in (False, True):
            call(
                backward_kernels.grad_query,
                row_blocks,
                call.options(),
                **known,
                **_strides(o=grads[0]),
                out_u=parts["out_u"],
                lists=parts["lists"],
                counts=parts["counts"],
                grad_q=grads[0],
                delta_out=delta,
                unsafe=unsafe,
                SAFE=safe,
            )
        call(
            backward_kernels.transpose_lists,
            key_tiles,
            {"num_warps": 4},
            live=parts["live"],
            lists=lists,
            counts=counts,
            CHUNK=LIST_CHUNK,
        )
        for safe in (False, True):
            call(
                backward_kernels.grad_key_value,
                key_tiles,
                call.options(),
                **known,
                **_strides(o=grads[1], w=grads[2]),
                delta_in=delta,
                lists=lists,
                counts=counts,
                poison=parts["poison"],
                grad_k=grads[1],
                grad_v=grads[2],
                unsafe=unsafe,
                PARTS=int(call.config["parts"]),
                SAFE=safe,
            )
    grad_query, grad_key, grad_value = (grad.to(problem.dtype) for grad in grads)
    return grad_query, grad_key, grad_value


def tolerance(alpha: float) -> float:
    """How far ``sum p`` may be above 1 before the last step.

    That step leaves an error of the order of its square, far below round-off, where ``p`` has a
    slope of zero at the edge of the support (alpha up to 1.5); else it must be small itself.
    """
    return 1e-4 if alpha <= 1.5 else 2.0**-21


def _strides(**tensors: Tensor) -> dict[str, int]:
    return {
        f"stride_{letter}{axis}": tensor.stride(dim)
        for letter, tensor in tensors.items()
        for dim, axis in enumerate("bhn")
    }


def _scan_programs(device: torch.device) -> int:
    if sizes.INTERPRETED:
        return 2
    return PROGRAMS_PER_SM * int(torch.cuda.get_device_properties(device).multi_processor_count)
