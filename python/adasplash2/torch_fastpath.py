"""What we take from torch that torch does not promise: everything private stands here.

Four kinds. *Saving time*: a pass through torch's dispatcher costs 15 microseconds, so a call that
nothing but autograd would look at goes around it (:func:`is_plain`). Where torch has lost a name
that this needs, no call is plain, and all take the public way. *Asking*: what a tensor or a thread
is in, for which there is no public question; each has an answer that is safe where torch has lost
it. *Autograd kernels of operators*: :func:`below_autograd` and :func:`in_kernel`, which
``torch.library`` uses itself. *Checking* on a device, which is left out where torch cannot.

Private functions are looked up by :func:`private`; ``tests/test_fastpath.py`` takes each away. Read
as they are: attributes of tensors and of ``forward_ad``, and names that come with a function.
"""

from __future__ import annotations

import functools
import importlib
from contextlib import nullcontext
from operator import or_
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

NO_FORWARD_MODE = "adasplash2 has no forward-mode derivatives (jvp), only reverse mode"


def private(path: str) -> Any:
    """What ``torch`` has under a dotted path; None where it has nothing."""
    found: Any = torch
    for name in path.split("."):
        if isinstance(found, ModuleType) and not hasattr(found, name):
            try:
                importlib.import_module(f"{found.__name__}.{name}")
            except ImportError:
                return None
        found = getattr(found, name, None)
    return found


# Saving time


def is_plain(*tensors: Tensor) -> bool:
    """Whether an operator's body, or its autograd function, may be called as it is: nothing on the
    way through torch's dispatcher beside autograd (modes, transforms, tracers, profilers, kinds of
    tensors) would do anything."""
    if (
        _is_compiling()  # first: the rest is not for tracing
        or not _is_known
        or forward_ad._current_level >= 0
        or _len_torch_dispatch_stack()
        or _len_torch_function_stack()
        or _peek_interpreter_stack() is not None
        or _get_tracing_state() is not None
        or _profiler_enabled()
    ):
        return False
    for tensor in tensors:  # a loop, not all(): a third of the time
        if type(tensor) not in _PLAIN_TYPES or _keys(tensor).raw_repr() not in _PLAIN_KEYS:
            return False
    return True


def is_in_memory(tensor: Tensor) -> bool:
    """Whether a kernel may read ``tensor`` as it is; False also where that is not known."""
    return _is_known and type(tensor) in _PLAIN_TYPES and _keys(tensor).raw_repr() in _PLAIN_KEYS


def apply_plain(function: type[torch.autograd.Function], *args: Any) -> Any:
    """``function.apply`` without what it does for transforms of :mod:`torch.func`."""
    return super(torch.autograd.Function, function).apply(*args)  # type: ignore[misc]


def raw_stream(device: int) -> int:
    """The handle of a CUDA device's stream."""
    if _raw_stream is not None:
        return int(_raw_stream(device))
    return int(torch.cuda.current_stream(device).cuda_stream)


_raw_stream = private("_C._cuda_getCurrentRawStream")
_is_compiling = torch.compiler.is_compiling
_keys = private("_C._dispatch_keys")
_len_torch_dispatch_stack = private("_C._len_torch_dispatch_stack")
_len_torch_function_stack = private("_C._len_torch_function_stack")
_peek_interpreter_stack = private("_C._functorch.peek_interpreter_stack")
_get_tracing_state = private("_C._get_tracing_state")
_profiler_enabled = private("_C._autograd._profiler_enabled")
_PLAIN_TYPES = Tensor, torch.nn.Parameter


def _key_set(*names: str) -> int:
    keys = (torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, name)) for name in names)
    united: int = functools.reduce(or_, keys).raw_repr()
    return united


def _plain_keys() -> set[int]:
    """Dispatch keys of strided tensors in memory that are nothing beside (not negated lazily,
    wrapped, batched or without data), made outside and inside inference mode."""
    return {
        _key_set(device, f"Autocast{device}", *autograd)
        for device in ("CPU", "CUDA")
        for autograd in (("ADInplaceOrView", f"Autograd{device}"), ())
    }


_has_level = private("autograd.forward_ad._current_level") is not None
_is_known = _has_level and None not in (
    *(_keys, _len_torch_dispatch_stack, _len_torch_function_stack, _peek_interpreter_stack),
    *(_get_tracing_state, _profiler_enabled),
    *(private("_C.DispatchKey"), private("_C.DispatchKeySet")),
)
_PLAIN_KEYS = _plain_keys() if _is_known else set()


# Asking


def is_forward_mode() -> bool:
    """Whether a derivative in forward mode may be being taken; yes where torch cannot say, since
    autograd must then see the call."""
    return not _has_level or forward_ad._current_level >= 0


def is_autocast_on() -> bool:
    """Whether any device's autocast may be on: then it is asked by device."""
    return _is_any_autocast_enabled is None or bool(_is_any_autocast_enabled())


def is_without_data(*tensors: Tensor) -> bool:
    """Whether any of ``tensors`` is of a trace: a shape without numbers."""
    if _detect_fake_mode is not None:
        return _detect_fake_mode(tensors) is not None
    return any(type(tensor).__name__ == "FakeTensor" for tensor in tensors)


def new_dynamic_size() -> Any:
    """In the fake of an operator, a length that only data tells: a symbol; None where there are
    none, as where DTensor asks how outputs are sharded."""
    try:
        return torch.library.get_ctx().new_dynamic_size()
    except _NoDynamicSize:
        return None


def version_of(tensor: Tensor) -> int | None:
    """How often ``tensor`` has been changed in place; None where torch cannot say."""
    return getattr(tensor, "_version", None)


def is_memory_known() -> bool:
    """Whether tensors can be asked for their memory (:func:`share_memory`): not in traces and
    transforms, nor where torch cannot say."""
    return _is_alias_of is not None and not (torch.compiler.is_compiling() or is_transformed())


def share_memory(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are of one piece of memory, where :func:`is_memory_known`."""
    return bool(_is_alias_of(one, other))


def is_in_a_transform(tensor: Tensor) -> bool:
    """Whether ``tensor`` is wrapped by a transform of :mod:`torch.func`."""
    return _is_wrapped is not None and bool(_is_wrapped(tensor))


def is_mapped(tensor: Tensor) -> bool:
    """Whether ``vmap`` maps over ``tensor``, which then is no one number; no where torch cannot
    say, as in a trace."""
    if torch.compiler.is_compiling() or None in (_is_batched, _unwrapped):
        return False
    while is_in_a_transform(tensor):
        if _is_batched(tensor):
            return True
        tensor = _unwrapped(tensor)
    return False


def ragged_dim(nested: Tensor) -> int:
    """Which dimension of a jagged tensor is ragged; 2, that of lengths in attention, where torch
    cannot say."""
    return getattr(nested, "_ragged_idx", 2)


def is_transformed() -> bool:
    """Whether a transform of :mod:`torch.func` is around this call; no where torch cannot say."""
    return _peek_interpreter_stack is not None and _peek_interpreter_stack() is not None


_is_alias_of = private("_C._is_alias_of")
_is_any_autocast_enabled = private("_C._is_any_autocast_enabled")
_is_wrapped = private("_C._functorch.is_functorch_wrapped_tensor")
_is_batched = private("_C._functorch.is_batchedtensor")
_unwrapped = private("_C._functorch.get_unwrapped")

_detect_fake_mode = private("_guards.detect_fake_mode")
_NoDynamicSize: Any = private("_subclasses.fake_tensor.DynamicOutputShapeException")
_NoDynamicSize = _NoDynamicSize or RuntimeError  # of which it is one


def beside(tensor: Tensor, *others: Tensor | None) -> Tensor:
    """``tensor``, which every process has made alike, as what operators take together with
    ``others``: whole on the devices over which one of them is distributed."""
    for other in others:
        mesh = getattr(other, "device_mesh", None)
        if mesh is not None:
            from torch.distributed.tensor import DTensor, Replicate

            whole = [Replicate()] * mesh.ndim
            return DTensor.from_local(tensor, mesh, whole, run_check=False)
    return tensor


# Autograd kernels of operators


def below_autograd(operator: Any, *args: Any) -> Any:
    """``operator`` without autograd's kernels. Inference mode skips them too, but what it makes is
    of no use to autograd: hence copies."""
    if _BelowAutograd is not None:
        with _BelowAutograd():
            return operator(*args)
    with torch.inference_mode():
        found = operator(*args)
    return found.clone() if isinstance(found, Tensor) else tuple(one.clone() for one in found)


def beneath(operator: Any, *args: Any) -> Any:
    """``operator`` below the autograd whose function calls this. It has turned derivatives off,
    which the transforms around this one, if there are any, still have to see."""
    if _peek_interpreter_stack is not None and not is_transformed():
        return below_autograd(operator, *args)
    if _forward_enabled is None and is_forward_mode():
        raise RuntimeError(NO_FORWARD_MODE)
    forward = nullcontext() if _forward_enabled is None else _forward_enabled(True)
    with torch.enable_grad(), forward:
        return below_autograd(operator, *args)


def in_kernel(function: type[torch.autograd.Function], *args: Any) -> Any:
    """``function.apply`` in an autograd kernel, where one transform at most is to be served, and
    torch sees to the others beneath. Where torch cannot be told so, torch refuses transforms."""
    with _one_level():
        if _SingleLevelFunction is None:
            return apply_plain(function, *args)
        return _single_level(function).apply(*args)  # type: ignore[attr-defined]


_BelowAutograd = private("_C._AutoDispatchBelowAutograd")
_forward_enabled = private("autograd.forward_ad._set_fwd_grad_enabled")
_one_level: Any = private("_functorch.utils.enable_single_level_autograd_function") or nullcontext
_SingleLevelFunction = private("autograd.function._SingleLevelFunction")


@functools.cache
def _single_level(function: type[torch.autograd.Function]) -> type:
    """The same as torch's own rules for transforms have it: from torch 2.14 on ``Function`` itself
    is for what has its context made apart, also when it is asked as a base class has it."""
    parts = {name: staticmethod(getattr(function, name)) for name in ("forward", "backward", "jvp")}
    return type(function.__name__, (_SingleLevelFunction,), parts)


# Checking


def assert_on_device(holds: Tensor, message: str) -> None:
    """Check a tensor of one bool where it is, without waiting; nothing where torch cannot."""
    if _assert_async is not None:
        _assert_async(holds, message)


_assert_async = private("_assert_async")
