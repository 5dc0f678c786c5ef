"""The launches of ``kernels/decode.py``, in order. Importing this imports Triton."""

from __future__ import annotations

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


def _pieces(call: Call, lengths: dict[str, int], dtype: torch.dtype) -> dict[str, Tensor]:
    """Memory by name, of one allocation, aligned as kernels are compiled for."""
    unit = sizes.ALIGNMENT // dtype.itemsize
    whole = [-(-length // unit) * unit for length in lengths.values()]
    return dict(zip(lengths, call.empty(sum(whole), dtype=dtype).split(whole), strict=True))


def forward(call: Call, counted: dict[str, Tensor] | None = None) -> Forward:
    """Output and thresholds; ``counted`` as in :func:`launch.forward`.

    Scores take 4 bytes a row and key, their maxima and lists up to an eighth of that. Few scores
    are written where few keys reach a bound.
    """
    problem, grid, opt = call.problem, call.grid, call.plan.opt
    cut = Cut.of(problem, call.config, grid)
    rows, tiles = grid.rows, grid.tiles
    groups = tiles * (opt.block_k // opt.group)
    shape = (problem.batch, problem.heads_q, problem.length_q)
    out = call.empty(*shape, problem.head_dim_v, dtype=call.dtype)
    tau = call.empty(*shape, dtype=torch.float32)
    floats = _pieces(
        call,
        {
            "scores": rows * tiles * opt.block_k,
            "maxima": rows * groups,
            "tops": rows * cut.splits,
            "floors": rows * cut.splits,
            "states": rows * kernels.STATES.value,
            "sums": rows * cut.parts * kernels.SUMS.value if cut.narrowed else 0,
            "partials": rows * cut.weighed * opt.padded_v,
            "masses": rows * cut.weighed,
            "entry_weights": rows * kernels.MOST_LISTED.value,
        },
        torch.float32,
    )
    integers = _pieces(
        call,
        {
            "lists": rows * groups,
            "counts": rows,
            "arrivals": rows,
            "kept": rows * cut.weighed,
            "entry_keys": rows * kernels.MOST_LISTED.value,
        },
        torch.int32,
    )
    count = counted is not None
    counters = counted or dict.fromkeys(("support", "marks"))

    # Zeros, since kernels make a tuple of these, which takes no None before Triton 3.7.
    terms = tuple(0 if term is None else term for term in call.shape.terms or ())
    asked = call.shape._replace(length_k=0, terms=sizes.Terms(*terms) if terms else 0)

    def run(kernel: Any, grid: int, flags: dict[str, bool], **more: Any) -> None:
        given = {"shape": asked, "length_k": problem.length_k, "opt": opt, **more}
        scratch = {
            name: piece for name, piece in (floats | integers).items() if name in kernel.arg_names
        }
        call(kernel, grid, flags, **given, **scratch)

    solving = {"tau": tau, "tolerance": launch.tolerance(problem), "MAX_STEPS": launch.MAX_STEPS}
    of_values = {"value": call.value, "marks": counters["marks"], "MARK": launch.STATS_TILE}
    of_rows = {"out": sizes.Heads.of(out), "support": counters["support"]}
    options = call.plan.options
    warps, narrowing = (options[name]["num_warps"] for name in ("decode_solve", "decode_narrow"))
    with launch.on_device(problem.device):
        run(
            kernels.decode_scan,
            cut.blocks * cut.splits,
            {},
            query=call.query,
            key=call.key,
            splits=cut.splits,
            CHUNK=SCAN_CHUNK,
            STAGES=int(call.config["stages"]),
        )
        run(
            kernels.decode_solve,
            rows,
            {"COUNT": count},
            splits=cut.splits,
            **solving,
            **of_values,
            **of_rows,
            SPLITS=TOPS_CHUNK,
            CHUNK=SOLVE_CHUNK * warps,
            GROUPS=(SCORES_CHUNK if warps > 2 else SCORES_CHUNK // 2) * warps // opt.group,
            SERIAL=SERIAL // opt.group,
            ENTRIES=ENTRIES_CHUNK * warps,
        )
        for step in range(cut.narrowed):
            run(
                kernels.decode_narrow,
                rows * cut.parts,
                {"LAST": step == cut.narrowed - 1},
                parts=cut.parts,
                **solving,
                GROUPS=SCORES_CHUNK * narrowing // opt.group,
                PARTS=MOST_PARTS,
            )
        run(
            kernels.decode_weigh,
            cut.blocks * cut.weighed,
            {"COUNT": count},
            splits=cut.weighed,
            **of_values,
            CHUNK=SCAN_CHUNK,
        )
        run(
            kernels.decode_combine,
            rows,
            {"COUNT": count},
            splits=cut.weighed,
            **of_rows,
            SPLITS=SPLITS_CHUNK,
        )
    if counted is not None:
        states = floats["states"][: rows * kernels.STATES.value].view(rows, -1)
        counted["iterations"].copy_(states[:, kernels.STEPS.value].view(shape))
    return Forward(out.to(problem.dtype), tau, call.empty(0, dtype=torch.uint8))
