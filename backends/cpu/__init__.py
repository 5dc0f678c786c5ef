"""The CPU backend: the C++ core, any processor, any problem of the contract.

Scan once, keep survivors: one dense ``Q K^T`` in register tiles, a running lower bound of the
threshold (Newton's, or a coarse histogram's), element lists, exact thresholds, sparse output and
sparse gradients. Rows that keep more keys than lists are good for are *flat*: they take blocked
dense work with memory linear in the length.
"""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adasplash2 import _core
from adasplash2.contract import AttentionStats, Config, Forward, Gradients, Kept
from adasplash2.problem import OPERANDS, Inputs, Problem, RowProblem, unsupported

name = "cpu"

SUPPORTED = (
    *("window", "causal_align", "softcap", "dropout_p", "attn_mask", "alibi_slopes", "sinks"),
    *("scale as a tensor", "alpha as a tensor", "lengths or packed sequences", "block_table"),
)
"""What the core computes: it takes no notice of what it does not know."""


def unavailable() -> str | None:
    """None, unless ``ADASPLASH2_ISA`` asks for what is not here: the core is compiled with the
    package and runs on every processor."""
    try:
        _core.isa()
    except ValueError as error:
        return str(error)
    return None


def refusals(problem: Problem | RowProblem) -> list[str]:
    """All reasons against ``problem``."""
    if problem.device.type != "cpu":
        return [f"the tensors are on {problem.device}, and this backend computes on cpu"]
    return refusals_anywhere(problem)


def refusals_anywhere(problem: Problem | RowProblem) -> list[str]:
    """See :meth:`adasplash2.contract.Backend.refusals_anywhere`."""
    return unsupported(problem, SUPPORTED)


def configs(problem: Problem | RowProblem) -> Sequence[Config]:
    """The instruction sets that this processor has, the widest first: on some that one clocks
    down or runs in halves. Where ``ADASPLASH2_ISA`` names one, that alone.

    For attention also ``scan_rows``, query rows that share a pass over the keys: fewer read the
    keys more often, and keep to a smaller cache. Results do not depend on it, and what is decoded
    has none.
    """
    names = [_core.isa()] if os.environ.get("ADASPLASH2_ISA") else _core.usable_isas()
    if isinstance(problem, RowProblem) or is_decoding(problem):
        return [{"isa": name} for name in names]
    most = _core.TILE_ROWS
    rows = [(name, most) for name in names] + [(names[0], most // 2), (names[0], most // 4)]
    return [{"isa": name, "scan_rows": r} for name, r in rows]


def is_decoding(problem: Problem) -> bool:
    """Whether few queries without gradients are computed by ``decode`` of the core."""
    if problem.needs_grad or problem.is_empty:
        return False
    sizes = problem.length_q, problem.length_k, problem.head_dim
    return problem.page_size > 0 or _core.are_decoded(*sizes)


def versions() -> Mapping[str, str]:
    """See :meth:`adasplash2.contract.Backend.versions`."""
    threads = str(torch.get_num_threads()) if _core.OPENMP else "1 (built without OpenMP)"
    return {"core": _core_hash(), "isa": _core.isa(), "threads": threads}


def notes(problem: Problem | RowProblem, inputs: Inputs, config: Config) -> Sequence[str]:
    """Nothing: what runs is ``config``, whatever the tensors."""
    return ()


def precompile(problem: Problem | RowProblem, config: Config) -> None:
    """Nothing: the core is compiled with the package."""


def saved_bound(problem: Problem) -> int:
    """Every row with the longest list that it can have; the data decides what is in use."""
    if problem.device.type != "cpu":
        return 0
    dtype = _dtype_name(problem.dtype)
    fixed = _core.saved_bytes(dtype, rows=0, entries=0)
    a_row = _core.saved_bytes(dtype, rows=1, entries=0) - fixed
    an_entry = _core.saved_bytes(dtype, rows=0, entries=1) - fixed
    rows = problem.batch * problem.heads_q * problem.length_q
    longest = torch.sym_min(problem.length_k, _core.LIST_CAPACITY)
    return fixed + rows * (a_row + longest * an_entry)


def forward(problem: Problem, inputs: Inputs, config: Config, saved_bytes: int = -1) -> Forward:
    """See :meth:`adasplash2.contract.Backend.forward`. Nothing touches the memory beyond what is
    saved, so a length for the worst case costs none."""
    out, tau, kept = _run(problem, inputs, config, keep=problem.needs_grad)
    needed = kept.bytes if kept else 0
    if 0 < saved_bytes < needed:
        raise ValueError(f"saved_bytes must be at least {needed} here, got {saved_bytes}")
    length = max(saved_bytes, needed)
    saved = tau.new_empty(length, dtype=torch.uint8)
    if kept:
        kept.save(saved.data_ptr())
    return Forward(out, tau, saved)


def backward(
    problem: Problem, inputs: Inputs, kept: Kept, grad_out: Tensor, config: Config,
    wanted: Collection[str] = (),
) -> Gradients:  # fmt: skip
    """See :meth:`adasplash2.contract.Backend.backward`."""
    inputs, grad_out = _readable(inputs), _unit_stride(grad_out)
    device = problem.device
    grads = [torch.empty(t.shape, dtype=t.dtype, device=device) for t in inputs.tensors()]
    others = {name: _other_gradient(problem, inputs, name) for name in wanted} if wanted else {}
    more = _options(problem, inputs)
    if others:
        more["gradients"] = {name: _operand(grad) for name, grad in others.items()}
    asked = _asked(
        problem,
        inputs,
        config,
        *map(_reference, (grad_out, *grads)),
        kept.saved.data_ptr(),
        kept.saved.numel(),
    )
    _core.attention_backward(*asked, **more)
    return Gradients(*grads, **others)


def stats(problem: Problem, inputs: Inputs, config: Config) -> AttentionStats:
    """See :meth:`adasplash2.contract.Backend.stats`."""
    rows = (problem.batch, problem.heads_q, problem.length_q)
    side = _core.TILE_ROWS
    tiles_q, tiles_k = -(-problem.length_q // side), -(-problem.length_k // side)
    device = problem.device
    support = torch.empty(rows, dtype=torch.int32, device=device)
    iterations = torch.empty(rows, dtype=torch.int32, device=device)
    tiles = torch.zeros((*rows[:2], tiles_q, tiles_k), dtype=torch.uint8, device=device)
    _, tau, _ = _run(
        problem,
        inputs,
        config,
        keep=False,
        support=support.data_ptr(),
        iterations=iterations.data_ptr(),
        tiles=tiles.data_ptr(),
    )
    states = _core.LIVE_TILE, _core.EMPTY_TILE  # an empty one is seen, and a live one too
    live, seen = ((tiles >= state).sum(dim=(2, 3)) for state in states)
    empty = (seen - live).double() / seen.clamp(min=1)  # 0 where no query sees any key
    return AttentionStats(tau, support, iterations, empty, backend=name)


def rows_forward(
    problem: RowProblem, x: Tensor, config: Config, alphas: Tensor | None = None
) -> Tensor:
    """See :meth:`adasplash2.contract.Backend.rows_forward`."""
    shape = (problem.rows, problem.length)
    y = torch.empty(shape, dtype=problem.dtype, device=problem.device)
    _core.entmax_forward(
        problem.rows,
        problem.length,
        _dtype_name(problem.dtype),
        problem.alpha,
        x.data_ptr(),
        x.stride(0),
        y.data_ptr(),
        torch.get_num_threads(),
        str(config["isa"]),
        0 if alphas is None else alphas.data_ptr(),
    )
    return y


def rows_backward(
    problem: RowProblem, y: Tensor, grad_y: Tensor, config: Config, alphas: Tensor | None = None
) -> Tensor:
    """See :meth:`adasplash2.contract.Backend.rows_backward`."""
    y = y.contiguous()
    if problem.length > 1 and grad_y.stride(1) != 1:
        grad_y = grad_y.contiguous()
    grad_x = torch.empty_like(y)
    _core.entmax_backward(
        problem.rows,
        problem.length,
        _dtype_name(problem.dtype),
        problem.alpha,
        y.data_ptr(),
        grad_y.data_ptr(),
        grad_y.stride(0),
        grad_x.data_ptr(),
        torch.get_num_threads(),
        str(config["isa"]),
        0 if alphas is None else alphas.data_ptr(),
    )
    return grad_x


def _other_gradient(problem: Problem, inputs: Inputs, name: str) -> Tensor:
    """What the core writes the gradient of an operand to, or adds it to, see
    :class:`adasplash2.contract.Gradients`."""
    dtype, device = problem.compute_dtype, problem.device
    if name == "attn_mask":
        assert inputs.attn_mask is not None
        return torch.zeros(inputs.attn_mask.shape, dtype=dtype, device=device)
    rows = (problem.batch, problem.heads_q, problem.length_q)
    return torch.empty(rows, dtype=dtype, device=device)


def _asked(problem: Problem, inputs: Inputs, config: Config, *own: Any) -> tuple[Any, ...]:
    """What the core is told in both directions, behind it what is a direction's ``own``. Whoever
    calls it keeps ``inputs``. By place: to look names up takes longer than a small call."""
    scores = problem.scores
    return (
        _dims(problem),
        _dtype_name(problem.dtype),
        problem.alpha,
        scores.scale,
        scores.is_causal,
        *map(_reference, inputs.tensors()),
        torch.get_num_threads(),
        config["isa"],
        *own,
    )


def _options(problem: Problem, inputs: Inputs) -> dict[str, Any]:
    """What the core is told of masks and other scores, by name, in both directions."""
    if not problem.features:
        return {}
    scores = problem.scores
    return {
        "window": scores.window,
        "shift": problem.shift,
        "softcap": scores.softcap,
        "dropout_p": scores.dropout_p,
        "operands": _operands(inputs),
    }


def _operands(inputs: Inputs) -> dict[str, _Operand]:
    given = {
        name: operand
        for name, operand in zip(OPERANDS, inputs.operands(), strict=True)
        if operand is not None
    }
    given.pop("block_table", None)  # see _block_table
    if (ranges := given.pop("ranges", None)) is not None:
        # (batch, length_q) each: as (batch, no heads, length_q).
        given |= zip(("begins", "ends", "places"), ranges[:, :, None], strict=True)
    return {name: _operand(operand) for name, operand in given.items()}


def _block_table(inputs: Inputs) -> tuple[int, int, int, int] | None:
    """Address, batch stride, keys of a page and pages there are, as the core takes them."""
    table = inputs.block_table
    if table is None or table.numel() == 0:
        return None
    pages, _, page_size, _ = inputs.key.shape
    return table.data_ptr(), table.stride(0), page_size, pages


_Operand = tuple[int, str, tuple[int, int, int, int]]
"""Address, dtype and strides (batch, head, query, key) as the core takes them."""


def _operand(tensor: Tensor) -> _Operand:
    """Strides are 0 where one entry holds for all."""
    strides = [n if size > 1 else 0 for size, n in zip(tensor.shape, tensor.stride(), strict=True)]
    batch, head, row, key = strides + [0] * (4 - len(strides))
    return tensor.data_ptr(), _dtype_name(tensor.dtype), (batch, head, row, key)


def _run(
    problem: Problem, inputs: Inputs, config: Config, *, keep: bool, **counted: Any
) -> tuple[Tensor, Tensor, _core.Kept | None]:
    """``counted``: addresses of what :func:`stats` tells."""
    rows = (problem.batch, problem.heads_q, problem.length_q)
    inputs = _readable(inputs)  # alive until the core is done
    out = inputs.query.new_empty((*rows, problem.head_dim_v))
    tau = inputs.query.new_empty(rows, dtype=problem.compute_dtype)
    more = counted | _options(problem, inputs)
    if (table := _block_table(inputs)) is not None:
        more["block_table"] = table
    # What is decoded has none, and a table of tiles, for which it is not, takes any.
    scan_rows = config.get("scan_rows", _core.TILE_ROWS)
    asked = _asked(problem, inputs, config, _reference(out), tau.data_ptr(), keep, scan_rows)
    kept = _core.attention_forward(*asked, **more)
    return out, tau, kept


@functools.cache
def _core_hash() -> str:
    """Of the compiled core, which stands for its sources: the wheel does not have them."""
    return hashlib.sha256(Path(_core.__file__).read_bytes()).hexdigest()[:16]


def _dims(p: Problem) -> tuple[int, int, int, int, int, int, int]:
    return p.batch, p.heads_q, p.heads_kv, p.length_q, p.length_k, p.head_dim, p.head_dim_v


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _readable(inputs: Inputs) -> Inputs:
    """Copies where the core could not read the strides: also what is saved for a backward may come
    back with others."""
    query, key, value = inputs.tensors()
    if query.stride(3) == key.stride(3) == value.stride(3) == 1 and not inputs.has_operands():
        return inputs
    query, key, value = map(_unit_stride, inputs.tensors())
    ranges, table = inputs.ranges, inputs.block_table
    if ranges is not None and ranges.stride(2) != 1:
        ranges = ranges.contiguous()
    if table is not None and table.stride(1) != 1:
        table = table.contiguous()
    return Inputs(query, key, value, *inputs.operands())._replace(ranges=ranges, block_table=table)


def _unit_stride(tensor: Tensor) -> Tensor:
    """The core walks head_dim without a stride; other layouts are copied once."""
    return tensor if tensor.stride(3) == 1 or tensor.shape[3] == 1 else tensor.contiguous()


def _reference(tensor: Tensor) -> tuple[int, int, int, int]:
    batch, head, length, _ = tensor.stride()
    return tensor.data_ptr(), batch, head, length
