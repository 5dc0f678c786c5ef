"""Calling kernels: the argument block, compiled variants per device, torch's stream."""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable, Mapping
from functools import cache, lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from adasplash2.backends.cuda import compile as compiler
from adasplash2.problem import Problem, RowProblem

_POINTER = np.uint64
_VIEW = np.dtype(
    [("data", _POINTER), ("batch", np.int64), ("head", np.int64), ("row", np.int64)], align=True
)
PARAMS = np.dtype(
    [
        *((name, _VIEW) for name in ("q", "k", "v", "o", "grad_o", "grad_q", "grad_k", "grad_v")),
        *(
            (name, _POINTER)
            for name in (
                "tau",
                "iterations",
                "tiles",
                "row_start",
                "row_count",
                "flat",
                "poison",
                "entries",
                "rank",
                "column_count",
                "column_start",
                "records",
                "delta",
                "long_columns",
                "long_done",
                "long_parts",
            )
        ),
        *(
            (name, np.int32)
            for name in (
                "batch",
                "heads_q",
                "heads_kv",
                "group",
                "length_q",
                "length_k",
                "groups_q",
                "long_limit",
            )
        ),
        *((name, np.float32) for name in ("c", "inv_c", "scale", "q_sign", "r")),
    ],
    align=True,
)
"""``Params`` of ``kernels/common.cuh``, field by field."""

DTYPE_CODES = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}
"""The values of ``ADASPLASH2_DTYPE``."""


def alpha_code(alpha: float) -> int:
    """The ``AlphaKind`` of ``threshold.h``."""
    return {1.5: 0, 2.0: 1}.get(alpha, 2)


def defines(problem: Problem, aligned: bool) -> dict[str, int]:
    """What ``kernels/common.cuh`` expects to be defined."""
    return {
        "DTYPE": DTYPE_CODES[problem.dtype],
        "HEAD_DIM": problem.head_dim,
        "HEAD_DIM_V": problem.head_dim_v,
        "ALPHA": alpha_code(problem.alpha),
        "CAUSAL": int(problem.scores.is_causal),
        "ALIGNED": int(aligned),
    }


def row_defines(problem: RowProblem) -> dict[str, int]:
    """The same for the kernels of ``entmax``, which have no heads."""
    return {
        "DTYPE": DTYPE_CODES[problem.dtype],
        "HEAD_DIM": 16,
        "HEAD_DIM_V": 16,
        "ALPHA": alpha_code(problem.alpha),
        "CAUSAL": 0,
        "ALIGNED": 0,
    }


def is_aligned(*tensors: Tensor) -> bool:
    """Whether every row of the tensors starts on 16 bytes and is a multiple of them long. Rows
    that are all the same one do not count: the copy engine takes no such stride."""
    for tensor in tensors:
        shape, strides, itemsize = tensor.shape, tensor.stride(), tensor.element_size()
        if tensor.data_ptr() % 16 or shape[-1] * itemsize % 16:
            return False
        if strides[-2] == 0 and shape[-2] != 1:
            return False
        for stride, size in zip(strides[:-1], shape[:-1], strict=True):
            if stride * itemsize % 16 and size > 1:
                return False
    return True


def view(tensor: Tensor) -> tuple[int, int, int, int]:
    """``View`` of a 4-dimensional tensor with unit inner stride."""
    return (tensor.data_ptr(), tensor.stride(0), tensor.stride(1), tensor.stride(2))


def params(fields: Mapping[str, Any], constants: Any = None, layout: np.dtype[Any] = PARAMS) -> Any:
    """The argument block of ``constants`` and ``fields``; what neither names is zero."""
    block = np.zeros((), layout) if constants is None else constants.copy()
    for name, value in fields.items():
        block[name] = value.data_ptr() if isinstance(value, Tensor) else value
    return block


_OFFSETS = {name: entry[1] for name, entry in (PARAMS.fields or {}).items()}
_WORDS = _OFFSETS["batch"] // 8  # what differs from call to call: views and pointers
_WORD_OF = {name: at // 8 for name, at in _OFFSETS.items() if at // 8 < _WORDS}
_words = struct.Struct(f"{_WORDS}q")


def call_argument(fields: Mapping[str, Any], constants: Any) -> Any:
    """``argument(params(fields, constants))`` in a tenth of the time; ``fields`` are views and
    pointers, which ``constants`` does not hold."""
    words = [0] * _WORDS
    for name, value in fields.items():
        at = _WORD_OF[name]
        if isinstance(value, tuple):
            words[at : at + 4] = value
        else:
            words[at] = value.data_ptr() if isinstance(value, Tensor) else value
    block = _words.pack(*words) + constants.tobytes()[_words.size :]
    return np.ndarray((), f"V{len(block)}", bytearray(block))


def argument(block: Any) -> Any:
    """``block`` as a kernel takes it: its bytes. CuPy would describe a structured array field by
    field at every launch, which takes ten times as long as the launch."""
    return block.view(f"V{block.nbytes}")


Launch = Callable[..., None]
"""A kernel with its grid: takes the kernel's arguments."""


class Kernel:
    """One kernel of one compiled unit on the current device."""

    def __init__(self, module: Any, name: str, shared_bytes: int) -> None:
        self._function = module.get_function(name)
        self._shared_bytes = shared_bytes
        if shared_bytes:
            self._function.max_dynamic_shared_size_bytes = shared_bytes

    def __call__(self, blocks: tuple[int, ...], threads: int, *arguments: Any) -> None:
        """Launch on torch's current stream of the current device."""
        stream = _cupy_stream(torch.cuda.current_stream().cuda_stream)
        self._function(blocks, (threads,), arguments, shared_mem=self._shared_bytes, stream=stream)


_MAP_TYPES = {torch.float16: 6, torch.bfloat16: 9}  # CUtensorMapDataType
_MAP_SWIZZLE_128B, _MAP_L2_PROMOTION_256B = 3, 3


def tensor_map(keys: Tensor, rows: int) -> Any:
    """The driver's description of ``keys`` for the copy engine: boxes of 64 columns by ``rows``.

    Raises:
        RuntimeError: the driver refuses; the message has its error code.
    """
    return _encoded_map(keys.data_ptr(), keys.dtype, keys.shape, keys.stride(), rows)


@lru_cache(1024)  # training comes back to the same places
def _encoded_map(
    data: int, dtype: torch.dtype, shape: torch.Size, strides: tuple[int, ...], rows: int
) -> Any:
    batch, heads, length, width = shape
    # A dimension expanded with stride 0 has one entry; the kernel stays at it.
    sizes = [width, length]
    steps = [strides[2] if length > 1 else width]
    for size, stride in ((heads, strides[1]), (batch, strides[0])):
        single = size == 1 or stride == 0
        sizes.append(1 if single else size)
        steps.append(steps[-1] * sizes[-2] if single else stride)
    room = np.zeros(24, dtype=np.uint64)  # the driver writes to 64 aligned bytes
    encoded = room[-room.ctypes.data % 64 // 8 :][:16]
    status = _encoder()(
        encoded.ctypes.data,
        _MAP_TYPES[dtype],
        4,
        data,
        (ctypes.c_uint64 * 4)(*sizes),
        (ctypes.c_uint64 * 3)(*(step * dtype.itemsize for step in steps)),
        (ctypes.c_uint32 * 4)(64, rows, 1, 1),
        (ctypes.c_uint32 * 4)(1, 1, 1, 1),
        0,
        _MAP_SWIZZLE_128B,
        _MAP_L2_PROMOTION_256B,
        0,
    )
    if status:
        raise RuntimeError(
            f"the CUDA driver cannot describe keys of shape {tuple(shape)} and strides "
            f"{strides} to the copy engine (CUresult {status})"
        )
    return encoded.view("V128")


@cache
def _encoder() -> Any:
    encode = ctypes.CDLL("libcuda.so.1").cuTensorMapEncodeTiled
    pointer, number = ctypes.c_void_p, ctypes.c_int
    encode.argtypes = [pointer, number, ctypes.c_uint32, *[pointer] * 5, *[number] * 4]
    encode.restype = number
    return encode


@cache
def _cupy_stream(handle: int) -> Any:
    import cupy

    class _Handle:
        def __cuda_stream__(self) -> tuple[int, int]:
            return (0, handle)

    return cupy.cuda.Stream.from_external(_Handle())


@cache
def kernel(
    device: int, unit: str, name: str, options: tuple[tuple[str, int], ...], shared_bytes: int = 0
) -> Kernel:
    """The kernel ``name`` of ``unit`` for one device; compiled and loaded once."""
    return Kernel(_module(device, unit, options), name, shared_bytes)


@cache
def _module(device: int, unit: str, options: tuple[tuple[str, int], ...]) -> Any:
    import cupy

    arch = compiler.architecture(torch.cuda.get_device_capability(device))
    with cupy.cuda.Device(device):
        return cupy.RawModule(path=str(compiler.cubin_path(unit, dict(options), arch)))
