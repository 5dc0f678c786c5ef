"""GPUs that Triton compiles for: one dense pass, then live tiles only.

``solve`` (``kernels/solve.py``) computes every score once and keeps maxima of rows and tiles,
from which it bounds each row's threshold and lists the tiles that can hold support. Newton's steps,
outputs and gradients visit listed tiles only. Few queries without gradients have kernels of their
own (``kernels/decode.py``), which read each key once for all heads that share it. Nothing waits for
the host, so CUDA graphs can capture forward and backward, and there are no floating-point atomics:
equal calls give equal bits.

Of rows of up to 512 keys ``whole_rows`` (``kernels/whole.py``) keeps all scores in registers over
Newton's steps, and finds outputs too where there are registers for them.

With ``TRITON_INTERPRET=1`` set before Triton is imported, its interpreter runs the same kernels
on CPU tensors, slowly. ``import adasplash2`` does not import Triton.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib.metadata
import importlib.util
from collections.abc import Collection, Mapping, Sequence
from importlib import resources
from typing import Any

import torch
from torch import Tensor

from adasplash2.backends.triton import sizes
from adasplash2.backends.triton.sizes import INTERPRETED
from adasplash2.contract import AttentionStats, Config, Forward, Gradients, Kept
from adasplash2.problem import (
    DIFFERENTIABLE,
    Inputs,
    Operand,
    Problem,
    RowProblem,
    allowed_tiles,
    float32_refusals,
    unsupported,
)

name = "triton"

MIN_CAPABILITY = (8, 0)
"""Tensor cores for bfloat16, and what Triton itself is made for."""

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

SUPPORTED = (
    *("attn_mask", "alibi_slopes", "sinks", "scale as a tensor", "alpha as a tensor", "softcap"),
    *("window", "causal_align", "lengths or packed sequences", "dropout_p", "block_table"),
)
"""What kernels compute: they take no notice of what they do not know."""

INTERPRETER_SHARED = 232_448
"""Bytes of shared memory to assume where there is no device: those of compute capability 9.0."""

MAX_ROW_CHUNK = 8192
"""Scores of a dense row that a program holds at a time."""


def unavailable() -> str | None:
    """See :meth:`adasplash2.contract.Backend.unavailable`."""
    if not INTERPRETED and not torch.cuda.is_available():
        return "torch sees no CUDA device"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed (pip install triton)"
    return None


def refusals(problem: Problem | RowProblem) -> list[str]:
    """All reasons why this problem cannot run here; empty: it can."""
    reasons = refusals_anywhere(problem)
    wanted = "cpu" if INTERPRETED else "cuda"
    if problem.device.type != wanted:
        runs = "Triton's interpreter runs on" if INTERPRETED else "this backend needs"
        return [f"tensors are on {problem.device}, {runs} {wanted}", *reasons]
    if not INTERPRETED and torch.version.hip is None:
        major, minor = torch.cuda.get_device_capability(problem.device)
        if (major, minor) < MIN_CAPABILITY:
            least = f"{MIN_CAPABILITY[0]}.{MIN_CAPABILITY[1]}"
            reasons.append(
                f"{problem.device} has compute capability {major}.{minor}, Triton needs {least}"
            )
    if reasons or isinstance(problem, RowProblem):
        return reasons
    if next(sizes.tiled_configs(problem, _limits(problem.device)), None) is None:
        reasons.append(
            f"{problem.dtype} with head_dim {problem.head_dim} and {problem.head_dim_v} needs more "
            f"shared memory than a block has on {problem.device}"
        )
    return reasons


def refusals_anywhere(problem: Problem | RowProblem) -> list[str]:
    """See :meth:`adasplash2.contract.Backend.refusals_anywhere`."""
    reasons = []
    if problem.dtype not in DTYPES:
        reasons.append(f"dtype {problem.dtype} is computed by other backends only")
    if problem.alpha == 1.0:
        reasons.append("alpha = 1 is softmax, which these kernels do not compute")
    if reasons:
        return reasons
    reasons = unsupported(problem, SUPPORTED) + float32_refusals(problem)
    limit = 2**31 - 1
    if isinstance(problem, RowProblem):
        if max(problem.rows, problem.length) > limit:
            reasons.append(f"{problem.rows} rows of {problem.length} exceed 2^31 - 1 either way")
    elif max(problem.length_q, problem.length_k) * problem.batch * problem.heads_q > limit:
        reasons.append("the rows of all heads together exceed 2^31 - 1")
    return reasons


def configs(problem: Problem | RowProblem) -> Sequence[Config]:
    """Block sizes, warps and pipeline stages that fit the device; the default first."""
    if isinstance(problem, RowProblem):
        chunk = min(MAX_ROW_CHUNK, max(16, 1 << (problem.length - 1).bit_length()))
        return [{"chunk": chunk, "warps": max(1, min(8, chunk // 512))}]
    made = sizes.decoding_configs if sizes.is_decoding(problem) else sizes.configs
    return list(made(problem, _limits(problem.device)))


def versions() -> Mapping[str, str]:
    """What compiled and measured results depend on, besides the device."""
    return {"triton": importlib.metadata.version("triton"), "kernels": _source_digest()}


def notes(problem: Problem | RowProblem, inputs: Inputs, config: Config) -> Sequence[str]:
    """Nothing: what runs is ``config``, whatever the tensors."""
    return ()


def precompile(problem: Problem | RowProblem, config: Config) -> None:
    """Compile what forward, and backward where ``problem.needs_grad``, launch for inputs of
    contiguous layout, into Triton's cache. Launches nothing and touches no data."""
    if INTERPRETED:
        return
    from adasplash2.backends.triton import launch, rows

    meta: dict[str, Any] = {"dtype": problem.dtype, "device": "meta"}
    if isinstance(problem, RowProblem):
        x = torch.empty((problem.rows, problem.length), **meta)
        alphas = torch.empty(problem.rows, device="meta") if problem.alphas else None
        rows.forward(problem, x, config, launch.compile_only, alphas)
        if problem.needs_grad:
            rows.backward(problem, x, x, config, launch.compile_only, alphas)
        return
    call = _call_without_data(problem, config)
    result = _forward(call)
    if problem.needs_grad:
        learned = (x for x in problem.operands if x.name in DIFFERENTIABLE)
        wanted = [x.name for x in learned if x.dtype != torch.bool]
        for names in ((), wanted) if wanted else ((),):
            launch.backward(call, result.kept, result.out, names)


def _call_without_data(problem: Problem, config: Config) -> Any:
    """A ``launch.Call`` that only compiles, for inputs of contiguous layout."""
    from adasplash2.backends.triton import launch

    p = problem
    meta: dict[str, Any] = {"dtype": p.dtype, "device": "meta"}
    key_heads: tuple[int, ...] = (p.batch, p.heads_kv, p.length_k)
    if p.page_size:
        key_heads = (p.batch * (p.length_k // p.page_size), p.heads_kv, p.page_size)
    inputs = Inputs(
        torch.empty((p.batch, p.heads_q, p.length_q, p.head_dim), **meta),
        torch.empty((*key_heads, p.head_dim), **meta),
        torch.empty((*key_heads, p.head_dim_v), **meta),
    )
    inputs = inputs._replace(**{x.name: _without_data(x, problem) for x in p.operands})
    return launch.Call(problem, inputs, config, launch.compile_only)


def _without_data(operand: Operand, problem: Problem) -> Tensor:
    """A contiguous operand of this kind, on no device."""
    batch, heads, length_q = problem.batch, problem.heads_q, problem.length_q
    full: tuple[int, ...] = batch, heads, length_q, problem.length_k
    if operand.name == "ranges":
        full = 3, batch, length_q
    sizes_ = (n if spread else 1 for n, spread in zip(full, operand.spread, strict=False))
    return torch.empty(tuple(sizes_), dtype=operand.dtype, device="meta")


def saved_bound(problem: Problem) -> int:
    """The most of any configuration: smaller blocks have longer lists. Kernels, and thus these, are
    made for one ``head_dim``."""
    if problem.device.type != ("cpu" if INTERPRETED else "cuda") or problem.dtype not in DTYPES:
        return 0
    problem = dataclasses.replace(
        problem, head_dim=int(problem.head_dim), head_dim_v=int(problem.head_dim_v)
    )
    offered = sizes.tiled_configs(problem, _limits(problem.device))  # whole rows add no blocks
    blocks = {(c["block_q"], c["block_k"]): c for c in offered}
    totals = [sizes.Saved(problem, config).total for config in blocks.values()]
    return functools.reduce(torch.sym_max, totals) if totals else 0


def forward(problem: Problem, inputs: Inputs, config: Config, saved_bytes: int = -1) -> Forward:
    """Attention output, thresholds and the lists for the backward."""
    from adasplash2.backends.triton import launch

    call = launch.Call(problem, inputs, config, launch.launch)
    return _forward(call, saved_bytes=saved_bytes)


def _forward(call: Any, counted: dict[str, Tensor] | None = None, saved_bytes: int = -1) -> Forward:
    """The launches of a ``launch.Call``."""
    from adasplash2.backends.triton import decoding, launch

    if sizes.is_decoding(call.problem):
        return decoding.forward(call, counted)
    return launch.forward(call, counted, saved_bytes)


def backward(
    problem: Problem, inputs: Inputs, kept: Kept, grad_out: Tensor, config: Config,
    wanted: Collection[str] = (),
) -> Gradients:  # fmt: skip
    """Gradients of query, key and value, and of the operands that are ``wanted``."""
    from adasplash2.backends.triton import launch

    outside = kept.tau, kept.saved, grad_out
    call = launch.Call(problem, inputs, config, launch.launch, *outside)
    return launch.backward(call, kept, grad_out, wanted)


def stats(problem: Problem, inputs: Inputs, config: Config) -> AttentionStats:
    """A forward that records what it did."""
    from adasplash2.backends.triton import launch

    call = launch.Call(problem, inputs, config, launch.launch)
    counted = counters(problem, problem.device)
    tau = _forward(call, counted).tau
    allowed = allowed_tiles(problem, inputs, launch.STATS_TILE).to(torch.float64)
    live = counted["marks"].sum((2, 3), dtype=torch.float64)
    empty = (allowed - live) / allowed.clamp(min=1.0)
    return AttentionStats(tau, counted["support"], counted["iterations"], empty, backend=name)


def counters(problem: Problem, device: torch.device | str) -> dict[str, Tensor]:
    """What a forward counts into."""
    from adasplash2.backends.triton import launch

    rows = (problem.batch, problem.heads_q, problem.length_q)
    tiles = (-(-length // launch.STATS_TILE) for length in (problem.length_q, problem.length_k))
    return {
        "iterations": torch.zeros(rows, dtype=torch.int32, device=device),
        "support": torch.zeros(rows, dtype=torch.int32, device=device),
        "marks": torch.zeros((*rows[:2], *tiles), dtype=torch.int8, device=device),
    }


def rows_forward(
    problem: RowProblem, x: Tensor, config: Config, alphas: Tensor | None = None
) -> Tensor:
    """Entmax of each row of ``x``."""
    from adasplash2.backends.triton import launch, rows

    return rows.forward(problem, x, config, launch.launch, alphas)


def rows_backward(
    problem: RowProblem, y: Tensor, grad_y: Tensor, config: Config, alphas: Tensor | None = None
) -> Tensor:
    """Gradient of ``x`` from the output ``y`` and its gradient."""
    from adasplash2.backends.triton import launch, rows

    return rows.backward(problem, y, grad_y, config, launch.launch, alphas)


def _limits(device: torch.device) -> sizes.Limits:
    """What the device sets to block sizes."""
    if INTERPRETED:
        return sizes.Limits(INTERPRETER_SHARED)
    properties: Any = torch.cuda.get_device_properties(device)
    if torch.version.hip is not None:
        return sizes.Limits(int(properties.shared_memory_per_block))
    from adasplash2.backends.cuda import driver  # which needs no CuPy for this

    shared = int(properties.shared_memory_per_block_optin)
    wgmma = (properties.major, properties.minor) == (9, 0)
    return sizes.Limits(shared, wgmma, driver.may_overlap(driver.index(device)))


@functools.cache
def _source_digest() -> str:
    digest = hashlib.sha256()
    package = resources.files("adasplash2.backends.triton")
    for folder in (package, package / "kernels"):
        for source in sorted(folder.iterdir(), key=lambda file: file.name):
            if source.name.endswith(".py"):
                digest.update(source.read_bytes())
    return digest.hexdigest()
