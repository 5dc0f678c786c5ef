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
from adasplash2.contract import Config, Forward, Gradients, Kept
from adasplash2.problem import Inputs, Problem, by_kind

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
"""The most tile maxima that a warp holds beside four maxima of pieces for each: these fit its
registers."""

FOLDS = 2
"""Of a window's few tiles, how many share a place for the maxima of their pieces: it holds the
largest. Where tiles are no more than FEWEST_MAXIMA, each has a place of its own."""

REUSES = 1
"""Newton's steps after the first for which the first list of a window's few tiles serves."""

FEWEST_MAXIMA = 16
"""The fewest tile maxima of a row that a program holds at a time, however few tiles there are."""

LIST_CHUNK = 256
"""Row blocks that the transposition looks at together."""

TILES_CHUNK = 1024
"""Key tiles whose lists are cut together."""

ADDED_ROWS = 16
"""Keys for which a program adds the sums of pieces."""

CACHED_PLANS = 1024
"""Plans that are kept: far more than a model has kinds of calls. What is dropped is made again."""

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
        known = _orders.get(id(self.kernel))
        if known is None:
            order = operator.itemgetter(*self.kernel.arg_names)
            known = _orders[id(self.kernel)] = self.kernel, order
        return known[1](self.arguments)


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


_orders: dict[int, tuple[Any, Callable[[dict[str, Any]], tuple[Any, ...]]]] = {}
"""Kernels by their address, which is theirs as long as they are here, and what puts the arguments
of each in order. By themselves they are not looked up: their hash takes a lock."""


def _without_data(value: Any) -> Any:
    if isinstance(value, tuple) and hasattr(value, "_make"):
        return value._make(map(_without_data, value))
    return MockTensor.wrap_dtype(value.dtype) if isinstance(value, Tensor) else value


def on_device(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on the present device, whatever the tensors'."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


class Plan(NamedTuple):
    """What follows from a problem and a configuration. ``whole``: of each launch of ``whole_rows``
    the options for the width of its tile, the first of its row blocks of a head, how many these
    are, and how many of them a program takes. ``solving``: programs of ``solve``. ``fixed``: by
    kernel, the arguments that no call changes. ``residents``: by kernel, programs that run at a
    time. ``handed_on`` and ``handed_back``: memory for what kernels of a forward and of a backward
    give each other. ``grows``: kernels are those of all lengths of a cache. ``kept``: what
    ``decoding.py`` makes of it, once."""

    features: tuple[str, ...]
    grid: sizes.Grid
    layout: sizes.Saved
    shape: sizes.Shape
    opt: sizes.Options
    whole: tuple[tuple[sizes.Options, int, int, int], ...]
    solving: int
    fixed: dict[str, dict[str, Any]]
    options: dict[str, dict[str, int]]
    residents: dict[str, int]
    handed_on: sizes.Pieces
    handed_back: sizes.Pieces
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


class Decoding(NamedTuple):
    """Of a plan for ``decode.py``, what does not follow from the length of the cache."""

    opt: sizes.Options
    options: dict[str, dict[str, int]]
    compiled: dict[Any, Compiled]


def _decoding(
    problem: Problem, items: tuple[tuple[str, int | str], ...], others: Problem
) -> Decoding:
    """``others``: all of ``problem`` but that length, for what is kept."""
    config = dict(items)
    opt = sizes.Options.of(problem, config)
    # Keys are read once in any case.
    opt = opt._replace(exact=True, relative=True, local=False, folded=False)
    options = {name: sizes.decoding_options(config, name) for name in sizes.DECODE_KERNELS}
    return Decoding(opt, options, {})


_growing = by_kind(CACHED_PLANS)(_decoding)
"""Kept for all that a cache grows to: else Triton would describe all arguments anew with every
token."""


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
    shape = sizes.Shape.of(problem)
    compiled: dict[Any, Compiled] = {}
    solving, fixed = 0, {}
    residents: dict[str, int] = {}
    handed_on = handed_back = sizes.Pieces.of({})
    # What a call may ask beyond brings numbers of its own, and HIP compiles for sizes of memory.
    grows = sizes.is_decoding(problem) and not problem.features and torch.version.hip is None
    if sizes.is_decoding(problem):
        made = _growing if grows else _decoding
        others = dataclasses.replace(problem, length_k=0)  # all that a kind may lack
        opt, options, compiled = made(problem, items, others)
        shape = shape._replace(length_k=None)  # lengths are arguments of their own there
    else:
        opt = sizes.Options.of(problem, config)
        at_once = multiprocessors(problem.device)
        residents = {
            name: sizes.residents(config, name) * at_once for name in ("solve", *sizes.SAFE_KERNELS)
        }
        solving = min(residents["solve"], grid.heads * grid.row_blocks)
        fixed = _fixed(problem, config, grid, opt)
        handed_back = _handed_back(problem, grid, opt, fixed["grad_key_value"]["MOST"])
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
        handed_on = _handed_on(grid, opt, 0 if whole else solving, fixed["solve"])
    return Plan(
        features=problem.features,
        grid=grid,
        layout=layout,
        shape=shape,
        opt=opt,
        whole=tuple(whole),
        solving=solving,
        fixed=fixed,
        options=options,
        residents=residents,
        handed_on=handed_on,
        handed_back=handed_back,
        compiled=compiled,
        grows=grows,
        kept={},
    )


def _fixed(
    problem: Problem, config: Config, grid: sizes.Grid, opt: sizes.Options
) -> dict[str, dict[str, Any]]:
    """``Plan.fixed``."""
    row_blocks, key_tiles = grid.heads * grid.row_blocks, grid.heads_kv * grid.tiles
    seen = _few(problem, config, opt.block_q, opt.block_k)
    seeing = _few(problem, config, opt.block_k, opt.block_q)
    thresholds = {"tolerance": tolerance(problem), "opt": opt, "MAX_STEPS": MAX_STEPS}
    means = {"GRADIENT": problem.needs_grad, "MARK": STATS_TILE}
    scores = {"opt": opt, "scale": problem.scores.scale}
    pieces = sizes.most_pieces(grid, multiprocessors(problem.device))
    # By itself Triton loads ahead what products multiply, but not what they are added to.
    stages = {
        kernel: int(config[f"{kernel}_stages"]) if asked else None
        for kernel, asked in (
            ("solve", opt.masked),
            ("grad_query", opt.folded),
            ("grad_key_value", opt.folded),
        )
    }
    return {
        "solve": {
            **thresholds,
            "work_items": row_blocks,
            "CHUNK": seen or _chunk(config, grid),
            "FEW": seen is not None,
            "FOLDS": min(FOLDS, seen // FEWEST_MAXIMA) if seen else 1,
            "REUSES": REUSES if seen else 0,
            "SPAN": int(config["span"]),
            "STAGES": stages["solve"],
        },
        "whole_rows": {**thresholds, **means, "OUTPUT": config["whole"] == "outputs"},
        "output": {
            **means,
            "work_items": row_blocks,
            # Beside two sums, no registers are left for a product that adds up from something: the
            # assembler would wait for each.
            "opt": opt._replace(folded=False),
        },
        "grad_query": {
            **scores,
            "work_items": row_blocks,
            "CHUNK": seen or LIST_CHUNK,
            "FEW": seen is not None,
            "STAGES": stages["grad_query"],
        },
        "transpose_lists": {"opt": opt, "CHUNK": seeing or LIST_CHUNK},
        "cut_lists": {
            "key_tiles": key_tiles,
            "MOST": pieces,
            "SHORTEST": sizes.SHORTEST_PIECE,
            "TILES": TILES_CHUNK,
        },
        "grad_key_value": {
            **scores,
            "key_tiles": key_tiles,
            "MOST": pieces,
            "ROW_PARTS": int(config["parts"]),
            "STAGES": stages["grad_key_value"],
        },
        "add_pieces": {**scores, "MOST": pieces, "ROWS": ADDED_ROWS},
        "grad_mask": {"opt": opt},
    }


def _handed_on(
    grid: sizes.Grid, opt: sizes.Options, programs: int, fixed: dict[str, Any]
) -> sizes.Pieces:
    """``Plan.handed_on``; ``fixed`` are arguments of ``solve``."""
    few, chunk, span = fixed["FEW"], fixed["CHUNK"], fixed["SPAN"]
    # A slice for each program, so that they take memory by the device, not by the length squared.
    each = solve_kernels.PIECES.value * chunk if few else -(-grid.tiles // span) * span
    return sizes.Pieces.of(
        {
            "maxima": (torch.float32, programs * each * opt.block_q),
            "candidates": (torch.int32, 0 if few else programs * grid.tiles),
            "unsafe": (torch.int8, grid.rows),
        }
    )


def _handed_back(
    problem: Problem, grid: sizes.Grid, opt: sizes.Options, pieces: int
) -> sizes.Pieces:
    """``Plan.handed_back``."""
    key_tiles = grid.heads_kv * grid.tiles
    capacity = grid.gqa_group * grid.row_blocks
    sums = opt.block_k * (opt.padded + opt.padded_v)
    return sizes.Pieces.of(
        {
            "delta": (torch.float32, grid.rows),
            "row_block_lists": (torch.int32, key_tiles * capacity),
            "row_block_counts": (torch.int32, key_tiles * 2),
            "cuts": (torch.int32, key_tiles + 1),
            "owners": (torch.int32, pieces + 1),
            "partials": (torch.float32, pieces * sums),
            "unsafe": (torch.int8, max(grid.rows, grid.heads_kv * problem.length_k)),
        }
    )


def _few(problem: Problem, config: Config, size: int, other: int) -> int | None:
    """How many blocks of ``other`` a block of ``size`` rows or keys meets at most, as a power of
    two, where a window ends on both sides and leaves few; else None.

    Kernels are compiled for this number: they hold what belongs to so many tiles in registers. So
    all widths of a window share a few kernels: with blocks of 64 rows in 16 bits those of 16 and of
    32 tiles, and a third where there are more; in float32, of smaller blocks, those of up to 256.
    """
    if not sizes.is_windowed(problem):
        return None
    said = problem.scores
    # Two more for where the first one begins, and for where its span does. What it takes to end
    # with a whole span, of two tiles at most (SPANS), a power of two has room for.
    most = -(-(size + said.left + said.right) // other) + 2
    number = max(FEWEST_MAXIMA, 1 << (most - 1).bit_length())
    registers = FEW_MAXIMA * int(config["solve_warps"])
    return number if number * int(config["block_q"]) <= registers else None


def _chunk(config: Config, grid: sizes.Grid) -> int:
    """Tile maxima of a row that a program holds at a time, where no window leaves few: all that the
    row may see, or the most that fit."""
    every = max(FEWEST_MAXIMA, 1 << (grid.tiles - 1).bit_length())
    return min(every, MAXIMA_CHUNK // int(config["block_q"]))


def forget() -> None:
    """Drop all plans, and the kernels that plans share: they depend on this module's constants."""
    _plan.cache_clear()
    _growing.cache_clear()


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
        is_dense = inner == 1 or tensor.shape[3] == 1
        return tensor if is_dense and abs(row) <= LONGEST_STRIDE else tensor.contiguous()

    def placing(self, of: Hashable) -> Callable[[sizes.Pieces, Tensor], dict[str, sizes.Place]]:
        """How the kernels of a pass are given pieces of memory: by addresses, once :meth:`ends` has
        been told of that pass, so that they are all compiled for these tensors."""
        known = self.run is launch and of in self.compiled
        return sizes.Pieces.addresses if known else sizes.Pieces.tensors

    def ends(self, of: Hashable) -> None:
        """A pass has launched all of its kernels; ``of`` says which, and all flags of theirs. One
        that is not compiled, but interpreted or kept back by a hook of Triton's, takes tensors."""
        if self.run is launch and None not in self.compiled.values():
            self.compiled[of] = True

    def are_compiled(self, asked: Iterable[Hashable]) -> bool:
        """Whether :func:`launch` remembers all of these kernels and is what runs them: pointers may
        then be numbers."""
        return self.run is launch and all(map(self.compiled.get, asked))

    def __call__(
        self, kernel: Any, grid: int, flags: Mapping[str, Hashable], **arguments: Any
    ) -> None:
        """Launch ``kernel`` with ``arguments``, those of ``Plan.fixed``, and ``flags``: what it is
        compiled for that differs between calls of one plan."""
        plan, name = self.plan, kernel.__name__
        arguments = {**plan.fixed[name], **arguments, **flags}
        variant = tuple(flags.values())
        self.run(Launch(kernel, grid, arguments, plan.options[name], self.compiled, variant))

    def again(
        self, kernel: Any, items: int, flags: Mapping[str, Hashable], **arguments: Any
    ) -> None:
        """Launch ``kernel`` in the way that keeps what is not finite apart, for those of ``items``
        that need it. Hardly ever one does: programs are as many as run at a time."""
        programs = self.plan.residents[kernel.__name__]
        self(kernel, min(programs, items), {**flags, "SAFE": True}, **arguments)

    def longest(self) -> sizes.Shape:
        """The shape with the norm of each key head's longest key, where slopes ask for it."""
        terms = self.shape.terms
        if terms is None or not self.plan.opt.local:
            return self.shape
        norms = torch.linalg.vector_norm(self.inputs[1], dim=-1, dtype=torch.float32)
        return self.shape._replace(terms=terms._replace(longest=norms.amax(dim=-1)))

    def some(self, parts: Mapping[str, sizes.Place], kernel: str) -> sizes.Place:
        """Where one of ``sizes.SAFE_KERNELS`` says that something is not finite."""
        some, begin = parts["some"], sizes.SAFE_KERNELS.index(kernel) * sizes.ALIGNMENT
        return some + begin if isinstance(some, int) else some[begin // some.itemsize :]

    def means(self, out_u: sizes.Place) -> sizes.Heads:
        """The saved means as a tensor with heads; nothing is behind them without a gradient."""
        row = self.problem.head_dim_v
        head = row * self.problem.length_q
        return sizes.Heads(out_u, head * self.problem.heads_q, head, row)

    def threshold(self, t: sizes.Place, tau: Tensor) -> sizes.Place:
        """What ``distance`` in ``kernels/score.py`` subtracts."""
        return t if self.plan.opt.relative else tau


class ForwardState(NamedTuple):
    """What the kernels of a forward write: outputs, thresholds and the parts of ``sizes.Saved``, of
    which ``out_u`` are the means; ``Plan.handed_on``, of which ``unsafe`` marks rows that are not
    finite, and whether there are ``some``; and what is counted, None where nothing is."""

    out: sizes.Heads
    out_u: sizes.Heads
    tau: Tensor
    saved: dict[str, sizes.Place]
    handed_on: dict[str, sizes.Place]
    some: sizes.Place
    counted: Mapping[str, Tensor | None]


def forward(call: Call, counted: dict[str, Tensor] | None = None, saved_bytes: int = -1) -> Forward:
    """Output, thresholds and saved parts, in ``saved_bytes`` if that is positive; ``counted``
    receives ``iterations``, ``support`` and ``marks`` of tiles with support."""
    problem, plan, grid = call.problem, call.plan, call.grid
    shape = (problem.batch, problem.heads_q, problem.length_q)
    layout = plan.layout
    length = saved_bytes if saved_bytes > 0 else layout.total
    out = call.empty(*shape, problem.head_dim_v, dtype=call.dtype)
    saved = layout.check(call.empty(length, dtype=torch.uint8))
    flags = {"COUNT": counted is not None}
    kind = "forward", counted is not None
    placed = call.placing(kind)
    handed_on = call.empty(plan.handed_on.total, dtype=torch.uint8)
    parts = placed(layout.pieces, saved)
    state = ForwardState(
        out=sizes.Heads.of(out),
        out_u=call.means(parts["out_u"]),
        tau=call.empty(*shape, dtype=torch.float32),
        saved=parts,
        handed_on=placed(plan.handed_on, handed_on),
        some=call.some(parts, "output"),
        counted=counted or dict.fromkeys(("iterations", "support", "marks")),
    )
    saved[layout.cleared : layout.total].zero_()
    row_blocks = grid.heads * grid.row_blocks
    with on_device(problem.device):
        if plan.whole:
            rows = _of_whole_rows(call, state)
            for wide, begin, number, each in plan.whole:
                call(
                    whole_kernels.whole_rows,
                    grid.heads * -(-number // each),
                    {**flags, "wide": wide},
                    **rows,
                    begin=begin,
                    row_blocks=number,
                    each=each,
                )
        else:
            call(solve_kernels.solve, plan.solving, flags, **_of_solve(call, state))
        output = _of_output(call, state)
        if call.config["whole"] != "outputs":
            call(output_kernels.output, row_blocks, {**flags, "SAFE": False}, **output)
        call.again(output_kernels.output, row_blocks, flags, **output)
    call.ends(kind)
    if not problem.needs_grad:
        saved = saved.new_empty(0)
    return Forward(out.to(problem.dtype), state.tau, saved)


# What calls give a kernel, beside ``Plan.fixed`` and flags; or what several kernels take alike


def _of_thresholds(call: Call, state: ForwardState) -> dict[str, Any]:
    """What ``solve`` and ``whole_rows`` find thresholds from, and write."""
    saved = state.saved
    return {
        "query": call.query,
        "key": call.key,
        "top_out": saved["top"],
        "t_out": saved["t"],
        "tau_out": state.tau,
        "live": saved["live"],
        "lists": saved["lists"],
        "counts": saved["counts"],
        "poison": saved["poison"],
        "iterations": state.counted["iterations"],
    }


def _of_means(call: Call, state: ForwardState) -> dict[str, Any]:
    """What ``output`` and ``whole_rows`` make outputs from beside thresholds, and write."""
    return {
        "value": call.value,
        "out": state.out,
        "out_u": state.out_u,
        "spread": state.saved["spread"],
        "unsafe": state.handed_on["unsafe"],
        "some": state.some,
        "support": state.counted["support"],
        "marks": state.counted["marks"],
        "shape": call.shape,
    }


def _of_solve(call: Call, state: ForwardState) -> dict[str, Any]:
    return {
        **_of_thresholds(call, state),
        "maxima": state.handed_on["maxima"],
        "candidates": state.handed_on["candidates"],
        "taken": state.saved["taken"],
        "shape": call.longest(),
    }


def _of_whole_rows(call: Call, state: ForwardState) -> dict[str, Any]:
    """But for the rows, which each launch has of its own."""
    return _of_thresholds(call, state) | _of_means(call, state)


def _of_output(call: Call, state: ForwardState) -> dict[str, Any]:
    saved = state.saved
    return {
        **_of_means(call, state),
        "query": call.query,
        "key": call.key,
        "top_in": saved["top"],
        "t_in": call.threshold(saved["t"], state.tau),
        "lists": saved["lists"],
        "counts": saved["counts"],
    }


class BackwardState(NamedTuple):
    """What the kernels of a backward share beside the inputs: what they read of a forward and of
    the gradient of its output, and what they hand on to each other or write."""

    saved: dict[str, sizes.Place]
    t_in: sizes.Place
    grad_out: sizes.Heads
    grad_q: sizes.Heads
    grad_k: sizes.Heads
    grad_v: sizes.Heads
    pieces: int
    delta: sizes.Place
    row_block_lists: sizes.Place
    row_block_counts: sizes.Place
    cuts: sizes.Place
    owners: sizes.Place
    partials: sizes.Place
    unsafe: sizes.Place


def backward(call: Call, kept: Kept, grad_out: Tensor, wanted: Collection[str] = ()) -> Gradients:
    """Gradients of query, key and value, and of the operands that are ``wanted``."""
    problem, plan, grid = call.problem, call.plan, call.grid
    grads = [call.empty(*x.shape, dtype=call.dtype) for x in call.inputs]
    rows = problem.batch, problem.heads_q, problem.length_q
    of_rows = {
        name: call.empty(*rows, dtype=torch.float32)
        for name in sizes.ROW_GRADIENTS
        if name in wanted
    }
    kind = "backward", tuple(sorted(wanted))
    handed_back = call.empty(plan.handed_back.total, dtype=torch.uint8)
    placed = call.placing(kind)
    state = _backward_state(call, kept, call.prepared(grad_out), grads, handed_back, placed)
    row_blocks, key_tiles = grid.heads * grid.row_blocks, grid.heads_kv * grid.tiles
    flags = {"WANTED": sizes.Wanted.of(wanted)}
    of_mask = None
    with on_device(problem.device):
        query = _of_grad_query(call, state, of_rows)
        call(backward_kernels.grad_query, row_blocks, {**flags, "SAFE": False}, **query)
        call.again(backward_kernels.grad_query, row_blocks, flags, **query)
        call(backward_kernels.transpose_lists, key_tiles, {}, **_of_transpose_lists(call, state))
        if state.pieces:
            call(backward_kernels.cut_lists, 1, {}, **_of_cut_lists(state))
        key = _of_grad_key_value(call, state)
        programs = state.pieces + key_tiles
        call(backward_kernels.grad_key_value, programs, {"SAFE": False}, **key)
        if state.pieces:
            programs = state.pieces * (plan.opt.block_k // ADDED_ROWS)
            call(backward_kernels.add_pieces, programs, {}, **_of_add_pieces(call, state))
        call.again(backward_kernels.grad_key_value, key_tiles, {}, **key)
        if "attn_mask" in wanted:
            of_mask, programs, mask = _of_grad_mask(call, state)
            call(backward_kernels.grad_mask, programs, {}, **mask)
    call.ends(kind)
    if call.dtype != problem.dtype:
        grads = [grad.to(problem.dtype) for grad in grads]
    of_query, of_key, of_value = grads
    return Gradients(of_query, of_key, of_value, of_mask, **of_rows)


def _backward_state(
    call: Call,
    kept: Kept,
    grad_out: Tensor,
    grads: Sequence[Tensor],
    handed_back: Tensor,
    placed: Callable[[sizes.Pieces, Tensor], dict[str, sizes.Place]],
) -> BackwardState:
    """``handed_back``: memory for what the kernels hand on to each other."""
    plan = call.plan
    saved = placed(plan.layout.pieces, plan.layout.check(kept.saved))
    grad_q, grad_k, grad_v = map(sizes.Heads.of, grads)
    return BackwardState(
        saved=saved,
        t_in=call.threshold(saved["t"], kept.tau),
        grad_out=sizes.Heads.of(grad_out),
        grad_q=grad_q,
        grad_k=grad_k,
        grad_v=grad_v,
        pieces=plan.fixed["grad_key_value"]["MOST"],
        **placed(plan.handed_back, handed_back),
    )


def _of_scores(call: Call, state: BackwardState) -> dict[str, Any]:
    """What ``grad_query``, ``grad_key_value`` and ``grad_mask`` make ``ds`` from, but ``delta``."""
    return {
        "query": call.query,
        "key": call.key,
        "value": call.value,
        "grad_out": state.grad_out,
        "top_in": state.saved["top"],
        "t_in": state.t_in,
        "spread_in": state.saved["spread"],
        "shape": call.shape,
    }


def _of_keys(call: Call, state: BackwardState) -> dict[str, Any]:
    """What ``grad_key_value`` and ``add_pieces`` store gradients of keys by."""
    return {
        "cuts": state.cuts,
        "owners": state.owners,
        "partials": state.partials,
        "poison": state.saved["poison"],
        "grad_k": state.grad_k,
        "grad_v": state.grad_v,
        "unsafe": state.unsafe,
        "some": call.some(state.saved, "grad_key_value"),
    }


def _of_grad_query(
    call: Call, state: BackwardState, of_rows: Mapping[str, Tensor]
) -> dict[str, Any]:
    saved = state.saved
    return {
        **_of_scores(call, state),
        "out_u": call.means(saved["out_u"]),
        "lists": saved["lists"],
        "counts": saved["counts"],
        "grad_q": state.grad_q,
        "delta_out": state.delta,
        "row_grads": sizes.Wanted.parts(of_rows),
        "unsafe": state.unsafe,
        "some": call.some(saved, "grad_query"),
    }


def _of_transpose_lists(call: Call, state: BackwardState) -> dict[str, Any]:
    return {
        "live": state.saved["live"],
        "row_block_lists": state.row_block_lists,
        "row_block_counts": state.row_block_counts,
        "shape": call.shape,
    }


def _of_cut_lists(state: BackwardState) -> dict[str, Any]:
    return {
        "row_block_counts": state.row_block_counts,
        "cuts": state.cuts,
        "owners": state.owners,
    }


def _of_grad_key_value(call: Call, state: BackwardState) -> dict[str, Any]:
    return {
        **_of_scores(call, state),
        **_of_keys(call, state),
        "delta_in": state.delta,
        "row_block_lists": state.row_block_lists,
        "row_block_counts": state.row_block_counts,
    }


def _of_add_pieces(call: Call, state: BackwardState) -> dict[str, Any]:
    t_in = state.t_in if call.plan.opt.scattered else None
    return {**_of_keys(call, state), "t_in": t_in, "shape": call.shape}


def _of_grad_mask(call: Call, state: BackwardState) -> tuple[Tensor, int, dict[str, Any]]:
    """The gradient of an additive mask, how many programs make it, and from what."""
    problem, grid = call.problem, call.grid
    mask = problem.operand("attn_mask")
    assert mask is not None
    full = problem.batch, problem.heads_q, problem.length_q, problem.length_k
    shape = [size if spread else 1 for size, spread in zip(full, mask.spread, strict=True)]
    grad = call.empty(*shape, dtype=torch.float32)
    batch, heads, by_row, by_key = shape[0], shape[1], mask.spread[2], mask.spread[3]
    programs = batch * heads * (grid.row_blocks if by_row else 1) * (grid.tiles if by_key else 1)
    arguments = {
        **_of_scores(call, state),
        "delta_in": state.delta,
        "live": state.saved["live"],
        "poison": state.saved["poison"],
        "grad": sizes.Spread.of(grad),
        "sharers": (heads, problem.batch // batch, problem.heads_q // heads),
        "BY_ROW": by_row,
        "BY_KEY": by_key,
    }
    return grad, programs, arguments


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
