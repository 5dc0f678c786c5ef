"""The driver: the argument block of a call, torch's stream, TMA's maps, kernels per device.

CuPy loads kernels; the driver launches them. A launch by CuPy takes several times as long, most
of it to describe the arguments anew.
"""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Callable, Mapping
from functools import cache, lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from adasplash2.backends.cuda import compile as compiler
from adasplash2.backends.cuda import layout
from adasplash2.torch_fastpath import raw_stream


def params(
    fields: Mapping[str, Any], struct: type[ctypes.Structure] = layout.Params
) -> ctypes.Structure:
    """The argument block of ``fields``; what they do not name is zero.

    Raises:
        OverflowError: an integer does not fit its field.
    """
    block = struct()
    for name, value in fields.items():
        given = value.data_ptr() if isinstance(value, Tensor) else value
        setattr(block, name, given)
        if isinstance(given, int) and getattr(block, name) != given:
            raise OverflowError(f"{name} = {given} does not fit {struct.__name__}")
    return block


def words(block: ctypes.Structure) -> list[int]:
    """``block`` as words of 8 bytes: a list is copied and filled in faster than fields are."""
    return array("q", bytes(block)).tolist()


@cache
def _words_of(struct: type[ctypes.Structure]) -> dict[str, int]:
    """The word in which a field begins."""
    return {name: getattr(struct, name).offset // 8 for name, *_ in struct._fields_}


def places(
    offsets: Mapping[str, int], struct: type[ctypes.Structure] = layout.Params
) -> tuple[tuple[int, int], ...]:
    """Words of pointers into one allocation, each with its offset there."""
    words = _words_of(struct)
    return tuple((words[name], offset) for name, offset in offsets.items())


Maps = tuple[tuple[str, int], ...]
"""The tensors that a kernel has described to TMA, each a view of the block, with the
rows of its boxes; in the order of the kernel's parameters."""


class Call:
    """One call of the backend: its argument block, and torch's current stream of its device.

    The block's views and pointers are put in place first. Kernels are launched inside ``with``,
    where the device's context is current: whichever thread or device the call comes from.
    ``follows`` tells whether the last thing on the stream is a kernel of this call.
    """

    __slots__ = (
        "_block",
        "_context",
        "_held",
        "_pointers",
        "_viewed",
        "_word_of",
        "_words",
        "block",
        "follows",
        "pointers",
        "stream",
    )

    def __init__(
        self,
        device: int,
        constants: list[int],
        struct: type[ctypes.Structure] = layout.Params,
    ) -> None:
        self._words = constants.copy()
        self._word_of = _words_of(struct)
        self._viewed: dict[str, Tensor] = {}
        self._context = context(device)
        self.follows = False
        self.stream = raw_stream(device)

    def put_view(self, name: str, tensor: Tensor) -> None:
        """``View`` of a 4-dimensional tensor with unit inner stride."""
        at = self._word_of[name]
        self._words[at : at + 4] = tensor.data_ptr(), *tensor.stride()[:3]
        self._viewed[name] = tensor

    def put_pointer(self, name: str, tensor: Tensor) -> None:
        self._words[self._word_of[name]] = tensor.data_ptr()

    def put_number(self, name: str, number: int) -> None:
        """A ``long long``."""
        self._words[self._word_of[name]] = number

    def put_parts(self, memory: Tensor, places: tuple[tuple[int, int], ...]) -> None:
        """Pointers into ``memory``, from :func:`places`."""
        words, base = self._words, memory.data_ptr()
        for at, offset in places:
            words[at] = base + offset

    def __enter__(self) -> Call:
        # The driver copies arguments while it launches; until then these arrays hold them.
        self._block = array("q", self._words)
        self.block = self._block.buffer_info()[0]
        self._pointers = array("q", (self.block,))
        self.pointers = self._pointers.buffer_info()[0]
        self._held: dict[Maps, MapArguments] = {}
        check(driver().cuCtxPushCurrent_v2(self._context))
        return self

    def __exit__(self, *_: object) -> None:
        check(driver().cuCtxPopCurrent_v2(None))

    def with_maps(self, maps: Maps) -> int:
        """Where a kernel finds the block and these maps, until the call is gone."""
        held = self._held.get(maps)  # several kernels take the same
        if held is None:
            described = tuple(tensor_map(self._viewed[name], rows) for name, rows in maps)
            pointers = array("q", (self.block, *(one.address for one in described)))
            held = self._held[maps] = MapArguments(pointers.buffer_info()[0], pointers, described)
        return held.address

    def fill(self, address: int, nbytes: int, value: int = 0) -> None:
        """Set every byte of some memory, on the stream."""
        self.follows = False
        check(driver().cuMemsetD8Async(address, value, nbytes, self.stream))


Launch = Callable[[Call], None]
"""A kernel with its grid, and with the maps it takes."""


class Kernel:
    """One kernel of one compiled unit on one device; where it ``may_overlap``, it may start while
    the call's kernels before it run, see ``common.cuh``."""

    def __init__(
        self, module: Any, name: str, shared_bytes: int, may_overlap: bool = False
    ) -> None:
        found = module.get_function(name)
        self._found = found  # keeps its module loaded
        self._function = found.ptr
        if shared_bytes:
            attribute = CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            check(driver().cuFuncSetAttribute(self._function, attribute, shared_bytes))
        self._shared_bytes = shared_bytes
        self._may_overlap = may_overlap
        self._launch = getattr(driver(), "cuLaunchKernelEx", None)  # not in drivers before 11.8

    def __call__(self, grid: tuple[int, int], threads: int, maps: Maps, call: Call) -> None:
        """Launch on the stream of ``call``."""
        pointers = call.with_maps(maps) if maps else call.pointers
        size, stream, function = self._shared_bytes, call.stream, self._function
        if self._launch:
            how = launch_config(grid, threads, size, stream, call.follows and self._may_overlap)
            status = self._launch(how.address, function, pointers, None)
        else:
            status = driver().cuLaunchKernel(
                function, *grid, 1, threads, 1, 1, size, stream, pointers, None
            )
        call.follows = True
        if status:
            check(status)


class LaunchAttribute(ctypes.Structure):
    """``CUlaunchAttribute`` whose value is one number."""

    _fields_ = (("id", ctypes.c_int), ("pad", ctypes.c_int), ("value", ctypes.c_int * 16))


class LaunchConfig(ctypes.Structure):
    """``CUlaunchConfig``."""

    _fields_ = (
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared_bytes", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(LaunchAttribute)),
        ("attribute_count", ctypes.c_uint),
    )


class LaunchConfigAt(NamedTuple):
    """A :class:`LaunchConfig` at ``address``, which ``config`` holds."""

    address: int
    config: LaunchConfig


CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION = 6
_OVERLAPS = LaunchAttribute(CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION, value=(1,))


@lru_cache(4096)  # a model's launches are the same from step to step; one by numbers takes longer
def launch_config(
    grid: tuple[int, int], threads: int, shared_bytes: int, stream: int, overlaps: bool
) -> LaunchConfigAt:
    """How to launch a kernel: where it ``overlaps``, before the one ahead on the stream ends."""
    config = LaunchConfig((*grid, 1), (threads, 1, 1), shared_bytes, stream)
    if overlaps:
        config.attributes, config.attribute_count = ctypes.pointer(_OVERLAPS), 1
    return LaunchConfigAt(ctypes.addressof(config), config)


OVERLAPPING_DRIVER = 12_030
"""The first driver that captures such launches into graphs, as ``cuDriverGetVersion`` counts."""


@cache
def may_overlap(device: int) -> bool:
    """Whether kernels on ``device`` can be launched so."""
    version = ctypes.c_int()
    check(driver().cuDriverGetVersion(ctypes.byref(version)))
    waits = torch.cuda.get_device_capability(device) >= (9, 0)
    return waits and version.value >= OVERLAPPING_DRIVER


_HANDLE, _INT, _SIZE = ctypes.c_void_p, ctypes.c_uint, ctypes.c_size_t
CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES = 8
_SIGNATURES = {
    "cuCtxPushCurrent_v2": (_HANDLE,),
    "cuCtxPopCurrent_v2": (_HANDLE,),
    "cuDeviceGet": (_HANDLE, ctypes.c_int),
    "cuDriverGetVersion": (_HANDLE,),
    "cuDevicePrimaryCtxRetain": (_HANDLE, ctypes.c_int),
    "cuFuncSetAttribute": (_HANDLE, ctypes.c_int, ctypes.c_int),
    "cuGetErrorName": (ctypes.c_int, _HANDLE),
    "cuLaunchKernel": (_HANDLE, *[_INT] * 7, _HANDLE, _HANDLE, _HANDLE),
    "cuLaunchKernelEx": (_HANDLE, _HANDLE, _HANDLE, _HANDLE),
    "cuMemsetD8Async": (_HANDLE, ctypes.c_ubyte, _SIZE, _HANDLE),
    "cuTensorMapEncodeTiled": (_HANDLE, ctypes.c_int, _INT, *[_HANDLE] * 5, *[ctypes.c_int] * 4),
}


@cache
def driver() -> Any:
    """The CUDA driver. Its calls let other Python threads run: a launch waits where the queue is
    full."""
    library = ctypes.CDLL("libcuda.so.1")
    for name, types in _SIGNATURES.items():
        if hasattr(library, name):  # drivers before Hopper describe no tensors
            function = getattr(library, name)
            function.argtypes, function.restype = types, ctypes.c_int
    return library


def check(status: int) -> None:
    """Raise RuntimeError with the driver's name of the error, where there is one."""
    if status:
        found = ctypes.c_char_p()
        driver().cuGetErrorName(status, ctypes.byref(found))
        name = (found.value or b"an unknown error").decode()
        raise RuntimeError(f"the CUDA driver returned {name} ({status})")


def index(device: torch.device) -> int:
    """The number of a CUDA device."""
    return torch.cuda.current_device() if device.index is None else device.index


@cache
def context(device: int) -> int:
    """The context that torch and CuPy use on ``device``; it is never released."""
    number, found = ctypes.c_int(), ctypes.c_void_p()
    check(driver().cuDeviceGet(ctypes.byref(number), device))
    check(driver().cuDevicePrimaryCtxRetain(ctypes.byref(found), number))
    return found.value or 0


# What cuda.h calls the choices of cuTensorMapEncodeTiled.
CU_TENSOR_MAP_DATA_TYPE_FLOAT16 = 6
CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 = 9
CU_TENSOR_MAP_INTERLEAVE_NONE = 0
CU_TENSOR_MAP_SWIZZLE_128B = 3
CU_TENSOR_MAP_L2_PROMOTION_L2_256B = 3
CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE = 0  # zeros

_MAP_TYPES = {
    torch.float16: CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
    torch.bfloat16: CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
}


class TensorMap(NamedTuple):
    """128 bytes at ``address``, which ``room`` holds."""

    address: int
    room: Any


class MapArguments(NamedTuple):
    """The pointers to a kernel's arguments at ``address``, and all that they point into."""

    address: int
    pointers: array[int]
    maps: tuple[TensorMap, ...]


def tensor_map(tensor: Tensor, rows: int) -> TensorMap:
    """The driver's description of ``tensor`` for TMA: boxes of 64 columns by ``rows``.

    Raises:
        RuntimeError: the driver refuses; the message has its error code.
    """
    return _encoded_map(tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride(), rows)


@lru_cache(4096)  # training comes back to the same places
def _encoded_map(
    data: int, dtype: torch.dtype, shape: torch.Size, strides: tuple[int, ...], rows: int
) -> TensorMap:
    batch, heads, length, width = shape
    # A dimension expanded with stride 0 has one entry; the kernel stays at it.
    sizes = [width, length]
    steps = [strides[2] if length > 1 else width]
    for size, stride in ((heads, strides[1]), (batch, strides[0])):
        single = size == 1 or stride == 0
        sizes.append(1 if single else size)
        steps.append(steps[-1] * sizes[-2] if single else stride)
    room = (ctypes.c_char * 192)()  # the driver writes to 64 aligned bytes
    address = ctypes.addressof(room) + 63 & -64
    status = driver().cuTensorMapEncodeTiled(
        address,
        _MAP_TYPES[dtype],
        4,
        data,
        (ctypes.c_uint64 * 4)(*sizes),
        (ctypes.c_uint64 * 3)(*(step * dtype.itemsize for step in steps)),
        (ctypes.c_uint32 * 4)(layout.PANEL_COLUMNS, rows, 1, 1),
        (ctypes.c_uint32 * 4)(1, 1, 1, 1),
        CU_TENSOR_MAP_INTERLEAVE_NONE,
        CU_TENSOR_MAP_SWIZZLE_128B,
        CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
        CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
    )
    if status:
        raise RuntimeError(
            f"the CUDA driver cannot describe a tensor of shape {tuple(shape)} and strides "
            f"{strides} to TMA (CUresult {status})"
        )
    return TensorMap(address, room)


@cache
def kernel(
    device: int, unit: str, name: str, options: tuple[tuple[str, int], ...], shared_bytes: int = 0
) -> Kernel:
    """The kernel ``name`` of ``unit`` for one device; compiled and loaded once."""
    import cupy

    with cupy.cuda.Device(device):
        return Kernel(_module(device, unit, options), name, shared_bytes, may_overlap(device))


@cache
def _module(device: int, unit: str, options: tuple[tuple[str, int], ...]) -> Any:
    """From memory: what was checked is what the driver loads."""
    from cupy.cuda import function

    arch = compiler.architecture(torch.cuda.get_device_capability(device))
    module = function.Module()
    module.load(compiler.cubin(unit, dict(options), arch))
    return module
