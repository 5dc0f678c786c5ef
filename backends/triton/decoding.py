"""The launches of ``kernels/decode.py``, in order. Importing this imports Triton."""

from __future__ import annotations

import functools
from collections.abc import Hashable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from adasplash2.backends.triton import launch, sizes
from adasplash2.backends.triton.kernels import decode as kernels
from adasplash2.backends.triton.launch import Call
from adasplash2.contract import Config, Forward
from adasplash2.problem import Problem

SCAN_CHUNK = 64
"""Maxima of each row of a block that ``decode_scan`` and ``decode_weigh`` hold at a time."""

SOLVE_CHUNK = 256
"""Those that ``decode_solve`` holds, for each of its warps."""

SCORES_CHUNK = 512
"""Scores that a step of a threshold holds, for each of its warps; half as many for two, as rows are
many then."""

SERIAL = 16384
"""Scores of a row whose threshold one program finds alone: they are read in about 2
microseconds, a step of it."""

NARROWED = 2
"""Launches of ``decode_narrow`` where rows may be longer. Each takes the time of an empty launch
where no row is."""

WEIGHING = 2
"""Programs of ``decode_weigh`` that a multiprocessor holds at a time."""

PARTS = 4
"""Programs of ``decode_narrow`` a multiprocessor, where rows are few."""

MOST_PARTS = 64
"""Parts of a row there."""

LAST_ADDS = 16
"""Rows of a block up to which the last of its programs adds the sums of all splits: a launch less.
Of 64 rows, which are added by as many programs, this took longer than all else."""

TOPS_CHUNK = 64
"""Splits whose maxima and bounds ``decode_solve`` holds."""

SPLITS_CHUNK = 16
"""Splits whose sums ``decode_combine`` holds."""

ENTRIES_CHUNK = 8
"""Listed keys whose values ``decode_solve`` holds, for each of its warps."""


class Cut(NamedTuple):
    """How a problem is cut: ``blocks`` of rows that share keys, of all heads; their keys into
    ``splits``, and into others for ``decode_weigh``; rows into ``parts`` for ``decode_narrow``,
    which is launched ``narrowed`` times."""

    blocks: int
    splits: int
    weighed: int
    parts: int
    narrowed: int

    @classmethod
    def of(cls, problem: Problem, config: Config, grid: sizes.Grid) -> Cut:
        multiprocessors = launch.multiprocessors(problem.device)
        each = -(-grid.gqa_group * problem.length_q // int(config["block_q"]))
        blocks = grid.heads_kv * each
        scanned, weighed = (
            sizes.splits_of(blocks, grid.tiles, programs * multiprocessors)
            for programs in (int(config["residents"]), WEIGHING)
        )
        parts = min(MOST_PARTS, max(1, PARTS * multiprocessors // grid.rows))
        return cls(blocks, scanned, weighed, parts, NARROWED if problem.length_k > SERIAL else 0)


class Step(NamedTuple):
    """A launch: what :class:`launch.Launch` has; of its arguments those of its ``own``, and the
    names of all others, which launches share."""

    kernel: Any
    grid: int
    shared: tuple[str, ...]
    own: dict[str, Any]
    options: dict[str, int]
    variant: tuple[bool, ...]


@functools.cache
def _others(kernel: Any, own: tuple[str, ...]) -> tuple[str, ...]:
    """The names of a kernel's arguments but ``own``."""
    return tuple(name for name in kernel.arg_names if name not in own)


class Steps(NamedTuple):
    """The launches of a plan, all that does not change from call to call: the host prepares a call
    for as long as a GPU takes for it. ``given``: arguments by name, for all of them; ``kinds``:
    kernels and variants as :func:`launch.launch` remembers what is compiled of them."""

    pieces: sizes.Pieces
    given: dict[str, Any]
    steps: tuple[Step, ...]
    kinds: tuple[Hashable, ...]

    @classmethod
    def of(cls, call: Call, count: bool) -> Steps:
        """``count``: with what is recorded for :func:`forward`."""
        problem, grid, opt, options = call.problem, call.grid, call.plan.opt, call.plan.options
        cut = Cut.of(problem, call.config, grid)
        rows, scores = grid.rows, grid.tiles * opt.block_k
        segments = scores // opt.segment
        real, whole = torch.float32, torch.int32
        pieces = sizes.Pieces.of(
            {
                "scores": (real, rows * scores),
                "maxima": (real, rows * segments),
                "tops": (real, rows * cut.splits),
                "floors": (real, rows * cut.splits),
                "totals": (real, rows * cut.splits),
                "squares": (real, rows * cut.splits),
                "states": (real, rows * kernels.STATES.value),
                "sums": (real, rows * cut.parts * kernels.SUMS.value if cut.narrowed else 0),
                "partials": (real, rows * cut.weighed * opt.padded_v),
                "masses": (real, rows * cut.weighed),
                "entry_weights": (real, rows * kernels.MOST_LISTED.value),
                "lists": (whole, rows * segments),
                "counts": (whole, rows),
                "arrivals": (whole, rows),
                "kept": (whole, rows * cut.weighed),
                "entry_keys": (whole, rows * kernels.MOST_LISTED.value),
            }
        )
        given = {
            "shape": call.shape._replace(length_k=0, terms=0),
            "length_k": problem.length_k,
            "opt": opt,
            "tolerance": launch.tolerance(problem),
            "MAX_STEPS": launch.MAX_STEPS,
            "MARK": launch.STATS_TILE,
            "support": None,
            "marks": None,
        }

        def step(kernel: Any, grid: int, flags: dict[str, bool], **own: Any) -> Step:
            how, own = options[kernel.__name__], {**own, **flags}
            shared = _others(kernel, tuple(own))
            return Step(kernel, grid, shared, own, how, tuple(flags.values()))

        warps, narrowing = (options[x]["num_warps"] for x in ("decode_solve", "decode_narrow"))
        scan = step(
            kernels.decode_scan,
            cut.blocks * cut.splits,
            {},
            splits=cut.splits,
            CHUNK=SCAN_CHUNK,
            STAGES=int(call.config["stages"]),
        )
        solve = step(
            kernels.decode_solve,
            rows,
            {"COUNT": count},
            splits=cut.splits,
            SPLITS=TOPS_CHUNK,
            CHUNK=SOLVE_CHUNK * warps,
            SEGMENTS=(SCORES_CHUNK if warps > 2 else SCORES_CHUNK // 2) * warps // opt.segment,
            SERIAL=SERIAL // opt.segment,
            ENTRIES=ENTRIES_CHUNK * warps,
        )
        narrow = (
            step(
                kernels.decode_narrow,
                rows * cut.parts,
                {"LAST": number == cut.narrowed - 1},
                parts=cut.parts,
                SEGMENTS=SCORES_CHUNK * narrowing // opt.segment,
                PARTS=MOST_PARTS,
            )
            for number in range(cut.narrowed)
        )
        weigh = step(
            kernels.decode_weigh,
            cut.blocks * cut.weighed,
            {"COUNT": count},
            splits=cut.weighed,
            CHUNK=SCAN_CHUNK,
            LAST_ADDS=opt.block_q <= LAST_ADDS,
        )
        combine = step(
            kernels.decode_combine,
            rows,
            {"COUNT": count},
            splits=cut.weighed,
            SPLITS=SPLITS_CHUNK,
        )
        steps = scan, solve, *narrow, weigh
        if opt.block_q > LAST_ADDS:
            steps = *steps, combine
        return cls(pieces, given, steps, tuple((id(x.kernel), x.variant) for x in steps))


def forward(call: Call, counted: dict[str, Tensor] | None = None) -> Forward:
    """Output and thresholds; ``counted`` as in :func:`launch.forward`.

    Scores take 4 bytes a row and key, their maxima and lists up to an eighth of that. Few scores
    are written where few keys reach a bound.
    """
    problem, count = call.problem, counted is not None
    kept = call.plan.kept
    if count not in kept:
        kept[count] = Steps.of(call, count)
    pieces, constants, steps, kinds = kept[count]
    shape = (problem.batch, problem.heads_q, problem.length_q)
    out = call.empty(*shape, problem.head_dim_v, dtype=call.dtype)
    tau = call.empty(*shape, dtype=torch.float32)
    memory = call.empty(pieces.total, dtype=torch.uint8)
    placed = pieces.addresses if call.are_compiled(kinds) else pieces.tensors
    given = {
        **constants,
        **placed(memory),
        "query": call.query,
        "key": call.key,
        "value": call.value,
        "out": sizes.Heads.of(out),
        "tau": tau,
    }
    if counted is not None:
        given |= {name: counted[name] for name in ("support", "marks")}
    if call.shape.terms is not None:
        # Zeros, since kernels make a tuple of these, which takes no None before Triton 3.7.
        terms = sizes.Terms(*(0 if term is None else term for term in call.shape.terms))
        given["shape"] = constants["shape"]._replace(terms=terms)
    with launch.on_device(problem.device):
        for kernel, grid, shared, own, options, variant in steps:
            arguments = {name: given[name] for name in shared} | own
            call.run(launch.Launch(kernel, grid, arguments, options, call.compiled, variant))
    if counted is not None:
        states = pieces.tensors(memory)["states"].view(-1, kernels.STATES.value)
        counted["iterations"].copy_(states[:, kernels.STEPS.value].view(shape))
    return Forward(out.to(problem.dtype), tau, call.empty(0, dtype=torch.uint8))
