"""The launches of attention, in order. Importing this imports Triton.

``run`` is what is done with a launch: :func:`launch` it, or :func:`compile_only`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import operator
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton.runtime.jit import MockTensor

from adasplash2.backends.triton import sizes
from adasplash2.backends.triton.kernels import backward as backward_kernels
from adasplash2.backends.triton.kernels import output as output_kernels
from adasplash2.backends.triton.kernels import solve as solve_kernels
from adasplash2.backends.triton.kernels import whole as whole_kernels
from adasplash2.contract import Config, Forward, Gradients
from adasplash2.problem import Inputs, Problem

MAX_STEPS = 64
"""Steps of one row. Gaussian scores take one to four, above alpha = 2 up to forty where a key
lies next to the threshold; bisection alone takes no more than this."""

LONGEST_STRIDE = 1 << 23
"""A larger stride from row to row times the rows of a tile would leave 32 bits."""

STATS_TILE = 64
"""Side of the tiles that ``AttentionStats.empty_tiles`` counts."""

MAXIMA_CHUNK = 4096
"""Tile maxima that a program holds at a time, at most: 32 of 128 rows."""

FEW_MAXIMA = 512
"""The most tile maxima of a warp for which those of their pieces, four times as many, fit its
registers."""

FOLDS = 2
"""Tiles that share the maxima of their pieces there, where all that a row may see are as many."""

REUSES = 1
"""Further steps for which the first list of so few tiles serves."""

FEWEST_MAXIMA = 16
"""The fewest tile maxima of a row that a program holds at a time, however few tiles there are."""

LIST_CHUNK = 256
"""Row blocks that the transposition looks at together."""

TILES_CHUNK = 1024
"""Key tiles whose lists are cut together."""

ADDED_ROWS = 16
"""Keys for which a program adds the sums of pieces."""

CACHED_PLANS = 1024

CACHED_LAYOUTS = 64
"""Kinds of strides that a plan remembers kernels for."""

Compiled = dict[Any, Any]
"""See :class:`Launch`."""


class Launch(NamedTuple):
    """A kernel, its number of programs, its arguments by name, Triton's options.

    ``compiled`` remembers what Triton has compiled, by kernel and ``variant``; whatever else it
    compiles for must be the same for all that is kept there.
    """

    kernel: Any
    grid: int
    arguments: dict[str, Any]
    options: dict[str, int]
    compiled: Compiled | None = None
    variant: Hashable = None

    @property
    def values(self) -> tuple[Any, ...]:
        """The arguments in the order that the kernel takes them in."""
        return _in_order(self.kernel)(self.arguments)


def launch(asked: Launch) -> None:
    """Launch on the present stream.

    To find what it has compiled Triton describes all arguments anew, which takes longer than a
    small call: so it is asked once.
    """
    kernel, grid, _, options, compiled, variant = asked
    key = id(kernel), variant
    if compiled is not None and (found := compiled.get(key)):
        found[(grid, 1, 1)](*asked.values)
        return
    found = kernel[(grid,)](*asked.values, **options)
    if compiled is not None:
        compiled[key] = found  # None from the interpreter


def compile_only(asked: Launch) -> None:
    """Compile into Triton's cache; tensors stand for their dtypes."""
    values = map(_without_data, asked.values)
    asked.kernel.warmup(*values, grid=(asked.grid,), **asked.options)


Run = Callable[[Launch], None]


@functools.cache
def _in_order(kernel: Any) -> Callable[[dict[str, Any]], tuple[Any, ...]]:
    """Puts the arguments of ``kernel`` in order."""
    return operator.itemgetter(*kernel.arg_names)


def _without_data(value: Any) -> Any:
    if isinstance(value, tuple) and hasattr(value, "_make"):
        return value._make(map(_without_data, value))
    return MockTensor.wrap_dtype(value.dtype) if isinstance(value, Tensor) else value


def on_device(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on the present device, whatever the tensors'."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


class Plan(NamedTuple):
    """What follows from a problem and a configuration. ``whole``: the launches of ``whole_rows``,
    each with how it is compiled for its tile, its row blocks of a head, from which on and how many,
    and those of a program. ``grows``: kernels are those of all lengths of a cache. ``kept``: what
    ``decoding.py`` makes of it, once."""

    features: tuple[str, ...]
    grid: sizes.Grid
    layout: sizes.Saved
    shape: sizes.Shape
    opt: sizes.Options
    whole: tuple[tuple[sizes.Options, int, int, int], ...]
    options: dict[str, dict[str, int]]
    compiled: dict[Any, Compiled]
    grows: bool
    kept: dict[bool, Any]

    def compiled_for(self, tensors: Sequence[Tensor]) -> Compiled:
        """Kernels for tensors that lie in memory as these do; all others are made here."""
        key: tuple[Hashable, ...]
        if self.grows:
            key = tuple((x.data_ptr() % sizes.ALIGNMENT, *map(_kind, x.stride())) for x in tensors)
        else:
            key = tuple((x.data_ptr() % sizes.ALIGNMENT, x.stride()) for x in tensors)
        if key not in self.compiled and len(self.compiled) >= CACHED_LAYOUTS:
            self.compiled.clear()
        return self.compiled.setdefault(key, {})


def _kind(stride: int) -> tuple[bool, bool, bool]:
    """What Triton compiles for of a number."""
    return stride == 1, stride % sizes.ALIGNMENT == 0, stride >= 1 << 31


@functools.lru_cache(CACHED_PLANS)
def _of_any_length(
    problem: Problem, opt: sizes.Options, items: tuple[tuple[str, int | str], ...]
) -> dict[Any, Compiled]:
    """What plans share whose problems differ from this one in the length of the cache alone: else
    Triton would describe all arguments anew with every token that a cache grows by."""
    return {}


def _operand(tensor: Tensor | None) -> Tensor | None:
    """In a dtype that kernels load: a byte for a boolean, and what can be computed with."""
    if tensor is None or tensor.dtype == torch.bool:
        return tensor if tensor is None else tensor.view(torch.int8)
    return tensor.to(sizes.kernel_dtype(tensor.dtype))


@functools.lru_cache(CACHED_PLANS)
def _plan(problem: Problem, items: tuple[tuple[str, int | str], ...]) -> Plan:
    config = dict(items)
    grid, layout = sizes.Grid.of(problem, config), sizes.Saved(problem, config)
    whole: list[tuple[sizes.Options, int, int, int]] = []
    shape, opt = sizes.Shape.of(problem), sizes.Options.of(problem, config)
    compiled: dict[Any, Compiled] = {}
    # What a call may ask beyond brings numbers of its own, and HIP compiles for sizes of memory.
    grows = sizes.is_decoding(problem) and not problem.features and torch.version.hip is None
    if sizes.is_decoding(problem):
        options = {name: sizes.decoding_options(config, name) for name in sizes.DECODE_KERNELS}
        # Lengths are arguments of their own there, and keys are read once in any case.
        shape, opt = (
            shape._replace(length_k=None),
            opt._replace(exact=True, relative=True, local=False, folded=False),
        )
        if grows:
            compiled = _of_any_length(dataclasses.replace(problem, length_k=0), opt, items)
    else:
        options = {name: sizes.launch_options(config, name) for name in sizes.KERNELS}
        if opt.joined:  # whose lists are hardly longer than a warp
            options["transpose_lists"] = {"num_warps": 1}
        if config["whole"] != "nothing":
            wide = sizes.Options.of(problem, config, whole=True)
            begin = 0
            for width, row_blocks in sizes.whole_parts(problem, config):
                part = dataclasses.replace(grid, row_blocks=row_blocks)
                each = sizes.row_blocks_each(part, config, multiprocessors(problem.device))
                whole.append((wide._replace(block_k=width), begin, row_blocks, each))
                begin += row_blocks
    return Plan(
        problem.features, grid, layout, shape, opt, tuple(whole), options, compiled, grows, {}
    )


def forget() -> None:
    """Drop all plans, and the kernels that plans share: they depend on this module's constants."""
    _plan.cache_clear()
    _of_any_length.cache_clear()


class Call:
    """One attention call: its tensors as the kernels take them, and how it is launched. ``more``
    are tensors from outside beside the inputs."""

    def __init__(
        self, problem: Problem, inputs: Inputs, config: Config, run: Run, *more: Tensor
    ) -> None:
        self.problem, self.config, self.run = problem, config, run
        self.dtype = sizes.kernel_dtype(problem.dtype)
        self.device = inputs.query.device
        self.inputs = tuple(self.prepared(x) for x in inputs.tensors())
        self.plan = plan = _plan(problem, tuple(config.items()))
        self.grid, self.shape = plan.grid, plan.shape
        if plan.features:
            operands = Inputs(*inputs.tensors(), *map(_operand, inputs.operands()))
            self.shape = self.shape._replace(terms=sizes.Terms.of(problem, operands))
            more = *more, *(t for t in operands.operands() if t is not None)
        self.compiled = plan.compiled_for((*self.inputs, *more))
        self.query, self.key, self.value = map(sizes.Heads.of, self.inputs)

    def empty(self, *shape: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self.device)

    def prepared(self, tensor: Tensor) -> Tensor:
        """``tensor`` with unit stride in head_dim, in a dtype that kernels can compute with."""
        if tensor.dtype != self.dtype:
            tensor = tensor.to(self.dtype)
        _, _, row, inner = tensor.stride()
        unit = inner == 1 or tensor.shape[3] == 1
        return tensor if unit and abs(row) <= LONGEST_STRIDE else tensor.contiguous()

    def are_compiled(self, asked: Iterable[Hashable]) -> bool:
        """Whether :func:`launch` remembers all of these kernels and is what runs them: pointers may
        then be numbers."""
        return self.run is launch and all(map(self.compiled.get, asked))

    def __call__(
        self, kernel: Any, grid: int, flags: Mapping[str, Hashable], **arguments: Any
    ) -> None:
        """Launch ``kernel`` with ``arguments`` and ``flags``: what it is compiled for that differs
        between calls of one plan."""
        options = self.plan.options[kernel.__name__]
        variant = tuple(flags.values())
        self.run(Launch(kernel, grid, {**arguments, **flags}, options, self.compiled, variant))

    def again(
        self, kernel: Any, items: int, flags: Mapping[str, Hashable], **arguments: Any
    ) -> None:
        """Launch ``kernel`` in the way that keeps what is not finite apart, for those of ``items``
        that need it. Hardly ever one does: programs are as many as run at a time."""
        programs = sizes.residents(self.config, kernel.__name__)
        programs *= multiprocessors(self.problem.device)
        self(kernel, min(programs, items), {**flags, "SAFE": True}, **arguments)

    def longest(self) -> sizes.Shape:
        """The shape with the norm of each key head's longest key, where slopes ask for it."""
        terms = self.shape.terms
        if terms is None or not self.plan.opt.local:
            return self.shape
        norms = torch.linalg.vector_norm(self.inputs[1], dim=-1, dtype=torch.float32)
        return self.shape._replace(terms=terms._replace(longest=norms.amax(dim=-1)))

    def some(self, parts: Mapping[str, Tensor], kernel: str) -> Tensor:
        """Where one of ``sizes.SAFE_KERNELS`` says that something is not finite."""
        each = sizes.ALIGNMENT // parts["some"].itemsize
        return parts["some"][sizes.SAFE_KERNELS.index(kernel) * each :]

    def means(self, out_u: Tensor) -> sizes.Heads:
        """The saved means as a tensor with heads; nothing is behind them without a gradient."""
        row = self.problem.head_dim_v
        head = row * self.problem.length_q
        return sizes.Heads(out_u, head * self.problem.heads_q, head, row)

    def threshold(self, t: Tensor, tau: Tensor) -> Tensor:
        """What ``distance`` in ``kernels/score.py`` subtracts."""
        return t if self.plan.opt.relative else tau


def forward(call: Call, counted: dict[str, Tensor] | None = None, saved_bytes: int = -1) -> Forward:
    """Output, thresholds and saved parts, in ``saved_bytes`` if that is positive; ``counted``
    receives ``iterations``, ``support`` and ``marks`` of tiles with support."""
    problem = call.problem
    shape = (problem.batch, problem.heads_q, problem.length_q)
    out = call.empty(*shape, problem.head_dim_v, dtype=call.dtype)
    tau = call.empty(*shape, dtype=torch.float32)
    layout = call.plan.layout
    length = saved_bytes if saved_bytes > 0 else layout.total
    saved = call.empty(length, dtype=torch.uint8)
    parts = layout.split(saved)
    saved[layout.cleared : layout.total].zero_()
    count = counted is not None
    counters = counted or dict.fromkeys(("iterations", "support", "marks"))
    found_output = call.config["whole"] == "outputs"
    solved = {
        "query": call.query,
        "key": call.key,
        "top_out": parts["top"],
        "t_out": parts["t"],
        "tau_out": tau,
        "live": parts["live"],
        "lists": parts["lists"],
        "counts": parts["counts"],
        "poison": parts["poison"],
        "iterations": counters["iterations"],
        "tolerance": tolerance(problem),
        "opt": call.plan.opt,
        "MAX_STEPS": MAX_STEPS,
    }
    weighed = {
        "value": call.value,
        "out": sizes.Heads.of(out),
        "out_u": call.means(parts["out_u"]),
        "spread": parts["spread"],
        "unsafe": call.empty(call.grid.rows, dtype=torch.int8),
        "some": call.some(parts, "output"),
        "support": counters["support"],
        "marks": counters["marks"],
        "shape": call.shape,
        "GRADIENT": problem.needs_grad,
        "MARK": STATS_TILE,
    }
    with on_device(problem.device):
        if not call.plan.whole:
            _solve(call, {"COUNT": count}, parts["taken"], solved)
        for wide, begin, row_blocks, each in call.plan.whole:
            call(
                whole_kernels.whole_rows,
                call.grid.heads * -(-row_blocks // each),
                {"COUNT": count, "wide": wide},
                **solved,
                **weighed,
                begin=begin,
                row_blocks=row_blocks,
                each=each,
                OUTPUT=found_output,
            )
        row_blocks = call.grid.heads * call.grid.row_blocks
        weighed |= {
            "query": call.query,
            "key": call.key,
            "top_in": parts["top"],
            "t_in": call.threshold(parts["t"], tau),
            "lists": parts["lists"],
            "counts": parts["counts"],
            "work_items": row_blocks,
            # Beside two sums, no registers are left for a product that adds up from something: the
            # assembler would wait for each.
            "opt": call.plan.opt._replace(folded=False),
        }
        if not found_output:
            flags = {"COUNT": count, "SAFE": False}
            call(output_kernels.output, row_blocks, flags, **weighed)
        call.again(output_kernels.output, row_blocks, {"COUNT": count}, **weighed)
    if not problem.needs_grad:
        saved = saved.new_empty(0)
    return Forward(out.to(problem.dtype), tau, saved)


def _solve(call: Call, flags: dict[str, bool], taken: Tensor, solved: dict[str, Any]) -> None:
    """Thresholds of rows of any length."""
    block_q, span = int(call.config["block_q"]), int(call.config["span"])
    work_items = call.grid.heads * call.grid.row_blocks
    programs = sizes.residents(call.config, "solve") * multiprocessors(call.problem.device)
    programs = min(programs, work_items)
    chunk, few = _chunk(call)
    # A slice for each program, so that they take memory by the device, not by the length squared.
    each = (solve_kernels.PIECES.value + 1) * chunk if few else -(-call.grid.tiles // span) * span
    call(
        solve_kernels.solve,
        programs,
        flags,
        **solved,
        maxima=call.empty(programs * each * block_q, dtype=torch.float32),
        candidates=call.empty(0 if few else programs * call.grid.tiles, dtype=torch.int32),
        taken=taken,
        shape=call.longest(),
        work_items=work_items,
        CHUNK=chunk,
        FEW=few,
        FOLDS=min(FOLDS, chunk // FEWEST_MAXIMA) if few else 1,
        REUSES=REUSES if few else 0,
        SPAN=span,
        STAGES=int(call.config["solve_stages"]) if call.plan.opt.masked else None,
    )


def _stages(call: Call, kernel: str) -> int | None:
    """Stages of a kernel's loop over tiles, where they must be given: by itself Triton loads ahead
    what products multiply, but not what they are added to."""
    return int(call.config[f"{kernel}_stages"]) if call.plan.opt.folded else None


def _in_window(call: Call, size: int, other: int) -> int | None:
    """How many blocks of ``other`` a block of ``size`` rows or keys meets at most, as a power of
    two, where a window ends on both sides."""
    said = call.problem.scores
    if not call.plan.opt.joined:
        return None
    # Two more for where the first one begins, and for where its span does. What it takes to end
    # with a whole span, of two tiles at most (SPANS), a power of two has room for.
    most = -(-(size + said.left + said.right) // other) + 2
    return max(FEWEST_MAXIMA, 1 << (most - 1).bit_length())


def _chunk(call: Call) -> tuple[int, bool]:
    """Tile maxima of a row that a program holds at a time: all that the row may see, or the most
    that fit; and whether a window leaves so few that the maxima of their pieces fit."""
    block_q, block_k = int(call.config["block_q"]), int(call.config["block_k"])
    every = max(FEWEST_MAXIMA, 1 << (call.grid.tiles - 1).bit_length())
    windowed = _in_window(call, block_q, block_k)
    if windowed and windowed * block_q <= FEW_MAXIMA * int(call.config["solve_warps"]):
        return windowed, True
    return min(every, windowed or every, MAXIMA_CHUNK // block_q), False


def backward(
    call: Call, forward: Forward, grad_out: Tensor, wanted: Collection[str] = ()
) -> Gradients:
    """Gradients of query, key and value, and of the operands that are ``wanted``."""
    problem, plan, grid = call.problem, call.plan, call.grid
    grads = [call.empty(*x.shape, dtype=call.dtype) for x in call.inputs]
    rows = problem.batch, problem.heads_q, problem.length_q
    of_rows = {
        name: call.empty(*rows, dtype=torch.float32)
        for name in sizes.ROW_GRADIENTS
        if name in wanted
    }
    grad_q, grad_k, grad_v = map(sizes.Heads.of, grads)
    grad_out_heads = sizes.Heads.of(call.prepared(grad_out))
    parts = plan.layout.split(forward.saved)
    thresholds = {"top_in": parts["top"], "t_in": call.threshold(parts["t"], forward.tau)}
    spread, scale = parts["spread"], problem.scores.scale
    delta = call.empty(grid.rows, dtype=torch.float32)
    most = max(grid.rows, grid.heads_kv * problem.length_k)
    unsafe = call.empty(most, dtype=torch.int8)
    key_tiles = grid.heads_kv * grid.tiles
    seen = _in_window(call, int(call.config["block_k"]), int(call.config["block_q"]))
    capacity = grid.gqa_group * grid.row_blocks
    row_block_lists = call.empty(key_tiles * capacity, dtype=torch.int32)
    row_block_counts = call.empty(key_tiles * 2, dtype=torch.int32)
    pieces = sizes.most_pieces(grid, multiprocessors(problem.device))
    block_k = int(call.config["block_k"])
    across = sizes.padded(problem.head_dim) + sizes.padded(problem.head_dim_v)
    cuts = call.empty(key_tiles + 1, dtype=torch.int32)
    owners = call.empty(pieces + 1, dtype=torch.int32)
    # What both kernels take that store gradients of keys.
    of_keys = {
        "cuts": cuts,
        "owners": owners,
        "partials": call.empty(pieces * block_k * across, dtype=torch.float32),
        "poison": parts["poison"],
        "grad_k": grad_k,
        "grad_v": grad_v,
        "unsafe": unsafe,
        "some": call.some(parts, "grad_key_value"),
        "shape": call.shape,
        "scale": scale,
        "opt": plan.opt,
        "MOST": pieces,
    }
    every_head = {
        "query": call.query,
        "key": call.key,
        "value": call.value,
        "grad_out": grad_out_heads,
        **thresholds,
        "delta_in": delta,
        "spread_in": spread,
    }
    by_key = {
        **every_head,
        "row_block_lists": row_block_lists,
        "row_block_counts": row_block_counts,
        **of_keys,
        "ROW_PARTS": int(call.config["parts"]),
        "STAGES": _stages(call, "grad_key_value"),
        "key_tiles": key_tiles,
    }
    by_query = {
        "query": call.query,
        "key": call.key,
        "value": call.value,
        "grad_out": grad_out_heads,
        "out_u": call.means(parts["out_u"]),
        "spread_in": spread,
        **thresholds,
        "lists": parts["lists"],
        "counts": parts["counts"],
        "grad_q": grad_q,
        "delta_out": delta,
        "row_grads": sizes.Wanted.parts(of_rows),
        "unsafe": unsafe,
        "some": call.some(parts, "grad_query"),
        "shape": call.shape,
        "scale": scale,
        "work_items": grid.heads * grid.row_blocks,
        "opt": plan.opt,
        "CHUNK": _in_window(call, int(call.config["block_q"]), block_k) or LIST_CHUNK,
        "STAGES": _stages(call, "grad_query"),
    }
    with on_device(problem.device):
        kernel, items = backward_kernels.grad_query, by_query["work_items"]
        flags = {"WANTED": sizes.Wanted.of(wanted)}
        call(kernel, items, {**flags, "SAFE": False}, **by_query)
        call.again(kernel, items, flags, **by_query)
        call(
            backward_kernels.transpose_lists,
            key_tiles,
            {},
            live=parts["live"],
            row_block_lists=row_block_lists,
            row_block_counts=row_block_counts,
            shape=call.shape,
            opt=plan.opt,
            CHUNK=min(LIST_CHUNK, seen or LIST_CHUNK),
        )
        if pieces:
            call(
                backward_kernels.cut_lists,
                1,
                {},
                row_block_counts=row_block_counts,
                cuts=cuts,
                owners=owners,
                key_tiles=key_tiles,
                MOST=pieces,
                SHORTEST=sizes.SHORTEST_PIECE,
                TILES=TILES_CHUNK,
            )
        call(backward_kernels.grad_key_value, pieces + key_tiles, {"SAFE": False}, **by_key)
        if pieces:
            added = pieces * (block_k // ADDED_ROWS)
            t_in = thresholds["t_in"] if plan.opt.scattered else None
            call(backward_kernels.add_pieces, added, {}, t_in=t_in, **of_keys, ROWS=ADDED_ROWS)
        call.again(backward_kernels.grad_key_value, key_tiles, {}, **by_key)
        of_mask = None
        if "attn_mask" in wanted:
            of_mask = _grad_mask(call, every_head, parts)
    query, key, value = (grad.to(problem.dtype) for grad in grads)
    return Gradients(query, key, value, of_mask, **of_rows)


def _grad_mask(call: Call, every_head: dict[str, Any], parts: dict[str, Tensor]) -> Tensor:
    """The gradient of an additive mask."""
    problem, grid = call.problem, call.grid
    mask = problem.operand("attn_mask")
    assert mask is not None
    full = problem.batch, problem.heads_q, problem.length_q, problem.length_k
    shape = [size if spread else 1 for size, spread in zip(full, mask.spread, strict=True)]
    grad = call.empty(*shape, dtype=torch.float32)
    batch, heads, by_row, by_key = shape[0], shape[1], mask.spread[2], mask.spread[3]
    programs = batch * heads * (grid.row_blocks if by_row else 1) * (grid.tiles if by_key else 1)
    call(
        backward_kernels.grad_mask,
        programs,
        {},
        **every_head,
        live=parts["live"],
        poison=parts["poison"],
        grad=sizes.Spread.of(grad),
        sharers=(heads, problem.batch // batch, problem.heads_q // heads),
        shape=call.shape,
        opt=call.plan.opt,
        BY_ROW=by_row,
        BY_KEY=by_key,
    )
    return grad


def tolerance(problem: Problem) -> float:
    """How far ``sum p`` may be above 1 before the last step; at alpha = 1.5, after it.

    Below 1.5 that step leaves an error of the order of its square, far below round-off, since ``p``
    has a slope of zero at the edge of the support; above, it must be small itself. At 1.5 it is
    bounded (``is_near``), and some 20 times less on Gaussian scores.
    """
    if problem.alpha == 1.5:
        return 2.0**-16 if problem.dtype.itemsize == 2 else 2.0**-22
    return 1e-3 if problem.alpha < 1.5 else 2.0**-21


@functools.cache
def multiprocessors(device: torch.device) -> int:
    if sizes.INTERPRETED:
        return 1
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
