"""The operators ``torch.ops.adasplash2.*``: what autograd, ``torch.compile`` and export see.

Every operator has a body for real tensors (validate, choose a backend, run it), a fake for
shapes, and an autograd kernel. Calls without a single allowed (query, key) pair are answered
here, so that no backend meets an empty tensor.

They are registered with :class:`torch.library.Library` rather than ``torch.library.custom_op``,
whose wrappers add 4 microseconds to a call without and 19 to a call with gradients.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from operator import or_
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from adasplash2.contract import AttentionStats, Forward
from adasplash2.dispatch import choose
from adasplash2.problem import (
    Inputs,
    Problem,
    RowProblem,
    attention_problem,
    check_alpha_above_one,
    check_tensor,
    row_problem,
)

_LIBRARY = torch.library.Library("adasplash2", "DEF")
_below_autograd = torch._C._AutoDispatchBelowAutograd


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
    if problem.is_empty:
        tau = _nothing_forward(problem, inputs.query).tau
        counts = torch.zeros_like(tau, dtype=torch.int32)
        empty_tiles = tau.new_zeros(tau.shape[:2], dtype=torch.float64)
        return AttentionStats(tau, counts, counts.clone(), empty_tiles, backend="none")
    chosen, config = choose(problem, backend)
    with torch.no_grad():
        return chosen.stats(problem, inputs, config)


class _ReverseMode(torch.autograd.Function):
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
    needs_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    inputs = Inputs(query, key, value)
    problem = _attention_problem(inputs, alpha, scale, is_causal, enable_gqa, needs_grad)
    if problem.is_empty:
        return _nothing_forward(problem, query)
    chosen, config = choose(problem, backend or None)
    return chosen.forward(problem, inputs, config)


def _attention_forward_fake(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    alpha: float,
    scale: float | None,
    is_causal: bool,
    enable_gqa: bool,
    backend: str,
    needs_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    inputs = Inputs(query, key, value)
    problem = _attention_problem(inputs, alpha, scale, is_causal, enable_gqa, needs_grad)
    rows = (problem.batch, problem.heads_q, problem.length_q)
    size = _saved_bytes(problem, backend)
    return (
        query.new_empty((*rows, problem.head_dim_v)),
        query.new_empty(rows, dtype=problem.compute_dtype),
        query.new_empty(
            torch.library.get_ctx().new_dynamic_size() if size is None else size,
            dtype=torch.uint8,
        ),
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
) -> tuple[Tensor, Tensor, Tensor]:
    inputs = Inputs(query, key, value)
    problem = _attention_problem(inputs, alpha, scale, is_causal, enable_gqa, True)
    if problem.is_empty:
        return query.new_zeros(query.shape), key.new_zeros(key.shape), value.new_zeros(value.shape)
    chosen, config = choose(problem, backend or None)
    return chosen.backward(problem, inputs, Forward(out, tau, saved), grad_out, config)


def _attention_backward_fake(
    grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)


class _Attention(_ReverseMode):
    """``options``, from ``alpha`` to ``backend``, are one argument: torch looks at each."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, options: tuple[Any, ...]
    ) -> Any:
        inputs = query, key, value
        out, tau, saved = _forward(attention_forward, _attention_forward, inputs, *options, True)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(tau, saved)
        ctx.save_for_backward(query, key, value, out, tau, saved)
        ctx.options = options
        return out, tau, saved

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        grad_out = grads[0]
        if grad_out is None:
            return None, None, None, None
        tensors = grad_out, *ctx.saved_tensors
        found = _backward(attention_backward, _attention_backward, tensors, *ctx.options)
        wanted = zip(found, ctx.needs_input_grad, strict=False)
        return *(grad if needed else None for grad, needed in wanted), None


def _attention_autograd(query: Tensor, key: Tensor, value: Tensor, *options: Any) -> Any:
    if _differentiated(query, key, value):
        return _Attention.apply(query, key, value, options[:-1])
    with _below_autograd():
        return attention_forward(query, key, value, *options)


def _attention_problem(
    inputs: Inputs,
    alpha: float,
    scale: float | None,
    is_causal: bool,
    enable_gqa: bool,
    needs_grad: bool,
) -> Problem:
    # float() settles numbers that are symbols while a graph is traced.
    return attention_problem(
        inputs,
        alpha=check_alpha_above_one(float(alpha)),
        scale=None if scale is None else float(scale),
        is_causal=is_causal,
        enable_gqa=enable_gqa,
        needs_grad=needs_grad,
    )


def _nothing_forward(problem: Problem, query: Tensor) -> Forward:
    """No query may see any key: zeros, and thresholds above every score."""
    rows = (problem.batch, problem.heads_q, problem.length_q)
    return Forward(
        out=query.new_zeros((*rows, problem.head_dim_v)),
        tau=query.new_full(rows, float("inf"), dtype=problem.compute_dtype),
        saved=query.new_empty(0, dtype=torch.uint8),
    )


def _saved_bytes(problem: Problem, backend: str) -> int | None:
    """Length of ``Forward.saved`` where it can be known without data and symbols, else None."""
    if not problem.needs_grad:
        return 0
    lengths = (problem.batch, problem.heads_q, problem.heads_kv)
    if not all(isinstance(n, int) for n in (*lengths, problem.length_q, problem.length_k)):
        return None
    if problem.is_empty:
        return 0
    chosen, config = choose(problem, backend or None)
    return chosen.saved_bytes(problem, config)


# Entmax of rows


def _entmax_forward(x: Tensor, alpha: float, backend: str, needs_grad: bool) -> Tensor:
    problem = _row_problem(x, alpha, needs_grad)
    if not problem.rows * problem.length:
        return x.new_zeros(x.shape)
    chosen, config = choose(problem, backend or None)
    return chosen.rows_forward(problem, _rows(problem, x), config).view(x.shape)


def _entmax_forward_fake(x: Tensor, alpha: float, backend: str, needs_grad: bool) -> Tensor:
    _row_problem(x, alpha, needs_grad)
    return x.new_empty(x.shape)


def _entmax_backward(grad_y: Tensor, y: Tensor, alpha: float, backend: str) -> Tensor:
    problem = _row_problem(y, alpha, True)
    if not problem.rows * problem.length:
        return y.new_zeros(y.shape)
    chosen, config = choose(problem, backend or None)
    grad_x = chosen.rows_backward(problem, _rows(problem, y), _rows(problem, grad_y), config)
    return grad_x.view(y.shape)


def _entmax_backward_fake(grad_y: Tensor, y: Tensor, alpha: float, backend: str) -> Tensor:
    return y.new_empty(y.shape)


class _Entmax(_ReverseMode):
    @staticmethod
    def forward(ctx: Any, x: Tensor, alpha: float, backend: str) -> Any:
        y = _forward(entmax_forward, _entmax_forward, (x,), alpha, backend, True)
        ctx.save_for_backward(y)
        ctx.options = alpha, backend
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        tensors = grads[0], *ctx.saved_tensors
        grad_x = _backward(entmax_backward, _entmax_backward, tensors, *ctx.options)
        return grad_x, None, None


def _entmax_autograd(x: Tensor, alpha: float, backend: str, needs_grad: bool) -> Any:
    if _differentiated(x):
        return _Entmax.apply(x, alpha, backend)
    with _below_autograd():
        return entmax_forward(x, alpha, backend, needs_grad)


def _row_problem(x: Tensor, alpha: float, needs_grad: bool) -> RowProblem:
    return row_problem(x, alpha=check_alpha_above_one(float(alpha)), needs_grad=needs_grad)


def _rows(problem: RowProblem, x: Tensor) -> Tensor:
    """``x`` as ``(rows, length)`` with a last stride of 1; a copy only where strides demand it."""
    x = x.reshape(problem.rows, problem.length)
    return x if x.stride(1) == 1 or problem.length == 1 else x.contiguous()


# Calls


def attention(query: Tensor, key: Tensor, value: Tensor, *options: Any) -> Tensor:
    """Output of :data:`attention_forward`; ``options`` from ``alpha`` to ``backend``."""
    call: Callable[..., Any] = _attention_forward
    if not _is_plain(query, key, value):
        call = attention_forward
        for name, tensor in zip(Inputs._fields, (query, key, value), strict=True):
            check_tensor(name, tensor)  # torch's dispatcher would say it in other words
    elif _differentiated(query, key, value):
        out: Tensor = _Attention.apply(query, key, value, options)[0]
        return out
    out = call(query, key, value, *options, False)[0]
    return out


def rows(x: Tensor, alpha: float, backend: str) -> Tensor:
    """Output of :data:`entmax_forward`."""
    call: Callable[..., Any] = _entmax_forward
    if not _is_plain(x):
        call = entmax_forward
    elif _differentiated(x):
        y: Tensor = _Entmax.apply(x, alpha, backend)
        return y
    y = call(x, alpha, backend, False)
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
    with _below_autograd():
        return operator(*tensors, *more)


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
            with _below_autograd():
                return operator(*args)

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> Any:
            raise RuntimeError(
                "adasplash2 has no second derivatives: the gradient of entmax cannot be "
                "differentiated again (double backward)"
            )

    return Once.apply


def _operator(
    schema: str,
    body: Callable[..., Any],
    fake: Callable[..., Any],
    autograd: Callable[..., Any] | None = None,
) -> Callable[..., Any]:
    name = schema.partition("(")[0]
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    operator: Callable[..., Any] = getattr(torch.ops.adasplash2, name).default
    _LIBRARY.impl(name, body, "CompositeExplicitAutograd")
    _LIBRARY.impl(name, autograd or _once(operator), "Autograd")
    torch.library.register_fake(f"adasplash2::{name}", fake, lib=_LIBRARY)
    return operator


_OPTIONS = "float alpha, float? scale, bool is_causal, bool enable_gqa, str backend"

attention_forward = _operator(
    f"attention_forward(Tensor query, Tensor key, Tensor value, {_OPTIONS}, bool needs_grad)"
    " -> (Tensor out, Tensor tau, Tensor saved)",
    _attention_forward,
    _attention_forward_fake,
    _attention_autograd,
)
"""``needs_grad`` asks for ``saved``; autograd asks by itself where it will need it.
``backend=""`` leaves the choice to the dispatcher."""

attention_backward = _operator(
    "attention_backward(Tensor grad_out, Tensor query, Tensor key, Tensor value, Tensor out,"
    f" Tensor tau, Tensor saved, {_OPTIONS})"
    " -> (Tensor grad_query, Tensor grad_key, Tensor grad_value)",
    _attention_backward,
    _attention_backward_fake,
)

entmax_forward = _operator(
    "entmax_forward(Tensor x, float alpha, str backend, bool needs_grad) -> Tensor",
    _entmax_forward,
    _entmax_forward_fake,
    _entmax_autograd,
)
"""Over the last dimension of ``x``, whatever the others."""

entmax_backward = _operator(
    "entmax_backward(Tensor grad_y, Tensor y, float alpha, str backend) -> Tensor",
    _entmax_backward,
    _entmax_backward_fake,
)
