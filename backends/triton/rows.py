"""The launches of ``entmax_rows``, entmax of dense rows. Importing this imports Triton."""

from __future__ import annotations

import torch
from torch import Tensor

from adasplash2.backends.triton.kernels import rows as kernels
from adasplash2.backends.triton.launch import MAX_STEPS, Launch, Run, on_device
from adasplash2.backends.triton.sizes import RowOptions, is_steep, kernel_dtype
from adasplash2.contract import Config
from adasplash2.problem import RowProblem

TOLERANCE = 2.0**-21
"""How far ``sum p`` may be above 1: rows are written without a further step."""

STEEP_TOLERANCE = 2.0**-24
"""The same above alpha = 2, either way: where no ``t`` comes so near, the bracket closes."""


def forward(
    problem: RowProblem, x: Tensor, config: Config, run: Run, alphas: Tensor | None = None
) -> Tensor:
    """Entmax of each row of ``x`` ``(rows, length)``."""
    x = x.to(kernel_dtype(x.dtype))
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    tolerance = STEEP_TOLERANCE if is_steep(problem.alpha) else TOLERANCE
    arguments = {
        "x": x,
        "y": y,
        "stride_x": x.stride(0),
        "length": problem.length,
        "c": problem.alpha - 1.0,
        "r": 1.0 / (problem.alpha - 1.0),
        "tolerance": tolerance,
        "alphas": alphas,
        "opt": _options(problem),
        "CHUNK": int(config["chunk"]),
        "MAX_STEPS": MAX_STEPS,
    }
    with on_device(problem.device):
        run(Launch(kernels.entmax_rows, problem.rows, arguments, launch_options(config)))
    return y.to(problem.dtype)


def backward(
    problem: RowProblem,
    y: Tensor,
    grad_y: Tensor,
    config: Config,
    run: Run,
    alphas: Tensor | None = None,
) -> Tensor:
    """Gradient of ``x`` from the output ``y`` and its gradient."""
    y, grad_y = y.contiguous().to(kernel_dtype(y.dtype)), grad_y.to(kernel_dtype(y.dtype))
    if problem.length > 1 and grad_y.stride(1) != 1:
        grad_y = grad_y.contiguous()
    grad_x = torch.empty_like(y)
    arguments = {
        "y": y,
        "grad_y": grad_y,
        "grad_x": grad_x,
        "stride_grad_y": grad_y.stride(0),
        "length": problem.length,
        "exponent": 2.0 - problem.alpha,
        "alphas": alphas,
        "opt": _options(problem),
        "CHUNK": int(config["chunk"]),
    }
    with on_device(problem.device):
        run(Launch(kernels.entmax_rows_grad, problem.rows, arguments, launch_options(config)))
    return grad_x.to(problem.dtype)


def _options(problem: RowProblem) -> RowOptions:
    if problem.alphas:
        return RowOptions(alpha=0.0, steep=False, shallow=False, degree=0, alphas=True)
    return RowOptions.of(problem)


def launch_options(config: Config) -> dict[str, int]:
    """Triton's options."""
    return {"num_warps": int(config["warps"])}
