"""``entmax`` of dense rows: the launcher of ``kernels/rows.cu``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from adasplash2.backends.cuda import driver, layout, sizes
from adasplash2.problem import RowProblem


def defines(problem: RowProblem) -> dict[str, int]:
    """The macros of ``rows.cu``, which has no heads."""
    return sizes.kind_defines(problem.dtype, 16, 16, problem.alpha, causal=False, aligned=False)


def refusals(problem: RowProblem) -> list[str]:
    """A block's index counts the rows."""
    limit = 2**31 - 1
    if problem.rows > limit:
        return [f"{problem.rows} rows are more than the {limit} that a launch reaches"]
    if problem.length > limit:
        return [f"rows of {problem.length} are longer than the {limit} that an index reaches"]
    return []


def forward(problem: RowProblem, x: Tensor) -> Tensor:
    """Entmax of each row of ``x`` ``(rows, length)``."""
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    _run(problem, "entmax_rows", x=x, stride_x=x.stride(0), y=y)
    return y


def backward(problem: RowProblem, y: Tensor, grad_y: Tensor) -> Tensor:
    """Gradient of ``x`` from the output ``y`` and its gradient."""
    y = y.contiguous()
    if grad_y.stride(-1) != 1:
        grad_y = grad_y.contiguous()
    grad_x = torch.empty_like(y)
    _run(
        problem,
        "entmax_rows_grad",
        y=y,
        grad_y=grad_y,
        stride_grad_y=grad_y.stride(0),
        grad_x=grad_x,
    )
    return grad_x


def _run(problem: RowProblem, kernel: str, **fields: Any) -> None:
    if not problem.rows or not problem.length:
        return
    shape = {"rows": problem.rows, "length": problem.length}
    numbers = {"c": problem.alpha - 1.0, "r": 1.0 / (problem.alpha - 1.0)}
    words = driver.words(driver.params({**fields, **shape, **numbers}, struct=layout.RowParams))
    device, options = driver.index(problem.device), tuple(defines(problem).items())
    found = driver.kernel(device, "rows.cu", kernel, options)
    with driver.Call(device, words) as call:
        found((problem.rows, 1), layout.ROW_THREADS, (), call)
