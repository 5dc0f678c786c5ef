"""The operators ``torch.ops.adasplash2.*``: what autograd, ``torch.compile`` and export see.

Every operator has a body for real tensors (validate, choose a backend, run it), a fake for
shapes, an autograd kernel and a rule for ``vmap``. Calls without a single allowed (query, key)
pair are answered by :mod:`adasplash2.closed_form`, so that no backend meets an empty tensor.

Two things are known only when a graph runs, and are kept out of what it is compiled for:

- How much the backward needs. A call with data saves just that; a graph asks for a length that
  suffices for all data (``saved_bytes``), whose end is not touched, nor resident on a CPU.
- ``alpha``, ``scale`` and other numbers that change from call to call. Compilers make constants of
  numbers that an operator is given, and compile anew for each; so there they go as a tensor
  (``numbers``).

They are registered with :class:`torch.library.Library` rather than ``torch.library.custom_op``,
whose wrappers add 4 microseconds to a call without and 19 to a call with gradients.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from adasplash2 import softmax
from adasplash2.closed_form import alpha_gradient, nothing_forward
from adasplash2.contract import SAVED_ALIGNMENT, Backend, Forward, Gradients, Kept
from adasplash2.dispatch import Choice, choose, saved_bound
from adasplash2.options import (
    FIRST,
    LATER_SCHEMA,
    MAY_BE_NONE,
    NUMBERS,
    SCHEMA,
    Options,
    check_alpha_above_one,
    check_dim,
)
from adasplash2.problem import (
    DIFFERENTIABLE,
    OPERANDS,
    TENSORS,
    Inputs,
    Problem,
    Problems,
    RowProblem,
    check_like,
    check_tensor,
    row_problem,
    validated,
)
from adasplash2.torch_fastpath import (
    NO_FORWARD_MODE,
    apply_plain,
    below_autograd,
    beneath,
    in_kernel,
    is_forward_mode,
    is_plain,
    is_without_data,
    new_dynamic_size,
)

_LIBRARY = torch.library.Library("adasplash2", "DEF")

AS_NEEDED = -1
"""``saved_bytes`` of a call whose ``saved`` may have the length that its data asks for."""


class _ReverseMode(torch.autograd.Function):
    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise RuntimeError(NO_FORWARD_MODE)


# Arguments of the operators of attention: tensors, the first options, arguments of its own, then
# what came later, with defaults: `numbers`, the other options, the operands, and what is wanted.


class _Arguments(NamedTuple):
    """What follows the tensors. ``operands`` as in :class:`Inputs`; ``wanted`` says of each of
    ``DIFFERENTIABLE`` whether backward is to find its gradient."""

    options: Options
    own: tuple[Any, ...] = ()
    numbers: Tensor | None = None
    operands: tuple[Tensor | None, ...] = (None,) * len(OPERANDS)
    wanted: tuple[bool, ...] = ()

    def flat(self) -> tuple[Any, ...]:
        """As operators take them."""
        options, later = self.options[:FIRST], self.options[FIRST:]
        wanted = (list(self.wanted),) if self.wanted else ()
        return *options, *self.own, self.numbers, *later, *self.operands, *wanted

    @staticmethod
    def of(args: tuple[Any, ...], own: int) -> _Arguments:
        """From ``args``, of which torch leaves out the last where they are their defaults; ``own``
        arguments are the operator's own."""
        first = FIRST + own
        tail = [*args[first:], *_DEFAULTS[len(args) - first :]]
        numbers, rest = tail[0], tail[1:]
        later = len(Options._fields) - FIRST
        end = later + len(OPERANDS)
        options = Options(*args[:FIRST], *rest[:later])
        wanted = tuple(rest[end] or ()) if len(rest) > end else ()
        return _Arguments(options, args[FIRST:first], numbers, tuple(rest[later:end]), wanted)


_DEFAULTS = None, *Options()[FIRST:], *_Arguments(Options()).operands

_UNSAID: dict[str, Any] = {name: None if name in MAY_BE_NONE else 0.0 for name in NUMBERS}
"""What a graph is given in the place of options that stand in ``numbers``."""

_EXAMPLE: dict[str, Any] = {name: getattr(Options(), name) for name in NUMBERS}
"""Of numbers that are not known yet."""

_FEWEST_NUMBERS = 2
"""That ``numbers`` have ever had."""


def _symbols(options: Options) -> Tensor | None:
    """``numbers`` where one of the options is a symbol of a graph that is being traced."""
    found = [getattr(options, name) for name in NUMBERS]
    if not any(isinstance(number, torch.SymFloat) for number in found):
        return None
    zero = torch.zeros((), dtype=torch.float64, device=_CPU)
    return torch.stack([zero + (math.nan if x is None else x) for x in found])


def _read(options: Options, numbers: Tensor | None) -> Options:
    """The options with those of ``numbers``, where these are given."""
    if numbers is None:
        return options
    if isinstance(numbers, Tensor) and numbers.device.type == "cuda":
        raise RuntimeError(
            f"{', '.join(NUMBERS)} must be constants in a CUDA graph (torch.compile with "
            "mode='reduce-overhead', generate with a static cache), but the compiler made a symbol "
            "of one that had another value before: call torch._dynamo.reset() between models, or "
            "set torch._dynamo.config.specialize_float = True"
        )
    # Graphs of older releases have fewer: what came later they do not ask for.
    count = numbers.numel()
    fits = _FEWEST_NUMBERS <= count <= len(NUMBERS)
    check_like("numbers", numbers, (count if fits else len(NUMBERS),), torch.float64, _CPU)
    found: dict[str, Any] = dict(zip(NUMBERS, numbers.tolist(), strict=False))
    for name in MAY_BE_NONE & found.keys():
        found[name] = None if math.isnan(found[name]) else found[name]
    return options._replace(**found)


def _set_aside(options: Options, numbers: Tensor | None) -> tuple[Options, Tensor | None]:
    """Options for a graph: symbols go to ``numbers``, and none stays."""
    if numbers is None and (numbers := _symbols(options)) is not None:
        options = options._replace(**_UNSAID)
    return options, numbers


_CPU = torch.device("cpu")


# Attention


def _attention_forward(
    query: Tensor, key: Tensor, value: Tensor, *args: Any
) -> tuple[Tensor, Tensor, Tensor]:
    asked = _Arguments.of(args, 1)
    inputs = Inputs(query, key, value, *asked.operands)
    return _run(inputs, _read(asked.options, asked.numbers), asked.own[0])[0]


_Decided = tuple[Problem, Choice]
"""What forward found out, for backward."""


def _run(
    inputs: Inputs,
    options: Options,
    saved_bytes: int,
    prepare: Callable[[], None] | None = None,
    problems: Problems | None = None,
) -> tuple[Forward, _Decided | None]:
    needs_grad = saved_bytes != 0
    problem = None if problems is None else problems[needs_grad]
    if problem is None:
        problem = _problem(inputs, options, needs_grad)
        if problems is not None:
            problems[needs_grad] = problem
    choice = None if problem.is_empty else _chosen(problem, options)
    if prepare is not None:
        prepare()
    if choice is None:
        return nothing_forward(problem, inputs, saved_bytes), None
    return choice.backend.forward(problem, inputs, choice.config, saved_bytes), (problem, choice)


SOFTMAX = Choice(cast(Backend, softmax), {}, "alpha is 1")


def _chosen(problem: Problem, options: Options) -> Choice:
    return SOFTMAX if problem.alpha == 1.0 else choose(problem, options.backend or None)


def _attention_forward_fake(
    query: Tensor, key: Tensor, value: Tensor, *args: Any
) -> tuple[Tensor, Tensor, Tensor]:
    asked = _Arguments.of(args, 1)
    inputs = Inputs(query, key, value, *asked.operands)
    shapes = _shape_problem(inputs, asked.options, asked.numbers)
    saved_bytes = asked.own[0]
    if isinstance(saved_bytes, int) and saved_bytes < 0:
        saved_bytes = 0 if query.is_meta else _length_by_data(shapes, asked.options, asked.numbers)
    rows = (shapes.batch, shapes.heads_q, shapes.length_q)
    return (
        query.new_empty((*rows, shapes.head_dim_v)),
        query.new_empty(rows, dtype=shapes.compute_dtype),
        query.new_empty(saved_bytes, dtype=torch.uint8),
    )


def _length_by_data(shapes: Problem, options: Options, numbers: Tensor | None) -> Any:
    """The length of ``saved`` in a trace: a symbol, or the most that it can be."""
    if options.alpha == 1.0:
        return 0
    size = new_dynamic_size()
    return _bound(shapes, options, numbers, options.alpha) if size is None else size


def _bound(shapes: Problem, options: Options, numbers: Tensor | None, alpha: float) -> Any:
    """The most that ``saved`` of a trace can be: with any alpha, where it is not known yet.
    ``alpha`` is what it was before it became one of ``numbers``."""
    if alpha == 1.0:
        return 0
    alphas = _KINDS_OF_ALPHA if _is_open(options, numbers) else (shapes.alpha,)
    problems = (dataclasses.replace(shapes, alpha=alpha) for alpha in alphas)
    bounds = [saved_bound(problem, options.backend or None) for problem in problems]
    return functools.reduce(torch.sym_max, bounds)


_KINDS_OF_ALPHA = 1.25, 1.5, 2.0, 3.0
"""One of each kind for which backends keep something else: a power, closed forms, and a power above
2."""


def _is_open(options: Options, numbers: Tensor | None) -> bool:
    """Whether numbers come when the graph runs."""
    return numbers is not None or _symbols(options) is not None


_BACKWARD_TENSORS = 7
"""From ``grad_out`` to ``saved``, before the options."""


def _attention_backward(*args: Any) -> tuple[Tensor, ...]:
    tensors, asked = args[:_BACKWARD_TENSORS], _Arguments.of(args[_BACKWARD_TENSORS:], 0)
    options = _read(asked.options, asked.numbers)
    found = _run_backward(tensors, asked.operands, options, asked.wanted, None)
    query = tensors[1]
    return tuple(query.new_empty(0) if grad is None else grad for grad in found)


def _run_backward(
    tensors: tuple[Any, ...],
    operands: tuple[Tensor | None, ...],
    options: Options,
    wanted: tuple[bool, ...],
    decided: _Decided | None,
) -> Gradients:
    """``decided`` by the forward of the same call, where that is known."""
    grad_out, query, key, value, out, tau, saved = tensors
    inputs = Inputs(query, key, value, *operands)
    problem = _problem(inputs, options, True) if decided is None else decided[0]
    _check_backward(problem, grad_out, out, tau, saved)
    names = _wanted(inputs, wanted) if wanted else ()
    if problem.is_empty:
        given = {name: getattr(inputs, name) for name in names}
        zeros = {name: t.new_zeros(t.shape) for name, t in given.items()}
        return Gradients(*(t.new_zeros(t.shape) for t in inputs.tensors()), **zeros)
    choice = _chosen(problem, options) if decided is None else decided[1]
    chosen, config, _ = choice
    kept = Kept(_as_made(tau), _as_made(saved))
    found = chosen.backward(problem, inputs, kept, grad_out, config, names)
    if names:
        if missing := [name for name in names if getattr(found, name) is None]:
            raise NotImplementedError(f"{chosen.name} gives no gradient of {', '.join(missing)}")
        sums = {name: _summed(name, getattr(found, name), getattr(inputs, name)) for name in names}
        found = found._replace(**sums)
    return found


def _wanted(inputs: Inputs, wanted: tuple[bool, ...]) -> tuple[str, ...]:
    """Names of the operands whose gradients are wanted.

    Raises:
        ValueError: one that is not given, or has none.
    """
    if len(wanted) != len(DIFFERENTIABLE):
        raise ValueError(f"wanted must have {len(DIFFERENTIABLE)} entries, got {wanted}")
    names = tuple(name for name, said in zip(DIFFERENTIABLE, wanted, strict=True) if said)
    for name in names:
        operand = getattr(inputs, name)
        if operand is None or not operand.is_floating_point():
            raise ValueError(f"wanted must name operands that have a gradient, got {name}")
    return names


def _summed(name: str, found: Tensor, operand: Tensor) -> Tensor:
    """The gradient of ``operand`` from what a backend found."""
    if name != "attn_mask":
        found = found.to(torch.float64)
        if operand.dim() == 2:  # one of each head
            found = found.sum(dim=2)
        found = found.sum_to_size(operand.shape)
    return found.to(operand.dtype)


class _SoftmaxBackward(_ReverseMode):
    """:data:`attention_backward` at alpha = 1, of the arguments that it has. What needs the scores
    of all pairs at once waits until a second derivative is really taken."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Any:
        ctx.places = [i for i, arg in enumerate(args) if isinstance(arg, Tensor)]
        ctx.save_for_backward(*(args[i] for i in ctx.places))
        ctx.others = [None if isinstance(arg, Tensor) else arg for arg in args]
        return beneath(attention_backward, *args)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        args = list(ctx.others)
        for i, tensor in zip(ctx.places, ctx.saved_tensors, strict=True):
            args[i] = tensor
        asked = _Arguments.of(tuple(args[_BACKWARD_TENSORS:]), 0)
        said = zip(DIFFERENTIABLE, _said(asked), strict=True)
        names = [*TENSORS, *(name for name, wanted in said if wanted)]
        of_names = (
            *grads[:3],
            *(g for g, wanted in zip(grads[3:], _said(asked), strict=True) if wanted),
        )
        needed = [i for i, need in enumerate(ctx.needs_input_grad) if need]

        def gradients(*tensors: Tensor) -> tuple[Tensor, ...]:
            own = list(args)
            for i, tensor in zip(needed, tensors, strict=True):
                own[i] = tensor
            operands = _Arguments.of(tuple(own[_BACKWARD_TENSORS:]), 0).operands
            inputs = Inputs(*own[1:4], *operands)
            problem = _problem(inputs, asked.options, True)
            return softmax.gradients(problem, inputs, own[0], names)

        found = softmax.pulled_back(gradients, [args[i] for i in needed], of_names)
        by_place = dict(zip(needed, found, strict=True))
        return tuple(map(by_place.get, range(len(args))))


def _attention_backward_autograd(*args: Any) -> Any:
    asked = _Arguments.of(args[_BACKWARD_TENSORS:], 0)
    if asked.options.alpha == 1.0:
        return in_kernel(_SoftmaxBackward, *args)
    return _attention_backward_once(*args)


def _attention_backward_fake(*args: Any) -> tuple[Tensor, ...]:
    grad_out, query, key, value, out, tau, saved = args[:_BACKWARD_TENSORS]
    asked = _Arguments.of(args[_BACKWARD_TENSORS:], 0)
    inputs = Inputs(query, key, value, *asked.operands)
    problem = _shape_problem(inputs, asked.options, asked.numbers)
    _check_backward(problem, grad_out, out, tau, saved)
    names = _wanted(inputs, asked.wanted) if asked.wanted else ()
    return *(t.new_empty(t.shape) for t in inputs.tensors()), *(
        query.new_empty(getattr(inputs, name).shape, dtype=getattr(inputs, name).dtype)
        if name in names
        else query.new_empty(0)
        for name in DIFFERENTIABLE
    )


def _as_made(tensor: Tensor) -> Tensor:
    """``tensor``, or a copy that lies in memory as a forward made it: what is saved may come back
    with other strides or at another address, from hooks, offloading or a compiled graph."""
    if tensor.is_contiguous() and tensor.data_ptr() % SAVED_ALIGNMENT == 0:
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)


def _check_backward(
    problem: Problem, grad_out: Tensor, out: Tensor | None, tau: Tensor, saved: Tensor
) -> None:
    """What is inside ``saved``, its backend checks."""
    rows = (problem.batch, problem.heads_q, problem.length_q)
    shape, dtype, device = (*rows, problem.head_dim_v), problem.dtype, problem.device
    check_like("grad_out", grad_out, shape, dtype, device)
    if out is not None:
        check_like("out", out, shape, dtype, device)
    check_like("tau", tau, rows, problem.compute_dtype, device)
    check_like("saved", saved, (saved.numel(),), torch.uint8, device)


_IN_BATCH = {"ranges": 1}
"""Where the batch of an operand is, if not first."""


def _attention_forward_vmap(
    info: Any,
    in_dims: tuple[Any, ...],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *args: Any,
) -> tuple[Any, Any]:
    """More batch: one call, with one ``saved`` for all."""
    n = info.batch_size
    inputs = (_folded(t, dim, n) for t, dim in zip((query, key, value), in_dims, strict=False))
    asked, dims = _Arguments.of(args, 1), _Arguments.of(in_dims[3:], 1)
    if asked.operands[OPERANDS.index("block_table")] is not None:
        raise RuntimeError("vmap does not go over a paged cache: its pages are of no one sequence")
    (saved_bytes,) = asked.own
    if not isinstance(saved_bytes, int) or saved_bytes > 0:
        saved_bytes *= n
    seed = OPERANDS.index("dropout_seed")
    if asked.operands[seed] is not None and dims.operands[seed] is None:
        # One seed for all slices, by which each drops the same: heads must be numbered alike.
        return _forward_by_slices(n, in_dims, query, key, value, *args)
    shape = _folds(query, in_dims[0], n)
    asked = asked._replace(own=(saved_bytes,), operands=_folded_operands(asked, dims, shape))
    out, tau, saved = attention_forward(*inputs, *asked.flat())
    return (out.unflatten(0, shape), tau.unflatten(0, shape), saved), (0, 0, None)


def _forward_by_slices(n: int, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
    """Calls of their own, whose ``saved`` are as long as the longest."""
    outs, taus, saved = zip(
        *(
            attention_forward(
                *(
                    t.select(d, i) if isinstance(t, Tensor) and isinstance(d, int) else t
                    for t, d in zip(args, in_dims, strict=True)
                )
            )
            for i in range(n)
        ),
        strict=True,
    )
    longest = max(t.shape[0] for t in saved)
    padded = [torch.nn.functional.pad(t, (0, longest - t.shape[0])) for t in saved]
    return (torch.stack(outs), torch.stack(taus), torch.stack(padded)), (0, 0, 0)


def _attention_backward_vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
    n, count = info.batch_size, 3 + len(DIFFERENTIABLE)
    tensors, saved = args[:6], args[6]  # from grad_out to tau
    asked, dims = _Arguments.of(args[7:], 0), _Arguments.of(in_dims[7:], 0)
    if in_dims[5] is not None and in_dims[6] is None:
        folded = (
            None if t is None else _folded(t, dim, n)
            for t, dim in zip(tensors, in_dims, strict=False)
        )
        shape = _folds(tensors[0], in_dims[0], n)
        asked = asked._replace(operands=_folded_operands(asked, dims, shape))
        found = attention_backward(*folded, saved, *asked.flat())
        grads = [grad.unflatten(0, shape) for grad in found[:3]]
        for name, grad, said in zip(DIFFERENTIABLE, found[3:], _said(asked), strict=True):
            place = OPERANDS.index(name)
            if said:
                grad = grad.unflatten(0, shape)
                if _batch_of(name, args[7:], in_dims[7:], place) == 1:
                    grad = grad.sum(1, keepdim=True)
            else:
                grad = grad.expand(n, *grad.shape)
            grads.append(grad)
        return tuple(grads), (0,) * count

    # Several gradients of one output, as jacrev asks for them.
    def at(i: int, tensor: Any, dim: Any) -> Any:
        return tensor.select(dim, i) if isinstance(tensor, Tensor) and dim is not None else tensor

    slices = []
    for i in range(n):
        one = asked._replace(
            operands=tuple(map(functools.partial(at, i), asked.operands, dims.operands))
        )
        own = (at(i, t, dim) for t, dim in zip(args[:7], in_dims, strict=False))
        slices.append(attention_backward(*own, *one.flat()))
    return tuple(torch.stack(grads) for grads in zip(*slices, strict=True)), (0,) * count


def _said(asked: _Arguments) -> tuple[bool, ...]:
    return asked.wanted or (False,) * len(DIFFERENTIABLE)


def _batch_of(name: str, args: tuple[Any, ...], in_dims: tuple[Any, ...], place: int) -> int:
    """The size of an operand's batch, beside the dimension that is mapped over."""
    operand = _Arguments.of(args, 0).operands[place]
    dim = _Arguments.of(in_dims, 0).operands[place]
    assert operand is not None
    return int(operand.shape[0 if dim is None or dim % operand.dim() else 1])


def _folded_operands(
    asked: _Arguments, dims: _Arguments, shape: tuple[int, int]
) -> tuple[Tensor | None, ...]:
    """Operands for a batch that :func:`_folded` makes of ``shape``. One that holds for the whole
    batch stays as it is, unless its gradient is wanted: that is each mapped call's own."""
    n, batch = shape
    wanted = {name for name, said in zip(DIFFERENTIABLE, _said(asked), strict=True) if said}
    folded: list[Tensor | None] = []
    places = cast(tuple[int | None, ...], dims.operands)
    for name, tensor, dim in zip(OPERANDS, asked.operands, places, strict=True):
        place = _IN_BATCH.get(name, 0)
        if tensor is None or (dim is None and tensor.shape[place] == 1 and name not in wanted):
            folded.append(tensor)
            continue
        tensor = tensor.unsqueeze(place) if dim is None else tensor.movedim(dim, place)
        sizes = list(tensor.shape)
        sizes[place : place + 2] = n, batch
        folded.append(tensor.expand(sizes).flatten(place, place + 1))
    return tuple(folded)


def _folded(tensor: Tensor, dim: int | None, n: int) -> Tensor:
    """The dimension that is mapped over as part of the batch."""
    tensor = tensor.expand(n, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
    return tensor.flatten(0, 1)


def _folds(tensor: Tensor, dim: int | None, n: int) -> tuple[int, int]:
    """What :func:`_folded` makes one of: ``n`` may be 0, and the batch would not be known."""
    return n, tensor.shape[0 if dim is None or dim % tensor.dim() else 1]


class _Attention(_ReverseMode):
    """``asked`` is one argument, and operands come only where they are given: torch looks at each.
    Their names are in ``asked``."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        asked: tuple[Options, int, Tensor | None, tuple[str, ...], Problems | None],
        *given: Tensor,
    ) -> Any:
        options, saved_bytes, numbers, names, problems = asked
        inputs = Inputs(query, key, value)
        if names:
            inputs = inputs._replace(**dict(zip(names, given, strict=True)))
        ctx.decided = None
        if is_plain(query, key, value, *given) if given else is_plain(query, key, value):
            (out, tau, saved), ctx.decided = _run(
                inputs, _read(options, numbers), saved_bytes, None, problems
            )
        else:
            flat = _Arguments(options, (saved_bytes,), numbers, inputs.operands()).flat()
            out, tau, saved = beneath(attention_forward, query, key, value, *flat)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(tau, saved)
        ctx.save_for_backward(query, key, value, tau, saved, *given)
        ctx.options, ctx.numbers, ctx.names = options, numbers, names
        return out, tau, saved

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        grad_out, needed, names = grads[0], ctx.needs_input_grad, ctx.names
        if grad_out is None:
            return (None,) * (4 + len(names))
        query, key, value, tau, saved, *given = ctx.saved_tensors
        tensors = grad_out, query, key, value, None, tau, saved
        operands, wanted, asked_for = _NO_OPERANDS, _NONE_WANTED, frozenset[str]()
        if names:
            by_name = dict(zip(names, given, strict=True))
            operands = tuple(map(by_name.get, OPERANDS))
            asked_for = frozenset(
                name for name, need in zip(names, needed[4:], strict=True) if need
            )
            if asked_for:
                wanted = tuple(name in asked_for for name in DIFFERENTIABLE)
        if _is_final(grad_out, query, key, value, tau, saved, *given):
            options = _read(ctx.options, ctx.numbers)
            found = _run_backward(tensors, operands, options, wanted, ctx.decided)
        else:
            flat = _Arguments(ctx.options, (), ctx.numbers, operands, wanted).flat()
            found = Gradients(*attention_backward(*tensors, *flat))
        # What is not needed is not kept.
        first = [grad if need else None for grad, need in zip(found[:3], needed, strict=False)]
        if not names:
            return *first, None
        later = (getattr(found, name) if name in asked_for else None for name in names)
        return *first, None, *later


_NO_OPERANDS: tuple[Tensor | None, ...] = (None,) * len(OPERANDS)
_NONE_WANTED: tuple[bool, ...] = ()


def _differentiable_call(
    apply: Callable[..., Any],
    inputs: Inputs,
    options: Options,
    saved_bytes: int,
    numbers: Tensor | None,
    problems: Problems | None = None,
) -> Any:
    """``apply`` :class:`_Attention` to ``inputs``."""
    if not inputs.has_operands():
        return apply(_Attention, *inputs[:3], (options, saved_bytes, numbers, (), problems))
    names = tuple(name for name in OPERANDS if getattr(inputs, name) is not None)
    asked = options, saved_bytes, numbers, names, problems
    return apply(_Attention, *inputs[:3], asked, *inputs.given()[3:])


def _attention_autograd(query: Tensor, key: Tensor, value: Tensor, *args: Any) -> Any:
    asked = _Arguments.of(args, 1)
    (saved_bytes,) = asked.own
    options, numbers = _set_aside(asked.options, asked.numbers)
    inputs = Inputs(query, key, value, *asked.operands)
    if _differentiated(*inputs.given()):
        if saved_bytes == 0:
            saved_bytes = AS_NEEDED
            if query.is_meta or is_without_data(*inputs.given()):
                problem = _shape_problem(inputs, options, numbers)
                saved_bytes = _bound(problem, options, numbers, asked.options.alpha)
        return _differentiable_call(in_kernel, inputs, options, saved_bytes, numbers)
    asked = asked._replace(options=options, numbers=numbers)
    return below_autograd(attention_forward, query, key, value, *asked.flat())


def _problem(inputs: Inputs, options: Options, needs_grad: bool) -> Problem:
    return validated(inputs, options, needs_grad)


def _shape_problem(inputs: Inputs, options: Options, numbers: Tensor | None) -> Problem:
    """What a fake asks: numbers that are not known yet are stood in for."""
    if _is_open(options, numbers):
        options = options._replace(**_EXAMPLE)
        if inputs.dropout_seed is not None:
            options = options._replace(dropout_p=0.5)
    return _problem(inputs, options, inputs.block_table is None)  # pages have no gradient


# Entmax of rows: of the options, it has alpha and a backend. `alphas`, in the place of alpha, have
# the dimensions of x, sizes that broadcast to it, and 1 along `dim`.


class _RowArguments(NamedTuple):
    """What follows the tensors in :data:`entmax_backward`."""

    alpha: float
    dim: int
    backend: str
    numbers: Tensor | None = None
    alphas: Tensor | None = None

    @staticmethod
    def of_forward(args: tuple[Any, ...]) -> tuple[_RowArguments, bool]:
        """From what follows in :data:`entmax_forward`, and whether there is a gradient."""
        alpha, dim, backend, needs_grad, *later = args
        return _RowArguments(alpha, dim, backend, *later), needs_grad

    def flat_forward(self, needs_grad: bool) -> tuple[Any, ...]:
        """As :data:`entmax_forward` takes them."""
        return *self[:3], needs_grad, *self[3:]

    def read(self) -> float:
        """``alpha``, from ``numbers`` where these are given."""
        if self.numbers is None:
            return self.alpha
        return _read(Options(self.alpha), self.numbers).alpha

    def mapped(self, in_dims: tuple[int | None, ...], n: int, x: Tensor) -> _RowArguments:
        """For ``x`` of :func:`_more_rows`; the last of ``in_dims`` is that of ``alphas``."""
        alphas = None if self.alphas is None else _more_rows(self.alphas, in_dims[-1], n)
        return self._replace(dim=check_dim(self.dim, x.dim() - 1), alphas=alphas)


def _entmax_forward(x: Tensor, *args: Any) -> Tensor:
    asked, needs_grad = _RowArguments.of_forward(args)
    dim = asked.dim
    x, problem, alphas = _row_call(x, asked.read(), dim, needs_grad, asked.alphas)
    if problem.is_empty:
        return _unlast(x.new_zeros(x.shape), x.shape, dim)
    chosen, config, _ = choose(problem, asked.backend or None)
    return _unlast(chosen.rows_forward(problem, _rows(problem, x), config, alphas), x.shape, dim)


def _row_call(
    x: Tensor, alpha: float, dim: int, needs_grad: bool, alphas: Tensor | None
) -> tuple[Tensor, RowProblem, Tensor | None]:
    """``x`` with ``dim`` last, what is asked, and the alphas ``(rows,)`` where there are some."""
    alpha = check_alpha_above_one(alpha)
    x = _last(x, dim)
    if alphas is None:
        return x, row_problem(x, alpha=alpha, needs_grad=needs_grad), None
    alphas = _last(alphas, dim)
    problem = row_problem(x, alpha=alpha, needs_grad=needs_grad, alphas=alphas)
    return x, problem, alphas.expand(*x.shape[:-1], 1).reshape(problem.rows).contiguous()


def _entmax_forward_fake(x: Tensor, *args: Any) -> Tensor:
    asked, needs_grad = _RowArguments.of_forward(args)
    x = _row_call(x, 1.5, asked.dim, needs_grad, asked.alphas)[0]
    return _unlast(x.new_empty(x.shape), x.shape, asked.dim)


def _entmax_backward(grad_y: Tensor, y: Tensor, *args: Any) -> Tensor:
    asked = _RowArguments(*args)
    dim = asked.dim
    y_last, problem, alphas = _row_call(y, asked.read(), dim, True, asked.alphas)
    check_like("grad_y", grad_y, y.shape, y.dtype, y.device)
    shape = y_last.shape
    if problem.is_empty:
        return _unlast(y.new_zeros(shape), shape, dim)
    chosen, config, _ = choose(problem, asked.backend or None)
    y_rows, grad_rows = _rows(problem, y_last), _rows(problem, _last(grad_y, dim))
    found = chosen.rows_backward(problem, y_rows, grad_rows, config, alphas)
    return _unlast(found, shape, dim)


def _entmax_backward_fake(grad_y: Tensor, y: Tensor, *args: Any) -> Tensor:
    asked = _RowArguments(*args)
    check_like("grad_y", grad_y, y.shape, y.dtype, y.device)
    shape = _row_call(y, 1.5, asked.dim, True, asked.alphas)[0].shape
    return _unlast(y.new_empty(shape), shape, asked.dim)


def _entmax_forward_vmap(
    info: Any, in_dims: tuple[int | None, ...], x: Tensor, *args: Any
) -> tuple[Any, Any]:
    """More rows."""
    x = _more_rows(x, in_dims[0], info.batch_size)
    asked, needs_grad = _RowArguments.of_forward(args)
    asked = asked.mapped(in_dims, info.batch_size, x)
    return entmax_forward(x, *asked.flat_forward(needs_grad)), 0


def _entmax_backward_vmap(
    info: Any, in_dims: tuple[int | None, ...], grad_y: Tensor, y: Tensor, *args: Any
) -> tuple[Any, Any]:
    n = info.batch_size
    grad_y, y = (_more_rows(t, d, n) for t, d in zip((grad_y, y), in_dims, strict=False))
    return entmax_backward(grad_y, y, *_RowArguments(*args).mapped(in_dims, n, y)), 0


def _more_rows(tensor: Tensor, dim: int | None, n: int) -> Tensor:
    """The dimension that is mapped over as the first."""
    return tensor.expand(n, *tensor.shape) if dim is None else tensor.movedim(dim, 0)


class _Entmax(_ReverseMode):
    """``asked`` without ``alphas``, which torch must see, is one argument."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, asked: _RowArguments, alphas: Tensor | None = None) -> Any:
        given = (x,) if alphas is None else (x, alphas)
        flat = asked._replace(alphas=alphas).flat_forward(True)
        y = _entmax_forward(x, *flat) if is_plain(*given) else beneath(entmax_forward, x, *flat)
        ctx.save_for_backward(y, *given[1:])
        ctx.asked = asked
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        tensors = grads[0], *ctx.saved_tensors
        grad_y, y, *alphas = tensors
        body = _entmax_backward if _is_final(*tensors) else entmax_backward
        if not alphas:
            return body(grad_y, y, *ctx.asked), None
        asked = ctx.asked._replace(alphas=alphas[0])
        of_x, _, of_alphas = ctx.needs_input_grad
        grad_x = body(grad_y, y, *asked) if of_x else None
        grad_alphas = alpha_gradient(grad_y, y, alphas[0], asked.dim) if of_alphas else None
        return grad_x, None, grad_alphas


def _entmax_autograd(x: Tensor, *args: Any) -> Any:
    asked, needs_grad = _RowArguments.of_forward(args)
    options, numbers = _set_aside(Options(asked.alpha), asked.numbers)
    asked = asked._replace(alpha=options.alpha, numbers=numbers)
    given = (x,) if asked.alphas is None else (x, asked.alphas)
    if _differentiated(*given):
        return in_kernel(_Entmax, x, asked._replace(alphas=None), *given[1:])
    return below_autograd(entmax_forward, x, *asked.flat_forward(needs_grad))


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


# Calls


def attention(
    inputs: Inputs,
    options: Options,
    prepare: Callable[[], None] | None = None,
    problems: Problems | None = None,
) -> Tensor:
    """Output of :data:`attention_forward`. ``prepare``, for calls without gradients, is called when
    nothing can refuse the call any more, and before ``inputs`` are read. ``problems`` as
    :class:`adasplash2.lowering.Call` has them."""
    return attention_and_tau(inputs, options, prepare, problems)[0]


def softmax_attention(problem: Problem, inputs: Inputs, options: Options) -> Tensor:
    """:func:`attention` at alpha = 1 of what has been validated: a token is so but once."""
    given = inputs.given()
    if problem.is_empty or not is_plain(*given) or _differentiated(*given):
        return attention(inputs, options)
    return softmax.forward(problem, inputs, SOFTMAX.config).out


def attention_and_tau(
    inputs: Inputs,
    options: Options,
    prepare: Callable[[], None] | None = None,
    problems: Problems | None = None,
) -> tuple[Tensor, Tensor]:
    """Output and thresholds of :data:`attention_forward`."""
    given = inputs.given()
    if is_plain(*given):
        if _differentiated(*given):
            out, tau, _ = _differentiable_call(
                apply_plain, inputs, options, AS_NEEDED, None, problems
            )
            return out, tau
        forward = _run(inputs, options, 0, prepare, problems)[0]
        return forward.out, forward.tau
    for name, tensor in zip(TENSORS, inputs, strict=False):
        check_tensor(name, tensor)  # torch's dispatcher would say it in other words
    is_traced = torch.compiler.is_compiling()
    if prepare is not None or not is_traced:  # and a transform's rules see other shapes
        problem = _problem(inputs, options, False)
    if prepare is not None:
        if not (is_traced or inputs.query.is_meta or problem.is_empty):
            _chosen(problem, options)
        prepare()
    asked = _Arguments(options, (0,), None, inputs.operands())
    out, tau, _ = attention_forward(*inputs.tensors(), *asked.flat())
    return out, tau


def rows(x: Tensor, alpha: float, dim: int, backend: str, alphas: Tensor | None = None) -> Tensor:
    """Output of :data:`entmax_forward`."""
    given = (x,) if alphas is None else (x, alphas)
    plain = is_plain(*given)
    if plain and _differentiated(*given):
        return cast(Tensor, apply_plain(_Entmax, x, _RowArguments(alpha, dim, backend), *given[1:]))
    body = _entmax_forward if plain else entmax_forward
    return cast(Tensor, body(x, alpha, dim, backend, False, None, alphas))


def _is_final(*tensors: Tensor) -> bool:
    """Whether a gradient may be taken by its body: an operator without derivative must be told
    where it is to be differentiated."""
    return is_plain(*tensors) and not _differentiated(*tensors)


def _differentiated(*tensors: Tensor) -> bool:
    """Whether autograd must see the call. Forward mode must too, if only to refuse it: a kernel
    that steps below autograd drops tangents without a word."""
    if is_forward_mode():
        return True
    if torch.is_grad_enabled():
        for tensor in tensors:
            if tensor.requires_grad:
                return True
    return False


# Registration


def _once(operator: Callable[..., Any]) -> Callable[..., Any]:
    """Autograd kernel of an operator that runs, but has no derivative."""

    class Once(_ReverseMode):
        @staticmethod
        def forward(ctx: Any, *args: Any) -> Any:
            return beneath(operator, *args)

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> Any:
            raise RuntimeError(
                "adasplash2 has no second derivatives: the gradient of entmax cannot be "
                "differentiated again (double backward, which torch.autograd.functional.jvp "
                "needs too)"
            )

    return functools.partial(in_kernel, Once)


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


_NUMBERS = "Tensor? numbers=None"
_LATER = f"{_NUMBERS}, {LATER_SCHEMA}, " + ", ".join(f"Tensor? {name}=None" for name in OPERANDS)

attention_forward = _operator(
    f"attention_forward(Tensor query, Tensor key, Tensor value, {SCHEMA}, SymInt saved_bytes,"
    f" {_LATER}) -> (Tensor out, Tensor tau, Tensor saved)",
    _attention_forward,
    _attention_forward_fake,
    _attention_forward_vmap,
    _attention_autograd,
)
"""``saved_bytes`` asks for ``saved`` of that length, at least :func:`saved_bound`, or of any length
(:data:`AS_NEEDED`); with 0 there is none, and autograd asks by itself where it will need it.
``backend=""`` leaves the choice to the dispatcher. ``numbers``, float64 and on the CPU, has
:data:`NUMBERS` (NaN for a scale that is None) in the place of these options."""

attention_backward = _operator(
    "attention_backward(Tensor grad_out, Tensor query, Tensor key, Tensor value, Tensor? out,"
    f" Tensor tau, Tensor saved, {SCHEMA}, {_LATER}, bool[] wanted=[])"
    " -> (Tensor grad_query, Tensor grad_key, Tensor grad_value, "
    + ", ".join(f"Tensor grad_{name}" for name in DIFFERENTIABLE)
    + ")",
    _attention_backward,
    _attention_backward_fake,
    _attention_backward_vmap,
    _attention_backward_autograd,
)
"""``out`` is not read, and autograd gives None: else a model would keep each layer's output twice,
here and as the input of its next product. ``wanted`` says of each of ``DIFFERENTIABLE`` whether its
gradient is found; without entries none is. What is not found is an empty tensor."""

_attention_backward_once = _once(attention_backward)

entmax_forward = _operator(
    "entmax_forward(Tensor x, Scalar alpha, int dim, str backend, bool needs_grad,"
    f" {_NUMBERS}, Tensor? alphas=None) -> Tensor",
    _entmax_forward,
    _entmax_forward_fake,
    _entmax_forward_vmap,
    _entmax_autograd,
)

entmax_backward = _operator(
    f"entmax_backward(Tensor grad_y, Tensor y, Scalar alpha, int dim, str backend, {_NUMBERS},"
    " Tensor? alphas=None) -> Tensor",
    _entmax_backward,
    _entmax_backward_fake,
    _entmax_backward_vmap,
)
