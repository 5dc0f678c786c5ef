"""Block sizes, buffer layouts and what follows from them. Nothing here imports Triton."""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from adasplash2.contract import Config
from adasplash2.problem import Inputs, Problem, RowProblem

INTERPRETED = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")
"""Whether the kernels run in Triton's interpreter, on CPU tensors."""

ALIGNMENT = 16
"""Bytes: Triton compiles a faster variant for pointers that are multiples of it."""

LIST_KERNELS = ("transpose_lists", "cut_lists", "add_pieces")
"""Names of the kernels of ``kernels/backward.py`` without matrix products."""

KERNELS = (
    *("solve", "whole_rows", "output", "grad_query", "grad_key_value", "grad_mask"),
    *LIST_KERNELS,
)
"""Names of the kernels of attention, in ``kernels/``."""

SAFE_KERNELS = "output", "grad_query", "grad_key_value"
"""Names of the kernels that are launched twice: again for what came out not finite."""

DECODE_KERNELS = "decode_scan", "decode_solve", "decode_narrow", "decode_weigh", "decode_combine"
"""Names of the kernels that run instead where :func:`is_decoding`, in ``kernels/decode.py``."""

MOST_DECODED = 16
"""The most queries of a head for :func:`is_decoding`: as many as ``problem.FEW``, and as the CUDA
backend's."""

FEWEST_DECODED = 256
"""The fewest keys for :func:`is_decoding`, as in the CUDA backend: fewer are not worth the
launches."""

DECODED_ROWS = 64
"""The most rows that share keys for which a program reads each key once."""

DECODED_TILES = ((64, 3), (64, 4), (128, 2), (128, 3), (32, 4), (32, 3), (32, 2), (16, 2))
"""Keys of a tile, and stages of the loop over those, the best first; a tuner is offered
DECODED_ALTERNATIVES that fit."""

DECODED_ALTERNATIVES = 4

DECODED_REGISTERS = 128
"""Registers of a thread of ``decode_scan``, as a limit: without one, nobody knows before it is
compiled how many programs run at a time. Products in float32 take twice as many."""

DECODED_SEGMENT = 16
"""Keys of a tile whose scores of a row are written, or left out, together, where more than
FULL_WIDTH rows share keys; where they are fewer, all of a tile: what 64 rows write of scores may be
as much as what is read of keys. Of Gaussian rows (c = 1, 131,072 keys in 33 splits) 38 % are
written so, simulated, by tiles of 64 keys 73 %."""

SOLVE_REGISTERS = 128
"""Of a thread of ``decode_solve`` where rows are many: nothing is spilled."""

FEW_ROWS = 256
"""For up to so many rows, eight warps find the threshold of each: all multiprocessors are busy."""

MANY_ROWS = 2048
"""From so many rows on, two warps do: many rows are at work at a time then, and none waits for
another (an H100, 8,192 rows of 8,192 keys: 272 microseconds instead of 380, all kernels)."""

FEWEST_TILES = 4
"""The fewest tiles of a split of the keys."""

MANY_WAVES = 8
"""Where more than so many programs to a block of rows run at a time, splits fill these once. Else a
short last wave would cost much, and of up to so many splits those are chosen that fill it best."""

MAX_STAGES = 3
"""The most stages of a loop: with three, a tile is loaded two iterations ahead of its products. A
fourth gained nothing on an H200."""

MIN_STAGES = 2
"""The fewest: with one, no load overlaps a product."""

REGISTERS = 168
"""Registers of a thread where :attr:`Limits.wgmma` and ``head_dim`` is up to 64: three blocks of
four warps then fit a multiprocessor, not two, with next to nothing spilled. On an H200 ``solve``
takes 7 to 12 % less time. The sums of ``grad_key_value`` do not fit."""

WINDOW_REGISTERS = 128
"""Registers of a thread of ``grad_query`` there under windows, whose lists are short: four blocks
of a multiprocessor, which take turns, hide more waiting than tiles do that three ask for further
ahead. On an H200 0.38 ms for 0.40, of 1,024 in 65,536."""

SHORTEST_PIECE = 8
"""The fewest row blocks of a piece of a key tile's list: its sums are stored and read again."""

PIECES = 4
"""The most pieces for each multiprocessor that lists of key tiles are cut into. On an H200 a step
over a real layer whose rows keep the first key takes 0.35 ms, without pieces 0.69; over Gaussian q,
k, v of 16 heads and 4,096 positions it takes 0.755 and 0.747."""

MANY_LISTS = 16
"""Lists of key tiles to a multiprocessor from which on a long one is not cut: the others take as
long as it does."""

REGISTER_FILE = 65536
"""Registers of a multiprocessor."""

RESERVED = 1024
"""Bytes of shared memory that a multiprocessor has beside what one block may ask for, and that
every block takes beside its own."""

SPANS = (1, 2)
"""Tiles whose scores the scan computes at a time: more make wider products and fewer stores. On an
H200 two are up to 3 % faster with head_dim 64, and 2 to 5 % slower with 128."""

MASK_ITEMSIZE = 4
"""Bytes of shared memory for each entry of a mask's tile, through which threads hand on what they
have loaded."""

BLOCKS = ((64, 64), (128, 128), (128, 64), (64, 32), (32, 32), (32, 16), (16, 16))
"""``block_q`` and ``block_k``, the best first. At 16,384 positions on an H200 a step with 64 x 64
took 8.4 ms where rows keep 28 keys and 4.7 where they keep 2, with 128 x 128 8.5 and 7.4; at
head_dim 128 14.2 (28 keys) and 10.6 (4), with 128 x 128 13.7 and 12.5."""

LONGEST_WHOLE = 512
"""The most keys for which the scores of 64 rows fit the registers of eight warps. Compiled for
compute capability 9.0 with head_dim 64, none of them are spilled; with 32 rows of 1,024 keys 169
registers are."""

LONGEST_WHOLE_OUTPUT = 128
"""The most keys of whole rows where the same kernel finds outputs. On an H100 a forward of 128 keys
takes 0.12 ms so and 0.14 with thresholds alone, one of 256 keys 0.19 and 0.17: the warps of a
product that another follows get rows each, not keys, and 64 rows are enough for four."""

NARROWED = 512
"""From so many keys on, row blocks of whole rows that see no key of the second half are launched
apart."""

SEEN_WITH_MASKS = 128
"""The most keys for which whole rows with masks and slopes have passed all tests on an H100."""

MAX_ALTERNATIVES = 3
"""Pairs of ``BLOCKS`` that a tuner is offered."""

ACCUMULATORS = 128 * 128
"""float32 sums of a block that registers hold beside its scores."""

SUM_ITEMSIZE = 4
"""Bytes of a sum, which threads hand on through shared memory before they store it."""

FEW_SUMS = 64 * 128
"""float32 sums that four warps hold; more take eight."""

SCORES = 64 * 128
"""Scores of whole rows that four warps hold; more take eight. Compiled by Triton 3.6 for four,
those of 256 keys had the maxima of their tiles mixed up on an H100, and thus wrong lists."""

FLOAT32_PRODUCTS = 32 * 32 * 128
"""Multiplications of a block in float32, which no tensor core does: larger ones take minutes to
compile."""

FULL_WIDTH = 16
"""Least width that a matrix product takes. In narrower heads one rounding of ``u`` and ``ds`` to 16
bits is too much: emulated on 260 Gaussian problems each, it made a gradient err by up to 3.9 times
what the tests allow at head_dim 1, 1.5 times at 3 and 1.0 at 8, but 0.8 at 16 and above."""


MOST_DEGREE = 10
"""The highest power that is made of products: above, their rounding would show, and a general power
is as fast."""


NEARLY_WHOLE = 1e-6
"""How far an exponent may be from a whole number that is taken for it: more than alphas such as 1.1
leave to rounding, 1e-14. It moves ``p = x^r`` by ``1e-6 |log x|`` of it at most."""


def kernel_dtype(dtype: torch.dtype) -> torch.dtype:
    """What tensors are handed to the kernels as: the interpreter cannot compute in bfloat16."""
    return torch.float32 if INTERPRETED and dtype == torch.bfloat16 else dtype


class Heads(NamedTuple):
    """A ``(batch, heads, length, head_dim)`` tensor with unit stride in head_dim, and its other
    strides, as kernels take it."""

    base: Tensor
    batch: int
    head: int
    row: int

    @classmethod
    def of(cls, tensor: Tensor) -> Heads:
        return cls(tensor, *tensor.stride()[:3])


class Spread(NamedTuple):
    """An operand and its strides by batch, head, row and key; 0 where one holds for all."""

    base: Tensor
    batch: int = 0
    head: int = 0
    row: int = 0
    key: int = 0

    @classmethod
    def of(cls, tensor: Tensor | None) -> Spread | None:
        if tensor is None:
            return None
        pairs = zip(tensor.shape, tensor.stride(), strict=True)
        return cls(tensor, *(0 if size == 1 else stride for size, stride in pairs))


class Ranges(NamedTuple):
    """``ranges`` and their strides by what they say, by batch and by row."""

    base: Tensor
    part: int
    batch: int
    row: int

    @classmethod
    def of(cls, tensor: Tensor | None) -> Ranges | None:
        if tensor is None:
            return None
        part, batch, row = tensor.stride()
        return cls(tensor, part, 0 if tensor.shape[1] == 1 else batch, row)


class Pages(NamedTuple):
    """A ``block_table``, its strides by sequence and by page, and pages there are."""

    table: Tensor
    batch: int
    column: int
    number: int

    @classmethod
    def of(cls, operands: Inputs) -> Pages | None:
        table, number = operands.block_table, operands.key.shape[0]
        if table is None:
            return None
        batch, column = table.stride()
        return cls(table, batch, column, number)


def as_odd(number: int) -> int:
    """A number of a tuple in a tuple, as ``from_odd`` in ``kernels/score.py`` takes it: odd and
    above 1. Triton compiles a kernel of its own for multiples of 16, and one for 1, whose value it
    may forget in loops before 3.7."""
    return 2 * number + 3


class Terms(NamedTuple):
    """What a call asks beyond plain and causal attention, as kernels take it; None where it is not
    asked.

    ``left`` and ``right``: of windows, by :func:`as_odd`. ``scale`` and ``softcap``: of the
    problem. ``dropped``: words below it are dropped, less 2^31; ``kept``: what the others are
    multiplied by. ``longest``: of each key head the longest key's norm. ``sharers``: sequences that
    share a mask. The others are operands.
    """

    left: int | None = None
    right: int | None = None
    scale: float | None = None
    softcap: float | None = None
    dropped: int | None = None
    kept: float | None = None
    longest: Tensor | None = None
    sharers: int | None = None
    mask: Spread | None = None
    slopes: Spread | None = None
    sinks: Spread | None = None
    scales: Spread | None = None
    alphas: Spread | None = None
    ranges: Ranges | None = None
    seed: Spread | None = None
    pages: Pages | None = None

    @classmethod
    def of(cls, problem: Problem, operands: Inputs) -> Terms:
        """``operands`` in dtypes that kernels take."""
        said = problem.scores
        farthest = problem.length_q + problem.length_k  # more would leave 32 bits
        return cls(
            left=None if said.left < 0 else as_odd(min(said.left, farthest)),
            right=None if said.is_causal or said.right < 0 else as_odd(min(said.right, farthest)),
            scale=said.scale if is_scored(problem) else None,
            softcap=said.softcap or None,
            dropped=int(said.dropout_p * 2**32) - 2**31 if said.dropout_p else None,
            kept=1.0 / (1.0 - said.dropout_p) if said.dropout_p else None,
            sharers=problem.batch if is_shared(problem) else None,
            mask=Spread.of(operands.attn_mask),
            slopes=Spread.of(operands.alibi_slopes),
            sinks=Spread.of(operands.sinks),
            scales=Spread.of(operands.scales),
            alphas=Spread.of(operands.alphas),
            ranges=Ranges.of(operands.ranges),
            seed=Spread.of(operands.dropout_seed),
            pages=Pages.of(operands),
        )


class Shape(NamedTuple):
    """What kernels read of a problem at run time. ``c`` lacks a factor that is an operand's: see
    ``kernels/score.py``."""

    heads_q: int
    gqa_group: int
    length_q: int
    length_k: int
    c: float
    r: float
    terms: Terms | None = None

    @classmethod
    def of(cls, problem: Problem) -> Shape:
        factor = 1.0 if problem.operand("alphas") else problem.alpha - 1.0
        if not is_scored(problem):
            factor *= abs(problem.scores.scale)
        return cls(
            heads_q=problem.heads_q,
            gqa_group=problem.gqa_group,
            length_q=problem.length_q,
            length_k=problem.length_k,
            c=factor if factor > 0.0 else 1.0,
            r=1.0 / (problem.alpha - 1.0),
        )


class Wanted(NamedTuple):
    """Which gradients of operands ``grad_query`` finds parts of; as its flag and, with tensors, as
    what it writes. Fields but ``some`` are names of operands."""

    alibi_slopes: Any = None
    sinks: Any = None
    scales: Any = None
    alphas: Any = None
    some: bool | None = None

    @classmethod
    def of(cls, names: Collection[str]) -> Wanted:
        asked = [name in names for name in ROW_GRADIENTS]
        return cls._make((*asked, any(asked)))

    @classmethod
    def parts(cls, tensors: Mapping[str, Tensor]) -> Wanted | None:
        """Where ``grad_query`` writes them; None where none is wanted."""
        return cls._make((*map(tensors.get, ROW_GRADIENTS), None)) if tensors else None


ROW_GRADIENTS = Wanted._fields[:-1]
"""Operands of whose gradient each row has a part, and these kernels find it."""


class Options(NamedTuple):
    """What kernels are compiled for. ``sign`` is that of the scale; ``alpha`` is 0 where it has no
    closed form; ``relative`` asks for scores relative to their row's maximum, which keep their
    digits also where they are large, ``exact`` for all of float32's digits beside that; ``steep``:
    see :func:`is_steep`; ``shares``: see :func:`keeps_shares`; ``shallow``: see
    :func:`is_shallow`; ``degree``: see :func:`degree_of`; ``halved``: see :func:`is_halved`.

    The others say what is asked beyond that: ``left`` and ``right``, parts of :class:`Terms`;
    ``shifted``, that the last row's place is the last key; ``lower`` and ``upper``, that
    something limits the keys on this side; ``hides``, a mask of booleans; ``adds``, one that is
    added; ``masked``, either; ``slopes``, that ``alibi`` is by slopes of rows, not of heads;
    ``shared``: see :func:`is_shared`; ``scored``: see
    :func:`is_scored`; ``folded``: see :func:`is_folded`; ``biased``: something is added to
    scores; ``joined``: a window ends on both sides, so that many of the tiles that a row block
    sees are edges, and share a loop with the others; ``even``: no tile reaches beyond the last
    row or key there, so that loops need not ask; ``grouped``: several query heads share a key
    head; ``local``: slopes keep far keys out of the support; ``scattered``: a row may see other
    keys than leading ones; ``page_size``: keys of a page, 0 where keys and values do not lie in
    such; ``guesses``: the first step is from where Gaussian rows of the same mean and deviation
    have their threshold (an H100, 1,024 flat keys: two steps for three, a fifth of the time);
    ``rough``: the last step is that of ``output``, which finds what it would from the sums that it
    divides by; ``overlaps``: see :class:`Limits`; ``segment``: see DECODED_SEGMENT."""

    block_q: int
    block_k: int
    head_dim: int
    padded: int
    head_dim_v: int
    padded_v: int
    causal: bool
    sign: int
    alpha: float
    relative: bool
    exact: bool
    steep: bool
    shares: bool
    shallow: bool
    degree: int
    halved: bool
    left: bool
    right: bool
    shifted: bool
    ranges: bool
    lower: bool
    upper: bool
    joined: bool
    even: bool
    grouped: bool
    hides: bool
    adds: bool
    masked: bool
    shared: bool
    softcap: bool
    alibi: bool
    slopes: bool
    sinks: bool
    scales: bool
    alphas: bool
    dropout: bool
    scored: bool
    folded: bool
    biased: bool
    local: bool
    scattered: bool
    page_size: int
    guesses: bool
    rough: bool
    overlaps: bool
    segment: int

    @classmethod
    def of(cls, problem: Problem, config: Config, whole: bool = False) -> Options:
        """Where ``whole``, a tile is all keys."""
        said, alpha = problem.scores, compiled_alpha(problem.alpha)
        given = {operand.name for operand in problem.operands}
        mask, alphas = problem.operand("attn_mask"), "alphas" in given
        ranges, alibi = "ranges" in given, problem.operand("alibi_slopes")
        scored = is_scored(problem)
        block_k = whole_width(problem, config) if whole else int(config["block_k"])
        if alphas:
            alpha = 0.0
        joined = is_windowed(problem)
        hides = mask is not None and mask.dtype == torch.bool
        exact = problem.dtype == torch.float32 or alpha == 0.0
        return cls(
            block_q=int(config["block_q"]),
            block_k=block_k,
            head_dim=problem.head_dim,
            padded=padded(problem.head_dim),
            head_dim_v=problem.head_dim_v,
            padded_v=padded(problem.head_dim_v),
            causal=said.is_causal,
            sign=1 if scored else (said.scale > 0.0) - (said.scale < 0.0),
            alpha=alpha,
            relative=exact or scored,
            exact=exact,
            steep=is_steep(problem.alpha),
            shares=keeps_shares(problem),
            shallow=is_shallow(problem.alpha),
            degree=0 if alphas else degree_of(problem.alpha),
            halved=is_halved(problem),
            left=said.left >= 0,
            right=said.right >= 0 and not said.is_causal,
            shifted=said.bottom_right,
            ranges=ranges,
            lower=ranges or said.left >= 0,
            upper=ranges or said.right >= 0,
            joined=joined,
            even=joined
            and problem.length_q % int(config["block_q"]) == 0
            and problem.length_k % (block_k * int(config.get("span", 1))) == 0,
            grouped=problem.gqa_group > 1,
            hides=hides,
            adds=mask is not None and not hides,
            masked=mask is not None,
            shared=is_shared(problem),
            softcap=said.softcap != 0.0,
            alibi=alibi is not None,
            slopes=alibi is not None and alibi.spread[2:] == (True,),
            sinks="sinks" in given,
            scales="scales" in given,
            alphas=alphas,
            dropout=said.dropout_p != 0.0,
            scored=scored,
            folded=is_folded(problem) and not whole,
            biased=mask is not None or alibi is not None,
            # Norms of all pages would cost.
            local=alibi is not None and has_only(problem, BOUNDED) and not problem.page_size,
            scattered=is_scattered(problem),
            page_size=problem.page_size,
            guesses=alpha == 1.5 and mask is None and alibi is None,
            rough=alpha == 1.5
            and problem.dtype == torch.bfloat16
            and not scored
            and joined
            and config.get("whole") == "nothing",
            overlaps=bool(config.get("overlaps")),
            segment=int(config.get("segment", block_k)),
        )


class RowOptions(NamedTuple):
    """What the kernels of dense rows are compiled for."""

    alpha: float
    steep: bool
    shallow: bool
    degree: int
    relative: bool = True
    exact: bool = True
    alphas: bool = False

    @classmethod
    def of(cls, problem: RowProblem) -> RowOptions:
        alpha = problem.alpha
        return cls(compiled_alpha(alpha), is_steep(alpha), is_shallow(alpha), degree_of(alpha))


FACTORS = frozenset(
    (
        *("window", "causal_align", "lengths or packed sequences", "block_table"),
        *("alpha as a tensor", "dropout_p"),
    )
)
"""Features that leave a score the product of query and key, times a number. What is not here, as a
feature that is new, makes scores of its own: see :func:`is_scored`."""

ADDED = FACTORS | {"attn_mask", "alibi_slopes", "sinks"}
"""Those that leave it that and what is added: see :func:`is_folded`."""

BOUNDED = ADDED - {"attn_mask"} | {"softcap", "scale as a tensor"}
"""Those beside which slopes keep far keys out of the support: see ``near_tiles`` in
``kernels/score.py``."""

LEADING = BOUNDED - {"lengths or packed sequences"}
"""Those with which a row sees leading keys, but for windows: see :func:`is_scattered`."""


def has_only(problem: Problem, features: Collection[str]) -> bool:
    """Whether nothing else is asked."""
    return all(feature in features for feature in problem.features)


def is_shared(problem: Problem) -> bool:
    """Whether several sequences have one mask."""
    mask = problem.operand("attn_mask")
    return mask is not None and not mask.spread[0] and problem.batch > 1


def is_scored(problem: Problem) -> bool:
    """Whether ``s`` in the kernels is the score, not the product of query and key: where more than
    a number's factor lies between the two."""
    return not has_only(problem, FACTORS)


def is_windowed(problem: Problem) -> bool:
    """Whether a window ends on both sides of what a row sees."""
    said = problem.scores
    return said.left >= 0 and said.right >= 0 and not problem.operand("ranges")


def is_folded(problem: Problem) -> bool:
    """Whether products add up from what a mask adds to scores: where queries hold the scale without
    being rounded. That is an operation less for each score."""
    mask, scale = problem.operand("attn_mask"), problem.scores.scale
    adds = mask is not None and mask.dtype != torch.bool
    # float16 would round small queries.
    exact = problem.dtype == torch.bfloat16 and math.frexp(abs(scale))[0] == 0.5
    return adds and exact and 2.0**-16 <= abs(scale) <= 1.0 and has_only(problem, ADDED)


def is_scattered(problem: Problem) -> bool:
    """Whether a row may see other keys than leading ones."""
    return problem.scores.left >= 0 or not has_only(problem, LEADING)


def is_steep(alpha: float) -> bool:
    """Whether ``p = x^(1 / (alpha - 1))`` is concave, with an infinite slope at ``x = 0``."""
    return alpha > 2.0


def keeps_shares(problem: Problem) -> bool:
    """Whether the means that a backward needs are kept in 16 bits: where alpha has a closed form,
    and not for a ``sum ds k`` that cancels. Where alpha has none ``spread`` says which key has all
    of the probability, and has no room for the largest mean."""
    alphas = any(operand.name == "alphas" for operand in problem.operands)
    closed = not alphas and compiled_alpha(problem.alpha) != 0.0
    return problem.dtype.itemsize == 2 and closed and problem.head_dim >= FULL_WIDTH


def is_shallow(alpha: float) -> bool:
    """Whether ``1 / (alpha - 1)`` is so large that a power takes the digits of its base: see
    ``kernels/score.py``. Thresholds near the upper end of their window, which are those of larger
    alphas, are finer there as they are."""
    return alpha < 1.5


def degree_of(alpha: float) -> int:
    """``1 / (alpha - 1)`` where a power of it is few multiplications, as for alpha of 1.25 or 1.1;
    else 0."""
    exponent = 1.0 / (alpha - 1.0)
    whole = round(exponent)
    few = is_shallow(alpha) and whole <= MOST_DEGREE
    return whole if few and abs(exponent - whole) < NEARLY_WHOLE else 0


def is_halved(problem: Problem) -> bool:
    """Whether ``u`` and ``ds`` are multiplied in two 16-bit halves, where one rounding would be the
    error of a whole gradient.

    Above alpha = 2 those of one key may outweigh all others. In few dimensions the keys of a
    support are alike, so that ``sum ds k`` nearly cancels: the ``ds`` of a row add up to zero.
    """
    narrow = problem.head_dim < FULL_WIDTH
    return kernel_dtype(problem.dtype) != torch.float32 and (narrow or is_steep(problem.alpha))


def compiled_alpha(alpha: float) -> float:
    """``alpha`` where kernels have a closed form for it, else 0."""
    return alpha if alpha in (1.5, 2.0) else 0.0


def whole_width(problem: Problem, config: Config) -> int:
    """Keys of a tile that holds all: a power of two."""
    return max(int(config["block_k"]), 1 << (problem.length_k - 1).bit_length())


def whole_parts(problem: Problem, config: Config) -> list[tuple[int, int]]:
    """Keys of the tiles that hold whole rows, and how many row blocks of a head have each, longest
    rows first: of those that see no key of the second half, only the first is looked at."""
    row_blocks, width = Grid.of(problem, config).row_blocks, whole_width(problem, config)
    said, narrow = problem.scores, 0
    if width >= NARROWED and said.right >= 0 and not problem.operand("ranges"):
        narrow = (width // 2 - problem.shift - said.right) // int(config["block_q"])
        narrow = min(max(narrow, 0), row_blocks)
    parts = (width, row_blocks - narrow), (width // 2, narrow)
    return [(keys, number) for keys, number in parts if number]


def padded(width: int) -> int:
    """Width of a tile: a power of two, and at least what a matrix product takes."""
    return max(FULL_WIDTH, 1 << (width - 1).bit_length())


@dataclass(frozen=True, slots=True)
class Grid:
    """How a problem falls into row blocks and key tiles."""

    heads: int
    heads_kv: int
    gqa_group: int
    rows: int
    row_blocks: int
    tiles: int

    @classmethod
    def of(cls, problem: Problem, config: Config) -> Grid:
        heads = problem.batch * problem.heads_q
        return cls(
            heads=heads,
            heads_kv=problem.batch * problem.heads_kv,
            gqa_group=problem.gqa_group,
            rows=heads * problem.length_q,
            row_blocks=-(-problem.length_q // int(config["block_q"])),
            tiles=-(-problem.length_k // int(config["block_k"])),
        )


Place = Tensor | int
"""What a kernel is given of a piece of memory: a view of it, or its address."""


class Piece(NamedTuple):
    """A part of a call's memory: the byte at which it begins, its dtype and number of elements."""

    begin: int
    dtype: torch.dtype
    length: int


class Pieces(NamedTuple):
    """How a call's memory, one allocation of ``total`` bytes, is shared out, by name; aligned as
    kernels are compiled for."""

    places: dict[str, Piece]
    total: int

    @classmethod
    def of(cls, lengths: dict[str, tuple[torch.dtype, int]]) -> Pieces:
        places, total = {}, 0
        for name, (dtype, length) in lengths.items():
            places[name] = Piece(total, dtype, length)
            total += -(-length * dtype.itemsize // ALIGNMENT) * ALIGNMENT
        return cls(places, total)

    def tensors(self, memory: Tensor) -> dict[str, Tensor]:
        """What Triton learns dtypes from."""
        return {
            name: memory[begin : begin + length * dtype.itemsize].view(dtype)
            for name, (begin, dtype, length) in self.places.items()
        }

    def addresses(self, memory: Tensor) -> dict[str, int]:
        """What it takes as well once it has compiled: views take the host longer than a launch."""
        start = memory.data_ptr()
        return {name: start + begin for name, (begin, _, _) in self.places.items()}


class Saved:
    """What the forward leaves for the backward, as parts of one buffer.

    ``out_u`` ``(rows, head_dim_v)``: means of the values weighted by ``u``, in float32 or, by
    :func:`keeps_shares`, in 16 bits, see ``shares_of``.
    ``top``, ``t`` ``(rows,)`` float32: ``tau = c top + t``.
    ``spread`` ``(rows,)`` float32: where ``exact``, 0 where one key has all probability, else 1;
    beside shares that largest mean, or -1 where they are the means themselves.
    ``counts`` ``(heads, row_blocks, 2)`` int32: entries of a list that need no mask, and
    all of them.
    ``lists`` ``(heads, row_blocks, tiles)`` int32: numbers of the live tiles, those that need no
    mask first, both ascending.
    ``live`` ``(heads, row_blocks, tiles)`` int8: the same as flags.
    ``poison`` ``(batch * heads_kv,)`` int32: leading keys that a poisoned row sees; where rows see
    others ``(batch * heads_kv, tiles)``: whether one may see some of a tile's.
    ``taken`` ``(1,)`` int32: row blocks that the forward's programs have taken on.
    ``some`` ``(SAFE_KERNELS, 4)`` int32: first of four, whether one of these kernels found what is
    not finite.

    From the byte ``cleared`` on, ``poison``, ``taken``, ``some`` and ``live``, it starts as zeros.
    """

    def __init__(self, problem: Problem, config: Config) -> None:
        grid = Grid.of(problem, config)
        pairs = grid.heads * grid.row_blocks * grid.tiles
        scattered = is_scattered(problem)
        means = torch.int16 if keeps_shares(problem) else torch.float32
        lengths = {
            "out_u": (means, grid.rows * problem.head_dim_v * int(problem.needs_grad)),
            "top": (torch.float32, grid.rows),
            "t": (torch.float32, grid.rows),
            "spread": (torch.float32, grid.rows),
            "counts": (torch.int32, grid.heads * grid.row_blocks * 2),
            "lists": (torch.int32, pairs),
            "poison": (torch.int32, grid.heads_kv * (grid.tiles if scattered else 1)),
            "taken": (torch.int32, 1),
            "some": (torch.int32, len(SAFE_KERNELS) * (ALIGNMENT // 4)),
            "live": (torch.int8, pairs),
        }
        self.pieces = Pieces.of(lengths)
        self.total = self.pieces.total
        self.cleared = self.pieces.places["poison"].begin

    def check(self, saved: Tensor) -> Tensor:
        """``saved``.

        Raises:
            ValueError: it is too short. It may be longer.
        """
        if saved.numel() < self.total:
            raise ValueError(f"saved must have {self.total} bytes here, got {saved.numel()}")
        return saved


class Limits(NamedTuple):
    """What a device sets to the sizes: ``shared``, the bytes of shared memory that a block may ask
    for; ``wgmma``, whether its tensor cores are those of compute capability 9.0; ``overlaps``,
    whether a kernel's blocks may be placed before the kernel before it has ended, to wait there
    (programmatic dependent launch, from compute capability 9.0 on)."""

    shared: int
    wgmma: bool = False
    overlaps: bool = False


def configs(problem: Problem, limits: Limits) -> Iterator[Config]:
    """Configurations that fit a device, the default first. ``whole`` says what is found of rows
    whose scores are all at hand; where these are powers without a closed form, which take registers
    of their own, it comes second."""
    tiled = list(tiled_configs(problem, limits))
    if not tiled:
        return
    first, *others = tiled
    whole = list(whole_configs(problem, first, limits))
    plain = Options.of(problem, first).alpha != 0.0
    yield from (*whole, first) if plain else (first, *whole)
    yield from others


def whole_configs(problem: Problem, config: Config, limits: Limits) -> Iterator[Config]:
    """``config`` with thresholds and outputs, or thresholds alone, of whole rows, where they fit.

    For compute capability 9.0 alone: it was made for its products, and Triton 3.7.1 compiles it for
    no later one. In float32, unrolled products of this size take minutes to compile.
    """
    made_for = limits.wgmma and problem.dtype != torch.float32
    if not (made_for or INTERPRETED) or problem.page_size or problem.length_k > LONGEST_WHOLE:
        return
    # A tile of a mask brings a layout of its own, and with one layout lists were wrong, see SCORES:
    # those of more keys are not offered before a GPU has shown them right.
    given = {operand.name for operand in problem.operands}
    if problem.length_k > SEEN_WITH_MASKS and given & {"attn_mask", "alibi_slopes"}:
        return
    block_q, width = int(config["block_q"]), whole_width(problem, config)
    keys = padded(problem.head_dim) * problem.dtype.itemsize
    values = padded(problem.head_dim_v) * problem.dtype.itemsize
    handed_on = block_q * padded(problem.head_dim_v) * SUM_ITEMSIZE
    if operand := problem.operand("attn_mask"):
        handed_on = max(handed_on, block_q * width * operand.dtype.itemsize)
    shared = (block_q + width) * keys + handed_on
    config = {**config, "whole_warps": 4 if block_q * width <= SCORES else 8}
    # Words for dropout leave no registers. Above alpha = 2 means of values must be of the very
    # weights that gradients are of, which a product of other shape may round otherwise.
    output = width <= LONGEST_WHOLE_OUTPUT and not problem.scores.dropout_p
    if output and not is_steep(problem.alpha) and shared + width * values <= limits.shared:
        yield {**config, "whole": "outputs"}
    if shared <= limits.shared:
        yield {**config, "whole": "thresholds"}


def tiled_configs(problem: Problem, limits: Limits) -> Iterator[Config]:
    """Configurations for rows of any length."""
    wide = max(padded(problem.head_dim), padded(problem.head_dim_v))
    unrolled = problem.dtype == torch.float32 and not INTERPRETED
    # Nothing here is by needs_grad: an output has the same bits with and without gradients.
    found = 0
    for block_q, block_k in BLOCKS:
        longest = max(block_q, block_k)
        if longest * wide > ACCUMULATORS:
            continue
        if unrolled and (block_q * block_k * wide > FLOAT32_PRODUCTS or longest > 32):
            continue
        few = block_k * wide <= FEW_SUMS and longest * block_k <= FEW_SUMS
        warps = 4 if few and not unrolled else 8
        narrow = wide <= 64 and longest <= 64 and not unrolled
        # Beside those of a mask, the scores of two tiles do not fit the registers.
        single = found or unrolled or problem.operand("attn_mask")
        # Windows end within tiles, and what is done twice for them is less beside one.
        wider = not single and wide <= 64 and not is_windowed(problem)
        spans = SPANS[:1] if single else SPANS[::-1] if wider else SPANS
        for span in spans:
            config: dict[str, int | str] = {
                "block_q": block_q,
                "block_k": block_k,
                "span": span,
                "parts": max(1, block_q // (64 if wide <= 64 or warps == 8 else 32)),
                "warps": warps,
                "solve_warps": warps if unrolled or wide > 128 else 4,
                "registers": (registers := REGISTERS if narrow and limits.wgmma else 0),
                "query_registers": min(
                    registers, WINDOW_REGISTERS if is_windowed(problem) else REGISTERS
                ),
                "whole": "nothing",
                "whole_warps": 4,
            }
            stages = _stages(problem, config, limits)
            if stages is None:
                continue
            found += span == spans[0]
            yield config | stages
        if found == MAX_ALTERNATIVES:
            return


def is_decoding(problem: Problem) -> bool:
    """Whether ``kernels/decode.py`` computes it: few queries without gradients, and keys enough to
    be worth being cut. All else that a call may ask makes no difference."""
    few = not problem.needs_grad and problem.length_q <= MOST_DECODED
    return few and problem.length_k >= FEWEST_DECODED


def decoding_configs(problem: Problem, limits: Limits) -> Iterator[Config]:
    """:func:`configs` where :func:`is_decoding`."""
    wide = max(padded(problem.head_dim), padded(problem.head_dim_v))
    unrolled = problem.dtype == torch.float32 and not INTERPRETED
    rows = problem.gqa_group * problem.length_q
    all_rows = problem.batch * problem.heads_kv * rows
    block_q = min(DECODED_ROWS, max(FULL_WIDTH, 1 << (rows - 1).bit_length()))
    while unrolled and block_q > FULL_WIDTH and block_q * 32 * wide > FLOAT32_PRODUCTS:
        block_q //= 2
    found = 0
    for block_k, stages in DECODED_TILES:
        tile = block_k * wide * problem.dtype.itemsize
        if (unrolled and block_k > 32) or stages * tile > limits.shared // 2:
            continue
        warps = 4 if block_q * wide <= FEW_SUMS else 8
        shared = stages * tile + block_q * (wide * problem.dtype.itemsize + 4 * block_k)
        registers = 32 * warps * DECODED_REGISTERS * (1 + unrolled)
        residents = min(limits.shared // shared, REGISTER_FILE // registers)
        yield {
            "block_q": block_q,
            "block_k": block_k,
            "stages": stages,
            "warps": warps,
            "residents": max(1, residents),
            "solve_warps": 8 if all_rows <= FEW_ROWS else 4 if all_rows < MANY_ROWS else 2,
            "overlaps": int(limits.overlaps),
            "segment": min(block_k, DECODED_SEGMENT if block_q > FULL_WIDTH else block_k),
        }
        found += 1
        if found == DECODED_ALTERNATIVES:
            return


@functools.lru_cache
def splits_of(blocks: int, tiles: int, programs: int) -> int:
    """How many parts the keys of each of ``blocks`` are cut into, so that all of ``programs`` work
    that run at a time, until the end."""
    most = max(1, tiles // FEWEST_TILES)
    if blocks * MANY_WAVES <= programs:
        return min(programs // blocks, most)

    def busy(splits: int) -> float:
        waves = -(-blocks * splits // programs)
        return blocks * splits / (waves * programs)

    return max(range(1, min(MANY_WAVES, most) + 1), key=busy)


def decoding_options(config: Config, kernel: str) -> dict[str, int]:
    """Triton's options for one of ``DECODE_KERNELS``."""
    warps = int(config["warps"])
    if kernel == "decode_scan":
        # Those that were counted on; what then spills is used where bounds are set, not by key.
        registers = REGISTER_FILE // (32 * warps * int(config["residents"]))
        limit = {"maxnreg": registers} if registers < 255 else {}
        return {"num_warps": warps, "num_stages": int(config["stages"]), **limit}
    overlap = {"launch_pdl": True} if config["overlaps"] else {}
    if kernel == "decode_weigh":  # which spills with fewer
        return {"num_warps": 8 if int(config["block_q"]) <= 32 else 16, **overlap}
    if kernel == "decode_solve":  # many rows wait for registers, few for the warps of one
        solve_warps = int(config["solve_warps"])
        limit = {"maxnreg": SOLVE_REGISTERS} if solve_warps < 8 else {}
        return {"num_warps": solve_warps, **limit, **overlap}
    return {"num_warps": 8 if kernel == "decode_narrow" else 4, **overlap}


def launch_options(config: Config, kernel: str) -> dict[str, int]:
    """Triton's options for one of ``KERNELS``."""
    if kernel in LIST_KERNELS:
        return {"num_warps": 4}
    if kernel in ("grad_mask", "whole_rows"):  # whose loops ask for nothing ahead
        return {"num_warps": _warps(config, kernel)}
    options = {"num_warps": _warps(config, kernel), "num_stages": int(config[f"{kernel}_stages"])}
    if registers := _registers(config, kernel):
        options["maxnreg"] = registers
    return options


def most_pieces(grid: Grid, multiprocessors: int) -> int:
    """Pieces that the lists of key tiles may be cut into: where they are few, so that a key which
    nearly all rows keep may take longer than all others, and none where all are short."""
    few = grid.heads_kv * grid.tiles <= MANY_LISTS * multiprocessors
    long = grid.gqa_group * grid.row_blocks >= 2 * SHORTEST_PIECE
    return PIECES * multiprocessors if few and long else 0


def row_blocks_each(grid: Grid, config: Config, multiprocessors: int) -> int:
    """Row blocks of a head for a program of ``whole_rows``: as many as let the last one end first,
    where loading keys takes half as long as a row block."""
    slots = residents(config, "whole_rows") * multiprocessors

    def time(each: int) -> int:
        return -(-grid.heads * -(-grid.row_blocks // each) // slots) * (2 * each + 1)

    return min(range(1, grid.row_blocks + 1), key=time)


def residents(config: Config, kernel: str) -> int:
    """Blocks that the registers of a multiprocessor hold at a time."""
    registers = _registers(config, kernel) or 255
    return max(1, REGISTER_FILE // (registers * 32 * _warps(config, kernel)))


def _warps(config: Config, kernel: str) -> int:
    named = {"solve": "solve_warps", "whole_rows": "whole_warps"}
    return int(config[named.get(kernel, "warps")])


def _registers(config: Config, kernel: str) -> int:
    """The limit of a thread's registers; 0 where there is none."""
    if kernel in ("grad_key_value", "whole_rows"):
        return 0
    return int(config["query_registers" if kernel == "grad_query" else "registers"])


def _stages(problem: Problem, config: Config, limits: Limits) -> dict[str, int] | None:
    """The stages of each kernel: the most that leave shared memory for all blocks that registers
    hold, or the fewest; None where those do not fit."""
    itemsize = problem.dtype.itemsize
    block_q, block_k = int(config["block_q"]), int(config["block_k"])
    query = padded(problem.head_dim) * itemsize
    both = query + padded(problem.head_dim_v) * itemsize
    part = block_q // int(config["parts"])
    held_and_staged = {
        "solve": (query * block_q, query * int(config["span"]) * block_k),
        "output": (query * block_q, both * block_k),
        "grad_query": (both * block_q, both * block_k),
        "grad_key_value": (both * block_k, both * part),
    }
    operand = problem.operand("attn_mask")
    # What threads hand on to each other: products, and entries of a mask. The products of compute
    # capability 9.0 take them from registers, and masks come as they take them.
    handed_on = dict.fromkeys(held_and_staged, block_q * block_k * itemsize)
    if operand and limits.wgmma and itemsize == 2:
        handed_on = dict.fromkeys(held_and_staged, 0)
        handed_on |= {"solve": RESERVED, "grad_key_value": part * block_k * itemsize + 2 * RESERVED}
    elif operand:
        handed_on = {
            kernel: n + block_q * block_k * MASK_ITEMSIZE for kernel, n in handed_on.items()
        }
    chosen = {}
    for kernel, (held, staged) in held_and_staged.items():
        most = MAX_STAGES
        if kernel == "grad_key_value":
            # On an H200 two are 5 % faster than three, and a fifth at head_dim 128. The lists of a
            # window's key tiles are short: there three are 7 % faster, at head_dim 64.
            most = MIN_STAGES + (is_windowed(problem) and both <= 256)
        mask = 0
        if operand:
            mask = (part if kernel == "grad_key_value" else block_q) * block_k
            mask *= operand.dtype.itemsize
        blocks = residents(config, kernel)
        shared = {
            # A mask's tile is taken from shared memory before products begin, not by them.
            stages: held + stages * staged + (stages - 1) * mask + handed_on[kernel]
            for stages in range(MIN_STAGES, most + 1)
        }
        if shared[MIN_STAGES] > limits.shared:
            return None
        chosen[f"{kernel}_stages"] = max(
            stages
            for stages, taken in shared.items()
            if stages == MIN_STAGES
            or (taken <= limits.shared and blocks * (taken + RESERVED) <= limits.shared + RESERVED)
        )
    return chosen
