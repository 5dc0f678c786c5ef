"""The operators ``torch.ops.adasplash2.*``: what autograd, ``torch.compile`` and export see.

Every operator has a body for real tensors (validate, choose a backend, run it), a fake for
shapes, an autograd kernel and a rule for ``vmap``. Calls without a single allowed (query, key)
pair are answered here, so that no backend meets an empty tensor.

Two things are known only when a graph runs, and are kept out of what it is compiled for:

- How much the backward needs. A call with data saves just that; a graph asks for a length that
  suffices for all data (``saved_bytes``), whose end is not touched, nor resident on a CPU.
- ``alpha`` and ``scale`` that change from call to call. Compilers make constants of numbers that
  an operator is given, and compile anew for each; so there they go as a tensor (``numbers``).

They are registered with :class:`torch.library.Library` rather than ``torch.library.custom_op``,
whose wrappers add 4 microseconds to a call without and 19 to a call with gradients.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from operator import or_
from typing import Any

import torch
from torch import Tensor
from torch._functorch.utils import enable_single_level_autograd_function
from torch._guards import detect_fake_mode
from torch.autograd import forward_ad

from adasplash2.contract import AttentionStats, Forward
from adasplash2.dispatch import choose, saved_bound
from adasplash2.problem import (
    Inputs,
    Problem,
    RowProblem,
    attention_problem,
    check_alpha_above_one,
    check_dim,
    check_like,
    check_tensor,
    row_problem,
)

_LIBRARY = torch.library.Library("adasplash2", "DEF")
_below_autograd = torch._C._AutoDispatchBelowAutograd

AS_NEEDED = -1
"""``saved_bytes`` of a call whose ``saved`` may have the length that its data asks for."""


def attention_stats(
    inputs: Inputs,
    alpha: float,
    scale: float | None,
    is_causal: bool,
    enable_gqa: bool,
    backend: str | None,
) -> AttentionStats:
    """Run one attention forward that records what it did; no operator, no gradient."""
    problem = _attention_problem(inputs, alpha, scale, is_causal, enable_gqa, False)
    inputs = Inputs(*map(_in_memory, Inputs._fields, inputs))
    if problem.is_empty:
        tau = _nothing_forward(problem, inputs.query, 0).tau
        counts = torch.zeros_like(tau, dtype=torch.int32)
        empty_tiles = tau.new_zeros(tau.shape[:2], dtype=torch.float64)
        return AttentionStats(tau, counts, counts.clone(), empty_tiles, backend="none")
    chosen, config = choose(problem, backend)
    with torch.no_grad():
        return chosen.stats(problem, inputs, config)


def _in_memory(name: str, tensor: Tensor) -> Tensor:
    """What a kernel reads that no dispatcher prepares: neither negated lazily nor left out."""
    if type(tensor) in _PLAIN_TYPES and _keys(tensor).raw_repr() in _PLAIN_KEYS:
        return tensor
    if torch._C._functorch.is_functorch_wrapped_tensor(tensor) or detect_fake_mode(tensor):
        raise TypeError(
            f"{name} must be a tensor with data, got one inside a transform or a trace: "
            "attention_stats works in neither"
        )
    if tensor.device.type == "meta":
        return tensor  # which every backend refuses
    tensor = tensor.detach()
    return torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device).copy_(tensor)


class _ReverseMode(torch.autograd.Function):
    @classmethod
    def on_plain(cls, *args: Any) -> Any:
        """``apply`` without what it does for transforms of :mod:`torch.func`."""
        return super(torch.autograd.Function, cls).apply(*args)  # type: ignore[misc]

    @classmethod
    def in_kernel(cls, *args: Any) -> Any:
        """``apply`` in an autograd kernel, where one transform at most is to be served, and torch
        sees to the others beneath."""
        with enable_single_level_autograd_function():
            return cls.on_plain(*args)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise RuntimeError("adasplash2 has no forward-mode derivatives (jvp), only reverse mode")


# Attention


def _attention_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    alpha: float,
    scale: float | None,
    is_causal: bool,
    enable_gqa: bool,
    backend: str,
    saved_bytes: int,
    numbers: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    if numbers is not None:
        alpha, scale = _read(numbers)
    inputs = Inputs(query, key, value)
    problem = _attention_problem(inputs, alpha, scale, is_causal, enable_gqa, saved_bytes != 0)
    if problem.is_empty:
        return _nothing_forward(problem, query, saved_bytes)
    chosen, config = choose(problem, backend or None)
    return chosen.forward(problem, inputs, config, saved_bytes)


def _attention_forward_fake(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    alpha: float,
    scale: float | None,
    is_causal: bool,
    enable_gqa: bool,
    backend: str,
    saved_bytes: int,
    numbers: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    inputs = Inputs(query, key, value)
    shapes = _shape_problem(inputs, alpha, scale, is_causal, enable_gqa, numbers)
    if isinstance(saved_bytes, int) and saved_bytes < 0:
        saved_bytes = (
            0 if query.is_meta else torch.library.get_ctx().new_dynamic_size()  # type: ignore[assignment]
        )
    rows = (shapes.batch, shapes.heads_q, shapes.length_q)
    return (
        query.new_empty((*rows, shapes.head_dim_v)),
        query.new_empty(rows, dtype=shapes.compute_dtype),
        query.new_empty(saved_bytes, dtype=torch.uint8),
    )


def _attention_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    tau: Tensor,
    saved: Tensor,
    alpha: float,
    scale: float | None,
    is_causal: bool,
    enable_gqa: bool,
    backend: str,
    numbers: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    if numbers is not None:
        alpha, scale = _read(numbers)
    inputs = Inputs(query, key, value)
    problem = _attention_problem(inputs, alpha, scale, is_causal, enable_gqa, True)
    _check_backward(problem, grad_out, out, tau, saved)
    if problem.is_empty:
        return query.new_zeros(query.shape), key.new_zeros(key.shape), value.new_zeros(value.shape)
    chosen, config = choose(problem, backend or None)
    return chosen.backward(problem, inputs, Forward(out, tau, saved), grad_out, config)


def _attention_backward_fake(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    tau: Tensor,
    saved: Tensor,
    alpha: float,
    scale: float | None,
    is_causal: bool,
    enable_gqa: bool,
    backend: str,
    numbers: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    inputs = Inputs(query, key, value)
    problem = _shape_problem(inputs, alpha, scale, is_causal, enable_gqa, numbers)
    _check_backward(problem, grad_out, out, tau, saved)
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)


def _check_backward(
    problem: Problem, grad_out: Tensor, out: Tensor, tau: Tensor, saved: Tensor
) -> None:
    """What is inside ``saved``, its backend checks."""
    rows = (problem.batch, problem.heads_q, problem.length_q)
    shape, dtype, device = (*rows, problem.head_dim_v), problem.dtype, problem.device
    check_like("grad_out", grad_out, shape, dtype, device)
    check_like("out", out, shape, dtype, device)
    check_like("tau", tau, rows, problem.compute_dtype, device)
    check_like("saved", saved, (saved.numel(),), torch.uint8, device)


def _attention_forward_vmap(
    info: Any,
    in_dims: tuple[int | None, ...],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *options: Any,
) -> tuple[Any, Any]:
    """More batch: one call, with one ``saved`` for all."""
    n = info.batch_size
    inputs = (_folded(t, dim, n) for t, dim in zip((query, key, value), in_dims, strict=False))
    options, saved_bytes, numbers = options[:5], options[5], options[6:]
    if not isinstance(saved_bytes, int) or saved_bytes > 0:
        saved_bytes *= n
    out, tau, saved = attention_forward(*inputs, *options, saved_bytes, *numbers)
    return (out.unflatten(0, (n, -1)), tau.unflatten(0, (n, -1)), saved), (0, 0, None)


def _attention_backward_vmap(
    info: Any, in_dims: tuple[int | None, ...], *args: Any
) -> tuple[Any, Any]:
    n = info.batch_size
    tensors, saved, options = args[:6], args[6], args[7:]  # from grad_out to tau
    if in_dims[4] is not None and in_dims[6] is None:
        folded = (_folded(t, dim, n) for t, dim in zip(tensors, in_dims, strict=False))
        grads = attention_backward(*folded, saved, *options)
        return tuple(grad.unflatten(0, (n, -1)) for grad in grads), (0, 0, 0)
    # Several gradients of one output, as jacrev asks for them.
    slices = (
        attention_backward(
            *(t if d is None else t.select(d, i) for t, d in zip(args[:7], in_dims, strict=False)),
            *options,
        )
        for i in range(n)
    )
    return tuple(torch.stack(grads) for grads in zip(*slices, strict=True)), (0, 0, 0)


def _folded(tensor: Tensor, dim: int | None, n: int) -> Tensor:
    """The dimension that is mapped over as part of the batch."""
    tensor = tensor.expand(n, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
    return tensor.flatten(0, 1)


class _Attention(_ReverseMode):
    """``options``, from ``alpha`` to ``backend``, are one argument: torch looks at each."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        options: tuple[Any, ...],
        saved_bytes: int = AS_NEEDED,
        numbers: Tensor | None = None,
    ) -> Any:
        inputs, more = (query, key, value), (saved_bytes, numbers)
        out, tau, saved = _forward(attention_forward, _attention_forward, inputs, *options, *more)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(tau, saved)
        ctx.save_for_backward(query, key, value, out, tau, saved)
        ctx.options = *options, numbers
        return out, tau, saved

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        grad_out = grads[0]
        if grad_out is None:
            return (None,) * 6
        tensors = grad_out, *ctx.saved_tensors
        found = _backward(attention_backward, _attention_backward, tensors, *ctx.options)
        wanted = zip(found, ctx.needs_input_grad, strict=False)
        return *(grad if needed else None for grad, needed in wanted), None, None, None


def _attention_autograd(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    alpha: float,
    scale: float | None,
    is_causal: bool,
    enable_gqa: bool,
    backend: str,
    saved_bytes: int,
    numbers: Tensor | None = None,
) -> Any:
    if numbers is None and (numbers := _symbols(alpha, scale)) is not None:
        alpha, scale = UNREAD
    options = alpha, scale, is_causal, enable_gqa, backend
    if _differentiated(query, key, value):
        inputs = Inputs(query, key, value)
        if saved_bytes == 0:
            saved_bytes = AS_NEEDED
            if query.is_meta or detect_fake_mode(inputs):
                problem = _shape_problem(inputs, alpha, scale, is_causal, enable_gqa, numbers)
                saved_bytes = saved_bound(problem, backend or None)
        return _Attention.in_kernel(*inputs, options, saved_bytes, numbers)
    with _below_autograd():
        return attention_forward(query, key, value, *options, saved_bytes, numbers)


def _attention_problem(
    inputs: Inputs,
    alpha: float,
    scale: float | None,
    is_causal: bool,
    enable_gqa: bool,
    needs_grad: bool,
) -> Problem:
    return attention_problem(
        inputs,
        alpha=check_alpha_above_one(alpha),
        scale=scale,
        is_causal=is_causal,
        enable_gqa=enable_gqa,
        needs_grad=needs_grad,
    )


def _shape_problem(
    inputs: Inputs,
    alpha: float,
    scale: float | None,
    is_causal: bool,
    enable_gqa: bool,
    numbers: Tensor | None,
) -> Problem:
    """What a fake asks: numbers that are not known yet are stood in for."""
    if numbers is not None or _symbols(alpha, scale) is not None:
        alpha, scale = 1.5, None
    return _attention_problem(inputs, alpha, scale, is_causal, enable_gqa, True)


def _nothing_forward(problem: Problem, query: Tensor, saved_bytes: int) -> Forward:
    """No query may see any key: zeros, and thresholds above every score."""
    rows = (problem.batch, problem.heads_q, problem.length_q)
    return Forward(
        out=query.new_zeros((*rows, problem.head_dim_v)),
        tau=query.new_full(rows, math.inf, dtype=problem.compute_dtype),
        saved=query.new_empty(max(saved_bytes, 0), dtype=torch.uint8),
    )


# Entmax of rows


def _entmax_forward(
    x: Tensor, alpha: float, dim: int, backend: str, needs_grad: bool, numbers: Tensor | None = None
) -> Tensor:
    if numbers is not None:
        alpha, _ = _read(numbers)
    x = _last(x, dim)
    problem = row_problem(x, alpha=check_alpha_above_one(alpha), needs_grad=needs_grad)
    if not problem.rows * problem.length:
        return _unlast(x.new_zeros(x.shape), x.shape, dim)
    chosen, config = choose(problem, backend or None)
    return _unlast(chosen.rows_forward(problem, _rows(problem, x), config), x.shape, dim)


def _entmax_forward_fake(x: Tensor, alpha: float, dim: int, *_: Any) -> Tensor:
    x = _last(x, dim)
    row_problem(x, alpha=1.5, needs_grad=False)
    return _unlast(x.new_empty(x.shape), x.shape, dim)


def _entmax_backward(
    grad_y: Tensor,
    y: Tensor,
    alpha: float,
    dim: int,
    backend: str,
    numbers: Tensor | None = None,
) -> Tensor:
    if numbers is not None:
        alpha, _ = _read(numbers)
    y_last = _last(y, dim)
    problem = row_problem(y_last, alpha=check_alpha_above_one(alpha), needs_grad=True)
    check_like("grad_y", grad_y, y.shape, y.dtype, y.device)
    shape = y_last.shape
    if not problem.rows * problem.length:
        return _unlast(y.new_zeros(shape), shape, dim)
    chosen, config = choose(problem, backend or None)
    y_rows, grad_rows = _rows(problem, y_last), _rows(problem, _last(grad_y, dim))
    return _unlast(chosen.rows_backward(problem, y_rows, grad_rows, config), shape, dim)


def _entmax_backward_fake(grad_y: Tensor, y: Tensor, alpha: float, dim: int, *_: Any) -> Tensor:
    check_like("grad_y", grad_y, y.shape, y.dtype, y.device)
    shape = _last(y, dim).shape
    return _unlast(y.new_empty(shape), shape, dim)


def _entmax_forward_vmap(
    info: Any, in_dims: tuple[int | None, ...], x: Tensor, alpha: float, dim: int, *options: Any
) -> tuple[Any, Any]:
    """More rows."""
    assert in_dims[0] is not None
    rows = x.movedim(in_dims[0], 0)
    return entmax_forward(rows, alpha, check_dim(dim, x.dim() - 1), *options), 0


def _entmax_backward_vmap(
    info: Any,
    in_dims: tuple[int | None, ...],
    grad_y: Tensor,
    y: Tensor,
    alpha: float,
    dim: int,
    *options: Any,
) -> tuple[Any, Any]:
    grad_y, y = (
        t.expand(info.batch_size, *t.shape) if d is None else t.movedim(d, 0)
        for t, d in zip((grad_y, y), in_dims, strict=False)
    )
    return entmax_backward(grad_y, y, alpha, check_dim(dim, y.dim() - 1), *options), 0


class _Entmax(_ReverseMode):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, alpha: float, dim: int, backend: str, numbers: Tensor | None = None
    ) -> Any:
        options = alpha, dim, backend, True, numbers
        y = _forward(entmax_forward, _entmax_forward, (x,), *options)
        ctx.save_for_backward(y)
        ctx.options = alpha, dim, backend, numbers
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        tensors = grads[0], *ctx.saved_tensors
        grad_x = _backward(entmax_backward, _entmax_backward, tensors, *ctx.options)
        return grad_x, None, None, None, None


def _entmax_autograd(
    x: Tensor, alpha: float, dim: int, backend: str, needs_grad: bool, numbers: Tensor | None = None
) -> Any:
    if numbers is None and (numbers := _symbols(alpha, None)) is not None:
        alpha, _ = UNREAD
    if _differentiated(x):
        return _Entmax.in_kernel(x, alpha, dim, backend, numbers)
    with _below_autograd():
        return entmax_forward(x, alpha, dim, backend, needs_grad, numbers)


def _last(x: Tensor, dim: int) -> Tensor:
    """``x`` with ``dim`` as its last dimension."""
    return x if dim == -1 else x.movedim(check_dim(dim, x.dim()), -1)


def _unlast(y: Tensor, shape: torch.Size, dim: int) -> Tensor:
    """Dense ``y`` in the ``shape`` that :func:`_last` gave, with ``dim`` back where it was; in
    place, since who changes an output must not find that it is a view."""
    if dim == -1:
        return y if y.shape == shape else y.resize_(shape)
    placed = (y if y.shape == shape else y.view(shape)).movedim(-1, dim)
    return y.as_strided_(placed.shape, placed.stride())


def _rows(problem: RowProblem, x: Tensor) -> Tensor:
    """``x`` as ``(rows, length)`` with a last stride of 1; a copy only where strides demand it."""
    x = x.reshape(problem.rows, problem.length)
    return x if x.stride(1) == 1 or problem.length == 1 else x.contiguous()


# Numbers

UNREAD = 0.0, None
"""``alpha`` and ``scale`` beside ``numbers``."""


_CPU = torch.device("cpu")


def _symbols(alpha: float, scale: float | None) -> Tensor | None:
    """``numbers`` where one of the two is a symbol of a graph that is being traced."""
    if not isinstance(alpha, torch.SymFloat) and not isinstance(scale, torch.SymFloat):
        return None
    zero = torch.zeros((), dtype=torch.float64, device=_CPU)
    return torch.stack([zero + (math.nan if x is None else x) for x in (alpha, scale)])


def _read(numbers: Tensor) -> tuple[float, float | None]:
    check_like("numbers", numbers, (2,), torch.float64, _CPU)
    alpha, scale = numbers.tolist()
    return alpha, None if math.isnan(scale) else scale


# Calls


def attention(query: Tensor, key: Tensor, value: Tensor, *options: Any) -> Tensor:
    """Output of :data:`attention_forward`; ``options`` from ``alpha`` to ``backend``."""
    call: Callable[..., Any] = _attention_forward
    if not _is_plain(query, key, value):
        call = attention_forward
        for name, tensor in zip(Inputs._fields, (query, key, value), strict=True):
            check_tensor(name, tensor)  # torch's dispatcher would say it in other words
        if not _is_compiling():  # and a transform's rules see other shapes
            alpha, scale, is_causal, enable_gqa, _ = options
            inputs = Inputs(query, key, value)
            _attention_problem(inputs, alpha, scale, is_causal, enable_gqa, False)
    elif _differentiated(query, key, value):
        out: Tensor = _Attention.on_plain(query, key, value, options)[0]
        return out
    out = call(query, key, value, *options, 0)[0]
    return out


def rows(x: Tensor, alpha: float, dim: int, backend: str) -> Tensor:
    """Output of :data:`entmax_forward`."""
    call: Callable[..., Any] = _entmax_forward
    if not _is_plain(x):
        call = entmax_forward
    elif _differentiated(x):
        y: Tensor = _Entmax.on_plain(x, alpha, dim, backend)
        return y
    y = call(x, alpha, dim, backend, False)
    return y


def _is_plain(*tensors: Tensor) -> bool:
    """Whether an operator's body, or its autograd function, may be called as it is: a pass through
    torch's dispatcher costs 15 microseconds, and here nothing on its way beside autograd (modes,
    transforms, tracers, profilers, kinds of tensors) would do anything."""
    if (
        _is_compiling()  # first: the rest is not for tracing
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


def _forward(
    operator: Callable[..., Any], body: Callable[..., Any], tensors: tuple[Tensor, ...], *more: Any
) -> Any:
    """An operator called by its autograd function: its body where that does the same."""
    if _is_plain(*tensors):
        return body(*tensors, *more)
    return _beneath(operator, *tensors, *more)


def _beneath(operator: Callable[..., Any], *args: Any) -> Any:
    """``operator`` below the autograd whose function calls this. It has turned derivatives off,
    which the transforms around this one, if there are any, still have to see."""
    if _peek_interpreter_stack() is None:
        with _below_autograd():
            return operator(*args)
    with torch.enable_grad(), forward_ad._set_fwd_grad_enabled(True), _below_autograd():
        return operator(*args)


def _backward(
    operator: Callable[..., Any], body: Callable[..., Any], tensors: tuple[Tensor, ...], *more: Any
) -> Any:
    """An operator without derivative, which must be told where it is to be differentiated."""
    plain = _is_plain(*tensors) and not _differentiated(*tensors)
    return (body if plain else operator)(*tensors, *more)


_is_compiling = torch.compiler.is_compiling
_keys = torch._C._dispatch_keys
_len_torch_dispatch_stack = torch._C._len_torch_dispatch_stack
_len_torch_function_stack = torch._C._len_torch_function_stack
_peek_interpreter_stack = torch._C._functorch.peek_interpreter_stack
_get_tracing_state = torch._C._get_tracing_state
_profiler_enabled = torch._C._autograd._profiler_enabled
_PLAIN_TYPES = Tensor, torch.nn.Parameter


def _key_set(*names: str) -> int:
    keys = (torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, name)) for name in names)
    united: int = functools.reduce(or_, keys).raw_repr()
    return united


_PLAIN_KEYS = {
    _key_set(device, f"Autocast{device}", *autograd)
    for device in ("CPU", "CUDA")
    for autograd in (("ADInplaceOrView", f"Autograd{device}"), ())
}
"""Dispatch keys of strided tensors in memory that are nothing beside (not negated lazily, wrapped,
batched or without data), made outside and inside inference mode."""


# Registration


def _differentiated(*tensors: Tensor) -> bool:
    """Whether autograd must see the call. Forward mode must too, if only to refuse it: a kernel
    that steps below autograd drops tangents without a word."""
    if forward_ad._current_level >= 0:
        return True
    if torch.is_grad_enabled():
        for tensor in tensors:
            if tensor.requires_grad:
                return True
    return False


def _once(operator: Callable[..., Any]) -> Callable[..., Any]:
    """Autograd kernel of an operator that runs, but has no derivative."""

    class Once(_ReverseMode):
        @staticmethod
        def forward(ctx: Any, *args: Any) -> Any:
            return _beneath(operator, *args)

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> Any:
            raise RuntimeError(
                "adasplash2 has no second derivatives: the gradient of entmax cannot be "
                "differentiated again (double backward, which torch.autograd.functional.jvp "
                "needs too)"
            )

    return Once.in_kernel


def _operator(
    schema: str,
    body: Callable[..., Any],
    fake: Callable[..., Any],
    vmap: Callable[..., Any],
    autograd: Callable[..., Any] | None = None,
) -> Callable[..., Any]:
    name = schema.partition("(")[0]
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    operator: Callable[..., Any] = getattr(torch.ops.adasplash2, name).default
    _LIBRARY.impl(name, body, "CompositeExplicitAutograd")
    _LIBRARY.impl(name, autograd or _once(operator), "Autograd")
    torch.library.register_fake(f"adasplash2::{name}", fake, lib=_LIBRARY)
    torch.library.register_vmap(f"adasplash2::{name}", vmap, lib=_LIBRARY)
    return operator


_OPTIONS = "Scalar alpha, Scalar? scale, bool is_causal, bool enable_gqa, str backend"
_NUMBERS = "Tensor? numbers=None"

attention_forward = _operator(
    f"attention_forward(Tensor query, Tensor key, Tensor value, {_OPTIONS}, SymInt saved_bytes,"
    f" {_NUMBERS}) -> (Tensor out, Tensor tau, Tensor saved)",
    _attention_forward,
    _attention_forward_fake,
    _attention_forward_vmap,
    _attention_autograd,
)
"""``saved_bytes`` asks for ``saved`` of that length, at least :func:`saved_bound`, or of any length
(:data:`AS_NEEDED`); with 0 there is none, and autograd asks by itself where it will need it.
``backend=""`` leaves the choice to the dispatcher. ``numbers``, float64 and on the CPU, has alpha
and scale (NaN where it is None) in their place."""

attention_backward = _operator(
    "attention_backward(Tensor grad_out, Tensor query, Tensor key, Tensor value, Tensor out,"
    f" Tensor tau, Tensor saved, {_OPTIONS}, {_NUMBERS})"
    " -> (Tensor grad_query, Tensor grad_key, Tensor grad_value)",
    _attention_backward,
    _attention_backward_fake,
    _attention_backward_vmap,
)

entmax_forward = _operator(
    "entmax_forward(Tensor x, Scalar alpha, int dim, str backend, bool needs_grad,"
    f" {_NUMBERS}) -> Tensor",
    _entmax_forward,
    _entmax_forward_fake,
    _entmax_forward_vmap,
    _entmax_autograd,
)

entmax_backward = _operator(
    f"entmax_backward(Tensor grad_y, Tensor y, Scalar alpha, int dim, str backend, {_NUMBERS})"
    " -> Tensor",
    _entmax_backward,
    _entmax_backward_fake,
    _entmax_backward_vmap,
)
