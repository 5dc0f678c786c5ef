"""NVIDIA GPUs from compute capability 8.0 on: CUDA C++ compiled at run time by NVRTC.

The element path: one dense scan of the scores keeps each row's survivors, all else are
gathers over survivors (``kernels/scan.cu`` or, on Hopper, ``scan90.cu``; ``elements.cu``). Rows
whose support does not fit their lists are found on the device: on Hopper they are scanned once more
with room for up to 256 survivors where that may help, and what is left is served by dense tiles
(``dense.cu`` or, on Hopper, ``dense90_output.cu`` and ``dense90_grad.cu``). Of few keys a row keeps
so large a part that dense tiles are faster from the start, and Hopper can leave out the scan.
Nothing waits for the host, so CUDA graphs can capture forward and backward.

Dense tiles multiply their zeros too, so that a NaN or an infinity in them reaches rows that do not
keep its key. What comes out and is not finite is marked, and ``exact.cu`` does it again. Without a
scan, heads with a query, key or value that is not finite take the element path.

Few queries without gradients have kernels of their own (``decode.cu``), which cut the keys into
parts; these alone know lengths, windows and pages.

Needs CuPy, which brings NVRTC, and neither Triton nor a compiler. Importing this package imports
neither CuPy nor NumPy, which CuPy needs: :func:`unavailable` says which is missing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from adasplash2.backends.cuda import attention, configurations, decoding, layout, rows, sizes
from adasplash2.backends.cuda import compile as compiler
from adasplash2.backends.cuda.attention import backward
from adasplash2.contract import AttentionStats, Config, Forward
from adasplash2.problem import Inputs, Problem, RowProblem, float32_refusals, unsupported

__all__ = [
    "backward",
    "configs",
    "forward",
    "name",
    "notes",
    "precompile",
    "refusals",
    "refusals_anywhere",
    "rows_backward",
    "rows_forward",
    "saved_bound",
    "stats",
    "unavailable",
    "versions",
]

name = "cuda"

MIN_CAPABILITY = (8, 0)
"""``cp.async`` and bfloat16 matrix fragments."""

LARGEST_POWER = {2: 1024.0, 4: 16.0}
"""By bytes of the dtype, the largest ``1 / (alpha - 1)`` of attention: the power makes that much of
the round-off of thresholds, which are kept in float32."""


def unavailable() -> str | None:
    """See :meth:`adasplash2.contract.Backend.unavailable`."""
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    if torch.version.hip is not None:
        return "this is a ROCm build of torch; these kernels are for NVIDIA GPUs"
    no_cupy = "CuPy is not installed (pip install cupy-cuda13x or cupy-cuda12x)"
    try:
        import cupy
    except ModuleNotFoundError as error:
        if error.name == "cupy":
            return no_cupy
        if error.name == "numpy":
            return "NumPy, which CuPy needs, is not installed (pip install numpy)"
        raise
    if not hasattr(cupy, "RawModule"):  # a folder named cupy is not CuPy
        return no_cupy
    try:
        from cupy.cuda import nvrtc

        nvrtc.getVersion()
    except Exception as error:
        raise RuntimeError(f"NVRTC cannot be loaded through CuPy ({error})") from error
    return None


def refusals(problem: Problem | RowProblem) -> list[str]:
    """All reasons why this problem cannot run here; empty: it can."""
    reasons = refusals_anywhere(problem)
    if problem.device.type != "cuda":
        return [f"tensors are on {problem.device}, this backend needs a CUDA device", *reasons]
    capability = torch.cuda.get_device_capability(problem.device)
    if capability < MIN_CAPABILITY:
        reasons.append(
            f"{problem.device} has compute capability {capability[0]}.{capability[1]}, "
            f"the kernels need {MIN_CAPABILITY[0]}.{MIN_CAPABILITY[1]}"
        )
    if reasons or isinstance(problem, RowProblem):
        return reasons
    if not configs(problem):
        optin = configurations.shared_memory(problem.device).per_block
        reasons.append(
            f"{problem.dtype} with head_dim {problem.head_dim} and {problem.head_dim_v} needs "
            f"more shared memory than the {optin} bytes a block has on {problem.device}"
        )
    return reasons


def refusals_anywhere(problem: Problem | RowProblem) -> list[str]:
    """See :meth:`adasplash2.contract.Backend.refusals_anywhere`."""
    reasons = []
    if problem.dtype not in layout.DTYPE_CODES:
        reasons.append(f"dtype {problem.dtype} is computed by other backends only")
    if problem.alpha == 1.0:
        reasons.append("alpha = 1 is softmax, which these kernels do not compute")
    if reasons:
        return reasons
    if isinstance(problem, RowProblem):
        return unsupported(problem) + float32_refusals(problem) + rows.refusals(problem)
    decoded = configurations.DECODED_FEATURES
    reasons = unsupported(problem, decoded) + float32_refusals(problem)
    if not configurations.is_decoding(problem):
        reasons += (
            f"{name} is computed here without gradients only, for up to {layout.MOST_DECODED} "
            f"queries"
            for name in problem.features
            if name in decoded
        )
    smallest = 1.0 + 1.0 / LARGEST_POWER[problem.dtype.itemsize]
    if 1.0 < problem.alpha < smallest:
        reasons.append(
            f"alpha must be at least {smallest:g} for {problem.dtype} in these kernels, whose "
            f"thresholds have too few digits for {problem.alpha:g}"
        )
    if problem.dtype == torch.float16 and problem.alpha > 2.0 and problem.needs_grad:
        reasons.append(
            f"alpha must be at most 2 for gradients in torch.float16 in these kernels, got "
            f"{problem.alpha:g}: beyond it small probabilities have gradients that float16 cannot "
            "hold"
        )
    if sizes.Counts.of(problem).rows > 2**31 - 1:
        reasons.append("the query rows of all heads together exceed 2^31 - 1")
    if problem.needs_grad and sizes.row_numbers(problem) > 2**31 - 1:
        reasons.append("query rows that share keys exceed 2^31 - 1, heads padded to powers of two")
    return reasons


def configs(problem: Problem | RowProblem) -> Sequence[Config]:
    """What the device has room for."""
    return [{}] if isinstance(problem, RowProblem) else configurations.offered(problem)


def notes(problem: Problem | RowProblem, inputs: Inputs, config: Config) -> list[str]:
    """What is done to these tensors before ``config`` runs, a sentence each."""
    return [] if isinstance(problem, RowProblem) else configurations.notes(inputs, config)


def forward(problem: Problem, inputs: Inputs, config: Config, saved_bytes: int = -1) -> Forward:
    """Attention output, thresholds and the survivors for the backward."""
    if config == configurations.SPLIT:
        return decoding.forward(problem, inputs)
    return attention.forward(problem, inputs, config, saved_bytes)


def stats(problem: Problem, inputs: Inputs, config: Config) -> AttentionStats:
    """A forward that counts what it did."""
    if config == configurations.SPLIT:
        return decoding.stats(problem, inputs)
    return attention.stats(problem, inputs, config)


def saved_bound(problem: Problem) -> int:
    """What every configuration saves."""
    if problem.device.type != "cuda" or problem.dtype not in layout.DTYPE_CODES:
        return 0
    return sizes.Saved(problem).total


def rows_forward(
    problem: RowProblem, x: Tensor, config: Config, alphas: Tensor | None = None
) -> Tensor:
    """Entmax of each row of ``x``; there are no ``alphas``, which :func:`refusals` sees to."""
    return rows.forward(problem, x)


def rows_backward(
    problem: RowProblem, y: Tensor, grad_y: Tensor, config: Config, alphas: Tensor | None = None
) -> Tensor:
    """Gradient of ``x`` from the output ``y`` and its gradient."""
    return rows.backward(problem, y, grad_y)


def versions() -> Mapping[str, str]:
    """See :meth:`adasplash2.contract.Backend.versions`."""
    import cupy

    return {
        "cupy": cupy.__version__,
        "nvrtc": ".".join(map(str, compiler.nvrtc_version())),
        "kernels": compiler.sources_hash()[:16],
    }


def precompile(problem: Problem | RowProblem, config: Config) -> None:
    """See :meth:`adasplash2.contract.Backend.precompile`; for tensors whose rows lie on 16 bytes
    where their width allows it. Others may take a variant more."""
    if isinstance(problem, RowProblem):
        arch = compiler.architecture(torch.cuda.get_device_capability(problem.device))
        compiler.cubin("rows.cu", rows.defines(problem), arch)
        return
    if config == configurations.SPLIT:
        _ = decoding.plan_of(problem, configurations.may_align(problem)).launches
        return
    plan = attention.plan_of(problem, config, configurations.may_align(problem))
    _ = plan.scans, plan.forward, plan.backward if problem.needs_grad else ()
