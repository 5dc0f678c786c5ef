"""Which configurations a problem may have, which one runs, and which kernels those are."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from adasplash2.backends.cuda import layout, sizes
from adasplash2.contract import Config
from adasplash2.problem import FEATURES, TENSORS, Inputs, Problem

PORTABLE: Config = {"scan": "portable", "blocks": 1}
PORTABLE_TWO: Config = {"scan": "portable", "blocks": 2}
DENSE: Config = {"scan": "none"}
"""All rows in dense tiles from the start, on Hopper."""

SPLIT: Config = {"scan": "split"}
"""Keys cut into parts, of few queries: ``decode.cu``."""

FEWEST_DECODED = 256
"""The fewest keys that are cut where nothing else asks for it: fewer are not worth it."""

DECODED_FEATURES = ("causal_align", "window", FEATURES["ranges"], FEATURES["block_table"])
"""What only ``decode.cu`` knows: few queries may ask it, of however few keys."""

HOPPER_SHAPES = ((3, 2), (3, 3), (2, 3))
"""Warpgroups and stages of ``scan90.cu``, for head_dim up to 128. The first was the fastest or
within 10 % of it wherever measured; fewer warpgroups or stages leave room for longer lists."""

RETRY_SHAPE = (1, 2)
"""The same for the retry of rows that their lists could not hold."""

SHORT_KEYS = 512
"""Keys that a row sees, on the mean, up to which it is taken to keep so many of them that the scan
does not pay. On an H100 a step with Gaussian q, k, v took 0.6x of the time (0.5x with 256 keys);
with queries times 4, where a row keeps four keys, it takes 1.5x."""

ALIGNMENT = layout.COPY_BYTES
"""Rows that kernels copy by ``COPY_BYTES`` start on a multiple of this; a power of two."""


def is_decoding(problem: Problem) -> bool:
    """Whether ``decode.cu`` computes it: few queries without gradients, of enough keys or with what
    it alone knows."""
    few = not problem.needs_grad and problem.length_q <= layout.MOST_DECODED
    return few and (problem.length_k >= FEWEST_DECODED or bool(problem.features))


def decode_of(problem: Problem) -> sizes.Decode | None:
    """Its blocks; None where the device has too little memory for them."""
    return sizes.decode(
        problem.gqa_group * problem.length_q,
        problem.head_dim,
        problem.dtype.itemsize,
        shared_memory(problem.device),
    )


def offered(problem: Problem) -> list[Config]:
    """What the device has room for: where few queries are decoded that first; shapes of the scan
    where nothing is asked that they do not know."""
    split = [SPLIT] if is_decoding(problem) and decode_of(problem) else []
    return split + ([] if problem.features else _scans(problem))


def _scans(problem: Problem) -> list[Config]:
    shapes = [PORTABLE, PORTABLE_TWO]
    if _has_wgmma(problem) and may_align(problem):
        shapes = [{"scan": "hopper", "warpgroups": w, "stages": s} for w, s in HOPPER_SHAPES]
        shapes.append(PORTABLE)
        if dense_of(problem, scan_of(problem, DENSE)).maps:
            shapes.insert(0 if _is_short(problem) else len(shapes), DENSE)
    available = shared_memory(problem.device)
    dense = sizes.portable_dense(problem.head_dim, problem.head_dim_v, problem.dtype.itemsize)
    if max(dense.shared.values()) > available.per_block:
        return []
    return [c for c in shapes if scan_of(problem, c).capacity(available) is not None]


def may_align(problem: Problem) -> bool:
    """Whether rows of so many elements can all start on 16 bytes, as TMA and wgmma need them."""
    widths = problem.head_dim, problem.head_dim_v
    return all(width * problem.dtype.itemsize % ALIGNMENT == 0 for width in widths)


_UNMAPPED = PORTABLE["scan"], SPLIT["scan"]


def needs_alignment(config: Config) -> bool:
    """Whether its kernels read tensors by TMA, which takes rows that start on 16 bytes. Others are
    copied first: what runs is the configuration, in forward and backward, wherever tensors lie."""
    return config["scan"] not in _UNMAPPED


def is_aligned(*tensors: Tensor) -> bool:
    """Whether every row of the tensors starts on 16 bytes and is a multiple of them long. Rows
    that are all the same one do not count: TMA takes no such stride."""
    rest = ALIGNMENT - 1
    for tensor in tensors:
        itemsize, strides = tensor.element_size(), tensor.stride()
        batch, head, row, _ = strides
        fixed = tensor.data_ptr() | tensor.size(3) * itemsize
        if row and (fixed | (batch | head | row) * itemsize) & rest == 0:
            continue
        if fixed & rest or (row == 0 and tensor.size(2) != 1):
            return False
        for stride, size in zip(strides[:3], tensor.shape, strict=False):
            if stride * itemsize & rest and size > 1:
                return False
    return True


def notes(inputs: Inputs, config: Config) -> list[str]:
    """Which inputs are copied first since TMA cannot read them, a sentence each. Those whose
    head_dim stride is not 1 are copied by every configuration."""
    if not needs_alignment(config):
        return []
    return [
        f"rows of {name} do not all start on {ALIGNMENT} bytes: it is copied first"
        for name, x in zip(TENSORS, inputs.tensors(), strict=True)
        if (x.stride(-1) == 1 or x.size(-1) == 1) and not is_aligned(x)
    ]


def scan_of(problem: Problem, config: Config) -> sizes.Scan:
    """The scan of a configuration; of :data:`DENSE`, the one that retries."""
    if config == DENSE:
        return sizes.hopper_scan(problem.head_dim, *RETRY_SHAPE)
    if config["scan"] == "hopper":
        return sizes.hopper_scan(problem.head_dim, int(config["warpgroups"]), int(config["stages"]))
    return sizes.portable_scan(problem.head_dim, problem.dtype.itemsize, int(config["blocks"]))


def dense_of(problem: Problem, scan: sizes.Scan) -> sizes.Dense:
    """The kernels of flat rows that go with a scan."""
    widths = problem.head_dim, problem.head_dim_v
    closed_form = sizes.alpha_code(problem.alpha) != layout.ALPHA_KINDS["kGeneral"]
    if scan.maps_keys and closed_form and max(widths) <= layout.HOPPER_MAX_HEAD_DIM:
        return sizes.hopper_dense(*widths, problem.length_k)
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
